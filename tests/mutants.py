"""``make mutants``: faults put into a copy of the library, one at a time. Which of them does no test notice?

    python -m tests.mutants [--write] [PART OF A FILE'S NAME]

With ``--write`` the report goes into docs/reliability.md, in which faults of other files keep the rows that they have. A fault that is noticed by no
test needs one; exit status 1 until it has it.
"""

# ruff: noqa: E501 -- a fault a line

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from bench.report import fill_one

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
MINUTES = 5.0  # for a fault that makes a test hang
WORKERS = max(1, min(4, os.cpu_count() or 1))


class Fault(NamedTuple):
    file: str
    is_now: str  # once in the file
    would_be: str
    tests: str  # files of tests/, without test_ and .py


TERMS, POLICY, LOSS = "rlkern/ops/torch_backend/terms.py", "kernels/policy.py", "policy_loss overflow edges"
LOGITS, SCAN, VALUE = "logprobs edges fused", "scan", "value_loss"
FAULTS = (
    # ---- the online softmax
    Fault("kernels/softmax.py", "tl.full([LANES], FINITE_MIN, tl.float32)", "tl.full([LANES], NEG_INF, tl.float32)", LOGITS),
    Fault("kernels/softmax.py", "(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)", "(x.to(tl.int32) << 16)", LOGITS),
    Fault("kernels/softmax.py", "return tl.maximum(m - m_new, LOWEST) * c", "return (m - m_new) * c", LOGITS),
    Fault("kernels/softmax.py", "t = scale * (t + moved * s) + lane_sum", "t = scale * t + lane_sum", LOGITS),
    Fault("kernels/softmax.py", "lane_sum(e * tl.maximum(d, LOWEST_LOG2))", "lane_sum(e * d)", LOGITS),
    Fault("kernels/softmax.py", "scale * s + lane_sum(e), t", "s + lane_sum(e), t", LOGITS),
    Fault("kernels/softmax.py", "tl.sum(scale * (t + moved * s), AXIS)", "tl.sum(scale * t, AXIS)", LOGITS),
    Fault("kernels/softmax.py", "return (x_target - m) * scale - log2_s * LN2", "return (x_target - m) - log2_s * LN2", LOGITS),
    Fault("kernels/softmax.py", "(log2_s - t / s) * LN2", "(log2_s + t / s) * LN2", LOGITS),
    Fault("kernels/softmax.py", "return -(a + b * entropy) * scale", "return -a * scale", LOGITS),
    Fault("kernels/softmax.py", "-b * LN2 * scale, a * scale", "-b * LN2, a * scale", LOGITS),
    Fault("kernels/softmax.py", "dz = p * (k0 + k1 * tl.maximum(log2_p, LOWEST_LOG2))", "dz = p * (k0 + k1 * tl.maximum(log2_p, LOWEST))", LOGITS),
    # ---- log-probs
    Fault("kernels/logits.py", "stop = tl.where(live, tl.minimum(start + SEGMENT, V), start)", "stop = tl.minimum(start + SEGMENT, V)", "traffic edges logprobs"),
    Fault("kernels/logits.py", "there = live[:, None] & (part < segments)[None, :]", "there = live[:, None] & (part < segments - 1)[None, :]", LOGITS),
    Fault("kernels/logits.py", "tl.where(x > softmax.NEG_INF, dx + k[2], dx)", "dx + k[2]", LOGITS),
    Fault("kernels/logits.py", "        dx *= q - q * q", "        dx *= 1.0", LOGITS),
    Fault("kernels/softcap.py", "tl.clamp(x * LEAST_NORMAL + 5.0, 0.0, 1.0)", "1.0", LOGITS),
    Fault("kernels/softcap.py", "tl.where(x == softmax.NEG_INF, softmax.NEG_INF, cap - times_unit(q, cap))", "cap - times_unit(q, cap)", "divergence"),
    Fault("rlkern/ops/torch_backend/logits.py", "torch.exp2(self._flat(i)[:size]", "torch.exp(self._flat(i)[:size]", LOGITS),
    Fault("rlkern/ops/torch_backend/logits.py", "size += -size % (parts * _WIDTH)", "size += 0", "far_logits"),
    Fault("rlkern/ops/torch_backend/logits.py", "m.clamp(min=torch.finfo(m.dtype).min)", "m", "logprobs"),
    Fault("rlkern/ops/torch_backend/logits.py", "zero = self.into(torch.empty_like(m), m, self.origin(m))", "zero = torch.zeros_like(m)", "far_logits"),
    Fault("rlkern/ops/torch_backend/logits.py", "far = ~(zero.abs() <= 1)", "far = zero.abs() > 1e30", "far_logits"),
    Fault("rlkern/ops/torch_backend/logits.py", "t.sub_(zero * s).mul_(by)", "t.mul_(by)", "far_logits"),
    Fault("rlkern/ops/torch_backend/logits.py", "log2_s = log2_s + zero", "pass", "far_logits"),
    Fault("rlkern/ops/torch_backend/logits.py", "(log2_s / LOG2E - h)", "(log2_s / LOG2E)", LOGITS),
    Fault("rlkern/ops/torch_backend/logits.py", "z.div(cap).masked_fill_(z == -torch.inf, 1.0)", "z.div(cap)", "logprobs edges fuzz"),
    Fault("rlkern/ops/torch_backend/logits.py", "a = a.masked_fill(~inside, torch.nan)", "a = a.masked_fill(~inside, 0.0)", "logprobs edges promises"),
    # ---- surrogates, in both backends
    Fault(POLICY, "return tl.exp(tl.where(A == 0.0, 0.0, log_r))", "return tl.exp(log_r)", LOSS),
    Fault(POLICY, "free_slope = tl.where(r > o.ratio_cap, 0.0, A)", "free_slope = A", LOSS),
    Fault(POLICY, "clipped_slope = tl.where(outside(r, o.low, o.high), 0.0, A)", "clipped_slope = A", LOSS),
    Fault(POLICY, "tl.where(negative & (loss == most), 0.5 * slope, slope)", "slope", LOSS),
    Fault(POLICY, "return tl.where(negative & (loss > most), most, loss)", "return tl.where(loss > most, most, loss)", LOSS),
    Fault(POLICY, "slope = times(A, -clamp(tl.exp(log_r), o.low, o.high))", "slope = times(A, -clamp(tl.exp(log_r), o.low, 1e30))", LOSS),
    Fault(POLICY, "-4.0 * gate * (1.0 - gate)", "-4.0 * gate", LOSS),
    Fault(POLICY, "high = by_sign(A > 0.0, A, o.high, float(\"inf\"))", "high = o.high", LOSS),
    Fault(POLICY, "s = clamp(log_r, -18.420680743952367, 20.0)  # log 1e-8", "s = clamp(log_r, -20.0, 20.0)", LOSS),
    Fault(POLICY, "tl.where(phi < float(\"inf\"), phi, 0.0)", "phi", LOSS),
    Fault(POLICY, "return (A <= 0.0) & (moved < o.low), (A > 0.0)", "return (A < 0.0) & (moved < o.low), (A > 0.0)", LOSS),
    Fault(POLICY, "distance += tl.where(other_old > 0.0, other_old", "distance += tl.where(other_old > 2.0, other_old", LOSS),
    Fault(POLICY, "(distance > o.high) & (p > p_old)", "(distance > o.high)", LOSS),
    Fault(TERMS, "over = (A < 0) & (loss > most)", "over = loss > most", LOSS),
    Fault(TERMS, "torch.where((A < 0) & (loss == most), 0.5 * slope, slope)", "slope", LOSS),
    Fault(TERMS, "free_slope = zero_where(outside(r, -INF, o.ratio_cap), A)", "free_slope = A", LOSS),
    Fault(TERMS, "slope = -clamp(log_r.exp(), o.low, o.high) * A", "slope = -clamp(log_r.exp(), -INF, o.high) * A", LOSS),
    Fault(TERMS, "tau = by_sign(A > 0, o.tau_pos, o.tau_neg, A)", "tau = by_sign(A >= -9e9, o.tau_pos, o.tau_neg, A)", LOSS),
    Fault(TERMS, "stopped = (up & (log_r > o.high)) | (~up & (log_r < o.low))", "stopped = up & (log_r > o.high)", LOSS),
    Fault(TERMS, "k = by_sign(A >= 0, o.vespo_k_pos, o.vespo_k_neg, s)", "k = by_sign(A < 0, o.vespo_k_pos, o.vespo_k_neg, s)", LOSS),
    Fault(TERMS, "return (A <= 0) & (moved < o.low)", "return (A < 0) & (moved < o.low)", LOSS),
    Fault(TERMS, "distance > -o.low) & (p < p_old)", "distance > -o.low)", LOSS),
    Fault(TERMS, "return log_r.clamp(-20, 20), torch.zeros_like(log_r)", "return log_r, torch.zeros_like(log_r)", LOSS),
    # ---- what tokens are added up to
    Fault("kernels/tokens.py", "keep = live if KEPT_MEAN else kept", "keep = kept", LOSS),
    Fault("kernels/tokens.py", "keep = keep & ((A >= 0.0) | (zero + drift <= o.off_policy_threshold))", "keep = keep & (zero + drift <= o.off_policy_threshold)", LOSS),
    Fault("kernels/tokens.py", "d_log_r = tl.where(stopped, 0.0, d_log_r)", "d_log_r = d_log_r", LOSS),
    Fault("kernels/tokens.py", "own_log_r = own_log_r / kept_length", "own_log_r = own_log_r / length", LOSS),
    # ---- the critic
    Fault("kernels/value.py", "tl.where(moves, 1.0, 0.5)", "1.0", VALUE),
    Fault("kernels/value.py", "unexplained = error - (target - value) * (target - value)", "unexplained = error", VALUE),
    Fault("rlkern/ops/torch_backend/value.py", ".mul_(-0.5).add_(1.0)  # 1 for NaN", ".mul_(-1.0).add_(1.0)", VALUE),
    Fault("rlkern/ops/torch_backend/value.py", "as_number(torch.le, plain, clipped).mul_(was_clipped)", "as_number(torch.le, plain, clipped)", VALUE),
    # ---- scans
    Fault("kernels/scan.py", "return x + tl.where(f == 0, 0.0, f * y)", "return x + f * y", SCAN),
    Fault("kernels/scan.py", "return f_b * f_a, through(x_a, f_b, x_b)", "return f_b * f_a, through(x_b, f_b, x_a)", SCAN),
    Fault("kernels/scan.py", "through(through(through(x3, f2, x2), f1, x1), f0, x0)", "through(through(through(x3, f2, x2), f1, x1), f1, x0)", SCAN),
    Fault("kernels/scan.py", "between = live[:, None] & (index < chunk)", "between = live[:, None] & (index <= chunk)", SCAN),
    Fault("rlkern/ops/torch_backend/scan.py", "place.add_(valid.shape[1] - 1 - place[:, -1:].clone()).mul_(valid)", "place.add_(valid.shape[1] - 1 - place[:, -1:].clone())", SCAN),
    Fault("rlkern/ops/torch_backend/scan.py", "heads[:, 1:], (0, 1)", "heads[:, :-1], (1, 0)", SCAN),
    Fault("rlkern/ops/torch_backend/scan.py", "            passes[t].bitwise_and_(passes[t + 1])\n", "            pass\n", "scan fuzz"),
    # ---- two models
    Fault("kernels/divergence.py", "tl.maximum(a, softmax.FINITE_MIN) - tl.maximum(b, softmax.FINITE_MIN)", "a - b", "divergence"),
    Fault("kernels/divergence.py", "tl.where(softmax.lane_max(ratio) > HALF_MAX, INF, t)", "t", "divergence"),
    Fault("kernels/divergence.py", "softmax.lane_max(ratio) > HALF_MAX", "softmax.lane_max(ratio) > 1e30", "divergence"),
    Fault("kernels/divergence.py", "(log2_p_sum - log2_q_sum) - greater, greater", "log2_p_sum - log2_q_sum, greater", "divergence"),
    Fault("kernels/divergence.py", "return tl.maximum(x - m_p, softmax.LOWEST), tl.maximum(y", "return x - m_p, tl.maximum(y", "divergence"),
    Fault("kernels/divergence.py", "log2_of_sum(tl.exp2(-tl.abs(D))) - mixed[4]", "log2_of_sum(tl.exp2(-tl.abs(D))) - 1.0", "divergence"),
    Fault("kernels/divergence.py", "(D * softmax.LN2 - mean)", "(D * factor * softmax.LN2 - mean)", "divergence"),
    Fault("kernels/divergence.py", "(of_p * softmax.LN2 - mean)", "(of_p * factor * softmax.LN2 - mean)", "divergence"),
    Fault("kernels/divergence.py", "q = q * r - 0.3559516370296478", "q = q * r - 0.3559616370296478", "divergence"),
    Fault("kernels/divergence.py", "(t + (shift - softmax.shift(other, other_new, c)) * s)", "(t + shift * s)", "divergence"),
    Fault("rlkern/ops/torch_backend/divergence.py", "not math.isfinite(x.sum())", "False", "divergence"),
    Fault("rlkern/ops/torch_backend/divergence.py", "infinite = ratio.amax(-1, keepdim=True) == torch.inf", "infinite = ratio.amax(-1, keepdim=True) == 1e30", "divergence"),
    Fault("rlkern/ops/torch_backend/divergence.py", "ratio.sub_(log2_p - log2_q + mean * LOG2E)", "ratio.sub_(mean * LOG2E)", "divergence"),
    Fault("rlkern/ops/torch_backend/divergence.py", "sub_(q if included is None else q.mul_(included))", "sub_(q)", "divergence"),
    # ---- around them
    Fault("rlkern/advantages.py", "concatenated(x, sizes, process_group)", "x", "distributed advantages"),
    Fault("rlkern/advantages.py", "if group_size < 1 or answers % group_size:", "if group_size < 1:", "advantages"),
    Fault("rlkern/ops/logits.py", "[[1, x.stride(-2) if x.dim() > 1 else x.shape[-1]]]", "[[1, 0]]", "logprobs"),
    Fault("rlkern/ops/logits.py", "live = ids != IGNORE_INDEX", "live = ids >= 0", "logprobs promises"),
    Fault("rlkern/ops/products.py", "torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)", "torch.promote_types(a.dtype, b.dtype)", "exact_head fused"),
    Fault("rlkern/ops/products.py", "beta=1 if accumulate or i else 0, out=total)", "beta=1 if accumulate else 0, out=total)", "exact_head fused"),
    Fault("rlkern/ops/fused.py", "ctx.spent = True", "ctx.spent = False", "fused"),
    Fault("rlkern/ops/head.py", "accumulate=self.started", "accumulate=True", "fused exact_head"),
    Fault("rlkern/ops/head.py", "h = h.masked_fill(~self.live[self.where(rows)].unsqueeze(1), 0.0)", "h = h", "fused edges promises"),
    # ---- the trainers
    Fault("rlkern/trainers/grpo.py", "learned = batch._replace(mask=batch.mask * ended[:, None]) if args.mask_truncated else batch", "learned = batch", "trainer_wishes"),
    Fault("rlkern/trainers/grpo.py", "self.frozen_logprobs(self.policy, batch) if updates > 1 or batch.logprobs is not None else None", "None", "grpo_trainer engines"),
    Fault("rlkern/trainers/grpo.py", "self.normalizer(tokens[torch.cat(parts)], config.aggregation)", "self.normalizer(tokens, config.aggregation)", "grpo_trainer trainer_wishes"),
    Fault("rlkern/trainers/grpo.py", "ref_logprobs=None if ref is None else ref[part]", "ref_logprobs=None", "grpo_trainer"),
    Fault("rlkern/trainers/ppo.py", "scores = rewards.where(ended, 0.0) if bootstrap else rewards", "scores = rewards", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "cut = last & ~ended[:, None] & bootstrap", "cut = last & ended[:, None] & bootstrap", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "values[:, :-1], values[:, 1:]", "values[:, :-1], values[:, :-1]", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "1 + error * completions", "1 - error * completions", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "if args.whiten:", "if not args.whiten:", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "[:, -batch.mask.shape[1] - 1 :]", "[:, -batch.mask.shape[1] - 2 : -1]", "ppo_trainer"),
    Fault("rlkern/trainers/ppo.py", "if self.reference is not None and not unseen:", "if self.reference is not None:", "trainer_options"),
    Fault("rlkern/trainers/policy.py", "positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)", "positions = batch.attention_mask.cumsum(1).clamp(min=0)", "grpo_trainer trainer_inputs ppo_trainer"),
    Fault("rlkern/trainers/policy.py", "hidden[:, -new - 1 : -1]", "hidden[:, -new:]", "grpo_trainer"),
    Fault("rlkern/trainers/policy.py", "(lengths > 0).sum()", "(lengths >= 0).sum()", "trainer_wishes"),
    Fault("rlkern/trainers/policy.py", "self.balance * (share * self.weight)", "self.balance * self.weight", "experts"),
    Fault("rlkern/trainers/policy.py", "outside=\"zero\" if args.rollout_correction == \"mask\" else \"clamp\"", "outside=\"clamp\"", "engines"),
    Fault("rlkern/trainers/policy.py", "\"temperature\": self.args.temperature, **head", "\"temperature\": 1.0, **head", "grpo_trainer engines"),
    Fault("rlkern/trainers/rollout.py", "[begin, begin]", "[begin, end]", "trainer_inputs"),
    Fault("rlkern/trainers/rollout.py", "logprobs and logprobs[:end]", "logprobs", "trainer_options"),
    Fault("rlkern/trainers/rollout.py", "[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]", "[]", "reward_trainer"),
    Fault("rlkern/trainers/rollout.py", "[tokens[:-1] if tokens and tokens[-1] in self.ends else tokens", "[tokens", "trainer_wishes"),
    Fault("rlkern/trainers/rollout.py", "raise InputError(f\"the engine gave the completion {tokens}; expected {wanted}\", field=\"engine\")", "pass", "engines"),
    Fault("rlkern/trainers/engines.py", "next((i + 1 for i, token", "next((i for i, token", "engines grpo_trainer"),
    Fault("rlkern/trainers/engines.py", "self.logits, input_ids[:, -1], temperature=self.temperature", "self.logits, input_ids[:, -1]", "engines"),
    Fault("rlkern/trainers/engines.py", "if self.stop and stopped(last) else end", "if self.stop else end", "trainer_options"),
    Fault("rlkern/trainers/runs.py", "(model.parameters(), self.args.max_grad_norm)", "(model.parameters(), 1e9)", "grpo_trainer ppo_trainer reward_trainer trainer_inputs"),
    Fault("rlkern/trainers/runs.py", "scaler.step(optimizer.optimizer)", "optimizer.step()", "trainer_inputs ppo_trainer"),
    Fault("rlkern/trainers/runs.py", "if row[\"step\"] <= start] if start", "if row[\"step\"] < start] if start", "grpo_trainer"),
    Fault("rlkern/trainers/runs.py", "if not finite and args.mixed_precision != \"fp16\":", "if False:", "trainer_wishes"),
    Fault("rlkern/trainers/settings.py", "(step + 1) / self.lr_warmup_steps", "step / self.lr_warmup_steps", "grpo_trainer"),
    Fault("rlkern/trainers/checkpoints.py", "self._complete()[: -self.keep]", "self._complete()[: -self.keep - 1]", "grpo_trainer trainer_wishes"),
    Fault("rlkern/trainers/loading.py", "    if missing:\n", "    if False:\n", "trainer_inputs"),
    Fault("rlkern/trainers/loading.py", "    if unknown:\n", "    if False:\n", "trainer_inputs"),
    Fault("rlkern/trainers/loading.py", "module.p = 0.0", "pass", "trainer_inputs"),
    Fault("rlkern/trainers/loading.py", "torch.nn.init.zeros_(model.get_parameter(key))", "pass", "trainer_inputs reward_trainer"),
    Fault("rlkern/trainers/loading.py", "if fresh and (trained or classifies):", "if fresh and trained:", "trainer_inputs"),
    Fault("rlkern/trainers/loading.py", "> 0.01 * first", "> 1e9 * first", "trainer_inputs"),
    Fault("rlkern/trainers/data.py", "_order(seed, position // rows, rows)[position % rows]", "_order(seed, 0, rows)[position % rows]", "grpo_trainer trainer_inputs"),
    Fault("rlkern/trainers/data.py", "prompt + one[:-1]", "prompt", "trainer_options"),
    Fault("rlkern/trainers/data.py", "given, float(margin))", "given, 0.0)", "trainer_options"),
    Fault("rlkern/trainers/reward.py", "out.loss * (len(part) * self.world / total)", "out.loss * (self.world / total)", "reward_trainer"),
    Fault("rlkern/trainers/rewards.py", "given = [(reward.weight, value)", "given = [(1.0, value)", "trainer_inputs grpo_trainer"),
    Fault("rlkern/trainers/directories.py", "if ours == theirs or ours in theirs.parents or theirs in ours.parents:", "if ours == theirs:", "trainer_inputs"),
    Fault("rlkern/trainers/directories.py", "os.link(part, path)", "os.replace(part, path); part.touch()", "trainer_inputs"),
    Fault("rlkern/trainers/sharding.py", "if accumulated != \"1\":", "if False:", "trainer_inputs"),
    Fault("rlkern/trainers/experts.py", "self.model.router_aux_loss_coef * loss", "loss", "experts"),
    Fault("rlkern/trainers/experts.py", "    config.output_router_logits = False\n", "    config.output_router_logits = True\n", "experts"),
    Fault("rlkern/trainers/lora.py", "(parameter + layer.get_delta_weight(NAME))", "parameter", "lora"),
)  # fmt: skip


def noticed(fault: Fault, tree: Path) -> str:
    """By which test, in a copy of the project; empty where by none."""
    file = tree / fault.file
    text = file.read_text()
    assert text.count(fault.is_now) == 1, f"{fault.file} holds {fault.is_now!r} {text.count(fault.is_now)} times, expected once"
    file.write_text(text.replace(fault.is_now, fault.would_be))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in fault.tests.split())]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    except subprocess.TimeoutExpired:
        return f"no end within {MINUTES:.0f} minutes"
    finally:
        file.write_text(text)
    if done.returncode == 0:
        return ""
    named = [line.split(" - ")[0].split("tests/", 1)[-1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return named[0] if named else (done.stdout + done.stderr).strip().splitlines()[-1]


def work(todo: queue.SimpleQueue[Fault], found: dict[Fault, str]) -> None:
    """Until nothing is left to do."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "rlkern"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "site", "dist", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
        while True:
            try:
                fault = todo.get_nowait()
            except queue.Empty:
                return
            try:
                found[fault] = noticed(fault, tree)
            except Exception as why:
                found[fault] = ""
                print(f"{fault.file}: {why}", flush=True)
            print(f"{'noticed' if found[fault] else 'NOT NOTICED':12}{fault.file}: {fault.would_be.strip()}  {found[fault]}", flush=True)


NO_TEST = "**no test**"


def report(found: dict[Fault, str], before: str) -> str:
    """As a table, by file; of faults that were not tried now, the rows that they have in the report ``before``."""
    rows = []
    for fault in FAULTS:
        cells = (fault.file, *(f"`` {' '.join(text.split())} ``" for text in (fault.is_now, fault.would_be)))
        row = f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} | "
        if fault in found:
            rows.append(row + (found[fault] or NO_TEST).replace("|", chr(92) + "|") + " |")
        else:
            rows += [line for line in before.splitlines() if line.startswith(row)]
    noticed = sum(NO_TEST not in row for row in rows)
    return "\n".join([f"{len(rows)} faults, {noticed} noticed:", "", "| file | is | would be | noticed by |", "|---|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="of the name of a file: faults of other files are left out")
    parser.add_argument("--write", action="store_true", help="the report into docs/reliability.md")
    options = parser.parse_args()
    todo: queue.SimpleQueue[Fault] = queue.SimpleQueue()
    for fault in FAULTS:
        if options.part in fault.file:
            todo.put(fault)
    found: dict[Fault, str] = {}
    threads = [threading.Thread(target=work, args=(todo, found)) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if options.write:
        fill_one(PAGE, "mutants", report(found, PAGE.read_text(encoding="utf-8")))
    missed = sum(not by for by in found.values())
    print(f"{len(found)} faults, {missed} not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
