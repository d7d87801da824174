"""A fine-tuning run that crashes between two checkpoints and is started again."""

import pytest

from tw_jax.train.sft import SFTConfig, SFTResult, run_sft


class _Crash(Exception):
    pass


def crashed_and_restarted(config: SFTConfig, crash_step: int) -> SFTResult:
    """The result of the second start, which goes on from the last checkpoint before the crash."""

    def crash(step, params):
        if step == crash_step:
            raise _Crash

    with pytest.raises(_Crash):
        run_sft(config, hooks=[(1, crash)])
    return run_sft(config)
