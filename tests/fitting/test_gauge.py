"""Scales that leave the kernel as it is: level between the cores, for whatever value of whatever they share."""

import math

import pytest
import torch

from cases import CASES, FAMILIES, Case
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.gauge import level
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind in ("Conv2d", "Linear")], ids=str)
def test_the_kernel_stays_and_the_norm_falls(case: Case):
    """From cores each bond of which is scaled apart, value by value, by factors up to a million."""
    network = case.make(device="meta").network
    cores = [torch.randn(shape, generator=generator(), dtype=torch.float64) for shape in network.core_shapes]
    torn = list(cores)
    for axis in network.axes:
        homes = [k for k, core in enumerate(network.cores) if axis in core]
        if len(homes) > 1:
            scale = 10 ** (6 * torch.rand(network.sizes[axis], generator=generator(), dtype=torch.float64) - 3)
            for k, factor in ((homes[0], scale), (homes[-1], 1 / scale)):
                shape = [-1 if other == axis else 1 for other in network.cores[k]]
                torn[k] = torn[k] * factor.reshape(shape)
    found = level(network, torn)
    torch.testing.assert_close(reconstruct(network, found), reconstruct(network, cores), rtol=1e-9, atol=1e-9)
    norms = [float(core.norm()) for core in found]
    assert max(norms) < 1.001 * min(norms)
    before = math.prod(float(core.norm()) for core in cores)
    assert math.prod(norms) < 1.5 * before


def test_slices_are_level():
    network = TensorNetwork.parse("i:3 r:4, o:5 r, h:3 r")
    cores = [torch.randn(shape, generator=generator()) * torch.tensor([10, 1, 0.1, 1]) for shape in [(3, 4), (5, 4)]]
    found = level(network, [*cores, torch.randn(3, 4, generator=generator())])
    first, *others = (core.norm(dim=0) for core in found)
    for other in others:
        torch.testing.assert_close(first, other)
    assert first[0] > 10 * first[2]  # scales between values are the kernel's own


@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_of_what_is_nearly_zero_one_slice_alone_is_small(tiny):
    network = TensorNetwork.parse("i:3 r:2, o:5 r, h:3 r")
    cores = [torch.randn(shape, generator=generator(), dtype=torch.float64) for shape in network.core_shapes]
    cores[1][:, 1] *= tiny
    cores[2][:, 1] *= 1e-6
    found = level(network, cores)
    torch.testing.assert_close(reconstruct(network, found), reconstruct(network, cores), rtol=1e-9, atol=1e-40)
    norms = torch.stack([core.norm(dim=0) for core in found])
    assert norms[1, 1] < 1e-20
    for other in (0, 2):
        assert 0.3 < norms[other, 1] / norms[other, 0] < 3


@pytest.mark.parametrize("layer", FAMILIES)
def test_fits_are_level(layer, monkeypatch):
    monkeypatch.setattr("tnlayers.fitting.decompose.SWEEPS", 10)
    network = layer(8, 12, 3, rank=2, device="meta").network
    weight = torch.randn(12, 8, 3, 3, generator=generator(), dtype=torch.float64)
    fit = decompose(weight, network)
    cores, error = fit.cores, fit.error
    missing = float((reconstruct(network, cores) - weight).norm() / weight.norm())
    assert error == pytest.approx(missing, rel=1e-9)
    again = level(network, cores)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(cores, again, strict=True))
