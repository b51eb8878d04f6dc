"""The quantizer by which transformers saves and loads tensor layers: its extension point for other kinds of weights.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, build, check_replaces, describe, exactly
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_description import describe_recurrent, with_plain_weights
from tnlayers.layers.registry import EVERY_KIND

METHOD = "tnlayers"
"""The method by which transformers knows our quantizer."""
VERSION = 1
_OURS = TensorLayer, TensorRecurrent
_CONFIG, _QUANTIZER = "TensorLayersConfig", "TensorLayersQuantizer"


@cache
def registered() -> tuple[Any, Any]:
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
        return registered()[(_CONFIG, _QUANTIZER).index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Config:
    """What the configuration of a model says of its tensor layers; transformers' base class is added when known.

    Attributes:
        layers: mappings with "layer", a description, and "names", the modules that it describes.
        recurrent: descriptions of recurrent layers, whose weights are among ``layers``, by name.
        tied: by the name of a parameter that is not in the file, the name of the one that it is.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        layers: Sequence[Any] = (),
        tied: Mapping[str, str] | None = None,
        recurrent: Mapping[str, Any] | None = None,
    ) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"quantization_config has version {version!r}; this library reads up to {VERSION}")
        if not isinstance(layers, list | tuple):
            raise TypeError(f"layers is {layers!r}; it must be a list of descriptions")
        for key, value in (("tied", tied), ("recurrent", recurrent)):
            if not isinstance(value, dict | None):
                raise TypeError(f"{key} is {value!r}; it must be a mapping of names")
        self.quant_method, self.version = quant_method, version
        self.tied, self.recurrent = dict(tied or {}), dict(recurrent or {})
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
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only adapters are saved, without a configuration
        for part in pretrained(model):
            _forget(part.config)
        layers = {name: layer for name, layer in _named(model).items() if isinstance(layer, _OURS)}
        if not layers:
            return None, {}
        groups: dict[str, dict[str, Any]] = {}
        recurrent: dict[str, Any] = {}
        for name, layer in layers.items():
            with about_layer(name):
                if isinstance(layer, TensorRecurrent):
                    recurrent[name] = describe_recurrent(layer)
                    continue
                text = json.dumps(describe(layer), allow_nan=False)
            groups.setdefault(text, {"names": [], "layer": json.loads(text)})["names"].append(name)
        config = registered()[0](layers=[*groups.values()], tied=_tied(model, layers), recurrent=recurrent)
        state, tied = _guards(model, config) | model.state_dict(), config.tied
        self.quantization_config = model.config.quantization_config = config
        return {name: value for name, value in state.items() if name not in tied}, {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Replace the plain layers of a model on the meta device."""
        modules, made, guards = _named(model), dict[nn.Module, nn.Module](), list[str]()
        for names, description, make in _described(self.quantization_config):
            for name in names:
                path = _path(name, model.base_model_prefix, modules)
                if path is None:
                    continue  # a head that this class has not
                with about_layer(path):
                    old = modules[path]
                    new = made[old] if old in made else made.setdefault(old, make(description, old))
                lacking = old.state_dict().keys() - new.state_dict().keys()
                guards += [f"^{re.escape(f'{each}.{key}')}$" for each in (name, path) for key in lacking]
                above, leaf = path.rpartition(".")[::2]
                modules[above]._modules[leaf] = new
                modules |= _named(new, path)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *guards}
        own = dict(model.named_parameters(remove_duplicate=False))
        ties = {name: other for name, other in model.all_tied_weights_keys.items() if name in own and other in own}
        for pair in self.quantization_config.tied.items():
            one, other = (_path(each, model.base_model_prefix, own) for each in pair)
            ties |= {one: other} if one and other else {}
        model.all_tied_weights_keys = ties

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check that all cores were loaded. Take back what says that the weights are quantized: they are not."""
        for name, layer in _named(model).items():
            if not isinstance(layer, TensorLayer):
                continue
            if any(core.is_meta for core in layer.cores):
                raise ValueError(
                    f"layer {name!r}: device_map offloads it, but accelerate moves a layer's own parameters only, and "
                    "not its cores; map it to a device"
                )
            if not all(getattr(core, "_is_hf_initialized", False) for core in layer.cores):
                raise ValueError(
                    f"layer {name!r}: the configuration describes {layer}, but the file does not hold its cores; it "
                    "may be of the plain model, or of other ranks"
                )
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        for part in pretrained(model):
            vars(part.config).pop("_is_quantized", None)
            if has_layers(part):
                part.hf_quantizer = self  # a part can be saved by itself
        return model

    def _dequantize(self, *_: Any, **__: Any) -> None:
        raise ValueError("dequantize() is not for tensor layers; tnlayers.densify_(model) makes them plain again")


def _named(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    return dict(model.named_modules(prefix=prefix, remove_duplicate=False))


def _path(name: Any, prefix: str, own: Mapping[str, Any]) -> str | None:
    """Return a name in a model with or without a head, which may differ from the one that was saved."""
    paths = str(name), f"{prefix}.{name}", str(name).removeprefix(f"{prefix}.")
    return next((path for path in paths if path in own), None)


def _described(config: Any) -> Iterator[tuple[Sequence[str], Any, Callable[[Any, Any], nn.Module]]]:
    """Yield names, description, and what makes the layer. Recurrent layers come before those of their weights."""
    for name, description in config.recurrent.items():
        yield [name], description, _made_recurrent
    for group in config.layers:
        yield group["names"], group["layer"], _made


def _made_recurrent(description: Any, old: Any) -> TensorRecurrent:
    with torch.device("cpu"):
        layer = with_plain_weights(description, old)
    layer._is_hf_initialized = True
    return layer


def _made(description: Any, old: Any) -> TensorLayer:
    """Return the layer of a description in the dtype, and with the bias and other attributes, of a plain layer."""
    dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
    with torch.device("cpu"):  # transformers makes the meta device the default
        layer = build(exactly("layer", description, description) | {"dtype": dtype}, device="meta")
    _check_replaces(description, old)
    if layer.bias is not None and (bias := getattr(old, "bias", None)) is not None:
        layer.bias = bias
    for name, value in vars(old).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    layer._is_hf_initialized = True  # so that no parent of it draws its weight
    return layer.train(old.training)


def _check_replaces(description: Mapping[str, Any], old: nn.Module) -> None:
    """Check a plain layer of torch. Of others, such as transformers' Conv1D, the file's tensors have the sizes."""
    if isinstance(old, (*EVERY_KIND, TensorLayer)):
        check_replaces(description, old, dtype=False)


def _guards(model: Any, config: Any) -> dict[str, Tensor]:
    """Return empty tensors by the names of the plain parameters that tensor layers have not.

    Raises:
        ValueError: the class of the model makes other modules than the model has, so that it could not be loaded.
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        plain = _named(type(model)(model.config))
    guards, own, first = {}, _named(model), dict[nn.Module, nn.Module]()
    made_by = type(model).__name__
    for names, description, make in _described(config):
        for name in names:
            with about_layer(name):
                if (theirs := plain.get(name)) is None:
                    raise ValueError(f"{made_by} makes no such module, so it could not be loaded")
                if first.setdefault(theirs, own[name]) is not own[name]:
                    raise ValueError(f"{made_by} makes one module at several places, and only one could be loaded")
                if make is _made:
                    _check_replaces(description, theirs)
                else:
                    plain |= _named(make(description, theirs), name)
            for key, value in theirs.state_dict().items():
                if key not in own[name].state_dict():
                    guards[f"{name}.{key}"] = torch.empty([0] * value.ndim, dtype=value.dtype)
    for name, theirs in plain.items():
        ours = own.get(name)
        related = isinstance(ours, (TensorLayer, type(theirs))) or isinstance(theirs, type(ours))
        if ours is not None and not related and "weight" in ours._parameters and "weight" in theirs._parameters:
            raise ValueError(
                f"module {name!r} is a {type(ours).__name__}, but {made_by} makes a {type(theirs).__name__}, which "
                "would read its weight in its own way; put such a module there, or swap it"
            )
    return guards


def _tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the first name of each parameter of tensor layers that has several, by its further names."""
    ours = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters()}
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(each, name)) for name, each in model.named_parameters(remove_duplicate=False))
    return {name: other for name, other in names if name != other and not ours.isdisjoint((name, other))}


def pretrained(model: nn.Module) -> Iterator[Any]:
    """Yield the transformers models in a module, itself included."""
    cls = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    return (module for module in model.modules() if isinstance(module, cls))


def has_layers(model: nn.Module) -> bool:
    """Return whether a module holds tensor layers."""
    return any(isinstance(module, _OURS) for module in model.modules())


def foreign(model: Any) -> str:
    """Return the name of another quantization method of a model, or an empty text."""
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None or isinstance(quantizer, _Quantizer) else type(quantizer).__name__


def attach(model: Any) -> None:
    """Give a model our quantizer, which does nothing before the model is saved."""
    if getattr(model, "hf_quantizer", None) is None:
        config, quantizer = registered()
        model.hf_quantizer = quantizer(config())


def detach(model: Any) -> None:
    """Take our quantizer, and its configuration, from a model that has them."""
    if isinstance(getattr(model, "hf_quantizer", None), _Quantizer):
        del model.hf_quantizer
    _forget(model.config)


def _forget(config: Any) -> None:
    if isinstance(getattr(config, "quantization_config", None), _Config):
        del config.quantization_config
