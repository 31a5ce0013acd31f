"""`stableopd diagnose` as a person or a cron job calls it, on run folders and on dumps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run_parts
import tiny
from stableopd.diagnose.runs import Reading, diagnose_dump, diagnose_run, open_paths
from stableopd.diagnose.watch import watch
from stableopd.diagnostics.alarm import Level
from stableopd.diagnostics.lines import lines_of

DUMPS = Path(__file__).parent / "dumps"


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    return run_parts.make_run(tmp_path_factory.mktemp("runs") / "opd", jump=22)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return run_parts.make_run(tmp_path_factory.mktemp("runs") / "stable")


def test_a_collapse_is_told_with_its_step_and_its_cause(collapsed):
    code, out, err = tiny.run_cli("diagnose", collapsed.path)
    assert (code, err) == (1, "")
    flat = " ".join(out.split())
    assert "640 rollouts of 40 steps (1 to 40), read as run folder." in flat
    assert "cause B, repetition" in flat
    assert "Both models stop with the same ids (1)" in flat
    assert "100% of those that end in a loop a final answer stands before the loop" in flat
    assert "first says COLLAPSE at step 2" in flat


def test_json_is_one_object_with_stable_keys(collapsed):
    code, out, err = tiny.run_cli("diagnose", collapsed.path, "--json")
    assert (code, err) == (1, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    keys = {"truncation_rate", "repetition_rate", "mean_length", "num_rollouts"}
    assert keys | {"onset", "verdict", "by_step"} <= set(found)
    rows = [row for step in range(1, 41) for row in collapsed.rollouts(step)]
    cut = sum(row["stop_reason"] == "length" for row in rows) / len(rows)
    assert found["truncation_rate"] == pytest.approx(cut)
    assert found["num_rollouts"] == len(rows) == 640
    lengths = [len(row["completion_ids"]) for row in rows]
    assert found["mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["verdict"] == "B"
    assert 21 <= found["onset"]["step"] <= 24
    assert [entry["step"] for entry in found["by_step"]] == list(range(1, 41))
    assert found["by_step"][0]["repetitive_advantage"] is None
    assert found["worst"][0]["loop_period"] == 3
    assert found["alarm"]["level"] == "collapse"


def test_healthy_and_too_little(healthy, tmp_path):
    assert tiny.run_cli("diagnose", healthy.path)[0] == 0
    short = run_parts.make_run(tmp_path / "short", steps=1)
    (short.path / "rollouts" / "000001.jsonl").write_text(json.dumps(short.rollouts(1)[0]) + "\n")
    code, out, _ = tiny.run_cli("diagnose", short.path)
    assert code == 3
    assert "too few to judge" in " ".join(out.split())


def test_a_run_that_kept_no_rollouts(healthy, tmp_path):
    shutil.copytree(healthy.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rollouts")
    code, out, _ = tiny.run_cli("diagnose", tmp_path / "run")
    assert code == 3
    assert "kept no rollouts" in out


def test_steps_without_rollouts_count_by_their_metrics(collapsed, tmp_path):
    shutil.copytree(collapsed.path, tmp_path / "run")
    for step in range(1, 41):
        if step % 10:
            (tmp_path / "run" / "rollouts" / f"{step:06d}.jsonl").unlink()
    found = diagnose_run(run_parts.RunFolder.open(tmp_path / "run"))
    assert len(found.summary.by_step) == 4
    assert len(found.lines) == 40
    assert 21 <= (found.onset.step or 0) <= 24


def test_rollouts_of_a_run_given_as_a_dump(collapsed):
    code, out, err = tiny.run_cli("diagnose", collapsed.path / "rollouts", "--window-chars", 32)
    assert code == 1
    assert err == "Reading 40 files as stableopd (JSONL).\n"
    assert "L = 32" in out


def test_dumps_tell_what_the_run_folder_tells(collapsed):
    reading = Reading(window_chars=32, ratio=2.0)
    dump = diagnose_dump(open_paths([collapsed.path / "rollouts"], reading), reading)
    run = diagnose_run(collapsed)
    assert dump.summary.overall == run.summary.overall
    for mine, theirs in zip(lines_of(dump.summary), run.lines, strict=True):
        for name in ("rollout/truncation_rate", "rollout/mean_length", "rollout/accuracy"):
            assert mine[name] == pytest.approx(theirs[name])


@pytest.mark.parametrize("name", ["verl", "slime", "nemo-rl", "prime-rl"])
def test_each_format_is_named(name):
    code, out, err = tiny.run_cli("diagnose", DUMPS / name, "--json")
    assert code in (0, 1, 3)
    assert name in err.lower()
    assert json.loads(out)["num_rollouts"] > 0


@pytest.mark.parametrize(
    ("name", "code", "verdict"), [("a", 1, "A"), ("b", 1, "B"), ("neither", 0, "healthy")]
)
def test_the_causes_are_told_apart_on_real_rollouts(name, code, verdict):
    """Thinned rollouts of the embedded world: another stop id for the teacher, and loops."""
    found = tiny.run_cli("diagnose", DUMPS / "causes" / f"{name}.jsonl.gz", "--json")
    assert (found[0], json.loads(found[1])["verdict"]) == (code, verdict)


def test_text_alone_is_counted_with_a_tokenizer():
    embedded = Path(__file__).parent.parent / "src" / "stableopd" / "embedded" / "student"
    options = ("--tokenizer", embedded, "--max-new-tokens", 96, "--json")
    code, out, _ = tiny.run_cli("diagnose", DUMPS / "verl", *options)
    found = json.loads(out)
    assert (code, found["verdict"], found["length_unit"]) == (1, "B", "tokens")
    assert found["truncation_source"] == "max-new-tokens"
    assert any("--max-new-tokens" in note for note in found["notes"])


def test_a_mapping_reads_anything(tmp_path):
    rng = run_parts.random.Random(1)
    rows = [run_parts.rollout(1 + i // 16, i, i % 2 == 0, rng) for i in range(320)]
    made = [{"it": r["step"], "said": r["completion"], "why": r["stop_reason"]} for r in rows]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    mapped = [f"--map={pair}" for pair in ("completion=said", "step=it", "stop_reason=why")]
    code, out, _ = tiny.run_cli("diagnose", tmp_path / "x.jsonl", *mapped, "--json")
    assert (code, json.loads(out)["truncation_rate"]) == (0, 0.5)
    code, _, err = tiny.run_cli("diagnose", tmp_path / "x.jsonl", "--map", "completion")
    assert code == 2
    assert "ROLE=COLUMN" in err


def test_damaged_lines_are_named_or_refused(collapsed, tmp_path):
    shutil.copytree(collapsed.path / "rollouts", tmp_path / "r")
    with (tmp_path / "r" / "000003.jsonl").open("a") as file:
        file.write('{"step": 3, "complet\n')
    code, out, _ = tiny.run_cli("diagnose", tmp_path / "r", "--json")
    assert code == 1
    assert "000003.jsonl, line 17" in "".join(json.loads(out)["notes"])
    code, out, err = tiny.run_cli("diagnose", tmp_path / "r", "--strict")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "line 17" in err


def test_what_cannot_be_diagnosed_is_one_line(collapsed, healthy, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "nothing").mkdir()
    for arguments in (
        (tmp_path / "missing",),
        (tmp_path / "empty.jsonl",),
        (tmp_path / "odd.jsonl",),
        (tmp_path / "nothing",),
        (collapsed.path, healthy.path),
        (collapsed.path, tmp_path / "odd.jsonl"),
        (DUMPS / "verl", DUMPS / "slime"),
        (DUMPS / "verl", "--format", "no-such"),
        (DUMPS / "verl", "--tokenizer", tmp_path),
        (collapsed.path / "config.toml",),
    ):
        code, out, err = tiny.run_cli("diagnose", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: "), err
        assert err.count("\n") == 1
        assert "Traceback" not in err


def test_the_page(collapsed, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = tiny.run_cli("diagnose", collapsed.path, "--html", page, draws=True)
    assert code == 1
    assert f"Page: {page}" in out
    assert "cause B, repetition" in page.read_text()


def test_no_torch_is_loaded(collapsed):
    code = (
        "import sys\nsys.argv = ['stableopd', 'diagnose', sys.argv[1]]\n"
        "import stableopd.cli\n"
        "try:\n    stableopd.cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(collapsed.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_watch_stops_at_the_collapse_and_at_the_end(collapsed, healthy):
    code, out, err = tiny.run_cli("diagnose", collapsed.path, "--watch")
    assert (code, err) == (1, "")
    assert out.splitlines()[0].startswith("step 1  TruncRate 0.00")
    assert "COLLAPSE: " in out.splitlines()[-1]
    code, out, _ = tiny.run_cli("diagnose", healthy.path, "--watch", "--json")
    assert code == 0
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["step"] for line in told] == list(range(1, 41))
    assert {line["level"] for line in told} == {"ok"}


def test_watch_sees_what_is_written_meanwhile(collapsed, tmp_path):
    live = run_parts.RunFolder.create(tmp_path / "live", collapsed.config_text(), {})
    lines = collapsed.metrics()

    def write_more() -> bool:
        for line in lines[:7]:
            live.append_metrics(line)
        del lines[:7]
        return True

    seen = list(watch(live.path, Reading(), write_more))
    assert [entry.line["step"] for entry in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].alarm.level is Level.COLLAPSE
    assert len(seen) < 40


def test_watch_reads_the_files_of_another_framework_as_they_come(collapsed, tmp_path):
    waiting = sorted((collapsed.path / "rollouts").iterdir())

    def write_more() -> bool:
        for file in waiting[:5]:
            shutil.copy(file, tmp_path)
        del waiting[:5]
        return True

    seen = list(watch(tmp_path, Reading(), write_more))
    assert seen[-1].alarm.level is Level.COLLAPSE
    assert [entry.line["step"] for entry in seen] == list(range(1, len(seen) + 1))


def test_a_run_that_rolled_back_is_judged_by_what_came_after(collapsed, healthy, tmp_path):
    """The lines of the collapsed student stay, up to the step of the rollback."""
    run = run_parts.RunFolder.create(tmp_path / "rescued", collapsed.config_text(), {})
    rolled_back = diagnose_run(collapsed).alarmed_at
    assert rolled_back
    for bad, good in zip(collapsed.metrics(), healthy.metrics(), strict=True):
        line = bad if bad["step"] <= rolled_back else good
        mark = {"alarm/restored_step": 10} if line["step"] == rolled_back else {}
        run.append_metrics(line | mark)
        source = collapsed if line is bad else healthy
        run.write_rollouts(line["step"], source.rollouts(line["step"]))
    found = diagnose_run(run)
    assert not found.verdict.collapsed
    assert found.alarm.level is Level.OK
    assert found.alarmed_at == rolled_back
    assert f"After step {rolled_back} the run put the student of step 10 back." in found.notes
    assert [seen.alarm.level for seen in watch(run.path, Reading(), lambda: False)][-1] is Level.OK
    assert tiny.run_cli("diagnose", run.path)[0] == 0


def test_watch_follows_one_folder(collapsed, tmp_path):
    for arguments in ((collapsed.path, tmp_path), (collapsed.path / "config.toml",)):
        code, out, err = tiny.run_cli("diagnose", *arguments, "--watch")
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
