"""A network in place of one parameter of any module."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from tnlayers.backend.input_checks import check_module
from tnlayers.init.like import LIKE, resolved
from tnlayers.init.variance import Init
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.registry import TABLES, layer_class
from tnlayers.layers.table_arguments import refuse, settled
from tnlayers.spec.rank import Rank
from tnlayers.tensorize.config import TensorizeConfig
from tnlayers.tensorize.finding import in_order, layers, note_holders
from tnlayers.tensorize.new_layers import choose_ranks, make_layers
from tnlayers.tensorize.refusals import weight_refusal
from tnlayers.tensorize.replace import put_in_place
from tnlayers.tensorize.report import TensorizeReport
from tnlayers.tensorize.sites import LayerSite, Swap
from tnlayers.tensorize.swappable import NETWORKS
from tnlayers.tensorize.weight_sites import WeightSite, is_matrix, networks


def parametrize_(
    module: nn.Module,
    name: str,
    format: str = "tr",
    *,
    rank: Rank | None = None,
    axes: str | None = None,
    decompose: bool = True,
    in_shape: Sequence[int] | None = None,
    out_shape: Sequence[int] | None = None,
    init: str | Init = "fan_in",
    **options: Any,
) -> TensorizeReport:
    """Make a tensor network of one parameter of a module, in place, for modules that no tensor layer replaces.

    The parameter becomes the contraction of cores, by ``torch.nn.utils.parametrize``. The module reads it as before,
    and trains the cores. This saves parameters, not time: the weight is contracted each time the module reads it, or
    once within ``torch.nn.utils.parametrize.cached()``. Assigning a tensor to it fits the cores again. ``densify_``
    makes a plain parameter of it, as ``torch.nn.utils.parametrize.remove_parametrizations`` does. As all parametrized
    modules, this one can be copied, but not pickled as a whole: save its ``state_dict``.

    Args:
        module: the module that holds the parameter, or one around it.
        name: name of the parameter, such as "in_proj_weight" or "encoder.0.in_proj_weight".
        format: name of a registered format.
        rank: as for the layers.
        axes: a name for each axis of the parameter, separated by spaces: "o" an output, "i" an input, "g" a map of its
            own for each entry, "d", "h" and "w" taps of a convolution; numbered, if there are several. None: for the
            weight of a convolution (also of a subclass) that convolution, else "o i" for two axes, "g o i" for three,
            such as experts, and "o i1 i2" for ``nn.Bilinear``.
        decompose: fit the cores to the parameter's values, or else draw them.
        in_shape: factors of all inputs of one map; None: the format's own.
        out_shape: factors of all outputs of all maps; None: the format's own.
        init: initialisation of drawn cores; "like": as large as the parameter's values. The weight of an embedding is
            drawn as by ``TTEmbedding``.
        options: the format's own arguments, by name.

    Returns:
        TensorizeReport: its row of this name, and one for each network before it. ``remap_optimizer_`` takes it.

    Raises:
        TypeError, ValueError: there is no such parameter, it has one axis, is computed already, or something else than
            the module holds it; it is the weight of an embedding with ``padding_idx``, ``max_norm`` or ``sparse``; or
            an argument is invalid.

    Warns:
        UserWarning: an optimizer holds the parameter; ``remap_optimizer_`` exchanges it.

    Example:
        >>> attention = nn.MultiheadAttention(16, 2)
        >>> report = parametrize_(attention, "in_proj_weight", "tucker", rank=0.25, decompose=False)
        >>> print(attention.parametrizations.in_proj_weight[0].layer.network, report["in_proj_weight"].params)
        i ri, ri ro, ro o (768, 182)
        >>> x = torch.randn(3, 1, 16)
        >>> attention(x, x, x)[0].shape
        torch.Size([3, 1, 16])
    """
    site = _site(module, name)
    site.axes = axes
    config = TensorizeConfig(format, rank=rank, options=options, decompose=decompose, init=init)
    shapes = {"in_shape": in_shape, "out_shape": out_shape}
    site.settings = (config.of([name]) or {}) | {key: shape for key, shape in shapes.items() if shape is not None}
    _settle_table(site)
    swap = Swap(module, config, sites=in_order(module, [*_before(module), site]), chosen=[site])
    note_holders(module, [site], lambda site: site.leaving)
    if refusal := weight_refusal(site):
        raise ValueError(f"{name} cannot become a network: {refusal}")
    site.settings = resolved(site.settings, site.plain, name)
    with torch.inference_mode(False), torch.no_grad():
        choose_ranks(swap)
        if site.reason:
            raise ValueError(f"{name} cannot become a network: {site.reason}")
        make_layers(swap)
    return put_in_place(swap)


def _before(module: nn.Module) -> list[LayerSite]:
    """Return the layers and weights of a module that are networks already, for the report."""
    found = [*layers(module, NETWORKS, "").values(), *networks(module)]
    for site in found:
        site.reason = f"a tensor {'network' if isinstance(site, WeightSite) else 'layer'} already"
    return found


def _settle_table(site: WeightSite) -> None:
    """Let the weight of an embedding be drawn as a table is; raise if the embedding treats some rows differently."""
    tables: Any = tuple(TABLES)
    if not isinstance(site.module, tables) or site.parameter != "weight":
        return
    kind = next(kind for kind in TABLES if isinstance(site.module, kind))
    index = site.module.padding_idx
    if index is not None:
        raise ValueError(
            f"{site.names[0]} cannot become a network: padding_idx is {index}, but rows of a network share the cores, "
            f"so row {index} would change with them; {layer_class(site.settings['format'], kind).__name__} keeps it "
            'constant (tensorize_ with kinds=("embedding",))'
        )
    try:
        refuse(site.module.max_norm, site.module.sparse)
        if site.settings["init"] != LIKE:
            site.settings["init"] = settled(site.settings["init"])
    except ValueError as error:
        raise ValueError(f"{site.names[0]} cannot become a network: {error}") from None


def _site(module: Any, name: Any) -> WeightSite:
    """Return the parameter of a name, checked."""
    check_module("module", module)
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be the name of a parameter")
    path, _, leaf = name.rpartition(".")
    owner = dict(module.named_modules()).get(path)
    known = {} if owner is None else owner._parameters | dict(getattr(owner, "parametrizations", {}).items())
    if owner is None or known.get(leaf) is None:
        every = [each for each, value in module.named_parameters() if value.dim() > 1]
        near = get_close_matches(name, every, n=3, cutoff=0.4) or every[:3]
        raise ValueError(f"name is {name!r}, which is no parameter of the {type(module).__name__}; near: {near}")
    for layer in module.modules():
        if isinstance(layer, TensorLayer) and owner in layer.modules():
            raise ValueError(f"name is {name!r}, a parameter of a {type(layer).__name__}, a tensor layer already")
    site = WeightSite(owner, (name,), [], parameter=leaf)
    parameter = owner._parameters.get(leaf)
    if parameter is not None and not isinstance(parameter, nn.UninitializedParameter) and not is_matrix(parameter):
        raise ValueError(
            f"name is {name!r}, of shape {tuple(parameter.shape)}; a network needs two axes longer than one"
        )
    return site
