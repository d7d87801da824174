"""Settings of `tw-jax data selftrain`."""

import dataclasses
import pathlib

from tw_jax.config_checks import require_at_least, require_seed, require_share
from tw_jax.data.problem_file import ProblemColumns
from tw_jax.evals.metrics import Style
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rollout.client import ClientConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.selftrain.selection import SelectionConfig
from tw_jax.tasks.registry import TaskConfig


@dataclasses.dataclass(frozen=True)
class SelfTrainConfig:
    r"""Samples trajectories with a model and keeps the best as its next training set.

    Attributes:
      checkpoint: folder of the run whose model answers.
      step: checkpoint step; null takes the newest.
      output: folder of the results; the same command with the same folder goes on where an earlier
        run stopped.
      problems: sources of problems: .jsonl, .parquet, .array_record, a saved dataset, hf://NAME;
        empty takes training problems of the task.
      columns: names of the problems' fields.
      as_chat: put prompts that are plain text through the model's chat template.
      task: source of problems where none are named; it grades its own answers.
      first: index of the first problem of the task.
      count: problems of the task; one that repeats an earlier one is not asked again.
      format_prompt: text file that every problem is put into, at the marker {problem}, when it is
        asked; null asks it as it is.
      keep_format_prompt: write the set with the prompts as they were asked; otherwise with the
        plain problems.
      samples_per_problem: trajectories to sample for each problem.
      style: "free" lets the model choose when to fork; "sequential" never forks, and the tags that
        the model writes are read from the text. Problems of the task also get the first characters
        that force the style.
      sampling: how tokens are drawn.
      seed: of the task's problems, of sampling and of what the selection draws.
      grading: how answers to problems from sources are judged.
      selection: what is kept.
      max_reject_share: more bad problems than this share stop the run before it samples anything.
      max_failed_share: most samples that a server may fail on after all repetitions; they are
        left out, and the same command asks for them again. More stop the run.
      problems_per_round: problems that are sampled, graded and selected before the next ones; this
        bounds the memory.
      engine: size of the rollout engine.
      server: an OpenAI-compatible server (vLLM, SGLang, ours) that answers in the engine's place;
        `server=http://HOST:PORT/v1` is short for `server.url`. See docs/rollout_clients.md.
      tokenizer: with a server, the tokenizer of its model: a folder or hub id; null takes that of
        `checkpoint`.
      schema: with a server, the language of parallel thought that its model speaks.
    """

    checkpoint: str = "runs/sft"
    step: int | None = None
    output: pathlib.Path = pathlib.Path("selftrain")
    problems: tuple[str, ...] = ()
    columns: ProblemColumns = ProblemColumns()
    as_chat: bool = False
    task: TaskConfig = TaskConfig()
    first: int = 0
    count: int = 256
    format_prompt: pathlib.Path | None = None
    keep_format_prompt: bool = False
    samples_per_problem: int = 4
    style: Style = "free"
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    grading: GradingConfig = GradingConfig()
    selection: SelectionConfig = SelectionConfig()
    max_reject_share: float = 0.1
    max_failed_share: float = 0.01
    problems_per_round: int = 256
    engine: EngineConfig = EngineConfig(context_len=1024)
    server: ClientConfig | None = None
    tokenizer: str | None = None
    schema: str = "threadweaver"

    def __post_init__(self) -> None:
        require_seed(self)
        require_share(self, "max_reject_share", "max_failed_share")
        require_at_least(self, first=0, count=1, samples_per_problem=1, problems_per_round=1)
        if self.problems and self.style == "parallel":
            raise ValueError(
                "style=parallel: only problems of a task have a first character that forces it; "
                "take style=free, and selection.require_block=true"
            )
        if not self.grading.needs_answers:
            raise ValueError(
                "grading.needs_answers=false: the set holds reference answers; give them"
            )
        if self.keep_format_prompt and self.format_prompt is None:
            raise ValueError("keep_format_prompt=true: there is no format_prompt")
        if self.samples_per_problem > 1 and self.sampling.temperature == 0:
            raise ValueError(
                "samples_per_problem: samples of temperature 0 are all the same; raise "
                "sampling.temperature, or set samples_per_problem=1"
            )
