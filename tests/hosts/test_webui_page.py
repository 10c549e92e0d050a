"""The page of a real WebUI in headless Chromium: accordion, pasting, PNG Info, plot, "Reload UI".

`webui_host.py` says which WebUI.  Needs Playwright's Python package and a Chromium (CHROMIUM names it, else the one on the
path); skipped without.  With WEBUI_SCREENSHOTS, a folder, pictures of the page are left there.
"""
import os
import re
import shutil
import time
from contextlib import suppress

import pytest
from webui_host import MARKS, choices, pixels, wait_for

from ersde import PRESETS
from ersde.hosts.webui_settings import AS_PRESET, PREFIX, SETTINGS, sampler_name

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SDE, SDE_5, FLAT = (sampler_name(PRESETS[name]) for name in ("sde", "sde_5", "flat"))
OURS = [sampler_name(preset) for preset in PRESETS.values()]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

pytestmark = [*MARKS, pytest.mark.skipif(not CHROMIUM, reason="no Chromium: the page cannot be looked at")]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: the page cannot be looked at")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """The WebUI's page: what a person does with it."""

    def __init__(self, browser, server, theme="light"):
        self.server, self.seeds = server, 100
        self.page = browser.new_page(viewport={"width": 1300, "height": 1500})
        self.page.set_default_timeout(30000)
        self.load(theme)

    def load(self, theme="light"):
        self.page.goto(f"{self.server.url}/?__theme={theme}")
        self.wait()

    def wait(self):
        """Until the page stands, and all that it asked for has come."""
        self.page.wait_for_selector("#txt2img_generate", state="visible")
        self.page.wait_for_selector("#script_txt2img_ersde_accordion")
        self.rest()

    def rest(self):
        """Until nothing is asked for any more; newer pages keep one line open for good."""
        with suppress(Exception):
            self.page.wait_for_load_state("networkidle", timeout=4000)
        time.sleep(2)

    def close(self):
        """At rest: a request that is broken off can keep the host's server from closing at "Reload UI"."""
        self.rest()
        self.page.close()

    def control(self, field, tab="txt2img"):
        """Its input element."""
        return self.page.locator(f"#script_{tab}_ersde_{field}").locator("textarea, input").first

    def values(self, tab="txt2img"):
        return {setting.field: self.control(setting.field, tab).input_value() for setting in SETTINGS}

    def open(self, tab="txt2img"):
        if not self.control("eta", tab).is_visible():
            self.page.locator(f"#script_{tab}_ersde_accordion .label-wrap").first.click()
        self.control("eta", tab).wait_for(state="visible")

    def type(self, field, text, tab="txt2img"):
        """As a person does: into the field, then away from it."""
        control = self.control(field, tab)
        control.click()
        control.fill(text)
        if next(setting for setting in SETTINGS if setting.field == field).choices:
            control.press("Enter")
        control.press("Tab")

    def curve(self, tab="txt2img"):
        return self.page.locator(f"#script_{tab}_ersde_curve").last

    def until(self, condition, what, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, what() if callable(what) else what
            time.sleep(0.2)

    def seed(self):
        return self.page.locator("#txt2img_seed input").first

    def paste(self, infotext):
        """Into the prompt, and then the button with the arrow; a seed of its own tells when all is done."""
        self.seeds += 1
        self.page.locator("#txt2img_prompt textarea").first.fill(infotext.replace("Seed: 7", f"Seed: {self.seeds}"))
        self.page.locator("#tab_txt2img #paste").first.click()
        self.until(lambda: self.seed().input_value() == str(self.seeds), "not pasted")
        time.sleep(1.5)

    def generate(self):
        """The text under the picture, which has a seed of its own."""
        info = self.page.locator("#html_info_txt2img").last
        self.seeds += 1
        self.page.locator("#txt2img_prompt textarea").first.fill("a lighthouse")
        self.seed().fill(str(self.seeds))
        self.seed().press("Tab")
        self.page.locator("#txt2img_generate").click()
        self.until(lambda: f"Seed: {self.seeds}," in info.inner_text(), "no picture", 120)
        return info.inner_text()

    def shoot(self, name, tab="txt2img"):
        """A picture of the page, and one of the accordion alone where that is open."""
        if os.environ.get("WEBUI_SCREENSHOTS"):
            os.makedirs(os.environ["WEBUI_SCREENSHOTS"], exist_ok=True)
            self.page.screenshot(path=os.path.join(os.environ["WEBUI_SCREENSHOTS"], name + ".png"))
            if self.control("eta", tab).is_visible():
                self.page.locator(f"#script_{tab}_ersde_accordion").first.screenshot(
                    path=os.path.join(os.environ["WEBUI_SCREENSHOTS"], name + "_part.png"))


@pytest.fixture
def page(browser, server):
    page = Page(browser, server)
    yield page
    page.close()


def text_for(sampler=SDE, ours="", steps=6):
    return (f"a lighthouse\nSteps: {steps}, Sampler: {sampler}, Schedule type: Automatic, CFG scale: 4, Seed: 7, Size: 64x64"
            + (f", {ours}" if ours else ""))


BARE = {setting.field: setting.unset for setting in SETTINGS}


def log_of(server):
    return server.log.read_text(errors="replace")


def test_the_page_loads_without_an_error(page):
    """A setting that the page cannot show would take all the others with it."""
    assert "allow_custom_value" not in log_of(page.server) and "ER-SDE:" not in log_of(page.server)
    assert not page.page.locator(".toast-body.error, .error:visible").count()
    assert page.values() == page.values("img2img") == BARE


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curve_follows_the_controls(browser, server, theme):
    page = Page(browser, server, theme)
    page.paste(text_for(SDE_5))
    page.open()
    page.until(lambda: "SDE 5" in page.curve().inner_text(), lambda: page.curve().inner_text())
    assert page.curve().locator("polyline").count() == 1
    page.type("eta", "0.4")
    page.until(lambda: "eta 0.4" in page.curve().inner_text(), lambda: page.curve().inner_text())
    assert page.curve().locator("polyline").count() == 2
    page.type("noise_scale", "sde")
    page.until(lambda: "noise scale sde," in page.curve().inner_text(), lambda: page.curve().inner_text())
    page.type("end", "0.8")
    page.until(lambda: "noise end 0.8" in page.curve().inner_text(), lambda: page.curve().inner_text())
    page.curve().locator("svg").click()         # away from the list that opened
    time.sleep(1)
    page.shoot(f"accordion_{theme}")
    colours = page.page.evaluate("""() => {
        const text = [...document.querySelectorAll('#script_txt2img_ersde_curve svg text')][0];
        let e = text, back = 'rgba(0, 0, 0, 0)';
        while (e && /, 0\\)$/.test(back)) { back = getComputedStyle(e).backgroundColor; e = e.parentElement; }
        return [getComputedStyle(text).fill, back];
    }""")
    dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in sorted(colours))
    assert abs(dark - light) > 100, colours
    page.type("eta", "-1")
    page.until(lambda: "between 0 and 10" in page.curve().inner_text(), lambda: page.curve().inner_text())
    page.close()


SETTINGS_TEXT = "ER-SDE noise scale: sde_4, ER-SDE eta: 0.35, ER-SDE order: 2, ER-SDE corrector: off, ER-SDE noise end: 0.9"


def test_pasting_restores_every_control_and_the_next_picture_has_it_again(page):
    page.open()
    for field, text in (("s_noise", "1.3"), ("preset", "texture")):
        page.type(field, text)
    page.paste(text_for(SDE, SETTINGS_TEXT))
    assert page.values() == {**BARE, "noise_scale": "sde_4", "eta": "0.35", "order": "2", "corrector": "off", "end": "0.9"}
    info = page.generate()
    assert f"Sampler: {SDE}" in info and all(part in info for part in SETTINGS_TEXT.split(", ")), info
    assert "s_noise" not in info and "ER-SDE preset" not in info
    page.shoot("picture")
    page.paste(text_for("Euler a"))
    assert page.values() == BARE


def test_typed_values_make_the_picture_and_its_infotext(page):
    page.paste(text_for(SDE))
    page.open()
    page.type("eta", "0.25")
    page.type("preset", "flat")
    info = page.generate()
    assert "ER-SDE preset: flat" in info and "ER-SDE eta: 0.25" in info
    page.type("eta", "")
    page.type("preset", AS_PRESET)
    assert PREFIX not in page.generate().replace(f"Sampler: {SDE}", "")


def test_png_info_restores_the_controls(page, server, tmp_path):
    (image,), (text,) = server.make_as(SDE, alwayson_scripts={"ER-SDE": {"args": [{"eta": 0.45, "preset": "sde_2"}]}})
    assert "ER-SDE eta: 0.45" in text
    file = tmp_path / "picture.png"
    file.write_bytes(image)
    page.page.locator("#tabs button", has_text="PNG Info").first.click()
    page.page.locator("#pnginfo_image input[type=file], #tab_pnginfo input[type=file]").first.set_input_files(str(file))
    page.until(lambda: "ER-SDE eta: 0.45" in page.page.locator("#tab_pnginfo").inner_text(), "PNG Info does not show it", 60)
    page.page.locator("#tab_pnginfo #txt2img_tab").first.click()
    page.until(lambda: page.control("eta").input_value() == "0.45", page.values)
    assert page.values() == {**BARE, "eta": "0.45", "preset": "sde_2"}


def test_sending_a_picture_on_takes_the_settings_along(page):
    page.paste(text_for(SDE, "ER-SDE eta: 0.55"))
    page.generate()
    page.page.locator("#txt2img_send_to_img2img, #image_buttons_txt2img #img2img_tab").first.click()
    page.until(lambda: page.control("eta", "img2img").input_value() == "0.55", lambda: page.values("img2img"))
    page.open("img2img")
    sampler = page.page.locator("#img2img_sampling input").first        # the hosts leave the tab its own
    sampler.click()
    sampler.fill(SDE_5)
    sampler.press("Enter")
    page.until(lambda: "eta 0.55" in page.curve("img2img").inner_text(), lambda: page.curve("img2img").inner_text())
    page.shoot("img2img", "img2img")


@pytest.mark.parametrize("ours, words", [("ER-SDE eta: -3", "eta must be"), ("ER-SDE preset: gone", "preset must be one of"),
                                         ("ER-SDE noise scale: sde_77", "noise scale must be one of")])
def test_a_bad_value_of_a_pasted_infotext_is_said_and_the_run_goes_on(page, ours, words):
    before = log_of(page.server).count(words)
    page.paste(text_for(SDE, ours))
    page.generate()
    shown = page.page.locator("#txt2img_results, #html_log_txt2img").first
    page.until(lambda: words in shown.inner_text(), shown.inner_text)
    assert "made with the sampler's preset 'SDE'" in shown.inner_text()
    lines = [line for line in log_of(page.server).splitlines() if words in line and line.startswith("ER-SDE:")]
    assert len(lines) == before + 1, lines


def test_the_axes_can_be_picked(server):
    labels = {component["props"].get("label"): component["props"].get("choices")
              for component in server.get("/config")["components"]}
    axes = [c[0] if isinstance(c, list) else c for c in labels["X type"]]
    for setting in SETTINGS:
        assert axes.count(f"[ER-SDE] {setting.name}") == 1


def test_a_plot_from_the_page(page):
    page.paste(text_for(SDE))
    page.page.locator("#script_list input").first.click()
    page.page.locator("#script_list input").first.fill("X/Y/Z plot")
    page.page.locator("#script_list input").first.press("Enter")
    x_type = page.page.locator("[id^=script_txt2img_xyz][id$=_x_type] input, #script_txt2img_xyz_plot_x_type input").first
    x_type.wait_for(state="visible")
    x_type.click()
    x_type.fill("[ER-SDE] eta")
    x_type.press("Enter")
    time.sleep(1)
    values = page.page.locator("[id^=script_txt2img_xyz][id$=_x_values] textarea").first
    values.fill("0, 0.5")
    values.press("Tab")
    time.sleep(1)
    info = page.generate()
    assert "ER-SDE eta: 0," in info, info           # of the grid's first cell
    page.shoot("plot")


def test_settings_page_defaults_and_hidden_entries(browser, server):
    """The settings page is the default of a run; what it hides is gone after "Reload UI" and still works by name."""
    server.post("/sdapi/v1/options", {"ersde_eta": "0.65", "ersde_hidden": [FLAT]})
    try:
        (image,), (text,) = server.make_as(SDE)
        assert "ER-SDE eta: 0.65" in text
        page = Page(browser, server)
        page.paste(text_for(SDE))           # a picture made without: the preset's own eta, said in so many words
        page.until(lambda: page.control("eta").input_value() == "1", page.values)
        reload_ui(page, 2)
        assert FLAT not in choices(server, "txt2img_sampling")
        (hidden,), (text,) = server.make_as(FLAT)
        assert pixels(hidden).std() > 1
        page.close()
    finally:
        server.post("/sdapi/v1/options", {"ersde_eta": "", "ersde_hidden": []})


def reload_ui(page, starts):
    """The link at the bottom of the page.

    The page would ask again and again whether the host is there, and AUTOMATIC1111 falls over a request that comes too
    early: we look away meanwhile.
    """
    page.rest()
    asked = log_of(page.server).count("Restarting UI")
    page.page.locator("a", has_text="Reload UI").first.click()
    page.until(lambda: log_of(page.server).count("Restarting UI") > asked, "not asked to reload")
    page.page.goto("about:blank")
    wait_for(page.server, starts=starts)
    page.load()


def test_reload_ui_twice(browser, server):
    """Last in this file: the page is away for a moment."""
    names, plain = server.get("/sdapi/v1/samplers"), None
    page = Page(browser, server)
    for starts in (3, 4):
        reload_ui(page, starts)
        assert server.get("/sdapi/v1/samplers") == names
        assert [name for name in choices(server, "txt2img_sampling") if name.startswith(PREFIX)] == OURS
        assert page.page.locator("#script_txt2img_ersde_accordion").count() == 1
        page.paste(text_for(SDE, "ER-SDE eta: 0.3"))
        assert page.values() == {**BARE, "eta": "0.3"}
        assert page.generate().count("ER-SDE eta: 0.3") == 1
        pictures = server.make_as(SDE)
        assert plain is None or pictures == plain
        plain = pictures
        test_the_axes_can_be_picked(server)
    page.close()


def test_the_log_has_no_error_of_ours(server):
    """Each error report of the host has the file it came from in its frames."""
    assert not re.search(r"File \"[^\"]*(ersde_webui|ersde/hosts)", log_of(server))
    assert "Error loading script: ersde" not in log_of(server) and "Error creating UI for er-sde" not in log_of(server)
