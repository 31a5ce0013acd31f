"""TOMLs, tables, estimate and commands of recipes/openr1-math agree with one another."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import typer

from openr1_parts import RECIPE, ROOT, run, scripts
from stableopd import config

pytestmark = pytest.mark.recipe

PAIRS = ("1.5b-openthinker3", "1.5b-r1-distill", "7b-openthinker3")
README = (RECIPE / "README.md").read_text()


@pytest.fixture(scope="module")
def recipe():
    with scripts() as modules:
        yield modules


@pytest.mark.parametrize("pair", PAIRS)
def test_the_numbers_of_the_paper(pair):
    found = config.load(RECIPE / f"{pair}.toml")
    assert found.rollout.prompts_per_step * found.rollout.rollouts_per_prompt == 64
    assert found.rollout.rollouts_per_prompt == 4
    assert found.rollout.temperature == 1.0
    assert found.rollout.max_new_tokens == 8192
    assert found.optimizer.learning_rate == 1e-6
    assert found.optimizer.weight_decay == 0
    assert (found.repetition.window_chars, found.repetition.ratio) == (10_000, 10)
    assert found.objective.method == "stable_opd"
    assert found.objective.stop == "event"
    assert found.eval.temperature == 0.6


@pytest.mark.parametrize("pair", PAIRS)
def test_the_weights_in_comments_are_those_of_the_method(pair):
    """They are not set, so that another method gets its own."""
    text = (RECIPE / f"{pair}.toml").read_text()
    said = dict(re.findall(r"^# (lambda_gold|beta_reference) = (\S+) # open", text, re.MULTILINE))
    objective = config.load(RECIPE / f"{pair}.toml").objective
    assert {key: float(value) for key, value in said.items()} == {
        "lambda_gold": objective.lambda_gold,
        "beta_reference": objective.beta_reference,
    }
    plain = config.load(RECIPE / f"{pair}.toml", ["objective.method=opd"]).objective
    assert (plain.lambda_gold, plain.beta_reference) == (0, 0)


@pytest.mark.parametrize("file", [*PAIRS, "sft-1.5b", "sft-7b"])
def test_every_value_tells_where_it_comes_from(file):
    """But for names of files, seeds, and what only says how often something is written."""
    bare = {"output", "seed", "save_every", "data", "every", "samples"}
    lines = [line for line in (RECIPE / f"{file}.toml").read_text().splitlines() if " = " in line]
    assert len(lines) > 15
    for line in lines:
        key, _, rest = line.removeprefix("# ").partition(" = ")
        said = any(word in rest for word in ("paper", "open", "memory alone", "GB", '"sft"'))
        assert said or key in bare, line


def test_the_two_warm_starts_differ_in_model_and_memory_alone():
    small, large = (
        tomllib.loads((RECIPE / f"sft-{size}.toml").read_text()) for size in ("1.5b", "7b")
    )
    for key, value in (("run", "output"), ("student", "model"), ("eval", "batch_size")):
        assert small[key].pop(value) != large[key].pop(value)
    assert small == large


@pytest.mark.parametrize(("name", "tied"), [("SMALL", True), ("LARGE", False)])
def test_weights_are_those_of_the_architecture(recipe, name, tied):
    shape = getattr(recipe["estimate"], name)
    settings = transformers.Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 128,
        num_key_value_heads=shape.key_value // 128,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(settings)
    assert shape.weights() == sum(p.numel() for p in model.parameters())
    linear = [m for n, m in model.named_modules() if "proj" in n]
    assert shape.lora(8) == 8 * sum(m.in_features + m.out_features for m in linear)


def test_the_estimate_knows_the_tomls(recipe):
    estimate = recipe["estimate"]
    for stage in estimate.STAGES:
        size = "1.5b" if stage.student is estimate.SMALL else "7b"
        file = f"{size}-openthinker3" if stage.teacher else f"sft-{size}"
        found = config.load(RECIPE / f"{file}.toml")
        assert stage.steps == found.run.steps
        assert stage.batch == found.eval.batch_size
        assert found.eval.max_problems == estimate.LOOK_PROBLEMS
        assert found.optimizer.micro_batch_tokens == estimate.MICRO_BATCH
        rollout = found.rollout
        assert rollout.max_new_tokens == estimate.BUDGET
        assert rollout.max_new_tokens + rollout.max_prompt_tokens == estimate.CONTEXT
        if stage.teacher:
            assert stage.batch == rollout.batch_size
            assert rollout.prompts_per_step == estimate.PROMPTS
            assert rollout.prompts_per_step * rollout.rollouts_per_prompt == estimate.ROLLOUTS
        else:
            assert rollout.prompts_per_step == estimate.GOLDEN
    # 143 problems of 32 answers in batches of 64, and 1,446 answers in such batches.
    assert estimate.evaluation_hours() == pytest.approx((71.5 + 0.5 + 23) * 8192 * 0.03 / 3600)


def summary(accuracy: float, k: int, problems: int, half: float | None = 0.06):
    """A data set's part of summary.json, as stableopd eval writes it."""

    def spread(mean: float, half: float | None):
        if half is None:
            return {"mean": mean, "low": None, "high": None}
        return {"mean": mean, "low": mean - half, "high": mean + half}

    return {
        "num_problems": problems,
        "num_samples": k,
        "accuracy": spread(accuracy, half),
        "pass_at": {"1": spread(accuracy, half)},
        "truncation_rate": spread(0.25, 0.1),
        "repetition_rate": spread(0.5, 0.1),
        "mean_length": spread(4000.0, 100.0),
        "num_timeouts": 0,
    }


def write_arm(folder: Path, accuracies: dict[str, float], sets, **options):
    """The two folders that evaluate.sh leaves for an arm."""
    for kind, has_many in (("k32", True), ("k1", False)):
        parts = {
            name: summary(value, sets[name].num_samples, sets[name].num_problems, **options)
            for name, value in accuracies.items()
            if (sets[name].num_samples > 1) is has_many
        }
        (folder / kind).mkdir(parents=True)
        whole = {"format": 1, "model": "m", "settings": {}, "sets": parts}
        (folder / kind / "summary.json").write_text(json.dumps(whole))


def test_table(recipe, tmp_path):
    sets, table = recipe["evaluation_sets"].SETS, recipe["table"]
    values = (0.6, 0.2, 0.3, 0.4, 0.1, 0.05)
    all_six = dict(zip(sets, values, strict=True))
    write_arm(tmp_path / "1.5b-openthinker3-opd", all_six, sets)
    write_arm(tmp_path / "1.5b-base", {"math500": 0.3, "amc": 0.2}, sets)
    write_arm(tmp_path / "1.5b-r1-distill-opd-golden", all_six, sets, half=None)
    write_arm(tmp_path / "7b-sft", all_six, sets)
    file = tmp_path / "7b-sft" / "k32" / "summary.json"
    whole = json.loads(file.read_text())
    whole["sets"]["amc"] = summary(0.4, 4, 20)
    file.write_text(json.dumps(whole))
    text = table.tables(table.read_scores(tmp_path))
    mean = 100 * sum(values) / 6
    half = 100 * math.sqrt(6 * 0.06**2) / 6
    assert f"| | ours | - | - | - | {mean:.1f} +- {half:.1f} | - |" in text
    assert f"| OPD + golden | not reported | {mean:.1f} |" in text
    assert f"| | ours | - | {mean:.1f} +- {half:.1f} * | - | - | - |" in text
    assert "| 40.0 (k = 4, 20 problems) |" in text
    assert "| 1.5b-base | 30.0 | - | - | 20.0 | - | - | 0.25 | 0.50 | 4000 |" in text


def test_table_says_what_is_wrong(recipe, tmp_path):
    file = tmp_path / "arm" / "k1" / "summary.json"
    file.parent.mkdir(parents=True)
    for content in ("{", '{"format": 3, "sets": {}}', '{"format": 1, "sets": {"amc": {}}}', "[]"):
        file.write_text(content)
        code, _, error = run(recipe["table"], tmp_path)
        assert code == 2, content
        assert "not a summary of stableopd eval" in error
        assert error.count("\n") == 1
    same = {"format": 1, "sets": {"amc": summary(0.1, 32, 83)}}
    file.write_text(json.dumps(same))
    other = tmp_path / "arm" / "again"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps(same))
    code, _, error = run(recipe["table"], tmp_path)
    assert code == 2
    assert "amc was evaluated twice" in error


def test_the_page_holds_what_the_scripts_print(recipe):
    for table in recipe["estimate"].tables().split("\n\n"):
        assert table.strip() in README
    template = (RECIPE / "table-template.md").read_text()
    assert template == recipe["table"].tables({})
    for name, numbers in recipe["table"].PAPER.values():
        cells = " | ".join(map(str, numbers))
        assert f"| {name} | {cells} |" in README
        assert f"| {name} | paper | {cells} |" in template


def commands():
    """Every command of the page, with its variables filled in."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    assigned = dict(re.findall(r'^([A-Z]+)="?([^"\n]*)"?$', text, re.MULTILINE))
    for name, value in assigned.items():
        text = re.sub(rf"\${name}\b", value, text)
    assert "$" not in text
    lines = [shlex.split(line) for line in text.splitlines()]
    return [words for words in lines if words and not re.match(r"[A-Z]+=", words[0])]


def parse(app: typer.Typer, arguments: list[str]) -> None:
    """Let typer read the arguments of an app or of one of its commands; nothing is run."""
    command = typer.main.get_command(app)
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("command", list(arguments))


def test_commands_of_the_page(recipe):
    """Each one is understood, and uses what an earlier one has made."""
    from stableopd.cli import app

    made: set[str] = set()
    evaluated: list[str] = []
    for words in commands():
        program, *rest = words
        if program == "hf":
            assert rest[0] == "download"
            made.add(words[-1])
        elif program == "python":
            path = ROOT / rest[0]
            assert path.parent == RECIPE
            parse(recipe[path.stem].app, rest[1:])
            made |= {words[4]} if rest[1] in ("extend", "merge") else set()
        elif program == "bash":
            assert (ROOT / rest[0]).is_file()
            assert rest[1].partition("/checkpoints/")[0] in made, rest[1]
            evaluated.append(Path(rest[3]).name)
        else:
            assert program == "stableopd"
            parse(app, rest)
        if words[:2] == ["stableopd", "train"]:
            overrides = [b for a, b in itertools.pairwise(words) if a == "--set"]
            settings = config.load(ROOT / words[2], overrides)
            assert settings.student.model.partition("/checkpoints/")[0] in made
            assert settings.teacher.model in made | {""}
            assert settings.run.output not in made, "two runs in one folder"
            made.add(settings.run.output)
            if "/checkpoints/" in settings.student.model:
                assert settings.student.model.endswith("/001547")
    estimate, table = recipe["estimate"], recipe["table"]
    assert len(evaluated) == len(set(evaluated)) == estimate.EVALUATIONS
    known = {table.arm_of(pair, m) for pair in table.PAPER for m in table.METHODS}
    known |= {table.arm_of("1.5b-r1-distill", m) for m in table.ABLATION}
    assert set(evaluated) == known - {"1.5b-grpo", "7b-grpo"}
    runs = {name for name in made if "/runs/" in name}
    assert len(runs) == sum(stage.runs for stage in estimate.STAGES)
