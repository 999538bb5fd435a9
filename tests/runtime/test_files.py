"""The text files of a folder, wherever it keeps them: what is embedded in an export and what the runtime reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_formats import CheckpointError, ConfigError
from mpo_runtime.loading import open_weights, read_text_files
from mpo_runtime.text.chat_template import ChatTemplate, TemplateOptions
from mpo_runtime.text.files import TextFiles
from mpo_runtime.weights import store
from tests.helpers import write_folder

MESSAGES = [{"role": "user", "content": "Hi"}]
DEFAULT, TOOLS, RAG = "default {{ messages[0].content }}", "tools {{ tools|length }}", "rag {{ documents|length }}"
LISTED = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": DEFAULT}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rendered(template: ChatTemplate | None, options: TemplateOptions | None = None) -> str:
    assert template is not None
    options = options or TemplateOptions()
    chosen = template.chosen(options)
    try:
        return chosen.render(MESSAGES, **options.keywords())
    finally:
        chosen.close()


def write(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


PLACES: dict[str, Any] = {
    "a list": lambda folder: configure(folder, chat_template=LISTED),
    "an object": lambda folder: configure(folder, chat_template={"default": DEFAULT, "tool_use": TOOLS}),
    "chat_template.json": lambda folder: write(folder, "chat_template.json", json.dumps({"chat_template": LISTED})),
    "a file and a folder": lambda folder: (
        write(folder, "chat_template.jinja", DEFAULT),
        write(folder, "additional_chat_templates/tool_use.jinja", TOOLS),
    ),
    "a folder alone": lambda folder: (
        write(folder, "additional_chat_templates/default.jinja", b"\xef\xbb\xbf" + DEFAULT.encode()),
        write(folder, "additional_chat_templates/tool_use.jinja", TOOLS),
    ),
    "a text and a folder": lambda folder: (
        configure(folder, chat_template=DEFAULT),
        write(folder, "chat_templates/tool_use.jinja", TOOLS),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_named_templates_are_found_and_kept_in_an_export(folder: Path, tmp_path: Path, place: str) -> None:
    """An export embeds three files, and so does the store, which copies what a folder needs."""
    PLACES[place](folder)
    kept = open_weights(folder)
    embedded = {file.name: kept.file(file.name) for file in kept.spec.files}
    copied = open_weights(store_copy(folder, tmp_path))
    for read in (kept.file, embedded.get, copied.file):
        template = ChatTemplate.from_files(read)
        assert rendered(template) == "default Hi"
        assert rendered(template, TemplateOptions(tools=[{}, {}])) == "tools 2"
        assert rendered(template, TemplateOptions(tools=[{}], template="default")) == "default Hi"
        assert rendered(template, TemplateOptions(template="tool_use", tools=[{}])) == "tools 1"
        with pytest.raises(ConfigError, match="template 'rag': the model has no such chat template; it has tool_use"):
            rendered(template, TemplateOptions(template="rag"))


def store_copy(folder: Path, tmp_path: Path) -> Path:
    """The files that the store takes of a folder."""
    target = tmp_path / "stored"
    for pattern in store.NEEDED:
        for path in folder.glob(pattern):
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return target


def test_the_choice_is_that_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    configure(
        folder, chat_template=[*LISTED, {"name": "rag", "template": RAG}], tokenizer_class="PreTrainedTokenizerFast"
    )
    oracle, (_, template) = AutoTokenizer.from_pretrained(folder), read_text_files(open_weights(folder))
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    for tools, name in ((None, None), ([tool], None), (None, "rag"), ([tool], "default")):
        expected = oracle.apply_chat_template(MESSAGES, tools=tools, documents=[], chat_template=name, tokenize=False)
        assert rendered(template, TemplateOptions(tools=tools, documents=[], template=name)) == expected


def test_one_named_template_is_the_default(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "chat", "template": DEFAULT}])
    assert rendered(read_text_files(open_weights(folder))[1]) == "default Hi"


def test_several_templates_without_a_default(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "rag", "template": RAG}, {"name": "chat", "template": DEFAULT}])
    template = read_text_files(open_weights(folder))[1]
    with pytest.raises(ConfigError, match="chat template: has no default; choose one of rag, chat with --template"):
        rendered(template)
    assert rendered(template, TemplateOptions(template="chat")) == "default Hi"


def test_empty_templates_are_absent(folder: Path) -> None:
    for content in ("", "  \n"):
        configure(folder, chat_template=content)
        write(folder, "chat_template.jinja", content)
        assert ChatTemplate.from_files(TextFiles(folder).read) is None
    configure(folder, chat_template=DEFAULT)
    assert rendered(ChatTemplate.from_files(TextFiles(folder).read)) == "default Hi"


@pytest.mark.parametrize("given", [3, ["x"], [{"name": "default"}], {"default": 3}, [{"template": "x"}]])
def test_templates_of_another_form_are_refused(folder: Path, given: Any) -> None:
    configure(folder, chat_template=given)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template: expected a text, or a list"):
        open_weights(folder)


def test_template_files_of_other_systems(folder: Path) -> None:
    write(folder, "chat_template.jinja", b"\xef\xbb\xbfa\r\n{% if true %}\r\nb\r\n{% endif %}\r\n")
    assert rendered(ChatTemplate.from_files(TextFiles(folder).read)) == "a\nb\n"
    write(folder, "chat_template.jinja", "é".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8 at byte 0 \(0xE9\)"):
        ChatTemplate.from_files(TextFiles(folder).read)
    write(folder, "additional_chat_templates/x.jinja", "é".encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/x\.jinja: not UTF-8 at byte 0, it is UTF-16"):
        TextFiles(folder).read("tokenizer_config.json")


def test_names_of_tokens_in_their_own_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    write(folder, "special_tokens_map.json", json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))
    tokenizer = read_text_files(open_weights(folder))[0]
    assert tokenizer is not None and (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    configure(folder, eos_token=None)
    tokenizer = read_text_files(open_weights(folder))[0]
    assert tokenizer is not None and (tokenizer.bos_id, tokenizer.eos_id) == (256, None)


def test_files_in_their_usual_form_are_kept_byte_for_byte(folder: Path) -> None:
    write(folder, "chat_template.jinja", DEFAULT)
    files = TextFiles(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert files.read(name) == (folder / name).read_bytes()
    assert files.read("tokenizer.model") is None
