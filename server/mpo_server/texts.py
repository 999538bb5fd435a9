"""/tokenize, /detokenize and /apply-template: what the model sees of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mpo_formats import ConfigError
from mpo_runtime.model import Model
from mpo_server.chat import read_chat, render
from mpo_server.errors import invalid, json_response
from mpo_server.fields import Field, Table, flag, read, required, text_field
from mpo_server.http import understood
from mpo_server.sampling import LONGEST_PROMPT
from mpo_server.service import Service

TOKENIZE: Table = {
    "content": text_field(LONGEST_PROMPT, "The text."),
    "add_special": flag(False, "With the tokens that the tokenizer puts around a text."),
    "parse_special": flag(True, "Text that spells a special token becomes that token."),
    "with_pieces": flag(False, "With the text of each token."),
}
DETOKENIZE: Table = {"tokens": Field(("array",), 0, 1 << 20, items={"type": "integer"}, text="Token ids.")}


def read_tokenize(model: Model, data: Mapping[str, Any]) -> dict[str, Any]:
    """The request; raises ApiError naming the field that is wrong."""
    values = read(TOKENIZE, data)
    required(values, "content")
    return values


def read_detokenize(model: Model, data: Mapping[str, Any]) -> list[int]:
    """The token ids; raises ApiError for anything else."""
    vocabulary = model.network.architecture.vocab_size
    values = read(DETOKENIZE, data)
    required(values, "tokens")
    for index, token in enumerate(values["tokens"]):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise invalid(f"tokens[{index}]", f"expected a token id from 0 to {vocabulary - 1}")
    return list(values["tokens"])


async def tokenize(request: Request) -> Response:
    """The token ids of a text."""
    service: Service = request.app.state.service
    values = await understood(request, read_tokenize)
    tokenizer = service.model.text_tokenizer()

    def work() -> Response:
        ids = tokenizer.encode(values["content"], values["add_special"], values["parse_special"])
        if not values["with_pieces"]:
            return json_response({"tokens": ids})
        pieces = {token: _piece(tokenizer.token_bytes(token)) for token in set(ids)}
        return json_response({"tokens": [{"id": token, "piece": pieces[token]} for token in ids]})

    with service.place(1):
        return await service.work(work)


def _piece(content: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service: Service = request.app.state.service
    ids = await understood(request, read_detokenize)
    tokenizer = service.model.text_tokenizer()
    with service.place(1):
        return await service.work(lambda: json_response({"content": tokenizer.decode(ids, skip_special_tokens=False)}))


async def apply_template(request: Request) -> Response:
    """The text that the chat template makes of a conversation."""
    service: Service = request.app.state.service
    model = service.model
    chat = await understood(request, read_chat)

    def work() -> Response:
        ids, _, _ = render(model, chat.conversation)
        try:
            prompt: Any = model.text_tokenizer().decode(ids, skip_special_tokens=False)
        except ConfigError as error:
            raise invalid("messages", str(error)) from None
        return json_response({"prompt": prompt, "n_tokens": len(ids)})

    with service.place(1):
        return await service.work(work)
