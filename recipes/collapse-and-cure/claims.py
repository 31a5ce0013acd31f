"""The paper's claims, each with the rule that decides it here and the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from outcomes import Outcome, Spread, paired

__all__ = ["Claim", "judge"]

Arms = Mapping[str, Sequence[Outcome]]

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"

# The paper's transition takes about 30 steps. Its TruncRate starts at .5 or .23, ours at 0.
WIDTH = 30
LOCKED = 0.5  # TruncRate that a run without recovery never falls below again
IMPROVED = 0.1  # of accuracy before the collapse, over the start


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: What the paper says.
        rule: When it counts as reproduced.
        verdict: "reproduced", "contradicted" or "undecided".
        evidence: The numbers.
    """

    text: str
    rule: str
    verdict: str
    evidence: str


def judge(arms: Arms, scarce: Arms | None = None) -> list[Claim]:
    """All claims for which there are runs.

    Args:
        arms: The finished runs of the arms of "main" and "recovery", by the arm's name.
        scarce: Those of "scarce", for which the comparisons between methods are made again.

    Returns:
        The claims, in the paper's order.
    """
    made: list[tuple[Callable[[Arms], Claim], tuple[str, ...]]] = [
        (_stable_first, ("opd",)),
        (_abrupt, ("opd",)),
        (_no_recovery, ("opd-300",)),
        (_less_negative, ("opd",)),
        (_growing_share, ("opd",)),
        (_kl_weak, ("opd", "opd-kl-0.01", "opd-kl-0.1")),
        (_mixture_strong, ("opd-golden", "stable_opd")),
        (_both_best, ("opd-golden", "stable_opd")),
        (_above_sft, ("sft", "stable_opd")),
        (_above_grpo, ("grpo", "stable_opd")),
    ]
    found = [claim(arms) for claim, needed in made if all(arms.get(name) for name in needed)]
    for claim, needed in made[-3:]:
        if scarce and all(scarce.get(name) for name in needed):
            again = claim(scarce)
            found.append(replace(again, text=f"{again.text}, with 64 training problems"))
    return found


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _share_verdict(num_true: int, num: int) -> str:
    if num and num_true == num:
        return REPRODUCED
    return CONTRADICTED if num and num_true == 0 else UNDECIDED


def _stable_first(arms: Arms) -> Claim:
    gains: list[float] = []
    for run in arms["opd"]:
        onset = run.jump[0] if run.jump else run.lines[-1]["step"]
        before = [value for step, value in run.accuracies if step <= onset]
        gains.append(max(before) - run.accuracies[0][1])
    num = sum(gain > IMPROVED for gain in gains)
    return Claim(
        "OPD first improves: a stable phase comes before the collapse",
        f"accuracy rises by more than {IMPROVED} before the jump, in every seed",
        _share_verdict(num, len(gains)),
        f"{num} of {len(gains)} seeds; gain {min(gains):.2f} to {max(gains):.2f}",
    )


def _abrupt(arms: Arms) -> Claim:
    jumps = [run.jump for run in arms["opd"]]
    widths = [jump[1] - jump[0] for jump in jumps if jump]
    num = sum(width <= WIDTH for width in widths)
    starts = [jump[0] for jump in jumps if jump]
    return Claim(
        "The collapse is an abrupt transition, within about 30 steps",
        f"TruncRate goes from below .2 to above .8 within {WIDTH} steps, in every seed",
        _share_verdict(num, len(jumps)),
        f"{num} of {len(jumps)} seeds; width {min(widths)} to {max(widths)} steps (median "
        f"{median(widths):g}), from step {min(starts)} to {max(starts)} on"
        if widths
        else f"0 of {len(jumps)} seeds jump",
    )


def _no_recovery(arms: Arms) -> Claim:
    runs = [run for run in arms["opd-300"] if run.jump]
    stays, after = 0, []
    for run in runs:
        end = run.jump[1] if run.jump else 0
        later = [rate for step, rate in run.series("rollout/truncation_rate") if step > end + 10]
        stays += min(later) > LOCKED
        after.append(max(value for step, value in run.accuracies if step > end + 20))
    return Claim(
        "Accuracy does not come back",
        f"in 300 steps of OPD TruncRate stays above {LOCKED} after the jump, in every seed",
        _share_verdict(stays, len(runs)),
        f"{stays} of {len(runs)} seeds of 300 steps; highest accuracy later than 20 steps after "
        f"the jump {max(after, default=0):.2f}",
    )


def _less_negative(arms: Arms) -> Claim:
    regular = _after_jump(arms["opd"], "advantage/regular_mean")
    repetitive = _after_jump(arms["opd"], "advantage/repetitive_mean")
    num = sum(r > o for r, o in zip(repetitive, regular, strict=True))
    return Claim(
        "Repetitive tokens carry a larger (less negative) advantage than regular ones",
        "their mean advantage after the jump is the larger one, in every seed",
        _share_verdict(num, len(regular)),
        f"{num} of {len(regular)} seeds; after the jump {_mean(repetitive):+.3f} nats against "
        f"{_mean(regular):+.3f}; in the ten steps before it "
        f"{_mean(_before_jump(arms['opd'], 'advantage/repetitive_mean')):+.3f} against "
        f"{_mean(_before_jump(arms['opd'], 'advantage/regular_mean')):+.3f}",
    )


def _growing_share(arms: Arms) -> Claim:
    key = "rollout/repetitive_share"
    jumped = [run for run in arms["opd"] if run.jump]
    starts = [fmean([v for _, v in run.series(key)][:10]) for run in jumped]
    before, after = _before_jump(arms["opd"], key), _after_jump(arms["opd"], key)
    num = sum(s < b < a for s, b, a in zip(starts, before, after, strict=True))
    return Claim(
        "Their share grows, to a third of all tokens and more",
        "first ten steps < ten steps before the jump < after it, in every seed",
        _share_verdict(num, len(arms["opd"])),
        f"{num} of {len(arms['opd'])} seeds; {_mean(starts):.3f}, {_mean(before):.3f}, "
        f"{_mean(after):.2f} of all tokens",
    )


def _kl_weak(arms: Arms) -> Claim:
    weak, strong = arms["opd-kl-0.01"], arms["opd-kl-0.1"]
    num, total = sum(r.collapsed for r in (*weak, *strong)), len(weak) + len(strong)
    later = [
        run.jump[0] - other.jump[0]
        for run in strong
        for other in arms["opd"]
        if run.seed == other.seed and run.jump and other.jump
    ]
    verdict = _share_verdict(num, total)
    return Claim(
        "KL to the initial student alone helps little",
        "OPD + KL (0.01 and 0.1) collapses as OPD does, in every seed",
        verdict,
        f"{num} of {total} runs collapse; with 0.1 the jump comes "
        f"{median(later) if later else 0:+g} steps later (median)",
    )


def _mixture_strong(arms: Arms) -> Claim:
    runs = [*arms["opd-golden"], *arms["stable_opd"]]
    num = sum(not run.collapsed for run in runs)
    return Claim(
        "The mixture with golden solutions prevents the collapse",
        "no run with the golden term collapses (the paper has it with KL alone)",
        _share_verdict(num, len(runs)),
        f"{num} of {len(runs)} runs do not; OPD + golden without KL, never reported: "
        f"{sum(not r.collapsed for r in arms['opd-golden'])} of {len(arms['opd-golden'])}",
    )


def _both_best(arms: Arms) -> Claim:
    return _better(arms, "opd-golden", "Both terms together are best", "OPD + golden")


def _above_sft(arms: Arms) -> Claim:
    return _better(arms, "sft", "StableOPD ends above SFT", "SFT")


def _above_grpo(arms: Arms) -> Claim:
    return _better(arms, "grpo", "StableOPD ends above GRPO", "GRPO")


def _better(arms: Arms, other: str, text: str, name: str) -> Claim:
    found = paired(arms["stable_opd"], arms[other], lambda run: run.final_accuracy)
    return Claim(
        text,
        f"final accuracy of StableOPD minus that of {name}, paired by seed: the interval of "
        "Student's t lies above 0",
        _sign_verdict(found),
        _difference(found),
    )


def _sign_verdict(found: Spread | None) -> str:
    if found is None:
        return UNDECIDED
    if found.student[0] > 0:
        return REPRODUCED
    return CONTRADICTED if found.student[1] < 0 else UNDECIDED


def _difference(found: Spread | None) -> str:
    if found is None:
        return "no runs"
    low, high = found.student
    return f"{found.mean:+.3f} (95%: {low:+.3f} to {high:+.3f}, {len(found.values)} seeds)"


def _before_jump(runs: Sequence[Outcome], key: str) -> list[float]:
    """Means of a metric over the ten steps before the jump, one for each run that jumps."""
    return [
        fmean(v for step, v in run.series(key) if run.jump[0] - 10 < step <= run.jump[0])
        for run in runs
        if run.jump
    ]


def _after_jump(runs: Sequence[Outcome], key: str) -> list[float]:
    return [
        fmean(v for step, v in run.series(key) if step > run.jump[1]) for run in runs if run.jump
    ]
