"""Records of any source: JSON lines, Parquet, ArrayRecord, Hugging Face datasets.

A source is named by one word:

    data.jsonl, data.jsonl.gz     one JSON object per line
    data.parquet                  a row is a record
    data.array_record             every record holds one JSON object
    FOLDER                        written by `datasets.Dataset.save_to_disk`
    hf://ORG/NAME[:SPLIT]         a dataset of the hub; SPLIT is `train` where it is not given

Files may lie anywhere that fsspec reaches (`gs://bucket/data.jsonl`, and single files of the hub as
`hf://datasets/ORG/NAME/path/train.parquet`). The order of records is that of the source.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import fsspec
import fsspec.core

from tw_jax.data.rejects import Reject, Rejects
from tw_jax.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 256
OTHER_FORMATS = (".gz", ".bz2", ".xz", ".zip", ".zst", ".parquet", ".array_record", ".arrayrecord")
_SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a source.

    Attributes:
      file: the source, as it was named.
      line: the record's number in it, from 1; in a file of lines, the line.
      fields: name -> value.
    """

    file: str
    line: int
    fields: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """What a field holds, None where it is missing; `a.b` is field b of the object in a."""
        return _value(self.fields, name)


class RejectedRecord(Exception):
    """A record that cannot be used; whoever reads records catches it and goes on.

    Attributes:
      kind: stable identifier of what is wrong.
      message: what was found, what was expected.
      field: where in the record; None if not one field is to blame.
    """

    def __init__(self, kind: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.field = kind, message, field


def read_records(source: str, rejects: Rejects) -> Iterator[Record]:
    """Yields the records of a source in order; what is no record goes to `rejects`.

    Kinds of rejects: `invalid_utf8`, `malformed_json`, `not_an_object`. Blank lines are skipped.

    Args:
      source: see the top of the file.
      rejects: collects what is no record.

    Raises:
      UserError: there is no such source, or it cannot be read.
    """
    for item in records_and_rejects(source):
        if isinstance(item, Record):
            yield item
        else:
            rejects.add(item.file, item.line, item.kind, item.message)


def records_and_rejects(source: str) -> Iterator[Record | Reject]:
    """`read_records` with what is no record in its place among the others."""
    for line, item in _items(source):
        try:
            fields = item if isinstance(item, Mapping) else _json_object(item)
        except RejectedRecord as rejected:
            yield Reject(source, line, rejected.kind, rejected.message)
        else:
            yield Record(source, line, fields)


def required_text(record: Record, name: str) -> str:
    """The text in a field that must be there and hold some.

    Raises:
      RejectedRecord: `missing_field`, and those of `text_field`.
    """
    text = text_field(record, name)
    if text is not None:
        return text
    if name in record.fields:
        raise RejectedRecord("wrong_type", f"the field {name!r} must be text, found null", name)
    raise RejectedRecord("missing_field", f"the field {name!r} is missing", name)


def text_field(record: Record, name: str, *, empty_ok: bool = False) -> str | None:
    """The text in a field, None where it is missing or null.

    Args:
      record: where it is.
      name: of the field.
      empty_ok: the text may be empty.

    Raises:
      RejectedRecord: `wrong_type`, `empty_field`, `invalid_unicode`, `nul_byte`.
    """
    value = record.value(name)
    if value is None:
        return None
    if not isinstance(value, str):
        found = json_type(value)
        raise RejectedRecord("wrong_type", f"the field {name!r} must be text, found {found}", name)
    check_text(value, name)
    if not empty_ok and not value.strip():
        raise RejectedRecord("empty_field", f"the field {name!r} is empty", name)
    return value


def answer_field(record: Record, name: str) -> str | None:
    """A reference answer, None where it is missing or null.

    Many sets hold numbers as such, and what a verifier needs as an object, which becomes JSON.

    Raises:
      RejectedRecord: those of `text_field`.
    """
    value = record.value(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        return json.dumps(value)
    return text_field(record, name, empty_ok=True)


def required_answer(record: Record, name: str) -> str:
    """A reference answer that must be there.

    Raises:
      RejectedRecord: `missing_field`, and those of `text_field`.
    """
    answer = answer_field(record, name)
    return answer if answer and answer.strip() else required_text(record, name)


def id_field(record: Record, name: str) -> str | int | None:
    """What names a record: text or a whole number; None where it is missing or null.

    Raises:
      RejectedRecord: those of `text_field`.
    """
    value = record.value(name)
    return value if type(value) is int else text_field(record, name)  # true is no number here


class UniqueIds:
    """Notes ids and where they were met first."""

    def __init__(self) -> None:
        self._places: dict[str | int, str] = {}

    def require_new(self, identity: str | int | None, field: str) -> None:
        """Checks that an id was not noted; None passes.

        Raises:
          RejectedRecord: `duplicate_id`.
        """
        if identity is not None and identity in self._places:
            message = f"the id {identity!r} names {self._places[identity]} too; ids must differ"
            raise RejectedRecord("duplicate_id", message, field)

    def note(self, identity: str | int | None, place: str) -> None:
        """Takes an id; only good records take theirs."""
        if identity is not None:
            self._places[identity] = place


def json_type(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    kinds |= {type(None): "null", list: "an array", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def check_text(value: str, field: str) -> None:
    """Rejects text that no tokenizer should see.

    Raises:
      RejectedRecord: `invalid_unicode` or `nul_byte`.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's \u escapes can spell half a character
        raise RejectedRecord(
            "invalid_unicode",
            f"the field {field!r} holds a lone surrogate at character {error.start}",
            field,
        ) from None
    if (place := value.find("\0")) >= 0:
        raise RejectedRecord(
            "nul_byte", f"the field {field!r} holds a NUL byte at character {place}", field
        )


def _value(fields: Mapping[str, Any], name: str) -> Any:
    if name in fields:
        return fields[name]
    outer, dot, inner = name.partition(".")
    below = fields.get(outer)
    return _value(below, inner) if dot and isinstance(below, Mapping) else None


def _items(source: str) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
    """Numbers and contents of a source's records; JSON is not decoded yet."""
    name = source.lower()
    if name.endswith(".parquet"):
        return _parquet_rows(source)
    if name.endswith((".array_record", ".arrayrecord")):
        return _array_records(source)
    if name.startswith("hf://") and not name.startswith("hf://datasets/"):
        return _hub_rows(source)
    folder = pathlib.Path(source)
    if folder.is_dir():
        if any((folder / file).exists() for file in _SAVED_DATASET):
            return _saved_rows(source)
        raise UserError(
            f"{source} is a folder that `datasets` did not write; name its files instead"
        )
    return _lines(source)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        fields: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RejectedRecord(
            "invalid_utf8", f"byte {error.start} of the line is not UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:  # RecursionError: absurdly deep nesting
        raise RejectedRecord("malformed_json", _what_is_malformed(error)) from None
    if not isinstance(fields, dict):
        raise RejectedRecord(
            "not_an_object", f"expected a JSON object on the line, found {json_type(fields)}"
        )
    return fields


def _what_is_malformed(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos} of the line"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number has too many digits"  # Python's limit; nothing else is left


def _lines(source: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank with their numbers, from 1."""
    with _reading(source), _opened(source) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, line


def _parquet_rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    arrow, parquet = _package("pyarrow", source), _package("pyarrow.parquet", source)
    number = 0
    with _reading(source, arrow.ArrowException), _opened(source) as file:
        for batch in parquet.ParquetFile(file).iter_batches(_PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _array_records(source: str) -> Iterator[tuple[int, bytes]]:
    module = _package("array_record.python.array_record_module", source)
    with _reading(source, RuntimeError, ValueError):
        if not pathlib.Path(source).exists():
            raise FileNotFoundError(2, "No such file or directory")
        reader = module.ArrayRecordReader(source)
        try:
            for index in range(reader.num_records()):
                yield index + 1, reader.read([index])[0]
        finally:
            reader.close()


def _hub_rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    datasets = _package("datasets", source)
    name, _, split = source.removeprefix("hf://").partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source}: the dataset cannot be loaded: {error}; expected hf://ORG/NAME[:SPLIT]"
        ) from error
    yield from enumerate(rows, start=1)


def _saved_rows(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    datasets = _package("datasets", source)
    with _reading(source, ValueError, datasets.exceptions.DatasetsError):
        rows = datasets.load_from_disk(source)
    if isinstance(rows, Mapping):
        raise UserError(
            f"{source} holds the splits {', '.join(sorted(rows))}; name one of its folders"
        )
    yield from enumerate(rows, start=1)


def _opened(source: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    try:
        opened = fsspec.open(source, "rb", compression="infer")
    except ValueError as error:  # an unknown protocol
        raise UserError(f"cannot read {source}: {error}; check the path") from error
    assert isinstance(opened, fsspec.core.OpenFile)
    return opened


@contextlib.contextmanager
def _reading(source: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns what goes wrong while reading into a message."""
    try:
        yield
    except (OSError, EOFError, ImportError, *errors) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read {source}: {reason}; check the path and the file") from error


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{source}: reading it needs the package {name.partition('.')[0]!r}: "
            "pip install 'tw-jax[data]'"
        ) from error
