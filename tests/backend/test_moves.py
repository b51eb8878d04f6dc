"""Chains of views and copies."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlayers.backend.moves import CONTIGUOUS, moved, needed, permute, reshape


@given(order=st.permutations(range(3)), flat=st.booleans())
def test_a_chain_gives_what_its_moves_give(order, flat):
    tensor = torch.arange(24).reshape(2, 3, 4)
    turned = tensor.permute(order)
    shape = (24,) if flat else tuple(turned.shape)
    chain = needed(tensor.shape, [reshape((2, 3, 4)), permute(order), reshape(shape), CONTIGUOUS])
    found = moved(tensor, chain)
    assert found.equal(turned.reshape(shape))
    assert found.is_contiguous()
    assert len(chain) == 1 + (order != [0, 1, 2]) + flat
    assert moved(tensor, needed(tensor.shape, [reshape((2, 3, 4)), permute((0, 1, 2))])) is tensor
