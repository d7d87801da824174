"""Where published weights lie: a local folder, a model id of the Hugging Face hub, or a URL.

A hub id is downloaded into the hub's own cache and is a local folder from then on. A URL of any
kind that fsspec knows (`gs://`, `s3://`, `memory://`) is read in byte ranges and stored nowhere.
Only safetensors, JSON and tokenizer files are asked for: nothing that could hold code.
"""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from tw_jax.errors import UserError

# What is read besides the weights: settings, tokenizer, chat template, licence.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INSTALL = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "abfs": "adlfs", "az": "adlfs"}


class WeightFolder(Protocol):
    """Files of published weights, wherever they lie."""

    @property
    def name(self) -> str:
        """The folder as messages name it."""
        ...

    def files(self) -> frozenset[str]:
        """Names of the files in it."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, file: str, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        """The bytes `start .. stop` of a file, read-only."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine; its files are mapped into memory, not copied."""

    path: pathlib.Path

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.path)

    def files(self) -> frozenset[str]:
        """Names of the files in it."""
        return frozenset(path.name for path in self.path.iterdir() if path.is_file())

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return (self.path / file).stat().st_size

    def read(self, file: str, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        """A view of the page cache: nothing is read before it is touched."""
        if start == stop:
            return np.empty(0, np.uint8)
        view = np.memmap(self.path / file, np.uint8, mode="r", offset=start, shape=(stop - start,))
        return np.asarray(view)


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL, read in byte ranges."""

    name: str
    filesystem: Any
    root: str

    def files(self) -> frozenset[str]:
        """Names of the files in it."""
        listing = self.filesystem.ls(self.root, detail=True)
        found = (entry["name"] for entry in listing if entry["type"] == "file")
        return frozenset(name.rstrip("/").rpartition("/")[2] for name in found)

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self.filesystem.size(f"{self.root}/{file}")

    def read(self, file: str, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        """One byte-range request.

        Raises:
          UserError: it failed or came back short.
        """
        try:
            data = self.filesystem.cat_file(f"{self.root}/{file}", start=start, end=stop)
        except OSError as error:
            raise UserError(f"{self.name}/{file}: cannot be read ({error}); try again") from error
        if len(data) != stop - start:
            raise UserError(
                f"{self.name}/{file}: asked for the bytes {start}..{stop} and got {len(data)}: "
                "the file changed or the connection broke; try again"
            )
        return np.frombuffer(data, np.uint8)


def open_folder(location: str) -> WeightFolder:
    """Finds published weights.

    Args:
      location: a local folder, a hub id such as `Qwen/Qwen3-8B`, or a URL that fsspec knows.

    Raises:
      UserError: there is nothing there, or it cannot be reached.
    """
    if "://" in location:
        return _open_url(location.rstrip("/"))
    path = pathlib.Path(location).expanduser()
    if path.is_dir():
        return LocalFolder(path)
    if path.exists():
        raise UserError(f"{location}: is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(location):
        raise UserError(
            f"{location}: no such folder; give a folder with safetensors weights, a hub id such "
            "as Qwen/Qwen3-8B, or a URL such as gs://bucket/folder"
        )
    return LocalFolder(_download(location))


@contextlib.contextmanager
def small_files(folder: WeightFolder) -> Iterator[pathlib.Path]:
    """Settings and tokenizer of a folder as local files; copies are gone at the end of the block.

    Raises:
      UserError: they cannot be read.
    """
    if isinstance(folder, LocalFolder):
        yield folder.path
        return
    with tempfile.TemporaryDirectory(prefix="tw_jax_") as temporary:
        for file in sorted(folder.files() & set(SMALL_FILES)):
            (pathlib.Path(temporary) / file).write_bytes(
                folder.read(file, 0, folder.size(file)).tobytes()
            )
        yield pathlib.Path(temporary)


def _open_url(url: str) -> RemoteFolder:
    import fsspec  # only URLs need it

    scheme = url.partition("://")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        is_folder = filesystem.isdir(root)
    except ImportError as error:
        package = _INSTALL.get(scheme, "the fsspec package for it")
        extra = ', or `pip install "tw-jax[gcs]"`' if package == "gcsfs" else ""
        raise UserError(
            f"{url}: {scheme}:// needs {package}: `pip install {package}`{extra}"
        ) from error
    except ValueError as error:
        raise UserError(f"{url}: fsspec knows no {scheme}:// addresses ({error})") from error
    except OSError as error:
        raise UserError(f"{url}: cannot be reached ({error}); check address and access") from error
    if not is_folder:
        raise UserError(f"{url}: no such folder, or no permission to list it")
    return RemoteFolder(url, filesystem, root)


def _download(hub_id: str) -> pathlib.Path:
    import huggingface_hub  # takes a while; only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*SMALL_FILES, *WEIGHT_FILES]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{hub_id}: no such folder here, and not to be had from the Hugging Face hub: {reason} "
            "Check the name, the network and, for gated models, `hf auth login`"
        ) from error
