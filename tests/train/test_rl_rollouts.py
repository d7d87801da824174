"""A step's rollouts: graded while decoding goes on, rewarded group by group, asked in order."""

import collections
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from tests.train.writing_engine import WritingEngine, problems_of, sample_step
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rewards.graders import Grade, GradingConfig, grade_exact
from tw_jax.rewards.reward import RewardConfig
from tw_jax.rewards.terms import AccuracyTerm, LatencyTerm
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.rl import run_rl
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_problems import open_problems, shuffled_index
from tw_jax.train.rl_rewards import reward_metrics, step_rewards
from tw_jax.train.run_dir import LoadedModel, ModelConfig, new_model, save_model

CONFIG = RLConfig(prompts=2, group_size=2, grading_wait_s=60.0)


@pytest.fixture(scope="module")
def model(tokenizer, schema):
    config = PRESETS["tiny"]
    return LoadedModel(qwen3.graphdef(config), {}, config, tokenizer, schema, step=0)


def test_grades_belong_to_their_rollouts_whatever_order_they_finish_in(model):
    questions = [("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6"), ("4+4?", "8")]
    engine = WritingEngine(model, ["6", "7", "x", "8"], order=[2, 0, 3, 1])
    problems = problems_of(model, questions, grade_exact)
    rollouts, grades = sample_step(CONFIG, model, engine, problems, step=1)
    assert [grade.correct for grade in grades] == [True, False, False, True]
    prompts = [model.tokenizer.decode(r.prompt, skip_special_tokens=True) for r in rollouts]
    assert prompts == ["3+3?", "3+3?", "4+4?", "4+4?"]
    assert len({request.seed for request in engine.requests}) == 4


def test_the_prompt_and_the_thinking_are_never_graded(model):
    questions = [(r"\boxed{7} is what?", "7")]
    texts = ["I see", "<think>\\boxed{7}</think>8", "<think>\\boxed{7}", "<think>8</think>7"]
    seen = []

    def grader(text, reference):
        seen.append(text)
        return grade_exact(text, reference)

    engine = WritingEngine(model, texts)
    problems = problems_of(model, questions, grader, at_once=1)
    _, grades = sample_step(CONFIG, model, engine, problems, step=0)
    if "</think>" not in model.tokenizer.get_vocab():  # then it is text like any other
        assert seen == ["I see", "8", "", "7"]
    assert [grade.correct for grade in grades] == [False, False, False, True]


def test_grading_overlaps_with_decoding(model):
    """Decoding goes on only when what finished before has been graded: it would hang otherwise."""
    events, graded = [], [threading.Event() for _ in range(4)]

    def slow(text, reference):
        time.sleep(0.05)
        events.append(f"graded {text}")
        graded[int(text)].set()
        return grade_exact(text, reference)

    def decode_on(number):
        assert graded[number].wait(60), "no grade arrives while the engine decodes"
        events.append(f"decoded behind {number}")

    engine = WritingEngine(model, list("0123"), after_each=decode_on)
    problems = problems_of(model, [("?", "2")], slow)
    _, grades = sample_step(CONFIG, model, engine, problems, step=0)
    assert events == [f"{what} {i}" for i in range(4) for what in ("graded", "decoded behind")]
    assert [grade.correct for grade in grades] == [False, False, True, False]


def test_the_engine_never_waits_for_a_slow_grader(model):
    """All of it is decoded before the first grade may be given."""
    decoded = threading.Event()

    def blocked(text, reference):
        assert decoded.wait(60)
        return grade_exact(text, reference)

    def note(number):
        if number == 3:
            decoded.set()

    engine = WritingEngine(model, list("0123"), after_each=note)
    problems = problems_of(model, [("?", "2")], blocked)
    _, grades = sample_step(CONFIG, model, engine, problems, step=0)
    assert [grade.correct for grade in grades] == [False, False, True, False]


def test_a_hanging_grader_costs_its_limit_and_the_step_goes_on(model, tmp_path):
    file = tmp_path / "hangs.py"
    file.write_text("def grade(a, r):\n  while a == '1': pass\n  return a == r\n")
    source = write(tmp_path / "p.jsonl", [{"prompt": "?", "answer": "2"}])
    grading = GradingConfig("python", timeout_s=2.0, workers=2, file=file)
    config = dataclasses.replace(CONFIG, problems=(source,), grading=grading)
    with open_problems(config, model.tokenizer, tmp_path) as problems:
        engine = WritingEngine(model, list("2122"))
        began_s = time.monotonic()
        rollouts, grades = sample_step(config, model, engine, problems, step=0)
        assert time.monotonic() - began_s < 20
        assert [g.reason for g in grades] == ["correct", "grading_timeout", "correct", "correct"]
        facts, terms, rewards = step_rewards(config, model, rollouts, grades, 0)
        assert rewards.tolist() == [[1.0, 0.0], [1.0, 1.0]]
        metrics = reward_metrics(facts, terms)
        assert metrics["ungraded"] == metrics["ungraded/grading_timeout"] == 0.25
        hanging = WritingEngine(model, list("1111"))
        short = dataclasses.replace(config, grading_wait_s=0.5, max_ungraded_share=1.0)
        began_s = time.monotonic()
        _, grades = sample_step(short, model, hanging, problems, step=1)
        assert time.monotonic() - began_s < 10
        assert {grade.failure for grade in grades} == {"grading_backlog"}
        with pytest.raises(UserError, match="4 of 4 answers of a step could not be graded"):
            sample_step(config, model, hanging, problems, step=2)


def test_rewards_of_a_group_without_any_success_are_finite(model):
    engine = WritingEngine(model, ["", "9", "9", "9"])
    config = dataclasses.replace(
        CONFIG, reward=RewardConfig(latency=LatencyTerm(1.0), accuracy=AccuracyTerm(incorrect=-1))
    )
    problems = problems_of(model, [("?", "2")], grade_exact)
    rollouts, grades = sample_step(config, model, engine, problems, step=0)
    facts, terms, rewards = step_rewards(config, model, rollouts, grades, 0)
    assert rewards.tolist() == [[-1.0, -1.0], [-1.0, -1.0]]
    assert reward_metrics(facts, terms) == {
        "reward/accuracy": -1.0,
        "reward/acceleration": 0.0,
        "reward/latency": 0.0,
        "ungraded": 0.0,
    }


def test_latency_looks_at_its_own_group_only(model):
    engine = WritingEngine(model, ["2", "0" * 18 + "\n2", "2", "2"])
    config = dataclasses.replace(
        CONFIG, reward=RewardConfig("apr", latency=LatencyTerm(1.0, clip=5.0))
    )
    problems = problems_of(model, [("?", "2")], grade_exact)
    rollouts, grades = sample_step(config, model, engine, problems, step=0)
    facts, terms, rewards = step_rewards(config, model, rollouts, grades, 0)
    assert [fact.critical_path for fact in facts] == [2, 21, 2, 2]
    gain = 1 - 2 / 11.5
    np.testing.assert_allclose(rewards, [[1 + gain, 1 - gain], [1, 1]])
    assert reward_metrics(facts, terms)["reward/latency"] == pytest.approx(0)


def test_the_token_budget_reaches_the_overlong_term(model):
    engine = WritingEngine(model, ["2", "0" * 8 + "2", "2", "2"])
    sampling = SamplingParams(max_response_tokens=10)
    config = dataclasses.replace(CONFIG, reward=RewardConfig("dapo"), sampling=sampling)
    problems = problems_of(model, [("?", "2")], grade_exact)
    rollouts, grades = sample_step(config, model, engine, problems, step=0)
    facts, terms, rewards = step_rewards(config, model, rollouts, grades, 0)
    assert rewards.tolist() == [[1, -2], [1, 1]]
    assert reward_metrics(facts, terms)["reward/overlong"] == -0.25


# --- problems of files --------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_pass_asks_every_problem_once_in_another_order():
    passes = [[shuffled_index(50, p * 50 + i, seed=3) for i in range(50)] for p in range(3)]
    assert all(sorted(order) == list(range(50)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert passes[0] != [shuffled_index(50, i, seed=4) for i in range(50)]
    assert passes[0] != list(range(50))


def test_the_order_is_fixed_for_good():
    """Checkpoints of today go on tomorrow: these numbers must not change."""
    assert [shuffled_index(7, i, seed=0) for i in range(14)] == FIXED_ORDER


FIXED_ORDER = [4, 5, 2, 3, 6, 1, 0, 0, 2, 1, 3, 6, 5, 4]


def test_a_resumed_run_goes_on_without_state(model, tmp_path):
    records = [{"prompt": f"{i}+{i}?", "answer": str(2 * i)} for i in range(5)]
    source = write(tmp_path / "p.jsonl", records)
    config = dataclasses.replace(CONFIG, problems=(source,), grading=GradingConfig("exact"))

    def asked(steps):
        found = []
        with open_problems(config, model.tokenizer, tmp_path) as problems:
            for step in steps:
                engine = WritingEngine(model, list("0000"))
                sample_step(config, model, engine, problems, step)
                found += [(r.seed, r.prompt.tolist()) for r in engine.requests]
        return found

    whole = asked(range(5))
    assert asked([3, 4]) == whole[3 * 4 :]
    counts = collections.Counter(tuple(prompt) for _, prompt in whole)
    assert sorted(counts.values()) == [4] * 5  # two passes over five problems, groups of two


def test_bad_problems_are_listed_and_too_many_refused(model, tmp_path):
    records = [{"prompt": f"{i}?", "answer": "1"} for i in range(20)]
    records += [{"prompt": "none?"}, {"prompt": "long" * 500, "answer": "1"}]
    source = write(tmp_path / "p.jsonl", records)
    config = dataclasses.replace(CONFIG, problems=(source,), grading=GradingConfig("exact"))
    with open_problems(config, model.tokenizer, tmp_path) as problems:
        assert problems.at(19).reference == "1"
    rejected = [json.loads(line) for line in (tmp_path / "rejects.jsonl").open()]
    assert [(r["line"], r["kind"]) for r in rejected] == [
        (21, "missing_field"),
        (22, "prompt_too_long"),
    ]
    strict = dataclasses.replace(config, max_reject_share=0.05)
    with (
        pytest.raises(UserError, match="2 of 22"),
        open_problems(strict, model.tokenizer, tmp_path),
    ):
        raise AssertionError


def test_a_set_without_answers_is_refused_by_name(model, tmp_path):
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{i}?", "answer": "1"} for i in range(99)])
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "0? "}])
    config = dataclasses.replace(CONFIG, problems=(good, bare), grading=GradingConfig("exact"))
    with (
        pytest.raises(UserError, match=r"bare\.jsonl: no usable problem.*'answer'.*needs_answers"),
        open_problems(config, model.tokenizer, tmp_path),
    ):
        raise AssertionError
    file = tmp_path / "g.py"
    file.write_text("def grade(answer, reference):\n  return reference is None and answer == 'y'\n")
    free = dataclasses.replace(
        config,
        problems=(bare,),
        grading=GradingConfig("python", workers=1, file=file, needs_answers=False),
    )
    with open_problems(free, model.tokenizer, tmp_path) as problems:
        engine = WritingEngine(model, list("ynyn"))
        _, grades = sample_step(free, model, engine, problems, step=0)
    assert [grade.correct for grade in grades] == [True, False, True, False]


def test_countdown_problems_carry_objects(model, tmp_path):
    answer = {"numbers": [3, 5, 7], "target": 56}
    source = write(tmp_path / "p.jsonl", [{"prompt": "3 5 7 -> 56", "answer": answer}])
    config = dataclasses.replace(CONFIG, problems=(source,), grading=GradingConfig("countdown"))
    with open_problems(config, model.tokenizer, tmp_path) as problems:
        engine = WritingEngine(model, ["(3+5)*7", "(3+5)*7*1", "56", "7*(5+3)=56"])
        _, grades = sample_step(config, model, engine, problems, step=0)
    assert [grade.correct for grade in grades] == [True, False, False, True]


def test_other_problems_are_another_run(model, tmp_path):
    metas = []
    for answer in ("1", "1", "2"):
        source = write(tmp_path / "p.jsonl", [{"prompt": "?", "answer": answer}])
        config = dataclasses.replace(CONFIG, problems=(source,), grading=GradingConfig("exact"))
        with open_problems(config, model.tokenizer, tmp_path) as problems:
            metas.append(problems.meta)
    assert metas[0] == metas[1] != metas[2]


def test_a_grader_that_cannot_work_at_all_stops_the_step(model):
    def broken(text, reference):
        raise UserError("nothing starts here")

    problems = problems_of(model, [("?", "2")], broken)
    with pytest.raises(UserError, match="nothing starts here"):
        sample_step(CONFIG, model, WritingEngine(model, list("0000")), problems, step=0)


def test_failures_above_the_share_say_what_the_grader_said(model):
    def fails(text, reference):
        return Grade(False, None, "grading_raised", 0.0, "it raised KeyError: 'x'")

    problems = problems_of(model, [("?", "2")], fails)
    with pytest.raises(UserError, match="KeyError: 'x'"):
        sample_step(CONFIG, model, WritingEngine(model, list("0000")), problems, step=0)


@pytest.mark.slow
def test_a_whole_run_on_a_file_with_a_function_that_fails_in_every_way(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import os, zlib\n"
        "def grade(answer, reference):\n"
        "  kind = zlib.crc32(answer.encode()) % 8\n"
        "  if kind == 0: raise ValueError('no')\n"
        "  if kind == 1: return float('nan')\n"
        "  if kind == 2: os._exit(1)\n"
        "  while kind == 3: pass\n"
        "  return (kind - 3) / 4\n"
    )
    records = [{"prompt": f"{i}*{i}=", "answer": str(i * i)} for i in range(6)]
    source = write(tmp_path / "p.jsonl", [*records, {"prompt": "no answer"}])
    start = new_model(ModelConfig(), 0)
    save_model(tmp_path / "start", start, start.params)
    config = RLConfig(
        run_dir=str(tmp_path / "run"),
        init_from=str(tmp_path / "start"),
        steps=2,
        prompts=2,
        group_size=4,
        problems=(source,),
        max_reject_share=0.2,
        grading=GradingConfig("python", timeout_s=1.0, workers=2, file=file),
        max_ungraded_share=1.0,
        reward=RewardConfig("code"),
        row_len=512,
        rows=1,
        optimizer=dataclasses.replace(CONFIG.optimizer, warmup_steps=1),
        sampling=SamplingParams(max_response_tokens=12),
        engine=EngineConfig(context_len=64, rows=8, requests=8),
    )
    result = run_rl(config)
    assert result.model.step == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.model.params))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["ungraded"] > 0 and np.isfinite(row["loss"]) for row in rows)
    assert all(row["reward"] == pytest.approx(row["reward/accuracy"] + row["reward/acceleration"])
               for row in rows)  # fmt: skip
    kinds = {name for row in rows for name in row if name.startswith("ungraded/")}
    assert len(kinds) > 1
    other = write(tmp_path / "q.jsonl", records[1:])
    with pytest.raises(UserError, match="problems"):
        run_rl(dataclasses.replace(config, problems=(other,), steps=3))
