"""Tables of numbers in pages are read and compared as `.ci/run` does with whole runs."""

import json
from pathlib import Path

import pytest

import documented_numbers as documented

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "recipes" / "trl" / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=["demo", "trl"])
def test_a_page_has_the_table_and_its_tolerance(page):
    text = page.read_text()
    rows = documented.documented(text)
    assert len(rows) == 3
    assert next(iter(rows)) == "start"
    assert not documented.faults(rows, rows)
    assert f"by up to {documented.TOLERANCES['accuracy']:g}".replace("0.", ".") in text.replace(
        "0.", "."
    )
    assert f"{documented.TOLERANCES['length']:g} tokens" in text


def test_a_number_beyond_the_tolerance_is_named():
    rows = documented.documented(PAGES[0].read_text())
    assert list(rows) == ["start", *(f"{name}, end" for name in documented.ARMS)]
    other = {name: dict(cells) for name, cells in rows.items()}
    other["OPD, end"]["TruncRate"] = "0.50"
    (fault,) = documented.faults(rows, other)
    assert "OPD, end, TruncRate" in fault
    assert documented.faults(rows, {"start": rows["start"]})
    for cell in ("nan", ""):
        other["OPD, end"]["TruncRate"] = cell
        assert len(documented.faults(rows, other)) == 1


def test_the_arms_inside_trl(tmp_path):
    last = dict.fromkeys(documented.TRL.values(), 0.0)
    for name, accuracy in (("trl", 0.0), ("stable", 0.94)):
        (tmp_path / name).mkdir()
        found = {"accuracy before": 0.24, "accuracy after": accuracy, "last five steps": last}
        (tmp_path / name / "result.json").write_text(json.dumps(found))
    rows = documented.of_trl(tmp_path / "trl", tmp_path / "stable")
    faults = documented.faults(documented.documented(PAGES[1].read_text()), rows)
    assert {fault.partition(":")[0] for fault in faults} == {
        *(f"`DistillationTrainer`, end, {column}" for column in documented.TRL),
        "`StableOPDTrainer`, end, length",
    }
