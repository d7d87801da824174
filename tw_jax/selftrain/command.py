"""`tw-jax data selftrain`: problems -> samples -> grades -> selection -> the next training set.

Problems are worked through in rounds, so that neither their number nor the length of trajectories
is bounded by memory: of a finished round there remain counts, and what may be written in a file
without a name. Every finished rollout lies in `rollouts/`, one file per round; all else is computed
from them anew, in the same order, and appears at the end. A run that was killed therefore samples
only what is missing, and writes the same bytes.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import rich.console

from tw_jax import config as configs
from tw_jax.data.progress import ShownProgress, shown_progress
from tw_jax.data.rejects import Rejects
from tw_jax.data.statistics import CorpusStatistics, corpus_statistics, trajectory_statistics
from tw_jax.data.trajectory_file import read_trajectories, write_trajectories
from tw_jax.data.used_folder import require_same_work
from tw_jax.data.whole_file import require_other_files, whole_file
from tw_jax.errors import UserError
from tw_jax.evals.answerer import Answerer, engine_answerer
from tw_jax.evals.remote import remote_answerer
from tw_jax.rewards.graders import Grader, grade_answers, open_grader, task_grader
from tw_jax.rollout.client_http import ServerDownError
from tw_jax.rollout.rollout import Rollout
from tw_jax.rollout.rollout_file import generate_resumably
from tw_jax.selftrain.candidate import judged, read_rollout
from tw_jax.selftrain.config import SelfTrainConfig
from tw_jax.selftrain.output import OutputPaths, is_used, output_paths, remove_set
from tw_jax.selftrain.printed import print_drops, print_report
from tw_jax.selftrain.questions import Question, read_questions, rounds
from tw_jax.selftrain.selection import balance
from tw_jax.selftrain.spool import Spool
from tw_jax.selftrain.tally import Tally
from tw_jax.selftrain.yields import SelfTrainReport, pass_rate_histogram, rule_yields
from tw_jax.tasks.registry import make_task
from tw_jax.train.run_dir import load_run


def run_selftrain(config: SelfTrainConfig) -> SelfTrainReport:
    """Samples, grades, selects, and writes the next training set.

    Raises:
      UserError: no such model, unusable problems, a folder that cannot be written or holds the set
        of another model or other problems, or a selection that keeps nothing.
    """
    paths = output_paths(config.output)
    _require_own_folder(config, paths)
    with whole_file(paths.config) as out:
        out.write(configs.to_yaml(config))
    answerer = _answerer(config)
    rejects = Rejects(paths.rejects, sources=config.problems)
    questions = read_questions(config, answerer, rejects)
    with Spool(config.output) as records, Spool(config.output) as drops:
        tally = Tally(records, drops)
        if config.problems:
            with open_grader(config.grading) as grader:
                _work_through(config, answerer, questions, grader, paths, tally)
        else:
            grader = task_grader(make_task(config.task))
            _work_through(config, answerer, questions, grader, paths, tally)
        kept, unbalanced = balance(config.selection, config.seed, tally.kept)
        for drop in unbalanced:
            tally.drop(questions[drop.problem].problem, drop)
        with whole_file(paths.dropped) as out:
            out.writelines(json.dumps(drop) + "\n" for drop in drops)
        if kept:
            write_trajectories(paths.trajectories, map(tally.record, kept))
    had_set = not kept and remove_set(paths)
    report = SelfTrainReport(
        source=answerer.source,
        schema=answerer.schema.name,
        problems=len(questions),
        rejected_problems=dict(rejects.counts),
        samples=tally.samples,
        kept=len(kept),
        problems_kept=len({item.problem for item in kept}),
        rules=rule_yields(tally.samples + tally.failed, tally.dropped, tally.broken),
        grades=dict(sorted(tally.grades.items())),
        format_breaks=dict(sorted(tally.format_breaks.items())),
        pass_rates=pass_rate_histogram(tally.pass_rates, config.selection.pass_rate_bins),
        sampled=corpus_statistics(tally.sampled),
        written=_written_statistics(answerer, paths) if kept else corpus_statistics([]),
    )
    with whole_file(paths.report) as out:
        out.write(json.dumps(report.to_json(), indent=2) + "\n")
    if not kept:
        print_drops(rich.console.Console(), report)
        fate = "was not written"
        if had_set:
            fate = f"of an earlier run was removed; {paths.rollouts} holds what it was made of"
        worst = max(report.rules, key=lambda rule: rule.dropped)
        raise UserError(
            f"nothing is kept of {report.samples} samples; the rule {worst.rule!r} dropped most "
            f"({worst.dropped}). {paths.dropped} says why, sample by sample; loosen selection.*, "
            f"or sample more. {paths.trajectories} {fate}"
        )
    print_report(rich.console.Console(), report)
    print(paths.trajectories)
    return report


def _require_own_folder(config: SelfTrainConfig, paths: OutputPaths) -> None:
    """Checks that the run replaces neither its problems nor the set of another run.

    What is selected, how answers are graded and how many there are may differ.

    Raises:
      UserError: it would.
    """
    for file in (paths.config, paths.trajectories, paths.dropped, paths.rejects, paths.report):
        require_other_files(config.problems, output=file)
    keys = ["problems", "server.url"]
    if not config.problems:
        keys.append("task")
    if config.server is None:
        keys.append("checkpoint")
    require_same_work(paths.config, config, keys, is_used=is_used(paths))


def _answerer(config: SelfTrainConfig) -> Answerer:
    """The engine on the run's model, or a server."""
    if config.server is None:
        model = load_run(config.checkpoint, config.step)
        return engine_answerer(model, config.checkpoint, config.engine)
    return remote_answerer(
        config.server,
        config.tokenizer,
        config.checkpoint,
        config.schema,
        os.environ,
        sequential_only=config.style == "sequential",
    )


def _work_through(
    config: SelfTrainConfig,
    answerer: Answerer,
    questions: Sequence[Question],
    grader: Grader,
    paths: OutputPaths,
    tally: Tally,
) -> None:
    """Samples, grades and tallies all questions, a round at a time."""
    total = len(questions) * config.samples_per_problem
    with shown_progress("sampling", total) as progress:
        for number, part in enumerate(rounds(questions, config.problems_per_round)):
            done = tally.samples + tally.failed
            sampled = _sample(
                config, answerer, part, paths.rollouts_of_round(number), done, progress
            )
            _take(config, answerer, part, number, sampled, grader, tally)
            if tally.failed > config.max_failed_share * total:
                raise UserError(
                    f"{tally.failed} of {total} samples failed, more than max_failed_share="
                    f"{config.max_failed_share:g} admits. {sampled.failure}. What is finished is "
                    f"in {paths.rollouts}; the same command goes on from there"
                )
            shares = {"correct": tally.correct_share, "kept": len(tally.kept)}
            progress.update(tally.samples + tally.failed, metrics=shares)


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """Rollouts of one round by number of the request; `failure` says why some are missing."""

    rollouts: Mapping[int, Rollout]
    failure: str = ""


def _sample(
    config: SelfTrainConfig,
    answerer: Answerer,
    questions: Sequence[Question],
    file: pathlib.Path,
    done: int,
    progress: ShownProgress,
) -> _Sampled:
    """Samples one round, question by question; `done` samples came before."""
    requests = [
        request
        for question in questions
        for request in question.requests(config.samples_per_problem, config.seed)
    ]
    finished: dict[int, Rollout] = {}

    def note(index: int, rollout: Rollout) -> None:
        finished[index] = rollout
        progress.update(done + len(finished), tokens=rollout.total_tokens)

    try:
        generate_resumably(
            file, requests, answerer.generate, source=answerer.source, on_finish=note
        )
    except ServerDownError:
        raise
    except UserError as error:
        # A client raises when all else is finished; the engine, before it begins.
        if config.server is None or not finished:
            raise
        return _Sampled(finished, str(error))
    return _Sampled(finished)


def _take(
    config: SelfTrainConfig,
    answerer: Answerer,
    questions: Sequence[Question],
    number: int,
    sampled: _Sampled,
    grader: Grader,
    tally: Tally,
) -> None:
    """Reads, grades and tallies the rollouts of one round."""
    samples, schema = config.samples_per_problem, answerer.schema
    reads = {
        index: read_rollout(
            rollout,
            questions[index // samples].problem,
            index % samples,
            answerer.tokenizer,
            schema,
        )
        for index, rollout in sorted(sampled.rollouts.items())
    }
    pairs = [
        (read.answer_text, questions[index // samples].problem.answer)
        for index, read in reads.items()
    ]
    grades = dict(
        zip(reads, grade_answers(grader, pairs, at_once=config.grading.at_once), strict=True)
    )
    first = number * config.problems_per_round
    for place, question in enumerate(questions):
        problem, own = question.problem, {}
        candidates = []
        for sample in range(samples):
            index = place * samples + sample
            if index not in reads:
                tally.fail(problem, first + place, sample, sampled.failure)
                continue
            own[sample] = reads[index]
            candidates.append(judged(first + place, sample, own[sample], grades[index], schema))
        if candidates:
            tally.take(config.selection, config.seed, problem, own, candidates)


def _written_statistics(answerer: Answerer, paths: OutputPaths) -> CorpusStatistics:
    """Reads the written set like any other, and counts it.

    Raises:
      RuntimeError: a line cannot be read back or is not strictly well-formed: a bug of ours.
    """
    tokenizer, schema, rejects = answerer.tokenizer, answerer.schema, Rejects(None)
    items = read_trajectories(paths.trajectories, schema, tokenizer, rejects, strict=True)
    statistics = corpus_statistics(
        [trajectory_statistics(item.trajectory, schema) for item in items]
    )
    if rejects.total:
        raise RuntimeError(f"{paths.trajectories} does not read back: {rejects.summary()}")
    return statistics
