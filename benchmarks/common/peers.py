"""Layers of tednet and tensorly-torch with the same networks as ours. `pip install .[peers]` installs the peers."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.common.families import LayerCase


def tednet_peer(row: LayerCase, layer: Any) -> nn.Module | None:
    """Return the same network in tednet, or None if it has none."""
    shape, (inputs, outputs, _, stride) = layer.network, row.shape
    ranks = list(layer.rank.values())
    arguments = {"kernel_size": 3, "stride": stride, "padding": 1, "bias": False}
    factors = list(shape.shape(shape.inputs)), list(shape.shape(shape.outputs))

    def find(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"tednet.tnn.{module}"), name)

    if row.family == "cp":
        return find("cp", "CPConv2D")(inputs, outputs, ranks[0], **arguments)
    if row.family == "tucker":
        return find("tucker2", "TK2Conv2D")(inputs, outputs, ranks, **arguments)
    if row.family == "tt":
        return find("tensor_train", "TTConv2D")(*factors, ranks, **arguments)
    if row.family == "tr":
        return find("tensor_ring", "TRConv2D")(*factors, ranks, **arguments)
    if row.family == "btt" and len(set(ranks)) == 1:
        return find("bt_tucker", "BTTConv2D")(*factors, ranks, 4, **arguments)
    return None


def tltorch_peer(row: LayerCase, layer: Any, implementation: str = "factorized") -> nn.Module | None:
    """Return the same format and ranks in tensorly-torch, as constructed, or None if it has no such format."""
    inputs, outputs, _, stride = row.shape
    ranks = list(layer.rank.values())
    kind = {"cp": "cp", "tucker": "tucker", "tt-chain": "tt"}.get(row.family)
    if kind is None:
        return None
    rank: Any = {"cp": ranks[0], "tucker": (ranks[-1], ranks[0], 3, 3), "tt": (1, *ranks, 1)}[kind]
    make: Any = importlib.import_module("tltorch").FactorizedConv
    peer: nn.Module = make(
        inputs, outputs, 3, order=2, stride=stride, padding=1, bias=False, factorization=kind, rank=rank,
        implementation=implementation,
    )  # fmt: skip
    return peer


def tltorch_peers(row: LayerCase, layer: Any) -> Iterator[nn.Module]:
    """Yield the same format and ranks in each implementation of tensorly-torch."""
    for implementation in ("factorized", "reconstructed", *(["mobilenet"] if row.family == "cp" else [])):
        peer = tltorch_peer(row, layer, implementation)
        if peer is not None:
            for parameter in peer.parameters():
                nn.init.normal_(parameter, std=0.1)
            yield peer


def peers(row: LayerCase, layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the layer of each peer that supports the row."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            peer = tednet_peer(row, layer)
            if peer is not None:
                yield "tednet", peer
        with contextlib.suppress(Exception):
            for number, peer in enumerate(tltorch_peers(row, layer)):
                yield f"tltorch{number}", peer


@torch.no_grad()
def pour_(layer: Any, peer: nn.Module) -> None:
    """Copy the values of all cores of a tednet layer into the cores of ours.

    tednet draws all values of a layer independently from one distribution, so their order does not matter. Training
    tednet's own layers takes up to forty times as long.
    """
    drawn = torch.cat([p.flatten() for name, p in peer.named_parameters() if name != "bias"])
    for core, numbers in zip(layer.cores, drawn.split([core.numel() for core in layer.cores]), strict=True):
        core.copy_(numbers.view(core.shape))
