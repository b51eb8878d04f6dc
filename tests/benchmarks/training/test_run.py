"""The training job: repeatable, resumable to the same numbers, honest files, one sentence per mistake."""

import csv
import errno
import importlib
import itertools
import os
import re
import resource
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import atomic
import provenance
import report
import train
from config import Config, ConfigError
from data import ImageData
from train import Run, RunError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    """Forty images that a network can tell apart, in place of any data set."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = torch.randint(100, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(40), 0, labels % 8] += 150
    data = ImageData(images, labels, images[:20], labels[:20], shift=1, flip=True)
    monkeypatch.setattr(train, "load", lambda *_: data)


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small gain nothing from threads, and lose much where tests run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path):
    return Config(epochs=3, batch_size=16, out=tmp_path, device="cpu")


def numbers(result):
    """What a run measured, but for the time it took."""
    return [
        {key: row[key] for key in ("epoch", "lr", "train_loss", "train_accuracy", "loss", "accuracy")}
        for row in result.history
    ]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def full(free):
    """A disk on which no file may grow beyond so many bytes, for the kernel's own errors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stop(run, step):
    """Break a run off in its so many-th step from now."""
    steps = itertools.count(1)
    loss = run._loss

    def broken(*args):
        if next(steps) == step:
            raise KeyboardInterrupt
        return loss(*args)

    run._loss = broken
    with pytest.raises(KeyboardInterrupt):
        run.finish()


FOUR_STEPS = {
    "plain": {},
    "average": {"conv": "tr", "rank": 0.2, "amp": True, "ema": 0.9, "channels_last": True},
    "adamw": {"optimizer": "adamw", "schedule": "one-cycle", "cutmix": 0.5, "clip": 1.0, "label_smoothing": 0.1},
}
"""Options of a run of four steps an epoch."""


@pytest.fixture(scope="module")
def wholes():
    """Runs that nobody stops, by their options."""
    return {}


@pytest.mark.parametrize("step", [3, 4, 8, 10])
@pytest.mark.parametrize("options", FOUR_STEPS)
def test_a_resumed_run_ends_with_the_same_numbers(config, wholes, options, step):
    config = replace(config, batch_size=9, **FOUR_STEPS[options])
    whole = wholes[options] if options in wholes else wholes.setdefault(options, train.train(config))
    stopped = replace(config, out=config.out / "stopped", save_every=2)
    stop(Run(stopped), step)
    resumed = Run(replace(stopped, resume=True))
    assert resumed.images_done == 9 * ((step - 1) // 2 * 2)
    resumed = resumed.finish()
    assert numbers(resumed) == numbers(whole)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())


def test_a_run_repeats_itself_and_another_seed_does_not(config):
    first, second = train.train(config), train.train(replace(config, overwrite=True))
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(train.train(replace(config, seed=1)))


def test_a_run_moves_no_random_state_but_its_own(config):
    before = torch.get_rng_state()
    train.train(replace(config, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_lowers_the_loss(config):
    history = train.train(replace(config, epochs=6, lr=0.05)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_finished_run_resumes_to_itself(config):
    done = train.train(config)
    assert numbers(train.train(replace(config, resume=True))) == numbers(done)


def test_a_checkpoint_of_another_run_is_refused_by_the_names_of_the_fields(config):
    Run(config).epoch()
    data = train.load()
    smaller = replace(data, train_images=data.train_images[:30], train_labels=data.train_labels[:30])
    for changes, was, has in (
        ({"lr": 0.5}, "lr 0.1", "lr 0.5"),
        (
            {"label_smoothing": 0.25, "augment": False},
            "label_smoothing 0.0 and augment True",
            ".* 0.25 and augment False",
        ),
        ({"epochs": 4}, "epochs 3", r"epochs 4 \(the learning rate follows a schedule over all epochs\)"),
        ({"epochs": 2, "lr": 0.5}, "epochs 3 and lr 0.1", r"epochs 2 and lr 0.5 \(the learning rate .*\)"),
        ({}, "training images 40", "training images 30"),
    ):
        with pytest.raises(
            RunError, match=rf"was made with {was}, but this run has {has}: go on with what it was made"
        ):
            Run(replace(config, resume=True, **changes), None if changes else smaller)


@pytest.mark.parametrize("flag", ["", "--resume", "--overwrite"])
def test_a_checkpoint_is_lost_only_if_one_says_so(tmp_path, capsys, flag):
    flags = ["--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path), "--seeds"]
    train.main([*flags, "3"])
    (directory,) = tmp_path.iterdir()
    before = content(directory)
    capsys.readouterr()
    if not flag:
        with pytest.raises(SystemExit) as told:
            train.main([*flags, "5", "3"])  # which is refused before seed 5 is trained
        assert str(told.value) == (
            f"error: {directory / 'checkpoint.pt'} is there from an earlier run: go on from it with --resume, keep it "
            "with another --name or --out, or remove it with --overwrite"
        )
        assert [*tmp_path.iterdir()] == [directory]
        assert content(directory) == before
        return
    train.main([*flags, "5", "3", flag])
    out = capsys.readouterr().out.splitlines()
    told = [line for line in out if line.startswith("digits-resnet20-dense-seed")]
    if flag == "--overwrite":
        assert not told
    else:
        assert told == [
            "digits-resnet20-dense-seed5: there is no checkpoint, it begins anew",
            f"digits-resnet20-dense-seed3: is finished, its result is that of {directory / 'checkpoint.pt'}",
        ]
        assert content(directory) == before


def test_what_is_overwritten_is_never_gone_on_from(config):
    train.train(config)
    with pytest.raises(ConfigError, match="shard is True, but there is one process"):
        Run(replace(config, overwrite=True, shard=True))
    assert Run(replace(config, resume=True)).finished  # what cannot begin removes nothing
    stop(Run(replace(config, overwrite=True)), 1)
    assert Run(replace(config, resume=True)).images_done == 0
    with pytest.raises(ConfigError, match="overwrite is True, but so is resume"):
        replace(config, resume=True, overwrite=True)


def test_a_damaged_checkpoint_is_told(config):
    run = Run(config)
    run.epoch()
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.pt is not a checkpoint of this script"):
        Run(replace(config, resume=True))


@pytest.mark.parametrize(("free", "file"), [(100, "metrics.csv"), (2000, "checkpoint.pt"), (10**6, "checkpoint.pt")])
def test_a_full_disk_ends_a_run_with_a_sentence_and_what_was_there_is_whole(config, free, file):
    whole = train.train(replace(config, out=config.out / "whole"))
    run = Run(config)
    run.epoch()
    before = content(config.directory)
    with full(free), pytest.raises(atomic.WriteError) as told:
        run.epoch()
    assert str(told.value) == (
        f"dense: {config.directory / file} cannot be written: File too large; the last good checkpoint is "
        f"{run.checkpoint}, after epoch 1: --resume goes on from it"
    )
    after = content(config.directory)
    assert after.keys() == {"checkpoint.pt", "metrics.csv"}
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["metrics.csv"].startswith(before["metrics.csv"])  # complete, and of what was measured
    assert numbers(train.train(replace(config, resume=True))) == numbers(whole)


def test_a_disk_that_is_full_from_the_beginning_is_told(config):
    with (
        full(100),
        pytest.raises(atomic.WriteError, match=r"metrics\.csv cannot be written: .*; there is no checkpoint"),
    ):
        Run(config).epoch()
    assert not [*config.directory.iterdir()]


def test_tensorboard_on_a_full_disk_is_told(config, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    run = Run(replace(config, tensorboard=True))
    monkeypatch.setattr(train, "write_csv", lambda *_: None)  # which would be told first
    with full(50), pytest.raises(atomic.WriteError, match=r"events\.\* cannot be written: File too large; there is no"):
        run.epoch()
    assert not run.checkpoint.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.csv"])
def test_files_that_could_not_be_written_are_told_before_training(config, file):
    (config.directory / file).mkdir(parents=True)
    with pytest.raises(atomic.WriteError, match=rf"{file} cannot be written: it is there, and no regular file"):
        Run(replace(config, resume=True))


def test_a_loss_that_is_no_number_stops_the_run(config):
    run = Run(config)
    run.model.linear.bias.data[0] = float("nan")
    with pytest.raises(
        RunError, match=r"dense: the loss is nan in epoch 1: try a smaller --lr; there is no checkpoint"
    ):
        run.epoch()
    assert not run.checkpoint.exists()


def test_a_lost_network_is_never_saved(config):
    run = Run(config)
    run.epoch()
    good = run.checkpoint.read_bytes()
    metrics = read(config.directory / "metrics.csv")

    def poison(first, then):  # what the last step of an epoch may do, behind the last loss
        def poisoned():
            if first:
                run.model.linear.bias.data[0], run.model.linear.bias.data[1] = 1e38, -1e38
                run.model.linear.weight.data.fill_(3e38)
            found = evaluate()
            if then:
                run.model.bn1.running_mean[0] = float("nan")
            return found

        return poisoned

    for poisons, what in (((False, True), "a weight is no number in"), ((True, False), "the loss on images not .* is")):
        run = Run(replace(config, resume=True))
        evaluate = run._evaluate
        run._evaluate = poison(*poisons)
        with pytest.raises(RunError, match=rf"dense: {what} .*last good checkpoint is .*checkpoint\.pt, after epoch 1"):
            run.epoch()
        assert run.checkpoint.read_bytes() == good
        assert read(config.directory / "metrics.csv") == metrics


def test_the_learning_rate_rises_along_a_line_and_falls_along_a_cosine(config):
    run = Run(replace(config, epochs=10, warmup=0.2, lr=2.0))  # 2 steps in each epoch
    factors = [run._lr_factor(step) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1
    assert factors[12] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(0, abs=1e-15)
    assert run.scheduler.get_last_lr() == [0.5, 0.5]


def test_one_cycle_rises_to_the_rate_and_falls_below_where_it_began(config):
    run = Run(replace(config, schedule="one-cycle", epochs=10, warmup=0.3, lr=2.0))
    rates = [run.scheduler.get_last_lr()[0]]
    for _ in range(20):
        run.optimizer.step()
        run.scheduler.step()
        rates.append(run.scheduler.get_last_lr()[0])
    peak = max(range(21), key=lambda step: rates[step])
    assert peak in (5, 6)  # 0.3 x 20 steps, rounded by torch
    assert rates[peak] == pytest.approx(2, rel=0.02)
    assert rates[0] == pytest.approx(2 / 25)
    assert rates[-1] < rates[0] / 1000


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_clipped_step_is_no_longer_than_allowed(config, optimizer):
    run = Run(replace(config, clip=1e-3, momentum=0.0, weight_decay=0.0, warmup=0.0, optimizer=optimizer, epochs=1))
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item())
    )
    run.epoch()
    assert norms == pytest.approx([1e-3] * run.steps, rel=1e-3)


def test_the_average_is_what_is_evaluated_and_not_what_is_trained(config):
    averaged, plain = (Run(replace(config, ema=ema, out=config.out / str(ema))) for ema in (0.5, None))
    expected = {name: p.detach().clone() for name, p in plain.model.named_parameters()}

    def follow(*_):
        for name, p in plain.model.named_parameters():
            expected[name] = (expected[name] + p.detach()) / 2

    plain.optimizer.register_step_post_hook(follow)
    for run in (averaged, plain):
        run.epoch()
    for (name, ours), theirs in zip(averaged.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(averaged.average.values[name], expected[name])
    assert averaged.history[0]["loss"] != plain.history[0]["loss"]
    assert averaged.history[0]["train_loss"] == plain.history[0]["train_loss"]


def test_cutmix_takes_a_box_and_as_much_of_the_label_from_the_image_before(config):
    run = Run(replace(config, cutmix=1.0))
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 1, 8, 8).to(torch.uint8)
    labels = torch.arange(6)
    shares = set()
    for run.step in range(30):
        mixed, targets = run._mix(images, labels, 1)
        taken = mixed != images
        assert torch.equal(mixed[taken], images.roll(1, 0)[taken])
        share = taken[1].float().mean().item()
        for label, target in enumerate(targets):
            assert target[label].item() == pytest.approx(1 - share)
            assert target[(label - 1) % 6].item() == pytest.approx(share)
            assert target.sum().item() == pytest.approx(1)
        rows, columns = (taken[0, 0].any(dim).sum().item() for dim in (1, 0))
        assert taken[0].sum().item() == rows * columns
        shares.add(share)
    assert len(shares) > 10
    assert torch.equal(images[:, 0, 0, 0], labels)


def test_cutmix_mixes_the_share_of_the_batches_that_is_asked_for(config):
    run = Run(replace(config, cutmix=0.25))
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    mixed = 0
    for run.step in range(400):
        mixed += run._mix(images, labels, 1)[1].ndim == 2
    assert abs(mixed - 100) < 4.4 * (400 * 0.25 * 0.75) ** 0.5  # one in 10^5


@pytest.mark.parametrize(
    "options", [{"channels_last": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=str
)
def test_how_it_is_computed_changes_no_more_than_rounding(config, options):
    config = replace(config, conv="tucker", epochs=1, lr=0.001)
    plain, other = (train.train(replace(config, out=config.out / str(o), **o)).history[0] for o in ({}, options))
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_tensorboard_gets_the_metrics_or_is_told_missing(config, monkeypatch):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    train.train(replace(config, tensorboard=True, epochs=2))
    found = [
        (value.tag, event.step)
        for path in sorted(config.directory.glob("events.*"))
        for event in event_file.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
    assert {("train_loss", 1), ("accuracy", 2)} <= {*found}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is True, but it is not installed: pip install tensorboard"):
        Run(replace(config, tensorboard=True))


def test_only_what_has_two_axes_or_more_decays(config):
    decaying, free = Run(replace(config, conv="tr", rank=0.2, weight_decay=0.1)).optimizer.param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in free["params"]} == {1}
    assert min(p.ndim for p in decaying["params"]) == 2


def test_size_counts_what_dense_convolutions_would_have(config):
    dense, tensor = (replace(config, conv=conv).network(1, 10) for conv in ("dense", "tucker"))
    assert train.size(dense)["keep_ratio"] == 1
    assert train.size(dense)["parameters"] == train.size(tensor)["dense_parameters"] == 269_434
    assert train.size(tensor)["keep_ratio"] < 0.3


def test_autocast_trains_in_single_precision_outside(config):
    result = train.train(replace(config, epochs=1, amp=True))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------- the command


def test_two_runs_never_share_an_arm_and_a_seed(tmp_path):
    presets = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    presets[0].write_text("conv: tr\ninit: fan_in\n")
    presets[1].write_text("conv: tr\ninit: fan_out\n")
    with pytest.raises(SystemExit, match="arm tr with seed 0 is there twice"):
        train.main(["--config", *map(str, presets), "--out", str(tmp_path)])
    presets[1].write_text("conv: tr\ninit: fan_out\nname: tr-fan-out\n")
    train.check_distinct(train.parse(["--config", *map(str, presets)]))


def test_one_command_runs_every_arm_with_every_seed(tmp_path, capsys):
    presets = []
    for name, text in (("dense", "epochs: 9"), ("tr", "conv: tr\nrank: 0.2")):
        presets.append(tmp_path / f"{name}.yaml")
        presets[-1].write_text(text)
    results = tmp_path / "results" / "both.csv"
    flags = ["--seeds", "0", "3", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path)]
    flags += ["--config", *map(str, presets), "--results", str(results)]
    write = train.write_results

    def short_of_space(path, results):
        with full(100 if len(results) == 2 else 10**6):
            write(path, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_results", short_of_space)
        with pytest.raises(SystemExit) as told:
            train.main(flags)
    assert str(told.value) == (
        f"error: {results} cannot be written: File too large; the same command with --resume trains nothing again that "
        "is in a checkpoint"
    )
    assert [row["seed"] for row in read(results)] == ["0"]
    train.main([*flags, "--resume"])
    rows = read(results)
    assert [(row["arm"], row["seed"], row["epochs"]) for row in rows] == [
        (arm, seed, "1") for arm in ("dense", "tr-0.2") for seed in ("0", "3")
    ]
    for row in rows:
        assert set(provenance.provenance()) < set(row)
        metrics = read(tmp_path / f"digits-resnet20-{row['arm']}-seed{row['seed']}" / "metrics.csv")
        assert metrics[-1]["accuracy"] == row["accuracy"]
    assert "digits-resnet20-tr-0.2-seed3" in capsys.readouterr().out
    before = results.read_bytes()
    kept = f"error: results is {results}, which has rows of other runs: choose another file, or replace them with "
    for more in (["--out", str(tmp_path / "new")], ["--resume", "--seeds", "0"]):
        with pytest.raises(SystemExit) as told:
            train.main([*flags, *more])
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
            train.main(["--config", *map(str, presets), "--out", str(tmp_path), "--device", "cpu"])
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
        train.main(["--out", str(tmp_path), "--device", "cpu", *flags])
    assert not [*tmp_path.iterdir()]


def test_the_largest_batch_is_all_images(config):
    run = Run(replace(config, batch_size=40))
    assert (run.batch_size, run.steps) == (40, 1)
    with pytest.raises(ConfigError, match="number of training images is 40, which leaves out those to validate on"):
        train.batches(replace(config, batch_size=41, split="validation"), train.load())


def test_flags_override_presets_and_presets_override_defaults(tmp_path):
    path = tmp_path / "tr.yaml"
    path.write_text("conv: tr\nrank: 0.2\nlr: 0.3")
    for flags in (["--rank", "4", "--config", str(path)], ["--config", str(path), "--rank", "4", "--seeds", "1"]):
        (command,) = train.parse(flags)
        assert (command.run.conv, command.run.rank, command.run.lr, command.run.epochs) == ("tr", 4, 0.3, 20)
    first, second = train.parse(["--config", str(path), str(path), "--rank", "2", "3", "--amp"])
    assert first == second
    assert (first.run.rank, first.run.amp) == ((2, 3), True)


def test_mistakes_end_the_command_with_one_sentence(tmp_path, capsys):
    def sentence(*flags):
        with pytest.raises(SystemExit) as stop:
            train.main(["--out", str(tmp_path), "--batch-size", "16", *flags])
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


# -------------------------------------------------------------------------------------------------------------- files


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
    monkeypatch.setattr(train, "read_data", None)  # nothing is begun
    root = tmp_path / "places"
    root.mkdir()
    for path, why in places(root):
        before = {file.name: file.lstat().st_mode for file in root.iterdir()}
        with pytest.raises(SystemExit, match=f"^error: results is {path}, but .*{why}$"):
            train.main(["--results", str(path), "--out", str(tmp_path), "--device", "cpu"])
        with pytest.raises(atomic.WriteError, match=why):
            atomic.write(path, b"content")
        assert {file.name: file.lstat().st_mode for file in root.iterdir()} == before


def scripts():
    """Names of all scripts that write rows where --out says."""
    return [
        path.stem
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if re.search(r'"--out"|    out: Path', path.read_text()) and path.stem not in ("config", "pool")
    ]


@pytest.mark.parametrize("script", scripts())
def test_every_script_refuses_before_it_measures_what_it_could_not_write(script, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(script)
    needed = {
        "convergence": ("--config", "configs/convergence-digits.yaml"),
        "results": ("--config", "configs/results-smoke.yaml"),
        "compress": ("--weights", "resnet20-12fca82f.th"),
    }
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, "--out", str(tmp_path), *needed.get(script, ())])
    for name in ("write_csv", "measure", "cached_load", "layers", "measure_all"):  # nothing is begun
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as told:
        module.main()
    text = " ".join(f"{told.value.code} {capsys.readouterr().err}".split())
    assert f"out is {tmp_path}, but {tmp_path} cannot be written: it is there, and no regular file" in text


def test_a_directory_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("tnlayers.checkpoint.file.open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(
        SystemExit, match=r"^error: results is .*a\.csv, but .*a\.csv cannot be written: Permission denied$"
    ):
        train.main(["--results", str(tmp_path / "a.csv"), "--out", str(tmp_path), "--device", "cpu"])


def test_a_link_stays_and_its_target_is_replaced_with_its_permissions(tmp_path):
    target, link, chain = (tmp_path / name for name in ("target.csv", "link.csv", "chain.csv"))
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target.name)
    chain.symlink_to(link)
    for path in (target, link, chain):
        provenance.write_csv(path, [{"path": path.name}])
        assert [row["path"] for row in read(target)] == [path.name]
        assert target.stat().st_mode & 0o777 == 0o640
    (tmp_path / "to").symlink_to("new.csv")
    provenance.write_csv(tmp_path / "to", [{"path": "new"}])
    assert [row["path"] for row in read(tmp_path / "new.csv")] == ["new"]
    assert {path.name for path in tmp_path.iterdir() if path.is_symlink()} == {"link.csv", "chain.csv", "to"}
    assert len([*tmp_path.iterdir()]) == 5


# ------------------------------------------------------------------------------------------------------------ signals


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
            train.main(flags)
        except SystemExit as end:
            return end.code
        finally:
            assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before
    return 0


@pytest.fixture(scope="module")
def uninterrupted():
    """Rows of metrics.csv, once there are any."""
    return []


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
        train.main([*FLAGS, "--out", str(tmp_path / "whole")])
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
        train.main([*flags, "--resume"])
        assert f"digits-resnet20-dense-seed0: goes on after {after}\n" in capsys.readouterr().out
        assert rows(tmp_path / "ended") == uninterrupted
        assert {path.name for path in directory.iterdir()} == {"checkpoint.pt", "metrics.csv"}


def test_a_signal_before_training_ends_the_command_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, "--out", str(tmp_path)])
    assert end.value.code == 143
    assert capsys.readouterr().err == "ended by SIGTERM: nothing was trained\n"
    assert not [*tmp_path.iterdir()]


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert reached_by(monkeypatch, signal.SIGHUP, "_loss", [2], [*FLAGS, "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------------------ presets


PRESETS = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith(("convergence-", "results-"))
]
"""Those of other scripts have tests of their own."""


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_states_only_what_differs(path):
    preset, default = Config.from_yaml(path), Config()
    stated = [line.partition(":")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert [name for name in stated if getattr(preset, name) == getattr(default, name)] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate: 1", "has the key 'learning_rate', but only dataset, model, conv"),
        ("lr: fast", "lr is 'fast', but float is accepted"),
        ("lr: 1_000", "lr is '1_000', but float is accepted"),
        ("epochs: 010", "line 1: 010 is octal in YAML 1.1"),
        ("epochs: 3\nepochs: 4", "line 2: the key 'epochs' is there twice"),
        ("name: &a x\nconv: *a", "line 1: &a is an anchor or an alias"),
        ("epochs: 1.5", "epochs is 1.5, but int is accepted"),
        ("epochs: true", "epochs is True, but int is accepted"),
        ("augment: 1", "augment is 1, but bool is accepted"),
        ("dataset: mnist", r"dataset is 'mnist', but Literal\['digits', 'fashion-mnist', 'cifar10', 'image"),
        ("rank: [4, x]", r"rank is \[4, 'x'\], but int \| float \| tuple\[int, \.\.\.\] \| None is accepted"),
        ("epochs: 0", "epochs is 0, but it must be at least 1"),
        ("lr: .nan", "lr is nan, but it must be above 0"),
        ("rank: 3", "rank is 3, but dense convolutions have none"),
        ("- epochs", r"holds \['epochs'\], but lines of the form"),
        ("", "holds None, but lines of the form"),
        ("epochs: [", "it is not YAML: "),
    ],
)
def test_a_wrong_preset_is_told(tmp_path, text, sentence):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"preset\.yaml:? {sentence}"):
        Config.from_yaml(path)


def test_a_preset_can_hold_every_type(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("conv: tucker\nrank: [8, 8]\nlr: 1\nweight_decay: 5e-4\namp: true\nthreads: null\ndata_dir: here\n")
    assert Config.from_yaml(path) == Config(
        conv="tucker", rank=(8, 8), lr=1.0, weight_decay=5e-4, amp=True, threads=None, data_dir=Path("here")
    )


# ------------------------------------------------------------------------------------------------ provenance, report


def test_provenance_names_versions_and_no_place():
    here = provenance.provenance()
    assert list(here) == ["machine", "python", "torch", "tnlayers", "commit", "date"]
    assert all(here.values())
    assert here["torch"] == torch.__version__
    assert "/" not in "".join(here.values())


def test_a_row_keeps_the_provenance_it_came_with(tmp_path):
    provenance.write_csv(tmp_path / "a.csv", [{"x": 1, "date": "1999-01-01"}, {"x": 2, "date": "1999-01-02"}])
    assert [(row["x"], row["date"]) for row in read(tmp_path / "a.csv")] == [("1", "1999-01-01"), ("2", "1999-01-02")]
    assert read(tmp_path / "a.csv")[0]["torch"] == torch.__version__


def digits_rows():
    return [
        {
            "arm": arm,
            "split": "test",
            "accuracy": accuracy,
            "parameters": count,
            "dense_parameters": 1000,
            "keep_ratio": 0.5,
        }
        for arm, count, accuracies in (("dense", 1000, (0.98, 0.99)), ("tr-0.2", 200, (0.97, 0.97)))
        for accuracy in accuracies
    ]


def test_a_table_is_made_from_its_results_and_nothing_else_changes(tmp_path):
    provenance.write_csv(tmp_path / "digits.csv", digits_rows())
    before = "# Title\n<!-- table: digits -->\nold\n<!-- /table -->\nafter\n"
    after = report.rewrite(before, tmp_path)
    assert after.startswith("# Title\n<!-- table: digits -->\n| convolutions |")
    assert after.endswith("<!-- /table -->\nafter\n")
    assert "| dense | 98.50 ± 0.50 % | 1,000 | 100.0% | 0.500 | 2 |" in after
    assert "| tr-0.2 | 97.00 ± 0.00 % | 200 | 20.0% | 0.500 | 2 |" in after
    assert f"torch {torch.__version__}" in after
    assert report.rewrite(after, tmp_path) == after


def test_tables_that_cannot_be_made_are_told(tmp_path):
    with pytest.raises(report.ReportError, match=r"asks for the table 'digits', but there is no .*digits\.csv"):
        report.rewrite("<!-- table: digits -->\n<!-- /table -->", tmp_path)
    with pytest.raises(report.ReportError, match="asks for the table 'fingers', but there are only digits"):
        report.rewrite("<!-- table: fingers -->\n<!-- /table -->", tmp_path)
    tuning = [row | {"split": "validation"} for row in digits_rows()]
    provenance.write_csv(tmp_path / "digits.csv", tuning)
    with pytest.raises(report.ReportError, match="validation"):
        report.rewrite("<!-- table: digits -->\n<!-- /table -->", tmp_path)


def test_check_tells_a_stale_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    provenance.write_csv(tmp_path / "benchmarks" / "results" / "digits.csv", digits_rows())
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: digits -->\n<!-- /table -->\n")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert "98.50" in readme.read_text()
    assert report.main(["--check"]) == 0


def test_tables_of_speed(tmp_path):
    """The ratios of two rows, one of them over a limit, computed here by hand."""
    row = {
        "family": "cp", "in_channels": "64", "out_channels": "64", "size": "32", "stride": "1", "rank": "0.1",
        "keep_ratio": "0.1", "batch": "32", "mode": "train", "dense": "10", "dense_again": "11", "auto": "5",
        "auto_again": "5", "reconstruct": "", "factorized": "6", "low": "7", "oracle": "4", "tednet": "20",
        "tltorch": "4", "flops": "100", "least_flops": "90", "dense_flops": "1000", "dense_peak": "100",
        "auto_peak": "50", "low_peak": "25", "machine": "m", "torch": "t", "tnlayers": "v", "commit": "c", "date": "d",
    }  # fmt: skip
    rows = [row, row | {"family": "btt", "auto": "20", "tednet": "", "tltorch": "", "oracle": "20", "factorized": ""}]
    table = report.speed(rows)
    assert "| cp | 0.50 (0.50) |" in table
    assert "| btt | 2.00 (2.00) |" in table
    assert "0.25 (0.25) | 1.25 (1.25) | 1.25 (1.25) | 0.50 (0.50) | 0.25 (0.25) | 1.40 (1.40)" in table
    assert "1.10 to 1.10" in table
    promises = report.promises(rows)
    assert (
        "| auto / dense, batch 32 | 1.00 | 1.1 | 1 of 2 | 2.00: btt rank 0.1, 64-64, 32x32, batch 32, train |"
        in promises
    )
    assert "| auto / tensorly-torch: CP, Tucker, TT chain | 1.25 (wanted 0.9) | 1.0 | 0 of 1 |" in promises
    assert "0.10 (wanted 0.6" in promises
    compiled = [row | {f"compiled_{name}": "" for name in ("dense", "auto", "tednet")} | {"compiled_tltorch": "3"}]
    assert "| cp | train | 10.0 |  | 5.0 |  | 20.0 |  | 4.0 | 3.0 |" in report.compiled(compiled)
