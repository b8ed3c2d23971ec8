"""The page in a real browser: every view, by mouse and by keys, wide and narrow, light and dark."""

from __future__ import annotations

import json
import math
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import browsing, chromium, opened, visit
from tests.serve.page_runs import make_runs
from tests.serve.server_process import Served, serving

pytestmark = pytest.mark.slow
TEXT = "and the naïve one."
VIEWS = [
    "#runs?run=one,two",
    f"#try?model=one@12&prompt={TEXT}&max=12&seed=1",
    f"#compare?models=one@4,one@12&text={TEXT}",
    f"#inside?model=one@12&text={TEXT}&open=inspect",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Besides the two runs a long one of 5,000 steps, and a series of 154."""
    if chromium() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    runs = make_runs(tmp_path_factory.mktemp("browsed"))
    long = shutil.copytree(runs / "one", runs / "long", ignore=shutil.ignore_patterns("checkpoints"))
    records = ({"step": n, "loss": 2 + math.sin(n) / n, "lr": 1e-3, "grad_norm": 1.0} for n in range(1, 5001))
    (long / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (runs / "series").mkdir()
    for step in range(154):
        (runs / "series" / f"step_{step:06}").symlink_to(runs / "one" / "checkpoints" / "step_000012")
    return runs


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("log") / "log", str(folder), "--device", "cpu") as served:
        yield served


@pytest.fixture(scope="module")
def browser(server: Served) -> Iterator[Any]:
    path = chromium()
    assert path
    with browsing(path) as found:
        yield found


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    """A page that says nothing on its console. Without its content policy, as playwright waits by `eval`.

    Tests that open pages by themselves keep the policy, and see every view.
    """
    found, complaints = opened(browser, server.url, bypass_csp=True)
    yield found
    assert complaints == []
    found.close()


def asked(server: Served, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ink(page: Any, selector: str) -> int:
    """Pixels of a canvas that are drawn on."""
    return page.eval_on_selector(
        selector,
        "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }",
    )


def ids(page: Any) -> list[int]:
    """The tokens that are shown."""
    return page.eval_on_selector_all("#out .tok", "all => all.map(e => +e.dataset.id)")


def test_runs_are_drawn_and_a_spike_opens_its_documents(page, server):
    visit(page, f"{server.url}/#runs?run=one")
    assert page.locator("tbody").first.locator("tr").count() == 3
    before = ink(page, ".big canvas")
    assert before > 1000 and page.locator(".small canvas").count() >= 3
    assert "one ends at" in page.locator(".big canvas").get_attribute("aria-label")
    page.get_by_label("two: optimizer.lr 0.003").check()
    page.wait_for_function("location.hash.includes('run=one%2Ctwo')")
    page.wait_for_function(f"document.querySelector('.legend').innerText.includes('two') || {before} < 0")
    page.get_by_label("logarithmic loss").check()
    assert "logy=1" in page.url
    page.get_by_role("button", name="documents").click()
    page.wait_for_selector("#docs .docs")
    assert page.locator("#docs .docs").count() == 4 and "texts: document" in page.inner_text("#docs")
    with urllib.request.urlopen(f"{server.url}/api/batch?name=one&step=7") as answer:
        assert page.text_content("#docs pre") == json.load(answer)[0]["text"]
    assert "docs=one%3A7" in page.url
    page.get_by_text("Config of one").click()
    assert "config.yml" in page.locator("tr:has(td.k)", has_text="optimizer.lr").first.inner_text()


def test_events_say_what_they_were(page, server):
    """Evaluations and saved steps, which have small marks, as well as spikes."""
    visit(page, f"{server.url}/#runs?run=one")
    with urllib.request.urlopen(f"{server.url}/api/run?name=one") as answer:
        events = {(each["event"], each.get("step")): each for each in json.load(answer)["events"]}
    box = page.locator(".big canvas").bounding_box()
    told = set()
    for place in range(60, int(box["width"]), 3):
        page.mouse.move(box["x"] + place, box["y"] + 100)
        told.add(page.locator("#tip > div").last.inner_text())
    loss = events["evaluation", 6]["loss"]
    assert any(line.startswith(f"validation {loss:.3g}"[:14]) and line.endswith("at step 6") for line in told)
    assert {"saved at step 8", "spike at step 7; click for its documents"} <= told


def test_five_steps_of_a_run_stand_side_by_side(page, server):
    visit(page, f"{server.url}/#compare?models=series@0&text={TEXT}")
    page.get_by_role("button", name="Five steps of A's run").click()
    page.wait_for_function("document.querySelectorAll('#panels figure').length == 5")
    captions = page.locator("#panels figcaption").all_inner_texts()
    assert [caption.split()[1] for caption in captions] == [f"series@{step}" for step in (0, 38, 77, 115, 153)]
    assert page.locator("input[type=range]").count() == 5
    page.get_by_label("steps of C").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelectorAll('#panels figcaption')[2].innerText.includes('series@78')")


def test_no_text_is_asked_for_that_the_model_has_no_room_for(page, server):
    with page.expect_request("**/v1/completions") as asking:
        visit(page, f"{server.url}/#try?model=one@12&prompt={TEXT}&max=99999&seed=1")
    told = asked(server, "/tokenize", {"model": "one@12", "prompt": TEXT})
    assert asking.value.post_data_json["max_tokens"] == told["max_model_len"] + 1 - told["count"]
    assert page.locator("#max").get_attribute("max") == str(told["max_model_len"])


def test_a_run_in_progress_goes_on_by_itself(page, server, folder):
    visit(page, f"{server.url}/#runs?run=two")
    with open(folder / "two" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "loss": 1.25, "lr": 1e-3, "tokens": 1}) + "\n")
    page.wait_for_function("document.querySelector('.big canvas').ariaLabel?.includes('1.25 after 13 steps')")
    assert "13 / 12" in page.inner_text("tbody >> nth=0")


def test_a_text_is_written_token_by_token_and_branches_where_one_is_chosen(page, server):
    visit(page, f"{server.url}/#try?model=one@12")
    assert page.get_by_label("as a conversation").is_hidden()  # bytes have no template
    page.get_by_label("prompt").fill(TEXT)
    page.get_by_label("tokens at most").fill("12")
    page.get_by_label("seed").fill("1")
    page.get_by_role("button", name="Write").click()
    tokens = page.locator("#out .tok")
    page.wait_for_function("document.querySelectorAll('#out .tok').length == 12")
    page.wait_for_function("!document.querySelector('button.main').disabled")
    wanted = asked(server, "/v1/completions", {"model": "one@12", "prompt": TEXT, "max_tokens": 12, "seed": 1,
                   "temperature": 0.8, "return_token_ids": True, "logprobs": 1})  # fmt: skip
    assert ids(page) == wanted["choices"][0]["token_ids"] and page.inner_text("#out").startswith(TEXT)
    assert "prompt=" in page.url and "seed=1" in page.url
    written = ids(page)
    tokens.nth(3).hover()
    assert page.locator("#tip tr").count() in (10, 11)
    tokens.nth(3).click()
    other = page.locator("#tip button", has_not_text="▸").first
    name = other.get_attribute("aria-label").removeprefix("write on with ")
    other.click()
    page.wait_for_function("document.querySelectorAll('#out .tok').length == 12")
    page.wait_for_function("!document.querySelector('button.main').disabled")
    assert ids(page)[:3] == written[:3] and ids(page)[3] != written[3]
    assert tokens.nth(3).get_attribute("aria-label").startswith(name)
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    assert page.locator("#tip button").first.evaluate("e => e === document.activeElement")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_two_checkpoints_stand_side_by_side_with_the_losses_of_the_server(page, server):
    visit(page, f"{server.url}/{VIEWS[2]}")
    page.wait_for_function("document.querySelectorAll('#panels figure').length == 2")
    for place, model in enumerate(("one@4", "one@12")):
        nll = asked(server, "/v1/score", {"model": model, "input": TEXT})["data"][0]["nll"][1:]
        caption = page.locator("#panels figcaption").nth(place).inner_text()
        assert model in caption and f"{sum(nll) / len(nll):.4f}" in caption
    assert "beside A" in page.locator("#panels figcaption").nth(1).inner_text()
    assert page.locator("#panels .text").first.inner_text() == TEXT
    page.get_by_label("steps of B").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelectorAll('#panels figcaption')[1].innerText.includes('one@8')")
    assert "one%408" in page.url
    page.get_by_role("button", name="Loss over all steps").click()
    page.wait_for_function("document.querySelector('.small canvas').ariaLabel == 'one: 3 steps'")
    page.get_by_label("continuations").check()
    page.wait_for_function("document.querySelector('#panels .given')?.textContent.length > 3")


def test_the_lens_and_the_tables_are_shown(page, server):
    visit(page, f"{server.url}/{VIEWS[3]}")
    found = asked(server, "/api/lens", {"model": "one@12", "text": TEXT})
    assert page.locator(".lens tbody tr").count() == 3
    assert page.locator(".lens tbody tr").first.locator("td").count() == len(found["ids"])
    page.locator(".lens td").first.hover()
    assert "entropy" in page.inner_text("#tip")
    page.wait_for_selector("text=hidden size")
    for name, said in (("diff", "Relative change of each layer"), ("plan", "Memory of the largest rank")):
        page.locator("summary", has_text=name).click()
        page.wait_for_selector(f"text={said}")


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_an_address_labels_and_room_on_a_narrow_screen(browser, server, view):
    page, complaints = opened(browser, f"{server.url}/{view}", viewport={"width": 360, "height": 700})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button, canvas, a')].filter(e => e.checkVisibility()
        && !(e.labels?.length || e.ariaLabel || e.innerText?.trim() || e.title)).map(e => e.outerHTML)"""
    )
    assert nameless == [] and complaints == []
    assert page.locator("nav [aria-current=page]").count() == page.locator("h1").count() == 1
    page.close()


CONTRAST = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number), lum = c => c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const over = (top, below) => { const a = top[3] ?? 1; return below.map((v, i) => top[i] * a + v * (1 - a)); };
  const ground = e => { const c = rgb(getComputedStyle(e).backgroundColor); return (c[3] ?? 1) == 1 ? c.slice(0, 3)
    : over(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255]); };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    if (e.disabled || e.tagName == 'OPTION' || e.classList.contains('skip')) continue;
    const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(ground(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) bad.push(((a + .05) / (b + .05)).toFixed(2) + ' ' + e.outerHTML.slice(0, 120));
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_and_focus_is_seen(browser, server, scheme):
    for view in VIEWS:
        page, complaints = opened(browser, f"{server.url}/{view}", color_scheme=scheme)
        page.wait_for_timeout(500)
        assert page.evaluate(CONTRAST) == [] and complaints == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.close()


def test_long_runs_and_long_series_ask_and_draw_little(page, server):
    page.add_init_script(
        "window.lines = 0; const draw = CanvasRenderingContext2D.prototype.lineTo;"
        "CanvasRenderingContext2D.prototype.lineTo = function (...a) { window.lines++; return draw.apply(this, a); };"
    )
    visit(page, f"{server.url}/#runs?run=long&smooth=0")
    assert ink(page, ".big canvas") > 1000
    page.evaluate("window.lines = 0")
    page.eval_on_selector(".big canvas", "c => c.dispatchEvent(new PointerEvent('pointermove', {clientX: 300}))")
    width = page.eval_on_selector(".big canvas", "c => c.clientWidth")
    assert 0 < page.evaluate("window.lines") < 5 * width  # however many steps there are
    visit(page, f"{server.url}/#compare?models=series@0&text={TEXT}")
    page.wait_for_function("document.querySelectorAll('#panels figure').length == 1")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if "/v1/score" in request.url else None)
    page.eval_on_selector(
        "input[type=range]",
        "s => { for (let i = 1; i < 154; i++) { s.value = i; s.dispatchEvent(new Event('input')); } }",
    )
    page.wait_for_function("document.querySelector('#panels figcaption').innerText.includes('series@153')")
    assert len(requests) <= 2


def test_errors_of_the_server_are_told_in_words(browser, server, folder, tmp_path):
    page, complaints = opened(browser, f"{server.url}/#runs?run=one&docs=one:99")
    page.wait_for_selector("#problem:not([hidden])")
    assert "the run's steps are 1 to 12" in page.inner_text("#problem")
    page.close()
    with serving(tmp_path / "log", str(folder / "one"), "--device", "cpu", "--api-key", "secret") as keyed:
        page, complaints = opened(browser, f"{keyed.url}/#try")
        page.get_by_label("This server asks for its key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.wait_for_selector("#prompt")
        keyed.end()
        page.get_by_label("prompt").fill("x")
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector("text=does not answer")
    page.close()
