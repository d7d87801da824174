"""Tree attention on CPU against dense masks: exactness, memory, and time in turns.

max_rel_error_f32, max_rel_error_bf16: output and gradients against the dense oracle, random forests
    and native blocks, relative to each tensor's largest entry.
mask_bytes_40960: all that says who sees whom in one row: the mask's integers and the tile plan.
speedup_vs_dense: a row of eight packed tries, 8,192 tokens, against a dense boolean mask, forward
    and backward.
speedup_causal: one causal row of 2,048 tokens, against the fastest of an einsum and
    `jax.nn.dot_product_attention` with a mask or `is_causal`.
speedup_trie: one trie of 4,096 tokens against the dense mask.
skip_overhead: time over what fewer live tiles should take, the worst of rows of 2 to 32 trees, down
    to a sixteenth of the causal row's tiles.
tile_waste: area of the live tiles of 128 over visible pairs, the row of eight tries.
tile_waste_unaligned: the same tries right behind one another, not each at a multiple of a tile.
live_share: area of the live tiles of 128 over the row's square, the row of eight tries.
temp_memory_ratio, temp_memory_growth: temporary memory over the dense path's at 8,192 tokens; its
    growth when the row doubles.

The row of eight tries: ThreadWeaver tries of the shape that the published public corpus has
(`PARALLEL_RATIO` of the text's tokens in threads, two to three threads per block, four blocks), one
per 1,024 tokens, each beginning at a multiple of that, where `pack_rows` would put it too. The
published texts are some sixteen times as long; longer tries waste less.

Times are medians of runs that take turns, so that other load hits all alike.
"""

import bisect
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.forests import forest_row
from tests.kernels.dense_oracle import dense_attention, dense_mask
from tw_jax.kernels import plan_tiles, tree_attention
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.trajectory import Trajectory

HEADS, KV_HEADS, DIM = 8, 4, 64
LONG, TRIE, CAUSAL = 8192, 4096, 2048
TREES = (2, 4, 8, 12, 24, 32)
THREADS, PARALLEL_RATIO = (2, 3, 2, 3), 0.583


def run() -> dict[str, Any]:
    """All keys of the module's docstring, with the seconds that the ratios are made of."""
    result: dict[str, Any] = {}
    for dtype, name in ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
        result[f"max_rel_error_{name}"] = max(_error(seed, dtype) for seed in range(8))
    result["mask_bytes_40960"] = mask_bytes(40_960)
    packed, trie = trie_row(LONG, tries=8), trie_row(TRIE, tries=1)
    causal = np.full((1, CAUSAL), CAUSAL, np.int32)

    speedup, result["vs_dense_s"] = _compare(packed, (_masked,), repeats=3)
    result["speedup_vs_dense"] = speedup
    peers = (_masked, _is_causal, _einsum)
    result["speedup_causal"], result["causal_s"] = _compare(causal, peers, repeats=9)
    result["speedup_trie"], result["trie_s"] = _compare(trie, (_masked,), repeats=5)
    result |= _skipping()
    result["tile_waste"] = live_area(packed) / visible_pairs(packed)
    unaligned = trie_row(LONG, tries=8, aligned=False)
    result["tile_waste_unaligned"] = live_area(unaligned) / visible_pairs(unaligned)
    result["live_share"] = live_area(packed) / LONG**2
    short, long = (_temporary(_tree, n) for n in (LONG // 2, LONG))
    result["temp_memory_ratio"] = long / _temporary(_masked, LONG)
    result["temp_memory_growth"] = long / short
    return result


# --- rows -----------------------------------------------------------------------------------------


def trie_row(row_len: int, tries: int, *, aligned: bool = True) -> np.ndarray:
    """`visible_end` `[1, row_len]` of equal tries (`corpus_trie`); what remains is padding.

    Args:
      row_len: tokens of the row.
      tries: how many; each takes almost `row_len // tries` tokens.
      aligned: begin at multiples of `row_len // tries`; else right behind one another.
    """
    space = row_len // tries
    trie = corpus_trie(space - 1)  # not all of it: the next one would begin at the multiple anyway
    visible_end = np.arange(1, row_len + 1, dtype=np.int32)
    for start in np.arange(tries) * (space if aligned else len(trie)):
        visible_end[start : start + len(trie)] = trie + start
    return visible_end[None]


def corpus_trie(most: int) -> np.ndarray:
    """`visible_end` of a ThreadWeaver trie of the public corpus's shape, of at most `most` tokens.

    `THREADS` are the blocks; `PARALLEL_RATIO` of the text's tokens lie in threads, tags included;
    the rest is a prompt, outlines, and equal stretches before each block and at the end.
    """
    texts = range(most // 2, most)
    # Looks for the first that is too long: the one before was found to fit.
    too_long = bisect.bisect_right(texts, most, key=lambda text_len: len(trie_of_text(text_len)[1]))
    return trie_of_text(texts[too_long - 1])[1]


def trie_of_text(text_len: int) -> tuple[Trajectory, np.ndarray]:
    """The trajectory of about `text_len` tokens, and `visible_end` of its trie."""

    def parsed(body_len: int, stretch_len: int) -> Trajectory:
        text = "question"
        for threads in THREADS:
            numbers = range(1, threads + 1)
            outlines = "".join(f"<Outline>{i}: plan</Outline>\n" for i in numbers)
            bodies = "".join(f"<Thread>\n{i}: {'x' * body_len}\n</Thread>" for i in numbers)
            text += "s" * stretch_len
            text += f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{bodies}\n</Parallel>\n"
        ids = tokenizer(text + "s" * stretch_len, add_special_tokens=False).input_ids
        trajectory = schema.parse(np.asarray(ids, np.int32), len("question"))
        assert isinstance(trajectory, Trajectory)
        return trajectory

    tokenizer = load_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    tags = thread_tokens(parsed(1, 0)) - sum(THREADS)
    body_len = round((PARALLEL_RATIO * text_len - tags) / sum(THREADS))
    stretch_len = (text_len - len(parsed(body_len, 0).tokens)) // (len(THREADS) + 1)
    trajectory = parsed(body_len, stretch_len)
    return trajectory, schema.forest([trajectory]).visible_end


def thread_tokens(trajectory: Trajectory) -> int:
    """Tokens in threads, tags included."""
    return sum(t.end - t.start for block in trajectory.blocks for t in block.threads)


def live_area(visible_end: np.ndarray, tile: int = 128) -> float:
    """Pairs in the live tiles of a row."""
    return float(int(plan_tiles(visible_end, q_tile=tile, k_tile=tile).count) * tile**2)


def visible_pairs(visible_end: np.ndarray) -> float:
    """Pairs of a query and a key that it sees, nothing hidden."""
    return float((visible_end - np.arange(visible_end.shape[1])).sum())


def mask_bytes(row_len: int) -> int:
    """Bytes of `visible_end` and of the plan made from it, one causal row: the longest plan."""
    end = jax.ShapeDtypeStruct((1, row_len), jnp.int32)
    arrays = jax.tree.leaves((end, jax.eval_shape(plan_tiles, end)))
    return sum(array.size * array.dtype.itemsize for array in arrays)


# --- attention, ours and others -------------------------------------------------------------------


def _tree(q, k, v, end):
    return tree_attention(q, k, v, end)


def _masked(q, k, v, end):
    return jax.nn.dot_product_attention(q, k, v, mask=dense_mask(end)[:, None])


def _is_causal(q, k, v, end):
    del end
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _einsum(q, k, v, end):
    """Head-major, the query heads of a key head folded into rows: the fastest dense form here."""
    rows, row_len, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, row_len, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    score = jnp.einsum("rkgqd,rkjd->rkgqj", q, k) * dim**-0.5
    score = jnp.where(dense_mask(end)[:, None, None], score, -1e30)
    out = jnp.einsum("rkgqj,rkjd->rkgqd", jax.nn.softmax(score, axis=-1), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, row_len, heads, dim)


def _both_ways(attention: Callable) -> Callable:
    """Jitted: output and gradients."""

    @jax.jit
    def run(q, k, v, cotangent, end):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, end), q, k, v)
        return out, pull(cotangent)

    return run


def _inputs(row_len: int, dtype: Any = jnp.float32, rows: int = 1, seed: int = 0) -> list:
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(rows, row_len, count, DIM) for count in heads]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


# --- measures -------------------------------------------------------------------------------------


def _in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())
    for _ in range(repeats):
        for call, found in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def _compare(
    end: np.ndarray, peers: Sequence[Callable], repeats: int
) -> tuple[float, dict[str, float]]:
    """How much faster ours is than the fastest peer, and everybody's seconds."""
    inputs = _inputs(end.shape[1])
    functions = (_tree, *peers)
    calls = [functools.partial(_both_ways(f), *inputs, end) for f in functions]
    ours, *others = medians = _in_turns(calls, repeats)
    names = (f.__name__.strip("_") for f in functions)
    return min(others) / ours, dict(zip(names, medians, strict=True))


def _skipping() -> dict[str, Any]:
    """Time per live tile of rows of equal trees, over that of one causal row."""
    inputs = _inputs(LONG)
    step = _both_ways(_tree)
    rows = []
    for trees in (1, *TREES):
        tree = np.minimum(np.arange(LONG) // -(-LONG // trees) + 1, trees) * -(-LONG // trees)
        rows.append(np.minimum(tree, LONG).astype(np.int32)[None])
    tiles = [int(plan_tiles(end).count) for end in rows]
    # Short rows run several times in their turn: load on the machine hits equally long turns alike.
    times = [max(1, round(tiles[0] / n)) for n in tiles]

    def turn(end: np.ndarray, count: int) -> Any:
        for _ in range(count - 1):
            jax.block_until_ready(step(*inputs, end))
        return step(*inputs, end)

    calls = [functools.partial(turn, end, n) for end, n in zip(rows, times, strict=True)]
    turns = _in_turns(calls, repeats=3)
    seconds = [s / n for s, n in zip(turns, times, strict=True)]
    overhead = [
        (s / seconds[0]) / (n / tiles[0]) for s, n in zip(seconds[1:], tiles[1:], strict=True)
    ]
    return {
        "skip_overhead": max(overhead),
        "skip_overhead_by_trees": dict(zip(map(str, TREES), overhead, strict=True)),
        "live_share_by_trees": {
            str(t): n / tiles[0] for t, n in zip(TREES, tiles[1:], strict=True)
        },
    }


def _temporary(attention: Callable, row_len: int) -> int:
    """Bytes of temporary memory, forward and backward, from the compiler."""
    end = np.full((1, row_len), row_len, np.int32)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in jax.eval_shape(functools.partial(_inputs, row_len))
    ]
    return _both_ways(attention).lower(*shapes, end).compile().memory_analysis().temp_size_in_bytes


def _error(seed: int, dtype: Any) -> float:
    """Largest error of one random case; odd seeds have hidden intervals, as native blocks do."""
    rng = np.random.default_rng(seed)
    row_len = int(rng.integers(200, 400))
    segments = [(int(c), int(n)) for c, n in rng.integers((0, 1), (90, 70), (9, 2))]
    end = forest_row(segments, row_len)[1][None]
    hidden = None
    if seed % 2:
        after = np.arange(1, row_len + 1)
        start = np.minimum(after + rng.integers(0, row_len // 2, (2, 1, row_len)), row_len)
        stop = np.minimum(start + rng.integers(0, row_len // 2, start.shape), row_len)
        hidden = (start.astype(np.int32), stop.astype(np.int32))
    inputs = _inputs(row_len, dtype, seed=seed)
    exact = [x.astype(jnp.float32) for x in inputs]
    found = _both_ways(lambda q, k, v, end: tree_attention(q, k, v, end, hidden))(*inputs, end)
    wanted = _both_ways(lambda q, k, v, end: dense_attention(q, k, v, end, hidden))(*exact, end)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in pairs)
