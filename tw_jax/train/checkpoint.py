"""Checkpoints: written atomically in the background, verified when read, never silently wrong.

A checkpoint directory holds one folder per saved step. Orbax writes a step under a temporary name
and renames it when it is complete, so a process killed at any moment leaves the earlier steps
whole. Each step holds the parameters, the rest of the train state, and a record
(`tw_jax.train.checkpoint_record`) with the data position, whatever the caller adds, and a checksum
of every array. On restore the record decides first whether the checkpoint belongs to this run;
then the arrays must match their checksums. A step that fails is reported, set aside as
`<step>.corrupt`, and the one before is used.

In a run of several processes all of them call every function here together.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.errors import UserError
from tw_jax.train import checkpoint_storage as storage
from tw_jax.train.checkpoint_record import (
    PARAMS,
    REST,
    CheckpointRecord,
    describe_arrays,
    flatten_by_path,
    gather_data_states,
)
from tw_jax.train.state import TrainState

_logger = logging.getLogger(__name__)


class RestoredCheckpoint(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
      state: the train state, placed as the abstract state asked.
      data_state: what this process gave to `save`.
      meta: what was given to `save`.
    """

    state: TrainState
    data_state: Any
    meta: dict[str, Any]


class RestoredParams(NamedTuple):
    """What `restore_params` returns.

    Attributes:
      params: pure nested dict of arrays.
      meta: what was given to `save`.
      step: training steps behind the parameters.
    """

    params: Any
    meta: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores the train states of one run in one directory; a context manager."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        """Opens a directory for one run, and creates it if need be.

        Leftovers of interrupted saves are removed, so no other process may be saving there;
        readers (`restore_params`) are welcome at any time.

        Args:
          directory: where the steps are stored.
          keep: how many of the newest steps stay; with 1 there is none to fall back on.

        Raises:
          UserError: the directory cannot be created or written.
        """
        if keep < 1:
            raise UserError(f"cannot keep {keep} checkpoints: keep at least 1, better 2 or more")
        self._directory = storage.absolute(directory)
        self._keep = keep
        self._pending: int | None = None  # the step that is being written in the background
        self._pending_megabytes = 0.0
        self._current: int | None = None  # the newest step that this object saved or restored
        self._manager = storage.open_for_writing(self._directory, keep)
        logging.getLogger("absl").addFilter(storage.is_no_background_traceback)

    def latest_step(self) -> int | None:
        """The newest step in the directory, not yet verified; None if there is none.

        Raises:
          UserError: the checkpoint under way could not be written.
        """
        self.wait()
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        data_state: Any = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to write a checkpoint and returns once its arrays are copied from the devices.

        The rest happens in the background; its failure is raised by the next `save`, `wait` or
        `close`. The state may be donated at once. A step that this object has just saved or
        restored is not written again.

        Args:
          step: training steps taken.
          state: the train state after that step.
          data_state: this process's position in the data, JSON or bytes: what the iterator's
            `get_state()` returns.
          meta: JSON to keep beside it: model settings, schema, seed.

        Raises:
          UserError: this or the previous checkpoint could not be written (earlier ones stay
            usable), or the directory holds steps of another run.
        """
        self.wait()
        latest = self._manager.latest_step()
        if step == latest == self._current:
            return
        if latest is not None and latest >= step:
            raise UserError(
                f"{self._directory} already holds a checkpoint of step {latest}, so step {step} "
                "cannot be saved there: resume from the newest checkpoint, or give the new run "
                "another directory"
            )
        trees = _split(state)
        leaves = flatten_by_path(trees)
        record = CheckpointRecord(
            step=step,
            data_states=gather_data_states(data_state),
            meta=dict(meta or {}),
            arrays=describe_arrays(leaves),
        )
        self._pending = step
        self._pending_megabytes = sum(_size_bytes(leaf) for leaf in leaves.values()) / 1e6
        try:
            storage.start_save(self._manager, trees, record)
        except Exception as error:
            self._give_up(error)

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          UserError: the checkpoint under way could not be written.
        """
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
        self._current, self._pending = self._pending, None

    def restore(
        self,
        abstract_state: TrainState,
        step: int | None = None,
        *,
        expected_meta: Mapping[str, Any] | None = None,
    ) -> RestoredCheckpoint:
        """Reads a checkpoint, by default the newest one that is sound.

        Args:
          abstract_state: the shapes, dtypes and shardings that are expected: a train state of
            arrays or of `jax.ShapeDtypeStruct`; without a sharding, arrays go to one device.
          step: which checkpoint; None for the newest. Newer ones that turn out damaged are logged
            and set aside.
          expected_meta: values, nested as deep as need be, that the checkpoint's meta must hold.
            Settings that do not change what the parameters mean (compute dtype, position limit,
            initializer) may differ.

        Returns:
          The state, this process's data position, and the meta.

        Raises:
          UserError: there is no checkpoint or none that is sound, or it belongs to another model;
            the message names the first array and every setting that differs.
        """
        self.wait()
        abstract = _split(abstract_state)

        loaded, damaged = storage.load_sound_step(
            self._directory, step, lambda record: abstract, expected_meta or {}
        )
        storage.set_aside(self._manager, self._directory, damaged)
        self._current = loaded.record.step
        state = TrainState(**{**loaded.trees[REST], "params": loaded.trees[PARAMS]})
        return RestoredCheckpoint(state, loaded.record.own_data_state(), loaded.record.meta)

    def close(self) -> None:
        """Finishes what is being written.

        Raises:
          UserError: the checkpoint under way could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(storage.is_no_background_traceback)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            self.close()
        except UserError as error:
            if exception_type is None:
                raise
            _logger.warning(str(error))  # what ended the block matters more

    def _give_up(self, error: Exception) -> None:
        """Turns a failed save into one message; the manager is replaced, so a later save may work.

        Raises:
          UserError: always, if the file system is to blame; else `error` itself.
        """
        step, self._pending = self._pending, None
        cause = storage.file_system_cause(error)
        if cause is None:
            raise error
        try:
            self._manager.close()
        except Exception as again:  # the same failure, told a second time
            _logger.debug("closing after a failed save: %s", again)
        # Opening anew also removes what the failed save left behind.
        self._manager = storage.open_for_writing(self._directory, self._keep)
        intact = sorted(self._manager.all_steps())
        kept = (
            f"Checkpoints of steps {', '.join(map(str, intact))} are intact; once the cause is "
            f"mended, the same command goes on from step {intact[-1]}"
            if intact
            else "There is no earlier one"
        )
        raise UserError(
            f"cannot write the checkpoint of step {step} (about {self._pending_megabytes:.1f} MB) "
            f"to {self._directory}: {cause}. {kept}"
        ) from error


def restore_params(
    directory: str | os.PathLike[str],
    step: int | None = None,
    shardings: Callable[[Mapping[str, Any]], Any] = lambda meta: None,
) -> RestoredParams:
    """Reads only the parameters of a checkpoint: for evaluation, generation, a new run.

    Never writes, so a run may be saving into the directory meanwhile.

    Args:
      directory: the checkpoint directory of a run.
      step: which checkpoint; None for the newest that is sound (damaged ones are logged).
      shardings: from the checkpoint's meta to a tree of shardings like the parameters, or to None
        for whole parameters on this process's first device.

    Returns:
      The parameters, the meta and the step.

    Raises:
      UserError: there is no sound checkpoint.
    """

    def abstract(record: CheckpointRecord) -> dict[str, Any]:
        params, placed = storage.abstract_params(record), shardings(record.meta)
        if placed is not None:
            params = jax.tree.map(
                lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, placed
            )
        return {PARAMS: params}

    loaded, _ = storage.load_sound_step(storage.absolute(directory), step, abstract, {})
    return RestoredParams(loaded.trees[PARAMS], loaded.record.meta, loaded.record.step)


def _split(state: TrainState) -> dict[str, Any]:
    """The train state as two trees, so that parameters can be read alone."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if rest["reference"] is None:
        del rest["reference"]  # as in checkpoints from before there were any
    return {PARAMS: state.params, REST: {**rest, "params": None}}


def _size_bytes(leaf: Any) -> int:
    return int(np.prod(np.shape(leaf))) * jnp.result_type(leaf).itemsize
