"""Plans chosen by the clock instead of by estimate."""

import time
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.observe import run
from tnlayers.execution.module import ExecutableModule
from tnlayers.planning.setting import STRATEGIES

ROUNDS = 5


def autotune(model: nn.Module, example_input: Any, *, candidates: int = 4) -> dict[str, str]:
    """Time the likeliest plans of every tensor layer on the inputs that it really gets, and fix the fastest.

    The model runs once on ``example_input`` to find those inputs. A layer in training mode is timed forward and
    backward, one in eval mode as inference. What wins becomes the layer's ``strategy``, an order such as
    ``'0 > 1*2'``, which the constructor takes too, so a configuration can keep it. Only layers with strategy 'auto' are
    touched; parameters, gradients and buffers are left as they were, but for what one forward changes (running
    statistics).

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a mapping of named ones.
        candidates: how many orders of contraction are timed for each layer.

    Returns:
        dict[str, str]: the chosen strategy by the layer's name.

    Raises:
        TypeError, ValueError: what the model raises on the input.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.CPConv2d(8, 8, 3, rank=2))
        >>> chosen = autotune(model, torch.randn(2, 8, 9, 9))
        >>> chosen["0"] == model[0].strategy
        True
    """
    inputs: dict[str, Tensor] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExecutableModule) and module.strategy == STRATEGIES[0]
    }

    def listen(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            with torch.inference_mode(False):
                inputs[name] = (arguments[0] if arguments else named["input"]).detach().clone()

        return hook

    hooks = [layer.register_forward_pre_hook(listen(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            run(model, example_input)
    finally:
        for handle in hooks:
            handle.remove()
    chosen = {}
    with torch.inference_mode(False):
        for name, x in inputs.items():
            chosen[name] = _fastest(layers[name], x, candidates)
    for name, order in chosen.items():
        layers[name].strategy = order
    return chosen


def _fastest(layer: ExecutableModule, x: Tensor, candidates: int) -> str:
    """The order whose median time is least."""
    found = layer._executor.candidates(layer._setting(x.shape))
    orders = list(dict.fromkeys(plan.order for plan in islice(found, 8 * candidates)))[:candidates]
    times: dict[str, list[float]] = {order: [] for order in orders}
    try:
        for number in range(ROUNDS + 1):
            for order in orders:
                layer.strategy = order
                _pass(layer, x)  # plans, and fills what inference keeps
                start = time.perf_counter()
                _pass(layer, x)
                if number:
                    times[order].append(time.perf_counter() - start)
    finally:
        layer.strategy = STRATEGIES[0]
    return min(orders, key=lambda order: median(times[order]))


def _pass(layer: ExecutableModule, x: Tensor) -> None:
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    if layer.training and parameters:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = layer.forward(leaf)
            torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))
    else:
        with torch.no_grad():
            layer.forward(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
