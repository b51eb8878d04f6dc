"""Tensor-network layers for PyTorch, correctly initialised by one variance solver."""

from tnlayers.autotune import autotune
from tnlayers.conv import TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.formats import FORMATS, Format, register
from tnlayers.geometry import Geometry
from tnlayers.layer import TensorLayer
from tnlayers.network import TensorNetwork
from tnlayers.variance import Init, Variance, solve
from tnlayers.zoo import (
    BTTConv1d,
    BTTConv2d,
    BTTConv3d,
    CPConv1d,
    CPConv2d,
    CPConv3d,
    EinsumConv1d,
    EinsumConv2d,
    EinsumConv3d,
    TRConv1d,
    TRConv2d,
    TRConv3d,
    TTConv1d,
    TTConv2d,
    TTConv3d,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
)

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "BTTConv1d",
    "BTTConv2d",
    "BTTConv3d",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "EinsumConv1d",
    "EinsumConv2d",
    "EinsumConv3d",
    "Format",
    "Geometry",
    "Init",
    "TRConv1d",
    "TRConv2d",
    "TRConv3d",
    "TTConv1d",
    "TTConv2d",
    "TTConv3d",
    "TensorConv1d",
    "TensorConv2d",
    "TensorConv3d",
    "TensorLayer",
    "TensorNetwork",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "Variance",
    "autotune",
    "register",
    "solve",
]
