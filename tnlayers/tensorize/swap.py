"""Replacement of a model's plain layers by tensor layers, in place, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from tnlayers import validate
from tnlayers.backend.observe import observe
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.covering import check_patterns
from tnlayers.tensorize.finding import ALONE, find, in_order, left, note_holders, unwrapped
from tnlayers.tensorize.new_layers import choose_ranks, make_layers
from tnlayers.tensorize.refusals import left_alone
from tnlayers.tensorize.replace import keep_bias, put_in_place
from tnlayers.tensorize.report import TensorizeReport
from tnlayers.tensorize.sites import LayerSite, Swap, note_moments, note_shape, watch
from tnlayers.tensorize.swappable import NETWORKS, adapters, fold_of, how_to_swap, swappable, tensor_class
from tnlayers.tensorize.tied_sites import follow, join, keep_together
from tnlayers.tensorize.weight_sites import networks, weights


def tensorize_(
    model: nn.Module,
    config: TensorizeConfig | str | Mapping[str, Any] | None = None,
    *,
    example_input: Any = None,
    calibration: Iterable[Any] | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    workers: int | None = None,
) -> TensorizeReport:
    """Replace convolutions, transposed convolutions and linear layers of a model by tensor layers, in place.

    On request, also embeddings, recurrent layers and single weights: ``kinds`` and ``parametrize`` in the config.
    A new layer keeps the bias (the same parameter), device, dtype, ``requires_grad``, training flag, hooks and
    attributes. A module at several places stays one module. A layer stays plain if anything else than modules also
    holds it (lists, hooks, closures and so on), or if its weight shares memory with another parameter. All new layers
    are made before the first is put in place, so an error leaves the model unchanged. Without calibration, layers are
    fitted side by side; the result does not depend on ``workers``. Every new layer is logged to ``tnlayers``.

    Args:
        model: any module that is not itself such a layer. Compile it or wrap it for data parallelism afterwards, or
            pass a compiled model, which is compiled anew.
        config: which layers to replace, and by what; default: ``TensorizeConfig()``. The name of a format, such as
            "tr", means ``TensorizeConfig("tr")``; a mapping is passed to ``TensorizeConfig.from_dict``.
        example_input: a tensor, a tuple of arguments or a mapping of named ones. The model runs on it once, in eval
            mode without gradients, and the report gives FLOPs. A budget of FLOPs needs it. This run gives lazy layers
            their shapes, so they are swapped as others.
        calibration: a list of such inputs. Layers are fitted in the order of their calls: each, on its inputs from the
            fitted layers before it, to its original outputs. The error is measured by second moments of input patches;
            for patches of more than 2,304 entries and in transposed layers, of channels alone. In eval mode, the model
            runs on the list once, then twice, up to the layer, for every fitted layer; layers with one input share
            this. It takes memory for an input, a layer's inputs in that run, 2**25 entries of patches (at least one
            image's), each of these twice, and some float64 matrices with a row and a column per patch entry; with
            an energy or a budget, one with a row and a column per channel for every layer.
        dry_run: only report. Nothing is fitted, so there are no errors of fits.
        progress: show a bar on stderr. None: if stderr is a terminal and fits take longer than two seconds.
        workers: maximum number of layers fitted side by side on a CPU, each in one of torch's threads, whose number is
            restored afterwards, and with the memory of a fit. None: ``torch.get_num_threads()``.

    Returns:
        TensorizeReport: every such layer, replaced or not, and why.

    Raises:
        TypeError, ValueError: config is invalid; calibration is no list, empty or unused; a pattern covers no layer;
            the model has no layer to swap or is one itself; every chosen layer refuses its rank; a budget cannot be
            met; weights to fit are on the meta device; or the model is wrapped for distributed data parallelism. If
            only some layers cannot become tensor layers, they stay plain, and the report says why.
        Exception: what the model raises on an input.

    Warns:
        UserWarning: an optimizer holds parameters that left the model; ``remap_optimizer_`` exchanges them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> config = TensorizeConfig("tucker", rank=0.5, exclude=["3"])
        >>> report = tensorize_(model, config, example_input=torch.randn(2, 16, 3, 3))
        >>> report.swapped, type(model[0]).__name__, report["3"].reason
        (('0',), 'TuckerConv2d', "excluded by '3'")
    """
    config = _config(config)
    validate.boolean("dry_run", dry_run)
    validate.boolean("progress", bool(progress) if progress is None else progress)
    workers = torch.get_num_threads() if workers is None else validate.integer("workers", workers)
    if example_input is None and config.budget and "flops" in config.budget:
        raise ValueError(f"budget is {config.budget}, but example_input is None; FLOPs depend on the input's size")
    swap = Swap(model, config, [] if calibration is None else _batches(calibration), dry_run, progress, workers)
    _find_sites(swap, example_input)
    with torch.inference_mode(False), torch.no_grad():
        choose_ranks(swap)
        make_layers(swap)
        follow(swap.sites)
    for site in swap.sites:
        keep_bias(site)
    report = put_in_place(swap)
    if not dry_run:
        unwrapped(model)._tensorize_config = config  # type: ignore[assignment]
    return report


def _find_sites(swap: Swap, example: Any) -> None:
    """Find the layers, their input shapes and other holders, and choose the layers to swap."""
    model, config, batches = swap.model, swap.config, swap.batches
    sites = _found(model, config)
    check_patterns(config, _names(sites), lambda: _names(_found(model, replace(config, parametrize=True))))
    # First of all, since this run initialises lazy layers, and may create layers.
    if example is not None:
        shapes = {site.module: site.shapes for site in watch(model, sites, [example], note_shape) if site.called}
        sites = _found(model, config)
        for site in sites:
            site.shapes = shapes.get(site.module, []) if site.called else []
    elif any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        observe(model, (), batches[:1], lambda *_: None)
    join(sites)
    note_holders(model, sites, lambda site: site.leaving)
    for site in sites:
        site.reason = left_alone(site, config)
    keep_together(sites)
    swap.sites, swap.chosen = sites, [site for site in sites if not site.reason and not site.follows]
    if not swap.chosen:
        raise ValueError(f"model has no layer to swap ({left(sites)})")
    if batches:
        if not any(site.settings["decompose"] for site in swap.chosen):
            raise ValueError(
                "calibration is given, but decompose is False for every chosen layer, and only fits use it; leave it "
                "out, or say decompose=True"
            )
        swap.chosen = watch(model, swap.chosen, batches, note_moments)


def _names(sites: Iterable[LayerSite]) -> list[tuple[str, ...]]:
    return [site.names for site in sites]


def _config(given: Any) -> TensorizeConfig:
    if given is None or isinstance(given, str):
        return TensorizeConfig() if given is None else TensorizeConfig(given)
    if isinstance(given, Mapping):
        return TensorizeConfig.from_dict(given)
    if not isinstance(given, TensorizeConfig):
        raise TypeError(f"config is {given!r}; it must be a tnlayers.TensorizeConfig, a format's name or a mapping")
    return given


def _found(model: nn.Module, config: TensorizeConfig) -> list[LayerSite]:
    """Find layers, and weights that are networks or, on request, could be."""

    def alone(layer: Any) -> str:
        if isinstance(layer, NETWORKS):
            return "a tensor layer already"
        if type(layer) is not (kind := how_to_swap(layer).kind):
            return ALONE.format("nn.Sequential(layer)") + ", and swap that"
        cls = tensor_class(config.format, kind)
        name = f"{'tnlayers.' if cls.__module__.startswith('tnlayers.') else ''}{cls.__name__}"
        given = ({} if config.rank is None else {"rank": config.rank}) | dict(config.options)
        given |= {} if config.decompose else {"decompose": False}
        arguments = ", ".join(["layer", *(f"{key}={value!r}" for key, value in given.items())])
        return ALONE.format(f"{name}.from_{cls.dense_name}({arguments})")

    own, inside = networks(model), adapters(model)
    types = (*(each.cls for each in swappable()), *NETWORKS)
    what = "" if own or config.parametrize else "convolution or linear layer"
    taken = {site.module for site in own if site.parameter == "weight"}
    layers = find(model, types, what, alone, lambda layer: layer not in taken and _covered(layer, config))
    for site in layers:
        site.fold = fold_of(site.module) if config.parametrized == "fold" else None
        site.adapter = inside.get(site.module, "")
    more = weights(model, [*(site.module for site in layers), *inside]) if config.parametrize else []
    return in_order(model, [*layers, *own, *more])


def _covered(layer: nn.Module, config: TensorizeConfig) -> bool:
    """Return whether a layer is swapped as a whole, if at all: not so subclasses whose weight can be a network."""
    if isinstance(layer, NETWORKS) or not config.parametrize or config.subclasses:
        return True
    return type_before_parametrizations(layer) is how_to_swap(layer).cls


def _batches(calibration: Any) -> list[Any]:
    if isinstance(calibration, torch.Tensor | str | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration is of type {type(calibration).__name__}; it must be a list of inputs, as example_input each, "
            "such as [batch]"
        )
    if not (batches := list(calibration)):
        raise ValueError("calibration is empty; it must hold an input at least (a used generator holds none)")
    return batches
