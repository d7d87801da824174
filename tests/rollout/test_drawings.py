"""The page tables of docs/rollout.md are those of the engine."""

import pytest

from docs.draw_rollout import PAGE, with_drawings


@pytest.mark.slow
def test_the_page_shows_what_the_engine_does():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_drawings(page), "run `python -m docs.draw_rollout`"
