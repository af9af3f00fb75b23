"""Factor screens: what is planned, what is refused, and a comparison of settings that are trained already."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr

from kvjax.artifacts.factor_schema import read_factor
from kvjax.commands.main import main
from kvjax.config.factors import FactorScreenConfig
from kvjax.config.files import find_config, read_config
from kvjax.config.train import SGDConfig
from kvjax.errors import InputError
from kvjax.pipeline.factor_plan import plan_screen
from kvjax.pipeline.settings import FactorSettings
from tests.helpers.pages import read_page

FACTORS = [
    {
        "name": "rate",
        "base_label": "rate-3e-3",
        "values": [{"label": "rate-1e-2", "train": {"optimization.learning_rate": 0.01}}],
    },
    {
        "name": "data",
        "base_label": "writes-6",
        "values": [{"label": "writes-7", "benchmark": {"train.overwrite_count": {"min": 7, "max": 7}}}],
    },
]


# Factors whose settings have the base's shape, data and steps.
ONE_PROGRAM = ("learning_rate", "weight_decay", "init_scale", "curriculum")


@pytest.fixture
def screen(study, tmp_path):
    """Writes a screen's config beside the study's; returns a function that sets fields of it."""

    def written(**fields):
        document = {
            "name": "tiny",
            "train_config": "train.json",
            "benchmark_config": "benchmark.json",
            "seeds": [3, 5],
            "output_dir": str(tmp_path / "screen"),
            "factors": FACTORS,
        }
        for name in ("train.json", "benchmark.json"):
            shutil.copy(study / name, tmp_path / name)
        path = tmp_path / "screen.json"
        path.write_text(json.dumps(document | fields))
        return path

    return written


def test_plan_of_a_screen(screen):
    """Every value has its seeds; one benchmark serves all settings but those that change the data."""
    plan = plan_screen(FactorSettings(config=str(screen())))
    assert [setting.name for setting in plan.settings] == ["base", "rate/rate-1e-2", "data/writes-7"]
    assert len(plan.runs) == 6 and {config.seed for config in plan.runs.values()} == {3, 5}
    rate, data = plan.varied["rate"][0], plan.varied["data"][0]
    assert rate.config.optimization.learning_rate == 0.01 and rate.benchmark_dir == plan.base.benchmark_dir
    assert data.benchmark.train.overwrite_count.min == 7 and data.config.benchmark_dir != rate.config.benchmark_dir
    assert data.config.optimization == plan.base.config.optimization
    programs = [[setting.name for setting in settings] for settings in plan.programs]
    assert programs == [["base", "rate/rate-1e-2"], ["data/writes-7"]], "other data are another program"


def test_dry_run(screen, capsys, tmp_path):
    """A dry run prints runs, operations, time and disk, and makes nothing."""
    assert main(["factor-screen", f"--config={screen()}", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "2 factors, 3 settings, 6 runs" in printed and "optimization.learning_rate = 0.01" in printed
    assert "GB of checkpoints" in printed
    assert not (tmp_path / "screen").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"train": {"optimization.rate": 1}}, "rate, x: expected fields of a TrainConfig"),
        ({"train": {"model.n_heads": 5}}, "rate, x: model: d_model 24 is not a multiple of n_heads 5"),
        ({"train": {"seed": 1}}, "rate, x: expected factors that vary other fields"),
        ({"benchmark": {"train.overwrite_count": 3}}, "rate, x: train.overwrite_count"),
        ({}, "overrides nothing"),
        ({"train": {"model.n_heads": 1}, "label": "a/b"}, "the name of a folder"),
        ({"train": {"model.n_heads": 1}, "label": "base-rate"}, "found base-rate twice"),
    ],
)
def test_unusable_values(screen, value, expected, capsys):
    """A value that no config can hold is named with its factor before anything is made: one line, status 2."""
    factor = {"name": "rate", "base_label": "base-rate", "values": [{"label": "x"} | value]}
    assert main(["factor-screen", f"--config={screen(factors=[factor])}"]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("name", [path.stem for path in find_config("quick", "factors").parent.glob("*.json")])
def test_shipped_screens(name):
    """Every shipped screen can be planned; the plan's eight factors are in it, or the optimizer, a ninth."""
    plan = plan_screen(FactorSettings(config=name))
    eight = {"depth", "width", "heads", "learning_rate", "weight_decay", "init_scale", "curriculum", "difficulty"}
    expected = {"quick": eight, "formation": eight | {"optimizer"}, "quick_optimizer": {"optimizer"}}
    assert set(plan.varied) == expected[name]
    together = [factor for factor in ONE_PROGRAM if factor in plan.varied]
    assert {"base", *(f"{factor}/{one.label}" for factor in together for one in plan.factor(factor).values)} == {
        setting.name for setting in plan.programs[0]
    }
    for setting in plan.varied.get("optimizer", ()):
        assert isinstance(setting.config.optimization, SGDConfig)
        assert setting.config.model_copy(update={"optimization": None, "run_name": ""}) == (
            plan.base.config.model_copy(
                update={"optimization": None, "run_name": "", "output_dir": setting.config.output_dir}
            )
        ), "all else is equal"
    assert read_config(find_config(name, "factors"), FactorScreenConfig).seeds


@pytest.fixture
def trained(study, screen):
    """A screen of one factor whose four runs are copies of the study's, with the configs that the plan gives them."""
    config = screen(factors=FACTORS[:1])
    plan = plan_screen(FactorSettings(config=str(config)))
    shutil.copytree(study / "study" / "benchmark", plan.base.benchmark_dir)
    for path, own in plan.runs.items():
        shutil.copytree(study / "study" / "runs" / "seed_3", path)
        (path / "run_config.json").write_text(own.model_dump_json())
    return plan, config


def test_comparison_of_settings(trained, capsys):
    """Settings whose runs are the same run differ in nothing, and a second call makes nothing again."""
    plan, config = trained
    assert main(["factor-screen", f"--config={config}", "--noprogress"]) == 0
    printed = capsys.readouterr().out
    assert "train, base, rate/rate-1e-2: current, skipped" in printed and "compare rate: done" in printed
    layout = plan.layout.factor("rate")
    found = read_factor(layout.comparison)
    assert [entry.label for entry in found.settings] == ["rate-3e-3", "rate-1e-2"]
    assert [run.seed for run in found.settings[1].runs] == [3, 5]
    entry = found.summaries["accuracy on all splits at the best checkpoint"]
    assert set(entry.difference.values()) == {0.0} and entry.shares.share is None
    events = found.settings[0].births["answer_accuracy"]
    assert (events.formed, events.total) == (0, 2), "a run in which nothing is born counts"
    with xr.open_dataset(layout.arrays, group="rate-1e-2") as trajectories:
        assert trajectories["answer_accuracy"].sizes["run"] == 2
    assert "# rate: rate-3e-3, rate-1e-2" in layout.page.read_text()
    assert (layout.figures / "births.png").stat().st_size > 1000
    assert main(["factor-screen", f"--config={config}", "--noprogress"]) == 0
    assert ": done" not in capsys.readouterr().out
    runs, page = plan.layout.path / "runs" / "base" / "*", plan.layout.path / "report.html"
    flags = [f"--run_dirs={runs}", f"--factor_dirs={plan.layout.path}/factors/*", f"--output={page}", "--noprogress"]
    assert main(["report", *flags]) == 0
    shown = read_page(page)
    assert "factor-rate" in shown.sections
    (settings,) = (chart for name, chart in shown.charts.items() if name.endswith("rate-accuracy_validation"))
    assert [line["name"] for line in settings["data"] if line["name"]] == ["rate-3e-3 (2 seeds)", "rate-1e-2 (2 seeds)"]
    if keep := os.environ.get("KVJAX_SCREENSHOTS"):
        shutil.copy(page, keep)


def test_seeds_added_to_other_data(screen, capsys):
    """A screen of one seed can get another: what was measured on the base's probe set stays, and is joined."""
    data = [factor for factor in FACTORS if factor["name"] == "data"]
    for seeds in ([3], [3, 5]):
        config = screen(factors=data, seeds=seeds)
        assert main(["factor-screen", f"--config={config}", "--noprogress"]) == 0, capsys.readouterr().err
        plan = plan_screen(FactorSettings(config=str(config)))
        measured = read_factor(plan.layout.factor("data").comparison).settings[1].on_base_probe_set
        assert {len(spread["best"].values) for spread in measured.values()} == {len(seeds)}
        folders = plan.layout.on_base("data/writes-7").iterdir()
        assert sorted(folder.name for folder in folders) == [f"seed_{seed}" for seed in seeds]


def test_run_of_another_config(trained):
    """A folder that holds another run is refused by name, and the run stays."""
    plan, config = trained
    path = next(iter(plan.varied["rate"][0].runs))
    document = json.loads((path / "run_config.json").read_text())
    document["optimization"]["learning_rate"] = 0.5
    (path / "run_config.json").write_text(json.dumps(document))
    assert main(["factor-screen", f"--config={config}", "--noprogress"]) == 2
    assert (path / "checkpoints").is_dir()


def test_summary_by_hand():
    """Differences are of medians to the base's; the share is that of a balanced table worked out by hand."""
    from kvjax.compare.factors import summarize

    entry = summarize("1", ["a", "b"], [{"x": 1.0, "y": 3.0}, {"x": 7.0, "y": None}])
    assert entry["difference"] == {"a": 0.0, "b": 5.0}
    balanced = summarize("1", ["a", "b"], [{"x": 1.0, "y": 3.0}, {"x": 5.0, "y": 7.0}])
    # Mean squares 16 between and 2 within, two seeds each: (16 - 2) / 2 = 7 between, 7 / 9 of the variance.
    assert balanced["shares"]["between"] == pytest.approx(7) and balanced["shares"]["share"] == pytest.approx(7 / 9)
    assert np.isclose(balanced["shares"]["within"], 2)


def test_missing_screen():
    """A screen that is not there is named with the shipped ones."""
    with pytest.raises(InputError, match=r"expected a factors config file, or the name of a shipped one .*quick"):
        plan_screen(FactorSettings(config="nowhere"))
