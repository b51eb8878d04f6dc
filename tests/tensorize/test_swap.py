"""Swapping a model's layers, and back: what is kept, what is refused, and what the report says."""

import copy
import functools
import gc
import itertools
import pickle
import re
import types
import warnings
import weakref
from collections import deque, namedtuple
from dataclasses import dataclass
from operator import and_

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrizations, parametrize, prune

import tnlayers
from cases import FAMILIES
from tnlayers import (
    TensorizeConfig,
    TensorLayer,
    densify_,
    load_tensorized,
    remap_optimizer_,
    save_tensorized,
    tensorize_,
    unfold_,
)
from tnlayers.backend.shared_memory import sharing

NAMES = [name for name in tnlayers.FORMATS if name != "einsum"]


class Net(nn.Module):
    """One of each kind, with a shared convolution, a depthwise one and a tied pair."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, dtype=dtype)
        self.body = nn.ModuleDict({"a": nn.Conv2d(16, 16, 3, padding=1, bias=False, dtype=dtype)})
        self.again = self.body["a"]
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, dtype=dtype)
        self.point = nn.Conv2d(16, 32, 1, dtype=dtype)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2, dtype=dtype)
        self.tied = nn.Linear(16, 16, dtype=dtype)
        self.twin = nn.Linear(16, 16, dtype=dtype)
        self.twin.weight = self.tied.weight
        self.head = nn.Linear(16, 10, dtype=dtype)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.again(torch.relu(self.body["a"](x)))
        x = self.up(self.point(self.depthwise(x))).mean((2, 3))
        return self.head(self.twin(self.tied(x)))


def image(**kwargs):
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, **kwargs)


def state(model):
    return {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before, modules):
    assert [*model.modules()] == modules
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)


def test_every_layer_is_reported_and_shared_modules_stay_shared():
    model, x = Net(), image()
    bias = model.stem.bias
    report = tensorize_(model, TensorizeConfig("tr", rank=0.5, decompose=False), example_input=x)
    assert list(report) == ["stem", "body.a", "depthwise", "point", "up", "tied", "twin", "head"]
    assert report.swapped == ("stem", "body.a", "point", "up", "head")
    assert report["again"] is report["body.a"]
    assert model.again is model.body["a"]
    assert type(model.up).__name__ == "TRConvTranspose2d"
    assert "depthwise" in report["depthwise"].reason
    assert "same weight" in report["tied"].reason
    assert report["stem"].reason == "drawn"
    assert model.stem.bias is bias
    assert all(layer.flops and layer.params for layer in report.layers)
    assert report["head"].flops[0] == 2 * 2 * 16 * 10
    assert report["body.a"].flops[0] == 2 * (2 * 2 * 16 * 16 * 9 * 64)  # two calls
    assert report.model_params[1] == sum(p.numel() for p in model.parameters())
    assert pickle.loads(pickle.dumps(report)) == report
    text = str(report)
    assert "body.a = again" in text
    assert "5 of 8 layers swapped" in text
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("back", [densify_, unfold_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back_is_the_same_function(name, back, dtype):
    torch.manual_seed(0)
    model, x = Net(dtype).eval(), image().to(dtype)
    tensorize_(model, TensorizeConfig(name, rank=2, depthwise=True, decompose=False))
    expected = model(x).detach()
    bias = model.stem.bias
    report = back(model)
    assert not any(isinstance(module, TensorLayer) for module in model.modules())
    assert model.again is model.body["a"]
    assert report.swapped
    assert any(parameter is bias for parameter in model.parameters())
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        model(x).detach(), expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-10)
    )


@pytest.mark.parametrize("layer", FAMILIES)
def test_trained_kernels_are_fitted_and_the_error_is_theirs(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3, groups=2))
    before = [module.weight.detach().clone() for module in model]
    report = tensorize_(model, TensorizeConfig(layer.format_type.name, rank=2))
    for name, module, weight in zip("01", model, before, strict=True):
        found = float((module.weight.detach() - weight).norm() / weight.norm())
        assert report[name].error == pytest.approx(found, rel=1e-4)
        assert report[name].reason == "fitted"
        assert 0 < found < 1


def test_what_surrounds_a_kernel_is_kept():
    model, calls = Net().eval(), []
    model.stem.weight.requires_grad_(False)
    model.stem.bias.requires_grad_(False)
    model.head.train()
    model.stem.note = "mine"
    handle = model.stem.register_forward_hook(lambda *_: calls.append("forward"))
    model.stem.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    for change in (lambda: tensorize_(model, TensorizeConfig("tucker", decompose=False)), lambda: densify_(model)):
        change()
        model(image()).sum().backward()
        assert calls == ["pre", "forward", "backward"]
        assert model.stem.note == "mine"
        assert not any(p.requires_grad for p in model.stem.parameters())
        assert all(p.requires_grad for p in model.head.parameters())
        assert model.head.training
        assert not model.stem.training
        calls.clear()
    handle.remove()
    model(image())
    assert "forward" not in calls


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def refusals():
    def sparse(layer):
        prune.l1_unstructured(layer, "weight", 0.5)

    def hooked(layer):
        layer.weight.register_hook(lambda grad: grad)

    def extra(layer):
        layer.register_buffer("mask", torch.ones(1))

    def forward(layer):
        layer.forward = lambda x: x

    def saving(layer):
        layer.register_state_dict_post_hook(lambda *_: None)

    yield "parametrized", lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    yield "subclass of Conv2d", lambda: Twice(8, 8, 3)
    yield "lazy", lambda: nn.LazyConv2d(8, 3)
    yield "complex64", lambda: nn.Conv2d(8, 8, 3, dtype=torch.complex64)
    for words, change in (
        ("computed", sparse),
        ("weight has hooks", hooked),
        ("also holds mask", extra),
        ("forward was replaced", forward),
        ("state_dict", saving),
    ):

        def make(change=change):
            layer = nn.Conv2d(8, 8, 3)
            change(layer)
            return layer

        yield words, make


@pytest.mark.parametrize(("words", "make"), [*refusals()])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_would_be_lost_is_refused_by_name(words, make):
    odd = make()
    model = nn.Sequential(nn.Conv2d(8, 8, 3), odd)
    report = tensorize_(model, TensorizeConfig(decompose=False))
    assert words in report["1"].reason or (words == "lazy" and "subclass" in report["1"].reason)
    assert report.swapped == ("0",)
    assert model[1] is odd


def test_subclasses_on_request():
    model = nn.Sequential(Twice(8, 8, 3))
    with pytest.raises(ValueError, match="Twice is a subclass of Conv2d"):
        tensorize_(model, TensorizeConfig(decompose=False))
    report = tensorize_(model, TensorizeConfig("cp", decompose=False, subclasses=True))
    assert type(model[0]) is tnlayers.CPConv2d
    assert report.swapped == ("0",)


def test_overrides_in_order():
    model = Net()
    config = TensorizeConfig(
        "tt",
        rank=0.5,
        decompose=False,
        include=["body*", "head", "point"],
        overrides=[
            ("body.a", {"format": "einsum", "options": {"network": "i a, a h b, b w c, c o"}, "rank": (2, 3, 4)}),
            ("re:p.*", None),
            ("*", {"strategy": "reconstruct", "init": "fan_out"}),
        ],
        options={"layout": "chain"},
    )
    report = tensorize_(model, config)
    assert report.swapped == ("body.a", "head")
    assert model.again.rank == {"a": 2, "b": 3, "c": 4}
    assert model.again.strategy == "auto"
    assert model.head.strategy == "reconstruct"
    assert model.head.init.mode == "fan_out"
    assert model.head.format.layout == "chain"
    assert report["point"].reason == "left alone by an override"
    assert report["stem"].reason == "not in include"


@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_a_pattern_without_a_layer_is_an_error(field):
    model = Net()
    before, modules = state(model), [*model.modules()]
    pattern = ["bodi.a"] if field != "overrides" else {"bodi.a": None}
    with pytest.raises(ValueError, match=rf"{field} has the pattern 'bodi.a'.*near names: body.a"):
        tensorize_(model, TensorizeConfig(**{field: pattern}))
    assert_untouched(model, before, modules)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = Net()
    before, modules = state(model), [*model.modules()]
    original, calls = TensorLayer.set_weight_, []

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return original(*args, **kwargs)

    monkeypatch.setattr(TensorLayer, "set_weight_", third)
    with pytest.raises(RuntimeError, match="no more"):
        tensorize_(model, TensorizeConfig("tucker", rank=2), example_input=image())
    assert_untouched(model, before, modules)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_dry_run_changes_nothing():
    model = Net()
    before, modules, rng = state(model), [*model.modules()], torch.get_rng_state()
    report = tensorize_(model, TensorizeConfig("tr", rank=0.5), example_input=image(), dry_run=True)
    rng_after = torch.get_rng_state()
    assert_untouched(model, before, modules)
    real = tensorize_(model, TensorizeConfig("tr", rank=0.5, decompose=False), example_input=image())
    assert report.swapped == real.swapped
    assert [layer.flops for layer in report.layers] == [layer.flops for layer in real.layers]
    assert report.model_params == real.model_params
    assert "would be swapped" in str(report)
    assert torch.equal(rng_after[:8], rng[:8])


def test_a_layer_that_refuses_its_rank_is_left_alone_but_not_all():
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(64, 64))
    report = tensorize_(model, TensorizeConfig("tt", rank=2, decompose=False))
    assert report.swapped == ("1",)
    assert report["0"].reason.startswith("refused: ")
    with pytest.raises(ValueError, match="no layer can be swapped"):
        tensorize_(nn.Sequential(nn.Linear(7, 13)), TensorizeConfig("tt", rank=2, decompose=False))


def test_models_that_cannot_be_swapped():
    with pytest.raises(ValueError, match=r"model has no convolution or linear layer \(Sequential\)"):
        tensorize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="model has no tensor layer"):
        densify_(Net())
    with pytest.raises(TypeError, match="model is of type int"):
        tensorize_(3)
    with pytest.raises(TypeError, match="config is"):
        tensorize_(Net(), 3)
    with pytest.raises(ValueError, match=r"format is 'ttt'; accepted: .*'tt'"):
        tensorize_(Net(), "ttt")
    with pytest.raises(ValueError, match="config has the key 'formt'; did you mean 'format'"):
        tensorize_(Net(), {"formt": "tr"})
    with pytest.raises(ValueError, match="stem is on the meta device and has no kernel to fit"):
        tensorize_(Net().to("meta"))
    again = Net()
    tensorize_(again, TensorizeConfig(decompose=False))
    with pytest.raises(ValueError, match=r"model has no layer to swap \(stem: a tensor layer already"):
        tensorize_(again, TensorizeConfig(decompose=False, include=["stem"]))


def test_a_compiled_model_is_compiled_anew():
    model, x = Net(), image()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    report = tensorize_(compiled, TensorizeConfig("cp", rank=2, decompose=False, exclude=["stem"]), example_input=x)
    assert "body.a" in report.swapped
    torch.testing.assert_close(compiled(x), model(x))
    assert not isinstance(model.stem, TensorLayer)


def test_data_parallel_prefixes_and_distributed_models():
    model = nn.DataParallel(Net())
    report = tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False, include=["stem"]))
    assert report.swapped == ("stem",)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("named", "change_back"), [(False, densify_), (True, unfold_)])
def test_an_optimizer_made_before_is_detected_and_remapped(kind, named, change_back):
    torch.manual_seed(0)
    model, x = Net(), image()
    own = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    entries = list(model.named_parameters()) if named else list(model.parameters())
    optimizer = kind([{"params": entries[:4], "lr": 0.02}, {"params": entries[4:]}], lr=0.01, **own)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(x).square().sum().backward()
    optimizer.step()
    kept = {id(p): copy.deepcopy(optimizer.state[p]) for p in (model.stem.bias, model.tied.weight)}
    with pytest.warns(UserWarning, match=r"was made before the swap.*remap_optimizer_"):
        report = tensorize_(model, TensorizeConfig("tucker", rank=2, decompose=False))
    assert remap_optimizer_(optimizer, report) == len(report.swapped)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, model.parameters())}
    assert any(p is model.stem.cores[0] for p in optimizer.param_groups[0]["params"])
    if named:
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        parameters = dict(model.named_parameters())
        assert all(parameters[name] is p for name, p in zip(names, held, strict=True))
    for parameter in (model.stem.bias, model.tied.weight):
        for key, value in kept[id(parameter)].items():
            assert optimizer.state[parameter][key] is value or torch.equal(optimizer.state[parameter][key], value)
    assert all(core not in optimizer.state for core in model.stem.cores)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="optimizer holds none"):
        remap_optimizer_(optimizer, report)
    with pytest.warns(UserWarning, match="was made before the swap"):
        back = change_back(model)
    remap_optimizer_(optimizer, back)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, held)} == {*map(id, model.parameters())}


def test_a_remapped_optimizer_has_the_model_s_order():
    """So that its state, saved, can be loaded by an optimizer of the model as it is."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="was made before the swap"):
        report = tensorize_(model, TensorizeConfig("tucker", rank=2, decompose=False))
    remap_optimizer_(optimizer, report)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_a_warning_that_is_an_error_changes_nothing():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    before, modules = state(model), [*model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="SGD was made before the swap"):
            tensorize_(model, TensorizeConfig("tr", rank=2, decompose=False))
    assert_untouched(model, before, modules)
    with pytest.raises(ValueError, match="optimizer is LBFGS"):
        remap_optimizer_(torch.optim.LBFGS(model.parameters()), tensorize_(Net(), TensorizeConfig(decompose=False)))
    del optimizer


@dataclass
class Box:
    layer: object


class Slots:
    __slots__ = ("layer",)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def slots(layer):
    box = Slots()
    box.layer = layer
    return box


def cached(layer):
    @functools.cache
    def pick():
        return layer

    pick()
    return pick


def chain(layer):
    for _ in range(3000):  # beyond Python's limit of recursion
        layer = [layer]
    return layer


def weight(layer):
    return next(p for name, p in layer.named_parameters() if name != "bias")


ATTRIBUTES = {
    "list": lambda layer: [layer],
    "nested list": lambda layer: [[], [[layer]]],
    "dictionary of lists": lambda layer: {"x": [layer]},
    "key": lambda layer: {layer: 1},
    "deque": lambda layer: deque([layer]),
    "set": lambda layer: {layer},
    "frozenset in a dictionary": lambda layer: {3: frozenset([layer])},
    "tuples": lambda layer: ((), (1, (layer,))),
    "named tuple": lambda layer: namedtuple("Pair", "x y")(1, layer),
    "mapping proxy": lambda layer: types.MappingProxyType({"x": layer}),
    "partial": functools.partial,
    "argument of a partial": lambda layer: functools.partial(print, x=[layer]),
    "bound method": lambda layer: layer.forward,
    "closure": lambda layer: lambda x: layer(2 * x),
    "default": lambda layer: lambda x, layer=layer: layer(x),
    "cache": cached,
    "generator": lambda layer: (each for each in [layer]),
    "dataclass": lambda layer: [Box({"x": layer})],
    "slots": slots,
    "wrapper that is no child": lambda layer: [Wrapper(layer)],
    "weak reference": lambda layer: [weakref.ref(layer)],
    "weak proxy": lambda layer: [weakref.proxy(layer)],
    "weak dictionary": lambda layer: weakref.WeakValueDictionary({"x": layer}),
    "long chain": chain,
    "weights": lambda layer: [weight(layer)],
    "weight by name": lambda layer: {"w": [weight(layer)]},
    "view of a weight": lambda layer: [weight(layer).detach().transpose(0, -1)[1:]],
}


def holders():
    for name, make in ATTRIBUTES.items():
        yield pytest.param(lambda model, make=make: setattr(model, "kept", make(model.a)), id=name)

    def on_the_layer(model):
        model.a.kept = model.a.forward

    def on_another_layer(model):
        object.__setattr__(model.b, "kept", model.a)

    def hook(model):
        layer = model.a
        model.b.register_forward_hook(lambda _, arguments, output: output + layer(*arguments))

    def on_the_class(model):
        model.__class__ = type("Pair", (Pair,), {"kept": [model.a]})

    def on_a_base(model):
        model.__class__ = type("Pair", (type("Base", (Pair,), {"kept": [model.a]}),), {})

    def compiled(model):
        model.a.compile(backend="eager")

    for change in (on_the_layer, on_another_layer, hook, on_the_class, on_a_base, compiled):
        yield pytest.param(change, id=change.__name__)


class Pair(nn.Module):
    def __init__(self, make=nn.Linear, **own):
        super().__init__()
        self.a, self.b = make(16, 16, **own), make(16, 16, **own)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def ours():
    return Pair(tnlayers.CPLinear, rank=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair") / "pair.safetensors"
    save_tensorized(ours(), path)
    return path


@pytest.mark.parametrize("hold", [*holders()])
def test_what_is_held_outside_of_the_modules_is_refused_by_name(hold, saved):
    """In whatever way: the old layer would stay there, and the model's outputs be others than its layers say."""
    model = Pair()
    hold(model)
    before, layer = state(model), model.a
    report = tensorize_(model, TensorizeConfig(rank=2, decompose=False))
    assert report.swapped == ("b",)
    assert model.a is layer
    held = "its weight|memory of its weight|it"
    assert re.search(
        rf"refused: (Pair|Linear)\..* holds ({held}) too, outside of|compiled by itself", report["a"].reason
    )
    for back in (densify_, unfold_):
        model = ours()
        hold(model)
        before, modules = state(model), [*model.modules()]
        held = r"its cores\.0|memory of its cores\.0|it"
        with pytest.raises(ValueError, match=rf"a cannot be replaced: .* holds ({held}) too, outside of the modules"):
            back(model)
        assert_untouched(model, before, modules)
        assert back(model, include=["b"]).swapped == ("b",)
    model = Pair()
    hold(model)
    before, modules = state(model), [*model.modules()]
    with pytest.raises(ValueError, match=r"layer 'a': .* holds .* too, outside of the modules|compiled|hooks"):
        load_tensorized(lambda: model, saved)
    assert_untouched(model, before, modules)


def test_the_place_is_named():
    model = Pair()
    model.stages = [[], {"x": (1, Box(model.a))}]
    model.b.kept = {("no", "name"): functools.partial(model.b)}
    with pytest.raises(ValueError, match="no layer to swap") as caught:
        tensorize_(model, TensorizeConfig(decompose=False))
    assert "a: refused: Pair.stages[1]['x'][1].layer holds it too, outside of the modules" in str(caught.value)
    assert "b: refused: Linear.kept[...] holds it too, outside of the modules" in str(caught.value)


def test_what_holds_no_layer_is_no_matter():
    model = Pair()
    model.names, model.copies = ["a"], [copy.deepcopy(model.a), model.a.weight.detach().clone()]
    model.itself, model.twice = [model], model.a
    model.handle = model.a.register_forward_hook(lambda *_: None)
    model.biases = [model.a.bias]
    model.kinds, model.module = {nn.Linear: torch}, nn
    optimizer = model.optimizer = torch.optim.SGD(model.parameters(), lr=1)
    model.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for change in (lambda: tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False)), lambda: unfold_(model)):
        with pytest.warns(UserWarning, match="SGD was made before the swap"):
            report = change()
        assert report.swapped == ("a", "b")
        assert model.twice is model.a
        assert remap_optimizer_(optimizer, report)
    assert model.biases[0] is model.a[-1].bias


class Evasive(Pair):
    """Answers whatever it is asked for."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


def test_a_model_that_has_every_attribute():
    model, x = Evasive(), torch.randn(2, 16)
    assert tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False)).swapped == ("a", "b")
    expected = model(x)
    assert unfold_(model, example_input=x).swapped == ("a", "b")
    torch.testing.assert_close(model(x), expected)


def test_an_optimizer_that_holds_a_bias_alone_is_told_when_it_leaves():
    """Before a channel shuffle at the end, the bias is another one."""
    model = nn.Sequential(tnlayers.TTConv2d(64, 64, 3, padding=1, rank=2))
    optimizer, bias = torch.optim.SGD([model[0].bias], lr=1), model[0].bias
    with pytest.warns(UserWarning, match="SGD was made before the swap"):
        report = unfold_(model)
    assert not any(parameter is bias for parameter in model.parameters())
    assert remap_optimizer_(optimizer, report) == 1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for name, p in model.named_parameters() if name.endswith("bias")
    ]


def test_parametrized_layers_are_made_plain():
    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    model, x = ours(), torch.randn(2, 16)
    parametrize.register_parametrization(model.a, "bias", Double())
    parametrize.register_parametrization(model.b.cores, "0", Double())
    expected = model(x).detach()
    densify_(model)
    torch.testing.assert_close(model(x).detach(), expected)


def test_parts_of_a_layer_that_are_children_elsewhere():
    model = ours()
    model.mine = model.a.cores
    before, modules = state(model), [*model.modules()]
    with pytest.raises(ValueError, match=r"a cannot be replaced: Pair.mine holds a part of it too"):
        densify_(model)
    assert_untouched(model, before, modules)


def tied(model):
    model.b.weight = model.a.weight


def transposed(model):
    model.b.weight.data = model.a.weight.data.t()


def overlapping(model):
    base = torch.randn(24, 16)
    model.a.weight.data, model.b.weight.data = base[:16], base[8:]


def buffered(model):
    model.register_buffer("copy", model.a.weight.detach().view(-1)[3:4], persistent=False)
    model.register_parameter("again", nn.Parameter(model.b.weight.detach()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tie", [tied, transposed, overlapping, buffered])
def test_what_shares_memory_is_tied(tie, device):
    with torch.device(device):
        model = Pair()
        tie(model)
        model.more = nn.Linear(16, 16)
    report = tensorize_(model, TensorizeConfig(rank=2, decompose=False))
    assert report.swapped == ("more",)
    others = ("copy", "again") if tie is buffered else ("b.weight", "a.weight")
    assert [report[name].reason for name in "ab"] == [
        f"refused: another module has the same weight: {other}" for other in others
    ]


def test_side_by_side_in_one_storage_is_not_tied():
    model, base = Pair(), torch.randn(16, 64)
    model.a.weight.data, model.b.weight.data = base[:, :32:2], base[:, 1:32:2]
    model.a.bias.data, model.b.bias.data = base[0, 32:48], base[0, 48:]
    assert tensorize_(model, TensorizeConfig(rank=2, decompose=False)).swapped == ("a", "b")


def test_tensors_without_an_address_or_with_few_entries():
    with FakeTensorMode():
        fake = [torch.empty(3, 4), torch.empty(3, 4)]
    one = torch.zeros(1).expand(5)
    sparse = torch.eye(3).to_sparse()
    odd = [*fake, fake[0].t(), one, one[2:], sparse, sparse, nn.LazyLinear(3).weight, torch.zeros(0), torch.zeros(0)]
    assert sharing(odd) == [(0, 2), (3, 4), (5, 6)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sharing_is_that_of_the_bytes(data):
    """Against all bytes of strided tensors of several dtypes in one storage."""
    base, tensors = torch.zeros(800, dtype=torch.uint8), []
    for _ in range(3):
        flat = base.view(data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float32])))
        axes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 1, 2, 3, 5, 16, 20])), max_size=3))
        start = data.draw(st.integers(0, 19))
        tensors.append(flat.as_strided([n for n, _ in axes], [step for _, step in axes], start))
    taken = []
    for tensor in tensors:
        first = tensor.storage_offset() * tensor.element_size()
        steps = [step * tensor.element_size() for step in tensor.stride()]
        entries = base.new_zeros(800).as_strided((*tensor.shape, tensor.element_size()), (*steps, 1), first)
        taken.append(entries.fill_(1).untyped_storage().tolist())
    expected = [(a, b) for a, b in itertools.combinations(range(3), 2) if any(map(and_, taken[a], taken[b]))]
    assert sharing(tensors) == expected


def test_many_parts_of_one_storage_are_told_apart_without_its_memory():
    with FakeTensorMode():  # which would refuse to tell any values
        packed = torch.empty(512, 48 * 512)
        assert sharing([packed[:, k * 512 : (k + 1) * 512] for k in range(48)]) == []


def test_sharded_weights_are_left(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Pair()
        model.a.weight = nn.Parameter(distribute_tensor(model.a.weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
        model.kept = [model.b.weight.detach()]
        model.c = nn.Linear(16, 16)
        report = tensorize_(model, TensorizeConfig(rank=2, decompose=False))
    finally:
        torch.distributed.destroy_process_group()
    assert report.swapped == ("c",)
    assert report["a"].reason == "refused: its weight is sharded"
    assert report["b"].reason.startswith("refused: Pair.kept[0] holds memory of its weight too")


@pytest.mark.parametrize("back", [densify_, unfold_])
def test_the_report_tells_which_cores_are_no_longer_tied(back):
    model, x = ours(), torch.randn(3, 16)
    model.b.cores[0].data = model.a.cores[1].data
    expected = model(x).detach()
    report = back(model)
    assert report["a"].reason.endswith(", no longer tied to b.cores.0")
    assert report["b"].reason.endswith(", no longer tied to a.cores.1")
    torch.testing.assert_close(model(x).detach(), expected)


class Reader(nn.Module):
    """A model that does something with a layer, beside calling it."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read = tnlayers.TuckerConv2d(16, 16, 3, stride=2, rank=2), read
        self.conv.note = 1

    def forward(self, x):
        return self.conv(x), self.read(self.conv)


READ = {
    "dtype": (lambda conv: torch.ones(1, dtype=conv.weight.dtype), None),
    "device": (lambda conv: conv.weight.device.type == "cpu" and isinstance(conv.weight, torch.Tensor), None),
    "floating": (lambda conv: conv.weight.dtype.is_floating_point, None),
    "nothing": (lambda conv: conv.training + conv.note + len([*conv.parameters()][:1]) + hasattr(conv, "lora"), None),
    "sum": (lambda conv: conv.weight.sum(), "weight"),
    "shape": (lambda conv: torch.ones(1) * conv.weight.shape[0], "weight"),
    "data": (lambda conv: conv.weight.data.norm(), "weight"),
    "function": (lambda conv: nn.functional.conv2d(torch.ones(1, 16, 3, 3), conv.weight, conv.bias), "bias, weight"),
    "stride": (lambda conv: torch.ones(conv.stride), "stride"),
    "bias": (lambda conv: torch.ones(1) * (conv.bias is not None), "bias"),
}


@pytest.mark.parametrize(("read", "names"), READ.values(), ids=READ)
def test_an_example_tells_what_a_model_reads_of_its_layers(read, names):
    torch.manual_seed(0)
    model, x, kind = Reader(read).eval(), torch.randn(2, 16, 7, 7), tnlayers.TuckerConv2d
    before, hooked = model(x), copy.deepcopy(model)
    hooked.read = lambda conv: None
    hooked.conv.register_forward_hook(lambda conv, *_: read(conv) * 0)
    for one in (model, hooked):
        with pytest.raises(ValueError, match="input has shape"):
            unfold_(one, example_input=x.flatten(1))
        assert type(one.conv) is kind
        report = unfold_(one, example_input=x)
        assert report["conv"].reason == ("unfolded" if names is None else f"plain again: the model reads its {names}")
        assert type(one.conv) is (nn.Sequential if names is None else nn.Conv2d)
    torch.testing.assert_close(model(x), before)


def test_what_no_plain_layer_has_is_named():
    model = Reader(lambda conv: sum(core.sum() for core in conv.cores) * conv.keep_ratio)
    before, modules = state(model), [*model.modules()]
    with pytest.raises(ValueError, match="conv: the model reads its cores, keep_ratio, which no Conv2d has"):
        unfold_(model, example_input=torch.randn(1, 16, 7, 7))
    assert_untouched(model, before, modules)


def test_without_an_example_a_weight_that_is_computed_with_shows():
    model, x = Reader(lambda conv: conv.weight.sum()), torch.randn(1, 16, 7, 7)
    unfold_(model)
    assert model(x)[1].isnan()


class Later(nn.Module):
    """Layers without shapes, and one that is not there, before the first forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.last = nn.LazyConv2d(16, 3), nn.LazyLinear(16), None

    def forward(self, x):
        x = self.head(self.conv(x).mean((2, 3)))
        if self.last is None:
            self.last = nn.Linear(x.shape[1], 4)
        return self.last(x)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("way", ["example_input", "calibration"])
def test_lazy_layers_are_looked_at_when_they_have_shapes(way):
    x, model = torch.randn(2, 8, 6, 6), Later()
    own = {"example_input": x} if way == "example_input" else {"calibration": [x]}
    report = tensorize_(model, TensorizeConfig("tucker", rank=2), **own)
    assert report.swapped == ("conv", "head", "last") if way == "example_input" else ("conv", "head")
    if way == "example_input":
        assert report["conv"].flops[0] == 2 * 2 * 16 * 8 * 9 * 16
    model = Later()
    with pytest.raises(ValueError, match=r"no layer to swap \(conv: refused: it has no shape before the first forward"):
        tensorize_(model, TensorizeConfig("tucker", rank=2))


@pytest.mark.parametrize("config", ["cp", {"format": "cp"}])
def test_a_configuration_may_be_a_name_or_a_mapping(config):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    tensorize_(model, config)
    assert type(model[0]) is tnlayers.CPConv2d
    assert model._tensorize_config == TensorizeConfig("cp")


ALONE = [nn.Linear(16, 16), nn.Conv2d(8, 8, 3, stride=2), nn.ConvTranspose1d(8, 8, 3)]


@pytest.mark.parametrize("layer", ALONE, ids=repr)
@pytest.mark.parametrize(
    "config",
    [
        None,
        "cp",
        TensorizeConfig("tt", rank=3, options={"layout": "chain"}, decompose=False, exclude=["x"]),
        TensorizeConfig("tucker", energy=0.5),
    ],
)
def test_what_to_write_for_a_layer_alone_does_what_is_asked(layer, config):
    if isinstance(layer, nn.Linear) and isinstance(config, TensorizeConfig) and config.options:
        config = TensorizeConfig("tt", rank=3, decompose=False)

    def written(change):
        with pytest.raises(
            ValueError, match=r"model is itself a \w+, which cannot be replaced in place; write"
        ) as caught:
            change()
        return eval(str(caught.value).split("`")[1].removeprefix("layer = "), {"layer": layer, "tnlayers": tnlayers})

    for model in (layer, torch.compile(layer, backend="eager")):
        made = written(lambda model=model: tensorize_(model, config))
    form = config.format if isinstance(config, TensorizeConfig) else config or "tr"
    assert isinstance(made, TensorLayer)
    assert made.format.name == form
    if getattr(config, "rank", None) == 3:
        assert set(made.rank.values()) == {3}
    dense, layer = layer, made
    assert type(written(lambda: densify_(layer))) is type(dense)
    assert not isinstance(written(lambda: unfold_(layer)), TensorLayer)
    with pytest.raises(ValueError, match=r"model is itself a .*, a tensor layer already"):
        tensorize_(layer)


def test_layers_compiled_by_themselves_and_names_of_ours_are_refused():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    model[2].rank = 3
    report = tensorize_(model, TensorizeConfig(decompose=False))
    assert [layer.reason.partition(";")[0] for layer in report.layers] == [
        "refused: it is compiled by itself",
        "refused: it is compiled by itself",
        "refused: its attributes rank are a tensor layer's own",
        "drawn",
    ]


def test_a_kernel_that_is_not_finite_is_named():
    for own in ({"rank": 2}, {"energy": 0.5}, {"budget": {"params": 0.5}}):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        nn.init.constant_(model[1].weight, float("nan"))
        before, modules = {name: (id(p), p.detach().nan_to_num()) for name, p in model.named_parameters()}, [*model]
        with pytest.raises(ValueError, match="1: weight holds NaN or infinity"):
            tensorize_(model, TensorizeConfig("tucker", **own))
        assert [*model] == modules
        assert [id(p) for p in model.parameters()] == [identity for identity, _ in before.values()]


def test_one_dense_core_is_no_network():
    report = tensorize_(nn.Sequential(nn.Linear(13, 17), nn.Linear(16, 16)), TensorizeConfig("tt", rank=0.5))
    assert report["0"].reason == "refused: its network would be one dense core"
    linear = nn.Linear(13, 17)
    assert torch.equal(tnlayers.TTLinear.from_linear(linear).weight, linear.weight)


@pytest.mark.parametrize("calibration", [torch.zeros(1), "x", {"a": 1}, 3])
def test_what_is_no_list_of_batches_is_refused(calibration):
    with pytest.raises(TypeError, match=r"calibration is of type .* a list of inputs.*\[batch\]"):
        tensorize_(Net(), TensorizeConfig(), calibration=calibration)
    with pytest.raises(ValueError, match="calibration is empty"):
        tensorize_(Net(), TensorizeConfig(), calibration=iter([]))


def test_an_optimizer_of_other_parameters_is_no_matter():
    model, other = Net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=1)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tensorize_(model, TensorizeConfig("tr", rank=2, decompose=False))
    with pytest.raises(ValueError, match="optimizer holds none"):
        remap_optimizer_(optimizer, report)


def test_running_the_example_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 8, 3).eval())
    state_before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    tensorize_(model, TensorizeConfig("cp"), example_input=(torch.randn(2, 3, 9, 9, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(model[1].running_mean, state_before["1.running_mean"])
    assert [module.training for module in model] == [True, True, True, False]


def test_calibration_lowers_the_error_of_outputs():
    """Fits weighted by what a layer gets are better where it gets it, and worse elsewhere."""
    torch.manual_seed(0)
    scale = torch.logspace(0, -3, 16).reshape(1, -1, 1, 1)
    x = torch.randn(64, 16, 8, 8) * scale
    dense = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False))
    found = []
    for calibration in (None, [x[:32], x[32:]]):
        model = copy.deepcopy(dense)
        report = tensorize_(model, TensorizeConfig("tucker", rank=4), calibration=calibration)
        found.append((float((model(x) - dense(x)).detach().norm()), report["0"].error))
    assert found[1][0] < found[0][0]
    assert found[1][1] > found[0][1]
