"""Training with served teachers: the same run as with one in this process, and what is refused."""

import json

import pytest

import parallel_parts
from fault_server import said, serving
from served_parts import vllm_like
from stableopd.config import parse
from stableopd.types import ConfigError
from tiny import (
    END,
    EOS,
    VOCABULARY,
    make_llama,
    make_tokenizer,
    make_world,
    metrics_of,
    run_cli,
    save_model,
    sums,
    write_config,
    write_rows,
)

server = parallel_parts.server  # a fixture

KEY = "sk-very-secret-key"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a run with the teacher in this process, to compare with."""
    folder = make_world(tmp_path_factory.mktemp("served") / "w")
    config = write_config(folder, run={"output": str(folder / "local"), "steps": 3})
    assert run_cli("train", config)[0] == 0
    return folder


def teacher_of(world):
    return make_llama(1, width=48, sharp=8)


def served_config(world, name, url, **sections):
    teacher = {"model": "", "url": url, "stop_ids": [EOS], "patience_s": 0.0}
    sections["teacher"] = teacher | sections.get("teacher", {})
    sections["run"] = {"output": str(world / name), "steps": 3} | sections.get("run", {})
    return write_config(world, f"{name}.toml", **sections)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def require_same_metrics(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in mine.items():
            expected = theirs[name]
            if expected is not None:  # a mean over nothing
                expected = pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert value == expected, name
        assert "advantage/mean" in mine


def test_a_run_with_a_served_teacher(world, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")  # as a mounted secret has it
    with serving(vllm_like(teacher_of(world))) as server:
        config = served_config(world, "served", server.url, teacher={"api_key_env": "TEACHER_KEY"})
        code, out, err = run_cli("train", config)
        assert code == 0, err
        assert server.asked[-1][2]["Authorization"] == f"Bearer {KEY}"
    require_same_metrics(metrics_of(world / "served"), metrics_of(world / "local"))
    files = [f for f in (world / "served").rglob("*") if f.is_file()]
    assert len(files) > 5
    assert not any(KEY.encode() in f.read_bytes() for f in files)
    assert KEY not in out + err
    rows = [lines_of(world / run / "rollouts/000001.jsonl") for run in ("served", "local")]
    for mine, theirs in zip(*rows, strict=True):
        assert mine["teacher_logprobs"] == pytest.approx(theirs["teacher_logprobs"], abs=1e-4)


def test_a_server_that_is_lost_costs_no_step(world):
    """The second step's scoring fails; the first step is saved, and the run goes on from it."""
    is_lost = []

    def lose(path, body, found):
        steps = world / "lost" / "rollouts" / "000001.jsonl"
        if "prompt_logprobs" in body and steps.exists() and not is_lost:
            is_lost.append(True)
            return said({}, 503)
        return None

    fields = {"run": {"save_every": 3}}
    with serving(vllm_like(teacher_of(world), change=lose)) as server:
        config = served_config(world, "lost", server.url, **fields)
        code, _, err = run_cli("train", config)
        assert code == 2
        assert "error: step 2: teacher: " in err
        assert "The student after step 1 is saved: go on with --resume." in err
        assert len(metrics_of(world / "lost")) == 1
        moved = server.url.replace("127.0.0.1", "localhost")
        code, _, err = run_cli("train", config, "--resume", "--set", f"teacher.url={moved}")
        assert code == 0, err
    require_same_metrics(metrics_of(world / "lost"), metrics_of(world / "local"))


def test_a_teacher_that_changes_costs_no_step(world):
    """Another model behind the same address in the second step: its scores train nothing."""
    other = vllm_like(make_llama(5, width=48, sharp=8))
    first = vllm_like(teacher_of(world))

    def script(path, body):
        has_changed = (world / "changes" / "rollouts" / "000001.jsonl").exists()
        return (other if has_changed else first)(path, body)

    with serving(script) as server:
        config = served_config(world, "changes", server.url, run={"save_every": 3})
        code, _, err = run_cli("train", config)
        assert code == 2
        assert "error: step 2: teacher: " in err
        assert "another model" in err
    assert len(metrics_of(world / "changes")) == 1
    with serving(first) as server:
        code, _, err = run_cli("train", config, "--resume", "--set", f"teacher.url={server.url}")
        assert code == 0, err
    require_same_metrics(metrics_of(world / "changes"), metrics_of(world / "local"))


def test_another_served_teacher_is_refused_by_resume_and_allowed_by_name(world):
    with serving(vllm_like(teacher_of(world))) as server:
        config = served_config(world, "replaced", server.url, run={"steps": 1})
        assert run_cli("train", config)[0] == 0
        assert run_cli("train", config, "--resume", "--set", "run.steps=2")[0] == 0
    other = vllm_like(make_llama(7, width=48, sharp=8))
    with serving(other) as server:
        more = ("--resume", "--set", "run.steps=3", "--set", f"teacher.url={server.url}")
        code, _, err = run_cli("train", config, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert "--allow-changed teacher" in err
        code, _, err = run_cli("train", config, *more, "--allow-changed", "teacher")
        assert code == 0, err
    assert [line["step"] for line in metrics_of(world / "replaced")] == [1, 2, 3]
    told = json.loads((world / "replaced" / "environment.json").read_text())
    assert told["changed"] == [{"step": 2, "inputs": ["served"]}]


def test_two_processes_ask_for_their_shares(world, server):
    """With top-k 1 a rollout is no matter of the draw; self-test and probes are sent twice."""
    num_asked = []
    rollout = {"top_k": 1, "allow_off_policy_sampling": True}
    with serving(vllm_like(teacher_of(world))) as http:
        for name, num in (("one", 1), ("both", 2)):
            config = served_config(world, name, http.url, rollout=rollout)
            before = len(http.asked)
            codes, errors = server.train(config, num=num)
            assert codes == [0] * num, errors
            num_asked.append(len(http.asked) - before)
    require_same_metrics(metrics_of(world / "both"), metrics_of(world / "one"))
    assert num_asked[1] == num_asked[0] + 4 + 3


def test_teachers_by_a_column(world):
    rows = [{**row, "teacher": ["", "other"][i % 2]} for i, row in enumerate(sums())]
    data = {"train": str(write_rows(world / "two.jsonl", rows))}
    other = vllm_like(make_llama(5), name="another")  # `model` is the name of the default alone
    with serving(vllm_like(teacher_of(world))) as one, serving(other) as two:
        teacher = {"model": "tiny", "by_name": "BY_NAME"}
        config = served_config(world, "two", one.url, teacher=teacher, data=data, run={"steps": 1})
        table = f'{{other = "{two.url}"}}'
        config.write_text(config.read_text().replace('"BY_NAME"', table))
        code, _, err = run_cli("train", config)
        assert code == 0, err
        lines = lines_of(world / "two/rollouts/000001.jsonl")
        names = {row["prompt"]: row["teacher"] for row in rows}
        assert {names[line["prompt"]] for line in lines} == {"", "other"}
        for line in lines:
            mine, theirs = (two, one) if names[line["prompt"]] else (one, two)
            ids = [*line["prompt_ids"], *line["completion_ids"]]
            assert any(body.get("prompt") == ids for _, body, _ in mine.asked)
            assert not any(body.get("prompt") == ids for _, body, _ in theirs.asked)
        rows[6]["teacher"] = "nobody"
        write_rows(world / "two.jsonl", rows)
        new = config.read_text().replace(f'"{world}/two"', f'"{world}/three"')
        config.write_text(new)
        code, _, err = run_cli("train", config)
    assert code == 2
    assert "two.jsonl, line 7: column 'teacher' names the teacher 'nobody', which" in err


def test_another_tokenizer_is_refused_before_the_first_step(world):
    swapped = make_tokenizer({**VOCABULARY, "4": VOCABULARY["5"], "5": VOCABULARY["4"]})
    with serving(vllm_like(teacher_of(world), swapped)) as server:
        code, _, err = run_cli("train", served_config(world, "swapped", server.url))
    assert code == 2
    assert "has another tokenizer than the student" in err
    assert not (world / "swapped").exists()


@pytest.mark.parametrize("field", ["tokenizer", "model"])
def test_stop_ids_from_a_folder(world, tmp_path, field):
    """Of the tokenizer, or of the model that is served under its folder's name."""
    other = make_llama(1, width=48)
    other.generation_config.eos_token_id = [END]
    save_model(tmp_path / "t", other, make_tokenizer(eos="<end>"))
    teacher = {"stop_ids": [], field: str(tmp_path / "t")}
    name = f"folder-{field}"
    with serving(vllm_like(teacher_of(world), name=teacher.get("model", "tiny"))) as server:
        config = served_config(world, name, server.url, teacher=teacher, run={"steps": 1})
        code, _, err = run_cli("train", config)
    assert code == 0, err
    stops = json.loads((world / name / "environment.json").read_text())["stops"]
    assert (stops["teacher_ids"], stops["event_ids"]) == ([END], [EOS, END])


def refused(teacher=None, **sections):
    table = {
        "student": {"model": "s"},
        "data": {"train": "d"},
        "teacher": {"url": "http://h:1/v1", "stop_ids": [1]} | (teacher or {}),
        **sections,
    }
    with pytest.raises(ConfigError) as found:
        parse(table)
    assert KEY not in str(found.value)
    assert "secret" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("teacher", "sections", "words"),
    [
        ({"url": "http://u:secret@h/v1"}, {}, "teacher.url: the address holds credentials"),
        ({"by_name": {"m": "http://h/v1?k=secret"}}, {}, "teacher.by_name.m: the address goes on"),
        ({"by_name": {"m": ""}}, {}, "teacher.by_name.m: the address '' is not one"),
        ({"by_name": "http://h/v1"}, {}, "must be a table of names"),
        ({"api_key_env": KEY}, {}, "must be the name of an environment variable"),
        ({"temperature": 0.5}, {}, "leave it at 1"),
        ({"stop_ids": []}, {}, "teacher.tokenizer, or its ids as teacher.stop_ids"),
        ({"stop_ids": [], "model": "no/folder"}, {}, "or its ids as teacher.stop_ids"),
        ({"stop_ids": [True]}, {}, "must be a list of whole numbers"),
        ({"gguf_file": "x.gguf"}, {}, "leave one of the two out"),
        ({"url": [], "model": "t"}, {}, "belong to a served teacher"),
        ({}, {"objective": {"method": "opd", "baseline": "kl"}}, "leave the baseline out"),
        ({}, {"objective": {"method": "gkd"}}, "set objective.top_k"),
    ],
)
def test_configurations_that_cannot_work(teacher, sections, words):
    assert words in refused(teacher, **sections)


def test_doctor_needs_the_folder(world):
    config = served_config(world, "doctor", "http://127.0.0.1:1/v1")
    code, _, err = run_cli("doctor", "--config", config)
    assert code == 2
    assert "teacher.url names a server; give its folder as --teacher" in err


def test_a_key_that_is_not_set(world, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    config = served_config(
        world, "nokey", "http://127.0.0.1:1/v1", teacher={"api_key_env": "NO_KEY"}
    )
    code, _, err = run_cli("train", config)
    assert code == 2
    assert "'NO_KEY', which is to hold the key of the teacher's server, is not set" in err
