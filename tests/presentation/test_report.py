"""The report's page: its markup, and what a real browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from localmix.errors import FileError
from localmix.measurement.divergence import Divergence
from localmix.presentation.published import find
from localmix.presentation.report import Report, page, write_html
from localmix.presentation.table import ContextPoint, QuantizationRow
from localmix.sizes import MIB

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NASTY = '<img src=x onerror="alert(1)">&\u202egpj.exe\x1b[31m\'</script>'


def row(kind: str, mib: float, ppl: float | None, **values: object) -> QuantizationRow:
    fields: dict[str, object] = {"model": "tinymix", "path": Path("x"), "bpw": 4.5, "error": 0.019, "corpus": "a.txt"}
    return QuantizationRow(type=kind, bytes=int(mib * MIB), ppl=ppl, **(fields | values))  # type: ignore[arg-type]


def measured() -> list[QuantizationRow]:
    """TinyMix's table, with every column."""
    reference = 1.7991
    figures = [
        ("BF16", 12.2, reference, 0.0),
        ("Q8_0", 6.52, 1.7999, 0.000281),
        ("Q6_K", 5.10, 1.8012, 0.001829),
        ("Q5_K_M", 4.45, 1.8024, 0.002171),
        ("Q5_0", 4.38, 1.8039, 0.002512),
        ("Q4_K_M", 3.86, 1.8055, 0.00416),
        ("Q4_0", 3.71, 1.8184, 0.011439),
        ("Q3_K_M", 3.24, 1.8249, 0.012023),
        ("IQ3_XXS", 2.75, 1.8495, 0.021091),
        ("Q2_K", 2.67, 2.0149, 0.08682),
        ("IQ2_XS", 2.17, 2.0554, 0.112487),
        ("IQ2_XXS", 2.03, 2.0828, 0.124171),
    ]
    return [
        row(
            kind,
            mib,
            ppl,
            is_reference=kind == "BF16",
            delta_ppl=None if kind == "BF16" else ppl - reference,
            delta_error=None if kind == "BF16" else 0.001,
            divergence=Divergence(kld, kld / 12, kld / 9, kld * 12, kld * 90, 0.95, 0.004) if kld else None,
            prompt_ms_per_token=0.06,
            pp_tps=16600.0,
            ms_per_token=mib / 40,
            tg_tps=40000 / mib,
            memory_bytes=int((mib + 30) * MIB),
        )
        for kind, mib, ppl, kld in figures
    ]


def full_report(title: str = "TinyMix on a.txt") -> Report:
    table = find("chinese-mixtral")
    curve = [
        ContextPoint("tinymix", "Q4_K_M", context, True, 2.2 - context / 4096, 0.02, 5110, 10, "a.txt")
        for context in (128, 256, 512, 1024)
    ]
    provenance = {
        "Corpus": "a.txt",
        "SHA-256": hashlib.sha256(b"").hexdigest(),
        "Tokens scored": "10,220",
        "Chunks": "20",
        "Context": "1024",
        "Engine": "llama.cpp 0c1e57098",
        "Threads": "1",
        "Machine": "2 cores",
    }
    failed = row("Q1_0", 1.5, math.nan, failure="a NaN in chunk 3")
    rows = [*measured(), failed, *table.rows]
    return Report(title, provenance, rows, [*curve, *table.points], table.notes)


class Outline(HTMLParser):
    """Tags with their attributes, and whether every element is closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_same_report_gives_the_same_well_formed_page() -> None:
    content = page(full_report())
    assert page(full_report()) == content
    outline = Outline(content)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\$\w", content.split("<script>")[0])


def test_nothing_on_the_page_comes_from_elsewhere() -> None:
    for tag, attributes in Outline(page(full_report())).tags:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert attributes.get("href", "data:,") == "data:,"
        assert not {"src", "srcset", "style", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)


def test_the_policy_allows_its_own_script_and_style_and_nothing_else() -> None:
    content = page(full_report())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', content)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"


def test_names_of_models_and_texts_cannot_become_markup() -> None:
    rows = [row(NASTY, 2, 1.9, model=NASTY, corpus=NASTY), row("Q8_0", 4, 1.8, model="b", failure="")]
    failed = row("Q4_0", 3, None, failure=NASTY)
    points = [ContextPoint(NASTY, NASTY, context, False, 2.0, None, corpus=NASTY) for context in (128, 256)]
    content = page(Report(NASTY, {NASTY: NASTY}, [*rows, failed], points, [NASTY]))
    outline = Outline(content)
    assert "img" not in {tag for tag, _ in outline.tags}
    assert sum(tag == "script" for tag, _ in outline.tags) == 1
    assert "\u202e" not in content
    assert "\x1b" not in content
    assert content.count("&lt;img") > 10


def test_the_table_has_what_was_measured_and_no_more() -> None:
    content = page(Report("t", {}, [row("Q8_0", 6, 1.8), row("Q4_0", 3, 1.9)]))
    heads = re.findall(r'<th scope="col"[^>]*><button type="button">([^<]+)<', content)
    assert heads == ["Type", "Size, MiB", "BPW", "PPL ± error"]
    assert '<td data-v="1.8">1.8000 <span class="error">± 0.0190</span></td>' in content
    assert 'class="provenance"' not in content


def test_rows_say_what_they_are() -> None:
    content = page(full_report())
    cells = re.findall(r'<th scope="row" class="word">(.*?)</th>', content)
    assert cells[0] == 'BF16 <span class="tag">reference</span>'
    assert sum("published" in cell for cell in cells) == 12 + 15  # rows, and points of the curves
    assert '<td class="failed" title="a NaN in chunk 3">failed</td>' in content
    assert "30.9, 26.5 and 21.0 GiB" in content
    assert "46.20 GiB" in content and "6.52 MiB" in content  # no unit in common


def test_the_page_leads_with_the_smallest_good_file() -> None:
    content = page(full_report())
    assert "within 1 % of the best perplexity is <strong>Q4_K_M</strong>: 3.86 MiB instead of 12.20 MiB" in content
    two_texts = [*measured(), *(row(kind, 2, 3.0, corpus="b.txt") for kind in ("Q8_0", "Q4_0"))]
    assert 'class="lead"' not in page(Report("t", {}, two_texts))
    assert 'class="lead"' not in page(Report("t", {}, find("chinese-mixtral").rows))


def test_a_report_of_one_row_has_no_plots() -> None:
    content = page(Report("t", {}, measured()[:1]))
    Outline(content)
    assert "<figure" not in content


def test_a_report_of_contexts_has_no_quantization_table() -> None:
    points = [
        ContextPoint("tinymix", "Q8_0", 128, False, 2.25, 0.5, 630, 10),
        ContextPoint("tinymix", "Q8_0", 256, False, math.nan, None, 630, 5),
    ]
    content = page(Report("t", {}, [], points))
    Outline(content)
    assert 'id="table-title"' not in content
    assert '<td data-v="2.25">2.2500 <span class="error">± 0.5000</span></td><td data-v="630">630</td>' in content
    assert '<td data-v="256">256</td><td class="none">–</td>' in content


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(path, full_report())
    assert path.read_text("utf-8") == page(full_report())
    with pytest.raises(FileError):
        write_html(tmp_path / "none" / "report.html", full_report())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(path, full_report("TinyMix beside Chinese-Mixtral, as published: " + "a_long_name_" * 9))
    return path.as_uri()


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Any]:
    """Opens the page at a width; afterwards nothing may have been requested, logged or thrown."""
    requests: list[str] = []
    complaints: list[str] = []
    pages: list[Page] = []

    def opened(width: int, scheme: Any = "light", height: int = 900) -> Page:
        shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        shown.set_default_timeout(5000)
        shown.on("request", lambda request: requests.append(request.url))
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.goto(address)
        pages.append(shown)
        return shown

    yield opened
    for shown in pages:
        shown.close()
    assert {url for url in requests if url != "data:,"} <= {address}
    assert complaints == []


def luminance(colour: str) -> float:
    channels = [float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 400, 700, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_it_can_be_seen(open_page: Any, tmp_path: Path, width: int, scheme: str) -> None:
    shown = open_page(width, scheme)
    assert shown.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    beyond = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 99))"""
    assert shown.evaluate(beyond) == []
    picture = tmp_path / "page.png"
    shown.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    page_colour = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page_colour) > 0.8) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_have_contrast(open_page: Any, scheme: str) -> None:
    shown = open_page(1400, scheme)
    for selector, ground in (
        ("h1", "body"), (".kind", "body"), ("footer", "body"), ("dt", "body"), ("td", "td"), (".error", "td"),
        (".tag", "td"), ("thead button", "thead th"), (".failed", "td"), ("figcaption", "figure"), (".axis", "figure"),
    ):  # fmt: skip
        ink, paper = shown.evaluate(
            """([s, g]) => [getComputedStyle(document.querySelector(s)).color,
            getComputedStyle(document.querySelector(g)).backgroundColor]""",
            [selector, ground],
        )
        if paper != "rgba(0, 0, 0, 0)":
            assert contrast(ink, paper) >= 4.5, selector


def test_the_theme_can_be_switched_by_hand(open_page: Any) -> None:
    shown = open_page(1400, "dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert luminance(shown.evaluate(colour)) < 0.1
    button = shown.get_by_role("button", name="Switch between light and dark")
    assert button.inner_text() == "Light"
    button.click()
    assert luminance(shown.evaluate(colour)) > 0.8
    assert button.inner_text() == "Dark"


def test_headings_sort_by_click_and_key_and_say_so(open_page: Any) -> None:
    shown = open_page(1400)
    column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map(r => r.cells[5].dataset.v ?? null)"
    before = shown.evaluate(column)
    head = shown.get_by_role("columnheader", name="PPL ± error", exact=True).first
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = shown.evaluate(column)
    numbers = [float(value) for value in values if value is not None]
    assert numbers == sorted(numbers)
    assert values[-2:] == [None, None]  # the failed row, and a published one without a perplexity
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = shown.evaluate(column)
    assert [float(value) for value in values if value is not None] == numbers[::-1]
    assert values[-2:] == [None, None]

    kind = shown.get_by_role("columnheader", name="Type", exact=True)
    kind.get_by_role("button").press("Space")
    assert head.get_attribute("aria-sort") is None
    assert kind.get_attribute("aria-sort") == "ascending"
    types = shown.evaluate(
        "[...document.querySelectorAll('table')[0].querySelectorAll('tbody th')].map(c => c.textContent)"
    )
    assert types[0].startswith("BF16") and types[-1].startswith("Q8_0")
    assert len(before) == len(types)


def test_marks_show_their_values_on_hover_and_by_keys(open_page: Any) -> None:
    shown = open_page(1400)
    tip = shown.locator("#tip")
    assert tip.is_hidden()
    mark = shown.locator("#ppl svg.wide .mark").nth(1)
    mark.scroll_into_view_if_needed()
    mark.locator(".shape").hover(force=True)
    assert tip.inner_text().splitlines() == [
        "tinymix Q8_0",
        "6.52 MiB · 4.50 BPW",
        "Perplexity 1.7999 ± 0.0190",
        "a.txt",
    ]
    shown.mouse.move(0, 0)
    assert tip.is_hidden()

    shown.locator("#kld svg.wide .mark").first.focus()
    first = tip.inner_text()
    shown.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    assert "KL divergence" in tip.inner_text()
    shown.keyboard.press("Escape")
    assert tip.is_hidden()


@pytest.mark.parametrize(("width", "kind"), [(400, "narrow"), (1400, "wide")])
def test_labels_do_not_overlap_as_drawn(open_page: Any, width: int, kind: str) -> None:
    shown = open_page(width)
    overlaps = """kind => [...document.querySelectorAll(`svg.${kind}`)].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('.labels text, .limit text')].map(t => [t.textContent, t.getBBox()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
            p.x < q.x + q.width && q.x < p.x + p.width && p.y + 2 < q.y + q.height && q.y + 2 < p.y + p.height)
            .map(([b]) => `${svg.ariaLabel}: ${a} ${b}`));
    })"""
    assert shown.evaluate(overlaps, kind) == []
    other = "wide" if kind == "narrow" else "narrow"
    assert shown.locator(f"svg.{kind}").first.is_visible()
    assert shown.locator(f"svg.{other}").first.is_hidden()


def test_curves_are_solid_where_measured_and_dashed_where_published(open_page: Any) -> None:
    dashes = "s => getComputedStyle(document.querySelector(`${s} svg.wide .curve`)).strokeDasharray"
    shown = open_page(1400)
    assert shown.evaluate(dashes, "#context") == "none"
    assert shown.evaluate(dashes, "#context-published") == "5px, 4px"


def test_the_first_column_stays_in_view(open_page: Any) -> None:
    shown = open_page(400)
    shown.locator(".scroll").first.evaluate("e => e.scrollLeft = 300")
    assert shown.locator("tbody th").first.bounding_box()["x"] < 40


def test_it_prints_light(open_page: Any, tmp_path: Path) -> None:
    shown = open_page(1400, "dark")
    shown.emulate_media(media="print")
    assert luminance(shown.evaluate("getComputedStyle(document.body).backgroundColor")) == 1
    assert shown.locator("#theme").is_hidden()
    shown.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
