"""The report: complete, safe with hostile text, small, and patient with missing parts."""

import dataclasses
import html.parser
import json
import re

import pytest

from tests.view.fake_run import fake_report
from tw_jax.errors import UserError
from tw_jax.view.browse import ViewConfig, read_report_data, run_view
from tw_jax.view.report import ReportData, points_from_summary, render_report, write_report

HOSTILE = "</span></pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e{{ 7*7 }}"


@pytest.fixture(scope="module")
def data() -> ReportData:
    return fake_report()


@pytest.fixture(scope="module")
def page(data) -> str:
    return render_report(data)


class Tags(html.parser.HTMLParser):
    """Collects elements and their attributes, and checks that they nest."""

    VOID = {"meta", "link"}

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_small_file_without_requests_or_scripts(page):
    assert len(page.encode()) < 300_000
    assert not re.search(r"https?:", page)
    assert "@import" not in page
    assert "url(" not in page
    found = Tags(page).found
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in found}
    links = [a["href"] for _, a in found if "href" in a]
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert not [a for _, a in found if "src" in a or any(name.startswith("on") for name in a)]
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in found)


def test_everything_is_there(page, data):
    for words in (
        "quickstart", "Token-latency speedup", "1.37×", "What reinforcement learning changed",
        "RL changed the style", "Accuracy against critical path", "Activation ratio",
        "Rollout timeline", "Throughput", "learning_rate: 0.003", "end to end", "held out",
    ):  # fmt: skip
        assert words in page, words
    for sample in data.samples:
        for part in sample["parts"]:
            for thread in part.get("threads", ()):
                assert thread["text"].replace(">", "&gt;") in page


def test_ids_are_unique_and_references_resolve(page):
    found = Tags(page).found
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {i for _, a in found for i in (a.get("aria-labelledby") or "").split()}
    assert wanted <= set(ids)


def test_text_is_escaped(data):
    sample = json.loads(json.dumps(data.samples[0]))
    sample["prompt"] = sample["answer"] = sample["style"] = HOSTILE
    for part in sample["parts"]:
        if part["kind"] == "segment":
            part["text"] = HOSTILE
        else:
            part["outlines"][0]["text"] = part["threads"][0]["text"] = HOSTILE
            part["threads"][1]["number"] = part["outlines"][0]["number"] = HOSTILE
    hostile = dataclasses.replace(
        data, title=HOSTILE, samples=[sample], config_yaml=HOSTILE,
        points=[{**data.points[0], "label": HOSTILE, "color": '"><script>'}],
    )  # fmt: skip
    page = render_report(hostile)
    tags = {tag for tag, _ in Tags(page).found}
    assert not {"script", "img"} & tags
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "{{ 7*7 }}" in page


@pytest.mark.parametrize(
    "missing",
    ["summary", "curves", "points", "speedups", "samples", "config_yaml"],
)
def test_any_part_may_be_missing(data, missing):
    fields = data.to_json()
    del fields[missing]
    Tags(render_report(ReportData.from_json(fields)))


def test_nothing_but_a_title_renders():
    assert "lonely" in render_report(ReportData("lonely"))


def test_a_run_without_rl_shows_its_sft(data):
    summary = {"sft": data.summary["sft"]}
    page = render_report(
        ReportData("sft only", summary, {"sft": data.curves["sft"]}, points_from_summary(summary))
    )
    assert "Token-latency speedup" in page
    assert "reinforcement learning" not in page


def test_numbers_that_are_not_finite_do_not_break_the_page(data):
    rows = [{"step": i, "loss": float("nan") if i % 2 else 1.0 + i} for i in range(40)]
    summary = {"sft": {"token_latency_speedup": float("nan")}, "rl": {"before": {"accuracy": None}}}
    page = render_report(ReportData("odd", summary, {"sft": rows}))
    assert not re.search(r"\bnan\b", page)


def test_rows_that_lack_a_value_do_not_cut_its_line():
    rows = [
        {"step": i, "loss": 1.0} if i % 3 else {"step": i, "heldout_loss": 1.1} for i in range(90)
    ]
    path = re.search(
        r'<path class="line raw c-parallel" d="([^"]*)"',
        render_report(ReportData("interleaved", curves={"sft": rows})),
    )
    assert path is not None
    assert path[1].count("M") == 1


def test_long_runs_stay_small(data):
    rows = [{"step": i, "loss": 1.0 / (i + 1), "tokens_per_s": 1e4} for i in range(60_000)]
    assert len(render_report(ReportData("long", curves={"sft": rows}))) < 200_000


def test_data_survives_json(data):
    fields = json.loads(json.dumps(data.to_json()))
    assert render_report(ReportData.from_json(fields)) == render_report(data)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([], "must hold a JSON object"),
        ({"summary": {}}, "'title' is missing"),
        ({"title": "a", "smaples": []}, "unknown key 'smaples'"),
        ({"title": "a", "curves": []}, "'curves' must be a JSON object"),
        ({"title": 3}, "'title' must be a JSON string"),
    ],
)
def test_bad_report_data_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        ReportData.from_json(fields, "report.json")


def test_points_come_from_the_summary(data):
    labels = [p["label"] for p in points_from_summary(data.summary)]
    assert labels == ["sequential", "parallel", "free, before RL", "free, after RL"]
    assert points_from_summary({}) == []


def test_view_rebuilds_the_report_from_its_folder(data, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(data.to_json()))
    path = run_view(ViewConfig(run_dir=str(tmp_path)))
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text(encoding="utf-8") == render_report(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_view_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"report\.json: there is no such file"):
        run_view(ViewConfig(run_dir=str(tmp_path)))
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_report_data(tmp_path / "report.json")


def test_write_report_makes_folders(data, tmp_path):
    write_report(tmp_path / "a" / "b.html", data)
    assert (tmp_path / "a" / "b.html").stat().st_size > 10_000
