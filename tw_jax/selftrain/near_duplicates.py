"""How much of two token sequences is the same: the Jaccard index of their runs of eight tokens."""

from collections.abc import Sequence

import numpy as np

RUN_LEN = 8


def shingles(tokens: Sequence[int], run_len: int = RUN_LEN) -> frozenset[bytes]:
    """Every run of `run_len` tokens once; a shorter sequence is one run."""
    ids = np.asarray(tokens, np.int32)
    if len(ids) <= run_len:
        return frozenset([ids.tobytes()])
    runs = np.lib.stride_tricks.sliding_window_view(ids, run_len)
    return frozenset(run.tobytes() for run in runs)


def jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    """Runs in both over runs in either, 0 to 1; 1 for two empty sets."""
    either = len(one | other)
    return len(one & other) / either if either else 1.0
