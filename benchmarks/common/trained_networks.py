"""Networks of results.csv, and trained networks from files of weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.errors import ConfigError
from benchmarks.common.families import CONVOLUTIONS, MODELS
from tnlayers.models import ResNet

CHANNELS, CLASSES, SIZE = 3, 10, 32


def trained(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of results.csv of trained CIFAR-10 networks that are compressed to a size, or dense."""
    return [row for row in rows if row["dataset"] == "cifar10" and row["ratio"] and row["accuracy"]]


def drawn(row: dict[str, str]) -> nn.Module:
    """Return the untrained network of a row."""
    conv, rank = CONVOLUTIONS[row["conv"]], {"rank": float(row["rank"])} if row["rank"] else {}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        network: nn.Module = MODELS[row["model"]](conv=partial(conv, **rank), in_channels=CHANNELS, num_classes=CLASSES)
    return network


def read_network(path: Path) -> nn.Module:
    """Return the ResNet of a file of weights."""
    return network_of(path, read_state(path))


def read_state(path: Path) -> Any:
    """Return what a file of weights, or a checkpoint, holds."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{path} cannot be read: {reason}") from error


def network_of(path: Path, state: Any) -> nn.Module:
    """Return the ResNet whose state a file holds."""
    try:
        state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
        blocks = {name.split(".")[1] for name in state if name.startswith("layer1.")}
        model = ResNet(6 * max(1, len(blocks)) + 2)
        model.load_state_dict(state)
    except Exception as error:  # it can be anything
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} holds no weights of a CIFAR-10 ResNet: {reason}") from error
    return model.eval()
