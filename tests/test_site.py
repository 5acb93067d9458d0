"""The course site: built once, offline, and then read as files and in a real browser."""

import functools
import http.server
import importlib
import inspect
import json
import os
import pkgutil
import re
import runpy
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import minijamba
from minijamba import cli
from minijamba.testing import assert_rejects

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The command line describes itself; adapters belong to programs that need not be installed; templates are no package.
NO_ENTRY = ("minijamba.__main__", "minijamba.cli", "minijamba.adapters", "minijamba.assignment.template")
ELSEWHERE = re.compile(r"(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert cli.main(["site", str(folder)]) == 0, "minijamba site says above what it stumbles over"
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site) -> dict:
    """Path in the site -> page. What lies in _static is a template of the theme, and no page."""
    paths = {path.relative_to(site).as_posix(): path for path in site.rglob("*.html")}
    read = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if not name.startswith("_static/")}
    return {name: Page(html) for name, html in read.items()}


class Page(HTMLParser):
    """What a page fetches when it opens, where it leads, and what is in it."""

    VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched, self.links, self.ids, self.images, self.folds = [], [], set(), [], []
        self.classes, self.open, self.words = [], [], []
        self.feed(html)
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.ids.add(attributes.get("id"))
        self.classes.append((tag, attributes.get("class", "").split()))
        leads = tag in ("a", "area")
        self.links += [attributes["href"]] if leads and "href" in attributes else []
        loads = () if leads else ("src", "href", "data", "srcset")
        self.fetched += [attributes[name] for name in loads if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "details":
            self.folds.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            self.fetched += fetched_by(data)
        else:
            self.words.append(data)

    def count(self, tag: str, name: str) -> int:
        return sum(tag == found and name in classes for found, classes in self.classes)


def fetched_by(code: str) -> list[str]:
    """Addresses that a style sheet or an inline script loads."""
    quoted = re.findall(r"\b(?:import|from|fetch)[\s(]*['\"]([^'\"]+)", code)
    return quoted + re.findall(r"url\(\s*['\"]?([^'\")\s]+)", code)


def test_no_page_loads_anything_from_elsewhere(site, pages):
    def check(pages):
        fetched = {(name, address) for name, page in pages.items() for address in page.fetched}
        assert not [(name, address) for name, address in fetched if ELSEWHERE.match(address)]

    check(pages)
    styles = {path.name: path.read_text(encoding="utf-8") for path in site.rglob("*.css")}
    assert len(styles) > 3
    assert not [name for name, css in styles.items() if any(map(ELSEWHERE.match, fetched_by(css)))]
    planted = (
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<iframe src="http://video.example"></iframe>',
        "<style>@import 'https://fonts.example/x.css';</style>",
        "<style>p { background: url(https://pictures.example/x.png) }</style>",
        '<script type="module">import "https://cdn.example/x.mjs"</script>',
    )
    check({"a link that waits for a click": Page('<a href="https://arxiv.org">paper</a>')})
    assert_rejects(check, *({"planted": Page(html)} for html in planted))


def test_every_link_leads_somewhere(site, pages):
    def check(some):
        followed = [(name, link) for name, page in some.items() for link in page.links + page.fetched]
        assert not [(name, link) for name, link in followed if is_dead(name, link, pages | some)]

    def is_dead(name, link, pages):
        if ELSEWHERE.match(link) or link.startswith(("mailto:", "data:")) or link == "#":
            return False
        path, _, anchor = unquote(link).partition("#")
        target = os.path.normpath(Path(name).parent / path.partition("?")[0]) if path else name
        if target not in pages:
            return not (site / target).is_file()
        return bool(anchor) and anchor not in pages[target].ids

    check(pages)
    links = ('<a href="absent.html">', '<a href="ladder.html#absent">', '<a href="#absent">', '<img src="absent.png">')
    assert_rejects(check, *({"docs/planted.html": Page(link)} for link in links))
    check({"docs/planted.html": Page('<a id="x" href="#x"><a href="ladder.html#the-ladder">')})


def test_every_notebook_has_its_page_and_is_listed(pages):
    def check(index):
        missing = [path.stem for path in NOTEBOOKS if f"../notebooks/{path.stem}.html" not in index.links]
        missing += [question(path) for path in NOTEBOOKS if question(path) not in index.text]
        assert not missing

    check(pages["docs/index.html"])
    assert_rejects(check, pages["docs/api/index.html"], Page(f'<a href="../notebooks/{NOTEBOOKS[0].stem}.html">'))
    solved = [f"notebooks/solutions/{path.stem}.html" for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb")]
    assert solved and pages.keys() >= {*solved, *(f"notebooks/{path.stem}.html" for path in NOTEBOOKS)}


def question(notebook: Path) -> str:
    title, *_ = "".join(cells(notebook)[0]["source"]).splitlines()
    return title.removeprefix("# ")


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def public_names():
    """Dotted name -> function or class, of all that has a docstring and is defined in a module of the package."""
    for module in pkgutil.walk_packages(minijamba.__path__, "minijamba."):
        if module.name.startswith(NO_ENTRY):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            defined = inspect.isfunction(value) or inspect.isclass(value)
            if defined and value.__module__ == module.name and not name.startswith("_") and value.__doc__:
                yield f"{module.name}.{value.__name__}", value


def test_every_public_name_has_its_entry(pages):
    def check(reference):
        missing = [name for name, _ in public_names() if not any(name in page.ids for page in reference.values())]
        assert not missing, f"name their modules in docs/api: {missing}"
        assert not [name for name in minijamba.__all__ if f"mj.{name}" not in reference["docs/api/index.html"].text]

    reference = {name: page for name, page in pages.items() if name.startswith("docs/api/")}
    check(reference)
    assert_rejects(check, {**reference, "docs/api/scan.html": Page("")}, {**reference, "docs/api/index.html": Page("")})


def test_docstrings_are_shown_to_the_letter(pages):
    def check(text):
        for name, value in public_names():
            indented = [line.strip() for line in inspect.getdoc(value).splitlines() if line.startswith(" ")]
            assert not [(name, line) for line in indented if line not in text]
        assert "state_t = exp(delta_t A) * state_{t-1} + delta_t B_t x_t\ny_t     = (<C_t, state_t> + D x_t)" in text

    text = "\n".join(page.text for name, page in pages.items() if name.startswith("docs/api/"))
    check(text)
    assert_rejects(check, text.replace("y_t     =", "y_t ="), text.replace("*", ""))


def test_the_ladder_shows_every_rung(pages):
    def check(page):
        shown = {link.rpartition("#")[2].removeprefix("module-") for link in page.links}
        rungs = [
            rung
            for component in ("scan", "conv", "moe", "loss", "mlp")
            for name, make in vars(importlib.import_module(f"minijamba.{component}")).items()
            if name in ("rungs", "step_rungs")
            for rung in make(torch.device("cpu")).values()
            if not rung.__name__.startswith("_")
        ]
        assert len(rungs) > 9  # of three components three rungs at least, kernels in the interpreter included
        assert not [rung for rung in rungs if not {rung.__module__, f"{rung.__module__}.{rung.__name__}"} & shown]

    check(pages["docs/ladder.html"])
    links = [link for link in pages["docs/ladder.html"].links if "conv.parallel" not in link]
    assert_rejects(check, Page("".join(f'<a href="{link}">' for link in links)))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem[:2] for path in NOTEBOOKS])
def test_exercises_are_directives_and_solutions_are_folded(pages, notebook):
    def check(page):
        assert page.count("div", "exercise") == page.count("details", "solution") == exercises
        assert not [fold for fold in page.folds if "open" in fold]
        assert "<details>" not in page.text and ":::" not in page.text
        assert f"ex-{notebook.stem[:2]}-1" in page.ids and f"sol-{notebook.stem[:2]}-{exercises}" in page.ids

    exercises = sum("exercise" in cell["metadata"].get("tags", []) for cell in cells(notebook))
    assert exercises >= 3
    page = pages[f"notebooks/{notebook.stem}.html"]
    check(page)
    unfolded = Page('<div class="exercise"></div><details class="solution" open></details>' * exercises)
    plain = Page('<div class="exercise"></div><div class="solution"></div>' * exercises)
    assert_rejects(check, unfolded, plain)


def test_every_picture_has_words_for_those_who_cannot_see_it(pages):
    def check(page):
        assert not [image.get("src") for image in page.images if not image.get("alt", "").strip()]

    shown = {name: page for name, page in pages.items() if name.startswith("notebooks/")}
    assert sum(len(page.images) for page in shown.values()) > 60
    for page in shown.values():
        check(page)
    assert_rejects(check, Page('<img src="x.png">'), Page('<img src="x.png" alt="">'), Page('<img alt=" ">'))
    pictures = [
        output["metadata"]["image/png"]["alt"]
        for cell in cells(ROOT / "notebooks" / "04_fused_scan.ipynb")
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert [image["alt"] for image in shown["notebooks/04_fused_scan.html"].images] == pictures


def test_plain_exercises_become_directives():
    def check(directives):
        hint = "<details><summary>Hint</summary>\n\nCount.\n\n</details>"
        texts = [
            "# 05 · A question?",
            f"### Exercise 2 · by hand · easy · 5 minutes\n\nHow many?\n\n{hint}",
            "<details><summary>Solution</summary>\n\nTwo.\n\n```python\ntwo = 2\n```\n\n</details>",
        ]
        title, exercise, solution = directives(texts, "05")
        assert title == texts[0]
        assert exercise.startswith("### Exercise 2\n\n::::{exercise} by hand · easy · 5 minutes\n:label: ex-05-2\n")
        assert ":::{admonition} Hint\n:class: dropdown\n:collapsible: closed\n\nCount.\n\n:::\n::::" in exercise
        assert solution.startswith("::::{solution} ex-05-2\n:label: sol-05-2\n:class: dropdown\n\n\nTwo.")

    settings = runpy.run_path(ROOT / "docs" / "conf.py")
    check(settings["directives"])
    assert_rejects(check, lambda texts, number: texts, lambda texts, number: settings["directives"](texts, "06"))


def test_an_address_of_the_repository_switches_buttons_on():
    def check(address, buttons):
        settings = {}
        exec((ROOT / "docs" / "conf.py").read_text(encoding="utf-8").replace("REPOSITORY = None", address), settings)
        assert ("launch_buttons" in settings["html_theme_options"]) == buttons

    check("REPOSITORY = None", False)
    check('REPOSITORY = "https://github.com/someone/minijamba"', True)
    assert_rejects(lambda address: check(address, True), "REPOSITORY = None", 'REPOSITORY = ""')


def test_the_site_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    def site_without(attribute, value):
        with monkeypatch.context() as patch:
            patch.setattr(attribute, value)
            assert cli.main(["site", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "pip install -e '.[site]'" in site_without("importlib.util.find_spec", lambda name: None)
    assert "clone it" in site_without("minijamba.cli.__file__", str(tmp_path / "package" / "cli.py"))


QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    programs = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None or importlib.util.find_spec("playwright") is None:
        remedy = "no browser to open the site in: apt install chromium, and pip install -e '.[test]'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(remedy)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def tab(browser):
    """Opens a page of a folder in a new tab, which notes in `tab.complaints` what went wrong in it."""
    servers, tabs = [], []

    def open_tab(folder, size=None):
        servers.append(server := serve(folder))
        tabs.append(tab := browser.new_page(base_url=f"http://127.0.0.1:{server.server_port}/", viewport=size))
        tab.complaints = []
        tab.on("console", lambda line: line.type in ("error", "warning") and tab.complaints.append(line.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        # What is aborted was still on its way when the next page was opened.
        tab.on("requestfailed", lambda it: "ABORTED" in it.failure or tab.complaints.append(f"{it.failure}: {it.url}"))
        own = f"http://127.0.0.1:{server.server_port}/"
        tab.on("request", lambda it: it.url.startswith((own, "data:")) or tab.complaints.append(f"elsewhere: {it.url}"))
        return tab

    yield open_tab
    for tab in tabs:
        tab.close()
    for server in servers:
        server.shutdown()
        server.server_close()


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


READ = """async () => {
    if (window.MathJax) await MathJax.startup.promise
    const article = (document.querySelector("article") ?? document.body).cloneNode(true)
    article.querySelectorAll("pre, code, script, mjx-container").forEach(part => part.remove())
    return {
        formulas: document.querySelectorAll(".math").length,
        rendered: document.querySelectorAll(".math mjx-container").length,
        wrong: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
        raw: (article.textContent.match(/\\$|\\\\[([]/g) ?? []).length,
        beyond: document.documentElement.scrollWidth - innerWidth,
    }
}"""


def opens_well(tab, name):
    """Asserts that a page opens without an error, that its formulas are set, and that it does not scroll sideways."""
    del tab.complaints[:]
    tab.goto(name)
    seen = tab.evaluate(READ)
    assert not tab.complaints
    assert seen["rendered"] == seen["formulas"] and seen["wrong"] == seen["raw"] == 0, seen
    assert seen["beyond"] <= 0, f"{seen['beyond']} pixels beyond the screen"
    return seen


def test_every_page_opens_on_a_phone(site, pages, tab, tmp_path):
    phone, formulas = tab(site, PHONE), 0
    for name in sorted(pages.keys() - {"index.html"}):  # which leads on at once, as is tested below
        try:
            formulas += opens_well(phone, name)["formulas"]
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert formulas > 300

    planted = {
        "script": '<script src="absent.js"></script>',
        "error": "<script>console.error('wrong')</script>",
        "exception": "<script>absent()</script>",
        "elsewhere": '<img src="http://localhost:9/x.png">',
        "formula": "<p>$x^2$</p>",
        "unset": '<p><span class="math">x^2</span></p>',
        "wide": '<div style="width: 2000px">wide</div>',
    }
    for name, html in planted.items():
        head = '<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        (tmp_path / f"{name}.html").write_text(head + html)
    phone = tab(tmp_path, PHONE)
    assert_rejects(lambda name: opens_well(phone, f"{name}.html"), *planted)


def test_a_solution_opens_and_closes(site, tab):
    tab = tab(site)
    tab.goto("notebooks/05_mamba_block.html")
    for fold in ("#sol-05-1", "#ex-05-2 details"):
        summary, content = tab.locator(f"{fold} > summary"), tab.locator(f"{fold} > :not(summary)").first
        assert summary.is_visible() and not content.is_visible()
        summary.click()
        assert content.is_visible()
        summary.press("Enter")  # as without a mouse
        assert not content.is_visible()
    assert not tab.complaints


def test_the_menu_of_a_phone_leads_on(site, tab):
    tab = tab(site, PHONE)
    tab.goto("docs/index.html")
    link = tab.locator("#pst-primary-sidebar-modal a", has_text="The ladder")
    assert not link.is_visible()
    tab.locator(".primary-toggle").click()
    link.click()
    tab.wait_for_url("**/docs/ladder.html")
    assert not tab.complaints


def test_search_finds(site, tab):
    def check(words):
        tab.goto(f"search.html?q={words}")
        tab.wait_for_function("/matching|did not match/.test(document.querySelector('#search-results').textContent)")
        found = tab.locator("#search-results a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
        assert any("02_selective_scan.html" in link for link in found), found

    tab = tab(site)
    check("selective scan")
    assert_rejects(check, "xylophone")
    assert not tab.complaints


def test_dark_and_light_are_legible(site, tab):
    def contrast(selector):
        colours = tab.locator(selector).first.evaluate(COLOURS)
        light, dark = sorted((luminance(colour) + 0.05 for colour in colours), reverse=True)
        return light / dark

    tab = tab(site)
    tab.goto("notebooks/05_mamba_block.html")
    shown, parts = {}, ("p", "p a", "td", "th", "pre", "summary", ".kn", ".s2")
    for mode in ("dark", "light"):
        tab.locator(".theme-switch-button").first.click()
        tab.locator(f".theme-change-button[data-mode={mode}]").first.click()
        assert tab.locator("html").get_attribute("data-theme") == mode
        shown[mode] = luminance(tab.locator("article p").first.evaluate(COLOURS)[1])
        for part in parts:
            assert contrast(f"article {part}") >= 4.5, (mode, part)  # the least that WCAG 2 asks of text
    assert shown["dark"] < 0.1 < 0.9 < shown["light"]
    tab.locator("article p").first.evaluate("p => p.style.color = '#bbb'")
    assert contrast("article p") < 4.5
    assert not tab.complaints


COLOURS = """element => {
    const behind = part => {
        const colour = getComputedStyle(part).backgroundColor
        return /, 0\\)$/.test(colour) && part.parentElement ? behind(part.parentElement) : colour
    }
    return [getComputedStyle(element).color, behind(element)].map(colour => colour.match(/[\\d.]+/g).map(Number))
}"""


def luminance(colour) -> float:
    """Relative luminance as WCAG 2 defines it, of red, green and blue in 0 .. 255."""
    parts = [part / 255 for part in colour[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_file_opens_without_a_server_and_leads_on(site, tab):
    tab = tab(site)
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_url("**/docs/index.html")
    tab.locator("article a", has_text="What surrounds the scan").click()
    tab.wait_for_url("**/notebooks/05_mamba_block.html")
    assert "What surrounds the scan" in tab.locator("h1").first.inner_text()
    tab.wait_for_function("document.querySelector('.math mjx-container')")
    assert not [complaint for complaint in tab.complaints if not complaint.startswith("elsewhere: file:")]
