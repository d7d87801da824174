"""Rollouts kept of a run: a fair choice, whole, with every tag, and none twice after a resume."""

import json

import numpy as np
import pytest

from tests.evals.written_rollouts import written_rollout
from tests.train.test_rl_metrics import PARALLEL
from tw_jax.errors import UserError
from tw_jax.rollout.rollout_file import rollout_from_json
from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.train.rollout_samples import (
    Judged,
    RolloutSamples,
    RolloutSamplesConfig,
    read_samples,
)
from tw_jax.trajectory.schemas import make_schema

TOKENIZER = build_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)
ROLLOUT = written_rollout("1+1=", PARALLEL, TOKENIZER, SCHEMA)
JUDGED = Judged(1.1, {"accuracy": 1.0, "acceleration": 0.1}, -0.5, "7", True, True)


def test_the_first_of_every_group_come_first():
    config = RolloutSamplesConfig(every=4, rollouts=3)
    assert config.kept(1, 2, 8) == [(0, 0), (1, 0), (0, 1)]
    assert config.kept(2, 2, 8) == []
    assert config.kept(8, 2, 8) == config.kept(1, 2, 8)
    assert RolloutSamplesConfig(rollouts=0).kept(1, 2, 8) == []
    assert len(RolloutSamplesConfig(every=1, rollouts=99).kept(3, 2, 3)) == 6


@pytest.mark.parametrize("bad", [{"every": 0}, {"rollouts": -1}])
def test_unusable_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RolloutSamplesConfig(**bad)


def test_a_line_keeps_every_tag_and_the_whole_rollout(tmp_path):
    with RolloutSamples(tmp_path / "run" / "rollouts.jsonl", TOKENIZER) as samples:
        samples.write(1, 2, 3, ROLLOUT, JUDGED)
        line = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text())  # there at once
    assert line["response"].startswith(PARALLEL)
    assert line["prompt"].endswith("1+1=")
    assert (line["step"], line["problem"], line["member"]) == (1, 2, 3)
    assert (line["reward"], line["advantage"], line["answer"]) == (1.1, -0.5, "7")
    assert line["terms"] == {"accuracy": 1.0, "acceleration": 0.1}
    again = rollout_from_json(line["rollout"])
    np.testing.assert_array_equal(again.trajectory.tokens, ROLLOUT.trajectory.tokens)
    assert again.trajectory.blocks == ROLLOUT.trajectory.blocks


def test_a_step_writes_what_the_configuration_keeps(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    config = RolloutSamplesConfig(every=2, rollouts=3)
    judged = [Judged(float(i), {}, 0.0, None, False, True) for i in range(4)]
    with RolloutSamples(path, TOKENIZER) as samples:
        for step in (1, 2, 3):
            samples.write_step(config, step, [ROLLOUT] * 4, judged, 2)
    found = [(s["step"], s["problem"], s["member"], s["reward"]) for s in read_samples(path)]
    once = [(0, 0, 0.0), (1, 0, 2.0), (0, 1, 1.0)]
    assert found == [(step, *rest) for step in (1, 2) for rest in once]
    assert {s["step"] for s in read_samples(path, [2])} == {2}


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    with RolloutSamples(path, TOKENIZER) as samples:
        for step in (1, 2, 3):
            samples.write(step, 0, 0, ROLLOUT, JUDGED)
    with path.open("a") as file:
        file.write('{"step": 4, "pro')
    with RolloutSamples(path, TOKENIZER, resume_step=2) as samples:
        samples.write(3, 0, 0, ROLLOUT, JUDGED)
    assert [s["step"] for s in read_samples(path)] == [1, 2, 3]
    with RolloutSamples(path, TOKENIZER):
        assert path.read_text() == "", "a new run starts afresh"


def test_line_breaks_of_other_alphabets_do_not_break_a_line(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    judged = Judged(0.0, {}, 0.0, "a\u2028b\x85c\x0bd", False, True)
    with RolloutSamples(path, TOKENIZER) as samples:
        samples.write(1, 0, 0, ROLLOUT, judged)
        samples.write(2, 0, 0, ROLLOUT, judged)
    with RolloutSamples(path, TOKENIZER, resume_step=1):
        pass
    (line,) = read_samples(path)
    assert line["answer"] == judged.answer


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    judged = Judged(float("nan"), {"mine": float("inf")}, float("nan"), None, False, False)
    with RolloutSamples(tmp_path / "r.jsonl", TOKENIZER) as samples:
        samples.write(1, 0, 0, ROLLOUT, judged)
    (line,) = read_samples(tmp_path / "r.jsonl")
    assert (line["reward"], line["advantage"], line["terms"]) == (None, None, {"mine": None})


def test_a_path_that_cannot_be_written_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write sampled rollouts .*samples\.rollouts=0"):
        RolloutSamples(tmp_path / "file" / "r.jsonl", TOKENIZER)
    with pytest.raises(UserError, match="cannot read rollouts"):
        list(read_samples(tmp_path / "nothing.jsonl"))
