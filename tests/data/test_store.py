"""Reading stores: the rows that were packed, mixed, in shards, from any place on."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_jax.data.export_task import export_task
from tw_jax.data.pack import PackConfig, run_pack
from tw_jax.data.packing import LossWeights, WeightedTrie, best_fit_rows, pack_rows
from tw_jax.data.rejects import Rejects
from tw_jax.data.store import PackedStore, to_batch
from tw_jax.data.store_batches import StoresConfig, store_batches
from tw_jax.data.trajectory_file import read_trajectories
from tw_jax.errors import UserError
from tw_jax.tasks.registry import TaskConfig, make_task

ROW_LEN = 600
FIELDS = ("tokens", "positions", "parent", "visible_end", "loss_weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two stores, `sequential` and `parallel`, of one shard and more."""
    folder = tmp_path_factory.mktemp("stores")
    for name, share, count in (("sequential", 0.0, 150), ("parallel", 1.0, 70)):
        export_task(make_task(TaskConfig()), "train", count, 0, share, folder / f"{name}.jsonl")
        run_pack(
            PackConfig(
                inputs=(str(folder / f"{name}.jsonl"),),
                output=str(folder / name),
                rejects=str(folder / "rejects.jsonl"),
                row_len=ROW_LEN,
                window=1000,
                shard_rows=8,
            )
        )
    return folder


@pytest.fixture(scope="module")
def opened(folder, tokenizer, schema):
    """A function that opens a stream over the named stores."""

    def open_them(*names, weights=(), final_weights=(), ramp_rows=0, **kwargs):
        paths = tuple(str(folder / name) for name in names)
        config = StoresConfig(paths, weights, final_weights, ramp_rows)
        arguments = {"rows": 3, "row_len": ROW_LEN, "seed": 0, "epochs": None} | kwargs
        return store_batches(config, tokenizer, schema, LossWeights(), **arguments)

    return open_them


def assert_equal(batch, other):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(batch, field), getattr(other, field), err_msg=field)
    assert batch.hidden_start.shape == other.hidden_start.shape


def keys(batches):
    return [row.tobytes() for batch in batches for row in batch.tokens]


@pytest.mark.parametrize("loss", [LossWeights(), LossWeights(0.5, joined=0.0, forced=2.0)])
def test_rows_are_those_that_packing_in_memory_gives(folder, tokenizer, schema, loss):
    """One window holds all, so that the store must equal `pack_rows`, row by row."""
    rejects = Rejects(folder / "again.jsonl")
    source = folder / "parallel.jsonl"
    items = []
    for item in read_trajectories(source, schema, tokenizer, rejects):
        trie = schema.forest([item.trajectory])
        items.append(WeightedTrie(trie, loss.of(trie)))
    rows = best_fit_rows([len(item.trie) for item in items], ROW_LEN)
    expected = pack_rows([[items[i] for i in row] for row in rows], ROW_LEN)
    store = PackedStore(str(folder / "parallel"))
    assert_equal(to_batch(store.read_rows(range(len(store))), loss), expected)


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(folder, opened):
    store = PackedStore(str(folder / "parallel"))
    rows = len(store)
    batches = list(opened("parallel", rows=1, epochs=2))
    first, second = keys(batches[:rows]), keys(batches[rows:])
    everything = sorted(row.tobytes() for row in store.read_rows(range(rows))["tokens"])
    assert len(second) == rows
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert keys(opened("parallel", rows=1, epochs=1, seed=1)) not in (first, second)
    in_order = keys(opened("parallel", rows=1, epochs=1, shuffle=False))
    assert in_order == [row.tobytes() for row in store.read_rows(range(rows))["tokens"]]


@settings(max_examples=15)
@given(taken=st.integers(0, 40), rows=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_a_restored_iterator_goes_on_exactly(opened, taken, rows, seed):
    stream = opened(
        "sequential", "parallel", rows=rows, seed=seed,
        weights=(3.0, 1.0), final_weights=(1.0, 3.0), ramp_rows=50,
    )  # fmt: skip
    iterator = iter(stream)
    for _ in range(taken):
        next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": taken}
    expected = [next(iterator) for _ in range(4)]
    restored = iter(stream)
    restored.set_state(state)
    for batch, again in zip(expected, itertools.islice(restored, 4), strict=True):
        assert_equal(batch, again)


@settings(max_examples=15)
@given(rows=st.integers(1, 6), data=st.data())
def test_shards_together_are_the_whole_stream(opened, rows, data):
    owner = data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
    held = [[row for row in range(rows) if owner[row] == process] for process in (0, 1)]
    whole = list(itertools.islice(opened("sequential", "parallel", rows=rows), 4))
    for process in (0, 1):
        if not held[process]:
            continue
        part = opened("sequential", "parallel", rows=rows, held_rows=held[process])
        other = held[1 - process]
        for batch, mine in zip(whole, itertools.islice(part, 4), strict=True):
            for field in FIELDS:
                np.testing.assert_array_equal(
                    getattr(mine, field)[held[process]], getattr(batch, field)[held[process]]
                )
            # What others read is padding, which no loss can see.
            own = np.broadcast_to(np.arange(ROW_LEN), (len(other), ROW_LEN))
            assert not mine.loss_weight[other].any()
            np.testing.assert_array_equal(mine.parent[other], own)
            np.testing.assert_array_equal(mine.visible_end[other], own + 1)


def test_stores_are_mixed_in_their_shares_and_the_shares_change(folder, opened):
    def kind_of_rows(stream, count):
        parallel = PackedStore(str(folder / "parallel"))
        rows = {row.tobytes() for row in parallel.read_rows(range(len(parallel)))["tokens"]}
        return np.array([key in rows for key in keys(itertools.islice(stream, count))])

    both = ("sequential", "parallel")
    even = kind_of_rows(opened(*both, rows=1, weights=(1.0, 1.0)), 200)
    assert abs(even.sum() - 100) <= 4
    sizes = [len(PackedStore(str(folder / name))) for name in both]
    natural = kind_of_rows(opened(*both, rows=1), 300)
    assert abs(natural.sum() - 300 * sizes[1] / sum(sizes)) <= 4
    curriculum = kind_of_rows(
        opened(*both, rows=1, weights=(1.0, 0.0), final_weights=(0.0, 1.0), ramp_rows=200), 300
    )
    assert curriculum[:50].mean() < 0.25 < 0.75 < curriculum[150:200].mean()
    assert curriculum[200:].all()
    # Over whatever else, a store's rows come once each before any comes again.
    stream = keys(itertools.islice(opened(*both, rows=1, weights=(1.0, 1.0)), 2 * sizes[1]))
    parallel = PackedStore(str(folder / "parallel")).read_rows(range(sizes[1]))["tokens"]
    of_parallel = [key for key in stream if key in {row.tobytes() for row in parallel}]
    assert max(collections.Counter(of_parallel[: sizes[1]]).values()) == 1


def test_a_run_of_another_kind_is_refused(folder, opened, languages, schema, tokenizer):
    path = str(folder / "parallel")
    config = StoresConfig(paths=(path,))

    def read(tokenizer, schema, row_len=ROW_LEN):
        store_batches(
            config, tokenizer, schema, LossWeights(), rows=1, row_len=row_len, seed=0, epochs=None
        )

    read(tokenizer, schema)
    with pytest.raises(UserError, match=r"set data\.row_len=600"):
        read(tokenizer, schema, 1024)
    with pytest.raises(UserError, match=r"set model\.schema=threadweaver"):
        read(*languages["native"])
    other, _ = languages["apr"]
    with pytest.raises(UserError, match=r"packed with another tokenizer \('character', 108 ids"):
        read(other, schema)
    with pytest.raises(UserError, match="is no finished store"):
        PackedStore(str(folder / "missing"))


def test_damage_is_noticed_when_a_row_is_read(folder, tmp_path):
    source = folder / "parallel.jsonl"
    config = PackConfig(
        inputs=(str(source),), output=str(tmp_path / "s"), rejects=str(tmp_path / "r"),
        row_len=ROW_LEN, shard_rows=8,
    )  # fmt: skip
    run_pack(config)
    shard = tmp_path / "s/tokens/c/1/0"
    good = shard.read_bytes()
    for place in np.linspace(0, len(good) - 1, 40, dtype=int):  # in rows and in their index
        shard.write_bytes(bytes([*good[:place], good[place] ^ 1, *good[place + 1 :]]))
        store = PackedStore(str(tmp_path / "s"))
        store.read_rows(range(8))
        with pytest.raises(UserError, match=r"cannot be read.*delete it and pack it again"):
            store.read_rows(range(8, 16))
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        PackedStore(str(tmp_path / "s")).read_rows(range(8, 16))
    manifest = tmp_path / "s/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="a store of format 9, this version reads format 1"):
        PackedStore(str(tmp_path / "s"))
    manifest.write_text("{")
    with pytest.raises(UserError, match="no manifest of a store"):
        PackedStore(str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ()}, "paths"),
        ({"weights": (1.0,)}, "one per path"),
        ({"weights": (0.0, 0.0)}, "one must be positive"),
        ({"weights": (-1.0, 2.0)}, "none may be negative"),
        ({"final_weights": (1.0, 1.0)}, "over how many rows"),
        ({"ramp_rows": 5}, "set final_weights too"),
    ],
)
def test_settings_of_a_mixture_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(StoresConfig(paths=("a", "b")), **changes)
