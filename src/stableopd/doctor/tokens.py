"""Do the two models mean the same by a token, and does the teacher read what the student reads?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from typing import Any

from stableopd.config import Config
from stableopd.data.prompts import render
from stableopd.data.splits import PROBES, split_differently, why_split
from stableopd.data.templates import is_templated, run_template
from stableopd.doctor.patient import Check
from stableopd.models import LanguageModel, head_of
from stableopd.rollout.stops import Finding
from stableopd.text import quoted
from stableopd.types import DataError, Prompt

__all__ = ["chat_templates", "generation_prompt", "sampling", "tokenizers", "vocabulary"]

MAX_TEXTS = 32
ANSWER = "An answer."
SHOWN_CHARS = 40


def tokenizers(student: LanguageModel, teacher: LanguageModel | None, texts: Many[str]) -> Check:
    """Whether ids mean the same to both models, by their maps and by what they make of texts.

    Names of tokenizers, folders and classes are not compared. Tokens that one of the two added
    behind the other's last id contradict nothing.

    Args:
        student: The student.
        teacher: The teacher, or None.
        texts: Prompts and solutions of the user, encoded beside a few made-up strings.

    Returns:
        FAIL where an id means two things, WARN where the maps agree but texts are split
        differently or do not survive encoding and decoding.
    """
    texts = [*texts[:MAX_TEXTS], *PROBES]
    findings = (
        [_round_trip(student.tokenizer, texts[: -len(PROBES)])] if texts[len(PROBES) :] else []
    )
    if teacher is None:
        return Check(tuple(findings))
    mine, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    numbers = {"num_student": len(mine), "num_teacher": len(theirs)}
    differing = _differing_ids(mine, theirs)
    numbers["num_differing_ids"] = len(differing)
    if differing:
        first = differing[0]
        names = [{i: token for token, i in v.items()}.get(first) for v in (mine, theirs)]
        message = (
            f"{len(differing)} ids mean different tokens; the first is id {first}, {names[0]!r} to "
            f"the student and {names[1]!r} to the teacher. What compares the two is left out below."
        )
        fix = "use models that share one tokenizer: distillation compares token by token."
        return Check((Finding("FAIL", "tokenizers", message, fix), *findings), numbers)
    split = split_differently(student, teacher, texts)
    numbers |= {"num_texts": len(texts), "num_split_differently": len(split)}
    same = (
        f"{len(mine)} and {len(theirs)} tokens"
        if len(mine) != len(theirs)
        else f"{len(mine)} tokens"
    )
    if split:
        why, fix = why_split(student, teacher, split[0])
        message = (
            f"every shared id means the same ({same}), but {len(split)} of {len(texts)} texts are "
            f"split differently, {why}."
        )
        return Check((Finding("WARN", "tokenizers", message, fix), *findings), numbers)
    message = f"every id means the same to both ({same}), and {len(texts)} texts get the same ids."
    return Check((Finding("OK", "tokenizers", message), *findings), numbers)


def vocabulary(
    student: LanguageModel, teacher: LanguageModel | None, used_ids: Iterable[int] = ()
) -> Check:
    """How many logits both models have, beside the ids of the tokenizer.

    Args:
        student: The student.
        teacher: The teacher; None without one, or where its ids mean something else.
        used_ids: Ids that the data use.

    Returns:
        FAIL where a model has no logit for an id that is used, else OK; in its numbers "shared" is
        how many ids are compared, and "num_needed" how many must be.
    """
    models = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    rows = {role: int(head_of(m.model).weight_VD.shape[0]) for role, m in models.items()}
    num_ids = max(student.tokenizer.get_vocab().values()) + 1
    shared = min(rows.values())
    numbers = {f"{role}_logits": size for role, size in rows.items()}
    needed = max(used_ids, default=-1) + 1
    numbers |= {"tokenizer_ids": num_ids, "shared": shared, "num_needed": needed}
    sizes = ", ".join(f"the {role} has logits for {size:,} ids" for role, size in rows.items())
    message = f"{sizes}; the tokenizer uses {num_ids:,}"
    if shared < needed:
        small = min(rows, key=lambda role: rows[role])
        token = student.tokenizer.convert_ids_to_tokens(needed - 1)
        message += f", and the data use {token!r} (id {needed - 1})"
        fix = f"resize the embeddings of the {small} to {num_ids} rows, or use another model."
        return Check((Finding("FAIL", "vocabulary", f"{message}.", fix),), numbers)
    if shared < num_ids:
        message += f"; no text here uses the ids from {shared:,} on"
    elif len(set(rows.values())) > 1:
        message += f"; the first {shared:,} are compared, the padding after them is never drawn"
    return Check((Finding("OK", "vocabulary", f"{message}."),), numbers)


def chat_templates(
    student: LanguageModel,
    teacher: LanguageModel,
    prompt: Prompt,
    setting: str,
    kwargs: Mapping[str, Any] | None = None,
) -> Finding:
    """Whether the teacher would write a prompt as it is about to read it.

    Args:
        student: The student, whose tokenizer writes the prompts.
        teacher: The teacher.
        prompt: One prompt.
        setting: `data.chat_template`.
        kwargs: `data.chat_template_kwargs`.

    Returns:
        WARN where one of the two has a template and the other none, or where their texts differ.
    """
    name = "chat template"
    mine, theirs = _template(student), _template(teacher)
    if not mine and not theirs:
        return Finding("OK", name, "neither tokenizer has one; prompts are read as plain text.")
    if mine and not theirs and setting != "none":
        return Finding(
            "WARN",
            name,
            "prompts go through the student's template, and the teacher has none: it may never "
            "have seen such a text.",
            'set data.chat_template = "none", or use a teacher that was trained on this template.',
        )
    if theirs and (not mine or setting == "none"):
        why = "the student has none" if not mine else 'data.chat_template is "none"'
        return Finding(
            "WARN",
            name,
            f"the teacher has a template, but {why}: it reads prompts as plain text, which it was "
            "not trained on last.",
            'give the student the teacher\'s template and set data.chat_template = "auto", or '
            "use the base model as teacher.",
        )
    if not theirs:
        return Finding("OK", name, 'data.chat_template is "none", and the teacher has none.')
    try:
        texts = [render(prompt, m.tokenizer, setting, kwargs) for m in (student, teacher)]
    except DataError as error:
        return Finding("WARN", name, f"one of the two templates fails: {error}", "compare the two.")
    if texts[0] == texts[1]:
        return Finding("OK", name, "both templates write the first prompt in the same way.")
    return Finding(
        "WARN",
        name,
        f"the templates differ: {_difference(*texts)}.",
        "use models with one chat format, or prompts that are written out with "
        'data.chat_template = "none".',
    )


def generation_prompt(
    student: LanguageModel, prompt: Prompt, setting: str, kwargs: Mapping[str, Any]
) -> Finding | None:
    """Whether the template opens the answer that the student is to write.

    Args:
        student: The student.
        prompt: One prompt.
        setting: `data.chat_template`.
        kwargs: `data.chat_template_kwargs`.

    Returns:
        WARN where it writes the same with and without a generation prompt, though an answer in a
        conversation has a header; None where prompts go through no template.
    """
    name, tokenizer = "generation prompt", student.tokenizer
    if not is_templated(tokenizer, setting):
        return None
    turns = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1].content
    asked = [{"role": "user", "content": turns}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    try:
        opened, plain = (
            run_template(tokenizer, asked, kwargs, "the first prompt", has) for has in (True, False)
        )
        whole = run_template(tokenizer, answered, kwargs, "the first prompt", False)
    except DataError as error:
        return Finding("WARN", name, f"not looked at: {error}", "look at the template.")
    if opened != plain:
        added = opened.removeprefix(plain)
        return Finding("OK", name, f"prompts end with {quoted(added)}, where the answer begins.")
    header = whole[len(opened) :].partition(ANSWER)[0] if whole.startswith(opened) else ""
    if not header.strip():
        return Finding("OK", name, "the template writes none, and its answers have no header.")
    return Finding(
        "WARN",
        name,
        "the template writes the same with and without add_generation_prompt: a prompt ends with "
        f"{_end(opened)}, and in a conversation {quoted(header)} stands between it and the answer, "
        "which the student would have to write itself.",
        "set data.chat_template to a file with a template that writes it where "
        "add_generation_prompt is set.",
    )


def sampling(student: LanguageModel, config: Config) -> Finding:
    """With which settings rollouts are drawn, and which of the model's own are not used.

    Args:
        student: The student.
        config: The configuration.

    Returns:
        WARN where rollouts do not come from the distribution that is differentiated.
    """
    r = config.rollout
    message = f"rollouts at temperature {r.temperature:g}, top-p {r.top_p:g}, top-k {r.top_k}"
    own = getattr(student.model, "generation_config", None)
    fields = ("temperature", "top_p", "top_k", "repetition_penalty")
    unused = {f: getattr(own, f, None) for f in fields}
    named = [f"{f} {value:g}" for f, value in unused.items() if value is not None and value != 1]
    if named:
        message += f"; the student's generation_config ({', '.join(named)}) is not used in training"
    if (r.top_p < 1 or r.top_k) and config.objective.lambda_policy:
        fix = "set rollout.top_p = 1 and rollout.top_k = 0."
        message += ": the cut distribution is not the one that the objective differentiates"
        return Finding("WARN", "sampling", f"{message}.", fix)
    return Finding("OK", "sampling", f"{message}.")


def _round_trip(tokenizer: Any, texts: Many[str]) -> Finding:
    lost = [t for t in texts if tokenizer.decode(_ids(tokenizer, t)).strip() != t.strip()]
    if not lost:
        return Finding("OK", "round trip", f"{len(texts)} texts survive encoding and decoding.")
    return Finding(
        "WARN",
        "round trip",
        f"{len(lost)} of {len(texts)} texts come back changed from encoding and decoding, such as "
        f"{quoted(lost[0])}: the tokenizer does not know all of their characters.",
        "use a tokenizer that covers the data, or clean the data.",
    )


def _differing_ids(mine: dict[str, int], theirs: dict[str, int]) -> list[int]:
    """Ids up to the smaller largest one that stand for two different tokens, in order."""
    student = {i: token for token, i in mine.items()}
    teacher = {i: token for token, i in theirs.items()}
    both = range(min(max(student), max(teacher)) + 1)
    return [i for i in both if student.get(i) != teacher.get(i)]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _template(model: LanguageModel) -> bool:
    return bool(model.tokenizer.chat_template)


def _difference(mine: str, theirs: str) -> str:
    """The place at which two texts part, with what each has there."""
    same = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    parts = [quoted(text[same:]) if text[same:] else "the end" for text in (mine, theirs)]
    before = f"after {_end(mine[:same])} " if same else "at the beginning "
    return f"{before}the student's has {parts[0]}, where the teacher's own has {parts[1]}"


def _end(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else "..." + text[-SHOWN_CHARS:])
