"""Compressing trained networks: rows complete and kept, the tuned network really tuned, one sentence per mistake."""

import csv
import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import sizes
from benchmarks.common.provenance import provenance
from benchmarks.common.rows import read_csv
from benchmarks.common.trained_networks import read_network
from benchmarks.measure import compress
from benchmarks.report import fit_tables, pictures
from benchmarks.report.markdown import ReportError
from benchmarks.training import command
from benchmarks.training.data import official_files
from tnlayers.models import ResNet, resnet

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs" / "compress").glob("*.yaml"))
IMAGES = 20  # in each of the six files


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A narrow ResNet-8, as the public files of weights hold theirs."""
    monkeypatch.setattr(resnet, "STAGES", (8, 16, 32))
    path = tmp_path / "resnet8-0123abcd.th"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = ResNet(8).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_prec1": 9.0}, path)
    return path


@pytest.fixture
def run(weights, tmp_path, monkeypatch):
    """Runs the script on tiny files of CIFAR-10 and returns the rows of its file."""
    monkeypatch.setattr(official_files, "CIFAR10_IMAGES", IMAGES)
    random = np.random.default_rng(0)
    for name in official_files.CIFAR10_FILES:
        content = random.integers(256, size=(IMAGES, 1 + official_files.CIFAR10_PIXELS), dtype=np.uint8)
        content[:, 0] = np.arange(IMAGES) % 10
        (tmp_path / f"{name}.bin").write_bytes(content.tobytes())

    def call(*arguments, file=weights, formats=("tucker",), peers="--no-peers"):
        out = tmp_path / "compress.csv"
        own = ["--allocation", "uniform", "--weights", file, "--data-dir", tmp_path, "--out", out, peers]
        own += ["--formats", "dense", *formats, *([] if "--ratios" in arguments else ["--keeps", 0.1])]
        own += ["--batch-size", 16, "--images", 40, "--budget", 0, "--device", "cpu"]
        compress.main([*map(str, own), *map(str, arguments)])
        with out.open(newline="") as lines:
            return list(csv.DictReader(lines))

    return call


def test_rows_are_complete_and_kept_and_measured_once(run, tmp_path, monkeypatch, capsys):
    first = {"arguments": ("--epochs", 1, "--lr", 0.05, "--calibration", 0), "formats": ("tucker", "btt")}
    rows = run(*first["arguments"], formats=first["formats"])
    assert [(row["weights"], row["format"], row["keep"]) for row in rows] == [
        ("resnet8", "dense", "1.0"), ("resnet8", "tucker", "0.1"), ("resnet8", "btt", "0.1"),
    ]  # fmt: skip
    dense, tucker, btt = rows
    assert list(tucker)[: len(compress.COLUMNS)] == list(compress.COLUMNS)
    assert (tucker["swapped"], tucker["refused"], tucker["images"], tucker["evaluated"]) == ("6", "0", "32", "20")
    assert int(tucker["bytes"]) < int(tucker["dense_bytes"]) == int(dense["bytes"])
    assert int(tucker["parameters"]) < int(tucker["dense_parameters"]) == int(dense["parameters"])
    assert 0 < float(tucker["error"]) <= float(tucker["error_max"])
    assert float(dense["error"]) == 0
    for row in (dense, tucker):
        after = 100 * (float(row["accuracy_dense"]) - float(row["accuracy_after"]))
        assert float(row["drop"]) == pytest.approx(after, abs=0.01)
        assert min(float(row[name]) for name in ("latency_1", "latency_32", "dense_ms_1", "tune_seconds")) > 0
        assert row["commit"]
        assert row["tensorly_error"] == row["tltorch_before"] == ""
    assert dense["unfolded_1"] == "" != tucker["unfolded_1"]
    assert int(btt["swapped"]) > 0 < int(btt["refused"]) == 6 - int(btt["swapped"])
    assert "that keep ratio leaves" in btt["note"]

    lines = fit_tables.compress(rows).splitlines()
    assert [line.count("|") for line in lines[:5]] == [20] * 5
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["pictures.py"])
    pictures.main()
    assert (tmp_path / "compress.png").stat().st_size > 1000
    assert not (tmp_path / "speed.png").exists()

    with monkeypatch.context() as patch:
        patch.setattr(compress, "measure", None)
        assert run(*first["arguments"], formats=first["formats"]) == rows
    assert "all rows are in" in capsys.readouterr().out

    more = run("--epochs", 0, "--calibration", 0, "--keeps", 0.1, 0.08)
    assert more[:3] == rows
    assert [(row["format"], row["keep"], row["epochs"]) for row in more[3:]] == [
        ("dense", "1.0", "0"), ("tucker", "0.1", "0"), ("tucker", "0.08", "0"),
    ]  # fmt: skip
    assert more[4]["accuracy_after"] == "" != more[4]["accuracy_before"] == tucker["accuracy_before"]


def test_validation_images_come_from_the_training_images_and_have_rows_of_their_own(run):
    run("--epochs", 0, "--formats", "dense")
    rows = run("--epochs", 0, "--split", "validation", "--formats", "dense")
    assert [(row["split"], row["evaluated"]) for row in rows] == [("test", "20"), ("validation", "20")]
    with pytest.raises(ReportError, match="holds no accuracies on test images"):
        fit_tables.compress(rows[1:])


def test_the_fine_tune_changes_every_parameter_and_starts_from_the_fit(run, monkeypatch):
    models = []
    finish = compress.Tuning.finish

    def watched(tuning, progress):
        before = {name: value.clone() for name, value in tuning.model.state_dict().items()}
        finish(tuning, progress)
        models.append((before, tuning.model.state_dict()))

    monkeypatch.setattr(compress.Tuning, "finish", watched)
    run("--epochs", 1, "--lr", 0.05)
    (dense, _), (before, after) = models
    assert any("cores" in name for name in after)
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    assert torch.equal(before["conv1.weight"], dense["conv1.weight"])
    assert not any(name.startswith(("conv1.cores", "linear.cores")) for name in after)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [8, 8, 8, 8]), ("linear", [8, 6, 4, 2])])
def test_hints_weigh_what_their_schedule_says(run, monkeypatch, schedule, expected):
    found, whole = [], compress.Tuning._loss

    def watched(tuning, images, logits, labels):
        rest = compress.Loop._loss(tuning, images, logits, labels)  # the teacher's blocks note their outputs
        pairs = zip(*tuning.blocks, strict=True)
        near = sum(((ours - theirs).square().sum() / theirs.square().sum()).item() for ours, theirs in pairs)
        tuning.blocks[1].clear()
        loss = whole(tuning, images, logits, labels)
        found.append((loss - rest).item() / near)
        return loss

    monkeypatch.setattr(compress.Tuning, "_loss", watched)
    run("--epochs", 2, "--batch-size", 20, "--hint", 8, "--hint-schedule", schedule, "--distil", 0)
    assert found[-4:] == pytest.approx(expected, rel=1e-3)


def commanded(monkeypatch, *arguments):
    """Return the command that these arguments make, and the keep ratios of its first rows."""
    found = []
    monkeypatch.setattr(compress, "measure", lambda command, known, *_: found.append((command, known)) or known | SIZE)
    compress.main([*map(str, arguments)])
    return found[0][0], [known["keep"] for _, known in found]


SIZE = {"parameters": 1, "error": 0, "accuracy_before": 0.1, "drop": 0, "swapped": 1, "refused": 0}


def test_presets_are_read_and_overridden_and_ratios_are_of_the_whole_network(run, weights, tmp_path, monkeypatch):
    preset = tmp_path / "small.yaml"
    preset.write_text("formats: [tr]\nratios: [2.0, 3]\nhint: 7\nlr: 0.5\nbatch_size: 16\n")
    same = ("--weights", weights, "--data-dir", tmp_path, "--out", tmp_path / "out.csv", "--device", "cpu")
    command, keeps = commanded(monkeypatch, "--config", preset, "--lr", 0.25, *same)
    assert (command.formats, command.hint, command.lr) == (("tr",), 7.0, 0.25)
    model = read_network(weights)
    whole, stem = sizes.numel(model), model.conv1.weight.numel()
    convs = sum(conv.weight.numel() for conv in sizes.convolutions(model)) - stem
    assert [whole - convs + keep * convs for keep in keeps] == pytest.approx([whole / 2, whole / 3], abs=1)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_presets_that_are_shipped(path):
    preset, default = compress.Command.from_yaml(path), compress.Command()
    replace(preset, weights=(Path("resnet32.th"),)).check()
    stated = [line.partition(":")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert [name for name in stated if getattr(preset, name) == getattr(default, name)] == []


def test_every_row_that_is_shipped_has_its_preset():
    def names(row):
        return tuple(zip(compress.IDENTITY, compress.identity(row, compress.IDENTITY), strict=True))

    wanted = set()
    for path in PRESETS:
        command, network = compress.Command.from_yaml(path), path.stem.partition("-")[0]
        dense = ResNet(int(network.removeprefix("resnet")))
        keeps = [sizes.keep_of(dense, ratio) for ratio in command.ratios] or command.keeps or compress.KEEPS
        images = (command.images or 50_000) // command.batch_size * command.batch_size
        same = {name: getattr(command, name) for name in ("split", *compress.SETTINGS)}
        for form, keep in itertools.product(command.formats, keeps):
            row = same | {"weights": network, "format": form, "keep": keep, "images": images}
            wanted |= {names(row), names(row | {"decay": ""})}  # cores did not decay in the older rows
    rows = read_csv(compress.RESULTS / "compress.csv")
    assert rows
    assert [dict(names(row)) for row in rows if names(row) not in wanted] == []


def test_a_format_that_every_layer_refuses_is_told_in_its_row(run):
    _, btt = run("--keeps", 0.005, "--epochs", 0, formats=("btt",))
    assert (btt["swapped"], btt["refused"], btt["parameters"], btt["drop"]) == ("0", "6", "", "")
    assert "no layer can be swapped" in btt["note"]
    assert f"resnet8 btt 0.005: {btt['note']}." in fit_tables.compress([btt])


def test_a_diverging_fine_tune_is_told_in_its_row(run):
    rows = run("--epochs", 2, "--lr", 1e30)
    assert all("the loss is" in row["note"] and row["accuracy_after"] == "" for row in rows)


@pytest.mark.skipif(not importlib.util.find_spec("tltorch"), reason="tensorly-torch is not installed")
def test_peers_have_the_same_ranks(run):
    _, tucker, chain, ring = run(
        "--epochs", 0, "--calibration", 0, formats=("tucker", "tt-chain", "tr"), peers="--peers"
    )
    for row in (tucker, chain, ring):
        assert 0 < float(row["error"]) <= float(row["error_max"]) <= 1
    for row in (tucker, chain):
        for peer in ("tensorly", "tltorch"):
            assert float(row[f"{peer}_error"]) == pytest.approx(float(row["error"]), rel=0.05)
            assert 0 <= float(row[f"{peer}_before"]) <= 1
    assert ring["tltorch_error"] == ""
    assert float(ring["tensorly_error"]) >= 0.95 * float(ring["error"])


def test_a_refusal_of_a_peer_is_told_in_its_cell(weights):
    model = read_network(weights)
    told = compress.decompose("tensorly", "tr", model, {"layer1.0.conv1": [16, 16, 16]}, 0)
    assert told.keys() == {"tensorly_error"}
    assert told["tensorly_error"].startswith("layer1.0.conv1: rank[0] * rank[1] = 256 is larger than")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keeps", 1.5], "keeps is 1.5, but they must be above 0 and at most 1"),
        (["--keeps", 0.5, 0], "keeps is 0.5 0.0, but they must be"),
        (["--formats", "tucker", "svd"], "formats is tucker svd, but there are only dense, cp, tucker"),
        (["--ratios", 0.5], "ratios is 0.5, but they must be above 1"),
        (["--ratios", 900], "cannot be compressed 900 times by its convolutions alone"),
        (["--config", "a.yaml"], r"a\.yaml.*No such file"),
        (["--keeps", 0.5, "--ratios", 2], "keeps is 0.5, but the sizes are given by ratios"),
        (["--epochs", -1], "epochs is -1, but it must be at least 0"),
        (["--epochs", 0, "--lr", 0], "lr is 0.0, but it must be above 0"),
        (["--images", 0], "images is 0, but it must be at least 1"),
        (["--out", "."], r"out is \., but .* cannot be written: it is there, and no regular file"),
        (["--weights", "a-01234567.th", "a.th"], "weights is a-01234567.th a.th, but the names of the networks must"),
        (["--weights", "missing.th"], "missing.th cannot be read: .*No such file"),
        (["--weights", __file__], r"test_compress.py cannot be read: "),
        (["--data-dir", "nowhere"], "cifar10 needs .*, but nowhere is not a directory"),
        (["--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence) as told:
        run(*arguments)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("line", ["decay: cores", "rates: matched", "overwrite: true", "model: resnet32"])
def test_what_a_preset_cannot_change_is_told(run, tmp_path, line):
    (tmp_path / "a.yaml").write_text(line)
    name, value = line.split(": ")
    with pytest.raises(SystemExit, match=f"{name} is {value.replace('true', 'True')}, but this script sets it"):
        run("--config", tmp_path / "a.yaml")


@pytest.mark.parametrize("content", [3, {"layer1.0.conv1.weight": torch.ones(3)}, {"a": 1}])
def test_files_of_other_things_are_told(run, tmp_path, content):
    path = tmp_path / "other.th"
    torch.save(content, path)
    with pytest.raises(SystemExit, match=r"other\.th holds no weights of a CIFAR-10 ResNet: "):
        run(file=path)


def test_plain_state_dicts_are_read(weights, tmp_path):
    model = read_network(weights)
    torch.save(model.state_dict(), tmp_path / "resnet8.pt")
    again = read_network(tmp_path / "resnet8.pt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_checkpoints_are_compressed_and_see_images_as_in_training(run, tmp_path):
    same = ["--dataset", "cifar10", "--data-dir", tmp_path, "--epochs", 1, "--batch-size", 20, "--device", "cpu"]
    for conv in ("dense", "tr"):
        command.main([*map(str, same), "--conv", conv, "--out", str(tmp_path / "runs")])
    (dense,), (ring,) = (
        (tmp_path / "runs").glob(f"cifar10-resnet20-{conv}-*/checkpoint.pt") for conv in ("dense", "tr")
    )
    (row,) = run("--epochs", 0, "--formats", "dense", file=dense)
    trained = read_csv(dense.with_name("metrics.csv"))[-1]
    assert row["weights"] == "cifar10-resnet20-dense-seed0"
    assert float(row["accuracy_dense"]) == float(row["accuracy_before"]) == float(trained["accuracy"])
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is no dense ResNet of tnlayers\.models"):
        run("--epochs", 0, file=ring)


def test_a_file_with_other_columns_is_not_touched(run, tmp_path):
    (tmp_path / "compress.csv").write_text("weights,format,keep,split\nresnet8,dense,1.0,test\n")
    with pytest.raises(SystemExit, match="which has other columns than this script writes: move it away"):
        run()
    assert len((tmp_path / "compress.csv").read_text()) == 49


def test_long_fine_tunes_alone_stand_beside_published_accuracies():
    row = dict.fromkeys((*compress.COLUMNS, *provenance()), "") | {
        "weights": "resnet32", "format": "tr", "split": "test", "parameters": "100", "dense_parameters": "500",
        "accuracy_dense": "0.92", "accuracy_before": "0.8", "accuracy_after": "0.91", "drop": "1.0", "lr": "0.02",
        "epochs": "18", "hint": "32.0", "hint_schedule": "linear",
    }  # fmt: skip
    rows = [
        row,
        row | {"format": "cp", "hint_schedule": "constant"},
        row | {"format": "tt", "epochs": "9"},
        row | {"format": "btt", "split": "validation"},
        row | {"format": "tucker", "accuracy_after": ""},
    ]
    ours, _, theirs, _ = fit_tables.tuned(rows).split("\n\n")
    assert ours.splitlines()[2:] == [
        f"| resnet32 | {form} | 5.0x | 100 | 92.00% | 80.00% | 91.00% | +1.00 | 18 | 0.02 | 32, {hints} |"
        for form, hints in (("tr", "fading"), ("cp", "constant"))
    ]
    assert "ADMM-TT" in theirs
    with pytest.raises(ReportError, match="holds no fine-tune of 10 epochs on test images"):
        fit_tables.tuned(rows[2:])
