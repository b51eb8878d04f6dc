"""The scales between cores that leave their kernel as it is, but not how it learns.

What cores share, a value of a bond or of several axes, is a slice of each of them, and of these one may be scaled up
and another down. A fit leaves such scales where its sweeps ended: far apart where they hardly count, as behind parts of
a kernel that are zero. The gradient of a slice is a product with the others, so that the largest tear the smallest up.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from tnlayers.backend.views import permutation
from tnlayers.fitting.objective import balance
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

SMALL = 1e-2
"""A kernel below this share of the norm that the solver draws is nearly zero. Trained kernels are well above."""
ROUNDS = 10
"""Over all that cores share; each changes the other slices a little less."""


def level(network: TensorNetwork, cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores of the same kernel, all of one norm, and nearly so the slices of all cores that have a shared value.

    Where the product of the slices' norms is nearly zero, one of them alone is small, and the others are as those of
    other values: what is said of whole kernels in ``tnlayers.layers.zero_kernels``.

    Example:
        >>> network = TensorNetwork.parse("i:1 r:2, r o:1")
        >>> left, right = level(network, [torch.tensor([[8.0, 1.0]]), torch.tensor([[2.0], [1.0]])])
        >>> left / left[0, 1], right / right[1, 0]
        (tensor([[4., 1.]]), tensor([[4.],
                [1.]]))
    """
    found = list(cores)
    shared = dict.fromkeys(tuple(axis for axis in a if axis in b) for a, b in combinations(network.cores, 2))
    for _ in range(ROUNDS):
        for axes in filter(None, shared):
            homes = [k for k, core in enumerate(network.cores) if set(core) >= set(axes)]
            norms = torch.stack([_norms(found[k], network.cores[k], axes) for k in homes])
            for k, factor in zip(homes, _factors(norms), strict=True):
                core = network.cores[k]
                order = [axes.index(axis) for axis in core if axis in axes]
                shape = [size if axis in axes else 1 for axis, size in zip(core, found[k].shape, strict=True)]
                found[k] = found[k] * factor.permute(order).reshape(shape)
    return balance(found)


def _norms(value: Tensor, core: Axes, axes: Axes) -> Tensor:
    """The norms of a core's slices, with a dimension for each of ``axes``."""
    moved = value.permute(permutation(core, axes + tuple(axis for axis in core if axis not in axes)))
    norms: Tensor = moved.reshape(*moved.shape[: len(axes)], -1).norm(dim=-1)
    return norms


def _factors(norms: Tensor) -> Tensor:
    """By what to multiply slices of these norms, the first dimension telling the core; the product over it is one."""
    means = norms.log().mean(0).exp()
    wanted = torch.where(means >= SMALL * means.max(), means, means.max())
    factors = torch.where(norms > 0, wanted / norms, 1.0)
    # What the others gain, the smallest loses.
    least = norms.argmin(0, keepdim=True)
    factors.scatter_(0, least, 1.0)
    return factors.scatter(0, least, 1 / factors.prod(0, keepdim=True))
