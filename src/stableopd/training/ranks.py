"""The processes of a run: how they share the work, tell each other, and end together.

Every process holds the whole batch of a step, which is small (token ids and numbers), and scores
its share. So whatever is counted over the batch, such as what a loss is divided by, is the same
number everywhere, known before the backward pass. With one process all of this is the identity.

An error that one process alone would raise must not leave the others waiting for it: what may fail
goes through `together`, `spread` or `on_main`, after which all processes raise the same error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stableopd.types import ConfigError, Sequence, StableOPDError, TrainingError

__all__ = ["ALONE", "Ranks", "shared"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared(error: StableOPDError) -> StableOPDError:
    """Mark an error that every process raises, so that one of them is enough to tell it.

    Args:
        error: The error.

    Returns:
        The same error.
    """
    error.is_shared = True
    return error


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. All methods but `share` are called by all of them.

    Attributes:
        rank: Place of this process, from 0; process 0 is the main one.
        num: Number of processes.
        shards: Whether the weights are sharded, so that a forward or backward pass is an exchange
            in which every process must take part.
    """

    rank: int = 0
    num: int = 1
    shards: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process decides, writes the run folder and talks to the user."""
        return self.rank == 0

    def gather(self, value: Item) -> list[Item]:
        """The value of every process, in their order."""
        if self.num == 1:
            return [value]
        values: list[Any] = [None] * self.num
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """Call a function in every process, and go on in all of them or in none.

        Args:
            function: It exchanges nothing, and may raise in some processes and not in others.

        Returns:
            What it returned in this process.

        Raises:
            StableOPDError: The first error of its kind; every process raises it.
        """
        if self.num == 1:
            return function()
        result, error = _outcome(function)
        for rank, found in enumerate(self.gather(error)):
            if found is not None:
                told = f"process {rank} of {self.num}: {found}" if rank else str(found)
                raise shared(type(found)(told))
        return result

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function in the main process alone, and give all what it returned.

        Args:
            function: Decides or writes something.

        Returns:
            Its result.

        Raises:
            StableOPDError: What it raised; every process raises it.
        """
        if self.num == 1:
            return function()
        box: list[Any] = [_outcome(function) if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        result, error = box[0]
        if error is not None:
            raise shared(error)
        return result

    def spread(
        self, items: Many[Item], function: Callable[[Many[Item]], list[Result]]
    ) -> list[Result]:
        """Let every process do a block of neighbouring items.

        Args:
            items: The same in every process. Some get none where there are too few.
            function: Takes some items and gives a list.

        Returns:
            All lists joined, in the order of the items.

        Raises:
            StableOPDError: The first error of its kind; every process raises it.
        """
        start, end = (place * len(items) // self.num for place in (self.rank, self.rank + 1))
        parts = self.gather(self.together(lambda: function(items[start:end])))
        return [result for part in parts for result in part]

    def share(self, sequences: Many[Sequence]) -> list[Sequence]:
        """The sequences of a step that this process scores, dealt out by length.

        Args:
            sequences: All sequences.

        Returns:
            Every `num`-th, longest first, so that all have about the same work.
        """
        return sorted(sequences, key=lambda s: (-len(s), s.index))[self.rank :: self.num]

    def num_idle(self, num_passes: int) -> int:
        """How many passes that count nothing this process must make to keep step with the others.

        Args:
            num_passes: Passes that it has to make.

        Returns:
            A number; 0 unless the weights are sharded.
        """
        return max(self.gather(num_passes)) - num_passes if self.shards else 0

    def sum_gradients(self, parameters: Many[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place.

        Every share of the loss is divided by counts of the whole step already, so that the sum, and
        not the mean, is the gradient. It is taken once a step, after the last micro-batch, and not
        by DDP's hooks: these count on the same passes in every process, and on the forward of the
        wrapped model, while the loss is made of hidden states and the head's weights. Sharded
        gradients are summed in the backward pass (see `sharding.shard`).

        Args:
            parameters: The same in every process. One without a gradient in all of them is left
                without, as the optimizer then passes it over.
        """
        if self.num == 1 or self.shards:
            return
        is_used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        is_used = is_used.to(parameters[0].device)
        dist.all_reduce(is_used, dist.ReduceOp.MAX)
        for parameter, used in zip(parameters, is_used.tolist(), strict=True):
            if used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that have read different things: each would train another student.

        Args:
            facts: What each process has read, by a name for the message.

        Raises:
            ConfigError: A process has another value than the main one.
        """
        mains, *others = self.gather(dict(facts))
        for rank, theirs in enumerate(others, start=1):
            for name, value in mains.items():
                if theirs[name] != value:
                    raise shared(
                        ConfigError(
                            f"process {rank} of {self.num} has read another {name} than the main "
                            "process; give all machines the same files and the same command."
                        )
                    )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the loss of another process into one sentence.

        Raises:
            TrainingError: Another process ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            # Gloo has no class for its errors; all of them name it.
            is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.num == 1 or not is_lost:
                raise
            raise TrainingError(
                f"process {self.rank} of {self.num} has lost another one, which ended or cannot be "
                "reached; what was saved is intact, so start all of them again with --resume."
            ) from error


ALONE = Ranks()  # one process


def _outcome(function: Callable[[], Any]) -> tuple[Any, StableOPDError | None]:
    try:
        return function(), None
    except StableOPDError as error:
        return None, error
