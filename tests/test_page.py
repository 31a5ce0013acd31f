import dataclasses
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from html_parts import Page
from report_parts import (
    COLLAPSED,
    CONFIG,
    NO_ONSET,
    dump,
    metric_lines,
    positions,
    run,
    summary,
    worst,
)
from stableopd.diagnostics.summary import Histogram, Measures, Parameters
from stableopd.report.distributions import length_figure, read_profiles
from stableopd.report.excerpts import cut_pieces, make_visible
from stableopd.report.page import write_page
from stableopd.report.themes import LIGHT
from stableopd.types import RunFolderError, StopReason

# Everything that a rollout could try: markup, attributes, templates, control characters, the
# direction of the text, half a surrogate pair, ends of comments.
HOSTILE = (
    "<script>alert('x')</script> </pre></details></body> <img src=x onerror=alert(1)> \" ' & &lt; "
    "{{ 7 * 7 }} {% raw %} -->\x00\x1b[31m\r\u202eabc\u2028\ud800\x85 ]]>"
)


def page_of(diagnoses, path, title="A title"):
    write_page(diagnoses, path, title)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return page_of([run()], tmp_path_factory.mktemp("pages") / "one.html", "One <b>run</b>")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    runs = [run("OPD"), run("StableOPD", False, gold=1.0)]
    return page_of(runs, tmp_path_factory.mktemp("pages") / "two.html")


def test_the_verdict_comes_first(one):
    text, page = one
    assert page.texts["h1"] == ["One <b>run</b>"]
    assert text.index("Truncation collapse from step 5 on") < text.index("<figure>")
    (box,) = page.texts["section"]
    for part in (
        "✕ Collapse",
        "Confidence: high. Onset: step 5 (95% interval 4 to 7), over 3 steps, TruncRate 0.15 to ",
        'Train with method = "stable_opd".',
        "Repetitive tokens have the greater advantage.",
    ):
        assert part in box


def test_a_healthy_run_is_calm(tmp_path):
    _, page = page_of([run(collapses=False)], tmp_path / "page.html")
    (box,) = page.texts["section"]
    assert "✓ No collapse" in box
    assert "What to do" not in box
    assert "Onset:" not in box


def test_numbers_are_first_and_last(one):
    _, page = one
    shown = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert shown["Accuracy, held-out"] == "0.060 → 0.180"
    assert shown["TruncRate, rollouts"] == "0.217 → 0.950"
    assert shown["Repetitive tokens"] == "0.050 → 0.600"
    assert shown["Mean length (tokens)"] == "45.8 → 110.0"
    assert shown["Rollouts read"] == "192"
    assert shown["Steps"] == "1 → 12"


def test_figures_and_their_legends(one):
    _, page = one
    captions = [caption[:9] for caption in page.texts["figcaption"]]
    assert captions[:3] == ["Figure 1.", "Figure 2.", "Figure 3."]
    assert page.tags.count("img") == 4 + 2 + 2 + 1 + 2
    images = [address for address in page.addresses if address.startswith("data:image/svg")]
    assert len(images) == len(page.addresses) == 2 * 11
    entries = page.texts["li"]
    assert entries.count("onset of truncation, step 5") == 3
    assert entries.count("its 95% interval, 4 to 7") == 3
    assert {"cut off", "budget, 96 tokens", "before step 5", "from step 5 on"} <= set(entries)


def test_rollbacks_are_marked_and_said(tmp_path):
    back = {5: 0, 9: 4}
    lines = tuple(e | {"alarm/restored_step": back.get(e["step"])} for e in metric_lines(True))
    text, page = page_of([run(lines=lines, notes=("Twice.",))], tmp_path / "page.html")
    assert page.texts["li"].count("rolled back after steps 5 and 9") == 3
    assert page.texts["dd"][page.texts["dt"].index("Rolled back after")] == "steps 5 and 9"
    (box,) = page.texts["section"]
    assert box.index("Evidence") < box.index("Twice.")
    assert text.count("Twice.") == 1
    _, calm = page_of([run(lines=lines[:8], onset=NO_ONSET)], tmp_path / "calm.html")
    assert calm.texts["li"].count("rolled back after step 5") == 3
    assert not [entry for entry in calm.texts["li"] if entry.startswith("onset of")]
    often = tuple(line | {"alarm/restored_step": 0} for line in lines[1:])
    _, many = page_of([run(lines=often)], tmp_path / "many.html")
    assert "rolled back after steps 1, 2, 3, 4 and 8 more" in many.texts["li"]
    assert "rolled back" not in page_of([run()], tmp_path / "none.html")[0]


def test_one_of_a_thing_is_singular(tmp_path):
    few = summary(num_prompts=1, by_prompt=summary().by_prompt[:1])
    _, page = page_of([dump(summary=few)], tmp_path / "page.html")
    assert any("1 of 1 prompt: those" in note for note in page.texts["p"])
    gap = worst("a" * 20, gap=(10, 1))
    none = summary(num_prompts=1, by_prompt=(), worst=(gap,))
    _, page = page_of([dump(summary=none)], tmp_path / "page.html")
    assert "None: the one prompt has no rollout that" in " ".join(page.texts["p"])
    assert "1 character left out" in " ".join(page.texts["pre"])


def test_page_of_two_runs(two):
    _, page = two
    assert page.tags.count("img") == 6 + 2 * 11
    assert page.texts["figcaption"][0] == "Figure 4. All runs beside each other"
    assert page.texts["h2"] == ["OPD", "StableOPD"]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["first → last step"] == ["OPD", "StableOPD"]
    assert rows["Verdict"] == ["✕ Collapse", "✓ No collapse"]
    assert rows["Mean length (tokens)"] == ["45.8 → 110.0", "43.5 → 43.5"]


def test_runs_of_one_name_stay_apart(tmp_path):
    text, page = page_of([dump(verdict=COLLAPSED), dump()], tmp_path / "page.html")
    assert page.texts["h2"] == ["rollouts", "rollouts (2)"]
    assert {row[0]: row[1:] for row in page.rows}["Verdict"] == ["✕ Collapse", "✓ No collapse"]
    assert "different parameters" not in text


def test_different_parameters_are_said(tmp_path):
    other = dump(num_steps=3, summary=summary(parameters=Parameters(unit="words")))
    text, page = page_of([dump(), other], tmp_path / "page.html")
    assert "different parameters" in text
    assert "Repetitive words (n = 8, min_run = 0)" in page.texts["div"]


def test_page_needs_no_network_and_no_script(two):
    text, page = two
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not page.events
    assert not re.search(r"url\(|@import|https?:", text)


def test_a_dump_without_steps_and_log_probs(tmp_path):
    text, page = page_of([dump()], tmp_path / "page.html")
    assert "nothing can be drawn over steps" in text
    assert page.tags.count("img") == 3
    shown = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert shown["TruncRate, rollouts"] == "0.250"
    assert "Repetitive tokens" in shown
    assert 'alt="Mean advantage by position, not measured."' in text
    assert "config.toml" not in text
    assert "Read as TRL (parquet)." in text


def test_a_dump_with_steps(tmp_path):
    text, page = page_of([dump(num_steps=9)], tmp_path / "page.html")
    assert page.tags.count("img") == 4 + 2 + 1 + 2
    assert 'alt="Accuracy (rollouts): not measured."' in text
    folded = [caption for caption in page.texts["figcaption"] if "not measured" in caption]
    assert [caption[:9] for caption in folded] == ["Figure 2."]
    assert "rollouts 50 at step 1, 50 at step 9." in text


def test_page_of_a_run_without_a_step(tmp_path):
    nothing = np.zeros(0, dtype=np.int64)
    empty = summary(
        0,
        overall=Measures(0),
        by_prompt=(),
        num_prompts=0,
        worst=(),
        histogram=Histogram(np.zeros(0), nothing, nothing),
        positions=positions(steps=0),
    )
    diagnosis = run(collapses=False, summary=empty, lines=(), config="", environment="")
    _, page = page_of([diagnosis], tmp_path / "page.html")
    assert "No step has been recorded yet." in page.texts["p"]
    assert "table" not in page.tags
    assert "img" not in page.tags
    _, both = page_of([diagnosis, dump()], tmp_path / "both.html")
    assert both.texts["h2"] == ["opd", "rollouts"]


def test_prompts_that_go_wrong(one, tmp_path):
    _, page = one
    rows = [row for row in page.rows if row[0].startswith("prompt ")]
    assert len(rows) == 10
    assert rows[1] == ["prompt 1", "4", "50.0", "0.95", "0.50"]
    assert any("10 of 40 prompts" in note for note in page.texts["p"])
    fine = tuple(
        dataclasses.replace(entry, truncation_rate=math.nan, repetition_rate=0.0)
        for entry in summary().by_prompt
    )
    _, page = page_of([dump(summary=summary(by_prompt=fine))], tmp_path / "page.html")
    assert any(note.startswith("None: no prompt of 40") for note in page.texts["p"])
    assert not page.rows


def test_worst_rollouts(one):
    _, page = one
    heads = [" ".join(text.split()) for text in page.texts["summary"][:2]]
    assert heads[0] == (
        "step 12 length 41 ended cut off answer wrong repetitive 80% loop 2 tokens × 5.0, "
        "from character 6"
    )
    assert heads[1].endswith("ended stopped answer correct repetitive none loop none")
    assert "well, loop begins here ▸so and so and so and so and so and " in page.texts["pre"]
    assert page.texts["mark"] == ["so and so and so and so and "]


def test_a_loop_behind_a_gap_keeps_its_place(tmp_path):
    entry = worst("a" * 10 + "b" * 10, gap=(10, 5000), loop_start=12, loop_period=1)
    text, page = page_of([dump(summary=summary(worst=(entry,)))], tmp_path / "page.html")
    assert "1 token × 0.0, from character 5,012" in text
    assert "aaaaaaaaaa5,000 characters left outbbloop begins here ▸bbbbbbbb" in page.texts["pre"]


def test_nothing_repeats_is_said(tmp_path):
    calm = summary(worst=(worst("nothing", stop_reason=None, step=None),))
    text, page = page_of([dump(summary=calm)], tmp_path / "page.html")
    assert "No rollout repeats itself." in text
    head = " ".join(page.texts["summary"][0].split())
    assert head == "step – length 7 ended unknown answer not graded repetitive none loop none"


def test_hostile_text_stays_text(tmp_path):
    entry = worst(HOSTILE, prompt=HOSTILE, source=HOSTILE, spans=((3, 40), (60, 90)), loop_start=50)
    prompts = tuple(dataclasses.replace(p, prompt=HOSTILE) for p in summary().by_prompt)
    verdict = dataclasses.replace(run().verdict, headline=HOSTILE, evidence=(HOSTILE,))
    diagnosis = dump(
        HOSTILE,
        summary=summary(worst=(entry,), by_prompt=prompts),
        verdict=verdict,
        notes=(HOSTILE,),
        config=HOSTILE,
        environment=HOSTILE,
        source=HOSTILE,
    )
    text, page = page_of([diagnosis, dump()], tmp_path / "page.html", HOSTILE)
    shown = make_visible(HOSTILE)
    assert page.texts["h1"] == page.texts["title"] == [shown]
    assert page.texts["pre"].count(shown) == 3
    # The completion, with the sign where its loop begins taken out.
    assert shown in [entry.replace("loop begins here ▸", "") for entry in page.texts["pre"]]
    assert "img" in page.tags
    assert "script" not in page.tags
    assert not page.events
    assert "49 " not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\ud800-\udfff]", text)


def test_make_visible():
    assert make_visible("a\tb\nc é 漢 🙂") == "a\tb\nc é 漢 🙂"
    assert make_visible("\x00\x1b\r\x7f") == "⟨U+0000⟩⟨U+001B⟩⟨U+000D⟩⟨U+007F⟩"
    assert make_visible("\u202e\u2066\ud800\x85") == "⟨U+202E⟩⟨U+2066⟩⟨U+D800⟩⟨U+0085⟩"


spans = st.lists(st.tuples(st.integers(-2, 45), st.integers(0, 45)).map(sorted).map(tuple))


@given(
    st.text(max_size=40),
    spans,
    st.none() | st.integers(0, 45),
    st.none() | st.tuples(st.integers(0, 45), st.integers(1, 9)),
)
@settings(deadline=None)
def test_pieces_are_the_completion(text, marked, loop, gap):
    pieces = cut_pieces(worst(text, spans=tuple(marked), loop_start=loop, gap=gap))
    assert "".join(piece.text for piece in pieces) == text
    labels = [piece.kind == "repetitive" for piece in pieces for _ in piece.text]
    assert labels == [any(a <= i < b for a, b in marked) for i in range(len(text))]
    for kind, place in (("loop", loop), ("gap", gap and gap[0])):
        found = [i for i, piece in enumerate(pieces) if piece.kind == kind]
        assert len(found) == (place is not None)
        if found:
            before = sum(len(piece.text) for piece in pieces[: found[0]])
            assert before == min(place, len(text))


def test_profiles_by_position():
    given = positions(steps=4, places=3, width=8)
    before, after = read_profiles(given, 3)
    assert (before.name, after.name) == ("before step 3", "from step 3 on")
    assert list(before.positions) == [0, 8, 16]
    assert after.repetitive[2] == pytest.approx(given.num_repetitive[2:, 2].sum() / 128)
    assert before.advantage[1] == pytest.approx(given.advantage[:2, 1].sum() / 128)
    (whole,) = read_profiles(given, None)
    assert whole.repetitive[1] == pytest.approx(given.num_repetitive[:, 1].sum() / 256)
    assert len(read_profiles(given, 1)) == 1
    assert read_profiles(positions(steps=0), None) == ()
    unscored = read_profiles(positions(scored=False), None)[0]
    assert np.isnan(unscored.advantage).all()


def test_places_with_few_tokens_are_left_out():
    given = positions(steps=1, places=3)
    given.num_tokens[0] = [64, 20, 19]
    (whole,) = read_profiles(given, None)
    assert list(np.isnan(whole.repetitive)) == [False, False, True]
    given.num_tokens[0] = [3, 2, 0]
    (whole,) = read_profiles(given, None)
    assert list(np.isnan(whole.repetitive)) == [False, True, True]


def test_length_histogram_stacks_the_cut_off_ones():
    figure = length_figure(summary(), LIGHT)
    bars = figure.axes[0].patches
    assert len(bars) == 50
    assert sum(bar.get_height() for bar in bars) == 170
    assert [bar.get_height() for bar in bars[25:]] == [0] * 24 + [50]
    assert figure.axes[0].lines[0].get_xdata()[0] == 96
    assert len(length_figure(summary(budget=None), LIGHT).axes[0].lines) == 0


def test_a_page_of_a_large_run_is_small(tmp_path):
    """100,000 rollouts in 2,000 steps, and texts of the size that the page is given."""
    rng = np.random.default_rng(0)
    lines = tuple(line | {"logp/student_mean": -rng.random()} for line in metric_lines(True, 2000))
    entries = tuple(
        worst("<&>'\"" * 600, spans=tuple((i, i + 3) for i in range(0, 3000, 5)), prompt="p" * 300)
        for _ in range(20)
    )
    large = summary(2000, positions=positions(2000, 64), worst=entries, overall=Measures(100_000))
    diagnosis = run(summary=large, lines=lines, config=CONFIG * 30, onset=NO_ONSET)
    text, _ = page_of([diagnosis], tmp_path / "page.html")
    assert len(text.encode()) < 1_500_000


def test_page_cannot_be_written(tmp_path):
    with pytest.raises(RunFolderError, match="not-there"):
        write_page([dump()], tmp_path / "not-there" / "page.html", "x")


def test_stop_reasons_have_words(tmp_path):
    reasons = (StopReason.LENGTH, StopReason.STOP, None)
    entries = (
        *(worst("x", stop_reason=reason) for reason in reasons),
        worst("x" * 96, stop_reason=None),
    )
    _, page = page_of([dump(summary=summary(0, worst=entries))], tmp_path / "page.html")
    heads = [" ".join(text.split()) for text in page.texts["summary"][:4]]
    assert [head.split(" answer")[0].split("ended ")[1] for head in heads] == [
        "cut off",
        "stopped",
        "unknown",
        "cut off",
    ]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LOOK = """<script>
document.querySelectorAll("details").forEach(d => d.open = true);
document.title = document.documentElement.scrollWidth + " of " + innerWidth;
</script></body>"""


# What the page allows, and scripts, so that the page can be measured.
NO_SCRIPT, SCRIPT = "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"


def looked_at(page, folder):
    """A page's title in a browser after a script in it has run, and what the browser reported."""
    (folder / "look.html").write_text(page.replace("</body>", LOOK), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=500,900"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "look.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return re.search(r"<title>(.*?)</title>", done.stdout)[1], done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_overflows_in_a_browser(tmp_path):
    entry = worst("x" * 3000 + HOSTILE, spans=((9, 2000),), loop_start=5, repetitive_share=0.6)
    long_name = "a-very-long-name-of-a-run-" * 4
    diagnosis = run(long_name, summary=summary(worst=(entry,)), notes=("n" * 500,))
    text, _ = page_of([diagnosis, dump()], tmp_path / "page.html", long_name)
    title, errors = looked_at(text, tmp_path)
    assert title == long_name  # the page lets no script run
    assert "CONSOLE" in errors
    title, errors = looked_at(text.replace(NO_SCRIPT, SCRIPT), tmp_path)
    width, room = map(int, title.split(" of "))
    assert width <= room
    assert "CONSOLE" not in errors
