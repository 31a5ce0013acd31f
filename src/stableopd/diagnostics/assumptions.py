"""What the measurements of a set of rollouts rest on, in words."""

from __future__ import annotations

from stableopd.diagnostics.summary import Parameters
from stableopd.diagnostics.sums import Sums

__all__ = ["list_assumptions", "trusts_reasons"]

# Design: a value that means "cut off" and is not known is missing from just the rollouts that
# matter; a few aborted rollouts are not.
_MOST_WITHOUT_REASON = 0.05

_INSTEAD = {
    "max-new-tokens": "the length decides for all",
    "pile-up": "the longest ones, whose lengths pile up, count as cut off",
    "unknown": "how many were cut off is unknown",
}


def trusts_reasons(sums: Sums) -> bool:
    """Whether the stop reasons of the files tell which rollouts were cut off.

    Args:
        sums: Sums over all rollouts.

    Returns:
        False where no rollout has a usable reason, or more than 5% have none. (The rule is the
        project's.)
    """
    without = sums.num_rollouts - sums.num_reasons
    return sums.num_reasons > 0 and without <= _MOST_WITHOUT_REASON * sums.num_rollouts


def list_assumptions(
    sums: Sums,
    *,
    asked: Parameters,
    parameters: Parameters,
    length_unit: str,
    max_new_tokens: int | None,
    source: str,
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
        source: What cut-offs are told from, as `Summary.truncation_source`.
        num_prompts: Number of prompts told apart.
        num_without_prompt: Rollouts of prompts for which there was no room.

    Returns:
        One sentence each; none where nothing is out of the ordinary.
    """
    if not sums.num_rollouts:
        return []
    notes = _on_units(sums, asked, parameters)
    notes += _on_lengths(sums, length_unit, max_new_tokens, source)
    if sums.num_not_finite:
        notes.append(
            "1 log-prob or advantage is not finite: the means leave it out."
            if sums.num_not_finite == 1
            else f"{sums.num_not_finite:,} log-probs or advantages are not finite: the means "
            "leave them out."
        )
    if sums.num_mismatched:
        notes.append(
            f"{_of(sums.num_mismatched, sums)} do not have one log-prob or advantage per token: "
            "these count in the means, but not by class or position."
        )
    if num_without_prompt:
        notes.append(
            f"There are more than {num_prompts:,} prompts: "
            f"{num_without_prompt:,} {_rollouts(num_without_prompt)} of later ones "
            f"{'is' if num_without_prompt == 1 else 'are'} not counted by prompt."
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


def _on_lengths(sums: Sums, length_unit: str, max_new_tokens: int | None, source: str) -> list[str]:
    notes: list[str] = []
    unmeasured = sums.num_rollouts - sums.num_lengths
    if unmeasured:
        notes.append(
            f"{_of(unmeasured, sums)} have no length in {length_unit}: the lengths leave them out."
        )
    without = sums.num_rollouts - sums.num_reasons
    if sums.num_reasons and not trusts_reasons(sums):
        notes.append(
            f"{_of(without, sums)} have no usable stop reason, more than "
            f"{_MOST_WITHOUT_REASON:.0%}: the reasons of the others are not used either, and "
            f"{_INSTEAD[source]}."
        )
    elif sums.num_reasons and without:
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


def _rollouts(number: int) -> str:
    return "rollout" if number == 1 else "rollouts"
