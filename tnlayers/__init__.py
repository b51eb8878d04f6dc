"""Tensor-network layers for PyTorch, correctly initialised by one variance solver."""

from tnlayers import zoo
from tnlayers.autotune import autotune
from tnlayers.conv import TensorConv, TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.formats import FORMATS, Format, register
from tnlayers.geometry import Geometry
from tnlayers.layer import TensorLayer
from tnlayers.linear import TensorLinear
from tnlayers.network import TensorNetwork
from tnlayers.transpose import (
    TensorConvTranspose,
    TensorConvTranspose1d,
    TensorConvTranspose2d,
    TensorConvTranspose3d,
)
from tnlayers.variance import Init, Variance, solve
from tnlayers.zoo import *  # noqa: F403  (the layers of every format)

from tnlayers.interop import from_tltorch, initialize_, to_tltorch  # isort: skip  (made of the layers)
from tnlayers.optim import frobenius_penalty, param_groups, squared_norm  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Format",
    "Geometry",
    "Init",
    "TensorConv",
    "TensorConv1d",
    "TensorConv2d",
    "TensorConv3d",
    "TensorConvTranspose",
    "TensorConvTranspose1d",
    "TensorConvTranspose2d",
    "TensorConvTranspose3d",
    "TensorLayer",
    "TensorLinear",
    "TensorNetwork",
    "Variance",
    "autotune",
    "frobenius_penalty",
    "from_tltorch",
    "initialize_",
    "param_groups",
    "register",
    "solve",
    "squared_norm",
    "to_tltorch",
]
__all__ += zoo.__all__
