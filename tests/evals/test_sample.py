"""Samples show what happened: texts, counts, the longest thread, the timeline."""

import dataclasses
import json

import pytest

from tests.evals.written_rollouts import written_rollout
from tw_jax.evals.sample import printable, sample_from_rollout

RESPONSE = (
    "go <Parallel>\n<Outlines>\n<Outline>1: one</Outline>\n<Outline>2: two</Outline>\n</Outlines>\n"
    "<Thread>\n1: a\n</Thread><Thread>\n2: bcde\n</Thread>\n</Parallel>\nthen 7"
)


@pytest.fixture
def rollout(tokenizer, schema):
    return written_rollout("1+1=", RESPONSE, tokenizer, schema)


def test_parts_follow_the_text(rollout, tokenizer):
    sample = sample_from_rollout(rollout, tokenizer, style="free", answer="7", correct=True)
    assert sample["prompt"] == "1+1="
    before, block, after = sample["parts"]
    assert before["text"] == "go "
    assert after["text"] == "\nthen 7"
    assert block["outlines"] == [{"number": "1", "text": "one"}, {"number": "2", "text": "two"}]
    assert [t["text"] for t in block["threads"]] == ["a", "bcde"]
    assert [t["critical"] for t in block["threads"]] == [False, True]
    assert not any(t["closed_by_engine"] for t in block["threads"])
    assert len(sample["timeline"]) == 4
    assert json.loads(json.dumps(sample)) == sample


def test_counts_add_up(rollout, tokenizer):
    sample = sample_from_rollout(rollout, tokenizer, style="free")
    assert sum(p["tokens"] for p in sample["parts"]) == rollout.total_tokens
    assert sum(p["critical_tokens"] for p in sample["parts"]) == rollout.critical_path
    assert [p["starts_at"] for p in sample["parts"]] == [
        0,
        3,
        3 + sample["parts"][1]["critical_tokens"],
    ]


def test_a_thread_that_the_engine_closed_says_so(rollout, tokenizer):
    block = rollout.trajectory.blocks[0]
    cut = dataclasses.replace(block.threads[1], sampled_end=block.threads[1].end - 2)
    blocks = (dataclasses.replace(block, threads=(block.threads[0], cut)),)
    trajectory = dataclasses.replace(rollout.trajectory, blocks=blocks)
    sample = sample_from_rollout(
        dataclasses.replace(rollout, trajectory=trajectory), tokenizer, style="free"
    )
    thread = sample["parts"][1]["threads"][1]
    assert thread["closed_by_engine"]
    assert thread["text"] == "bcde"


def test_without_blocks_there_is_one_segment(tokenizer, schema):
    rollout = written_rollout("1+1=", RESPONSE, tokenizer, schema, spawn=False)
    sample = sample_from_rollout(rollout, tokenizer, style="sequential")
    (part,) = sample["parts"]
    assert part["text"] == RESPONSE
    assert sample["critical_path"] == sample["total_tokens"] == part["tokens"]


def test_long_texts_lose_their_middle(tokenizer, schema):
    rollout = written_rollout("1+1=", "x" * 50 + "y" * 50, tokenizer, schema)
    sample = sample_from_rollout(rollout, tokenizer, style="free", max_characters=20)
    assert sample["parts"][0]["text"] == f"{'x' * 10}\n[80 characters left out]\n{'y' * 10}"


def test_printable_text_cannot_steer():
    assert printable("a\n\tb é\N{EN DASH}") == "a\n\tb é\N{EN DASH}"
    assert printable("\x1b[2J\u202e\x00\ud800") == "\\x1b[2J\\u202e\\x00\\ud800"
