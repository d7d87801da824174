"""Pages: one HTML file each that opens from disk, needs no network and runs no script.

A page carries a content security policy that forbids scripts and every request, and the templates
escape all text: what a model or a data set wrote is untrusted.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from tw_jax.evals.sample import printable
from tw_jax.view import charts
from tw_jax.view.numbers import number, percent
from tw_jax.view.svg import Labels

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """Fills a template of the `templates` folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, shown=printable)
    environment.globals.update(fork_lines=charts.fork_lines)
    return environment.get_template(template).render(**values)


def drawn_sample(sample: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A sample of `tw_jax.evals.sample` and, where it has threads, the timeline of its units."""
    labels = Labels(
        key=f"timeline-{index}",
        title="Rollout timeline",
        description=f"{len(sample['timeline'])} units over the rows of the decoding batch.",
        x="engine step",
        y="",
    )
    chart = charts.timeline(labels, sample["timeline"]) if len(sample["timeline"]) > 1 else ""
    blocks = [part for part in sample["parts"] if part["kind"] == "block"]
    return {**sample, "timeline_chart": chart, "blocks": len(blocks)}
