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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.interop.transformers_layers import (
    check_plain,
    cores_of,
    described,
    follow_ties,
    guards_of,
    is_plain,
    lacking_keys,
    made_layer,
    made_output,
    made_recurrent,
    named,
    other_descriptions,
    path_in,
    register_network,
    replace,
)
from tnlayers.layers.any_weight import NetworkWeight
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, describe, exactly
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.tied import TiedLinear

METHOD = "tnlayers"
"""The method by which transformers knows our quantizer."""
VERSION = 1
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
        recurrent: descriptions of recurrent layers, without those of their weights' layers, by name.
        outputs: by the name of a linear layer over the cores of an embedding, its embedding and arguments.
        weights: descriptions of the networks of single weights, by the weights' names.
        tied: by the name of a parameter that is not in the file, the name of the one that it is.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        layers: Sequence[Any] = (),
        tied: Mapping[str, str] | None = None,
        recurrent: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"quantization_config has version {version!r}; this library reads up to {VERSION}")
        if not isinstance(layers, list | tuple):
            raise TypeError(f"layers is {layers!r}; it must be a list of descriptions")
        given = {"tied": tied, "recurrent": recurrent, "outputs": outputs, "weights": weights}
        for name, each in given.items():
            if not isinstance(each, dict | None):
                raise TypeError(f"{name} is {each!r}; it must be a mapping of names")
        self.recurrent, self.outputs, self.weights = ({**(each or {})} for each in (recurrent, outputs, weights))
        self.quant_method, self.version, self.tied = quant_method, version, dict(tied or {})
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
        if not has_layers(model):
            return None, {}
        layers, inner = described(model)
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            with about_layer(name):
                text = json.dumps(describe(layer), allow_nan=False)
            groups.setdefault(text, {"names": [], "layer": json.loads(text)})["names"].append(name)
        recurrent, outputs, weights = other_descriptions(model)
        plain = _plain(model, groups.values(), inner)
        changed = [*(layers.keys() - inner), *recurrent, *outputs, *(name.rpartition(".")[0] for name in weights)]
        state, tied = guards_of(model, plain, changed) | model.state_dict(), _tied(model)
        own = {"recurrent": recurrent, "outputs": outputs, "weights": weights}
        config = registered()[0](layers=[*groups.values()], tied=tied, **own)
        self.quantization_config = model.config.quantization_config = config
        buffers = dict(model.named_buffers(remove_duplicate=False))
        again = buffers.keys() - dict(model.named_buffers()).keys()  # safetensors holds no tensor twice
        return {
            name: value.clone() if name in again else value for name, value in state.items() if name not in tied
        }, {}

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        """Replace the plain layers of a model on the meta device, unless its files are of the plain model."""
        if is_plain(self.quantization_config, model.base_model_prefix, checkpoint_files or ()):
            return
        made, guards = dict[nn.Module, TensorLayer](), list[str]()
        prefix, given = model.base_model_prefix, self.quantization_config
        for name, description in given.recurrent.items():
            replace(model, name, guards, lambda old, _, of=description: made_recurrent(of, old))
        modules = named(model)
        for group in self.quantization_config.layers:
            for name in group["names"]:
                path = path_in(name, model.base_model_prefix, modules)
                if path is None:
                    continue  # a head that this class has not
                with about_layer(path):
                    old = modules[path]
                    new = made[old] if old in made else made.setdefault(old, made_layer(group["layer"], old))
                guards += lacking_keys(old.state_dict().keys() - new.state_dict().keys(), name, path)
                above, leaf = path.rpartition(".")[::2]
                modules[above]._modules[leaf] = new
        for name, description in given.weights.items():
            above, leaf = name.rpartition(".")[::2]
            if (path := path_in(above, prefix, modules)) is not None:
                with about_layer(name):
                    register_network(modules[path], leaf, description)
                guards += lacking_keys([leaf], above, path)
        for name, about in given.outputs.items():
            replace(model, name, guards, lambda old, own, of=about: made_output(of, old, own, prefix))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *guards}
        own = dict(model.named_parameters(remove_duplicate=False))
        ties = {name: other for name, other in model.all_tied_weights_keys.items() if name in own and other in own}
        for pair in given.tied.items():
            name, other = (path_in(each, prefix, own) for each in pair)
            ties |= {name: other} if name and other else {}
        model.all_tied_weights_keys = ties

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check that all cores were loaded. Take back what says that the weights are quantized: they are not."""
        for name, layer in named(model).items():
            cores = cores_of(layer)
            if any(core.is_meta for core in cores):
                raise ValueError(
                    f"layer {name!r}: device_map offloads it, but accelerate moves a layer's own parameters only, and "
                    "not its cores; map it to a device"
                )
            if not all(getattr(core, "_is_hf_initialized", False) for core in cores):
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
            else:
                detach(part)
        attach(model)
        return model

    def _dequantize(self, *_: Any, **__: Any) -> None:
        raise ValueError("dequantize() is not for tensor layers; tnlayers.densify_(model) makes them plain again")


def _plain(model: Any, groups: Iterable[Mapping[str, Any]], inner: set[str]) -> dict[str, nn.Module]:
    """Return the modules, by name, that the class of a model makes.

    Raises:
        ValueError: the class of the model makes other modules than the model has, so that it could not be loaded.
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        plain = named(type(model)(model.config))
    own, first = named(model), dict[nn.Module, nn.Module]()
    made_by = type(model).__name__
    for group in groups:
        for name in set(group["names"]) - inner:
            with about_layer(name):
                if name not in plain:
                    raise ValueError(f"{made_by} makes no such module, so it could not be loaded")
                if first.setdefault(plain[name], own[name]) is not own[name]:
                    raise ValueError(f"{made_by} makes one module at several places, and only one could be loaded")
                check_plain(group["layer"], plain[name])
    for name, theirs in plain.items():
        ours = own.get(name)
        related = isinstance(ours, (TensorLayer, TiedLinear, type(theirs))) or isinstance(theirs, type(ours))
        if ours is not None and not related and "weight" in ours._parameters and "weight" in theirs._parameters:
            raise ValueError(
                f"module {name!r} is a {type(ours).__name__}, but {made_by} makes a {type(theirs).__name__}, which "
                "would read its weight in its own way; put such a module there, or swap it"
            )
    return plain


def _tied(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter of tensor layers that has several, by its further names."""
    kinds = TensorLayer, TensorRecurrent, TiedLinear, parametrize.ParametrizationList
    layers = {name: layer for name, layer in named(model).items() if isinstance(layer, kinds)}
    ours = {
        f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters(remove_duplicate=False)
    }
    first: dict[nn.Parameter, str] = {}
    names = ((name, first.setdefault(each, name)) for name, each in model.named_parameters(remove_duplicate=False))
    return {name: other for name, other in names if name != other and not ours.isdisjoint((name, other))}


def pretrained(model: nn.Module) -> Iterator[Any]:
    """Yield the transformers models in a module, itself included."""
    cls = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    return (module for module in model.modules() if isinstance(module, cls))


def has_layers(model: nn.Module) -> bool:
    """Return whether a module holds tensor layers."""
    return any(isinstance(module, TensorLayer | TensorRecurrent | NetworkWeight) for module in model.modules())


def foreign(model: Any) -> str:
    """Return the name of another quantization method of a model, or an empty text."""
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None or isinstance(quantizer, _Quantizer) else type(quantizer).__name__


def attach(model: Any) -> None:
    """Give a model our quantizer, which does nothing before the model is saved, and the ties of its present layers."""
    if getattr(model, "hf_quantizer", None) is None:
        config, quantizer = registered()
        model.hf_quantizer = quantizer(config())
    for part in reversed([*pretrained(model)]):
        follow_ties(part, has_layers(part))


def detach(model: Any) -> None:
    """Take our quantizer, and its configuration, from a model that has them."""
    if isinstance(getattr(model, "hf_quantizer", None), _Quantizer):
        del model.hf_quantizer
    _forget(model.config)
    follow_ties(model, False)


def _forget(config: Any) -> None:
    if isinstance(getattr(config, "quantization_config", None), _Config):
        del config.quantization_config
