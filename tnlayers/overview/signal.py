"""Second moments of the signal and its gradient in every layer of a model, on an input."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tnlayers import text_tables
from tnlayers.backend.observe import run_on_copy
from tnlayers.overview.forward import prepare, refuse_scripts, restored, untouched
from tnlayers.overview.moments import GRADIENT_INPUT, GRADIENT_OUTPUT, SIDES, Call, Recorder, kernel_ratio
from tnlayers.overview.pictured import draw
from tnlayers.overview.problems import find
from tnlayers.overview.trace import weighted
from tnlayers.tensorize.finding import unwrapped


@dataclass(frozen=True, kw_only=True)
class LayerSignal:
    """Second moments of one call of a layer: means of squares over all finite entries.

    Attributes:
        name, aliases: qualified name, and the module's further names.
        kind: class name.
        text: first line of the module's own text.
        call: 1 for the first call of the module.
        weighted: whether it is a convolution, linear or tensor layer.
        input, output: of the first floating-point tensor that goes in or out. None if none goes in.
        gradient_output, gradient_input: of the loss, with respect to these tensors. None without a loss, or if the
            tensor does not reach it. A tensor that several layers take has one gradient, the sum.
        not_finite: numbers of entries that are NaN or infinite, by the names of the four above; those without any are
            left out.
        largest: largest magnitude in the output.
        dtype: of the output.
        kernel: variance of a tensor layer's kernel, over the one that its initialisation asks for.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str
    text: str
    call: int = 1
    weighted: bool
    input: float | None
    output: float
    gradient_output: float | None = None
    gradient_input: float | None = None
    not_finite: Mapping[str, int]
    largest: float
    dtype: torch.dtype | None
    kernel: float | None = None


@dataclass(frozen=True)
class Signal:
    """Second moments of a model's signal. ``print`` and notebooks show a table and the problems beneath.

    Attributes:
        rows: one per call, in the order of the run. ``pandas.DataFrame`` accepts them.
        problems: sentences, each with the name of the first layer where something goes wrong. Empty if nothing does.
        places: numbers of the rows that the problems are about.
        training: whether the model ran in training mode.
    """

    rows: tuple[LayerSignal, ...]
    problems: tuple[str, ...]
    places: tuple[int, ...]
    training: bool

    def __str__(self) -> str:
        cells, note = self._table()
        return "\n".join([text_tables.text(cells, range(2, len(cells[0]))), note, *self.problems])

    def _repr_html_(self) -> str:
        """Return the same table for notebooks."""
        cells, note = self._table()
        marked: dict[int, str] = {}
        for place, words in zip(self.places, self.problems, strict=True):
            marked[place + 1] = "\n".join([marked[place + 1], words]) if place + 1 in marked else words
        return text_tables.page(cells, note, range(2, len(cells[0])), self.problems, marked)

    def plot(self, ax: Any = None) -> Any:
        """Draw the second moments of the weight layers, in the order of their calls, on a logarithmic axis.

        A model without weight layers shows all rows. Of more than 40 names, only some are written.

        Args:
            ax: axes of matplotlib. By default, those of a new figure.

        Returns:
            The axes: one line for outputs, one for their gradients if there are any, and a mark at each problem.

        Raises:
            TypeError: ``ax`` is no axes.
            ImportError: matplotlib is missing.

        Example:
            >>> import tnlayers
            >>> axes = signal(nn.Linear(8, 8), torch.randn(4, 8)).plot()  # doctest: +SKIP
        """
        shown = [k for k, row in enumerate(self.rows) if row.weighted or k in self.places]
        if not any(row.weighted for row in self.rows):
            shown = [*range(len(self.rows))]
        sides = ["output"] + ["gradient_output"] * any(row.gradient_output is not None for row in self.rows)
        lines = {side.replace("_", " of the "): [getattr(self.rows[k], side) for k in shown] for side in sides}
        marked = [x for x, k in enumerate(shown) if k in self.places]
        return draw(lines, [_name(self.rows[k]) for k in shown], marked, ax)

    def _table(self) -> tuple[list[tuple[str, ...]], str]:
        sides = [side for side in SIDES if any(getattr(row, side) is not None for row in self.rows)]
        lost = any(row.not_finite for row in self.rows)
        header = ("layer", "class", *(side.replace("_", " of ") for side in sides), *["not finite"] * lost)
        cells = [
            (
                _name(row),
                row.kind,
                *(_number(getattr(row, side)) for side in sides),
                *[text_tables.count(sum(row.not_finite.values()))] * lost,
            )
            for row in self.rows
        ]
        mode = "training" if self.training else "eval"
        count = {0: "no problem", 1: "1 problem"}.get(len(self.problems), f"{len(self.problems)} problems")
        return [header, *cells], f"second moments of one run in {mode} mode; {count}"


def signal(model: nn.Module, x: Any, loss: Callable[[Any], Tensor] | None = None) -> Signal:
    """Measure the second moments of what goes in and out of every layer of a model, forward and backward.

    The model runs once in its current mode. Each call of a module that calls no other module makes a row; so does each
    call of a convolution, linear or tensor layer, whatever it consists of. Tuples, dictionaries and other outputs count
    by their first floating-point tensor. Calls without such an output make no row. Moments do not overflow in half
    precision.

    With ``loss``, the model runs with gradients in eval mode too. All parameters and ``x`` take part in the backward,
    also those with ``requires_grad`` False, so that gradients pass through frozen layers. Activations that work in
    place and activation checkpointing are seen as they are.

    Buffers, attributes, training flags, the input, ``.grad`` of all tensors, and torch's random state stay as they
    were. Dictionaries, lists, sets and deques that are a module's attributes get their old items back. Not restored is
    what lies deeper, such as tensors changed in place inside a list, the state of objects that are no modules, and that
    of modules that only ``loss`` holds, unless ``loss`` is the module. Hooks on the model's parameters do not run. Lazy
    layers get their shapes and values, as at any first forward. Compiled and data-parallel models run uncompiled in one
    process.

    ``problems`` names the first layer where:

    - values or the loss are NaN or infinite, or float16 is near an end of its range;
    - a tensor layer's kernel has less than 1e-3 or more than 1e3 times the variance that its initialisation asks for,
      or five or more such layers without a norm in between have it together, each by a factor above 2 to one side;
    - one layer multiplies the second moment by less than 1e-5 or more than 1e5 (the last one: less than 1e-10);
    - the second moment of the outputs gets below 1e-4 or above 1e4 times that of the first weight layer's input, and
      stays so to the last weight layer. Behind a norm, an embedding or a bias that outweighs the signal, the second
      moment there takes the place of the input's. So the scale of the input is no problem, nor a small last layer;
    - the squared norm of the gradients of inputs gets below 1e-8 or above 1e8 times that of the last weight layer's
      output, and stays so back to the first one; or the gradient becomes zero or stops, so the first layers get none;
    - all outputs are zero, two cores of a layer are zero, or behind a zero layer all samples have the same output.
      Zero layers that a residual connection passes, and zero last layers, are none.

    A network can train with a problem, and fail without one.

    Args:
        model: any module of Python, so none of torch.jit.
        x: a tensor, a tuple of arguments or a mapping of named ones, as the model takes it. In training mode, batch
            norms need many values in each channel: of two values, their gradients explode in deep networks.
        loss: a function of the model's output that returns a scalar tensor, for gradients. For models whose output
            holds a loss, ``lambda out: out.loss``.

    Returns:
        Signal: a row for each call, and the problems.

    Raises:
        TypeError: ``model`` is no module or was made by torch.jit, ``x`` is None or a shape, ``loss`` is not callable
            or returns no tensor.
        ValueError: the model or ``x`` is on the meta device, ``x`` is empty, no module gives a floating-point tensor,
            or what ``loss`` returns is no scalar, is complex, or depends on no module's output.
        Exception: what the model raises on ``x``, with a note.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), tnlayers.CPLinear(8, 4, rank=2, bias=False))
        >>> with torch.no_grad():
        ...     for weight in model.parameters():
        ...         weight[:] = 0.125
        >>> print(signal(model, torch.ones(2, 4), loss=lambda y: y.sum()))
        layer  class     input  output  gradient of output  gradient of input
        0      Linear        1   0.391              0.0156             0.0156
        1      ReLU      0.391   0.391              0.0156             0.0156
        2      CPLinear  0.391  0.0244                   1             0.0156
        second moments of one run in training mode; no problem
    """
    refuse_scripts(model)
    model = unwrapped(model)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss is of type {type(loss).__name__}; it must be a function of the model's output, or None")
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(dict(x) if isinstance(x, Mapping) else x)]
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        raise ValueError("model or x is on the meta device and has no values; signal needs them on a real device")
    prepare(model, x)
    recorder = Recorder(model, gradients=loss is not None)
    reached = None
    try:
        with untouched(model, backward=loss is not None), recorder.recording():
            if loss is None:
                run_on_copy(model, x)
            else:
                reached = _backward(model, x, loss, recorder)
    finally:
        torch.clear_autocast_cache()  # it holds weights cast without gradients, which a later step would reuse
    _check(model, recorder)
    return _signal(model, recorder.calls, reached)


def _backward(model: nn.Module, x: Any, loss: Callable[[Any], Tensor], recorder: Recorder) -> float:
    """Run a model and its loss, forward and backward. Return the loss."""
    leaves: list[Tensor] = []

    def with_gradient(tensor: Tensor) -> Tensor:
        """Copy a tensor of an input. The copy may be changed in place, and takes part in the backward."""
        copy = tensor.detach().clone()
        if not (copy.is_floating_point() or copy.is_complex()):
            return copy
        leaves.append(copy.requires_grad_())
        return copy.clone()

    output = run_on_copy(model, x, with_gradient)
    _check(model, recorder)
    with restored(loss) if isinstance(loss, nn.Module) else nullcontext():
        value = _scalar(loss(output))
        recorder.backward(value, [*model.parameters(), *leaves])
    if not any(side in call.moments for call in recorder.calls for side in (GRADIENT_OUTPUT, GRADIENT_INPUT)):
        raise ValueError(
            "loss returned a tensor that no module's output reaches; it must be computed from the model's output, "
            "not from parameters alone, and the model must not run under no_grad"
        )
    return float(value.detach())


def _check(model: nn.Module, recorder: Recorder) -> None:
    if not recorder.calls and recorder.empty:
        raise ValueError("x gives empty tensors only; each axis of x, the batch too, must have an entry or more")
    if not recorder.calls:
        raise ValueError(f"no module of model gave a floating-point tensor ({type(model).__name__})")


def _signal(model: nn.Module, calls: list[Call], loss: float | None) -> Signal:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        plain = ".".join(part for part in path.split(".") if part != "_orig_mod") or type(module).__name__
        names[module] = (*names.get(module, ()), plain)
    kernels = {module: kernel_ratio(module) for module in dict.fromkeys(call.module for call in calls)}
    rows = tuple(_row(call, names[call.module], kernels[call.module]) for call in calls)
    found = find(calls, [_name(row, all_names=False) for row in rows], kernels, loss)
    return Signal(rows, tuple(words for _, words in found), tuple(place for place, _ in found), model.training)


def _row(call: Call, names: tuple[str, ...], kernel: float | None) -> LayerSignal:
    moments: dict[str, Any] = {side: here.square for side, here in call.moments.items()}
    return LayerSignal(
        name=names[0],
        aliases=names[1:],
        kind=type(call.module).__name__,
        text=repr(call.module).partition("\n")[0],
        call=call.number,
        weighted=weighted(call.module),
        input=moments.pop("input", None),
        not_finite={side: here.not_finite for side, here in call.moments.items() if here.not_finite},
        largest=call.moments["output"].largest,
        dtype=call.dtype,
        kernel=kernel,
        **moments,
    )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss returned a {type(value).__name__}; it must return a scalar tensor")
    if value.numel() != 1:
        raise ValueError(f"loss returned shape {tuple(value.shape)}; it must return a scalar, such as a mean")
    if value.is_complex():
        raise ValueError(f"loss returned a tensor of {value.dtype}; it must be real, such as the mean of its abs()")
    if not value.requires_grad:
        raise ValueError("loss returned a tensor without a gradient; it must be computed from the model's output")
    return value.reshape(())


def _name(row: LayerSignal, all_names: bool = True) -> str:
    return text_tables.place(row.name, row.aliases if all_names else ()) + (
        f" (call {row.call})" if row.call > 1 else ""
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
