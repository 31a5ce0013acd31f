"""Memory and time of scoring tokens in tiles, beside the dense formula, forward and backward.

    python benchmarks/bench_loss.py

Both sides compute log-probs of the tokens and the exact KL(student || reference) from the same
hidden states and heads, and their gradients; the values are compared before any time is shown.
Memory is the peak of the process above its level before the loss, hidden states and heads (with
their gradients) left out.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

import common
from common import Clock, Memory, of, spread

WIDTH, AGREEMENT = 64, 1e-4
VOCABULARIES = (8_192, 32_768, 151_936, 262_144)
TOKENS = (256, 1_024, 8_192)
# Logits beyond which the dense side is measured once.
ONCE = 2**26
# "Flat": at the largest vocabulary at most this many times the memory of the smallest.
FLAT = 1.25


def dense(hidden_ND, weight_VD, other_ND, other_VD, target_N):
    logp_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float(), -1)
    other_NV = torch.log_softmax((other_ND @ other_VD.T).float(), -1)
    kl_N = (logp_NV.exp() * (logp_NV - other_NV)).sum(-1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], kl_N


def tiled(hidden_ND, weight_VD, other_ND, other_VD, target_N):
    from stableopd.objective.divergence import reverse_kl
    from stableopd.objective.heads import Against, Head
    from stableopd.objective.logprobs import score_tokens

    scores = score_tokens(
        hidden_ND,
        Head(weight_VD),
        target_N,
        stop_ids=torch.tensor([0]),
        stop_is_event=True,
        against=[Against(other_ND, Head(other_VD), (reverse_kl,))],
    )
    return scores.logp_N, scores.others[0].comparisons[0]


def compute(spec: dict[str, Any]) -> dict[str, float]:
    num_tokens, vocabulary = spec["tokens"], spec["vocabulary"]
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_tokens, WIDTH, requires_grad=True)
    weight_VD = (torch.randn(vocabulary, WIDTH) / 8).requires_grad_()
    other_ND, other_VD = torch.randn(num_tokens, WIDTH), torch.randn(vocabulary, WIDTH) / 8
    target_N = torch.randint(vocabulary, (num_tokens,))
    function = {"dense": dense, "tiled": tiled}[spec["side"]]
    function(hidden_ND[:2], weight_VD, other_ND[:2], other_VD, target_N[:2])  # imports, warm-up
    memory, start = Memory(), Clock.now()
    logp_N, kl_N = function(hidden_ND, weight_VD, other_ND, other_VD, target_N)
    loss = kl_N.mean() - logp_N.mean()
    loss.backward()
    seconds = Clock.now().since(start)
    found = {"loss": loss.item(), "gradient": hidden_ND.grad.norm().item()}
    grown = memory.grown()
    # The gradients that are handed over are made by the pass, and not its own.
    grown["memory_mb"] -= (hidden_ND.grad.nbytes + weight_VD.grad.nbytes) / 1e6
    return {**seconds, **grown, **found}


def compare(options: common.Options, num_tokens: int, vocabulary: int) -> list[float]:
    """Print a row; the memory of the tiled side in MB, run by run."""
    spec = {"tokens": num_tokens, "vocabulary": vocabulary}
    sides = {side: spec | {"side": side} for side in ("tiled", "dense")}
    runs = 1 if num_tokens * vocabulary > ONCE else options.runs
    found = common.alternate(__file__, sides, runs)
    for key in ("loss", "gradient"):
        values = (of(found[side], key) for side in sides)
        common.require_close(f"the {key}", *values, AGREEMENT)
    rest = {"tiled": sides["tiled"]}
    found["tiled"] += common.alternate(__file__, rest, options.runs - runs)["tiled"]
    cells = [
        spread(of(found[side], key), digits)
        for key, digits in (("cpu_s", 2), ("memory_mb", 0))
        for side in sides
    ]
    print(f"| {num_tokens:,} | {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)
    return of(found["tiled"], "memory_mb")


def main() -> None:
    options = common.options(__doc__, minutes=4)
    vocabularies = options.choose(VOCABULARIES, (256, 1_024))
    tokens = options.choose(TOKENS, (16, 64))
    middle = options.choose((1_024, 32_768), (16, 256))
    print(f"\nfloat32, width {WIDTH}\n")
    print("| tokens | vocabulary | tiled, CPU s | dense, CPU s | tiled, MB | dense, MB |")
    print("|---|---|---|---|---|---|")
    sizes = [(middle[0], v) for v in vocabularies] + [(t, middle[1]) for t in tokens]
    memory = {size: compare(options, *size) for size in sorted(set(sizes))}
    print("\n| what | quantity | largest | smallest | largest / smallest | target | met |")
    print("|---|---|---|---|---|---|---|")
    for what, quantity, first, last, target in (
        (
            f"loss in tiles, {middle[0]:,} tokens",
            f"MB, V from {vocabularies[0]:,} to {vocabularies[-1]:,}",
            memory[middle[0], vocabularies[0]],
            memory[middle[0], vocabularies[-1]],
            FLAT,
        ),
        (
            f"loss in tiles, V = {middle[1]:,}",
            f"MB, tokens from {tokens[0]:,} to {tokens[-1]:,}",
            memory[tokens[0], middle[1]],
            memory[tokens[-1], middle[1]],
            tokens[-1] / tokens[0],
        ),
    ):
        print(common.Row(what, quantity, last, first, 1, target).markdown())
    middles = [statistics.median(memory[t, middle[1]]) for t in (tokens[0], tokens[-1])]
    per_token = (middles[1] - middles[0]) * 1e3 / (tokens[-1] - tokens[0])
    print(
        f"\nA token more takes {per_token:.1f} kB; in the dense formula each matrix of logits "
        f"takes {middle[1] * 4 / 1e3:.0f} kB of it."
    )


if __name__ == "__main__":
    if common.is_measurement():
        common.answer(compute)
    else:
        main()
