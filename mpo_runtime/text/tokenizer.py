"""Text to token ids and back, with the `tokenizers` library, so that text cannot inject special tokens.

A special token (`<|start_of_role|>`, `</s>`) is a command to the model; text that merely spells one must not be. `encode`
therefore reads such a spelling as plain text unless `parse_special` is set, and `encode_disguised` encodes the output of
a chat template whose messages spell one.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mpo_formats.errors import CheckpointError, ConfigError
from mpo_runtime.text.decode import decode_json, decode_text
from mpo_runtime.text.files import CONFIG, REMEDY, TOKENIZER, TextFiles

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONG = 10_000  # characters from which on encoding lets other threads run
_HELD_AT_MOST = 8  # tokens; only where the decoder's kind does not say which tokens are parts of a character


class Tokenizer:
    """A tokenizer read from tokenizer.json; safe to use from several threads.

    `config` is tokenizer_config.json (empty where there is none); `bos_token`, `eos_token`, `bos_id` and `eos_id` come
    from it and are None where it names none; `special_tokens` and `added_tokens` map text to id.
    """

    def __init__(self, raw: tokenizers.Tokenizer, config: Mapping[str, Any], name: str = "tokenizer.json") -> None:
        """Wraps and changes a tokenizer of the library; `name` is used in messages. Prefer `from_bytes`."""
        raw.no_truncation()
        raw.no_padding()
        _adopt_tokens(raw, config, name)
        self._raw = raw
        self._name = name
        self._variants: dict[tuple[frozenset[str], bool], tuple[tokenizers.Tokenizer, int | None]] = {}
        self._lock = threading.Lock()
        added = sorted(raw.get_added_tokens_decoder().items())
        self.config = MappingProxyType(dict(config))
        self.added_tokens = MappingProxyType({token.content: index for index, token in added})
        self.special_tokens = MappingProxyType({token.content: index for index, token in added if token.special})
        self.special_ids = frozenset(self.special_tokens.values())
        self._matches_normalized = any(token.special and token.normalized for _, token in added)
        self.bos_token, self.bos_id = self._configured("bos_token")
        self.eos_token, self.eos_id = self._configured("eos_token")

    @classmethod
    def from_bytes(
        cls, tokenizer_json: bytes, config: Mapping[str, Any] | None = None, *, name: str = "tokenizer.json"
    ) -> Tokenizer:
        """Reads the bytes of tokenizer.json and, parsed, tokenizer_config.json.

        Raises CheckpointError where they are damaged.
        """
        import tokenizers

        text = decode_text(bytes(tokenizer_json), name, CheckpointError)
        try:
            raw = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            found = " ".join(str(error).split())
            raise CheckpointError(f"{name} is not a tokenizer ({found}); the file is damaged, fetch it again") from None
        if raw.get_vocab_size() == 0:
            raise CheckpointError(f"{name} has an empty vocabulary; the file is damaged, fetch it again")
        if config is not None and not isinstance(config, Mapping):
            raise CheckpointError(f"tokenizer_config.json holds a {type(config).__name__}, expected an object")
        return cls(raw, config or {}, name)

    @classmethod
    def from_files(cls, read: Callable[[str], bytes | None], where: str = "") -> Tokenizer | None:
        """Reads the tokenizer of a model, or returns None where it has none.

        Args:
            read: gives the bytes of tokenizer.json and tokenizer_config.json, None for one that is absent.
            where: the model, for messages: a folder with its `/`, or nothing.

        Raises CheckpointError where a file is damaged.
        """
        content = read(TOKENIZER)
        if content is None:
            return None
        settings = read(CONFIG)
        config = decode_json(settings, f"{where}{CONFIG}", REMEDY, CheckpointError) if settings else {}
        return cls.from_bytes(content, config, name=f"{where}{TOKENIZER}")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads the tokenizer of a checkpoint's folder.

        Raises CheckpointError where the folder has none or a file is damaged.
        """
        tokenizer = cls.from_files(TextFiles(folder).read, f"{folder}/")
        if tokenizer is None:
            raise CheckpointError(f"{folder / TOKENIZER}: No such file; a checkpoint needs tokenizer.json")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's logits may be padded to more."""
        return self._raw.get_vocab_size(with_added_tokens=True)

    def unused_ids(self, size: int) -> tuple[int, ...]:
        """The ids below `size`, the rows of a model's output, that stand for no token: models pad their tables."""
        beyond = range(self.vocab_size, size)
        unused = tuple(token for token in beyond if self.id_to_token(token) is None)
        if len(unused) == len(beyond):  # as always, but where ids are left out between others
            return unused
        return tuple(token for token in range(size) if self.id_to_token(token) is None)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, with the tokens that tokenizer_config.json adds."""
        return self._raw.to_str()

    def id_to_token(self, token: int) -> str | None:
        """The spelling of an id inside the vocabulary (`Ġthe`, `▁the`, `<0x0A>`), or None where the id is unknown."""
        return self._raw.id_to_token(_token_id(token))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be part of a character; a special token's are its spelling."""
        spelling = self.id_to_token(token) or ""
        if token in self.special_ids:
            return spelling.encode()
        if type(self._raw.decoder).__name__ == "ByteLevel":
            return _byte_level_bytes(spelling)
        if _BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace("▁", " ").encode()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token given by its spelling inside the vocabulary, or None where there is none."""
        return self._raw.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        add_special_tokens: lets the tokenizer put its own tokens around the text (bos where it has one).
        parse_special: text that spells a special token becomes that token; else it is encoded like any other text.
        Raises ConfigError where the text is not valid Unicode.
        """
        _check_text(text)
        if parse_special or not self._mentions(text, self.special_tokens):
            return _ids(self._raw, text, add_special_tokens)
        ids = self._encode_plain(text, self.special_tokens, continued=False)
        if not add_special_tokens:
            return ids
        around = self._raw.encode("a", add_special_tokens=True)
        inner = [index for index, special in enumerate(around.special_tokens_mask) if not special]
        return [*around.ids[: inner[0]], *ids, *around.ids[inner[-1] + 1 :]]

    def encode_disguised(self, text: str, disguise: Disguise) -> list[int]:
        """The token ids of a text in which only control tokens that are not disguised become special.

        The text between them is encoded as plain text, with the disguised characters put back.
        """
        if not disguise.used:
            return self.encode(text, parse_special=True)
        _check_text(text)
        table = str.maketrans(disguise.meaning)
        spelling = {index: token for token, index in disguise.control.items()}
        if len(text) < _LONG:
            encoding = self._raw.encode(text, add_special_tokens=False)
        else:
            encoding = self._raw.encode_batch([text], add_special_tokens=False)[0]
        ids: list[int] = []
        start = 0
        for place, index in [item for item in enumerate(encoding.ids) if item[1] in spelling]:
            left, right = encoding.token_to_chars(place) or (0, 0)
            # An unknown character may give a special id as well (<unk>), so the spelling decides.
            if text[left:right].strip() == spelling[index].strip():
                ids += self._encode_plain(text[start:left].translate(table), disguise.control, continued=start > 0)
                ids.append(index)
                start = right
        return ids + self._encode_plain(text[start:].translate(table), disguise.control, continued=start > 0)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; unknown ids give no text, bytes that are no UTF-8 give U+FFFD.

        Raises ConfigError where an id is negative or no integer.
        """
        plain = [_token_id(token) for token in ids]
        if len(plain) < _LONG:
            return self._raw.decode(plain, skip_special_tokens=skip_special_tokens)
        return self._raw.decode_batch([plain], skip_special_tokens=skip_special_tokens)[0]

    def _configured(self, key: str) -> tuple[str | None, int | None]:
        """The text and id of a token that tokenizer_config.json names (as a string or as an object with `content`)."""
        token = self.config.get(key)
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is None or token == "":
            return None, None
        index = self._raw.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            log.warning("%s: %s %r is ignored: %s has no such token", CONFIG, key, token, self._name)
            return None, None
        return token, index

    def _mentions(self, text: str, tokens: Mapping[str, int]) -> bool:
        """Whether the text may spell one of the tokens."""
        return self._matches_normalized or any(token in text for token in tokens)

    def _encode_plain(self, text: str, control: Mapping[str, int], continued: bool) -> list[int]:
        """The ids of a text in which no token of `control` is recognised.

        continued: the text follows other text, so that a prefix that a tokenizer adds at the very start is left out.
        """
        if not text:
            return []
        continued = continued and "prepend_scheme=first" in repr(self._raw.pre_tokenizer).replace('"', "")
        if not continued and not self._mentions(text, control):
            return _ids(self._raw, text)
        raw, unknown = self._variant(frozenset(control), continued)
        forbidden = frozenset(control.values()) - {unknown}
        ids = _ids(raw, text)
        if forbidden.isdisjoint(ids):
            return ids
        # The model's own vocabulary spells it (as unigram models may): cut each spelling after its first character.
        pattern = "|".join(re.escape(token[0]) + f"(?={re.escape(token[1:])})" for token in control)
        cuts = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        ids = [index for piece in pieces for index in _ids(raw, piece)]
        if not forbidden.isdisjoint(ids):
            token = self._raw.id_to_token(next(i for i in ids if i in forbidden))
            raise ConfigError(f"the text spells {token!r}, which {self._name} cannot encode as plain text; remove it")
        return ids

    def _variant(self, plain: frozenset[str], continued: bool) -> tuple[tokenizers.Tokenizer, int | None]:
        """The same tokenizer, blind to the added tokens in `plain`, and the id of unknown text; made once for each set.

        A second object, because the library's own switch (encode_special_tokens) cannot be set while another thread
        uses the tokenizer, and because it spares added tokens that are not marked as special.
        """
        import tokenizers

        with self._lock:
            if (plain, continued) not in self._variants:
                state = json.loads(self._raw.to_str())
                for token in state["added_tokens"]:
                    token["special"] = token["special"] or token["content"] in plain
                if continued:
                    stage = state["pre_tokenizer"]
                    for step in stage.get("pretokenizers", [stage]):
                        if step.get("prepend_scheme") == "first":
                            step["prepend_scheme"] = "never"
                raw = tokenizers.Tokenizer.from_str(json.dumps(state))
                raw.encode_special_tokens = True
                model = state["model"]  # a unigram model gives the id of unknown text, the others its token
                unknown = model.get("unk_id", raw.token_to_id(model.get("unk_token") or ""))
                self._variants[plain, continued] = raw, unknown
            return self._variants[plain, continued]


class Disguise:
    """Replaces characters in text so that it can take no part in a control token, and knows what they stood for.

    control: spelling and id of each token that has a meaning of its own; surrounding: all the text that the stand-in
    characters (private use, U+100000 and up) must not occur in. `meaning` maps them to the characters they stand for;
    `used` says whether any was needed.
    """

    def __init__(self, control: Mapping[str, int], surrounding: str) -> None:
        self.control = control
        letters = sorted({character for token in control for character in token if not character.isspace()})
        taken = set(re.findall("[\U000f0000-\U0010ffff]", surrounding))
        free = list(islice((code for code in range(0x100000, 0x10FFFE) if chr(code) not in taken), len(letters)))
        if len(free) < len(letters):
            raise ConfigError("messages: use too many private-use characters (U+100000 to U+10FFFD); remove some")
        self._stand_in = {letter: chr(code) for letter, code in zip(letters, free, strict=True)}
        self.meaning = {stand_in: letter for letter, stand_in in self._stand_in.items()}
        self.used = False
        spellings = sorted(control, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        self._heads = {token[:end] for token in control for end in range(1, len(token))}
        self._tails = {token[start:] for token in control for start in range(1, len(token))}
        self._whole = "\0".join(spellings)
        self._longest = len(spellings[0]) if spellings else 0

    def apply(self, value: Any, free: bool = False) -> Any:
        """A copy of plain data with all its text disguised; `free` text is what people write, not a name or type."""
        if isinstance(value, dict):
            return {
                self._whole_tokens(key): self.apply(item, free=key in ("content", "text"))
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        return self._text(value, free) if isinstance(value, str) else value

    def _text(self, text: str, free: bool) -> str:
        text = self._whole_tokens(text)
        inner = text.strip()
        offset = text.find(inner)
        for length in range(min(self._longest, len(inner)), 0, -1):
            if inner[-length:] in self._heads:
                text = self._replace(text, offset + len(inner) - length)
        starts = any(inner[:length] in self._tails for length in range(1, self._longest))
        if free and inner and (starts or inner in self._whole):
            text = self._replace(text, offset)
        return text

    def _whole_tokens(self, text: str) -> str:
        def disguised(match: re.Match[str]) -> str:
            return self._replace(match[0], len(match[0]) - len(match[0].lstrip()))

        found = 1
        while found:  # again for spellings that overlap
            text, found = self._spelling.subn(disguised, text)
        return text

    def _replace(self, text: str, index: int) -> str:
        if text[index] not in self._stand_in:
            return text
        self.used = True
        return text[:index] + self._stand_in[text[index]] + text[index + 1 :]


class StreamDecoder:
    """Turns token ids into text piece by piece; the pieces, with `finish`, add up to `decode` of all the ids.

    A piece never ends inside a character. Text is held back only while later ids could change it: the bytes of an
    unfinished character (byte-level BPE), or a run of byte tokens (SentencePiece with byte fallback, where one bad
    byte turns its whole run into U+FFFD). Each id is decoded at most twice, however long the text.

    context: ids that precede the text (a prompt to continue); with them the text starts as a continuation, with the
    leading space that some tokenizers strip from the start of a text. One decoder belongs to one text and one thread.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._raw = tokenizer._raw
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_level = type(self._raw.decoder).__name__ == "ByteLevel"
        self._byte_fallback = "ByteFallback" in repr(self._raw.decoder)
        self._pending: list[int] = []
        self._anchor: list[int] = []  # the last id whose text was released: spacing depends on what comes before
        for token in reversed(context):
            spelling = self._spelling(_token_id(token))
            if spelling and not _BYTE_TOKEN.fullmatch(spelling):
                self._anchor = [token]
                break

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that is now certain, often empty or longer than one token's.

        Raises ConfigError where the id is negative or no integer.
        """
        spelling = self._spelling(_token_id(token))
        if not spelling:
            return ""
        if self._byte_level:
            return self._bytes.decode(_byte_level_bytes(spelling))
        self._pending.append(int(token))
        if self._byte_fallback:
            return "" if _BYTE_TOKEN.fullmatch(spelling) else self._release()
        text = self._text_of_pending()
        if text.endswith("\ufffd") and len(self._pending) < _HELD_AT_MOST:
            return ""
        return self._release()

    def settle(self) -> str:
        """Returns the text held back, unfinished characters as U+FFFD: called where a special token follows it."""
        text = self._bytes.decode(b"", final=True) + self._release()
        self._bytes.reset()
        return text

    def finish(self) -> str:
        """Returns the text still held back, after the last id; the decoder is then ready for a new text."""
        text = self.settle()
        self._anchor = []
        return text

    def _spelling(self, token: int) -> str | None:
        """The spelling of an id that gives text; None or empty for the ones that give none."""
        return None if token in self._skipped else self._raw.id_to_token(token)

    def _text_of_pending(self) -> str:
        before = self._raw.decode(self._anchor, skip_special_tokens=False)
        return self._raw.decode([*self._anchor, *self._pending], skip_special_tokens=False)[len(before) :]

    def _release(self) -> str:
        if not self._pending:
            return ""
        text = self._text_of_pending()
        self._anchor, self._pending = self._pending[-1:], []
        return text


def _ids(raw: tokenizers.Tokenizer, text: str, around: bool = False) -> list[int]:
    """The ids of a text, with `around` those that the tokenizer puts around it.

    The library lets other threads run only while it encodes a batch; a batch of one long text costs nothing more.
    """
    if len(text) < _LONG:
        return raw.encode(text, add_special_tokens=around).ids
    return raw.encode_batch_fast([text], add_special_tokens=around)[0].ids


def _adopt_tokens(raw: tokenizers.Tokenizer, config: Mapping[str, Any], name: str) -> None:
    """Adds the tokens that tokenizer_config.json has and tokenizer.json lacks, as transformers does.

    Those are entries of `added_tokens_decoder`, and named tokens (`eos_token`, …) that the vocabulary holds as plain text.
    """
    import tokenizers

    flags = ("special", "normalized", "single_word", "lstrip", "rstrip")
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder")
    listed = {
        int(key): token
        for key, token in (decoder.items() if isinstance(decoder, Mapping) else ())
        if str(key).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str)
    }
    for index, token in sorted(listed.items()):
        text = token["content"]
        if not text or text in known:
            continue
        if (raw.token_to_id(text) if raw.token_to_id(text) is not None else raw.get_vocab_size()) != index:
            log.warning("%s: added token %r is ignored: %s has no place for the id %d", CONFIG, text, name, index)
            continue
        chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
        raw.add_tokens([tokenizers.AddedToken(text, **{"normalized": False, **chosen})])
        known.add(text)
    for key, token in config.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if not key.endswith("_token") or not isinstance(text, str) or text in known:
            continue
        if raw.token_to_id(text) is not None:
            raw.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _byte_level_alphabet() -> dict[str, int]:
    """The byte for each character of byte-level BPE (Radford et al. 2019, GPT-2's `bytes_to_unicode`).

    A byte that prints in Latin-1 is its own character; the others are U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level_bytes(spelling: str) -> bytes:
    """The bytes of a byte-level token; an added token with characters outside the alphabet is its own text."""
    values = [_BYTE_OF_CHARACTER.get(character, -1) for character in spelling]
    return spelling.encode() if -1 in values else bytes(values)


def _token_id(token: int) -> int:
    """A checked id; the library would raise an OverflowError or a TypeError."""
    try:
        index = token.__index__()
    except AttributeError:
        raise ConfigError(f"token id {token!r} is not a whole number") from None
    if not 0 <= index < 2**32:
        raise ConfigError(f"token id {index} is out of range, expected 0 or more")
    return index


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"the text is a {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text holds a lone surrogate at character {error.start}; it is not Unicode") from None
