"""Correctness on the device: float32 and bfloat16 against float64 on the CPU, gradients included.

Inputs are rounded to the type first, so that only what the device computes with them is compared.
The error of a tensor is its largest difference over the largest magnitude.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

import sampler_parts
import step_parts
from meter import ROOT, Setting, error_of
from stableopd.objective import logprobs
from stableopd.objective.divergence import forward_kl, reverse_kl
from stableopd.objective.heads import Against, Head
from stableopd.objective.logprobs import score_tokens
from stableopd.objective.swept import score_by_sweep
from stableopd.rollout.drawing import draw
from stableopd.teacher.local import FrozenModel
from stableopd.training.step import step
from stableopd.training.terms import Players
from stableopd.types import SamplingSettings
from tiny import PAD, V

# float32 sums in other orders; bfloat16 has 8 bits, of which sums over many products lose some.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
# The same in the gradient of a model: every layer rounds once more.
BOUNDS_OF_STEP = {"float32": 1e-3, "bfloat16": 1e-1}
# Rows that fall on a boundary between two tokens by rounding.
OTHER_TOKENS = 5e-3
# What of the tests asks for no device of its own.
TESTS = (
    "test_sweep.py",
    "test_logprobs.py",
    "test_divergence.py",
    "test_sampler.py::test_order_and_fields",
    "test_sampler.py::test_stop_or_length",
    "test_drawing.py",
)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from objective(setting)
    yield draws(setting)
    yield from sampler(setting)
    yield from training_step(setting)
    yield tests(setting)


def judged(what: str, dtype: str, errors: dict[str, float], bound: float) -> dict[str, Any]:
    """A row: the worst of some errors, and whether it is within its bound."""
    worst = max(errors, key=lambda name: errors[name])
    ok = all(error <= bound for error in errors.values())
    row = {"what": what, "dtype": dtype, "error": errors[worst], "worst": worst}
    return row | {"bound": bound, "ok": ok, "errors": errors}


def objective(setting: Setting) -> Iterator[dict[str, Any]]:
    """Both ways to score tokens: chunks of full distributions, and the sweep."""
    num_tokens, vocabulary, width = setting.choose((512, 32_771, 256), (24, 5_003, 16))
    draw_from = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw_from)

    inputs = [rand(num_tokens, width), 2 * rand(vocabulary, width) / width**0.5]
    inputs += [rand(num_tokens, width), 2 * rand(vocabulary, width) / width**0.5]
    target_N = torch.randint(vocabulary, (num_tokens,), generator=draw_from)
    slope_N = rand(num_tokens)
    chunk = {"chunk_elements": 7 * vocabulary}

    def scored(way: Any, options: Any, values: list[torch.Tensor], device: str) -> dict[str, Any]:
        hidden_ND, weight_VD, other_ND, other_VD = (v.to(device) for v in values)
        hidden_ND.requires_grad_()
        weight_VD.requires_grad_()
        scores = way(
            hidden_ND,
            Head(weight_VD),
            target_N.to(device),
            stop_ids=torch.tensor([7, 3, 4_000], device=device),
            stop_is_event=True,
            against=[Against(other_ND, Head(other_VD), (reverse_kl, forward_kl))],
            **options,
        )
        reverse_N, forward_N = scores.others[0].comparisons
        loss = (scores.logp_N * slope_N.to(scores.logp_N)).mean()
        (loss + reverse_N.mean() + forward_N.mean()).backward()
        return {
            "log-prob": scores.logp_N,
            "entropy": scores.entropy_N,
            "log-prob of the stop": scores.stop_logp_N,
            "log-prob of the other": scores.others[0].logp_N,
            "reverse KL": reverse_N,
            "forward KL": forward_N,
            "gradient of the hidden states": hidden_ND.grad,
            "gradient of the head": weight_VD.grad,
        }

    for name, dtype in setting.dtypes.items():
        rounded = [x.to(dtype) for x in inputs]
        wanted = scored(score_tokens, chunk, [x.double() for x in rounded], "cpu")
        for what, way, options in (
            ("objective in chunks", score_tokens, chunk),
            ("objective in a sweep", score_by_sweep, {}),
        ):
            found = scored(way, options, [x.clone() for x in rounded], setting.device)
            errors = {key: error_of(found[key], wanted[key]) for key in wanted}
            yield judged(what, name, errors, BOUNDS[name])


def draws(setting: Setting) -> dict[str, Any]:
    """The same uniform numbers draw the same tokens."""
    rows, vocabulary = setting.choose((1_024, 32_771), (64, 5_003))
    draw_from = torch.Generator().manual_seed(1)
    logits_BV = 3 * torch.randn(rows, vocabulary, generator=draw_from)
    uniform_B = torch.rand(rows, generator=draw_from, dtype=torch.float64)
    wanted_B, logp_B = draw(logits_BV.double(), uniform_B)
    found_B, found_logp_B = draw(logits_BV.to(setting.device), uniform_B.to(setting.device))
    same_B = found_B.cpu() == wanted_B
    errors = {"log-probs": error_of(found_logp_B.cpu()[same_B], logp_B[same_B])}
    row = judged("draws from given numbers", "float32", errors, BOUNDS["float32"])
    others = 1 - same_B.double().mean().item()
    return row | {"other_tokens": others, "ok": row["ok"] and others <= OTHER_TOKENS}


def sampler(setting: Setting) -> Iterator[dict[str, Any]]:
    """Greedy tokens as `generate` has them; log-probs of drawn tokens as a plain pass has them."""
    stops, budget = (2, 9), setting.choose(64, 8)
    for name, dtype in setting.dtypes.items():
        with torch.device(setting.device):
            model = sampler_parts.tiny_llama().eval().to(dtype)
            write = sampler_parts.make(model, stops).sample
            if name == "float32":
                yield _greedy(setting, model, write, stops, budget)
            rollouts = write(sampler_parts.RAGGED, 4, SamplingSettings(budget), 0)
            wanted = [sampler_parts.dense_logps(model, r, sampler_parts.V) for r in rollouts]
        found = torch.tensor([x for r in rollouts for x in r.sampler_logps])
        errors = {"log-probs": error_of(found, torch.tensor([x for row in wanted for x in row]))}
        # The plain pass is of the same type on the same device, and rounds elsewhere.
        yield judged("log-probs of rollouts", name, errors, BOUNDS_OF_STEP[name])


def _greedy(
    setting: Setting, model: Any, write: Any, stops: tuple[int, ...], budget: int
) -> dict[str, Any]:
    rollouts = write(sampler_parts.RAGGED, 2, SamplingSettings(budget, 0.0), 0)
    differing = 0
    for rollout in rollouts:
        ids_BT = torch.tensor([rollout.prompt_ids], device=setting.device)
        whole_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=list(stops),
            pad_token_id=0,
        )
        wanted = tuple(whole_BT[0, ids_BT.shape[1] :].tolist())
        differing += wanted != rollout.completion_ids
    errors = {"rollouts that differ": differing / len(rollouts)}
    return judged("greedy tokens as of generate", "float32", errors, 0.0)


class _Kept(torch.optim.SGD):
    """Keeps the gradients of its step, which are gone afterwards."""

    gradient: torch.Tensor

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradient = torch.cat([p.grad.detach().double().cpu().flatten() for p in parameters])


def training_step(setting: Setting) -> Iterator[dict[str, Any]]:
    """One StableOPD step: teacher, reference and golden term, in both ways to score."""
    models = [
        step_parts.model(seed, width, sharp=4.0) for seed, width in ((0, 32), (1, 48), (2, 32))
    ]
    batch = step_parts.work(step_parts.objective("stable_opd"))

    def made(device: str, dtype: torch.dtype, cast: Any, scored_in: torch.dtype) -> dict[str, Any]:
        import copy

        student, teacher, reference = (copy.deepcopy(m).to(device, dtype) for m in models)
        players = Players(
            student=student,
            num_tokens=V,
            teacher=FrozenModel(teacher.to(scored_in), V, 1.0, cast),
            reference=FrozenModel(reference, V, 1.0, cast),
            stop_ids=torch.tensor(step_parts.STOPS, device=device),
            stop_is_event=True,
            temperature=1.0,
            pad_id=PAD,
            autocast=cast,
        )
        optimizer = _Kept(student.parameters(), 0.0)
        result = step(players, optimizer, batch, micro_batch_tokens=40, grad_clip=1e9)
        losses = {f"loss {k}": torch.tensor([v]) for k, v in result.losses.items()}
        logps = torch.tensor([x for row in result.student_logps for x in row])
        return losses | {"log-probs": logps, "gradient": optimizer.gradient}

    sizes = logprobs.SWEEP_VOCABULARY, logprobs.SWEEP_ELEMENTS
    wanted = made("cpu", torch.float64, contextlib.nullcontext, torch.float64)

    def mixed() -> Any:
        return torch.autocast(setting.device, dtype=torch.bfloat16)

    for what, least in (("step, chunks", sizes), ("step, sweep", (0, 0))):
        logprobs.SWEEP_VOCABULARY, logprobs.SWEEP_ELEMENTS = least
        for name, cast in (("float32", contextlib.nullcontext), ("bfloat16", mixed)):
            # As on a GPU by itself: float32 weights in autocast, and a bfloat16 teacher.
            found = made(setting.device, torch.float32, cast, setting.dtypes[name])
            errors = {key: error_of(found[key], wanted[key]) for key in wanted}
            yield judged(what, name, errors, BOUNDS_OF_STEP[name])
    logprobs.SWEEP_VOCABULARY, logprobs.SWEEP_ELEMENTS = sizes


def tests(setting: Setting) -> dict[str, Any]:
    """Tests of the product whose tensors can be made on any device."""
    files = [f"tests/{name}" for name in setting.choose(TESTS, TESTS[-1:])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    # The warnings of other releases of the packages are not what is looked for.
    command += ["-o", "filterwarnings=default"]
    env = {**os.environ, "STABLEOPD_TEST_DEVICE": setting.device}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    row: dict[str, Any] = {"what": "tests", "dtype": "", "tests": counts, "failed": failed[:20]}
    if not counts:
        said = (done.stderr or done.stdout).strip().splitlines()
        return row | {"ok": False, "error_text": said[-1] if said else "pytest said nothing"}
    return row | {"ok": done.returncode == 0 and counts.get("passed", 0) > 0}


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    worst = {
        name: max((r["error"] for r in rows if r["dtype"] == name), default=float("nan"))
        for name in BOUNDS
    }
    passed = sum(row["tests"].get("passed", 0) for row in rows if "tests" in row)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    return f"largest errors: {errors}; {passed} tests passed"
