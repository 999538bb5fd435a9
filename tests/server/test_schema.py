"""Requests made up from the server's OpenAPI document, by schemathesis where it is installed: never a 5xx."""

from __future__ import annotations

from typing import Any

import pytest

from mpo_server.openapi import document
from tests.server.conftest import Server

EXAMPLES = 60  # requests to each path

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("path", sorted(document()["paths"]))
def test_requests_of_the_document_and_wrong_ones(server: Server, path: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    import hypothesis
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS

    served: dict[str, Any] = server.get("/openapi.json").json
    assert served["paths"].keys() == document()["paths"].keys()
    for operations in served["paths"].values():  # answers are short, so that many fit into the time
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            limits = {"max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens"} & set(
                body.get("properties", {})
            )
            if limits:
                body["properties"] |= {name: {"type": "integer", "minimum": 1, "maximum": 2} for name in limits}
                body["required"] = [*body["required"], *sorted(limits)]
                body["properties"]["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
    schema = schemathesis.openapi.from_dict(served)
    schema.config.update(base_url=server.url)
    checks = [
        CHECKS.get_one(name) for name in ("not_a_server_error", "status_code_conformance", "content_type_conformance")
    ]
    checks += [CHECKS.get_one("response_schema_conformance")]
    [operation] = [found.ok() for found in schema.include(path=path).get_all_operations()]
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode is GenerationMode.NEGATIVE and "requestBody" not in served["paths"][path][operation.method]:
            continue

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            case.call_and_validate(checks=checks, timeout=120)

        run()
    assert server.get("/health").status == 200
