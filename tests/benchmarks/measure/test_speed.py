"""Rows of every kind of layer: the layers, their peers, and what a row holds. Here with tiny layers, not how fast."""

import argparse
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.families import IMAGE, KINDS, LINEAR, LayerCase
from benchmarks.common.peers import peers
from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import read_csv
from benchmarks.common.timing import once
from benchmarks.measure import speed

TINY = {
    "image": ((8, 16, 7, 2), 3),
    "linear": ((32, 64, 1, 1), 1),
    "transposed": ((16, 8, 5, 2), 4),
    "audio": ((8, 16, 40, 5), 10),
    "volume": ((8, 8, 5, 1), 3),
}


def tiny(kind, family="tucker", mode="infer", rank=2):
    shape, kernel = TINY[kind]
    return LayerCase(family, shape, rank, 3, mode, kind, kernel)


def options(**changes):
    """The arguments of the command line that choose rows."""
    none = dict.fromkeys(("families", "shapes", "ranks", "batches"))
    return argparse.Namespace(**none | {"modes": ["train"]} | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_each_kind(kind, monkeypatch):
    mode = "train" if kind == LINEAR else "infer"
    monkeypatch.setattr(speed, "CANDIDATES", 1)
    monkeypatch.setattr(speed, "rounds", lambda steps, budget: {name: [once(step)] for name, step in steps.items()})
    monkeypatch.setattr(speed, "peers", lambda row, layer: ())
    monkeypatch.setattr(speed, "peak", lambda module, x: 1)
    row = tiny(kind, mode=mode)
    x = torch.randn(row.batch, row.shape[0], *row.input_size)
    with FlopCounterMode(display=False) as counter:
        y = row.dense()(x)
    assert row.layer()(x).shape == y.shape
    found = speed.measure(row, budget=0.0, compiled=False)
    assert (found["kind"], found["kernel"], found["batch"], found["mode"]) == (kind, TINY[kind][1], 3, mode)
    assert found["dense_flops"] == counter.get_total_flops()
    assert 0 < found["least_flops"] <= found["flops"]
    assert min(found["dense"], found["auto"], found["auto_again"]) > 0


def test_the_grid_of_a_kind():
    rows = list(speed.cases(LINEAR, options()))
    assert {row.family for row in rows} == {*KINDS[LINEAR].families}
    assert {row.batch for row in rows} == {1, 32, 512, 4096}
    features = {number for row in rows for number in row.shape[:2]}
    assert (min(features), max(features)) == (256, 4096)
    assert len(rows) == prod(len(getattr(KINDS[LINEAR], name)) for name in ("families", "shapes", "batches", "ranks"))
    (row,) = speed.cases("audio", options(families=["cp"], shapes=[1], ranks=[8], batches=[2]))
    assert row == LayerCase("cp", (256, 256, 1600, 5), 8, 2, "train", "audio", 10)
    assert {row.kernel for row in speed.cases(IMAGE, options())} == {3}


def test_older_rows_are_of_images_and_are_kept(tmp_path):
    older = [{"family": "cp", "size": "32", "mode": mode} for mode in ("train", "infer")]
    rows = speed.kept(older, [LINEAR], ["train"])
    assert [(row["kind"], row["kernel"], row["mode"]) for row in rows] == [(IMAGE, "3", "train"), (IMAGE, "3", "infer")]
    assert [row["mode"] for row in speed.kept(older, [IMAGE, LINEAR], ["train"])] == ["infer"]
    write_csv(
        tmp_path / "speed.csv", [*rows, {"family": "tr", "kind": LINEAR, "kernel": 1, "size": 1, "mode": "train"}]
    )
    again = read_csv(tmp_path / "speed.csv")
    assert [row["kind"] for row in again] == [IMAGE, IMAGE, LINEAR]
    assert speed.kept(again, [LINEAR], ["train"]) == again[:2]


PEERS = {
    "linear": {"cp": "tednet tltorch", "tucker": "tltorch", "tt": "tednet tltorch", "tr": "tednet", "btt": "tednet"},
    "audio": {"cp": "tltorch", "tucker": "tltorch", "tt-chain": "tltorch"},
    "volume": {"cp": "tltorch", "tucker": "tltorch", "tt-chain": "tltorch"},
    "transposed": {},
}


@pytest.mark.parametrize("kind", PEERS)
def test_peers_are_the_same_network(kind):
    """As many parameters, but for the weights of tensorly-torch's CP and the kernel factors of its Tucker."""
    pytest.importorskip("tednet")
    pytest.importorskip("tltorch")
    for family in KINDS[kind].families[:6]:
        row = tiny(kind, family, rank=2)
        layer, taps = row.layer(), TINY[kind][1]
        x = torch.randn(2, row.shape[0], *row.input_size)
        found = dict(peers(row, layer))
        assert {name.rstrip("012") for name in found} == {*PEERS[kind].get(family, "").split()}, family
        cores = sum(core.numel() for core in layer.cores)
        for name, peer in found.items():
            more = 0
            if name.startswith("tltorch"):
                more = {"cp": 2, "tucker": len(row.input_size) * taps**2}.get(family, 0)
            assert sum(p.numel() for p in peer.parameters()) == cores + more
            assert peer(x).shape == layer(x).shape
