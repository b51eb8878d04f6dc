import logging

import pytest
import tensorly
import torch

import tnlayers
from tnlayers.fitting import objective
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.starts import starts
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork

STAR = "i:6 a:3, a b c h:3, b:4 o:5, c:2 w:3"
PATH = "i1:3 a:4, a i2:2 h:3 b:4, b o:5"
TREE = "i1:3 a:2, i2:2 b:2, a b c:3, c h:3 d:3, d o:5 e:2, e w:2"
RING = "a:2 i:6 b:3, b h:3 w:3 c:2, c o:5 a"
CP = "i:6 r:3, o:5 r, h:3 r, w:3 r"
SUM = "n:2 a:2 b:2 h:3, n i:6 a, n o:5 b"
SHARED = "i1:3 i2:2 o1:2 r:1, r i1 o1 o2:3"
APART = "i:3 h:2, o:4 w:2"


def kernel(network: TensorNetwork) -> torch.Tensor:
    return torch.randn(network.dense_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def off(network: TensorNetwork, cores: list[torch.Tensor], weight: torch.Tensor) -> float:
    return float((reconstruct(network, cores) - weight).norm() / weight.norm())


@pytest.mark.parametrize("text", [STAR, PATH, TREE, RING, CP, SUM, SHARED, APART])
def test_no_fit_ends_above_a_start_and_no_library_or_generator_is_touched(text):
    network = TensorNetwork.parse(text)
    weight, backend, state = kernel(network), tensorly.get_backend(), torch.get_rng_state()
    target = weight.reshape(network.shape(network.dense_axes))
    begun = starts(network, target, torch.Generator().manual_seed(0))
    for cores in begun:
        assert [tuple(core.shape) for core in cores] == list(network.core_shapes)
        assert all(core.dtype == torch.float64 for core in cores)
    fit = decompose(weight, network)
    cores, error = fit.cores, fit.error
    assert error == pytest.approx(off(network, cores, weight), rel=1e-9)
    assert error <= min(off(network, cores, weight) for cores in begun)
    assert tensorly.get_backend() == backend
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("text", "count"), [(STAR, 1), (PATH, 1), (TREE, 1), (RING, 6), (CP, 4), (SUM, 4), (APART, 3)])
def test_trees_have_one_start_and_others_several(text, count):
    network = TensorNetwork.parse(text)
    assert len(starts(network, kernel(network).reshape(network.shape(network.dense_axes)), torch.Generator())) == count


@pytest.mark.parametrize("text", [STAR, PATH, TREE])
def test_a_tree_finds_a_kernel_of_its_own_form_at_once(text):
    network = TensorNetwork.parse(text)
    generator = torch.Generator().manual_seed(2)
    truth = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.core_shapes]
    weight = reconstruct(network, truth)
    (cores,) = starts(network, weight.reshape(network.shape(network.dense_axes)), generator)
    assert off(network, cores, weight) < 1e-6  # singular vectors of a Gram matrix: the square root of eps


@pytest.mark.parametrize("text", [STAR, PATH, TREE, RING, CP, SUM, SHARED])
def test_moments_lower_the_error_that_they_weigh(text):
    network = TensorNetwork.parse(text)
    weight, side = kernel(network), network.dense_shape[1]
    moments = torch.diag(10.0 ** -torch.arange(side, dtype=torch.float64))

    def weighed(cores: list[torch.Tensor]) -> float:
        missing = (reconstruct(network, cores) - weight).flatten(2) if weight.ndim > 2 else reconstruct(network, cores)
        missing = missing if weight.ndim > 2 else (missing - weight)[..., None]
        return float(torch.einsum("oik,ij,ojk->", missing, moments, missing))

    plain = decompose(weight, network).cores
    fit = decompose(weight, network, moments=moments)
    cores, error = fit.cores, fit.error
    assert weighed(cores) < weighed(plain)
    assert error == pytest.approx(off(network, cores, weight), rel=1e-9)
    same = decompose(weight, network, moments=torch.zeros(side, side)).cores  # nothing known: no weights
    assert off(network, same, weight) == pytest.approx(off(network, plain, weight), rel=0.05)


@pytest.mark.parametrize(
    ("moments", "error", "words"),
    [
        ([1.0], TypeError, "moments is of type list"),
        (torch.ones(3, 3), ValueError, r"moments has shape \(3, 3\)"),
        (torch.full((6, 6), torch.nan), ValueError, "moments holds NaN"),
        (torch.ones(6, 6).triu(), ValueError, "moments differs from its transpose"),
        (-torch.eye(6), ValueError, "moments has a negative eigenvalue"),
    ],
)
def test_bad_moments_are_refused(moments, error, words):
    network = TensorNetwork.parse(CP)
    with pytest.raises(error, match=words):
        decompose(kernel(network), network, moments=moments)


def test_layers_pass_moments_on():
    conv, moments = torch.nn.Conv2d(4, 6, 3), torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6]))
    plain = tnlayers.TuckerConv2d.from_conv(conv, rank=2)
    fitted = tnlayers.TuckerConv2d.from_conv(conv, rank=2, moments=moments)
    scale = moments.diagonal().sqrt()[:, None, None]
    assert ((fitted.weight - conv.weight) * scale).norm() < ((plain.weight - conv.weight) * scale).norm()
    with pytest.raises(ValueError, match="moments is given, but decompose is False"):
        tnlayers.TuckerConv2d.from_conv(conv, rank=2, decompose=False, moments=moments)


def test_long_fits_are_logged(monkeypatch, caplog, capsys):
    monkeypatch.setattr(objective, "REPORT", 0.0)
    network = TensorNetwork.parse(PATH)
    with caplog.at_level(logging.INFO, "tnlayers"):
        decompose(kernel(network), network)
    assert "sweep 1, error 0." in caplog.text
    assert capsys.readouterr().out == ""
