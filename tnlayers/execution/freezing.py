"""Freezing: inference with weights that are contracted once and cached."""

from types import TracebackType
from typing import Self

from torch import nn

from tnlayers.backend.input_checks import check_module
from tnlayers.execution.module import ExecutableModule


class Frozen:
    """Result of ``freeze_``. As a context manager, it thaws on exit the layers that ``freeze_`` froze.

    Attributes:
        layers: names of the frozen layers.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TTConv2d(8, 8, 3, rank=2), nn.ReLU()).eval()
        >>> with freeze_(model) as frozen:
        ...     print(frozen.layers, model[0].frozen)
        ('0',) True
        >>> model[0].frozen
        False
    """

    def __init__(self, layers: dict[str, ExecutableModule], new: dict[str, ExecutableModule]) -> None:
        self.layers, self._new = tuple(layers), tuple(new.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._new:
            layer._executor.thaw()

    def __repr__(self) -> str:
        return f"Frozen({len(self.layers)} layers)"


def freeze_(model: nn.Module) -> Frozen:
    """Cache the contracted weights of a model's tensor layers for inference, in place.

    By default every forward contracts the cores, so it sees every write to them. In a frozen layer, the first forward
    without gradients builds the weights, and later ones reuse them. This saves time for small inputs, such as a single
    image. The weights are rebuilt when autograd's version counter has changed or a core is another tensor. Other
    changes go undetected: writes into ``core.data``, through numpy, or by fused optimizers. Call ``freeze_`` again
    after those.

    ``model.train()``, or a forward that records gradients, thaws a layer. ``load_state_dict`` and ``to`` leave it
    frozen and drop its weights; copies are not frozen. Freezing does not change ``requires_grad``.

    The cache of a layer takes at most the memory of one dense kernel. Larger weights, and all weights of a layer with
    ``memory="low"``, are contracted in each forward. Compiled and traced forwards do not use the cache. Weights
    that ``parametrize_`` made networks of are not cached; ``torch.nn.utils.parametrize.cached()`` does that.

    Args:
        model: a module in eval mode that holds tensor layers, or is one.

    Returns:
        Frozen: an optional context manager. On exit it thaws the layers that were not frozen before.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no tensor layer that may cache weights, or one is in training mode.

    Example:
        >>> import torch, tnlayers
        >>> model = nn.Sequential(tnlayers.TTConv2d(16, 16, 3, rank=4), nn.ReLU()).eval()
        >>> with torch.no_grad(), freeze_(model) as frozen:
        ...     y = model(torch.ones(1, 16, 8, 8))
        >>> frozen.layers, model[0].frozen
        (('0',), False)
    """
    layers = _layers(model)
    kept = {name: layer for name, layer in layers.items() if layer.memory != "low"}
    if not kept:
        raise ValueError("model has only layers with memory='low', which keep nothing; set layer.memory = 'auto' first")
    for name, layer in kept.items():
        if layer.training:
            raise ValueError(
                f"{name or 'model'} is in training mode, where no weights are kept; call model.eval() first"
            )
    new = {name: layer for name, layer in kept.items() if not layer.frozen}
    for layer in kept.values():
        layer._executor.thaw()
        layer._executor.frozen = True
    return Frozen(kept, new)


def thaw_(model: nn.Module) -> None:
    """Unfreeze a model's tensor layers in place: every forward contracts the cores again.

    Args:
        model: a module that holds tensor layers, or is one.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no tensor layer.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.TTConv2d(16, 16, 3, rank=4).eval()
        >>> _ = freeze_(layer)
        >>> thaw_(layer)
        >>> layer.frozen
        False
    """
    for layer in _layers(model).values():
        layer._executor.thaw()


def _layers(model: nn.Module) -> dict[str, ExecutableModule]:
    check_module("model", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExecutableModule)}
    if not layers:
        raise ValueError(f"model has no tensor layer ({type(model).__name__})")
    return layers
