"""Recurrent layers of a model, each of whose weights becomes a network."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.tensorize.report import Replaced
from tnlayers.tensorize.sites import LayerSite


class RecurrentSite(LayerSite):
    """A recurrent layer. Its weights together are one row of the report."""

    measured = False

    def _weights(self, layer: Any) -> list[Tensor]:
        return [getattr(layer, name) for name in self.plain._parameters if name.startswith("weight")]

    @property
    def weight(self) -> nn.Parameter:
        """The entries of all weights, one after the other."""
        weights = self._weights(self.plain)
        entries = torch.cat([weight.detach().flatten() for weight in weights])
        return nn.Parameter(entries, any(weight.requires_grad for weight in weights))

    @property
    def plain(self) -> Any:
        """A layer of torch's own class with the same parameters; without a dropout that has no effect."""
        twin = super().plain
        twin.dropout = twin.dropout if twin.num_layers > 1 else 0.0  # new layers would warn of it
        return twin

    @property
    def leaving(self) -> list[Tensor]:
        """The weights."""
        own = self.module._parameters.items()
        return [each for name, each in own if name.startswith("weight") and each is not None]

    @property
    def layer(self) -> tuple[Any, dict[str, Any]]:
        """Class of the tensor layer, and its keyword arguments beside torch's."""
        cls, arguments = super().layer
        if arguments["init"] == Init():  # then gates start as torch's
            del arguments["init"]
        return cls, arguments

    def resolve(self) -> None:
        """Replace an ``init`` of 'like' in the settings by that of each weight."""
        given = {**self.settings["options"], "init": self.settings["init"]}
        cls = self._class(self.settings["format"])
        self.settings = {**self.settings, "init": cls._resolved(given, self.plain, "this layer")["init"]}

    def parts(self, draft: Any) -> Sequence[TensorLayer]:
        """Return the layers that hold the weights of a draft."""
        return [*draft._tensor_parts()]

    def fitted(self, plain: Any, moments: Tensor | None) -> Any:
        """Make the new layer with cores fitted to a plain layer."""
        cls, arguments = self.layer
        return cls.from_dense(plain, **arguments)

    def unfitted(self) -> Any:
        """Make the new layer on the meta device."""
        return self.make(self.settings["rank"])

    def fit(self) -> None:
        """Make the new layer with fitted cores."""
        self.new = self.fitted(self.plain, None)

    def distance(self) -> float:
        """Return the relative error of all weights together."""
        fine = torch.float32 if self.weight.device.type == "mps" else torch.float64
        old, new = (
            torch.cat([weight.detach().flatten().to(fine) for weight in self._weights(layer)])
            for layer in (self.plain, self.new)
        )
        return float((new - old).norm() / old.norm().clamp_min(torch.finfo(fine).tiny))

    def ranks(self) -> dict[str, int]:
        """Return the sizes of all bonds, by weight and bond."""
        parts = ((name, part) for name, part in self.new.parts.items() if isinstance(part, TensorLayer))
        return {f"{name}.{bond}": size for name, part in parts for bond, size in part.rank.items()}

    def put(self) -> list[Replaced]:
        """Put the new layer in the old one's places."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old layer has told if it is without effect
            self.new.dropout = self.module.dropout
        return super().put()
