"""The training job: repeatable, resumable to the same numbers, honest files."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common.atomic import WriteError
from benchmarks.common.errors import ConfigError, RunError
from benchmarks.common.sizes import size
from benchmarks.training import command, loop
from benchmarks.training import run as running
from benchmarks.training.run import Run, train
from runs import content, full, numbers, read
from tnlayers import TensorLayer, param_groups
from tnlayers.models import ResNet

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("tiny_data", "one_thread")


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
    whole = wholes[options] if options in wholes else wholes.setdefault(options, train(config))
    stopped = replace(config, out=config.out / "stopped", save_every=2)
    stop(Run(stopped), step)
    resumed = Run(replace(stopped, resume=True))
    assert resumed.images_done == 9 * ((step - 1) // 2 * 2)
    resumed = resumed.finish()
    assert numbers(resumed) == numbers(whole)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())


def test_ranks_fall_to_the_schedules_end_and_a_resumed_run_ends_with_the_same_numbers(config):
    options = {"conv": "tucker", "rank": 0.5, "rank_schedule": 0.3, "epochs": 2}
    config = replace(config, batch_size=9, **options)
    whole = train(config)
    assert size(whole.model)["keep_ratio"] <= 0.3
    stopped = replace(config, out=config.out / "stopped", save_every=2)
    stop(Run(stopped), 8)  # in the second epoch, with the last ranks
    resumed = Run(replace(stopped, resume=True)).finish()
    assert numbers(resumed) == numbers(whole)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"rank_schedule is 0\.3, but the network starts with 0\.195 of the"):
        Run(replace(config, rank=0.2, overwrite=True))
    with pytest.raises(ConfigError, match=r"rank_schedule is 0\.0001, but ranks of one have 0\.\d+ of the dense"):
        Run(replace(config, rank_schedule=1e-4, overwrite=True))


def test_a_run_repeats_itself_and_another_seed_does_not(config):
    first, second = train(config), train(replace(config, overwrite=True))
    assert numbers(first) == numbers(second)
    assert numbers(first) != numbers(train(replace(config, seed=1)))


def test_a_run_moves_no_random_state_but_its_own(config):
    before = torch.get_rng_state()
    train(replace(config, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_lowers_the_loss(config):
    history = train(replace(config, epochs=6, lr=0.05)).history
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_finished_run_resumes_to_itself(config):
    done = train(config)
    assert numbers(train(replace(config, resume=True))) == numbers(done)


def test_a_checkpoint_of_another_run_is_refused_by_the_names_of_the_fields(config):
    Run(config).epoch()
    data = running.load()
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
    command.main([*flags, "3"])
    (directory,) = tmp_path.iterdir()
    before = content(directory)
    capsys.readouterr()
    if not flag:
        with pytest.raises(SystemExit) as told:
            command.main([*flags, "5", "3"])  # which is refused before seed 5 is trained
        assert str(told.value) == (
            f"error: {directory / 'checkpoint.pt'} is there from an earlier run: go on from it with --resume, keep it "
            "with another --name or --out, or remove it with --overwrite"
        )
        assert [*tmp_path.iterdir()] == [directory]
        assert content(directory) == before
        return
    command.main([*flags, "5", "3", flag])
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
    train(config)
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
    whole = train(replace(config, out=config.out / "whole"))
    run = Run(config)
    run.epoch()
    before = content(config.directory)
    with full(free), pytest.raises(WriteError) as told:
        run.epoch()
    assert str(told.value) == (
        f"dense: {config.directory / file} cannot be written: File too large; the last good checkpoint is "
        f"{run.checkpoint}, after epoch 1: --resume goes on from it"
    )
    after = content(config.directory)
    assert after.keys() == {"checkpoint.pt", "metrics.csv"}
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert after["metrics.csv"].startswith(before["metrics.csv"])  # complete, and of what was measured
    assert numbers(train(replace(config, resume=True))) == numbers(whole)


def test_a_disk_that_is_full_from_the_beginning_is_told(config):
    with (
        full(100),
        pytest.raises(WriteError, match=r"metrics\.csv cannot be written: .*; there is no checkpoint"),
    ):
        Run(config).epoch()
    assert not [*config.directory.iterdir()]


def test_tensorboard_on_a_full_disk_is_told(config, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    run = Run(replace(config, tensorboard=True))
    monkeypatch.setattr(running, "write_csv", lambda *_: None)  # which would be told first
    with full(50), pytest.raises(WriteError, match=r"events\.\* cannot be written: File too large; there is no"):
        run.epoch()
    assert not run.checkpoint.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.csv"])
def test_files_that_could_not_be_written_are_told_before_training(config, file):
    (config.directory / file).mkdir(parents=True)
    with pytest.raises(WriteError, match=rf"{file} cannot be written: it is there, and no regular file"):
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


def test_the_learning_rate_falls_along_a_line_if_asked(config):
    run = Run(replace(config, epochs=10, warmup=0.2, lr=2.0, schedule="linear"))  # 2 steps in each epoch
    assert [run._lr_factor(step) for step in range(21)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, *(1 - step / 16 for step in range(17))]
    )
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


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of inductor's first import
@pytest.mark.parametrize(
    "options", [{"channels_last": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=str
)
def test_how_it_is_computed_changes_no_more_than_rounding(config, options):
    config = replace(config, conv="tucker", epochs=1, lr=0.001)
    plain, other = (train(replace(config, out=config.out / str(o), **o)).history[0] for o in ({}, options))
    assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_tensorboard_gets_the_metrics_or_is_told_missing(config, monkeypatch):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    train(replace(config, tensorboard=True, epochs=2))
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


def test_kernels_decay_as_those_of_a_dense_network_would(config):
    of_cores, of_kernels = (
        Run(replace(config, conv="tr", rank=0.2, weight_decay=0.1, out=config.out / decay, decay=decay))
        for decay in ("cores", "kernels")
    )
    decaying, free = of_kernels.optimizer.param_groups
    layers = [module for module in of_kernels.model.modules() if isinstance(module, TensorLayer)]
    cores = {core for layer in layers for core in layer.cores}
    assert cores <= {*free["params"]}
    assert {*decaying["params"]} == {of_kernels.model.conv1.weight, of_kernels.model.linear.weight}
    assert len(free["params"]) + len(decaying["params"]) == len([*of_kernels.model.parameters()])
    loss = of_kernels._decayed(torch.zeros(()))
    assert loss.item() == pytest.approx(0.05 * sum(layer.weight.square().sum().item() for layer in layers), rel=1e-5)
    assert of_cores._decayed(torch.ones(())).item() == 1
    for run in (of_cores, of_kernels):
        run.epoch()
    ours, others = ([*run.model.parameters()] for run in (of_cores, of_kernels))
    assert any(not torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize(("decay", "of_cores"), [("cores", 0.1), ("kernels", 0)])
def test_matched_rates_are_those_of_param_groups(config, decay, of_cores):
    run = Run(replace(config, conv="tr", rank=0.2, lr=0.5, weight_decay=0.1, rates="matched", decay=decay))
    found = {
        p: (group["initial_lr"], group["weight_decay"]) for group in run.optimizer.param_groups for p in group["params"]
    }
    cores = {core for module in run.model.modules() if isinstance(module, TensorLayer) for core in module.cores}
    wanted = param_groups(run.model, 0.5, scale="expected")
    assert {p: group["lr"] for group in wanted for p in group["params"]} == {p: lr for p, (lr, _) in found.items()}
    assert {found[core][1] for core in cores} == {of_cores}
    assert {found[p] for p in (run.model.conv1.weight, run.model.linear.weight)} == {(0.5, 0.1)}
    assert {found[p] for p in run.model.parameters() if p.ndim == 1} == {(0.5, 0)}


def test_a_run_learns_from_a_checkpoint_and_resumes_to_the_same_numbers(config):
    taught = replace(config, name="teacher", ema=0.5)
    teacher = Run(taught)
    teacher.finish()
    config = replace(config, batch_size=9, conv="tr", rank=0.2, teacher=teacher.checkpoint, distil=0.75)
    whole = train(config)
    assert whole.row["teacher"] == taught.directory.name
    pupil = replace(config, name="pupil", teacher=whole.config.directory / "checkpoint.pt", distil=0.5)
    assert Run(pupil).teacher.share == 0.5  # one that learned from a teacher itself
    stopped = replace(config, out=config.out / "stopped", save_every=2)
    stop(Run(stopped), 8)
    moved = config.out / "checkpoint.pt"
    moved.write_bytes(teacher.checkpoint.read_bytes())
    with pytest.raises(RunError, match=f"made with teacher {taught.directory.name}, but this run has teacher"):
        Run(replace(stopped, resume=True, teacher=moved))
    assert numbers(Run(replace(stopped, resume=True)).finish()) == numbers(whole)


def test_the_loss_with_a_teacher_is_hintons(config):
    teacher = Run(replace(config, name="teacher"))
    teacher.finish()
    run = Run(replace(config, teacher=teacher.checkpoint, distil=0.75, label_smoothing=0.1))
    images, labels = run.data.test_images, run.data.test_labels
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = teacher.model.eval()(teacher.normalise(images))
    ours, theirs = (x.div(4).softmax(1) for x in (logits, wanted))
    near = (theirs * (theirs / ours).log()).sum(1).mean()
    plain = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert run._loss(images, logits, labels).item() == pytest.approx((0.25 * plain + 0.75 * 16 * near).item(), rel=1e-4)
    run.model.load_state_dict(teacher.model.state_dict())
    run.teacher.share = 1.0
    assert run._loss(images, run._logits(images, run.model.eval()), labels).item() == pytest.approx(0, abs=1e-5)


def test_teachers_that_do_not_fit_are_told(config, tmp_path):
    path = tmp_path / "teacher.th"
    for found, sentence in (
        (b"no weights", "teacher is .*teacher.th cannot be read: "),
        (ResNet(20).state_dict(), "for images of 3 channels with 10 labels; here they have 1 channels and 10 labels"),
        ({"a": torch.ones(1)}, "teacher.th holds no weights of a CIFAR-10 ResNet"),
    ):
        path.write_bytes(found) if isinstance(found, bytes) else torch.save(found, path)
        with pytest.raises(ConfigError, match=sentence):
            Run(replace(config, teacher=path))
    torch.save({"config": {"dataset": "fashion-mnist", "labels": 10}}, path)
    with pytest.raises(ConfigError, match=r"teacher\.th was trained on fashion-mnist, not on digits"):
        Run(replace(config, teacher=path))
    with pytest.raises(ConfigError, match=r"teacher is .*nowhere\.th cannot be read: "):
        Run(replace(config, teacher=tmp_path / "nowhere.th"))


def test_memory_is_kept_only_if_asked(config, monkeypatch):
    kept = []
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: kept.append(True))
    Run(config)
    assert not kept
    Run(replace(config, keep_memory=True, out=config.out / "other"))
    assert kept


def test_size_counts_what_dense_convolutions_would_have(config):
    dense, tensor = (replace(config, conv=conv).network(1, 10) for conv in ("dense", "tucker"))
    assert size(dense)["keep_ratio"] == 1
    assert size(dense)["parameters"] == size(tensor)["dense_parameters"] == 269_434
    assert size(tensor)["keep_ratio"] < 0.3


def test_autocast_trains_in_single_precision_outside(config):
    result = train(replace(config, epochs=1, amp=True))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
