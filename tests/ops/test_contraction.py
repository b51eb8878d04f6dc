"""Contractions of cores, and the memory of a training step."""

import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import networks
from tnlayers.ops.contraction import Contraction, order
from tnlayers.planning.memory import MemoryEstimate

SIZES = st.integers(0, 1 << 40)


def random_pairs(count: int, seed: int) -> list[tuple[int, int]]:
    """Any order of contraction, disconnected operands included."""
    draw, alive, pairs = random.Random(seed), list(range(count)), []
    while len(alive) > 1:
        pair = draw.sample(alive, 2)
        alive = [number for number in alive if number not in pair] + [count + len(pairs)]
        pairs.append((pair[0], pair[1]))
    return pairs


@settings(max_examples=150, deadline=None)
@given(networks(max_cores=6), st.integers(0, 1 << 16), st.booleans())
def test_any_order_equals_einsum(network, seed, greedy):
    """The result and its gradients, each by one formula of its own and by autograd."""
    torch.manual_seed(seed)
    cores = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in network.core_shapes]
    out = tuple(random.Random(seed).sample(network.dense_axes, len(network.dense_axes)))
    shape = [network.sizes[axis] for axis in out]
    expected = torch.einsum(network.equation, *cores).permute([network.dense_axes.index(axis) for axis in out])
    if greedy:
        contraction = order(network.cores, out, tuple(network.sizes.items()))
    else:
        contraction = Contraction.of(network.cores, random_pairs(len(cores), seed), out, network.sizes)
    found = contraction(cores)
    gradient = torch.randn(shape, dtype=torch.float64)
    scale = float(expected.detach().abs().max()) + 1
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-10, atol=1e-10)
    pairs = zip(
        torch.autograd.grad(found, cores, gradient), torch.autograd.grad(expected, cores, gradient), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (float(other.abs().max()) + 1))
    assert contraction.flops >= 0
    assert len(contraction.steps) == len(cores) - 1


@settings(max_examples=300, deadline=None)
@given(
    SIZES, st.lists(SIZES, min_size=2, max_size=6), st.data(), st.integers(0, 1 << 43), st.integers(1, 64),
)  # fmt: skip
def test_the_fewest_parts_that_fit(weights, tensors, data, limit, most):
    meetings = len(tensors) - 1
    copies = data.draw(st.lists(SIZES, min_size=meetings, max_size=meetings))
    kept = data.draw(st.lists(st.booleans(), min_size=meetings - 1, max_size=meetings - 1))
    found = MemoryEstimate(weights, tuple(tensors), tuple(copies))
    parts = found.chunks(kept, limit, most)
    if parts:
        assert parts == 1 or parts <= most
        assert found.peak(kept, parts) <= limit
        assert parts == 1 or found.peak(kept, 1) > limit
        assert parts <= 2 or found.peak(kept, parts - 1) > limit - 1  # whole bytes
    else:
        assert all(found.peak(kept, p) > limit - 1 for p in range(1, most + 1))


def test_what_is_made_again_is_not_held():
    found = MemoryEstimate(weights=0, tensors=(10, 100, 10), copies=(0, 0))
    assert found.peak((True,), 1) == 10 + 2 * 10 + 100 + max(10 + 100, 100)
    assert found.peak((False,), 10) == 10 + 2 * 10 + 10 + (100 + 100) // 10
    assert math.isclose(found.peak((True,), 10), 10 + 2 * 10 + 10 + 100 + 100 // 10)
