"""Fits of two cores that share dense axes: the best without a metric, a minimum of every block with one."""

import pytest
import torch

import tnlayers
from tnlayers.fitting import blocks
from tnlayers.fitting.blocks import block_fit
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.metric import as_metric
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork

BLOCKTT = "i1:3 i2:4 o1:2 r:2, r:2 i1:3 o1:2 o2:5"
LINEAR = [BLOCKTT, "i1:3 o2:5 r:2, r:2 i1:3 i2:4", "o1:3 o2:4 r:2, i1:3 i2:2 r:2 o1:3"]
TEXTS = [*LINEAR, "i1:3 i2:4 h:3 w:3 o1:2 r:3, r:3 i1:3 o1:2 o2:5", "i:4 h:3 a:2 b:2, b:2 h:3 o:6 a:2"]


def kernel(network):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(network.dense_shape, generator=generator, dtype=torch.float64)


def moments(network):
    side = network.dense_shape[1]
    x = torch.randn(4 * side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(1)
    return x.mT @ x


@pytest.mark.parametrize("text", TEXTS)
def test_without_a_metric_the_fit_is_the_best_there_is(text):
    """The squared error is that of the singular values of all blocks that are left out."""
    network = TensorNetwork.parse(text)
    weight = kernel(network)
    shared = [axis for axis in network.dense_axes if all(axis in core for core in network.cores)]
    first = [axis for axis in network.cores[0] if axis in network.dense_axes and axis not in shared]
    second = [axis for axis in network.cores[1] if axis in network.dense_axes and axis not in shared]
    order = [network.dense_axes.index(axis) for axis in (*shared, *first, *second)]
    moved = weight.reshape(network.shape(network.dense_axes)).permute(order)
    sides = [torch.Size(network.shape(tuple(axes))).numel() for axes in (shared, first, second)]
    rank = torch.Size(network.shape(network.bonds)).numel()
    left_out = torch.linalg.svdvals(moved.reshape(sides))[:, rank:].square().sum().sqrt()
    found = decompose(weight, network)
    assert [tuple(core.shape) for core in found.cores] == list(network.core_shapes)
    assert abs(found.error - float(left_out / weight.norm())) < 1e-10


@pytest.mark.parametrize("text", LINEAR)
def test_with_a_metric_no_small_change_of_the_cores_lowers_the_error(text, monkeypatch):
    monkeypatch.setattr(blocks, "SWEEPS", 3000)
    monkeypatch.setattr(blocks, "TOLERANCE", 0.0)
    network = TensorNetwork.parse(text)
    weight, metric = kernel(network), as_metric(network, moments(network), torch.device("cpu"))
    target = weight.reshape(network.shape(network.dense_axes))
    cores = block_fit(network, target, torch.Generator(), metric)
    leaves = [core.requires_grad_() for core in cores]
    missing = reconstruct(network, leaves) - weight
    loss = ((missing @ metric) * missing).sum()
    for core, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert gradient.norm() * core.norm() < 1e-6 * loss
    assert loss < ((weight @ metric) * weight).sum()


def test_where_blocks_are_not_coupled_the_metric_gives_each_its_best_fit():
    network = TensorNetwork.parse(BLOCKTT)
    weight, whole = kernel(network), moments(network)
    metric = as_metric(
        network, torch.block_diag(*(whole[k : k + 4, k : k + 4] for k in (0, 4, 8))), torch.device("cpu")
    )
    cores = block_fit(network, weight.reshape(network.shape(network.dense_axes)), torch.Generator(), metric)
    rows = (weight @ torch.linalg.cholesky(metric)).reshape(2, 5, 3, 4).permute(0, 2, 1, 3)
    best = torch.linalg.svdvals(rows)[..., 2:].square().sum()
    missing = reconstruct(network, cores) - weight
    torch.testing.assert_close(((missing @ metric) * missing).sum(), best, rtol=1e-10, atol=0)


def test_the_metric_lowers_the_error_of_outputs_and_a_kernel_of_the_network_is_found():
    network = TensorNetwork.parse(BLOCKTT)
    weight, metric = kernel(network), moments(network)

    def error(cores):
        missing = reconstruct(network, cores) - weight
        return float(((missing @ metric) * missing).sum())

    assert error(decompose(weight, network, moments=metric).cores) < error(decompose(weight, network).cores)
    truth = reconstruct(network, decompose(weight, network).cores)
    assert decompose(truth, network, moments=metric).error < 1e-6


def test_a_rank_beyond_the_blocks_learns_in_both_cores():
    layer = tnlayers.BlockTTLinear(12, 10, rank=6, in_shape=(3, 4), out_shape=(2, 5), dtype=torch.float64)
    weight = torch.randn(10, 12, dtype=torch.float64)
    assert layer.set_weight_(weight, moments=moments(layer.network)) < 1e-10
    layer(torch.randn(7, 12, dtype=torch.float64)).square().sum().backward()
    for axes, core in zip(layer.network.cores, layer.cores, strict=True):
        bond = axes.index("r")
        assert core.detach().movedim(bond, 0)[4:].any() or core.grad.movedim(bond, 0)[4:].any()


@pytest.mark.parametrize("text", ["i:4 r:2, r:2 o:5", "i1:3 i2:4 o1:2 r:2, r:2 i1:3 o1:2 s:2, s:2 o2:5"])
def test_other_networks_are_left_to_others(text):
    network = TensorNetwork.parse(text)
    assert block_fit(network, kernel(network).reshape(network.shape(network.dense_axes)), torch.Generator()) is None
