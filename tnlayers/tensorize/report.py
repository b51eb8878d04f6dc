"""Report of a swap: the result for every layer, with a reason, and the replaced parameters."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tnlayers import text_tables

ROOT = "(model)"
"""What a table shows for the model itself, whose qualified name is empty."""


@dataclass(frozen=True)
class LayerReport:
    """Result of a swap for one layer.

    Attributes:
        name: qualified name; ``aliases`` are the module's further names.
        kind: the old layer's text.
        swapped: whether it was replaced (in a dry run: would be).
        reason: why it was replaced or stayed.
        format, rank: of the tensor layer; rank maps bonds to sizes.
        params: entries of the weight before and after; 0 if it is counted in the row of another layer with the weight.
        flops: on the example input before and after, two per multiply-add. After: of the executed plan or of a
            factorized one, whichever has fewer (the executed plan may have more and be faster). None without an
            example, or if the model never called the layer.
        error: ``||W - W'|| / ||W||`` of a fitted kernel.
        held: parameters before, biases included, but for those that a row above holds too.
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
    held: int = 0


@dataclass(frozen=True)
class Replaced:
    """A replaced parameter, as a weak reference, its name in its layer, and its replacements by name."""

    old: "weakref.ref[nn.Parameter]"
    name: str
    new: Mapping[str, nn.Parameter]


def replaced(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> list[Replaced]:
    """Return which parameters replace those that leave, by the names in their module before and after a swap."""
    stays = {*map(id, before.values())} & {*map(id, after.values())}
    leaving, coming = ({k: p for k, p in named.items() if id(p) not in stays} for named in (before, after))
    # A bias replaces a bias. All other new parameters replace the first other one that leaves.
    biases = {name: coming.pop(name) for name in [*coming] if "bias" in leaving and name.endswith("bias")}
    found = []
    for name, parameter in leaving.items():
        new, coming = (biases, coming) if name == "bias" else (coming, {})
        found.append(Replaced(weakref.ref(parameter), name, new))
    return found


@dataclass(frozen=True)
class TensorizeReport(Mapping[str, LayerReport]):
    """Results for every layer and weight that a swap looked at, by name; ``print`` shows a table.

    All rows together, those of ``others`` included, hold each parameter of the model once: see ``LayerReport.held``.

    Attributes:
        layers: one entry per layer or weight, in the model's order. Iteration and length are over these.
        model_params: parameters of the whole model before and after.
        dry_run: whether the model was left unchanged.
        others: all else that holds parameters, with the reason why it stays: attention projections, unknown modules,
            adapters; the last row has all vectors, such as norms. They are found by name too.

    Example:
        >>> import tnlayers
        >>> from torch import nn
        >>> report = tnlayers.tensorize_(nn.Sequential(nn.Linear(64, 64)), tnlayers.TensorizeConfig("cp", rank=8))
        >>> report.swapped, report["0"].rank, report.total("params")
        (('0',), {'r': 8}, (4096, 1024))
    """

    layers: tuple[LayerReport, ...]
    model_params: tuple[int, int]
    dry_run: bool = False
    others: tuple[LayerReport, ...] = ()
    _replaced: Sequence[Replaced] = field(default=(), repr=False, compare=False)
    _order: tuple[Sequence[int], Sequence[int]] = field(default=((), ()), repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerReport:
        """Return the row of a name or an alias."""
        for layer in (*self.layers, *self.others):
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __reduce__(self) -> Any:
        # Weak references to replaced parameters cannot be pickled.
        return TensorizeReport, (self.layers, self.model_params, self.dry_run, self.others)

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the replaced layers."""
        return tuple(layer.name for layer in self.layers if layer.swapped)

    @property
    def reached(self) -> float:
        """Share of the model's parameters, before, that are in the weights of replaced layers."""
        found = sum(layer.params[0] for layer in self.layers if layer.swapped and layer.params)
        return found / max(self.model_params[0], 1)

    def total(self, what: str) -> tuple[int, int] | None:
        """Return the sums of 'params' or 'flops' before and after over the layers that have any; None if none has."""
        pairs = [getattr(layer, what) for layer in self.layers]
        pairs = [pair for pair in pairs if pair is not None]
        return (sum(before for before, _ in pairs), sum(after for _, after in pairs)) if pairs else None

    def __str__(self) -> str:
        rows, totals = self._table()
        return f"{text_tables.text(rows, _NUMBERS)}\n{totals}"

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        return text_tables.page(*self._table(), _NUMBERS)

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        rows: list[tuple[str, ...]] = [_HEADER]
        rows += [
            (
                text_tables.place(layer.name or ROOT, layer.aliases),
                layer.kind,
                f"{layer.format} {text_tables.sizes(layer.rank)}".rstrip() if layer.format else "-",
                _change(layer.params),
                _change(layer.flops),
                "" if layer.error is None else f"{layer.error:.4f}",
                layer.reason,
            )
            for layer in (*self.layers, *self.others)
        ]
        count = f"{len(self.swapped)} of {len(self)} layers {'would be ' if self.dry_run else ''}swapped"
        totals = [f"{_change(self.total('params'))} in their weights", f"{_change(self.model_params)} in the model"]
        flops = self.total("flops")
        totals += [f"{_change(flops)} FLOPs"] if flops else []
        totals += [f"within reach: {self.reached:.1%} of all parameters"]
        return rows, f"{count}; parameters: {'; '.join(totals)}"


_HEADER = "layer", "was", "becomes", "parameters", "FLOPs", "error", "why"
_NUMBERS = range(3, 6)


def _change(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return ""
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / max(before, 1):.1%})"
