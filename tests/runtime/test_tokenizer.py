"""The tokenizer and its stream decoder against the library's own one-shot encoding and decoding."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from mpo_formats.errors import CheckpointError, ConfigError
from mpo_runtime.text import tokenizer as tokenizer_module
from mpo_runtime.text.tokenizer import Disguise, StreamDecoder, Tokenizer

CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
FLAGS = [(around, special) for around in (False, True) for special in (False, True)]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_raw() -> RawTokenizer:
    """Byte-level BPE with a few merges, so that tokens begin and end inside characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("ã", "ģ"), ("Ĥ", "ã"), ("Ã", "©"), ("ł", "ĺ")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    raw = RawTokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<日>")])
    raw.add_tokens([AddedToken("<b>", special=False, normalized=False)])
    raw.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 261), ("</s>", 262)])
    return raw


def sentencepiece_raw(scheme: str = "normalizer") -> RawTokenizer:
    """BPE over ▁-words with byte fallback; the prefix from a normalizer (Llama) or from Metaspace (`scheme`)."""
    words = ["▁", "a", "b", "é", "▁a", "▁▁", "ab", ".", "\ufffd"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *words])}
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b")]
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return raw


def other_raw(kind: str) -> RawTokenizer:
    """Decoders of the other kinds that tokenizer.json files have."""
    if kind == "byte level in a sequence":
        raw = byte_level_raw()
        raw.decoder = decoders.Sequence([decoders.ByteLevel()])
        return raw
    words = ["[UNK]", "a", "##b", "##c", "d", "▁e", "f", ",", "▁", "g</w>", "h"]
    raw = RawTokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    if kind != "none":
        raw.decoder = {
            "wordpiece": decoders.WordPiece(cleanup=False),
            "metaspace": decoders.Metaspace(),
            "metaspace never": decoders.Metaspace(prepend_scheme="never"),
            "bpe": decoders.BPEDecoder(),
        }[kind]
    raw.add_special_tokens(["[UNK]"])
    return raw


def wrap(raw: RawTokenizer, config: dict[str, Any] | None = None) -> Tokenizer:
    return Tokenizer.from_bytes(raw.to_str().encode(), config)


BYTE_LEVEL = wrap(byte_level_raw(), CONFIG)
SENTENCEPIECE = wrap(sentencepiece_raw(), CONFIG)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True, context: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip, context or [])
    return [*(decoder.push(token) for token in ids), decoder.finish()]


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip)
    pieces = stream(tokenizer, ids, skip)
    assert "".join(pieces) == whole
    assert all(piece.encode() is not None for piece in pieces)


# Encoding


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(text=st.text())
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_names_ids_and_sizes() -> None:
    assert (BYTE_LEVEL.bos_token, BYTE_LEVEL.bos_id) == ("<s>", 261)
    assert (BYTE_LEVEL.eos_token, BYTE_LEVEL.eos_id) == ("</s>", 262)
    assert BYTE_LEVEL.vocab_size == 265
    assert BYTE_LEVEL.unused_ids(265) == BYTE_LEVEL.unused_ids(40) == ()
    assert BYTE_LEVEL.unused_ids(268) == (265, 266, 267)
    assert BYTE_LEVEL.special_ids == {261, 262, 263}
    assert dict(BYTE_LEVEL.added_tokens) == {"<s>": 261, "</s>": 262, "<日>": 263, "<b>": 264}
    assert (BYTE_LEVEL.id_to_token(256), BYTE_LEVEL.token_to_id("Ġa")) == ("Ġa", 256)
    assert (BYTE_LEVEL.id_to_token(999), BYTE_LEVEL.token_to_id("Ġz")) == (None, None)
    nameless = wrap(byte_level_raw())
    assert (nameless.bos_token, nameless.bos_id) == (None, None)


def test_special_tokens_are_added_only_when_asked() -> None:
    plain = BYTE_LEVEL.encode("a a")
    assert BYTE_LEVEL.encode("a a", add_special_tokens=True) == [261, *plain, 262]
    assert BYTE_LEVEL.encode("<s>", add_special_tokens=True) == [261, *BYTE_LEVEL.encode("<s>"), 262]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(pieces=st.lists(st.sampled_from(["<s>", "</s>", "<", "s>", " ", "a", "é", "<unk>", "\n"])))
def test_spelled_special_tokens_are_text(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert sum(token in tokenizer.special_ids for token in parsed) >= text.count("</s>")


def test_parse_special_is_the_librarys_encoding() -> None:
    text = "a</s>b <s><b>"
    assert BYTE_LEVEL.encode(text, parse_special=True) == byte_level_raw().encode(text, add_special_tokens=False).ids
    assert BYTE_LEVEL.encode(text)[-1] == 264  # an added token that is not special stays one


def test_a_vocabulary_that_spells_a_special_token() -> None:
    """A unigram model would choose the piece `<s>` for the text `<s>`."""
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("<", -5.0), ("s", -5.0), (">", -5.0), ("a", -5.0)]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["<unk>", "<s>"])
    tokenizer = wrap(raw)
    assert tokenizer.encode("a<s>a<s>", parse_special=True) == [5, 1, 5, 1]
    assert tokenizer.encode("a<s>a<s>") == [5, 2, 3, 4, 5, 2, 3, 4]
    whole = RawTokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    whole.add_special_tokens(["x"])
    with pytest.raises(ConfigError, match="spells 'x'"):
        wrap(whole).encode("x")


def test_a_normalized_special_token_is_found_too() -> None:
    raw = sentencepiece_raw("never")
    raw.normalizer = normalizers.Lowercase()
    raw.add_special_tokens([AddedToken("<a>", special=True, normalized=True)])
    tokenizer = wrap(raw)
    assert tokenizer.token_to_id("<a>") in tokenizer.encode("<A>", parse_special=True)
    assert tokenizer.token_to_id("<a>") not in tokenizer.encode("<A>")


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    raw = byte_level_raw()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    assert len(wrap(raw).encode("bbbbbbbb")) == 8


def test_threads_may_encode_and_decode_at_once() -> None:
    failures: list[BaseException] = []

    def work(text: str) -> None:
        try:
            for _ in range(200):
                assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special_tokens=False) == text
                assert "".join(stream(BYTE_LEVEL, BYTE_LEVEL.encode(text))) == text
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in ("<s>é", "plain", "</s>日本")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("text", [b"a", None, 3, "a\ud800"])
def test_text_that_is_none(text: Any) -> None:
    with pytest.raises(ConfigError):
        BYTE_LEVEL.encode(text)


@pytest.mark.parametrize("token", [-1, 2**32, 1.0, "a", None])
def test_ids_that_are_none(token: Any) -> None:
    for call in (lambda: BYTE_LEVEL.decode([token]), lambda: StreamDecoder(BYTE_LEVEL).push(token)):
        with pytest.raises(ConfigError, match="^token id"):
            call()


# Files


def test_from_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: No such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level_raw().to_str(), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).eos_id == 262
    for content, named in (
        ("{", "is not JSON"),
        ("[1]", "expected an object"),
        ("version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json.*{named}"):
            Tokenizer.from_folder(tmp_path)


def test_byte_order_marks_and_tokens_that_do_not_exist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = byte_level_raw().to_str().replace("\n", "\r\n")
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = {"bos_token": "", "eos_token": "<x>"}
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.bos_id) == (tokenizer.eos_token, tokenizer.eos_id) == (None, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"tokenizer_config.json: eos_token '<x>' is ignored: {tmp_path}/tokenizer.json has no such token"
    ]
    (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not UTF-8 at byte 0, it is UTF-16; convert it"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.shared
def test_tokens_of_the_configuration_are_added_as_transformers_adds_them(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    document = json.loads((shared / "models/stories260K-llama/tokenizer.json").read_bytes())
    added = {
        str(512 + index): {"content": text, "special": special, "normalized": False}
        for index, (text, special) in enumerate((("<|im_start|>", True), ("<|im_end|>", True), ("<note>", False)))
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    for tokens in (document["added_tokens"], []):  # without any, those that the configuration names are added, too
        (tmp_path / "tokenizer.json").write_text(json.dumps({**document, "added_tokens": tokens}))
        oracle, tokenizer = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
        for text in ("<|im_start|>user\n hi<|im_end|>", "a <s> b</s> <note>c"):
            expected = oracle.encode(text, add_special_tokens=False)
            assert tokenizer.encode(text, parse_special=True) == expected
        assert tokenizer.eos_id == oracle.eos_token_id == 513
        assert tokenizer.encode("<|im_end|>") != [513]  # text does not smuggle it in


def test_an_added_token_without_a_place_is_ignored_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = wrap(byte_level_raw(), {"added_tokens_decoder": {"900": {"content": "<far>"}, "x": {}, "3": None}})
    assert "<far>" not in tokenizer.added_tokens
    assert "added token '<far>' is ignored: tokenizer.json has no place for the id 900" in caplog.text


GOOD = sentencepiece_raw().to_str().encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[1]",
        b"[" * 100_000,
        GOOD[:500],
        GOOD[:-3],
        GOOD.replace(b'"BPE"', b'"XYZ"'),
        GOOD.replace(b'"id":1,', b'"id":-1,'),
        b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
    ],
)
def test_damaged_files_are_named(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^model\.mpo/tokenizer\.json [^\n]*; the file is damaged"):
        Tokenizer.from_bytes(data, name="model.mpo/tokenizer.json")


# Streaming


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_streams_of_any_ids_add_up(tokenizer: Tokenizer, skip: bool, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    check_stream(tokenizer, ids, skip)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(text=st.text("a bé日本🥊\u200d\ufffd.\n", max_size=30))
def test_streams_of_texts_add_up(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


KINDS = ["wordpiece", "metaspace", "metaspace never", "bpe", "none"]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 12), max_size=20), skip=st.booleans())
def test_streams_of_other_decoders_add_up(kind: str, ids: list[int], skip: bool) -> None:
    if kind == "bpe":  # appends a space to every word but the last
        ids = [*ids, 10]
    check_stream(wrap(other_raw(kind)), ids, skip)


@given(text=st.text("a bé日本🥊", max_size=30))
def test_streams_of_byte_level_in_a_sequence_add_up(text: str) -> None:
    tokenizer = wrap(other_raw("byte level in a sequence"))
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text("a bé日本🥊", max_size=12), before=st.text("ab .", min_size=1, max_size=6))
def test_a_context_makes_the_text_a_continuation(text: str, before: str) -> None:
    ids, context = SENTENCEPIECE.encode(text), SENTENCEPIECE.encode(before)
    whole = SENTENCEPIECE.decode(context + ids)
    assert "".join(stream(SENTENCEPIECE, ids, context=context)) == whole.removeprefix(SENTENCEPIECE.decode(context))


def test_text_comes_as_soon_as_it_is_certain() -> None:
    ids = BYTE_LEVEL.encode("ab é日")
    pieces = stream(BYTE_LEVEL, ids)
    assert "".join(pieces) == "ab é日"
    assert pieces[:2] == ["a", "b"]
    assert pieces[-1] == ""  # nothing is held back after the last byte of a character
    ids = SENTENCEPIECE.encode("a ab日a")
    assert stream(SENTENCEPIECE, ids)[:2] == ["a", " a"]


def test_a_decoder_can_be_used_again() -> None:
    decoder = StreamDecoder(SENTENCEPIECE)
    for text in ("a 日", " ab"):
        assert "".join([*map(decoder.push, SENTENCEPIECE.encode(text)), decoder.finish()]) == text


class CountingRaw:
    """The library's tokenizer, counting the ids that are decoded."""

    def __init__(self, raw: RawTokenizer) -> None:
        self.raw, self.decoded = raw, 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return str(self.raw.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token: int) -> str | None:
        return self.raw.id_to_token(token)


@pytest.mark.parametrize("text", ["a ab " * 2000, "日本" * 2000], ids=["words", "bytes"])
def test_the_work_is_linear(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    decoder = StreamDecoder(SENTENCEPIECE)
    decoder._raw = counting = CountingRaw(SENTENCEPIECE._raw)
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == text
    assert counting.decoded <= 3 * len(ids)


@pytest.mark.shared
@pytest.mark.parametrize("folder", ["models/stories260K-granite", "tokenizers/granite-3.3-reconstructed"])
def test_shared_tokenizers(shared: Path, folder: str) -> None:
    tokenizer = Tokenizer.from_folder(shared / folder)
    text = "Once upon a time, there was a 日本 café 🥊\n\n  x = [1]\tend </s><|end_of_text|>"
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert "".join(stream(tokenizer, ids)) == text
    assert (
        tokenizer.encode(text.split("</s>")[0])
        == RawTokenizer.from_file(str(shared / folder / "tokenizer.json"))
        .encode(text.split("</s>")[0], add_special_tokens=False)
        .ids
    )
    for step in (1, 7, 101):
        check_stream(tokenizer, [(index * step * 31) % tokenizer.vocab_size for index in range(400)], True)
        check_stream(tokenizer, [(index * step * 17) % tokenizer.vocab_size for index in range(400)], False)


@pytest.mark.parametrize("raw", [byte_level_raw, sentencepiece_raw])
def test_long_texts_are_encoded_as_short_ones(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts go through the library's calls for batches, which let other threads run."""
    tokenizer = Tokenizer(raw(), CONFIG)
    disguise = Disguise(tokenizer.special_tokens, "")
    disguised = disguise.apply("a</s>b")
    texts = ["", "a b", "ab</s> é a<s>", f"<s>a {disguised}</s> é{disguised}<s>"]

    def results() -> list[Any]:
        found: list[Any] = [tokenizer.encode(text, *flags) for text in texts for flags in FLAGS]
        ids = tokenizer.encode_disguised(texts[-1], disguise)
        assert {tokenizer.special_tokens["<s>"], tokenizer.special_tokens["</s>"]} <= set(ids)
        return [*found, ids, *(tokenizer.decode(found[-1], skip_special_tokens=skip) for skip in (False, True))]

    short = results()
    monkeypatch.setattr(tokenizer_module, "_LONG", 0)
    assert results() == short
