"""Embeddings and bags of every format against torch's."""

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnlayers
from cases import TABLE_CASES, TABLES, TableCase
from tnlayers import Init, testing
from tnlayers.formats.base import factorize_up
from tnlayers.layers.description import build, describe
from tnlayers.layers.registry import TABLES as REGISTERED
from tnlayers.layers.registry import layer_class

STRATEGIES = ("auto", "reconstruct", "factorized")
EMBEDDINGS = [case for case in TABLE_CASES if case.kind == "Embedding"]
BAGS = [case for case in TABLE_CASES if case.kind == "EmbeddingBag"]


def test_every_format_has_tables_and_cases():
    assert [kind.__name__ for kind in REGISTERED] == list(TABLES)
    for name, form in tnlayers.FORMATS.items():
        for kind, base in REGISTERED.items():
            layer = getattr(tnlayers, f"{form.__name__}{kind.__name__}")
            assert issubclass(layer, base)
            assert layer is layer_class(name, kind)
            assert any(case.format == name and case.layer is layer for case in TABLE_CASES)


@pytest.mark.parametrize("keeps", testing.PROMISES.values(), ids=testing.PROMISES)
@pytest.mark.parametrize("case", [case for case in TABLE_CASES if "padding_idx" in case.arguments], ids=str)
def test_promise(case: TableCase, keeps: Any):
    torch.manual_seed(0)
    keeps(case.make)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def same_gradients(layer: Any, weight: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The cores' gradients are those that the table's gives through the table."""
    along = torch.randn_like(expected)
    (for_table,) = torch.autograd.grad(expected, [weight], along, retain_graph=True)
    through = torch.autograd.grad(layer.weight, [*layer.cores], for_table)
    own = torch.autograd.grad(found, [*layer.cores], along, retain_graph=True)
    for one, other in zip(own, through, strict=True):
        close(one, other)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_outputs_and_gradients_are_torch_s(case: TableCase, strategy: str):
    torch.manual_seed(0)
    for memory, scale in (("auto", True), ("low", False)):
        options = {"scale_grad_by_freq": scale, "dtype": torch.float64}
        layer: Any = case.make(strategy=strategy, memory=memory, **options)
        dense = nn.Embedding(layer.num_embeddings, 8, layer.padding_idx, **options)
        with torch.no_grad():
            dense.weight.copy_(layer.weight)
        rows = layer.num_embeddings
        for shape in ((), (0,), (6,), (3, 4), (2, 3, 2)):
            for dtype in (torch.int64, torch.int32):
                x = torch.randint(rows, shape, dtype=dtype)
                found, expected = layer(x), dense(x)
                assert found.shape == expected.shape
                close(found, expected)
        x = torch.randint(rows, (40,))
        x[:3] = 2  # the padding index of some cases
        same_gradients(layer, dense.weight, layer(x), dense(x))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_any_factors(data: st.DataObject):
    """Every order is one of the same function, also where an index has several digits in a core."""
    rows, columns = (tuple(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))) for n in (3, 2))
    network = "i1 i3 a, a b i2 o1, b c o2, c i2"
    order = data.draw(st.sampled_from(["0 > 1 > 2 > 3", "0*1 > 2*3", "3*2 > 0 > 1", "1 > 0*2 > 3", "0*1*2*3"]))
    most = rows[0] * rows[1] * rows[2]
    count = data.draw(st.integers(max(1, most - 2), most))
    layer = tnlayers.EinsumEmbedding(
        count, columns[0] * columns[1], rank=2, network=network, in_shape=rows, out_shape=columns, strategy=order,
        dtype=torch.float64, init=Init(std=0.5, exact=False),
    )  # fmt: skip
    x = torch.arange(count)
    close(layer(x), layer.weight)
    sizes = network.replace("i1", "x").replace("i2", "y").replace("i3", "z").replace("o1", "u").replace("o2", "v")
    equation = sizes.replace(" ", "").replace(",", ",") + "->xyzuv"
    table = torch.einsum(equation, *layer.cores).reshape(most, -1)[:count]
    close(layer.weight, table)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_no_bags_give_no_rows(padding: int | None, last: bool):
    """With a padding_idx, torch 2.13 crashes."""
    layer = tnlayers.TTEmbeddingBag(12, 8, padding_idx=padding, include_last_offset=last, rank=2)
    found = layer(torch.tensor([1, 2]), torch.zeros(int(last), dtype=torch.int64))
    assert found.shape == (0, 8)
    found.sum().backward()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("case", BAGS, ids=str)
def test_bags_are_torch_s(case: TableCase, mode: str):
    torch.manual_seed(0)
    for padding, last in ((None, False), (2, True)):
        layer: Any = case.make(mode=mode, padding_idx=padding, include_last_offset=last, dtype=torch.float64)
        dense = layer.to_dense()
        assert type(dense) is nn.EmbeddingBag
        x = torch.randint(layer.num_embeddings, (11,))
        x[0] = 2
        for offsets in (torch.tensor([0, 1, 1, 5, 11 if last else 9]), torch.tensor([0, 0], dtype=torch.int32)):
            given = x[: 11 * bool(offsets.any())].to(offsets.dtype)  # the second: empty bags alone
            found, expected = layer(given, offsets), dense(given, offsets)
            assert found.shape == expected.shape
            close(found, expected)
        same_gradients(layer, dense.weight, layer(x, offsets := torch.tensor([0, 4, 11])), dense(x, offsets))
        for rows in (x[:10].reshape(5, 2), x[:0].reshape(0, 2)):
            close(layer(rows), dense(rows))
    if mode == "sum":
        weights = torch.rand(11, dtype=torch.float64, requires_grad=True)
        found, expected = layer(x, offsets, weights), dense(x, offsets, weights)
        same_gradients(layer, dense.weight, found, expected)
        close(*(torch.autograd.grad(y.sum(), weights)[0] for y in (found, expected)))


def test_bags_scale_gradients_by_frequency():
    """Against a sum over torch's embedding: in torch 2.13 its bag divides by other indices' counts (issue 190063)."""
    layer = tnlayers.TTEmbeddingBag(12, 8, rank=2, mode="sum", scale_grad_by_freq=True, dtype=torch.float64)
    dense = nn.Embedding.from_pretrained(layer.weight.detach(), freeze=False, scale_grad_by_freq=True)
    x = torch.tensor([[0, 0, 0, 1, 5], [5, 7, 7, 0, 2]])
    same_gradients(layer, dense.weight, layer(x), dense(x).sum(1))


def test_a_padded_vocabulary():
    """Primes and other sizes without even factors, and none that have them."""
    for rows, shape in ((50257, (225, 224)), (30522, (175, 175)), (32768, (256, 128)), (32000, (200, 160))):
        layer: Any = tnlayers.TTEmbedding(rows, 8, rank=2, device="meta")
        assert layer.network.shape(layer.network.inputs) == shape
        assert layer.padded_embeddings == shape[0] * shape[1] >= rows == layer.num_embeddings
        assert (f"padded_to={shape[0] * shape[1]}" in repr(layer)) == (rows != shape[0] * shape[1])
    assert tnlayers.TREmbedding(50257, 8, device="meta").padded_embeddings == 50257  # one factor needs no padding
    assert tnlayers.BTTEmbedding(50257, 8, device="meta").padded_embeddings == 37**3
    layer = tnlayers.TTEmbedding(13, 8, rank=2, in_shape=(5, 4))
    assert layer.padded_embeddings == 20
    assert layer.keep_ratio == layer.network.num_params / (13 * 8)
    with pytest.raises(ValueError, match=r"in_shape \(4, 3\) has product 12, but num_embeddings is 13; it must be at"):
        tnlayers.TTEmbedding(13, 8, in_shape=(4, 3))


@given(st.integers(1, 10**7), st.integers(1, 4))
def test_factors_of_a_padded_size_are_even(number: int, parts: int):
    shape = factorize_up(number, parts)
    product = 1
    for factor in shape:
        product *= factor
    assert len(shape) == parts
    assert shape == tuple(sorted(shape, reverse=True))
    assert number <= product <= number * (1 + 1 / number ** (1 / parts)) ** parts


@pytest.mark.parametrize("rows", [16, 13])
def test_indices_out_of_range_raise_as_in_torch(rows: int):
    layer = tnlayers.TTEmbedding(rows, 8, rank=2)
    for wrong in (rows, -1, 20):
        with pytest.raises(IndexError, match=rf"input has indices from .*{wrong}.*num_embeddings is {rows}, so 0 to"):
            layer(torch.tensor([wrong]))
    for strategy in STRATEGIES:
        layer.strategy = strategy
        with pytest.raises(IndexError):
            layer(torch.tensor([[0, rows]]))


def test_the_padding_row_is_a_constant():
    """Zero in the function and without gradient; a row that a fit brings along is kept as it is, as in torch."""
    layer: Any = tnlayers.TTEmbedding(12, 8, padding_idx=-2, rank=3)
    assert layer.padding_idx == 10
    assert not layer(torch.tensor([10, 10])).any()
    assert not layer.weight[10].any()
    torch.autograd.backward(layer(torch.tensor([10])).sum())
    assert not any(core.grad.any() for core in layer.cores)
    pretrained = torch.randn(12, 8)
    layer = tnlayers.TTEmbedding.from_pretrained(pretrained, padding_idx=10, rank=3)
    assert not any(core.requires_grad for core in layer.cores)
    assert torch.equal(layer(torch.tensor([10]))[0], pretrained[10])
    assert torch.equal(layer.to_embedding().weight[10], pretrained[10])
    layer.reset_parameters()
    assert not layer.padding_row.any()


def test_fits():
    """Exact where the network can hold the table; the error is that of the rows that indices reach."""
    torch.manual_seed(0)
    table = torch.randn(13, 8, dtype=torch.float64)
    for padding in (None, 4):
        dense = nn.Embedding(13, 8, padding, scale_grad_by_freq=True, _weight=table.clone()).eval()
        layer = tnlayers.TTEmbedding.from_embedding(dense, rank=16)
        assert not layer.training
        assert layer.scale_grad_by_freq
        close(layer.weight, table)
        assert layer.set_weight_(table) < 1e-12
        low = tnlayers.TTEmbedding.from_embedding(dense, rank=2)
        error = low.set_weight_(table)
        assert error == pytest.approx(float((low.weight.detach() - table).norm() / table.norm()), abs=1e-12)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 13\); it must be \(13, 8\)"):
        layer.set_weight_(table.T)
    with pytest.raises(ValueError, match="moments is given, but TTEmbedding sums over no inputs"):
        layer.set_weight_(table, moments=torch.eye(13))
    with pytest.raises(TypeError, match=r"embedding is Linear; TTEmbedding\.from_embedding takes an nn.Embedding"):
        tnlayers.TTEmbedding.from_embedding(nn.Linear(2, 2))


@pytest.mark.parametrize("case", EMBEDDINGS, ids=str)
def test_variance(case: TableCase):
    """Each draw has the std of nn.Embedding, or any other, over the rows that are reached and not the padding row."""
    for std in (None, 0.02):
        layer: Any = case.make(dtype=torch.float64, **({} if std is None else {"init": Init(std=std)}))
        rows = [row for row in range(layer.num_embeddings) if row != layer.padding_idx]
        assert float(layer.weight[rows].detach().square().mean().sqrt()) == pytest.approx(std or 1.0, rel=1e-10)
        assert layer.variance.weight_std == pytest.approx(std or 1.0)


def test_init_takes_a_std_in_place_of_a_rule():
    layer = tnlayers.TRLinear(16, 12, rank=3, init=Init(std=0.02), dtype=torch.float64)
    assert float(layer.weight.detach().square().mean().sqrt()) == pytest.approx(0.02)
    assert layer.variance.gain == pytest.approx(0.02 * 4)
    for arguments, sentence in (
        ({"std": 0.0}, "std is 0.0; it must be positive"),
        ({"std": "1"}, "std is '1'; it must be a number"),
        ({"std": 1.0, "mode": "fan_out"}, "mode is 'fan_out', but std is 1.0 and takes its place"),
        ({"std": 1.0, "nonlinearity": "tanh"}, "nonlinearity is 'tanh', but std is 1.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            Init(**arguments)
    with pytest.raises(ValueError, match="init has the mode 'fan_out', but a lookup sums over no inputs"):
        tnlayers.TREmbedding(16, 12, rank=3, init="fan_out")
    with pytest.raises(ValueError, match="init has typical=True"):
        tnlayers.TREmbedding(16, 12, rank=3, init=Init(std=1.0, typical=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_norm": 1.0}, "max_norm is 1.0; it must be None: .* share the cores"),
        ({"norm_type": "two"}, "norm_type is 'two'; it must be a number"),
        ({"sparse": True}, "sparse is True; it must be False: .* other rows share"),
        ({"padding_idx": 12}, "padding_idx is 12; it must be from -12 to 11"),
        ({"padding_idx": 1.5}, "padding_idx is 1.5; it must be an integer or None"),
        ({"num_embeddings": 0}, "num_embeddings is 0"),
        ({"strategy": "fast"}, "strategy is 'fast'"),
        ({"bias": True}, "TREmbedding has no such argument"),
        ({"_weight": torch.ones(12, 8)}, r"_weight is tensor.{,30}, but TREmbedding has no such argument"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], sentence: str):
    with pytest.raises((TypeError, ValueError), match=sentence):
        tnlayers.TREmbedding(**({"num_embeddings": 12, "embedding_dim": 8, "rank": 2} | arguments))


def test_inputs_that_are_refused():
    layer, bag = tnlayers.TREmbedding(12, 8, rank=2), tnlayers.TREmbeddingBag(12, 8, rank=2)
    for table, kind, sentence in (
        ([[1.0, 2.0]], TypeError, r"embeddings is of type list; TREmbedding.*\.from_pretrained takes a torch.Tensor"),
        (
            torch.ones(2, 3, 4),
            ValueError,
            r"embeddings has shape \(2, 3, 4\); it must be \(num_embeddings, embedding_dim\)",
        ),
    ):
        for each in (layer, bag):
            with pytest.raises(kind, match=sentence):
                each.from_pretrained(table, rank=1)
    x = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"input has dtype torch\.float32; it must be torch\.int64"):
        layer(x.float())
    with pytest.raises(TypeError, match="input is of type list"):
        layer([0, 1])
    for arguments, sentence in (
        ((x, [0]), "offsets is of type list; TREmbeddingBag takes a torch.Tensor"),
        ((x, x, [1.0, 1.0]), "per_sample_weights is of type list; TREmbeddingBag takes"),
    ):
        with pytest.raises(TypeError, match=sentence):
            bag(*arguments)
    for name, holder in (("scale_grad_by_freq", layer), ("include_last_offset", bag)):
        with pytest.raises(TypeError, match=f"{name} is 1; it must be True or False"):
            setattr(holder, name, 1)
        setattr(holder, name, True)
    with pytest.raises(RuntimeError, match=r"layer\.to_dense\(\) gives a plain layer"):
        nn.init.zeros_(layer.weight)
    for arguments, sentence in (
        ((x,), r"input has shape \(2,\); it must have two axes, or one with offsets"),
        ((x[None], x), r"offsets is given, but input has shape \(1, 2\)"),
        ((x, x[:1], torch.ones(3)), r"per_sample_weights has shape \(3,\), but input has \(2,\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bag(*arguments)
    with pytest.raises(ValueError, match="scale_grad_by_freq is True, but mode is 'max'"):
        tnlayers.TREmbeddingBag(12, 8, mode="max", scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="mode is 'min'"):
        tnlayers.TREmbeddingBag(12, 8, mode="min")


POSITIONAL = {"Embedding": (12, 8, 2, None, 2.0, True, False), "EmbeddingBag": (12, 8, None, 2.0, False, "sum", False)}
NAMED: dict[str, dict[str, Any]] = {"Embedding": {}, "EmbeddingBag": {"include_last_offset": True, "padding_idx": 2}}


@pytest.mark.parametrize("kind", TABLES)
def test_drop_in_for_torch(kind: str):
    """The arguments of torch's layer, by position, give its attributes and its text."""
    layer = getattr(tnlayers, f"TR{kind}")(*POSITIONAL[kind], **NAMED[kind], rank=2)
    dense = layer.dense_type(*POSITIONAL[kind], **NAMED[kind])
    for name in dense.__constants__:
        assert getattr(layer, name) == getattr(dense, name)
    count = len(POSITIONAL[kind])
    names = [[*inspect.signature(each).parameters][:count] for each in (type(layer), type(dense))]
    assert names[0] == names[1]
    assert layer.weight.shape == dense.weight.shape
    assert dense.extra_repr() in repr(layer)
    with pytest.raises(AttributeError, match="num_embeddings is 12, and the cores are made for it"):
        layer.num_embeddings = 13


@pytest.mark.parametrize("case", TABLE_CASES, ids=str)
def test_a_description_makes_the_layer_again(case: TableCase):
    layer: Any = case.make(init=Init(split="equal"), dtype=torch.float64, strategy="factorized")
    description = json.loads(json.dumps(describe(layer), allow_nan=False))
    again: Any = build(description, device="meta")
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    again.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert describe(again) == description
    assert torch.equal(again.weight, layer.weight)


class Words(nn.Module):
    """A model of words, with an output that is tied or not."""

    def __init__(self, tensor: bool, tied: bool = False):
        super().__init__()
        self.embedding: Any = tnlayers.TTEmbedding(13, 8, 2, rank=3) if tensor else nn.Embedding(13, 8, 2)
        self.head: Any = tnlayers.TiedLinear(self.embedding, bias=True) if tied else nn.Linear(8, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(x)))


def test_files(tmp_path):
    x, path = torch.arange(13), tmp_path / "model.safetensors"
    for tied in (False, True):
        model = Words(True, tied)
        tnlayers.save_tensorized(model, path)
        again = tnlayers.load_tensorized(lambda tied=tied: Words(tied, tied), path)
        assert type(again.embedding) is tnlayers.TTEmbedding
        assert torch.equal(again(x), model(x))
        if tied:
            assert again.head.embedding is again.embedding


@pytest.mark.parametrize("padding", [None, 2])
def test_a_tied_output(padding: int | None):
    torch.manual_seed(0)
    embedding: Any = tnlayers.TTEmbedding(13, 8, padding, rank=3, dtype=torch.float64)
    head = tnlayers.TiedLinear(embedding, bias=True)
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    for strategy in STRATEGIES:
        head.strategy = strategy
        found, expected = head(x), F.linear(x, embedding.weight, head.bias)
        close(found, expected)
        wanted = [x, head.bias, *embedding.cores]
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted), strict=True,
        ):  # fmt: skip
            close(one, other)
    assert head(x[0, 0]).shape == (13,)
    assert head(x[:0]).shape == (0, 5, 13)
    with pytest.raises(ValueError, match=r"input has shape \(4, 5, 13\); TiedLinear takes \(\*, 8\)"):
        head(found.detach())
    with pytest.raises(TypeError, match="embedding is Embedding; it must be a tensor embedding"):
        tnlayers.TiedLinear(nn.Embedding(3, 4))


def test_the_tie_survives():
    """Copies, pickles, state_dicts, moves and densify_; gradients of both uses add up in the same cores."""
    model, x = Words(True, tied=True).double(), torch.arange(13)
    assert len([*model.parameters()]) == len(model.embedding.cores) + 1
    other = Words(True, tied=True).double()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(x), model(x))
        assert twin.head.cores is twin.embedding.cores
    plain = copy.deepcopy(model)
    tnlayers.densify_(plain)
    assert type(plain.embedding) is nn.Embedding
    close(plain(x), model(x))
    torch.autograd.backward(model(x).square().sum())
    torch.autograd.backward(plain(x).square().sum())
    through = torch.autograd.grad(model.embedding.weight, [*model.embedding.cores], plain.embedding.weight.grad)
    keep = torch.arange(13) != 2  # torch's own tie trains the padding row through the output
    assert keep.sum() == 12
    for core, expected in zip(model.embedding.cores, through, strict=True):
        assert core.grad.shape == expected.shape
        close(core.grad, expected)


def test_a_tied_output_follows_the_ranks_of_the_embedding():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Words(True, tied=True).double(), torch.arange(13)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = model(x)
    close(compiled(x), before)
    model.embedding.grow_(5)
    close(model(x), before)
    close(compiled(x), before)
    assert model.head.rank == model.embedding.rank
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        twin.embedding.truncate_(2)
        twin.head.strategy = "factorized"
        close(twin(x), F.linear(torch.tanh(twin.embedding(x)), twin.embedding.weight, twin.head.bias))
        assert twin.head.explain((13, 8)).count(":2") > 0
        assert twin.head.strategy == "factorized"


def test_rank_dropout_thins_a_tied_output_too():
    """With p near 1 one term of the table is left, in the embedding's forward and in the head's."""
    torch.manual_seed(0)
    embedding: Any = tnlayers.CPEmbedding(12, 8, rank=2, dtype=torch.float64)
    model = nn.ModuleList([embedding, tnlayers.TiedLinear(embedding)])
    tnlayers.rank_dropout_(model, 0.5)
    assert model[1].rank_dropout == 0.5
    rows, columns = (core.detach() for core in embedding.cores)
    x = torch.randn(3, 8, dtype=torch.float64)
    terms = [(x @ columns[:, kept]) @ rows[:, kept].T / 0.625 for kept in ([0], [1], [0, 1])]
    found = [{k for k, term in enumerate(terms) if torch.allclose(model[1](x), term)} for _ in range(12)]
    assert set.union(*found) == {0, 1, 2}
    model.eval()
    close(model[1](x), F.linear(x, embedding.weight))
    model[1].rank_dropout = 0.25
    assert embedding.rank_dropout == 0.25


def test_plans():
    """Few indices are gathered from the cores, many from the table; explain says so; sizes that are open compile."""
    layer: Any = tnlayers.TTEmbedding(4096, 64, rank=8, in_shape=(64, 64))
    assert layer.explain((4, 4)).startswith("factorized plan of 'i1 o1 r1, r1 i2 o2' for 16 indices, training")
    many = layer.explain((1 << 20,))
    assert many.startswith("reconstruct")
    assert "runner-up: factorized" in layer.explain((4096,))
    assert "rates: cpu" in many
    layer.strategy = "0 > 1"
    assert layer.explain((1 << 20,)).startswith("factorized")


def test_training_keeps_to_the_memory_of_a_table():
    """Slices of a large rank would take many times the table's memory for many tokens, and are then not gathered."""
    ring = tnlayers.TREmbedding(400, 16, rank=40, in_shape=(20, 20), device="meta")
    assert ring.explain((100_000,)).startswith("reconstruct")


def test_frozen_tables_are_kept():
    layer: Any = tnlayers.TTEmbedding(13, 8, rank=3).eval()
    x = torch.arange(13)
    expected = layer(x).detach()
    with torch.no_grad(), tnlayers.freeze_(layer):
        assert torch.equal(layer(x), expected)
        kept = [*layer._executor._weights.values()]
        assert len(kept) == 1
        assert sum(each.size for each in kept) <= layer.padded_embeddings * 8 * 4
        layer.cores[0].mul_(2)
        torch.testing.assert_close(layer(x), 2 * expected)
    layer(x)
    assert not layer.frozen


def test_tools_take_models_with_tables():
    model, x = Words(True, tied=True), torch.randint(13, (4, 3))
    row = tnlayers.summary(model, x).rows[0]
    assert (row.params, row.dense_params, row.dense_flops) == (model.embedding.network.num_params, 13 * 8, 0)
    assert row.flops == model.embedding.flops(x.shape)
    assert "embedding" in str(tnlayers.signal(model, x))
    found = tnlayers.autotune(model, x, candidates=2)
    assert {*found} == {"embedding", "head"}
    tnlayers.calibrate_(model, x)
    assert torch.isfinite(tnlayers.frobenius_penalty(model))
    with pytest.raises(TypeError, match="layer is of type TTEmbedding"):
        tnlayers.compare(model.embedding)


def test_functional_transforms_and_second_derivatives():
    layer: Any = tnlayers.TTEmbedding(13, 8, 2, rank=2, dtype=torch.float64, scale_grad_by_freq=True)
    x = torch.randint(13, (3, 4))
    cores = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    found = torch.func.grad(loss)(cores)
    layer(x).square().sum().backward()
    for name, value in layer.named_parameters():
        close(found[name], value.grad)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in cores.items()}
    both = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, (x,)))(stacked)
    close(both, torch.stack([layer(x), 4 * layer(x)]))
    layer.memory = "low"
    for name, value in torch.func.grad(loss)(cores).items():
        close(value, found[name])
    layer.scale_grad_by_freq = False
    close(torch.func.vmap(layer)(x), layer(x))
    assert torch.autograd.gradgradcheck(lambda core: F.embedding(x, core), torch.randn(13, 2).double().requires_grad_())


def test_compiled_and_exported():
    torch._dynamo.reset()
    model, x = Words(True, tied=True), torch.randint(13, (2, 6))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (6, 3, 4):
        torch.testing.assert_close(compiled(x[:, :length]), model(x[:, :length]))
    sizes = ({1: torch.export.Dim("length", min=2, max=64)},)
    exported = torch.export.export(model.embedding.eval(), (x,), dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(x[:, :4]), model.embedding(x[:, :4]))


def test_autocast_looks_up_in_the_cores_dtype():
    layer, x = tnlayers.TTEmbedding(13, 8, rank=2), torch.arange(13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer.to_embedding()(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_fan_in_is_the_standard_deviation_of_torchs_embedding(kind):
    layer_type = getattr(tnlayers, f"TR{kind}")
    for init in ("fan_in", "unit", tnlayers.Init(), tnlayers.Init(std=1.0)):
        layer = layer_type(20, 8, rank=3, init=init, dtype=torch.float64)
        assert layer.weight.detach().square().mean() == pytest.approx(1, abs=1e-10)
    model = torch.nn.Sequential(getattr(torch.nn, kind)(20, 8))
    tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tr", rank=3, kinds=("embedding",), decompose=False))
    assert model[0].weight.detach().square().mean() == pytest.approx(1, abs=1e-5)
    for wrong in ("fan_out", tnlayers.Init(nonlinearity="linear")):
        with pytest.raises(ValueError, match=r"a lookup sums over no inputs; give its std"):
            layer_type(20, 8, rank=3, init=wrong)


def test_what_the_constructor_refuses_together_cannot_be_set_later():
    bag = tnlayers.TREmbeddingBag(12, 8, mode="max", rank=2)
    with pytest.raises(ValueError, match="scale_grad_by_freq is True, but mode is 'max'"):
        bag.scale_grad_by_freq = True
    assert bag.scale_grad_by_freq is False
    bag.scale_grad_by_freq = False
    other = tnlayers.TREmbeddingBag(12, 8, mode="sum", rank=2)
    other.scale_grad_by_freq = True
    assert other.scale_grad_by_freq
    for name, value in (("mode", "max"), ("max_norm", 1.0), ("sparse", True)):
        with pytest.raises(AttributeError, match=f"{name} is "):
            setattr(other, name, value)
