"""The HTML report in headless Chromium: it opens from a file, is legible, works and prints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aprcore.reports.collect import collect_maps
from aprcore.reports.files import write_report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore
from aprtui.demo import demo_path, load_faults

# An AA contrast, names, roles, order of headings and what else can be checked without a person.
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the one on the path, else playwright's own."""
    from playwright.sync_api import Error, sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    # Its sandbox refuses to run as root, which continuous integration often is.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=program, args=arguments)
        except Error as error:
            pytest.skip(f"there is no Chromium that starts here: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a demo run with two failing stages."""
    found = load_faults()["kv-tiled"]
    request = Request(model=found.model, trace=found.trace, oracle=demo_path() / "oracle")
    report = run(request)
    maps = collect_maps(report, TensorStore(request))
    assert len(maps) == 2
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report, maps=maps, command=["aprtui", "bisect", "sound.apr"])
    return path


@pytest.fixture
def page(browser: Any, report_file: Path) -> Iterator[Any]:
    """The report, opened from its file; nothing may be fetched or complained of."""
    context = browser.new_context(color_scheme="light", viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    requested: list[str] = []
    complaints: list[str] = []
    opened.on("request", lambda request: requested.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(report_file.as_uri())
    yield opened
    assert [url for url in requested if not url.startswith("data:image/png;")] == [
        report_file.as_uri()
    ]
    assert complaints == []
    context.close()


def ground(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_finding_is_in_view_and_every_map_is_drawn(page: Any) -> None:
    assert page.locator("h1").is_visible()
    assert "kernel FAIL: kv heads tiled" in page.locator("h1").inner_text()
    sizes = page.locator("img").evaluate_all("all => all.map(x => [x.naturalWidth, x.complete])")
    assert sizes == [[11, True], [64, True]]
    assert page.locator("svg.profile polyline").count() >= 3


def test_the_theme_follows_the_system_until_it_is_chosen(page: Any) -> None:
    light = ground(page)
    page.emulate_media(color_scheme="dark")
    dark = ground(page)
    assert light != dark
    page.get_by_label("light").check()
    assert ground(page) == light
    page.get_by_label("dark").check()
    page.emulate_media(color_scheme="light")
    assert ground(page) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    for opened in (False, True):
        page.locator("details").evaluate_all(f"all => all.forEach(x => x.open = {opened:d})")
        found = Axe().run(page, options=RULES)
        assert found.violations_count == 0, found.generate_report()
        passed = {rule["id"] for rule in found.response["passes"]}
        assert {"color-contrast", "image-alt", "label", "svg-img-alt"} <= passed


def test_what_passes_can_be_left_out(page: Any) -> None:
    page.locator("details").evaluate_all("all => all.forEach(x => x.open = true)")
    rows = page.locator("section > details tbody tr")
    assert rows.filter(has_text="PASS").filter(visible=True).count() == 40
    page.get_by_label("only what is not PASS").check()
    assert rows.filter(visible=True).count() == 31
    assert page.locator("summary:visible", has_text="layer 0").count() == 0


def test_a_row_leads_to_its_stage(page: Any) -> None:
    page.get_by_role("link", name="attention", exact=True).click()
    assert page.url.endswith("#fault-layer-2-attention")
    assert page.locator("#fault-layer-2-attention h3").is_visible()


def test_a_narrow_window_scrolls_tables_and_not_the_page(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 400


def test_it_prints_every_layer_on_white(page: Any, tmp_path: Path) -> None:
    page.get_by_label("dark").check()
    page.emulate_media(media="print", color_scheme="dark")
    assert ground(page) == "rgb(255, 255, 255)"
    heights = page.locator("details .scrolled").evaluate_all("all => all.map(x => x.offsetHeight)")
    assert len(heights) >= 5
    assert all(heights)
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
