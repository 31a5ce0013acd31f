"""Throughput of RepRate beside bare zlib, with one thread and on all cores.

    python benchmarks/bench_repetition_rate.py

"bare" is `zlib.compress` of windows that are cut out and encoded beforehand, in as many threads,
each with an equal share: nothing can be quicker with zlib. "flags" is `repetition_flags` of the
texts. The labels are compared first. Sides alternate; times are wall time, so the machine should
have nothing else to do.
"""

from __future__ import annotations

import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import common
from common import spread
from stableopd.diagnostics.repetition import repetition_flags

WINDOW, RATIO, NUM_TEXTS = 10_000, 10.0, 1_000
TEXT = "so we get the sum of all x and y is 12 = 3 * 4 because it was given that n = 7"


def make_texts(kind: str, count: int) -> list[str]:
    rng, vocabulary, texts = np.random.default_rng(0), TEXT.split(), []
    for number in range(count):
        size = int(rng.integers(4_500, 9_000))
        words = [vocabulary[i] for i in rng.integers(0, len(vocabulary), size)]
        # Loops in pairs, so that every thread of the baseline gets as many of either kind.
        if kind == "loops" or (kind == "both" and number // 2 % 2):
            period = int(rng.integers(5, 100))
            words[200:] = (words[:period] * (size // period + 1))[: size - 200]
        texts.append(" ".join(words) + " and so on" * 200)
    return texts


def bare(windows: list[bytes], threads: int) -> list[bool]:
    def compress(part: list[bytes]) -> list[bool]:
        return [len(window) / len(zlib.compress(window)) > RATIO for window in part]

    if threads == 1:
        return compress(windows)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(compress, [windows[i::threads] for i in range(threads)]))
    flags = [False] * len(windows)
    for i, part in enumerate(parts):
        flags[i::threads] = part
    return flags


def main() -> None:
    options = common.options(__doc__, minutes=0.4)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = options.choose(NUM_TEXTS, 4)
    print(f"\nzlib {zlib.ZLIB_RUNTIME_VERSION}, L = {WINDOW:,}, {count:,} texts;", end=" ")
    print("million characters of windows per second\n")
    print("| texts | threads | flags | bare zlib | flags / bare, run by run | the same, CPU time |")
    print("|---|---|---|---|---|---|")
    for kind in ("regular", "loops", "both"):
        texts = make_texts(kind, count)
        for threads in sorted({1, cores or 1}):
            print(
                f"| {kind} | {threads} | "
                + " | ".join(compare(texts, threads, options.runs))
                + " |",
                flush=True,
            )


def compare(texts: list[str], threads: int, runs: int) -> list[str]:
    windows = [text[-WINDOW:].encode() for text in texts]
    sides = {
        "flags": lambda: repetition_flags(texts, WINDOW, RATIO, threads).tolist(),
        "bare": lambda: bare(windows, threads),
    }
    if sides["flags"]() != sides["bare"]():
        raise SystemExit("the two sides disagree")
    wall, cpu = {"flags": [], "bare": []}, {"flags": [], "bare": []}
    for _ in range(runs):
        for side, run in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall[side].append(time.perf_counter() - start)
            cpu[side].append(time.process_time() - start_cpu)
    return [
        *(spread([len(texts) * WINDOW / s / 1e6 for s in wall[side]], 0) for side in sides),
        *(
            spread([a / b for a, b in zip(times["bare"], times["flags"], strict=True)], 2)
            for times in (wall, cpu)
        ),
    ]


if __name__ == "__main__":
    main()
