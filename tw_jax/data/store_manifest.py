"""The manifest of a store: what it holds, what made it, and the hash of every file.

It is written last. A folder without one is a store that is still being packed, or was killed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.vocabulary import ids_needed

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that must agree between a store and the run that reads it, and its figures.

    Attributes:
      format_version: of the layout of files.
      rows: packed rows.
      row_len: tokens per row.
      shard_rows: rows per file.
      hidden_depth: depth of the hidden intervals; 0 where the schema hides nothing.
      schema: the language of the trajectories.
      tokenizer: as it was named to the packer.
      tokenizer_sha256: see `tokenizer_sha256`.
      vocab_size: ids that an embedding must have.
      inputs: every source with the hash of its files, null where it has none (datasets of a hub).
      settings: of the packer, as far as they decide what is in the store.
      counts: trajectories, pieces, tokens and what became of over-long trajectories.
      rejects: number of bad records by kind.
      efficiency: share of the rows' places that hold a token of a trie.
      statistics: means over the trajectories.
      sha256: hash of every file of the arrays, by its path in the store.
    """

    format_version: int
    rows: int
    row_len: int
    shard_rows: int
    hidden_depth: int
    schema: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    inputs: list[dict[str, Any]]
    settings: dict[str, Any]
    counts: dict[str, int]
    rejects: dict[str, int]
    efficiency: float
    statistics: dict[str, float]
    sha256: dict[str, str]

    def to_json(self) -> bytes:
        """The manifest's bytes; the same for the same store."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @property
    def sha256_of_all(self) -> str:
        """Names the store's contents and its making."""
        return hashlib.sha256(self.to_json()).hexdigest()


def manifest_from_json(data: bytes, store: str) -> Manifest:
    """Reads a manifest.

    Raises:
      UserError: it is none, or of another format.
    """
    try:
        fields: Any = json.loads(data)
        version = fields.get("format_version")
        if version == FORMAT_VERSION:
            return Manifest(**fields)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{store}/manifest.json is no manifest of a store ({error}); delete the store and pack "
            "it again"
        ) from error
    raise UserError(
        f"{store} is a store of format {version}, this version reads format {FORMAT_VERSION}; "
        "pack it again with `tw-jax data pack`"
    )


def check_manifest(
    manifest: Manifest, store: str, tokenizer: Any, schema: Schema, row_len: int
) -> None:
    """Refuses a store that was packed for another tokenizer, schema or row length.

    Raises:
      UserError: it was; the message names both sides and the remedy.
    """
    again = "or pack the store again with `tw-jax data pack`"
    if manifest.schema != schema.name:
        raise UserError(
            f"{store} holds trajectories of the schema {manifest.schema!r}, the run has "
            f"{schema.name!r}: set model.schema={manifest.schema}, {again}"
        )
    if manifest.row_len != row_len:
        raise UserError(
            f"{store} has rows of {manifest.row_len} tokens, the run has data.row_len={row_len}: "
            f"set data.row_len={manifest.row_len}, {again}"
        )
    if manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise UserError(
            f"{store} was packed with another tokenizer ({manifest.tokenizer!r}, "
            f"{manifest.vocab_size} ids; the run's has {ids_needed(tokenizer)}): its token ids "
            f"mean other text. Set model.tokenizer to that one, {again}"
        )


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and added tokens: of what its ids mean."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    said = json.dumps([sorted(vocabulary.items()), sorted(added.items())])
    return hashlib.sha256(said.encode()).hexdigest()
