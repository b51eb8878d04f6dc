"""Checks of the properties that every layer has, also for formats defined by users.

``check(MyConv2d, 8, 12, 3, rank=2)`` runs all of them on a layer.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tnlayers.init.variance import DISTRIBUTIONS, FAN_MODES, Init
from tnlayers.layers.base import TensorLayer
from tnlayers.layers.core_memory import LargerThanDense
from tnlayers.layers.embedding_bag import TensorEmbeddingBag
from tnlayers.layers.table import TensorTable
from tnlayers.ops.contraction import reconstruct

__all__ = ["PROMISES", "assert_same_function", "check", "example_input"]

Make = Callable[..., TensorLayer]
"""Factory of the layer under test; keyword arguments override its own."""

PROMISES: dict[str, Callable[[Make], None]] = {}
"""All checks by name."""


def promise(function: Callable[[Make], None]) -> Callable[[Make], None]:
    """Register a check in ``PROMISES``, to run with a fixed seed and restore the global generator (decorator)."""

    @wraps(function)
    def seeded(make: Make) -> None:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", LargerThanDense)  # small test layers may be larger than dense ones
            torch.manual_seed(0)
            function(make)

    PROMISES[function.__name__] = seeded
    return seeded


def check(layer_type: type[TensorLayer], *args: Any, **kwargs: Any) -> None:
    """Run every check in ``PROMISES`` on a layer.

    Args:
        layer_type: the layer's class, defined at the top level of a module (it is pickled).
        *args: its arguments without dtype. Use small sizes, since gradients are checked numerically.
        **kwargs: its keyword arguments, likewise.

    Raises:
        AssertionError: a check fails.

    Example:
        >>> import tnlayers
        >>> check(tnlayers.TRConv1d, 4, 6, 3, rank=2)
    """
    for keeps in PROMISES.values():
        keeps(partial(layer_type, *args, **kwargs))


def example_input(layer: TensorLayer, batch: int = 2) -> Tensor:
    """Return a random input with the layer's dtype and device, a little larger than the kernel; of a table, indices."""
    core = layer.cores[0]
    if isinstance(layer, TensorTable):
        return torch.randint(layer.num_embeddings, (batch, 5), device=core.device)
    spatial = (span + 4 + k for k, span in enumerate(layer.geometry.spans))
    return torch.randn(batch, layer.geometry.in_channels, *spatial, dtype=core.dtype, device=core.device)


def assert_same_function(layer: TensorLayer, x: Tensor) -> None:
    """Check that the layer's output equals torch's with the layer's dense kernel, within 1e-10 in float64."""
    dense = layer.to_dense()
    assert type(dense) is layer.dense_type
    expected, found = dense(x), layer(x)
    eps = torch.finfo(expected.dtype).eps
    assert found.shape == expected.shape, f"output {tuple(found.shape)}, torch's {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"output {found.dtype}, torch's {expected.dtype}"
    error = float((found - expected).detach().norm() / expected.detach().norm().clamp(min=eps))
    limit = 1e-10 if expected.dtype == torch.float64 else 32 * eps
    assert error <= limit, f"{layer.strategy} differs from the dense layer by {error:.1e}, relative"


def _mean_square(layer: TensorLayer) -> float:
    weight = layer.weight.detach().to(torch.float64)
    if isinstance(layer, TensorTable) and layer.padding_idx is not None:  # a row that is not drawn
        weight = weight[torch.arange(len(weight)) != layer.padding_idx]
    return float(weight.square().mean())


def _shapes(layer: TensorLayer) -> dict[str, Any]:
    network = layer.network
    return {"in_shape": network.shape(network.inputs), "out_shape": network.shape(network.outputs)}


@promise
def same_function(make: Make) -> None:
    """Check that every strategy equals torch with the dense kernel: batched, unbatched, and for an empty batch."""
    for strategy in ("reconstruct", "factorized", "auto"):
        layer = make(strategy=strategy, dtype=torch.float64)
        x = example_input(layer)
        assert_same_function(layer, x)
        if not isinstance(layer, TensorEmbeddingBag):  # whose inputs of one axis need offsets
            assert_same_function(layer, x[0])
        assert_same_function(layer, x[:0])


@promise
def gradients(make: Make) -> None:
    """Check gradients numerically, and that every parameter gets a nonzero one."""
    for strategy in ("reconstruct", "factorized"):
        layer = make(strategy=strategy, dtype=torch.float64)
        x = example_input(layer)  # several images, since autograd does the backward of one
        x.requires_grad_(x.is_floating_point())
        parameters = dict(layer.named_parameters())

        def function(
            x: Tensor, *values: Tensor, layer: TensorLayer = layer, names: tuple[str, ...] = tuple(parameters)
        ) -> Any:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

        assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)
        layer(x).square().sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.norm() > 0, f"the gradient of {name} is zero"


@promise
def exact_variance(make: Make) -> None:
    """Check that each draw has the solver's kernel norm, for every mode and distribution; of a table, for its std."""
    for mode in FAN_MODES[:1] if isinstance(make(), TensorTable) else FAN_MODES:
        for distribution in DISTRIBUTIONS:
            layer = make(init=Init(mode, distribution=distribution), dtype=torch.float64)
            ratio = _mean_square(layer) * layer.variance.fan / layer.variance.gain**2
            assert abs(ratio - 1) < 1e-4, f"{mode}, {distribution}: E[W^2] fan / gain^2 is {ratio}"


@promise
def expected_variance(make: Make) -> None:
    """Check that draws without exact norms meet the target in expectation, for every distribution and split.

    The second moments of independent cores contract to the kernel's: this is checked as an identity. The second moments
    of the drawn entries are checked on 20 draws, within four standard errors.
    """
    for distribution in DISTRIBUTIONS:
        for split in ("equal", "balanced"):
            layer = make(init=Init(distribution=distribution, split=split, exact=False), dtype=torch.float64)
            answer = layer.variance
            moments = [torch.full_like(core, std**2) for core, std in zip(layer.cores, answer.std, strict=True)]
            kernel = reconstruct(layer.network, moments) * answer.fan / answer.gain**2
            assert torch.allclose(kernel, torch.ones_like(kernel), rtol=1e-10), f"{split}: {float(kernel.mean())}"
            squares = []
            for _ in range(20):
                layer.reset_parameters()
                squares += [
                    (core.detach() / std).square().flatten() for core, std in zip(layer.cores, answer.std, strict=True)
                ]
            drawn = torch.cat(squares)
            mean, error = float(drawn.mean()), float(drawn.std()) / math.sqrt(len(drawn))
            assert abs(mean - 1) < 4 * error, f"{distribution}: entries have {mean} +- {error} of their variance"


@promise
def copies(make: Make) -> None:
    """Check that copying, pickling and loading a state_dict preserve the layer."""
    layer = make(dtype=torch.float64)
    x = example_input(layer)
    other = make(dtype=torch.float64)
    other.load_state_dict(layer.state_dict(), strict=True)
    expected = [f"cores.{k}" for k in range(len(layer.network.cores))] + ["bias"] * (layer.bias is not None)
    expected += dict(layer.named_buffers())
    assert sorted(layer.state_dict()) == sorted(expected), f"state_dict has {list(layer.state_dict())}"
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)
        assert (twin.network, twin.geometry, twin.init, twin.rank) == (
            layer.network, layer.geometry, layer.init, layer.rank,
        )  # fmt: skip


@promise
def moves(make: Make) -> None:
    """Check the function after the meta device, a reset and dtype conversions, and the variance after all of them."""
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make().parameters())
    layer = make(device="meta", init=Init())
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(example_input(layer)).is_meta
    layer.to_empty(device="cpu").reset_parameters()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        y = layer(example_input(layer))
        assert y.dtype == dtype
        assert bool(torch.isfinite(y).all())
    # The float32 draw was rounded to bfloat16's 8 bits, with an independent error in each core.
    ratio = _mean_square(layer) / layer.variance.weight_std**2
    assert abs(ratio - 1) < len(layer.cores) * 2**-7, f"E[W^2] is {ratio} times the target after meta and casts"


@promise
def seeds(make: Make) -> None:
    """Check that equal seeds give equal layers, and a second draw another layer."""
    torch.manual_seed(5)
    first = make()
    torch.manual_seed(5)
    second, third = make(), make()
    for a, b, c in zip(first.cores, second.cores, third.cores, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@promise
def module_manners(make: Make) -> None:
    """Check requires_grad_, a reset by ``apply``, parameter counts, and a rebuild from the layer's rank and shapes."""
    layer = make()
    layer.requires_grad_(False)
    assert not layer(example_input(layer)).requires_grad
    layer.requires_grad_(True)
    before = layer.weight.detach()
    nn.Sequential(layer).apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    assert not torch.equal(layer.weight, before)
    assert sum(core.numel() for core in layer.cores) == layer.network.num_params
    assert layer.keep_ratio == layer.network.num_params / layer.weight.numel()
    again = make(rank=layer.rank, **_shapes(layer))
    assert again.network == layer.network


@promise
def conversions(make: Make) -> None:
    """Check that arguments, bias, dtype, training and requires_grad survive to_dense and from_dense without a fit."""
    layer = make(dtype=torch.float64).eval()
    layer.cores.requires_grad_(False)
    dense = layer.to_dense()
    assert not dense.training
    assert not dense.weight.requires_grad
    own = {field.name: getattr(layer.format, field.name) for field in fields(layer.format)}
    back = type(layer).from_dense(dense, rank=layer.rank, decompose=False, **_shapes(layer), **own)
    assert back.geometry == layer.geometry
    assert not back.training
    assert not any(core.requires_grad for core in back.cores)
    assert (back.bias is None) == (layer.bias is None)
    for wanted in (True, False):
        if layer.bias is not None:
            dense.bias.requires_grad_(wanted)
            twin = type(layer).from_dense(dense, rank=layer.rank, decompose=False, **_shapes(layer), **own)
            assert twin.bias is not None
            assert torch.equal(twin.bias, dense.bias)
            assert twin.bias.requires_grad == wanted
            assert [p.requires_grad for name, p in twin.to_dense().named_parameters() if name == "bias"] == [wanted]


@promise
def counting(make: Make) -> None:
    """Check that ``flops`` equals torch's count, for every strategy."""
    for strategy in ("reconstruct", "factorized", "auto"):
        layer = make(strategy=strategy)
        x = example_input(layer)
        for training in (True, False):
            layer.train(training)
            with torch.set_grad_enabled(training):
                layer(x)  # once before the count
                with FlopCounterMode(display=False) as counter:
                    layer(x)
            assert layer.flops(x.shape) == counter.get_total_flops(), f"{strategy}: {layer.explain(x.shape)}"
            assert layer.explain(x.shape).startswith(("reconstruct", "factorized"))


@promise
def changing_ranks(make: Make) -> None:
    """Check that larger ranks keep the kernel and learn, and that smaller ranks have the error that is returned."""
    layer = make(dtype=torch.float64)
    rank = dict(layer.rank)
    if not rank:
        return  # no bond can change
    kernel = layer.weight.detach()
    layer.grow_({bond: size + 1 for bond, size in rank.items()})
    found = layer.weight
    torch.testing.assert_close(found.detach(), kernel, rtol=0, atol=1e-10 * float(kernel.abs().max()))
    gradients = torch.autograd.grad(found.square().sum(), [*layer.cores])
    for bond, size in rank.items():
        learn = [
            gradient.select(axes.index(bond), size).any()
            for gradient, axes in zip(gradients, layer.network.cores, strict=True)
            if bond in axes
        ]
        assert any(learn), f"the new index of {bond} gets no gradient"
    error = layer.truncate_({bond: max(1, size - 1) for bond, size in rank.items()})
    change = float((layer.weight.detach() - kernel).norm() / kernel.norm())
    assert abs(change - error) < 1e-6, f"the error is {change}, not {error}"
    assert_same_function(layer, example_input(layer))
