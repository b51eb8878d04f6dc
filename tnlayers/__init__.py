"""Tensor-network layers for PyTorch, correctly initialised by one variance solver."""

from tnlayers import zoo
from tnlayers.execution.autotuning import autotune
from tnlayers.execution.freezing import Frozen, freeze_, thaw_
from tnlayers.formats import FORMATS, Format, register
from tnlayers.init.variance import Init, Variance, solve
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.conv import TensorConv, TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import (
    TensorConvTranspose,
    TensorConvTranspose1d,
    TensorConvTranspose2d,
    TensorConvTranspose3d,
)
from tnlayers.layers.linear import TensorLinear
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.zoo import *  # noqa: F403  (the layers of every format)

from tnlayers.interop.tensorly_torch import from_tltorch, initialize_, to_tltorch  # isort: skip  (made of the layers)
from tnlayers.training.calibrate import calibrate_, scale_residual_  # isort: skip
from tnlayers.checkpoint.save_load import load_tensorized, save_tensorized  # isort: skip
from tnlayers.tensorize.config import TensorizeConfig  # isort: skip
from tnlayers.tensorize.report import TensorizeReport, remap_optimizer_  # isort: skip
from tnlayers.tensorize.swap import densify_, tensorize_, unfold_  # isort: skip
from tnlayers.interop.plain_torch import unfold  # isort: skip
from tnlayers.tensorize.overview import Summary, summary  # isort: skip
from tnlayers.training.learning_rates import frobenius_penalty, param_groups, squared_norm  # isort: skip

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
