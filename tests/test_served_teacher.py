"""A teacher that a real vLLM server serves says what it says in this process.

`make vllm` runs these. The server is started once; nothing changes its weights.
"""

import json

import pytest
import torch

import vllm_parts
from stableopd.endpoint import Endpoint
from stableopd.models import load
from stableopd.objective.logprobs import score_tokens
from stableopd.rollout.sampler import TransformersSampler
from stableopd.teacher.local import FrozenModel
from stableopd.teacher.selftest import self_test
from stableopd.teacher.server import ServedTeacher, ServedTeachers, find_model
from stableopd.training.batch import collate, rollout_sequences
from stableopd.types import ModelError, SamplingSettings, ServerError
from tiny import (
    CPU,
    END,
    EOS,
    PAD,
    VOCABULARY,
    V,
    make_llama,
    make_tokenizer,
    make_world,
    metrics_of,
    run_cli,
    save_model,
    write_config,
)

pytestmark = pytest.mark.vllm

# float32 in both, computed by other kernels.
LOGP_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student that draws, and a teacher whose heads have 32 units, vLLM's least on CPUs."""
    folder = make_world(tmp_path_factory.mktemp("world") / "w")
    save_model(folder / "teacher", make_llama(1, width=64, sharp=8, head_dim=32))
    return folder


@pytest.fixture(scope="module")
def url(world):
    server = vllm_parts.Server(world / "teacher", world / "server.log", "--max-logprobs", "30")
    server.start()
    try:
        server.wait()
        yield server.url
    finally:
        server.kill()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def served(url, event_ids, top_k=0):
    endpoint = Endpoint([url], timeout_s=600, patience_s=600, max_in_flight=8, name="teacher")
    model, context = find_model(endpoint, "")
    assert context == 127
    return ServedTeacher(endpoint, model, event_ids, top_k)


def test_log_probs_and_stop_events(world, url):
    student = load(str(world / "student"), role="student", dtype=torch.float32, device=CPU)
    sampler = TransformersSampler(student.model, student.tokenizer, (EOS, END), V)
    prompts = [(f"p{i}", (3 + i, 13, 3 + i, 15)) for i in range(6)]
    rollouts = sampler.sample(prompts, 4, SamplingSettings(24), seed=3)
    last = {r.completion_ids[-1] for r in rollouts}
    assert {EOS, END} <= last, "both stops must be there"
    teacher = load(str(world / "teacher"), role="teacher", dtype=torch.float32, device=CPU)
    frozen = FrozenModel(teacher.model, V)
    batch = collate(rollout_sequences(rollouts), PAD, CPU)
    lengths = [len(r.completion_ids) for r in rollouts]
    items = [(r.prompt_ids, r.completion_ids) for r in rollouts]
    for is_event in (True, False):
        with torch.no_grad():
            scores = score_tokens(
                frozen.hidden(batch),
                frozen.head,
                batch.target_N,
                stop_ids=torch.tensor([EOS, END]),
                stop_is_event=is_event,
            )
        judged = served(url, (EOS, END) if is_event else ()).judge(items)
        for one, values in zip(judged, scores.logp_N.split(lengths), strict=True):
            assert one.logps == pytest.approx(values.tolist(), abs=LOGP_TOLERANCE)


def test_likeliest_tokens(world, url):
    ids = [3, 13, 3, 15, 4, 5]
    (judged,) = served(url, (), top_k=5).judge([(ids[:4], ids[4:])])
    teacher = load(str(world / "teacher"), role="teacher", dtype=torch.float32, device=CPU)
    with torch.no_grad():
        logp_TV = teacher.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    top = logp_TV[3:5].topk(5)
    assert judged.top_ids.tolist() == top.indices.tolist()
    assert judged.top_logps == pytest.approx(top.values.numpy(), abs=LOGP_TOLERANCE)


def test_more_likeliest_tokens_than_the_server_gives(url):
    with pytest.raises(ServerError, match=r"refused the request with status 400: .*max"):
        served(url, (), top_k=31).judge([((3, 4), (5, 6))])


def test_self_test(url):
    teachers = ServedTeachers({None: served(url, (EOS,))})
    (note,) = self_test(teachers, make_tokenizer(), [(3, 4, 5), (6, 7)])
    assert note.endswith("same tokenizer.")
    swapped = make_tokenizer({**VOCABULARY, "4": VOCABULARY["5"], "5": VOCABULARY["4"]})
    with pytest.raises(ModelError, match="has another tokenizer than the student"):
        self_test(teachers, swapped, [(3, 4, 5), (6, 7)])
    renamed = make_tokenizer({("<stop>" if t == "<end>" else t): i for t, i in VOCABULARY.items()})
    with pytest.raises(ModelError, match="id 2 is '<stop>' to the student and '<end>'"):
        self_test(teachers, renamed, [(3, 4, 5), (6, 7)])


@pytest.mark.parametrize("method", ["stable_opd", "gkd"])
def test_a_training_is_that_with_the_teacher_in_this_process(world, url, method):
    objective = {"method": method} | ({"top_k": 6} if method == "gkd" else {})
    found = {}
    for name, teacher in (
        ("local", {}),
        ("served", {"model": "", "url": url, "tokenizer": str(world / "teacher")}),
    ):
        output = world / f"{method}-{name}"
        run = {"output": str(output), "steps": 3}
        config = write_config(world, "c.toml", run=run, teacher=teacher, objective=objective)
        code, _, err = run_cli("train", config)
        assert code == 0, err
        found[name] = metrics_of(output)
    assert len(found["served"]) == 3
    for mine, theirs in zip(found["served"], found["local"], strict=True):
        assert "loss/total" in mine
        assert "logp/teacher_mean" in mine
        for key, value in mine.items():
            expected = theirs[key]
            if expected is not None:  # a mean over nothing
                expected = pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert value == expected, key


def test_score_and_golden(world, url, tmp_path):
    run = {"output": str(world / "scored"), "steps": 1}
    assert run_cli("train", write_config(world, "s.toml", run=run))[0] == 0
    rows = {}
    for name, source in (
        ("local", ("--model", world / "teacher")),
        ("served", ("--url", url, "--tokenizer", world / "teacher")),
    ):
        output = tmp_path / f"{name}.jsonl"
        code, _, err = run_cli("score", "--rollouts", world / "scored", "--output", output, *source)
        assert code == 0, err
        rows[name] = lines(output)
        golden = tmp_path / f"golden-{name}.jsonl"
        options = ("--temperature", "0", "--max-new-tokens", "8", "--no-chat-template")
        data = ["--data", world / "train.jsonl", "--output", golden]
        data += [x for stop in range(3, 9) for x in ("--stop-ids", stop)]  # so that some end
        code, _, err = run_cli("golden", *data, *options, *source)
        assert code == 0, err
        rows[f"golden {name}"] = lines(golden)
    for mine, theirs in zip(rows["served"], rows["local"], strict=True):
        assert mine["teacher_logprobs"] == pytest.approx(
            theirs["teacher_logprobs"], abs=LOGP_TOLERANCE
        )
    assert rows["golden served"] == rows["golden local"] != []
