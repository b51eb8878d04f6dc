"""docs/how-to/moving.md: layers of tednet and tensorly-torch and ours compute the same with the same cores."""

import ast
import contextlib
import importlib
import io
import math
import re
from pathlib import Path

import pytest
import tednet
import tltorch
import torch
from tednet.tnn import bt_tucker, cp, tensor_ring, tensor_train, tucker2
from torch import nn

import tnlayers
from tnlayers.models import tednet_resnet

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "moving.md").read_text(encoding="utf-8")
MODULES = bt_tucker, cp, tensor_ring, tensor_train, tucker2


def functions():
    """Return the functions of the page, without running its examples."""
    code = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)))
    code.body = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    found = {"__name__": "moving"}
    exec(compile(code, "moving.md", "exec"), found)
    return found


HOW = functions()


def quietly(make, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return make(*args, **kwargs)


def check(ours, theirs, *shape):
    """Outputs and both gradients are equal in double precision."""
    x, y = (torch.randn(3, *shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    mine, expected = ours.double()(x), theirs.double()(y)
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10 * float(expected.detach().abs().max()))
    probe = torch.randn_like(mine)
    (mine * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10 * float(y.grad.abs().max()))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


CONV = [  # the function of the page, tednet's class and its arguments, our class and ours
    ("tr", tensor_ring.TRConv2D, ([3], [4, 2, 2], [2, 3, 4, 5, 6]), {"rank": (2, 3, 4, 5, 6)}),
    ("tr", tensor_ring.TRConv2D, ([4, 2, 2], [4, 8], [2, 3, 4, 5, 6, 3]), {"rank": (2, 3, 4, 5, 6, 3)}),
    ("tt", tensor_train.TTConv2D, ([4, 2, 2], [2, 4, 4], [3, 5, 2]), {"rank": (3, 5, 2)}),
    ("tt", tensor_train.TTConv2D, ([6], [4], [3]), {"rank": (3,)}),
    ("btt", bt_tucker.BTTConv2D, ([4, 2, 2], [2, 4, 4], [2, 3, 4, 2, 3], 3), {"rank": (2, 3, 4, 2, 3), "blocks": 3}),
]
LINEAR = [
    ("tr", tensor_ring.TRLinear, ([4, 2, 2], [4, 8], [2, 3, 4, 5, 6]), {"rank": (2, 3, 4, 5, 6)}),
    ("tr", tensor_ring.TRLinear, ([4, 4, 4], [10], [3, 3, 3, 3]), {"rank": 3}),
    ("tt", tensor_train.TTLinear, ([4, 2, 2], [2, 4, 4], [3, 5]), {"rank": (3, 5)}),
    ("tt", tensor_train.TTLinear, ([2, 2, 2, 3], [2, 4, 1, 4], [3, 5, 2]), {"rank": (3, 5, 2)}),
    ("cp", cp.CPLinear, ([4, 2, 2], [4, 8], 5), {"rank": 5}),
    ("btt", bt_tucker.BTTLinear, ([4, 2, 2], [2, 4, 4], [2, 3, 4], 3), {"rank": (2, 3, 4), "blocks": 3}),
    ("btt", bt_tucker.BTTLinear, ([4, 2], [2, 4], [2, 5], 1), {"rank": (2, 5), "blocks": 1}),
]


def identify(value):
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("name", "kind", "args", "own"), CONV, ids=identify)
def test_convolutions_of_tednet(name, kind, args, own):
    inputs, outputs = math.prod(args[0]), math.prod(args[1])
    make = getattr(tnlayers, kind.__name__.replace("2D", "2d"))
    for bias, stride, kernel in ((True, 1, 3), (False, 2, (1, 3))):
        theirs = quietly(kind, *args, kernel_size=kernel, stride=stride, padding=1, bias=bias)
        if bias:
            nn.init.normal_(theirs.bias)
        ours = make(inputs, outputs, kernel, stride, 1, bias=bias, in_shape=args[0], out_shape=args[1], **own)
        check(HOW["moved"](ours, theirs, HOW[f"{name}_cores"](theirs)), theirs, inputs, 7, 6)


@pytest.mark.parametrize(
    ("name", "kind", "rank"), [("cp", cp.CPConv2D, 6), ("tucker", tucker2.TK2Conv2D, (4, 5))], ids=identify
)
def test_convolutions_of_tednet_with_channels_whole(name, kind, rank):
    make = {"cp": tnlayers.CPConv2d, "tucker": tnlayers.TuckerConv2d}[name]
    for bias, stride in ((True, 1), (False, 2)):
        theirs = quietly(kind, 6, 8, rank, kernel_size=3, stride=stride, padding=1, bias=bias)
        if bias:
            nn.init.normal_(theirs.bias)
        ours = make(6, 8, 3, stride, 1, bias=bias, rank=rank)
        check(HOW["moved"](ours, theirs, HOW[f"{name}_cores"](theirs)), theirs, 6, 7, 6)


@pytest.mark.parametrize(("name", "kind", "args", "own"), LINEAR, ids=identify)
def test_linear_layers_of_tednet(name, kind, args, own):
    inputs, outputs = math.prod(args[0]), math.prod(args[1])
    for bias in (True, False):
        theirs = quietly(kind, *args, bias=bias)
        if bias:
            nn.init.normal_(theirs.bias)
        ours = getattr(tnlayers, kind.__name__)(inputs, outputs, bias=bias, in_shape=args[0], out_shape=args[1], **own)
        check(HOW["moved"](ours, theirs, HOW[f"{name}_cores"](theirs)), theirs, inputs)


@pytest.mark.parametrize(
    ("shape", "rank", "network"),
    [((4, 2, 3), (3, 5), "i1 ri, ri i2 i3 ro, ro o"), ((24,), (5,), "i ri, ri o")],
)
def test_tucker_s_linear_layers_of_tednet(shape, rank, network):
    theirs = quietly(tucker2.TK2Linear, shape, 7, rank)
    nn.init.normal_(theirs.bias)
    ours = tnlayers.EinsumLinear(24, 7, network=network, rank=rank, in_shape=shape, out_shape=(7,))
    check(HOW["moved"](ours, theirs, HOW["tucker_cores"](theirs)), theirs, 24)
    assert f"`{network}`" in PAGE


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("tr", tensor_ring.TRResNet20),
        ("tt", tensor_train.TTResNet20),
        ("cp", cp.CPResNet20),
        ("tucker", tucker2.TK2ResNet20),
        ("btt", bt_tucker.BTTResNet20),
    ],
    ids=identify,
)
def test_whole_networks_of_tednet(name, net):
    """The page's loop, for every format, with a rank of its own at each of tednet's seven places."""
    ranks = [2, 3, 4, 3, 2, 4, 3]
    theirs, ours = quietly(net, ranks, 10), tednet_resnet(20, name, ranks)
    layers = tnlayers.TensorLayer, nn.BatchNorm2d
    old = [m for m in theirs.modules() if hasattr(m, "tn_info") or isinstance(m, nn.BatchNorm2d)]
    new = [m for m in ours.modules() if isinstance(m, layers)]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    for before, after in zip(old, new, strict=True):
        if isinstance(before, nn.BatchNorm2d):
            nn.init.uniform_(before.weight, 0.5, 1.5)
            after.load_state_dict(before.state_dict())
        else:
            HOW["moved"](after, before, HOW[f"{name}_cores"](before))
    check(ours.eval(), theirs.eval(), 3, 8, 8)


TRLS = [
    ("tucker", (4, 2, 3, 5), tnlayers.TuckerLinear, {"rank": (4, 2, 3, 5)}, (7,)),
    ("tucker", (4, 2, 3, 3, 2), tnlayers.TuckerLinear, {"rank": (4, 2, 3, 3, 2)}, (4, 3)),
    ("cp", 5, tnlayers.CPLinear, {"rank": 5}, (7,)),
    ("cp", 5, tnlayers.CPLinear, {"rank": 5}, (4, 3)),
    ("tt", (1, 3, 4, 5, 1), tnlayers.TTLinear, {"rank": (3, 4, 5), "layout": "chain"}, (7,)),
    ("tt", (1, 3, 4, 5, 2, 1), tnlayers.TTLinear, {"rank": (3, 4, 5, 2), "layout": "chain"}, (4, 3)),
]


@pytest.mark.parametrize(("factorization", "rank", "make", "own", "outputs"), TRLS)
def test_tensor_regression_layers(factorization, rank, make, own, outputs):
    for bias in (True, False):
        theirs = tltorch.TRL((6, 3, 4), outputs, bias=bias, factorization=factorization, rank=rank).double()
        if factorization == "cp":
            nn.init.normal_(theirs.weight.weights)
        layer = make(72, math.prod(outputs), bias=bias, in_shape=(6, 3, 4), out_shape=outputs, **own).double()
        HOW["moved"](layer, theirs, HOW["trl_cores"](theirs))
        check(nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, outputs)), theirs, 6, 3, 4)


@pytest.mark.parametrize(("shape", "outputs"), [((6, 3, 4), (2, 5, 3)), ((6, 3), (2, 4))])
def test_tensor_contraction_layers(shape, outputs):
    theirs = tltorch.TCL(shape, outputs)
    network = ", ".join(f"i{k} o{k}" for k in range(1, len(shape) + 1))
    layer = tnlayers.EinsumLinear(
        math.prod(shape), math.prod(outputs), bias=False, network=network, in_shape=shape, out_shape=outputs
    )
    HOW["moved"](layer, theirs, [factor.T for factor in theirs.factors])
    check(nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, outputs)), theirs, *shape)


def test_tensor_contraction_layers_are_drawn_for_their_product():
    """A product of matrices without bonds: the gain on white inputs is that of the default start, 2."""
    layer = tnlayers.EinsumLinear(
        120, 60, bias=False, network="i1 o1, i2 o2, i3 o3", in_shape=(4, 5, 6), out_shape=(5, 4, 3)
    )
    assert float(layer.weight.detach().square().mean()) * 120 == pytest.approx(2, rel=1e-4)
    assert tnlayers.EinsumLinear(8, 8, network="i1 o1, i2 o2", in_shape=(4, 2), out_shape=(2, 4)).bias is not None


def test_shapes_that_differ_are_refused():
    theirs = quietly(tensor_ring.TRLinear, [4, 4], [8, 4], [3, 4, 5, 6])
    ours = tnlayers.TRLinear(16, 32, rank=3, in_shape=(4, 4), out_shape=(8, 4))
    with pytest.raises(RuntimeError, match=r"size mismatch for cores\.0"):
        HOW["moved"](ours, theirs, HOW["tr_cores"](theirs))


def test_the_networks_in_the_table():
    for kind, own in (("TR", {}), ("TT", {}), ("BTT", {"blocks": 2})):
        layer = getattr(tnlayers, f"{kind}Conv2d")(16, 32, 3, rank=2, in_shape=(4, 4), out_shape=(8, 4), **own)
        assert f"| `{layer.network}` |" in PAGE
    for kind in ("CP", "Tucker"):
        assert f"| `{getattr(tnlayers, f'{kind}Conv2d')(16, 32, 3, rank=2).network}` |" in PAGE


def test_the_names_in_the_tables_exist():
    peers = {name for module in MODULES for name in dir(module)} | set(dir(tltorch))
    found = set(re.findall(r"\b((?:TR|TT|CP|BTT|TK2|Tucker|BlockTT|Einsum|Factorized)[A-Z][A-Za-z0-9]+)\b", PAGE))
    assert {"TRConv2D", "TK2Linear", "TRLSTM", "TRLeNet5", "FactorizedEmbedding", "BlockTTLinear"} <= found
    assert all(hasattr(tnlayers, name) or name in peers for name in found)
    for name in re.findall(r"\{(?:func|class)\}`tnlayers\.([A-Za-z_.]+)`", PAGE):
        *path, last = name.split(".")
        assert hasattr(importlib.import_module(".".join(["tnlayers", *path])), last)
    assert tednet.__name__ in PAGE


def test_what_the_page_says_of_tednet():
    layer = quietly(tensor_ring.TRConv2D, [4, 4], [4, 4], [2] * 5, 3)
    assert layer.recover() is None
    with pytest.raises(RuntimeError, match="same dtype"), torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 16, 5, 5))
    assert not layer.bias.any()
    assert len(list(quietly(cp.CPConv2D, 16, 16, 100, 3).parameters())) == 401
    assert len(list(tnlayers.CPConv2d(16, 16, 3, rank=100).parameters())) == 5
    ours = tnlayers.TRConv2d(16, 16, 3, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(1, 16, 5, 5)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
def test_what_the_page_says_of_tensorly_torch():
    with pytest.raises(AttributeError, match="output_shape"):
        tltorch.TCL((4, 5), (2, 3), bias=True)
    with torch.no_grad():
        regression = tltorch.TRL((64, 7, 7), (10,), factorization="tucker", rank=(20, 3, 3, 10))
        assert 0.5 < float(regression.weight.to_tensor().std()) < 2
        chain = tltorch.FactorizedConv(64, 64, 3, order=2, rank=(1, 16, 16, 16, 1), factorization="tt")
        assert float(chain.weight.normal_(0, 0.02).to_tensor().std()) < 0.02 / 16
    tucker = tltorch.FactorizedConv(64, 64, 3, order=2, rank=0.1, factorization="tucker")
    assert tuple(tucker.rank)[2:] == (1, 1)
    assert min(tltorch.FactorizedConv(64, 64, 3, order=2, rank=0.1, factorization="tt").rank[1:-1]) <= 2
    assert tnlayers.TuckerConv2d(64, 64, 3, rank=0.1).network.kernel == ("h", "w")
    ranks = tnlayers.TTConv2d(64, 64, 3, rank=0.1, layout="chain").rank.values()
    assert max(ranks) - min(ranks) <= 1
    wrong = tltorch.FactorizedConv.from_conv(nn.Conv2d(8, 8, 3, groups=2), rank=0.5)
    with pytest.raises(RuntimeError, match="expected input"):
        wrong(torch.randn(1, 8, 5, 5))
    stale = tltorch.FactorizedConv(8, 8, 3, order=2, rank=(1, 10, 6, 10, 1), factorization="tt")
    stale.weight.init_from_tensor(torch.randn(8, 3, 3, 8))
    assert tuple(stale.rank)[1] != stale.weight.factors[0].shape[-1]
