"""Pictures show what the files hold, at the width of a page."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from benchmarks.common.rows import RESULTS, read_csv
from benchmarks.report import pictures
from benchmarks.report.drawing import COLOURS, WIDTH

ROOT = Path(__file__).parents[3]


def heights(axes):
    return [float(text.get_fontsize()) for text in [axes.title, axes.xaxis.label, axes.yaxis.label]]


def run(arm, family, accuracy):
    return {
        "dataset": "digits", "network": "plain", "family": family, "arm": arm, "lr": "0.1", "seed": "0",
        "diverged": str(not accuracy), "accuracy_heldout": str(accuracy), "accuracy_test": str(accuracy),
        "steps_to": "", "note": "",
    }  # fmt: skip


def test_every_picture_is_on_a_page_of_the_evidence():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "evidence").glob("*.md"))
    written = {path.stem for path in RESULTS.glob("*.png")}
    assert written == {*pictures.PICTURES, "demo"}
    assert all(f"(../../benchmarks/results/{name}.png)" in pages for name in written)
    assert {f"{file}.csv" for file, _ in pictures.PICTURES.values()} <= {path.name for path in RESULTS.glob("*.csv")}


@pytest.mark.parametrize("name", ["compress", "scale", "construct", "tools"])
def test_pictures_are_as_wide_as_a_page_and_have_a_font_to_read(name):
    file, draw = pictures.PICTURES[name]
    figure = draw(read_csv(RESULTS / f"{file}.csv"))
    assert figure.get_size_inches()[0] == WIDTH == 6.4
    assert min(size for axes in figure.axes for size in heights(axes)) >= 9
    assert len({axes.get_position().x0 for axes in figure.axes}) <= 2


def test_a_grid_of_tools_has_a_dot_where_all_kinds_pass():
    rows = [
        {"tool": tool, "layer": f"{form}{kind}", "kind": kind, "result": ""}
        for tool in "ab" for form in ("CP", "TT") for kind in ("Conv2d", "Linear")
    ]  # fmt: skip
    assert (rows[5]["tool"], rows[5]["layer"]) == ("b", "CPLinear")
    rows[5]["result"] = "Error: x"
    axes = pictures.tools(rows).axes[0]
    dots = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines if line.get_marker() == "o"}
    assert dots == {(0, 0), (1, 0), (1, 1)}
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["Linear"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["CP", "TT"]


def test_a_start_that_diverged_does_not_widen_the_panel():
    rows = [run("kaiming", "dense", 0.97), run("default", "cp", 0.96), run("kaiming", "cp", 0)]
    figure = pictures.convergence(rows, "plain")
    assert figure.axes[0].get_xlim()[0] > 90
    assert "every run diverged" in [text.get_text() for text in figure.legends[0].get_texts()]
    figure = pictures.convergence(rows[:2], "plain")
    assert "every run diverged" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_bytes_of_each_process_and_way_are_dots():
    rows = [
        {"conv": conv, "processes": "8", "way": way, "sent": sent}
        for conv, way, sent in (("dense", "copies", "2e8"), ("tr", "copies", "3e7"), ("tr", "shards", "5e7"))
    ]
    (axes,) = pictures.scale(rows).axes
    dots = [(float(line.get_xdata()[0]), line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert dots == [(200, 0), (30, 1), (50, 1)]


def test_the_limit_of_construction_is_that_of_the_file():
    rows = [
        {"family": family, "channels": size, "dense": "2", "default": "10", "over_limit": "0.5"}
        for family in ("cp", "tr") for size in ("64", "128")
    ]  # fmt: skip
    (axes,) = pictures.construct(rows).axes
    lines = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
    assert lines == {"cp": [10, 10], "tr": [10, 10], "nn.Conv2d": [2, 2], "limit": [20, 20]}
    assert to_rgb(axes.lines[1].get_color()) == to_rgb(COLOURS["tr"])
