import pytest
import torch

import tnlayers
from tnlayers.fitting.vbmf import vbmf_rank


@pytest.mark.parametrize(("rows", "columns", "rank", "noise"), [
    (40, 90, 5, 0.5), (64, 64, 8, 0.7), (30, 300, 4, 1.0), (100, 50, 0, 1.0), (64, 576, 10, 0.5),
])  # fmt: skip
def test_the_rank_of_a_noisy_matrix_is_found(rows, columns, rank, noise):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(side, rank, generator=generator) for side in (rows, columns))
        matrix = left @ right.mT + noise * torch.randn(rows, columns, generator=generator)
        for scale in (1.0, 1e-20):
            assert vbmf_rank(torch.linalg.svdvals(matrix.double()) * scale, rows, columns) == rank, seed


def test_matrices_without_noise_and_without_entries():
    torch.manual_seed(0)
    matrix = torch.randn(20, 3).double() @ torch.randn(3, 30).double()
    assert vbmf_rank(torch.linalg.svdvals(matrix), 20, 30) == 3
    assert vbmf_rank(torch.zeros(5), 5, 9) == 0
    assert vbmf_rank(torch.ones(1), 1, 9) == 1


def noisy(*shape: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rest = torch.Size(shape[1:]).numel()
    left, right = (torch.randn(side, rank, generator=generator) for side in (shape[0], rest))
    return (left @ right.mT + 0.5 * torch.randn(shape[0], rest, generator=generator)).reshape(shape)


def test_it_is_a_rank_wherever_a_weight_is_given():
    linear = torch.nn.Linear(60, 50)
    with torch.no_grad():
        linear.weight.copy_(noisy(50, 60, rank=4))
    assert tnlayers.decompose(linear.weight, "tucker", rank="vbmf").network.sizes["ri"] == 4
    assert dict(tnlayers.TTLinear.from_linear(linear, rank="vbmf", layout="chain").rank) == {"r1": 4}
    model = torch.nn.Sequential(linear)
    config = tnlayers.TensorizeConfig("tucker", rank="vbmf")
    assert tnlayers.TensorizeConfig.from_dict(config.to_dict()) == config
    report = tnlayers.tensorize_(model, config)
    assert report["0"].rank == {"ri": 4, "ro": 4}
    layer = tnlayers.TuckerLinear.from_linear(linear, rank=20)
    assert layer.truncate_("vbmf") < 1
    assert dict(layer.rank) == {"ri": 4, "ro": 4}


def test_a_layer_of_exactly_low_rank_is_cut_to_it():
    torch.manual_seed(0)
    linear = torch.nn.Linear(60, 50)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(50, 5) @ torch.randn(5, 60))
    layer = tnlayers.TuckerLinear.from_linear(linear, rank=20)
    assert layer.truncate_("vbmf") < 1e-5
    assert dict(layer.rank) == {"ri": 5, "ro": 5}


def test_it_is_refused_where_there_is_no_weight():
    with pytest.raises(TypeError, match="rank is 'vbmf'; it must be an integer"):
        tnlayers.TRLinear(8, 8, rank="vbmf")
    with pytest.raises(ValueError, match="rank is 'vbmf', but decompose is False"):
        tnlayers.TensorizeConfig(rank="vbmf", decompose=False)
    with pytest.raises(ValueError, match="rank is 'bayes'; accepted: 'vbmf'"):
        tnlayers.TRLinear.from_linear(torch.nn.Linear(8, 8), rank="bayes")
    with pytest.raises(ValueError, match="weight is on the meta device"):
        tnlayers.TRLinear.from_linear(torch.nn.Linear(8, 8, device="meta"), rank="vbmf", decompose=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 30, 3), (64, 64, 8), (64, 320, 20)])
def test_the_rounding_of_a_dtype_is_no_rank(rows, columns, rank, dtype):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(side, rank, generator=generator).double() for side in (rows, columns))
        for matrix in ((left @ right.mT).to(dtype), (left.float() @ right.float().mT).to(dtype)):
            sizes = tnlayers.decompose(matrix, "tucker", rank="vbmf").network.sizes
            assert (sizes["ri"], sizes["ro"]) == (rank, rank), seed
