"""What pages say in words is so: estimates, limits of the planner, and links to the pages with the figures."""

import re
from pathlib import Path

import pytest
from torch import nn

import tnlayers
from tnlayers.planning import choose

ROOT = Path(__file__).parents[2]
NAMES = {"tensor ring": "tr", "TT, chain": "tt layout=chain", "TT, matrix": "tt"}


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def prose(name):
    return " ".join(page(name).split())


def times():
    """The columns of time in the table of formats, by the name of the row in a comparison."""
    rows = re.findall(r"^\| ([^|]+) \| saves \| ([^|]+) \| ([^|]+) \|.*$", page("explanation/formats"), re.MULTILINE)
    return {NAMES.get(name, name.lower()): {0.1: small, 0.5: large} for name, small, large in rows}


@pytest.mark.parametrize("rank", [0.1, 0.5])
def test_the_table_of_formats_says_what_is_estimated(rank, avx512):
    said = times()
    assert {*said} == {row.name for row in tnlayers.compare(nn.Linear(4, 4)).rows[1:]}
    conv = tnlayers.compare(nn.Conv2d(256, 256, 3, padding=1), rank, (32, 256, 16, 16)).rows
    linear = tnlayers.compare(nn.Linear(1024, 1024), rank, (32, 1024)).rows
    for one, other in zip(conv[1:], linear[1:], strict=True):
        faster = [max(row.train_ratio, row.infer_ratio) < 1 for row in (one, other)]
        words = {(True, True): "saves", (False, False): "does not", (False, True): "linear layers only"}
        assert said[one.name][rank] == words[tuple(faster)], one.name


def test_single_images_of_few_channels_are_estimated_slower_in_cp_and_tr(avx512):
    for rank in (0.1, 0.5):
        found = tnlayers.compare(nn.Conv2d(64, 64, 3, padding=1), rank, (1, 64, 16, 16), formats=["cp", "tr"])
        assert all(min(row.train_ratio, row.infer_ratio) > 1 for row in found.rows[1:])


def test_blocktt_is_slower_than_a_dense_linear_layer_at_larger_keep_ratios(avx512):
    ratios = {}
    for rank in (0.1, 0.25, 0.5):
        (row,) = tnlayers.compare(nn.Linear(1024, 1024), rank, (32, 1024), formats=["blocktt"]).rows[1:]
        ratios[rank] = row.train_ratio, row.infer_ratio
    assert max(ratios[0.1]) < 1 < ratios[0.25][1]
    assert min(ratios[0.5]) > 1
    small = tnlayers.compare(nn.Conv2d(64, 64, 3), 0.1, formats=["blocktt"]).rows[1]
    assert small.params is None
    assert "that keep ratio leaves" in small.note


def test_formats_without_measured_times_are_said_to_have_none():
    """HT; BlockTT has them in linear layers alone."""
    speed = (ROOT / "benchmarks" / "results" / "speed.csv").read_text(encoding="utf-8")
    assert {line.split(",")[0] for line in speed.splitlines()[1:]} == {"cp", "tucker", "tt", "tt-chain", "tr", "btt"}
    kinds = (ROOT / "benchmarks" / "results" / "speed_kinds.csv").read_text(encoding="utf-8")
    families = {tuple(line.split(",")[:2]) for line in kinds.splitlines()[1:]}
    assert ("blocktt", "linear") in families
    assert "ht" not in {family for family, _ in families}
    assert "BlockTT is there in linear layers, HT is not." in prose("explanation/formats")


def test_links_for_times_of_planning_lead_to_the_page_that_has_them():
    """A sentence that names a measurement links the page with its table."""
    tables = {"planning": "construct", "speed": "speed", "compress": "compression", "construct": "construct"}
    for table, name in tables.items():
        assert f"<!-- table: {table} -->" in page(f"evidence/{name}")
    assert "(../evidence/construct.md#planning) has the times of planning." in prose("explanation/planner")
    assert "\n## Planning\n" in page("evidence/construct")
    assert "<!-- table: penalty -->" in page("evidence/tools")
    assert "What it costs was measured: [tools](../evidence/tools.md)." in prose("how-to/optimizers")


def test_the_allocators_limit_is_that_of_the_rates():
    layer = tnlayers.CPConv2d(8, 8, 3, rank=2)
    rates = choose._search(layer.network, layer.geometry, layer._setting((1, 8, 8, 8)), "auto", "auto").pricing.rates
    assert (rates.large, rates.fault > 0) == (32 * 2**20, True)
    said = prose("explanation/memory")
    assert "tensors above 32 MiB are fetched from the system" in said
    assert "rates hold the limit as `large` and that time as `fault`" in said


def test_compression_says_that_its_times_are_noisy():
    assert "The times are noisy. Another process ran on the machine." in prose("evidence/compression")


def test_the_bound_of_the_planners_memory_is_the_one_that_its_test_holds():
    test = (ROOT / "tests" / "planning" / "test_search.py").read_text(encoding="utf-8")
    assert "    assert most < 50e6\n" in test
    assert "a search takes less than 50 MB of memory" in prose("explanation/planner")
