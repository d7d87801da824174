"""Trajectory files: good lines survive, bad ones are counted, nothing is half-written."""

import json
import pathlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tw_jax import cli
from tw_jax.data.export_task import export_task
from tw_jax.data.rejects import Rejects
from tw_jax.data.trajectory_file import (
    LoadedTrajectory,
    NoGoodTrajectory,
    TrajectoryRecord,
    read_trajectories,
    write_trajectories,
)
from tw_jax.errors import UserError
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.trajectory.schemas import make_schema

TOKENIZER = load_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)
TASK = SumOfProducts(SumOfProductsConfig())
PROBLEM = TASK.problem("train", 0, 0)
GOOD = json.dumps({"prompt": PROBLEM.prompt, "response": PROBLEM.parallel, "answer": "88120"})

BAD_LINES: dict[str, tuple[bytes, str]] = {
    # name: (line, kind)
    "cut off": (GOOD[:-20].encode(), "malformed_json"),
    "no json": (b"hello", "malformed_json"),
    "too deep": (b"[" * 100_000, "malformed_json"),
    "huge number": (b'{"id": ' + b"9" * 5000 + b"}", "malformed_json"),
    "latin 1": ('{"prompt": "é"}'.encode("latin-1"), "invalid_utf8"),
    "list": (b"[1, 2]", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "no prompt": (b'{"response": "x"}', "missing_field"),
    "no response": (b'{"prompt": "x"}', "missing_field"),
    "prompt is a number": (b'{"prompt": 1, "response": "x"}', "wrong_type"),
    "response is null": (b'{"prompt": "x", "response": null}', "wrong_type"),
    "answer is a list": (b'{"prompt": "x", "response": "x", "answer": []}', "wrong_type"),
    "id is an object": (b'{"prompt": "x", "response": "x", "id": {}}', "wrong_type"),
    "empty prompt": (b'{"prompt": "", "response": "x"}', "empty_field"),
    "empty response": (b'{"prompt": "x", "response": ""}', "empty_field"),
    "blank prompt": (b'{"prompt": " \\n", "response": "x"}', "empty_field"),
    "NUL in a response": (b'{"prompt": "x", "response": "1\\u00002"}', "nul_byte"),
    "NUL in an answer": (b'{"prompt": "x", "response": "x", "answer": "\\u0000"}', "nul_byte"),
    "empty chat": (b'{"prompt": [], "response": "x"}', "empty_field"),
    "half a turn": (b'{"prompt": [{"role": "user"}], "response": "x"}', "wrong_type"),
    "no chat": (b'{"qwen_text": "<|im_start|>user: hello"}', "chat_text"),
    "half a character": (b'{"prompt": "\\ud800", "response": "x"}', "invalid_unicode"),
    "unknown characters": (b'{"prompt": "1+\xc3\xa9=", "response": "2"}', "unknown_characters"),
    "never closed": (b'{"prompt": "x", "response": "<Parallel>\\n"}', "unclosed_block"),
    "stray tag": (b'{"prompt": "x", "response": "a</Thread>"}', "unexpected_tag"),
}


def read(path: pathlib.Path, rejects: Rejects) -> list[LoadedTrajectory]:
    return list(read_trajectories(path, SCHEMA, TOKENIZER, rejects))


@pytest.fixture
def rejects(tmp_path: pathlib.Path) -> Rejects:
    return Rejects(tmp_path / "rejects.jsonl")


def test_what_was_written_is_read(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    records = [
        TrajectoryRecord(PROBLEM.prompt, PROBLEM.parallel, PROBLEM.answer, "a"),
        TrajectoryRecord(PROBLEM.prompt, PROBLEM.sequential),
        TrajectoryRecord("1 <Parallel>", "no tags", id="é\u2028"),
    ]
    path = tmp_path / "new folder" / "data.jsonl"
    assert write_trajectories(path, records) == 3
    loaded = read(path, rejects)
    assert [item.record for item in loaded] == records
    assert [item.line for item in loaded] == [1, 2, 3]
    assert [len(item.trajectory.blocks) for item in loaded] == [1, 0, 0]
    first = loaded[0].trajectory
    assert TOKENIZER.decode(first.tokens[: first.prompt_len]) == f"<bos>{PROBLEM.prompt}"
    assert TOKENIZER.decode(first.tokens[first.prompt_len :]) == f"{PROBLEM.parallel}<eos>"
    assert not rejects.path.exists() and rejects.summary() == "0 rejected"


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_rejected_and_its_neighbours_survive(
    name: str, tmp_path: pathlib.Path, rejects: Rejects
) -> None:
    line, kind = BAD_LINES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    assert [item.line for item in read(path, rejects)] == [1, 4]
    assert rejects.counts == {kind: 1}
    (entry,) = [json.loads(text) for text in rejects.path.read_text().splitlines()]
    assert (entry["file"], entry["line"], entry["kind"]) == (str(path), 3, kind)
    assert entry["message"]
    assert entry["field"] is None or entry["field"] in entry["message"]
    assert rejects.summary() == f"1 rejected (1 {kind}), listed in {rejects.path}"


def test_all_kinds_together(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    lines = [line for line, _ in BAD_LINES.values()]
    path.write_bytes(b"\r\n".join([*lines, GOOD.encode(), *lines]))
    assert len(read(path, rejects)) == 1
    assert rejects.total == 2 * len(lines)
    assert set(rejects.counts) == {kind for _, kind in BAD_LINES.values()}
    assert len(rejects.path.read_text().splitlines()) == 2 * len(lines)


def test_parse_errors_quote_the_place(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    broken = {"prompt": "question", "response": "first</Thread> then <Parallel>"}
    path.write_text(f"{json.dumps(broken)}\n{GOOD}\n")
    read(path, rejects)
    message = json.loads(rejects.path.read_text())["message"]
    assert "near 'first</Thread> then " in message and "(errors in the line besides: 1)" in message
    assert "question" not in message  # what surrounds the place ends at the prompt


def test_a_byte_order_mark_and_extra_fields_are_fine(
    tmp_path: pathlib.Path, rejects: Rejects
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "x", "response": "y", "score": NaN}\n')
    (item,) = read(path, rejects)
    assert item.record == TrajectoryRecord("x", "y")


def test_no_good_line_is_a_user_error(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("hello\n[]\n{}\n{}\n")
    with pytest.raises(UserError) as caught:
        read(path, rejects)
    message = str(caught.value)
    assert str(path) in message and str(rejects.path) in message
    assert "4 rejected (2 missing_field, 1 malformed_json, 1 not_an_object)" in message
    assert "line 1: malformed_json" in message and "line 3: missing_field" in message
    assert "line 4" not in message  # only the first three are shown
    path.write_text("\n\n")
    with pytest.raises(UserError, match="holds no trajectory; expected one JSON object per line"):
        read(path, Rejects(tmp_path / "other.jsonl"))


def test_files_may_share_a_record_of_rejects(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(f"hello\n{GOOD}\n")
    second.write_text("[]\n")
    read(first, rejects)
    with pytest.raises(NoGoodTrajectory, match="second.jsonl .*1 rejected .1 not_an_object."):
        read(second, rejects)
    assert rejects.total == 2 and len(rejects.path.read_text().splitlines()) == 2


def test_rejects_take_no_other_files_place(tmp_path: pathlib.Path) -> None:
    data, notes, old = (tmp_path / name for name in ("data.jsonl", "notes.txt", "old.jsonl"))
    data.write_text(GOOD)
    notes.write_text("precious\n")
    Rejects(old).add("x", 1, "kind", "message")
    with pytest.raises(UserError, match=r"rejects=.*data.jsonl is what is read as well"):
        Rejects(data, sources=[str(tmp_path / "." / "data.jsonl")])
    for other in (data, notes):
        with pytest.raises(UserError, match="is there already and lists no rejects"):
            Rejects(other)
    assert data.read_text() == GOOD and notes.read_text() == "precious\n"
    Rejects(old)
    assert not old.exists()
    nowhere = Rejects(None)
    nowhere.add("x", 1, "kind", "message")
    assert nowhere.summary() == "1 rejected (1 kind)" and len(list(tmp_path.iterdir())) == 2


def test_numbers_are_answers_too(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "1", "response": "2", "answer": a} for a in (5, 0.5, "6", None, True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [item.record.answer for item in read(path, rejects)] == ["5", "0.5", "6", None]
    assert rejects.counts == {"wrong_type": 1}
    assert "found true or false" in rejects.first_of(path)[0]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.gz", "data.array_record"])
def test_names_of_other_formats_are_not_written(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="written as JSON lines; name the file .jsonl"):
        write_trajectories(tmp_path / name, [])


def test_strict_reading_names_the_first_place(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    loose = json.loads(GOOD) | {"response": PROBLEM.parallel.replace("<Thread>\n", "<Thread>")}
    path.write_text(f"{json.dumps(loose)}\n{GOOD}\n")
    assert [item.line for item in read(path, rejects)] == [1, 2]
    strict = list(read_trajectories(path, SCHEMA, TOKENIZER, rejects, strict=True))
    assert [item.line for item in strict] == [2]
    assert rejects.counts == {"white_space": 1}
    assert "of the response, near" in rejects.first_of(path)[0]


def test_files_that_cannot_be_read_or_written(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    with pytest.raises(UserError, match="cannot read .*missing.jsonl: No such file"):
        read(tmp_path / "missing.jsonl", rejects)
    with pytest.raises(UserError, match="is a folder that `datasets` did not write"):
        read(tmp_path, rejects)
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(UserError, match="cannot write .*choose another path"):
        write_trajectories(blocker / "data.jsonl", [])
    with pytest.raises(UserError, match="cannot write .*choose another path"):
        write_trajectories(tmp_path, [])
    with pytest.raises(UserError, match="cannot write the rejects file"):
        Rejects(tmp_path / "no folder" / "rejects.jsonl").add("data", 1, "kind", "message")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_rejects_of_an_earlier_run_are_replaced(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rejects.jsonl"
    Rejects(path).add("data", 1, "kind", "message")
    assert path.exists()
    Rejects(path)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)

    def items() -> Any:
        yield TrajectoryRecord("x", "y")
        raise RuntimeError("the generator failed")

    with pytest.raises(RuntimeError, match="the generator failed"):
        write_trajectories(path, items())
    assert path.read_text() == GOOD
    assert list(tmp_path.iterdir()) == [path]


def test_export_task(tmp_path: pathlib.Path, rejects: Rejects) -> None:
    path = tmp_path / "data.jsonl"
    assert export_task(TASK, "heldout", 60, 3, 0.5, path) == 60
    loaded = read(path, rejects)
    assert len(loaded) == 60 and rejects.total == 0
    styles = [bool(item.trajectory.blocks) for item in loaded]
    assert 15 < sum(styles) < 45
    for index, item in enumerate(loaded):
        problem = TASK.problem("heldout", index, 3)
        style = "parallel" if styles[index] else "sequential"
        assert item.record == TrajectoryRecord(
            problem.prompt,
            problem.response(style),
            problem.answer,
            f"sum_of_products/heldout/3/{index}/{style}",
        )
    content = path.read_bytes()
    export_task(TASK, "heldout", 60, 3, 0.5, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(("parallel_share", "blocks"), [(0.0, 0), (1.0, 1)])
def test_export_of_one_style(
    parallel_share: float, blocks: int, tmp_path: pathlib.Path, rejects: Rejects
) -> None:
    path = tmp_path / "data.jsonl"
    export_task(TASK, "train", 20, 0, parallel_share, path)
    assert {len(item.trajectory.blocks) for item in read(path, rejects)} == {blocks}


def test_parallel_share_is_checked(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="parallel_share"):
        export_task(TASK, "train", 1, 0, 50, tmp_path / "data.jsonl")


def test_the_verb_writes_the_same_file(tmp_path: pathlib.Path, capsys: Any) -> None:
    path, same = tmp_path / "data.jsonl", tmp_path / "same.jsonl"
    words = ["task=sum_of_products", "count=30", "seed=2", "parallel_share=0.3", f"output={path}"]
    assert cli.main(["data", "task", *words]) == 0
    assert "30 trajectories of sum_of_products" in capsys.readouterr().out
    assert export_task(TASK, "train", 30, 2, 0.3, same) == 30
    assert path.read_bytes() == same.read_bytes()
    assert cli.main(["data", "task", "parallel_share=3"]) == 2
    assert "parallel_share" in capsys.readouterr().err


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
            st.just(GOOD.encode()),
            st.dictionaries(
                st.sampled_from(["prompt", "response", "answer", "id"]),
                st.one_of(st.text(max_size=5), st.integers(), st.none(), st.just("<Thread>")),
            ).map(lambda fields: json.dumps(fields).encode()),
        ),
        max_size=6,
    )
)
def test_no_content_breaks_the_reader(tmp_path: pathlib.Path, lines: list[bytes]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), *lines]))
    rejects = Rejects(tmp_path / "rejects.jsonl")
    loaded = read(path, rejects)
    assert len(loaded) + rejects.total == 1 + sum(bool(line.strip()) for line in lines)
