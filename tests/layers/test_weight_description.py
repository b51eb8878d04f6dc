"""Descriptions of networks of single weights, which come from files and may be hostile."""

import copy

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.layers.weight_description import build_weight, describe_weight


@pytest.fixture
def described():
    attention = nn.MultiheadAttention(8, 2)
    weight = attention.in_proj_weight
    tnlayers.parametrize_(attention, "in_proj_weight", format="tt", rank=3)
    return describe_weight(attention.parametrizations.in_proj_weight[0]), weight


def test_a_description_gives_the_same_network(described):
    description, weight = described
    again = build_weight(copy.deepcopy(description), weight)
    assert describe_weight(again) == description
    assert all(core.is_meta for core in again.layer.cores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": {"r1": 2**40}}, "parameters are accepted"),
        ({"rank": 3}, "must map every bond"),
        ({"rank": {"r1": -1}}, "r1"),
        ({"in_shape": "2, 4"}, "in_shape"),
        ({"out_shape": [1] * 9000}, "character"),
        ({"layout": {"shape": [24, 9], "axes": "o i"}}, "shape"),
        ({"format": "os"}, "format"),
        ({"more": 1}, "more"),
    ],
)
def test_a_hostile_description_is_refused(described, changes, message):
    description, weight = described
    with pytest.raises((TypeError, ValueError), match=message):
        build_weight(description | changes, weight)


def test_a_weight_of_another_shape_is_refused(described):
    with pytest.raises(ValueError, match="the model has"):
        build_weight(described[0], nn.Parameter(torch.empty(24, 16)))
