import base64
import itertools
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from report_parts import PARAMETERS, metric_lines
from stableopd.config import RepetitionConfig
from stableopd.report import figures
from stableopd.report.panels import (
    Mark,
    blank_panel,
    credit_panels,
    draw_panel,
    dynamics_panels,
    logprob_panels,
    panel_figure,
    svg_data_uri,
)
from stableopd.report.series import band_name, read_series, thin
from stableopd.report.themes import DARK, LIGHT, choose_colors

REPETITION = RepetitionConfig(window_chars=1234, ratio=4.5, ngram=6, min_run=16)
TWO = {"opd": metric_lines(True), "stable_opd": metric_lines(False)}


def texts(figure):
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    return titles + [text.get_text() for ax in figure.axes for text in ax.texts]


def lines_of(ax):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


def all_figures(runs, theme=LIGHT):
    """Of arms with one seed each."""
    arms = {name: [lines] for name, lines in runs.items()}
    return [
        figures.dynamics_figure(arms, REPETITION, theme),
        figures.logprob_figure(arms, theme),
        figures.credit_figure(arms, REPETITION, theme),
        figures.comparison_figure(arms, REPETITION, theme),
    ]


def drawn(panel, arms, mark=None):
    """The axes of a panel, to look at what was drawn."""
    return panel_figure(panel, arms, choose_colors(list(arms)), LIGHT, mark).axes[0]


def test_figures_name_the_parameters():
    dynamics, _, credit, comparison = all_figures(TWO)
    assert "RepRate (L = 1,234 characters, τ = 4.5)" in texts(dynamics)
    assert "RepRate (L = 1,234 characters, τ = 4.5)" in texts(comparison)
    assert "Repetitive tokens (n = 6, min_run = 16)" in texts(credit)


def test_figures_draw_the_numbers():
    dynamics, logprob, credit, comparison = all_figures(TWO)
    length, truncation, _, accuracy = dynamics.axes
    steps = list(range(1, 13))
    assert lines_of(length)[0] == (steps, pytest.approx([40.0 + 70 * s / 12 for s in steps]))
    assert len(length.lines) == 2
    assert lines_of(truncation)[2] == ([0, 4, 8, 12], [0.125, 0.1, 0.1, 0.1])
    assert lines_of(accuracy)[1] == ([0, 4, 8, 12], [0.06 + 0.01 * s for s in (0, 4, 8, 12)])
    assert [len(ax.lines) for ax in logprob.axes] == [4, 2]
    assert [len(ax.lines) for ax in credit.axes] == [4, 2]
    assert math.isnan(lines_of(credit.axes[0])[2][1][0])
    assert len(comparison.axes) == 6


def test_accuracy_of_rollouts_is_drawn_where_nothing_was_evaluated():
    lines = [{"step": s, "rollout/accuracy": 0.1 * s} for s in range(4)]
    figure = figures.dynamics_figure({"x": [lines]}, REPETITION)
    assert "Accuracy (rollouts)" in texts(figure)
    assert len(figure.axes[3].lines) == 1
    assert texts(figure).count("not measured") == 3


@pytest.mark.parametrize(
    ("accuracies", "top"),
    [([0.0, 0.004], 0.25), ([0.0, 0.0], 0.25), ([0.1, 0.6], 0.62), ([0.2, 1.0], 1.03)],
)
def test_a_small_accuracy_looks_small(accuracies, top):
    lines = [{"step": s, "eval/accuracy": a} for s, a in enumerate(accuracies)]
    panel = dynamics_panels({"x": [lines]}, PARAMETERS)[3]
    low, high = drawn(panel, {"x": [lines]}).get_ylim()
    assert high == pytest.approx(top, abs=0.01)
    assert -0.01 <= low <= 0


def test_a_band_that_is_far_wider_than_the_lines_is_cut():
    """At step 1 two seeds are 6 nats apart, which makes the t interval 76 nats wide."""
    seeds = [
        [{"step": s, "advantage/mean": -0.1 * s + sign * (3.0 if s == 1 else 0.01)}
         for s in range(10)]
        for sign in (-1, 1)
    ]  # fmt: skip
    (panel,) = (p for p in logprob_panels() if p.title == "Mean advantage")
    # The line goes from 0 to -0.9, with half of that as room on both sides.
    assert drawn(panel, {"x": seeds}).get_ylim() == pytest.approx((-1.35, 0.45))
    # Bands of the lines' own size are left alone.
    near = [[{"step": s, "advantage/mean": -0.1 * s + 0.01 * k} for s in range(10)] for k in (0, 1)]
    low, high = drawn(panel, {"x": near}).get_ylim()
    assert low < -0.93
    assert high > 0.03


@pytest.mark.parametrize(
    "runs",
    [
        {"empty": []},
        {"one": [{"step": 3, "rollout/mean_length": 5.0}]},
        {"nan": [{"step": s, "advantage/mean": math.nan} for s in range(3)]},
        {"null": [{"step": s, "eval/accuracy": None} for s in range(3)], "good": TWO["opd"]},
    ],
)
def test_figures_of_missing_numbers(runs, tmp_path):
    for figure in all_figures(runs):
        figures.save_png(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_run_has_one_colour_everywhere():
    alone = figures.dynamics_figure({"opd": [TWO["opd"]]}, REPETITION)
    for figure in [alone, *all_figures(TWO)]:
        assert figure.axes[0].lines[0].get_color() == LIGHT.arms[0]
    for figure in all_figures(TWO, DARK):
        assert DARK.arms[1] in [line.get_color() for line in figure.axes[0].lines]


def test_methods_have_colours_of_their_own():
    assert choose_colors(["opd", "StableOPD", "sft"]) == {"opd": 0, "StableOPD": 1, "sft": 2}
    assert choose_colors(["stable_opd, lambda_gold = 0.1"])["stable_opd, lambda_gold = 0.1"] == 1
    assert choose_colors(["opd-1", "stable_opd-1"]) == {"opd-1": 0, "stable_opd-1": 1}
    assert choose_colors(["lonely"]) == {"lonely": 1}
    mixed = choose_colors(["a", "b", "OPD", "opd, steps = 50"])
    assert mixed["OPD"] == 0
    assert len(set(mixed.values())) == 4
    assert len(choose_colors([f"arm {i}" for i in range(9)])) == 9


def test_many_runs_can_be_drawn():
    arms = {f"arm {i}": [TWO["opd"]] for i in range(9)}
    assert len(figures.dynamics_figure(arms, REPETITION).axes[0].lines) == 9


def test_seeds_of_an_arm_are_one_line_and_a_band():
    higher = [
        {**line, "rollout/mean_length": 60.0} if line["step"] else line for line in TWO["opd"]
    ]
    length = figures.dynamics_figure({"opd": [TWO["opd"], higher]}, REPETITION).axes[0]
    steps = list(range(1, 13))
    means = [(40.0 + 70 * s / 12 + 60.0) / 2 for s in steps]
    assert lines_of(length) == [(steps, pytest.approx(means))]
    assert len(length.collections) == 1


def test_the_onset_is_marked():
    arms = {"opd": [TWO["opd"]]}
    panel = dynamics_panels(arms, PARAMETERS)[1]
    plain, marked = drawn(panel, arms), drawn(panel, arms, Mark(5, (4, 7)))
    assert lines_of(marked)[: len(plain.lines)] == lines_of(plain)
    assert lines_of(marked)[-1] == ([5, 5], [0, 1])
    (band,) = marked.patches
    assert band.get_bbox().x0 == 4
    assert band.get_bbox().x1 == 7
    assert not plain.patches
    assert not drawn(panel, arms, Mark(5, (5, 5))).patches
    nothing = drawn(panel, {"x": []}, Mark(5, (4, 7)))
    assert not nothing.lines
    assert [text.get_text() for text in nothing.texts] == ["not measured"]


def test_lengths_have_the_unit_of_the_dump():
    assert dynamics_panels({}, PARAMETERS, "characters")[0].unit == "characters"
    words = credit_panels(PARAMETERS)[1]
    assert words.unit == "share of tokens"


def test_seeds_are_a_mean_with_a_band():
    seeds = [[{"step": s, "x": 10.0 * k + s} for s in (1, 2, 3)] for k in (0, 1, 5)]
    series = read_series(seeds, "x")
    assert series is not None
    assert list(series.steps) == [1, 2, 3]
    assert list(series.mean) == [21, 22, 23]
    assert list(series.low) == [1, 2, 3]
    assert list(series.high) == [51, 52, 53]
    assert band_name(3) == "smallest to largest seed"


def test_five_seeds_have_an_interval_of_the_mean():
    values = [0.1, 0.2, 0.4, 0.5, 0.9]
    series = read_series([[{"step": 7, "x": v}] for v in values], "x")
    assert series is not None
    # Mean .42, standard deviation .3114, t(.975, 4) = 2.776.
    assert series.mean[0] == pytest.approx(0.42)
    assert series.high[0] - 0.42 == pytest.approx(2.776 * 0.31145 / math.sqrt(5), rel=1e-3)
    assert 0.42 - series.low[0] == pytest.approx(series.high[0] - 0.42)
    assert band_name(5) == "95% interval of the mean"
    assert band_name(1) == ""


@pytest.mark.parametrize("num_seeds", [3, 6])
def test_seeds_that_stop_early_or_have_no_number(num_seeds):
    seeds = [[{"step": s, "x": 1.0 * s} for s in range(4)] for _ in range(num_seeds - 1)]
    seeds[0] = [{"step": 0, "x": 3.0}, {"step": 1, "x": None}]
    seeds.append([{"step": 0, "y": 1.0}])
    series = read_series(seeds, "x")
    assert series is not None
    assert series.num_seeds == num_seeds - 1
    assert list(series.mean[1:]) == [1, 2, 3]
    assert series.mean[0] == pytest.approx(3 / (num_seeds - 1))
    assert list(series.low[1:]) == list(series.high[1:]) == [1, 2, 3]
    nothing = read_series([[{"step": 0, "x": None}], [{"x": 1.0}], []], "x")
    assert nothing is None


def test_a_step_without_a_number_is_a_gap():
    series = read_series([[{"step": 0, "x": 1.0}, {"step": 1, "x": math.inf}]], "x")
    assert series is not None
    assert np.isnan(series.mean[1])
    assert np.isnan(series.low[1])


def test_a_band_is_drawn_for_seeds_alone():
    panel = logprob_panels()[1]
    shifted = [
        {"step": line["step"], "advantage/mean": line["advantage/mean"] - 1}
        for line in TWO["opd"]
        if "advantage/mean" in line
    ]
    assert not drawn(panel, {"opd": [TWO["opd"]]}).collections
    ax = drawn(panel, {"opd": [TWO["opd"], shifted]})
    assert len(ax.collections) == 1
    assert ax.collections[0].get_paths()[0].get_extents().height == pytest.approx(1.275, abs=1e-6)


def test_long_lines_are_thinned_and_keep_their_extremes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[12_345], values[40_001] = 99.0, -99.0
    other = np.full(50_000, math.nan)
    kept = thin((values, other), 1000)
    assert len(kept) <= 1002
    assert {0, 12_345, 40_001, 49_999} <= set(kept)
    assert (np.diff(kept) > 0).all()
    assert list(thin((values[:1000],), 1000)) == list(range(1000))


def test_labels_of_axes_fit_their_figure():
    figure, ax = blank_panel(LIGHT, "step")
    arms = {"x": [[{"step": s, "rollout/mean_length": 16_384.0 * s} for s in range(3)]]}
    draw_panel(ax, dynamics_panels(arms, PARAMETERS)[0], arms, {"x": 1}, LIGHT)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert min(box.x0 for box in boxes) > 0


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out_from_the_page(theme):
    page = luminance(theme.page)
    for color in (*theme.arms, theme.ink):
        high, low = sorted((luminance(color), page), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, color
    assert all(a != b for a, b in itertools.combinations(theme.arms, 2))


def test_png_is_on_white_and_has_ink(tmp_path):
    figures.save_png(all_figures(TWO)[0], tmp_path / "figure.png", dpi=50)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (420, 270)
        pixels = image.convert("RGBA")
        assert pixels.getpixel((0, 0)) == (255, 255, 255, 255)
        assert pixels.convert("L").getextrema()[0] < 64


def test_svg_is_well_formed_small_and_the_same_each_time():
    arms = {"opd": [TWO["opd"]]}
    panel = dynamics_panels(arms, PARAMETERS)[1]
    first, second = (
        svg_data_uri(panel_figure(panel, arms, {"opd": 0}, LIGHT, Mark(5, (4, 7))))
        for _ in range(2)
    )
    assert first == second
    svg = base64.b64decode(first.removeprefix("data:image/svg+xml;base64,"))
    assert len(svg) < 20_000
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    # Text stays text: no outlines of letters in the file.
    words = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"step", "0.2", "1.0"} <= words


def test_report_loads_no_torch():
    code = (
        "import sys, stableopd.report.page, stableopd.report.compare;"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
