"""What is done about the alarm, decided from lines of metrics alone."""

import dataclasses

import pytest

from stableopd.config import parse
from stableopd.diagnostics.alarm import Level
from stableopd.training.guard import Event, Guard, ask, replay, spared

EVERY = 5


def make_config(action, method="opd", **alarm):
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    table |= {"objective": {"method": method}, "run": {"save_every": EVERY}}
    return parse(table | {"alarm": {"action": action, **alarm}})


def line(step, collapsed=False):
    rates = (0.95, 90.0, 0.6) if collapsed else (0.02, 20.0, 0.01)
    names = ("rollout/truncation_rate", "rollout/mean_length", "rollout/repetitive_share")
    return {"step": step, **dict(zip(names, rates, strict=True))}


class Story:
    """Lines one after the other, as the loop shows them: healthy but for some steps."""

    def __init__(self, config):
        self.config, self.guard = config, Guard(config.objective)
        self.lines, self.events, self.checkpoints = [], [], []

    def go(self, count, collapsed=False):
        for _ in range(count):
            shown = line(len(self.lines) + 1, collapsed)
            self.guard, event, marks = ask(self.guard, shown, self.config, self.checkpoints)
            self.lines.append(shown | marks)
            if event is not None:
                self.events.append(event)
            if shown["step"] % EVERY == 0:
                self.checkpoints.append(shown["step"])
        return self

    def until_acted(self, actions=("stop", "rollback", "strengthen"), limit=40):
        """Collapsed lines until one of these actions is taken; returns its event."""
        for _ in range(limit):
            before = len(self.events)
            self.go(1, collapsed=True)
            if len(self.events) > before and self.events[-1].action in actions:
                return self.events[-1]
        raise AssertionError(f"nothing was done in {limit} collapsed steps: {self.events}")


def test_none_asks_nothing():
    story = Story(make_config("none")).go(20).go(20, collapsed=True)
    assert story.events == []
    assert story.guard == Guard(story.config.objective)
    assert all("alarm/level" not in shown for shown in story.lines)


def test_warn_tells_each_change_of_level_once():
    story = Story(make_config("warn")).go(20).go(25, collapsed=True).go(40)
    levels = [shown["alarm/level"] for shown in story.lines]
    assert levels[:20] == [0] * 20
    assert max(levels) == 2
    assert levels[-1] == 0
    changes = [i + 1 for i in range(1, len(levels)) if levels[i] != levels[i - 1]]
    assert [event.step for event in story.events] == changes
    for event in story.events:
        assert event.level == ("ok", "warn", "collapse")[levels[event.step - 1]]
        assert event.action == ("none" if event.level == "ok" else "warn")
        assert bool(event.reason) == (event.level != "ok")
        assert event.restored_step is None
        assert (event.lambda_gold, event.beta_reference) == (0.0, 0.0)
    assert story.guard.objective == story.config.objective


def test_stop_once_for_a_collapse_that_lasts():
    story = Story(make_config("stop")).go(20)
    stop = story.until_acted()
    assert (stop.action, stop.level) == ("stop", "collapse")
    # The run goes on with --resume and is still collapsed: no second stop.
    story.go(20, collapsed=True)
    assert [event.action for event in story.events].count("stop") == 1
    # It recovers, and collapses again.
    story.go(40)
    assert story.guard.alarm.level == Level.OK
    assert story.until_acted().action == "stop"


def test_rollback_to_the_newest_healthy_checkpoint():
    story = Story(make_config("rollback")).go(23)
    last_ok = story.guard.alarm.last_ok
    event = story.until_acted()
    assert event.action == "rollback"
    assert last_ok is not None
    assert event.restored_step == last_ok // EVERY * EVERY
    assert 0 < event.restored_step < event.step
    last = story.lines[-1]
    assert (last["step"], last["alarm/level"]) == (event.step, 2)
    assert last["alarm/restored_step"] == event.restored_step
    assert story.guard.alarm.level == Level.OK
    assert story.guard.rollbacks == ((event.restored_step, event.step),)
    assert sum("alarm/restored_step" in shown for shown in story.lines) == 1


def test_rollback_to_the_initial_student_where_there_is_no_checkpoint():
    story = Story(make_config("rollback")).go(20)
    story.checkpoints.clear()
    story.config = dataclasses.replace(
        story.config, run=dataclasses.replace(story.config.run, save_every=1000)
    )
    assert story.until_acted().restored_step == 0


def test_checkpoints_of_a_replaced_student_and_of_interrupts_are_passed_over():
    story = Story(make_config("rollback")).go(23)
    first = story.until_acted()
    collapsed = [c for c in story.checkpoints if first.restored_step < c < first.step]
    assert collapsed
    interrupted = next(s for s in (first.step + 1, first.step + 2) if s % EVERY)
    story.checkpoints.append(interrupted)
    again = story.until_acted()
    assert again.restored_step == first.restored_step
    # After a healthy stretch the newer student is good to go back to.
    story.go(30)
    third = story.until_acted()
    assert again.step < third.restored_step < third.step
    assert third.restored_step % EVERY == 0


def weights(event):
    return event.lambda_gold, event.beta_reference


def test_the_stabilisers_are_those_of_the_preset():
    preset = Story(make_config("none", method="stable_opd")).guard.objective
    turned_on = Story(make_config("strengthen")).go(20).until_acted()
    assert weights(turned_on) == (preset.lambda_gold, preset.beta_reference) == (1.0, 0.01)


@pytest.mark.parametrize("action", ["rollback", "strengthen"])
def test_weights_are_turned_on_and_then_raised_and_then_the_run_stops(action):
    story = Story(make_config(action, max_actions=3, factor=2.0))
    found = []
    for _ in range(4):
        found.append(story.go(40).until_acted())
    assert [event.action for event in found] == [action] * 3 + ["stop"]
    expected = [(1.0, 0.01), (2.0, 0.02), (4.0, 0.04), (4.0, 0.04)]
    assert [weights(event) for event in found] == [pytest.approx(pair) for pair in expected]
    assert found[-1].reason.endswith("; the alarm has acted 3 times (alarm.max_actions)")
    assert found[-1].restored_step is None
    assert story.guard.num_actions == 3
    now = story.guard.objective
    assert (now.lambda_gold, now.beta_reference) == weights(found[-1])
    assert dataclasses.replace(now, lambda_gold=0.0, beta_reference=0.0) == story.config.objective


def test_weights_that_are_on_are_raised_at_once():
    event = Story(make_config("strengthen", method="stable_opd")).go(20).until_acted()
    assert weights(event) == pytest.approx((3.0, 0.03))


def test_strengthen_acts_once_for_a_collapse_that_lasts():
    story = Story(make_config("strengthen")).go(20)
    assert story.until_acted().restored_step is None
    story.go(30, collapsed=True)
    assert [event.action for event in story.events].count("strengthen") == 1
    assert story.guard.alarm.level == Level.COLLAPSE


@pytest.mark.parametrize("first", ["none", "warn", "stop"])
@pytest.mark.parametrize("then", ["rollback", "strengthen"])
def test_a_collapse_that_was_only_told_is_answered_once_the_action_may(first, then):
    story = Story(make_config(first)).go(23).go(20, collapsed=True)
    # As --resume does: other settings, and the state made again from the folder.
    story.config = make_config(then)
    rows = map(dataclasses.asdict, story.events)
    story.guard = replay(story.config.objective, story.lines, rows)
    assert story.guard.alarm.level == Level.COLLAPSE
    story.go(1, collapsed=True)
    assert story.events[-1].action == then
    assert (story.events[-1].restored_step is not None) == (then == "rollback")
    story.go(1, collapsed=True)
    assert [event.action for event in story.events].count(then) == 1


def test_warn_and_stop_do_not_answer_what_another_has_answered():
    story = Story(make_config("strengthen")).go(20)
    story.until_acted()
    for action in ("stop", "warn"):
        story.config = make_config(action)
        before = len(story.events)
        story.go(5, collapsed=True)
        assert len(story.events) == before


@pytest.mark.parametrize("action", ["warn", "stop", "rollback", "strengthen"])
def test_replay_of_any_part_gives_the_state_of_then(action):
    story = Story(make_config(action, max_actions=2))
    states = [story.guard]
    for collapsed in [False] * 23 + [True] * 12 + [False] * 25 + [True] * 40 + [False] * 20:
        states.append(story.go(1, collapsed).guard)
    assert len({event.action for event in story.events}) >= 2
    for step, state in enumerate(states):
        rows = [dataclasses.asdict(e) for e in story.events if e.step <= step]
        assert replay(story.config.objective, story.lines[:step], rows) == state


def test_events_of_another_version_may_hold_more():
    story = Story(make_config("stop")).go(20).go(15, collapsed=True)
    rows = [dataclasses.asdict(event) | {"since": "a later version"} for event in story.events]
    assert rows
    assert replay(story.config.objective, story.lines, rows) == story.guard


def test_an_event_is_a_line():
    event = Event(3, "collapse", "why", "rollback", 0, 1.0, 0.01)
    assert Event(**dataclasses.asdict(event)) == event


def test_spared_are_the_newest_healthy_checkpoint_and_the_one_that_may_follow_it():
    story = Story(make_config("rollback"))
    assert spared(story.guard, [5], story.config) == set()
    story.go(33)
    last_ok = story.guard.alarm.last_ok
    before, after = last_ok // EVERY * EVERY, (last_ok // EVERY + 1) * EVERY
    assert spared(story.guard, story.checkpoints, story.config) == {before, after}
    while not story.guard.rollbacks:
        kept = spared(story.guard, story.checkpoints, story.config)
        assert kept == spared(story.guard, sorted(kept), story.config)
        story.go(1, collapsed=True)
    assert story.events[-1].restored_step > 0
    assert story.events[-1].restored_step in kept
    silent = make_config("none")
    assert spared(story.guard, story.checkpoints, silent) == set()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_at_every_save_loses_no_checkpoint_that_a_rollback_needs(keep):
    """With a checkpoint at every step the healthy one is as new as with all of them kept."""
    config = make_config("rollback")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=1))
    story, kept = Story(config), []
    for _ in range(40):
        story.go(1)
        kept.append(len(story.lines))
        saved = spared(story.guard, kept, config) | set(kept[-keep:])
        kept = [step for step in kept if step in saved]
        assert len(kept) <= keep + 3
    last_ok = story.guard.alarm.last_ok
    newest = max(step for step in kept if step <= last_ok)
    assert last_ok - newest <= 10


def test_what_evaluations_take_back_is_spared_too():
    config = make_config("rollback")
    story = Story(config)
    for step in range(1, 61):
        accuracy = {"eval/accuracy": 0.5, "eval/accuracy_se": 0.01} if step == 20 else {}
        if step == 60:
            accuracy = {"eval/accuracy": 0.1, "eval/accuracy_se": 0.01}
        story.guard, _, _ = ask(story.guard, line(step) | accuracy, config, [])
        if step == 59:
            kept = spared(story.guard, range(EVERY, 60, EVERY), config)
            assert {20, 50} <= kept
    assert story.guard.alarm.last_ok == 20
    assert 20 in spared(story.guard, sorted(kept), config)
