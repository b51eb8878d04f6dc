r"""Ranks of a whole model, lowered to a budget of parameters where the loss changes least.

A bond held at entry j contracts the network to a term :math:`W_j` of the kernel, in a basis in which the terms are
sorted by size and, in trees, orthogonal (``tnlayers.training.bonds.balancing``). Removing the term changes the loss by
:math:`-\langle g, W_j \rangle` to first order, where g is the kernel's gradient. In a trained model the mean of g is
about zero, and the second order decides. With the empirical Fisher matrix :math:`E[g g^T]` for the Hessian it is

.. math:: c_j = \tfrac12 \, E\big[\langle g, W_j \rangle^2\big],

with the mean over the batches. :math:`\langle g, W_j \rangle` follows from the gradient of one core that has the bond:
no dense kernel and no dense gradient is formed. A bond of any size needs one backward per batch, as all others.

The terms of a bond are removed from the smallest on, as truncation does. The next one is always taken from the bond,
of all layers, where the sum of the removed :math:`c_j` grows least per parameter that is saved. A bond that is larger
than the axes around it allow is cut for nothing.

Reference:
    LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, and Theis, Korshunova, Tejani, Huszar, "Faster gaze
    prediction with dense networks and Fisher pruning", 2018, for the sensitivity.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tnlayers import validate
from tnlayers.backend.observe import evaluating
from tnlayers.backend.optimizers import check_exchange
from tnlayers.backend.sharding import whole
from tnlayers.backend.wrappers import refuse_wrapped
from tnlayers.layers.base import TensorLayer
from tnlayers.training.bonds import balancing, homes, influence, largest_useful
from tnlayers.training.prune_report import PrunedLayer, PruneReport
from tnlayers.training.rank_regularisation import tensor_layers

Loss = Callable[[Any, Any], Tensor]


class _Pruned:
    """A layer whose ranks are being lowered: its network so far, and the cost of removing terms of each bond.

    Args:
        layer: the layer.
        optimizer: the optimizer if it holds the layer's cores.
    """

    def __init__(self, layer: TensorLayer, optimizer: Optimizer | None) -> None:
        self.layer, self.optimizer, self.network = layer, optimizer, layer.network
        self.values = layer._changeable(optimizer)
        self.bases = {bond: balancing(self.network, self.values, bond) for bond in layer.rank}
        self.costs = {bond: self.values[0].new_zeros(size) for bond, size in layer.rank.items()}
        self.left: dict[str, list[float]] = {}

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add the costs of a batch, from the gradients of the cores."""
        for bond, basis in self.bases.items():
            home = homes(self.network, bond)[0]
            gradient = whole(gradients[home]).to(self.values[home])
            derivatives = influence(self.network, bond, self.values[home], gradient, basis)
            self.costs[bond] += derivatives.square()

    def finish(self, count: int) -> None:
        """Take the mean over batches, and sort the costs by the order of removal: the last goes first."""
        for bond in self.costs:
            self.costs[bond] /= 2 * count
            if len(homes(self.network, bond)) != 2:  # its terms have no order by size
                self.costs[bond] = self.costs[bond].sort(descending=True).values
        self.left = {bond: costs.tolist() for bond, costs in self.costs.items()}

    def step(self) -> tuple[float, str] | None:
        """Return the least cost per saved parameter, and its bond; None if no bond can become smaller."""
        found = []
        for bond, costs in self.left.items():
            if len(costs) > 1:
                saved = self.network.num_params - self.network.resize({bond: len(costs) - 1}).num_params
                cost = costs[-1] if len(costs) <= largest_useful(self.network, bond) else 0.0
                found.append((cost / saved, bond))
        return min(found, default=None)

    def take(self, bond: str) -> int:
        """Remove a term, and return the number of parameters."""
        self.left[bond].pop()
        self.network = self.network.resize({bond: len(self.left[bond])})
        return self.network.num_params

    @property
    def sensitivity(self) -> float:
        """Sum of the costs of the removed terms."""
        return sum(float(costs[len(self.left[bond]) :].sum()) for bond, costs in self.costs.items())


def prune_ranks_(
    model: nn.Module,
    budget: float,
    batches: Iterable[Any],
    loss: Loss,
    *,
    include: str | Sequence[str] = ("*",),
    optimizer: Optimizer | None = None,
) -> PruneReport:
    """Lower the ranks of a model's tensor layers in place to a budget of parameters, where the loss changes least.

    On every batch the loss' gradient gives the sensitivity to each term of each bond: see
    ``tnlayers.training.prune_ranks``. Terms are then removed, the least sensitive per saved parameter first, until the
    budget is met, and ``layer.truncate_`` makes every layer's nearest kernel of its new ranks. So a model that was
    trained with ``rank_lasso`` loses the terms that became small. A model within the budget stays as it is.

    Gradients of parameters, flags and torch's random state on the CPU stay as they are. All layers are measured before
    the first is changed.

    Args:
        model: a tensor layer, or a module that holds some.
        budget: a float in (0, 1]: the share of the dense kernels' parameters that all cores together keep; an integer:
            their largest number.
        batches: whatever ``loss`` takes; some hundred samples in ten or more batches. It is read once.
        loss: called as ``loss(model, batch)`` with the model in eval mode; returns a scalar.
        include: a pattern of the layers' names, or several, of which the budget is; see ``TensorizeConfig``,
            which takes a sequence only.
        optimizer: the optimizer that holds the cores; it gets the new ones, as in ``truncate_``.

    Returns:
        PruneReport: ranks, parameters, sensitivity and error of every layer.

    Raises:
        TypeError: an argument is of another type, the loss is no scalar tensor, or cores are parametrized.
        ValueError: the budget is out of range, or the smallest ranks have more parameters; there is no tensor layer, a
            pattern matches none, or two share a core; the model is wrapped for distributed data parallelism; there is
            no batch, or none reaches a layer; or a core, the loss or a gradient is not finite.

    Warns:
        UserWarning: an optimizer holds the cores and is not given.

    Example:
        >>> import tnlayers
        >>> conv, linear = tnlayers.TTConv2d(8, 16, 3, rank=6), tnlayers.TuckerLinear(16, 4, rank=2)
        >>> model = nn.Sequential(conv, nn.Flatten(), linear)
        >>> batches = [(torch.randn(16, 8, 3, 3), torch.randint(4, (16,))) for _ in range(10)]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> report = prune_ranks_(model, 0.3, batches, loss)
        >>> report.params[1] <= 0.3 * (16 * 8 * 9 + 4 * 16), report["0"].after == dict(model[0].rank)
        (True, True)
    """
    layers = {name: layer for name, layer in tensor_layers(model, include).items() if layer.rank}
    refuse_wrapped(model, "prune its module, then wrap that")
    if not layers:
        raise ValueError("model has no tensor layer with a bond that could become smaller")
    limit = _limit(budget, layers)
    _check_sharing(layers)
    if not callable(loss):
        raise TypeError(f"loss is {loss!r}; it must be a function of the model and a batch")
    pruned = {name: _prepared(name, layer, optimizer) for name, layer in layers.items()}
    if optimizer is not None:
        check_exchange(optimizer, [core for layer in layers.values() for core in layer.cores])
    _measure(model, pruned, batches, loss)
    _choose(pruned, limit)
    return PruneReport(tuple(_truncated(name, each) for name, each in pruned.items()))


def _limit(budget: Any, layers: Mapping[str, TensorLayer]) -> int:
    """Return the budget as a number of parameters."""
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; a float is a share of the dense parameters and must be in (0, 1]")
        limit = int(budget * sum(layer.network.dense_params for layer in layers.values()))
    else:
        limit = validate.integer("budget", budget)
    least = sum(layer.network.resize(dict.fromkeys(layer.rank, 1)).num_params for layer in layers.values())
    if least > limit:
        raise ValueError(f"budget is {budget}, or {limit:,} parameters, but the smallest ranks have {least:,}")
    return limit


def _check_sharing(layers: Mapping[str, TensorLayer]) -> None:
    """Raise if two layers have a core in common."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for core in layer.cores:
            if (owner := owners.setdefault(id(core), name)) != name:
                raise ValueError(f"{name} shares a core with {owner}; their ranks can only change together")


def _prepared(name: str, layer: TensorLayer, optimizer: Optimizer | None) -> _Pruned:
    held = {id(core) for group in getattr(optimizer, "param_groups", ()) for core in group["params"]}
    try:
        return _Pruned(layer, optimizer if any(id(core) in held for core in layer.cores) else None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _measure(model: nn.Module, pruned: Mapping[str, _Pruned], batches: Iterable[Any], loss: Loss) -> None:
    """Find the costs of all terms, from the gradients on the batches."""
    cores = [core for each in pruned.values() for core in each.layer.cores]
    flags = [core.requires_grad for core in cores]
    frozen = [each.layer for each in pruned.values() if each.layer.frozen]  # a forward with gradients thaws them
    count, reached = 0, set()
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for core in cores:
                core.requires_grad_(True)
            for batch in batches:
                gradients = [*torch.autograd.grad(_loss(loss(model, batch)), cores, allow_unused=True)]
                count += 1
                for name, each in pruned.items():
                    here, gradients = gradients[: len(each.values)], gradients[len(each.values) :]
                    if any(gradient is not None for gradient in here):
                        reached.add(name)
                        each.add([value * 0 if g is None else g for value, g in zip(each.values, here, strict=True)])
    finally:
        for core, flag in zip(cores, flags, strict=True):
            core.requires_grad_(flag)
        for layer in frozen:
            layer._executor.frozen = True
    if not count:
        raise ValueError("batches is empty; it must hold a batch at least (a used generator holds none)")
    for name, each in pruned.items():
        if name not in reached:
            raise ValueError(f"no batch reaches {name}; leave it out by include")
        each.finish(count)
        if not all(math.isfinite(cost) for costs in each.left.values() for cost in costs):
            raise ValueError(f"a gradient of {name} is not finite on a batch")


def _loss(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"loss returned {shown}; it must return a tensor with one entry")
    if not value.requires_grad:
        raise ValueError("loss returned a tensor without a gradient; it must call the model, without no_grad")
    return value


def _choose(pruned: Mapping[str, _Pruned], limit: int) -> None:
    """Remove terms until the networks have at most ``limit`` parameters."""
    counts = {name: each.network.num_params for name, each in pruned.items()}
    steps = {name: step for name, each in pruned.items() if (step := each.step())}
    while sum(counts.values()) > limit:
        name = min(steps, key=lambda name: steps[name][0])
        counts[name] = pruned[name].take(steps.pop(name)[1])
        if step := pruned[name].step():
            steps[name] = step


def _truncated(name: str, each: _Pruned) -> PrunedLayer:
    layer, before, count = each.layer, dict(each.layer.rank), each.layer.network.num_params
    after = {bond: len(costs) for bond, costs in each.left.items()}
    error = layer.truncate_(after, optimizer=each.optimizer) if after != before else 0.0
    return PrunedLayer(name, before, after, (count, layer.network.num_params), each.sensitivity, error)
