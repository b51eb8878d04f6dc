"""Layers of tednet and tensorly-torch with the same networks as ours. `pip install .[peers]` installs the peers."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.common.families import IMAGE, KINDS, LINEAR, TRANSPOSED, LayerCase


def tednet_peer(row: LayerCase, layer: Any) -> nn.Module | None:
    """Return the same network in tednet, or None if it has none. It has linear layers and 2d convolutions."""
    makers = {IMAGE: _tednet_conv, LINEAR: _tednet_linear}
    return makers[row.kind](row, layer) if row.kind in makers else None


def _tednet(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"tednet.tnn.{module}"), name)


def _factors(network: Any) -> tuple[list[int], list[int]]:
    return list(network.shape(network.inputs)), list(network.shape(network.outputs))


def _tednet_linear(row: LayerCase, layer: Any) -> nn.Module | None:
    ranks, factors = list(layer.rank.values()), _factors(layer.network)
    if row.family == "btt" and len(set(ranks)) == 1:
        return _tednet("bt_tucker", "BTTLinear")(*factors, ranks, 4, **row.arguments)
    names = {"cp": ("cp", "CPLinear"), "tt": ("tensor_train", "TTLinear"), "tr": ("tensor_ring", "TRLinear")}
    if row.family not in names:
        return None
    rank: Any = ranks[0] if row.family == "cp" else ranks
    return _tednet(*names[row.family])(*factors, rank, **row.arguments)


def _tednet_conv(row: LayerCase, layer: Any) -> nn.Module | None:
    (inputs, outputs, *_), arguments = row.shape, row.arguments
    ranks, factors, find = list(layer.rank.values()), _factors(layer.network), _tednet
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
    inputs, outputs, *_ = row.shape
    ranks = list(layer.rank.values())
    if row.kind == LINEAR:
        return _tltorch_linear(row, layer, ranks, implementation)
    if row.kind == TRANSPOSED:
        return None
    kind = {"cp": "cp", "tucker": "tucker", "tt-chain": "tt"}.get(row.family)
    if kind is None:
        return None
    ndim = KINDS[row.kind].ndim
    taps = (row.kernel,) * ndim
    rank: Any = {"cp": ranks[0], "tucker": (ranks[-1], ranks[0], *taps), "tt": (1, *ranks, 1)}[kind]
    make: Any = importlib.import_module("tltorch").FactorizedConv
    peer: nn.Module = make(
        inputs, outputs, order=ndim, **row.arguments, factorization=kind, rank=rank, implementation=implementation
    )
    return peer


def _tltorch_linear(row: LayerCase, layer: Any, ranks: list[int], implementation: str) -> nn.Module | None:
    """Return the same network in tensorly-torch, whose BlockTT is our TT."""
    factors = map(tuple, _factors(layer.network))
    rank: Any = {"cp": ranks[0], "tucker": (ranks[-1], ranks[0]), "tt": (1, *ranks, 1)}.get(row.family)
    if rank is None:
        return None
    make: Any = importlib.import_module("tltorch").FactorizedLinear
    kind = "blocktt" if row.family == "tt" else row.family
    peer: nn.Module = make(*factors, **row.arguments, factorization=kind, rank=rank, implementation=implementation)
    return peer


def tltorch_peers(row: LayerCase, layer: Any) -> Iterator[nn.Module]:
    """Yield the same format and ranks in each implementation of tensorly-torch."""
    for implementation in (
        "factorized",
        "reconstructed",
        *(["mobilenet"] if row.family == "cp" and row.kind != LINEAR else []),
    ):
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
