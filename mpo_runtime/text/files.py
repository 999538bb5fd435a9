"""The files about text in a Hugging Face folder, in the one form in which `.mpo` files embed them and the runtime reads them.

Folders of different ages keep the same things in different places: a chat template in chat_template.jinja, in
chat_template.json, in tokenizer_config.json (alone or as a list of named ones) or in a folder of templates; the names of
special tokens in special_tokens_map.json; a tokenizer in tokenizer.model alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_formats.errors import CheckpointError
from mpo_runtime.text.decode import decode_json, decode_text
from mpo_runtime.text.sentencepiece import SentencePieceModel, named_tokens, read_model, tokenizer_json

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SENTENCEPIECE, TOKEN_NAMES, TEMPLATE_JSON = "tokenizer.model", "special_tokens_map.json", "chat_template.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")
DEFAULT = "default"
REMEDY = "fetch it again"


class TextFiles:
    """Reads the files by name; one that has to be made from others is made once.

    Raises:
        CheckpointError: naming a file that is damaged, in another encoding than UTF-8, or a Git LFS pointer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, bytes | None] = {}

    def read(self, name: str) -> bytes | None:
        """A file's bytes, as they are where the folder has it in its usual form; None where it has nothing of the kind."""
        if name not in self._made and name in (TOKENIZER, CONFIG, TEMPLATE):
            make = {TOKENIZER: self._tokenizer, CONFIG: self._config, TEMPLATE: self._template}[name]
            self._made[name] = make()
        return self._made[name] if name in self._made else self._bytes(name)

    def _bytes(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None

    def _json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, empty where there is no such file."""
        content = self._bytes(name)
        if content is None:
            return {}
        found = decode_json(content, self.folder / name, REMEDY, CheckpointError)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.folder / name}: holds a {type(found).__name__}, expected an object; {REMEDY}")
        return found

    def _tokenizer(self) -> bytes | None:
        """tokenizer.json, made from tokenizer.model where that is all there is."""
        model = self._sentencepiece()
        if model is None:
            return self._bytes(TOKENIZER)
        config, _ = self._full_config(model)
        return tokenizer_json(model, {"added_tokens_decoder": self._added_tokens(config), **config})

    def _sentencepiece(self) -> SentencePieceModel | None:
        """tokenizer.model, where it takes the place of a tokenizer.json."""
        content = None if (self.folder / TOKENIZER).exists() else self._bytes(SENTENCEPIECE)
        return None if content is None else read_model(content, str(self.folder / SENTENCEPIECE))

    def _added_tokens(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """added_tokens.json, the older form of the entry `added_tokens_decoder` of tokenizer_config.json."""
        special = {str(config[key]) for key in config if key.endswith("_token")}
        special |= {str(token) for token in self._json(TOKEN_NAMES).get("additional_special_tokens") or ()}
        tokens = self._json(ADDED_TOKENS).items()
        return {str(index): {"content": text, "special": text in special} for text, index in tokens}

    def _config(self) -> bytes | None:
        """tokenizer_config.json, with what the folder keeps in other files."""
        config, changed = self._full_config(self._sentencepiece())
        return json.dumps(config, ensure_ascii=False, indent=2).encode() if changed else self._bytes(CONFIG)

    def _full_config(self, model: SentencePieceModel | None) -> tuple[dict[str, Any], bool]:
        """What `_config` holds, and whether it is more than tokenizer_config.json itself."""
        config = self._json(CONFIG)
        names = {key: token for key, token in self._json(TOKEN_NAMES).items() if key.endswith("_token")}
        missing = {**({} if model is None else named_tokens(model)), **names}
        added = {key: token for key, token in missing.items() if key not in config}
        templates = self._templates(config)
        if not set(templates) <= {DEFAULT, *named_templates(config, str(self.folder / CONFIG))}:
            added["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        return {**config, **added}, bool(added)

    def _template(self) -> bytes | None:
        """The default chat template."""
        content = self._bytes(TEMPLATE)
        if content is not None and content.strip():
            return content
        default = default_template(self._templates(self._json(CONFIG)))
        return None if default is None else default.encode()

    def _templates(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The chat templates of tokenizer_config.json, of chat_template.json and of a folder of templates, by name."""
        found = named_templates(config, str(self.folder / CONFIG))
        found |= named_templates(self._json(TEMPLATE_JSON), str(self.folder / TEMPLATE_JSON))
        for folder in TEMPLATE_FOLDERS:
            for path in sorted((self.folder / folder).glob("*.jinja")):
                text = decode_text(path.read_bytes(), path, CheckpointError)
                found |= {path.stem: text} if text.strip() else {}
        return found


def named_templates(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The chat templates of a configuration by name; one without a name is `default`, empty ones are left out.

    Raises:
        CheckpointError: for templates that are no text, and for a list of anything but objects with `name` and `template`.
    """
    given = config.get("chat_template")
    if given is None or isinstance(given, str):
        found: dict[Any, Any] = {DEFAULT: given or ""}
    elif isinstance(given, Mapping):
        found = dict(given)
    elif isinstance(given, list) and all(isinstance(row, Mapping) for row in given):
        found = {row.get("name"): row.get("template") for row in given}
    else:
        found = {None: None}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found.items()):
        raise CheckpointError(f"{where}: chat_template: expected a text, or a list of objects with name and template")
    return {name: text for name, text in found.items() if text.strip()}


def default_template(named: Mapping[str, str]) -> str | None:
    """The template to use where none is asked for: the one named `default`, or the only one."""
    only = next(iter(named.values())) if len(named) == 1 else None
    return named.get(DEFAULT, only)
