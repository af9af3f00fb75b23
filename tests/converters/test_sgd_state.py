"""SGD's state between PyTorch and optax: the same buffers and the same next steps; other optimizers are refused."""

import warnings

import jax
import optax
import pytest
import torch
from kvjax.converters.optimizer_state import to_torch_optimizer, undecayed_paths
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch

from kvjax.config.train import SGDConfig
from kvjax.errors import InputError, Note
from kvjax.train.schedule import Hyperparameters, accumulators_of, make_optimizer, restore_optimizer
from tests.helpers.optimizer_states import (
    ADAMW,
    CONFIG,
    DECAY,
    GROUPS,
    MODEL,
    RATE,
    STEPS,
    VOCAB,
    read,
    step,
    tied_module,
    trained,
    with_first,
)

SGD = {"lr": RATE, "momentum": 0.9, "weight_decay": DECAY}
PLAIN = SGD | {"momentum": 0.0}
MOMENTUM = SGDConfig(optimizer="sgd", learning_rate=RATE, weight_decay=DECAY, momentum=0.9)
WITHOUT = MOMENTUM.model_copy(update={"momentum": 0.0})


def buffers(module, optimizer):
    """Lists PyTorch's own buffers by the names of their parameters."""
    return {
        name: optimizer.state[p]["momentum_buffer"] for name, p in module.named_parameters() if p in optimizer.state
    }


def assert_equal(found, expected):
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_own_buffers(tmp_path, groups):
    """Every parameter gets its own buffer and its own decay, and so again when PyTorch reads what is written."""
    module, optimizer = trained(groups, torch.optim.SGD, SGD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        params, state = read(tmp_path, module, optimizer.state_dict(), MOMENTUM)
    assert state.count == STEPS
    assert_equal(to_torch(state.accumulators["momentum_buffer"]), buffers(module, optimizer))
    again = torch.optim.SGD(groups(module))
    again.load_state_dict(to_torch_optimizer(state, params, MOMENTUM, RATE))
    assert_equal(buffers(module, again), buffers(module, optimizer))
    decays = [[group["weight_decay"] for group in one.param_groups] for one in (again, optimizer)]
    assert decays[0] == decays[1]


@pytest.mark.parametrize(("settings", "config"), [(SGD, MOMENTUM), (PLAIN, WITHOUT)], ids=["momentum", "none"])
def test_layout(tmp_path, settings, config):
    """A state is written with PyTorch's keys, types and values, in PyTorch's order; without momentum it is empty."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, settings)
    theirs = optimizer.state_dict()
    params, state = read(tmp_path, module, theirs, config)
    ours = to_torch_optimizer(state, params, config, RATE)
    assert [list(group.items()) for group in ours["param_groups"]] == [
        list(group.items()) for group in theirs["param_groups"]
    ]
    assert list(ours["state"]) == list(theirs["state"]) and bool(ours["state"]) == bool(settings["momentum"])
    for number, entry in theirs["state"].items():
        assert list(ours["state"][number]) == list(entry)
        assert_equal(ours["state"][number], entry)


@pytest.mark.parametrize(
    ("groups", "changes"),
    [
        ("one", {}),
        ("matrices decay", {}),
        ("one", {"momentum": 0.5, "nesterov": True}),
        ("one", {"momentum": 0.0}),
        ("one, named", {"momentum": 0.0}),
    ],
)
def test_next_steps(tmp_path, groups, changes):
    """The next three steps are those of PyTorch going on from the same file."""
    module, optimizer = trained(GROUPS[groups], torch.optim.SGD, SGD, **changes)
    config = MOMENTUM.model_copy(update=changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        params, read_state = read(tmp_path, module, optimizer.state_dict(), config)
    ours = make_optimizer(
        Hyperparameters.of(config, 100), undecayed_paths(read_state.groups, MODEL.n_layers, where="here")
    )
    state = restore_optimizer(ours, params, count=STEPS, accumulators=read_state.accumulators)
    update = jax.jit(ours.update)
    for _ in range(3):
        gradients = step(module, optimizer)
        gradients["lm_head.weight"] = gradients["token_embedding.weight"]
        gradients = to_flax({n: g.numpy() for n, g in gradients.items()}, MODEL, VOCAB, where="here")
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(to_torch(params)[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    if changes.get("momentum") != 0.0:
        kept = to_torch(accumulators_of(state)["momentum_buffer"])
        for name, tensor in buffers(module, optimizer).items():
            torch.testing.assert_close(kept[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_older_state_without_momentum(tmp_path):
    """PyTorch before 2.4 writes None for every buffer that it does not keep."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, PLAIN)
    state = optimizer.state_dict()
    state["state"] = {number: {"momentum_buffer": None} for number in state["param_groups"][0]["params"]}
    assert read(tmp_path, module, state, WITHOUT)[1].accumulators == {}


REFUSED = {
    "dampening": ({"dampening": 0.1}, "found SGD with dampening 0.1"),
    "maximize": ({"maximize": True}, "found SGD with maximize"),
    "momentum": ({"momentum": 0.8}, r"momentum 0.9 as in the config \(or set optimization.momentum\); found 0.8"),
    "no momentum": ({"momentum": 0.0}, r"momentum 0.9 as in the config .*; found 0.0"),
    "nesterov": ({"nesterov": True}, r"nesterov false as in the config .*; found True"),
    "decay": ({"weight_decay": 0.2}, r"weight_decay 0.1 as in the config .*; found 0.2"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_other_settings(tmp_path, options, message):
    """SGD that does other things than the config says is refused."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, SGD, **options)
    with pytest.raises(InputError, match=rf"step_000003.pt: .*{message}"):
        read(tmp_path, module, optimizer.state_dict(), MOMENTUM)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("AdamW", "AdamW, or another optimizer with betas"),
        ("Adam", "AdamW, or another optimizer with betas"),
        ("NAdam", "NAdam"),
        ("RMSprop", "RMSprop"),
        ("Adagrad", "Adagrad"),
        ("ASGD", "ASGD"),
        ("Rprop", "Rprop"),
        ("Adafactor", "Adafactor"),
    ],
)
def test_other_optimizer(tmp_path, name, found):
    """Another optimizer's state is refused for a run of SGD, by name."""
    module = tied_module()
    optimizer = getattr(torch.optim, name)(module.parameters())
    step(module, optimizer)
    with pytest.raises(InputError, match=f"the state of SGD, which is what training goes on with; found {found}"):
        read(tmp_path, module, optimizer.state_dict(), MOMENTUM)


def test_sgd_for_a_run_of_adamw(tmp_path):
    """SGD's state is refused for a run of AdamW, also under AdamW's own groups."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, SGD)
    expected = "the state of AdamW, which is what training goes on with"
    with pytest.raises(InputError, match=f"{expected}; found SGD"):
        read(tmp_path, module, optimizer.state_dict(), CONFIG)
    groups = trained(GROUPS["one"], settings=ADAMW)[1].state_dict()["param_groups"]
    with pytest.raises(InputError, match=f"{expected}; found SGD or Muon"):
        read(tmp_path, module, optimizer.state_dict() | {"param_groups": groups}, CONFIG)


DAMAGES = {
    "NaN": (with_first(float("nan")), r"finite numbers in momentum_buffer of blocks.0.ln_1.weight; found 1"),
    "infinite": (with_first(float("-inf")), "finite numbers in momentum_buffer"),
    "shape": (lambda tensor: tensor[:-1], r"of shape \[8\] for blocks.0.ln_1.weight; found \[7\]"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "as real numbers; found complex64"),
    "none": (lambda tensor: None, "a tensor momentum_buffer of parameter 2, as the optimizer keeps one; found none"),
    "list": (lambda tensor: [1.0], "a tensor momentum_buffer of parameter 2, as the optimizer keeps one; found list"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_buffer(tmp_path, change, message):
    """A buffer that cannot be gone on with is refused."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, SGD)
    state = optimizer.state_dict()
    state["state"][2] = {"momentum_buffer": change(state["state"][2]["momentum_buffer"])}
    with pytest.raises(InputError, match=message):
        read(tmp_path, module, state, MOMENTUM)


def test_missing_and_unexpected_buffers(tmp_path):
    """Buffers are there for all parameters, or for none without momentum."""
    module, optimizer = trained(GROUPS["one"], torch.optim.SGD, SGD)
    state = optimizer.state_dict()
    state["param_groups"][0]["momentum"] = 0.0
    with pytest.raises(InputError, match="nothing kept of a parameter, as SGD without momentum does; found momentum_b"):
        read(tmp_path, module, state, WITHOUT)
    state = optimizer.state_dict()
    with pytest.raises(InputError, match="an optimizer state of 36 parameters; found 36 in param_groups, 0 in state"):
        read(tmp_path, module, state | {"state": {}}, MOMENTUM)
    state["state"][3]["master"] = torch.ones(8)
    with pytest.raises(InputError, match="found an optimizer that also keeps master"):
        read(tmp_path, module, state, MOMENTUM)


def test_two_groups_that_nothing_tells_apart(tmp_path):
    """Without momentum and names, no shape says which parameters a group's numbers are; names do."""
    module, optimizer = trained(GROUPS["matrices decay"], torch.optim.SGD, PLAIN)
    with pytest.raises(InputError, match=r"param_names that tell its groups' parameters apart .*; found \d ways"):
        read(tmp_path, module, optimizer.state_dict(), WITHOUT)
    module, optimizer = trained(GROUPS["anything decays, named"], torch.optim.SGD, PLAIN)
    _, state = read(tmp_path, module, optimizer.state_dict(), WITHOUT)
    undecayed = {name for group in state.groups if not group.decays for name in group.names}
    assert undecayed == {name for name, _ in module.named_parameters() if "attn" not in name}
