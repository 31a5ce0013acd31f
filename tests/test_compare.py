import dataclasses
import math
import tomllib

import numpy as np
import pytest

from html_parts import Page
from report_parts import dump, metric_lines, run, summary
from stableopd import config as configuration
from stableopd.diagnostics.summary import Measures, Parameters
from stableopd.report.compare import final_table, group_arms, write_comparison
from stableopd.report.configs import (
    differences,
    name_by_differences,
    read_settings,
    settings_key,
    shorten,
)
from stableopd.report.estimates import (
    T_QUANTILES,
    binomial_estimate,
    half_widths,
    normal_estimate,
    seeds_estimate,
)
from stableopd.report.finals import Arm, final_values
from stableopd.report.panels import Curve, Mark, Panel, panel_figure
from stableopd.report.themes import LIGHT


def opd(seed=0, **values):
    return run(f"opd-{seed}", True, seed, **values)


def stable(seed=0, **values):
    return run(f"stable-{seed}", False, seed, gold=1.0, beta=0.01, **values)


def varied(seed, rate):
    """A run that ends with this TruncRate."""
    return opd(seed, lines=({"step": 2, "rollout/truncation_rate": rate},))


def students_t(x, degrees):
    """P(T <= x) by numerical integration of the density."""
    grid = np.linspace(0, x, 200_001)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
    density = scale / math.sqrt(degrees * math.pi) * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    return 0.5 + np.trapezoid(density, grid)


@pytest.mark.parametrize("degrees", range(1, 31))
def test_quantiles_of_students_t(degrees):
    assert students_t(T_QUANTILES[degrees - 1], degrees) == pytest.approx(0.975, abs=4e-5)


def test_half_widths_beyond_the_table_are_not_too_narrow():
    assert half_widths(1.0, 32) == pytest.approx(2.042 / math.sqrt(32))
    assert half_widths(1.0, 400) * math.sqrt(400) > 1.96
    assert np.isnan(half_widths([1.0, 1.0], [0, 1])).all()


def test_intervals_cover_what_they_should():
    """The t interval over four seeds holds the mean in 95% of 4,000 draws."""
    rng = np.random.default_rng(1)
    hits = 0
    for row in rng.normal(0.5, 0.05, size=(4000, 4)):
        interval = seeds_estimate(list(row), is_share=False).interval
        assert interval is not None
        hits += interval[0] <= 0.5 <= interval[1]
    assert hits / 4000 == pytest.approx(0.95, abs=0.011)


def test_seeds_estimate():
    estimate = seeds_estimate([0.2, 0.4, 0.9], is_share=True)
    assert estimate.value == pytest.approx(0.5)
    # Standard deviation .36056; t(.975, 2) = 4.303: half width .8957, cut to [0, 1].
    assert estimate.interval == (0.0, 1.0)
    assert estimate.method == "3 seeds"
    lengths = seeds_estimate([20.0, 40.0, 90.0], is_share=False)
    assert lengths.interval == pytest.approx((50 - 89.57, 50 + 89.57), abs=0.01)
    assert seeds_estimate([0.0, 0.0], is_share=True).interval is None
    assert seeds_estimate([0.3], is_share=True).interval is None


def test_normal_estimate():
    assert normal_estimate(0.5, 0.1).interval == pytest.approx((0.304, 0.696), abs=1e-3)
    assert normal_estimate(0.1, 0.1).interval == pytest.approx((0.0, 0.296), abs=1e-3)
    assert normal_estimate(0.0, 0.0).interval is None
    assert normal_estimate(0.0, math.nan).interval is None


def test_binomial_estimate():
    # 1 of 10 and 0 of 10 by Wilson's formula, from Agresti and Coull's worked values.
    assert binomial_estimate(0.1, 10).interval == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert binomial_estimate(0.0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert binomial_estimate(1.0, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    # The edges are the rates p with |value - p| = z sqrt(p (1 - p) / n).
    interval = binomial_estimate(0.3, 57).interval
    assert interval is not None
    for p in interval:
        assert abs(0.3 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 57))
    assert binomial_estimate(0.3, 0).interval is None
    assert binomial_estimate(math.nan, 5).interval is None


def test_seeds_are_grouped_and_named_by_what_differs():
    runs = [opd(1), stable(1), opd(2), stable(2), run("other", False, 1, gold=0.1, beta=0.01)]
    arms = group_arms(runs)
    assert [arm.name for arm in arms] == ["opd", "stable_opd", "stable_opd, lambda_gold = 0.1"]
    assert [[d.name for d in arm.diagnoses] for arm in arms] == [
        ["opd-1", "opd-2"],
        ["stable-1", "stable-2"],
        ["other"],
    ]


def test_device_and_trackers_do_not_make_an_arm_but_steps_do():
    text = opd(1).config
    elsewhere = text.replace('"cpu"', '"cuda"').replace("[]", '["wandb"]')
    assert len(group_arms([opd(1), opd(2, config=elsewhere)])) == 1
    longer = text.replace("steps = 12", "steps = 50")
    arms = group_arms([opd(1), opd(2, config=longer)])
    assert [arm.name for arm in arms] == ["steps = 12", "steps = 50"]


def test_dumps_are_arms_by_themselves():
    arms = group_arms([dump("a"), opd(1), dump("a"), dump("b"), opd(2)])
    assert [arm.name for arm in arms] == ["a", "opd", "a (2)", "b"]
    assert [len(arm.diagnoses) for arm in arms] == [1, 2, 1, 1]
    assert group_arms([]) == ()
    broken = opd(config="not [ toml")
    assert [arm.name for arm in group_arms([broken, broken])] == ["opd-0", "opd-0 (2)"]


def test_one_arm_is_named_by_its_method():
    assert [arm.name for arm in group_arms([opd(1), opd(2)])] == ["opd"]
    assert name_by_differences([{"run.steps": 3}], ["x"]) == ["run"]


def test_names_are_clear_about_sections():
    base = {"objective.method": "opd", "student.model": "s", "teacher.model": "t", "run.steps": 5}
    others = [{**base, "teacher.model": "u"}, {**base, "run.steps": 6}]
    assert name_by_differences([base, *others], ["x", "y", "z"]) == [
        "teacher.model = t, steps = 5",
        "teacher.model = u, steps = 5",
        "teacher.model = t, steps = 6",
    ]


def test_presets_of_a_method_are_not_named():
    """Real configurations: what `parse` fills in from the method is left out of the name."""
    tables = [
        {"method": "opd"},
        {"method": "stable_opd"},
        {"method": "stable_opd", "beta_reference": 0.1},
        {"method": "opd", "lambda_gold": 1.0},
    ]
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    rest = {**models, "data": {"train": "prompts.jsonl"}}
    parsed = [configuration.parse({"objective": table, **rest}) for table in tables]
    settings = [read_settings(configuration.to_toml(entry)) for entry in parsed]
    assert name_by_differences(settings, ["x"] * 4) == [
        "opd",
        "stable_opd",
        "stable_opd, beta_reference = 0.1",
        "opd, lambda_gold = 1.0",
    ]


def test_differences_are_a_table():
    one = tomllib.loads(opd(1).config)
    assert read_settings(opd(1).config)["objective.method"] == one["objective"]["method"]
    settings = [read_settings(d.config) for d in (opd(1), stable(2), dump())]
    assert differences(settings) == [
        ("objective.method", ["opd", "stable_opd", "–"]),
        ("objective.lambda_gold", ["0.0", "1.0", "–"]),
        ("objective.beta_reference", ["0.0", "0.01", "–"]),
    ]
    shown = [{"a.b": True, "a.c": [], "a.d": ""}, {"a.b": False, "a.c": ["x", "y"]}]
    assert differences(shown) == [
        ("a.b", ["true", "false"]),
        ("a.c", ["none", "x, y"]),
        ("a.d", ['""', "–"]),
    ]
    assert settings_key(settings[0]) == settings_key(read_settings(opd(5).config))


def test_final_values_over_seeds():
    runs = [varied(seed, rate) for seed, rate in enumerate((0.2, 0.4, 0.9))]
    (values,) = final_values(group_arms(runs))
    assert values["TruncRate"] == seeds_estimate([0.2, 0.4, 0.9], is_share=True)
    assert math.isnan(values["RepRate"].value)
    assert math.isnan(values["accuracy"].value)


def test_final_values_are_of_the_last_five_steps():
    (values,) = final_values(group_arms([opd()]))
    bad = np.mean([s / 12 for s in range(8, 13)])
    assert values["TruncRate"].value == pytest.approx(0.15 + 0.8 * bad)
    assert values["TruncRate"] == binomial_estimate(values["TruncRate"].value, 5 * 16)
    assert values["length"].value == pytest.approx(40 + 70 * bad)
    assert values["length"].interval is None
    assert values["accuracy"].value == pytest.approx(0.18)
    assert values["accuracy"] == normal_estimate(values["accuracy"].value, 0.02)


def test_steps_after_the_last_rollouts_do_not_count():
    """Lines without numbers of rollouts, as those of sft, are no steps with rollouts."""
    lines = (*metric_lines(True), *({"step": s, "loss/golden": 1.0} for s in range(13, 30)))
    (values,) = final_values(group_arms([opd(lines=lines)]))
    (plain,) = final_values(group_arms([opd()]))
    assert values == plain


def test_final_values_of_seeds_that_are_all_alike():
    runs = [varied(seed, 0.0) for seed in range(3)]
    (values,) = final_values(group_arms(runs))
    # 16 rollouts a seed at step 2.
    assert values["TruncRate"] == binomial_estimate(0.0, 48)


def test_final_values_of_a_dump_without_steps():
    (values,) = final_values(group_arms([dump()]))
    assert values["TruncRate"] == binomial_estimate(0.25, 400)
    assert values["RepRate"] == binomial_estimate(0.0, 400)
    assert values["length"].value == 50


def test_accuracy_is_of_rollouts_where_nobody_was_evaluated():
    lines = tuple({"step": s, "rollout/accuracy": 0.5} for s in range(1, 4))
    counted = summary(3, overall=Measures(48, accuracy=0.5))
    arms = group_arms([opd(lines=lines, summary=counted)])
    assert final_values(arms)[0]["accuracy"] == binomial_estimate(0.5, 48)
    assert "accuracy: of the rollouts of these steps." in final_table(arms)[2]
    mixed = group_arms([opd(lines=lines, summary=counted), stable()])
    assert math.isnan(final_values(mixed)[0]["accuracy"].value)
    assert final_values(mixed)[1]["accuracy"].method == "problems"


def test_final_table():
    arms = group_arms([opd(1), opd(2), stable(1)])
    columns, rows, caption = final_table(arms)
    assert columns == ["arm", "collapsed", "accuracy", "TruncRate", "RepRate", "length"]
    assert all(len(row) == len(columns) for row in rows)
    # Accuracies .19 and .20: mean .195, t(.975, 1) = 12.706 times .00707 / sqrt(2).
    assert rows[0][:3] == ["opd", "2 of 2", "0.195\n0.131–0.259"]
    assert rows[1][:3] == ["stable_opd", "0 of 1", "0.190\n0.151–0.229"]
    assert rows[1][5] == "43.5"
    assert caption.split("\n") == [
        "TruncRate, RepRate, length: mean over the last 5 steps that have rollouts.",
        "accuracy: the last evaluation on held-out problems.",
        "length: in tokens.",
        "Below each number is its 95% interval:",
        "opd: accuracy over 2 seeds; TruncRate, RepRate over rollouts.",
        "stable_opd: accuracy over problems; TruncRate, RepRate over rollouts.",
        "Over seeds: Student's t.",
        "Over problems: from the evaluation's standard error.",
        "Over rollouts: Wilson's, as if rollouts were independent of each other.",
    ]
    three = [varied(seed, rate) for seed, rate in enumerate((0.2, 0.4, 0.9))]
    assert "\nopd: TruncRate over 3 seeds.\nOver seeds" in final_table(group_arms(three))[2]
    assert final_table([])[1] == []


def test_runs_of_one_seed_count_as_one(tmp_path):
    """The same experiment twice, or three times, tells no more than once."""
    short = dataclasses.replace(varied(1, 0.4), name="short", lines=({"step": 1},))
    first, other = varied(0, 0.2), varied(1, 0.4)
    (once,) = final_values(group_arms([first, other]))
    twice = group_arms([first, short, other, first, first])
    assert final_values(twice) == [once]
    assert once["TruncRate"].method == "2 seeds"
    assert [len(runs) for runs in twice[0].by_seed] == [3, 2]
    assert twice[0].independent == (first, other)
    _, rows, caption = final_table(twice)
    assert rows[0][1] == "2 of 2"
    assert "Note: opd: 3 runs with seed 0 (opd-0, opd-0, opd-0) are not independent" in caption
    assert (
        "opd: 2 runs with seed 1 (opd-1, short) are not independent and count as one: " in caption
    )
    assert "not independent" not in final_table(group_arms([first, other]))[2]
    write_comparison(group_arms([opd(), opd()]), tmp_path / "page.html", "x")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len([row for row in page.rows if row[0] == "opd" and row[1] == "opd-0"]) == 2
    assert not [entry for entry in page.texts["li"] if entry.startswith("band")]


def test_arms_of_different_length_are_said():
    arms = group_arms([opd(), stable(lines=tuple(metric_lines(False, steps=4))), dump()])
    note = "The arms end at different steps, and so do their numbers (opd: step 12, stable_opd: "
    assert note + "step 4)." in final_table(arms)[2]
    assert "different steps" not in final_table(group_arms([opd(), stable(), dump()]))[2]


def test_arms_that_differ_in_much_are_named_by_method_and_run():
    many = {f"eval.field{i}": i for i in range(13)}
    base = {"objective.method": "opd", **dict.fromkeys(many, 99)}
    other, third = base | many, base | {"objective.method": "stable_opd"}
    runs = ["opd", "own-opd", "a-very-long-name-of-a-run-that-ends"]
    assert name_by_differences([base, other, third], runs) == [
        "opd",
        "opd (own-opd)",
        "stable_opd (…-run-that-ends)",
    ]
    assert len("stable_opd (…-run-that-ends)") == 28
    # The objective alone tells these two apart.
    assert name_by_differences([other, third], runs[1:]) == ["opd", "stable_opd"]
    assert name_by_differences([base, other], ["x", "y"]) == ["opd (x)", "opd (y)"]


def test_long_values_keep_their_ends():
    long = "/home/somebody/" + "x" * 40 + "/train.jsonl"
    assert shorten([long, "–"]) == ["…/train.jsonl", "–"]
    assert shorten([long[1:], "–"]) == ["…" + long[-39:], "–"]
    assert shorten([long, "/other" + long]) == [long, "/other" + long]
    assert shorten(["/home/me/a/t.jsonl", "/home/me/b/t.jsonl"]) == ["…/a/t.jsonl", "…/b/t.jsonl"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    runs = [opd(seed) for seed in range(1, 6)] + [stable(1), stable(2)]
    path = tmp_path_factory.mktemp("pages") / "compare.html"
    write_comparison(group_arms(runs), path, "A & <b>")
    return Page(path.read_text(encoding="utf-8"))


def test_comparison_page(page):
    assert page.texts["h1"] == ["A & <b>"]
    assert page.tags.count("img") == 6
    entries = page.texts["li"]
    assert entries[:2] == ["opd", "stable_opd"]
    assert "band: 95% interval of the mean" in entries
    assert "band: smallest to largest seed" in entries
    rows = [row for row in page.rows if len(row) == 6]
    assert rows[1][:3] == ["opd", "5 of 5", "0.210 0.190–0.230"]
    verdicts = rows[3:]
    assert verdicts[1] == ["opd", "opd-1", "1", "✕ Collapse", "B, repetition", "5 [4, 7]"]
    assert verdicts[-1] == ["stable_opd", "stable-2", "2", "✓ No collapse", "–", "–"]
    assert ["objective.lambda_gold", "0.0", "1.0"] in page.rows
    assert not any(row[0] in ("run.seed", "run.output") for row in page.rows)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)


def test_what_cannot_be_compared_is_said(tmp_path):
    short = opd(2, lines=tuple(metric_lines(True, steps=7)))
    other = dump(summary=summary(0, parameters=Parameters(), length_unit="characters"))
    copy = dataclasses.replace(opd(1), name="copy")
    arms = [Arm("opd", (opd(1), short, copy)), Arm("d", (other,))]
    write_comparison(arms, tmp_path / "page.html", "x")
    notes = " ".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).texts["p"])
    assert "different parameters" in notes
    assert "Some lengths are in tokens and some in characters" in notes
    assert (
        "opd: 2 runs with seed 1 (opd-1, copy) are not independent and count as one: opd-1."
        in notes
    )
    assert "opd: its runs end at different steps (7 to 12)" in notes
    write_comparison(group_arms([dump("a"), dump("b")]), tmp_path / "page.html", "x")
    quiet = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "None that are known." in quiet.texts["p"]
    assert not [text for text in quiet.texts["p"] if text.startswith("Note.")]


def test_rollbacks_are_dashed_lines():
    colors, panel = {"opd": 0}, Panel("t", "u", (Curve("rollout/truncation_rate"),), "rate")
    arms = {"opd": [metric_lines(True)]}
    mark = Mark(None, None, (5, 9))
    plain, marked = (panel_figure(panel, arms, colors, LIGHT, m).axes[0] for m in (None, mark))
    added = marked.lines[len(plain.lines) :]
    assert [np.ravel(line.get_xdata())[0] for line in added] == [5, 9]
    assert all(line.get_linestyle() == "--" for line in added)
