"""The images that torch convolves in another way, beside torch's own choice."""

import pytest
import torch

import tnlayers
from tnlayers.backend import devices
from tnlayers.planning.options import is_single


@pytest.mark.parametrize("size", [(1200,), (1300,), (35, 36), (36, 36), (32, 39, 9), (32, 41, 9), (36, 35, 1)])
def test_it_is_torch_s_choice(size):
    x, weight, one = torch.empty(1, 16, *size), torch.empty(8, 16, *[3] * len(size)), [1] * len(size)
    chosen = torch._C._select_conv_backend(x, weight, None, one, one, one, False, [0] * len(size), 1)
    assert is_single(16, size) == (chosen != torch._C._ConvBackend.Mkldnn)


def test_a_single_volume_is_not_held_to_a_peak_without_torch_s_copies(avx512, monkeypatch):
    monkeypatch.setattr(devices, "amd_family", lambda: 26)
    layer = tnlayers.CPConv3d(16, 16, 3, padding=1, bias=False, rank=16)
    plan = layer._executor.plan(layer._setting((1, 16, 32, 32, 32)))
    assert plan.strategy == "factorized"
    whole = tnlayers.CPConv3d(16, 16, 3, padding=1, bias=False, rank=16, strategy="reconstruct")
    copies = 4 * 27 * 16 * 32**3
    assert copies < whole._executor.plan(whole._setting((1, 16, 32, 32, 32))).peak < 1.5 * copies
