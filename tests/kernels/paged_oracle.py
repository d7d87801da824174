"""Random page tables, and what attention over them is by definition."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tw_jax.kernels.page_pool import PagePool

KV_HEADS, GROUP, DIM = 2, 2, 16
LAYERS, LAYER = 2, 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys and values of rows, and how many pages each row shares with the row before it."""

    k: list[np.ndarray]
    v: list[np.ndarray]
    shared: list[int]

    @property
    def kv_lens(self):
        return np.array([len(k) for k in self.k], np.int32)


def random_rows(rng, kv_lens, page_size, shared=None, kv_heads=KV_HEADS, dim=DIM) -> Rows:
    """Random tokens; a row that shares pages has the tokens of the row before it in them."""
    k, v, pages = [], [], []
    for row, length in enumerate(kv_lens):
        new = rng.standard_normal((2, length, kv_heads, dim)).astype(np.float32)
        whole = (
            0
            if row == 0 or not shared
            else min(shared[row], *(n // page_size for n in (length, kv_lens[row - 1])))
        )
        if whole:
            new[:, : whole * page_size] = k[-1][: whole * page_size], v[-1][: whole * page_size]
        k.append(new[0])
        v.append(new[1])
        pages.append(whole)
    return Rows(k, v, pages)


def lay_out(rng, rows: Rows, page_size, pages_per_row, dtype=np.float32):
    """Puts rows into a pool whose other places hold no numbers.

    Returns:
      The pool and `page_indices`; entries behind a row's length are any pages of the pool.
    """
    count = len(rows.k) * pages_per_row + 3
    _, kv_heads, dim = rows.k[0].shape
    pages = np.full((LAYERS, count, page_size, 2 * kv_heads, dim), np.nan, np.float32)
    free = list(rng.permutation(count))
    table = rng.integers(count, size=(len(rows.k), pages_per_row)).astype(np.int32)
    for row, (k, v, shared) in enumerate(zip(rows.k, rows.v, rows.shared, strict=True)):
        for page in range(-(-len(k) // page_size)):
            table[row, page] = table[row - 1, page] if page < shared else free.pop()
            tokens = slice(page * page_size, (page + 1) * page_size)
            size = len(k[tokens])
            pages[LAYER, table[row, page], :size, 0::2] = k[tokens]
            pages[LAYER, table[row, page], :size, 1::2] = v[tokens]
    flat = jnp.array(pages.reshape(-1, *pages.shape[2:]), dtype)
    return PagePool(flat, LAYERS), jnp.array(table)


def dense(q, rows: Rows, q_lens):
    """The definition, in float64: `q` is `[rows, run, heads, dim]`."""
    q = np.asarray(q, np.float64)
    out = np.zeros(q.shape)
    group = q.shape[2] // rows.k[0].shape[1]
    for row, (k, v) in enumerate(zip(rows.k, rows.v, strict=True)):
        k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
        for slot in range(q_lens[row]):
            end = len(k) - q_lens[row] + slot + 1
            score = np.einsum("hd,khd->hk", q[row, slot], k[:end]) / np.sqrt(q.shape[3])
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            weight /= weight.sum(axis=1, keepdims=True)
            out[row, slot] = np.einsum("hk,khd->hd", weight, v[:end])
    return out


def random_queries(rng, rows, run, heads=KV_HEADS * GROUP, dim=DIM):
    """`[rows, run, heads, dim]`."""
    return rng.standard_normal((rows, run, heads, dim)).astype(np.float32)
