"""Report of ``prune_ranks_``: ranks, parameters and errors of every layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tnlayers import text_tables


@dataclass(frozen=True)
class PrunedLayer:
    """Result of ``prune_ranks_`` for one layer.

    Attributes:
        name: qualified name.
        before, after: sizes of its bonds.
        params: parameters of its cores before and after.
        sensitivity: estimated increase of the loss.
        error: ``||W - W'|| / ||W||`` of its kernel.
    """

    name: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    params: tuple[int, int]
    sensitivity: float
    error: float


@dataclass(frozen=True)
class PruneReport(Mapping[str, PrunedLayer]):
    """Results of ``prune_ranks_`` for every layer, by name; ``print`` shows a table.

    Attributes:
        layers: one entry per layer, in the model's order.

    Example:
        See ``prune_ranks_``.
    """

    layers: tuple[PrunedLayer, ...]

    def __getitem__(self, name: str) -> PrunedLayer:
        """Return the layer of a name."""
        for layer in self.layers:
            if name == layer.name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def params(self) -> tuple[int, int]:
        """Parameters of all cores before and after."""
        before, after = zip(*(layer.params for layer in self.layers), strict=True)
        return sum(before), sum(after)

    def __str__(self) -> str:
        rows, total = self._table()
        return f"{text_tables.text(rows, _NUMBERS)}\n{total}"

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        return text_tables.page(*self._table(), _NUMBERS)

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        rows: list[tuple[str, ...]] = [("layer", "rank", "becomes", "parameters", "sensitivity", "error")]
        rows += [
            (
                layer.name,
                text_tables.sizes(layer.before),
                text_tables.sizes(layer.after),
                _change(layer.params),
                f"{layer.sensitivity:.3g}",
                f"{layer.error:.4f}",
            )
            for layer in self.layers
        ]
        return rows, f"parameters of the cores: {_change(self.params)}"


_NUMBERS = range(3, 6)


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({after / before:.1%})"
