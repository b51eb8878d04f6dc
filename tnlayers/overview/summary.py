"""Parameters and FLOPs of every layer of a model on an input, compared to the dense layers."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tnlayers import text_tables
from tnlayers.backend.observe import input_of, run_on_copy
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS
from tnlayers.layers.table import TensorTable
from tnlayers.overview.forward import prepare, refuse_scripts, untouched
from tnlayers.tensorize.finding import layers, unwrapped
from tnlayers.tensorize.flops import dense_flops
from tnlayers.tensorize.sites import LayerSite

ELSEWHERE = "(elsewhere)"
"""Name of the row for everything outside of the layers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Counts of one layer, of the rest of a model, or of a whole model.

    Attributes:
        name, aliases: qualified name, and the module's further names.
        kind: class name.
        format, rank: of a tensor layer, else None; rank maps bonds to sizes.
        params: entries of the weight, without bias.
        dense_params: entries of the dense kernel. A plain layer is its own dense layer.
        keep_ratio: ``params / dense_params``; None where there are no parameters.
        flops: executed FLOPs of all calls, two per multiply-add. None if the model never called the layer.
        dense_flops: the same, of the dense layer.
        calls: number of calls.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str
    format: str | None = None
    rank: Mapping[str, int] | None = None
    params: int
    dense_params: int
    keep_ratio: float | None
    flops: int | None
    dense_flops: int | None
    calls: int = 1


@dataclass(frozen=True)
class Summary:
    """Parameters and FLOPs of a model's layers. ``print`` and notebooks show a table.

    Attributes:
        rows: one per layer, in the model's order, and a last one, '(elsewhere)', for everything else: biases, norms
            and embeddings; attention and matrix products in the model's own code. ``pandas.DataFrame`` accepts the
            rows, and ``dataclasses.asdict`` makes dictionaries.
        totals: the whole model. Its FLOPs are the sum of the rows'. So are its parameters, but a parameter of several
            layers counts once.
        training: whether the model ran in training mode.

    Example:
        >>> found = summary(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4)), torch.randn(1, 3, 4, 4))
        >>> [(row.name, row.params, row.flops) for row in found.rows], found.totals.flops
        ([('0', 216, 1728), ('2', 128, 256), ('(elsewhere)', 12, 0)], 1984)
    """

    rows: tuple[Row, ...]
    totals: Row
    training: bool

    def __str__(self) -> str:
        rows, note = self._table()
        return f"{text_tables.text(rows, _NUMBERS)}\n{note}"

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        return text_tables.page(*self._table(), _NUMBERS)

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        cells = [
            (
                text_tables.place(row.name, row.aliases),
                row.kind,
                row.format or "-",
                text_tables.sizes(row.rank) or "-",
                text_tables.count(row.params),
                text_tables.count(row.dense_params),
                "" if row.keep_ratio is None else f"{row.keep_ratio:.1%}",
                text_tables.count(row.flops),
                text_tables.count(row.dense_flops),
                text_tables.count(row.calls),
            )
            for row in (*self.rows, self.totals)
        ]
        mode = "training" if self.training else "eval"
        return [_HEADER, *cells], f"FLOPs: one forward in {mode} mode, two for each multiply-add"


_HEADER = "layer", "class", "format", "rank", "parameters", "dense", "keep", "FLOPs", "dense FLOPs", "calls"
_NUMBERS = range(4, len(_HEADER))


def summary(model: nn.Module, x: Any) -> Summary:
    """Count the parameters and FLOPs of a model and of each of its layers, compared to the dense layers.

    The model runs once in its current mode: in training mode with gradients, in eval mode without. If a layer is
    frozen, it first runs once more to fill the weight cache. ``torch.utils.flop_counter.FlopCounterMode`` counts the
    FLOPs of the forward: matrix products, convolutions and attention, two per multiply-add; no biases, norms or
    activations. So they are the FLOPs of the executed plans, for this input, device, dtype and mode.

    Two things are counted in addition, which ``FlopCounterMode`` alone does not count in torch 2.13: fused attention on
    the CPU, and torch's transformer layers in eval mode, which run without their fused kernel here. Matrix-vector
    products and fused recurrent layers (``nn.LSTM``) are not counted.

    Buffers such as running statistics, attributes that the forward sets, training flags, the input and torch's random
    state stay as they were. Dictionaries, lists, sets and deques that are a module's attributes get their old items
    back; what lies deeper, or in objects that are no modules, is not restored. Lazy layers get their shapes and values,
    as at any first forward. Compiled and data-parallel models run uncompiled in one process. On the meta device, plans
    are for the meta device, and may differ from those of the later device.

    Args:
        model: any module with a convolution, transposed convolution or linear layer, of tnlayers or torch; or one.
        x: a tensor, a tuple of arguments or a mapping of named ones, as the model takes it.

    Returns:
        Summary: a row for each layer, one for the rest, and the totals.

    Raises:
        TypeError: ``model`` is no module or was made by torch.jit, or ``x`` is None or a shape.
        ValueError: the model has no such layer.
        Exception: what the model raises on ``x``, with a note.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.TuckerConv2d(16, 32, 3, rank=4, strategy="factorized")
        >>> model = nn.Sequential(layer, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
        >>> found = summary(model, torch.randn(2, 16, 8, 8))
        >>> print(found)
        layer        class         format  rank  parameters  dense    keep   FLOPs  dense FLOPs  calls
        0            TuckerConv2d  tucker  4            336  4,608    7.3%  55,552      663,552      1
        3            Linear        -       -            320    320  100.0%   1,280        1,280      1
        (elsewhere)  -             -       -             42     42  100.0%       0            0      1
        total        Sequential    -       -            698  4,970   14.0%  56,832      664,832      1
        FLOPs: one forward in eval mode, two for each multiply-add
        >>> found.rows[0].rank, found.totals.flops
        ({'ri': 4, 'ro': 4}, 56832)
    """
    refuse_scripts(model)
    model = unwrapped(model)
    found = layers(model, (*KINDS, TensorLayer), "convolution or linear layer")
    prepare(model, x)
    counts, flops = _count(model, found, x)
    rows = [_row(site, counts[layer]) for layer, site in found.items()]
    # Layers with the same cores have the same dense kernel, which counts once too.
    spared = {
        tuple(map(id, _weights(layer))): row.dense_params - row.params for layer, row in zip(found, rows, strict=True)
    }
    others = flops - sum(row.flops or 0 for row in rows)
    named = {id(weight) for layer in found for weight in _weights(layer)}
    rest = _size(weight for weight in model.parameters() if id(weight) not in named)
    rows.append(Row(name=ELSEWHERE, kind="-", **_pairs(rest, rest, others, others)))
    params, dense = _size(model.parameters()), sum(row.dense_flops or 0 for row in rows)
    pairs = _pairs(params, params + sum(spared.values()), flops, dense)
    return Summary(tuple(rows), Row(name="total", kind=type(model).__name__, **pairs), model.training)


@dataclass
class _Count:
    """FLOPs, number and input shapes of a layer's calls. ``start``: the total FLOPs when the latest call began."""

    flops: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    calls: int = 0
    start: int = 0


def _count(model: nn.Module, found: Iterable[nn.Module], x: Any) -> tuple[dict[nn.Module, _Count], int]:
    """Run a model, and count each layer's FLOPs and the total."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: PLC0415  (imports triton if it can)

    # torch 2.13's counter lacks fused attention on the CPU. It is counted like the one on GPUs.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = {fused: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # type: ignore[no-untyped-call]
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    counts = {layer: _Count() for layer in found}

    def enter(layer: nn.Module, _: Any) -> None:
        counts[layer].start = counter.get_total_flops()

    def leave(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
        count, given = counts[layer], input_of(arguments, named)
        count.flops += counter.get_total_flops() - count.start
        count.calls += 1
        count.shapes += [] if given is None else [tuple(given.shape)]

    if any(layer.frozen for layer in found if isinstance(layer, TensorLayer)):
        with untouched(model):
            run_on_copy(model, x)  # fills the frozen layers' weight caches
    # Outside of all other hooks, such as weight_norm's, so that these are counted; the input is as they changed it.
    handles = [layer.register_forward_pre_hook(enter, prepend=True) for layer in counts]
    handles += [layer.register_forward_hook(leave, with_kwargs=True) for layer in counts]
    try:
        with warnings.catch_warnings(), untouched(model), counter:
            # The counter's hooks run once more for each compiled module, which does not change its total.
            warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
            run_on_copy(model, x)
    finally:
        for handle in handles:
            handle.remove()
        torch.clear_autocast_cache()  # it holds weights cast without gradients, which a later step would reuse
    return counts, counter.get_total_flops()


def _row(site: LayerSite, count: _Count) -> Row:
    layer: Any = site.module
    own: dict[str, Any] = {}
    weights = _size(_weights(layer))
    flops = dense = count.flops if count.calls else None
    dense_params = weights
    if isinstance(layer, TensorLayer):
        dense_params = layer.dense_params
        if count.calls:  # torch's tables look rows up without FLOPs
            dense = 0 if isinstance(layer, TensorTable) else dense_flops(layer.geometry, count.shapes)
        own = {"format": layer.format.name, "rank": dict(layer.rank)}
    kind, pairs = type(layer).__name__, _pairs(weights, dense_params, flops, dense)
    return Row(name=site.names[0] or kind, aliases=site.names[1:], kind=kind, calls=count.calls, **own, **pairs)


def _pairs(params: int, dense_params: int, flops: int | None, dense_flops: int | None) -> dict[str, Any]:
    """Return a row's counts, with the dense layer's."""
    ratio = params / dense_params if dense_params else None
    return {
        "params": params,
        "dense_params": dense_params,
        "keep_ratio": ratio,
        "flops": flops,
        "dense_flops": dense_flops,
    }


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a layer except its bias."""
    return [weight for name, weight in layer.named_parameters() if not name.endswith("bias")]


def _size(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights if not is_lazy(weight))
