"""What a forward takes, and its sentence for anything else: the same for every plan, in training and in eval mode."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlayers
from cases import FAMILIES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8]
STRATEGIES = ["reconstruct", "factorized", "auto"]
MODES = list(itertools.product([True, False], [True, False]))
"""Training or not, with gradients or not."""


def linear(family):
    return getattr(tnlayers, family.__name__.replace("Conv2d", "Linear"))


def transposed(family):
    return getattr(tnlayers, family.__name__.replace("Conv2d", "ConvTranspose2d"))


def outcome(module, x):
    """The dtype of an output, or the error."""
    try:
        return module(x).dtype
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("value", [None, [1.0], np.ones((1, 8, 6, 6)), "image", 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_tensor_is_refused(value, strategy):
    for family in FAMILIES:
        for layer in (family(8, 8, 3, rank=2, strategy=strategy), linear(family)(8, 8, rank=2, strategy=strategy)):
            given = "None" if value is None else f"of type {type(value).__name__}"
            with pytest.raises(TypeError, match=f"input is {given}; {type(layer).__name__} takes a torch.Tensor"):
                layer(value)
    with pytest.raises(TypeError, match=r"input is .*; CPConvTranspose2d takes a torch.Tensor"):
        tnlayers.CPConvTranspose2d(8, 8, 3, rank=2)(value, (8, 8))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16]
)
def test_an_input_of_another_dtype_gets_one_sentence(strategy, dtype):
    for family in FAMILIES:
        conv = family(8, 8, 3, rank=2, strategy=strategy)
        for layer, shape in ((conv, (2, 8, 6, 6)), (conv, (8, 6, 6)), (linear(family)(8, 8, rank=2), (2, 8))):
            found = set()
            for training, grad in MODES:
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(
                        RuntimeError, match=rf"input has dtype {dtype}, but the layer's cores have torch.float32"
                    ) as caught,
                ):
                    layer.train(training)(torch.ones(shape, dtype=dtype))
                found.add(str(caught.value))
            (sentence,) = found
            assert "input.to(torch.float32)" in sentence
            assert (f"layer.to({dtype})" in sentence) == dtype.is_floating_point


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cast", [False, True])
def test_dtypes_meet_as_in_torch(strategy, cast):
    """Input, cores and bias: what torch's layer takes, with autocast or without, and what it refuses."""
    for held, extra in itertools.product(DTYPES[:3], DTYPES[:3]):
        conv, dense = tnlayers.CPConv2d(8, 8, 3, rank=2, strategy=strategy), nn.Conv2d(8, 8, 3)
        for layer in (conv.to(held), dense.to(held)):
            layer.bias = nn.Parameter(layer.bias.detach().to(extra))
        for dtype, (training, grad) in itertools.product(DTYPES, MODES):
            x = torch.ones(2, 8, 6, 6).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.set_grad_enabled(grad):
                expected, found = outcome(dense, x), outcome(conv.train(training), x)
            if isinstance(expected, torch.dtype):
                assert found == expected
                if grad:
                    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                        conv(x).sum().backward()
                    assert [p.grad.dtype for p in conv.parameters()] == [p.dtype for p in conv.parameters()]
                    conv.zero_grad()
            else:
                assert "the layer's cores have" in str(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bias_of_another_dtype_gets_one_sentence(strategy):
    for family in FAMILIES:
        for layer in (family(8, 8, 3, rank=2, strategy=strategy), linear(family)(8, 8, rank=2, strategy=strategy)):
            layer.to(torch.bfloat16).bias.data = torch.zeros(8)
            x = torch.ones(2, 8, *(6, 6)[: 2 * hasattr(layer, "ndim")], dtype=torch.bfloat16)
            for training, grad in MODES:
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(
                        RuntimeError, match=r"bias has dtype torch.float32, but .* layer.to\(torch.bfloat16\)"
                    ),
                ):
                    layer.train(training)(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cast", [False, True])
def test_cores_of_several_dtypes_get_one_sentence(strategy, cast):
    for family in FAMILIES:
        layer, x = family(8, 8, 3, rank=2, strategy=strategy), torch.ones(2, 8, 6, 6)
        with torch.no_grad():
            layer.eval()(x)  # the weights that it keeps are those of a plain layer
        layer.cores[-1].data = layer.cores[-1].data.bfloat16()
        for training, grad in MODES:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=cast),
                torch.set_grad_enabled(grad),
                pytest.raises(RuntimeError, match=r"cores have dtypes torch.bfloat16, torch.float32; .*layer.to\("),
            ):
                layer.train(training)(x)
        with pytest.raises(RuntimeError, match=r"cores have dtypes"):
            _ = layer.weight


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nested_tensors_through_linear_layers(layout, strategy):
    parts = [torch.randn(length, 8) for length in (3, 5, 1)]
    for family in FAMILIES:
        layer = linear(family)(8, 6, rank=2, strategy=strategy)
        for training, grad in MODES:
            with torch.set_grad_enabled(grad):
                found = layer.train(training)(torch.nested.nested_tensor(parts, layout=layout))
                for one, part in zip(found.unbind(), parts, strict=True):
                    torch.testing.assert_close(one, layer(part), rtol=1e-4, atol=1e-5)
        layer.zero_grad()
        found = layer(torch.nested.nested_tensor(parts, layout=layout))
        sum(part.square().sum() for part in found.unbind()).backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        layer(torch.cat(parts)).square().sum().backward()
        for one, parameter in zip(gradients, layer.parameters(), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"input has dtype torch.float64"):
            layer(torch.nested.nested_tensor([part.double() for part in parts], layout=layout))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_through_convolutions_get_a_sentence(layout):
    x = torch.nested.nested_tensor([torch.ones(4, 8), torch.ones(5, 8)], layout=layout)
    for family in FAMILIES:
        for layer in (family(8, 8, 3, rank=2), transposed(family)(8, 8, 3, rank=2)):
            with pytest.raises(TypeError, match=rf"input is a nested tensor; {type(layer).__name__} .*unbind"):
                layer(x)
    with pytest.raises(TypeError, match="input is a nested tensor"):
        transposed(FAMILIES[0])(8, 8, 3, rank=2)(x, (8, 8))


@pytest.mark.parametrize("strategy", ["reconstruct"])
def test_an_infinite_input_gives_what_the_dense_kernel_gives(strategy):
    """Where the kernel is built; a factorised plan may give NaN instead, as docs/how-to/coming-from-conv2d.md says."""
    x = torch.randn(2, 8, 6, 6)
    x[0, 3, 2, 2] = torch.inf
    for family in FAMILIES:
        layer = family(8, 8, 3, padding=1, rank=2, strategy=strategy)
        for training, grad in MODES:
            with torch.set_grad_enabled(grad):
                expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
                torch.testing.assert_close(layer.train(training)(x), expected, equal_nan=True)


@pytest.mark.parametrize("strategy", ["auto", "reconstruct", "factorized"])
def test_cores_of_other_shapes_are_refused(strategy):
    """Also where only the order of their axes is another: the entries would be taken for those of another core."""
    layer, x = tnlayers.TRConv2d(8, 8, 3, padding=1, rank=2, strategy=strategy), torch.randn(2, 8, 5, 5)
    cores = [*layer.cores]
    sentence = r"core 0 has shape \(8, 2, 2\); network 'r0 i r1, .*' has \(2, 8, 2\) there"
    for values, told in (
        ([cores[0].permute(1, 0, 2).contiguous(), *cores[1:]], sentence),
        ([*cores, cores[0]], r"there are 4 cores; network 'r0 i r1, .*' has 3"),
    ):
        layer.cores = nn.ParameterList(values)
        for use in (layer, lambda _: layer.weight, tnlayers.unfold):
            with pytest.raises(ValueError, match=told):
                use(x if use is not tnlayers.unfold else layer)
        with torch.no_grad(), pytest.raises(ValueError, match=told):
            layer.eval()(x)
