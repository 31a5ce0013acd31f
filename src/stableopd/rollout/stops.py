"""Stopping as an event: which ids end a rollout, and an audit of both models' stops.

A base student often stops with one id and a post-trained teacher with another. Scored token by
token, the teacher then forbids every stop of the student, which unlearns to stop: truncation
collapse, cause A. With E the set of the stop ids of both models, a stop is scored as one event,

    log p(stop) = logsumexp_{e in E} log p(e),

for student, teacher and reference alike (arXiv 2609.20511). `plan_stops` chooses E before a run,
and `audit` says what would go wrong, from a few rollouts and the golden solutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stableopd.types import ConfigError, ModelError, Rollout, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Finding", "StopLogps", "StopPlan", "audit", "plan_stops", "stop_ids_of"]

# Design: a teacher whose stop is e^5 times less likely than the student's weighs on every stop
# as much as some fifty ordinary tokens of the paper's runs (-0.1 nats each).
STOP_GAP_NATS = 5.0

# Design: a tenth of the golden solutions without a usable end is more than a few outliers.
GOLDEN_SHARE = 0.1

# Untuned: from the rate of the paper's stable phase on; its collapse is above 0.95. One rule for
# the rollouts of student and teacher.
HIGH_TRUNCATION = 0.5

# Named in a message before it says how many more there are.
MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class StopPlan:
    """How the rollouts of a run end and how their ends are scored.

    Attributes:
        mode: "event" scores a stop as logsumexp over `event_ids`; "token" scores its own id.
        student_ids: Stop ids of the student.
        teacher_ids: Stop ids of the teacher; None where it has none or they are not known.
        decode_ids: Ids that end a rollout: those of both models in event mode, else the student's.
        event_ids: The ids of the event, E; empty in token mode.
        label_id: The stop token that is appended to golden solutions.
    """

    mode: Literal["event", "token"]
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...] | None
    decode_ids: tuple[int, ...]
    event_ids: tuple[int, ...]
    label_id: int


@dataclass(frozen=True, slots=True)
class StopLogps:
    """Mean log-probs in nats at the `count` stops of the student, as the objective scores them."""

    student_mean: float
    teacher_mean: float
    count: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the audit; `fix` is empty where there is nothing to do."""

    level: Literal["OK", "WARN", "FAIL"]
    name: str
    message: str
    fix: str = ""


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that a model stops with, by its own files.

    Args:
        model: The model; `generation_config.eos_token_id` counts, else `config.eos_token_id`.
        tokenizer: Its tokenizer, whose `eos_token_id` is added.

    Returns:
        The sorted ids, each once.

    Raises:
        ModelError: None of the three names an id.
    """
    ids = _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    if not ids:
        ids = _ids(getattr(model.config, "eos_token_id", None))
    ids |= _ids(tokenizer.eos_token_id)
    if not ids:
        name = getattr(model.config, "name_or_path", "") or "the model"
        raise ModelError(
            f"{name} names no stop token; set eos_token_id in its generation_config.json or "
            "eos_token in its tokenizer_config.json."
        )
    return tuple(sorted(ids))


def plan_stops(
    student_ids: Iterable[int],
    teacher_ids: Iterable[int] | None,
    tokenizer_eos: int | None,
    mode: str,
    num_tokens: int,
) -> StopPlan:
    """Choose which ids end a rollout and how a stop is scored.

    Args:
        student_ids: Stop ids of the student.
        teacher_ids: Stop ids of the teacher; None where there is no teacher or it does not say.
        tokenizer_eos: The end-of-sequence id of the student's tokenizer, if it has one.
        mode: "event" or "token", the config's `objective.stop`.
        num_tokens: Size of the vocabulary that both models share.

    Returns:
        The plan.

    Raises:
        ConfigError: The mode is neither of the two.
        ModelError: The student has no stop id, or an id lies outside the shared vocabulary.
    """
    if mode not in ("event", "token"):
        raise ConfigError(f"objective.stop must be 'event' or 'token', not {mode!r}.")
    student = tuple(sorted(set(student_ids)))
    teacher = None if teacher_ids is None else tuple(sorted(set(teacher_ids)))
    if not student:
        raise ModelError(
            "the student has no stop id; set eos_token_id in its generation_config.json."
        )
    for owner, ids in (("student", student), ("teacher", teacher or ())):
        outside = [stop for stop in ids if not 0 <= stop < num_tokens]
        if outside:
            raise ModelError(
                f"stop id {outside[0]} of the {owner} lies outside the {num_tokens} tokens that "
                "both models share; use models with one tokenizer, or correct eos_token_id in "
                f"the {owner}'s generation_config.json."
            )
    union = tuple(sorted({*student, *(teacher or ())}))
    return StopPlan(
        mode="event" if mode == "event" else "token",
        student_ids=student,
        teacher_ids=teacher,
        decode_ids=union if mode == "event" else student,
        event_ids=union if mode == "event" else (),
        label_id=tokenizer_eos if tokenizer_eos in student else student[0],
    )


def audit(
    plan: StopPlan,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    golden: Sequence[tuple[int, ...]],
    rollouts: Sequence[Rollout],
    max_new_tokens: int,
    stop_logps: StopLogps | None,
) -> list[Finding]:
    """Say before training what will go wrong at the stops; nothing is changed.

    Args:
        plan: How rollouts end.
        tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's; None where it is not at hand.
        golden: Token ids of golden completions, each with its stop label.
        rollouts: A few rollouts of the untrained student.
        max_new_tokens: Length budget of rollouts and golden solutions, in tokens.
        stop_logps: What both models say at the student's stops; None where not measured.

    Returns:
        One finding for each check that the inputs allow, in a fixed order.
    """
    findings = [_stop_ids(plan, tokenizer), _pad_id(plan, tokenizer)]
    if golden:
        findings += [_golden_ends(plan, golden), _golden_lengths(golden, max_new_tokens)]
    if rollouts:
        findings.append(_truncation(rollouts, max_new_tokens))
    if stop_logps is not None:
        findings.append(_stop_gap(plan, stop_logps))
    if teacher_tokenizer is not None:
        findings.append(_chat_tokens(tokenizer, teacher_tokenizer))
    return findings


def _stop_ids(plan: StopPlan, tokenizer: PreTrainedTokenizerBase) -> Finding:
    name = "stop ids"
    student = _named(plan.student_ids, tokenizer)
    if plan.teacher_ids is None:
        return Finding(
            "OK", name, f"no stop ids of a teacher are known; a rollout stops with {student}."
        )
    if plan.student_ids == plan.teacher_ids:
        return Finding("OK", name, f"student and teacher both stop with {student}.")
    both = f"the student stops with {student}, the teacher with "
    both += _named(plan.teacher_ids, tokenizer)
    if plan.mode == "event":
        event = ", ".join(map(str, plan.event_ids))
        return Finding("OK", name, f"{both}; the event of ids {{{event}}} is scored as one stop.")
    return Finding(
        "WARN",
        name,
        f"{both}: truncation collapse, cause A: at each student stop the log-ratio may be about "
        "-25 nats, and the student unlearns to stop.",
        'set objective.stop = "event".',
    )


def _pad_id(plan: StopPlan, tokenizer: PreTrainedTokenizerBase) -> Finding:
    pad: Any = tokenizer.pad_token_id
    if pad is None:
        message = "the tokenizer has no pad token, and none is needed: padding is masked by length."
    elif pad in plan.decode_ids:
        message = (
            f"the pad token is the stop token {pad}; labels are masked by length, not by id, so "
            "that the stop label is kept."
        )
    else:
        message = f"the pad token {pad} is not a stop token."
    return Finding("OK", "pad id", message)


def _golden_ends(plan: StopPlan, golden: Sequence[tuple[int, ...]]) -> Finding:
    missing = sum(not ids or ids[-1] not in plan.decode_ids for ids in golden)
    name, share = "golden stop label", missing / len(golden)
    if not missing:
        return Finding("OK", name, f"all {len(golden)} golden solutions end with a stop label.")
    message = f"{missing} of {len(golden)} golden solutions ({share:.0%}) end without a stop label"
    if share <= GOLDEN_SHARE:
        return Finding("OK", name, f"{message}.")
    return Finding(
        "FAIL" if missing == len(golden) else "WARN",
        name,
        f"{message}, which teaches the student to go on.",
        f"end them with id {plan.label_id}, or drop those that were cut off.",
    )


def _golden_lengths(golden: Sequence[tuple[int, ...]], max_new_tokens: int) -> Finding:
    over = sum(len(ids) > max_new_tokens for ids in golden)
    share, longest = over / len(golden), max(map(len, golden))
    message = (
        f"{over} of {len(golden)} golden solutions ({share:.0%}) exceed the budget of "
        f"{max_new_tokens} tokens; the longest has {longest}."
    )
    if share <= GOLDEN_SHARE:
        return Finding("OK", "golden length", message)
    fix = f"raise rollout.max_new_tokens (up to {longest}), or drop the long solutions."
    return Finding("WARN", "golden length", message, fix)


def _truncation(rollouts: Sequence[Rollout], max_new_tokens: int) -> Finding:
    cut = sum(rollout.stop_reason is StopReason.LENGTH for rollout in rollouts)
    rate = cut / len(rollouts)
    message = (
        f"{cut} of {len(rollouts)} rollouts of the untrained student ({rate:.0%}) are cut off at "
        f"{max_new_tokens} tokens."
    )
    if rate < HIGH_TRUNCATION:
        return Finding("OK", "truncation", message)
    fix = "raise rollout.max_new_tokens, or fine-tune the student on terminated solutions first."
    return Finding("WARN", "truncation", message, fix)


def _stop_gap(plan: StopPlan, logps: StopLogps) -> Finding:
    name = "stop log-probs"
    if not logps.count:
        return Finding("OK", name, "not measured: no rollout of the student stopped.")
    stops = "stop" if logps.count == 1 else "stops"
    message = (
        f"at {logps.count} {stops} of the student its own log-prob is "
        f"{logps.student_mean:.2f} nats on average, the teacher's {logps.teacher_mean:.2f}"
    )
    # Written so that NaN warns as well.
    if logps.student_mean - logps.teacher_mean <= STOP_GAP_NATS:
        return Finding("OK", name, f"{message}.")
    if plan.mode == "token":
        fix = 'set objective.stop = "event".'
    else:
        fix = "check that the teacher reads the chat template, and set a bounded advantage."
    return Finding("WARN", name, f"{message}: the teacher forbids the student's stops.", fix)


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> Finding:
    name = "chat tokens"
    tokens = sorted({*_template_tokens(tokenizer), *_template_tokens(teacher_tokenizer)})
    student, teacher = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    differing = [token for token in tokens if student.get(token) != teacher.get(token)]
    if not differing:
        message = f"{len(tokens)} special tokens of the chat templates have the same ids in both."
        return Finding("OK", name, message if tokens else "the chat templates use none.")
    shown = [
        f"{token} ({_id(student.get(token))} to the student, {_id(teacher.get(token))} to the "
        "teacher)"
        for token in differing[:MAX_NAMED]
    ]
    if len(differing) > MAX_NAMED:
        shown.append(f"{len(differing) - MAX_NAMED} more")
    return Finding(
        "WARN",
        name,
        f"special tokens of the chat templates have other ids in the other tokenizer: "
        f"{', '.join(shown)}.",
        'set data.chat_template = "none", or use models with one chat format.',
    )


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens that a tokenizer's chat template writes, literally or by a variable."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else "\n".join(template.values())
    either: Any = tokenizer  # `get_added_vocab` is declared in the subclasses alone
    special = {*either.get_added_vocab(), *tokenizer.all_special_tokens}
    tokens = {token for token in special if token and token in text}
    for variable in ("bos_token", "eos_token"):
        token = getattr(tokenizer, variable)
        if token and variable in text:
            tokens.add(str(token))
    return tokens


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    ids = list(value) if isinstance(value, list | tuple | set) else [value]
    wrong = [stop for stop in ids if type(stop) is not int]
    if wrong:
        raise ModelError(
            f"eos_token_id holds {wrong[0]!r}, which is no token id; correct "
            "generation_config.json or config.json of the model."
        )
    return set(ids)


def _id(value: int | None) -> str:
    return "absent" if value is None else str(value)


def _named(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{stop} ({tokenizer.convert_ids_to_tokens(stop)})" for stop in ids)
