"""Fits side by side: the same result for any number of workers, errors, threads, and what is shown meanwhile."""

import io
import logging
import sys
import threading

import pytest
import torch
from torch import nn

from tnlayers import TensorizeConfig, TRConv2d, tensorize_
from tnlayers.backend import progress as bars
from tnlayers.layers.base import TensorLayer
from tnlayers.tensorize.side_by_side import one_thread, side_by_side


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(24, 36), nn.Linear(8, 8)
    )
    made[4].weight.data.zero_()  # its cores are drawn, from torch's generator with a seed of its own
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["tr", "cp"])
def test_results_do_not_depend_on_the_number_of_workers(name, monkeypatch):
    monkeypatch.setattr("tnlayers.fitting.decompose.SWEEPS", 5)
    states, errors = [], []
    for workers in (1, 2, 5):
        made, state = model(), torch.get_rng_state()
        report = tensorize_(made, TensorizeConfig(name, rank=0.4), workers=workers)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(report.swapped) == 5
        states.append(made.state_dict())
        errors.append([layer.error for layer in report.layers])
    for state, error in zip(states[1:], errors[1:], strict=True):
        assert error == errors[0]
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_names_its_layer_and_changes_nothing(workers, monkeypatch):
    made, fit = model(), TensorLayer.set_weight_

    def refuse(layer, weight, **given):
        if weight.shape[0] in (16, 36):
            raise ValueError(f"no fit of {tuple(weight.shape)}")
        return fit(layer, weight, **given)

    monkeypatch.setattr(TensorLayer, "set_weight_", refuse)
    threads, before = torch.get_num_threads(), list(made)
    with pytest.raises(ValueError, match=r"^1: no fit of \(16, 12, 3, 3\)"):  # the first of both, whichever ended first
        tensorize_(made, "tucker", workers=workers)
    assert list(made) == before
    assert torch.get_num_threads() == threads


def test_every_item_has_one_of_torchs_threads_which_come_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen, barrier = [], threading.Barrier(2, timeout=60)

        def work(_):
            barrier.wait()  # both at once
            seen.append((torch.get_num_threads(), threading.get_ident()))

        side_by_side(work, [1, 2], 2, float, lambda _: None, lambda: None)
        assert {count for count, _ in seen} == {1}
        assert len({thread for _, thread in seen}) == 2
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError, match="x"), one_thread():
            raise RuntimeError("x")
        assert torch.get_num_threads() == 3
        tensorize_(model(), "tucker", workers=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_work_is_begun_after_an_error():
    done = []

    def work(item):
        if item == 9:
            raise KeyError(item)
        done.append(item)

    with pytest.raises(KeyError):
        side_by_side(work, [*range(10)], 1, float, lambda _: None, lambda: None)
    assert done == [*range(9)]
    with pytest.raises(ValueError, match="workers"):
        tensorize_(model(), "tucker", workers=0)
    with pytest.raises(TypeError, match="progress"):
        tensorize_(model(), "tucker", progress="yes")


@pytest.mark.parametrize(
    ("progress", "stream", "patience", "seen"),
    [
        (None, Terminal, 0.0, True),
        (None, Terminal, 1e9, False),  # too short for a bar
        (None, io.StringIO, 0.0, False),
        (True, io.StringIO, 1e9, True),
        (False, Terminal, 0.0, False),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bar_is_shown_on_terminals_or_when_asked(progress, stream, patience, seen, workers, monkeypatch):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(bars, "PATIENCE", patience)
    tensorize_(model(), TensorizeConfig("tucker", include=["2", "3"]), progress=progress, workers=workers)
    text = shown.getvalue()
    assert ("fitting 2/2 [" in text) == seen
    assert text == "" or text.rpartition("\r")[2] == ""  # the line is empty in the end
    if seen:
        assert text.split("\r")[-2].strip() == ""


def test_every_layer_is_logged(caplog):
    with caplog.at_level(logging.INFO, "tnlayers"):
        tensorize_(model(), TensorizeConfig("tucker", include=["2", "3"]), workers=2)
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.partition(",")[0] for line in lines] == ["2: fitted", "3: fitted"]


def test_layers_on_the_meta_device_draw_nothing(monkeypatch):
    monkeypatch.setattr("tnlayers.layers.base.draw", lambda *_: pytest.fail("drawn"))
    layer = TRConv2d(8, 8, 3, device="meta")
    assert layer.variance.weight_std > 0
