import copy
import pickle

import einops
import pytest
import tensorly
import torch
from hypothesis import given, settings

import tnlayers
from networks import networks
from tnlayers import TensorNetwork
from tnlayers.ops.contraction import reconstruct

CP = TensorNetwork.parse("i:8 r:4, o:6 r, h:3 r, w:2 r")


def random_cores(network: TensorNetwork) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]


def test_counts_and_shapes():
    assert CP.bonds == ("r",)
    assert (CP.inputs, CP.outputs, CP.kernel) == (("i",), ("o",), ("h", "w"))
    assert CP.dense_shape == (6, 8, 3, 2)
    assert CP.core_shapes == ((8, 4), (6, 4), (3, 4), (2, 4))
    assert CP.num_params == 4 * (8 + 6 + 3 + 2)
    assert CP.dense_params == 6 * 8 * 3 * 2


def test_channel_axes_are_ordered_by_number_and_kernel_axes_as_torch_has_them():
    network = TensorNetwork.parse("w:2 i10:2 h:3 i2:4 a:2, a o1:5 d:6 o:7")
    assert network.inputs == ("i2", "i10")
    assert network.outputs == ("o", "o1")
    assert network.kernel == ("d", "h", "w")


def test_a_kernel_letter_in_two_cores_is_a_bond():
    network = TensorNetwork.parse("i:2 d:3, d o:4 h:2 w:2")
    assert network.bonds == ("d",)
    assert network.kernel == ("h", "w")


@settings(max_examples=100, deadline=None)
@given(network=networks())
def test_text_round_trips(network: TensorNetwork):
    assert TensorNetwork.parse(str(network), network.sizes) == network
    assert eval(repr(network)) == network
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network.resize({})):
        assert twin == network
        assert hash(twin) == hash(network)


@settings(max_examples=60, deadline=None)
@given(network=networks())
def test_reconstruct_equals_the_equation_and_einops(network: TensorNetwork):
    torch.manual_seed(0)
    cores = random_cores(network)
    found = reconstruct(network, cores)
    assert found.shape == network.dense_shape
    expected = torch.einsum(network.equation, *cores).reshape(network.dense_shape)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pattern = f"{', '.join(' '.join(core) for core in network.cores)} -> {' '.join(network.dense_axes)}"
    torch.testing.assert_close(found.flatten(), einops.einsum(*cores, pattern).flatten(), rtol=1e-10, atol=1e-10)


def test_immutable():
    with pytest.raises(TypeError):
        CP.sizes["r"] = 5
    with pytest.raises(AttributeError):
        CP.cores = ()


# ------------------------------------------------------------------ the same tensors as tensorly's


def test_cp_tucker_and_chain_equal_tensorly():
    kwargs = {"bias": False, "dtype": torch.float64}
    with tensorly.backend_context("pytorch"), torch.no_grad():
        layer = tnlayers.CPConv2d(8, 6, (3, 2), rank=5, **kwargs)
        i, o, h, w = layer.cores
        expected = tensorly.cp_to_tensor((torch.ones(5, dtype=torch.float64), [o, i, h, w]))
        torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=1e-12)
        layer = tnlayers.TuckerConv2d(8, 6, (3, 2), rank=(4, 3), **kwargs)
        i, core, o = layer.cores  # core: (ri, ro, h, w)
        expected = tensorly.tenalg.multi_mode_dot(core, [i, o.T], modes=[0, 1]).transpose(0, 1)
        torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=1e-12)
        layer = tnlayers.TTConv2d(8, 6, (3, 2), rank=(4, 3, 5), layout="chain", **kwargs)
        i, h, w, o = layer.cores
        expected = tensorly.tt_to_tensor([i[None], h, w, o[..., None]]).permute(3, 0, 1, 2)
        torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=1e-12)
        layer = tnlayers.TRConv2d(8, 6, (3, 2), rank=(2, 3, 4), in_shape=(8,), out_shape=(6,), **kwargs)
        i, kernel, o = layer.cores
        expected = tensorly.tr_to_tensor([i, kernel.flatten(1, 2), o]).unflatten(1, (3, 2)).permute(3, 0, 1, 2)
        torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=1e-12)
