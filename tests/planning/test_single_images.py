"""The images that torch convolves in another way, beside torch's own choice."""

import pytest
import torch

from tnlayers.planning.options import is_single


@pytest.mark.parametrize("size", [(1200,), (1300,), (35, 36), (36, 36), (32, 39, 9), (32, 41, 9), (36, 35, 1)])
def test_it_is_torch_s_choice(size):
    x, weight, one = torch.empty(1, 16, *size), torch.empty(8, 16, *[3] * len(size)), [1] * len(size)
    chosen = torch._C._select_conv_backend(x, weight, None, one, one, one, False, [0] * len(size), 1)
    assert is_single(16, size) == (chosen != torch._C._ConvBackend.Mkldnn)
