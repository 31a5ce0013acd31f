"""What a configuration may say: choices, ranges, and combinations that cannot work."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from stableopd.config_servers import engine_rules, teacher_rules
from stableopd.config_templates import kwargs_fault
from stableopd.types import ConfigError

if TYPE_CHECKING:
    from stableopd.config import Config

__all__ = ["DTYPES", "RAISING", "check", "check_section"]

# Names of the types that weights may have; "auto" depends on the device.
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")

CHOICES: dict[str, tuple[str, ...]] = {
    "run.device": ("auto", "cpu", "cuda", "mps"),
    "run.trackers": ("tensorboard", "wandb", "trackio"),
    "student.dtype": DTYPES,
    "teacher.dtype": DTYPES,
    "data.grader": ("auto", "exact", "math"),
    "rollout.engine": ("transformers", "vllm"),
    "objective.method": ("opd", "stable_opd", "sft", "grpo", "gkd"),
    "objective.reference_kl": ("exact", "k1", "k2", "k3"),
    "objective.stop": ("event", "token"),
    "objective.advantage": (
        "log_ratio",
        "clip",
        "soft_log",
        "tanh",
        "power",
        "floor",
        "group_reward",
    ),
    "objective.baseline": ("none", "kl"),
    "objective.aggregation": ("sequence", "token", "constant"),
    "objective.divergence": ("reverse_kl", "forward_kl", "jensen_shannon"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "alarm.action": ("none", "warn", "stop", "rollback", "strengthen"),
}

# Fields whose values must lie in a range: (lowest, highest, is the lowest itself allowed).
RANGES: dict[str, tuple[float, float, bool]] = {
    "run.seed": (0, 10**9, True),
    "run.steps": (1, 10**9, True),
    "run.save_every": (1, 10**9, True),
    "run.rollouts_every": (1, 10**9, True),
    "run.keep_checkpoints": (0, 10**9, True),
    "student.lora_rank": (0, 10**6, True),
    "student.lora_alpha": (1, 10**6, True),
    "teacher.temperature": (0, 100, False),
    "teacher.max_in_flight": (1, 10_000, True),
    "teacher.timeout_s": (0, 10**6, False),
    "teacher.patience_s": (0, 10**6, True),
    "rollout.prompts_per_step": (1, 10**9, True),
    "rollout.rollouts_per_prompt": (1, 10**6, True),
    "rollout.max_new_tokens": (1, 10**9, True),
    "rollout.max_prompt_tokens": (1, 10**9, True),
    "rollout.temperature": (0, 100, False),
    "rollout.top_p": (0, 1, False),
    "rollout.top_k": (0, 10**9, True),
    "rollout.batch_size": (0, 10**9, True),
    "rollout.tolerance": (0, 100, True),
    "rollout.timeout_s": (0, 10**6, False),
    "rollout.patience_s": (0, 10**6, True),
    "objective.lambda_policy": (0, 1e9, True),
    "objective.lambda_gold": (0, 1e9, True),
    "objective.lambda_divergence": (0, 1e9, True),
    "objective.beta_reference": (0, 1e9, True),
    "objective.advantage_parameter": (0, 1e9, False),
    "objective.first_n": (0, 10**9, True),
    "objective.prefix_gain": (0, 100, True),
    "objective.clip": (0, 1, False),
    "objective.updates_per_batch": (1, 1000, True),
    "objective.top_k": (0, 10**9, True),
    "optimizer.learning_rate": (1e-12, 1, True),  # below, float32 weights do not move
    "optimizer.schedule_steps": (0, 10**9, True),
    "optimizer.warmup_steps": (0, 10**9, True),
    "optimizer.grad_clip": (1e-6, 1e9, True),  # below, AdamW's epsilon is all there is
    "optimizer.weight_decay": (0, 10, True),
    "optimizer.beta1": (0, 0.999999, True),
    "optimizer.beta2": (0, 0.999999, True),
    "optimizer.micro_batch_tokens": (1, 10**9, True),
    "eval.every": (1, 10**9, True),
    "eval.samples": (1, 65_536, True),
    "eval.temperature": (0, 100, True),
    "eval.top_p": (0, 1, False),
    "eval.max_new_tokens": (0, 10**9, True),
    "eval.max_problems": (0, 10**9, True),
    "eval.batch_size": (1, 10**9, True),
    "repetition.window_chars": (1, 10**9, True),
    "repetition.ratio": (1, 1e9, True),
    "repetition.ngram": (1, 10**6, True),
    "repetition.min_run": (0, 10**9, True),
    "alarm.max_actions": (1, 10**6, True),
    "alarm.factor": (1, 1e6, False),
}

# Design: all rollouts of a step are held at once.
MAX_ROLLOUTS = 10**6

# Actions of the alarm that raise the weights of the golden and the reference term.
RAISING = ("rollback", "strengthen")


def check(config: Config, source: str) -> None:
    """Refuse a configuration that cannot do what it says, with the reason.

    Args:
        config: A configuration whose presets are filled in.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: The first thing that is wrong with it.
    """
    for section in dataclasses.fields(config):
        check_section(source, section.name, getattr(config, section.name))
    for wrong, reason in (
        *_term_rules(config),
        *_policy_rules(config),
        *_run_rules(config),
        *_template_rules(config),
        *teacher_rules(config),
        *engine_rules(config),
        *_alarm_rules(config),
    ):
        if wrong:
            raise ConfigError(f"{source}: {reason}")


def check_section(source: str, name: str, values: Any) -> None:
    """Refuse a value that is no choice of its field, or out of its range.

    Args:
        source: Where it comes from, for messages.
        name: Name of the section.
        values: The section.

    Raises:
        ConfigError: The first such value.
    """
    for f in dataclasses.fields(values):
        _check_field(source, f"{name}.{f.name}", getattr(values, f.name))


def _check_field(source: str, name: str, value: Any) -> None:
    items = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
    for item in items:
        if item is not None and name in CHOICES and item not in CHOICES[name]:
            raise ConfigError(
                f"{source}: {name} = {item!r} is not possible; "
                f"choose from {', '.join(CHOICES[name])}."
            )
    if isinstance(value, int | float) and name in RANGES:
        low, high, closed = RANGES[name]
        if not (low <= value <= high) or (value == low and not closed):
            bound = "at least" if closed else "more than"
            raise ConfigError(
                f"{source}: {name} = {value} must be {bound} {low:g} and at most {high:g}."
            )


def _term_rules(config: Config) -> list[tuple[bool, str]]:
    o = config.objective
    policy, divergence = bool(o.lambda_policy), bool(o.lambda_divergence)
    return [
        (
            not (policy or o.lambda_gold or divergence or o.beta_reference),
            "[objective] has no term left: lambda_policy, lambda_gold, lambda_divergence and "
            "beta_reference are all 0.",
        ),
        (
            o.top_k > 0 and not divergence,
            "objective.top_k is the support of the divergence term, whose weight "
            "objective.lambda_divergence is 0; use method = 'gkd' or leave it out.",
        ),
        (
            not policy
            and (o.first_n > 0 or o.prefix_gain > 0 or o.mask_truncated or o.baseline != "none"),
            "objective.first_n, prefix_gain, mask_truncated and baseline act on the policy term, "
            "whose weight objective.lambda_policy is 0.",
        ),
        (
            not policy and o.updates_per_batch > 1,
            "objective.updates_per_batch above 1 needs the policy term and its ratio, but "
            "objective.lambda_policy is 0.",
        ),
        (
            not policy and bool(o.beta_reference) and o.reference_kl == "k1",
            "objective.reference_kl = 'k1' is a reward of the policy term, but "
            "objective.lambda_policy is 0; choose 'exact', 'k2' or 'k3'.",
        ),
    ]


def _policy_rules(config: Config) -> list[tuple[bool, str]]:
    o, r = config.objective, config.rollout
    policy, rewards = bool(o.lambda_policy), o.advantage == "group_reward"
    return [
        (
            o.clip is not None and o.updates_per_batch == 1,
            "objective.clip has no effect with one update per batch, where the ratio is 1; "
            "leave it out or set objective.updates_per_batch to 2 or more.",
        ),
        (
            policy and (r.top_p < 1 or r.top_k > 0) and not r.allow_off_policy_sampling,
            "rollout.top_p and rollout.top_k draw from another distribution than the one that the "
            "on-policy objective differentiates; leave them out, or set "
            "rollout.allow_off_policy_sampling = true to do it all the same.",
        ),
        (
            policy and rewards and r.rollouts_per_prompt < 2,
            "objective.advantage = 'group_reward' compares the rollouts of one prompt; set "
            "rollout.rollouts_per_prompt to 2 or more.",
        ),
        (
            rewards and o.baseline == "kl",
            "objective.baseline = 'kl' belongs to the log-ratio advantages, not to group_reward.",
        ),
        (
            o.advantage_parameter is not None
            and o.advantage in ("log_ratio", "soft_log", "group_reward"),
            f"objective.advantage_parameter has no effect with advantage = {o.advantage!r}, which "
            "has no parameter; leave it out or choose clip, tanh, power or floor.",
        ),
        (
            o.advantage == "floor" and (o.advantage_parameter or 0.0) >= 1,
            "objective.advantage_parameter is the floor's mixture weight, which must lie below 1.",
        ),
    ]


def _run_rules(config: Config) -> list[tuple[bool, str]]:
    o, e, r = config.objective, config.eval, config.rollout
    num_rollouts = r.prompts_per_step * r.rollouts_per_prompt
    teaches = bool(o.lambda_policy) and o.advantage != "group_reward"
    return [
        (not config.run.output, "run.output is empty; give the folder of the run."),
        (
            num_rollouts > MAX_ROLLOUTS,
            f"rollout.prompts_per_step times rollout.rollouts_per_prompt is {num_rollouts} "
            f"rollouts a step; at most {MAX_ROLLOUTS} can be held at once.",
        ),
        (
            "embedded" in (config.data.train, config.eval.data)
            and (config.data.grader, config.data.answer_marker)
            not in (("auto", ";#"), ("exact", ";#")),
            'the embedded world writes its answers after ";#"; set data.answer_marker = ";#", and '
            "leave data.grader out.",
        ),
        (
            not config.student.model,
            'student.model is missing; give a folder, a hub name or "embedded".',
        ),
        (
            (teaches or bool(o.lambda_divergence))
            and not (config.teacher.model or config.teacher.url),
            f"objective.method = {o.method!r} needs a teacher; give teacher.model as a folder, a "
            'hub name or "embedded", or teacher.url as the address of a server.',
        ),
        (
            not config.data.train,
            "data.train is missing; give a .jsonl or .parquet file, a datasets folder or "
            '"embedded".',
        ),
        (
            config.data.grader == "math" and bool(config.data.answer_marker),
            "data.answer_marker belongs to grader = 'exact'; math-verify finds the answer itself.",
        ),
        (
            e.temperature == 0 and e.samples > 1,
            "eval.temperature = 0 is greedy, so eval.samples above 1 would repeat one answer; "
            "set eval.samples = 1.",
        ),
    ]


def _template_rules(config: Config) -> list[tuple[bool, str]]:
    data = config.data
    fault = kwargs_fault(data.chat_template_kwargs)
    return [
        (bool(fault), f"data.chat_template_kwargs {fault}"),
        (
            not data.chat_template,
            "data.chat_template is empty; give auto, none, or a file with a Jinja template.",
        ),
        (
            data.chat_template == "none" and bool(data.chat_template_kwargs),
            'data.chat_template_kwargs has no effect with data.chat_template = "none".',
        ),
    ]


def _alarm_rules(config: Config) -> list[tuple[bool, str]]:
    o, action = config.objective, config.alarm.action
    writes = bool(o.lambda_policy) or bool(o.lambda_divergence) or bool(o.beta_reference)
    return [
        (
            action not in ("none", "warn") and not writes,
            f"alarm.action = {action!r} answers a collapse of the rollouts, and objective.method = "
            f"{o.method!r} writes none; leave alarm.action out.",
        ),
        (
            action in RAISING and not o.lambda_policy and o.reference_kl == "k1",
            f"alarm.action = {action!r} turns the reference term on, but objective.reference_kl = "
            "'k1' is a reward of the policy term, whose weight objective.lambda_policy is 0; "
            "choose 'exact', 'k2' or 'k3'.",
        ),
    ]
