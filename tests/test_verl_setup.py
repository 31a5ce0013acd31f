"""How stableopd gets into the real verl: registration, settings, rollouts, teacher, recipe.

Runs in an environment of its own (`make verl`); nothing of verl is replaced. Where a server would
stand there is a language model that answers as verl's servers do.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("verl", reason="verl is not installed; `make verl` runs this")
pytestmark = pytest.mark.verl

from omegaconf import OmegaConf
from verl.experimental.teacher_loop.teacher_manager import AsyncTeacherLLMServerManager
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import need_reference_policy
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

import step_parts
import verl_parts as parts
from stableopd.integrations.verl import distillation_loss
from stableopd.integrations.verl.rollouts import MixtureAgentLoop, StopEventTeacher
from stableopd.integrations.verl.settings import check_verl, read_settings
from stableopd.types import ConfigError, DataError
from tiny import END, EOS, VOCABULARY, save_model

REGISTERED = """
import verl
from verl.trainer.distillation.losses import DISTILLATION_SETTINGS_REGISTRY as losses
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as policies
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry as loops
known = {"stableopd", "stableopd_token"} & set(losses)
print(len(known), "stableopd" in policies, "stableopd_mixture" in loops)
if known:
    print(losses["stableopd"].use_topk, losses["stableopd_token"].use_estimator)
"""


@pytest.mark.parametrize(
    ("plugins", "modules", "expected"),
    [
        ("auto", "", "2 True True\nTrue True"),
        ("none", "stableopd.integrations.verl", "2 True True\nTrue True"),
        ("auto", "stableopd.integrations.verl", "2 True True\nTrue True"),
        ("none", "", "0 False False"),
    ],
    ids=["entry point", "external module", "both", "neither"],
)
def test_registration(plugins, modules, expected):
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins, "VERL_USE_EXTERNAL_MODULES": modules}
    command = [sys.executable, "-W", "ignore", "-c", REGISTERED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_teacher_manager_gets_the_event():
    """Through verl's own teacher manager, a stop costs one more request for each other stop id."""
    _, _, config = parts.configs()
    world, server = parts.World(), parts.Server(step_parts.model(1))
    manager = AsyncTeacherLLMServerManager(
        config, {"default": StopEventTeacher(server, parts.STOPS)}
    )
    stopped, cut = [3, 4, 5, 6, EOS], [3, 4, 5, 6, 7]
    ids, logps = asyncio.run(manager.compute_teacher_logprobs_single(stopped))
    assert ids.tolist() == [[4, 4], [5, 5], [6, 6], [EOS, END], [0, 0]]
    assert server.asked == [stopped, [3, 4, 5, 6, END]]
    logp_V = parts.logits(world.teacher, stopped).log_softmax(-1)[3]
    assert logps[3].logsumexp(0).item() == pytest.approx(
        logp_V[[EOS, END]].logsumexp(0).item(), abs=1e-5
    )
    ids, _ = asyncio.run(manager.compute_teacher_logprobs_single(cut))
    assert ids.tolist()[:-1] == [[i, i] for i in cut[1:]]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("extra", "fields", "message"),
    [
        (("distillation.distillation_loss.use_policy_gradient=True",), {}, "use_policy_gradient"),
        (("distillation.distillation_loss.loss_max_clamp=5.0",), {}, "loss_max_clamp"),
        (("distillation.distillation_loss.use_task_rewards=True",), {}, "use_task_rewards"),
        (("+distillation.distillation_loss.use_chunked_topk=True",), {}, "use_chunked_topk"),
        (("actor_rollout_ref.actor.loss_agg_mode=token-mean",), {}, "seq-mean-token-mean"),
        (("distillation.distillation_loss.loss_mode=stableopd_token",), {}, "'token'"),
        ((), {"reference_kl": "exact"}, "'exact' needs"),
        ((), {"reference_kl": "k3"}, "must be 'k1'"),
        ((), {"mask_truncated": True}, "mask_truncated"),
        ((), {"baseline": "kl"}, "baseline"),
        ((), {"lambda_golden": 1}, "did you mean 'lambda_gold'"),
    ],
)
def test_refusals(extra, fields, message):
    world = parts.World()
    actor, distillation, _ = parts.configs(extra=extra, **fields)
    with pytest.raises(ConfigError, match=message):
        distillation_loss(actor, distillation, {}, world.data())


@pytest.mark.parametrize(
    ("field", "message"), [("is_golden", "agent_name"), ("ref_log_prob", "use_kl_loss")]
)
def test_missing_fields(field, message):
    actor, distillation, _ = parts.configs()
    data = parts.World().data()
    del data[field]
    with pytest.raises(ConfigError, match=message):
        distillation_loss(actor, distillation, {}, data)


def test_a_teacher_without_the_event_is_noticed():
    world = parts.World(beta_reference=0)
    actor, distillation, _ = parts.configs(beta_reference=0)
    data = world.data()
    output = parts.model_output(world.student, actor, distillation, data, True)
    data["teacher_ids"] = parts.jagged([row + 1 for row in data["teacher_ids"].unbind()])
    with pytest.raises(ConfigError, match="StopEventManager"):
        distillation_loss(actor, distillation, output, data)
    with pytest.raises(ConfigError, match="fsdp"):
        distillation_loss(actor, distillation, {"log_probs": None}, data)


def test_the_script_is_a_configuration_of_verl():
    """Every override of recipes/verl/train.sh, through hydra into verl's own classes."""
    config = parts.configure(parts.overrides("trainer.save_freq=7"))
    assert config.trainer.save_freq == 7
    assert need_reference_policy(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    distillation = omega_conf_to_dataclass(config.distillation)
    settings = read_settings(distillation)
    assert settings == read_settings(config.distillation)
    assert settings.stop_ids == (1, 2)
    assert (settings.objective.lambda_gold, settings.objective.beta_reference) == (1.0, 0.01)
    assert actor.rollout_n == 5
    assert config.trainer.use_v1
    assert config.trainer.v1.trainer_mode == "sync"
    world = parts.World()
    data = world.data()
    output = parts.model_output(world.student, actor, distillation, data, True)
    values, _ = distillation_loss(actor, distillation, output, data)
    assert values.isfinite().all()


def test_the_arms_of_the_recipe_are_configurations():
    """Each row of the table of arms in recipes/verl/README.md passes verl's checks and ours."""
    page = (parts.ROOT / "recipes" / "verl" / "README.md").read_text()
    arms = re.findall(
        r"^\| [^|]+ \| `(method:[^`]+)`[^|]* \| (?:`([^`]+)`)? ?\|$", page, re.MULTILINE
    )
    assert len(arms) == 6
    for objective, more in arms:
        config = parts.configure(parts.overrides(*more.split(), objective=objective))
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        distillation = omega_conf_to_dataclass(config.distillation)
        fields = ["is_golden"] + ["ref_log_prob"] * need_reference_policy(config)
        check_verl(actor, distillation, read_settings(distillation), fields)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of verl's queue, when it is imported
def test_the_manager_wraps_the_teachers():
    _, _, config = parts.configs()
    name = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    manager_class = load_class_from_fqn(name, "AgentLoopManager")
    server = parts.Server(step_parts.model(1))
    manager = manager_class(config=config, llm_client=None, teacher_client={"default": server})
    teacher = manager.teacher_client["default"]
    assert isinstance(teacher, StopEventTeacher)
    assert (teacher.client, teacher.stop_ids) == (server, parts.STOPS)
    with pytest.raises(ConfigError, match="distillation"):
        manager_class(config=config, llm_client=None)
    _, _, by_token = parts.configs(event=False)
    with pytest.raises(ConfigError, match="token"):
        manager_class(config=by_token, llm_client=None, teacher_client={"default": server})


ROW = {
    "raw_prompt": [{"role": "user", "content": "12+3"}],
    "extra_info": {"solution": "15"},
    "index": 0,
    "global_steps": 5,
}


def run_mixture(sessions, row=ROW, **changes):
    _, _, config = parts.configs()
    config.data.max_response_length = config.actor_rollout_ref.rollout.response_length = 6
    for key, value in changes.items():
        OmegaConf.update(config.actor_rollout_ref.rollout, key, value)
    server = parts.Writer(step_parts.model(0), budget=6)

    async def run():
        loop = parts.mixture(config, server, MixtureAgentLoop)
        return [await loop.run({"temperature": 1.0}, **row, **s) for s in sessions]

    return asyncio.run(run()), server


def test_the_last_session_is_the_golden_solution():
    rows, server = run_mixture([{"session_id": i} for i in range(parts.N)])
    assert [r.is_golden for r in rows] == [False, False, True]
    assert rows[0].response_ids == rows[1].response_ids
    assert server.stop_ids == list(parts.STOPS)
    golden = rows[2]
    assert golden.prompt_ids == rows[0].prompt_ids == [VOCABULARY[c] for c in "12+3="]
    assert golden.response_ids == [VOCABULARY["1"], VOCABULARY["5"], EOS]
    assert golden.response_mask == [1, 1, 1]
    # As verl stores them: all rows have the same fields.
    table = list_of_dict_to_tensordict([r.as_dict() for r in rows])
    assert table["is_golden"].tolist() == [[0], [0], [1]]
    assert {r.extra_fields["max_global_steps"] for r in rows} == {4}


@pytest.mark.parametrize(
    ("row", "sessions", "changes", "message"),
    [
        (ROW, [{}], {}, "use_v1"),
        (ROW | {"extra_info": {}}, [{"session_id": 2}], {}, "no solution"),
        (ROW | {"extra_info": {"solution": "1234567"}}, [{"session_id": 2}], {}, "8 tokens"),
        (ROW | {"extra_info": {"solution": "1<end>5"}}, [{"session_id": 2}], {}, "stands within"),
        (ROW, [{"session_id": 2}], {"calculate_log_probs": True}, "calculate_log_probs"),
        (ROW, [], {"agent.default_agent_loop": "stableopd_mixture"}, "validation"),
    ],
)
def test_rows_that_cannot_be_made(row, sessions, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run_mixture(sessions, row, **changes)


def test_prepared_data_and_reward(tmp_path):
    """prepare.py writes what verl's data set reads, and reward.py grades what verl hands it."""
    model = save_model(tmp_path / "model", step_parts.model(0), parts.chat_tokenizer())
    rows = [{"prompt": f"{i}+1=", "solution": "=" * i, "answer": f"{i}"} for i in range(1, 9)]
    rows.append({"prompt": "7+7=", "answer": "14"})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = parts.ROOT / "recipes" / "verl"
    command = [sys.executable, str(recipe / "prepare.py"), "train.jsonl", "test.jsonl"]
    command += ["--output", "out", "--model", str(model), "--max-response-tokens", "6"]
    command += ["--grader", "exact", "--answer-marker", "#"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["train: 5 of 9 prompts", "test: 9 of 9 prompts"]
    _, _, config = parts.configs()
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.filter_overlong_prompts_workers = 1
    data = RLHFDataset(str(tmp_path / "out" / "train.parquet"), parts.chat_tokenizer(), config.data)
    assert len(data) == 5
    assert data[2]["agent_name"] == "stableopd_mixture"
    assert data[2]["extra_info"]["solution"] == "==="
    assert data[2]["raw_prompt"] == [{"role": "user", "content": "3+1="}]
    reward = get_custom_reward_fn(config)
    assert reward is not None
    truth, extra = data[2]["reward_model"]["ground_truth"], data[2]["extra_info"]
    assert reward("stableopd", "so #3", truth, extra) == 1.0
    assert reward("stableopd", "so #4", truth, extra) == 0.0
    test = RLHFDataset(str(tmp_path / "out" / "test.parquet"), parts.chat_tokenizer(), config.data)
    assert "agent_name" not in test[0]


def test_a_step_of_the_fsdp_engine(tmp_path):
    """verl's own engine: forward, our loss over three micro-batches, backward, optimizer."""
    env = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu,stableopd.integrations.verl",
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "PYTHONPATH": str(parts.ROOT / "tests"),
    }
    script = parts.ROOT / "tests" / "verl_engine.py"
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["engine"].startswith("FSDP")
    assert found["micro_batches"] == 3
    assert found["loss"] == pytest.approx(found["our_loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(found["our_grad_norm"], rel=1e-4)
    assert found["truncated"] == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
