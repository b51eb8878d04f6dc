"""Which rate table a device gets, and what happens to files that are broken, foreign, or written twice at once."""

import itertools
import multiprocessing
import re
import warnings
from dataclasses import astuple, replace

import pytest
import torch

import tnlayers
from tnlayers.backend import devices, rate_tables
from tnlayers.backend.derived import DOUBT
from tnlayers.backend.devices import name_of
from tnlayers.backend.rate_files import DERIVED, MEASURED, parsed, written
from tnlayers.backend.rate_tables import cache_folder, own_file, shipped, table_of, write
from tnlayers.backend.rates import BASES, KINDS, Rate, floor


@pytest.fixture
def folder(avx512, tmp_path, monkeypatch):
    """An empty cache, on a machine whose kind of CPU has a shipped table."""
    monkeypatch.setenv(rate_tables.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def mine(**changes):
    """A table as this machine would write it, of other rates than the shipped one."""
    table = shipped()["cpu avx512", "float32"]
    train = {kind: Rate(2 * rate.call, rate.flop, rate.byte) for kind, rate in table.rates.train.items()}
    found = replace(table, machine=name_of("cpu"), date="2031-02-03", rates=replace(table.rates, train=train))
    return replace(found, **changes)


def test_tests_do_not_read_the_developers_tables():
    assert "tnlayers-tests-" in cache_folder().name
    assert not [*cache_folder().iterdir()]


def test_shipped_tables_are_files_that_say_where_they_were_measured():
    assert {("cpu avx2", "float32"), ("cpu avx512", "float32"), ("cpu avx512", "bfloat16")} <= shipped().keys()
    for table in shipped().values():
        assert (table.origin, table.threads, table.torch) == (MEASURED, 2, "2.13.0")
        assert table.samples > 500
        assert re.fullmatch(r"2026-\d\d-\d\d", table.date)
        assert tuple(table.rates.train) == tuple(table.rates.infer)
        assert set(KINDS) <= set(table.rates.train) <= {*KINDS, *BASES}
    assert shipped()["cpu avx512", "float32"].rates.infer["conv last"] == Rate(69.4 * 1e-6, 5.65 * 1e-12, 45.6 * 1e-12)


def with_forms(kinds=BASES, modes=("train", "infer")):
    """The user's table with rows for some kinds of forms, a hundred times as slow as their base."""
    rates = mine().rates
    for mode in modes:
        table = rates.of(mode)
        more = {kind: Rate(*(100 * number for number in astuple(table[BASES[kind]]))) for kind in kinds}
        rates = replace(rates, **{mode: {**table, **more}})
    return mine(rates=rates)


def test_kinds_of_forms_are_optional_and_read_back():
    assert not {*BASES} & {*KINDS}
    assert {*BASES.values()} <= {*KINDS}
    for kinds in (BASES, ("matmul rows group",), ()):
        again = parsed(written(with_forms(kinds)))
        assert {*again.rates.train} == {*again.rates.infer} == {*KINDS, *kinds}
        assert written(again) == written(with_forms(kinds))
    with pytest.raises(ValueError, match="lacks 'conv 3d last' in 'train', and has it in the other mode"):
        parsed(written(with_forms(["conv 3d last"], ["infer"])))


def test_the_bound_for_a_layer_is_that_of_the_kinds_it_can_have():
    table = dict.fromkeys(KINDS, Rate(2.0, 2.0, 2.0)) | {"conv 3d first": Rate(1.0, 3.0, 1.0)}
    assert floor(table) == floor(table, ("", "1d")) == Rate(2.0, 2.0, 2.0)
    assert floor(table, ("3d",)) == Rate(1.0, 2.0, 1.0)


def test_a_written_table_is_read_back(folder):
    for table in shipped().values():
        again = parsed(written(table))
        assert written(again) == written(table)
        assert again.rates.train == table.rates.train
        assert again.rates.lanes == table.rates.lanes


@pytest.mark.parametrize(
    ("capability", "family", "dtype", "kind", "name"),
    [
        ("AVX512", 0, "float32", "cpu avx512", "float32"),
        ("AVX512", 25, "float32", "cpu avx512", "float32"),
        ("AVX512", 26, "float32", "cpu avx512 zen5", "float32"),
        ("AVX512", 27, "float64", "cpu avx512 zen5", "float32"),
        ("AVX512", 26, "bfloat16", "cpu avx512", "bfloat16"),
        ("AVX512", 0, "float64", "cpu avx512", "float32"),
        ("AVX512", 0, "bfloat16", "cpu avx512", "bfloat16"),
        ("AVX2", 26, "float32", "cpu avx2", "float32"),
        ("AVX2", 0, "float16", "cpu avx2", "float32"),
        ("AVX2", 0, "bfloat16", "cpu avx512", "bfloat16"),
    ],
)
def test_a_cpu_gets_the_shipped_table_of_its_kind_or_a_similar_one(
    folder, monkeypatch, capability, family, dtype, kind, name
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(devices, "amd_family", lambda: family)
    assert table_of("cpu", dtype) is shipped()[kind, name]
    assert table_of("meta", dtype) is shipped()[kind, name]


@pytest.mark.parametrize(
    ("text", "family", "name"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: AMD  EPYC\n\ncpu family\t: 25\n", 26, "AMD EPYC"),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: Intel(R) Xeon(R)\n", 0, "Intel(R) Xeon(R)"),
        ("vendor_id\t: AuthenticAMD\nmodel name: x\n", 0, "x"),
    ],
)
def test_the_processor_is_known_from_the_system(monkeypatch, tmp_path, text, family, name):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(devices, "Path", lambda _: file)
    devices.facts.cache_clear()
    try:
        assert (devices.amd_family(), name_of("cpu")) == (family, name)
    finally:
        devices.facts.cache_clear()


def test_other_devices_get_a_derived_table(folder, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for device in ("cpu", "cuda", "mps", "xpu"):
        for dtype in ("float32", "bfloat16", "float64"):
            table = table_of(device, dtype)
            assert (table.origin, table.dtype, table.rates.doubt) == (DERIVED, dtype, DOUBT)
            assert ", estimated from properties of " in str(table)
            assert tuple(parsed(written(table)).rates.train) == tuple(table.rates.train) == KINDS


def test_the_users_table_comes_first_and_explain_names_it(folder):
    layer = tnlayers.TRConv2d(8, 12, 3, rank=3)
    assert layer.explain((2, 8, 6, 6)).splitlines()[-1] == "rates: cpu avx512 float32, measured 2026-11-26"
    write(mine(), own_file("cpu", "float32"))
    rate_tables._own.cache_clear()
    rate_tables._table_of.cache_clear()
    assert written(table_of("cpu", "float32")) == written(mine())
    assert table_of("cpu", "float64") is table_of("cpu", "float32")  # nearer than another CPU's
    assert table_of("cpu", "bfloat16") is shipped()["cpu avx512", "bfloat16"]
    assert layer.explain((2, 8, 6, 6)).splitlines()[-1] == "rates: cpu avx512 float32, measured 2031-02-03"


def test_the_folder_is_absolute_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, found in (("a", "a"), ("~/a", "home/a"), ("../a", "../a")):
        monkeypatch.setenv(rate_tables.VARIABLE, value)
        assert cache_folder() == (tmp_path / found).resolve()
        assert own_file("cpu", "float32").is_absolute()


TEXT = written(shipped()["cpu avx512", "float32"]).replace("machine: AMD EPYC", "machine: {machine}")
FOREIGN = {
    "an empty file": ("", "it is no rate table"),
    "another file": ("a,b\n1,2\n", "it is no rate table"),
    "no text": (b"\xff\xfe\x00", "it is no text"),
    "another version": (TEXT.replace("format: 1", "format: 2"), "its format is '2', and this version reads 1"),
    "another machine": (
        TEXT.replace("{machine}", "Z80"),
        f"it is for the machine 'Z80', and this is '{name_of('cpu')}'",
    ),
    "another device": (TEXT.replace("cpu avx512", "cpu avx2"), "it is for the device 'cpu avx2', and this is"),
    "another dtype": (TEXT.replace("float32", "float64"), "it is for the dtype 'float64', and this is 'float32'"),
    "not a number": (TEXT.replace("19.8", "nan"), "its rate of 'conv single' in 'train' is 'nan'"),
    "negative": (TEXT.replace("19.8", "-19.8"), "its rate of 'conv single' in 'train' is '-19.8'"),
    "infinite": (TEXT.replace("19.8", "1e999"), "its rate of 'conv single' in 'train' is '1e999'"),
    "a kind missing": (re.sub("infer,move.*\n", "", TEXT), "it lacks 'move' in 'infer'"),
    "a kind twice": (re.sub("(infer,move.*\n)", r"\1\1", TEXT), "it has two rows for 'move' in 'infer'"),
    "an unknown kind": (TEXT.replace("infer,move", "infer,more"), "it has the line 'infer,more,18.6,0,37.5'"),
    "rates of 0": (TEXT.replace("move,18.6,0,37.5", "move,0,0,0"), "its rates of 'move' in 'infer' are all 0"),
    "no lanes": (TEXT.replace("first 16, ", ""), "its lanes are 'last 8, single 1'"),
    "lanes of 0": (TEXT.replace("first 16", "first 0"), "its lanes first is '0'"),
    "no doubt": (re.sub("# doubt.*\n", "", TEXT), "its header lacks 'doubt'"),
    "derived": (TEXT.replace("origin: measured", "origin: derived"), "it was not measured"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_broken_or_foreign_file_changes_nothing_but_a_warning(folder, case):
    content, reason = FOREIGN[case]
    x, layer = torch.randn(2, 8, 6, 6), tnlayers.TRConv2d(8, 12, 3, rank=3)
    expected, explained = layer(x), layer.explain(x.shape)
    path = own_file("cpu", "float32")
    folder.mkdir()
    content = content if isinstance(content, bytes) else content.replace("{machine}", name_of("cpu")).encode()
    path.write_bytes(content)
    rate_tables._own.cache_clear()
    rate_tables._table_of.cache_clear()
    layer.strategy = "auto"  # forgets the plans
    tnlayers.planning.choose._plan.cache_clear()
    tnlayers.planning.choose._known.cache_clear()
    with pytest.warns(UserWarning, match="is not used: ") as told:
        assert torch.equal(layer(x), expected)
    assert len(told) == 1  # once
    text = str(told[0].message)
    assert text.startswith(f"{path} is not used: {reason}")
    assert text.endswith("; to replace it, run python -m tnlayers rates --device cpu --dtype float32")
    assert layer.explain(x.shape) == explained
    assert [(path, path.read_bytes())] == [(each, each.read_bytes()) for each in folder.iterdir()]


def test_a_file_that_ends_too_early_is_refused_wherever_it_ends():
    text = written(mine())
    parsed(text)
    for end in range(len(text)):
        with pytest.raises(ValueError, match=r"it is no rate table|its end is missing|its format is"):
            parsed(text[:end])


def test_a_folder_that_cannot_be_read_changes_nothing_but_a_warning(folder):
    own_file("cpu", "float32").mkdir(parents=True)
    with pytest.warns(UserWarning, match="is not used: "):
        assert table_of("cpu", "float32") is shipped()["cpu avx512", "float32"]


def test_no_forward_writes_to_the_cache(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = tnlayers.TRConv2d(8, 12, 3, rank=3)
        layer(torch.randn(2, 8, 6, 6)).sum().backward()
        layer.eval()(torch.randn(1, 8, 7, 7))
        layer.explain((2, 8, 6, 6))
        tnlayers.autotune(layer, torch.randn(2, 8, 6, 6), candidates=2)
    assert not folder.exists()


def _write_many(path, date, start):
    table = mine(date=date)
    start.wait()
    for _ in range(100):
        write(table, path)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the children only write files
def test_two_processes_that_write_at_once_leave_a_whole_file(folder):
    path = own_file("cpu", "float32")
    write(mine(date="2031-01-01"), path)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    dates = "2031-01-01", "2031-01-02"
    whole = {written(mine(date=date)) for date in dates}
    processes = [context.Process(target=_write_many, args=(path, date, start)) for date in dates]
    for process in processes:
        process.start()
    start.set()
    while any(process.is_alive() for process in processes):
        assert path.read_text() in whole
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert path.read_text() in whole
    assert [*folder.iterdir()] == [path]  # and nothing else


def _full(*_):
    raise OSError("the disk is full")


def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    path = own_file("cpu", "float32")
    write(mine(), path)
    before = path.read_text()
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{step}", _full)
            with pytest.raises(OSError, match="full"):
                write(mine(date="2031-05-05"), path)
        assert path.read_text() == before
        assert [*folder.iterdir()] == [path]


def test_the_name_of_a_table_is_a_file_name_everywhere():
    for device, dtype in itertools.product(("cpu", "cuda", "mps"), ("float32", "bfloat16")):
        assert re.fullmatch(r"rates-[a-z0-9-]+\.csv", own_file(device, dtype).name)
