"""Tensor-network layers for PyTorch, correctly initialised by one variance solver."""

from tnlayers import zoo
from tnlayers.autotune import autotune
from tnlayers.conv import TensorConv, TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.formats import FORMATS, Format, register
from tnlayers.freezing import Frozen, freeze_, thaw_
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
from tnlayers.calibrate import calibrate_, scale_residual_  # isort: skip
from tnlayers.checkpoint import load_tensorized, save_tensorized  # isort: skip
from tnlayers.config import TensorizeConfig  # isort: skip
from tnlayers.report import TensorizeReport, remap_optimizer_  # isort: skip
from tnlayers.swap import densify_, tensorize_, unfold_  # isort: skip
from tnlayers.unfold import unfold  # isort: skip
from tnlayers.overview import Summary, summary  # isort: skip
from tnlayers.optim import frobenius_penalty, param_groups, squared_norm  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Format",
    "Frozen",
    "Geometry",
    "Init",
    "Summary",
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
    "TensorizeConfig",
    "TensorizeReport",
    "Variance",
    "autotune",
    "calibrate_",
    "densify_",
    "freeze_",
    "frobenius_penalty",
    "from_tltorch",
    "initialize_",
    "load_tensorized",
    "param_groups",
    "register",
    "remap_optimizer_",
    "save_tensorized",
    "scale_residual_",
    "solve",
    "squared_norm",
    "summary",
    "tensorize_",
    "thaw_",
    "to_tltorch",
    "unfold",
    "unfold_",
]
__all__ += zoo.__all__
