"""One of several processes that export models spread over all of them, and then fail together.

    TW_JAX="python -m tests.parallel.export_worker" launch/local_multiprocess.sh 2 4 FOLDER

Each process checks that it sees the failures; what was exported is for the caller to check.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import sys
from typing import Any
from unittest import mock

from tests.parallel.spread_worker import DENSE, MIXTURE
from tw_jax.errors import UserError
from tw_jax.models import init_params
from tw_jax.models.export_weights import export_model
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import ParallelConfig, make_layout
from tw_jax.parallel.processes import is_first_process, join_processes
from tw_jax.tasks.character_tokenizer import load_tokenizer

MODELS = {
    "dense": (dataclasses.replace(DENSE, vocab_size=128), ParallelConfig("fsdp_tensor")),
    "experts": (
        dataclasses.replace(MIXTURE, vocab_size=128),
        ParallelConfig("expert", fsdp=2, expert=2, tensor=2),
    ),
}
MAX_SHARD_BYTES = 20_000  # several files


class BrokenTokenizer:
    """Its writing has a bug."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 1

    def save_pretrained(self, folder: str) -> None:
        raise ValueError("a bug")


@contextlib.contextmanager
def disk_full_at_the_second_file():
    write, files = os.pwrite, set()

    def pwrite(descriptor: int, data: Any, at: int) -> int:
        files.add(os.fstat(descriptor).st_ino)
        if len(files) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, at)

    with mock.patch.object(os, "pwrite", pwrite):
        yield


def main(folder: pathlib.Path) -> None:
    """Exports every model into `folder`, and fails at it in three ways."""
    join_processes(os.environ)
    for name, (config, parallel) in MODELS.items():
        params = init_params(config, 0, param_shardings(make_layout(parallel), config))
        assert not params["embed_tokens"]["embedding"].is_fully_addressable

        def failure(out: str, tokenizer: Any, params=params, config=config) -> str:
            try:
                export_model(
                    folder / out, params, config, tokenizer, max_shard_bytes=MAX_SHARD_BYTES
                )
            except (UserError, RuntimeError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        tokenizer = load_tokenizer()
        assert failure(name, tokenizer) == ""
        assert failure(name, tokenizer).startswith(f"UserError: {folder / name}: is there already")
        # The others' disks are not written to; and the first one's fails between two gathers.
        with disk_full_at_the_second_file() if is_first_process() else contextlib.nullcontext():
            full = failure("full", tokenizer)
        assert full.startswith(f"UserError: {folder / 'full'}: cannot write ("), full
        assert "No space left" in full
        bug = failure("bug", BrokenTokenizer())
        expected = "ValueError: a bug"
        if not is_first_process():
            expected = f"RuntimeError: the first process failed: {expected}"
        assert bug == expected


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
