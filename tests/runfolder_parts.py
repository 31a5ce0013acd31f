"""A run folder and its checkpoints, shared by the tests of run folders."""

import pytest

from stableopd.runfolder import RunFolder

CONFIG = '[run]\noutput = "x"\n'


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", CONFIG, {"python": "3.11"})


def entries(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def fill(folder, step, text="weights"):
    with folder.new_checkpoint(step) as path:
        (path / "model.safetensors").write_text(text)
        (path / "trainer").mkdir()
        (path / "trainer" / "rng.json").write_text("{}")
