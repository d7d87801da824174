"""Samples answers to prompts and shows them with their threads side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.panel
import rich.table
import rich.text

from tw_jax.data.text import encode_prompt
from tw_jax.errors import UserError
from tw_jax.evals.evaluate import write_json_lines
from tw_jax.evals.metrics import Style
from tw_jax.evals.problems import style_request
from tw_jax.evals.sample import decode_text, printable, sample_from_rollout
from tw_jax.evals.vote import describe_votes, majority_vote
from tw_jax.rewards.grading import grade, rollout_answer
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.task import Problem, Split
from tw_jax.train.run_dir import LoadedModel, load_run
from tw_jax.trajectory.metrics import acceleration_ratio


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Answers to sample.

    Attributes:
      checkpoint: folder of the run whose model answers.
      step: checkpoint step; null takes the newest.
      prompts: questions as text; empty takes problems of the task.
      task: source of problems where no prompts are given.
      split: which problems of the task.
      count: problems of the task.
      samples_per_prompt: answers to each prompt.
      vote: let the samples of each prompt vote on its answer (self-consistency). Answers to prompts
        given as text are read as those of `task`.
      style: "free" lets the model choose; "sequential" never forks. Problems of the task also get
        the first characters that force the style; prompts given as text do not.
      sampling: how answers are drawn; temperature 0 is greedy.
      seed: of problems and sampling.
      engine: size of the rollout engine.
      output: JSONL file for the answers, all tags kept; null writes none.
    """

    checkpoint: str = "runs/sft"
    step: int | None = None
    prompts: tuple[str, ...] = ()
    task: TaskConfig = TaskConfig()
    split: Split = "heldout"
    count: int = 3
    samples_per_prompt: int = 1
    vote: bool = False
    style: Style = "free"
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    engine: EngineConfig = EngineConfig(context_len=1024)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.vote and self.samples_per_prompt == 1:
            raise ValueError("vote=true: needs samples_per_prompt=2 or more")
        if self.vote and self.sampling.temperature == 0:
            raise ValueError("vote=true: samples of temperature 0 are all the same; raise it")


def run_generate(config: GenerateConfig) -> list[dict[str, Any]]:
    """Samples, prints and writes answers.

    Returns:
      One object per answer, as written to `config.output`: {"prompt", "response" (all tags kept),
      "style", "answer" (null for prompts given as text, unless they vote), "correct" (null for
      prompts given as text), "voted" (the answer that the prompt's samples voted for; null without
      a vote or where none states an answer), "finish_reason", "total_tokens", "critical_path",
      "acceleration_ratio", "seed"}.

    Raises:
      UserError: no such run, a prompt that cannot be encoded, or an output that cannot be written.
    """
    model = load_run(config.checkpoint, config.step)
    task = make_task(config.task)
    problems: list[Problem | None] = [None] * len(config.prompts)
    if not config.prompts:
        problems = [task.problem(config.split, i, config.seed) for i in range(config.count)]
    requests = [
        _request(config, model, index, problem, sampling_seed(config.seed, index, sample))
        for index, problem in enumerate(problems)
        for sample in range(config.samples_per_prompt)
    ]
    engine = RolloutEngine(model.graphdef, model.schema, config.engine)
    rollouts = engine.generate(model.params, requests)
    console = rich.console.Console()
    answers = []
    for i, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        problem = problems[i // config.samples_per_prompt]
        answer = correct = None
        if problem is not None:
            graded = grade(rollout, problem, task, model.tokenizer, model.schema)
            answer, correct = graded.answer, graded.correct
        elif config.vote:
            answer = rollout_answer(rollout, task, model.tokenizer)
        sample = sample_from_rollout(
            rollout, model.tokenizer, style=config.style, answer=answer, correct=correct
        )
        print_sample(console, sample)
        answers.append(_answer(model, request, rollout, sample))
    if config.vote:
        for start in range(0, len(answers), config.samples_per_prompt):
            prompts_answers = answers[start : start + config.samples_per_prompt]
            console.print(_vote(prompts_answers, model.tokenizer.bos_token or ""))
    if config.output is not None:
        write_json_lines(config.output, answers)
        print(config.output)
    return answers


def print_sample(console: rich.console.Console, sample: Mapping[str, Any]) -> None:
    """Prints one sample of `tw_jax.evals.sample`: threads side by side, the longest in colour."""
    console.print(rich.text.Text(printable(sample["prompt"]), style="bold"))
    for part in sample["parts"]:
        if part["kind"] == "segment":
            text = part["text"].strip()
            if text:
                console.print(rich.text.Text(printable(text)))
            continue
        outlines = "   ".join(f"{o['number']}: {o['text']}" for o in part["outlines"])
        console.print(rich.text.Text(printable(outlines), style="dim"))
        if part["threads"]:
            console.print(_threads(part["threads"]))
    mark = {True: ", correct", False: ", wrong", None: ""}[sample["correct"]]
    summary = (
        f"critical path {sample['critical_path']:,} of {sample['total_tokens']:,} tokens, "
        f"ended by {sample['finish_reason']}{mark}"
    )
    console.print(rich.text.Text(summary, style="dim"))
    console.print()


def _threads(threads: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    """One panel per thread, side by side."""
    row = rich.table.Table.grid(expand=True)
    panels = []
    for thread in threads:
        row.add_column(ratio=1)
        title = f"{thread['number']} · {thread['tokens']:,} tokens"
        if thread["closed_by_engine"]:
            title += " · cut off"
        panels.append(
            rich.panel.Panel(
                rich.text.Text(printable(thread["text"]), overflow="fold"),
                title=rich.text.Text(printable(title)),
                border_style="yellow" if thread["critical"] else "dim",
            )
        )
    row.add_row(*panels)
    return row


def _vote(answers: Sequence[dict[str, Any]], bos_token: str) -> rich.text.Text:
    """Sets "voted" in all answers to one prompt; returns the line that tells of the vote."""
    stated = [answer["answer"] for answer in answers]
    voted = majority_vote(stated)
    mark = ""
    for answer in answers:
        answer["voted"] = voted
        if answer["answer"] == voted:
            mark = {True: ", correct", False: ", wrong", None: ""}[answer["correct"]]
    line = rich.text.Text(printable(answers[0]["prompt"].removeprefix(bos_token)), style="bold")
    return line.append(f"  vote{mark}: {printable(describe_votes(stated))}", style="not bold")


def _request(
    config: GenerateConfig, model: LoadedModel, index: int, problem: Problem | None, seed: int
) -> Request:
    if problem is not None:
        task = make_task(config.task)
        return style_request(
            model.tokenizer, model.schema, task, problem, config.style, config.sampling, seed
        )
    try:
        prompt = encode_prompt(model.tokenizer, config.prompts[index])
    except UserError as error:
        raise UserError(f"prompts[{index}]: {error}") from error
    return Request(
        prompt=prompt,
        seed=seed,
        sampling=config.sampling,
        mode="sequential" if config.style == "sequential" else "parallel",
    )


def _answer(
    model: LoadedModel, request: Request, rollout: Rollout, sample: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "prompt": decode_text(model.tokenizer, rollout.prompt),
        "response": decode_text(model.tokenizer, rollout.response),
        "style": sample["style"],
        "answer": sample["answer"],
        "correct": sample["correct"],
        "voted": None,
        "finish_reason": rollout.finish_reason,
        "total_tokens": rollout.total_tokens,
        "critical_path": rollout.critical_path,
        "acceleration_ratio": acceleration_ratio(rollout.total_tokens, rollout.critical_path),
        "seed": request.seed,
    }
