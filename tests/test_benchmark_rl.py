"""The RL benchmark asks both sides for the same: prompts, lengths, reward, optimizer."""

import json

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import rl
from benchmarks.rl_task import as_text, reward
from benchmarks.shapes import TINY
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.train.optimizer import OptimizerConfig


def test_prompts_are_plain_text_and_every_step_has_its_own(tmp_path):
    rl.prepare(tmp_path)
    asked, tokenizer = json.loads((tmp_path / "workload.json").read_text()), load_tokenizer()
    prompts = np.array(asked["prompts"])
    steps = rl.WARM_UP + rl.BLOCKS * rl.STEPS
    assert prompts.shape == (steps, rl.PROMPTS, rl.PROMPT_LEN)
    assert (prompts[..., 0] == tokenizer.bos_token_id).all()
    assert (prompts[..., 1:] >= len(tokenizer)).all(), "neither padding nor control tokens"
    assert len(np.unique(prompts.reshape(-1, rl.PROMPT_LEN), axis=0)) == steps * rl.PROMPTS
    assert asked["shape"]["vocab_size"] == TINY.vocab_size
    assert (asked["group_size"], asked["new_tokens"], asked["kl_coefficient"]) == (8, 128, 0.04)
    OptimizerConfig(**asked["optimizer"])


@pytest.mark.parametrize(("ids", "share"), [([2, 4], 1.0), ([1, 2, 3, 5], 0.25), ([], 0.0)])
def test_the_reward_is_a_share_of_even_numbers(ids, share):
    assert reward(as_text(ids)) == share


def test_it_runs_against_its_peer():
    assert "rl" in command.BENCHMARKS
    assert command.AGAINST_PEERS["rl"] == ("tunix",)
