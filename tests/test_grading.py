import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from stableopd.data import grading
from stableopd.data.grading import grade
from stableopd.types import DataError


@pytest.mark.parametrize(
    ("completion", "answer", "marker", "right"),
    [
        ("2+2 is 4\n#### 4 \n", "4", "####", True),
        ("2+2 is 4\n#### 4", " 4\n", "####", True),
        ("#### 5 no, wait\n#### 4", "4", "####", True),
        ("#### 4\n#### 5", "4", "####", False),
        ("4", "4", "####", False),
        ("#### 4 apples", "4", "####", False),
        ("####", "4", "####", False),
        (" 4\n", "4", "", True),
        ("is 4", "4", "", False),
        ("4.0", "4", "", False),
        ("", "4", "", False),
        ("", "4", "####", False),
    ],
)
def test_exact(completion, answer, marker, right):
    assert grade(completion, answer, "exact", marker) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so \\boxed{1/2}", "0.5", True),
        ("so \\boxed{0.5}", "\\frac{1}{2}", True),
        ("so $\\frac{2}{4}$", "$\\frac{1}{2}$", True),
        ("The answer is 42.", "42", True),
        ("The answer is 41.", "42", False),
        ("$7$ is what I first had, but it is $8$", "8", True),
        ("$8$, but in the end it is $7$", "8", False),
        ("\\boxed{8} or \\boxed{7}", "8", False),  # two boxes are one set of two answers
        ("\\boxed{8} or \\boxed{7}", "\\{7, 8\\}", True),
        ("it costs 1,234", "1234", True),
        ("\\boxed{(1, 2)}", "(1, 2)", True),
        ("\\boxed{(2, 1)}", "(1, 2)", False),
        ("\\boxed{x = 5}", "5", True),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", True),
        ("\\boxed{B}", "B", True),
        ("", "42", False),
        ("no number at all }{ \\frac{ $ \\boxed{", "42", False),
        ("\x00\ud800 $\\int$", "42", False),
        ("line\nbreaks\r\nand\u2028more\n\\boxed{3}", "3", True),
        ("42", "", False),
    ],
)
def test_math(completion, answer, right):
    assert grade(completion, answer, "math", "") is right


def test_math_compares_the_prediction_with_the_gold_and_not_the_reverse():
    # math-verify lets a set stand for an inequality in the prediction, but not in the gold answer.
    assert grade("\\boxed{(3, \\infty)}", "x > 3", "math", "")
    assert not grade("\\boxed{x > 3}", "(3, \\infty)", "math", "")


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{100000000!}",
        "\\boxed{" + "(" * 500 + "1" + ")" * 500 + "}",
        "\\boxed{" + "9" * 20_000 + "}",
    ],
)
def test_math_gives_up_on_what_takes_too_long(completion, monkeypatch):
    monkeypatch.setattr(grading, "HARD_SECONDS", 5.0)
    began = time.monotonic()
    assert not grade(completion, "42", "math", "")
    assert time.monotonic() - began < 10
    assert grade("\\boxed{42}", "42", "math", "")


def test_math_works_in_a_thread_and_leaves_the_alarm_alone():
    results: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda n=n: results.append(grade(f"\\boxed{{{n}}}", "1", "math", ""))
        )
        for n in (1, 2, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, True, True]
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_child_that_hangs_is_killed_and_replaced(monkeypatch):
    assert grade("\\boxed{1}", "1", "math", "")
    first = grading._CHILD._process
    os.kill(first.pid, signal.SIGSTOP)
    monkeypatch.setattr(grading, "HARD_SECONDS", 0.2)
    assert not grade("\\boxed{1}", "1", "math", "")
    assert first.poll() is not None
    monkeypatch.undo()
    assert grade("\\boxed{1}", "1", "math", "")


def test_a_child_that_died_is_replaced():
    assert grade("\\boxed{1}", "1", "math", "")
    first = grading._CHILD._process
    first.kill()
    first.wait()
    assert grade("\\boxed{1}", "1", "math", "")
    assert grading._CHILD._process is not first


def test_math_verify_that_cannot_be_loaded_is_one_clear_error(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    grading._CHILD.close()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="math-verify cannot be loaded"):
        grade("1", "1", "math", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="cannot be started"):
        grade("1", "1", "math", "")


def test_math_prints_nothing_and_ends_with_its_parent():
    code = (
        "from stableopd.data import grading\n"
        "assert not grading.grade('\\\\boxed{9^{9^{9^{9}}}}', '4', 'math', '')\n"
        "assert grading.grade('4', '4', 'math', '')\n"
        "import sys; assert 'torch' not in sys.modules and 'math_verify' not in sys.modules\n"
        "print(grading._CHILD._process.pid)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_unknown_grader():
    with pytest.raises(DataError, match=r"data\.grader = 'fuzzy'"):
        grade("1", "1", "fuzzy", "")
