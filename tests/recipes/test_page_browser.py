"""The page in headless Chromium: all of it is shown, nothing is asked of anybody, and tables sort."""

import shutil
from dataclasses import replace

import pytest
from study_runs import CLASSES, write_run
from test_page import looks_of

from recipes.results.page.build import build_page
from recipes.results.page.study import Group, Study
from recipes.results.runs import read_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    # A browser is no Python package: .ci/run installs it where it can, and pip on a bare machine cannot.
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]

WIDTHS = {"phone": 360, "desktop": 1280}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a study with all that one can have, names that are markup among it."""
    folder = tmp_path_factory.mktemp("runs")
    groups = []
    for setting in ("R = 10", "R = 40"):
        for arm, base in (("plain", 0.6), ("<script>stock</script>", 0.5), ("deq", 0.65)):
            solved = {"residual": 0.02} if arm == "deq" else {}
            runs = {}
            for seed, change in enumerate((0.05, -0.02, 0.11)):
                path = folder / setting / arm.strip("</>").replace("/", "") / f"run-{seed}"
                runs[seed] = read_run(write_run(path, seed=seed, minority=base + change * base, **solved))
            groups.append(Group(arm=arm, setting=setting, runs=runs))
    study = Study(
        title="A study whose title is long enough to be wrapped on a phone",
        command="python recipes/grid.py " + "a-very-long-name-without-any-space" * 5,
        arms={group.arm: {"model_args.something_long": "value" * 9} for group in groups},
        reference="plain",
        tested="deq",
        groups=groups,
        missing={"deq-ratio=10-seed=7-" + "x" * 90: "error: it has failed"},
        tuning=[("deq", "lr: 0.1", [0.5, 0.6], True), ("deq", "lr: 0.3", [0.4, 0.5], False)],
    )
    looks = {key: replace(look, class_names=[*CLASSES[:3], "<img src=x>"]) for key, look in looks_of(study).items()}
    path = folder / "report.html"
    path.write_text(build_page(replace(study, looks=looks)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser, page, width, scheme="light"):
    """Open the page in a window of some width; gives the addresses that were asked for, and what the console said."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    asked = [entry["message"] for entry in browser.get_log("performance")]
    asked = [each for each in asked if '"Network.requestWillBeSent"' in each and '"url":"data:' not in each]
    return asked, browser.get_log("browser")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_everything_is_shown_and_nothing_asked_for(width, browser, page):
    asked, console = show(browser, page, width)
    assert len(asked) == 1 and page.as_uri() in asked[0]
    assert console == []
    widths = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(browser.execute_script(widths)) <= width
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => { const r = e.getBoundingClientRect();"
        " return [r.left, r.right, r.height, e.getAttribute('aria-label')]; })"
    )
    # Two settings, each with three groups, four measures of collapse, three other curves, Gram matrices of three arms
    # and their scale, t-SNE of three, and three of the solve; the forest and four panels of the theory.
    assert len(sizes) == 2 * (3 + 4 + 3 + 3 + 1 + 3 + 3) + 1 + 4
    assert all(left >= 0 and right <= width and height > 25 for left, right, height, _ in sizes), sizes
    tables = browser.execute_script(
        "return [...document.querySelectorAll('table')].map(t => [t.rows.length, t.getBoundingClientRect().height])"
    )
    assert len(tables) == 1 + 1 + 1 + 2 * 5 + 1 + 1 and all(rows > 1 and height > 30 for rows, height in tables)
    # Text in figures is text: none of it is markup, and it does not leave its figure.
    outside = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].filter(t => { const r = t.getBoundingClientRect(),"
        " s = t.closest('svg').getBoundingClientRect(); return r.left < s.left - 2 || r.right > s.right + 2; })"
        ".map(t => t.textContent)"
    )
    assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_paper(scheme, browser, page):
    show(browser, page, 1280, scheme)
    colors = browser.execute_script(
        "const of = (e, name) => getComputedStyle(e).getPropertyValue(name).match(/\\d+/g).slice(0, 3).map(Number);"
        "return [of(document.body, 'background-color'), of(document.body, 'color'),"
        " of(document.querySelector('figure svg text'), 'fill'), of(document.querySelector('.answer'), 'color')]"
    )
    paper, *inks = (sum(color) / 3 for color in colors)
    assert paper > 200 if scheme == "light" else paper < 60
    assert all(abs(ink - paper) > 150 for ink in inks)


def test_tables_sort(browser, page):
    show(browser, page, 1280)
    table = "[...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('NC2 of W'))"
    column = f"[...{table}.tHead.querySelectorAll('button')].findIndex(b => b.textContent === 'NC2: ETF')"
    click = f"{table}.tHead.querySelectorAll('button')[{column}].click()"
    row = f"[r.cells[0].textContent.trim(), r.cells[{column}].dataset.value]"
    read = f"return [...{table}.tBodies[0].rows].map(r => {row})"
    before = browser.execute_script(read)
    rising = browser.execute_script(f"{click}; {read}")
    falling = browser.execute_script(f"{click}; {read}")
    numbers = [float(value) for _, value in before]
    assert [float(value) for _, value in rising] == sorted(numbers) != numbers
    assert falling == rising[::-1] and sorted(map(tuple, before)) == sorted(map(tuple, rising))
    # A column of words, and one with absent numbers, which stay last.
    words = f"{table}.tHead.querySelectorAll('button')[0].click()"
    names = [name for name, _ in browser.execute_script(f"{words}; {read}")]
    assert names[0].startswith("<script>") and names[1].startswith("deq")
    solves = "[...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('residual'))"
    click = f"{solves}.tHead.querySelectorAll('button')[2].click()"
    heads = f"return [...{solves}.tBodies[0].rows].map(r => r.cells[0].textContent.trim())"
    for _ in range(2):
        assert browser.execute_script(f"{click}; {heads}")[0].startswith("deq")


def test_a_row_opens_to_its_runs(browser, page):
    show(browser, page, 360)
    browser.execute_script("document.querySelector('details').open = true")
    link = browser.execute_script("const a = document.querySelector('details a'); a.click(); return a.hash")
    target = f"const r = document.querySelector('{link}').getBoundingClientRect(); return r.top < 800 && r.height > 10"
    assert browser.execute_script(target)
