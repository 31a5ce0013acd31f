"""Time to start: `--help`, `import`, and the first step of training, beside TRL's.

    python benchmarks/bench_startup.py

Wall seconds of whole processes from a warm file cache: each is run once before. The first step of
`stableopd demo` is there when the first arm has written its line of metrics (both arms start at
once, and evaluate before it); TRL's is that of a `DistillationTrainer` on the same embedded
models, with the same sizes, and without an evaluation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import Row

PROMPTS, SAMPLES, NEW_TOKENS = 16, 4, 96  # of embedded/demo.toml
PATIENCE_S, POLL_S = 600.0, 0.01
# Of our seconds, and of the peer's.
HELP_S, IMPORT_S, SHARE = 0.3, 0.1, 0.2


def command(name: str) -> list[str]:
    """A command of the measurements' environment; as a module where it has no script."""
    script = Path(common.python()).parent / name
    return [str(script)] if script.exists() else [common.python(), "-m", name]


def whole(arguments: list[str]) -> float:
    """Seconds of a process from start to end."""
    start = time.perf_counter()
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=common.child_environment(), check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


# A tiny demo for --quick.
QUICK = ("run.steps=1", "rollout.prompts_per_step=1", "eval.max_problems=1")


def first_demo_step(overrides: tuple[str, ...] = ()) -> float:
    """Seconds until one arm of the demo has made its first step."""
    sets = [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command("stableopd"), "demo", "--output", f"{folder}/demo", *sets],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=common.child_environment(),
            start_new_session=True,
        )
        try:
            while not _has_step(Path(folder, "demo")):
                if process.poll() is not None or time.perf_counter() - start > PATIENCE_S:
                    raise SystemExit("stableopd demo ended, or made no step.")
                time.sleep(POLL_S)
            return time.perf_counter() - start
        finally:
            # The arms are processes of the same group. A SIGINT may be ignored under `make`.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _has_step(output: Path) -> bool:
    files = (output / arm / "metrics.jsonl" for arm in ("opd", "stable_opd"))
    return any('"step": 1,' in file.read_text() for file in files if file.exists())


def compute(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's first step, in a process of its own."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"{i}+{i}="} for i in range(PROMPTS) for _ in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DistillationConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            max_completion_length=NEW_TOKENS,
            beta=1.0,
            learning_rate=3e-4,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.DistillationTrainer(
            model=AutoModelForCausalLM.from_pretrained(spec["student"]),
            teacher_model=AutoModelForCausalLM.from_pretrained(spec["teacher"]),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["student"]),
        )
        trainer.train()
    return {"steps": trainer.state.global_step}


def first_trl_step(_: Any = None) -> float:
    """Seconds until a trainer of TRL has made its first step, from nothing."""
    embedded = common.ROOT / "src" / "stableopd" / "embedded"
    spec = {"student": str(embedded / "student"), "teacher": str(embedded / "teacher")}
    start = time.perf_counter()
    common.measure(__file__, spec)
    return time.perf_counter() - start


def main() -> None:
    options = common.options(__doc__, minutes=2.7)
    python = common.python()
    rows: list[tuple[str, Any, Any, Any, Any, float | None]] = [
        ("`stableopd --help`, `trl --help`", whole, [*command("stableopd"), "--help"],
         whole, [*command("trl"), "--help"], HELP_S),
        ("`import stableopd`, `import trl`", whole, [python, "-c", "import stableopd"],
         whole, [python, "-c", "import trl"], IMPORT_S),
        ("first step of `stableopd demo`, of TRL", first_demo_step, options.choose((), QUICK),
         first_trl_step, None, None),
    ]  # fmt: skip
    print(f"\nAn empty `{Path(python).name} -c pass` takes", end=" ")
    print(f"{common.spread([whole([python, '-c', 'pass']) for _ in range(3)], 3)} s.\n")
    print(Row.HEADER)
    for name, our, ours, their, theirs, limit in rows:
        if not options.quick:
            our(ours), their(theirs)
        pairs = [(our(ours), their(theirs)) for _ in range(options.runs)]
        mine, peer = [a for a, _ in pairs], [b for _, b in pairs]
        share = SHARE if limit is None else None
        print(Row(name, "wall s", mine, peer, 3, share, limit_s=limit).markdown(), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    if common.is_measurement():
        common.answer(compute)
    else:
        main()
