"""The cost that docs/data_rewrite.md names is what a dry run estimates, and not typed in."""

import pathlib

from tw_jax.data.rewrite.config import ChatServerConfig, RewriteLimits
from tw_jax.data.rewrite.estimate import estimate_rest
from tw_jax.data.rewrite.prompts import load_prompts
from tw_jax.data.rewrite.report import total_estimate
from tw_jax.data.rewrite.source import SourceTrace
from tw_jax.data.rewrite.trace_rewrite import Outcome, TraceProgress

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "data_rewrite.md"
TRACES, LINES, LINE = 1000, 600, "x" * 59
SERVER = ChatServerConfig(
    url="http://x/v1", model="m", price_in_usd_per_million=1.25, price_out_usd_per_million=10.0
)


def test_the_page_names_the_estimate() -> None:
    reasoning = "\n".join([LINE] * LINES)
    trace = SourceTrace("x", 1, 1, "p" * 300, "", reasoning, "", None)
    outcome = Outcome(trace, "unfinished", "not_asked", "", TraceProgress())
    rest = estimate_rest([outcome] * TRACES, load_prompts(), RewriteLimits(), {})
    total = total_estimate(rest)
    usd = SERVER.usd(round(total.prompt_tokens), round(total.answer_tokens))
    said = (
        f"{TRACES:,} traces of {LINES:,} lines of {len(LINE)} characters, at "
        f"{SERVER.price_in_usd_per_million:g} and {SERVER.price_out_usd_per_million:g} USD per "
        f"million tokens: {total.calls:,.0f} calls, {total.prompt_tokens / 1e6:.0f} million tokens "
        f"in, {total.answer_tokens / 1e6:.1f} million out, {usd:.0f} USD"
    )
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert said in page, f"docs/data_rewrite.md should say: {said}"
