"""Trajectories whose trie is longer than a row: cut, split or set aside, never inside a block.

A response may end behind a whole parallel block, and in sequential text behind a line break. What
ends there earlier than its text did holds no end-of-text token, so none is trained.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from tw_jax.data.columns import DEFAULT_COLUMNS, ColumnsConfig
from tw_jax.data.rejects import Rejects
from tw_jax.data.trajectory_file import read_trajectories
from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import Trie

TooLong = Literal["cut", "split", "skip"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A trajectory that fits a row.

    Attributes:
      trajectory: a whole one, or prompt and a part of the response.
      trie: its trie.
    """

    trajectory: Trajectory
    trie: Trie


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What became of one trajectory.

    Attributes:
      pieces: one if it fits as it is or was cut, more if it was split, none if nothing fits.
      trie_len: tokens of the whole trie.
      dropped_blocks: parallel blocks that no piece holds.
      dropped_tokens: tokens of the response that no piece holds.
    """

    pieces: tuple[Piece, ...]
    trie_len: int
    dropped_blocks: int = 0
    dropped_tokens: int = 0


def fit(trajectory: Trajectory, schema: Schema, row_len: int, too_long: TooLong) -> Fitted:
    """Makes a trajectory fit a row.

    Args:
      trajectory: prompt and response.
      schema: its language.
      row_len: tokens that the trie may have.
      too_long: `cut` keeps the longest beginning that fits and drops the rest; `split` goes on
        behind it with the prompt and what follows, and drops only what does not fit by itself;
        `skip` drops the trajectory.
    """
    trie = schema.forest([trajectory])
    if len(trie) <= row_len:
        return Fitted((Piece(trajectory, trie),), len(trie))
    pieces, kept = [], []
    if too_long != "skip":
        for start, end, piece in _pieces(trajectory, schema, row_len):
            if too_long == "cut" and start > trajectory.prompt_len:
                break
            pieces.append(piece)
            kept.append((start, end))
    tokens_kept = sum(end - start for start, end in kept)
    blocks_kept = sum(len(piece.trajectory.blocks) for piece in pieces)
    return Fitted(
        tuple(pieces),
        len(trie),
        dropped_blocks=len(trajectory.blocks) - blocks_kept,
        dropped_tokens=len(trajectory.tokens) - trajectory.prompt_len - tokens_kept,
    )


def too_long_message(trie_len: int, row_len: int) -> str:
    """Why a trajectory was set aside."""
    return f"the trie has {trie_len} tokens; a row holds {row_len}"


def file_trajectories(
    sources: Sequence[str],
    tokenizer: Any,
    schema: Schema,
    row_len: int,
    rejects_path: pathlib.Path,
    *,
    too_long: TooLong = "skip",
    columns: ColumnsConfig = DEFAULT_COLUMNS,
    strict: bool = True,
    max_reject_share: float = 1.0,
) -> list[Trajectory]:
    """Good trajectories of all sources, made to fit a row; bad ones are counted and set aside.

    Raises:
      UserError: a source cannot be read, holds no trajectory that fits a row, or more of the
        records are bad than admitted.
    """
    rejects = Rejects(rejects_path, sources=sources)
    kept: list[Trajectory] = []
    shortened = 0
    for source in sources:
        before = len(kept)
        for item in read_trajectories(source, schema, tokenizer, rejects, columns, strict=strict):
            fitted = fit(item.trajectory, schema, row_len, too_long)
            if not fitted.pieces:
                message = too_long_message(fitted.trie_len, row_len)
                rejects.add(source, item.line, "too_long", message)
            shortened += bool(fitted.pieces) and fitted.trie_len > row_len
            kept += [piece.trajectory for piece in fitted.pieces]
        if len(kept) == before:
            raise UserError(
                f"{source}: no trajectory fits a row of {row_len} tokens; raise data.row_len "
                f"({rejects.summary()})"
            )
    rejects.require_share(len(kept), max_reject_share)
    if shortened:
        print(f"{shortened} trajectories were longer than a row of {row_len}: {too_long}")
    if rejects.total:
        print(f"{len(kept)} trajectories will be used; {rejects.summary()}")
    return kept


def _pieces(
    trajectory: Trajectory, schema: Schema, row_len: int
) -> Iterator[tuple[int, int, Piece]]:
    """(start, end, piece) of the parts of the response that fit, in order, as long as can be."""
    ends = _ends(trajectory, schema)
    start, first = trajectory.prompt_len, 0
    while first < len(ends):
        # The longer the part, the longer its trie: bisect for the last end that fits.
        low, high, found = first, len(ends), None
        while low < high:
            middle = (low + high) // 2
            piece = _part(trajectory, schema, start, ends[middle])
            if len(piece.trie) <= row_len:
                low, found = middle + 1, piece
            else:
                high = middle
        if found is None:  # not even the next part fits by itself
            start, first = ends[first], first + 1
        else:
            end = ends[low - 1]
            # Alone behind the prompt, the end-of-text token would teach to say nothing.
            if trajectory.tokens[start:end].tolist() != [schema.eos_id]:
                yield start, end, found
            start, first = end, low


def _ends(trajectory: Trajectory, schema: Schema) -> list[int]:
    """Where a part of the response may end, its own end included."""
    tokens, tag = trajectory.tokens, schema.classes.tag
    length = len(tokens)
    may_end = np.zeros(length + 1, bool)
    may_end[1:] = schema.classes.line_end[tokens]
    may_end[: trajectory.prompt_len + 1] = False
    bounds = [*(block.start for block in trajectory.blocks), length]
    for block, following in zip(trajectory.blocks, bounds[1:], strict=True):
        # The last tag before the next block belongs to this one (a native block's takeaway goes
        # on behind its join): outside of blocks, the parser admits none.
        last_tag = block.start + int(np.flatnonzero(tag[tokens[block.start : following]] >= 0)[-1])
        end = max(block.end, last_tag + 1)
        may_end[block.start + 1 : end] = False
        may_end[end] = True
    may_end[length] = True
    return np.flatnonzero(may_end).tolist()


def _part(trajectory: Trajectory, schema: Schema, start: int, end: int) -> Piece:
    """The prompt with a part of the response."""
    prompt_len = trajectory.prompt_len
    tokens = np.concatenate([trajectory.tokens[:prompt_len], trajectory.tokens[start:end]])
    parsed = schema.parse(tokens, prompt_len)
    if not isinstance(parsed, Trajectory):
        raise ValueError(f"the part {start}..{end} of a good trajectory is none: {parsed[0]}")
    return Piece(parsed, schema.forest([parsed]))
