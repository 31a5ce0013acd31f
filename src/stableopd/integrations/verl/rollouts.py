"""What happens around the rollouts: golden solutions among them, and the teacher asked at stops."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import torch

# In the ordinary environment verl is not installed; nothing but verl imports this module.
from verl.experimental.agent_loop.agent_loop import (  # pyright: ignore[reportMissingImports]
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)
from verl.experimental.agent_loop.single_turn_agent_loop import (  # pyright: ignore[reportMissingImports]
    SingleTurnAgentLoop,
)

from stableopd.data.golden import encode_golden
from stableopd.integrations.verl.settings import AGENT_LOOP, read_settings
from stableopd.types import ConfigError, DataError, Prompt, TrainingError

__all__ = ["MixtureAgentLoop", "MixtureOutput", "StopEventTeacher"]


class MixtureOutput(AgentLoopOutput):
    """A row of the batch that says whether it is a golden solution."""

    is_golden: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields that verl stores, and `is_golden` as a tensor of one number."""
        fields: dict[str, Any] = super().as_dict()
        fields["is_golden"] = torch.tensor([int(self.is_golden)])
        return fields


@register(AGENT_LOOP)
class MixtureAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, with the golden solution of the prompt as the last of its n rows.

    A row of the training file asks for it with `agent_name = "stableopd_mixture"` and gives the
    solution as `extra_info["solution"]`; rollouts end at any of the stop ids.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = read_settings(self.config.distillation)
        self.mixes = bool(self.settings.objective.lambda_gold)
        rollout = self.rollout_config
        if rollout.agent.default_agent_loop == AGENT_LOOP:
            raise ConfigError(
                f"verl: {AGENT_LOOP} as default_agent_loop would answer validation, too; name it "
                "in the column agent_name of the training file."
            )
        if self.mixes and rollout.calculate_log_probs:
            raise ConfigError(
                "verl: golden rows have no log-probs of a sampler; set "
                "actor_rollout_ref.rollout.calculate_log_probs=False."
            )

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> MixtureOutput:
        """One row: the golden solution for the last session of a prompt, a rollout for the others.

        Args:
            sampling_params: How verl samples.
            **kwargs: The prompt's columns, and `session_id`, which of its n rows this is.

        Returns:
            The row.

        Raises:
            DataError: The prompt has no solution, or one that does not fit or is no single answer.
            ConfigError: The trainer gives no `session_id` (verl's old one, `trainer.use_v1=False`).
        """
        if "session_id" not in kwargs:
            raise ConfigError("verl: the golden mixture needs trainer.use_v1=True, its default.")
        if self.mixes and int(kwargs["session_id"]) == self.rollout_config.n - 1:
            return await self._golden(**kwargs)
        stops = {"stop_token_ids": list(self.settings.stop_ids)}
        row = await super().run({**sampling_params, **stops}, **kwargs)
        return MixtureOutput(**{k: getattr(row, k) for k in row.model_fields_set}, is_golden=False)

    async def _golden(self, **kwargs: Any) -> MixtureOutput:
        name = str(kwargs.get("index", kwargs.get("uid", "")))
        solution = (kwargs.get("extra_info") or {}).get("solution")
        prompt = Prompt(id=name, prompt="", solution=solution)
        stops = self.settings.stop_ids
        ids = list(encode_golden(prompt, self.tokenizer, stops[0], stops))
        if len(ids) > self.response_length:
            raise DataError(
                f"prompt {name}: its golden solution has {len(ids)} tokens with its stop and "
                f"data.max_response_length is {self.response_length}; leave the prompt out."
            )
        # The weights that wrote the rollouts beside it: verl counts how old every row is.
        version = int(kwargs.get("global_steps", 1)) - 1
        return MixtureOutput(
            prompt_ids=await self.ct_build_initial_tokens(list(kwargs["raw_prompt"])),
            response_ids=ids,
            response_mask=[1] * len(ids),
            multi_modal_data={},
            mm_processor_kwargs=self._get_mm_processor_kwargs(None),
            mm_processor_output=None,
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "min_global_steps": version,
                "max_global_steps": version,
                "turn_scores": [],
                "tool_rewards": [],
            },
            is_golden=True,
        )


class StopEventTeacher:
    """A teacher's client that answers for the stop event where a completion ends in a stop.

    verl's teachers give the log-prob of each token of a sequence. Where the last token is a stop,
    this client asks again with each other stop id in its place. It answers with K = number of stop
    ids per position: at the stop all of them, elsewhere K times the token itself.
    """

    def __init__(self, client: Any, stop_ids: tuple[int, ...]) -> None:
        self.client = client
        self.stop_ids = stop_ids

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kw: Any
    ) -> Any:
        """Score a sequence, as `LLMServerClient.generate` does.

        Args:
            request_id: Names the request.
            prompt_ids: Ids of prompt and response.
            sampling_params: verl's; `prompt_logprobs` is set to 0: the tokens themselves alone.
            **kw: Handed on.

        Returns:
            The client's answer with `prompt_ids` and `prompt_logprobs` of shape (S, K). Row s is
            about token s + 1, and the last row about none, as in verl.

        Raises:
            TrainingError: A server gave no log-probs.
        """
        endings: list[list[int]] = []
        if prompt_ids[-1] in self.stop_ids:
            endings = [[*prompt_ids[:-1], e] for e in self.stop_ids if e != prompt_ids[-1]]
        answers = await asyncio.gather(
            *(
                self.client.generate(
                    request_id if place == 0 else uuid4().hex,
                    prompt_ids=ids,
                    sampling_params={**sampling_params, "prompt_logprobs": 0},
                    **kw,
                )
                for place, ids in enumerate([list(prompt_ids), *endings])
            )
        )
        for answer in answers:
            if "prompt_logprobs" not in answer.extra_fields:
                raise TrainingError("verl: the teacher's server gave no log-probs of a sequence.")
        fields = answers[0].extra_fields
        width = len(self.stop_ids)
        ids_S = [row[:1] * width for row in fields["prompt_ids"]]
        logps_S = [row[:1] * width for row in fields["prompt_logprobs"]]
        if prompt_ids[-1] in self.stop_ids:
            last = [a.extra_fields for a in answers]
            ids_S[-2] = [int(x["prompt_ids"][-2][0]) for x in last]
            logps_S[-2] = [float(x["prompt_logprobs"][-2][0]) for x in last]
        fields["prompt_ids"], fields["prompt_logprobs"] = ids_S, logps_S
        return answers[0]
