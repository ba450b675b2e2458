"""Data as a corpus from the command line: its rows, resuming, and what is refused."""

import json

import pytest
import tokenizers

from kd_jax import corpus as door
from kd_jax.lm import corpus
from kd_jax.lm.corpus import ingest
from kd_jax.lm.weights.tokenizer import Tokenizer

BOS, EOS = 1, 2


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Documents of words whose ids are known, and the folder of the tokenizer."""
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    words = {"unknown": 0, "<s>": BOS, "</s>": EOS, **{f"w{i}": i for i in range(3, 50)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="unknown"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    Tokenizer(backend, bos_id=BOS, eos_id=EOS).save(tmp_path / "tokenizer")
    texts = [" ".join(f"w{3 + i + j}" for j in range(1 + i % 6)) for i in range(20)]
    rows = [{"text": text} for text in texts] + [{"text": " "}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [[3 + i + j for j in range(1 + i % 6)] for i in range(20)]
    return str(tmp_path / "data.jsonl"), str(tmp_path / "tokenizer"), ids


def test_documents_become_rows_that_a_run_can_read_too(data, tmp_path, capsys):
    source, tokenizer, ids = data
    out = tmp_path / "c"
    words = ["corpus", source, f"--out={out}", "--tokenizer", tokenizer, "--max_length=6", "--prompt_ids=1"]
    assert door.main(words) == 0
    # 6 tokens with BOS and EOS: documents of five and six words are cut
    expected = sorted([BOS, *row, EOS][:6] for row in ids)
    rows = corpus.open(out).rows()
    assert sorted(row.tolist() for row in rows.tokens) == expected
    shown = capsys.readouterr().out.splitlines()
    finished = sum(row[-1] == EOS for row in expected)
    assert shown[-3:] == [
        f"20 rows, {sum(map(len, expected))} tokens, {finished} rows end with EOS", "left out: 1 empty",
        f"corpus: {out}",
    ]  # fmt: skip
    assert "kd_jax.corpus" in corpus.open(out).manifest["command"]
    # the same again does nothing; other settings are refused
    assert door.main(words) == 0
    assert door.main([*words[:-2], "--max_length=7", "--prompt_ids=1"]) == 2
    again = ingest.from_dataset(
        f"{out}/data/*.parquet", tmp_path / "again", tokenizer, max_length=6, prompt_ids=[BOS], ids_column="tokens"
    )
    assert sorted(row.tolist() for row in again.rows().tokens) == expected


def test_two_ranges_share_no_document(data, tmp_path):
    source, tokenizer, ids = data
    parts = []
    for first in (0, 12):
        out = tmp_path / f"from-{first}"
        assert door.main(["corpus", source, f"--out={out}", f"--tokenizer={tokenizer}", "--num_samples=8",
                          f"--first={first}", "--noeos", "--seed=3"]) == 0  # fmt: skip
        parts.append({tuple(row.tolist()) for row in corpus.open(out).rows().tokens})
    assert len(parts[0]) == len(parts[1]) == 8 and not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text_column=txt"], "has no column 'txt'; there are 'text'"),
        (["--text_column=text", "--ids_column=text"], "give one of them"),
        (["--num_samples=30"], "has 20 documents that can be used (left out: 1 empty)"),
        (["--eos_id=2", "--noeos"], "--eos_id has no effect with --noeos"),
        (["--max_lenght=3"], "did you mean --max_length?"),
        (["--prompt_ids=1,1,1", "--max_length=3"], "counts the prompt"),
    ],
)
def test_faults_before_anything_is_written(data, tmp_path, capsys, words, said):
    source, tokenizer, _ = data
    assert door.main(["corpus", source, f"--out={tmp_path / 'c'}", f"--tokenizer={tokenizer}", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "c/data").exists()
