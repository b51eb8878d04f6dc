"""What a swap did to every layer, and why; and the optimizer that was made before it."""

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from tnlayers.tensorize import text_tables


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: qualified name; ``aliases`` are further places of the same module.
        kind: what it was, as it prints itself.
        swapped: whether it was replaced (in a dry run: would be).
        reason: why it was, or was left alone.
        format, rank: of the tensor layer; rank maps bonds to sizes.
        params: entries of the weight before and after.
        flops: on the example input before and after, two for each multiply-add: after, of the plan that runs or of one
            in which the input meets core by core, whichever has fewer (the planner may prefer one with more that is
            faster). None without an example, or where the model never called the layer.
        error: ``||W - W'|| / ||W||`` of a fitted kernel.
    """

    name: str
    kind: str
    swapped: bool
    reason: str
    aliases: tuple[str, ...] = ()
    format: str | None = None
    rank: Mapping[str, int] | None = None
    params: tuple[int, int] | None = None
    flops: tuple[int, int] | None = None
    error: float | None = None


@dataclass(frozen=True)
class Replaced:
    """A parameter that left the model, held weakly, its name in its layer, and what came in its place."""

    old: "weakref.ref[nn.Parameter]"
    name: str
    new: Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class TensorizeReport(Mapping[str, LayerReport]):
    """Every convolution and linear layer of a model, by name; ``print`` shows a table.

    Attributes:
        layers: one entry for each, in the model's order.
        model_params: parameters of the whole model before and after.
        dry_run: whether the model was left as it was.
    """

    layers: tuple[LayerReport, ...]
    model_params: tuple[int, int]
    dry_run: bool = False
    _replaced: Sequence[Replaced] = field(default=(), repr=False, compare=False)
    _order: tuple[Sequence[int], Sequence[int]] = field(default=((), ()), repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of a name or an alias."""
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __reduce__(self) -> Any:
        # What was replaced is held weakly and stays behind.
        return TensorizeReport, (self.layers, self.model_params, self.dry_run)

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the replaced layers."""
        return tuple(layer.name for layer in self.layers if layer.swapped)

    def total(self, what: str) -> tuple[int, int] | None:
        """Sum of 'params' or 'flops' over the layers before and after; None where a layer has none."""
        pairs = [getattr(layer, what) for layer in self.layers]
        pairs = [pair for pair in pairs if pair is not None]
        return (sum(before for before, _ in pairs), sum(after for _, after in pairs)) if pairs else None

    def __str__(self) -> str:
        rows, totals = self._table()
        return f"{text_tables.text(rows)}\n{totals}"

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        return text_tables.page(*self._table())

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        rows: list[tuple[str, ...]] = [("layer", "was", "becomes", "parameters", "FLOPs", "error", "why")]
        rows += [
            (
                text_tables.place(layer.name, layer.aliases),
                layer.kind,
                f"{layer.format} {text_tables.sizes(layer.rank)}".rstrip() if layer.format else "-",
                _change(layer.params),
                _change(layer.flops),
                "" if layer.error is None else f"{layer.error:.4f}",
                layer.reason,
            )
            for layer in self.layers
        ]
        count = f"{len(self.swapped)} of {len(self)} layers {'would be ' if self.dry_run else ''}swapped"
        totals = [f"{_change(self.total('params'))} in their weights", f"{_change(self.model_params)} in the model"]
        flops = self.total("flops")
        totals += [f"{_change(flops)} FLOPs"] if flops else []
        return rows, f"{count}; parameters: {'; '.join(totals)}"


def remap_optimizer_(optimizer: Optimizer, report: TensorizeReport) -> int:
    """Give an optimizer that was made before a swap the parameters that came with it.

    In each parameter group, what replaced a weight takes its place, or the place that the model's order gives it, if
    the group had that order; the groups and their settings stay the same objects, so learning-rate schedulers go on.
    The state of parameters that are still in the model (biases among them) is kept. The state of a replaced weight is
    dropped, since moments of a kernel's gradient are not those of cores' gradients: the new parameters start without
    any, as in a new optimizer.

    Args:
        optimizer: any optimizer of torch's interface.
        report: what ``tensorize_``, ``densify_`` or ``unfold_`` returned.

    Returns:
        int: how many parameters were replaced.

    Raises:
        ValueError: the optimizer holds none of the replaced parameters, or is LBFGS; or the report is of a dry run.

    Example:
        >>> import torch, tnlayers
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> optimizer = torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1)
        >>> config = tnlayers.TensorizeConfig(decompose=False)
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # that the optimizer holds a parameter that is gone
        ...     report = tnlayers.tensorize_(model, config)
        >>> remap_optimizer_(optimizer, report), len(optimizer.param_groups[0]["params"])
        (1, 3)
    """
    if report.dry_run:
        raise ValueError("report is of a dry run, which replaced nothing")
    if isinstance(optimizer, LBFGS):
        raise ValueError("optimizer is LBFGS, whose state is of all parameters together; make a new one")
    before, after = ({place: k for k, place in enumerate(order)} for order in report._order)
    replaced = {id(old): each for each in report._replaced if (old := each.old()) is not None}
    count = 0
    for group in optimizer.param_groups:
        found: list[tuple[nn.Parameter, str]] = []
        places = [before.get(id(parameter), -1) for parameter in group["params"]]
        entries: Any = zip_longest(group["params"], group.get("param_names", ()), fillvalue="")
        for parameter, name in entries:
            here = replaced.get(id(parameter))
            count += here is not None
            if here is not None:
                optimizer.state.pop(parameter, None)
            path = name.removesuffix(here.name) if here else ""
            for new_name, new in (here.new if here else {name: parameter}).items():
                found.append((new, path + new_name))
        if places == sorted(places) and -1 not in places:  # as the model has them, so that a saved state can be loaded
            found.sort(key=lambda each: after[id(each[0])])
        group["params"][:] = [parameter for parameter, _ in found]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in found]
    if not count:
        raise ValueError("optimizer holds none of the parameters that were replaced")
    return count


def holders(parameters: Sequence[nn.Parameter]) -> list[Optimizer]:
    """The optimizers that hold one of these parameters."""
    wanted = set(map(id, parameters))
    kinds = _kinds(Optimizer)

    def found() -> list[Optimizer]:
        alive = (each for each in gc.get_objects() if type(each) in kinds)  # of millions: a look-up, no issubclass
        return [o for o in alive if any(id(p) in wanted for group in o.param_groups for p in group["params"])]

    if not found():
        return []
    gc.collect()  # what is in cycles and of no use any more is no matter
    return found()


def _kinds(kind: type[Optimizer]) -> set[type[Optimizer]]:
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def _change(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return ""
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / max(before, 1):.1%})"
