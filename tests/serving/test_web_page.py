"""The chat page in a real browser: asked, answered, reloaded, locked, and shut against other pages."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.conftest import KEY, Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, StorageState

ANSWER = "Wilma lives at 47 Apple Court."
REPLIES = ".chat-message-assistant .markdown-content"
# a name that its owner bends to this machine, as in an attack by DNS rebinding
BENT = "rebound.example"
RESOLVER = f"MAP {BENT} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", f"--host-resolver-rules={RESOLVER}"]
        found = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the chat page of a server; afterwards nothing may have been asked of anybody else, no file of the page
    may have been missing, and no script may have failed.

    What the page shall ask for beside a temperature of 0 is named, as in its settings.
    """
    wrong: list[str] = []
    contexts: list[BrowserContext] = []

    def opened(served: Served, **request: Any) -> Page:
        if not served.has_page:
            pytest.skip("this llama-server was built without its page (`make vendor` with npm builds it)")

        def judge(request: Request) -> None:
            if not request.url.startswith((f"{served.url}/", "data:", "blob:")):
                wrong.append(f"asked for {request.url}")

        value = json.dumps({"customJson": json.dumps({"temperature": 0, **request})})
        stored: StorageState = {
            "origins": [{"origin": served.url, "localStorage": [{"name": "LlamaUi.config", "value": value}]}]
        }
        context = browser.new_context(storage_state=stored)
        contexts.append(context)
        page = context.new_page()
        page.on("request", judge)
        # what the policy of the page stops is no request yet, and an attempt all the same
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("response", lambda found: wrong.append(f"missing: {found.url}") if found.status == 404 else None)
        page.goto(f"{served.url}/")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page: Page, question: str) -> Locator:
    """Type a question and press Enter; where its reply will be."""
    box = page.get_by_placeholder("Type a message...")
    replies = page.locator(REPLIES)
    before = replies.count()
    box.fill(question)
    box.press("Enter")
    return replies.nth(before)


def wait_until_done(page: Page) -> None:
    """Wait for the button that stops a reply to become the one that sends a question."""
    page.get_by_role("button", name="Send", exact=True).wait_for()


def wait_for_text(place: Locator, text: str) -> None:
    from playwright.sync_api import expect

    expect(place).to_contain_text(text)


def test_a_question_and_its_answer_survive_a_reload(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    wait_for_text(ask(page, "Where does Wilma live?"), ANSWER)
    wait_until_done(page)
    rules = page.evaluate("[...document.styleSheets].map(sheet => sheet.cssRules.length)")
    assert max(rules, default=0) > 100
    address = page.url

    page.reload()
    assert page.url == address
    wait_for_text(page.locator(REPLIES).first, ANSWER)
    with page.expect_request("**/v1/chat/completions") as asked:
        wait_for_text(ask(page, "威玛住在哪里？"), "威玛住在苹果院47号。")
    body = json.loads(asked.value.post_data or "")
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    wait_until_done(page)

    page.goto("about:blank")
    page.goto(address)
    wait_for_text(page.locator(REPLIES).nth(1), "威玛住在苹果院47号。")


@contextmanager
def slowly(page: Page) -> Iterator[None]:
    """Let the browser read so slowly that a reply of TinyMix takes a while."""
    session = page.context.new_cdp_session(page)

    def limit(bytes_per_second: int) -> None:
        conditions = {"offline": False, "latency": 0, "downloadThroughput": bytes_per_second, "uploadThroughput": -1}
        session.send("Network.emulateNetworkConditions", conditions)

    limit(20_000)
    yield
    limit(-1)


def test_a_reply_comes_word_by_word_until_it_is_stopped(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served, ignore_eos=True)
    page.get_by_text("Hello there").wait_for()
    page.evaluate(
        """selector => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const reply = document.querySelector(selector);
                if (reply) window.lengths.add(reply.textContent.trim().length);
            }).observe(document.body, {childList: true, subtree: true, characterData: true});
        }""",
        REPLIES,
    )
    with slowly(page):
        place = ask(page, "Where does Wilma live?")
        wait_for_text(place, "[INST]")  # what comes when it may not end
        page.get_by_role("button", name="Stop generation").click()
        wait_until_done(page)
    lengths = page.evaluate("[...window.lengths]")
    assert len(lengths) > 5, lengths
    assert ANSWER in (place.text_content() or "") and max(lengths) < 1000


def test_a_reload_in_mid_reply_takes_it_up_again(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served, ignore_eos=True, max_tokens=300)
    page.get_by_text("Hello there").wait_for()
    with slowly(page):
        wait_for_text(ask(page, "Where does Wilma live?"), ANSWER)
        seen = len(page.locator(REPLIES).first.text_content() or "")
        page.reload(wait_until="commit")
    wait_until_done(page)
    wait_for_text(page.locator(REPLIES).first, ANSWER)
    assert len(page.locator(REPLIES).first.text_content() or "") > 500 > seen


def test_the_page_asks_for_the_key(guarded: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(guarded)
    page.get_by_role("button", name="Enter API Key").click()
    box = page.get_by_placeholder("Enter your API key")
    box.fill("not-the-right-key")
    box.press("Enter")
    page.get_by_text("Invalid API key").wait_for()
    box.fill(KEY)
    box.press("Enter")
    wait_for_text(ask(page, "Where does Wilma live?"), ANSWER)
    wait_until_done(page)
    page.reload()
    wait_for_text(page.locator(REPLIES).first, ANSWER)
    wait_for_text(ask(page, "威玛住在哪里？"), "威玛住在苹果院47号。")


def test_a_bent_name_is_refused(served: Served, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        found = page.goto(f"http://{BENT}:{served.url.rsplit(':', 1)[1]}/v1/models")
        assert found is not None and found.status == 403
        assert "tinymix" not in page.content()


@pytest.fixture
def foreign_page() -> Iterator[str]:
    """The address of another site on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize(
    "options",
    [
        "{}",
        "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'}",
        # what a page may send without asking before
        "{method: 'POST', mode: 'no-cors', headers: {'Content-Type': 'text/plain'}, body: '{\"messages\": []}'}",
    ],
)
def test_another_site_gets_nothing(served: Served, browser: Browser, foreign_page: str, options: str) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(foreign_page)
        statuses: list[int] = []
        page.on("response", lambda found: statuses.append(found.status))
        read = page.evaluate(
            f"fetch('{served.url}/v1/chat/completions', {options}).then(r => r.text()).catch(() => 'refused')"
        )
        assert read in ("refused", "")  # an opaque answer reads as nothing
        assert set(statuses) <= {403}
