import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from collect_parts import PARAMETERS, labels_of, make_records
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.endings import (
    ends_in_loop,
    has_answer,
    markers_inside,
    place_loop,
)
from stableopd.diagnostics.loops import Loop, find_loops
from stableopd.diagnostics.summary import Parameters
from stableopd.diagnostics.units import words
from stableopd.diagnostics.worst import shorten
from stableopd.types import Record, StopReason

LENGTH = StopReason.LENGTH


def summarise(records, **settings):
    collector = Collector(PARAMETERS, **settings)
    collector.add(records)
    return collector.summary()


def sentences(number, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(f"{rng.integers(1_000_000)} is a number." for _ in range(number))


def test_the_worst_rollouts_come_first():
    records = [dataclasses.replace(r, prompt="") for r in make_records(150, steps=9)]
    found = summarise(records, num_worst=10).worst
    counts = {r.line: sum(labels_of(r, PARAMETERS)) for r in records}
    expected = sorted(records, key=lambda r: (-counts[r.line], r.line))
    of_step, lines = Counter(), []
    for r in expected:
        of_step[r.step] += 1
        if of_step[r.step] <= 5:
            lines.append(r.line)
    assert [entry.line for entry in found] == lines[:10]
    assert found[0].repetitive_share == counts[lines[0]] / found[0].length
    assert (found[0].source, found[0].stop_reason) == ("made.jsonl", LENGTH)
    assert summarise(records, num_worst=0).worst == ()


def test_at_most_three_of_a_prompt_and_five_of_a_step():
    records = make_records(400, steps=3)
    found = summarise(records).worst
    assert max(Counter(entry.prompt for entry in found).values()) == 3
    assert max(Counter(entry.step for entry in found).values()) < 20
    alone = [dataclasses.replace(r, step=1, prompt="") for r in records]
    assert len(summarise(alone).worst) == 20  # five are not enough for a table
    best = sorted((sum(labels_of(r, PARAMETERS)) for r in records), reverse=True)
    assert sum(labels_of(records[found[0].line - 1], PARAMETERS)) == best[0]


def test_a_worst_rollout_by_hand():
    lead, loop = "We know that 6 times 7 is 42, so we are done.", " Let me check: 6 x 7 = 42."
    text = lead + loop * 8
    one = Record("f.jsonl", 3, text, prompt="6 times 7?", step=4, correct=False)
    (found,) = summarise([one]).worst
    assert (found.completion, found.gap, found.prompt, found.step) == (text, None, "6 times 7?", 4)
    assert abs(found.loop_start - len(lead)) <= 1
    assert len(found.loop_text) == len(loop)
    assert found.loop_text.strip(" .") in loop
    assert found.loop_period == len(words(loop).ids)
    assert found.loop_copies == pytest.approx(8, abs=0.2)
    ((start, stop),) = found.spans
    assert stop == len(text)
    assert len(lead + loop) < start < len(lead + loop) + len(loop)
    assert (found.length, found.correct, found.stop_reason) == (len(text), False, None)


def test_a_rollout_that_does_not_loop():
    (found,) = summarise([Record("f.jsonl", 1, "Nothing comes back here.")]).worst
    assert (found.loop_start, found.loop_text, found.loop_period) == (None, "", 0)
    assert (found.spans, found.repetitive_share) == ((), 0.0)


def test_markup_and_lone_surrogates_stay_as_they_are():
    text = "<script>alert('x')</script> & \ud800 " * 40
    (found,) = summarise([Record("f.jsonl", 1, text, prompt="<b>\udfff")]).worst
    assert found.completion == text
    assert found.prompt == "<b>\udfff"
    assert found.loop_copies > 30


@pytest.mark.parametrize("focus", [0, 10, 1_699, 1_700, 1_701, 5_000, 17_500, 19_500, 19_999])
def test_shortened_text_shows_the_place(focus):
    text = "".join(map(chr, np.random.default_rng(focus).integers(97, 123, 20_000)))
    shown, (place, number), pieces = shorten(text, focus)
    assert len(shown) < 4_000
    assert shown[:place] == text[:place]
    for start, stop, at in pieces:
        assert shown[at : at + stop - start] == text[start:stop]
    (inside,) = [piece for piece in pieces if piece[0] <= focus < piece[1]]
    assert inside[1] - focus >= min(500, 20_000 - focus)
    left_out = 20_000 - sum(stop - start for start, stop, _ in pieces) - number
    assert left_out == 0 or shown.endswith(f"\n[… {left_out:,} more characters]")


def test_short_text_is_shown_whole():
    assert shorten("abc", 2) == ("abc", None, [(0, 3, 0)])
    assert shorten("a" * 3_300, 3_000)[1] is None
    assert shorten("a" * 3_301, 0)[1] is not None


@pytest.mark.parametrize("num_lead", [3, 40, 400, 2_000])
def test_spans_and_loop_of_a_long_rollout(num_lead):
    lead, loop = sentences(num_lead), " and so on and so forth, as was said before"
    text = lead + loop * 300
    (found,) = summarise([Record("f.jsonl", 1, text)]).worst
    assert len(found.completion) < 4_000
    assert found.completion[found.loop_start :].lstrip().startswith("and so on")
    assert found.gap is not None
    before = found.gap[1] if found.gap[0] <= found.loop_start else 0
    assert abs(found.loop_start + before - len(lead)) <= 1
    assert found.spans
    assert list(found.spans) == sorted(found.spans)
    for start, stop in found.spans:
        assert 0 <= start < stop <= len(found.completion)
    shown = "".join(found.completion[start:stop] for start, stop in found.spans)
    assert "is a number" not in shown
    assert shown.count("so forth") > 10


def test_prompts_by_cut_off_then_repetitive_rollouts():
    def rollouts(prompt, num_cut, num_stopped, text="short"):
        cut = [Record("f", 1, text, prompt=prompt, stop_reason=LENGTH)] * num_cut
        return (
            cut
            + [Record("f", 1, "short", prompt=prompt, stop_reason=StopReason.STOP)] * num_stopped
        )

    loop = "again " * 100
    records = rollouts("a", 1, 5) + rollouts("b", 3, 0) + rollouts("c", 3, 1, loop)
    records += [Record("f", 1, "short", stop_reason=StopReason.STOP)] * 4
    found = summarise(records)
    assert found.num_prompts == 3
    assert [entry.prompt for entry in found.by_prompt] == ["c", "b", "a"]
    assert [entry.truncation_rate for entry in found.by_prompt] == [3 / 4, 1.0, 1 / 6]
    assert [entry.repetition_rate for entry in found.by_prompt] == [3 / 4, 0.0, 0.0]
    assert [entry.num_rollouts for entry in found.by_prompt] == [4, 3, 6]
    assert found.by_prompt[1].mean_length == 5.0


def test_prompts_are_told_apart_by_id_or_by_text():
    records = [Record("f", i, "x", prompt="same", prompt_id=str(i % 3)) for i in range(6)]
    assert {entry.prompt_id for entry in summarise(records).by_prompt} == {"0", "1", "2"}
    texts = [Record("f", i, "x", prompt=f"\ud800{i % 2}") for i in range(6)]
    found = summarise(texts).by_prompt
    assert len({entry.prompt_id for entry in found}) == len(found) == 2
    many = [Record("f", i, "x", prompt_id=str(i)) for i in range(200)]
    assert (summarise(many).num_prompts, len(summarise(many).by_prompt)) == (200, 50)


def test_prompts_beyond_the_cap_are_not_followed():
    collector = Collector(max_prompts=10)
    collector.add([Record("f", i, "x", prompt_id=str(i % 14)) for i in range(140)])
    assert collector.summary().num_prompts == 10
    assert collector.notes[-1] == (
        "There are more than 10 prompts: 40 rollouts of later ones are not counted by prompt."
    )


@pytest.mark.parametrize(
    "text",
    ["\\boxed{4}", "\n#### 4", "x</answer>", "The Final Answer is 4", "so the answer is 4"],
)
def test_answers(text):
    assert has_answer(text)
    assert not has_answer(text[:4])
    assert has_answer("A: 4", marker="A:")
    assert not has_answer("A 4", marker="A:")


def test_markers():
    assert markers_inside("4<|im_end|>") == ()
    assert markers_inside("4<|im_end|>\n<|endoftext|></s> ") == ()
    assert markers_inside("4<|im_end|>\nuser\nWhat") == ("<|im_end|>", "\nuser\n")
    assert markers_inside("4 </s> 5 </s>") == ("</s>",)
    assert markers_inside("the user\nHuman: and") == ("\nHuman:",)
    assert markers_inside("") == markers_inside("user") == ()


def test_the_end_may_be_one_unit_off():
    loops = (Loop(0, 10, 2, 5.0),)
    assert ends_in_loop(loops, 10)
    assert ends_in_loop(loops, 11)
    assert not ends_in_loop(loops, 12)
    assert not ends_in_loop((), 0)


def test_place_of_a_loop_of_tokens_in_the_text():
    text = sentences(5) + " so it goes on" * 20
    units = words(text)
    loop = find_loops(units.ids)[-1]
    expected = place_loop(text, loop, len(units.ids), units)
    assert text[slice(*expected)].split() == ["so", "it", "goes", "on"]
    # Token ids split the text in another way: the loop is looked for in the words.
    assert place_loop(text, Loop(90, 400, 11, 28.2), 400, None) == expected
    # Words without a loop: in proportion.
    assert place_loop("abcdefghij", Loop(50, 100, 10, 5.0), 100, None) == (5, 6)
    assert place_loop("", loop, 400, None) is None


def test_answers_before_the_loop_and_markers_of_cut_off_rollouts():
    filler = " and then we wait for a little while" * 9
    cut = [
        "It is \\boxed{4}." + filler,
        "Nobody knows." + filler,
        "x" + " so the answer is 4, you see, and I say it again:" * 9,
        "The answer is 4.<|im_end|>" + filler,
        "The answer is 4. " + sentences(4),
    ]
    records = [Record("f", 1, text, stop_reason=LENGTH) for text in cut]
    records.append(Record("f", 1, "<|im_end|> \\boxed{4}" + filler, stop_reason=StopReason.STOP))
    found = summarise(records)
    assert found.truncated.loop_share == 4 / 5
    assert found.answered_before_loop == 3 / 4
    assert found.marker_share == 1 / 5
    assert found.markers == ("<|im_end|>",)
    assert summarise(records, answer_marker="Nobody").answered_before_loop == 1.0
    none = summarise(records[-1:])
    assert math.isnan(none.answered_before_loop)
    assert math.isnan(none.marker_share)


def test_markers_by_frequency():
    texts = ["a</s>b<eos>c", "a<eos>b", "plain"]
    found = summarise([Record("f", 1, text, stop_reason=LENGTH) for text in texts])
    assert found.markers == ("<eos>", "</s>")
    assert found.marker_share == 2 / 3


def test_parameters_of_labels_reach_the_spans():
    text = "a b c d e f g h i j k a b c d e f g h i j k"
    one = [Record("f", 1, text)]
    assert summarise(one).worst[0].spans == ((36, 43),)
    collector = Collector(Parameters(min_run=5))
    collector.add(one)
    assert collector.summary().worst[0].spans == ()
