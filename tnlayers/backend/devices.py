"""What kind of device this machine has, and its name."""

import platform
import re
from functools import cache
from pathlib import Path

import torch


def kind_of(device: str) -> str:
    """Return the kind of a device type, by which rate tables are named: a CPU's has its instruction set.

    The meta device has no speed. Plans for it are those of this machine's CPU.

    Example:
        >>> kind_of("cuda"), kind_of("cpu").startswith("cpu "), kind_of("meta") == kind_of("cpu")
        ('cuda', True, True)
    """
    if device not in ("cpu", "meta"):
        return device
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu {platform.machine().lower() or 'default' if instructions == 'default' else instructions}"


def file_words(*words: str) -> str:
    """Return words as a part of a file's name.

    Example:
        >>> file_words("cpu avx512", "Some(R) CPU @ 2.0GHz", "float32")
        'cpu-avx512-some-r-cpu-2-0ghz-float32'
    """
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def name_of(device: str) -> str:
    """Return the name of this machine's device of a type: the processor's model, or the GPU's."""
    if device == "cuda" and torch.cuda.is_available():
        return " ".join(torch.cuda.get_device_name().split())
    return _processor() if device in ("cpu", "meta", "mps") else device


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return " ".join(next(models, platform.processor() or platform.machine() or "unknown").split())
