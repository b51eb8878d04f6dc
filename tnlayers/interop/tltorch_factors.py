"""Factors of tensorly-torch's layers: the network that they make, and their axes in tensorly-torch's order.

Sizes are read from the factors, since tensorly-torch does not update ``rank``. tensorly-torch is optional. Importing it
sets tensorly's global backend, so it is imported only where needed.
"""

import importlib
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from tnlayers.formats.base import numbered
from tnlayers.layers.base import DTYPES
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import KERNEL_AXES, Axes

CONV = {"CP": "CPTensor", "Tucker": "TuckerTensor", "TT": "TTTensor", "Einsum": "DenseTensor"}
LINEAR = {"CP": "CPTensorized", "Tucker": "TuckerTensorized", "TT": "BlockTT", "Einsum": "DenseTensorized"}
"""tensorly-torch's tensor classes in convolutions and in linear layers, by the family name in our layers."""
SPATIAL = "stride", "padding", "dilation"


class Factored(NamedTuple):
    """The network, geometry and values of a tensorly-torch layer. Each core is a view of a factor."""

    network: TensorNetwork
    geometry: Geometry
    family: str
    factors: list[Tensor]
    weights: list[Tensor]


def layout_of(family: str, outputs: Axes, inputs: Axes, kernel: Axes) -> tuple[Axes, ...]:
    """Return the axes of every factor, in tensorly-torch's order, without a train's outer ranks of 1."""
    dense = outputs + inputs + kernel
    if family == "Einsum":
        return (dense,)
    if family == "CP":
        return tuple((axis, "r") for axis in dense)
    if family == "Tucker":
        return tuple(f"r{axis}" for axis in dense), *((axis, f"r{axis}") for axis in dense)
    train = [(axis,) for axis in inputs + kernel + outputs] if kernel else [*zip(outputs, inputs, strict=False)]
    bonds: list[Axes] = [(), *((f"r{k}",) for k in range(1, len(train))), ()]
    return tuple(bonds[k] + axes + bonds[k + 1] for k, axes in enumerate(train))


def read_factors(layer: Any) -> Factored:
    """Read the network and factors of a FactorizedConv or FactorizedLinear; raise if they are not supported."""
    tltorch, weight = imported(), layer.weight
    conv, kind = isinstance(layer, tltorch.FactorizedConv), type(weight).__name__
    kinds = {name: family for family, name in (CONV if conv else LINEAR).items()}
    if kind not in kinds or type(weight) is not getattr(tltorch, kind):
        raise ValueError(f"its weight is a {kind}; accepted: {', '.join(kinds)}")
    if layer.n_layers != 1:
        raise ValueError(f"n_layers is {layer.n_layers}; it must be 1, a layer with a tensor of its own")
    for hook in (*weight._forward_pre_hooks.values(), *weight._forward_hooks.values()):
        raise ValueError(f"its weight has the hook {type(hook).__name__}, which may change factors; remove it first")
    family, fits = kinds[kind], True
    factors = [weight.tensor] if family == "Einsum" else [weight.factors[k] for k in range(len(weight.factors))]
    if family == "TT":
        fits = factors[0].shape[0] == factors[-1].shape[-1] == 1
        factors[0] = factors[0][0]
        factors[-1] = factors[-1][..., 0]
    order = factors[0].ndim if family == "Einsum" else len(factors)
    factors = [weight.core, *factors] if family == "Tucker" else factors
    weights = [weight.weights] if family == "CP" and weight.weights is not None else []
    whole = conv or family == "Einsum"
    counts = [1, 1] if whole else [1 if isinstance(s, int) else len(s) for s in weight.tensorized_shape]
    outputs, inputs = map(numbered, "oi", counts)
    layout = layout_of(family, outputs, inputs, KERNEL_AXES[5 - order :] if conv else ())
    fits &= [len(axes) for axes in layout] == [factor.ndim for factor in factors] and (not conv or 3 <= order <= 5)
    pairs = [*zip(chain(*layout), chain(*(factor.shape for factor in factors)), strict=False)]
    sizes = dict(pairs)
    fits &= all(sizes[axis] == size for axis, size in pairs)
    if not fits or any(vector.shape != factors[0].shape[1:] for vector in weights):
        given = ", ".join(str(tuple(tensor.shape)) for tensor in weight.state_dict().values())
        raise ValueError(f"its factors, of shapes {given}, make no {kind} for a {type(layer).__name__}")
    if any(factor.dtype not in DTYPES for factor in factors):
        raise TypeError(f"its factors are of {factors[0].dtype}; accepted: {', '.join(map(str, DTYPES))}")
    network = TensorNetwork(layout, sizes)
    out, inner, *kernel = network.dense_shape
    if not conv and (out, inner) != tuple(layer.weight_shape):
        raise ValueError(f"its factors make {out} x {inner} entries of {layer.out_features} x {layer.in_features}")
    own: dict[str, Any] = {name: tuple(getattr(layer, name).tolist()) for name in SPATIAL if conv}
    return Factored(network, Geometry(inner, out, tuple(kernel), **own), family, factors, weights)


def imported() -> Any:
    """Import tensorly-torch; raise ImportError with the command that installs it."""
    try:
        return importlib.import_module("tltorch")
    except ImportError as error:
        raise ImportError("tensorly-torch is missing; pip install 'tnlayers[tltorch]'") from error
