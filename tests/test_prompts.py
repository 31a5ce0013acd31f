import contextlib
import json
import string
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stableopd.config import DataConfig
from stableopd.data.prompts import (
    _prompt,
    encode_prompts,
    load_prompts,
    prompts_of_step,
    render,
    too_long,
)
from stableopd.data.rows import Row
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
        ('{"prompt": [{"role": "cat", "content": "a"}]}', {}, "message 1 .* role 'cat'"),
        ('{"prompt": [{"role": "function", "content": "a"}]}', {}, 'write "tool"'),
        ('{"prompt": [{"from": "human", "value": "a"}]}', {}, 'write "role"'),
        ('{"prompt": [{"role": "system", "content": "a"}]}', {}, "ends with .* the system"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            {},
            "part of the kind 'image_url'",
        ),
        (
            '{"prompt": [{"role": "assistant", "content": null, "tool_calls": [{"id": "c"}]}]}',
            {},
            "tool_calls must be a list of calls",
        ),
        (
            '{"prompt": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]}',
            {},
            "function_call; write it as tool_calls",
        ),
        ('{"prompt": "a", "tools": "hammer"}', {}, "'tools' must be a list of descriptions"),
        (
            '{"prompt": "a", "solution": [{"role": "user", "content": "b"}]}',
            {},
            "one message of the assistant",
        ),
        (
            '{"prompt": "a", "solution": [{"role": "assistant", "content": "b", "thinking": "c"}]}',
            {},
            "holds thinking; write the solution as one text",
        ),
        ('{"prompt": "a", "answer": [1, 2]}', {}, "'answer' is a list of 2 answers"),
        ('{"prompt": [{"content": "a"}]}', {}, "message 1 .* role None"),
        ('{"prompt": [{"role": ["user"], "content": "a"}]}', {}, "message 1 .* role "),
        ('{"prompt": [{"role": "user"}]}', {}, r"'prompt\[1\].content' must be text, not null"),
        ('{"prompt": [{"role": "user", "content": ""}]}', {}, r"'prompt\[1\].content' is empty"),
        (
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            {},
            "ends with a message of the assistant",
        ),
        ('{"prompt": "a", "solution": 5}', {}, "column 'solution' must be text or .*, not int"),
        ('{"prompt": "a", "answer": [[1]]}', {}, "'answer' must be text or a number, not list"),
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
    with pytest.raises(DataError, match=r"1 of 2 .*long \(4 tokens\); at most 3 .*tokens to 4"):
        check(3, 10, 6)
    with pytest.raises(DataError, match=r"long \(4 tokens\); .* 7 .* 10: lower max_new_tokens"):
        check(4, 10, 7)
    assert len(check(4, None, 10**9)) == 2
    assert encode_prompts([], tokenizer, "auto", 4, 10, 6) == []
    with pytest.raises(DataError, match="prompt none: the tokenizer makes no token"):
        encode_prompts([Prompt("none", "")], make_tokenizer(), "auto", 4, 10, 6)


def test_a_date_that_python_cannot_hold_is_one_line(tmp_path):
    dates = pyarrow.array([2**60], type=pyarrow.timestamp("ms"))
    table = pyarrow.table({"prompt": ["a"], "date": dates})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: not a readable parquet file"):
        load(tmp_path / "d.parquet")


def test_all_prompts_that_are_too_long_are_counted(make_tokenizer):
    prompts = [Prompt(f"p{i}", "1" * i) for i in range(1, 12)]
    with pytest.raises(DataError) as caught:
        encode_prompts(prompts, make_tokenizer(), "auto", 3, None, 6)
    assert "8 of 11 prompts" in str(caught.value)
    assert "p4 (4 tokens), p5" in str(caught.value)
    assert "p9" not in str(caught.value)
    assert too_long([(1,) * i for i in range(1, 12)], 9, 12, 4) == [8, 9, 10]


@pytest.mark.parametrize("field", ["solution", "answer"])
def test_a_column_that_is_named_must_exist(tmp_path, field):
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": "b", "own": None})
    with pytest.raises(DataError, match=rf"no row has the column 'ans' that data\.{field}"):
        load(path, **{field: "ans"})
    assert len(load(path, **{field: "own"})) == 2  # one row has it, empty as it is
    assert len(load(path)) == 2  # the default names may be missing


CALL = {"type": "function", "function": {"name": "get", "arguments": '{"k": 1}'}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {}}}
ASKS = {"role": "user", "content": "Look up x"}
# Writes tools, calls, thoughts and names; CHAT writes roles and contents only.
FULL = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_calls_tools_and_thoughts_reach_the_template(tmp_path, make_tokenizer):
    row = {
        "prompt": [
            ASKS,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "tool_call_id": "c1", "content": "5", "name": None},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
            {"role": "user", "content": [{"type": "text", "text": "And "}, {"text": "now?"}]},
        ],
        "tools": [TOOL],
    }
    path = write_lines(tmp_path / "d.jsonl", row)
    (prompt,) = load(path)
    assert render(prompt, make_tokenizer(chat_template=FULL), "auto") == (
        '<tool>get</tool><user>Look up x</s><assistant><call>get {"k": 1}</call></s><tool c1>5</s>'
        "<assistant><think>two and two</think>4</s><user>And now?</s><assistant>"
    )
    # The same, written as JSON text.
    told = write_lines(tmp_path / "t.jsonl", {k: json.dumps(v) for k, v in row.items()})
    (again,) = load(told)
    assert (again.prompt, again.tools) == (prompt.prompt, prompt.tools)


@pytest.mark.parametrize(
    ("messages", "tools", "lost"),
    [
        ([{"role": "assistant", "content": "a", "tool_calls": [CALL]}, ASKS], None, "tool_calls"),
        ([{"role": "assistant", "content": "a", "reasoning": "b"}, ASKS], None, "reasoning"),
        ([ASKS], [TOOL], "the tools"),
        ([{"role": "developer", "content": "S"}, ASKS], None, '"system" instead'),
    ],
)
def test_what_the_template_drops_is_refused_by_line(
    tmp_path, make_tokenizer, messages, tools, lost
):
    (prompt,) = load(write_lines(tmp_path / "d.jsonl", {"prompt": messages, "tools": tools}))
    with pytest.raises(DataError, match=r"prompt d\.jsonl:1: .*does not write") as caught:
        render(prompt, make_tokenizer(chat_template=CHAT), "auto")
    assert lost in str(caught.value)
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    (prompt,) = load(
        write_lines(tmp_path / "e.jsonl", {"prompt": [{"role": "system", "content": "S"}, ASKS]})
    )
    with pytest.raises(DataError, match=r"message 1 \(system\): 'S'"):
        render(prompt, make_tokenizer(chat_template=drops), "auto")


def test_texts_that_a_template_trims_or_quotes_are_there(make_tokenizer):
    prompt = Prompt("p", (Message("user", "a\n"), Message("tool", 'say "hi"\n\tthere ')))
    quotes = "{% for m in messages %}{{ m.content | trim | tojson }}{% endfor %}"
    assert "say" in render(prompt, make_tokenizer(chat_template=quotes), "auto")
    said = Message("assistant", "<think>so</think>\n\n4")
    prompt = Prompt("p", (Message("user", "a"), said, Message("user", "b")))
    cuts = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert render(prompt, make_tokenizer(chat_template=cuts), "auto") == "a\n\n4b"


def test_prompt_and_solution_in_one_column(tmp_path):
    said = {"role": "assistant", "content": "It is 5."}
    path = write_lines(tmp_path / "d.jsonl", {"messages": [ASKS, said]}, {"messages": [ASKS]})
    found = load(path, prompt="messages", solution="messages")
    assert [p.solution for p in found] == ["It is 5.", None]
    assert found[0].prompt == found[1].prompt == (Message("user", "Look up x"),)
    with pytest.raises(DataError, match=r'data\.solution = "messages"'):
        load(path, prompt="messages")
    with pytest.raises(DataError, match="named as prompt and as solution"):
        load(write_lines(tmp_path / "e.jsonl", GOOD), prompt="prompt", solution="prompt")


def test_solutions_as_messages_and_answers_in_a_list(tmp_path):
    said = [{"role": "assistant", "content": "It is 5."}]
    path = write_lines(tmp_path / "d.jsonl", {"prompt": "a", "solution": said, "answer": ["5"]})
    (prompt,) = load(path)
    assert (prompt.solution, prompt.answer) == ("It is 5.", "5")


def test_messages_of_text_alone_keep_their_fingerprint():
    assert repr(Message("user", "a")) == "Message(role='user', content='a')"
    assert "get" in repr(Message("user", "a", '{"name": "get"}'))


HUGE = st.builds(lambda: 10**5000)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | HUGE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments"]
            ),
            inner | st.sampled_from(["user", "assistant", "tool", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(prompt=JSON, solution=JSON, answer=JSON, id=JSON, tools=JSON)
def test_no_row_ends_in_a_traceback(prompt, solution, answer, id, tools):
    values = {"prompt": prompt, "solution": solution, "answer": answer, "id": id, "tools": tools}
    row = Row("d.jsonl, line 1", "d.jsonl:1", values)
    for data in (DataConfig(), DataConfig(solution="prompt")):
        with contextlib.suppress(DataError):
            found = _prompt(row, data, False, False)
            repr(found)
            [m.as_dict() for m in found.prompt if isinstance(m, Message)]


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
