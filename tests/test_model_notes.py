"""What is said of models before a run: rounding, splits, templates, truncation."""

import dataclasses
import json

import pytest
import torch

import tiny
from stableopd import models
from stableopd.data.splits import PROBES, split_differently, why_split
from stableopd.data.vocabulary import encode_texts
from stableopd.doctor import behaviour, tokens
from stableopd.rollout.stops import audit, plan_stops
from stableopd.types import ModelError, Prompt, Rollout, SamplingSettings, StopReason
from tiny import CPU, make_llama, make_tokenizer, save_model

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}#{% endfor %}"
OPENED = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}#"
    "{% endif %}{% endfor %}"
)


def load(folder, dtype=torch.float32):
    return models.load(str(folder), role="student", dtype=dtype, device=CPU)


class TestRounding:
    def share_that_moves(self, model, rate):
        """What AdamW's first step really changes."""
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        pairs = zip(before, model.parameters(), strict=True)
        moved = sum(int((a != b).sum()) for a, b in pairs)
        return moved / sum(p.numel() for p in model.parameters())

    @pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-4])
    def test_the_share_is_that_of_adam(self, rate):
        model = make_llama().bfloat16()
        note = models.rounding_note(model, rate)
        said = float(note.partition("changes ")[2].partition("%")[0]) / 100
        # A model of 30,000 weights: four standard deviations, and the rounding of the number.
        assert said == pytest.approx(self.share_that_moves(model, rate), abs=0.013)

    def test_nothing_is_said_where_nothing_is_lost(self):
        assert models.rounding_note(make_llama(), 1e-6) == ""
        assert models.rounding_note(make_llama().bfloat16(), 0.1) == ""
        frozen = make_llama().bfloat16().requires_grad_(False)
        assert models.rounding_note(frozen, 1e-6) == ""

    def test_train_and_doctor_say_it(self, tmp_path):
        world = tiny.make_world(tmp_path / "w")
        config = tiny.write_config(
            world,
            run={"steps": 1},
            student={"dtype": "bfloat16"},
            optimizer={"learning_rate": 1e-6},
        )
        code, out, _ = tiny.run_cli("train", config)
        assert code == 0
        assert "student.dtype" in out
        code, out, _ = tiny.run_cli("doctor", "--config", config, "--json")
        found = {f["name"]: f for f in json.loads(out)["findings"]}
        assert found["precision"]["level"] == "WARN"
        auto = ("--set", "student.dtype=auto")
        _, out, _ = tiny.run_cli("doctor", "--config", config, "--json", *auto)
        assert "precision" not in {f["name"] for f in json.loads(out)["findings"]}


class TestSplits:
    @pytest.fixture
    def pair(self, tmp_path):
        """The same tokenizer.json, and classes of two names of which one splits otherwise."""
        from tokenizers import Regex, pre_tokenizers

        student, teacher = (load(save_model(tmp_path / n, make_llama())) for n in "st")

        class Other(type(teacher.tokenizer)):
            pass

        other = make_tokenizer()
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]+"), "isolated")
        other.__class__ = Other
        return student, dataclasses.replace(teacher, tokenizer=other)

    def test_classes_are_named_where_files_are_the_same(self, pair):
        student, teacher = pair
        split = split_differently(student, teacher, ["12", "a"])
        assert split == ["12"]
        why, fix = why_split(student, teacher, split[0])
        assert "Other" in why
        assert type(student.tokenizer).__name__ in why
        assert "tokenizer_class" in fix
        files = {**teacher.tokenizer_files, "tokenizer.json": b"{}"}
        other = dataclasses.replace(teacher, tokenizer_files=files)
        assert "tokenizer_class" not in why_split(student, other, "12")[1]

    def test_the_doctor_says_it(self, pair):
        (finding, *_) = tokens.tokenizers(*pair, ["12"]).findings
        assert finding.level == "WARN"
        assert "Other" in finding.message

    def test_train_says_it(self, tmp_path):
        """Byte for byte the same tokenizer.json, read by a class that adds a space in front."""
        world = tiny.make_world(tmp_path / "w")
        file = world / "teacher" / "tokenizer.json"
        made = json.loads(file.read_text())
        made["normalizer"] = {"type": "Replace", "pattern": {"String": "+"}, "content": "-"}
        file.write_text(json.dumps(made))
        code, out, _ = tiny.run_cli("train", tiny.write_config(world, run={"steps": 1}))
        assert code == 0
        assert "split differently" in " ".join(out.split())
        assert len(PROBES) == 4


class TestGenerationPrompt:
    def found(self, template, setting="auto"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        student = models.LanguageModel("s", make_llama(), tokenizer, 128)
        return tokens.generation_prompt(student, Prompt("0", "1+1"), setting, {})

    def test_a_template_without_one_is_found(self):
        found = self.found(CHAT)
        assert found.level == "WARN"
        assert "'<assistant>'" in found.message
        assert "add_generation_prompt" in found.fix

    @pytest.mark.parametrize("template", [OPENED, BRACKETS])
    def test_templates_that_have_one_or_need_none(self, template):
        assert self.found(template).level == "OK"

    def test_no_template(self):
        assert self.found(None) is None
        assert self.found(CHAT, "none") is None
        assert self.found("{{ raise_exception('no') }}").level == "WARN"

    def test_differing_templates_are_shown_where_they_differ(self):
        pair = []
        for template in ("x" * 60 + CHAT, "x" * 60 + OPENED):
            tokenizer = make_tokenizer()
            tokenizer.chat_template = template
            pair.append(models.LanguageModel("s", make_llama(), tokenizer, 128))
        found = tokens.chat_templates(*pair, Prompt("0", "1+1"), "auto")
        assert found.level == "WARN"
        assert "1+1#' the student's has the end, where the teacher's own has '<assistant>'" in (
            found.message
        )


def test_one_rule_of_truncation_for_both():
    def levels(num_cut):
        rollouts = [
            Rollout(
                prompt_id=str(i),
                prompt_ids=(1,),
                completion_ids=(3, 1),
                completion="0",
                sampler_logps=(0.0, 0.0),
                stop_reason=StopReason.LENGTH if i < num_cut else StopReason.STOP,
                settings=SamplingSettings(2, 1.0, 1.0),
            )
            for i in range(8)
        ]
        plan = plan_stops((1,), None, 1, "event", tiny.V)
        student = audit(plan, make_tokenizer(), None, (), rollouts, 2, None)
        used = behaviour.RepetitionConfig()
        teacher = behaviour.teacher_rollouts(rollouts, rollouts, used, 2)
        found = next(f for f in student if f.name == "truncation")
        return found.level, teacher.findings[0].level

    for num_cut in range(9):
        mine, theirs = levels(num_cut)
        assert mine == theirs == ("WARN" if num_cut >= 4 else "OK")


def test_a_tokenizer_that_fails_on_a_text_is_one_sentence():
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(kinds.WordLevel({"a": 0}, unk_token="<none>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    with pytest.raises(ModelError, match=r"^prompt 3: "):
        encode_texts(tokenizer, ["b"], "prompt 3")
