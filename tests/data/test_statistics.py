"""Corpus statistics: a trajectory counted by hand, and laws over random ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_trajectories import encode, random_texts
from tw_jax.data.statistics import (
    CorpusStatistics,
    corpus_statistics,
    distributions,
    trajectory_statistics,
)
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema

TOKENIZER = load_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)
BLOCK = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: xxxx\n</Thread><Thread>\n2: yy\n</Thread>\n</Parallel>\n"
)


def parsed(text: str):
    prompt = TOKENIZER("12=").input_ids
    response = TOKENIZER(text, add_special_tokens=False).input_ids
    return SCHEMA.parse(np.array([*prompt, *response, TOKENIZER.eos_token_id]), len(prompt))


def test_one_trajectory_by_hand() -> None:
    # By hand, one token a tag or character: outlines 1+1+1+1+(1+4+1)*2+2+1+1 = 20 with the opening
    # tag, threads 1+(1+2+1+4+1)+1 and 1+(1+2+1+2+1)+1, line break and closing tag.
    counts = trajectory_statistics(parsed("ab\n" + BLOCK + "#9"), SCHEMA)
    assert counts.thread_tokens == ((9, 7),)
    assert counts.block_tokens == (20 + 11 + 9 + 2,)
    assert counts.prompt_tokens == 4
    assert counts.total_tokens == 3 + 42 + 1 + 2 + 1  # before, block, break, answer, end of text
    assert counts.critical_path == counts.total_tokens - 7
    assert counts.format_valid
    total = corpus_statistics([counts])
    assert total.parallel_ratio == pytest.approx(42 / 49)
    assert total.self_parallelism == pytest.approx(49 / 42)
    assert total.acceleration_ratio == pytest.approx(7 / 49)
    assert (total.blocks_per_trajectory, total.threads_per_block) == (1, 2)
    assert (total.tokens_per_block, total.tokens_per_thread) == (42, 8)
    assert (total.activation_ratio, total.format_valid_rate) == (1, 1)


def test_a_block_that_is_not_canonical_counts_as_such() -> None:
    loose = trajectory_statistics(parsed(BLOCK.replace("1: xxxx", "1:xxxx")), SCHEMA)
    plain = trajectory_statistics(parsed("12"), SCHEMA)
    assert not loose.format_valid and plain.format_valid
    total = corpus_statistics([loose, plain])
    assert (total.format_valid_rate, total.activation_ratio) == (0.5, 0.5)


def test_nothing_is_no_error() -> None:
    empty = corpus_statistics([])
    assert empty == CorpusStatistics(0, *(0.0,) * 6, 1.0, *(0.0,) * 5)
    assert set(map(len, distributions([]).values())) == {0}


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(random_texts(), min_size=1, max_size=5), split=st.integers(0, 5))
def test_sums_of_parts(texts, split: int) -> None:
    trajectories = [SCHEMA.parse(*encode(text, TOKENIZER)) for text in texts]
    items = [trajectory_statistics(trajectory, SCHEMA) for trajectory in trajectories]
    total = corpus_statistics(items)
    parts = [corpus_statistics(part) for part in (items[:split], items[split:])]
    for name in ("total_tokens", "critical_path", "blocks_per_trajectory", "activation_ratio"):
        sums = [getattr(part, name) * part.trajectories for part in parts]
        assert sum(sums) == pytest.approx(getattr(total, name) * len(items))
    assert total.total_tokens == np.mean([len(t.tokens) - t.prompt_len for t in trajectories])
    saved = sum(sum(block) - max(block) for item in items for block in item.thread_tokens)
    assert total.critical_path * len(items) == pytest.approx(
        sum(item.total_tokens for item in items) - saved
    )
    assert 0 <= total.parallel_ratio <= 1 and total.self_parallelism >= 1
    assert len(distributions(items)["total tokens"]) == len(items)
