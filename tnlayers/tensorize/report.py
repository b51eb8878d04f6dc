"""What a swap did to every layer, and why; and the optimizer that was made before it."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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


def _change(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return ""
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / max(before, 1):.1%})"
