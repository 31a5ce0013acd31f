"""Diagnoses made by hand, for the tests of pages and comparisons."""

import math

import numpy as np

from stableopd.diagnostics.onset import Onset
from stableopd.diagnostics.summary import (
    Histogram,
    Measures,
    Parameters,
    Positions,
    PromptMeasures,
    StepMeasures,
    Summary,
    WorstRollout,
)
from stableopd.diagnostics.verdict import Diagnosis, Verdict
from stableopd.types import StopReason

PARAMETERS = Parameters(window_chars=1234, ratio=4.5, ngram=6, min_run=16)

CONFIG = """[run]
output = "runs/{output}"
seed = {seed}
steps = 12
device = "cpu"
trackers = []

[objective]
method = "{method}"
lambda_gold = {gold}
beta_reference = {beta}
"""

HEALTHY = Verdict("healthy", False, "high", "No collapse.", ("TruncRate stays low.",), ())
COLLAPSED = Verdict(
    "B",
    True,
    "high",
    "Truncation collapse from step 5 on: cause B, repetition.",
    ("TruncRate rose from 0.15 to 0.95.", "Repetitive tokens have the greater advantage."),
    ('Train with method = "stable_opd".',),
)

NO_ONSET = Onset("none", None, None, 0.0, 0.1, 0.1, 0.1, 0.05, "No change of phase.")
RISE = Onset("rise", 5, (4, 7), 3.0, 0.15, 0.95, 0.94, 0.99, "It rose.")


def metric_lines(collapses, steps=12, shift=0.0):
    lines = [{"step": 0, "eval/accuracy": 0.06 + shift, "eval/truncation_rate": 0.125}]
    for step in range(1, steps + 1):
        bad = step / steps if collapses else 0.05
        line = {
            "step": step,
            "rollout/mean_length": 40.0 + 70 * bad,
            "rollout/truncation_rate": 0.15 + 0.8 * bad,
            "rollout/repetition_rate": 0.5 * bad,
            "rollout/repetitive_share": 0.6 * bad,
            "rollout/accuracy": 0.1,
            "advantage/mean": -0.4 + 0.3 * bad,
            "advantage/repetitive_mean": None if step < 3 else -0.05,
            "advantage/regular_mean": -0.5,
            "logp/student_mean": -0.9,
            "logp/teacher_mean": -1.3,
            "tokens_per_s": 1500.0,
        }
        if step % 4 == 0:
            line |= {
                "eval/accuracy": 0.06 + 0.01 * step + shift,
                "eval/truncation_rate": 0.1,
                "eval/accuracy_se": 0.02,
            }
        lines.append(line)
    return lines


def worst(completion="abc", **values):
    given = {
        "source": "rollouts/000012.jsonl",
        "line": 3,
        "step": 12,
        "prompt": "What is 1 + 1?",
        "completion": completion,
        "gap": None,
        "spans": (),
        "loop_start": None,
        "loop_text": "",
        "loop_period": 0,
        "loop_copies": 0.0,
        "length": len(completion),
        "repetitive_share": 0.0,
        "stop_reason": StopReason.LENGTH,
        "correct": None,
    }
    return WorstRollout(**{**given, **values})


def positions(steps=12, places=10, width=4, scored=True):
    tokens = np.full((steps, places), 64, dtype=np.int64)
    rising = np.arange(places) / places * np.arange(1, steps + 1)[:, None] / steps
    return Positions(
        width=width,
        steps=np.arange(1, steps + 1),
        num_tokens=tokens,
        num_repetitive=(tokens * rising).astype(np.int64),
        num_scored=tokens if scored else tokens * 0,
        advantage=-0.2 * tokens * (1 - rising) if scored else tokens * 0.0,
    )


def summary(num_steps=12, **values):
    edges = np.append(np.arange(0, 97, 4), 100).astype(np.float64)
    counts = np.zeros(25, dtype=np.int64)
    counts[5:15], counts[24] = 12, 50
    cut = np.zeros(25, dtype=np.int64)
    cut[24] = 50
    steps = [
        StepMeasures(s, Measures(16, mean_length=50.0, truncation_rate=0.5))
        for s in range(1, num_steps + 1)
    ]
    overall = Measures(16 * max(num_steps, 1), mean_length=66.0, median_length=60.0)
    given = {
        "parameters": PARAMETERS,
        "length_unit": "tokens",
        "truncation_source": "file",
        "budget": 96,
        "overall": overall,
        "by_step": tuple(steps),
        "num_prompts": 40,
        "by_prompt": tuple(
            PromptMeasures(f"p{i}", f"prompt {i}", 4, 50.0, 1 - i / 20, 0.5) for i in range(20)
        ),
        "histogram": Histogram(edges, counts, cut),
        "positions": positions(),
        "worst": (
            worst(
                "well, " + "so and " * 5,
                spans=((13, 41),),
                loop_start=6,
                loop_text="so and ",
                loop_period=2,
                loop_copies=5.0,
                repetitive_share=0.8,
                correct=False,
            ),
            worst("nothing repeats", stop_reason=StopReason.STOP, correct=True),
        ),
        "truncated": Measures(50),
        "answered_before_loop": math.nan,
        "marker_share": math.nan,
        "markers": (),
    }
    return Summary(**{**given, **values})


def run(name="opd", collapses=True, seed=0, gold=0.0, beta=0.0, **values):
    """A run with its configuration; `values` replace fields of the diagnosis."""
    method = "opd" if gold == 0.0 else "stable_opd"
    given = {
        "name": name,
        "source": "run folder",
        "summary": summary(),
        "lines": tuple(metric_lines(collapses, shift=0.01 * seed)),
        "onset": RISE if collapses else NO_ONSET,
        "repetition_onset": NO_ONSET,
        "verdict": COLLAPSED if collapses else HEALTHY,
        "notes": ("Which rollouts were cut off is in the files.",),
        "config": CONFIG.format(output=name, seed=seed, method=method, gold=gold, beta=beta),
        "environment": '{"torch": "2.13.0", "gpu": "<none>"}',
    }
    return Diagnosis(**{**given, **values})


def dump(name="rollouts", num_steps=0, **values):
    """A dump of another framework: no configuration and no log-probs, and here no steps."""
    lines = [
        {
            "step": s,
            "rollout/mean_length": 50.0,
            "rollout/truncation_rate": 0.4,
            "rollout/repetitive_share": 0.1,
        }
        for s in range(1, num_steps + 1)
    ]
    overall = Measures(
        400, mean_length=50.0, truncation_rate=0.25, repetition_rate=0.0, repetitive_share=0.1
    )
    steps = np.arange(1, num_steps + 1) if num_steps else np.array([-1])
    given = {
        "summary": summary(
            num_steps,
            overall=overall,
            positions=Positions(
                4, steps, *([np.full((len(steps), 5), 90)] * 2),
                np.zeros((len(steps), 5), dtype=np.int64), np.zeros((len(steps), 5)),
            ),
        ),
        "lines": tuple(lines),
        "source": "TRL (parquet)",
        "config": "",
        "environment": "",
    }  # fmt: skip
    return run(name, collapses=False, **{**given, **values})
