"""A report in a real browser: no network, all figures drawn, device selection, dark theme, names shown as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_report import FIGURES, HOSTILE

from experiments.report.cli import write_report
from experiments.report.reading import read_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of tapfl's dev extra")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser on the PATH: one of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """Opens a report; asserts at the end that the page requested no other file and logged no error."""
    context = browser.new_context(**options)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
    yield page
    assert said == [f"request: {file.as_uri()}"]
    assert page.evaluate("window.pwned") is None
    context.close()


@pytest.fixture(scope="module")
def file(reported: tuple[Path, str]) -> Path:
    return reported[0] / "report.html"


def look(page: Any) -> dict[str, str]:
    """Returns every figure's drawing as SVG text, by name."""
    drawn: dict[str, str] = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.drawing')]"
        ".map(place => [place.dataset.figure, place.querySelector('svg')?.outerHTML ?? '']))"
    )
    return drawn


def fits(page: Any) -> bool:
    """Returns whether the page scrolls only vertically and no drawing is wider than its container."""
    return bool(
        page.evaluate(
            "(() => { const width = element => element.getBoundingClientRect().width;"
            " const svgs = [...document.querySelectorAll('.drawing svg')];"
            " return document.documentElement.scrollWidth <= window.innerWidth"
            " && svgs.every(svg => width(svg) <= width(svg.parentNode) + 1) })()"
        )
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_all_figures_fit_the_width_of_the_window(width: int, browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": width, "height": 900}) as page:
        drawn = look(page)
        assert drawn.keys() == FIGURES
        for name, svg in drawn.items():
            assert svg.count("<path") > 5, name
        assert fits(page)
        for place in page.query_selector_all(".drawing"):
            assert len(place.get_attribute("aria-label")) > 40


def test_a_figure_follows_the_width(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": 1280, "height": 900}) as page:
        page.set_viewport_size({"width": 600, "height": 900})
        page.wait_for_function("document.querySelector('.drawing svg').getBoundingClientRect().width < 580")
        page.wait_for_timeout(200)
        assert fits(page)


def test_selecting_a_device_changes_the_figures(browser: Any, file: Path) -> None:
    follows = FIGURES - {"real-phases", "real-rounds"}
    with opened(browser, file) as page:
        everything = look(page)
        page.select_option("#device", "1")
        page.wait_for_selector("html[data-device='1']", state="attached")
        one = look(page)
        assert {name for name in FIGURES if one[name] != everything[name]} == follows
        assert page.get_attribute("tr[data-device='1']", "aria-selected") == "true"
        page.click("tr[data-device='2'] td:nth-child(3)")
        page.wait_for_selector("html[data-device='2']", state="attached")
        assert page.input_value("#device") == "2" and look(page)["curves"] != one["curves"]
        page.click("tr[data-device='2'] button")
        page.wait_for_selector("html[data-device='']", state="attached")
        assert page.input_value("#device") == ""


def test_a_tooltip_shows_numbers_and_names_stay_text(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        cell = page.query_selector(".drawing[data-figure='partition'] path[aria-label*='script']")
        cell.evaluate("cell => cell.scrollIntoView({ block: 'center' })")
        cell.hover(force=True)  # its number covers it and has the same tooltip
        page.wait_for_selector("#vg-tooltip-element.visible")
        said = page.inner_text("#vg-tooltip-element")
        assert HOSTILE[0][:20] in said and "training" in said
        assert page.query_selector("#vg-tooltip-element script") is None
        figure = page.locator("figure", has=page.locator("[data-figure='partition']"))
        figure.locator("summary").click()
        assert HOSTILE[1] in figure.locator("table").inner_text()
        assert page.query_selector("img") is None and page.query_selector("main b, main i") is None


def colours(page: Any) -> list[str]:
    """Returns the colours of the page's background and text, and of a figure's text and lines."""
    found: list[str] = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " getComputedStyle(document.querySelector('[data-figure=curves] svg text')).fill,"
        " getComputedStyle(document.querySelector('[data-figure=curves] svg .mark-line path')).stroke]"
    )
    return found


def test_dark_theme_light_theme_and_print(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="light") as page:
        light = colours(page)
    with opened(browser, file, color_scheme="dark") as page:
        dark = colours(page)
        assert all(a != b for a, b in zip(light, dark, strict=True)) and "var" not in "".join(light + dark)
        page.click("#theme")
        assert colours(page) == light
        page.click("#theme")
        assert colours(page) == dark
        page.emulate_media(media="print")
        assert colours(page) == light
        page.set_viewport_size({"width": 720, "height": 1000})
        assert fits(page)
        assert page.pdf().startswith(b"%PDF")


def test_several_runs_over_rounds_bytes_and_time(browser: Any, reported: tuple[Path, str], tmp_path: Path) -> None:
    file = write_report([read_run(reported[0])] * 2, tmp_path)
    with opened(browser, file) as page:
        assert look(page)["curves-over-round"] and not look(page)["curves-over-mb"]
        page.select_option("select[data-choice]", label="bytes")
        page.wait_for_selector("[data-figure='curves-over-mb'] svg")
        assert "MB sent and received" in look(page)["curves-over-mb"]
        assert not page.is_visible("[data-figure='curves-over-round']")
