"""Over-long trajectories: what is kept fits, is whole, and is all that could be kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_trajectories import BLOCKS, encode, random_texts
from tw_jax.data.over_long import file_trajectories, fit
from tw_jax.data.trajectory_file import TrajectoryRecord, write_trajectories

NAMES = ["threadweaver", "native", "apr"]


def parsed(languages, name, prompt, response):
    tokenizer, schema = languages[name]
    prompt_ids = tokenizer(prompt).input_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    ids = np.array([*prompt_ids, *response_ids, schema.eos_id], np.int32)
    return schema, schema.parse(ids, len(prompt_ids))


def text_of(languages, name, piece):
    tokenizer, _ = languages[name]
    return tokenizer.decode(piece.trajectory.tokens[piece.trajectory.prompt_len :])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_pieces_fit_are_whole_and_keep_their_order(languages, name, data):
    tokenizer, schema = languages[name]
    ids, prompt_len = encode(data.draw(random_texts()), tokenizer, name)
    trajectory = schema.parse(ids, prompt_len)
    whole = len(schema.forest([trajectory]))
    row_len = data.draw(st.integers(1, whole + 2))
    response = ids[prompt_len:].tolist()
    kept = {how: fit(trajectory, schema, row_len, how) for how in ("cut", "split", "skip")}
    if whole <= row_len:
        assert all(fitted.pieces[0].trajectory is trajectory for fitted in kept.values())
        return
    assert kept["skip"].pieces == ()
    for how, fitted in kept.items():
        place, blocks, tokens = 0, 0, 0
        for piece in fitted.pieces:
            part = piece.trajectory.tokens[prompt_len:].tolist()
            assert len(piece.trie) == len(schema.forest([piece.trajectory])) <= row_len
            np.testing.assert_array_equal(piece.trajectory.tokens[:prompt_len], ids[:prompt_len])
            # The parts stand in the response in their order, one behind the other.
            place = next(
                i for i in range(place, len(response)) if response[i:][: len(part)] == part
            )
            place += len(part)
            blocks, tokens = blocks + len(piece.trajectory.blocks), tokens + len(part)
            assert part != [schema.eos_id]
        assert fitted.dropped_blocks == len(trajectory.blocks) - blocks, how
        assert fitted.dropped_tokens == len(response) - tokens, how
    assert len(kept["cut"].pieces) <= 1
    if kept["cut"].pieces:
        cut, first = kept["cut"].pieces[0], kept["split"].pieces[0]
        np.testing.assert_array_equal(cut.trajectory.tokens, first.trajectory.tokens)
        assert cut.trajectory.tokens[-1] != schema.eos_id


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_lies_behind_the_last_block_or_line_that_fits(languages, name):
    block = BLOCKS[name]((("a", "x+1"), ("b", "y+2")))
    lines = "one\n", f"two\n{block}\n", "three\n", f"four{block}\n", "five"
    schema, trajectory = parsed(languages, name, "7=", "".join(lines))

    def trie_len(text):
        _, part = parsed(languages, name, "7=", text)
        return len(schema.forest([part])) - 1  # parsed() adds an end-of-text token

    for count, kept in ((1, 1), (2, 2), (3, 3)):
        text = "".join(lines[:count])
        (piece,) = fit(trajectory, schema, trie_len(text), "cut").pieces
        assert text_of(languages, name, piece) == text
        assert len(piece.trajectory.blocks) == (kept >= 2)
    # One token less: the block's line break no longer fits, the block does.
    (piece,) = fit(trajectory, schema, trie_len("".join(lines[:2])) - 1, "cut").pieces
    assert text_of(languages, name, piece) == "".join(lines[:2])[:-1]
    # Another: the block itself does not fit, and nothing of it is kept.
    (piece,) = fit(trajectory, schema, trie_len("".join(lines[:2])) - 2, "cut").pieces
    assert text_of(languages, name, piece) == "one\ntwo\n"
    assert fit(trajectory, schema, 4, "cut").pieces == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_split_goes_on_behind_the_prompt_and_drops_what_fits_nowhere(languages, name):
    small = BLOCKS[name]((("a", "x+1"), ("b", "y+2")))
    large = BLOCKS[name]((("a", "x" * 400 + "+1"), ("b", "y+2")))
    schema, trajectory = parsed(languages, name, "7=", f"{small}\n{large}\n{small}\nend")
    fitted = fit(trajectory, schema, 250, "split")
    texts = [text_of(languages, name, piece) for piece in fitted.pieces]
    tokenizer, _ = languages[name]
    assert texts == [f"{small}\n", f"\n{small}\nend{tokenizer.eos_token}"]
    assert fitted.dropped_blocks == 1
    assert fitted.dropped_tokens == len(tokenizer(large, add_special_tokens=False).input_ids)


def test_files_can_be_cut_or_split_too(tmp_path, languages, capsys):
    tokenizer, schema = languages["threadweaver"]
    path = tmp_path / "data.jsonl"
    write_trajectories(path, [TrajectoryRecord("1=", "2\n" * 30), TrajectoryRecord("1=", "2" * 90)])

    def read(how):
        return file_trajectories(
            [str(path)], tokenizer, schema, 40, tmp_path / "rejects.jsonl", too_long=how
        )

    assert [len(t.tokens) for t in read("cut")] == [3 + 36]
    assert "1 trajectories were longer than a row of 40: cut" in capsys.readouterr().out
    assert "the trie has 94 tokens; a row holds 40" in (tmp_path / "rejects.jsonl").read_text()
    assert [len(t.tokens) for t in read("split")] == [3 + 36, 3 + 24 + 1]
