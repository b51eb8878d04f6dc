"""Random removal of bond entries in training: dropout of ranks.

Entry j of a bond is a term of the kernel: the kernel is the sum over j of networks whose bond is held at j. In each
forward of training, every term is dropped with probability p, and the kept ones are multiplied by a constant. The
kernel is linear in the factors of each bond, and bonds are drawn independently. So its expectation is the full kernel
if every factor has expectation 1.

At least one entry of a bond of size r is kept, at random. It is kept with probability :math:`1 - p + p^r / r`, and the
factor of the kept ones is one over this. tensorly-torch's tensor dropout, whose rule this is, has the factor
:math:`1 / (1 - p)`, so that its mean kernel is too large where r is small.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tnlayers.spec.network import TensorNetwork


def draw_factors(size: int, p: float, like: Tensor) -> Tensor:
    """Return the random factors of a bond's entries, of expectation 1: zero, or one over the probability to be kept.

    Example:
        >>> factors = draw_factors(4, 0.5, torch.empty(0))
        >>> bool((factors > 0).any()), draw_factors(1, 0.5, torch.empty(0))
        (True, tensor([1.]))
    """
    uniform = torch.rand(size, device=like.device)
    # The entry with the largest number is always kept.
    kept = uniform >= uniform.amax().clamp(max=p)
    return kept.to(like.dtype) / (1 - p + p**size / size)


def scaled(network: TensorNetwork, cores: Sequence[Tensor], factors: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    """Return the cores with the entries of bonds multiplied by factors, each in the first core that has the bond.

    Example:
        >>> network = TensorNetwork.parse("i:2 r:2, r o:2")
        >>> scaled(network, [torch.ones(2, 2), torch.ones(2, 2)], [("r", torch.tensor([0.0, 3.0]))])[0]
        tensor([[0., 3.],
                [0., 3.]])
    """
    found = list(cores)
    for bond, values in factors:
        home = next(k for k, core in enumerate(network.cores) if bond in core)
        shape = [-1 if axis == bond else 1 for axis in network.cores[home]]
        found[home] = found[home] * values.view(shape)
    return found


def thinned(network: TensorNetwork, bonds: Iterable[str], cores: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return the cores with entries of the given bonds dropped at random."""
    return scaled(network, cores, ((bond, draw_factors(network.sizes[bond], p, cores[0])) for bond in bonds))
