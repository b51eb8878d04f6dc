"""Update of optimizers that were made before a swap."""

from itertools import zip_longest
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tnlayers.backend.optimizers import refuse_lbfgs
from tnlayers.tensorize.report import TensorizeReport


def remap_optimizer_(optimizer: Optimizer, report: TensorizeReport) -> int:
    """Replace swapped parameters in an optimizer that was made before the swap.

    In each parameter group, new parameters take the place of the weight that they replaced, or follow the model's order
    if the group did so. The groups and their settings stay the same objects, so learning-rate schedulers continue. The
    state of parameters that are still in the model, such as biases, is kept. The state of a replaced weight is dropped,
    since moments of the kernel's gradient do not apply to the cores: new parameters start without state, as in a new
    optimizer.

    Args:
        optimizer: any optimizer with torch's interface.
        report: result of ``tensorize_``, ``densify_`` or ``unfold_``.

    Returns:
        int: the number of replaced parameters.

    Raises:
        ValueError: the optimizer holds none of the replaced parameters, or is LBFGS; or the report is of a dry run.

    Example:
        >>> import torch, tnlayers
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> optimizer = torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1)
        >>> config = tnlayers.TensorizeConfig(decompose=False)
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # the optimizer holds a replaced parameter
        ...     report = tnlayers.tensorize_(model, config)
        >>> remap_optimizer_(optimizer, report), len(optimizer.param_groups[0]["params"])
        (1, 3)
    """
    if report.dry_run:
        raise ValueError("report is of a dry run, which replaced nothing")
    refuse_lbfgs(optimizer)
    before, after = ({place: k for k, place in enumerate(order)} for order in report._order)
    replaced = {id(old): each for each in report._replaced if (old := each.old()) is not None}
    count = 0
    for group in optimizer.param_groups:
        found: list[tuple[nn.Parameter, str]] = []
        places = [before.get(id(parameter), -1) for parameter in group["params"]]
        entries: Any = zip_longest(group["params"], group.get("param_names", ()), fillvalue="")
        for parameter, name in entries:
            here = replaced.get(id(parameter))
            count += here is not None
            if here is not None:
                optimizer.state.pop(parameter, None)
            path = name.removesuffix(here.name) if here else ""
            for new_name, new in (here.new if here else {name: parameter}).items():
                found.append((new, path + new_name))
        if places == sorted(places) and -1 not in places:  # in the model's order, so that a saved state can be loaded
            found.sort(key=lambda each: after[id(each[0])])
        group["params"][:] = [parameter for parameter, _ in found]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in found]
    if not count:
        raise ValueError("optimizer holds none of the parameters that were replaced")
    return count
