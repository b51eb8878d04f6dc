"""Choice of plans by measured time instead of estimates."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.observe import as_written, input_of, run_on_copy
from tnlayers.backend.progress import Progress
from tnlayers.backend.torch_state import autocast_dtype
from tnlayers.backend.whole_files import check_writable
from tnlayers.execution.module import ExecutableModule
from tnlayers.execution.tuning_report import AutotuneReport, TunedLayer
from tnlayers.planning.plan import Plan
from tnlayers.planning.setting import STRATEGIES
from tnlayers.planning.tuned import Choice, all_kept, file_of, keep, key

ROUNDS = 5


def autotune(
    model: nn.Module,
    example_input: Any,
    *,
    candidates: int = 4,
    cache: bool = False,
    progress: bool | None = None,
) -> AutotuneReport:
    """Time the best-estimated plans of every tensor layer on its actual inputs, and set the fastest.

    The model runs once on a copy of ``example_input`` to record each layer's input, and whether autocast is on there. A
    layer in training mode is timed forward and backward, a layer in eval mode as inference. Equal layers with equal
    inputs are timed once. The fastest order, such as ``'0 > 1*2'``, becomes the layer's ``strategy``. The constructor
    accepts it too, so a configuration can store it. Only layers with strategy 'auto' change, and neither recurrent
    layers nor the networks of ``parametrize_``; the report names what is left as it is. Parameters, gradients, buffers
    and torch's random state on the CPU stay, except for what one forward changes (running statistics).

    With ``cache=True`` the orders are kept in the user's cache. They count for exactly their setting: network,
    geometry, batch and sizes, layout, mode, dtype, memory, device, number of threads, and the versions of torch
    (without the last number) and tnlayers. A later call with ``cache=True`` takes them without timing, if
    at least as many candidates were timed. Layers with
    strategy 'auto' plan with them, here and in processes that start later, without any call.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a mapping of named ones.
        candidates: number of contraction orders timed per layer.
        cache: whether to take orders from the cache, where as many candidates were timed, and to keep those timed now.
        progress: show a bar on stderr. None: if stderr is a terminal and it takes longer than two seconds.

    Returns:
        AutotuneReport: the chosen strategy by layer name, the times, and which layers were left and why.

    Raises:
        TypeError, ValueError: an argument is not as above, or the model raises it on the input.
        OSError: the cache cannot be written.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.CPConv2d(8, 8, 3, rank=2))
        >>> chosen = autotune(model, torch.randn(2, 8, 9, 9))
        >>> chosen["0"] == model[0].strategy
        True
        >>> print(chosen)  # doctest: +ELLIPSIS
        layer  strategy...ms planned  ms chosen  saved  from
        0      0...timed
        1 layer, 1 timed; in total ... ms, ...% saved
    """
    check_module("model", model)
    candidates, cache = validate.integer("candidates", candidates), validate.boolean("cache", cache)
    shown = progress if progress is None else validate.boolean("progress", progress, " or None")
    layers, left = _layers(model)
    inputs = _inputs(model, layers, example_input)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        plans = {name: plan for name in layers if name in inputs and (plan := _planned(layers[name], inputs[name]))}
        settings = {name: _setting(layers[name], plan) for name, plan in plans.items()}
        known = _known(settings.values(), candidates) if cache else {}
        first: dict[_Setting, str] = {}
        for name, setting in settings.items():
            if setting not in known:
                first.setdefault(setting, name)
        if cache:
            for device in {device for device, _ in first}:
                check_writable(file_of(device))  # before the work
        timed: dict[_Setting, Choice] = {}
        try:
            with Progress("timing plans", len(first), shown) as bar:
                for setting, name in first.items():
                    timed[setting] = _fastest(layers[name], inputs[name], plans[name], candidates)
                    bar.step(name)
        finally:
            if cache:  # after an interruption too
                _keep(timed)
    rows = []
    for name, setting in settings.items():
        choice = timed.get(setting) or known[setting]
        source = f"kept {choice.date}" if setting in known else "timed"
        if first.get(setting, name) != name:
            source = f"as {first[setting]}"
        layers[name].strategy = choice.order
        rows.append(TunedLayer(name, choice.order, choice.before, choice.after, source))
    left |= dict.fromkeys(layers.keys() - settings.keys(), "the example input does not reach it")
    order = {name: left[name] for path, _ in model.named_modules() if (name := _plain(path)) in left}
    return AutotuneReport(tuple(rows), order)


_Setting = tuple[str, str]
"""A device type, and the text that names a setting in the cache."""


def _layers(model: nn.Module) -> tuple[dict[str, ExecutableModule], dict[str, str]]:
    """Return by name the layers to tune, and why other modules with networks are left as they are."""
    layers: dict[str, ExecutableModule] = {}
    left: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if (reason := getattr(type(module), "untuned", "")) and module not in inside:
            left[_plain(path)] = reason
            inside |= {*module.modules()}
        elif isinstance(module, ExecutableModule) and module not in inside:
            if module.strategy == STRATEGIES[0]:
                layers[path] = module
            else:
                left[path] = "its strategy is not 'auto'"
    return layers, left


def _plain(path: str) -> str:
    """Return the name of a weight by the path of its parametrization; other paths as they are.

    Example:
        >>> _plain("0.parametrizations.in_proj_weight.0"), _plain("1.conv")
        ('0.in_proj_weight', '1.conv')
    """
    owner, found, rest = path.rpartition("parametrizations.")
    return f"{owner}{rest.rpartition('.')[0]}" if found else path


class _Input(NamedTuple):
    """A layer's input, and the dtype of autocast that it came with; None if autocast was off."""

    x: Tensor
    cast: torch.dtype | None


def _inputs(model: nn.Module, layers: Mapping[str, ExecutableModule], example_input: Any) -> dict[str, _Input]:
    """Return a copy of each layer's input in one run of the model."""
    inputs: dict[str, _Input] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if (x := input_of(arguments, named)) is not None:
                with torch.inference_mode(False):
                    inputs[name] = _Input(x.detach().clone(), autocast_dtype(x.device.type))

        return hook

    hooks = [layer.register_forward_pre_hook(listen(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with as_written(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            run_on_copy(model, example_input)
    finally:
        for handle in hooks:
            handle.remove()
    return inputs


def _planned(layer: ExecutableModule, x: _Input) -> Plan | None:
    """Return the plan that a pass runs, whose setting has the pass's own mode, layout and dtype."""
    _pass(layer, x)
    return layer._executor.latest


def _setting(layer: ExecutableModule, plan: Plan) -> _Setting:
    return plan.setting.device, key(plan.network, plan.geometry, plan.setting, layer.memory)


def _known(settings: Iterable[_Setting], candidates: int) -> dict[_Setting, Choice]:
    """Return the kept choices among at least this number of candidates."""
    found = {(device, text): all_kept(device).get(text) for device, text in settings}
    return {setting: choice for setting, choice in found.items() if choice and choice.candidates >= candidates}


def _keep(timed: Mapping[_Setting, Choice]) -> None:
    by_device: dict[str, dict[str, Choice]] = defaultdict(dict)
    for (device, text), choice in timed.items():
        by_device[device][text] = choice
    for device, choices in by_device.items():
        keep(device, choices)


def _fastest(layer: ExecutableModule, x: _Input, planned: Plan, candidates: int) -> Choice:
    """Return the order with the smallest median time, of the planned one and the best by estimate."""
    found = layer._executor.candidates(planned.setting)
    likely = (planned.order, *(plan.order for plan in islice(found, 8 * candidates)))
    orders = list(dict.fromkeys(likely))[:candidates]
    times: dict[str, list[float]] = {order: [] for order in orders}
    try:
        for number in range(ROUNDS + 1):
            for order in orders:
                layer.strategy = order
                _pass(layer, x)  # makes the plan, and fills the weight cache of inference
                seconds = _seconds(layer, x)
                if number:
                    times[order].append(seconds)
    finally:
        layer.strategy = STRATEGIES[0]
    best = min(orders, key=lambda order: median(times[order]))
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Choice(best, median(times[planned.order]), median(times[best]), candidates, date)


def _seconds(layer: ExecutableModule, x: _Input) -> float:
    """Return the time of a pass."""
    start = time.perf_counter()
    _pass(layer, x)
    return time.perf_counter() - start


def _pass(layer: ExecutableModule, given: _Input) -> None:
    x, cast = given
    # What was made in inference mode cannot be trained.
    parameters = [each for each in layer.parameters() if each.requires_grad and not each.is_inference()]
    train, kind = layer.training and bool(parameters), x.device.type
    precision = (
        torch.autocast(kind, cast, enabled=cast is not None) if torch.amp.is_autocast_available(kind) else nullcontext()
    )
    with torch.set_grad_enabled(train), precision:
        leaf = x.clone().requires_grad_(x.is_floating_point()) if train else x  # indices have no gradient
        y = layer._run(leaf)
    if train:
        leaves = [leaf, *parameters] if leaf.requires_grad else parameters
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    if kind == "cuda":
        torch.cuda.synchronize(x.device)
