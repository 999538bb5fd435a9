"""The page in a real browser: talking, stopping, reloading, hostile output, keyboard, accessibility."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ROOT, Server

PAGE = ROOT / "server" / "mpo_server" / "page"
HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>
[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>) ![x](http://evil.example/x.png)
<svg onload=window.hacked=5></svg> `<b>` **<i onclick=alert(1)>x</i>**

```html
</code></pre><img src=x onerror="window.hacked=6">
```

| <img src=x onerror=window.hacked=7> | b |
|---|---|
| <a href="javascript:window.hacked=8">x</a> | [x](vbscript:x) |
"""


def test_the_page_is_whole_without_the_network(server: Server) -> None:
    sources = {path.name: path.read_text("utf-8") for path in PAGE.iterdir()}
    assert {"index.html", "app.js", "style.css", "markdown.js"} <= sources.keys()
    for name, text in sources.items():
        outside = [link for link in re.findall(r"https?://[\w.]+", text) if "www.w3.org" not in link]
        assert outside == [], name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        reply = server.get("/" if name == "index.html" else f"/{name}")
        assert reply.status == 200 and reply.body.decode() == text
    page = sources["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", page), (
        "the policy forbids code in the page"
    )
    assert server.get("/app.js").headers["content-type"].startswith("text/javascript")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="pip install playwright: tests the page in a browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: the page is not tested in a browser")
    with library.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    yield opened
    context.close()
    assert faults == []


class FakeModel(http.server.BaseHTTPRequestHandler):
    """Serves the page, and an answer of our choice, with the headers of the real server."""

    answer = HOSTILE
    policy = ""

    def do_GET(self) -> None:
        if self.path == "/props":
            facts = {"model": "<b>evil</b>", "quality": [], "layers": [], "provenance": {"exporter": ""}, "kernels": {}}
            self.reply(
                "application/json", json.dumps(facts | {"parameters": 1, "bytes": 1, "bits_per_weight": 8, "n_ctx": 1})
            )
            return
        file = PAGE / ("index.html" if self.path == "/" else Path(self.path).name)
        kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        self.reply(kinds[file.suffix], file.read_text("utf-8"))

    def do_POST(self) -> None:
        pieces = [self.answer[start : start + 7] for start in range(0, len(self.answer), 7)]
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        self.reply(
            "text/event-stream", "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        )

    def reply(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", self.policy)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *values: Any) -> None:
        """Says nothing."""


@pytest.mark.long
def test_talk_stop_write_again_edit_and_reload(page: Any, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_selector("h1:text('nano')")
    assert page.text_content(".empty h2") == "Talk to nano"
    page.fill("#message", "I want to book a table.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    answer = page.text_content(".turn.assistant .md")
    assert answer
    assert "tokens/s" in page.text_content(".turn.assistant .count")
    assert page.text_content("#status") == "The answer is complete"
    assert page.get_attribute("#messages", "aria-busy") == "false"

    page.reload()
    page.wait_for_selector("h1:text('nano')")
    assert page.text_content(".turn.assistant .md") == answer
    assert page.text_content(".turn.user .body") == "I want to book a table."

    page.click("[aria-label='Write again']")
    page.wait_for_selector("#send:visible")
    assert page.locator(".turn").count() == 2

    page.click(".turn.user [aria-label='Edit']")
    page.fill(".editor textarea", "Tell me a story.")
    page.click(".editor .primary")
    page.wait_for_selector("#send:visible")
    assert page.text_content(".turn.user .body") == "Tell me a story."

    page.click("#new")
    assert page.locator(".turn").count() == 0
    page.click("#conversations .open >> nth=1")
    assert page.locator(".turn").count() == 2
    page.click("#conversations li.current .remove")
    page.reload()
    assert page.locator(".turn").count() == 0


@pytest.mark.long
def test_stop_keeps_what_came(page: Any, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_selector("h1:text('nano')")
    page.evaluate("localStorage['mpo.settings'] = JSON.stringify({temperature: '2', system: 'Speak without end.'})")
    page.reload()
    stopped = 0
    for _ in range(4):
        page.click("#new")
        page.fill("#message", "Tell me the longest story that you know, with many people in it.")
        page.click("#send")
        page.wait_for_selector(".turn.assistant .md p")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:visible")
        assert page.text_content(".turn.assistant .md")
        stopped += page.text_content("#status") == "Stopped"
    assert stopped > 0
    assert server.get("/health").status == 200


@pytest.mark.long
def test_hostile_output_stays_text(page: Any) -> None:
    from mpo_server.security import POLICY

    FakeModel.policy = POLICY
    fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeModel)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    address = f"http://127.0.0.1:{fake.server_address[1]}"
    try:
        page.goto(address)
        page.wait_for_selector("h1:text('<b>evil</b>')")
        page.fill("#message", HOSTILE)
        page.click("#send")
        page.wait_for_selector(".turn.assistant .md table")
        page.wait_for_selector("#send:visible")
        page.reload()
        page.wait_for_selector(".turn.assistant .md table")
        assert page.evaluate("window.hacked") is None
        assert page.locator("#messages img, #messages script, #messages svg:not(.i), #messages [onclick]").count() == 0
        targets = page.locator("#messages a").evaluate_all("nodes => nodes.map(node => node.protocol)")
        assert set(targets) <= {"http:", "https:", "mailto:"}
        assert page.text_content(".turn.user .body") == HOSTILE.strip()
        assert 'onerror="window.hacked=1"' in page.text_content(".turn.assistant .md")
        assert all(url.startswith(address) for url in asked)
    finally:
        fake.shutdown()
        fake.server_close()


@pytest.mark.long
def test_keyboard_alone(page: Any, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_selector("h1:text('nano')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "message"
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"new", "open-settings", "open-panel", "messages", "send"} <= seen
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#settings').open")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.querySelector('#settings').open")
    page.focus("#open-panel")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "close-panel"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "open-panel"


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(browser: Any, server: Server, scheme: Any, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    try:
        page.goto(server.url)
        page.wait_for_selector("h1:text('nano')")
        page.fill("#message", "I want to book a table.")
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:visible")
        markdown = (
            "# A\n\n- b\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n\n> quote `x` [l](https://example.org)"
        )
        page.evaluate(
            """text => { const all = JSON.parse(localStorage['mpo.conversations']);
            all[0].messages.push({role: 'user', content: 'x'}, {role: 'assistant', content: text, reasoning: 'hm'});
            localStorage['mpo.conversations'] = JSON.stringify(all); }""",
            markdown,
        )
        page.reload()
        page.wait_for_selector("h1:text('nano')")
        found = [("chat", axe.run(page))]
        page.click("#open-panel")
        found.append(("panel", axe.run(page)))
        page.click("#close-panel")
        page.click("#open-settings")
        found.append(("settings", axe.run(page)))
        page.keyboard.press("Escape")
        if width < 500:
            page.click("#open-sidebar")
            page.wait_for_timeout(300)
            found.append(("sidebar", axe.run(page)))
        for place, result in found:
            assert result.violations_count == 0, (place, result.generate_report())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        context.close()
