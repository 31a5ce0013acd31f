import json

import numpy as np
import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5EncoderModel,
)

import tiny
from stableopd import models
from stableopd.hidden import hidden_states, token_hidden_states
from stableopd.models import LanguageModel, head_of
from stableopd.teacher.local import FrozenModel
from stableopd.training.batch import collate
from stableopd.types import ModelError, Sequence
from tiny import CPU, V, make_llama, make_tokenizer, save_model

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


GEMMA = SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


ARCHITECTURES = {
    "tied": lambda: make_llama(tie_word_embeddings=True),
    "untied": lambda: make_llama(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**(SMALL | {"num_key_value_heads": 4}))),
    "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "logit scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    "logit scale 2": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=3.0)),
    "logits scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=7.0)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_of_hidden_is_the_models_logits(name):
    torch.manual_seed(3)
    model = ARCHITECTURES[name]().eval().double()
    output = model.get_output_embeddings()
    with torch.no_grad():
        output.weight.mul_(20)  # so that a cap bends and a bias does not hide
        if output.bias is not None:
            output.bias.normal_()
    ids_BT = torch.randint(3, V, (3, 9))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    head = head_of(model)
    with torch.no_grad():
        whole = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        parts = head.logits(hidden_states(model, ids_BT, mask_BT))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert head.weight_VD is output.weight
    assert (head.bias_V is not None) == (name == "bias")
    assert (head.softcap is not None) == (name == "soft cap")
    assert (head.scale != 1.0) == name.startswith("logit")
    assert (
        head.weight_VD is model.get_input_embeddings().weight
    ) == model.config.tie_word_embeddings


def test_a_model_without_a_head():
    model = T5EncoderModel(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(ModelError, match="'here': T5EncoderModel has no linear output head"):
        head_of(model, "teacher", "here")


# peft 0.21 asks transformers 5.23 for a setting by its former name.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # older peft
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_head_under_an_adapter():
    base = make_llama(sharp=8)
    saved = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, saved)
    wrapper = model.get_output_embeddings()
    trained, original = wrapper.modules_to_save["default"].weight, wrapper.original_module.weight
    assert head_of(model).weight_VD is trained
    with torch.no_grad():
        trained.mul_(2)
    assert torch.equal(FrozenModel(model, V).head.weight_VD, trained)
    assert torch.equal(FrozenModel(model, V, is_base=True).head.weight_VD, original)
    with model.disable_adapter():
        assert head_of(model).weight_VD is original
    on_the_head = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"no linear output head but peft\.tuners\.lora"):
        head_of(peft.get_peft_model(make_llama(), on_the_head))


def test_hidden_states_of_a_batch_are_those_of_each_sequence_alone():
    model = make_llama().double()
    sequences = [
        Sequence((3, 4, 5), (6, 7, 1), False, 0),
        Sequence((8,), (9, 10, 11, 12, 13), False, 1),
    ]
    with torch.no_grad():
        together = token_hidden_states(model, collate(sequences, 0, CPU))
        alone = []
        for s in sequences:
            ids = torch.tensor([[*s.prompt_ids, *s.completion_ids]])
            hidden = model.model(input_ids=ids).last_hidden_state[0]
            alone.append(hidden[len(s.prompt_ids) - 1 : -1])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


def named(name, vocabulary, rows=V):
    return LanguageModel(name, make_llama(rows=rows), make_tokenizer(vocabulary), 128)


def test_different_tokenizers_are_named_with_the_first_token_that_differs():
    swapped = dict(tiny.VOCABULARY) | {"5": tiny.VOCABULARY["7"], "7": tiny.VOCABULARY["5"]}
    with pytest.raises(ModelError) as info:
        models.require_same_tokenizer(named("a/b", tiny.VOCABULARY), named("c/d", swapped))
    message = str(info.value)
    assert "'a/b'" in message
    assert "'c/d'" in message
    assert f"id {tiny.VOCABULARY['5']} is '5' for the student and '7' for the teacher" in message


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_tokens_added_behind_are_fine(longer):
    more = dict(tiny.VOCABULARY) | {"<extra>": V, "<more>": V + 1}
    student = named("s", more if longer == "student" else tiny.VOCABULARY)
    teacher = named("t", more if longer == "teacher" else tiny.VOCABULARY)
    models.require_same_tokenizer(student, teacher)


def test_a_hole_in_one_vocabulary_is_a_difference():
    hole = {token: i for token, i in tiny.VOCABULARY.items() if token != "="}
    with pytest.raises(ModelError, match="is '=' for the student and None for the teacher"):
        models.require_same_tokenizer(named("s", tiny.VOCABULARY), named("t", hole))


def test_shared_vocabulary():
    student = named("s", tiny.VOCABULARY, rows=40)
    assert models.shared_vocabulary(student, None) == 40
    assert models.shared_vocabulary(student, named("t", tiny.VOCABULARY, rows=48)) == 40
    assert models.shared_vocabulary(student, named("t", tiny.VOCABULARY, rows=V)) == V
    # Ids beyond are refused where texts use them.
    assert models.shared_vocabulary(student, named("t", tiny.VOCABULARY, rows=20)) == 20


@pytest.mark.parametrize("method", ["stable_opd", "gkd"])
def test_padded_vocabularies_end_to_end(tmp_path, method):
    world = tiny.make_world(tmp_path / "w")
    save_model(world / "student", make_llama(0, rows=40))
    save_model(world / "teacher", make_llama(1, width=48, rows=48))
    config = tiny.write_config(world, run={"steps": 1}, objective={"method": method})
    assert tiny.run_cli("train", config)[::2] == (0, "")
    line = tiny.metrics_of(world / "run")[0]
    assert np.isfinite(line["loss/total"])
    assert line["mismatch/kl"] < 1e-9
    rows = (world / "run" / "rollouts" / "000001.jsonl").read_text().splitlines()
    assert max(max(json.loads(row)["completion_ids"]) for row in rows) < 40
    saved = AutoModelForCausalLM.from_pretrained(world / "run" / "checkpoints" / "000001")
    assert saved.lm_head.weight.shape[0] == 40
