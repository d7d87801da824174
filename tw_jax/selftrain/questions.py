"""What is asked: problems of sources or of a task, as requests to whatever answers."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

from tw_jax.data.chat import Turn
from tw_jax.data.problem_file import ProblemRecord, read_problems
from tw_jax.data.problem_prompts import prompt_ids
from tw_jax.data.records import RejectedRecord
from tw_jax.data.rejects import Rejects
from tw_jax.errors import UserError
from tw_jax.evals.answerer import Answerer
from tw_jax.evals.problems import style_request
from tw_jax.rollout.request import Request, sampling_seed
from tw_jax.selftrain.config import SelfTrainConfig
from tw_jax.tasks.registry import make_task
from tw_jax.tasks.task import Problem

MARKER = "{problem}"


@dataclasses.dataclass(frozen=True)
class Question:
    """A problem, and how it is asked.

    Attributes:
      problem: as it is written into the set.
      request: what is sampled, but for the seed.
    """

    problem: ProblemRecord
    request: Request

    def requests(self, samples: int, seed: int) -> list[Request]:
        """One request per sample; their seeds depend on the problem's id, not on its place."""
        digest = hashlib.blake2b(self.problem.id.encode(), digest_size=8).digest()
        key = int.from_bytes(digest)
        return [
            dataclasses.replace(self.request, seed=sampling_seed(seed, key, sample))
            for sample in range(samples)
        ]


def read_questions(config: SelfTrainConfig, answerer: Answerer, rejects: Rejects) -> list[Question]:
    """The problems that a run asks; bad ones go to `rejects`.

    Raises:
      UserError: a source cannot be read, too many of its problems are bad, or none is left.
    """
    template = _template(config.format_prompt)
    if config.problems:
        questions = _of_sources(config, answerer, rejects, template)
    else:
        questions = _of_task(config, answerer, template)
    rejects.require_share(len(questions), config.max_reject_share)
    if not questions:
        raise UserError(
            f"{', '.join(config.problems)}: no problem there ({rejects.summary()}); expected "
            f"records with the fields {config.columns.prompt!r} and {config.columns.answer!r}"
        )
    return questions


def _template(path: pathlib.Path | None) -> str:
    if path is None:
        return MARKER
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"format_prompt={path}: cannot be read ({error})") from error
    if MARKER not in text:
        raise UserError(f"format_prompt={path}: holds no {MARKER}, where the problem is to stand")
    return text


def _of_task(config: SelfTrainConfig, answerer: Answerer, template: str) -> list[Question]:
    task = make_task(config.task)
    tokenizer, schema = answerer.tokenizer, answerer.schema
    if config.style == "parallel" and schema.name != "threadweaver":
        raise UserError(
            f"style=parallel: the task {task.name!r} forces it with ThreadWeaver's tags, which "
            f"schema={schema.name} does not know; take style=free"
        )
    questions, seen = [], set()
    for index in range(config.first, config.first + config.count):
        problem = task.problem("train", index, config.seed)
        if problem.prompt in seen:
            continue
        seen.add(problem.prompt)
        asked = dataclasses.replace(problem, prompt=template.replace(MARKER, problem.prompt))
        request = style_request(
            tokenizer, schema, task, asked, config.style, config.sampling, seed=0
        )
        written = _task_record(asked if config.keep_format_prompt else problem, task.name, index)
        id_ = f"{task.name}/train/{config.seed}/{index}"
        questions.append(Question(dataclasses.replace(written, id=id_), request))
    return questions


def _task_record(problem: Problem, name: str, index: int) -> ProblemRecord:
    return ProblemRecord("", problem.prompt, problem.answer, f"task {name}", index + 1)


def _of_sources(
    config: SelfTrainConfig, answerer: Answerer, rejects: Rejects, template: str
) -> list[Question]:
    questions = []
    for problem in read_problems(config.problems, config.columns, rejects):
        if config.as_chat and not problem.chat:
            turns = (Turn("user", problem.prompt),)
            problem = dataclasses.replace(problem, chat=turns)
        asked = _put_into(template, problem)
        try:
            prompt = prompt_ids(asked, answerer.tokenizer, _context_len(config))
        except RejectedRecord as error:
            field = config.columns.prompt
            rejects.add(problem.file, problem.line, error.kind, str(error), field)
            continue
        request = Request(
            prompt=prompt,
            seed=0,
            sampling=config.sampling,
            mode="sequential" if config.style == "sequential" else "parallel",
        )
        questions.append(Question(asked if config.keep_format_prompt else problem, request))
    return questions


def _put_into(template: str, problem: ProblemRecord) -> ProblemRecord:
    """The problem in the words in which it is asked; of a chat, the last turn is put into them."""
    prompt = template.replace(MARKER, problem.prompt)
    chat = problem.chat
    if chat:
        chat = (*chat[:-1], dataclasses.replace(chat[-1], content=prompt))
    return dataclasses.replace(problem, prompt=prompt, chat=chat)


def _context_len(config: SelfTrainConfig) -> int | None:
    """How long contexts may get; None where only the server knows."""
    return config.engine.context_len if config.server is None else config.server.context_len


def rounds(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    """Parts of at most `size` questions, in order."""
    return [questions[start : start + size] for start in range(0, len(questions), size)]
