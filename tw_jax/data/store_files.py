"""Files of a store, in a local folder or wherever TensorStore reaches, and its zarr arrays."""

import pathlib
from typing import Any

import tensorstore as ts

from tw_jax.errors import UserError

MANIFEST = "manifest.json"

# Name and zarr data type of every array `[rows, row_len]`, and of those `[depth, rows, row_len]`.
ROW_ARRAYS = {
    "tokens": "int32",
    "positions": "int32",
    "parent": "int32",
    "visible_end": "int32",
    "kind": "int8",
}
HIDDEN_ARRAYS = ("hidden_start", "hidden_end")
_BYTES_OF_TYPE = {"int32": 4, "int8": 1}

# What TensorStore raises for anything it cannot do, such as a checksum that is wrong.
StoreError = (ValueError, OSError, RuntimeError)


def array_types(hidden_depth: int) -> dict[str, str]:
    """Zarr data type of every array of a store, by name."""
    return ROW_ARRAYS | (dict.fromkeys(HIDDEN_ARRAYS, "int32") if hidden_depth else {})


def open_files(store: str) -> ts.KvStore:
    """The files of a store as keys.

    Args:
      store: a local path, or a URL of TensorStore such as `gs://bucket/folder`.

    Raises:
      UserError: there is no driver for such a place, or it refuses.
    """
    try:
        return ts.KvStore.open(_place(store)).result()
    except StoreError as error:
        raise UserError(
            f"cannot open the store {store}: {error}; expected a local path or a URL such as "
            "gs://bucket/folder"
        ) from error


def read_file(files: ts.KvStore, key: str) -> bytes | None:
    """Contents of a file; None if there is none."""
    result = files.read(key).result()
    return result.value if result.state == "value" else None


def open_array(
    store: str,
    name: str,
    *,
    create: tuple[int, int, int] | None = None,
    hidden_depth: int = 0,
    context: ts.Context | None = None,
) -> ts.TensorStore:
    """Opens one array, or makes it.

    A file holds `shard_rows` rows, each compressed and checksummed by itself, so that a row is read
    with two small requests. Indices that count up compress well once their bytes are sorted by
    significance, which is what blosc's shuffle does.

    Args:
      store: see `open_files`.
      name: of the array.
      create: (rows, row_len, shard_rows) of a new array; None opens the one that is there.
      hidden_depth: of the store.
      context: cache and concurrency.
    """
    place = _place(store)
    url = (
        f"{place}{name}/" if isinstance(place, str) else place | {"path": f"{place['path']}{name}/"}
    )
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": url, "recheck_cached_data": "open"}
    # A file that is missing is an error, and no zeros; so zeros are written too.
    spec |= {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    if create is None:
        return ts.open(spec, open=True, context=context).result()
    rows, row_len, shard_rows = create
    leading = [hidden_depth] if name in HIDDEN_ARRAYS else []
    data_type = array_types(hidden_depth)[name]
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": 1,
            "shuffle": "shuffle",
            "typesize": _BYTES_OF_TYPE[data_type],
            "blocksize": 0,
        },
    }
    shards = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [*leading, 1, row_len],
            "codecs": [little_endian, blosc, {"name": "crc32c"}],
            "index_codecs": [little_endian, {"name": "crc32c"}],
        },
    }
    spec["metadata"] = {
        "shape": [*leading, rows, row_len],
        "data_type": data_type,
        "dimension_names": [*["depth"] * len(leading), "row", "token"],
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [*leading, shard_rows, row_len]},
        },
        "fill_value": 0,
        "codecs": [shards],
    }
    return ts.open(spec, create=True, delete_existing=True, context=context).result()


def _place(store: str) -> Any:
    """TensorStore's name of a folder; ends with a slash."""
    if "://" in store:
        return store.rstrip("/") + "/"
    return {"driver": "file", "path": f"{pathlib.Path(store).absolute()}/"}
