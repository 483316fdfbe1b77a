"""The report as Chromium shows it: complete, quiet, readable on a phone, light and dark.

$HIPPOCAMPUS_CHROMIUM names the browser (default: chromium or google-chrome on PATH);
$HIPPOCAMPUS_ARTEFACTS the folder that keeps the screenshots (default: pytest's own).
"""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from report_folders import add_probes, make_run

from hippocampus.probing.report import write_report

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESKTOP, PHONE = (1280, 900), (360, 740)
LEAST_TEXT, LEAST_CONTRAST = 7.0, 4.5

CONTRASTS = """() => {
  const parse = text => {
    const n = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const unit = text.startsWith('color(') ? 255 : 1;
    return [n[0] * unit, n[1] * unit, n[2] * unit, n.length > 3 ? n[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].filter(n => n.nodeType == 3 && n.data.trim());
    if (!own.length || !e.checkVisibility() || e.closest('.skip')) continue;
    const layers = [];
    let opacity = 1;
    for (let a = e; a; a = a.parentElement) {
      const style = getComputedStyle(a);
      opacity *= Number(style.opacity);
      layers.unshift(parse(style.backgroundColor));
    }
    let behind = [255, 255, 255];
    for (const layer of layers) behind = over(layer, behind);
    const style = getComputedStyle(e);
    const ink = parse(e.closest('svg') ? style.fill : style.color);
    ink[3] *= opacity;
    const [a, b] = [luminance(over(ink, behind)), luminance(behind)].sort((x, y) => y - x);
    found.push([own[0].data.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""

PLOTS = """() => [...document.querySelectorAll('figure.plot')].map(figure => {
  const svg = figure.querySelector('svg');
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 0;
  const texts = svg ? [...svg.querySelectorAll('text')] : [];
  const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  return {title: figure.querySelector('h3').textContent, folded: !!figure.closest('details'),
          shown: figure.checkVisibility(), width: box.width, height: box.height,
          marks: svg ? svg.querySelectorAll('path, use, rect, image').length : 0,
          label: svg ? svg.getAttribute('aria-label') : '', role: svg && svg.getAttribute('role'),
          text: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize) * scale))};
})"""


def chromium() -> str:
    """The browser's program."""
    named = os.environ.get("HIPPOCAMPUS_CHROMIUM")
    places = [named] if named else [shutil.which(name) for name in (
        "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")]
    found = next((place for place in places if place and Path(place).is_file()), None)
    if found is None:
        pytest.skip("no chromium on PATH nor in $HIPPOCAMPUS_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("browser") / "run",
                    model__paths=("ssm", "hopfield", "attention"))


@pytest.fixture(scope="module")
def suites(run):
    return add_probes(run)


@pytest.fixture(scope="module")
def page(run, suites):
    return write_report(run)


# Closed with the module: while it is open, this thread has a running event loop.
@pytest.fixture(scope="module")
def browser():
    place = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=place, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def show(browser):
    """A function that opens a page and keeps what the browser has to say about it."""
    contexts = []

    def make(path, size=DESKTOP, scheme="light", **options):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]},
                                      color_scheme=scheme, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.complaints, tab.requests = [], []
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = Path(os.environ.get("HIPPOCAMPUS_ARTEFACTS") or tmp_path_factory.mktemp("artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_quiet_and_a_picture_of_it_is_kept(show, page, artefacts, size, scheme):
    tab = show(page, size, scheme, device_scale_factor=2 if size == PHONE else 1)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [page.as_uri()]
    file = artefacts / f"report-{'phone' if size == PHONE else 'desktop'}-{scheme}.png"
    tab.screenshot(path=file, full_page=True)
    assert file.stat().st_size > 50_000


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_picture_is_there_and_can_be_read(show, page, suites, size):
    tab = show(page, size)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    plots = tab.evaluate(PLOTS)
    shown = [plot for plot in plots if plot["shown"]]
    assert len(plots) == len(shown) + 1  # the losses are there for a wide and a narrow screen
    titles = {plot["title"] for plot in shown}
    assert len(titles) == len(shown) > 20
    assert titles >= {plot.title for suite in suites for plot in suite.plots}
    for plot in shown:
        assert plot["width"] > 200 and plot["height"] > 80 and plot["marks"] > 5, plot
        assert plot["text"] >= LEAST_TEXT, plot
        assert plot["role"] == "img" and plot["label"].startswith(plot["title"]), plot


@pytest.mark.parametrize("width", [320, 360, 768, 1280, 1920])
def test_the_page_does_not_scroll_sideways(show, page, width):
    tab = show(page, (width, 800))
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_what_is_too_wide_for_a_phone_scrolls_in_its_own_frame(show, page):
    tab = show(page, PHONE)
    inner = tab.evaluate("""[...document.querySelectorAll('.scroll, .canvas')].filter(
        e => e.scrollWidth > e.clientWidth + 1).map(e => [e.tabIndex, e.ariaLabel])""")
    assert len(inner) >= 4
    assert all(index == 0 and label for index, label in inner)  # reached by keyboard, and named


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(show, page, scheme):
    tab = show(page, DESKTOP, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 500
    assert [(text, round(ratio, 2)) for text, ratio in found if ratio < LEAST_CONTRAST] == []


def test_it_follows_the_readers_colours(show, page):
    colors = {scheme: show(page, DESKTOP, scheme).evaluate(
        "[document.body, document.querySelector('svg text'), document.querySelector('.plot')].map("
        "e => getComputedStyle(e)).map(s => s.backgroundColor + s.color + s.fill).join()")
        for scheme in ("light", "dark")}
    assert colors["light"] != colors["dark"]
    assert "rgb(246, 246, 243)" in colors["light"] and "rgb(14, 17, 19)" in colors["dark"]


def test_it_can_be_used_without_seeing_it(show, page):
    tab = show(page)
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tab.evaluate("document.documentElement.lang") == "en"
    assert tab.evaluate("document.querySelectorAll('svg:not([aria-label])').length") == 0
    assert tab.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    doubled = tab.evaluate("""(ids => ids.filter((id, i) => ids.indexOf(id) != i))(
        [...document.querySelectorAll('[id]')].map(e => e.id))""")
    assert doubled == []
    links = tab.evaluate("""[...document.querySelectorAll('a')].map(
        a => !!document.querySelector(a.getAttribute('href')))""")
    assert len(links) == 8 and all(links)


def test_paper_gets_all_of_it(show, page):
    tab = show(page)
    tab.emulate_media(media="print")
    assert not tab.locator("nav").is_visible()
    assert tab.get_by_text("model.d_model", exact=True).is_visible()  # folded away on a screen
    assert tab.evaluate("""[...document.querySelectorAll('.passage, .scroll')].every(
        e => e.scrollHeight <= e.clientHeight + 1)""")


def test_a_script_that_came_in_with_a_picture_does_not_run(show, page, tmp_path):
    text = page.read_text().replace("</h1>", "</h1><script>document.title = 'pwned'</script>"
                                    "<img src='https://example.org/x.png'>", 1)
    (tmp_path / "attacked.html").write_text(text)
    tab = show(tmp_path / "attacked.html")
    assert tab.title() != "pwned" and "pwned" not in tab.title()
    assert sum("Content Security Policy" in line for line in tab.complaints) >= 2
