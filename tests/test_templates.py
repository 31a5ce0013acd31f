"""Chat templates: variables and files for them in every command, and templates that do harm."""

import json
import threading
import time

import pytest

import tiny
from fault_server import serving
from served_parts import vllm_like
from stableopd import config
from stableopd.config_templates import kwargs_fault, parse_kwargs, with_template_value
from stableopd.data import templates
from stableopd.data.prompts import encode_prompts, render
from stableopd.types import ConfigError, DataError, Prompt

# Writes a "#" where it thinks, and a "?" where it does not.
SWITCH = (
    "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}?"
    "{% else %}#{% endif %}"
)
OTHER = "{{ messages[0].content }}{{ '?' * (number | default(2)) }}"


def run_template(template, seconds=None, monkeypatch=None):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    if monkeypatch is not None:
        monkeypatch.setattr(templates, "SECONDS", seconds)
    return templates.run_template(tokenizer, [{"role": "user", "content": "1"}], {}, "prompt 7")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny.make_world(tmp_path_factory.mktemp("templates") / "w")
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = SWITCH
    for role in ("student", "teacher"):
        tokenizer.save_pretrained(folder / role)
    (folder / "other.jinja").write_text(OTHER)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1/0 }}",
        "{% for a in range(10**12) %}{% endfor %}x",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for %}",
        "{{ messages[0].content | nothing }}",
        "{{ messages[9].content.x }}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__() }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_fails_is_one_sentence(template):
    with pytest.raises(DataError, match=r"^prompt 7: .*template") as info:
        run_template(template)
    assert "\n" not in str(info.value)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_stopped(monkeypatch):
    start = time.monotonic()
    with pytest.raises(DataError, match="stopped"):
        run_template(LOOP, 0.3, monkeypatch)
    assert time.monotonic() - start < 5
    # What stopped it does not arrive later, nor in another thread.
    assert run_template("x{{ messages[0].content }}") == "x1"
    found = []
    other = threading.Thread(target=lambda: found.append(run_template("y")))
    other.start()
    other.join()
    assert found == ["y"]


def test_a_call_that_keeps_what_stops_it_is_late_all_the_same():
    def keeps() -> str:
        try:
            while True:
                time.sleep(0.01)
        except BaseException:  # as code in a callback of the interpreter would
            return "x"

    with pytest.raises(TimeoutError):
        templates._WATCHDOG.within(0.1, keeps)
    assert run_template("{{ messages[0].content }}") == "1"


def test_a_template_that_writes_too_much(monkeypatch):
    monkeypatch.setattr(templates, "MAX_CHARS", 1000)
    with pytest.raises(DataError, match="1001 characters"):
        run_template("{{ 'a' * 1001 }}")


def test_render_with_variables():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = SWITCH
    prompt = Prompt("0", "1+1")
    assert render(prompt, tokenizer, "auto") == "1+1#"
    assert render(prompt, tokenizer, "auto", {"enable_thinking": False}) == "1+1?"
    assert render(prompt, tokenizer, "none", {"enable_thinking": False}) == "1+1"
    without, thinking = (
        encode_prompts([prompt], tokenizer, "auto", 99, None, 1, {"enable_thinking": flag})[0]
        for flag in (False, True)
    )
    assert without[:-1] == thinking[:-1]
    assert without != thinking


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        (["a=false", "b=x=y", "c=3", 'd=["u"]', "e="], {"a": False, "b": "x=y", "c": 3, "d": ["u"], "e": ""}),  # noqa: E501
        (['{"a": {"b": [1, 2.5, true]}}', "a=1"], {"a": 1}),
    ],
)  # fmt: skip
def test_variables_of_the_command_line(given, expected):
    assert parse_kwargs(given) == expected


@pytest.mark.parametrize(
    "given",
    ["thinking", "{", "[1]", "a=null", "a=NaN", "a b=1", "=1", "messages=[]", "tools=[]", "{1: 2}"],
)
def test_variables_that_are_refused(given):
    with pytest.raises(ConfigError, match="--chat-template-kwargs"):
        parse_kwargs([given])


def test_variables_that_are_nested_too_deep():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert "nested" in kwargs_fault({"a": deep})


def test_a_flag_of_old_still_works():
    assert with_template_value(["eval", "--chat-template"]) == ["eval", "--chat-template", "auto"]
    given = ["--chat-template", "--data", "x", "--chat-template", "none"]
    assert with_template_value(given) == ["--chat-template", "auto", *given[1:]]
    given = ["--chat-template", "-k", "4"]
    assert with_template_value(given) == ["--chat-template", "auto", "-k", "4"]


def test_configuration():
    base = {"student": {"model": "s"}, "teacher": {"model": "t"}}
    data = {"train": "d", "chat_template_kwargs": {"a": {"b": [1, False]}, "c": "x"}}
    made = config.parse({**base, "data": data})
    import tomllib

    assert config.parse(tomllib.loads(config.to_toml(made))) == made
    for wrong in (
        {"chat_template_kwargs": "x"},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template": "none", "chat_template_kwargs": {"a": 1}},
        {"chat_template": ""},
    ):
        with pytest.raises(ConfigError, match=r"data\.chat_template"):
            config.parse({**base, "data": {"train": "d", **wrong}})


def prompts_of(run):
    return [row["prompt_ids"] for row in lines(run / "rollouts" / "000001.jsonl")]


def test_train(world, tmp_path):
    made = {}
    for name, sets in {
        "plain": [],
        "switch": ["data.chat_template_kwargs={enable_thinking = false}"],
        "file": [f"data.chat_template={world / 'other.jinja'}"],
        "both": [
            f"data.chat_template={world / 'other.jinja'}",
            "data.chat_template_kwargs={number = 1}",
        ],
    }.items():
        given = [
            part for one in [*sets, f"run.output={tmp_path / name}"] for part in ("--set", one)
        ]
        code, _, err = tiny.run_cli("train", world / "config.toml", *given, "--set", "run.steps=1")
        assert code == 0, err
        made[name] = prompts_of(tmp_path / name)
    question, hash_ = tiny.VOCABULARY["?"], tiny.VOCABULARY["#"]
    assert {ids[-1] for ids in made["plain"]} == {hash_}
    assert [ids[:-1] for ids in made["plain"]] == [ids[:-1] for ids in made["switch"]]
    assert {ids[-1] for ids in made["switch"]} == {question}
    assert made["both"] == made["switch"]
    assert made["file"] == [[*ids, question] for ids in made["switch"]]
    # A checkpoint writes prompts as its run did.
    checkpoint = tmp_path / "file" / "checkpoints" / "000001"
    assert (checkpoint / "chat_template.jinja").read_text() == OTHER


def test_a_template_file_that_is_not_there(world, tmp_path):
    given = ("--set", f"data.chat_template={tmp_path / 'none.jinja'}")
    code, _, err = tiny.run_cli("train", world / "config.toml", *given)
    assert code == 2
    assert "none.jinja" in err
    for command in (
        ("eval", "--model", world / "student", "--data", world / "train.jsonl"),
        ("golden", "--model", world / "student", "--data", world / "train.jsonl", "--output", "x"),
        ("score", "--model", world / "student", "--rollouts", "x", "--output", "x"),
        ("doctor", "--student", world / "student"),
    ):
        code, _, err = tiny.run_cli(*command, "--chat-template", tmp_path / "none.jinja")
        assert code == 2
        assert "none.jinja" in err
        assert "Traceback" not in err


def test_eval(world, tmp_path):
    def prompts(name, *options):
        output = tmp_path / name
        code, _, err = tiny.run_cli(
            "eval", "--model", world / "student", "--data", world / "train.jsonl", "--output",
            output, "--grader", "exact", "--max-new-tokens", 2, "--max-problems", 2, *options,
        )  # fmt: skip
        return [row["prompt"] for row in lines(output / "train.jsonl")] if code == 0 else err

    assert prompts("a") == ["0+0=#", "1+1=#"]
    assert prompts("b", "--chat-template-kwargs", "enable_thinking=false") == ["0+0=?", "1+1=?"]
    assert prompts("c", "--chat-template", world / "other.jinja") == ["0+0=??", "1+1=??"]
    assert prompts("d", "--no-chat-template") == prompts("e", "--chat-template", "none")
    # A folder is not continued with another template.
    assert "chat_template" in prompts("a", "--chat-template-kwargs", "enable_thinking=false")
    assert "chat_template" in prompts("a", "--chat-template", world / "other.jinja")
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())["settings"]
    assert settings["chat_template"] is True


def test_score(world, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "completion": "2"}]
    given = tiny.write_rows(tmp_path / "in.jsonl", rows)

    def prompt_ids(name, *options):
        output = tmp_path / f"{name}.jsonl"
        code, _, err = tiny.run_cli(
            "score", "--model", world / "teacher", "--rollouts", given, "--output", output, *options
        )
        assert code == 0, err
        return lines(output)[0]["prompt_ids"]

    question, hash_ = tiny.VOCABULARY["?"], tiny.VOCABULARY["#"]
    assert prompt_ids("a")[-1] == hash_
    assert prompt_ids("b", "--chat-template-kwargs", '{"enable_thinking": false}')[-1] == question
    assert prompt_ids("c", "--chat-template", world / "other.jinja")[-2:] == [question] * 2


def test_golden_sends_them_to_a_server(world, tmp_path):
    with serving(vllm_like(tiny.make_llama(1, sharp=8))) as server:
        options = (
            "golden", "--data", world / "train.jsonl", "--url", server.url, "--max-problems", 1,
            "--grader", "exact", "--max-new-tokens", 2,
        )  # fmt: skip
        for name, more in (
            ("a", ()),
            ("b", ("--chat-template", world / "other.jinja")),
            ("c", ("--chat-template-kwargs", "enable_thinking=false")),
        ):
            output = tmp_path / f"{name}.jsonl"
            assert tiny.run_cli(*options, "--output", output, *more)[0] == 0
        bodies = [body for path, body, _ in server.asked if path.endswith("chat/completions")]
    assert [body.get("chat_template") for body in bodies] == [None, OTHER, None]
    assert [body.get("chat_template_kwargs") for body in bodies] == [
        None,
        None,
        {"enable_thinking": False},
    ]


def test_golden_here(world, tmp_path):
    found = set()
    for name, more in (("a", ()), ("b", ("--chat-template", world / "other.jinja"))):
        output = tmp_path / f"{name}.jsonl"
        code, _, err = tiny.run_cli(
            "golden", "--data", world / "train.jsonl", "--model", world / "teacher", "--output",
            output, "--max-problems", 8, "--temperature", 0, "--max-new-tokens", 8,
            "--grader", "exact", "--stop-ids", 3, *more,
        )  # fmt: skip
        assert code == 0, err
        found.add((tmp_path / f"{name}.jsonl.attempts.jsonl").read_text())
    assert len(found) == 2


def test_doctor_writes_prompts_with_them(world):
    from stableopd.doctor.patient import admit, settings_of

    pair = (str(world / "student"), str(world / "teacher"), str(world / "train.jsonl"))
    thinks = admit(settings_of(*pair)).prompt_ids[0]
    other = admit(settings_of(*pair, chat_template_kwargs={"enable_thinking": False}))
    assert other.prompt_ids[0] == (*thinks[:-1], tiny.VOCABULARY["?"])
    file = admit(settings_of(*pair, chat_template=str(world / "other.jinja")))
    assert file.prompt_ids[0] == (*other.prompt_ids[0], tiny.VOCABULARY["?"])
