"""What ``tnlayers.signal`` measures is what autograd gives, the model stays as it was, and problems are named."""

import copy
import pickle
import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tnlayers
from cases import CASES, FAMILIES
from tnlayers import Signal, models, signal
from tnlayers.overview.moments import kernel_ratio, moment

PLACES = "input", "output", "gradient_output", "gradient_input"


def mean_square(tensor):
    return tensor.detach().double().square().mean().item()


def total(y):
    return y.float().square().sum() if isinstance(y, torch.Tensor) else total(y[0])


def row(found, name, call=1):
    return next(each for each in found.rows if (each.name, each.call) == (name, call))


def redraw(module):
    """What users' own initialisations do: draw every parameter, cores too."""
    for weight in module.parameters(recurse=False):
        nn.init.normal_(weight, std=0.02)


def plain(depth, activation=nn.ReLU, width=8):
    layers = [(tnlayers.TRConv2d(width, width, 3, padding=1, rank=2, bias=False), activation()) for _ in range(depth)]
    return nn.Sequential(*[module for pair in layers for module in pair])


def test_a_linear_layer_by_hand():
    layer = nn.Linear(2, 2)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.0, 1.0])
    x = torch.tensor([[1.0, 1.0], [3.0, 0.0]])  # so y = [[3, 0], [3, 1]]
    (found,) = signal(layer, x, lambda y: (y * torch.tensor([[1.0, 2.0], [0.0, 2.0]])).sum()).rows
    assert (found.name, found.kind, found.call, found.weighted) == ("Linear", "Linear", 1, True)
    assert found.text == "Linear(in_features=2, out_features=2, bias=True)"
    assert (found.input, found.output, found.largest) == (11 / 4, pytest.approx(19 / 4), 3.0)
    # dx = dy W = [[1, 0], [0, -2]]
    assert (found.gradient_output, found.gradient_input) == (pytest.approx(9 / 4), pytest.approx(5 / 4))
    (found,) = signal(layer, x).rows
    assert (found.gradient_output, found.gradient_input, found.not_finite) == (None, None, {})


@pytest.mark.parametrize(("inplace", "training"), [(True, True), (False, False)])
@pytest.mark.parametrize("layer", FAMILIES)
def test_every_row_is_what_autograd_gives(layer, inplace, training):
    torch.manual_seed(0)
    parts = layer(4, 4, 3, padding=1, rank=2), nn.ReLU(inplace), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
    model, x = nn.Sequential(*parts).train(training), torch.randn(2, 4, 5, 5)
    found = signal(model, x, total)
    expected = copy.deepcopy(model)
    expected[1] = nn.ReLU()
    tensors = [x.clone().requires_grad_()]
    for module in expected:
        tensors.append(module(tensors[-1]))
    gradients = torch.autograd.grad(total(tensors[-1]), tensors)
    assert [each.name for each in found.rows] == ["0", "1", "2", "3"]
    for k, each in enumerate(found.rows):
        sides = tensors[k], tensors[k + 1], gradients[k + 1], gradients[k]
        assert [getattr(each, side) for side in PLACES] == pytest.approx([mean_square(s) for s in sides], rel=1e-4)
    assert found.training == training
    assert found.problems == ()


@pytest.mark.parametrize("case", {(case.format, case.kind): case for case in CASES[::-1]}.values(), ids=str)
def test_every_layer_runs(case):
    torch.manual_seed(0)
    layer = case.make()
    x = torch.randn(2, 8, *(5,) * case.ndim)
    found = signal(layer, x, total)
    (only,) = found.rows
    assert only.output == pytest.approx(mean_square(layer(x)), rel=1e-4)
    assert only.kernel == pytest.approx(mean_square(layer.weight) / layer.variance.weight_std**2, rel=1e-4)
    assert None not in (only.gradient_output, only.gradient_input)
    assert found.problems == ()


def test_what_changes_a_view_in_place():
    """A hook on a view is lost when the view is changed; but a view of a module's input must stay one."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.flat, self.act = nn.Linear(4, 4), nn.Flatten(), nn.ReLU(inplace=True)

        def forward(self, x):
            y = 0.2 - self.act(self.linear(x))  # the linear layer's output is a view of a product of matrices
            self.act(self.flat(y))
            return y

    torch.manual_seed(0)
    model, x = Views(), torch.randn(2, 3, 4)
    found = signal(model, x, total)
    assert [each.output for each in found.rows] == [each.output for each in signal(model, x).rows]
    y = model.linear(x)
    last = (0.2 - y.relu()).relu()
    assert row(found, "act", 2).output == pytest.approx(mean_square(last))
    gradient = torch.autograd.grad(total(last), y)[0]
    assert row(found, "linear").gradient_output == pytest.approx(mean_square(gradient), rel=1e-4)


class Net(nn.Module):
    """Changes its input, a buffer and an attribute, draws random numbers, and calls modules twice."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.body = tnlayers.CPLinear(4, 4, rank=2)
        self.again, self.act, self.drop, self.norm = self.body, nn.ReLU(inplace=True), nn.Dropout(), nn.BatchNorm1d(4)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.steps, self.use_reentrant = 0, use_reentrant
        self.register_buffer("seen", torch.zeros(()))

    def inner(self, x):
        return self.act(self.head(self.act(self.again(self.body(x)))))

    def forward(self, x, tokens):
        self.steps += 1
        self.seen += 1
        x = self.drop(x.mul_(2)) + self.emb(tokens)
        x = self.inner(x) if self.use_reentrant is None else checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        x = self.rnn(self.normed(self.norm(x.flatten(0, 1)).view_as(x)))[0]
        return {"loss": self.tied(x).square().mean(), "tokens": tokens}


def arguments():
    return {"x": torch.randn(2, 3, 4), "tokens": torch.arange(6).reshape(2, 3) % 5}


def hook_counts(model):
    return [len(value) for module in model.modules() for name, value in vars(module).items() if name.endswith("hooks")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [None, lambda out: out["loss"]])
def test_the_model_stays_as_it_was(loss, training):
    torch.manual_seed(0)
    model, given = Net().train(training), arguments()
    model.norm.train(not training)
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(4)
    fired = []
    model.body.cores[0].register_hook(fired.append)
    model.body.cores[1].register_post_accumulate_grad_hook(fired.append)
    given["x"].requires_grad_()
    held, kept = dict(model.named_parameters()), {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: (b, b._version, b.clone()) for name, b in model.named_buffers()}
    hooks = hook_counts(model)
    attributes, flat = [vars(module).copy() for module in model.modules()], [*model.rnn._flat_weights]
    before, random = given["x"].detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        signal(model, given, loss)
    after = dict(model.named_parameters())
    assert all(after[name] is held[name] and torch.equal(held[name], kept[name]) for name in held)
    assert model.tied.weight is model.head.weight
    assert not model.head.weight.requires_grad
    assert [name for name, p in after.items() if p.grad is not None] == ["head.bias"]
    assert torch.equal(model.head.bias.grad, torch.ones(4))
    assert given["x"].grad is None
    assert not fired
    assert all(b is buffers[name][0] and b._version == buffers[name][1] for name, b in model.named_buffers())
    assert all(torch.equal(b, value) for b, _, value in buffers.values())
    assert all(a is b for a, b in zip(model.rnn._flat_weights, flat, strict=True))
    assert [vars(module) for module in model.modules()] == attributes
    assert hook_counts(model) == hooks
    assert torch.equal(given["x"].detach(), before)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(ZeroDivisionError):
        signal(model, given, lambda out: 1 / 0)
    assert dict(model.named_parameters()).keys() == held.keys()
    assert all(p is held[name] for name, p in model.named_parameters())
    assert [vars(module) for module in model.modules()] == attributes
    assert hook_counts(model) == hooks


def test_calls_and_names_of_shared_modules():
    torch.manual_seed(0)
    found = signal(Net(), arguments(), lambda out: out["loss"])
    assert [(each.name, each.call) for each in found.rows] == [
        ("drop", 1), ("emb", 1), ("body", 1), ("body", 2), ("act", 1), ("head", 1), ("act", 2), ("norm", 1),
        ("normed", 1), ("rnn", 1), ("tied", 1),
    ]  # fmt: skip
    assert row(found, "body").aliases == ("again",)
    assert row(found, "emb").input is None  # tokens
    assert row(found, "emb").gradient_output > 0
    assert row(found, "body", 2).input == row(found, "body").output
    assert "body = again (call 2)" in str(found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    found = []
    for choice in (None, use_reentrant):
        torch.manual_seed(0)
        found.append(signal(Net(choice), arguments(), lambda out: out["loss"]))
    assert found[0].rows == found[1].rows
    assert all(each.gradient_output is not None for each in found[1].rows)


def test_frozen_layers_let_gradients_pass_and_stay_frozen():
    torch.manual_seed(0)
    model, x = Net().eval(), arguments()
    expected = signal(model, x, lambda out: out["loss"])
    model.requires_grad_(False)
    tnlayers.freeze_(model)
    assert signal(model, x, lambda out: out["loss"]) == expected
    assert model.body.frozen
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models_whatever_is_around(context, training):
    torch.manual_seed(0)
    model, x = plain(2).train(training), torch.randn(2, 8, 5, 5)
    expected = signal(model, x, total)
    with context():
        assert signal(model, x.clone(), total) == expected


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_models_run_as_they_are_written(wrap):
    torch.manual_seed(0)
    model, x = plain(2), torch.randn(2, 8, 5, 5)
    assert signal(wrap(model), x, total) == signal(model, x, total)


def test_penalties_on_gradients_count_once():
    """Hooks on tensors also see the gradients that a loss computes by itself."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)

    def penalty(y):
        inner = torch.autograd.grad(y.sum(), model[0].weight, create_graph=True)[0]
        return y.sum() + inner.square().sum()

    y = model(x)
    expected = mean_square(torch.autograd.grad(penalty(y), y)[0])
    assert signal(model, x, penalty).rows[-1].gradient_output == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_do_not_overflow(dtype):
    values = torch.tensor([300.0, -400.0], dtype=dtype)
    assert moment(values)[:3] == (pytest.approx(125_000, rel=torch.finfo(dtype).eps * 4), 2, 0)
    values = torch.tensor([torch.finfo(dtype).smallest_normal * 4] * 3, dtype=dtype)
    if dtype is not torch.float64:  # whose squares no number holds
        assert moment(values).square == pytest.approx(values[0].double().item() ** 2)
    lost = moment(torch.tensor([3.0, float("nan"), float("-inf"), 1.0], dtype=dtype))
    assert lost == (pytest.approx(5.0), 4, 2, 3.0)
    assert moment(torch.tensor([3 + 4j, 0])).square == pytest.approx(12.5)


def test_half_precision_models():
    torch.manual_seed(0)
    model, x = plain(3), torch.randn(2, 8, 5, 5)
    expected = signal(model, x, total)
    for dtype in (torch.bfloat16, torch.float16):
        found = signal(model.to(dtype), x.to(dtype), total)
        for a, b in zip(found.rows, expected.rows, strict=True):
            assert a.dtype == dtype
            assert [getattr(a, side) for side in PLACES] == pytest.approx(
                [getattr(b, side) for side in PLACES], rel=0.1
            )
        assert found.problems == ()
    (found,) = signal(model, x.half() * 10_000).problems[:1]
    assert "float16 ends at 65,504" in found
    (found,) = signal(model, x.half() * 2e-6).problems
    assert "below float16's smallest normal number" in found
    gradient = signal(model, x.half(), lambda y: y.float().square().sum() * 1e-6).problems
    assert "torch.amp.GradScaler" in gradient[0]


def healthy():
    yield "norms", models.resnet20(), torch.randn(8, 3, 32, 32)
    yield "plain", plain(30), torch.randn(4, 8, 8, 8)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    yield "attention", nn.TransformerEncoder(layer, 4), torch.randn(4, 9, 32)
    zero = models.resnet20(norm=nn.Identity)
    tnlayers.scale_residual_(zero, "layer*.conv2", factor=0)
    nn.init.zeros_(zero.linear.weight)
    yield "zero branches", zero, torch.randn(8, 3, 32, 32)


def test_healthy_networks_have_no_problem():
    torch.manual_seed(0)
    for name, model, x in healthy():
        found = signal(model, x, lambda y: y.square().mean())
        assert found.problems == (), name
        assert "no problem" in str(found)
        assert len(found.rows) > 20, name


def test_healthy_transformers_have_no_problem():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    gpt = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **sizes)
    tokens = torch.randint(0, 50, (2, 32))
    for model in (transformers.BertForMaskedLM(bert), transformers.GPT2LMHeadModel(gpt)):
        found = signal(model, {"input_ids": tokens, "labels": tokens}, lambda out: out.loss)
        assert found.problems == ()
        assert all(each.gradient_output is not None for each in found.rows)


def only(found):
    """Return the only problem, after the name of its layer, which the row and the sentence share."""
    assert len(found.problems) == len(found.places) == 1, found.problems
    name, _, words = found.problems[0].partition(": ")
    assert found.rows[found.places[0]].name == name
    return name, words


def test_cores_that_were_drawn_again_are_named():
    torch.manual_seed(0)
    model, x = plain(6), torch.randn(2, 8, 5, 5)
    for k in (4, 8):
        model[k].cores.apply(redraw)
    ratio = kernel_ratio(model[4])
    assert ratio == pytest.approx(mean_square(model[4].weight) / model[4].variance.weight_std ** 2, rel=1e-4)
    found = signal(model, x)
    assert found.problems[0].startswith(f"4: its kernel's variance is {ratio:.2g} times what its initialisation asks")
    assert "(other layers like this: 1)" in found.problems[0]
    assert "reset_parameters() draws it again" in found.problems[0]
    assert found.problems[1].startswith("4: from here to the last weight layer")
    for k in (4, 8):
        model[k].reset_parameters()
    assert signal(model, x).problems == ()


def test_what_vanishes_or_explodes_slowly_is_named_with_its_cause():
    torch.manual_seed(0)
    for factor, words in ((0.3, ("below 0.0001", "vanishes")), (3.0, ("above 10000", "explodes"))):
        model = plain(8)
        for k in range(0, 16, 2):
            model[k].cores[0].data *= factor
        found = signal(model, torch.randn(2, 8, 8, 8))
        name, sentence = only(found)
        assert all(each in sentence for each in words)
        assert f"In 0, the kernel's variance is {factor**2:.2g} times" in sentence
        ratios = [each.output / found.rows[0].input for each in found.rows if each.weighted]
        outside = [k for k, ratio in enumerate(ratios) if not 1e-4 <= ratio <= 1e4]
        assert name == str(2 * outside[0])
        assert outside == list(range(outside[0], 8))


def test_gradients_that_vanish_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(30) for module in (nn.Linear(16, 16), nn.Sigmoid())])
    assert signal(model, torch.randn(4, 16)).problems == ()
    found = signal(model, torch.randn(4, 16), lambda y: y.square().mean())
    name, words = only(found)
    assert words.startswith("from here back to the first weight layer")
    assert "the gradient vanishes" in words
    last = found.rows[-2].gradient_output
    outside = [each.name for each in found.rows if each.weighted and each.gradient_input < 1e-8 * last]
    assert name == outside[-1]


def test_the_last_bias_does_not_hide_what_vanished():
    """Behind layers of gain 0.1, the bias alone gives the last layer an output of the usual size."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(6)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=0.11)
    last = nn.Linear(32, 4)
    nn.init.constant_(last.bias, 1.0)
    found = signal(nn.Sequential(*layers, last), torch.randn(8, 32))
    assert found.rows[-1].output > 0.9
    name, words = only(found)
    assert name == "2"  # 0.01^3 of the second moment; 0.01^2 behind layer 1 is the limit itself
    assert "without its bias" in words
    assert "vanishes" in words


def test_one_layer_alone():
    torch.manual_seed(0)
    layers = nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64)
    model = nn.Sequential(*layers, nn.Linear(64, 64))
    model[2].weight.data *= 4e-3
    name, words = only(signal(model, torch.randn(8, 64)))
    assert name == "2"
    assert "times that of its input" in words


def test_what_is_dead_is_named():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.constant_(model[0].bias, -100)
    name, words = only(signal(model, torch.randn(8, 16)))
    assert (name, words) == ("1", "all 128 entries of its output are zero, but not its input")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.soft = nn.Softmax(-1)

    def forward(self, x):
        return self.soft(x.masked_fill(torch.eye(4).bool(), float("-inf")))


def test_the_first_value_that_is_not_finite_is_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Masked(), nn.Linear(4, 4)), torch.randn(4, 4)
    found = signal(model, x)
    assert row(found, "1.soft").not_finite == {"input": 4}
    assert found.problems == ()  # a mask
    model[2].bias.data[1] = float("nan")
    found = signal(model, x, total)
    name, words = only(found)
    assert name == "2"
    assert words == "4 of the 16 entries of its output are NaN or infinite, and so are some of its parameters"
    assert "not finite" in str(found).splitlines()[0]
    model[2].bias.data[1] = 0
    x[0, 0] = float("inf")
    assert only(signal(model, x))[1] == "1 of the 16 entries of its input are NaN or infinite, before the layer has run"
    name, words = only(signal(model, torch.randn(4, 4), lambda y: (y * 0).abs().sqrt().sum()))  # 0 times infinity
    assert (name, words) == ("2", "16 of the 16 entries of the gradient of its output are NaN or infinite")
    half = nn.Linear(4, 4).half()
    nn.init.constant_(half.weight, 60_000)
    assert only(signal(half, torch.ones(2, 4).half()))[1].endswith("infinite; float16 ends at 65,504")


def test_what_is_refused():
    x, layer = torch.ones(1, 3), nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"x is \(1, 3\); .*torch.randn makes a tensor"):
        signal(layer, (1, 3))
    with pytest.raises(TypeError, match=r"model is of type function; it must be a torch\.nn\.Module"):
        signal(lambda x: x, x)
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        signal(nn.Linear(3, 3, device="meta"), x)
    with pytest.raises(TypeError, match="loss is of type str; it must be a function"):
        signal(layer, x, "mse")
    with pytest.raises(TypeError, match="loss returned a float; it must return a scalar tensor"):
        signal(layer, x, lambda y: 1.0)
    with pytest.raises(ValueError, match=r"loss returned shape \(1, 3\); it must return a scalar"):
        signal(layer, x, lambda y: y)
    with pytest.raises(ValueError, match="loss returned a tensor without a gradient"):
        signal(layer, x, lambda y: y.detach().sum())
    with pytest.raises(ValueError, match=r"no module of model gave a floating-point tensor \(Identity\)"):
        signal(nn.Identity(), torch.ones(1, dtype=torch.int64))


def test_lazy_layers_start_as_at_any_first_forward():
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(2, 3)
    assert signal(model, x, total).rows[0].input == pytest.approx(mean_square(x))
    assert model[0].weight.shape == (4, 3)


def test_the_table_and_its_page():
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(16, 16))
    model.add_module("act", nn.ReLU())
    nn.init.constant_(model[0].bias, -100)
    found = signal(model, torch.ones(8, 16))
    assert isinstance(found, Signal)
    lines, page = str(found).splitlines(), found._repr_html_()
    assert lines[0].split() == ["layer", "class", "input", "output"]
    assert lines[1].split() == ["<b>", "Linear", "1", f"{found.rows[0].output:.3g}"]
    assert lines[-2:] == ["second moments of one run in training mode; 1 problem", found.problems[0]]
    assert page.count("<tr") == page.count("</tr>") == 3
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert f"<p>{found.problems[0]}</p>" in page
    assert [asdict(each)["kind"] for each in found.rows] == ["Linear", "ReLU"]


def test_the_picture(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    model = plain(3)
    model[2].cores.apply(redraw)
    found = signal(model, torch.randn(2, 8, 8, 8), total)
    ax = figure.Figure().subplots()
    assert found.plot(ax) is ax
    assert ax.get_yscale() == "log"
    forward, gradient = (line.get_ydata() for line in ax.lines[:2])
    weighted = [each for each in found.rows if each.weighted]
    assert list(forward) == [each.output for each in weighted]
    assert list(gradient) == [each.gradient_output for each in weighted]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "4"]
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [1]  # the second layer
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"matplotlib is missing; pip install 'tnlayers\[plot\]'"):
        found.plot()


def test_explain_is_a_string_and_a_page():
    layer = tnlayers.TuckerConv2d(64, 64, 3, padding=1, rank=16, strategy="factorized")
    shown = layer.explain((32, 64, 32, 32))
    lines, page = shown.splitlines(), shown._repr_html_()
    assert isinstance(shown, str)
    assert shown.startswith("factorized plan of")
    assert shown == "\n".join(lines)
    assert page.count("<tr>") == sum(line.startswith("  ") for line in lines)
    assert f"<caption>{lines[0].replace(chr(39), '&#x27;')}</caption>" in page
    assert f"<p>{lines[-1].replace('>', '&gt;')}</p>" in page
    for cell in (" ".join(lines[2].split()[:5]), lines[2].split()[5]):
        assert f">{cell}</td>" in page
    for again in (pickle.loads(pickle.dumps(shown)), copy.deepcopy(shown)):
        assert (again, again._repr_html_()) == (shown, page)
