"""Changed files of a model folder: loaded, or refused in one sentence; nothing else."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd import models
from stableopd.data.prompts import encode_prompts
from stableopd.rollout.stops import stop_ids_of
from stableopd.types import ModelError, Prompt, StableOPDError
from tiny import CPU, make_llama, save_model

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 3, 10**9, 10**30, 0.5, 1e300, float("nan")]),
    st.sampled_from(["", "x", "gpt2", "sdpa", "../x", "{{ 1/0 }}", "\ud800"]),
    st.sampled_from([[], [1], ["x"], {}, {"type": "New"}, {"a": [None]}]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_model(tmp_path_factory.mktemp("fuzz") / "model", make_llama())
    shutil.copytree(made, made.with_name("copy"))
    return made.with_name("copy"), {name: json.loads((made / name).read_text()) for name in FILES}


def paths_of(value, path=()):
    """Every place in nested objects, up to the second level."""
    if isinstance(value, dict) and len(path) < 2:
        for key, item in value.items():
            yield (*path, key)
            yield from paths_of(item, (*path, key))


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_changed_files(folder, data):
    at, originals = folder
    name = data.draw(st.sampled_from(FILES))
    changed = json.loads(json.dumps(originals[name]))
    path = data.draw(st.sampled_from(list(paths_of(changed))))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(VALUES)
    else:
        del inner[path[-1]]
    file = at / name
    file.write_text(json.dumps(changed))
    try:
        loaded = models.load(str(at), role="student", dtype=torch.float32, device=CPU)
        stop_ids_of(loaded.model, loaded.tokenizer)
        encode_prompts([Prompt("0", "1+1=")], loaded.tokenizer, "auto", 99, None, 1)
    except StableOPDError as error:
        refusal = str(error)
    else:
        refusal = "none"
    finally:
        file.write_text(json.dumps(originals[name]))
    assert refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "~/none", "./none", "a/b/c", "..", "\\x"])
def test_names_that_are_never_asked_of_the_hub(source, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # a call would be a TypeError
    with pytest.raises(ModelError, match="not a model folder"):
        models.load(source, role="student", dtype=torch.float32, device=CPU)


def test_a_name_next_to_a_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="not a model folder"):
        models.load("runs/mistyped", role="student", dtype=torch.float32, device=CPU)


def test_a_name_that_is_no_folder_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append(name)
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match="there is no folder 'mistyped', so it was taken for"):
        models.load("mistyped", role="student", dtype=torch.float32, device=CPU)
    assert asked == ["mistyped"]


def test_a_hub_name_is_downloaded_and_keeps_its_name(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    hub = save_model(tmp_path / "hub", make_llama())
    (hub / "pytorch_model.bin").write_bytes(b"a pickle")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)

    def download(name, revision, allow_patterns, ignore_patterns):
        assert (name, revision) in (("a/b", None), ("a/b", "0123"))
        for file in hub.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = models.load("a/b", role="student", dtype=torch.float32, device=CPU)
    assert loaded.name == loaded.model.name_or_path == "a/b"
    assert loaded.folders == (snapshot,)
    assert not (snapshot / "pytorch_model.bin").exists()
