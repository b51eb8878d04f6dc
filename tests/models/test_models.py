"""The CIFAR ResNets: the published sizes and names, option-A shortcuts, and convolutions that nobody draws again."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.models import (
    BasicBlock,
    ResNet,
    WideResNet,
    dense_conv,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    tednet_resnet,
    wrn28_10,
)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "expected"),
    [(resnet20, 269_722), (resnet32, 464_154), (resnet44, 658_586), (resnet56, 853_018), (resnet110, 1_727_962)],
)
def test_parameters_are_the_published_ones(make, expected):
    with torch.device("meta"):
        assert parameters(make()) == expected


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet32, 5), (resnet110, 18)])
def test_names_are_those_of_published_weights(make, blocks):
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    pair = lambda prefix, i: [f"{prefix}conv{i}.weight", *(f"{prefix}bn{i}.{name}" for name in norm)]  # noqa: E731
    inside = [f"layer{stage}.{block}." for stage in (1, 2, 3) for block in range(blocks)]
    expected = [*pair("", 1), *(name for prefix in inside for i in (1, 2) for name in pair(prefix, i))]
    with torch.device("meta"):
        assert list(make().state_dict()) == [*expected, "linear.weight", "linear.bias"]


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (7, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(size, channels):
    with torch.device("meta"):
        net = resnet20(num_classes=7, in_channels=channels)
        images = torch.randn(2, channels, *size)
    assert net(images).shape == (2, 7)
    assert net.layer3(net.layer2(net.layer1(net.conv1(images)))).shape[2:] == tuple(math.ceil(s / 4) for s in size)


def test_the_option_a_shortcut_subsamples_and_pads_with_zero_channels():
    block = BasicBlock(2, 6, 2, dense_conv, nn.BatchNorm2d)
    x = torch.randn(3, 2, 5, 5)
    shortcut = block.shortcut(x)
    assert shortcut.shape == (3, 6, 3, 3)
    assert torch.equal(shortcut[:, 2:4], x[:, :, ::2, ::2])
    assert not shortcut[:, [0, 1, 4, 5]].any()


def test_a_block_is_the_identity_where_its_branch_is_silent():
    block = BasicBlock(4, 4, 1, dense_conv, nn.BatchNorm2d)
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_every_convolution_is_made_by_the_argument_and_keeps_its_own_weights():
    made = []

    def conv(*args, **kwargs):
        made.append(nn.Conv2d(*args, **kwargs))
        nn.init.constant_(made[-1].weight, len(made))
        return made[-1]

    net = resnet20(conv=conv, stem=conv)
    assert [m for m in net.modules() if isinstance(m, nn.Conv2d)] == made
    assert len(made) == 19
    assert all(m.bias is None and (m.weight == i).all() for i, m in enumerate(made, start=1))


def test_the_default_convolution_follows_hes_rule():
    weight = dense_conv(64, 256, 3).weight
    entries = weight.numel()
    # the sample variance of n normal numbers has a relative standard error of sqrt(2 / n)
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=5 * math.sqrt(2 / entries))


def test_normalisation_can_be_taken_out():
    net = resnet20(norm=nn.Identity)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert net(torch.randn(1, 3, 8, 8)).isfinite().all()


def test_the_same_seed_draws_the_same_network():
    def draw(seed):
        torch.manual_seed(seed)
        return resnet20().state_dict()

    first, second, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("depth", [0, 2, 7, 21, -4])
def test_depths_that_do_not_exist_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, but these ResNets have 6 n \\+ 2 layers"):
        ResNet(depth)


@pytest.mark.parametrize("layer", ["CPConv2d", "TuckerConv2d", "TTConv2d", "TRConv2d", "BTTConv2d"])
def test_tensor_network_convolutions(layer):
    net = resnet20(conv=partial(getattr(tnlayers, layer), rank=0.25), in_channels=1)
    assert sum(isinstance(m, tnlayers.TensorLayer) for m in net.modules()) == 18
    assert parameters(net) < 0.27 * parameters(resnet20(in_channels=1))
    net(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


# ------------------------------------------------------------------ the other families of networks

IMAGENET = [
    (resnet18, 11_689_512), (resnet34, 21_797_672), (resnet50, 25_557_032), (resnet101, 44_549_160),
    (resnet152, 60_192_808),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), [*IMAGENET, (wrn28_10, 36_479_194)])
def test_large_networks_have_the_published_parameters(make, expected):
    with torch.device("meta"):
        assert parameters(make()) == expected


def torchvision_state(blocks, bottleneck):
    """Names and shapes of torchvision's state_dict, written out by its rules."""

    def norm(name, channels):
        vectors = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        return vectors | {f"{name}.num_batches_tracked": ()}

    state = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    channels = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
        out = width * (4 if bottleneck else 1)
        for block in range(count):
            name = f"layer{stage}.{block}"
            shapes = [(width, channels, 3, 3), (width, width, 3, 3)]
            if bottleneck:
                shapes = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            for number, shape in enumerate(shapes, start=1):
                state |= {f"{name}.conv{number}.weight": shape} | norm(f"{name}.bn{number}", shape[0])
            if block == 0 and (stage > 1 or channels != out):
                state |= {f"{name}.downsample.0.weight": (out, channels, 1, 1)} | norm(f"{name}.downsample.1", out)
            channels = out
    return state | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


@pytest.mark.parametrize(
    ("make", "blocks", "bottleneck"), [(resnet18, (2, 2, 2, 2), False), (resnet50, (3, 4, 6, 3), True)]
)
def test_names_and_shapes_are_torchvision_s(make, blocks, bottleneck):
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    expected = torchvision_state(blocks, bottleneck)
    assert list(found.items()) == list(expected.items())
    assert list(found)[-8:] == [
        f"layer4.{blocks[3] - 1}.{last}" for last in (f"conv{2 + bottleneck}.weight", *(
            f"bn{2 + bottleneck}.{part}" for part in ("weight", "bias", "running_mean", "running_var",
                                                      "num_batches_tracked")))
    ] + ["fc.weight", "fc.bias"]  # fmt: skip


def test_large_networks_stride_where_torchvision_s_do():
    with torch.device("meta"):
        net = resnet50(conv=partial(tnlayers.CPConv2d, rank=4), num_classes=7)
    strided = {n for n, m in net.named_modules() if getattr(m, "stride", None) in ((2, 2), 2)}
    inner = {f"layer{k}.0.{name}" for k in (2, 3, 4) for name in ("conv2", "downsample.0")}
    assert strided == inner | {"conv1", "maxpool"}
    assert all(isinstance(m, tnlayers.CPConv2d) for n, m in net.named_modules() if n in inner)
    small = resnet18(conv=partial(tnlayers.TRConv2d, rank=0.1), num_classes=3)
    assert small(torch.randn(2, 3, 40, 33)).shape == (2, 3)


@pytest.mark.parametrize("make", [partial(resnet20, shortcut="B"), partial(WideResNet, 10, 2)])
def test_projections_are_convolutions_of_the_factory(make):
    made = []

    def conv(*args, **kwargs):
        made.append(tnlayers.CPConv2d(*args, rank=4, **kwargs))
        return made[-1]

    net = make(conv=conv, num_classes=4)
    pointwise = [layer for layer in made if layer.kernel_size == (1, 1)]
    assert len(pointwise) == (2 if isinstance(net, ResNet) else 3)
    assert net(torch.randn(2, 3, 9, 8)).shape == (2, 4)


def test_option_b_has_the_parameters_of_its_projections():
    with torch.device("meta"):
        more = parameters(resnet20(shortcut="B")) - parameters(resnet20())
    assert more == 16 * 32 + 32 * 64 + 2 * (32 + 64)
    with pytest.raises(ValueError, match="shortcut is 'C'"):
        resnet20(shortcut="C")
    with pytest.raises(ValueError, match="depth is 27, but wide ResNets have"):
        WideResNet(27, 10)


@pytest.mark.parametrize("make", [resnet20, resnet18, partial(WideResNet, 10, 1)])
def test_the_last_layer_is_made_by_its_argument(make):
    net = make(num_classes=8, linear=partial(tnlayers.TRLinear, rank=2))
    *_, last = net.children()
    assert isinstance(last, tnlayers.TRLinear)
    assert net(torch.randn(2, 3, 33, 32)).shape == (2, 8)


TEDNET = {  # parameters of tednet's ResNet-20 and ResNet-32, batch normalisation and last layer included
    ("tr", 2): (3_626, 5_914), ("tr", 6): (21_546, 34_970), ("tr", 10): (57_386, 93_082), ("tt", 10): (56_316, 92_852),
    ("tucker", 10): (33_376, 54_032), ("cp", 10): (15_916, 26_492), ("cp", 100): (146_686, 244_382),
    ("btt", 4): (46_906, 76_410),
}  # fmt: skip


@pytest.mark.parametrize(("format", "rank"), TEDNET)
def test_tednet_s_networks_have_tednet_s_parameters(format, rank):
    for depth, expected in zip((20, 32), TEDNET[format, rank], strict=True):
        assert parameters(tednet_resnet(depth, format, rank, device="meta")) == expected
    net = tednet_resnet(20, format, rank)
    assert not any(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules())
    assert net(torch.randn(2, 3, 9, 9)).isfinite().all()


def test_seven_ranks_go_where_tednet_has_them():
    net = tednet_resnet(20, "tr", (2, 3, 4, 5, 6, 7, 8), num_classes=100)
    ranks = {name: {*module.rank.values()} for name, module in net.named_modules() if hasattr(module, "cores")}
    assert ranks["conv1"] == {2}
    assert ranks["linear"] == {8}
    assert {name: size for name, size in ranks.items() if name.startswith("layer1")} == {
        f"layer1.{block}.conv{k}": {3} for block in range(3) for k in (1, 2)
    }
    for stage, first, rest in ((2, 4, 5), (3, 6, 7)):
        assert [ranks[f"layer{stage}.{block}.conv{k}"] for block in range(3) for k in (1, 2)] == [
            {first}, {first}, {rest}, {rest}, {rest}, {rest},
        ]  # fmt: skip
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 100)
    for ranks, kind, sentence in (
        ((2, 3), ValueError, "ranks has 2 entries; it must be one integer or 7: stem, layer1"),
        ((1, 2, 3, 4, 0, 6, 7), ValueError, "the rank of layer3's first block is 0"),
        (2.5, TypeError, "ranks is 2.5"),
    ):
        with pytest.raises(kind, match=sentence):
            tednet_resnet(20, "tr", ranks)
    with pytest.raises(ValueError, match="format is 'ht'"):
        tednet_resnet(20, "ht", 2)
    with pytest.raises(ValueError, match="depth is 21"):
        tednet_resnet(21, "tr", 2)
