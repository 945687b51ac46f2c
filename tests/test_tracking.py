"""Trackers: they get what the log gets; what is not installed is refused."""

import json
import time
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlkern.trainers.errors import InputError
from rlkern.trainers.runs import read_metrics
from rlkern.trainers.tracking import KNOWN

from .runs import TRAINERS, Killed, die_at, fresh_accelerate, save_files_of_all, short_settings  # noqa: F401


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return save_files_of_all(tmp_path_factory.mktemp("files"))


def test_tensorboard_has_the_numbers_of_the_log(files, tmp_path, monkeypatch):
    """And each step once, also of a run that was killed and resumed; the settings; and timings."""
    changes = {"steps": 3, "save_every": 2, "log_with": ["tensorboard"], "log_project": "sums"}
    _, train, trainer = TRAINERS["grpo"]
    with monkeypatch.context() as patch:
        die_at(patch, trainer, "step", 3)
        with pytest.raises(Killed):
            train(short_settings("grpo", files, tmp_path / "run", **changes))
    time.sleep(1)  # tensorboard reads its files in the order of their seconds
    train(short_settings("grpo", files, tmp_path / "run", **changes, resume=True))
    logs = tmp_path / "run" / "logs" / "sums"
    events = EventAccumulator(str(logs)).Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 4
    for name in {name for row in rows for name in row} - {"step"}:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]  # an event holds a float32
        assert logged == expected
    assert [event.step for event in events.Scalars("seconds_per_step")] == [1, 2, 3]
    settings = next(logs.glob("*/hparams.yml")).read_text()
    assert "prompts_per_step: 4" in settings


def test_a_tracker_that_cannot_be_used_is_refused_at_the_start(files, tmp_path):
    absent = next(name for name in KNOWN if name not in map(str, get_available_trackers()))
    for name, message in ((absent, f"{absent} is not installed: pip install {absent}"), ("tensorbord", "did you mean 'tensorboard'")):
        with pytest.raises(InputError, match=message) as caught:
            TRAINERS["reward"][1](short_settings("reward", files, tmp_path / "run", log_with=[name]))
        assert caught.value.field == "log_with"
    assert not (tmp_path / "run").exists()


def test_trackers_may_change_when_a_run_is_resumed(files, tmp_path):
    train = TRAINERS["reward"][1]
    train(short_settings("reward", files, tmp_path / "run"))
    train(short_settings("reward", files, tmp_path / "run", steps=1, resume=True, log_with=["tensorboard"]))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["log_with"] == ["tensorboard"]
