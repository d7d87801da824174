"""Weights & Biases: what its package is asked to do, without it being installed."""

import sys
import types

import jax.numpy as jnp
import pytest

from tw_jax.config import load_config
from tw_jax.errors import UserError
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.sft import SFTConfig
from tw_jax.train.tracker import TrackerConfig, make_tracker


class StandIn:
    """Records the calls; it stands where the package would."""

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1

    def as_module(self) -> types.ModuleType:
        module = types.ModuleType("wandb")
        vars(module).update(init=self.init, Html=lambda text: f"html:{text}")
        return module


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in.as_module())
    return stand_in


CONFIG = TrackerConfig(tensorboard=False, wandb=True, wandb_project="threads", wandb_mode="offline")


def test_numbers_and_texts_are_handed_over_with_their_step(wandb, tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    with make_tracker(CONFIG, tmp_path) as tracker:
        tracker.log(1, {"loss": jnp.float32(0.5), "tokens": 7})
        tracker.log_text(2, "sample", "<Thread>\n1: a & b")
        assert not wandb.finished
    assert wandb.finished == 1
    assert wandb.logged == [
        (1, {"loss": 0.5, "tokens": 7.0}),
        (2, {"sample": "html:<pre>&lt;Thread&gt;\n1: a &amp; b</pre>"}),
    ]
    (settings,) = wandb.started
    assert settings["project"] == "threads"
    assert settings["name"] == tmp_path.name
    assert settings["mode"] == "offline"
    assert settings["dir"] == str(tmp_path), "its files lie in the run's folder"
    assert settings["config"] == {"steps": 3}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_resumed_run_is_the_same_run_and_a_new_one_another(wandb, tmp_path):
    for resume_step in (0, 10, 20, 0):
        make_tracker(CONFIG, tmp_path, resume_step=resume_step).close()
    first, second, third, fresh = (settings["id"] for settings in wandb.started)
    assert first == second == third != fresh
    assert all(settings["resume"] == "allow" for settings in wandb.started)


def test_a_name_may_be_given(wandb, tmp_path):
    config = load_config(SFTConfig, None, ["tracker.wandb=true", "tracker.wandb_name=mine"])
    make_tracker(config.tracker, tmp_path).close()
    assert wandb.started[0]["name"] == "mine"
    assert wandb.started[0]["mode"] == "online"


def test_a_missing_package_is_one_clear_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    with pytest.raises(UserError, match=r"pip install wandb.*tracker\.wandb=false"):
        make_tracker(CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == [], "what was there of the run is not touched"


def test_a_folder_of_that_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # where W&B itself once wrote
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        make_tracker(CONFIG, tmp_path / "run")
    sys.modules.pop("wandb", None)


def test_a_service_that_refuses_is_one_clear_message(wandb, monkeypatch, tmp_path):
    def refuse(**settings):
        raise ConnectionError("no api key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"no api key.*wandb login.*wandb_mode=offline"):
        make_tracker(CONFIG, tmp_path)


def test_one_tracker_that_fails_to_close_keeps_no_other_open(wandb, monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("cut off")

    tracker = make_tracker(TrackerConfig(tensorboard=False, wandb=True), tmp_path)
    monkeypatch.setattr(wandb, "finish", fail)
    tracker.log(1, {"loss": 1.0})
    with pytest.raises(RuntimeError, match="cut off"):
        tracker.close()
    with pytest.raises(ValueError, match="closed file"):
        tracker.log(2, {"loss": 1.0})
