"""verl: rlkern's policy losses, registered with verl under names of their own, and functions with the names and signatures of verl's.

``register()`` makes ``actor_rollout_ref.actor.policy_loss.loss_mode=rlkern_vanilla`` and its kin known. Call it in a module of yours that
``VERL_USE_EXTERNAL_MODULES`` names, so that every worker does. Checked against verl 0.9.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import rlkern as rk
from rlkern.ops.policy import Options
from rlkern.ops.torch_backend.terms import functions_of

from ._tokens import aggregate, masked_mean

MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "dro", "cispo")
_AGGREGATIONS = {mode: mode for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")} | {"token-sum": "sum"}
_ESTIMATORS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"} | {name: name for name in ("k1", "abs", "k2", "k3")}


def register(modes: Iterable[str] = MODES, prefix: str = "rlkern_") -> list[str]:
    """Register these policy losses with verl as ``prefix + mode``; returns the names. ``prefix=""`` puts them in the place of verl's own.

    Raises:
        ImportError: verl is not installed. ValueError: a mode has no counterpart here: "clip_cov" and "kl_cov" choose tokens by a covariance
        over the batch, "bypass_mode" filters rollouts first and then calls "vanilla" or REINFORCE.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
    except ImportError as e:
        raise ImportError(f"register needs verl, which cannot be imported here ({e}): pip install verl") from e
    names = []
    for mode in modes:
        _check_mode(mode)
        names.append(f"{prefix}{mode}")
        register_policy_loss(names[-1])(policy_loss_fn(mode))
    return names


def policy_loss_fn(mode: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A policy loss with verl's signature, which gives the loss of ``mode`` and verl's metrics."""
    _check_mode(mode)

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        options = policy_loss_config(mode, config, loss_agg_mode)
        if mode == "dro" and rollout_is_weights is not None:
            raise ValueError("loss_mode 'dro' with rollout_is_weights has no counterpart: verl weighs the penalty too; turn rollout correction off")
        if mode == "geo_mean":  # a mean over all sequences, with one weight for each: the geometric mean of its tokens'
            normalizer: Any = len(log_prob)
            if rollout_is_weights is not None:
                rollout_is_weights = masked_mean((rollout_is_weights + 1e-10).log(), response_mask, 1).exp()
        else:
            normalizer = _normalizer(options.aggregation, **config.global_batch_info)
        out = rk.policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask=response_mask,
            ref_logprobs=old_log_prob if mode == "dro" else None,
            importance_weights=rollout_is_weights,
            normalizer=normalizer,
            config=options,
        )
        return out.loss, {
            name: float(x) for name, x in _metrics(mode, options, log_prob, old_log_prob, advantages, response_mask, out.metrics).items()
        }

    return policy_loss


def policy_loss_config(mode: str, config: Any, loss_agg_mode: str = "token-mean") -> rk.PolicyLossConfig:
    """The :class:`rlkern.PolicyLossConfig` of a loss mode under verl's ``ActorConfig``.

    With "dro" also pass ``ref_logprobs=old_logprobs`` to the loss, and with "geo_mean" the number of sequences as ``normalizer``.

    Raises:
        ValueError: for a mode or an aggregation that has no counterpart.
    """
    _check_mode(mode)
    if loss_agg_mode not in _AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(map(repr, _AGGREGATIONS))}; got {loss_agg_mode!r}")
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    of_mode: dict[str, dict[str, Any]] = {
        "vanilla": {"dual_clip": config.get("clip_ratio_c", 3.0), "log_ratio_clamp": 20.0},
        "dppo_tv": {"surrogate": "dppo_tv", "dppo_form": "score", "ratio_cap": config.get("clip_ratio_c", 20.0), "log_ratio_clamp": 20.0},
        "dppo_kl": {"surrogate": "dppo_kl", "dppo_form": "score", "ratio_cap": config.get("clip_ratio_c", 20.0), "log_ratio_clamp": 20.0},
        "gspo": {"ratio_level": "sequence_token", "log_ratio_clamp": (None, 10.0)},
        "gpg": {"surrogate": "reinforce"},
        "geo_mean": {"surrogate": "gmpo", "aggregation": "seq-mean-token-mean"},
        "cispo": {"surrogate": "cispo", "log_ratio_clamp": 20.0},
    }
    if mode == "sapo":
        taus = {"tau_pos": config.tau_pos, "tau_neg": config.tau_neg}
        of_mode["sapo"] = {"surrogate": "sapo", "log_ratio_clamp": 20.0, "aggregation": "seq-mean-token-mean", **taus}
    if mode == "dro":
        beta = getattr(config.policy_loss, "dro_beta", None)
        if beta is None or not beta > 0:
            raise ValueError(f"loss_mode 'dro' needs policy_loss.dro_beta, a number > 0; got {beta!r}")
        of_mode["dro"] = {"surrogate": "reinforce", "kl_estimator": "k2", "kl_coef": beta}
    shared = {"clip_low": low, "clip_high": high, "aggregation": _AGGREGATIONS[loss_agg_mode]}
    return rk.PolicyLossConfig(**{**shared, "max_length": config.global_batch_info.get("loss_scale_factor"), **of_mode[mode]})


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """``core_algos.agg_loss``; masked entries are not read, and an empty batch gives 0."""
    if loss_agg_mode not in _AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(map(repr, _AGGREGATIONS))}; got {loss_agg_mode!r}")
    aggregation = _AGGREGATIONS[loss_agg_mode]
    normalizer = _normalizer(aggregation, dp_size, batch_num_tokens, global_batch_size)
    return aggregate(loss_mat, loss_mask, aggregation, normalizer=normalizer, max_length=loss_scale_factor)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """``core_algos.kl_penalty``: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3" with verl's clamps; with a "+", the gradient of k2."""
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS:
        hint = "; rk.full_kl is that of two logits tensors" if name == "full" else ""
        raise ValueError(f"kl_penalty must be one of {', '.join(map(repr, _ESTIMATORS))}, or one with '+'; got {kl_penalty!r}{hint}")
    estimator = _ESTIMATORS[name]
    clamps = {"input_clamp": 20.0, "output_clamp": 10.0} if estimator == "k3" else {}
    value = rk.kl_penalty(logprob, ref_logprob, estimator, **clamps)  # type: ignore[arg-type]
    if not kl_penalty.endswith("+") or estimator == "k2":
        return value
    with_gradient = rk.kl_penalty(logprob, ref_logprob, "k2")  # the clamps do not act on it
    return with_gradient + (value - with_gradient).detach()


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``core_algos.compute_value_loss``: the clipped value loss, and the fraction of tokens that the clip acts on."""
    aggregation = _AGGREGATIONS[loss_agg_mode]
    normalizer = _normalizer(aggregation, dp_size, batch_num_tokens, global_batch_size)
    options = {"mask": response_mask, "clip_range": cliprange_value, "aggregation": aggregation, "max_length": loss_scale_factor}
    out = rk.value_loss(vpreds, values, returns, normalizer=normalizer, **options)  # type: ignore[arg-type]
    return out.loss, out.metrics["clip_fraction"]


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``core_algos.compute_gae_advantage_return``: whitened advantages, and returns; 0 at masked positions, where verl's are unused numbers."""
    return rk.gae(token_level_rewards, values, gamma=gamma, lam=lam, mask=response_mask, whitened=True)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``torch_functional.logprobs_from_logits``, float32 (float64 for float64). ``inplace_backward``: the gradient goes over the logits."""
    return rk.token_logprobs(logits, labels, inplace_backward=inplace_backward)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """``torch_functional.entropy_from_logits``, and in place of ``entropy_from_logits_with_chunking`` too: no softmax is kept."""
    return rk.token_logprobs(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device), with_entropy=True)[1]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none", dist_process_group: Any = None
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy``: (log-probs, entropies) of flattened tokens from hidden states, padded or with padding removed.

    reduction: "none", or "sum" or "mean" of the log-probs over the tokens. ``labels[i]`` is the token that ``hidden[i]`` predicts.

    Raises:
        ValueError: another reduction, or a ``dist_process_group``, which would split the vocabulary over ranks.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if dist_process_group is not None:
        raise ValueError(
            "dist_process_group has no counterpart here: verl leaves it to Megatron to add up the gradient of hidden over the ranks; "
            "rk.linear_token_logprobs(process_group=...) does that itself"
        )
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), labels.flatten()
    logprobs, entropy = rk.linear_token_logprobs(flat, weight, ids, temperature=temperature, with_entropy=True)
    return logprobs if reduction == "none" else getattr(logprobs, reduction)(), entropy


def log_probs_from_logits_response_rmpad(input_ids: Tensor, attention_mask: Tensor, logits_rmpad: Tensor, response_length: int) -> Tensor:
    """``torch_functional.log_probs_from_logits_response_rmpad``: ``[batch, response]`` from ``[tokens, V]`` logits whose padding was removed."""
    indices = attention_mask.flatten().nonzero().squeeze(1)
    batch_size, seqlen = input_ids.shape
    return log_probs_from_logits_all_rmpad(input_ids.flatten()[indices][None], logits_rmpad, indices, batch_size, seqlen, response_length)


def log_probs_from_logits_all_rmpad(
    input_ids_rmpad: Tensor, logits_rmpad: Tensor, indices: Tensor, batch_size: int, seqlen: int, response_length: int
) -> Tensor:
    """The same from ids whose padding was removed, ``[1, tokens]``, and their places in the padded batch. 0 after the last token of a sequence."""
    same = torch.nn.functional.pad((indices[1:] == indices[:-1] + 1) & (indices[1:] % seqlen != 0), (0, 1))
    following = torch.where(same, input_ids_rmpad.flatten().roll(-1), -100)
    logprobs = rk.token_logprobs(logits_rmpad, following)
    padded = logprobs.new_zeros(batch_size * seqlen).index_copy(0, indices, logprobs)
    return padded.view(batch_size, seqlen)[:, -response_length - 1 : -1]


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"loss mode {mode!r} has no counterpart in rlkern; there are {', '.join(map(repr, MODES))}")


def _normalizer(
    aggregation: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> float | None:
    """What to divide by, so that the mean over ``dp_size`` ranks is that of the global batch; None for the local count."""
    if aggregation == "sum":
        return 1.0 / dp_size
    name, count = ("batch_num_tokens", batch_num_tokens) if aggregation == "token-mean" else ("global_batch_size", global_batch_size)
    if count is None and dp_size > 1:
        raise ValueError(f"{name} (global) is needed when dp_size > 1, got None with dp_size={dp_size}")
    return None if count is None else count / dp_size


@torch.no_grad()
def _metrics(
    mode: str, c: rk.PolicyLossConfig, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor, metrics: dict[str, Tensor]
) -> dict[str, Tensor]:
    """verl's names; its fractions where it counts other tokens than ``rk.policy_loss``."""
    if mode == "gpg":
        return {}
    log_ratio = log_prob - old_log_prob
    if c.log_ratio_clamp == 20.0:
        log_ratio = log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    kl = {"actor/ppo_kl": masked_mean(-log_ratio, mask)}
    if mode == "dro":
        return kl
    above, below = metrics["clip_fraction"], metrics["dual_clip_fraction"]
    low, high = c.clip_low or 0.0, c.clip_high or 0.0
    if mode == "cispo":  # whatever the sign of the advantage
        above = masked_mean((ratio < 1 - low) | (ratio > 1 + high), mask)
    elif mode == "geo_mean":  # either bound, by the sign of the advantage
        outside = (log_ratio < -low) | (log_ratio > high)
        above, below = masked_mean(outside & (advantages > 0), mask), masked_mean(outside & (advantages < 0), mask)
    elif mode in ("dppo_tv", "dppo_kl"):  # of the tokens kept, those whose ratio was capped
        dropped_low, dropped_high, _ = functions_of(c).edges(log_prob, old_log_prob, log_ratio, ratio, advantages, Options.of(c, 1))
        below = masked_mean((ratio > (c.ratio_cap or math.inf)) & ~dropped_low & ~dropped_high, mask)
    return {"actor/pg_clipfrac": above, **kl, "actor/pg_clipfrac_lower": below}
