"""One run of a model without side effects, forward and backward."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tnlayers.backend.observe import as_written, evaluating, run_on_copy
from tnlayers.layers.base import TensorLayer


def refuse_scripts(model: Any) -> None:
    """Check that no module is a script of TorchScript.

    Raises:
        TypeError: one is.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"module {name!r} of model" if name else "model"
            raise TypeError(
                f"{where} is a {type(module).__name__} (torch.jit.script or torch.jit.trace), whose modules and "
                "parameters cannot be observed; pass the model that it was made of"
            )


def prepare(model: nn.Module, x: Any) -> None:
    """Check a model's input, and give lazy layers their shapes and values.

    Raises:
        TypeError: ``x`` is None or a shape.
        Exception: what a lazy model raises on ``x``, with a note.
    """
    if x is None or (isinstance(x, tuple | list) and x and all(isinstance(size, int) for size in x)):
        raise TypeError(
            f"x is {x!r}; it must be what the model takes: a tensor, a tuple of arguments, or a mapping of named ones; "
            "of a shape, torch.randn makes a tensor"
        )
    if any(is_lazy(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            run_on_copy(model, x)


@contextmanager
def untouched(model: nn.Module, *, backward: bool = False) -> Iterator[None]:
    """Run a forward in the model's mode without side effects on its modules.

    Attributes get their old objects back. Buffers and plain tensors are copies inside. Dictionaries, lists, sets and
    deques that are attributes get their old items back; what is deeper, such as a list in a list, is not restored.

    Args:
        model: any module.
        backward: record gradients in eval mode too. Inside, all parameters are stand-ins that share the memory of the
            model's own, and all of them require gradients. So the model's own get no gradient, and their hooks do not
            run.
    """
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    records = model.training or backward
    inference = any(
        weight.is_inference() for weight in model.parameters() if not is_lazy(weight)
    )  # autograd cannot save them
    with (
        torch.inference_mode(False) if records else nullcontext(),
        torch.set_grad_enabled(records),
        torch.random.fork_rng(devices),
        as_written(),
        restored(model),
        _stand_ins(model) if backward or (records and inference) else nullcontext(),
    ):
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore attributes and buffers of all modules on exit; inside, the buffers and plain tensors are copies."""
    before = [(module, vars(module).copy(), dict(module._buffers.items())) for module in model.modules()]
    held = [(value, _items(value)) for _, attributes, _ in before for value in _containers(attributes)]
    copies: dict[int, Tensor] = {}  # a tensor may be in several modules
    for module, attributes, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None and not is_lazy(buffer):
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        for name, value in attributes.items():
            if type(value) is Tensor and not value.requires_grad:
                vars(module)[name] = copies.setdefault(id(value), value.clone())
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in set(module._buffers.keys()) - set(buffers):
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
            vars(module).clear()
            vars(module).update(attributes)
        for container, items in held:
            _put_back(container, items)


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """Return the attributes that can be changed in place. Buffers and parameters are restored elsewhere."""
    return [
        value
        for name, value in attributes.items()
        if isinstance(value, dict | list | set | deque) and name not in ("_buffers", "_parameters")
    ]


def _items(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _put_back(container: Any, items: list[Any]) -> None:
    """Give a container its old items if they have changed."""
    now = _items(container)
    if isinstance(container, dict):
        same = [(key, id(value)) for key, value in now] == [(key, id(value)) for key, value in items]
    else:
        same = [*map(id, now)] == [*map(id, items)]
    if same:
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(items)
    else:
        container.extend(items)


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Put stand-ins in the places of all parameters, and keep frozen layers frozen."""
    before = [(module, dict(module._parameters.items())) for module in model.modules()]
    frozen = [layer._executor for layer in model.modules() if isinstance(layer, TensorLayer) and layer.frozen]
    stand_ins: dict[int, nn.Parameter] = {}  # a parameter may be in several modules
    for module, parameters in before:
        for name, weight in parameters.items():
            if weight is not None and not is_lazy(weight):
                taken = weight.is_floating_point() or weight.is_complex()
                shared = weight.clone() if weight.is_inference() else weight.detach()
                new = stand_ins.setdefault(id(weight), nn.Parameter(shared, requires_grad=taken))
                module._parameters[name] = new
        if isinstance(module, nn.RNNBase):  # it runs with a list of its own
            names = module._flat_weights_names
            vars(module)["_flat_weights"] = [getattr(module, name, None) for name in names]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.clear()
            module._parameters.update(parameters)
        for executor in frozen:  # a forward with gradients thaws
            executor.frozen = True
