"""The whole StableOPD step beside the plain step of TRL's `DistillationTrainer`, at two sizes.

    python benchmarks/bench_stable_opd_step.py

As bench_opd_step.py. Ours has four terms to compute: teacher, exact KL to the reference, and the
golden cross entropy of one solution for four rollouts, as long as a rollout. The peer has one.
"Memory above the start" leaves models out, and so our reference; "the whole process" has it.
"""

from __future__ import annotations

import common
import steps


def main() -> None:
    options = common.options(__doc__, minutes=7.5)
    steps.heading("DistillationTrainer")
    rows = {"small": (1, 5), "large": (1, 1)}
    targets = {"cpu_s": 1.0, "memory_mb": 0.5}
    for world, counts in options.choose(rows, {"tiny": (1, 1)}).items():
        steps.compare(options, "stable_opd", "DistillationTrainer", world, counts, targets)


if __name__ == "__main__":
    main()
