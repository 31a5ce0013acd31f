"""verl's manager of agent loops with a teacher that answers for the stop event.

In a file of its own, since it needs TransferQueue, which verl wants in its trainer alone.
"""

from __future__ import annotations

from typing import Any

# In the ordinary environment verl is not installed; verl itself imports this module, by name.
from verl.trainer.ppo.v1.agent_loop_tq import (  # pyright: ignore[reportMissingImports]
    AgentLoopManagerTQ,
)

from stableopd.integrations.verl.rollouts import StopEventTeacher
from stableopd.integrations.verl.settings import read_settings
from stableopd.types import ConfigError

__all__ = ["StopEventManager"]


class StopEventManager(AgentLoopManagerTQ):
    """Hands verl's agent loops teachers that score a stop as one event.

    Set `actor_rollout_ref.rollout.agent.agent_loop_manager_class` to this class; it goes with
    `distillation.distillation_loss.loss_mode=stableopd`.
    """

    def __init__(
        self,
        config: Any,
        llm_client: Any,
        teacher_client: dict[str, Any] | None = None,
        reward_loop_worker_handles: list[Any] | None = None,
    ) -> None:
        """As verl's.

        Raises:
            ConfigError: There is no teacher, or our settings do not ask for the stop event.
        """
        settings = read_settings(config.distillation)
        if not teacher_client:
            raise ConfigError("verl: the stop event needs distillation.enabled=True.")
        if settings.objective.stop != "event":
            raise ConfigError("verl: StopEventManager scores stops as an event; stop says 'token'.")
        teachers = {k: StopEventTeacher(v, settings.stop_ids) for k, v in teacher_client.items()}
        super().__init__(config, llm_client, teachers, reward_loop_worker_handles)
