"""A step of plain on-policy distillation beside TRL's `IWOPDTrainer` with gamma 0.

    python benchmarks/bench_opd_step.py

Generation, teacher, update and log of one step, CPU; the same models made from a seed, the same
prompt four times, and the same number of tokens: the stop id has probability 0 in both.
"""

from __future__ import annotations

import common
import steps


def main() -> None:
    options = common.options(__doc__, minutes=2)
    steps.heading("IWOPDTrainer")
    world, counts = options.choose(("small", (1, 5)), ("tiny", (1, 1)))
    steps.compare(options, {"opd": {"cpu_s": 0.45}}, "IWOPDTrainer", world, counts)


if __name__ == "__main__":
    main()
