"""tednet's compressed ResNets built from our layers, initialised by our solver or by tednet."""

import contextlib
import io
from importlib import import_module
from typing import Any

from torch import nn

import tnlayers
from benchmarks.common.peers import pour_
from tnlayers import models

PRESETS = {f"tednet-resnet{depth}": depth for depth in (20, 32)}
"""Depths of networks with all layers in one format, by name: see `tnlayers.models.tednet_resnet`."""


def tednet_network(depth: int, form: str, rank: Any, init: str | None, num_classes: int, in_channels: int) -> nn.Module:
    """Return one of tednet's networks, initialised by our solver or by tednet.

    Raises:
        ValueError, TypeError: there is no such network, or tednet is not installed.
    """
    if rank is None:
        raise ValueError("rank is None; tednet's networks need one, or seven")
    ours = {} if init in (None, "tednet") else {"init": init}
    model = models.tednet_resnet(depth, form, rank, num_classes, in_channels, **ours)
    if init == "tednet":
        if in_channels != 3:
            raise ValueError(
                f"init is 'tednet'; its networks take images with 3 channels, but these have {in_channels}"
            )
        tednet_draw_(model, tednet_peer(depth, form, rank, num_classes))
    return model


def tednet_peer(depth: int, form: str, rank: Any, num_classes: int) -> nn.Module:
    """Return the network from tednet itself."""
    module, name = {
        "tr": ("tensor_ring.tr", "TR"), "tt": ("tensor_train.tt", "TT"), "tucker": ("tucker2.tk2", "TK2"),
        "cp": ("cp.cp", "CP"), "btt": ("bt_tucker.btt", "BTT"),
    }[form]  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            kind = getattr(import_module(f"tednet.tnn.{module}_resnet"), f"{name}ResNet{depth}")
            model: nn.Module = kind([rank] * 7 if isinstance(rank, int) else [*rank], num_classes)
    except ImportError as error:
        raise ValueError("init is 'tednet', which is not installed: pip install '.[peers]'") from error
    return model


def tednet_draw_(model: nn.Module, peer: nn.Module) -> None:
    """Copy the values that tednet drew into the cores of our network, layer by layer."""
    theirs = [module for module in peer.modules() if hasattr(module, "tn_info")]
    ours = [module for module in model.modules() if isinstance(module, tnlayers.TensorLayer)]
    for layer, other in zip(ours, theirs, strict=True):
        pour_(layer, other)
