"""Recurrent layers of every format equal torch's with their contracted weights, and start as torch's."""

import copy
import itertools
import pickle
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from covertable import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import tnlayers
from cases import RECURRENT
from tnlayers.execution.recurrence import _in_one_buffer
from tnlayers.layers import recurrent_by_format
from tnlayers.layers.recurrent import RECURRENT as KINDS
from tnlayers.layers.recurrent import recurrent_class
from tnlayers.layers.recurrent_description import describe_recurrent, outline_recurrent
from tnlayers.tensorize.config import TensorizeConfig

INPUT, HIDDEN, LENGTH, BATCH = 8, 12, 4, 3
CASES = [(kind, name, own) for kind in KINDS for name, own in RECURRENT]
cases = pytest.mark.parametrize(
    ("kind", "name", "own"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
OPTIONS: dict[str, list[Any]] = {
    "num_layers": [1, 2],
    "bias": [True, False],
    "batch_first": [False, True],
    "bidirectional": [False, True],
    "form": ["padded", "unbatched", "sorted", "unsorted"],
    "hx": [False, True],
    "strategy": ["reconstruct", "factorized"],
    "plain": [(), ("hh",)],
}
OWN: dict[type[nn.Module], dict[str, list[Any]]] = {
    nn.LSTM: {"proj_size": [0, 4]},
    nn.GRU: {},
    nn.RNN: {"nonlinearity": ["tanh", "relu"]},
}


def states_of(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def flat(found: Any) -> list[torch.Tensor]:
    y, states = found
    return [y.data if isinstance(y, PackedSequence) else y, *states_of(states)]


def an_input(form: str, batch_first: bool) -> Any:
    x = torch.randn(LENGTH, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    if form == "padded":
        return x, x.transpose(0, 1) if batch_first else x
    if form == "unbatched":
        return x, x[:, 0]
    lengths = [4, 2, 1] if form == "sorted" else [2, 4, 1]
    return x, pack_padded_sequence(x, lengths, enforce_sorted=form == "sorted")


def check(kind: Any, name: str, own: dict[str, Any], row: dict[str, Any]) -> None:
    row = dict(row)
    form, given_states, strategy, plain = (row.pop(key) for key in ("form", "hx", "strategy", "plain"))
    layer = recurrent_class(name, kind)(
        INPUT, HIDDEN, **row, strategy=strategy, plain=plain, dtype=torch.float64, **own
    )
    dense = kind(INPUT, HIDDEN, **row, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            parameter.copy_(getattr(layer, key))
    x, inputs = an_input(form, row["batch_first"])
    hx = None
    if given_states:
        batch = () if form == "unbatched" else (BATCH,)
        count = row["num_layers"] * (1 + row["bidirectional"])
        sizes = layer.recurrence.state_sizes
        made = tuple(torch.randn(count, *batch, n, dtype=torch.float64, requires_grad=True) for n in sizes)
        hx = made if len(made) > 1 else made[0]
    leaves = [x, *(states_of(hx) if given_states else ())]
    found, expected = flat(layer(inputs, hx)), flat(dense(inputs, hx))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    ours, theirs = ([each.square().sum() for each in outputs] for outputs in (found, expected))
    parameters = dict(dense.named_parameters())
    for_leaves = torch.autograd.grad(sum(ours), [*leaves, *layer.parameters()], retain_graph=True)  # x is packed once
    dense_leaves = torch.autograd.grad(sum(theirs), [*leaves, *parameters.values()])
    held = dict(zip(parameters, dense_leaves[len(leaves) :], strict=True))
    through = torch.autograd.grad(
        [getattr(layer, key) for key in parameters], [*layer.parameters()], [held[key] for key in parameters]
    )
    for one, other in zip(for_leaves, (*dense_leaves[: len(leaves)], *through), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * max(1.0, float(other.abs().max())))


@cases
def test_every_format_equals_its_dense_twin(kind, name, own):
    torch.manual_seed(0)
    common = {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": True, "plain": (), "hx": True}
    for strategy, form in (("reconstruct", "padded"), ("factorized", "unsorted")):
        check(kind, name, own, {**common, "strategy": strategy, "form": form})


@each_kind
def test_any_two_options_together(kind):
    torch.manual_seed(0)
    for row in make(OPTIONS | OWN[kind], strength=2):
        check(kind, "tr", {"rank": 2}, row)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.sampled_from(["lstm", "gru"]))
def test_packed_sequences_of_any_lengths(lengths, bidirectional, kind):
    layer = getattr(tnlayers, f"CP{kind.upper()}")(
        3, 4, 2, bidirectional=bidirectional, rank=2, strategy="factorized", dtype=torch.float64
    )
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths], enforce_sorted=False)
    for one, other in zip(flat(layer(packed)), flat(layer.to_dense()(packed)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_kind
def test_dropout_is_that_of_torchs_kernel(kind):
    layer = recurrent_class("tr", kind)(INPUT, HIDDEN, 3, dropout=0.4, rank=2, strategy="reconstruct")
    x = torch.randn(LENGTH, BATCH, INPUT)
    torch.manual_seed(1)
    found = layer(x)[0]
    torch.manual_seed(1)
    expected = layer.to_dense()(x)[0]
    torch.testing.assert_close(found, expected)
    layer.strategy = "factorized"
    assert not torch.allclose(layer(x)[0], layer(x)[0])
    layer.eval()
    torch.testing.assert_close(layer(x)[0], layer.to_dense()(x)[0], rtol=1e-4, atol=1e-5)
    layer.train().dropout = 1.0
    assert not torch.allclose(layer(x)[0], layer.eval()(x)[0])


def test_dropout_without_effect_is_said():
    with pytest.warns(UserWarning, match="dropout is 0.5, but num_layers is 1") as caught:
        layer = tnlayers.TRLSTM(4, 8, dropout=0.5, rank=2)
    assert caught[0].filename == __file__
    assert layer.to_lstm().dropout == 0.5
    later = tnlayers.TRLSTM(4, 8, rank=2)
    with pytest.warns(UserWarning, match="dropout is 0.25, but num_layers is 1") as caught:
        later.dropout = 0.25
    assert caught[0].filename == __file__
    later.dropout = 0.25  # nothing changes, so nothing is said
    later.dropout = 0.0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_rule_finds_the_ranks_of_each_weight(kind):
    generator = torch.Generator().manual_seed(0)
    dense = kind(40, 30)
    gates = dense.weight_ih_l0.shape[0] // 30
    with torch.no_grad():
        for weight, rank in ((dense.weight_ih_l0, 4), (dense.weight_hh_l0, 6)):
            left, right = (torch.randn(side, rank, generator=generator) for side in weight.shape)
            weight.copy_(left @ right.mT + 0.5 * torch.randn(weight.shape, generator=generator))
    cls = recurrent_class("tucker", kind)
    layer = getattr(cls, f"from_{cls.dense_name}")(dense, rank="vbmf")
    assert [dict(layer.ih_l0.rank), dict(layer.hh_l0.rank)] == [{"ri": 4, "ro": 4}, {"ri": 6, "ro": 6}]
    assert layer.ih_l0.out_features == 30 * gates
    mixed = cls.from_dense(dense, rank={"ih": 3, "hh": "vbmf"}, decompose=False)
    assert [dict(mixed.ih_l0.rank), dict(mixed.hh_l0.rank)] == [{"ri": 3, "ro": 3}, {"ri": 6, "ro": 6}]
    plain = cls.from_dense(dense, rank="vbmf", plain=("ih",))
    assert torch.equal(plain.weight_ih_l0, dense.weight_ih_l0)
    with pytest.raises(ValueError, match="rank is 'bayes'; accepted: 'vbmf'"):
        cls.from_dense(dense, rank="bayes")
    with pytest.raises(ValueError, match="weight is on the meta device"):
        cls.from_dense(kind(4, 4, device="meta"), rank="vbmf", decompose=False)
    with pytest.raises(ValueError, match=r"moments is given, but each weight of a recurrent layer has inputs"):
        cls.from_dense(dense, rank=2, moments=torch.eye(40))
    with pytest.raises(ValueError, match=r"no rule or budget chooses its ranks; give a rank by overrides"):
        tnlayers.tensorize_(nn.Sequential(dense), TensorizeConfig("tucker", rank="vbmf", kinds=("recurrent",)))


@cases
def test_every_gate_starts_with_torchs_standard_deviation(kind, name, own):
    torch.manual_seed(0)
    extra = {"proj_size": 4} if kind is nn.LSTM else {}
    layer = recurrent_class(name, kind)(INPUT, HIDDEN, 2, **extra, dtype=torch.float64, **own)
    for weight in layer.recurrence.weights():
        for gate in getattr(layer, f"weight_{weight.name}").detach().chunk(weight.gates):
            assert float(gate.square().mean() * 3 * HIDDEN) == pytest.approx(1, abs=1e-6)
    bound = HIDDEN**-0.5
    for bias in layer.parameters(recurse=False):
        assert 0.7 * bound < float(bias.detach().abs().max()) <= bound


def test_other_starts_are_each_weights_own():
    layer = tnlayers.TRLSTM(64, 16, rank=3, init="fan_in", dtype=torch.float64)
    assert float(layer.weight_ih_l0.detach().square().mean()) == pytest.approx(2 / 64)
    assert float(layer.weight_hh_l0.detach().square().mean()) == pytest.approx(2 / 16)
    for gate in layer.weight_hh_l0.detach().chunk(4):
        assert float(gate.square().mean()) == pytest.approx(2 / 16)
    assert tnlayers.TRLSTM(64, 16, rank=3, init="paper").ih_l0.init == tnlayers.Init.of("paper")


def test_plain_weights_start_as_torchs():
    layer = tnlayers.TTGRU(4, 64, rank=2, plain=("ih",))
    assert type(layer.ih_l0) is nn.Linear
    assert 0.95 / 8 < float(layer.ih_l0.weight.detach().abs().max()) <= 1 / 8


def test_a_reset_draws_all_again_and_equal_seeds_give_equal_layers():
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(tnlayers.BTTRNN(INPUT, HIDDEN, rank=2, blocks=2, plain=("hh",)))
    before = layers[0].state_dict()
    assert all(torch.equal(value, layers[1].state_dict()[key]) for key, value in before.items())
    nn.Sequential(layers[1]).apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    assert not any(torch.equal(value, layers[1].state_dict()[key]) for key, value in before.items())
    gates = tnlayers.TRLSTM(INPUT, HIDDEN, rank=2, dtype=torch.float64)
    gates.reset_parameters()
    for gate in gates.weight_ih_l0.detach().chunk(4):
        assert float(gate.square().mean() * 3 * HIDDEN) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "module", "ranks"), [("TR", "tensor_ring", [4, 4, 4, 4]), ("TT", "tensor_train", [4]), ("CP", "cp", 4)]
)
def test_against_tednet(name, module, ranks):
    """Equal numbers of parameters; the weight starts where a dense one would, and tednet's elsewhere."""
    torch.manual_seed(0)
    theirs = getattr(pytest.importorskip(f"tednet.tnn.{module}"), f"{name}LSTM")([4, 8], [4, 8], ranks)
    layer = getattr(tnlayers, f"{name}LSTM")
    ours = layer(32, 32, rank=4, in_shape=(4, 8), hidden_shape=(4, 8), plain=("hh",))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    wanted = (3 * 32) ** -0.5
    assert float(ours.weight_ih_l0.detach().std()) == pytest.approx(wanted, rel=0.03)
    weight = theirs.cell.weight_ih(torch.eye(32)).detach()
    assert abs(float(weight.std()) / wanted - 1) > 0.1


def failure(call: Any) -> Any:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (torch's type is compared)
        call()
    return caught.value


@each_kind
def test_wrong_inputs_raise_torchs_types(kind):
    layer = recurrent_class("tr", kind)(INPUT, HIDDEN, rank=2)
    dense = layer.to_dense()
    x, h = torch.randn(LENGTH, BATCH, INPUT), torch.randn(1, BATCH, HIDDEN)

    def state(h: Any) -> Any:
        return (h, torch.randn(1, BATCH, HIDDEN)) if kind is nn.LSTM else h

    for arguments in (
        (x[..., :-1],), (x[0, 0],), (x[:0],), (x.double(),),
        (x, state(h[:, :1])), (x, state(h[0])), (x[:, 0], state(h)), (x, state(h.double())),
    ):  # fmt: skip
        ours, theirs = failure(lambda: layer(*arguments)), failure(lambda: dense(*arguments))  # noqa: B023
        assert type(ours) is type(theirs)
        assert any(word in str(ours) for word in ("input has", "hx has", "hx[0] has"))
    for strategy in ("reconstruct", "factorized"):
        layer.strategy = strategy
        assert layer(x[:, :0])[0].shape == dense(x[:, :0])[0].shape
    with pytest.raises(TypeError, match=r"hx is of type (int|tuple)"):
        layer(x, (h, h) if kind is not nn.LSTM else 1)
    with pytest.raises(TypeError, match="input is of type list"):
        layer([1.0])


PLAIN: dict[str, Any] = {"plain": ("ih", "hh", "hr"), "rank": None}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"input_size": 0}, ValueError, "input_size is 0"),
        ({"hidden_size": 2.5}, TypeError, "hidden_size is 2.5"),
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"dropout": 2}, ValueError, "dropout is 2"),
        ({"bias": 1}, TypeError, "bias is 1"),
        ({"proj_size": 8}, ValueError, "proj_size is 8; it must be below hidden_size, .*8"),
        ({"plain": "hh"}, TypeError, "plain is 'hh'"),
        ({"plain": ("xx",)}, ValueError, "plain is 'xx'"),
        ({"hidden_shape": (3, 2)}, ValueError, r"hidden_shape \(3, 2\) has product 6, but hidden_size is 8"),
        ({"in_shape": (3, 2)}, ValueError, r"in_shape \(3, 2\) has product 6, but input_size is 4"),
        ({"rank": {"hh": 2, "r0": 1}}, ValueError, "a key of rank is 'r0'"),
        ({"rank": {"hr": 2}}, ValueError, "a key of rank is 'hr'; accepted: 'ih', 'hh', 'ih_l0', 'hh_l0'"),
        ({"rank": {"hh": 2}, "plain": ("hh",)}, ValueError, "a key of rank is 'hh'; accepted: 'ih', 'ih_l0'"),
        ({"in_shape": (2, 2), "plain": ("ih",)}, ValueError, r"in_shape is \(2, 2\), but the weights 'ih' are plain"),
        ({"plain": ("ih", "hh")}, ValueError, "rank is 2, but all weights are plain; it must be None"),
        (PLAIN | {"hidden_shape": (4, 2)}, ValueError, r"hidden_shape is \(4, 2\), but all weights are plain"),
        (PLAIN | {"strategy": "factorized"}, ValueError, "strategy is 'factorized', but all weights are plain"),
        (PLAIN | {"strategy": "fast"}, ValueError, "strategy is 'fast'; accepted"),
        (PLAIN | {"memory": "low"}, ValueError, "memory is 'low', but all weights are plain; it must be 'auto'"),
        ({"strategy": "0 > 1"}, ValueError, None),
        ({"init": "like"}, ValueError, "init is 'like'; accepted: 'torch', 'fan_in'"),
        ({"init": 1}, TypeError, "init is 1"),
        ({"out_shape": (2, 4)}, TypeError, r"out_shape is \(2, 4\), but TRLSTM has no such argument.*hidden_shape"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, text):
    if text is None:
        layer = tnlayers.TRLSTM(4, 8, rank=2)
        with pytest.raises(error, match="strategy is '0 > 1'"):
            layer.strategy = arguments["strategy"]
        return
    with pytest.raises(error, match=text):
        tnlayers.TRLSTM(**({"input_size": 4, "hidden_size": 8, "rank": 2} | arguments))


def test_formats_and_bases_are_named():
    with pytest.raises(TypeError, match="TensorLSTM has no format"):
        tnlayers.TensorLSTM(4, 8)
    with pytest.raises(TypeError, match="network is missing; EinsumGRU"):
        tnlayers.EinsumGRU(4, 8)
    with pytest.raises(ValueError, match="only an LSTM has a projection"):
        tnlayers.spec.recurrence.Recurrence("GRU", 4, 8, proj_size=2)
    with pytest.raises(ValueError, match="nonlinearity is 'gelu'"):
        tnlayers.CPRNN(4, 8, nonlinearity="gelu", rank=1)
    with pytest.raises(TypeError, match=r"kind is .*Linear.*accepted: nn.LSTM, nn.GRU, nn.RNN"):
        recurrent_class("tr", nn.Linear)


def test_ranks_and_shapes_of_each_weight():
    layer = tnlayers.TTLSTM(
        16, 24, 2, bidirectional=True, in_shape=(4, 4), hidden_shape=(6, 4), rank={"ih": 3, "hh_l1": 2}
    )
    assert {*layer.ih_l0.rank.values()} == {*layer.ih_l1_reverse.rank.values()} == {3}
    assert {*layer.hh_l1.rank.values()} == {2}
    assert 0.2 < layer.hh_l0.keep_ratio <= 0.25
    network = layer.ih_l1.network
    assert (network.shape(network.inputs), network.shape(network.outputs)) == ((12, 4), (24, 4))


@each_kind
def test_drop_in_for_torch(kind):
    """The arguments of torch's layer, by position, give its attributes, and its text."""
    own = (0,) if kind is nn.LSTM else ()
    args = (INPUT, HIDDEN, 2, *(("relu",) if kind is nn.RNN else ()), False, True, 0.25, True, *own)
    layer, dense = recurrent_class("cp", kind)(*args, "cpu", torch.float64, rank=2), kind(*args, dtype=torch.float64)
    for name in layer.own:
        assert getattr(layer, name) == getattr(dense, name)
    assert {f"weight_{name}" for name in layer.parts} == {name for name, _ in dense.named_parameters()}
    shapes = [[tuple(tensor.shape) for tensor in group] for group in dense.all_weights]
    assert [[tuple(tensor.shape) for tensor in group] for group in layer.all_weights] == shapes
    assert repr(layer).split("\n")[1].strip().startswith(f"{INPUT}, {HIDDEN}, num_layers=2")
    layer.flatten_parameters()
    biased = recurrent_class("cp", kind)(INPUT, HIDDEN, rank=2)
    assert {n for n, _ in kind(INPUT, HIDDEN).named_parameters() if "bias" in n} <= {*biased.state_dict()}


def test_attributes():
    layer = tnlayers.TRLSTM(INPUT, HIDDEN, rank=2)
    with pytest.raises(AttributeError, match="hidden_size is 12"):
        layer.hidden_size = 4
    layer.batch_first = True
    assert layer(torch.randn(BATCH, LENGTH, INPUT))[1][0].shape == (1, BATCH, HIDDEN)
    with pytest.raises(ValueError, match="dropout is -1"):
        layer.dropout = -1
    for change in (
        lambda: setattr(layer, "weight_ih_l0", nn.Parameter(torch.zeros(48, 8))),
        lambda: layer.register_parameter("weight_hh_l0", nn.Parameter(torch.zeros(48, 12))),
    ):
        with pytest.raises(AttributeError, match=r"cannot change a tensor layer.*set_weight_"):
            change()
    with pytest.raises(RuntimeError, match="cannot change a tensor layer"):
        layer.weight_ih_l0.zero_()
    with pytest.raises(AttributeError, match="weight_ih_l7"):
        _ = layer.weight_ih_l7
    layer.ih_l0.strategy = "factorized"
    assert layer.strategy == "mixed"
    assert layer.explain((LENGTH, BATCH, INPUT)).startswith("in time steps")


@each_kind
def test_from_and_to_dense(kind):
    torch.manual_seed(0)
    dense = kind(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64).eval()
    dense.weight_hh_l0.requires_grad_(False)
    dense.bias_ih_l0.requires_grad_(False)
    cls = recurrent_class("tucker", kind)
    word = kind.__name__.lower()
    layer = getattr(cls, f"from_{word}")(dense, rank=24)  # full rank of every weight
    x = torch.randn(LENGTH, BATCH, INPUT, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], dense(x)[0], rtol=1e-8, atol=1e-8)
    assert not layer.training
    assert not any(core.requires_grad for core in layer.hh_l0.cores)
    back = getattr(layer, f"to_{word}")()
    assert type(back) is kind
    torch.testing.assert_close(back(x)[0], layer(x)[0], rtol=1e-10, atol=1e-10)
    wanted = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == wanted
    drawn = cls.from_dense(dense, rank=2, decompose=False, plain=("hh",))
    assert torch.equal(drawn.weight_hh_l0, dense.weight_hh_l0)
    assert torch.equal(drawn.bias_hh_l1, dense.bias_hh_l1)
    with pytest.raises(
        TypeError, match=f"{word} is Linear; Tucker{kind.__name__}.from_{word} takes an nn.{kind.__name__}"
    ):
        cls.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decompose is True, but .* on the meta device"):
        cls.from_dense(kind(4, 4, device="meta"))


def test_copies_moves_and_the_meta_device():
    layer = tnlayers.HTGRU(INPUT, HIDDEN, rank=2, strategy="factorized", plain=("hh",))
    x = torch.randn(LENGTH, BATCH, INPUT)
    y = layer(x)[0]
    other = tnlayers.HTGRU(INPUT, HIDDEN, rank=2, strategy="factorized", plain=("hh",))
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x)[0], y)
        assert repr(twin) == repr(layer)
    meta = tnlayers.HTGRU(INPUT, HIDDEN, rank=2, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta(x.to("meta"))[0].is_meta
    meta.to_empty(device="cpu").reset_parameters()
    for dtype in (torch.bfloat16, torch.float64):
        for strategy in ("reconstruct", "factorized"):
            meta.to(dtype).strategy = strategy
            assert meta(x.to(dtype))[0].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for strategy in ("auto", "factorized"):
            layer.strategy = strategy
            assert torch.allclose(layer(x)[0].float(), y, atol=0.05)


def test_classes_of_a_users_format_are_made_and_unpickled():
    class Pair(tnlayers.Format):
        def text(self, inputs, outputs, kernel, rank):
            return f"{' '.join(inputs)} r, r {' '.join(outputs)}"

    made = recurrent_class(Pair, nn.GRU)
    assert made is recurrent_class(Pair, nn.GRU)
    layer = made(INPUT, HIDDEN, rank=2, dtype=torch.float64)
    x = torch.randn(LENGTH, BATCH, INPUT, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], layer.to_dense()(x)[0])


def test_flops_are_those_that_torch_counts():
    x = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)  # in float32 oneDNN hides them
    for strategy, training in itertools.product(("reconstruct", "factorized"), (True, False)):
        layer = tnlayers.TRLSTM(16, 16, 2, bidirectional=True, rank=2, dtype=torch.float64, strategy=strategy)
        layer.train(training)
        with torch.set_grad_enabled(training):
            layer(x)
            with FlopCounterMode(display=False) as counter:
                layer(x)
        assert layer.flops(x.shape) == counter.get_total_flops()
    with pytest.raises(RuntimeError, match="input_size is 16"):
        layer.flops((4, 3, 8))


@pytest.mark.usefixtures("avx512")
def test_auto_takes_steps_where_they_are_faster():
    wide = tnlayers.TRLSTM(512, 512, rank=4, in_shape=(32, 16), hidden_shape=(32, 16))
    assert wide.explain((4, 1, 512)).startswith("in time steps")
    small = tnlayers.TRLSTM(16, 16, rank=4)
    assert small.explain((50, 8, 16)).startswith("torch's fused kernel")
    assert "in time steps: " in small.explain((50, 8, 16))
    assert small.explain((50, 8, 16))._repr_html_().startswith("<div")
    x = torch.randn(4, 1, 512)
    wide.eval()
    with torch.no_grad():
        found = wide(x)[0]
        assert all(kept is not None for kept in wide._ways.values())
        wide.strategy = "reconstruct"
        torch.testing.assert_close(found, wide(x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["factorized", "reconstruct"])
def test_a_replica_of_data_parallel_trains(strategy, monkeypatch):
    """Its parameters are plain attributes, so that it has none; its plans are nevertheless those of training."""
    replication = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replication, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(
        replication,
        "_broadcast_coalesced_reshape",
        lambda tensors, *_, **__: [[each.view_as(each) for each in tensors]],
    )
    layer = tnlayers.TTLSTM(INPUT, HIDDEN, rank=2, plain=("hh",), strategy=strategy, dtype=torch.float64)
    (replica,) = replication.replicate(layer, [0])
    assert not [*replica.parameters()]
    x = torch.randn(LENGTH, BATCH, INPUT, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(each(x)[0].square().sum(), [*layer.parameters()]) for each in (replica, layer)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert {*replica._ways} == {*layer._ways}


def test_low_memory_runs_the_forward_again(monkeypatch):
    layer = tnlayers.TRLSTM(INPUT, HIDDEN, 2, dropout=0.3, rank=2, dtype=torch.float64)
    x = torch.randn(LENGTH, BATCH, INPUT, dtype=torch.float64)
    gradients = []
    for memory in ("auto", "low"):
        layer.memory = memory
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(layer(x)[0].square().sum(), [*layer.parameters()]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    calls, run = [], layer._run
    monkeypatch.setattr(layer, "_run", lambda *args: (calls.append(1), run(*args))[1])
    layer(x)[0].sum().backward()
    assert len(calls) == 2


def test_frozen_layers_keep_their_weights(monkeypatch):
    layer = tnlayers.TRLSTM(16, 16, rank=2, strategy="reconstruct").eval()
    x = torch.randn(LENGTH, BATCH, 16)
    made = []
    kernel = tnlayers.TRLinear._kernel
    monkeypatch.setattr(tnlayers.TRLinear, "_kernel", lambda self, *own: (made.append(1), kernel(self, *own))[1])
    with torch.no_grad(), tnlayers.freeze_(layer) as frozen:
        assert frozen.layers == ("ih_l0", "hh_l0")
        first = layer(x)[0]
        assert torch.equal(layer(x)[0], first)
        assert len(made) == 2
        layer.strategy = "factorized"
        torch.testing.assert_close(layer(x)[0], first)
        layer.strategy = "reconstruct"
        layer.ih_l0.cores[0].mul_(2)
        assert not torch.allclose(layer(x)[0], first)
    layer(x)
    layer.train()
    assert not layer.ih_l0.frozen


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by torch, in a graph behind a break
def test_compiles_as_torchs_layer():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = tnlayers.TRLSTM(INPUT, HIDDEN, rank=2), nn.Linear(HIDDEN, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0].relu())

    model, x = Tagger(), torch.randn(LENGTH, BATCH, INPUT)
    found = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(found, model(x))
    found.sum().backward()


def test_layers_of_a_model_become_plain_and_tensor_layers_again():
    model = nn.ModuleDict({"rnn": tnlayers.TRLSTM(16, 16, rank=2)})
    x = torch.randn(LENGTH, BATCH, 16)
    before = model["rnn"](x)[0]
    tnlayers.densify_(model)
    assert type(model["rnn"]) is nn.LSTM
    torch.testing.assert_close(model["rnn"](x)[0], before)
    tnlayers.tensorize_(model, TensorizeConfig("cp", rank=2, kinds=("recurrent",)))
    assert type(model["rnn"].hh_l0) is tnlayers.CPLinear
    assert model["rnn"](x)[0].shape == before.shape


@pytest.mark.parametrize("strategy", ["reconstruct", "factorized", "auto"])
def test_ranks_of_the_weights_change_in_place(strategy, recwarn):
    torch.manual_seed(0)
    layer = tnlayers.TTLSTM(16, 16, 2, rank=3, strategy=strategy, dtype=torch.float64)
    x = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(x)[0].square().sum().backward()
    optimizer.step()
    before = layer(x)[0]
    for part in layer.parts.values():
        part.grow_(5, optimizer=optimizer)
    torch.testing.assert_close(layer(x)[0], before, rtol=0, atol=1e-10)
    kernel = layer.weight_hh_l0.detach()
    error = layer.hh_l0.truncate_(2, optimizer=optimizer)
    assert float((layer.weight_hh_l0.detach() - kernel).norm() / kernel.norm()) == pytest.approx(error, abs=1e-6)
    assert {*layer.hh_l0.rank.values()} == {2}
    torch.testing.assert_close(layer(x)[0], layer.to_dense()(x)[0], rtol=0, atol=1e-10)
    after = layer(x)[0]
    layer(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.allclose(layer(x)[0], after)
    assert {id(core) for part in layer.parts.values() for core in part.cores} <= {
        id(parameter) for group in optimizer.param_groups for parameter in group["params"]
    }


@each_kind
@pytest.mark.parametrize("strategy", ["reconstruct", "factorized"])
def test_rank_dropout_thins_each_weight_once_in_a_forward(kind, strategy):
    """The outputs are those of a weight without some of its terms, the same one at all time steps."""
    torch.manual_seed(0)
    layer = recurrent_class("cp", kind)(8, 8, rank=2, strategy=strategy, dtype=torch.float64)
    x = torch.randn(LENGTH, BATCH, 8, dtype=torch.float64)
    twin = layer.to_dense()
    tnlayers.rank_dropout_(layer, 0.5, include="hh_l0")
    columns, rows = layer.hh_l0.cores
    expected = []
    for kept in ([0], [1], [0, 1]):
        twin.weight_hh_l0.data = (rows[:, kept] @ columns[:, kept].T).detach() / (1 - 0.5 + 0.5**2 / 2)
        expected.append(twin(x)[0])
    outputs = [layer(x)[0] for _ in range(12)]
    near = [{k for k, y in enumerate(expected) if torch.allclose(output, y, rtol=0, atol=1e-10)} for output in outputs]
    assert all(near)
    assert len(set.union(*near)) == 3
    layer.eval()
    torch.testing.assert_close(layer(x)[0], layer.to_dense()(x)[0], rtol=0, atol=1e-10)


def net(layer: Any) -> nn.Module:
    return nn.ModuleDict({"rnn": layer, "head": nn.Linear(HIDDEN, 2)})


@pytest.mark.parametrize("own", [{"rank": 2}, {"rank": 2, "plain": ("hh",), "num_layers": 2, "bias": False}], ids=str)
def test_saved_models_load_into_plain_ones_and_into_their_own(own, tmp_path):
    torch.manual_seed(0)
    path, x = tmp_path / "model.safetensors", torch.randn(LENGTH, BATCH, INPUT)
    model = net(tnlayers.TTLSTM(INPUT, HIDDEN, **own, strategy="factorized"))
    tnlayers.save_tensorized(model, path)
    torchs = {key: value for key, value in own.items() if key in ("num_layers", "bias")}
    for made in (nn.LSTM(INPUT, HIDDEN, **torchs), tnlayers.TTLSTM(INPUT, HIDDEN, **own)):
        loaded = tnlayers.load_tensorized(lambda made=made: net(made), path)
        assert type(loaded["rnn"]) is tnlayers.TTLSTM
        assert loaded["rnn"].strategy == "factorized"
        assert torch.equal(loaded["rnn"](x)[0], model["rnn"](x)[0])
    for made, text in (
        (nn.LSTM(INPUT, HIDDEN, 3), "has TTLSTM.*but the model has LSTM"),
        (nn.GRU(INPUT, HIDDEN), "has TTLSTM.*but the model has GRU"),
        (tnlayers.CPLSTM(INPUT, HIDDEN, **own), "has TTLSTM.*but the model has CPLSTM"),
    ):
        with pytest.raises(ValueError, match=text):
            tnlayers.load_tensorized(lambda made=made: net(made), path)
    with pytest.raises(ValueError, match="the file has the recurrent layer 'rnn', but the model has no module"):
        tnlayers.load_tensorized(lambda: nn.Sequential(nn.Linear(2, 2)), path)
    holder = net(nn.LSTM(INPUT, HIDDEN, **torchs))
    holder.kept = [holder["rnn"]]
    with pytest.raises(ValueError, match=r"layer 'rnn': .*holds it too"):
        tnlayers.load_tensorized(lambda: holder, path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "Linear"}, "kind is 'Linear'; accepted: 'LSTM', 'GRU', 'RNN'"),
        ({"format": "xx"}, "format is 'xx'"),
        ({"options": {"network": 1}}, "options has the key 'network'"),
        ({"arguments": {}}, "arguments has no 'input_size'"),
        ({"more": 1}, "description has the key 'more'"),
        ({"format": "x" * 20000}, "description has 20,"),
    ],
)
def test_a_description_is_checked(change, text):
    description = describe_recurrent(tnlayers.TRGRU(4, 8, rank=2))
    assert outline_recurrent(description) == (tnlayers.TRGRU, {}, description["arguments"])
    with pytest.raises(ValueError, match=text):
        outline_recurrent(description | change)


def test_weights_in_one_buffer_are_the_same():
    """For cuDNN, which takes matrices first."""
    layer = tnlayers.TRLSTM(4, 6, 2, proj_size=2, rank=2)
    weights = [tensor for group in layer.all_weights for tensor in group]
    found = _in_one_buffer(weights)
    assert all(map(torch.equal, found, weights))
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
    assert max(w.storage_offset() for w in found if w.ndim > 1) < min(w.storage_offset() for w in found if w.ndim == 1)
    sum(each.sum() for each in found).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_layer_with_members_of_its_own_is_not_saved(tmp_path):
    class Own(tnlayers.TRLSTM):
        def extra(self):
            return 1

    with pytest.raises(TypeError, match="Own has its own extra"):
        tnlayers.save_tensorized(Own(4, 8, rank=2), tmp_path / "model.safetensors")


LAYERS = [each for each in vars(recurrent_by_format).values() if getattr(each, "format_type", None)]


def test_every_format_has_every_kind():
    assert {(each.format_type, each.dense_type) for each in LAYERS} == {
        (form, kind) for form in tnlayers.FORMATS.values() for kind in KINDS
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_show_their_arguments(layer):
    described = layer.__doc__.partition("Args:")[2].partition("\n\n")[0]
    for argument in (*layer.own, "device", "dtype", "rank", "hidden_shape", "plain", "init", "strategy", "memory"):
        assert argument in described
    for option in (field.name for field in fields(layer.format_type)):
        assert f"{option}: " in described
    assert layer.__doc__.count("Example:\n") == 1
    assert f"{layer.__name__}(16, 32" in layer.__doc__.partition("Example:\n")[2]


def test_init_std():
    layer = tnlayers.TRConv2d(8, 12, 3, rank=2, init=tnlayers.Init(std=0.02), dtype=torch.float64)
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(0.02)
    assert layer.variance.weight_std == pytest.approx(0.02)
    assert layer.variance.gain == pytest.approx(0.02 * 72**0.5)
    for value, error in ((0, ValueError), (float("inf"), ValueError), ("x", TypeError), (True, TypeError)):
        with pytest.raises(error, match="std is"):
            tnlayers.Init(std=value)
