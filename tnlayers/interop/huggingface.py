"""Saving and loading of models with tensor layers by Hugging Face transformers."""

import sys
import warnings

from torch import nn

from tnlayers.backend.input_checks import check_module
from tnlayers.interop.transformers_quantizer import attach, detach, foreign, has_layers, pretrained, registered


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
        >>> import tempfile, torch, transformers  # pip install 'tnlayers[transformers]'
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
    registered()
    if model is None:
        return
    check_module("model", model)
    found = [*pretrained(model)]
    if not found:
        raise ValueError(f"model is {type(model).__name__}; it must be, or hold, a transformers.PreTrainedModel")
    for each in found:
        if method := foreign(each):
            raise ValueError(f"model has a {type(each).__name__} that is quantized by {method}; it must not be")
        attach(each)


def follow(model: nn.Module) -> None:
    """Keep the quantizers of the transformers models in a module in step with the layers that they have now.

    A model with tensor layers gets one, which does nothing before the model is saved. A model without loses it.

    Warns:
        UserWarning: a model that will be saved without descriptions, and why.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return  # so there is no such model
    found = [*pretrained(model)]
    for each in found:
        if not has_layers(each):
            detach(each)
        elif method := foreign(each):
            warnings.warn(
                f"{type(each).__name__} is quantized by {method}, so save_pretrained does not describe its tensor "
                "layers; use tnlayers.save_tensorized",
                stacklevel=4,
            )
        else:
            attach(each)
    configs = sys.modules["transformers.configuration_utils"].PreTrainedConfig
    if not found and isinstance(getattr(model, "config", None), configs) and has_layers(model):
        warnings.warn(
            f"{type(model).__name__} is a part of a transformers model, whose save_pretrained does not know of the new "
            "layers; call tnlayers.register_with_transformers(model) with the whole model",
            stacklevel=4,
        )
