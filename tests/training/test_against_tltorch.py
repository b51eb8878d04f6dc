"""Dropout and lasso of ranks give tensorly-torch's kernels and penalties, with the same cores and random choices."""

import pytest
import torch

import tnlayers
from tnlayers.execution.rank_dropout import draw_factors, scaled
from tnlayers.ops.contraction import reconstruct
from tnlayers.training.bonds import term_squares

tltorch = pytest.importorskip("tltorch")
from tltorch.tensor_hooks import tensor_dropout, tensor_lasso  # noqa: E402

LAYERS = {
    "CP": lambda rank: tnlayers.CPConv2d(8, 12, (3, 2), rank=rank, dtype=torch.float64),
    "Tucker": lambda rank: tnlayers.TuckerConv2d(8, 12, (3, 2), rank=(rank, rank, 2, 2), dtype=torch.float64),
    "TT": lambda rank: tnlayers.TTConv2d(8, 12, (3, 2), rank=rank, layout="chain", dtype=torch.float64),
}
BONDS = {"CP": ["r"], "Tucker": ["ro", "ri", "rh", "rw"], "TT": ["r1", "r2", "r3"]}
"""Bonds in tensorly-torch's order."""


def both(family, rank):
    torch.manual_seed(3)
    layer = LAYERS[family](rank)
    return layer, tnlayers.to_tltorch(layer)


def theirs(family, layer):
    """The kernel that their hooks make, as ours."""
    kernel = layer.weight().to_tensor()
    return kernel.movedim(-1, 0) if family == "TT" else kernel


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("family", LAYERS)
def test_dropout_gives_their_kernel(family, rank, monkeypatch):
    """Up to the factor that makes the mean right, which is 1 to 1e-14 where ranks are large."""
    p, (layer, their) = 0.3, both(family, rank)
    bonds = BONDS[family]
    torch.manual_seed(0)
    factors = {bond: draw_factors(layer.rank[bond], p, layer.cores[0]) for bond in bonds}
    ours = reconstruct(layer.network, scaled(layer.network, list(layer.cores), factors.items()))
    kept = iter([factors[bond] > 0 for bond in bonds])
    monkeypatch.setattr(torch, "bernoulli", lambda _, out: next(kept))
    # Theirs divides Tucker's core by (1 - p) per mode, also for modes that min_dim excludes: here it excludes none.
    tensor_dropout(their.weight, p, min_dim=1)
    found = theirs(family, their.train())
    correction = 1.0
    for bond in bonds:
        size = layer.rank[bond]
        correction *= 1 + p**size / size / (1 - p)
    torch.testing.assert_close(ours * correction, found, rtol=1e-10, atol=1e-12)
    large = rank == 40 and family != "Tucker"  # whose kernel axes have rank 2
    assert correction == pytest.approx(1, abs=1e-14) if large else correction > 1 + 1e-3


@pytest.mark.parametrize("family", LAYERS)
def test_the_lasso_is_their_penalty_where_terms_have_norm_one(family):
    layer, their = both(family, 5)
    for number, bond in enumerate(BONDS[family]):
        squares = term_squares(layer.network, list(layer.cores), bond).detach()
        unit = scaled(layer.network, list(layer.cores), [(bond, squares.rsqrt())])
        with torch.no_grad():
            for core, value in zip(layer.cores, unit, strict=True):
                core.copy_(value)
        their = tnlayers.to_tltorch(layer)
        weights = torch.randint(1, 17, (layer.rank[bond],)).double() / 16  # TT's are float32
        ours = scaled(layer.network, list(layer.cores), [(bond, weights)])
        penalty = tensor_lasso(family, penalty=1, normalize_loss=False)
        penalty.apply(their.weight)
        held = [their.weight.lasso_weights] if family == "CP" else [*their.weight.lasso_weights]
        with torch.no_grad():
            held[number].copy_(weights.view_as(held[number]))
        kernel = theirs(family, their)
        others = sum(weight.numel() for weight in held) - len(weights)
        found = term_squares(layer.network, ours, bond).sqrt().sum()
        torch.testing.assert_close(found, (penalty.loss - others).detach().to(found), rtol=1e-10, atol=1e-10)
        if family != "CP":  # whose weights their lasso penalises, and leaves out of the kernel
            torch.testing.assert_close(kernel.detach(), reconstruct(layer.network, ours).detach(), rtol=1e-10, atol=0)
