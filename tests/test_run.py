"""
run.py and machine.py: what a run refuses, writes and survives, in one process; and torchvision over
any build of torch.

    python -m pytest -q tests/test_run.py
"""
import dataclasses, errno, importlib.machinery, inspect, io, json, math, os, shutil, signal, stat
import subprocess, sys, threading, time, types
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import save_file
import machine                                                  # before diffusers
from diffusers import FluxPipeline
import rewards
import run
import train
from model import Flux
from run import Run, checkpoints
from solvers import schedule
from test_core import Stub, brightness, stub_run, train_stub
from tests.conftest import FLUX, HERE, SHORT, iterations_of, lines_of, weights_of


class Saved(Stub):
    """A stub with pictures of 2 x 2 pixels, which can be saved."""

    cut = lambda self, prompts: {}

    def decode(self, x):
        return x.sigmoid().mT.unflatten(2, (2, 2))

    def save(self, path, weights=None):
        (path / "model_index.json").write_text("{}", encoding="utf-8")
        torch.save(self.weights(), path / "weights.pt")


@pytest.fixture
def scorers(monkeypatch):
    """Runs are those of a stub, and take milliseconds. -> {name: scorer}, which may be changed."""
    found = dict(preference=brightness, judge=brightness)

    def load_all(names, *_):
        torch.rand(1)                                           # as new networks do
        return {name: found[name] for name in names}

    monkeypatch.setattr(rewards, "load_all", load_all)
    monkeypatch.setattr(train, "load", lambda cfg: Saved())
    return found


def main(out, words="", *more):
    """A short run into a folder by train.py's main."""
    return train.main([*SHORT, "--out_dir", str(out), *more, *words.split()])


def saved(folder, **settings):
    """A stub's run with a checkpoint after its first iteration."""
    books = stub_run(folder, Saved(), **settings)
    books.iteration = 1
    books.save()
    return books


# ==================================================================== settings that are refused

REFUSED = [
    ("--preset dpm9", "dpm9"),
    ("--sigma 0", "sigma is 0, but must lie in (0, 1]"),
    ("--sigma nan", "sigma is nan, but must lie in (0, 1]"),
    ("--tau warm", "tau is warm, but must be a number above 0, or dim"),
    ("--tau inf", "tau is inf, but must be a number above 0, or dim"),
    ("--tau 0", "tau is 0, but must be a number above 0, or dim"),
    ("--num_anchors 13", "num_anchors (B) is 13, but must lie between 1 and group_size (G), 12"),
    ("--num_train_steps 8", "num_train_steps (K) is 8, but must lie between 1 and T-1, 7"),
    ("--updates_per_iteration 3",
     "updates_per_iteration is 3, but must divide num_anchors (B), 4"),
    ("--solver heun", "solver is heun, but must be ddim or dpmpp_2m"),
    ("--lr inf", "lr is inf, but must lie in (0, 1]"),
    ("--ema 1", "ema is 1, but must lie in [0, 1)"),
    ("--guidance nan", "guidance is nan, but must be a number, or empty"),
    ("--sig 0.3", "unrecognized arguments"),
    ("--resolution 100", "resolution is 100, but its sides must be multiples of 16"),
    ("--resolution 832x100", "resolution is 832x100, but its sides must be multiples of 16"),
    ("--resolution 8208", "resolution is 8208, but its sides must be multiples of 16, up to 8192"),
    ("--resolution square", "resolution is square, but must be a number of pixels, or like"),
    ("--text_encoder_device moon",
     "text_encoder_device is moon, but must be empty or cpu or offload"),
    ("--device tpu", "device is tpu, but must be cpu, or cuda where there is one"),
    ("--fsdp", "fsdp divides a model among processes, and there is one"),
    ("--call [33]", 'call is [33], but must be a JSON object such as {"num_frames": 33}'),
    ("--call num_frames=33", "call is num_frames=33, but must be a JSON object"),
    ('--call {{"height":64}}', "call has height, but that is decided here, or by another setting"),
    ("--frames 0", "frames is 0, but must lie in [1, inf)"),
    ("--wandb project", "wandb is not installed"),
    ("--prompts nowhere.txt", "nowhere.txt is"),
    ("--prompts {pipe}", "prompts come from a pipe, which can be read only once; write them into"),
    ("--preset dpm8", "prompts is empty; name a text file with one prompt a line, or hpdv2_train"),
    ("--model {folder}", "is not a FluxPipeline directory"),
    ("--model tiny/nothing", "is not a FluxPipeline directory"),
    ("--model {file}", "is a single file; name a FluxPipeline directory"),
    ("--init_lora {folder}", "holds no adapters; it must be a .safetensors file, or a folder"),
    ("--init_lora {adapters} --lora_rank 4", "init_lora has its own rank; leave lora_rank out"),
    ("--rewards beauty", "there is no scorer 'beauty'; there are hpsv2, pickscore, imagereward"),
    ("--rewards ,", "rewards is empty"),
    ("--rewards preference --eval_scorers preference=tiny/judge",
     "scorer 'preference' is named twice"),
    ("--rewards preference,jpeg --reward_weights 1",
     "must be one number >= 0, not all 0, for each of preference,jpeg"),
    ("--out_dir {used}", "already holds a run; use --resume, --overwrite or another --out_dir"),
    ("--out_dir {used} --resume --overwrite", "resume and overwrite exclude each other; give one"),
    ("--out_dir {other}", "is not a run, and holds checkpoint-2, which a run would replace"),
    ("--out_dir {other} --resume", "is not a run, and holds checkpoint-2"),
    ("--out_dir {other} --overwrite", "is not a run, and holds checkpoint-2"),
    ("--out_dir {file}", "must be a directory in which folders can be made and renamed"),
    ("--out_dir .", "is not a run, and holds neighbor_grpo.py, which a run would replace"),
    ("--out_dir paper --overwrite", "is not a run, and holds baselines.py"),
]


@pytest.mark.parametrize("settings, sentence", REFUSED, ids=[words for words, _ in REFUSED])
def test_a_bad_setting_gets_one_sentence_and_exit_code_2_before_anything_is_loaded(
        settings, sentence, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "other/checkpoint-2").mkdir(parents=True)       # of another program
    for name in ("file", "used/log.jsonl", "other/checkpoint-2/optimizer.bin", "a.safetensors"):
        (tmp_path / name).touch()
    reader, writer = os.pipe()
    os.close(writer)
    names = {name: tmp_path / name for name in ("file", "used", "other")}
    names.update(folder=tmp_path, adapters=tmp_path / "a.safetensors", pipe=f"/dev/fd/{reader}")
    monkeypatch.setattr(train, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a, **k: pytest.fail("a scorer was loaded"))
    with pytest.raises(SystemExit) as exit:
        train.main(f"--out_dir {tmp_path / 'new'} {settings}".format(**names).split())
    said = capsys.readouterr().err
    os.close(reader)
    assert exit.value.code == 2 and not (tmp_path / "new").exists()
    assert sentence in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize("settings", [
    "--sigma 1 --p 2 --num_anchors 12 --num_train_steps 7 --updates_per_iteration 12 --lr 1",
    "--group_size 2 --num_anchors 1 --updates_per_iteration 1 --num_rollout_steps 2 "
    "--num_train_steps 1 --ema 0 --tau 1e-9 --resolution 16 --seed 0",
    "--resolution 8192 --eval_every 0 --keep 0 --checkpoint_blocks -1"])
def test_the_limits_of_a_setting_are_allowed(settings, tmp_path):
    given = settings.split()
    cfg = train.parse_config([*given, "--out_dir", str(tmp_path / "run")])
    for name, value in zip(given[::2], given[1::2]):
        assert float(getattr(cfg, name.removeprefix("--"))) == float(value)


def test_groups_that_do_not_divide_among_the_processes_are_refused(monkeypatch, tmp_path, capsys):
    out, prompts = ["--out_dir", str(tmp_path / "run")], tmp_path / "p.txt"
    monkeypatch.setattr(run, "WORLD", 2)
    with pytest.raises(SystemExit) as exit:
        train.parse_config(["--prompts_per_iteration", "3", *out])
    assert exit.value.code == 2
    sentence = "prompts_per_iteration is 3, but must be divisible among 2 processes"
    assert sentence in capsys.readouterr().err
    for module in (run, train):
        monkeypatch.setattr(module, "WORLD", 8)
    prompts.write_text("a\n", encoding="utf-8")
    cfg = train.parse_config(["--preset", "dpm8", "--model", str(FLUX), "--rewards", "jpeg",
                              "--prompts", str(prompts), *out])
    assert cfg.prompts_per_iteration == 8                       # one per process, as in the paper


def test_a_folder_in_which_folders_cannot_be_renamed_is_refused(tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuses)                 # as on a mounted bucket
    with pytest.raises(SystemExit):
        train.parse_config(["--out_dir", str(tmp_path / "run")])
    assert "renamed, and that failed: Operation not permitted" in capsys.readouterr().err


def test_a_tilde_after_an_equals_sign_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))            # Windows
    assert train.parse_config(["--out_dir=~/run"]).out_dir == str(tmp_path / "run")


# ==================================================================== a run and its --resume

@pytest.fixture
def signals():
    """Signals as in a terminal. (A shell's background processes ignore Ctrl-C.)"""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    for name in names:
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(getattr(signal, name), usual)
    yield names
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
        alone, five, tmp_path, monkeypatch, signals):
    score, scored = train.score, []

    def interrupted(*args):             # Ctrl-C while the third iteration is scored
        scored.append(1)
        if len(scored) == 3:
            signal.raise_signal(signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(train, "score", interrupted)
    for _ in range(2):
        assert main(tmp_path, "--iterations 4 --resume", *five) is None
        assert {path.name for path in tmp_path.iterdir()} >= {
            "checkpoint-2", "checkpoint-3", "before_after.png", "curve.png", "log.jsonl"}
    once, mended = (iterations_of(out, seconds=False) for out in (alone, tmp_path))
    assert [line["iter"] for line in once] == [1, 2, 3, 4] and mended == once
    assert lines_of(tmp_path, seconds=False)[-1] == lines_of(alone, seconds=False)[-1]
    a, b = (weights_of(out, 4) for out in (alone, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_saved_before_its_first_update_goes_on_as_if_it_had_not_been(tmp_path):
    """If there are no moments yet, torch makes them at a save, by a step that must not count."""
    def flat_at_first(images, prompts):
        seen.append(1)
        return brightness(images, prompts) * (len(seen) > 1)

    ends = []
    for save_every in (1, 0):
        model, seen = Saved(), []
        lines = train_stub(tmp_path, model, flat_at_first, iterations=3, save_every=save_every)
        assert [line["flat_groups"] for line in lines] == [1, 0, 0]
        ends.append(model.weights())
    assert torch.equal(*ends)


@pytest.mark.parametrize("failing", [3, 4])                     # training, and an evaluation
def test_a_run_that_a_failing_reward_has_ended_goes_on_after_resume_as_if_it_had_not_failed(
        failing, scorers, five, tmp_path, capsys):
    def preference(images, prompts):
        calls.append(len(images))
        if out.name == "broken" and len(calls) == failing:
            raise rewards.ScorerError("the server is down")
        return brightness(images, prompts)

    scorers["preference"] = preference
    out, calls = tmp_path / "whole", []
    assert main(out, "--iterations 4", *five) is None
    assert calls == [5, 8, 8, 5, 8, 8, 5]
    whole, out, calls = lines_of(out, seconds=False), tmp_path / "broken", []
    assert main(out, "--iterations 4", *five) == 1
    assert "the server is down" in capsys.readouterr().err and len(calls) == failing
    assert main(out, "--iterations 4 --resume", *five) is None
    assert lines_of(out, seconds=False) == whole


def test_the_same_command_with_resume_begins_a_run_and_continues_it_with_its_own_settings(
        scorers, five, tmp_path, capsys):
    assert main(tmp_path, "--iterations 2 --resume", *five) is None
    assert f"resume     no checkpoint in {tmp_path}, so the run begins" in capsys.readouterr().out
    first = iterations_of(tmp_path)
    assert main(tmp_path, "--iterations 2 --resume", *five) is None     # the run has ended
    assert f"resume     continues from {tmp_path}/checkpoint-2" in capsys.readouterr().out
    assert iterations_of(tmp_path) == first
    with pytest.raises(SystemExit) as exit:
        main(tmp_path, "--iterations 3 --resume --lr 1e-3", *five)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "lr is 0.001, but was 5e-05 in the run to resume" in said
    assert main(tmp_path, "--iterations 3 --resume", *five) is None     # now it should go on
    assert "run        iterations 3 to 3" in capsys.readouterr().out
    assert iterations_of(tmp_path)[:2] == first


def test_the_first_lines_count_prompts_in_both_files_and_warn_of_a_disk_that_is_too_small(
        scorers, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n", encoding="utf-8")
    (tmp_path / "held_out.txt").write_text("c\nd\n", encoding="utf-8")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1))
    assert main(tmp_path / "run", "--iterations 2", "--prompts",
                str(tmp_path / "prompts.txt"),
                "--eval_prompts", str(tmp_path / "held_out.txt")) is None
    said = capsys.readouterr().out
    assert "3 to train on, 2 held out; 1 are in both" in said
    assert "disk       0.0 GB are free, but a checkpoint takes 0.0 GB or more" in said


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_that_begins_in_a_folder_deletes_what_a_run_wrote_and_nothing_else(how, tmp_path):
    out, finished = tmp_path / "run", ["checkpoint-1/state/state.pt"] * (how == "overwrite")
    for name in ("log.jsonl", "config.json", "checkpoint-2/model_index.json", "curve.png",
                 "checkpoint.new/state/config.json", "checkpoint-1.old/state/state.pt",
                 "samples/000000.png", "thesis.txt", *finished):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"iter": 1, "reward": 7}\n', encoding="utf-8")
    (out / "wandb").symlink_to(tmp_path)                        # to elsewhere
    begun = stub_run(tmp_path, Stub(), **dict(resume=False, overwrite=False) | {how: True})
    run.check_out_dir(begun.cfg)
    assert begun.iteration == 0 and begun.resumed is None and begun.lines() == []
    names = {path.name for path in out.iterdir()} - {"tensorboard", ".lock"}
    assert names == {"config.json", "log.jsonl", "neighbor_grpo.py", "samples", "thesis.txt",
                     "checkpoint-2"}                            # has no state: not from a run
    assert not any((out / "samples").iterdir())


@pytest.mark.parametrize("setting, how, leftover", [
    ("--model", "--resume", "log.jsonl"), ("--model", "--overwrite", "log.jsonl"),
    ("--model", "--overwrite", "checkpoint-2/state/state.pt"),
    ("--init_lora", "--overwrite", "log.jsonl")])
def test_a_base_model_and_adapters_in_the_folder_of_a_run_are_never_deleted(
        setting, how, leftover, tmp_path, capsys):
    shutil.copytree(FLUX, tmp_path / "checkpoint-2")
    adapters = tmp_path / "checkpoint-2/pytorch_lora_weights.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, adapters)
    (tmp_path / leftover).parent.mkdir(exist_ok=True)
    (tmp_path / leftover).touch()
    files = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(tmp_path, how, setting, str(tmp_path / "checkpoint-2"))
    assert "where a new run would delete it" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == files


def test_a_run_from_a_read_only_checkout_can_be_replaced(tmp_path, monkeypatch):
    shutil.copy(HERE / "neighbor_grpo.py", tmp_path)
    (tmp_path / "neighbor_grpo.py").chmod(0o444)
    monkeypatch.setattr(run, "HERE", tmp_path)
    books = stub_run(tmp_path, Stub())
    assert (books.out / "neighbor_grpo.py").stat().st_mode & stat.S_IWUSR


def test_a_resumed_run_may_change_only_settings_that_keep_its_numbers_or_set_its_length(tmp_path):
    begun = saved(tmp_path, eval_every=1, save_every=1)
    changed = {str: "other", int: 77, float: 0.123}
    for field in dataclasses.fields(train.Config):
        value = getattr(begun.cfg, field.name)
        value = not value if field.type is bool else changed[field.type]
        cfg = dataclasses.replace(begun.cfg, **{field.name: value})
        if field.name in ("prompts", "eval_prompts"):           # see the next test
            continue
        try:
            run.check_resumed(cfg, begun.out / "checkpoint-1")
        except ValueError as error:
            assert str(error).startswith(f"{field.name} is {value}, but was ")
        else:
            assert field.name in (
                "iterations", "eval_every", "save_every", "keep", "checkpoint_blocks", "compile",
                "batch", "fsdp", "text_encoder_device", "wandb", "device", "threads",
                "out_dir", "resume", "overwrite")
    cfg = dataclasses.replace(saved(tmp_path, eval_every=0).cfg, eval_every=5)
    with pytest.raises(ValueError, match="eval_every was 0 in the run to resume"):
        run.check_resumed(cfg, begun.out / "checkpoint-1")


def test_the_prompts_of_a_resumed_run_may_be_in_another_file_but_must_be_the_same(tmp_path):
    begun = saved(tmp_path, eval_prompts=str(tmp_path / "prompts.txt"))
    (tmp_path / "moved.txt").write_text("a\nb\nc\n", encoding="utf-8")
    (tmp_path / "changed.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    for name in ("prompts", "eval_prompts"):
        moved, changed = (dataclasses.replace(begun.cfg, **{name: str(tmp_path / file)})
                          for file in ("moved.txt", "changed.txt"))
        run.check_resumed(moved, begun.out / "checkpoint-1")
        with pytest.raises(ValueError, match=f"^{name} differs from the run to resume"):
            run.check_resumed(changed, begun.out / "checkpoint-1")


def test_a_run_is_not_resumed_on_a_model_of_the_same_name_with_other_weights(tmp_path):
    for place, size in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / place / "x/y/transformer").mkdir(parents=True)
        save_file({"w": torch.ones(size)}, tmp_path / place / "x/y/transformer/w.safetensors")
    cfg = dataclasses.replace(saved(tmp_path).cfg, model=str(tmp_path / "a/x/y"))
    begun = Run(cfg, Saved(), {})
    begun.iteration = 1
    begun.save()
    for model in (str(tmp_path / "b/x/y"), "x/y"):              # moved, or on the hub
        run.check_resumed(dataclasses.replace(begun.cfg, model=model), begun.out / "checkpoint-1")
    with pytest.raises(ValueError, match="^model differs from the run to resume"):
        run.check_resumed(dataclasses.replace(begun.cfg, model=str(tmp_path / "c/x/y")),
                          begun.out / "checkpoint-1")


# ==================================================================== the log, pictures, watchers

def test_a_line_of_the_log_has_the_weighted_reward_its_spread_and_every_scorer(tmp_path):
    def darkness(images, prompts):
        return -10 * brightness(images, prompts) + 1

    books = stub_run(tmp_path, Stub(), reward_weights="3,1", prompts_per_iteration=2)
    seen = []
    spy = lambda images, prompts: seen.append(brightness(images, prompts)) or seen[-1]
    train.train(books.cfg, books.model, {"brightness": spy, "darkness": darkness}, books)
    r, (line,) = seen[0].view(2, 12), books.lines()
    assert line["brightness"] == pytest.approx(r.mean().item())
    assert line["darkness"] == pytest.approx(1 - 10 * r.mean().item())
    reward = (3 * r + 1 - 10 * r) / 4
    assert line["reward"] == pytest.approx(reward.mean().item())
    assert line["reward_std"] == pytest.approx(reward.std(1).mean().item(), rel=1e-5)
    assert list(line) == ["iter", "reward", "reward_std", "brightness", "darkness", "first_ratio",
                          "clip_fraction", "grad_norm", "flat_groups", "skipped",
                          "seconds_rollout", "seconds_reward", "seconds_update", "nfe_old",
                          "nfe_theta"]


@pytest.mark.parametrize("reward, judge, flawless, named", [
    (3.1, -3.1, 0, ["judge"]), (9, -4, -5, ["judge", "flawless"]), (3.1, -2.9, 9, []),
    (2.9, -9, -9, []), (-9, -9, -9, []), (9, 9, 2.9, []), (9, math.nan, -4, ["flawless"])])
def test_a_watched_scorer_that_falls_while_the_reward_rises_is_named_if_both_exceed_three_errors(
        reward, judge, flawless, named, tmp_path, monkeypatch, capsys):
    """A base, and then a model with these gains, in standard errors over the prompts. The prompts
    differ much more than that."""
    gains = dict(brightness=reward, judge=judge, flawless=flawless)
    base, noise = (torch.linspace(-end, end, 9)[:, None] for end in (300, 1))
    stderr = noise.std() / 3
    answers = [(dict.fromkeys(gains, base), torch.full((9, 1), 2.0)),
               ({name: base + noise + gain * stderr for name, gain in gains.items()},
                torch.full((9, 1), 2.5))]
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: (
        torch.zeros(9, 1, 3, 8, 8, dtype=torch.uint8), *answers.pop(0)))
    books = stub_run(tmp_path, Stub(), eval_scorers="judge,flawless")
    books.prompts = list("123456789")
    for books.iteration in (0, 5):
        books.evaluate()
    line = books.lines()[-1]
    assert list(line) == ["iter", *(f"eval_{name}{number}" for name in gains for number in (
        "", "_stderr", "_gain", "_gain_stderr")), "velocity_ratio", "fallen"]
    gain = line["eval_brightness_gain"] / line["eval_brightness_gain_stderr"]
    assert gain == pytest.approx(reward, rel=1e-4)              # paired with the base's
    assert line["velocity_ratio"] == pytest.approx(1.25)        # as a multiple of the base's
    warnings = [text for text in capsys.readouterr().out.splitlines() if "exploited" in text]
    assert line["fallen"] == len(named) and len(warnings) == bool(named)
    if named:
        start = f"eval 005: {', '.join(named)} fell below the base while brightness rose"
        assert warnings[0].startswith(start) and "When it goes wrong" in warnings[0]


def test_a_base_from_before_the_velocity_was_measured_gives_no_multiple(tmp_path, monkeypatch):
    answer = torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), {}, torch.ones(1, 1)
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: answer)
    books = stub_run(tmp_path, Stub())
    books.prompts, books.before = ["a"], dict(scores={}, images=answer[0][:, 0])
    books.evaluate()
    assert books.lines()[-1]["velocity_ratio"] is None


@pytest.mark.parametrize("eval_steps, solver", [(0, "ddim"), (5, "dpmpp_2m")])
def test_evaluations_sample_like_rollouts_or_with_eval_steps_of_dpm_solver(
        eval_steps, solver, tmp_path, monkeypatch):
    def evaluated(model, scorers, prompts, ts, by, **more):
        assert torch.equal(ts, schedule(eval_steps or 6, 2.0)) and by == solver
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate", evaluated)
    books = stub_run(tmp_path, Stub(), eval_steps=eval_steps, num_rollout_steps=6, shift=2.0,
                     solver="ddim")
    with pytest.raises(KeyboardInterrupt):
        books.evaluate()


def test_a_run_trains_on_its_rewards_watches_the_others_and_evaluates_the_base_once(
        scorers, five, tmp_path, monkeypatch):
    calls, drawn = [], []
    for name in scorers:
        scorers[name] = lambda images, prompts, name=name: (
            calls.append((name, len(images))) or brightness(images, prompts))
    monkeypatch.setattr(train, "load", lambda cfg: drawn.append(torch.rand(1).item()) or Saved())
    for iterations in (1, 2):                                   # the second one resumes
        words = f"--iterations {iterations} --eval_scorers judge --seed 7 --resume"
        assert main(tmp_path, words, *five) is None
    evaluation, training = [("preference", 5), ("judge", 5)], [("preference", 8)]
    assert calls == [*evaluation, *training, *evaluation, *training, *evaluation]
    torch.manual_seed(7)                        # for new adapters, whatever the scorers have drawn
    assert drawn == [torch.rand(1).item()] * 2


def test_pictures_of_the_same_prompts_and_noise_are_written_at_every_evaluation(
        scorers, five, tmp_path):
    words = "--eval_every 1 --eval_scorers judge --iterations 2 --lr 1e-12"
    assert main(tmp_path, words, *five) is None
    names = ["000000.png", "000001.png", "000002.png"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    base, one, two = (np.array(Image.open(tmp_path / "samples" / name)).astype(int)
                      for name in names)
    pixels, height, left = 128, 134, 96         # a row of pictures; with its gap; its label
    above, below = slice(0, pixels), slice(height, height + pixels)
    assert np.array_equal(one[above], two[above])               # the base is above
    assert np.array_equal(one[above, left:], base[above, left:])
    moved = np.abs(two[below, left:] - base[above, left:])      # the aligned model is below; its
    assert moved.max() <= 2 < np.ptp(base[above, left:])        # weights have hardly moved
    evaluations = [line for line in lines_of(tmp_path) if "eval_preference" in line]
    assert [line["iter"] for line in evaluations] == [0, 1, 2]
    assert all(abs(line["eval_judge_gain"]) < 1e-4 for line in evaluations)


@pytest.mark.parametrize("error", ["", "no API key", "no network"])
def test_every_line_of_the_log_is_sent_to_wandb_and_the_run_goes_on_without_it_if_that_fails(
        error, tmp_path, monkeypatch, capsys):
    def init(project, config, dir):
        seen.append((project, config["sigma"]))
        if error == "no API key":
            raise RuntimeError(error)
        return types.SimpleNamespace(log=log)

    def log(numbers, step):
        seen.append((step, numbers))
        if error:
            raise RuntimeError(error)

    seen, module = [], types.ModuleType("wandb")
    module.__spec__, module.init = importlib.machinery.ModuleSpec("wandb", None), init
    monkeypatch.setitem(sys.modules, "wandb", module)
    lines = train_stub(tmp_path, Stub(), iterations=2, wandb="neighbours")
    calls = [("neighbours", 0.3), *((line.pop("iter"), line) for line in lines)]
    assert len(lines) == 2 and seen == calls[: {"no API key": 1, "no network": 2}.get(error)]
    assert capsys.readouterr().err.count(f"wandb is left out: {error}") == bool(error)


def test_a_failing_scorer_that_is_only_watched_never_ends_a_run_and_its_score_is_missing(
        scorers, five, tmp_path, capsys):
    def fails_once(images, prompts):
        calls.append(1)
        if len(calls) == 2:                                     # after the base
            raise rewards.ScorerError("the server is down")
        return brightness(images, prompts)

    scorers["judge"], calls = fails_once, []
    words = "--eval_every 1 --eval_scorers judge --iterations 2"
    assert main(tmp_path, words, *five) is None
    evals = [line for line in lines_of(tmp_path) if "eval_preference" in line]
    assert [line["eval_judge"] is None for line in evals] == [False, True, False]
    assert all(line["eval_preference"] is not None for line in evals)
    said = capsys.readouterr()
    assert "judge missing" in said.out
    assert "a score that is only watched is left out: the server is down" in said.err


def test_the_last_table_has_base_aligned_real_and_the_gain_as_a_share_of_real_less_base(
        tmp_path, capsys):
    prompts = tmp_path / "held_out.txt"
    prompts.write_text("a\n", encoding="utf-8")
    (tmp_path / "held_out.real.json").write_text(json.dumps({"preference": 0.8}), encoding="utf-8")
    books = stub_run(tmp_path, Stub(), eval_prompts=str(prompts))
    books.scorers = {"preference": None, "judge": None}
    for it, score, judge in ((0, 0.4, 0.1), (5, 0.5, None), (9, 0.6, 0.3)):
        books.write(dict(iter=it, eval_preference=score, eval_judge=judge))
    books.write(dict(iter=9, reward=0.7))
    books.print_table()
    table = [line.split() for line in capsys.readouterr().out.strip().split("\n")[-2:]]
    assert table == [["preference", "0.400", "0.600", "0.800", "50%"], ["judge", "0.100", "0.300"]]


# ==================================================================== checkpoints

def test_only_the_newest_checkpoints_are_kept(scorers, tmp_path):
    assert main(tmp_path, "--iterations 4 --save_every 1 --keep 2") is None
    names = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    def killed(path, ignore_errors=False):
        if not ignore_errors and (path / "state").exists():
            raise KeyboardInterrupt

    out = saved(tmp_path).out
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        stub_run(tmp_path, Saved())                             # overwrites the run
    assert checkpoints(out) == []


def test_a_checkpoint_is_written_even_if_the_system_cannot_sync(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sync", raising=False)              # Windows
    out = saved(tmp_path).out
    assert checkpoints(out) == [out / "checkpoint-1"]


def test_untrained_parts_are_copied_from_the_base_byte_by_byte(alone):
    files = [path for path in FLUX.rglob("*") if path.is_file()]
    names = [path.relative_to(FLUX) for path in files if path.suffix != ".md"]
    for name in names:
        ours = (alone / "checkpoint-4" / name).read_bytes()
        trained = name.parts[0] == "transformer" and name.suffix == ".safetensors"
        assert (ours == (FLUX / name).read_bytes()) != trained, name
    assert len(names) > 10


@pytest.mark.parametrize("damage", ["renamed", "state/state.pt", "state/config.json",
                                    "state/sharded/.metadata", "state/sharded/__0_0.distcp"])
def test_the_error_for_a_damaged_checkpoint_names_it_and_says_what_to_do(
        damage, scorers, tmp_path, capsys):
    assert main(tmp_path, "--iterations 2") is None
    if damage == "renamed":                     # checkpoint-3 would be older, and never resumed
        (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-7")
    else:
        os.truncate(tmp_path / "checkpoint-2" / damage, 10)
    try:
        assert main(tmp_path, "--iterations 3 --resume") == 1
    except SystemExit as exit:
        assert exit.code == 2
    said = capsys.readouterr().err
    assert f"checkpoint-{7 if damage == 'renamed' else 2} is broken" in said
    assert "--resume goes on from the checkpoint before it" in said


def test_a_run_continues_from_the_checkpoint_before_even_if_a_crash_garbled_the_log(
        scorers, tmp_path):
    assert main(tmp_path, "--iterations 5") is None
    whole = lines_of(tmp_path, seconds=False)
    for after in (4, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{after}")
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b'{"iter": 3, "reward": 7}\n{"note": 1}\n\nnull\n\xff\xfe\n{"iter": 4, "rew')
    assert main(tmp_path, "--iterations 5 --resume") is None
    assert lines_of(tmp_path, seconds=False) == whole


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_older_ones(
        scorers, tmp_path, capsys, monkeypatch):
    """As on a full disk: no file may exceed 1 MB, but one of the second checkpoint would."""
    resource = pytest.importorskip("resource")                  # not on Windows

    class Large(Saved):
        def __init__(self):
            super().__init__()
            self.transformer = torch.nn.Sequential(torch.nn.Linear(3, 30_000),
                                                   torch.nn.Linear(30_000, 3))

    monkeypatch.setattr(train, "load", lambda cfg: Large())
    assert main(tmp_path, "--iterations 4") is None
    rewards = [line["reward"] for line in lines_of(tmp_path)]
    shutil.rmtree(tmp_path / "checkpoint-4")
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert main(tmp_path, "--iterations 4 --resume") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "checkpoint-4 could not be written" in said
    assert "checkpoint-2 is whole, and --resume goes on from there" in said
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]
    assert {path: path.read_bytes() for path in files} == before
    assert main(tmp_path, "--iterations 4 --resume") is None    # with room again
    assert [line["reward"] for line in lines_of(tmp_path)] == rewards


def check_loads(out):
    """Every checkpoint in `out` loads, for sampling and for resuming."""
    for path in checkpoints(out):
        FluxPipeline.from_pretrained(path)
        iteration = int(path.name.removeprefix("checkpoint-"))
        assert torch.load(path / "state/state.pt")["iteration"] == iteration
        reader = dcp.FileSystemReader(path / "state/sharded")
        entries = reader.read_metadata().state_dict_metadata
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
                 for name, entry in entries.items() if hasattr(entry, "size")}
        dcp.load(state, storage_reader=reader)
        assert sum(name.startswith("weights.") for name in state) > 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_checkpoint_loads_even_if_the_process_is_killed_at_any_moment_of_a_save(
        tmp_path):
    cfg = train.parse_config([*SHORT, "--keep", "2", "--out_dir", str(tmp_path / "run")])
    books, killed, took = Run(cfg, Flux(FLUX, 64), {}), 0, 1.0
    for attempt in range(13):
        books.iteration = 1 + attempt
        begun = time.perf_counter()
        child = os.fork()
        if not child:
            status = 1
            try:
                books.save()
                status = 0
            finally:
                os._exit(status)                # else the child would go on with pytest
        if attempt:                             # the first one is only timed
            time.sleep(took * attempt / 12)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        took = took if attempt else time.perf_counter() - begun
        killed += os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL)
        assert checkpoints(tmp_path / "run"), attempt
    check_loads(tmp_path / "run")
    assert killed >= 6


# ==================================================================== two runs, one folder

LOCK = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_even_if_it_is_killed(
        scorers, tmp_path, capsys, monkeypatch):
    first = subprocess.Popen([sys.executable, "-c", LOCK, str(tmp_path / ".lock")],
                             stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    (tmp_path / "log.jsonl").touch()
    for how in ("--resume", "--overwrite"):
        with pytest.raises(SystemExit) as exit:
            main(tmp_path, how)
        said = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and f"another run is writing into {tmp_path}" in said
    monkeypatch.setattr(run, "RANK", 1)                         # of the first run's own processes
    run.check_out_dir(train.parse_config(["--resume", "--out_dir", str(tmp_path)]))
    monkeypatch.setattr(run, "RANK", 0)
    first.kill()
    first.wait()
    for _ in range(2):                          # the second time, this process has released it
        assert main(tmp_path, "--iterations 1 --resume") is None
        assert ".lock" not in capsys.readouterr().out.splitlines()[-1]


def test_a_restart_by_torchrun_waits_until_the_last_attempts_processes_are_dead(
        tmp_path, monkeypatch):
    dying = run.FileLock(tmp_path / ".lock", thread_local=False)        # as another process would
    dying.acquire()
    with pytest.raises(ValueError, match="another run is writing"):
        run.hold(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    threading.Timer(0.3, dying.release).start()
    assert run.hold(tmp_path).is_locked


def test_a_run_in_a_folder_that_cannot_be_locked_goes_on(tmp_path, monkeypatch, capsys):
    def refuses(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run.FileLock, "acquire", refuses)
    run.hold(tmp_path)
    assert "cannot be locked (" in capsys.readouterr().err


# ==================================================================== errors and signals

def test_a_run_goes_on_when_nobody_reads_its_output_and_a_notebooks_backend_is_missing(tmp_path):
    command = [sys.executable, "train.py", *SHORT, "--iterations", "1", "--out_dir", str(tmp_path)]
    env = {**os.environ, "MPLBACKEND": "module://nothing.like_it"}
    done = subprocess.Popen(command, cwd=HERE, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    assert done.stdout.readline().startswith("model")           # as `head -1` does
    done.stdout.close()
    said = done.stderr.read()
    assert done.wait() == 0, said
    assert "Traceback" not in said and "Exception ignored" not in said
    assert said.count("stdout is left out: [Errno 32] Broken pipe") == 1
    assert len(lines_of(tmp_path)) == 1 and (tmp_path / "curve.png").exists()
    assert (tmp_path / "checkpoint-1/model_index.json").exists()


def test_a_run_in_a_thread_trains_and_pictures_that_fail_do_not_end_it(
        scorers, five, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no font")

    for name in ("picture_grid", "draw_curve"):
        monkeypatch.setattr(run, name, fails)
    ended = []
    words = "--iterations 1 --eval_every 1"
    thread = threading.Thread(target=lambda: ended.append(main(tmp_path, words, *five)))
    thread.start()
    thread.join()
    assert ended == [None] and (tmp_path / "checkpoint-1/model_index.json").is_file()
    said = capsys.readouterr().err
    assert f"{tmp_path}/samples/000001.png is left out: no font" in said
    assert "curve.png is left out: no font" in said


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O")])
def test_a_stream_that_cannot_be_written_to_goes_silent(error):
    class Broken(io.StringIO):
        def write(self, text):
            raise error

    stream = Broken()
    machine.survive_readers(stream, "stdout")
    for _ in range(2):
        print("a", file=stream, flush=True)


def test_a_run_that_diverges_ends_with_a_sentence_and_saves_no_broken_weights(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "check_option", lambda *_: None)       # it refuses lr above 1
    assert main(tmp_path, "--iterations 3 --lr 1e30") == 1
    said = capsys.readouterr().err
    assert "no longer finite; lower lr (now 1e+30); no checkpoint was written before" in said
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("error, settings", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
     "text_encoder_device checkpoint_blocks batch fsdp lora_rank resolution"),
    (torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler"), "no-compile")])
def test_an_error_that_a_setting_avoids_names_the_setting(
        error, settings, scorers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stub, "velocity", lambda *_: (_ for _ in ()).throw(error))
    assert main(tmp_path) == 1
    said = capsys.readouterr().err
    for setting in settings.split():
        assert f"--{setting}" in said and str(error) in said
        assert setting.removeprefix("no-") in {f.name for f in dataclasses.fields(train.Config)}


def test_a_signal_lets_the_iteration_end_but_a_second_ctrl_c_does_not_and_nohups_is_ignored(
        signals, scorers, tmp_path, capsys):
    def signalled(images, prompts):             # while the second iteration is scored
        scored.append(1)
        for name in raised if len(scored) == 2 else ():
            signal.raise_signal(getattr(signal, name))
        return brightness(images, prompts)

    scorers["preference"] = signalled
    for name in signals:
        before, raised, scored = signal.getsignal(getattr(signal, name)), [name], []
        assert main(tmp_path / name, "--iterations 3") is None
        assert len(scored) == 2 and checkpoints(tmp_path / name)[0].name == "checkpoint-2"
        raised, scored = [name, "SIGINT"], []
        assert main(tmp_path / name, "--iterations 5 --resume") == 1
        assert len(scored) == 2 and "stopped at once" in capsys.readouterr().err
        assert signal.getsignal(getattr(signal, name)) == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # as with nohup, or a shell's &
    raised, scored = ["SIGINT"], []
    assert main(tmp_path / "nohup", "--iterations 3") is None
    assert len(scored) == 3


# ==================================================================== torchvision over any torch

LIBRARY = Path(torch.__file__).parent / "lib/libtorchbind_test.so"
PROGRAM = """
import contextlib, importlib.util, os, sys
from pathlib import Path
import torch

def declared(folder, namespace):
    sys.path.insert(0, folder)
    exec(function.replace("torchvision::", namespace + "::"), globals())
    declare_operators()
    sys.path.remove(folder)
    return hasattr(getattr(torch.ops, namespace), "takes_foo")

function, library = sys.argv[1:]
if not (naive := os.fork()):                    # the naive form always declares, and aborts
    torch.library.define("_TorchScriptTesting::takes_foo", "(Tensor x) -> Tensor")
    torch.ops.load_library(library)
    os._exit(0)
print(os.WIFSIGNALED(os.waitpid(naive, 0)[1]), declared("none", "_TorchScriptTesting"),
      declared("whole", "_TorchScriptTesting"), declared("broken", "another"))
"""


@pytest.mark.skipif(not LIBRARY.exists(), reason="this torch does not have the library")
def test_operators_are_declared_only_if_torchvisions_library_is_there_and_does_not_load(tmp_path):
    """False torchvisions: without a library, as on other systems; with one that declares an
    operator itself (torch's own libtorchbind_test); with one that is built for another torch."""
    for folder, library in (("none", None), ("whole", LIBRARY), ("broken", Path(__file__))):
        package = tmp_path / folder / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        if library:
            shutil.copy(library, package / "_C.so")
    function = inspect.getsource(machine.declare_operators)
    assert "torchvision::" in function and '("nms", "qnms")' in function
    command = [sys.executable, "-c", PROGRAM, function.replace('("nms", "qnms")', '("takes_foo",)'),
               str(LIBRARY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True", "True"], done.stderr[-500:]


def test_torchvision_can_be_used_here_and_cudnns_attention_is_off_but_flash_attention_is_on():
    import torchvision
    torchvision.transforms.Resize(3)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
