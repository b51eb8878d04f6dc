"""Which tensors share memory: the same one, views and transposes of it, parts of one storage that overlap."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Span(NamedTuple):
    """The bytes from a tensor's first to its last entry, and the address space that they are counted in."""

    space: str
    start: int
    end: int
    number: int
    tensor: Tensor


def sharing(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the pairs of positions of tensors that have an entry in common, the smaller position first, in order.

    Tensors that lie side by side in one storage, or interleaved, share nothing. Tensors without addresses, as on the
    meta device, are compared within their storages. One that is made of others, as a sharded one, is where these are;
    one without strides, as a sparse one, shares with itself alone.

    Example:
        >>> base = torch.zeros(4, 4)
        >>> sharing([base[:2], base[2:], base.t(), base[:, ::2], base[:, 1::2], base])
        [(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (3, 5), (4, 5)]
    """
    pairs: set[tuple[int, int]] = set()
    same: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        others = same.setdefault(id(tensor), [])
        pairs.update((other, number) for other in others)
        others.append(number)
    spans = [span for number, tensor in enumerate(tensors) for span in _spans(number, tensor)]
    spans.sort(key=lambda span: span[:3])
    open_: list[_Span] = []
    for span in spans:
        open_ = [other for other in open_ if other.space == span.space and other.end > span.start]
        for other in open_:
            low, high = sorted((other.number, span.number))
            if low != high and (low, high) not in pairs and _meet(other, span):
                pairs.add((low, high))
        open_.append(span)
    return sorted(pairs)


def _spans(number: int, tensor: Any) -> Iterator[_Span]:
    if hasattr(tensor, "__tensor_flatten__"):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            yield from _spans(number, part) if isinstance(part, Tensor) else ()  # a mesh, since torch 2.13
        return
    try:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        # A fake tensor has no address, and says so by raising; its storage is on the meta device.
        start = 0 if storage.device.type == "meta" else tensor.data_ptr()
        space = f"{storage.device}" if start else f"storage {storage._cdata}"
        start = start or tensor.storage_offset() * size
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, or lazy
        return
    if tensor.numel() and storage.nbytes():  # those of unsharded parameters are freed and made again
        yield _Span(space, start, start + length * size, number, tensor)


def _meet(one: _Span, other: _Span) -> bool:
    """Whether two tensors, whose spans overlap, have a byte in common."""
    spans = one, other
    if all(span.tensor.numel() * span.tensor.element_size() == span.end - span.start for span in spans):
        return True
    unit = math.gcd(one.start - other.start, *(span.tensor.element_size() for span in spans))
    low = min(one.start, other.start)
    marks = torch.zeros((max(one.end, other.end) - low) // unit, dtype=torch.bool, device="cpu")

    def entries(span: _Span) -> Tensor:
        size = span.tensor.element_size() // unit
        steps = [step * size for step in span.tensor.stride()]
        shape = [n if step else 1 for n, step in zip(span.tensor.shape, steps, strict=True)]  # expanded: once
        return marks.as_strided((*shape, size), (*steps, 1), (span.start - low) // unit)

    entries(one).fill_(True)
    return bool(entries(other).any())
