"""Base of recurrent layers: construction, start, conversion from and to torch's layers, attributes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.sharding import place, whole
from tnlayers.execution.attributes import from_constructor
from tnlayers.fitting.cuts import by_rule
from tnlayers.formats.base import Format
from tnlayers.init.draw import uniform
from tnlayers.init.gates import equal_gates
from tnlayers.init.like import LIKE, like
from tnlayers.layers import core_memory
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.computed_weight import refusal
from tnlayers.layers.has_format import HasFormat
from tnlayers.layers.recurrent_arguments import Factors, by_weight, plain_kinds, ranks, start
from tnlayers.layers.recurrent_fields import fixed_field, settable_field, warn_of_dropout
from tnlayers.layers.recurrent_forward import RunsRecurrence
from tnlayers.layers.registry import layer_class
from tnlayers.spec.recurrence import Recurrence


class TensorRecurrent(HasFormat, RunsRecurrence):
    """Base of recurrent layers whose weights are tensor networks.

    ``TensorLSTM``, ``TensorGRU`` and ``TensorRNN`` say more, and have examples.

    The weight ``weight_ih_l0`` of torch's layer is held by the layer ``ih_l0``, a ``TensorLinear`` of the format, and
    so on; its rows are gate after gate. The biases are parameters with torch's names.

    Args:
        input_size, hidden_size and so on: torch's arguments, as ``dense_type`` takes them; ``device`` and ``dtype``.
        rank, in_shape, hidden_shape, plain, init, strategy, memory: by name; see ``TensorLSTM``.
        **options: the format's own.

    Attributes:
        recurrence: the checked arguments of torch's layer.
        parts: the layers that hold the weights, by name.
        format: the format, with its options.

    Shape:
        As torch's layer, packed sequences included.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value, and what is accepted.
    """

    format: Format = from_constructor("format")
    network_arguments = "rank, in_shape, hidden_shape, plain, init, strategy, memory"
    dense_name = "recurrent"
    cell: ClassVar[str]
    """'LSTM', 'GRU' or 'RNN'."""
    own: ClassVar[tuple[str, ...]]
    """Names of torch's arguments except device and dtype."""

    input_size = fixed_field("input_size")
    hidden_size = fixed_field("hidden_size")
    num_layers = fixed_field("num_layers")
    bias = fixed_field("bias")
    bidirectional = fixed_field("bidirectional")
    batch_first = settable_field("batch_first")
    dropout = settable_field("dropout")

    def _build(
        self,
        recurrence: Recurrence,
        device: Any,
        dtype: torch.dtype | None,
        rank: Any,
        in_shape: Sequence[int] | None,
        hidden_shape: Sequence[int] | None,
        plain: Collection[str],
        init: Any,
        options: dict[str, Any],
        **others: Any,
    ) -> None:
        """Make the weights' layers and the biases."""
        form = self._format(options)
        super().__init__()
        self.__dict__["recurrence"] = recurrence
        warn_of_dropout(recurrence)
        self.__dict__["format"] = form
        matrices = plain_kinds(plain, recurrence)
        sizes_of_bonds = ranks(rank, recurrence, matrices)
        factors = Factors(form, recurrence, in_shape, hidden_shape, matrices)
        starts = by_weight("init", init, recurrence, matrices)
        where = {"device": device, "dtype": dtype}
        linear: Any = layer_class(type(form), nn.Linear)
        for weight in recurrence.weights():
            sizes = weight.inputs, weight.outputs
            if weight.kind in matrices:
                self.add_module(weight.name, nn.Linear(*sizes, bias=False, **where))
                continue
            columns, rows = factors.of(weight)
            own = {"rank": sizes_of_bonds[weight.name], "in_shape": columns, "out_shape": rows}
            own["init"] = start(starts[weight.name], recurrence)
            self.add_module(weight.name, linear(*sizes, bias=False, **where, **own, **others, **options))
        if not [*self._tensor_parts()]:
            for name, value in others.items():
                setattr(self, name, value)  # which checks it
        for name in recurrence.biases():
            entries = torch.empty(recurrence.gates * recurrence.hidden_size, **where)
            self.register_parameter(name, nn.Parameter(entries))
        self._finish()

    def reset_parameters(self) -> None:
        """Draw all weights and biases anew: each weight by its layer's ``init``, with equal gates, as when made."""
        for part in self.parts.values():
            part.reset_parameters()  # type: ignore[operator]
        self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """Draw plain weights and biases as torch does, and scale the gates of drawn cores."""
        parameters = dict(self.named_parameters(recurse=False))
        for weight in self.recurrence.weights():
            part: Any = self.parts[weight.name]
            if not isinstance(part, TensorLayer):
                parameters[weight.name] = part.weight
            elif weight.gates > 1 and part.init.exact and not part.cores[0].is_meta and _divides(part, weight.gates):
                cores = [whole(core) for core in part.cores]
                part._assign(equal_gates(part.network, cores, weight.gates, part.variance.weight_std))
        for parameter in parameters.values():
            if not parameter.is_meta:
                parameter.copy_(place(uniform(parameter, 1 / math.sqrt(self.hidden_size)), parameter))

    def flatten_parameters(self) -> None:
        """Do nothing: torch's method packs its parameters for cuDNN, and here each forward packs its weights."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Weights and biases of each layer and direction, as ``torch.nn.RNNBase``; the weights are contracted."""
        r = self.recurrence
        groups = [[weight.name for weight in r.direction(*each)] for each in r.stack()]
        kinds = ("weight", "bias") if r.bias else ("weight",)
        return [
            [getattr(self, f"{kind}_{name}") for kind in kinds for name in names[:2]]
            + [getattr(self, f"weight_{name}") for name in names[2:]]
            for names in groups
        ]

    def __getattr__(self, name: str) -> Any:
        """Return a contracted weight by torch's name."""
        if name.startswith("weight_") and name.removeprefix("weight_") in self.__dict__.get("_modules", ()):
            return self._modules[name.removeprefix("weight_")].weight  # type: ignore[union-attr]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(name, f"layer.{name} = ...")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as ``nn.Module`` does; raise for a weight, which the layer would not use."""
        self._refuse(name, f"register_parameter({name!r}, ...)")
        super().register_parameter(name, param)

    def _refuse(self, name: str, tried: str) -> None:
        part = name.removeprefix("weight_")
        if part != name and part in self.__dict__.get("_modules", ()):
            raise AttributeError(refusal(tried, f"layer.{part}.set_weight_(W) fits its cores to a matrix W"))

    @classmethod
    def _arguments(cls, layer: Any) -> dict[str, Any]:
        """Return the arguments of a layer, ours or torch's, without device and dtype."""
        return {name: getattr(layer, name) for name in cls.own}

    @classmethod
    def _resolved(cls, given: Mapping[str, Any], dense: Any, name: str) -> dict[str, Any]:
        """Return keyword arguments with an ``init`` of 'like' replaced by that of each weight."""
        if given.get("init") != LIKE:
            return dict(given)
        recurrence = Recurrence(cls.cell, **cls._arguments(dense))
        plain = plain_kinds(given.get("plain", ()), recurrence)
        weights = [weight.name for weight in recurrence.weights() if weight.kind not in plain]
        sizes = {each: like(getattr(dense, f"weight_{each}"), f"{name}'s {each}") for each in weights}
        return {**given, "init": {each: replace(size, exact="white") for each, size in sizes.items()}}

    @classmethod
    def from_dense(cls, dense: nn.Module, *, rank: Any = None, decompose: bool = True, **kwargs: Any) -> Self:
        """Return a tensor layer for torch's, with its arguments, device, dtype, biases and training flag.

        Args:
            dense: a layer of ``dense_type``; subclasses are refused, since they may do more.
            rank: as for the class; ``"vbmf"``, for all weights or in the mapping, finds the ranks of a weight in its
                unfoldings.
            decompose: fit the cores to the layer's weights, or else draw them.
            **kwargs: the class' other keyword arguments: in_shape, hidden_shape, plain, init and so on.

        Returns:
            TensorRecurrent: a new layer of this class. ``dense`` stays as it is.

        Raises:
            TypeError: ``dense`` has another type.
            ValueError: ``decompose`` or "vbmf" for weights without values (meta device); or ``moments`` is given: each
                weight has inputs of its own.
        """
        if kwargs.pop("moments", None) is not None:
            raise ValueError(
                "moments is given, but each weight of a recurrent layer has inputs of its own; it must be None: "
                "layer.ih_l0.set_weight_(W, moments=...) fits one weight"
            )
        if type(dense) is not cls.dense_type:
            raise TypeError(
                f"{cls.dense_name} is {type(dense).__name__}; {cls.__name__}.from_{cls.dense_name} takes an "
                f"nn.{cls.dense_type.__name__}"
            )
        first: Any = dense.weight_ih_l0
        if validate.boolean("decompose", decompose) and first.is_meta:
            raise ValueError(
                f"decompose is True, but {cls.dense_name} is on the meta device and has no values; pass decompose=False"
            )
        kwargs = cls._resolved(kwargs, dense, cls.dense_name)
        device = "meta" if decompose else first.device  # the cores of a fit need not be drawn first
        make: Any = cls
        if isinstance(rank, str) or (
            isinstance(rank, Mapping) and any(isinstance(each, str) for each in rank.values())
        ):
            draft: Self = make(**cls._arguments(dense), device="meta", **kwargs)
            rank = ranks(rank, draft.recurrence, plain_kinds(kwargs.get("plain", ()), draft.recurrence))
            for name in [name for name, each in rank.items() if isinstance(each, str)]:
                held: Any = draft.parts[name]
                rank[name] = by_rule(held.network, [*held.rank], getattr(dense, f"weight_{name}"), rank[name])
        layer: Self = make(**cls._arguments(dense), device=device, dtype=first.dtype, rank=rank, **kwargs)
        if decompose:
            for held in layer._tensor_parts():
                core_memory.check(type(held).__name__, held.network, held.rank, first)
            layer.to_empty(device=first.device)
        part: Any
        for name, part in layer.parts.items():
            source = getattr(dense, f"weight_{name}")
            part.requires_grad_(source.requires_grad)
            if not isinstance(part, TensorLayer):
                part.weight.data.copy_(source.detach())
            elif decompose:
                part.set_weight_(source)
        _copy_biases(dense, layer)
        return layer

    def to_dense(self) -> Any:
        """Return torch's plain layer with the same function, on the same device."""
        like, arguments = self._like(), self._arguments(self)
        quiet = arguments | {"dropout": 0.0}  # torch warns again of a dropout without effect
        dense = self.dense_type(**quiet, device="meta", dtype=like.dtype).to_empty(device=like.device)
        dense.dropout = arguments["dropout"]
        part: Any
        for name, part in self.parts.items():
            target = getattr(dense, f"weight_{name}")
            weight = part._kernel() if isinstance(part, TensorLayer) else part.weight
            target.data.copy_(weight.detach())
            target.requires_grad_(any(parameter.requires_grad for parameter in part.parameters()))
        _copy_biases(self, dense)
        return dense

    def extra_repr(self) -> str:
        """Return torch's fields, without defaults as there. The weights' layers follow in lines of their own."""
        shown = [f"{self.input_size}, {self.hidden_size}"]
        defaults = Recurrence(self.cell, self.input_size, self.hidden_size)
        own = {name: getattr(self, name) for name in self.own[2:]}
        shown += [f"{name}={value!r}" for name, value in own.items() if value != getattr(defaults, name)]
        return ", ".join(shown)


def _divides(part: TensorLayer, gates: int) -> bool:
    return part.network.sizes[part.network.outputs[0]] % gates == 0


@torch.no_grad()
def _copy_biases(source: Any, target: Any) -> None:
    for name, bias in source.named_parameters(recurse=False):
        if name.startswith("bias_"):
            own = getattr(target, name)
            own.copy_(place(whole(bias), own))
            own.requires_grad_(bias.requires_grad)
    target.train(source.training)
