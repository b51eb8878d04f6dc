"""Distillation: a trained network whose outputs another one learns to give (Hinton, Vinyals and Dean 2015)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.errors import ConfigError
from benchmarks.common.trained_networks import read_network
from benchmarks.training.config import Config
from benchmarks.training.data.on_disk import normalise

TEMPERATURE = 4.0  # of the softmax
Normalise = Callable[[Tensor], Tensor]


class Teacher:
    """A trained network whose outputs another one learns to give.

    Args:
        network: the trained network.
        normalise: maps bytes of images to the network's inputs; None: as for the network that learns.
        share: weight of the distance between the outputs in the loss. The rest is that of the labels.
    """

    def __init__(self, network: nn.Module, normalise: Normalise | None, share: float) -> None:
        self.network, self.normalise, self.share = network.eval(), normalise, share

    def loss(self, logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            logits: the learning network's outputs, (images, classes).
            wanted: the trained network's outputs, of the same shape.
            labels: the loss of the labels, a scalar.
        """
        ours, theirs = ((x / TEMPERATURE).log_softmax(1) for x in (logits, wanted))
        near = F.kl_div(ours, theirs, log_target=True, reduction="sum") / len(logits)
        return (1 - self.share) * labels + self.share * TEMPERATURE**2 * near


def read_teacher(path: Path, share: float, dataset: str, data: Any) -> Teacher:
    """Return the network of a checkpoint of this program, or of a file of weights of a CIFAR-10 ResNet.

    Args:
        path: the file. A checkpoint of a run with an average of weights gives the average.
        share: see Teacher.
        dataset: name of the data set to train on.
        data: the data set itself. A checkpoint's network gets its images as the network that learns does.

    Raises:
        ConfigError: the file holds neither, or its network is for other images or labels.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"teacher is {path}, which cannot be read: {reason}") from error
    if not isinstance(state, dict) or "config" not in state:
        network: Any = read_network(path)
        prepare: Normalise | None = normalise
        channels, labels = network.conv1.in_channels, network.linear.out_features
    else:
        known = {name: value for name, value in state["config"].items() if name in Config.__dataclass_fields__}
        config = Config(**known | {"teacher": None, "distil": Config.distil, "rank_schedule": None})
        if config.dataset != dataset:
            raise ConfigError(f"teacher is {path}, which was trained on {config.dataset}, not on {dataset}")
        if state.get("ranks"):
            raise ConfigError(f"teacher is {path}, whose ranks fell in training: that is not supported")
        channels, labels = data.channels, state["config"]["labels"]
        network, prepare = config.network(channels, labels), None
        try:
            network.load_state_dict(state["model"] | (state["average"] or {}))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"teacher is {path}, whose network does not fit these images: {reason}") from error
    if (channels, labels) != (data.channels, data.num_classes):
        raise ConfigError(
            f"teacher is {path}, for images of {channels} channels with {labels} labels; here they have "
            f"{data.channels} channels and {data.num_classes} labels"
        )
    return Teacher(network, prepare, share)
