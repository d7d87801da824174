"""Writes the results in the README and docs from `benchmarks/results/`: no number is typed by hand.

Run `python -m benchmarks.readme_results` after new results; a test keeps pages and files equal.
"""

import json
import pathlib
from typing import Any

from benchmarks.rl_results import objectives_table, update_table

RESULTS = pathlib.Path(__file__).parent / "results"
README = pathlib.Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def results_block() -> str:
    """The README's results section as Markdown."""
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("quickstart_seed*.json"))
    ]
    lines = [
        "`make quickstart` on two CPU cores, 512 held-out problems per style, one column per seed.",
        "The first column is the seed in the config; RL starts from an earlier SFT checkpoint that",
        "still makes mistakes. Other work ran beside all of them, so a quiet machine is quicker.",
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


def decoding_block() -> str:
    """The README's table of decoding beside peers, and of forking and joining."""
    tunix, hf, fork = (_result(name) for name in ("rollout_tunix", "rollout_hf", "forkjoin"))
    lines = [
        "| tokens per second, in one run, two CPU cores | tw_jax | peer | ratio |",
        "|---|---|---|---|",
    ]
    for what, run, key in (
        ("google-tunix: 3.3M parameters, 16 rows, float32", tunix, "tiny"),
        ("google-tunix: 100M parameters, 16 rows, each in its faster dtype", tunix, "100m"),
        ("google-tunix: 256 requests of 32 to 512 tokens, 16 rows, float32", tunix, "mixed"),
        (
            "transformers: 3.3M parameters, 16 rows, each in its faster dtype, one thread",
            hf,
            "tiny",
        ),
    ):
        ours, peer = run[f"ours_tokens_per_s_{key}"], run[f"peer_tokens_per_s_{key}"]
        lines.append(f"| {what} | {ours:,.0f} | {peer:,.0f} | {run[f'ratio_{key}']:.2f} |")
    lines += [
        "",
        "Forking and joining, one rollout at a time against the same text without threads: "
        f"token-latency speedup {fork['token_latency_speedup_100m']:.2f}x; wall-clock speedup "
        f"{fork['wall_speedup_100m']:.2f}x with 100M parameters (bfloat16), "
        f"{fork['wall_speedup_100m_float32']:.2f}x in float32, "
        f"{fork['wall_speedup_tiny']:.2f}x with 3.3M.",
    ]
    return "\n".join(lines)


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def plan_block() -> str:
    """The README's table of recorded plans as Markdown."""
    plans = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("plan_qwen3_8b_*.json"))
    ]
    lines = [
        "| | " + " | ".join(_plan_name(plan) for plan in plans) + " |",
        "|---|" + "---|" * len(plans),
    ]
    for name, cell in _PLAN_ROWS:
        lines.append(f"| {name} | " + " | ".join(cell(plan) for plan in plans) + " |")
    return "\n".join(lines)


def _plan_name(plan: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    return f"{_PROGRAMS[plan['program']]}, {mesh}, remat {plan['remat']}"


_PROGRAMS = {"sft": "SFT", "rl": "P-GRPO"}


def _bracket(bounds: dict[str, float], digits: int) -> str:
    low, high = sorted(bounds.values())
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


_PLAN_ROWS = (
    ("tokens per step", lambda p: f"{p['tokens_per_step']:,}"),
    (
        "GiB per device: sum of all parts, compiler's peak, limit",
        lambda p: f"{p['hbm_gib']:.1f}, {p['hbm_peak_gib']:.1f}, {p['hbm_limit_gib']:.1f}",
    ),
    ("FLOP compiled / traced", lambda p: f"{p['flops_agreement']:.4f}"),
    ("GB sent per device and step", lambda p: f"{p['wire_gb']:.0f}"),
    ("seconds per step, bracket", lambda p: _bracket(p["step_s"], 1)),
    ("tokens per second, bracket", lambda p: _bracket(p["tokens_per_s"], 0)),
    ("CPU seconds to compile", lambda p: f"{p['compile_cpu_s']:.0f}"),
)


def rl_update_block() -> str:
    """The table of what an update costs, in docs/rl.md."""
    return update_table(_result("update"), _result("rl_tunix"))


def objectives_block() -> str:
    """The table of objectives, in docs/rl.md."""
    return objectives_table(_result("objectives"))


# Each block stands between `<!-- name -->` and `<!-- /name -->`.
_BLOCKS = {
    README: {"results": results_block, "decoding": decoding_block, "plan": plan_block},
    DOCS / "rl.md": {"update": rl_update_block, "objectives": objectives_block},
}
PAGES = tuple(_BLOCKS)


def with_results(page: pathlib.Path) -> str:
    """A page with its generated sections written anew."""
    text = page.read_text(encoding="utf-8")
    for name, block in _BLOCKS[page].items():
        head, rest = text.split(f"<!-- {name} -->")
        _, tail = rest.split(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{block()}\n<!-- /{name} -->{tail}"
    return text


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(with_results(written), encoding="utf-8")
