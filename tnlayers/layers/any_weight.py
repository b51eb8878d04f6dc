"""A tensor network as the weight of any module, by ``torch.nn.utils.parametrize``.

``TensorWeight`` has the format, the variance and the fits of a layer, but no forward: the module that owns the weight
computes with it. ``NetworkWeight`` is the parametrization, which contracts the cores at each access.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnlayers import validate
from tnlayers.backend.views import inverse
from tnlayers.execution.rank_dropout import thinned
from tnlayers.formats import FORMATS, Format
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.rank import Rank

_AXIS = re.compile(r"[gio]\d*|[dhw]")


@dataclass(frozen=True)
class Layout:
    """How the axes of a weight become those of a kernel ``(groups * out, in, *taps)``.

    Args:
        shape: shape of the weight.
        axes: a name for each axis, separated by spaces: ``o`` an output, ``i`` an input, ``g`` a group, ``d``, ``h``
            and ``w`` taps of a convolution. Outputs, inputs and groups may be several, numbered, and are flattened in
            their order.

    Raises:
        TypeError, ValueError: ``axes`` does not name every axis, or lacks an output or an input.

    Example:
        >>> layout = Layout((8, 4, 6), "g o i")  # 8 maps from 6 to 4
        >>> layout.geometry.in_channels, layout.geometry.out_channels, layout.geometry.groups
        (48, 32, 8)
        >>> layout.to_kernel(torch.empty(8, 4, 6)).shape
        torch.Size([32, 6])
    """

    shape: tuple[int, ...]
    axes: str

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str):
            raise TypeError(f"axes is {self.axes!r}; it must be text with a name for each axis, such as 'o i'")
        names = self.axes.split()
        odd = [name for name in names if not _AXIS.fullmatch(name)]
        if odd or len({*names}) < len(names) or len(names) != len(self.shape):
            raise ValueError(
                f"axes is {self.axes!r}; it must name each of the {len(self.shape)} axes of shape {self.shape} once: "
                "o, i or g (with a number if there are several), d, h or w"
            )
        if missing := {"o", "i"} - {name[0] for name in names}:
            raise ValueError(f"axes is {self.axes!r}; it must have an output o and an input i, lacks {min(missing)}")

    @property
    def _order(self) -> tuple[int, ...]:
        names = self.axes.split()
        return tuple(sorted(range(len(names)), key=lambda k: ("goi".find(names[k][0]) % 4, names[k], k)))

    def _sizes(self, letters: str) -> tuple[int, ...]:
        names = self.axes.split()
        return tuple(self.shape[k] for k in self._order if names[k][0] in letters)

    @property
    def geometry(self) -> Geometry:
        """The linear map or convolution of such a kernel, of stride 1."""
        groups, outputs, inputs = (math.prod(self._sizes(letter)) for letter in "goi")
        return Geometry(groups * inputs, groups * outputs, self._sizes("dhw"), groups=groups)

    def to_kernel(self, weight: Tensor) -> Tensor:
        """Return the weight in the shape of the kernel."""
        return weight.permute(self._order).reshape(self.geometry.weight_shape)

    def to_weight(self, kernel: Tensor) -> Tensor:
        """Return the kernel in the shape of the weight."""
        return kernel.reshape([self.shape[k] for k in self._order]).permute(inverse(self._order)).contiguous()


class PlainWeight(nn.Module):
    """A dense kernel with its geometry: what ``TensorWeight`` is fitted to."""

    def __init__(self, geometry: Geometry, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.geometry, self.bias = geometry, None
        self.weight = nn.Parameter(torch.empty(geometry.weight_shape, device=device, dtype=dtype))


class TensorWeight(TensorLayer):
    """The network of a weight, as a layer without a bias and without a forward."""

    dense_name, dense_type = "weight", PlainWeight

    def __init__(
        self,
        geometry: Geometry,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank | None = None,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        init: str | Init = "fan_in",
        strategy: str = "auto",
        memory: str = "auto",
        **options: Any,
    ) -> None:
        """Make the network and draw its cores, as ``TensorLinear`` does."""
        super().__init__(
            geometry,
            bias=False,
            device=device,
            dtype=dtype,
            rank=rank,
            in_shape=in_shape,
            out_shape=out_shape,
            init=init,
            strategy=strategy,
            memory=memory,
            options=options,
        )

    @staticmethod
    def _arguments(layer: Any) -> dict[str, Any]:
        return {"geometry": layer.geometry}

    def over(self, cores: Iterable[Tensor], changed: Callable[[Self], None] | None = None) -> Self:
        """Return a layer of the same network and settings over other cores. Call ``changed`` when its ranks change."""
        twin = copy.copy(self)
        vars(twin).update(_modules={}, _changed=changed)
        twin.cores = nn.ParameterList(cores)
        return twin

    def _replace_cores(self, *args: Any) -> None:
        super()._replace_cores(*args)
        if (changed := vars(self).get("_changed")) is not None:
            changed(self)

    def _changeable(self, optimizer: Optimizer | None) -> list[Tensor]:
        if self.cores[0].is_meta:
            raise ValueError(
                "this layer describes the network of a weight, whose cores are parameters of the weight's module; "
                "tnlayers.prune_ranks_ of the module changes their ranks"
            )
        return super()._changeable(optimizer)


@cache
def weight_class(format: str) -> type[TensorWeight]:
    """Return the class of weights in a registered format.

    Raises:
        TypeError, ValueError: there is no such format.

    Example:
        >>> print(weight_class("tucker")(Geometry(6, 8, ()), rank=2).network)
        i ri, ri ro, ro o
    """
    form: type[Format] = FORMATS[validate.choice("format", format, FORMATS)]
    return new_class(f"{form.__name__}Weight", (TensorWeight,), {"format": form})


class NetworkWeight(nn.Module):
    """Parametrization that contracts cores to a weight; writing to the weight fits the cores to the value.

    Args:
        layer: the network with its cores, which become the parametrization's original tensors.
        layout: axes of the weight; None: the kernel itself.

    Attributes:
        layer: format, network, rank, geometry and variance, on the meta device: without cores.
    """

    untuned: ClassVar[str] = "the weight of a module that is no tensor layer, contracted as a whole"
    """Why ``autotune`` leaves it out."""
    layer: TensorWeight

    def __init__(self, layer: TensorWeight, layout: Layout | None = None) -> None:
        super().__init__()
        self.layout = layout
        self._cores: list[Tensor] | None = [core.detach() for core in layer.cores]
        # Not a registered module: its parameters are not the model's.
        vars(self)["layer"] = layer.to("meta")

    def forward(self, *cores: Tensor) -> Tensor:
        """Return the weight; in training, without the bond entries that dropout drops."""
        p = self.layer.rank_dropout if self.training else 0.0
        kernel = self.layer._kernel(thinned(self.layer.network, self.layer.rank, cores, p) if p else cores)
        return kernel if self.layout is None else self.layout.to_weight(kernel)

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        """Return cores for a weight: at first those that were given, later fitted ones."""
        cores, self._cores = self._cores, None
        if cores is not None:
            return cores
        layer = copy.deepcopy(self.layer).to_empty(device=weight.device).to(weight.dtype)
        layer.set_weight_(weight if self.layout is None else self.layout.to_kernel(weight))
        return [core.detach() for core in layer.cores]

    def extra_repr(self) -> str:
        """Return format, rank and keep ratio, as the layers."""
        return self.layer.extra_repr()
