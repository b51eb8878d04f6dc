"""Checks of a forward's input: it must be a tensor of the cores' dtype. Errors say what is accepted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnlayers.backend.torch_state import autocast_dtype


def check_tensor(layer: str, value: Any, name: str = "input") -> None:
    """Raise if an argument of a forward is not a tensor.

    Raises:
        TypeError: its type and what is accepted.

    Example:
        >>> check_tensor("CPConv2d", None)
        Traceback (most recent call last):
            ...
        TypeError: input is None; CPConv2d takes a torch.Tensor
    """
    if isinstance(value, Tensor) or hasattr(type(value), "__torch_function__"):  # as torch.fx proxies do
        return
    given = "None" if value is None else f"of type {type(value).__name__}"
    made = hasattr(value, "__array__") or isinstance(value, list | tuple)
    raise TypeError(f"{name} is {given}; {layer} takes a torch.Tensor" + ", as torch.as_tensor makes of it" * made)


def check_module(name: str, value: Any) -> nn.Module:
    """Return the value if it is a module.

    Raises:
        TypeError: the argument's name, its type and what is accepted.

    Example:
        >>> check_module("model", None)
        Traceback (most recent call last):
            ...
        TypeError: model is of type NoneType; it must be a torch.nn.Module
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a torch.nn.Module")
    return value


def check_not_distributed(model: Any) -> nn.Module:
    """Return the model if it is a module outside of a wrapper for many processes.

    Raises:
        TypeError: it is, or holds, a DistributedDataParallel or FullyShardedDataParallel; or it is no module.

    Example:
        >>> check_not_distributed(nn.ReLU())
        ReLU()
    """
    for name, module in check_module("model", model).named_modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "FullyShardedDataParallel":
            found = f"holds, as {name!r}," if name else "is"
            raise TypeError(
                f"model {found} a {type(module).__name__}, whose processes would differ; take its module, wrap after"
            )
    return model  # type: ignore[no-any-return]


def check_bias(bias: Tensor, channels: int) -> None:
    """Raise if a bias does not have the shape (channels,). Other shapes could be broadcast silently.

    Raises:
        ValueError: its shape and the one that it must have.
    """
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({channels},)")


def check_cores(cores: Sequence[Tensor]) -> None:
    """Raise if cores have several dtypes. Only some plans would combine these in one operation.

    Raises:
        RuntimeError: the dtypes and how to convert them.
    """
    dtype = cores[0].dtype
    for core in cores:
        if core.dtype is not dtype:
            several = ", ".join(sorted({str(each.dtype) for each in cores}))
            raise RuntimeError(f"cores have dtypes {several}; they need one: layer.to({dtype}) converts them all")


def check_dtypes(x: Tensor, held: torch.dtype, bias: Tensor | None) -> None:
    """Raise if dtypes differ, as torch's layers do; under autocast, if they differ after its casts.

    Raises:
        RuntimeError: the type of torch's own error, with the dtypes and how to convert them.

    Example:
        >>> check_dtypes(torch.ones(1), torch.float64, None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: input has dtype torch.float32, but the layer's cores have torch.float64; convert it with ...
    """
    cast = autocast_dtype(x.device.type)
    note = "" if cast is None else f" (autocast takes floating-point dtypes but torch.float64 to {cast})"

    def seen(dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a convolution gets."""
        return dtype if cast is None or not dtype.is_floating_point or dtype == torch.float64 else cast

    if bias is not None and seen(bias.dtype) != seen(held):
        raise RuntimeError(
            f"bias has dtype {bias.dtype}, but the layer's cores have {held}; they need one: layer.to({held}) converts "
            f"both{note}"
        )
    if seen(x.dtype) != seen(held):
        layer = f", or the layer with layer.to({x.dtype})" if x.is_floating_point() else ""
        raise RuntimeError(
            f"input has dtype {x.dtype}, but the layer's cores have {held}; convert it with input.to({held}){layer}"
            f"{note}"
        )


def check_indices(name: str, value: Tensor) -> None:
    """Raise unless a tensor holds indices.

    Raises:
        RuntimeError: the type of torch's own error, with the dtype and how to convert it.

    Example:
        >>> check_indices("input", torch.ones(1))
        Traceback (most recent call last):
            ...
        RuntimeError: input has dtype torch.float32; it must be torch.int64 or torch.int32: convert it with input.long()
    """
    if value.dtype not in (torch.int64, torch.int32):
        accepted = "it must be torch.int64 or torch.int32"
        raise RuntimeError(f"{name} has dtype {value.dtype}; {accepted}: convert it with {name}.long()")
