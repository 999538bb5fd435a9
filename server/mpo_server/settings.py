"""How a server runs, as one checked record."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mpo_formats import ConfigError

LARGEST_BODY = 8 << 20  # bytes
LARGEST_HEAD = 32 << 10  # bytes of a request's path and headers
LONGEST_KEY = 512
_MOST_KEYS = 10_000
_KEY = re.compile("[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `mpo-run serve` was asked for.

    file: the model, as the user named it; `loading` are keyword arguments of `mpo_runtime.load`.
    keys: the API keys that are accepted; none for a server without.
    origins: web pages (scheme, host and port) that may use the server from a browser.
    timeout: seconds that one request may take.
    slot_path: the folder for saved prompt caches.

    Raises:
        ConfigError: naming the option that is wrong.
    """

    file: Path
    host: str = "127.0.0.1"
    port: int = 8080
    alias: str | None = None
    keys: tuple[str, ...] = ()
    insecure: bool = False
    parallel: int = 8
    max_queue: int = 64
    origins: tuple[str, ...] = ()
    timeout: float = 600.0
    slot_path: Path | None = None
    verbose: bool = False
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(0 <= self.port < 65536, "--port", self.port, "0 to 65535")
        _check(1 <= self.parallel <= 64, "--parallel", self.parallel, "1 to 64")
        _check(0 <= self.max_queue <= 100_000, "--max-queue", self.max_queue, "0 to 100000")
        _check(0 < self.timeout <= 86_400 * 7, "--timeout", self.timeout, "seconds above 0")
        _check(self.alias is None or 0 < len(self.alias) <= 256, "--alias", self.alias, "1 to 256 characters")
        for key in self.keys:
            if len(key) > LONGEST_KEY or not _KEY.fullmatch(key):
                raise ConfigError(f"--api-key: expected 1 to {LONGEST_KEY} printable ASCII characters without spaces")
        if len(self.keys) > _MOST_KEYS:
            raise ConfigError(f"--api-key-file: expected at most {_MOST_KEYS} keys, found {len(self.keys)}")
        for origin in self.origins:
            check_origin(origin)
        if not self.local and not self.keys and not self.insecure:
            raise ConfigError(
                f"--host {self.host}: anyone who reaches this address could use the server; "
                "give --api-key, or --insecure if that is meant"
            )
        if self.slot_path is not None and not self.slot_path.is_dir():
            raise ConfigError(f"--slot-save-path {self.slot_path}: is no folder; make it first")

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.alias or self.file.name.removesuffix(".mpo") or "model"


def read_keys(single: str | None, file: Path | None) -> tuple[str, ...]:
    """The API keys of --api-key and of --api-key-file, which has one a line; lines that begin with # are comments.

    Raises:
        ConfigError: for a file that cannot be read or holds no key.
    """
    keys = [] if single is None else [single]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--api-key-file {file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--api-key-file {file}: is not UTF-8 text; expected one key a line") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {file}: holds no key; expected one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def check_origin(origin: str) -> None:
    """Raises ConfigError for anything but `*` or a scheme, host and port such as http://localhost:3000."""
    if origin == "*":
        return
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or origin != f"{parts.scheme}://{parts.netloc}":
        raise ConfigError(f"--cors {origin}: expected scheme and host such as http://localhost:3000, or *")


def _check(good: bool, option: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{option} {value}: expected {expected}")
