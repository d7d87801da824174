"""The host's reader of outlines agrees with the one inside the jitted loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout.small_world import ID, VOCAB, ids, make_schema
from tw_jax.rollout.outline_list import OutlineList
from tw_jax.rollout.outlines import new_reader, outline_alphabet, read_token

TEXTS = [
    "<Outlines><Outline>1: a</Outline><Outline> 2.1 :<Outline>1:</Outlines>",
    "<Outlines><Outline>1<Outline>2..1:<Outline>2.:</Outlines></Outlines>",
    "<Outline>1:<Outlines><Outline>123:<Outline>12:</Outlines>",
    "<Outlines></Outlines><Outlines><Outline>3:<Outlines><Outline>2 1:</Outlines>",
]
SNIPPETS = [
    *("<Outlines>", "</Outlines>", "<Outline>1:", "<Outline>2:", "<Outline> 12 :", "<Outline>1.2:"),
    *("<Outline>3 3:", "<Outline>.1:", "<Outline>", ":", "1", ".", " ", "a"),
]


@pytest.mark.parametrize(("max_threads", "max_digits"), [(1, 1), (2, 2), (4, 3)])
def test_both_readers_agree(max_threads, max_digits):
    schema, rng = make_schema(), np.random.default_rng(max_digits)
    alphabet = outline_alphabet(schema, VOCAB)
    rows = [(ids(text) * 3)[:60] for text in TEXTS]
    for _ in range(60):
        pieces = rng.choice(SNIPPETS, 60)
        rows.append(ids("".join(pieces))[:60])
    rows = [list(map(int, row)) + [ID["a"]] * (60 - len(row)) for row in rows]
    n = len(rows)
    read = jax.jit(
        lambda reader, token: read_token(
            reader, alphabet, token, jnp.ones(n, bool), jnp.full(n, max_threads)
        )
    )
    theirs = new_reader(n, max_threads, max_digits)
    ours = [OutlineList(schema, max_threads, max_digits) for _ in rows]
    spawns = 0
    for column in zip(*rows, strict=True):
        theirs, asks = read(theirs, jnp.array(column, jnp.int32))
        assert np.asarray(asks).tolist() == [
            one.read(token) for one, token in zip(ours, column, strict=True)
        ]
        spawns += int(np.asarray(asks).sum())
        numbers, lengths = np.asarray(theirs.numbers), np.asarray(theirs.number_len)
        for row, one in enumerate(ours):
            count = int(theirs.count[row])
            held = [tuple(numbers[row, i, : lengths[row, i]].tolist()) for i in range(count)]
            assert one.numbers == held
    assert spawns >= 20
    assert [one.duplicates for one in ours] == np.asarray(theirs.duplicates).tolist()


def test_ids_beyond_the_tokenizer_are_plain():
    reader = OutlineList(make_schema(), 4, 2)
    assert not any(reader.read(token) for token in (*ids("<Outlines><Outline>1"), 10**6))
    assert not reader.read(ID[":"]) and reader.numbers == []
