"""Saving and loading of tensor layers by transformers, through its extension point for quantizers.

``save_pretrained`` asks the quantizer of a model for the state. Ours then writes the description of every tensor layer
to the configuration. ``from_pretrained`` makes the quantizer that the configuration names, and ours replaces the plain
layers, on the meta device, before the weights are loaded.

Where no such quantizer is registered, transformers only warns, and would draw new plain weights. So the file also holds
an empty tensor by the name of each plain parameter that a tensor layer has not: its shape is wrong, and loading raises.

transformers is optional and takes seconds to import, so it is imported only where needed.
"""

import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.backend.input_checks import check_module
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, build, check_replaces, describe, exactly

METHOD = "tnlayers"
"""The method by which transformers knows our quantizer."""
VERSION = 1
_CONFIG, _QUANTIZER = "TensorLayersConfig", "TensorLayersQuantizer"


def register_with_transformers(model: nn.Module | None = None) -> None:
    """Let ``from_pretrained`` load tensor layers, and ``save_pretrained`` describe those of a model.

    Call it once, before a model with tensor layers is loaded. Repeated calls do nothing more. ``tensorize_``,
    ``densify_``, ``unfold_`` and ``load_tensorized`` call it with their model, if this is, or holds, a transformers
    model. So pass a model only if its layers came about otherwise: they were put in place by hand, or in a part of the
    model that the part alone was given to ``tensorize_``. The layers are described anew each time the model is saved.

    Args:
        model: a transformers model, or a module that holds some; None: only loading is prepared.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: ``model`` is no module.
        ValueError: ``model`` holds no transformers model, or one that is quantized by another method.

    Example:
        >>> import tempfile, transformers  # pip install 'tnlayers[transformers]'
        >>> from tnlayers import register_with_transformers, tensorize_
        >>> register_with_transformers()
        >>> sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
        >>> config = transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = transformers.ViTModel(config)
        >>> _ = tensorize_(model, "tucker")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = transformers.AutoModel.from_pretrained(folder)
        >>> all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        True
    """
    _register()
    if model is None:
        return
    check_module("model", model)
    found = [*_pretrained(model)]
    if not found:
        raise ValueError(f"model is {type(model).__name__}; it must be, or hold, a transformers.PreTrainedModel")
    for each in found:
        if foreign := _foreign(each):
            raise ValueError(f"model has a {type(each).__name__} that is quantized by {foreign}; it must not be")
        _attach(each)


def follow(model: nn.Module) -> None:
    """Keep the quantizers of the transformers models in a module in step with the layers that they have now.

    A model with tensor layers gets one, which does nothing before the model is saved. A model without loses it.

    Warns:
        UserWarning: a model that will be saved without descriptions, and why.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return  # so there is no such model
    found = [*_pretrained(model)]
    for each in found:
        if not _has_layers(each):
            _detach(each)
        elif foreign := _foreign(each):
            warnings.warn(
                f"{type(each).__name__} is quantized by {foreign}, so save_pretrained does not describe its tensor "
                "layers; use tnlayers.save_tensorized",
                stacklevel=4,
            )
        else:
            _attach(each)
    configs = sys.modules["transformers.configuration_utils"].PreTrainedConfig
    if not found and isinstance(getattr(model, "config", None), configs) and _has_layers(model):
        warnings.warn(
            f"{type(model).__name__} is a part of a transformers model, whose save_pretrained does not know of the new "
            "layers; call tnlayers.register_with_transformers(model) with the whole model",
            stacklevel=4,
        )


def _pretrained(model: nn.Module) -> Iterator[Any]:
    cls = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    return (module for module in model.modules() if isinstance(module, cls))


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(module, TensorLayer) for module in model.modules())


def _foreign(model: Any) -> str:
    """Return the name of another quantization method of a model, or an empty text."""
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None or isinstance(quantizer, _Quantizer) else type(quantizer).__name__


def _attach(model: Any) -> None:
    if getattr(model, "hf_quantizer", None) is None:
        config, quantizer = _register()
        model.hf_quantizer = quantizer(config())


def _detach(model: Any) -> None:
    if isinstance(getattr(model, "hf_quantizer", None), _Quantizer):
        del model.hf_quantizer
    _forget(model.config)


def _forget(config: Any) -> None:
    if isinstance(getattr(config, "quantization_config", None), _Config):
        del config.quantization_config


@cache
def _register() -> tuple[Any, Any]:
    """Register our configuration and quantizer with transformers, and return both classes."""
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "transformers is not installed; pip install 'tnlayers[transformers]'", name=error.name
        ) from None
    auto = importlib.import_module("transformers.quantizers.auto")
    bases = (_Config, auto.QuantizationConfigMixin), (_Quantizer, auto.HfQuantizer)
    # Their module is this one, whose __getattr__ finds them again when a model is unpickled.
    made = [type(name, base, {"__module__": __name__}) for name, base in zip((_CONFIG, _QUANTIZER), bases, strict=True)]
    auto.register_quantization_config(METHOD)(made[0])
    auto.register_quantizer(METHOD)(made[1])
    return made[0], made[1]


def __getattr__(name: str) -> Any:
    if name in (_CONFIG, _QUANTIZER):
        return _register()[(_CONFIG, _QUANTIZER).index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Config:
    """What the configuration of a model says of its tensor layers; transformers' base class is added when known.

    Attributes:
        layers: mappings with "layer", a description, and "names", the modules that it describes.
    """

    def __init__(self, quant_method: str = METHOD, version: int = VERSION, layers: Sequence[Any] = ()) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"quantization_config has version {version!r}; this library reads up to {VERSION}")
        if not isinstance(layers, list | tuple):
            raise TypeError(f"layers is {layers!r}; it must be a list of descriptions")
        self.quant_method, self.version = quant_method, version
        self.layers = [exactly("layers", each, ("names", "layer")) for each in layers]


class _Quantizer:
    """Describes tensor layers when a model is saved, and makes them when it is loaded."""

    requires_calibration = True  # transformers' word for: there must be tensor layers already
    is_trainable = is_qat_trainable = is_compileable = True
    quantization_config: Any

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Describe the layers that a model has now. ``save_pretrained`` calls this before it writes anything."""
        for part in _pretrained(model):
            _forget(part.config)
        layers = {name: layer for name, layer in _named(model).items() if isinstance(layer, TensorLayer)}
        if not layers:
            return None, {}
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            with about_layer(name):
                text = json.dumps(describe(layer), allow_nan=False)
            groups.setdefault(text, {"names": [], "layer": json.loads(text)})["names"].append(name)
        state = _guards(model, groups.values()) | model.state_dict()
        self.quantization_config = model.config.quantization_config = _register()[0](layers=[*groups.values()])
        return state, {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Replace the plain layers of a model on the meta device."""
        modules, made, guards = _named(model), dict[nn.Module, TensorLayer](), list[str]()
        for group in self.quantization_config.layers:
            for name in group["names"]:
                path = _path(name, model.base_model_prefix, modules)
                if path is None:
                    continue  # a head that this class has not
                with about_layer(path):
                    old = modules[path]
                    new = made[old] if old in made else made.setdefault(old, _made(group["layer"], old))
                lacking = old.state_dict().keys() - new.state_dict().keys()
                guards += [f"^{re.escape(f'{each}.{key}')}$" for each in (name, path) for key in lacking]
                parent, _, leaf = path.rpartition(".")
                modules[parent]._modules[leaf] = new
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *guards}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check that all cores were loaded. Take back what says that the weights are quantized: they are not."""
        loaded = [getattr(each, "_is_hf_initialized", False) for each in model.parameters()]
        for name, layer in _named(model).items():
            missing = isinstance(layer, TensorLayer) and not all(
                core.is_meta or getattr(core, "_is_hf_initialized", False) for core in layer.cores
            )
            if missing and any(loaded):
                raise ValueError(
                    f"layer {name!r}: the configuration describes {layer}, but the file does not hold its cores; it "
                    "may be of the plain model, or of other ranks"
                )
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        for part in _pretrained(model):
            vars(part.config).pop("_is_quantized", None)
        follow(model)
        return model

    def _dequantize(self, *_: Any, **__: Any) -> None:
        raise ValueError("dequantize() does not apply to tensor layers; tnlayers.densify_(model) makes them plain again")


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _path(name: Any, prefix: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return a layer's name in a model with or without a head, which may differ from the one that was saved."""
    paths = name, f"{prefix}.{name}", str(name).removeprefix(f"{prefix}.")
    return next((path for path in paths if path in modules), None)


def _made(description: Any, old: Any) -> TensorLayer:
    """Return the layer of a description in the dtype, and with the bias and other attributes, of a plain layer."""
    dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
    with torch.device("cpu"):  # transformers makes the meta device the default
        layer = build(exactly("layer", description, description) | {"dtype": dtype}, device="meta")
    check_replaces(description, old, dtype=False)
    if layer.bias is not None:
        layer.bias = old.bias
    for name, value in vars(old).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    layer._is_hf_initialized = True  # type: ignore[assignment]  # so that no parent of it draws its weight
    return layer.train(old.training)


def _guards(model: Any, groups: Any) -> dict[str, Tensor]:
    """Return empty tensors by the names of the plain parameters that tensor layers have not.

    Raises:
        ValueError: the class of the model does not make a layer that could be replaced when the model is loaded.
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        plain = _named(type(model)(model.config))
    guards, own = {}, _named(model)
    for group in groups:
        for name in group["names"]:
            with about_layer(name):
                if name not in plain:
                    raise ValueError(f"{type(model).__name__} makes no such module, so it could not be loaded")
                check_replaces(group["layer"], plain[name], dtype=False)
            for key, value in plain[name].state_dict().items():
                if key not in own[name].state_dict():
                    guards[f"{name}.{key}"] = torch.empty([0] * value.ndim, dtype=value.dtype)
    return guards
