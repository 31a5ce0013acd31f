"""A server that answers as vLLM with our extension does, and can be told to go wrong.

It shows faults that a real one cannot be made to show (tests/test_vllm.py has the real one).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fault_server import Answer, FaultServer, said, serving


class FakeVllm:
    """A tiny model behind vLLM's routes; what is set here takes effect with the next request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.server: FaultServer | None = None
        self.num_written = self.num_loads = 0
        self.faults: list[Answer] = []  # given to the next requests for completions, in order
        self.is_down = False
        self.dies_after = -1  # completions until it is started again, with the weights of `folder`
        self.extension = "stableopd.rollout.vllm_worker.WeightUpdates"
        self.info: Answer = ""  # instead of the truth about the server
        self.loads = ""  # which weights a load leaves old: "", "all" or "head"
        self.about: dict[str, Any] = {
            "dtype": "float32", "context": 128, "logprobs": "processed_logprobs"
        }  # fmt: skip
        self.start()

    @property
    def url(self) -> str:
        assert self.server is not None
        return self.server.url

    def start(self) -> None:
        """Begin with the weights of the folder, as a server that was killed does."""
        self.tag = ""
        self.model = LlamaForCausalLM.from_pretrained(self.folder).eval()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        with self.lock, torch.no_grad():
            if self.is_down:
                return "drop"
            if path == "/health":
                return 200, {}, b""
            if path == "/server_info?config_format=json":
                settings = {"worker_extension_cls": self.extension}
                return self.info or said({"vllm_config": {"parallel_config": settings}})
            if path == "/collective_rpc":
                found = getattr(self, body["method"])(*body["args"])
                return found if isinstance(found, str | tuple) else said({"results": [found]})
            if self.faults:
                return self.faults.pop(0)
            assert path == "/v1/completions"
            if "prompt_logprobs" in body:
                return said({"choices": [{"prompt_logprobs": self.score(body["prompt"])}]})
            if self.num_written == self.dies_after:
                self.start()
            self.num_written += 1
            return said({"choices": [self.write(body, index) for index in range(body["n"])]})

    def stableopd_about(self) -> Any:
        rows = self.model.get_output_embeddings().weight.shape[0]
        return {"tag": self.tag, "num_tokens": rows, **self.about}

    def stableopd_load(self, folder: str, tag: str) -> Any:
        (file,) = Path(folder).glob("*.safetensors")
        weights = load_file(file)
        if self.loads == "head":
            weights = {k: v for k, v in weights.items() if "lm_head" not in k}
        if self.loads != "all":
            self.model.load_state_dict(weights, strict=False)
        self.tag = tag
        self.num_loads += 1
        return {"tag": tag}

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def score(self, ids: list[int]) -> list[dict[str, Any] | None]:
        logp_TV = self.logits(ids).log_softmax(-1)
        rows = ({str(i): {"logprob": logp_TV[t, i].item()}} for t, i in enumerate(ids[1:]))
        return [None, *rows]

    def write(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(body["seed"] + index)
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < body["max_tokens"] and not set(ids[-1:]) & set(body["stop_token_ids"]):
            logits_V = self.logits([*body["prompt"], *ids])[-1]
            for i, bias in body.get("logit_bias", {}).items():
                logits_V[int(i)] += bias
            if body["top_k"]:
                lowest = logits_V.topk(body["top_k"]).values[-1]
                logits_V[logits_V < lowest] = -torch.inf
            logp_V = (logits_V / (body["temperature"] or 1.0)).log_softmax(-1)
            drawn = torch.multinomial(logp_V.exp(), 1, generator=draw)
            ids.append(int(drawn if body["temperature"] else logp_V.argmax()))
            logps.append(logp_V[ids[-1]].item())
        stopped = ids[-1] in body["stop_token_ids"]
        return {
            "index": index,
            "token_ids": ids,
            "logprobs": {"token_logprobs": logps},
            "finish_reason": "stop" if stopped else "length",
        }


@contextlib.contextmanager
def fake_vllm(folder: Path) -> Iterator[FakeVllm]:
    """Serve the model of a folder while the block lasts."""
    fake = FakeVllm(folder)
    with serving(fake.answer) as server:
        fake.server = server
        yield fake
