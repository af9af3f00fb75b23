"""`kvjax report`: the page shows the results' own numbers, names what is missing, and trusts no text of a file."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe

import kvjax
from kvjax.commands.main import main
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline import report as report_stage
from kvjax.pipeline.interventions import intervene
from kvjax.pipeline.report import report, report_is_current
from kvjax.pipeline.settings import PairSource, ReportSettings, RunsOnBenchmark
from kvjax.report import comparison_page
from tests.helpers.browser import WIDTHS, Opened, chromium
from tests.helpers.building import read_lines
from tests.helpers.pages import read_page

SECTIONS = (
    "story",
    "behaviour",
    "windows",
    "components",
    "interventions",
    "attention",
    "probes",
    "change",
    "provenance",
)


@pytest.fixture
def run(study, tmp_path):
    """A copy of a run with a sweep, windows and a story, beside its benchmark."""
    folder = shutil.copytree(study / "study", tmp_path / "study")
    path = folder / "runs" / "seed_3"
    document = json.loads((path / "run_config.json").read_text())
    (path / "run_config.json").write_text(json.dumps(document | {"benchmark_dir": str(folder / "benchmark")}))
    return path


def written(run, *flags):
    """Writes the report of a run with some flags and reads it."""
    path = run.parent / "page.html"
    assert main(["report", f"--run_dirs={run}", f"--output={path}", "--noprogress", *flags]) == 0
    return read_page(path)


def test_page_of_a_run(run, capsys):
    """Every section stands in its order; of a run without interventions the page names their command."""
    page = written(run)
    assert page.sections == [f"run0-{name}" for name in SECTIONS]
    assert len(page.missing) == 1 and f"kvjax intervene --run_dirs={run}" in page.missing[0]
    assert f"Open {run.parent / 'page.html'} in a browser." in capsys.readouterr().out


def test_numbers_of_a_page(run):
    """Lines and maps hold the numbers of the sweep's own tables."""
    page = written(run)
    rows = read_lines(run / "analysis" / "checkpoint_metrics.jsonl")
    drawn = {trace["name"]: trace for trace in page.charts["run0-behaviour-answer_accuracy"]["data"] if "name" in trace}
    assert drawn["heldout_pairs"]["x"] == [row["step"] for row in rows]
    np.testing.assert_allclose(
        drawn["heldout_pairs"]["y"], [row["heldout_answer_accuracy"] for row in rows], rtol=1e-3, atol=1e-4
    )
    events = xr.open_dataset(run / "analysis" / "checkpoint_metrics.nc", group="events").load()
    own = events.isel(sequence=np.flatnonzero(events["split"] == "validation_iid"))
    lost = own["read_correct"].sum(["sequence", "read"]) - own["head_zero_correct"].sum("sequence")
    drops = lost / own["is_read"].sum()
    frames = {int(one["name"]): one["data"][0]["z"] for one in page.charts["run0-components-head_drop_zero"]["frames"]}
    assert list(frames) == [row["step"] for row in rows]
    for step, shown in frames.items():
        np.testing.assert_allclose(shown, drops.sel(step=step).transpose("layer", "head"), rtol=1e-3, atol=1e-4)


def test_attention_of_a_page(run):
    """The attention shown is a distribution over the tokens up to each one, of the heads that were asked for."""
    page = written(run, "--heads=L0H1", "--example=2", "--steps=16")
    charts = {name: chart for name, chart in page.charts.items() if "-attention-" in name}
    assert list(charts) == ["run0-attention-attention_L0H1"]
    (chart,) = charts.values()
    assert [frame["name"] for frame in chart["frames"]] == ["16"]
    for frame in chart["frames"]:
        for row, values in enumerate(frame["data"][0]["z"]):
            rounding = 0.0005 * (row + 1)  # each share is shown with three decimals
            assert sum(values[: row + 1]) == pytest.approx(1.0, abs=rounding + 1e-6)
            assert set(values[row + 1 :]) <= {None}
    tokens = [html.unescape(label).split(" ", 1)[1] for label in chart["data"][0]["x"]]
    assert f"{' '.join(tokens)}" in "".join(page.words)


def test_equal_pages(run):
    """Equal results give an equal page, byte by byte, and it is current until they change."""
    settings = ReportSettings(run_dirs=(str(run),), output=str(run.parent / "page.html"))
    assert not report_is_current(settings).holds
    written(run)
    first = (run.parent / "page.html").read_bytes()
    written(run)
    assert (run.parent / "page.html").read_bytes() == first
    assert report_is_current(settings).holds
    story = run / "analysis" / "story.json"
    story.write_text(story.read_text() + "\n")
    assert not report_is_current(settings).holds


def test_hostile_name(run):
    """What a file says is shown as text, in the page and in the scripts' data, whatever it holds."""
    name = "</script><img src=x onerror=alert(1)>`a`{{ 7 * 7 }}"
    for path in (run / "run_config.json", run / "analysis" / "story.json"):
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"run_name": name}))
    page = written(run)
    text = (run.parent / "page.html").read_text()
    assert "<img" not in text and "onerror=alert(1)>" not in text.replace("&gt;", "")
    assert any(name in word for word in page.words) and "49" not in page.words


def test_run_without_a_sweep(run):
    """A page of a run that nothing was measured on names the first command, in every section."""
    shutil.rmtree(run / "analysis")
    page = written(run)
    assert page.sections == [f"run0-{name}" for name in SECTIONS] and len(page.missing) == len(SECTIONS)
    assert all("run kvjax " in reason for reason in page.missing), page.missing
    assert not page.charts


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--heads=L7H0", "heads: expected heads of 1 layers with 2 each"),
        ("--heads=L0.mlp", "heads: expected heads of 1 layers with 2 each"),
        ("--example=100000", "example: expected a number below"),
        ("--heads=nonsense", "heads: expected"),
        ("--steps=nonsense", "steps: expected all, or steps and ranges"),
        ("--comparison_dir=nowhere", "comparison.json"),
        ("--factor_dirs=nowhere", "factor_dirs: expected folders with a factor.json"),
    ],
)
def test_unusable_flags(run, flag, message, capsys):
    """A head, stream or folder that is not there is one line and status 2, and no page is left."""
    output = run.parent / "page.html"
    runs = f"--run_dirs={run},{_second(run)}" if "comparison" in flag else f"--run_dirs={run}"
    assert main(["report", runs, f"--output={output}", "--noprogress", flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not output.exists()


def _second(run):
    """Copies a run as one of another seed."""
    other = shutil.copytree(run, run.parent / "seed_5")
    document = json.loads((other / "run_config.json").read_text())
    (other / "run_config.json").write_text(json.dumps(document | {"seed": 5, "run_name": "other"}))
    return other


def test_steps_that_were_not_measured(run, capsys):
    """A checkpoint that no sweep has measured has no attention to show: one line, status 2."""
    shutil.copy(run / "checkpoints" / "step_000016.pt", run / "checkpoints" / "step_000024.pt")
    assert main(["report", f"--run_dirs={run}", "--steps=24", "--noprogress"]) == 2
    assert "steps: expected steps that were measured" in capsys.readouterr().err


def test_hostile_name_in_a_chart(run):
    """plotly reads tags in names; a run's name reaches it escaped."""
    other = _second(run)
    document = json.loads((other / "run_config.json").read_text())
    (other / "run_config.json").write_text(json.dumps(document | {"run_name": "<a href='https://example.org'>b</a>"}))
    page = written(run, f"--run_dirs={other}")
    names = {trace["name"] for trace in page.charts["seeds-seeds_validation_iid"]["data"] if trace.get("name")}
    assert "&lt;a href='https://example.org'&gt;b&lt;/a&gt;" in names


def test_page_of_several_runs(run, monkeypatch):
    """Several runs are compared first and then told one by one; of very many, only what they have in common."""
    other = _second(run)
    names = f"--run_dirs={other}"
    page = written(run, names)
    assert page.sections[:2] == ["runs", "seeds"] and len(page.sections) == 2 + 2 * len(SECTIONS)
    seeds = [trace for trace in page.charts["seeds-seeds_validation_iid"]["data"] if trace.get("name")]
    assert len(seeds) == 3 and seeds[0]["y"] == seeds[1]["y"] == seeds[2]["y"]
    monkeypatch.setattr(report_stage, "MOST_RUNS", 1)
    monkeypatch.setattr(comparison_page, "MOST_NAMED", 1)
    many = written(run, names)
    assert many.sections == ["runs", "seeds"] and any("kvjax report --run_dirs" in word for word in many.words)
    counted = [word for word in many.words if re.fullmatch(r"(L0H[01]|none) 2", word)]
    assert len(counted) == 3, "of each role: both copies of the run have the same head"


def test_figures_for_papers(run):
    """Every chart of the page is also a PNG and an SVG."""
    page = written(run, f"--figures_dir={run.parent / 'figures'}")
    names = {f"{name.removeprefix('run0-').replace('-', '_', 1)}" for name in page.charts}
    files = {path.name for path in (run.parent / "figures").iterdir()}
    assert files == {f"{name}.{form}" for name in names for form in ("png", "svg")}


def test_charts_from_python(run):
    """In a notebook, charts come by name and draw themselves with either library; results show a summary."""
    charts = kvjax.charts(run)
    chart = charts["behaviour_answer_accuracy"]
    lines = {line.get_label(): line.get_ydata() for line in chart.matplotlib().axes[0].get_lines()}
    traces = {trace.name: trace.y for trace in chart.plotly().data if trace.name}
    for split in ("validation_iid", "heldout_pairs"):
        np.testing.assert_allclose(lines[split], traces[split], rtol=1e-3, atol=1e-4)
    shown = kvjax.open_results(run)._repr_html_()
    assert "trained_seed_3" in shown and "kvjax report --run_dirs" in shown


@pytest.fixture(scope="module")
def shown(study, tmp_path_factory):
    """The page of a run with a few interventions, to be opened in a browser."""
    folder = shutil.copytree(study / "study", tmp_path_factory.mktemp("shown") / "study")
    path = folder / "runs" / "seed_3"
    kinds = ("activation_patching", "path_patching", "necessity")
    settings = InterventionSettings(kinds=kinds, steps="8,16", pairs_per_kind=2, force=True)
    runs = RunsOnBenchmark(run_dirs=(str(path),), benchmark_dir=str(folder / "benchmark"))
    intervene(runs, PairSource(), settings)
    page = folder / "page.html"
    report(ReportSettings(run_dirs=(str(path),), benchmark_dir=str(folder / "benchmark"), output=str(page)))
    return page


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_interventions_of_a_page(shown):
    """Patching is shown by component and by the tokens of a pair, and sets of components by their size."""
    page = read_page(shown)
    assert not page.missing
    drawn = [name.removeprefix("run0-interventions-") for name in page.charts if "-interventions-" in name]
    assert {"recovery_value", "recovery_swap"} <= set(drawn)
    positions = next(name for name in drawn if name.startswith("positions_value"))
    labels = page.charts[f"run0-interventions-{positions}"]["data"][0]["x"]
    assert labels[0] == "0 &lt;bos&gt;", "plotly shows it letter by letter"
    assert any(" → " in label for label in labels)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", list(WIDTHS))
def test_page_in_a_browser(shown, browser, width, scheme, tmp_path_factory):
    """Every chart draws, nothing is wider than the screen, nothing is asked of the network, nothing goes wrong."""
    opened = Opened(browser, shown, width=width, scheme=scheme)
    page, charts = opened.page, len(read_page(shown).charts)
    assert page.locator(".plot .main-svg").count() >= charts > 30
    assert page.locator("figure.chart:not(:has(.main-svg))").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert bright == (scheme == "light")
    folder = Path(os.environ.get("KVJAX_SCREENSHOTS", tmp_path_factory.mktemp("screenshots")))
    page.screenshot(path=folder / f"report_{width}_{scheme}.png", full_page=True)
    assert not opened.faults
    opened.close()


def test_slider_and_theme(shown, browser):
    """The slider, moved by keys, changes its section's maps; the button changes the colours, those of charts too."""
    opened = Opened(browser, shown)
    page = opened.page
    content = json.loads(page.locator("#run0-components-head_drop_zero script").text_content())
    z_of = "document.querySelector('#run0-components-head_drop_zero .plot').data[0].z"
    assert page.evaluate(z_of) == content["frames"][-1]["data"][0]["z"]
    page.locator("#run0-components-step").focus()
    page.keyboard.press("Home")
    assert page.evaluate(z_of) == content["frames"][0]["data"][0]["z"]
    assert page.locator("output[for=run0-components-step]").text_content() == content["frames"][0]["name"]
    ink = "document.querySelector('#run0-components-head_drop_zero .plot').layout.font.color"
    before = page.evaluate(ink)
    page.locator("#theme").click()
    assert page.evaluate(ink) != before and not opened.faults
    opened.close()


def test_numbers_for_a_reader(shown, browser):
    """A chart's numbers open as a table, those of the step that the slider is at."""
    opened = Opened(browser, shown)
    figure = opened.page.locator("#run0-components-head_drop_zero")
    figure.locator(".numbers summary").click()
    content = json.loads(figure.locator("script").text_content())
    cells = figure.locator(".numbers tr:nth-child(2) td").all_text_contents()
    first = content["frames"][-1]["data"][0]["z"][0]
    assert [float(cell) for cell in cells[1:]] == first
    opened.close()


def test_print_and_resize(shown, browser):
    """On paper no chart is wider than a column; on a screen that became narrow charts are drawn anew to fit."""
    opened = Opened(browser, shown)
    page = opened.page
    page.evaluate(
        """addEventListener("beforeprint", () => {
          window.widths = [...document.querySelectorAll(".plot .main-svg")].map((one) => one.width.baseVal.value);
        })"""
    )
    assert page.pdf().startswith(b"%PDF")
    assert len(set(page.evaluate("widths"))) == 1 and page.evaluate("widths")[0] <= 340
    page.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
    page.wait_for_timeout(400)
    page.locator("#run0-behaviour-answer_accuracy").scroll_into_view_if_needed()
    chart = page.locator("#run0-behaviour-answer_accuracy .main-svg").first
    chart.wait_for()
    assert chart.bounding_box()["width"] <= WIDTHS["phone"] and not opened.faults
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(shown, browser, scheme):
    """axe-core finds nothing serious or critical, in light and in dark."""
    opened = Opened(browser, shown, scheme=scheme)
    found = Axe().run(opened.page).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert not serious
    opened.close()
