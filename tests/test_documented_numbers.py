"""The README's table is read and compared as `.ci/run` does with a whole demo."""

from pathlib import Path

import documented_numbers as documented

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_has_the_table_and_its_tolerance():
    page = README.read_text()
    rows = documented.documented(page)
    assert list(rows) == ["start", *(f"{name}, end" for name in documented.ARMS)]
    assert not documented.faults(rows, rows)
    share, *_, length = documented.TOLERANCES
    assert f"by up to {share:g}" in page
    assert f"{length:g} tokens" in page


def test_a_number_beyond_the_tolerance_is_named():
    rows = documented.documented(README.read_text())
    other = {name: list(cells) for name, cells in rows.items()}
    other["OPD, end"][1] = "0.50"
    (fault,) = documented.faults(rows, other)
    assert "OPD, end, TruncRate" in fault
    assert documented.faults(rows, {"start": rows["start"]})
    other["OPD, end"][1] = "nan"
    assert len(documented.faults(rows, other)) == 1
