"""What a plan's own forward and backward must not get in the way of."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tnlayers
from cases import FAMILIES


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strategy", ["auto", "reconstruct", "factorized"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_may_be_changed_in_place(layer, memory_format, strategy, batch):
    torch.manual_seed(0)
    made = layer(16, 16, 3, padding=1, rank=4, strategy=strategy, dtype=torch.float32)
    x = torch.randn(batch, 16, 8, 8).to(memory_format=memory_format)
    torch.relu_(made(x)).square().sum().backward()
    found = [core.grad.clone() for core in made.cores]
    made.zero_grad()
    torch.relu(made(x)).square().sum().backward()
    for gradient, core in zip(found, made.cores, strict=True):
        torch.testing.assert_close(gradient, core.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_stale_weights_after_a_fused_step(optimizer):
    layer = tnlayers.CPConv2d(8, 8, 3, rank=2).eval()
    stepper = optimizer(layer.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        layer(x)
    layer(x).square().sum().backward()
    stepper.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.to_conv()(x), rtol=1e-3, atol=1e-4)


def test_no_stale_weights_after_assigning_data():
    layer = tnlayers.TRConv2d(8, 8, 3, rank=2).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        layer(x)
        values = nn.utils.parameters_to_vector(layer.parameters())
        nn.utils.vector_to_parameters(2 * values, layer.parameters())
        torch.testing.assert_close(layer(x), layer.to_conv()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_pruned_cores(name):
    torch.manual_seed(0)
    layer = tnlayers.CPConv2d(8, 8, 3, padding=1, rank=2)
    prune.random_unstructured(layer.cores, name, amount=0.5)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_over_an_axis_that_is_not_first(grad):
    layer = tnlayers.CPConv2d(8, 8, 3, padding=1, rank=2)
    x = torch.randn(2, 5, 8, 6, 6)
    with torch.set_grad_enabled(grad):
        found = torch.func.vmap(layer, in_dims=1)(x)
        torch.testing.assert_close(found, layer(x.transpose(0, 1).reshape(10, 8, 6, 6)).reshape(5, 2, 8, 6, 6))


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_batched_backward(memory):
    layer = tnlayers.TRConv2d(4, 4, 3, padding=1, rank=2, memory=memory, dtype=torch.float64)
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    one, other = (torch.autograd.functional.jacobian(layer, x, vectorize=flag) for flag in (True, False))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_the_bias_may_change_before_the_backward(memory):
    layer = tnlayers.CPConv2d(8, 8, 3, rank=2, memory=memory)
    y = layer(torch.randn(3, 8, 6, 6))
    with torch.no_grad():
        layer.bias.zero_()
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 3.0 * 4 * 4))


def test_a_core_changed_before_the_backward_raises():
    layer = tnlayers.TRConv2d(8, 8, 3, rank=2)
    y = layer(torch.randn(3, 8, 6, 6))
    with torch.no_grad():
        layer.cores[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autotune_takes_keywords_and_inference_mode():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = tnlayers.CPConv2d(4, 4, 3, rank=2)

        def forward(self, x):
            return self.conv(input=x)

    model = Model()
    with torch.inference_mode():
        chosen = tnlayers.autotune(model, torch.randn(2, 4, 6, 6), candidates=2)
    assert chosen == {"conv": model.conv.strategy}


@pytest.mark.parametrize("shape", [5, None, "8866"])
def test_a_shape_that_is_none(shape):
    with pytest.raises(TypeError, match=r"input_shape is .*; it must be a sequence"):
        tnlayers.CPConv2d(8, 8, 3).flops(shape)


def test_strided_pointwise_convolutions_stay_within_their_memory():
    """Torch 2.13's gradient of such a weight, channels last and few of them, is written beyond its end."""
    code = """if True:
        import torch
        from tnlayers import CPConv2d, TuckerConv2d
        torch.set_num_threads(1)
        wide = torch.channels_last
        for layer, shape, layout, twice, count in (
            (TuckerConv2d(16, 32, 1, 2, rank=(4, 5)), (2, 16, 8, 8), torch.contiguous_format, False, 40),
            (CPConv2d(3, 3, 1, 2, rank=2), (1, 3, 200, 200), wide, False, 5),
            (CPConv2d(3, 3, 1, 2, rank=2, strategy="reconstruct"), (2, 3, 200, 200), wide, True, 5),
            (CPConv2d(3, 3, 1, 2, rank=2, memory="low"), (2, 3, 200, 200), wide, True, 5),
        ):
            for _ in range(count):
                x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
                y = layer(x)
                assert y.is_contiguous(memory_format=layout)
                if twice:
                    y, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                y.square().sum().backward()
                others = [torch.randn(size) for size in torch.randint(1, 3000, (200,)).tolist()]
        for batch in 1, 2:  # some channels of an image with channels last have no layout of their own
            for _ in range(5):
                x = torch.randn(batch, 6, 200, 200).contiguous(memory_format=wide)[:, :3].requires_grad_()
                CPConv2d(3, 3, 1, 2, rank=2)(x).sum().backward()
                others = [torch.randn(size) for size in torch.randint(1, 3000, (200,)).tolist()]"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("training", [True, False])
def test_terms_that_cancel_survive_autocast_where_the_kernel_is_built(training):
    """Two terms a thousand times as large as their sum, as fits may have them: bfloat16 alone keeps nothing of that."""
    layer = tnlayers.CPConv2d(8, 8, 3, rank=2, strategy="reconstruct", bias=False).train(training)
    with torch.no_grad():
        for core in layer.cores:
            core[:, 1] = core[:, 0]
        layer.cores[1][:, 1].neg_()
        layer.cores[0][:, 1] *= 1 + 1e-3 * torch.randn(8)
        x = torch.randn(4, 8, 6, 6)
        wanted = torch.nn.functional.conv2d(x, layer.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        found = layer(x)
    assert (found - wanted).norm() < 4 * torch.finfo(torch.bfloat16).eps * wanted.norm()
    layer.strategy = "factorized"
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        assert (layer(x) - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["TuckerConv2d", "TTConv2d"])
def test_a_strided_convolution_of_one_tap_is_traced(name):
    """torch.jit.trace checks the operations again without gradients."""
    layer = getattr(tnlayers, name)(8, 12, 1, stride=2, rank=2, dtype=torch.float64)
    traced = torch.jit.trace(layer, torch.randn(1, 8, 5, 5, dtype=torch.float64))
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-10, atol=1e-10)
