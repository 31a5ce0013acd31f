import string

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stableopd.data.golden import encode_golden, golden_sequences, num_too_long
from stableopd.data.prompts import encode_prompts, render
from stableopd.data.thoughts import join_thought
from stableopd.types import DataError, Message, Prompt, Sequence

STOP = 2


@pytest.fixture
def tokenizer():
    """Characters, a BOS and an EOS around every text, and a chat template, all to be ignored."""
    words = ["<unk>", "<s>", "</s>", *string.printable]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = "[{{ messages[0].content }}]"
    return made


def chars(text):
    return tuple(3 + string.printable.index(c) for c in text)


def test_a_solution_keeps_every_character_and_ends_in_one_stop(tokenizer):
    prompt = Prompt("p", "1+1=", solution=" 2\n\n")
    assert encode_golden(prompt, tokenizer, STOP) == (*chars(" 2\n\n"), STOP)
    assert encode_golden(prompt, tokenizer, 77) == (*chars(" 2\n\n"), 77)


def test_a_stop_in_the_text_is_not_doubled_and_not_hidden(tokenizer):
    ends = Prompt("p", "1", solution="2</s>")
    assert encode_golden(ends, tokenizer, STOP) == (*chars("2"), STOP)
    for text in ("2</s>3", "2</s></s>", "</s>2"):
        with pytest.raises(DataError, match=r"prompt p: the stop token '</s>' \(id 2\) stands"):
            encode_golden(Prompt("p", "1", solution=text), tokenizer, STOP)


def test_every_stop_ends_a_solution_and_none_stands_within(tokenizer):
    other = chars("!")[0]
    ends = Prompt("p", "1", solution="2!")
    assert encode_golden(ends, tokenizer, STOP, [STOP, other]) == (*chars("2"), other)
    assert encode_golden(ends, tokenizer, STOP) == (*chars("2!"), STOP)
    for text in ("2!3", "2!!", "2!</s>"):
        prompt = Prompt("p", "1", solution=text)
        with pytest.raises(DataError, match=rf"the stop token '!' \(id {other}\) stands"):
            encode_golden(prompt, tokenizer, STOP, [STOP, other])
        with pytest.raises(DataError, match="'!'"):
            golden_sequences([prompt], [(1,)], tokenizer, STOP, 9, [STOP, other])


@pytest.fixture(scope="module")
def sentencepiece():
    """Puts a space before every text, as Llama 2's does, and has a byte for a line end."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = ["What is 2 + 3? The answer is 5."] * 4
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=marks))
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [("{{ messages[0].content }}\nA:\n", None), (None, "Q: 2 + 3?\n"), (None, "")],
)
def test_a_solution_begins_without_the_space_of_a_text_by_itself(sentencepiece, template, text):
    sentencepiece.chat_template = template
    prompt = Prompt("p", text or "What is 2 + 3?", "The answer is 5.")
    (ids,) = encode_prompts([prompt], sentencepiece, "auto", 99, None, 1)
    text = render(prompt, sentencepiece, "auto") if text is None else text
    golden = encode_golden(prompt, sentencepiece, STOP, text=text)
    first = sentencepiece.convert_ids_to_tokens(golden[0])
    assert first.startswith("T")
    # A model that reads it and one that wrote it see the same ids.
    if text:
        both = sentencepiece(text + prompt.solution, add_special_tokens=False)["input_ids"]
        bare = ids[1:] if ids[0] == 1 else ids
        assert (*bare, *golden[:-1]) == tuple(both)


def test_prompt_and_solution_that_would_merge_are_encoded_apart():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "\n": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    prompt = Prompt("p", "ba", "ba")
    assert encode_golden(prompt, tokenizer, 9, text="ba") == (1, 0, 9)
    (sequence,) = golden_sequences([prompt], [(1, 0)], tokenizer, 9, 5, (), ["ba"])
    assert sequence.prompt_ids == (1, 0)  # and not "b", "ab", "a"


def test_no_solution(tokenizer):
    with pytest.raises(DataError, match="prompt p: no solution"):
        encode_golden(Prompt("p", "1"), tokenizer, STOP)


def test_sequences_keep_their_place_and_what_does_not_fit_is_left_out(tokenizer):
    prompts = [
        Prompt("a", "1", solution="123"),
        Prompt("b", "2"),
        Prompt("c", "3", solution="1234"),
        Prompt("d", "4", solution="1"),
    ]
    ids = [(10,), (11,), (12,), (13, 14)]
    sequences = golden_sequences(prompts, ids, tokenizer, STOP, max_tokens=4)
    assert sequences == [
        Sequence((10,), (*chars("123"), STOP), True, 0),
        None,
        None,
        Sequence((13, 14), (*chars("1"), STOP), True, 3),
    ]
    assert num_too_long(prompts, sequences) == 1
    longer = golden_sequences(prompts, ids, tokenizer, STOP, max_tokens=5)
    assert [s is None for s in longer] == [False, True, False, False]
    assert num_too_long(prompts, longer) == 0


def test_nothing_left_is_an_error(tokenizer):
    prompts = [
        Prompt("a", "1", solution="12345"),
        Prompt("b", "2", solution="123"),
        Prompt("c", ""),
    ]
    with pytest.raises(DataError, match=r"fits into 3 tokens, the shortest has 4 .*max_new_tokens"):
        golden_sequences(prompts, [(1,)] * 3, tokenizer, STOP, max_tokens=3)
    with pytest.raises(DataError, match=r"no prompt has a solution.*data\.solution"):
        golden_sequences(prompts[2:], [(1,)], tokenizer, STOP, max_tokens=3)


def test_prompts_and_ids_must_belong_together(tokenizer):
    with pytest.raises(ValueError, match="zip"):
        golden_sequences([Prompt("a", "1", solution="1")], [], tokenizer, STOP, max_tokens=3)


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_thought_and_answer_are_joined_as_the_template_writes_them(tokenizer):
    prompt = Prompt("p", (Message("system", "S"), Message("user", "2+3?")))
    tokenizer.chat_template = THINKS
    joined = join_thought(prompt, "Two, and three.\n", "It is 5.", tokenizer, "auto")
    assert joined == "<think>\nTwo, and three.\n</think>\n\nIt is 5."
    # A template that begins the thought itself, and writes none of earlier turns.
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    joined = join_thought(prompt, "Two, and three.", "It is 5.", tokenizer, "auto")
    assert joined == "Two, and three.\n</think>\n\nIt is 5."
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="--reasoning-parser"):
        join_thought(prompt, "Two, and three.", "It is 5.", tokenizer, "auto")
