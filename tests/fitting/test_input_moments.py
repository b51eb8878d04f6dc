"""Fits to calibration data: patches are what convolutions see, and each layer makes up for those before it."""

import copy
import math
from collections import UserDict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.backend.observe import observe
from tnlayers.fitting import input_moments
from tnlayers.fitting.decompose import decompose
from tnlayers.fitting.input_moments import channels, columns, follow, pairs, second_moments
from tnlayers.fitting.metric import DAMPING
from tnlayers.ops.contraction import reconstruct
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.tensorize.sites import note_moments

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GEOMETRIES = [
    (ndim, groups, {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode})
    for ndim, groups, (stride, dilation), padding, mode in product(
        CONVS, (1, 2), ((1, 1), (2, 1), (1, 2)), (0, 1, "same"), ("zeros", "circular")
    )
    if padding != "same" or stride == 1
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch's own
@pytest.mark.parametrize(("ndim", "groups", "options"), GEOMETRIES)
def test_columns_times_the_kernel_are_the_outputs(ndim, groups, options, monkeypatch):
    size = (2, 3, 1)[:ndim]
    conv = CONVS[ndim](4, 6, size, groups=groups, bias=False, dtype=torch.float64, **options)
    x = torch.randn(3, 4, *(6, 5, 7)[:ndim], dtype=torch.float64)
    geometry = Geometry(4, 6, size, groups=groups, **options)
    wanted = conv(x).unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)
    rows = conv.weight.reshape(groups, 6 // groups, -1).mT
    for chunk in (input_moments.CHUNK, 1):
        monkeypatch.setattr(input_moments, "CHUNK", chunk)
        found = [*columns(x, geometry)]
        assert len(found) == (3 if chunk == 1 else 1)
        torch.testing.assert_close(torch.cat(found, 1) @ rows, wanted)
    torch.testing.assert_close(torch.cat([*columns(x[0], geometry)], 1), torch.cat(found, 1)[:, : found[0].shape[1]])


def test_large_patches_and_transposed_layers_are_seen_by_channel(monkeypatch):
    x = torch.randn(2, 4, 5, 5)
    transposed = Geometry(4, 6, (3, 3), transposed=True)
    monkeypatch.setattr(input_moments, "LARGEST_PATCH", 35)
    for geometry in (Geometry(4, 6, (3, 3)), transposed, Geometry(4, 6, (1, 1))):
        (found,) = columns(x, geometry)
        torch.testing.assert_close(found[0], x.permute(0, 2, 3, 1).reshape(-1, 4))
    (rows,) = columns(torch.randn(2, 3, 5, 4), Geometry(4, 6, ()))
    assert rows.shape == (1, 30, 4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_follow_solves_the_least_squares_problem(groups, transposed):
    """At the minimum no small change of the kernel lowers what it minimises: its gradient is zero."""
    geometry = Geometry(4, 6, (3, 3), groups=groups, transposed=transposed)
    old = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    new = old + 0.3 * torch.randn_like(old).cumsum(-1)
    own, cross = second_moments([(old, new)], geometry)
    kernel = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64)
    found = follow(kernel, own, cross).requires_grad_()

    def split(value):  # (groups, rows, entries), as the moments have them
        value = value.reshape(groups, 6 // groups, 4 // groups, -1)
        return value.mT.flatten(1, 2) if transposed else value.flatten(2)

    ridge = DAMPING * own.diagonal(dim1=1, dim2=2).mean(1)
    (x0,), (x,) = columns(old, geometry), columns(new, geometry)
    missing = split(kernel) @ x0.mT - split(found) @ x.mT
    away = (split(found) - split(kernel)).square().sum((1, 2))
    loss = missing.square().sum() + (ridge * away).sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.norm() < 1e-9 * split(kernel).norm() * own.norm()
    assert second_moments([], geometry) is None


def test_a_layer_that_gets_nothing_but_zeros_keeps_its_kernel():
    geometry, kernel = Geometry(3, 5, (3,)), torch.randn(5, 3, 3)
    own, cross = second_moments([(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))], geometry)
    torch.testing.assert_close(follow(kernel, own, cross), kernel)


@pytest.mark.parametrize(
    "text",
    ["i:4 a:2, a h:3 w:3 b:2, b o:5", "i:4 r:3, h:3 w:3 r, o:5 r", "i:4 a:2 b:2, b h:3 w:3 c:2, c o:5 a"],
)
def test_moments_of_patches_lower_the_error_of_outputs(text):
    network = TensorNetwork.parse(text)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(8, 4, 9, 9, generator=generator, dtype=torch.float64).cumsum(-1).cumsum(-2)  # neighbours are alike
    (patches,) = columns(x, Geometry(4, 5, (3, 3)))

    def error(metric):
        cores = decompose(weight, network, moments=metric).cores
        return float((patches[0] @ (reconstruct(network, cores) - weight).flatten(1).mT).norm())

    channels = x.movedim(1, 0).flatten(1)
    whole, by_channel = patches[0].mT @ patches[0], channels @ channels.mT
    assert error(whole) < 0.9 * error(by_channel)


class Chain(nn.Module):
    """Three convolutions that are not called in the order in which the model holds them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.middle, self.first = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.unused = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu()).relu())


def test_every_layer_makes_up_for_those_before_it():
    dense = Chain().eval()
    x = torch.randn(16, 8, 10, 10, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    wanted = dense(x).detach()

    def error(model):
        return float((model(x) - wanted).detach().norm() / wanted.norm())

    calibrated, alone, plain = (copy.deepcopy(dense) for _ in range(3))
    config = tnlayers.TensorizeConfig("tucker", rank=4)
    report = tnlayers.tensorize_(calibrated, config, calibration=[x[:8], x[8:]])
    assert [report[name].reason for name in ("first", "last", "unused")] == ["fitted, to its inputs"] * 2 + ["fitted"]
    tnlayers.tensorize_(plain, config)
    for name in ("first", "middle", "last"):  # each with its own inputs in the original model
        layer = dense.get_submodule(name)
        own, _ = second_moments(pairs(dense, layer, {}, [x]), Geometry(8, 8, (3, 3), padding=1))
        setattr(alone, name, tnlayers.TuckerConv2d.from_conv(layer, rank=4, moments=own[0]))
    assert error(calibrated) < error(alone) < error(plain)


def test_stand_ins_leave_no_trace_and_come_before_hooks():
    model, x = Chain(), torch.randn(1, 8, 6, 6)
    seen = []
    model.first.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    found = []

    def run(example):
        observe(model, [model.middle], [example], lambda *each: found.append(each), {model.first: nn.Identity()})

    run(x)
    ((layer, middle),) = found
    assert layer is model.middle
    torch.testing.assert_close(middle, x.relu())
    torch.testing.assert_close(seen[0], x)
    assert len(model.first._forward_hooks) == 1
    assert not model.middle._forward_pre_hooks
    assert model.training
    with pytest.raises(RuntimeError, match="channels"):
        run(x[:, :3])
    assert len(model.first._forward_hooks) == 1
    assert not model.middle._forward_pre_hooks


def test_where_a_model_goes_other_ways_nothing_is_compared():
    model = Chain()
    before = torch.randn(2, 8, 6, 6)

    class Odd(nn.Module):
        def forward(self, x):
            return x[..., :3]

    ((old, new),) = pairs(model, model.middle, {model.first: Odd()}, [before])
    assert old is new
    assert new.shape == (2, 8, 6, 3)


def test_a_report_does_not_say_what_was_not_done():
    """Batches without images tell nothing: fits are plain, and the report says no more."""
    reports, models = [], [Chain() for _ in range(2)]
    for model, calibration in zip(models, (None, [torch.zeros(0, 8, 6, 6)]), strict=True):
        reports.append(tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tucker", rank=2), calibration=calibration))
    assert [layer.reason for layer in reports[1].values()] == ["fitted"] * 4
    for some, others in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(some, others)


def test_inputs_that_are_not_finite_are_refused_and_nothing_changes():
    model = Chain()
    kinds = [type(module) for module in model.modules()]
    for rank in ({"rank": 2}, {"budget": {"params": 0.5}}):
        with pytest.raises(ValueError, match="first: its inputs on the calibration batches hold NaN"):
            tnlayers.tensorize_(
                model, tnlayers.TensorizeConfig("tucker", **rank), calibration=[torch.full((1, 8, 6, 6), torch.nan)]
            )
    assert [type(module) for module in model.modules()] == kinds


def test_a_budget_goes_by_the_outputs_of_calibrated_layers():
    """Of two equal kernels, that with inputs of few directions loses less for a rank, and is given fewer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False))
    model[1].load_state_dict(model[0].state_dict())
    x = torch.randn(8, 3, 1, 1) * torch.ones(1, 1, 8, 8)
    x = torch.einsum("bchw,ic->bihw", x, torch.randn(16, 3)) + 1e-2 * torch.randn(8, 16, 8, 8)
    config = tnlayers.TensorizeConfig("tucker", budget={"params": 0.5})
    plain, calibrated = (tnlayers.tensorize_(copy.deepcopy(model), config, calibration=c) for c in (None, [x]))
    entries = [
        [math.inf if layer.rank is None else math.prod(layer.rank.values()) for layer in report.values()]
        for report in (plain, calibrated)
    ]
    assert 0.5 < entries[0][0] / entries[0][1] < 2  # what is left over goes to one of them
    assert entries[1][0] / entries[1][1] < 0.5


# ------------------------------------------------------------------ models as they are


def calibrated(model, batches, **options):
    model = copy.deepcopy(model).eval()
    config = tnlayers.TensorizeConfig("tucker", **{"rank": 3} | options)
    return model, tnlayers.tensorize_(model, config, calibration=batches)


def cores(model):
    return torch.cat([p.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("layer", "geometry", "shape"),
    [
        (nn.Conv2d(1, 16, 3), Geometry(1, 16, (3, 3)), (32, 1, 12, 12)),
        (nn.Linear(10, 16), Geometry(10, 16, ()), (64, 10)),
        (nn.Conv1d(3, 16, 3), Geometry(3, 16, (3,)), (16, 3, 20)),
        (nn.Conv2d(12, 12, 3, groups=2), Geometry(12, 12, (3, 3), groups=2), (8, 12, 6, 6)),
    ],
)
def test_float32_moments_are_symmetric(layer, geometry, shape):
    for _ in range(20):
        x = torch.rand(shape)
        own, _ = second_moments([(x, x)], geometry)
        assert torch.equal(own, own.mT)
    _, report = calibrated(nn.Sequential(layer), [torch.rand(shape)])
    assert report["0"].reason == "fitted, to its inputs"


PLAIN = nn.Sequential(
    nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)
)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_compiled_models_are_fitted_as_they_are_written(used, inner):
    batch = torch.randn(16, 8, 6, 6).cumsum(-1)
    wanted, _ = calibrated(PLAIN, [batch])
    model = copy.deepcopy(PLAIN).eval()
    model = nn.Sequential(torch.compile(model, backend="eager")) if inner else torch.compile(model, backend="eager")
    if used:
        with torch.no_grad():
            model(batch)
    report = tnlayers.tensorize_(
        model, tnlayers.TensorizeConfig("tucker", rank=3), calibration=[batch], example_input=batch
    )
    assert {row.reason for row in report.layers} == {"fitted, to its inputs"}
    assert all(row.flops for row in report.layers)
    torch.testing.assert_close(cores(model), cores(wanted))
    torch._dynamo.reset()


class Overwrites(nn.Module):
    """Changes its input first and what lies between its layers last."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.inplace = inplace

    def forward(self, x):
        x = x.sub_(0.5) if self.inplace else x - 0.5
        between = self.first(x)
        y = self.last(between)
        return y + (between.fill_(float("inf")) if self.inplace else between).clamp(0, 1)


def test_what_a_model_writes_in_place_changes_nothing():
    torch.manual_seed(0)
    batch = torch.randn(16, 8, 6, 6)
    kept, found = batch.clone(), []
    for inplace, example in ((False, batch), (True, batch), (True, UserDict(x=batch)), (True, (batch,))):
        torch.manual_seed(1)
        found.append(cores(calibrated(Overwrites(inplace), [example, example])[0]))
    assert torch.equal(batch, kept)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_autocast_does_not_reach_the_moments():
    """In bfloat16 they would be wrong in the third digit, as is the plain layer whose outputs are to be met."""
    seen = []
    batch = torch.randn(16, 8, 6, 6).cumsum(-1)
    geometry = Geometry(8, 8, (3, 3), padding=1)
    wanted = second_moments([(batch, batch)], geometry)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = second_moments([(batch, batch)], geometry)
            spot = SimpleNamespace(settings={"rank": None, "decompose": True}, geometry=geometry, moments=None)
            note_moments(spot, batch)
            _, report = calibrated(PLAIN, [batch])
        seen.append(spot.moments)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert {row.reason for row in report.layers} == {"fitted, to its inputs"}
    assert torch.equal(*seen)


def test_transformers_that_leave_out_what_is_masked():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = True
    example = {"src": torch.randn(4, 5, 16), "src_key_padding_mask": mask}
    report = tnlayers.tensorize_(
        encoder, tnlayers.TensorizeConfig("tucker", rank=4, include=["*linear*"]), calibration=[example],
        example_input=example,
    )  # fmt: skip
    first = report["layers.0.linear1"]
    assert first.reason == "fitted, to its inputs"
    assert first.flops[0] == 2 * 16 * 32 * 4 * 5
    assert torch.backends.mha.get_fastpath_enabled()


def test_calibration_without_a_fit_is_refused():
    with pytest.raises(ValueError, match=r"calibration is given, but decompose is False"):
        calibrated(PLAIN, [torch.randn(1, 8, 6, 6)], decompose=False)


def test_the_models_own_error_says_on_which_input():
    batch = torch.randn(1, 8, 6, 6)
    with pytest.raises(TypeError) as caught:
        calibrated(PLAIN, [batch, [batch, batch]])
    assert "while the model ran on a list" in caught.value.__notes__[0]


def test_moments_are_kept_only_where_ranks_are_chosen_by_them(monkeypatch):
    seen = []
    monkeypatch.setattr("tnlayers.tensorize.sites.channels", lambda *arguments: seen.append(1) or channels(*arguments))
    for options, count in (({}, 0), ({"rank": None, "budget": {"params": 0.5}}, 3)):
        calibrated(PLAIN, [torch.randn(2, 8, 6, 6)], **options)
        assert len(seen) == count


# ------------------------------------------------------------------ large models: streams, and runs that end early


@pytest.mark.parametrize(("geometry", "shape"), [(Geometry(6, 4, ()), (24, 3, 6)), (Geometry(6, 4, (3,)), (24, 6, 9))])
def test_streamed_moments_are_those_of_one_batch(geometry, shape):
    old, new = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    wanted = second_moments([(old, new)], geometry)
    found = second_moments(zip(old.split(5), new.split(5), strict=True), geometry)
    for some, others in zip(found, wanted, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-10, atol=1e-10)


class Attention(nn.Module):
    """Three projections of one tensor, as in a transformer, and a count of the runs that come to the last layer."""

    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.inplace, self.begun, self.ended = inplace, 0, 0

    def forward(self, x):
        self.begun += 1
        x = x + 1
        query = self.query(x)
        if self.inplace:
            x.mul_(2)  # now the others get other values, in the same memory
        key, value = self.key(x), self.value(x)
        y = self.out((query @ key.mT).softmax(-1) @ value)
        self.ended += 1
        return y


def attention(inplace=False):
    model = Attention(inplace)
    batches = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    report = tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tucker", rank=3), calibration=batches)
    assert {row.reason for row in report.layers} == {"fitted, to its inputs"}
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_of_one_input_share_their_runs_and_runs_end_at_the_layer(inplace, monkeypatch):
    shared = attention(inplace)
    groups = 3 if inplace else 2  # of layers with the same input
    assert (shared.begun, shared.ended) == (2 * (1 + 2 * groups), 2)
    monkeypatch.setattr("tnlayers.backend.observe._state", lambda _: None)
    alone = attention(inplace)
    assert alone.begun == 2 * (1 + 2 * 4)
    assert torch.equal(cores(shared), cores(alone))


def test_runs_of_a_layer_that_is_called_twice_do_not_end_at_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.ended = nn.Linear(8, 8), 0

        def forward(self, x):
            y = self.layer(self.layer(x).relu())
            self.ended += 1
            return y

    model = Twice()
    tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tucker", rank=3), calibration=[torch.randn(3, 8)] * 2)
    assert model.ended == 2 * (1 + 2)
