"""The CIFAR ResNets: the published sizes and names, option-A shortcuts, and convolutions that nobody draws again."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.models import BasicBlock, ResNet, dense_conv, resnet20, resnet32, resnet44, resnet56, resnet110


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
