"""The initialisations that the benchmarks compare: tnlayers' own rules, torch's on each core, and the peers' own.

Each one makes a 3x3 convolution; format, channels and rank are equal. Those of tednet are layers of tnlayers with the
values that tednet draws. `pip install .[peers]` installs the peers.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnlayers
from benchmarks.common.families import LayerCase
from benchmarks.common.peers import pour_, tednet_peer, tltorch_peer

RULES = {
    "default": tnlayers.Init(),
    "equal split": tnlayers.Init(split="equal"),
    "paper": tnlayers.Init.of("paper"),
    "white": tnlayers.Init(distribution="normal", exact="white"),
    "exact": tnlayers.Init(distribution="normal"),
    "orthogonal": tnlayers.Init(distribution="orthogonal"),
    "typical": tnlayers.Init(typical=True),
    "orthogonal white": tnlayers.Init(distribution="orthogonal", exact="white"),
}
"""Rules of tnlayers. `default` is its default, and equals one of the others."""
CORES: dict[str, Callable[[Tensor], object]] = {
    "kaiming": lambda core: nn.init.kaiming_normal_(core, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "normal 0.02": lambda core: nn.init.normal_(core, std=0.02),
}
"""Initialisations that a user would apply to each core."""
CHANNELS = 64  # of the convolutions whose kernels are measured
PEERS = ("tednet", "tltorch", "tltorch normal")
ARMS = (*RULES, *CORES, *PEERS)
KERNELS = tuple(arm for arm in ARMS if arm != "equal split")
"""Arms whose kernels differ. `equal split` has the default's kernels; it affects training only."""


class UnavailableError(Exception):
    """A peer that is not installed, or has no such layer."""


def make(arm: str, family: str, in_channels: int, out_channels: int, rank: Any, stride: int = 1, **own: Any) -> Any:
    """Return a 3x3 convolution with padding 1 and no bias, initialised by an arm. `own` are options of the format.

    Raises:
        UnavailableError: the peer is not installed, or has no such layer.
    """
    row = LayerCase(family, (in_channels, out_channels, 0, stride), rank, 0, "")
    if arm in RULES:
        return row.layer(init=RULES[arm], **own)
    if arm in CORES:
        layer = row.layer(init="paper", **own)
        with torch.no_grad():
            for core in layer.cores:
                CORES[arm](core)
        return layer
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = row.layer(init="paper", **own)
        try:
            peer: Any = (tednet_peer if arm == "tednet" else tltorch_peer)(row, layer)
        except Exception as error:  # a peer can raise anything
            raise UnavailableError(f"{arm} {family}: {' '.join(str(error).split())}") from error
        if peer is None:
            raise UnavailableError(f"{arm} has no {family} of these ranks")
        if arm == "tednet":
            pour_(layer, peer)
            return layer
        if arm == "tltorch normal":
            with torch.no_grad():
                peer.weight.normal_(0, math.sqrt(2 / (9 * in_channels)))
    return peer


def kernel(layer: Any) -> Tensor:
    """Return the kernel of any 3x3 convolution with padding 1.

    It is `layer.weight` where the layer has one, else it is computed from the layer's impulse responses.
    """
    if isinstance(layer, (tnlayers.TensorLayer, nn.Conv2d)):
        return layer.weight.detach()
    impulses = F.pad(torch.eye(CHANNELS).reshape(CHANNELS, CHANNELS, 1, 1), (2, 2, 2, 2))
    with torch.no_grad():
        return layer(impulses)[:, :, 1:4, 1:4].flip(2, 3).transpose(0, 1).contiguous()
