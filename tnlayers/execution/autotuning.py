"""Choice of plans by measured time instead of estimates."""

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
    """Time the best-estimated plans of every tensor layer on its actual inputs, and set the fastest.

    The model runs once on ``example_input`` to record each layer's input. A layer in training mode is timed forward and
    backward, a layer in eval mode as inference. The fastest order, such as ``'0 > 1*2'``, becomes the layer's
    ``strategy``. The constructor accepts it too, so a configuration can store it. Only layers with strategy 'auto'
    change. Parameters, gradients and buffers stay, except for what one forward changes (running statistics).

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a mapping of named ones.
        candidates: number of contraction orders timed per layer.

    Returns:
        dict[str, str]: the chosen strategy by layer name.

    Raises:
        TypeError, ValueError: the model raises it on the input.

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
    """Return the order with the smallest median time."""
    found = layer._executor.candidates(layer._setting(x.shape))
    orders = list(dict.fromkeys(plan.order for plan in islice(found, 8 * candidates)))[:candidates]
    times: dict[str, list[float]] = {order: [] for order in orders}
    try:
        for number in range(ROUNDS + 1):
            for order in orders:
                layer.strategy = order
                _pass(layer, x)  # makes the plan, and fills the weight cache of inference
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
