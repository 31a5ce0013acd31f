"""The server of `rollout.engine = "vllm"`: vLLM, with weights that can be changed while it serves.

    python -m stableopd.rollout.vllm_worker --model STUDENT --port 8000

starts vLLM's own server, whose options may follow. This file runs in vLLM's environment, which
needs nothing else of this package: it imports torch and vLLM alone.

What plain vLLM (0.32) gets wrong: its `reload_weights` loads a new input embedding, but on CPUs the
output head computes with a packed copy of its weight, made when it is first used, and a head that
is tied to the embedding is not packed again. It goes on with the old weights, and answers 200.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["WeightUpdates", "main"]

SERVER = "vllm.entrypoints.openai.api_server"


class WeightUpdates:
    """Methods of every worker, by `--worker-extension-cls`; called through `/collective_rpc`."""

    def stableopd_about(self) -> dict[str, Any]:
        """What a run must know of the server before it trusts its answers.

        Returns:
            The tag of the weights that were loaded last, "" before any; the type that weights are
            held in; the size of the vocabulary; the longest sequence; which log-probs are given.
        """
        model = self.vllm_config.model_config  # pyright: ignore[reportAttributeAccessIssue]
        return {
            "tag": getattr(self, "stableopd_tag", ""),
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_tokens": int(model.get_vocab_size()),
            "context": int(model.max_model_len),
            "logprobs": str(model.logprobs_mode),
        }

    def stableopd_load(self, folder: str, tag: str) -> dict[str, Any]:
        """Take the weights of a folder.

        Args:
            folder: Has safetensors with the names that the model's own files have.
            tag: What `stableopd_about` is to call them.

        Returns:
            The tag, or under "error" why it failed; an exception would look like a fault that
            passes.
        """
        runner: Any = self.model_runner  # pyright: ignore[reportAttributeAccessIssue]
        try:
            runner.reload_weights(weights_path=folder)
            _pack_heads(runner.get_model())
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        self.stableopd_tag = tag
        return {"tag": tag}


def _pack_heads(model: Any) -> None:
    """On CPUs, pack the weights of output heads again, tied ones among them."""
    from vllm.model_executor.layers.utils import (  # pyright: ignore[reportMissingImports]
        dispatch_cpu_unquantized_gemm,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
        ParallelLMHead,
    )

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def main() -> None:
    """Become vLLM's server; the command line goes on to it."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /collective_rpc
    ours = [
        "--worker-extension-cls=stableopd.rollout.vllm_worker.WeightUpdates",
        # Log-probs of the distribution drawn from: behind temperature, top-k and top-p.
        "--logprobs-mode=processed_logprobs",
        # Nothing of the model's generation_config.json: requests say all.
        "--generation-config=vllm",
        # Whoever reaches this server can change its weights.
        "--host=127.0.0.1",
    ]
    # What the user gives comes last, and so wins.
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *ours, *sys.argv[1:]])


if __name__ == "__main__":
    main()
