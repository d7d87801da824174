"""Metrics files: one line per step, no duplicates after a resume."""

import errno
import io
import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.errors import UserError
from tw_jax.train.jsonl_tracker import JsonlTracker, read_metrics
from tw_jax.train.tensorboard_tracker import TensorBoardTracker
from tw_jax.train.tracker import CompositeTracker, TrackerConfig, make_tracker


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_a_line_is_a_json_object_and_is_there_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(3, {"loss": jnp.float32(0.5), "tokens": 7, "rate": np.float64(1e-5)})
    line = json.loads(path.read_text())
    assert line.pop("time") > 1e9
    assert line == {"step": 3, "loss": 0.5, "tokens": 7, "rate": 1e-5}
    tracker.log_text(4, "sample", "1: ünïcode\n<Thread>")
    assert read_metrics(path)[1]["text"] == {"sample": "1: ünïcode\n<Thread>"}
    tracker.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"nan": float("nan"), "inf": jnp.inf, "fine": 1.0})
    text = (tmp_path / "m.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = read_metrics(tmp_path / "m.jsonl")[0]
    assert (line["nan"], line["inf"], line["fine"]) == (None, None, 1.0)


def test_reserved_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be named step"):
        JsonlTracker(tmp_path / "m.jsonl").log(1, {"step": 2.0})


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path)
    for step in range(0, 60, 10):
        tracker.log(step, {"loss": float(step)})
        tracker.log(step, {"heldout_loss": float(step)})
    tracker.close()
    tracker = JsonlTracker(path, resume_step=30)
    assert steps(path) == [0, 0, 10, 10, 20, 20, 30, 30]
    tracker.log(40, {"loss": -1.0})
    assert steps(path)[-1] == 40 and read_metrics(path)[-1]["loss"] == -1.0
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_afresh(tmp_path):
    path = tmp_path / "m.jsonl"
    JsonlTracker(path).log(0, {"loss": 1.0})
    JsonlTracker(path)
    assert path.read_text() == ""


def test_a_line_cut_short_by_a_crash_is_dropped_and_reported(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    JsonlTracker(path).log(1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert steps(path) == [1]
    with caplog.at_level(logging.WARNING):
        JsonlTracker(path, resume_step=5).log(6, {"loss": 2.0})
    assert "dropped 1 lines that could not be read" in caplog.text
    assert steps(path) == [1, 6]


def test_a_disk_that_refuses_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics to .*/file/m.jsonl: .*run_dir"):
        JsonlTracker(tmp_path / "file" / "m.jsonl")


def test_a_full_disk_is_one_clear_message(tmp_path, monkeypatch):
    class FullDisk(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker = JsonlTracker(tmp_path / "m.jsonl")
    monkeypatch.setattr(tracker, "_file", FullDisk())
    with pytest.raises(UserError, match="cannot write metrics to .*m.jsonl: No space left"):
        tracker.log(1, {"loss": 1.0})


def test_reading_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read metrics from .*missing.jsonl"):
        read_metrics(tmp_path / "missing.jsonl")


def test_tensorboard_reads_the_events(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": 1.0 / step})
    first.log_text(1, "sample", "<Thread>\n1: a")
    first.close()
    second = TensorBoardTracker(tmp_path, resume_step=2)
    second.log(3, {"loss": jnp.float32(9.0)})
    second.close()
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert events.Tags()["tensors"] == ["sample/text_summary"]
    TensorBoardTracker(tmp_path).close()  # a new run in the same place
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("loss") == []


def test_composite_passes_everything_on(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with CompositeTracker([JsonlTracker(path) for path in paths]) as tracker:
        tracker.log(1, {"loss": 2.0})
        tracker.log_text(1, "sample", "text")
    for path in paths:
        assert [sorted(line) for line in read_metrics(path)] == [
            ["loss", "step", "time"],
            ["step", "text", "time"],
        ]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_run_has_its_files(tmp_path, tensorboard):
    with make_tracker(TrackerConfig(tensorboard=tensorboard), tmp_path) as tracker:
        tracker.log(1, {"loss": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    assert (tmp_path / "tensorboard").exists() == tensorboard


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with make_tracker(TrackerConfig(), tmp_path) as tracker:
        tracker.log(1, {"loss": 2.0})
    assert list(tmp_path.iterdir()) == []
