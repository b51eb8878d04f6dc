r"""Regularisation of ranks: dropout of bond entries, and a lasso on them.

**Lasso.** If a bond is held at entry j, the network contracts to a term :math:`W_j` of the kernel. The penalty is
:math:`\sum_b \sum_j \|W_{b,j}\|_F` over all bonds b: a group lasso on the terms. It makes whole terms small, which
``prune_ranks_`` and ``layer.truncate_`` then remove at little loss. It depends on the kernel's terms alone. A factor
that moves from one core to another does not change it, as it would change a penalty of the cores' entries.

For the network ``i r, r o`` the smallest penalty among all factorisations of a kernel is its nuclear norm. For CP with
unit vectors and weights, it is the sum of the absolute weights.

tensorly-torch's lasso has one weight per entry in front of the cores, and penalises the sum of absolute weights. That
is the same number if all terms have norm one before they are weighted. But there the cores can grow as the weights
shrink, which lowers the penalty and changes nothing else.

Reference:
    Kolbeinsson, Kossaifi, Panagakis, Bulat, Anandkumar, Tzoulaki, Matthews, "Tensor Dropout for Robust Learning", IEEE
    JSTSP 2021, for dropout. Srebro and Shraibman, "Rank, Trace-Norm and Max-Norm", COLT 2005, for the nuclear norm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_module
from tnlayers.backend.name_patterns import check_pattern, matches
from tnlayers.backend.sharding import whole
from tnlayers.backend.torch_state import own_precision
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.networks import network_layers
from tnlayers.training.bonds import term_squares
from tnlayers.training.penalty import distinct


def rank_dropout_(model: nn.Module, p: float, *, include: str | Sequence[str] = ("*",)) -> list[str]:
    """Let training drop entries of bonds at random in tensor layers, in place.

    In each forward of training mode, every entry of every bond of ``layer.rank`` is dropped with probability p, but one
    at least is kept, and the kept ones are rescaled: the expected kernel is ``layer.weight``. Evaluation and
    ``layer.weight`` are not changed, and neither are parameters, names and optimizers. It is the attribute
    ``layer.rank_dropout``, which copies of a layer keep and files do not. Weights that ``parametrize_`` made networks
    of count as layers, by the weight's name, here and in ``rank_lasso`` and ``prune_ranks_``.

    Args:
        model: a tensor layer, or a module that holds some.
        p: probability in [0, 1); 0 ends the dropout.
        include: a pattern of the layers' names, or several; see ``TensorizeConfig``, which takes a sequence only.

    Returns:
        list[str]: names of the layers that were set.

    Raises:
        TypeError, ValueError: an argument is invalid, the model has no tensor layer, or a pattern matches none.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(tnlayers.TRConv2d(16, 16, 3, rank=4), nn.ReLU(), tnlayers.CPConv2d(16, 8, 3, rank=9))
        >>> rank_dropout_(model, 0.2), model[0].rank_dropout
        (['0', '2'], 0.2)
        >>> rank_dropout_(model, 0.0, include="2")
        ['2']
    """
    p = validate.fraction("p", p)
    layers = tensor_layers(model, include)
    for layer in layers.values():
        layer.rank_dropout = p
    return list(layers)


def rank_lasso(model: nn.Module, *, include: str | Sequence[str] = ("*",)) -> Tensor:
    """Return the sum of the norms of all terms of the bonds of a module's tensor layers: a lasso on ranks.

    Add ``strength * rank_lasso(model)`` to the loss, and afterwards call ``prune_ranks_``, or ``layer.truncate_`` with
    an ``error``. This module's docstring says what a term is. Layers with the same cores count once. The cost does not
    depend on the batch; it is about that of ``frobenius_penalty`` per bond.

    Args:
        model: a tensor layer, or a module that holds some.
        include: a pattern of the layers' names, or several; see ``TensorizeConfig``, which takes a sequence only.

    Returns:
        Tensor: a scalar on the first layer's device, in float32 or float64, differentiable in the cores. A term of norm
        zero has the gradient zero.

    Raises:
        TypeError, ValueError: an argument is invalid, the model has no tensor layer, or a pattern matches none.

    Example:
        >>> import tnlayers
        >>> layer = tnlayers.CPLinear(4, 4, rank=2, bias=False)
        >>> terms = [torch.outer(layer.cores[1][:, r], layer.cores[0][:, r]).norm() for r in range(2)]
        >>> torch.allclose(rank_lasso(layer), sum(terms))
        True
    """
    kernels = distinct(tensor_layers(model, include).values())
    first = kernels[0][1][0]
    total = torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
    for layer, cores in kernels:
        network = layer.network
        fine = torch.promote_types(cores[0].dtype, torch.float32)
        with own_precision(cores[0]):
            values = [whole(core).to(fine) for core in cores]
            for bond in layer.rank:
                squares = term_squares(network, values, bond)
                norms = squares.clamp(min=torch.finfo(fine).tiny).sqrt().where(squares > 0, 0)
                total = total + norms.sum().to(total.device)
    return total


def tensor_layers(model: nn.Module, include: str | Sequence[str]) -> dict[str, TensorLayer]:
    """Return the tensor layers whose names match one of the patterns, each once, by name.

    Weights that are networks count, as in ``network_layers``.

    Raises:
        TypeError: ``model`` is no module, or ``include`` is not of strings.
        ValueError: there is no tensor layer, or a pattern matches none.
    """
    every = network_layers(check_module("model", model))
    found = {name or type(layer).__name__: layer for name, layer in every.items()}
    if not found:
        raise ValueError("model has no tensor layer; tnlayers.tensorize_ makes some")
    patterns = [include] if isinstance(include, str) else [*include] if isinstance(include, Sequence) else []
    if not patterns:
        raise TypeError(f"include is {include!r}; it must be a pattern or a sequence of patterns")
    chosen: set[str] = set()
    for pattern in patterns:
        check_pattern("include", pattern)
        here = {name for name in found if matches(pattern, [name])}
        if not here:
            raise ValueError(f"include is {pattern!r}, which matches none of the tensor layers {', '.join(found)}")
        chosen |= here
    return {name: layer for name, layer in found.items() if name in chosen}
