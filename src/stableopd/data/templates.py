"""Chat templates: which one a tokenizer uses, and how one is run.

A template is a program from a model folder. transformers runs it in a sandbox without files and
network; here it gets a deadline and a largest output as well.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stableopd.config_templates import read_template
from stableopd.text import one_line
from stableopd.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["give_template", "is_templated", "run_template"]

T = TypeVar("T")

# Design: a template of a published model takes milliseconds.
SECONDS = 10.0
MAX_CHARS = 2**24


def give_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Put the template of a file in the place of the tokenizer's own.

    Args:
        tokenizer: Is changed, and then saved with that template.
        setting: "auto" and "none" leave it as it is; else the path of a file.

    Raises:
        ConfigError: The file cannot be read.
    """
    if text := read_template(setting):
        tokenizer.chat_template = text


def is_templated(tokenizer: PreTrainedTokenizerBase, setting: str) -> bool:
    """Whether prompts go through a chat template.

    Args:
        tokenizer: The tokenizer.
        setting: "auto", "none" or the path of a file, which the tokenizer has been given.
    """
    return setting != "none" and bool(tokenizer.chat_template)


def run_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
    where: str,
    has_generation_prompt: bool = True,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a template.
        messages: Role, content and what else the template reads.
        kwargs: Further variables of the template, and arguments such as `tools`.
        where: Names the prompt, for messages.
        has_generation_prompt: Whether the text ends where the assistant's answer begins.

    Returns:
        The text.

    Raises:
        DataError: The template fails, takes more than `SECONDS` or writes more than `MAX_CHARS`.
    """
    try:
        made = _WATCHDOG.within(
            SECONDS,
            lambda: tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=has_generation_prompt,
                **kwargs,
            ),
        )
    except TimeoutError:
        raise DataError(
            f"{where}: the tokenizer's chat template was stopped after {SECONDS:g} s; it may loop "
            "for ever: use another template."
        ) from None
    except Exception as error:
        # A template is a program: it may raise anything.
        raise DataError(
            f"{where}: the tokenizer's chat template refuses its messages ({one_line(error)})."
        ) from None
    text = str(made)
    if len(text) > MAX_CHARS:
        raise DataError(
            f"{where}: the tokenizer's chat template writes {len(text)} characters; use another "
            "template."
        )
    return text


class _LateError(BaseException):
    """The time is over; no `except Exception` on the way keeps it."""


class _Watchdog:
    """Ends calls that take too long, in whichever thread they run; rests in between."""

    INTERVAL_S, IDLE_S, ARRIVAL_S = 0.1, 5.0, 0.1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}
        self._is_running = False

    def within(self, seconds: float, call: Callable[[], T]) -> T:
        """What `call` returns; TimeoutError where its Python code takes longer."""
        ident = threading.get_ident()
        with self._lock:
            self._ends[ident] = time.monotonic() + seconds
            if not self._is_running:
                # A thread for each call would take longer than most templates.
                self._is_running = True
                threading.Thread(target=self._run, daemon=True).start()
        try:
            try:
                return call()
            finally:
                with self._lock:
                    is_late = self._ends.pop(ident, None) is None
                if is_late and not isinstance(sys.exc_info()[1], _LateError):
                    # It is on its way, and must not arrive further up; or the call kept it.
                    time.sleep(self.ARRIVAL_S)
                    raise _LateError
        except _LateError:
            raise TimeoutError from None

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(self.INTERVAL_S)
            now = time.monotonic()
            with self._lock:
                for ident in [ident for ident, end in self._ends.items() if end < now]:
                    del self._ends[ident]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(ident), ctypes.py_object(_LateError)
                    )
                last = now if self._ends else last
                if now - last > self.IDLE_S:
                    self._is_running = False
                    return


_WATCHDOG = _Watchdog()
