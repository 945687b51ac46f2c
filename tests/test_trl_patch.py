"""``patch()``: the same DPO and KTO runs in less memory, the same fields of TRL's fused head, and nothing of it left after ``undo()``."""

import contextlib
import importlib
import sys

import pytest
import torch
import transformers

import rlkern as rk
from bench.harness import memory

from .judge import assert_accurate, error

trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
datasets = pytest.importorskip("datasets")

from trl.trainer import utils as theirs  # noqa: E402

from rlkern.integrations import trl as ours  # noqa: E402
from rlkern.integrations import trl_patch  # noqa: E402
from rlkern.trainers import tutorial  # noqa: E402

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy", "_ChunkedLogProbFunction", "_use_triton")
FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def train(kind, tmp_path, patched, vocabulary=None, **options):
    """(what each step logged, final parameters) of four steps of DPO or KTO."""
    tokenizer = tutorial.build_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    model, reference = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    pairs, _ = tutorial.split(0, largest=6)
    rows = [{"prompt": tutorial.question(a, b), "right": str(a + b), "wrong": str(a + b + 1)} for a, b in pairs[:16]]
    if kind == "DPO":
        rows = [{"prompt": r["prompt"], "chosen": r["right"], "rejected": r["wrong"]} for r in rows]
    else:
        rows = [{"prompt": r["prompt"], "completion": r["right" if i % 2 else "wrong"], "label": bool(i % 2)} for i, r in enumerate(rows)]
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    with ours.patch() if patched else contextlib.nullcontext():
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, ref_model=reference, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    log = [{k: v for k, v in entry.items() if k not in timing and "time" not in k} for entry in trainer.state.log_history]
    return log, dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_training_is_the_same(kind, tmp_path, monkeypatch):
    calls = []
    plain = rk.linear_token_logprobs
    monkeypatch.setattr(rk, "linear_token_logprobs", lambda *a, **k: calls.append(1) or plain(*a, **k))
    log, parameters = train(kind, tmp_path, patched=False)
    assert not calls
    patched_log, patched_parameters = train(kind, tmp_path, patched=True)
    assert len(calls) >= 4 * 2  # policy and reference, each step
    assert len(log) == len(patched_log) >= 4
    for mine, his in zip(patched_log, log, strict=True):
        assert mine.keys() == his.keys()
        for name, value in his.items():  # TRL logs a few digits; rewards and margins begin as differences of equal log-probs
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for name, p in parameters.items():
        assert error(patched_parameters[name], p) <= 1e-3, name  # Adam divides the gradients' rounding by their size


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 3 * 4 * 29])
def test_fields_of_the_fused_head(softcap, with_bias, chunk_bytes, monkeypatch):
    """As TRL's function gives them, with their gradients; over one chunk and over many."""
    monkeypatch.setattr(trl_patch, "_CHUNK_BYTES", chunk_bytes)
    g = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 11, 8, 29
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((rows, width), (vocabulary, width), (vocabulary,)))
    targets, up = torch.randint(vocabulary, (rows,), generator=g), torch.randn(2, rows, generator=g)
    targets[:4] = ((hidden @ weight.T) + (bias if with_bias else 0))[:4].argmax(-1)
    results = []
    for function in (trl_patch.FusedHead, trl.kernels.ChunkedLogProbFunction):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = function.apply(leaves[0], leaves[1], leaves[2] if with_bias else None, targets, 0.7, 16, softcap, 0.5, FIELDS)
        (out[0] @ up[0] + out[1] @ up[1]).backward()
        results.append((out, [x.grad for x in leaves if x.grad is not None]))
    (mine, my_gradients), (his, his_gradients) = results
    for a, b in zip(mine[:4], his[:4], strict=True):
        assert_accurate(a.detach(), b.detach(), eps=1e-5)
    assert torch.equal(mine[4], his[4])
    assert mine[4].any()
    assert not mine[4].all()
    assert len(my_gradients) == len(his_gradients) == 2 + with_bias
    for a, b in zip(my_gradients, his_gradients, strict=True):
        assert error(a, b) <= 1e-5
    assert [x is None for x in trl_patch.FusedHead.apply(hidden, weight, None, targets, 1.0, 16, None, 1.0, ())] == [False, True, True, True, True]


def test_less_memory():
    """A model with TRL's fused head, three quarters of whose labels are the prompt's: on a CPU TRL scores these too."""
    vocabulary = 8192
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    theirs.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(vocabulary, (8, 256), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(256) < 192, -100)

    def step():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.log_probs.sum().backward()
        return out.log_probs.detach()

    with ours.patch():
        mine, (peak, _) = step(), memory(step, ids.device)
    his, (his_peak, _) = step(), memory(step, ids.device)
    assert_accurate(mine, his, eps=1e-5)
    print(f"peak with patch {peak / 2**20:.0f} MiB, without {his_peak / 2**20:.0f} MiB")
    assert peak < 0.75 * his_peak


def test_everyone_who_imported_them_is_reached_and_left_again():
    before = {name: getattr(theirs, name, None) for name in NAMES}
    early = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    sys.modules.pop("trl.experimental.orpo.orpo_trainer", None)
    with ours.patch() as patched:
        assert early.selective_log_softmax is ours.selective_log_softmax
        late = importlib.import_module("trl.experimental.orpo.orpo_trainer")
        assert late.selective_log_softmax is theirs.selective_log_softmax is ours.selective_log_softmax
        assert "trl.experimental.cpo.cpo_trainer.selective_log_softmax" in patched.places
        assert "trl.trainer.utils._ChunkedLogProbFunction" in patched.places
        logits = torch.tensor([[0.0, 0.0, -torch.inf]])
        assert_accurate(theirs.entropy_from_logits(logits), torch.tensor([2.0]).log(), eps=1e-6)  # NaN in TRL's
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch()
    assert {name: getattr(theirs, name, None) for name in NAMES} == before
    assert late.selective_log_softmax is early.selective_log_softmax is before["selective_log_softmax"]
    assert theirs.entropy_from_logits(logits).isnan().all()
    patched.undo()  # again: nothing
    assert {name: getattr(theirs, name, None) for name in NAMES} == before
    assert ours.selective_log_softmax is not before["selective_log_softmax"]


def test_what_is_refused(monkeypatch):
    weight = torch.nn.Parameter(torch.randn(5, 4))
    weight.ds_id = 0  # as DeepSpeed marks its shards
    with pytest.raises(ValueError, match="ZeRO-3 is not supported"):
        trl_patch.FusedHead.apply(torch.randn(2, 4), weight, None, torch.tensor([0, 1]), 1.0, 16, None, 1.0, ())
    monkeypatch.setattr(trl, "__version__", "1.3.0")
    with pytest.raises(ImportError, match=r"trl.patch knows TRL 1.15 and 1.16, found 1.3.0"):
        ours.patch()
