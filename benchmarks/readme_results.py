"""Writes the README's results from `benchmarks/results/`, so that no number is typed by hand.

Run `python -m benchmarks.readme_results` after new results; a test keeps README and files equal.
"""

import json
import pathlib
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def results_block() -> str:
    """The README's results section as Markdown."""
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("quickstart_seed*.json"))
    ]
    lines = [
        "`make quickstart` on two CPU cores, 512 held-out problems per style, one column per seed.",
        "The first column is the seed in the config; RL starts from an earlier SFT checkpoint that",
        "still makes mistakes. Seed 0 had the two cores almost to itself; the other runs shared",
        "them with other work, which their minutes show.",
        "",
        "| | " + " | ".join(f"seed {run['seed']}" for run in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    for name, cell in _ROWS:
        lines.append(f"| {name} | " + " | ".join(cell(run) for run in runs) + " |")
    sums_file = RESULTS / "sum_of_products.json"
    if not sums_file.exists():
        return "\n".join(lines)
    sums = json.loads(sums_file.read_text(encoding="utf-8"))["sft"]
    lines += [
        "",
        "The same SFT on `sum_of_products` (`tw-jax quickstart configs/sum_of_products.yaml`): "
        f"accuracy {sums['sequential']['accuracy']:.3f} sequential, "
        f"{sums['parallel']['accuracy']:.3f} parallel; token-latency speedup "
        f"{sums['token_latency_speedup']:.2f}x.",
    ]
    return "\n".join(lines)


def _accuracy(style: dict[str, Any]) -> str:
    low, high = style["accuracy_interval"]
    return f"{style['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def _change(run: dict[str, Any], key: str, digits: int) -> str:
    before, after = run["rl"]["before"][key], run["rl"]["after"][key]
    return f"{before:.{digits}f} -> {after:.{digits}f}"


_ROWS = (
    ("accuracy after SFT, sequential, greedy [95%]", lambda r: _accuracy(r["sft"]["sequential"])),
    ("accuracy after SFT, parallel, greedy [95%]", lambda r: _accuracy(r["sft"]["parallel"])),
    ("token-latency speedup", lambda r: f"{r['sft']['token_latency_speedup']:.2f}x"),
    ("wall-clock speedup at batch 1 on this CPU", lambda r: f"{r['wall_clock_speedup']:.2f}x"),
    ("RL: sampled accuracy", lambda r: _change(r, "accuracy", 3)),
    ("RL: share of parallel rollouts", lambda r: _change(r, "activation_ratio", 2)),
    ("RL: critical path, tokens", lambda r: _change(r, "critical_path", 1)),
    ("RL: well-formed after", lambda r: f"{r['rl']['after']['format_valid_rate']:.3f}"),
    (
        "largest sampler-trainer log-probability difference",
        lambda r: f"{r['logprob_max_abs_diff']:.1e}",
    ),
    ("minutes", lambda r: f"{r['minutes']:.1f}"),
)


def with_results(readme: str) -> str:
    """The README with its results section rewritten."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{results_block()}\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")
