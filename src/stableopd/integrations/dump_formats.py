"""What each framework's rows look like: how they are recognised, and which value plays which role.

Most frameworks write one flat object a rollout, so that a table from roles to columns says it all.
NeMo-RL, prime-rl and ms-swift nest or bundle; a function unfolds each. What they write was read in
their code, which is named at each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, cast

from stableopd.integrations.dump_values import chat_text, number, split_chat
from stableopd.types import StopReason

__all__ = [
    "FORMATS",
    "KNOWN_COLUMNS",
    "ROLES",
    "columns_of",
    "detect",
    "label",
    "late_columns",
    "needed_columns",
    "reach",
    "unfold",
]

ROLES = (
    *("completion", "prompt", "prompt_id", "step", "completion_ids", "length", "stop_reason"),
    *("student_logprobs", "teacher_logprobs", "advantages", "correct", "score"),
)

# Name on the command line -> name in the output.
FORMATS = {
    "stableopd": "stableopd",
    "trl": "TRL",
    "verl": "verl",
    "slime": "slime",
    "nemo-rl": "NeMo-RL",
    "prime-rl": "prime-rl",
    "ms-swift": "ms-swift",
    "generic": "generic",
}

# docs/metrics.md of this package.
STABLEOPD = {role: role for role in ROLES if role not in ("length", "advantages", "score")}
# huggingface/trl 1.16: log() in trl/trainer/{grpo,distillation}_trainer.py. GRPO adds a column for
# each reward function, named as it is, and the advantage of the rollout.
TRL = {"completion": "completion", "prompt": "prompt", "step": "step", "advantages": "advantage"}
# volcengine/verl 0.9: _write_generations in verl/trainer/ppo/ray_trainer.py. What a reward
# function returns beside the score is added; "acc" is verl's own name for whether it was correct.
VERL = {"completion": "output", "prompt": "input", "step": "step", "score": "score"}
VERL |= {"correct": "acc"}
# THUDM/slime: Sample in slime/utils/types.py, one object a sample. `tokens` begins with the prompt.
SLIME = {"completion": "response", "prompt": "prompt", "length": "response_length"}
SLIME |= {"stop_reason": "status", "score": "reward", "student_logprobs": "rollout_log_probs"}
SLIME |= {"teacher_logprobs": "teacher_log_probs", "completion_ids": "tokens"}
FLAT = {"stableopd": STABLEOPD, "trl": TRL, "verl": VERL, "slime": SLIME}

# Columns by which a role is recognised in a file of no known framework; the first that is there.
GENERIC = {
    "completion": (
        *("completion", "response", "output", "generation", "generated_text", "model_response"),
        *("model_output", "text", "messages", "conversations"),
        *("completions", "responses", "outputs", "generations"),  # several of one prompt
    ),
    "prompt": ("prompt", "input", "question", "query", "problem", "instruction"),
    "prompt_id": ("prompt_id", "example_id", "problem_id", "question_id"),
    # tail_version: of the weights at a rollout's end (inclusionAI/AReaL).
    "step": ("step", "global_step", "train_step", "iteration", "tail_version"),
    "completion_ids": (
        *("completion_ids", "response_ids", "output_ids", "completion_token_ids"),
        *("response_token_ids", "output_token_ids", "response_tokens"),
    ),
    "length": ("num_tokens", "completion_length", "response_length", "num_completion_tokens"),
    "stop_reason": ("stop_reason", "finish_reason", "is_truncated", "truncated"),
    "student_logprobs": ("student_logprobs", "student_logps", "rollout_log_probs", "logprobs"),
    "teacher_logprobs": ("teacher_logprobs", "teacher_logps", "teacher_log_probs"),
    "advantages": ("advantages", "advantage"),
    "correct": ("correct", "is_correct"),
    "score": ("score", "reward"),
}

# Columns that are token ids in some files and their number in others.
EITHER = ("response_tokens",)

TOKEN_ROLES = ("completion_ids", "length", "stop_reason", "student_logprobs", "teacher_logprobs")

# Columns that the unfolding of formats that nest or bundle looks at, and `detect` with it.
NESTED = {
    "nemo-rl": (
        *("content", "input_lengths", "token_loss_mask", "token_ids", "prev_logprobs"),
        *("generation_logprobs", "advantages", "rewards"),
    ),
    "prime-rl": (
        *("traces", "run", "nodes", "calls", "task", "rewards", "reward", "info", "kind", "step"),
        *("stop_condition", "prompt", "completion", "example_id", "env", "env_name", "error"),
        *("is_truncated", "trajectory", "token_usage", "advantage"),
    ),
    "ms-swift": ("step", "prompt", "completion", "advantages"),
}
KNOWN_COLUMNS = {
    *(column for table in FLAT.values() for column in table.values()),
    *(column for names in GENERIC.values() for column in names),
    *(column for names in NESTED.values() for column in names),
    "gts",
}

PLACE = re.compile(r"[0-9]{1,9}")  # in a list

Row = Mapping[str, Any]


def detect(path: Path, rows: Sequence[Row]) -> str:
    """Recognise a framework by its file and first rows; "" where there is none.

    Args:
        path: The file.
        rows: A few of its rows.

    Returns:
        A key of `FORMATS`; "generic" where only a completion's column is known.
    """
    keys: set[str] = {key for row in rows for key in row}
    if {"prompt_id", "completion", "completion_ids", "stop_reason"} <= keys:
        return "stableopd"
    if {"content", "input_lengths"} <= keys:
        return "nemo-rl"
    if {"traces", "task"} <= keys or ("nodes" in keys and {"calls", "task", "rewards"} & keys):
        return "prime-rl"
    if "completion" in keys and "example_id" in keys and {"is_truncated", "task", "env"} & keys:
        return "prime-rl"
    if {"step", "prompt", "completion"} <= keys and _is_table(rows[0]):
        return "ms-swift"
    if {"input", "output"} <= keys and {"score", "gts", "step"} & keys:
        return "verl"
    if "response" in keys and {"response_length", "rollout_log_probs"} & keys:
        return "slime"
    if {"prompt", "completion"} <= keys and path.suffix == ".parquet":
        return "trl" if "step" in keys or path.name.startswith("completions_") else "generic"
    if any(key in keys for key in GENERIC["completion"]):
        return "generic"
    return "generic" if any(_is_list(rows, key) for key in GENERIC["completion_ids"]) else ""


def columns_of(name: str, rows: Sequence[Row], mapping: Mapping[str, str]) -> dict[str, str]:
    """Which column plays which role.

    Args:
        name: A key of `FORMATS`.
        rows: A few rows.
        mapping: Roles and columns as the user gives them; they win.

    Returns:
        Columns by role; for a format that nests or bundles, those of the mapping alone.
    """
    keys = {key for row in rows for key in row}
    known = {
        role: column
        for role, names in GENERIC.items()
        if (column := next((column for column in names if _plays(column, keys, rows)), ""))
    }
    found = known if name == "generic" else dict(FLAT.get(name, {}))
    if name in ("trl", "verl"):  # where reward functions and users may add columns of their own
        found |= {role: known[role] for role in TOKEN_ROLES if role in known}
    if name == "trl":
        own = {"step", "prompt", "completion", "advantage"}
        rewards = [key for key in rows[0] if key not in own and _is_number(rows, key)]
        if len(rewards) == 1:  # of several, TRL's weights would be needed
            found["score"] = rewards[0]
    return found | dict(mapping)


def late_columns(name: str, keys: Set[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Columns by role that the first rows do not have, but a later one has.

    Args:
        name: A key of `FORMATS`.
        keys: The columns of all rows so far.
        columns: What `columns_of` or this function found before; these stay.

    Returns:
        The columns of all roles.
    """
    roles = GENERIC if name == "generic" else TOKEN_ROLES if name in ("trl", "verl") else ()
    found = {
        role: next((c for c in GENERIC[role] if c in keys and c not in EITHER), "")
        for role in roles
        if role not in columns
    }
    return {role: column for role, column in found.items() if column} | dict(columns)


def needed_columns(name: str, columns: Mapping[str, str]) -> set[str]:
    """The columns of a table that `unfold` looks at; all others are not read.

    Args:
        name: A key of `FORMATS`.
        columns: From `columns_of`.

    Returns:
        Names of columns, some of which may not be there.
    """
    named = set(columns.values())
    return {*named, *(column.partition(".")[0] for column in named), *NESTED.get(name, ())}


def label(name: str, paths: Sequence[Path], columns: Mapping[str, str]) -> str:
    """What is said of a format: "verl (JSONL)", "JSONL (completion from 'text')"."""
    endings = {"parquet" if path.suffix == ".parquet" else "JSONL" for path in paths}
    kind = " and ".join(sorted(endings))
    if name != "generic":
        return f"{FORMATS[name]} ({kind})"
    if "completion" not in columns:
        return f"{kind} (token ids from {columns['completion_ids']!r})"
    return f"{kind} (completion from {columns['completion']!r})"


def reach(row: Row, name: str) -> Any:
    """The value of the column of that name, or None; dots reach into objects and lists."""
    if name in row:
        return row[name]
    value: Any = row
    for piece in name.split("."):
        if isinstance(value, Mapping):
            value = cast(Row, value).get(piece)
        elif isinstance(value, list | tuple) and PLACE.fullmatch(piece):
            items = cast(Sequence[Any], value)
            value = items[int(piece)] if int(piece) < len(items) else None
        else:
            return None
    return value


def unfold(name: str, row: Row, columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rollouts of a row, as values by role.

    Args:
        name: A key of `FORMATS`.
        row: The row as it was read.
        columns: From `columns_of`.

    Yields:
        Values by role, not yet checked. An evaluation's row yields nothing.

    Raises:
        ValueError: The row does not have the shape of the format.
    """
    if name == "nemo-rl":
        for roles in _nemo_rl(row):
            yield roles | _values(row, columns)
    elif name == "prime-rl":
        for roles in _prime_rl(row):
            yield roles | _values(row, columns)
    elif name == "ms-swift":
        for rollout in _ms_swift(row):
            table = {"prompt": "prompt", "completion": "completion", "step": "step"}
            yield _values(rollout, table | {"advantages": "advantages"} | dict(columns))
    else:
        roles = _values(row, columns)
        if name == "generic" and _is_several(roles.get("completion")):
            yield from _each(roles)
            return
        if name == "slime" and columns["completion_ids"] == "tokens":
            roles["completion_ids"] = _tail(roles.get("completion_ids"), roles.get("length"))
            roles["score"] = None if isinstance(roles.get("score"), Mapping) else roles.get("score")
        if columns.get("completion") in ("messages", "conversations"):
            prompt, roles["completion"] = split_chat(roles["completion"])
            roles["prompt"] = roles.get("prompt") or prompt
        yield roles


def _values(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    return {role: reach(row, column) for role, column in columns.items()}


def _is_several(value: Any) -> bool:
    """Whether a completion's value holds several: texts, or the messages of a chat each."""
    if not isinstance(value, list) or not value:
        return False
    items = cast(list[Any], value)
    return all(isinstance(item, str) for item in items) or all(_is_chat(item) for item in items)


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, Mapping) for message in cast(list[Any], value))


def _each(roles: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The completions of one prompt; lists that are as long belong to them one by one."""
    many = len(roles["completion"])
    parted = {
        role
        for role, value in roles.items()
        if isinstance(value, list) and len(cast(list[Any], value)) == many and not _is_chat(value)
    }
    for place in range(many):
        yield {role: v[place] if role in parted else v for role, v in roles.items()} | {
            "completion": roles["completion"][place]
        }


def _tail(tokens: Any, length: Any) -> Any:
    """The last `length` of prompt and completion; None where that is not known."""
    if not isinstance(tokens, list) or not isinstance(length, int) or length > len(tokens):
        return None
    return cast(list[Any], tokens)[len(tokens) - length :]


def _ms_swift(row: Row) -> Iterator[Row]:
    """Unbundle a line that holds the columns of a whole step.

    Source: modelscope/ms-swift 4.6, log() in swift/rlhf_trainers/{grpo,gkd}_trainer.py.
    """
    if not _is_table(row):
        raise ValueError("not a table of columns, as ms-swift writes")
    columns = {key: value for key, value in row.items() if isinstance(value, list)}
    for place in range(len(row["completion"])):
        yield {k: v[place] for k, v in columns.items() if place < len(v)}


def _is_table(row: Row) -> bool:
    columns = (row.get("step"), row.get("prompt"), row.get("completion"))
    if not all(isinstance(column, list) for column in columns):
        return False
    return all(isinstance(text, str) for text in row["completion"])


def _plays(column: str, keys: Set[str], rows: Sequence[Row]) -> bool:
    return column in keys and (column not in EITHER or _is_list(rows, column))


def _is_list(rows: Sequence[Row], key: str) -> bool:
    return any(isinstance(row.get(key), list) for row in rows)


def _is_number(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _nemo_rl(row: Row) -> Iterator[dict[str, Any]]:
    """A line of train_data_step{n}.jsonl, each value in a list of one.

    `content` has the text of every message, with no roles: the prompt (after the system's, if
    any), then the student's turns and the environment's by turns. Lists over tokens span the whole
    sequence and are padded; `token_loss_mask` marks the student's tokens. Distillation writes
    neither these nor lengths of the completion alone.

    Source: NVIDIA-NeMo/RL, nemo_rl/algorithms/{grpo,distillation}.py, log_batched_dict_as_jsonl in
    nemo_rl/utils/logger.py, message_log_to_flat_messages in nemo_rl/data/llm_message_utils.py.
    """
    one = {key: value[0] if _is_single(value) else value for key, value in row.items()}
    content = one.get("content")
    if isinstance(content, str):
        roles: dict[str, Any] = {"completion": content}
    elif isinstance(content, list) and len(content) > 1:
        texts = cast(list[Any], content)
        start = 2 if len(texts) > 2 and _is_system(chat_text(texts[0])) else 1
        turns = [chat_text(text) for text in texts[start::2]]
        roles = {
            "prompt": "".join(chat_text(text) for text in texts[:start]),
            "completion": "\n".join(turns),
        }
    else:
        raise ValueError("'content' is neither text nor a list of messages")
    mask = one.get("token_loss_mask")
    if isinstance(mask, list):
        chosen = [i for i, m in enumerate(cast(list[Any], mask)) if m]
        logps = "prev_logprobs" if one.get("prev_logprobs") else "generation_logprobs"
        roles["length"] = len(chosen)
        roles["completion_ids"] = _pick(one.get("token_ids"), chosen)
        roles["student_logprobs"] = _pick(one.get(logps), chosen)
        roles["advantages"] = _pick(one.get("advantages"), chosen)
    roles["score"] = one.get("rewards")
    yield roles


def _is_single(value: Any) -> bool:
    return isinstance(value, list) and len(cast(list[Any], value)) == 1


def _is_system(text: str) -> bool:
    """Whether a message is the system's alone, by the headers of its chat template."""
    begins = re.match(r"\s*(<[^<>]*>\s*)*(<\|)?system\b", text) is not None
    return begins and re.search(r"<[^<>]*>\s*user\b|<\|user\|>", text) is None


def _pick(values: Any, chosen: Sequence[int]) -> Any:
    if not isinstance(values, list):
        return values  # one advantage for the whole rollout
    items = cast(list[Any], values)
    return [items[i] for i in chosen] if not chosen or chosen[-1] < len(items) else None


def _prime_rl(row: Row) -> Iterator[dict[str, Any]]:
    """A line of rollouts/step_N/train_rollouts.jsonl or of the file monitor's trace stream.

    Three forms: an episode with `traces`; a trace with `nodes` and `calls`; and, before
    verifiers 0.2, the messages `prompt` and `completion` with `is_truncated`.

    Source: PrimeIntellect-ai/prime-rl, src/prime_rl/orchestrator/{utils,orchestrator}.py and
    src/prime_rl/monitors/file/monitor.py; verifiers 0.4, verifiers/v1/{trace,graph,episode}.py;
    verifiers 0.1, state_to_output in verifiers/utils/save_utils.py.
    """
    if "traces" in row:
        work = reach(row, "run.work") or {}
        for trace in row["traces"] if work.get("type") != "eval" else ():
            yield _trace(trace) | {"step": work.get("step")}
    elif "nodes" in row:
        if row.get("kind") != "eval":
            yield _trace(row)
    else:
        yield _output(row)


def _trace(trace: Row) -> dict[str, Any]:
    """The last branch of a trace: its sampled messages are the completion."""
    nodes = cast(list[Row], trace.get("nodes") or [])
    path: list[Row] = []
    place: Any = len(nodes) - 1 if nodes else None
    while place is not None and len(path) < len(nodes):
        if type(place) is not int or not 0 <= place < len(nodes):
            raise ValueError(f"a message's parent is {place!r}, and there are {len(nodes)}")
        path.append(nodes[place])
        place = nodes[place].get("parent")
    path.reverse()
    first = next((i for i, node in enumerate(path) if node.get("sampled")), len(path))
    sampled = [node for node in path if node.get("sampled")]
    if not sampled:
        raise ValueError("the trace has no sampled message")
    own = [
        token
        for node in sampled
        for token, mine in zip(node.get("token_ids") or (), node.get("mask") or (), strict=False)
        if mine
    ]
    calls = [call for call in cast(list[Row], trace.get("calls") or []) if not call.get("error")]
    reason = calls[-1].get("finish_reason") if calls else None
    limits = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens")
    if trace.get("stop_condition") in limits:
        reason = StopReason.LENGTH
    rewards = [reward for reward in cast(Row, trace.get("rewards") or {}).values() if reward]
    trained = "trainer_logprobs" if sampled[-1].get("trainer_logprobs") else "logprobs"
    task = reach(trace, "task.key") or reach(trace, "task.data.idx")
    return {
        "prompt": [node["message"] for node in path[:first]],
        "prompt_id": None if task is None else str(task),
        "completion": [node["message"] for node in sampled],
        "completion_ids": own or None,
        "student_logprobs": _joined(sampled, trained) if own else None,
        "teacher_logprobs": _joined(sampled, "reference_logprobs"),
        "advantages": _joined(sampled, "advantages"),
        "stop_reason": reason,
        "score": _sum_of(rewards) if rewards else trace.get("reward"),
        "step": reach(trace, "info.prime_rl.step"),
    }


def _sum_of(rewards: Sequence[Any]) -> Any:
    """The weighted sum of a trace's rewards, or one of them that is no number."""
    total = 0.0
    for reward in rewards:
        entry = cast(Row, reward) if isinstance(reward, Mapping) else {"score": reward}
        try:
            total += (number(entry["score"]) or 0.0) * (number(entry.get("weight", 1)) or 0.0)
        except ValueError:
            return entry
    return total


def _joined(nodes: Sequence[Row], key: str) -> list[Any] | None:
    """The values over the sampled tokens of all nodes; None where one has none."""
    lists = [node.get(key) for node in nodes]
    if not all(isinstance(values, list) and values for values in lists):
        return None
    return [value for values in cast(list[list[Any]], lists) for value in values]


def _output(row: Row) -> dict[str, Any]:
    """A rollout in the form of verifiers before its traces."""
    steps = cast(list[Row], row.get("trajectory") or [])
    tokens = [step.get("tokens") or {} for step in steps]
    example, env = row.get("example_id"), row.get("env_name") or row.get("task") or ""
    failed = row.get("error") is not None and not row.get("is_truncated")
    return {
        "prompt": row.get("prompt"),
        "prompt_id": "" if example is None else f"{env}-{example}" if env else str(example),
        "completion": row.get("completion"),
        "completion_ids": _joined(tokens, "completion_ids") if tokens else None,
        "student_logprobs": _joined(tokens, "completion_logprobs") if tokens else None,
        "length": reach(row, "token_usage.output_tokens"),
        "stop_reason": None if failed else row.get("is_truncated"),
        "advantages": row.get("advantage"),
        "score": row.get("reward"),
        "step": row.get("step"),
    }
