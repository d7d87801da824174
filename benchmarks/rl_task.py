"""What both sides of `python -m benchmarks rl` are rewarded for; the standard library only.

The peer hands texts to its reward functions, so ours are written as texts too: token ids, as
numbers.
"""

from collections.abc import Sequence


def as_text(ids: Sequence[int]) -> str:
    """Token ids as numbers."""
    return " ".join(map(str, ids))


def reward(text: str) -> float:
    """Share of even numbers: nearly every group has variance, whatever was sampled."""
    numbers = [int(word) for word in text.split()]
    return sum(number % 2 == 0 for number in numbers) / max(len(numbers), 1)
