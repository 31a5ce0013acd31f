"""Log-probs and the exact reverse KL over a large vocabulary, forward and backward, and its peers.

All sides get the same bfloat16 hidden states and heads, and make the gradients of the student's
hidden states and head. Liger's and TRL's functions give the KL only; the other sides give the
log-probs of the tokens too. The KL of each side is compared with ours before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import bench_loss
from meter import MissingError, Setting, free, peak_mb_of, seconds_of, why
from plan import TOKENS, VOCABULARY, WIDTHS

# Means over thousands of tokens of numbers with 8 bits.
AGREEMENT = 1e-2

# (hidden, head, other hidden, other head, targets) -> (mean KL, loss to go backward from)
Side = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _whole(formula: Any) -> Side:
    def side(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp_N, kl_N = formula(*inputs)
        return kl_N.mean(), kl_N.mean() - logp_N.mean()

    return side


def _compiled(setting: Setting) -> Side:
    # Once for all sizes; without a GPU there may be no compiler, and the graph itself is run.
    backend = "inductor" if setting.device == "cuda" else "aot_eager"
    return _whole(torch.compile(bench_loss.dense, dynamic=True, backend=backend))


def _liger(setting: Setting) -> Side:
    if setting.device != "cuda":
        __import__("liger_kernel")
        raise MissingError("needs CUDA")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    reverse_kl = LigerFusedLinearJSD(jsd_beta=1.0)

    def side(hidden_ND: Any, weight_VD: Any, other_ND: Any, other_VD: Any, _: Any) -> Any:
        kl = reverse_kl(hidden_ND, weight_VD, other_ND, other_VD, None)
        return kl, kl

    return side


def _trl(setting: Setting) -> Side:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def side(hidden_ND: Any, weight_VD: Any, other_ND: Any, other_VD: Any, target_N: Any) -> Any:
        mask_1N = torch.ones_like(target_N)[None]
        # beta 1 is the reverse KL, as in sides.py.
        kl, _, _ = _chunked_divergence_loss(
            hidden_ND[None], other_ND[None], weight_VD, other_VD, mask_1N, 1.0
        )
        return kl, kl

    return side


# In the order of their worth, should the time not do.
SIDES: dict[str, Callable[[Setting], Side]] = {
    "ours": lambda _: _whole(bench_loss.tiled),
    "dense": lambda _: _whole(bench_loss.dense),
    "liger": _liger,
    "trl": _trl,
    "compiled": _compiled,
}


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    vocabulary = setting.choose(VOCABULARY, 5_003)
    sizes = [
        (num_tokens, width)
        for num_tokens in setting.choose(TOKENS, (64,))
        for width in setting.choose(WIDTHS, (16, 32))
    ]
    kls: dict[tuple[int, int], float] = {}
    for name, make in SIDES.items():
        try:
            side = make(setting)
        except Exception as error:
            for num_tokens, width in sizes:
                row = {"side": name, "tokens": num_tokens, "width": width}
                yield row | {"vocabulary": vocabulary, "error_text": why(error)}
            continue
        for num_tokens, width in sizes:
            row = {"side": name, "tokens": num_tokens, "width": width, "vocabulary": vocabulary}
            try:
                row |= _measured(setting, side, num_tokens, width, vocabulary, kls)
            except Exception as error:
                row["error_text"] = why(error)
            free(setting.device)
            yield row


def _measured(
    setting: Setting,
    side: Side,
    num_tokens: int,
    width: int,
    vocabulary: int,
    kls: dict[tuple[int, int], float],
) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.device(setting.device):
        dtype = torch.bfloat16
        hidden_ND = torch.randn(num_tokens, width).to(dtype).requires_grad_()
        weight_VD = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
        other_ND = torch.randn(num_tokens, width).to(dtype)
        other_VD = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
        target_N = torch.randint(vocabulary, (num_tokens,))

    def once() -> float:
        hidden_ND.grad = weight_VD.grad = None
        kl, loss = side(hidden_ND, weight_VD, other_ND, other_VD, target_N)
        loss.backward()
        return kl.item()

    start = time.perf_counter()
    kl = once()
    first_s = time.perf_counter() - start
    wanted = kls.setdefault((num_tokens, width), kl)
    if not abs(kl - wanted) <= AGREEMENT * abs(wanted):
        return {"error_text": f"disagrees: KL {kl:.5g}, ours {wanted:.5g}", "ok": False}
    hidden_ND.grad = weight_VD.grad = None
    memory_mb = peak_mb_of(once, setting.device)
    return {
        "ms": 1e3 * seconds_of(once, setting.device),
        "memory_mb": memory_mb,
        "first_s": first_s,
        "kl": kl,
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    largest = [row for row in rows if row["side"] == "ours" and "ms" in row][-1]
    missing = sorted({row["side"] for row in rows if "error_text" in row})
    text = f"ours, {largest['tokens']:,} x {largest['width']:,}: {largest['ms']:.1f} ms, "
    text += f"{largest['memory_mb']:,.0f} MB"
    return text + (f"; cells without a number: {', '.join(missing)}" if missing else "")
