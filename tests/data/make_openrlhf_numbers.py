"""Run OpenRLHF's own losses and functions and write what they give to openrlhf.safetensors, which tests/test_openrlhf.py compares ours with.

    pip install --no-deps openrlhf==0.11.2 && python tests/data/make_openrlhf_numbers.py

A CPU is enough, with torch, transformers, datasets, ray and tqdm: what else OpenRLHF imports (engines, other kernels) is replaced by stand-ins, since
nothing of it is called.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import itertools
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

ROWS, TIME, VOCABULARY = 5, 7, 23
STAND_INS = ("deepspeed", "vllm", "flash_attn", "pylatexenc", "ring_flash_attn")


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that hold anything."""

    def find_spec(self, name, path, target=None):
        absent = name.startswith("flash_attn.ops")  # without which log_probs_from_logits takes PyTorch's own functions
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STAND_INS and not absent else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def main() -> None:
    import transformers  # before the stand-ins: it asks which packages there are

    assert transformers
    sys.meta_path.insert(0, StandIn())
    from openrlhf.models import loss, utils
    from openrlhf.trainer.ppo_utils import experience_maker

    makers = [c for c in vars(experience_maker).values() if isinstance(c, type) and hasattr(c, "get_advantages_and_returns")]
    torch.manual_seed(0)
    mask = (torch.arange(TIME) < torch.tensor([7, 5, 2, 1, 4])[:, None]).float()
    mask[0, 2:4] = 0  # tool output
    log_probs = -2 * torch.rand(ROWS, TIME)
    inputs = {
        "mask": mask,
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.4 * torch.randn(ROWS, TIME),
        "advantages": torch.randn(ROWS, TIME),
        "rewards": torch.randn(ROWS, TIME),
        "values": torch.randn(ROWS, TIME),
        "old_values": torch.randn(ROWS, TIME),
        "returns": torch.randn(ROWS, TIME),
        "logits": 3 * torch.randn(ROWS, TIME, VOCABULARY),
        "labels": torch.randint(VOCABULARY, (ROWS, TIME)),
        "upstream": torch.randn(ROWS, TIME),
    }
    inputs["rollout_log_probs"] = inputs["old_log_probs"] + 0.3 * torch.randn(ROWS, TIME)
    inputs["base_log_probs"] = log_probs + 2 * torch.randn(ROWS, TIME)
    inputs["old_log_probs"][0, 0], inputs["base_log_probs"][0, 0] = log_probs[0, 0] - 25, log_probs[0, 0] + 15  # beyond the clamps
    tensors, cases = {f"inputs/{name}": x.clone() for name, x in inputs.items()}, []

    def put(name, about, results, metrics=None):
        cases.append({"name": name, **about, "metrics": metrics or []})
        tensors.update({f"{name}/{key}": x.detach().clone().contiguous() for key, x in results.items()})

    def differentiated(function, name):
        leaf = inputs[name].clone().requires_grad_()
        result = function(leaf)
        (result if result.dim() == 0 else (result * inputs["upstream"]).sum()).backward()
        return {"result": result, f"d {name}": leaf.grad}

    def policy(name, info=None, **options):
        metrics = []

        def function(lp):
            rest = (inputs["old_log_probs"], inputs["advantages"], mask, inputs["rollout_log_probs"])
            value, *found = loss.PolicyLoss(**options)(lp, *rest, **info or {})
            metrics.extend(None if x is None else float(x) for x in found)
            return value

        put(f"policy {name}", {"kind": "policy", "options": options, "info": info or {}}, differentiated(function, "log_probs"), metrics)

    whole = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 9.0}
    for kind, by_token in itertools.product(("ppo", "gspo"), (True, False)):
        shared = {"policy_loss_type": kind, "token_level_loss": by_token}
        tag = f"{kind} {'tokens' if by_token else 'sequences'}"
        policy(tag, **shared)
        policy(f"{tag} clip", **shared, clip_eps_low=0.05, clip_eps_high=0.1)
        policy(f"{tag} dual", **shared, dual_clip=1.2)
        policy(f"{tag} global", whole, **shared)
        for level, mode, gating in itertools.product(("token", "seq"), ("mask", "clip"), ("ratio", "binary_kl", "tv")):
            if mode == "clip" and (level == "seq" or gating != "ratio"):
                continue
            band = [0.8, 1.2] if gating == "ratio" else [0.0, 0.02 if gating == "binary_kl" else 0.1]
            correction = {"is_correction_level": level, "is_correction_mode": mode, "is_correction_gating": gating}
            policy(f"{tag} {level} {mode} {gating}", **shared, **correction, is_correction_threshold=band)
    for by_token, info, clip in itertools.product((True, False), ({}, whole), (None, 0.3)):
        name = f"{'tokens' if by_token else 'sequences'} {'global' if info else 'local'} {clip}"

        def value_loss(v, by_token=by_token, info=info, clip=clip):
            return loss.ValueLoss(clip, by_token)(v, inputs["old_values"], inputs["returns"], mask, **info)

        put(f"value {name}", {"kind": "value", "clip": clip, "by_token": by_token, "info": info}, differentiated(value_loss, "values"))
        if clip is None:
            aggregated = differentiated(lambda x, b=by_token, i=info: loss.aggregate_loss(x, mask, b, **i), "values")
            put(f"aggregate {name}", {"kind": "aggregate", "by_token": by_token, "info": info}, aggregated)
    for estimator, unbiased, old in itertools.product(("k1", "k2", "k3"), (False, True), (False, True)):
        options = {"kl_estimator": estimator, "unbiased_gradient": unbiased}

        def kl(lp, options=options, old=old):
            return utils.compute_approx_kl(lp, inputs["base_log_probs"], inputs["old_log_probs"] if old else None, **options)

        put(f"kl {estimator} {unbiased} {old}", {"kind": "kl", "options": options, "old": old}, differentiated(kl, "log_probs"))
    for gamma, lambd in ((1.0, 1.0), (0.99, 0.95), (0.9, 0.0)):
        adv, returns = makers[0].get_advantages_and_returns(None, inputs["values"], inputs["rewards"], mask, gamma, lambd)
        total = makers[0].get_cumulative_returns(None, inputs["rewards"], mask, gamma)
        results = {"advantages": adv * mask, "returns": returns * mask, "cumulative": total * mask}
        put(f"gae {gamma} {lambd}", {"kind": "gae", "gamma": gamma, "lambd": lambd}, results)
    for temperature in (1.0, 0.7):
        about = {"kind": "logprobs", "temperature": temperature}
        found = differentiated(lambda x, t=temperature: utils.log_probs_from_logits(x * 1, inputs["labels"], t), "logits")
        put(f"logprobs {temperature}", about, found)

    metadata = {"openrlhf": importlib.metadata.version("openrlhf"), "torch": torch.__version__, "cases": json.dumps(cases)}
    path = Path(__file__).with_name("openrlhf.safetensors")
    save_file(tensors, path, metadata)
    print(f"{len(cases)} cases, {path.stat().st_size} bytes: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
