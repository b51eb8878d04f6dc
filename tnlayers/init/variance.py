r"""The variance solver: standard deviations of the cores, for any network and any convolution.

Derived, after Pan, Su, Liu, Wang, Li, Xu, "A Unified Weight Initialization Paradigm for Tensorial Convolutional Neural
Networks", ICML 2022 (PMLR 162, 17238-17257; arXiv 2205.15307).

**The kernel.** Let the cores :math:`G^{(1)}, \dots, G^{(n)}` have independent zero-mean entries of variance
:math:`\sigma_k^2`, each core once in the network. An entry of the kernel is a sum over all values of all bonds. Each
term is a product of one entry of each core. Two terms differ in an entry of at least one core, which is independent of
the rest and has mean zero. So the terms are uncorrelated, and

.. math:: \mathrm{Var}(W) = \prod_{\text{bonds } b} |b| \cdot \prod_{k=1}^{n} \sigma_k^2 \tag{1}

Each bond counts once, also a hyperedge of many cores. Uncorrelated entries of one core suffice. Those of a random
orthogonal matrix are uncorrelated, because any row or column may change its sign. A dense axis that several cores share
is not summed and does not count. The result depends neither on the format nor on the order of contraction.

**Forward.** An output position sums :math:`C_{in}/g` channels and the taps of the kernel that fall on real input. With
:math:`T_{fwd}` the mean number of these taps over output positions,

.. math:: E[y^2] = E[x^2] \, \mathrm{Var}(W) \, \frac{C_{in}}{g} \, T_{fwd} \tag{2}

**Backward: the Reproducing Transformation.** The gradient of the input is itself a convolution. Insert stride - 1 zeros
between neighbours of the output gradient. Pad it by dilation * (kernel - 1) - padding, on the right also by the
remainder of the stride. Convolve it, with stride 1 and the same dilation, with the kernel flipped along its kernel axes
and with its channel axes exchanged. The transformed kernel contracts from the same cores, so (1) holds for it too. The
inserted zeros carry no variance. So only :math:`T_{bwd}` taps count, the mean number of (output position, tap) pairs
per input position:

.. math:: E[dx^2] = E[dy^2] \, \mathrm{Var}(W) \, \frac{C_{out}}{g} \, T_{bwd} \tag{3}

**Taps.** Along one kernel axis, the dummy tensor :math:`P_{j,j',k}` is 1 where :math:`j = s j' + d k - p` (stride s,
dilation d, padding p), else 0: input j contributes to output j' at tap k. Its sum is the number of pairs. Divided by
the number of outputs H' it is :math:`T_{fwd}`, divided by the number of inputs H it is :math:`T_{bwd}`. Several axes
multiply. Away from borders (input size unknown) they are :math:`\prod K` and :math:`\prod K/s`. Padding modes other
than zeros make every tap real.

**Transposed convolutions** exchange (2) and (3): the same pairs, with inputs and outputs exchanged. So away from
borders :math:`T_{fwd}` is :math:`\prod K/s` and :math:`T_{bwd}` is :math:`\prod K`. In a linear layer both are 1.

**The rule.** fan_in = :math:`C_{in}/g \cdot T_{fwd}`, fan_out = :math:`C_{out}/g \cdot T_{bwd}`, fan_avg their mean.
The target is :math:`\mathrm{Var}(W) = gain^2 / fan`, or a given :math:`std^2`. (1) is solved for the
:math:`\sigma_k`, either all equal (the paper's split) or such that all cores have the same expected norm. It is solved
in logarithms, so a hundred cores do not overflow. With one core and stride 1 this is Kaiming's and Xavier's rule.
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
SCALE = ("mode", "nonlinearity", "param", "input_size")
"""Fields of ``Init`` that say how large the kernel is, unless ``std`` does."""
# Names that torch.nn.init.calculate_gain documents. Only for the error message: torch's ValueError decides.
NONLINEARITIES = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Init:
    """Initialisation of a layer.

    Args:
        mode: 'fan_in' keeps the second moment of the signal forward, 'fan_out' that of the gradient backward, 'fan_avg'
            is Xavier's mean of both.
        nonlinearity: function that follows the layer, a name of ``torch.nn.init.calculate_gain``.
        param: parameter of that function: the negative slope of 'leaky_relu'.
        distribution: 'normal', 'truncated_normal' (at two standard deviations, with corrected variance), 'uniform', or
            'orthogonal': each core is a semi-orthogonal matrix from its incoming to its outgoing axes. Then the
            kernel's spectrum is as flat as the network allows, less flat where ``exact`` rescales means.
        split: how the kernel's scale is divided among the cores. The kernel is the same; its speed of learning is not.
            'balanced': all cores have the same expected norm, the smallest sum of squares; gradient flow keeps equal
            norms equal (Arora, Cohen, Hazan, ICML 2018, arXiv 1802.06509). 'equal': all cores have the same standard
            deviation (Pan et al.).
        exact: True: rescale the drawn cores such that this kernel has the target gain on white inputs, on inputs
            constant over kernel positions, on inputs constant over channels too, and so on rectified ones of either
            kind. ``tnlayers.init.exact_gain`` leaves out strided axes of transposed convolutions, axes that several
            cores share, and more than 6 input axes. 'white': only the Frobenius norm, and so the gain on white inputs,
            is exact; always so for a kernel above 2^23 entries. Both hold away from borders and up to the rounding of
            the layer's dtype, one or a few per cent in bfloat16. False: the gain is right on average over draws; at
            small ranks that of one draw is often off by half. Gradients, also with 'fan_out', are exact only if white.
        typical: make the mean logarithm of the gain zero over smooth rectified inputs, instead of the logarithm of the
            mean, which is larger. Estimated from random inputs at each draw.
        input_size: spatial size of the layer's input. If given, taps at the border are counted exactly.
        std: standard deviation of the kernel's entries, in place of the rule of mode, nonlinearity, param and
            input_size, which must then have their defaults.

    Raises:
        TypeError, ValueError: an argument is not as above. The message names it.

    Example:
        >>> Init("fan_out", nonlinearity="tanh").gain
        1.6666666666666667

    **The default** stays nearest to a dense network through 50 plain layers, forward and backward
    (``benchmarks/measure/depth.py``). The rule of Pan et al. alone is right on average. But the mean logarithm of a
    fluctuating gain is below the logarithm of its mean, and after rectifiers signals are neither white nor centred. The
    default split mostly needs fewer training steps with batch normalisation (``benchmarks/measure/convergence.py``).
    ``init="paper"`` is the rule of Pan et al. alone. ``init="unit"`` gives the kernel's entries the std 1.
    """

    mode: str = "fan_in"
    nonlinearity: str = "relu"
    param: float | None = None
    distribution: str = "orthogonal"
    split: str = "balanced"
    exact: bool | str = True
    typical: bool = False
    input_size: tuple[int, ...] | None = None
    std: float | None = None

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
        if self.std is not None:
            self._check_std()

    def _check_std(self) -> None:
        if isinstance(self.std, bool) or not isinstance(self.std, int | float):
            raise TypeError(f"std is {self.std!r}; it must be a number or None")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std is {self.std!r}; it must be positive and finite")
        object.__setattr__(self, "std", float(self.std))
        for name in SCALE:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"{name} is {value!r}, but std is {self.std!r} and takes its place; give one of them")

    @classmethod
    def of(cls, value: "str | Init") -> "Init":
        """Return ``value`` if it is an ``Init``, else the ``Init`` of a mode or a preset by name.

        Raises:
            TypeError: ``value`` is neither an ``Init`` nor a string.
            ValueError: no mode or preset has this name.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return PRESETS[value] if value in PRESETS else cls(validate.choice("init", value, (*FAN_MODES, *PRESETS)))
        raise TypeError(f"init is {value!r}; it must be one of {(*FAN_MODES, *PRESETS)} or a tnlayers.Init")

    @property
    def gain(self) -> float:
        """Gain of the nonlinearity: ``torch.nn.init.calculate_gain(nonlinearity, param)``."""
        try:
            return float(calculate_gain(self.nonlinearity, self.param))  # type: ignore[arg-type]
        except ValueError as error:
            if "nonlinearity" not in str(error):
                raise ValueError(f"param is {self.param!r}; {self.nonlinearity!r} takes a number or None") from None
            accepted = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"nonlinearity is {self.nonlinearity!r}; accepted: {accepted}") from None


PRESETS = {
    "paper": Init(distribution="normal", split="equal", exact=False),
    "unit": Init(exact="white", std=1.0),
}
"""Complete initialisations by name. 'paper': the rule of Pan et al. 2022 alone. 'unit': standard deviation 1, that of
torch's embeddings."""


@dataclass(frozen=True)
class Variance:
    """Result of the solver.

    Attributes:
        std: standard deviation of each core's entries, in the network's order.
        fan_in, fan_out: fans of the geometry.
        fan: fan selected by the mode.
        gain: gain of the nonlinearity; if ``Init`` has a std, the gain that amounts to it, std * sqrt(fan).
        weight_std: expected standard deviation of the dense kernel's entries, gain / sqrt(fan).

    Example:
        >>> import tnlayers
        >>> found = tnlayers.TuckerConv2d(64, 64, 3, rank=8).variance
        >>> found.fan_in, f"{found.weight_std:.4f} {found.gain / found.fan**0.5:.4f}", len(found.std)
        (576.0, '0.0589 0.0589', 3)
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
        init: mode and nonlinearity, or std; and split. The distribution is not used.

    Returns:
        Variance: one standard deviation per core, and the quantities they follow from.

    Raises:
        ValueError: the network's dense kernel shape differs from the geometry's, or no tap falls on real input.

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
    gain = init.gain if init.std is None else init.std * math.sqrt(fan)
    log_target = 2 * math.log(gain) - math.log(fan)
    log_bonds = sum(math.log(size) for size in network.shape(network.bonds))
    shares = _log_shares(network, init.split)
    log_scale = (log_target - log_bonds - sum(shares.values())) / len(network.cores)
    return Variance(
        std=tuple(math.exp((log_scale + shares[k]) / 2) for k in range(len(network.cores))),
        fan_in=fan_in,
        fan_out=fan_out,
        fan=fan,
        gain=gain,
        weight_std=math.exp(log_target / 2),
    )


def _log_shares(network: TensorNetwork, split: str) -> Mapping[int, float]:
    """Return the logarithm of each core's variance, up to a constant common to all cores."""
    if split == "balanced":
        return {k: -math.log(math.prod(shape)) for k, shape in enumerate(network.core_shapes)}
    return dict.fromkeys(range(len(network.cores)), 0.0)
