"""Distillation: a trained network whose outputs another one learns to give (Hinton, Vinyals and Dean 2015)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.errors import ConfigError
from benchmarks.common.trained_networks import network_of, read_state
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
    """Return a trained network as a teacher.

    Args:
        path: see read_trained.
        share: see Teacher.
        dataset: see read_trained.
        data: see read_trained.

    Raises:
        ConfigError: see read_trained.
    """
    try:
        return Teacher(*read_trained(path, dataset, data), share)
    except ConfigError as error:
        raise ConfigError(f"teacher is {path}: {error}") from error


def read_trained(path: Path, dataset: str, data: Any) -> tuple[nn.Module, Normalise | None]:
    """Return the network of a checkpoint of this program, or of a file of weights of a CIFAR-10 ResNet.

    Args:
        path: the file. A checkpoint of a run with an average of weights gives the average.
        dataset: name of the data set that the network will see.
        data: the data set itself.

    Returns:
        the network, and what maps bytes of images to its inputs; None: as `data` does.

    Raises:
        ConfigError: the file holds neither, or its network is for other images or labels.
    """
    state = read_state(path)
    if not isinstance(state, dict) or "config" not in state:
        network: Any = network_of(path, state)
        prepare: Normalise | None = normalise
        channels, labels = network.conv1.in_channels, network.linear.out_features
    else:
        known = {name: value for name, value in state["config"].items() if name in Config.__dataclass_fields__}
        config = Config(**known | {"teacher": None, "distil": Config.distil, "rank_schedule": None})
        if config.dataset != dataset:
            raise ConfigError(f"{path} was trained on {config.dataset}, not on {dataset}")
        if state.get("ranks"):
            raise ConfigError(f"the ranks of {path} fell in training: that is not supported")
        channels, labels = data.channels, state["config"]["labels"]
        network, prepare = config.network(channels, labels), None
        try:
            network.load_state_dict(state["model"] | (state["average"] or {}))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the network of {path} does not fit these images: {reason}") from error
    if (channels, labels) != (data.channels, data.num_classes):
        raise ConfigError(
            f"{path} is for images of {channels} channels with {labels} labels; here they have {data.channels} "
            f"channels and {data.num_classes} labels"
        )
    return network, prepare
