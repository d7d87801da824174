"""Best-fit packing of tries into fixed-length rows."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int8, Int32

from tw_jax.data.packed_batch import PackedBatch
from tw_jax.trajectory.trie import TokenKind, Trie

# Attention works on tiles of consecutive tokens and skips those without a visible pair. A trie that
# begins inside a tile reaches into one tile more along both edges, so starts at multiples of a tile
# leave fewer tiles to compute. Every backend's tiles (64 to 512) divide 128 or are multiples of it;
# larger multiples need more free tokens, which well filled rows do not have.
_START_MULTIPLE = 128

# In place of a `TokenKind`.
PADDING_KIND = -1


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each kind of token in the SFT loss.

    Attributes:
      sampled: tokens the model writes itself.
      joined: copies of threads behind their earlier siblings. 1 keeps plain sequential decoding of
        parallel text working (the paper's hybrid operation), 0 trains threads only where they run.
      forced: headers and joins that the engine writes.
    """

    sampled: float = 1.0
    joined: float = 1.0
    forced: float = 0.0

    def of(self, trie: Trie) -> Float32[np.ndarray, "len"]:
        """Weight of every token of a trie; prompts weigh 0."""
        return self.of_kinds(trie.kind)

    def of_kinds(self, kind: Int8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
        """Weight of tokens of these kinds; prompts and padding (`PADDING_KIND`) weigh 0."""
        by_kind = np.zeros(len(TokenKind) + 1, np.float32)  # the last place is the index -1
        by_kind[TokenKind.SAMPLED] = self.sampled
        by_kind[TokenKind.JOINED] = self.joined
        by_kind[TokenKind.FORCED] = self.forced
        return by_kind[kind]


@dataclasses.dataclass(frozen=True)
class PolicyTokens:
    """What the update of RL needs of each token besides its loss weight; see `PackedBatch`.

    Attributes:
      kl_weight: `[len]`.
      denominator: `[len]`.
      advantage: `[len]`.
      sampler_logprob: `[len]`.
      rollout_id: `[len]`; -1 for tokens without loss.
      region: `[len]`; -1 for tokens without loss.
      policy_version: `[len]`; -1 for tokens without loss.
    """

    kl_weight: Float32[np.ndarray, "len"]
    denominator: Float32[np.ndarray, "len"]
    advantage: Float32[np.ndarray, "len"]
    sampler_logprob: Float32[np.ndarray, "len"]
    rollout_id: Int32[np.ndarray, "len"]
    region: Int32[np.ndarray, "len"]
    policy_version: Int32[np.ndarray, "len"]

    @classmethod
    def blank(cls, shape: tuple[int, ...]) -> "PolicyTokens":
        """What tokens without loss hold."""
        floats = [np.zeros(shape, np.float32) for _ in range(4)]
        ids = [np.full(shape, -1, np.int32) for _ in range(3)]
        return cls(*floats, *ids)


@dataclasses.dataclass(frozen=True)
class WeightedTrie:
    """A trie with the loss weight of each token, and in RL what the update needs besides.

    Attributes:
      trie: the forest.
      loss_weight: `[len]`.
      policy: RL only.
    """

    trie: Trie
    loss_weight: Float32[np.ndarray, "len"]
    policy: PolicyTokens | None = None


@dataclasses.dataclass(frozen=True)
class TrieRows:
    """Tries laid into rows, before anything weighs their tokens; see `PackedBatch`.

    Attributes:
      tokens: `[rows, row_len]`.
      positions: `[rows, row_len]`.
      parent: `[rows, row_len]`.
      visible_end: `[rows, row_len]`.
      hidden_start: `[depth, rows, row_len]`.
      hidden_end: `[depth, rows, row_len]`.
      kind: `[rows, row_len]`, a `TokenKind`, or `PADDING_KIND`.
      spans: where the tries of every row lie.
    """

    tokens: Int32[np.ndarray, "rows row_len"]
    positions: Int32[np.ndarray, "rows row_len"]
    parent: Int32[np.ndarray, "rows row_len"]
    visible_end: Int32[np.ndarray, "rows row_len"]
    hidden_start: Int32[np.ndarray, "depth rows row_len"]
    hidden_end: Int32[np.ndarray, "depth rows row_len"]
    kind: Int8[np.ndarray, "rows row_len"]
    spans: list[list[slice]]


def best_fit_rows(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Assigns items to rows, longest first, each into the fullest row that still takes it.

    Args:
      lengths: item lengths, each at most `row_len`.
      row_len: capacity of a row.

    Returns:
      Item indices of every row.

    Raises:
      ValueError: an item is longer than a row.
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] > row_len:
            raise ValueError(f"item {item} has {lengths[item]} tokens; a row holds {row_len}")
        slot = bisect.bisect_left(space, (lengths[item], -1))
        if slot == len(space):
            free, row = row_len, len(rows)
            rows.append([])
        else:
            free, row = space.pop(slot)
        rows[row].append(item)
        bisect.insort(space, (free - lengths[item], row))
    return rows


def rows_to_write(
    lengths: Sequence[int], row_len: int, multiple: int, *, last: bool
) -> tuple[list[list[int]], list[int]]:
    """Packs what waits, and says which rows are done with.

    Rows are given away in multiples; the emptiest are taken apart and wait, so that later items
    fill them.

    Args:
      lengths: item lengths, each at most `row_len`.
      row_len: capacity of a row.
      multiple: of rows that are given away.
      last: nothing comes later; all rows are given away.

    Returns:
      Item indices of every row that is given away, and the items that wait.
    """
    rows = best_fit_rows(lengths, row_len)
    count = len(rows) if last else len(rows) // multiple * multiple
    fullest = sorted(range(len(rows)), key=lambda r: -sum(lengths[i] for i in rows[r]))
    done = [rows[r] for r in sorted(fullest[:count])]
    return done, [i for r in sorted(fullest[count:]) for i in rows[r]]


def row_starts(lengths: Sequence[int], row_len: int, multiple: int = _START_MULTIPLE) -> list[int]:
    """Where each item of a row begins: in order, at multiples as far as free tokens last.

    Best-fit rows hold their longest items first, and those gain most.

    Args:
      lengths: item lengths, together at most `row_len`.
      row_len: capacity of the row.
      multiple: where items should begin.

    Returns:
      The start of every item; items neither overlap nor change their order.
    """
    free = row_len - sum(lengths)
    starts, start = [], 0
    for length in lengths:
        gap = -start % multiple
        if gap <= free:
            start, free = start + gap, free - gap
        starts.append(start)
        start += length
    return starts


def lay_out_rows(rows: Sequence[Sequence[Trie]], row_len: int) -> TrieRows:
    """Lays each row's tries into it in order, at `row_starts`, with padding between and behind.

    Padding tokens are roots that see only themselves. All tries must hide to the same depth.
    """
    shape = (len(rows), row_len)
    depth = next((len(trie.hidden_start) for row in rows for trie in row), 0)
    own_index = np.broadcast_to(np.arange(row_len, dtype=np.int32), shape)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    parent, visible_end = own_index.copy(), own_index + np.int32(1)
    hidden_start, hidden_end = (np.zeros((depth, *shape), np.int32) for _ in range(2))
    kind = np.full(shape, PADDING_KIND, np.int8)
    all_spans = []
    for r, row in enumerate(rows):
        starts = row_starts([len(trie) for trie in row], row_len)
        spans = [slice(start, start + len(trie)) for trie, start in zip(row, starts, strict=True)]
        all_spans.append(spans)
        for trie, span in zip(row, spans, strict=True):
            tokens[r, span], positions[r, span], kind[r, span] = (
                trie.tokens,
                trie.positions,
                trie.kind,
            )
            parent[r, span] = trie.parent + span.start
            visible_end[r, span] = trie.visible_end + span.start
            used = trie.hidden_end > 0
            hidden_start[:, r, span] = np.where(used, trie.hidden_start + span.start, 0)
            hidden_end[:, r, span] = np.where(used, trie.hidden_end + span.start, 0)
    return TrieRows(
        tokens, positions, parent, visible_end, hidden_start, hidden_end, kind, all_spans
    )


def pack_rows(
    rows: Sequence[Sequence[WeightedTrie]], row_len: int, *, policy: bool = False
) -> PackedBatch:
    """Lays weighted tries into rows (`lay_out_rows`); padding weighs nothing.

    Args:
      rows: the tries of every row.
      row_len: tokens per row.
      policy: the batch is for RL, even if it should hold nothing.
    """
    laid = lay_out_rows([[item.trie for item in row] for row in rows], row_len)
    weight = np.zeros(laid.tokens.shape, np.float32)
    tokens = PolicyTokens.blank(laid.tokens.shape)
    names = [field.name for field in dataclasses.fields(PolicyTokens)]
    for r, row in enumerate(rows):
        for item, span in zip(row, laid.spans[r], strict=True):
            weight[r, span] = item.loss_weight
            if item.policy is not None:
                policy = True
                for name in names:
                    getattr(tokens, name)[r, span] = getattr(item.policy, name)
    return PackedBatch(
        tokens=laid.tokens,
        positions=laid.positions,
        parent=laid.parent,
        visible_end=laid.visible_end,
        hidden_start=laid.hidden_start,
        hidden_end=laid.hidden_end,
        loss_weight=weight,
        **({name: getattr(tokens, name) for name in names} if policy else {}),
    )
