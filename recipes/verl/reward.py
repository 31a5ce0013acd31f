"""The reward that verl logs: whether the answer is right, by our grader.

verl calls `compute_score` for every row, golden ones too, in its reward workers.
"""

from __future__ import annotations

from typing import Any

from stableopd.data.grading import grade


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """1.0 for the right answer, 0.0 for any other.

    `extra_info` names grader and marker, as prepare.py wrote them.
    """
    grader, marker = extra_info["grader"], extra_info["answer_marker"]
    return float(grade(solution_str, ground_truth, grader, marker))
