import itertools
import math
import statistics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stableopd.config import RepetitionConfig
from stableopd.evaluation import EvaluationRow, evaluate, pass_at_k
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import DataError, Prompt, Rollout, SamplingSettings, StopReason

SETTINGS = SamplingSettings(max_new_tokens=6, temperature=0.6)
REPETITION = RepetitionConfig(window_chars=40, ratio=3.0)


class Script:
    """Says what it was given to say, in the order of the prompts, and records how it was asked."""

    def __init__(self, *completions, length=()):
        self.completions, self.length = completions, length

    def sample(self, prompts, num_per_prompt, settings, seed):
        self.asked = (list(prompts), num_per_prompt, settings, seed)
        rows = [pair for pair in prompts for _ in range(num_per_prompt)]
        return [
            Rollout(
                prompt_id,
                ids,
                tuple(range(len(text))),
                text,
                StopReason.LENGTH if n in self.length else StopReason.STOP,
                (0.0,) * len(text),
                settings,
            )
            for n, ((prompt_id, ids), text) in enumerate(zip(rows, self.completions, strict=True))
        ]


def run(sampler, answers, num_samples, grader="exact", marker="#"):
    prompts = [Prompt(f"p{n}", "?", answer=answer) for n, answer in enumerate(answers)]
    ids = [(n + 1,) for n in range(len(answers))]
    return evaluate(
        sampler,
        prompts,
        ids,
        num_samples=num_samples,
        settings=SETTINGS,
        seed=5,
        grader=grader,
        marker=marker,
        repetition=REPETITION,
    )


def test_numbers_by_hand():
    script = Script(
        "#1", "#1", "x#1", "#2", "#2", "no", "#", "1", "a" * 50, "#3", "", "#1", length=(8, 10)
    )
    result = run(script, ["1", "2", "3"], num_samples=4)
    rows = (EvaluationRow("p0", 3), EvaluationRow("p1", 1), EvaluationRow("p2", 1))
    assert result.rows == rows
    assert (result.num_problems, result.num_samples) == (3, 4)
    assert result.accuracy == pytest.approx(5 / 12)
    # The shares are 3/4, 1/4, 1/4: variance 1/12, so the error of the mean is 1/6.
    assert result.standard_error == pytest.approx(1 / 6)
    # pass@2: 1, and 1 - C(3, 2)/C(4, 2) = 1/2 twice. pass@3: 1, and 1 - C(3, 3)/C(4, 3) twice.
    assert result.pass_at_k == pytest.approx((5 / 12, 2 / 3, 5 / 6, 1))
    assert result.truncation_rate == pytest.approx(2 / 12)
    assert result.repetition_rate == pytest.approx(1 / 12)
    assert result.mean_length == pytest.approx(
        (2 + 2 + 3 + 2 + 2 + 2 + 1 + 1 + 50 + 2 + 0 + 2) / 12
    )
    pairs = [("p0", (1,)), ("p1", (2,)), ("p2", (3,))]
    assert script.asked == (pairs, 4, SETTINGS, 5)


def test_one_problem_has_no_standard_error():
    result = run(Script("#1"), ["1"], num_samples=1)
    assert result.standard_error is None
    assert (result.accuracy, result.pass_at_k) == (1.0, (1.0,))


def test_the_grader_is_the_one_asked_for():
    assert run(Script("it is 0.5"), ["1/2"], 1, grader="math", marker="").accuracy == 1
    assert run(Script("it is 0.5"), ["1/2"], 1, grader="exact", marker="").accuracy == 0


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for correct in range(n + 1):
        right = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            share = statistics.fmean(any(s) for s in itertools.combinations(right, k))
            assert pass_at_k(n, correct, k) == pytest.approx(share)
        assert pass_at_k(n, correct, 1) == pytest.approx(correct / n)
        assert pass_at_k(n, correct, n) == (correct > 0)


def test_pass_at_k_is_unbiased():
    chance, n, k = 0.3, 6, 3
    mean = sum(
        math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * pass_at_k(n, c, k)
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k)


def test_what_cannot_be_graded():
    with pytest.raises(DataError, match="no problem to evaluate on"):
        run(Script(), [], num_samples=1)
    with pytest.raises(DataError, match=r"prompt p1: no answer.*data\.answer"):
        run(Script("#1", "#1"), ["1", None], num_samples=1)


def test_with_a_real_model_and_the_real_sampler():
    words = ["<unk>", "</s>", *"0123456789#"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=None,
        )
    ).eval()
    sampler = TransformersSampler(model, tokenizer, (1,), len(words))
    pairs = [("p0", (1 + 1,)), ("p1", (1 + 2, 4)), ("p2", (5,))]
    drawn = sampler.sample(pairs, 8, SETTINGS, 5)
    # An answer that the model did give to p1, so that something is right.
    answer = drawn[8].completion
    prompts = [Prompt(name, "?", answer=answer) for name, _ in pairs]
    result = evaluate(
        sampler,
        prompts,
        [ids for _, ids in pairs],
        num_samples=8,
        settings=SETTINGS,
        seed=5,
        grader="exact",
        marker="",
        repetition=REPETITION,
    )
    right = [sum(r.completion == answer for r in drawn if r.prompt_id == n) for n, _ in pairs]
    assert [row.num_correct for row in result.rows] == right
    assert sum(right) >= 1
    assert result.accuracy == pytest.approx(sum(right) / 24)
    cut = sum(r.completion_ids[-1] != 1 for r in drawn)
    assert 0 < cut < 24
    assert result.truncation_rate == pytest.approx(cut / 24)
    assert result.mean_length == pytest.approx(sum(len(r.completion_ids) for r in drawn) / 24)
    assert result.repetition_rate == 0
