"""Tracers and counters that trace work on every format, and leave no trace."""

import copy
import itertools
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import tnlayers
from cases import FAMILIES

KINDS = ["Conv2d", "ConvTranspose2d", "Linear"]
# torch says so of its own functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.parametrize("format", [layer.format_type.__name__ for layer in FAMILIES]),
]


def made(format, kind, training):
    torch.manual_seed(0)
    kernel = [] if kind == "Linear" else [3]
    layer = getattr(tnlayers, format + kind)(8, 12, *kernel, rank=2).train(training)
    return layer, torch.randn(2, 8, *(() if kind == "Linear" else (9, 9)))


def assert_no_trace(layer, x):
    """Export with open sizes, and eager forwards, go as if nothing had been."""
    sizes = {0: torch.export.Dim("b", min=2, max=64)}
    if x.ndim > 2:
        sizes |= {axis: torch.export.Dim(name, min=4, max=64) for axis, name in ((2, "h"), (3, "w"))}
    torch.export.export(layer.eval(), (x,), dynamic_shapes=(sizes,), strict=False)
    for keys in layer._executor._plans:
        assert all(type(size) is int for size in keys[0])
    copy.deepcopy(layer)
    assert torch.isfinite(layer(torch.cat([x, x]))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace_with_its_own_check(format, kind, training):
    """With gradients and without, whatever ran before; no warning; the weights in it are the parameters."""
    for grad, warm, frozen in ((True, False, False), (False, True, False), (False, True, not training)):
        layer, x = made(format, kind, training)
        with torch.set_grad_enabled(grad):
            if frozen:
                tnlayers.freeze_(layer)
            if warm:
                layer(x)
            trace = torch.jit.trace(layer, x)
            torch.testing.assert_close(trace(x), layer(x), rtol=1e-4, atol=1e-5)
            more = torch.cat([x, x, x])
            torch.testing.assert_close(trace(more), layer(more), rtol=1e-4, atol=1e-5)
            state = {name: 2 * value for name, value in layer.state_dict().items()}
            trace.load_state_dict(state)
            layer.load_state_dict(state)
            torch.testing.assert_close(trace(x), layer(x), rtol=1e-4, atol=1e-4)
    layer, x = made(format, kind, training)
    torch.jit.trace(layer, x)
    assert_no_trace(layer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_make_fx_with_symbolic_sizes(format, kind, training):
    layer, x = made(format, kind, training)
    parameters = dict(layer.named_parameters())

    def function(x, parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    graph = make_fx(function, tracing_mode="symbolic")(x, parameters)
    torch.testing.assert_close(graph(x, parameters), layer(x), rtol=1e-4, atol=1e-5)
    doubled = {name: 2 * value for name, value in parameters.items()}
    torch.testing.assert_close(graph(x, doubled), function(x, doubled), rtol=1e-4, atol=1e-4)
    assert_no_trace(layer, x)


@pytest.mark.parametrize("training", [True, False])
def test_tensorboard_s_graph(format, training, tmp_path):
    """It traces, as above."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (it takes seconds)

    layer, x = made(format, "Conv2d", training)
    with warnings.catch_warnings(), SummaryWriter(tmp_path) as writer:
        warnings.simplefilter("ignore", DeprecationWarning)  # of protobuf
        writer.add_graph(layer, x)
    assert any(file.stat().st_size > 500 for file in tmp_path.iterdir())
    assert_no_trace(layer, x)


@pytest.mark.parametrize("training", [True, False])
def test_fvcore_counts_the_plan(format, training):
    """It works with gradients and without; what it counts depends on the operations that it knows."""
    from fvcore.nn import FlopCountAnalysis  # noqa: PLC0415

    for kind, grad in itertools.product(("Conv2d", "Linear"), (True, False)):
        layer, x = made(format, kind, training)
        with torch.set_grad_enabled(grad):
            counter = FlopCountAnalysis(layer, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            assert counter.total() >= 0
        assert_no_trace(layer, x)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_s_counter_in_a_frozen_layer(format, kind):
    layer, x = made(format, kind, False)
    with torch.no_grad(), tnlayers.freeze_(layer):
        layer(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == layer.flops(x.shape)
