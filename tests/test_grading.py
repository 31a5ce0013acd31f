import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.data import grading
from stableopd.data.answers import final_text, last_box, letter_in, opens_thought, plain_math
from stableopd.data.grading import grade, grader_of, judge
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
        ("\\boxed{8} or \\boxed{7}", "8", False),  # joined, they are one set of two answers
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


THOUGHT = "<think>\nFirst I get \\boxed{4}, but wait, that forgets the pears.\n</think>\n\n"


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        # Only what follows the thought counts, and a thought that does not end is no answer.
        (THOUGHT + "\\boxed{9}", "9", True),
        (THOUGHT + "The answer is 9.", "9", True),
        (THOUGHT + "The answer is 9.", "4", False),
        (THOUGHT + "**9**", "9", True),
        ("It may be \\boxed{4}.</think>\\boxed{9}", "9", True),
        ("[THINK]\\boxed{4}[/THINK]9", "9", True),
        ("<think>\nMaybe \\boxed{4}. Now I check it once more, since", "4", False),
        (THOUGHT + "\\boxed{9}<think>or \\boxed{8}", "8", False),
        # The last box, whatever stands a little before it.
        ("First \\boxed{5}. I made a slip; the result is \\boxed{7}.", "7", True),
        ("First \\boxed{5}. I made a slip; the result is \\boxed{7}.", "5", False),
        ("Then $a=\\boxed{2}$ and the total is \\boxed{9}.", "9", True),
        ("$\\boxed{5}$, $\\boxed{7}$", "\\{5, 7\\}", True),
        ("\\boxed{5} \\text{ and } \\boxed{7}", "5, 7", True),
        ("\\boxed{5} so \\boxed{}", "5", True),
        ("\\boxed{5} or rather \\boxed{6", "5", True),
        ("\\boxed{\\boxed{5}}", "5", True),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", True),
        # Money and other ways to write a number.
        ("\\boxed{\\$18.90}", "\\$18.90", True),
        ("\\boxed{18.90}", "\\$18.90", True),
        ("\\boxed{18.91}", "\\$18.90", False),
        ("\\boxed{18.90}", "$18.90", True),
        ("\\boxed{18.90}", "$\\$18.90$", True),
        ("It costs \\$18.90.", "\\$18.90", True),
        ("\\boxed{32348}", "\\$32{,}348", True),
        ("\\boxed{\\$32{,}348}", "32,348", True),
        ("\\boxed{32\\,348}", "32348", True),
        ("\\boxed{1e5}", "100000", True),
        ("\\boxed{100000}", "1e5", True),
        ("The answer is 1.5e3.", "1500", True),
        ("\\boxed{1e-9}", "10^{-9}", True),
        ("\\boxed{1e-9}", "2e-9", False),
        ("\\boxed{6.022e23}", "6.022 \\times 10^{23}", True),
        ("\\boxed{2e^{3}}", "2e^3", True),
        # A formula without dollars is read in full.
        ("The answer is 1 - \\sqrt{2}", "1", False),
        ("The answer is 1 - \\sqrt{2}.", "1 - \\sqrt{2}", True),
        ("The answer is about \\frac{1}{2} of it.", "0.5", True),
        # Choices and dates.
        ("The answer is (C).", "C", True),
        ("The answer is (C).", "D", False),
        ("The answer is A", "A", True),
        ("The answer is **(B) 12**", "B", True),
        ("A is wrong.\n\n**C**", "(C)", True),
        ("\\boxed{\\textbf{(C) } 42}", "C", True),
        ("\\boxed{A, B}", "A", False),
        ("A cat is a C student", "C", False),
        ("\\boxed{2025-01-03}", "2025-03-01", False),
        ("\\boxed{2025-3-1}", "2025-03-01", True),
        ("It was on 2025-03-01.", "2025-03-01", True),
        ("\\boxed{2021}", "2025-03-01", False),
        ("\\boxed{2025-03-01}", "2021", False),
    ],
)
def test_math_reads_what_a_reader_reads(completion, answer, right):
    assert grade(completion, answer, "math", "") is right


def test_a_thought_that_the_prompt_began():
    assert opens_thought("<|assistant|>\n<think>\n")
    assert not opens_thought("<|assistant|>\n<think>\n\n</think>\n\n")
    assert not grade("It is \\boxed{4}, but", "4", "math", "", is_thinking=True)
    assert grade("It is 5.</think>\\boxed{4}", "4", "math", "", is_thinking=True)
    assert not grade("#### 4", "4", "exact", "####", is_thinking=True)


@pytest.mark.parametrize(
    ("completion", "answer", "grader", "marker", "is_found"),
    [
        ("so it is #### 5", "4", "exact", "####", True),
        ("so it is 5", "4", "exact", "####", False),
        ("<think>#### 5", "4", "exact", "####", False),
        ("so it is 5", "4", "math", "", True),
        ("I do not know.", "4", "math", "", False),
        ("<think>so it is 5", "4", "math", "", False),
        ("I do not know.", "2025-03-01", "math", "", False),
    ],
)
def test_whether_there_is_an_answer_at_all(completion, answer, grader, marker, is_found):
    found = judge(completion, answer, grader, marker)
    assert (found.is_right, found.is_found) == (False, is_found)


def test_auto_grades_by_what_is_given():
    assert grader_of("auto", "", "problems.jsonl") == ("math", "")
    assert grader_of("auto", "####", "problems.jsonl") == ("exact", "####")
    assert grader_of("auto", "", "embedded") == ("exact", ";#")
    assert grader_of("exact", "", "problems.jsonl") == ("exact", "")


@pytest.mark.parametrize("part", ["\\boxed{", "{", "\\boxed{1}, ", "1e5 ", "**C "])
def test_boxes_are_found_in_linear_time(part):
    text = part * 40_000
    began = time.monotonic()
    last_box(text)
    plain_math(text)
    final_text("answer " * 10_000 + text)
    letter_in("answer is " * 10_000 + text)
    assert time.monotonic() - began < 2


LATEX = st.text("\\boxed{}$()<think>/0123456789e.,-^_ aC\n\x00é", max_size=60)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(completion=LATEX, answer=LATEX)
def test_no_text_breaks_the_grader(completion, answer):
    before = grading._CHILD._process
    judge(completion, answer, "math", "")
    judge(completion, answer, "exact", "$")
    assert grading._CHILD._process is before or before is None  # it did not have to be killed


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.decimals(-(10**9), 10**9, places=3) | st.integers(-(10**12), 10**12))
def test_plain_numbers_are_right_against_themselves(number):
    assert grade(f"\\boxed{{{number}}}", str(number), "math", "")


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
