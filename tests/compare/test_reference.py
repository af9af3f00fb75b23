"""Selecting the reference: the order of criteria, eligibility, and the reasons."""

from kvjax.compare.reference import RANKED_SPLITS, Candidate, select_reference


def candidate(name, *, parameters=100, **accuracies):
    filled = dict.fromkeys(RANKED_SPLITS, 0.95) | accuracies
    return Candidate(name, 1000, "5a", filled, parameters)


def select(*candidates, floor=0.9):
    return select_reference(candidates, min_validation_answer_accuracy=floor)


def test_first_criterion():
    """Held-out accuracy decides before validation accuracy."""
    result = select(candidate("a", heldout_pairs=0.5, validation_iid=0.99), candidate("b", heldout_pairs=0.6))
    assert result["selected"] == "b"
    assert result["reason"] == "ahead of rank 2: heldout_pairs answer accuracy 0.6000 against 0.5000"


def test_later_criteria():
    """Each criterion breaks the tie of all before it."""
    for index, split in enumerate(RANKED_SPLITS):
        worse_later = dict.fromkeys(RANKED_SPLITS[index + 1 :], 0.91)
        result = select(candidate("a", **{split: 0.94}), candidate("b", **worse_later))
        assert result["selected"] == "b", split


def test_last_criterion():
    """Fewer parameters break the last tie."""
    result = select(candidate("large", parameters=200), candidate("small", parameters=100))
    assert result["selected"] == "small" and "100 parameters against 200" in result["reason"]


def test_runs_below_the_floor():
    """Runs below the floor are listed with the reason, but not selected."""
    result = select(candidate("a", validation_iid=0.89, heldout_pairs=1.0), candidate("b", heldout_pairs=0.1))
    assert result["selected"] == "b" and result["reason"] == "the only eligible run"
    last = result["candidates"][-1]
    assert (last["run_dir"], last["eligible"], last["rank"]) == ("a", False, None)
    assert "0.8900 is below 0.9" in last["reason"]


def test_no_eligible_run():
    """If no run is eligible none is selected."""
    result = select(candidate("a", validation_iid=0.1))
    assert result["selected"] is None and "no run reaches" in result["reason"]
