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

from tw_jax.data.rejects import Rejects
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
    for line, item in _items(source):
        if isinstance(item, Mapping):
            yield Record(source, line, item)
            continue
        try:
            fields = _json_object(item)
        except RejectedRecord as rejected:
            rejects.add(source, line, rejected.kind, rejected.message)
        else:
            yield Record(source, line, fields)


def required_text(record: Record, name: str) -> str:
    """The text in a field that must be there and hold some.

    Raises:
      RejectedRecord: `missing_field`, and those of `text_field`.
    """
    if name not in record.fields:
        raise RejectedRecord("missing_field", f"the field {name!r} is missing", name)
    if record.fields[name] is None:
        raise RejectedRecord("wrong_type", f"the field {name!r} must be text, found null", name)
    text = text_field(record, name)
    assert text is not None
    return text


def text_field(record: Record, name: str, *, empty_ok: bool = False) -> str | None:
    """The text in a field, None where it is missing or null.

    Args:
      record: where it is.
      name: of the field.
      empty_ok: the text may be empty.

    Raises:
      RejectedRecord: `wrong_type`, `empty_field`, `invalid_unicode`, `nul_byte`.
    """
    value = record.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        found = json_type(value)
        raise RejectedRecord("wrong_type", f"the field {name!r} must be text, found {found}", name)
    check_text(value, name)
    if not empty_ok and not value.strip():
        raise RejectedRecord("empty_field", f"the field {name!r} is empty", name)
    return value


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
