"""Networks in place of any weight, layers with computed weights, and rows for all that stays."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import tnlayers
from tnlayers import TensorizeConfig, densify_, parametrize_, remap_optimizer_, tensorize_
from tnlayers.layers.any_weight import Layout, weight_class
from tnlayers.tensorize.swappable import BASES, GROUPS, groups

NAMES = [name for name in tnlayers.FORMATS if name != "einsum"]


class StdConv2d(nn.Conv2d):
    """Weight standardisation, as timm has it: the class reads its own weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Experts(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 12, 8, dtype=dtype))

    def forward(self, x):
        return torch.einsum("eoi,bei->beo", self.up, x)


class Own(nn.Module):
    """A matrix as Conv1D of transformers has it: inputs first."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 12, dtype=torch.float64))

    def forward(self, x):
        return x @ self.matrix


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)


def with_weight(name, make, *shapes, axes=None):
    inputs = [torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape) for shape in shapes]
    return pytest.param(make, name, inputs, axes, id=f"{name}-{axes}-{len(shapes)}")


CASES = [
    with_weight("in_proj_weight", attention, *[(2, 3, 8)] * 3),
    with_weight("weight", lambda: StdConv2d(8, 12, 3, groups=2, dtype=torch.float64), (2, 8, 5, 5)),
    with_weight("weight", lambda: nn.ConvTranspose1d(8, 12, 3, groups=2, dtype=torch.float64), (2, 8, 5)),
    with_weight("weight", lambda: nn.Bilinear(4, 6, 8, dtype=torch.float64), (5, 4), (5, 6)),
    with_weight("up", Experts, (3, 4, 8)),
    with_weight("up", Experts, (3, 4, 8), axes="o1 o2 i"),
    with_weight("matrix", Own, (3, 8), axes="i o"),
]


def outputs(model, inputs, weights=None):
    found = model(*inputs) if weights is None else functional_call(model, weights, tuple(inputs))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize(("make", "name", "inputs", "axes"), CASES)
def test_a_network_is_the_same_function_as_its_dense_weight(make, name, inputs, axes, format):
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    rest = {key for key, _ in module.named_parameters()} - {name}
    report = parametrize_(module, name, format, rank=2, axes=axes, decompose=False)
    assert report[name].swapped
    assert {key for key, _ in module.named_parameters() if "original" not in key} == rest
    weight = getattr(module, name).detach().requires_grad_()
    y = outputs(module, inputs)
    expected = outputs(plain, inputs, {name: weight})
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    y.square().sum().backward()
    (gradient,) = torch.autograd.grad(expected.square().sum(), weight)
    cores = [*module.parametrizations[name].parameters()]
    (*found,) = torch.autograd.grad(getattr(module, name), cores, gradient)
    for core, theirs in zip(cores, found, strict=True):
        torch.testing.assert_close(core.grad, theirs, rtol=1e-10, atol=1e-10)
    parametrize.remove_parametrizations(module, name)
    assert isinstance(module._parameters[name], nn.Parameter)
    torch.testing.assert_close(outputs(module, inputs), y, rtol=0, atol=1e-10)


pytestmark = pytest.mark.filterwarnings("ignore::tnlayers.layers.core_memory.LargerThanDense")


@given(st.data())
def test_axes_there_and_back(data):
    extra = data.draw(st.lists(st.sampled_from(["g", "o", "i"]), max_size=2))
    letters = data.draw(st.permutations(["o", "i", *extra, *data.draw(st.sampled_from([[], ["h", "w"]]))]))
    names = [f"{letter}{k}" if letter in "goi" else letter for k, letter in enumerate(letters)]
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names))))
    layout = Layout(shape, " ".join(names))
    weight = torch.arange(math.prod(shape)).reshape(shape)
    kernel = layout.to_kernel(weight)
    assert kernel.shape == layout.geometry.weight_shape
    assert torch.equal(layout.to_weight(kernel), weight)


def test_experts_are_maps_of_their_own():
    weight = torch.randn(4, 12, 8)
    layout = Layout((4, 12, 8), "g o i")
    assert (layout.geometry.fan_in, layout.geometry.fan_out) == (8, 12)
    assert torch.equal(layout.to_kernel(weight), weight.reshape(48, 8))
    assert Layout((8, 4, 6), "o i1 i2").geometry.fan_in == 24


@pytest.mark.parametrize("format", NAMES)
def test_a_drawn_weight_has_the_solver_s_standard_deviation(format):
    torch.manual_seed(0)
    layer = weight_class(format)(Layout((4, 16, 24), "g o i").geometry, rank=6)
    assert layer.variance.weight_std == pytest.approx(math.sqrt(2 / 24))
    assert float(layer.weight.detach().square().mean()) == pytest.approx(2 / 24, rel=0.03)


def test_the_weight_of_an_embedding_is_drawn_as_a_table_is():
    module = nn.Embedding(40, 8)
    parametrize_(module, "weight", "tucker", rank=0.5, decompose=False)
    layer = module.parametrizations.weight[0].layer
    assert layer.init == tnlayers.TuckerEmbedding(40, 8, rank=2).init
    assert layer.variance.weight_std == pytest.approx(1)


@pytest.mark.parametrize("make", [lambda: nn.Bilinear(6, 8, 10), lambda: nn.Embedding(40, 8)])
def test_a_weight_is_drawn_as_large_as_it_was(make):
    module = make()
    size = module.weight.detach().square().mean().sqrt()
    parametrize_(module, "weight", "tucker", rank=0.5, decompose=False, init="like")
    assert module.parametrizations.weight[0].layer.variance.weight_std == pytest.approx(float(size))


def test_fits_and_assignments_fit_again():
    torch.manual_seed(0)
    module, twin = attention(), attention()
    weight = module.in_proj_weight.detach().clone()
    report = parametrize_(module, "in_proj_weight", "tucker", rank=5)
    error = float((module.in_proj_weight - weight).detach().norm() / weight.norm())
    assert report["in_proj_weight"].error == pytest.approx(error, rel=1e-6)
    assert 0 < error < 0.7
    again = copy.deepcopy(module)
    parametrize_(twin, "in_proj_weight", "tucker", rank=5, decompose=False)
    again.in_proj_weight = twin.in_proj_weight.detach()  # of this rank, so that it fits
    torch.testing.assert_close(again.in_proj_weight, twin.in_proj_weight, rtol=0, atol=1e-10)
    assert not torch.equal(module.in_proj_weight, again.in_proj_weight)
    module.load_state_dict(again.state_dict())
    assert torch.equal(module.in_proj_weight, again.in_proj_weight)


def test_a_rule_chooses_the_rank():
    torch.manual_seed(0)
    module = nn.Bilinear(16, 16, 64)
    low = torch.randn(64, 3) @ torch.randn(3, 256)
    module.weight.data = (low + 0.01 * torch.randn(64, 256)).reshape(64, 16, 16)
    report = parametrize_(module, "weight", "tucker", rank="vbmf")
    assert report["weight"].rank == {"ri": 3, "ro": 3}
    assert report["weight"].error < 0.05


def test_attention_runs_fused_and_plain():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    report = tensorize_(model, TensorizeConfig("tr", rank=0.5, decompose=False, parametrize=True))
    assert report.swapped == ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1", "linear2")
    x = torch.randn(2, 5, 16)
    expected = model(x)
    model.eval()
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)  # torch's fused kernel
    with parametrize.cached():
        torch.testing.assert_close(model(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_frozen_stays_frozen(frozen):
    module = nn.Bilinear(8, 8, 8)
    module.weight.requires_grad_(not frozen)
    parametrize_(module, "weight", rank=0.5, decompose=False)
    assert all(core.requires_grad != frozen for core in module.parametrizations.weight.parameters())
    densify_(module)
    assert [name for name, _ in module.named_parameters()] == ["bias", "weight"]
    assert module.weight.requires_grad != frozen
    assert not parametrize.is_parametrized(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    module = Experts(dtype)
    parametrize_(module, "up", "cp", rank=4)
    assert module.up.dtype == dtype
    assert all(core.dtype == dtype for core in module.parameters())


def test_an_optimizer_is_told_and_remapped_there_and_back():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Bilinear(8, 8, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="SGD was made before the swap"):
        report = parametrize_(model, "0.in_proj_weight", "tucker", rank=2, decompose=False)
    assert remap_optimizer_(optimizer, report) == 1
    with pytest.warns(UserWarning, match="SGD was made before the swap"):
        report = densify_(model)
    assert remap_optimizer_(optimizer, report) == 3
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, model.parameters())}
    assert "0.in_proj_weight" in optimizer.param_groups[0]["param_names"]


def test_files_hold_the_cores_and_the_factory_makes_the_network(tmp_path):
    def factory(decompose=True):
        model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
        parametrize_(model, "0.in_proj_weight", "tr", rank=0.5, decompose=decompose)
        return model

    model = factory(decompose=False)
    tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False))
    tnlayers.save_tensorized(model, tmp_path / "model.safetensors")
    again = tnlayers.load_tensorized(factory, tmp_path / "model.safetensors")
    assert torch.equal(again[0].in_proj_weight, model[0].in_proj_weight)
    assert torch.equal(again[1].weight, model[1].weight)


def test_a_report_names_the_networks_that_were_there():
    model = nn.Sequential(attention(), nn.Linear(8, 8))
    tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False))
    parametrize_(model, "0.in_proj_weight", "cp", rank=2, decompose=False)
    report = parametrize_(model, "0.out_proj.weight", "cp", rank=2, decompose=False)
    assert {row.name: row.reason for row in report.layers} == {
        "0.in_proj_weight": "a tensor network already",
        "0.out_proj.weight": "drawn",
        "1": "a tensor layer already",
    }
    assert [row.name for row in report.others] == ["(vectors)"]
    assert sum(row.held for row in (*report.layers, *report.others)) == report.model_params[0]


def test_unfolding_makes_plain_parameters():
    model = nn.Sequential(Experts(), nn.Linear(8, 8).double())
    parametrize_(model, "0.up", "cp", rank=2, decompose=False)
    tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False))
    report = tnlayers.unfold_(model)
    assert (report["0.up"].reason, report["1"].reason) == ("plain again", "unfolded")
    assert "up" in model[0]._parameters
    model = nn.Sequential(tnlayers.CPLinear(8, 8, rank=2), nn.Linear(8, 8))
    assert densify_(model)["1"].reason == "a plain layer"


def tied():
    module = Experts()
    module.again = module.up
    return module


@pytest.mark.parametrize(
    ("make", "name", "settings", "words"),
    [
        (attention, "in_proj", {}, r"name is 'in_proj', which is no parameter .* near: \['in_proj_weight'"),
        (attention, "in_proj_bias", {}, r"name is 'in_proj_bias', of shape \(24,\); a network needs two axes"),
        (attention, "in_proj_weight", {"axes": "o"}, "axes is 'o'; it must name each of the 2 axes"),
        (attention, "in_proj_weight", {"axes": "o h"}, "axes is 'o h'; it must have an output o and an input i"),
        (attention, "in_proj_weight", {"format": "none"}, "format is 'none'; accepted"),
        (attention, "in_proj_weight", {"rank": 2.0}, "rank is 2.0"),
        (attention, "in_proj_weight", {"format": "tt", "layout": "no"}, "layout is 'no'"),
        (lambda: tnlayers.TRLinear(8, 8, rank=2), "cores.0", {}, "name is 'cores.0', a parameter of a TRLinear"),
        (lambda: nn.LSTM(8, 8), "weight_ih_l0", {}, r"LSTM._flat_weights\[0\] holds its weight_ih_l0 too"),
        (
            lambda: nn.Embedding(9, 4, padding_idx=-1),
            "weight",
            {"format": "tt"},
            "padding_idx is 8, .*; TTEmbedding keeps",
        ),
        (lambda: nn.EmbeddingBag(9, 4, padding_idx=0), "weight", {}, "padding_idx is 0, .*; TREmbeddingBag keeps"),
        (
            lambda: nn.Embedding(9, 4, max_norm=1.0),
            "weight",
            {},
            "cannot become a network: max_norm is 1.0; it must be",
        ),
        (lambda: nn.Embedding(9, 4, sparse=True), "weight", {}, "cannot become a network: sparse is True; it must be"),
        (lambda: nn.Embedding(9, 4), "weight", {"init": "fan_out"}, "init has the mode 'fan_out', but a lookup"),
        (tied, "up", {}, "up cannot become a network: it is the module's again too"),
        (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "weight", {}, "parametrized already"),
        (lambda: Experts(torch.complex64), "up", {}, "its weight is of torch.complex64"),
    ],
)
def test_what_cannot_be_a_network_is_refused_by_name(make, name, settings, words):
    module = make()
    before = {key: id(value) for key, value in module.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=words):
        parametrize_(module, name, **{"rank": 2} | settings)
    assert {key: id(value) for key, value in module.named_parameters()} == before


def test_on_request_for_a_whole_model_and_patterns_name_weights():
    torch.manual_seed(0)
    model = nn.Sequential(StdConv2d(4, 8, 3), attention(), nn.Bilinear(8, 8, 4), nn.LayerNorm((8, 8)), nn.Linear(8, 8))
    plain = tensorize_(copy.deepcopy(model), TensorizeConfig(rank=0.5, decompose=False))
    assert plain.swapped == ("4",)
    assert "subclass" in plain["0"].reason
    assert "parametrize=True" in plain["1"].reason
    assert "a norm" in plain["3"].reason
    config = TensorizeConfig(rank=0.5, decompose=False, parametrize=True, exclude=["2.weight"], budget=None)
    report = tensorize_(model, config)
    assert report.swapped == ("0.weight", "1.in_proj_weight", "1.out_proj.weight", "4")
    assert report["2.weight"].reason == "excluded by '2.weight'"
    assert report["0.weight"].kind == "StdConv2d.weight 8 x 4 x 3 x 3"
    again = tensorize_(nn.Sequential(model, nn.Linear(8, 8)), config.from_dict(config.to_dict() | {"exclude": []}))
    assert again["0.0.weight"].reason == "a tensor network already"
    assert again.swapped == ("0.2.weight", "1")


def test_budgets_and_calibration_count_weights_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    batches = [torch.randn(2, 5, 16)]
    config = TensorizeConfig("tucker", budget={"params": 0.5}, parametrize=True)
    report = tensorize_(copy.deepcopy(model), config, calibration=batches)
    assert report.total("params")[1] <= 0.5 * report.total("params")[0]
    assert report["self_attn.in_proj_weight"].reason == "fitted"
    assert report["linear1"].reason == "fitted, to its inputs"
    config = TensorizeConfig("tucker", budget={"flops": 0.5}, parametrize=True)
    report = tensorize_(model, config, example_input=batches[0], dry_run=True)
    assert report["self_attn.in_proj_weight"].reason == "it has no FLOPs of its own"


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("training", [False, True])
def test_computed_weights_are_folded_on_request(norm, training):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv1d(8, 8, 3)), nn.Linear(6, 4)).double()
    calls = []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.train(training)
    report = tensorize_(model, TensorizeConfig(rank=0.9, decompose=False), dry_run=True)
    assert "parametrized='fold' swaps it" in report["0"].reason
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    expected = model.eval()(x).detach()
    model.train(training)
    bias, names = model[0].bias, [name for name, _ in model.named_parameters() if name != "0.bias"]
    config = TensorizeConfig("tucker", rank={"ri": 8, "ro": 8}, include=["0"], parametrized="fold")
    report = tensorize_(model, config)
    assert report["0"].reason == "fitted, its parametrization folded in"
    assert model[0].bias is bias
    assert not {*names} & {name for name, _ in model[0].named_parameters(prefix="0")}
    calls.clear()
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-10)
    assert calls == [1]
    assert sum(row.held for row in report.layers + report.others) == report.model_params[0]
    densify_(model)
    assert type(model[0]) is nn.Conv1d
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-10)


def test_conv1d_of_transformers_is_a_linear_layer(monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return F.linear(x, self.weight.T, self.bias)

    fake = types.ModuleType("transformers.pytorch_utils")
    fake.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", fake)
    model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(3, 4)
    expected, bias = model(x).detach(), model[0].bias
    report = tensorize_(model, TensorizeConfig("tucker", rank={"ri": 4, "ro": 6}))
    assert type(model[0]) is tnlayers.TuckerLinear
    assert (model[0].bias is bias, model[0].nf) == (True, 6)
    assert report["0"].error < 1e-6
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    densify_(model)
    assert (type(model[0]), model[0].weight.shape, model[0].bias is bias) == (Conv1D, (4, 6), True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"model is itself a Conv1D, which cannot .* `layer = nn.Sequential\(layer\)`"):
        tensorize_(Conv1D(6, 4))


def test_adapters_of_peft_are_left_and_named():
    base = type("BaseTunerLayer", (), {"__module__": "peft.tuners.tuners_utils"})

    class Lora(nn.Module, base):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(2, 8))})

    model = nn.Sequential(Lora(), nn.Linear(8, 8))
    report = tensorize_(model, TensorizeConfig(rank=0.5, decompose=False, parametrize=True))
    assert report.swapped == ("1",)
    for name in ("0.base_layer", "0.lora_A.default", "0.lora_embedding_B"):
        assert report[name].reason.startswith("part of PEFT's Lora, which is left alone")
    assert sum(row.held for row in report.layers + report.others) == report.model_params[0]


def test_kinds_are_chosen_from_those_that_have_layers():
    assert {kind for name in groups() for kind in GROUPS[name] if kind in BASES} == {*BASES}
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    report = tensorize_(model, TensorizeConfig("cp", decompose=False, rank=1, kinds=["linear"]))
    assert report.swapped == ("1",)
    assert report["0"].reason == "not in kinds (kinds=('linear', 'conv') swaps it)"
    for kinds, words in (("linear", "kinds is 'linear'; it must be a sequence"), (["none"], "kinds is 'none'")):
        with pytest.raises((TypeError, ValueError), match=words):
            TensorizeConfig(kinds=kinds)
    with pytest.raises(ValueError, match="parametrized is 'no'; accepted: 'leave', 'fold'"):
        TensorizeConfig(parametrized="no")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.rnn, self.norm = nn.Embedding(10, 8), nn.GRU(8, 8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.prompt = nn.Parameter(torch.ones(1, 4, 8))
        self.head, self.last = nn.Linear(8, 10), nn.Linear(8, 8)
        self.head.weight = self.table.weight


def test_rows_hold_each_parameter_once():
    model = Tied()
    report = tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False), dry_run=True)
    held = {row.name: row.held for row in report.layers + report.others}
    assert held == {"table": 80, "head": 10, "last": 72, "": 32, "rnn": 2 * 8 * 24 + 2 * 24, "(vectors)": 16 + 8}
    assert sum(held.values()) == sum(p.numel() for p in model.parameters()) == report.model_params[0]
    assert "embedding" in report["table"].reason
    assert "prompt 1 x 4 x 8" in report[""].kind
    assert report.reached == 64 / report.model_params[0]
    assert f"within reach: {report.reached:.1%} of all parameters" in str(report)
    assert "1 of 4 layers would be swapped" in str(report)
    expected = report.model_params
    assert tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False)).model_params == expected
