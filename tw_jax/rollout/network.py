"""The model as the rollout loop runs it: no rows in vain.

A step of decoding costs nearly the same for one row as for four where reading the weights binds
it, and four times as much where arithmetic does. So the dense parts of the layers run for the
smallest of a few numbers of rows that holds all live ones; free rows are taken from the front.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from tw_jax.models import Qwen3
from tw_jax.rollout.weights import Weights

# Each larger number of rows that is compiled for is this many times the one before.
_BUCKET_STEP = 4


def row_buckets(rows: int) -> tuple[int, ...]:
    """Numbers of rows that the dense parts are compiled for, the last of them all rows."""
    sizes, size = [], 1
    # Close to all rows a bucket of its own saves little.
    while 3 * size <= 2 * rows:
        sizes.append(size)
        size *= 2 if rows <= 2 * _BUCKET_STEP else _BUCKET_STEP
    return (*(s for s in sizes if s < rows), rows)


@dataclasses.dataclass(frozen=True)
class Network:
    """The model and its weights."""

    model: Qwen3
    weights: Weights

    def hidden_states(self, tokens, positions, attend, cache, run_tokenwise=None):
        """Runs the layers; `attend` writes the cache, then reads it."""
        return self.model.hidden_states(
            tokens,
            positions,
            attend,
            cache,
            layers=self.weights.layers,
            run_tokenwise=run_tokenwise,
        )

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        """Logits of each row."""
        return self.model.logits(hidden, self.weights.head)


@dataclasses.dataclass(frozen=True)
class FrontRows:
    """Runs functions of rows on the first few of them.

    Attributes:
      buckets: `row_buckets`.
      bucket: index of the one that holds all rows that matter.
    """

    buckets: tuple[int, ...]
    bucket: Int32[Array, ""]

    def run(self, part: Callable[..., Any], *inputs: Any) -> Any:
        """`part` of the first rows of the inputs, arrays or trees of such; zeros for the others."""
        branches = [_first(part, size) for size in self.buckets]
        return lax.switch(self.bucket, branches, *inputs)


def front_rows(buckets: tuple[int, ...], matters: Bool[Array, "rows"]) -> FrontRows:
    """Finds the bucket that holds all rows that matter."""
    last = jnp.where(matters, jnp.arange(len(matters)), -1).max()
    return FrontRows(buckets, jnp.searchsorted(jnp.array(buckets), last + 1).astype(jnp.int32))


def _first(part: Callable[..., Any], size: int) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        rows = len(jax.tree.leaves(inputs)[0])
        out = part(*jax.tree.map(lambda x: x[:size], inputs))
        return jax.tree.map(lambda x: jnp.pad(x, ((0, rows - size), *[(0, 0)] * (x.ndim - 1))), out)

    return run
