"""The numbers in the README and the docs are those of the recorded runs."""

import pytest

from benchmarks.readme_results import PAGES, with_results


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_results_are_generated_from_the_recorded_runs(page):
    written = page.read_text(encoding="utf-8")
    assert written == with_results(page), "run `python -m benchmarks.readme_results`"
