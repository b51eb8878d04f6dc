"""From a dense kernel to cores: alternating least squares over any network.

With all cores but one held fixed, the kernel is linear in that one, so the best value of it solves a least-squares
problem. Its normal equations contract from the network itself: where they are small they are solved directly, else by
conjugate gradients, which only ever multiply by them. Sweeping over the cores lowers the error step by step, to a local
minimum; each sweep begins a little beyond the last one, in the direction in which that went, as long as this helps.
"""

import torch
from torch import Tensor

from tnlayers.fitting.gauge import level
from tnlayers.fitting.metric import as_metric, check
from tnlayers.fitting.objective import Objective, balance, length
from tnlayers.fitting.starts import starts
from tnlayers.fitting.sweeps import race
from tnlayers.ops.contraction import contract
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import Axes

SWEEPS = 300  # at most, from the best start
POLISH = 50  # at most, in the metric of whole patches


def decompose(
    network: TensorNetwork, weight: Tensor, *, seed: int = 0, moments: Tensor | None = None
) -> tuple[list[Tensor], float]:
    r"""Fit the cores of a network to a dense kernel.

    Without ``moments`` the fit minimises ``||weight - fit||``. With those of patches, over inputs and kernel positions,
    it minimises the mean squared error of the outputs. With those of the channels alone, the same were they equal at
    every position of the kernel and uncorrelated between them,

    .. math:: \sum_{o, k} (W - W')_{o\,\cdot\,k}\, M\, (W - W')_{o\,\cdot\,k}^\top.

    It begins from singular value decompositions where the network is a tree or a ring, from several starts where it is
    no tree, and alternating least squares never end above where they began. Long fits are logged
    to ``logging.getLogger("tnlayers")`` at level INFO.

    Memory, in float64: four times the kernel; per start twice the cores; the largest tensor between two contractions,
    which is a kernel with an axis replaced by bonds; matrices of side ``DIRECT``, and of side ``SIDE`` in
    ``tnlayers.fitting.starts``. No unfolding is multiplied out to a square of its longer side.

    Args:
        network: the form of the fit.
        weight: the kernel, of shape ``network.dense_shape``.
        seed: of random starts; torch's global generators are left alone.
        moments: ``E[x x^T]``, symmetric and positive semi-definite, of the layer's input channels, those of one group,
            or of its patches, in the order of ``weight[0].flatten()``: a row and a column for each of either. A
            thousandth of its mean diagonal is added to the diagonal.

    Returns:
        tuple[list[Tensor], float]: the cores in float64, level as in ``tnlayers.fitting.gauge``, and the relative error
        ``||weight - fit|| / ||weight||``, with or without ``moments``. Of a kernel of zeros all cores are zero, and get
        no gradient; ``TensorLayer.set_weight_`` makes them such that they learn.

    Raises:
        TypeError: ``weight`` or ``moments`` is no tensor of real floating-point numbers.
        ValueError: one of them has another shape, no values (meta device), or holds NaN or infinity, or ``moments`` is
            not symmetric and positive semi-definite.

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
    # Float64 inside; on the CPU where the device has none.
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    metric = None if moments is None else as_metric(network, moments, device)
    target = weight.detach().to(device, torch.float64)
    norm = length(target)
    if norm == 0:
        return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in network.core_shapes], 0.0
    target = (target / norm).reshape(network.shape(network.dense_axes))
    cores = level(network, _fit(network, target, metric, torch.Generator().manual_seed(seed)))
    return [core * norm ** (1 / len(cores)) for core in cores], Objective(network, target).error(cores)


def _fit(network: TensorNetwork, target: Tensor, metric: Tensor | None, generator: torch.Generator) -> list[Tensor]:
    """The cores of least error, in the metric of the inputs if there is one."""
    if metric is None:
        return race(Objective(network, target), starts(network, target, generator), SWEEPS)
    inputs, channels = network.inputs, network.dense_shape[1]
    shape = network.shape(inputs)
    if len(metric) > channels:
        # The mean over the kernel's positions is a metric of channels, in which the fit begins.
        blocks = metric.reshape(channels, -1, channels, len(metric) // channels)
        cores = _fit(network, target, blocks.diagonal(dim1=1, dim2=3).mean(-1), generator)
        axes = inputs + network.kernel
        return race(Objective(network, target, metric.reshape(2 * network.shape(axes)), axes), [cores], POLISH)
    (home, *others) = [k for k, core in enumerate(network.cores) if not set(core).isdisjoint(inputs)]
    if others:
        objective = Objective(network, target, metric.reshape(*shape, *shape), inputs)
        return race(objective, starts(network, target, generator), SWEEPS)
    # One core has all inputs: with M = L L^T, its product with L is fitted to the kernel's.
    factor = torch.linalg.cholesky(metric)
    twins = tuple(f"{axis}'" for axis in inputs)

    def changed(value: Tensor, axes: Axes, by: Tensor) -> Tensor:
        out = tuple(twins[inputs.index(axis)] if axis in inputs else axis for axis in axes)
        return contract([value, by.reshape(*shape, *shape)], [axes, inputs + twins], out)

    cores = _fit(network, changed(target, network.dense_axes, factor), None, generator)
    cores[home] = changed(cores[home], network.cores[home], torch.linalg.inv(factor))
    return balance(cores)
