"""The alarm as a callback of TRL: on a real run's dumps, and inside TRL's trainers."""

import logging
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, TrainerControl, TrainerState
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

import trl_parts
from stableopd import embedded
from stableopd.config import RepetitionConfig
from stableopd.diagnostics.alarm import Level
from stableopd.integrations.dumps import open_dump
from stableopd.integrations.trl import CollapseAlarm
from stableopd.types import ConfigError
from tiny import EOS, V, make_tokenizer, save_model
from trl_parts import SETTINGS, make, rows, student, teacher

# TRL 1.16 and peft 0.21 ask transformers 5.23 for a setting by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

DUMPS = Path(__file__).parent / "dumps"
BUDGET = 96
SHORT = RepetitionConfig(window_chars=64, ratio=3.0)


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def logs_of(name):
    """What TRL logged of a run whose completions are in tests/dumps, a token a character."""
    found = []
    for file in sorted((DUMPS / name / "completions").iterdir()):
        texts = [r.completion for batch in open_dump([file]).batches() for r in batch]
        cut = sum(len(text) >= BUDGET for text in texts) / len(texts)
        mean = sum(min(len(text) + 1, BUDGET) for text in texts) / len(texts)
        found.append(
            {
                "step": int(file.stem.rpartition("_")[2]),
                "completions/clipped_ratio": cut,
                "completions/mean_length": mean,
            }
        )
    return found


def arguments(name):
    return DistillationConfig(
        str(DUMPS / name),
        max_completion_length=BUDGET,
        log_completions=True,
        use_cpu=True,
        bf16=False,
    )


def listen(alarm, name, history=()):
    """Call the alarm as a trainer does; returns the step at which it ended the run, or None."""
    args, state, control = arguments(name), TrainerState(), TrainerControl()
    state.log_history = list(history)
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("student"))
    alarm.on_train_begin(args, state, control, processing_class=tokenizer)
    for logs in logs_of(name)[len(history) :]:
        state.global_step = logs["step"]
        alarm.on_log(args, state, control, logs={k: v for k, v in logs.items() if k != "step"})
        alarm.on_step_begin(args, state, control)
        if control.should_training_stop:
            break
    alarm.on_log(args, state, control, logs={"train_runtime": 1.0})
    alarm.on_train_end(args, state, control)
    return state.global_step if control.should_training_stop else None


def test_it_ends_a_run_of_trl_that_collapses(caplog):
    alarm = CollapseAlarm("stop", SHORT)
    with caplog.at_level(logging.WARNING):
        stopped = listen(alarm, "trl-collapse")
    assert stopped is not None
    assert 44 <= stopped <= 64  # truncation rises from step 44 on, and is at .95 at 56
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("Step ")
    assert "WARN: " in said[0]
    assert any("COLLAPSE: " in text for text in said)
    assert alarm.lines[-1]["alarm/level"] == 2
    assert {line["alarm/level"] for line in alarm.lines} == {0, 1, 2}


def test_it_speaks_and_lets_the_run_go_on(caplog):
    alarm = CollapseAlarm("warn", SHORT)
    with caplog.at_level(logging.WARNING):
        assert listen(alarm, "trl-collapse") is None
    assert alarm.alarm.level is Level.COLLAPSE
    assert alarm.lines[-1]["rollout/truncation_rate"] > 0.9
    assert alarm.lines[-1]["rollout/repetitive_share"] > 0.5
    assert alarm.lines[-1]["rollout/repetition_rate"] > 0.9
    verdict = alarm.verdict()
    assert verdict.cause == "B"
    assert verdict.headline in caplog.records[-1].getMessage()


@pytest.mark.parametrize("name", ["trl-healthy", "trl-grpo"])
def test_it_is_silent_on_healthy_runs(name, caplog):
    alarm = CollapseAlarm("stop", SHORT)
    with caplog.at_level(logging.WARNING):
        assert listen(alarm, name) is None
    assert not caplog.records
    assert alarm.alarm.level is Level.OK
    assert len(alarm.lines) >= 3


def test_none_measures_and_says_nothing(caplog):
    alarm = CollapseAlarm("none", SHORT)
    with caplog.at_level(logging.WARNING):
        assert listen(alarm, "trl-collapse") is None
    assert not caplog.records
    assert alarm.alarm.level is Level.COLLAPSE


def test_a_resumed_run_replays_the_logs():
    whole, resumed = CollapseAlarm("none", SHORT), CollapseAlarm("none", SHORT)
    listen(whole, "trl-healthy")
    listen(resumed, "trl-healthy", history=logs_of("trl-healthy")[:6])
    assert len(whole.lines) > 6
    assert resumed.lines == whole.lines
    assert resumed.alarm == whole.alarm
    assert resumed.verdict() == whole.verdict()


def test_the_action_must_be_known():
    with pytest.raises(ConfigError, match="one of none, warn, stop inside TRL, not 'rollback'"):
        CollapseAlarm("rollback")


def test_every_step_counts_whatever_is_logged(tmp_path):
    """TRL's own logs become one a step; ours stay as they were asked for, and are means."""
    settings = {"logging_steps": 2, "max_steps": 5, "max_completion_length": 16}
    alarm = CollapseAlarm("none")
    plain = trl_parts.make_plain(tmp_path / "trl", **settings)
    plain.add_callback(alarm)
    plain.train()
    assert [line["step"] for line in alarm.lines] == [1, 2, 3, 4, 5]
    ours = make(tmp_path / "ours", student(0.5), **settings)
    ours.train()
    lines = ours.collapse_alarm.lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    logs = [line for line in ours.state.log_history if "loss" in line]
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        pair = [line["rollout/mean_length"] for line in lines[log["step"] - 2 : log["step"]]]
        assert log["rollout/mean_length"] == sum(pair) / 2


def test_a_resumed_run_of_ours_knows_every_step(tmp_path):
    settings = {"logging_steps": 100, "save_strategy": "steps", "save_steps": 3}
    first = make(tmp_path, max_steps=3, **settings)
    first.train()
    second = make(tmp_path, max_steps=4, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    lines = second.collapse_alarm.lines
    assert lines[:3] == first.collapse_alarm.lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    again = make(tmp_path / "again", max_steps=1)
    for _ in range(2):  # not resumed: nothing is known
        again.train()
        assert [line["step"] for line in again.collapse_alarm.lines] == [1]


def forbids_stops():
    """A teacher for which a stop is 10 nats less likely than for its twin, as in cause A."""
    found = teacher()
    head = torch.nn.Linear(found.config.hidden_size, V)
    head.weight = found.lm_head.weight
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[EOS] = -10.0
    found.lm_head = head
    return found


def test_it_ends_a_run_of_ours_whose_student_unlearns_to_stop(tmp_path, caplog):
    trainer = make(
        tmp_path,
        student(0.1),
        data=rows(32),
        teacher_model=forbids_stops(),
        lambda_gold=0.0,
        max_steps=60,
        per_device_train_batch_size=32,
        max_completion_length=32,
        alarm_action="stop",
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = trainer.collapse_alarm.lines
    assert lines[0]["rollout/truncation_rate"] < 0.5
    assert lines[-1]["rollout/truncation_rate"] > 0.6
    assert trainer.state.global_step == lines[-1]["step"] < 60
    assert trainer.collapse_alarm.alarm.level is Level.COLLAPSE
    assert any("COLLAPSE" in record.getMessage() for record in caplog.records)


def correct(completions, **_):
    return [float(len(text) % 2) for text in completions]


@pytest.mark.parametrize("trainer", [DistillationTrainer, GRPOTrainer])
def test_inside_trainers_of_trl(tmp_path, trainer, capsys):
    alarm = CollapseAlarm("warn", RepetitionConfig(ngram=2))
    settings = SETTINGS | {"output_dir": str(tmp_path), "log_completions": True}
    given = {
        "model": student(),
        "train_dataset": rows(),
        "processing_class": make_tokenizer(),
        "callbacks": [alarm],
    }
    if trainer is GRPOTrainer:
        config = GRPOConfig(**settings, num_generations=4)
        made = trainer(reward_funcs=[correct], args=config, **given)
    else:
        made = trainer(teacher_model=teacher(), args=DistillationConfig(**settings), **given)
    made.train()
    assert [line["step"] for line in alarm.lines] == [1, 2, 3]
    logged = trl_parts.logged(made, "completions/clipped_ratio", "completions/mean_length")
    assert len(logged) == 3
    for line, (cut, length) in zip(alarm.lines, logged, strict=True):
        assert (line["rollout/truncation_rate"], line["rollout/mean_length"]) == (cut, length)
        assert 0 <= line["rollout/repetitive_share"] <= 1
    assert max(line["rollout/repetitive_share"] for line in alarm.lines) > 0
    assert alarm.alarm.step == 3
    capsys.readouterr()


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def chats():
    roles = [("user", "1+1="), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in roles]
    return datasets.Dataset.from_list([{"messages": messages}] * 16)


def others(folder):
    """Trainers that write no file of completions, and settings with which they say the most."""
    settings = {**SETTINGS, "output_dir": str(folder)}
    given = {"model": student(), "processing_class": chat_tokenizer()}
    with_budget = {**settings, "log_completions": True}
    rloo = RLOOConfig(**with_budget, num_generations=4, beta=0.0)
    yield RLOOTrainer, {**given, "reward_funcs": [correct], "args": rloo, "train_dataset": rows()}
    source = str(save_model(folder / "teacher", teacher(), chat_tokenizer()))
    given |= {"teacher_model": source, "train_dataset": chats()}
    yield IWOPDTrainer, {**given, "args": IWOPDConfig(**with_budget, log_completions_steps=1)}
    del settings["max_completion_length"]
    yield GKDTrainer, {**given, "args": GKDConfig(**settings, max_new_tokens=8, lmbda=1.0)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_inside_trainers_that_say_less(tmp_path, caplog, capsys):
    for trainer, given in others(tmp_path):
        alarm = CollapseAlarm("warn")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer(**given, callbacks=[alarm]).train()
        said = [r.getMessage() for r in caplog.records if r.name.endswith("trl.alarm")]
        if trainer is GKDTrainer:
            assert alarm.lines == []
            (message,) = said
            assert "saw nothing" in message
            continue
        assert [line["step"] for line in alarm.lines] == [1, 2, 3], trainer
        for line in alarm.lines:
            assert 0 <= line["rollout/truncation_rate"] <= 1
            assert 1 <= line["rollout/mean_length"] <= 8
        (message,) = [text for text in said if "no repetition" in text]
        assert "writes no" in message
    capsys.readouterr()


def test_nothing_is_said_of_a_run_of_no_steps(caplog):
    alarm, state = CollapseAlarm("warn"), TrainerState()
    with caplog.at_level(logging.WARNING):
        alarm.on_train_begin(arguments("trl-healthy"), state, TrainerControl())
        alarm.on_train_end(arguments("trl-healthy"), state, TrainerControl())
    assert not caplog.records


@pytest.mark.parametrize("kind", ["damaged", "left by another run"])
def test_files_that_are_not_those_of_this_step(tmp_path, kind, caplog):
    (tmp_path / "completions").mkdir()
    file = tmp_path / "completions" / "completions_00001.parquet"
    if kind == "damaged":
        file.write_bytes(b"PAR1")
    else:
        first = min((DUMPS / "trl-collapse" / "completions").iterdir())
        file.write_bytes(first.read_bytes())
    is_logged = kind == "damaged"
    args = DistillationConfig(str(tmp_path), log_completions=is_logged, use_cpu=True, bf16=False)
    alarm, state, control = CollapseAlarm("warn"), TrainerState(), TrainerControl()
    alarm.on_train_begin(args, state, control)
    state.global_step = 1
    with caplog.at_level(logging.WARNING):
        logs = {"completions/clipped_ratio": 0.25, "completions/mean_length": 9.0}
        alarm.on_log(args, state, control, logs=logs)
        alarm.on_step_begin(args, state, control)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no repetition" in message
    line = {"step": 1, "rollout/truncation_rate": 0.25, "rollout/mean_length": 9.0}
    assert alarm.lines == [line | {"alarm/level": 0}]


def test_without_completions_it_says_what_it_cannot_see(tmp_path, caplog):
    made = trl_parts.make_plain(tmp_path)
    alarm = CollapseAlarm()
    made.add_callback(alarm)
    with caplog.at_level(logging.WARNING):
        made.train()
    (message,) = [r.getMessage() for r in caplog.records if "log_completions" in r.getMessage()]
    assert "no repetition" in message
    assert [set(line) for line in alarm.lines] == [
        {"step", "rollout/truncation_rate", "rollout/mean_length", "alarm/level"}
    ] * 3
