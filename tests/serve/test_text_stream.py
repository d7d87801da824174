"""Streams of text: whole characters, and nothing behind a stop string."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.serve.small_server import make_tokenizer
from tests.small_tokenizer import bpe_tokenizer
from tw_jax.serve.text_stream import StopFinder, TextStream

BPE = bpe_tokenizer()


@hypothesis.given(st.text(max_size=40))
def test_text_comes_back_in_whole_characters(text):
    text = BPE.decode(BPE(text).input_ids)  # normalised, and tags of its own as it writes them
    stream, got = TextStream(BPE), ""
    for token in BPE(text).input_ids:
        got += stream.step(token)
        assert text.startswith(got)  # never half a character
    # A replacement character at the very end is not told from an incomplete one.
    assert got.rstrip("\N{REPLACEMENT CHARACTER}") == text.rstrip("\N{REPLACEMENT CHARACTER}")


@hypothesis.given(st.lists(st.integers(0, len(BPE) - 1), max_size=30))
def test_any_tokens_can_be_decoded(tokens):
    stream = TextStream(BPE)
    got = "".join(stream.step(token) for token in tokens)
    whole = BPE.decode(tokens)
    assert whole.startswith(got)
    assert not whole[len(got) :].strip("\N{REPLACEMENT CHARACTER}")


def test_an_incomplete_character_is_held_back():
    tokens = BPE("é").input_ids
    assert len(tokens) == 2
    stream = TextStream(BPE)
    assert [stream.step(token) for token in tokens] == ["", "é"]
    assert TextStream(make_tokenizer()).step(5) == make_tokenizer().decode([5])


@hypothesis.given(
    st.lists(st.text("ab<", max_size=3), max_size=20),
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_are_found_wherever_the_pieces_end(pieces, stops):
    finder, shown, stopped, taken = StopFinder(stops), "", False, ""
    for piece in pieces:
        taken += piece
        ready, stopped = finder.feed(piece)
        shown += ready
        if stopped:
            break
    if not stopped:
        shown += finder.rest()
        assert shown == taken
    found = [at for at in map(taken.find, stops) if at >= 0]
    assert stopped == bool(found)
    if found:
        assert shown == taken[: min(found)]


def test_only_what_may_begin_a_stop_string_is_held():
    finder = StopFinder(["</end>"])
    assert [finder.feed(p)[0] for p in ("ab", "<", "/e", "x")] == ["ab", "", "", "</ex"]


@pytest.mark.parametrize("seed", range(3))
def test_text_of_random_bytes(seed):
    """A lone byte in the middle becomes a replacement character, as in decoding at once."""
    tokens = np.random.default_rng(seed).integers(3, 259, 200).tolist()
    stream = TextStream(BPE)
    got = "".join(stream.step(token) for token in tokens)
    assert BPE.decode(tokens).startswith(got)
