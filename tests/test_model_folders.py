"""Model folders as people have them: adapters, mixtures, more ids than rows; and harmful ones."""

import copy
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from stableopd import models
from stableopd.data.vocabulary import require_rows
from stableopd.evaluate.loading import load_model
from stableopd.rollout.stops import stop_ids_of
from stableopd.types import DataError, ModelError
from tiny import CPU, V, make_llama, make_tokenizer, save_model

CHAT = (
    "{% for m in messages %}#{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)


def load(folder, role="student", **options):
    return models.load(str(folder), role=role, dtype=torch.float32, device=CPU, **options)


def refused(folder, **options):
    with pytest.raises(ModelError) as info:
        load(folder, **options)
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith(f"student.model = '{folder}': ")
    return message


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", make_llama())


def make_adapter(tmp_path, tokenizer=None, rows=V, **options):
    """A base model, and an adapter whose weights are not zero."""
    base = save_model(tmp_path / "base", make_llama())
    model = make_llama()
    model.name_or_path = model.config._name_or_path = str(base)
    if rows != V:
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and ("lora_B" in name or "modules_to_save" in name):
                weight.normal_()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestAdapters:
    def test_the_adapters_tokenizer_template_and_stop_win(self, tmp_path):
        tokenizer = make_tokenizer(eos="<end>")
        tokenizer.chat_template = CHAT
        base, adapter, merged = make_adapter(tmp_path, tokenizer)
        loaded = load(adapter)
        assert loaded.name == str(adapter)
        assert loaded.folders == (adapter, base)
        assert loaded.tokenizer.chat_template == CHAT
        assert tiny.END in stop_ids_of(loaded.model, loaded.tokenizer)
        ids_BT = torch.tensor([[3, 4, 5]])
        assert torch.allclose(loaded.model(ids_BT).logits, merged(ids_BT).logits, atol=1e-5)
        change(base / "generation_config.json", eos_token_id=5)
        shutil.copy(base / "generation_config.json", adapter)
        assert stop_ids_of(load(adapter).model, make_tokenizer()) == (tiny.EOS, 5)

    def test_without_a_tokenizer_that_of_the_base_is_used(self, tmp_path):
        base, adapter, _ = make_adapter(tmp_path)
        loaded = load(adapter)
        assert loaded.tokenizer.get_vocab() == tiny.VOCABULARY
        assert loaded.tokenizer_files == load(base).tokenizer_files

    @pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # older peft
    def test_embeddings_are_resized(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<tool>"])
        saved = ["embed_tokens", "lm_head"]
        _, adapter, merged = make_adapter(tmp_path, tokenizer, V + 1, modules_to_save=saved)
        loaded = load(adapter)
        assert models.shared_vocabulary(loaded, None) == V + 1
        ids_BT = torch.tensor([[3, 4, V]])
        assert torch.allclose(loaded.model(ids_BT).logits, merged(ids_BT).logits, atol=1e-5)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_train_takes_what_eval_takes(self, tmp_path, role):
        world = tiny.make_world(tmp_path / "w")
        _, adapter, merged = make_adapter(tmp_path)
        config = tiny.write_config(world, run={"steps": 1}, **{role: {"model": str(adapter)}})
        assert tiny.run_cli("train", config)[::2] == (0, "")
        if role == "student":
            saved = load_file(world / "run" / "checkpoints" / "000001" / "model.safetensors")
            name = "model.layers.0.self_attn.q_proj.weight"
            # Adam's first step moves each weight by the learning rate.
            assert torch.allclose(saved[name], merged.state_dict()[name], atol=1.1e-3)
        assert load_model(str(adapter), "", torch.float32, CPU, "eval")[0].name == str(adapter)

    def test_pickles_are_refused(self, tmp_path):
        _, adapter, _ = make_adapter(tmp_path)
        weights = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(weights, adapter / "adapter_model.bin")
        assert "adapter_model.bin" in refused(adapter)

    def test_weights_that_do_not_fit(self, tmp_path):
        _, adapter, _ = make_adapter(tmp_path)
        file = adapter / "adapter_model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[0]
        save_file({k: v for k, v in weights.items() if k != name}, file)
        assert name in refused(adapter)
        save_file({**weights, "base_model.model.other.weight": torch.ones(2)}, file)
        assert "other.weight" in refused(adapter)
        save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file)
        assert "not finite" in refused(adapter)
        save_file({**weights, name: weights[name].to(torch.int8)}, file)
        assert "whole numbers" in refused(adapter)

    def test_an_adapter_of_itself(self, tmp_path):
        _, adapter, _ = make_adapter(tmp_path)
        change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
        assert "each other" in refused(adapter)

    @pytest.mark.parametrize(
        "fields",
        [
            {"base_model_name_or_path": None},
            {"base_model_name_or_path": 3},
            {"base_model_name_or_path": "./nowhere/at/all"},
            {"peft_type": "NONE_SUCH"},
            {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
            {"r": "two"},
            {"target_modules": ["nothing"]},
        ],
    )
    def test_configs_that_are_refused(self, tmp_path, fields):
        _, adapter, _ = make_adapter(tmp_path)
        change(adapter / "adapter_config.json", **fields)
        refused(adapter)


def test_a_teacher_that_is_not_there_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    world = tiny.make_world(tmp_path / "w")
    monkeypatch.setattr(models, "load", None)  # a call would be a traceback
    for where in ("nowhere", "student"):
        (world / "nowhere").mkdir(exist_ok=True)
        (world / "student" / "model.safetensors").unlink(missing_ok=True)
        config = tiny.write_config(world, teacher={"model": str(world / where)})
        code, _, err = tiny.run_cli("train", config)
        assert (code, err.count("\n")) == (2, 1)
        assert "teacher.model" in err


class TestPickles:
    def test_an_index_that_names_one(self, folder, tmp_path):
        class Evil:
            def __reduce__(self):
                return open, (str(tmp_path / "was-run"), "w")

        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({"a": Evil()}, folder / "weights.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "weights.bin" in refused(folder)
        for name in ("../model/weights.safetensors", "missing.safetensors", 3, None):
            index["weight_map"] = dict.fromkeys(weights, name)
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            refused(folder)
        assert not (tmp_path / "was-run").exists()

    @pytest.mark.parametrize("name", ["adapter_model.bin", "weights.bin", "../m.safetensors", 3])
    def test_a_config_that_names_one(self, folder, name):
        weights = load_file(folder / "model.safetensors")
        torch.save(weights, folder / "adapter_model.bin")
        change(folder / "config.json", transformers_weights=name)
        assert "transformers_weights" in refused(folder)

    def test_shards_are_read(self, folder):
        expected = load(folder).model.state_dict()
        (folder / "model.safetensors").unlink()
        make_llama().save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        found = load(folder).model.state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class TestLoadingReport:
    def test_fewer_layers_than_the_weights(self, folder):
        change(folder / "config.json", num_hidden_layers=1)
        assert "model.layers.1." in refused(folder)

    def test_weights_that_are_left_over(self, folder):
        file = folder / "model.safetensors"
        save_file(
            {**load_file(file), "value_head.weight": torch.ones(1, 32)}, file, {"format": "pt"}
        )
        assert "value_head.weight" in refused(folder)

    def test_whole_numbers(self, folder):
        file = folder / "model.safetensors"
        weights = {name: weight.to(torch.int8) for name, weight in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
        assert "whole numbers" in refused(folder)

    def test_tied_weights_that_are_saved_twice(self, tmp_path):
        folder = save_model(tmp_path / "m", make_llama(tie_word_embeddings=True))
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, file, {"format": "pt"})
        model = load(folder).model
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_config_asks_for_no_kernel(folder):
    for key in ("attn_implementation", "_attn_implementation"):
        change(folder / "config.json", **{key: "kernels-community/flash-attn"})
    assert load(folder).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"num_key_value_heads": 0}),
        ("config.json", {"pad_token_id": 10**9}),
        ("config.json", {"vocab_size": 0}),
        ("config.json", {"num_hidden_layers": -1}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"dtype": [1]}),
        ("config.json", {"logit_scale": "x"}),
        ("config.json", {"max_position_embeddings": "long"}),
        ("config.json", {"max_position_embeddings": -4}),
        ("tokenizer.json", {"model": None}),
        ("tokenizer.json", {"version": "9"}),
        ("tokenizer.json", {"normalizer": {"type": "New"}}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
    ],
)
def test_folders_that_ended_in_a_traceback(folder, file, fields):
    change(folder / file, **fields)
    refused(folder)


@pytest.mark.parametrize("stop", ["x", [1.5], {"a": 1}, True])
def test_stops_that_are_no_ids(folder, stop):
    model = load(folder)
    model.model.generation_config.eos_token_id = stop
    with pytest.raises(ModelError, match="eos_token_id"):
        stop_ids_of(model.model, model.tokenizer)


class TestMoreIdsThanRows:
    def test_only_ids_that_are_used_must_exist(self, tmp_path):
        world = tiny.make_world(tmp_path / "w")
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"])
        for role in ("student", "teacher"):
            tokenizer.save_pretrained(world / role)
        config = tiny.write_config(world, run={"steps": 1})
        assert tiny.run_cli("train", config)[::2] == (0, "")
        student, data = world / "student", world / "train.jsonl"
        common = ("--grader", "exact", "--max-new-tokens", 2, "--max-problems", 2)
        evaluate = ("eval", "--model", student, "--data", data, *common, "--output")
        assert tiny.run_cli(*evaluate, tmp_path / "e")[0] == 0
        code, out, _ = tiny.run_cli("doctor", "--student", student, "--data", data, "--json")
        levels = {f["name"]: f["level"] for f in json.loads(out)["findings"]}
        assert (code, levels["vocabulary"]) == (0, "OK")
        # A prompt or a solution that uses it is named.
        for column in ("prompt", "solution"):
            rows = tiny.sums(6)
            rows[4][column] += "<image>"
            tiny.write_rows(data, rows)
            again = ("--set", f"run.output={tmp_path / column}")
            code, _, err = tiny.run_cli("train", config, *again)
            assert (code, err.count("\n")) == (2, 1)
            assert "train.jsonl:5" in err
            assert "<image>" in err
        rows = tiny.sums(2)
        rows[1]["prompt"] += "<image>"
        tiny.write_rows(data, rows)
        code, _, err = tiny.run_cli(*evaluate, tmp_path / "f")
        assert code == 2
        assert "train.jsonl:2" in err
        code, out, _ = tiny.run_cli("doctor", "--student", student, "--data", data, "--json")
        levels = {f["name"]: f["level"] for f in json.loads(out)["findings"]}
        assert (code, levels["vocabulary"]) == (1, "FAIL")
        golden = ("golden", "--model", student, "--data", data, "--max-new-tokens", 2)
        code, _, err = tiny.run_cli(*golden, "--grader", "exact", "--output", tmp_path / "g.jsonl")
        assert code == 2
        assert "train.jsonl:2" in err

    def test_the_first_text_is_named(self):
        texts = [("prompt a", (1, 2)), ("prompt b", ()), ("prompt c", (V,))]
        with pytest.raises(DataError, match="prompt c"):
            require_rows(texts, make_tokenizer(), V)
        require_rows(texts, make_tokenizer(), V + 1)


def make_moe():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=128,
        output_router_logits=True, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_a_mixture_that_was_saved_with_its_auxiliary_loss(tmp_path):
    world = tiny.make_world(tmp_path / "w")
    save_model(world / "student", make_moe())
    assert json.loads((world / "student" / "config.json").read_text())["output_router_logits"]
    config = tiny.write_config(world, run={"steps": 1})
    assert tiny.run_cli("train", config)[::2] == (0, "")


def make_seeing():
    torch.manual_seed(0)
    kind = type(transformers.AutoConfig.for_model("qwen3_5"))
    text = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 14,
    }  # fmt: skip
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}
    config = kind(text_config=text, vision_config=vision, vision_end_token_id=8, **ids)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def test_a_model_that_sees_is_told_to_be_trained_in_part(tmp_path, folder):
    loaded = load(save_model(tmp_path / "seeing", make_seeing()))
    (note,) = loaded.notes
    assert "text part" in note
    assert "Qwen3_5ForConditionalGeneration" in note
    assert load(folder).notes == ()


class TestTokenizerFiles:
    def test_a_checkpoint_has_the_files_as_they_were(self, tmp_path):
        world = tiny.make_world(tmp_path / "w")
        student = world / "student"
        # As other versions write it, with keys that this one would drop or rewrite.
        change(student / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", x=1)
        (student / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
        (student / "tokenizer.json").write_text(
            json.dumps(json.loads((student / "tokenizer.json").read_text()), indent=7)
        )
        config = tiny.write_config(world, run={"steps": 1, "keep_checkpoints": 1})
        assert tiny.run_cli("train", config)[0] == 0
        checkpoint = world / "run" / "checkpoints" / "000001"
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        for name in names:
            assert (checkpoint / name).read_bytes() == (student / name).read_bytes()
        # They stay so when the run goes on from a checkpoint that is removed later.
        more = ("--resume", "--set", "run.steps=3")
        assert tiny.run_cli("train", config, *more)[::2] == (0, "")
        last = world / "run" / "checkpoints" / "000003"
        for name in names:
            assert (last / name).read_bytes() == (student / name).read_bytes()
        assert not checkpoint.exists()

    def test_another_template_is_saved_everywhere(self, tmp_path):
        folder = save_model(tmp_path / "m", make_llama())
        change(folder / "tokenizer_config.json", chat_template=CHAT)
        student = load(folder)
        assert student.tokenizer.chat_template == CHAT
        models.save_tokenizer(student, tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == CHAT
        student = copy.deepcopy(student)
        student.tokenizer.chat_template = "{{ 1 }}"
        models.save_tokenizer(student, tmp_path / "other")
        saved = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
        assert saved["chat_template"] == "{{ 1 }}"
        again = models.load_tokenizer(tmp_path / "other", "x")
        assert again.chat_template == "{{ 1 }}"
