"""Rows of a report for what a swap does not look at, so that every parameter of a model is accounted for."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.tensorize.finding import plain_name
from tnlayers.tensorize.report import ROOT, LayerReport
from tnlayers.tensorize.sites import LayerSite
from tnlayers.tensorize.swappable import GROUPS, adapters, groups, own_modules, subclass_of, swappable
from tnlayers.tensorize.weight_sites import is_matrix

VECTORS = "(vectors)"
"""Name of the row of all parameters that have one axis only."""


def entries(parameters: Iterable[Tensor]) -> int:
    """Return the number of entries of parameters, each counted once; lazy ones have none."""
    return sum(held_once([[*parameters]]))


def held_once(parameters: Iterable[Iterable[Tensor]]) -> list[int]:
    """Return for each group of parameters their entries, but for parameters of a group before.

    Example:
        >>> one, two = nn.Parameter(Tensor(3)), nn.Parameter(Tensor(2))
        >>> held_once([[one], [two, one], [two]])
        [3, 2, 0]
    """
    seen: set[int] = set()
    found = []
    for group in parameters:
        new = {id(each): each for each in group if id(each) not in seen}
        seen |= new.keys()
        sized = (each for each in new.values() if not isinstance(each, nn.UninitializedParameter))
        found.append(sum(each.numel() for each in sized))
    return found


def other_rows(model: nn.Module, sites: Sequence[LayerSite], alone: bool = False) -> tuple[LayerReport, ...]:
    """Return a row for each module whose parameters no site covers, and one for all vectors.

    Args:
        model: the model.
        sites: its sites.
        alone: whether weights of subclasses were looked at one by one, as ``parametrize=True`` does.
    """
    names = {id(each): site.names[0] for site in sites for each in site.parameters}
    covered = {inner for site in sites if site.whole for inner in own_modules(site.module)}
    inside, vectors = adapters(model), 0
    rows = []
    for path, module in model.named_modules():
        if module in covered:
            continue
        own = {name: each for name, each in module._parameters.items() if each is not None}
        own = {name: each for name, each in own.items() if not isinstance(each, nn.UninitializedParameter)}
        new = {name: each for name, each in own.items() if id(each) not in names}
        tied = {name: names[id(each)] for name, each in own.items() if id(each) in names}
        name = plain_name(path, model)
        vectors += entries(each for each in new.values() if not is_matrix(each))
        matrices = {name: each for name, each in new.items() if is_matrix(each)}
        names |= {id(each): name for each in new.values()}
        if not matrices and not (tied and isinstance(module, _NAMED)):
            continue
        held = [f"{key} {' x '.join(map(str, each.shape))}" for key, each in own.items() if is_matrix(each)]
        size = entries(matrices.values())
        shared = (
            f"; its {', '.join(tied)} is counted with {', '.join(each or ROOT for each in {*tied.values()})}"
            if tied
            else ""
        )
        rows.append(
            LayerReport(
                name=name,
                kind=f"{parametrize.type_before_parametrizations(module).__name__} {', '.join(held)}",
                swapped=False,
                reason=_reason(module, inside.get(module, ""), alone) + shared,
                params=(size, size),
                held=size,
            )
        )
    if vectors:
        reason = "norms, biases and other parameters of one axis, which no network makes smaller"
        rows.append(LayerReport(VECTORS, "-", False, reason, params=(vectors, vectors), held=vectors))
    return tuple(rows)


_NAMED: Any = GROUPS["embedding"] + GROUPS["recurrent"]
_ASK = "parametrize=True makes it a network"
_REASONS: Sequence[tuple[Any, str]] = (
    ((nn.LayerNorm, nn.RMSNorm), "a norm, which only scales"),
    (nn.MultiheadAttention, f"an attention projection held as a parameter ({_ASK})"),
)


def _reason(module: nn.Module, adapter: str, alone: bool) -> str:
    if adapter:
        return f"part of PEFT's {adapter}, which is left alone (merge or unload the adapters to swap it)"
    group = next((name for name, kinds in GROUPS.items() if isinstance(module, kinds)), "")
    if group and group not in groups():
        return f"{'an' if group[0] in 'aeiou' else 'a'} {group} layer, for which there is no tensor layer"
    if isinstance(module, tuple(each.cls for each in swappable())):
        # All layers have sites, but in the report of a way back, and those whose weights were looked at one by one.
        return (alone and subclass_of(module)) or "a plain layer"
    return next((reason for kinds, reason in _REASONS if isinstance(module, kinds)), f"no layer covers it ({_ASK})")
