"""Formats for one layer side by side: parameters, FLOPs, estimated time and memory, and the error of a fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers import text_tables, validate
from tnlayers.backend.rate_tables import table_of
from tnlayers.formats import Einsum
from tnlayers.layers.core_memory import refuse
from tnlayers.overview.compared import Case, Line, case_of, lines_of, weight_of
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.notation import KERNEL_AXES
from tnlayers.spec.rank import Rank

DENSE = "dense"
"""Name of the dense layer's row."""
BEST = {"time": ("train_ms", "infer_ms"), "params": ("params",) * 2, "error": ("error",) * 2}
"""What ``best`` compares, in training mode and in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One format for the layer. Unknown values are None. So are all numbers if the format cannot hold the layer.

    Attributes:
        name: format and options, or 'dense'.
        format, options: the format's name, and its options that were chosen; None and empty for the dense layer.
        rank: maps bonds to sizes.
        params: entries of the weight, without bias.
        keep_ratio: ``params`` over those of the dense kernel.
        flops: of one forward in the layer's mode, two per multiply-add: ``layer.flops(input_shape)``.
        strategy: of the plan in this mode: 'reconstruct' builds the dense kernel, 'factorized' does not.
        train_ms, infer_ms: estimated milliseconds of a forward and backward, and of a forward without gradients.
        train_ratio, infer_ratio: the same, over the dense layer's.
        memory, memory_ratio: estimated peak bytes of a training step, and the same over the dense layer's.
        error: ``||W - W'|| / ||W||`` of the fitted kernel.
        note: why there are no numbers, or what is to be known of them; it stands beneath the table.
    """

    name: str
    format: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: Mapping[str, int] | None = None
    params: int | None = None
    keep_ratio: float | None = None
    flops: int | None = None
    strategy: str | None = None
    train_ms: float | None = None
    train_ratio: float | None = None
    infer_ms: float | None = None
    infer_ratio: float | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Formats for one layer: the result of ``compare``, which has an example. ``print`` and notebooks show a table.

    Attributes:
        rows: the dense layer, then one per format. ``pandas.DataFrame`` accepts them.
        geometry: the layer's arguments.
        input_shape: what FLOPs, times and memory are for.
        device, dtype: device type and dtype that the plans are for.
        training: whether ``flops`` and ``strategy`` are those of training mode.
    """

    rows: tuple[Row, ...]
    geometry: Geometry
    input_shape: tuple[int, ...]
    device: str
    dtype: torch.dtype
    training: bool

    def best(self, by: str = "time") -> Row:
        """Return the format with the least of 'time' (in the layer's mode), 'params' or 'error'; never the dense layer.

        Raises:
            TypeError, ValueError: ``by`` is something else, or no format has this number.
        """
        name = BEST[validate.choice("by", by, BEST)][not self.training]
        found = [row for row in self.rows[1:] if getattr(row, name) is not None]
        if not found:
            why = "; only decompose=True gives errors" if by == "error" else ""
            raise ValueError(f"by is {by!r}, but no format has this number{why}")
        return min(found, key=lambda row: float(getattr(row, name)))

    def __str__(self) -> str:
        rows, note = self._table()
        return "\n".join((text_tables.text(rows, _numbers(rows)), *self._notes(), note))

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        rows, note = self._table()
        return text_tables.page(rows, note, _numbers(rows), self._notes())

    def _notes(self) -> list[str]:
        """Return what is to be known of rows, a line each."""
        return [f"{row.name}: {row.note}" for row in self.rows if row.note]

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        cells = [
            (
                row.name,
                text_tables.sizes(row.rank) or "-",
                text_tables.count(row.params),
                _shown(row.keep_ratio, ".1%"),
                text_tables.count(row.flops),
                _shown(row.train_ms, ".3g"),
                _shown(row.train_ratio, ".2f"),
                _shown(row.infer_ms, ".3g"),
                _shown(row.infer_ratio, ".2f"),
                _shown(row.memory_ratio, ".2f"),
                _shown(row.error, ".4f"),
                row.strategy or "refused",
            )
            for row in self.rows
        ]
        mode = "training" if self.training else "eval"
        note = (
            f"Input {self.input_shape}; FLOPs and plan: one forward in {mode} mode\n"
            f"Times and memory: the planner's estimates for {self.dtype} on {self.device}; nothing was timed here\n"
            f"Rates: {table_of(self.device, str(self.dtype).removeprefix('torch.'))}"
        )
        table: list[tuple[str, ...]] = [_HEADER, *cells]
        if all(row.error is None for row in self.rows):  # nothing was fitted
            table = [(*row[:-2], row[-1]) for row in table]
        return table, note


_HEADER = (
    "format", "rank", "parameters", "keep", "FLOPs", "train ms", "/ dense", "infer ms", "/ dense", "memory / dense",
    "error", "plan",
)  # fmt: skip


def _numbers(rows: Sequence[Sequence[str]]) -> range:
    """Return the columns of numbers: all but the format, the rank and the plan."""
    return range(2, len(rows[0]) - 1)


def compare(
    layer: nn.Module | Geometry,
    rank: Rank | Mapping[str, Any] | None = 0.25,
    input_shape: Sequence[int] | None = None,
    formats: Sequence[str | Mapping[str, Any]] | None = None,
    decompose: bool = False,
) -> Comparison:
    """Compare formats for one layer: size, FLOPs, estimated time and memory, and with ``decompose`` the error of a fit.

    Layers are made without values and plans without runs, so this takes milliseconds; fits take longer. Nothing
    changes: not the layer, not torch's random state. Times are the planner's estimates for the device and dtype of the
    layer. The last line names the rate table; one that was estimated gives a hint only. ``tnlayers.autotune`` times
    plans.

    Args:
        layer: a convolution, transposed convolution or linear layer of torch or tnlayers, or a ``tnlayers.Geometry``. A
            tensor layer stands for the dense layer of its ``to_dense()``. A geometry has no weight to fit, no device
            and dtype (torch's defaults are taken), and no mode (training is).
        rank: an integer, a float (keep ratio), a sequence or mapping for the bonds, or None, as for every layer. Or a
            mapping from names of formats to such ranks; a format that it lacks gets 0.25.
        input_shape: shape of an input. None: 32 inputs, each spatial axis 32 long, or as long as a longer kernel
            spans; a geometry's ``input_size`` has precedence.
        formats: names of registered formats, and mappings with the words of a ``TensorizeConfig`` override (format,
            options, rank, in_shape, out_shape, strategy, memory), options also by their own names:
            ``{"format": "tt", "layout": "chain"}``. None: every registered format that needs no option, and once
            more for every further value of an option annotated as Literal or bool.
        decompose: also fit each format to the layer's weight, as ``tensorize_`` does.

    Returns:
        Comparison: a row for the dense layer, then one per format. A format that cannot hold the layer at this rank,
            or with these groups, has a row without numbers, and the reason as its ``note``.

    Raises:
        TypeError, ValueError: an argument is invalid, the layer has no shape yet (lazy), or there is no finite weight
            to fit. A rank that sizes bonds by name or in sequence is invalid if it fits none of the formats that it is
            for.

    Example:
        >>> found = compare(nn.Conv2d(64, 128, 3, padding=1), rank=0.1, formats=["cp", "tucker", "tt"])
        >>> for row in found.rows:
        ...     print(row.name, row.params, f"{row.keep_ratio:.3f}", row.rank)
        dense 73728 1.000 None
        cp 7326 0.099 {'r': 37}
        tucker 7196 0.098 {'ri': 19, 'ro': 20}
        tt 6783 0.092 {'r1': 7, 'r2': 7}
        >>> print(found)  # doctest: +ELLIPSIS
        format  rank    parameters    keep          FLOPs  train ms  / dense ...
        dense   -           73,728  100.0%  4,831,838,208 ...
        >>> print(compare(Geometry(64, 64, (3, 3), groups=64), formats=["blocktt"]).rows[1].note)  # doctest: +ELLIPSIS
        rank is 0.25; that keep ratio leaves 144 of 576 parameters, but network 'i1 i2 h w o1 r, r i1 o1 o2' has ...
    """
    validate.boolean("decompose", decompose)
    with torch.inference_mode(False), torch.no_grad():
        case = case_of(layer, input_shape)
        lines = lines_of(formats, rank, case)
        weight = weight_of(layer) if decompose else None
        # A network of one core is the dense kernel, so the planner prices the dense layer as any other.
        text = " ".join(("o", "i", *KERNEL_AXES[len(KERNEL_AXES) - case.geometry.ndim :]))
        dense = _row(Line(DENSE, Einsum, None, {"network": text}), case, None)
        dense = replace(dense, format=None, options={}, rank=None, error=None if weight is None else 0.0)
        rows = dense, *(_row(line, case, weight, dense) for line in lines)
    return Comparison(rows, case.geometry, case.shape, case.device, case.dtype, case.training)


def _row(line: Line, case: Case, weight: Tensor | None, dense: Row | None = None) -> Row:
    """Return the numbers of a format, or the reason why there are none. Without ``dense``, it is the dense layer."""
    row = Row(name=line.name, format=line.format.name, options=dict(line.options))
    try:
        layer = case.make(line)
    except ValueError as refusal:
        return replace(row, note=str(refusal))
    network = layer.network
    if dense and len(network.cores) == 1:
        return replace(row, note="its network would be one dense core")
    train, infer = (layer._executor.plan(case.setting(mode)) for mode in ("train", "infer"))
    own, error, note = train if case.training else infer, None, ""
    if layer.keep_ratio > 1:
        note = "more parameters than the dense kernel"
    if weight is not None:
        try:
            refuse(type(layer).__name__, network, line.rank, weight)
            error = layer.to_empty(device=weight.device).set_weight_(weight)
        except ValueError as refusal:
            note = f"no fit: {refusal}"
    row = replace(
        row,
        rank=dict(layer.rank),
        params=network.num_params,
        keep_ratio=layer.keep_ratio,
        flops=own.flops,
        strategy=own.strategy,
        train_ms=1e3 * train.seconds,
        infer_ms=1e3 * infer.seconds,
        memory=train.peak,
        error=error,
        note=note,
    )
    ratios = (getattr(row, name) / getattr(dense or row, name) for name in ("train_ms", "infer_ms", "memory"))
    return replace(row, **dict(zip(("train_ratio", "infer_ratio", "memory_ratio"), ratios, strict=True)))


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
