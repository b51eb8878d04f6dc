"""The scripts behind the table of results: complete grids, rows that go on, honest sizes, collectives that add up."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import processes
from benchmarks.common.errors import ConfigError
from benchmarks.common.provenance import provenance
from benchmarks.common.rows import read_csv
from benchmarks.common.sizes import numel
from benchmarks.measure import latency, loop_rate, results, throughput
from benchmarks.measure.results import Grid
from benchmarks.report import pictures, training_tables
from benchmarks.training.config import Config, read_yaml
from benchmarks.training.data.in_memory import ImageData
from benchmarks.training.tednets import tednet_draw_, tednet_peer
from tnlayers.models import tednet_resnet

ROOT = Path(__file__).parents[3]
PARTS = ("seeds", "resnet32")  # of the whole grid: not of every family
CONFIGS = sorted((ROOT / "configs").glob("results*.yaml"))


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    """Twenty colour images."""
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 10
    monkeypatch.setattr(results, "cached_load", lambda *_: ImageData(images, labels, images, labels, 1, True))
    monkeypatch.setattr("benchmarks.training.run.load", lambda *_: ImageData(images, labels, images, labels, 1, True))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(tmp_path, **lines):
    path = tmp_path / "grid.yaml"
    lines = {"dataset": "cifar10", "epochs": 1, "batch_size": 10, "device": "cpu"} | lines
    path.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return path


def run(path, monkeypatch, workers=1):
    monkeypatch.chdir(path.parent)
    results.main(["--config", str(path), "--out", str(path.parent / "out.csv"), "--workers", str(workers)])
    return read_csv(path.parent / "out.csv")


def test_a_grid_is_run_whole_once_and_shown(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, networks="[resnet20]", families="[dense, tr, btt]", ratios="[5.0, 13.0]", seeds="[0, 1]")
    rows = run(path, monkeypatch)
    assert [(row["arm"], row["ratio"], row["seed"]) for row in rows] == [
        (arm, ratio, seed)
        for seed in ("0", "1")
        for arm, ratio in (
            ("dense", "1.0"), ("tr-5x", "5.0"), ("tr-13x", "13.0"), ("btt-5x", "5.0"), ("btt-13x", "13.0"),
        )
    ]  # fmt: skip
    for row in rows:
        assert {*provenance()} <= {*row}
        if row["arm"] == "btt-13x":
            assert "cannot be built" in row["note"]
            assert row["accuracy"] == ""
        else:
            assert row["note"] == ""
            assert 0 <= float(row["accuracy"]) <= 1
            # A keep ratio is the most that the layers' whole ranks may have.
            assert 0.85 / float(row["ratio"]) < int(row["parameters"]) / 269_722 <= 1 / float(row["ratio"]) + 1e-9
    monkeypatch.setattr(results, "measure", None)  # nothing is run again
    assert run(path, monkeypatch) == rows
    table = training_tables.results(rows)
    assert "| cifar10 | resnet20 | btt |" in table
    assert "cannot be built" in table
    assert "| resnet20 | 6.1x | 88.50 % |" in table
    assert "; 2 seeds) |" in table
    assert "batch 10. " in table
    out = tmp_path / "latency.csv"
    monkeypatch.setattr(
        "sys.argv", ["latency.py", "--results", str(tmp_path / "out.csv"), "--seconds", "0", "--out", str(out)]
    )
    latency.main()
    timed = read_csv(out)
    assert [(row["batch"], row["conv"]) for row in timed] == [
        (batch, conv) for batch in ("1", "32") for conv in ("dense", "tr", "tr", "btt")
    ]
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    for axes in pictures.results(rows).axes:
        dense, tr, btt = axes.get_lines()[:3]
        assert [len(line.get_xdata()) for line in (dense, tr, btt)] == [1, 2, 1]  # a point is a mean over seeds
        assert dense.get_ydata()[0] == pytest.approx(
            50 * sum(float(row["accuracy"]) for row in rows if row["arm"] == "dense")
        )
        x = [float(dense.get_xdata()[0]), float(max(tr.get_xdata()))]
        if axes.get_xlabel() == "parameters":
            assert x[0] == 269_722
        if axes.get_xlabel().startswith("milliseconds"):
            assert x == [float(timed[4]["ms"]), max(float(row["ms"]) for row in timed[5:7])]
        else:
            assert 0 < x[1] <= 1.01 * x[0]
    assert "btt-13x" in capsys.readouterr().out


def test_other_settings_are_other_runs(tmp_path, monkeypatch):
    path = write(tmp_path, networks="[resnet20]", families="[dense]")
    assert len(run(path, monkeypatch)) == 1
    path = write(tmp_path, networks="[resnet20]", families="[dense]", lr=0.5)
    assert [row["lr"] for row in run(path, monkeypatch)] == ["0.1", "0.5"]


def test_a_run_that_diverges_is_a_row_and_a_checkpoint_of_another_is_an_error(tmp_path, monkeypatch):
    same = {"networks": "[resnet20]", "families": "[dense]"}
    (row,) = run(write(tmp_path, **same, lr=1e30), monkeypatch)
    assert (row["accuracy"], "the loss is" in row["note"]) == ("", True)
    run(write(tmp_path, **same), monkeypatch)
    with pytest.raises(SystemExit, match="was made with epochs 1, but this run has epochs 2"):
        run(write(tmp_path, **same, epochs=2, resume="true"), monkeypatch)
    assert len(read_csv(tmp_path / "out.csv")) == 2


@pytest.mark.parametrize(("form", "rank"), [("tr", 3), ("tt", 3), ("tucker", 3), ("cp", 3), ("btt", 2)])
def test_cores_are_drawn_as_tednet_draws_them(form, rank):
    torch.manual_seed(0)
    model, peer = tednet_resnet(20, form, rank), tednet_peer(20, form, rank, 10)
    tednet_draw_(model, peer)
    ours = [torch.cat([core.flatten() for core in layer.cores]) for layer in model.modules() if hasattr(layer, "cores")]
    theirs = [
        torch.cat([p.flatten() for name, p in layer.named_parameters() if name != "bias"])
        for layer in peer.modules()
        if hasattr(layer, "tn_info")
    ]
    assert len(ours) == 20
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(ConfigError, match="rank is None; tednet's networks need one, or seven"):
        Config(model="tednet-resnet20", conv=form).network(3, 10)
    with pytest.raises(ConfigError, match="its networks take images with 3 channels, but these have 1"):
        Config(model="tednet-resnet20", conv=form, rank=2, init="tednet").network(1, 10)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ({}, r"networks is \[\], but one at least is needed"),
        ({"networks": "[resnet20]"}, r"families is \[\], but one at least is needed"),
        ({"networks": "[resnet20]", "families": "[tr]"}, r"ratios is \[\], but one at least is needed"),
        ({"networks": "[resnet20]", "families": "[tr]", "ratios": "[0.5]"}, r"ratios is \[0.5\], but they must be ab"),
        ({"networks": "[resnet20]", "families": "[dense]", "seeds": "[1, 1]"}, "seeds is .*none twice"),
        ({"networks": "[resnet20]", "families": "[tr]", "ratios": "[5.0, 5]"}, "ratios is .*none may be there twice"),
        ({"networks": "[resnet20]", "families": "[dense]", "seed": 3}, "seed is 3, but the grid sets it"),
        ({"networks": "[vgg]"}, "networks is"),
        ({"networks": "[resnet20]", "families": "[dense]", "lr": 0}, "lr is 0.0, but it must be above 0"),
    ],
)
def test_grids_that_cannot_be_run_are_told(tmp_path, lines, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_yaml(Grid, write(tmp_path, **lines))


def test_a_compression_below_what_the_convolutions_can_give_is_a_row(tmp_path, monkeypatch):
    path = write(tmp_path, networks="[resnet20]", families="[tr]", ratios="[500.0]")
    (row,) = run(path, monkeypatch)
    assert "of 269722 parameters cannot be compressed 500 times by its convolutions alone" in row["note"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_grids_that_are_shipped(path):
    grid, default = read_yaml(Grid, path), Grid(networks=("resnet20",), families=("dense",))
    every = {"dense", "cp", "tucker", "tt", "tr", "btt"}
    assert every == {*grid.families} or (every > {*grid.families} and path.stem.rpartition("-")[2] in PARTS)
    stated = [line.partition(":")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
    names = [name for name in stated if name not in ("networks", "families")]
    assert [name for name in names if getattr(grid, name) == getattr(default, name)] == []
    assert len([*grid.arms()]) == len({results.identity({"ratio": r, **arm.experiment}) for r, arm in grid.arms()})


def test_parts_of_the_grid_have_the_whole_grid_s_recipe():
    own = ("networks", "families", "ratios", "seeds")
    whole, *parts = (
        read_yaml(Grid, ROOT / "configs" / f"results-cifar10{part}.yaml") for part in ("", "-seeds", "-resnet32")
    )
    for part in parts:
        assert replace(whole, **{name: getattr(part, name) for name in own}) == part
    long = read_yaml(Grid, ROOT / "configs" / "results_full-cifar10.yaml")
    other = {name for name in Grid.__dataclass_fields__ if getattr(long, name) != getattr(whole, name)}
    assert other == {"networks", "seeds", "epochs", "warmup", "keep_memory"}


# ------------------------------------------------------------------------------------------------- speed, collectives


def test_throughput_of_every_network_is_over_the_dense_one_s(tmp_path, monkeypatch):
    def rounds(steps, seconds, twins):
        """Two, in which the dense network's two copies take 2 s on average."""
        for step in steps.values():
            step()
        return {
            name: {"dense None": [1.0, 2.0], "dense again None": [3.0, 2.0]}.get(name, [4.0, 1.0]) for name in steps
        }

    monkeypatch.setattr(throughput, "rounds", rounds)
    out = tmp_path / "out.csv"
    flags = ["--network", "resnet20", "--convs", "tr", "tucker", "--keeps", "0.2", "0.01", "--batch", "2"]
    throughput.main([*flags, "--repeats", "2", "--threads", "1", "--device", "cpu", "--out", str(out)])
    rows = read_csv(out)
    expected = {"dense": 1.5, "dense again": (2 / 3 + 1) / 2, "tr": (0.5 + 2) / 2, "tucker": (0.5 + 2) / 2}
    assert [(row["conv"], row["rank"]) for row in rows if row["precision"] == "bf16"] == [
        ("dense", ""), ("dense again", ""), ("tr", "0.2"), ("tucker", "0.2"), ("tr", "0.01"), ("tucker", "0.01"),
    ]  # fmt: skip
    for row in rows:
        if row["rank"] == "0.01":
            assert "cannot be built" in row["note"]
        else:
            ratios = [float(row[name]) for name in ("over_dense", "autotuned_over_dense") if row[name]]
            assert ratios == [pytest.approx(expected[row["conv"]], abs=1e-4)] * (2 if row["rank"] else 1)
    assert "| resnet20 | tr |" in training_tables.throughput(rows)


def test_the_rate_of_the_training_loop_is_over_a_bare_one(tmp_path, monkeypatch):
    path, out = tmp_path / "preset.yaml", tmp_path / "rate.csv"
    path.write_text("model: resnet20\nconv: tr\nrank: 0.2\nbatch_size: 2\nema: 0.9\n")
    monkeypatch.setattr(loop_rate, "STEPS", 1)
    monkeypatch.setattr(loop_rate, "IMAGES", 4)
    loop_rate.main(["--config", str(path), "--seconds", "0", "--out", str(out)])
    rows = read_csv(out)
    assert [(row["conv"], row["loop"]) for row in rows] == [
        (conv, loop) for conv in ("dense", "tr") for loop in ("bare", "plain", "whole")
    ]
    assert all(float(row["over_bare"]) == 1 for row in rows if row["loop"] == "bare")
    assert all(float(row["over_bare"]) > 0 < float(row["images_per_second"]) for row in rows)
    assert "| resnet20 | tr | " in training_tables.loop_rate(rows)


def test_what_processes_send_adds_up(tmp_path):
    """In a process of its own, because process groups are global."""
    out = tmp_path / "out.csv"
    command = [ROOT / "benchmarks" / "measure" / "scale.py", "--network", "resnet20", "--convs", "dense", "tr"]
    command += ["--processes", "4", "--size", "8", "--out", out]
    assert processes.run(command, tmp_path, tmp_path / "out.txt", os.environ) == 0, (tmp_path / "out.txt").read_text()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    norms = 2 * 2 * 4 * sum([16] * 7 + [32] * 6 + [64] * 6)  # mean and variance, there and back, float32
    for conv in ("dense", "tr"):
        copies, shards = (row for row in rows if row["conv"] == conv)
        parameters = int(copies["parameters"])
        model = Config(model="resnet20", conv=conv, rank=None if conv == "dense" else 0.1).network(3, 1000)
        assert parameters == numel(model)
        assert int(copies["reduced"]) == 4 * parameters + norms
        assert int(copies["sent"]) == round(3 / 4 * 2 * int(copies["reduced"]))
        assert int(shards["reduced"]) == norms
        assert int(shards["scattered"]) >= 4 * parameters  # every gradient, padded to whole rows for each process
        assert int(shards["gathered"]) >= int(shards["scattered"])
        assert int(copies["state"]) == 12 * parameters
        assert int(shards["state"]) >= 3 * parameters
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 3, 8, 8)).sum().backward()
        assert int(copies["flops_per_image"]) == int(shards["flops_per_image"]) == counter.get_total_flops() // 2
    assert "| tr | " in training_tables.scale(rows)
