"""What the measurements of a set of rollouts rest on, in words."""

from __future__ import annotations

from stableopd.diagnostics.summary import Parameters
from stableopd.diagnostics.sums import Sums

__all__ = ["list_assumptions"]


def list_assumptions(
    sums: Sums,
    *,
    asked: Parameters,
    parameters: Parameters,
    length_unit: str,
    max_new_tokens: int | None,
    num_prompts: int,
    num_without_prompt: int,
) -> list[str]:
    """Say what was assumed or left out.

    Args:
        sums: Sums over all rollouts.
        asked: What was to be measured.
        parameters: What was measured.
        length_unit: "tokens" or "characters".
        max_new_tokens: The budget that was given; None for none.
        num_prompts: Number of prompts told apart.
        num_without_prompt: Rollouts of prompts for which there was no room.

    Returns:
        One sentence each; none where nothing is out of the ordinary.
    """
    if not sums.num_rollouts:
        return []
    notes = [*_on_units(sums, asked, parameters), *_on_lengths(sums, length_unit, max_new_tokens)]
    if sums.num_not_finite:
        notes.append(
            f"{sums.num_not_finite:,} log-probs or advantages are not finite: the means leave "
            "them out."
        )
    if sums.num_mismatched:
        notes.append(
            f"{_of(sums.num_mismatched, sums)} do not have one log-prob or advantage per token: "
            "these count in the means, but not by class or position."
        )
    if num_without_prompt:
        notes.append(
            f"There are more than {num_prompts:,} prompts: {num_without_prompt:,} rollouts of "
            "later ones are not counted by prompt."
        )
    return notes


def _on_units(sums: Sums, asked: Parameters, parameters: Parameters) -> list[str]:
    notes: list[str] = []
    unit = parameters.unit
    if unit != asked.unit:
        notes.append(
            f"The files have no token ids: repetition is measured on {unit} "
            f"(n = {parameters.ngram})."
        )
    if sums.num_other_units:
        lacks, other = ("token ids", "words") if unit == "tokens" else ("text", "token ids")
        notes.append(
            f"{_of(sums.num_other_units, sums)} have no {lacks}: their repetition is measured "
            f"on {other}."
        )
    without = sums.num_rollouts - sums.num_texts
    if without:
        notes.append(f"{_of(without, sums)} have no text: RepRate leaves them out.")
    return notes


def _on_lengths(sums: Sums, length_unit: str, max_new_tokens: int | None) -> list[str]:
    notes: list[str] = []
    unmeasured = sums.num_rollouts - sums.num_lengths
    if unmeasured:
        notes.append(
            f"{_of(unmeasured, sums)} have no length in {length_unit}: the lengths leave them out."
        )
    without = sums.num_rollouts - sums.num_reasons
    if sums.num_reasons and without:
        by_length = sums.num_by_budget
        how = f"length decides for {by_length:,}" if by_length else "TruncRate leaves them out"
        notes.append(f"{_of(without, sums)} have no stop reason; {how}.")
    if without and max_new_tokens is not None and length_unit != "tokens":
        notes.append(
            f"The budget of {max_new_tokens:,} tokens cannot be applied: the files have no "
            "lengths in tokens."
        )
    return notes


def _of(number: int, sums: Sums) -> str:
    return f"{number:,} of {sums.num_rollouts:,} rollouts"
