import dataclasses
import os
import tomllib
import typing

import pytest

from stableopd import config_checks
from stableopd.config import (
    ADVANTAGE_PARAMETERS,
    PRESETS,
    STABILISERS,
    Config,
    load,
    parse,
    to_toml,
)
from stableopd.types import ConfigError

NEEDED = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": "train.jsonl"},
}
FIELDS = {
    f"{section.name}.{field.name}": hint
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(typing.get_type_hints(Config)[section.name])
    for hint in [typing.get_type_hints(typing.get_type_hints(Config)[section.name])[field.name]]
}


def make(*overrides, **sections):
    table = {name: dict(fields) for name, fields in NEEDED.items()}
    for section, fields in sections.items():
        table.setdefault(section, {}).update(fields)
    return parse(table, overrides)


def refused(*overrides, **sections):
    with pytest.raises(ConfigError) as info:
        make(*overrides, **sections)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_the_least_that_is_needed():
    config = make()
    assert config.objective.method == "stable_opd"
    assert config.run.trackers == ()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"objectiv": {}}, ("unknown section [objectiv]", "did you mean 'objective'?")),
        ({"zzz": {}}, ("unknown section [zzz]", "known are alarm, data, eval")),
        ({"rollout": {"max_new_token": 5}}, ("'rollout.max_new_token'", "'max_new_tokens'?")),
        ({"alarm": {"qqq": 5}}, ("'alarm.qqq'", "known are action")),
        ({"run": 3}, ("[run] must be a table",)),
        ({"method": "opd"}, ("unknown section [method]",)),
    ],
)
def test_unknown_names_come_with_the_nearest(table, words):
    with pytest.raises(ConfigError) as info:
        parse({**NEEDED, **table}, source="here.toml")
    assert str(info.value).startswith("here.toml: ")
    for word in words:
        assert word in str(info.value)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_a_wrong_type(name):
    section, _, key = name.partition(".")
    wrong = "three" if FIELDS[name] in (int, float, float | None) else 3
    message = refused(**{section: {key: wrong}})
    assert name in message
    assert "must be" in message
    assert repr(wrong) in message


def test_whole_numbers_do_for_numbers_and_nothing_else_does():
    assert make(rollout={"temperature": 2}).rollout.temperature == 2.0
    assert isinstance(make(rollout={"temperature": 2}).rollout.temperature, float)
    assert "a whole number" in refused(run={"steps": 2.0})
    assert "a whole number" in refused(run={"steps": True})
    assert "a number" in refused(rollout={"temperature": True})
    assert "true or false" in refused(objective={"golden_stop_label": 1})
    assert "a list of strings" in refused(run={"trackers": [1]})
    assert "a list of strings" in refused(run={"trackers": "tensorboard"})
    assert make(run={"trackers": ["tensorboard"]}).run.trackers == ("tensorboard",)


def test_every_number_has_a_range_and_every_range_a_field():
    numbers = {n for n, hint in FIELDS.items() if hint in (int, float, float | None)}
    assert numbers == set(config_checks.RANGES)
    assert set(config_checks.CHOICES) <= set(FIELDS)


@pytest.mark.parametrize("name", config_checks.RANGES)
def test_ranges(name):
    section, _, key = name.partition(".")
    low, high, closed = config_checks.RANGES[name]
    kind = int if FIELDS[name] is int else float
    wrong = [kind(low - 1), kind(high + 1)] + ([] if closed else [kind(low)])
    if kind is float:
        wrong += [float("nan"), float("inf"), float("-inf")]
    for value in wrong:
        message = refused(**{section: {key: value}})
        assert f"{name} = " in message
        assert "and at most" in message


@pytest.mark.parametrize("name", config_checks.CHOICES)
def test_choices(name):
    section, _, key = name.partition(".")
    value = ["nonsense"] if name == "run.trackers" else "nonsense"
    message = refused(**{section: {key: value}})
    assert f"{name} = 'nonsense' is not possible" in message
    for choice in config_checks.CHOICES[name]:
        assert choice in message


def test_servers_of_rollouts():
    url, engine = "http://127.0.0.1:8000/v1", {"engine": "vllm"}
    assert make(rollout=engine | {"url": url}).rollout.url == (url,)
    other = "https://other.example:8001/v1"
    assert make(rollout=engine | {"url": [url, other]}).rollout.url == (url, other)
    assert make(rollout={"url": ""}).rollout.url == make().rollout.url == ()
    assert "needs rollout.url" in refused(rollout=engine)
    assert "rollout.engine is 'transformers'" in refused(rollout={"url": url})
    assert "names a server twice" in refused(rollout=engine | {"url": [url, url]})
    assert "the address 'nonsense' is not one" in refused(rollout=engine | {"url": "nonsense"})
    assert "holds credentials" in refused(rollout=engine | {"url": "http://me:secret@host/v1"})
    assert "a list of strings" in refused(rollout=engine | {"url": [8000]})
    told = refused(rollout=engine | {"url": url, "api_key_env": "sk-very-secret"})
    assert "must be the name of an environment variable" in told
    assert "secret" not in told


# method: lambda_policy, lambda_gold, lambda_divergence, beta_reference, advantage
VALUES = {
    "opd": (1.0, 0.0, 0.0, 0.0, "log_ratio"),
    "stable_opd": (1.0, 1.0, 0.0, 0.01, "log_ratio"),
    "sft": (0.0, 1.0, 0.0, 0.0, "log_ratio"),
    "grpo": (1.0, 0.0, 0.0, 0.0, "group_reward"),
    "gkd": (0.0, 0.0, 1.0, 0.0, "log_ratio"),
}
PRESET_FIELDS = ("lambda_policy", "lambda_gold", "lambda_divergence", "beta_reference", "advantage")


@pytest.mark.parametrize("method", VALUES)
def test_presets(method):
    objective = make(objective={"method": method}).objective
    assert tuple(getattr(objective, name) for name in PRESET_FIELDS) == VALUES[method]
    assert objective.clip is None


def test_every_method_has_a_preset_of_the_same_fields():
    assert set(PRESETS) == set(VALUES) == set(config_checks.CHOICES["objective.method"])
    assert all(set(preset) == set(PRESET_FIELDS) for preset in PRESETS.values())
    assert set(ADVANTAGE_PARAMETERS) == set(config_checks.CHOICES["objective.advantage"])


def test_explicit_values_beat_the_preset_even_when_they_are_zero():
    objective = make(
        objective={"method": "stable_opd", "lambda_gold": 0, "beta_reference": 0.5}
    ).objective
    assert (objective.lambda_policy, objective.lambda_gold, objective.beta_reference) == (1, 0, 0.5)
    made = make("objective.lambda_gold=0.25", objective={"method": "opd", "lambda_gold": 3})
    assert made.objective.lambda_gold == 0.25


@pytest.mark.parametrize(
    ("advantage", "parameter"), [("clip", 5.0), ("tanh", 1.0), ("power", 1.0), ("floor", 0.01)]
)
def test_parameters_of_the_bounded_advantages(advantage, parameter):
    assert make(objective={"advantage": advantage}).objective.advantage_parameter == parameter
    given = make(objective={"advantage": advantage, "advantage_parameter": 0.5})
    assert given.objective.advantage_parameter == 0.5


def test_several_updates_turn_clipping_on():
    assert make(objective={"updates_per_batch": 2}).objective.clip == 0.2
    assert make(objective={"updates_per_batch": 2, "clip": 0.1}).objective.clip == 0.1


ODD = 'a "quoted"\\path\'s\n\ttab \x01\x1f\x7f\x85\u2028 €😀 ]#='


def test_the_alarm_only_speaks_unless_asked():
    assert make().alarm.action == "warn"
    assert STABILISERS == {"lambda_gold": 1.0, "beta_reference": 0.01}


def test_to_toml_round_trip():
    config = make(
        run={"output": ODD, "trackers": ["tensorboard"], "seed": 7},
        data={"train": ODD, "answer_marker": "####", "prompt": ""},
        objective={"method": "opd", "advantage": "clip", "updates_per_batch": 3},
        optimizer={"learning_rate": 1.2345678901234567e-7},
        student={"gradient_checkpointing": True},
    )
    text = to_toml(config)
    again = parse(tomllib.loads(text))
    assert again == config
    assert again.run.output == ODD
    assert to_toml(again) == text


@pytest.mark.parametrize("method", VALUES)
def test_resolved_twice_is_resolved_once(method):
    once = make(objective={"method": method})
    twice = parse(tomllib.loads(to_toml(once)))
    assert twice == once


def test_a_preset_is_resolved_before_it_is_written():
    text = to_toml(make(objective={"method": "stable_opd"}))
    table = tomllib.loads(text)
    assert table["objective"]["lambda_gold"] == 1.0
    assert "clip" not in table["objective"]


def test_parse_leaves_the_table_alone():
    table = {name: dict(fields) for name, fields in NEEDED.items()}
    parse(table, ["run.steps=9"])
    assert table == NEEDED


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.steps=7", "run", "steps", 7),
        (" run.steps =7", "run", "steps", 7),
        ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 1e-4),
        ("objective.method=opd", "objective", "method", "opd"),
        ('objective.method="opd"', "objective", "method", "opd"),
        ("data.answer_marker=####", "data", "answer_marker", "####"),
        ("data.answer_marker=a=b", "data", "answer_marker", "a=b"),
        ("data.train=C:\\data\\x y.jsonl", "data", "train", "C:\\data\\x y.jsonl"),
        ("data.solution=", "data", "solution", ""),
        ("student.gradient_checkpointing=true", "student", "gradient_checkpointing", True),
        ('run.trackers=["tensorboard"]', "run", "trackers", ("tensorboard",)),
    ],
)
def test_overrides(override, section, key, value):
    assert getattr(getattr(make(override), section), key) == value


def test_the_last_override_wins_over_the_file():
    assert make("run.steps=7", "run.steps=8", run={"steps": 6}).run.steps == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps", "write it as section.key=value"),
        ("steps=3", "write it as section.key=value"),
        ("run.=3", "write it as section.key=value"),
        ("ru.steps=3", "unknown section; did you mean 'run'?"),
        ("run.step=3", "unknown key 'run.step'; did you mean 'steps'?"),
        ("run.steps=", "run.steps must be a whole number, not ''"),
        ("run.steps=many", "run.steps must be a whole number, not 'many'"),
        ("run.trackers=tensorboard", "must be a list of strings"),
        ("run.output=\udcff", "not valid Unicode"),
    ],
)
def test_overrides_that_cannot_be(override, words):
    assert words in refused(override)


O = "objective"  # noqa: E741
IMPOSSIBLE = [
    ({O: {"method": "opd", "lambda_policy": 0}}, "no term left"),
    ({O: {"clip": 0.2}}, "objective.clip has no effect with one update"),
    ({"rollout": {"top_p": 0.9}}, "draw from another distribution"),
    ({"rollout": {"top_k": 5}}, "draw from another distribution"),
    ({O: {"method": "grpo"}, "rollout": {"rollouts_per_prompt": 1}}, "to 2 or more"),
    ({O: {"method": "grpo", "baseline": "kl"}}, "belongs to the log-ratio advantages"),
    ({O: {"top_k": 8}}, "support of the divergence term"),
    ({O: {"method": "gkd", "first_n": 3}}, "act on the policy term"),
    ({O: {"method": "gkd", "prefix_gain": 0.5}}, "act on the policy term"),
    ({O: {"method": "sft", "mask_truncated": True}}, "act on the policy term"),
    ({O: {"method": "gkd", "baseline": "kl"}}, "act on the policy term"),
    ({O: {"method": "gkd", "updates_per_batch": 2}}, "needs the policy term and its ratio"),
    ({O: {"method": "gkd", "beta_reference": 1, "reference_kl": "k1"}}, "a reward of the policy"),
    ({O: {"advantage_parameter": 2.0}}, "has no effect with advantage = 'log_ratio'"),
    ({O: {"advantage": "soft_log", "advantage_parameter": 2.0}}, "has no effect"),
    ({O: {"advantage": "floor", "advantage_parameter": 1.0}}, "must lie below 1"),
    ({"student": {"model": ""}}, "student.model is missing"),
    ({"teacher": {"model": ""}}, "needs a teacher"),
    ({O: {"method": "gkd"}, "teacher": {"model": ""}}, "needs a teacher"),
    ({"data": {"train": ""}}, "data.train is missing"),
    ({"data": {"grader": "math", "answer_marker": "#"}}, "math-verify finds the answer itself"),
    ({"eval": {"temperature": 0}}, "set eval.samples = 1"),
    ({"run": {"output": ""}}, "run.output is empty"),
    ({O: {"method": "sft"}, "alarm": {"action": "stop"}}, "'sft' writes none"),
    ({O: {"method": "sft"}, "alarm": {"action": "rollback"}}, "'rollback' answers a collapse"),
    (
        {O: {"method": "gkd", "reference_kl": "k1"}, "alarm": {"action": "strengthen"}},
        "'strengthen' turns the reference term on, but objective.reference_kl = 'k1'",
    ),
]


@pytest.mark.parametrize(("sections", "words"), IMPOSSIBLE, ids=[w for _, w in IMPOSSIBLE])
def test_impossible_combinations(sections, words):
    assert words in refused(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"top_p": 0.9, "allow_off_policy_sampling": True}},
        {O: {"method": "gkd"}, "rollout": {"top_p": 0.9}},
        {O: {"method": "gkd", "top_k": 8}},
        {O: {"method": "sft"}, "teacher": {"model": ""}},
        {O: {"method": "grpo"}, "teacher": {"model": ""}},
        {O: {"method": "opd", "lambda_policy": 0, "lambda_gold": 1}, "teacher": {"model": ""}},
        {"eval": {"temperature": 0, "samples": 1}},
        {O: {"reference_kl": "k1"}},
        {O: {"advantage": "floor", "advantage_parameter": 0.99}},
        {O: {"method": "sft"}, "alarm": {"action": "warn"}},
        {O: {"method": "grpo"}, "alarm": {"action": "rollback"}},
        {O: {"method": "gkd"}, "alarm": {"action": "rollback"}},
        {O: {"method": "gkd", "reference_kl": "k1"}, "alarm": {"action": "stop"}},
        {O: {"method": "opd", "reference_kl": "k1"}, "alarm": {"action": "rollback"}},
    ],
)
def test_combinations_that_are_next_to_impossible_ones(sections):
    assert isinstance(make(**sections), Config)


def test_load(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[student]\nmodel = "ä"\n[teacher]\nmodel = "t"\n[data]\ntrain = "d"\n')
    assert load(file, ["run.steps=3"]).student.model == "ä"
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    file.write_bytes(b'[run]\noutput = "\xff"\n')
    with pytest.raises(ConfigError, match="cannot be read"):
        load(file)
    file.write_text("[run\n")
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        load(file)
    file.write_text("[run]\nsteps = 1\nsteps = 2\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(file)


def test_the_embedded_world_needs_its_own_answer_marker():
    table = {
        "student": {"model": "embedded"},
        "teacher": {"model": "embedded"},
        "data": {"train": "embedded", "answer_marker": ";#"},
    }
    parse(table)
    with pytest.raises(ConfigError, match=r'set data\.answer_marker = ";#"'):
        parse(table, ["data.answer_marker=#"])


@pytest.mark.parametrize(
    "text",
    [
        "[run]\nsteps = " + "1" * 5000,
        "[run]\nsteps = 0x" + "f" * 9000,
        "[teacher]\nstop_ids = [0x" + "f" * 9000 + ", 1.5]",
        "x = " + "[" * 5000,
        "[optimizer]\nlearning_rate = 1" + "0" * 400,
        '[run]\noutput = "a\\u0000b"',
        '[run]\ntrackers = ["a\\u0000b"]',
    ],
)
def test_what_toml_takes_and_no_field_does(tmp_path, text):
    """Values on which `tomllib`, `float`, `repr` or `pathlib` raise errors of their own."""
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as told:
        load(file)
    assert len(str(told.value)) < 600
    if text.startswith("[") and "\n" in text:
        section, field = text[1:].split("]\n")
        name, _, value = field.partition(" = ")
        with pytest.raises(ConfigError):
            parse({}, [f"{section}.{name}={value}"])


def test_a_config_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"c\.toml"):
        load(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="too long"):
        load(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.learning_rate=1e-320",
        "optimizer.learning_rate=10",
        "optimizer.grad_clip=1e-300",
        "rollout.prompts_per_step=1000000000",
        "eval.samples=1000000",
    ],
)
def test_nonsense_is_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        make(override)
