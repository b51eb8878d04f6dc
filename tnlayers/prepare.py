"""The new layers of a model, made before the first is put in its place: inputs seen, ranks chosen, kernels fitted."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.allocate import Candidate, by_energy, spread
from tnlayers.config import TensorizeConfig
from tnlayers.observe import dense_flops, fewest_flops, observe
from tnlayers.spots import Spot

logger = logging.getLogger("tnlayers")


def watch(model: nn.Module, spots: list[Spot], examples: Iterable[Any], *, moments: bool = False) -> None:
    """Note for every layer the shapes of its inputs, or their second moments."""
    usable = [
        spot for spot in spots if not isinstance(spot.module._parameters.get("weight"), nn.UninitializedParameter)
    ]
    seen = observe(model, {spot.module: spot.geometry for spot in usable}, examples, moments=moments)
    for spot in usable:
        if spot.module in seen and moments:
            spot.moments = seen[spot.module].moments
        elif spot.module in seen:
            spot.shapes = seen[spot.module].shapes


def choose_ranks(chosen: list[Spot], config: TensorizeConfig) -> None:
    """Give every layer whose rank the configuration leaves to an energy or a budget its rank, or a reason for none."""
    if config.energy is None and config.budget is None:
        return
    undecided = [spot for spot in chosen if spot.settings["rank"] is None and _possible(spot)]
    for spot in undecided:
        if spot.settings["decompose"] and spot.module.weight.is_meta:
            raise ValueError(f"{spot.names[0]} is on the meta device and has no kernel to look at; say decompose=False")
        if spot.settings["decompose"] and not torch.isfinite(spot.module.weight).all():
            raise ValueError(f"{spot.names[0]}: weight holds NaN or infinity; only finite kernels can be fitted")
    if config.energy is not None:
        _by_energy(undecided, config.energy)
    for what, share in (config.budget or {}).items():
        _by_budget(undecided, what, share)


def _by_energy(undecided: list[Spot], energy: float) -> None:
    for spot in undecided:
        if not spot.settings["decompose"]:
            raise ValueError(f"energy is {energy}, but an override says decompose=False for {spot.names[0]}")
        rank, dense = by_energy(spot.make(1), spot.kernel, energy), spot.module.weight.numel()
        spot.settings["rank"] = rank
        if spot.make(rank).network.num_params >= dense:
            spot.reason = f"the energy {energy:g} needs no fewer than its {dense:,} parameters"


def _by_budget(undecided: list[Spot], what: str, share: float) -> None:
    if what == "flops":
        for spot in undecided:
            spot.reason = "" if spot.shapes else "the example input does not reach it"
        undecided = [spot for spot in undecided if not spot.reason]
    if not undecided:
        reached = " that the example input reaches" if what == "flops" else ""
        raise ValueError(f"budget is {share:g} of {what}, but no layer{reached} is left to spend it on")
    for spot, rank in zip(undecided, spread([_candidate(spot, what) for spot in undecided], share), strict=True):
        spot.settings["rank"] = rank
        spot.reason = "" if rank is not None else f"the budget of {what} leaves it plain"


def make(chosen: list[Spot], dry_run: bool) -> None:
    """Make the new layers. One that refuses its arguments is left alone, but it is an error if all of them do.

    Raises:
        TypeError, ValueError: the sentence of the layer, with its name.
    """
    for spot in chosen:
        if spot.reason:
            continue
        cls, arguments = spot.layer
        fit = spot.settings["decompose"]
        try:
            draft = spot.make(arguments["rank"])
        except TypeError as error:
            raise TypeError(f"{spot.names[0]}: {error}") from None
        except ValueError as error:
            spot.reason = f"refused: {error}"
            continue
        if len(draft.network.cores) == 1 and not draft.rank:
            spot.reason = "refused: its network would be one dense core"
            continue
        if fit and spot.module.weight.is_meta and not dry_run:
            raise ValueError(f"{spot.names[0]} is on the meta device and has no kernel to fit; say decompose=False")
        spot.reason = ("to be " if dry_run else "") + ("fitted" if fit else "drawn")
        spot.new = draft
        if not dry_run:
            try:
                spot.new = cls.from_dense(spot.plain, decompose=fit, moments=spot.moments if fit else None, **arguments)
            except ValueError as error:
                raise ValueError(f"{spot.names[0]}: {error}") from None
            spot.error = _error(spot.new.weight, spot.module.weight) if fit else None
            spot.reason += ", weighted by what it gets" if spot.moments is not None else ""
        logger.info("%s: %s, %s", spot.names[0], spot.reason, spot.new)
    refused = [spot for spot in chosen if spot.reason.startswith("refused: ")]
    if refused and len(refused) == len(chosen):
        name, reason = refused[0].names[0], refused[0].reason.removeprefix("refused: ")
        raise ValueError(f"{name}: {reason}; no layer can be swapped")


def _candidate(spot: Spot, what: str) -> Candidate:
    kernel = spot.kernel if spot.settings["decompose"] else None
    if what == "params":
        return Candidate(spot.make, lambda layer: layer.network.num_params, spot.module.weight.numel(), kernel)
    dense = dense_flops(spot.geometry, spot.shapes)
    return Candidate(spot.make, lambda layer: fewest_flops(layer, spot.shapes), dense, kernel)


def _possible(spot: Spot) -> bool:
    """Whether the smallest network fits the layer; if not, the report says why."""
    try:
        spot.make(1)
    except ValueError as error:
        spot.reason = f"refused: {error}"
    return not spot.reason


def _error(new: Tensor, old: Tensor) -> float:
    fine = torch.float32 if old.device.type == "mps" else torch.float64
    old = old.to(fine)
    return float((new.to(fine) - old).norm() / old.norm().clamp_min(torch.finfo(fine).tiny))
