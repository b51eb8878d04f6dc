"""The new layers of a model, made before the first is put in its place: inputs seen, ranks chosen, kernels fitted."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.observe import observe
from tnlayers.backend.views import exchange
from tnlayers.fitting.input_moments import channels, follow, pairs, products, second_moments
from tnlayers.fitting.metric import damped
from tnlayers.layers.core_memory import refuse
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.flops import dense_flops, fewest_flops
from tnlayers.tensorize.rank_budget import Candidate, by_energy, spread
from tnlayers.tensorize.sites import Spot

logger = logging.getLogger("tnlayers")


def watch(
    model: nn.Module, spots: list[Spot], examples: Iterable[Any], note: Callable[[Spot, Tensor], None]
) -> list[Spot]:
    """Note something of every input of every layer.

    Returns:
        list[Spot]: in the order of their first calls; those without a call last.
    """
    watched = {spot.module: spot for spot in spots}
    order: dict[nn.Module, int] = {}

    def see(layer: nn.Module, x: Tensor) -> None:
        order.setdefault(layer, len(order))
        note(watched[layer], x)

    observe(model, watched, examples, see)
    spots = sorted(spots, key=lambda spot: order.get(spot.module, len(order)))
    for spot in spots:  # the first that is called tells where it began
        if spot.moments is not None:
            _check_finite(spot, spot.moments)
    return spots


def note_shape(spot: Spot, x: Tensor) -> None:
    """Note the shape of an input."""
    spot.shapes.append(tuple(x.shape))


def note_moments(spot: Spot, x: Tensor) -> None:
    """Add to the second moments over channels, where a rank is to be chosen by them."""
    if spot.settings["rank"] is None and spot.settings["decompose"]:
        rows = channels(x, spot.geometry)
        new = products(rows, rows).sum(0)
        spot.moments = new if spot.moments is None else spot.moments + new


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
        if not spot.kernel.any():
            continue  # a kernel of zeros has no energy, and the default rank
        rank, dense = by_energy(spot.make(1), _weighted(spot), energy), spot.module.weight.numel()
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


def make(model: nn.Module, chosen: list[Spot], dry_run: bool, calibration: Sequence[Any] = ()) -> None:
    """Make the new layers. One that refuses its arguments is left alone, but it is an error if all of them do.

    With calibration, each layer is fitted to give on the inputs that it gets behind those before it, which are fitted
    already, what the original layer gives on its own.

    Raises:
        TypeError, ValueError: the sentence of the layer, with its name.
    """
    fitted: dict[nn.Module, nn.Module] = {}
    for spot in chosen:
        if spot.reason:
            continue
        cls, arguments = spot.layer
        fit = spot.settings["decompose"]
        try:
            draft = spot.make(arguments["rank"])
            refuse(cls.__name__, draft.network, arguments["rank"], spot.module.weight)
        except TypeError as error:
            raise TypeError(f"{spot.names[0]}: {error}") from None
        except ValueError as error:
            spot.reason = f"refused: {error}"
            continue
        if len(draft.network.cores) == 1 and not draft.rank:
            spot.reason = "refused: its network would be one dense core"
            continue
        if arguments["rank"] is None and draft.keep_ratio >= 1:  # nobody asked for this size
            count, dense = draft.network.num_params, draft.network.dense_params
            spot.reason = f"refused: its smallest network has {count:,} parameters, no fewer than its {dense:,}"
            continue
        if fit and spot.module.weight.is_meta and not dry_run:
            raise ValueError(f"{spot.names[0]} is on the meta device and has no kernel to fit; say decompose=False")
        spot.reason = ("to be " if dry_run else "") + ("fitted" if fit else "drawn")
        spot.new = draft
        if not dry_run:
            plain, moments = spot.plain, None
            if fit and calibration:
                plain, moments = _calibrated(model, spot, fitted, calibration)
            try:
                spot.new = cls.from_dense(plain, decompose=fit, moments=moments, **arguments)
            except ValueError as error:
                raise ValueError(f"{spot.names[0]}: {error}") from None
            if fit:
                fitted[spot.module] = spot.new
                spot.error = _error(spot.new.weight, spot.module.weight)
            spot.reason += ", to what it gets" if moments is not None else ""
        logger.info("%s: %s, %s", spot.names[0], spot.reason, spot.new)
    refused = [spot for spot in chosen if spot.reason.startswith("refused: ")]
    if refused and len(refused) == len(chosen):
        name, reason = refused[0].names[0], refused[0].reason.removeprefix("refused: ")
        raise ValueError(f"{name}: {reason}; no layer can be swapped")


def _calibrated(
    model: nn.Module, spot: Spot, stand_ins: dict[nn.Module, nn.Module], calibration: Sequence[Any]
) -> tuple[nn.Module, Tensor | None]:
    """The plain layer to fit to, and the second moments of its inputs, unless it gets nothing but zeros."""
    plain: Any = spot.plain
    found = second_moments(pairs(model, spot.module, stand_ins, calibration), spot.geometry)
    if found is None or not found[0].any():
        return plain, None
    _check_finite(spot, *found)
    kernel, groups = follow(spot.kernel, *found), spot.geometry.groups
    weight = exchange(kernel, groups) if spot.geometry.transposed else kernel
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=plain.weight.requires_grad)
    return plain, found[0].sum(0)


def _candidate(spot: Spot, what: str) -> Candidate:
    # Of a kernel of zeros as little is known as of one that is drawn: its size.
    kernel = _weighted(spot) if spot.settings["decompose"] and spot.kernel.any() else None
    if what == "params":
        return Candidate(spot.make, lambda layer: layer.network.num_params, spot.module.weight.numel(), kernel)
    dense = dense_flops(spot.geometry, spot.shapes)
    device = spot.module.weight.device.type
    return Candidate(spot.make, lambda layer: fewest_flops(layer, spot.shapes, device), dense, kernel)


def _check_finite(spot: Spot, *moments: Tensor) -> None:
    if not all(bool(torch.isfinite(each).all()) for each in moments):
        raise ValueError(
            f"{spot.names[0]}: its inputs on the calibration batches hold NaN or infinity, or their squares do; "
            "fits need finite ones"
        )


def _weighted(spot: Spot) -> Tensor:
    """The kernel, whose squared norm is that of its outputs where second moments of its inputs are known."""
    if spot.moments is None:
        return spot.kernel
    factor = torch.linalg.cholesky(damped(spot.moments, spot.moments.diagonal().mean()))
    weighted: Tensor = torch.einsum("oi...,ij->oj...", spot.kernel.to("cpu", torch.float64), factor)
    return weighted


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
