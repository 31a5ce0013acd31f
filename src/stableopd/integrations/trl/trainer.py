"""`DistillationTrainer` of TRL with golden solutions, a reference KL, stop events and the alarm.

    L = D(pi_theta, pi_T)                                TRL's own divergence, chosen by its `beta`
      + lambda_gold    · mean over golden tokens  of -log pi_theta(y_t)
      + beta_reference · mean over rollout tokens of KL(pi_theta || pi_ref)

Each mean is over all tokens of a kind of the full optimizer step, all micro-batches and processes,
as TRL takes its own; this is `aggregation = "token"` of docs/objective.md. Rollouts, optimizer,
logging and checkpoints are TRL's. With both weights 0 and one stop id the loss is TRL's own code.

In which precision a term is computed is TRL's: a forward pass outside autocast, in the weights' own
type, with `bf16=True` too, and logits that become float32 before the softmax.

Source: arXiv 2604.08527 (golden and reference term), 2609.20511 (stop event), 2306.13649 (TRL's D).
"""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoTokenizer
from trl import DistillationTrainer  # pyright: ignore[reportPrivateImportUsage] (a lazy module)

from stableopd.config import RepetitionConfig
from stableopd.diagnostics.evidence import Facts
from stableopd.hidden import hidden_states, token_hidden_states
from stableopd.integrations.trl.alarm import CollapseAlarm
from stableopd.integrations.trl.batches import evaluating, records_of, right_padded
from stableopd.integrations.trl.config import StableOPDConfig
from stableopd.integrations.trl.golden import Solutions
from stableopd.models import (
    LanguageModel,
    head_of,
    require_head,
    require_same_tokenizer,
    shared_vocabulary,
)
from stableopd.objective.divergence import forward_kl, jensen_shannon, reverse_kl
from stableopd.objective.heads import Against
from stableopd.objective.logprobs import score_tokens
from stableopd.objective.loss import golden_cross_entropy, masked_mean
from stableopd.rollout.stops import plan_stops, stop_ids_of
from stableopd.teacher.local import FrozenModel
from stableopd.types import (
    Batch,
    ConfigError,
    DataError,
    ModelError,
    Record,
    Scores,
    TrainingError,
)

__all__ = ["StableOPDTrainer"]

# TRL's `beta` between these mixes the two models otherwise than any divergence here.
DIVERGENCES = {0.0: forward_kl, 0.5: jensen_shannon, 1.0: reverse_kl}

# For the model card.
PAPER = {
    "title": (
        "Demystifying OPD: Length Inflation and Stabilization Strategies for Large Language Models"
    ),
    "id": "2604.08527",
    "citation": """\
@misc{luo2026demystifying,
    title         = {{Demystifying OPD: Length Inflation and Stabilization Strategies
                     for Large Language Models}},
    author        = {Luo and others},
    year          = 2026,
    eprint        = {2604.08527},
    archivePrefix = {arXiv},
    url           = {https://arxiv.org/abs/2604.08527},
}""",
}


class StableOPDTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer` with the terms of StableOPD and the collapse alarm.

    Logged next to TRL's metrics, by the names of docs/metrics.md: `loss/divergence`, `loss/golden`,
    `loss/reference_kl` (unweighted; where our terms are on), `rollout/...`, and, where our terms
    are on, `advantage/...`, `logp/...`, `stop/...`; and `golden/share`, the share of rollouts whose
    prompt brought a golden solution, and `golden/refused`, of those whose solution cannot be used.

        loss = loss/divergence + lambda_gold * loss/golden + beta_reference * loss/reference_kl

    holds in every line of the log. An evaluation's loss is only the divergence.

    Attributes:
        stops: The stop ids of both models, and how they are scored.
        collapse_alarm: The alarm, a callback of this trainer.
    """

    _name = "StableOPD"
    _tag_names = ["trl", "distillation", "stableopd"]  # noqa: RUF012 (TRL's own)
    _paper = PAPER

    # The declared types leave room for values that neither has once the trainer is made.
    model: Any
    accelerator: Any

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: StableOPDConfig | None = None,
        train_dataset: Any = None,
        *,
        teacher_processing_class: Any = None,
        **others: Any,
    ) -> None:
        """Load and check everything; arguments as TRL's, by name after the data set.

        Args:
            model: The student, as TRL takes it.
            teacher_model: The teacher, as TRL takes it.
            args: The configuration.
            train_dataset: Prompts, and golden solutions where `args.lambda_gold` is not 0.
            teacher_processing_class: The teacher's tokenizer; None loads it from where the teacher
                comes from.
            others: TRL's other arguments, such as `processing_class` and `peft_config`.

        Raises:
            ConfigError: A setting is impossible here.
            ModelError: The models do not fit each other.
            DataError: The golden solutions cannot be used.
        """
        args = StableOPDConfig("StableOPD") if args is None else args
        if not isinstance(args, StableOPDConfig):
            raise ConfigError(f"args must be a StableOPDConfig, not a {type(args).__name__}.")
        if teacher_model is None:
            raise ConfigError("StableOPDTrainer needs a teacher_model.")
        if others.get("tools"):
            raise ConfigError("tools are not supported: a turn's end and the answer's are one id.")
        if teacher_processing_class is None:
            teacher_processing_class = _tokenizer_of(teacher_model, args.trust_remote_code)
        super().__init__(model, teacher_model, args, train_dataset, **others)
        if not hasattr(self.processing_class, "get_vocab"):
            raise ConfigError("only text models are supported, with a tokenizer and no processor.")
        self._settings = args
        self._records: list[Record] = []
        self._lines: list[dict[str, Any]] = []
        self._shares: dict[str, Tensor] = {}
        self._plan(teacher_processing_class)
        self._solutions = Solutions(
            args.solution_column,
            self.processing_class,
            self.stops,
            self._num_tokens,
            self.max_completion_length,
        )
        if args.lambda_gold and train_dataset is not None:
            self._require_solutions(train_dataset)
        repetition = RepetitionConfig(
            args.repetition_window_chars,
            args.repetition_ratio,
            args.repetition_ngram,
            args.repetition_min_run,
        )
        self.collapse_alarm = CollapseAlarm(args.alarm_action, repetition)
        self.collapse_alarm.facts = Facts(
            self.stops.mode, self.stops.student_ids, self.stops.teacher_ids
        )
        self.add_callback(self.collapse_alarm)

    def _require_solutions(self, train_dataset: Any) -> None:
        """Refuse solutions in all processes where one of them has read some that cannot be used."""
        refused = []
        try:
            self._solutions.require(train_dataset)
        except DataError as error:
            refused.append(str(error))
        if refused := gather_object(refused):
            raise DataError(refused[0])

    def _plan(self, teacher_tokenizer: Any) -> None:
        """Check that the models fit, choose the stops, and make teacher and reference ready."""
        args, teacher = self._settings, self.accelerator.unwrap_model(self.teacher_model)
        tokenizer: Any = self.processing_class
        us = LanguageModel(_name(self.model), self.model, tokenizer, None)
        them = LanguageModel(_name(teacher), teacher, teacher_tokenizer, None)
        require_same_tokenizer(us, them)
        num_tokens = shared_vocabulary(us, them)
        self.stops = plan_stops(
            stop_ids_of(self.model, tokenizer),
            stop_ids_of(teacher, teacher_tokenizer),
            tokenizer.eos_token_id,
            args.stop,
            num_tokens,
        )
        self._num_tokens = num_tokens
        self._stop_ids = torch.tensor(
            self.stops.event_ids or self.stops.decode_ids, device=self.accelerator.device
        )
        # With a single id there is nothing to merge.
        self._is_event = len(self.stops.event_ids) > 1
        if self.stops.event_ids and set(self.stops.decode_ids) != set(self.eos_token_ids):
            if self.use_vllm:
                raise ConfigError(
                    "student and teacher stop with different ids, which is not supported with "
                    "use_vllm; generate with transformers, or set stop to 'token'."
                )
            self.eos_token_ids = list(self.stops.decode_ids)
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
            self.generation_config.eos_token_id = self.eos_token_ids
        if not (self._is_event or args.lambda_gold or args.beta_reference):
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("DeepSpeed and FSDP are not supported: they shard the output head.")
        if self.beta not in DIVERGENCES:
            raise ConfigError(f"beta must be 0, 0.5 or 1 with StableOPD's terms, not {self.beta}.")
        teacher.eval()
        is_half = self.accelerator.mixed_precision != "no"
        for role, each in (("student", us), ("teacher", them)):
            with evaluating(each.model):
                require_head(each.model, role, each.name, is_half)
        self._teacher = self._frozen(teacher)
        self._reference = self._make_reference() if args.beta_reference else None

    def _frozen(self, model: Any, is_base: bool = False) -> FrozenModel:
        return FrozenModel(model, self._num_tokens, self.temperature, is_base=is_base)

    def _make_reference(self) -> FrozenModel:
        """The initial student: a copy, or with an adapter the base itself."""
        student = self.model
        if not hasattr(student, "disable_adapter"):
            return self._frozen(copy.deepcopy(student).eval().requires_grad_(False))
        ids_BT = torch.arange(1, 9, device=student.device).unsqueeze(0) % self._num_tokens
        with torch.no_grad(), evaluating(student):
            adapted = hidden_states(student, ids_BT, torch.ones_like(ids_BT))
            with student.disable_adapter():
                base = hidden_states(student, ids_BT, torch.ones_like(ids_BT))
        if not torch.allclose(adapted, base, rtol=1e-3, atol=1e-3):
            raise ModelError(
                "the student's adapter already changes the model, so that its base is not the "
                "initial student that beta_reference needs; merge the adapter and add a new one."
            )
        return self._frozen(student, is_base=True)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self._settings.solution_column
        if column not in self._signature_columns:
            self._signature_columns.append(column)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._settings.lambda_gold:
            num_refused = self._solutions.num_refused
            ids_BT, mask_BT = self._solutions.collate(inputs)
            output["golden_ids"] = ids_BT.to(self.accelerator.device)
            output["golden_mask"] = mask_BT.to(self.accelerator.device)
            counts = torch.stack(
                [
                    mask_BT.sum(),
                    mask_BT.any(dim=1).sum(),
                    torch.tensor(self._solutions.num_refused - num_refused),
                    torch.tensor(len(inputs)),
                ]
            )
            gathered_P4 = self.accelerator.gather(counts.to(self.accelerator.device).unsqueeze(0))
            output["num_golden_tokens"], share, refused, rows = gathered_P4.sum(0)
            self._metrics["train"]["golden/share"].append((share / rows).item())
            self._metrics["train"]["golden/refused"].append((refused / rows).item())
        return output

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, whose work `_compute_loss` does; logs the terms of the loss.

        Raises:
            TrainingError: A term is not finite in one of the processes; in all of them.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        shares, self._shares = self._shares, {}
        if not shares:
            return loss
        # Outside the wrapped forward pass, and the same number of terms in every process.
        found_PK = self.accelerator.gather(torch.stack(list(shares.values())).unsqueeze(0))
        # The log takes means over micro-batches, of which each holds its share of the step's mean.
        scale = self.args.gradient_accumulation_steps if self.model.training else 1
        mode = "train" if self.model.training else "eval"
        for name, value in zip(shares, found_PK.mean(0).tolist(), strict=True):
            if not math.isfinite(value):
                raise TrainingError(f"loss/{name} is {value}; this update was not made.")
            self._metrics[mode][f"loss/{name}"].append(value * scale)
        return loss

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch's share of the loss, the sum of the entropies, the number of tokens."""
        is_training = self.model.training
        lambda_gold = self._settings.lambda_gold if is_training else 0.0
        beta_reference = self._settings.beta_reference if is_training else 0.0
        if not (self._is_event or lambda_gold or beta_reference):
            found = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            self._remember(inputs, None)
            return found
        batch = right_padded(inputs, "completion")
        num_tokens = torch.tensor(batch.target_N.numel(), device=batch.target_N.device)
        counted = float(num_tokens if num_items_in_batch is None else num_items_in_batch)
        against = [self._teacher.against(batch, DIVERGENCES[self.beta])]
        if beta_reference and self._reference is not None:
            # With an adapter the reference is in the student, whose dropout is on.
            with evaluating(self._reference.model):
                against.append(self._reference.against(batch, reverse_kl))
        scores = self._score(unwrapped_student, batch, against)
        weights = {"divergence": 1.0, "reference_kl": beta_reference, "golden": lambda_gold}
        shares = {
            name: _mean(other.comparisons[0], batch, counted)
            for name, other in zip(weights, scores.others, strict=False)
        }
        if lambda_gold:
            # Where this process has no solution the term is 0 and there, for the others wait.
            shares["golden"] = 0.0 * shares["divergence"]
            if bool(inputs["golden_mask"].any()):
                golden = right_padded(inputs, "golden")
                value_N = golden_cross_entropy(self._score(unwrapped_student, golden).logp_N)
                num_golden = float(inputs["num_golden_tokens"]) / self.accelerator.num_processes
                shares["golden"] = _mean(value_N, golden, num_golden)
        self._shares = {name: share.detach() for name, share in shares.items()}
        self._remember(inputs, scores)
        total = torch.stack([weights[name] * share for name, share in shares.items()]).sum()
        return total, scores.entropy_N.sum(), num_tokens

    def _score(self, student: Any, batch: Batch, against: list[Against] | None = None) -> Scores:
        return score_tokens(
            token_hidden_states(student, batch),
            head_of(student).restricted_to(self._num_tokens),
            batch.target_N,
            stop_ids=self._stop_ids,
            stop_is_event=self._is_event,
            temperature=self.temperature,
            against=against or (),
        )

    def _remember(self, inputs: dict[str, Any], scores: Scores | None) -> None:
        """Keep the rollouts of a micro-batch until the step is made."""
        if self.model.training:
            ends = self.eos_token_ids
            self._records += records_of(inputs, self.processing_class, ends, scores)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; measures the rollouts of a step once it is complete, and tells the alarm."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.args.gradient_accumulation_steps == 0:
            records, self._records = gather_object(self._records), []
            # The update, which makes it a step, comes right after.
            step = self.state.global_step + 1
            self._lines.append(self.collapse_alarm.measure(records, step))
            self.collapse_alarm.tell({"step": step} | self._lines[-1], self.state)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with means of the measurements of the steps since the last log."""
        if self.model.training:
            lines, self._lines = self._lines, []
            for name in dict.fromkeys(name for line in lines for name in line):
                logs[name] = fmean(line[name] for line in lines if name in line)
        super().log(logs, start_time)


def _mean(value_N: Tensor, batch: Batch, counted: float) -> Tensor:
    """A micro-batch's share of a mean over all tokens of a kind of the step."""
    everywhere_N = torch.ones_like(batch.row_N, dtype=torch.bool)
    return masked_mean(value_N, everywhere_N, batch.row_N, "token", counted)


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _tokenizer_of(teacher: Any, trust_remote_code: bool) -> Any:
    source = teacher if isinstance(teacher, str) else getattr(teacher.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError):
        raise ModelError(
            f"the teacher {source!r} comes without a tokenizer that can be loaded, so that nobody "
            "can tell whether both models share one; give it as teacher_processing_class."
        ) from None
