"""What a layer costs is told: once, of the user's own line; and what cannot be had is refused before it is made."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tnlayers
from cases import FAMILIES
from tnlayers import TensorizeConfig, models, tensorize_, testing
from tnlayers.layers import core_memory


def told(call):
    """The sentences of the warnings of a call, and whether each names this file."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    assert all(issubclass(each.category, UserWarning) for each in found)
    return [(str(each.message), each.filename == __file__, each.lineno) for each in found]


class Own(tnlayers.TTConv2d):
    """A class of the user's; the line that is told of is in its constructor."""

    def __init__(self):
        super().__init__(8, 8, 3, rank=60)


SENTENCE = "the cores of TTConv2d have 58,380 parameters, but its dense kernel has 576; choose a smaller rank"


def twice():
    """A model whose layers share what a budget leaves."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: tnlayers.TTConv2d(8, 8, 3, rank=60),
        lambda: tnlayers.TTConv2d.from_conv(nn.Conv2d(8, 8, 3), rank=60, decompose=False),
        lambda: tnlayers.TTConv2d.from_conv(nn.Conv2d(8, 8, 3), rank=60),
        lambda: tensorize_(nn.Sequential(nn.Conv2d(8, 8, 3)), TensorizeConfig("tt", rank=60, decompose=False)),
        lambda: tensorize_(nn.Sequential(nn.Conv2d(8, 8, 3)), TensorizeConfig("tt", rank=60)),
        lambda: tnlayers.layers.description.build(
            tnlayers.layers.description.describe(tnlayers.TTConv2d(8, 8, 3, rank=60, device="meta")), device="cpu"
        ),
    ],
)
def test_more_parameters_than_the_dense_kernel_are_told_once_and_where(call, monkeypatch):
    monkeypatch.setattr("tnlayers.fitting.decompose.SWEEPS", 1)
    (line,) = {line for _, _, line in told(call)}
    ((sentence, here, _),) = told(call)
    assert SENTENCE in sentence
    assert "rank is " in sentence
    assert here
    start = call.__code__.co_firstlineno
    assert start <= line < start + 3


def test_a_subclass_and_a_model_of_the_library_tell_of_the_users_line():
    ((_, here, line),) = told(Own)
    assert here
    assert line == inspect.getsourcelines(Own.__init__)[1] + 1
    sentences = told(lambda: models.resnet20(conv=partial(tnlayers.CPConv2d, rank=2000), in_channels=1))
    assert len(sentences) == 18
    assert all(here for _, here, _ in sentences)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tnlayers.TTConv2d(8, 8, 3, rank=60, device="meta"),
        lambda: tnlayers.EinsumConv2d(8, 8, 3, network="o i h w"),  # as many as the kernel
        lambda: tensorize_(nn.Sequential(nn.Conv2d(8, 8, 3)), TensorizeConfig("tt", rank=60), dry_run=True),
        lambda: tensorize_(twice(), TensorizeConfig("cp", budget={"params": 0.9})),
        lambda: tensorize_(twice(), TensorizeConfig("cp", energy=1), dry_run=True),
        lambda: testing.check(tnlayers.TRLinear, 2, 2, rank=2),
        lambda: [layer(8, 8, 3) for layer in FAMILIES],
    ],
)
def test_nothing_is_told_of_trials_and_of_what_is_no_larger(call):
    assert told(call) == []


def test_fake_tensors_take_no_memory():
    with FakeTensorMode():
        assert told(lambda: tnlayers.CPLinear(8, 8, rank=10**15)) == []


@pytest.mark.parametrize("rank", [600, 10**9, 10**30])
@pytest.mark.parametrize("layer", [tnlayers.BTTConv2d, tnlayers.TRConv2d, tnlayers.HTLinear])
def test_cores_that_fit_nowhere_are_refused(layer, rank, monkeypatch):
    monkeypatch.setattr(core_memory, "_machine", lambda: 2**20)
    kernel = [3] if issubclass(layer, tnlayers.TensorConv2d) else []
    make = partial(layer, 8, 8, *kernel, rank=rank)
    with pytest.raises(ValueError, match=rf"rank is {rank}; .*cores? of {layer.__name__} would") as caught:
        make()
    assert "free; choose a smaller rank" in str(caught.value) or rank > 600
    dense = layer.dense_type(8, 8, *kernel)
    before = dense.weight.clone()
    for decompose in (True, False):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            layer.from_dense(dense, rank=rank, decompose=decompose)
    model = nn.Sequential(dense, nn.Linear(8, 8))
    for dry_run in (True, False):
        name = layer.format_type.name
        report = tensorize_(
            model, TensorizeConfig(name, overrides={"0": {"rank": rank}, "1": {"rank": 1}}), dry_run=dry_run
        )
        assert report["0"].reason.startswith(f"refused: rank is {rank}; ")
    assert torch.equal(model[0].weight, before)


def test_the_refusal_names_what_is_wanted_and_what_there_is(monkeypatch):
    layer = tnlayers.TTConv2d(8, 8, 3, rank=300)
    wanted = sum(core.nbytes for core in layer.cores)
    enough = core_memory.DRAWN * wanted
    monkeypatch.setattr(core_memory, "free", lambda device: enough)
    tnlayers.TTConv2d(8, 8, 3, rank=300)
    monkeypatch.setattr(core_memory, "free", lambda device: enough - 1)
    sentence = f"rank is 300; the cores of TTConv2d would take {wanted:,} bytes, .* but cpu has {enough - 1:,} free"
    with pytest.raises(ValueError, match=sentence):
        tnlayers.TTConv2d(8, 8, 3, rank=300)
    tnlayers.TTConv2d(8, 8, 3, rank=300, device="meta")
    tnlayers.TTConv2d(8, 8, 3, rank=300, dtype=torch.bfloat16)


def test_on_the_meta_device_only_tensors_that_cannot_be_are_refused():
    assert tnlayers.TRConv2d(8, 8, 3, rank=10**8, device="meta").cores[0].numel() == 8 * 10**16
    with pytest.raises(ValueError, match="a core of TRConv2d would have more entries than a tensor can"):
        tnlayers.TRConv2d(8, 8, 3, rank=10**9, device="meta")


PLACES = {
    "/proc/self/cgroup": "4:cpu,memory:/a/b\n1:name=systemd:/\n0::/a/b",
    "/proc/meminfo": "MemTotal: 900 kB\nMemAvailable:       500 kB\nSwapFree: 7 kB",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 512_000),
        ({"/sys/fs/cgroup/a/b/memory.max": "max", "/sys/fs/cgroup/a/b/memory.current": "5"}, 512_000),
        (
            {
                "/sys/fs/cgroup/a/memory.max": "1000",
                "/sys/fs/cgroup/a/memory.current": "300",
                "/sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 200\nactive_file 9",
            },
            900,
        ),
        ({"/sys/fs/cgroup//memory.max": "100", "/sys/fs/cgroup//memory.current": "300"}, 0),
        (
            {
                "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "1000",
                "/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "400",
                "/sys/fs/cgroup/memory/a/b/memory.stat": "inactive_file 1\ntotal_inactive_file 50",
            },
            650,
        ),
    ],
)
def test_free_memory_is_the_machines_or_what_a_container_leaves(files, expected, monkeypatch):
    there = PLACES | files
    monkeypatch.setattr(core_memory, "_read", lambda path: there.get(path, ""))
    assert core_memory.free(torch.device("cpu")) == expected


def test_systems_that_tell_nothing_refuse_nothing(monkeypatch):
    monkeypatch.setattr(core_memory, "_read", lambda path: "")
    assert core_memory.free(torch.device("cpu")) >= 2**30  # all there is
    monkeypatch.delattr("os.sysconf")
    assert core_memory.free(torch.device("cpu")) == float("inf")
    assert core_memory.free(torch.device("mps")) == float("inf")


@pytest.mark.parametrize("layer", FAMILIES)
def test_a_swap_at_the_default_leaves_what_it_would_enlarge(layer):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(16, 16, 3))
    report = tensorize_(model, TensorizeConfig(layer.format_type.name, decompose=False))
    assert report.swapped == ("1",)
    assert report["0"].reason.startswith("refused: its smallest network has ")
    assert report["0"].reason.endswith("parameters, no fewer than its 1")
    assert report["1"].params[1] < report["1"].params[0]
