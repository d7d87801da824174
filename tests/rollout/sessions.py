"""How tests run an engine's sessions: to the end, one request at a time, with a check per poll."""

import dataclasses

from tests.rollout.page_checker import check_idle_pages, check_pages
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.session import Session


def polled(session: Session) -> dict[int, Rollout]:
    """One poll, and a look at the pages behind it."""
    found = dict(session.poll())
    check_pages(session._program, session.state)
    return found


def finish(session: Session) -> dict[int, Rollout]:
    """Polls to the end: rollouts by ticket."""
    found: dict[int, Rollout] = {}
    while session.busy:
        new = polled(session)
        assert not found.keys() & new.keys(), "returned twice"
        found |= new
    return found


def tokens(rollout: Rollout) -> list[int]:
    return rollout.trajectory.tokens.tolist()


def run(engine: RolloutEngine, params, requests: list[Request]) -> list[Rollout]:
    """All in one session."""
    with engine.session(params) as session:
        tickets = [session.submit(request) for request in requests]
        found = finish(session)
    check_idle_pages(engine)
    assert sorted(found) == tickets
    return [found[ticket] for ticket in tickets]


def alone(engine: RolloutEngine, params, request: Request) -> Rollout:
    """In a session of its own: nothing is there to share. No deadline."""
    with engine.session(params) as session:
        session.submit(dataclasses.replace(request, timeout_s=None))
        (rollout,) = finish(session).values()
    return rollout


def set_steps(engine: RolloutEngine, steps_per_dispatch: int) -> None:
    """For the sessions to come; the compiled program is the same for any number."""
    engine.config = dataclasses.replace(engine.config, steps_per_dispatch=steps_per_dispatch)
