"""Rollouts read back from their text, in every schema's language."""

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given

from tests.evals.written_rollouts import written_rollout
from tests.random_trajectories import BLOCKS, random_texts
from tw_jax.data.problem_file import ProblemRecord
from tw_jax.data.text import encode_prompt, encode_user_text
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.rewards.graders import Grade
from tw_jax.rollout.rollout import Rollout
from tw_jax.selftrain.candidate import judged, read_rollout
from tw_jax.trajectory.trajectory import Trajectory

QWEN3_DIR = pathlib.Path(__file__).parents[3] / "shared" / "qwen3_tokenizer"
PROBLEM = ProblemRecord("p", "12+", "7", "f.jsonl", 3)
LANGUAGES = ("threadweaver", "native", "apr")


def plainly_written(prompt, response, tokenizer, schema):
    """A rollout whose tags are spelled out in plain characters, as sequential sampling gives it."""
    head = encode_prompt(tokenizer, prompt)
    text = encode_user_text(tokenizer, response)
    tokens = np.concatenate([head, text, [schema.eos_id]]).astype(np.int32)
    return Rollout(Trajectory(tokens, len(head)), (), "eos", len(text) + 1, len(text) + 1)


@pytest.mark.parametrize("language", LANGUAGES)
@given(text=random_texts())
def test_tags_become_control_tokens_however_they_were_written(languages, language, text):
    tokenizer, schema = languages[language]
    response = text.response(language)
    if not response.strip():
        return
    sampled = written_rollout("12+", response, tokenizer, schema)
    plain = plainly_written("12+", response, tokenizer, schema)
    reads = [read_rollout(r, PROBLEM, 1, tokenizer, schema) for r in (sampled, plain)]
    for read in reads:
        assert read.record.response == response and read.record.id == "p/1"
        assert read.finish_reason == "eos"
        strict = [error.kind for error in schema.validate(sampled.trajectory)][:1]  # APR's answers
        assert [read.format_break.kind] == strict if read.format_break else strict == []
        assert read.trajectory.tokens.tolist() == sampled.trajectory.tokens.tolist()
        assert read.trajectory.blocks == sampled.trajectory.blocks
        assert len(read.trajectory.blocks) == len(text.blocks)
    assert reads[0].answer_text == reads[1].answer_text
    candidate = judged(0, 1, reads[1], Grade(True, "7", "correct"), schema)
    assert candidate.counted.total_tokens == sampled.total_tokens
    assert candidate.counted.critical_path == schema.critical_path(sampled.trajectory)


def test_the_answer_is_looked_for_behind_the_last_block(languages):
    tokenizer, schema = languages["threadweaver"]
    block = BLOCKS["threadweaver"]((("a", "#1"), ("b", "#2")))
    for response, answer_text in (
        (f"{block}#3", "#3"),
        (f"x{block}y{block}", ""),
        ("#4", "#4"),
        (f"<think>{block}#5</think>#6", "#6"),
    ):
        rollout = written_rollout("12+", response, tokenizer, schema)
        assert read_rollout(rollout, PROBLEM, 0, tokenizer, schema).answer_text == answer_text


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("\n</Parallel>", ""), "unclosed_block"),
        (("1: a", "2: a"), "outline_numbering"),
        (("</Thread><Thread>", "</Thread> <Thread>"), "white_space"),
    ],
)
def test_what_is_broken_is_said(languages, change, kind):
    tokenizer, schema = languages["threadweaver"]
    block = BLOCKS["threadweaver"]((("a", "#1"), ("b", "#2")))
    rollout = written_rollout("12+", block.replace(*change), tokenizer, schema)
    read = read_rollout(rollout, PROBLEM, 0, tokenizer, schema)
    assert read.format_break.kind == kind and read.format_break.message


def test_an_empty_response_is_no_candidate(languages):
    tokenizer, schema = languages["threadweaver"]
    rollout = written_rollout("12+", "", tokenizer, schema)
    read = read_rollout(rollout, PROBLEM, 0, tokenizer, schema)
    assert read.format_break.kind == "empty_field" and read.trajectory is None


def test_threads_that_a_budget_ended_are_counted(languages):
    tokenizer, schema = languages["threadweaver"]
    rollout = written_rollout(
        "12+", BLOCKS["threadweaver"]((("a", "1"), ("b", "2"))), tokenizer, schema
    )
    units = tuple(
        dataclasses.replace(u, finish_reason="length") if u.thread == 2 else u
        for u in rollout.units
    )
    rollout = dataclasses.replace(rollout, units=units)
    assert read_rollout(rollout, PROBLEM, 0, tokenizer, schema).cut_threads == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_bytes_and_marks_of_a_published_tokenizer(language):
    if not QWEN3_DIR.exists():
        pytest.skip(f"no Qwen3 tokenizer at {QWEN3_DIR}")
    tokenizer, schema = open_tokenizer(str(QWEN3_DIR), language)
    block = BLOCKS[language]((("πλάν", "1 <b> ∑ 😀"), ("b", "22\n\n3")))
    response = f"<think>\nso…\n{block}\n</think>\n\nThus \\boxed{{½}}<|im_start|>."
    for written in (written_rollout, plainly_written):
        rollout = written("12+", response, tokenizer, schema)
        read = read_rollout(rollout, PROBLEM, 0, tokenizer, schema)
        assert read.record.response == response
        assert read.answer_text == response.partition("</think>")[2]
        assert len(read.trajectory.blocks) == 1
        im_start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert im_start not in read.trajectory.tokens
    # A token that is half a character becomes one that nobody wrote: not for the training set.
    half = tokenizer("𓀀", add_special_tokens=False).input_ids[:1]
    cut = plainly_written("12+", "x", tokenizer, schema)
    tokens = np.concatenate([cut.trajectory.tokens[:-1], half, [schema.eos_id]]).astype(np.int32)
    trajectory = dataclasses.replace(cut.trajectory, tokens=tokens)
    read = read_rollout(
        dataclasses.replace(cut, trajectory=trajectory), PROBLEM, 0, tokenizer, schema
    )
    assert read.format_break.kind == "broken_characters"
