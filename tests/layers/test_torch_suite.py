"""PyTorch's own checks of its modules, from torch.testing._internal, on ours."""

from typing import Any

import pytest
import torch

from cases import CASES, CHANNELS, Case
from tnlayers import testing

common_nn: Any = pytest.importorskip("torch.testing._internal.common_nn", reason="this build of torch ships no tests")

# The import forbids everyone to set torch.backends' flags, for torch's own tests' sake.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


class Runner(common_nn.NNTestCase):
    """How the checks run a module; torch keeps this with its own tests."""

    def _forward(self, module, inputs):
        return module(*inputs) if isinstance(inputs, tuple) else module(inputs)

    def _backward(self, module, inputs, output, grad_output, create_graph=False):
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        return tuple(x.grad.data for x in inputs) if isinstance(inputs, tuple) else inputs.grad.data

    def _get_parameters(self, module):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return parameters, [parameter.grad for parameter in parameters]

    def _zero_grad_parameters(self, module):
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the checks' own old code
@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_module(case: Case):
    """``NewModuleTest``.

    Forward against a reference, non-contiguous inputs and output gradients, torch.save, printing; gradients, second
    derivatives and batched gradients, each numerically; conversion to other dtypes. Its check of forward-mode
    derivatives is skipped: it hands the parameters over where no module takes them. test_tools.py has one.
    """
    torch.manual_seed(0)
    check = common_nn.NewModuleTest(
        constructor=lambda: case.make(strategy="auto"),
        input_fn=lambda: testing.example_input(case.make(), batch=2),
        reference_fn=lambda x, _, module: module.to_dense()(x),
        fullname=str(case),
        default_dtype=torch.float64,
        gradcheck_fast_mode=True,
    )
    check(Runner())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factory_keywords(case: Case):
    """As in torch's test_modules.py: device and dtype reach every parameter, also through ``skip_init``."""
    for device in ("cpu", "meta"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            module = case.make(device=device, dtype=dtype)
            for parameter in module.parameters():
                assert (parameter.device.type, parameter.dtype) == (device, dtype)
    skipped = torch.nn.utils.skip_init(case.layer, *CHANNELS, **case.geometry, **case.arguments)
    for one, other in zip(skipped.parameters(), case.make().parameters(), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


@pytest.mark.parametrize("case", [case for case in CASES if case.ndim > 1], ids=str)
def test_memory_format(case: Case):
    """As in torch's test_modules.py: every combination of the module's and the input's layout; same values, layout."""
    last = torch.channels_last if case.ndim == 2 else torch.channels_last_3d
    torch.manual_seed(0)
    module = case.make()
    x = testing.example_input(module)
    expected = module.to_dense()(x)
    for of_module in (torch.contiguous_format, last if case.ndim == 2 else torch.contiguous_format):
        for of_input in (torch.contiguous_format, last):
            y = module.to(memory_format=of_module)(x.detach().to(memory_format=of_input).requires_grad_())
            y.sum().backward()
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            assert y.is_contiguous(memory_format=of_input)
