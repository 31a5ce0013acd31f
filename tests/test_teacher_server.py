"""Served teachers: the same numbers as in this process, and every way in which they may fail."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fault_server import said, serving
from served_parts import vllm_like
from stableopd.endpoint import Endpoint
from stableopd.objective.logprobs import score_tokens
from stableopd.teacher.local import FrozenModel
from stableopd.teacher.selftest import self_test
from stableopd.teacher.server import ServedTeacher, ServedTeachers, find_model
from stableopd.training.batch import collate, rollout_sequences
from stableopd.training.step import step
from stableopd.training.terms import Players, Work
from stableopd.types import ModelError, ServerError
from step_parts import MAX_LENGTH, STOPS, flat, make_golden, make_rollouts, model, objective
from tiny import (
    CHARACTERS,
    END,
    EOS,
    PAD,
    VOCABULARY,
    V,
    make_llama,
    make_tokenizer,
)


def teacher_at(*urls, event_ids=STOPS, top_k=0):
    endpoint = Endpoint(urls, timeout_s=20, patience_s=0, max_in_flight=4, name="teacher")
    return ServedTeacher(endpoint, "tiny", event_ids, top_k)


def items_of(rollouts):
    return [(r.prompt_ids, r.completion_ids) for r in rollouts]


def frozen_logps(teacher, rollouts, event):
    """What the teacher in this process says, as lists."""
    batch = collate(rollout_sequences(rollouts), PAD, torch.device("cpu"))
    frozen = FrozenModel(teacher, V)
    stops = torch.tensor(STOPS)
    scores = score_tokens(
        frozen.hidden(batch), frozen.head, batch.target_N, stop_ids=stops, stop_is_event=event
    )
    lengths = [len(r.completion_ids) for r in rollouts]
    return [part.tolist() for part in scores.logp_N.split(lengths)]


@pytest.mark.parametrize("event", [True, False])
def test_the_same_log_probs_as_in_this_process(event):
    teacher, rollouts = model(1, 48), make_rollouts()
    with serving(vllm_like(teacher)) as server:
        judged = teacher_at(server.url, event_ids=STOPS if event else ()).judge(items_of(rollouts))
        bodies = [body for _, body, _ in server.asked]
    for one, values in zip(judged, frozen_logps(teacher, rollouts, event), strict=True):
        assert one.logps == pytest.approx(values, abs=1e-5)
        assert one.top_ids is None
    # Each of the four that stopped is asked again with the other stop, and nothing else is.
    assert len(bodies) == len(rollouts) + 4 * event
    assert {body["prompt"][-1] for body in bodies[len(rollouts) :]} <= {EOS, END}


@pytest.mark.parametrize(
    ("method", "fields", "stops"),
    [
        ("stable_opd", {}, STOPS),
        ("opd", {"updates_per_batch": 2, "advantage": "tanh"}, STOPS),
        ("gkd", {"top_k": 4}, (EOS,)),
        ("gkd", {"top_k": 4, "divergence": "forward_kl"}, (EOS,)),
        ("gkd", {"top_k": V - 1}, STOPS),  # all tokens are known, and the two stops are one
    ],
)
def test_the_same_step_as_with_a_teacher_in_this_process(method, fields, stops):
    chosen, teacher = objective(method, **fields), model(1, 48)
    rollouts = make_rollouts()
    top_k = min(V, chosen.top_k + len(stops) - 1) if chosen.top_k else 0
    with serving(vllm_like(teacher)) as server:
        judged = teacher_at(server.url, event_ids=stops, top_k=top_k).judge(items_of(rollouts))
    found = []
    for local, said_ in ((FrozenModel(teacher, V), None), (None, judged)):
        student = model(0)
        who = Players(
            student=student,
            num_tokens=V,
            teacher=local,
            reference=FrozenModel(model(2), V) if chosen.beta_reference else None,
            stop_ids=torch.tensor(stops),
            stop_is_event=True,
            temperature=1.0,
            pad_id=PAD,
        )
        work = Work(chosen, rollouts, make_golden(), None, MAX_LENGTH, said_)
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        result = step(who, optimizer, work, micro_batch_tokens=40, grad_clip=1e9)
        found.append((result, flat(student)))
    (mine, weights), (theirs, served_weights) = found
    assert theirs.losses == pytest.approx(mine.losses, rel=1e-5)
    assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=1e-5)
    torch.testing.assert_close(served_weights, weights, rtol=1e-4, atol=1e-6)
    assert theirs.teacher_logps == tuple(pytest.approx(x, abs=1e-5) for x in mine.teacher_logps)
    # What needs the whole distribution is left out, and nothing else.
    missing = {"entropy/teacher", "entropy/gap", "overlap/ratio", "overlap/advantage"}
    assert set(mine.token_means) - set(theirs.token_means) == missing


def changed(change):
    """A server whose answers to scoring are changed."""

    def of(path, body, found):
        return change(found) if "prompt_logprobs" in body else None

    return vllm_like(make_llama(1), change=of)


def put(value):
    def change(found):
        for entry in found["choices"][0]["prompt_logprobs"][1:]:
            for token in entry.values():
                token["logprob"] = value
        return said(found)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: said({"choices": [{"text": "x"}]}), "have no prompt_logprobs"),
        (lambda found: said({"choices": []}), "have no prompt_logprobs"),
        (lambda found: said({"error": "odd"}), "have no prompt_logprobs"),
        (
            lambda found: said(
                {"choices": [{"prompt_logprobs": found["choices"][0]["prompt_logprobs"][:-1]}]}
            ),
            "must not cut prompts off",
        ),
        (
            lambda found: said({"choices": [{"prompt_logprobs": [{"a": 1}] * 5}]}),
            "gave no log-prob of token",
        ),
        (put(-9999.0), "which is none or not finite"),
        (put(math.nan), "which is none or not finite"),
        (put(3.5), "--logprobs-mode"),
        (put("x"), "gave no log-prob of token"),
        (put(True), "gave no log-prob of token"),
        (put(None), "gave no log-prob of token"),
        (put(10**400), "gave no log-prob of token"),
        (put(-math.inf), "which is none or not finite"),
        (lambda found: said({"choices": {"0": 1}}), "have no prompt_logprobs"),
        (lambda found: said({"choices": [{"prompt_logprobs": [5] * 5}]}), "gave no log-prob"),
        (lambda found: said({"message": "max_logprobs is 20"}, 400), "400: max_logprobs is 20"),
    ],
)
def test_answers_that_are_none(change, words):
    with serving(changed(change)) as server, pytest.raises(ServerError, match=words) as found:
        teacher_at(server.url).judge([((3, 4), (5, 6, EOS))])
    assert "\n" not in str(found.value)


def test_fewer_likeliest_tokens_than_asked_for():
    with serving(vllm_like(make_llama(1))) as server:
        script = server.script
        server.script = lambda path, body: script(path, {**body, "prompt_logprobs": 2})
        with pytest.raises(ServerError, match="--max-logprobs 8 or more"):
            teacher_at(server.url, top_k=8).judge([((3, 4), (5, 6))])


@pytest.mark.parametrize("token", [str(V), str(10**30), "-1", "05", " 5", "\u0665", "x"])
def test_likeliest_tokens_that_are_none(token):
    def more(found):
        for entry in found["choices"][0]["prompt_logprobs"][1:]:
            entry[token] = {"logprob": -0.01}
        return said(found)

    with serving(changed(more)) as server, pytest.raises(ServerError, match="token id"):
        dataclasses.replace(teacher_at(server.url, top_k=2), num_tokens=V).judge([((3,), (5, 6))])


NAMES = "choices prompt_logprobs logprob data id root parent max_model_len decoded_token 5 6"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES.split()) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)
ENTRIES = st.lists(JSON, min_size=3, max_size=3)
SCORES = st.dictionaries(
    st.sampled_from(["5", "6", "7", "99", "x"]),
    st.fixed_dictionaries({"logprob": st.floats() | st.integers() | JSON}) | JSON,
    max_size=4,
)
ANSWERS = st.one_of(
    JSON,
    st.builds(lambda rows: {"choices": [{"prompt_logprobs": rows}]}, ENTRIES),
    st.builds(
        lambda rows: {"choices": [{"prompt_logprobs": [None, *rows]}]},
        st.lists(SCORES, min_size=2, max_size=2),
    ),
)


@hypothesis.given(ANSWERS, st.sampled_from([0, 2]))
@hypothesis.settings(max_examples=400, deadline=None)
def test_any_answer_is_scores_or_one_error(answer, top_k):
    teacher = dataclasses.replace(teacher_at("http://127.0.0.1:1/v1", top_k=top_k), num_tokens=V)
    try:
        judged = teacher._judged(answer, [4, 5, 6], 1)
        entries = teacher.entries(answer, (4, 5, 6))
        texts = [teacher.text_of(e, t) for e, t in zip(entries[1:], (5, 6), strict=True)]
    except ServerError as error:
        told = str(error)
    else:
        told = ""
        assert all(-9000 < x <= 0 for x in judged.logps)
        assert all(isinstance(text, str) for text in texts)
        if top_k:
            assert judged.top_ids.shape == judged.top_logps.shape == (2, 2)
            assert ((judged.top_ids >= 0) & (judged.top_ids < V)).all()
            assert (judged.top_logps <= 0).all()
    assert told.isprintable()


@hypothesis.given(JSON, st.sampled_from(["", "a"]))
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_list_of_models_is_one_name_or_one_error(data, wanted):
    with serving(lambda path, body: said({"data": data})) as server:
        told = ""
        try:
            name, context = find_model(teacher_at(server.url).endpoint, wanted)
        except (ServerError, ModelError) as error:
            told = str(error)
        else:
            assert name
            assert context is None or context > 0
    assert told.isprintable()


PROMPTS = [(3, 4, 5, 6), (7, 8, 9)]


def test_self_test_of_replicas_that_agree():
    with serving(vllm_like(make_llama(1))) as one, serving(vllm_like(make_llama(1))) as two:
        (note,) = self_test(
            ServedTeachers({None: teacher_at(one.url, two.url)}), make_tokenizer(), PROMPTS
        )
    assert "same tokenizer, replicas agree to" in note


def examine(*scripts):
    with serving(scripts[0]) as one, serving(scripts[-1]) as two:
        served = ServedTeachers({None: teacher_at(one.url, two.url)})
        with pytest.raises(ModelError) as found:
            self_test(served, make_tokenizer(), PROMPTS)
    assert str(found.value).startswith("teacher: ")
    return str(found.value).replace(two.url, "SECOND")


def test_self_test_asks_for_as_many_log_probs_as_the_run_will():
    """The server refuses what is too much, or gives fewer; both name the option and the number."""

    def limited(path, body, found):
        asks = body.get("prompt_logprobs", 0)
        return said({"message": f"{asks} were asked for, at most 4"}, 400) if asks > 4 else None

    def few(path, body):
        return whole(path, body | {"prompt_logprobs": min(2, body["prompt_logprobs"])})

    whole = vllm_like(make_llama(1))
    for script in (vllm_like(make_llama(1), change=limited), few):
        with serving(script) as server:
            served = ServedTeachers({None: teacher_at(server.url, top_k=8)})
            with pytest.raises((ModelError, ServerError), match="--max-logprobs 8"):
                self_test(served, make_tokenizer(), PROMPTS)


def test_a_replica_that_changes_is_noticed_behind_the_scores():
    """Also where its name, its tokens and its connection stay as they were."""
    models = [vllm_like(make_llama(1, sharp=8)), vllm_like(make_llama(2, sharp=8))]
    serves = [0]
    with (
        serving(lambda path, body: models[serves[0]](path, body)) as one,
        serving(models[0]) as two,
    ):
        served = ServedTeachers({None: teacher_at(one.url, two.url)})
        self_test(served, make_tokenizer(), PROMPTS)
        asked = [(None, ((3, 4), (5, 6, EOS)))]
        served.judge(asked)
        serves[0] = 1
        with pytest.raises(ServerError, match="another model") as found:
            served.judge(asked)
        assert one.url in str(found.value)
        serves[0] = 0
        served.judge(asked)


def test_a_replica_that_is_gone_is_passed_by():
    script = vllm_like(make_llama(1))
    with serving(script) as one:
        with serving(script) as two:
            served = ServedTeachers({None: teacher_at(one.url, two.url)})
            self_test(served, make_tokenizer(), PROMPTS)
        served.by_name[None].require_unchanged()


def test_self_test_of_replicas_that_differ():
    message = examine(vllm_like(make_llama(1, sharp=8)), vllm_like(make_llama(2, sharp=8)))
    assert "and SECOND score the same 6 tokens differently, by" in message


def test_self_test_of_another_tokenizer():
    swapped = {**VOCABULARY, "4": VOCABULARY["5"], "5": VOCABULARY["4"]}
    message = examine(vllm_like(make_llama(1)), vllm_like(make_llama(1), make_tokenizer(swapped)))
    assert "SECOND has another tokenizer than the student: of a test text, token" in message
    extra = make_tokenizer()
    extra.add_tokens(["we had"])
    rows = len(extra)
    message = examine(vllm_like(make_llama(1)), vllm_like(make_llama(1, rows=rows), extra))
    assert "another tokenizer" in message


def test_self_test_of_another_vocabulary():
    """Ids that no text of the test reaches."""
    renamed = {("<stop>" if t == "<end>" else t): i for t, i in VOCABULARY.items()}
    message = examine(vllm_like(make_llama(1)), vllm_like(make_llama(1), make_tokenizer(renamed)))
    assert "another vocabulary than the student: id 2 is '<end>' to the student" in message


@pytest.mark.parametrize(
    ("cards", "wanted", "found"),
    [
        ([{"id": "a"}], "", "a"),
        ([{"id": "a"}, {"id": "lora", "parent": "a"}], "", "a"),
        ([{"id": "a"}, {"id": "lora", "parent": "a"}], "lora", "lora"),
        ([{"id": "a", "root": "r"}, {"id": "b", "root": "r"}], "", "a"),
        ([], "named", "named"),
        ([{"id": "a"}, {"id": "b"}], "", "serves 'a', 'b'; give"),
        ([{"id": "a"}], "b", "serves 'a', not 'b'; give"),
        ([], "", "serves no model; give"),
    ],
)
def test_the_name_of_the_model(cards, wanted, found):
    with serving(lambda path, body: said({"data": cards})) as server:
        endpoint = teacher_at(server.url).endpoint
        if "serves" in found:
            with pytest.raises(ModelError, match=found):
                find_model(endpoint, wanted)
        else:
            assert find_model(endpoint, wanted) == (found, None)


def test_characters_of_the_test_text_are_there():
    """Else the self-test with this tokenizer would compare unknown tokens alone."""
    assert set("2024 3") - {" "} <= set(CHARACTERS)
