"""Teachers that are served: log-probs of given tokens from an OpenAI-style completions endpoint.

A request sends the token ids of prompt and completion, and asks for the log-prob of each of them
(`prompt_logprobs`, which vLLM has). A server says what tokens got and not what "stop" got, so where
a completion holds a stop it is asked again with each other stop id in that place, and the sum is
taken here. All requests of a call are under way together, as many as the endpoint allows.

Left out: the teacher's entropy and everything else that needs its whole distribution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableopd.endpoint import Endpoint
from stableopd.types import ModelError, ServerError

__all__ = ["Item", "Judged", "ServedTeacher", "ServedTeachers", "find_model"]

# Token ids of a prompt and of its completion.
Item = tuple[Sequence[int], Sequence[int]]

# vLLM writes minus infinity, which JSON has no word for, as -9999.
LEAST = -9000.0
# Log-probs of nearly certain tokens may come out this far above 0 by rounding.
MOST = 1e-3


@dataclass(frozen=True, slots=True)
class Judged:
    """What a served teacher says of the T tokens of a completion, in nats.

    Attributes:
        logps: (T,) log-prob of each token, of the stop event where it is a stop.
        top_ids: (T, K) its likeliest ids at each position; None where they were not asked for.
        top_logps: (T, K) their log-probs.
    """

    logps: tuple[float, ...]
    top_ids: NDArray[np.int64] | None = None
    top_logps: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class ServedTeacher:
    """One teacher behind an endpoint.

    Attributes:
        endpoint: Its replicas.
        model: Its name there.
        event_ids: Ids whose log-probs are added up at a stop; empty scores a stop as its one id.
        top_k: Likeliest ids to ask for at each position; 0 asks for the tokens themselves alone.
    """

    endpoint: Endpoint
    model: str
    event_ids: tuple[int, ...] = ()
    top_k: int = 0

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """Score completions.

        Args:
            items: Prompts of one token or more, each with its completion.

        Returns:
            What the teacher says of each.

        Raises:
            ServerError: It does not answer, or not with log-probs of these tokens.
        """
        whole = [[*prompt, *completion] for prompt, completion in items]
        # (item, place in its completion): the sequence up to there with another stop at its end.
        endings = [
            (number, place, [*whole[number][: len(prompt) + place], other])
            for number, (prompt, completion) in enumerate(items)
            for place, token in enumerate(completion)
            if token in self.event_ids
            for other in self.event_ids
            if other != token
        ]
        bodies = [self.body(ids, self.top_k) for ids in whole]
        bodies += [self.body(ids, 0) for _, _, ids in endings]

        def read(place: int, answer: dict[str, Any]) -> Judged:
            if place < len(whole):
                return self._judged(answer, whole[place], len(items[place][0]))
            ids = endings[place - len(whole)][2]
            return self._judged(answer, ids, len(ids) - 1, is_ending=True)

        judged = self.endpoint.post_all("/completions", bodies, read)
        logps = [list(one.logps) for one in judged[: len(whole)]]
        for (number, place, _), other in zip(endings, judged[len(whole) :], strict=True):
            logps[number][place] = _logaddexp(logps[number][place], other.logps[0])
        return [
            dataclasses.replace(one, logps=tuple(values))
            for one, values in zip(judged, logps, strict=False)
        ]

    def body(self, prompt: Sequence[int] | str, top_k: int) -> dict[str, Any]:
        """What is sent for one sequence, token ids or text."""
        return {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top_k,
        }

    def entries(self, answer: Mapping[str, Any], ids: Sequence[int] | None) -> list[Any]:
        """What an answer says of each token of a sequence; of its first token it is None.

        Args:
            answer: As it came.
            ids: What was sent; None where it was text.

        Returns:
            For each token, what is said by token id.

        Raises:
            ServerError: There is nothing of the kind in the answer, or of another length.
        """
        try:
            found = answer["choices"][0]["prompt_logprobs"]
        except (LookupError, TypeError):
            found = None
        if not isinstance(found, list):
            raise ServerError(
                f"{self.endpoint.name}: the answers of {self.endpoint.urls[0]} have no "
                "prompt_logprobs; serve the teacher with vLLM, or another server that has them."
            )
        if ids is not None and len(found) != len(ids):
            raise ServerError(
                f"{self.endpoint.name}: {self.endpoint.urls[0]} scored {len(found)} of the "
                f"{len(ids)} tokens that were sent; it must not cut prompts off."
            )
        return found

    def entry(self, entry: Any, token: int) -> float:
        """The log-prob of a token in what an answer says of its position.

        Args:
            entry: One of `entries`.
            token: The token that was sent.

        Returns:
            Nats.

        Raises:
            ServerError: There is none, or it is no log-prob.
        """
        try:
            value = float(entry[str(token)]["logprob"])
        except (LookupError, TypeError, ValueError):
            raise ServerError(
                f"{self.endpoint.name}: {self.endpoint.urls[0]} gave no log-prob of token {token}, "
                "which was sent to it; it must serve prompt_logprobs by token id."
            ) from None
        return self._checked(value)

    def _checked(self, value: float) -> float:
        if not LEAST < value <= MOST:  # written so that nan fails as well
            raise ServerError(
                f"{self.endpoint.name}: {self.endpoint.urls[0]} gave {value:g} as a log-prob, "
                "which is none or not finite; check its weights, and that it was not started with "
                "a --logprobs-mode of logits."
            )
        return min(value, 0.0)

    def _judged(
        self, answer: Mapping[str, Any], ids: Sequence[int], start: int, is_ending: bool = False
    ) -> Judged:
        """What an answer says of the tokens from a place on."""
        entries = self.entries(answer, ids)[start:]
        logps = tuple(
            self.entry(entry, token) for entry, token in zip(entries, ids[start:], strict=True)
        )
        if not self.top_k or is_ending:
            return Judged(logps)
        rows = [self._top(entry) for entry in entries]
        return Judged(
            logps,
            np.array([[token for _, token in row] for row in rows], dtype=np.int64),
            np.array([[-cost for cost, _ in row] for row in rows], dtype=np.float32),
        )

    def _top(self, entry: Mapping[str, Any]) -> list[tuple[float, int]]:
        """Minus the log-prob, and the id, of the likeliest tokens of a position."""
        try:
            found = sorted((-float(x["logprob"]), int(token)) for token, x in entry.items())
        except (LookupError, TypeError, ValueError):
            found = []
        if len(found) < self.top_k:
            raise ServerError(
                f"{self.endpoint.name}: {self.endpoint.urls[0]} gave {len(found)} of the "
                f"{self.top_k} likeliest tokens that were asked for; start it with --max-logprobs "
                f"{self.top_k} or more."
            )
        # Unlike that of a token that was drawn, the log-prob of one of these may be -inf.
        return found[: self.top_k]


@dataclass(frozen=True)
class ServedTeachers:
    """The default teacher, None, and others by their names."""

    by_name: Mapping[str | None, ServedTeacher]

    def judge(self, items: Sequence[tuple[str | None, Item]]) -> list[Judged]:
        """Score completions, each by its own teacher; all teachers work at the same time.

        Args:
            items: Names of teachers, each with a prompt and its completion.

        Returns:
            What its teacher says of each.

        Raises:
            ServerError: As `ServedTeacher.judge`.
        """
        places: dict[str | None, list[int]] = {}
        for place, (name, _) in enumerate(items):
            places.setdefault(name, []).append(place)
        judged: dict[int, Judged] = {}
        with ThreadPoolExecutor(max(1, len(places))) as workers:
            tasks = {
                name: workers.submit(self.by_name[name].judge, [items[i][1] for i in mine])
                for name, mine in places.items()
            }
            for name, task in tasks.items():
                judged.update(zip(places[name], task.result(), strict=True))
        return [judged[place] for place in range(len(items))]


def _logaddexp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return min(0.0, high + math.log1p(math.exp(low - high)))


def find_model(endpoint: Endpoint, wanted: str) -> tuple[str, int | None]:
    """The name of the model that all replicas serve, and the longest sequence that it scores.

    Args:
        endpoint: The replicas.
        wanted: The name that it must have; "" takes the only one.

    Returns:
        The name, and the number of tokens; None where the server does not say it.

    Raises:
        ModelError: A replica does not serve it, or serves several and none is wanted.
    """
    contexts: list[int] = []
    name = wanted
    for url in endpoint.urls:
        data = endpoint.get("/models", url).get("data")
        cards = [card for card in data if card.get("id")] if isinstance(data, list) else []
        # An adapter names its base as its parent, and another name of a model shares its root.
        bases = [card for card in cards if not card.get("parent")]
        names = [str(card["id"]) for card in cards]
        if not name and len({str(card.get("root") or card["id"]) for card in bases}) == 1:
            name = str(bases[0]["id"])
        if not name or (names and name not in names):
            served = ", ".join(map(repr, names)) or "no model"
            asked = f", not {name!r}" if name else ""
            raise ModelError(
                f"{endpoint.name}: {url} serves {served}{asked}; give the name of one of these "
                "as teacher.model, or serve one model at the address of a further teacher."
            )
        # One token is generated, as servers want that.
        lengths = [card.get("max_model_len") for card in cards if card["id"] == name]
        contexts += [length - 1 for length in lengths if isinstance(length, int)]
    return name, min(contexts, default=None)
