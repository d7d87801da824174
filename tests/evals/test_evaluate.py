"""Evaluation asks what it should, grades what comes back, and works on the real engine."""

import json

import numpy as np
import pytest

from tests.evals.written_rollouts import written_rollout
from tw_jax.data.text import encode_prompt
from tw_jax.evals import evaluate as evaluate_module
from tw_jax.evals import generate as generate_module
from tw_jax.evals.evaluate import EvalConfig, evaluate, measure_wall_clock, run_eval
from tw_jax.evals.generate import GenerateConfig, run_generate
from tw_jax.evals.metrics import summarize, token_latency_speedup
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import SamplingParams
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.registry import TaskConfig
from tw_jax.tasks.task import Problem

SAMPLING = SamplingParams(max_response_tokens=200)


class ScriptedEngine:
    """Writes the task's own solutions; answers problem 1 wrongly."""

    def __init__(self, task, tokenizer, schema):
        self.task, self.tokenizer, self.schema = task, tokenizer, schema
        self.requests = []

    def generate(self, params, requests):
        problems = [self.task.problem("heldout", i, 0) for i in range(8)]
        by_prompt = {tuple(encode_prompt(self.tokenizer, p.prompt)): p for p in problems}
        self.requests += requests
        rollouts = []
        for request in requests:
            problem = by_prompt[tuple(request.prompt)]
            text = problem.sequential if request.mode == "sequential" else problem.parallel
            if problem == problems[1]:
                text = text[:-1] + "x"
            rollouts.append(written_rollout(problem.prompt, text, self.tokenizer, self.schema))
        return rollouts


@pytest.fixture
def engine(task, tokenizer, schema):
    return ScriptedEngine(task, tokenizer, schema)


def ask(engine, task, tokenizer, schema, style, **changes):
    settings = {"split": "heldout", "count": 3, "sampling": SAMPLING, "seed": 0} | changes
    return evaluate(engine, None, schema, tokenizer, task, style=style, **settings)


@pytest.mark.parametrize(
    ("style", "mode", "prefix"),
    [
        ("sequential", "sequential", "1"),
        ("parallel", "parallel", "<Parallel>"),
        ("free", "parallel", ""),
    ],
)
def test_each_style_is_asked_for_as_designed(engine, task, tokenizer, schema, style, mode, prefix):
    ask(engine, task, tokenizer, schema, style)
    for i, request in enumerate(engine.requests):
        problem = task.problem("heldout", i, 0)
        assert request.mode == mode
        assert request.prompt.tolist() == encode_prompt(tokenizer, problem.prompt).tolist()
        assert tokenizer.decode(request.forced_prefix) == prefix
        assert len(request.forced_prefix) == bool(prefix)
        assert request.sampling == SAMPLING


def test_records_are_graded(engine, task, tokenizer, schema):
    records, rollouts = ask(engine, task, tokenizer, schema, "free", samples_per_problem=2)
    assert [r.problem for r in records] == [0, 0, 1, 1, 2, 2]
    assert [r.correct for r in records] == [True, True, False, False, True, True]
    assert [r.answer == task.problem("heldout", r.problem, 0).answer for r in records] == [
        r.correct for r in records
    ]
    assert all(r.has_block and r.format_valid for r in records)
    assert [r.critical_path for r in records] == [r.critical_path for r in rollouts]
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(seeds)


def test_styles_share_problems_so_that_speedups_pair_up(engine, task, tokenizer, schema):
    sequential, _ = ask(engine, task, tokenizer, schema, "sequential")
    parallel, _ = ask(engine, task, tokenizer, schema, "parallel")
    assert not any(r.has_block for r in sequential)
    speedup = token_latency_speedup(sequential, parallel)
    assert sorted(speedup.per_problem) == [0, 1, 2]
    assert summarize(sequential).activation_ratio == 0


def test_a_broken_block_is_not_format_valid(engine, task, tokenizer, schema, monkeypatch):
    def broken(params, requests):
        text = "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n</Outlines>\n<Thread>\n"
        return [written_rollout("11*11=", text, tokenizer, schema) for _ in requests]

    monkeypatch.setattr(engine, "generate", broken)
    records, _ = ask(engine, task, tokenizer, schema, "free")
    assert not any(r.format_valid or r.correct for r in records)


def test_wall_clock_times_both_styles(engine, task, tokenizer, schema):
    clock = measure_wall_clock(
        (engine, engine), None, schema, tokenizer, task,
        split="heldout", count=2, sampling=SAMPLING, seed=0, repeats=2,
    )  # fmt: skip
    assert [r.style for r in clock.sequential + clock.parallel] == ["sequential"] * 2 + [
        "parallel"
    ] * 2
    assert len(engine.requests) == 2 * (1 + 2 * 2)  # one more to warm up
    fields = json.loads(json.dumps(clock.to_json()))
    assert fields["speedup"]["mean"] > 0
    assert fields["sequential"]["tokens_per_second"] > 0


def test_configs_refuse_nonsense():
    with pytest.raises(ValueError, match="count=0"):
        EvalConfig(count=0)
    with pytest.raises(ValueError, match="styles"):
        EvalConfig(styles=())
    for config in (EvalConfig, GenerateConfig):
        with pytest.raises(ValueError, match="seed=-1: must lie in 0"):
            config(seed=-1)
    with pytest.raises(ValueError, match="samples_per_prompt=0"):
        GenerateConfig(samples_per_prompt=0)
    with pytest.raises(ValueError, match="vote=true: needs samples_per_prompt=2"):
        GenerateConfig(vote=True)
    with pytest.raises(ValueError, match="temperature 0"):
        GenerateConfig(vote=True, samples_per_prompt=2, sampling=SamplingParams(temperature=0))


# --- the verbs, on the real engine ----------------------------------------------------------------

TASK = TaskConfig(multiplication=MultiplicationConfig(digits=2))
ENGINE = EngineConfig(
    context_len=64, rows=4, requests=2, max_threads=2, max_blocks=2, prefill_rows=2, prefill_chunk=8
)
SHORT = SamplingParams(max_response_tokens=24, max_thread_tokens=8, max_threads=2, max_blocks=2)


@pytest.fixture(scope="module")
def small_engine(small_model):
    return RolloutEngine(small_model.graphdef, small_model.schema, ENGINE)


@pytest.fixture
def loaded(small_model, small_engine, monkeypatch):
    """The verbs load the small model and share its engine, which is compiled once."""

    def shared(graphdef, schema, config):
        assert (graphdef, schema, config) == (small_model.graphdef, small_model.schema, ENGINE)
        return small_engine

    for module in (evaluate_module, generate_module):
        monkeypatch.setattr(module, "load_run", lambda run, step: small_model)
        monkeypatch.setattr(module, "RolloutEngine", shared)


def test_run_eval_writes_what_it_returns(loaded, tmp_path, capsys):
    output = tmp_path / "deep" / "eval.json"
    config = EvalConfig(task=TASK, count=3, sampling=SHORT, engine=ENGINE, output=str(output))
    results = run_eval(config)
    assert json.loads(output.read_text()) == json.loads(json.dumps(results))
    assert set(results["summaries"]) == {"sequential", "parallel", "free"}
    assert [r["total_tokens"] for r in results["records"]["sequential"]] == pytest.approx(
        [r["critical_path"] for r in results["records"]["sequential"]]
    )
    assert results["token_latency_speedup"]["mean"] > 0
    assert results["wall_clock"] is None
    out = capsys.readouterr().out
    assert "token-latency speedup" in out
    assert "maj@" not in out
    assert results["summaries"]["free"]["majority_accuracy"] is None


def test_run_eval_votes_where_problems_have_several_samples(loaded, monkeypatch, capsys):
    stated = iter(["5", "5", None, None, "6", None])  # three samples of two problems
    monkeypatch.setattr(Multiplication, "extract_answer", lambda self, text: next(stated))
    monkeypatch.setattr(
        Multiplication, "problem", lambda self, *key: Problem("2*3=", "56"[key[1]], "", "")
    )
    results = run_eval(
        EvalConfig(
            task=TASK, count=2, samples_per_problem=3, styles=("free",), sampling=SHORT,
            engine=ENGINE,
        )
    )  # fmt: skip
    summary = results["summaries"]["free"]
    assert [r["answer"] for r in results["records"]["free"]] == ["5", "5", None, None, "6", None]
    assert summary["accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert summary["majority_accuracy"] == 1.0  # two votes to none, one vote to none
    assert summary["majority_accuracy_interval"] == pytest.approx([0.025**0.5, 1.0])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy,", "avg@3", "50.0%"] in rows
    assert ["majority", "vote,", "maj@3", "100.0%"] in rows
    # Of three samples' three pairs, all hold one of the first problem's two right answers, and two
    # hold the second problem's only one: (1 + 2/3) / 2.
    assert ["any", "correct,", "pass@2", "83.3%"] in rows


@pytest.mark.slow
def test_run_eval_times_with_the_smallest_engines(loaded, capsys):
    results = run_eval(
        EvalConfig(
            task=TASK,
            count=1,
            styles=("free",),
            sampling=SHORT,
            engine=ENGINE,
            wall_clock_problems=2,
            wall_clock_repeats=1,
        )  # fmt: skip
    )
    assert results["token_latency_speedup"] is None
    assert results["wall_clock"]["speedup"]["mean"] > 0
    assert "wall-clock speedup" in capsys.readouterr().out


def test_run_generate_from_prompts_and_from_the_task(loaded, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    literal = "12*34=<Parallel>"
    answers = run_generate(
        GenerateConfig(
            prompts=(literal,),
            samples_per_prompt=2,
            sampling=SHORT,
            engine=ENGINE,
            output=str(output),
        )  # fmt: skip
    )
    assert [json.loads(line) for line in output.read_text().splitlines()] == answers
    assert answers[0]["prompt"] == f"<bos>{literal}"
    assert answers[0]["response"] != answers[1]["response"]
    assert answers[0]["answer"] is None
    assert literal in capsys.readouterr().out
    (answer,) = run_generate(
        GenerateConfig(task=TASK, count=1, style="parallel", sampling=SHORT, engine=ENGINE)
    )
    assert answer["response"].startswith("<Parallel>")
    assert answer["correct"] is False


def test_run_generate_votes(loaded, tmp_path, monkeypatch, capsys):
    stated = iter(["408", None, "407", "407", None, None, None, None])
    monkeypatch.setattr(Multiplication, "extract_answer", lambda self, text: next(stated))
    output = tmp_path / "answers.jsonl"
    answers = run_generate(
        GenerateConfig(
            prompts=("12*34=", "2*3="),
            samples_per_prompt=4,
            vote=True,
            sampling=SHORT,
            engine=ENGINE,
            output=str(output),
        )  # fmt: skip
    )
    assert [a["answer"] for a in answers] == ["408", None, "407", "407"] + [None] * 4
    assert [a["voted"] for a in answers] == ["407"] * 4 + [None] * 4
    assert {a["correct"] for a in answers} == {None}
    assert [json.loads(line) for line in output.read_text().splitlines()] == answers
    lines = capsys.readouterr().out.splitlines()
    assert "12*34=  vote: 407 by 2 of 4 votes; 408: 1; no answer: 1" in lines
    assert "2*3=  vote: none of 4 samples states an answer" in lines


def test_run_generate_grades_the_vote_on_problems_of_the_task(loaded, monkeypatch, capsys):
    stated = iter(["wrong", "right", "right"])
    monkeypatch.setattr(Multiplication, "extract_answer", lambda self, text: next(stated))
    monkeypatch.setattr(
        Multiplication, "problem", lambda self, *key: Problem("2*3=", "right", "", "")
    )
    answers = run_generate(
        GenerateConfig(
            task=TASK, count=1, samples_per_prompt=3, vote=True, sampling=SHORT, engine=ENGINE
        )
    )
    assert [a["correct"] for a in answers] == [False, True, True]
    assert {a["voted"] for a in answers} == {"right"}
    assert "2*3=  vote, correct: right by 2 of 3 votes; wrong: 1" in capsys.readouterr().out


def test_the_real_engine_is_deterministic_per_request(small_model, small_engine, task):
    first, second = (
        evaluate(
            small_engine, small_model.params, small_model.schema, small_model.tokenizer, task,
            split="heldout", count=count, style="free", sampling=SHORT, seed=3,
        )[1]
        for count in (1, 3)
    )  # fmt: skip
    assert np.array_equal(first[0].response, second[0].response)
