"""The built site, opened in a browser. `make test-docs` builds it and runs these; they are no part of `make test`."""

import functools
import importlib
import os
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import tnlayers
from tnlayers import formats, models, testing

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
REQUIRED = os.environ.get("SITE_TESTS_REQUIRED")
"""Set where an absent browser is an error, as in .ci/run; else the tests that need one are skipped."""

pytestmark = pytest.mark.site


def lacks(reason):
    """Skip a test, or fail where nothing may be skipped."""
    (pytest.fail if REQUIRED else pytest.skip)(reason)


class Page(HTMLParser):
    """Ids and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids |= {named[key] for key in ("id", "name") if named.get(key)}
        self.links += [named[key] for key in ("href", "src") if named.get(key)]
        self.loaded += [named["src"]] if named.get("src") else []
        self.loaded += (
            [named["href"]] if tag == "link" and named.get("rel") in {"stylesheet", "preload", "icon"} else []
        )


@functools.cache
def page(name):
    return Page((SITE / name).read_text(encoding="utf-8"))


def test_there_is_a_site():
    if not PAGES:
        lacks("the site is not built: make docs")
    assert {"index.html", "search.html", "tutorials/index.html", "reference/layers/tr.html"} <= {*PAGES}


def test_no_internal_link_is_dead():
    dead = []
    for name in PAGES:
        for link in page(name).links:
            if "://" in link or link.startswith(("mailto:", "data:", "javascript:")):
                continue
            target, anchor = urldefrag(unquote(link))
            path = (SITE / name).parent / target.partition("?")[0] if target else SITE / name
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                dead.append(f"{name}: {link}")
            elif anchor and path.suffix == ".html" and name not in {"search.html", "genindex.html"}:
                known = page(path.resolve().relative_to(SITE.resolve()).as_posix()).ids
                if anchor not in known:
                    dead.append(f"{name}: {link} has no such anchor")
    assert not dead


def test_formulas_and_pictures_are_in_the_pages():
    """What the browser's test looks at is there."""
    text = {name: (SITE / name).read_text(encoding="utf-8") for name in PAGES}
    for source in (ROOT / "docs" / "explanation").glob("*.md"):
        written = source.read_text(encoding="utf-8").count("$$") // 2
        assert text[f"explanation/{source.stem}.html"].count('class="math') >= written, source.name
    tutorials = [name for name in PAGES if name.startswith("tutorials/plot_")]
    assert len(tutorials) >= 7
    for name in tutorials:
        assert "sphx_glr_" in text[name], f"{name} has no picture"
    assert len([name for name in PAGES if name.startswith("how-to/")]) > 10
    for name in PAGES:
        if name.startswith("evidence/") and name != "evidence/index.html":
            assert "../_images/" in text[name], f"{name} has no picture"


def test_every_public_name_is_in_the_reference():
    ids = {entry for name in PAGES if name.startswith("reference/") for entry in page(name).ids}
    names = {f"tnlayers.{name}" for name in tnlayers.__all__}
    for module in (formats, models, testing):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    names -= {f"tnlayers.formats.{name}" for name in ("FORMATS", "Format", "register")}  # they stand as tnlayers.NAME
    missing = names - ids
    assert not missing


def test_nothing_names_another_host():
    """Pages load without a network: scripts, styles, fonts and pictures are the site's own."""
    for name in PAGES:
        assert not [link for link in page(name).loaded if "//" in link], name


@pytest.fixture(scope="module")
def browser():
    sync_api = (importlib.import_module if REQUIRED else pytest.importorskip)("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        lacks("there is no Chromium on this machine: apt-get install chromium")
    if not PAGES:
        lacks("the site is not built: make docs")
    flags = ["--disable-gpu", "--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tab(browser):
    """A tab, and what went wrong in it."""
    tab = browser.new_page(viewport=WIDE)
    tab.wrong = []
    tab.on("console", lambda said: tab.wrong.append(said.text) if said.type in {"error", "warning"} else None)
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    tab.on("requestfailed", lambda request: tab.wrong.append(f"{request.url}: {request.failure}"))
    tab.on(
        "response", lambda answer: tab.wrong.append(f"{answer.url}: {answer.status}") if answer.status >= 400 else None
    )
    yield tab
    tab.close()


FACTS = """() => ({
    formulas: [...document.querySelectorAll('.math')].filter(each => !each.querySelector('mjx-container *')).length,
    pictures: [...document.querySelectorAll('.bd-article img')]
        .filter(each => !each.complete || each.naturalWidth < 2 || each.getBoundingClientRect().width < 10).length,
    wide: [...document.querySelectorAll('.bd-article img')]
        .filter(each => each.getBoundingClientRect().right > innerWidth + 1).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
})"""


@pytest.mark.parametrize("part", range(4))
def test_pages_load_and_show_formulas_and_pictures(tab, address, part):
    """No console error, every formula set, every picture there and within the screen, narrow and wide."""
    for name in PAGES[part::4]:
        tab.goto(f"{address}/{name}", wait_until="load")
        if tab.locator(".math").count():
            tab.wait_for_function("() => !document.querySelector('.math:not(:has(mjx-container))')")
        for size in (WIDE, NARROW):
            tab.set_viewport_size(size)
            facts = tab.evaluate(FACTS)
            assert (facts["formulas"], facts["pictures"], facts["wide"]) == (0, 0, 0), f"{name}: {facts}"
            assert facts["overflow"] <= 0, f"{name} is {facts['overflow']} pixels too wide at {size['width']}"
        assert not tab.wrong, f"{name}: {tab.wrong}"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("TRConv2d", "reference/layers/tr.html#tnlayers.TRConv2d"),
        ("rank", "how-to/ranks.html"),
        ("NaN", "how-to/nan.html"),
        ("ranks", "how-to/ranks.html"),
        ("budget", "how-to/ranks.html"),
        ("save", "how-to/saving.html"),
        ("load", "how-to/saving.html"),
        ("onnx", "how-to/compile-export.html"),
        ("weight decay", "how-to/optimizers.html"),
        ("half precision", "how-to/mixed-precision.html"),
        ("ddp", "how-to/many-processes.html"),
        ("gpu", "how-to/rates.html"),
        ("LSTM", "how-to/"),
        ("cite", "project.html"),
        ("tensorize_", "reference/swapping.html"),
    ],
)
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_search_finds_the_right_page_first(tab, address, words, found, size):
    tab.set_viewport_size(size)
    tab.goto(f"{address}/search.html?q={words}")
    first = tab.locator("#search-results li a").first
    first.wait_for()
    assert found in first.get_attribute("href")
    assert not tab.wrong
