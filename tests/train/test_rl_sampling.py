"""Steps in order: further problems for groups that agree, sampling ahead, stopping, going on."""

import dataclasses
import threading

import numpy as np
import pytest

from tests.train.writing_engine import WritingEngine, problems_of
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rewards.graders import Grade, grade_exact
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.pending_rollouts import PendingRollouts
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_sampling import StepSampler
from tw_jax.train.run_dir import LoadedModel

CONFIG = RLConfig(prompts=3, group_size=2)
REFILLING = dataclasses.replace(
    CONFIG, refill_rounds=2, objective=ObjectiveConfig(drop_zero_variance=True)
)
AHEAD = dataclasses.replace(
    CONFIG, overlap=True, objective=ObjectiveConfig(ratio="ppo_clip", importance_cap=2.0)
)


@pytest.fixture(scope="module")
def model(tokenizer, schema):
    config = PRESETS["tiny"]
    return LoadedModel(qwen3.graphdef(config), {}, config, tokenizer, schema, step=0)


class Answering(WritingEngine):
    """Answers by rounds: one list of texts for every call."""

    def __init__(self, model, rounds, **settings):
        super().__init__(model, [], **settings)
        self.rounds, self.asked = list(rounds), []

    def generate(self, requests, *, on_finish=None, should_stop=None):
        self.texts = self.rounds.pop(0)
        self.asked.append([self.model.tokenizer.decode(r.prompt[1:]) for r in requests])
        return super().generate(requests, on_finish=on_finish, should_stop=should_stop)


def numbered(model, count=40):
    """Problems 0, 1, 2, ..., each with the answer "yes"."""
    return problems_of(model, [(f"n{i}?", "yes") for i in range(count)], grade_exact)


def sampler_of(config, model, engine, folder, should_stop=lambda: False):
    pending = PendingRollouts(folder, "settings", process=0)
    return StepSampler(config, model, engine, numbered(model), pending, should_stop)


def versions(sample):
    return [rollout.policy_version for rollout in sample.rollouts]


def positions(asked):
    return [int(prompt.split("n")[1].split("?")[0]) for prompt in asked[::2]]


def test_groups_that_agree_leave_their_places_to_others(model, tmp_path):
    engine = Answering(
        model,
        [
            ["yes", "no", "yes", "yes", "no", "no"],  # the first group differs
            ["yes", "yes", "no", "yes"],  # of two further ones the second
            ["no", "yes"],
        ],
    )
    with sampler_of(REFILLING, model, engine, tmp_path) as sampler:
        sample = sampler.sample(4, 20, "parameters")
    assert sample is not None
    assert [positions(asked) for asked in engine.asked] == [[20, 21, 22], [23, 24], [25]]
    np.testing.assert_array_equal(
        sample.rewards > 0, np.array([[1, 0], [1, 1], [0, 0], [1, 1], [0, 1], [0, 1]], bool)
    )
    assert len(sample.rollouts) == len(sample.grades) == len(sample.facts) == 12
    assert versions(sample) == [4] * 12
    assert engine.taken == ["parameters"]  # handed over once


def test_malformed_rollouts_make_no_group_differ_where_they_are_dropped(model, tmp_path):
    objective = dataclasses.replace(REFILLING.objective, drop_malformed=True)
    config = dataclasses.replace(REFILLING, objective=objective)
    malformed = "<Parallel>\nno"
    engine = Answering(model, [["yes", malformed, "yes", "no", "no", malformed], ["yes", "no"] * 2])
    with sampler_of(config, model, engine, tmp_path) as sampler:
        sample = sampler.sample(0, 0, {})
    assert sample is not None
    assert sample.format_valid[:3].tolist() == [[True, False], [True, True], [True, False]]
    assert [positions(asked) for asked in engine.asked] == [[0, 1, 2], [3, 4]]


def test_rounds_are_bounded_and_seeds_differ(model, tmp_path):
    engine = Answering(model, [["no"] * 6] * 3)
    seeds = []
    with sampler_of(REFILLING, model, engine, tmp_path) as sampler:
        sample = sampler.sample(0, 0, {})
        seeds = [request.seed for request in engine.requests]
    assert sample is not None and len(sample.rewards) == 9
    assert REFILLING.most_rollouts == 18 == len(sample.rollouts)
    assert len(set(seeds)) == 6


def test_without_a_place_to_fill_nothing_more_is_asked(model, tmp_path):
    engine = Answering(model, [["yes", "no"] * 3])
    with sampler_of(REFILLING, model, engine, tmp_path) as sampler:
        sampler.sample(0, 0, {})
    assert len(engine.asked) == 1


def test_what_was_begun_is_one_step_old_and_samples_while_others_work(model, tmp_path):
    working = threading.Event()
    engine = Answering(model, [["no"] * 6, ["yes"] * 6])
    engine.after_each = lambda number: len(engine.rounds) or working.wait(60)
    with sampler_of(AHEAD, model, engine, tmp_path) as sampler:
        first = sampler.sample(0, 0, "before")
        sampler.begin(1, 3, "before")
        sampler.release()  # must leave what is sampling alone
        working.set()  # it would hang if `begin` waited for rollouts
        assert sampler.settled()
        second = sampler.sample(1, 3, "after")
    assert first is not None and second is not None
    assert (versions(first), versions(second)) == ([0] * 6, [0] * 6)
    assert positions(engine.asked[1]) == [3, 4, 5]
    assert engine.taken == ["before"]  # the devices had them already


def test_a_run_goes_on_with_what_was_sampled_ahead_of_its_checkpoint(model, tmp_path):
    engine = Answering(model, [["no", "yes"] * 3] * 2)
    with sampler_of(AHEAD, model, engine, tmp_path) as sampler:
        sampler.sample(0, 0, "start")
        sampler.begin(1, 3, "start")
        assert sampler.settled()
    nothing = Answering(model, [])
    with sampler_of(AHEAD, model, nothing, tmp_path) as sampler:
        again = sampler.sample(1, 3, "after one step")
    assert again is not None
    assert versions(again) == [0] * 6
    assert nothing.taken == []  # and nothing was sampled


def test_half_a_step_goes_on_where_it_was_stopped(model, tmp_path):
    stop = []
    engine = Answering(model, [["no", "yes"] * 3] * 2)
    engine.after_each = lambda number: stop.append(1) if number == 3 else None
    with sampler_of(CONFIG, model, engine, tmp_path, lambda: bool(stop)) as sampler:
        assert sampler.sample(0, 0, {}) is None
        assert sampler.settled()  # nothing of it is needed to go on from here
    engine.after_each = None
    with sampler_of(CONFIG, model, engine, tmp_path) as sampler:
        sample = sampler.sample(0, 0, {})
    assert sample is not None and len(sample.rollouts) == 6
    assert [len(asked) for asked in engine.asked] == [6, 2]


def test_what_was_begun_and_stopped_forbids_a_checkpoint(model, tmp_path):
    stop = []
    engine = Answering(model, [["no", "yes"] * 3] * 2)
    with sampler_of(AHEAD, model, engine, tmp_path, lambda: bool(stop)) as sampler:
        sampler.sample(0, 0, {})
        stop.append(1)
        sampler.begin(1, 3, {})
        assert not sampler.settled()
        assert sampler.sample(1, 3, {}) is None
        assert not sampler.settled()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="drop_zero_variance"):
        dataclasses.replace(CONFIG, refill_rounds=1)
    with pytest.raises(ValueError, match="importance_cap"):
        dataclasses.replace(CONFIG, overlap=True)
    assert CONFIG.keeps_parts and not AHEAD.keeps_parts
    exact = dataclasses.replace(AHEAD.engine, deterministic=True)
    assert dataclasses.replace(AHEAD, engine=exact).keeps_parts


def test_answers_that_the_grader_failed_on_are_graded_again(model, tmp_path):
    mended = []

    def grader(text, reference):
        if text == "no" and not mended:
            return Grade(False, None, "grading_raised", 0.0, "it raised KeyError: 'x'")
        return grade_exact(text, reference)

    config = dataclasses.replace(CONFIG, max_ungraded_share=0.2)
    engine = Answering(model, [["yes", "no"] * 3])
    pending = PendingRollouts(tmp_path, "settings", process=0)
    problems = problems_of(model, [("?", "yes")], grader)
    with StepSampler(config, model, engine, problems, pending, lambda: False) as sampler:
        with pytest.raises(UserError, match="3 of 6 answers"):
            sampler.sample(0, 0, {})
        mended.append(True)
        sample = sampler.sample(0, 0, {})  # nothing is left to sample
    assert sample is not None
    assert [grade.reason for grade in sample.grades] == ["correct", "wrong"] * 3


def test_an_error_in_the_thread_is_raised_by_the_step(model, tmp_path):
    def broken(text, reference):
        raise UserError("nothing starts here")

    engine = Answering(model, [["no"] * 6])
    pending = PendingRollouts(tmp_path, "settings", process=0)
    problems = problems_of(model, [("?", "yes")], broken)
    with StepSampler(AHEAD, model, engine, problems, pending, lambda: False) as sampler:
        sampler.begin(1, 3, {})
        assert not sampler.settled()
        with pytest.raises(UserError, match="nothing starts here"):
            sampler.sample(1, 3, {})
