"""`tw-jax data stats`, `validate` and `inspect` on real files, through the command line."""

import json
import pathlib
import re

import pytest

from tw_jax import cli
from tw_jax.data.export_task import export_task
from tw_jax.tasks.registry import TaskConfig, make_task

TASK = make_task(TaskConfig())
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Two files: sequential and parallel solutions, and parallel ones with bad lines behind."""
    monkeypatch.chdir(tmp_path)
    export_task(TASK, "train", 20, 0, 0.5, "mixed.jsonl")
    export_task(TASK, "heldout", 10, 0, 1.0, "parallel.jsonl")
    loose = json.loads(pathlib.Path("parallel.jsonl").read_text().splitlines()[0])
    loose |= {"id": "loose", "response": loose["response"].replace("<Thread>\n", "<Thread> \n", 1)}
    with open("parallel.jsonl", "a") as out:
        out.write(json.dumps(loose) + "\n")
        out.write(json.dumps({"prompt": "1*1=", "response": f"{HOSTILE}</Thread>"}) + "\n")
        out.write('{"prompt": ""}\n')
    return tmp_path


def test_stats_of_files_and_of_all(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inputs=[mixed.jsonl,parallel.jsonl]", "output=out/stats.json", "page=out/stats.html"]
    assert cli.main(["data", "stats", *words]) == 0
    out = capsys.readouterr().out
    assert "threads per block" in out and "mixed.jsonl" in out and "█" in out
    assert "2 rejected" in out
    result = json.loads((folder / "out" / "stats.json").read_text())
    files = result["files"]
    assert [files[name]["trajectories"] for name in ("mixed.jsonl", "parallel.jsonl")] == [20, 11]
    assert result["all"]["trajectories"] == 31
    assert result["rejected"] == {"unexpected_tag": 1, "empty_field": 1}
    assert files["parallel.jsonl"]["format_valid_rate"] == pytest.approx(10 / 11)
    assert (
        files["parallel.jsonl"]["activation_ratio"] == 1 > files["mixed.jsonl"]["activation_ratio"]
    )
    page = (folder / "out" / "stats.html").read_text()
    assert page.count("<article") == 3 and page.count("<svg") >= 6
    assert "unexpected_tag" in page and "<script" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^" ]+)', page)) <= set(ids)


def test_validate_says_where_and_fails(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "validate", "inputs=[mixed.jsonl]"]) == 0
    assert "20 of 20 records are valid" in capsys.readouterr().out
    assert cli.main(["data", "validate", "inputs=[parallel.jsonl]", "rejects=bad.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "10 of 13 records are valid; bad.jsonl lists the others" in out
    entries = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["kind"]) for entry in entries] == [
        (11, "white_space"),
        (12, "unexpected_tag"),
        (13, "empty_field"),
    ]
    assert [entry["field"] for entry in entries] == ["response", "response", "prompt"]
    assert entries[0]["message"].startswith("white space differs")
    assert re.search(r"at token \d+ of the response, near '", entries[0]["message"])
    assert cli.main(["data", "validate", "inputs=[parallel.jsonl]", "shown=0"]) == 1
    assert "at token" not in capsys.readouterr().out


def test_a_file_without_a_valid_record_is_no_mistake_of_the_caller(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.jsonl").write_text("hello\n")
    (folder / "empty.jsonl").write_text("")
    assert cli.main(["data", "validate", "inputs=[bad.jsonl,mixed.jsonl]"]) == 1
    assert "20 of 21 records are valid" in capsys.readouterr().out
    assert cli.main(["data", "validate", "inputs=[empty.jsonl]"]) == 1
    assert "0 of 0 records are valid" in capsys.readouterr().out


def test_nothing_that_is_read_is_overwritten(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "mixed.jsonl").read_bytes()
    for words in (
        ["stats", "output=mixed.jsonl"],
        ["stats", "page=./mixed.jsonl"],
        ["stats", "rejects=mixed.jsonl"],
        ["validate", "rejects=mixed.jsonl"],
    ):
        assert cli.main(["data", *words, "inputs=[mixed.jsonl]"]) == 2
        assert "is what is read as well; choose another path" in capsys.readouterr().err
    assert cli.main(["data", "validate", "inputs=[parallel.jsonl]"]) == 1
    assert cli.main(["data", "inspect", "inputs=[rejects.jsonl]"]) == 0
    assert (folder / "rejects.jsonl").exists()
    assert (folder / "mixed.jsonl").read_bytes() == before


def test_inspect_shows_good_and_bad_records(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "inspect", "inputs=[parallel.jsonl]", "line=10", "count=4"]) == 0
    out = capsys.readouterr().out
    assert "38 tokens" in out and out.count("critical path") == 2
    assert "not strict: white_space" in out
    assert "bad: unexpected_tag" in out and "bad: empty_field (field 'prompt')" in out
    assert cli.main(["data", "inspect", "inputs=[parallel.jsonl]", "line=99"]) == 2
    assert "no record at line 99" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["stats", "validate", "inspect"])
def test_mistakes_are_explained(
    verb: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", verb]) == 2
    assert "inputs: name at least one file" in capsys.readouterr().err
    assert cli.main(["data", verb, "inputs=[missing.jsonl]"]) == 2
    assert "cannot read missing.jsonl" in capsys.readouterr().err
    assert cli.main(["data", verb, "inputs=[mixed.jsonl]", "schema=nothing"]) == 2
    assert "unknown schema 'nothing'" in capsys.readouterr().err
    assert cli.main(["data", verb, "inputs=[mixed.jsonl]", "tokenizer=nowhere"]) == 2
    assert "no usable Hugging Face tokenizer" in capsys.readouterr().err
