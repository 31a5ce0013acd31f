#!/usr/bin/env bash
# StableOPD in verl 0.9.1 on the Ray cluster that this machine belongs to (or on this machine alone).
# Set what is in capitals; further overrides of verl's configuration go behind the script's name.
set -euo pipefail

STUDENT=${STUDENT:?a folder or hub name}
TEACHER=${TEACHER:?a folder or hub name with the same tokenizer}
DATA=${DATA:?the folder that prepare.py wrote}
# Ids that end a completion in either model, the student's own first: `stableopd doctor` prints them.
STOP_IDS=${STOP_IDS:?such as 151643,151645}
NODES=${NODES:-1}
GPUS=${GPUS:-8}                 # per node, for student, reference and rollouts
TEACHER_GPUS=${TEACHER_GPUS:-2} # per node of the teacher, beside those
TEACHER_NODES=${TEACHER_NODES:-1}
PROMPT_TOKENS=${PROMPT_TOKENS:-1024}
RESPONSE_TOKENS=${RESPONSE_TOKENS:-8192}
OBJECTIVE=${OBJECTIVE:-method:stable_opd,reference_kl:k1} # fields of [objective] and [repetition]
RUNNER=${RUNNER:-python3 -m verl.trainer.main_ppo}
HERE=$(cd "$(dirname "$0")" && pwd)

OVERRIDES=(
  # The objective: our loss in place of verl's, alone, and its settings.
  distillation.enabled=True
  distillation.distillation_loss.loss_mode=stableopd
  distillation.distillation_loss.use_policy_gradient=False
  distillation.distillation_loss.use_task_rewards=False
  distillation.distillation_loss.loss_max_clamp=null
  "+distillation.teacher_models.teacher_model.inference.custom.stableopd={$OBJECTIVE,stop_ids:[$STOP_IDS]}"
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
  # Stops as one event: the teacher is asked for it, and the temperature is the teacher's.
  +actor_rollout_ref.rollout.agent.agent_loop_manager_class=stableopd.integrations.verl.manager.StopEventManager
  actor_rollout_ref.rollout.temperature=1.0
  # The reference: loaded, and scored with every batch. verl's own coefficient is not read.
  actor_rollout_ref.actor.use_kl_loss=True
  # One golden solution and four rollouts a prompt, one update a batch.
  actor_rollout_ref.rollout.n=5
  actor_rollout_ref.rollout.calculate_log_probs=False
  data.train_batch_size=16
  actor_rollout_ref.actor.ppo_mini_batch_size=16
  # Models, data, machines.
  actor_rollout_ref.model.path="$STUDENT"
  distillation.teacher_models.teacher_model.model_path="$TEACHER"
  distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=1
  distillation.nnodes="$TEACHER_NODES"
  distillation.n_gpus_per_node="$TEACHER_GPUS"
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.max_prompt_length="$PROMPT_TOKENS"
  data.max_response_length="$RESPONSE_TOKENS"
  data.truncation=error
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr=1e-6
  actor_rollout_ref.actor.use_dynamic_bsz=True
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$((PROMPT_TOKENS + RESPONSE_TOKENS))
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5
  actor_rollout_ref.rollout.val_kwargs.do_sample=True
  actor_rollout_ref.rollout.val_kwargs.temperature=0.6
  actor_rollout_ref.rollout.val_kwargs.n=4
  # Rewards are logged and, with use_task_rewards=False, not trained on.
  algorithm.adv_estimator=grpo
  reward.custom_reward_function.path="$HERE/reward.py"
  trainer.nnodes="$NODES"
  trainer.n_gpus_per_node="$GPUS"
  trainer.project_name=stableopd
  trainer.experiment_name="${NAME:-stable-opd}"
  trainer.total_training_steps=200
  trainer.save_freq=50
  trainer.test_freq=20
  trainer.logger='[console]'
  # What `stableopd diagnose` reads.
  trainer.rollout_data_dir="runs/verl/${NAME:-stable-opd}"
)

exec $RUNNER "${OVERRIDES[@]}" "$@"
