"""The tables of docs/rl.md, from `benchmarks/results/`; written by `benchmarks.readme_results`."""

from collections.abc import Mapping
from typing import Any


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
