"""The wheel holds all that the demo and the page need, and works away from the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "."]
    done = subprocess.run(
        [*command, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for role in ("student", "teacher"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert f"stableopd/embedded/{role}/{file}" in names
    assert "stableopd/embedded/demo.toml" in names
    for template in ("base", "compare", "macros", "page"):
        assert f"stableopd/report/{template}.html.jinja" in names
    assert "stableopd/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "recipes"))]
    code = (
        "import stableopd, stableopd.embedded as e, stableopd.models as m, torch\n"
        "assert stableopd.__file__.startswith(r'" + str(tmp_path) + "')\n"
        "stableopd.load_config(e.path('demo'))\n"
        "m.load(str(e.path('teacher')), role='teacher', dtype=torch.float32,"
        " device=torch.device('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
