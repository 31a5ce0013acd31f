"""`StableOPDTrainer` against TRL's own trainer and against our own training step."""

import copy
import dataclasses
import inspect
import logging

import datasets
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import split_tensor_dict

from stableopd.integrations.trl import StableOPDTrainer
from stableopd.teacher.local import FrozenModel
from stableopd.training.step import step
from stableopd.training.terms import Players, Work
from stableopd.types import (
    Rollout,
    SamplingSettings,
    Sequence,
    StopReason,
    TrainingError,
)
from step_parts import flat, objective
from tiny import END, EOS, PAD, VOCABULARY, V, in_double, make_llama
from trl_parts import PLAIN, logged, make, make_plain, rows, student, teacher

# TRL 1.16 and peft 0.21 ask transformers 5.23 for a setting by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

DIVERGENCES = {0.0: "forward_kl", 0.5: "jensen_shannon", 1.0: "reverse_kl"}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")
    yield
    # What a trainer chose would hold for the next test's run in this process.
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_with_all_terms_off_it_is_trl_to_the_bit(tmp_path, beta):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": beta}
    theirs = make_plain(tmp_path / "trl", **settings)
    theirs.train()
    ours = make(tmp_path / "ours", **PLAIN, **settings)
    before = flat(ours.model)
    ours.train()
    names = ("loss", "grad_norm", "entropy", "completions/mean_length")
    assert len(logged(theirs, "loss")) == 3
    assert logged(ours, *names) == logged(theirs, *names)
    assert torch.equal(flat(ours.model), flat(theirs.model))
    assert not torch.equal(flat(ours.model), before)


def batch_of(trainer, count=4, first=0):
    """What TRL generates and scores of some rows, in training mode."""
    trainer.model.train()
    torch.manual_seed(5)
    data = trainer.train_dataset
    return trainer._generate_and_score_completions([data[first + i] for i in range(count)])


def unpadded(inputs, name):
    pairs = zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"].bool(), strict=True)
    return [tuple(ids[mask].tolist()) for ids, mask in pairs]


def work_of(inputs, chosen, length, stops):
    """The same rollouts and golden solutions as a batch of our own step."""
    prompts = unpadded(inputs, "prompt")
    rollouts = []
    for i, (prompt, ids) in enumerate(zip(prompts, unpadded(inputs, "completion"), strict=True)):
        reason = StopReason.STOP if ids[-1] in stops else StopReason.LENGTH
        zeros = (0.0,) * len(ids)
        rollouts.append(Rollout(f"p{i}", prompt, ids, "", reason, zeros, SamplingSettings(length)))
    golden = [
        Sequence(prompt, ids, True, i)
        for i, (prompt, ids) in enumerate(zip(prompts, unpadded(inputs, "golden"), strict=True))
    ]
    return Work(chosen, rollouts, golden, None, length)


def our_step(trainer, inputs, reference, **fields):
    """Loss terms, and parameters after a step of plain gradient descent, by training/step.py."""
    settings = trainer.args
    chosen = objective(
        "gkd",
        lambda_gold=settings.lambda_gold,
        beta_reference=settings.beta_reference,
        divergence=DIVERGENCES[settings.beta],
        aggregation="token",
        **fields,
    )
    model = copy.deepcopy(trainer.model).eval()
    event = trainer.stops.mode == "event"
    players = Players(
        student=model,
        num_tokens=V,
        teacher=FrozenModel(trainer.teacher_model, V, settings.temperature),
        reference=FrozenModel(reference or model, V, settings.temperature, is_base=True),
        stop_ids=torch.tensor(trainer.stops.event_ids if event else trainer.stops.decode_ids),
        stop_is_event=event,
        temperature=settings.temperature,
        pad_id=PAD,
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    work = work_of(inputs, chosen, settings.max_completion_length, trainer.eos_token_ids)
    result = step(players, optimizer, work, micro_batch_tokens=10**6, grad_clip=1e9)
    return result, flat(model), work


def their_step(trainer, micro_batches):
    """The same by the trainer: the loss summed over micro-batches, the parameters after it."""
    model = trainer.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    total = 0.0
    for inputs in micro_batches:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        total += loss.item()
    after = copy.deepcopy(model)
    trainable = [p for p in after.parameters() if p.requires_grad]
    for p, source in zip(trainable, parameters, strict=True):
        p.data -= 0.1 * (torch.zeros_like(source) if source.grad is None else source.grad)
    return total, flat(after)


CASES = {
    "paper": {},
    "forward": {"beta": 0.0, "temperature": 0.7},
    "jensen": {"beta": 0.5, "beta_reference": 0.3},
    "event": {"teacher_ends": True, "beta_reference": 0.3, "lambda_gold": 0.5},
    "tokens": {"teacher_ends": True, "stop": "token", "lambda_gold": 0.5},
    "event alone": {"teacher_ends": True, **PLAIN},
    "golden alone": {"beta_reference": 0.0},
    "reference alone": {"lambda_gold": 0.0, "beta_reference": 2.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_with_terms_on_it_is_our_own_step(tmp_path, case):
    teacher_model = in_double(teacher(END if case.get("teacher_ends") else None))
    models = {"model": in_double(student(0.5)), "teacher_model": teacher_model}
    trainer = make(tmp_path, **models, max_completion_length=24, **case)
    reference = copy.deepcopy(trainer.model)
    with torch.no_grad():  # a student that has moved away from the reference
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    inputs = batch_of(trainer, 12)
    lengths = {len(ids) for ids in unpadded(inputs, "completion")}
    assert len(lengths) > 2  # some are cut off, some stop
    assert 24 in lengths
    inputs.setdefault("golden_ids", torch.zeros(12, 0, dtype=torch.long))
    inputs.setdefault("golden_mask", torch.zeros(12, 0, dtype=torch.long))
    result, after, work = our_step(trainer, inputs, reference)
    if trainer.args.lambda_gold:
        assert [s.completion_ids[-1] for s in work.golden] == [EOS] * 12
    total, found = their_step(trainer, [inputs])
    assert total == pytest.approx(result.losses["total"], rel=1e-9)
    torch.testing.assert_close(found, after, rtol=0, atol=1e-9)
    terms = {k: v for k, v in result.losses.items() if k != "total"}
    shares = {
        name.removeprefix("loss/"): values[0]
        for name, values in trainer._metrics["train"].items()
        if name.startswith("loss/")
    }
    assert shares == pytest.approx(terms, rel=1e-9)


def test_prompts_of_different_lengths_and_positions_that_are_absolute(tmp_path):
    """GPT-2 adds a vector to each position: left padding must not move them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2(seed):
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        found = GPT2LMHeadModel(
            GPT2Config(vocab_size=V, **sizes, bos_token_id=None, eos_token_id=EOS)
        )
        return found.double().eval()

    trainer = make(tmp_path, gpt2(0), teacher_model=gpt2(1), disable_dropout=True)
    inputs = batch_of(trainer, 16)
    assert len({len(p) for p in unpadded(inputs, "prompt")}) > 1
    result, after, _ = our_step(trainer, inputs, copy.deepcopy(trainer.model))
    total, found = their_step(trainer, [inputs])
    assert total == pytest.approx(result.losses["total"], rel=1e-9)
    torch.testing.assert_close(found, after, rtol=0, atol=1e-9)


def test_with_lora_the_reference_is_the_base(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = make(tmp_path, peft_config=lora, beta_reference=2.0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.add_(0.3 * torch.randn_like(p))
    inputs = batch_of(trainer)
    with trainer.model.disable_adapter():
        base = make_llama(0, sharp=8.0)
        logits = trainer.model(input_ids=inputs["prompt_ids"]).logits
        torch.testing.assert_close(logits, base(input_ids=inputs["prompt_ids"]).logits)
    result, after, _ = our_step(trainer, inputs, base)
    assert result.losses["reference_kl"] > 1e-3
    total, found = their_step(trainer, [inputs])
    assert total == pytest.approx(result.losses["total"], rel=1e-5)
    torch.testing.assert_close(found, after, rtol=0, atol=1e-5)


def adapted(model):
    """A PEFT model whose adapter changes what it says."""
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    found = peft.get_peft_model(model, lora)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.add_(3.0 * torch.randn_like(p))
    return found.eval()


def test_a_teacher_keeps_its_adapter(tmp_path):
    merged = copy.deepcopy(adapted(in_double(teacher()))).merge_and_unload()
    models = {"model": in_double(student(0.5)), "teacher_model": adapted(in_double(teacher()))}
    trainer = make(tmp_path, **models, beta_reference=0.3)
    inputs = batch_of(trainer)
    total, _ = their_step(trainer, [inputs])
    expected, _ = their_step(make(tmp_path, models["model"], teacher_model=merged), [inputs])
    base = make(tmp_path, models["model"], teacher_model=in_double(teacher()))
    assert total == pytest.approx(expected, rel=1e-12)
    assert total != pytest.approx(their_step(base, [inputs])[0], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # older peft
@pytest.mark.parametrize("terms", [PLAIN, {"beta_reference": 2.0}])
def test_a_head_that_is_trained_with_the_adapter(tmp_path, terms):
    """The student's head is the trained copy, and the reference's is the original."""
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    trainer = make(tmp_path, in_double(student(0.5)), peft_config=lora, max_steps=1, **terms)
    if terms is not PLAIN:
        head = trainer.model.get_output_embeddings().modules_to_save["default"].weight
        with torch.no_grad():
            head.add_(0.1 * torch.randn_like(head))
        inputs = batch_of(trainer)
        result, after, _ = our_step(trainer, inputs, in_double(student(0.5)))
        assert result.losses["reference_kl"] > 1e-3
        total, found = their_step(trainer, [inputs])
        assert total == pytest.approx(result.losses["total"], rel=1e-9)
        torch.testing.assert_close(found, after, rtol=0, atol=1e-9)
    before = trainer.model.get_output_embeddings().modules_to_save["default"].weight.clone()
    trainer.train()
    wrapper = trainer.model.get_output_embeddings()
    assert not torch.equal(wrapper.modules_to_save["default"].weight, before)
    assert torch.equal(wrapper.original_module.weight, in_double(student(0.5)).lm_head.weight)


def test_two_micro_batches_are_one(tmp_path):
    models = {"model": student(0.5).double(), "teacher_model": teacher().double()}
    trainer = make(tmp_path, **models, max_completion_length=32, beta_reference=1.0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    inputs = batch_of(trainer, first=3)
    total, after = their_step(trainer, [inputs])
    halves = split_tensor_dict(inputs, 2)
    for mask in ("golden_mask", "completion_mask"):
        assert halves[0][mask].sum() != halves[1][mask].sum()
    split_total, split_after = their_step(trainer, halves)
    assert split_total == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(split_after, after, rtol=0, atol=1e-12)


def test_a_run_with_accumulation_is_a_run_without(tmp_path):
    names = ("loss", "grad_norm", "loss/divergence", "loss/golden", "loss/reference_kl")
    names += ("rollout/mean_length", "rollout/truncation_rate", "advantage/mean", "golden/share")
    found = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            beta_reference=1.0,
        )
        trainer.train()
        found.append(logged(trainer, *names))
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_log_adds_up_where_solutions_are_rare(tmp_path):
    """Micro-batches without a solution count as 0, and steps without one too."""
    data = rows(8).to_dict()
    data["solution"] = [s if place == 1 else None for place, s in enumerate(data["solution"])]
    trainer = make(
        tmp_path,
        data=datasets.Dataset.from_dict(data),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        logging_steps=2,
        max_steps=4,
        lambda_gold=0.7,
        beta_reference=2.0,
        shuffle_dataset=False,
    )
    trainer.train()
    lines = logged(trainer, "loss", "loss/divergence", "loss/golden", "loss/reference_kl")
    assert len(lines) == 2
    for loss, divergence, golden, reference in lines:
        assert golden > 0
        # Trainer rounds nothing, but adds up in float32.
        assert loss == pytest.approx(divergence + 0.7 * golden + 2.0 * reference, rel=1e-5)


def test_stops_of_both_models_end_a_rollout_and_are_one_event(tmp_path):
    trainer = make(tmp_path, teacher_ends=True)
    assert trainer.stops.event_ids == (EOS, END)
    assert sorted(trainer.eos_token_ids) == [EOS, END]
    seen = set()
    for _ in range(6):
        for ids in unpadded(batch_of(trainer, 16), "completion"):
            assert not {EOS, END} & set(ids[:-1])
            seen.add(ids[-1])
        trainer.model.lm_head.weight.data *= 0.8
    assert {EOS, END} <= seen
    assert make(tmp_path, teacher_ends=True, stop="token").eos_token_ids == [EOS]


def test_what_is_logged_of_a_run(tmp_path):
    trainer = make(tmp_path, student(0.5), repetition_ngram=2, stop="token", max_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        assert line["rollout/truncation_rate"] == line["completions/clipped_ratio"]
        assert line["rollout/mean_length"] == line["completions/mean_length"]
        assert 0 <= line["rollout/repetitive_share"] <= 1
        gap = line["logp/teacher_mean"] - line["logp/student_mean"]
        assert line["advantage/mean"] == pytest.approx(gap, abs=1e-6)
        weighted = line["loss/divergence"] + line["loss/golden"] + 0.01 * line["loss/reference_kl"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-4)
    assert lines[0]["loss/reference_kl"] == pytest.approx(0, abs=1e-6)
    assert [seen["step"] for seen in trainer.collapse_alarm.lines] == [1, 2]


def test_solutions_that_are_missing_or_too_long_are_left_out(tmp_path):
    data = rows(4).add_column("s", ["1", None, "123456789", "12"])
    trainer = make(tmp_path, data=data, solution_column="s")
    inputs = batch_of(trainer)
    assert trainer._metrics["train"]["golden/refused"] == [0]
    assert unpadded(inputs, "golden")[1:3] == [(), ()]
    assert unpadded(inputs, "golden")[3] == (VOCABULARY["1"], VOCABULARY["2"], EOS)
    assert inputs["num_golden_tokens"] == 5
    assert trainer._metrics["train"]["golden/share"] == [0.5]


def test_bad_solutions_of_a_stream_are_left_out_and_counted(tmp_path, caplog):
    bad = ["1<eos>2", "1=2", [4, 5], [4, 10**6, EOS], [4.5, EOS], {"role": "user"}, 7]
    kept = [{"prompt": "1+1=", "solution": [4, EOS]}] * 65
    stream = datasets.IterableDataset.from_generator(
        lambda: iter([*kept, *({"prompt": "1+1=", "solution": s} for s in bad)])
    )
    other = teacher(VOCABULARY["="])
    trainer = make(tmp_path, data=stream, teacher_model=other, shuffle_dataset=False)
    given = list(stream)[64:]
    with caplog.at_level(logging.WARNING):
        trainer.model.train()
        inputs = trainer._generate_and_score_completions(given)
    assert unpadded(inputs, "golden") == [(4, EOS)] + [()] * len(bad)
    assert trainer._metrics["train"]["golden/refused"] == [pytest.approx(7 / 8)]
    assert len([r for r in caplog.records if "golden" in r.getMessage()]) == 1


def test_the_model_card_is_that_of_the_method(tmp_path):
    make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    card = (tmp_path / "README.md").read_text()
    assert "trained with StableOPD" in card
    assert "2604.08527" in card
    assert "2306.13649" not in card
    assert "agarwal" not in card
    assert "@misc{luo2026" in card
    assert "- stableopd\n" in card


def parameters(function):
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


def overridden():
    ours = {n: f for n, f in vars(StableOPDTrainer).items() if inspect.isfunction(f)}
    return [name for name in ours if hasattr(DistillationTrainer, name) and name != "__init__"]


@pytest.mark.parametrize("name", overridden())
def test_what_is_overridden_takes_what_trl_gives(name):
    theirs = parameters(getattr(DistillationTrainer, name))
    assert parameters(getattr(StableOPDTrainer, name)) == theirs, name


def test_what_is_overridden_and_used_is_in_trl(tmp_path):
    assert {"_compute_loss", "training_step", "log"} < set(overridden())
    names = list(inspect.signature(DistillationTrainer.__init__).parameters)[1:5]
    assert names == ["model", "teacher_model", "args", "train_dataset"]
    trainer = make_plain(tmp_path)
    for name in ("_step", "_metrics", "eos_token_ids", "generation_kwargs", "generation_config"):
        assert hasattr(trainer, name), name
    for name in ("beta", "temperature", "use_vllm", "max_completion_length", "teacher_model"):
        assert hasattr(trainer, name), name


def test_an_evaluation_is_the_divergence_alone(tmp_path):
    settings = {"per_device_eval_batch_size": 16}
    ours = make(tmp_path / "ours", **settings)
    theirs = make_plain(tmp_path / "trl", **settings)
    found = []
    for trainer in (ours, theirs):
        torch.manual_seed(9)
        found.append(trainer.evaluate(rows().remove_columns("solution"))["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    trainer = make(tmp_path)
    inputs = batch_of(trainer)
    with torch.no_grad():
        trainer.teacher_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss/divergence is nan"):
        trainer.compute_loss(trainer.model, inputs)


@pytest.mark.parametrize(
    "solution", ["12", [{"role": "assistant", "content": "12"}], [4, 5, EOS]], ids=str
)
def test_golden_solutions_in_every_form_are_the_same(tmp_path, solution):
    data = datasets.Dataset.from_dict({"prompt": ["1+1="], "solution": [solution]})
    trainer = make(tmp_path, data=data)
    inputs = batch_of(trainer, 1)
    assert unpadded(inputs, "golden") == [(4, 5, EOS)]


def test_defaults_are_those_of_the_method(tmp_path):
    chosen = objective("stable_opd")
    settings = make(tmp_path).args
    for name in ("lambda_gold", "beta_reference", "stop"):
        assert getattr(settings, name) == getattr(chosen, name)
    own = {f.name for f in dataclasses.fields(settings)}
    own -= {f.name for f in dataclasses.fields(DistillationConfig)}
    assert len(own) == 9


@pytest.mark.parametrize("bf16", [False, True])
def test_terms_do_not_change_the_precision_of_trl(tmp_path, bf16):
    """TRL computes its loss outside autocast; in bfloat16 it would differ by a thousandth."""
    trainer = make(tmp_path, student(0.5), bf16=bf16, beta_reference=1.0)
    inputs = batch_of(trainer)
    mine, theirs = (
        compute(trainer.model, inputs, torch.tensor(10.0))[0]
        for compute in (trainer._compute_loss, super(StableOPDTrainer, trainer)._compute_loss)
    )
    assert mine.dtype == theirs.dtype
    assert trainer._shares["divergence"].item() == pytest.approx(theirs.item(), rel=2e-5)


def test_in_the_precision_that_trl_chooses_by_default(tmp_path):
    """bfloat16 and gradient checkpointing are TRL's own defaults."""
    found = []
    for settings in ({}, {"bf16": True, "gradient_checkpointing": True}):
        trainer = make(tmp_path, student(0.5), max_steps=1, beta_reference=1.0, **settings)
        trainer.train()
        found.append(logged(trainer, "loss/divergence", "loss/golden")[0])
    assert trainer.accelerator.mixed_precision == "bf16"
    assert found[1] == pytest.approx(found[0], rel=0.05)
