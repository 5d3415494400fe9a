"""
What several test files use: the option --slow, filters for warnings of other packages, short runs
of the small world in tiny/, a browser.

    python -m pytest -q             # without the tests that are marked slow
    python -m pytest -q --slow      # all of them
"""
import json, os, shutil
from pathlib import Path
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
from diffusers import FluxPipeline
import train
from model import Flux

torch.set_num_threads(1)                        # the tensors are small: threads only cost time
HERE = Path(__file__).resolve().parents[1]
TINY = HERE / "tiny"
FLUX = TINY / "flux"
PROMPTS = ["a dog", "an octopus in the sea, seen from far above"]
SHORT = ("--prompts_per_iteration 2 --group_size 4 --num_anchors 2 --num_rollout_steps 3 "
         "--num_train_steps 2 --updates_per_iteration 1 --eval_every 0 --save_every 2 --threads 1 "
         "--eval_scorers").split() + [""]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long, so it runs only with --slow")
    for ignored in ("ignore::DeprecationWarning:diffusers",
                    "ignore:torch.distributed is disabled"):    # a single process saves
        config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --slow"))


def lines_of(out, seconds=True):
    """The lines of a run's log. Between equal runs, only the seconds may differ."""
    text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if seconds or "seconds" not in key}
            for line in lines]


def iterations_of(out, seconds=True):
    """The lines of a run's log that are not of evaluations."""
    return [line for line in lines_of(out, seconds) if "reward" in line]


def assert_near(actual, expected, rel=1e-5):
    """Compare the largest difference with the largest number: processors round differently, and the
    error of a sum grows with its terms. Velocities differ by up to 1e-6, gradients by 1e-5."""
    assert_close(actual, expected, rtol=0, atol=rel * expected.abs().max().item())


def check_numbers(one, other, rows=2):
    """Two models must have the same velocities without and with gradients, pictures and gradients.
    """
    x, found = torch.randn(rows, *one.latent_shape), []
    for model in (one, other):
        cond = model.encode(PROMPTS)
        with torch.no_grad():
            rolled = model.velocity(x, 0.5, cond)
        v = model.velocity(x, 0.5, cond)
        gradients = torch.autograd.grad(v.pow(2).mean(), model.trained(), allow_unused=True)
        gradients = torch.cat([g.flatten() for g in gradients if g is not None])
        found.append([rolled, v.detach(), model.decode(x), gradients])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 1e-4)


def weights_of(out, iteration):
    path = Path(out) / f"checkpoint-{iteration}"
    return FluxPipeline.from_pretrained(path).transformer.state_dict()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flux():
    """The small FLUX. No test may change its weights."""
    return Flux(FLUX, 64)


@pytest.fixture(scope="session")
def five(tmp_path_factory):
    """Settings for evaluations on five prompts, which cannot be divided by two processes."""
    path = tmp_path_factory.mktemp("prompts") / "five.txt"
    path.write_text("a red apple\nan octopus\na dog\na red car\nthe moon\n", encoding="utf-8")
    return ["--eval_prompts", str(path), "--eval_every", "2"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory, five):
    """A run of four iterations in one process, with checkpoints after the second and fourth."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*SHORT, *five, "--iterations", "4", "--out_dir", str(out)]) is None
    return out


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium with a window of 1440 x 900, driven by selenium, for all tests of a file.
    Without Chromium, its driver or selenium, a test is skipped, but under CI it fails."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (program and driver and webdriver):
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("needs Debian's chromium and chromium-driver, and selenium from PyPI")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_window_size(1440, 900)
    yield browser
    browser.quit()


def js(browser, expression):
    """The value of a JavaScript expression in the page that the browser shows."""
    return browser.execute_script("return " + expression)


def press(browser, *keys):
    """Press keys, by JavaScript's names, or type text, where the focus is."""
    names = dict(ArrowLeft="\ue012", ArrowUp="\ue013", ArrowRight="\ue014", ArrowDown="\ue015",
                 Backspace="\ue003", Tab="\ue004")             # as WebDriver calls them
    for key in keys:
        browser.switch_to.active_element.send_keys(names.get(key, key))


def click(browser, selector):
    browser.find_element("css selector", selector).click()
