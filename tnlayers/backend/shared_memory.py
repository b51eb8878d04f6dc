"""Detection of tensors that share memory: one tensor, its views and transposes, overlapping parts of a storage."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor


class _Span(NamedTuple):
    """Range of bytes from a tensor's first to its last entry, and its address space."""

    space: str
    start: int
    end: int
    number: int
    tensor: Tensor


def sharing(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the sorted pairs of positions of tensors with a common entry, the smaller position first.

    Adjacent or interleaved tensors in one storage share nothing. Tensors without addresses, as on the meta device, are
    compared within their storages. A tensor made of others, such as a sharded one, is compared by these. A tensor
    without strides, such as a sparse one, shares only with itself.

    Example:
        >>> import torch
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
            yield from _spans(number, part) if isinstance(part, Tensor) else ()  # since torch 2.13, one is a mesh
        return
    try:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        # A fake tensor has no address, so data_ptr would raise; its storage is on the meta device.
        start = 0 if storage.device.type == "meta" else tensor.data_ptr()
        space = f"{storage.device}" if start else f"storage {storage._cdata}"
        start = start or tensor.storage_offset() * size
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, or lazy
        return
    if tensor.numel() and storage.nbytes():  # unsharded parameters free theirs and allocate it again
        yield _Span(space, start, start + length * size, number, tensor)


def _meet(one: _Span, other: _Span) -> bool:
    """Return whether two tensors with overlapping spans have a common byte."""
    spans = one, other
    sizes = [span.tensor.element_size() for span in spans]
    unit = math.gcd(one.start - other.start, *sizes)
    # They have if the distance of the starts is a sum of multiples of the strides, plus offsets within entries.
    terms = [(1, 1 - sizes[1] // unit, sizes[0] // unit - 1)]
    for span, size, sign in zip(spans, sizes, (1, -1), strict=True):
        for n, step in zip(span.tensor.shape, span.tensor.stride(), strict=True):
            last = sign * (n - 1)
            terms.append((step * size // unit, min(0, last), max(0, last)))
    terms = [term for term in terms if term[0] and term[1:] != (0, 0)]
    return _is_sum((other.start - one.start) // unit, sorted(terms, reverse=True))


def _is_sum(target: int, terms: Sequence[tuple[int, int, int]]) -> bool:
    """Return whether a number is a sum of steps, each times a factor from least to most; largest step first."""
    rests = [(0, 0, 0)]  # for each suffix of the terms: minimum and maximum sum, common divisor
    for step, least, most in reversed(terms):
        low, high, divisor = rests[-1]
        rests.append((low + least * step, high + most * step, math.gcd(divisor, step)))
    rests.reverse()

    @cache
    def search(k: int, left: int) -> bool:
        low, high, divisor = rests[k]
        if not low <= left <= high or (divisor and left % divisor):
            return False
        if k == len(terms):
            return True
        step, least, most = terms[k]
        low, high, _ = rests[k + 1]
        factors = range(max(least, -((high - left) // step)), min(most, (left - low) // step) + 1)
        return any(search(k + 1, left - factor * step) for factor in factors)

    return search(0, target)
