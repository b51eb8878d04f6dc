"""Scales between cores (gauge) that do not change the kernel, but how fast it learns.

A value of shared axes (a bond, or several axes) selects a slice of each core that has them. One of these slices may be
scaled up and another down. A fit leaves such scales arbitrary: far apart where they hardly matter, as for parts of a
kernel that are zero. The gradient of a slice is a product with the others, so large slices give small ones large
gradients.
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
"""A kernel below this share of the norm of the solver's draws is nearly zero. Trained kernels are well above."""
ROUNDS = 10
"""Rounds over all sets of shared axes. Each round changes the other slices less."""


def level(network: TensorNetwork, cores: Sequence[Tensor]) -> list[Tensor]:
    """Rescale cores to one norm, and the slices of each shared value nearly to one norm, with the kernel unchanged.

    If the product of the slices' norms is nearly zero, only one of them is small. The others have the norm of other
    values' slices, as ``tnlayers.layers.zero_kernels`` does for whole kernels.

    Example:
        >>> network = TensorNetwork.parse("i:1 r:2, r o:1")
        >>> left, right = level(network, [torch.tensor([[8.0, 1.0]]), torch.tensor([[2.0], [1.0]])])
        >>> left / left[0, 1], right / right[1, 0]
        (tensor([[4., 1.]]), tensor([[4.],
                [1.]]))
    """
    return levelled(network, cores)[0]


def levelled(network: TensorNetwork, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the result of ``level``, and the factor of each entry of each core."""
    found, scales = list(cores), [torch.ones_like(core) for core in cores]
    shared = dict.fromkeys(tuple(axis for axis in a if axis in b) for a, b in combinations(network.cores, 2))
    for _ in range(ROUNDS):
        for axes in filter(None, shared):
            homes = [k for k, core in enumerate(network.cores) if set(core) >= set(axes)]
            norms = torch.stack([_norms(found[k], network.cores[k], axes) for k in homes])
            for k, factor in zip(homes, _factors(norms), strict=True):
                core = network.cores[k]
                order = [axes.index(axis) for axis in core if axis in axes]
                shape = [size if axis in axes else 1 for axis, size in zip(core, found[k].shape, strict=True)]
                fitting = factor.permute(order).reshape(shape)
                found[k], scales[k] = found[k] * fitting, scales[k] * fitting
    balanced = balance(found)
    lengths = [(float(new.norm()), float(old.norm())) for new, old in zip(balanced, found, strict=True)]
    return balanced, [s * (new / old if old else 1.0) for s, (new, old) in zip(scales, lengths, strict=True)]


def _norms(value: Tensor, core: Axes, axes: Axes) -> Tensor:
    """Return the norms of a core's slices, with a dimension for each of ``axes``."""
    moved = value.permute(permutation(core, axes + tuple(axis for axis in core if axis not in axes)))
    norms: Tensor = moved.reshape(*moved.shape[: len(axes)], -1).norm(dim=-1)
    return norms


def _factors(norms: Tensor) -> Tensor:
    """Return factors of slices with these norms. The first dimension is the core; the product over it is one."""
    means = norms.log().mean(0).exp()
    wanted = torch.where(means >= SMALL * means.max(), means, means.max())
    factors = torch.where(norms > 0, wanted / norms, 1.0)
    # The smallest slice gets the inverse of the others' factors.
    least = norms.argmin(0, keepdim=True)
    factors.scatter_(0, least, 1.0)
    return factors.scatter(0, least, 1 / factors.prod(0, keepdim=True))
