"""Reading messages token by token equals a regular expression over the text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollout.message_oracle import MESSAGE
from tests.rollout.sister_worlds import apr_world
from tw_jax.rollout.outlines import new_reader, outline_alphabet, read_token

MAX_THREADS, LENGTH, PLACE = 3, 40, 7

text_pieces = st.sampled_from(
    ["<Message>", "</Message>", "<Message>a</Message>", "<Spawn>", "</Spawn>", "\n", "1", "</Join>"]
)


@functools.cache
def reading():
    """A jitted function that reads a whole text as request 1 of 2."""
    world = apr_world()
    alphabet = outline_alphabet(world.schema, len(world.pieces) + 8)

    @jax.jit
    def read(tokens, length):
        def body(index, carry):
            reader, _ = carry
            active = jnp.array([False, True]) & (index < length)
            token = jnp.stack([jnp.int32(alphabet.plans_open), tokens[index]])
            position = jnp.full(2, PLACE + index)
            reader, spawns = read_token(
                reader, alphabet, token, active, jnp.full(2, MAX_THREADS), position
            )
            return reader, jnp.where(index < length, spawns, carry[1])

        start = new_reader(2, MAX_THREADS, 2), jnp.zeros(2, bool)
        return jax.lax.fori_loop(0, LENGTH, body, start)

    return read


def expected_messages(text: str) -> list[str]:
    """Messages of the list that the text's last token closes."""
    opened = text.rfind("<Spawn>")
    inside = text[opened : -len("</Spawn>")]
    if not text.endswith("</Spawn>") or opened < 0 or "</Spawn>" in inside:
        return []
    return MESSAGE.findall(inside)[:MAX_THREADS]


@settings(max_examples=200, deadline=None)
@given(st.lists(text_pieces, max_size=12), st.booleans())
def test_messages_equal_a_regular_expression(pieces, closed):
    world = apr_world()
    tokens = world.ids("".join(["<Spawn>", *pieces, "</Spawn>" if closed else ""]))
    assert len(tokens) <= LENGTH
    padded = tokens + [0] * (LENGTH - len(tokens))
    reader, spawns = reading()(np.array(padded, np.int32), len(tokens))
    expected = expected_messages(world.text_of(tokens))
    assert bool(spawns[1]) == bool(expected)
    assert not spawns[0] and not reader.open[0], "the idle request is untouched"
    if expected:
        starts = np.asarray(reader.plan_start[1, : int(reader.count[1])]) - PLACE
        ends = starts + np.asarray(reader.plan_len[1, : len(starts)])
        found = [tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        assert [world.text_of(message) for message in found] == expected
