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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.layers.any_weight import NetworkWeight
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.description import about_layer, build, check_replaces, describe, exactly
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_description import describe_recurrent, outline_recurrent
from tnlayers.layers.registry import EVERY_KIND
from tnlayers.layers.tied import TiedLinear
from tnlayers.layers.weight_description import build_weight, describe_weight
from tnlayers.spec.recurrence import KINDS as KINDS_OF_WEIGHTS

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
        named = {"tied": tied, "recurrent": recurrent, "outputs": outputs, "weights": weights}
        for name, each in named.items():
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
        layers, inner = _described(model)
        groups: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            with about_layer(name):
                text = json.dumps(describe(layer), allow_nan=False)
            groups.setdefault(text, {"names": [], "layer": json.loads(text)})["names"].append(name)
        recurrent, outputs, weights = _others(model)
        plain = _plain(model, groups.values(), inner)
        changed = [*(layers.keys() - inner), *recurrent, *outputs, *(name.rpartition(".")[0] for name in weights)]
        state, tied = _guards(model, plain, changed) | model.state_dict(), _tied(model)
        config = registered()[0](
            layers=[*groups.values()], tied=tied, recurrent=recurrent, outputs=outputs, weights=weights
        )
        self.quantization_config = model.config.quantization_config = config
        buffers = dict(model.named_buffers(remove_duplicate=False))
        again = buffers.keys() - dict(model.named_buffers()).keys()  # safetensors holds no tensor twice
        return {
            name: value.clone() if name in again else value for name, value in state.items() if name not in tied
        }, {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        """Replace the plain layers of a model on the meta device."""
        made, guards = dict[nn.Module, TensorLayer](), list[str]()
        prefix, given = model.base_model_prefix, self.quantization_config
        for name, description in given.recurrent.items():
            _replace(model, name, guards, lambda old, _, of=description: _recurrent(of, old))
        modules = _named(model)
        for group in self.quantization_config.layers:
            for name in group["names"]:
                path = _path(name, model.base_model_prefix, modules)
                if path is None:
                    continue  # a head that this class has not
                with about_layer(path):
                    old = modules[path]
                    new = made[old] if old in made else made.setdefault(old, _made(group["layer"], old))
                guards += _lacking(old.state_dict().keys() - new.state_dict().keys(), name, path)
                above, leaf = path.rpartition(".")[::2]
                modules[above]._modules[leaf] = new
        for name, description in given.weights.items():
            above, leaf = name.rpartition(".")[::2]
            if (path := _path(above, prefix, modules)) is not None:
                with about_layer(name):
                    _register(modules[path], leaf, description)
                guards += _lacking([leaf], above, path)
        for name, about in given.outputs.items():
            _replace(model, name, guards, lambda old, own, of=about: _output(of, old, own, prefix))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *guards}
        own = dict(model.named_parameters(remove_duplicate=False))
        ties = {name: other for name, other in model.all_tied_weights_keys.items() if name in own and other in own}
        for pair in given.tied.items():
            name, other = (_path(each, prefix, own) for each in pair)
            ties |= {name: other} if name and other else {}
        model.all_tied_weights_keys = ties

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check that all cores were loaded. Take back what says that the weights are quantized: they are not."""
        for name, layer in _named(model).items():
            cores = _cores(layer)
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
        return model

    def _dequantize(self, *_: Any, **__: Any) -> None:
        raise ValueError("dequantize() is not for tensor layers; tnlayers.densify_(model) makes them plain again")


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _path(name: Any, prefix: str, own: Mapping[str, Any]) -> str | None:
    """Return a name in a model with or without a head, which may differ from the one that was saved."""
    paths = str(name), f"{prefix}.{name}", str(name).removeprefix(f"{prefix}.")
    return next((path for path in paths if path in own), None)


def _made(description: Any, old: Any) -> TensorLayer:
    """Return the layer of a description in the dtype, and with the bias and other attributes, of a plain layer."""
    dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
    with torch.device("cpu"):  # transformers makes the meta device the default
        layer = build(exactly("layer", description, description) | {"dtype": dtype}, device="meta")
    _check_replaces(description, old)
    if layer.bias is not None and (bias := getattr(old, "bias", None)) is not None:
        layer.bias = bias
    return _like(layer, old)


def _like(layer: Any, old: nn.Module) -> Any:
    """Give a new layer the further attributes of the old one."""
    for name, value in vars(old).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    layer._is_hf_initialized = True  # so that no parent of it draws its weight
    layer.training = old.training
    return layer


def _recurrent(description: Any, old: Any) -> TensorRecurrent:
    """Return the layer of a description, whose weights are plain yet."""
    cls, options, arguments = outline_recurrent(description)
    if type(old) is not cls.dense_type or cls._arguments(old) != arguments:
        raise ValueError(f"the file has {cls.__name__} with {arguments}, but the model has {old}")
    with torch.device("cpu"):
        layer = cls.from_dense(old, decompose=False, plain=KINDS_OF_WEIGHTS, **options)
    return _like(layer, old).train(old.training)  # type: ignore[no-any-return]


def _output(about: Any, old: Any, own: Mapping[str, nn.Module], prefix: str) -> TiedLinear:
    """Return the linear layer over the cores of an embedding of the model."""
    given = exactly("outputs", about, ("embedding", "strategy", "memory"))
    embedding = own.get(_path(given.pop("embedding"), prefix, own) or "")
    if embedding is None or not isinstance(old, nn.Linear | TiedLinear):
        raise ValueError(f"the file has a linear layer tied to an embedding, but the model has {old}")
    layer = TiedLinear(embedding, **given)
    if (layer.in_features, layer.out_features) != (old.in_features, old.out_features):
        raise ValueError(f"the file has {layer}, but the model has {old}")
    layer.bias = old.bias
    return _like(layer, old)  # type: ignore[no-any-return]


def _register(module: Any, name: str, description: Any) -> None:
    """Make a parameter of a module the network of a description."""
    old = module._parameters.get(name)
    if old is None:
        raise ValueError(f"the file has a network for {name!r}, but {type(module).__name__} has no such parameter")
    parametrize.register_parametrization(module, name, build_weight(description, old), unsafe=True)
    module._is_hf_initialized = True


def _replace(model: Any, name: str, guards: list[str], make: Any) -> None:
    """Replace a module on the meta device, if the model has it."""
    modules = _named(model)
    if (path := _path(name, model.base_model_prefix, modules)) is None:
        return
    above, leaf = path.rpartition(".")[::2]
    with about_layer(path):
        old = modules[path]
        new = modules[above]._modules[leaf] = make(old, modules)
    guards += _lacking(old.state_dict().keys() - new.state_dict().keys(), name, path)


def _lacking(keys: Iterable[str], *names: str) -> list[str]:
    return [f"^{re.escape(f'{each}.{key}')}$" for each in names for key in keys]


def _cores(module: Any) -> list[Tensor]:
    """Return the cores of a layer, or of the networks of a module's weights."""
    if isinstance(module, TensorLayer):
        return [*module.cores]
    return [core for _, steps in _networks(module) for core in steps.parameters()]


def _networks(module: Any) -> list[tuple[str, Any]]:
    if not parametrize.is_parametrized(module):
        return []
    return [(key, steps) for key, steps in module.parametrizations.items() if isinstance(steps[0], NetworkWeight)]


def _described(model: nn.Module) -> tuple[dict[str, TensorLayer], set[str]]:
    """Return the tensor layers by name, and the names of those that hold weights of a recurrent layer."""
    named = _named(model)
    above = {name: named.get(name.rpartition(".")[0]) for name in named}
    layers = {name: layer for name, layer in named.items() if isinstance(layer, TensorLayer)}
    layers = {name: layer for name, layer in layers.items() if not isinstance(above[name], TiedLinear)}
    return layers, {name for name in layers if isinstance(above[name], TensorRecurrent)}


def _others(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Describe recurrent layers, outputs tied to embeddings, and networks of single weights, by name."""
    recurrent, outputs, weights = {}, {}, {}
    first: dict[nn.Module, str] = {}
    for name, module in _named(model).items():
        if not isinstance(_named(model).get(name.rpartition(".")[0]), TiedLinear):
            first.setdefault(module, name)
    for name, module in _named(model).items():
        with about_layer(name):
            if isinstance(module, TensorRecurrent):
                recurrent[name] = describe_recurrent(module)
            elif isinstance(module, TiedLinear):
                if not isinstance(module.embedding, TensorLayer) or module.embedding not in first:
                    raise ValueError("it is tied to an embedding that is no tensor layer of the model; densify_ it")
                own = {"strategy": module.strategy, "memory": module.memory}
                outputs[name] = {"embedding": first[module.embedding], **own}
            for key, steps in _networks(module):
                weights[f"{name}.{key}" if name else key] = describe_weight(steps[0])
    return recurrent, outputs, weights


def _check_replaces(description: Mapping[str, Any], old: nn.Module) -> None:
    """Check a plain layer of torch. Of others, such as transformers' Conv1D, the file's tensors have the sizes."""
    if isinstance(old, (*EVERY_KIND, TensorLayer)):
        check_replaces(description, old, dtype=False)


def _plain(model: Any, groups: Iterable[Mapping[str, Any]], inner: set[str]) -> dict[str, nn.Module]:
    """Return the modules, by name, that the class of a model makes.

    Raises:
        ValueError: the class of the model makes other modules than the model has, so that it could not be loaded.
    """
    with torch.random.fork_rng([]), torch.device("meta"):
        plain = _named(type(model)(model.config))
    own, first = _named(model), dict[nn.Module, nn.Module]()
    made_by = type(model).__name__
    for group in groups:
        for name in set(group["names"]) - inner:
            with about_layer(name):
                if name not in plain:
                    raise ValueError(f"{made_by} makes no such module, so it could not be loaded")
                if first.setdefault(plain[name], own[name]) is not own[name]:
                    raise ValueError(f"{made_by} makes one module at several places, and only one could be loaded")
                _check_replaces(group["layer"], plain[name])
    for name, theirs in plain.items():
        ours = own.get(name)
        related = isinstance(ours, (TensorLayer, TiedLinear, type(theirs))) or isinstance(theirs, type(ours))
        if not related and "weight" in ours._parameters and "weight" in theirs._parameters:  # type: ignore[union-attr]
            raise ValueError(
                f"module {name!r} is a {type(ours).__name__}, but {made_by} makes a {type(theirs).__name__}, which "
                "would read its weight in its own way; put such a module there, or swap it"
            )
    return plain


def _guards(model: Any, plain: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, Tensor]:
    """Return empty tensors by the names of the plain parameters that changed modules have not."""
    guards, own = {}, _named(model)
    for name in names:
        with about_layer(name):
            if name not in plain:
                raise ValueError(f"{type(model).__name__} makes no such module, so it could not be loaded")
        for key, value in plain[name].state_dict().items():
            if key not in own[name].state_dict():
                guards[f"{name}.{key}"] = torch.empty([0] * value.ndim, dtype=value.dtype)
    return guards


def _tied(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter of tensor layers that has several, by its further names."""
    kinds = TensorLayer, TensorRecurrent, TiedLinear, parametrize.ParametrizationList
    layers = {name: layer for name, layer in _named(model).items() if isinstance(layer, kinds)}
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
