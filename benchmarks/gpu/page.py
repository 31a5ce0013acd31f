"""Write docs/gpu.md from the JSON of `make gpu-check`.

    python benchmarks/gpu/page.py [RUN]

With RUN, the folder of a run, its files are taken into benchmarks/gpu/results/ first. Cells without
data say so; no number comes from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(HERE))

import plan  # noqa: E402

RESULTS, PAGE = HERE / "results", ROOT / "docs" / "gpu.md"
NOT_RUN, MISSING = "not run yet", "not reached"

Found = dict[str, Any] | None
Rows = list[dict[str, Any]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON of each phase that is there."""
    files = {phase: folder / f"{phase}.json" for phase in plan.LIMITS}
    return {phase: json.loads(f.read_text()) for phase, f in files.items() if f.exists()}


def take(run: Path, results: Path) -> list[str]:
    """Copy the JSON of a run; toy runs are refused.

    Returns:
        The phases that were taken.

    Raises:
        SystemExit: There is nothing to take.
    """
    found = read(run)
    if not found:
        raise SystemExit(f"error: {run} has no JSON of a phase; run make gpu-check first.")
    toys = [phase for phase, content in found.items() if content["quick"]]
    if toys:
        raise SystemExit(f"error: {run} is of --quick, whose numbers mean nothing: {toys}.")
    results.mkdir(parents=True, exist_ok=True)
    for phase in found:
        shutil.copyfile(run / f"{phase}.json", results / f"{phase}.json")
    return list(found)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def find(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    """The row whose fields have these values."""
    matching = (row for row in rows if all(row.get(k) == v for k, v in wanted.items()))
    return next(matching, None)


def cell(
    found: Found,
    row: dict[str, Any] | None,
    key: str,
    form: str,
    ours: dict[str, Any] | None = None,
) -> str:
    """A number, or why there is none; with `ours`, ours over it too."""
    if found is None:
        return NOT_RUN
    if row is None:
        return MISSING
    if row.get("error_text"):
        return str(row["error_text"]).replace("|", "/")
    if row.get(key) is None:
        return "-"
    text = format(row[key], form)
    if ours and ours.get(key) is not None and row[key]:
        text += f" ({ours[key] / row[key]:.2f})"
    return text


def state(found: Found) -> str:
    """One line on how a phase ran, and where."""
    if found is None:
        return "Not run yet."
    where = found.get("environment") or {}
    packages = [f"{k} {v}" if v else f"{k} missing" for k, v in where.get("packages", {}).items()]
    memory = f" ({where['memory_gb']} GB)" if where.get("memory_gb") else ""
    text = f"{where.get('card', 'a card that was not told')}{memory}, {found['date']}"
    text += f", CUDA {where.get('cuda')}, Python {where.get('python')}, {', '.join(packages)}"
    text += f", commit {where.get('commit')}; {found.get('seconds', '?')} s."
    if found["state"] != "done":
        # A file that says "running" was left by a run that is no more.
        how = "cut off" if found["state"] == "running" else found["state"]
        text += f" **{how.capitalize()}**: {found['error'] or 'the run was ended early'}."
    return text


def correct(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    names = (
        "objective in chunks",
        "objective in a sweep",
        "draws from given numbers",
        "greedy tokens as of generate",
        "log-probs of rollouts",
        "step, chunks",
        "step, sweep",
    )

    def judged(name: str, dtype: str) -> str:
        if dtype == "bfloat16" and name in names[2:4]:
            return ""
        row = find(rows, what=name, dtype=dtype)
        text = cell(found, row, "error", ".1e")
        if row and "bound" in row:
            text += f" (≤ {row['bound']:g}; {row['worst']})"
            text += "" if row["ok"] else " **wrong**"
        return text

    lines = [[name, judged(name, "float32"), judged(name, "bfloat16")] for name in names]
    tests = find(rows, what="tests")
    passed = NOT_RUN if found is None else MISSING
    if tests:
        counts = ", ".join(f"{n} {kind}" for kind, n in tests["tests"].items())
        passed = tests.get("error_text") or counts
        passed += f": {', '.join(tests['failed'])}" if tests["failed"] else ""
    lines.append(["tests of the objective and the sampler", passed, ""])
    return table(("what", "float32", "bfloat16"), lines)


def loss(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    sides = {
        "ours": "ours",
        "dense": "dense formula",
        "compiled": "`torch.compile` of it",
        "liger": "Liger",
        "trl": "TRL",
    }

    def one(key: str, form: str) -> str:
        lines: list[list[str]] = []
        for width in plan.WIDTHS:
            for tokens in plan.TOKENS:
                size = {"tokens": tokens, "width": width}
                ours = find(rows, side="ours", **size)
                line = [f"{tokens:,}", f"{width:,}"]
                for side in sides:
                    over = None if side == "ours" else ours
                    line.append(cell(found, find(rows, side=side, **size), key, form, over))
                lines.append(line)
        return table(("tokens", "D", *sides.values()), lines)

    return (
        f"Milliseconds, forward and backward:\n\n{one('ms', ',.1f')}\n\n"
        f"Peak memory above inputs, MB:\n\n{one('memory_mb', ',.0f')}"
    )


def rollouts(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    lines: list[list[str]] = []
    for budget in plan.BUDGETS:
        ours, theirs = (find(rows, side=s, budget=budget) for s in ("ours", "generate"))
        line = [str(budget)]
        for key in ("tokens_per_s", "memory_mb"):
            line += [cell(found, ours, key, ",.0f"), cell(found, theirs, key, ",.0f", ours)]
        lines.append(line)
    header = ("budget", "ours, tokens/s", "`generate`, tokens/s", "ours, MB", "`generate`, MB")
    same = cell(found, find(rows, side="both"), "same_greedy", ".0%")
    return f"{table(header, lines)}\n\nRows with the same greedy tokens in bfloat16: {same}."


def step(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    peer = find(rows, method=plan.PEER)
    lines: list[list[str]] = []
    for method in (*plan.METHODS, plan.PEER):
        row = next(
            (r for r in rows if r.get("method") == method and r.get("side") != "compared"), None
        )
        line = [f"`{method}`", cell(found, row, "wall_s", ".2f")]
        parts = ("rollout_s", "score_s", "update_s")
        line += [cell(found, row, part, ".2f") for part in parts]
        line.append(cell(found, row, "process_mb", ",.0f"))
        for key in ("wall_s", "process_mb"):
            line.append("" if row is peer and found else _ratio(found, row, peer, key))
        lines.append(line)
    header = ("a step of", "s", "rollouts, s", "scoring, s", "update, s", "peak, MB")
    text = table((*header, "s, over TRL's", "MB, over TRL's"), lines)
    compared: list[list[str]] = []
    for method, against in (("stable_opd", "dense formula"), ("gkd", plan.PEER)):
        row = find(rows, side="compared", method=method)
        line = [f"`{method}`", against, cell(found, row, "ours", ".6g")]
        compared.append(
            [*line, cell(found, row, "theirs", ".6g"), cell(found, row, "error", ".1e")]
        )
    header = ("losses on the same rollouts", "of", "ours", "theirs", "difference, relative")
    return f"{text}\n\n{table(header, compared)}"


def _ratio(found: Found, row: Any, peer: Any, key: str) -> str:
    if found is None:
        return NOT_RUN
    if row is None or peer is None:
        return MISSING
    return f"{row[key] / peer[key]:.2f}" if row.get(key) and peer.get(key) else "-"


def demo(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    columns = ("accuracy", "TruncRate", "RepRate", "length")

    def one(row: dict[str, Any] | None, column: str) -> str:
        if row is None:
            return cell(found, None, column, "")
        form = ".0f" if column == "length" else ".2f"
        return f"{row['here'][column]:{form}} / {row['cpu'][column]:{form}}"

    lines: list[list[str]] = []
    for name in ("start", "OPD, end", "StableOPD, end"):
        row = find(rows, what=name)
        wrong = " **not as it should be**" if row and row.get("ok") is False else ""
        lines.append([name + wrong, *(one(row, column) for column in columns)])
    return table(("here / on a CPU", *columns), lines)


def profile(found: Found) -> str:
    rows: Rows = found["rows"] if found else []
    card = find(rows, what="card")
    rate, copies = cell(found, card, "tflops", ",.0f"), cell(found, card, "gb_per_s", ",.0f")
    text = f"bfloat16 products: {rate} TFLOP/s; copies: {copies} GB/s, read and written.\n\n"
    lines: list[list[str]] = []
    kernels: list[list[str]] = []
    for part in ("decoding", "scoring and update"):
        row = find(rows, what=part)
        line = [part, cell(found, row, "seconds", ".3f"), cell(found, row, "launches", ",d")]
        line += [cell(found, row, "share_of_rate", ".1%")]
        lines.append([*line, cell(found, row, "share_of_copies", ".1%")])
        if row is None:
            kernels.append([part, *[cell(found, None, "", "")] * 4])
        for kernel in row["kernels"] if row else []:
            name = kernel["name"].replace("|", "/")
            line = [part, f"`{name}`", f"{kernel['ms']:.1f}", f"{kernel['share']:.0%}"]
            kernels.append([*line, f"{kernel['launches']:,}"])
    header = ("part", "s", "launches", "of the rate of products", "of the bandwidth")
    text += table(header, lines)
    header = ("part", "dearest kernels", "ms", "of the device's time", "launches")
    return f"{text}\n\n{table(header, kernels)}"


SECTIONS: dict[str, Callable[[Found], str]] = {
    "correct": correct,
    "loss": loss,
    "rollouts": rollouts,
    "step": step,
    "demo": demo,
    "profile": profile,
}


def render(found: dict[str, dict[str, Any]]) -> str:
    """The page."""
    text = (HERE / "template.md").read_text()
    for phase, section in SECTIONS.items():
        content = found.get(phase)
        text = text.replace(f"<!-- {phase} -->", f"{state(content)}\n\n{section(content)}")
    ran = f"{len(found)} of {len(SECTIONS)} phases have run"
    return text.replace("<!-- state -->", f"**State:** {ran if found else 'not run yet'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run to take over")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON that is kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    chosen = parser.parse_args()
    if chosen.run:
        print(f"taken: {', '.join(take(chosen.run, chosen.results))}")
    chosen.page.write_text(render(read(chosen.results)))
    print(f"{chosen.page} is written.")


if __name__ == "__main__":
    main()
