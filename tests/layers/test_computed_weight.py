"""What is written to ``layer.weight``, which is computed from the cores, is answered by a sentence."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune

import tnlayers
from cases import FAMILIES
from tnlayers.layers.computed_weight import ComputedWeight

LAYERS = [
    layer
    for family in FAMILIES
    for layer in (family, *(getattr(tnlayers, family.__name__.replace("Conv2d", kind)) for kind in
                            ("Linear", "Conv1d", "ConvTranspose2d")))
]  # fmt: skip
"""Of every registered format a linear layer, convolutions and a transposed one."""


def make(layer, training=True, **options):
    arguments = () if issubclass(layer, tnlayers.TensorLinear) else (3,)
    return layer(8, 8, *arguments, rank=2, **options).train(training)


def assign(target, name, value):
    setattr(target, name, value)


def set_item(target, value):
    target[:, :3] = value


def add(target):
    target += 1


class Registry(nn.Module):
    """A module that holds a buffer."""


def held(weight):
    module = Registry()
    module.register_buffer("kernel", weight)
    module.load_state_dict({"kernel": torch.ones_like(weight)})


WRITES = {
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "no_grad copy_": torch.no_grad()(lambda w: w.copy_(torch.ones_like(w))),
    "inference_mode": torch.inference_mode()(lambda w: w.zero_()),
    "[...]": lambda w: set_item(w, torch.zeros(1)),
    "+=": add,
    "data": lambda w: assign(w, "data", torch.ones_like(w)),
    "data.normal_": lambda w: w.data.normal_(0, 0.02),
    "detach().zero_": lambda w: w.detach().zero_(),
    "[0].fill_": lambda w: w[0].fill_(0),
    "view.mul_": lambda w: w.flatten().view(-1).mul_(2),
    "T.mul_": lambda w: w.flatten(1).T.mul_(2),
    "chunk.mul_": lambda w: w.chunk(2)[0].mul_(2),
    "unbind.mul_": lambda w: next(iter(w)).mul_(2),
    "contiguous.mul_": lambda w: w.contiguous().float().cpu().mul_(2),
    "normal_": nn.init.normal_,
    "uniform_": nn.init.uniform_,
    "constant_": lambda w: nn.init.constant_(w, 1.0),
    "ones_": nn.init.ones_,
    "kaiming_normal_": lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
    "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "xavier_normal_": nn.init.xavier_normal_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "orthogonal_": nn.init.orthogonal_,
    "torch.relu_": torch.relu_,
    "inplace=True": lambda w: F.relu(w, inplace=True),
    "out=": lambda w: torch.add(w, 1, out=w),
    "_foreach": lambda w: torch._foreach_mul_([w], 2),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.ones(w.numel()), [w]),
    "a buffer loaded": lambda w: held(w.detach()),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: assign(w, "requires_grad", True),
    "grad": lambda w: assign(w, "grad", torch.ones_like(w)),
    "register_hook": lambda w: w.register_hook(print),
    "register_post_accumulate_grad_hook": lambda w: w.register_post_accumulate_grad_hook(print),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_a_write_raises_a_sentence(way, training):
    for layer in LAYERS:
        made = make(layer, training)
        before = [core.detach().clone() for core in made.cores]
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(
                    RuntimeError, match=r"cannot change a tensor layer: its weight is computed .*layer\.cores"
                ),
            ):
                WRITES[way](made.weight)
        assert all(map(torch.equal, before, made.cores))


@pytest.mark.parametrize("ways", [(*WRITES,)])
def test_a_sentence_tells_what_to_do(ways):
    for way in ways:
        with pytest.raises(RuntimeError) as caught:
            WRITES[way](make(FAMILIES[0]).weight)
        told = {
            "requires_grad": "layer.cores.requires_grad_(False)",
            "grad": "the gradients are those of layer.cores",
            "register_": "on one of layer.cores|the parameters in layer.cores",
        }
        expected = next((text for key, text in told.items() if way.startswith(key)), None)
        if expected is None:
            for name in (
                "layer.set_weight_(W)",
                "layer.reset_parameters()",
                "layer.to_dense()",
                "layer.weight.clone()",
            ):
                assert name in str(caught.value)
        else:
            assert re.search(re.escape(expected).replace(r"\|", "|"), str(caught.value))


def tie(layer):
    layer.weight = nn.Linear(8, 8).weight


def unset(layer):
    del layer.weight


def fuse(layer):
    nn.utils.fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(8).eval())


SETS = {
    "Parameter": lambda layer: assign(layer, "weight", nn.Parameter(torch.ones(8, 8))),
    "Tensor": lambda layer: assign(layer, "weight", torch.ones(8, 8)),
    "Buffer": lambda layer: assign(layer, "weight", nn.Buffer(torch.ones(8, 8))),
    "Module": lambda layer: assign(layer, "weight", nn.Identity()),
    "None": lambda layer: assign(layer, "weight", None),
    "tied": tie,
    "del": unset,
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.ones(8, 8))),
    "register_buffer": lambda layer: layer.register_buffer("weight", torch.ones(8, 8)),
    "add_module": lambda layer: layer.add_module("weight", nn.Identity()),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "prune mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight)),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "_parameters": lambda layer: layer._parameters["weight"],
    "fuse": fuse,
    "functional_call": lambda layer: torch.func.functional_call(layer, {"weight": layer.weight.clone()}, torch.ones(8)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("way", SETS)
@pytest.mark.parametrize("training", [True, False])
def test_an_assignment_or_registration_raises_a_sentence(way, training):
    for layer in LAYERS:
        made = make(layer, training)
        before = {name: value.clone() for name, value in made.state_dict().items()}
        with pytest.raises((AttributeError, KeyError)) as caught:
            SETS[way](made)
        for name in ("layer.set_weight_(W)", "layer.reset_parameters()", "layer.to_dense()"):
            assert name in str(caught.value)
        assert before.keys() == made.state_dict().keys()
        assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
        assert not made._forward_pre_hooks


@pytest.mark.parametrize("parametrization", [
    parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
    lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
])  # fmt: skip
def test_torch_itself_refuses_to_parametrize_it(parametrization):
    for layer in LAYERS:
        with pytest.raises(ValueError, match="does not have a parameter, a buffer, or a parametrized element"):
            parametrization(make(layer))


def test_another_name_in_the_parameters_is_a_plain_key_error():
    layer = make(FAMILIES[0])
    for use in (lambda: layer._parameters["scale"], lambda: layer._parameters.__delitem__("scale")):
        with pytest.raises(KeyError, match=r"^'scale'$"):
            use()
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    del layer.scale
    assert not hasattr(layer, "scale")


def test_the_bias_may_be_assigned():
    x = torch.randn(2, 8, 6, 6)
    for layer in FAMILIES:
        for training in (True, False):
            made = make(layer, training)
            with torch.set_grad_enabled(training):
                made(x)
                made.bias = nn.Parameter(torch.arange(8.0))
                torch.testing.assert_close(made(x), made.to_dense()(x))
                made.bias = None
                torch.testing.assert_close(made(x), made.to_dense()(x))
                made.bias = nn.Parameter(torch.ones(1))
                with pytest.raises(ValueError, match=r"bias has shape \(1,\); it must be \(8,\)"):
                    made(x)


def saved(weight):
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    return torch.load(file)["weight"]


READS = {
    "clone": lambda w: w.clone(),
    "times one": lambda w: 1.0 * w,
    "double": lambda w: w.double().float(),
    "deepcopy": lambda w: copy.deepcopy(w.detach()),
    "copy": lambda w: copy.copy(w.detach()),
    "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),
    "torch.save": lambda w: saved(w.detach()),
    "safetensors": lambda w: load(save({"w": w.detach()}))["w"],
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w.detach()).copy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "copied": lambda w: torch.empty_like(w).copy_(w),
    "as_subclass": lambda w: w.as_subclass(Tensor),
    "Buffer": lambda w: nn.Buffer(w.detach()),
    "stack": lambda w: torch.stack([w, w])[0],
    "checkpoint": lambda w: torch.utils.checkpoint.checkpoint(torch.abs, w, use_reentrant=False) * w.sign(),
}


@pytest.mark.parametrize("way", READS)
def test_what_is_read_is_a_plain_tensor_of_the_same_values(way):
    for layer in LAYERS:
        made = make(layer)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = READS[way](made.weight)
            assert type(found) is Tensor
            assert torch.equal(found, made.weight)
            with torch.no_grad():
                found.zero_()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_parameter_made_of_it_is_one_like_any_other(requires_grad):
    for layer in LAYERS:
        made = make(layer)
        for weight in (made.weight, made.weight.detach(), made.weight[:3]):
            parameter = nn.Parameter(weight, requires_grad)
            assert type(parameter) is nn.Parameter
            assert parameter.is_leaf
            assert parameter.requires_grad == requires_grad
            parameter.data.zero_()
            assert not parameter.any()
            if requires_grad:
                torch.optim.SGD([parameter], lr=0.1).step(lambda p=parameter: (p - 1).square().sum().backward())
                torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.2))
        assert not isinstance(made.weight, nn.Parameter)
        assert not isinstance(made.weight, nn.Buffer)
    other = nn.Linear(8, 8)
    other.weight = nn.Parameter(make(tnlayers.TRLinear).weight)
    assert [name for name, _ in other.named_parameters()] == ["weight", "bias"]


def test_arrays_of_it_are_read_only():
    for layer in LAYERS:
        weight = make(layer).weight.detach()
        for array in (weight.numpy(), np.asarray(weight), weight[0].numpy()):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_its_derivatives_are_the_kernels():
    for layer in LAYERS:
        made = make(layer, dtype=torch.float64)
        found = []
        for weight in (made.weight, made._kernel()):
            first = torch.autograd.grad(weight.pow(3).sum(), [*made.cores], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [*made.cores])
            found.append([*first, *second])
        assert all(map(torch.equal, *found))


def test_a_detached_one_may_require_gradients_and_have_hooks():
    seen = []
    weight = make(tnlayers.TRLinear).weight.detach().requires_grad_()
    weight.register_hook(seen.append)
    torch.autograd.functional.jacobian(lambda w: w.sum(1), weight)
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())
    assert len(seen) == 1


def test_it_is_compared_with_parameters_and_tensors():
    made = make(tnlayers.TRLinear)
    dense = made.to_linear()
    for other in (dense.weight, dense.weight.detach(), made.weight, made.weight.detach()):
        torch.testing.assert_close(made.weight, other)
        torch.testing.assert_close(other, made.weight)
        assert torch.equal(made.weight, other)
        assert torch.equal(other, made.weight)
        assert (other == made.weight).all()
    assert torch.autograd.grad(made.weight, [*made.cores], dense.weight)[0].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_is_asked_of_it_is_answered():
    weight = make(tnlayers.TRLinear).weight
    assert weight.grad is None
    assert weight.requires_grad
    assert weight.shape == (8, 8)
    weight.retain_grad()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(8, 8))


def test_functions_of_torch_func_take_it():
    weight = make(tnlayers.TRLinear).weight
    torch.testing.assert_close(torch.func.grad(lambda w: w.square().sum())(weight), 2 * weight)
    torch.testing.assert_close(torch.vmap(torch.sum)(weight), weight.sum(1))
    torch.testing.assert_close(torch.vmap(lambda x: weight @ x)(torch.eye(8)), weight.mT)


# Where a compiler, an exporter or torch.func looks on, the weight is a plain tensor.


def test_compiled_code_gets_a_plain_tensor():
    made, x, types = make(tnlayers.CPConv2d), torch.randn(2, 8, 5, 5), []

    def function(x):
        types.append(type(made.weight))
        return made(x) + made.weight.sum()

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x) + made.weight.sum(), rtol=1e-4, atol=1e-4)
    assert types == [Tensor]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_tracers_and_transforms_get_a_plain_tensor():
    made, x, types = make(tnlayers.TRLinear), torch.randn(2, 8), []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = made

        def forward(self, x):
            types.append(type(self.layer.weight))
            return x @ self.layer.weight.mT

    expected = x @ made.weight.mT
    exported = torch.export.export(Model(), (x,)).module()(x)
    traced = make_fx(Model())(x)(x)
    mapped = torch.vmap(Model())(x)
    _, forward = torch.func.jvp(Model(), (x,), (x,))
    scripted = torch.jit.trace(Model(), x, check_trace=False)(x)
    for found in (exported, traced, mapped, forward, scripted):
        torch.testing.assert_close(found, expected)
    assert ComputedWeight not in types
    assert len(types) >= 5
    assert type(made.weight) is ComputedWeight


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # that torch itself asks for
def test_a_compiled_function_takes_a_copy():
    weight = make(tnlayers.TRLinear).weight
    compiled = torch.compile(lambda w: w.square().sum(), backend="aot_eager")
    with pytest.raises(Exception, match=r"computed outside of a compiled function .*layer\.weight\.clone\(\)"):
        compiled(weight)
    torch.testing.assert_close(compiled(weight.clone()), weight.square().sum())


def test_it_stays_on_the_meta_device():
    for layer in LAYERS:
        weight = make(layer, device="meta").weight
        assert weight.is_meta
        with pytest.raises(RuntimeError, match="cannot change a tensor layer"):
            weight[0].zero_()


def test_it_shows_what_it_is():
    assert repr(make(FAMILIES[0]).weight).startswith("ComputedWeight(")
