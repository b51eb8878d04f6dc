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
