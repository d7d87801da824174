"""Which prompts begin alike: what a new request can share instead of computing it again.

A request shares the beginning of its prompt with one that runs, or with a kept prefix. A prefix is
kept when whole pages of it have come up in two requests.
"""

import collections
import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from tw_jax.rollout.program import Program

# Fewer tokens than this are computed sooner than waited for.
MIN_SHARED_TOKENS = 8
# Page-aligned beginnings that are remembered as seen.
_REMEMBERED = 4096

Tokens = Int32[np.ndarray, "n"]


class PrefixBook:
    """The prompts of running requests and the kept prefixes, by their tokens."""

    def __init__(self, program: Program) -> None:
        """Starts with nothing known."""
        self._page_size = program.layout.page_size
        self._requests = program.requests
        self._places = [*range(program.layout.kept)]  # free ones
        self._keeps = bool(self._places)
        # Another split of a prompt into chunks may round differently.
        self._shares = not program.deterministic
        self._running: dict[int, Tokens] = {}
        self._kept: collections.OrderedDict[bytes, tuple[int, Tokens]] = collections.OrderedDict()
        self._seen: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._wanted: dict[int, tuple[bytes, Tokens]] = {}  # by slot: kept once it is cached

    def admit(self, slot: int, prompt: Tokens) -> tuple[int, int]:
        """Notes a request on its way in.

        Returns:
          (source, source_len) of its `Arrival`: the longest beginning that can be shared. The last
          token of the prompt is always left to the request itself, which samples behind it.
        """
        source, length = -1, 0
        if self._shares:
            for other, tokens in self._running.items():
                common = _common_len(tokens, prompt)
                if common > length:
                    source, length = other, common
            used = None
            for key, (kept, tokens) in self._kept.items():
                common = _common_len(tokens, prompt)
                if common > length:
                    source, length, used = self._requests + kept, common, key
            # What all prompts have in common, such as <bos>, is no use of a prefix.
            if used is not None and length >= MIN_SHARED_TOKENS:
                self._kept.move_to_end(used)
            self._want(slot, prompt)
        self._running[slot] = prompt
        length = min(length, len(prompt) - 1)
        return (source, length) if length >= MIN_SHARED_TOKENS else (-1, 0)

    def leave(self, slot: int) -> None:
        """Forgets a request that has ended; one that is not known is no error."""
        self._running.pop(slot, None)
        self._wanted.pop(slot, None)

    def to_keep(self, cached: Int32[np.ndarray, "requests"]) -> list[tuple[int, int, int]]:
        """Prefixes to keep now: (kept prefix, request slot, pages).

        Args:
          cached: tokens of each request slot that are in the cache; 0 if it does not run.
        """
        keeping = []
        for slot, (key, tokens) in list(self._wanted.items()):
            if key in self._kept:
                del self._wanted[slot]
            elif cached[slot] >= len(tokens):
                del self._wanted[slot]
                if not self._places:
                    self._places.append(self._kept.popitem(last=False)[1][0])
                place = self._places.pop(0)
                self._kept[key] = (place, tokens)
                keeping.append((place, slot, len(tokens) // self._page_size))
        return keeping

    def give_up(self, place: int) -> None:
        """A prefix could not be kept: requests share what had the place before."""
        for key in [key for key, (kept, _) in self._kept.items() if kept == place]:
            del self._kept[key]
            # Only then: of two that were to be kept there, one after the other, both may fail.
            self._places.append(place)

    def _want(self, slot: int, prompt: Tokens) -> None:
        """Asks to keep the longest page-aligned beginning that has come up before."""
        if not self._keeps:
            return
        best = None
        for key, end in self._beginnings(prompt):
            if key in self._seen:
                self._seen.move_to_end(key)
                best = key, prompt[:end]
            else:
                self._seen[key] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
        if best is not None and best[0] not in self._kept:
            self._wanted[slot] = best

    def _beginnings(self, prompt: Tokens) -> Iterator[tuple[bytes, int]]:
        """(digest, length) of all whole pages, shortest first."""
        digest = hashlib.blake2b(digest_size=16)
        for end in range(self._page_size, len(prompt), self._page_size):
            digest.update(np.ascontiguousarray(prompt[end - self._page_size : end]).tobytes())
            yield digest.copy().digest(), end


def _common_len(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
