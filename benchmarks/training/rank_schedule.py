"""Ranks that fall during training, from those that the network starts with to a budget of parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import tnlayers
from benchmarks.common.errors import ConfigError
from benchmarks.training.config import Config

BATCHES = 10
"""Number of batches on which the loss' sensitivity to ranks is measured."""
FALLING = 0.5
"""Share of the epochs in which ranks fall; in the others the network trains with its last ranks."""


class RankSchedule:
    """The share of the dense parameters that the cores keep, by epoch: a geometric fall, then constant.

    Args:
        config: the configuration of the run.
        model: its network, with the ranks that it starts with.

    Raises:
        ConfigError: the network starts with fewer parameters than it shall end with, or has more at ranks of one.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        assert config.rank_schedule is not None
        self.last, self.epochs, self.layers = config.rank_schedule, config.epochs, layers(model)
        dense = sum(layer.network.dense_params for layer in self.layers.values())
        self.first = sum(layer.network.num_params for layer in self.layers.values()) / dense
        if self.first < self.last:
            raise ConfigError(
                f"rank_schedule is {self.last:g}, but the network starts with {self.first:.3g} of the dense "
                "parameters: give a larger rank"
            )

        least = sum(layer.network.resize(dict.fromkeys(layer.rank, 1)).num_params for layer in self.layers.values())
        if int(self.last * dense) < least:
            raise ConfigError(
                f"rank_schedule is {self.last:g}, but ranks of one have {least / dense:.3g} of the dense parameters: "
                "give a larger share"
            )

    def keep(self, epoch: int) -> float:
        """Return the share at the end of an epoch, counted from 1."""
        way = min(1.0, epoch / max(1, round(FALLING * self.epochs)))
        return float(self.first ** (1 - way) * self.last**way)

    def lower(self, model: nn.Module, epoch: int, batches: Any, loss: Any, optimizer: Any) -> None:
        """Lower the ranks to the share of an epoch, where the loss changes least."""
        if epoch == 1 or self.keep(epoch) < self.keep(epoch - 1):
            tnlayers.prune_ranks_(model, self.keep(epoch), batches, loss, optimizer=optimizer)

    @property
    def ranks(self) -> dict[str, dict[str, int]]:
        """The present ranks, for a checkpoint."""
        return {name: dict(layer.rank) for name, layer in self.layers.items()}

    @torch.no_grad()
    def restore(self, ranks: Mapping[str, Mapping[str, int]], optimizer: torch.optim.Optimizer) -> None:
        """Give the layers the ranks of a checkpoint, whose values are loaded afterwards."""
        for name, layer in self.layers.items():
            if dict(layer.rank) != ranks[name]:
                for core in layer.cores:
                    core.zero_()  # a zero kernel needs no fit
                layer.truncate_(rank=ranks[name], optimizer=optimizer)


def layers(model: nn.Module) -> dict[str, tnlayers.TensorLayer]:
    """Return the tensor layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, tnlayers.TensorLayer)}
