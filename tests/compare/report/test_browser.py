"""The page in a real browser: it filters, asks the network for nothing, says nothing on the console, fits a phone."""

import json
import shutil
import time

import pytest

from ppo_vs_dpo.compare.report.pages import write_pages

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
]
ROWS = 5000
EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> <b>bold</b> & more'


def win_rates(names, judge):
    entries = []
    for i, policy in enumerate(names):
        for versus in names:
            if policy != versus:
                rate = 0.5 + 0.1 * (i - names.index(versus))
                entries.append(
                    {
                        "policy": policy,
                        "versus": versus,
                        "judge": judge,
                        "n": ROWS,
                        "win_rate": rate,
                        "ci": [rate - 0.02, rate + 0.02],
                        "ties": 0.1,
                        "p_holm": 0.001,
                        "length_controlled": {"win_rate": 0.5, "ci": [0.45, 0.55]},
                    }
                )
    return entries


def small_report(names, judges):
    """A report with everything the page reads."""
    policies = {
        name: {
            "method": name,
            "point": {},
            "gold_reward": 0.5,
            "gold_reward_ci": [0.4, 0.6],
            "proxy_reward": 0.5,
            "proxy_reward_ci": [0.4, 0.6],
            "n_prompts": ROWS,
            "draws": 1,
            "kl": {"mean": 1.0, "ci": [0.9, 1.1], "kind": "exact per token"},
            "length": 20.0,
            "eos_rate": 1.0,
            "tokens_per_answer": 20.0,
            "displacement": None,
            "quality": dict.fromkeys(("distinct_1", "distinct_2", "self_bleu", "repetition", "empty_rate"), 0.1)
            | {"perplexity_under_reference": None, "rouge_l": 0.2},
        }
        for name in names
    }
    return {
        "schema_version": 2,
        "verdict": [f"One {EVIL}", "Two.", "Three."],
        "would_change": ["Other <seeds>."],
        "decision": {
            "judge": "gold",
            "alpha": 0.05,
            "delta": 0.05,
            "objections": [],
            "primary": None,
            "secondary": [],
        },
        "warnings": ["Mind <this>."],
        "settings": {
            **{"seeds": [1], "n_prompts": ROWS, "temperature": 1.0, "confidence": 0.95},
            **{
                "top_k": 0,
                "top_p": 1.0,
                "resamples": 100,
                "delta": 0.05,
                "units": ROWS,
                "tuning": {"ppo": {"settings": 3, "chosen_on": "unknown"}},
            },
        },
        "trained": {"model": "a-model", "data": "pairs.jsonl", "pairs": 9000, "ppo": {"kl_coef": 0.2, "updates": 24}},
        "pair_set": {"hash": "ab" * 32, "n_train": 1, "n_test": 1, "same": True},
        "judges": {judge: {"kind": "function", "in_sample": False} for judge in judges},
        "policies": policies,
        "win_rates": [entry for judge in judges for entry in win_rates(names, judge)],
        "control": [],
        "power": None,
        "matched_kl": {"policy": "ppo", "versus": "dpo", "refused": "no sweep"},
        "frontier": [frontier_point(*about) for about in POINTS],
        "optimum": {
            "kind": "importance weights",
            "draws": 24,
            "curves": {
                "gold": [
                    {"beta": 9 - k, "kl": k, "kl_ci": [k, k], "reward": k / 5, "reward_ci": [0, 1], "ess": 9.0}
                    for k in range(4)
                ]
            },
            "gaps": [
                {
                    **{"policy": "ppo", "judge": "gold", "beta": 0.5, "ess": 9.0, "objective": 1.0, "optimum": 1.5},
                    **{"gap": 0.5, "objective_ci": [0, 2], "optimum_ci": [1, 2], "gap_ci": [0, 1]},
                },
                {"policy": "dpo", "judge": "gold", "beta": 0.1, "ess": 1.5, "refused": "1.5 effective draws"},
            ],
            "policies": None,
        },
        "ranking": {},
        "agreement": [],
        "temperatures": [],
        "reward_model": None,
        "cost": {
            "stages": {"ppo": {"seconds": 43.2, "peak_memory_mb": 700.0, "flops": 3.2e12, "tokens_generated": 51_000}},
            "methods": {"ppo": {"stages": ["ppo"], "seconds": 43.2, "peak_memory_mb": 700.0, "flops": 3.2e12}},
            "judges": {},
        },
    }


POINTS = [
    ("ppo", "ppo", {}, "sweep", 4.0),
    ("ppo,kl_coef=0.0", "ppo", {"kl_coef": 0.0}, "sweep", 9.0),
    ("ppo,step=8", "ppo", {"step": 8}, "training", 1.0),
    ("dpo", "dpo", {}, "sweep", 3.0),
    ("best_of_4", "best_of_n", {"n": 4}, "n", 0.6),
    ("best_of_4,policy=ppo", "best_of_n", {"n": 4, "policy": "ppo"}, "n", 5.0),
]


def frontier_point(policy, method, point, along, kl):
    rewards = {"gold_reward": 0.5, "gold_reward_ci": [0.4, 0.6], "proxy_reward": 0.5, "proxy_reward_ci": [0.4, 0.6]}
    divergence = {"mean": kl, "ci": [kl - 0.1, kl + 0.1], "kind": "exact per token"}
    about = {"policy": policy, "method": method, "point": point, "along": along, "eos_rate": 1.0}
    return {**about, "kl": divergence, "sqrt_kl": kl**0.5, **rewards, "over_optimised": policy.endswith("0.0")}


def small_samples(names, judges):
    """5,000 rows; row i of ppo scores i % 7, of dpo 3: wins, ties and losses are known."""
    policies = []
    for name in names:
        gold = [float(i % 7) if name == "ppo" else 3.0 for i in range(ROWS)]
        policies.append(
            {
                "name": name,
                "label": name.upper(),
                "texts": [f"{name} completion {i} lorem ipsum dolor sit amet " * 3 for i in range(ROWS)],
                "tokens": [i % 50 for i in range(ROWS)],
                "finished": [int(i != 17) for i in range(ROWS)],
                "scores": {judges[0]: gold, judges[1]: [-score for score in gold]},
            }
        )
    policies[1]["texts"][4321] = f"needle {EVIL}"
    prompts = [f"prompt number {i}" for i in range(ROWS)]
    return {"prompts": prompts, "ids": [f"id{i}" for i in range(ROWS)], "judges": judges, "policies": policies}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address."""
    folder = tmp_path_factory.mktemp("page")
    names, judges = ["sft", "ppo", "dpo"], ["gold", "reward_model"]
    write_pages(folder, small_report(names, judges), small_samples(names, judges), "a <title>")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium (Debian: chromium, chromium-driver)."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium and chromedriver on this machine (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def at(browser, page):
    """The page, freshly loaded."""
    browser.get(page)
    return browser


def by_id(browser, name):
    return browser.find_element("id", name)


CHOOSE = """const s = document.getElementById(arguments[0]);
s.value = arguments[1]; s.dispatchEvent(new Event('change'))"""


def choose(browser, name, value):
    browser.execute_script(CHOOSE, name, value)


def shown(browser):
    return int(by_id(browser, "reader-status").text.split(" of ")[0])


def search(browser, text):
    field = by_id(browser, "search")
    field.clear()
    field.send_keys(text)
    time.sleep(0.2)


def test_no_console_message_and_no_request(at):
    at.get_log("performance")  # the browser's own start page
    at.refresh()
    assert [entry for entry in at.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in at.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file") for url in asked) <= 1


def test_markup_in_completions_stays_text(at):
    search(at, "needle")
    assert shown(at) == 1
    assert EVIL in by_id(at, "rows").text
    assert at.execute_script("return window.hacked") is None
    assert at.execute_script("return document.querySelectorAll('#rows b, #rows img, #rows script').length") == 0
    assert EVIL in by_id(at, "verdict").text
    assert at.find_element("css selector", "header .run").text == "a <title>"


def test_filters_count_what_there_is(at):
    expected = {"left": 0, "right": 0, "ties": 0}
    for i in range(ROWS):
        expected["left" if i % 7 > 3 else "right" if i % 7 < 3 else "ties"] += 1
    assert shown(at) == ROWS
    for name, count in expected.items():
        choose(at, "filter", name)
        assert shown(at) == count
    choose(at, "filter", "disagree")
    assert shown(at) == expected["left"] + expected["right"]
    choose(at, "filter", "unfinished")
    assert shown(at) == 1
    choose(at, "filter", "left")
    search(at, "number 4999")
    assert shown(at) == int(4999 % 7 > 3)


def test_order_and_pages(at):
    choose(at, "order", "longest")
    assert "49 tokens" in by_id(at, "rows").find_elements("tag name", "li")[0].text
    assert by_id(at, "page").text == "page 1 of 250"
    assert not by_id(at, "previous").is_enabled()
    at.execute_script("document.getElementById('next').click()")
    assert by_id(at, "page").text == "page 2 of 250"
    choose(at, "filter", "unfinished")
    assert by_id(at, "page").text == "page 1 of 1"


def test_matrix_and_judges(at):
    cells = at.find_elements("css selector", "#matrix-table button")
    assert [cell.text.splitlines()[0] for cell in cells] == ["40.0", "30.0", "60.0", "40.0", "70.0", "60.0"]
    at.execute_script("document.getElementById('matrix-lc').click()")
    assert {c.text.splitlines()[0] for c in at.find_elements("css selector", "#matrix-table button")} == {"50.0"}
    choose(at, "matrix-judge", "reward_model")
    at.execute_script("document.querySelector('#matrix-table button').click()")
    assert at.execute_script("return document.getElementById('left').value") == "sft"
    assert at.execute_script("return document.getElementById('judge').value") == "reward_model"


def test_five_thousand_rows_are_quick(at):
    seconds = at.execute_script(
        """const start = performance.now();
        for (const [id, value] of [['filter', 'left'], ['order', 'margin'], ['left', 'sft'], ['left', 'ppo'],
                                   ['order', 'longest'], ['filter', 'disagree'], ['filter', 'all']]) {
          const s = document.getElementById(id); s.value = value; s.dispatchEvent(new Event('change'));
        }
        return (performance.now() - start) / 7000;"""
    )
    assert seconds < 0.25


def test_by_keyboard_alone(at):
    """Tab reaches every control in order, and focus can be seen."""
    from selenium.webdriver.common.keys import Keys

    reached = []
    at.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    for _ in range(60):
        at.switch_to.active_element.send_keys(Keys.TAB)
        active = at.switch_to.active_element
        reached.append(active.get_attribute("id") or active.tag_name)
    wanted = ["matrix-judge", "matrix-lc", "left", "right", "judge", "filter", "order", "search", "next"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    by_id(at, "search").send_keys("needle")
    assert at.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    at.switch_to.active_element.send_keys(Keys.SHIFT, Keys.TAB)


def test_the_head_says_what_was_trained_on_what(at):
    head = at.find_element("css selector", "header .trained").text
    assert head == "model a-model · data pairs.jsonl · 9,000 pairs · PPO: kl coef 0.2, updates 24"


def test_matrix_and_reader_open_on_the_verdict_s_judge(browser, tmp_path):
    """Two judges of which the second is the verdict's: the first one is in-sample."""
    names, judges = ["sft", "ppo", "dpo"], ["reward_model", "polite"]
    report = small_report(names, judges)
    report["judges"]["reward_model"]["in_sample"] = True
    report["optimum"] = None
    write_pages(tmp_path, report, small_samples(names, judges), "two judges")
    browser.get((tmp_path / "report.html").as_uri())
    for select in ("matrix-judge", "judge"):
        assert browser.execute_script(f"return document.getElementById('{select}').value") == "polite"


def test_from_a_cell_to_its_completions_and_back_by_keyboard(at):
    """Tab reaches one cell, arrows go on, Enter takes the focus to the completions, Escape to the cell again."""
    from selenium.webdriver.common.keys import Keys

    cells = at.find_elements("css selector", "#matrix-table button")
    assert [cell.get_attribute("tabindex") for cell in cells] == ["0", *["-1"] * (len(cells) - 1)]
    by_id(at, "matrix-lc").send_keys(Keys.TAB)
    at.switch_to.active_element.send_keys(Keys.TAB)  # past the region that scrolls
    where = "return [document.activeElement.dataset.row, document.activeElement.dataset.column]"
    assert at.execute_script(where) == ["sft", "ppo"]
    for key, cell in (
        (Keys.ARROW_DOWN, ["dpo", "ppo"]),
        (Keys.ARROW_LEFT, ["dpo", "sft"]),
        (Keys.ARROW_UP, ["ppo", "sft"]),
    ):
        at.switch_to.active_element.send_keys(key)
        assert at.execute_script(where) == cell
    at.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert at.execute_script(where) == ["ppo", "dpo"]  # over the diagonal
    at.switch_to.active_element.send_keys(Keys.ENTER)
    assert at.execute_script("return document.activeElement.id") == "rows"
    assert [at.execute_script(f"return document.getElementById('{x}').value") for x in ("left", "right")] == [
        "ppo",
        "dpo",
    ]
    at.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert at.execute_script(where) == ["ppo", "dpo"]


LUMINANCE = """const linear = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const lum = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
  return .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b); };
const back = (node) => { for (; node; node = node.parentElement) {
  const c = getComputedStyle(node).backgroundColor;
  if (!c.startsWith('rgba')) return c; } return 'rgb(255, 255, 255)'; };
const ratio = (node) => { const a = lum(getComputedStyle(node).color), b = lum(back(node));
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); };"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible_in_both_schemes(at, scheme):
    """Every kind of text on what lies behind it: WCAG AA, 4.5; and the page is as dark or light as was asked."""
    at.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        kinds = [
            "body",
            "h1",
            ".meta",
            ".verdict > p",
            ".warnings li",
            ".change li",
            ".note",
            "td small",
            "thead th",
            "a",
        ]
        kinds += [".facts", ".text", ".prompt span", ".side .won", ".side .lost", "select", ".status", "dt"]
        for kind in kinds:
            ratio = at.execute_script(f"{LUMINANCE} return ratio(document.querySelector('{kind}'))")
            assert ratio >= 4.5, (kind, ratio)
        dark = at.execute_script(f"{LUMINANCE} return lum(getComputedStyle(document.body).backgroundColor) < .1")
        assert dark == (scheme == "dark")
    finally:
        at.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_paper_loses_no_column(browser, tmp_path):
    """Printed, a report with twelve policies shows every column of every table, and nothing that scrolls."""
    names, judges = ["sft", "ppo", "dpo", *(f"ppo,kl_coef={i}.25" for i in range(9))], ["gold", "reward_model"]
    samples = small_samples(names[:3], judges)
    report = small_report(names, judges)
    write_pages(tmp_path, report, samples, "wide")
    browser.get((tmp_path / "report.html").as_uri())
    width = round((297 - 24) / 25.4 * 96)  # A4 landscape less the margins, in CSS pixels
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        too_wide = """const right = (t) => t.getBoundingClientRect().right;
          const all = [...document.querySelectorAll('table')].filter((t) => right(t) > arguments[0] + 1);
          return all.map((t) => (t.id || t.innerText.slice(0, 40)) + right(t))"""
        assert browser.execute_script(too_wide, width) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        scrolls = (
            "[...document.querySelectorAll('.scroll')].filter((s) => getComputedStyle(s).overflowX !== 'visible')"
        )
        assert browser.execute_script(f"return {scrolls}.length") == 0
        pdf = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
        assert len(pdf) > 10_000
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_legible_on_a_phone(at):
    at.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert at.execute_script("return document.documentElement.scrollWidth") <= 375
        assert at.execute_script("return parseFloat(getComputedStyle(document.body).fontSize)") >= 14
        one, two = at.find_elements("css selector", "#rows li:first-child .side")
        assert two.rect["y"] > one.rect["y"]
    finally:
        at.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_cost_optimum_and_frontier_are_told(at):
    assert "3.2 TFLOP" not in by_id(at, "cost").text  # the unit stands in the heading
    assert "3.2 T" in by_id(at, "cost").text
    assert "not estimable: 1.5 effective draws" in by_id(at, "frontier").text
    figures = at.find_elements("css selector", "#frontier figure svg")
    assert len(figures) == 3
    assert figures[0].get_attribute("role") == "img"
    assert "Gold reward" in figures[0].get_attribute("aria-label")
    # Two figures of one page share no id, or one would be drawn with the other's parts.
    doubles = """const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
    return ids.length - new Set(ids).size"""
    assert at.execute_script(doubles) == 0
    at.execute_script("document.querySelector('#frontier summary').click()")
    assert "along training" in by_id(at, "frontier").text


def test_contrast_of_the_matrix(at):
    """Black text on every colour of the matrix, whatever the win rate: WCAG AA asks for 4.5."""
    ratios = at.execute_script(
        """const linear = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const lum = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
        const over = (base, alpha) => base.map((v) => 255 * (1 - alpha) + v * alpha);
        return [[0, 114, 178], [213, 94, 0]].map((base) => (lum(over(base, .6)) + .05) / (lum([27, 36, 48]) + .05));"""
    )
    assert min(ratios) >= 4.5
