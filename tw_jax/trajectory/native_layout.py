"""Positions and packing of native trajectories: one sequence, sibling threads hidden.

`native_positions` is the one position function of the schema; training reads it here, and tests
hold rollouts against it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory.thread_text import Written, join_written, replaced_tokens, text_kinds
from tw_jax.trajectory.trajectory import ParallelBlock, ThreadSpan, Trajectory, shared_prompt
from tw_jax.trajectory.trie import TokenKind, Trie


def thread_regions(
    tokens: Int32[np.ndarray, "len"], block: ParallelBlock, join_id: int
) -> list[tuple[ThreadSpan, int]]:
    """Each thread of a block with where its region ends: from its opening tag to its tail.

    Args:
      tokens: of the trajectory.
      block: one of its blocks.
      join_id: the first token of a join.
    """
    if not block.threads:
        return []
    last = block.threads[-1].end
    joins = np.flatnonzero(tokens[last : block.join_end] == join_id)
    end = last + int(joins[0]) if len(joins) else max(last, block.join_end)
    return list(
        zip(block.threads, [thread.start for thread in block.threads[1:]] + [end], strict=True)
    )


def native_positions(trajectory: Trajectory, join_id: int) -> Int32[np.ndarray, "len"]:
    """RoPE position of every token: threads start together, the join follows the furthest one."""
    n = len(trajectory.tokens)
    positions = np.arange(n, dtype=np.int32)
    for block in trajectory.blocks:
        regions = thread_regions(trajectory.tokens, block, join_id)
        if not regions:
            continue
        first = int(positions[block.outlines_end - 1]) + 1
        for thread, end in regions:
            positions[thread.start : end] = np.arange(first, first + end - thread.start)
        furthest = max(int(positions[thread.end - 1]) for thread in block.threads)
        resume = regions[-1][1]
        positions[resume:] = np.arange(furthest + 1, furthest + 1 + n - resume)
    return positions


def lay_out(trajectories: Sequence[Trajectory], join_id: int) -> Trie:
    """The trie of trajectories that share their prompt: the prompt, then every response.

    Raises:
      ValueError: they do not share one non-empty prompt.
    """
    prompt = shared_prompt(trajectories)
    index = np.arange(len(prompt), dtype=np.int32)
    no_interval = np.zeros((1, len(prompt)), np.int32)
    # Ends of visibility are known once everything has been laid out.
    parts = [
        Trie(
            tokens=prompt,
            positions=index,
            parent=np.maximum(index - 1, 0),
            visible_end=np.zeros_like(index),
            hidden_start=no_interval,
            hidden_end=no_interval,
            kind=np.full(len(prompt), TokenKind.PROMPT, np.int8),
            source=index,
            rollout=np.full_like(index, -1),
        )
    ]
    start = len(prompt)
    for rollout, trajectory in enumerate(trajectories):
        parts.append(_response(trajectory, rollout, start, join_id))
        start += len(parts[-1])
    parts[0].visible_end[:] = start

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts], axis=-1)

    return Trie(
        tokens=joined("tokens"),
        positions=joined("positions"),
        parent=joined("parent"),
        visible_end=joined("visible_end"),
        hidden_start=joined("hidden_start"),
        hidden_end=joined("hidden_end"),
        kind=joined("kind"),
        source=joined("source"),
        rollout=joined("rollout"),
    )


def _response(trajectory: Trajectory, rollout: int, start: int, join_id: int) -> Trie:
    """The response as a part of a trie; its first token stands at `start`.

    Tokens that the join replaced stand where the thread sampled them, as leaves that only they
    themselves see.
    """
    prompt_len, n = trajectory.prompt_len, len(trajectory.tokens)
    parent = np.arange(-1, n - 1, dtype=np.int32)
    hidden = np.zeros((2, n), np.int32)
    leaf_at: list[int] = []
    leaves: list[Written] = []
    next_source = n
    for block in trajectory.blocks:
        regions = thread_regions(trajectory.tokens, block, join_id)
        for thread, end in regions:
            parent[thread.start] = block.threads[0].start - 1
            # The last thread has no later sibling.
            later = (end, regions[-1][1]) if end < regions[-1][1] else (0, 0)
            hidden[:, thread.start : end] = np.array(later)[:, None]
            if thread.replaced:
                leaf_at.append(thread.sampled_end)
                leaves.append(replaced_tokens(thread, next_source))
                next_source += len(thread.replaced)

    # Leaves are put in before the text's token `leaf_at`; `row` says where text tokens come to lie.
    added = np.zeros(n + 1, np.int32)
    np.add.at(added, leaf_at, [len(leaf.tokens) for leaf in leaves])
    row = np.arange(n + 1) - prompt_len + start + np.cumsum(added)
    row[:prompt_len] = np.arange(prompt_len)  # the prompt stands in front of all responses
    text = Written(
        trajectory.tokens,
        text_kinds(trajectory, later_threads=TokenKind.SAMPLED),
        np.arange(n, dtype=np.int32),
    )
    written = join_written(text, *leaves)
    positions = native_positions(trajectory, join_id)
    rows = [row[:n]]
    parents = [np.where(parent < 0, 0, row[parent])]
    visible_ends = [np.full(n, row[n])]
    leaf_positions = [positions]
    for at, leaf in zip(leaf_at, leaves, strict=True):
        count = np.arange(len(leaf.tokens))
        first = row[at] - len(count)
        rows.append(first + count)
        parents.append(np.where(count == 0, row[at - 1], first + count - 1))
        visible_ends.append(np.full(len(count), row[at]))
        leaf_positions.append(positions[at - 1] + 1 + count)
    order = np.argsort(np.concatenate(rows)[prompt_len:]) + prompt_len
    no_leaf = np.zeros((2, next_source - n), np.int32)
    intervals = np.concatenate([np.where(hidden > 0, row[hidden], 0), no_leaf], axis=1)[:, order]

    def laid(pieces: list[np.ndarray]) -> Int32[np.ndarray, "part"]:
        return np.concatenate(pieces)[order].astype(np.int32)

    return Trie(
        tokens=written.tokens[order],
        positions=laid(leaf_positions),
        parent=laid(parents),
        visible_end=laid(visible_ends),
        hidden_start=intervals[None, 0].astype(np.int32),
        hidden_end=intervals[None, 1].astype(np.int32),
        kind=written.kind[order],
        source=written.source[order],
        rollout=np.full(len(order), rollout, np.int32),
    )
