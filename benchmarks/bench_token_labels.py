"""Speed of labelling repetitive tokens, on one core, beside plain Python and sorted ranks.

    python benchmarks/bench_token_labels.py

All three sides label the same rollouts (n = 8) and their labels are compared first. "sets" keeps a
set of tuples, as one would write it; "ranks" numbers windows of 1, 2, 4, 8 tokens with np.unique;
"labels" is `label_rows`, which sorts hashes and verifies them. Text has ids by Zipf's law; a loop
is a third of such text and then up to 200 of its tokens over and over. Sides alternate; times are
CPU time of the process.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import common
from stableopd.diagnostics.repetition import label_rows

NGRAM, NUM_TOKENS = 8, 2**17
VOCABULARIES, LENGTHS = (32_768, 151_936), (96, 1_024, 4_096, 16_384)


def by_sets(rows):
    found = []
    for row in rows:
        ids, seen = row.tolist(), set()
        labels = [False] * min(NGRAM - 1, len(ids))
        for stop in range(NGRAM, len(ids) + 1):
            gram = tuple(ids[stop - NGRAM : stop])
            labels.append(gram in seen)
            seen.add(gram)
        found.append(np.array(labels))
    return found


def by_ranks(rows):
    found = []
    for row in rows:
        rank, width = np.unique(row, return_inverse=True)[1], 1
        while width < NGRAM:
            pairs = rank[:-width] * (len(row) + 1) + rank[width:]
            rank, width = np.unique(pairs, return_inverse=True)[1], 2 * width
        first = np.unique(rank, return_index=True)[1][rank]
        found.append(np.concatenate((np.zeros(NGRAM - 1, bool), first < np.arange(len(rank)))))
    return found


SIDES = {"labels": lambda rows: label_rows(rows, NGRAM), "ranks": by_ranks, "sets": by_sets}


def make_rows(kind: str, vocabulary: int, length: int, size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(length)
    shares = 1 / np.arange(10, vocabulary + 10)
    ids = rng.permutation(vocabulary)
    rows = []
    for _ in range(size // length):
        row = ids[rng.choice(vocabulary, length, p=shares / shares.sum())]
        if kind == "loop":
            lead, period = length // 3, int(rng.integers(10, min(200, length // 4)))
            row[lead:] = np.resize(row[:period], length - lead)
        rows.append(row)
    return rows


def main() -> None:
    options = common.options(__doc__, minutes=0.4)
    lengths = options.choose(LENGTHS, LENGTHS[:1])
    size = options.choose(NUM_TOKENS, 2 * LENGTHS[0])
    print("\nmillion tokens per CPU second\n")
    print("| vocabulary | length | rollouts | labels | ranks | sets | to ranks | to sets |")
    print("|---|---|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        for length in lengths:
            for kind in ("text", "loop"):
                rows = make_rows(kind, vocabulary, length, size)
                compare(rows)
                speeds = measure(rows, options.runs)
                middle = {side: statistics.median(found) for side, found in speeds.items()}
                cells = [
                    f"{middle[side]:.1f} ({min(found):.1f}-{max(found):.1f})"
                    for side, found in speeds.items()
                ]
                cells += [f"{middle['labels'] / middle[side]:.0f}x" for side in ("ranks", "sets")]
                print(f"| {vocabulary:,} | {length:,} | {kind} | " + " | ".join(cells) + " |")


def compare(rows: list[np.ndarray]) -> None:
    expected = np.concatenate(by_sets(rows))
    for side, label in SIDES.items():
        if not np.array_equal(np.concatenate(label(rows)), expected):
            raise SystemExit(f"{side} and sets disagree")


def measure(rows: list[np.ndarray], runs: int) -> dict[str, list[float]]:
    size = sum(len(row) for row in rows)
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side, label in SIDES.items():
            start = time.process_time()
            label(rows)
            speeds[side].append(size / (time.process_time() - start) / 1e6)
    return speeds


if __name__ == "__main__":
    main()
