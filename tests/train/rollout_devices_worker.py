"""Run on four virtual CPU devices: rollouts on any number of copies, and memory on the way there.

    python -m tests.train.rollout_devices_worker tokens     # one JSON object per line
    python -m tests.train.rollout_devices_worker adapters
    python -m tests.train.rollout_devices_worker CASE       # memory of one of `HAND_OVERS`

A process of its own, since the number of devices is fixed when JAX starts.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from tests.rollout.scenarios import ENGINE, plans, request
from tests.rollout.sessions import tokens
from tests.rollout.small_world import make_model, make_schema
from tests.rollout.tiny_language import CONFIG
from tw_jax.models import abstract_params, init_params, preset
from tw_jax.models.lora import AdapterConfig, bind_adapter
from tw_jax.models.param_shardings import param_shardings
from tw_jax.parallel import Layout, ParallelConfig, make_layout
from tw_jax.rollout.session import RolloutsStopped
from tw_jax.rollout.weights import WeightsFormat, decoding_weights
from tw_jax.train.rollout_devices import RolloutDevices, RolloutDevicesConfig, split_devices
from tw_jax.train.weight_hand_over import WeightHandOver

CASES = {
    "one copy": RolloutDevicesConfig(copies=1),
    "four copies": RolloutDevicesConfig(),
    "two copies on two devices each": RolloutDevicesConfig(tensor=2),
    "two dedicated": RolloutDevicesConfig(dedicated=2),
}
SMALL_ENGINE = dataclasses.replace(ENGINE, rows=3, requests=2)  # compiles in seconds
# 50 million parameters, of which the largest array holds a third.
LARGE = preset(
    "tiny",
    vocab_size=2000,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=False,
)


def asked():
    """Greedy and sampled, with threads and without."""
    return [
        request(
            i,
            ["", plans("1", "2"), plans("1", "2", "3")][i % 3],
            temperature=0.0 if i % 4 == 0 else 1.0,
            max_response_tokens=50,
            max_thread_tokens=6,
        )
        for i in range(9)
    ]


def failures(sampler: RolloutDevices) -> dict[str, Any]:
    """What is raised when a copy fails, and when all are told to stop."""
    seen: list[int] = []

    def fail(index: int, _: Any) -> None:
        seen.append(index)
        if index == 3:
            raise ValueError("index 3")

    def outcome(**arguments: Any) -> str:
        seen.clear()
        try:
            sampler.generate(asked() * 3, **arguments)
        except (ValueError, RolloutsStopped) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    failed, before_failure = outcome(on_finish=fail), len(seen)
    stopped = outcome(on_finish=lambda i, _: seen.append(i), should_stop=lambda: len(seen) > 4)
    return {
        "failed": failed,
        "before_failure": before_failure,
        "stopped": stopped,
        "before_stop": len(seen),
    }


def sample_twice(config: RolloutDevicesConfig) -> dict[str, Any]:
    """Rollouts with two sets of parameters, the second after everything was given up."""
    devices = jax.devices()
    train, own = split_devices(config, devices, 0)
    layout = make_layout(ParallelConfig("fsdp"), train)
    graphdef, host = make_model()
    params = jax.device_put(host, param_shardings(layout, CONFIG))
    sampler = RolloutDevices(graphdef, make_schema(), SMALL_ENGINE, config, own)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.monotonic()
    sampler.take(params)
    sampler.generate(asked())
    first_s, at_first = time.monotonic() - began, len(compiled)
    sampler.release()
    params = jax.tree.map(lambda leaf: leaf + 0, params)  # as an update leaves them
    at_update = len(compiled)
    sampler.take(params)
    seen: list[int] = []
    rollouts = sampler.generate(asked(), on_finish=lambda index, _: seen.append(index))
    spoiled = failures(sampler) if config.dedicated else {}
    after = sampler.generate(asked())
    return {
        **spoiled,
        "after": [tokens(rollout) for rollout in after],
        "tokens": [tokens(rollout) for rollout in rollouts],
        "logprobs": [[u.logprobs.tolist() for u in rollout.units] for rollout in rollouts],
        "seen": seen,
        "engines": len(sampler.engines),
        "compiled": at_first,
        "compiled_again": len(compiled) - at_update,
        "first_s": first_s,
        "devices": sorted(
            {d.id for e in sampler.engines for x in jax.tree.leaves(e.state) for d in x.devices()}
        ),
    }


def adapter_on_two_devices(base: str) -> dict[str, Any]:
    """Weights under an adapter, split over two devices and on one."""
    settings = AdapterConfig(rank=4, base=base, block_size=16, embeddings="control")
    adapter = bind_adapter(settings, CONFIG, (3, 4))
    params = init_params(CONFIG, 0)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, adapter.init(params, 0))
    params = adapter.assemble(trained, adapter.freeze(params))
    devices = jax.devices()
    shared = make_layout(ParallelConfig("tensor"), devices[2:])
    hand_over = WeightHandOver(CONFIG, WeightsFormat("float32", False), [shared, devices[1]])
    hand_over.take(params)
    two, one = map(jax.tree.leaves, hand_over.weights)
    return {
        "base": base,
        "equal": all(np.array_equal(a, b) for a, b in zip(two, one, strict=True)),
        "split": sum(not leaf.sharding.is_fully_replicated for leaf in two),
        "devices": sorted({device.id for leaf in two for device in leaf.devices()}),
    }


class Watched(WeightHandOver):
    """Notes what lies on a device behind every move."""

    def watch(self, device: jax.Device) -> list[int]:
        self._device, self._most = device, []
        return self._most

    def move(self, piece, shardings):
        held = super().move(piece, shardings)
        self._most.append(bytes_on(self._device))
        return held


def bytes_on(device: jax.Device) -> int:
    """Bytes of live arrays on a device, each buffer once."""
    shards = [s for array in jax.live_arrays() for s in array.addressable_shards]
    sizes = {
        s.data.unsafe_buffer_pointer(): s.data.nbytes
        for s in shards
        if s.device == device and s.data.nbytes
    }
    return sum(sizes.values())


def status_mb(field: str) -> float:
    """A field of the process's memory as the system sees it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024


def large_params(layout: Layout | None):
    """Numbers that are nowhere the same, made without memory on the way."""

    def make():
        leaves, tree = jax.tree.flatten(abstract_params(LARGE))
        counts = [
            jax.lax.iota(leaf.dtype, leaf.size).reshape(leaf.shape) + index
            for index, leaf in enumerate(leaves)
        ]
        return tree.unflatten(counts)

    return jax.jit(make, out_shardings=param_shardings(layout, LARGE))()


# Devices that train, and the one that samples.
HAND_OVERS = {"dedicated": (2, 2), "shared": (1, 0), "shared_mesh": (2, 0)}


def hand_over_twice(case: str) -> dict[str, Any]:
    """Memory while weights are handed over, and once more with the next step's parameters."""
    devices = jax.devices()
    train, sample = HAND_OVERS[case]
    layout, sampling = make_layout(ParallelConfig("fsdp"), devices[:train]), devices[sample]
    params = large_params(layout)
    hand_over = Watched(LARGE, WeightsFormat("float32", transpose=True), [sampling])
    seen = hand_over.watch(sampling)
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    jax.block_until_ready(params)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    resident_mb, before = status_mb("VmRSS"), bytes_on(sampling)
    hand_over.take(params)
    update = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    params = jax.block_until_ready(update(params))
    hand_over.take(params)
    peak_mb = status_mb("VmHWM") - resident_mb
    expected = decoding_weights(jax.device_get(params), "float32", transpose=True)
    differing = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(expected), jax.tree.leaves(hand_over.weights[0]), strict=True
        )
    ]
    return {
        "model_mb": sum(leaves) / 2**20,
        "largest_leaf_mb": max(leaves) / 2**20,
        "device_peak_mb": (max(seen) - before) / 2**20,
        "process_peak_mb": peak_mb,
        "differing": sum(differing),
    }


if __name__ == "__main__":
    if sys.argv[1] == "tokens":
        for name, case in CASES.items():
            print(json.dumps({"case": name, **sample_twice(case)}), flush=True)
    elif sys.argv[1] == "adapters":
        for name in ("same", "int8", "nf4"):
            print(json.dumps(adapter_on_two_devices(name)))
    else:
        print(json.dumps(hand_over_twice(sys.argv[1])))
