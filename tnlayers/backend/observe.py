"""Observation of the inputs of a model's layers, by hooks during a run."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def run(model: nn.Module, example: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a mapping of named ones.

    Example:
        >>> run(nn.ReLU(), {"input": torch.tensor(-1.0)})
        tensor(0.)
    """
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)


def run_on_copy(model: nn.Module, example: Any, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Run a model on copies of an example's tensors, since it may change them. Return its output.

    Raises:
        Exception: what the model raises, with a note.
    """
    try:
        return run(model, tree_map_only(Tensor, copy, _with_plain_mappings(example)))
    except Exception as error:
        error.add_note(
            f"This was raised while the model ran on a {type(example).__name__}. A tuple is taken as "
            "arguments, a mapping as named ones, anything else as the only one."
        )
        raise


def input_of(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
    """Return the input tensor among a layer's arguments; None if a subclass takes something else."""
    x = arguments[0] if arguments else named.get("input")
    return x if isinstance(x, Tensor) else None


class Seen(BaseException):
    """Raised by an observer to end a run: all that was wanted of it has been seen."""


class InputNumbers:
    """Numbers of inputs. One that follows another with the same values in the same memory gets the other's number.

    Example:
        >>> number, x = InputNumbers(), torch.ones(3)
        >>> number(x), number(x.detach()), number(x[:2]), number(x), number(x.add_(1))
        (0, 0, 1, 2, 3)
    """

    def __init__(self) -> None:
        self.number, self.state = -1, None
        self.last: Tensor | None = None

    def __call__(self, x: Tensor) -> int:
        """Return the number of the next input."""
        before, self.state = self.state, _state(x)
        self.number += self.state is None or self.state != before
        self.last = x  # stays alive, so that no other input gets its memory before the comparison
        return self.number


def _state(x: Tensor) -> Any:
    """Return memory, shape and number of writes; None if unknown."""
    if x.is_inference() or not x.data_ptr():
        return None
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version


def observe(
    model: nn.Module,
    layers: Iterable[nn.Module],
    examples: Iterable[Any],
    see: Callable[[nn.Module, Tensor], None],
    stand_ins: Mapping[nn.Module, nn.Module] | None = None,
) -> None:
    """Run a model in eval mode without gradients, and pass the inputs of its layers to ``see``.

    Training flags, parameters, examples and torch's random state on the CPU do not change. What the model's own forward
    changes (counters, lazy layers) changes here too. Compiled models run uncompiled.

    Args:
        model: any module.
        layers: layers to observe.
        examples: one argument of ``run`` for each run.
        see: called with a layer and its input, at each call of the layer. If it raises ``Seen``, the run ends there.
        stand_ins: modules that compute the outputs of layers in their place.

    Raises:
        Exception: what the model raises, with a note.
    """

    def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = input_of(arguments, named)
        if x is not None:
            see(layer, x.detach())

    def put(new: nn.Module) -> Any:
        return lambda _, arguments, named, __: new(*arguments, **named)

    # Pre-hooks run after existing ones, which may change the input, so ``see`` gets the layer's own. Forward hooks run
    # before existing ones, which must get the stand-in's output.
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    handles += [
        old.register_forward_hook(put(new), prepend=True, with_kwargs=True) for old, new in (stand_ins or {}).items()
    ]
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for example in examples:
                with suppress(Seen):
                    run_on_copy(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _with_plain_mappings(example: Any) -> Any:
    """Return a mapping as a dictionary, so that pytree finds its values."""
    return dict(example) if isinstance(example, Mapping) else example


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode and ``as_written``; restore the training flags afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with as_written():
            yield
    finally:
        for module, training in flags:  # train() also reverts other effects of a module's own eval()
            if module.training != training:
                module.train(training)


@contextmanager
def as_written() -> Iterator[None]:
    """Run nothing compiled, which might bypass hooks, and make no nested tensors in torch's transformers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:  # if dynamo has not been imported, nothing is compiled
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
