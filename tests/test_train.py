"""
train.py on several processes, with adapters, interrupted and killed. One test per sentence.

    python -m pytest -q test_train.py       # two processes on the CPU (gloo), the small world
    python test_train.py --kills 20         # kill -9 of a random process at a random moment, again and again, then compare; some minutes
    python test_train.py --kills 20 --in_saves                               # the same, while checkpoints are being written
    python test_train.py --flux_dev         # FLUX.1-dev's published shapes with one layer of each kind: some minutes, 16 GB of memory, 12 GB of disk
"""
import argparse, importlib.machinery, json, math, os, random, resource, shutil, signal, subprocess, sys, tempfile, time, types
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
import cpu_torchvision                                                     # noqa: F401  (before diffusers)
import diffusers
from diffusers import FluxPipeline
import train
from model import Flux
from solvers import rollout, schedule

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")      # one process writes its checkpoint alone
HERE = Path(__file__).resolve().parent
FLUX = HERE / "tiny/flux"
SHORT = ("--prompts_per_iteration 2 --group_size 4 --num_anchors 2 --num_rollout_steps 3 --num_train_steps 2 --updates_per_iteration 1 --eval_every 0 --save_every 2 "
         "--threads 1 --eval_scorers").split() + [""]


def torchrun(out, *more, processes=2, restarts=0):
    """The command line of a short run on the CPU, and the environment it wants."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--max-restarts", str(restarts), "--standalone",
               "train.py", *SHORT, "--out_dir", str(out), *more]
    return dict(args=command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*args, **kwargs):
    done = subprocess.run(**torchrun(*args, **kwargs), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def lines_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights_of(out, iteration):
    return FluxPipeline.from_pretrained(Path(out) / f"checkpoint-{iteration}").transformer.state_dict()


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Evaluations on five prompts, which do not divide among two processes."""
    path = tmp_path_factory.mktemp("prompts") / "five.txt"
    path.write_text("a red apple\nan octopus\na dog\na red car\nthe moon\n")
    return ["--eval_prompts", str(path), "--eval_every", "4"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, five):
    """Four iterations in one process, and one checkpoint half way."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train.main([*SHORT, *five, "--iterations", "4", "--out_dir", str(out)]) is None
    return out


def moved(out, iteration, a=FLUX):
    """How far the weights of a checkpoint lie from others."""
    a, b = (FluxPipeline.from_pretrained(path).transformer.state_dict() for path in (a, Path(out) / f"checkpoint-{iteration}"))
    return max((a[name] - b[name]).abs().max().item() for name in b)


# ================================================================================================ several processes

@pytest.mark.parametrize("how, close", [([], 1e-5), (["--fsdp", "--batch", "1"], 1e-3), (["--batch", "3"], 1e-3), (["--fsdp"], 1e-5), (["--fsdp", "--gather"], 1e-5)],
                         ids=["ddp", "fsdp2-one-at-a-time", "ddp-few-at-a-time", "fsdp2", "fsdp2-gathered"])
def test_two_processes_make_the_run_of_one(how, close, alone, five, tmp_path):    # in batches of another size, now and then a pixel rounds the other way
    printed = run(tmp_path / "run", "--iterations", "4", *five, *how)
    assert f"2 processes ({'FSDP2' if '--fsdp' in how else 'DDP'}) with 1 groups each" in printed and printed.count("iter 004/4") == 1
    evaluated = 0
    for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(alone), strict=True):
        assert ours["iter"] == theirs["iter"]
        if "eval_clip" in ours:
            evaluated += 1
            assert [ours[key] for key in ours] == pytest.approx([theirs[key] for key in ours], abs=1e-3)        # five pictures in other batches
            continue
        close = close if ours["iter"] <= 2 else 10 * close                    # then weights differ by rounding too
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=close) and ours["reward_std"] == pytest.approx(theirs["reward_std"], abs=close)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2) and ours["first_ratio"] < 1e-5
    assert evaluated == 2 and moved(tmp_path / "run", 4, alone / "checkpoint-4") < 1e-4 and moved(tmp_path / "run", 4) > 1.5e-4


def test_a_run_of_two_processes_is_resumed_by_one_and_ends_where_it_would_have(alone, five, tmp_path):
    run(tmp_path / "run", "--iterations", "2", *five, "--fsdp")
    assert train.main([*SHORT, *five, "--iterations", "4", "--out_dir", str(tmp_path / "run"), "--resume"]) is None
    for i, (ours, theirs) in enumerate(zip(*[[line for line in lines_of(out) if "reward" in line] for out in (tmp_path / "run", alone)], strict=True)):
        assert ours["iter"] == theirs["iter"] == i + 1 and ours["reward"] == pytest.approx(theirs["reward"], abs=1e-4)
    assert moved(tmp_path / "run", 4, alone / "checkpoint-4") < 1e-4


def test_what_is_drawn_for_a_group_does_not_depend_on_the_number_of_processes():
    cfg, prompts = train.Config(prompts_per_iteration=4), [str(i) for i in range(7)]
    whole = train.draw(cfg, 5, prompts, (4, 3), rank=0, world=1)
    halves = [train.draw(cfg, 5, prompts, (4, 3), rank=rank, world=2) for rank in (0, 1)]
    assert halves[0][0] + halves[1][0] == whole[0] and halves[0][4] == halves[1][4] == whole[4]
    assert all(torch.equal(torch.cat([a, b]), c) for a, b, c in zip(halves[0][1:4], halves[1][1:4], whole[1:4]))


def test_groups_that_do_not_divide_among_the_processes_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(SystemExit) as exit:
        train.parse_config(["--prompts_per_iteration", "3", "--out_dir", str(tmp_path / "run")])
    assert exit.value.code == 2 and "prompts_per_iteration is 3, but must be divisible among 2 processes" in capsys.readouterr().err
    monkeypatch.setattr(train, "WORLD", 8)
    (tmp_path / "p.txt").write_text("a\n")
    cfg = train.parse_config(["--preset", "dpm8", "--model", str(FLUX), "--prompts", str(tmp_path / "p.txt"), "--out_dir", str(tmp_path / "run"), "--rewards", "jpeg"])
    assert cfg.prompts_per_iteration == 8                                     # one each, as in the paper


def test_log_lines_of_processes_are_merged_by_what_they_count():
    nan = float("nan")
    lines = [dict(iter=3, reward=torch.tensor([[1.0, 3.0], [nan, nan]]), flat_groups=1, skipped=1, first_ratio=0.1, seconds_rollout=2.0, nfe_old=8),
             dict(iter=3, reward=torch.tensor([[5.0, 5.0], [5.0, 5.0]]), flat_groups=2, skipped=0, first_ratio=0.3, seconds_rollout=1.0, nfe_old=8)]
    assert train.merge(lines) == dict(iter=3, reward=4.0, flat_groups=3, skipped=1, first_ratio=0.3, seconds_rollout=2.0, nfe_old=8)


# ================================================================================================ weights

def test_adamw_in_pure_bf16_rounds_the_papers_steps_away_and_float32_masters_do_not():
    """lr 1e-5 on weights of a transformer's size: a bf16 number near 0.03 has neighbours 1e-4 away."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        w = (0.03 * torch.randn(10_000)).bfloat16().to(dtype).requires_grad_()
        start, opt = w.detach().clone(), torch.optim.AdamW([w], lr=1e-5, weight_decay=1e-4)
        for _ in range(20):
            w.grad = torch.ones_like(w)
            opt.step()
        moved[dtype] = (start - w.detach()).float()
    assert_close(moved[torch.float32], torch.full((10_000,), 2e-4), rtol=0.01, atol=0)                 # twenty steps of lr
    assert (moved[torch.bfloat16] == 0).float().mean() > 0.8


@torch.no_grad()
def test_lora_trains_adapters_alone_begins_at_the_base_and_is_loaded_by_diffusers(tmp_path):
    base, out = Flux(FLUX, 64), tmp_path / "run"
    x, cond = torch.randn(2, *base.latent_shape), base.encode(["a red apple", "an octopus"])
    model = Flux(FLUX, 64, lora_rank=4)
    assert torch.equal(model.velocity(x, 0.5, cond), base.velocity(x, 0.5, cond))
    assert sum(w.numel() for w in model.trained()) < 0.02 * sum(w.numel() for w in base.trained())
    with torch.enable_grad():
        train.main([*SHORT, "--iterations", "2", "--lora_rank", "4", "--lr", "1e-2", "--out_dir", str(out)])
    pipe = FluxPipeline.from_pretrained(FLUX)
    pipe.load_lora_weights(out / "checkpoint-2")
    model = Flux(FLUX, 64, lora_rank=4)                                       # the same weights, from the sharded state
    cfg = train.parse_config([*SHORT, "--iterations", "3", "--lora_rank", "4", "--lr", "1e-2", "--out_dir", str(out), "--resume"])
    assert train.Run(cfg, model, {}).iteration == 2
    config, = pipe.transformer.peft_config.values()
    assert config.r == 4 and config.lora_alpha == 8
    velocity = pipe.transformer(hidden_states=x, timestep=torch.full((2,), 0.5), guidance=torch.full((2,), 3.5), encoder_hidden_states=cond["txt"], pooled_projections=cond["vec"],
                                img_ids=base.img_ids, txt_ids=torch.zeros(16, 3), return_dict=False)[0]
    assert_close(velocity, model.velocity(x, 0.5, cond), rtol=0, atol=1e-5)
    assert (velocity - base.velocity(x, 0.5, cond)).abs().max() > 1e-3
    frozen = Flux(FLUX, 64, frozen=True, lora=str(out / "checkpoint-2"))
    assert_close(frozen.velocity(x, 0.5, cond), velocity, rtol=0, atol=1e-5)


def test_a_lora_run_that_was_interrupted_ends_bit_equal(tmp_path):
    lora = [*SHORT, "--lora_rank", "4", "--lr", "1e-3", "--ema", "0.5"]
    train.main([*lora, "--iterations", "4", "--out_dir", str(tmp_path / "once")])
    train.main([*lora, "--iterations", "2", "--out_dir", str(tmp_path / "twice")])
    train.main([*lora, "--iterations", "4", "--out_dir", str(tmp_path / "twice"), "--resume"])
    a, b = (load_file(tmp_path / name / "checkpoint-4/pytorch_lora_weights.safetensors") for name in ("once", "twice"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_of_weights_is_what_is_saved_and_the_weights_themselves_go_on(tmp_path, alone):
    train.main([*SHORT, "--iterations", "4", "--ema", "0.5", "--save_every", "1", "--updates_per_iteration", "1", "--out_dir", str(tmp_path / "ema")])
    train.main([*SHORT, "--iterations", "4", "--save_every", "1", "--updates_per_iteration", "1", "--out_dir", str(tmp_path / "raw")])
    mean = Flux(FLUX, 64).transformer.state_dict()
    for i in range(1, 5):
        raw, saved = weights_of(tmp_path / "raw", i), weights_of(tmp_path / "ema", i)
        for name in mean:
            mean[name] = 0.5 * mean[name] + 0.5 * raw[name]
            assert_close(saved[name], mean[name], rtol=0, atol=1e-7)
    assert [line["reward"] for line in lines_of(tmp_path / "ema")] == [line["reward"] for line in lines_of(tmp_path / "raw")]


def test_the_average_of_weights_is_what_is_evaluated_and_is_taken_out_again_even_if_that_fails(tmp_path, five):
    out, slow = tmp_path / "run", [*SHORT, *five, "--lr", "3e-4", "--ema", "0.9999999", "--iterations", "4"]
    assert train.main([*slow, "--out_dir", str(out)]) is None
    assert abs(lines_of(out)[-1]["eval_clip_gain"]) < 1e-4                    # an average that has hardly begun to move
    assert train.main([*slow, "--ema", "0", "--out_dir", str(tmp_path / "raw")]) is None
    assert abs(lines_of(tmp_path / "raw")[-1]["eval_clip_gain"]) > 1e-3       # of weights that have
    cfg = train.parse_config([*slow, "--out_dir", str(tmp_path / "new")])
    model = Flux(FLUX, 64)
    books = train.Run(cfg, model, {})
    books.put([w + 1 for w in model.trained()])
    raw = [w.detach().clone() for w in model.trained()]
    with pytest.raises(KeyError), books.averaged():
        assert all(torch.equal(w, e) for w, e in zip(model.trained(), books.ema)) and not torch.equal(model.trained()[0], raw[0])
        raise KeyError
    assert all(torch.equal(w, r) for w, r in zip(model.trained(), raw))


def test_a_network_that_is_called_with_few_latents_at_a_time_gives_the_same_numbers_and_gradients():
    whole, parts = Flux(FLUX, 64), Flux(FLUX, 64, batch=3)
    x, cond, grads = torch.randn(8, *whole.latent_shape), whole.encode(["a red apple", "an octopus"]), []
    sizes, net = [], parts.net
    parts.net = lambda **inputs: sizes.append(len(inputs["hidden_states"])) or net(**inputs)
    for model in (whole, parts):
        v = model.velocity(x, 0.5, cond)
        v.pow(2).sum().backward()
        grads.append([v.detach(), model.decode(x)] + [w.grad for w in model.trained()])
    assert sizes == [3, 3, 2]
    for a, b in zip(*grads):
        assert_close(a, b, rtol=0, atol=1e-5 * max(1, float(a.abs().max())))


def test_many_pictures_are_the_pictures_of_each_latent_in_order_sixteen_at_a_time_at_most():
    model, sizes = Flux(FLUX, 64, frozen=True), []
    x, decode = torch.randn(35, *model.latent_shape), model.pipe.vae.decode
    alone = torch.cat([model.decode(row[None]) for row in x])
    model.pipe.vae.decode = lambda z, **more: sizes.append(len(z)) or decode(z, **more)
    assert_close(model.decode(x), alone, rtol=0, atol=1e-5)
    assert sizes == [16, 16, 3]


def test_text_encoders_say_the_same_wherever_they_live():
    a, b = Flux(FLUX, 64).encode(["a red apple"]), Flux(FLUX, 64, text_device="offload").encode(["a red apple"])
    assert torch.equal(a["txt"], b["txt"]) and torch.equal(a["vec"], b["vec"])


# ================================================================================================ what long runs meet

def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train.main([*SHORT, "--iterations", "4", "--save_every", "1", "--keep", "2", "--out_dir", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


def test_what_is_deleted_is_renamed_first(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3/state").mkdir(parents=True)
    (tmp_path / "checkpoint-3/state/state.pt").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or pytest.fail("killed") if (path / "state").exists() else None)
    with pytest.raises(pytest.fail.Exception, match="killed"):
        train.discard(tmp_path / "checkpoint-3")
    assert train.checkpoints(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    books = train.Run(train.parse_config([*SHORT, "--out_dir", str(tmp_path / "run")]), Flux(FLUX, 64), {})
    books.iteration, books.model.trained()[5].data.view(-1)[0] = 1, float("inf")
    with pytest.raises(ArithmeticError, match="weights are no longer finite, so nothing is saved"):
        books.save()
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_sigterm_to_any_process_ends_all_after_the_same_iteration_with_a_checkpoint(tmp_path):
    process = subprocess.Popen(**torchrun(tmp_path / "run", "--iterations", "1000"))
    for line in process.stdout:
        if line.startswith("iter 003"):
            children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    done = max(line["iter"] for line in lines_of(tmp_path / "run"))
    assert process.returncode == 0, rest[-3000:]
    assert 3 <= done < 1000 and (tmp_path / f"run/checkpoint-{done}/state/state.pt").is_file()


def test_a_killed_process_restarts_the_run_from_its_last_checkpoint(alone, five, tmp_path):
    process = subprocess.Popen(**torchrun(tmp_path / "run", *five, "--iterations", "4", "--save_every", "1", restarts=1))
    while not (tmp_path / "run/checkpoint-1").exists() and process.poll() is None:
        time.sleep(0.001)
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    lines = process.communicate(timeout=120)[0].splitlines()
    first, second = (line for line in lines if line.startswith("run  "))
    assert process.returncode == 0 and "iterations 1 to 4" in first and any(f"iterations {i} to 4" in second for i in (2, 3, 4)), lines
    for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(alone), strict=True):
        assert ours["iter"] == theirs["iter"] and ours.get("reward", 0) == pytest.approx(theirs.get("reward", 0), abs=1e-4)


def test_weights_that_are_kept_gathered_are_let_go_after_an_evaluation_of_their_average(alone, five, tmp_path):
    out = tmp_path / "run"
    run(out, "--iterations", "4", *five, "--fsdp", "--gather", "--ema", "0.9999999", "--eval_every", "2")
    for ours, theirs in zip(*[[line for line in lines_of(path) if "reward" in line] for path in (out, alone)], strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-4) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    assert moved(out, 4) < 1e-6


def as_a_restart(monkeypatch, out, ended=""):
    monkeypatch.setattr(train, "RESTARTS", 1)
    if out.exists():
        assert json.loads((out / "launch.json").read_text()) == dict(agents=[train.AGENT], ended=ended)


def test_a_restart_goes_on_where_the_run_was_and_never_touches_one_that_somebody_else_began(alone, five, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    command = [*SHORT, *five, "--iterations", "5", "--out_dir", str(out)]
    as_a_restart(monkeypatch, out)
    assert train.parse_config(command).resume                                 # ours, and it has a checkpoint
    shutil.rmtree(out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-4")
    assert train.parse_config(command).overwrite                              # ours, and it has none yet
    monkeypatch.setattr(train, "AGENT", "another 1")
    with pytest.raises(SystemExit):
        train.parse_config(command)
    assert "already holds a run" in capsys.readouterr().err and (out / "log.jsonl").is_file()


def test_a_run_that_ended_by_its_own_fault_is_not_started_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(Flux, "velocity", lambda self, x, t, cond: x * float("nan"))
    command = [*SHORT, "--iterations", "1", "--out_dir", str(out)]
    assert train.main(command) == 1
    sentence, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    as_a_restart(monkeypatch, out, sentence)
    with pytest.raises(SystemExit) as exit:
        train.main(command)
    assert exit.value.code.startswith(sentence) and "is not started again" in exit.value.code


@pytest.mark.parametrize("damage", ["state/state.pt", "state/config.json", "state/sharded/.metadata", "state/sharded/__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_what_to_do_about_it(damage, alone, five, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    os.truncate(out / "checkpoint-4" / damage, 10)
    command = [*SHORT, *five, "--iterations", "5", "--out_dir", str(out), "--resume"]
    try:
        assert train.main(command) == 1
    except SystemExit as exit:
        assert exit.code == 2
    assert "checkpoint-4 is broken" in (said := capsys.readouterr().err) and "--resume goes on from the checkpoint before it" in said
    shutil.move(out / "checkpoint-4", tmp_path)
    with open(out / "log.jsonl", "ab") as log:                                # whatever a crash may leave
        log.write(b'{"iter": 3, "reward": 7}\n\nnull\n\xff\xfe\n{"iter": 4, "rew')
    assert train.main(command) is None
    assert [line["iter"] for line in lines_of(out) if "reward" in line] == [1, 2, 3, 4, 5] and lines_of(out)[3]["reward"] == lines_of(alone)[3]["reward"]


def test_a_checkpoint_that_cannot_be_written_whole_ends_the_run_and_leaves_what_was_saved(tmp_path, alone, five):
    """The disk is full: no file may grow beyond 8 MB, which the second checkpoint's weights would."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoint-4")
    before = {path: path.read_bytes() for path in (out / "checkpoint-2").rglob("*") if path.is_file()}
    command = torchrun(out, *five, "--iterations", "4", "--resume", processes=1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
    done = subprocess.run(**command, preexec_fn=limit, timeout=120)
    assert done.returncode == 1 and "checkpoint-4 could not be written" in done.stdout and "checkpoint-2 is whole, and --resume goes on from there" in done.stdout, done.stdout[-2000:]
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-2"]
    assert {path: path.read_bytes() for path in before} == before
    assert train.main([*SHORT, *five, "--iterations", "4", "--out_dir", str(out), "--resume"]) is None          # with room again
    assert lines_of(out)[-2]["reward"] == lines_of(alone)[-2]["reward"]


def test_running_out_of_memory_names_the_settings_that_take_less(tmp_path, monkeypatch, capsys):
    def velocity(self, x, t, cond):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(Flux, "velocity", velocity)
    assert train.main([*SHORT, "--iterations", "1", "--out_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "Tried to allocate 20 GiB" in said
    for setting in ("text_encoder_device", "checkpoint_blocks", "batch", "gather", "fsdp", "lora_rank", "resolution"):
        assert setting in said and setting in {field.name for field in train.fields(train.Config)}


def test_every_line_of_the_log_is_sent_to_whoever_watches(tmp_path, monkeypatch):
    seen = []
    board = types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))
    module = types.ModuleType("wandb")
    module.__spec__, module.init = importlib.machinery.ModuleSpec("wandb", None), lambda project, config, dir: seen.append((project, config["sigma"])) or board
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert train.main([*SHORT, "--iterations", "2", "--wandb", "neighbours", "--out_dir", str(tmp_path / "run")]) is None
    assert seen[0] == ("neighbours", 0.3)
    assert seen[1:] == [(line.pop("iter"), line) for line in lines_of(tmp_path / "run")]


def test_pictures_of_the_same_prompts_and_noise_are_written_at_every_evaluation(tmp_path):
    out = tmp_path / "run"
    assert train.main([*SHORT, "--eval_every", "1", "--iterations", "2", "--lr", "1e-12", "--out_dir", str(out), "--eval_scorers", "judge"]) is None
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    base, one, two = (np.array(Image.open(out / f"samples/{i:06d}.png")).astype(int) for i in range(3))
    height = 134                                                              # of a row, gap included
    assert np.array_equal(one[:128], two[:128]) and np.array_equal(one[:128, 84:], base[:128, 84:])    # the base, above
    assert np.abs(two[height : height + 128, 84:] - base[:128, 84:]).max() <= 2                        # weights that have not moved: the same pictures below
    evals = [line for line in lines_of(out) if "eval_clip" in line]
    assert [line["iter"] for line in evals] == [0, 1, 2] and all(abs(line["eval_judge_gain"]) < 1e-4 for line in evals)


def check_loads(out):
    """Every checkpoint that is there can be sampled from and resumed from."""
    for path in train.checkpoints(out):
        FluxPipeline.from_pretrained(path)
        assert torch.load(path / "state/state.pt")["iteration"] == int(path.name.removeprefix("checkpoint-"))
        reader = dcp.FileSystemReader(path / "state/sharded")
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
        dcp.load(state, storage_reader=reader)
        assert sum(name.startswith("weights.") for name in state) > 50


def test_a_process_killed_at_any_moment_of_a_save_never_leaves_a_checkpoint_that_does_not_load(tmp_path):
    cfg = train.parse_config([*SHORT, "--keep", "2", "--out_dir", str(tmp_path / "run")])
    run, died, took = train.Run(cfg, Flux(FLUX, 64), {}), 0, 1.0
    for attempt in range(13):
        run.iteration = 1 + attempt
        child = os.fork()
        if not child:
            run.save()
            os._exit(0)
        begun = time.perf_counter()
        if attempt:                                                           # the first one shows how long it takes
            time.sleep(took * attempt / 12)
            os.kill(child, signal.SIGKILL)
        died += os.waitpid(child, 0)[1] != 0
        took = took if attempt else time.perf_counter() - begun
        assert train.checkpoints(tmp_path / "run"), attempt
    check_loads(tmp_path / "run")
    assert died >= 6


def kill_until_done(out, iterations, kills, in_saves=False, seed=0):
    """torchrun with restarts; kill -9 one of its two processes at random moments, or at random moments of saves. Returns how many were killed."""
    rng, killed = random.Random(seed), 0
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(**{**torchrun(out, "--iterations", str(iterations), "--save_every", "1", restarts=kills + 1), "stdout": log})
        while process.poll() is None:
            if killed < kills and in_saves:
                while not (out / "checkpoint.new").exists() and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.4))
            else:
                time.sleep(rng.uniform(3, 15) if killed < kills else 0.5)            # starting takes some 7
            children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()
            if killed < kills and children:
                os.kill(int(rng.choice(children)), signal.SIGKILL)
                killed += 1
                if in_saves:
                    time.sleep(2)                                             # until torchrun has ended the other one
                    check_loads(out)
    assert process.returncode == 0, Path(f"{out}.log").read_text()[-3000:]
    return killed


# ================================================================================================ FLUX.1-dev's own shapes

def one_layer_flux_dev(path):
    """FLUX.1-dev's directory: every component configured as published but with one layer (of each kind), random weights in bf16, the transformer in shards.
    The tokenizers are the small world's, padding to the published lengths."""
    import diffusers, transformers
    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=1, num_attention_heads=12,
                                       max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2)
    t5 = transformers.T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64, feed_forward_proj="gated-gelu", dense_act_fn="gelu_new",
                               is_gated_act=True, is_encoder_decoder=True, tie_word_embeddings=False)
    transformer = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
                                                   joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
    vae = diffusers.AutoencoderKL(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=1024,
                                  block_out_channels=(128, 256, 512, 512), layers_per_block=2, act_fn="silu", latent_channels=16, norm_num_groups=32, scaling_factor=0.3611,
                                  shift_factor=0.1159, force_upcast=True, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                                                          base_image_seq_len=256, max_image_seq_len=4096)
    small = FluxPipeline.from_pretrained(FLUX)
    small.tokenizer.model_max_length, small.tokenizer_2.model_max_length = 77, 512
    pipe = FluxPipeline(scheduler, vae, transformers.CLIPTextModel(clip), small.tokenizer, transformers.T5EncoderModel(t5), small.tokenizer_2, transformer)
    pipe.to(torch.bfloat16).save_pretrained(path, max_shard_size="500MB")
    assert (path / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()


def try_flux_dev(folder):
    """The published shapes through train.py: the same velocity and latents as FluxPipeline's own, two iterations of all weights and of adapters, and back into a FluxPipeline."""
    path = folder / "FLUX.1-dev"
    one_layer_flux_dev(path)
    model, prompt = Flux(path, 64), "a red apple, 3d style"
    cond, x1, mu = model.encode([prompt]), torch.randn(1, *model.latent_shape), diffusers.pipelines.flux.pipeline_flux.calculate_shift(16, 256, 4096, 0.5, 1.15)
    with torch.no_grad():
        theirs = model.pipe(prompt, height=64, width=64, num_inference_steps=4, guidance_scale=3.5, latents=x1, output_type="latent").images
        ours = rollout(lambda x, t: model.velocity(x, t, cond), x1, schedule(4, math.exp(mu)), "ddim")[0][-1]
    print(f"4 steps: largest difference {(ours - theirs).abs().max():.1e} of latents up to {theirs.abs().max():.1f}, which moved by {(theirs - x1).abs().max():.1f}", flush=True)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    del model
    common = ["--model", str(path), "--preset", "dpm8", "--prompts", str(HERE / "tiny/prompts/train.txt"), "--rewards", "jpeg", "--resolution", "64", "--device", "cpu", "--eval_every", "0",
              "--iterations", "2", "--group_size", "2", "--num_anchors", "2", "--num_rollout_steps", "2", "--num_train_steps", "1", "--lr", "1e-3"]
    x, base = torch.randn(1, 16, 64), FluxPipeline.from_pretrained(path, dtype=torch.float32)
    inputs = dict(hidden_states=x, timestep=torch.tensor([0.5]), guidance=torch.tensor([3.5]), encoder_hidden_states=cond["txt"], pooled_projections=cond["vec"],
                  img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(512, 3), return_dict=False)
    with torch.no_grad():
        before = base.transformer(**inputs)[0]
    for name, how in (("lora", ["--lora_rank", "64"]), ("full", [])):
        out = folder / name
        assert train.main([*common, *how, "--out_dir", str(out)]) is None
        if how:
            pipe = base
            pipe.load_lora_weights(out / "checkpoint-2")
        else:
            pipe = FluxPipeline.from_pretrained(out / "checkpoint-2", dtype=torch.float32)
        with torch.no_grad():
            after = pipe.transformer(**inputs)[0]
        print(f"{name}: 2 iterations, saved, loaded into a FluxPipeline; the velocity has changed by up to {(after - before).abs().max():.2e}, of {before.abs().max():.2f}", flush=True)
        assert (after - before).abs().max() > 1e-3 and len(lines_of(out)) == 2 and max(line["first_ratio"] for line in lines_of(out)) < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--in_saves", action="store_true", help="kill only while a checkpoint is being written")
    parser.add_argument("--flux_dev", action="store_true", help="instead: train a FLUX.1-dev of one layer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.flux_dev:
            sys.exit(try_flux_dev(Path(folder)))
        run(Path(folder) / "quiet", "--iterations", str(args.iterations))
        killed = kill_until_done(Path(folder) / "killed", args.iterations, args.kills, args.in_saves)
        quiet, loud = ([line["reward"] for line in lines_of(Path(folder) / name)] for name in ("quiet", "killed"))
        check_loads(Path(folder) / "killed")
        print(f"killed {killed} times{' during saves' if args.in_saves else ''}; {len(loud)} of {args.iterations} iterations in the log; rewards equal: {quiet == loud}; "
              f"{len(train.checkpoints(Path(folder) / 'killed'))} checkpoints, all load")
        sys.exit(quiet != loud)
