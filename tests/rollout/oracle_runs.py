"""Scenarios in the engine, in several schedules, beside what a plain controller made of them."""

import dataclasses

import numpy as np

from tests.rollout.page_checker import check_idle_pages
from tests.rollout.scenarios import ENGINE
from tw_jax.rollout.engine import RolloutEngine

SCHEDULES = {
    "roomy, small pages": dataclasses.replace(ENGINE, page_size=24),
    "late spawn, tiny chunks": dataclasses.replace(
        ENGINE, rows=3, requests=3, prefill_rows=1, prefill_chunk=3, steps_per_dispatch=7
    ),
    "deterministic": dataclasses.replace(ENGINE, deterministic=True),
}


def played(graphdef, params, schema, requests, schedule):
    """Rollouts of the engine by name."""
    engine = RolloutEngine(graphdef, schema, SCHEDULES[schedule])
    # Another order of admission in each schedule.
    names = np.random.default_rng(len(schedule)).permutation(list(requests)).tolist()
    rollouts = engine.generate(params, [requests[name] for name in names])
    check_idle_pages(engine)
    return dict(zip(names, rollouts, strict=True))


def assert_same_rollout(name, rollout, oracle):
    """Tokens, units and reasons."""
    assert rollout.trajectory.tokens.tolist() == list(oracle.tokens), name
    assert rollout.finish_reason == oracle.reason, name
    assert rollout.duplicate_outlines == oracle.duplicates, name
    assert rollout.critical_path == oracle.critical_path, name
    engine_units = [
        (u.kind, u.block, u.thread, u.context_len, u.completion.tolist(), u.finish_reason)
        for u in rollout.units
    ]
    oracle_units = [
        (u.kind, u.block, u.thread, len(u.context), list(u.completion), u.reason)
        for u in oracle.units
    ]
    assert engine_units == oracle_units, name


def assert_same_logprobs(name, rollout, oracle):
    for ours, theirs in zip(rollout.units, oracle.units, strict=True):
        np.testing.assert_allclose(
            ours.logprobs, np.float32(theirs.logprobs), atol=1e-4, rtol=0, err_msg=name
        )
