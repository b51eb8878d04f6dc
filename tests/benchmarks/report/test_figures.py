"""Figures in prose are those of the tables and of the files, and numbers typed by hand are told."""

import pytest

from benchmarks.common.provenance import write_csv
from benchmarks.common.rows import RESULTS
from benchmarks.report import tables
from benchmarks.report.figures import FIGURES, cell, slug
from benchmarks.report.headline import HEADLINE
from benchmarks.report.markdown import ReportError, folded, markdown, split_tables
from benchmarks.report.prose import numbers_by_hand, prose_of
from benchmarks.report.start_tables import drift_gaps

TABLE = markdown(
    ["family", "keep", "/ dense, batch 1", "of dense"],
    [["cp", "0.1", "0.26 (1.03)", "10.5%"], ["cp", "0.25", "0.50 (1.20)", ""], ["tt", "0.1", "-3.1 ± 2.0", "1,200"]],
)


def penalty_rows():
    return [
        {"family": family, "keep": "0.1", "ratio": ratio, "kernel": "1", "kernel_again": "1"}
        for family, ratio in (("cp", "0.5"), ("cp", "2"), ("tucker", "0.25"))
    ]


@pytest.fixture
def report(tmp_path):
    write_csv(tmp_path / "penalty.csv", penalty_rows())
    write_csv(
        tmp_path / "latency.csv", [{"batch": batch, "over_dense": over} for batch, over in ((1, 1.5), (32, 1.25))]
    )
    return tables.Report(tmp_path)


def test_a_title_as_it_stands_in_a_name():
    assert slug("/ dense, training, batch 32") == "dense-training-batch-32"
    assert slug("`scale_residual_`") == "scale_residual_"
    assert slug("tr rank 0.25") == "tr-rank-0.25"


def test_tables_are_split_into_their_cells():
    text = f"before | it\n\n{TABLE}\n\nbetween\n\n{markdown(['a', 'b'], [['', '1']])}\n"
    first, second = split_tables(text)
    assert first[0] == ["family", "keep", "/ dense, batch 1", "of dense"]
    assert first[2] == ["cp", "0.25", "0.50 (1.20)", ""]
    assert second == [["a", "b"], ["", "1"]]
    assert split_tables(folded("Title", TABLE)) == [first]


def test_a_cell_is_found_by_as_many_first_cells_as_tell_its_row():
    assert cell(TABLE, "cp-0.1", "dense-batch-1") == "0.26 (1.03)"
    assert cell(TABLE, "tt", "of-dense") == "1,200"
    for row, column in (("cp", "of-dense"), ("btt", "of-dense"), ("cp-0.25", "of-dense")):
        with pytest.raises(ReportError, match=f"no table has one row '{row}' with a text in the column 'of-dense'"):
            cell(TABLE, row, column)
    with pytest.raises(ReportError, match="no column 'speed', only family, keep, dense-batch-1, of-dense"):
        cell(TABLE, "tt", "speed")


def test_the_first_of_several_tables_with_such_a_row_is_taken():
    wide = markdown(["images", "default"], [["digits", "1 to 2"]])
    each = markdown(["images", "family", "default"], [["digits", "cp", "1"], ["digits", "tt", "2"]])
    assert cell(f"{wide}\n\n{each}", "digits", "default") == "1 to 2"
    assert cell(f"{wide}\n\n{each}", "digits-tt", "default") == "2"


def test_a_figure_is_the_cell_of_its_table_or_one_number_of_it(report):
    assert report.figure("penalty/cp/keep-0.1") == "1.00 (2.00)"
    assert f"| cp | {report.figure('penalty/cp/keep-0.1')} |" in report.table("penalty")
    assert report.figure("penalty/cp/keep-0.1/1") == "1.00"
    assert report.figure("penalty/tucker/keep-0.1/2") == "0.25"
    with pytest.raises(ReportError, match=r"its cell holds 2 numbers: '1\.00 \(2\.00\)'"):
        report.figure("penalty/cp/keep-0.1/3")


def test_a_figure_stands_in_a_line_and_its_neighbours_stay(report):
    before = (
        "It takes <!-- figure: latency/slowest/32 -->old<!-- /figure --> times, or <!-- figure: latency/slowest/1 -->"
    )
    after = report.rewrite(f"{before}<!-- /figure -->.\n", "a.md")
    assert after == (
        "It takes <!-- figure: latency/slowest/32 -->1.25<!-- /figure --> times, or "
        "<!-- figure: latency/slowest/1 -->1.50<!-- /figure -->.\n"
    )
    assert report.rewrite(after, "a.md") == after


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("penalty/btt/keep-0.1", "no table has one row 'btt'"),
        ("penalty/cp", "a name is TABLE/ROW/COLUMN"),
        ("fingers/cp/keep", "there are only digits, "),
        ("speed/max/dense", r"there is no benchmarks/results/speed\.csv"),
        ("latency/slowest", "it does not take these arguments"),
        ("latency/slowest/64", "it does not take these arguments"),
    ],
)
def test_a_figure_that_cannot_be_made_is_told_with_its_page(report, name, why):
    with pytest.raises(ReportError, match=f"^docs/a.md asks for the figure '{name}', but {why}") as caught:
        report.rewrite(f"a <!-- figure: {name} --><!-- /figure -->", "docs/a.md")
    assert "\n" not in str(caught.value)


def test_every_page_is_filled_and_checked_but_generated_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    write_csv(tmp_path / "benchmarks" / "results" / "penalty.csv", penalty_rows())
    text = "# T\n\nIt is <!-- figure: penalty/tucker/keep-0.1/1 -->x<!-- /figure --> times.\n"
    names = ["README.md", "docs/a.md", "docs/evidence/b.md", "docs/_build/c.md", "docs/tutorials/d.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tables.main(["--check"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names[:3]
    assert tables.main([]) == 0
    assert ["-->0.25<!--" in (tmp_path / name).read_text() for name in names] == [True, True, True, False, False]
    assert tables.main(["--check"]) == 0
    (tmp_path / "docs/_build/b.md").write_text("Took 3 ms.\n")  # not a page that is checked for numbers
    assert tables.main(["--check"]) == 0
    (tmp_path / "docs/evidence/b.md").write_text("# T\n\nTook 3 ms.\n")
    capsys.readouterr()
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("docs/evidence/b.md:3: a number with a unit by hand: '3 ms'")
    (tmp_path / "docs/evidence/b.md").write_text("a <!-- figure: penalty/cp --><!-- /figure -->\n")
    with pytest.raises(SystemExit, match=r"error: docs/evidence/b\.md asks for the figure"):
        tables.main([])


@pytest.mark.parametrize(
    "text",
    [
        "It is 10 % less.", "10%", "takes 3.5 ms", "2 s", "1 second", "20 minutes", "2 hours", "1,024 MB", "2 GB",
        "5x smaller", "5 x smaller", "1.3 times", "0.5 points", "3 nats", "4 images per second", "12 to 72 %",
        "between 3\ntimes", "| a | 7 % |", "*10 %*", "2.3\u00d7 faster", "twice as fast", "three times faster",
        "a factor of 2.3", "an accuracy of 0.93",
        "71 of 90 rows", "1.2 percentage points", "1.2 accuracy points", "**74** %", "74&nbsp;%",
        "0.39 of the dense time", "1.5 h", "1.3 MiB", "12 GFLOPs", "12 images/sec", "two thirds of tednet's time",
    ],
)  # fmt: skip
def test_numbers_with_a_unit_are_told(text):
    assert [line for line, _ in numbers_by_hand(f"# Title\n\n{text}\n")] == [3]


@pytest.mark.parametrize(
    "text",
    [
        "3x3 and 16 x 16, 64 channels, rank 8, 1e-5, torch 2.13, ten times", "`10 %`", "``a ` 10 %``", "## 10 % less",
        "[a](10ms.md)", "<!-- 10 % -->", "At 10 %. <!-- setting -->", "```sh\n10 ms\n```", "~~~\n10 ms\n~~~",
        "- a\n\n  ```text\n  10 ms\n  ```", "text\n\n    10 ms\n\n    20 ms\n\ntext", "3 samples", "ResNet-20 x",
        "a factor of 0", "a GPT-2 of 48 layers", "ten times", "64 channels, 3 x 3",
        "<!-- table: a -->\n| 10 % |\n\n10 ms\n<!-- /table -->", "It is <!-- figure: a -->10 %<!-- /figure --> of it.",
    ],
)  # fmt: skip
def test_what_is_no_measured_number_is_not_told(text):
    assert [*numbers_by_hand(f"# Title\n\n{text}\n")] == []


def test_the_text_of_a_program_is_told():
    code = '"""Takes 2 s.\n\nExample:\n    >>> 3\n    3 s\n\nIn 4 s.\n"""\nx = "5 s"\n# In 6 s.\ny = 1  # 7 s\n'
    assert [line for line, _ in numbers_by_hand(prose_of(code))] == [1, 7]
    assert [line for line, _ in numbers_by_hand(prose_of(code, comments=True))] == [1, 7, 10, 11]


def test_a_setting_excuses_its_line_alone():
    text = "At 10 %. <!-- setting -->\nBut 20 %.\n\n```\n1 ms\n```\n\nAnd 30 %.\n"
    assert [line for line, _ in numbers_by_hand(text)] == [2, 8]


@pytest.mark.parametrize("indent", ["", "  ", "- ", "  - "])
def test_a_figure_that_begins_a_line_is_told(indent):
    text = f"It is\n{indent}<!-- figure: a -->1<!-- /figure --> of it.\n"
    assert [*numbers_by_hand(text)] == [(2, "a figure's marker begins the line; put a word before it")]


def test_the_headline_is_made_of_figures():
    names = []
    table = tables.headline(lambda name: names.append(name) or f"<{len(names)}>")
    assert table.count("\n") == len(HEADLINE) + 1
    assert 6 <= len(HEADLINE) <= 9
    assert all(f"<{number + 1}>" in table for number in range(len(names)))
    assert "{" not in table
    assert "](docs/evidence/speed.md)" in table


def test_functions_of_speed():
    row = {"family": "cp", "batch": "1", "mode": "infer", "dense": "10", "auto": "5", "auto_again": "4", "oracle": "",
           "reconstruct": "", "factorized": "", "tednet": "", "tltorch": "", "dense_peak": "8",
           "auto_peak": "2"}  # fmt: skip
    rows = [row, row | {"family": "btt", "auto": "30", "tednet": "20"}, row | {"auto": "12", "batch": "32"}]
    assert FIGURES["speed/max"](rows, "dense") == "3.00"
    assert FIGURES["speed/max"](rows, "dense", "family=cp") == "1.20"
    assert FIGURES["speed/range"](rows, "dense", "family=cp") == "0.50 to 1.20"
    assert FIGURES["speed/range"](rows, "dense", "family=cp,batch=1") == "0.50"
    assert FIGURES["speed/above"](rows, "1.2", "dense") == "1 of 3"
    assert FIGURES["speed/max"](rows, "tednet") == "1.50"
    assert FIGURES["speed/max"](rows, "own", "batch=32") == "3.00"
    assert FIGURES["speed/max"](rows, "dense_peak") == "0.25"
    assert FIGURES["speed/largest"](rows, "auto") == "30.0"


def run(family, arm, lr, seed, test, steps_to="", network="plain"):
    return {
        "dataset": "digits", "network": network, "family": family, "arm": arm, "lr": lr, "seed": str(seed),
        "diverged": "False", "accuracy_heldout": str(test), "accuracy_test": str(test), "steps_to": steps_to,
        "steps": "100", "note": "",
    }  # fmt: skip


def test_functions_of_convergence():
    rows = [
        run("dense", "kaiming", "0.1", 0, 0.8),
        run("cp", "default", "0.1", 0, 0.6),
        run("cp", "paper", "0.1", 0, 0.7),
    ]
    rows += [
        run("tt", "default", "0.1", 0, 0.4),
        run("tt", "default", "0.3", 0, 0.2),
        run("tt", "paper", "0.1", 0, 0.3),
    ]
    assert FIGURES["convergence/share"](rows, "digits", "plain", "default") == "50.0 to 75.0 %"
    assert FIGURES["convergence/share"](rows, "digits", "plain", "default", "tt") == "50.0 %"
    assert FIGURES["convergence/ahead"](rows, "digits", "plain", "paper") == "1 of 2"
    assert FIGURES["convergence/ahead"](rows, "all", "plain", "paper") == "1 of 2"
    assert FIGURES["convergence/ahead-by"](rows, "digits", "plain", "paper") == "10.0"
    assert FIGURES["convergence/seeds"](rows, "digits", "plain", "default") == "40 to 60 %"


def test_functions_of_steps():
    """Rate 0.1 is best on held-out images; at 0.3 the default is faster. `never` counts one step more than it ran."""
    rows = []
    for family, ours, theirs in (("cp", "20", "30"), ("tt", "40", "30"), ("tr", "", "99")):
        rows += [
            run(family, "default", "0.1", 0, 0.9, ours, "resnet"),
            run(family, "default", "0.3", 0, 0.5, "25", "resnet"),
        ]
        rows += [run(family, "equal split", "0.1", 0, 0.9, theirs, "resnet")]
        rows += [run(family, "equal split", "0.3", 0, 0.5, "", "resnet")]
    assert FIGURES["convergence/steps-level"](rows, "equal-split") == "1 of 3"
    assert FIGURES["convergence/steps-level"](rows, "equal-split", "fastest") == "3 of 3"
    assert FIGURES["convergence/fewest"](rows, "digits") == "1 of 3"
    assert FIGURES["convergence/fewest"](rows, "digits", "fastest") == "3 of 3"


def test_functions_of_depth():
    row = {
        "border": "zeros",
        "depth": "50",
        "layer": "50",
        "forward": "-2",
        "backward": "",
        "network": "dense",
        "init": "default",
    }
    rows = [
        row | {"network": network, "init": init, "layer": layer, "forward": forward, "backward": backward}
        for network, init, forward, backward in (
            ("dense", "default", "-2", "-1"), ("TT r8", "default", "-4.5", "-1.5"), ("TT r8", "paper", "-3", ""),
        )
        for layer in ("1", "50")
    ]  # fmt: skip
    assert drift_gaps(rows, "default") == {("TT r8", "50", "forward"): 2.5, ("TT r8", "50", "backward"): 0.5}
    assert FIGURES["depth/nearer"](rows, "default", "paper") == "1 of 2"
    assert FIGURES["depth/per-layer"](rows, "tt-r8") == "0.05"


def test_functions_of_trained_networks():
    rows = [{"split": "test", "keep": "0.5", "format": one, "drop": drop, "accuracy_dense": "0.9"}
            for one, drop in (("cp", "1.5"), ("tr", "1.25"), ("btt", "6"))]  # fmt: skip
    assert FIGURES["compress/lost"](rows, "0.5", "cp+tr") == "1.25 to 1.50"
    assert FIGURES["compress/dense"](rows) == "90.00%"
    cost = [{"rank": rank, "precision": "bf16", "conv": conv, "over_dense": over}
            for rank, conv, over in (("", "dense", "0.5"), ("0.1", "cp", "1.1"), ("0.1", "tr", "0.9"))]  # fmt: skip
    assert FIGURES["throughput/slowest"](cost, "bf16") == "0.90"
    assert FIGURES["throughput/slowest"](cost, "bf16", "cp") == "1.10"
    runs = ("dense", "1.0", "0.9"), ("dense", "1.0", "0.92"), ("tr", "5.0", "0.885"), ("tt", "5.0", "")
    whole = [
        {
            "model": "resnet20",
            "conv": conv,
            "ratio": ratio,
            "epochs": "30",
            "split": "test",
            "parameters": "",
            "accuracy": accuracy,
        }
        for conv, ratio, accuracy in runs
    ]
    assert FIGURES["results/behind"](whole, "resnet20", "tr", "5") == "2.50"
    with pytest.raises(ReportError, match=r"holds rows of several recipes \(epochs is 30, 200\)"):
        FIGURES["results/behind"]([*whole, whole[0] | {"epochs": "200"}], "resnet20", "tr", "5")
    with pytest.raises(ReportError, match="holds accuracies on validation images"):
        FIGURES["results/behind"]([row | {"split": "validation"} for row in whole], "resnet20", "tr", "5")
    sent = [
        {"conv": conv, "processes": "8", "way": "copies", "sent": sent} for conv, sent in (("dense", "60"), ("tr", "8"))
    ]
    assert FIGURES["scale/times-fewer"](sent, "tr", "8", "copies", "sent") == "7.5"
    tried = [{"tool": tool, "result": result} for tool, result in (("a", ""), ("a", "Error: x"), ("b", ""))]
    assert FIGURES["tools/passed"](tried) == "2 of 3"
    assert FIGURES["tools/tools"](tried) == "2"


def test_columns_of_a_table_have_different_titles():
    """A figure names its column, so a title must not be there twice."""
    report = tables.Report(RESULTS)
    for name in tables.FORMATTERS:
        for header, *_ in split_tables(report.table(name)):
            titles = [slug(title) for title in header]
            assert len(set(titles)) == len(titles), name
