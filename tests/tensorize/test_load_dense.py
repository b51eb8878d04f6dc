"""A dense model's state in a model of tensor layers: values, reports, and errors that change nothing."""

import copy

import pytest
import torch
from torch import nn

import tnlayers
from cases import CASES
from tnlayers.tensorize.load_dense import load_dense_


def dense():
    torch.manual_seed(0)
    parts = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(4, 8)
    model = nn.Sequential(*parts).double()
    model[1].running_mean.normal_()
    return model


def tensors(**options):
    model = dense()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tucker", decompose=False, **options))
    return model


def test_it_gives_what_tensorize_gives():
    model, expected = tensors(rank=2), dense()
    config = tnlayers.TensorizeConfig("tucker", rank=2)
    theirs = tnlayers.tensorize_(expected, config)
    report = load_dense_(model, dense().state_dict(), workers=2, progress=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    assert report.layers == theirs.layers
    assert report.model_params == theirs.model_params
    assert str(report) == str(theirs)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "ConvTranspose1d"], ids=str)
def test_every_format_loads(case):
    torch.manual_seed(1)
    layer, source = case.make(dtype=torch.float64), case.make(dtype=torch.float64).to_dense()
    twin = copy.deepcopy(layer)
    report = load_dense_(layer, source.state_dict())
    assert report[""].error == twin.set_weight_(source.weight)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, source.bias, rtol=0, atol=0)


def test_a_layer_with_two_names_is_fitted_once():
    layer = tnlayers.CPLinear(4, 4, rank=4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plain = nn.Linear(4, 4)
    state = nn.Sequential(plain, nn.ReLU(), plain).state_dict()
    report = load_dense_(model, state)
    assert report["2"] is report["0"]
    assert len(report) == 1
    with pytest.raises(ValueError, match=r"other values in 2.weight than in 0.weight"):
        load_dense_(model, state | {"2.weight": torch.zeros(4, 4)})


NAN = torch.full((8, 4), float("nan"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: state.pop("0.weight"), r"lacks 0.weight; it must have"),
        (lambda state: state.update({"x": 1, "y": 2, "z": 3, "u": 4}), r"also has x, y, z, and 1 more; it must"),
        (lambda state: state.update(state.pop("new")), "lacks .* also has 0.cores.0, .*use model.load_state_dict"),
        (lambda state: state.update({"2.weight": torch.ones(4, 6, 2, 2)}), r"\(4, 6, 2, 2\) in 2.weight; it must be"),
        (lambda state: state.update({"1.bias": torch.ones(5)}), r"has the shape \(5,\) in 1.bias; it must be \(6,\)"),
        (lambda state: state.update({"1.bias": [0.0] * 6}), r"has a list in 1.bias; it must be a tensor of shape"),
        (lambda state: state.update({"4.weight": NAN}), r"4: weight .*NaN"),
    ],
)
def test_errors_change_nothing(change, error):
    model, state = tensors(rank=2), dict(dense().state_dict())
    before = copy.deepcopy(model.state_dict())
    if "cores" in error:
        state = {"new": dict(before)}
    change(state)
    with pytest.raises((TypeError, ValueError), match=error):
        load_dense_(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_arguments_are_checked():
    model = tensors(rank=2)
    with pytest.raises(ValueError, match=r"model has no tensor layer; for a dense model use model.load_state_dict"):
        load_dense_(dense(), dense().state_dict())
    with pytest.raises(TypeError, match="state_dict is of type Sequential; it must be the mapping"):
        load_dense_(model, dense())
    with pytest.raises(ValueError, match="workers is 0"):
        load_dense_(model, dense().state_dict(), workers=0)
    with pytest.raises(ValueError, match="0 is on the meta device"):
        load_dense_(copy.deepcopy(model).to("meta"), dense().state_dict())
    nn.utils.parametrize.register_parametrization(model[0].cores, "0", nn.Identity())
    with pytest.raises(TypeError, match="cores of 0 are parametrized"):
        load_dense_(model, dense().state_dict())


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(24, 8)
        self.body = nn.LSTM(8, 8, bidirectional=True, proj_size=4)
        self.head = nn.Linear(8, 24)
        self.head.weight = self.embedding.weight


def test_weights_of_recurrent_and_of_tied_layers_have_the_dense_models_names():
    torch.manual_seed(0)
    model = Language().double()
    state = copy.deepcopy(model.state_dict())
    model.embedding = tnlayers.TTEmbedding(24, 8, rank=64, dtype=torch.float64)
    model.head = tnlayers.TiedLinear(model.embedding, bias=True)
    model.body = tnlayers.TRLSTM(8, 8, bidirectional=True, proj_size=4, rank=8, dtype=torch.float64)
    report = load_dense_(model, state, workers=1)
    assert len(report.layers) == 7
    assert max(row.error for row in report.layers) < 1e-5
    torch.testing.assert_close(model.head.weight, state["head.weight"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.body.to_dense().weight_hr_l0, state["body.weight_hr_l0"], rtol=0, atol=1e-5)
    assert torch.equal(model.body.bias_ih_l0, state["body.bias_ih_l0"])


def test_a_row_of_padding_and_embeddings_over_the_same_cores():
    torch.manual_seed(0)
    plain = nn.ModuleDict(
        {"one": nn.Embedding(12, 6, padding_idx=2), "two": nn.Embedding(12, 6, padding_idx=2)}
    ).double()
    plain["two"].weight = plain["one"].weight
    plain["head"] = nn.Linear(6, 12, bias=False).double()
    plain["head"].weight = plain["one"].weight
    with torch.no_grad():
        plain["one"].weight[2] = 3.0
    model = copy.deepcopy(plain)
    tnlayers.tensorize_(
        model, tnlayers.TensorizeConfig("tucker", rank=6, decompose=False, kinds=("linear", "embedding"))
    )
    assert model["two"].cores[0] is model["one"].cores[0]
    report = load_dense_(model, plain.state_dict())
    assert len(report.layers) == 1
    index = torch.arange(12)
    for name in ("one", "two"):
        torch.testing.assert_close(model[name](index), plain["one"].weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(model["head"].weight, plain["one"].weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("given", [("one",), ("two",), ("one", "two")])
@pytest.mark.parametrize("swapped", [False, True])
def test_names_of_one_weight_stand_for_each_other(swapped, given):
    torch.manual_seed(0)
    layers = {"one": nn.Embedding(12, 6), "two": nn.Linear(6, 12, bias=False), "last": nn.Linear(12, 4)}
    plain = nn.ModuleDict(layers).double()
    plain["two"].weight = plain["one"].weight
    model = copy.deepcopy(plain)
    kinds = ("linear", "embedding") if swapped else ("linear",)
    tnlayers.tensorize_(
        model, tnlayers.TensorizeConfig("tucker", rank=4, kinds=kinds, exclude=() if swapped else ("two",))
    )
    state = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}
    state["two.weight"] = state["one.weight"]
    full = copy.deepcopy(model)
    load_dense_(full, state)
    left = {name: value for name, value in state.items() if name.partition(".")[0] in (*given, "last")}
    load_dense_(model, left)
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in model.state_dict().items())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"other values in two.weight than in one.weight, but they are one in model"):
        load_dense_(model, state | {"two.weight": torch.zeros(12, 6)})
    with pytest.raises(ValueError, match=r"lacks one.weight, two.weight; it must"):
        load_dense_(model, {name: value for name, value in state.items() if name.startswith("last")})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "n_inner": 16}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


@pytest.mark.parametrize(
    ("name", "own", "keys"), [("GPT2", GPT2, "all"), ("GPT2", GPT2, "densified"), ("T5", T5, "saved")]
)
def test_language_models_of_transformers_with_tied_outputs(name, own, keys, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=12, bos_token_id=0, eos_token_id=1, **own)
    config.tie_word_embeddings = True
    kind = getattr(transformers, {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}[name])
    source, model = kind(config).double().eval(), kind(config).double().eval()
    kinds = ("linear", "embedding")
    tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tucker", rank=16, decompose=False, kinds=kinds))
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])} | ({} if name == "GPT2" else {"labels": torch.tensor([[6, 7]])})
    state = source.state_dict()
    if keys == "saved":  # one key for a tied weight
        from safetensors.torch import load_file  # noqa: PLC0415  (comes with transformers)

        source.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert len(state) < len(source.state_dict())
    if keys == "densified":
        twin = copy.deepcopy(source)
        tnlayers.tensorize_(twin, tnlayers.TensorizeConfig("tucker", rank=16, kinds=kinds))
        tnlayers.densify_(twin)
        state = twin.state_dict()
    report = load_dense_(model, state, progress=False)
    assert max(row.error for row in report.layers) < 1e-10
    assert sum(row.held for row in (*report.layers, *report.others)) == report.model_params[0]
    torch.testing.assert_close(model(**inputs).logits, source(**inputs).logits, rtol=0, atol=1e-10)


def test_networks_of_weights_are_fitted():
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    model = copy.deepcopy(plain)
    config = tnlayers.TensorizeConfig("tr", rank=3, decompose=False, parametrize=True)
    expected = copy.deepcopy(plain)
    theirs = tnlayers.tensorize_(expected, tnlayers.TensorizeConfig("tr", rank=3, parametrize=True))
    tnlayers.tensorize_(model, config)
    report = load_dense_(model, plain.state_dict())
    found = model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())
    errors = {row.name: row.error for row in theirs.layers}
    assert {row.name: row.error for row in report.layers} == pytest.approx(errors, rel=1e-9)
    assert {row.name: row.params for row in report.layers} == {row.name: row.params for row in theirs.layers}
    assert sum(row.held for row in (*report.layers, *report.others)) == report.model_params[0]
    with pytest.raises(ValueError, match=r"it has cores, so it is a state of tensor layers"):
        load_dense_(model, model.state_dict())
    alone = nn.MultiheadAttention(8, 2)
    state = copy.deepcopy(alone.state_dict())
    tnlayers.parametrize_(alone, "in_proj_weight", "tucker", rank=8, decompose=False)
    load_dense_(alone, state)
    torch.testing.assert_close(alone.in_proj_weight, state["in_proj_weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_that_a_swap_made(kind):
    torch.manual_seed(0)
    own = {"proj_size": 3} if kind is nn.LSTM else {}
    plain = nn.ModuleDict({"body": kind(6, 4, 2, bidirectional=True, **own)}).double()
    model = copy.deepcopy(plain)
    expected = copy.deepcopy(plain)
    config = {"rank": 2, "kinds": ("recurrent",)}
    tnlayers.tensorize_(model, tnlayers.TensorizeConfig("tr", decompose=False, **config))
    tnlayers.tensorize_(expected, tnlayers.TensorizeConfig("tr", **config))
    load_dense_(model, plain.state_dict())
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
