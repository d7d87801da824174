"""`make quickstart`: a small Qwen3 learns to think in parallel, then gets better by P-GRPO.

1. SFT teaches both styles of a task on trie-packed trajectories. On the way, the first model that
   solves about half of the problems under sampling is set aside.
2. The finished SFT model is measured greedily with each style forced: accuracy and token latency.
3. P-GRPO improves the model that was set aside, which parallelises about half of the time.
4. Both are measured under sampling, in free and in forced style; a report shows it all.

Every stage resumes: started again after any interruption, the same command goes on.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from tw_jax.config import to_yaml
from tw_jax.errors import UserError
from tw_jax.evals.evaluate import evaluate
from tw_jax.evals.metrics import RolloutRecord, Style, summarize, token_latency_speedup
from tw_jax.evals.sample import sample_from_rollout
from tw_jax.evals.wall_clock import measure_wall_clock, wall_clock_engines
from tw_jax.rewards.grading import grade
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.rollout.request import SamplingParams
from tw_jax.rollout.rollout import Rollout
from tw_jax.tasks.registry import make_task
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.rl import run_rl
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import LoadedModel, has_checkpoint, load_run, new_model, save_model
from tw_jax.train.sft import SFTConfig, run_sft
from tw_jax.train.stage_minutes import StageMinutes
from tw_jax.view.report import ReportData, points_from_summary, write_report


@dataclasses.dataclass(frozen=True)
class RLStartConfig:
    """Which model of the SFT run P-GRPO starts from: the first that is good enough under sampling.

    Attributes:
      from_step: first SFT step that is tried.
      every: SFT steps between tries.
      problems: held-out problems per try.
      accuracy: sampled accuracy that is good enough.
      min_activation_ratio: smallest share of parallel rollouts. The share swings from step to step
        while the learning rate is high; RL should have both styles to choose from.
      max_activation_ratio: largest share of parallel rollouts.
    """

    from_step: int = 400
    every: int = 25
    problems: int = 128
    accuracy: float = 0.5
    min_activation_ratio: float = 0.4
    max_activation_ratio: float = 0.6


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """How the models are measured, on held-out problems.

    Attributes:
      greedy_problems: problems per forced style after SFT.
      sampled_problems: problems per style before and after RL, at temperature 1.
      wall_clock_problems: problems timed one at a time.
      wall_clock_repeats: runs of each timed problem; the median counts.
    """

    greedy_problems: int = 512
    sampled_problems: int = 512
    wall_clock_problems: int = 8
    wall_clock_repeats: int = 5


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """The whole demonstration.

    Attributes:
      run_dir: folder of everything; the stages' own folders are made inside it.
      seed: seed of every stage.
      sft: the fine-tuning stage; its run_dir and seed are set from here.
      rl_start: which SFT model RL starts from.
      rl: the RL stage, on the task of `sft`; its run_dir, seed, task and init_from are set from
        here. steps 0 leaves the stage out.
      measure: how models are measured; rollouts use the engine and sampling sizes of `rl`.
    """

    run_dir: str = "runs/quickstart"
    seed: int = 0
    sft: SFTConfig = SFTConfig()
    rl_start: RLStartConfig = RLStartConfig()
    rl: RLConfig = RLConfig()
    measure: MeasureConfig = MeasureConfig()


def run_quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Runs all stages and writes `summary.json`, `report.json` and `report.html`.

    Returns:
      The summary; empty where a signal stopped a stage, which has saved its work then.

    Raises:
      UserError: unusable configuration.
    """
    try:
        return _Quickstart(config).run()
    except _Interrupted:
        return {}


def run_first_stage(config: QuickstartConfig) -> RLConfig:
    """Runs the SFT stage alone, or takes it from a folder where it has run.

    Returns:
      Settings of the RL stage that would start from it.

    Raises:
      UserError: unusable configuration, or a signal stopped the stage.
    """
    stages = _Quickstart(config)
    stages.root.mkdir(parents=True, exist_ok=True)
    try:
        stages.train_sft()
    except _Interrupted:
        raise UserError("stopped by a signal; the same command goes on") from None
    return stages.rl


class _Interrupted(Exception):
    """A stage was stopped by a signal and has saved what it had."""


def _on_one_device(params: Any) -> Any:
    """Parameters where rollouts run; training may have spread them over all devices."""
    return jax.device_put(params, jax.devices()[0])


class _Quickstart:
    """The stages, with what they share: folder, engine, console and clock."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.root = pathlib.Path(config.run_dir)
        self.sft = dataclasses.replace(config.sft, run_dir=str(self.root / "sft"), seed=config.seed)
        self.rl = dataclasses.replace(
            config.rl,
            run_dir=str(self.root / "rl"),
            init_from=str(self.root / "rl_start"),
            init_step=None,
            task=config.sft.task,
            seed=config.seed,
        )
        self.task = make_task(config.sft.task)
        self.console = Console()
        self.minutes = StageMinutes(self.root / "minutes.json")
        model = new_model(config.sft.model, config.seed)
        self.engine = RolloutEngine(model.graphdef, model.schema, config.rl.engine)

    def run(self) -> dict[str, Any]:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        sft_model = self.train_sft()
        summary: dict[str, Any] = {"seed": self.config.seed, "task": self.sft.task.name}
        summary["sft"], speedups, rollouts = self._measure_sft(sft_model)
        samples = [
            self._sample(sft_model, "sequential", rollouts["sequential"][0], 0),
            self._sample(sft_model, "parallel", rollouts["parallel"][0], 0),
        ]
        with self.minutes.of("wall clock"):
            summary |= self._measure_wall_clock(sft_model)
        if self.rl.steps:
            summary["rl"], after = self._train_rl(summary)
            samples.append(after)
        summary["minutes"] = self.minutes.total()
        summary["stage_minutes"] = self.minutes.by_stage()
        self._write(summary, speedups, samples)
        return summary

    def train_sft(self) -> LoadedModel:
        self._say("1/4  SFT: learning both styles on trie-packed trajectories")
        start_dir = self.root / "rl_start"

        def try_start(step: int, params: Any) -> None:
            start = self.config.rl_start
            if step < start.from_step or has_checkpoint(start_dir):
                return
            records, _ = self._evaluate(
                model, params, "free", self.config.rl.sampling, start.problems
            )
            tried = summarize(records)
            self.console.print(
                f"[dim]step {step}: sampled accuracy {tried.accuracy:.2f}, "
                f"parallel in {tried.activation_ratio:.0%}[/dim]"
            )
            both_styles = (
                start.min_activation_ratio <= tried.activation_ratio <= start.max_activation_ratio
            )
            if tried.accuracy >= start.accuracy and both_styles:
                save_model(start_dir, dataclasses.replace(model, step=step), params)

        model = new_model(self.sft.model, self.config.seed)
        hooks = [(self.config.rl_start.every, try_start)] if self.rl.steps else []
        with self.minutes.of("sft"):
            result = run_sft(self.sft, hooks)
        if result.interrupted:
            raise _Interrupted
        if self.rl.steps and not has_checkpoint(start_dir):
            save_model(start_dir, result.model, result.model.params)
        return result.model

    def _measure_sft(
        self, model: LoadedModel
    ) -> tuple[dict[str, Any], Sequence[float], Mapping[str, Sequence[Rollout]]]:
        self._say("2/4  Measuring the SFT model, greedy, style forced")
        greedy = dataclasses.replace(self.config.rl.sampling, temperature=0.0)
        records: dict[str, list[RolloutRecord]] = {}
        rollouts: dict[str, list[Rollout]] = {}
        styles: tuple[Style, ...] = ("sequential", "parallel")
        with self.minutes.of("measure sft"):
            for style in styles:
                records[style], rollouts[style] = self._evaluate(
                    model, model.params, style, greedy, self.config.measure.greedy_problems
                )
        speedup = token_latency_speedup(records["sequential"], records["parallel"])
        result: dict[str, Any] = {
            style: summarize(found).to_json() for style, found in records.items()
        }
        details = speedup.to_json()
        result["token_latency_speedup"] = details.pop("mean")
        details.pop("per_problem")
        result["token_latency_speedup_details"] = details
        for style in styles:
            shown = result[style]
            self._say(
                f"     {style}: accuracy {shown['accuracy']:.3f}, "
                f"critical path {shown['critical_path']:.1f} tokens"
            )
        self._say(f"     token-latency speedup {speedup.mean:.2f}x")
        return result, list(speedup.per_problem.values()), rollouts

    def _measure_wall_clock(self, model: LoadedModel) -> dict[str, Any]:
        greedy = dataclasses.replace(self.config.rl.sampling, temperature=0.0)
        timed = measure_wall_clock(
            wall_clock_engines(model, self.config.rl.engine, greedy),
            _on_one_device(model.params),
            model.schema,
            model.tokenizer,
            self.task,
            split="heldout",
            count=self.config.measure.wall_clock_problems,
            sampling=greedy,
            seed=self.config.seed,
            repeats=self.config.measure.wall_clock_repeats,
        )
        details = timed.to_json()
        return {
            "wall_clock_speedup": timed.speedup.mean,
            "wall_clock": {style: details[style] for style in ("sequential", "parallel")},
        }

    def _train_rl(self, summary: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        before = load_run(self.rl.init_from)
        result: dict[str, Any] = {"start_step": before.step}
        with self.minutes.of("measure rl"):
            result |= self._measure_rl("before", before)[0]
        self._say("3/4  P-GRPO: rewarding right answers and short critical paths")
        with self.minutes.of("rl"):
            trained = run_rl(self.rl)
        if trained.interrupted:
            raise _Interrupted
        self._say("4/4  Measuring before and after, sampled at temperature 1")
        with self.minutes.of("measure rl"):
            after, rollouts = self._measure_rl("after", trained.model)
        result |= after
        result["critical_path_change"] = (
            result["after"]["critical_path"] / result["before"]["critical_path"] - 1
        )
        result["accuracy_change"] = result["after"]["accuracy"] - result["before"]["accuracy"]
        steps = read_metrics(pathlib.Path(self.rl.run_dir) / "metrics.jsonl")
        result["logprob_max_abs_diff"] = max(row["logprob_abs_diff_max"] for row in steps)
        index = next((i for i, r in enumerate(rollouts) if r.trajectory.blocks), 0)
        sample = self._sample(trained.model, "free", rollouts[index], index)
        return result, sample

    def _measure_rl(
        self, when: str, model: LoadedModel
    ) -> tuple[dict[str, Any], Sequence[Rollout]]:
        """Summaries of the free and the forced styles under sampling."""
        result, free = {}, []
        styles: tuple[Style, ...] = ("free", "sequential", "parallel")
        for style in styles:
            records, rollouts = self._evaluate(
                model,
                model.params,
                style,
                self.config.rl.sampling,
                self.config.measure.sampled_problems,
            )
            name = when if style == "free" else f"{when}_{style}"
            result[name] = summarize(records).to_json()
            free = rollouts if style == "free" else free
        shown = result[when]
        self._say(
            f"     {when} RL: accuracy {shown['accuracy']:.3f}, parallel in "
            f"{shown['activation_ratio']:.0%}, critical path {shown['critical_path']:.1f} tokens"
        )
        return result, free

    def _evaluate(
        self, model: LoadedModel, params: Any, style: Style, sampling: SamplingParams, count: int
    ) -> tuple[list[RolloutRecord], list[Rollout]]:
        return evaluate(
            self.engine,
            _on_one_device(params),
            model.schema,
            model.tokenizer,
            self.task,
            split="heldout",
            count=count,
            style=style,
            sampling=sampling,
            seed=self.config.seed,
        )

    def _sample(
        self, model: LoadedModel, style: Style, rollout: Rollout, problem: int
    ) -> dict[str, Any]:
        graded = grade(
            rollout,
            self.task.problem("heldout", problem, self.config.seed),
            self.task,
            model.tokenizer,
            model.schema,
        )
        return sample_from_rollout(
            rollout, model.tokenizer, style=style, answer=graded.answer, correct=graded.correct
        )

    def _write(
        self,
        summary: dict[str, Any],
        speedups: Sequence[float],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        curves = {
            stage: read_metrics(self.root / stage / "metrics.jsonl")
            for stage in ("sft", "rl")
            if (self.root / stage / "metrics.jsonl").exists()
        }
        if "rl" in summary:
            summary["logprob_max_abs_diff"] = summary["rl"].pop("logprob_max_abs_diff")
        data = ReportData(
            title=f"tw_jax quickstart: {self.sft.task.name}",
            summary=summary,
            curves=curves,
            points=points_from_summary(summary),
            speedups=speedups,
            samples=samples,
            config_yaml=to_yaml(self.config),
        )
        (self.root / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        (self.root / "report.json").write_text(json.dumps(data.to_json()), encoding="utf-8")
        write_report(self.root / "report.html", data)
        self._say(f"Done in {summary['minutes']:.1f} minutes. Open {self.root / 'report.html'}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)
