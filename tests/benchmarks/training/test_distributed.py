"""One script on one process, on several, and killed at any time: the same numbers."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes

ROOT = Path(__file__).parents[3]
TRAIN = ROOT / "benchmarks" / "train.py"
# A rate at which rounding is not amplified: at 0.2 the losses of the second epoch differ by 0.5 %.
FLAGS = [
    "--conv", "tr", "--rank", "0.2", "--lr", "0.01", "--epochs", "2", "--images", "160", "--batch-size", "32",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip
NUMBERS = ("epoch", "lr", "train_loss", "train_accuracy", "loss", "accuracy")
KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.training.command import main
from benchmarks.training.run import Run

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def in_step(run, *args):
    in_step.left -= 1
    if not in_step.left:
        kill()
    return loss(run, *args)

def in_write(path, content):
    in_write.left -= bytes(content[:2]) == b"PK"  # a checkpoint
    if not in_write.left:
        write(path, content[: len(content) // 2])
        kill()
    write(path, content)

loss, write = Run._loss, Path.write_bytes
in_step.left, in_write.left = int(sys.argv[1]), int(sys.argv[2])
Run._loss, Path.write_bytes = in_step, in_write
main(sys.argv[3:])
"""
TOLD_TO_END = """
import os, resource, signal, sys
from benchmarks.training import distributed, loop
from benchmarks.training.command import main
from benchmarks.training.run import Run

def in_step(run, *args):
    in_step.left -= 1
    if run.part.rank and not in_step.left:
        os.kill(os.getpid(), signal.SIGTERM)
        while not distributed.signals.came:
            pass
    return loss(run, *args)

loss = Run._loss
in_step.left = int(sys.argv[1])
Run._loss, loop.REPORT_EVERY = in_step, 4
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
main(sys.argv[3:])
"""


def environment():
    """Variables of a launcher would make a process wait for others."""
    keep = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return keep | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(script, *flags, cwd, code=0, ranks=0):
    out = cwd / "out.txt"
    out.unlink(missing_ok=True)
    found = processes.run([script, *flags], cwd, out, environment(), ranks)
    assert found == code, out.read_text()
    return out.read_text()


def train(*flags, **where):
    return run(TRAIN, *FLAGS, *flags, **where)


def killed(step, write, *flags, cwd, **where):
    """Killed in a step or in a write, by their numbers."""
    script = cwd / "killed.py"
    script.write_text(KILLED)
    return run(script, step, write, *FLAGS, *flags, cwd=cwd, **where)


def torchrun(*flags, cwd, script=TRAIN):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, *map(str, (script, *flags))]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def on_two(*flags, cwd, **where):
    """As torchrun would."""
    return train(*flags, cwd=cwd, ranks=2, **where)


def metrics(root):
    (path,) = root.glob("runs/*/metrics.csv")
    with path.open(newline="") as file:
        return [{name: float(row[name]) for name in NUMBERS} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process that nobody stops comes to."""
    root = tmp_path_factory.mktemp("whole")
    train(cwd=root)
    return metrics(root)


@pytest.mark.parametrize(
    ("launch", "flags"),
    [pytest.param(torchrun, FLAGS, marks=pytest.mark.slow), (on_two, ()), (on_two, ("--shard",))],
    ids=["copies, torchrun", "copies", "shards"],
)
def test_two_processes_come_to_the_same_losses_as_one(tmp_path, whole, launch, flags):
    out = launch(*flags, cwd=tmp_path)
    assert out.count("accuracy on the test images") == 1  # the first process alone tells
    assert len(whole) == 2
    for ours, theirs in zip(metrics(tmp_path), whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_batch_that_cannot_be_shared_out_is_told(tmp_path):
    out = on_two("--batch-size", "31", cwd=tmp_path, code=1)
    assert "error: batch_size is 31, but 2 processes need a multiple of their number" in out


@pytest.mark.parametrize(
    ("step", "free", "code", "sentence"),
    [
        (
            2,
            0,
            128 + signal.SIGTERM,
            "ended by SIGTERM: the last good checkpoint is runs/.*checkpoint.pt, after epoch 0 and 4 steps: --resume",
        ),
        pytest.param(
            99, 10**5, 1, "error: tr-0.2: .* cannot be written: File too large; there is", marks=pytest.mark.slow
        ),
    ],
    ids=["signal", "full disk"],
)
def test_several_processes_end_together(tmp_path, whole, step, free, code, sentence):
    """Only one of them gets the signal; only the first writes."""
    script = tmp_path / "ended.py"
    script.write_text(TOLD_TO_END)
    out = run(script, step, free, *FLAGS, cwd=tmp_path, code=code, ranks=2)
    assert re.search(sentence, out), out
    if not free:
        train("--resume", cwd=tmp_path)
        for ours, theirs in zip(metrics(tmp_path), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("step", "write"), [(4, 99), pytest.param(99, 1, marks=pytest.mark.slow), (99, 3)])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, whole, step, write):
    """Five steps an epoch, and a checkpoint after 2, 4, 5, 7, 9 and 10: the writes."""
    flags = ["--save-every", "2"]
    killed(step, write, *flags, cwd=tmp_path, code=-signal.SIGKILL)
    (directory,) = tmp_path.glob("runs/*")
    halves = [path for path in directory.iterdir() if path.name.startswith(".")]
    assert len(halves) == (write < 99)
    train(*flags, "--resume", cwd=tmp_path)
    assert metrics(tmp_path) == whole
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint.pt", "metrics.csv"]


@pytest.mark.parametrize("first", ["many", pytest.param("one", marks=pytest.mark.slow)])
def test_what_some_processes_saved_others_go_on_from(tmp_path, whole, first):
    """Many, then one, or the other way round: killed after the first epoch's checkpoint, before the second's."""
    flags = ["--save-every", "99"]
    if first == "many":
        killed(7, 99, *flags, "--shard", cwd=tmp_path, code=-signal.SIGKILL, ranks=2)
        train(*flags, "--resume", cwd=tmp_path)
    else:
        killed(7, 99, *flags, cwd=tmp_path, code=-signal.SIGKILL)
        on_two(*flags, "--shard", "--resume", cwd=tmp_path)
    for ours, theirs in zip(metrics(tmp_path), whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--shard",), ()], ids=["shards", "copies"])
def test_processes_with_statistics_of_their_own_go_on_to_the_same_numbers(tmp_path, flags):
    flags = [*flags, "--no-sync-norm", "--ema", "0.8", "--save-every", "2"]
    for root, step in ((tmp_path / "whole", 99), (tmp_path / "killed", 8)):
        root.mkdir()
        killed(step, 99, *flags, cwd=root, code=0 if step == 99 else -signal.SIGKILL, ranks=2)
    on_two(*flags, "--resume", cwd=tmp_path / "killed")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
