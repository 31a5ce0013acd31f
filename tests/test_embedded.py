"""The shipped models: whole, small, open to transformers, and as good and bad as they should be."""

import hashlib

import pytest
import torch
import transformers

from stableopd import config as configuration
from stableopd import embedded
from stableopd.data.arithmetic import ALPHABET, ANSWER_MARKER, make_problems
from stableopd.data.grading import grade
from stableopd.diagnostics.repetition import is_repetitive, repetitive_tokens
from stableopd.embedded.make_models import BUDGET, make_tokenizer

ROLES = ("student", "teacher")


@pytest.fixture(scope="module")
def models():
    return {
        role: transformers.AutoModelForCausalLM.from_pretrained(embedded.path(role)).eval()
        for role in ROLES
    }


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(embedded.path("student"))


@pytest.fixture(scope="module")
def answers(models, tokenizer):
    """For each model and problem, its completion and whether it is cut off and correct."""
    problems = make_problems(150, 9, "test")
    ids = torch.tensor([tokenizer.encode(p.prompt) for p in problems])
    results = {}
    for role, model in models.items():
        torch.manual_seed(0)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=BUDGET,
                do_sample=True,
                temperature=0.6,
                top_k=0,
                top_p=1.0,
            )[:, ids.shape[1] :]
        is_cut = ~(output == tokenizer.eos_token_id).any(1)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        right = [
            grade(text, p.answer, "exact", ANSWER_MARKER)
            for text, p in zip(texts, problems, strict=True)
        ]
        results[role] = (sum(right) / len(right), is_cut.float().mean().item())
    return results


def test_checksums():
    folder = embedded.path("student").parent
    lines = (folder / "CHECKSUMS.sha256").read_text().splitlines()
    listed = {}
    for line in lines:
        digest, name = line.split("  ")
        listed[name] = digest
    files = {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for role in ROLES
        for f in (folder / role).iterdir()
    }
    assert listed == files


@pytest.mark.parametrize("role", ROLES)
def test_models_are_small(models, role):
    assert sum(p.numel() for p in models[role].parameters()) < 1_000_000


@pytest.mark.parametrize("role", ROLES)
def test_tokenizer_round_trip(role):
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.path(role))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    texts = [ALPHABET, *(p.prompt + p.solution for p in make_problems(200, 4, "test"))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("role", ROLES)
def test_both_stop_with_the_same_token(models, tokenizer, role):
    assert models[role].generation_config.eos_token_id == tokenizer.eos_token_id
    assert models[role].config.eos_token_id == tokenizer.eos_token_id


def test_teacher_is_good(answers):
    accuracy, truncation = answers["teacher"]
    assert accuracy >= 0.9
    assert truncation <= 0.1


def test_student_has_headroom_and_terminates(answers):
    accuracy, truncation = answers["student"]
    assert 0.15 <= accuracy <= 0.45
    assert truncation <= 0.05


def test_teacher_is_sure_of_loops_and_the_student_is_not(models, tokenizer):
    """Mean log-prob of the copies from the third on: what makes the collapse possible."""
    problems = make_problems(50, 9, "test")
    means = {}
    for role, model in models.items():
        total, num = 0.0, 0
        for problem in problems:
            copy = f"#{problem.answer}"
            start = len(problem.prompt + problem.solution) + 2 * len(copy)
            text = problem.prompt + problem.solution + copy * 8
            ids = torch.tensor([tokenizer.encode(text)])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)
            logp = logp[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :, 0]
            total, num = total + logp.sum().item(), num + len(logp)
        means[role] = total / num
    assert means["teacher"] > -0.02
    assert means["student"] < -0.3


@pytest.mark.parametrize("method", ["opd", "stable_opd"])
def test_demo_settings(method):
    config = configuration.load(embedded.path("demo"), [f"objective.method={method}"])
    is_cure = method == "stable_opd"
    assert config.objective.lambda_gold == (1.0 if is_cure else 0.0)
    assert config.objective.beta_reference == (0.01 if is_cure else 0.0)
    assert config.rollout.max_new_tokens == BUDGET
    assert config.data.answer_marker == ANSWER_MARKER


def test_repetition_settings_count_loops_and_no_solution(tokenizer):
    settings = configuration.load(embedded.path("demo")).repetition
    problems = make_problems(300, 4, "test")

    def counts(text):
        return is_repetitive(text, settings.window_chars, settings.ratio)

    assert not any(counts(p.solution) for p in problems)
    # Nor text that is merely long: one solution after the other.
    assert not counts("".join(p.solution for p in problems[:6]))
    assert all(counts((p.solution + f"#{p.answer}" * BUDGET)[:BUDGET]) for p in problems)
    # A solution such as 33+8=41;41-8=33;33+8=41 does say something twice, but that is seldom.
    tokens = [tokenizer.encode(p.solution) for p in problems]
    repeated = sum(repetitive_tokens(t, settings.ngram, settings.min_run).sum() for t in tokens)
    assert repeated < 0.005 * sum(map(len, tokens))


def test_unknown_name():
    with pytest.raises(KeyError):
        embedded.path("referee")
