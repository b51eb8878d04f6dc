"""Construction of a model's new layers, before any is put in place: choice of ranks, fits of kernels."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tnlayers.backend.progress import Progress
from tnlayers.backend.views import exchange
from tnlayers.fitting.input_moments import follow, pairs, second_moments
from tnlayers.fitting.metric import damped
from tnlayers.layers.core_memory import refuse
from tnlayers.tensorize.flops import dense_flops, fewest_flops
from tnlayers.tensorize.rank_budget import Candidate, by_energy, spread
from tnlayers.tensorize.side_by_side import side_by_side
from tnlayers.tensorize.sites import LayerSite, Swap, check_finite

T = TypeVar("T")
logger = logging.getLogger("tnlayers")


def choose_ranks(swap: Swap) -> None:
    """Choose ranks, or a reason for none, of layers whose rank the configuration leaves to an energy or a budget."""
    config, chosen = swap.config, swap.chosen
    if config.energy is None and config.budget is None:
        return
    undecided = [site for site in chosen if site.settings["rank"] is None and _possible(site)]
    for site in undecided:
        if site.settings["decompose"] and site.module.weight.is_meta:
            raise ValueError(f"{site.names[0]} is on the meta device and has no kernel to look at; say decompose=False")
        if site.settings["decompose"] and not torch.isfinite(site.module.weight).all():
            raise ValueError(f"{site.names[0]}: weight holds NaN or infinity; only finite kernels can be fitted")
    if config.energy is not None:
        _by_energy(undecided, config.energy)
    for what, share in (config.budget or {}).items():
        _by_budget(undecided, what, share)


def _by_energy(undecided: list[LayerSite], energy: float) -> None:
    for site in undecided:
        if not site.settings["decompose"]:
            raise ValueError(f"energy is {energy}, but an override says decompose=False for {site.names[0]}")
        if not site.kernel.any():
            continue  # a zero kernel has no energy, and gets the default rank
        rank, dense = by_energy(site.make(1), _weighted(site), energy), site.module.weight.numel()
        site.settings["rank"] = rank
        if site.make(rank).network.num_params >= dense:
            site.reason = f"the energy {energy:g} needs no fewer than its {dense:,} parameters"


def _by_budget(undecided: list[LayerSite], what: str, share: float) -> None:
    if what == "flops":
        for site in undecided:
            site.reason = "" if site.shapes else "the example input does not reach it"
        undecided = [site for site in undecided if not site.reason]
    if not undecided:
        reached = " that the example input reaches" if what == "flops" else ""
        raise ValueError(f"budget is {share:g} of {what}, but no layer{reached} is left to spend it on")
    for site, rank in zip(undecided, spread([_candidate(site, what) for site in undecided], share), strict=True):
        site.settings["rank"] = rank
        site.reason = "" if rank is not None else f"the budget of {what} leaves it plain"


def make_layers(swap: Swap) -> None:
    """Make the new layers. A layer that refuses its arguments stays plain. If all layers do, raise.

    With calibration, each layer is fitted in the order of calls: on its inputs from the fitted layers before it, to the
    outputs of the original layer in the original model.

    Raises:
        TypeError, ValueError: the layer's message, with its name.
    """
    chosen, dry_run = swap.chosen, swap.dry_run
    to_fit: list[LayerSite] = []
    for site in chosen:
        if site.reason:
            continue
        cls, arguments = site.layer
        fit = site.settings["decompose"]
        try:
            draft = site.make(arguments["rank"])
            refuse(cls.__name__, draft.network, arguments["rank"], site.module.weight)
        except TypeError as error:
            raise TypeError(f"{site.names[0]}: {error}") from None
        except ValueError as error:
            site.reason = f"refused: {error}"
            continue
        if len(draft.network.cores) == 1 and not draft.rank:
            site.reason = "refused: its network would be one dense core"
            continue
        if arguments["rank"] is None and draft.keep_ratio >= 1:  # this size was not requested
            count, dense = draft.network.num_params, draft.network.dense_params
            site.reason = f"refused: its smallest network has {count:,} parameters, no fewer than its {dense:,}"
            continue
        if fit and site.module.weight.is_meta and not dry_run:
            raise ValueError(f"{site.names[0]} is on the meta device and has no kernel to fit; say decompose=False")
        site.reason = ("to be " if dry_run else "") + ("fitted" if fit else "drawn")
        site.new = draft
        if dry_run:
            logger.info("%s: %s, %s", site.names[0], site.reason, site.new)
        elif fit:
            to_fit.append(site)
        else:
            site.new = _named(site, partial(cls.from_dense, site.plain, decompose=False, **arguments))
            logger.info("%s: %s, %s", site.names[0], site.reason, site.new)
    with Progress("fitting", len(to_fit), swap.progress) as progress:
        _fit(swap, to_fit, progress)
    refused = [site for site in chosen if site.reason.startswith("refused: ")]
    if refused and len(refused) == len(chosen):
        name, reason = refused[0].names[0], refused[0].reason.removeprefix("refused: ")
        raise ValueError(f"{name}: {reason}; no layer can be swapped")


def _fit(swap: Swap, sites: list[LayerSite], progress: Progress) -> None:
    """Fit layers: with calibration one after the other, else side by side."""

    def done(site: LayerSite) -> None:
        progress.step(site.names[0])
        logger.info("%s: %s, %s", site.names[0], site.reason, site.new)

    if swap.batches:
        fitted: dict[nn.Module, nn.Module] = {}
        key: Any = None
        for site in sites:
            # Layers that get the same tensors, as the projections of attention, have the same moments.
            before, key = key, (site.inputs, replace(site.geometry, out_channels=site.geometry.in_channels))
            if key != before:
                sums = _sums(swap, site, fitted)
            plain, moments = _calibrated(site, sums)
            cls, arguments = site.layer
            site.new = _named(site, partial(cls.from_dense, plain, moments=moments, **arguments))
            fitted[site.module] = site.new
            site.error = _error(site.new.weight, site.module.weight)
            site.reason += ", to its inputs" if moments is not None else ""
            done(site)
        return
    for site in sites:  # here, because making a layer may warn
        cls, arguments = site.layer
        site.new = _named(site, partial(cls._unfitted, site.plain, **arguments))

    def work(site: LayerSite) -> None:
        with torch.no_grad():
            _named(site, partial(site.new.set_weight_, site.module.weight.detach()))
            site.error = _error(site.new.weight, site.module.weight)

    # On other devices than CPUs, the operations of several threads would wait for each other.
    workers = swap.workers if all(site.module.weight.device.type == "cpu" for site in sites) else 1
    side_by_side(work, sites, workers, lambda site: site.module.weight.numel(), done, progress.show)


def _named(site: LayerSite, make: Callable[[], T]) -> T:
    """Call ``make``, with the layer's name in its error."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{site.names[0]}: {error}") from None


def _sums(swap: Swap, site: LayerSite, stand_ins: dict[nn.Module, nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Return the sums of ``second_moments`` over all batches, or None if the layer is not called."""
    once = [run for run, _ in site.inputs] == [*range(len(swap.batches))]
    found = second_moments(pairs(swap.model, site.module, stand_ins, swap.batches, once), site.geometry)
    check_finite(site, *(found or ()))
    return found


def _calibrated(site: LayerSite, found: tuple[Tensor, Tensor] | None) -> tuple[nn.Module, Tensor | None]:
    """Return the plain layer to fit to, and the second moments of its inputs, or None if these are all zero."""
    plain: Any = site.plain
    if found is None or not found[0].any():
        return plain, None
    kernel, groups = follow(site.kernel, *found), site.geometry.groups
    weight = exchange(kernel, groups) if site.geometry.transposed else kernel
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=plain.weight.requires_grad)
    return plain, found[0].sum(0)


def _candidate(site: LayerSite, what: str) -> Candidate:
    # Of a zero kernel, as of a drawn one, only the size is known.
    kernel = _weighted(site) if site.settings["decompose"] and site.kernel.any() else None
    if what == "params":
        return Candidate(site.make, lambda layer: layer.network.num_params, site.module.weight.numel(), kernel)
    dense = dense_flops(site.geometry, site.shapes)
    device = site.module.weight.device.type
    return Candidate(site.make, lambda layer: fewest_flops(layer, site.shapes, device), dense, kernel)


def _weighted(site: LayerSite) -> Tensor:
    """Return the kernel; with known moments, scaled so that its squared norm is that of the outputs."""
    if site.moments is None:
        return site.kernel
    factor = torch.linalg.cholesky(damped(site.moments, site.moments.diagonal().mean()))
    weighted: Tensor = torch.einsum("oi...,ij->oj...", site.kernel.to("cpu", torch.float64), factor)
    return weighted


def _possible(site: LayerSite) -> bool:
    """Return whether the smallest network fits the layer; if not, note the reason."""
    try:
        site.make(1)
    except ValueError as error:
        site.reason = f"refused: {error}"
    return not site.reason


def _error(new: Tensor, old: Tensor) -> float:
    fine = torch.float32 if old.device.type == "mps" else torch.float64
    old = old.to(fine)
    return float((new.to(fine) - old).norm() / old.norm().clamp_min(torch.finfo(fine).tiny))
