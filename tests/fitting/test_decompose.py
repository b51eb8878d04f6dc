import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import tnlayers
from tests.cases import FAMILIES
from tnlayers.fitting import decompose as decomposition
from tnlayers.fitting import objective
from tnlayers.fitting.decompose import decompose


def kernel(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (tnlayers.TuckerConv2d, (8, 6)),
        (tnlayers.TTConv2d, (6, 36, 4)),
        (tnlayers.BTTConv2d, (8, 6, 3, 2)),
    ],
)
def test_full_rank_is_exact(layer, rank):
    """At the rank of every unfolding any kernel can be written, and the fit finds it, to the square root of eps."""
    options = {"blocks": 1, "in_shape": (4, 2), "out_shape": (2, 3)} if layer is tnlayers.BTTConv2d else {}
    if layer is tnlayers.TTConv2d:
        options = {"in_shape": (4, 2), "out_shape": (3, 2)}
        rank = (6, 4)
    made = layer(8, 6, (3, 2), rank=rank, dtype=torch.float64, **options)
    weight = kernel(6, 8, 3, 2)
    assert made.set_weight_(weight) < 1e-6
    torch.testing.assert_close(made.weight.detach(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [tnlayers.CPConv2d, tnlayers.TuckerConv2d, tnlayers.TTConv2d, tnlayers.TRConv2d, tnlayers.BTTConv2d],
)
def test_error_falls_with_rank_and_is_the_one_returned(layer):
    weight = kernel(6, 8, 3, 3)
    errors = []
    for rank in (1, 2, 4):
        made = layer(8, 6, 3, rank=rank, dtype=torch.float64)
        errors.append(made.set_weight_(weight))
        found = float((made.weight.detach() - weight).norm() / weight.norm())
        assert errors[-1] == pytest.approx(found, rel=1e-6)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("layer", FAMILIES)
def test_no_large_terms_cancel(layer):
    """Rounding the cores to bfloat16 changes the kernel less than the fit itself does.

    The kernel is a sum of tangents, near which terms of opposite sign can grow without limit, and a little noise.
    """
    draw = torch.Generator().manual_seed(2)
    weight = torch.zeros(12, 12, 9, dtype=torch.float64)
    for _ in range(2):
        (a, da), (b, db), (c, dc) = (torch.randn(2, n, dtype=torch.float64, generator=draw) for n in weight.shape)
        weight += sum(torch.einsum("o,i,k->oik", *term) for term in ((da, b, c), (a, db, c), (a, b, dc)))
    weight += 0.05 * weight.square().mean().sqrt() * torch.randn(weight.shape, dtype=torch.float64, generator=draw)
    made = layer(12, 12, 3, rank=2, dtype=torch.float64)
    error = made.set_weight_(weight.reshape(12, 12, 3, 3))
    fit = made.weight.detach().clone()
    with torch.no_grad():
        for core in made.cores:
            core.copy_(core.bfloat16())
        change = (made.weight - fit).norm() / weight.norm()
    assert float(change) < error


@pytest.mark.parametrize("direct", [1, 1024])
@pytest.mark.parametrize("text", ["a i b, b h c, c a d, d o", "i r, o r, h r"])
def test_a_sweep_lowers_the_merit_and_tells_the_error(text, direct, monkeypatch):
    """From any cores, whether the equations are solved directly or not, and also if other cores are not connected."""
    monkeypatch.setattr(objective, "DIRECT", direct)
    monkeypatch.setattr(objective, "RIDGE", 0.05)
    network = decompose(kernel(6, 5, 4), text, rank=3).network
    draw = torch.Generator().manual_seed(0)
    cores = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in network.core_shapes]
    target = kernel(*network.shape(network.dense_axes))
    fit = objective.Objective(network, target / target.norm())
    error = fit.error(cores)
    for _ in range(5):
        found, told = fit.sweep(cores, error)
        assert told == pytest.approx(fit.error(found), rel=1e-9)
        assert fit.merit(told, found) < fit.merit(error, cores)
        cores, error = found, told


def test_the_fit_is_deterministic_and_leaves_the_generators_alone():
    network, weight = tnlayers.CPConv2d(4, 4, 3, rank=3).network, kernel(4, 4, 3, 3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = decompose(weight, network)
    assert torch.equal(torch.get_rng_state(), state)
    second = decompose(weight, network)
    assert first.error == second.error
    assert all(torch.equal(a, b) for a, b in zip(first.cores, second.cores, strict=True))
    assert not torch.equal(decompose(weight, network, seed=1).cores[0], first.cores[0])


def test_ranks_above_a_dimension_are_fitted_not_wrong():
    made = tnlayers.TuckerConv2d(3, 4, 3, rank=10, dtype=torch.float64)
    assert made.set_weight_(kernel(4, 3, 3, 3)) < 1e-6


def test_zero_and_tiny_kernels():
    network = tnlayers.TRConv2d(4, 4, 3, rank=3).network
    found = decompose(torch.zeros(4, 4, 3, 3), network)
    assert found.error == 0
    assert not any(core.any() for core in found.cores)
    made = tnlayers.TuckerConv2d(4, 4, 3, rank=4, dtype=torch.float64)
    assert made.set_weight_(1e-30 * kernel(4, 4, 3, 3)) < 1e-6


def test_from_conv_fits_and_copies():
    conv = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect", dtype=torch.float64).eval()
    layer = tnlayers.TuckerConv2d.from_conv(conv, rank=(8, 6))
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-5)
    assert not layer.training
    grouped = nn.Conv2d(8, 6, 3, groups=2, bias=False, dtype=torch.float64)
    layer = tnlayers.TuckerConv2d.from_conv(grouped, rank=(4, 6))
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), grouped(x), rtol=0, atol=1e-5)
    assert layer.bias is None


def test_large_cores_are_fitted_by_conjugate_gradients(monkeypatch):
    """The same problem through both solvers: the error falls to nothing either way."""
    weight = kernel(6, 8, 3, 2)
    for limit in (objective.DIRECT, 0):
        monkeypatch.setattr(objective, "DIRECT", limit)
        made = tnlayers.TuckerConv2d(8, 6, (3, 2), rank=(8, 6), dtype=torch.float64)
        assert made.set_weight_(weight) < 1e-5
        lossy = tnlayers.CPConv2d(8, 6, (3, 2), rank=12, dtype=torch.float64).set_weight_(weight)
        assert 0.01 < lossy < 0.8


def test_block_terms_of_ordinary_size_fit_in_memory(monkeypatch):
    """The normal matrix of this core would have 60 million entries."""
    layer = tnlayers.BTTConv2d(64, 64, 3)
    core = layer.network.cores[0]
    assert math.prod(layer.network.shape(core)) > 7000
    monkeypatch.setattr(decomposition, "SWEEPS", 2)
    assert layer.set_weight_(torch.randn(64, 64, 3, 3)) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_is_that_of_the_layer_as_its_dtype_holds_it(dtype):
    layer = tnlayers.TuckerConv2d(8, 12, 3, rank=(8, 12), dtype=dtype)
    weight = torch.randn(12, 8, 3, 3).double()
    found = layer.set_weight_(weight)
    error = float((layer.weight.detach().double() - weight).norm() / weight.norm())
    # Each access multiplies the cores anew in their dtype, which need not round alike twice.
    assert found == pytest.approx(error, rel=torch.finfo(dtype).eps)


def test_a_fit_that_the_dtype_cannot_multiply_out_is_refused():
    """Cores that float16 holds, with a product that it does not."""
    layer = tnlayers.TRConv2d(8, 12, 3, rank=8, dtype=torch.float16)
    before = layer.weight
    with pytest.raises(ValueError, match="cannot hold its fit or the cores' product"):
        layer.set_weight_(kernel(12, 8, 3, 3) * 1e6)
    assert torch.equal(layer.weight, before)
    assert layer.set_weight_(kernel(12, 8, 3, 3) * 1e-20) == 1.0  # all of it is lost, and the error says so
    fine = tnlayers.TRConv2d(8, 12, 3, rank=8, dtype=torch.float64)
    assert fine.set_weight_(kernel(12, 8, 3, 3) * 1e-200) < 1


def test_fitting_ignores_the_default_device():
    layer = tnlayers.TuckerConv2d(4, 4, 3, rank=4)
    weight = kernel(4, 4, 3, 3)
    with torch.device("meta"):
        assert layer.set_weight_(weight) < 1e-3


@pytest.mark.parametrize("rank", [1, 2])
def test_blocks_without_entries_are_fitted(rank):
    torch.manual_seed(0)
    weight = torch.randn(32, 32)
    weight[:8] = 0
    weight[:, :4] = 0
    layer = tnlayers.BlockTTLinear(32, 32, rank=rank)
    assert layer.set_weight_(weight) < 1
    assert torch.isfinite(layer.weight).all()


def test_block_tensor_train_of_full_rank_is_exact():
    """Each pair of blocks is a matrix of its own, whose rank is at most the smaller of its sides."""
    torch.manual_seed(0)
    shapes = {"in_shape": (4, 6), "out_shape": (6, 6)}
    layer = tnlayers.BlockTTLinear(24, 36, rank=6, **shapes, dtype=torch.float64)
    assert layer.set_weight_(torch.randn(36, 24, dtype=torch.float64)) < 1e-9


@pytest.mark.slow
def test_a_kernel_of_fourteen_million_entries_fits_in_four_gibibytes():
    code = """if True:
        import resource, torch, tnlayers
        tnlayers.CPConv3d.from_conv(torch.nn.Conv3d(1024, 512, 3), rank=64)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"""  # from KiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4
