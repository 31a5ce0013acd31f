"""One optimizer step of verl's own FSDP engine with our loss, on a CPU; prints what came out.

    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_cpu,stableopd.integrations.verl \
        VERL_USE_EXTERNAL_PLUGINS=none python verl_engine.py FOLDER

Beside it, of the same step, our trainer's loss and the norm of its gradient.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import step_parts
import verl_parts as parts
from tiny import save_model

MODEL, ACTOR = "actor_rollout_ref.model", "actor_rollout_ref.actor"


def main(folder: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(place)
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{folder / 'rendezvous'}"
    )
    save_model(folder / "model", step_parts.model(0).float())
    float32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    actor, distillation, config = parts.configs(
        beta_reference=0,
        extra=(
            f"{MODEL}.path={folder / 'model'}",
            f"+{MODEL}.override_config.attn_implementation=eager",
            f"{MODEL}.use_remove_padding=False",
            f"{ACTOR}.fsdp_config.use_torch_compile=False",
            f"+{ACTOR}.fsdp_config.mixed_precision={float32.replace(':', ': ')}",
        ),
    )
    engine = FSDPEngineWithLMHead(
        model_config=omega_conf_to_dataclass(config.actor_rollout_ref.model),
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    engine.initialize()

    world = parts.World(beta_reference=0)
    world.student = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    data = world.data()
    data["teacher_logprobs"] = data["teacher_logprobs"].float()
    data["loss_mask"] = data["response_mask"]
    lengths = data["input_ids"].offsets().diff().tolist()
    data["position_ids"] = parts.jagged([torch.arange(n) for n in lengths])
    tu.assign_non_tensor(
        data,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=3,
        use_fused_kernels=False,
        temperature=1.0,
        # As verl's trainer says for this loss: top-k, and nothing but distillation.
        distillation_use_topk=True,
        distillation_only=True,
        calculate_entropy=False,
    )
    loss = functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation)
    with engine.train_mode():
        out = engine.train_batch(data, loss_function=loss)
    ours, _, _ = world.ours()
    ours.backward()
    squares = [p.grad.square().sum() for p in world.student.parameters() if p.grad is not None]
    metrics = {k: v for k, v in out["metrics"].items() if isinstance(v, list)}
    found = {
        "engine": type(engine.module).__name__,
        "micro_batches": len(out["loss"]),
        "loss": sum(out["loss"]),
        "grad_norm": float(out["metrics"]["grad_norm"]),
        "our_loss": ours.item(),
        "our_grad_norm": torch.stack(squares).sum().sqrt().item(),
        "truncated": metrics["stableopd/rollout/truncation_rate"],
    }
    print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
