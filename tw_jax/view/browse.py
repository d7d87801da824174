"""`tw-jax view`: builds a run's report from its folder and says where it is."""

import dataclasses
import json
import pathlib
import webbrowser

from tw_jax.errors import UserError
from tw_jax.view.report import ReportData, write_report


@dataclasses.dataclass(frozen=True)
class ViewConfig:
    """Which run to look at.

    Attributes:
      run_dir: folder of the run; holds the `report.json` that the report is built from.
      open_browser: also open the report in the web browser.
    """

    run_dir: str = "runs/quickstart"
    open_browser: bool = False


def run_view(config: ViewConfig) -> pathlib.Path:
    """Writes `report.html` into the run's folder and prints its path.

    Raises:
      UserError: there is no usable `report.json`, or the report cannot be written.
    """
    run_dir = pathlib.Path(config.run_dir)
    page = run_dir / "report.html"
    data = read_report_data(run_dir / "report.json")
    write_report(page, data)
    print(page)
    if config.open_browser:
        webbrowser.open(page.resolve().as_uri())
    return page


def read_report_data(path: pathlib.Path) -> ReportData:
    """Reads a `report.json`.

    Raises:
      UserError: the file is missing, is no JSON, or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; `tw-jax quickstart` writes it, and run_dir=... says "
            "where to look"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); run the command that wrote it again"
        ) from error
    return ReportData.from_json(fields, str(path))
