"""What the fork-join engine promises, counted: pages, copies, compilations, calls, agreement.

- `page_ratio`: pages that k threads of t tokens take beyond their prefix of p tokens, over
  k * (t / page + 2); `page_ratio_by_prefix` shows that p does not matter.
- `pool_copies`: copies of the keys and values, or of the token store, in the compiled loop.
- `pool_size_slowdown`: time of a step with a pool 60 times as large.
- `recompiles`: compilations after the first rollouts, whatever is asked then.
- `dispatches_per_rollout`: calls of compiled programs by the host, 64 rollouts at a time.
- `logprob_max_abs_diff`: sampler against trainer, all sampled tokens; float32, and bfloat16 apart.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compiled_copies import compiled_copies
from benchmarks.scripted import Plot, scripted_request, scripted_trajectory
from benchmarks.shapes import TINY
from tw_jax.data.packing import best_fit_rows, pack_rows
from tw_jax.models import Params, Qwen3Config, graphdef, init_params
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.group_forest import group_forest
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.scoring import token_logprobs
from tw_jax.trajectory.schemas import make_schema

PAGE_THREADS, PAGE_TOKENS, PREFIXES = 4, 96, (64, 256, 1024)
PAGE_SIZE = 64
POOL_FACTOR, POOL_TURNS, POOL_ROWS, POOL_TOKENS = 60, 7, 16, 128
ROLLOUTS, BATCH, LENGTHS = 512, 64, (16, 128)


def make_engine(model: Qwen3Config, **sizes: Any) -> RolloutEngine:
    """An engine for the small tokenizer's language."""
    schema = make_schema("threadweaver", load_tokenizer())
    return RolloutEngine(graphdef(model), schema, EngineConfig(**sizes))


def loaded_params(model: Qwen3Config) -> Params:
    """Parameters bound to a device, as those from a checkpoint are."""
    return jax.device_put(init_params(model, 0), jax.local_devices()[0])


def plain_requests(lengths: Sequence[int], **sampling: Any) -> list[Request]:
    """Sequential requests with short prompts of random letters, and budgets."""
    tokenizer, rng = load_tokenizer(), np.random.default_rng(0)
    chosen = {"temperature": 1.0, "max_threads": 1, "max_blocks": 1} | sampling
    return [
        Request(
            np.array([tokenizer.bos_token_id, *rng.integers(40, 60, 7)], np.int32),
            seed=index,
            sampling=SamplingParams(max_response_tokens=length, **chosen),
            mode="sequential",
        )
        for index, length in enumerate(lengths)
    ]


def planning_requests(count: int, **sampling: Any) -> list[Request]:
    """Parallel requests whose plans are given: three threads, then free text."""
    tokenizer = load_tokenizer()
    plans = "".join(f"<Outline>{n}: part</Outline>\n" for n in (1, 2, 12))
    text = f"<Parallel>\n<Outlines>\n{plans}</Outlines>"
    prefix = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    chosen = {"max_response_tokens": 180, "max_thread_tokens": 24, "max_threads": 3} | sampling
    return [
        Request(
            np.array([tokenizer.bos_token_id, 15 + index], np.int32),
            seed=index,
            sampling=SamplingParams(**{"max_blocks": 2} | chosen),
            forced_prefix=prefix,
        )
        for index in range(count)
    ]


def page_ratios() -> dict[int, float]:
    """By length of the prefix."""
    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    plot = Plot(blocks=((PAGE_TOKENS,) * PAGE_THREADS,), segment=1)
    stories = [
        scripted_trajectory(plot, schema, tokenizer, 0, prompt_len=prefix) for prefix in PREFIXES
    ]
    engine = make_engine(
        TINY,
        context_len=max(len(story.tokens) for story in stories),
        rows=PAGE_THREADS,
        requests=1,
        max_threads=PAGE_THREADS,
        max_blocks=1,
        steps_per_dispatch=1,
        page_size=PAGE_SIZE,
        scripts=True,
    )
    params, ratios = loaded_params(TINY), {}
    for prefix, story in zip(PREFIXES, stories, strict=True):
        (block,) = story.blocks
        page, most = PAGE_SIZE, 0
        with engine.session(params) as session:
            session.submit(scripted_request(story, parallel=True, max_threads=PAGE_THREADS))
            while session.busy:
                session.poll()
                most = max(most, session.pages_in_use)
        thread = block.threads[0]
        extra = most - -(-block.outlines_end // page)
        ratios[prefix] = extra / (PAGE_THREADS * ((thread.end - thread.start) / page + 2))
    return ratios


def pool_copies(engine: RolloutEngine, params: Params) -> int:
    """Copies of whole cache or store arrays in the optimised program; the engine must have run."""
    assert engine.state is not None
    weights = engine.weights(params)
    text = engine.advance.lower(weights, engine.state, 4, 1).compile().as_text()
    leaves = jax.tree.leaves(engine.state)
    largest = max(leaf.nbytes for leaf in leaves)
    shapes = {tuple(sorted(leaf.shape)) for leaf in leaves if leaf.nbytes >= largest / 2}
    shapes.add(tuple(sorted(engine.state.tokens.shape)))
    return sum(tuple(sorted(dims)) in shapes for dims in compiled_copies(text))


def pool_size_slowdown() -> float:
    """Seconds of a batch with the larger pool over those with the smaller, of medians in turns."""
    requests = plain_requests([POOL_TOKENS] * POOL_ROWS, temperature=0.0)
    context_len = len(requests[0].prompt) + POOL_TOKENS
    sizes = {"context_len": context_len, "rows": POOL_ROWS, "requests": POOL_ROWS}
    sizes |= {"max_threads": 1, "max_blocks": 1, "steps_per_dispatch": context_len}
    kept = (POOL_FACTOR - 1) * POOL_ROWS
    engines = [make_engine(TINY, **sizes, kept_prefixes=n) for n in (0, kept)]
    params, seconds = loaded_params(TINY), ([], [])
    for turn in range(POOL_TURNS + 2):
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            engines[side].generate(params, requests)
            if turn > 1:
                seconds[side].append(time.perf_counter() - start)
    small, large = map(statistics.median, seconds)
    return large / small


@contextmanager
def heard_compilations() -> Iterator[list[str]]:
    """Collects an entry for each compilation."""
    heard: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(jnp.ones(17)).block_until_ready()
        assert heard, "the listener hears compilations"
        heard.clear()
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def recompiles_and_copies() -> dict[str, int]:
    """Of one engine, after it has served two rollouts."""
    sizes = {"context_len": 256, "rows": 16, "requests": 8, "max_threads": 4, "max_blocks": 2}
    engine, params = make_engine(TINY, **sizes), loaded_params(TINY)
    engine.generate(params, planning_requests(2))
    with heard_compilations() as heard:
        engine.generate(params, planning_requests(9, temperature=0.5))
        engine.generate(params, planning_requests(3, top_k=3, top_p=0.9, max_thread_tokens=30))
        engine.generate(params, plain_requests([5, 40, 100], temperature=0.0))
        engine.generate(params, [])
        recompiles = len(heard)
    return {"recompiles": recompiles, "pool_copies": pool_copies(engine, params)}


def dispatches_per_rollout() -> float:
    """Calls of compiled programs over rollouts."""
    low, high = LENGTHS
    lengths = np.random.default_rng(0).integers(low, high + 1, ROLLOUTS).tolist()
    requests = plain_requests(lengths, temperature=0.0)
    engine = make_engine(
        TINY,
        context_len=len(requests[0].prompt) + high,
        rows=BATCH,
        requests=BATCH,
        max_threads=1,
        max_blocks=1,
    )
    calls = 0

    def counted(program: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return program(*arguments)

        return call

    for name in ("advance", "admit", "harvest"):
        setattr(engine, name, counted(getattr(engine, name)))
    rollouts = engine.generate(loaded_params(TINY), requests)
    return calls / len(rollouts)


def logprob_max_abs_diff(compute_dtype: str) -> float:
    """Largest difference over all sampled tokens, through spawns and joins."""
    model = dataclasses.replace(TINY, compute_dtype=compute_dtype)
    sizes = {"context_len": 192, "rows": 12, "requests": 4, "max_threads": 3, "max_blocks": 2}
    engine, params = make_engine(model, **sizes), loaded_params(model)
    rollouts = engine.generate(params, planning_requests(8, max_response_tokens=160))
    forests = [
        group_forest(engine.schema, [rollout], [1.0], [index], ObjectiveConfig())
        for index, rollout in enumerate(rollouts)
    ]
    rows = best_fit_rows([len(forest.trie) for forest in forests], 512)
    batch = pack_rows([[forests[index] for index in row] for row in rows], 512)

    def score(params: Params) -> jax.Array:
        return token_logprobs(graphdef(model), params, batch, head_chunk=4096, remat="none")

    apart = np.abs(np.asarray(jax.jit(score)(params)) - batch.sampler_logprob)
    return float(apart[batch.loss_weight > 0].max())


def counts() -> dict[str, Any]:
    """All of them."""
    by_prefix = page_ratios()
    return {
        **recompiles_and_copies(),
        "dispatches_per_rollout": dispatches_per_rollout(),
        "logprob_max_abs_diff": logprob_max_abs_diff("float32"),
        "logprob_max_abs_diff_bfloat16": logprob_max_abs_diff("bfloat16"),
        "page_ratio": max(by_prefix.values()),
        "page_ratio_by_prefix": by_prefix,
        "pool_size_slowdown": pool_size_slowdown(),
    }
