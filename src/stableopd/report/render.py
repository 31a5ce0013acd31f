"""From figures and facts to HTML: what the templates of all pages are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from stableopd.diagnostics.verdict import Diagnosis
from stableopd.report.excerpts import make_visible
from stableopd.report.panels import Curve, Mark, Panel, panel_figure, svg_data_uri
from stableopd.report.series import Arms, read_series
from stableopd.report.themes import DARK, LIGHT, Theme
from stableopd.runfolder import write_atomically
from stableopd.runfolder.outputs import PAGE_MARK, check_output, is_our_page
from stableopd.text import without_folders

__all__ = [
    "Badge",
    "Image",
    "Key",
    "Picture",
    "arm_keys",
    "badge_of",
    "draw_image",
    "draw_panels",
    "number",
    "unique_names",
    "write_html",
]


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        label: What it stands for.
        color: "a0" to "a5" (the colours of arms) or "ink".
        shape: How it looks in the figure.
    """

    label: str
    color: str
    shape: Literal["line", "dashed", "dots", "band", "fill", "hatch", "mark", "budget"]


@dataclass(frozen=True)
class Image:
    """One panel for light pages and for dark ones, as `data:` addresses."""

    title: str
    unit: str
    alt: str
    measured: bool
    light: str
    dark: str


@dataclass(frozen=True)
class Picture:
    """Panels beside each other with one legend and one caption."""

    caption: str
    keys: tuple[Key, ...]
    images: tuple[Image, ...]
    columns: int = 2


@dataclass(frozen=True)
class Badge:
    """A verdict in a word, with a symbol and the class of its colour."""

    word: str
    symbol: str
    kind: Literal["bad", "good", "unsure"]


def write_html(template: str, path: str | Path, **values: Any) -> None:
    """Fill a template of this folder and write the page, atomically.

    Args:
        template: Its file name.
        path: The file to write.
        values: What the template asks for. Strings are shown as text, whatever they hold.

    Raises:
        ConfigError: Something is there that is no page of ours.
        RunFolderError: The file cannot be written.
    """
    target = check_output(Path(path), (), is_our_page, "page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["without_folders"] = without_folders
    page = environment.get_template(template).render(
        light=LIGHT, dark=DARK, mark=Markup(PAGE_MARK), **values
    )
    write_atomically(target, page)


def badge_of(diagnosis: Diagnosis) -> Badge:
    """The word, the symbol and the colour of a verdict."""
    if diagnosis.verdict.collapsed:
        return Badge("Collapse", "✕", "bad")
    if diagnosis.verdict.cause == "healthy":
        return Badge("No collapse", "✓", "good")
    return Badge("Too little data", "?", "unsure")


def draw_image(
    title: str, unit: str, alt: str, draw: Callable[[Theme], Figure], measured: bool = True
) -> Image:
    """Draw a panel for both kinds of page.

    Args:
        title: Stands above it.
        unit: Of its vertical axis.
        alt: What it shows, for those who cannot see it.
        draw: Draws it with a theme.
        measured: Whether there is anything in it.

    Returns:
        The image.
    """
    return Image(
        title, unit, alt, measured, *(svg_data_uri(draw(theme)) for theme in (LIGHT, DARK))
    )


def draw_panels(
    panels: Sequence[Panel], arms: Arms, colors: Mapping[str, int], mark: Mark | None = None
) -> tuple[Image, ...]:
    """Draw panels over steps, one image each; arguments as in `panels.panel_figure`."""
    return tuple(
        draw_image(
            panel.title,
            panel.unit,
            _describe(panel, arms),
            lambda theme, panel=panel: panel_figure(panel, arms, colors, theme, mark),
            any(read_series(seeds, c.key) for c in panel.curves for seeds in arms.values()),
        )
        for panel in panels
    )


def arm_keys(colors: Mapping[str, int]) -> tuple[Key, ...]:
    """A colour for each arm; nothing for one alone, whose name is on the page anyway."""
    if len(colors) < 2:
        return ()
    return tuple(Key(name, f"a{place}", "line") for name, place in colors.items())


def number(value: float | None, form: str) -> str:
    """A number as text; a dash where it does not exist."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before."""
    made: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in made:
            count += 1
            candidate = f"{name} ({count})"
        made.append(candidate)
    return made


def _describe(panel: Panel, arms: Arms) -> str:
    """The first and the last number of each curve, in words."""
    said: list[str] = []
    for curve in panel.curves:
        for name, seeds in arms.items():
            series = read_series(seeds, curve.key)
            if series is not None:
                known = np.flatnonzero(np.isfinite(series.mean))
                ends = dict.fromkeys((known[0], known[-1]))
                points = (f"{series.mean[e]:.3g} at step {series.steps[e]:.0f}" for e in ends)
                said.append(f"{_curve_name(panel, curve, name)} {', '.join(points)}")
    return f"{panel.title}: {'; '.join(said) or 'not measured'}."


def _curve_name(panel: Panel, curve: Curve, name: str) -> str:
    return f"{name} ({curve.key})" if len(panel.curves) > 1 else name


def _finalize(value: Any) -> Any:
    """Applied to all that a template puts out, before it is escaped."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return make_visible(value) if is_text else value
