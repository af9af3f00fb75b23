"""Interventions measured before: used again for exactly what they were measured on, and never lost unasked."""

import dataclasses
import json
import shutil

import pytest
import torch
from kvjax.converters.parameter_store import read_stored_run

from kvjax.artifacts.run_dir import RunDir
from kvjax.errors import InputError
from kvjax.intervene import analysis
from kvjax.intervene.inputs import Outcome
from kvjax.intervene.kinds import find_kind
from kvjax.intervene.settings import InterventionSettings
from kvjax.pipeline.interventions import intervene as intervene_in_runs
from kvjax.pipeline.interventions import interventions_are_current
from kvjax.pipeline.settings import PairSource, RunsOnBenchmark
from kvjax.task.benchmark import Benchmark
from kvjax.task.probe_set import generate_probe_set
from tests.helpers.opened_files import OpenedFiles

KINDS = ("path_patching", "necessity")


@pytest.fixture
def intervened(small_run, monkeypatch):
    """Returns a function that intervenes at two steps, and says of each kind whether it was measured now.

    A count of pairs stands for the numbers, since only whether they are measured matters here. Of attribution it notes
    which stored results it was put beside, by hash.
    """
    measured, completed = [], []

    def counting(kind):
        def measure(inputs):
            measured.append(kind)
            dataset = inputs.dataset()
            dataset["pairs"] = (("pair_kind",), [len(own) for own in inputs.groups.members.values()])
            return Outcome(dataset, summarise(dataset, inputs.metric) | {"controls": {}})

        return measure

    def summarise(dataset, metric):
        return {"metric": metric, "effects": []}

    def beside(dataset, stored, groups):
        completed.append("attribution")
        assert int(dataset["pairs"].sum()) == len(groups.reads_N)
        return Outcome(dataset, {"effects": sorted(stored), "controls": {}})

    fakes = {name: dataclasses.replace(find_kind(name), analyse=counting(name)) for name in (*KINDS, "attribution")}
    fakes["attribution"] = dataclasses.replace(fakes["attribution"], beside=beside)
    fakes["path_patching"] = dataclasses.replace(fakes["path_patching"], summarise=summarise)
    monkeypatch.setattr(analysis, "find_kind", fakes.__getitem__)

    def intervene(kinds=KINDS, *, runs=(small_run,), probe_set=None, **given):
        measured.clear(), completed.clear()
        settings = InterventionSettings(
            **{"kinds": kinds, "steps": "100,200", "pairs_per_kind": 2, "force": True, **given}
        )
        reports = intervene_in_runs(RunsOnBenchmark.of(runs), PairSource(probe_set=probe_set), settings)
        assert [report.kind for report in reports] == len(runs) * list(kinds)
        written = [report.kind for report in reports if not report.reused]
        assert written == list(dict.fromkeys([*measured, *completed]))
        assert all(report.document == json.loads(report.path.read_text()) for report in reports)
        return tuple(measured)

    return intervene


@pytest.fixture
def folder(small_run):
    return small_run / "analysis" / "interventions"


def test_call_after_one_that_stopped(intervened, monkeypatch):
    """A later call measures only the kinds that the stopped one did not."""
    whole = analysis.find_kind

    def stops(inputs):
        raise KeyboardInterrupt

    def stopping(name):
        return dataclasses.replace(whole(name), analyse=stops) if name == "necessity" else whole(name)

    monkeypatch.setattr(analysis, "find_kind", stopping)
    with pytest.raises(KeyboardInterrupt):
        intervened()
    monkeypatch.setattr(analysis, "find_kind", whole)
    assert intervened() == ("necessity",)
    assert intervened() == ()
    assert intervened(overwrite=True) == KINDS


def test_scores_completed_by_later_effects(intervened, small_run):
    """Attribution reads what other kinds stored; a later call adds what it lacked, and scores nothing again."""
    path = small_run / "analysis" / "interventions" / "attribution" / "steps_100_200.json"
    settings = InterventionSettings(kinds=("attribution",), steps="100,200", pairs_per_kind=2, force=True)

    def effects():
        return json.loads(path.read_text())["effects"]

    assert intervened(("attribution",)) == ("attribution",) and effects() == [], "scores alone"
    assert interventions_are_current(RunDir.open(small_run), settings).holds
    assert intervened(("path_patching",)) == ("path_patching",)
    assert not interventions_are_current(RunDir.open(small_run), settings).holds
    before = path.stat().st_mtime_ns
    assert intervened(("attribution",)) == () and effects() == ["path_patching"] and path.stat().st_mtime_ns > before
    assert interventions_are_current(RunDir.open(small_run), settings).holds
    before = path.stat().st_mtime_ns
    assert intervened(("path_patching", "attribution")) == () and path.stat().st_mtime_ns == before
    shutil.rmtree(small_run / "analysis" / "interventions" / "path_patching")
    assert intervened(("attribution",)) == () and effects() == ["path_patching"], "numbers once read are kept"


def test_effects_of_other_pairs(intervened, small_run):
    """Stored effects of other pairs are not put beside scores; those of one call are."""
    intervened(("path_patching",), pairs_per_kind=3)
    path = small_run / "analysis" / "interventions" / "attribution" / "steps_100_200.json"
    intervened(("attribution",))
    assert json.loads(path.read_text())["effects"] == []
    assert intervened(("path_patching", "attribution"), overwrite=True) == ("path_patching", "attribution")
    document = json.loads(path.read_text())
    (sha256,) = document["measured_on"]["inputs"]["stored_results"].values()
    stored = json.loads((path.parents[1] / "path_patching" / path.name).read_text())
    assert document["effects"] == ["path_patching"] and sha256 == stored["arrays"]["sha256"]


def test_changed_checkpoint(intervened, small_run):
    """A changed checkpoint of the window is measured anew; others do not matter."""
    intervened()
    other = small_run / "checkpoints" / "step_000300.pt"
    changed = small_run / "checkpoints" / "step_000100.pt"
    document = torch.load(changed, weights_only=True)
    document["model_state"] = torch.load(other, weights_only=True)["model_state"]
    other.unlink()
    assert intervened() == (), "a checkpoint that is not looked at"
    torch.save(document, changed)
    assert intervened() == KINDS
    assert intervened() == ()


def test_other_settings(intervened, folder):
    """Results of other settings are replaced only on request."""
    intervened()
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for settings, complaint in (
        ({"pairs_per_kind": 3}, r"`pairs_per_kind=2`, as it was measured, or `overwrite`; found `pairs_per_kind=3`"),
        ({"pairs_per_kind": None}, "expected `pairs_per_kind=2`, .*; found no `pairs_per_kind`"),
        ({"precision": "default"}, "expected `precision=highest`, .*; found `precision=default`"),
        ({"metric": "answer_loss"}, "expected no `metric`, .*; found `metric=answer_loss`"),
        (
            {"components": ("L0H1", "L2.mlp")},
            "expected no `components`, .*; found `components=L0H1,L2.mlp`",
        ),
    ):
        with pytest.raises(InputError, match=complaint):
            intervened(**settings)
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(InputError, match=r"expected no `rank_by`, .*; found `rank_by=mean`"):
        intervened(("necessity",), rank_by="mean")
    assert intervened(("path_patching",), components=("L0H1",), rank_by="zero") == (), "which asks for neither"
    assert intervened(components=("L0H1", "L2.mlp"), overwrite=True) == KINDS
    assert intervened(components=("L2.mlp", "L0H1", "L2.mlp")) == (), "the same set"
    older = folder / "necessity" / "steps_100_200.json"
    document = json.loads(older.read_text())
    del document["measured_on"]
    older.write_text(json.dumps(document))
    with pytest.raises(InputError, match="a result of this version, or `overwrite`; found one that does not say"):
        intervened()
    assert intervened(pairs_per_kind=3, overwrite=True) == KINDS


def test_another_metric(intervened, folder):
    """Another metric of arrays that hold all is summarised, not measured; a ranking by one is replaced on request."""
    intervened()
    summary = folder / "path_patching" / "steps_100_200.json"
    before = json.loads(summary.read_text())
    assert before["metric"] == "logit_difference"
    assert intervened(("path_patching",), metric="answer_loss") == ()
    after = json.loads(summary.read_text())
    assert after["metric"] == "answer_loss"
    assert {name for name in after if after[name] != before[name]} == {"metric", "content_sha256"}
    with pytest.raises(InputError, match=r"necessity.*: expected no `metric`, .* found `metric=answer_loss`"):
        intervened(metric="answer_loss")
    assert intervened(metric="answer_loss", overwrite=True) == KINDS
    assert intervened(metric="answer_loss") == ()


def arrays_cut(summary):
    arrays = summary.with_suffix(".nc")
    arrays.write_bytes(arrays.read_bytes()[:200])


def no_arrays(summary):
    summary.with_suffix(".nc").unlink()


def no_json(summary):
    summary.write_text("{")


def other_document(summary):
    summary.write_text("[]")


def arrays_of_another_summary(summary):
    document = json.loads(summary.read_text())
    document["measured_on"]["inputs"]["checkpoints"]["100"] = "0" * 64
    summary.write_text(json.dumps(document))


def other_effects(summary):
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"effects": [{"recovery": 1}]}))


def malformed_effects(summary):
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"effects": "none"}))


def no_hash_of_its_own(summary):
    document = json.loads(summary.read_text())
    del document["content_sha256"]
    summary.write_text(json.dumps(document))


DAMAGE = [arrays_cut, no_arrays, no_json, other_document, arrays_of_another_summary]
DAMAGE += [other_effects, malformed_effects, no_hash_of_its_own]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results(intervened, folder, damage):
    """A damaged summary, or damaged arrays, are measured again."""
    intervened()
    damage(folder / "necessity" / "steps_100_200.json")
    assert intervened() == ("necessity",)


def test_arrays_of_another_call(intervened, folder):
    """As where a call was stopped between the two files."""
    intervened()
    summary = folder / "necessity" / "steps_100_200.json"
    before = summary.read_text()
    intervened(pairs_per_kind=3, overwrite=True)
    summary.write_text(before)
    assert intervened(("necessity",)) == ("necessity",)


def test_reads_of_checkpoint_files(intervened, small_run):
    """Each `.pt` file of a window is read once, whether it is measured now or was before; others are not read."""
    opened = OpenedFiles()
    once = {f"step_{step:06d}.pt": 1 for step in (100, 200)}
    assert intervened(("necessity",)) == ("necessity",) and opened.taken() == once, "nothing was measured"
    assert intervened(("necessity",)) == () and opened.taken() == once, "everything was"
    assert intervened() == ("path_patching",) and opened.taken() == once, "one kind was"


def test_checkpoint_that_changes_meanwhile(intervened, folder, monkeypatch):
    """Once files are loaded, the hashes of the loaded bytes decide what is current, whatever they were before."""
    intervened()
    before = [json.loads(path.read_text())["measured_on"] for path in sorted(folder.rglob("*.json"))]
    monkeypatch.setattr(analysis, "window_hashes", lambda run, window: dict.fromkeys(window.steps, "0" * 64))
    assert intervened() == ("path_patching",), "necessity was measured on the bytes that loading it found"
    assert before == [json.loads(path.read_text())["measured_on"] for path in sorted(folder.rglob("*.json"))]


def test_another_probe_set(intervened, small_run, small_benchmark, tmp_path):
    """Results on another probe set are replaced only on request."""
    intervened()
    other = tmp_path / "other.jsonl"
    generate_probe_set(Benchmark.open(small_benchmark), other, examples_per_split=8, fit_examples=16, seed=99)
    with pytest.raises(InputError, match=r"`probe_set=\w{12}`, as it was measured, or `overwrite`; found `probe_set="):
        intervened(probe_set=str(other))


def test_several_runs_with_one_refused(intervened, small_run, tmp_path):
    """No run is measured if one of them is refused."""
    other = shutil.copytree(small_run, tmp_path / "second")
    intervened(runs=(other,), pairs_per_kind=3)
    with pytest.raises(InputError, match=r"second/analysis/.*: expected `pairs_per_kind=3`"):
        intervened(runs=(small_run, other))
    assert not (small_run / "analysis" / "interventions").exists()
    assert intervened(runs=(small_run, other), pairs_per_kind=3) == KINDS, "of the first alone"


def test_conversions_that_cannot_be_kept(intervened, small_run):
    """Results are written even if conversions cannot be."""
    (small_run / "analysis").mkdir()
    (small_run / "analysis" / "converted").write_text("in the way")
    assert intervened() == KINDS


def test_conversions_of_an_interrupted_call(intervened, small_run, monkeypatch):
    """A call that is interrupted after a window's checkpoints were loaded has stored their conversions."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis, "_publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        intervened()
    assert list(read_stored_run(small_run / "analysis" / "converted"))
