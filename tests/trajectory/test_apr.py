"""The APR schema: messages in, answers out, a tree per context."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.random_trajectories import (
    answer_of,
    apr_block,
    encode,
    random_texts,
    random_trajectories,
)
from tests.trajectory.spelling import decode, ids_of
from tw_jax.trajectory.metrics import total_tokens
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.trie import TokenKind

GOOD = apr_block((("a", "x+1"), ("b", "y+22")))


@pytest.fixture(scope="session")
def tokenizer(languages):
    return languages["apr"][0]


@pytest.fixture(scope="session")
def schema(languages):
    return languages["apr"][1]


@given(text=random_texts())
def test_every_canonical_text_parses_and_its_spans_read_back(text, tokenizer, schema):
    ids, prompt_len = encode(text, tokenizer, "apr")
    parsed = schema.parse(ids, prompt_len)
    assert isinstance(parsed, Trajectory)
    assert {error.kind for error in schema.validate(parsed)} <= {"empty_answer"}
    assert len(parsed.blocks) == len(text.blocks)
    for block, threads in zip(parsed.blocks, text.blocks, strict=True):
        assert decode(tokenizer, ids[block.start : block.end]) == apr_block(threads)
        for message, thread, (plan, body) in zip(
            block.outlines, block.threads, threads, strict=True
        ):
            assert decode(tokenizer, ids[message.start : message.end]) == (
                f"<Message>{plan}</Message>"
            )
            assert decode(tokenizer, ids[thread.start : thread.body]) == "<Thread>\n"
            assert decode(tokenizer, ids[thread.body : thread.end]) == (
                f"{body}<Join>{answer_of(body)}</Join>"
            )


@given(text=random_texts())
def test_units_see_what_the_paper_lets_them_see(text, tokenizer, schema):
    """Contexts written out from the drawn text, not from the library's spans."""
    ids, prompt_len = encode(text, tokenizer, "apr")
    units = iter(schema.units(schema.parse(ids, prompt_len)))
    parent = "<bos>" + text.prompt
    own = text.segments[0]
    for index, block in enumerate(text.blocks):
        call = own + apr_block(block).partition("</Spawn>")[0] + "</Spawn>"
        unit = next(units)
        assert (unit.kind, unit.block, unit.thread) == ("segment", index, 0)
        assert decode(tokenizer, unit.context) == parent
        assert decode(tokenizer, unit.completion) == call
        for ordinal, (plan, body) in enumerate(block, start=1):
            unit = next(units)
            assert (unit.kind, unit.block, unit.thread) == ("thread", index, ordinal)
            assert decode(tokenizer, unit.context) == (f"<bos><Message>{plan}</Message><Thread>\n")
            assert decode(tokenizer, unit.completion) == f"{body}<Join>{answer_of(body)}</Join>"
        answers = "".join(f"<Join>{answer_of(body)}</Join>" for _, body in block)
        parent += call + "\n" + answers + "\n"
        own = text.segments[index + 1]
    unit = next(units)
    assert decode(tokenizer, unit.context) == parent
    assert decode(tokenizer, unit.completion) == own + "<eos>"
    assert next(units, None) is None


@given(data=st.data())
def test_the_forest_is_a_tree_per_context(data, tokenizer, schema):
    trajectory = data.draw(random_trajectories(tokenizer, schema))
    trie = schema.forest([trajectory])
    index = np.arange(len(trie))
    roots = np.flatnonzero(trie.parent == index)
    assert len(roots) == 1 + sum(len(block.threads) for block in trajectory.blocks)
    assert (trie.positions[roots] == 0).all()
    for start, end in zip(roots, [*roots[1:], len(trie)], strict=True):
        np.testing.assert_array_equal(trie.positions[start:end], np.arange(end - start))
        assert (trie.visible_end[start:end] == end).all()
    for unit in schema.units(trajectory):
        whole = [*unit.context.tolist(), *unit.completion.tolist()]
        starts = [s for s in roots if trie.tokens[s : s + len(whole)].tolist() == whole]
        assert starts
        completion = slice(starts[0] + len(unit.context), starts[0] + len(whole))
        assert (trie.kind[completion] == TokenKind.SAMPLED).all()
        assert (trie.kind[starts[0] : starts[0] + 1] == TokenKind.PROMPT).all()
    sampled = sum(len(unit.completion) for unit in schema.units(trajectory))
    assert sampled == (trie.kind == TokenKind.SAMPLED).sum()


def test_kinds_in_the_parents_context(tokenizer, schema):
    trajectory = schema.parse(ids_of(tokenizer, "q" + GOOD + "z"), 1)
    trie = schema.forest([trajectory])
    end = int(trie.visible_end[0])
    kinds = {kind: trie.tokens[:end][trie.kind[:end] == kind] for kind in TokenKind}
    assert decode(tokenizer, kinds[TokenKind.JOINED]) == "122"
    assert decode(tokenizer, kinds[TokenKind.FORCED]) == "\n<Join></Join><Join></Join>\n"
    call, _, _ = GOOD.partition("</Spawn>")
    assert decode(tokenizer, kinds[TokenKind.SAMPLED]) == call + "</Spawn>z"


def test_the_last_answer_counts_and_none_is_an_empty_one(tokenizer, schema):
    text = "q" + GOOD.replace("x+1<Join>1", "x<Join>7<Join>1").replace("y+22<Join>22", "y")
    trajectory = schema.parse(ids_of(tokenizer, text + "z"), 1)
    assert isinstance(trajectory, Trajectory)
    context = decode(tokenizer, schema.units(trajectory)[-1].context)
    assert context.endswith("</Spawn>\n<Join>1</Join><Join></Join>\n")
    kinds = {error.kind for error in schema.validate(trajectory)}
    assert kinds == {"repeated_answer", "empty_answer"}


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
            ["<Spawn>", "</Spawn>", "<Message>", "</Message>", "<Thread>", "<Join>", "</Join>"]
            + ["\n", " x", "<Spawn><Message>a</Message></Spawn>", "<Thread>b<Join>c</Join>"]
        ),
        max_size=40,
    )
)
def test_tag_soup_never_raises(pieces, tokenizer, schema):
    parsed = schema.parse(ids_of(tokenizer, "x" + "".join(pieces)), 1)
    if isinstance(parsed, Trajectory):
        schema.validate(parsed), schema.units(parsed), schema.forest([parsed])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ab</Join>", "unexpected_tag"),
        (GOOD.replace("y+22<Join>22</Join>", "y"), "unclosed_block"),
        (GOOD.replace("x+1<Join>", "<Spawn><Join>"), "nested_block"),
        (GOOD.replace("</Spawn>\n", "</Spawn>\nq"), "stray_text"),
        (GOOD.replace("</Join><Thread>", "</Join>q<Thread>"), "stray_text"),
        (GOOD[:-1] + "<Thread>\nx<Join></Join>", "thread_without_message"),
        ("<Spawn>\n</Spawn>\n", "missing_outlines"),
        ("<Spawn>\n<Message>a</Message>\n</Spawn>\n", "missing_threads"),
    ],
)
def test_grammar_errors(text, kind, tokenizer, schema):
    assert schema.parse(ids_of(tokenizer, text))[0].kind == kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("<Message>a<", "<Message> <"), "empty_outline"),
        (("<Join>1<", "<Join><"), "empty_answer"),
        (("<Thread>\ny+22<Join>22</Join>", ""), "missing_threads"),
        (("</Join><Thread>", "</Join>\n<Thread>"), "white_space"),
        (("</Spawn>\n", "</Spawn>\n\n"), "white_space"),
        (("<Spawn>\n", "<Spawn>"), "white_space"),
        (("<Thread>\nx", "<Thread>x"), "white_space"),
        (("22</Join>\n", "22</Join>"), "white_space"),
    ],
)
def test_strict_validation(change, kind, tokenizer, schema):
    assert change[0] in GOOD
    assert schema.validate(schema.parse(ids_of(tokenizer, GOOD))) == ()
    parsed = schema.parse(ids_of(tokenizer, GOOD.replace(*change, 1)))
    assert isinstance(parsed, Trajectory)
    assert kind in {error.kind for error in schema.validate(parsed)}


def test_critical_path_saves_the_shorter_thread(tokenizer, schema):
    trajectory = schema.parse(ids_of(tokenizer, "q" + GOOD), 1)
    shorter = len("\nx+1") + 1 + len("1")  # its opening tag of the answer lies inside
    assert schema.critical_path(trajectory) == total_tokens(trajectory) - shorter
