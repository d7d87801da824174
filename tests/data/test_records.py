"""Every kind of source gives the same records in the same order."""

import gzip
import json
import pathlib
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from tw_jax.data.records import (
    Record,
    RejectedRecord,
    UniqueIds,
    answer_field,
    id_field,
    read_records,
    required_answer,
    required_text,
    text_field,
)
from tw_jax.data.rejects import Rejects
from tw_jax.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}+1=", "response": f"{i + 1}é\u2028", "id": i, "turns": [{"role": "user"}]}
    for i in range(600)
]


def _json_lines(folder: pathlib.Path) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


def _compressed(folder: pathlib.Path) -> str:
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress(pathlib.Path(_json_lines(folder)).read_bytes()))
    return str(path)


def _parquet(folder: pathlib.Path) -> str:
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    return str(path)


def _array_record(folder: pathlib.Path) -> str:
    path = str(folder / "data.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    return path


def _saved_dataset(folder: pathlib.Path) -> str:
    path = str(folder / "saved")
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize("write", [_json_lines, _compressed, _parquet, _array_record])
def test_records_of_files(write: Any, tmp_path: pathlib.Path) -> None:
    source, rejects = write(tmp_path), Rejects(tmp_path / "rejects.jsonl")
    records = list(read_records(source, rejects))
    assert [dict(record.fields) for record in records] == ROWS
    assert [record.line for record in records] == list(range(1, 601))
    assert {record.file for record in records} == {source} and not rejects.total


def test_records_of_a_saved_dataset(tmp_path: pathlib.Path) -> None:
    source, rejects = _saved_dataset(tmp_path), Rejects(tmp_path / "rejects.jsonl")
    assert [dict(record.fields) for record in read_records(source, rejects)] == ROWS
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:3])})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="holds the splits train"):
        list(read_records(str(tmp_path / "splits"), rejects))
    source = str(tmp_path / "splits" / "train")
    assert [dict(record.fields) for record in read_records(source, rejects)] == ROWS[:3]


def test_what_is_no_record_is_set_aside(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "data.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for item in (b'{"a": 1}', b"[]", b"\xff", b'{"a": 2}'):
        writer.write(item)
    writer.close()
    rejects = Rejects(tmp_path / "rejects.jsonl")
    assert [record.line for record in read_records(path, rejects)] == [1, 4]
    entries = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert [(e["line"], e["kind"]) for e in entries] == [(2, "not_an_object"), (3, "invalid_utf8")]


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.array_record", "x.jsonl.gz"])
def test_sources_that_cannot_be_read(name: str, tmp_path: pathlib.Path) -> None:
    path, rejects = tmp_path / name, Rejects(tmp_path / "rejects.jsonl")
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        list(read_records(str(path), rejects))
    if name != "data.jsonl":
        path.write_bytes(b"neither compressed nor columns")
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            list(read_records(str(path), rejects))
    with pytest.raises(UserError, match="cannot read nowhere://x/data.jsonl"):
        list(read_records("nowhere://x/data.jsonl", rejects))


def test_a_dataset_that_is_not_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be loaded.*expected hf://ORG/NAME"):
        list(read_records("hf://nobody/nothing:test", Rejects(tmp_path / "rejects.jsonl")))


def test_text_fields() -> None:
    record = Record("x", 1, {"a": "text", "b": None, "c": 3, "d": " ", "e": "\ud800", "f": "1\0"})
    assert required_text(record, "a") == text_field(record, "a") == "text"
    assert text_field(record, "b") is None and text_field(record, "z") is None
    assert text_field(record, "d", empty_ok=True) == " "
    kinds = {"b": "wrong_type", "c": "wrong_type", "d": "empty_field", "e": "invalid_unicode"}
    for name, kind in (kinds | {"f": "nul_byte", "z": "missing_field"}).items():
        with pytest.raises(RejectedRecord) as caught:
            required_text(record, name)
        assert (caught.value.kind, caught.value.field) == (kind, name)
        assert repr(name) in caught.value.message


def test_fields_inside_of_objects_numbers_and_ids() -> None:
    fields = {"gold": {"answer": 1.5, "deep": {"id": 3}}, "a.b": "as it stands", "yes": True}
    record = Record("x", 1, fields)
    assert answer_field(record, "gold.answer") == required_answer(record, "gold.answer") == "1.5"
    assert id_field(record, "gold.deep.id") == 3 and id_field(record, "gold.none") is None
    assert text_field(record, "a.b") == "as it stands" and text_field(record, "yes.no") is None
    for read in (answer_field, id_field):
        with pytest.raises(RejectedRecord, match="found true or false"):
            read(record, "yes")
    with pytest.raises(RejectedRecord, match="'gold.other' is missing"):
        required_answer(record, "gold.other")


def test_ids_are_taken_by_good_records_only() -> None:
    ids = UniqueIds()
    ids.require_new(7, "id")
    ids.require_new(7, "id")
    ids.note(7, "a.jsonl:1")
    ids.note(None, "a.jsonl:2")
    for fine in ("7", None, 8):
        ids.require_new(fine, "id")
    with pytest.raises(RejectedRecord, match="the id 7 names a.jsonl:1 too") as caught:
        ids.require_new(7, "key")
    assert (caught.value.kind, caught.value.field) == ("duplicate_id", "key")


def test_a_run_stops_when_too_much_is_bad(tmp_path: pathlib.Path) -> None:
    rejects = Rejects(tmp_path / "rejects.jsonl")
    rejects.require_share(good=0, max_reject_share=0.0)
    for line in range(5):
        rejects.add("data.jsonl", line, "empty_field", "the field 'prompt' is empty", "prompt")
    rejects.require_share(good=5, max_reject_share=0.5)
    with pytest.raises(UserError, match=r"5 of 9 items are bad.*5 empty_field.*listed in"):
        rejects.require_share(good=4, max_reject_share=0.5)
    assert len(rejects.first_of("data.jsonl")) == 3
    assert rejects.first_of("other.jsonl") == ()
