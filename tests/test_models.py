import json
import shutil
import sys

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from stableopd import models
from stableopd.hidden import token_hidden_states
from stableopd.models import LanguageModel
from stableopd.teacher.local import FrozenModel
from stableopd.training.batch import collate
from stableopd.types import ModelError, Sequence
from tiny import CPU, V, make_llama, make_tokenizer, save_model


def load(folder, role="student", dtype=torch.float32, **options):
    return models.load(str(folder), role=role, dtype=dtype, device=CPU, **options)


def refused(folder, **options):
    with pytest.raises(ModelError) as info:
        load(folder, **options)
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(f"student.model = '{folder}': ")
    return message


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", make_llama())


def test_load(folder):
    loaded = load(folder)
    assert loaded.name == str(folder)
    assert loaded.context == 128
    assert not loaded.model.training
    assert loaded.tokenizer.get_vocab() == tiny.VOCABULARY
    kept = make_llama().state_dict()
    assert all(
        torch.equal(kept[name], weight) for name, weight in loaded.model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_load_in_another_type(folder, dtype):
    assert {p.dtype for p in load(folder, dtype=dtype).model.parameters()} == {dtype}


def test_not_a_folder(tmp_path):
    assert "not a model folder, it has no config.json" in refused(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "it has no config.json" in refused(tmp_path / "file")
    assert "it has no m.gguf" in refused(tmp_path / "file", gguf_file="m.gguf")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "it has no config.json" in refused(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(make_llama().state_dict(), folder / "pytorch_model.bin")
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize("keep", [0, 8, 2000, -4])
def test_cut_off_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}"])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": 64},
        {"num_attention_heads": 5},
        {"vocab_size": -1},
        {"hidden_act": "none such"},
        {"model_type": "none_such"},
        {"model_type": "t5"},
    ],
)
def test_config_that_does_not_fit(folder, change):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    assert "cannot be loaded" in refused(folder)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refused(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "cannot be loaded" in refused(folder)


def test_missing_weights(folder):
    shards = make_llama(num_hidden_layers=1)
    shards.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 2}))
    message = refused(folder)
    assert "lack 'model.layers.1." in message
    assert "9 missing in all" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    message = refused(save_model(tmp_path / "model", model))
    assert "weight 'model.layers.1.mlp.up_proj.weight' is not finite" in message


def test_logits_that_are_not_finite(tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert "its logits are not finite" in refused(save_model(tmp_path / "model", model))


def test_remote_code_is_not_run(folder, tmp_path):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    assert "cannot be loaded" in refused(folder)
    assert not (tmp_path / "was-run").exists()


def test_logits_that_are_not_head_of_hidden(folder, monkeypatch):
    plain = LlamaForCausalLM.forward

    def doubled(self, *args, **options):
        output = plain(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    assert "are not its output embedding applied to its last hidden states" in refused(folder)


def adapted(rank=4, targets="all-linear"):
    student = LanguageModel("s", make_llama(sharp=8), make_tokenizer(), 128)
    return models.add_lora(student, rank, 8, targets)


BATCH = collate([Sequence((3, 4, 5), (6, 7, 8, 1), False, 0)], 0, CPU)


def test_adapter_off_is_the_base_bit_for_bit():
    base = FrozenModel(make_llama(sharp=8), V).hidden(BATCH)
    student = adapted()
    reference = FrozenModel(student.model, V, is_base=True)
    assert torch.equal(reference.hidden(BATCH), base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in student.model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    assert torch.equal(reference.hidden(BATCH), base)
    assert not torch.allclose(token_hidden_states(student.model, BATCH), base, atol=0.1)
    assert not reference.head.weight_VD.requires_grad
    trained = {name for name, w in student.model.named_parameters() if w.requires_grad}
    assert trained == {name for name, _ in student.model.named_parameters() if "lora_" in name}


def test_lora_targets():
    chosen = adapted(targets="q_proj, v_proj").model
    layers = {n.split(".lora_")[0].rsplit(".", 1)[1] for n in chosen.state_dict() if "lora_" in n}
    assert layers == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match=r"student\.lora_targets = 'nowhere'") as info:
        adapted(targets="nowhere")
    assert "\n" not in str(info.value)


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"install stableopd\[peft\]"):
        adapted()


# `PeftModel.from_pretrained` (peft 0.21) asks transformers 5.23 for an attribute by a former name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_end_to_end(tmp_path):
    world = tiny.make_world(tmp_path / "w")
    config = tiny.write_config(
        world,
        student={"lora_rank": 2, "gradient_checkpointing": True},
        objective={"beta_reference": 0.1},
        optimizer={"learning_rate": 0.01},
    )
    assert tiny.run_cli("train", config)[::2] == (0, "")
    first, second = tiny.metrics_of(world / "run")
    assert first["loss/reference_kl"] == 0.0
    assert second["loss/reference_kl"] > 0.0
    checkpoint = world / "run" / "checkpoints" / "000002"
    assert not (checkpoint / "model.safetensors").exists()
    base = load(world / "student").model
    merged = peft.PeftModel.from_pretrained(base, checkpoint)
    assert any("lora_B" in n and w.abs().max() > 0 for n, w in merged.named_parameters())


def write_gguf(file, model):
    """A Llama with the tokens of `tiny` as GGUF, as llama.cpp lays it out."""
    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    tokens = [{" ": "Ġ", "\n": "Ċ"}.get(token, token) for token in tiny.VOCABULARY]
    tokens[-2:] = ["12", "10"]
    writer.add_token_list(tokens)
    # Two, as transformers 5.17 reads a single one as a text.
    writer.add_token_merges(["1 0", "1 2"])
    writer.add_token_types([3, 3, 3] + [1] * (V - 3))
    writer.add_eos_token_id(tiny.EOS)
    writer.add_bos_token_id(tiny.EOS)
    writer.add_pad_token_id(tiny.PAD)
    outside = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, weight = name.removesuffix(".weight"), tensor.numpy()
        for projection, num_heads in heads.items():
            if stem.endswith(projection):  # llama.cpp interleaves the two halves of a rotation
                halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if stem in outside:
            target = outside[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{inside[rest]}"
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    plain = make_llama()
    write_gguf(tmp_path / "m.gguf", plain)
    loaded = load(tmp_path, gguf_file="m.gguf")
    assert loaded.tokenizer.eos_token_id == tiny.EOS
    ids_BT = torch.tensor([loaded.tokenizer("12+3=")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids_BT).logits, plain(ids_BT).logits)
        # A checkpoint of such a student is an ordinary model folder.
        save_model(tmp_path / "saved", loaded.model, loaded.tokenizer)
        again = load(tmp_path / "saved")
        assert torch.equal(again.model(ids_BT).logits, plain(ids_BT).logits)
    assert again.tokenizer("12+10=")["input_ids"] == loaded.tokenizer("12+10=")["input_ids"]


def test_a_broken_gguf(tmp_path):
    write_gguf(tmp_path / "whole.gguf", make_llama())
    (tmp_path / "m.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:3000])
    assert "cannot be loaded" in refused(tmp_path, gguf_file="m.gguf")


def test_a_copied_folder_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    models.require_same_tokenizer(load(folder), load(tmp_path / "copy", role="teacher"))
