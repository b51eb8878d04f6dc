"""Real runs of the tools that users of PyTorch use, on our layers."""

import pytest
import torch
from torch import nn

import tnlayers
from tools import KINDS, NO_ORDER, TOOLS, layers

INDUCTOR = {"compile, inductor, batch open": 3, "compile, inductor, batch, height, width open": 2}
"""How many layers where each takes many seconds."""


UNORDERED = {f"{name}{kind}" for name in ("CP", "Einsum", "TR", "Tucker") for kind in KINDS[:2]} | {"TTConv2d"}
"""Layers whose plan has a matrix product before a convolution, which inductor cannot compile with open sizes."""


def some(count: int) -> dict[str, tnlayers.TensorLayer]:
    """A layer of every format, the kinds in turn."""
    made = {}
    for k, name in enumerate(tnlayers.FORMATS):
        made |= layers([name], [KINDS[k % len(KINDS)]])
    return dict(list(made.items())[:count])


def check(name: str, chosen: dict[str, tnlayers.TensorLayer]) -> None:
    found = TOOLS[name](chosen)
    if name == "compile, inductor, batch, height, width open":
        found = {key: "" if key in UNORDERED and NO_ORDER in error else error for key, error in found.items()}
    assert found == dict.fromkeys(chosen, "")


@pytest.mark.parametrize("name", TOOLS)
def test_tool(name):
    check(name, some(INDUCTOR.get(name, len(tnlayers.FORMATS))))


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
def test_what_inductor_cannot_compile_is_not_ours():
    """If this fails, torch has learnt it: take the exception out of this file and the README."""
    torch._dynamo.reset()
    run = torch.compile(Plain(), fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match=NO_ORDER):
        run(torch.randn(2, 8, 9, 10))
