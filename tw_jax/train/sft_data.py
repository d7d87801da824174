"""The packed rows that supervised fine-tuning reads: from stores, from files, or from a task.

Stores are packed once, by `tw-jax data pack`. Files are read whole, encoded and packed while
training runs, which suits small sets. A task writes trajectories as they are needed.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from tw_jax.config_checks import require_at_least, require_share
from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.over_long import TooLong, file_trajectories
from tw_jax.data.packed_batch import PackedBatch
from tw_jax.data.packing import LossWeights, WeightedTrie
from tw_jax.data.pipeline import RandomAccess, packed_batches
from tw_jax.data.store import read_manifest
from tw_jax.data.store_batches import StoresConfig, store_batches
from tw_jax.data.task_source import TaskTrajectories
from tw_jax.errors import UserError
from tw_jax.parallel.layout import Layout
from tw_jax.tasks.registry import make_task
from tw_jax.tasks.task import Split
from tw_jax.train.run_dir import LoadedModel
from tw_jax.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from tw_jax.train.sft import SFTConfig


@dataclasses.dataclass(frozen=True)
class SFTDataConfig:
    """Where trajectories come from and how they are packed.

    Attributes:
      files: sources of trajectories (JSON lines, Parquet, ArrayRecord, Hugging Face datasets), read
        whole and packed on the fly; empty to generate trajectories from the task as they are
        needed.
      columns: names of the fields of the files.
      too_long: what happens to a trajectory of a file whose trie is longer than a row: `cut` behind
        the last whole block or line that fits, `split` into several behind the same prompt, or
        `skip`.
      strict: reject trajectories of files that parse but are not canonical in white space or
        numbering, or have empty plans or threads.
      max_reject_share: training does not begin when more of the records of the files are bad.
      stores: stores that `tw-jax data pack` wrote, in place of files.
      parallel_share: share of generated problems that are shown in parallel style.
      row_len: tokens per packed row.
      rows: rows per micro-batch.
      window: tries of files or of the task that are packed together; more pack tighter.
      epochs: passes over the files or stores; null repeats them until the steps are done.
      loss: weight of each kind of token.
      heldout_batches: batches of the held-out loss; 0 for none.
      heldout_files: sources of the held-out loss; empty takes the task's held-out split.
    """

    files: tuple[str, ...] = ()
    columns: ColumnsConfig = ColumnsConfig()
    too_long: TooLong = "skip"
    strict: bool = True
    max_reject_share: float = 0.5
    stores: StoresConfig | None = None
    parallel_share: float = 0.5
    row_len: int = 1024
    rows: int = 2
    window: int = 128
    epochs: int | None = None
    loss: LossWeights = LossWeights()
    heldout_batches: int = 4
    heldout_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least(self, row_len=1, rows=1, window=1, epochs=1, heldout_batches=0)
        require_share(self, "parallel_share", "max_reject_share")
        if self.files and self.stores is not None:
            raise ValueError(
                "files: a run reads files or stores, not both; pack the files into a store "
                "(tw-jax data pack) and name it in stores.paths"
            )


def training_batches(
    config: "SFTConfig", model: LoadedModel, layout: Layout | None = None
) -> grain.IterDataset:
    """The run's training data: its stores or files in a new order each epoch, or the task's stream.

    Args:
      config: the run.
      model: whose tokenizer and schema are used.
      layout: the mesh; of stores, a process reads only the rows that its devices hold.

    Raises:
      UserError: a source or store cannot be used.
    """
    data = config.data
    if data.stores is not None:
        return store_batches(
            data.stores,
            model.tokenizer,
            model.schema,
            data.loss,
            rows=data.rows,
            row_len=data.row_len,
            seed=config.seed,
            epochs=data.epochs,
            held_rows=None if layout is None else held_rows(layout, data.rows, data.row_len),
        )
    if data.files:
        source = _file_trajectories(config, model, data.files, "rejects.jsonl")
        return _packed(config, model, source, shuffle=True, epochs=data.epochs)
    source = _task_trajectories(config, model, "train")
    return _packed(config, model, source, shuffle=False, epochs=None)


def heldout_batches(config: "SFTConfig", model: LoadedModel) -> list[PackedBatch]:
    """The fixed batches of the held-out loss; none where files or stores come without."""
    data = config.data
    from_task = not data.files and data.stores is None
    if not data.heldout_batches or not (from_task or data.heldout_files):
        return []
    if data.heldout_files:
        source = _file_trajectories(config, model, data.heldout_files, "heldout_rejects.jsonl")
    else:
        source = _task_trajectories(config, model, "heldout")
    batches = _packed(config, model, source, shuffle=False, epochs=1)
    return list(itertools.islice(batches, data.heldout_batches))


def store_hashes(data: SFTDataConfig) -> list[str]:
    """Names the contents of the stores; a checkpoint goes on with no other.

    Raises:
      UserError: a store is unfinished.
    """
    paths = data.stores.paths if data.stores is not None else ()
    return [read_manifest(path).sha256_of_all for path in paths]


def held_rows(layout: Layout, rows: int, row_len: int) -> list[int]:
    """Rows of a batch of which this process's devices hold a part."""
    shape = (rows, row_len)
    parts = layout.sharding(("batch", "length")).addressable_devices_indices_map(shape)
    return sorted({row for part in parts.values() if part for row in range(rows)[part[0]]})


def useful_tokens(batches: Sequence[PackedBatch]) -> int:
    """Tokens that are not padding: padding sees only itself and predicts itself.

    Rows of padding alone are those that other processes have read (`held_rows`); they are taken to
    hold as many tokens as this process's rows do.
    """
    own = np.arange(batches[0].row_len)
    useful = rows_read = rows = 0
    for b in batches:
        padding = (b.visible_end == own + 1) & (b.parent == own) & (b.positions == 0)
        per_row = np.sum(~padding, axis=1)
        useful += int(per_row.sum())
        rows_read += int(np.count_nonzero(per_row))
        rows += len(per_row)
    return useful * rows // max(rows_read, 1)


def _file_trajectories(
    config: "SFTConfig", model: LoadedModel, files: Sequence[str], rejects: str
) -> list[Trajectory]:
    data = config.data
    return file_trajectories(
        files,
        model.tokenizer,
        model.schema,
        data.row_len,
        pathlib.Path(config.run_dir) / rejects,
        too_long=data.too_long,
        columns=data.columns,
        strict=data.strict,
        max_reject_share=data.max_reject_share,
    )


def _packed(
    config: "SFTConfig",
    model: LoadedModel,
    source: RandomAccess,
    *,
    shuffle: bool,
    epochs: int | None,
) -> grain.IterDataset:
    data = config.data

    def to_trie(trajectory: Trajectory) -> WeightedTrie:
        trie = model.schema.forest([trajectory])
        return WeightedTrie(trie, data.loss.of(trie))

    return packed_batches(
        source,
        to_trie,
        rows=data.rows,
        row_len=data.row_len,
        window=data.window,
        seed=config.seed,
        shuffle=shuffle,
        epochs=epochs,
    )


def _task_trajectories(config: "SFTConfig", model: LoadedModel, split: Split) -> TaskTrajectories:
    source = TaskTrajectories(
        make_task(config.task),
        model.tokenizer,
        model.schema,
        split=split,
        seed=config.seed,
        parallel_share=config.data.parallel_share,
    )
    longest = source.longest_trie_len()
    if longest > config.data.row_len:
        raise UserError(
            f"data.row_len={config.data.row_len} is too short: the longest trie of task "
            f"{config.task.name!r} has {longest} tokens; set data.row_len to at least that"
        )
    return source
