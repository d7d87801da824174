"""Settings of `tw-jax serve`."""

import dataclasses

from tw_jax.config_checks import require_at_least, require_seed
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.train.run_dir import ModelConfig


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """An OpenAI-compatible server on the rollout engine.

    Attributes:
      model: which model answers; `model=runs/sft` is short for `model.source=runs/sft`.
      step: checkpoint step where the model is a run; null takes the newest.
      seed: of the random weights of a preset; of nothing else.
      served_name: the model's name in requests; null takes `model.source`.
      host: address to listen on; 127.0.0.1 serves this machine only.
      port: port to listen on; 0 takes a free one, which the line that is printed names.
      api_keys: keys that clients may show (`Authorization: Bearer KEY`); empty admits everybody.
        The environment variable TW_JAX_API_KEYS, separated by commas, adds to them.
      sampling: what a request does not say itself.
      engine: size of the rollout engine. Streams move on every `steps_per_dispatch` steps.
      max_queue: rollouts that may wait for a place in the engine; more are answered 429.
      max_choices: most rollouts of one request (prompts times `n`).
      max_request_bytes: most bytes of a request's body; more are answered 413.
      requests_per_minute: of each API key, or of each address where there are no keys; null sets
        no limit. As many may come at once after a minute of silence.
      timeout_s: most seconds of a request, queueing included; it ends with what it has. A request
        may ask for less.
      drain_timeout_s: seconds that running requests get to finish after SIGTERM or Ctrl-C.
    """

    model: ModelConfig = ModelConfig(source="runs/sft")
    step: int | None = None
    seed: int = 0
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    engine: EngineConfig = EngineConfig(
        context_len=1024, rows=32, requests=24, steps_per_dispatch=8
    )
    max_queue: int = 256
    max_choices: int = 16
    max_request_bytes: int = 1 << 20
    requests_per_minute: int | None = None
    timeout_s: float = 600.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        require_at_least(
            self,
            port=0,
            max_queue=0,
            max_choices=1,
            max_request_bytes=1,
            requests_per_minute=1,
            drain_timeout_s=0,
        )
        require_seed(self)
        if self.port > 65535:
            raise ValueError(f"port={self.port}: must lie in 0..65535")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: must be more than 0")
        for key in self.api_keys:
            if not key or not key.isascii() or key != key.strip():
                raise ValueError("api_keys: keys are ASCII text without blanks around it")

    @property
    def model_name(self) -> str:
        """The model's name in requests."""
        return self.model.source if self.served_name is None else self.served_name
