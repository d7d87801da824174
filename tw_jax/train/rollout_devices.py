"""The devices of a process that sample: which ones, in how many copies of the model.

    config = RolloutDevicesConfig(dedicated=2)
    train_devices, own = split_devices(config, jax.devices(), jax.process_index())
    sampler = RolloutDevices(graphdef, schema, engine_config, config, own)
    sampler.take(params)
    rollouts = sampler.generate(requests)

What is sampled does not depend on any of it: tokens follow from the request alone.
"""

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.models import Params
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.rollout.engine import EngineConfig, OnFinish, RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.session import RolloutsStopped
from tw_jax.train.weight_hand_over import WeightHandOver
from tw_jax.trajectory.schema import Schema


@dataclasses.dataclass(frozen=True)
class RolloutDevicesConfig:
    """Which devices sample.

    Attributes:
      dedicated: devices of each process, its last ones, that only sample; training takes the
        others. 0: all of them train and sample in turn.
      tensor: devices that share one copy of the model; more than 1 for models that are too large
        for one device together with their cache.
      copies: copies of the model in each process, each with an engine of its own; null: as many as
        its sampling devices hold, since decoding is bound by each device's memory and an idle one
        helps nobody.
    """

    dedicated: int = 0
    tensor: int = 1
    copies: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, dedicated=0, tensor=1, copies=1)

    def copies_on(self, devices: int) -> int:
        """Copies that a process with so many sampling devices makes.

        Raises:
          UserError: the devices are too few, or would be left over.
        """
        if self.copies is None and devices % self.tensor:
            raise UserError(
                f"rollout_devices.tensor={self.tensor} does not divide the {devices} devices of a "
                "process that sample: choose a divisor, or set rollout_devices.copies"
            )
        copies = self.copies or devices // self.tensor
        if copies * self.tensor > devices:
            raise UserError(
                f"rollout_devices: {copies} copies on {self.tensor} devices each need "
                f"{copies * self.tensor} devices, but {devices} of a process sample: lower copies "
                "or tensor, or raise dedicated"
            )
        return copies


def split_devices(
    config: RolloutDevicesConfig, devices: Sequence[Any], process: int
) -> tuple[list[Any], list[Any]]:
    """Splits devices between training and sampling.

    Args:
      config: see `RolloutDevicesConfig`.
      devices: of all processes, `jax.devices()`.
      process: the number of this process, `jax.process_index()`.

    Returns:
      Devices of all processes that train, and those of this process that sample.

    Raises:
      UserError: a process would have no device left to train on.
    """
    by_process: dict[int, list[Any]] = collections.defaultdict(list)
    for device in devices:
        by_process[device.process_index].append(device)
    if not config.dedicated:
        return list(devices), by_process[process]
    fewest = min(map(len, by_process.values()))
    if config.dedicated >= fewest:
        raise UserError(
            f"rollout_devices.dedicated={config.dedicated}: a process has {fewest} devices, and "
            f"one at least must train: choose at most {fewest - 1}"
        )
    sampling = {
        device for own in by_process.values() for device in own[len(own) - config.dedicated :]
    }
    train = [device for device in devices if device not in sampling]
    return train, [device for device in by_process[process] if device in sampling]


class RolloutDevices:
    """Samples on the devices of this process; see the module docstring.

    `take`, `generate` and `release` exclude each other: call them from one thread at a time.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        schema: Schema,
        engine: EngineConfig,
        config: RolloutDevicesConfig,
        devices: Sequence[Any],
    ) -> None:
        """Makes an engine for every copy; nothing is compiled or allocated yet.

        Args:
          graphdef: static half of the model.
          schema: the language of parallel thought.
          engine: size of each copy's engine.
          config: how the devices are used.
          devices: those of this process that sample.

        Raises:
          UserError: devices, model, schema and sizes do not fit each other.
        """
        size = config.tensor
        groups = [devices[i * size : (i + 1) * size] for i in range(config.copies_on(len(devices)))]
        layouts = [make_layout(ParallelConfig("tensor"), group) for group in groups]
        self.engines = [RolloutEngine(graphdef, schema, engine, layout) for layout in layouts]
        places = [layout or group[0] for layout, group in zip(layouts, groups, strict=True)]
        first = self.engines[0]
        self._hand_over = WeightHandOver(first.model_config, first.weights_format, places)

    def check(self, name: str, request: Request) -> None:
        """See `RolloutEngine.check`."""
        self.engines[0].check(name, request)

    def take(self, params: Params) -> None:
        """Samples with these parameters from now on; see `WeightHandOver.take`."""
        self._hand_over.take(params)

    def release(self) -> None:
        """Gives up weights and caches: training needs the memory. Compiled programs stay."""
        self._hand_over.release()
        for engine in self.engines:
            engine.state = None

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_finish: OnFinish | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Rollout]:
        """Samples one rollout per request; requests are dealt to the copies in turn.

        Args:
          requests: any number.
          on_finish: called with (index, rollout) as rollouts finish, from threads of the copies,
            one call at a time.
          should_stop: asked before every dispatch of every copy, from their threads.

        Returns:
          Rollouts in the order of the requests.

        Raises:
          UserError: a request does not fit the engine; names it. Nothing was sampled then.
          RolloutsStopped: `should_stop` said yes; `on_finish` has had those that were finished.
          RuntimeError: nothing was taken, or since released.
        """
        copies = len(self.engines)
        if len(self._hand_over.weights) != copies:
            raise RuntimeError("there are no weights to sample with: call take(params) first")
        for index, request in enumerate(requests):
            self.engines[0].check(f"request {index}", request)
        one_at_a_time, halt = threading.Lock(), threading.Event()

        def stopping() -> bool:
            return halt.is_set() or (should_stop is not None and should_stop())

        def run(copy: int) -> list[Rollout]:
            def finished(index: int, rollout: Rollout) -> None:
                if on_finish is not None:
                    with one_at_a_time:
                        on_finish(index * copies + copy, rollout)

            try:
                return self.engines[copy].generate(
                    self._hand_over.weights[copy],
                    requests[copy::copies],
                    on_finish=finished,
                    should_stop=stopping,
                )
            except BaseException:
                halt.set()
                raise

        dealt = [run(0)] if copies == 1 else _in_threads(run, copies, halt)
        return [dealt[i % copies][i // copies] for i in range(len(requests))]


def _in_threads(
    run: Callable[[int], list[Rollout]], count: int, halt: threading.Event
) -> list[list[Rollout]]:
    """Runs all at once; if some fail, raises what went wrong rather than who was stopped by it."""
    with concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="rollouts") as pool:
        futures = [pool.submit(run, copy) for copy in range(count)]
        try:
            concurrent.futures.wait(futures)
        finally:
            halt.set()  # an interrupt of this thread stops them, too
    errors = [error for future in futures if (error := future.exception()) is not None]
    # `RolloutsStopped` sorts last: the others were told to stop when one failed.
    for error in sorted(errors, key=lambda error: isinstance(error, RolloutsStopped)):
        raise error
    return [future.result() for future in futures]
