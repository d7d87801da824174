"""Whatever answers a verb's requests: the engine on a run's model, or a server."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.train.run_dir import LoadedModel
from tw_jax.trajectory.schema import Schema

OnFinish = Callable[[int, Rollout], None]


@dataclasses.dataclass(frozen=True)
class Answerer:
    """What samples rollouts for a verb.

    Attributes:
      tokenizer: encodes prompts and decodes answers.
      schema: the language of parallel thought.
      source: says which model answers, so that rollouts of another are not mistaken for its own.
      generate: samples requests and hands (index, rollout) over as they finish.
    """

    tokenizer: Any
    schema: Schema
    source: str
    generate: Callable[[Sequence[Request], OnFinish | None], list[Rollout]]


def engine_answerer(model: LoadedModel, checkpoint: str, sizes: EngineConfig) -> Answerer:
    """The rollout engine of this process on the model of a run.

    Args:
      model: the model.
      checkpoint: the run's folder.
      sizes: of the engine.
    """
    engine = RolloutEngine(model.graphdef, model.schema, sizes)

    def generate(requests: Sequence[Request], on_finish: OnFinish | None) -> list[Rollout]:
        return engine.generate(model.params, requests, on_finish=on_finish)

    source = source_of_run(checkpoint, model.step)
    return Answerer(model.tokenizer, model.schema, source, generate)


def source_of_run(checkpoint: str, step: int) -> str:
    """`Answerer.source` of a run's checkpoint."""
    return f"{checkpoint} step {step}"
