r"""Exact draws: cores rescaled such that the gain of one draw equals the target, on white and on smooth inputs.

The solver's rule holds on average over draws and for white inputs. The gain of one draw differs, at small ranks by
factors. The inputs of a deep layer are not white: after a rectifier every channel has a mean, and stacked convolutions
make neighbouring positions similar. Split an input patch into its mean and the rest, along channels and along taps. Let
F be the kernel's squared norm, and

.. math:: S = \Big\| \sum_{taps} W \Big\|^2, \qquad M = \Big\| \sum_{in} \sum_{taps} W \Big\|^2.

For inputs of unit square, F is the gain (times the outputs) on white patches, S on patches that are white over channels
and constant over taps, M on patches constant over both. For independent entries :math:`E[F] = E[S] = E[M]`. A
convolution with :math:`F = S = M` has the same gain on every mixture of the three kinds. Rectified white channels are
such a mixture: :math:`(1 - 1/\pi)` of the first or second kind and :math:`1/\pi` of the third.

Rescaling gives cores this property: multiply the mean of the core along each input axis by u, and along each kernel
axis by v. The parts of the kernel that are constant along p input and q kernel axes are then multiplied by
:math:`u^p v^q`. Let :math:`E_{p,q}` be the squared norms of these parts, computed by one contraction of the cores, for
m input axes of product N and k kernel axes of product K. Then :math:`S = M` and :math:`F = S` are

.. math:: (N - 1) \, E_{m,k} = \sum_{p<m} E_{p,k} \, u^{2(p-m)}, \qquad
          (K - 1) \sum_p E_{p,k} u^{2p} = \sum_{q<k} \sum_p E_{p,q} u^{2p} \, v^{2(q-k)}.

Each right side falls from infinity to zero, so each equation has one root. One common factor of all cores then sets the
gain. A reflection of the cores separates the parts in the kernel: the part constant along an axis moves to its index 0.

Derived here. ``benchmarks/measure/depth.py`` measures layers with these draws.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tnlayers.backend.torch_state import own_precision
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

MOST = 6
"""Maximum number of input axes to equalise: each subset of them is a part of the kernel."""
PROBES = 256
"""Number of random inputs in the estimate of ``typical``."""


def smooth(network: TensorNetwork, geometry: Geometry) -> tuple[Axes, Axes]:
    """Return the input and kernel axes along which to equalise the gain. Each is in one core alone.

    Left out are axes of size 1, and strided kernel axes of a transposed convolution: an output uses few of their taps.
    With more than ``MOST`` input axes all input axes are left out, because they have too many parts.

    Example:
        >>> network = TensorNetwork.parse("i1:4 i2:2 a:3, a h:3 w:1 b:3, b o:8")
        >>> smooth(network, Geometry(8, 8, (3, 1)))
        (('i1', 'i2'), ('h',))
    """
    apart = {
        axis
        for axis, stride in zip(network.kernel, geometry.each("stride"), strict=True)
        if geometry.transposed and stride > 1
    }
    homes = Counter(axis for core in network.cores for axis in core)
    wide = [a for a in network.dense_axes if network.sizes[a] > 1 and homes[a] == 1 and a not in apart]
    inputs = tuple(axis for axis in wide if axis in network.inputs)
    return inputs if len(inputs) <= MOST else (), tuple(axis for axis in wide if axis in network.kernel)


def reflect(tensor: Tensor, dim: int) -> Tensor:
    """Reflect a tensor along a dim (Householder), such that the part constant along it moves to index 0.

    Example:
        >>> reflect(torch.tensor([2.0, 2.0, 2.0, 2.0]), 0).tolist()
        [4.0, 0.0, 0.0, 0.0]
    """
    root = tensor.shape[dim] ** 0.5
    first, rest = tensor.narrow(dim, 0, 1), tensor.narrow(dim, 1, tensor.shape[dim] - 1)
    turned = tensor.sum(dim, keepdim=True) / root
    return torch.cat([turned, rest + (first - turned) / (root - 1)], dim)


def parts(kernel: Tensor, inputs: Sequence[int], taps: Sequence[int]) -> list[list[float]]:
    """Return squared norms of the kernel's parts with index 0 along exactly p of the dims ``inputs`` and q of ``taps``.

    Returns:
        list[list[float]]: entry [p][q]. The entries sum to the squared norm.

    Example:
        >>> parts(torch.tensor([[4.0, 2.0], [1.0, 0.0]]), [0], [1])
        [[0.0, 1.0], [4.0, 16.0]]
    """
    firsts = {frozenset[int](): kernel}
    for dim in (*inputs, *taps):
        firsts |= {dims | {dim}: part.narrow(dim, 0, 1) for dims, part in firsts.items()}
    flat = (part.reshape(-1) for part in firsts.values())
    norms = torch.stack([torch.dot(part, part) for part in flat])  # autocast does not change torch.dot
    squares = dict(zip(firsts, norms.tolist(), strict=True))
    # These parts have index 0 along at least ``dims``. Subtract, dim by dim, those with index 0 along one more.
    for dim in (*inputs, *taps):
        for dims in squares:
            if dim not in dims:
                squares[dims] -= squares[dims | {dim}]
    found = [[0.0] * (len(taps) + 1) for _ in range(len(inputs) + 1)]
    for dims, square in squares.items():
        found[len(dims.intersection(inputs))][len(dims.intersection(taps))] += max(0.0, square)
    return found


def root(found: Sequence[float], size: int) -> float:
    """Solve ``(size - 1) found[n] x^n = sum of found[p] x^p for p < n`` for x, n the last; 1 if a side is zero.

    Example:
        >>> round(root([9.0, 1.0], 4), 6)  # a part with a quarter of the squared norm
        3.0
    """
    *rest, last = found
    terms = [(math.log(value), p - len(rest)) for p, value in enumerate(rest) if value > 0]
    if not terms or last <= 0:
        return 1.0
    wanted = math.log(size - 1) + math.log(last)
    # The sum of exponentials falls in y = log x, so bisection finds the crossing, which is within these bounds.
    low = min((value - wanted) / -power for value, power in terms)
    high = max((value + math.log(len(terms)) - wanted) / -power for value, power in terms)
    for _ in range(60):
        y = (low + high) / 2
        top = max(value + power * y for value, power in terms)
        total = top + math.log(sum(math.exp(value + power * y - top) for value, power in terms))
        low, high = (y, high) if total > wanted else (low, y)
    return math.exp((low + high) / 2)


def exact(network: TensorNetwork, cores: Sequence[Tensor], norm: float, along: tuple[Axes, Axes]) -> list[Tensor]:
    """Rescale cores such that the kernel has a given norm, and the same gain on inputs constant along axes.

    Args:
        network: axes of each core.
        cores: values of the cores.
        norm: target Frobenius norm of the kernel.
        along: input axes and kernel axes, as returned by ``smooth``. Without axes, only the norm is set.

    Example:
        >>> network = TensorNetwork.parse("i:8 a:3, a h:3 w:3 b:3, b o:6")
        >>> cores = [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]
        >>> kernel = reconstruct(network, exact(network, cores, 2.0, (("i",), ("h", "w"))))
        >>> [round(float(each.norm()), 6) for each in (kernel, kernel.sum((2, 3)), kernel.sum((1, 2, 3)))]
        [2.0, 2.0, 2.0]
    """
    axes = [axis for axis in network.dense_axes if network.sizes[axis] > 1]
    turned, homes = list(cores), {}
    for axis in chain(*along):
        (k,) = (k for k, core in enumerate(network.cores) if axis in core)
        homes[axis] = k, network.cores[k].index(axis)
        turned[k] = reflect(turned[k], homes[axis][1])
    kernel = reconstruct(network, turned).reshape(network.shape(axes))
    inputs, taps = ([axes.index(axis) for axis in names] for names in along)
    found = parts(kernel, inputs, taps)
    u = root([row[-1] for row in found], math.prod(network.shape(along[0])))
    columns = [sum(row[q] * u**p for p, row in enumerate(found)) for q in range(len(taps) + 1)]
    v = root(columns, math.prod(network.shape(along[1])))
    scaled = list(cores)
    for names, square in zip(along, (u, v), strict=True):
        for axis in names:
            k, dim = homes[axis]
            scaled[k] = scaled[k] + (math.sqrt(square) - 1) * scaled[k].mean(dim, keepdim=True)
    total = sum(column * v**q for q, column in enumerate(columns))
    scale = (norm / math.sqrt(total)) ** (1 / len(scaled))
    return [core * scale for core in scaled]


def typical(network: TensorNetwork, cores: Sequence[Tensor]) -> list[Tensor]:
    """Rescale cores such that the mean logarithm of the gain equals the previous logarithm of its mean.

    Both are estimated from ``PROBES`` random inputs, rectified normal over channels and constant over taps. The
    logarithm matters because that of a product of many fluctuating gains is the sum of their logarithms.

    Example:
        >>> wide = TensorNetwork.parse("i:64 o:64")  # hardly fluctuates: 1 / 64
        >>> (scaled,) = typical(wide, [torch.ones(64, 64, dtype=torch.float64).tril()])
        >>> bool(1.0 < scaled[0, 0] < 1.1)
        True
    """
    kernel = reconstruct(network, cores)
    outputs, inputs = kernel.shape[:2]
    probes = kernel.new_empty(inputs, PROBES).normal_().relu()
    probes = probes[:, probes.square().sum(0) > 0]
    with own_precision(kernel):
        gains = (kernel.reshape(outputs, inputs, -1).sum(2) @ probes).square().sum(0) / probes.square().sum(0)
    gains = gains[gains > 0]
    lack = float(gains.mean().log() - gains.log().mean()) if len(gains) else 0.0
    return [core * math.exp(lack / (2 * len(cores))) for core in cores]
