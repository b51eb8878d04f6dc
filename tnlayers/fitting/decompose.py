"""Decomposition of a dense kernel into cores: alternating least squares over any network.

If all cores but one are fixed, the kernel is linear in that core, and its best value solves a least-squares problem.
The normal equations are contracted from the network. Small ones are solved directly, large ones by conjugate gradients,
which only multiply by the normal matrix. Sweeps over the cores lower the error to a local minimum. Each sweep starts at
an extrapolation of the last one, as long as this lowers the error.
"""

import torch
from torch import Tensor

from tnlayers.backend.torch_state import own_precision
from tnlayers.fitting.blocks import block_fit
from tnlayers.fitting.gauge import level
from tnlayers.fitting.matrices import matrix_fit
from tnlayers.fitting.metric import as_metric, check
from tnlayers.fitting.objective import Objective, balance, length
from tnlayers.fitting.starts import is_large_sum, starts
from tnlayers.fitting.sweeps import race
from tnlayers.ops.contraction import contract
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

SWEEPS, LARGE = 400, 2**18  # maximum from the best start; entries of a kernel above which the next two hold
LARGE_SWEEPS, LARGE_ONE_BOND = 250, 150  # the same for large kernels, and with one bond, as in CP
TERMS = 30  # the same of large sums of networks, as in BTT, whose start is near and whose sweeps take long
POLISH = 50  # maximum in the metric of whole patches


def decompose(
    network: TensorNetwork, weight: Tensor, *, seed: int = 0, moments: Tensor | None = None
) -> tuple[list[Tensor], float]:
    r"""Fit the cores of a network to a dense kernel.

    Without ``moments`` the fit minimises ``||weight - fit||``. With moments of patches (channels and kernel positions)
    it minimises the mean squared error of the outputs. With moments of channels alone it minimises the same, assuming
    that they are equal at every kernel position and that positions are uncorrelated:

    .. math:: \sum_{o, k} (W - W')_{o\,\cdot\,k}\, M\, (W - W')_{o\,\cdot\,k}^\top.

    Kernels that are matrices between two cores, or consist of such blocks, get their best fit at once. With moments,
    such blocks are fitted in turn. Other trees and rings start from singular value decompositions. Networks that are
    not trees have several starts. The alternating least squares never end above the error of their start. Large kernels
    are multiplied in float32 but for the last sweeps. Long fits are logged to ``logging.getLogger("tnlayers")`` at
    level INFO.

    Memory, in float64: five times the kernel; per start twice the cores; the largest intermediate tensor, a kernel with
    an axis replaced by bonds; matrices of side ``DIRECT``, and of side ``SIDE`` in ``tnlayers.fitting.starts``. No Gram
    matrix of the longer side of an unfolding is formed.

    Args:
        network: network to fit.
        weight: the kernel, of shape ``network.dense_shape``.
        seed: seed of random starts. torch's global generators are not used.
        moments: ``E[x x^T]``, symmetric and positive semi-definite, of the layer's input channels of one group, or of
            its patches in the order of ``weight[0].flatten()``: one row and column per channel or patch entry. A
            thousandth of its mean diagonal is added to the diagonal.

    Returns:
        tuple[list[Tensor], float]: the cores in float64, levelled as in ``tnlayers.fitting.gauge``, and the relative
        error ``||weight - fit|| / ||weight||``, with or without ``moments``. For a zero kernel all cores are zero and
        get no gradient; ``TensorLayer.set_weight_`` makes cores that learn.

    Raises:
        TypeError: ``weight`` or ``moments`` is not a tensor of real floating-point numbers.
        ValueError: one of them has another shape, no values (meta device), or NaN or infinity; or ``moments`` is not
            symmetric and positive semi-definite.

    Reference:
        Kolda and Bader, SIAM Review 2009, for CP; the same step for any network. Ang et al. 2021 for extrapolation.

    Example:
        >>> from tnlayers.ops.contraction import reconstruct
        >>> network = TensorNetwork.parse("i:6 a:2, a h:3 w:3 b:2, b o:5")
        >>> truth = reconstruct(network, [torch.randn(shape) for shape in network.core_shapes])
        >>> decompose(network, truth)[1] < 1e-4
        True
    """
    check("weight", weight, network.dense_shape, f"; network '{network}' contracts to {network.dense_shape}")
    # Compute in float64, on the CPU if the device has no float64.
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    metric = None if moments is None else as_metric(network, moments, device)
    target = weight.detach().to(device, torch.float64)
    norm = length(target)
    if norm == 0:
        return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in network.core_shapes], 0.0
    target = (target / norm).reshape(network.shape(network.dense_axes))
    with own_precision(target):
        cores = level(network, _fit(network, target, metric, torch.Generator().manual_seed(seed)))
    return [core * norm ** (1 / len(cores)) for core in cores], Objective(network, target).error(cores)


def _fit(network: TensorNetwork, target: Tensor, metric: Tensor | None, generator: torch.Generator) -> list[Tensor]:
    """Return the cores of least error, in the metric of the inputs if there is one."""
    count = SWEEPS
    if target.numel() > LARGE:
        count = LARGE_ONE_BOND if len(network.bonds) == 1 else LARGE_SWEEPS
    if is_large_sum(network, target):
        count = min(count, TERMS)
    if metric is None:
        best = matrix_fit(network, target, generator) or block_fit(network, target, generator)
        return balance(best) if best else race(Objective(network, target), starts(network, target, generator), count)
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
