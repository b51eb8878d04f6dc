"""What is public, and what must stay as it was: names, drawn cores, plans, and files that were saved."""

import csv
import importlib
import inspect
import pkgutil
import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

import tnlayers
from cases import CASES
from tnlayers import Geometry, TensorNetwork, formats, models, testing
from tnlayers.layers import by_format
from tnlayers.planning.choose import LIMIT, plan
from tnlayers.planning.setting import Setting

HERE = Path(__file__).parent
NAMES = """
    AutotuneReport BTTConv1d BTTConv2d BTTConv3d BTTConvTranspose1d BTTConvTranspose2d BTTConvTranspose3d
    BTTEmbedding BTTEmbeddingBag BTTGRU BTTLSTM BTTLinear BTTRNN BlockTTConv1d BlockTTConv2d BlockTTConv3d
    BlockTTConvTranspose1d BlockTTConvTranspose2d BlockTTConvTranspose3d BlockTTEmbedding BlockTTEmbeddingBag
    BlockTTGRU BlockTTLSTM BlockTTLinear BlockTTRNN CPConv1d CPConv2d CPConv3d CPConvTranspose1d CPConvTranspose2d
    CPConvTranspose3d CPEmbedding CPEmbeddingBag CPGRU CPLSTM CPLinear CPRNN Comparison Decomposition EinsumConv1d
    EinsumConv2d EinsumConv3d EinsumConvTranspose1d EinsumConvTranspose2d EinsumConvTranspose3d EinsumEmbedding
    EinsumEmbeddingBag EinsumGRU EinsumLSTM EinsumLinear EinsumRNN FORMATS Format Frozen Geometry HTConv1d HTConv2d
    HTConv3d HTConvTranspose1d HTConvTranspose2d HTConvTranspose3d HTEmbedding HTEmbeddingBag HTGRU HTLSTM HTLinear
    HTRNN Init MeasuredRates PruneReport Signal Summary TRConv1d TRConv2d TRConv3d TRConvTranspose1d
    TRConvTranspose2d TRConvTranspose3d TREmbedding TREmbeddingBag TRGRU TRLSTM TRLinear TRRNN TTConv1d TTConv2d
    TTConv3d TTConvTranspose1d TTConvTranspose2d TTConvTranspose3d TTEmbedding TTEmbeddingBag TTGRU TTLSTM TTLinear
    TTRNN TensorConv TensorConv1d TensorConv2d TensorConv3d TensorConvTranspose TensorConvTranspose1d
    TensorConvTranspose2d TensorConvTranspose3d TensorEmbedding TensorEmbeddingBag TensorGRU TensorLSTM TensorLayer
    TensorLinear TensorNetwork TensorRNN TensorRecurrent TensorizeConfig TensorizeReport TiedLinear TuckerConv1d
    TuckerConv2d TuckerConv3d TuckerConvTranspose1d TuckerConvTranspose2d TuckerConvTranspose3d TuckerEmbedding
    TuckerEmbeddingBag TuckerGRU TuckerLSTM TuckerLinear TuckerRNN Variance autotune calibrate_ compare decompose
    densify_ freeze_ frobenius_penalty from_tltorch initialize_ load_dense_ load_tensorized measure_rates
    param_groups parametrize_ prune_ranks_ rank_dropout_ rank_lasso register register_with_transformers
    remap_optimizer_ save_tensorized scale_residual_ signal solve squared_norm summary tensorize_ thaw_ to_tltorch
    unfold unfold_
"""
FORMATS = "Axes BTT BlockTT CP Einsum FORMATS Format HT TR TT Tucker factorize register"
MODELS = """
    BasicBlock Bottleneck ImageNetBlock ImageNetResNet ResNet WideBlock WideResNet dense_conv resnet101 resnet110
    resnet152 resnet18 resnet20 resnet32 resnet34 resnet44 resnet50 resnet56 tednet_resnet wrn28_10
"""
TESTING = "PROMISES assert_same_function check example_input"


@pytest.mark.parametrize(
    ("module", "names"), [(tnlayers, NAMES), (formats, FORMATS), (models, MODELS), (testing, TESTING)]
)
def test_public_names(module, names):
    assert len({*module.__all__}) == len(module.__all__)
    new = {*module.__all__} - {*names.split()}
    assert {*names.split()} <= {*module.__all__}
    # What a format that is new brings with it, without a row here.
    kinds = tnlayers.Format, tnlayers.TensorLayer, tnlayers.TensorRecurrent
    assert all(issubclass(getattr(module, name), kinds) for name in new)
    assert all(getattr(module, name).__doc__ for name in module.__all__ if not name.isupper() and name != "Axes")


def test_no_name_hides_a_module():
    """A package's attribute of a module's name is that module."""
    for found in pkgutil.walk_packages(tnlayers.__path__, "tnlayers."):
        module = importlib.import_module(found.name)
        parent, _, name = found.name.rpartition(".")
        assert getattr(importlib.import_module(parent), name) is module


@pytest.mark.parametrize("layer", [each for each in vars(by_format).values() if getattr(each, "format_type", None)])
def test_layers_show_their_arguments(layer):
    """In help(): those of torch's layer, ours, and the format's, each described."""
    own = [*inspect.signature(layer).parameters]
    described = inspect.getdoc(layer).partition("Args:")[2].partition("\n\n")[0]
    dense = [name for name in inspect.signature(layer.dense_type).parameters if not name.startswith("_")]
    for argument in (*dense, "rank", "init", "strategy", "memory"):
        assert argument in own
        assert argument in described
    for option in inspect.signature(layer.format_type).parameters:
        assert option in own
        assert f"{option}: " in described
    assert "Initialize internal" not in inspect.getdoc(layer.__init__)


FUNCTIONS = [name for name in tnlayers.__all__ if inspect.isfunction(getattr(tnlayers, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_return_and_raise(name):
    """Every argument by its name, and an example that calls it. All check their arguments, so all raise."""
    function = getattr(tnlayers, name)
    text = inspect.getdoc(function)
    sections = re.findall(r"^(Args|Returns|Yields|Raises|Example):$", text, re.MULTILINE)
    signature = inspect.signature(function)
    result = [] if signature.return_annotation in (None, "None") else ["Returns"]
    assert [each for each in sections if each != "Yields"] == ["Args", *result, "Raises", "Example"]
    described = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for argument in signature.parameters:
        assert re.search(rf"^ {{4}}(\w+, )*{argument}(, \w+)*: ", described, re.MULTILINE), argument
    example = text.partition("\nExample:\n")[2]
    if other := re.fullmatch(r" {4}See ``(\w+)``\.", example):
        example = inspect.getdoc(getattr(tnlayers, other[1])).partition("\nExample:\n")[2]
    assert re.search(rf"^ +(>>>|\.\.\.) .*\b{name}\(", example, re.MULTILINE)


CLASSES = """
    AutotuneReport Comparison Decomposition Format Frozen Geometry Init PruneReport Summary TensorConv TensorConv1d
    TensorConv2d TensorConv3d TensorConvTranspose TensorConvTranspose1d TensorConvTranspose2d TensorConvTranspose3d
    TensorEmbedding TensorEmbeddingBag TensorGRU TensorLSTM TensorLayer TensorLinear TensorNetwork TensorRNN
    TensorRecurrent TensorizeConfig TensorizeReport TiedLinear Variance
"""


@pytest.mark.parametrize("name", CLASSES.split())
def test_classes_have_an_example_or_say_where_one_is(name):
    text = inspect.getdoc(getattr(tnlayers, name))
    if "\nExample:\n    >>> " not in text:
        others = re.findall(r"``(\w+)``", text)
        assert any("Example:" in inspect.getdoc(getattr(tnlayers, other, int)) for other in others)


@pytest.mark.parametrize("layer", [each for each in vars(by_format).values() if getattr(each, "format_type", None)])
def test_layers_have_one_example_of_their_own(layer):
    text = inspect.getdoc(layer)
    assert text.count("Example:\n") == 1
    assert f"{layer.__name__}(16, 32" in text.partition("Example:\n")[2]


def test_a_layer_of_a_format_without_defaults_has_no_example_that_fails():
    class Own(tnlayers.TensorLinear, format="einsum"):
        pass

    class Ring(tnlayers.TensorLinear, format="tr"):
        """A ring.

        Example:
            >>> Ring(4, 4)  # of its own
        """

    assert "Example:" not in Own.__doc__
    assert Ring.__doc__.count("Example:") == 1


def test_the_memory_that_a_docstring_names_is_the_planners_limit():
    assert f"below {LIMIT} * (the dense layer's kernel, input and output" in " ".join(tnlayers.TRConv2d.__doc__.split())
    page = (HERE.parent / "docs" / "explanation" / "memory.md").read_text(encoding="utf-8")
    assert f"The limit is {LIMIT} times the dense layer's kernel, input, output and their gradients" in " ".join(
        page.split()
    )


def test_squared_norm_refuses_what_is_no_tensor_layer():
    with pytest.raises(TypeError, match="layer is of type Linear; it must be a layer of tnlayers"):
        tnlayers.squared_norm(nn.Linear(2, 2))


def rows(name):
    with (HERE / "golden" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_seed_draws_the_same_cores():
    """As on the day when the table was written; up to what another library's rounding may change."""
    expected = {(row["layer"], row["init"]): float(row["checksum"]) for row in rows("cores.csv")}
    cases = {str(case): case for case in CASES}
    for (name, init), checksum in expected.items():
        case = cases[name]
        torch.manual_seed(0)
        layer = case.make(init=init, dtype=torch.float64)
        flat = torch.cat([core.detach().flatten() for core in layer.cores])
        weights = torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()
        found = float((flat * weights).sum() / flat.norm())
        assert found == pytest.approx(checksum, abs=1e-6), (case, init)


def test_plans_are_those_that_were(avx512):
    """Of every setting of benchmarks/results/speed.csv: the order, and the whole text that explain() prints."""
    for row in rows("plans.csv"):
        network, size = TensorNetwork.parse(row["network"]), int(row["size"])
        outputs, inputs, *kernel = network.dense_shape
        geometry = Geometry(inputs, outputs, tuple(kernel), stride=int(row["stride"]), padding=1)
        found = plan(network, geometry, Setting(int(row["batch"]), (size, size), mode=row["mode"]))
        assert (found.order, sha256(found.explain().encode()).hexdigest()[:12]) == (row["order"], row["text"]), row


class Saved(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Linear(8, 8, bias=False)
        self.tied = self.head


def test_files_that_were_saved_load():
    """Written before the folders were made; the sums are of the models that were saved."""
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6),
    )  # fmt: skip
    model = tnlayers.load_tensorized(lambda: plain, HERE / "checkpoint" / "saved" / "tr.safetensors").eval()
    x = torch.linspace(-1, 1, 100).reshape(1, 4, 5, 5)
    expected = [[0.45273584, -1.03944933, 1.05541265, -0.17065112, 1.82121741, -1.53098607]]
    torch.testing.assert_close(model(x).detach(), torch.tensor(expected))
    assert [*model.state_dict()][:4] == ["0.bias", "0.cores.0", "0.cores.1", "0.cores.2"]
    model = tnlayers.load_tensorized(Saved, HERE / "checkpoint" / "saved" / "einsum-btt.safetensors")
    assert type(model.up) is tnlayers.EinsumConvTranspose2d
    assert type(model.head) is tnlayers.BTTLinear
    assert model.tied is model.head
    y = model.up(x).detach()
    found = torch.stack([y.sum(), y.square().sum(), model.head(torch.linspace(-1, 1, 8)).detach().sum()])
    torch.testing.assert_close(found, torch.tensor([8.906309, 71.803177, -4.466464]))
