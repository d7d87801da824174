"""What the calls that are still missing will cost.

An estimate: characters per token and tokens per answer are those of the answers so far where a
stage has some, else rules of thumb; traces whose blocks are not known yet get the published
averages (ThreadWeaver, arXiv 2512.07843, table 8).
"""

import dataclasses
from collections.abc import Iterable, Mapping

from tw_jax.data.rewrite.config import RewriteLimits
from tw_jax.data.rewrite.ledger import StageCost
from tw_jax.data.rewrite.prompts import STAGES, Prompt, Stage
from tw_jax.data.rewrite.trace_rewrite import Outcome, next_stage

BLOCKS_PER_TRACE = 6.26
THREADS_PER_BLOCK = 2.58
# A thread that is edited is looked at once more.
EDITED_THREADS = 0.3
CHARS_PER_TOKEN = 3.5
THREAD_CHARS = 541 * CHARS_PER_TOKEN  # 541 tokens per thread, table 8
ANSWER_TOKENS: Mapping[Stage, float] = {
    "steps": 2500,
    "groups": 700,
    "verify": 400,
    "references": 200,
    "outlines": 250,
}

ASSUMPTIONS = (
    f"assumed where nothing is known yet: {BLOCKS_PER_TRACE} blocks per trace and "
    f"{THREADS_PER_BLOCK} threads per block (the published averages), {EDITED_THREADS:.0%} of the "
    f"threads edited and looked at again, {CHARS_PER_TOKEN} characters per token, "
    + ", ".join(f"{tokens:g}" for tokens in ANSWER_TOKENS.values())
    + " tokens per answer of "
    + ", ".join(STAGES)
    + "; the first attempt succeeds"
)


@dataclasses.dataclass
class StageEstimate:
    """Calls that a stage still needs.

    Attributes:
      calls: how many.
      prompt_tokens: tokens of their prompts.
      answer_tokens: tokens of their answers.
    """

    calls: float = 0.0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0


def estimate_rest(
    outcomes: Iterable[Outcome],
    prompts: Mapping[str, Prompt],
    limits: RewriteLimits,
    costs: Mapping[str, StageCost],
) -> dict[Stage, StageEstimate]:
    """Estimates the calls of all unfinished traces.

    Blocks count as if none of their answers were there, so a run that is resumed inside a trace
    costs a little less than this says.

    Args:
      outcomes: what became of the traces so far.
      prompts: the prompts in use.
      limits: of the rewriting.
      costs: what the stages have cost so far.
    """
    rest: dict[Stage, StageEstimate] = {stage: StageEstimate() for stage in STAGES}
    for outcome in outcomes:
        if outcome.status != "unfinished":
            continue
        for stage, calls, material_chars in _calls(outcome, limits):
            chars = len(prompts["system"].text) + len(prompts[stage].text) + material_chars
            _add(rest[stage], calls, chars, ANSWER_TOKENS[stage], costs.get(stage))
    return rest


def _calls(outcome: Outcome, limits: RewriteLimits) -> Iterable[tuple[Stage, float, float]]:
    """Stage, number of calls and characters of material of each, for an unfinished trace."""
    trace, progress = outcome.trace, outcome.progress
    problem, reasoning = len(trace.prompt), len(trace.reasoning)
    missing = STAGES[STAGES.index(next_stage(progress)) :]
    whole = problem + reasoning + 6 * len(trace.lines)  # the line numbers
    context = problem + min(limits.context_chars, reasoning / 2)
    if "verify" in progress.passed:
        blocks = float(progress.blocks["verify"])
        found = progress.threads or [0]
        threads = blocks * sum(found) / len(found)
    elif "extraction" in progress.passed:
        blocks, threads = float(len(progress.threads)), float(sum(progress.threads))
    else:
        blocks = BLOCKS_PER_TRACE
        threads = blocks * THREADS_PER_BLOCK
    thread = min(THREAD_CHARS, reasoning / max(threads, 1.0))
    for stage in missing:
        if stage == "references":
            yield stage, (threads - blocks) * (1 + EDITED_THREADS), context + 2 * thread
        elif stage == "outlines":
            yield stage, blocks, context + thread * threads / max(blocks, 1.0)
        elif stage != "verify" or blocks:
            yield stage, 1.0, whole


def _add(
    estimate: StageEstimate,
    calls: float,
    chars: float,
    answer_tokens: float,
    cost: StageCost | None,
) -> None:
    per_token = CHARS_PER_TOKEN
    if cost is not None and cost.calls:
        answer_tokens = cost.answer_tokens / cost.calls
        per_token = cost.prompt_chars / max(cost.prompt_tokens, 1)
    estimate.calls += calls
    estimate.prompt_tokens += calls * chars / max(per_token, 0.1)
    estimate.answer_tokens += calls * answer_tokens
