"""The data sets: official formats read exactly, every damaged file told in one sentence, downloads all or nothing."""

import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch

from benchmarks.common.errors import DataError
from benchmarks.training.data import official_files
from benchmarks.training.data.batches import Batches, Part, draws
from benchmarks.training.data.in_memory import ImageData, cached_load, load
from benchmarks.training.data.official_files import Download, fetch, read_cifar10, read_idx

CIFAR_ROW = 3 * 32 * 32


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def random_bytes(*shape: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(below, size=shape, dtype=np.uint8)


def fashion_files(count: int = 20) -> dict[str, np.ndarray]:
    files = {}
    for kind in ("train", "t10k"):
        files[f"{kind}-images-idx3-ubyte"] = random_bytes(count, 28, 28)
        files[f"{kind}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    return files


@pytest.fixture
def fashion_dir(tmp_path):
    for name, array in fashion_files().items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch):
    """The official files hold 10,000 images each; these tests hold 12."""
    monkeypatch.setattr(official_files, "CIFAR10_IMAGES", 12)


def cifar_batch() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(12, dtype=np.uint8) % 10, random_bytes(12, CIFAR_ROW)


def cifar_binary() -> bytes:
    labels, images = cifar_batch()
    return np.concatenate([labels[:, None], images], axis=1).tobytes()


def cifar_python_2() -> bytes:
    """The pickle that Python 2 and its NumPy wrote into the official archive, opcode by opcode."""
    labels, images = cifar_batch()

    def text(value: bytes) -> bytes:
        return b"U" + bytes((len(value),)) + value  # SHORT_BINSTRING

    content = images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R")
        + (b"(K\x01" + b"K\x0cM" + struct.pack("<H", CIFAR_ROW) + b"\x86")  # version, shape
        + (b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R")
        + (b"(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb")
        + (b"\x89" + b"T" + struct.pack("<i", len(content)) + content + b"tb")  # C order, BINSTRING
    )
    label_list = b"](" + b"".join(b"K" + bytes((label,)) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + label_list + b"u."


def cifar_archive() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in official_files.CIFAR10_FILES:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(cifar_binary())
            tar.addfile(member, io.BytesIO(cifar_binary()))
    return archive.getvalue()


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_come_split_class_by_class_and_always_alike(tmp_path):
    digits, again = load("digits", tmp_path), load("digits", tmp_path)
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert torch.equal(digits.test_images, again.test_images)
    counts = digits.test_labels.bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_validation_images_come_from_the_training_images(tmp_path):
    digits = load("digits", tmp_path)
    tuning = digits.validation(0.25)
    assert len(tuning.train_labels) + len(tuning.test_labels) == len(digits.train_labels)

    def bag(*images):
        return sorted(image.numpy().tobytes() for batch in images for image in batch)

    assert bag(tuning.train_images, tuning.test_images) == bag(digits.train_images)


def test_fewer_test_images_are_at_even_distances(tmp_path):
    digits = load("digits", tmp_path)
    count = len(digits.test_labels)
    few = digits.fewer_test_images(10)
    assert torch.equal(few.test_images, digits.test_images[[k * count // 10 for k in range(10)]])
    assert torch.equal(few.test_labels, digits.test_labels[[k * count // 10 for k in range(10)]])
    assert few.train_images is digits.train_images
    for everything in (None, count, count + 1):
        assert digits.fewer_test_images(everything) is digits


def test_smaller_images_are_means(tmp_path):
    digits = load("digits", tmp_path)
    small = cached_load("digits", tmp_path, shrink=2)
    assert small.train_images.shape == (digits.count, 1, 4, 4)
    for images, means in ((digits.train_images, small.train_images), (digits.test_images, small.test_images)):
        exact = images.double().unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
        assert float((means - exact).abs().max()) <= 0.5
    assert torch.equal(small.train_labels, digits.train_labels)
    assert (small.shift, small.flip) == (1, False)
    assert digits.smaller(1) is digits
    for factor in (3, 0):
        with pytest.raises(DataError, match=f"shrink is {factor}, but images of 8 x 8 pixels cannot be divided by it"):
            digits.smaller(factor)


def test_normalised_training_images_have_mean_0_and_variance_1_per_channel():
    images = torch.stack([torch.randint(high, (50, 8, 8), dtype=torch.uint8) for high in (256, 17, 3)], dim=1)
    normalised = ImageData(images, torch.zeros(50), images, torch.zeros(50), 0, False).normaliser()(images)
    assert normalised.dtype == torch.float32
    assert normalised.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert normalised.var((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_images_that_cannot_be_normalised_are_told():
    images = torch.full((5, 2, 4, 4), 7, dtype=torch.uint8)
    images[0, 0, 0, 0] = 1
    with pytest.raises(DataError, match="same value throughout channel 1"):
        ImageData(images, torch.zeros(5), images, torch.zeros(5), 0, False).normaliser()


def test_an_augmented_image_is_a_shifted_perhaps_mirrored_copy():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).repeat(200, 1, 1, 1)
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    shifts = [padded[row : row + 4, column : column + 4] for row in range(3) for column in range(3)]
    possible = {tuple(image.flatten().tolist()) for shift in shifts for image in (shift, shift.flip(1))}
    some = ImageData(images, images, images, images, shift=1, flip=True)
    augmented = some.augment(images, some.moves(200, torch.Generator()))
    assert {tuple(image.flatten().tolist()) for image in augmented} == possible  # each of 18, in 200 draws


def test_a_mirrored_border_repeats_no_edge():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    some = ImageData(images, images, images, images, shift=1, flip=False)
    corner, middle = (some.augment(images, torch.tensor([[at, at, 0]]), "reflect")[0, 0] for at in (0, 1))
    # The row above the first is the second, the column left of the first is the second.
    assert corner.tolist() == [[6, 5, 6, 7], [2, 1, 2, 3], [6, 5, 6, 7], [10, 9, 10, 11]]
    assert torch.equal(middle, images[0, 0])
    many = ImageData(images.repeat(30, 1, 1, 1), torch.arange(30), images, images, shift=1, flip=False)
    drawn = epoch(many, pad="reflect")
    assert min(batch.min() for batch, _ in drawn) == 1  # no black


def epoch(some, seed=3, number=1, start=0, part=Part(), pad="zero"):  # noqa: B008 - it is frozen
    return [*some.training(Batches(10, start, 3, seed, number, True, part, pad))]


def test_an_epoch_goes_on_from_any_step_and_is_shared_by_processes():
    images = torch.randint(256, (35, 3, 8, 8), dtype=torch.uint8)
    some = ImageData(images, torch.arange(35), images, torch.arange(35), shift=2, flip=True)
    whole = epoch(some)
    assert {len(labels) for _, labels in whole} == {10}
    assert len(torch.cat([labels for _, labels in whole]).unique()) == 30
    for ours, theirs in zip(epoch(some, start=1), whole[1:], strict=True):
        assert all(map(torch.equal, ours, theirs))
    for rank in range(2):
        for ours, theirs in zip(epoch(some, part=Part(rank, 2)), whole, strict=True):
            assert all(torch.equal(own, every[rank::2]) for own, every in zip(ours, theirs, strict=True))
    for other in (epoch(some, seed=4), epoch(some, number=2)):
        assert not torch.equal(other[0][1], whole[0][1])


def test_generators_for_different_purposes_differ():
    keys = [(1, 1), (1, 1, 0), (1, 1, 1), (2**32 + 1, 1), (1, 2**32 + 1), (11,)]
    first = [torch.randint(2**60, (1,), generator=draws(*key)).item() for key in keys]
    assert len({*first}) == len(keys)
    assert torch.equal(torch.rand(3, generator=draws(1, 2)), torch.rand(3, generator=draws(1, 2)))


def test_too_few_images_to_hold_out_are_told():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="split is validation, but the training images cannot be split: "):
        ImageData(images, torch.arange(2), images, torch.arange(2), shift=2, flip=True).validation()


def test_every_test_image_is_evaluated_by_one_process():
    images = torch.randint(256, (35, 3, 8, 8), dtype=torch.uint8)
    some = ImageData(images, torch.arange(35), images, torch.arange(35), shift=2, flip=True)
    seen = torch.cat([labels for rank in range(3) for _, labels in some.evaluation(5, Part(rank, 3))])
    assert seen.sort()[0].tolist() == [*range(35)]


# ----------------------------------------------------------------------------------------------------- Fashion-MNIST


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_is_read_as_written(tmp_path, zipped):
    files = fashion_files()
    for name, array in files.items():
        (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    fashion = load("fashion-mnist", tmp_path)
    assert fashion.train_images.shape == (20, 1, 28, 28)
    assert np.array_equal(fashion.train_images[:, 0], files["train-images-idx3-ubyte"])
    assert np.array_equal(fashion.test_labels, files["t10k-labels-idx1-ubyte"])
    assert fashion.test_labels.dtype == torch.int64


IMAGES = idx(random_bytes(20, 28, 28))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train-images-idx3-ubyte", IMAGES[:-1], r"has 15679 values, but its header promises 20 x 28 x 28"),
        ("train-images-idx3-ubyte", IMAGES + b"x", r"has 15681 values, but its header promises 20 x 28 x 28"),
        ("train-images-idx3-ubyte", IMAGES[:9], r"is cut short: it has 9 bytes, and an idx header alone has 16"),
        ("train-images-idx3-ubyte", b"", r"starts with the bytes \(none\), but .* starts with 00 00 08 03"),
        ("train-images-idx3-ubyte", b"\x89PNG....", r"starts with the bytes 89 50 4e 47"),
        ("t10k-labels-idx1-ubyte", idx(np.full(20, 11, np.uint8)), r"has the label 11, but labels run from 0 to 9"),
        ("t10k-images-idx3-ubyte", idx(random_bytes(20, 14, 9)), r"has images of shape \(20, 1, 14, 9\), but some are"),
        ("train-images-idx3-ubyte", idx(random_bytes(0, 28, 28)), r"has images of shape \(0, 1, 28, 28\), but some"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(19, np.uint8)), r"has 19 labels, but there are 20 images"),
    ],
)
def test_damaged_idx_files_are_told(fashion_dir, name, content, sentence):
    (fashion_dir / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {sentence}"):
        load("fashion-mnist", fashion_dir)


def test_damaged_gzip_files_are_told(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (gzip.compress(IMAGES)[:-20], b"no gzip", gzip.compress(IMAGES)[:50] + b"\xff" * 40):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"ubyte.gz is not a complete gzip file"):
            read_idx(path, dims=3)


def test_missing_files_and_directories_are_told(fashion_dir):
    (fashion_dir / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"needs t10k-images-idx3-ubyte or .*\.gz, but .* has no such file"):
        load("fashion-mnist", fashion_dir)
    with pytest.raises(DataError, match=r"nowhere is not a directory: name another --data-dir, or add --download"):
        load("fashion-mnist", fashion_dir / "nowhere")
    with pytest.raises(DataError, match=r"cifar10 needs data_batch_1.bin .* has no such file"):
        load("cifar10", fashion_dir)
    (fashion_dir / "t10k-images-idx3-ubyte").mkdir()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte cannot be read"):
        load("fashion-mnist", fashion_dir)


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.mark.parametrize("folder", ["", "official"])
@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_read_as_written(tmp_path, version, folder):
    directory = tmp_path / (folder and f"cifar-10-batches-{version}")
    directory.mkdir(exist_ok=True)
    for name in official_files.CIFAR10_FILES:
        path = directory / (f"{name}.bin" if version == "bin" else name)
        path.write_bytes(cifar_binary() if version == "bin" else cifar_python_2())
    cifar = load("cifar10", tmp_path)
    labels, images = cifar_batch()
    assert cifar.train_images.shape == (60, 3, 32, 32)
    assert np.array_equal(cifar.test_images.flatten(1), images)
    assert np.array_equal(cifar.train_labels, np.tile(labels, 5))


@pytest.mark.parametrize("protocol", [3, 4])
def test_cifar10_batches_pickled_by_python_3(tmp_path, protocol):
    labels, images = cifar_batch()
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=protocol))
    assert np.array_equal(read_cifar10(path)[0].flatten(1), images)


def python_batch(**changes) -> bytes:
    labels, images = cifar_batch()
    batch = {"data": images, "labels": labels.tolist()} | changes
    return pickle.dumps({key.encode(): value for key, value in batch.items()}, protocol=4)


class Evil:
    def __reduce__(self):
        return print, ("a pickle ran a program",)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("test_batch.bin", cifar_binary()[:-1], "has 36875 bytes, but 12 images and labels have 36876"),
        ("test_batch.bin", b"\x0a" + cifar_binary()[1:], "has the label 10, but labels run from 0 to 9"),
        ("test_batch", cifar_python_2()[:-500], "is not a batch of CIFAR-10's python version: .*truncated"),
        ("test_batch", b"", "is not a batch of CIFAR-10's python version: EOFError"),
        ("test_batch", pickle.dumps({"x": 1}), "is not a batch of CIFAR-10's python version: KeyError"),
        ("test_batch", pickle.dumps(Evil()), "it asks for builtins.print, but only NumPy arrays are accepted"),
        ("test_batch", python_batch(data=random_bytes(11, CIFAR_ROW)), r"images of type uint8 and shape \(11, 3072\)"),
        ("test_batch", python_batch(labels=[0.5] * 12), "labels of type float64"),
        ("test_batch", python_batch(labels=[0] * 11), "has 11 labels, but there are 12 images"),
        ("test_batch", python_batch(labels=[-1] * 12), "has the label -1, but labels run from 0 to 9"),
    ],
)
def test_damaged_cifar10_files_are_told(tmp_path, capsys, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} .*{sentence}"):
        read_cifar10(path)
    assert not capsys.readouterr().out  # nothing in the file was run


# --------------------------------------------------------------------------------------------------------- downloads


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_download_is_kept_when_its_md5_is_right(tmp_path):
    (tmp_path / "source").write_bytes(b"content")
    target = tmp_path / "new" / "file"
    assert fetch(Download((tmp_path / "source").as_uri(), md5(b"content")), target) == target
    assert target.read_bytes() == b"content"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_download_with_another_md5_leaves_nothing_behind(tmp_path):
    (tmp_path / "source").write_bytes(b"content")
    target = tmp_path / "new" / "file"
    with pytest.raises(
        DataError, match=f"has MD5 {md5(b'content')}, but {md5(b'other')} was published: nothing was kept"
    ):
        fetch(Download((tmp_path / "source").as_uri(), md5(b"other")), target)
    assert not list(target.parent.iterdir())


def test_a_source_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch(Download((tmp_path / "source").as_uri(), md5(b"")), tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(tmp_path):
    """A server on this machine for what is in tmp_path / "served"."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_cifar10_is_downloaded_unpacked_and_then_found(tmp_path, server, monkeypatch):
    served, url = server
    archive = cifar_archive()  # once: gzip notes the time
    (served / "archive.tar.gz").write_bytes(archive)
    monkeypatch.setattr(official_files, "CIFAR10_ARCHIVE", Download(f"{url}/archive.tar.gz", md5(archive)))
    downloaded = load("cifar10", tmp_path / "data", download=True)
    (served / "archive.tar.gz").unlink()
    found = load("cifar10", tmp_path / "data", download=True)
    assert torch.equal(downloaded.train_images, found.train_images)
    assert len(found.train_labels) == 60
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-bin"]


def test_fashion_mnist_is_downloaded_file_by_file(tmp_path, server, monkeypatch):
    served, url = server
    published = {}
    for name, array in fashion_files().items():
        content = gzip.compress(idx(array))
        (served / f"{name}.gz").write_bytes(content)
        published[name] = md5(content)
    monkeypatch.setattr(official_files, "FASHION_MNIST_URL", url)
    monkeypatch.setattr(official_files, "FASHION_MNIST_FILES", published)
    assert load("fashion-mnist", tmp_path / "data", download=True).test_images.shape == (20, 1, 28, 28)
    (served / "t10k-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz cannot be downloaded .*404"):
        load("fashion-mnist", tmp_path / "data", download=True)
