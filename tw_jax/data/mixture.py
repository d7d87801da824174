"""Which store gives row n of a training stream: a function of n alone.

`u_n = frac(n / golden ratio + offset)` fills [0, 1) as evenly as a sequence can; the store is where
`u_n` falls among the cumulative weights at n. Every prefix of the stream therefore holds each store
in its share up to O(log n) rows, where a random draw would be off by O(sqrt(n)). The row within the
store is the number of earlier rows that took it, so a store's rows are used in order, each once per
pass, and going on at n needs no other state.
"""

import dataclasses
import functools
import threading

import numpy as np
from jaxtyping import Float64, Int64

# 2**64 / golden ratio, made odd: multiples wrap around exactly, for any n.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 15


@dataclasses.dataclass(frozen=True)
class Shares:
    """Weights of the stores along the stream.

    Attributes:
      first: weight of every store at row 0; need not sum to one.
      last: weights from row `ramp_rows` on; between, they change linearly.
      ramp_rows: 0 for no change.
    """

    first: tuple[float, ...]
    last: tuple[float, ...]
    ramp_rows: int = 0

    def at(self, rows: Int64[np.ndarray, "rows"]) -> Float64[np.ndarray, "rows stores"]:
        """The shares at rows of the stream; each line sums to one."""
        first, last = (np.array(w) / sum(w) for w in (self.first, self.last))
        done = np.minimum(rows / self.ramp_rows, 1.0) if self.ramp_rows else np.ones(len(rows))
        return first + (last - first) * done[:, None]


class Mixture:
    """The stream of (store, index within the store)."""

    def __init__(self, shares: Shares, seed: int) -> None:
        """Begins the stream; `seed` decides where in [0, 1) the sequence starts."""
        self._shares = shares
        self._offset = np.random.default_rng(seed).integers(0, 2**64, dtype=np.uint64)
        stores = len(shares.first)
        # Rows that each store has given before every block, as far as was asked for.
        self._before = [np.zeros(stores, np.int64)]
        self._growing = threading.Lock()  # grain reads from several threads
        self._block = functools.lru_cache(maxsize=8)(self._block_uncached)

    def stores(self, rows: Int64[np.ndarray, "rows"]) -> Int64[np.ndarray, "rows"]:
        """The store that each row of the stream is taken from."""
        phase = rows.astype(np.uint64) * _STEP + self._offset
        u = (phase >> np.uint64(11)).astype(np.float64) * 2.0**-53
        edges = np.cumsum(self._shares.at(rows), axis=1)[:, :-1]
        return np.asarray(np.sum(u[:, None] >= edges, axis=1, dtype=np.int64))

    def row(self, n: int) -> tuple[int, int]:
        """(store, index within the store) of row n; the index counts on over passes."""
        block, place = divmod(n, _BLOCK)
        stores, within = self._block(block)
        store = int(stores[place])
        return store, int(self._counts_before(block)[store] + within[place])

    def _block_uncached(
        self, block: int
    ) -> tuple[Int64[np.ndarray, "block"], Int64[np.ndarray, "block"]]:
        """Store of each row of a block, and the rows of the block before it from that store."""
        stores = self.stores(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        within = np.zeros(_BLOCK, np.int64)
        for store in range(len(self._shares.first)):
            mine = stores == store
            within[mine] = np.arange(np.count_nonzero(mine))
        return stores, within

    def _counts_before(self, block: int) -> Int64[np.ndarray, "stores"]:
        with self._growing:
            while len(self._before) <= block:
                begin = (len(self._before) - 1) * _BLOCK
                stores = self.stores(np.arange(begin, begin + _BLOCK))
                counts = np.bincount(stores, minlength=len(self._shares.first))
                self._before.append(self._before[-1] + counts)
            return self._before[block]
