"""Reads lists of plans from token ids, one token per request and step, inside the jitted loop.

The grammar of an outline's head is `<Outline> [space] digits (. digits)* [space] :`. A number is
kept as the tokens it was written with; thread headers repeat those tokens. Plans without numbers
are messages: any text between the opening and the closing tag, kept as a place in the text.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from tw_jax.trajectory.schema import Schema

# States of the reader of one number.
_IDLE, _BEFORE, _NUMBER, _DOT, _AFTER = range(5)


@dataclasses.dataclass(frozen=True)
class OutlineAlphabet:
    """What the reader must know of each token id; arrays are `[vocab]` of the model.

    Attributes:
      digit: the piece is one digit.
      dot: the piece is ".".
      colon: the piece begins with ":".
      space: the piece is white space.
      plans_open: id that opens the list of plans.
      plan_open: id behind which a number stands.
      spawn_trigger: id that closes the list.
      plan_close: id that closes a plan.
      numbered: plans carry numbers.
    """

    digit: Bool[np.ndarray, "vocab"]
    dot: Bool[np.ndarray, "vocab"]
    colon: Bool[np.ndarray, "vocab"]
    space: Bool[np.ndarray, "vocab"]
    plans_open: int
    plan_open: int
    spawn_trigger: int
    plan_close: int
    numbered: bool


def outline_alphabet(schema: Schema, vocab_size: int) -> OutlineAlphabet:
    """The schema's token classes, padded to the model's vocabulary (which may be larger)."""

    def padded(flags: np.ndarray) -> np.ndarray:
        return np.pad(flags, (0, vocab_size - len(flags)))

    classes, fork_join = schema.classes, schema.fork_join
    return OutlineAlphabet(
        digit=padded(classes.digit >= 0),
        dot=padded(classes.dot),
        colon=padded(classes.colon),
        space=padded(classes.space),
        plans_open=fork_join.plans_open,
        plan_open=fork_join.plan_open,
        spawn_trigger=fork_join.spawn_trigger,
        plan_close=fork_join.plan_close,
        numbered=fork_join.numbered,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutlineReader:
    """What has been read of the current list of outlines, per request.

    Attributes:
      open: inside a list of plans.
      state: where in the head of an outline the reader stands.
      current: tokens of the number being read, -1 beyond its end.
      current_len: number of those tokens.
      numbers: distinct numbers so far, -1 beyond their ends.
      number_len: their lengths in tokens.
      count: how many there are.
      duplicates: numbers dropped because they repeated an earlier one of their list.
      plan_at: where the plan without a number that is being read began, -1 for none.
      plan_start: where each plan without a number begins.
      plan_len: its tokens, both tags included.
    """

    open: Bool[Array, "requests"]
    state: Int32[Array, "requests"]
    current: Int32[Array, "requests digits"]
    current_len: Int32[Array, "requests"]
    numbers: Int32[Array, "requests threads digits"]
    number_len: Int32[Array, "requests threads"]
    count: Int32[Array, "requests"]
    duplicates: Int32[Array, "requests"]
    plan_at: Int32[Array, "requests"]
    plan_start: Int32[Array, "requests threads"]
    plan_len: Int32[Array, "requests threads"]


def new_reader(requests: int, max_threads: int, max_digits: int) -> OutlineReader:
    """A reader that has seen nothing."""

    def zeros(*shape: int) -> Int32[Array, "..."]:
        return jnp.zeros(shape, jnp.int32)

    return OutlineReader(
        open=jnp.zeros(requests, bool),
        state=zeros(requests),
        current=zeros(requests, max_digits) - 1,
        current_len=zeros(requests),
        numbers=zeros(requests, max_threads, max_digits) - 1,
        number_len=zeros(requests, max_threads),
        count=zeros(requests),
        duplicates=zeros(requests),
        plan_at=zeros(requests) - 1,
        plan_start=zeros(requests, max_threads),
        plan_len=zeros(requests, max_threads),
    )


def read_token(
    reader: OutlineReader,
    alphabet: OutlineAlphabet,
    token: Int32[Array, "requests"],
    active: Bool[Array, "requests"],
    max_threads: Int32[Array, "requests"],
    position: Int32[Array, "requests"] | None = None,
) -> tuple[OutlineReader, Bool[Array, "requests"]]:
    """Reads one token of every active request's sequential text.

    Args:
      reader: what was read before.
      alphabet: token classes.
      token: the tokens.
      active: requests that have a new token.
      max_threads: further plans of one list are dropped.
      position: place of each token in its text; needed for plans without numbers only.

    Returns:
      The reader behind the token, and where the token asks for a spawn: it closes a list that
      holds at least one plan.
    """
    if not alphabet.numbered:
        assert position is not None
        return _read_unnumbered(reader, alphabet, token, active, max_threads, position)
    max_digits = reader.current.shape[1]
    state = reader.state
    dot = jnp.asarray(alphabet.dot)[token] & (state == _NUMBER)
    digit = jnp.asarray(alphabet.digit)[token] & (
        (state == _BEFORE) | (state == _NUMBER) | (state == _DOT)
    )
    grows = dot | digit
    space = jnp.asarray(alphabet.space)[token]
    accepted = active & (
        jnp.asarray(alphabet.colon)[token] & ((state == _NUMBER) | (state == _AFTER))
    )
    # A number longer than the buffer is no number for this engine.
    fits = reader.current_len < max_digits
    following = jnp.select(
        [
            reader.open & (token == alphabet.plan_open),
            digit & fits,
            dot & fits,
            space & (state == _BEFORE),
            space & ((state == _NUMBER) | (state == _AFTER)),
        ],
        [_BEFORE, _NUMBER, _DOT, _BEFORE, _AFTER],
        _IDLE,
    )
    begins = following == _BEFORE
    slot = jnp.arange(max_digits)[None]
    appended = (slot == reader.current_len[:, None]) & grows[:, None]
    current = jnp.where(begins[:, None], -1, jnp.where(appended, token[:, None], reader.current))
    current_len = jnp.where(begins, 0, reader.current_len + (grows & fits))

    held = jnp.arange(reader.numbers.shape[1])[None] < reader.count[:, None]
    equal = (reader.numbers == reader.current[:, None]).all(axis=2)
    duplicate = accepted & (held & equal).any(axis=1)
    kept = accepted & ~duplicate & (reader.count < max_threads)
    at = kept[:, None] & (jnp.arange(reader.numbers.shape[1])[None] == reader.count[:, None])

    opens = active & (token == alphabet.plans_open)
    closes = active & (token == alphabet.spawn_trigger)
    spawns = closes & reader.open & (reader.count > 0)
    return (
        dataclasses.replace(
            reader,
            open=(reader.open | opens) & ~closes,
            state=jnp.where(active, following, state),
            current=jnp.where(active[:, None], current, reader.current),
            current_len=jnp.where(active, current_len, reader.current_len),
            numbers=jnp.where(at[:, :, None], reader.current[:, None], reader.numbers),
            number_len=jnp.where(at, reader.current_len[:, None], reader.number_len),
            count=jnp.where(opens, 0, reader.count + kept),
            duplicates=reader.duplicates + duplicate,
        ),
        spawns,
    )


def _read_unnumbered(
    reader: OutlineReader,
    alphabet: OutlineAlphabet,
    token: Int32[Array, "requests"],
    active: Bool[Array, "requests"],
    max_threads: Int32[Array, "requests"],
    position: Int32[Array, "requests"],
) -> tuple[OutlineReader, Bool[Array, "requests"]]:
    """`read_token` for plans without numbers: each that is closed by its tag is kept."""
    opens = active & (token == alphabet.plans_open)
    closes = active & (token == alphabet.spawn_trigger)
    begins = active & reader.open & (token == alphabet.plan_open)  # a plan begun anew too
    ends = active & reader.open & (token == alphabet.plan_close)
    kept = ends & (reader.plan_at >= 0) & (reader.count < max_threads)
    ordinal = jnp.arange(reader.plan_start.shape[1])[None]
    at = kept[:, None] & (ordinal == reader.count[:, None])
    length = position + 1 - reader.plan_at
    return (
        dataclasses.replace(
            reader,
            open=(reader.open | opens) & ~closes,
            plan_at=jnp.where(begins, position, jnp.where(opens | ends, -1, reader.plan_at)),
            plan_start=jnp.where(at, reader.plan_at[:, None], reader.plan_start),
            plan_len=jnp.where(at, length[:, None], reader.plan_len),
            count=jnp.where(opens, 0, reader.count + kept),
        ),
        closes & reader.open & (reader.count > 0),
    )
