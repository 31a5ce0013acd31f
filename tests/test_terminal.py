import io
import math
import re

import pytest
from rich.console import Console

from stableopd.terminal import BLOCKS, LiveView, table


def console(width=120, terminal=False, **options):
    return Console(
        file=io.StringIO(),
        width=width,
        height=40,
        force_terminal=terminal,
        color_system=None,
        _environ={"TERM": "xterm"},
        **options,
    )


def output(made):
    return made.file.getvalue()


def render(arms, lines, width, num_steps=10):
    """Print one frame of the view without a live display, and return its lines."""
    plain = console(width)
    view = LiveView("demo", num_steps, arms, console=plain, clock=lambda: 0.0)
    for arm, line in lines:
        view.update(arm, line)
    plain.file = io.StringIO()
    plain.print(view._render())
    return output(plain).splitlines()


LINE = {
    "step": 5,
    "rollout/mean_length": 84.06,
    "rollout/truncation_rate": 0.141,
    "rollout/repetition_rate": 0.02,
    "rollout/accuracy": 0.31,
    "tokens_per_s": 1234.0,
}


def test_plain_line_can_be_grepped():
    times = iter(range(0, 1000, 3))
    made = console(width=40)
    with LiveView("demo", 200, ["x"], console=made, clock=lambda: float(next(times))) as view:
        view.update("x", {**LINE, "step": 0})
        for step in range(1, 13):
            view.update("x", {**LINE, "step": step, "eval/truncation_rate": 0.2})
    lines = output(made).splitlines()
    assert lines[0] == "demo"
    assert len(lines) == 14
    expected = (
        r"step 12/200  length 84\.1  truncation 0\.14  repetition 0\.02  accuracy 0\.31  "
        r"1\.2k tok/s  ETA \d+:\d\d"
    )
    assert re.fullmatch(expected, lines[-1])
    assert "\x1b" not in output(made)


def test_plain_lines_come_with_evaluations_time_and_the_end():
    now = [0.0]
    made = console()
    with LiveView("demo", 40, ["x"], console=made, clock=lambda: now[0]) as view:
        for step in range(41):
            now[0] = float(step)
            extra = {"eval/accuracy": 0.5} if step == 17 else {}
            view.update("x", {**LINE, "step": step, **extra})
    steps = [int(found) for found in re.findall(r"step (\d+)/40", output(made))]
    assert steps == [0, 10, 17, 27, 37, 40]


def test_eta_follows_the_recent_speed():
    now = [0.0]
    made = console()
    with LiveView("demo", 100, ["x"], console=made, clock=lambda: now[0]) as view:
        for step in range(61):
            now[0] += 100.0 if step < 30 else 2.0
            view.update("x", {**LINE, "step": step})
        view.update("x", {**LINE, "step": 61, "eval/accuracy": 0.1})
    # The last twenty steps took two seconds each, 39 are left; the last one took none.
    assert "ETA 1:14" in output(made).splitlines()[-1]


def test_eta_of_hours_and_of_the_end():
    now = [0.0]
    made = console()
    with LiveView("demo", 11, ["x"], console=made, clock=lambda: now[0]) as view:
        for step in (0, 1, 11):
            view.update("x", {**LINE, "step": step})
            now[0] += 400.0
    lines = output(made).splitlines()
    assert lines[1].endswith("ETA -")
    assert lines[2].endswith("ETA 1:06:40")
    assert lines[3].endswith("ETA 0:00")


def test_missing_numbers_are_dashes():
    made = console()
    with LiveView("demo", 200, ["x"], console=made) as view:
        view.update("x", {"step": 0, "tokens_per_s": None, "rollout/mean_length": math.nan})
    assert output(made).splitlines()[-1] == (
        "step 0/200  length -  truncation -  repetition -  accuracy -  - tok/s  ETA -"
    )


def test_accuracy_of_evaluations_is_not_mixed_with_that_of_rollouts():
    made = console()
    with LiveView("demo", 9, ["x"], console=made, clock=lambda: 0.0) as view:
        view.update("x", {"step": 0, "eval/accuracy": 0.7})
        view.update("x", {**LINE, "step": 9})
    assert "accuracy 0.70" in output(made).splitlines()[-1]


def test_arms_are_named_where_there_are_two():
    made = console()
    with LiveView("demo", 1, ["opd", "stable_opd"], console=made) as view:
        view.update("opd", {"step": 0})
        view.update("stable_opd", {"step": 0})
        view.message("text with [bold]brackets[/bold] and [/nothing]")
    lines = output(made).splitlines()
    assert lines[1].startswith("opd  step 0/1")
    assert lines[2].startswith("stable_opd  step 0/1")
    assert lines[3] == "text with [bold]brackets[/bold] and [/nothing]"


def test_dumb_terminal_gets_plain_lines():
    made = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with LiveView("demo", 1, ["x"], console=made) as view:
        view.update("x", {**LINE, "step": 0})
    assert "step 0/1  length 84.1" in output(made)
    assert "╭" not in output(made)


@pytest.mark.parametrize(("width", "side_by_side"), [(60, False), (87, False), (88, True)])
def test_two_panels_fit_the_width(width, side_by_side):
    lines = render(["opd", "stable_opd"], [("opd", LINE), ("stable_opd", LINE)], width)
    assert all(len(line) <= width for line in lines)
    assert (sum("truncation" in line for line in lines) == 1) == side_by_side
    assert "\n".join(lines).count("84.1") == 2
    assert "\n".join(lines).count("1.2k tok/s") == 2
    assert "…" not in "\n".join(lines)


@pytest.mark.parametrize("width", [20, 30, 44])
def test_narrow_terminals_do_not_break_lines(width):
    lines = render(["a"], [("a", LINE)], width)
    assert all(len(line) <= width for line in lines)
    assert len(lines) == 8  # the title, two borders, five rows


def row(lines, name):
    return next(line for line in lines if name in line)


def blocks(line):
    return "".join(c for c in line if c in BLOCKS)


def test_sparklines_have_a_fixed_scale_and_follow_the_bar():
    lines = [
        ("a", {"step": s, "rollout/truncation_rate": r, "rollout/mean_length": 10.0 * s})
        for s, r in [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (5, 0.5)]
    ]
    found = render(["a"], lines, 80)
    truncation, length = blocks(row(found, "truncation")), blocks(row(found, "length"))
    assert truncation[0] == "▁"
    assert "█" in truncation
    assert truncation[-1] in "▄▅"
    assert length[-1] == "█"
    assert len(truncation) == len(length)
    assert blocks(row(found, "accuracy")) == ""
    high = render(["a"], [("a", {"step": 10, "rollout/repetition_rate": 0.02})], 80)
    assert set(blocks(row(high, "repetition"))) == {"▁"}


def test_arms_share_the_scale_of_length():
    lines = [
        ("a", {"step": 10, "rollout/mean_length": 10.0}),
        ("b", {"step": 10, "rollout/mean_length": 100.0}),
    ]
    found = render(["a", "b"], lines, 60)
    short, long = (blocks(line) for line in found if "length" in line)
    assert set(short) <= {"▁", "▂"}
    assert set(long) == {"█"}


def test_a_long_history_is_averaged_into_the_width():
    lines = [("a", {"step": s, "rollout/truncation_rate": float(s > 500)}) for s in range(1, 1001)]
    found = blocks(row(render(["a"], lines, 60, num_steps=1000), "truncation"))
    half = len(found) // 2
    assert set(found[: half - 1]) == {"▁"}
    assert set(found[half + 1 :]) == {"█"}


def test_ascii_terminals_get_ascii():
    made = console(80)
    view = LiveView("demo", 10, ["a"], console=made)
    view.update("a", LINE)
    ascii_options = made.options.update(width=80)
    ascii_options.encoding = "ascii"
    text = "".join(
        segment.text for segment in made.render(view._render(), ascii_options) if segment.text
    )
    assert not set(text) & set(BLOCKS)


@pytest.mark.parametrize("width", [60, 120])
def test_live_view_on_a_terminal(width):
    made = console(width, terminal=True)
    with LiveView("demo [x]", 10, ["opd", "stable_opd"], console=made) as view:
        view.update("opd", LINE)
        view.message("watch [red]this[/red]")
        view.update("stable_opd", {**LINE, "step": 10})
    text = output(made)
    assert "watch [red]this[/red]" in text
    assert "demo [x]" in text
    assert "step 10/10" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_live_view_gives_the_terminal_back_after_an_error():
    made = console(terminal=True)
    view = LiveView("demo", 10, ["a"], console=made)
    with pytest.raises(KeyboardInterrupt), view:
        raise KeyboardInterrupt
    assert output(made).rstrip().endswith("\x1b[?25h")


def test_lines_of_a_cell_stay_lines_and_nothing_else_moves_the_cursor():
    made = Console(width=60, file=io.StringIO())
    made.print(table(["arm"], [["first\nFix: \x1b[2Jsecond"]], ""))
    lines = made.file.getvalue().splitlines()
    assert any(line.strip("│ ") == "first" for line in lines)
    assert any(line.strip("│ ") == r"Fix: \x1b[2Jsecond" for line in lines)


def test_table_of_text_and_numbers():
    made = console(80)
    rows = [["opd", 0.01, 12, "[red]x[/red]"], ["stable_opd", math.nan, None, "ok"]]
    made.print(table(["arm", "accuracy", "steps", "note"], rows, "Result [y]"))
    text = output(made)
    assert "Result [y]" in text
    assert re.search(r"opd +│ +0\.010 │ +12 │ \[red\]x\[/red\]", text)
    assert re.search(r"stable_opd │ +- │ +- │ ok", text)


def test_table_without_rows():
    made = console(80)
    made.print(table(["a", "b"], [], ""))
    assert re.search(r"a +┃ b", output(made))
