"""What every room shares: prompts, rollouts, scores, batches, and the errors.

Legend of shapes, used as suffixes of tensor names in the whole package:

    B  sequences in a (micro-)batch          T  positions of a padded sequence
    N  tokens picked out of a batch          V  entries of the vocabulary
    D  width of the hidden states            K  size of a top-k support
    E  stop ids that make up the stop event

`logp` is always a natural-log probability in nats; a `logp_NV` is normalised over V.

The error tree; the command line prints each as one line and exits with code 2:

    StableOPDError
    |-- ConfigError       a setting is unknown, impossible, or contradicts another
    |-- DataError         a file, line or column of the data cannot be used
    |-- ModelError        a model or tokenizer cannot be loaded, or does not fit the other
    |-- RunFolderError    the run folder is taken, not writable, or not a run folder
    `-- TrainingError     a number that must be finite is not, or a teacher broke
        `-- ServerError   a server of teachers or rollouts does not answer as it must
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "ConfigError",
    "DataError",
    "Message",
    "ModelError",
    "Prefix",
    "Prompt",
    "Record",
    "Rollout",
    "RunFolderError",
    "SamplingSettings",
    "Scores",
    "Sequence",
    "ServerError",
    "StableOPDError",
    "StopReason",
    "TrainingError",
]


class StableOPDError(Exception):
    """Base of every error that a user can cause and mend.

    Attributes:
        is_shared: Whether every process of a run raises it, so that one is enough to tell it.
    """

    is_shared = False


class ConfigError(StableOPDError):
    """A setting is unknown, impossible, or contradicts another."""


class DataError(StableOPDError):
    """A file, line or column of the data cannot be used."""


class ModelError(StableOPDError):
    """A model or tokenizer cannot be loaded, or does not fit the other."""


class RunFolderError(StableOPDError):
    """The run folder is taken, not writable, or not a run folder."""


class TrainingError(StableOPDError):
    """A number that must be finite is not, or a teacher broke."""


class ServerError(TrainingError):
    """A server of teachers or rollouts does not answer, or not as it must.

    The step in which it is raised has trained nothing: the student is that of the last step.
    """


class StopReason(StrEnum):
    """Why a rollout ended. Being cut off is a fact about it, not a guess from its length."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, repr=False)
class Message:
    """One turn of a chat.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: Its text; "" where it only calls tools.
        more: What else it holds (`tool_calls`, `tool_call_id`, `name`, `reasoning_content`), as
            the text of a JSON object; "" where there is nothing.
    """

    role: str
    content: str
    more: str = ""

    def __repr__(self) -> str:
        """The same as ever for a message that is but a text: fingerprints are made of it."""
        more = f", more={self.more!r}" if self.more else ""
        return f"Message(role={self.role!r}, content={self.content!r}{more})"

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates and servers take it."""
        more: dict[str, Any] = json.loads(self.more) if self.more else {}
        return {"role": self.role, "content": self.content, **more}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem.

    Attributes:
        id: Unique within its data set; its place in the file where the data gives none.
        prompt: Plain text, or the messages of a chat.
        solution: The golden completion, without a stop token; None where the data has none.
        answer: What is graded; None where the data has none.
        teacher: Name of the teacher that scores it; None for the default.
        tools: Descriptions of tools for the chat template, as a JSON list; "" without any.
    """

    id: str
    prompt: str | tuple[Message, ...]
    solution: str | None = None
    answer: str | None = None
    teacher: str | None = None
    tools: str = ""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a rollout is drawn. `top_p` 1 and `top_k` 0 mean the whole distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion that the student wrote, as the sampler saw it.

    Attributes:
        prompt_id: `Prompt.id` of the problem.
        prompt_ids: Token ids of the prompt, as the model read it.
        completion_ids: Token ids of the completion; the stop token, if one came, is the last.
        completion: The completion as text, without special tokens.
        stop_reason: Whether a stop token came or the budget ran out.
        sampler_logps: One per completion token, in nats, from the distribution drawn from.
        settings: The settings that it was drawn with.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    completion: str
    stop_reason: StopReason
    sampler_logps: tuple[float, ...]
    settings: SamplingSettings


@dataclass(frozen=True, slots=True)
class Record:
    """A rollout as it stands in a file of any framework; None where the file does not say.

    Attributes:
        source: The file.
        line: Its line or row there, from 1.
        completion: The completion as text.
        prompt: The prompt as text; "" where the file has none.
        prompt_id: What tells the prompt from others; "" where the file has none.
        step: The optimizer step.
        completion_ids: (T,) token ids of the completion.
        num_tokens: T, also where it is known without the ids.
        stop_reason: Why it ended.
        student_logps: (T,) log-probs of the tokens under the student, in nats.
        teacher_logps: (T,) the same under the teacher.
        advantages: (T,) what the framework trained with, where it differs from the log-ratio.
        correct: Whether the answer was graded correct.
        score: The framework's own score or reward.
    """

    source: str
    line: int
    completion: str
    prompt: str = ""
    prompt_id: str = ""
    step: int | None = None
    completion_ids: NDArray[np.int64] | None = None
    num_tokens: int | None = None
    stop_reason: StopReason | None = None
    student_logps: NDArray[np.float64] | None = None
    teacher_logps: NDArray[np.float64] | None = None
    advantages: NDArray[np.float64] | None = None
    correct: bool | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt and its completion as token ids, ready to be trained on.

    Attributes:
        prompt_ids: Token ids that are read but never trained on.
        completion_ids: Token ids that are trained on.
        is_golden: True for a golden solution, False for a rollout.
        index: Place among the rollouts (or golden solutions) of the step.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    is_golden: bool
    index: int

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Prefix:
    """The sequences of a batch, parted into prompts, each of them once, and completions.

    Attributes:
        prompt_ids_PT: Token ids of the P prompts, padded on the right.
        prompt_mask_PT: 1 at real tokens, 0 at padding.
        prompt_B: Which prompt stands before each row of the batch.
        input_ids_BC: Completions without their last token, which predicts nothing; padded on the
            right.
        mask_BC: 1 at real tokens, 0 at padding.
    """

    prompt_ids_PT: torch.Tensor
    prompt_mask_PT: torch.Tensor
    prompt_B: torch.Tensor
    input_ids_BC: torch.Tensor
    mask_BC: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch of whole sequences, padded on the right.

    Attributes:
        sequences: The sequences, in the order of the rows.
        input_ids_BT: Token ids; padding is the pad id.
        attention_mask_BT: 1 at real tokens, 0 at padding.
        row_N: Row of each completion token, row by row and in order within a row.
        index_N: Place of that token in its completion, from 0.
        position_N: Position whose hidden state predicts that token (the one before it).
        target_N: Id of that token.
        prefix: The same with every prompt once; None where that spares little.
    """

    sequences: tuple[Sequence, ...]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    row_N: torch.Tensor
    index_N: torch.Tensor
    position_N: torch.Tensor
    target_N: torch.Tensor
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Scores:
    """What one model says of the N completion tokens of a batch.

    Attributes:
        logp_N: Log-prob of each token (of the stop event where the token is a stop); carries the
            gradient of the model that was scored with one.
        entropy_N: Entropy of the distribution at that position, in nats; no gradient.
        stop_logp_N: Log-prob of the stop event at that position; no gradient.
        comparisons: In `others`, one (N,) tensor for each way in which the scored model was
            compared with this one.
        others: The same of each model that was scored beside this one.
    """

    logp_N: torch.Tensor
    entropy_N: torch.Tensor
    stop_logp_N: torch.Tensor
    comparisons: tuple[torch.Tensor, ...] = ()
    others: tuple[Scores, ...] = ()
