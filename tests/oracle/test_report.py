"""`mft report` in a real browser: by clicking, by the keyboard, without its script, on a phone, in the dark.

The logs are made here, so that every value the page shows is known. Needs chromium (Debian's package)."""
import json
import math
import os
import re
import shutil

import pytest

from common import mft

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium: not there")

HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\" ' & <b>"
STEPS = {"small": 400, "large": 400, "short": 120}


def loss(name, step):
    return {"small": 3.0, "large": 2.5, "short": 2.8}[name] * math.exp(-step / 200) + 0.7 + 0.05 * math.sin(step)


def lr(step):
    return 2e-4 * (1 - step / 400)


def write_run(folder, name, samples=True):
    path = os.path.join(folder, name + ".jsonl")
    with open(path, "w") as f:
        for step in range(1, STEPS[name] + 1):
            line = {"step": step, "loss": loss(name, step), "lr": lr(step), "grad_norm": 1 + step % 5, "tokens": 512,
                    "tokens_per_second": 2000.0, "peak_rss_bytes": 64 << 20, "elapsed_s": 0.25 * step}
            if step % 40 == 0:
                line.update(eval_loss=loss(name, step) + 0.2, eval_perplexity=math.exp(loss(name, step) + 0.2))
            f.write(json.dumps(line) + "\n")
    about = {"run": {"family": "qwen2", "steps": 400}, "config": {"model": HOSTILE, "lora-rank": len(name), "seed": 0}}
    if samples:
        about["samples"] = [{"prompt": HOSTILE, "expected": "x", "before": "before " + HOSTILE, "after": name}]
    with open(path + ".about.json", "w") as f:
        json.dump(about, f)
    return path


def write_trace(folder):
    path = os.path.join(folder, "trace.jsonl")
    phases = ["load", "forward", "backward", "optimizer"]
    with open(path, "w") as f:
        for k in range(400):
            f.write(json.dumps({"t_ms": 5 * k, "rss_bytes": (20 + k // 100) << 20, "step": k // 4, "phase": phases[k // 100]}) + "\n")
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("report"))
    runs = [write_run(folder, name, name != "short") for name in STEPS]
    trace = write_trace(folder)
    one, three = os.path.join(folder, "one.html"), os.path.join(folder, "three.html")
    mft("report", runs[0], "--memory-trace", trace, "--output", one)
    mft("report", *runs, "--name", "small", "--name", HOSTILE, "--memory-trace", trace, "--output", three)
    return {"one": "file://" + one, "three": "file://" + three}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=[
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        yield b
        b.close()


@pytest.fixture
def visit(browser, pages):
    """Opens a page; at the end there was nothing on the console, no request but for the file, and nothing hurt."""
    opened = []

    def go(name, script=True, **how):
        context = browser.new_context(java_script_enabled=script, **how)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(pages[name])
        opened.append((context, page, said, asked, pages[name], script))
        return page

    yield go
    for context, page, said, asked, url, script in opened:
        hurt = page.evaluate("window.hurt") if script else None
        context.close()
        assert said == []
        assert [a for a in asked if a != url and not a.startswith("data:")] == []
        assert hurt is None


def number(text):
    return float(text.replace(",", "").replace("\u2212", "-"))


def value(page, series):
    return number(page.locator("b[data-of=%s]" % series).inner_text())


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_accessible(visit, name, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(name, color_scheme=scheme, viewport={"width": width, "height": 844})
    for details in page.locator("summary").all():
        details.click()
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_sideways_scrolling(visit, name, width):
    page = visit(name, viewport={"width": width, "height": 800}, is_mobile=True, has_touch=True)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # labels keep their size where the drawing shrinks, and stand within the page
    sizes = page.evaluate("[...document.querySelectorAll('.grid i')].map(e => [parseFloat(getComputedStyle(e).fontSize), e.getBoundingClientRect().left, e.getBoundingClientRect().right])")
    assert len(sizes) > 30 and all(size >= 12 and left >= 0 and right <= width for size, left, right in sizes)
    # x labels of a chart do not run into each other
    for chart in page.locator("figure[data-x]").all():
        boxes = [label.bounding_box() for label in chart.locator(".x i").all()]
        assert all(a["x"] + a["width"] + 3 < b["x"] for a, b in zip(boxes, boxes[1:]))


def test_dark(visit):
    light, dark = (visit("one", color_scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark"))
    brightness = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (light, dark)]
    assert brightness[0] > 700 and brightness[1] < 100


@pytest.mark.parametrize("script", [True, False])
def test_runs_are_switched(visit, script):
    """By clicking on the name, and by the space bar; without the script as well."""
    page = visit("three", script=script)
    of = [page.locator("#loss path.r%d" % r) for r in range(3)]
    assert [o.count() for o in of] == [4, 4, 4] and all(o.first.is_visible() for o in of)
    page.locator("label.run-1").click()
    assert [o.first.is_visible() for o in of] == [True, False, True]
    assert not page.locator("#lr .values .r1").is_visible() and page.locator("#lr .values .r0").is_visible()
    page.locator("#run-0").focus()
    page.keyboard.press("Space")
    assert [o.first.is_visible() for o in of] == [False, False, True]
    page.keyboard.press("Tab")                                  # the next run
    page.keyboard.press("Space")
    assert [o.first.is_visible() for o in of] == [False, True, True]
    for line, shown in ("raw", 2), ("smooth", 2), ("held", 4):
        paths = page.locator("#loss path.%s:visible" % line)
        assert paths.count() == shown
        page.locator("#show-" + line).click()
        assert paths.count() == 0


def test_without_script(visit):
    page = visit("one", script=False)
    assert page.locator("#loss path.smooth").is_visible() and not page.locator("#scrub").is_visible()
    page.locator("summary").first.click()
    assert page.locator("#loss table").first.is_visible()


def test_values_by_the_slider(visit):
    page = visit("three")
    first = page.locator("b[data-of]").all_inner_texts()
    slider = page.locator("#step")
    slider.focus()
    page.keyboard.press("End")
    slider.evaluate("e => e.dispatchEvent(new Event('input'))")
    ended = [t for t, e in zip(page.locator("#loss b[data-of], #lr b[data-of], #norm b[data-of]").all_inner_texts(), first)]
    assert ended[0] == first[0] and ended[2] == first[2]        # what C wrote is what the script writes
    assert ended[4] == "\u2013"                                 # the short run has ended before
    page.keyboard.press("Home")
    assert page.locator("#at").inner_text() == "1"
    assert abs(value(page, "lr-0") - lr(1)) < 1e-6 and abs(value(page, "loss-0") - loss("small", 1)) < 2e-3
    for _ in range(39):
        page.keyboard.press("ArrowRight")
    assert page.locator("#at").inner_text() == "40"
    assert value(page, "norm-1") == 1 and abs(value(page, "lr-2") - lr(40)) < 1e-6
    assert abs(value(page, "loss-1-held") - loss("large", 40) - 0.2) < 2e-3
    assert page.locator("#loss .cursor").is_visible() and page.locator("#rate .cursor").is_visible()


def test_values_under_the_pointer(visit):
    page = visit("one")
    plot = page.locator("#norm .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    for step in (1, 203, 400):
        page.mouse.move(box["x"] + box["width"] * (step - 1) / 399, box["y"] + 20)
        assert page.locator("#at").inner_text() == str(step)
        assert value(page, "norm-0") == 1 + step % 5
        assert abs(value(page, "lr-0") - lr(step)) < 1e-6
    plot = page.locator("#trace .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 20)
    assert abs(value(page, "trace-0") - 22) < 0.1 and page.locator("#at").inner_text() == "400"


def test_outside_text_stays_text(visit):
    page = visit("three")
    assert page.locator(".saying.prompt pre").inner_text() == HOSTILE
    assert page.locator(".saying.before pre").all_inner_texts() == ["before " + HOSTILE]
    assert page.locator(".saying.after pre").all_inner_texts() == ["small", "large"]
    assert page.locator("label.run-1").inner_text().strip() == HOSTILE and page.title() == "3 runs \u2013 training report"
    assert page.locator("img").count() == 0
    assert "the log ends at step 120 of 400" in page.locator(".notes").inner_text()


def test_motion(visit):
    for wish, scrolls in ("reduce", "auto"), ("no-preference", "smooth"):
        assert visit("one", reduced_motion=wish).evaluate("getComputedStyle(document.documentElement).scrollBehavior") == scrolls


def test_long_log_opens(visit, browser, tmp_path):
    """200,000 steps: a small page, whose elements are few."""
    path = str(tmp_path / "long.jsonl")
    with open(path, "w") as f:
        for step in range(1, 200001):
            f.write('{"step":%d,"loss":%.9g,"lr":0.0001,"grad_norm":%d,"tokens":512,"tokens_per_second":2000,"peak_rss_bytes":67108864,"elapsed_s":%d}\n' % (
                step, 2 + math.sin(step) / 4, 1 + step % 7, step))
    out = str(tmp_path / "long.html")
    mft("report", path, "--output", out)
    assert os.path.getsize(out) < 150000
    page = browser.new_page()
    page.goto("file://" + out)
    assert page.evaluate("document.querySelectorAll('*').length") < 700
    page.locator("#step").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#at").inner_text() == "199,999" and 1.7 < value(page, "loss-0") < 2.3
    page.close()
