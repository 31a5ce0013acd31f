"""How truly `find_onset` finds the changes of made series: false changes, missed ones, errors.

    python recipes/alarm/simulate_onset.py [NUM_SERIES]

Each row is NUM_SERIES (200) series of 100 steps with binomial noise, drawn from a fixed seed. The
interval covers where it contains the true step; the error is in steps.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable

import numpy as np

from stableopd.diagnostics.onset import find_onset

STEPS = np.arange(1, 101)
Array = np.ndarray


def ramp(start: int, width: int, before: float, after: float) -> Array:
    return before + (after - before) * np.clip((STEPS - start) / width, 0, 1)


def jump(step: int, before: float, after: float) -> Array:
    return np.where(step > STEPS, before, after)


def bump(corners: list[int], low: float = 0.05, height: float = 0.39) -> Array:
    return low + height * np.interp(STEPS, corners, [0, 1, 1, 0])


# name: the true rates, what should be found, the true first step off the old level
CASES: dict[str, tuple[Array, str, int | None]] = {
    **{f"constant {p}": (np.full(100, p), "none", None) for p in (0, 0.02, 0.1, 0.23, 0.5, 0.9)},
    "drift .1 to .35": (np.linspace(0.1, 0.35, 100), "none", None),
    "step .1 to .9": (jump(40, 0.1, 0.9), "rise", 40),
    "step .5 to .95": (jump(40, 0.5, 0.95), "rise", 40),
    "step .2 to .45": (jump(40, 0.2, 0.45), "rise", 40),
    "ramp .5 to .95 in 30": (ramp(40, 30, 0.5, 0.95), "rise", 41),
    "ramp 0 to .95 in 30": (ramp(40, 30, 0, 0.95), "rise", 41),
    "logistic 0 to .95": (0.95 / (1 + np.exp(-(STEPS - 60) / 5)), "rise", 50),
    "early, at step 3": (ramp(2, 3, 0.1, 0.95), "rise", 3),
    "unfinished": (ramp(80, 40, 0.1, 0.95), "rise", 81),
    "two rises": (np.maximum(jump(30, 0.1, 0.5), jump(60, 0.1, 0.95)), "rise", 30),
    "healed": (bump([30, 38, 50, 60]), "healed", 31),
    "fall": (jump(40, 0.6, 0.1), "fall", 40),
}


def wandering(rng: np.random.Generator, correlation: float, deviation: float) -> Array:
    noise = np.zeros(100)
    for i in range(1, 100):
        step = rng.normal() * deviation * np.sqrt(1 - correlation**2)
        noise[i] = correlation * noise[i - 1] + step
    return np.clip(0.5 + noise, 0, 1)


def row(
    name: str, draw: Callable[[np.random.Generator], Array], count: int | None, case: str, num: int
) -> None:
    expected, truth = CASES[case][1:]
    rng = np.random.default_rng(sum(map(ord, name)))
    kinds: collections.Counter[str] = collections.Counter()
    errors: list[int] = []
    covered = 0
    for _ in range(num):
        counts = None if count is None else np.full(100, count)
        found = find_onset(STEPS.tolist(), draw(rng), counts)
        kinds[found.kind] += 1
        if found.kind == expected and truth and found.step is not None and found.interval:
            errors.append(abs(found.step - truth))
            covered += found.interval[0] <= truth <= found.interval[1]
    cells = [name, f"{kinds[expected] / num:.3f} {expected}"]
    if errors:
        cells += [f"{np.median(errors):.0f}, {np.percentile(errors, 90):.0f}"]
        cells += [f"{covered / len(errors):.2f}"]
    print("| " + " | ".join(cells + ["-"] * (4 - len(cells))) + " |", flush=True)


def main() -> None:
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print("| series, rollouts a step | found | error: median, 90% | interval covers |")
    print("|---|---|---|---|")
    for case, (rates, _, _) in CASES.items():
        for count in (4, 16, 64, 256):

            def draw(rng: np.random.Generator, rates: Array = rates, count: int = count) -> Array:
                return rng.binomial(count, rates) / count

            if count > 4 or case.startswith("constant"):
                row(f"{case}, {count}", draw, count, case, num)
    for correlation, deviation in ((0.5, 0.05), (0.8, 0.05), (0.9, 0.08), (0.9, 0.12)):
        name = f"wandering about .5, autocorrelation {correlation}, deviation {deviation}"

        def wander(
            rng: np.random.Generator, correlation: float = correlation, deviation: float = deviation
        ) -> Array:
            return wandering(rng, correlation, deviation)

        row(name, wander, None, "constant 0.5", num)


if __name__ == "__main__":
    main()
