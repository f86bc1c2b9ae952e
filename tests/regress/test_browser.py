"""The site in a real browser that cannot reach other hosts: pages, links, charts, accessibility.

`nox -s browser` runs these tests. Other sessions skip them if Chromium or playwright is missing.
"""

import math
import random
import shutil
import threading
from pathlib import Path

import pytest

from projecta.regress.site import publish as site
from tests.regress import foreign
from tests.regress.foreign import run
from tests.regress.test_page import grown

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ASV_PAGES = {  # pages of asv: address, element that must appear
    "grid": ("history.html#/", "#summarygrid-display .benchmark-container"),
    "list": ("history.html#/summarylist", "#summarylist-body table tbody tr"),
    "regressions": ("history.html#/regressions", "#regressions-body"),
    "graph": ("history.html#suite.Sleep.time_sleep", "#main-graph canvas"),
}
WIDTHS = {"phone": 390, "desk": 1280}


@pytest.fixture(scope="session")
def browser(request):
    """A headless Chromium."""
    named = request.config.getoption("browser")
    path = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        (pytest.fail if named else pytest.skip)(f"no browser {named or ' or '.join(NAMES)}")
    driver = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python")
    with driver.sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Three commits, measured, gated and published: a folder with the pages below a sub-path."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / ".asv"))
        foreign.make(folder, html_dir=".asv/served/below/a/path")
        for name in ("one", "two", "three"):
            foreign.commit(folder, name)
        (folder / "pyproject.toml").write_text("[tool.projecta]\ngate = 'track_size'\n")
        assert run("gate", "HEAD^", "--machine", "desk")[0] == 3  # one benchmark fails on purpose
        assert run("bench", "HEAD~2..HEAD", "--machine", "desk")[0] == 3
        assert run("publish")[0] == 0
        yield folder


@pytest.fixture(scope="module")
def address(project):
    """The address of the served pages, below a sub-path as on GitHub."""
    with site.serve(project / ".asv/served", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/below/a/path"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser, request):
    """A page that may contact only this host; errors and warnings of the browser fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found, complaints = context.new_page(), []

    def guard(route):
        if route.request.url.startswith("http://127.0.0.1:"):
            return route.continue_()
        complaints.append(f"asked for {route.request.url}")
        return route.abort()

    context.route("**/*", guard)
    found.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("response", lambda got: got.status >= 400 and complaints.append(f"{got.status} {got.url}"))
    yield found
    kept = request.config.getoption("screenshots")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        found.screenshot(path=Path(kept, f"{request.node.name}.png".replace("/", "-")), full_page=True)
    context.close()
    assert complaints == []


def violations(page):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_front_page_is_accessible(page, address, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": WIDTHS[width], "height": 800})
    page.goto(f"{address}/index.html")
    assert page.locator(".verdict").inner_text() == "BROKEN"
    assert page.locator("figure svg").count() >= 1
    for summary in page.locator("summary").all():
        summary.click()
    assert violations(page) == []
    wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wider) == 0  # tables scroll, the page does not
    text = "getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor"
    colours = page.evaluate(text)
    assert ("rgb(232, 234, 237)" in colours) == (scheme == "dark")


def test_the_keyboard_reaches_everything(page, address):
    page.goto(f"{address}/index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
    wanted = page.evaluate(
        "[...document.querySelectorAll('main a, main summary, footer a')].map(e => e.outerHTML.slice(0, 200))"
    )
    assert set(wanted) <= reached


def test_every_link_of_the_front_page_works(page, address):
    page.goto(f"{address}/index.html")
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
    assert len(links) > 8
    for link in {link.partition("#")[0] for link in links}:
        assert page.request.get(link).ok, link


@pytest.mark.parametrize("name", ASV_PAGES)
def test_asv_pages_are_drawn(page, address, name):
    path, wanted = ASV_PAGES[name]
    page.goto(f"{address}/{path}")
    page.locator(wanted).first.wait_for(timeout=10_000)
    if name == "graph":
        inked = """() => [...document.querySelectorAll('#main-graph canvas')].some(c => c.getContext('2d')
            .getImageData(0, 0, c.width, c.height).data.some(x => x))"""
        page.wait_for_function(inked, timeout=10_000)
    if name == "grid":
        page.locator("#summarygrid-display .benchmark-plot canvas, .benchmark-plot img").first.wait_for()


def test_nothing_moves_while_it_loads_and_2000_commits_load_within_a_second(page, workplace):
    foreign.make(workplace)
    foreign.commit(workplace, "one")
    draw = random.Random(0)
    pages = grown(
        workplace, 2000, [list(range(30)), list("abcdefghij")],
        lambda _, place, i: (1 + place) * math.exp(draw.gauss(0, 0.01)) * (1.2 if i > 1900 else 1),
    )  # fmt: skip
    with site.serve(pages, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page.add_init_script(
            "window.moved = 0; new PerformanceObserver(list => { for (const e of list.getEntries()) window.moved += e.value })"
            ".observe({type: 'layout-shift', buffered: true})"
        )
        times, sizes = [], []
        page.on("response", lambda got: sizes.append(len(got.body())))
        for _ in range(3):
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/index.html", wait_until="load")
            times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            page.wait_for_timeout(200)
        assert page.evaluate("window.moved") == 0
        server.shutdown()
        thread.join()
    assert min(times) < 1000
    assert sum(sizes) / 3 < 500_000


def test_print_leaves_out_the_navigation(page, address, tmp_path):
    page.goto(f"{address}/index.html")
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.locator("#machines").is_visible()
    if page.context.browser.browser_type.name == "chromium":
        page.pdf(path=tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000
