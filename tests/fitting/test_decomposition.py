import pytest
import torch

import tnlayers
from tnlayers import TensorNetwork, decompose


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(found: tnlayers.Decomposition, value: torch.Tensor) -> None:
    again = found.to_tensor()
    assert again.shape == value.shape
    assert found.error == pytest.approx(float((again - value).norm() / value.norm()), abs=1e-7)
    assert [core.shape for core in found.cores] == [torch.Size(shape) for shape in found.network.core_shapes]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2, 3), (2, 3, 2, 2, 3, 2)])
@pytest.mark.parametrize("name", [name for name in tnlayers.FORMATS if name != "einsum"])
def test_every_format_decomposes_tensors_of_any_number_of_axes(name, shape):
    value = tensor(*shape)
    # BlockTT takes two factors.
    found = decompose(value, name, rank=1, in_shape=(12, 6) if name == "blocktt" and len(shape) > 5 else None)
    check(found, value)
    assert found.network.dense_params == value.numel()


def test_it_is_what_the_layers_call():
    weight = tensor(12, 8, 3, 3)
    layer = tnlayers.TuckerConv2d(8, 12, 3, rank=4, dtype=torch.float64)
    error = layer.set_weight_(weight)
    found = decompose(weight, "tucker", rank=4)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found.cores, layer.cores, strict=True))


def test_a_text_names_the_axes():
    value = tensor(3, 4, 5, 2)
    found = decompose(value, "o1 a, a o2 b, b i1 c, c i2", rank=(2, 3, 2))
    assert found.network == TensorNetwork.parse("o1:3 a:2, a o2:4 b:3, b i1:5 c:2, c i2:2")
    check(found, value)
    split = decompose(tensor(12, 8), "o1 i1 a, a o2 i2", rank=3, out_shape=(4, 3), in_shape=(2, 4))
    assert split.network.core_shapes == ((4, 2, 3), (3, 3, 4))
    network = TensorNetwork.parse("o:12 a:2, a i:40")
    check(decompose(value.reshape(12, 10, 1).expand(12, 10, 4).reshape(12, 40), network), tensor(3, 4, 5, 2)
          .reshape(12, 10, 1).expand(12, 10, 4).reshape(12, 40))  # fmt: skip


def test_all_axes_but_the_first_can_be_factors_of_the_input():
    found = decompose(tensor(4, 3, 2, 2), "tr", rank=2, in_shape=(3, 2, 2))
    assert str(found.network) == "r0 i1 r1, r1 i2 r2, r2 i3 r3, r3 o r0"


def test_a_start_is_used():
    """From the cores of an exact fit, the fit is exact, however poor other starts are."""
    network = TensorNetwork.parse("o:6 r:5, i:6 r, h:6 r")
    truth = [tensor(*shape) * (k + 1) for k, shape in enumerate(network.core_shapes)]
    value = torch.einsum("ar,br,cr->abc", *truth)
    assert decompose(value, network, start=truth).error < 1e-12


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda: decompose(tensor(4, 4), "rt"), ValueError, "network is 'rt'; accepted: .*'tr'.*a network's text"),
        (lambda: decompose(tensor(4, 4), 3), TypeError, "network is 3; it must be a format's name"),
        (lambda: decompose(tensor(4), "tr"), ValueError, r"tensor has shape \(4,\); it must have at least two axes"),
        (lambda: decompose(tensor(4, 4), "einsum"), ValueError, "network is 'einsum'; accepted: .*a network's text"),
        (lambda: decompose(tensor(4, 4), tnlayers.formats.Einsum), TypeError, "network is .*Einsum.*a network's text"),
        (lambda: decompose(torch.empty(0, 4), "tr"), ValueError, r"tensor has shape \(0, 4\); it must have entries"),
        (lambda: decompose(torch.empty(4, 0, 3), "tt"), ValueError, r"shape \(4, 0, 3\); it must have entries"),
        (lambda: decompose(torch.eye(4).to_sparse(), "tr"), TypeError, "layout torch.sparse_coo; .*tensor.to_dense()"),
        (lambda: decompose([1.0], "tr"), TypeError, "tensor is of type list"),
        (lambda: decompose(tensor(4, 4) / 0, "tr"), ValueError, "tensor holds NaN or infinity"),
        (lambda: decompose(tensor(4, 4), "tt", layouts=1), TypeError, "layouts is 1, but decompose has no such"),
        (lambda: decompose(tensor(4, 4), "o a, a i", rank="x"), ValueError, "rank is 'x'; accepted: 'vbmf'"),
        (lambda: decompose(tensor(4, 4), "tr", in_shape=(3,)), ValueError, r"in_shape \(3,\) has product 3"),
        (lambda: decompose(tensor(4, 4), "tr", rank=1, moments=torch.eye(4), start=[tensor(1, 4, 1)] * 2),
         ValueError, "start is given with moments"),
        (lambda: decompose(tensor(4, 4), "tr", rank=1, start=[tensor(1, 5, 1)] * 2), ValueError, "core 0 has shape"),
        (lambda: decompose(tensor(4, 4), TensorNetwork.parse("i:4 o:4"), rank=2), ValueError, "rank is 2, but network"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
