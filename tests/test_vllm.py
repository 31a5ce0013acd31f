"""Rollouts from real vLLM servers: the right distribution, and the student's weights at any time.

Servers take half a minute and 3 GB each, so that the tests of a module share them, one at a time.
"""

import statistics

import pytest
import torch

import tiny
import vllm_parts
from stableopd import embedded
from stableopd.models import LanguageModel
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.vllm import VllmSampler
from stableopd.runfolder import RunFolder
from stableopd.training import loop
from stableopd.training.serving import serving_weights
from stableopd.types import ModelError, SamplingSettings, StopReason

pytestmark = pytest.mark.vllm

PROMPTS = [("a", (5, 6)), ("b", (7, 8, 3)), ("c", (5, 6))]
TOLERANCE = 1e-4
WIDTH = 128  # four heads of 32: vLLM's attention on CPUs has no heads of 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose student has one weight for its embedding and its head."""
    folder = tiny.make_world(tmp_path_factory.mktemp("world") / "w")
    tiny.save_model(
        folder / "student", tiny.make_llama(0, width=WIDTH, sharp=1.5, tie_word_embeddings=True)
    )
    return folder


def serving(folder, log, *options):
    server = vllm_parts.Server(folder, log, *options)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="class")
def tied(world):
    yield from serving(world / "student", world / "tied.log")


@pytest.fixture(scope="class")
def student(tmp_path_factory):
    """The embedded student with heads that vLLM computes; its head has weights of its own."""
    return vllm_parts.prepare(tmp_path_factory.mktemp("embedded") / "student")


@pytest.fixture(scope="class")
def untied(student):
    yield from serving(student, student.parent / "untied.log")


@pytest.fixture(scope="class")
def plain(world):
    extension = "--worker-extension-cls=vllm_parts.PlainWeightUpdates"
    yield from serving(world / "student", world / "plain.log", extension)


def sampler(server, rows, num_tokens=None):
    tokenizer = tiny.make_tokenizer()
    return VllmSampler(
        [server.url],
        tokenizer,
        (tiny.EOS, tiny.END),
        num_tokens or rows,
        rows,
        timeout_s=600.0,
        patience_s=600.0,
    )


def logps_of(model, ids, temperature=1.0):
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0] / temperature
    return logits_TV.log_softmax(-1)


def push(found, model, folder):
    """Send weights as a run does."""
    student = LanguageModel("", model, None, None)
    weights = serving_weights(student, keeps=True, dtype=torch.float32)
    model.save_pretrained(folder, state_dict=weights)
    found.load(folder)


def check_distribution(found, model, settings, allowed):
    """Log-probs are those of the model at that temperature, over the ids that may be drawn."""
    rollouts = found.sample(PROMPTS, 4, settings, seed=5)
    assert len(rollouts) == 12
    for r in rollouts:
        logp_TV = logps_of(model, (*r.prompt_ids, *r.completion_ids), settings.temperature or 1.0)
        logp_TV = logp_TV[:, :allowed].log_softmax(-1)[len(r.prompt_ids) - 1 : -1]
        if settings.top_k:
            lowest_T1 = logp_TV.topk(settings.top_k).values[:, -1:]
            logp_TV = logp_TV.masked_fill(logp_TV < lowest_T1, -torch.inf).log_softmax(-1)
        wanted = logp_TV.gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        assert r.sampler_logps == pytest.approx(wanted.tolist(), abs=TOLERANCE)
        stopped = r.completion_ids[-1] in (tiny.EOS, tiny.END)
        assert not set(r.completion_ids[:-1]) & {tiny.EOS, tiny.END}
        assert r.stop_reason is (StopReason.STOP if stopped else StopReason.LENGTH)
        assert stopped or len(r.completion_ids) == settings.max_new_tokens
    again = found.sample(PROMPTS, 4, settings, seed=5)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]
    same = [r.completion_ids for r in rollouts if r.prompt_ids == (5, 6)]
    assert len(set(same)) > 4 or not settings.temperature
    return rollouts


def check_server(server, first, second, folder):
    """Sampling, scoring, two updates and a server's own cache, with the models of one shape."""
    rows = first.get_output_embeddings().weight.shape[0]
    found = sampler(server, rows)
    assert found.examine(128) == "float32"
    drawn = []
    for number, model in enumerate((first, second, first)):
        push(found, model, folder / str(number))
        drawn.append(check_distribution(found, model, SamplingSettings(12), rows))
        ids = (*range(3, rows), *range(rows - 1, 2, -1))
        wanted = logps_of(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert found.token_logps([ids])[0][0] == pytest.approx(wanted.tolist(), abs=TOLERANCE)
    # The prompts were the same: nothing of the second model is left of them in the cache.
    assert [r.completion_ids for r in drawn[2]] == [r.completion_ids for r in drawn[0]]
    check_distribution(found, first, SamplingSettings(12, temperature=0.6), rows)
    check_distribution(found, first, SamplingSettings(12, top_k=3), rows)
    narrow = sampler(server, rows, rows - 4)
    narrow._folder, narrow._tag = found._folder, found._tag
    check_distribution(narrow, first, SamplingSettings(12, temperature=2.0), rows - 4)
    greedy = SamplingSettings(12, temperature=0.0)
    here = TransformersSampler(first, tiny.make_tokenizer(), (tiny.EOS, tiny.END), rows)
    for mine, theirs in zip(
        here.sample(PROMPTS, 1, greedy, 0), found.sample(PROMPTS, 1, greedy, 0), strict=True
    ):
        assert mine.completion_ids == theirs.completion_ids
        assert mine.sampler_logps == pytest.approx(theirs.sampler_logps, abs=TOLERANCE)


def configure(world, server, name, **changes):
    fields = {
        "run": {"output": str(world / name), "steps": 3, "save_every": 10},
        "rollout": {"engine": "vllm", "url": server.url, "timeout_s": 600.0, "patience_s": 5.0},
        "objective": {"beta_reference": 0.1},
    }
    for section, values in changes.items():
        fields.setdefault(section, {}).update(values)
    return tiny.write_config(world, f"{name}.toml", **fields)


def check_lines(lines):
    for line in lines:
        assert line["mismatch/served"] < TOLERANCE
        assert line["mismatch/kl"] < 1e-6


class TestTied:
    def test_server(self, world, tied, tmp_path):
        first, second = (
            tiny.make_llama(seed, width=WIDTH, sharp=1.5, tie_word_embeddings=True)
            for seed in (0, 7)
        )
        check_server(tied, first, second, tmp_path)

    def test_another_vocabulary(self, world, tied):
        tiny.save_model(world / "wide", tiny.make_llama(0, width=WIDTH, rows=tiny.V + 1))
        file = configure(world, tied, "other", student={"model": str(world / "wide")})
        code, _, err = tiny.run_cli("train", file)
        assert code == 2
        assert f"a model with {tiny.V} token ids, but the student has {tiny.V + 1}" in err

    def test_an_adapter(self, world, tied):
        code, _, err = tiny.run_cli(
            "train", configure(world, tied, "lora", student={"lora_rank": 2})
        )
        assert code == 0, err
        check_lines(RunFolder.open(world / "lora").metrics())

    def test_a_server_that_is_killed(self, world, tied, monkeypatch):
        """The run waits, ends with its student saved, and goes on when the server is back."""
        make_step = loop.make_step
        steps = []

        def step_and_kill(*args, **options):
            steps.append(None)
            if len(steps) == 2:
                tied.kill()
            return make_step(*args, **options)

        monkeypatch.setattr(loop, "make_step", step_and_kill)
        file = configure(world, tied, "killed")
        code, _, err = tiny.run_cli("train", file)
        assert code == 2
        assert "has given no answer for 5 s" in err
        assert "The student after step 2 is saved: go on with --resume." in err
        assert RunFolder.open(world / "killed").checkpoints() == [2]
        monkeypatch.undo()
        tied.start()  # the run waits until it is up
        code, _, err = tiny.run_cli(
            "train", file, "--resume", "--set", f"rollout.patience_s={vllm_parts.PATIENCE_S}"
        )
        assert code == 0, err
        lines = RunFolder.open(world / "killed").metrics()
        assert [line["step"] for line in lines] == [1, 2, 3]
        check_lines(lines)


class TestPlain:
    def test_a_missing_method_is_not_called(self, world, plain, monkeypatch):
        """That would end the server; here the name of the extension is another than the wanted."""
        monkeypatch.setattr("stableopd.rollout.vllm.EXTENSION", "OtherUpdates")
        with pytest.raises(ModelError, match=r"its worker extension is 'vllm_parts\.Plain"):
            sampler(plain, tiny.V).examine(8)
        monkeypatch.undo()
        assert sampler(plain, tiny.V).examine(8) == "float32"

    def test_a_tied_head_that_stays_is_seen(self, world, plain):
        """A plain reload answers 200, and the head goes on with its old weights.

        It is packed when it is first used: the trial of a fresh server may take, and the weights
        behind it do not.
        """
        code, _, err = tiny.run_cli("train", configure(world, plain, "plain"))
        assert code == 2
        assert "weights, but its log-probs of" in err
        assert not (world / "plain").exists()


class TestUntied:
    def test_the_student_is_the_embedded_one(self, student):
        ids = torch.arange(3, 18)
        wanted = logps_of(tiny.LlamaForCausalLM.from_pretrained(embedded.path("student")), ids)
        found = logps_of(tiny.LlamaForCausalLM.from_pretrained(student), ids)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_server(self, untied, student, tmp_path):
        first = tiny.LlamaForCausalLM.from_pretrained(student).eval()
        second = tiny.LlamaForCausalLM.from_pretrained(student).eval()
        with torch.no_grad():
            for weight in second.parameters():
                weight += 0.02 * torch.randn_like(weight)
        check_server(untied, first, second, tmp_path)

    def test_a_run_learns_as_one_without_a_server(self, untied, student, tmp_path):
        """Twenty steps of the embedded pair; the draws differ, and the curves do not."""
        runs = {}
        for name, rollout in {"here": {}, "served": {"engine": "vllm", "url": untied.url}}.items():
            file = tiny.write_config(
                tmp_path,
                f"{name}.toml",
                run={"output": str(tmp_path / name), "steps": 20, "save_every": 20},
                student={"model": str(student)},
                teacher={"model": "embedded"},
                data={"train": "embedded", "answer_marker": ";#"},
                rollout={"prompts_per_step": 16, "max_new_tokens": 48, **rollout},
                optimizer={"learning_rate": 1e-3},
                eval={"data": "embedded", "every": 20, "samples": 1, "max_problems": 200},
            )
            code, _, err = tiny.run_cli("train", file)
            assert code == 0, err
            runs[name] = RunFolder.open(tmp_path / name).metrics()
        check_lines(runs["served"][1:])
        start = [runs[name][0] for name in ("here", "served")]
        error = max(line["eval/accuracy_se"] for line in start)
        assert abs(start[0]["eval/accuracy"] - start[1]["eval/accuracy"]) < 6 * error
        for name in ("loss/golden", "logp/student_mean"):
            here, served = (
                [statistics.fmean(line[name] for line in runs[run][place]) for place in
                 (slice(1, 4), slice(-3, None))]
                for run in ("here", "served")
            )  # fmt: skip
            change = here[1] - here[0]
            assert abs(served[1] - here[1]) < 0.5 * abs(change), (name, here, served)
