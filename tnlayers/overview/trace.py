"""What the rules for problems know of a run: its calls, their names, and which layers are zero or off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import KINDS
from tnlayers.overview.moments import INPUT, OUTPUT, Call


@dataclass
class Trace:
    """A run of a model.

    Attributes:
        calls: in the order of the run.
        names: of the calls.
        kernels: ratios of tensor layers, see ``kernel_ratio``.
        loss: value of the loss, if there is one.
        hint: factor of a kernel's variance that may be the cause of a problem.
        zero: modules whose weight is zero.
        off: kernels that are off by more than ``hint``.
        layers: numbers of the calls of weight layers that are not zero, and whose input is not.
    """

    calls: Sequence[Call]
    names: Sequence[str]
    kernels: Mapping[nn.Module, float | None]
    loss: float | None
    hint: float
    zero: set[nn.Module] = field(init=False)
    off: dict[nn.Module, float] = field(init=False)
    layers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.zero = {module for module in {call.module for call in self.calls} if _is_zero(module)}
        self.zero |= {module for module, ratio in self.kernels.items() if ratio == 0}
        self.off = {
            module: ratio
            for module, ratio in self.kernels.items()
            if ratio is not None and outside(ratio, self.hint) and module not in self.zero
        }
        layers = [k for k, call in enumerate(self.calls) if weighted(call.module) and call.module not in self.zero]
        self.layers = [k for k in layers if square(self.calls[k], INPUT) and square(self.calls[k], OUTPUT) is not None]


def weighted(module: nn.Module) -> bool:
    """Return whether a module is a convolution, linear or tensor layer."""
    return isinstance(module, (*KINDS, TensorLayer))


def outside(ratio: float, limit: float) -> bool:
    """Return whether a ratio is below one over a limit, or above it."""
    return not 1 / limit <= ratio <= limit


def square(call: Call, side: str) -> float | None:
    """Return a second moment if all entries are finite."""
    here = call.moments.get(side)
    return None if here is None or here.not_finite else here.square


def zero_cores(module: nn.Module) -> int:
    """Return the number of a tensor layer's cores that are zero; 0 for other modules.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPLinear(4, 4, rank=2)
        >>> tnlayers.scale_residual_(nn.ModuleList([layer]), "0", 0)
        ['0']
        >>> zero_cores(layer)
        1
    """
    return sum(not bool(core.any()) for core in module._listed()) if isinstance(module, TensorLayer) else 0


def _is_zero(module: nn.Module) -> bool:
    """Return whether a module's weight is zero, or a gain or scale that it multiplies it by."""
    weights = [weight for name, weight in module._parameters.items() if weight is not None and "bias" not in name]
    return any(not bool(weight.any()) for weight in weights)
