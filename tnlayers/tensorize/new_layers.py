"""Construction of a model's new layers, before any is put in place: choice of ranks, fits of kernels."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tnlayers.backend.progress import Progress
from tnlayers.backend.views import exchange
from tnlayers.fitting.cuts import by_energy, by_rule
from tnlayers.fitting.input_moments import follow, pairs, second_moments
from tnlayers.fitting.metric import damped
from tnlayers.layers.core_memory import refuse
from tnlayers.spec.network import TensorNetwork
from tnlayers.tensorize.flops import dense_flops, fewest_flops
from tnlayers.tensorize.rank_budget import Candidate, spread
from tnlayers.tensorize.side_by_side import side_by_side
from tnlayers.tensorize.sites import LayerSite, Swap, check_finite

T = TypeVar("T")
logger = logging.getLogger("tnlayers")


def choose_ranks(swap: Swap) -> None:
    """Choose ranks, or a reason for none, of layers whose rank the configuration leaves to their kernel or a budget."""
    config, chosen = swap.config, swap.chosen
    given = config.energy is not None or config.budget is not None
    for site in chosen:
        rank = site.settings["rank"]
        rules = [each for each in (rank.values() if isinstance(rank, Mapping) else [rank]) if isinstance(each, str)]
        if not site.measured and (rules or (given and rank is None)):
            site.reason = "refused: no rule or budget chooses its ranks; give a rank by overrides"
    chosen = [site for site in chosen if not site.reason]
    named = [site for site in chosen if isinstance(site.settings["rank"], str) and _possible(site)]
    undecided = [site for site in chosen if given and site.settings["rank"] is None and _possible(site)]
    for site in named + undecided:
        if site.settings["decompose"] and site.weight.is_meta:
            raise ValueError(f"{site.names[0]} is on the meta device and has no kernel to look at; say decompose=False")
        if site.settings["decompose"] and not torch.isfinite(site.weight).all():
            raise ValueError(f"{site.names[0]}: weight holds NaN or infinity; only finite kernels can be fitted")
    for site in named:
        rule = site.settings["rank"]
        _by_kernel(site, "rank", repr(rule), partial(by_rule, rule=rule), lambda site: site.kernel)
    if config.energy is not None:
        for site in undecided:
            _by_kernel(site, "energy", f"{config.energy:g}", partial(by_energy, energy=config.energy), _weighted)
    for what, share in (config.budget or {}).items():
        _by_budget(undecided, what, share)


def _by_kernel(
    site: LayerSite,
    name: str,
    value: str,
    choose: Callable[[TensorNetwork, list[str], Tensor], dict[str, int]],
    kernel: Callable[[LayerSite], Tensor],
) -> None:
    """Choose the rank of a layer by its kernel, or note why it stays plain."""
    if not site.settings["decompose"]:
        raise ValueError(f"{name} is {value}, but an override says decompose=False for {site.names[0]}")
    if not site.kernel.any():
        site.settings["rank"] = None  # a zero kernel tells nothing, and gets the default rank
        return
    draft, dense = site.make(1), site.weight.numel()
    site.settings["rank"] = rank = choose(draft.network, [*draft.rank], kernel(site))
    if site.make(rank).network.num_params >= dense:
        site.reason = f"the {name} {value} needs no fewer than its {dense:,} parameters"


def _by_budget(undecided: list[LayerSite], what: str, share: float) -> None:
    if what == "flops":
        for site in undecided:
            unknown = "the example input does not reach it" if site.called else "it has no FLOPs of its own"
            site.reason = "" if site.shapes else unknown
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
        rank, fit = site.settings["rank"], site.settings["decompose"]
        try:
            draft = site.make(rank)
            for part in site.parts(draft):
                refuse(type(part).__name__, part.network, rank, site.weight)
        except TypeError as error:
            raise TypeError(f"{site.names[0]}: {error}") from None
        except ValueError as error:
            site.reason = f"refused: {error}"
            continue
        if any(len(part.network.cores) == 1 and not part.rank for part in site.parts(draft)):
            site.reason = "refused: its network would be one dense core"
            continue
        count = sum(part.network.num_params for part in site.parts(draft))
        dense = sum(part.network.dense_params for part in site.parts(draft))
        if rank is None and count >= dense:  # this size was not requested
            site.reason = f"refused: its smallest network has {count:,} parameters, no fewer than its {dense:,}"
            continue
        if fit and site.weight.is_meta and not dry_run:
            raise ValueError(f"{site.names[0]} is on the meta device and has no kernel to fit; say decompose=False")
        site.reason = ("to be " if dry_run else "") + ("fitted" if fit else "drawn") + site.manner
        site.new = draft
        if dry_run:
            logger.info("%s: %s, %s", site.names[0], site.reason, site.new)
        elif fit:
            to_fit.append(site)
        else:
            site.new = _named(site, site.drawn)
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
            plain, moments = site.plain, None
            if site.called:
                # Layers that get the same tensors, as the projections of attention, have the same moments.
                before, key = key, (site.inputs, replace(site.geometry, out_channels=site.geometry.in_channels))
                if key != before:
                    sums = _sums(swap, site, fitted)
                plain, moments = _calibrated(site, sums)
            site.new = _named(site, partial(site.fitted, plain, moments))
            if site.whole:
                fitted[site.module] = site.new
            site.error = site.distance()
            site.reason += ", to its inputs" if moments is not None else ""
            done(site)
        return
    for site in sites:  # here, because making a layer may warn
        site.new = _named(site, site.unfitted)

    def work(site: LayerSite) -> None:
        with torch.no_grad():
            _named(site, site.fit)
            site.error = site.distance()

    # On other devices than CPUs, the operations of several threads would wait for each other.
    workers = swap.workers if all(site.weight.device.type == "cpu" for site in sites) else 1
    side_by_side(work, sites, workers, lambda site: site.weight.numel(), done, progress.show)


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
    layer = site.make(1)  # the layers of other ranks have another network, and all else from this one
    inputs, outputs = map(layer.network.shape, (layer.network.inputs, layer.network.outputs))
    build = partial(layer.format.build, inputs, outputs, layer.geometry.kernel_size)
    if what == "params":
        return Candidate(build, lambda network: network.num_params, site.weight.numel(), kernel)
    dense = dense_flops(site.geometry, site.shapes)
    device = site.weight.device.type
    return Candidate(build, lambda network: fewest_flops(layer, site.shapes, device, network), dense, kernel)


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
