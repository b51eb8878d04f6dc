"""The plan that a compiler traces is the one that an eager call with its sizes runs."""

import pytest
import torch

import tnlayers


def compiled(module, **options):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="eager", **options)


def plans(layer):
    return [plan for name, plan in vars(layer._executor).items() if name.startswith("_compiled")]


@pytest.mark.parametrize("earlier", [None, 32])
def test_it_is_made_for_the_sizes_that_the_compiler_knows(earlier):
    """Without an eager call, and whatever size the latest eager call had: one image has other operations than many."""
    layer, x = tnlayers.TuckerConv2d(64, 64, 3, padding=1, rank=0.25), torch.randn(1, 64, 16, 16)
    if earlier:
        layer(torch.randn(earlier, 64, 8, 8))
    found = compiled(layer)(x)
    (plan,) = plans(layer)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)
    assert plan == layer._executor.latest
    assert "conv single" in [step.kind for step in plan.steps]


def test_each_graph_keeps_its_own():
    layer = tnlayers.TuckerConv2d(16, 16, 3, padding=1, rank=4)
    run = compiled(layer, dynamic=False)
    for batch in (1, 8, 1):
        x = torch.randn(batch, 16, 8, 8)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)
    assert [plan.setting.batch for plan in plans(layer)] == [1, 8]


@pytest.mark.parametrize(("earlier", "batch"), [(None, 32), ((2, 16, 5, 5), 2), ((3, 16, 9, 7), 3)])
def test_an_open_batch_is_that_of_the_latest_eager_call(earlier, batch):
    """Also if that call's plan was made before another call's; the sizes that are not open are the compiler's."""
    layer = tnlayers.TuckerConv2d(16, 16, 3, padding=1, rank=4)
    if earlier:
        for shape in (earlier, (7, 16, 6, 6), earlier):
            layer(torch.randn(shape))
    x = torch.randn(4, 16, 9, 7)
    torch._dynamo.mark_dynamic(x, 0)
    compiled(layer)(x)
    (setting,) = [plan.setting for plan in plans(layer)]
    assert (setting.batch, setting.size) == (batch, (9, 7))


def test_of_a_lookup_and_of_rows():
    for layer, x in (
        (tnlayers.TTEmbedding(60, 16, rank=2), torch.arange(5)),
        (tnlayers.TTLinear(16, 16, rank=2), torch.randn(5, 16)),
    ):
        torch.testing.assert_close(compiled(layer)(x), layer(x))
        assert [plan.setting.batch for plan in plans(layer)] == [5]
