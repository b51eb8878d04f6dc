"""``tnlayers.signal`` names what breaks networks, has no problem with healthy ones, and leaves nothing behind."""

import copy
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tnlayers
from tnlayers import models, signal, summary
from tnlayers.overview.depth import signal_steps
from tnlayers.overview.trace import zero_cores

SCALES = 1e-4, 1e-2, 1.0, 255.0, 1e4


def square_loss(y):
    return y.square().mean()


def digits(y):
    return F.cross_entropy(y, torch.arange(len(y)) % y.shape[1])


def only(found):
    """Return the only problem, after the name of its layer, which the row and the sentence share."""
    assert len(found.problems) == len(found.places) == 1, found.problems
    name, _, words = found.problems[0].partition(": ")
    assert found.rows[found.places[0]].name == name
    return name, words


class Root(nn.Module):
    """A norm that no class of torch names."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()


class Between(nn.Module):
    """Norms as functions in the model's own code, and residual connections."""

    def __init__(self, width, depth, residual):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.residual = residual

    def forward(self, x):
        for layer in self.layers:
            y = layer(F.layer_norm(x, x.shape[-1:], eps=1e-12)).relu()
            x = x + y if self.residual else y
        return x


class NormedAct(nn.Module):
    """A norm that calls other modules, and so has no row, as in timm; and a gate on a side branch."""

    def __init__(self, width):
        super().__init__()
        self.act, self.squeeze, self.gate = nn.ReLU(), nn.Linear(width, width), nn.Sigmoid()
        nn.init.normal_(self.squeeze.weight, std=1e-3)

    def forward(self, x):
        x = self.act(F.batch_norm(x, None, None, training=True, eps=1e-12))
        return x * self.gate(self.squeeze(x)) * 2


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


def convolutions(norm, depth=6, bias=False, width=8):
    """A network on images, with 3 channels in and 5 classes."""
    parts = []
    for k in range(depth):
        conv = tnlayers.TRConv2d(width if k else 3, width, 3, padding=1, rank=2, bias=bias)
        parts += [conv, norm(width), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def dense(depth=6, width=32, norm=nn.Identity, bias=True):
    parts = [module for _ in range(depth) for module in (nn.Linear(width, width, bias=bias), norm(), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, 4, bias=bias))


def scaled(factor, depth=8, width=32, norm=nn.Identity):
    """A network whose layers multiply the second moment by ``factor`` each, with the ReLU."""
    model = dense(depth, width, norm, bias=False)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=(2 * factor / width) ** 0.5)
    return model


HEALTHY = {
    "batch norm": lambda: convolutions(nn.BatchNorm2d),
    "group norm": lambda: convolutions(lambda width: nn.GroupNorm(2, width)),
    "instance norm": lambda: convolutions(nn.InstanceNorm2d),
    "no norm": lambda: convolutions(lambda _: nn.Identity()),
    "no norm, biases": lambda: convolutions(lambda _: nn.Identity(), bias=True),
}
FLAT = {
    "layer norm": lambda: dense(norm=lambda: nn.LayerNorm(32)),
    "RMS norm": lambda: dense(norm=lambda: nn.RMSNorm(32)),
    "a norm of one's own": lambda: dense(norm=Root, bias=False),
    "functions": lambda: Between(32, 6, residual=False),
    "functions on branches": lambda: Between(32, 6, residual=True),
    "default linear layers": dense,
    "one norm": lambda: nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)),
    "He": lambda: scaled(1.0),
    "norms with gates": lambda: dense(norm=lambda: NormedAct(32), bias=False),
}


@pytest.mark.parametrize("name", [*HEALTHY, *FLAT])
def test_healthy_networks_on_inputs_of_any_scale(name):
    torch.manual_seed(0)
    model = {**HEALTHY, **FLAT}[name]()
    x = torch.rand(16, 3, 8, 8) if name in HEALTHY else torch.randn(16, 32)
    for scale in SCALES:
        assert signal(model, x * scale, square_loss).problems == (), (name, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_pooling_and_layers_of_torch(scale):
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    assert signal(model, torch.rand(8, 1, 28, 28) * scale, digits).problems == ()


def test_healthy_models_on_raw_pixels():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (8, 3, 16, 16)).float()
    ring = models.resnet20(conv=lambda *a, **k: tnlayers.TRConv2d(*a, rank=2, **k))
    for model in (models.resnet20(), ring, models.resnet20().eval(), convolutions(nn.BatchNorm2d, 12)):
        assert signal(model, x, digits).problems == ()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("factor", "what"), [(0.1, "vanishes"), (10.0, "explodes")])
def test_without_norms_the_gain_counts(scale, factor, what):
    torch.manual_seed(0)
    name, words = only(signal(scaled(factor), torch.randn(16, 32) * scale))
    assert name in ("9", "12", "15")  # about 10^-4 behind the fourth layer
    assert "times that of the first weight layer's input" in words
    assert what in words


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(32), Root])
def test_behind_a_norm_the_rules_start_anew(scale, norm):
    torch.manual_seed(0)
    for factor, what in ((0.1, "vanishes"), (10.0, "explodes")):
        model = nn.Sequential(nn.Linear(32, 32, bias=False), norm(), *scaled(factor))
        name, words = only(signal(model, torch.randn(16, 32) * scale))
        assert name in ("11", "14", "17")
        assert what in words
        assert ("times that of the output of 1 " in words) or ("times that of the input of 2 " in words) or scale == 1


def test_the_reference_is_that_of_the_latest_norm():
    """Moments by hand: 100 goes in, the norm makes 1 of them, and the layers multiply by 1/4 and 1/9."""
    from tnlayers.overview.moments import Recorder  # noqa: PLC0415
    from tnlayers.overview.trace import Trace  # noqa: PLC0415

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Root(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for k, gain in ((0, 2.0), (2, 0.5), (3, 1 / 3)):
        model[k].weight.data = torch.eye(2) * gain
    recorder = Recorder(model, gradients=False)
    with recorder.recording(), torch.no_grad():
        model(torch.tensor([[10.0, -10.0]]))
    steps = [*signal_steps(Trace(recorder.calls, list("abcd"), {}, None, 5.0))]
    assert [step.entering for step in steps] == pytest.approx([1, 1, 1 / 4])
    assert [step.leaving for step in steps] == pytest.approx([4, 1 / 4, 1 / 36])
    assert [step.reference for step in steps] == ["the first weight layer's input", *["the input of c"] * 2]
    assert [step.segment for step in steps] == [0, 1, 1]


def test_norms_in_eval_mode_hide_nothing():
    """Before training, they pass the scale on."""
    torch.manual_seed(0)
    model = scaled(0.1, norm=lambda: nn.BatchNorm1d(32, eps=1e-12)).eval()
    assert "vanishes" in only(signal(model, torch.randn(16, 32)))[1]
    assert signal(model.train(), torch.randn(16, 32)).problems == ()


def test_norms_of_parallel_branches_on_raw_pixels():
    """Each branch ends with a norm that has no row, since it calls an activation."""

    class NormAct(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.act = nn.Identity()

        def forward(self, x):
            return self.act(F.batch_norm(x, None, None, training=True)) / 6  # a small weight, as in RepVGG

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_a, self.norm_b = NormAct(width), NormAct(width)
            nn.init.normal_(self.b.weight, std=1e-2)

        def forward(self, x):
            return (self.norm_a(self.a(x)) + self.norm_b(self.b(x))).relu()

    torch.manual_seed(0)
    model = nn.Sequential(*[Block(16) for _ in range(3)], nn.Linear(16, 4))
    nn.init.normal_(model[-1].weight, std=0.01)
    assert signal(model, torch.rand(32, 16) * 255, digits).problems == ()


def test_layers_that_are_zero_by_a_gain():
    class Gained(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return F.linear(x, self.weight * self.gain)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = Gained()

        def forward(self, x):
            return x + self.linear(x)

    assert signal(nn.Sequential(Branch(), nn.Linear(16, 4)), torch.randn(8, 16), digits).problems == ()


def test_small_last_layers_are_healthy():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.deviation = dense(2, 64), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(x)
            return torch.cat([self.mean(x), self.deviation(x)], 1)

    torch.manual_seed(0)
    for width in (3, 64, 400):
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        nn.init.uniform_(model[-1].weight, -3e-3, 3e-3)
        nn.init.uniform_(model[-1].bias, -3e-3, 3e-3)
        assert signal(model, torch.randn(64, 8), square_loss).problems == ()
    model = Heads()
    for head in (model.mean, model.deviation):
        nn.init.uniform_(head.weight, -3e-3, 3e-3)
    assert signal(model, torch.randn(64, 64), square_loss).problems == ()


def test_where_the_gradient_is_zero():
    torch.manual_seed(0)
    x = torch.randn(16, 32)
    model = nn.Sequential(*dense(2)[:-1], nn.Linear(32, 1), nn.Softmax(1))
    name, words = only(signal(model, x, lambda y: F.binary_cross_entropy(y, torch.ones(16, 1) / 2)))
    assert name == "7"
    assert words == (
        "the gradient of its input is zero, and that of its output is not; the layers in front of it do not learn: 3"
    )
    name, words = only(signal(dense(2), x, lambda y: y.sum() * 0))
    assert (name, "the loss does not change with it" in words) == ("6", True)
    model = nn.Sequential(*dense(2), nn.Sigmoid())
    nn.init.constant_(model[6].bias, 200.0)
    name, words = only(signal(model, x, lambda y: F.binary_cross_entropy(y, torch.zeros_like(y))))
    assert name == "7"
    model = dense(2)
    for weight in model.parameters():
        nn.init.zeros_(weight)
    assert "its weight is zero" in signal(model, x, digits).problems[0]
    name, words = only(signal(nn.Sequential(*dense(2)[:4], Detached(), *dense(2)[4:]), x, digits))
    assert name == "3"
    assert words.startswith(
        "no gradient reaches its output; unless it is to stay as it is, look behind it for detach()"
    )
    assert words.endswith("it and the 1 layers in front of it do not learn")


def test_gradients_that_vanish_to_zero_are_named_where_they_vanish():
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(120) for module in (nn.Linear(8, 8), nn.Sigmoid())])
    found = signal(model, torch.randn(4, 8), square_loss)
    assert found.rows[0].gradient_output == 0
    name, words = only(found)
    assert int(name) > 200
    assert words.startswith("from here back to the first weight layer that it reaches, the squared norm")
    assert "the gradient vanishes" in words


def test_parts_that_the_loss_does_not_need():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.rnn, self.head, self.other = nn.Embedding(9, 8), nn.LSTM(8, 8), dense(1, 8), dense(1, 8)

        def forward(self, tokens):
            _, (last, _) = self.rnn(self.emb(tokens))
            return self.head(last[0]), self.other(last[0])

    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (5, 16))
    assert signal(Parts(), tokens, lambda y: digits(y[0])).problems == ()


def test_a_loss_that_is_not_finite():
    torch.manual_seed(0)
    x, model = torch.randn(32, 32), dense(1)
    nan = signal(model, x, lambda y: F.cross_entropy(y, torch.full((32,), -100)))
    assert nan.problems == ("the loss is NaN, and all outputs up to that of 3 are finite",)
    assert nan.places == (3,)
    assert signal(model, x, lambda y: -y.relu().log().mean()).problems[0].startswith("the loss is infinite")


def zero(layer, cores):
    for core in [*layer.cores][:cores]:
        nn.init.zeros_(core)


@pytest.mark.parametrize("loss", [None, digits])
def test_zero_kernels_are_named(loss):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    for cores, words in (
        (1, "its kernel is zero; "),
        (2, "its kernel is zero, and 2 of its cores are, so none of its"),
    ):
        model = convolutions(lambda _: nn.Identity())
        zero(model[6], cores)
        assert zero_cores(model[6]) == cores
        name, sentence = only(signal(model, x, loss))
        assert name == "6"
        assert sentence.startswith(words)
    model = nn.Sequential(*dense(3))
    nn.init.zeros_(model[3].weight)
    name, sentence = only(signal(model, torch.randn(16, 32), loss))
    assert (name, sentence) == ("3", "its weight is zero; the output of the model does not depend on its input")


@pytest.mark.parametrize("loss", [None, digits])
def test_layers_that_are_zero_on_purpose(loss):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    model = models.resnet20(conv=lambda *a, **k: tnlayers.TRConv2d(*a, rank=2, **k))
    tnlayers.scale_residual_(model, "layer*.conv2", factor=0)
    assert signal(model, x, loss).problems == ()
    nn.init.zeros_(model.linear.weight)  # the first step changes it, and the next ones the others
    assert signal(model, x, loss).problems == ()
    zero(model.layer1[0].conv2, 2)
    name, words = only(signal(model, x, loss))
    assert (name, "none of its cores ever gets a gradient" in words) == ("layer1.0.conv2", True)


def test_one_number_for_all_samples_is_no_problem_for_equal_samples():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.zeros_(model[2].weight)
    assert signal(model, torch.ones(8, 4)).problems == ()


def kaiming(depth, norm=nn.Identity, bias=True):
    model = convolutions(lambda width: norm(width) if norm is nn.BatchNorm2d else norm(), depth, bias, width=16)
    for layer in model:
        if isinstance(layer, tnlayers.TensorLayer):
            layer.cores.apply(lambda cores: [nn.init.kaiming_normal_(core) for core in cores.parameters(recurse=False)])
    return model


def test_cores_that_are_all_a_little_off():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = kaiming(6)
    for bias, norm in ((True, nn.Identity), (True, nn.BatchNorm2d)):
        model = kaiming(6, norm, bias)
        found = signal(model, x)
        ratios = [row.kernel for row in found.rows if row.kernel is not None]
        assert all(0.03 < ratio < 1 / 2 for ratio in ratios), ratios
        if norm is nn.BatchNorm2d:
            assert found.problems == ()
            continue
        name, words = only(found)
        assert name == "0"
        assert f"6 tensor layers' kernels are {min(ratios):.2g} to {max(ratios):.2g} times" in words
        assert "unless they were fitted or trained, reset_parameters()" in words


def test_trained_networks_may_change_their_norms():
    """Factors within 4 of random kernels, with norms for all to the same side."""
    torch.manual_seed(0)
    x, noise = torch.randn(8, 3, 8, 8), torch.Generator().manual_seed(1)
    for depth in (6, 9):
        for _ in range(2):
            model = convolutions(lambda _: nn.Identity(), depth, bias=True)
            with_norms = convolutions(nn.BatchNorm2d, depth)
            for layer, same in zip(model[::3], with_norms[::3], strict=False):
                if isinstance(layer, tnlayers.TensorLayer):
                    power = float(torch.rand((), generator=noise))
                    layer.cores[0].data *= 4 ** (2 * power - 1)
                    same.cores[0].data *= 4**-power / 2
            assert not any("tensor layers' kernels" in words for words in signal(model, x).problems)
            assert signal(with_norms, x, square_loss).problems == ()


class Cache(nn.Module):
    """Keeps what it sees, as caches and logs do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.cache, self.log, self.names, self.latest = {"old": 1}, [1, 2], {"a"}, deque([1, 2, 3], maxlen=3)
        self.ordered, self.plain = OrderedDict(a=1, b=2), torch.zeros(2)

    def forward(self, x):
        self.cache["x"] = torch.cat([self.cache["x"], x]) if "x" in self.cache else x
        self.log.clear()
        self.names.add("b")
        self.latest.append(x)
        self.ordered.move_to_end("a")
        self.plain += 1
        return self.linear(self.cache["x"])


@pytest.mark.parametrize("measure", [signal, lambda model, x: signal(model, x, square_loss)])
def test_containers_get_their_items_back(measure):
    model = Cache()
    before = {name: (value, copy.copy(value)) for name, value in vars(model).items() if name != "plain"}
    plain = model.plain
    measure(model, torch.ones(2, 4))
    for name, (value, items) in before.items():
        assert vars(model)[name] is value
        assert value == items, name
    assert [*model.ordered] == ["a", "b"]
    assert model.plain is plain
    assert torch.equal(plain, torch.zeros(2))
    assert len(model(torch.ones(2, 4))) == 2


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_what_only_the_loss_holds_gets_no_gradient(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if reentrant is None else checkpoint(self.linear, x, use_reentrant=reentrant)

    model, x, criterion = Net(), torch.randn(8, 4), nn.Linear(4, 1)
    weight, fired = model.linear.weight, []
    if not reentrant:
        criterion.weight.register_post_accumulate_grad_hook(fired.append)
    criterion.bias.grad = before = torch.ones(1)
    found = signal(model, x, lambda y: criterion(y).sum() + weight.square().sum())
    assert found.rows[0].gradient_output == pytest.approx(criterion.weight.square().mean().item() / 1, rel=1e-5)
    assert weight.grad is None
    assert criterion.weight.grad is None
    assert criterion.bias.grad is before
    assert torch.equal(before, torch.ones(1))
    assert not fired


def test_a_loss_that_is_a_module_keeps_its_state():
    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, y):
            return self.norm(y).pow(3).mean()

    criterion = Criterion()
    signal(nn.Linear(4, 4), torch.randn(8, 4), criterion)
    assert criterion.norm.num_batches_tracked == 0
    assert torch.equal(criterion.norm.running_mean, torch.zeros(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_new_batch_norms_in_eval_mode_are_the_cause():
    torch.manual_seed(0)
    model, x, loss = models.resnet56().eval(), torch.randn(8, 3, 32, 32), digits
    (problem,) = signal(model, x, loss).problems
    assert problem.startswith("bn1: it and 54 more batch norms ran in eval mode before any batch in training mode")
    assert signal(model.train(), x, loss).problems == ()
    with torch.no_grad():
        for _ in range(30):
            model(x)
    assert signal(model.eval(), x, loss).problems == ()


@pytest.mark.filterwarnings(
    r"ignore:.*torch\.jit\.(trace|script):FutureWarning", r"ignore:.*torch\.jit:DeprecationWarning"
)
def test_scripts_are_refused():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    traced = torch.jit.trace(layer, x)
    for measure in (signal, summary):
        with pytest.raises(TypeError, match=r"model is a RecursiveScriptModule \(torch\.jit\.script or"):
            measure(torch.jit.script(layer), x)
        with pytest.raises(TypeError, match=r"module '1' of model is a TopLevelTracedModule .*pass the model that"):
            measure(nn.Sequential(layer, traced), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [None, square_loss])
def test_models_made_in_inference_mode(training, loss):
    torch.manual_seed(0)
    parts = nn.Linear(3, 4), tnlayers.TRLinear(4, 4, rank=2), nn.BatchNorm1d(4)
    with torch.inference_mode():
        model = copy.deepcopy(nn.Sequential(*parts)).train(training)
        x = torch.randn(5, 3)
    assert next(model.parameters()).is_inference()
    expected = signal(nn.Sequential(*parts).train(training), x.clone(), loss)
    assert signal(model, x, loss).rows == expected.rows
    assert next(model.parameters()).is_inference()
    assert summary(model, x).totals.flops == summary(nn.Sequential(*parts).train(training), x).totals.flops


def test_what_is_refused_by_name():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    for loss in (None, square_loss):
        with pytest.raises(ValueError, match="x gives empty tensors only; each axis of x, the batch too"):
            signal(layer, torch.ones(0, 3), loss)
    with pytest.raises(ValueError, match=r"loss returned a tensor of torch\.complex64; it must be real"):
        signal(layer, x, lambda y: y.sum() * 1j)
    with pytest.raises(ValueError, match="loss returned a tensor that no module's output reaches"):
        signal(layer, x, lambda _: layer.weight.square().sum())


def test_the_page_marks_problems():
    model = dense(1)
    nn.init.constant_(model[0].bias, -100.0)
    found = signal(model, torch.randn(16, 32))
    page = found._repr_html_().splitlines()
    (marked,) = [line for line in page if "background-color" in line]
    assert f'title="{found.problems[0]}"' in marked
    assert f">{only(found)[0]}</td>" in marked
    assert page[1].startswith('<thead><tr><th scope="col" style="text-align: left">layer</th>')
    assert page[1].endswith("</tr></thead>")
    assert page[2] == "<tbody>"
    assert page.count("</tbody>") == 1


def test_pictures_that_can_be_read():
    figure = pytest.importorskip("matplotlib.figure")
    found = signal(nn.Sequential(*[nn.Linear(2, 2) for _ in range(81)]), torch.ones(1, 2))
    labels = [label.get_text() for label in found.plot(figure.Figure().subplots()).get_xticklabels()]
    assert labels == [str(k) for k in range(0, 81, 3)]
    found = signal(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.ones(1, 2))
    ax = found.plot(figure.Figure().subplots())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    assert list(ax.lines[0].get_ydata()) == [row.output for row in found.rows]
    with pytest.raises(TypeError, match="ax is of type int; it must be axes of matplotlib, or None"):
        found.plot(5)
