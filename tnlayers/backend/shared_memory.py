"""Which tensors share memory: the same one, views and transposes of it, parts of one storage that overlap."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

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
    sizes = [span.tensor.element_size() for span in spans]
    unit = math.gcd(one.start - other.start, *sizes)
    # A byte of one at an index is one of the other: a sum of multiples of the strides is the distance of the starts.
    terms = [(1, 1 - sizes[1] // unit, sizes[0] // unit - 1)]
    for span, size, sign in zip(spans, sizes, (1, -1), strict=True):
        for n, step in zip(span.tensor.shape, span.tensor.stride(), strict=True):
            last = sign * (n - 1)
            terms.append((step * size // unit, min(0, last), max(0, last)))
    terms = [term for term in terms if term[0] and term[1:] != (0, 0)]
    return _is_sum((other.start - one.start) // unit, sorted(terms, reverse=True))


def _is_sum(target: int, terms: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a number is a sum of multiples: of each step, the largest first, by a factor from least to most."""
    rests = [(0, 0, 0)]  # of the terms from each on: the least sum, the largest, and what divides them all
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
