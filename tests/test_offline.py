"""`stableopd score` and `stableopd golden`, local and served."""

import json

import pytest

from fault_server import said, serving
from served_parts import vllm_like
from stableopd.offline.source import LocalJudge
from tiny import (
    EOS,
    files_in,
    make_llama,
    make_tokenizer,
    make_world,
    run_cli,
    save_model,
    write_config,
    write_rows,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("offline") / "w")
    assert run_cli("train", write_config(folder, run={"output": str(folder / "run")}))[0] == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(world, output, *arguments):
    return run_cli("score", "--rollouts", world / "run", "--output", output, *arguments)


def test_score_is_what_the_training_wrote(world, tmp_path):
    code, out, err = score(world, tmp_path / "s.jsonl", "--model", world / "teacher")
    assert code == 0, err
    files = sorted((world / "run/rollouts").glob("*.jsonl"))
    expected = [line for file in files for line in lines(file)]
    found = lines(tmp_path / "s.jsonl")
    assert len(found) == len(expected) == 16
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.pop("teacher_logprobs") == pytest.approx(
            theirs.pop("teacher_logprobs"), abs=2e-5
        )
        assert mine == theirs
    assert "16 rollouts" in out


def test_score_by_a_server_goes_on_after_a_kill(world, tmp_path):
    with serving(vllm_like(make_llama(1, width=48, sharp=8))) as server:
        served = ("--url", server.url, "--patience-s", "0")
        output = tmp_path / "s.jsonl"
        code, _, err = score(world, output, *served)
        assert code == 0, err
        whole = output.read_bytes()
        cut = whole.split(b"\n")
        output.write_bytes(b"\n".join(cut[:5]) + b"\n" + cut[5][:20])
        num_asked = len(server.asked)
        assert score(world, output, *served)[0] == 0
        assert output.read_bytes() == whole
        assert len(server.asked) - num_asked < num_asked
        code, _, err = score(world, output, *served, "--stop", "token")
        assert code == 2
        assert "made with stop = 'event', and this is 'token'" in err
    code, _, _ = score(world, tmp_path / "l.jsonl", "--model", world / "teacher")
    for mine, theirs in zip(lines(output), lines(tmp_path / "l.jsonl"), strict=True):
        assert mine["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-4)


def test_score_of_texts(world, tmp_path):
    """Text without ids gets ids, and the scores that its ids have."""
    tokenizer = make_tokenizer()

    def is_text(row):
        ids = tokenizer(row["completion"])["input_ids"]
        return row["completion_ids"] == ids + [EOS] * (row["stop_reason"] == "stop")

    files = sorted((world / "run/rollouts").glob("*.jsonl"))
    first = next(row for file in files for row in lines(file) if is_text(row))
    keep = ("prompt", "completion", "stop_reason")
    texts = write_rows(tmp_path / "texts.jsonl", [{k: first[k] for k in keep}])
    output = tmp_path / "out.jsonl"
    code, _, err = run_cli(
        "score", "--rollouts", texts, "--output", output, "--model", world / "teacher"
    )
    assert code == 0, err
    (line,) = lines(output)
    for name in ("prompt_ids", "completion_ids"):
        assert line[name] == first[name]
    assert line["teacher_logprobs"] == pytest.approx(first["teacher_logprobs"], abs=2e-5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt_ids": [3], "completion_ids": ["x"]}, "line 1: completion_ids must be a list"),
        ({"prompt_ids": [], "completion_ids": [3]}, "line 1: the prompt has no token"),
        ({"prompt_ids": [3], "completion_ids": [999]}, "line 1: token id 999, but the teacher"),
        ({"prompt_ids": [3], "completion_ids": [3] * 200}, "line 1: 201 tokens, but the teacher"),
        ({"text": "x"}, "line 1: neither prompt_ids and completion_ids nor the texts"),
    ],
)
def test_rollouts_that_cannot_be_scored(world, tmp_path, row, words):
    file = write_rows(tmp_path / "bad.jsonl", [row])
    output = tmp_path / "out.jsonl"
    code, _, err = run_cli(
        "score", "--rollouts", file, "--output", output, "--model", world / "teacher"
    )
    assert code == 2
    assert words in err


CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get"}}]}
TEMPLATE = (
    "{% for m in messages %}#{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}{% endfor %}="
)


def test_score_of_messages(world, tmp_path):
    """Parts of text are joined, and null next to calls of tools is nothing: never `None`."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    user = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"text": "2"}]}
    tool = {"role": "tool", "content": "5"}
    rows = [{"prompt": p, "completion": "3"} for p in ([user], [user, CALLS, tool])]
    file, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    options = ("--model", world / "teacher", "--chat-template", template)
    code, _, err = run_cli("score", "--rollouts", file, "--output", output, *options)
    assert code == 0, err
    tokenizer = make_tokenizer()
    expected = ["#1+2=", "#1+2#get#5="]
    ids = [tokenizer(text)["input_ids"] for text in expected]
    assert [row["prompt_ids"] for row in lines(output)] == ids


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "line 1: column 'prompt[1].content' must be text, not null"),
        ([{"type": "image_url"}], "line 1: prompt[1].content has a part of the kind 'image_url'"),
        ({"a": 1}, "line 1: column 'prompt[1].content' must be text, not dict"),
    ],
)
def test_messages_that_cannot_be_scored(world, tmp_path, content, words):
    row = {"prompt": [{"role": "user", "content": content}], "completion": "3"}
    file = write_rows(tmp_path / "bad.jsonl", [row])
    options = ("--model", world / "teacher", "--output", tmp_path / "out.jsonl")
    code, _, err = run_cli("score", "--rollouts", file, *options)
    assert code == 2
    assert words in " ".join(err.split())


def speaks(**message):
    """A server whose answers all end with a stop and hold this message."""

    def script(path, body):
        if path == "/v1/models":
            return said({"data": [{"id": "t", "root": "t", "max_model_len": 128}]})
        choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
        return said({"choices": [choice] * body["n"]})

    return script


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_golden_never_loses_a_thought_that_the_server_parts_off(world, tmp_path, name):
    with serving(speaks(content="3", **{name: "1 and 2"})) as server:
        code, _, err = golden(world, tmp_path / "a.jsonl", "--url", server.url)
        assert code == 2
        assert "--reasoning-parser" in err
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}#{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
            "</think>{% endif %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}#{% endif %}"
        )
        tokenizer.save_pretrained(tmp_path / "t")
        options = ("--url", server.url, "--tokenizer", tmp_path / "t", "--max-problems", 2)
        code, _, err = golden(world, tmp_path / "b.jsonl", *options, "--stop-ids", 3)
    assert code == 0, err
    solutions = [row["solution"] for row in lines(tmp_path / "b.jsonl")]
    assert solutions == ["<think>1 and 2</think>3"] * 2


@pytest.mark.parametrize("message", [{"content": None}, {}])
def test_golden_tells_answers_without_text_from_those_without_a_stop(world, tmp_path, message):
    with serving(speaks(**message)) as server:
        output = tmp_path / "g.jsonl"
        code, out, err = golden(world, output, "--url", server.url, "--max-problems", 2)
    assert code == 0, err
    assert [row["num_empty"] for row in lines(tmp_path / "g.jsonl.attempts.jsonl")] == [1, 1]
    assert "2 ended without any text" in " ".join(out.split())


def golden(world, output, *arguments):
    options = ("--grader", "exact", "--temperature", "0", "--max-new-tokens", "8")
    return run_cli(
        "golden", "--data", world / "train.jsonl", "--output", output, *options, *arguments
    )


def test_score_by_a_server_that_changes(world, tmp_path):
    """From its second answer on it is another model, with the same name and tokens."""
    models = [vllm_like(make_llama(seed, width=48, sharp=8)) for seed in (1, 2)]
    count = [0]

    def script(path, body):
        count[0] += "prompt_logprobs" in body
        return models[count[0] > 1](path, body)

    with serving(script) as server:
        code, _, err = score(world, tmp_path / "s.jsonl", "--url", server.url)
    assert code == 2
    assert "another model" in err
    assert not (tmp_path / "s.jsonl").exists()


def test_golden_keeps_what_ended_and_local_and_served_agree(world, tmp_path):
    stops = ("--stop-ids", "3")  # greedily this teacher never ends with its own
    code, out, err = golden(
        world, tmp_path / "l.jsonl", "--model", world / "teacher", "--no-chat-template", *stops
    )
    assert code == 0, err
    with serving(vllm_like(make_llama(1, width=48, sharp=8))) as server:
        for name, template in (("s", "--no-chat-template"), ("c", "--chat-template")):
            output = tmp_path / f"{name}.jsonl"
            code, _, err = golden(world, output, "--url", server.url, template, *stops)
            assert code == 0, err
    attempts = lines(tmp_path / "l.jsonl.attempts.jsonl")
    assert len(attempts) == 20
    kept = lines(tmp_path / "l.jsonl")
    assert 0 < len(kept) < 20, "the test needs some that end and some that do not"
    assert [row["id"] for row in kept] == [r["id"] for r in attempts if r["solution"] is not None]
    assert lines(tmp_path / "s.jsonl") == lines(tmp_path / "c.jsonl") == kept
    assert f"{len(kept)} of 20 prompts have a solution" in out
    assert set(kept[0]) == {"id", "prompt", "solution", "answer"}


@pytest.mark.parametrize(
    "choice",
    [
        5,
        {},
        {"text": 5, "finish_reason": "stop"},
        {"text": ["1"], "finish_reason": "stop"},
        {"message": {"content": "1"}, "finish_reason": "stop"},
    ],
)
def test_golden_answers_that_are_none(world, tmp_path, choice):
    def odd(path, body, found):
        return said({"choices": [choice]}) if "n" in body else None

    with serving(vllm_like(make_llama(1), change=odd)) as server:
        code, _, err = golden(
            world,
            tmp_path / "g.jsonl",
            "--url",
            server.url,
            "--no-chat-template",
            "--patience-s",
            "5",
        )
    assert code == 2
    assert server.url in err


def test_golden_verified_goes_on_after_a_kill(world, tmp_path):
    """A server that knows the sums, but not the large ones, and is stopped in the middle."""
    output = tmp_path / "g.jsonl"

    def knows(path, body, found):
        if "n" in body:
            number = int(body["prompt"].partition("+")[0])
            right = 2 * number if number < 12 else 0
            found["choices"] = [
                {"text": "1", "finish_reason": "stop"},
                {"text": f"{right}", "finish_reason": "length"},
                {"text": f"{right}", "finish_reason": "stop"},
            ]

    with serving(vllm_like(make_llama(1), change=knows)) as server:
        options = ("--url", server.url, "-k", "3", "--verified", "--no-chat-template")
        options += ("--temperature", "1", "--max-in-flight", "3", "--stop-ids", str(EOS))
        code, out, err = golden(world, output, *options)
        assert code == 0, err
        # 0 + 0 and 12 of 20 are known; "1" is never right, and what is cut off is no solution.
        assert [row["solution"] for row in lines(output)] == [str(2 * n) for n in range(12)]
        assert "12 of 20 prompts have a solution; for the others no answer of 3 ended" in out
        whole, attempts = output.read_bytes(), tmp_path / "g.jsonl.attempts.jsonl"
        all_attempts = attempts.read_bytes()
        attempts.write_bytes(b"\n".join(all_attempts.split(b"\n")[:9]) + b"\n{")
        output.unlink()
        assert golden(world, output, *options)[0] == 0
        assert (output.read_bytes(), attempts.read_bytes()) == (whole, all_attempts)
        asked = [body for path, body, _ in server.asked if "n" in body]
        assert asked[0]["stop_token_ids"] == [EOS]
        assert len(asked) == 20 + 14
        code, _, err = golden(world, output, *options, "--seed", "1")
        assert code == 2
        assert "made with seed = 0, and this is 1" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no teacher: give --model"),
        (("--model", "m", "--tokenizer", "t"), "belong to a --url"),
        (("--url", "http://me:secret@h/v1"), "holds credentials"),
        (("--url", "http://h/v1", "--api-key-env", "sk-secret"), "the name of an environment"),
        (("--model", "m", "-k", "2"), "--temperature 0 writes the same answer 2 times"),
    ],
)
def test_options_that_cannot_work(world, tmp_path, arguments, words):
    code, _, err = golden(world, tmp_path / "g.jsonl", *arguments)
    assert code == 2
    assert words in err
    assert "secret" not in err


def test_a_file_of_something_else_is_not_overwritten(world, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("precious\n")
    code, _, err = score(world, file, "--model", world / "teacher")
    assert code == 2
    assert "was not made by this command" in err
    assert file.read_text() == "precious\n"


def test_score_goes_on_at_a_group(world, tmp_path, monkeypatch):
    """What is computed together decides the last digits: a killed group is scored again."""
    monkeypatch.setattr("stableopd.offline.score.GROUP", 6)
    judged = []
    judge = LocalJudge.judge

    def seen(self, items):
        judged.append(len(items))
        return judge(self, items)

    monkeypatch.setattr(LocalJudge, "judge", seen)
    output, options = tmp_path / "s.jsonl", ("--model", world / "teacher", "--batch-tokens", 64)
    assert score(world, output, *options)[0] == 0
    assert judged == [6, 6, 4]
    whole = output.read_bytes()
    for num, left in ((0, [6, 6, 4]), (5, [6, 6, 4]), (7, [6, 4]), (15, [4]), (16, [])):
        judged.clear()
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:num]))
        assert score(world, output, *options)[0] == 0
        assert judged == left
        assert output.read_bytes() == whole
    code, _, err = score(world, output, "--model", world / "teacher", "--batch-tokens", 128)
    assert (code, err.count("\n")) == (2, 1)


def test_scores_that_two_processes_left_name_the_cure(world, tmp_path):
    output, options = tmp_path / "s.jsonl", ("--model", world / "teacher")
    assert score(world, output, *options)[0] == 0
    whole = output.read_bytes()
    for damaged in (whole * 2, whole.replace(b"teacher_logprobs", b"teacher", 1)):
        output.write_bytes(damaged)
        code, _, err = score(world, output, *options)
        assert (code, err.count("\n")) == (2, 1)
        assert str(output) in err
        assert "remove" in err
        assert output.read_bytes() == damaged


def test_golden_holds_its_file_and_knows_its_own(world, tmp_path, monkeypatch):
    output, options = tmp_path / "g.jsonl", ("--model", world / "teacher")

    def interrupted(*_):
        raise KeyboardInterrupt

    # Before the first attempt: an empty file, which is its own.
    with monkeypatch.context() as patch:
        patch.setattr("stableopd.offline.golden._LocalWriter.write", interrupted)
        assert golden(world, output, *options)[0] == 130
    assert not (tmp_path / "g.jsonl.attempts.jsonl").exists()
    code, _, err = golden(world, output, *options)
    assert code == 0, err
    before = files_in(tmp_path)
    assert not any(name.endswith(".lock") for name in before)
    attempts = tmp_path / "g.jsonl.attempts.jsonl"
    first, second, *rest = attempts.read_bytes().splitlines(keepends=True)
    for damaged in ([second, first, *rest], [first] * 21, [b'{"id": 1}\n']):
        attempts.write_bytes(b"".join(damaged))
        code, _, err = golden(world, output, *options)
        assert (code, err.count("\n")) == (2, 1)
        assert "remove" in err
        assert output.read_bytes() == before["g.jsonl"]
    assert golden(world, tmp_path / "h.jsonl", *options, "-k", 10**12)[0] == 2
    assert golden(world, tmp_path / ("x" * 300), *options)[0] == 2


def test_a_template_that_changed_is_another_file(world, tmp_path):
    """Of `golden`, and of `score` for texts."""
    texts = write_rows(tmp_path / "t.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    model = save_model(tmp_path / "m", make_llama())
    scored = ("score", "--rollouts", texts, "--output", tmp_path / "s.jsonl", "--model", model)
    assert golden(world, tmp_path / "g.jsonl", "--model", model)[0] == 0
    assert run_cli(*scored)[0] == 0
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "0{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model)
    for code, _, err in (golden(world, tmp_path / "g.jsonl", "--model", model), run_cli(*scored)):
        assert (code, err.count("\n")) == (2, 1)
