"""Random workloads for the engine, and what must hold of every one of them."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from tests.rollout import scenarios, sister_scenarios
from tests.rollout.page_checker import check_idle_pages
from tests.rollout.sessions import alone, polled, tokens
from tests.rollout.sister_worlds import native_world
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.session import QueueFullError

INTERRUPTED = ("cancelled", "deadline")


@dataclasses.dataclass(frozen=True)
class Language:
    """How requests are written in a small world.

    Attributes:
      request: makes one from a seed, a forced prefix and a prompt as text, and sampling fields.
      plans: the text that asks for threads of these numbers.
      opening: text that begins such a list.
    """

    request: Callable[..., Request]
    plans: Callable[..., str]
    opening: str


def threadweaver() -> Language:
    return Language(scenarios.request, scenarios.plans, "<Outlines>")


def native() -> Language:
    make = functools.partial(sister_scenarios.request, native_world())
    return Language(make, sister_scenarios.native_plans, "<guideline>")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests of one session, and what happens to them.

    Attributes:
      requests: in order of submission.
      at_once: how many are submitted before each poll.
      cancels: poll -> ticket that is cancelled before it.
      max_queue: see `RolloutEngine.session`.
      steps: steps per dispatch.
    """

    requests: list[Request]
    at_once: int
    cancels: dict[int, int]
    max_queue: int | None
    steps: int


def random_workload(
    rng: np.random.Generator, count: int, context_len: int, language: Language
) -> Workload:
    """Small requests: few beginnings, tiny budgets, all modes."""
    starts = ["<bos>" + "".join(rng.choice(list("abcdef "), size=20)) for _ in range(2)]
    requests = [_random_request(rng, starts, context_len, language) for _ in range(count)]
    cancels = {int(rng.integers(1, 12)): int(rng.integers(count)) for _ in range(rng.integers(4))}
    return Workload(
        requests,
        at_once=int(rng.choice([1, 3, count])),
        cancels=cancels,
        max_queue=None if rng.random() < 0.6 else int(rng.integers(1, 4)),
        steps=int(rng.choice([1, 3, 8, 40], p=[0.1, 0.2, 0.4, 0.3])),
    )


def _random_request(
    rng: np.random.Generator, starts: list[str], context_len: int, language: Language
) -> Request:
    prompt = "<bos>"
    if rng.random() < 0.8:
        prompt = str(rng.choice(starts))[: int(rng.choice([5, 8, 13, 25], p=[0.1, 0.1, 0.3, 0.5]))]
        prompt = prompt if prompt.startswith("<bos>") else "<bos>"
    prompt += "abcdef"[: rng.integers(4)]
    plans = [language.plans(*numbers) for numbers in (("1",), ("1", "2"), ("3", "12"), ("a",))]
    prefix = str(rng.choice(["", "", "ab", language.opening, *plans]))
    known = language.request(0, prefix, prompt)
    if len(known.prompt) + len(known.forced_prefix) >= context_len:
        prefix = ""
    asked = language.request(
        int(rng.integers(2**32)),
        prefix,
        prompt,
        mode="sequential" if rng.random() < 0.2 else "parallel",
        temperature=float(rng.choice([0.0, 1.0], p=[0.2, 0.8])),
        max_response_tokens=len(known.forced_prefix) + int(rng.integers(1, 30)),
        max_thread_tokens=int(rng.integers(1, 6)),
        max_threads=int(rng.integers(1, 3)),
        max_blocks=int(rng.integers(1, 3)),
    )
    timeout_s = float(rng.integers(1, 15)) if rng.random() < 0.1 else None
    return dataclasses.replace(asked, timeout_s=timeout_s)


def run_workload(
    engine: RolloutEngine, params, work: Workload, clock: list[float]
) -> dict[int, Rollout]:
    """Runs it on a clock that ticks once per poll; the pages are checked behind each."""
    engine.config = dataclasses.replace(engine.config, steps_per_dispatch=work.steps)
    found: dict[int, Rollout] = {}
    coming, polls = list(work.requests), 0
    with engine.session(params, max_queue=work.max_queue) as session:
        while coming or session.busy:
            for _ in range(min(work.at_once, len(coming))):
                try:
                    session.submit(coming[0])
                except QueueFullError:
                    break
                del coming[0]
            polls += 1
            clock[0] += 1.0
            if polls in work.cancels:
                session.cancel(work.cancels[polls])
            new = polled(session)
            assert not found.keys() & new.keys(), "returned twice"
            found |= new
            assert polls < 2000, "no end"
    check_idle_pages(engine)
    assert sorted(found) == list(range(len(work.requests)))
    return found


def check_against_alone(engine: RolloutEngine, params, asked: Request, rollout: Rollout) -> None:
    """The rollout is what the request gives by itself, or its beginning if it was interrupted."""
    whole = alone(engine, params, asked)
    n = len(rollout.trajectory.tokens)
    assert tokens(rollout) == tokens(whole)[:n]
    if rollout.finish_reason not in INTERRUPTED:
        assert n == len(whole.trajectory.tokens)
        assert rollout.finish_reason == whole.finish_reason
        for ours, theirs in zip(rollout.units, whole.units, strict=True):
            assert ours.completion.tolist() == theirs.completion.tolist()
            atol = 0 if engine.config.deterministic else 1e-5
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol, rtol=0)
