"""What the alarm does to a run: the loop, the run folder, the student and what is told."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

import alarm_parts
import step_parts
import tiny
from alarm_parts import RATE, SAVE_EVERY, STEPS, WARMUP, WEIGHTS, configure
from stableopd.config import load
from stableopd.runfolder import RunFolder
from stableopd.terminal import alarm_message, stop_message
from stableopd.training.loop import train
from stableopd.training.resume import find_past
from stableopd.training.setup import prepare
from stableopd.types import ConfigError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return alarm_parts.make_world(tmp_path_factory.mktemp("world") / "w")


def run_all(config, resume=False, overrides=(), until=STEPS):
    """Train up to a step, as `stableopd train` would."""
    run = prepare(load(config, overrides), resume)
    steps = [line["step"] for line in train(run, lambda: False)]
    assert steps[-1] <= until
    return run


@pytest.fixture(scope="module")
def runs(world):
    """A run with each action, of the same seed."""
    actions = ("none", "warn", "stop", "rollback", "strengthen")
    return {action: run_all(configure(world, action, action)) for action in actions}


def told(run, action):
    """The events with an action."""
    return [event for event in run.folder.events() if event["action"] == action]


def without_marks(lines):
    """Lines of metrics without what the alarm adds, and the weights."""
    own = ("alarm/", "objective/")
    return [{k: v for k, v in line.items() if not k.startswith(own)} for line in lines]


def metrics(run):
    return tiny.metrics_of(run.folder.path)


def test_the_world_collapses(runs):
    rates = [line["rollout/truncation_rate"] for line in metrics(runs["none"])]
    assert len(rates) == STEPS
    assert sum(rates[:5]) / 5 < 0.1
    assert sum(rates[-5:]) / 5 > 0.8


def test_none_leaves_no_trace_and_warn_changes_nothing_but_tells(runs):
    assert not (runs["none"].folder.path / "events.jsonl").exists()
    assert not any("alarm/level" in line for line in metrics(runs["none"]))
    assert without_marks(metrics(runs["warn"])) == without_marks(metrics(runs["none"]))
    events = runs["warn"].folder.events()
    assert {event["action"] for event in events} == {"warn"}
    assert "collapse" in {event["level"] for event in events}
    folders = [runs[name].folder.path for name in ("warn", "none")]
    assert tiny.files_in(folders[0] / "rollouts") == tiny.files_in(folders[1] / "rollouts")


@pytest.mark.parametrize("action", ["stop", "rollback", "strengthen"])
def test_the_same_bits_up_to_the_first_action(runs, action):
    first = told(runs[action], action)[0]["step"]
    assert 10 < first < STEPS
    found, expected = (metrics(runs[name])[:first] for name in (action, "warn"))
    assert found[-1].pop("alarm/restored_step", None) == told(runs[action], action)[0].get(
        "restored_step"
    )
    assert found == expected
    for step in range(1, first + 1):
        assert runs[action].folder.rollouts(step) == runs["warn"].folder.rollouts(step)
    if action != "stop":
        weights = [metrics(runs[action])[first][f"objective/{n}"] for n in WEIGHTS]
        assert weights == [1.0, 0.01]
        assert metrics(runs[action])[first] != metrics(runs["warn"])[first]
        assert "loss/reference_kl" in metrics(runs[action])[first]
    assert "loss/reference_kl" not in metrics(runs[action])[first - 1]
    assert "loss/golden" not in metrics(runs[action])[first - 1]


def test_stop_saves_and_ends_and_the_run_can_go_on(runs, world):
    stopped = runs["stop"]
    event = stopped.folder.events()[-1]
    assert (event["action"], event["level"]) == ("stop", "collapse")
    assert metrics(stopped)[-1]["step"] == event["step"] == stopped.folder.checkpoints()[-1]
    shutil.copytree(stopped.folder.path, world / "stopped")
    again = run_all(configure(world, "stopped", "stop"), resume=True)
    # It is still collapsed, and does not stop again for that.
    assert metrics(again)[-1]["step"] == STEPS
    assert metrics(again) == metrics(runs["warn"])
    assert len(told(again, "stop")) == 1


def test_after_a_stop_the_action_alone_may_be_changed(runs, world):
    shutil.copytree(runs["stop"].folder.path, world / "changed")
    config = configure(world, "changed", "rollback")
    with pytest.raises(ConfigError, match=r"--resume: alarm.factor is 2.0, but the run in"):
        prepare(load(config, ["alarm.factor=2"]), True)
    again = run_all(config, resume=True)
    stop, rollback = told(again, "stop")[0], told(again, "rollback")[0]
    assert rollback["step"] == stop["step"] + 1
    assert rollback["restored_step"] == told(runs["rollback"], "rollback")[0]["restored_step"]
    assert 'action = "rollback"' in again.folder.config_text()
    rates = [line["rollout/truncation_rate"] for line in metrics(again)]
    assert rates[rollback["step"]] < 0.2 < 0.5 < rates[stop["step"]]


def parameters(run):
    return {name: p.detach().clone() for name, p in run.student.model.named_parameters()}


def assert_equal_state(optimizer, saved):
    found = optimizer.state_dict()["state"]
    assert found.keys() == saved["state"].keys()
    for key, values in found.items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in values.items())


def lines_until_rollback(run):
    for line in train(run, lambda: False):
        if "alarm/restored_step" in line:
            return line
    raise AssertionError("there was no rollback")


def interrupted_and_resumed(run):
    """The run, resumed after two steps: its student is no longer the initial one."""
    should_stop = iter((False, True)).__next__
    assert [line["step"] for line in train(run, should_stop)] == [1, 2]
    return prepare(run.config, resume=True)


def test_a_rollback_puts_weights_and_optimizer_back_and_not_the_schedule(world):
    schedule = {"schedule": "linear"}
    config = configure(world, "exact", "rollback", optimizer=schedule)
    run = prepare(load(config))
    line = lines_until_rollback(run)
    restored = line["alarm/restored_step"]
    assert restored > 0
    path = run.folder.checkpoint_path(restored)
    saved = load_file(path / "model.safetensors")
    found = parameters(run)
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    state = torch.load(path / "trainer" / "state.pt")
    assert_equal_state(run.optimizer, state["optimizer"])
    rate = run.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(RATE * (STEPS - line["step"]) / (STEPS - WARMUP))
    assert rate != state["optimizer"]["param_groups"][0]["lr"]


def test_a_rollback_to_the_initial_student_is_with_a_fresh_optimizer(world):
    config = configure(world, "initial", "rollback", run={"save_every": STEPS})
    run = prepare(load(config))
    assert any("can put back the initial student alone" in note for note in run.notes)
    assert any("a frozen copy of the initial student are held" in note for note in run.notes)
    before = parameters(run)
    run = interrupted_and_resumed(run)
    assert not torch.equal(parameters(run)["lm_head.weight"], before["lm_head.weight"])
    line = lines_until_rollback(run)
    assert line["alarm/restored_step"] == 0
    after = parameters(run)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert run.optimizer.state_dict()["state"] == {}
    assert run.optimizer.param_groups[0]["lr"] == RATE


@pytest.mark.parametrize("every", [SAVE_EVERY, STEPS])
def test_a_rollback_of_an_adapter(world, every):
    name = f"lora-{every}"
    changes = {"student": {"lora_rank": 4}, "optimizer": {"learning_rate": 5e-3}}
    config = configure(world, name, "rollback", run={"save_every": every}, **changes)
    run = prepare(load(config))
    assert not any("frozen copy" in note for note in run.notes)
    before = parameters(run)
    run = interrupted_and_resumed(run)
    restored = lines_until_rollback(run)["alarm/restored_step"]
    after = parameters(run)
    assert (restored == 0) == (every == STEPS)
    if restored:
        saved = load_file(run.folder.checkpoint_path(restored) / "adapter_model.safetensors")
        adapter = {k.replace(".default", ""): v for k, v in after.items() if "lora_" in k}
        assert saved.keys() == adapter.keys()
        assert all(torch.equal(adapter[key], saved[key]) for key in saved)
    else:
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_steps_are_never_renumbered_and_their_draws_are_new(runs):
    run = runs["rollback"]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    event = told(run, "rollback")[0]
    first, second = (run.folder.rollouts(s + 1) for s in (event["restored_step"], event["step"]))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]
    # The student of a rollback stops as the healthy one did; what collapsed stays as evidence.
    rates = [line["rollout/truncation_rate"] for line in metrics(run)]
    assert rates[event["step"] - 1] > 0.5
    assert rates[event["step"]] < 0.2


def test_the_weights_in_force_are_those_of_the_events(runs):
    for action in ("rollback", "strengthen"):
        events = {event["step"]: event for event in runs[action].folder.events()}
        now = [0.0, 0.0]
        for line in metrics(runs[action]):
            assert [line[f"objective/{name}"] for name in WEIGHTS] == now
            if line["step"] in events:
                now = [events[line["step"]][name] for name in WEIGHTS]
        assert now[0] >= 1.0


def test_the_state_of_the_alarm_is_made_again_from_the_folder(runs, world):
    for action in ("warn", "rollback", "strengthen"):
        past = find_past(load(configure(world, action, action)), resume=True)
        levels = [line["alarm/level"] for line in metrics(runs[action])]
        assert past.guard.alarm.step is not None
        assert past.guard.num_actions == len(told(runs[action], action)) * (action != "warn")
        if "alarm/restored_step" not in metrics(runs[action])[-1]:
            assert {"ok": 0, "warn": 1, "collapse": 2}[past.guard.alarm.level] == levels[-1]


def test_checkpoints_that_a_rollback_may_need_are_kept(world):
    config = configure(world, "kept", "rollback", run={"save_every": 1, "keep_checkpoints": 1})
    run = prepare(load(config))
    for line in train(run, lambda: False):
        event = [e for e in run.folder.events() if e["step"] == line["step"]]
        if event and event[0]["restored_step"]:
            assert event[0]["restored_step"] in run.folder.checkpoints()
            break
        assert len(run.folder.checkpoints()) <= 4
        assert line["step"] in run.folder.checkpoints()
    else:
        raise AssertionError("there was no rollback to a checkpoint")


def test_a_reference_that_is_there_but_off_is_not_asked():
    """With beta 0 it costs nothing, and losses and gradients are the same bits."""
    objective = step_parts.objective("opd")
    results, students = [], []
    for reference in (None, step_parts.model(3)):
        student = step_parts.model(0)
        counted = None if reference is None else step_parts.Counted(reference)
        who = step_parts.players(student, step_parts.model(1, width=48), reference)
        results.append(step_parts.run(who, step_parts.work(objective, golden=[])))
        students.append(step_parts.flat(student))
        assert counted is None or counted.calls == 0
    first, second = (dataclasses.replace(r, score_s=0.0, update_s=0.0) for r in results)
    assert first == second
    assert torch.equal(*students)


def test_the_ids_of_stops_are_known(runs):
    stops = runs["warn"].folder.environment()["stops"]
    assert stops == {
        "mode": "event",
        "student_ids": [tiny.EOS],
        "teacher_ids": [tiny.EOS],
        "event_ids": list(runs["warn"].stops.event_ids),
    }


EVENT = {"step": 7, "level": "collapse", "reason": "truncation rate 0.9", "action": "warn"}
EVENT |= {"restored_step": None, "lambda_gold": 3.0, "beta_reference": 0.03}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Step 7: COLLAPSE: truncation rate 0.9. The run goes on, as alarm.action only warns."),
        ({"level": "warn"}, "Step 7: WARN: truncation rate 0.9."),
        ({"level": "ok", "action": "none"}, "Step 7: the alarm sees nothing suspicious any more."),
        ({"action": "stop"}, "COLLAPSE: truncation rate 0.9. The run is saved and stops."),
        ({"action": "strengthen"}, "objective.lambda_gold is now 3 and objective.beta_reference"),
        ({"action": "rollback", "restored_step": 5}, "The student of step 5 is put back;"),
        ({"action": "rollback", "restored_step": 0}, "The initial student is put back;"),
    ],
)
def test_what_is_told(changes, words):
    assert words in alarm_message(EVENT | changes)


def test_what_is_told_after_a_stop():
    assert "after step 7 of 9. Go on all the same" in stop_message(EVENT, 9, "stop")
    assert "alarm.action=rollback" in stop_message(EVENT, 9, "stop")
    assert "alarm.action=rollback" not in stop_message(EVENT, 9, "rollback")
    assert stop_message(EVENT, 7, "stop").endswith("after step 7 of 7.")


def test_events_of_a_run_can_be_told(runs):
    for run in runs.values():
        assert all(alarm_message(event) for event in RunFolder.open(run.folder.path).events())
