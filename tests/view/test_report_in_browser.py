"""A real browser opens the report from disk without a complaint."""

import shutil
import subprocess

import pytest

from tests.view.fake_run import fake_report
from tw_jax.view.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --enable-logging=stderr --v=0"
).split()


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_the_page_loads_without_console_messages(tmp_path):
    page = tmp_path / "report.html"
    write_report(page, fake_report())
    command = [
        str(BROWSER), *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "What reinforcement learning changed" in done.stdout
    assert "</footer>" in done.stdout
    # Script errors, refused requests and broken policies all reach the console.
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
