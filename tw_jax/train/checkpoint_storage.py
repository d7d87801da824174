"""How checkpoints lie on disk: orbax managers, reading one step, and what failures mean."""

import contextlib
import dataclasses
import errno
import gc
import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tw_jax.errors import UserError
from tw_jax.train.checkpoint_record import (
    PARAMS,
    CheckpointRecord,
    CorruptCheckpoint,
    check_content,
    check_fits,
    flatten_by_path,
)

_logger = logging.getLogger(__name__)
_RECORD = "record"
T = TypeVar("T")


def absolute(directory: str | os.PathLike[str]) -> epath.Path:
    """The directory as orbax wants it; buckets (`gs://bucket/run`) stay as they are."""
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def open_for_writing(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background and keeps the newest `keep` steps.

    Removes what interrupted saves left behind, so nothing else may be saving there.

    Raises:
      UserError: the directory cannot be created or written.
    """
    options = ocp.CheckpointManagerOptions(
        create=True,
        preservation_policy=ocp.checkpoint_managers.preservation_policy.LatestN(keep),
        step_format_fixed_length=8,  # so that listings sort by step
        save_root_metadata=False,
        enable_async_checkpointing=True,
    )
    try:
        manager = ocp.CheckpointManager(directory, options=options)
        _remove_leftovers(directory)
        return manager
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {directory}: {error.strerror or error}; choose a "
            "directory that you may write to"
        ) from error


def open_for_reading(directory: epath.Path) -> ocp.CheckpointManager:
    """A manager that writes nothing, so it is safe beside a run that is saving.

    Each process reads on its own: orbax's barrier after a read would never be reached by a process
    that found its part damaged.

    Raises:
      UserError: there is no such directory.
    """
    if not directory.is_dir():
        raise UserError(_nothing_at(directory, "there is no such directory"))
    options = ocp.CheckpointManagerOptions(
        create=False,
        step_format_fixed_length=8,
        save_root_metadata=False,
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        ),
    )
    return ocp.CheckpointManager(directory, options=options)


def start_save(
    manager: ocp.CheckpointManager, trees: Mapping[str, Any], record: CheckpointRecord
) -> None:
    """Copies arrays to the host and starts to write them; only that first part blocks."""
    items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items[_RECORD] = ocp.args.JsonSave(record.to_json())
    manager.save(record.step, args=ocp.args.Composite(**items), force=True)


@dataclasses.dataclass(frozen=True)
class LoadedStep:
    """Some trees of a step and its record."""

    trees: dict[str, Any]
    record: CheckpointRecord


def load_sound_step(
    directory: epath.Path,
    step: int | None,
    abstract: Callable[[CheckpointRecord], Mapping[str, Any]],
    expected_meta: Mapping[str, Any],
) -> tuple[LoadedStep, list[int]]:
    """Loads and verifies the named step, or the newest that is sound.

    In a run of several processes a step counts as sound if it is so in all of them.

    Args:
      directory: where the steps lie.
      step: the step to load; None for the newest sound one.
      abstract: from a step's record to the trees to load, by name: shapes, dtypes, shardings.
      expected_meta: see `check_fits`.

    Returns:
      What was loaded, and the newer steps that are damaged, which are logged.

    Raises:
      UserError: there is no such step, none is sound, or it is of another model, optimizer or
        setting.
    """
    manager = open_for_reading(directory)
    try:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise UserError(_nothing_at(directory, "it holds no complete checkpoint"))
        if step is not None and step not in steps:
            raise UserError(
                f"there is no checkpoint of step {step} in {directory}; there are steps "
                f"{_listed(steps)}"
            )
        causes: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            loaded, cause = _load(manager, directory, candidate, abstract, expected_meta)
            if loaded is not None:
                for bad in causes:
                    _logger.warning(
                        f"the checkpoint of step {bad} in {directory} is damaged ({causes[bad]}); "
                        f"using step {candidate} instead"
                    )
                return loaded, list(causes)
            causes[candidate] = cause
    finally:
        manager.close()
    told = "; ".join(f"step {bad}: {cause}" for bad, cause in causes.items())
    others = [other for other in steps if other not in causes]
    remedy = (
        f"choose another step ({_listed(others)})"
        if others
        else "copy the directory back from a backup, or train again in a new one"
    )
    raise UserError(f"no usable checkpoint in {directory}: {told}. Remedy: {remedy}")


def set_aside(manager: ocp.CheckpointManager, directory: epath.Path, damaged: list[int]) -> None:
    """Renames damaged steps to `<step>.corrupt`, so that training can save those steps again."""
    if not damaged:
        return
    if jax.process_index() == 0:
        for path in list(directory.iterdir()):
            if path.name.isdigit() and int(path.name) in damaged:
                target = path.parent / f"{path.name}.corrupt"
                if target.exists():
                    target.rmtree()
                path.rename(target)
    _meet("damaged checkpoints set aside")
    manager.reload()


def abstract_params(record: CheckpointRecord) -> dict[str, Any]:
    """Shapes and dtypes of the saved parameters as a nested dict."""
    params: dict[str, Any] = {}
    for path, entry in record.arrays.items():
        root, *parents, name = path.split("/")
        if root != PARAMS:
            continue
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    return params


def file_system_cause(error: Exception) -> str | None:
    """What the operating system said, if the file system was to blame; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore raises ValueError for everything and puts the system's error number in the text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found is None:
        return None
    code = int(found.group(1))
    return os.strerror(code) if code in errno.errorcode else f"system error {code}"


def is_no_background_traceback(record: logging.LogRecord) -> bool:
    """Drops tracebacks that orbax's threads log: the same error reaches the caller as a message."""
    return not (record.exc_info and "orbax" in record.pathname)


def _load(
    manager: ocp.CheckpointManager,
    directory: epath.Path,
    step: int,
    abstract: Callable[[CheckpointRecord], Mapping[str, Any]],
    expected_meta: Mapping[str, Any],
) -> tuple[LoadedStep | None, str]:
    """A sound step and "", or None and why it is damaged.

    Raises:
      UserError: the checkpoint is of another model, optimizer or setting.
    """

    def load() -> LoadedStep:
        record = _read_record(manager, step)
        trees = abstract(record)
        where = f"the checkpoint of step {step} in {directory}"
        check_fits(record, flatten_by_path(trees), expected_meta, where)
        items = {
            name: ocp.args.StandardRestore(jax.tree.map(_target, tree))
            for name, tree in trees.items()
        }
        restored = manager.restore(step, args=ocp.args.Composite(**items))
        return LoadedStep(dict(restored.items()), record)

    with _no_dump_of_abandoned_reads():
        loaded, cause = _attempt(load)
        if loaded is None:
            gc.collect()  # of abandoned reads, here where they are hushed
            return None, cause
    # Sums over arrays of several processes need all of them here, hence a second attempt.
    _, cause = _attempt(lambda: check_content(loaded.record, flatten_by_path(loaded.trees)))
    return (None, cause) if cause else (loaded, "")


def _read_record(manager: ocp.CheckpointManager, step: int) -> CheckpointRecord:
    restored = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    record = CheckpointRecord.from_json(restored[_RECORD])
    if record.step != step:
        raise CorruptCheckpoint(f"its record is of step {record.step}")
    return record


@contextlib.contextmanager
def _no_dump_of_abandoned_reads() -> Iterator[None]:
    """Hushes orbax's coroutines: after a failed read the rest die noisily, pages on stderr each."""
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        if not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """Its result and ""; or, if it failed in any process, None and why."""
    result, cause = None, ""
    try:
        result = action()
    except (UserError, MemoryError, PermissionError):
        raise
    except CorruptCheckpoint as error:
        cause = str(error)
    except Exception as error:  # files cut short or altered fail in countless ways
        if re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED", str(error)):
            raise  # another checkpoint would not cure that
        lines = str(error).strip().splitlines() or [""]
        text = lines[0].partition(" See full TensorStore")[0]
        cause = f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '...'}"
    if jax.process_count() > 1:
        failed = np.any(multihost_utils.process_allgather(np.bool_(cause != "")))
        cause = cause or ("another process could not read it" if failed else "")
    return (None if cause else result), cause


def _remove_leftovers(directory: epath.Path) -> None:
    """Removes unfinished saves; threads of one that failed may still be writing a moment longer."""
    if jax.process_index() == 0:
        for _ in range(20):
            leftovers = list(directory.glob("*.orbax-checkpoint-tmp*"))
            for path in leftovers:
                with contextlib.suppress(OSError):
                    path.rmtree()
            if not leftovers:
                break
            time.sleep(0.05)
    _meet("leftovers of checkpoints removed")


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(steps)))


def _nothing_at(directory: epath.Path, why: str) -> str:
    inside = sorted(str(found.parent) for found in directory.parent.glob("*/checkpoints"))
    near = f" There are runs at {', '.join(inside[:3])}: name one." if inside else ""
    return (
        f"no checkpoint at {directory}: {why}.{near} Train a model there first (`make quickstart` "
        "or `tw-jax sft`), or name the directory that holds the step folders"
    )
