"""Pages of a GPU run: nothing is shown that was not measured, what was measured is shown, and a run that was cut off is no obstacle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report

Json = dict[str, Any]
PAGE = "before\n<!-- bench: gpu -->\nold\n<!-- bench: end -->\nbetween\n<!-- bench: gpu_headline -->\nold\n<!-- bench: end -->\n"


def _contender(name: str, seconds: float, **more: Any) -> Json:
    figures = {"median_seconds": seconds, "device_median_seconds": seconds, "ratio": seconds / 1e-3, "ratio_spread": 0.01, "error": 1e-3}
    return {"name": name, **figures, "peak_bytes": 1 << 20, "held_bytes": 1 << 10, "roofline_fraction": 0.5, **more}


def _contest(vocabulary: int) -> Json:
    contenders = [_contender("rlkern", 1e-3), _contender("PyTorch", 2.5e-3), {"name": "TRL", "missing": "No module named 'trl'"}]
    shape = {"N": 8192, "V": vocabulary, "dtype": "bfloat16"}
    return {"operation": "token_logprobs", "title": "", "shape": shape, "bytes": vocabulary, "flops": 0, "contenders": contenders}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run on a GPU that does not exist."""
    environment = {"device": "Imaginary G100", "memory_bytes": 80 << 30, "threads": 1, "rlkern": "0", "commit": "abc", "torch": "2", "triton": "3"}
    environment |= {"date": "2026-01-01T00:00:00", "peers": {"TRL": None}}
    gpu = {"command": "python -m bench.gpu --out DIR", "environment": environment, "contests": [_contest(v) for v in (32000, 128256, 151936)]}
    right = {"kernels": ["a_kernel"], "findings": [], "wrong": []}
    numbers = {"text": "RowConfig(block=4096)", "fields": {"block": 4096}, "constants": {}, "seconds": 2e-3}
    config = {"configuration": "RowConfig", "call": "token_logprobs, forward", "rows": [8, 1024], "vocabulary": 128256, "gain": 1.25, "failed": {}}
    config |= {"now": numbers, "best": {**numbers, "seconds": 1.6e-3, "changes": "block 2048"}, "seconds": {}}
    results = {
        "gpu": gpu,
        "kernels": {"one": right, "two": {**right, "wrong": ["d logits"]}, "three": {"failure": "RuntimeError: no\nmore"}},
        "configs": {"environment": environment, "configurations": [config], "failed": {}},
        "summary": {
            "kernels": {"seconds": 1.0, "parts": {"kernels-0": "passed"}},
            "tests": {"seconds": 1.0, "parts": {"tests": "killed: its time was up"}},
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of the repository's pages, results and plots."""
    monkeypatch.setattr(report, "GPU", tmp_path / "results" / "gpu")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    monkeypatch.setattr(report, "PAGES", (page,))
    page.write_text(PAGE)
    return page


def test_without_a_measurement_the_pages_say_so(page):
    shown = report.gpu_blocks(report.GPU)
    assert set(shown.values()) == {report.NOT_MEASURED}
    assert not any(figure.isdigit() for figure in report.NOT_MEASURED)


def test_a_run_goes_into_the_pages_and_stays(page, run, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.main([str(run), "--write"]) == 0
    text = page.read_text()
    for part in (
        "Imaginary G100",
        "85.9 GB",
        "2.50 ± 0.01",
        "1 of 3 kernel launches were right",
        "two (wrong in d logits)",
        "three (RuntimeError: no)",
    ):
        assert part in text
    for part in (
        "No module named 'trl'",
        "`RowConfig`",
        "block 2048",
        "1.25",
        "![token_logprobs: time, memory and part of the ceiling](bench-gpu-token-logprobs.png)",
    ):
        assert part in text
    assert (tmp_path / "bench-gpu-token-logprobs.png").exists()
    assert "old" not in text
    for name in report.KEPT:
        assert json.loads((report.GPU / f"{name}.json").read_text()) == json.loads((run / f"{name}.json").read_text())
    assert report.filled(text, report.blocks(report.read(report.DOCUMENTED))) == text


def test_a_run_that_was_cut_off_shows_what_it_has(page, run, capsys):
    for name in ("configs", "summary"):
        (run / f"{name}.json").unlink()
    assert report.main([str(run), "--write"]) == 0
    assert "Imaginary G100" in page.read_text()
    assert "RowConfig" not in page.read_text()
    assert report.main([str(run)]) == 0
    assert "1 of 3 kernel launches" in capsys.readouterr().out


def test_a_run_is_told(page, run, capsys):
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().out
    for part in ("token_logprobs", "1 of 3 kernel launches", "block 2048", "tests: killed: its time was up"):
        assert part in said
    assert page.read_text() == PAGE


def test_what_is_no_measurement_of_a_gpu_is_refused(page, run, capsys):
    result = json.loads((run / "gpu.json").read_text())
    del result["environment"]["memory_bytes"]  # of a dry run
    (run / "gpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        report.main([str(run), "--write"])
    assert "no GPU was measured" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert not report.GPU.exists()


def test_a_folder_without_results_and_a_comparison_with_a_folder_are_refused(page, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, said in (([str(tmp_path / "empty")], "no results"), ([str(run), "--against", "x.json"], "gpu.json")):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert said in capsys.readouterr().err
