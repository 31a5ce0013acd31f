import json
import string
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stableopd.config import DataConfig
from stableopd.data.prompts import encode_prompts, load_prompts, prompts_of_step, render
from stableopd.types import DataError, Message, Prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GOOD = {"prompt": "1+1=", "solution": "it is 2", "answer": "2"}


def load(source, split="train", needs_solution=False, needs_answer=False, max_rows=0, **columns):
    return load_prompts(
        str(source),
        DataConfig(**columns),
        split=split,
        needs_solution=needs_solution,
        needs_answer=needs_answer,
        max_rows=max_rows,
    )


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_tokenizer():
    """A tokenizer of characters; `template` says what stands around a text."""

    def make(template="$A", chat_template=None):
        words = ["<unk>", "<s>", "</s>", *string.printable]
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        core.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


def chars(text):
    return tuple(3 + string.printable.index(c) for c in text)


def test_jsonl_with_ids_blank_lines_a_bom_and_numbers(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"prompt": "a", "answer": 4, "id": 17},
        {"prompt": " b ", "answer": 0.5, "solution": "s\n", "other": [1]},
        {"prompt": "é", "answer": "  ", "id": None},
    ]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())
    assert load(path) == [
        Prompt("17", "a", None, "4"),
        Prompt("train.jsonl:3", " b ", "s\n", "0.5"),
        Prompt("train.jsonl:5", "é", None, None),
    ]


def test_columns_can_be_named_and_nested(tmp_path):
    row = {
        "question": [{"role": "system", "content": "S"}, {"role": "user", "content": "U", "x": 1}],
        "reward_model": {"ground_truth": "7", "style": {"deep.name": "text"}},
        "a.b": "literal",
    }
    path = write_lines(tmp_path / "d.json", row)
    (prompt,) = load(
        path,
        prompt="question",
        answer="reward_model.ground_truth",
        solution="reward_model.style.deep.name",
        needs_solution=True,
        needs_answer=True,
    )
    messages = (Message("system", "S"), Message("user", "U"))
    assert prompt == Prompt("d.json:1", messages, "text", "7")
    assert load(path, prompt="a.b", solution="", answer="")[0].prompt == "literal"


def test_an_unnamed_column_is_not_read(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "a", "solution": ["x"], "answer": {}})
    assert load(path, solution="", answer="") == [Prompt("d.jsonl:1", "a")]


def test_max_rows_reads_no_further(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nnot json\n')
    assert [p.prompt for p in load(path, max_rows=2)] == ["a", "b"]
    with pytest.raises(DataError, match="line 3"):
        load(path, max_rows=3)


@pytest.mark.parametrize(
    ("line", "needs", "message"),
    [
        ("{", {}, r"line 2: not valid JSON \(.*, at character 2\); write one"),
        ("[" * 100_000, {}, "line 2: JSON that is too large"),
        ('{"prompt": ' + "9" * 5000 + "}", {}, "line 2: JSON that is too large"),
        ('["a"]', {}, r"line 2: JSON, but not an object \(list\)"),
        ("{}", {}, r"line 2: no column 'prompt' \(its columns are none\).*data\.prompt"),
        ('{"text": "a", "b": 1}', {}, r"no column 'prompt' \(its columns are 'text', 'b'\)"),
        ('{"prompt": null}', {}, "line 2: column 'prompt' is empty"),
        ('{"prompt": " \\n"}', {}, "line 2: column 'prompt' is empty"),
        ('{"prompt": 5}', {}, "column 'prompt' must be text or a list of messages, not int"),
        ('{"prompt": "\\ud800"}', {}, "column 'prompt' holds half of a surrogate pair"),
        ('{"prompt": []}', {}, "column 'prompt' is an empty list"),
        ('{"prompt": ["a"]}', {}, "message 1 of column 'prompt' must be .*not str"),
        ('{"prompt": [{"role": "tool", "content": "a"}]}', {}, "message 1 .* role 'tool'"),
        ('{"prompt": [{"content": "a"}]}', {}, "message 1 .* role None"),
        ('{"prompt": [{"role": ["user"], "content": "a"}]}', {}, "message 1 .* role "),
        ('{"prompt": [{"role": "user"}]}', {}, r"'prompt\[1\].content' must be text, not null"),
        ('{"prompt": [{"role": "user", "content": ""}]}', {}, r"'prompt\[1\].content' is empty"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            {},
            "ends with a message of the assistant",
        ),
        ('{"prompt": "a", "solution": 5}', {}, "column 'solution' must be text, not int"),
        ('{"prompt": "a", "answer": [1]}', {}, "'answer' must be text or a number, not list"),
        ('{"prompt": "a", "answer": true}', {}, "'answer' must be text or a number, not bool"),
        ('{"prompt": "a", "answer": NaN}', {}, "column 'answer' is nan"),
        ('{"prompt": "a", "id": 1.5}', {}, "column 'id' must be text or a whole number, not 1.5"),
        ('{"prompt": "a", "id": "first"}', {}, "id 'first' was already used in .*line 1"),
        (
            '{"prompt": "a"}',
            {"needs_solution": True},
            r"no column 'solution' .*objective\.lambda_gold.*data\.solution",
        ),
        ('{"prompt": "a", "solution": ""}', {"needs_solution": True}, "'solution' is empty"),
        ('{"prompt": "a"}', {"needs_answer": True}, r"no column 'answer' .*data\.answer"),
        ('{"prompt": "a", "answer": null}', {"needs_answer": True}, "'answer' is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_remedy(tmp_path, line, needs, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load(path, **needs)
    text = str(caught.value)
    assert text.startswith(f"{path}, line 2: ")
    assert "\n" not in text
    assert text.endswith(".")


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not valid UTF-8 at byte 13"):
        load(path)


def test_sources_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or folder"):
        load(tmp_path / "nothing.jsonl")
    (tmp_path / "d.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        load(tmp_path / "d.csv")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="there is no row"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="neither a folder that"):
        load(tmp_path / "folder")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load(tmp_path / "d.parquet")
    (tmp_path / "folder" / "state.json").write_text("{}")
    (tmp_path / "folder" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable datasets folder"):
        load(tmp_path / "folder")


def test_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    messages = [{"role": "user", "content": "a"}]
    table = pyarrow.table(
        {
            "prompt": [messages, messages],
            "reward_model": [{"ground_truth": "1"}, {"ground_truth": None}],
        }
    )
    pyarrow.parquet.write_table(table, path)
    prompts = load(path, answer="reward_model.ground_truth")
    assert [p.answer for p in prompts] == ["1", None]
    assert [p.id for p in prompts] == ["d.parquet:1", "d.parquet:2"]
    assert prompts[0].prompt == (Message("user", "a"),)
    with pytest.raises(DataError, match=r"d\.parquet, row 2: no column 'reward_model.ground"):
        load(path, answer="reward_model.ground_truth", needs_answer=True)


def test_parquet_text_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"a", b"\xff"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet.*UTF-8"):
        load(tmp_path / "d.parquet")


def test_saved_datasets(tmp_path):
    train = datasets.Dataset.from_list([GOOD, {**GOOD, "answer": "3"}])
    train.save_to_disk(tmp_path / "one")
    assert [p.answer for p in load(tmp_path / "one")] == ["2", "3"]
    assert load(tmp_path / "one")[1].id == "one:2"
    test = datasets.Dataset.from_list([{**GOOD, "prompt": 3}])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert len(load(tmp_path / "both")) == 2
    with pytest.raises(DataError, match="both, row 1: column 'prompt' must be text"):
        load(tmp_path / "both", split="test")
    datasets.DatasetDict(validation=train).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match="holds the splits validation but no 'test'"):
        load(tmp_path / "dict", split="test")
    assert len(load(tmp_path / "dict" / "validation", split="test")) == 2


def test_folders_of_files(tmp_path):
    write_lines(tmp_path / "train-00000-of-00002.jsonl", {"prompt": "a"})
    rows = pyarrow.table({"prompt": ["b"]})
    pyarrow.parquet.write_table(rows, tmp_path / "train-00001-of-00002.parquet")
    write_lines(tmp_path / "test.jsonl", {"prompt": "c"})
    write_lines(tmp_path / "trainer.jsonl", {"prompt": "d"})
    (tmp_path / "README.md").write_text("not data")
    assert [p.prompt for p in load(tmp_path)] == ["a", "b"]
    assert [p.prompt for p in load(tmp_path, split="test")] == ["c"]
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.parquet"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="holds files of test but none of 'train'"):
        load(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    assert [p.prompt for p in load(tmp_path, split="test")] == ["d"]


def test_the_embedded_problems():
    arithmetic = pytest.importorskip("stableopd.data.arithmetic")
    test = load("embedded", split="test", needs_solution=True, needs_answer=True)
    assert len(test) == 512
    assert test[:7] == load("embedded", split="test", max_rows=7)
    assert test == arithmetic.make_problems(512, 0, "test")


def test_render(make_tokenizer):
    plain, chat = make_tokenizer(), make_tokenizer(chat_template=CHAT)
    text = Prompt("p", " a\n")
    talk = Prompt("p", (Message("system", "S"), Message("user", "U")))
    assert render(text, plain, "auto") == " a\n"
    assert render(text, chat, "none") == " a\n"
    assert render(text, chat, "auto") == "<s>[user] a\n[assistant]"
    assert render(talk, chat, "auto") == "<s>[system]S[user]U[assistant]"
    with pytest.raises(DataError, match=r"prompt p: .*tokenizer has no chat template"):
        render(talk, plain, "auto")
    with pytest.raises(DataError, match=r"prompt p: .*set it to 'auto'"):
        render(talk, chat, "none")
    refuses = make_tokenizer(chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match=r"prompt p: .*refuses its messages \(no system\)"):
        render(talk, refuses, "auto")
    broken = make_tokenizer(chat_template="{% for %}")
    with pytest.raises(DataError, match=r"prompt p: .*refuses its messages"):
        render(talk, broken, "auto")


@pytest.mark.parametrize(
    ("template", "before"),
    [("$A", ()), ("<s> $A", (1,)), ("$A </s>", ()), ("<s> $A </s>", (1,))],
)
def test_plain_text_gets_a_bos_but_no_eos(make_tokenizer, template, before):
    prompts = [Prompt("a", "1+1="), Prompt("b", "2"), Prompt("c", "<s>3</s>")]
    encoded = encode_prompts(prompts, make_tokenizer(template), "auto", 99, None, 1)
    assert encoded == [before + chars("1+1="), before + chars("2"), (*before, 1, *chars("3"), 2)]


def test_a_chat_template_brings_its_own_bos(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A </s>", CHAT)
    (ids,) = encode_prompts([Prompt("p", "Hi")], tokenizer, "auto", 99, None, 1)
    assert ids == (1, *chars("[user]Hi[assistant]"))
    (ids,) = encode_prompts([Prompt("p", "Hi")], tokenizer, "none", 99, None, 1)
    assert ids == (1, *chars("Hi"))


def test_lengths_are_checked_at_the_exact_bounds(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A")
    prompts = [Prompt("short", "1"), Prompt("long", "123")]  # the BOS makes these 2 and 4 tokens

    def check(max_prompt, context, new):
        return encode_prompts(prompts, tokenizer, "auto", max_prompt, context, new)

    assert len(check(4, 10, 6)) == 2
    with pytest.raises(DataError, match=r"prompt long: 4 tokens, .* 3 .*rollout.max_prompt_tokens"):
        check(3, 10, 6)
    with pytest.raises(DataError, match=r"prompt long: 4 .* 7 .* 10; lower max_new_tokens"):
        check(4, 10, 7)
    assert len(check(4, None, 10**9)) == 2
    assert encode_prompts([], tokenizer, "auto", 4, 10, 6) == []
    with pytest.raises(DataError, match="prompt none: the tokenizer makes no token"):
        encode_prompts([Prompt("none", "")], make_tokenizer(), "auto", 4, 10, 6)


def test_a_text_beyond_the_tokenizers_own_limit_is_neither_cut_nor_warned_of(make_tokenizer, capfd):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 5
    (ids,) = encode_prompts([Prompt("p", "x" * 50)], tokenizer, "auto", 99, None, 1)
    assert len(ids) == 50
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("num", "per_step"), [(10, 4), (7, 7), (3, 8), (1, 5), (12, 1)])
def test_every_epoch_uses_every_prompt_once(num, per_step):
    steps = [prompts_of_step(s, num, per_step, seed=3) for s in range(4 * num)]
    assert all(len(step) == per_step for step in steps)
    flat = [i for step in steps for i in step]
    for epoch in range(len(flat) // num):
        assert sorted(flat[epoch * num : (epoch + 1) * num]) == list(range(num))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = prompts_of_step(0, 50, 50, seed=0)
    assert first != list(range(50))
    assert first != prompts_of_step(1, 50, 50, seed=0)
    assert first != prompts_of_step(0, 50, 50, seed=1)
    # Neighbouring (seed, epoch) pairs must not share a shuffle.
    assert prompts_of_step(1, 50, 50, seed=0) != prompts_of_step(0, 50, 50, seed=1)
    # The stream is the same however it is cut into steps.
    assert first == [i for s in range(5) for i in prompts_of_step(s, 50, 10, seed=0)]
    # Pinned: a resumed run of another day must go on with the same prompts.
    assert prompts_of_step(2, 10, 4, seed=0) == [9, 5, 2, 3]


def test_the_shuffle_has_no_favourites():
    firsts = Counter(prompts_of_step(0, 5, 1, seed)[0] for seed in range(1000))
    assert all(150 < firsts[i] < 250 for i in range(5))
