"""Decomposition of a dense kernel into cores: alternating least squares over any network.

If all cores but one are fixed, the kernel is linear in that core, and its best value solves a least-squares problem.
The normal equations are contracted from the network. Small ones are solved directly, large ones by conjugate gradients,
which only multiply by the normal matrix. Sweeps over the cores lower the error to a local minimum. Each sweep starts at
an extrapolation of the last one, as long as this helps. In networks with cycles or sums the sweeps also keep the cores
small, so that no large terms cancel: see ``Objective.merit``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnlayers.backend.torch_state import own_precision
from tnlayers.fitting.blocks import block_fit
from tnlayers.fitting.decomposition import Decomposition, network_of
from tnlayers.fitting.gauge import level
from tnlayers.fitting.matrices import matrix_fit
from tnlayers.fitting.metric import as_metric, check
from tnlayers.fitting.objective import Objective, balance, length
from tnlayers.fitting.starts import is_large_sum, starts
from tnlayers.fitting.sweeps import race
from tnlayers.formats import Format
from tnlayers.ops.contraction import contract
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes
from tnlayers.spec.rank import Rank

SWEEPS, LARGE = 400, 2**18  # maximum from the best start; entries of a kernel above which the next two hold
LARGE_SWEEPS, LARGE_ONE_BOND = 250, 150  # the same for large kernels, and with one bond, as in CP
TERMS = 30  # the same of large sums of networks, as in BTT, whose start is near and whose sweeps take long
POLISH = 50  # maximum in the metric of whole patches


def decompose(
    tensor: Tensor,
    network: str | TensorNetwork | Format | type[Format],
    *,
    rank: Rank | str | None = None,
    in_shape: Sequence[int] | None = None,
    out_shape: Sequence[int] | None = None,
    moments: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> Decomposition:
    r"""Fit the cores of a network to a tensor. Layers fit their cores with this function too.

    Without ``moments`` the fit minimises ``||tensor - fit||``. With moments of patches (channels and kernel positions)
    it minimises the mean squared error of the outputs. With moments of channels alone it minimises the same, assuming
    that they are equal at every kernel position and that positions are uncorrelated:

    .. math:: \sum_{o, k} (W - W')_{o\,\cdot\,k}\, M\, (W - W')_{o\,\cdot\,k}^\top.

    The axes of the tensor are those of a weight, ``(out, in, *kernel)``. A format splits ``out`` and ``in`` into
    factors as in its layers. If ``in_shape`` has the product of all axes but the first, or the tensor has more than
    five axes, all axes but the first are input axes, and there is no kernel. If the text of a network has as many dense
    axes as the tensor, they are the tensor's axes, in the order o1, o2, ..., i1, i2, ..., d, h, w.

    Kernels that are matrices between two cores, or consist of such blocks, get their best fit at once. With moments,
    such blocks are fitted in turn. Other trees and rings start from singular value decompositions. Networks that are
    not trees have several starts, and their large terms could cancel, so that bfloat16 or a short step of training
    would lose the kernel. There the alternating least squares lower the error times a slowly growing function of the
    cores' size; elsewhere the error alone, so it never ends above that of the start. Large kernels are multiplied in
    float32 but for the last sweeps. Long fits are logged to ``logging.getLogger("tnlayers")`` at
    level INFO.

    Memory, in float64: five times the kernel; per start twice the cores; the largest intermediate tensor, a kernel with
    an axis replaced by bonds; matrices of side ``DIRECT``, and of side ``SIDE`` in ``tnlayers.fitting.starts``. No Gram
    matrix of the longer side of an unfolding is formed.

    Args:
        tensor: a tensor of two or more axes.
        network: a format's name, a format, the text of a network, or a ``TensorNetwork``, which has all sizes.
        rank: as in the layers; or ``"vbmf"``, the ranks that variational Bayes finds in the tensor's unfoldings.
        in_shape: factors of the input axis; None: the format's own split.
        out_shape: factors of the output axis, likewise.
        moments: ``E[x x^T]``, symmetric and positive semi-definite, of the layer's input channels of one group, or of
            its patches in the order of ``tensor[0].flatten()``: one row and column per channel or patch entry. A
            thousandth of its mean diagonal is added to the diagonal.
        start: cores to start from, beside the function's own starts; not with ``moments``.
        seed: seed of random starts. torch's global generators are not used.
        options: options of the format, such as ``layout="chain"``.

    Returns:
        Decomposition: the network; the cores in float64, levelled as in ``tnlayers.fitting.gauge``; and the relative
        error ``||tensor - fit|| / ||tensor||``, with or without ``moments``. For a zero tensor all cores are zero and
        get no gradient; ``TensorLayer.set_weight_`` makes cores that learn.

    Raises:
        TypeError: ``tensor`` or ``moments`` is not a tensor of real floating-point numbers, or ``network`` is none.
        ValueError: one of them has another shape, no values (meta device), or NaN or infinity; ``moments`` is not
            symmetric and positive semi-definite; or a rank or shape does not fit the network.

    Reference:
        Kolda and Bader, SIAM Review 2009, for CP; the same step for any network. Ang et al. 2021 for extrapolation.
        Phan et al., ECCV 2020, for cores that stay small.

    Example:
        >>> import tnlayers
        >>> a, b, c = (torch.randn(size, 2) for size in (6, 5, 4))
        >>> found = tnlayers.decompose(torch.einsum("ir,jr,kr->ijk", a, b, c), "cp", rank=2)
        >>> found.error < 1e-4, [tuple(core.shape) for core in found.cores], found.to_tensor().shape
        (True, [(5, 2), (6, 2), (4, 2)], torch.Size([6, 5, 4]))
    """
    check("tensor", tensor, tuple(getattr(tensor, "shape", ())), "")
    network = network_of(tensor, network, rank, in_shape, out_shape, options)
    dense = network.shape(network.dense_axes)
    # Compute in float64, on the CPU if the device has no float64.
    device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device
    metric = None if moments is None else as_metric(network, moments, device)
    target = tensor.detach().to(device, torch.float64)
    norm = length(target)
    if norm == 0:
        zeros = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in network.core_shapes)
        return Decomposition(network, tuple(zeros), 0.0, tuple(tensor.shape))
    target = (target / norm).reshape(dense)
    begin = _started(network, start, moments, target, norm)
    with own_precision(target):
        cores = level(network, _fit(network, target, metric, torch.Generator().manual_seed(seed), begin))
    found = tuple(core * norm ** (1 / len(cores)) for core in cores)
    return Decomposition(network, found, Objective(network, target).error(cores), tuple(tensor.shape))


def _started(
    network: TensorNetwork, start: Sequence[Tensor] | None, moments: Tensor | None, target: Tensor, norm: float
) -> list[list[Tensor]]:
    """Return the user's start, for a target that is divided by its norm."""
    if start is None:
        return []
    if moments is not None:
        raise ValueError("start is given with moments; a fit with moments has starts of its own")
    network.check_shapes(core.shape for core in start)
    return [[core.detach().to(target) * norm ** (-1 / len(start)) for core in start]]


def _fit(
    network: TensorNetwork,
    target: Tensor,
    metric: Tensor | None,
    generator: torch.Generator,
    begin: Sequence[list[Tensor]] = (),
) -> list[Tensor]:
    """Return the cores of least error, in the metric of the inputs if there is one."""
    count = SWEEPS
    if target.numel() > LARGE:
        count = LARGE_ONE_BOND if len(network.bonds) == 1 else LARGE_SWEEPS
    if is_large_sum(network, target):
        count = min(count, TERMS)
    if metric is None:
        best = matrix_fit(network, target, generator) or block_fit(network, target, generator)
        if best:
            return balance(best)
        return race(Objective(network, target), [*begin, *starts(network, target, generator)], count)
    inputs, channels = network.inputs, network.dense_shape[1]
    shape = network.shape(inputs)
    if len(metric) > channels:
        # First fit in the metric of channels, the mean over the kernel's positions.
        blocks = metric.reshape(channels, -1, channels, len(metric) // channels)
        cores = _fit(network, target, blocks.diagonal(dim1=1, dim2=3).mean(-1), generator)
        axes = inputs + network.kernel
        return race(Objective(network, target, metric.reshape(2 * network.shape(axes)), axes), [cores], POLISH)
    (home, *others) = [k for k, core in enumerate(network.cores) if not set(core).isdisjoint(inputs)]
    if best := block_fit(network, target, generator, metric):
        return balance(best)
    if others:
        objective = Objective(network, target, metric.reshape(*shape, *shape), inputs)
        return race(objective, starts(network, target, generator), count)
    # One core has all input axes. With M = L L^T, fit the core times L to the kernel times L.
    factor = torch.linalg.cholesky(metric)
    twins = tuple(f"{axis}'" for axis in inputs)

    def changed(value: Tensor, axes: Axes, by: Tensor) -> Tensor:
        out = tuple(twins[inputs.index(axis)] if axis in inputs else axis for axis in axes)
        return contract([value, by.reshape(*shape, *shape)], [axes, inputs + twins], out)

    cores = _fit(network, changed(target, network.dense_axes, factor), None, generator)
    cores[home] = changed(cores[home], network.cores[home], torch.linalg.inv(factor))
    return balance(cores)
