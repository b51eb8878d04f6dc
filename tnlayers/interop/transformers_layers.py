"""Descriptions of a transformers model's tensor layers, and the layers of descriptions in the place of plain ones."""

import importlib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnlayers.layers.any_weight import NetworkWeight
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.core_memory import outside
from tnlayers.layers.description import about_layer, build, check_replaces, exactly
from tnlayers.layers.recurrent_base import TensorRecurrent
from tnlayers.layers.recurrent_description import describe_recurrent, outline_recurrent
from tnlayers.layers.registry import EVERY_KIND
from tnlayers.layers.tied import TiedLinear
from tnlayers.layers.weight_description import build_weight, describe_weight
from tnlayers.spec.recurrence import KINDS as KINDS_OF_WEIGHTS


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by each of its names."""
    return dict(model.named_modules(remove_duplicate=False))


def path_in(name: Any, prefix: str, own: Mapping[str, Any]) -> str | None:
    """Return a name in a model with or without a head, which may differ from the one that was saved."""
    paths = str(name), f"{prefix}.{name}", str(name).removeprefix(f"{prefix}.")
    return next((path for path in paths if path in own), None)


def is_plain(given: Any, prefix: str, files: Iterable[str]) -> bool:
    """Return whether a model's files have no core of any layer that a configuration describes.

    A plain model that is made from the configuration of a swapped one is saved with this configuration, since only the
    quantizer of a swapped model is asked.

    Warns:
        UserWarning: they have none.
    """
    layers = [str(name) for group in given.layers for name in group["names"]]
    weights = [str(name).rpartition(".") for name in given.weights]
    cores = [f"{name}.cores.0" for name in layers]
    cores += [f"{above}{dot}parametrizations.{leaf}.original0" for above, dot, leaf in weights]
    paths = [str(file) for file in files]
    if not cores or not paths or not all(path.endswith(".safetensors") for path in paths):
        return False
    safetensors = importlib.import_module("safetensors")
    held = dict[str, None]()
    for path in paths:
        with safetensors.safe_open(path, framework="pt") as file:
            held |= dict.fromkeys(file.keys())
    if any(path_in(name, prefix, held) for name in cores):
        return False
    warnings.warn(
        "the configuration describes tensor layers, but the file is of the plain model, so a plain model is loaded; "
        "delete quantization_config from the configuration, or save the loaded model again",
        stacklevel=outside(),
    )
    return True


def made_layer(description: Any, old: Any) -> TensorLayer:
    """Return the layer of a description in the dtype, and with the bias and other attributes, of a plain layer."""
    dtype = str(next(old.parameters()).dtype).removeprefix("torch.")
    with torch.device("cpu"):  # transformers makes the meta device the default
        layer = build(exactly("layer", description, description) | {"dtype": dtype}, device="meta")
    check_plain(description, old)
    if layer.bias is not None and (bias := getattr(old, "bias", None)) is not None:
        layer.bias = bias
    return with_attributes(layer, old)  # type: ignore[no-any-return]


def with_attributes(layer: Any, old: nn.Module) -> Any:
    """Give a new layer the further attributes of the old one."""
    for name, value in vars(old).items():
        if not hasattr(layer, name):
            setattr(layer, name, value)
    layer._is_hf_initialized = True  # so that no parent of it draws its weight
    layer.training = old.training
    return layer


def made_recurrent(description: Any, old: Any) -> TensorRecurrent:
    """Return the layer of a description, whose weights are plain yet."""
    cls, options, arguments = outline_recurrent(description)
    if type(old) is not cls.dense_type or cls._arguments(old) != arguments:
        raise ValueError(f"the file has {cls.__name__} with {arguments}, but the model has {old}")
    with torch.device("cpu"):
        layer = cls.from_dense(old, decompose=False, plain=KINDS_OF_WEIGHTS, **options)
    return with_attributes(layer, old).train(old.training)  # type: ignore[no-any-return]


def made_output(about: Any, old: Any, own: Mapping[str, nn.Module], prefix: str) -> TiedLinear:
    """Return the linear layer over the cores of an embedding of the model."""
    given = exactly("outputs", about, ("embedding", "strategy", "memory"))
    embedding = own.get(path_in(given.pop("embedding"), prefix, own) or "")
    if embedding is None or not isinstance(old, nn.Linear | TiedLinear):
        raise ValueError(f"the file has a linear layer tied to an embedding, but the model has {old}")
    layer = TiedLinear(embedding, **given)
    if (layer.in_features, layer.out_features) != (old.in_features, old.out_features):
        raise ValueError(f"the file has {layer}, but the model has {old}")
    layer.bias = old.bias
    return with_attributes(layer, old)  # type: ignore[no-any-return]


def register_network(module: Any, name: str, description: Any) -> None:
    """Make a parameter of a module the network of a description."""
    old = module._parameters.get(name)
    if old is None:
        raise ValueError(f"the file has a network for {name!r}, but {type(module).__name__} has no such parameter")
    parametrize.register_parametrization(module, name, build_weight(description, old), unsafe=True)


def replace(model: Any, name: str, guards: list[str], make: Any) -> None:
    """Replace a module on the meta device, if the model has it."""
    modules = named(model)
    if (path := path_in(name, model.base_model_prefix, modules)) is None:
        return
    above, leaf = path.rpartition(".")[::2]
    with about_layer(path):
        old = modules[path]
        new = modules[above]._modules[leaf] = make(old, modules)
    guards += lacking_keys(old.state_dict().keys() - new.state_dict().keys(), name, path)


def lacking_keys(keys: Iterable[str], *names: str) -> list[str]:
    """Return patterns of the names of parameters in modules."""
    return [f"^{re.escape(f'{each}.{key}')}$" for each in names for key in keys]


def cores_of(module: Any) -> list[Tensor]:
    """Return the cores of a layer, or of the networks of a module's weights."""
    if isinstance(module, TensorLayer):
        return [*module.cores]
    return [core for _, steps in networks_of(module) for core in steps.parameters()]


def networks_of(module: Any) -> list[tuple[str, Any]]:
    """Return the parametrizations of a module's weights that are networks, by name."""
    if not parametrize.is_parametrized(module):
        return []
    return [(key, steps) for key, steps in module.parametrizations.items() if isinstance(steps[0], NetworkWeight)]


def described(model: nn.Module) -> tuple[dict[str, TensorLayer], set[str]]:
    """Return the tensor layers by name, and the names of those that hold weights of a recurrent layer."""
    every = named(model)
    above = {name: every.get(name.rpartition(".")[0]) for name in every}
    layers = {name: layer for name, layer in every.items() if isinstance(layer, TensorLayer)}
    layers = {name: layer for name, layer in layers.items() if not isinstance(above[name], TiedLinear)}
    return layers, {name for name in layers if isinstance(above[name], TensorRecurrent)}


def other_descriptions(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Describe recurrent layers, outputs tied to embeddings, and networks of single weights, by name."""
    recurrent, outputs, weights = {}, {}, {}
    first: dict[nn.Module, str] = {}
    for name, module in named(model).items():
        if not isinstance(named(model).get(name.rpartition(".")[0]), TiedLinear):
            first.setdefault(module, name)
    for name, module in named(model).items():
        with about_layer(name):
            if isinstance(module, TensorRecurrent):
                recurrent[name] = describe_recurrent(module)
            elif isinstance(module, TiedLinear):
                if not isinstance(module.embedding, TensorLayer) or module.embedding not in first:
                    raise ValueError("it is tied to an embedding that is no tensor layer of the model; densify_ it")
                own = {"strategy": module.strategy, "memory": module.memory}
                outputs[name] = {"embedding": first[module.embedding], **own}
            for key, steps in networks_of(module):
                weights[f"{name}.{key}" if name else key] = describe_weight(steps[0])
    return recurrent, outputs, weights


def check_plain(description: Mapping[str, Any], old: nn.Module) -> None:
    """Check a plain layer of torch. Of others, such as transformers' Conv1D, the file's tensors have the sizes."""
    if isinstance(old, (*EVERY_KIND, TensorLayer)):
        check_replaces(description, old, dtype=False)


def guards_of(model: Any, plain: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, Tensor]:
    """Return empty tensors by the names of the plain parameters that changed modules have not."""
    guards, own = {}, named(model)
    for name in names:
        with about_layer(name):
            if name not in plain:
                raise ValueError(f"{type(model).__name__} makes no such module, so it could not be loaded")
        for key, value in plain[name].state_dict().items():
            if key not in own[name].state_dict():
                guards[f"{name}.{key}"] = torch.empty(_empty(value.ndim), dtype=value.dtype)
    return guards


def _empty(ndim: int) -> list[int]:
    # transformers splits parameters of three axes, which hold experts, along the first one.
    return [1] * (ndim > 2) + [0] * (ndim - (ndim > 2))


def follow_ties(model: Any, swapped: bool) -> None:
    """Let ``tie_weights`` of a transformers model tie the parameters that it has now; all, if none is swapped.

    The model's class names parameters to tie. Weights that are networks have none of these names: layers share their
    modules or cores.
    """
    if (every := vars(model).pop(_TIES, None)) is not None:
        model._tied_weights_keys = every
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = dict(tensors)
    if swapped and isinstance(every := model._tied_weights_keys, Mapping):
        vars(model)[_TIES] = every

        def count(pattern: str) -> int:  # as transformers
            return sum(bool(re.search(f"^{pattern}", name)) for name in own)

        counts = {pair: (count(pair[0]), count(pair[1])) for pair in every.items()}
        model._tied_weights_keys = {
            pair[0]: pair[1]
            for pair, (targets, sources) in counts.items()
            if targets and sources and not targets % sources
        }
    ties = {name: other for name, other in model.all_tied_weights_keys.items() if name in own and other in own}
    expanded = model.get_expanded_tied_weights_keys(all_submodels=True)
    again = {name: other for name, other in expanded.items() if own[name] is own[other]}
    model.all_tied_weights_keys = ties | again


_TIES = "_ties_of_the_plain_model"
