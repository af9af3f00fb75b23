"""Optimizer states of other trainers: each parameter gets its own moments, and what is not AdamW is refused by name."""

import warnings

import jax
import optax
import pytest
import torch
from kvjax.converters.optimizer_state import to_torch_optimizer, undecayed_paths
from kvjax.converters.to_flax import to_flax
from kvjax.converters.to_torch import to_torch

from kvjax.errors import InputError, Note
from kvjax.train.schedule import Hyperparameters, make_optimizer, restore_optimizer
from tests.helpers.optimizer_states import (
    ADAMW,
    CONFIG,
    GROUPS,
    MODEL,
    RATE,
    STEPS,
    VOCAB,
    by_rule,
    read,
    step,
    tied_module,
    trained,
    with_first,
)


def assert_own_moments(module, optimizer, moments):
    """Compares every parameter's moments with those that PyTorch keeps for this very parameter."""
    first, second = (to_torch(moments.accumulators[kind]) for kind in ("exp_avg", "exp_avg_sq"))
    assert moments.count == STEPS
    for name, parameter in module.named_parameters():
        kept = optimizer.state[parameter]
        torch.testing.assert_close(first[name], kept["exp_avg"], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(second[name], kept["exp_avg_sq"], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_parameters_of_groups(tmp_path, groups):
    """Every parameter gets its own moments and its own decay, however the groups number them; so again when written."""
    module, optimizer = trained(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        params, moments = read(tmp_path, module, optimizer.state_dict())
    assert_own_moments(module, optimizer, moments)
    undecayed = {name for group in moments.groups if not group.decays for name in group.names}
    names = {parameter: name for name, parameter in module.named_parameters()}
    of_torch = {names[p] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == of_torch
    written = to_torch_optimizer(moments, params, CONFIG, RATE)
    again = torch.optim.AdamW(groups(module))
    again.load_state_dict(written)
    assert_own_moments(module, again, moments)
    assert [group["weight_decay"] for group in again.param_groups] == [
        group["weight_decay"] for group in optimizer.param_groups
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        assert read(tmp_path, module, written)[1].groups == moments.groups


def test_numbers_as_text(tmp_path):
    """Numbers that were text in between, as in JSON, are numbers."""
    module, optimizer = trained(GROUPS["one"])
    state = optimizer.state_dict()
    state["state"] = {str(number): entry for number, entry in state["state"].items()}
    state["param_groups"][0]["params"] = list(map(str, state["param_groups"][0]["params"]))
    assert_own_moments(module, optimizer, read(tmp_path, module, state)[1])


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_names_as_keys(tmp_path, prefix):
    """A state whose keys are the parameters' names, wrapped or not, as distributed trainers save it."""
    module, optimizer = trained(GROUPS["one"])
    state, names = optimizer.state_dict(), [prefix + name for name, _ in module.named_parameters()]
    state["state"] = {names[number]: state["state"][number] for number in reversed(range(len(names)))}
    state["param_groups"][0]["params"] = names
    assert_own_moments(module, optimizer, read(tmp_path, module, state)[1])


def test_module_of_another_order(tmp_path):
    """A model that defines its parts in another order numbers them so; equal shapes do not mix them up."""

    def reordered(module):
        for block in module.blocks:
            parts = block.attn._modules
            for name in ("k_proj", "q_proj"):
                parts[name] = parts.pop(name)  # to the end
        return module.parameters()

    module, optimizer = trained(reordered)
    params, moments = read(tmp_path, module, optimizer.state_dict())
    assert_own_moments(module, optimizer, moments)
    written = to_torch_optimizer(moments, params, CONFIG, RATE)
    plain = tied_module()  # of the usual order: names tell the numbers apart
    assert_own_moments(module, optimizer, read(tmp_path, plain, written)[1])


@pytest.mark.parametrize(
    ("groups", "options", "updates"),
    [
        ("one", {}, STEPS),
        ("matrices decay", {}, STEPS),
        ("one", {"betas": (0.8, 0.9), "eps": 1e-3}, STEPS),
        ("one", {}, 1),
    ],
    ids=["one group", "two groups", "other betas and eps", "fewer updates"],
)
def test_next_step(tmp_path, groups, options, updates):
    """The next parameters are those of PyTorch going on from the same file."""
    module, optimizer = trained(GROUPS[groups], **options)
    for entry in optimizer.state.values():
        entry["step"].fill_(updates)
    betas = options.get("betas", ADAMW["betas"])
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": options.get("eps", 1e-8)}
    config = CONFIG.model_copy(update=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        params, moments = read(tmp_path, module, optimizer.state_dict(), config)
    undecayed = undecayed_paths(moments.groups, MODEL.n_layers, where="here")
    ours = make_optimizer(Hyperparameters.of(config, 100), undecayed)
    state = restore_optimizer(ours, params, count=moments.count, accumulators=moments.accumulators, step=STEPS)
    gradients = step(module, optimizer)
    gradients["lm_head.weight"] = gradients["token_embedding.weight"]
    gradients = to_flax({n: g.numpy() for n, g in gradients.items()}, MODEL, VOCAB, where="here")
    updates, _ = jax.jit(ours.update)(gradients, state, params)
    after = to_torch(optax.apply_updates(params, updates))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_decay_in_some_layers(tmp_path):
    """A parameter that decays in one layer alone is refused: layers are stacked, and decay together."""
    module, optimizer = trained(by_rule(lambda name, _: "blocks.1" in name, named=True))
    _, moments = read(tmp_path, module, optimizer.state_dict())
    with pytest.raises(InputError, match=r"weight decay of blocks.* in all layers or in none; found decay in 1 of 2"):
        undecayed_paths(moments.groups, MODEL.n_layers, where="here")


OTHERS = {
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}, "AdamW with amsgrad"),
    "maximize": (torch.optim.AdamW, {"maximize": True}, "AdamW with maximize"),
    "Adam": (torch.optim.Adam, {}, "Adam with weight decay 0.1 as L2"),
    "RAdam": (torch.optim.RAdam, {}, "found RAdam"),
    "RAdamW": (torch.optim.RAdam, {"decoupled_weight_decay": True}, "found RAdam"),
    "NAdam": (torch.optim.NAdam, {}, "found NAdam"),
    "NAdamW": (torch.optim.NAdam, {"decoupled_weight_decay": True}, "found NAdam"),
    "Adamax": (torch.optim.Adamax, {}, "found (RAdam, or another|Adamax)"),
    "betas": (torch.optim.AdamW, {"betas": (0.9, 0.999)}, r"beta2 0.95 as in the config .*; found 0.999"),
    "eps": (torch.optim.AdamW, {"eps": 1e-6}, r"eps 1e-08 as in the config .*; found 1e-06"),
    "decay": (torch.optim.AdamW, {"weight_decay": 0.2}, r"weight_decay 0.1 as in the config .*; found 0.2"),
}


@pytest.mark.parametrize(("optimizer_class", "options", "message"), OTHERS.values(), ids=OTHERS)
def test_other_optimizer(tmp_path, optimizer_class, options, message):
    """Another optimizer, or AdamW with other settings, is refused by name."""
    module, optimizer = trained(GROUPS["one"], optimizer_class, **options)
    with pytest.raises(InputError, match=rf"step_000003.pt: .*{message}"):
        read(tmp_path, module, optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {}),
        ("RMSprop", {}),
        ("Adagrad", {}),
        ("Adadelta", {}),
        ("ASGD", {}),
        ("Rprop", {}),
        ("Adafactor", {}),
    ],
)
def test_optimizer_without_betas(tmp_path, name, options):
    """An optimizer of another kind is refused by its name."""
    module = tied_module()
    optimizer = getattr(torch.optim, name)(module.parameters(), **options)
    step(module, optimizer)
    with pytest.raises(InputError, match=f"the state of AdamW, which is what training goes on with; found {name}"):
        read(tmp_path, module, optimizer.state_dict())


def test_two_learning_rates(tmp_path):
    """Groups of different learning rates are refused: the config has one schedule."""
    module, optimizer = trained(GROUPS["matrices decay"])
    optimizer.param_groups[1]["lr"] = 2 * RATE
    with pytest.raises(InputError, match=r"one learning rate for all parameters; found lr 0.01, 0.02"):
        read(tmp_path, module, optimizer.state_dict())


@pytest.fixture(scope="module")
def plain():
    """A module, its optimizer, and a text of the state that tests change copies of."""
    return trained(GROUPS["one"])


def changed(optimizer, part, value):
    """Returns a copy of an optimizer's state in which one part of one entry or group is another."""
    state = optimizer.state_dict()
    entries = {number: dict(entry) for number, entry in state["state"].items()}
    groups = [dict(group) for group in state["param_groups"]]
    if part in groups[0]:
        groups[0][part] = value
    elif part in ("state", "param_groups"):
        return {"state": entries, "param_groups": groups} | {part: value}
    elif callable(value):
        entries[2][part] = value(entries[2][part])
    else:
        entries[2][part] = value
    return {"state": entries, "param_groups": groups}


DAMAGE = {
    "NaN": ("exp_avg", with_first(float("nan")), r"finite numbers in exp_avg of blocks.0.ln_1.weight; found 1"),
    "infinite": ("exp_avg_sq", with_first(float("inf")), "finite numbers in exp_avg_sq"),
    "too large": ("exp_avg", lambda t: with_first(1e300)(t.double()), "finite numbers in exp_avg"),
    "negative": ("exp_avg_sq", with_first(-1e-9), "no negative number in exp_avg_sq of blocks.0.ln_1.weight"),
    "complex": ("exp_avg", lambda t: t.to(torch.complex64), "as real numbers; found complex64"),
    "whole numbers": ("exp_avg", lambda t: t.to(torch.int64), "as real numbers; found int64"),
    "shape": ("exp_avg", lambda t: t[:-1], r"of shape \[8\] for blocks.0.ln_1.weight; found \[7\]"),
    "second shape": ("exp_avg_sq", lambda t: t[None], r"exp_avg_sq of .* of shape \[8\]; found \[1, 8\]"),
    "no tensor": ("exp_avg", [1.0], "a tensor exp_avg of parameter 2"),
    "no moment": ("exp_avg", None, "a tensor exp_avg of parameter 2, as the optimizer keeps one; found none"),
    "another moment": ("master", torch.ones(8), "an optimizer that also keeps master"),
    "text step": ("step", "3", "a whole number of steps of parameter 2"),
    "infinite step": ("step", torch.tensor(float("inf")), "a whole number of steps"),
    "half a step": ("step", 2.5, "a whole number of steps"),
    "negative step": ("step", -1, "a whole number of steps"),
    "complex step": ("step", torch.tensor(3 + 0j), "a whole number of steps"),
    "two steps": ("step", torch.tensor([3.0, 3.0]), "a whole number of steps"),
    "true step": ("step", True, "a whole number of steps"),
    "no step": ("step", None, "a whole number of steps"),
    "another step": ("step", 2, "one number of steps for all parameters in the optimizer; found 2, 3"),
    "list state": ("state", [1, 2, 3], "a mapping of parameters; found list"),
    "no entries": ("state", {}, "an optimizer state of 36 parameters; found 36 in param_groups, 0 in state"),
    "list entry": ("state", {0: [1]}, "a mapping as the optimizer's state of parameter 0; found list"),
    "no groups": ("param_groups", [], "param_groups of an optimizer; found none"),
    "array groups": ("param_groups", torch.ones(2), "param_groups of an optimizer; found ndarray"),
    "amsgrad of several": ("amsgrad", torch.ones(2), "AdamW with amsgrad"),
    "number groups": ("param_groups", [1], "param_groups of an optimizer; found list"),
    "text rate": ("lr", "fast", "a number as lr of an optimizer's group; found 'fast'"),
    "NaN rate": ("lr", float("nan"), "a number as lr"),
    "one beta": ("betas", [0.9], "two betas"),
    "text betas": ("betas", "0.9", "two betas"),
    "text decay": ("weight_decay", "0.1", "a number as weight_decay"),
    "no params": ("params", None, "a list of params in each of an optimizer's groups; found NoneType"),
    "params twice": ("params", [0] * 36, "an optimizer state of 36 parameters"),
    "params short": ("params", list(range(35)), "found 35 in param_groups, 36 in state"),
}


@pytest.mark.parametrize(("part", "value", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_state(tmp_path, plain, part, value, message):
    """A damaged state is refused in one line that names the file and the part."""
    module, optimizer = plain
    with pytest.raises(InputError, match=message) as refusal:
        read(tmp_path, module, changed(optimizer, part, value))
    assert str(refusal.value).startswith(f"{tmp_path / 'step_000003.pt'}: expected")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        pytest.param("exp_avg", lambda tensor: tensor.clone().requires_grad_(), id="moment with a gradient"),
        pytest.param("exp_avg", lambda tensor: torch.nn.Parameter(tensor.clone()), id="moment as a parameter"),
        pytest.param("exp_avg", lambda tensor: tensor.double(), id="moment in float64"),
        ("step", 3),
        ("step", 3.0),
        ("step", torch.tensor(3)),
        ("step", torch.tensor([3.0])),
        ("betas", [0.9, 0.95]),
        ("lr", torch.tensor(RATE)),
        ("foreach", True),
        ("fused", True),
        ("initial_lr", RATE),
    ],
    ids=str,
)
def test_odd_state_that_is_sound(tmp_path, plain, part, value):
    """What PyTorch or another trainer may save in another form is the same state."""
    module, optimizer = plain
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        state = changed(optimizer, part, value) if part != "initial_lr" else optimizer.state_dict()
        if part == "initial_lr":
            state["param_groups"][0][part] = value
        assert_own_moments(module, optimizer, read(tmp_path, module, state)[1])


def test_adam_without_decay(tmp_path):
    """Adam without weight decay is AdamW without it."""
    module, optimizer = trained(GROUPS["one"], torch.optim.Adam, weight_decay=0.0)
    without = CONFIG.model_copy(update={"weight_decay": 0.0})
    assert_own_moments(module, optimizer, read(tmp_path, module, optimizer.state_dict(), without)[1])


def test_notes(tmp_path, plain):
    """A learning rate that differs, and a file too old to say what kind its decay is, are noted."""
    module, optimizer = plain
    with pytest.warns(Note, match=r"its lr is 0.01; training goes on with the config's 0.003"):
        read(tmp_path, module, optimizer.state_dict(), rate=3e-3)
    state = optimizer.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    with pytest.warns(Note, match="older PyTorch does not record if weight decay is AdamW's or Adam's L2"):
        read(tmp_path, module, state)


def test_groups_that_shapes_cannot_tell(tmp_path):
    """Groups of no known rule are refused, and what helps is named."""
    module, optimizer = trained(by_rule(lambda name, _: "attn" in name))
    with pytest.raises(InputError, match=r"or param_names \(give the optimizer named_parameters"):
        read(tmp_path, module, optimizer.state_dict())
