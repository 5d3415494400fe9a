"""
examples/explore.html, the method in a browser: its formulas against neighbor_grpo.py, solvers.py
and examples/toy.py, and its buttons, handles and sliders, in a real Chromium.

    python -m pytest -q tests/test_explore.py
"""
import math, re, time
import pytest
import torch
from examples import toy
from neighbor_grpo import (clipped_objective, group_advantages, log_policy, log_ratio,
                           perturb_noise)
from solvers import rollout, schedule
from tests.conftest import HERE, click, js, press

PAGE = HERE / "examples" / "explore.html"
REWARD = "curve[curve.length - 1]"


@pytest.fixture
def page(browser):
    """The browser with the page. At the end of a test, nothing may have gone wrong in it."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(PAGE.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def call(page, name, *args):
    """The page's function `name` of the arguments, tensors as lists."""
    args = [arg.tolist() if isinstance(arg, torch.Tensor) else arg for arg in args]
    result = page.execute_script(f"return ({name})(...arguments)", *args)
    return torch.tensor(result, dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def wait(page, condition, seconds=60):
    end = time.monotonic() + seconds
    while not js(page, condition):
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.05)


def exact_velocity(x, t):
    return toy.exact_velocity(x.reshape(-1, 2), t).reshape(x.shape)


@pytest.fixture(autouse=True)
def float64_flow(monkeypatch):
    """The flow of toy.py, with its six means in float64."""
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 3
    monkeypatch.setattr(toy, "MODES", 2 * torch.stack([angles.cos(), angles.sin()], 1))


# ------------------------------------------------------------------------------------------------
# the formulas

def test_the_pages_formulas_are_those_of_neighbor_grpo(page):
    torch.manual_seed(0)
    for G, sigma, p, tau, clip, far in [
            (12, 0.3, 0.8, 0.5, 0.01, 0.1), (2, 1.0, 2.0, 2.0, 0.3, 1.0),
            (24, 0.05, 0.1, 0.02, 1e-4, 0.5), (5, 0.6, 1.3, 20.0, 0.1, 3.0)]:
        x, delta = torch.randn(2, G, 2, dtype=torch.float64)
        eps_star, x_old, u = torch.randn(3, 2, dtype=torch.float64)
        x_theta, rewards = (x_old + far * u).requires_grad_(), torch.randn(G, dtype=torch.float64)
        close(call(page, "perturb_noise", eps_star, delta, sigma),
              perturb_noise(eps_star, delta, sigma))
        A = group_advantages(rewards, p)
        close(call(page, "group_advantages", rewards, p), A)
        log_pi = log_policy(x, x_theta, tau)
        close(call(page, "log_policy", x, x_theta.detach(), tau), log_pi)
        log_rho = log_ratio(x, x_theta, x_old, tau)
        close(call(page, "log_ratio", x, x_theta.detach(), x_old, tau), log_rho)
        J = clipped_objective(log_rho, A, clip)
        close(call(page, "clipped_objective", log_rho.detach(), A, clip), J)
        [pull] = torch.autograd.grad(tau * J, x_theta)
        close(call(page, "pull_on", x, log_pi.exp().detach(), log_rho.detach(), A, clip), pull)
    flat = torch.full((7,), 0.1, dtype=torch.float64)
    assert call(page, "group_advantages", flat, 0.8).tolist() == [0.0] * 7


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_the_pages_rollouts_are_those_of_solvers_on_the_flow_of_the_toy(page, solver):
    torch.manual_seed(0)
    x = torch.randn(9, 2, dtype=torch.float64)
    for t in (1.0, 0.5, 0.05):
        close(call(page, "(x, t) => x.map(y => exact_velocity(y, t))", x, t), exact_velocity(x, t))
    for T in (1, 3, 16):
        ts = schedule(T).double()
        close(call(page, "schedule", T), ts)
        traj, vels = rollout(exact_velocity, x, ts, solver)
        for name, expected in (("traj", traj), ("vels", vels)):
            function = f"(...args) => rollout(exact_velocity, ...args).{name}"
            close(call(page, function, x, ts, solver), expected)


@pytest.mark.parametrize("old_anchor", ["replay", "rollout"])
def test_the_pages_updates_are_steps_of_adam_on_minus_tau_J(page, old_anchor):
    setting = dict(sigma=0.4, G=6, T=4, B=2, tau=0.3, p=0.8, clip=0.02, solver="dpmpp_2m",
                   old_anchor=old_anchor)
    page.execute_script("reset(arguments[0])", setting)
    groups = [{name: torch.tensor(group[name], dtype=torch.float64)
               for name in ("traj", "vels", "A")} for group in js(page, "groups")]
    ts, centres = schedule(4).double(), torch.linspace(-2.5, 2.5, 5, dtype=torch.float64)
    theta = torch.zeros(50, 2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([theta], lr=js(page, "RATE"))

    def velocity(x, t):                         # x (2,)
        bumps = torch.exp(-(x[:, None] - centres) ** 2 / 2)
        grid = torch.outer(*bumps).flatten()
        return exact_velocity(x, t) + torch.stack([grid, grid * t], 1).flatten() @ theta

    for _ in range(3):
        losses = []
        for group in groups:
            for k in range(3):                  # every time but for the last
                for j in range(2):
                    x_t, dt, x = group["traj"][k][j], ts[k + 1] - ts[k], group["traj"][k + 1]
                    replayed = x_t + dt * group["vels"][k][j]
                    log_rho = log_ratio(x, x_t + dt * velocity(x_t, ts[k]),
                                        replayed if old_anchor == "replay" else x[j], 0.3)
                    losses.append(-0.3 * clipped_objective(log_rho, group["A"], 0.02))
        opt.zero_grad()
        torch.stack(losses).mean().backward()
        opt.step()
        J = call(page, "update")
        close(-0.3 * J, torch.stack(losses).mean().detach())
        close(call(page, "() => [...theta]"), theta.detach().flatten())


# ------------------------------------------------------------------------------------------------
# the page

def test_the_page_is_one_short_file_that_loads_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450 and max(map(len, text.splitlines())) <= 100
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|src=|<link|fetch\(|\bimport\b", text)


def test_a_reader_drags_presses_and_runs_and_the_reward_rises(page):
    from selenium.webdriver import ActionChains
    star, before = page.find_element("id", "star"), js(page, "groups[0].A")
    width = js(page, "document.getElementById('world').clientWidth")
    ActionChains(page).drag_and_drop_by_offset(star, -width // 4, width // 8).perform()
    assert js(page, "set.star") == pytest.approx([1.2 - 3.1 / 2, 1.4 - 3.1 / 4], abs=0.05)
    assert js(page, "groups[0].A") != before
    assert "(−0.3" in star.get_attribute("aria-label")
    noise, before = page.find_element("id", "eps_star"), js(page, "groups[0].traj[0]")
    ActionChains(page).drag_and_drop_by_offset(noise, 30, 0).perform()
    assert js(page, "groups[0].traj[0]") != before

    seen, buttons = set(), page.find_elements("css selector", "#buttons button")
    for button in buttons[:5]:
        button.click()
        wait(page, "turn === 0")                # the rollout is drawn step by step
        assert button.get_attribute("aria-pressed") == "true"
        seen.add(page.find_element("id", "formula").text + page.find_element("id", "live").text)
    assert len(seen) == 5 and not re.search("NaN|undefined|Infinity", "".join(seen))
    assert js(page, "updates") == 1
    assert js(page, "Math.max(...one_step(groups[0], 0, 0).log_rho.map(Math.abs))") > 0

    first = js(page, REWARD)
    click(page, "#run")
    wait(page, "curve.length > 40")
    assert page.find_element("id", "run").text == "Pause"
    click(page, "#run")
    stopped = js(page, "curve.length")
    assert js(page, REWARD) > first + 0.5
    assert max(map(abs, js(page, "J_curve"))) < 1e-12
    click(page, "#reset")
    assert js(page, "curve.length") == 1 and stopped > 40


def test_the_page_works_with_a_keyboard(page):
    press(page, "Tab")
    assert js(page, "document.activeElement.id") == "star"
    press(page, "ArrowLeft", "ArrowUp", "ArrowUp")
    assert js(page, "set.star") == pytest.approx([1.1, 1.6])
    press(page, "Tab")
    press(page, "ArrowDown")
    assert js(page, "set.eps_star") == pytest.approx([0.1, 0.2])
    press(page, "Tab", " ")                     # the first button
    assert js(page, "stage") == 0
    names = set()
    for _ in range(30):
        press(page, "Tab")
        names.add(js(page, "document.activeElement.id || document.activeElement.textContent"))
    assert {*"G T B p sigma tau clip solver old_anchor run reset".split(), "5 Update",
            "What does τ change?"} <= names
    page.execute_script("document.getElementById('tau').focus()")
    press(page, "ArrowRight")
    assert js(page, "set.tau") > 0.5
    unnamed = "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length)"
    assert js(page, unnamed + ".length") == 0
    assert js(page, "[...document.querySelectorAll('svg, .handle')]"
                    ".every(one => one.getAttribute('aria-label'))")


@pytest.mark.parametrize("width", [360, 1000])  # a phone, and the narrowest with three columns
def test_nothing_is_wider_than_the_window(page, width):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=width, height=740, deviceScaleFactor=1, mobile=width < 500))
    for n in range(6):
        assert width >= page.execute_script("""
            document.querySelectorAll("#ask button")[arguments[0]].click();
            return Math.max(...EQUATIONS.map((_, n) => {
                stage = n;
                draw();
                const parts = [...document.querySelectorAll("main :not(svg *)")];
                return Math.max(document.documentElement.scrollWidth,
                                ...parts.map(one => one.getBoundingClientRect().right));
            }))""", n)


# ------------------------------------------------------------------------------------------------
# the answers

def test_a_question_shows_its_answer_and_plays_until_the_next_action(page):
    texts = set()
    for button in page.find_elements("css selector", "#ask button"):
        button.click()
        assert js(page, "turn") > 0 and button.get_attribute("aria-pressed") == "true"
        texts.add(page.find_element("id", "answer").text)
    assert len(texts) == 6
    click(page, "#reset")
    assert js(page, "turn") == 0


def reward_after(page, iterations, **setting):
    return js(page, f"(() => {{ set = {{ ...DEFAULTS }}; reset({setting or '{}'}); for (let n = 0; "
                    f"n < {iterations}; n++) iterate(); return {REWARD} }})()")


def test_sigma_1_stops_early_and_the_literal_old_anchor_goes_wrong(page):
    assert reward_after(page, 60) > reward_after(page, 60, sigma=1) + 0.4
    second = js(page, "SECOND_ORDER")
    good, bad = [reward_after(page, 60, **second, old_anchor=old) for old in ("replay", "rollout")]
    assert good > bad + 0.5
    towards = """(() => {                       // of the pulls before an update, to the ring
        reset({ ...SECOND_ORDER, old_anchor: arguments[0] });
        const all = groups.flatMap(g => list_of(set.B, j => list_of(set.T - 1, k => {
            const { x_theta, pull } = one_step(g, j, k);
            return dot(mix(1, g.traj[k + 1][j], -1, x_theta), pull);
        })).flat()).filter(d => Math.abs(d) > 1e-9);
        return sum(all, d => d > 0) / all.length })()"""
    share = [page.execute_script("return " + towards, old) for old in ("rollout", "replay")]
    assert share[0] > 0.9 and share[1] < 0.7


def test_before_the_first_update_tau_changes_the_policy_and_not_the_pull(page):
    results = [page.execute_script("set = { ...DEFAULTS }; reset({ tau: arguments[0] });"
                                   "const { pi, pull } = one_step(groups[0], 0, 3); learn(2);"
                                   "return [pi, pull, one_step(groups[0], 0, 3).log_rho]", tau)
               for tau in (0.05, 2)]
    (pi, pull, log_rho), (other_pi, other_pull, other_rho) = results
    assert pull == pytest.approx(other_pull, abs=1e-12) and max(pi) > 2 * max(other_pi)
    assert max(map(abs, log_rho)) > 3 * max(map(abs, other_rho))


def test_the_clip_acts_after_the_first_update_and_then_stops_the_pull(page):
    lengths = page.execute_script("""
        const out = [];
        for (let n = 0; n < 9; n++) {
            const { pull, log_rho } = one_step(groups[0], 0, 4);
            const cut = (l, i) => is_cut(Math.exp(l), groups[0].A[i], set.clip);
            out.push([Math.hypot(...pull), log_rho.filter(cut).length]);
            learn(1);
        }
        return out""")
    assert lengths[0][1] == 0 and lengths[-1][1] >= 6, lengths
    assert lengths[-1][0] < 0.5 * lengths[0][0], lengths


def test_with_a_smaller_p_a_candidate_that_stands_out_weighs_more(page):
    weights = [page.execute_script("reset({ ...STANDOUT, p: arguments[0] });"
                                   "return size(groups[0].A) * set.G ** (1 / set.p)", p)
               for p in (2, 0.8, 0.4)]
    assert weights[0] < 3.4 and weights[1] > 6 and weights[2] > weights[1]
    rewards = sorted(js(page, "groups[0].rewards"))
    assert rewards[-1] - rewards[-2] > 2 * (rewards[-2] - rewards[0])
