"""`tw-jax data pack`: sources of trajectories -> a store of packed rows.

1. Records are encoded, parsed and made to fit a row (`encoded_records`, `over_long`); bad ones are
   counted and listed.
2. A window of trajectories is packed best-fit. Whole shards of the fullest rows are written; the
   tries of the emptiest rows wait for the next window, which fills them further.
3. The manifest is written last. Killed at any moment, the same command goes on from the last
   window and ends with the same bytes (`store_writer`).
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import fsspec
import fsspec.core

from tw_jax.config_checks import require_at_least, require_share
from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.encoded_records import (
    TOO_LONG,
    Encoder,
    Outcome,
    bound_tokenizer,
    encoded_records,
)
from tw_jax.data.only_process import only_process
from tw_jax.data.over_long import Piece, TooLong, fit, too_long_message
from tw_jax.data.pack_counts import (
    OVER_LONG_COUNTS,
    count_fitted,
    count_piece,
    piece_statistics,
    summary,
)
from tw_jax.data.packing import rows_to_write
from tw_jax.data.progress import shown_progress
from tw_jax.data.rejects import Reject, Rejects
from tw_jax.data.store_manifest import FORMAT_VERSION, Manifest, tokenizer_sha256
from tw_jax.data.store_writer import PackState, Pending, StoreWriter
from tw_jax.data.tokenizer import SHIPPED
from tw_jax.errors import UserError
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory
from tw_jax.trajectory.vocabulary import ids_needed

_CHECK_RECORDS = 1000  # after so many records, their share of bad ones is telling
_READ_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """What is packed, and how.

    Attributes:
      inputs: files, folders or `hf://ORG/NAME[:SPLIT]`: JSON lines, Parquet, ArrayRecord or Hugging
        Face datasets.
      output: folder of the store: a local path, or a URL such as gs://bucket/folder. The same
        command goes on with a store that was begun.
      tokenizer: folder or hub id; null takes the shipped character tokenizer. Control tags that it
        lacks are added, as an import of the model does.
      schema: the language of the responses: threadweaver, native or apr.
      columns: names of the fields.
      strict: reject what parses but is not canonical in white space or numbering, or has empty
        plans or threads.
      row_len: tokens per packed row; training needs the same data.row_len.
      too_long: what happens to a trajectory whose trie is longer than a row: `cut` behind the last
        whole block or line that fits, `split` into several behind the same prompt, or `skip`.
      window: trajectories that are packed together; more pack tighter and take more memory.
      shard_rows: rows per file.
      workers: processes that tokenise.
      rejects: JSONL file for what cannot be used.
      max_reject_share: packing stops when more of the records cannot be used.
    """

    inputs: tuple[str, ...] = ()
    output: str = "store"
    tokenizer: str | None = None
    schema: str = "threadweaver"
    columns: ColumnsConfig = ColumnsConfig()
    strict: bool = True
    row_len: int = 8192
    too_long: TooLong = "skip"
    window: int = 512
    shard_rows: int = 64
    workers: int = 1
    rejects: str = "rejects.jsonl"
    max_reject_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: name at least one file, e.g. inputs=[data.jsonl]")
        require_at_least(self, row_len=1, window=1, shard_rows=1, workers=1)
        require_share(self, "max_reject_share")


def run_pack(config: PackConfig) -> Manifest:
    """Packs a store, or goes on with it; one that is finished is verified.

    Raises:
      UserError: an input cannot be read, holds nothing good or too much that is bad, or the output
        cannot be written or holds something else.
    """
    began = time.monotonic()
    tokenizer, schema = bound_tokenizer(config.tokenizer, config.schema)
    writer = StoreWriter(config.output, config.row_len, config.shard_rows)
    inputs = [_describe_input(source) for source in config.inputs]
    settings = {
        "columns": dataclasses.asdict(config.columns),
        "inputs": [{"source": item["source"], "sha256": item["sha256"]} for item in inputs],
        "row_len": config.row_len,
        "schema": config.schema,
        "shard_rows": config.shard_rows,
        "strict": config.strict,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "too_long": config.too_long,
        "window": config.window,
    }
    alone = contextlib.nullcontext()
    if "://" not in config.output:
        alone = only_process(config.output, setting="output", work="packing this store")
    with alone:
        manifest = writer.finished()
        if manifest is not None:
            _check_finished(config.output, manifest, settings)
            writer.verify(manifest)
            print(f"{config.output} is finished already; every file is what its manifest says")
            print(summary(manifest))
            return manifest
        rejects = Rejects(config.rejects, sources=config.inputs)
        packing = _Packing(config, schema, writer, rejects, writer.begin(settings))
        packing.run(inputs)
        manifest = packing.manifest(inputs, settings, tokenizer)
        writer.finish(manifest)
    print(summary(manifest))
    if rejects.total:
        print(rejects.summary())
    print(f"{config.output}: packed in {time.monotonic() - began:.1f} s")
    return manifest


class _Packing:
    """The run of one packer, from the state that a journal gave it."""

    def __init__(
        self,
        config: PackConfig,
        schema: Schema,
        writer: StoreWriter,
        rejects: Rejects,
        state: PackState,
    ) -> None:
        self._config, self._schema, self._writer = config, schema, writer
        self._rejects, self._state = rejects, state
        for entry in state.rejects:
            rejects.add(**entry)
        self._counts = state.counts.copy()
        self._waiting = [_piece(item, schema) for item in state.pending]
        self._fresh_rejects: list[dict[str, Any]] = []
        self._place = (state.source, state.line)

    def run(self, inputs: Sequence[dict[str, Any]]) -> None:
        """Packs everything that is left."""
        config, state = self._config, self._state
        if state.commits:
            print(f"{config.output}: going on behind {state.rows} rows")
        outcomes = encoded_records(
            config.inputs,
            Encoder(config.tokenizer, config.schema, config.columns, config.strict),
            after=self._place,
            rejected_before=[
                (entry["file"], entry["line"])
                for entry in state.rejects
                if entry["kind"] != TOO_LONG
            ],
            workers=config.workers,
        )
        lines = [item["lines"] for item in inputs]
        left = None if None in lines else max(sum(lines) - self._counts["records"], 0)
        taken = 0
        with shown_progress("packing", left, unit="records") as progress:
            for done, outcome in enumerate(outcomes, start=1):
                taken += self._take(outcome)
                if self._counts["records"] == _CHECK_RECORDS:
                    self._check_share()
                if taken == config.window:
                    self._commit(last=False)
                    taken = 0
                result = outcome.result
                tokens = len(result.tokens) if isinstance(result, Trajectory) else 0
                progress.update(done, tokens=tokens, metrics={"rows": self._state.rows})
        self._check_share()
        for index, source in enumerate(config.inputs):
            if not self._counts[_good_of(index)]:
                first = "; ".join(self._rejects.first_of(source))
                raise UserError(
                    f"{source} holds no trajectory that can be packed: "
                    f"{self._rejects.summary()}" + (f". First: {first}" if first else "")
                )
        self._commit(last=True)

    def _take(self, outcome: Outcome) -> bool:
        """Counts a record and keeps what it gives; True if it gives anything."""
        self._place = (outcome.source, outcome.line)
        self._counts["records"] += 1
        result = outcome.result
        if isinstance(result, Reject):
            self._reject(result)
            return False
        fitted = fit(result, self._schema, self._config.row_len, self._config.too_long)
        count_fitted(self._counts, fitted, self._config.row_len, self._config.too_long)
        if not fitted.pieces:
            message = too_long_message(fitted.trie_len, self._config.row_len)
            source = self._config.inputs[outcome.source]
            self._reject(Reject(source, outcome.line, TOO_LONG, message))
            return False
        self._counts["trajectories"] += 1
        for piece in fitted.pieces:
            count_piece(self._counts, piece.trajectory, self._schema)
        self._counts[_good_of(outcome.source)] += 1
        self._waiting += fitted.pieces
        return True

    def _reject(self, reject: Reject) -> None:
        entry = dataclasses.asdict(reject)
        self._fresh_rejects.append(entry)
        self._rejects.add(**entry)

    def _check_share(self) -> None:
        self._rejects.require_share(self._counts["trajectories"], self._config.max_reject_share)

    def _commit(self, *, last: bool) -> None:
        """Packs what waits; writes whole shards of the fullest rows, or all rows at the end."""
        self._check_share()
        lengths = [len(piece.trie) for piece in self._waiting]
        written, waits = rows_to_write(
            lengths, self._config.row_len, self._config.shard_rows, last=last
        )
        waiting = [self._waiting[i] for i in waits]
        self._counts["trie_tokens"] += sum(lengths[i] for row in written for i in row)
        self._counts["pieces"] += sum(map(len, written))
        self._state = self._writer.commit(
            self._state,
            [[self._waiting[i].trie for i in row] for row in written],
            place=self._place,
            counts=self._counts.copy(),
            rejects=self._fresh_rejects,
            pending=[Pending(p.trajectory.tokens, p.trajectory.prompt_len) for p in waiting],
            hidden_depth=len(self._waiting[0].trie.hidden_start) if self._waiting else 0,
        )
        self._waiting, self._fresh_rejects = waiting, []

    def manifest(
        self, inputs: Sequence[dict[str, Any]], settings: dict[str, Any], tokenizer: Any
    ) -> Manifest:
        """What the store holds, once everything is written."""
        config, state, counts = self._config, self._state, self._counts
        kept = ("records", "trajectories", "pieces", "trie_tokens", *OVER_LONG_COUNTS)
        return Manifest(
            format_version=FORMAT_VERSION,
            rows=state.rows,
            row_len=config.row_len,
            shard_rows=config.shard_rows,
            hidden_depth=self._writer.hidden_depth,
            schema=config.schema,
            tokenizer=config.tokenizer or SHIPPED,
            tokenizer_sha256=settings["tokenizer_sha256"],
            vocab_size=ids_needed(tokenizer),
            inputs=[
                {
                    "source": item["source"],
                    "sha256": item["sha256"],
                    "trajectories": counts[_good_of(index)],
                }
                for index, item in enumerate(inputs)
            ],
            settings=settings,
            counts={name: counts[name] for name in kept},
            rejects=dict(self._rejects.counts),
            efficiency=counts["trie_tokens"] / (state.rows * config.row_len),
            statistics=piece_statistics(counts).to_json(),
            sha256=state.sha256 | self._writer.metadata_sha256(),
        )


def _good_of(source: int) -> str:
    return f"trajectories_of_source_{source}"


def _piece(item: Pending, schema: Schema) -> Piece:
    """What waited in a journal, read again."""
    trajectory = schema.parse(item.tokens, item.prompt_len)
    if not isinstance(trajectory, Trajectory):
        raise ValueError(f"the journal holds a trajectory that does not parse: {trajectory[0]}")
    return Piece(trajectory, schema.forest([trajectory]))


def _check_finished(output: str, manifest: Manifest, settings: dict[str, Any]) -> None:
    changed = sorted(k for k in settings if manifest.settings.get(k) != settings[k])
    if changed:
        raise UserError(
            f"output={output} is a finished store of other settings ({', '.join(changed)}): "
            "name another place, or delete it"
        )


def _describe_input(source: str) -> dict[str, Any]:
    """Name, hash and number of lines of a source; null where there are none."""
    if source.startswith("hf://") and not source.startswith("hf://datasets/"):
        return {"source": source, "sha256": None, "lines": None}
    folder = pathlib.Path(source)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [source]
    digest, lines = hashlib.sha256(), 0
    try:
        for file in files:
            opened = fsspec.open(str(file), "rb")
            assert isinstance(opened, fsspec.core.OpenFile)
            with opened as stream:
                while block := stream.read(_READ_BYTES):
                    digest.update(block)
                    lines += block.count(b"\n")
    except (OSError, ImportError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {source}: {reason}; check the path") from error
    known = source.endswith(".jsonl")
    return {"source": source, "sha256": digest.hexdigest(), "lines": lines if known else None}
