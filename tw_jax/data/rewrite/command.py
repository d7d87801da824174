"""`tw-jax data rewrite`: sequential traces in, validated parallel trajectories out."""

import asyncio
import collections
import os
from collections.abc import Mapping, Sequence

from rich.console import Console

from tw_jax import config as configs
from tw_jax.data.progress import counted, shown_progress
from tw_jax.data.rejects import Rejects
from tw_jax.data.rewrite.asker import TRACE_STAGES, Asker
from tw_jax.data.rewrite.config import RewriteConfig
from tw_jax.data.rewrite.estimate import estimate_rest
from tw_jax.data.rewrite.ledger import Ledger
from tw_jax.data.rewrite.output import OutputPaths, output_paths, own_files, write_results
from tw_jax.data.rewrite.prompts import Prompt, load_prompts
from tw_jax.data.rewrite.report import estimate_table, is_anything_done, yield_table, yields
from tw_jax.data.rewrite.source import SourceTrace, read_traces
from tw_jax.data.rewrite.spending import Purse
from tw_jax.data.rewrite.trace_rewrite import Outcome, TraceRewriter
from tw_jax.data.rewrite.validation import Validator, load_validator
from tw_jax.data.used_folder import require_same_work
from tw_jax.data.whole_file import require_other_files, whole_file
from tw_jax.errors import UserError
from tw_jax.rollout.client_http import Server, key_in

UNFINISHED_STATUS = 1
# Kinds of rejects of traces that were given up for want of an answer that can be used.
_UNUSABLE = tuple(f"{stage}_failed" for stage in TRACE_STAGES)


def run_rewrite(config: RewriteConfig) -> int:
    """Rewrites the traces of a source.

    Returns:
      The exit status: 0 if every trace is written or rejected (or in a dry run), 1 if some are
      not finished, or none is written.

    Raises:
      UserError: the input, the server or the folder cannot be used, or no answer can. What was
        finished before is written.
    """
    api_key = None if config.dry_run else key_in(os.environ, config.server.api_key_env)
    console = Console()
    paths = output_paths(config.output, config.dry_run)
    _require_own_folder(config, paths)
    validator = load_validator(config.tokenizer)
    _make_folder(config)
    if not config.dry_run:
        with whole_file(paths.config) as out:
            out.write(configs.to_yaml(config))
    rejects = Rejects(paths.rejects, sources=config.inputs)
    traces = _good_traces(config, validator, rejects)
    at_input = rejects.total
    prompts = load_prompts()
    with Ledger(paths.answers, read_only=config.dry_run) as ledger:
        outcomes, fatal = asyncio.run(
            _rewrite_all(config, traces, validator, prompts, ledger, api_key, console)
        )
        costs = ledger.costs()
    if not config.dry_run:
        write_results(
            paths,
            outcomes,
            rejects,
            costs,
            model=config.server.model,
            prompts=prompts,
        )
    rows = yields(outcomes, costs)
    if config.dry_run or fatal is None or is_anything_done(rows):
        console.print(yield_table(len(traces), at_input, rows))
    if config.dry_run:
        _say(console, f"{len(traces)} traces to rewrite, {rejects.summary()}")
        rest = estimate_rest(outcomes, prompts, config.limits, costs)
        console.print(estimate_table(rest, config.server))
        return 0
    unfinished = collections.Counter(o.kind for o in outcomes if o.status == "unfinished")
    written = sum(outcome.status == "written" for outcome in outcomes)
    rejected = f"{rejects.summary()}{_how_to_ask_again(rejects.counts)}"
    _say(console, f"{paths.trajectories}: {written} trajectories written, {rejected}")
    if fatal is not None:
        raise UserError(
            f"{_sentence(str(fatal))} Stopped with {unfinished.total()} traces not finished; what "
            "was finished is written, and the same command goes on from there"
        )
    if unfinished:
        _say(console, _how_to_go_on(unfinished))
    elif not written:
        _say(console, f"no trace could be rewritten; {paths.rejects} says why, trace by trace")
    return UNFINISHED_STATUS if unfinished or not written else 0


def _require_own_folder(config: RewriteConfig, paths: OutputPaths) -> None:
    """Checks that the run replaces neither what it reads nor the results of another one.

    Raises:
      UserError: it would.
    """
    for file in own_files(config.output):
        require_other_files(config.inputs, output=file)
    is_used = paths.trajectories.exists() and paths.trajectories.stat().st_size > 0
    if not is_used:
        with Ledger(paths.answers, read_only=True) as ledger:
            is_used = ledger.total().calls > 0
    require_same_work(paths.config, config, ("inputs", "columns"), is_used=is_used)


def _good_traces(
    config: RewriteConfig, validator: Validator, rejects: Rejects
) -> list[SourceTrace]:
    """All good traces, read before anything is spent.

    Raises:
      UserError: there is none, or more of the input is bad than admitted.
    """
    traces = []
    for trace in counted(read_traces(config, validator, rejects), "reading"):
        traces.append(trace)
        if len(traces) == config.max_traces:
            break
    rejects.require_share(len(traces), config.max_reject_share)
    if not traces:
        names = ", ".join(config.inputs)
        raise UserError(f"{names}: there is no trace to rewrite: {rejects.summary()}")
    return traces


async def _rewrite_all(
    config: RewriteConfig,
    traces: Sequence[SourceTrace],
    validator: Validator,
    prompts: Mapping[str, Prompt],
    ledger: Ledger,
    api_key: str | None,
    console: Console,
) -> tuple[list[Outcome], UserError | None]:
    """Outcomes in the order of the traces, and what stopped the run, if something did."""
    settings, spent = config.server, ledger.total()
    purse = Purse(config.budget, spent.usd, spent.tokens)
    outcomes: dict[int, Outcome] = {}
    async with Server(
        settings.url,
        api_key=api_key,
        concurrency=settings.concurrency,
        call_timeout_s=settings.call_timeout_s,
        retry=settings.retry,
    ) as server:
        asker = Asker(
            settings,
            prompts,
            ledger,
            purse,
            None if config.dry_run else server,
            config.limits,
        )
        rewriter = TraceRewriter(asker, config.limits, validator, config.keep_sequential)
        waiting = collections.deque(enumerate(traces))

        with shown_progress("rewriting", len(traces), unit="traces", console=console) as progress:

            async def work() -> None:
                while waiting:
                    index, trace = waiting.popleft()
                    outcomes[index] = await rewriter.rewrite(trace)
                    spent = {"tokens": purse.tokens, "USD": purse.usd}
                    progress.update(len(outcomes), metrics=spent)

            # As many traces as calls: most of the time each waits for one.
            await asyncio.gather(*(work() for _ in range(min(settings.concurrency, len(traces)))))
    return [outcomes[index] for index in range(len(traces))], asker.fatal


def _make_folder(config: RewriteConfig) -> None:
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={config.output}: the folder cannot be made: {error.strerror}; choose another"
        ) from error


def _how_to_go_on(unfinished: collections.Counter[str]) -> str:
    remedies = {
        "budget": "raise budget.max_usd or budget.max_tokens",
        "call_failed": "see whether server.url is right and the server busy or down, or raise "
        "server.retry.retries",
        "not_asked": "see why the run stopped",
    }
    kinds = ", ".join(f"{count} {kind} ({remedies[kind]})" for kind, count in unfinished.items())
    return (
        f"{unfinished.total()} traces are not finished: {kinds}; run the same command again: what "
        "was paid for is kept and is not asked again"
    )


def _how_to_ask_again(rejects: Mapping[str, int]) -> str:
    """What can be done for traces without a usable answer; "" if there are none."""
    count = sum(rejects.get(kind, 0) for kind in _UNUSABLE)
    if not count:
        return ""
    return f"; {count} got no usable answer: raise limits.attempts to ask again for them"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
