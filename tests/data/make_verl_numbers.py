"""Run verl's own functions over its loss modes and options and write what they give to verl.safetensors, which tests/test_verl.py compares ours with.

    pip install verl==0.9.1 && python tests/data/make_verl_numbers.py

A CPU is enough. Of verl's requirements this needs torch, tensordict, omegaconf, hydra-core, ray, requests, orjson, and what they ask for.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

ROWS, TIME, VOCABULARY, WIDTH = 5, 7, 23, 6
MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo")
# Options of ActorConfig; "agg", "info", "weights" and "old" are arguments of the loss.
OPTIONS = {
    "as it comes": {},
    "clip": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1},
    "one clip": {"clip_ratio": 0.15, "clip_ratio_low": None, "clip_ratio_high": None},
    "dual clip": {"clip_ratio_c": 1.3},
    "temperatures": {"tau_pos": 2.0, "tau_neg": 3.0},
    "weights": {"weights": True},
    "far away": {"old": "far_log_prob"},  # beyond every clamp
    "token-sum": {"agg": "token-sum"},
    "sequence sums": {"agg": "seq-mean-token-sum"},
    "sequence means": {"agg": "seq-mean-token-mean"},
    "sequence sums, normed": {"agg": "seq-mean-token-sum-norm"},
    "normed by a constant": {"agg": "seq-mean-token-sum-norm", "info": {"loss_scale_factor": 100}},
    "global tokens": {"info": {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9}},
    "global sequences": {"agg": "seq-mean-token-mean", "info": {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9}},
}
KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k2+", "k3+", "low_var_kl+", "abs+")


def main() -> None:
    torch.manual_seed(0)
    mask = (torch.arange(TIME) < torch.tensor([7, 5, 0, 1, 4])[:, None]).float()
    mask[0, 2:4] = 0  # tool output
    log_prob = -2 * torch.rand(ROWS, TIME)
    old_log_prob = log_prob + 0.4 * torch.randn(ROWS, TIME)
    old_log_prob[0, 0], old_log_prob[1, 1] = log_prob[0, 0] - 25, log_prob[1, 1] + 3  # beyond the clamps
    advantages = torch.randn(ROWS, 1) * mask
    inputs = {
        "mask": mask,
        "log_prob": log_prob,
        "old_log_prob": old_log_prob,
        "far_log_prob": log_prob - 25,
        "advantages": advantages,
        "weights": (0.3 * torch.randn(ROWS, TIME)).exp() * mask,
        "rewards": torch.randn(ROWS, TIME) * mask,
        "values": torch.randn(ROWS, TIME),
        "old_values": torch.randn(ROWS, TIME),
        "returns": torch.randn(ROWS, TIME),
        "logits": 3 * torch.randn(ROWS, TIME, VOCABULARY),
        "labels": torch.randint(VOCABULARY, (ROWS, TIME)),
        "upstream": torch.randn(ROWS, TIME),
        "hidden": torch.randn(ROWS, TIME, WIDTH),
        "weight": torch.randn(VOCABULARY, WIDTH),
    }
    tensors, cases = {f"inputs/{name}": x for name, x in inputs.items()}, []

    def put(name: str, about: dict, results: dict[str, torch.Tensor], metrics: dict[str, float] | None = None) -> None:
        cases.append({"name": name, **about, "metrics": metrics or {}})
        tensors.update({f"{name}/{key}": x.detach().clone().contiguous() for key, x in results.items()})

    def differentiated(function, *names: str) -> dict[str, torch.Tensor]:
        """The result of ``function`` of these inputs, and its gradient in each (weighed by ``upstream`` where it is no scalar)."""
        leaves = [inputs[name].clone().requires_grad_() for name in names]
        result = function(*leaves)
        (result if result.dim() == 0 else (result * inputs["upstream"]).sum()).backward()
        return {"result": result, **{f"d {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}}

    for mode in MODES:
        for option, settings in OPTIONS.items():
            if mode == "dro" and option == "weights":
                continue  # without a counterpart
            about = dict(settings)
            agg, info, weighted = about.pop("agg", "token-mean"), about.pop("info", {}), about.pop("weights", False)
            old = inputs[about.pop("old", "old_log_prob")]
            config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **about)
            object.__setattr__(config, "global_batch_info", dict(info))
            object.__setattr__(config.policy_loss, "dro_beta", 0.3)
            metrics: dict[str, float] = {}

            def loss(lp, config=config, agg=agg, weighted=weighted, mode=mode, metrics=metrics, old=old):
                weights = inputs["weights"] if weighted else None
                value, found = core_algos.POLICY_LOSS_REGISTRY[mode](old, lp, advantages, mask, agg, config, weights)
                metrics.update(found)
                return value

            result = differentiated(loss, "log_prob")
            put(f"{mode}, {option}", {"kind": "policy", "mode": mode, "settings": settings}, result, metrics)

    for agg in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        for option, info in (("local", {}), ("global", {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 11})):
            about = {"agg": agg, "info": info}
            put(f"agg {agg} {option}", {"kind": "agg", **about}, differentiated(lambda x: core_algos.agg_loss(x, mask, agg, **info), "values"))  # noqa: B023
            clip = 0.3

            def value_loss(v, agg=agg, info=info, clip=clip):
                return core_algos.compute_value_loss(v, inputs["returns"], inputs["old_values"], mask, clip, agg, **info)

            fraction = float(value_loss(inputs["values"])[1])
            result = differentiated(lambda v, f=value_loss: f(v)[0], "values")
            put(f"value {agg} {option}", {"kind": "value", "clip": clip, **about}, result, {"fraction": fraction})

    for name in KL:
        put(f"kl {name}", {"kind": "kl", "penalty": name}, differentiated(lambda lp, n=name: core_algos.kl_penalty(lp, old_log_prob, n), "log_prob"))

    for gamma, lam in ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0)):
        adv, returns = core_algos.compute_gae_advantage_return(inputs["rewards"], inputs["values"], mask, gamma, lam)
        put(f"gae {gamma} {lam}", {"kind": "gae", "gamma": gamma, "lam": lam}, {"advantages": adv * mask, "returns": returns * mask})

    put("logprobs", {"kind": "logprobs"}, differentiated(lambda x: torch_functional.logprobs_from_logits(x, inputs["labels"]), "logits"))
    put("entropy", {"kind": "entropy"}, differentiated(torch_functional.entropy_from_logits, "logits"))
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    for temperature in (1.0, 0.7):
        for i, part in enumerate(("logprobs", "entropy")):
            result = differentiated(lambda h, w, i=i, t=temperature: fused(h, w, inputs["labels"], t)[i], "hidden", "weight")
            put(f"linear {part} {temperature}", {"kind": "linear", "part": i, "temperature": temperature}, result)

    metadata = {"verl": importlib.metadata.version("verl"), "torch": torch.__version__, "cases": json.dumps(cases)}
    path = Path(__file__).with_name("verl.safetensors")
    save_file(tensors, path, metadata)
    print(f"{len(cases)} cases, {path.stat().st_size} bytes: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
