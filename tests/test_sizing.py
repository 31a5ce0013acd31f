"""The arithmetic behind docs/sizing.md, by hand, against the doctor's, and the page itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from stableopd import config
from stableopd.doctor.memory import estimate
from stableopd.models import LanguageModel
from stableopd.types import ConfigError, ModelError
from tiny import V, make_llama, make_tokenizer, save_model

ROOT = Path(__file__).parent.parent
with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
    models = importlib.import_module("sizing_models")
    held = importlib.import_module("sizing_memory")
    seconds = importlib.import_module("sizing_seconds")
    sizing = importlib.import_module("sizing")

SMALL = models.Shape("s", 2, 8, 16, 2, 1, 4, 100, False)
DEVICE = held.Device("d", 1000.0, 100.0, 1e6, 50.0, 1.0, 0.5, 0.5)
PLAN = held.Plan(
    SMALL, SMALL, DEVICE, prompts=2, rollouts_per_prompt=2, prompt_tokens=2, max_prompt_tokens=4,
    tokens=6, budget=10, golden_tokens=8, batch=4, micro_batch=28, steps=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weights", "cache"),
    [
        # Published counts of weights (safetensors metadata); cache by hand, 4 layers keys.
        ("135M", 134_515_008, 4 * 30 * 192),
        ("Qwen2.5-0.5B", 494_032_768, 4 * 24 * 128),
        # Less the tied head, which their files hold twice.
        ("Qwen3-0.6B", 751_632_384 - 155_582_464, 4 * 28 * 1_024),
        ("Qwen3-1.7B", 2_031_739_904 - 311_164_928, 4 * 28 * 1_024),
        ("1.5B", 1_543_714_304, 28_672),
        ("7B", 7_615_616_512, 57_344),
        ("4B", 4_022_468_096, 147_456),
        ("32B", 32_762_123_264, 262_144),
        ("8B", 8_030_261_248, 131_072),
        ("70B", 70_553_706_496, 327_680),
    ],
)
def test_known_models(name, weights, cache):
    shape = models.find_model(name)
    assert shape.weights == weights
    assert shape.cache_bytes() == cache


def test_adapters_as_peft_counts_them():
    assert models.find_model("1.5B").adapter(8) == 9_232_384
    assert models.find_model("8B").adapter(16) == 41_943_040


def test_flops_by_hand():
    # A layer: queries 8x8, output 8x8, keys and values 8x4 each, three of 8x16: 576.
    assert SMALL.products == 576
    assert SMALL.layer_flops(10) == 2 * (2 * 576 + 2 * 10 * 8)
    assert SMALL.forward_flops(0) == 2 * 2 * 576 + 2 * 800
    assert SMALL.weights == 2 * (576 + 16) + 2 * 800 + 8


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("checkpoints", "rows"), [(False, V), (True, V), (True, 20_000), (True, 5_000)]
)
def test_the_doctor_says_the_same(tmp_path, mixed, checkpoints, rows):
    """Of a real model in memory; the shape is read from the folder that it was saved to.

    70 tokens by 20,000 are enough to be swept, by 5,000 they are not.
    """
    model = make_llama(0, 64, rows, intermediate_size=96)
    shape = models.read_shape(save_model(tmp_path / "m", model))
    settings = config.parse(
        {
            "student": {"model": "s", "gradient_checkpointing": checkpoints},
            "teacher": {"model": "t"},
            "data": {"train": "d"},
            "rollout": {"prompts_per_step": 3, "max_new_tokens": 20, "batch_size": 5},
            "optimizer": {"micro_batch_tokens": 70},
        }
    )
    student = LanguageModel("s", model, make_tokenizer(), 128)
    e = estimate(settings, student, student, 7, mixed, not mixed)
    device = dataclasses.replace(DEVICE, mixed=mixed)
    plan = held.Plan(
        shape, shape, device, prompts=3, max_prompt_tokens=7, budget=20, batch=5, micro_batch=70,
        checkpoints=checkpoints,
    )  # fmt: skip
    found = held.memory(plan)
    for name in ("student", "gradients", "reference", "copies", "activations", "cache"):
        assert found[name] == getattr(e, name), name
    assert found["AdamW"] == e.adamw
    assert found["logits"] == max(e.tiles, e.sampled_logits)
    if rows == 20_000:
        # Nine tiles, on a CPU of 2^20 numbers, and a gradient of the head of 64 columns.
        tile = 70 * rows if mixed else 2**20
        assert found["logits"] == 4 * (9 * tile + 64 * rows)
    # The doctor's own patient had its teacher in float32 here; on a GPU it is bfloat16.
    teacher = e.teacher / 2 if mixed else e.teacher
    assert found["peak"] == pytest.approx(e.peak - e.process - e.teacher + teacher)


def test_sharding():
    four = dataclasses.replace(PLAN, gpus=4, prompts=4, sharded=True)
    one, found = held.memory(dataclasses.replace(PLAN, prompts=4)), held.memory(four)
    for name in ("student", "gradients", "AdamW", "teacher", "reference"):
        assert found[name] == one[name] / 4
    # Sampling gathers the student, 4 bytes a weight; more than the outer weights of an update.
    outer, layer = 1608, 592
    updating = 4 * outer * 2 + 2 * outer + 2 * 4 * layer
    assert found["gathered"] == max(4 * SMALL.weights, updating)
    offloaded = held.memory(dataclasses.replace(four, offloads=True))
    assert offloaded["student"] == offloaded["AdamW"] == 0
    assert offloaded["host"] == SMALL.weights * (16 + 2 + 4) / 4


def test_seconds_by_hand():
    found = seconds.parts(PLAN)
    # Ten decoding steps. Read: weights of 2 bytes each time, and 3-byte keys and values of 4 rows
    # of 6 tokens at a mean context of 5, at 50 bytes/s; launches and arithmetic are less.
    read = 10 * 2 * (2 * 576 + 800) + 4 * 6 * 5 * 2 * 2 * 4 * 3
    assert found["rollouts"] == seconds.Part(read / 50, "memory")
    # 4 rollouts of 8 tokens, forward, at 500 FLOP/s; a vocabulary of 100 is not swept.
    forward = 2 * (2 * 576 + 2 * 8 * 8) + 2 * 800
    assert found["teacher"].seconds == pytest.approx(32 * forward / 500)
    assert found["reference"] == found["teacher"]
    # Four passes with checkpointing, over the golden tokens too; then AdamW's traffic.
    update = 4 * (32 + 2 * 10) * forward / 500 + 28 * SMALL.weights / 50
    assert found["update"].seconds == pytest.approx(update)
    assert found["sync"].seconds == 0
    total = read / 50 + 2 * 32 * forward / 500 + update
    assert seconds.gpu_hours(PLAN) == pytest.approx(3 * total / 3600)


LARGE = dataclasses.replace(SMALL, vocabulary=5_000)
SWEPT = dataclasses.replace(
    PLAN, student=LARGE, teacher=dataclasses.replace(LARGE, width=24), micro_batch=4_096
)


def test_a_swept_head_by_hand():
    """Tiles of 1,024 positions; products at 500 FLOP/s, then bytes at 50 bytes/s."""
    head, pass_s, each = 8 * 5_000, (2 * 576 + 2 * 8 * 8) * 2 / 500, 2 * 8 * 5_000 / 500
    # The reference: forward and backward.
    moved = head / 1_024 * 2 * 8 + 5_000 * (60 + 36)
    found = seconds.reference_part(SWEPT)
    assert found == seconds.Part(pytest.approx(32 * (pass_s + 2 * each + moved / 50)), "memory")
    # The student: four products, with or without checkpoints of the layers.
    for checkpoints, passes in ((True, 4), (False, 3)):
        plan = dataclasses.replace(SWEPT, checkpoints=checkpoints)
        moved = head / 1_024 * (3 * 8 + 12) + 5_000 * 90
        swept = 52 * (passes * pass_s + 4 * each + moved / 50)
        adamw = 28 * LARGE.weights / 50
        assert seconds.update_part(plan).seconds == pytest.approx(swept + adamw)
    # The teacher: bfloat16, once; 16 blocks of 16 rows are gathered of both heads.
    t = SWEPT.teacher
    moved = t.head / 1_024 * 2 + 5_000 * 44 + 256 * (24 * 6 + 8 * 16)
    done = t.layer_flops(8) + 2 * t.head
    assert seconds.teacher_part(SWEPT).seconds == pytest.approx(32 * (done / 500 + moved / 50))


def test_who_moves_less():
    """A CPU keeps tiles in its cache and casts nothing; few tokens fill less than a tile's rows."""
    cpu = dataclasses.replace(SWEPT, device=dataclasses.replace(DEVICE, mixed=False))
    pass_s, each = (2 * 576 + 2 * 8 * 8) * 2 / 500, 2 * 8 * 5_000 / 500
    for micro_batch, rows in ((4_096, 1_024), (28, 28)):
        plan = dataclasses.replace(cpu, micro_batch=micro_batch)
        moved = 40_000 / rows * 8
        found = seconds.reference_part(plan).seconds
        assert found == pytest.approx(32 * (pass_s + 2 * each + moved / 50))
    # A frozen head has no gradient of its own.
    lora = seconds.update_part(dataclasses.replace(SWEPT, lora_rank=1)).seconds
    moved = 40_000 / 1_024 * 24 + 5_000 * 88
    adamw = 28 * LARGE.adapter(1) / 50
    assert lora == pytest.approx(52 * (3 * pass_s + 3 * each + moved / 50) + adamw)
    served = seconds.teacher_part(dataclasses.replace(SWEPT, gpus=2, teacher_gpus=1))
    assert served.seconds == pytest.approx(32 * SWEPT.teacher.forward_flops(8) / 500)


def test_exchange_and_servers():
    slow = dataclasses.replace(DEVICE, link=1e-3)
    two = dataclasses.replace(PLAN, gpus=2, sharded=True, device=slow)
    # 32 tokens on two processes make one micro-batch of 28 at most each.
    found = seconds.teacher_part(two)
    assert found == seconds.Part(pytest.approx(2 * SMALL.weights / 2 / 0.7e-3), "exchange")
    # 12 bytes a weight and pass; 52 tokens on two processes are one micro-batch.
    moved = 12 * SMALL.weights / 2 / 0.7e-3
    extra = 28 * SMALL.weights / 2 / 50
    assert seconds.update_part(two).seconds == pytest.approx(moved + extra)
    served = dataclasses.replace(PLAN, gpus=4, rollout_gpus=1, teacher_gpus=1)
    assert held.memory(served)["teacher"] == held.memory(served)["cache"] == 0
    sizes = held.served(served)
    assert sizes["rollouts"] == 2 * SMALL.weights + 4 * 14 * 2 * 2 * 4 * 2
    assert sizes["teacher"] == 2 * SMALL.weights + 14 * 2 * 2 * 4 * 2
    assert seconds.sync_part(served) == seconds.Part(4 * SMALL.weights / seconds.DISK, "disk")


def test_what_no_run_can_be():
    with pytest.raises(ConfigError, match="fewer than 4 training processes"):
        dataclasses.replace(PLAN, gpus=4)
    with pytest.raises(ConfigError, match="no GPU is left to train on"):
        dataclasses.replace(PLAN, gpus=2, rollout_gpus=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as a model's configuration"),
        ("[]", "cannot be read"),
        ('{"hidden_size": 8}', "has no num_attention_heads"),
        ('{"num_experts": 8}', "dense models"),
    ],
)
def test_files_that_are_no_dense_model(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        models.find_model(str(tmp_path))


def test_a_name_that_is_none():
    for name in ("9B", "5B", ""):
        with pytest.raises(ModelError, match="neither a folder"):
            models.find_model(name)


def test_the_command(tmp_path):
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936}
    shape |= {"tie_word_embeddings": True, "model_type": "qwen2"}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    assert models.read_shape(folder).weights == 1_543_714_304
    run = CliRunner().invoke
    done = run(sizing.app, ["--student", str(folder), "--teacher", "7B", "--price", "3"])
    assert done.exit_code == 0
    hours = seconds.gpu_hours(sizing.PLANS["1.5B <- 7B, 1 H100"])
    assert f"{3 * hours:,.2f}" in done.output
    refused = run(sizing.app, ["--student", "1.5B", "--gpus", "32"])
    assert refused.exit_code == 2
    assert "prompts_per_step = 16 is fewer than 32" in refused.output


def test_the_page_shows_what_the_script_gives():
    page = (ROOT / "docs" / "sizing.md").read_text()
    assert sizing.renewed(page) == page
    with pytest.raises(ConfigError, match="0 places"):
        sizing.renewed(page.replace("sizing: cost", "sizing: price"))
