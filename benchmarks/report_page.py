"""Makes a page of five runs with 64 checkpoints each, and times it: to write, in megabytes, and to open in Chromium.

The runs are one swept run, its sweep stretched to more steps, with noise of its own for each copy: the page cares for
sizes, not for what happened.

    python -m benchmarks.report_page --run_dir=… --benchmark_dir=…
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr
from absl import app, flags
from playwright.sync_api import sync_playwright

from benchmarks.reporting import machine, write_result
from kvjax.artifacts.results import RunResults
from kvjax.artifacts.run_dir import RunDir
from kvjax.model.components import all_heads
from kvjax.opened_run import open_run
from kvjax.pipeline.report import attention_patterns
from kvjax.report.html import Page, render
from kvjax.report.run_page import run_page
from kvjax.report.sections.overview import headline
from kvjax.report.sections.seeds import runs_section

FLAGS = flags.FLAGS
flags.DEFINE_string("run_dir", None, "A swept run with windows and, at best, interventions.", required=True)
flags.DEFINE_string("benchmark_dir", None, "Its benchmark.")
RUNS, CHECKPOINTS = 5, 64


def stretched(run: RunDir, seed: int) -> RunResults:
    """Opens a run's results with its sweep at more steps than it has."""
    found = RunResults(run)
    steps = np.linspace(*found.metrics["step"].values[[0, -1]], CHECKPOINTS).astype(int)
    rng = np.random.default_rng(seed)
    for name in ("metrics", "intervals"):
        dataset: xr.Dataset = getattr(found, name)
        wide = dataset.interp(step=steps).assign_attrs(dataset.attrs)
        numbers = {key: value for key, value in wide.items() if value.dtype.kind == "f" and "step" in value.dims}
        noisy = {key: value * (1 + 0.01 * rng.standard_normal(value.shape)) for key, value in numbers.items()}
        found.__dict__[name] = wide.assign({key: value.assign_attrs(wide[key].attrs) for key, value in noisy.items()})
    return found


def seconds_to_open(path: Path) -> dict[str, float]:
    """Measures the seconds until Chromium has loaded the page, and until the first run, unfolded, draws a chart."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        page.goto(path.as_uri())
        loaded = time.perf_counter() - began
        page.locator("details.run summary").first.click()
        page.locator(".plot").first.scroll_into_view_if_needed()
        page.locator(".plot .main-svg").first.wait_for()
        drawn = time.perf_counter() - began
        browser.close()
    return {"loaded": loaded, "first_chart": drawn}


def main(_: list[str]) -> None:
    opened = open_run(FLAGS.run_dir, benchmark_dir=FLAGS.benchmark_dir)
    results = RunResults(opened.run)
    heads = all_heads(results.metrics.sizes["layer"], results.metrics.sizes["head"])[:4]
    record = opened.benchmark.read_split("validation_iid")[0]
    attention = attention_patterns(opened, opened.steps[:8], heads, record)
    began = time.perf_counter()
    runs = {f"copy {seed}": stretched(opened.run, seed) for seed in range(RUNS)}
    pages = [
        run_page(own, anchor=f"run{number}", title=name, pairs={}, attention=attention, why_no_attention=None)
        for number, (name, own) in enumerate(runs.items())
    ]
    summary = runs_section({name: headline(own) for name, own in runs.items()})
    text = render(Page(f"{RUNS} runs", "For timing.", "0" * 64, [summary], pages))
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")
        size = path.stat().st_size
        opening = [seconds_to_open(path) for _ in range(3)]
    result = {
        "runs": RUNS,
        "checkpoints": CHECKPOINTS,
        "charts": text.count('<figure class="chart"'),
        "megabytes": size / 1e6,
        "seconds_to_make": made,
        "seconds_to_open": {name: sorted(one[name] for one in opening)[1] for name in opening[0]},
        "machine": machine(),
    }
    print(result)
    write_result("report_page", result)


if __name__ == "__main__":
    app.run(main)
