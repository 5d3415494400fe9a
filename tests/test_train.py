"""
train.py: Algorithm 1 on a stub, several processes, averages of weights, adapters, kills.

    python -m pytest -q tests/test_train.py         # two processes on the CPU (gloo), once
    python -m tests.test_train --kills 20           # kill -9 of a random process at a random
                                                    # moment, again and again; some minutes
    python -m tests.test_train --kills 20 --in_saves        # only while checkpoints are written
"""
import argparse, math, os, random, runpy, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import psutil                                                   # comes with accelerate
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # before diffusers
from diffusers import FluxPipeline
import run
import train
from machine import RANK, exit_process
from run import checkpoints, merge
from solvers import rollout, schedule
from test_core import G, Stub, brightness, stub_run, train_stub
from tests.conftest import FLUX, HERE, SHORT, iterations_of, lines_of
from tests.test_run import Saved, check_loads


# ============================================================== Algorithm 1, on test_core.py's stub

class Prompted(Stub):
    """A stub whose velocity depends on the prompt of each row, too."""

    def encode(self, prompts):
        return dict(vec=torch.tensor([[ord(prompt) - 98.0] for prompt in prompts]))

    def velocity(self, x, t, cond):
        own = cond["vec"].repeat_interleave(len(x) // len(cond["vec"]), 0)      # (M, 1)
        return super().velocity(x + own[:, None], t, cond)


def match(images, prompts):
    return -(images.flatten(1).mean(1) - Prompted().encode(prompts)["vec"][:, 0]).abs()


def algorithm_1_in_plain_loops(cfg, model, scorers, weights):
    """One iteration in float64, with Eq. 3 and 7 to 11 as in the paper -> the average of the
    weights, the norms of the gradients, the ratios."""
    prompts, eps_star, delta, anchors, steps = train.draw(cfg, 0, ["a", "b", "c"], (4, 3))
    ts, U = schedule(cfg.num_rollout_steps, cfg.shift).double(), cfg.updates_per_iteration
    tau, groups, norms = 12 if cfg.tau == "dim" else float(cfg.tau), [], []
    noises = eps_star.double().view(-1, 4, 3), delta.double().view(-1, G, 4, 3)
    for prompt, eps, d in zip(prompts, *noises):
        cond = model.encode([prompt])
        x1 = (1 - cfg.sigma**2) ** 0.5 * eps + cfg.sigma * d                    # Eq. 7
        with torch.no_grad():
            traj, vels = rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, cfg.solver)
        r = [scorer(traj[-1], [prompt] * G) for scorer in scorers]
        A = sum(w * (r - r.mean()) / r.std() for w, r in zip(weights, r))       # Eq. 3
        A = A / (A.abs() ** cfg.p).sum() ** (1 / cfg.p)                         # Eq. 11
        groups.append((cond, traj, vels, A))
    opt = torch.optim.AdamW(model.trained(), cfg.lr, (0.9, 0.999), weight_decay=1e-4)
    average, b, ratios = model.weights(), anchors.shape[1] // U, []
    for u in range(U):
        for (cond, traj, vels, A), chosen in zip(groups, anchors.tolist()):
            for j in chosen[u * b : (u + 1) * b]:
                for k in steps:
                    x, dt = traj[k, j], ts[k + 1] - ts[k]
                    x_theta = x + dt * model.velocity(x[None], ts[k], cond)[0]
                    old = x + dt * vels[k, j] if cfg.old_anchor == "replay" else traj[k + 1, j]
                    log_pi, log_pi_old = (          # Eq. 8
                        (-(traj[k + 1] - a).pow(2).sum((1, 2)) / tau).log_softmax(0)
                        for a in (x_theta, old))
                    rho = (log_pi - log_pi_old).exp()                           # Eq. 10
                    ratios.append(rho.detach())
                    cut = rho.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
                    J = torch.minimum(A * rho, A * cut).sum()                   # Eq. 9
                    (-tau * J / (len(groups) * b * len(steps))).backward()
        norms.append(sum(w.grad.pow(2).sum() for w in model.trained()).sqrt())
        for w in model.trained():
            w.grad *= min(1, train.MAX_GRAD_NORM / norms[-1])
        opt.step()
        opt.zero_grad()
        average = cfg.ema * average + (1 - cfg.ema) * model.weights()
    return average, norms, torch.stack(ratios)


@pytest.mark.parametrize("solver, old_anchor, tau", [
    ("ddim", "replay", "3"), ("dpmpp_2m", "replay", "dim"), ("dpmpp_2m", "rollout", "3")])
def test_an_iteration_of_train_is_algorithm_1_in_plain_loops(
        tmp_path, monkeypatch, solver, old_anchor, tau):
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.005)
    model, double = Prompted(), Prompted()
    double.transformer.double()
    (tmp_path / "other.txt").write_text("d\n", encoding="utf-8")        # is not trained on
    books = stub_run(tmp_path, model, solver=solver, old_anchor=old_anchor, tau=tau, sigma=0.6,
                     p=0.7, clip_eps=5e-4, shift=2.0, prompts_per_iteration=2,
                     updates_per_iteration=2, ema=0.8, reward_weights="3,1",
                     eval_prompts=str(tmp_path / "other.txt"))
    scorers = dict(brightness=brightness, match=match)
    train.train(books.cfg, model, scorers, books)
    average, norms, ratios = algorithm_1_in_plain_loops(
        books.cfg, double, scorers.values(), (0.75, 0.25))
    assert_close(model.weights().double(), double.weights(), rtol=0, atol=1e-5)
    assert_close(torch.cat([w.flatten() for w in books.ema]).double(), average, rtol=0, atol=1e-5)
    assert_close(torch.stack(books.norms).double(), torch.stack(norms), rtol=1e-3, atol=0)
    clipped = ((ratios - 1).abs() > 5e-4).double().mean().item()
    assert books.lines()[0]["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert max(norms) > 0.005 and 0.05 < clipped < 0.95         # both clips have an effect


def test_an_update_with_a_reward_that_is_not_finite_is_skipped_and_the_next_one_is_made(
        tmp_path, capsys):
    def broken(images, prompts):                                # for one picture of prompt "c"
        r = brightness(images, prompts)
        if "c" in prompts:
            r[prompts.index("c") + 3] = torch.nan
        return r

    model, start = Stub(), Stub().weights()
    prompts = train.draw(train.Config(prompts_per_iteration=3), 0, ["a", "b", "c"], (4, 3))[0]
    assert prompts.index("c") > 0
    line, = train_stub(tmp_path, model, broken, prompts_per_iteration=3)
    assert line["skipped"] == 1 and line["flat_groups"] == 0
    assert math.isfinite(line["reward"]) and line["grad_norm"] is None
    assert torch.equal(model.weights(), start)
    assert capsys.readouterr().out.count("a reward for 'c' is not finite") == 1
    lines = train_stub(tmp_path, model, broken, iterations=3)           # one prompt each
    assert sorted(line["skipped"] for line in lines) == [0, 0, 1]
    assert model.weights().isfinite().all() and not torch.equal(model.weights(), start)


@pytest.mark.parametrize("gradient", [math.nan, 1e30])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights_and_max_skips_of_them_end_the_run(
        tmp_path, gradient, monkeypatch):
    monkeypatch.setattr(run, "MAX_SKIPS", 5)
    model = Stub()
    for w in model.trained():
        w.register_hook(lambda g: torch.full_like(g, gradient))
    lines = train_stub(tmp_path, model, iterations=2, updates_per_iteration=2)
    assert [line["skipped"] for line in lines] == [2, 2]
    assert torch.equal(model.weights(), Stub().weights())
    sentence = "iteration 3: 5 updates in a row had no finite gradient; .*no checkpoint was written"
    with pytest.raises(ArithmeticError, match=sentence):
        train_stub(tmp_path, model, iterations=3, updates_per_iteration=2)


def test_groups_of_equal_rewards_are_counted_and_change_no_weights_even_by_momentum(tmp_path):
    seen = []

    def flat_after_the_first(images, prompts):
        seen.append(1)
        return brightness(images, prompts) if len(seen) == 1 else torch.full((len(images),), 3.7)

    once, thrice = Stub(), Stub()
    train_stub(tmp_path, once)
    lines = train_stub(tmp_path, thrice, flat_after_the_first, iterations=3)
    assert [line["flat_groups"] for line in lines] == [0, 1, 1]
    assert torch.equal(once.weights(), thrice.weights())
    around_its_mean = lambda images, prompts: torch.tensor([1.0, 2.0, 3.0])
    line, = train_stub(tmp_path, Stub(), around_its_mean, group_size=3, num_anchors=1)
    assert line["flat_groups"] == 0


def test_every_prompt_is_drawn_once_before_any_is_drawn_twice():
    cfg, seven = train.Config(prompts_per_iteration=2), [str(i) for i in range(7)]
    order = [prompt for it in range(7) for prompt in train.draw(cfg, it, seven, (4, 3))[0]]
    assert sorted(order[:7]) == sorted(order[7:]) == seven and order[:7] != order[7:]


def test_anchors_are_any_b_of_the_g_candidates_and_steps_any_k_except_the_last():
    draws = [train.draw(train.Config(), it, ["a"], (4, 3)) for it in range(50)]
    assert all(len(set(anchors[0].tolist())) == 4 for *_, anchors, _ in draws)
    assert {j for *_, anchors, _ in draws for j in anchors[0].tolist()} == set(range(G))
    assert all(len(set(steps)) == 4 and steps == sorted(steps) for *_, steps in draws)
    assert {k for *_, steps in draws for k in steps} == set(range(7))   # of 8


def test_the_same_seed_draws_the_same_numbers_in_every_version():
    cfg = train.Config(prompts_per_iteration=2, group_size=3, num_anchors=2, num_train_steps=3,
                       seed=3)
    prompts, eps_star, delta, anchors, steps = train.draw(cfg, 4, list("abcdefg"), (1, 2))
    assert prompts == ["e", "b"] and anchors.tolist() == [[0, 2], [0, 2]] and steps == [1, 2, 3]
    expected = torch.tensor([0.7616, -1.1429, -0.5906, -0.1734])
    assert_close(eps_star.flatten(), expected, rtol=0, atol=1e-4)
    expected = torch.tensor([1.9455, 0.3633, -1.2366, 0.7215, -0.4754, -1.3312,
                             -0.7902, 0.3677, -1.9012, 0.3252, 1.3377, -0.2597])
    assert_close(delta.flatten(), expected, rtol=0, atol=1e-4)


def test_the_default_settings_are_the_published_ones(tmp_path):
    c = train.Config()
    assert (c.group_size, c.sigma, c.p, c.clip_eps) == (12, 0.3, 0.8, 1e-4)
    assert (c.iterations, c.lr, train.MAX_GRAD_NORM) == (300, 1e-5, 1.0)
    assert stub_run(tmp_path, Stub()).opt.defaults["weight_decay"] == 1e-4
    assert (c.resolution, c.guidance, c.shift) == ("", "", 0)         # the model's own
    assert (c.tau, c.old_anchor, c.updates_per_iteration) == ("dim", "replay", 2)       # ours
    table_3 = {name: [row.get(key, getattr(c, key)) for key in (
        "solver", "num_rollout_steps", "num_anchors", "num_train_steps")]
        for name, row in train.PRESETS.items() if name != "tiny"}
    assert table_3 == dict(ddim25=["ddim", 25, 12, 4], dpm16=["dpmpp_2m", 16, 4, 9],
                           dpm8=["dpmpp_2m", 8, 4, 4])


# ======================================================================== several processes

def test_a_draw_depends_on_the_seed_the_iteration_and_the_group_but_not_on_who_draws_it():
    def draw(it, rank, world, seed=0):
        cfg = train.Config(prompts_per_iteration=4, seed=seed)
        return train.draw(cfg, it, [str(i) for i in range(99)], (4, 3), rank=rank, world=world)

    whole, parts = draw(5, 0, 1), [draw(5, rank, 4) for rank in range(4)]
    assert sum((part[0] for part in parts), []) == whole[0] and len(set(whole[0])) == 4
    for i in (1, 2, 3):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    assert all(part[4] == whole[4] for part in parts)           # all groups share the steps
    for other in (draw(6, 0, 4), draw(5, 1, 4), draw(5, 0, 4, seed=1)):
        assert other[0] != parts[0][0]
        assert not any(torch.equal(other[i], parts[0][i]) for i in (1, 2, 3))
    assert whole[4] not in (draw(6, 0, 1)[4], draw(5, 0, 1, seed=1)[4])


def test_log_lines_of_processes_are_merged_key_by_key():
    nan = float("nan")
    lines = [dict(iter=3, reward=torch.tensor([[1.0, 3.0], [nan, nan]]), flat_groups=1, skipped=1,
                  first_ratio=0.1, seconds_rollout=2.0, nfe_old=8, clip_fraction=None),
             dict(iter=3, reward=torch.tensor([[5.0, 5.0], [5.0, 5.0]]), flat_groups=2, skipped=0,
                  first_ratio=0.3, seconds_rollout=1.0, nfe_old=8, clip_fraction=None)]
    assert merge(lines) == dict(iter=3, reward=4.0, flat_groups=3, skipped=1, first_ratio=0.3,
                                seconds_rollout=2.0, nfe_old=8, clip_fraction=None)


def test_a_launcher_need_only_set_the_rank_and_the_world_size(monkeypatch):
    joined = []
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "WORLD", 2)
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *a, **k: joined.append((a, k)))
    machine.init_processes()
    (backend, settings), = joined
    assert "gloo" in backend[0] and list(settings) == ["timeout"]       # the rest: env


@pytest.mark.parametrize("given, rank", [("1", 0), ("gold", 0), ("1 2", 1)])
def test_a_rank_without_a_world_size_is_not_ours(given, rank, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(("RANK", "WORLD_SIZE"), given.split()):
        monkeypatch.setenv(name, value)
    assert runpy.run_path(machine.__file__)["RANK"] == rank


CASES = {"ddp": [], "fsdp2": ["--fsdp"], "sigterm": ["--iterations", "1000"],
         "ddp-few-at-a-time": ["--batch", "3"],
         "fsdp2-one-at-a-time": ["--fsdp", "--batch", "1"]}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if "at-a-time" in name]


def run_cases(names, folder, five):
    """The work of each of torchrun's processes: one run after another."""
    score, scored = train.score, []

    def terminated(*args):              # SIGTERM to process 1 while its second iteration is scored
        scored.append(1)
        if len(scored) == 2:
            signal.raise_signal(signal.SIGTERM)
        return score(*args)

    for name in names:
        train.score = terminated if name == "sigterm" and RANK == 1 else score
        print(f"case {name}\n" * (RANK == 0), end="", flush=True)
        assert train.main([*SHORT, *five, "--iterations", "2", *CASES[name],
                           "--out_dir", f"{folder}/{name}"]) is None
    exit_process(0)


def torchrun(*command, processes=2, restarts=0):
    """The arguments of subprocess that start several processes on the CPU."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc_per_node", str(processes), "--max-restarts", str(restarts)]
    return dict(args=[*agent, *command], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="session")
def pair(request, tmp_path_factory, five):
    """Two processes are started once for several runs, because their start takes longest -> the
    folder, and {case: its output}."""
    folder = tmp_path_factory.mktemp("pair")
    names = [name for name in CASES if request.config.getoption("slow") or "-" not in name]
    command = torchrun("-m", "tests.test_train", "--cases", ",".join(names), str(folder), *five)
    done = subprocess.run(**command, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder, dict(part.split("\n", 1) for part in done.stdout.split("case ")[1:])


def check_equal(ours, theirs, last=4, close=1e-4):
    """Check that two runs are equal up to rounding. If one of 64 x 64 pixels rounds to the other of
    two bytes, the score of its picture changes by 1e-4, and the mean of an iteration's eight
    pictures by 1e-5. This may happen to a few pixels, and with other batches to many."""
    for a, b in zip(iterations_of(ours), iterations_of(theirs)[:last], strict=True):
        assert a["iter"] == b["iter"]
        assert a["reward"] == pytest.approx(b["reward"], abs=close)
        assert a["reward_std"] == pytest.approx(b["reward_std"], abs=close)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2) and a["first_ratio"] < 1e-5
    folders = FLUX, ours / f"checkpoint-{last}", theirs / f"checkpoint-{last}"
    states = (FluxPipeline.from_pretrained(path).transformer.state_dict() for path in folders)
    start, a, b = (torch.cat([w.flatten() for w in state.values()]) for state in states)
    assert (a - b).norm() < 0.03 * (b - start).norm()


@pytest.mark.parametrize("case", ["ddp", "fsdp2", *SLOW])
def test_two_processes_make_the_same_run_as_one(case, alone, pair):
    folder, printed = pair
    kind = "FSDP2" if "fsdp" in case else "a copy each"
    assert f"2 processes ({kind}) with 1 groups each" in printed[case]
    assert printed[case].count("iter 002/2") == 1
    check_equal(folder / case, alone, last=2, close=1e-3 if "at-a-time" in case else 1e-4)
    ours, theirs = ([line for line in lines_of(out) if "eval_preference" in line]
                    for out in (folder / case, alone))
    assert [line["iter"] for line in ours] == [0, 2]
    for a, b in zip(ours, theirs):                              # five pictures, in other batches
        assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-3)


def test_a_run_of_two_processes_can_be_resumed_by_one_and_ends_with_the_same_weights(
        pair, alone, five, tmp_path):
    shutil.copytree(pair[0] / "fsdp2", tmp_path, dirs_exist_ok=True)
    command = [*SHORT, *five, "--iterations", "4", "--out_dir", str(tmp_path), "--resume"]
    assert train.main(command) is None
    check_equal(tmp_path, alone)


def test_sigterm_to_one_process_ends_all_after_the_same_iteration_with_a_checkpoint(pair):
    out = pair[0] / "sigterm"
    assert max(line["iter"] for line in lines_of(out)) == 2
    assert checkpoints(out)[-1] == out / "checkpoint-2"


# ======================================================================== averages of weights

def test_checkpoints_have_the_average_of_the_weights_which_training_does_not_use(tmp_path):
    saved, rewards = {}, {}
    for ema in (0.0, 0.5):
        books = stub_run(tmp_path, Saved(), ema=ema, iterations=4, save_every=1)
        train.train(books.cfg, books.model, dict(brightness=brightness), books)
        books.finish()
        saved[ema] = [torch.load(path / "weights.pt") for path in checkpoints(books.out)]
        rewards[ema] = [line["reward"] for line in books.lines()]
    mean = Stub().weights()
    for raw, averaged in zip(saved[0.0], saved[0.5], strict=True):
        mean = 0.5 * mean + 0.5 * raw
        assert_close(averaged, mean, rtol=0, atol=1e-7)
    assert len(saved[0.5]) == 4 and rewards[0.5] == rewards[0.0]


def test_an_evaluation_uses_the_average_and_restores_the_weights_even_if_it_fails(
        tmp_path, monkeypatch):
    seen = []

    def evaluated(model, *_, **__):
        seen.append(model.weights())
        raise KeyError

    monkeypatch.setattr(run, "evaluate", evaluated)
    books = stub_run(tmp_path, Stub(), ema=0.5, iterations=2)
    train.train(books.cfg, books.model, dict(brightness=brightness), books)
    raw, average = books.model.weights(), torch.cat([w.flatten() for w in books.ema])
    with pytest.raises(KeyError):
        books.evaluate()
    assert torch.equal(seen[0], average) and not torch.equal(average, raw)
    assert torch.equal(books.model.weights(), raw)


# ======================================================================== weights

def test_adamw_rounds_the_papers_steps_away_in_pure_bf16_but_not_in_float32():
    """The weights have the size of a transformer's, and lr is 1e-5. The next bf16 numbers beside
    0.03 are 1e-4 away."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        w = (0.03 * torch.randn(10_000)).bfloat16().to(dtype).requires_grad_()
        start, opt = w.detach().clone(), torch.optim.AdamW([w], lr=1e-5, weight_decay=1e-4)
        for _ in range(20):
            w.grad = torch.ones_like(w)
            opt.step()
        moved[dtype] = (start - w.detach()).float()
    twenty_steps = torch.full((10_000,), 20 * 1e-5)
    assert_close(moved[torch.float32], twenty_steps, rtol=0.01, atol=0)
    assert (moved[torch.bfloat16] == 0).float().mean() > 0.8


# ======================================================================== kills

def train_py(out, *more, restarts=0):
    return torchrun("train.py", *SHORT, "--out_dir", str(out), *more, "--resume", restarts=restarts)


def processes_of(agent):
    """The process ids of the training processes that torchrun has started."""
    with psutil.Process(agent.pid).oneshot():
        children = psutil.Process(agent.pid).children()
    return [child.pid for child in children if "train.py" in child.cmdline()]


@pytest.mark.slow
def test_a_killed_process_restarts_the_run_from_its_last_checkpoint(alone, five, tmp_path):
    """The same command restarts it. The folder has leftovers of a run without a checkpoint."""
    (tmp_path / "log.jsonl").write_text('{"iter": 1, "reward": 7}\n', encoding="utf-8")
    more = [*five, "--iterations", "2", "--save_every", "1"]
    agent = subprocess.Popen(**train_py(tmp_path, *more, restarts=1))
    while not (tmp_path / "checkpoint-1").exists() and agent.poll() is None:
        time.sleep(0.001)
    os.kill(processes_of(agent)[-1], signal.SIGKILL)
    lines = agent.communicate(timeout=120)[0].splitlines()
    assert agent.returncode == 0, lines[-50:]
    first, second = (line for line in lines if line.startswith("run  "))
    assert "iterations 1 to 2" in first and "iterations 2 to 2" in second
    begun, continued = (line for line in lines if line.startswith("resume  "))
    assert "so the run begins" in begun and "continues from" in continued
    check_equal(tmp_path, alone, last=2)


def kill_until_done(out, iterations, kills, in_saves=False):
    """Start torchrun with restarts, and kill -9 one of its two processes at random moments, or at
    random moments of saves. Returns the number of kills."""
    rng, killed = random.Random(0), 0
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        command = train_py(out, "--iterations", str(iterations), "--save_every", "1",
                           restarts=kills + 1)
        agent = subprocess.Popen(**{**command, "stdout": log})
        while agent.poll() is None:
            if killed < kills and in_saves:
                while not (out / "checkpoint.new").exists() and agent.poll() is None:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.4))
            else:                                               # a start takes about 7 seconds
                time.sleep(rng.uniform(3, 15) if killed < kills else 0.5)
            if killed < kills and agent.poll() is None and (found := processes_of(agent)):
                os.kill(rng.choice(found), signal.SIGKILL)
                killed += 1
                if in_saves:
                    time.sleep(2)                               # torchrun ends the other process
                    check_loads(out)
    said = Path(f"{out}.log").read_text(encoding="utf-8")
    assert agent.returncode == 0, said[-3000:]
    return killed


def compare_with_a_quiet_run(folder, args):
    done = subprocess.run(**train_py(folder / "quiet", "--iterations", str(args.iterations)))
    assert done.returncode == 0, done.stdout[-3000:]
    killed = kill_until_done(folder / "killed", args.iterations, args.kills, args.in_saves)
    quiet, loud = ([line["reward"] for line in lines_of(folder / name)]
                   for name in ("quiet", "killed"))
    check_loads(folder / "killed")
    print(f"killed {killed} times{' during saves' * args.in_saves}; {len(loud)} of "
          f"{args.iterations} iterations in the log; rewards equal: {quiet == loud}; "
          f"{len(checkpoints(folder / 'killed'))} checkpoints, all load")
    return quiet != loud


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--in_saves", action="store_true",
                        help="kill only while a checkpoint is being written")
    parser.add_argument("--cases", nargs=2, help=argparse.SUPPRESS)      # `pair` calls this
    args, five = parser.parse_known_args()
    if args.cases:
        run_cases(args.cases[0].split(","), args.cases[1], five)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare_with_a_quiet_run(Path(folder), args))
