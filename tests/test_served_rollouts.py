"""Runs whose rollouts come from a server: weights pushed and checked, and servers that fail.

The server is a fake with the same model (tests/vllm_fake.py), made to go wrong; the real one is in
tests/test_vllm.py.
"""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.testing import assert_close

import parallel_parts
import tiny
from fault_server import said
from parallel_parts import FSDP
from stableopd import models
from stableopd.models import LanguageModel
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.vllm import VllmSampler, _Half
from stableopd.runfolder import RunFolder
from stableopd.training import loop
from stableopd.training.guard import Event
from stableopd.training.serving import serving_weights
from stableopd.types import ModelError, SamplingSettings, ServerError, StopReason
from vllm_fake import fake_vllm

server = parallel_parts.server  # a fixture

SETTINGS = SamplingSettings(max_new_tokens=8, temperature=0.7)
PROMPTS = [("a", (5, 6)), ("b", (7,)), ("c", (5, 6))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture
def fake(world):
    with fake_vllm(world / "student") as found:
        yield found


def configure(world, fake, name="run", **changes):
    fields = {
        "run": {"output": str(world / name), "steps": 3, "save_every": 10},
        "rollout": {"engine": "vllm", "url": fake.url, "patience_s": 0.3, "timeout_s": 120.0},
        "eval": {"data": str(world / "train.jsonl"), "every": 2, "samples": 1, "max_problems": 2},
        "objective": {"beta_reference": 0.1},
    }
    for section, values in changes.items():
        fields.setdefault(section, {}).update(values)
    return tiny.write_config(world, f"{name}.toml", **fields)


def sampler(fake, num_tokens=tiny.V, num_rows=tiny.V, patience_s=60.0):
    return VllmSampler(
        [fake.url],
        tiny.make_tokenizer(),
        (tiny.EOS,),
        num_tokens,
        num_rows,
        timeout_s=120.0,
        patience_s=patience_s,
    )


@pytest.fixture
def loaded(fake, tmp_path):
    """A sampler whose server has taken the weights that it has anyway."""
    fake.model.save_pretrained(tmp_path / "weights")
    found = sampler(fake)
    found.load(tmp_path / "weights")
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CHOICE = st.fixed_dictionaries(
    {
        "index": st.integers(0, 1) | JSON,
        "token_ids": st.lists(st.integers(-1, tiny.V) | JSON, max_size=3) | JSON,
        "logprobs": st.fixed_dictionaries(
            {"token_logprobs": st.lists(st.floats() | st.integers() | JSON, max_size=3) | JSON}
        )
        | JSON,
        "finish_reason": st.sampled_from(["stop", "length", "abort"]) | JSON,
    }
)
CHOICES = st.fixed_dictionaries({"choices": st.lists(CHOICE | JSON, max_size=2) | JSON})


@hypothesis.given(CHOICES, st.integers(1, 2))
@hypothesis.settings(max_examples=400, deadline=None)
def test_any_answer_is_rollouts_or_asked_for_again(answer, n):
    """ModelError is for answers of the right form, whose ids no student has."""
    options = {"timeout_s": 1.0, "patience_s": 0.0}
    one = VllmSampler(["http://127.0.0.1:1/v1"], None, (tiny.EOS,), tiny.V, tiny.V, **options)
    try:
        rows = one._read(answer, {"n": n, "max_tokens": 2})
    except (_Half, ModelError):
        return
    assert len(rows) == n
    for ids, logps in rows:
        assert len(ids) == len(logps)
        assert all(0 <= i < tiny.V for i in ids)
        assert all(x <= 0 for x in logps)


class TestSampler:
    def test_rollouts(self, fake, loaded):
        rollouts = loaded.sample(PROMPTS, 2, SETTINGS, seed=3)
        assert [r.prompt_id for r in rollouts] == ["a", "a", "b", "b", "c", "c"]
        for r in rollouts:
            ids = [*r.prompt_ids, *r.completion_ids]
            logp_TV = (fake.logits(ids) / 0.7).log_softmax(-1)
            for place, (token, logp) in enumerate(
                zip(r.completion_ids, r.sampler_logps, strict=True), start=len(r.prompt_ids) - 1
            ):
                assert logp == pytest.approx(logp_TV[place, token].item(), abs=1e-5)
            stopped = r.completion_ids[-1] == tiny.EOS
            assert r.stop_reason is (StopReason.STOP if stopped else StopReason.LENGTH)
            assert stopped or len(r.completion_ids) == 8
        assert {r.stop_reason for r in rollouts} == set(StopReason)

    def test_every_rollout_has_draws_of_its_own_and_they_can_be_had_again(self, loaded):
        first = loaded.sample(PROMPTS, 4, SETTINGS, seed=3)
        assert first == loaded.sample(PROMPTS, 4, SETTINGS, seed=3)
        assert first != loaded.sample(PROMPTS, 4, SETTINGS, seed=4)
        # Prompts "a" and "c" are the same, and so are the four rollouts of each.
        same = [r.sampler_logps for r in first if r.prompt_ids == (5, 6)]
        assert len(set(same)) > 4

    def test_greedy_is_the_greedy_of_this_process(self, fake, loaded):
        greedy = SamplingSettings(max_new_tokens=8, temperature=0.0)
        here = TransformersSampler(fake.model, tiny.make_tokenizer(), (tiny.EOS,), tiny.V)
        for mine, theirs in zip(
            here.sample(PROMPTS, 1, greedy, 0), loaded.sample(PROMPTS, 1, greedy, 0), strict=True
        ):
            assert mine.completion_ids == theirs.completion_ids
            assert mine.completion == theirs.completion
            assert mine.sampler_logps == pytest.approx(theirs.sampler_logps, abs=1e-5)

    def test_ids_beyond_the_shared_ones_are_never_drawn(self, fake, loaded):
        with torch.no_grad():
            fake.model.lm_head.weight[-1] *= 50  # the likeliest by far, or the least likely
        narrow = sampler(fake, num_tokens=tiny.V - 1)
        narrow._folder, narrow._tag = loaded._folder, loaded._tag
        ids = [i for r in narrow.sample(PROMPTS, 8, SETTINGS, 0) for i in r.completion_ids]
        assert max(ids) < tiny.V - 1
        ids = [i for r in loaded.sample(PROMPTS, 8, SETTINGS, 0) for i in r.completion_ids]
        assert max(ids) == tiny.V - 1

    @pytest.mark.parametrize(
        "half",
        [
            said({}),
            said({"choices": []}),
            said({"choices": [{"index": 0, "token_ids": [], "logprobs": {"token_logprobs": []}}]}),
            "torn",
            said({}, status=500),
            said({}, status=429),
        ],
    )
    def test_half_an_answer_is_asked_for_again(self, fake, loaded, half):
        wanted = loaded.sample(PROMPTS, 1, SETTINGS, 0)
        fake.faults = [half, half]
        assert loaded.sample(PROMPTS, 1, SETTINGS, 0) == wanted
        assert not fake.faults

    def test_half_an_answer_for_ever(self, fake, loaded):
        fake.faults = [said({"choices": []})] * 100
        with pytest.raises(ServerError, match="3 of 3 answers are no rollouts"):
            loaded.sample(PROMPTS, 1, SETTINGS, 0)

    def test_a_server_that_was_started_again_draws_with_the_right_weights(self, fake, loaded):
        other = tiny.make_llama(5, sharp=8)
        other.save_pretrained(loaded._folder)
        loaded._load()
        wanted = loaded.sample(PROMPTS, 2, SETTINGS, 0)
        loads = fake.num_loads
        fake.dies_after = fake.num_written + 1
        assert loaded.sample(PROMPTS, 2, SETTINGS, 0) == wanted
        assert fake.num_loads == loads + 1

    def test_ids_that_the_student_has_not(self, loaded, fake):
        answer = {
            "index": 0,
            "token_ids": [4, tiny.V],
            "logprobs": {"token_logprobs": [-1.0, -1.0]},
            "finish_reason": "length",
        }
        fake.faults = [said({"choices": [answer]})]
        with pytest.raises(ModelError, match=f"wrote token id {tiny.V}.*another model"):
            loaded.sample([PROMPTS[0]], 1, SETTINGS, 0)

    def test_a_server_that_stops_by_itself(self, loaded, fake):
        answer = {
            "index": 0,
            "token_ids": [4, 5],
            "logprobs": {"token_logprobs": [-1.0, -1.0]},
            "finish_reason": "stop",
        }
        fake.faults = [said({"choices": [answer]})]
        with pytest.raises(ModelError, match="not how it was told to stop"):
            loaded.sample([PROMPTS[0]], 1, SETTINGS, 0)


class TestExamine:
    def test_a_server_that_is_right(self, fake):
        assert sampler(fake).examine(longest=128) == "float32"

    @pytest.mark.parametrize("info", [said({}, 404), said({}, 500), said({"vllm_config": {}})])
    def test_a_server_that_says_nothing_of_itself(self, fake, info):
        fake.info = info
        with pytest.raises(ModelError, match=r"cannot take new weights.*vllm_worker"):
            sampler(fake).examine(8)

    @pytest.mark.parametrize("extension", ["", "trl.WeightSyncWorkerExtension"])
    def test_a_server_without_our_extension_is_asked_for_none_of_it(self, fake, extension):
        fake.extension = extension
        with pytest.raises(ModelError, match=r"its worker extension is.*vllm_worker"):
            sampler(fake).examine(8)
        assert "/collective_rpc" not in {path for path, *_ in fake.server.asked}

    def test_other_things_that_are_wrong(self, fake):
        with pytest.raises(ModelError, match="it is another model"):
            sampler(fake, num_rows=tiny.V + 1).examine(8)
        with pytest.raises(Exception, match="--max-model-len 129"):
            sampler(fake).examine(129)
        fake.about["logprobs"] = "raw_logprobs"
        with pytest.raises(ModelError, match="--logprobs-mode=processed_logprobs"):
            sampler(fake).examine(8)
        fake.is_down = True
        with pytest.raises(ServerError, match=r"given no answer for 0\.3 s"):
            sampler(fake, patience_s=0.3).examine(8)


class TestWeights:
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_an_adapter_are_those_that_peft_merges(self, tied):
        def adapted():
            model = tiny.make_llama(0, tie_word_embeddings=tied)
            student = models.add_lora(LanguageModel("", model, None, None), 2, 4, "all-linear")
            with torch.no_grad():
                torch.manual_seed(1)
                for parameter in student.model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_()
            return student

        found = serving_weights(adapted(), keeps=True, dtype=torch.float32)
        merged = adapted().model.merge_and_unload().state_dict()
        assert found.keys() == merged.keys()
        for name, weight in merged.items():
            assert_close(found[name], weight)
        assert (found["lm_head.weight"] is found["model.embed_tokens.weight"]) is tied

    @pytest.mark.parametrize("tied", [True, False])
    def test_shifted_ids_mean_what_the_ids_meant(self, tied):
        model = tiny.make_llama(0, sharp=8, tie_word_embeddings=tied)
        student = LanguageModel("", model, None, None)
        weights = serving_weights(student, keeps=True, dtype=torch.float32, is_shifted=True)
        shifted = tiny.make_llama(3, tie_word_embeddings=tied)
        shifted.load_state_dict(weights)
        ids_BT = torch.tensor([[3, 5, 7, tiny.V - 1, 4]])
        with torch.no_grad():
            wanted = model(input_ids=ids_BT).logits
            found = shifted(input_ids=(ids_BT + 1) % tiny.V).logits.roll(-1, dims=-1)
        assert_close(found, wanted)


class TestRuns:
    def test_a_run(self, world, fake):
        code, _, err = tiny.run_cli("train", configure(world, fake, "served"))
        assert code == 0, err
        lines = RunFolder.open(world / "served").metrics()
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        for line in lines[1:]:
            assert line["mismatch/kl"] < 1e-8
            assert line["mismatch/served"] < 1e-5
            assert line["time/sync_s"] > 0
        # The trial, the start, and before steps 2 and 3 and the two evaluations behind updates.
        assert fake.num_loads == 2 + 3
        final = models.load(
            str(world / "served" / "checkpoints" / "000003"),
            role="student",
            dtype=torch.float32,
            device=tiny.CPU,
        )
        for name, weight in final.model.named_parameters():
            assert_close(fake.model.get_parameter(name), weight, rtol=0, atol=0)
        assert not (world / "served.served").exists()

    def test_a_server_that_is_started_again_changes_nothing(self, world, fake):
        assert tiny.run_cli("train", configure(world, fake, "calm"))[0] == 0
        fake.start()
        fake.dies_after = fake.num_written + 15
        assert tiny.run_cli("train", configure(world, fake, "killed"))[0] == 0
        assert fake.num_written > fake.dies_after
        assert tiny.metrics_of(world / "killed") == tiny.metrics_of(world / "calm")

    def test_a_server_that_stays_away(self, world, fake, monkeypatch):
        file = configure(world, fake, "away")
        make_step = loop.make_step

        def step_and_die(*args, **options):
            fake.is_down = len(RunFolder.open(world / "away").metrics()) == 2
            return make_step(*args, **options)

        monkeypatch.setattr(loop, "make_step", step_and_die)
        code, _, err = tiny.run_cli("train", file, "--set", "eval.every=3")
        assert code == 2
        assert "step 3: rollout.url" in err
        assert "The student after step 2 is saved: go on with --resume." in err
        assert RunFolder.open(world / "away").checkpoints() == [2]
        assert not (world / "away.served").exists()
        fake.is_down = False
        fake.start()
        monkeypatch.undo()
        code, _, err = tiny.run_cli("train", file, "--resume", "--set", "eval.every=3")
        assert code == 0, err
        assert tiny.run_cli("train", file, "--set", f"run.output={world / 'calm3'}",
                            "--set", "eval.every=3")[0] == 0  # fmt: skip
        lines, wanted = tiny.metrics_of(world / "away"), tiny.metrics_of(world / "calm3")
        # What a server says of the probes differs in the last digits.
        gaps = [[line.pop("mismatch/served", 0) for line in both] for both in (lines, wanted)]
        assert max(map(max, gaps)) < 1e-6
        assert lines == wanted

    @pytest.mark.parametrize("stays", ["all", "head"])
    def test_weights_that_stay_are_seen_before_the_first_step(self, world, fake, stays):
        fake.loads = stays
        code, _, err = tiny.run_cli("train", configure(world, fake, f"stale-{stays}"))
        assert code == 2
        assert "took a trial of new weights, but its log-probs" in err
        assert not (world / f"stale-{stays}").exists()

    def test_a_folder_for_weights_that_is_none(self, world, fake):
        file = configure(world, fake, "file", rollout={"weights_dir": str(world / "train.jsonl")})
        code, _, err = tiny.run_cli("train", file)
        assert code == 2
        assert f"{world / 'train.jsonl'}/" in err
        assert "cannot be written" in err

    def test_a_server_that_comes_back_as_another(self, world, fake, monkeypatch):
        """Its weights are pushed again, and this push is checked as any other."""
        make_step = loop.make_step

        def step_and_break(*args, **options):
            fake.loads = "all"
            fake.dies_after = fake.num_written + 2
            return make_step(*args, **options)

        monkeypatch.setattr(loop, "make_step", step_and_break)
        # The update itself is too small to be seen; what the server begins with is another model.
        fake.folder = tiny.save_model(world / "another", tiny.make_llama(9, sharp=8))
        file = configure(world, fake, "another-run", optimizer={"learning_rate": 1e-9})
        code, _, err = tiny.run_cli("train", file, "--set", "eval.every=3")
        assert code == 2
        assert "step 2: rollout.url" in err
        assert "took the student's weights, but its log-probs" in err

    def test_weights_that_stay_later(self, world, fake, monkeypatch):
        make_step = loop.make_step

        def step_and_break(*args, **options):
            fake.loads = "all"
            return make_step(*args, **options)

        monkeypatch.setattr(loop, "make_step", step_and_break)
        file = configure(world, fake, "late", optimizer={"learning_rate": 1e-2})
        code, _, err = tiny.run_cli("train", file, "--set", "eval.every=3")
        assert code == 2
        assert "step 2: rollout.url" in err
        assert "took the student's weights, but its log-probs" in err
        assert RunFolder.open(world / "late").checkpoints() == [1]

    def test_a_rollback_is_pushed(self, world, fake, monkeypatch):
        back = Event(2, "collapse", "a test", "rollback", 0, 1.0, 0.1)
        ask = loop.ask

        def rolls_back(guard, line, *rest):
            guard, event, marks = ask(guard, line, *rest)
            return guard, back if line["step"] == 2 else event, marks

        monkeypatch.setattr(loop, "ask", rolls_back)
        file = configure(world, fake, "back", optimizer={"learning_rate": 1e-2})
        code, _, err = tiny.run_cli("train", file, "--set", "alarm.action=rollback")
        assert code == 0, err
        lines = RunFolder.open(world / "back").metrics()
        assert lines[3]["mismatch/kl"] < 1e-8

    @pytest.mark.parametrize(
        ("environment", "rank"),
        [({}, 0), (FSDP, 0), (FSDP, 2)],
        ids=["copies", "sharded", "sharded adapter"],
    )
    def test_two_processes_draw_what_one_draws(self, world, fake, server, environment, rank):
        name = f"two-{rank}-{len(environment)}"
        lora = ("--set", f"student.lora_rank={rank}")
        code, _, err = tiny.run_cli("train", configure(world, fake, f"{name}-one"), *lora)
        assert code == 0, err
        file = configure(world, fake, name)
        codes, errors = server.train(file, *lora, environment=environment)
        assert codes == [0, 0], errors
        for line, wanted in zip(
            tiny.metrics_of(world / name), tiny.metrics_of(world / f"{name}-one"), strict=True
        ):
            assert line.keys() == wanted.keys()
            for key, value in wanted.items():
                near = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)
                assert line[key] == near, key
        for step in (1, 2, 3):
            rows, others = (
                RunFolder.open(world / folder).rollouts(step) for folder in (name, f"{name}-one")
            )
            ids = [[row["completion_ids"] for row in found] for found in (rows, others)]
            assert ids[0] == ids[1], json.dumps(ids)
