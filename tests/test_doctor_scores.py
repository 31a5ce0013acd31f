"""What the doctor measures with models: scores, the loop test, the estimate of memory."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from stableopd import config as configuration
from stableopd.doctor import loops, memory
from stableopd.doctor.patient import Patient, Settings
from stableopd.doctor.scoring import choose_prompts, overlap_k, score_sequences
from stableopd.models import LanguageModel
from stableopd.types import ModelError, Prompt, Sequence
from tiny import CPU, EOS, V, make_llama, make_tokenizer


def parsed(**sections):
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    for section, fields in sections.items():
        table.setdefault(section, {}).update(fields)
    return configuration.parse(table)


def patient(config=None, prompt_ids=((3,),), teacher=True, num_prompts=8, **options):
    student = LanguageModel("s", make_llama(0, sharp=8, **options), make_tokenizer(), 128)
    other = LanguageModel("t", make_llama(1, width=48, sharp=8), make_tokenizer(), 64)
    prompts = [Prompt(str(i), "x") for i in range(len(prompt_ids))]
    settings = Settings(config or parsed(), True, num_prompts, True)
    return Patient(settings, CPU, student, other if teacher else None, prompts, prompt_ids, True)


class TestScores:
    def test_against_plain_softmax(self):
        config = parsed(
            rollout={"temperature": 0.7},
            teacher={"temperature": 1.3},
            optimizer={"micro_batch_tokens": 12},  # so that the order is mixed up on the way
        )
        case = patient(config)
        rows = [((3, 4), (5, EOS)), ((7,), (8, 9, 10, 11, EOS)), ((5, 6, 7), (2,))]
        sequences = [Sequence(p, c, False, 0) for p, c in rows]
        for is_event in (True, False):
            found = score_sequences(case, sequences, (EOS, 2), is_event, V)
            for (prompt, completion), told in zip(rows, found, strict=True):
                expected = brute_force(case, prompt, completion, is_event)
                for name, values in expected.items():
                    got = getattr(told, name)
                    np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-4, err_msg=name)

    def test_without_a_teacher(self):
        sequences = [Sequence((3,), (4, EOS), False, 0)]
        for case, has_teacher in ((patient(teacher=False), True), (patient(), False)):
            (told,) = score_sequences(case, sequences, (EOS,), True, V, has_teacher)
            assert len(told.student) == len(told.student_entropy) == 2
            assert len(told.teacher) == len(told.kl) == len(told.overlap) == 0
        assert score_sequences(patient(), [], (EOS,), True, V) == []

    def test_log_probs_that_are_not_finite(self):
        case = patient()
        with torch.no_grad():
            case.teacher.model.lm_head.weight.fill_(math.nan)
        with pytest.raises(ModelError, match="the teacher gives log-probs that are not finite"):
            score_sequences(case, [Sequence((3,), (4,), False, 0)], (EOS,), True, V)

    def test_overlap_k(self):
        assert [overlap_k(n) for n in (2, 18, 63, 64, 150_000)] == [1, 4, 15, 16, 16]

    def test_choose_prompts(self):
        config = parsed(rollout={"max_new_tokens": 10})
        lengths = [(3,) * n for n in (4, 60, 5, 55, 6, 50)]
        places, room = choose_prompts(patient(config, lengths, num_prompts=4), 64)
        assert set(places) == {0, 2, 4, 5}
        assert room == 10
        places, room = choose_prompts(patient(config, lengths, num_prompts=5), 64)
        assert set(places) == {0, 2, 3, 4, 5}
        assert room == 9
        assert choose_prompts(patient(config, lengths), 60)[1] == 0
        assert choose_prompts(patient(config, lengths), None)[1] == 10
        first = choose_prompts(patient(config, [(3,)] * 40), None)[0]
        assert len(set(first)) == 8
        assert first != sorted(first)


def brute_force(case, prompt, completion, is_event):
    """The six columns from whole softmaxes, one position after the other."""
    stops = [EOS, 2]
    found = {n: [] for n in ("student", "student_entropy", "teacher", "teacher_entropy", "kl")}
    found["overlap"] = []
    both = []
    for model, temperature in ((case.student.model, 0.7), (case.teacher.model, 1.3)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
        both.append(torch.softmax(logits / temperature, -1)[len(prompt) - 1 : -1])
    for at, token in enumerate(completion):
        rows = [probability[at].clone() for probability in both]
        for name, row in zip(("student", "teacher"), rows, strict=True):
            if is_event:
                row[stops[0]], row[stops[1]] = row[stops].sum(), 0.0
            said = row[stops[0] if is_event and token in stops else token]
            found[name].append(said.log().item())
            kept = row[row > 0]
            found[f"{name}_entropy"].append(-(kept * kept.log()).sum().item())
        student, teacher = rows
        used = student > 0
        ratio = student[used].log() - teacher[used].log()
        found["kl"].append((student[used] * ratio).sum().item())
        k = V // 4
        top = [set(row.topk(k).indices.tolist()) for row in rows]
        found["overlap"].append(len(top[0] & top[1]) / k)
    return found


def pieces(text):
    """Tokens as a byte pair tokenizer cuts them: words with the space before them, marks apart."""
    return re.findall(r" ?\w+|[^\w\s]+|\s", text)


class TestLoops:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("It is 4. So it is 3.14.", [" So it is 3.14."]),
            ("It is 4. So it is five", [" So it is five", ". So it is five"]),
            ("One\nTwo\n", ["Two\n"]),
            ("One\nTwo", ["Two", "\nTwo"]),
            ("a?! b?!", [" b?!"]),
            ("nothing to cut", ["nothing to cut"]),
            ("...", ["..."]),
            ("", []),
        ],
    )
    def test_segments(self, text, expected):
        cut = pieces(text)
        assert "".join(cut) == text
        assert ["".join(cut[start:]) for start in loops.segments(cut)] == expected

    def test_segments_of_characters(self):
        text = "47+8=55;55-3=52;#52"
        assert [text[s:] for s in loops.segments(list(text))] == ["#52", ";#52"]
        assert loops.segments(["x"] * 99) == [99 - loops.MAX_SEGMENT]

    def test_copies_that_are_there_already_are_removed(self):
        text = "a;#5#5#5"
        ids = tuple(map(ord, text))
        # "#5#5#5" is the segment here: no mark within it.
        trials = loops.make_trials([((1, 2), ids, list(text))], None, 9)
        assert [t.width for t in trials] == [6, 7]
        text = "a;b;#5;#5;#5;"
        ids = tuple(map(ord, text))
        (trial,) = loops.make_trials([((1, 2), ids, list(text))], None, 9)
        assert "".join(map(chr, trial.sequence.completion_ids)) == "a;b;#5;" + "#5;" * 6
        assert (trial.start, trial.width, trial.sequence.prompt_ids) == (7, 3, (1, 2))

    def test_only_what_fits_is_tried(self):
        long, short = tuple(range(10, 20)), (5, 6)
        sources = [((1,), long, ["x"] * 10), ((1,), short, ["x"] * 2), ((1,), short, ["x"] * 2)]
        trials = loops.make_trials(sources, 15, 9)
        assert [t.completion for t in trials] == [1, 2]
        assert [t.completion for t in loops.make_trials(sources, 15, 1)] == [1]
        assert len(loops.make_trials(sources, 14, 9)) == 0
        assert loops.make_trials([((1,), (), [])], None, 9) == []

    def test_by_hand(self):
        trial = loops.Trial(0, Sequence((1,), (0,) * 14, False, 0), 2, 2)
        logps = np.array([9, 9, -1, -2, -1, -1, 0, -1, -1, 0, 0, 0, -4, -5], dtype=float)
        assert loops.copy_logps(trial, logps).tolist() == [-3, -2, -1, -1, 0, -9]
        # Another completion, whose second segment is likelier to both together.
        rows = [trial, dataclasses.replace(trial, completion=1)] * 2
        student = [logps, logps - 1, logps - 9, logps - 0.5]
        teacher = [logps + 0.1, logps - 1, logps - 9, logps - 1]
        check = loops.loop_test(rows, student, teacher)
        assert check.numbers["num_completions"] == 2
        mean = np.array([-3, -2, -1, -1, -9]) - 0.5
        assert check.numbers["student_logp"] == pytest.approx(mean)
        assert check.numbers["teacher_logp"] == pytest.approx(mean + 0.1 - 0.5)
        first = (math.exp(-3) + math.exp(-4)) / 2
        assert check.numbers["student_probability"][0] == pytest.approx(first)
        assert check.findings[0].level == "OK"

    @pytest.mark.parametrize(
        ("student", "teacher", "level"),
        [
            ([-1.0] * 6, [-0.1] * 6, "WARN"),
            ([-1.0] * 6, None, "OK"),
            ([-0.1] * 6, [-0.1] * 6, "OK"),
            ([-0.1] * 6, [-1.0] * 6, "OK"),
            # Starting to repeat is no loop, and a teacher that seldom goes on makes none.
            ([-1.0] * 6, [-0.1, -1, -1, -1, -1, -1], "OK"),
            ([-9.0] * 6, [-0.8] * 6, "OK"),
        ],
    )
    def test_levels(self, student, teacher, level):
        trial = loops.Trial(0, Sequence((1,), (0,) * 7, False, 0), 1, 1)
        student = [np.array([0.0, *student])]
        teacher = None if teacher is None else [np.array([0.0, *teacher])]
        (found,) = loops.loop_test([trial], student, teacher).findings
        assert (found.level, bool(found.fix)) == (level, level != "OK")
        (held,) = loops.loop_test([trial], student, teacher, is_held=True).findings
        assert held.level == "OK"
        assert ("holds against it" in held.message) == (level == "WARN")

    def test_nothing_to_measure(self):
        check = loops.loop_test([], [], [])
        assert check.findings[0].message.startswith("not measured")
        assert check.numbers == {"num_completions": 0}


class TestMemory:
    def test_the_arithmetic(self):
        config = parsed(
            rollout={"prompts_per_step": 2, "rollouts_per_prompt": 3, "max_new_tokens": 20},
            optimizer={"micro_batch_tokens": 40},
        )
        case = patient(config)
        weights = sum(p.numel() for p in case.student.model.parameters()) * 4
        e = memory.estimate(config, case.student, case.teacher, 5, False, True)
        assert e.student == e.reference == e.gradients == weights
        assert e.adamw == 2 * weights
        assert e.teacher == sum(p.numel() for p in case.teacher.model.parameters()) * 4
        # 2 layers, width 32, feed-forward 64, 2 heads of 8 for keys; 25 tokens a sequence.
        assert e.activations == 40 * 2 * (320 + 256 + 32) * 4
        assert e.cache == 2 * 2 * 16 * 25 * 6 * 4
        assert e.tiles == 12 * 40 * V * 4
        assert e.sampled_logits == 4 * 6 * V * 4
        assert e.held == e.process + 4 * weights + e.teacher
        assert e.peak == e.held + e.gradients + e.activations + e.tiles
        mixed = memory.estimate(config, case.student, case.teacher, 5, True, False)
        assert (e.copies, mixed.copies) == (0, weights / 2)
        assert mixed.held == 4 * weights + e.teacher + weights / 2
        assert mixed.cache == 2 * 2 * 16 * 25 * 6 * 3
        checkpointed = parsed(
            rollout={"prompts_per_step": 2, "rollouts_per_prompt": 3, "max_new_tokens": 20},
            student={"gradient_checkpointing": True},
            objective={"method": "opd"},
        )
        e = memory.estimate(checkpointed, case.student, None, 5, True, False)
        # No more tokens than a step has: 6 sequences of 25.
        assert e.activations == 150 * (2 * 32 + 320 + 256 + 32) * 3
        assert (e.reference, e.teacher, e.process) == (0, 0, 0)

    @pytest.mark.parametrize("shape", [(64, 192, 4, 4), (32, 256, 2, 1), (128, 128, 8, 2)])
    def test_activations_of_a_real_model(self, shape):
        """What autograd keeps in a forward pass is near the estimate."""
        width, forward, heads, keys = shape
        options = {"intermediate_size": forward, "num_attention_heads": heads}
        options |= {"num_key_value_heads": keys, "num_hidden_layers": 4}
        model = make_llama(0, width, **options)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids_BT = torch.randint(V, (4, 40))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.base_model(input_ids=ids_BT).last_hidden_state
        config = parsed(
            rollout={"prompts_per_step": 1, "rollouts_per_prompt": 4, "max_new_tokens": 30},
            objective={"lambda_gold": 0},
        )
        student = LanguageModel("s", model, make_tokenizer(), 128)
        e = memory.estimate(config, student, None, 10, False, True)
        assert hidden.requires_grad
        # Older versions keep keys and values once for each head that shares them.
        lowest = 0.9 if Version(transformers.__version__) >= Version("5.17") else 0.8
        assert lowest < e.activations / sum(kept.values()) < 1.2

    def test_autocast_keeps_copies(self):
        """Every matrix that is multiplied with is kept in bfloat16 for the backward pass."""
        model = make_llama(0, 64)
        sizes = {p.numel() for p in model.parameters() if p.dim() == 2}
        kept: dict[int, int] = {}

        def pack(tensor):
            if tensor.dtype == torch.bfloat16 and tensor.numel() in sizes:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            loss = model(input_ids=torch.randint(V, (1, 7))).logits.sum()
        assert loss.requires_grad
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert sum(kept.values()) == 2 * (matrices - model.model.embed_tokens.weight.numel())

    def test_levels(self):
        case = patient(parsed(rollout={"max_new_tokens": 8}), [(3,) * 4])
        peak = memory.memory(case, 1e12).numbers["peak_bytes"]
        for available, level in ((peak * 1.2, "OK"), (peak * 1.1, "WARN"), (peak * 0.9, "FAIL")):
            check = memory.memory(case, available)
            assert check.findings[0].level == level
            assert check.numbers["available_bytes"] == available
        # The larger phase is named, and its fix.
        long = parsed(
            rollout={"max_new_tokens": 5000, "prompts_per_step": 999},
            optimizer={"micro_batch_tokens": 100},
            student={"gradient_checkpointing": True},
        )
        (found,) = memory.memory(patient(long, [(3,) * 4]), 1.0).findings
        assert "while sampling 999 x 4 rollouts key-value cache" in found.message
        assert memory.memory_of_device(CPU) > 1e8
