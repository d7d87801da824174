"""Weights on the devices that sample, and what these sample, on any number of devices."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout.scenarios import LOOP, request, small_requests
from tests.rollout.sessions import tokens
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.tiny_language import CONFIG
from tw_jax.errors import UserError
from tw_jax.models import init_params
from tw_jax.models.lora import AdapterConfig, bind_adapter
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.session import RolloutsStopped
from tw_jax.rollout.weights import WeightsFormat, decoding_weights
from tw_jax.train.rollout_devices import RolloutDevices, RolloutDevicesConfig, split_devices
from tw_jax.train.weight_hand_over import WeightHandOver

FORMATS = [WeightsFormat("float32", True), WeightsFormat("bfloat16", False)]
WORKER = "tests.train.rollout_devices_worker"


def pointers(tree) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.size}


def assert_handed_over(hand_over, params, weights_format):
    """What was handed over is, to the bit, what an engine would make of the parameters."""
    (found,) = hand_over.weights
    expected = decoding_weights(params, weights_format.dtype, transpose=weights_format.transpose)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.committed
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_outlive_an_update(tied, weights_format):
    """They share no buffer with the parameters, which the update donates."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = init_params(config, 0)
    hand_over = WeightHandOver(config, weights_format, jax.devices()[:1])
    hand_over.take(params)
    assert_handed_over(hand_over, params, weights_format)
    assert not pointers(hand_over.weights) & pointers(params)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    assert params["embed_tokens"]["embedding"].is_deleted()
    assert_handed_over(hand_over, init_params(config, 0), weights_format)
    hand_over.take(init_params(config, 1))
    assert_handed_over(hand_over, init_params(config, 1), weights_format)
    hand_over.release()
    assert hand_over.weights == ()


def test_a_tied_head_is_no_second_copy_where_it_is_the_embedding():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    hand_over = WeightHandOver(config, FORMATS[0], jax.devices()[:1])
    hand_over.take(init_params(config, 0))
    (weights,) = hand_over.weights
    assert weights.head.transposed is weights.params["embed_tokens"]["embedding"]


@pytest.mark.parametrize("embeddings", ["none", "control", "all"])
@pytest.mark.parametrize("base", ["same", "int8", "nf4"])
def test_a_frozen_base_is_handed_over_once(base, embeddings):
    settings = {"rank": 4, "base": base, "block_size": 16, "embeddings": embeddings}
    adapter = bind_adapter(AdapterConfig(**settings), CONFIG, np.array([3, 4]))
    params = init_params(CONFIG, 0)
    frozen, trained = adapter.freeze(params), adapter.init(params, 0)
    hand_over = WeightHandOver(CONFIG, FORMATS[0], jax.devices()[:1])
    hand_over.take(adapter.assemble(trained, frozen))
    first = jax.tree.leaves(hand_over.weights)
    trained = jax.tree.map(lambda leaf: leaf + 1, trained)
    hand_over.take(adapter.assemble(trained, frozen))
    assert_handed_over(hand_over, adapter.assemble(trained, frozen), FORMATS[0])
    kept = {id(leaf) for leaf in first} & {id(leaf) for leaf in jax.tree.leaves(hand_over.weights)}
    # Two layers, each with its own arrays; what is there in name only counts once per array.
    arrays = len(jax.tree.leaves(frozen["layers"]))
    others = len(jax.tree.leaves(frozen)) - arrays
    assert len(kept) >= (2 + 1) * arrays + others
    layer = hand_over.weights[0].layers[0]["self_attn"]["q_proj"]["kernel"]
    assert id(layer.a) not in kept and id(layer.b) not in kept


def test_taking_again_compiles_nothing():
    hand_over = WeightHandOver(CONFIG, FORMATS[0], jax.devices()[:1])
    hand_over.take(init_params(CONFIG, 0))
    again = init_params(CONFIG, 1)
    compiled = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        hand_over.take(again)
        assert not compiled
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
        assert compiled, "the test would show nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int


DEVICES = [FakeDevice(i, i // 4) for i in range(8)]


def test_the_last_devices_of_each_process_are_dedicated():
    train, own = split_devices(RolloutDevicesConfig(dedicated=1), DEVICES, 1)
    assert [d.id for d in train] == [0, 1, 2, 4, 5, 6] and [d.id for d in own] == [7]
    train, own = split_devices(RolloutDevicesConfig(), DEVICES, 1)
    assert train == DEVICES and [d.id for d in own] == [4, 5, 6, 7]
    with pytest.raises(UserError, match="dedicated=4: a process has 4 devices.*at most 3"):
        split_devices(RolloutDevicesConfig(dedicated=4), DEVICES, 0)


def test_copies_fill_the_devices():
    assert RolloutDevicesConfig().copies_on(8) == 8
    assert RolloutDevicesConfig(tensor=2).copies_on(8) == 4
    assert RolloutDevicesConfig(tensor=2, copies=1).copies_on(3) == 1
    with pytest.raises(UserError, match="tensor=3 does not divide the 8 devices"):
        RolloutDevicesConfig(tensor=3).copies_on(8)
    with pytest.raises(UserError, match="3 copies on 2 devices each need 6 devices, but 4"):
        RolloutDevicesConfig(tensor=2, copies=3).copies_on(4)
    for field in ("tensor", "copies"):
        with pytest.raises(ValueError, match=f"{field}=0"):
            RolloutDevicesConfig(**{field: 0})


def test_one_device_samples_like_an_engine():
    graphdef, params = make_model()
    sampler = RolloutDevices(
        graphdef, make_schema(), LOOP, RolloutDevicesConfig(), jax.devices()[:1]
    )
    requests = small_requests(6)
    with pytest.raises(RuntimeError, match=r"take\(params\)"):
        sampler.generate(requests)
    sampler.take(params)
    found = [tokens(rollout) for rollout in sampler.generate(requests)]
    engine: RolloutEngine = sampler.engines[0]
    assert found == [tokens(rollout) for rollout in engine.generate(params, requests)]
    finished = {}
    with pytest.raises(RolloutsStopped):
        sampler.generate(
            requests, on_finish=finished.__setitem__, should_stop=lambda: len(finished) > 0
        )
    assert finished and all(tokens(rollout) == found[i] for i, rollout in finished.items())
    with pytest.raises(UserError, match="request 1: "):
        sampler.generate([request(0), request(1, max_threads=99)])
    sampler.release()
    assert engine.state is None
    with pytest.raises(RuntimeError, match=r"take\(params\)"):
        sampler.generate(requests)


def worker(*arguments: str) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-m", WORKER, *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        # Memory that is given up leaves the process at once.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_any_devices_sample_the_same():
    found = worker("tokens")
    one = found[0]
    assert [entry["engines"] for entry in found] == [1, 4, 2, 2]
    assert [entry["devices"] for entry in found] == [[0], [0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]
    for entry in found:
        assert entry["tokens"] == entry["after"] == one["tokens"], entry["case"]
        assert sorted(entry["seen"]) == list(range(len(one["tokens"])))
        assert entry["compiled"] > 0 and entry["compiled_again"] == 0
        for ours, theirs in zip(entry["logprobs"], one["logprobs"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
    dedicated = found[-1]
    assert dedicated["failed"] == "ValueError: index 3" and dedicated["before_failure"] < 27
    assert dedicated["stopped"].startswith("RolloutsStopped: ")
    assert 4 < dedicated["before_stop"] < 27


@pytest.mark.slow
def test_adapters_and_quantised_bases_split_over_devices():
    found = worker("adapters")
    assert [entry["base"] for entry in found] == ["same", "int8", "nf4"]
    for entry in found:
        # Of each layer seven matrices are split, most with a half of the adapter; the two tables.
        assert entry["equal"] and entry["split"] > 2 * 7 + 2 and entry["devices"] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dedicated", "shared", "shared_mesh"])
def test_memory_of_a_hand_over(case):
    """One copy and at most one leaf, also while the second step's weights replace the first's."""
    (found,) = worker(case)
    assert found["differing"] == 0
    bound = found["model_mb"] + found["largest_leaf_mb"]
    assert found["model_mb"] <= found["device_peak_mb"] + 1 <= bound
    assert found["process_peak_mb"] <= bound + 40  # compiled programs


@pytest.mark.slow
def test_processes_sample_by_themselves(tmp_path):
    """Parameters that span processes get there together, then neither waits for the other."""
    repository = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        [str(repository / "launch/local_multiprocess.sh"), "2", "3", str(tmp_path)],
        cwd=repository,
        env=os.environ | {"TW_JAX": f"{sys.executable} -m tests.train.rollout_processes_worker"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for process, count in enumerate([4, 7]):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        assert found["tokens"] == found["alone"] and len(found["tokens"]) == count
        assert found["training_devices"] == 4 and not found["whole"]
