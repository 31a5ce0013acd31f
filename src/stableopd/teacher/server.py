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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableopd.endpoint import (
    AnswerError,
    Endpoint,
    answer_bytes,
    at,
    listed,
    number,
    table,
    words,
)
from stableopd.types import ModelError, ServerError

__all__ = ["Item", "Judged", "ServedTeacher", "ServedTeachers", "find_model"]

# Token ids of a prompt and of its completion.
Item = tuple[Sequence[int], Sequence[int]]

# Mean difference of log-probs in nats that is no rounding (design): bfloat16 on different batches
# moves single log-probs by some 0.01, and advantages are about 0.1 a token.
TOLERANCE = 0.05

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
        num_tokens: Size of the vocabulary that student and teacher share; None where it is not
            known.
        probes: Token ids and what each replica said of them at the start, by its address; filled
            by `remember`. Empty compares nothing later.
    """

    endpoint: Endpoint
    model: str
    event_ids: tuple[int, ...] = ()
    top_k: int = 0
    num_tokens: int | None = None
    probes: dict[str, tuple[list[int], list[float]]] = field(
        default_factory=dict[str, tuple[list[int], list[float]]]
    )

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """Score completions, then compare what replicas say of their probes with the start.

        Args:
            items: Prompts of one token or more, each with its completion.

        Returns:
            What the teacher says of each.

        Raises:
            ServerError: It does not answer, or not with log-probs of these tokens; or a replica
                has other weights than at the start.
        """
        whole = [[*prompt, *completion] for prompt, completion in items]
        # (item, place in its completion): the sequence up to there with another stop at its end.
        endings = [
            (row, place, [*whole[row][: len(prompt) + place], other])
            for row, (prompt, completion) in enumerate(items)
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

        sizes = [answer_bytes(len(ids), self.top_k) for ids in whole]
        sizes += [answer_bytes(len(ids)) for _, _, ids in endings]
        judged = self.endpoint.post_all("/completions", bodies, read, most_bytes=sizes)
        # Behind the scores: had it changed before them, or among them, it shows now.
        self.require_unchanged()
        logps = [list(one.logps) for one in judged[: len(whole)]]
        for (row, place, _), other in zip(endings, judged[len(whole) :], strict=True):
            logps[row][place] = _logaddexp(logps[row][place], other.logps[0])
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

    def score(
        self, prompt: Sequence[int] | str, url: str, top_k: int = 0, *, is_patient: bool = True
    ) -> dict[str, Any]:
        """Have one replica score one sequence.

        Args:
            prompt: Token ids or text.
            url: The replica.
            top_k: Likeliest ids to ask for at each position.
            is_patient: Whether to ask again where it does not answer.

        Returns:
            The answer, for `entries`.

        Raises:
            ServerError: It does not answer.
        """
        size = answer_bytes(len(prompt), top_k)
        body = self.body(prompt, top_k)
        return self.endpoint.post("/completions", body, url, most_bytes=size, is_patient=is_patient)

    def remember(self, url: str, ids: Sequence[int]) -> list[float]:
        """Have a replica score a probe, and keep what it says, to compare with it later.

        Args:
            url: The replica.
            ids: Two token ids or more.

        Returns:
            The log-probs of all tokens but the first, in nats.

        Raises:
            ServerError: It does not answer, or not with log-probs of these tokens.
        """
        found = self.token_logps(self.score(ids, url), ids)
        self.probes[url] = (list(ids), found)
        return found

    def require_unchanged(self) -> None:
        """Compare what each replica says of its probe with what it said at the start.

        A server that was started again may serve another model under the same name, and none of
        its answers would tell.

        Raises:
            ServerError: A replica says something else, or the only one does not answer.
        """
        is_only = len(self.probes) == 1
        for url, (ids, wanted) in self.probes.items():
            try:
                answer = self.score(ids, url, is_patient=is_only)
            except ServerError:
                if is_only:
                    raise
                continue  # it is asked behind the next scores again, which may need it
            found = self.token_logps(answer, ids)
            gap = sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) / len(wanted)
            if not gap <= TOLERANCE:
                raise ServerError(
                    f"{self.endpoint.name}: {url} scores the same {len(wanted)} tokens otherwise "
                    f"than at the start, by {gap:.3f} nats on average (at most {TOLERANCE} can be "
                    "rounding): another model is served there now; serve the first one again."
                )

    def token_logps(self, answer: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
        """What an answer says of all tokens of a sequence but the first.

        Args:
            answer: As it came.
            ids: What was sent.

        Returns:
            Nats.

        Raises:
            ServerError: It is not about these tokens.
        """
        entries = self.entries(answer, ids)[1:]
        return [self.entry(entry, token) for entry, token in zip(entries, ids[1:], strict=True)]

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
        path = ("choices", 0, "prompt_logprobs")
        try:
            found = listed(at(answer, *path), path[-1])
        except AnswerError:
            raise ServerError(
                f"{self._who}: its answers have no prompt_logprobs; serve the teacher with vLLM, "
                "or another server that has them."
            ) from None
        if ids is not None and len(found) != len(ids):
            raise ServerError(
                f"{self._who} scored {len(found)} of the {len(ids)} tokens that were sent; it "
                "must not cut prompts off."
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
            value = number(at(entry, str(token), "logprob"), "a log-prob")
        except AnswerError as error:
            raise ServerError(
                f"{self._who} gave no log-prob of token {token}, which was sent to it (the answer "
                f"{error}); it must serve prompt_logprobs by token id."
            ) from None
        return self._checked(value, LEAST)

    def text_of(self, entry: Any, token: int) -> str:
        """The text that a token stands for at the server; "" where it does not say it.

        Args:
            entry: One of `entries`.
            token: The token that was sent.

        Returns:
            The text.

        Raises:
            ServerError: It is none.
        """
        try:
            found = table(at(entry, str(token)), "an entry").get("decoded_token")
            return "" if found is None else words(found, "decoded_token")
        except AnswerError as error:
            raise ServerError(f"{self._who}: what it says of token {token} {error}.") from None

    @property
    def _who(self) -> str:
        return f"{self.endpoint.name}: {self.endpoint.urls[0]}"

    def _checked(self, value: float, least: float) -> float:
        if not least < value <= MOST:  # written so that nan fails as well
            raise ServerError(
                f"{self._who} gave {value:g} as a log-prob, which is none or not finite; check "
                "its weights, and that it was not started with a --logprobs-mode of logits."
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
        rows = [self.likeliest(entry) for entry in entries]
        return Judged(
            logps,
            np.array([[token for _, token in row] for row in rows], dtype=np.int64),
            np.array([[-cost for cost, _ in row] for row in rows], dtype=np.float32),
        )

    def likeliest(self, entry: Any) -> list[tuple[float, int]]:
        """Minus the log-prob, and the id, of the `top_k` likeliest tokens of a position.

        Args:
            entry: One of `entries`.

        Returns:
            `top_k` of them, the likeliest first.

        Raises:
            ServerError: There are fewer, or they are none.
        """
        try:
            found = sorted(
                (-self._likely(at(x, "logprob")), self._id(token))
                for token, x in table(entry, "a position").items()
            )
        except AnswerError as error:
            raise ServerError(f"{self._who}: what it says of a position {error}.") from None
        if len(found) < self.top_k:
            raise ServerError(
                f"{self._who} gave {len(found)} of the {self.top_k} likeliest tokens that were "
                f"asked for; start it with --max-logprobs {self.top_k} or more."
            )
        return found[: self.top_k]

    def _likely(self, value: Any) -> float:
        # Unlike that of a token that was drawn, the log-prob of one of these may be -inf.
        found = number(value, "a log-prob")
        return -math.inf if found <= 10 * LEAST else self._checked(found, -math.inf)

    def _id(self, token: str) -> int:
        """A token id that is a key of an object, and stands in the vocabulary."""
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise AnswerError(f"has {self.endpoint.told(token, 40)!r} as a token id")
        found = int(token)
        if str(found) != token or found >= (2**31 if self.num_tokens is None else self.num_tokens):
            models = "" if self.num_tokens is None else f" of the {self.num_tokens} of the student"
            raise AnswerError(
                f"has {token} as a likely token id, which is none{models}; serve a teacher that "
                "shares the student's tokenizer, or leave objective.top_k out"
            )
        return found


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
        ServerError: A replica does not answer, or not with a list of models.
    """
    contexts: list[int] = []
    name = wanted
    for url in endpoint.urls:
        cards = _cards(endpoint, url)
        # An adapter names its base as its parent, and another name of a model shares its root.
        bases = [card for card in cards if not card.get("parent")]
        names = [str(card["id"]) for card in cards]
        if not name and len({str(card.get("root") or card["id"]) for card in bases}) == 1:
            name = str(bases[0]["id"])
        if not name or (names and name not in names):
            served = endpoint.told(", ".join(map(repr, names)) or "no model")
            asked = f", not {name!r}" if name else ""
            raise ModelError(
                f"{endpoint.name}: {url} serves {served}{asked}; give the name of one of these "
                "as teacher.model, or serve one model at the address of a further teacher."
            )
        # One token is generated, as servers want that.
        lengths = [card.get("max_model_len") for card in cards if card["id"] == name]
        contexts += [length - 1 for length in lengths if type(length) is int and length > 1]
    return name, min(contexts, default=None)


def _cards(endpoint: Endpoint, url: str) -> list[dict[str, Any]]:
    """What a replica says of the models that it serves; each has a name."""
    answer = endpoint.get("/models", url)
    try:
        cards = [table(card, "a model") for card in listed(answer.get("data") or [], "data")]
        for card in cards:
            for key in ("id", "root", "parent"):
                if card.get(key) is not None:
                    words(card[key], key)
    except AnswerError as error:
        raise ServerError(f"{endpoint.name}: the list of models of {url} {error}.") from None
    return [card for card in cards if card.get("id")]
