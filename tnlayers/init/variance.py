r"""The variance solver: how wide to draw the cores, for any network and any convolution.

Derived, after Pan, Su, Liu, Wang, Li, Xu, "A Unified Weight Initialization Paradigm for Tensorial Convolutional Neural
Networks", ICML 2022 (PMLR 162, 17238-17257; arXiv 2205.15307).

**The kernel.** Let the cores :math:`G^{(1)}, \dots, G^{(n)}` have independent zero-mean entries of variance
:math:`\sigma_k^2`, each core once in the network. An entry of the kernel sums, over all values of all bonds, a product
of one entry of each core. Two different values of the bonds differ in an entry of some core, independent of the rest
and of mean zero, so the products are uncorrelated, and

.. math:: \mathrm{Var}(W) = \prod_{\text{bonds } b} |b| \cdot \prod_{k=1}^{n} \sigma_k^2 \tag{1}

with each bond once, also a hyperedge that many cores share. It is enough that entries of one core are uncorrelated, as
those of a random orthogonal matrix are, of which any row or column may change its sign. An axis of the kernel that
several cores share is not summed, and does not count. Neither format nor order of contraction enters.

**Forward.** An output position sums :math:`C_{in}/g` channels and those taps of the kernel that fall on real input.
With :math:`T_{fwd}` their mean number over output positions,

.. math:: E[y^2] = E[x^2] \, \mathrm{Var}(W) \, \frac{C_{in}}{g} \, T_{fwd} \tag{2}

**Backward: the Reproducing Transformation.** The gradient of the input is itself a convolution: put stride - 1 zeros
between neighbours of the output gradient, pad it by dilation * (kernel - 1) - padding (on the right also by what the
stride left over), and convolve it, with stride 1 and the same dilation, with the kernel flipped along its kernel axes
and with its channel axes exchanged. The transformed kernel contracts from the same cores, so (1) holds for it too; the
inserted zeros carry no variance, so of its taps only :math:`T_{bwd}`, the mean number of (output position, tap) pairs
that touch an input position, count:

.. math:: E[dx^2] = E[dy^2] \, \mathrm{Var}(W) \, \frac{C_{out}}{g} \, T_{bwd} \tag{3}

**Taps.** Along one kernel axis, the dummy tensor :math:`P_{j,j',k} = 1` where :math:`j = s j' + d k - p` (stride s,
dilation d, padding p), else 0, tells which input j meets which output j' at tap k. Its sum is the number of pairs;
divided by the number of outputs H' it is :math:`T_{fwd}`, by the number of inputs H :math:`T_{bwd}`. Axes multiply.
Away from borders (input size unknown) they are :math:`\prod K` and :math:`\prod K/s`. Padding with other than zeros
makes every tap real.

**Transposed convolutions** run (2) and (3) the other way round: the same pairs, with inputs and outputs exchanged. So
:math:`T_{fwd}` is :math:`\prod K/s` away from borders, and :math:`T_{bwd}` is :math:`\prod K`. In a linear layer both
are 1.

**The rule.** fan_in = :math:`C_{in}/g \cdot T_{fwd}`, fan_out = :math:`C_{out}/g \cdot T_{bwd}`, fan_avg their mean;
the target is :math:`\mathrm{Var}(W) = gain^2 / fan`, and (1) is solved for the :math:`\sigma_k`, either all equal (the
paper's split) or such that all cores have the same expected norm. All in logarithms, so a hundred cores do not
overflow. With one core and stride 1 this is Kaiming's and Xavier's rule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.nn.init import calculate_gain

from tnlayers import validate
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork

FAN_MODES = ("fan_in", "fan_out", "fan_avg")
DISTRIBUTIONS = ("normal", "truncated_normal", "uniform", "orthogonal")
SPLITS = ("equal", "balanced")
# What torch.nn.init.calculate_gain documents; its own ValueError decides, this list only completes the sentence.
NONLINEARITIES = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Init:
    """How a layer starts.

    Args:
        mode: 'fan_in' keeps the signal's second moment forward, 'fan_out' the gradient's backward, 'fan_avg' is
            Xavier's mean of both.
        nonlinearity: what follows the layer, as ``torch.nn.init.calculate_gain`` knows it.
        param: that function's parameter: the negative slope of 'leaky_relu'.
        distribution: 'normal', 'truncated_normal' (cut at two standard deviations, its variance corrected), 'uniform',
            or 'orthogonal': each core is a semi-orthogonal matrix, from the axes on which the signal enters it to those
            on which it leaves, so that the kernel's spectrum is as flat as the network allows (less so where ``exact``
            then rescales its means).
        split: which share of the kernel's scale each core has. The kernel is the same, but not how fast it learns.
            'balanced' gives all cores the same expected norm, so the least sum of squares; of cores that have it,
            gradient flow keeps the norms the same (Arora, Cohen, Hazan, ICML 2018, arXiv 1802.06509). 'equal' gives
            all the same standard deviation (Pan et al.).
        exact: True: rescale the drawn cores so that this one kernel has the target gain on white inputs, on inputs that
            are constant over the kernel's positions, on those that are constant over channels too, and so on rectified
            ones of either kind; see ``tnlayers.init.exact_gain`` for what is left out (strided axes of transposed
            convolutions, axes that several cores share, more than 6 input axes). 'white': only its Frobenius norm, and
            so the gain on white inputs, is the target's; of a kernel beyond 2^23 entries it is always that. Away from
            borders; and up to the rounding of the layer's dtype, one or a few per cent in bfloat16. False: the gain is
            right on average over draws; at small ranks that of one draw is often off by half. Gradients, with 'fan_out'
            too, are exact where they are white alone.
        typical: make the mean logarithm of the gain zero, over smooth rectified inputs, instead of the logarithm of the
            mean, which is larger. It is estimated from random inputs at each draw.
        input_size: spatial size of the layer's input, if known: taps at the border are then counted exactly.

    Raises:
        TypeError, ValueError: an argument is not as above; the sentence names it.

    Example:
        >>> Init("fan_out", nonlinearity="tanh").gain
        1.6666666666666667

    **The default** is what stays nearest to a dense network through 50 plain layers, forward and backward
    (``benchmarks/measure/depth.py``): the rule of Pan et al. alone is right on average, but the logarithm of a gain
    that fluctuates has a lower mean than the logarithm of its mean, and behind rectifiers signals are neither white nor
    centred. Of the two splits it has the one that mostly needs fewer steps of training with batch normalisation
    (``benchmarks/measure/convergence.py``). ``init="paper"`` is that rule alone.
    """

    mode: str = "fan_in"
    nonlinearity: str = "relu"
    param: float | None = None
    distribution: str = "orthogonal"
    split: str = "balanced"
    exact: bool | str = True
    typical: bool = False
    input_size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        validate.choice("mode", self.mode, FAN_MODES)
        validate.choice("distribution", self.distribution, DISTRIBUTIONS)
        validate.choice("split", self.split, SPLITS)
        if self.exact != "white":
            validate.boolean("exact", self.exact, " or 'white'")
        validate.boolean("typical", self.typical)
        if not math.isfinite(self.gain) or self.gain <= 0:
            raise ValueError(f"param is {self.param!r}; the gain of {self.nonlinearity!r} would be {self.gain}")
        if self.param is not None and self.nonlinearity != "leaky_relu":
            raise ValueError(
                f"param is {self.param!r}; {self.nonlinearity!r} has no parameter, only 'leaky_relu' has one"
            )
        if self.input_size is not None:
            length = len(self.input_size) if isinstance(self.input_size, Sequence) else 1
            object.__setattr__(self, "input_size", validate.integers("input_size", self.input_size, length))

    @classmethod
    def of(cls, value: "str | Init") -> "Init":
        """An ``Init`` as it is, or from the name of its mode, or ``PRESETS``' of it.

        Raises:
            TypeError: neither of both.
            ValueError: no mode has this name.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return PRESETS[value] if value in PRESETS else cls(validate.choice("init", value, (*FAN_MODES, *PRESETS)))
        raise TypeError(f"init is {value!r}; it must be one of {(*FAN_MODES, *PRESETS)} or a tnlayers.Init")

    @property
    def gain(self) -> float:
        """``torch.nn.init.calculate_gain(nonlinearity, param)``."""
        try:
            return float(calculate_gain(self.nonlinearity, self.param))  # type: ignore[arg-type]
        except ValueError as error:
            if "nonlinearity" not in str(error):
                raise ValueError(f"param is {self.param!r}; {self.nonlinearity!r} takes a number or None") from None
            accepted = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; accepted: {accepted}") from None


PRESETS = {"paper": Init(distribution="normal", split="equal", exact=False)}
"""Names for more than a mode: the rule of Pan et al. 2022 as it is."""


@dataclass(frozen=True)
class Variance:
    """The solver's answer.

    Attributes:
        std: standard deviation of the entries of each core, in the network's order.
        fan_in, fan_out: both fans of the geometry.
        fan: the one that the mode chose.
        gain: the nonlinearity's.
        weight_std: expected standard deviation of the dense kernel's entries, gain / sqrt(fan).
    """

    std: tuple[float, ...]
    fan_in: float
    fan_out: float
    fan: float
    gain: float
    weight_std: float


def solve(network: TensorNetwork, geometry: Geometry, init: Init = Init()) -> Variance:
    """Solve eq. (1) for the standard deviations of the cores.

    Args:
        network: contracts to shape ``(out_channels, in_channels / groups, *kernel_size)``.
        geometry: the convolution.
        init: mode, nonlinearity and split; the distribution does not matter here.

    Returns:
        Variance: one standard deviation per core, and what they were derived from.

    Raises:
        ValueError: the network's dense kernel is not the geometry's, or no tap of it meets real input.

    Reference:
        Pan et al., ICML 2022; see this module's docstring.

    Example:
        >>> ring = TensorNetwork.parse("z:4 i:64 a:4, a h:3 w:3 b:4, b o:64 z")
        >>> answer = solve(ring, Geometry(64, 64, (3, 3), padding=1), Init(split="equal"))
        >>> [round(s, 4) for s in answer.std], round(answer.weight_std ** 2 * 576, 6)
        ([0.1946, 0.1946, 0.1946], 2.0)
    """
    dense = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel_size)
    if network.dense_shape != dense:
        raise ValueError(
            f"network '{network}' contracts to shape {network.dense_shape}, but the convolution's kernel is {dense}"
        )
    fan_in, fan_out = geometry.fan_in, geometry.fan_out
    if fan_in == 0:
        raise ValueError(f"input_size is {geometry.input_size}; there every tap of the kernel falls on padding")
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[init.mode]
    log_target = 2 * math.log(init.gain) - math.log(fan)
    log_bonds = sum(math.log(size) for size in network.shape(network.bonds))
    shares = _log_shares(network, init.split)
    log_scale = (log_target - log_bonds - sum(shares.values())) / len(network.cores)
    return Variance(
        std=tuple(math.exp((log_scale + shares[k]) / 2) for k in range(len(network.cores))),
        fan_in=fan_in,
        fan_out=fan_out,
        fan=fan,
        gain=init.gain,
        weight_std=math.exp(log_target / 2),
    )


def _log_shares(network: TensorNetwork, split: str) -> Mapping[int, float]:
    """The logarithm of each core's variance, up to a constant common to all cores."""
    if split == "balanced":
        return {k: -math.log(math.prod(shape)) for k, shape in enumerate(network.core_shapes)}
    return dict.fromkeys(range(len(network.cores)), 0.0)
