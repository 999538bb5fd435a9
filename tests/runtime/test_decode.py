"""Text files of other systems and other encodings: read as they are meant, or refused with file, offset and remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_formats import CheckpointError, ConfigError
from mpo_runtime.text.decode import decode_argument, decode_json, decode_text

MARK = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@given(text=st.text())
def test_utf8_is_read_with_and_without_a_mark(text: str) -> None:
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n")
    assert decode_text(text.encode(), "a.txt") == expected
    assert decode_text(MARK + text.removeprefix("\ufeff").encode(), "a.txt") == expected


def test_line_ends() -> None:
    assert decode_text(b"a\r\nb\r\n", "a.txt") == "a\nb\n"
    assert decode_text(b"a\rb\n", "a.txt") == "a\rb\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("é".encode("latin-1"), "not UTF-8 at byte 0 (0xE9); convert it with: iconv -f ISO-8859-1 -t UTF-8"),
        (b"abc\xff", "not UTF-8 at byte 3 (0xFF); "),
        (MARK + b"abc\xff", "not UTF-8 at byte 6 (0xFF); "),
        ("aé".encode("utf-16"), "not UTF-8 at byte 0, it is UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"),
        ("日本".encode("utf-16-be").join([b"\xfe\xff", b""]), "it is UTF-16; "),
        ("abc".encode("utf-16-le"), "it is UTF-16LE; convert it with: iconv -f UTF-16LE -t UTF-8"),
        ("abc".encode("utf-16-be"), "it is UTF-16BE; convert it with: iconv -f UTF-16BE -t UTF-8"),
        ("abc".encode("utf-32"), "it is UTF-32; convert it with: iconv -f UTF-32 -t UTF-8"),
        (
            POINTER,
            "is a Git LFS pointer, not the file itself; install Git LFS, then run in its folder: git lfs install",
        ),
        (MARK + POINTER, "git lfs pull"),
    ],
)
@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_other_encodings_are_named_with_a_remedy(data: bytes, words: str, error: type[Exception]) -> None:
    with pytest.raises(error) as found:
        decode_text(data, Path("folder/a.txt"), error)
    assert str(found.value).startswith("folder/a.txt: ") and words in str(found.value)


def test_json() -> None:
    assert decode_json(MARK + b'{\r\n"a": [1]}', "a.json", "fetch it") == {"a": [1]}
    for content in (b"{", b"[" * 100_000, b""):
        with pytest.raises(CheckpointError, match=r"^a\.json: cannot be read: it is not JSON \(.*\); fetch it$"):
            decode_json(content, "a.json", "fetch it", CheckpointError)


def test_arguments_of_a_terminal_without_a_locale() -> None:
    assert decode_argument("Grüße \ud83d\udc4b".replace("\ud83d\udc4b", "👋"), "--prompt") == "Grüße 👋"
    assert decode_argument(os.fsdecode("Grüße".encode()), "--prompt") == "Grüße"
    assert decode_argument("Gr\udcc3\udcbc\udcc3\udc9fe", "--prompt") == "Grüße"
    for text in ("a\udcff", "a\ud800"):
        with pytest.raises(ConfigError, match="--prompt: not UTF-8 at byte 1"):
            decode_argument(text, "--prompt")
