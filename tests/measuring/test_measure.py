"""Measuring of rates, and the command line. Here with tiny operations: that they are of all kinds, not how fast."""

import random
import re
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import tnlayers
from tnlayers.__main__ import main
from tnlayers.backend import rate_tables
from tnlayers.backend.devices import kind_of, name_of
from tnlayers.backend.rate_files import MEASURED, parsed
from tnlayers.backend.rate_tables import own_file, shipped, table_of
from tnlayers.backend.rates import BASES, CONTRACT, KINDS, MOVE, WEIGHTS, Rate, Rates
from tnlayers.measuring import fit as fitting
from tnlayers.measuring import measure, samples, timing, whole_plans
from tnlayers.measuring.fit import fit, non_negative
from tnlayers.measuring.samples import FAMILIES, Sampler
from tnlayers.ops import input_step
from tnlayers.planning.plan import Plan
from tnlayers.spec.geometry import Geometry


@pytest.fixture
def tiny(no_plans, tmp_path, monkeypatch):
    """Operations and repeats so few that a run takes a moment; an empty cache."""
    monkeypatch.setenv(rate_tables.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "ENTRIES", 1 << 17)
    monkeypatch.setattr(samples, "VALUES", 1 << 18)
    monkeypatch.setattr(samples, "CHANNELS", (1, 3, 8, 16, 36))
    monkeypatch.setattr(samples, "WIDTHS", (64,))
    monkeypatch.setattr(samples, "FEATURES", (32, 64))
    monkeypatch.setattr(samples, "LENGTHS", (16, 64))
    monkeypatch.setattr(samples, "EDGES", (4, 8))
    monkeypatch.setattr(fitting, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_OTHER", 1)
    monkeypatch.setattr(timing, "_REPEATS", (1, 1))
    monkeypatch.setattr(measure, "FEWEST", 1)
    monkeypatch.setattr(whole_plans, "LAYERS", whole_plans.LAYERS[2:8:3])
    return tmp_path / "cache"


def test_non_negative_least_squares_are_scipys():
    nnls = pytest.importorskip("scipy.optimize").nnls
    generator, at_the_border = torch.Generator().manual_seed(0), 0
    for number in range(80):
        features = torch.randn(3 + number % 9, 3, dtype=torch.float64, generator=generator)
        features[:, number % 3] *= 0 if number % 5 == 0 else 1e-4 if number % 5 == 1 else 1
        wanted = torch.randn(len(features), dtype=torch.float64, generator=generator)
        found, (expected, norm) = non_negative(features, wanted), nnls(features.numpy(), wanted.numpy())
        assert float((features @ found - wanted).norm()) == pytest.approx(norm, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
        at_the_border += bool((found == 0).any() and (found > 0).any())
    assert at_the_border > 20


def test_a_fit_finds_the_rates_in_spite_of_outliers():
    draw, true = random.Random(0), (30e-6, 5e-12, 40e-12)
    rows = []
    for number in range(60):
        flops, size = 10 ** draw.uniform(3, 9), 10 ** draw.uniform(3, 7)
        seconds = true[0] + true[1] * flops + true[2] * size
        rows.append((flops, size, seconds * (4 if number % 6 == 0 else draw.uniform(0.97, 1.03))))
    rates, error = fit(rows)
    assert 0.01 < error < 0.05
    assert rates == pytest.approx([(1 + error) * rate for rate in true], rel=0.05)
    rates, error = fit([(0.0, 0.0, 1e-5), (0.0, 0.0, 3e-5), (0.0, 0.0, 1e-5)])  # of calls alone
    assert rates == (pytest.approx(1e-5, rel=0.05), 0.0, 0.0)
    assert error < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_samples_are_of_every_kind_and_run(tiny, dtype):
    sampler, found = Sampler("cpu", dtype, table_of("cpu", "float32").rates, longest=1), {}
    with torch.no_grad():
        for family in FAMILIES * 3:
            for sample in sampler.samples(family):
                found.setdefault(sample.kind, []).append(sample)
                y = sample.forward()
                assert y.dtype == (sampler.held if sample.kind in (WEIGHTS, CONTRACT) else dtype)
                sample.both(torch.ones_like(y))
                if sample.kind != WEIGHTS:  # some only multiply entries
                    assert (sample.flops > 0) is (sample.kind not in (CONTRACT, MOVE))
                assert (sample.bytes > 0) is (sample.kind != CONTRACT)
    assert {*found} == {*KINDS, *BASES}


def test_the_share_of_samples_is_balanced_over_the_kinds():
    """Of the real sizes, without running them. The samples of a kind are at least a fifth of an equal share."""
    sampler = Sampler("meta", torch.float32, shipped()["cpu avx512", "float32"].rates, longest=0.02)
    sampler.device = "cpu"  # plan as there
    found = Counter(sample.kind for family in FAMILIES * 4 for sample in sampler.samples(family))
    assert {*found} == {*KINDS, *BASES}
    assert min(found.values()) > found.total() / len(found) / 5


def test_samples_of_a_form_compute_what_torchs_own_function_does(tiny):
    sampler = Sampler("cpu", torch.float64, table_of("cpu", "float32").rates, longest=1)
    functions = {"rows": F.linear, "1d": F.conv1d, "3d": F.conv3d, "transposed": F.conv_transpose2d}
    for form, function in functions.items():
        geometry, batch, size = sampler._layer("rows" if form == "rows" else f"{form} conv")
        sampler._layer = lambda family, drawn=(geometry, batch, size): drawn
        (sample, *_) = sampler.samples(f"{form} conv" if size else "rows")
        del sampler._layer
        inputs, outputs = geometry.in_channels, geometry.out_channels
        x, shape = sampler.tensor((batch, inputs, *size)), (outputs, inputs, *geometry.kernel_size)
        weight, options = sampler.tensor(shape), {}
        if form != "rows":
            options = {"stride": geometry.each("stride"), "padding": geometry.each("padding")}
        if form == "transposed":
            weight = weight.transpose(0, 1)
        expected = function(x, weight, **options)
        assert expected.shape == (batch, outputs, *geometry.output_size(size))
        torch.testing.assert_close(sample.forward(), expected)


def test_what_takes_too_long_by_the_table_is_not_drawn(tiny):
    sampler = Sampler("cpu", torch.float32, table_of("cpu", "float32").rates, longest=0)
    assert not [sample for family in ("conv", "point", "group conv") for sample in sampler.samples(family)]


def test_what_takes_longer_than_by_the_table_is_drawn_in_smaller_sizes(tiny):
    """A float16 convolution may take a hundred times as long as in float32, whose table stands in."""
    sampler = Sampler("cpu", torch.float32, table_of("cpu", "float32").rates, longest=0.02)
    sampler._layer = lambda family: (Geometry(8, 8, (3, 3), padding=1), 2, (8, 8))
    small, *_ = sampler.samples("conv")
    sampler._layer = lambda family: (Geometry(8, 8, (3, 3), padding=1), 8, (16, 16))
    large, *_ = sampler.samples("conv")
    assert (small.kind, large.kind, large.flops) == ("conv first", "conv first", 16 * small.flops)
    sampler.learn(small, 0.001)  # too short to say anything of FLOPs
    assert {sample.kind for sample in sampler.samples("conv")} == {"conv first", "conv last"}
    sampler.learn(large, 0.04)
    sampler.learn(large, 0.08)  # a slower one is the noise of the machine
    assert {sample.kind for sample in sampler.samples("conv")} == {"conv last"}
    sampler._layer = lambda family: (Geometry(8, 8, (3, 3), padding=1), 8, (8, 16))
    assert {sample.kind for sample in sampler.samples("conv")} == {"conv first", "conv last"}


def test_a_sample_counts_what_the_planner_counts(tiny):
    """FLOPs with channels rounded up, and the bytes of input, output and weight."""
    counting = dict.fromkeys(KINDS, Rate(1e-9, 0.0, 0.0))  # a table without kinds of forms
    sampler = Sampler("cpu", torch.float32, Rates.counting(counting, {"first": 16, "last": 8, "single": 1}), longest=1)
    sampler._layer = lambda family: (Geometry(5, 12, (3, 3), padding=1), 4, (7, 7))
    found = {sample.kind: sample for sample in sampler.samples("conv")}
    assert {*found} == {"conv first", "conv last"}
    for kind, inputs, outputs in (("conv first", 16, 16), ("conv last", 8, 16)):
        assert found[kind].flops == 2 * 4 * inputs * outputs * 9 * 49
        assert found[kind].bytes == 4 * (4 * 49 * (5 + 12) + 5 * 12 * 9)
        assert found[kind].forward().shape == (4, 12, 7, 7)
    sampler._layer = lambda family: (Geometry(6, 4, (4, 2), (2, 1), groups=2, transposed=True), 4, (7, 7))
    found = {sample.kind: sample for sample in sampler.samples("transposed group conv")}
    assert {*found} == {"group transposed first", "group transposed last"}
    for kind, inputs, outputs in (("group transposed first", 16, 16), ("group transposed last", 8, 8)):
        assert found[kind].flops == 2 * 4 * 2 * inputs * outputs * 8 * 49  # at every position of the input
        assert found[kind].bytes == 4 * (4 * 49 * 6 + 4 * 16 * 8 * 4 + 6 * 2 * 8)
    sampler._layer = lambda family: (Geometry(6, 4, ()), 5, ())
    (rows,) = {(sample.kind, sample.flops, sample.bytes) for sample in sampler.samples("rows")}
    assert rows == ("matmul rows last last", 2 * 5 * 6 * 4, 4 * (5 * 6 + 5 * 4 + 6 * 4))


def test_measuring_writes_a_table_that_later_processes_use(tiny, capsys):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = tnlayers.measure_rates(seconds=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    table = found.table
    assert (table.device, table.machine, table.dtype) == (kind_of("cpu"), name_of("cpu"), "float32")
    assert (table.origin, table.threads, table.torch) == (MEASURED, threads, torch.__version__)
    assert {kind for _, kind in found.errors} == {*table.rates.train} == {*table.rates.infer} == {*KINDS, *BASES}
    assert not found.skipped
    assert found.path == own_file("cpu", "float32")
    assert [*tiny.iterdir()] == [found.path]
    assert table_of("cpu", "float32") in shipped().values()  # this process had read the cache before
    rate_tables._own.cache_clear()
    rate_tables._table_of.cache_clear()
    assert str(table_of("cpu", "float32")) == str(table) == str(parsed(found.path.read_text()))
    assert table_of("cpu", "float32") not in shipped().values()
    text = str(found).splitlines()
    assert text[0] == f"rates: {table}"
    assert len(text) == 2 + 2 * len([*KINDS, *BASES]) + 1
    assert re.fullmatch(
        r"whole plans of 2 layers that were not fitted: estimate over time [\d.]+ in the median, [\d.]+ to [\d.]+",
        text[-1],
    )
    assert capsys.readouterr() == ("", "")  # stderr is no terminal


def test_what_a_dtype_does_not_support_is_skipped_and_named(tiny, monkeypatch):
    def missing(*_):
        raise RuntimeError("\"slow_conv3d\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(input_step, "_CONV", {**input_step._CONV, 3: missing})
    monkeypatch.setattr("tnlayers.ops.input_step.reorder", missing)
    monkeypatch.setattr(samples, "reorder", missing)
    found = tnlayers.measure_rates("cpu", torch.float16, seconds=0.01)
    skipped = {kind for kind in BASES if " 3d " in kind} | {MOVE}
    assert {*found.skipped} == skipped
    assert {*found.skipped.values()} == {"\"slow_conv3d\" not implemented for 'Half'"}
    rates = parsed(found.path.read_text()).rates
    assert {*KINDS, *BASES} - {*rates.train} == skipped - {MOVE}
    assert rates.infer[MOVE] == table_of("cpu", "float16").rates.infer[MOVE]  # a table must have it
    assert "not measured: conv 3d last, as torch says: \"slow_conv3d\" not implemented for 'Half'" in str(found)
    (note,) = [note for note in found.table.notes if note.startswith("not measured: ")]
    assert {*note.removeprefix("not measured: ").split(", ")} == skipped


def test_progress_is_one_line_on_a_terminal(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tnlayers.measure_rates(seconds=0.01, save=False)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(\r\d+ of 0 s, \d+ operations)+\n", err)
    tnlayers.measure_rates(seconds=0.01, save=False, progress=False)
    assert (out, capsys.readouterr()) == ("", ("", ""))
    assert not tiny.exists()


def test_estimates_of_whole_plans_are_compared_with_their_times(tiny):
    seen = []

    class Fixed:
        def seconds(self, function):
            seen.append(function())
            return 0.5

    rates = table_of("cpu", "float32").rates
    found = [*whole_plans.ratios(rates, "cpu", torch.float32, Fixed())]
    plans = [
        whole_plans._plan(*case, rates, mode, "cpu", torch.float32)
        for case, mode in zip(whole_plans.LAYERS, ("infer", "train"), strict=True)
    ]
    assert all(isinstance(plan, Plan) for plan in plans)
    assert found == [plan.seconds / 0.5 for plan in plans]
    y, gradients = seen
    assert y.shape == (1, 96, 20, 20)
    assert [each.shape for each in gradients[1:]] == [*plans[1].network.core_shapes]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "abacus"}, ValueError, "device is 'abacus', and torch finds no such device here"),
        ({"device": "cpu:0"}, ValueError, "device is 'cpu:0'; it must be a device type such as 'cpu'"),
        ({"device": torch.device("cpu")}, TypeError, r"device is device\(type='cpu'\); it must be a device type"),
        ({"device": "meta"}, ValueError, "device is 'meta', which computes nothing"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8; accepted: torch.float32, torch.bfloat16"),
        ({"dtype": "float32"}, ValueError, "dtype is 'float32'; accepted: torch.float32"),
        ({"seconds": 0}, ValueError, "seconds is 0; it must be a number above 0"),
        ({"seconds": float("nan")}, ValueError, "seconds is nan; it must be a number above 0"),
        ({"seconds": "50"}, TypeError, "seconds is '50'; it must be a number above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tnlayers.measure_rates(**arguments)


def test_a_dtype_that_the_device_does_not_have_is_refused(monkeypatch):
    """As Apple's GPUs have no float64: torch says it with a TypeError."""
    zeros = torch.zeros

    def without_doubles(*size, dtype=None, **options):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", without_doubles)
    with pytest.raises(ValueError, match=r"^dtype is torch\.float64, which device 'cpu' does not have"):
        tnlayers.measure_rates("cpu", torch.float64)


# ------------------------------------------------------------------ the command line


def run(capsys, *arguments):
    """Return the exit code and what was printed."""
    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


def test_rates_from_the_command_line(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tnlayers.__main__.keep_freed_memory", lambda: None)  # it is for the whole process
    code, out, err = run(capsys, "rates", "--seconds", "0.01", "--dtype", "float64", "--dry-run")
    assert (code, err) == (0, "nothing was written\n")
    assert out.startswith(f"rates: {kind_of('cpu')} float64, measured ")
    assert not tiny.exists()
    file = tmp_path / "new" / "rates.csv"
    code, out, err = run(capsys, "rates", "--seconds", "0.01", "--out", str(file))
    assert (code, err) == (0, f"written to {file}\n")
    assert str(parsed(file.read_text())) == out.splitlines()[0].removeprefix("rates: ")
    assert not tiny.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "python -m tnlayers: the following arguments are required: {rates,info}"),
        (
            ("rates", "--dtype", "int8"),
            "python -m tnlayers rates: argument --dtype: invalid choice: 'int8' (choose from",
        ),
        (
            ("rates", "--device", "abacus"),
            "python -m tnlayers: device is 'abacus', and torch finds no such device here",
        ),
        (("rates", "--seconds", "0"), "python -m tnlayers: seconds is 0.0; it must be a number above 0"),
        (("rates", "--out", "."), "python -m tnlayers: "),
        (
            ("rates", "--out", "a", "--dry-run"),
            "python -m tnlayers rates: argument --dry-run: not allowed with argument --out",
        ),
        (("rates", "--device", "hpu"), "python -m tnlayers: device is 'hpu', and torch finds no such device here"),
        (("rates", "--out", "file/below"), "python -m tnlayers: file cannot be written: "),
    ],
)
def test_an_error_is_one_sentence_and_code_2(tiny, capsys, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tnlayers.__main__.keep_freed_memory", lambda: None)
    monkeypatch.setattr(measure, "_timed", None)  # nothing is begun
    (tmp_path / "file").touch()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_info_says_what_a_report_needs(tiny, avx512, capsys, monkeypatch):
    code, out, _ = run(capsys, "info")
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert code == 0
    assert lines["tnlayers"].strip() == tnlayers.__version__
    assert torch.__version__ in lines["torch"]
    assert f"AVX512, {torch.get_num_threads()} thread" in lines["cpu"]
    assert str(tiny) in lines["cache"]
    monkeypatch.setenv("HOME", str(tiny.parent))  # a report names no user
    assert "  ~/cache (TNLAYERS_CACHE names another)" in run(capsys, "info")[1]
    assert lines["rates cpu float32"].strip() == "cpu avx512 float32, measured 2026-11-26 (shipped)"
    assert lines["rates cpu float64"].strip() == "cpu avx512 float32, measured 2026-11-26 (shipped)"


def test_info_names_the_users_table_and_what_was_estimated(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    _, out, _ = run(capsys, "info")
    assert re.search(r"rates cpu float32 +cpu .* float32, estimated from properties of .* \(no table\)", out)
    path = tnlayers.measure_rates(seconds=0.01).path
    rate_tables._own.cache_clear()
    rate_tables._table_of.cache_clear()
    _, out, _ = run(capsys, "info")
    assert re.search(rf"rates cpu float64 +cpu .* float32, measured .* \(own, {path.name}\)", out)


def test_an_argument_without_effect_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(measure, "_timed", None)  # nothing is begun
    with pytest.raises(ValueError, match="path is 'a', and save is False; give a path only with save=True"):
        tnlayers.measure_rates(path="a", save=False)
    for name in ("save", "progress"):
        with pytest.raises(TypeError, match=f"{name} is 'no'; it must be True or False"):
            tnlayers.measure_rates(**{name: "no"})


def test_an_interruption_is_one_sentence(tiny, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tnlayers.__main__.keep_freed_memory", lambda: None)
    monkeypatch.setattr(measure, "_timed", interrupted)
    code, out, err = run(capsys, "rates")
    assert (code, out, err) == (130, "", "\npython -m tnlayers: interrupted; nothing was written\n")
    assert not [path for path in tiny.rglob("*") if path.is_file()]
