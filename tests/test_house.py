"""The rules of the house: who imports whom, sizes, public names, shipped files, documentation."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import conftest
import version_ranges
from stableopd import config

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SRC = ROOT / "src" / "stableopd"
FILES = sorted(SRC.rglob("*.py"))

# room: (layer, what of the package it may import beside its own room)
FOUNDATION = {"types", "text", "config", "config_checks", "config_servers", "config_templates"}
MATHS = FOUNDATION | {"objective", "diagnostics"}
MODELS = MATHS | {"hidden", "model_files", "models"}
DATA = {"rollout", "teacher", "data", "runfolder", "embedded"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "text": set(),
    "config": {"types", "text", "config_checks"},
    "config_checks": {"types", "config", "config_servers", "config_templates"},
    "config_servers": {"types", "config"},
    "config_templates": {"types"},
    "objective": FOUNDATION,
    "diagnostics": FOUNDATION,
    "hidden": FOUNDATION,
    "model_files": FOUNDATION,
    "models": FOUNDATION | {"objective", "hidden", "model_files"},
    # A client of servers, for rollouts and teachers alike; it knows of neither.
    "endpoint": FOUNDATION,
    "rollout": MODELS | {"endpoint"},
    "teacher": MODELS | {"endpoint"},
    "data": MODELS,
    "runfolder": MATHS,
    "embedded": MODELS | {"data"},
    "evaluation": MODELS | DATA,
    "training": MODELS | DATA | {"endpoint", "evaluation", "__init__"},
    "report": FOUNDATION | {"runfolder", "diagnostics"},
    "terminal": FOUNDATION,
    "integrations": MATHS | {"runfolder"},
    # Loaded by a framework alone, and so not by the other integrations, which need no torch.
    "integrations.trl": MODELS | {"runfolder", "rollout", "data", "teacher", "integrations"},
    "integrations.verl": MATHS | {"data"},
    "diagnose": MATHS | {"runfolder", "integrations", "report", "terminal"},
    "doctor": MODELS | DATA | {"training", "terminal"},
    "evaluate": MODELS | DATA | {"evaluation", "report", "terminal", "training"},
    "offline": MODELS | DATA | {"endpoint", "evaluate", "training"},
    "demo": FOUNDATION | {"__init__", "diagnose", "embedded", "runfolder", "report", "terminal"},
    "cli_offline": FOUNDATION | {"offline"},
    "cli": FOUNDATION
    | {"cli_offline"}
    | {"__init__", "runfolder", "report", "terminal", "demo", "training", "evaluation", "rollout"}
    | {"diagnose", "diagnostics", "doctor", "evaluate"},
    "__main__": {"cli"},
    "__init__": set(),
}

# What a room may load from outside; rooms not named here may load anything.
NO_TORCH = {
    "text",
    "config",
    "config_checks",
    "config_servers",
    "config_templates",
    "diagnostics",
    "report",
    "runfolder",
    "terminal",
    "demo",
}
NO_TORCH |= {"diagnose", "integrations", "endpoint"}
# Packages within a room that are rooms of their own.
INNER = ("integrations.trl", "integrations.verl")


def room_of(file: Path) -> str:
    inside = file.relative_to(SRC)
    return room_named(".".join(inside.with_suffix("").parts))


def room_named(module: str) -> str:
    """The room of a module, named without the package's own name."""
    inner = next((room for room in INNER if f"{module}.".startswith(f"{room}.")), None)
    return inner or module.partition(".")[0] or "__init__"


def is_for_types_alone(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return True
    return False


def imports(file: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, but for annotations alone."""
    tree = ast.parse(file.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if is_for_types_alone(node, parents):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            if node.module == "stableopd":
                found |= {f"stableopd.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_layers(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} has no row in the layer table"
    for name in imports(file):
        head, _, rest = name.partition(".")
        if head == "stableopd":
            other = room_named(rest)
            allowed = MAY_IMPORT[room] | {room}
            assert other in allowed, f"{room} may not import {name}"
        if room in NO_TORCH:
            assert head not in {"torch", "transformers", "accelerate"}, f"{room} imports {name}"
        if room in FOUNDATION:
            assert head == "stableopd" or head in sys.stdlib_module_names, f"{room}: {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_sizes(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_public_names(file: Path) -> None:
    """`__all__` lists what the file defines for others, and nothing that is not there."""
    tree = ast.parse(file.read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    listed = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.dump(node.targets[0]).find("'__all__'") > 0
        ),
        None,
    )
    if listed is None:
        assert not {d for d in defined if not d.startswith("_")}, "public names without __all__"
        return
    assert listed == sorted(listed), "__all__ is not sorted"
    if file.name == "__init__.py":  # a package may hand on the names of its files
        named |= {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
    if file != SRC / "__init__.py":
        assert set(listed) <= defined | named


def test_top_level_names() -> None:
    package = importlib.import_module("stableopd")
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(dir(package)) == set(package.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_help_and_import_load_no_torch() -> None:
    code = (
        "import sys, stableopd, stableopd.cli\n"
        "sys.argv = ['stableopd', '--help']\n"
        "try:\n    stableopd.cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert "demo" in done.stdout


def test_dumps_load_neither_torch_nor_a_framework() -> None:
    code = (
        "import sys, stableopd, stableopd.integrations, stableopd.integrations.dumps\n"
        "heavy = {'torch', 'transformers', 'trl', 'verl', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def shipped_tomls() -> list[Path]:
    files = [*(ROOT / "recipes").rglob("*.toml"), *(SRC / "embedded").glob("*.toml")]
    return sorted(files)


@pytest.mark.parametrize("file", shipped_tomls(), ids=lambda f: f.name)
def test_every_shipped_toml_parses(file: Path) -> None:
    settings = config.load(file)
    assert config.parse(tomllib.loads(config.to_toml(settings))) == settings


def test_there_are_shipped_tomls() -> None:
    assert shipped_tomls()


def test_list_of_config_fields() -> None:
    """Growth of the configuration shows in a diff of tests/config_fields.txt."""
    found = []
    for section in dataclasses.fields(config.Config):
        hint = typing.get_type_hints(config.Config)[section.name]
        found += [f"{section.name}.{field.name}" for field in dataclasses.fields(hint)]
    assert found == (Path(__file__).parent / "config_fields.txt").read_text().split()


def documented_metrics() -> set[str]:
    lines = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    return {line.split("`")[1] for line in lines if line.startswith("| `")}


def test_every_metric_is_documented() -> None:
    """Every literal metric name in the source has a row in docs/metrics.md."""
    groups = ("rollout", "advantage", "logp", "stop", "overlap", "entropy", "loss", "mismatch")
    groups += ("eval", "time", "objective", "alarm")
    written: set[str] = set()
    for file in (SRC / "training").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                head, slash, tail = node.value.partition("/")
                if slash and head in groups and tail.isidentifier():
                    written.add(node.value)
    assert len(written) > 15
    assert written <= documented_metrics(), sorted(written - documented_metrics())


def test_the_numerical_files_are_there() -> None:
    assert {f"{name}.py" for name in conftest.NUMERICAL} <= {
        f.name for f in TESTS.glob("test_*.py")
    }


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / "requirements" / "oldest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and line[0] != "#"]
    oldest = {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pinned}
    for name, allowed in version_ranges.ranges().items():
        lowest = Version(allowed.split(",")[0].removeprefix(version_ranges.LOWEST))
        assert oldest[canonicalize_name(name)] == lowest, name
