"""Sentences about what was read: how cut-offs were decided, and what could not be used."""

from __future__ import annotations

from stableopd.diagnostics.summary import Summary
from stableopd.integrations.dumps import Dump

__all__ = ["about_window", "damage", "how_truncation"]

# A share of looping rollouts that RepRate should show.
SOME_LOOPS = 0.05

# Named in a note before it says how many more there are.
SHOWN_PROBLEMS = 3


def how_truncation(summary: Summary) -> list[str]:
    """Say how it was decided which rollouts were cut off."""
    budget = f"{summary.budget:,} {summary.length_unit}" if summary.budget else "the budget"
    said = {
        "file": "Which rollouts were cut off is in the files.",
        "max-new-tokens": f"Rollouts as long as {budget} (--max-new-tokens) count as cut off.",
        "pile-up": f"The files do not say which rollouts were cut off. Lengths pile up at "
        f"{budget}, the longest there is: rollouts of that length count as cut off.",
    }
    # Where it is unknown, the verdict says so.
    known = summary.overall.num_rollouts and summary.truncation_source in said
    return [said[summary.truncation_source]] if known else []


def about_window(summary: Summary) -> list[str]:
    """A word about L where rollouts repeat themselves and RepRate is 0 by its definition."""
    overall, window = summary.overall, summary.parameters.window_chars
    if overall.repetition_rate == 0 and overall.loop_share >= SOME_LOOPS:
        return [
            f"{overall.loop_share:.0%} of the rollouts end in a loop, and RepRate is 0: it counts "
            f"rollouts longer than L = {window:,} characters alone. Scale L with the budget "
            "(--window-chars; in a run, [repetition] window_chars)."
        ]
    return []


def damage(dump: Dump) -> list[str]:
    """What could not be read: whole lines, single values, files."""
    said: list[str] = []
    for count, one, many, named in (
        (dump.num_damaged, "line was damaged and left out", "lines were damaged and left out",
         dump.damaged),
        (dump.num_dropped, "value could not be used", "values could not be used", dump.dropped),
    ):  # fmt: skip
        if count:
            more = count - SHOWN_PROBLEMS
            rest = f"; and {more:,} more." if more > 0 else "."
            shown = "; ".join(text.rstrip(".") for text in named[:SHOWN_PROBLEMS])
            said.append(f"{count:,} {one if count == 1 else many}: {shown}{rest}")
    if dump.shared_steps:
        said.append(
            "Steps that come from more than one file: "
            f"{dump.shared_steps:,}. If these are several runs, diagnose them one at a time."
        )
    if dump.left_out:
        names = list(dict.fromkeys(file.name for file in dump.left_out))
        files = ", ".join(names[:SHOWN_PROBLEMS])
        more = ", ..." if len(names) > SHOWN_PROBLEMS else ""
        said.append(f"Files that were passed over: {len(dump.left_out):,} ({files}{more}).")
    return said
