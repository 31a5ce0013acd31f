"""Rollouts by vLLM servers that hold the student's weights, pushed to them after each update.

Weights go through files, which every layout of processes and every server can read, and not over
NCCL.

A server that is killed and comes back has the weights that it was started with, and would answer as
if nothing had happened. So weights have a tag, which lives in the server's memory: after each call
every server is asked for it, and a call that met a fresh server is made again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableopd.endpoint import (
    AnswerError,
    Endpoint,
    answer_bytes,
    at,
    listed,
    number,
    root_of,
    table,
    words,
)
from stableopd.rollout.sampler import as_rollout, require_tokens
from stableopd.types import ConfigError, ModelError, Rollout, SamplingSettings, ServerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["START", "VllmSampler"]

START = "python -m stableopd.rollout.vllm_worker --model MODEL"

# The name of our worker extension, or the end of it.
EXTENSION = "WeightUpdates"

# How often a call is made anew because answers were no rollouts or a server was started again
# (design: what fails five times in a row does not pass).
MAX_TRIES = 5

# Requests under way at once, of one prompt each, for each server; vLLM queues what it cannot batch
# (design: 64 prompts of 4 rollouts are vLLM's own default for a batch, 256).
IN_FLIGHT = 64

# vLLM's lower bound for a bias on a logit: below any token that it could be drawn beside.
NEVER = -100.0


# Log-probs of drawn tokens: vLLM writes minus infinity as -9999, and rounding may go above 0.
LEAST, MOST = -9000.0, 1e-3


class _Half(Exception):  # noqa: N818 (no error: it is asked for again)
    """An answer that is no rollout, though it came with status 200."""


class VllmSampler:
    """Draws rollouts from one or more vLLM servers that were started by `vllm_worker`."""

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        num_tokens: int,
        num_rows: int,
        *,
        api_key: str | None = None,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """Keep where the servers are and how to read them; nothing is asked yet.

        Args:
            urls: Addresses up to and with "/v1"; all were started with the student's model.
            tokenizer: The student's; used to decode alone.
            stop_ids: Token ids that end a rollout.
            num_tokens: Size of the vocabulary that may be drawn; ids from here on never are.
            num_rows: Rows of the student's output head, at least `num_tokens`.
            api_key: Sent with every request.
            timeout_s: Seconds to wait for one answer.
            patience_s: Seconds without any answer after which the servers are given up.

        Raises:
            ConfigError: An address is none.
        """
        self.endpoint = Endpoint(
            urls,
            api_key=api_key,
            timeout_s=timeout_s,
            patience_s=patience_s,
            max_in_flight=IN_FLIGHT * len(urls),
            name="rollout.url",
            # A run is often resumed together with its servers, which take minutes to start.
            start_patience_s=patience_s,
        )
        self.roots = [root_of(url) for url in self.endpoint.urls]
        self.tokenizer = tokenizer
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        # Whether a server was started anew during the last call of `sample`, and got its weights.
        self.has_reloaded = False
        self._folder, self._tag = Path(), ""

    def examine(self, longest: int) -> str:
        """Look at the servers before any weights are sent, waiting for those that still start.

        Args:
            longest: Tokens of the longest prompt and its rollout.

        Returns:
            The type in which they hold weights, such as "bfloat16".

        Raises:
            ModelError: One was started in another way or with another model.
            ConfigError: One reads shorter sequences, or they hold weights in different types.
            ServerError: One does not answer.
        """
        dtypes: set[str] = set()
        for root in self.roots:
            self.endpoint.get("/health", url=root)
            try:
                self._require_extension(root)
                (about, *_) = self._rpc(root, "stableopd_about", [], is_patient=False)
                num_rows = _whole(at(about, "num_tokens"), "num_tokens")
                context = _whole(at(about, "context"), "context")
                logprobs = words(at(about, "logprobs"), "logprobs")
                dtype = words(at(about, "dtype"), "dtype")
            except (ServerError, AnswerError) as error:
                raise ModelError(
                    f"rollout.url: the server at {root} cannot take new weights ({error}); start "
                    f"it with {START}."
                ) from None
            if num_rows != self.num_rows:
                raise ModelError(
                    f"rollout.url: the server at {root} runs a model with {num_rows} token ids, "
                    f"but the student has {self.num_rows}: it is another model; start it with the "
                    "student's."
                )
            if logprobs != "processed_logprobs":
                raise ModelError(
                    f"rollout.url: the server at {root} gives log-probs as "
                    f"{self.endpoint.told(logprobs, 40)}, not of the distribution that it draws "
                    "from; start it with --logprobs-mode=processed_logprobs."
                )
            if context < longest:
                raise ConfigError(
                    f"rollout.url: the server at {root} reads {context} tokens, but prompts and "
                    f"their rollouts have up to {longest}; start it with --max-model-len {longest}."
                )
            dtypes.add(dtype)
        if len(dtypes) > 1:
            told = self.endpoint.told(", ".join(sorted(dtypes)))
            raise ConfigError(
                f"rollout.url: the servers hold weights as {told}; start all of them with one "
                "--dtype."
            )
        return dtypes.pop()

    def _require_extension(self, root: str) -> None:
        """Find our methods without a call of one: vLLM 0.32 ends when a method is missing."""
        path = "/server_info?config_format=json"
        settings = self.endpoint.get(path, root, is_patient=False)
        name = at(settings, "vllm_config", "parallel_config", "worker_extension_cls")
        if not isinstance(name, str) or not name.endswith(EXTENSION):
            raise ServerError(f"its worker extension is {self.endpoint.told(name, 80)!r}")

    def load(self, folder: Path) -> None:
        """Have every server take the weights of a folder, which must stay until the next call.

        Args:
            folder: Holds safetensors; the servers read it under the same path.

        Raises:
            ServerError: One does not answer, or could not load them.
        """
        self._folder, self._tag = folder.resolve(), uuid.uuid4().hex
        self._load()

    def _load(self) -> None:
        for root in self.roots:
            for told in self._rpc(root, "stableopd_load", [str(self._folder), self._tag]):
                if told.get("tag") != self._tag:
                    why = self.endpoint.told(told.get("error", told))
                    raise ServerError(
                        f"rollout.url: the server at {root} could not load the weights in "
                        f"{self._folder} ({why}); it must read that folder under the same path: "
                        "see rollout.weights_dir."
                    )

    def token_logps(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """What each server says of given tokens.

        Args:
            sequences: Token ids, at least two in each.

        Returns:
            For each server and sequence the log-probs of all tokens but the first, in nats, at
            temperature 1 over the whole vocabulary.

        Raises:
            ServerError: A server does not answer, or not with log-probs.
        """
        return [[self._score(url, ids) for ids in sequences] for url in self.endpoint.urls]

    def _score(self, url: str, ids: Sequence[int]) -> list[float]:
        body = {
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
            "cache_salt": self._tag,
        }
        answer = self.endpoint.post("/completions", body, url, most_bytes=answer_bytes(len(ids)))
        try:
            rows = listed(at(answer, "choices", 0, "prompt_logprobs"), "prompt_logprobs")
            if len(rows) != len(ids):
                raise AnswerError(f"is about {len(rows)} of {len(ids)} tokens")
            pairs = list(zip(rows, ids, strict=True))[1:]
            return [number(at(row, str(i), "logprob"), "a log-prob") for row, i in pairs]
        except AnswerError as error:
            raise ServerError(
                f"rollout.url: the server at {url} gives no log-probs of the tokens of a prompt "
                f"(prompt_logprobs): its answer {error}; so its weights cannot be checked."
            ) from None

    def sample(
        self,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]:
        """Write `num_per_prompt` completions of every prompt, as the sampler in this process does.

        Each prompt has a seed of its own, from `seed` and its place: the same call draws the same
        again, but for what rounding does where servers batch requests in another way.

        Args:
            prompts: Pairs of a prompt's id and its token ids.
            num_per_prompt: Rollouts of each prompt.
            settings: Length budget, temperature, top-p and top-k.
            seed: Seed of all draws of this call.

        Returns:
            The rollouts, prompt by prompt; those of one prompt are adjacent.

        Raises:
            DataError: A prompt has no token.
            ModelError: A server writes ids that the student has not, or stops where it should not.
            ServerError: The servers do not answer, or not with rollouts.
        """
        require_tokens(prompts)
        self.has_reloaded = False
        for _ in range(MAX_TRIES):
            bodies = [
                self._body(prompt_ids, num_per_prompt, settings, f"{seed} {place}")
                for place, (_, prompt_ids) in enumerate(prompts)
            ]
            drawn = self._draw(bodies)
            # The tags come last: a server that has it now had it all the time.
            if all(self._is_current(root) for root in self.roots):
                return [
                    as_rollout(prompt, ids, logps, settings, self.tokenizer, self.stop_ids)
                    for prompt, rows in zip(prompts, drawn, strict=True)
                    for ids, logps in rows
                ]
            self._load()
            self.has_reloaded = True
        raise ServerError(
            f"rollout.url: a server was started anew during each of {MAX_TRIES} attempts to draw "
            "rollouts; see its log for what ends it, and go on with --resume."
        )

    def _is_current(self, root: str) -> bool:
        return all(told.get("tag") == self._tag for told in self._rpc(root, "stableopd_about", []))

    def _body(
        self, prompt_ids: Sequence[int], n: int, settings: SamplingSettings, seed: str
    ) -> dict[str, Any]:
        """A request that leaves nothing to the server's or the model's defaults."""
        body = {
            "prompt": list(prompt_ids),
            "n": n,
            # vLLM adds a rollout's number to it.
            "seed": int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,  # the model's own end is one of ours, or none
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # What older weights made of a prompt stays in the cache under another name.
            "cache_salt": self._tag,
        }
        if self.num_tokens < self.num_rows:
            outside = range(self.num_tokens, self.num_rows)
            body["logit_bias"] = {str(i): NEVER for i in outside}
        return body

    def _draw(self, bodies: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Ids and log-probs of the rollouts of each request; asks anew for what is none."""
        found: dict[int, list[tuple[list[int], list[float]]]] = {}
        reason = ""
        for _ in range(MAX_TRIES):
            open_ = [place for place in range(len(bodies)) if place not in found]
            asked = [bodies[place] for place in open_]
            sizes = [answer_bytes(body["n"] * body["max_tokens"]) for body in asked]
            answers = self.endpoint.post_all("/completions", asked, most_bytes=sizes)
            for place, answer in zip(open_, answers, strict=True):
                try:
                    found[place] = self._read(answer, bodies[place])
                except _Half as half:
                    reason = str(half)
            if len(found) == len(bodies):
                return [found[place] for place in range(len(bodies))]
        raise ServerError(
            f"rollout.url: {len(bodies) - len(found)} of {len(bodies)} answers are no rollouts "
            f"({reason}), also when asked for {MAX_TRIES} times; see the server's log."
        )

    def _read(
        self, answer: dict[str, Any], body: dict[str, Any]
    ) -> list[tuple[list[int], list[float]]]:
        try:
            choices = listed(at(answer, "choices"), "choices")
            if len(choices) != body["n"]:
                raise _Half("another number of completions than was asked for")
            by_index = {_whole(at(choice, "index"), "index"): choice for choice in choices}
            if sorted(by_index) != list(range(body["n"])):
                raise _Half("completions with other numbers than 0 to n - 1")
            return [self._read_choice(by_index[i], body["max_tokens"]) for i in sorted(by_index)]
        except AnswerError as error:
            raise _Half(f"an answer {error}") from None

    def _read_choice(self, choice: dict[str, Any], budget: int) -> tuple[list[int], list[float]]:
        ids = [_whole(i, "a token id") for i in listed(at(choice, "token_ids"), "token_ids")]
        found = listed(at(choice, "logprobs", "token_logprobs"), "token_logprobs")
        logps = [number(x, "a log-prob") for x in found]
        reason = words(at(choice, "finish_reason"), "finish_reason")
        if reason not in ("stop", "length"):
            raise _Half(f"finish_reason {self.endpoint.told(reason, 40)!r}")
        if not ids or len(ids) != len(logps):
            raise _Half(f"{len(ids)} token ids and {len(logps)} log-probs")
        above = next((x for x in logps if not LEAST < x <= MOST), None)
        if above is not None:
            raise _Half(f"a log-prob of {above:g}")
        wrong = next((i for i in ids if not 0 <= i < self.num_tokens), None)
        if wrong is not None:
            raise ModelError(
                f"rollout.url: the server wrote token id {wrong}, but the models share "
                f"{self.num_tokens} ids: it runs another model or vocabulary; start it with the "
                "student's."
            )
        stops = [place for place, i in enumerate(ids) if i in self.stop_ids]
        is_cut = reason == "length" and len(ids) == budget and not stops
        if is_cut or stops == [len(ids) - 1]:
            return ids, [min(x, 0.0) for x in logps]
        raise ModelError(
            f"rollout.url: the server ended a completion of {len(ids)} tokens of {budget} by "
            f"{reason!r} at id {ids[-1]}, which is not how it was told to stop "
            f"(ids {list(self.stop_ids)}); start it with {START}."
        )

    def _rpc(
        self, root: str, method: str, arguments: list[str], *, is_patient: bool = True
    ) -> list[dict[str, Any]]:
        """Call a method of every worker of a server."""
        body = {"method": method, "args": arguments, "timeout": self.endpoint.timeout_s}
        answer = self.endpoint.post("/collective_rpc", body, root, is_patient=is_patient)
        try:
            results = listed(at(answer, "results"), "results")
            if results:
                return [table(result, "a result") for result in results]
            raise AnswerError("has no result")
        except AnswerError as error:
            raise ServerError(
                f"rollout.url: the answer of {root}/collective_rpc {error}: "
                f"{self.endpoint.told(answer, 200)}"
            ) from None


def _whole(value: Any, what: str) -> int:
    if type(value) is not int:
        raise AnswerError(f"has no whole number as {what}")
    return value
