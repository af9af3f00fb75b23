"""The commands as a person types them: results on success, one line and status 2 on bad input."""

import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

from kvjax.commands.main import COMMANDS, main
from tests.helpers.building import STEPS, read_lines, small_benchmark_config
from tests.helpers.commands import refused, sweep_arguments
from tests.helpers.malicious import write_malicious


def test_way_from_config_to_rows(tmp_path, capsys, small_run):
    """Benchmark, probe set and sweep follow from a config by three commands."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_benchmark_config()))
    benchmark, probe = tmp_path / "benchmark", tmp_path / "probe.jsonl"
    assert main(["generate-benchmark", f"--config={config}", f"--output_dir={benchmark}"]) == 0
    flags = ["--examples_per_split=8", "--fit_examples=12", f"--output={probe}"]
    assert main(["generate-probe-set", f"--benchmark_dir={benchmark}", *flags]) == 0
    arguments = sweep_arguments(small_run, benchmark_dir=benchmark, probe_set=probe, ablations="zero", probe="none")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"Results in {small_run / 'analysis'}" in printed and "Next:" in printed
    rows = read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["step"] for row in rows] == list(STEPS)


def test_conversion_both_ways(small_run, capsys):
    """`convert` verifies recorded metrics, and exports to PyTorch."""
    assert main(["convert", f"--run_dirs={small_run}", "--verify=metrics", "--noprogress"]) == 0
    assert "recorded" in capsys.readouterr().out
    assert main(["convert", f"--run_dirs={small_run}", "--to=torch", "--noprogress"]) == 0
    assert len(list((small_run / "analysis" / "exported_torch").glob("*.pt"))) == len(STEPS)


def test_runs_by_glob(tmp_path, small_run, capsys):
    """Runs that match a pattern are swept together."""
    shutil.copytree(small_run, tmp_path / "run_b")
    assert main(sweep_arguments(tmp_path / "run*")) == 0
    for name in ("run", "run_b"):
        assert (tmp_path / name / "analysis" / "checkpoint_metrics.nc").is_file()


@pytest.mark.parametrize("still_written", [True, False])
def test_follow_of_a_growing_file(small_run, monkeypatch, still_written):
    """`--follow` waits for a last checkpoint that is still being written, and no longer."""
    last = small_run / "checkpoints" / f"step_{STEPS[-1]:06d}.pt"
    whole, rounds = last.read_bytes(), []
    last.write_bytes(whole[:5000])

    def wait(seconds):
        rounds.append(seconds)
        assert len(rounds) < 4, "it ends"
        if still_written:
            last.write_bytes(whole)

    monkeypatch.setattr("kvjax.pipeline.follow.time", types.SimpleNamespace(sleep=wait))
    assert main([*sweep_arguments(small_run, ablations="zero", probe="none"), "--follow"]) == 0
    rows = read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["step"] for row in rows] == list(STEPS if still_written else STEPS[:-1])
    assert rounds


class TestBadInput:
    """Each of these names the file and the cause, exits with 2, and executes nothing."""

    def test_truncated_checkpoint(self, capsys, small_run):
        """A truncated checkpoint is damaged."""
        path = small_run / "checkpoints" / "step_000200.pt"
        path.write_bytes(path.read_bytes()[:3000])
        line = refused(capsys, *sweep_arguments(small_run))
        assert str(path) in line and "damaged" in line

    def test_foreign_state_dict(self, capsys, small_run):
        """A state of another model is refused with its unknown names."""
        path = small_run / "checkpoints" / "step_000100.pt"
        torch.save({"step": 100, "model_state": torch.nn.Linear(3, 3).state_dict()}, path)
        line = refused(capsys, *sweep_arguments(small_run))
        assert str(path) in line and "unknown weight, bias" in line

    def test_nan_weights(self, capsys, small_run):
        """A NaN weight is refused by name."""
        path = small_run / "checkpoints" / "step_000300.pt"
        document = torch.load(path, weights_only=True)
        document["model_state"]["blocks.1.ff.fc_out.bias"][3] = float("nan")
        torch.save(document, path)
        line = refused(capsys, *sweep_arguments(small_run))
        assert str(path) in line and "blocks.1.ff.fc_out.bias" in line

    def test_malicious_pickle(self, capsys, small_run, tmp_path):
        """A malicious pickle is refused, and runs nothing."""
        path = small_run / "checkpoints" / "step_000100.pt"
        write_malicious(path, tmp_path / "executed")
        line = refused(capsys, *sweep_arguments(small_run))
        assert str(path) in line and not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda d: d["model_state"].update({"a\nb": torch.zeros(1)}), "unknown a b"),
            (lambda d: d["model_state"].update(sparse=torch.eye(2).to_sparse()), "a dense tensor for sparse"),
        ],
    )
    def test_odd_content(self, capsys, small_run, change, complaint):
        """Odd content of a checkpoint is refused by name."""
        path = small_run / "checkpoints" / "step_000100.pt"
        document = torch.load(path, weights_only=True)
        change(document)
        torch.save(document, path)
        line = refused(capsys, *sweep_arguments(small_run))
        assert "step_000100.pt" in line and complaint in line

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("best_checkpoint.json", '{"step": Infinity, "path": "x"}', "best_checkpoint.json"),
            ("run_config.json", "[" * 100000, "run_config.json"),
            ("checkpoints/step_100.pt", "", "one checkpoint of step 100"),
        ],
    )
    def test_odd_files(self, capsys, small_run, name, content, complaint):
        """Odd files of a run are refused by name."""
        (small_run / name).parent.mkdir(exist_ok=True)
        (small_run / name).write_text(content)
        assert complaint in refused(capsys, *sweep_arguments(small_run, reference="best"))

    def test_folder_instead_of_a_table(self, capsys, small_run):
        """A folder in place of a table is refused by name."""
        (small_run / "analysis" / "checkpoint_metrics.jsonl").mkdir(parents=True)
        line = refused(capsys, *sweep_arguments(small_run))
        assert "checkpoint_metrics.jsonl" in line

    def test_recorded_nan(self, capsys, small_run):
        """A recorded accuracy that is NaN is refused."""
        path = small_run / "metrics.jsonl"
        rows = path.read_text().splitlines()
        row = json.loads(rows[0]) | {"answer_accuracy": float("nan")}
        path.write_text("\n".join([json.dumps(row), *rows[1:]]) + "\n")
        line = refused(capsys, "convert", f"--run_dirs={small_run}", "--verify=metrics", "--noprogress")
        assert "step_000100.pt" in line and "nan" in line

    def test_mismatched_vocabulary(self, capsys, small_run, tmp_path):
        """A benchmark of another vocabulary is refused."""
        config = tmp_path / "other.json"
        config.write_text(json.dumps(small_benchmark_config(num_values=49)))
        main(["generate-benchmark", f"--config={config}", f"--output_dir={tmp_path / 'other'}"])
        capsys.readouterr()
        line = refused(capsys, *sweep_arguments(small_run, benchmark_dir=tmp_path / "other"))
        assert "step_000300.pt" in line and "vocabulary" in line  # the reference, which is read first

    def test_missing_benchmark(self, capsys, small_run):
        """A missing benchmark directory is named."""
        line = refused(capsys, *sweep_arguments(small_run, benchmark_dir=small_run / "nowhere"))
        assert "nowhere" in line and "a benchmark directory" in line

    def test_recorded_benchmark_that_is_gone(self, capsys, small_run):
        """A recorded benchmark that is gone is named, with the flag that helps."""
        path = small_run / "run_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"benchmark_dir": "data/gone"}))
        line = refused(capsys, *sweep_arguments(small_run))
        assert "run_config.json" in line and "data/gone" in line and "--benchmark_dir" in line

    def test_benchmark_of_an_earlier_sweep(self, capsys, small_run, small_benchmark, tmp_path):
        """The benchmark of an earlier sweep is found again, unless it changed."""
        path = small_run / "run_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"benchmark_dir": "data/gone"}))
        benchmark = shutil.copytree(small_benchmark, tmp_path / "benchmark")
        assert main(sweep_arguments(small_run, benchmark_dir=benchmark, ablations="zero", probe="none")) == 0
        assert main(sweep_arguments(small_run, ablations="zero", probe="none")) == 0
        assert "3 reused" in capsys.readouterr().out
        metadata = benchmark / "metadata.json"
        metadata.write_text(metadata.read_text() + " ")
        assert "data/gone" in refused(capsys, *sweep_arguments(small_run, ablations="zero", probe="none"))

    @pytest.mark.parametrize("command", ["convert", "checkpoint-sweep"])
    def test_run_without_step_checkpoints(self, capsys, small_run, command):
        """A run without step checkpoints is refused."""
        for path in (small_run / "checkpoints").glob("step_*.pt"):
            path.unlink()
        line = refused(capsys, command, "--noprogress", f"--run_dirs={small_run}")
        assert str(small_run / "checkpoints") in line and "step_XXXXXX.pt; found none" in line

    def test_missing_run(self, capsys, tmp_path):
        """A missing run, or a pattern without a match, is refused."""
        assert "a run directory" in refused(capsys, *sweep_arguments(tmp_path / "none"))
        assert "matching" in refused(capsys, *sweep_arguments(tmp_path / "none*"))

    def test_config_field_of_another_type(self, capsys, small_run):
        """A config field of another type is refused by name and value."""
        path = small_run / "run_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": "many"}))
        line = refused(capsys, *sweep_arguments(small_run))
        assert "run_config.json" in line and "num_steps" in line and "many" in line

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            ({"steps": "150"}, "--steps=150"),
            ({"steps": "soon"}, "250,1000-4000; found soon"),
            ({"reference": "150"}, "--reference=150"),
            ({"steps": "9" * 250}, "a checkpoint for --steps=999"),
            ({"reference": "9" * 250}, "a checkpoint for --reference=999"),
            ({"reference": "last"}, "final, best or a step; found last"),
            ({"checkpoint_batch": "0"}, "auto or a positive number up to 10000; found 0"),
            ({"precision": "high"}, "precision"),
            ({"no_such_flag": "1"}, "no_such_flag"),
            ({"probe_set": "none.jsonl"}, "none.jsonl: expected a probe set"),
        ],
    )
    def test_flags(self, capsys, small_run, flags, complaint):
        """A flag of a wrong value is refused by name."""
        assert complaint in refused(capsys, *sweep_arguments(small_run, **flags))

    def test_required_flags_and_stray_words(self, capsys, small_run):
        """A missing flag and a stray word are refused."""
        assert "--run_dirs: expected a value" in refused(capsys, "checkpoint-sweep")
        assert "expected flags only; found 'run'" in refused(capsys, "checkpoint-sweep", "run")

    def test_files_after_a_failed_overwrite(self, capsys, small_run):
        """A failed overwrite leaves earlier tables, and no half-written file."""
        main(sweep_arguments(small_run))
        analysis = small_run / "analysis"
        before = {path: path.read_bytes() for path in analysis.rglob("*") if path.is_file()}
        (small_run / "checkpoints" / "step_000200.pt").write_bytes(b"")
        capsys.readouterr()
        refused(capsys, *sweep_arguments(small_run, overwrite="true"))
        tables = {path: data for path, data in before.items() if path.parent.name != "measured"}
        assert all(path.read_bytes() == data for path, data in tables.items())
        assert not list(analysis.rglob(".*")), "no half-written file is left"


def test_skip_bad(small_run, capsys):
    """`--skip_bad` writes the rows of healthy checkpoints and lists the others."""
    (small_run / "checkpoints" / "step_000200.pt").write_bytes(b"")
    assert main(sweep_arguments(small_run, skip_bad="true")) == 0
    assert "skipped step_000200.pt" in capsys.readouterr().out
    rows = read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl")
    assert [row["step"] for row in rows] == [100, 300]


def test_overview(capsys):
    """The overview names every command; an unknown one is refused."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert "found nonsense" in refused(capsys, "nonsense")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_flags(command):
    """Each flag is explained, with its default."""
    done = subprocess.run(
        [sys.executable, "-m", "kvjax.commands.main", command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    flags = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    explained = [line for line in done.stdout.splitlines() if line.startswith("      ")]
    assert len(flags) == len(explained) >= 3 and all("(default: " in line for line in flags)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe(arguments, unbuffered):
    """A reader that has read enough ends a command without a word."""
    command = [sys.executable, "-m", "kvjax.commands.main", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_full_disk_behind_the_output():
    """Output that cannot be written is one line and status 2."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kvjax.commands.main", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_escape_sequences_of_a_file(small_run, capsys):
    """A run's name cannot steer the terminal."""
    path = small_run / "run_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_name": "\x1b[31mRED\n1 of 1 ready" + 10**5 * "x"}))
    assert main(["status", f"--run_dirs={small_run}"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"\x1b[31mRED 1 of 1 ready" in printed and 200 * "x" not in printed


def test_lone_surrogate_in_a_name(small_run, capsys):
    """A name that no file can hold is refused before anything is measured, with the file's name."""
    path = small_run / "run_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_name": "\ud800"}))
    line = refused(capsys, *sweep_arguments(small_run))
    assert str(path) in line and "half of a surrogate pair" in line


def test_closed_output(tmp_path):
    """A process without any output works, and reports what is wrong by its status."""
    command = f"{sys.executable} -m kvjax.commands.main"
    assert subprocess.run(f"{command} --version >&-", shell=True, stderr=subprocess.PIPE).stderr == b""
    assert subprocess.run(f"{command} nonsense >&- 2>&-", shell=True).returncode == 2


def test_switches_of_jax(small_run, swept_without_switches):
    """Switches with which JAX computes otherwise are set aside with a note each, and numbers are the same."""
    switches = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "True", "JAX_DEBUG_INFS": "yes", "JAX_DISABLE_JIT": "on"}
    done = sweep_in_a_process(small_run, switches)
    notes = [line for line in done.stderr.splitlines() if "is set aside" in line]
    assert done.returncode == 0 and len(notes) == len(switches)
    assert all(f"kvjax: note: {name} is set aside" in line for name, line in zip(switches, notes, strict=True))
    assert read_lines(small_run / "analysis" / "checkpoint_metrics.jsonl") == swept_without_switches


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_switches_that_are_off(value):
    """A switch that is off is nothing to speak of, though JAX itself stops at an empty one."""
    command = [sys.executable, "-m", "kvjax.commands.main", "status", "--run_dirs=nothing"]
    environment = os.environ | {"JAX_ENABLE_X64": value}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.fixture
def swept_without_switches(untied_run, tmp_path):
    """The rows of a sweep by a command in a plain environment."""
    run = shutil.copytree(untied_run, tmp_path / "plain")
    assert sweep_in_a_process(run, {}).returncode == 0
    return read_lines(run / "analysis" / "checkpoint_metrics.jsonl")


def sweep_in_a_process(run, switches):
    arguments = sweep_arguments(run, ablations="zero", probe="none")
    command = [sys.executable, "-m", "kvjax.commands.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | switches)
