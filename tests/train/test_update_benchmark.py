"""What `python -m benchmarks update` compares: the paper's shape, the same tokens either way."""

import numpy as np
import pytest

from benchmarks.update import PAPER_ROW_LEN, PAPER_TOKENS, facts, sample_group, sides_of


def test_a_group_of_the_papers_shape_takes_a_fifth_of_the_tokens(tokenizer, schema):
    rollouts = sample_group(schema, tokenizer, PAPER_TOKENS)
    sides = sides_of(schema, rollouts, PAPER_ROW_LEN)
    shape = facts(rollouts, sides)
    assert shape["tokens_per_rollout"] == pytest.approx(11_200, rel=0.01)
    assert shape["self_parallelism"] == pytest.approx(1.25, rel=0.01)
    assert shape["threads_per_block"] == pytest.approx(2.46, abs=0.02)
    assert all(r.trajectory.prompt_len == 150 for r in rollouts)
    assert sides.tokens[1] / sides.tokens[0] >= 5.5

    def sampled(items):
        """Token, rollout and sampler log-probability of everything that carries loss."""
        found = []
        for item in items:
            mine = item.loss_weight > 0
            columns = (item.trie.tokens, item.policy.rollout_id, item.policy.sampler_logprob)
            found.append(np.stack([column[mine] for column in columns]))
        every = np.concatenate(found, axis=1)
        return every[:, np.lexsort(every)]

    np.testing.assert_array_equal(sampled(sides.forests), sampled(sides.calls))
