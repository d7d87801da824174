"""`tw-jax serve`: loads a model, warms the engine up, and answers until it is told to stop."""

import asyncio
import gc
import ipaddress
import os
import sys

from tw_jax.errors import UserError
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.serve.config import ServeConfig
from tw_jax.train.run_dir import new_model

KEYS_VARIABLE = "TW_JAX_API_KEYS"
ENGINE_FAILED_STATUS = 1
_EXTRA = ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic")


def run_serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or Ctrl-C; see docs/serving.md.

    Returns:
      The exit status: 0 after a stop that was asked for, 1 when the engine has failed for good.

    Raises:
      UserError: a package is missing, the model cannot be loaded, or the address cannot be had.
    """
    try:
        from tw_jax.serve.app import Service
        from tw_jax.serve.engine_thread import EngineThread, warm_up
        from tw_jax.serve.metrics import Metrics
        from tw_jax.serve.server import Server, address, listen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise UserError(
            f"the Python package {error.name!r} is not installed: serving needs the extra `serve`, "
            'pip install "tw-jax[serve]"'
        ) from error

    keys = (*config.api_keys, *_keys_of_environment())
    with listen(config.host, config.port) as bound:
        model = new_model(config.model, config.seed, source_step=config.step)
        engine = RolloutEngine(model.graphdef, model.schema, config.engine)
        _warn_if_open(config.host, keys)
        warm_up(engine, model.params, [model.schema.eos_id], config.sampling)
        # What is alive now stays. The collector would walk JAX's objects again and again while
        # requests come and go: pauses of tenths of a second.
        gc.collect()
        gc.freeze()
        metrics = Metrics()
        thread = EngineThread(
            engine,
            model.params,
            config.max_queue,
            on_failure=metrics.engine_failures.inc,
            on_fatal=lambda: server.stop_now(),
        )
        service = Service(config, model.tokenizer, engine, thread, metrics, keys)
        where = f"tw-jax serves {config.model_name} at {address(bound)}/v1"
        server = Server(service, on_ready=lambda: print(where, flush=True))
        asyncio.run(server.run_until_stopped(bound))
    if thread.has_failed:
        print("tw-jax: the rollout engine keeps failing; see the log above", file=sys.stderr)
        return ENGINE_FAILED_STATUS
    return 0


def _keys_of_environment() -> tuple[str, ...]:
    keys = os.environ.get(KEYS_VARIABLE, "").split(",")
    return tuple(key.strip() for key in keys if key.strip())


def _warn_if_open(host: str, keys: tuple[str, ...]) -> None:
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (is_local or keys):
        who = f"anybody who reaches host={host}"
        print(f"tw-jax: warning: {who} may use the model; set {KEYS_VARIABLE}", file=sys.stderr)
