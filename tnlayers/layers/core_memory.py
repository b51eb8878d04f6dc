"""The size of cores: their parameters against the dense kernel's, their bytes against the free memory."""

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

_WIDEST = 8  # bytes of an entry: cores are drawn in float64 at most
_MOST = 2**63 - 1  # bytes of a tensor
DRAWN = 5
"""Times the memory of the cores that it takes to draw them; 4.5 were seen."""
_ASKED = 2**20  # bytes of cores that the free memory is asked for: that takes a fifth of a small layer's construction
_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where Linux tells of control groups, of version 2 and 1: folder, limit, usage, what of that is only cache."""


class LargerThanDense(UserWarning):
    """A layer whose cores have more parameters than the dense kernel that they contract to."""


def check(name: str, network: TensorNetwork, rank: Any, like: Tensor) -> None:
    """Refuse cores that do not fit into memory; warn of more parameters than the dense kernel has.

    On the meta device, and among fake tensors, nothing is allocated, so there is no warning, and any size that a tensor
    can have is accepted.

    Args:
        name: of the layer's class.
        network: of the cores, which are yet to be made.
        rank: what the user asked for; None: nothing.
        like: a tensor of their device and dtype.

    Raises:
        ValueError: the cores are larger than the free memory, or one is larger than any tensor can be.

    Warns:
        LargerThanDense: told of the first line outside of this library that led here.

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
            stacklevel=_outside(),
        )


def refuse(name: str, network: TensorNetwork, rank: Any, like: Tensor) -> None:
    """Refuse cores that do not fit into memory; see ``check``."""
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
    """The bytes that can still be allocated on a device; infinity where nobody tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_machine(), _groups()) if device.type == "cpu" else math.inf


def _machine() -> float:
    """The main memory that can be had without swapping; where the system does not tell, all there is."""
    if found := re.search(r"^MemAvailable:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE):
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such function, other systems not these names
        return math.inf


def _groups() -> float:
    """What the control groups of this process, as containers have them, leave of their limits."""
    left = math.inf
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, own = line.split(":", 2)
        for controller in {*controllers.split(",")} & _GROUPS.keys():
            folder, limit, usage, cache = _GROUPS[controller]
            # Inside a container, the own group may be mounted as the root, whatever it is called outside.
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


def _outside() -> int:
    """How many frames above its caller the first one outside of this library is, as ``warnings.warn`` counts."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "tnlayers":
        level, frame = level + 1, frame.f_back
    return level
