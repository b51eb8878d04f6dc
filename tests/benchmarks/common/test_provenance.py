"""Rows say where they come from; files are replaced whole."""

from pathlib import Path

import torch

from benchmarks.common.provenance import provenance, write_csv
from runs import read

ROOT = Path(__file__).parents[3]


def test_provenance_names_versions_and_no_place():
    here = provenance()
    assert list(here) == ["machine", "python", "torch", "tnlayers", "commit", "date"]
    assert all(here.values())
    assert here["torch"] == torch.__version__
    assert "/" not in "".join(here.values())


def test_a_row_keeps_the_provenance_it_came_with(tmp_path):
    write_csv(tmp_path / "a.csv", [{"x": 1, "date": "1999-01-01"}, {"x": 2, "date": "1999-01-02"}])
    assert [(row["x"], row["date"]) for row in read(tmp_path / "a.csv")] == [("1", "1999-01-01"), ("2", "1999-01-02")]
    assert read(tmp_path / "a.csv")[0]["torch"] == torch.__version__


def test_a_link_stays_and_its_target_is_replaced_with_its_permissions(tmp_path):
    target, link, chain = (tmp_path / name for name in ("target.csv", "link.csv", "chain.csv"))
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target.name)
    chain.symlink_to(link)
    for path in (target, link, chain):
        write_csv(path, [{"path": path.name}])
        assert [row["path"] for row in read(target)] == [path.name]
        assert target.stat().st_mode & 0o777 == 0o640
    (tmp_path / "to").symlink_to("new.csv")
    write_csv(tmp_path / "to", [{"path": "new"}])
    assert [row["path"] for row in read(tmp_path / "new.csv")] == ["new"]
    assert {path.name for path in tmp_path.iterdir() if path.is_symlink()} == {"link.csv", "chain.csv", "to"}
    assert len([*tmp_path.iterdir()]) == 5
