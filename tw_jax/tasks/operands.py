"""Pairs of factors, split into training and held-out ones that never meet.

What is held out is the unordered pair of factors, in every task alike: neither a*b nor b*a of a
held-out pair occurs in any training problem, whatever the seeds.
"""

import hashlib
from collections.abc import Iterator

from tw_jax.errors import UserError
from tw_jax.tasks.task import Split, draw_below

_MAX_DRAWS = 100_000


def check_heldout_fraction(heldout_fraction: float) -> None:
    """Raises UserError unless both splits can hold pairs."""
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction}")


def pair_split(first: int, second: int, heldout_fraction: float) -> Split:
    """The split that an unordered pair of factors belongs to; a larger fraction keeps the pairs."""
    pair = f"{min(first, second)}*{max(first, second)}"
    digest = hashlib.blake2b(pair.encode(), digest_size=8, key=b"tw_jax held-out pairs").digest()
    held_out = int.from_bytes(digest, "little") < heldout_fraction * 2**64
    return "heldout" if held_out else "train"


def draw_pair(
    words: Iterator[int], digits: int, split: Split, heldout_fraction: float
) -> tuple[int, int]:
    """Draws two factors of exactly `digits` digits whose pair belongs to the split.

    Raises:
      UserError: the split seems to be empty, as it can be for one-digit factors.
    """
    lowest = 10 ** (digits - 1)
    choices = 9 * lowest
    for _ in range(_MAX_DRAWS):
        first = lowest + draw_below(words, choices)
        second = lowest + draw_below(words, choices)
        if pair_split(first, second, heldout_fraction) == split:
            return first, second
    raise UserError(
        f"found no {split} pair of {digits}-digit factors with heldout_fraction "
        f"{heldout_fraction}; move it towards 0.5 or use more digits"
    )
