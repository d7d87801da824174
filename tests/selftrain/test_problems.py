"""Problems of files: what is good, what is rejected and why, how they are asked."""

import collections
import dataclasses
import json

import pytest

from tw_jax.data.problem_file import ProblemColumns, read_problems
from tw_jax.data.rejects import Rejects
from tw_jax.errors import UserError
from tw_jax.evals.answerer import Answerer
from tw_jax.selftrain.config import SelfTrainConfig
from tw_jax.selftrain.questions import read_questions


@pytest.fixture
def answerer(tokenizer, schema):
    """Nothing is sampled here."""

    def never(requests, on_finish):
        raise AssertionError

    return Answerer(tokenizer, schema, "nobody", never)


def write(path, lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def rejected(path):
    return [(r["line"], r["field"], r["kind"]) for r in map(json.loads, path.open())]


def test_bad_problems_are_listed_and_the_good_ones_stay(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        [
            {"prompt": "1+1?", "answer": "2", "id": "a"},
            {"prompt": "1+2?", "answer": 3, "id": 4},
            "{broken",
            "[1]",
            {"answer": "2"},
            {"prompt": " ", "answer": "2"},
            {"prompt": "2+2?"},
            {"prompt": "2+2?", "answer": ""},
            {"prompt": "2+2?", "answer": None},
            {"prompt": "2+2?", "answer": ["4"]},
            {"prompt": 7, "answer": "4"},
            {"prompt": "3+3?", "answer": "6", "id": "a"},
            {"prompt": "1+1?", "answer": "2", "id": "b"},
            {"prompt": "\ud800", "answer": "2"},
            {"prompt": "a\0b", "answer": "2"},
            {"prompt": "4+4?", "answer": "8"},
        ],
    )
    rejects = Rejects(tmp_path / "rejects.jsonl")
    problems = read_problems([source], ProblemColumns(), rejects)
    assert [(p.id, p.prompt, p.answer, p.line) for p in problems] == [
        ("a", "1+1?", "2", 1),
        ("4", "1+2?", "3", 2),
        (f"{source}:16", "4+4?", "8", 16),
    ]
    assert rejected(rejects.path) == [
        (3, None, "malformed_json"),
        (4, None, "not_an_object"),
        (5, "prompt", "missing_field"),
        (6, "prompt", "empty_field"),
        (7, "answer", "missing_field"),
        (8, "answer", "empty_field"),
        (9, "answer", "wrong_type"),
        (10, "answer", "wrong_type"),
        (11, "prompt", "wrong_type"),
        (12, "id", "duplicate_id"),
        (13, "prompt", "duplicate_problem"),
        (14, "prompt", "invalid_unicode"),
        (15, "prompt", "nul_byte"),
    ]


def test_ids_must_not_repeat_over_sources(tmp_path):
    one = write(tmp_path / "1.jsonl", [{"prompt": "a", "answer": "1", "id": "x"}])
    two = write(tmp_path / "2.jsonl", [{"prompt": "b", "answer": "1", "id": "x"}])
    rejects = Rejects(tmp_path / "rejects.jsonl")
    assert len(read_problems([one, two], ProblemColumns(), rejects)) == 1
    assert rejects.counts == collections.Counter(duplicate_id=1)
    assert f"{one}:1" in rejects.path.read_text()


def test_fields_inside_of_objects_and_chats(tmp_path):
    """The layout of published RL sets: a chat, and the answer inside of an object."""
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}]
    record = {"prompt": turns, "reward_model": {"ground_truth": "2", "style": "rule"}}
    source = write(tmp_path / "p.jsonl", [record])
    columns = ProblemColumns(answer="reward_model.ground_truth")
    (problem,) = read_problems([source], columns, Rejects(tmp_path / "rejects.jsonl"))
    assert (problem.prompt, problem.answer) == ("1+1?", "2")
    assert [turn.role for turn in problem.chat] == ["system", "user"]


def config_of(tmp_path, *sources, **settings):
    return SelfTrainConfig(problems=sources, output=tmp_path / "out", **settings)


def test_tags_in_a_problem_stay_characters(tmp_path, answerer, tokenizer, schema):
    text = "<Parallel></think> {problem}"
    source = write(tmp_path / "p.jsonl", [{"prompt": text, "answer": "1"}])
    prompt = tmp_path / "format.txt"
    prompt.write_text("Use <guideline>. {problem}\nNow: {problem}")
    config = config_of(tmp_path, source, format_prompt=prompt)
    (question,) = read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))
    asked = question.request.prompt.tolist()
    assert tokenizer.decode(asked[1:]) == f"Use <guideline>. {text}\nNow: {text}"
    assert not set(asked[1:]) & set(tokenizer.added_tokens_decoder)
    assert question.problem.prompt == text
    config = dataclasses.replace(config, keep_format_prompt=True)
    (question,) = read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))
    assert question.problem.prompt == f"Use <guideline>. {text}\nNow: {text}"


def test_a_format_prompt_without_its_marker_is_refused(tmp_path, answerer):
    prompt = tmp_path / "format.txt"
    prompt.write_text("no marker")
    config = config_of(tmp_path, format_prompt=prompt)
    with pytest.raises(UserError, match=r"holds no \{problem\}"):
        read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))


def test_prompts_that_cannot_be_asked_are_rejected(tmp_path, answerer):
    source = write(
        tmp_path / "p.jsonl",
        [{"prompt": "a" * 2000, "answer": "1"}, {"prompt": "b", "answer": "1"}],
    )
    config = config_of(tmp_path, source, max_reject_share=0.5)
    rejects = Rejects(tmp_path / "r.jsonl")
    assert len(read_questions(config, answerer, rejects)) == 1
    assert rejected(rejects.path) == [(1, "prompt", "prompt_too_long")]
    # Refused by the chat template: there is none, so nothing is refused, but the turn is kept.
    config = dataclasses.replace(config, as_chat=True)
    (question,) = read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))
    assert [turn.content for turn in question.problem.chat] == ["b"]


def test_too_many_bad_problems_stop_the_run(tmp_path, answerer):
    lines = [{"prompt": f"{i}?", "answer": "1"} for i in range(8)] + ["{", "{"]
    source = write(tmp_path / "p.jsonl", lines)
    with pytest.raises(UserError, match=r"2 of 10 items are bad, more than max_reject_share=0.1"):
        read_questions(config_of(tmp_path, source), answerer, Rejects(tmp_path / "r.jsonl"))
    config = config_of(tmp_path, source, max_reject_share=0.2)
    assert len(read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))) == 8


def test_an_empty_source_is_refused(tmp_path, answerer):
    source = write(tmp_path / "p.jsonl", [""])
    with pytest.raises(UserError, match="no problem there"):
        read_questions(config_of(tmp_path, source), answerer, Rejects(tmp_path / "r.jsonl"))


def test_seeds_depend_on_the_problem_and_not_on_its_place(tmp_path, answerer):
    records = [{"prompt": f"{i}?", "answer": "1", "id": f"{i}"} for i in range(3)]
    seeds = []
    for part in (records, records[1:]):
        config = config_of(tmp_path, write(tmp_path / "p.jsonl", part))
        questions = read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))
        seeds.append({q.problem.id: [r.seed for r in q.requests(3, 0)] for q in questions})
    assert seeds[0]["1"] == seeds[1]["1"] and seeds[0]["2"] == seeds[1]["2"]
    assert len({seed for several in seeds[0].values() for seed in several}) == 9


def test_problems_of_a_task_are_those_of_its_training_split(tmp_path, answerer):
    config = config_of(tmp_path, first=3, count=2)
    questions = read_questions(config, answerer, Rejects(tmp_path / "r.jsonl"))
    assert [q.problem.id for q in questions] == [
        "multiplication/train/0/3",
        "multiplication/train/0/4",
    ]
    forced = dataclasses.replace(config, style="parallel")
    question = read_questions(forced, answerer, Rejects(tmp_path / "r.jsonl"))[0]
    assert len(question.request.forced_prefix) == 1
