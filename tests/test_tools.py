"""Real runs of the tools that users of PyTorch use, on our layers."""

import pytest
import torch
from torch import nn

import tnlayers
from tools import KINDS, NOT_OURS, TOOLS, layers

INDUCTOR = [name for name in TOOLS if "inductor," in name]  # several seconds a layer


def some(count: int) -> dict[str, tnlayers.TensorLayer]:
    """A layer of every format, the kinds in turn."""
    made = {}
    for k, name in enumerate(tnlayers.FORMATS):
        made |= layers([name], [KINDS[k % len(KINDS)]])
    return dict(list(made.items())[:count])


def check(name: str, chosen: dict[str, tnlayers.TensorLayer]) -> None:
    found = TOOLS[name](chosen)
    if name == "compile, inductor, batch, height, width open":
        found = {key: "" if any(words in error for words in NOT_OURS) else error for key, error in found.items()}
    assert found == dict.fromkeys(chosen, "")


@pytest.mark.parametrize("name", TOOLS)
def test_tool(name):
    check(name, some(3 if name in INDUCTOR else len(tnlayers.FORMATS)))


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


@pytest.mark.parametrize(
    ("plain", "words"), [(Plain(), NOT_OURS[0]), (nn.ConvTranspose2d(8, 12, 3, padding=1), NOT_OURS[1])], ids=NOT_OURS
)
@pytest.mark.filterwarnings("ignore")  # of inductor's first import
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="seen with torch 2.13; no other was looked at")
def test_what_inductor_cannot_compile_is_not_ours(plain, words):
    """If this fails, torch has learnt it: take the exception out of this file and the README."""
    torch._dynamo.reset()
    run = torch.compile(plain, fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match=words):  # noqa: PT012  (either of the calls may)
        for batch, height, width in ((2, 9, 10), (5, 12, 13)):
            y = run(torch.randn(batch, 8, height, width))
            torch.autograd.grad(y.square().sum(), list(plain.parameters()))
