"""Network of a tensor that is to be decomposed, and the result of a decomposition."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from tnlayers import validate
from tnlayers.fitting.cuts import by_rule
from tnlayers.formats import FORMATS, Einsum, Format
from tnlayers.formats.base import Shape, checked_shape
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import KERNEL_AXES
from tnlayers.spec.rank import Rank


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Cores that were fitted to a tensor.

    Attributes:
        network: axes of each core, and their sizes.
        cores: the cores, in the network's order, in float64.
        error: relative Frobenius norm of the difference, ``||tensor - fit|| / ||tensor||``.
        shape: shape of the tensor.

    Example:
        >>> import torch, tnlayers
        >>> print(tnlayers.decompose(torch.ones(4, 3, 2), "cp", rank=1))  # doctest: +ELLIPSIS
        Decomposition('i r, o r, w r', rank={'r': 1}, error=..., keep_ratio=0.375)
    """

    network: TensorNetwork
    cores: tuple[Tensor, ...] = field(repr=False)
    error: float
    shape: tuple[int, ...]

    def to_tensor(self) -> Tensor:
        """Contract the cores to a tensor of the original shape, in the cores' dtype. It is differentiable.

        Example:
            >>> import torch, tnlayers
            >>> tnlayers.decompose(torch.ones(4, 3, 2), "tt", rank=1).to_tensor().shape
            torch.Size([4, 3, 2])
        """
        return reconstruct(self.network, self.cores).reshape(self.shape)

    def __repr__(self) -> str:
        sizes = {bond: self.network.sizes[bond] for bond in self.network.bonds}
        keep = self.network.num_params / self.network.dense_params
        return f"{type(self).__name__}('{self.network}', rank={sizes}, error={self.error:.3g}, keep_ratio={keep:.3g})"


def network_of(
    tensor: Tensor,
    form: Any,
    rank: Rank | str | None,
    in_shape: Sequence[int] | None,
    out_shape: Sequence[int] | None,
    options: Mapping[str, Any],
) -> TensorNetwork:
    """Return the network for a tensor. ``tnlayers.decompose`` describes the arguments.

    Example:
        >>> import torch
        >>> network_of(torch.empty(8, 6, 3, 3), "tr", 2, None, None, {})
        TensorNetwork.parse('r0:2 i:6 r1:2, r1:2 h:3 w:3 r2:2, r2:2 o:8 r0:2')
        >>> network_of(torch.empty(5, 4, 3), "o1 a, a o2 b, b i", 2, None, None, {})
        TensorNetwork.parse('o1:5 a:2, a:2 o2:4 b:2, b:2 i:3')
    """
    if isinstance(form, TensorNetwork):
        given = {"rank": rank, "in_shape": in_shape, "out_shape": out_shape, **options}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but network is a TensorNetwork, which has all sizes")
        if tuple(tensor.shape) not in (form.dense_shape, form.shape(form.dense_axes)):
            raise ValueError(
                f"tensor has shape {tuple(tensor.shape)}; network '{form}' contracts to {form.dense_shape}"
            )
        return form
    known = _format(form, options)
    outputs, inputs, kernel = _shapes(tensor, known, in_shape, out_shape)
    network, sizes = known.build(inputs, outputs, kernel, 1 if isinstance(rank, str) else rank)
    if isinstance(rank, str):
        return network.resize(by_rule(network, [*sizes], tensor, rank))
    return network


def _format(form: Any, options: Mapping[str, Any]) -> Format:
    """Return the format of a name, a class or a text."""
    if isinstance(form, str) and form not in FORMATS and ("," in form or len(form.split()) > 1):
        form, options = Einsum, {"network": form, **options}
    if isinstance(form, str):
        form = FORMATS[validate.choice("network", form, [*_named(), "a network's text"])]
    if isinstance(form, Format) and not options:
        return form
    if not (isinstance(form, type) and issubclass(form, Format)) or (_has_text(form) and "network" not in options):
        raise TypeError(
            f"network is {form!r}; it must be a format's name ({', '.join(_named())}), a format, a network's text such "
            "as 'i r, r o', or a tnlayers.TensorNetwork"
        )
    return form.of(options, "decompose", "rank, in_shape, out_shape, moments, start, seed")


def _has_text(form: type[Format]) -> bool:
    """Return whether a format takes a network's text as its argument of this name, which is here the text itself."""
    return any(each.name == "network" for each in fields(form))


def _named() -> list[str]:
    return [name for name, form in FORMATS.items() if not _has_text(form)]


def _shapes(
    tensor: Tensor, known: Format, in_shape: Sequence[int] | None, out_shape: Sequence[int] | None
) -> tuple[Shape, Shape, Shape]:
    """Return the sizes of a tensor's output, input and kernel axes."""
    shape = tuple(tensor.shape)
    if isinstance(known, Einsum) and in_shape is None and out_shape is None:
        network = TensorNetwork.skeleton(known.network)
        a, b = len(network.outputs), len(network.inputs)
        if len(network.dense_axes) == len(shape):
            return shape[:a], shape[a : a + b], shape[a + b :]
    if len(shape) < 2:
        raise ValueError(f"tensor has shape {shape}; it must have at least two axes, (out, in, *kernel)")
    rest = math.prod(shape[1:])
    # Of many axes, or with factors of them all, those behind the first are factors of the input.
    whole = len(shape) - 2 > len(KERNEL_AXES)
    if isinstance(in_shape, Sequence):
        whole |= tuple(in_shape) == shape[1:] or math.prod(in_shape) == rest != shape[1]
    inner, kernel = (rest, ()) if whole else (shape[1], shape[2:])
    split = known.split(inner, shape[0], 1)
    inputs = shape[1:] if whole else split[0]
    if in_shape is not None:
        name = "the product of tensor's axes but the first" if whole else "tensor.shape[1]"
        inputs = checked_shape("in_shape", in_shape, name, inner)
    outputs = split[1] if out_shape is None else checked_shape("out_shape", out_shape, "tensor.shape[0]", shape[0])
    return outputs, inputs, kernel
