"""README.md's tables are made from the CSV files, and a stale one is told."""

from pathlib import Path

import pytest
import torch

from benchmarks.common.provenance import write_csv
from benchmarks.report import speed_tables, tables
from benchmarks.report.markdown import ReportError

ROOT = Path(__file__).parents[3]


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
    write_csv(tmp_path / "digits.csv", digits_rows())
    before = "# Title\n<!-- table: digits -->\nold\n<!-- /table -->\nafter\n"
    after = tables.Report(tmp_path).rewrite(before, "a.md")
    assert after.startswith("# Title\n<!-- table: digits -->\n| convolutions |")
    assert after.endswith("<!-- /table -->\nafter\n")
    assert "| dense | 98.50 ± 0.50 % | 1,000 | 100.0% | 0.500 | 2 |" in after
    assert "| tr-0.2 | 97.00 ± 0.00 % | 200 | 20.0% | 0.500 | 2 |" in after
    assert f"torch {torch.__version__}" in after
    assert tables.Report(tmp_path).rewrite(after, "a.md") == after


def test_tables_that_cannot_be_made_are_told(tmp_path):
    with pytest.raises(ReportError, match=r"asks for the table 'digits', but there is no .*digits\.csv"):
        tables.Report(tmp_path).rewrite("<!-- table: digits -->\n<!-- /table -->", "a.md")
    with pytest.raises(ReportError, match="asks for the table 'fingers', but there are only digits"):
        tables.Report(tmp_path).rewrite("<!-- table: fingers -->\n<!-- /table -->", "a.md")
    tuning = [row | {"split": "validation"} for row in digits_rows()]
    write_csv(tmp_path / "digits.csv", tuning)
    with pytest.raises(ReportError, match="validation"):
        tables.Report(tmp_path).rewrite("<!-- table: digits -->\n<!-- /table -->", "a.md")


def test_check_tells_a_stale_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    write_csv(tmp_path / "benchmarks" / "results" / "digits.csv", digits_rows())
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: digits -->\n<!-- /table -->\n")
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert "98.50" in readme.read_text()
    assert tables.main(["--check"]) == 0


def speed_row():
    return {
        "family": "cp", "in_channels": "64", "out_channels": "64", "size": "32", "stride": "1", "rank": "0.1",
        "keep_ratio": "0.1", "batch": "32", "mode": "train", "dense": "10", "dense_again": "11", "auto": "5",
        "auto_again": "5", "reconstruct": "", "factorized": "6", "low": "7", "oracle": "4", "tednet": "20",
        "tltorch": "4", "flops": "100", "least_flops": "90", "dense_flops": "1000", "dense_peak": "100",
        "auto_peak": "50", "low_peak": "25", "machine": "m", "torch": "t", "tnlayers": "v", "commit": "c", "date": "d",
    }  # fmt: skip


def test_tables_of_speed(tmp_path):
    """The ratios of two rows, one of them over a limit, computed here by hand."""
    row = speed_row()
    rows = [row, row | {"family": "btt", "auto": "20", "tednet": "", "tltorch": "", "oracle": "20", "factorized": ""}]
    table = speed_tables.speed(rows)
    assert "| cp | 0.50 (0.50) |" in table
    assert "| btt | 2.00 (2.00) |" in table
    assert "0.25 (0.25) | 1.25 (1.25) | 1.25 (1.25) | 0.50 (0.50) | 0.25 (0.25) | 1.40 (1.40)" in table
    assert "1.10 to 1.10" in table
    promises = speed_tables.promises(rows)
    assert (
        "| auto / dense, batch 32 | 1.00 | 1.1 | 1 of 2 | 2.00: btt rank 0.1, 64-64, 32x32, batch 32, train |"
        in promises
    )
    assert "| auto / tensorly-torch: CP, Tucker, TT chain | 1.25 (wanted 0.9) | 1.0 | 0 of 1 |" in promises
    assert "0.10 (wanted 0.6" in promises
    compiled = [row | {f"compiled_{name}": "" for name in ("dense", "auto", "tednet")} | {"compiled_tltorch": "3"}]
    assert "| cp | train | 10.0 |  | 5.0 |  | 20.0 |  | 4.0 | 3.0 |" in speed_tables.compiled(compiled)


def test_the_table_of_kinds_of_layers():
    """The ratios of made-up rows, computed here by hand. Older rows, without a kind, are of images."""
    row, other = speed_row(), speed_row() | {"kind": "linear", "batch": "512", "tednet": "", "dense": "20"}
    rows = [
        other,
        other | {"auto": "20", "mode": "infer"},
        other | {"auto": "10", "mode": "frozen"},
        other | {"batch": "32", "auto": "40"},
        row | {"kind": "audio", "auto": "2", "tltorch": ""},
        row | {"kind": "audio", "auto": "8", "tltorch": ""},
        row,
    ]
    table = speed_tables.speed_kinds(rows).splitlines()
    assert table[2:6] == [
        "| linear, from 512 inputs | cp | 3 | 0.25 (0.25) | 1.00 (1.00) | 0.50 (0.50) | 2.50 (5.00) |  | 2.50 (5.00) |",
        "| linear, below 512 inputs | cp | 1 | 2.00 (2.00) |  |  | 10.00 (10.00) |  | 10.00 (10.00) |",
        "| audio | cp | 2 | 0.40 (0.80) |  |  | 1.00 (2.00) | 0.20 (0.40) |  |",
        "| image | cp | 1 | 0.50 (0.50) |  |  | 1.25 (1.25) | 0.25 (0.25) | 1.25 (1.25) |",
    ]
    assert table[7].startswith("7 rows. The same dense layer against itself: 0.55 to 1.10. m; torch t;")
    # The tables of images leave out what is of another kind.
    for formatter in (speed_tables.speed, speed_tables.promises):
        assert formatter([*rows, row]) == formatter([row, row])
