"""The native schema: NPR's text format, positions and one sequence per trajectory."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.native_oracle import positions_and_steps
from tests.random_trajectories import encode, native_block, random_texts, random_trajectories
from tests.trajectory.spelling import decode, ids_of
from tw_jax.trajectory.metrics import total_tokens
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import TokenKind

GOOD = native_block((("a", "xx"), ("b", "yyy")))


@pytest.fixture(scope="session")
def tokenizer(languages):
    return languages["native"][0]


@pytest.fixture(scope="session")
def schema(languages):
    return languages["native"][1]


@given(text=random_texts())
def test_every_canonical_text_parses_and_its_spans_read_back(text, tokenizer, schema):
    ids, prompt_len = encode(text, tokenizer, "native")
    parsed = schema.parse(ids, prompt_len)
    assert isinstance(parsed, Trajectory)
    assert schema.validate(parsed) == ()
    assert len(parsed.blocks) == len(text.blocks)
    join = list(schema.fork_join.join)
    for block, threads in zip(parsed.blocks, text.blocks, strict=True):
        whole = decode(tokenizer, ids[block.start : block.join_end])
        assert native_block(threads).startswith(whole) and whole.endswith("<takeaway>\n")
        assert decode(tokenizer, ids[block.outlines_end - 1 : block.outlines_end]) == "</guideline>"
        assert ids[block.join_end - len(join) : block.join_end].tolist() == join
        for i, (outline, thread, (plan, body)) in enumerate(
            zip(block.outlines, block.threads, threads, strict=True), start=1
        ):
            assert outline.number == thread.number == str(i)
            assert (
                decode(tokenizer, ids[outline.start : outline.end]) == f"<plan>{i}: {plan}</plan>"
            )
            assert decode(tokenizer, ids[thread.start : thread.body]) == f"<step>\n{i}:"
            assert decode(tokenizer, ids[thread.body : thread.end]) == f" {body}\n</step>"


@given(ids=st.lists(st.integers(-3, 130), max_size=60), prompt_len=st.integers(0, 70))
def test_any_ids_give_a_trajectory_or_errors_inside_the_text(ids, prompt_len, schema):
    parsed = schema.parse(np.array(ids, np.int32), prompt_len)
    if isinstance(parsed, Trajectory):
        schema.validate(parsed)
    else:
        assert parsed
        assert all(0 <= error.index < len(ids) and error.message for error in parsed)


@given(
    pieces=st.lists(
        st.sampled_from(
            ["<guideline>", "</guideline>", "<plan>", "</plan>", "<step>", "</step>"]
            + ["<takeaway>", "</takeaway>", "\n", "1:", " x", "2:", "\n1: a\n"]
        ),
        max_size=40,
    )
)
def test_tag_soup_never_raises(pieces, tokenizer, schema):
    ids = ids_of(tokenizer, "x" + "".join(pieces))
    parsed = schema.parse(ids, 1)
    if isinstance(parsed, Trajectory):
        schema.validate(parsed), schema.units(parsed), schema.forest([parsed])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ab</step>", "unexpected_tag"),
        (GOOD.replace("\n</takeaway>", ""), "unclosed_block"),
        (GOOD.replace("xx", "<guideline>"), "nested_block"),
        (GOOD.replace("</guideline>\n", "</guideline>\nq"), "stray_text"),
        (GOOD.replace("</step>\n<takeaway>", "</step>\nq<takeaway>"), "stray_text"),
        (GOOD.replace("1: a", "a"), "outline_number"),
        (GOOD.replace("\n1: xx", "xx"), "thread_number"),
        ("<guideline>\n</guideline>\n<takeaway>\n</takeaway>", "missing_outlines"),
        (
            "<guideline>\n<plan>1: a</plan>\n</guideline>\n<takeaway>\n</takeaway>",
            "missing_threads",
        ),
    ],
)
def test_grammar_errors(text, kind, tokenizer, schema):
    assert schema.parse(ids_of(tokenizer, text))[0].kind == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("1: a", "3: a"), "outline_numbering"),
        (("\n2: yyy", "\n7: yyy"), "thread_numbering"),
        (("<plan>1: a<", "<plan>1: <"), "empty_outline"),
        (("1: xx\n", "1: \n"), "empty_thread"),
        (("\nab\n</takeaway>", "\n\n</takeaway>"), "empty_takeaway"),
        (("</step>\n<step>", "</step><step>"), "white_space"),
        (("</step>\n<takeaway>", "</step>\n\n<takeaway>"), "white_space"),
        (("<takeaway>\n", "<takeaway>"), "white_space"),
        (("\n</takeaway>", "</takeaway>"), "white_space"),
        (("</guideline>\n", "</guideline>\n\n"), "white_space"),
        (("<guideline>\n", "<guideline>"), "white_space"),
        (("1: xx", "1:xx"), "white_space"),
    ],
)
def test_strict_validation(change, kind, tokenizer, schema):
    assert change[0] in GOOD
    parsed = schema.parse(ids_of(tokenizer, GOOD.replace(*change, 1)))
    assert isinstance(parsed, Trajectory)
    assert kind in {error.kind for error in schema.validate(parsed)}


def test_positions_of_the_published_example(tokenizer, schema):
    """NPR's own builder gives these numbers; the last newline of a step shares the takeaway's."""
    text = "abcd<guideline><plan>1:</plan></guideline>\n"
    text += "<step>1:xx</step>\n<step>2:</step>\n<takeaway>c</takeaway>z"
    trajectory = schema.parse(ids_of(tokenizer, text))
    expected = [*range(11)]  # g = 9 at </guideline>
    expected += [10, 11, 12, 13, 14, 15, 16]  # <step> to the newline behind </step>
    expected += [10, 11, 12, 13, 14]
    expected += [16, 17, 18, 19]  # m = 15
    assert schema.positions(trajectory).tolist() == expected


@given(data=st.data())
def test_the_forest_is_the_text_with_replaced_tokens_where_they_were_sampled(
    data, tokenizer, schema
):
    trajectory = data.draw(random_trajectories(tokenizer, schema))
    trie = schema.forest([trajectory])
    n = len(trajectory.tokens)
    text = trie.source < n
    np.testing.assert_array_equal(trie.tokens[text], trajectory.tokens)
    np.testing.assert_array_equal(trie.source[text], np.arange(n))
    replaced = [t for b in trajectory.blocks for t in b.threads if t.replaced]
    assert (~text).sum() == len(replaced)
    for leaf, thread in zip(np.flatnonzero(~text), replaced, strict=True):
        assert trie.tokens[leaf] == schema.eos_id
        assert trie.source[leaf - 1] == thread.sampled_end - 1 == trie.source[trie.parent[leaf]]
        assert trie.positions[leaf] == trie.positions[leaf - 1] + 1
        assert trie.visible_end[leaf] == leaf + 1
    place = {int(source): i for i, source in enumerate(trie.source)}
    for block in trajectory.blocks:
        for thread in block.threads:  # headers follow the fork, not the sibling before them
            before = trie.parent[place[thread.start]]
            assert trie.source[before] == block.threads[0].start - 1
    sampled = sum(len(unit.completion) for unit in schema.units(trajectory))
    assert sampled == (trie.kind == TokenKind.SAMPLED).sum()
    assert not (trie.kind == TokenKind.JOINED).any()


@given(data=st.data())
def test_group_forest_holds_every_rollout_and_shares_the_prompt(data, tokenizer, schema):
    first = data.draw(random_trajectories(tokenizer, schema, max_blocks=2))
    other = data.draw(random_trajectories(tokenizer, schema, max_blocks=2))
    prompt = first.tokens[: first.prompt_len]
    response = other.tokens[other.prompt_len :]
    second = schema.parse(np.concatenate([prompt, response]), len(prompt))
    forest = schema.forest([first, second])
    for index, trajectory in enumerate([first, second]):
        own, trie = forest.rollout == index, schema.forest([trajectory])
        shift = np.flatnonzero(own)[0] - len(prompt)
        for name in ("tokens", "positions", "kind", "source"):
            np.testing.assert_array_equal(
                getattr(forest, name)[own], getattr(trie, name)[len(prompt) :]
            )
        for name in ("visible_end", "hidden_start", "hidden_end"):
            alone = getattr(trie, name)[..., len(prompt) :]
            np.testing.assert_array_equal(
                getattr(forest, name)[..., own], np.where(alone > 0, alone + shift, 0)
            )
    assert (forest.visible_end[: len(prompt)] == len(forest)).all()


def test_a_block_cut_before_its_join_keeps_its_last_tail(tokenizer, schema):
    """What the engine leaves where the budget ends at the join: tails belong to their threads."""
    text = "q" + GOOD
    parsed = schema.parse(ids_of(tokenizer, text), 1)
    block = parsed.blocks[0]
    cut = block.threads[-1].end + len(schema.fork_join.thread_tail)
    block = dataclasses.replace(block, join_end=cut, end=cut)
    trajectory = Trajectory(parsed.tokens[:cut], 1, (block,))
    trie = schema.forest([trajectory])
    assert trie.kind[-1] == TokenKind.FORCED
    positions, _, _ = positions_and_steps(
        [tokenizer.convert_ids_to_tokens(int(t)) for t in trajectory.tokens]
    )
    np.testing.assert_array_equal(schema.positions(trajectory), positions)
    hidden = trie.hidden_end[0] > 0
    first = block.threads[0]
    assert np.flatnonzero(hidden).tolist() == list(range(first.start, block.threads[1].start))


def test_critical_path_saves_the_shorter_thread(tokenizer, schema):
    trajectory = schema.parse(ids_of(tokenizer, "q" + GOOD), 1)
    assert schema.critical_path(trajectory) == total_tokens(trajectory) - len("\n1: xx\n")
