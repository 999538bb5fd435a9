"""Other people's programs against the server; each test is skipped where its program is not installed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Server

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def test_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm", reason="pip install litellm")
    options: Any = {"model": "openai/nano", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}
    messages = [{"role": "user", "content": "I want to book a table."}]
    text = litellm.completion(messages=messages, max_tokens=20, **options).choices[0].message.content
    chunks = litellm.completion(messages=messages, max_tokens=20, stream=True, **options)
    assert text and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "sea " * 3000}], **options)
