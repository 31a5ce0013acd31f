"""A tiny model behind HTTP that answers as vLLM does; the real one is in test_served_teacher.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from fault_server import Answer, said
from tiny import make_tokenizer

# torch is asked by one thread at a time, as its results may depend on how many there are.
LOCK = threading.Lock()


def vllm_like(
    model: Any,
    tokenizer: Any = None,
    name: str = "tiny",
    change: Callable[[str, dict[str, Any], Any], Answer | None] | None = None,
) -> Callable[[str, dict[str, Any]], Answer]:
    """What `serving` takes; `change` sees each answer, and may give another one."""
    tokenizer = tokenizer or make_tokenizer()

    def script(path: str, body: dict[str, Any]) -> Answer:
        with LOCK:
            found = answer(path, body)
            changed = change(path, body, found) if change else None
        return changed or said(found)

    def answer(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": name, "root": name, "parent": None, "max_model_len": 128}]}
        prompt = body.get("prompt")
        if path == "/v1/chat/completions":
            prompt = "".join(message["content"] for message in body["messages"])
        ids = prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]
        if "prompt_logprobs" in body:
            return {"choices": [{"text": "", "prompt_logprobs": scores(ids, body)}]}
        return {"choices": [written(ids, body, path) for _ in range(body["n"])]}

    @torch.no_grad()
    def scores(ids: list[int], body: dict[str, Any]) -> list[Any]:
        logp_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows: list[Any] = [None]
        for token, logp_V in zip(ids[1:], logp_TV[:-1], strict=True):
            top = logp_V.topk(body["prompt_logprobs"]).indices.tolist()
            rows.append(
                {
                    str(i): {"logprob": logp_V[i].item(), "decoded_token": tokenizer.decode([i])}
                    for i in dict.fromkeys([token, *top])
                }
            )
        return rows

    @torch.no_grad()
    def written(ids: list[int], body: dict[str, Any], path: str) -> dict[str, Any]:
        """The likeliest tokens up to a stop."""
        new: list[int] = []
        while len(new) < body["max_tokens"] and not set(new) & {1, *body.get("stop_token_ids", ())}:
            logits = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
            new.append(int(logits.argmax()))
        has_ended = new[-1] in {1, *body.get("stop_token_ids", ())}
        text = tokenizer.decode(new[:-1] if has_ended else new, skip_special_tokens=True)
        said = {"message": {"content": text}} if "chat" in path else {"text": text}
        return {**said, "finish_reason": "stop" if has_ended else "length"}

    return script
