"""What ``tnlayers.summary`` counts is what torch counts, and the model stays as it was."""

import copy
import csv
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import tnlayers
from cases import FAMILIES, KINDS
from tnlayers import Summary, TensorizeConfig, densify_, summary, tensorize_
from tnlayers.overview.summary import ELSEWHERE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "counting.md").read_text(encoding="utf-8")
CODE = r"(?s)```python\n(.*?)```"


class Net(nn.Module):
    """Layers of every sort: one at two places, one called twice, tied ones, one never called; and a product of none."""

    def __init__(self, layer=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = layer or nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.body
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.drop = nn.Dropout()
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.register_buffer("seen", torch.zeros(()))
        self.steps = 0

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.drop(self.up(self.again(self.body(x))))
        self.seen += 1
        self.steps += 1
        x = self.tied(self.head(x.flatten(2).transpose(1, 2)))  # (batch, positions, channels)
        return x @ x.transpose(1, 2)


def image(batch=2):
    return torch.randn(batch, 3, 6, 6)


def counted(model, *x):
    """Everything that torch counts, by module and in all, on a copy of the model."""
    model = copy.deepcopy(model)
    with torch.set_grad_enabled(model.training), FlopCounterMode(display=False) as counter:
        model(*x)
    parts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return parts, counter.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", FAMILIES)
def test_rows_and_totals_are_what_torch_counts(layer, training):
    torch.manual_seed(0)
    model, x = Net(layer(8, 8, 3, padding=1, rank=2)).train(training), image()
    parts, total = counted(model, x)
    found = summary(model, x)
    assert isinstance(found, Summary)
    assert found.training == training
    assert found.totals.flops == total == sum(row.flops or 0 for row in found.rows)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["stem", "body", "up", "unused", "head", "tied", ELSEWHERE]
    for name in ("stem", "up", "head", "tied"):
        assert rows[name].flops == rows[name].dense_flops == parts[f"Net.{name}"]
        assert rows[name].format is rows[name].rank is None
        assert rows[name].params == rows[name].dense_params == getattr(model, name).weight.numel()
        assert rows[name].calls == 1
    assert (rows["unused"].flops, rows["unused"].dense_flops, rows["unused"].calls) == (None, None, 0)
    assert rows[ELSEWHERE].flops == 2 * 2 * 144 * 8 * 144  # the product of no layer: batch, positions, channels

    body = rows["body"]
    assert (body.kind, body.format, body.rank) == (layer.__name__, layer.format_type.name, dict(model.body.rank))
    assert (body.aliases, body.calls) == (("again",), 2)
    assert body.flops == sum(parts[name] for name in ("Net.body", "Net.again") if name in parts)
    assert body.dense_flops == 2 * (2 * 2 * 36 * 8 * 8 * 9)
    assert body.params == sum(core.numel() for core in model.body.cores)
    assert (body.dense_params, body.keep_ratio) == (8 * 8 * 9, model.body.keep_ratio)

    assert found.totals.params == sum(p.numel() for p in model.parameters())
    assert found.totals.params == sum(row.params for row in found.rows) - rows["tied"].params
    densify_(model)
    dense = summary(model, x)
    assert (found.totals.dense_params, found.totals.dense_flops) == (dense.totals.params, dense.totals.flops)
    assert [row.dense_flops for row in found.rows] == [row.flops for row in dense.rows]
    assert dense.totals.keep_ratio == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_of_every_kind(kind):
    ndim = KINDS[kind]
    for shape in [(2, 4, *(6,) * ndim), (4, *(6,) * ndim)]:  # batched, or not
        x = torch.randn(shape)
        plain = getattr(nn, kind)(4, 6, *[3] * (ndim > 0), **({"stride": 2} if ndim else {}))
        layer = getattr(tnlayers, f"CP{kind}").from_dense(plain, rank=2, decompose=False)
        row, rest = summary(layer, x).rows
        assert (row.name, row.flops, row.dense_flops) == (
            f"CP{kind}",
            counted(layer, x)[1],
            counted(plain, x)[1],
        )
        assert row.flops == layer.flops(x.shape)
        assert (rest.flops, rest.params) == (0, 6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(training):
    class Growing(nn.Module):
        """Makes a buffer at its first forward, and replaces another one."""

        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x):
            self.register_buffer("made", torch.ones(1))
            self.scale = self.scale * 2
            return x.mul_(self.scale)

    torch.manual_seed(0)
    net = Net(tnlayers.TRConv2d(8, 8, 3, padding=1, rank=2))
    net.norm2 = net.norm
    model = nn.Sequential(Growing(), net).train(training)
    net.norm.train(not training)
    x, held = image(), model[0].scale
    before, attributes = copy.deepcopy(model.state_dict()), [vars(module).copy() for module in model.modules()]
    versions = [buffer._version for buffer in model.buffers()]
    given, random = x.clone(), torch.get_rng_state()
    summary(model, x)
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert [buffer._version for buffer in model.buffers()] == versions
    assert model[0].scale is held
    assert [vars(module) for module in model.modules()] == attributes
    assert not any(value for module in model.modules() for name, value in vars(module).items() if "hook" in name)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    model.add_module("broken", nn.Conv2d(3, 3, 3))
    with pytest.raises(RuntimeError) as caught:
        summary(model, x)
    assert "A tuple is taken as arguments" in caught.value.__notes__[0]
    assert [vars(module) for module in model.modules()][1:-1] == attributes[1:]
    assert not any(value for module in model.modules() for name, value in vars(module).items() if "hook" in name)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models_whatever_is_around(context, training):
    model = Net(tnlayers.BTTConv2d(8, 8, 3, padding=1, rank=2)).train(training)
    expected = counted(model, image())[1]
    with context():
        found = summary(model, image())
    assert found.totals.flops == expected
    assert found.training == model.training == training


def test_containers_get_their_items_back():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cache, self.log = nn.Linear(4, 4), {}, [1]

        def forward(self, x):
            self.cache["x"] = torch.cat([self.cache["x"], x]) if "x" in self.cache else x
            self.log.append(len(self.cache["x"]))
            return self.linear(self.cache["x"])

    model = Cache()
    cache, log = model.cache, model.log
    summary(model, torch.ones(2, 4))
    assert model.cache is cache
    assert model.log is log
    assert (cache, log) == ({}, [1])
    assert len(model(torch.ones(2, 4))) == 2


def test_autocast_leaves_no_weights_behind():
    model, x = Net(tnlayers.TTConv2d(8, 8, 3, padding=1, rank=2)).eval(), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert summary(model, x).totals.flops == counted(model, x)[1]
        model(x).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "unused" not in name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        lambda model: model.compile(backend="eager") or model,
    ],
)
def test_wrapped_models_are_counted_as_they_are_written(wrap):
    torch.manual_seed(0)
    model, x = Net(tnlayers.TuckerConv2d(8, 8, 3, padding=1, rank=2)).eval(), image()
    expected = summary(model, x)
    assert summary(wrap(copy.deepcopy(model)), x) == expected


def test_compiled_layers_inside():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), tnlayers.CPConv2d(8, 8, 3, rank=2)).eval(), image()
    expected = summary(copy.deepcopy(model), x)
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    assert summary(model, x) == expected


def test_lazy_layers_start_as_at_any_first_forward():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5))

    x = image()
    model, twin = make(), make().eval()
    twin(x)
    random = torch.get_rng_state()
    make()
    found = summary(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert model.training
    assert [row.kind for row in found.rows] == ["Conv2d", "Linear", "-"]
    assert found.totals.flops == counted(model, x)[1]
    assert found.totals.params == sum(p.numel() for p in twin.parameters())
    unused = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.LazyLinear(2)})
    unused.forward = unused["a"].forward
    assert [row.params for row in summary(unused, torch.ones(1, 3)).rows] == [9, 0, 3]


@pytest.mark.parametrize("training", [True, False])
def test_on_the_meta_device(training):
    with torch.device("meta"):
        model, x = Net(tnlayers.TRConv2d(8, 8, 3, padding=1, rank=2)).train(training), image()
        found = summary(model, x)
        assert found.totals.flops == counted(model, x)[1]
    assert found.totals.dense_flops == summary(Net().train(training), torch.empty(2, 3, 6, 6)).totals.flops


def test_weights_that_others_compute_or_use():
    class Functional(nn.Module):
        """Uses one layer's weight, and lets a hook compute another's."""

        def __init__(self):
            super().__init__()
            self.used = tnlayers.TTLinear(8, 8, rank=2)
            self.normed = parametrizations.spectral_norm(nn.Linear(8, 8))
            self.kept = tnlayers.CPLinear(8, 8, rank=2)
            self.twin = tnlayers.CPLinear(8, 8, rank=2)
            self.twin.cores = self.kept.cores

        def forward(self, x, *, scale):
            return self.twin(self.kept(self.normed(F.linear(x, self.used.weight)))) * scale

    model, x = Functional(), torch.randn(3, 8)
    used, normed, kept, twin, rest = summary(model, {"x": x, "scale": 2}).rows
    assert (used.calls, used.flops) == (0, None)
    assert rest.flops >= 2 * 3 * 8 * 8
    assert (normed.params, normed.flops) == (64, 2 * 3 * 8 * 8)
    assert kept.params == twin.params
    totals = summary(model, {"x": x, "scale": 2}).totals
    assert totals.params == sum(p.numel() for p in model.parameters())
    assert totals.dense_params == 3 * 64 + 4 * 8  # kept and twin would share one dense kernel; biases


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config).eval()
    tensorize_(model, TensorizeConfig("tr", rank=0.5, decompose=False))
    tokens = torch.arange(12).reshape(2, 6)
    found = summary(copy.deepcopy(model), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert found.totals == summary(model, (tokens,)).totals
    assert found.rows[-1].flops == 4 * 2 * 6 * 6 * 16  # attention: batch, queries, keys, channels
    model.set_attn_implementation("eager")
    assert found.totals.flops == counted(model, tokens)[1]
    assert found.totals.params == model.num_parameters()  # the embedding is the last layer's weight too
    assert sum(row.format == "tr" for row in found.rows) >= 6


def test_the_fused_encoder_is_counted_by_its_layers():
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)
    training, inference = summary(model, x), summary(model.eval(), x)
    assert [row.flops for row in training.rows[:-1]] == [row.flops for row in inference.rows[:-1]]
    assert inference.rows[0].calls == 0  # out_proj, whose weight attention uses by itself
    assert inference.rows[-1].flops >= 2 * 2 * 5 * 16 * 64  # what is projected in and out there


def test_several_processes(tmp_path):
    model, x = Net(tnlayers.TTConv2d(8, 8, 3, padding=1, rank=2)), image()
    expected = summary(model, x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert summary(nn.parallel.DistributedDataParallel(model), x) == expected
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_refused():
    x = torch.ones(1, 3)
    with pytest.raises(TypeError, match=r"x is \(1, 3\); .*torch.randn makes a tensor"):
        summary(nn.Linear(3, 3), (1, 3))
    with pytest.raises(TypeError, match=r"model is of type function; it must be a torch\.nn\.Module"):
        summary(lambda x: x, x)
    with pytest.raises(ValueError, match=r"model has no convolution or linear layer \(Sequential\)"):
        summary(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(TypeError, match="x is None; it must be what the model takes"):
        summary(nn.Linear(3, 3), None)
    with pytest.raises(TypeError, match="positional") as caught:
        summary(nn.Linear(3, 3), (x, x))
    assert "while the model ran on a tuple" in caught.value.__notes__[0]


def test_the_table_and_its_rows():
    model = nn.Sequential()
    model.add_module("<b>", tnlayers.TuckerConv2d(8, 8, 3, rank=(2, 3)))
    model.add_module("up & on", nn.Conv2d(8, 2000, 1))
    found = summary(model, torch.randn(1, 8, 4, 4))
    lines = str(found).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1  # aligned to the right
    assert lines[1].split() == ["<b>", "TuckerConv2d", "tucker", "2,", "3", *map("{:,}".format, (94, 576)), "16.3%",
        f"{found.rows[0].flops:,}", f"{2 * 4 * 576:,}", "1"]  # fmt: skip
    assert "16,000" in lines[2]
    assert lines[-2].startswith("total ")
    assert "training mode" in lines[-1]
    page = found._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "up &amp; on" in page
    assert page.count("<tr>") == page.count("</tr>") == len(lines) - 1
    rows = [asdict(row) for row in found.rows]
    assert [row["name"] for row in rows] == ["<b>", "up & on", ELSEWHERE]
    assert sum(row["flops"] for row in rows) == found.totals.flops
    assert sum(row["params"] for row in rows) == found.totals.params
    assert rows[0]["rank"] == {"ri": 2, "ro": 3}


def test_rows_for_pandas():
    pandas = pytest.importorskip("pandas")
    found = summary(nn.Sequential(nn.Linear(3, 4), tnlayers.CPLinear(4, 8, rank=2)), torch.ones(1, 3))
    frame = pandas.DataFrame(found.rows)
    assert frame["flops"].sum() == found.totals.flops
    assert list(frame.columns) == list(asdict(found.totals))


def test_the_report_of_a_swap_is_a_page_too():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(3, 3))
    report = tensorize_(model, TensorizeConfig("cp", rank=2, decompose=False, exclude=["1"]))
    page, lines = report._repr_html_(), str(report).splitlines()
    assert page.count("<tr>") == len(lines) - 1
    assert "excluded by &#x27;1&#x27;" in page
    assert f"<caption>{lines[-1].replace('>', '&gt;')}</caption>" in page
    assert page.count("text-align: right") == 3 * (len(lines) - 1)  # parameters, FLOPs, error
    end = lines[0].index("parameters") + len("parameters")
    assert lines[1][:end].endswith(f" 576 -> {report['0'].params[1]} ({report['0'].params[1] / 576:.1%})")
    assert lines[2][:end].endswith(" 9")


def test_the_page_runs_and_shows_what_comes_out(capsys):
    names = {"__name__": "counting"}
    for block in re.findall(CODE, PAGE):
        exec(compile(block, "counting.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "True"
    shown = [line.split() for line in re.findall(r"(?m)^ {4}(.*)", re.sub(CODE, "", PAGE))]
    assert [line.split()[:6] for line in printed[: len(shown)]] == [line[:6] for line in shown]  # plans may differ


@pytest.mark.parametrize("name", ["FlopCounterMode", "fvcore", "torchinfo", "thop", "calflops", "ptflops"])
def test_the_page_judges_every_counter(name):
    assert f"**{name}**" in PAGE.replace("`", "")
    assert re.search(rf"^\|.*{name}.*\|", PAGE, re.MULTILINE)


def counters():
    """The rows of the page's table: by counter, then by layer, numbers as integers."""
    found = {}
    with (ROOT / "benchmarks" / "results" / "counters.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: int(row[name] or -1) for name in ("flops", "right", "params", "right_params")}
            found.setdefault(row["counter"], {})[row["layer"]] = row | numbers
    return found


def test_the_pages_verdicts_are_those_of_the_measured_counts():
    found = counters()
    outputs = 4 * 64 * 16 * 16
    dense, tensors = 2 * outputs * 64 * 9, ["CP", "Tucker", "TT", "TR", "BTT", "BTT factorized"]
    right = {name: [layer for layer, row in own.items() if row["flops"] == row["right"]] for name, own in found.items()}
    for name, own in found.items():
        assert [*own] == ["dense", *tensors], name
        assert own["dense"]["right"] == dense
        assert name.startswith(("thop", "FlopCounterMode")) or all(
            row["params"] == row["right_params"] for row in own.values()
        )
    for name in ("tnlayers.summary, training", "tnlayers.summary, eval", "FlopCounterMode", "FlopCounterMode, no_grad"):
        assert right[name] == ["dense", *tensors]
    # The traced plan is that without gradients, and right where it contracts the kernel.
    assert right["fvcore, no_grad"] == ["dense", "TT", "BTT"]
    for layer in ["dense", *tensors]:
        assert found["fvcore"][layer]["flops"] == found["fvcore, no_grad"][layer]["flops"]
    assert found["torchinfo"]["dense"]["flops"] == dense + 2 * outputs  # the bias
    for layer in tensors:
        assert found["torchinfo"][layer]["flops"] == 0
        assert (found["thop"][layer]["flops"], found["thop"][layer]["params"]) == (0, 0)
        assert found["thop"][layer]["left"] == "buffers"
    assert right["thop"] == ["dense"]
    mean = (dense + 2 * outputs) / 4
    assert found["ptflops, backend pytorch"]["dense"]["flops"] == mean  # per image, with the bias
    assert found["ptflops, backend aten"]["dense"]["flops"] == dense + 2 * outputs
    assert right["ptflops, backend pytorch"] == right["calflops"] == []
    assert right["ptflops, backend aten"] == ["BTT factorized"]
    for name, left in (("pytorch", "eval mode"), ("aten", "eval mode + cannot be pickled")):
        assert {row["left"] for row in found[f"ptflops, backend {name}"].values()} == {left}
    assert {row["left"] for row in found["calflops"].values()} == {"eval mode"}


def test_the_pages_table_is_that_of_its_layers(avx512):
    """What is right in the CSV is what the layers have now: on the kind of machine of the CSV."""
    model = nn.Conv2d(64, 64, 3, padding=1)
    layers = {
        "CP": tnlayers.CPConv2d(64, 64, 3, padding=1, rank=16),
        "Tucker": tnlayers.TuckerConv2d(64, 64, 3, padding=1, rank=16),
        "TT": tnlayers.TTConv2d(64, 64, 3, padding=1, rank=8),
        "TR": tnlayers.TRConv2d(64, 64, 3, padding=1, rank=8),
        "BTT": tnlayers.BTTConv2d(64, 64, 3, padding=1, rank=4, blocks=2),
    }
    for name, training in (("tnlayers.summary, training", True), ("tnlayers.summary, eval", False)):
        for layer, row in counters()[name].items():
            module = layers.get(layer.split()[0], model).train(training)
            if layer in layers:
                assert row["right"] == module.flops((4, 64, 16, 16)), layer


def test_fvcore_counts_as_the_page_says():
    fvcore = pytest.importorskip("fvcore.nn")
    x, factorized = torch.randn(4, 64, 16, 16), {"strategy": "factorized"}
    for cls, rank, options, reported in (
        (tnlayers.CPConv2d, 16, factorized, True),
        (tnlayers.BTTConv2d, 4, factorized | {"blocks": 2}, False),
        (tnlayers.TTConv2d, 8, {"strategy": "reconstruct"}, None),
    ):
        layer = cls(64, 64, 3, padding=1, rank=rank, **options).eval()
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                found = fvcore.FlopCountAnalysis(layer, x).unsupported_ops_warnings(False)
                count, unknown = 2 * found.total(), found.unsupported_ops()
            assert (count == layer.flops(x.shape)) == (reported is None)
            assert count <= layer.flops(x.shape)
            assert ("aten::baddbmm" in unknown) == bool(reported)
            assert not {"prim::PythonOp", "aten::bmm", "aten::matmul"} & {*unknown}


@pytest.mark.parametrize("layer", FAMILIES)
def test_frozen_layers_count_as_in_every_forward_but_the_first(layer):
    model, x = nn.Sequential(layer(16, 16, 3, padding=1, rank=2)).eval(), torch.randn(4, 16, 8, 8)
    tnlayers.freeze_(model)
    found = [summary(model, x).totals.flops for _ in range(2)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert found == [counter.get_total_flops()] * 2 == [model[0].flops(x.shape)] * 2
    assert model[0].frozen
