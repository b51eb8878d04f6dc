"""Wrappers for data parallelism, which hold on to the parameters that they were made with."""

from collections.abc import Sequence

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tnlayers.backend.optimizers import alive


def refuse_wrapped(model: nn.Module, advice: str) -> None:
    """Raise if a model is, or holds, such a wrapper. ``advice`` says what to do.

    Raises:
        ValueError: the wrapper's type, and the advice.

    Example:
        >>> refuse_wrapped(nn.Linear(1, 1), "swap the layers first, then wrap")
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model is wrapped in {type(module).__name__}, which holds on to the parameters it was made with; "
                f"{advice}"
            )


def refuse_held(parameters: Sequence[Tensor]) -> None:
    """Raise if a ``DistributedDataParallel`` that is in use holds one of these parameters, which are to be replaced.

    It would not synchronise what comes instead, and processes would differ. Without a process group, there is none.

    Raises:
        ValueError: there is one.

    Example:
        >>> refuse_held([nn.Parameter(Tensor(2))])
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    wanted = {*map(id, parameters)}
    if alive(DistributedDataParallel, lambda wrapper: any(id(each) in wanted for each in wrapper.parameters())):
        raise ValueError(
            "the layer is inside a DistributedDataParallel, which would not synchronise new cores; change the ranks "
            "first, then wrap (delete the old wrapper: model = model.module)"
        )
