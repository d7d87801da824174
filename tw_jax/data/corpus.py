"""A corpus: sources of trajectories, and what is needed to read them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.rejects import Rejects
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.data.trajectory_file import LoadedTrajectory, read_trajectories
from tw_jax.trajectory.schema import Schema


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Where trajectories are and how they are written.

    Attributes:
      inputs: files, folders or `hf://ORG/NAME[:SPLIT]`: JSON lines, Parquet, ArrayRecord or Hugging
        Face datasets.
      tokenizer: folder or hub id; null takes the shipped character tokenizer. Control tags that it
        lacks are added, as an import of the model does.
      schema: the language of the responses: threadweaver, native or apr.
      columns: names of the fields.
    """

    inputs: tuple[str, ...] = ()
    tokenizer: str | None = None
    schema: str = "threadweaver"
    columns: ColumnsConfig = ColumnsConfig()

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: name at least one file, e.g. inputs=[data.jsonl]")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus.

    Attributes:
      sources: their names.
      tokenizer: encodes it.
      schema: reads it.
      columns: names of the fields.
      rejects: collects what cannot be used.
    """

    sources: Sequence[str]
    tokenizer: Any
    schema: Schema
    columns: ColumnsConfig
    rejects: Rejects

    def read(self, source: str, *, strict: bool = False) -> Iterator[LoadedTrajectory]:
        """The good trajectories of one source.

        Args:
          source: one of `sources`.
          strict: see `read_trajectories`.

        Raises:
          NoGoodTrajectory: it holds none.
          UserError: it cannot be read.
        """
        return read_trajectories(
            source, self.schema, self.tokenizer, self.rejects, self.columns, strict=strict
        )


def open_corpus(config: CorpusConfig, rejects: str | None) -> Corpus:
    """Loads the tokenizer; reads no source yet.

    Args:
      config: the corpus.
      rejects: JSONL file for what cannot be used; None writes none.

    Raises:
      UserError: there is no usable tokenizer, no such schema, or `rejects` is something else.
    """
    tokenizer, schema = open_tokenizer(config.tokenizer, config.schema)
    record = Rejects(rejects, sources=config.inputs)
    return Corpus(config.inputs, tokenizer, schema, config.columns, record)
