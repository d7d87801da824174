"""The rollout engine: admits requests, lets the device run, collects what has finished.

    engine = RolloutEngine(graphdef(model_config), schema, EngineConfig(context_len=256))
    rollouts = engine.generate(params, requests)

Decoding, spawning and joining happen inside one jitted loop (`tw_jax.rollout.advance`). Its shapes
depend on the `EngineConfig` alone, so after the first `generate` nothing is compiled again,
whatever the requests ask for.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tw_jax.errors import UserError
from tw_jax.kernels.column_cache import cache_layout
from tw_jax.models import Params, Qwen3Config, check_positions
from tw_jax.parallel.layout import Layout, on_mesh
from tw_jax.rollout.admit import admit, forget_prefixes, harvest, keep_prefix
from tw_jax.rollout.advance import advance
from tw_jax.rollout.controller import RowController
from tw_jax.rollout.interrupt import interrupt_requests
from tw_jax.rollout.outlines import outline_alphabet
from tw_jax.rollout.placement import check_on_one_device, engine_placement, results
from tw_jax.rollout.program import Program
from tw_jax.rollout.request import Request, check_request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.sampling import BLOCK_STRIDE
from tw_jax.rollout.sampling_table import check_sampling
from tw_jax.rollout.script import check_script
from tw_jax.rollout.session import RolloutsStopped, Session
from tw_jax.rollout.state import EngineState, new_state
from tw_jax.rollout.weights import Weights, WeightsFormat, decoding_weights
from tw_jax.trajectory.schema import Schema

OnFinish = Callable[[int, Rollout], None]

# The prefill lane costs as much for one token as for all it can hold. For fewer tokens than this it
# rests, and rows feed their known tokens one by one. Measured on CPU with 4 to 128 rows.
LANE_MIN_TOKENS = 4
# Join and position rules that `advance` follows.
_JOINS = (("reencode", "contiguous"), ("gather_kv", "shared_start"), ("message", "fresh"))
# Pages of a row by default, and the least size of one.
_PAGES, _MIN_PAGE = 4, 64


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; everything that is compiled depends on these alone.

    Attributes:
      context_len: positions of a row: prompt and response together never get longer.
      rows: batch rows, each a slot of the key/value cache. Every active request holds one; the
        rest run threads.
      requests: most rollouts that run at once; about three quarters of the rows keep them busy
        when rollouts spawn a few threads. One row is always kept for threads, so with
        `requests == rows` one rollout fewer runs.
      max_threads: most threads of a block.
      max_blocks: most parallel blocks of a rollout.
      max_logit_bias: most tokens that a request may bias; 0 makes no room for any.
      max_number_digits: most tokens of an outline's number; longer ones are no numbers.
      prefill_rows: rows that are fed a chunk of known tokens in one step.
      prefill_chunk: tokens of such a chunk.
      steps_per_dispatch: most steps before the host looks for finished rollouts.
      scripts: make room for `Request.script`.
      page_size: positions per page of the key/value cache; a page is what rows share. 0 chooses: a
        quarter of the context, at least 64, since each page of a row costs some overhead.
      kept_prefixes: beginnings of prompts, such as system prompts, that stay in the cache when
        the requests that brought them are gone; least recently used ones make room. Whole pages
        are kept. Each takes as much memory as a row.
      deterministic: make log-probabilities, not only tokens, independent of what else is in the
        batch, to the last bit: known tokens go through the prefill lane only, threads join all at
        once, all rows are computed, and no beginnings of prompts are shared. Slower.
    """

    context_len: int = 512
    rows: int = 128
    requests: int = 64
    max_threads: int = 8
    max_blocks: int = 16
    max_logit_bias: int = 32
    max_number_digits: int = 2
    prefill_rows: int = 4
    prefill_chunk: int = 16
    steps_per_dispatch: int = 64
    scripts: bool = False
    page_size: int = 0
    kept_prefixes: int = 0
    deterministic: bool = False

    @property
    def page_len(self) -> int:
        """Positions per page."""
        return self.page_size or max(_MIN_PAGE, -(-self.context_len // _PAGES))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("max_logit_bias", "page_size", "kept_prefixes") else 1
            if not isinstance(value, bool) and value < least:
                raise UserError(f"engine.{field.name}={value}: must be at least {least}")
        if self.rows < self.requests:
            raise UserError(
                f"engine.rows={self.rows} is less than engine.requests={self.requests}: every "
                "active request holds a row; raise rows or lower requests"
            )
        if self.prefill_rows > self.rows:
            raise UserError(
                f"engine.prefill_rows={self.prefill_rows} is more than engine.rows={self.rows}"
            )
        if self.prefill_chunk > self.context_len:
            raise UserError(
                f"engine.prefill_chunk={self.prefill_chunk} is more than "
                f"engine.context_len={self.context_len}"
            )
        if self.max_threads >= BLOCK_STRIDE:
            raise UserError(f"engine.max_threads={self.max_threads}: must be below {BLOCK_STRIDE}")


class RolloutEngine:
    """Samples rollouts; see the module docstring."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        schema: Schema,
        config: EngineConfig,
        layout: Layout | None = None,
        controller: RowController | None = None,
    ) -> None:
        """Prepares the jitted programs; nothing is compiled or allocated yet.

        Args:
          graphdef: static half of the model, `tw_jax.models.graphdef(model_config)`.
          schema: the language of parallel thought.
          config: sizes.
          layout: the mesh that the parameters will lie on; None for one device. If it spans several
            processes, all of them make the engine and use it in the same way: the same requests
            and cancellations between the same polls. Each of them gets all rollouts.
          controller: watches every sampled token; see `tw_jax.rollout.controller`.

        Raises:
          UserError: schema, model, sizes and mesh do not fit each other.
        """
        self.config, self.schema = config, schema
        self.model_config = _model_config(graphdef)
        _check_fit(self.model_config, schema, config)
        program = _program(self.model_config, schema, config)
        self.program = dataclasses.replace(program, controller=controller)
        self.placement = None if layout is None else engine_placement(layout, self.program)
        self.state: EngineState | None = None
        self._open = False
        program = self.program
        like_state = results(self.placement, "state")
        state_and_report = results(self.placement, "state", "everywhere")

        def run(weights: Weights, state: EngineState, max_steps, max_finished):
            with on_mesh(layout):
                model = nnx.merge(graphdef, weights.params)
                return advance(program, model, weights, state, max_steps, max_finished)

        def on_state(part: Callable[..., Any], places: dict[str, Any]):
            return jax.jit(functools.partial(part, program), donate_argnums=0, **places)

        self.advance = jax.jit(run, donate_argnums=1, **state_and_report)
        dtype, transpose = self.model_config.compute_dtype, layout is None and _on_cpu()
        self.weights_format = WeightsFormat(dtype, transpose)
        self.weights = jax.jit(
            functools.partial(decoding_weights, dtype=dtype, transpose=transpose)
        )
        self._new_state = jax.jit(functools.partial(new_state, program), **like_state)
        self.keep_prefix = on_state(keep_prefix, state_and_report)
        self.forget_prefixes = on_state(forget_prefixes, like_state)
        self.admit = on_state(admit, like_state)
        self.interrupt = on_state(interrupt_requests, like_state)
        self.harvest = on_state(harvest, state_and_report)

    @contextlib.contextmanager
    def session(
        self, params: Params | Weights, *, max_queue: int | None = None
    ) -> Iterator[Session]:
        """Opens the engine for requests that come and go; one session at a time.

        Requests that still run at the end are dropped.

        Args:
          params: the model's parameters, or weights in the engine's `weights_format`, bound to its
            devices.
          max_queue: most requests that wait for a place; None for any number.

        Raises:
          RuntimeError: a session is open already.
          UserError: the parameters lie on a mesh, the engine was made for one device.
        """
        if self.placement is None:
            check_on_one_device(params)
        if self._open:
            raise RuntimeError("the engine has an open session: leave it first")
        # The state is donated to every call: after a failure in between there is none.
        state, self.state = self.state, None
        self._open = True
        try:
            weights = params if isinstance(params, Weights) else self._weights_of(params)
            if state is None:
                state = self._state_beside(weights)
            session = Session(self, weights, state, max_queue)
            yield session
            self.state = None if session.running else session.state
        finally:
            self._open = False

    def _weights_of(self, params: Params) -> Weights:
        weights = self.weights(params)
        places = jax.tree.map(lambda leaf: leaf.sharding, weights)
        # All of it is bound to its devices: what is not would be compiled for once more.
        return jax.device_put(weights, places)

    def _state_beside(self, weights: Weights) -> EngineState:
        """A new state, on one device never anywhere but with the weights."""
        if self.placement is not None:
            return self._new_state()
        place = jax.tree.leaves(weights)[0].sharding
        (device,) = place.device_set
        with jax.default_device(device):
            return jax.device_put(self._new_state(), place)

    def generate(
        self,
        params: Params | Weights,
        requests: Sequence[Request],
        *,
        on_finish: OnFinish | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Rollout]:
        """Samples one rollout per request.

        Args:
          params: see `session`.
          requests: any number; those beyond `config.requests` enter as others finish.
          on_finish: called with (index, rollout) as rollouts finish, in that order.
          should_stop: asked before every dispatch; a yes ends the call. What spans processes must
            give all of them the same answers.

        Returns:
          Rollouts in the order of the requests.

        Raises:
          UserError: a request does not fit the engine; names it. Nothing was sampled then.
          RolloutsStopped: `should_stop` said yes; `on_finish` has had those that were finished.
          RuntimeError: the engine made no progress, which is a bug of ours.
        """
        for index, request in enumerate(requests):
            self.check(f"request {index}", request)
        results: dict[int, Rollout] = {}
        with self.session(params) as session:
            for request in requests:
                session.submit(request)
            while session.busy:
                if should_stop is not None and should_stop():
                    raise RolloutsStopped(f"{len(results)} of {len(requests)} rollouts finished")
                for index, rollout in session.poll():
                    results[index] = rollout
                    if on_finish is not None:
                        on_finish(index, rollout)
        return [results[index] for index in range(len(requests))]

    def check(self, name: str, request: Request) -> None:
        """Checks that the engine can serve a request as asked.

        Raises:
          UserError: it cannot; says `name`, the field and the remedy.
        """
        _check_request(name, request, self.config, self.model_config)
        if request.timeout_s is not None and self.placement and self.placement.spans_processes:
            raise UserError(
                f"{name}: timeout_s={request.timeout_s}: the clocks of several processes do not "
                "agree on when it is over; leave it out, or cancel in all of them"
            )
        # Thread 1 runs in the parent's row, unless threads hear their messages only.
        own_rows = request.sampling.max_threads > 1 or self.program.messages
        if request.mode == "parallel" and own_rows and self.config.rows < 2:
            raise UserError(
                f"{name}: threads need a row of their own: set engine.rows to at least 2"
            )
        check_script(name, request, self.schema, self.config.scripts)


def _model_config(graphdef: nnx.GraphDef) -> Qwen3Config:
    """The configuration that the graph definition was made from."""
    for name, attribute in graphdef.attributes:
        if name == "config" and isinstance(
            config := getattr(attribute, "value", None), Qwen3Config
        ):
            return config
    raise UserError("graphdef holds no Qwen3Config: make it with tw_jax.models.graphdef(config)")


def _check_fit(model: Qwen3Config, schema: Schema, config: EngineConfig) -> None:
    if (schema.join_rule, schema.position_rule) not in _JOINS:
        raise UserError(
            f"schema {schema.name!r} joins by {schema.join_rule!r} at {schema.position_rule!r} "
            "positions, which the rollout engine cannot do: it knows "
            + " and ".join(f"{join} at {positions} positions" for join, positions in _JOINS)
        )
    forced, message = schema.fork_join, schema.join_rule == "message"
    if not forced.fork or not (message or forced.header_suffix):
        raise UserError(f"schema {schema.name!r}: the fork and header texts must not be empty")
    header_len = len((*forced.context_prefix, *forced.header_prefix, *forced.header_suffix))
    # What a thread's context holds beside its message must fit where the parent's holds the prompt,
    # the list's two tags, the fork and an empty answer: then every thread has room for a token.
    if message and header_len + 1 + len(forced.thread_close) > 3 + len(forced.fork) + 2:
        raise UserError(f"schema {schema.name!r}: the headers of threads are too long")
    try:
        check_positions(model, config.context_len)
    except ValueError as error:
        raise UserError(f"engine.context_len={config.context_len}: {error}") from error
    largest = max(len(schema.classes.tag), int(schema.tag_ids.max()) + 1, schema.eos_id + 1)
    if largest > model.vocab_size:
        raise UserError(
            f"the tokenizer has {largest} tokens, the model only {model.vocab_size}: resize the "
            "model's embeddings or take the tokenizer it was trained with"
        )


def _cache_dtype(model: Qwen3Config) -> jnp.dtype:
    """Dtype of keys and values: that of the products, but float32 on CPU.

    XLA's CPU backend has no bfloat16 scatter: it would convert all of a column there and back for
    every token that is written.
    """
    return jnp.dtype(jnp.float32 if _on_cpu() else model.compute_dtype)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _program(model: Qwen3Config, schema: Schema, config: EngineConfig) -> Program:
    return Program(
        layout=cache_layout(
            model.num_hidden_layers,
            config.rows,
            config.context_len,
            config.page_len,
            config.kept_prefixes,
        ),
        rows=config.rows,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=_cache_dtype(model),
        vocab=model.vocab_size,
        requests=config.requests,
        context_len=config.context_len,
        max_threads=config.max_threads,
        max_digits=config.max_number_digits,
        max_blocks=config.max_blocks,
        max_logit_bias=config.max_logit_bias,
        prefill_rows=config.prefill_rows,
        prefill_chunk=config.prefill_chunk,
        prefill_min=1 if config.deterministic else LANE_MIN_TOKENS,
        deterministic=config.deterministic,
        scripts=config.scripts,
        gathers=schema.join_rule == "gather_kv",
        messages=schema.join_rule == "message",
        tokens=schema.fork_join,
        eos_id=schema.eos_id,
        alphabet=outline_alphabet(schema, model.vocab_size),
    )


def _check_request(name: str, request: Request, config: EngineConfig, model: Qwen3Config) -> None:
    """Refuses a request that the engine cannot serve as asked."""
    check_request(name, request, config.context_len, "engine.context_len")
    sampling = request.sampling
    if max(*map(int, request.prompt), *request.forced_prefix, 0) >= model.vocab_size:
        raise UserError(f"{name}: token ids must lie in 0..{model.vocab_size - 1}")
    for field in ("max_threads", "max_blocks"):
        asked, held = getattr(sampling, field), getattr(config, field)
        if asked > held:
            raise UserError(
                f"{name}: sampling.{field}={asked} must lie in 1..{held}; engine.{field} sets the "
                "upper end"
            )
    check_sampling(name, sampling, model.vocab_size, config.max_logit_bias)
