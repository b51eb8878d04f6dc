"""Report of ``tnlayers.autotune``: the order of every layer, and the time that it saves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tnlayers import text_tables


@dataclass(frozen=True)
class TunedLayer:
    """Result for one layer.

    Attributes:
        name: qualified name; empty if the model is the layer.
        strategy: the chosen order.
        before, after: median seconds of a pass with the planned order, and with the chosen one.
        source: 'timed'; 'as NAME', for a layer equal to one that was timed; or 'kept DATE', from the cache.
    """

    name: str
    strategy: str
    before: float
    after: float
    source: str


@dataclass(frozen=True, eq=False)
class AutotuneReport(Mapping[str, str]):
    """The chosen strategies by layer name: a read-only mapping, equal to such a dict; ``print`` shows a table.

    Attributes:
        layers: one entry per layer, in the model's order.
        left: why other layers and weights that are networks stay as they are, by name.

    Example:
        See ``autotune``.
    """

    layers: tuple[TunedLayer, ...]
    left: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        for layer in self.layers:
            if layer.name == name:
                return layer.strategy
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def before(self) -> float:
        """Seconds of all layers with the planned orders: the sum of the medians."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> float:
        """Seconds of all layers with the chosen orders: the sum of the medians."""
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        rows, notes = self._table()
        return "\n".join([text_tables.text(rows, _NUMBERS), *notes])

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        rows, notes = self._table()
        return text_tables.page(rows, "autotune", _NUMBERS, notes)

    def _table(self) -> tuple[list[tuple[str, ...]], list[str]]:
        rows: list[tuple[str, ...]] = [_HEADER]
        rows += [
            (
                layer.name,
                layer.strategy,
                f"{1e3 * layer.before:.3f}",
                f"{1e3 * layer.after:.3f}",
                _saved(layer.before, layer.after),
                layer.source,
            )
            for layer in self.layers
        ]
        timed = sum(layer.source == "timed" for layer in self.layers)
        layers = f"{len(self)} {'layer' if len(self) == 1 else 'layers'}, {timed} timed"
        times = f"{1e3 * self.before:.3f} -> {1e3 * self.after:.3f} ms"
        total = f"{layers}; in total {times}, {_saved(self.before, self.after)} saved"
        names: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            names.setdefault(reason, []).append(name or "model")
        return rows, [total, *(f"left: {', '.join(here)} ({reason})" for reason, here in names.items())]


_HEADER = "layer", "strategy", "ms planned", "ms chosen", "saved", "from"
_NUMBERS = range(2, 5)


def _saved(before: float, after: float) -> str:
    return f"{1 - after / before if before else 0:.0%}"
