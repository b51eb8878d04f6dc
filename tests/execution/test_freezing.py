"""Inference is right whatever was written into the cores; a frozen layer keeps weights, within bounds."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tnlayers
from cases import FAMILIES
from tnlayers.execution.executor import LayerExecutor

LAYERS = [*FAMILIES, *(getattr(tnlayers, f"{layer.format_type.__name__}Linear") for layer in FAMILIES)]


def made(layer, **options):
    torch.manual_seed(0)
    geometry = {} if issubclass(layer, tnlayers.TensorLinear) else {"kernel_size": 3, "padding": 1}
    return layer(8, 12, **geometry, rank=2, **options)


def example(layer):
    return torch.randn(2, 8, *(6, 6)[: layer.geometry.ndim])


def by_gradients(kind, **options):
    """A step of an optimizer with gradients that were set by hand."""

    def write(layer):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(layer.parameters(), lr=0.3, **options).step()

    return write


def each(write):
    return lambda layer: [write(parameter) for parameter in layer.parameters()]


def through_numpy(parameter):
    parameter.detach().numpy()[...] += 0.7


WAYS = {
    "data.mul_": each(lambda p: p.data.mul_(0.9).add_(0.1)),
    "data.copy_": each(lambda p: p.data.copy_(torch.full_like(p, 0.3))),
    "data.clamp_": each(lambda p: p.data.clamp_(-0.05, 0.05)),
    "data[...] =": each(lambda p: p.data.__setitem__(..., 0.4)),
    "data =": each(lambda p: setattr(p, "data", torch.full_like(p, 0.2))),
    "nn.init on data": each(lambda p: nn.init.uniform_(p.data, 0.1, 0.3)),
    "foreach on data": lambda layer: torch._foreach_add_([p.data for p in layer.parameters()], 0.4),
    "state_dict().data": lambda layer: [value.data.add_(0.3) for value in layer.state_dict().values()],
    "numpy": each(through_numpy),
    "detach": each(lambda p: p.detach().sub_(0.3)),
    "in place": lambda layer: [p.add_(0.3) for p in layer.parameters()],
    "fused SGD": by_gradients(torch.optim.SGD, fused=True),
    "fused AdamW": by_gradients(torch.optim.AdamW, fused=True),
    "foreach SGD": by_gradients(torch.optim.SGD, foreach=True),
    "storage": each(lambda p: p.untyped_storage().copy_(torch.full_like(p, 0.3).untyped_storage())),
    "swap_average": lambda layer: torch.optim.swa_utils.AveragedModel(layer).update_parameters(layer),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_whatever_is_written_counts(layer, way):
    """In eval and train mode, with one forward before, also in inference mode."""
    for training in (False, True):
        for around in (torch.no_grad, torch.inference_mode):
            ours = made(layer).train(training)
            x = example(ours)
            with around():
                before = ours(x)
                again = ours(x)
            assert torch.equal(before, again)
            with torch.no_grad():
                WAYS[way](ours)
            with around():
                found = ours(x)
            torch.testing.assert_close(found, ours.to_dense()(x), rtol=1e-4, atol=1e-5)
            assert way == "swap_average" or not torch.allclose(found, before, rtol=1e-3)


class Kept:
    """How often a layer builds weights, and what its planner keeps."""

    def __init__(self, layer, monkeypatch):
        self.layer, self.builds = layer, 0
        original = tnlayers.execution.executor.prepare_weights

        def counting(*arguments):
            self.builds += 1
            return original(*arguments)

        monkeypatch.setattr(tnlayers.execution.executor, "prepare_weights", counting)

    @property
    def bytes(self) -> int:
        own = {core.untyped_storage().data_ptr() for core in self.layer.cores}
        kept = [weight.untyped_storage() for one in self.layer._executor._weights.values() for weight in one.weights]
        return sum({s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in own}.values())


@pytest.fixture
def kept(monkeypatch):
    return Kept(tnlayers.TRConv2d(8, 12, 3, rank=3, strategy="reconstruct").eval(), monkeypatch)


def check(kept, builds: int, x=None) -> None:
    x = torch.randn(2, 8, 6, 6) if x is None else x
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(kept.layer(x), kept.layer.to_conv()(x), rtol=1e-4, atol=1e-5)
    assert kept.builds == builds


class TestFrozen:
    """Weights are built once, until anything that can be seen has changed them."""

    def test_nothing_is_kept_unless_asked(self, kept):
        check(kept, 0)
        assert not kept.layer.frozen
        assert kept.bytes == 0

    def test_built_once(self, kept):
        assert tnlayers.freeze_(kept.layer).layers == ("",)
        check(kept, 1)
        assert kept.layer.frozen
        assert len(kept.layer.state_dict()) == 4

    @pytest.mark.parametrize("change", [
        lambda layer: layer.cores[1].detach().mul_(2),
        lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
        lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
        lambda layer: layer.reset_parameters(),
        lambda layer: layer.set_weight_(torch.randn(12, 8, 3, 3)),
        lambda layer: layer.cores.__setitem__(0, nn.Parameter(torch.randn_like(layer.cores[0]))),
        lambda layer: setattr(layer.cores[0], "data", torch.randn_like(layer.cores[0])),
    ])  # fmt: skip
    def test_a_change_that_can_be_seen(self, kept, change):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        with torch.no_grad():
            change(kept.layer)
        check(kept, 2)
        assert kept.layer.frozen

    def test_another_dtype(self, kept):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        kept.layer.double()
        check(kept, 2, torch.randn(2, 8, 6, 6, dtype=torch.float64))

    def test_frozen_again_behind_a_change_that_cannot(self, kept):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        kept.layer.cores[0].data.mul_(2)
        tnlayers.freeze_(kept.layer)
        check(kept, 2)

    @pytest.mark.parametrize("step", [
        lambda layer: layer.train().eval(),
        lambda layer: layer(torch.randn(1, 8, 6, 6)),
        tnlayers.thaw_,
    ])  # fmt: skip
    def test_thawed(self, kept, step):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        step(kept.layer)
        assert not kept.layer.frozen
        assert kept.bytes == 0
        check(kept, 1)

    def test_a_context(self, kept):
        frozen = tnlayers.freeze_(nn.Sequential(kept.layer))
        with frozen:
            assert frozen.layers == ("0",)
            check(kept, 1)
        assert not kept.layer.frozen
        tnlayers.freeze_(kept.layer)
        with pytest.raises(ZeroDivisionError), frozen:
            raise ZeroDivisionError
        assert not kept.layer.frozen
        assert kept.bytes == 0

    def test_a_context_leaves_what_was_frozen_before(self, kept):
        tnlayers.freeze_(kept.layer)
        with tnlayers.freeze_(kept.layer) as frozen:
            assert frozen.layers == ("",)
        assert kept.layer.frozen
        with pytest.raises(AttributeError, match=r"frozen cannot be set to False; call .*thaw_"):
            kept.layer.frozen = False

    def test_settings_leave_it_frozen(self, kept):
        tnlayers.freeze_(kept.layer)
        kept.layer.strategy = "0*1*2"
        kept.layer.stride = 2
        check(kept, 1)

    def test_copies_are_not_frozen(self, kept):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        for twin in (copy.deepcopy(kept.layer), pickle.loads(pickle.dumps(kept.layer))):
            assert not twin.frozen
            assert not twin._executor._weights
            assert not twin._executor._plans

    def test_functional_call_is_not_kept(self, kept):
        tnlayers.freeze_(kept.layer)
        check(kept, 1)
        x = torch.randn(2, 8, 6, 6)
        doubled = {name: 2 * value for name, value in kept.layer.named_parameters()}
        with torch.no_grad():
            y = torch.func.functional_call(kept.layer, doubled, x)
            bias = 2 * kept.layer.bias[:, None, None]
            torch.testing.assert_close(y, 8 * nn.functional.conv2d(x, kept.layer.weight.clone()) + bias)
        check(kept, 2)

    def test_autocast_and_not(self, kept):
        tnlayers.freeze_(kept.layer)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert kept.layer(torch.randn(2, 8, 6, 6)).dtype == torch.bfloat16
        check(kept, 2)

    def test_refusals(self, kept):
        low = tnlayers.TRConv2d(8, 12, 3, rank=3, memory="low").eval()
        for model, error, words in (
            (None, TypeError, "model is of type NoneType"),
            (nn.ReLU(), ValueError, "model has no tensor layer"),
            (low, ValueError, "memory='low'"),
            (nn.Sequential(kept.layer, kept.layer).train(), ValueError, "0 is in training mode"),
        ):
            with pytest.raises(error, match=words):
                tnlayers.freeze_(model)
        with pytest.raises(ValueError, match="model has no tensor layer"):
            tnlayers.thaw_(nn.ReLU())
        assert not kept.layer.frozen


@pytest.mark.parametrize("strategy", ["auto", "reconstruct"])
@pytest.mark.parametrize("layer", FAMILIES)
def test_one_kernel_s_memory_at_most(layer, strategy):
    """Over sizes, batches, layouts and dtypes."""
    ours = layer(32, 32, 3, padding=1, rank=4, strategy=strategy).eval()
    kept = Kept(ours, pytest.MonkeyPatch())
    tnlayers.freeze_(ours)
    most = 0
    with torch.no_grad():
        for size, batch in ((4, 1), (9, 2), (16, 8), (40, 1)):
            x = torch.randn(batch, 32, size, size)
            for images in (x, x.to(memory_format=torch.channels_last)):
                for enabled in (False, True):
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                        ours(images)
                    most = max(most, kept.bytes)
    assert most <= ours.network.dense_params * 4
    if strategy == "reconstruct":
        assert most == ours.network.dense_params * 4
    low = layer(32, 32, 3, padding=1, rank=4, memory="low").eval()
    with pytest.raises(ValueError, match="keep nothing"):
        tnlayers.freeze_(low)
    with torch.no_grad():
        low(torch.randn(1, 32, 4, 4))
    assert not low._executor._weights


def test_plans_are_dropped_least_recently_used(monkeypatch):
    monkeypatch.setattr(tnlayers.execution.executor, "_KEPT", 3)
    layer = tnlayers.TRConv2d(8, 12, 3, rank=3)
    executor: LayerExecutor = layer._executor

    def run(size):
        layer(torch.randn(1, 8, size, size))
        return [key[0][-1] for key in executor._plans]

    assert [run(size) for size in (5, 6, 7, 5, 8, 9)][-3:] == [[6, 7, 5], [7, 5, 8], [5, 8, 9]]
