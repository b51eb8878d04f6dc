"""Rounding of trees, against singular value decompositions of the dense kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnlayers
from tnlayers import TensorNetwork
from tnlayers.fitting.cuts import cuts
from tnlayers.fitting.resizing import truncate
from tnlayers.fitting.trees import round_tree, tree
from tnlayers.ops.contraction import reconstruct


def drawn(network: TensorNetwork, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in network.core_shapes]


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def tt_svd(tensor: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Oseledets' Algorithm 1, contracted again."""
    sizes, left, found = tensor.shape, tensor.reshape(1, -1), []
    for size, rank in zip(sizes, ranks, strict=False):
        vectors, values, right = torch.linalg.svd(left.reshape(left.shape[0] * size, -1), full_matrices=False)
        found.append(vectors[:, :rank].reshape(-1, size, rank))
        left = values[:rank, None] * right[:rank]
    whole = left
    for core in reversed(found):
        whole = (core.flatten(0, 1) @ whole.flatten(1).reshape(core.shape[2], -1)).reshape(core.shape[0], -1)
    return whole.reshape(sizes)


def test_a_train_is_rounded_as_tt_svd_rounds_its_kernel():
    network = TensorNetwork.parse("o1:5 a:4, a o2:4 b:6, b i1:4 c:4, c i2:5")
    cores = drawn(network)
    kernel = reconstruct(network, cores).reshape(network.shape(network.dense_axes))
    found = truncate(network, cores, ["a", "b", "c"], sizes={"a": 2, "b": 3, "c": 2})
    expected = tt_svd(kernel, (2, 3, 2))
    rounded = reconstruct(found.network, found.cores).reshape(kernel.shape)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-10 * float(kernel.norm()))
    assert found.error == pytest.approx(off(expected, kernel), abs=1e-10)


def test_two_cores_get_the_best_fit_also_block_by_block():
    """Eckart and Young; of BlockTT, for each pair of the indices that both cores have."""
    for text in ("i:7 r:5, r o:6", "i1:3 i2:4 o1:2 r:4, r i1 o1 o2:5"):
        network = TensorNetwork.parse(text)
        cores = drawn(network)
        found = truncate(network, cores, ["r"], sizes={"r": 2})
        kernel = reconstruct(network, cores)
        (cut, *_) = cuts(network, kernel)
        assert found.error**2 == pytest.approx(float(cut.loss[2]), abs=1e-10)
        assert off(reconstruct(found.network, found.cores), kernel) == pytest.approx(found.error, abs=1e-10)


@st.composite
def trees(draw: st.DrawFn) -> TensorNetwork:
    """Trees of up to six cores: any shape, dense axes on any core, an axis that all cores have."""
    count = draw(st.integers(2, 6))
    cores: list[list[str]] = [[] for _ in range(count)]
    sizes = {}
    for k in range(1, count):
        for core in (k, draw(st.integers(0, k - 1))):
            cores[core].append(f"r{k}")
        sizes[f"r{k}"] = draw(st.integers(1, 4))
    for axis in ("o1", "o2", "i1", "i2", "h"):
        cores[draw(st.integers(0, count - 1))].append(axis)
        sizes[axis] = draw(st.integers(1, 3))
    if draw(st.booleans()):
        for core in cores:
            core.append("i3")
        sizes["i3"] = 2
    return TensorNetwork(tuple(tuple(draw(st.permutations(core))) for core in cores), sizes)


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 99), st.data())
def test_the_error_of_any_tree_is_between_its_bounds(network: TensorNetwork, seed: int, data: st.DataObject):
    """At least what the worst bond must lose, at most what all lose together, and the one returned."""
    found = tree(network)
    assert found is not None
    cores = drawn(network, seed)
    sizes = {bond: data.draw(st.integers(1, network.sizes[bond])) for bond in found.links}
    new = truncate(network, cores, [*sizes], sizes=sizes)
    assert {bond: new.network.sizes[bond] for bond in sizes} == sizes
    kernel = reconstruct(network, cores)
    error = off(reconstruct(new.network, new.cores), kernel)
    assert error == pytest.approx(new.error, abs=1e-7)
    losses = [lost(network, kernel, bond, size) for bond, size in sizes.items()]
    assert max(losses) - 1e-10 <= error**2 <= sum(losses) + 1e-10


def lost(network: TensorNetwork, kernel: torch.Tensor, bond: str, size: int) -> float:
    """The share of the squared norm beyond a rank, of the unfolding that a bond of a tree cuts."""
    part, before = {next(k for k, core in enumerate(network.cores) if bond in core)}, set()
    while part != before:
        before = set(part)
        axes = {axis for k in part for axis in network.cores[k]} - {bond, *network.dense_axes}
        part |= {k for k, core in enumerate(network.cores) if axes & set(core)}
    here = {axis for k in part for axis in network.cores[k]}
    common = [axis for axis in network.dense_axes if all(axis in core for core in network.cores)]
    rows = [axis for axis in network.dense_axes if axis in here and axis not in common]
    columns = [axis for axis in network.dense_axes if axis not in here and axis not in common]
    order = [network.dense_axes.index(axis) for axis in common + rows + columns]
    split = kernel.reshape(network.shape(network.dense_axes)).permute(order)
    matrices = split.reshape(math.prod(network.shape(common)), math.prod(network.shape(rows)), -1)
    squares = torch.linalg.svdvals(matrices).square().sum(0)
    return float(squares[size:].sum() / squares.sum())


@pytest.mark.parametrize("limit", [0.4, 1e-3])
@pytest.mark.parametrize("name", [name for name in tnlayers.FORMATS if name != "einsum"])
def test_an_error_is_kept_with_smaller_bonds(name, limit):
    """By rounding or by fits: of bonds that have directions of sizes 1, 1/8, 1/64, ..."""
    torch.manual_seed(0)
    layer = getattr(tnlayers, f"{tnlayers.FORMATS[name].__name__}Linear")(12, 12, rank=4, dtype=torch.float64)
    with torch.no_grad():
        for bond in layer.rank:
            dim = layer.network.cores[(k := next(k for k, c in enumerate(layer.network.cores) if bond in c))].index(
                bond
            )
            shape = [-1 if axis == dim else 1 for axis in range(layer.cores[k].ndim)]
            layer.cores[k].mul_(8.0 ** -torch.arange(4).reshape(shape))
    kernel, before = layer.weight.detach(), dict(layer.rank)
    error = layer.truncate_(error=limit)
    assert off(layer.weight.detach(), kernel) == pytest.approx(error, abs=1e-7)
    assert error <= limit
    if limit > 1e-2:
        assert sum(layer.rank.values()) < sum(before.values())


def test_an_energy_is_kept_in_every_unfolding():
    network = TensorNetwork.parse("i1:4 a:4, a i2:4 b:8, b o:8")
    cores = drawn(network)
    found = truncate(network, cores, ["a", "b"], energy=0.8)
    kernel = reconstruct(network, cores)
    for bond in ("a", "b"):
        size = found.network.sizes[bond]
        assert lost(network, kernel, bond, size) <= 0.2 < lost(network, kernel, bond, size - 1) + 0.2


def test_bonds_above_the_kernels_rank_are_filled_up_and_learn():
    """A rank that neighbouring axes do not allow: the size that was asked for, with entries that get gradients."""
    network = TensorNetwork.parse("i:2 a:6, a h:2 b:6, b o:3")
    cores = drawn(network)
    found = truncate(network, cores, ["a", "b"], sizes={"a": 5, "b": 5})
    assert found.network.sizes["a"] == found.network.sizes["b"] == 5
    assert found.error < 1e-12
    new = [core.requires_grad_() for core in found.cores]
    kernel = reconstruct(found.network, new)
    assert off(kernel.detach(), reconstruct(network, cores)) < 1e-12
    (kernel * torch.randn(kernel.shape, dtype=torch.float64)).sum().backward()
    for dim, pair in ((1, new[:2]), (0, new[1:])):
        one, other = (core.grad.movedim(-1 if k == 0 else 0, 0).flatten(1).any(1) for k, core in enumerate(pair))
        assert bool((one | other).all()), dim


def test_what_is_no_tree_is_told():
    for text in ("a:2 i:4 b:2, b h:3 c:2, c o:4 a", "i:2 r:2, o:2 r, h:3 r", "i:2 a:2 b:2, a b o:2", "o:2 i:2",
                 "n:2 i:2 a:2, n a o:2", "i:4 a:2 h:2, a o1:2 b:2, b o2:2 i"):  # fmt: skip
        assert tree(TensorNetwork.parse(text)) is None, text
    assert tree(TensorNetwork.parse("n:1 i:2 a:2, n a h:2 b:2, n b o:2")) is not None


def test_rounding_multiplies_bonds_by_matrices_that_cancel():
    """With the old cores, they give the new ones; on a bond that loses nothing, they are inverse to each other."""
    network = TensorNetwork.parse("i:4 a:3, a h:3 b:3, b o:4")
    found, cores = tree(network), drawn(network)
    rounded = round_tree(network, found, cores, lambda bond, squares, total: 2)
    legs = rounded.legs
    for bond, (left, right) in found.links.items():
        product = legs[left, bond].mT @ legs[right, bond]
        torch.testing.assert_close(product[0], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
    expected = torch.einsum("ahb,ac,bd->chd", cores[1], legs[1, "a"][0], legs[1, "b"][0])
    torch.testing.assert_close(rounded.cores[1], expected, rtol=0, atol=1e-10)
