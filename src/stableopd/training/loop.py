"""The loop: students write, teachers score, golden solutions join, the student is updated.

After each step the alarm is asked; what it may do is in `guard.py`, and it is done here. With
several processes all of them are in here and in step; how they share the work is in `ranks.py`.

It never asks for a method's name. What is left out, and why: no reward models, no replay of old
rollouts, no asynchronous sampling; each would make a rollout older than the student that it
trains, which is what on-policy distillation avoids.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import Any

import torch

from stableopd.config import ObjectiveConfig
from stableopd.data.grading import grade
from stableopd.data.prompts import prompts_of_step
from stableopd.evaluation import evaluate
from stableopd.objective.advantage import group_reward
from stableopd.teacher.server import Judged
from stableopd.training.checkpoint import restore, restore_initial, save
from stableopd.training.data import Problems
from stableopd.training.guard import Event, Guard, ask
from stableopd.training.metrics import evaluation_metrics, rollout_rows, step_metrics
from stableopd.training.ranks import shared
from stableopd.training.setup import Run, begin, eval_settings, prune
from stableopd.training.step import step as make_step
from stableopd.training.terms import Work
from stableopd.types import Rollout, SamplingSettings, ServerError, TrainingError

__all__ = ["train"]

# Offsets that keep the random draws of rollouts and evaluations apart.
STEP_SEEDS, EVAL_SEED = 1_000_003, 7_919


def train(run: Run, should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Make the steps that are left, and yield the line of metrics of each when it is on disk.

    Args:
        run: A prepared run.
        should_stop: Asked after each step; when true the run saves and ends early.

    Yields:
        The line of `metrics.jsonl` of step 0 (evaluation alone), then of each step; the same in
        every process.

    Raises:
        TrainingError: A loss, gradient or log-prob is not finite. The update was not made, and
            the batch is written to failed/.
        ServerError: A server of rollouts or a teacher's is lost, or has other weights than the
            student; what the steps before it made of the student is saved.
        RunFolderError: The run folder can no longer be written.
    """
    try:
        with run.ranks.watched():
            yield from _steps(run, should_stop)
    finally:
        run.sampler.close()
        run.folder.unlock()
    run.accelerator.end_training()


def _steps(run: Run, should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    config, ranks, guard = run.config, run.ranks, run.guard
    ids = run.stops.decode_ids
    begin(run)
    if run.start_step == 0 and run.held_out is not None:
        line = {"step": 0, **_evaluation(run, run.held_out)}
        guard, line = ranks.on_main(functools.partial(_record_start, run, guard, line))
        yield line
    for step in range(run.start_step + 1, config.run.steps + 1):
        try:
            line, rows = _step(run, guard.objective, step)
        except ServerError as error:
            raise _saved(run, step - 1, error) from None
        run.sampler.update()
        is_last = step == config.run.steps
        if run.held_out is not None and (step % config.eval.every == 0 or is_last):
            line |= _evaluation(run, run.held_out)
        # The main process decides for all, and writes.
        guard, event, line = ranks.on_main(functools.partial(_record, run, guard, line, rows))
        if event is not None:
            ranks.together(functools.partial(_put_back, run, event))
            run.sampler.update()
        is_interrupted = any(ranks.gather(should_stop()))
        ends = is_interrupted or (event is not None and event.action == "stop")
        if step % config.run.save_every == 0 or is_last or ends:
            save(run.folder, step, run.student, run.optimizer, run.scheduler, ranks, ids)
            ranks.on_main(functools.partial(prune, run, guard))
        yield line
        if ends:
            break


def _saved(run: Run, step: int, error: ServerError) -> ServerError:
    """Keep the student of the last step, where the next one could not begin; what to tell."""
    if step > run.start_step and step not in run.folder.checkpoints():
        ids = run.stops.decode_ids
        save(run.folder, step, run.student, run.optimizer, run.scheduler, run.ranks, ids)
    kept = f" The student after step {step} is saved: go on with --resume." if step else ""
    told = ServerError(f"step {step + 1}: {error}{kept}")
    shared(told)
    return told


def _record_start(run: Run, guard: Guard, line: dict[str, Any]) -> tuple[Guard, dict[str, Any]]:
    """Show the alarm the evaluation before the first step, and write it down."""
    guard, _, _ = ask(guard, line, run.config, [])
    run.folder.append_metrics(line)
    return guard, line


def _record(
    run: Run, guard: Guard, line: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[Guard, Event | None, dict[str, Any]]:
    """Ask the alarm about a step, and write down what happened."""
    config, folder, step = run.config, run.folder, line["step"]
    guard, event, marks = ask(guard, line, config, folder.checkpoints())
    line = line | marks
    if rows and (step % config.run.rollouts_every == 0 or step == config.run.steps):
        folder.write_rollouts(step, rows)
    folder.append_metrics(line)
    run.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
    if event is not None:
        folder.append_event(dataclasses.asdict(event))
    return guard, event, line


def _put_back(run: Run, event: Event) -> None:
    """Make the student, in place, the one that a rollback chose; other events change nothing."""
    trained = run.student, run.optimizer, run.scheduler
    if event.restored_step:
        restore(*trained, run.folder.checkpoint_path(event.restored_step))
    elif event.restored_step == 0:
        restore_initial(*trained, run.initial)


def _step(
    run: Run, objective: ObjectiveConfig, step: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One step with the weights in force: the line of metrics, and a line for each rollout."""
    config, train = run.config, run.train
    start = time.perf_counter()
    places = prompts_of_step(
        step - 1, len(train.prompts), config.rollout.prompts_per_step, config.run.seed
    )
    rollouts = _rollouts(run, places, step)
    correct = _grade(run, places, rollouts)
    rollout_s = time.perf_counter() - start
    judged, judge_s = _judge(run, rollouts)
    golden = [s for s in (train.golden[i] for i in places) if s is not None]
    golden = golden if objective.lambda_gold else []
    by_id = {train.prompts[i].id: train.prompts[i] for i in places}
    work = Work(
        objective,
        rollouts,
        golden,
        _group_rewards(run, correct),
        config.rollout.max_new_tokens,
        judged,
    )
    learning_rate = run.scheduler.get_last_lr()[0]
    try:
        result = make_step(
            run.players,
            run.optimizer,
            work,
            micro_batch_tokens=config.optimizer.micro_batch_tokens,
            grad_clip=config.optimizer.grad_clip,
            ranks=run.ranks,
        )
    except TrainingError as error:
        rows = rollout_rows(step, by_id, rollouts, None, correct)
        path = run.ranks.on_main(functools.partial(run.folder.write_failure, step, rows))
        told = TrainingError(f"step {step}: {error} The batch is in {path}.")
        raise shared(told) from None
    run.scheduler.step()
    metrics = step_metrics(
        result, rollouts, correct, config.repetition, int(run.players.stop_ids.numel())
    )
    seconds = time.perf_counter() - start
    num_tokens = sum(len(r.completion_ids) for r in rollouts)
    num_tokens += sum(len(s.completion_ids) for s in golden)
    line: dict[str, Any] = {"step": step, **metrics, "learning_rate": learning_rate}
    line |= {
        "objective/lambda_gold": objective.lambda_gold,
        "objective/beta_reference": objective.beta_reference,
        **run.sampler.metrics,
        "time/rollout_s": rollout_s,
        "time/score_s": judge_s + result.score_s,
        "time/update_s": result.update_s,
        "tokens_per_s": num_tokens / seconds,
    }
    return line, rollout_rows(step, by_id, rollouts, result, correct)


def _rollouts(run: Run, places: list[int], step: int) -> list[Rollout]:
    o, r = run.config.objective, run.config.rollout
    if not (o.lambda_policy or o.lambda_divergence or o.beta_reference):
        return []
    settings = SamplingSettings(r.max_new_tokens, r.temperature, r.top_p, r.top_k)
    seed = run.config.run.seed * STEP_SEEDS + step
    with run.accelerator.autocast():
        return run.sampler.sample(
            run.train.named_ids(places), r.rollouts_per_prompt, settings, seed
        )


def _judge(run: Run, rollouts: list[Rollout]) -> tuple[list[Judged] | None, float]:
    """What the teachers that are served say of the rollouts, and the seconds that it took."""
    if run.served is None:
        return None, 0.0
    start = time.perf_counter()
    judged = run.ranks.spread(run.train.by_teacher(rollouts), run.served.judge)
    return judged, time.perf_counter() - start


def _grade(run: Run, places: list[int], rollouts: list[Rollout]) -> list[bool] | None:
    """Whether each rollout is correct; None where a prompt has no answer."""
    train, per_prompt = run.train, run.config.rollout.rollouts_per_prompt
    answers = [train.prompts[i].answer for i in places for _ in range(per_prompt)]
    thinking = [train.thinking[i] for i in places for _ in range(per_prompt)]
    if not rollouts or any(a is None for a in answers):
        return None

    def graded(items: Many[tuple[Rollout, str | None, bool]]) -> list[bool]:
        return [grade(r.completion, a or "", *train.grader, begun) for r, a, begun in items]

    return run.ranks.spread(list(zip(rollouts, answers, thinking, strict=True)), graded)


def _group_rewards(run: Run, correct: list[bool] | None) -> torch.Tensor | None:
    """The advantage of each rollout where correctness, and not a teacher, gives the credit."""
    if run.config.objective.advantage != "group_reward" or not correct:
        return None
    rewards = torch.tensor(correct, dtype=torch.float32)
    return group_reward(rewards, run.config.rollout.rollouts_per_prompt)


def _evaluation(run: Run, held_out: Problems) -> dict[str, float]:
    config = run.config
    start = time.perf_counter()
    with run.accelerator.autocast():
        evaluation = evaluate(
            run.eval_sampler,
            held_out.prompts,
            held_out.prompt_ids,
            num_samples=config.eval.samples,
            settings=eval_settings(config),
            seed=config.run.seed * STEP_SEEDS + EVAL_SEED,
            grader=held_out.grader[0],
            marker=held_out.grader[1],
            repetition=config.repetition,
            thinking=held_out.thinking,
        )
    return {**evaluation_metrics(evaluation), "time/eval_s": time.perf_counter() - start}
