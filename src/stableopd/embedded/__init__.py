"""The tiny student and teacher that ship with the package, and the settings of the demo."""

from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """Where something embedded lies.

    Args:
        name: "student" or "teacher" for a model folder, "demo" for the settings of the demo.

    Returns:
        The folder, or the TOML file.

    Raises:
        KeyError: There is nothing of that name.
    """
    names = {"student": "student", "teacher": "teacher", "demo": "demo.toml"}
    return Path(__file__).parent / names[name]
