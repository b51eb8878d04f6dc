"""Real runs of the tools that users of PyTorch use, on our layers."""

from itertools import islice

import pytest
import torch
from torch import nn

import tnlayers
from benchmarks.measure.tools import KINDS, TOOLS, layers

SLOW = ("compile, inductor, batch open", "compile, inductor, batch, height, width open")
"""Each layer takes many seconds; slow tests have them. Tracing with open sizes is not slow, nor inductor without."""


def some() -> dict[str, tnlayers.TensorLayer]:
    """A layer of every format, the kinds in turn."""
    made = {}
    for k, name in enumerate(tnlayers.FORMATS):
        made |= layers([name], [KINDS[k % len(KINDS)]])
    return made


TRACED = ("compile, aot_eager, batch, height, width open", "ONNX, onnxruntime")
"""A second each: a layer of each kind has them. torch.export and test_compiles_in_one_graph trace every format."""


def check(name: str, chosen: dict[str, tnlayers.TensorLayer]) -> None:
    assert TOOLS[name](chosen) == dict.fromkeys(chosen, "")


@pytest.mark.parametrize("name", [name for name in TOOLS if name not in SLOW])
def test_tool(name):
    made = some()
    check(name, dict(islice(made.items(), len(KINDS))) if name in TRACED else made)


@pytest.mark.filterwarnings("ignore")  # of inductor's first import
def test_inductor():
    """Values and gradients of a compiled layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = tnlayers.TRConv2d(8, 12, 3, padding=1, rank=2, dtype=torch.float64)
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(core.grad for core in layer.cores)])
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_tool_on_every_layer(name):
    check(name, layers())


class Plain(nn.Module):
    """A matrix product over the channels before a convolution, without anything of ours."""

    def __init__(self):
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.randn(2, 8)), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.conv(torch.matmul(x.movedim(1, -1), self.weight.mT).movedim(-1, 1))


@pytest.mark.filterwarnings("ignore")  # of inductor's first import
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="seen with torch 2.13; no other was looked at")
def test_what_inductor_cannot_compile():
    """Why a plan with open sizes reconstructs. If this fails, torch can: take ``whole`` out of ``prepare``."""
    torch._dynamo.reset()
    run = torch.compile(Plain(), fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match="cannot determine truth value of Relational"):
        run(torch.randn(2, 8, 9, 10))


@pytest.mark.parametrize("strategy", ["auto", "factorized"])
def test_the_plan_of_a_compiler_that_leaves_sizes_open(strategy):
    """It reconstructs in training, unless the layer is told otherwise; not with the batch alone open."""
    for sizes, order in ((False, "0 > 1 > 2"), (True, "0*1*2" if strategy == "auto" else "0 > 1 > 2")):
        torch._dynamo.reset()
        layer = tnlayers.TuckerConv2d(64, 64, 3, rank=8, padding=1, strategy=strategy)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True if sizes else None)
        x = torch.randn(4, 64, 12, 13)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-4)
        plans = [value for name, value in vars(layer._executor).items() if name.startswith("_compiled_train")]
        assert [plan.order for plan in plans] == [order]


@pytest.mark.parametrize("strict", [True, False])
def test_the_plan_of_an_exporter_that_leaves_sizes_open(strict):
    """It need not reconstruct, though gradients are on: what inductor cannot train, an exporter can."""
    torch._dynamo.reset()
    layer = tnlayers.TuckerConv2d(64, 64, 3, rank=8, padding=1)
    x = torch.randn(4, 64, 12, 13)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict).module()
    plans = [value for name, value in vars(layer._executor).items() if name.startswith("_compiled_train")]
    assert [plan.order for plan in plans] == ["0 > 1 > 2"]
    y = torch.randn(3, 64, 9, 10)
    torch.testing.assert_close(exported(y), layer(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [tnlayers.CPConvTranspose2d, tnlayers.TTConvTranspose2d])
def test_output_size_under_a_compiler_that_leaves_sizes_open(layer):
    torch._dynamo.reset()
    made = layer(8, 12, 3, stride=2, padding=1, rank=2)
    run = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, width in ((2, 5, 6), (3, 7, 8)):
        x = torch.randn(batch, 8, height, width)
        for more in (0, 1):
            size = [2 * length - 1 + more for length in (height, width)]
            found, expected = run(x, output_size=size), made(x, output_size=size)
            assert list(found.shape[2:]) == size
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
