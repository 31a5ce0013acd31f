"""Full-vocabulary reverse KL and the whole StableOPD step beside TRL's `DistillationTrainer`.

    python benchmarks/bench_distillation_step.py

TRL's step is its plain one for both: it has no StableOPD.
"""

from __future__ import annotations

import common
import steps


def main() -> None:
    options = common.options(__doc__, minutes=12)
    steps.heading("DistillationTrainer")
    whole = {"cpu_s": 1.0, "memory_mb": 0.5}
    rows = {
        "small": ((1, 5), {"gkd": {"cpu_s": 0.5, "memory_mb": 0.6}, "stable_opd": whole}),
        "large": ((1, 1), {"gkd": {"cpu_s": 0.35, "memory_mb": 0.35}, "stable_opd": whole}),
    }
    quick = {"tiny": ((1, 1), {"gkd": {}, "stable_opd": {}})}
    for world, (counts, methods) in options.choose(rows, quick).items():
        steps.compare(options, methods, "DistillationTrainer", world, counts)


if __name__ == "__main__":
    main()
