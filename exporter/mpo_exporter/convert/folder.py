"""A Hugging Face folder made from a `.mpo` file: config.json, tokenizer and shards of safetensors, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mpo_formats import ConfigError, MpoFile

# Bytes of a shard; one more tensor may follow.
SHARD = 4 << 30
WEIGHTS = "model*.safetensors*"


class FolderWriter:
    """Writes a folder: a context manager that puts it in its place when it ends without an error.

    Args:
        out: the folder, absent or empty.
        force: writes into a folder that holds something; its weights are replaced, other files kept unless they have the
            name of a new one.

    Raises:
        ConfigError: for a folder that holds something, without `force`.
    """

    def __init__(self, out: Path, *, force: bool) -> None:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out}: is no folder; give another --out")
        if out.is_dir() and any(out.iterdir()) and not force:
            raise ConfigError(f"{out}: is not empty; give another --out, or --force to write into it")
        self.out = out
        self._work: Path | None = None
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.total = 0

    def __enter__(self) -> FolderWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f".{self.out.name[:64]}.", dir=self.out.parent))
        return self

    @property
    def work(self) -> Path:
        """The folder in which files are written until all are there."""
        if self._work is None:
            raise RuntimeError("FolderWriter is used outside of its context")
        return self._work

    def tensor(self, name: str, value: Tensor) -> None:
        """Adds a tensor; they are written in the order in which they come."""
        self._waiting[name] = value.contiguous()
        self.total += value.nbytes
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= SHARD:
            self._flush()

    def _flush(self) -> None:
        save_file(self._waiting, self.work / f"part-{len(self._shards)}", {"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting = {}

    def text_files(self, file: MpoFile, config: dict[str, Any]) -> None:
        """Writes config.json, and copies tokenizer, chat template and generation settings."""
        for spec in file.spec.files:
            (self.work / spec.name).write_bytes(file.file(spec.name) or b"")
        self._json("config.json", config)
        if file.file("generation_config.json") is None:
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            self._json("generation_config.json", {key: config[key] for key in keys if config[key] is not None})

    def _json(self, name: str, content: dict[str, Any]) -> None:
        (self.work / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _finish(self) -> None:
        """Names the shards, and moves everything to its place."""
        if self._waiting:
            self._flush()
        count = len(self._shards)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
            homes = {tensor: names[index] for index, shard in enumerate(self._shards) for tensor in shard}
            content = {"metadata": {"total_size": self.total}, "weight_map": homes}
            self._json("model.safetensors.index.json", content)
        for index, name in enumerate(names):
            part = (self.work / f"part-{index}").rename(self.work / name)
            part.chmod(0o644)  # the library lets nobody else read it
        self.work.chmod(0o755)
        if not self.out.exists():
            self.work.rename(self.out)
            return
        for stale in self.out.glob(WEIGHTS):
            stale.unlink()
        for path in self.work.iterdir():
            path.replace(self.out / path.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
