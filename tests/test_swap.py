"""Swapping a model's layers, and back: what is kept, what is refused, and what the report says."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tnlayers
from cases import FAMILIES
from tnlayers import TensorizeConfig, TensorLayer, densify_, remap_optimizer_, tensorize_, unfold_

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
    with pytest.raises(ValueError, match="model is itself a Conv2d"):
        tensorize_(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="model has no tensor layer"):
        densify_(Net())
    with pytest.raises(TypeError, match="model is int"):
        tensorize_(3)
    with pytest.raises(TypeError, match="config is"):
        tensorize_(Net(), {"format": "tr"})
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


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.order = [self.a]


def test_what_is_held_outside_of_the_modules_is_left():
    report = tensorize_(Listed(), TensorizeConfig(decompose=False))
    assert report["a"].reason == "refused: Listed.order holds it too, outside of the modules"
    assert report.swapped == ("b",)


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
