import json
import types

import numpy as np
import pytest
import tokenizers

from kd_jax.lm import corpus
from kd_jax.lm.corpus import compatibility, conversations, ingest, prompt_files
from kd_jax.lm.weights.tokenizer import Tokenizer

WORDS = {"<unk>": 0, "</s>": 1, "user:": 2, "assistant:": 3, **{f"w{i}": i for i in range(4, 40)}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(template=TEMPLATE):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos_id=1, chat_template=template)


TALK = [
    {"role": "user", "content": "w4 w5"}, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w8 w9"},
]  # fmt: skip


def test_texts_and_conversations_by_hand():
    assert prompt_files.encode("w4 w5", tokenizer()) == [2, 4, 5, 3]
    # up to where the assistant would go on; what it said last is left out
    asked = [2, 4, 5, 3, 6, 1, 2, 7, 3]
    for messages in (TALK, TALK[:3], json.dumps(TALK)):
        assert prompt_files.encode(messages, tokenizer()) == asked
    # the same ids before the answer as where the answer is learnt from
    said = conversations.encode(TALK, tokenizer())
    last = np.flatnonzero(~said.learnt)[-1] + 1
    assert said.ids[:last].tolist() == asked
    # a text that begins like messages and is none
    for text, ids in (('[{"x w5', [0, 5]), ('[{"a": 1}] w6', [0, 0, 6]), ('[{"a":1}]', [0])):
        assert prompt_files.encode(text, tokenizer()) == [2, *ids, 3]
    assert prompt_files.encode("w4 w5", tokenizer(None)) == [4, 5]
    for prompt, why in (("", "empty"), (TALK, "no chat template"), ([{"role": "user"}], "a role and a content")):
        with pytest.raises(ValueError, match=why):
            prompt_files.encode(prompt, tokenizer(None))


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("p.jsonl", '{"prompt": "w4"}\n{"prompt": "w5 w6"}\n', None),
        ("p.csv", "id,prompt\n1,w4\n2,w5 w6\n", None),
        ("p.txt", "w4\nw5 w6\n", None),
        ("a.json", '[{"instruction": "w4", "input": "", "output": "w9"}, {"instruction": "w5", "input": "w6"}]', None),
        ("p.json", '[{"question": "w4", "prompt": "w9"}, {"question": "w5 w6", "prompt": "w9"}]', "question"),
        ("m.jsonl", '{"messages": [{"role": "user", "content": "w4"}], "prompt": ""}\n'
         '{"messages": [{"role": "user", "content": "w5 w6"}], "prompt": ""}\n', None),
    ],
)  # fmt: skip
def test_files(tmp_path, name, text, column):
    (tmp_path / name).write_text(text)
    prompts = prompt_files.read(tmp_path / name, tokenizer(), column)
    assert prompts == [[2, 4, 3], [2, 5, 6, 3]]
    settings = prompt_files.settings(prompts, 3)
    assert settings["samples_per_prompt"] == 3 and settings["prompt_ids"] == []
    # the border between two prompts counts
    assert settings["prompts_fingerprint"] != prompt_files.fingerprint([[2, 4, 3, 2], [5, 6, 3]])


def test_an_instruction_has_its_input_in_prompts_and_in_conversations(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": "w4", "input": "w5", "output": "w9"}, {"instruction": "w6", "input": "", "output": "w9"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer().save(tmp_path / "words")
    asked = [[2, 4, 5, 3], [2, 6, 3]]
    assert prompt_files.read(tmp_path / "a.jsonl", tokenizer()) == asked
    made = ingest.from_dataset(
        tmp_path / "a.jsonl", tmp_path / "c", tmp_path / "words", max_length=9, prompt_column="instruction",
        response_column="output",
    )  # fmt: skip
    assert sorted(ids.tolist() for ids in made.rows().tokens) == sorted([*ids, 9, 1] for ids in asked)
    assert sorted(prompt_files.of_rows(made.rows())) == sorted(asked)


def test_an_input_that_the_first_row_leaves_out_is_not_lost(tmp_path, monkeypatch):
    """pandas and Spark leave out what is null, so that the first row of a file need not have every column."""
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": "w6", "output": "w9"}, {"instruction": "w4", "input": "w5", "output": "w9"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer().save(tmp_path / "words")
    asked = [[2, 6, 3], [2, 4, 5, 3]]
    assert prompt_files.read(tmp_path / "a.jsonl", tokenizer()) == asked
    made = ingest.from_dataset(
        tmp_path / "a.jsonl", tmp_path / "c", tmp_path / "words", max_length=9, prompt_column="instruction",
        response_column="output",
    )  # fmt: skip
    assert sorted(prompt_files.of_rows(made.rows())) == sorted(asked)


def test_what_is_no_prompt_is_named(tmp_path):
    wrong = [(value, "a prompt is a text") for value in (None, 5, ["w4"], {}, [], [{"content": "w4"}])]
    for value, why in [*wrong, ("", "the prompt is empty"), (" ", "the prompt is empty"), (TALK[1:2], "is empty")]:
        (tmp_path / "p.jsonl").write_text('{"prompt": "w4"}\n' + json.dumps({"prompt": value}) + "\n")
        with pytest.raises(ValueError, match=f"p.jsonl, row 1: .*{why}"):
            prompt_files.read(tmp_path / "p.jsonl", tokenizer())
    with pytest.raises(ValueError, match="no column 'question'"):
        prompt_files.read(tmp_path / "p.jsonl", tokenizer(), "question")


def samples(prompts, each):
    """A batch of the samples of prompts: each is its prompt, its number plus 10, and the EOS."""
    rows = [[*prompts[i // each], 10 + i, 1] for i in range(each * len(prompts))]
    tokens = np.zeros((len(rows), 12), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows])
    return types.SimpleNamespace(
        index=np.arange(len(rows)), tokens=tokens, lengths=lengths, prompt_lengths=lengths - 2,
        finished=np.ones(len(rows), bool), log_probs=-np.ones(tokens.shape), sample_log_probs=-np.ones(tokens.shape),
        utilisation=1.0,
    )  # fmt: skip


def test_a_corpus_keeps_the_prompts_of_its_rows(tmp_path):
    prompts = [[2, 4, 3], [2, 5, 6, 7, 3]]
    settings = {
        "source": "m", "model_fingerprint": "f", "tokenizer_fingerprint": None, "dtype": "float32", "eos_ids": [1],
        "sample_temperature": 1.0, "top_k": None, "top_p": None, "seed": 0, "max_length": 12, "num_samples": 4,
        "shard_size": 2, **prompt_files.settings(prompts, 2),
    }  # fmt: skip
    made = corpus.write(corpus.create_or_resume(tmp_path / "c", settings, command="test"), [samples(prompts, 2)])
    rows = corpus.open(tmp_path / "c").rows()
    assert prompt_files.of_rows(rows) == [prompts[0]] * 2 + [prompts[1]] * 2
    assert rows.num_learnt.tolist() == [2] * 4 and compatibility.has_own_prompts(made)
    np.testing.assert_array_equal(rows.learnt(np.array([2]), 7)[0], [0, 0, 0, 0, 1, 1, 0])
    # other prompts are another corpus
    changed = settings | prompt_files.settings(prompts[::-1], 2)
    with pytest.raises(corpus.store.RunError, match="prompts_fingerprint"):
        corpus.create_or_resume(tmp_path / "c", changed, command="test")
    assert corpus.fingerprint(made) == corpus.fingerprint(corpus.open(tmp_path / "c"))


def test_a_mask_says_what_is_scored():
    rows = corpus.Rows(
        index=np.arange(2), tokens=[np.arange(7), np.arange(4)], length=np.array([7, 4]),
        prompt_length=np.array([2, 1]), finished=np.ones(2, bool), log_prob=np.zeros(2), sample_log_prob=np.zeros(2),
        loss_mask=[np.array([0, 0, 1, 0, 0, 1, 1], bool), np.array([0, 1, 1, 0], bool)],
    )  # fmt: skip
    assert rows.num_learnt.tolist() == [3, 2]
    np.testing.assert_array_equal(rows.learnt(np.array([1, 0]), 6), [[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1]])
