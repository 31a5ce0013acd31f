"""Memory and time of scoring tokens in tiles, beside the dense formula, forward and backward.

    python benchmarks/bench_loss.py

Both sides compute log-probs of the tokens and the exact KL(student || reference) from the same
hidden states and heads, and their gradients; the values are compared before any time is taken. Each
measurement runs in a process of its own, so that its peak memory is its own; tiled and dense
alternate. Memory is the peak of the process above its level before the loss, hidden states and
heads (with their gradients) left out.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

WIDTH, RUNS = 64, 5
SIZES = [(1024, 8_192), (1024, 32_768), (1024, 151_936), (256, 32_768), (4096, 32_768)]


def dense(hidden_ND, weight_VD, other_ND, other_VD, target_N):
    logp_NV = torch.log_softmax(hidden_ND @ weight_VD.T, -1)
    other_NV = torch.log_softmax(other_ND @ other_VD.T, -1)
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


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, num_tokens: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_tokens, WIDTH, requires_grad=True)
    weight_VD = (torch.randn(vocabulary, WIDTH) / 8).requires_grad_()
    other_ND, other_VD = torch.randn(num_tokens, WIDTH), torch.randn(vocabulary, WIDTH) / 8
    target_N = torch.randint(vocabulary, (num_tokens,))
    function = {"dense": dense, "tiled": tiled}[side]
    function(hidden_ND[:2], weight_VD, other_ND[:2], other_VD, target_N[:2])  # imports, warm-up
    hidden_ND.grad, weight_VD.grad = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)
    before, start = peak_mb(), time.process_time()
    logp_N, kl_N = function(hidden_ND, weight_VD, other_ND, other_VD, target_N)
    loss = kl_N.mean() - logp_N.mean()
    loss.backward()
    print(
        json.dumps(
            {
                "cpu_s": time.process_time() - start,
                "peak_mb": peak_mb() - before,
                "loss": loss.item(),
                "gradient": hidden_ND.grad.norm().item(),
            }
        )
    )


def run(side: str, num_tokens: int, vocabulary: int) -> dict[str, float]:
    command = [sys.executable, __file__, side, str(num_tokens), str(vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, width {WIDTH}")
    print(f"medians of {RUNS} runs (lowest-highest)")
    print("| tokens | vocabulary | tiled, CPU s | dense, CPU s | tiled, MB | dense, MB |")
    print("|---|---|---|---|---|---|")
    for num_tokens, vocabulary in SIZES:
        results = {"tiled": [], "dense": []}
        for _ in range(RUNS):
            for side, found in results.items():
                found.append(run(side, num_tokens, vocabulary))
        for key in ("loss", "gradient"):
            a, b = results["tiled"][0][key], results["dense"][0][key]
            if abs(a - b) > 1e-4 * abs(b):
                sys.exit(f"the two sides disagree on the {key}: {a} and {b}")
        cells = [
            spread([r[key] for r in results[side]], digits)
            for key, digits in (("cpu_s", 2), ("peak_mb", 0))
            for side in ("tiled", "dense")
        ]
        print(f"| {num_tokens} | {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
