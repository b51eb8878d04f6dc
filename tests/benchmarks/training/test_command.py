"""The command of training: arms and seeds, one sentence for each mistake, signals."""

import errno
import itertools
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common.atomic import WriteError, write
from benchmarks.common.errors import ConfigError
from benchmarks.common.provenance import provenance
from benchmarks.training import command
from benchmarks.training import run as running
from benchmarks.training.loop import batches
from benchmarks.training.run import Run
from runs import full, read

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("tiny_data", "one_thread")


def test_two_runs_never_share_an_arm_and_a_seed(tmp_path):
    presets = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    presets[0].write_text("conv: tr\ninit: fan_in\n")
    presets[1].write_text("conv: tr\ninit: fan_out\n")
    with pytest.raises(SystemExit, match="arm tr with seed 0 is there twice"):
        command.main(["--config", *map(str, presets), "--out", str(tmp_path)])
    presets[1].write_text("conv: tr\ninit: fan_out\nname: tr-fan-out\n")
    command.check_distinct(command.parse(["--config", *map(str, presets)]))


def test_one_command_runs_every_arm_with_every_seed(tmp_path, capsys):
    presets = []
    for name, text in (("dense", "epochs: 9"), ("tr", "conv: tr\nrank: 0.2")):
        presets.append(tmp_path / f"{name}.yaml")
        presets[-1].write_text(text)
    results = tmp_path / "results" / "both.csv"
    flags = ["--seeds", "0", "3", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path)]
    flags += ["--config", *map(str, presets), "--results", str(results)]
    write = command.write_results

    def short_of_space(path, results):
        with full(100 if len(results) == 2 else 10**6):
            write(path, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_results", short_of_space)
        with pytest.raises(SystemExit) as told:
            command.main(flags)
    assert str(told.value) == (
        f"error: {results} cannot be written: File too large; the same command with --resume trains nothing again that "
        "is in a checkpoint"
    )
    assert [row["seed"] for row in read(results)] == ["0"]
    command.main([*flags, "--resume"])
    rows = read(results)
    assert [(row["arm"], row["seed"], row["epochs"]) for row in rows] == [
        (arm, seed, "1") for arm in ("dense", "tr-0.2") for seed in ("0", "3")
    ]
    for row in rows:
        assert set(provenance()) < set(row)
        metrics = read(tmp_path / f"digits-resnet20-{row['arm']}-seed{row['seed']}" / "metrics.csv")
        assert metrics[-1]["accuracy"] == row["accuracy"]
    assert "digits-resnet20-tr-0.2-seed3" in capsys.readouterr().out
    before = results.read_bytes()
    kept = f"error: results is {results}, which has rows of other runs: choose another file, or replace them with "
    for more in (["--out", str(tmp_path / "new")], ["--resume", "--seeds", "0"]):
        with pytest.raises(SystemExit) as told:
            command.main([*flags, *more])
        assert str(told.value) == f"{kept}--overwrite"
        assert results.read_bytes() == before


def test_every_arm_is_checked_before_the_first_is_trained(tmp_path):
    presets = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    presets[0].write_text("epochs: 1\n")
    presets[0].write_text("epochs: 1\nbatch_size: 16\n")
    for text, sentence in (
        ("rank: 1000000000\nbatch_size: 16", "resnet20 with tr-1000000000 convolutions cannot be built"),
        ("batch_size: 41", "batch_size is 41, but the number of training images is 40"),
    ):
        presets[1].write_text(f"conv: tr\n{text}\n")
        with pytest.raises(SystemExit, match=sentence):
            command.main(["--config", *map(str, presets), "--out", str(tmp_path), "--device", "cpu"])
        assert not [*tmp_path.glob("digits-*")]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "41"], "batch_size is 41, but the number of training images is 40"),
        (["--batch-size", "9", "--images", "8"], "batch_size is 9, but images is 8"),
        (["--batch-size", "9", "--images", "41"], "images is 41, but there are 40 to train on"),
        (["--seeds"], r"seeds is \[\], but one at least is needed, and none twice"),
        (["--seeds", "3", "1", "3"], r"seeds is \[3, 1, 3\], but one at least is needed, and none twice"),
        (["--seeds", "2", "-1"], "seed is -1, but it must be at least 0"),
        (["--seeds", str(2**63)], r"seed is 9223372036854775808, but it must be below 2\*\*63"),
    ],
)
def test_batches_and_seeds_that_cannot_be_had_are_told(tmp_path, flags, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}$"):
        command.main(["--out", str(tmp_path), "--device", "cpu", *flags])
    assert not [*tmp_path.iterdir()]


def test_the_largest_batch_is_all_images(config):
    run = Run(replace(config, batch_size=40))
    assert (run.batch_size, run.steps) == (40, 1)
    with pytest.raises(ConfigError, match="number of training images is 40, which leaves out those to validate on"):
        batches(replace(config, batch_size=41, split="validation"), running.load())


def test_flags_override_presets_and_presets_override_defaults(tmp_path):
    path = tmp_path / "tr.yaml"
    path.write_text("conv: tr\nrank: 0.2\nlr: 0.3")
    for flags in (["--rank", "4", "--config", str(path)], ["--config", str(path), "--rank", "4", "--seeds", "1"]):
        (parsed,) = command.parse(flags)
        assert (parsed.run.conv, parsed.run.rank, parsed.run.lr, parsed.run.epochs) == ("tr", 4, 0.3, 20)
    first, second = command.parse(["--config", str(path), str(path), "--rank", "2", "3", "--amp"])
    assert first == second
    assert (first.run.rank, first.run.amp) == ((2, 3), True)


def test_mistakes_end_the_command_with_one_sentence(tmp_path, capsys):
    def sentence(*flags):
        with pytest.raises(SystemExit) as stop:
            command.main(["--out", str(tmp_path), "--batch-size", "16", *flags])
        text = str(stop.value.code) if isinstance(stop.value.code, str) else "".join(capsys.readouterr())
        return " ".join(text.replace("│", " ").split())

    assert "rank is 0.2, but dense convolutions have none" in sentence("--rank", "0.2")
    assert sentence("--device", "abacus").startswith("error: device is 'abacus', which cannot be used here: ")
    assert "device is 'meta', which cannot be used here: it holds no numbers" in sentence("--device", "meta")
    (tmp_path / "file").touch()
    assert "error: out is " in sentence("--out", str(tmp_path / "file"))
    assert "momentum is 2.0, but it must be from 0 to below 1" in sentence("--momentum", "2")
    assert re.match(
        r"error: resnet20 with tr-0 convolutions cannot be built: .*rank", sentence("--conv", "tr", "--rank", "0")
    )
    assert re.match(
        r"error: .*none\.yaml cannot be read: No such file", sentence("--config", str(tmp_path / "none.yaml"))
    )


def places(root):
    """Paths that are no place for a file, and why."""
    (root / "file").touch()
    os.mkfifo(root / "fifo")
    for name, target in (("full", "/dev/full"), ("null", os.devnull), ("circle", "circle"), ("lost", "nowhere/file")):
        (root / name).symlink_to(target)
    irregular = " cannot be written: it is there, and no regular file"
    yield from ((root, irregular), (root / "fifo", irregular), (root / "null", irregular))
    if Path("/dev/full").exists():
        yield root / "full", irregular
    yield root / "circle", " cannot be written: Too many levels of symbolic links"
    yield root / "lost", " cannot be written: there is no directory .*nowhere; make it first"
    yield root / "file" / "under", " cannot be written: (Not a directory|File exists)"
    for path in (root / ("x" * 256), root / ("x" * 256) / "file"):
        yield path, " cannot be written: File name too long"


def test_results_that_cannot_be_written_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "read_data", None)  # nothing is begun
    root = tmp_path / "places"
    root.mkdir()
    for path, why in places(root):
        before = {file.name: file.lstat().st_mode for file in root.iterdir()}
        with pytest.raises(SystemExit, match=f"^error: results is {path}, but .*{why}$"):
            command.main(["--results", str(path), "--out", str(tmp_path), "--device", "cpu"])
        with pytest.raises(WriteError, match=why):
            write(path, b"content")
        assert {file.name: file.lstat().st_mode for file in root.iterdir()} == before


def test_a_directory_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("tnlayers.backend.whole_files.open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(
        SystemExit, match=r"^error: results is .*a\.csv, but .*a\.csv cannot be written: Permission denied$"
    ):
        command.main(["--results", str(tmp_path / "a.csv"), "--out", str(tmp_path), "--device", "cpu"])


FLAGS = ["--epochs", "2", "--batch-size", "9", "--device", "cpu"]  # 4 steps an epoch


def reached_by(monkeypatch, number, name, calls, flags):
    """The exit code of a command which a signal reaches in these calls of a method of the run."""
    times = itertools.count(1)
    method = getattr(Run, name)

    def reached(*args):
        time = next(times)
        for _ in range(calls.count(time)):
            signal.raise_signal(number)
        return method(*args)

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        patch.setattr(Run, name, reached)
        try:
            command.main(flags)
        except SystemExit as end:
            return end.code
        finally:
            assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before
    return 0


@pytest.fixture
def signals_are_heard():
    """A shell in the background, and nohup, leave some ignored."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted():
    """Rows of metrics.csv, once there are any."""
    return []


@pytest.mark.usefixtures("signals_are_heard")
@pytest.mark.parametrize(
    ("number", "name", "calls", "after"),
    [
        (signal.SIGTERM, "_loss", [1], "epoch 0 and 1 steps"),
        (signal.SIGTERM, "_loss", [3, 3], "epoch 0 and 3 steps"),
        (signal.SIGHUP, "_loss", [6], "epoch 1 and 2 steps"),
        (signal.SIGTERM, "_loss", [4], "epoch 1"),
        (signal.SIGTERM, "_evaluate", [1], "epoch 1"),
        (signal.SIGINT, "_loss", [6], "epoch 1"),
        (signal.SIGINT, "_loss", [1], None),
        (signal.SIGTERM, "_loss", [8], "the end"),
        (signal.SIGTERM, "_evaluate", [2], "the end"),
    ],
)
def test_a_signal_ends_a_run_which_goes_on_to_the_same_numbers(
    tmp_path, monkeypatch, capsys, uninterrupted, number, name, calls, after
):
    def rows(root):
        (path,) = root.glob("*/metrics.csv")
        same = ("epoch", "lr", "train_loss", "train_accuracy", "loss", "accuracy")
        return [[row[name] for name in same] for row in read(path)]

    if not uninterrupted:
        command.main([*FLAGS, "--out", str(tmp_path / "whole")])
        uninterrupted += rows(tmp_path / "whole")
    flags = [*FLAGS, "--out", str(tmp_path / "ended")]
    code = reached_by(monkeypatch, number, name, calls, flags)
    told = capsys.readouterr().err
    why = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    (directory,) = tmp_path.glob("ended/*")
    if after == "the end":
        assert (code, told) == (0, "")
        assert rows(tmp_path / "ended") == uninterrupted
    elif after is None:
        assert (code, told) == (130, f"{why}: there is no checkpoint yet\n")
    else:
        last = f"the last good checkpoint is {directory / 'checkpoint.pt'}, after {after}"
        assert (code, told) == (128 + number, f"{why}: {last}: --resume goes on from it\n")
        command.main([*flags, "--resume"])
        assert f"digits-resnet20-dense-seed0: goes on after {after}\n" in capsys.readouterr().out
        assert rows(tmp_path / "ended") == uninterrupted
        assert {path.name for path in directory.iterdir()} == {"checkpoint.pt", "metrics.csv"}


@pytest.mark.usefixtures("signals_are_heard")
def test_a_signal_before_training_ends_the_command_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "load", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        command.main([*FLAGS, "--out", str(tmp_path)])
    assert end.value.code == 143
    assert capsys.readouterr().err == "ended by SIGTERM: nothing was trained\n"
    assert not [*tmp_path.iterdir()]


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert reached_by(monkeypatch, signal.SIGHUP, "_loss", [2], [*FLAGS, "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
