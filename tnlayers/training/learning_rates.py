r"""Optimisation in terms of the kernel: decay of its norm, and learning rates for its first step.

**Decay.** Weight decay of the cores is not weight decay of the kernel :math:`W`. But :math:`\frac{\lambda}{2}
\|W\|_F^2` in the loss adds :math:`\lambda W` to the kernel's gradient, as SGD's ``weight_decay`` does for a dense
layer. The squared norm is itself a network: the cores and a copy of each that shares the dense axes, not the bonds.

**Learning rates.** The kernel, of P entries, is linear in each core. With :math:`J_k = \partial W / \partial G_k`, a
step changes it by :math:`\delta W = \sum_k J_k \, \delta G_k` to first order, and the loss by :math:`\langle g, \delta
W \rangle`, where g is the kernel's gradient. Assume that g is white: independent normal entries of variance
:math:`\gamma^2`. The gradient of core k, :math:`J_k^T g`, has entries of variance :math:`\gamma^2 \|J_{k,a}\|^2`, one
for each column a. SGD's step is the learning rate times the gradient. Adam's first step is the learning rate with the
gradient's sign. The expected decrease of the loss is :math:`\eta_k \gamma^2 \sum_a \|J_{k,a}\|^2` (SGD) or
:math:`\eta_k c \gamma \sum_a \|J_{k,a}\|` (Adam), where :math:`c = \sqrt{2/\pi}`; for a dense layer it is :math:`\eta
\gamma^2 P` or :math:`\eta c \gamma P`. So the n trained cores have equal shares of the dense layer's decrease if

.. math:: \eta_k = \eta \, \frac{P}{n \sum_a \|J_{k,a}\|^2} \quad\text{(SGD)}, \qquad
          \eta_k = \eta \, \frac{P}{n \sum_a \|J_{k,a}\|} \quad\text{(Adam)}. \tag{1}

For cores drawn by the solver, with variances :math:`\sigma_k^2`, :math:`E[J_k J_k^T] = \mathrm{Var}(W) /
\sigma_k^2 \cdot I` by the argument of ``tnlayers.init.variance`` without core k. Split among the :math:`N_k` columns:

.. math:: \eta_k = \eta \, \frac{\sigma_k^2}{n \, \mathrm{Var}(W)} \quad\text{(SGD)}, \qquad
          \eta_k = \eta \, \frac{\sigma_k}{n} \sqrt{\frac{P}{N_k \, \mathrm{Var}(W)}} \quad\text{(Adam)}, \tag{2}

and over draws (not rescaled to an exact norm) SGD has :math:`E[\delta W] = -\eta g`, the dense layer's step, for any g
independent of the draws.

The norm of the step is not the dense layer's. Most of a white g is outside of the cores' tangent space, so the step
within it is longer: under (1) much longer, and the longer, the fewer parameters are kept. So the largest
stable rate is smaller than a dense model's. For Adam the norm can be matched instead. With signs independent of the
cores, :math:`E\|\delta W\|^2 = \sum_k \eta_k^2 \sum_a \|J_{k,a}\|^2`; for a dense layer it is :math:`\eta^2 P`. So
with equal shares

.. math:: \eta_k = \eta \sqrt{\frac{P}{n \sum_a \|J_{k,a}\|^2}} \quad\text{or}\quad
          \eta_k = \eta \, \frac{\sigma_k}{\sqrt{n \, \mathrm{Var}(W)}}. \tag{3}

Reference:
    Khodak, Tenenholtz, Mackey, Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021 (arXiv
    2105.01029), for the decay. The learning rates are derived here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.sharding import whole
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.networks import network_layers
from tnlayers.ops.contraction import contract
from tnlayers.ops.squared_norm import copy
from tnlayers.spec.network import TensorNetwork

OPTIMIZERS = ("sgd", "adam")
MATCHES = ("decrease", "norm")
SCALES = ("measured", "expected")


# ------------------------------------------------------------------ learning rates


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    optimizer: str = "sgd",
    match: str = "decrease",
    scale: str = "measured",
) -> list[dict[str, Any]]:
    """Return parameter groups with core learning rates that match the first step of a dense model.

    This module's docstring says which quantities match. Parameters other than cores have the base ``lr``, and those
    with two or more dimensions the ``weight_decay``. Cores, biases and norms have no weight decay:
    ``frobenius_penalty`` decays the kernels. A core of several layers has the smallest of their rates. Weights that
    ``parametrize_`` made networks of count as layers.

    Args:
        model: any module.
        lr: the learning rate of a dense model.
        weight_decay: weight decay of the dense weights.
        optimizer: 'sgd', with or without momentum, or 'adam', for every sign-based first step (AdamW, Lion...).
        match: 'decrease' of the linearised loss under white gradients, or, for 'adam', 'norm' of the kernel's step
            under random signs.
        scale: 'measured' on the present cores, or 'expected' over the solver's draws: this needs no values, and makes
            fewer groups, since equal layers have equal rates.

    Returns:
        list[dict]: groups of 'params', 'lr', 'weight_decay' and 'name'. Cores of equal rate form one group, named after
        the first. Every parameter that requires a gradient is in one group.

    Raises:
        TypeError: an argument is of another type, or cores are parametrized.
        ValueError: an argument is invalid, nothing requires a gradient, a core has no values to measure, or no step of
            it changes the kernel, since other cores are zero.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TRConv2d(64, 64, 3, rank=4), nn.BatchNorm2d(64), nn.Conv2d(64, 9, 1))
        >>> groups = param_groups(model, 0.1, weight_decay=1e-4, scale="expected")
        >>> for group in groups:
        ...     print(group["name"], len(group["params"]), round(group["lr"], 3), group["weight_decay"])
        weights 1 0.1 0.0001
        others 4 0.1 0.0
        0.cores.0 2 0.189 0.0
        0.cores.1 1 1.344 0.0
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)
    """
    _number("lr", lr)
    _number("weight_decay", weight_decay)
    validate.choice("optimizer", optimizer, OPTIMIZERS)
    validate.choice("match", match, MATCHES if optimizer == "adam" else MATCHES[:1])
    validate.choice("scale", scale, SCALES)
    factors: dict[nn.Parameter, float] = {}
    for name, layer in network_layers(check_module("model", model)).items():
        for core, factor in _factors(name or type(layer).__name__, layer, (optimizer, match), scale):
            factors[core] = min(factor, factors.get(core, math.inf))
    groups: dict[Any, dict[str, Any]] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        "others": {"params": [], "lr": lr, "weight_decay": 0.0, "name": "others"},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = factors.get(parameter, 1.0)
            key = factor if parameter in factors else "weights" if parameter.ndim > 1 else "others"
            own = {"params": [], "lr": lr * factor, "weight_decay": 0.0, "name": name}
            groups.setdefault(key, own)["params"].append(parameter)
    found = [group for group in groups.values() if group["params"]]
    if not found:
        raise ValueError("model has no parameter that requires a gradient; there is nothing to optimise")
    return found


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; it must be a number >= 0")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number >= 0")


def _factors(name: str, layer: TensorLayer, rule: tuple[str, str], scale: str) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield each trained core with the ratio of its learning rate to a dense layer's."""
    network, cores, count = layer.network, [*layer.cores], layer.network.dense_params
    if not all(isinstance(core, nn.Parameter) for core in cores):
        raise TypeError(f"cores of {name} are parametrized, so no optimizer sets them; remove the parametrizations")
    if scale == "measured" and cores[0].is_meta:
        raise ValueError(f"scale is 'measured', but {name} is on the meta device and has no values; pass 'expected'")
    trained = [k for k, core in enumerate(cores) if core.requires_grad]
    for k in trained:
        if scale == "measured":
            squares = column_squares(network, cores, k)
            copies = cores[k].numel() / squares.numel()
            square, length = copies * float(squares.sum()), copies * float(squares.sqrt().sum())
        else:
            square = count * (layer.variance.weight_std / layer.variance.std[k]) ** 2
            length = math.sqrt(square * cores[k].numel())
        if not 0 < square < math.inf:
            raise ValueError(
                f"core {k} of {name} has no learning rate, since cores around it are zero or not finite; "
                "initialise them, or pass scale='expected'"
            )
        factor = count / len(trained) / (square if rule != ("adam", "decrease") else length)
        yield cores[k], factor if rule != ("adam", "norm") else math.sqrt(factor)


@torch.no_grad()
def column_squares(network: TensorNetwork, cores: Sequence[Tensor], k: int) -> Tensor:
    """Return the squared norms of the columns of the kernel's derivative by core k.

    Returns:
        Tensor: its axes are those that core k shares with other cores; the norms do not depend on core k's other axes.
        In float64 where the device has it.

    Example:
        >>> network = TensorNetwork.parse("i:5 r:2, r o:3")
        >>> column_squares(network, [torch.ones(5, 2), torch.ones(2, 3)], 0)
        tensor([3., 3.], dtype=torch.float64)
    """
    others = [j for j in range(len(cores)) if j != k]
    axes = [network.cores[j] for j in others]
    shared = tuple(axis for axis in network.cores[k] if any(axis in core for core in axes))
    fine = torch.float32 if cores[k].device.type == "mps" else torch.float64
    if not others:
        return torch.ones((), dtype=fine)
    pair = [*axes, *(copy(core, (*network.dense_axes, *shared)) for core in axes)]
    return contract([whole(cores[j]).to(fine) for j in others] * 2, pair, shared).clamp(min=0)
