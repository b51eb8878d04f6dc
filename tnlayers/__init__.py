"""Tensor-network layers for PyTorch, correctly initialised by one variance solver.

Public is what ``__all__`` names here, and the modules ``tnlayers.formats``, ``tnlayers.models`` and
``tnlayers.testing``. All else may change.
"""

from tnlayers._version import __version__ as __version__
from tnlayers.checkpoint.save_load import load_tensorized, save_tensorized
from tnlayers.execution.autotuning import autotune
from tnlayers.execution.freezing import Frozen, freeze_, thaw_
from tnlayers.execution.tuning_report import AutotuneReport
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.decomposition import Decomposition
from tnlayers.formats import FORMATS, Format, register
from tnlayers.init.variance import Init, Variance, solve
from tnlayers.interop.huggingface import register_with_transformers
from tnlayers.interop.plain_torch import unfold
from tnlayers.interop.tensorly_torch import from_tltorch, initialize_, to_tltorch
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.by_format import *  # noqa: F403  (the layers of every format)
from tnlayers.layers.conv import TensorConv, TensorConv1d, TensorConv2d, TensorConv3d
from tnlayers.layers.conv_transpose import (
    TensorConvTranspose,
    TensorConvTranspose1d,
    TensorConvTranspose2d,
    TensorConvTranspose3d,
)
from tnlayers.layers.embedding import TensorEmbedding
from tnlayers.layers.embedding_bag import TensorEmbeddingBag
from tnlayers.layers.has_format import LAYERS as _LAYERS
from tnlayers.layers.linear import TensorLinear
from tnlayers.layers.recurrent import TensorGRU, TensorLSTM, TensorRNN
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_by_format import *  # noqa: F403
from tnlayers.layers.tied import TiedLinear
from tnlayers.measuring.measure import MeasuredRates, measure_rates
from tnlayers.overview.compare import Comparison, compare
from tnlayers.overview.signal import Signal, signal
from tnlayers.overview.summary import Summary, summary
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.tensorize.back import densify_, unfold_
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.load_dense import load_dense_
from tnlayers.tensorize.optimizer import remap_optimizer_
from tnlayers.tensorize.parametrize import parametrize_
from tnlayers.tensorize.report import TensorizeReport
from tnlayers.tensorize.swap import tensorize_
from tnlayers.training.calibrate import calibrate_, scale_residual_
from tnlayers.training.learning_rates import param_groups
from tnlayers.training.penalty import frobenius_penalty, squared_norm
from tnlayers.training.prune_ranks import prune_ranks_
from tnlayers.training.prune_report import PruneReport
from tnlayers.training.rank_regularisation import rank_dropout_, rank_lasso

__all__ = [
    "FORMATS", "AutotuneReport", "Comparison", "Decomposition", "Format", "Frozen", "Geometry", "Init",
    "MeasuredRates", "PruneReport", "Signal", "Summary", "TensorConv", "TensorConv1d", "TensorConv2d",
    "TensorConv3d", "TensorConvTranspose", "TensorConvTranspose1d", "TensorConvTranspose2d",
    "TensorConvTranspose3d", "TensorEmbedding", "TensorEmbeddingBag", "TensorGRU", "TensorLSTM", "TensorLayer",
    "TensorLinear", "TensorNetwork", "TensorRNN", "TensorRecurrent", "TensorizeConfig", "TensorizeReport",
    "TiedLinear", "Variance", "autotune", "calibrate_", "compare", "decompose", "densify_", "freeze_",
    "frobenius_penalty", "from_tltorch", "initialize_", "load_dense_", "load_tensorized", "measure_rates",
    "param_groups", "parametrize_", "prune_ranks_", "rank_dropout_", "rank_lasso", "register",
    "register_with_transformers", "remap_optimizer_", "save_tensorized", "scale_residual_", "signal", "solve",
    "squared_norm", "summary", "tensorize_", "thaw_", "to_tltorch", "unfold", "unfold_",
]  # fmt: skip
__all__ += [_layer.__name__ for _layer in _LAYERS.values()]
