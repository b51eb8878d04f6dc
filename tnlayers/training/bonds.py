r"""Size and importance of the entries of a bond.

If a bond is held at entry j, the network contracts to a term :math:`W_j` of the kernel, and :math:`W = \sum_j W_j`. A
matrix X inserted at a bond between two cores gives :math:`W(X)`, which is linear in X, with :math:`W(I) = W`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tnlayers.ops.contraction import contract
from tnlayers.ops.squared_norm import copy
from tnlayers.spec.network import TensorNetwork


def term_squares(network: TensorNetwork, cores: Sequence[Tensor], bond: str) -> Tensor:
    """Return the squared norm of the term of each entry of a bond, differentiable in the cores.

    Example:
        >>> network = TensorNetwork.parse("i:3 r:2, r o:5")
        >>> term_squares(network, [torch.ones(3, 2), torch.ones(2, 5)], "r")
        tensor([15., 15.])
    """
    copies = [copy(core, (*network.dense_axes, bond)) for core in network.cores]
    return contract([*cores] * 2, [*network.cores, *copies], (bond,)).clamp(min=0)


def homes(network: TensorNetwork, bond: str) -> list[int]:
    """Return the numbers of the cores that have a bond."""
    return [k for k, core in enumerate(network.cores) if bond in core]


def largest_useful(network: TensorNetwork, bond: str) -> float:
    """Return the size of a bond beyond which it adds nothing, at the present sizes of the others.

    Example:
        >>> largest_useful(TensorNetwork.parse("i:9 a:8, a b:3, b o:9"), "a")
        3
    """
    axes = [{*network.cores[k]} - {bond} for k in homes(network, bond)]
    if len(axes) != 2:
        return math.inf
    common = axes[0] & axes[1]  # which only indexes matrices of this rank
    return min(math.prod(network.shape(side - common)) for side in axes)


def balancing(network: TensorNetwork, cores: Sequence[Tensor], bond: str) -> tuple[Tensor, Tensor]:
    r"""Return a change of basis of a bond that separates large terms from small ones, and its inverse.

    With T in the first core and its inverse in the last, the kernel stays the same. Its terms are orthogonal, and
    sorted by falling norm, if removing the bond cuts the network in two: they are then the singular components of the
    kernel between the two parts. In rings the Gram matrices :math:`L_{xx'} = \sum_y \langle W(e_x e_y^T), W(e_{x'}
    e_y^T) \rangle` and R of the other side are made equal and diagonal, as in a balanced realisation. A bond of three
    or more cores keeps its basis, since no other has such terms.

    Terms without a share of the kernel have zeros in both matrices.

    Returns:
        tuple[Tensor, Tensor]: T and its inverse, each of shape (size, size), in the cores' dtype.

    Example:
        >>> network = TensorNetwork.parse("i:3 r:2, r o:2")
        >>> turned, back = balancing(network, [torch.ones(3, 2), torch.eye(2)], "r")
        >>> squares = term_squares(network, [torch.ones(3, 2) @ turned, back @ torch.eye(2)], "r")
        >>> [round(square, 4) for square in squares.tolist()]
        [6.0, 0.0]
    """
    places = homes(network, bond)
    size = network.sizes[bond]
    if len(places) != 2:
        same = torch.eye(size, dtype=cores[0].dtype, device=cores[0].device)
        return same, same
    one, other = (_root(_gram(network, cores, bond, end)) for end in places)
    left, values, right = torch.linalg.svd(one.mT @ other)
    scale = values.rsqrt().where(values > values[0] * size * torch.finfo(values.dtype).eps, 0)
    return other @ right.mT * scale, scale[:, None] * (left.mT @ one.mT)


def _gram(network: TensorNetwork, cores: Sequence[Tensor], bond: str, end: int) -> Tensor:
    """Return the Gram matrix of the bond's entries in one of its two cores, summed over those in the other."""
    other = f"{bond}*"
    ends = [
        tuple(other if axis == bond and k != end else axis for axis in core) for k, core in enumerate(network.cores)
    ]
    copies = [copy(axes, (*network.dense_axes, other)) for axes in ends]
    return contract([*cores] * 2, [*ends, *copies], (bond, f"{bond}'"))


def _root(gram: Tensor) -> Tensor:
    """Return a square root of a positive semi-definite matrix, as a matrix times its transpose."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def influence(
    network: TensorNetwork, bond: str, core: Tensor, gradient: Tensor, basis: tuple[Tensor, Tensor]
) -> Tensor:
    r"""Return the derivative of the loss by the factor of each term of a bond, in a basis of ``balancing``.

    It equals :math:`\langle \partial L / \partial W, W_j \rangle`: minus the change of the loss, to first order in the
    kernel, if the term is removed.

    Args:
        network: the layer's network.
        bond: the bond.
        core: the first core that has the bond.
        gradient: the loss' gradient by this core.
        basis: result of ``balancing``.
    """
    axes = network.cores[homes(network, bond)[0]]
    twin = tuple(f"{bond}'" if axis == bond else axis for axis in axes)
    turned, back = basis
    if len(homes(network, bond)) != 2:
        return contract([core, gradient], [axes, axes], (bond,))
    inserted = contract([core, gradient], [axes, twin], (bond, f"{bond}'"))
    return ((inserted @ back.mT) * turned).sum(0)
