"""What `StableOPDTrainer` refuses, each with one sentence that says what to do."""

import datasets
import peft
import pytest
import torch
from trl import DistillationConfig

from stableopd.integrations.trl import StableOPDTrainer
from stableopd.integrations.trl.golden import Solutions
from stableopd.rollout.stops import StopPlan
from stableopd.types import ConfigError, DataError, ModelError
from tiny import EOS, VOCABULARY, make_tokenizer, save_model
from trl_parts import make, rows, student, teacher

# TRL 1.16 and peft 0.21 ask transformers 5.23 for a setting by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


BAD_SOLUTIONS = {
    "ids without a stop": ([[5, 6], [5, EOS]], "do not end with a stop"),
    "ids with two stops": ([[5, EOS, EOS], [5, EOS]], "hold one within"),
    "text with a stop within": (["1<eos>2", "3"], "stands within the solution"),
    "messages": ([[{"role": "user", "content": "1"}]] * 2, "one assistant message"),
    "all empty": ([None, None], "is empty in all 2 rows"),
    "text with another stop within": (["3", "1=2"], "row 2"),
    "text with another stop within, late": (["3"] * 99 + ["1=2"], "row 100"),
    "ids out of the vocabulary": ([[5, 99999, EOS], [5, EOS]], "token ids from 0"),
    "several": ([[5, 6], [5, EOS], [7]], "2 of 3 rows"),
    "all too long": (["1" * 8, "2" * 9], "fits into max_completion_length = 8"),
}


@pytest.mark.parametrize(("column", "words"), BAD_SOLUTIONS.values(), ids=BAD_SOLUTIONS)
def test_golden_solutions_that_cannot_be_used(tmp_path, column, words):
    data = datasets.Dataset.from_dict({"prompt": ["1+1="] * len(column), "solution": column})
    with pytest.raises(DataError) as error:
        make(tmp_path, data=data, teacher_model=teacher(VOCABULARY["="]))
    assert words in one_sentence(error)


def test_a_text_whose_token_has_no_row():
    """A tokenizer may have more ids than a model has rows."""
    stop = VOCABULARY["<eos>"]
    plan = StopPlan("event", (stop,), (stop,), (stop,), (stop,), stop)
    solutions = Solutions("solution", make_tokenizer(), plan, VOCABULARY["9"], None)
    assert solutions.ids({"solution": "12"})[-1] == stop
    with pytest.raises(DataError) as error:
        solutions.ids({"prompt": "1+8=", "solution": "9"})
    assert "embeddings" in one_sentence(error)


def test_a_missing_golden_column(tmp_path):
    with pytest.raises(DataError) as error:
        make(tmp_path, solution_column="worked")
    assert "no column 'worked'" in one_sentence(error)
    make(tmp_path, solution_column="worked", lambda_gold=0.0)


def test_different_tokenizers(tmp_path):
    swapped = VOCABULARY | {"0": VOCABULARY["1"], "1": VOCABULARY["0"]}
    trained = {"args": make(tmp_path).args, "train_dataset": rows()}
    trained["processing_class"] = make_tokenizer()
    with pytest.raises(ModelError) as error:
        StableOPDTrainer(
            student(), teacher(), teacher_processing_class=make_tokenizer(swapped), **trained
        )
    assert "different tokenizers" in one_sentence(error)
    folder = save_model(tmp_path / "teacher", teacher(), make_tokenizer(swapped))
    with pytest.raises(ModelError, match="different tokenizers"):
        StableOPDTrainer(student(), str(folder), **trained)
    with pytest.raises(ModelError) as error:
        StableOPDTrainer(student(), teacher(), **trained)
    assert "teacher_processing_class" in one_sentence(error)


IMPOSSIBLE = {
    "weight": ({"lambda_gold": -1.0}, "lambda_gold must be 0 or more"),
    "stop": ({"stop": "both"}, "stop must be one of 'event', 'token'"),
    "action": ({"alarm_action": "rollback"}, "alarm_action must be one of"),
    "beta": ({"beta": 0.3}, "beta must be 0, 0.5 or 1"),
    "tools": ({"tools": [sum]}, "tools are not supported"),
}


@pytest.mark.parametrize(("settings", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_settings_that_cannot_be(tmp_path, settings, words):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, **settings)
    assert words in one_sentence(error)


def test_plain_arguments_and_no_teacher(tmp_path):
    with pytest.raises(ConfigError, match="must be a StableOPDConfig"):
        StableOPDTrainer(student(), teacher(), DistillationConfig(str(tmp_path), use_cpu=True))
    with pytest.raises(ConfigError, match="needs a teacher_model"):
        StableOPDTrainer(student(), args=make(tmp_path).args)


def test_an_adapter_that_has_been_trained_is_no_initial_student(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(student(), lora)
    make(tmp_path, adapted)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.add_(1.0)
    with pytest.raises(ModelError) as error:
        make(tmp_path, adapted)
    assert "merge the adapter" in one_sentence(error)
