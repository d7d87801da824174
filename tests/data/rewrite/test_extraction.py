"""Groups into blocks and back: laws over random lines and groups, and each rule by itself."""

import copy
import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tw_jax.data.rewrite.conservation import Unconserved, require_conserved, restore
from tw_jax.data.rewrite.edits import RefusedEdit, replace_once, strip_edges
from tw_jax.data.rewrite.extraction import Block, Group, LineSpan, extract, span_text
from tw_jax.data.rewrite.rendering import WrittenBlock, WrittenThread, plain_text, render
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS

LINES = ["intro", "one a", "one b", "", "two a", "two b", "end"]

line_texts = st.one_of(
    st.sampled_from(
        ["", " ", "\t", "1: x", "</", "a<b", "x", "x", "2: y \r", "\u2028", "<Outline"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=12),
)


@st.composite
def traces(draw):
    """Lines, and groups of which many are wrong."""
    lines = draw(st.lists(line_texts, min_size=1, max_size=14))
    assume(not any(tag in line for tag in THREADWEAVER_TAGS for line in lines))
    n = len(lines)
    number = st.integers(-1, n + 2)
    wild = st.lists(st.builds(LineSpan, number, number), max_size=4)

    def cut(bounds: list[int]) -> list[LineSpan]:
        bounds = sorted(set(bounds))
        return [LineSpan(a, b - 1) for a, b in zip(bounds, bounds[1:], strict=False)]

    tame = st.lists(st.integers(1, n + 1), max_size=5).map(cut)
    groups = draw(st.lists(st.one_of(tame, wild), max_size=4))
    return lines, [Group(tuple(threads)) for threads in groups]


@st.composite
def written_traces(draw):
    """A trace, its blocks as written with random edits, and their provenance."""
    lines, groups = draw(traces())
    blocks, _ = extract(lines, groups, 0)
    written = []
    for block in blocks:
        threads = []
        for span in block.threads:
            text, edits = strip_edges(span_text(lines, span))
            start = draw(st.integers(0, len(text) - 1))
            find = text[start : draw(st.integers(start + 1, len(text)))]
            try:
                changed, new = replace_once(
                    text,
                    [(find, draw(st.text("ab\n ", max_size=3)), "")],
                    max_changed_chars=10**6,
                    tags=THREADWEAVER_TAGS,
                )
            except RefusedEdit:
                changed, new = text, ()
            threads.append(WrittenThread(span, changed, (*edits, *new)))
        written.append(WrittenBlock(block, ("plan",) * len(threads), tuple(threads)))
    return lines, written, [provenance(block) for block in written]


def provenance(written: WrittenBlock) -> dict:
    return {
        "threads": [
            {
                "first": thread.span.first,
                "last": thread.span.last,
                "edits": [dataclasses.asdict(edit) for edit in thread.edits],
            }
            for thread in written.threads
        ]
    }


@given(written_traces())
@settings(max_examples=400)
def test_every_line_appears_exactly_once_up_to_the_recorded_edits(made):
    lines, written, record = made
    require_conserved("\n".join(lines), render(lines, written), record)


@given(written_traces(), st.data())
@settings(max_examples=300)
def test_the_check_notices_a_dropped_doubled_swapped_or_changed_line(made, data):
    lines, written, record = made
    source = "\n".join(lines)
    broken = list(lines)
    place = data.draw(st.integers(0, len(lines) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "swap", "change"]))
    if how == "drop":
        del broken[place]
    elif how == "double":
        broken.insert(place, broken[place])
    elif how == "swap":
        other = data.draw(st.integers(0, len(lines) - 1))
        broken[place], broken[other] = broken[other], broken[place]
    else:
        broken[place] += "!"
    assume("\n".join(broken) != source and broken)
    # The same text, held against another source: it must not pass for that one.
    with pytest.raises(Unconserved):
        require_conserved("\n".join(broken), render(lines, written), record)


def written_example() -> tuple[str, list[dict], str]:
    threads = (LineSpan(2, 4), LineSpan(5, 6))
    texts = [strip_edges(span_text(LINES, span)) for span in threads]
    written = WrittenBlock(
        Block(0, threads),
        ("first", "second"),
        tuple(WrittenThread(s, t, e) for s, (t, e) in zip(threads, texts, strict=True)),
    )
    return render(LINES, [written]), [provenance(written)], "\n".join(LINES)


def test_a_block_has_the_bytes_of_the_text_contract():
    text, record, source = written_example()
    assert text == (
        "intro\n<Parallel>\n<Outlines>\n<Outline>1: first</Outline>\n<Outline>2: second</Outline>\n"
        "</Outlines>\n<Thread>\n1: one a\none b\n</Thread><Thread>\n2: two a\ntwo b\n</Thread>\n"
        "</Parallel>\nend"
    )
    assert restore(text, record) == source


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("one b\n", ""),
        ("one b\n", "one b\none b\n"),
        ("one a\none b", "one b\none a"),
        ("1: one a\none b", "1: two a\ntwo b"),
        ("intro\n", ""),
        ("end", "end\nend"),
        ("</Thread><Thread>", "</Thread>\nlost\n<Thread>"),
        ("2: two a", "3: two a"),
        ("</Parallel>", ""),
        ("one b\n</Thread><Thread>\n2: two a", "</Thread><Thread>\n2: one b\ntwo a"),
    ],
)
def test_the_check_notices_changed_text(old, new):
    text, record, source = written_example()
    assert text.count(old) == 1
    with pytest.raises(Unconserved):
        require_conserved(source, text.replace(old, new), record)


def test_the_check_notices_a_record_that_does_not_fit():
    text, record, source = written_example()
    for change in (
        lambda r: r[0]["threads"][0].update(first=1),
        lambda r: r[0]["threads"][1].update(last=7),
        lambda r: r[0]["threads"].pop(),
        lambda r: r[0]["threads"][0]["edits"].clear(),
        lambda r: r[0]["threads"][0]["edits"].append({"start": 0, "find": "", "replace": "zz"}),
        lambda r: r.append(r[0]),
        lambda r: r.clear(),
    ):
        wrong = copy.deepcopy(record)
        change(wrong)
        with pytest.raises(Unconserved):
            require_conserved(source, text, wrong)


@given(traces(), st.integers(0, 30))
def test_blocks_are_disjoint_ordered_and_save_enough(made, min_saved_chars):
    lines, groups = made
    blocks, drops = extract(lines, groups, min_saved_chars)
    covered = [n for b in blocks for t in b.threads for n in range(t.first, t.last + 1)]
    assert covered == sorted(set(covered)) and all(1 <= n <= len(lines) for n in covered)
    for block in blocks:
        sizes = [len(span_text(lines, thread).strip()) for thread in block.threads]
        assert len(sizes) >= 2 and min(sizes) > 0
        assert sum(sizes) - max(sizes) >= min_saved_chars
    # Nothing vanishes without a word.
    assert {b.group for b in blocks} | {d.group for d in drops} == set(range(len(groups)))


def spans(*pairs: tuple[int, int]) -> Group:
    return Group(tuple(LineSpan(*pair) for pair in pairs))


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        (spans((2, 3)), "too_few_threads"),
        (spans(), "too_few_threads"),
        (spans((0, 1), (2, 3)), "outside_trace"),
        (spans((2, 3), (5, 8)), "outside_trace"),
        (spans((3, 2), (5, 6)), "outside_trace"),
        (spans((2, 3), (3, 6)), "overlapping_threads"),
        (spans((5, 6), (2, 3)), "overlapping_threads"),
        (spans((2, 2), (5, 5)), "uncovered_lines"),
        (spans((3, 3), (4, 4)), "empty_thread"),
    ],
)
def test_bad_groups_are_dropped_with_a_reason_and_others_survive(group, kind):
    blocks, drops = extract(LINES, [group, spans((6, 6), (7, 7))], 0)
    assert {drop.kind for drop in drops if drop.group == 0} == {kind}
    assert [block.group for block in blocks] == [1]


def test_an_overlap_of_one_line_is_an_overlap():
    blocks, drops = extract(LINES, [spans((1, 2), (3, 5)), spans((5, 5), (6, 6))], 0)
    assert [block.group for block in blocks] == [0]
    assert [(drop.group, drop.kind) for drop in drops] == [(1, "overlapping_groups")]


def test_uncovered_lines_part_a_group_where_they_stand():
    lines = ["a", "b", "between", "c", "", "d", "rest"]
    blocks, drops = extract(lines, [spans((1, 1), (2, 2), (4, 4), (6, 6))], 0)
    assert [block.threads for block in blocks] == [
        (LineSpan(1, 1), LineSpan(2, 2)),
        (LineSpan(4, 5), LineSpan(6, 6)),
    ]
    assert drops == []


def test_a_block_must_save_enough_characters():
    group = spans((2, 4), (5, 6))
    saved = len("one a\none b")  # both threads are as long
    assert len(extract(LINES, [group], saved)[0]) == 1
    assert [d.kind for d in extract(LINES, [group], saved + 1)[1]] == ["too_little_saved"]


def test_more_threads_than_the_format_admits_are_no_block():
    lines = ["x"] * 51
    group = spans(*((n, n) for n in range(1, 52)))
    assert [drop.kind for drop in extract(lines, [group], 0)[1]] == ["too_many_threads"]


def test_plain_text_is_what_stands_before_a_line_without_tags():
    threads = (LineSpan(2, 4), LineSpan(5, 6))
    written = WrittenBlock(
        Block(0, threads),
        ("first", "second"),
        (WrittenThread(threads[0], "ONE", ()), WrittenThread(threads[1], "TWO", ())),
    )
    assert plain_text(LINES, [written], 7) == "intro\nONE\nTWO"
    assert plain_text(LINES, [], 3) == "intro\none a"
    assert plain_text(LINES, [], 1) == ""
