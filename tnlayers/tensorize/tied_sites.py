"""Layers that share one weight: embeddings, and the linear outputs tied to them. They are swapped together or not."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from tnlayers.layers.table import TensorTable
from tnlayers.layers.tied import TiedLinear
from tnlayers.tensorize.sites import LayerSite
from tnlayers.tensorize.swappable import BASES, GROUPS


def join(sites: Sequence[LayerSite]) -> None:
    """Note, for embeddings and linear layers with one weight, the embedding that decides about it."""
    tables, shared = GROUPS["embedding"], dict[int, list[LayerSite]]()
    site: Any
    for site in sites:
        if site.whole and not site.fold and isinstance(site.module, (nn.Linear, *tables)):
            shared.setdefault(id(vars(site.module)["_parameters"].get("weight")), []).append(site)
    for group in shared.values():
        leads = [site for site in group if isinstance(site.module, tables)]
        own = [(each.kind, BASES[each.kind]._arguments(each.module)) for each in leads]
        if len(group) > 1 and leads and own.count(own[0]) == len(own):
            for site in group:
                site.lead = leads[0]


def join_again(sites: Sequence[LayerSite]) -> None:
    """Note, for tensor embeddings and outputs over the same cores, the first of them, which decides."""
    first: dict[tuple[int, ...], LayerSite] = {}
    for site in sites:
        if isinstance(site.module, (TensorTable, TiedLinear)):
            site.lead = first.setdefault(tuple(map(id, site.module.cores)), site)


def keep_together(sites: Sequence[LayerSite]) -> None:
    """Note for layers with one weight that all stay if one does."""
    for lead in [site for site in sites if site.lead is site]:
        group = [site for site in sites if site.lead is lead]
        stays = next((site for site in group if site.reason), None)
        other = next((site for site in group if site.settings != lead.settings), None)
        for site in group:
            if stays is not None and not site.reason:
                site.reason = _stays(stays)
            elif stays is None and other is not None:
                site.reason = f"refused: {other.names[0]} and {lead.names[0]} have one weight, but different overrides"


def _stays(site: LayerSite) -> str:
    return f"refused: another module has the same weight: {site.names[0]}.weight, which stays ({site.reason})"


def follow(sites: Sequence[LayerSite]) -> None:
    """Make the layers over the cores of another site's new embedding."""
    for site in sites:
        if not site.follows or site.reason:
            continue
        lead: Any = site.lead
        if lead.new is None:
            site.reason = _stays(lead)
        elif isinstance(site.module, nn.Linear):
            site.new = TiedLinear(lead.new, strategy=site.settings["strategy"], memory=site.settings["memory"])
        else:
            site.new = copy.deepcopy(lead.new)
            for k, core in enumerate(lead.new.cores):
                site.new.cores[k] = core
        if site.new is not None:
            site.new.training, site.error = site.module.training, lead.error
            site.reason = f"tied to {lead.names[0]}, with which its weight is counted{site.manner}"


def tie_again(sites: Sequence[LayerSite]) -> None:
    """Give new plain layers that come from the same cores one weight."""
    for site in sites:
        if site.lead is not None:
            site.new.weight = site.lead.new.weight
