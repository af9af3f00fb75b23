"""`birth-windows` and `status` as a person types them, on runs whose truth is built in."""

import json
import shutil

import pytest
import torch
import xarray as xr

from kvjax.artifacts.birth_windows_schema import read_birth_windows
from kvjax.artifacts.files import file_sha256
from kvjax.artifacts.identity import sealed
from kvjax.artifacts.run_dir import RunDir
from kvjax.artifacts.story_schema import read_story
from kvjax.commands.main import main
from kvjax.pipeline.story import complete_story
from kvjax.story.text import sections, story_markdown, summary_lines
from tests.helpers.building import SMALL_MODEL, read_lines, write_run
from tests.helpers.commands import refused, sweep_arguments
from tests.helpers.story import write_patching

STEPS = tuple(range(100, 900, 100))
SMALL = ("--pairs_per_kind=2", "--noprogress")


def set_states(run, model_of_step):
    """Gives each checkpoint the weights that another run's checkpoint or this one's had, and a little noise.

    Without noise the checkpoints were copies of each other, which is a fault of its own. What the run recorded of its
    earlier weights goes.
    """
    (run / "metrics.jsonl").unlink(missing_ok=True)
    noise = torch.Generator().manual_seed(0)
    for step, state in model_of_step.items():
        path = run / "checkpoints" / f"step_{step:06d}.pt"
        document = torch.load(path, weights_only=True)
        document["model_state"] = {
            name: tensor + 1e-4 * torch.randn(tensor.shape, generator=noise) for name, tensor in state.items()
        }
        torch.save(document, path)


def state_of(run, step):
    return torch.load(run / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)["model_state"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_benchmark):
    """Swept runs of 8 checkpoints: one stands still, in one the read-out appears between steps 400 and 500."""
    folder = tmp_path_factory.mktemp("runs")
    formed, flat = (write_run(folder / name, small_benchmark, steps=STEPS) for name in ("formed", "flat"))
    knows = state_of(formed, 100)
    before = {**knows, "lm_head.weight": torch.randn(knows["lm_head.weight"].shape, generator=torch.manual_seed(1))}
    set_states(formed, {step: before if step <= 400 else knows for step in STEPS})
    set_states(flat, dict.fromkeys(STEPS, knows))
    for run in (formed, flat):
        config = run / "run_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_steps": 800, "run_name": run.name}))
    assert main(sweep_arguments(folder / "*")) == 0
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """A copy to change."""
    return shutil.copytree(runs, tmp_path / "runs")


def find(*run_dirs, **flags):
    given = {"run_dirs": ",".join(map(str, run_dirs)), **flags}
    return main(["birth-windows", *(f"--{name}={value}" for name, value in given.items())])


def test_formation_and_flat_run(folder, capsys):
    """A formation is found at its planted step; a run that stands still has no window."""
    assert find(folder / "*") == 0
    printed = capsys.readouterr().out
    formed = read_birth_windows(folder / "formed" / "analysis" / "birth_windows.json")
    assert formed.verdict == "windows"
    (window,) = formed.windows
    assert (window.start_step, window.center_step, window.end_step) == (400, 500, 600)
    assert "answer_accuracy" in {trigger.kind for trigger in window.triggers}
    assert {trigger.step for trigger in window.triggers} == {500}
    accuracy = next(entry for entry in window.order if entry.metric == "answer_accuracy")
    assert accuracy.between == (400, 500) and 400 < accuracy.midpoint < 500
    assert all(pair.probability == 0.5 for pair in window.precedes), "all moved in one gap"
    assert len(window.components) == 3 * 4 + 3
    assert formed.births["answer_accuracy"].half_rise_step == 500
    assert "window around step 500" in printed and "order of metrics" in printed

    flat = read_birth_windows(folder / "flat" / "analysis" / "birth_windows.json")
    assert flat.verdict == "no transition" and flat.windows == []
    assert "no transition (no metric shifted beyond its floor" in printed


def test_run_of_one_checkpoint(folder, capsys):
    """A run of one checkpoint is undecidable, not an error."""
    run = folder / "flat"
    for step in STEPS[1:]:
        (run / "checkpoints" / f"step_{step:06d}.pt").unlink()
    shutil.rmtree(run / "analysis")
    assert main(sweep_arguments(run)) == 0
    assert find(run) == 0
    printed = capsys.readouterr().out
    assert "undecidable (1 measured checkpoint:" in printed and "unfinished (100 of 800 steps)" in printed
    assert read_birth_windows(run / "analysis" / "birth_windows.json").verdict == "undecidable"


def status(*run_dirs, **flags):
    given = {"run_dirs": ",".join(map(str, run_dirs)), **flags}
    return main(["status", *(f"--{name}={value}" for name, value in given.items())])


def lines_of_text(printed):
    """Joins what is printed to one line, as it was before it was wrapped."""
    return " ".join(printed.split())


def lines_of(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


class TestStatus:
    def test_way_to_ready(self, folder, capsys):
        """Each command makes its condition true, and the next command is named."""
        run = folder / "formed"
        assert status(run) == 0
        lines = lines_of(capsys)
        assert [line.split(":")[0] for line in lines if line.startswith(("yes", "no "))] == [
            "yes  reference fixed",
            "yes  probe set fixed",
            "yes  sweep complete",
            "no   windows identified",
        ]
        assert f"Next: kvjax birth-windows --run_dirs={run}" in lines
        find(run)
        capsys.readouterr()
        assert status(run, require="true") == 0
        lines = lines_of(capsys)
        assert f"Next: kvjax intervene --run_dirs={run}" in lines
        assert "1 of 1 run ready for circuit work" in lines

    def test_run_without_sweep(self, folder, capsys):
        """A run that was never swept meets no condition."""
        run = folder / "formed"
        shutil.rmtree(run / "analysis")
        assert status(run) == 0
        lines = lines_of(capsys)
        assert sum(line.startswith("no ") for line in lines) == 4
        assert f"Next: kvjax checkpoint-sweep --run_dirs={run}" in lines

    def test_new_checkpoint(self, folder, capsys):
        """A checkpoint that is not measured yet makes the sweep incomplete, and then the windows stale."""
        run = folder / "formed"
        find(run)
        checkpoints = run / "checkpoints"
        document = torch.load(checkpoints / "step_000800.pt", weights_only=True)
        torch.save(document | {"step": 900}, checkpoints / "step_000900.pt")
        capsys.readouterr()
        assert status(run) == 0
        assert any("1 of 9 checkpoints are not measured (steps 900)" in line for line in lines_of(capsys))
        main(sweep_arguments(run))
        capsys.readouterr()
        status(run)
        lines = lines_of(capsys)
        assert any("the sweep has changed since windows were looked for" in line for line in lines)
        assert f"Next: kvjax birth-windows --run_dirs={run}" in lines

    def test_edited_probe_set(self, folder, capsys):
        """An edited probe set is not fixed."""
        probe = folder / "formed" / "analysis" / "probe_set.jsonl"
        probe.write_text(probe.read_text() + "\n")
        status(folder / "formed")
        assert any(line.startswith("no   probe set fixed") and "edited" in line for line in lines_of(capsys))

    def test_reference_of_an_unfinished_run(self, folder, capsys):
        """An unfinished run is measured against its last checkpoint, which is no fixed reference until it is named."""
        run = folder / "formed"
        config = run / "run_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_steps": 2000}))
        main(sweep_arguments(run))
        capsys.readouterr()
        status(run)
        lines = lines_of(capsys)
        last = "the reference step_000800 is the last checkpoint of an unfinished run (800 of 2000 steps)"
        assert f"no   reference fixed: {last}" in lines
        assert f"Next: kvjax checkpoint-sweep --run_dirs={run} --reference=800" in lines
        main(sweep_arguments(run, reference="800"))
        capsys.readouterr()
        status(run)
        assert "yes  reference fixed: the reference is step_000800" in lines_of(capsys)

    def test_renamed_reference(self, folder, capsys):
        """A reference is found by its step, whatever its file is called."""
        checkpoint = folder / "formed" / "checkpoints" / "step_000800.pt"
        moved = checkpoint.rename(checkpoint.with_name("step_800.pt"))
        status(folder / "formed")
        assert "yes  reference fixed: the reference is step_000800" in lines_of(capsys)
        moved.unlink()
        status(folder / "formed")
        assert any("step_000800 is no longer in the run's checkpoints" in line for line in lines_of(capsys))

    def test_run_without_transition(self, folder, capsys):
        """No command can give windows to a run without a transition."""
        find(folder / "flat")
        capsys.readouterr()
        status(folder / "flat")
        lines = lines_of(capsys)
        assert any("the verdict is no transition" in line for line in lines)
        assert "Next: nothing to run; see the reason above" in lines

    def test_require(self, folder, capsys):
        """`--require` exits with 2 and the reason; ready runs are counted."""
        find(folder / "*")
        capsys.readouterr()
        status(folder / "*")
        assert "1 of 2 runs ready for circuit work" in lines_of(capsys)
        assert main(["status", f"--run_dirs={folder / '*'}", "--require"]) == 2
        assert "expected windows identified; found the verdict is no transition" in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["[]", "{", '{"verdict": "maybe"}'])
    def test_damaged_windows(self, folder, capsys, content):
        """Damaged windows are not identified windows."""
        (folder / "formed" / "analysis" / "birth_windows.json").write_text(content)
        assert status(folder / "formed") == 0
        assert any(line.startswith("no   windows identified") for line in lines_of(capsys))


class TestStory:
    def test_files_and_lines_of_a_story(self, folder, capsys):
        """Windows are told in a file that opens, in words, by the command in short and by `status` in full."""
        assert find(folder / "*") == 0
        printed = capsys.readouterr().out
        assert printed.count("What happened:") == 2
        for name in ("formed", "flat"):
            run = RunDir.open(folder / name)
            story, windows = read_story(run.layout.story), read_birth_windows(run.layout.birth_windows)
            assert story.told_from.windows_sha256 == windows.content_sha256
            assert (story.verdict, story.steps) == (windows.verdict, list(STEPS))
            assert story_markdown(story) == run.layout.story_text.read_text()
            assert all(sentence in lines_of_text(printed) for sentence in summary_lines(story))
            assert status(folder / name) == 0
            told = lines_of_text(capsys.readouterr().out)
            assert all(line in told for part in sections(story) for line in part.lines)
            assert "not up to date" not in told
        assert status(folder / "*") == 0
        assert "How sure" not in capsys.readouterr().out, "several runs are told in short"
        assert "Nothing formed: no metric shifted" in printed

    def test_stale_and_missing_stories(self, folder, capsys):
        """A story that is missing, edited or of other windows is named with the command that tells it again."""
        run = folder / "formed"
        find(run)
        path = run / "analysis" / "story.json"
        whole = path.read_text()
        other = json.loads(whole)
        other["told_from"]["windows_sha256"] = "0" * 64
        for content, says in (
            (None, "expected the story of a run (run kvjax birth-windows again); found no such file"),
            (whole.replace("formed", "edited"), "expected the content that its own hash names"),
            ("[]", "expected the story of a run"),
            (
                json.dumps(sealed({k: v for k, v in other.items() if k != "content_sha256"})),
                "found that of windows found before",
            ),
        ):
            path.unlink() if content is None else path.write_text(content)
            capsys.readouterr()
            assert status(run) == 0
            (line,) = [line for line in lines_of(capsys) if line.startswith("The story is not up to date")]
            assert says in line and f"(kvjax birth-windows --run_dirs={run})" in line

    def test_story_after_interventions(self, folder, capsys):
        """Interventions make a story stale; it is completed by what they measured, as `intervene` does at its end."""
        run = folder / "formed"
        find(run)
        opened = RunDir.open(run)
        hashes = {step: file_sha256(opened.checkpoints[step]) for step in (500, 600)}
        recovered = {"value": [(0.9, 0.8, 1.0)], "swap": [(0.0, -0.1, 0.1)]}
        path = opened.layout.intervention("activation_patching", "window_500")
        write_patching(path, recovered, ["L0H0"], hashes)
        capsys.readouterr()
        assert status(run) == 0
        assert any("interventions were measured again since it was told" in line for line in lines_of(capsys))
        complete_story(opened)
        assert status(run) == 0
        told = lines_of_text(capsys.readouterr().out)
        assert "not up to date" not in told
        assert "Patching on value pairs at step 600" in told
        story = read_story(opened.layout.story)
        assert [one.confirmed for one in story.phases[0].confirmations if one.kind == "value"] == [True]

    def test_story_in_another_folder(self, folder, tmp_path, capsys):
        """With `--output_dir`, the story lies with the other results, and `status` of that folder tells it."""
        run, out = folder / "formed", tmp_path / "out"
        shutil.move(run / "analysis", out / "analysis")
        assert find(run, output_dir=out) == 0
        assert (out / "analysis" / "story.md").is_file() and not (run / "analysis" / "story.md").exists()
        capsys.readouterr()
        assert status(out) == 0
        assert "What happened in formed" in capsys.readouterr().out


class TestBadInput:
    def test_no_sweep(self, small_run, capsys):
        """A run without a sweep is refused with the command to run first."""
        line = refused(capsys, "birth-windows", f"--run_dirs={small_run}")
        assert "sweep.json" in line and "run kvjax checkpoint-sweep first" in line

    def test_damaged_arrays(self, folder, capsys):
        """Damaged arrays are refused by name."""
        path = folder / "flat" / "analysis" / "checkpoint_metrics.nc"
        path.write_bytes(path.read_bytes()[:2000])
        line = refused(capsys, "birth-windows", f"--run_dirs={folder / 'flat'}")
        assert "checkpoint_metrics.nc" in line

    def test_sweep_json_without_checkpoints(self, folder, capsys):
        """A sweep.json without checkpoints is refused, and `status` goes on."""
        (folder / "flat" / "analysis" / "sweep.json").write_text("{}")
        assert "sweep.json" in refused(capsys, "birth-windows", f"--run_dirs={folder / 'flat'}")
        assert status(folder / "flat") == 0

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"threshold": 13.0}, "threshold_alone"),
            ({"min_side_checkpoints": 5}, "min_side_checkpoints"),
            ({"min_side_checkpoints": 1}, "min_side_checkpoints"),
            ({"wobble_lags": [0]}, "wobble_lags"),
            ({"treshold": 5.0}, "treshold"),
            ({"min_checkpoints": 3}, "min_checkpoints"),
        ],
    )
    def test_window_config(self, folder, tmp_path, capsys, change, complaint):
        """A window config that cannot work is refused with the field's name."""
        from kvjax.config.files import find_config

        document = json.loads(find_config("default", "windows").read_text()) | change
        config = tmp_path / "windows.json"
        config.write_text(json.dumps(document))
        line = refused(capsys, "birth-windows", f"--run_dirs={folder / 'flat'}", f"--config={config}")
        assert str(config) in line and complaint in line

    def test_unknown_config(self, folder, capsys):
        """An unknown config is refused with the names that exist."""
        assert "(default)" in refused(capsys, "birth-windows", f"--run_dirs={folder / 'flat'}", "--config=mine")


class TestIntervene:
    def test_files_of_a_window(self, folder, capsys):
        """A window gets a summary, arrays and table rows, measured once; damaged files stop no other."""
        run = folder / "formed"
        find(run)
        capsys.readouterr()
        kinds = ("necessity", "across_checkpoints", "neurons")
        assert main(["intervene", f"--run_dirs={run}", f"--kinds={','.join(kinds)}", *SMALL]) == 0
        printed = capsys.readouterr().out
        analysis = run / "analysis"
        for kind in kinds:
            path = analysis / "interventions" / kind / "window_500.json"
            document = json.loads(path.read_text())
            assert document["kind"] == kind and document["window"]["center_step"] == 500
            assert document["steps"] == [400, 500, 600] and document["pairs"]["counts"]["swap"] == 2
            assert document["effects"] and str(path) in printed
            with xr.open_dataset(path.with_suffix(".nc"), engine="netcdf4") as dataset:
                assert dataset["step"].values.tolist() == [400, 500, 600]
                assert dataset.attrs["run_name"] == "formed"
        table = analysis / "component_candidates" / "neurons.jsonl"
        rows = read_lines(table)
        table.unlink()
        assert main(["intervene", f"--run_dirs={run}", f"--kinds={','.join(kinds)}", *SMALL]) == 0
        again = capsys.readouterr().out
        assert again.replace("  measured before (--overwrite measures again)\n", "") == printed != again
        assert read_lines(table) == rows
        # A damaged file, also one that is not asked for, keeps no other from being measured.
        neurons = analysis / "interventions" / "neurons"
        for name in ("window_500.nc", "steps_9.nc"):
            (neurons / name).write_bytes(b"damaged")
        assert main(["intervene", f"--run_dirs={run}", "--kinds=neurons", *SMALL]) == 0
        assert read_lines(table) == rows
        assert len(rows) == 3 * 3 * SMALL_MODEL["d_ff"]
        ranks = [row["rank"] for row in rows if row["step"] == 500]
        assert sorted(ranks) == list(range(1, 3 * SMALL_MODEL["d_ff"] + 1))
        # Other steps, some of them the window's: each step stays once in the table, under the newest measurement.
        assert main(["intervene", f"--run_dirs={run}", "--steps=100,500", "--kinds=neurons", *SMALL]) == 0
        assert (analysis / "interventions" / "neurons" / "steps_100-500.json").is_file()
        again = read_lines(analysis / "component_candidates" / "neurons.jsonl")
        assert len(again) == 4 * 3 * SMALL_MODEL["d_ff"] and len(
            {(r["step"], r["layer"], r["neuron"]) for r in again}
        ) == len(again)
        states = json.loads((analysis / "interventions" / "across_checkpoints" / "window_500.json").read_text())
        assert states["controls"]["largest_effect_of_own_states_in_logits"] < 1e-3

    def test_run_that_is_not_ready(self, folder, capsys):
        """A run that is not ready is refused with the next command, unless forced."""
        run = folder / "formed"
        line = refused(capsys, "intervene", f"--run_dirs={run}", *SMALL)
        assert "windows identified" in line and f"run kvjax birth-windows --run_dirs={run}" in line
        forced = ["--force", "--steps=500", "--kinds=necessity", "--components=L0H1,L2.mlp"]
        assert main(["intervene", f"--run_dirs={run}", *forced, *SMALL]) == 0
        document = json.loads((run / "analysis" / "interventions" / "necessity" / "steps_500.json").read_text())
        assert document["forced"] and document["effects"][0]["named_set"] == ["L0H1", "L2.mlp"]

    def test_bad_input(self, folder, capsys):
        """Bad flags are refused in one line."""
        run = folder / "formed"
        find(run)
        capsys.readouterr()
        for flags, expected in (
            (["--kinds=surgery"], "--kinds: expected kinds among activation_patching"),
            (["--window=300"], "expected a window around 300; found windows around: 500"),
            (["--window=500", "--steps=500"], "--window: expected no window beside --steps; found 500"),
            (["--components=L9H9"], "--components: expected components among L0H0"),
            (["--components=MLP2"], "--components: expected L2.mlp for the MLP of layer 2; found MLP2"),
            (["--steps=250"], "step"),
        ):
            assert expected in refused(capsys, "intervene", f"--run_dirs={run}", *flags, *SMALL)
        find(folder / "flat")
        capsys.readouterr()
        assert "no transition" in refused(capsys, "intervene", f"--run_dirs={folder / 'flat'}", *SMALL)
