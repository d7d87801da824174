"""The input pipeline: deterministic, and resumable at every batch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.data.export_task import export_task
from tw_jax.data.over_long import file_trajectories
from tw_jax.data.packing import LossWeights, WeightedTrie
from tw_jax.data.pipeline import packed_batches
from tw_jax.data.task_source import TaskTrajectories
from tw_jax.data.trajectory_file import TrajectoryRecord, write_trajectories
from tw_jax.errors import UserError
from tw_jax.tasks.registry import TaskConfig, make_task


@pytest.fixture(scope="module")
def dataset(tokenizer, schema):
    source = TaskTrajectories(
        make_task(TaskConfig()), tokenizer, schema, split="train", seed=3, parallel_share=0.5
    )

    def to_trie(trajectory):
        trie = schema.forest([trajectory])
        return WeightedTrie(trie, LossWeights().of(trie))

    return packed_batches(
        source, to_trie, rows=2, row_len=1024, window=64, seed=0, shuffle=False, epochs=None
    )


@settings(max_examples=10)
@given(taken=st.integers(0, 12))
def test_a_restored_iterator_goes_on_exactly(dataset, taken):
    iterator = iter(dataset)
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    restored = iter(dataset)
    restored.set_state(state)
    for batch, again in zip(expected, itertools.islice(restored, 4), strict=True):
        np.testing.assert_array_equal(batch.tokens, again.tokens)
        np.testing.assert_array_equal(batch.loss_weight, again.loss_weight)


def test_rows_are_mostly_full(dataset):
    batches = list(itertools.islice(dataset, 20))
    useful = sum(int((batch.tokens > 0).sum()) for batch in batches)
    assert useful > 0.8 * sum(batch.tokens.size for batch in batches)


def test_both_styles_appear_and_depend_on_the_index_alone(tokenizer, schema):
    def source(share):
        return TaskTrajectories(
            make_task(TaskConfig()), tokenizer, schema, split="train", seed=3, parallel_share=share
        )

    blocks = [bool(source(0.5)[i].blocks) for i in range(200)]
    assert 70 < sum(blocks) < 130
    assert not any(source(0.0)[i].blocks for i in range(5))
    assert all(source(1.0)[i].blocks for i in range(5))
    np.testing.assert_array_equal(source(0.5)[17].tokens, source(0.5)[17].tokens)


def test_files_keep_good_lines_and_set_over_long_ones_aside(tmp_path, tokenizer, schema, capsys):
    path = tmp_path / "data.jsonl"
    export_task(make_task(TaskConfig()), "train", 4, 0, 1.0, path)
    good = path.read_text()
    path.write_text(good + '{"prompt": 1}\nnot json\n')
    rejects = tmp_path / "rejects.jsonl"
    assert len(file_trajectories([str(path)], tokenizer, schema, 512, rejects)) == 4
    assert len(rejects.read_text().splitlines()) == 2
    assert "2 rejected" in capsys.readouterr().out
    write_trajectories(path, [TrajectoryRecord("1+1=", "2" * 600), TrajectoryRecord("1+1=", "2")])
    assert len(file_trajectories([str(path)], tokenizer, schema, 512, rejects)) == 1
    assert "too_long" in rejects.read_text()
    with pytest.raises(UserError, match=r"no trajectory fits a row of 4 tokens; raise data\.row"):
        file_trajectories([str(path)], tokenizer, schema, 4, rejects)


@pytest.mark.parametrize("name", ["native", "apr"])
def test_a_task_that_does_not_speak_the_schema_is_refused(name, languages):
    tokenizer, schema = languages[name]
    with pytest.raises(UserError, match="data.files"):
        TaskTrajectories(
            make_task(TaskConfig()), tokenizer, schema, split="train", seed=0, parallel_share=0.5
        )
