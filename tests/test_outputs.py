"""What a command may write over: pages of ours and free names, and nothing else."""

import json
import os
import re

import pytest

import tiny
from stableopd.diagnose.command import diagnose_paths
from stableopd.diagnose.runs import Reading
from stableopd.report.page import write_page
from stableopd.report.render import write_html
from stableopd.runfolder.outputs import PAGE_MARK, choose_output, is_our_page
from stableopd.text import one_line, without_folders
from stableopd.types import ConfigError, StableOPDError

ROWS = "".join(f'{{"step": {step}, "response": "a {step}"}}\n' for step in range(20))


def page_at(path):
    write_html("base.html.jinja", path, title="a page")
    return path


def choose(path, *inputs):
    return choose_output(path, inputs, is_our_page, "page")


def test_new_names_and_our_own_pages(tmp_path):
    assert choose(tmp_path / "new" / "a.html") == (tmp_path / "new" / "a.html").resolve()
    assert (tmp_path / "new").is_dir()
    (tmp_path / "empty").touch()
    choose(tmp_path / "empty")
    page = page_at(tmp_path / "page.html")
    assert choose(page) == page
    page_at(page)


def test_pages_of_earlier_versions_are_known(tmp_path):
    page = page_at(tmp_path / "page.html")
    older = re.sub(r"<meta (name=.generator|http-equiv)[^\n]*\n", "", page.read_text())
    assert PAGE_MARK not in older
    page.write_text(older)
    choose(page)
    page.write_text(older.replace("--page:", "--pages:"))
    with pytest.raises(ConfigError, match="choose another"):
        choose(page)


def test_a_file_that_speaks_of_our_mark_is_no_page(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text(f"{{'completion': '<style>{PAGE_MARK}'}}")
    with pytest.raises(ConfigError, match="choose another"):
        choose(file)


def special(tmp_path, kind):
    """A file that must not be replaced."""
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "there").write_text("the only copy")
        path.symlink_to("there")
    elif kind == "long":
        return tmp_path / ("x" * 300)
    elif kind == "long while written":
        return tmp_path / ("x" * 253)
    elif kind == "in a file":
        path.write_text("x")
        return path / "page.html"
    else:
        path.write_text("the only copy")
    return path


KINDS = ["file", "pipe", "device", "loop", "folder", "link"]
NAMES = ["long", "long while written", "in a file"]


@pytest.mark.parametrize("kind", KINDS + NAMES)
def test_what_is_never_replaced(tmp_path, kind):
    path = special(tmp_path, kind)
    before = os.lstat(path) if kind in KINDS else None
    with pytest.raises(ConfigError) as caught:
        choose(path)
    assert str(path)[:200] in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(StableOPDError):  # the writer looks, too
        write_html("base.html.jinja", path, title="a page")
    if before:
        assert os.lstat(path) == before


def test_a_link_to_our_page_stays_a_link(tmp_path):
    page = page_at(tmp_path / "page.html")
    link = tmp_path / "link.html"
    link.symlink_to("page.html")
    page.write_text(page.read_text().replace("a page", "another"))
    write_html("base.html.jinja", link, title="a page")
    assert link.is_symlink()
    assert "another" not in page.read_text()


def test_a_link_to_a_free_name_fills_it(tmp_path):
    (tmp_path / "link.html").symlink_to("new.html")
    page_at(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert is_our_page(tmp_path / "new.html")


def test_inputs_are_no_outputs_under_any_name(tmp_path):
    dump = tmp_path / "a.jsonl"
    dump.write_text(ROWS)
    os.link(dump, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(dump)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for path in (dump, tmp_path / "hard", tmp_path / "soft"):
        with pytest.raises(ConfigError, match="read by this command"):
            choose(path, dump)
    with pytest.raises(ConfigError, match="read by this command"):
        choose(empty, empty)


@pytest.mark.parametrize("name", ["a.jsonl", "other.txt", "pipe"])
def test_diagnose_leaves_files_alone(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(ROWS)
    (tmp_path / "other.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    before = os.lstat(tmp_path / name)
    arguments = (tmp_path / "a.jsonl", "--html", tmp_path / name)
    code, out, err = tiny.run_cli("diagnose", *arguments, draws=True)
    assert (code, out) == (2, "")
    assert str(tmp_path / name) in err
    assert os.lstat(tmp_path / name) == before


def test_report_and_compare_leave_files_of_a_run_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "metrics.jsonl", "report.html"):
        (run / name).write_text("x = 1\n" if name == "config.toml" else "")
    (run / "report.html").write_text("mine")
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    for arguments in (
        ("report", run),
        ("report", run, "--output", run / "metrics.jsonl"),
        ("compare", run, "--output", run / "metrics.jsonl"),
        ("compare", run, "--output", run / "config.toml"),
    ):
        code, _, err = tiny.run_cli(*arguments, draws=True)
        assert code == 2, arguments
        assert err.count("\n") == 1
    assert (run / "report.html").read_text() == "mine"
    assert (run / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert (run / "config.toml").read_text() == "x = 1\n"


def test_a_page_runs_no_script(tmp_path):
    assert "default-src 'none'" in page_at(tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data/train.jsonl", "…/train.jsonl"),
        ('a = "/home/me/t.jsonl"  # b', 'a = "…/t.jsonl"  # b'),
        ("~/data/x.jsonl", "…/x.jsonl"),
        (r"C:\Users\me\a.txt", "…/a.txt"),
        ("file:///home/me/a.txt", "…/a.txt"),
        ("runs/x/y", "runs/x/y"),
        ("http://host:8000/v1/a", "http://host:8000/v1/a"),
        ("1/2/3 and 4/5", "1/2/3 and 4/5"),
    ],
)
def test_folders_of_this_machine_are_taken_out(text, expected):
    assert without_folders(text) == expected


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 99_999])
def test_errors_of_python_give_no_advice_to_programmers(text):
    with pytest.raises((ValueError, RecursionError)) as info:
        json.loads(text)
    said = one_line(info.value)
    assert said
    assert "sys." not in said
    assert "recursion" not in said


def test_pages_name_no_folder_of_this_machine(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text(ROWS.replace('"a ', '"/usr/bin/env '))
    page = tmp_path / "page.html"
    write_page([diagnose_paths([file], Reading())], page, str(file))
    text = page.read_text()
    assert str(tmp_path) not in text
    assert "…/rollouts.jsonl, line" in text
    assert "/usr/bin/env" in text  # what a rollout says stays


EVIL = "\x1b]0;title\x07\x1b[2J"


@pytest.mark.parametrize("name", [f"a{EVIL}.jsonl", "a\nb.jsonl", "a\u202eb.jsonl"])
def test_names_do_not_reach_the_terminal_raw(tmp_path, name):
    file = tmp_path / name
    for exists in (False, True):
        if exists:
            file.write_text(ROWS)
        code, out, err = tiny.run_cli("diagnose", file)
        assert code == (0 if exists else 2)
        assert not {"\x1b", "\x07", "\u202e"} & set(out + err)
        assert err.count("\n") == 1
        assert sum("20 rollouts of" in line for line in out.splitlines()) == exists


def test_a_name_that_is_not_utf_8(tmp_path):
    file = tmp_path / os.fsdecode(b"step_\xff1.jsonl")
    file.write_text(ROWS)
    code, out, _ = tiny.run_cli("diagnose", file, "--html", tmp_path / "page.html", draws=True)
    assert code == 0
    out.encode()  # no lone surrogates
    assert "udcff" in out
