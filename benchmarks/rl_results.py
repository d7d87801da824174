"""The tables of docs/rl.md, from `benchmarks/results/`; written by `benchmarks.readme_results`."""

from collections.abc import Mapping
from typing import Any

_OBJECTIVES = {
    "start": "start",
    "pgrpo": "P-GRPO: centred",
    "std": "P-GRPO, divided by the group's deviation",
    "papo": "`papo`",
    "dapo": "`dapo`",
}


def update_table(update: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    """Tokens and time of an update, and of a whole step beside a peer."""
    paper, scaled, seconds = update["paper"], update["scaled"], update["update_s"]
    forest, calls = sorted(seconds["forest"])[1], sorted(seconds["one_row_per_call"])[1]
    rows = [
        (
            f"tokens through the update: 8 rollouts of {paper['tokens_per_rollout']:,.0f} tokens "
            "in the paper's shape",
            f"{paper['forest_tokens']:,}",
            f"{paper['one_row_per_call_tokens']:,}, one row per call",
            update["token_ratio"],
        ),
        (
            f"seconds of an update: rollouts of {scaled['tokens_per_rollout']:,.0f} tokens",
            f"{forest:.2f}",
            f"{calls:.2f}, one row per call",
            update["time_ratio"],
        ),
        (
            "seconds of a whole GRPO step: 3.3M parameters, 4 prompts x 8 rollouts x 128 tokens",
            f"{step['ours_step_s']:.2f}",
            f"{step['peer_step_s']:.2f}, google-tunix",
            step["ratio"],
        ),
    ]
    lines = ["| two CPU cores, float32, in one run each | ours | | ratio |", "|---|---|---|---|"]
    lines += [f"| {what} | {ours} | {theirs} | {r:.2f} |" for what, ours, theirs, r in rows]
    error = update["gradient_rel_error"]
    return "\n".join(
        [
            *lines,
            "",
            f"The gradients of the two updates differ by {error:.1e}, relative. "
            "`python -m benchmarks update`, `python -m benchmarks rl --peer tunix`.",
        ]
    )


def objectives_table(found: Mapping[str, Any]) -> str:
    """Accuracy, critical path and style by objective: means, and every seed."""
    lines = [
        f"| {found['steps']} steps, {found['problems']} held-out problems per seed | accuracy | "
        "by seed | critical path | by seed | parallel | well-formed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in _OBJECTIVES.items():
        mean, seeds = found["mean"][name], list(found["by_seed"][name].values())
        cells = (
            title,
            f"{mean['accuracy']:.3f}",
            ", ".join(f"{seed['accuracy']:.3f}" for seed in seeds),
            f"{mean['critical_path']:.1f}",
            ", ".join(f"{seed['critical_path']:.1f}" for seed in seeds),
            f"{mean['activation_ratio']:.2f}",
            f"{mean['format_valid_rate']:.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _comparison(found)])


def _comparison(found: Mapping[str, Any]) -> str:
    """What dividing by the deviation does, in a sentence."""
    centred, divided = (list(found["by_seed"][name].values()) for name in ("pgrpo", "std"))
    fewer = [c["accuracy"] - d["accuracy"] for c, d in zip(centred, divided, strict=True)]
    longer = [
        d["critical_path"] - c["critical_path"] for c, d in zip(centred, divided, strict=True)
    ]
    accuracy = found["mean"]["pgrpo"]["accuracy"]
    error = 100 * (2 * accuracy * (1 - accuracy) / found["problems"]) ** 0.5
    return (
        f"Divided by the deviation, the accuracy is lower with {sum(x > 0 for x in fewer)} of "
        f"{len(fewer)} seeds, by {100 * sum(fewer) / len(fewer):.1f} points in the mean (standard "
        f"error of one difference: {error:.1f}); the critical path is longer with "
        f"{sum(x > 0 for x in longer)} of {len(longer)}, by {sum(longer) / len(longer):.1f} tokens "
        "in the mean."
    )
