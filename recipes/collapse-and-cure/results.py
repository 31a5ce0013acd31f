"""Write docs/results.md, its figures and results.json from what `reproduce.py` left.

    python recipes/collapse-and-cure/results.py --output work/reproduce --docs docs

Numbers and verdicts are computed; the sentences around them are in `results.md.jinja`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import claims  # noqa: E402
import confidence  # noqa: E402
import experiments  # noqa: E402
import maps  # noqa: E402
import phase  # noqa: E402
import tables  # noqa: E402
from outcomes import Outcome, read_arm, read_final, spread  # noqa: E402

from stableopd import config, embedded  # noqa: E402
from stableopd.report import figures  # noqa: E402
from stableopd.report.series import Lines  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Runs = Mapping[str, Sequence[Outcome]]  # by the arm's folder, such as "B/opd"

# The arms of figure 4: each with a colour of its own.
SHOWN = {
    "opd": "OPD",
    "opd-kl-0.1": "OPD + KL 0.1",
    "opd-golden": "OPD + golden",
    "stable_opd": "StableOPD",
}


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="What reproduce.py wrote.")] = Path("work/reproduce"),
    docs: Annotated[Path, typer.Option(help="Folder for the page and its figures.")] = Path("docs"),
) -> None:
    """Write the page with whatever is finished."""
    arms = experiments.all_arms(list(experiments.groups()))
    runs = {arm.folder: read_arm(arm, output) for arm in arms}
    cells = maps.read_cells(output)
    docs.mkdir(parents=True, exist_ok=True)
    draw(in_world(runs, "B"), cells, docs)
    (docs / "results.json").write_text(json.dumps(numbers(runs, cells), indent=1) + "\n")
    page = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    ).get_template("results.md.jinja")
    (docs / "results.md").write_text(page.render(facts(output, runs, cells)))
    print(f"{docs / 'results.md'}: {sum(map(len, runs.values()))} runs and {len(cells)} cells.")


def in_world(runs: Runs, world: str) -> dict[str, Sequence[Outcome]]:
    """The arms of one world, by their name."""
    prefix = f"{world}/"
    return {k.removeprefix(prefix): found for k, found in runs.items() if k.startswith(prefix)}


def facts(output: Path, runs: Runs, cells: Sequence[Any]) -> dict[str, Any]:
    """What the page is filled with."""
    b = in_world(runs, "B")
    first_two = {name: found[:2] for name, found in b.items()}  # as many as the other arms have
    rates = ["opd", "stable_opd", *(arm.name for arm in experiments.rates())]
    return {
        "versions": versions(output),
        "num_opd": len(b["opd"]),
        "scarce": tables.main_table(in_world(runs, "scarce"), {}),
        "commits": (output / "commits.txt").read_text().split(),
        "num_runs": sum(map(len, runs.values())),
        "num_cells": len(cells),
        "cell_cpu_s": sum(cell["cpu_s"] for cell in cells) / max(len(cells), 1),
        "claims": claims.judge(b, in_world(runs, "scarce")),
        "main": tables.main_table(
            {arm.name: b[arm.name] for arm in experiments.main_arms()},
            read_final(output / "finals" / "start"),
        ),
        "recovery": tables.recovery_table(b["opd-300"]),
        "stops": tables.stop_table(stop_rows(runs)),
        "cures": tables.cure_table(in_world(runs, "A"), first_two),
        "sweep": tables.sweep_table(first_two),
        "rates": tables.rate_table({name: first_two[name] for name in rates}),
        "teachers": maps.teacher_table(output, confidence.further_copies),
        "budget": maps.slice_table(cells, "budget", phase.BUDGETS),
        "rate": maps.slice_table(cells, "rate", phase.RATES),
        "strength": maps.strength_table(cells),
        "own_loops": maps.slice_table(cells, "own_loops", phase.OWN_LOOPS),
    }


def versions(output: Path) -> dict[str, str]:
    """Of the packages that the runs were made with, from the first run's folder."""
    file = next(iter(sorted((output / "runs").glob("*/*/s*/environment.json"))))
    return json.loads(file.read_text())["packages"]


def stop_rows(runs: Runs) -> list[tuple[str, str, str, str, Sequence[Outcome]]]:
    """Stop ids, teacher, scoring and method, with their runs."""
    plain, loops = "never loops", "loops"
    return [
        ("equal", plain, "event", "OPD", runs["none/opd"]),
        ("equal", loops, "event", "OPD", runs["B/opd"][:2]),
        ("equal", loops, "token", "OPD", runs["B/opd-token"]),
        ("different", plain, "event", "OPD", runs["A/opd-event"]),
        ("different", plain, "token", "OPD", runs["A/opd"]),
        ("different", plain, "token", "StableOPD", runs["A/stable_opd"]),
        ("different", loops, "event", "OPD", runs["AB/opd-event"]),
        ("different", loops, "token", "OPD", runs["AB/opd"]),
        ("different", loops, "event", "StableOPD", runs["AB/stable_opd-event"]),
        ("different", loops, "token", "StableOPD", runs["AB/stable_opd"]),
    ]


def draw(in_b: Runs, cells: Sequence[Any], docs: Path) -> None:
    """Figures 1 to 4 and the maps."""
    repetition = config.load(embedded.path("demo")).repetition
    lines: dict[str, list[Lines]] = {
        title: [run.lines for run in in_b[name]] for name, title in SHOWN.items() if in_b[name]
    }
    opd = {"OPD": lines["OPD"]}
    for name, figure in (
        ("figure-1-dynamics", figures.dynamics_figure(opd, repetition)),
        ("figure-2-logprobs", figures.logprob_figure(opd)),
        ("figure-3-credit", figures.credit_figure(opd, repetition)),
        ("figure-4-comparison", figures.comparison_figure(lines, repetition)),
        ("phase-diagram", maps.map_figure(cells)),
    ):
        figures.save_png(figure, docs / f"results-{name}.png")


def numbers(runs: Runs, cells: Sequence[Any]) -> dict[str, Any]:
    """The numbers behind the page, by seed and with both intervals, for who computes on."""
    values = {
        "final_accuracy": lambda run: run.final_accuracy,
        "last_accuracy": lambda run: run.last_accuracy,
        "best_accuracy": lambda run: run.best_accuracy,
        "truncation_rate": lambda run: run.end("rollout/truncation_rate"),
        "repetition_rate": lambda run: run.end("rollout/repetition_rate"),
        "mean_length": lambda run: run.end("rollout/mean_length"),
        "cpu_s": lambda run: run.cpu_s,
    }
    arms: dict[str, Any] = {}
    for name, found in runs.items():
        arms[name] = {
            "seeds": [run.seed for run in found],
            "collapsed": [run.collapsed for run in found],
            "jump": [run.jump for run in found],
            **{key: _spread([value(run) for run in found]) for key, value in values.items()},
        }
    return {"arms": arms, "cells": list(cells)}


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    found = spread(values)
    if found is None:
        return None
    return {
        "values": [round(value, 5) for value in found.values],
        "bootstrap_95": [round(x, 5) for x in found.bootstrap],
        "student_t_95": [round(x, 5) for x in found.student] if len(found.values) > 1 else None,
    }


if __name__ == "__main__":
    app()
