"""On-policy distillation of language models that does not collapse.

Importing this package loads nothing else: a public name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stableopd.config import Config
    from stableopd.config import load as load_config
    from stableopd.diagnose.runs import diagnose_run
    from stableopd.runfolder import RunFolder
    from stableopd.training.loop import train
    from stableopd.training.setup import prepare
    from stableopd.types import Prompt, Rollout, SamplingSettings, StableOPDError, StopReason

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "diagnose_run": "diagnose.runs",
    "load_config": "config:load",
    "Prompt": "types",
    "Rollout": "types",
    "RunFolder": "runfolder",
    "SamplingSettings": "types",
    "StableOPDError": "types",
    "StopReason": "types",
    "prepare": "training.setup",
    "train": "training.loop",
}

__all__ = [
    "Config",
    "Prompt",
    "Rollout",
    "RunFolder",
    "SamplingSettings",
    "StableOPDError",
    "StopReason",
    "__version__",
    "diagnose_run",
    "load_config",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stableopd' has no attribute {name!r}")
    home, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"stableopd.{home}"), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
