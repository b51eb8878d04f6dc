"""Data sets too large for memory: read as they are, the same batches wherever a run goes on, mistakes told."""

import io
import multiprocessing
import os
import signal
import tarfile
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common.errors import DataError, RunError
from benchmarks.training.config import Config
from benchmarks.training.data import on_disk
from benchmarks.training.data.batches import Batches, Part
from benchmarks.training.run import Run, read_data, train

CLASSES, EACH, SIZE = 3, 4, 16


def picture(label, number, kind="PNG"):
    """Of one colour for each class, so that any crop of it tells the label."""
    pixels = np.full((20 + number, 24, 3), 80 * label + number, np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


def write_folder(root):
    for split in ("train", "val"):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(EACH):
                (root / split / f"class{label}" / f"{number}.png").write_bytes(picture(label, number))


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shards(root, shards=4):
    for split in ("train", "val"):
        for shard in range(shards):
            samples = []
            for number in range(CLASSES):
                label = (shard + number) % CLASSES
                name = f"{shard}-{number}"
                samples += [(f"{name}.png", picture(label, number)), (f"{name}.cls", str(label).encode())]
            write_shard(root / f"{split}-{shard:03d}.tar", samples)


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return on_disk.folder(tmp_path, image_size=SIZE, workers=0)


def read_shards(root, workers=0, **changes):
    return on_disk.shards(root, **{"image_size": SIZE, "workers": workers, "images": 12, "classes": CLASSES} | changes)


def epoch(data, start=0, stop=3, part=Part(), seed=0, number=1, augment=True):  # noqa: B008 - it is frozen
    return [*data.training(Batches(4, start, stop, seed, number, augment, part))]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_a_folder_is_read_as_written(folder):
    assert (folder.num_classes, folder.count, folder.channels) == (CLASSES, CLASSES * EACH, 3)
    for batches in (epoch(folder), epoch(folder, augment=False), [*folder.evaluation(5, Part())]):
        images, labels = map(torch.cat, zip(*batches, strict=True))
        assert (images.dtype, images.shape) == (torch.uint8, (12, 3, SIZE, SIZE))
        assert sorted(labels.tolist()) == sorted([*range(CLASSES)] * EACH)
        colours = images.flatten(1).amin(1), images.flatten(1).amax(1)
        assert torch.equal(*colours)
        assert torch.equal(colours[0] // 80, labels)
        assert len({*colours[0].tolist()}) == 12  # each image once
    assert folder.evaluation(5, Part()).__next__()[0].shape[0] == 5


def test_epochs_seeds_and_crops_differ_and_repeat(folder):
    assert same(epoch(folder), epoch(folder))
    assert not same(epoch(folder), epoch(folder, number=2))
    assert not same(epoch(folder), epoch(folder, seed=1))


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_goes_on_from_any_step(tmp_path, kind, workers):
    if kind == "folder":
        write_folder(tmp_path)
        data = on_disk.folder(tmp_path, image_size=SIZE, workers=workers)
    else:
        write_shards(tmp_path)
        data = read_shards(tmp_path, workers)
    whole = epoch(data)
    for start in (1, 2):
        assert same(epoch(data, start), whole[start:])


def test_workers_leave_a_signal_to_the_process_that_trains(folder):
    """A cluster sends SIGTERM to all of them; the step that it interrupts is yet to be finished."""
    batches = replace(folder, workers=1).training(Batches(4, 0, 3, 0, 1, True, Part()))
    seen = [next(batches)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert same([*seen, *batches], epoch(folder))


def test_processes_share_a_folder_s_batches(folder):
    parts = [epoch(folder, part=Part(rank, 2)) for rank in range(2)]
    for (images, labels), *own in zip(epoch(folder), *parts, strict=True):
        for rank, (some, their) in enumerate(own):
            assert torch.equal(some, images[rank::2])
            assert torch.equal(their, labels[rank::2])


def test_processes_and_workers_share_shards_out(tmp_path):
    write_shards(tmp_path)
    for workers in (0, 2):
        data = read_shards(tmp_path, workers)
        seen = [batch for rank in range(2) for batch in data.evaluation(2, Part(rank, 2))]
        images, labels = map(torch.cat, zip(*seen, strict=True))
        colours = images[:, 0, 0, 0]
        assert torch.equal(colours // 80, labels)
        assert len(labels) == 4 * CLASSES
        trained = [epoch(data, part=Part(rank, 2)) for rank in range(2)]
        assert {len(labels) for batches in trained for _, labels in batches} == {2}
    assert not same(epoch(data), epoch(data, number=2))


def test_shards_are_shuffled_within_each_pass(tmp_path):
    """Every image once before any comes again, in another order."""
    write_shards(tmp_path)
    data = read_shards(tmp_path)
    labels = [labels.tolist() for _, labels in epoch(data, stop=6, augment=False)]
    colours = [images[:, 0, 0, 0].tolist() for images, _ in epoch(data, stop=6, augment=False)]
    first, second = ([*chain.from_iterable(part)] for part in (colours[:3], colours[3:]))
    assert sorted(first) == sorted(second) == sorted([0, 81, 162, 80, 161, 2, 160, 1, 82, 0, 81, 162])
    assert first != second
    assert [colour // 80 for colour in first] == [*chain.from_iterable(labels[:3])]


def test_what_is_random_moves_no_other_state(folder):
    before = torch.get_rng_state()
    epoch(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_validate_by_class_and_shards_do_not(folder, tmp_path):
    tuning = folder.validation(0.25)
    assert [label for _, label in sorted(tuning.test)] == [0, 1, 2]
    assert sorted([*tuning.train, *tuning.test]) == sorted(folder.train)
    write_shards(tmp_path)
    with pytest.raises(DataError, match="split is validation, but shards cannot be split"):
        read_shards(tmp_path).validation()


@pytest.mark.parametrize("kind", ["image-folder", "webdataset"])
def test_a_network_trains_on_them(tmp_path, kind):
    (write_folder if kind == "image-folder" else write_shards)(tmp_path)
    config = Config(
        dataset=kind, model="resnet18", conv="tucker", rank=0.1, epochs=1, batch_size=4, lr=0.01, images=12,
        image_size=32, classes=CLASSES, workers=0, data_dir=tmp_path, out=tmp_path / "runs", device="cpu", threads=1,
    )  # fmt: skip
    result = train(config)
    assert result.model.fc.out_features == CLASSES
    assert 0 < result.history[0]["train_loss"] < 10
    assert 0 <= result.accuracy <= 1
    assert read_data(replace(config, classes=5, images=7)).num_classes == (3 if kind == "image-folder" else 5)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_folders_that_are_not_as_they_should_be_are_told(tmp_path):
    def load():
        return on_disk.folder(tmp_path, image_size=SIZE, workers=0)

    with pytest.raises(DataError, match=r"image-folder needs .*train, with a folder per class, but there is no such"):
        load()
    write_folder(tmp_path)
    file = tmp_path / "train" / "class1" / "0.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"class1.0\.png is not a whole image"):
        epoch(load())
    with pytest.raises(DataError, match=r"class1.0\.png is not a whole image"):
        epoch(replace(load(), workers=1))
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"class1.0\.png is empty, but an image is needed"):
        load()
    for path in file.parent.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"the class .*train.class1 is empty: it has no \.jpg, \.jpeg, \.png"):
        load()
    file.write_bytes(whole)
    (tmp_path / "val" / "class3").mkdir()
    with pytest.raises(DataError, match=r"val must have the classes of train, but they differ in class3"):
        load()


def test_shards_that_are_not_as_they_should_be_are_told(tmp_path):
    with pytest.raises(DataError, match=r"webdataset needs .*train-\*\.tar, but there are none"):
        read_shards(tmp_path)
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"webdataset needs --images and --classes"):
        read_shards(tmp_path, classes=None)
    with pytest.raises(DataError, match=r"train-00.\.tar: .* has the label 2, but labels run from 0 to 1"):
        epoch(read_shards(tmp_path, classes=2))
    with pytest.raises(DataError, match=r"4 shards to train on, but 2 processes with 3 workers each need 6"):
        epoch(read_shards(tmp_path, workers=3), part=Part(0, 2))
    shard = tmp_path / "train-000.tar"
    whole = shard.read_bytes()
    for cut in (len(whole) // 2, 700, 0):
        shard.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"train-000\.tar is cut short"):
            read_shards(tmp_path)
    for samples, sentence in (
        ([("a.png", picture(0, 0))], "a has no number of a class"),
        ([("a.png", picture(0, 0)), ("a.cls", b"cat")], "a has no number of a class"),
        ([("a.cls", b"0")], r"a has no image \(\.jpg, \.jpeg, \.png\)"),
        ([("a.png", b"GIF"), ("a.cls", b"0")], "a is not a whole image"),
    ):
        for path in tmp_path.glob("train-*.tar"):
            write_shard(path, samples)
        with pytest.raises(DataError, match=sentence):
            epoch(read_shards(tmp_path))
    for path in tmp_path.glob("train-*.tar"):
        path.write_bytes(b"no tar file" * 100 + bytes(1024))
    with pytest.raises(DataError, match=r"train-00.\.tar is not a whole tar file"):
        epoch(read_shards(tmp_path))


def test_damage_that_looks_like_an_end_is_told(tmp_path):
    write_shards(tmp_path)
    shard = tmp_path / "val-001.tar"
    content = bytearray(shard.read_bytes())
    second = content.index(b"1-1.png")
    content[second] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"val-001\.tar is not a whole tar file: the header at byte {second} is dam"):
        [*read_shards(tmp_path).evaluation(4, Part())]
    for path in tmp_path.glob("train-*.tar"):
        write_shard(path, [])
    with pytest.raises(DataError, match="there is no sample in these shards"):
        epoch(read_shards(tmp_path))


def test_images_that_would_be_misread_are_told(folder):
    path, _ = folder.train[0]
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"0\.png is not a whole image: its pixels are of mode I"):
        epoch(folder)


def test_folders_that_cannot_be_learnt_from_are_told(folder, tmp_path):
    few = replace(folder, train=folder.train[::EACH])
    with pytest.raises(DataError, match="split is validation, but the training images cannot be split: "):
        few.validation()
    for split in ("train", "val"):
        for label in (1, 2):
            (tmp_path / split / f"class{label}").rename(tmp_path / f"{split}{label}")
    with pytest.raises(DataError, match="train has 1 classes, but two at least are needed"):
        on_disk.folder(tmp_path, image_size=SIZE, workers=0)


def test_other_streams_do_not_go_on_in_the_middle_of_an_epoch(tmp_path):
    write_shards(tmp_path)
    config = Config(
        dataset="webdataset", epochs=1, batch_size=4, lr=0.01, images=12, image_size=8, classes=CLASSES, workers=0,
        data_dir=tmp_path, out=tmp_path / "runs", device="cpu", threads=1, save_every=2,
    )  # fmt: skip
    run = Run(config)
    run._evaluate = None  # stops it there
    with pytest.raises(TypeError):
        run.epoch()
    assert Run(replace(config, resume=True)).step == 2
    with pytest.raises(RunError, match=r"middle of an epoch with \[1, 0\] .*, but this run has \[1, 2\]"):
        Run(replace(config, resume=True, workers=2))


def test_a_missing_library_is_told(monkeypatch):
    with pytest.raises(DataError, match=r"large data sets need pillow: pip install '\.\[large\]'"):
        on_disk.needs("no_such_module", "pillow")
