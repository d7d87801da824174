"""How rollouts end, and what is noted of the text that ends with them."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tw_jax.rollout.state import FINISHED, EngineState


def finish_requests(
    state: EngineState, ending: Bool[Array, "requests"], reason: Int32[Array, "requests"]
) -> EngineState:
    """Ends rollouts: their rows are free at once, their text waits for the host."""
    requests, rows = state.requests, state.rows
    return replace(
        state,
        requests=replace(
            requests,
            phase=jnp.where(ending, FINISHED, requests.phase),
            reason=jnp.where(ending, reason, requests.reason),
            length=jnp.where(ending, rows.n_known[requests.row], requests.length),
        ),
        rows=replace(rows, live=rows.live & ~ending[rows.request]),
    )


def record_segment(state: EngineState, slot: Int32[Array, ""]) -> EngineState:
    """Notes row, first and last step of the sequential text that ends at this step."""
    row = state.requests.row[slot]
    entry = jnp.stack([row, state.rows.start_step[row], state.step])
    segments = state.records.segments.at[slot, state.requests.block[slot]].set(entry)
    return replace(state, records=replace(state.records, segments=segments))
