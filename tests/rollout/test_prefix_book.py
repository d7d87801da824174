"""The book of prompts: what it lets requests share, and what it keeps."""

import dataclasses

import numpy as np
import pytest

from tests.rollout.scenarios import ENGINE
from tests.rollout.small_world import make_model, make_schema
from tw_jax.rollout import prefix_book
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.prefix_book import MIN_SHARED_TOKENS, PrefixBook

PAGE, REQUESTS = 8, 5


def book(**changes) -> PrefixBook:
    config = dataclasses.replace(
        ENGINE, page_size=PAGE, requests=REQUESTS, **{"kept_prefixes": 2, **changes}
    )
    return PrefixBook(RolloutEngine(make_model()[0], make_schema(), config).program)


def prompt(*parts: int) -> np.ndarray:
    """Each part is ten tokens of their own."""
    return np.concatenate([100 * part + np.arange(10, dtype=np.int32) for part in parts])


def cached(**by_slot: int) -> np.ndarray:
    """Cached tokens by slot, `s3=20`."""
    counts = np.zeros(REQUESTS, np.int32)
    for name, count in by_slot.items():
        counts[int(name[1:])] = count
    return counts


def test_shares_the_longest_common_beginning():
    b = book()
    assert b.admit(0, prompt(1, 2)) == (-1, 0)
    assert b.admit(1, prompt(1, 3, 4)) == (0, 10)
    assert b.admit(2, prompt(1, 3, 5)) == (1, 20)
    assert b.admit(3, prompt(6)) == (-1, 0)


def test_the_last_token_is_left_to_the_request():
    b = book()
    b.admit(0, prompt(1, 2))
    assert b.admit(1, prompt(1, 2)) == (0, 19)
    assert b.admit(2, prompt(1)) == (0, 9)


def test_few_tokens_are_not_waited_for():
    b = book()
    b.admit(0, prompt(1))
    assert b.admit(1, np.append(prompt(1)[: MIN_SHARED_TOKENS - 1], 7)) == (-1, 0)
    assert b.admit(2, np.append(prompt(1)[:MIN_SHARED_TOKENS], 7)) == (0, MIN_SHARED_TOKENS)
    assert b.admit(3, prompt(1)[:MIN_SHARED_TOKENS]) == (-1, 0)


def test_who_left_is_not_shared():
    b = book()
    b.admit(0, prompt(1, 2))
    b.leave(0)
    b.leave(0)
    assert b.admit(1, prompt(1, 2)) == (-1, 0)


def test_a_prefix_is_kept_when_it_comes_a_second_time():
    b = book()
    b.admit(0, prompt(1, 2))
    assert b.to_keep(cached(s0=20)) == []
    b.leave(0)
    b.admit(1, prompt(1, 3))
    assert b.to_keep(cached(s1=7)) == [], "not all of it is cached yet"
    assert b.to_keep(cached(s1=8)) == [(0, 1, 1)]  # 10 tokens have one whole page
    assert b.to_keep(cached(s1=20)) == [], "once only"
    b.leave(1)
    assert b.admit(2, prompt(1, 4)) == (REQUESTS, 8)
    # The one that runs has more of it than the kept page.
    assert b.admit(3, prompt(1, 4)) == (2, 19)


def test_one_that_ended_too_soon_is_not_kept():
    b = book()
    b.admit(0, prompt(1, 2))
    b.admit(1, prompt(1, 2))
    b.leave(1)
    assert b.to_keep(cached(s0=20, s1=20)) == []


def test_two_requests_want_the_same_prefix():
    b = book()
    for slot in range(3):
        b.admit(slot, prompt(1, 2))
    assert b.to_keep(cached(s1=20, s2=20)) == [(0, 1, 2)]
    assert b.to_keep(cached(s1=20, s2=20)) == []


def keep(b: PrefixBook, part: int) -> list[tuple[int, int, int]]:
    """Two requests that begin with `part`, one after the other."""
    for slot in range(2):
        b.admit(slot, prompt(part, part + 1))
        kept = b.to_keep(cached(s0=20, s1=20))
        b.leave(slot)
    return kept


def test_the_least_recently_used_makes_room():
    b = book()
    assert keep(b, 10) == [(0, 1, 2)]
    assert keep(b, 20) == [(1, 1, 2)]
    assert b.admit(2, prompt(10, 11, 12)) == (REQUESTS, 16)  # 10 is used, 20 is older now
    b.leave(2)
    assert keep(b, 30) == [(1, 1, 2)]
    assert b.admit(2, prompt(10, 12))[0] == REQUESTS
    assert b.admit(3, prompt(20, 22)) == (-1, 0)
    assert b.admit(4, prompt(30, 32))[0] == REQUESTS + 1


def test_what_could_not_be_kept_is_forgotten_and_its_place_is_free():
    b = book(kept_prefixes=1)
    assert keep(b, 10) == [(0, 1, 2)]
    for slot, part in ((0, 20), (1, 20), (2, 30), (3, 30)):
        b.admit(slot, prompt(part, part + 1))
    # Two at once for the one place; a row shares what it holds, so neither is kept.
    assert b.to_keep(cached(s1=20, s3=20)) == [(0, 1, 2), (0, 3, 2)]
    b.give_up(0)
    b.give_up(0)
    for slot in range(4):
        b.leave(slot)
    assert b.admit(0, prompt(30, 32)) == (-1, 0)
    b.leave(0)
    assert keep(b, 40) == [(0, 1, 2)]
    assert keep(b, 50) == [(0, 1, 2)], "there is one place, not two"


def test_a_few_common_tokens_do_not_count_as_use():
    """All prompts begin alike, with <bos> for one."""
    b = book()
    assert keep(b, 10) == [(0, 1, 2)]
    assert keep(b, 20) == [(1, 1, 2)]
    b.admit(2, np.append(prompt(10)[: MIN_SHARED_TOKENS - 1], prompt(40)))
    assert keep(b, 30) == [(0, 1, 2)], "10 is the older one still"


@pytest.mark.parametrize("changes", [{"kept_prefixes": 0}, {"deterministic": True}])
def test_keeps_nothing_where_it_may_not(changes):
    b = book(**changes)
    assert keep(b, 1) == []
    assert not b._seen


def test_shares_nothing_where_bits_matter():
    b = book(deterministic=True)
    b.admit(0, prompt(1, 2))
    assert b.admit(1, prompt(1, 2)) == (-1, 0)


def test_many_prompts_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(prefix_book, "_REMEMBERED", 50)
    b = book()
    for i in range(1000):
        slot = i % REQUESTS
        b.leave(slot)
        b.admit(slot, prompt(i, i + 1, i % 7))
        b.to_keep(np.full(REQUESTS, 30))
    assert len(b._seen) <= 50
    assert len(b._running) <= REQUESTS and len(b._wanted) <= REQUESTS
    assert len(b._kept) <= 2
    # What is remembered is what came last.
    assert keep(b, 5000) != []
