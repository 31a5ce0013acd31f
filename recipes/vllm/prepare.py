"""Write an embedded model with heads of 32: the same function, in a shape that vLLM computes.

    python recipes/vllm/prepare.py work/vllm/student
    python recipes/vllm/prepare.py work/vllm/teacher teacher

vLLM's attention on CPUs has no heads of 16. Each head gets 16 more entries that are always 0, and
what depends on the size of a head is set so that nothing else changes: the rotations of the first
entries by the base of the frequencies, the scale of the attention by the queries' weights.
"""

import math
import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from stableopd import embedded


def widened(weight_OI: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of heads of `size`, as rows of heads of twice that; the halves rotate in pairs."""
    parts = weight_OI.reshape(-1, 2, size // 2, weight_OI.shape[-1])
    return torch.cat([parts, torch.zeros_like(parts)], dim=2).reshape(-1, weight_OI.shape[-1])


def main(folder: Path, name: str = "student") -> None:
    logging.disable_progress_bar()
    source = embedded.path(name)
    model = LlamaForCausalLM.from_pretrained(source)
    size = model.config.head_dim
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name] = widened(weight, size)
        if name.endswith("q_proj.weight"):
            weights[name] = weights[name] * math.sqrt(2)
        if name.endswith("o_proj.weight"):
            weights[name] = widened(weight.T, size).T.contiguous()
    settings = model.config.to_dict()
    rope = settings["rope_parameters"]
    rope["rope_theta"] = rope["rope_theta"] ** 2
    wide = LlamaForCausalLM(LlamaConfig(**settings | {"head_dim": 2 * size}))
    wide.load_state_dict(weights)
    wide.generation_config = model.generation_config
    wide.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
