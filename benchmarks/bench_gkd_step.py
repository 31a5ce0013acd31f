"""A full-vocabulary reverse-KL step beside TRL's `DistillationTrainer`, at two sizes.

    python benchmarks/bench_gkd_step.py

As bench_opd_step.py; `gkd` with divergence reverse_kl and their beta = 1 are the same objective.
"""

from __future__ import annotations

import common
import steps


def main() -> None:
    options = common.options(__doc__, minutes=6)
    steps.heading("DistillationTrainer")
    rows = {
        "small": ((1, 5), {"cpu_s": 0.5, "memory_mb": 0.6}),
        "large": ((1, 1), {"cpu_s": 0.35, "memory_mb": 0.35}),
    }
    for world, (counts, targets) in options.choose(rows, {"tiny": ((1, 1), {})}).items():
        steps.compare(options, "gkd", "DistillationTrainer", world, counts, targets)


if __name__ == "__main__":
    main()
