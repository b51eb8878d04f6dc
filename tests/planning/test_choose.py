import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnlayers
from benchmarks.measure import speed
from cases import FAMILIES
from networks import networks
from tnlayers import Geometry, TensorNetwork, testing
from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import RUN_MODES
from tnlayers.execution.run import run
from tnlayers.planning import choose as planning
from tnlayers.planning.choose import LIMIT, candidates, plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import refine, space_of
from tnlayers.planning.setting import MEMORY, Setting

TEXTS = ("i r, o r, h r, w r", "i a, a h w b, b o", "z i a, a h w b, b o z", "h w a, a i1 o1 b, b i2 o2")


def partitions(items: tuple[int, ...]):
    """Every ordered partition into sets."""
    if not items:
        yield ()
    for size in range(1, len(items) + 1):
        for first in itertools.combinations(items, size):
            rest = tuple(item for item in items if item not in first)
            for others in partitions(rest):
                yield (first, *others)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("mode", RUN_MODES)
@pytest.mark.parametrize("size", [4, 32])
def test_the_search_finds_what_trying_every_order_finds(text, mode, size):
    skeleton = TensorNetwork.skeleton(text)
    sizes = {axis: 3 if axis in "hw" else 8 if axis[0] in "io" else 5 for axis in skeleton.axes}
    network = TensorNetwork.parse(text, sizes)
    channels = 8 ** len(network.inputs)
    where = space_of(network, Geometry(channels, channels, (3, 3), padding=1))
    setting = Setting(4, (size, size), mode=mode)
    table = rates_of("cpu", "float32")
    least = min(
        next(iter(Search(where, setting, table, tuple(sum(1 << k for k in part) for part in order)))).seconds
        for order in partitions(tuple(range(len(network.cores))))
    )
    assert next(iter(Search(where, setting, table))).seconds == pytest.approx(least, rel=1e-12)


def test_refine():
    assert refine((0b001, 0b110), (0b011, 0b100)) == (1, 2, 4)
    assert refine((0b100, 0b011), (0b011, 0b100)) is None
    assert refine((), (1, 2)) == ()


@settings(max_examples=60, deadline=None)
@given(networks(max_cores=5), st.sampled_from(RUN_MODES), st.sampled_from(["first", "last"]), st.booleans())
def test_every_plan_computes_the_same(network, mode, layout, bias):
    """The cheapest plans and the dearer ones behind them, whatever the layout, and their gradients."""
    if len(network.kernel) == 1:
        layout = "first"
    out_channels, in_channels, *kernel = network.dense_shape
    geometry = Geometry(in_channels, out_channels, tuple(kernel), padding=1)
    size = tuple(k + 3 for k in kernel)
    torch.manual_seed(0)
    # Of torch's own convolutions, that of float64 on channels_last input fails in some backward passes.
    dtype, tolerance = (torch.float64, 1e-9) if layout == "first" else (torch.float32, 1e-3)
    x = torch.randn(3, in_channels, *size, dtype=dtype)
    if layout == "last":
        x = x.to(memory_format=torch.channels_last if len(kernel) == 2 else torch.channels_last_3d)
    x.requires_grad_(mode == "train")
    cores = [torch.randn(s, dtype=dtype, requires_grad=mode == "train") for s in network.core_shapes]
    offset = torch.randn(out_channels, dtype=dtype) if bias else None
    weight = tnlayers.ops.contraction.reconstruct(network, cores)
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(kernel) - 1]
    expected = conv(x, weight, offset, padding=1)
    scale = float(expected.detach().abs().max()) + 1
    wanted = torch.autograd.grad(expected.square().sum(), [x, *cores]) if mode == "train" else []
    for found in itertools.islice(candidates(network, geometry, Setting(3, size, layout, mode)), 12):
        y = run(found, x, cores, offset)
        torch.testing.assert_close(y / scale, expected / scale, rtol=tolerance, atol=tolerance)
        if mode == "train":
            for gradient, other in zip(torch.autograd.grad(y.square().sum(), [x, *cores]), wanted, strict=True):
                torch.testing.assert_close(
                    gradient, other, rtol=tolerance, atol=tolerance * float(other.abs().max() + 1)
                )


@pytest.mark.parametrize("layer", FAMILIES)
def test_channels_last_stays_channels_last(layer):
    made = layer(16, 32, 3, padding=1, rank=4)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    assert made(x).is_contiguous(memory_format=torch.channels_last)
    assert made(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("strategy", ["auto", "reconstruct", "factorized"])
def test_second_derivatives(layer, memory, strategy):
    torch.manual_seed(0)
    made = layer(4, 6, 3, rank=2, dtype=torch.float64, memory=memory, strategy=strategy)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(made.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(made, dict(zip(parameters, values, strict=True)), x)

    arguments = (x, *parameters.values())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, beside the input and the parameters."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    total = sum(size for pointer, size in seen.items() if pointer not in known)
    del y
    return total


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("strategy", ["auto", "factorized"])
def test_low_memory_keeps_nothing_but_the_input(layer, strategy):
    torch.manual_seed(0)
    low = layer(16, 16, 3, padding=1, rank=6, strategy=strategy, memory="low")
    plain = copy.deepcopy(low)
    plain.memory = "auto"
    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    assert saved_bytes(low, x) == 0
    for one, other in zip(
        torch.autograd.grad(low(x).sum(), [x, *low.parameters()]),
        torch.autograd.grad(plain(x).sum(), [x, *plain.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = low(x)
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in low.parameters())


def test_plans_keep_to_the_memory_of_the_dense_layer():
    layer = tnlayers.CPConv2d(64, 64, 3, padding=1, rank=68)
    found = plan(layer.network, layer.geometry, Setting(32, (32, 32)))
    x = 32 * 64 * 32 * 32
    assert found.peak <= LIMIT * 4 * (2 * layer.network.dense_params + 4 * x)
    assert found.chunks > 1
    assert plan(layer.network, layer.geometry, Setting(32, (32, 32), mode="infer")).chunks == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", RUN_MODES)
def test_in_doubt_the_kernel_is_built(dtype, memory, mode):
    """Over ranks from where cores win to where the kernel does, past those where no estimate can tell."""
    setting = Setting(32, (16, 16), mode=mode, dtype=dtype)
    doubt = rates_of("cpu", str(dtype).removeprefix("torch.")).doubt
    chosen = []
    for rank in range(8, 400, 28):
        layer = tnlayers.CPConv2d(64, 64, 3, padding=1, rank=rank, device="meta")
        arguments = layer.network, layer.geometry, setting
        found = [*itertools.islice(candidates(*arguments, memory=memory), 8)]
        dense = plan(*arguments, "reconstruct", memory)
        best = min((each.seconds for each in found if each.strategy == "factorized"), default=float("inf"))
        chosen.append(found[0].strategy)
        assert chosen[-1] == ("reconstruct" if dense.seconds <= best * (1 + doubt) else "factorized")
    assert {*chosen} == {"reconstruct", "factorized"}


def test_explain_says_where_the_runner_up_is_too_near():
    layer = tnlayers.CPConv2d(64, 64, 3, padding=1, rank=16)
    found = plan(layer.network, layer.geometry, Setting(32, (16, 16)))
    for ratio, doubted in ((0.97, True), (1.2, False)):
        last = found.explain(dataclasses.replace(found, seconds=ratio * found.seconds)).splitlines()[-1]
        assert f"{ratio:.2f} times the estimated time" in last
        assert last.endswith("too near to be trusted") is doubted


def test_a_second_forward_searches_nothing(monkeypatch):
    layer = tnlayers.TRConv2d(8, 12, 3, rank=3)
    x = torch.randn(2, 8, 6, 6)
    layer(x)
    monkeypatch.setattr(planning, "Search", None)
    monkeypatch.setattr(tnlayers.execution.executor, "plan", None)
    layer(x)


@pytest.mark.parametrize(("layer", "memory"), [*((layer, "auto") for layer in FAMILIES), (tnlayers.TTConv2d, "low")])
def test_compiles_in_one_graph(layer, memory):
    """Also for other batches, and with the weight in the graph."""
    torch._dynamo.reset()
    made = layer(8, 12, 3, padding=1, rank=2, memory=memory)
    compiled = torch.compile(lambda x: made(x) + made.weight.sum(), fullgraph=True, backend="aot_eager", dynamic=None)
    for batch in (2, 5, 7):
        x = torch.randn(batch, 8, 9, 9)
        torch.testing.assert_close(compiled(x), made(x) + made.weight.sum(), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_an_order_is_a_strategy():
    layer = tnlayers.TuckerConv2d(8, 12, 3, rank=3, strategy="2 > 0*1", dtype=torch.float64)
    assert layer.explain((1, 8, 9, 9)).startswith("factorized")
    assert layer._executor.plan(layer._setting((1, 8, 9, 9))).order == "2 > 0*1"
    testing.assert_same_function(layer, testing.example_input(layer))
    assert tnlayers.TuckerConv2d(8, 12, 3, rank=3, strategy="0*1*2").explain((1, 8, 9, 9)).startswith("reconstruct")
    for wrong in ("0 > 1", "0 > 1 > 1 > 2", "0 > 1 > 3", "0 > one*2", "0*1*2*"):
        with pytest.raises(ValueError, match=r"strategy is .*an order such as '0 > 1\*2'"):
            tnlayers.TuckerConv2d(8, 12, 3, rank=3, strategy=wrong)
    with pytest.raises(ValueError, match=r"memory is 'little'; .*'auto', 'low'"):
        tnlayers.TuckerConv2d(8, 12, 3, memory="little")


def test_autotune_fixes_an_order_and_nothing_else():
    torch.manual_seed(0)
    conv = tnlayers.CPConv2d(8, 8, 3, rank=3)
    model = nn.Sequential(conv, nn.ReLU(), tnlayers.TTConv2d(8, 8, 3, rank=2, strategy="reconstruct"))
    x = torch.randn(2, 8, 9, 9)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    chosen = tnlayers.autotune(model, x, candidates=3)
    assert set(chosen) == {"0"}
    assert sorted(core for core in chosen["0"] if core.isdigit()) == list("0123")
    assert model[2].strategy == "reconstruct"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert pickle.loads(pickle.dumps(conv)).strategy == chosen["0"]
    again = tnlayers.CPConv2d(8, 8, 3, rank=3, strategy=chosen["0"])
    assert again.strategy == conv.strategy


def test_networks_of_many_cores():
    """Beyond the exact search."""
    text = ", ".join(["i r0", *(f"r{k} r{k + 1}" for k in range(12)), "r12 h w o"])
    layer = tnlayers.EinsumConv2d(4, 6, 3, network=text, rank=2, dtype=torch.float64)
    for strategy in ("auto", "reconstruct", "factorized"):
        layer.strategy = strategy
        testing.assert_same_function(layer, testing.example_input(layer))


def test_the_benchmark_s_fewest_flops_are_no_more_than_the_planner_s():
    layer = tnlayers.CPConv2d(16, 16, 3, padding=1, rank=8)
    setting = Setting(4, (8, 8))
    least = speed.least_flops(layer, setting)
    assert 0 < least <= plan(layer.network, layer.geometry, setting).flops
    assert least == min(each.flops for each in candidates(layer.network, layer.geometry, setting))
