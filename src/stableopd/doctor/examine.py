"""All checks of the doctor, each as far as the inputs allow, in a fixed order."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from stableopd import models
from stableopd.data.prompts import render
from stableopd.data.vocabulary import encode_texts
from stableopd.doctor import behaviour, lessons, loops, memory, tokens
from stableopd.doctor.patient import Check, Patient
from stableopd.doctor.scoring import TokenScores, choose_prompts, score_sequences
from stableopd.models import LanguageModel
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.stops import Finding, StopLogps, StopPlan, audit, plan_stops, stop_ids_of
from stableopd.types import ModelError, Prompt, Rollout, SamplingSettings, Sequence, StopReason

__all__ = ["examine"]

SEED = 104_729
TEACHER_SECONDS = 180.0  # design: rollouts of a slower teacher are left out
NUM_TEXTS = 16

# The lines in this order.
ORDER = (
    "tokenizers", "round trip", "vocabulary", "stop ids", "stop scoring", "stop log-probs",
    "pad id", "chat tokens", "chat template", "generation prompt", "text part", "precision",
    "sampling", "prompts", "context",
    "golden solutions", "golden length", "right answers", "golden answers", "golden stop label",
    "golden ends",
    "rollouts", "truncation", "repetition", "RepRate window", "teacher rollouts",
    "teacher answers", "overlap", "loops", "memory", "teacher",
)  # fmt: skip


@dataclass(frozen=True)
class _Case:
    """A patient whose student can write, and what was decided about it.

    Attributes:
        patient: The patient.
        teacher: The teacher, where its ids mean what the student's mean.
        plan: How rollouts end.
        num_tokens: Ids that the models share.
        context: The shorter context; None where no model names one.
        places: Prompts on which completions are written.
        room: Length budget of these completions, in tokens; 0 where there is none.
    """

    patient: Patient
    teacher: LanguageModel | None
    plan: StopPlan
    num_tokens: int
    context: int | None
    places: Many[int]
    room: int

    @property
    def stop_ids(self) -> list[int]:
        """The stop ids of both models."""
        return sorted({*self.plan.decode_ids, *(self.plan.teacher_ids or ())})

    def write(self, model: LanguageModel, stop_ids: Many[int]) -> list[Rollout]:
        """One completion of each chosen prompt."""
        r = self.patient.config.rollout
        settings = SamplingSettings(self.room, r.temperature, r.top_p, r.top_k)
        tokenizer = self.patient.student.tokenizer
        sampler = TransformersSampler(
            model.model, tokenizer, stop_ids, self.num_tokens, r.batch_size
        )
        prompts = [(self.patient.prompts[i].id, self.patient.prompt_ids[i]) for i in self.places]
        with self.patient.autocast():
            return sampler.sample(prompts, 1, settings, SEED)

    def score(self, sequences: Many[Sequence], is_event: bool = True) -> list[TokenScores]:
        """Scores of sequences by both models."""
        has_teacher = self.teacher is not None
        return score_sequences(
            self.patient, sequences, self.stop_ids, is_event, self.num_tokens, has_teacher
        )


def examine(patient: Patient) -> tuple[list[Finding], dict[str, Any]]:
    """Run every check that the inputs allow; nothing is changed or written.

    Args:
        patient: Models, prompts and settings.

    Returns:
        The findings in a fixed order, and what was measured, by group: "tokenizers",
        "vocabulary", "prompts", "context", "golden", "stops", "student", "teacher", "overlap",
        "loops", "memory"; a group that was left out is absent.

    Raises:
        StableOPDError: A model's log-probs are not finite.
    """
    checks: list[tuple[str, Check]] = []
    teacher, num_tokens = _tokens(patient, checks)
    plan = _stop_plan(patient, teacher, num_tokens, checks)
    checks.append(("prompts", lessons.prompt_lengths(patient)))
    lengths = [len(ids) for ids in patient.prompt_ids]
    context_s = patient.student.context
    context_t = None if patient.teacher is None else patient.teacher.context
    budget, has_budget = patient.config.rollout.max_new_tokens, patient.settings.has_budget
    skips = patient.config.data.skip_long
    check, context = lessons.contexts(lengths, budget, has_budget, context_s, context_t, skips)
    checks.append(("context", check))
    if plan is not None:
        places, room = choose_prompts(patient, context)
        case = _Case(patient, teacher, plan, num_tokens, context, places, room)
        checks += _written(case)
    device = memory.memory_of_device(patient.device)
    checks.append(("memory", memory.memory(patient, device)))
    if patient.teacher is None:
        checks.append(
            ("", _said("teacher", "none: what compares it with the student is left out."))
        )
    findings = [finding for _, check in checks for finding in check.findings]
    numbers: dict[str, Any] = {}
    for group, check in checks:
        if check.numbers:
            numbers.setdefault(group, {}).update(check.numbers)
    return sorted(findings, key=lambda f: ORDER.index(f.name)), numbers


def _said(name: str, message: str) -> Check:
    return Check((Finding("OK", name, message),))


def _tokens(patient: Patient, checks: list[tuple[str, Check]]) -> tuple[LanguageModel | None, int]:
    """The teacher, where its ids mean what the student's mean; and how many ids are used."""
    student, teacher = patient.student, patient.teacher
    texts: list[str] = []
    for prompt in patient.prompts[:NUM_TEXTS] if patient.has_data else ():
        texts.append(_text(prompt))
        texts += [prompt.solution] if prompt.solution else []
    same = tokens.tokenizers(student, teacher, texts)
    checks.append(("tokenizers", same))
    own: list[Finding] = [tokens.sampling(student, patient.config)]
    data, first = patient.config.data, patient.prompts[0]
    setting, kwargs = data.chat_template, data.chat_template_kwargs
    if teacher is not None:
        own.append(tokens.chat_templates(student, teacher, first, setting, kwargs))
    opening = tokens.generation_prompt(student, first, setting, kwargs)
    own += [opening] if opening else []
    own += [Finding("WARN", "text part", note) for note in student.notes]
    optimizer = patient.config.optimizer
    if rounding := models.rounding_note(student.model, optimizer.learning_rate):
        fix = "leave student.dtype at auto: float32 weights, and bfloat16 products on a GPU."
        own.append(Finding("WARN", "precision", rounding, fix))
    checks.append(("", Check(tuple(own))))
    if same.numbers.get("num_differing_ids"):
        teacher = None
    sizes = tokens.vocabulary(student, teacher, _used_ids(patient))
    checks.append(("vocabulary", sizes))
    if sizes.numbers["shared"] < sizes.numbers["num_needed"]:
        return None, sizes.numbers["student_logits"]
    return teacher, sizes.numbers["shared"]


def _used_ids(patient: Patient) -> set[int]:
    """Ids of prompts and solutions."""
    solutions = [p.solution for p in patient.prompts if p.solution and patient.has_data]
    encoded = encode_texts(patient.student.tokenizer, solutions, "the solutions")
    return {i for ids in (*patient.prompt_ids, *encoded) for i in ids}


def _text(prompt: Prompt) -> str:
    text = prompt.prompt
    return text if isinstance(text, str) else "\n".join(m.content for m in text)


def _stop_plan(
    patient: Patient,
    teacher: LanguageModel | None,
    num_tokens: int,
    checks: list[tuple[str, Check]],
) -> StopPlan | None:
    """How rollouts end; None where the student cannot write, which a FAIL then says."""
    student, mode = patient.student, patient.config.objective.stop
    if num_tokens <= max(_used_ids(patient), default=-1):
        message = "left out: the student has no logits for ids that the data use."
        checks.append(("", _said("rollouts", message)))
        return None
    found: dict[str, tuple[int, ...]] = {}
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        try:
            ids = stop_ids_of(model.model, model.tokenizer)
            plan_stops(ids, None, None, mode, num_tokens)
        except ModelError as error:
            fix = f"set eos_token_id in generation_config.json of the {role}."
            message = f"those of the {role} cannot be used: {error}"
            checks.append(("", Check((Finding("FAIL", "stop ids", message, fix),))))
        else:
            found[role] = ids
    if "student" not in found:
        return None
    eos = student.tokenizer.eos_token_id
    return plan_stops(found["student"], found.get("teacher"), eos, mode, num_tokens)


def _written(case: _Case) -> list[tuple[str, Check]]:
    """The checks for which the student writes."""
    patient, plan, config = case.patient, case.plan, case.patient.config
    checks: list[tuple[str, Check]] = []
    rollouts: list[Rollout] = []
    start = time.perf_counter()
    if case.room:
        rollouts = case.write(patient.student, plan.decode_ids)
    seconds = time.perf_counter() - start
    budget = config.rollout.max_new_tokens
    if case.room < budget:
        done = f"are written with {case.room} tokens" if case.room else "are left out"
        message = f"{done}: the context holds no more behind these prompts."
        checks.append(("", _said("rollouts", message)))
    sequences = [Sequence(r.prompt_ids, r.completion_ids, False, 0) for r in rollouts]
    as_event, by_token = case.score(sequences), case.score(sequences, is_event=False)
    golden, golden_checks = _golden(case)
    checks += golden_checks
    checks += _stops(case, rollouts, as_event, by_token, [s.completion_ids for s in golden])
    fitting = [s for s in golden if s.index in set(case.places)]
    if case.context is not None:
        fitting = [s for s in fitting if len(s) <= case.context]
    if fitting:
        checks.append(("golden", behaviour.golden_ends(case.score(fitting))))
    if rollouts:
        checks += _repetition(case, rollouts, seconds)
        if case.teacher is not None:
            checks.append(("overlap", behaviour.alignment(as_event, case.num_tokens)))
    checks.append(("loops", _loops(case, rollouts, fitting)))
    return checks


def _golden(case: _Case) -> tuple[list[Sequence], list[tuple[str, Check]]]:
    """Golden solutions, with the place of their prompt as index; and the checks of their texts."""
    patient, config = case.patient, case.patient.config
    if not patient.has_data:
        return [], []
    tokenizer = patient.student.tokenizer
    data = config.data
    texts = [
        render(p, tokenizer, data.chat_template, data.chat_template_kwargs) for p in patient.prompts
    ]
    encoded, refused = lessons.encode_solutions(patient.prompts, tokenizer, case.plan, texts)
    given = patient.settings.is_given
    checks = [lessons.solutions(patient.prompts, encoded, refused, config, given)]
    checks += lessons.grading(patient)
    sequences = [Sequence(patient.prompt_ids[i], ids, True, i) for i, ids in encoded]
    return sequences, [("golden", check) for check in checks]


def _stops(
    case: _Case,
    rollouts: Many[Rollout],
    as_event: Many[TokenScores],
    by_token: Many[TokenScores],
    golden: Many[tuple[int, ...]],
) -> list[tuple[str, Check]]:
    """The audit that `train` makes, and both ways to score a stop beside each other."""
    patient, plan = case.patient, case.plan
    event_stops = behaviour.mean_stop_logps(rollouts, as_event)
    token_stops = behaviour.mean_stop_logps(rollouts, by_token)
    used = event_stops if plan.mode == "event" else token_stops
    if used is None and rollouts and case.teacher is not None:
        used = StopLogps(math.nan, math.nan, 0)  # the audit says that none stopped
    found = audit(
        plan,
        patient.student.tokenizer,
        None if patient.teacher is None else patient.teacher.tokenizer,
        golden,
        (),
        patient.config.rollout.max_new_tokens,
        used,
    )
    # Rollouts may have had less room than golden solutions are held to.
    written = audit(plan, patient.student.tokenizer, None, (), rollouts, case.room, None)
    found += [f for f in written if f.name == "truncation"]
    if case.teacher is not None and plan.teacher_ids is None:
        found = [f for f in found if f.name != "stop ids"]  # a FAIL says it already
    is_given = patient.settings.is_given
    ids = {"student_ids": plan.student_ids, "teacher_ids": plan.teacher_ids}
    scoring = Check()
    if event_stops is not None and token_stops is not None:
        scoring = behaviour.stop_scoring(plan, event_stops, token_stops, is_given)
    is_harmless = is_given or any(f.level == "OK" for f in scoring.findings)
    told = found if is_harmless else [_for_any_trainer(f, plan) for f in found]
    return [("stops", Check(tuple(told), ids)), ("stops", scoring)]


def _for_any_trainer(finding: Finding, plan: StopPlan) -> Finding:
    """Without a configuration the run may be made by a trainer that scores token by token."""
    differ = plan.teacher_ids is not None and plan.student_ids != plan.teacher_ids
    if finding.name != "stop ids" or finding.level != "OK" or not differ:
        return finding
    fix = (
        'keep objective.stop = "event" (the default); a trainer that scores stops token by token '
        "needs models with one stop id, or the student unlearns to stop (cause A)."
    )
    return dataclasses.replace(finding, level="WARN", fix=fix)


def _repetition(case: _Case, rollouts: Many[Rollout], seconds: float) -> list[tuple[str, Check]]:
    """How both models repeat; the teacher writes where that is not much slower."""
    config = case.patient.config
    check, used = behaviour.repetition(rollouts, config.repetition, case.room)
    checks = [("student", check)]
    teacher = case.teacher
    if teacher is None:
        return checks
    times = teacher.model.num_parameters() / case.patient.student.model.num_parameters()
    if seconds * times > TEACHER_SECONDS:
        message = f"left out: they would take about {seconds * times / 60:.0f} minutes here."
        return [*checks, ("", _said("teacher rollouts", message))]
    written = case.write(teacher, case.stop_ids)
    check = behaviour.teacher_rollouts(written, rollouts, used, case.room)
    answers = lessons.teacher_answers(case.patient, case.places, written)
    return [*checks, ("teacher", check), ("teacher", answers)]


def _loops(case: _Case, rollouts: Many[Rollout], golden: Many[Sequence]) -> Check:
    """The loop test on rollouts that stopped, else on golden solutions, else on all others."""
    stopped = [r for r in rollouts if r.stop_reason is StopReason.STOP]
    cut = [r for r in rollouts if r.stop_reason is StopReason.LENGTH]
    sources = [(r.prompt_ids, r.completion_ids[:-1]) for r in stopped]
    sources += [(s.prompt_ids, s.completion_ids[:-1]) for s in golden]
    sources += [(r.prompt_ids, r.completion_ids) for r in cut]
    decode = case.patient.student.tokenizer.decode
    completions = [(p, ids, [decode([i]) for i in ids]) for p, ids in sources]
    trials = loops.make_trials(completions, case.context, len(case.places))
    scores = case.score([t.sequence for t in trials])
    teacher = None if case.teacher is None else [s.teacher for s in scores]
    is_held = case.patient.settings.is_given and bool(case.patient.config.objective.lambda_gold)
    return loops.loop_test(trials, [s.student for s in scores], teacher, is_held)
