"""One trace through all stages: steps, groups, extraction, verify, references, outlines, checks."""

import asyncio
import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from tw_jax.data.rewrite import answers
from tw_jax.data.rewrite.asker import Asker, NotAsked, StageFailed
from tw_jax.data.rewrite.config import RewriteLimits
from tw_jax.data.rewrite.conservation import Unconserved, require_conserved
from tw_jax.data.rewrite.edits import (
    Edit,
    RefusedEdit,
    changed_chars,
    replace_once,
    strip_edges,
)
from tw_jax.data.rewrite.extraction import Block, Drop, extract, span_text
from tw_jax.data.rewrite.outline_checks import outline_problem, tidy_outlines
from tw_jax.data.rewrite.prompts import Stage, numbered, tail
from tw_jax.data.rewrite.rendering import WrittenBlock, WrittenThread, plain_text, render
from tw_jax.data.rewrite.source import SourceTrace
from tw_jax.data.rewrite.spending import BudgetSpent
from tw_jax.data.rewrite.validation import Validator
from tw_jax.data.trajectory_file import TrajectoryRecord
from tw_jax.rollout.client_http import CallError

Status = Literal["written", "rejected", "unfinished"]


@dataclasses.dataclass
class TraceProgress:
    """How far a trace came; filled in as it goes.

    Attributes:
      passed: stages that are behind it, `extraction` and `checks` among them.
      blocks: number of blocks left behind a stage.
      threads: of each block that extraction found.
      drops: groups and blocks that stay sequential.
    """

    passed: list[str] = dataclasses.field(default_factory=list)
    blocks: dict[str, int] = dataclasses.field(default_factory=dict)
    threads: list[int] = dataclasses.field(default_factory=list)
    drops: list[Drop] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trace.

    Attributes:
      trace: the source.
      status: whether it is written, cannot be, or may be by a later run.
      kind: of reject, or why it is not finished; empty if written.
      message: in words.
      progress: how far it came.
      record: the rewritten trajectory; None if it is not written.
      blocks: provenance of the blocks, for JSON.
    """

    trace: SourceTrace
    status: Status
    kind: str
    message: str
    progress: TraceProgress
    record: TrajectoryRecord | None = None
    blocks: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class TraceRewriter:
    """What the stages need.

    Attributes:
      asker: asks the LLM.
      limits: what a rewritten trace may be.
      validator: the strict check.
      keep_sequential: traces without a block are written as they are.
    """

    asker: Asker
    limits: RewriteLimits
    validator: Validator
    keep_sequential: bool

    async def rewrite(self, trace: SourceTrace) -> Outcome:
        """Takes a trace through all stages. Whatever the LLM answers, this does not raise."""
        progress = TraceProgress()

        def outcome(status: Status, kind: str, message: str) -> Outcome:
            return Outcome(trace, status, kind, message, progress)

        try:
            blocks = await self._write_blocks(trace, progress)
        except StageFailed as failed:
            return outcome("rejected", failed.kind, str(failed))
        except BudgetSpent:
            return outcome("unfinished", "budget", "the next call does not fit into the budget")
        except NotAsked:
            return outcome("unfinished", "not_asked", "the next call was not made")
        except CallError as error:
            return outcome("unfinished", "call_failed", str(error))
        if not blocks and not self.keep_sequential:
            kinds = collections.Counter(drop.kind for drop in progress.drops)
            found = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
            return outcome(
                "rejected",
                "no_parallel_block",
                f"no block is left; dropped: {found or 'nothing, no group was found'}",
            )
        return self._checked(trace, blocks, progress)

    async def _write_blocks(
        self, trace: SourceTrace, progress: TraceProgress
    ) -> list[WrittenBlock]:
        lines = trace.lines
        candidates = await self._find_blocks(trace, progress)
        written: list[WrittenBlock] = []
        clean = 0
        for block in candidates:
            before = plain_text(lines, written, block.span.first)
            context = tail(before, self.limits.context_chars)
            try:
                threads = await self._clean_threads(trace, block, context)
                clean += 1
                outlines = await self._outlines(trace, threads, before, context)
            except StageFailed as failed:
                progress.drops.append(Drop(block.group, failed.kind, str(failed)))
            else:
                written.append(WrittenBlock(block, outlines, threads))
        progress.passed += ["references", "outlines"]
        progress.blocks |= {"references": clean, "outlines": len(written)}
        return written

    async def _find_blocks(self, trace: SourceTrace, progress: TraceProgress) -> list[Block]:
        """The stages that see the whole trace."""
        lines = trace.lines
        material = {"problem": trace.prompt, "trace": numbered(lines)}

        def steps_problem(answer: answers.StepsAnswer) -> str | None:
            for step in answer.steps:
                if not 1 <= step.first <= step.last <= len(lines):
                    return (
                        f"step {step.number} has lines {step.first} to {step.last}; the trace has "
                        f"lines 1 to {len(lines)}"
                    )
            return None if answer.steps else "there are no steps"

        steps = await self.asker.ask("steps", material, answers.StepsAnswer, steps_problem)
        progress.passed.append("steps")
        material["steps"] = _shown_steps(steps)
        groups = await self.asker.ask("groups", material, answers.GroupsAnswer)
        progress.passed.append("groups")
        progress.blocks["groups"] = len(groups.groups)
        blocks, drops = extract(lines, groups.as_groups(), self.limits.min_saved_chars)
        progress.passed.append("extraction")
        progress.drops += drops
        progress.blocks["extraction"] = len(blocks)
        progress.threads = [len(block.threads) for block in blocks]
        if blocks:
            blocks = await self._verified(material, blocks, progress)
        progress.passed.append("verify")
        progress.blocks["verify"] = len(blocks)
        return blocks

    async def _verified(
        self, material: dict[str, str], blocks: Sequence[Block], progress: TraceProgress
    ) -> list[Block]:
        """Blocks that the LLM, asked to be sceptical, keeps; one without a verdict is dropped."""

        def problem(answer: answers.VerifyAnswer) -> str | None:
            judged = [verdict.block for verdict in answer.verdicts]
            if wrong := [block for block in judged if not 1 <= block <= len(blocks)]:
                return f"there is no block {wrong[0]}; blocks are numbered 1 to {len(blocks)}"
            return "a block has two verdicts" if len(set(judged)) < len(judged) else None

        material = {**material, "blocks": _shown_blocks(blocks)}
        del material["steps"]
        answer = await self.asker.ask("verify", material, answers.VerifyAnswer, problem)
        verdicts = {verdict.block: verdict for verdict in answer.verdicts}
        kept = []
        for number, block in enumerate(blocks, start=1):
            verdict = verdicts.get(number)
            if verdict is not None and verdict.keep:
                kept.append(block)
            else:
                reason = "no verdict" if verdict is None else verdict.reason
                progress.drops.append(Drop(block.group, "not_independent", reason))
        return kept

    async def _clean_threads(
        self, trace: SourceTrace, block: Block, context: str
    ) -> tuple[WrittenThread, ...]:
        """The threads, without references to earlier siblings."""
        stripped = [strip_edges(span_text(trace.lines, span)) for span in block.threads]
        # Not cancelled when one of them fails: their answers are paid for, and are kept.
        results = await asyncio.gather(
            *(
                self._clean_thread(trace, [text for text, _ in stripped[: i + 1]], context)
                for i in range(len(stripped))
            ),
            return_exceptions=True,
        )
        threads = []
        for span, (_, edges), result in zip(block.threads, stripped, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            text, edits = result
            threads.append(WrittenThread(span, text, (*edges, *edits)))
        return tuple(threads)

    async def _clean_thread(
        self, trace: SourceTrace, texts: Sequence[str], context: str
    ) -> tuple[str, tuple[Edit, ...]]:
        """The last of `texts`, without references to those before it, and what was changed."""
        *siblings, text = texts
        if not siblings:
            return text, ()
        material = {
            "problem": trace.prompt,
            "context": context,
            "siblings": _shown_threads(siblings),
        }
        edits: tuple[Edit, ...] = ()
        left = self.limits.max_changed_share * len(text)
        for rounds_left in range(self.limits.max_rounds, -1, -1):
            is_last = rounds_left == 0

            def replaced(
                answer: answers.ReferencesAnswer, text: str = text, left: float = left
            ) -> tuple[str, tuple[Edit, ...]]:
                return replace_once(
                    text,
                    [(r.find, r.replace, r.reason) for r in answer.replacements],
                    max_changed_chars=left,
                    tags=self.validator.control_tags,
                )

            def problem(
                answer: answers.ReferencesAnswer, is_last: bool = is_last, replaced: Any = replaced
            ) -> str | None:
                if is_last or not answer.replacements:
                    return None
                try:
                    changed, _ = replaced(answer)
                except RefusedEdit as refused:
                    return str(refused)
                return self._unknown_problem(changed)

            answer = await self.asker.ask(
                "references", {**material, "thread": text}, answers.ReferencesAnswer, problem
            )
            if not answer.replacements:
                return text, edits
            if not is_last:
                text, new = replaced(answer)
                left -= changed_chars((edit.find, edit.replace) for edit in new)
                edits += new
        raise StageFailed(
            "references",
            "still_refers",
            f"a thread refers to its siblings after {self.limits.max_rounds} rounds of edits",
        )

    async def _outlines(
        self, trace: SourceTrace, threads: Sequence[WrittenThread], before: str, context: str
    ) -> tuple[str, ...]:
        texts = [thread.text for thread in threads]

        def problem(answer: answers.OutlinesAnswer) -> str | None:
            outlines = tidy_outlines(answer.outlines)
            return self._unknown_problem(" ".join(outlines)) or outline_problem(
                outlines,
                texts,
                f"{trace.prompt}\n{before}",
                max_outline_chars=self.limits.max_outline_chars,
                tags=self.validator.control_tags,
            )

        material = {
            "problem": trace.prompt,
            "context": context,
            "threads": _shown_threads(texts),
        }
        answer = await self.asker.ask("outlines", material, answers.OutlinesAnswer, problem)
        return tuple(tidy_outlines(answer.outlines))

    def _unknown_problem(self, text: str) -> str | None:
        """Complains of characters in an answer that the tokenizer has no token for."""
        unknown = self.validator.unknown_characters(text)
        return f"the characters {', '.join(map(repr, unknown))} cannot be used" if unknown else None

    def _checked(
        self, trace: SourceTrace, blocks: Sequence[WrittenBlock], progress: TraceProgress
    ) -> Outcome:
        """Nothing is written that is not canonical, or does not lead back to its source."""
        text = render(trace.lines, blocks)
        records = tuple(_block_record(block) for block in blocks)
        record = trace.with_reasoning(text)
        kind, problem = "invalid_format", None
        try:
            require_conserved(trace.reasoning, text, records)
            problem = self.validator.problem(record, len(blocks))
        except Unconserved as error:
            kind, problem = "unconserved", str(error)
        if problem is not None:
            return Outcome(trace, "rejected", kind, problem, progress)
        progress.passed.append("checks")
        progress.blocks["checks"] = len(blocks)
        return Outcome(trace, "written", "", "", progress, record, records)


def next_stage(progress: TraceProgress) -> Stage:
    """The first stage that asks the LLM and is not behind a trace."""
    stages: tuple[Stage, ...] = ("steps", "groups", "verify", "references")
    return next(stage for stage in stages if stage not in progress.passed)


def _block_record(written: WrittenBlock) -> dict[str, Any]:
    """Provenance of a block: what leads back from the text to the source."""
    return {
        "group": written.block.group,
        "reason": written.block.reason,
        "outlines": list(written.outlines),
        "threads": [
            {
                "first": thread.span.first,
                "last": thread.span.last,
                "edits": [dataclasses.asdict(edit) for edit in thread.edits],
            }
            for thread in written.threads
        ],
    }


def _shown_steps(answer: answers.StepsAnswer) -> str:
    lines = []
    for step in answer.steps:
        needs = ", ".join(map(str, step.depends_on)) or "nothing"
        lines.append(
            f"Step {step.number} (L{step.first} to L{step.last}; needs {needs}): {step.summary}"
        )
        lines += [f"  L{sub.first} to L{sub.last}: {sub.summary}" for sub in step.substeps]
    return "\n".join(lines)


def _shown_blocks(blocks: Sequence[Block]) -> str:
    lines = []
    for number, block in enumerate(blocks, start=1):
        lines.append(f"Block {number}: {block.reason}")
        lines += [
            f"  thread {place}: L{thread.first} to L{thread.last}"
            for place, thread in enumerate(block.threads, start=1)
        ]
    return "\n".join(lines)


def _shown_threads(texts: Sequence[str]) -> str:
    return "\n\n".join(f"Thread {n}:\n{text}" for n, text in enumerate(texts, start=1))
