"""Samples answers to prompts and shows them with their threads side by side."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.panel
import rich.table
import rich.text

from tw_jax.config_checks import require_seed
from tw_jax.data.text import encode_prompt
from tw_jax.errors import UserError
from tw_jax.evals.answerer import Answerer, OnFinish, engine_answerer, source_of_run
from tw_jax.evals.evaluate import write_json_lines
from tw_jax.evals.metrics import Style
from tw_jax.evals.problems import style_request
from tw_jax.evals.remote import remote_answerer
from tw_jax.evals.sample import TextDecoder, decode_text, printable, sample_from_rollout
from tw_jax.evals.vote import describe_votes, majority_vote
from tw_jax.evals.watch import STEPS_PER_LOOK, watch_rollouts
from tw_jax.rewards.grading import grade, rollout_answer
from tw_jax.rollout.client import ClientConfig
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_file import generate_resumably
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.task import Problem, Split
from tw_jax.train.run_dir import load_run
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
      server: an OpenAI-compatible server (vLLM, SGLang, ours) that answers in the engine's place;
        `server=http://HOST:PORT/v1` is short for `server.url`. See docs/rollout_clients.md.
      tokenizer: with a server, the tokenizer of its model: a folder or hub id; null takes that of
        `checkpoint`.
      schema: with a server, the language of parallel thought that its model speaks.
      watch: show threads growing side by side while they decode; `--watch` is short for it.
      output: JSONL file for the answers, all tags kept; null writes none.
      rollouts: JSONL file that rollouts are appended to as they finish; the same command, started
        again, samples only what the file does not hold yet. Null keeps none.
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
    server: ClientConfig | None = None
    tokenizer: str | None = None
    schema: str = "threadweaver"
    watch: bool = False
    output: str | None = None
    rollouts: str | None = None

    def __post_init__(self) -> None:
        require_seed(self)
        for name in ("count", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.vote and self.samples_per_prompt == 1:
            raise ValueError("vote=true: needs samples_per_prompt=2 or more")
        if self.vote and self.sampling.temperature == 0:
            raise ValueError("vote=true: samples of temperature 0 are all the same; raise it")
        if self.watch and self.server is not None:
            raise ValueError(
                "watch=true: a server does not show its threads; leave one of them out"
            )


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
    console = rich.console.Console()
    answerer = _answerer(config, console)
    task = make_task(config.task)
    problems: list[Problem | None] = [None] * len(config.prompts)
    if not config.prompts:
        problems = [task.problem(config.split, i, config.seed) for i in range(config.count)]
    requests = [
        _request(config, answerer, index, problem, sampling_seed(config.seed, index, sample))
        for index, problem in enumerate(problems)
        for sample in range(config.samples_per_prompt)
    ]
    rollouts = _rollouts(config, answerer, requests)
    answers = []
    for i, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        problem = problems[i // config.samples_per_prompt]
        answer = correct = None
        if problem is not None:
            graded = grade(rollout, problem, task, answerer.tokenizer, answerer.schema)
            answer, correct = graded.answer, graded.correct
        elif config.vote:
            answer = rollout_answer(rollout, task, answerer.tokenizer)
        sample = sample_from_rollout(
            rollout, answerer.tokenizer, style=config.style, answer=answer, correct=correct
        )
        if config.watch and not console.is_terminal:
            console.print(_summary(sample))  # the text has been printed as it grew
        else:
            print_sample(console, sample)
        answers.append(_answer(answerer.tokenizer, request, rollout, sample))
    if config.vote:
        for start in range(0, len(answers), config.samples_per_prompt):
            prompts_answers = answers[start : start + config.samples_per_prompt]
            console.print(_vote(prompts_answers, answerer.tokenizer.bos_token or ""))
    if config.output is not None:
        write_json_lines(config.output, answers)
        print(config.output)
    return answers


def _answerer(config: GenerateConfig, console: rich.console.Console) -> Answerer:
    """The engine on the run's model, watched or not, or a server."""
    if config.server is not None:
        return remote_answerer(
            config.server, config.tokenizer, config.checkpoint, config.schema, os.environ
        )
    model = load_run(config.checkpoint, config.step)
    if not config.watch:
        return engine_answerer(model, config.checkpoint, config.engine)
    steps = min(STEPS_PER_LOOK, config.engine.steps_per_dispatch)
    sizes = dataclasses.replace(config.engine, steps_per_dispatch=steps)
    engine = RolloutEngine(model.graphdef, model.schema, sizes)

    def generate(requests: Sequence[Request], on_finish: OnFinish | None) -> list[Rollout]:
        return watch_rollouts(
            engine, model.params, requests, model.tokenizer, console, on_finish=on_finish
        )

    source = source_of_run(config.checkpoint, model.step)
    return Answerer(model.tokenizer, model.schema, source, generate)


def _rollouts(
    config: GenerateConfig, answerer: Answerer, requests: Sequence[Request]
) -> list[Rollout]:
    if config.rollouts is None:
        return answerer.generate(requests, None)
    return generate_resumably(config.rollouts, requests, answerer.generate, source=answerer.source)


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
    console.print(_summary(sample))
    console.print()


def _summary(sample: Mapping[str, Any]) -> rich.text.Text:
    mark = {True: ", correct", False: ", wrong", None: ""}[sample["correct"]]
    return rich.text.Text(
        f"critical path {sample['critical_path']:,} of {sample['total_tokens']:,} tokens, "
        f"ended by {sample['finish_reason']}{mark}",
        style="dim",
    )


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
    config: GenerateConfig, answerer: Answerer, index: int, problem: Problem | None, seed: int
) -> Request:
    if problem is not None:
        task = make_task(config.task)
        return style_request(
            answerer.tokenizer,
            answerer.schema,
            task,
            problem,
            config.style,
            config.sampling,
            seed,
        )
    try:
        prompt = encode_prompt(answerer.tokenizer, config.prompts[index])
    except UserError as error:
        raise UserError(f"prompts[{index}]: {error}") from error
    return Request(
        prompt=prompt,
        seed=seed,
        sampling=config.sampling,
        mode="sequential" if config.style == "sequential" else "parallel",
    )


def _answer(
    tokenizer: TextDecoder, request: Request, rollout: Rollout, sample: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "prompt": decode_text(tokenizer, rollout.prompt),
        "response": decode_text(tokenizer, rollout.response),
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
