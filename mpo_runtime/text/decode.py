"""Bytes of a text file to text: UTF-8 with or without a byte order mark, line ends of any system; the rest is refused."""

from __future__ import annotations

import codecs
import json
import os
from typing import Any

from mpo_formats.errors import ConfigError, MpoError
from mpo_formats.git_lfs import is_pointer, pointer_message

# Byte order marks of encodings that are not UTF-8; the marks of UTF-32 come first, because one begins like UTF-16's.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Text in UTF-16 without a mark: half of its bytes are NUL where it is in a Western language. Plain text has none.
_NUL_SHARE = 4
_LOOKED_AT = 4096


def decode_text(data: bytes, name: object, error: type[MpoError] = ConfigError) -> str:
    r"""The text of a file, without a byte order mark, its lines ended by \n.

    Args:
        data: the whole file.
        name: the file, for messages.
        error: what to raise.

    Raises:
        MpoError: of the type `error`, naming file, offset and remedy, where the bytes are not UTF-8; where the file is a
            Git LFS pointer.
    """
    if is_pointer(data[:64]):
        raise error(pointer_message(name))
    foreign = next((encoding for mark, encoding in _FOREIGN_MARKS if data.startswith(mark)), None)
    start = data[:_LOOKED_AT]
    if foreign is None and start.count(0) * _NUL_SHARE > len(start):
        foreign = "UTF-16LE" if start.find(0) % 2 else "UTF-16BE"
    if foreign:
        raise error(f"{name}: not UTF-8 at byte 0, it is {foreign}; {_convert(foreign)}")
    content = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode()
    except UnicodeDecodeError as found:
        place = len(data) - len(content) + found.start
        raise error(
            f"{name}: not UTF-8 at byte {place} (0x{data[place]:02X}); {_convert('ISO-8859-1')} (if it is Latin-1)"
        ) from None
    return text.replace("\r\n", "\n")


def decode_argument(text: str, name: str) -> str:
    """A text from the command line or the environment, which Python decodes in the encoding of the locale.

    Bytes that this encoding lacks come as lone surrogates; where all of them are UTF-8, as in a terminal without a locale,
    they are the text.

    Raises:
        ConfigError: naming the option, where they are not.
    """
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # a surrogate that no byte stands for
        data = text.encode("utf-8", "surrogatepass")
    return decode_text(data, name)


def decode_json(data: bytes, name: object, remedy: str, error: type[MpoError] = ConfigError) -> Any:
    """The plain data of a JSON file, which is decoded as `decode_text` does; `remedy` ends the message of a wrong one.

    Raises:
        MpoError: of the type `error`, naming the file, where it is not UTF-8 or not JSON.
    """
    text = decode_text(data, name, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as found:  # the latter where brackets are nested a thousand deep
        raise error(f"{name}: cannot be read: it is not JSON ({found}); {remedy}") from None


def _convert(encoding: str) -> str:
    return f"convert it with: iconv -f {encoding} -t UTF-8"
