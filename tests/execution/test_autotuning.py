"""Autotune with known times: what it chooses, reports and keeps, and what later plans make of the kept orders."""

import itertools
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers.__main__ import main
from tnlayers.backend import progress, rate_tables
from tnlayers.execution import autotuning
from tnlayers.planning import tuned
from tnlayers.planning.choose import LIMIT, _dense, _search, plan
from tnlayers.planning.setting import Setting

SHAPE = 2, 8, 6, 6
DATE = r"\d{4}-\d\d-\d\d"


def layer(**options):
    return tnlayers.TuckerConv2d(8, 8, 3, padding=1, rank=3, **options)


def order_of(module, shape=SHAPE):
    return module._executor.plan(module._setting(shape)).order


@pytest.fixture
def folder(no_plans, tmp_path, monkeypatch):
    """An empty cache, not yet a folder."""
    monkeypatch.setenv(rate_tables.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wanted(folder, monkeypatch):
    """An order other than the planned one, which takes 1 ms; the planned one takes 4 ms, all others 5 ms."""
    planned = order_of(layer())
    found = next(each.order for each in layer()._executor.candidates(layer()._setting(SHAPE)) if each.order != planned)
    times = {found: 0.001, planned: 0.004}
    monkeypatch.setattr(autotuning, "_seconds", lambda module, x: times.get(module.strategy, 0.005))
    return found


@pytest.fixture
def later(monkeypatch):
    """Forget what was read, as a process that starts later has not read it; and time no more."""

    def forget():
        tuned._read.cache_clear()
        monkeypatch.setattr(autotuning, "_seconds", None)

    return forget


def test_the_fastest_order_is_chosen_and_the_report_sums_up(wanted, folder):
    model = nn.Sequential(layer(), layer(), nn.ReLU(), layer(bias=False, strategy="reconstruct"))
    report = tnlayers.autotune(model, torch.randn(SHAPE))
    assert report == {"0": wanted, "1": wanted} == dict(report)
    assert [each.strategy for each in model if not isinstance(each, nn.ReLU)] == [wanted, wanted, "reconstruct"]
    assert [(each.before, each.after, each.source) for each in report.layers] == [
        (0.004, 0.001, "timed"),
        (0.004, 0.001, "as 0"),
    ]
    assert (report.before, report.after) == (0.008, 0.002)
    text = str(report).splitlines()
    assert text[0].split("  ")[0] == "layer"
    assert re.fullmatch(rf"0 +{re.escape(wanted)} +4\.000 +1\.000 +75%  timed", text[1])
    assert text[-2] == "2 layers, 1 timed; in total 8.000 -> 2.000 ms, 75% saved"
    assert text[-1] == "left: 3 (its strategy is not 'auto')"
    assert text[-2].replace(">", "&gt;") in report._repr_html_()
    with pytest.raises(KeyError):
        report["2"]
    assert not folder.exists()


def test_the_planned_order_stays_where_none_is_faster(folder, monkeypatch):
    monkeypatch.setattr(autotuning, "_seconds", lambda module, x: 0.5)
    module = layer()
    planned = order_of(module)
    report = tnlayers.autotune(module, torch.randn(SHAPE))
    assert report == {"": planned}
    assert str(report).endswith("in total 500.000 -> 500.000 ms, 0% saved")
    empty = tnlayers.autotune(nn.ReLU(), torch.randn(2))
    assert str(empty).endswith("0 layers, 0 timed; in total 0.000 -> 0.000 ms, 0% saved")


def test_layers_are_timed_once_for_each_setting(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(autotuning, "_seconds", lambda module, x: seen.append(module) or 1.0)
    same, frozen, low = [layer(), layer()], layer().eval(), layer(memory="low")
    model = nn.Sequential(*same, frozen, low, nn.MaxPool2d(2), layer())
    report = tnlayers.autotune(model, torch.randn(SHAPE), candidates=1)
    assert [each.source for each in report.layers] == ["timed", "as 0", "timed", "timed", "timed"]
    assert len({*map(id, seen)}) == 4


def test_a_later_call_takes_what_was_kept(wanted, folder, later):
    report = tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True)
    assert [*folder.iterdir()] == [tuned.file_of("cpu")]
    later()
    again = tnlayers.autotune(nn.Sequential(layer(), layer()), torch.randn(SHAPE), cache=True)
    assert again == {"0": wanted, "1": wanted}
    assert (again.before, again.after) == (2 * report.before, 2 * report.after)
    assert all(re.fullmatch(f"kept {DATE}", each.source) for each in again.layers)
    with pytest.raises(TypeError, match="not callable"):  # more candidates are timed anew
        tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True, candidates=5)


def test_auto_plans_with_what_was_kept_for_exactly_its_setting(wanted, folder, later, monkeypatch):
    x = torch.randn(SHAPE)
    others = [
        (layer(), (3, 8, 6, 6)),
        (layer(), (2, 8, 6, 7)),
        (layer().eval(), SHAPE),
        (layer(memory="low"), SHAPE),
        (layer(dtype=torch.float64), SHAPE),
        (tnlayers.TuckerConv2d(8, 8, 3, padding=2, rank=3), SHAPE),
        (tnlayers.TuckerConv2d(8, 8, 3, padding=1, rank=4), SHAPE),
    ]
    before = [order_of(*each) for each in others]
    module = layer()
    expected, explained = module(x), module.explain(SHAPE)
    assert "tuned" not in explained
    tnlayers.autotune(layer(), x, cache=True)
    later()
    module.strategy = "auto"  # forgets the plans
    assert (module.strategy, order_of(module)) == ("auto", wanted)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert module._executor.latest.order == wanted
    assert plan(module.network, module.geometry, module._setting(SHAPE)).order == wanted
    last = module.explain(SHAPE).splitlines()[-1]
    assert re.fullmatch(re.escape(explained.splitlines()[-1]) + f"; order tuned {DATE}", last)
    assert "too near" not in module.explain(SHAPE)
    assert [order_of(*each) for each in others] == before
    assert not any("tuned" in each.explain(shape) for each, shape in others)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "tuned" not in module.explain(SHAPE)


def test_the_layout_and_autocast_of_the_input_are_part_of_the_setting(wanted, folder):
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        tnlayers.autotune(layer(), x, cache=True)
    (name,) = tuned.all_kept("cpu")
    assert "; bfloat16; " in name
    assert "; channels last; " in name


def test_a_new_process_plans_with_what_was_kept(wanted, folder):
    tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True)
    code = (
        "import torch, tnlayers; torch.set_num_threads(1)\n"
        "layer = tnlayers.TuckerConv2d(8, 8, 3, padding=1, rank=3)\n"
        f"layer(torch.randn{SHAPE})\n"
        f"print(layer.strategy, layer._executor.latest.order, layer.explain({SHAPE}), sep='\\n')\n"
    )
    before = [(path, path.read_bytes()) for path in folder.iterdir()]
    command = [sys.executable, "-W", "error", "-c", code]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[:2] == ["auto", wanted]
    assert re.search(f"; order tuned {DATE}$", lines[-1])
    assert [(path, path.read_bytes()) for path in folder.iterdir()] == before


def test_no_forward_writes_to_the_cache(wanted, folder):
    for module in (layer(), layer().eval()):
        module(torch.randn(SHAPE))
        module.explain(SHAPE)
    assert not folder.exists()
    tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True)
    before = [(path, path.stat()) for path in folder.iterdir()]
    for module in (layer(), layer().eval()):
        module(torch.randn(SHAPE)).sum().backward()
    assert [(path, path.stat()) for path in folder.iterdir()] == before


def changed(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


def chosen(**changes):
    def change(text):
        data = json.loads(text)
        (values,) = data["choices"].values()
        values |= changes
        return json.dumps(data)

    return change


BROKEN = {
    "empty": (lambda text: "", "it is no whole JSON file"),
    "truncated": (lambda text: text[:-20], "it is no whole JSON file"),
    "nested": (lambda text: "[" * 200_000, "it is no whole JSON file"),
    "no text": (lambda text: b"\xff\xfe\x00", "it is no text"),
    "another file": (lambda text: "[1, 2]", "it holds no tuned orders"),
    "another version": (changed(format=2), "its format is '2', and this version reads 1"),
    "another machine": (changed(machine="Z80"), "it is for the machine 'Z80', and this is '"),
    "another device": (changed(device="cuda"), "it is for the device 'cuda', and this is 'cpu "),
    "another torch": (changed(torch="torch 0.4"), "it is for the torch 'torch 0.4', and this is 'torch "),
    "no choices": (changed(choices=[]), "it lacks 'choices'"),
    "a choice that is none": (changed(choices={"a": 5}), "it has the choice '5'"),
    "no order": (chosen(order="import os"), "it has the order 'import os'"),
    "no number": (chosen(after=float("nan")), "it has the number 'nan' for 'after'"),
    "no date": (chosen(date=5), "it has the date '5'"),
    "unknown": (chosen(more=5), "it has the choice"),
    "an order of other cores": (chosen(order="0 > 7"), "strategy is '0 > 7'; accepted: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_foreign_file_changes_nothing_but_a_warning(wanted, folder, case):
    change, reason = BROKEN[case]
    planned, x = order_of(layer()), torch.randn(SHAPE)
    tnlayers.autotune(layer(), x, cache=True)
    path = tuned.file_of("cpu")
    whole, content = path.read_text(), change(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tuned._read.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert order_of(layer()) == planned
        layer()(x)
        layer().explain(SHAPE)
    assert len(told) == 1  # once
    text = str(told[0].message)
    assert text.startswith(f"{path} is not used: {reason}")
    assert text.endswith("; tnlayers.autotune(..., cache=True) replaces it")
    assert "tuned" not in layer().explain(SHAPE)
    tnlayers.autotune(layer(), x, cache=True)
    assert path.read_text() == whole


def test_what_other_processes_keep_meanwhile_stays(wanted, folder, monkeypatch):
    mine, theirs, third = (tuned.Choice("0", k, k, 4, "2031-02-03") for k in (1, 2, 3))
    tuned.keep("cpu", {"a": mine})
    path = tuned.file_of("cpu")
    data = json.loads(path.read_text())
    data["choices"] |= {"b": vars(theirs)}
    path.write_text(json.dumps(data))
    tuned.keep("cpu", {"a": third})
    tuned._read.cache_clear()
    assert tuned.all_kept("cpu") == {"b": theirs, "a": third}
    monkeypatch.setattr(tuned, "MOST", 2)
    tuned.keep("cpu", {"c": mine})  # drops the oldest
    tuned._read.cache_clear()
    assert tuned.all_kept("cpu") == {"a": third, "c": mine}
    assert [*folder.iterdir()] == [path]


def test_a_kept_order_keeps_the_limit_of_memory(folder):
    """Named, an order runs whatever memory it takes; under 'auto' it does not."""
    module, shape = tnlayers.TRConv2d(4, 4, 3, padding=1, rank=12), (4, 4, 16, 16)
    setting, planned = module._setting(shape), order_of(module, shape)
    limit = LIMIT * _dense(_search(module.network, module.geometry, setting, "auto", "auto").pricing)
    found = plan(module.network, module.geometry, setting, "0 > 1 > 2")
    assert found.peak > limit
    name = tuned.key(module.network, module.geometry, setting, "auto")
    tuned.keep("cpu", {name: tuned.Choice("0 > 1 > 2", 1.0, 0.5, 4, "2031-02-03")})
    assert order_of(module, shape) == planned != "0 > 1 > 2"
    assert "tuned" not in module.explain(shape)


def test_what_was_timed_before_an_interruption_is_kept(wanted, folder, later, monkeypatch):
    times, model = autotuning._seconds, nn.Sequential(layer(), nn.MaxPool2d(2), layer())

    def interrupted(module, x):
        if module is model[2]:
            raise KeyboardInterrupt
        return times(module, x)

    monkeypatch.setattr(autotuning, "_seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tnlayers.autotune(model, torch.randn(SHAPE), cache=True)
    assert (model[0].strategy, model[2].strategy) == ("auto", "auto")
    later()
    assert tnlayers.autotune(model[0], torch.randn(SHAPE), cache=True) == {"": wanted}


def test_a_cache_that_cannot_be_written_is_said_before_the_work(folder, later):
    later()
    folder.write_text("a file")
    with pytest.raises(OSError, match="cache"):
        tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True)


@pytest.mark.parametrize("name", ["cache", "progress", "candidates"])
def test_arguments_are_checked(name):
    with pytest.raises(TypeError, match=f"{name} is 'yes'; it must be "):
        tnlayers.autotune(layer(), torch.randn(SHAPE), **{name: "yes"})
    with pytest.raises(ValueError, match="candidates is 0; "):
        tnlayers.autotune(layer(), torch.randn(SHAPE), candidates=0)


def test_a_bar_is_shown_on_a_terminal(wanted, capsys, monkeypatch):
    model, x = nn.Sequential(layer(), nn.MaxPool2d(2), layer()), torch.randn(SHAPE)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    seen = {}
    for terminal, shown in itertools.product((False, True), (None, False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        for module in model[::2]:
            module.strategy = "auto"
        tnlayers.autotune(model, x, progress=shown)
        out, seen[terminal, shown] = capsys.readouterr()
        assert out == ""
    assert [key for key, err in seen.items() if err] == [(False, True), (True, None), (True, True)]
    assert re.match(r"\rtiming plans 1/2 \[#{12}\.{12}\] 0 s 0 *\rtiming plans 2/2 \[#{24}\] ", seen[True, None])


def test_info_names_the_file_and_counts_settings(wanted, folder, capsys):
    name = tuned.file_of("cpu").name
    assert re.fullmatch(r"tuned-cpu-[a-z0-9-]+-torch-\d+-\d+\.json", name)
    main(["info"])
    assert re.search(rf"^tuned cpu +0 settings \({re.escape(name)}\)$", capsys.readouterr().out, re.MULTILINE)
    tnlayers.autotune(layer(), torch.randn(SHAPE), cache=True)
    main(["info"])
    assert re.search(rf"^tuned cpu +1 setting \({re.escape(name)}\)$", capsys.readouterr().out, re.MULTILINE)


def test_an_empty_cache_warns_of_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.all_kept("cpu") == tuned.all_kept("meta") == {}
        assert plan(layer().network, layer().geometry, Setting(2, (6, 6), device="meta")).order


class Cast(nn.Module):
    """A layer that the model itself runs under another autocast than the caller's."""

    def __init__(self, enabled):
        super().__init__()
        self.enabled, self.layer = enabled, layer()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.layer(self.layer(x))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_layer_is_timed_under_the_autocast_that_the_model_sets(wanted, folder, enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        tnlayers.autotune(Cast(enabled), torch.randn(SHAPE), cache=True)
    (name,) = tuned.all_kept("cpu")
    assert f"; {'bfloat16' if enabled else 'float32'}; " in name


def test_the_example_and_the_random_state_stay(wanted):
    model, x = nn.Sequential(nn.ReLU(inplace=True), layer(), nn.Dropout(0.5)), torch.randn(SHAPE)
    tnlayers.rank_dropout_(model, 0.5)
    example, state = x.clone(), torch.get_rng_state()
    tnlayers.autotune(model, x)
    assert torch.equal(x, example)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_made_in_inference_mode_is_timed_as_inference(wanted, folder):
    with torch.inference_mode():
        module, x = layer(), torch.randn(SHAPE)
    tnlayers.autotune(module, x, cache=True)
    (name,) = tuned.all_kept("cpu")
    assert "; mode infer; " in name


def test_what_is_no_model_or_no_input_is_said():
    with pytest.raises(TypeError, match="model is of type int; it must be a torch"):
        tnlayers.autotune(5, torch.randn(SHAPE))
    with pytest.raises(Exception) as raised:  # noqa: PT011  (the model's own)
        tnlayers.autotune(layer(), [torch.randn(SHAPE)])
    assert "A tuple is taken as arguments" in raised.value.__notes__[0]


class Ways(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tnlayers.TRLSTM(16, 16, rank=2, strategy="factorized")
        self.body.ih_l0.strategy = "auto"
        self.head, self.other = tnlayers.TRLinear(16, 8, rank=2), tnlayers.TRLinear(16, 8, rank=2)
        self.named = tnlayers.TRLinear(8, 8, rank=2, strategy="reconstruct")
        self.attention = nn.MultiheadAttention(8, 2)
        tnlayers.parametrize_(self.attention, "in_proj_weight", rank=2, decompose=False)

    def forward(self, x):
        x = self.named(self.head(self.body(x)[0]))
        return self.attention(x, x, x)[0]


def test_the_report_names_what_it_leaves():
    model = Ways()
    report = tnlayers.autotune(model, torch.randn(3, 2, 16))
    assert [*report] == ["head"]
    assert [*report.left] == ["body", "other", "named", "attention.in_proj_weight"]
    assert report.left["other"] == "the example input does not reach it"
    assert report.left["named"] == "its strategy is not 'auto'"
    assert model.body.ih_l0.strategy == "auto"
    for name, reason in report.left.items():
        assert f"left: {name} ({reason})" in str(report)
        assert name in report._repr_html_()
    again = tnlayers.autotune(model, torch.randn(3, 2, 16))
    assert "left: head, named (its strategy is not 'auto')" in str(again)
    assert tnlayers.autotune(tnlayers.TRLinear(8, 8, rank=2), torch.randn(2, 8)).left == {}
