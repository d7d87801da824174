"""Rollouts of a model that is spread over eight devices, in one process or in several.

    python -m tests.parallel.rollout_worker CASE FOLDER
    TW_JAX="python -m tests.parallel.rollout_worker" launch/local_multiprocess.sh 2 4 CASE FOLDER

Every process writes what it saw to `FOLDER/PROCESS.json`.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "JAX_NUM_PROCESSES" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from benchmarks.compiled_copies import compiled_copies
from tests.rollout.scenarios import LOOP, named_requests, plans, request
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.tiny_language import CONFIG
from tw_jax.errors import UserError
from tw_jax.models import Params, Qwen3Config, graphdef, init_params
from tw_jax.models.config import MixtureOfExperts
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import Layout, ParallelConfig, make_layout
from tw_jax.parallel.processes import join_processes
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout

# Small pages, so that the long prompts below share some.
ENGINE = dataclasses.replace(LOOP, rows=7, requests=4, page_size=40, kept_prefixes=2)
MIXTURE = dataclasses.replace(
    CONFIG,
    moe=MixtureOfExperts(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    ),
)
CASES: dict[str, tuple[Qwen3Config, ParallelConfig]] = {
    "fsdp_tensor": (CONFIG, ParallelConfig("fsdp_tensor")),
    "tensor": (CONFIG, ParallelConfig("tensor", data=4, tensor=2)),
    "expert_tensor": (MIXTURE, ParallelConfig("expert", fsdp=2, expert=2, tensor=2)),
}
NAMES = (
    "greedy after a block",
    "four threads",
    "duplicates",
    "everything, warm",
    "penalty, greedy",
    "sequential",
    "no room to join",
    "free",
)
CANCELLED = 2  # a ticket


def requests_of(first_seed: int) -> list[Request]:
    """Greedy and sampled ones, with blocks and without, some of which begin alike."""
    named = named_requests()
    long = "<bos>" + "abc " * 11
    alike = [request(i, plans("1", "2"), long, max_response_tokens=60) for i in range(4)]
    found = [named[name] for name in NAMES] + alike
    return [dataclasses.replace(r, seed=first_seed + i) for i, r in enumerate(found)]


def engine_and_params(case: str, layout: Layout | None) -> tuple[RolloutEngine, Params]:
    """The model of a case on a mesh, or on one device."""
    config = CASES[case][0]
    params = make_model()[1] if config == CONFIG else init_params(config, 0)
    if layout is not None:
        # Through the host: a process may not see the devices of the others.
        host, places = jax.device_get(params), param_shardings(layout, config)
        params = jax.tree.map(
            lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]),
            host,
            places,
        )
    return RolloutEngine(graphdef(config), make_schema(), ENGINE, layout), params


def play(engine: RolloutEngine, params: Params, first_seed: int) -> dict[str, Any]:
    """A session with everything that a caller can do."""
    ended: dict[int, Rollout] = {}
    seen, pages, polls = [], [], 0
    with engine.session(params) as session:
        for asked in requests_of(first_seed):
            session.submit(asked)
        while session.busy:
            ended |= dict(session.poll())
            polls += 1
            pages.append(session.pages_in_use)
            seen.append({t: text.tokens.tolist() for t, text in sorted(session.live().items())})
            if polls == 1:
                session.cancel(CANCELLED)
    return {
        "seen": [[[ticket, text] for ticket, text in live.items()] for live in seen],
        "pages": pages,
        "rollouts": [as_lists(ended[ticket]) for ticket in sorted(ended)],
    }


def as_lists(rollout: Rollout) -> dict[str, Any]:
    """A rollout for JSON."""
    units = [
        [u.kind, u.block, u.thread, u.start, u.completion.tolist(), u.finish_reason]
        + [u.row, u.start_step, u.end_step]
        for u in rollout.units
    ]
    return {
        "tokens": rollout.trajectory.tokens.tolist(),
        "finish_reason": rollout.finish_reason,
        "units": units,
        "logprobs": [np.asarray(u.logprobs, float).tolist() for u in rollout.units],
    }


def cache_copies(engine: RolloutEngine, params: Params) -> list[tuple[int, ...]]:
    """Copies of the cache or of the token store in the compiled loop, per device."""
    state = engine.state
    assert state is not None
    text = engine.advance.lower(engine.weights(params), state, 4, 1).compile().as_text() or ""
    arrays = [*jax.tree.leaves(state.cache), state.tokens]
    shapes = {x.sharding.shard_shape(x.shape) for x in arrays}
    assert all(f"[{','.join(map(str, shape))}]" in text for shape in shapes)
    return [dims for dims in compiled_copies(text) if dims in shapes]


def refusal(part: Callable[[], Any]) -> str:
    """What a call is refused for; nothing if it is not."""
    try:
        part()
    except UserError as error:
        return str(error)
    return ""


def main(case: str, folder: pathlib.Path) -> None:
    """Runs a case and writes what came of it."""
    join_processes(os.environ)
    layout = make_layout(CASES[case][1])
    engine, params = engine_and_params(case, layout)
    found: dict[str, Any] = {"first": play(engine, params, 0)}
    assert engine.placement is not None and engine.state is not None
    cache = jax.tree.leaves(engine.state.cache)[0]
    found["cache_share"] = cache.addressable_shards[0].data.size / cache.size
    matrices = [x for x in jax.tree.leaves(engine.weights(params).layers) if x.ndim > 1]
    found["weight_share"] = max(x.addressable_shards[0].data.size / x.size for x in matrices)

    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    found["second"] = play(engine, params, 1000)
    found["compiled"] = len(compiled)

    late = dataclasses.replace(request(0), timeout_s=1e6)
    differing = request(jax.process_index())
    found["refusals"] = [
        refusal(lambda: engine.generate(params, [late])),
        refusal(lambda: engine.generate(params, [differing])),
        refusal(lambda: engine_and_params(case, None)[0].generate(params, [])),
        refusal(lambda: engine_and_params(case, make_layout(ParallelConfig("tensor")))),
    ]
    found["after"] = as_lists(engine.generate(params, [request(1)])[0])
    if jax.process_count() == 1:
        found["copies"] = cache_copies(engine, params)
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
