"""Spans rebuilt from the engine's records are those that the parser reads."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_trajectories import random_trajectories
from tw_jax.rollout.assemble import FinishedText, assemble
from tw_jax.rollout.request import Request
from tw_jax.rollout.state import EOS, LENGTH, SPAWN, THREAD_STOP
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema

TOKENIZER = load_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)


def finished_text(trajectory, logprobs) -> FinishedText:
    """What the device would have recorded of a trajectory; rows and steps are made up."""
    blocks, threads = [], []
    most = max((len(block.threads) for block in trajectory.blocks), default=1)
    for index, block in enumerate(trajectory.blocks):
        blocks.append((block.outlines_end, block.join_end, len(block.threads)))
        lines = np.zeros((most, 9), np.int32)
        for ordinal, thread in enumerate(block.threads):
            count = thread.sampled_end - thread.body + len(thread.replaced)
            reason = THREAD_STOP if thread.sampled_end == thread.end else LENGTH
            reason = EOS if thread.replaced else reason
            positions = (thread.start, thread.body, thread.sampled_end, thread.end)
            lines[ordinal] = (count, reason, ordinal, 10 * index, 10 * index + 5, *positions)
        threads.append(lines)
    segments = [(0, 10 * index, 10 * index + 9) for index in range(len(blocks) + 1)]
    return FinishedText(
        tokens=trajectory.tokens,
        logprobs=logprobs,
        reason=EOS,
        duplicates=0,
        segments=np.array(segments, np.int32),
        blocks=np.array(blocks, np.int32).reshape(-1, 3),
        threads=np.array(threads, np.int32).reshape(-1, most, 9),
        first_step=0,
    )


@settings(max_examples=50)
@given(random_trajectories(TOKENIZER, SCHEMA), st.integers(0, 3))
def test_rebuilds_what_the_parser_reads(trajectory, forced):
    """A forced prefix moves the first unit, nothing else."""
    first = min([block.outlines_end for block in trajectory.blocks] + [len(trajectory.tokens)])
    forced = min(forced, first - trajectory.prompt_len)
    start = trajectory.prompt_len + forced
    request = Request(
        prompt=trajectory.tokens[: trajectory.prompt_len],
        seed=0,
        forced_prefix=tuple(trajectory.tokens[trajectory.prompt_len : start].tolist()),
    )
    logprobs = -np.arange(len(trajectory.tokens), dtype=np.float32)
    rollout = assemble(request, finished_text(trajectory, logprobs), SCHEMA)

    assert rollout.trajectory.blocks == trajectory.blocks
    assert rollout.trajectory.response_start == start
    expected = SCHEMA.units(dataclasses.replace(trajectory, sampled_start=start))
    for ours, theirs in zip(rollout.units, expected, strict=True):
        assert ours.completion.tolist() == theirs.completion.tolist()
        assert (ours.kind, ours.block, ours.thread) == (theirs.kind, theirs.block, theirs.thread)
        assert ours.context_len == len(theirs.context)
        assert len(ours.logprobs) == len(ours.completion)
        assert (ours.logprobs == logprobs[ours.start : ours.start + len(ours.logprobs)]).all()
    for index, unit in enumerate(rollout.units):
        parent = rollout.units[unit.parent] if unit.parent >= 0 else None
        assert (parent is None) == (index == 0)
        assert parent is None or parent.kind == "segment"
    spawning = [unit for unit in rollout.units if unit.kind == "segment"][: len(trajectory.blocks)]
    assert all(unit.finish_reason == "spawn" for unit in spawning)
    assert SPAWN == 1  # its place in FINISH_REASONS


def test_a_block_that_the_model_never_opened_begins_at_its_plans():
    """And one that it never closed ends behind the join."""
    text = "<Outlines>\n<Outline>1: a</Outline>\n<Outline>b</Outline>\n</Outlines>"
    text += "\n<Thread>\n1: c\n</Thread>\n"
    tokens = np.array(TOKENIZER("q" + text + "d").input_ids, np.int32)
    join_end = len(TOKENIZER("q" + text).input_ids)
    opener = tokens.tolist().index(SCHEMA.fork_join.plans_open)
    outlines_end = tokens.tolist().index(SCHEMA.fork_join.spawn_trigger) + 1
    tag = outlines_end + 1
    thread = (4, THREAD_STOP, 0, 0, 0, tag, tag + 4, join_end - 1, join_end - 1)
    finished = FinishedText(
        tokens=tokens,
        logprobs=np.zeros(len(tokens), np.float32),
        reason=LENGTH,
        duplicates=0,
        segments=np.zeros((2, 3), np.int32),
        blocks=np.array([[outlines_end, join_end, 1]], np.int32),
        threads=np.array([[thread]], np.int32),
        first_step=0,
    )
    block = assemble(Request(tokens[:2], 0), finished, SCHEMA).trajectory.blocks[0]
    assert (block.start, block.end) == (opener, join_end)
    assert [outline.number for outline in block.outlines] == ["1"], "the second has no number"
    assert block.threads[0].number == "1"
