"""Plans a factor screen: which benchmarks, runs and comparisons it consists of, and about what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from kvjax.artifacts.layout import ScreenLayout
from kvjax.config.benchmark import BenchmarkConfig
from kvjax.config.factors import BASE, Factor, FactorScreenConfig, FactorValue, base_configs, overridden
from kvjax.config.files import find_config, read_config
from kvjax.config.train import TrainConfig
from kvjax.pipeline.settings import FactorSettings
from kvjax.pipeline.train import run_directories
from kvjax.train.loop import shared_settings


@dataclasses.dataclass(frozen=True)
class PlannedSetting:
    """One setting: the base, or one value of one factor.

    Attributes:
      factor: the factor's name; `base` for the base itself.
      label: what this value is called.
      benchmark_dir: what its runs are trained on.
      benchmark: what that is drawn from.
      runs: run directory -> config, a seed each.
      overrides: dotted fields in which it differs from the base, with their values.
    """

    factor: str
    label: str
    benchmark_dir: Path
    benchmark: BenchmarkConfig
    runs: Mapping[Path, TrainConfig]
    overrides: Mapping[str, object]

    @property
    def name(self) -> str:
        return BASE if self.factor == BASE else f"{self.factor}/{self.label}"

    @property
    def config(self) -> TrainConfig:
        """The config of its first seed."""
        return next(iter(self.runs.values()))


@dataclasses.dataclass(frozen=True)
class ScreenPlan:
    """A whole screen.

    Attributes:
      screen: its config.
      layout: where everything of it lies.
      base: the base's setting.
      varied: the other settings by factor, in the config's order.
    """

    screen: FactorScreenConfig
    layout: ScreenLayout
    base: PlannedSetting
    varied: Mapping[str, tuple[PlannedSetting, ...]]

    @property
    def settings(self) -> tuple[PlannedSetting, ...]:
        return (self.base, *(setting for settings in self.varied.values() for setting in settings))

    @property
    def runs(self) -> dict[Path, TrainConfig]:
        return {path: config for setting in self.settings for path, config in setting.runs.items()}

    @property
    def programs(self) -> tuple[tuple[PlannedSetting, ...], ...]:
        """Groups the settings whose runs train as one program: those of one shape, on the same data and steps."""
        groups: dict[str, list[PlannedSetting]] = {}
        for setting in self.settings:
            groups.setdefault(shared_settings(setting.config), []).append(setting)
        return tuple(map(tuple, groups.values()))

    def factor(self, name: str) -> Factor:
        return next(factor for factor in self.screen.factors if factor.name == name)

    def compared(self, name: str) -> dict[str, PlannedSetting]:
        """Lists the settings of a factor by label, the base first."""
        return {self.factor(name).base_label: self.base} | {one.label: one for one in self.varied[name]}


def plan_screen(settings: FactorSettings) -> ScreenPlan:
    """Plans a screen from its config; reads and checks every config, writes nothing.

    Raises:
      InputError: a config is missing, or cannot hold what a factor sets.
    """
    source = find_config(settings.config, "factors")
    screen = read_config(source, FactorScreenConfig)
    if settings.seeds is not None:
        screen = screen.model_copy(update={"seeds": settings.seeds})
    layout = ScreenLayout(Path(settings.output_dir or screen.output_dir))
    train, benchmark = base_configs(screen, source)
    base = _planned(layout, screen, BASE, BASE, train, benchmark, layout.benchmark(BASE), {})
    varied = {}
    for factor in screen.factors:
        varied[factor.name] = tuple(
            _varied(layout, screen, factor, value, train, benchmark, f"{source}: {factor.name}, {value.label}")
            for value in factor.values
        )
    return ScreenPlan(screen, layout, base, varied)


def _varied(
    layout: ScreenLayout,
    screen: FactorScreenConfig,
    factor: Factor,
    value: FactorValue,
    train: TrainConfig,
    benchmark: BenchmarkConfig,
    where: str,
) -> PlannedSetting:
    own = overridden(benchmark, value.benchmark, where)
    drawn = layout.benchmark(BASE if own == benchmark else f"{factor.name}/{value.label}")
    fields = {**value.train, **{f"benchmark.{field}": one for field, one in value.benchmark.items()}}
    config = overridden(train, value.train, where)
    return _planned(layout, screen, factor.name, value.label, config, own, drawn, fields)


def _planned(
    layout: ScreenLayout,
    screen: FactorScreenConfig,
    factor: str,
    label: str,
    train: TrainConfig,
    benchmark: BenchmarkConfig,
    benchmark_dir: Path,
    overrides: Mapping[str, object],
) -> PlannedSetting:
    name = screen.name if factor == BASE else f"{screen.name}_{factor}_{label}"
    config = train.model_copy(update={"run_name": name, "benchmark_dir": str(benchmark_dir.resolve())})
    folder = layout.runs / (BASE if factor == BASE else f"{factor}/{label}")
    runs = run_directories(config, screen.seeds, str(folder))
    return PlannedSetting(factor, label, benchmark_dir, benchmark, runs, overrides)
