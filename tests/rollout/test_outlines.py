"""Reading outline numbers token by token equals a regular expression over the text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rollout.small_world import PIECES, VOCAB, ids, make_schema
from tw_jax.rollout.outlines import new_reader, outline_alphabet, read_token

MAX_DIGITS, MAX_THREADS, LENGTH = 3, 4, 48
ALPHABET = outline_alphabet(make_schema(), VOCAB + 8)
NUMBER = re.compile(r"<Outline>\s*(\d+(?:\.\d+)*)\s*:")

text_pieces = st.sampled_from(
    ["<Outline>", "<Outline>1:", "<Outline>2", ":", " ", "\n", ".", "1", "12", "</Outlines>", "a"]
    + ["<Outlines>", "<Outline> 3 :", "</Outline>"]
)


@jax.jit
def read(tokens, length):
    """Reads a whole text as request 1 of 2; returns the reader and the last answer."""

    def body(index, carry):
        reader, _ = carry
        active = jnp.array([False, True]) & (index < length)
        token = jnp.stack([jnp.int32(0), tokens[index]])
        limit = jnp.full(2, MAX_THREADS)
        reader, spawns = read_token(reader, ALPHABET, token, active, limit)
        return reader, jnp.where(index < length, spawns, carry[1])

    start = new_reader(2, MAX_THREADS, MAX_DIGITS), jnp.zeros(2, bool)
    return jax.lax.fori_loop(0, LENGTH, body, start)


def expected_numbers(text: str) -> list[str]:
    """Distinct numbers of the list that the text's last token closes."""
    inside = text[: -len("</Outlines>")].rpartition("<Outlines>")
    if not text.endswith("</Outlines>") or not inside[1] or "</Outlines>" in inside[2]:
        return []
    numbers = [n for n in NUMBER.findall(inside[2]) if len(n) <= MAX_DIGITS]
    return list(dict.fromkeys(numbers))[:MAX_THREADS]


@settings(max_examples=200)
@given(st.lists(text_pieces, max_size=18), st.booleans())
def test_numbers_equal_a_regular_expression(pieces, closed):
    text = "<Outlines>" + "".join(pieces) + ("</Outlines>" if closed else "")
    tokens = ids(text)[-LENGTH:]
    text = "".join(PIECES[t] for t in tokens)
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    reader, spawns = read(padded, len(tokens))
    expected = expected_numbers(text)
    assert bool(spawns[1]) == bool(expected)
    assert not spawns[0] and reader.count[0] == 0, "the idle request is untouched"
    if expected:
        numbers = np.asarray(reader.numbers[1, : int(reader.count[1])])
        lengths = np.asarray(reader.number_len[1])
        read_numbers = [
            "".join(PIECES[t] for t in number[:length])
            for number, length in zip(numbers, lengths, strict=False)
        ]
        assert read_numbers == expected
