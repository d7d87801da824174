"""The README's numbers are those of the recorded runs."""

from benchmarks.readme_results import README, with_results


def test_results_section_is_generated_from_the_recorded_runs():
    readme = README.read_text(encoding="utf-8")
    assert readme == with_results(readme), "run `python -m benchmarks.readme_results`"
