"""Errors of fits beside those of the version that swept 300 times in float64, in tests/golden/fits.csv."""

import csv
import math
from pathlib import Path

import pytest
import torch

import tnlayers
from tnlayers.fitting import objective
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.matrices import matrix_fit
from tnlayers.fitting.starts import starts
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork

with (Path(__file__).parents[1] / "golden" / "fits.csv").open(newline="") as file:
    ROWS = [
        (row["family"], tuple(map(int, row["shape"].split("x"))), float(row["keep"]), float(row["error"]))
        for row in csv.DictReader(file)
    ]


def kernel(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a kernel whose unfoldings have falling singular values, as those of trained ones."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    for dim, size in enumerate(shape):
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        scaled = turn * torch.arange(1, size + 1, dtype=torch.float64).rsqrt()
        found = torch.tensordot(scaled, found, ([1], [dim])).movedim(0, dim)
    return found


def error(family: str, shape: tuple[int, ...], keep: float) -> float:
    cls = getattr(tnlayers, f"{family}{'Conv2d' if len(shape) > 2 else 'Linear'}")
    size = [shape[2:]] if len(shape) > 2 else []
    return cls(shape[1], shape[0], *size, rank=keep, dtype=torch.float64).set_weight_(kernel(shape))


@pytest.mark.parametrize(("family", "shape", "keep", "before"), ROWS)
def test_errors_stay_within_one_percent(family, shape, keep, before):
    assert error(family, shape, keep) <= 1.01 * before


@pytest.mark.parametrize("family", ["CP", "TR", "HT"])
def test_float32_in_between_does_not_show(family, monkeypatch):
    (fine,) = (before for name, shape, _, before in ROWS if (name, shape) == (family, (24, 16, 3, 3)))
    monkeypatch.setattr(objective, "ROUGH", 0)
    assert error(family, (24, 16, 3, 3), 0.3) <= 1.01 * fine


@pytest.mark.parametrize(
    "text",
    [
        "i:12 r:4, o:9 r:4, h:1 r:4, w:1 r:4",
        "a:2 i:12 b:3, b h:1 w:1 c:2, c o:9 a",
        "i:12 a:5, a b:4 h:1 w:1, b o:9",
        "i:12 a:40, a b:40 h:1 w:1, b o:9",
        "i:12 r:4, r:4 o:9",
    ],
)
def test_matrices_get_the_best_fit_there_is(text):
    network = TensorNetwork.parse(text)
    weight = kernel(network.dense_shape)
    first, last = (network.cores[k] for k in (0, -1 if "c o" in text or "b o" in text else 1))
    rank = min(math.prod(network.shape(set(core) & set(network.bonds))) for core in (first, last))
    values = torch.linalg.svdvals(weight.flatten(1))
    fit = decompose(weight, network)
    cores, found = fit.cores, fit.error
    assert found == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-6, abs=1e-7)
    assert all(core.flatten().any() for core in cores)


@pytest.mark.parametrize("text", ["i:6 r:3, o:5 r, h:3 r", "a:2 i1:3 b:2, b i2:2 a, o:4 a", "i:6 n:2 a:2, n o:5 a:2"])
def test_other_kernels_are_swept(text):
    network = TensorNetwork.parse(text)
    target = kernel(network.dense_shape).reshape(network.shape(network.dense_axes))
    found = matrix_fit(network, target, torch.Generator())
    assert (found is None) == ("h" in text or "i2" in text)


@pytest.mark.parametrize("text", ["i:12 r:20, o:9 r:20", "i:12 a:40, a b:40 h:1 w:1, b o:9"])
def test_indices_beyond_the_rank_can_learn(text):
    network = TensorNetwork.parse(text)
    cores = decompose(kernel(network.dense_shape), network).cores
    cores = [core.requires_grad_() for core in cores]
    reconstruct(network, cores).square().sum().backward()
    for bond in network.bonds:
        moved = [
            core.grad.movedim(axes.index(bond), 0).flatten(1).any(1)
            for core, axes in zip(cores, network.cores, strict=True)
            if bond in axes
        ]
        assert torch.stack(moved).any(0).all()


def test_a_large_sum_has_one_random_start_and_others_three():
    for size, count in ((31, 4), (32, 2)):
        network = TensorNetwork.parse(f"n:2 a:2 b:2, n i:{size} o1:{size} a, n o2:32 b")
        target = torch.ones(network.shape(network.dense_axes), dtype=torch.float64)
        assert len(starts(network, target, torch.Generator().manual_seed(0))) == count


def test_a_kernel_of_rough_numbers_is_still_fitted_to_the_end(monkeypatch):
    """At the rank of the kernel, sweeps in float32 go over to float64."""
    monkeypatch.setattr(objective, "ROUGH", 0)
    assert (
        tnlayers.TuckerConv2d(8, 6, (3, 2), rank=(8, 6), dtype=torch.float64).set_weight_(kernel((6, 8, 3, 2))) < 1e-9
    )


def test_autocast_does_not_reach_a_fit(monkeypatch):
    monkeypatch.setattr(objective, "ROUGH", 0)
    monkeypatch.setattr("tnlayers.fitting.decompose.SWEEPS", 5)
    layer = tnlayers.TuckerConv2d(16, 24, 3, rank=0.3)
    alone = layer.set_weight_(kernel((24, 16, 3, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.set_weight_(kernel((24, 16, 3, 3))) == alone
