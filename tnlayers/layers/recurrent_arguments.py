"""Checks of the arguments of recurrent layers: which weights are networks, with which ranks and factors."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tnlayers import validate
from tnlayers.formats.base import Format, checked_shape
from tnlayers.init.variance import FAN_MODES, PRESETS, Init
from tnlayers.spec.recurrence import KINDS, Recurrence, Weight

LIKE_TORCH = "torch"
"""Name of the default start: each gate of each weight has torch's standard deviation, 1 / sqrt(3 hidden_size)."""
_Factors = tuple[int, ...]


def plain_kinds(plain: Any, recurrence: Recurrence) -> frozenset[str]:
    """Return the kinds of weights that stay plain matrices, of those that the layer has.

    Raises:
        TypeError, ValueError: ``plain`` is no collection of kinds.

    Example:
        >>> plain_kinds(("hh", "hr"), Recurrence("LSTM", 4, 8))
        frozenset({'hh'})
    """
    if isinstance(plain, str) or not isinstance(plain, Collection):
        raise TypeError(f"plain is {plain!r}; it must be a collection of {', '.join(map(repr, KINDS))}")
    for kind in plain:
        validate.choice("plain", kind, KINDS)
    return frozenset(weight.kind for weight in recurrence.weights() if weight.kind in plain)


def ranks(rank: Any, recurrence: Recurrence, plain: Collection[str]) -> dict[str, Any]:
    """Return the rank of each weight that is a network, from one for all, or from a mapping of weights or their kinds.

    Raises:
        TypeError, ValueError: a key of such a mapping is no weight that is a network, or there is none.

    Example:
        >>> ranks({"hh": 2}, Recurrence("GRU", 4, 8), ("ih",))
        {'hh_l0': 2}
    """
    if rank is not None and all(weight.kind in plain for weight in recurrence.weights()):
        raise ValueError(f"rank is {rank!r}, but all weights are plain; it must be None")
    return by_weight("rank", rank, recurrence, plain)


def by_weight(name: str, given: Any, recurrence: Recurrence, plain: Collection[str]) -> dict[str, Any]:
    """Return an argument's value for each weight that is a network, from one for all or a mapping, as for ``ranks``.

    Weights that a mapping leaves out have None.

    Example:
        >>> by_weight("init", {"hh": "unit"}, Recurrence("GRU", 4, 8), ())
        {'ih_l0': None, 'hh_l0': 'unit'}
    """
    weights = [weight for weight in recurrence.weights() if weight.kind not in plain]
    names = {*KINDS, *(weight.name for weight in recurrence.weights())}
    if not isinstance(given, Mapping) or names.isdisjoint(given):  # a mapping of bonds is for all weights
        return {weight.name: given for weight in weights}
    accepted = [*dict.fromkeys(weight.kind for weight in weights), *(weight.name for weight in weights)]
    for key in given:
        validate.choice(f"a key of {name}", key, accepted)
    return {weight.name: given.get(weight.name, given.get(weight.kind)) for weight in weights}


def start(init: Any, recurrence: Recurrence) -> Init:
    """Return the checked initialisation of a weight; None: ``LIKE_TORCH``.

    Raises:
        TypeError, ValueError: ``init`` is neither an ``Init`` nor the name of one.

    Example:
        >>> start("torch", Recurrence("GRU", 4, 12)).std
        0.16666666666666666
    """
    if isinstance(init, str):
        validate.choice("init", init, (LIKE_TORCH, *FAN_MODES, *PRESETS))
    if init is None or init == LIKE_TORCH:
        return Init(std=1 / math.sqrt(3 * recurrence.hidden_size), exact="white")
    return Init.of(init)


class Factors:
    """Factors of the weights' columns and rows.

    Args:
        form: the format, which splits sizes that are not given.
        recurrence: the layer's arguments.
        in_shape, hidden_shape: factors of input_size and hidden_size, or None.
        plain: kinds of weights that are no networks.

    Raises:
        TypeError, ValueError: the factors do not fit, or no network would have them.

    Example:
        >>> from tnlayers.formats import TT
        >>> recurrence = Recurrence("GRU", 4, 8)
        >>> factors = Factors(TT(), recurrence, (2, 2), (4, 2), ())
        >>> [factors.of(weight) for weight in recurrence.weights()]
        [((2, 2), (12, 2)), ((4, 2), (12, 2))]
    """

    def __init__(
        self,
        form: Format,
        recurrence: Recurrence,
        in_shape: Sequence[int] | None,
        hidden_shape: Sequence[int] | None,
        plain: Collection[str],
    ) -> None:
        self.form, self.recurrence = form, recurrence
        self.first: _Factors | None = None
        self.hidden: _Factors | None = None
        if in_shape is not None:
            self.first = checked_shape("in_shape", in_shape, "input_size", recurrence.input_size)
            if "ih" in plain:
                raise ValueError(f"in_shape is {in_shape!r}, but the weights 'ih' are plain; it must be None")
        if hidden_shape is not None:
            self.hidden = checked_shape("hidden_shape", hidden_shape, "hidden_size", recurrence.hidden_size)
            if {weight.kind for weight in recurrence.weights()} <= {*plain}:
                raise ValueError(f"hidden_shape is {hidden_shape!r}, but all weights are plain; it must be None")

    def of(self, weight: Weight) -> tuple[_Factors, _Factors]:
        """Return the factors of a weight's columns and rows. The gates multiply the first factor of the rows."""
        hidden, recurrence = self.hidden, self.recurrence
        columns, rows = self.form.split(weight.inputs, weight.outputs, weight.gates)
        if weight.kind == "ih" and not weight.layer:
            columns = self.first or columns
        elif hidden and (weight.kind == "hr" or not recurrence.proj_size):
            columns = weight.inputs // recurrence.hidden_size * hidden[0], *hidden[1:]
        if hidden and weight.kind != "hr":
            rows = weight.gates * hidden[0], *hidden[1:]
        return columns, rows
