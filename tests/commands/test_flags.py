"""Flags and settings: one declaration each, checked once, and answered before anything heavy is imported."""

import importlib
import subprocess
import sys

import pytest

from kvjax.commands.flags import flags_for, flags_of, read_settings
from kvjax.commands.main import COMMANDS, main
from kvjax.config.settings import declared
from kvjax.errors import InputError
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.settings import KINDS, InterventionSettings
from kvjax.pipeline.settings import ProbeSetSettings, ProcessSettings, RunsOnBenchmark, SelectSettings, TrainSettings
from kvjax.sweeps.settings import SweepSettings

HEAVY = ("jax", "torch", "numpy", "scipy", "xarray", "pydantic", "orbax")


def settings_of(command):
    return importlib.import_module(f"kvjax.commands.{command.replace('-', '_')}").SETTINGS


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_a_command(command):
    """Every field of its settings is one flag, with the field's default and help."""
    values = flags_of(settings_of(command))
    fields = [field for settings in settings_of(command) for field in declared(settings)]
    assert len({field.name for field in fields}) == len(fields), "no flag is declared twice"
    assert set(values) == {field.name for field in fields}
    for field in fields:
        default = values[field.name].default
        expected = field.default
        if field.many and expected is not None:
            expected = [str(member) for member in expected]
        assert default == expected and field.help.endswith(".")
        assert values[field.name].help.partition(";\n")[0] == field.help  # absl says of some that they can be repeated


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_of_a_command(command):
    """Without flags, settings are those that Python makes without arguments; required ones are refused by name."""
    values = flags_of(settings_of(command))
    values([command])
    for settings in settings_of(command):
        missing = [field.name for field in declared(settings) if field.required]
        if not missing:
            assert read_settings(values, settings) == settings()
            continue
        with pytest.raises(InputError, match="expected a value; found none") as refusal:
            read_settings(values, settings)
        assert refusal.value.parameter == missing[0]


def test_flags_of_settings():
    """Settings written as flags are read as they were; those with their defaults need none."""
    given = (
        RunsOnBenchmark(run_dirs=("runs/a,b", "runs/*")),
        SweepSettings(ablations=("zero", "mean"), memory_gb=1.5, event_drift=False, skip_bad=True, rank_by=None),
    )
    values = flags_of(map(type, given))
    written = flags_for(*given)
    assert len(written) == 6 and flags_for(SweepSettings()) == []
    values(["checkpoint-sweep", *written])
    assert tuple(read_settings(values, type(settings)) for settings in given) == given


@pytest.mark.parametrize("number", ["0", "-1", "many", "1e3", "100000"])
def test_number_of_processes(number):
    """Anything but `auto` and a number of processes is refused."""
    with pytest.raises(InputError, match="processes: expected auto or a number from 1 to 1000; found"):
        ProcessSettings(processes=number)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"quickstart", "pipeline"}))
def test_missing_flag_imports_nothing_heavy(command):
    """The answer to a missing flag needs neither JAX nor NumPy nor anything else that takes time to import."""
    code = (
        "import sys; from kvjax.commands.main import main; status = main(sys.argv[1:]);"
        f"heavy = set({HEAVY}) & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode == 2 and "expected a value; found none" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_lists_from_python_and_from_the_command_line():
    """Texts with commas, lists and tuples are the same setting, in the order of the choices."""
    expected = ("zero", "random")
    for given in ("random,zero", ["random", "zero"], ("zero", "random")):
        assert SweepSettings(ablations=given).ablations == expected
    assert TrainSettings(config="c", seeds="7,11").seeds == (7, 11) == TrainSettings(config="c", seeds=[7, 11]).seeds


@pytest.mark.parametrize(
    ("given", "ranked_by"),
    [
        ({}, "role_mean"),
        ({"ablations": "zero,mean,resample"}, "zero"),
        ({"ablations": "zero,role_mean", "rank_by": "zero"}, "zero"),
        ({"rank_by": "resample"}, "resample"),
    ],
)
def test_default_ranking(given, ranked_by):
    """Role means rank components if they are measured and nobody names another kind."""
    assert SweepSettings(**given).ranked_by == ranked_by


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SweepSettings(precision="high"), "precision: expected one of highest, default; found high"),
        (lambda: SweepSettings(ablations="zero,half"), "ablations: expected ablations among zero, .*; found half"),
        (lambda: SweepSettings(ablations=["mean"]), "ablations: expected zero among the kinds, .*; found mean"),
        (
            lambda: SweepSettings(rank_by="mean"),
            "rank_by: expected one of the measured kinds zero, role_mean, resample .or add it to .*; found mean",
        ),
        (lambda: SweepSettings(rank_by="random"), "rank_by: expected one of zero, .*; found random"),
        (lambda: InterventionSettings(kinds=()), "kinds: expected kinds among activation_patching, .*; found none"),
        (lambda: InterventionSettings(window="5", steps="5"), "window: expected no window beside `steps`; found 5"),
        (lambda: InterventionSettings(pairs_per_kind=1), "pairs_per_kind: expected a whole number of at least 2"),
        (lambda: TrainSettings(config="c", seeds="7,7"), "seeds: expected different whole numbers, .*; found 7,7"),
        (lambda: TrainSettings(config="c", seeds="4294967296"), "seeds: expected different whole numbers"),
        (lambda: TrainSettings(config=""), "config: expected a value; found none"),
        (
            lambda: SelectSettings(min_validation_answer_accuracy=float("nan")),
            "min_validation_answer_accuracy: expected a number from 0.0 to 1.0; found nan",
        ),
    ],
)
def test_settings_that_cannot_be(make, complaint):
    """Python refuses what the command line refuses, and names the parameter."""
    with pytest.raises(InputError, match=complaint):
        make()


LONG_NUMBERS = ("9" * 5000, "9" * 400, "-" + "9" * 400, "nan", "inf", "1e400")


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_beyond_any_use(command, capsys, monkeypatch):
    """Every flag with a number refuses NaN, infinity and thousands of digits in one line; texts refuse the digits."""
    module = importlib.import_module(f"kvjax.commands.{command.replace('-', '_')}")
    monkeypatch.setattr(module, "run", lambda *settings: None)
    fields = [field for settings in module.SETTINGS for field in declared(settings) if field.kind is not bool]
    for field in fields:
        for text in LONG_NUMBERS[: None if field.kind in (int, float) else 3]:
            needed = [f"--{other.name}={(other.choices or ['1'])[0]}" for other in fields if other.required]
            status = main([command, *needed, f"--{field.name}={text}"])
            error = capsys.readouterr().err
            if status == 0:
                assert field.kind is int and len(text) < 4300 and field.maximum is None, (field.name, text)
            else:
                assert status == 2 and len(error.splitlines()) == 1 and len(error) < 800, (field.name, error)
                assert field.name in error, error


def test_whole_numbers_of_any_size():
    """A whole number without an upper limit may be of any size; a number that is none is refused in words."""
    assert ProbeSetSettings(benchmark_dir="b", output="o", seed=10**5000).seed == 10**5000
    with pytest.raises(InputError, match=r"memory_gb: expected a number above 0; found 10+"):
        SweepSettings(memory_gb=10**400)
    with pytest.raises(InputError, match=r"from 1 to 10000; found a number of thousands of digits"):
        SweepSettings(resample_draws=10**5000)


def test_kinds_of_intervention():
    """Every kind that flags offer has a module, and goes by the same name there."""
    assert tuple(find_kind(name).name for name in KINDS) == KINDS
