"""Which versions of TRL are taken, and what is said of the others."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stableopd.integrations import trl

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_the_range_is_that_of_the_extra():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (needed,) = map(Requirement, extras["trl"])
    assert needed.name == "trl"
    assert needed.specifier == trl.SUPPORTED
    assert trl.SUPPORTED.contains(importlib.metadata.version("trl"))


@pytest.mark.parametrize("found", ["1.14.1", "1.15.0", "1.17.0", "2.0.0.dev0", None])
def test_another_trl_is_one_clear_line(monkeypatch, found):
    def version(_):
        if found is None:
            raise importlib.metadata.PackageNotFoundError("trl")
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name in [n for n in sys.modules if n.startswith("stableopd.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as error:
        importlib.import_module("stableopd.integrations.trl")
    message = str(error.value)
    assert "\n" not in message
    assert "stableopd[trl]" in message
    assert (found or "needs trl") in message
