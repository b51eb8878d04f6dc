"""Checks of the cores' size: parameters against the dense kernel's, bytes against the free memory."""

import math
import os
import re
import sys
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tnlayers.spec.network import TensorNetwork

_LIBRARIES = "tnlayers", "torch"  # no place of a user's code
_WIDEST = 8  # maximum bytes of an entry: cores are drawn in float64 at most
_MOST = 2**63 - 1  # maximum bytes of a tensor
DRAWN = 5
"""Peak memory of drawing cores, as a multiple of the cores' own; 4.5 was measured."""
_ASKED = 2**20  # minimum bytes of cores to query free memory, which takes a fifth of a small layer's construction
_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Linux's files for control groups, version 2 and 1: folder, limit, usage, and the reclaimable cache in the usage."""


class LargerThanDense(UserWarning):
    """Warning that a layer's cores have more parameters than its dense kernel."""


def check(name: str, network: TensorNetwork, rank: Any, like: Tensor) -> None:
    """Raise if the cores do not fit into memory; warn if they have more parameters than the dense kernel.

    On the meta device and for fake tensors nothing is allocated. So there is no warning, and any possible tensor size
    is accepted.

    Args:
        name: name of the layer's class.
        network: network of the cores, which do not exist yet.
        rank: the rank that the user gave, or None.
        like: a tensor with their device and dtype.

    Raises:
        ValueError: the cores need more than the free memory, or one is larger than any tensor can be.

    Warns:
        LargerThanDense: reported for the nearest calling line outside of this library.

    Example:
        >>> network = TensorNetwork.parse("i:8 r:1000000, o:8 r:1000000")
        >>> check("CPLinear", network, 10**6, torch.empty(0, device="meta"))
    """
    refuse(name, network, rank, like)
    if network.num_params > network.dense_params and not _virtual(like):
        warnings.warn(
            f"{_asked(rank)}; the cores of {name} have {network.num_params:,} parameters, but its dense kernel has "
            f"{network.dense_params:,}; choose {'' if rank is None else 'a smaller rank, or '}the plain layer",
            LargerThanDense,
            stacklevel=outside(),
        )


def refuse(name: str, network: TensorNetwork, rank: Any, like: Tensor) -> None:
    """Raise if the cores do not fit into memory; see ``check``."""
    if max(map(math.prod, network.core_shapes)) * _WIDEST > _MOST:
        raise ValueError(
            f"{_asked(rank)}; a core of {name} would have more entries than a tensor can; choose a smaller rank"
        )
    wanted = network.num_params * like.element_size()
    if wanted < _ASKED or _virtual(like):
        return
    if DRAWN * wanted > (available := free(like.device)):
        raise ValueError(
            f"{_asked(rank)}; the cores of {name} would take {wanted:,} bytes, and {DRAWN} times as many while they "
            f"are drawn, but {like.device} has {available:,} free; choose a smaller rank"
        )


def _virtual(like: Tensor) -> bool:
    return like.is_meta or isinstance(like, FakeTensor)


def _asked(rank: Any) -> str:
    return "rank is left out, which takes the smallest network" if rank is None else f"rank is {rank}"


def free(device: torch.device) -> float:
    """Return the bytes that can still be allocated on a device; infinity if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's cache, reusable
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_machine(), _groups()) if device.type == "cpu" else math.inf


def _machine() -> float:
    """Return the main memory available without swapping; if unknown, all main memory."""
    if found := re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE):
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows lacks the function, other systems these names
        return math.inf


def _groups() -> float:
    """Return the memory that the control groups of this process (as in containers) leave below their limits."""
    left = math.inf
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        for controller in {*controllers.split(",")} & _GROUPS.keys():
            folder, limit, usage, cache = _GROUPS[controller]
            # Inside a container, the process's group may be mounted as the root, under another name than outside.
            for group in (path := PurePosixPath(own), *path.parents):
                place = f"{folder}/{str(group).strip('/')}"
                most, used = _read(f"{place}/{limit}"), _read(f"{place}/{usage}")
                if most.isdecimal() and used.isdecimal():
                    found = re.search(rf"^{cache} (\d+)$", _read(f"{place}/memory.stat"), re.MULTILINE)
                    left = min(left, max(0, int(most) - int(used) + int(found[1] if found else 0)))
    return left


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def outside() -> int:
    """Return the ``stacklevel`` with which the caller's warning points to the first frame outside of both libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
