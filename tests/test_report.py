import base64
import html.parser
import itertools
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from stableopd.config import RepetitionConfig
from stableopd.report import figures
from stableopd.report.figures import DARK, LIGHT
from stableopd.report.page import write_page
from stableopd.runfolder import RunFolder
from stableopd.types import RunFolderError

REPETITION = RepetitionConfig(window_chars=1234, ratio=4.5, ngram=6, min_run=16)
CONFIG = """[run]
output = "runs/<x>"

[repetition]
window_chars = 1234
ratio = 4.5
ngram = 6
min_run = 16
"""


def metric_lines(collapses, steps=12):
    lines = [{"step": 0, "eval/accuracy": 0.06, "eval/truncation_rate": 0.125}]
    for step in range(1, steps + 1):
        bad = step / steps if collapses else 0.05
        line = {
            "step": step,
            "rollout/mean_length": 40.0 + 70 * bad,
            "rollout/truncation_rate": 0.15 + 0.8 * bad,
            "rollout/repetition_rate": 0.5 * bad,
            "rollout/repetitive_share": 0.6 * bad,
            "rollout/accuracy": 0.1,
            "advantage/mean": -0.4 + 0.3 * bad,
            "advantage/repetitive_mean": math.nan if step < 3 else -0.05,
            "advantage/regular_mean": -0.5,
            "logp/student_mean": -0.9,
            "logp/teacher_mean": -1.3,
            "tokens_per_s": 1500.0,
        }
        if step % 4 == 0:
            line |= {"eval/accuracy": 0.06 + 0.01 * step, "eval/truncation_rate": 0.1}
        lines.append(line)
    return lines


def rollout(name, ids, text, **extra):
    return {
        "step": 12,
        "prompt_id": name,
        "prompt": f"prompt of {name}",
        "completion": text,
        "prompt_ids": [1],
        "completion_ids": ids,
        "stop_reason": "length",
        "student_logprobs": [-0.5] * len(ids),
        "teacher_logprobs": [-0.5] * len(ids),
        **extra,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "opd"
    folder = RunFolder.create(path, CONFIG, {"torch": "2.13.0", "gpu": "<none>"})
    for line in metric_lines(True):
        folder.append_metrics(line)
    folder.write_rollouts(6, [rollout("early", [1] * 99, "an earlier step")])
    folder.write_rollouts(
        12,
        [
            rollout("plain", list(range(200)), "nothing repeats"),
            rollout("long", [7] * 60, "loop & <script>alert('long')</script>", correct=False),
            rollout("longer", [8] * 90, "loop " * 2000, stop_reason="stop", correct=True),
            rollout("some", list(range(50)) + [9] * 30, "a little"),
            rollout("short loop", [3] * 20, "below min_run"),
        ],
    )
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "stable", CONFIG, {})
    for line in metric_lines(False):
        folder.append_metrics(line)
    return folder


@pytest.fixture(scope="module")
def one_page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "one.html"
    return page_of([("opd", run)], path, "One <b>run</b>")


@pytest.fixture(scope="module")
def two_page(run, other, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "two.html"
    return page_of([("opd", run), ("stable_opd", other)], path, "Two runs")


class Page(html.parser.HTMLParser):
    """Collects tags and text, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.texts = [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href", "action")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def page_of(runs, path, title="A title"):
    write_page(runs, path, title)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def images(page):
    return [address for address in page.addresses if address.startswith("data:image/svg+xml")]


def test_page_of_one_run(one_page):
    _, page = one_page
    assert page.texts["h1"] == ["One <b>run</b>"]
    assert page.tags.count("img") == 3
    assert len(images(page)) == 6
    captions = page.texts["figcaption"]
    assert [caption[:9] for caption in captions] == ["Figure 1.", "Figure 2.", "Figure 3."]
    assert "6-gram" in captions[2]
    assert CONFIG in page.texts["pre"]
    assert any('"gpu": "<none>"' in text for text in page.texts["pre"])


def test_page_of_two_runs(two_page):
    _, page = two_page
    assert page.tags.count("img") == 7
    assert page.texts["figcaption"][0].startswith("Figure 4.")
    assert page.texts["h2"] == ["opd", "stable_opd"]
    assert page.texts["p"] == ["No rollouts were kept."]


def test_headline_has_the_first_and_last_value_of_each_run(two_page):
    _, page = two_page
    cells = [c.strip() for c in page.texts["td"]]
    starts = page.texts["span"]
    place = cells.index("Accuracy, held-out")
    assert cells[place + 1 : place + 3] == ["0.180", "0.180"]
    assert starts[:2] == ["0.060 →", "0.060 →"]
    place = cells.index("Length, rollouts (tokens)")
    assert cells[place + 1 : place + 3] == ["110.0", "43.5"]
    assert [starts[10], starts[11]] == ["45.8 →", "43.5 →"]


def test_page_needs_no_network_and_no_script(two_page):
    text, page = two_page
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text)


def test_rollouts_stay_text(one_page):
    text, page = one_page
    assert "<script" not in text
    assert "loop & <script>alert('long')</script>" in page.texts["pre"]


def test_worst_rollouts_are_the_most_repetitive_of_the_last_step(one_page):
    text, page = one_page
    # n = 6: the first 6 of a run of one token are new, and "short loop" is below min_run.
    assert page.texts["summary"][:3] == [
        "84 of 90 tokens repetitive, stopped, correct",
        "54 of 60 tokens repetitive, cut off by the budget, wrong",
        "24 of 80 tokens repetitive, cut off by the budget, not graded",
    ]
    assert "an earlier step" not in text
    assert "7,000 characters left out" in text


def test_chat_prompts_are_readable(tmp_path):
    run = RunFolder.create(tmp_path / "run", CONFIG, {})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2?"}]
    run.write_rollouts(13, [rollout("chat", [1, 2], "yes", prompt=chat)])
    _, page = page_of([("opd", run)], tmp_path / "report.html")
    assert "system: Be brief.\nuser: 1 < 2?" in page.texts["pre"]


def test_page_of_a_run_without_a_step(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", {})
    _, page = page_of([("new", folder)], tmp_path / "report.html")
    assert "No step has been recorded yet." in page.texts["p"]
    assert "table" not in page.tags
    assert len(images(page)) == 6


def test_page_of_numbers_that_are_all_missing(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", {})
    folder.append_metrics({"step": 1, "rollout/mean_length": math.nan})
    folder.append_metrics({"step": 2, "eval/accuracy": None})
    _, page = page_of([("x", folder)], tmp_path / "report.html")
    assert "No step has been recorded yet." in page.texts["p"]


def test_runs_with_other_parameters_are_named(tmp_path, two_page):
    first = RunFolder.create(tmp_path / "a", "", {})
    second = RunFolder.create(tmp_path / "b", "[repetition]\nngram = 4\n", {})
    _, page = page_of([("a", first), ("b", second)], tmp_path / "report.html")
    assert any("different parameters" in text for text in page.texts["p"])
    assert "different parameters" not in two_page[0]


def test_page_that_cannot_be_written(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", {})
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_page([("x", folder)], tmp_path / "nowhere" / "report.html", "t")


def texts(figure):
    found = [t.get_text() for ax in figure.axes for t in (*ax.texts, ax.title, ax.yaxis.label)]
    for ax in figure.axes:
        found.append(ax.get_title(loc="left"))
    return found


def lines_of(ax):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


TWO = {"opd": metric_lines(True), "stable_opd": metric_lines(False)}


def all_figures(runs, theme=LIGHT):
    return [
        figures.dynamics_figure(runs, REPETITION, theme),
        figures.logprob_figure(runs, theme),
        figures.credit_figure(runs, REPETITION, theme),
        figures.comparison_figure(runs, REPETITION, theme),
    ]


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
    figure = figures.dynamics_figure({"x": lines}, REPETITION)
    assert "Accuracy (rollouts)" in texts(figure)
    assert len(figure.axes[3].lines) == 1
    assert texts(figure).count("not measured") == 3


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
    alone = figures.dynamics_figure({"opd": TWO["opd"]}, REPETITION)
    for figure in [alone, *all_figures(TWO)]:
        assert figure.axes[0].lines[0].get_color() == LIGHT.arms[0]
    for figure in all_figures(TWO, DARK):
        assert DARK.arms[1] in [line.get_color() for line in figure.axes[0].lines]
    named = {"a": TWO["opd"], "b": TWO["opd"], "StableOPD": TWO["opd"]}
    whole = figures.dynamics_figure(named, REPETITION).axes[0].lines
    assert len({line.get_color() for line in whole}) == 3
    part = figures.logprob_figure({"b": TWO["opd"]}, arms=list(named)).axes[0].lines
    assert part[0].get_color() == whole[1].get_color()


def test_many_runs_can_be_drawn():
    runs = {f"seed {i}": TWO["opd"] for i in range(9)}
    assert len(figures.dynamics_figure(runs, REPETITION).axes[0].lines) == 9


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


def test_svg_is_well_formed_and_the_same_each_time():
    first, second = (figures.svg_data_uri(figures.logprob_figure(TWO)) for _ in range(2))
    assert first == second
    svg = base64.b64decode(first.removeprefix("data:image/svg+xml;base64,"))
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_report_loads_no_torch():
    code = "import sys, stableopd.report.page; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
