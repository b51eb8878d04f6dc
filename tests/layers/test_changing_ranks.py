"""truncate_ and grow_: what stays, what is refused, and what optimizers hold afterwards."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from cases import FAMILIES
from tnlayers import testing
from tnlayers.fitting.resizing import padded
from tnlayers.fitting.trees import tree

TREES = [kind for kind in FAMILIES if tree(kind(8, 12, 3, rank=2).network)]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def made(kind=tnlayers.TTConv2d, **changes):
    torch.manual_seed(0)
    return kind(8, 12, 3, **({"rank": 3, "padding": 1, "dtype": torch.float64} | changes))


def loss(layer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, n, 6, 6, generator=generator, dtype=torch.float64) for n in (8, 12))
    return (layer(x) - y).square().mean()


@pytest.mark.parametrize("kind", [tnlayers.TRConv2d, tnlayers.TuckerConvTranspose2d])
def test_what_is_not_the_rank_stays(kind):
    layer = made(kind, groups=2, stride=2, padding_mode="zeros", dtype=torch.float32, strategy="factorized").eval()
    layer.cores[1].requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    bias, geometry, names = layer.bias, layer.geometry, [*layer.state_dict()]
    x = torch.randn(2, 8, 6, 6)
    old = layer.explain(x.shape), layer(x).shape
    for change in (lambda: layer.truncate_(rank=2), lambda: layer.grow_({next(iter(layer.rank)): 4})):
        cores = [*layer.cores]
        change()
        assert not any(a is b for a, b in zip(cores, layer.cores, strict=True))
        assert all(isinstance(core, nn.Parameter) and core.is_leaf and core.grad is None for core in layer.cores)
        assert [core.requires_grad for core in layer.cores] == [k != 1 for k in range(len(layer.cores))]
        assert (layer.bias, layer.geometry, [*layer.state_dict()], layer.strategy) == (
            bias, geometry, names, "factorized",
        )  # fmt: skip
        assert not layer.training
        assert {core.dtype for core in layer.cores} == {torch.float32}
        assert layer.network == kind(8, 12, 3, groups=2, rank=layer.rank).network
        assert layer.variance == kind(8, 12, 3, groups=2, stride=2, padding=1, rank=layer.rank).variance
        assert layer.explain(x.shape) != old[0]
        assert layer(x).shape == old[1]
        assert repr(copy.deepcopy(layer)) == repr(layer)
    assert calls == [1] * 3
    assert "rank=(4, 2" in repr(layer)


def test_a_truncated_layer_is_saved_and_loaded(tmp_path):
    model = nn.Sequential(made(tnlayers.HTConv2d))
    model[0].truncate_(rank=2)
    tnlayers.save_tensorized(model, tmp_path / "model.safetensors")
    other = tnlayers.load_tensorized(lambda: nn.Sequential(made(tnlayers.HTConv2d)), tmp_path / "model.safetensors")
    assert other[0].network == model[0].network
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("rank", [2, (2, 3), {"r1": 2}, 0.2])
def test_every_form_of_a_rank_is_taken(rank):
    layer = made()
    layer.truncate_(rank)
    expected = {"r1": 2, "r2": 2} if rank == 2 else {"r1": 2, "r2": 3} if isinstance(rank, tuple | dict) else None
    assert layer.rank == expected if expected else layer.keep_ratio <= rank
    if expected:
        layer.grow_({"r1": 3})
        assert dict(layer.rank) == {**expected, "r1": 3}


def test_a_layer_that_is_small_enough_stays_as_it_is():
    layer = made()
    cores = [*layer.cores]
    assert layer.truncate_(rank=8) == layer.truncate_(rank=layer.rank) == layer.truncate_(error=0) == 0
    layer.grow_(rank=2)
    assert all(a is b for a, b in zip(cores, layer.cores, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_directions_that_are_zero_go_first(kind):
    """By rounding or by a fit: what grow_ adds, truncate_ takes away, and nothing else."""
    layer = made(kind, rank=2)
    kernel, before = layer.weight.detach(), float(loss(layer).detach())
    layer.grow_(rank=3)
    assert float(loss(layer).detach()) == pytest.approx(before, rel=1e-10)
    assert layer.truncate_(rank=2) < 1e-10
    torch.testing.assert_close(layer.weight.detach(), kernel, rtol=0, atol=1e-9)


def test_zero_and_small_kernels_can_still_learn():
    for scale in (0.0, 1e-30):
        layer = made(tnlayers.TuckerConv2d)
        layer.set_weight_(layer.weight.detach() * scale)
        kernel = layer.weight.detach()
        layer.truncate_(rank=2)
        loss(layer).backward()
        assert layer.cores[-1].grad.any()
        assert not layer.weight.any() if scale == 0 else layer.weight.norm() <= kernel.norm()
        layer.grow_(rank=4)
        loss(layer).backward()
        assert layer.cores[-1].grad.any()


def test_a_zero_kernel_has_no_relative_error():
    layer = made()
    layer.set_weight_(torch.zeros(12, 8, 3, 3))
    for what in ("error", "energy"):
        with pytest.raises(ValueError, match=f"{what} is given, but the kernel is zero"):
            layer.truncate_(**{what: 0.1})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [tnlayers.TTConv2d, tnlayers.TRConv2d])
def test_an_optimizer_that_is_given_trains_on(kind, name):
    layer = made(kind)
    model = nn.Sequential(layer, nn.Conv2d(12, 12, 1, dtype=torch.float64))
    optimizer = OPTIMIZERS[name](
        [{"params": model[0].parameters(), "weight_decay": 0.0}, {"params": model[1].parameters()}]
    )
    group, count = optimizer.param_groups[0], len(optimizer.param_groups[0]["params"])

    def train(steps=5):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    train()
    for change in (lambda: layer.truncate_(rank=2, optimizer=optimizer), lambda: layer.grow_(4, optimizer=optimizer)):
        kept = {key: value.clone() for key, value in optimizer.state[layer.bias].items() if torch.is_tensor(value)}
        change()
        assert optimizer.param_groups[0] is group
        assert {*map(id, group["params"])} == {*map(id, layer.parameters())}
        assert len(group["params"]) == count
        for key, value in kept.items():
            assert torch.equal(optimizer.state[layer.bias][key], value)
        for parameter, state in optimizer.state.items():
            buffers = [value for value in state.values() if torch.is_tensor(value) and value.dim()]
            assert all(buffer.shape == parameter.shape for buffer in buffers)
        cores, before = [core.detach().clone() for core in layer.cores], loss(model).item()
        train()
        assert loss(model).item() < before
        assert not any(torch.equal(a, b) for a, b in zip(cores, layer.cores, strict=True))


@pytest.mark.parametrize("kind", TREES)
def test_momentum_becomes_that_of_the_rounded_cores(kind):
    """Where nothing is lost: the momentum is the gradient, so it must be the new cores' gradient."""
    layer = made(kind, rank=2)
    layer.grow_(rank=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    loss(layer).backward()
    optimizer.step()
    assert layer.truncate_(error=1e-8, optimizer=optimizer) < 1e-12
    assert max(layer.rank.values()) == 2
    loss(layer).backward()
    for core in layer.cores:
        found = optimizer.state[core]["momentum_buffer"]
        torch.testing.assert_close(found, core.grad, rtol=0, atol=1e-10 * float(core.grad.norm()))


def test_squares_stay_positive_and_a_grown_layer_keeps_its_state():
    layer = made()
    optimizer = OPTIMIZERS["Adam"](layer.parameters())
    loss(layer).backward()
    optimizer.step()
    layer.truncate_(rank=2, optimizer=optimizer)
    for core in layer.cores:
        assert (optimizer.state[core]["exp_avg_sq"] > 0).all()
        assert optimizer.state[core]["step"] == 1
    old = [{name: value.clone() for name, value in optimizer.state[core].items()} for core in layer.cores]
    layer.grow_(rank=3, optimizer=optimizer)
    for core, state in zip(layer.cores, old, strict=True):
        new = optimizer.state[core]["exp_avg"]
        assert torch.equal(new, padded(state["exp_avg"], core.shape))


def test_state_of_unknown_meaning_and_of_fits_is_dropped():
    for layer, optimizer_type in ((made(), torch.optim.Adamax), (made(tnlayers.CPConv2d), torch.optim.Adam)):
        optimizer = optimizer_type(layer.parameters())
        loss(layer).backward()
        optimizer.step()
        layer.truncate_(rank=2, optimizer=optimizer)
        assert {*map(id, optimizer.state)} == {id(layer.bias)}
        loss(layer).backward()
        optimizer.step()


def test_a_wrapper_for_many_processes_is_named(tmp_path):
    layer = made()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(layer))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for change in (
            lambda: layer.truncate_(rank=2, optimizer=optimizer),
            lambda: layer.grow_(4, optimizer=optimizer),
        ):
            with pytest.warns(
                UserWarning, match="DistributedDataParallel holds the old cores, .* wrap its module anew"
            ):
                change()
        cores = [*map(id, layer.cores)]
        for around in (model, nn.Sequential(model)):
            with pytest.raises(TypeError, match=r"model (is|holds, as '0',) a DistributedDataParallel"):
                tnlayers.prune_ranks_(around, 1, [0], lambda *_: None, optimizer=optimizer)
        assert [*map(id, layer.cores)] == cores
        model = around = nn.Sequential(layer)
        with warnings.catch_warnings(action="error"):  # the wrapper is gone
            layer.truncate_(rank=2, optimizer=optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_is_not_given_is_named():
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for change in (lambda: layer.truncate_(rank=2), lambda: layer.grow_(rank=4)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            change()
        assert [each.filename for each in found] == [__file__]
        assert "SGD holds the old cores" in str(found[0].message)
        optimizer.param_groups[0]["params"][:] = [*layer.parameters()]
    cores = [*layer.cores]
    with pytest.warns(UserWarning, match="holds the old cores"):
        layer.truncate_(rank=2)
    assert cores[0].shape != layer.cores[0].shape


def hooked():
    layer = made()
    layer.cores[0].register_hook(lambda gradient: gradient)
    return layer


class Plain(nn.Module):
    def forward(self, x):
        return x


def parametrized():
    layer = made()
    parametrize.register_parametrization(layer.cores, "0", Plain())
    return layer


def not_finite():
    layer = made()
    with torch.no_grad():
        layer.cores[0].fill_(float("nan"))
    return layer


WRONG = {
    "nothing": (made, {}, ValueError, "none given; one of rank, energy and error chooses"),
    "two": (made, {"rank": 2, "error": 0.1}, ValueError, "rank and error given"),
    "energy": (made, {"energy": 0.0}, ValueError, r"energy is 0.0; it must be in \(0, 1\]"),
    "error": (made, {"error": 1}, ValueError, r"error is 1; it must be in \[0, 1\)"),
    "type": (made, {"error": "low"}, TypeError, "error is 'low'; it must be a number"),
    "larger": (made, {"rank": {"r1": 4}}, ValueError, r"rank\['r1'\] is 4; it must be at most .* 3; grow_ takes"),
    "bond": (made, {"rank": {"r9": 4}}, ValueError, "rank names 'r9'"),
    "bool": (made, {"rank": True}, TypeError, "rank is True"),
    "no bond": (
        lambda: tnlayers.EinsumConv2d(8, 12, 3, network="o i h w", rank=()), {"rank": 2}, ValueError, "has no bond",
    ),
    "meta": (lambda: made(device="meta"), {"rank": 2}, ValueError, "on the meta device"),
    "hook": (hooked, {"rank": 2}, ValueError, "core 0 has a hook"),
    "parametrized": (parametrized, {"rank": 2}, TypeError, "cores are parametrized or pruned"),
    "nan": (not_finite, {"rank": 2}, ValueError, "core 0 holds NaN or infinity"),
    "optimizer": (made, {"rank": 2, "optimizer": 3}, TypeError, "optimizer is 3"),
    "other": (
        made, {"rank": 2, "optimizer": torch.optim.SGD([torch.ones(1)])}, ValueError, "SGD holds none of the",
    ),
    "lbfgs": (made, {"rank": 2, "optimizer": torch.optim.LBFGS([torch.ones(1)])}, ValueError, "optimizer is LBFGS"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_truncated_is_named_and_unchanged(name):
    make, arguments, kind, sentence = WRONG[name]
    layer = make()
    network, cores = layer.network, [*layer.cores]
    with pytest.raises(kind, match=sentence):
        layer.truncate_(**arguments)
    if "rank" in arguments and "error" not in arguments and name not in ("larger", "bond", "bool"):
        with pytest.raises(kind, match=sentence):
            layer.grow_(4, optimizer=arguments.get("optimizer"))
    assert layer.network is network
    assert all(a is b for a, b in zip(cores, layer.cores, strict=True)) or name == "parametrized"


def test_what_cannot_be_grown_is_named():
    layer = made()
    with pytest.raises(ValueError, match=r"rank\['r1'\] is 2; it must be at least .* 3; truncate_ takes smaller"):
        layer.grow_((2, 4))
    with pytest.raises(ValueError, match="no bond becomes smaller, so the keep ratio would be"):
        layer.grow_(0.05)
    with pytest.warns(UserWarning, match="rank is 100; the cores of TTConv2d have"):
        layer.grow_(100)


def test_float16_that_cannot_hold_the_cores_is_refused():
    layer = made(tnlayers.TuckerConv2d, dtype=torch.float16, rank=4)
    with torch.no_grad():
        for core in layer.cores:
            core.fill_(6e4)
    network = layer.network
    with pytest.raises(ValueError, match="cannot hold the new cores"):
        layer.truncate_(rank=1)
    assert layer.network is network


def test_a_frozen_layer_stays_frozen_with_new_weights():
    layer, x = made().eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    tnlayers.freeze_(layer)
    with torch.no_grad():
        layer(x)
        layer.truncate_(rank=2)
        assert layer.frozen
        torch.testing.assert_close(layer(x), layer.to_conv()(x), rtol=0, atol=1e-10)
    testing.assert_same_function(layer, x)


@pytest.mark.parametrize("limit", [0.0, 3e-9, 1e-7])
def test_an_error_below_that_of_float32_is_kept(limit):
    layer = tnlayers.TTLinear(16, 16, in_shape=(4, 4), out_shape=(4, 4), rank=16, dtype=torch.float64)
    with torch.no_grad():
        layer.set_weight_(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double())
        for core in layer.cores:
            core.mul_(10.0 ** -torch.arange(core.shape[-1]))
    before = layer.weight
    assert layer.truncate_(error=limit) <= max(limit, 1e-13)
    assert (layer.weight - before).norm() <= max(limit, 1e-13) * before.norm()


def test_it_works_in_inference_mode_and_under_another_default_device():
    layer, x = made(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with torch.inference_mode(), torch.device("meta"):
        layer.truncate_(rank=2)
        layer.grow_(rank=3)
    layer(x).sum().backward()
    assert all(core.grad is not None for core in layer.cores)


def test_a_tied_output_follows_its_embedding():
    embedding = tnlayers.TTEmbedding(90, 16, rank=6, dtype=torch.float64)
    head, x = tnlayers.TiedLinear(embedding), torch.randn(3, 16, dtype=torch.float64)
    twin = copy.deepcopy(nn.ModuleList([embedding, head]))
    for change in (lambda layer: layer.truncate_(2), lambda layer: layer.grow_(4)):
        for one, other in ((embedding, head), twin):
            other(x)
            change(one)
            torch.testing.assert_close(other(x), x @ one.weight.T, rtol=0, atol=1e-10)
            assert other.network.sizes["r1"] == one.rank["r1"]
    embedding.rank_dropout = 0.9
    rows = []
    for call in (lambda: head(x), lambda: x @ embedding(torch.arange(90)).T):
        torch.manual_seed(0)
        rows.append(call())
    torch.testing.assert_close(*rows, rtol=0, atol=1e-10)
    assert not torch.allclose(rows[0], x @ embedding.weight.T)
    nn.ModuleList([embedding, head]).eval()
    torch.testing.assert_close(head(x), x @ embedding.weight.T, rtol=0, atol=1e-10)


def test_momentum_of_scaled_steps_is_not_taken_for_gradients():
    layer = made()
    optimizer = torch.optim.RMSprop(layer.parameters(), lr=1e-3, momentum=0.9)
    loss(layer).backward()
    optimizer.step()
    layer.truncate_(rank=2, optimizer=optimizer)
    assert {*map(id, optimizer.state)} == {id(layer.bias)}
