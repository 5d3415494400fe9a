"""
run.py: what a run refuses, writes and survives, in one process.

    python -m pytest -q tests/test_run.py
"""
import dataclasses, errno, importlib.machinery, io, json, math, os, shutil, signal, stat
import subprocess, sys, threading, time, types
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
from run import Run, checkpoints, discard
from solvers import schedule
from test_core import Stub, brightness, stub_run, train_stub
from tests.conftest import HERE, SHORT, TINY, lines_of, weights_of

FLUX = TINY / "flux"


# ==================================================================== settings that are refused

REFUSED = [
    ("--preset dpm9", "dpm9"),
    ("--sigma 0", "sigma is 0, but must lie in (0, 1]"),
    ("--sigma 1.5", "sigma is 1.5, but must lie in (0, 1]"),
    ("--sigma nan", "sigma is nan, but must lie in (0, 1]"),
    ("--p 0.1", "p is 0.1, but must lie in [0.2, 2]"),
    ("--tau warm", "tau is warm, but must be a number above 0, or dim"),
    ("--tau inf", "tau is inf, but must be a number above 0, or dim"),
    ("--tau 0", "tau is 0, but must be a number above 0, or dim"),
    ("--group_size 1", "group_size is 1, but must lie in [2, inf)"),
    ("--group_size many", "invalid int value: 'many'"),
    ("--num_anchors 13", "num_anchors (B) is 13, but must lie between 1 and group_size (G), 12"),
    ("--num_train_steps 8", "num_train_steps (K) is 8, but must lie between 1 and T-1, 7"),
    ("--updates_per_iteration 3",
     "updates_per_iteration is 3, but must divide num_anchors (B), 4"),
    ("--solver heun", "solver is heun, but must be ddim or dpmpp_2m"),
    ("--lr inf", "lr is inf, but must lie in (0, 1]"),
    ("--ema 1", "ema is 1, but must lie in [0, 1)"),
    ("--guidance nan", "guidance is nan, but must be a number, or empty"),
    ("--seed -1", "seed is -1, but must lie in [0, 1e18]"),
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
    ("--prompts {empty}", "has no prompts"),
    ("--prompts {latin}", "it must be a UTF-8 text file"),
    ("--prompts hpdv2_train", "download it with: hf download"),
    ("--preset dpm8", "prompts is empty; name a text file with one prompt a line, or hpdv2_train"),
    ("--model {folder}", "is not a FluxPipeline directory"),
    ("--model tiny/nothing", "is not a FluxPipeline directory"),
    ("--model {file}", "is a single file; name a FluxPipeline directory"),
    ("--init_lora {folder}", "holds no adapters; it must be a .safetensors file, or a folder"),
    ("--init_lora {adapters} --lora_rank 4", "init_lora has its own rank; leave lora_rank out"),
    ("--rewards beauty", "there is no scorer 'beauty'; there are hpsv2, pickscore, imagereward"),
    ("--rewards ,", "rewards is empty"),
    ("--rewards preference={folder}", "should be a folder with model.safetensors, but is not"),
    ("--rewards jpeg={folder}", "nothing may follow the name of this scorer"),
    ("--rewards preference --eval_scorers preference=tiny/judge",
     "scorer 'preference' is named twice"),
    ("--rewards preference,jpeg --reward_weights 1",
     "must be one number >= 0, not all 0, for each of preference,jpeg"),
    ("--out_dir {used}", "already holds a run; use --resume, --overwrite or another --out_dir"),
    ("--out_dir {used} --resume --overwrite", "resume and overwrite exclude each other; give one"),
    ("--out_dir {file}", "must be a directory in which folders can be made and renamed"),
    ("--out_dir .", "is not a run, and holds neighbor_grpo.py, which a run would replace"),
    ("--out_dir paper --overwrite", "is not a run, and holds baselines.py"),
]


@pytest.mark.parametrize("settings, sentence", REFUSED, ids=[words for words, _ in REFUSED])
def test_a_bad_setting_gets_one_sentence_and_exit_code_2_before_anything_is_loaded(
        settings, sentence, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    for name, text in (("empty", "\n"), ("file", "a\n"), ("used/log.jsonl", ""),
                       ("adapters.safetensors", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin").write_bytes("é\n".encode("latin-1"))
    names = {name: tmp_path / name for name in ("latin", "empty", "file", "used")}
    names.update(folder=tmp_path, adapters=tmp_path / "adapters.safetensors")
    monkeypatch.setattr(train, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a, **k: pytest.fail("a scorer was loaded"))
    with pytest.raises(SystemExit) as exit:
        train.main(f"--out_dir {tmp_path / 'new'} {settings}".format(**names).split())
    said = capsys.readouterr().err
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


@pytest.mark.parametrize("file, change, sentence", [
    ("model_index.json", dict(_class_name="StableDiffusionPipeline", transformer=None),
     "is a StableDiffusionPipeline, but must be a pipeline of diffusers that has a transformer"),
    ("transformer/config.json", dict(in_channels=128, out_channels=64),
     "takes 128 channels and gives 64"),
    ("transformer/config.json", dict(quantization_config=dict(quant_method="bitsandbytes")),
     "is quantized"),
])
def test_a_model_that_cannot_be_aligned_is_refused_by_its_configuration(
        file, change, sentence, tmp_path, capsys):
    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FLUX / name, tmp_path / name)
    config = json.loads((FLUX / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(SystemExit):
        train.parse_config(["--model", str(tmp_path), "--out_dir", str(tmp_path / "run")])
    assert sentence in capsys.readouterr().err


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


def of_training(lines):
    return [line for line in lines if "reward" in line]


def test_two_runs_with_the_same_seed_are_equal_to_the_last_bit(alone, five, tmp_path):
    assert train.main([*SHORT, *five, "--iterations", "4", "--out_dir", str(tmp_path)]) is None
    assert lines_of(tmp_path, seconds=False) == lines_of(alone, seconds=False)


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
        alone, five, tmp_path, monkeypatch, signals):
    command = [*SHORT, *five, "--iterations", "4", "--out_dir", str(tmp_path), "--resume"]
    score, scored = train.score, []

    def interrupted(*args):             # Ctrl-C while the third iteration is scored
        scored.append(1)
        if len(scored) == 3:
            signal.raise_signal(signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(train, "score", interrupted)
    assert train.main(command) is None
    assert {path.name for path in tmp_path.iterdir()} >= {
        "checkpoint-2", "checkpoint-3", "before_after.png", "curve.png", "log.jsonl"}
    monkeypatch.setattr(train, "score", score)
    assert train.main(command) is None
    once, mended = (lines_of(out, seconds=False) for out in (alone, tmp_path))
    assert [line["iter"] for line in of_training(once)] == [1, 2, 3, 4]
    assert of_training(mended) == of_training(once) and mended[-1] == once[-1]  # an evaluation
    a, b = (weights_of(out, 4) for out in (alone, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_saved_before_its_first_update_goes_on_as_if_it_had_not_been(tmp_path):
    """If there are no moments yet, torch makes them at a save, by a step that must not count."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def moon(images, prompts):\n"             # all groups of another prompt are flat
        "    return torch.stack([i.mean() * (p == 'the moon') for i, p in zip(images, prompts)])\n",
        encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a dog\na bus\na cat\nthe moon\n", encoding="utf-8")
    settings = [*SHORT, "--rewards", f"{tmp_path}/own.py:moon", "--prompts",
                f"{tmp_path}/prompts.txt", "--prompts_per_iteration", "1", "--iterations", "4"]
    for name, save_every in (("often", "1"), ("once", "0")):
        out = ["--save_every", save_every, "--out_dir", str(tmp_path / name)]
        assert train.main([*settings, *out]) is None
    flat = [line["flat_groups"] for line in lines_of(tmp_path / "once")]
    assert flat[0] == 1 and 0 in flat                           # a save came before an update
    often, once = (weights_of(tmp_path / name, 4) for name in ("often", "once"))
    assert all(torch.equal(often[name], once[name]) for name in once)


def test_watching_a_scorer_does_not_change_the_adapters_that_a_run_begins_with(tmp_path):
    norms = []
    for watched in ("", "judge"):
        command = [*SHORT[:-1], watched, "--lora_rank", "3", "--iterations", "1"]
        assert train.main([*command, "--out_dir", str(tmp_path / f"run{watched}")]) is None
        norms.append(of_training(lines_of(tmp_path / f"run{watched}"))[0]["grad_norm"])
    assert norms[0] == norms[1]


def test_an_evaluation_in_which_a_reward_failed_is_made_after_resume(
        alone, five, tmp_path, monkeypatch, capsys):
    preference = rewards.find("preference")[0]
    command = [*SHORT, *five, "--eval_every", "2", "--iterations", "4", "--out_dir", str(tmp_path)]
    calls, score = [], preference.score

    def fails_once(self, pixels, prompts):
        calls.append(len(pixels))
        if len(calls) == failing:
            raise RuntimeError("the server is down")
        return score(self, pixels, prompts)

    failing = None
    monkeypatch.setattr(preference, "score", fails_once)
    assert train.main([*command, "--overwrite"]) is None
    whole, sizes = lines_of(tmp_path, seconds=False), list(calls)
    calls.clear()
    failing = sizes.index(8, sizes.index(8) + 1) + 2            # the call after two iterations' 8s
    assert train.main([*command, "--overwrite"]) == 1
    assert "the server is down" in capsys.readouterr().err
    assert len(lines_of(tmp_path)) < len(whole)
    assert train.main([*command, "--resume"]) is None
    assert lines_of(tmp_path, seconds=False) == whole


def test_the_same_command_with_resume_begins_a_run_and_continues_it(
        five, alone, tmp_path, capsys):
    command = [*SHORT, *five, "--iterations", "2", "--out_dir", str(tmp_path), "--resume"]
    assert train.main(command) is None
    assert f"resume     no checkpoint in {tmp_path}, so the run begins" in capsys.readouterr().out
    first = of_training(lines_of(tmp_path))
    assert train.main(command) is None                          # the run has ended
    assert f"resume     continues from {tmp_path}/checkpoint-2" in capsys.readouterr().out
    assert of_training(lines_of(tmp_path)) == first
    command[command.index("--iterations") + 1] = "3"            # now it should go on
    assert train.main(command) is None
    assert "run        iterations 3 to 3" in capsys.readouterr().out
    expected = of_training(lines_of(alone, seconds=False))[:3]
    assert of_training(lines_of(tmp_path, seconds=False)) == expected


def test_resume_begins_a_run_if_there_is_no_checkpoint(tmp_path):
    out = tmp_path / "run"
    for name in ("log.jsonl", "config.json", "checkpoint-2/model_index.json", "curve.png",
                 "checkpoint.new/state/config.json", "checkpoint-1.old/state/state.pt",
                 "samples/000000.png", "thesis.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"iter": 1, "reward": 7}\n', encoding="utf-8")
    begun = stub_run(tmp_path, Stub(), resume=True, overwrite=False)
    run.check_out_dir(begun.cfg)
    assert begun.iteration == 0 and begun.resumed is None and begun.lines() == []
    names = {path.name for path in out.iterdir()} - {"tensorboard", ".lock"}
    assert names == {"config.json", "log.jsonl", "neighbor_grpo.py", "samples", "thesis.txt",
                     "checkpoint-2"}                            # has no state: not from a run
    assert not any((out / "samples").iterdir())


def test_adapters_to_start_from_in_the_folder_of_a_run_are_never_deleted(tmp_path, capsys):
    adapters = tmp_path / "run/checkpoint-2/pytorch_lora_weights.safetensors"
    adapters.parent.mkdir(parents=True)
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, adapters)
    (tmp_path / "run/log.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit):
        train.parse_config(["--init_lora", str(adapters.parent), "--overwrite",
                            "--out_dir", str(tmp_path / "run")])
    assert "where a new run would delete it" in capsys.readouterr().err
    assert adapters.is_file()


def test_a_checkpoint_of_another_program_is_never_replaced(tmp_path, capsys):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/optimizer.bin").write_text("", encoding="utf-8")
    for how in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(SystemExit):
            train.parse_config(["--out_dir", str(tmp_path), *how])
        assert "is not a run, and holds checkpoint-2" in capsys.readouterr().err


def test_a_link_in_a_run_is_deleted_and_what_it_points_to_is_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").symlink_to(tmp_path / "elsewhere")
    discard(tmp_path / "samples")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("how, leftover", [
    ("--resume", "log.jsonl"), ("--overwrite", "log.jsonl"),
    ("--overwrite", "checkpoint-2/state/state.pt")])
def test_a_base_model_in_the_folder_of_a_run_is_never_deleted(
        how, leftover, tmp_path, capsys):
    model = tmp_path / "run/checkpoint-2"
    shutil.copytree(FLUX, model)
    (tmp_path / "run" / leftover).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / leftover).write_text("", encoding="utf-8")
    with pytest.raises(SystemExit):
        train.parse_config(["--model", str(model), "--out_dir", str(tmp_path / "run"), how])
    assert "where a new run would delete it" in capsys.readouterr().err
    assert (model / "model_index.json").is_file() and (tmp_path / "run" / leftover).is_file()


def test_overwriting_a_run_leaves_other_files_in_its_folder(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint-1/state").mkdir(parents=True)
    for name in ("thesis.txt", "log.jsonl", "checkpoint-1/state/state.pt"):
        (out / name).write_text("{}\n", encoding="utf-8")
    assert len(train_stub(tmp_path, Stub())) == 1               # the new run's one line
    names = sorted({path.name for path in out.iterdir()} - {"tensorboard"})
    assert names == ["config.json", "log.jsonl", "neighbor_grpo.py", "samples", "thesis.txt"]


def test_a_run_from_a_read_only_checkout_can_be_replaced(tmp_path, monkeypatch):
    shutil.copy(HERE / "neighbor_grpo.py", tmp_path)
    (tmp_path / "neighbor_grpo.py").chmod(0o444)
    monkeypatch.setattr(run, "HERE", tmp_path)
    books = stub_run(tmp_path, Stub())
    assert (books.out / "neighbor_grpo.py").stat().st_mode & stat.S_IWUSR


def test_a_run_is_resumed_only_with_its_own_settings(alone, five, tmp_path, capsys):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    command = [*SHORT, *five, "--iterations", "5", "--out_dir", str(tmp_path), "--resume"]
    with pytest.raises(SystemExit) as exit:
        train.main([*command, "--lr", "1e-3"])
    assert exit.value.code == 2
    assert "lr is 0.001, but was 5e-05 in the run to resume" in capsys.readouterr().err
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"iter": 5, "rew')                           # cut off by a kill or a full disk
    assert train.main(command) is None
    assert [line["iter"] for line in of_training(lines_of(tmp_path))] == [1, 2, 3, 4, 5]


def test_a_resumed_run_may_change_only_settings_that_keep_its_numbers_or_set_its_length(tmp_path):
    begun = stub_run(tmp_path, Saved(), eval_every=1, save_every=1)
    begun.iteration = 1
    begun.save()
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


def test_the_prompts_of_a_resumed_run_may_be_in_another_file_but_must_be_the_same(tmp_path):
    begun = stub_run(tmp_path, Saved(), eval_prompts=str(tmp_path / "prompts.txt"))
    begun.iteration = 1
    begun.save()
    moved, changed = tmp_path / "moved.txt", tmp_path / "changed.txt"
    shutil.copy(tmp_path / "prompts.txt", moved)
    changed.write_text("a\nb\nc\nd\n", encoding="utf-8")
    for name in ("prompts", "eval_prompts"):
        with_file = lambda path: dataclasses.replace(begun.cfg, **{name: str(path)})
        run.check_resumed(with_file(moved), begun.out / "checkpoint-1")
        with pytest.raises(ValueError, match=f"^{name} differs from the run to resume"):
            run.check_resumed(with_file(changed), begun.out / "checkpoint-1")


def test_a_run_without_evaluations_is_not_resumed_with_them(tmp_path):
    begun = stub_run(tmp_path, Saved(), eval_every=0)
    begun.iteration = 1
    begun.save()
    with pytest.raises(ValueError, match="eval_every was 0 in the run to resume"):
        cfg = dataclasses.replace(begun.cfg, eval_every=5)
        run.check_resumed(cfg, begun.out / "checkpoint-1")


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


def test_an_evaluation_compares_with_the_base_prompt_by_prompt(alone):
    base, last = [line for line in lines_of(alone) if "eval_preference" in line]
    assert list(base) == ["iter", "eval_preference", "eval_preference_stderr",
                          "eval_preference_gain",
                          "eval_preference_gain_stderr", "velocity_ratio", "fallen"]
    assert base["velocity_ratio"] == 1 and base["fallen"] == last["fallen"] == 0
    keys = "iter", "eval_preference_gain", "eval_preference_gain_stderr"
    assert [base[key] for key in keys] == [0, 0, 0]
    gain = last["eval_preference"] - base["eval_preference"]
    assert last["iter"] == 4 and last["eval_preference_gain"] == pytest.approx(gain, abs=1e-6)


def watched(tmp_path, monkeypatch, gains, lengths=(1.0, 1.0)):
    """Evaluate a base, and then a model whose scores differ from the base's by `gains`, in standard
    errors over the prompts. Prompts differ much more than that. -> the last line of the log"""
    n = 9
    prompts = 100 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.linspace(-1, 1, n)[:, None]
    stderr = noise.std() / n ** 0.5
    answers = [({name: prompts for name in gains}, lengths[0]),
               ({name: prompts + noise + gain * stderr for name, gain in gains.items()},
                lengths[1])]

    def evaluated(*_, chosen, **__):
        scores, length = answers.pop(0)
        return torch.zeros(n, 1, 3, 8, 8, dtype=torch.uint8), scores, torch.full((n, 1), length)

    monkeypatch.setattr(run, "evaluate", evaluated)
    (tmp_path / "nine.txt").write_text("".join(f"prompt {i}\n" for i in range(n)), encoding="utf-8")
    books = stub_run(tmp_path, Stub(), eval_scorers="judge,flawless", prompts=str(
        tmp_path / "nine.txt"), eval_prompts=str(tmp_path / "nine.txt"))
    for books.iteration in (0, 5):
        books.evaluate()
    return books.lines()[-1]


@pytest.mark.parametrize("reward, judge, flawless, named", [
    (3.1, -3.1, 0, ["judge"]), (9, -4, -5, ["judge", "flawless"]), (3.1, -2.9, 9, []),
    (2.9, -9, -9, []), (-9, -9, -9, []), (9, 9, 2.9, []), (9, math.nan, -4, ["flawless"])])
def test_a_watched_scorer_that_falls_while_the_reward_rises_is_named_if_both_exceed_three_errors(
        reward, judge, flawless, named, tmp_path, monkeypatch, capsys):
    line = watched(tmp_path, monkeypatch, dict(brightness=reward, judge=judge, flawless=flawless))
    warnings = [text for text in capsys.readouterr().out.splitlines() if "exploited" in text]
    assert line["fallen"] == len(named) and len(warnings) == bool(named)
    if named:
        start = f"eval 005: {', '.join(named)} fell below the base while brightness rose"
        assert warnings[0].startswith(start) and "When it goes wrong" in warnings[0]


def test_the_log_has_the_length_of_the_velocity_as_a_multiple_of_the_bases(tmp_path, monkeypatch):
    line = watched(tmp_path, monkeypatch, dict(brightness=1.0), lengths=(2.0, 2.5))
    assert line["velocity_ratio"] == pytest.approx(1.25)


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
        tmp_path, monkeypatch):
    class Loaded(Saved):
        cut = lambda self, prompts: {}

    seeds, trained_on, evaluated = [], [], []
    monkeypatch.setattr(train, "load", lambda cfg: seeds.append(torch.initial_seed()) or Loaded())
    monkeypatch.setattr(rewards, "load_all", lambda names, *_: dict.fromkeys(names, brightness))
    monkeypatch.setattr(Run, "evaluate", lambda books: evaluated.append(books.iteration))

    def algorithm(cfg, model, scorers, books):
        trained_on.append(list(scorers))
        assert list(books.scorers) == ["preference", "judge"]
        train.train(cfg, model, scorers, books)

    command = ["--rewards", "preference", "--eval_scorers", "judge", "--seed", "7", "--resume",
               "--out_dir", str(tmp_path)]
    for iterations in ("3", "4"):
        train.main([*command, "--iterations", iterations], algorithm=algorithm)
    assert seeds == [7, 7] and trained_on == [["preference"]] * 2       # 7: for adapters
    assert [n for n in evaluated if n == 0] == [0]                      # the second one resumes


def test_pictures_of_the_same_prompts_and_noise_are_written_at_every_evaluation(five, tmp_path):
    command = [*SHORT, *five, "--eval_every", "1", "--eval_scorers", "judge", "--iterations", "2",
               "--lr", "1e-12", "--out_dir", str(tmp_path)]
    assert train.main(command) is None
    names = ["000000.png", "000001.png", "000002.png"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    base, one, two = (np.array(Image.open(tmp_path / "samples" / name)).astype(int)
                      for name in names)
    pixels, height, left = 128, 134, 84         # a row of pictures; with its gap; its label
    above, below = slice(0, pixels), slice(height, height + pixels)
    assert np.array_equal(one[above], two[above])               # the base is above
    assert np.array_equal(one[above, left:], base[above, left:])
    moved = np.abs(two[below, left:] - base[above, left:])      # the aligned model is below; its
    assert moved.max() <= 2                                     # weights have hardly moved
    evaluations = [line for line in lines_of(tmp_path) if "eval_preference" in line]
    assert [line["iter"] for line in evaluations] == [0, 1, 2]
    assert all(abs(line["eval_judge_gain"]) < 1e-4 for line in evaluations)


def fake_wandb(monkeypatch, init):
    module = types.ModuleType("wandb")
    module.__spec__, module.init = importlib.machinery.ModuleSpec("wandb", None), init
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_every_line_of_the_log_is_sent_to_wandb(tmp_path, monkeypatch):
    seen = []

    def init(project, config, dir):
        seen.append((project, config["sigma"]))
        return types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))

    fake_wandb(monkeypatch, init)
    lines = train_stub(tmp_path, Stub(), iterations=2, wandb="neighbours")
    assert seen[0] == ("neighbours", 0.3)
    assert seen[1:] == [(line.pop("iter"), line) for line in lines]


def test_a_run_continues_without_wandb_if_that_fails(tmp_path, monkeypatch, capsys):
    def refuses(**settings):
        raise RuntimeError("no API key")

    def log(numbers, step):
        raise RuntimeError("no network")

    fake_wandb(monkeypatch, refuses)
    assert len(train_stub(tmp_path, Stub(), iterations=2, wandb="neighbours")) == 2
    assert "wandb is left out: no API key" in capsys.readouterr().err
    fake_wandb(monkeypatch, lambda **settings: types.SimpleNamespace(log=log))
    assert len(train_stub(tmp_path, Stub(), iterations=2, wandb="neighbours")) == 2
    said = capsys.readouterr().err
    assert said.count("wandb is left out: no network") == 1


def test_a_failing_scorer_that_is_only_watched_never_ends_a_run_and_its_score_is_missing(
        five, tmp_path, monkeypatch, capsys):
    judge = rewards.find("judge")[0]
    calls, score = [], judge.score

    def fails_once(self, pixels, prompts):
        calls.append(len(pixels))
        if len(calls) == 5:                             # two trials, the base, a first evaluation
            raise RuntimeError("the server is down")
        return score(self, pixels, prompts)

    monkeypatch.setattr(judge, "score", fails_once)
    out = tmp_path / "run"
    short = [word for word in SHORT if word != ""]      # watch the judge, which SHORT does not
    command = [*short, "judge", *five, "--eval_every", "1", "--iterations", "3"]
    assert train.main([*command, "--out_dir", str(out)]) is None
    evals = [line for line in lines_of(out) if "eval_preference" in line]
    missing = [line["eval_judge"] is None for line in evals]
    assert missing == [False, False, True, False]
    assert all(line["eval_preference"] is not None for line in evals)
    said = capsys.readouterr()
    assert "judge missing" in said.out
    assert "a score that is only watched is left out: scorer 'judge' failed" in said.err


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

class Saved(Stub):
    """A stub that can be saved."""

    def save(self, path, weights=None):
        (path / "model_index.json").write_text("{}", encoding="utf-8")


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    books = stub_run(tmp_path, Saved(), iterations=4, save_every=1, keep=2)
    train.train(books.cfg, books.model, {"brightness": brightness}, books)
    books.finish()
    names = sorted(path.name for path in books.out.glob("checkpoint*"))
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    def killed(path, ignore_errors=False):
        if not ignore_errors and (path / "state").exists():
            raise KeyboardInterrupt

    (tmp_path / "checkpoint-3/state").mkdir(parents=True)
    (tmp_path / "checkpoint-3/state/state.pt").touch()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "checkpoint-3")
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_is_written_even_if_the_system_cannot_sync(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sync", raising=False)              # Windows
    books = stub_run(tmp_path, Saved())
    books.iteration = 1
    books.save()
    assert checkpoints(books.out) == [books.out / "checkpoint-1"]


def test_untrained_parts_are_copied_from_the_base_byte_by_byte(alone):
    files = [path for path in FLUX.rglob("*") if path.is_file()]
    names = [path.relative_to(FLUX) for path in files if path.suffix != ".md"]
    for name in names:
        ours = (alone / "checkpoint-4" / name).read_bytes()
        trained = name.parts[0] == "transformer" and name.suffix == ".safetensors"
        assert (ours == (FLUX / name).read_bytes()) != trained, name
    assert len(names) > 10


@pytest.mark.parametrize("damage", ["state/state.pt", "state/config.json",
                                    "state/sharded/.metadata", "state/sharded/__0_0.distcp"])
def test_the_error_for_a_damaged_checkpoint_names_it_and_says_what_to_do(
        damage, alone, five, tmp_path, capsys):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "checkpoint-4" / damage, 10)
    command = [*SHORT, *five, "--iterations", "5", "--out_dir", str(tmp_path), "--resume"]
    try:
        assert train.main(command) == 1
    except SystemExit as exit:
        assert exit.code == 2
    said = capsys.readouterr().err
    assert "checkpoint-4 is broken" in said
    assert "--resume goes on from the checkpoint before it" in said


def test_a_run_continues_from_the_checkpoint_before_even_if_a_crash_garbled_the_log(
        alone, five, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b'{"iter": 3, "reward": 7}\n\nnull\n\xff\xfe\n{"iter": 4, "rew')
    command = [*SHORT, *five, "--iterations", "5", "--out_dir", str(tmp_path), "--resume"]
    assert train.main(command) is None
    ours, theirs = of_training(lines_of(tmp_path)), of_training(lines_of(alone))
    assert [line["iter"] for line in ours] == [1, 2, 3, 4, 5]
    assert ours[3]["reward"] == theirs[3]["reward"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_older_ones(
        alone, five, tmp_path, capsys):
    """As on a full disk: no file may exceed 1 MB, but one of the second checkpoint would."""
    resource = pytest.importorskip("resource")                  # not on Windows
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    command = [*SHORT, *five, "--iterations", "4", "--out_dir", str(tmp_path), "--resume"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert train.main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "checkpoint-4 could not be written" in said
    assert "checkpoint-2 is whole, and --resume goes on from there" in said
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]
    assert {path: path.read_bytes() for path in files} == before
    assert train.main(command) is None                          # with room again
    assert lines_of(tmp_path)[-2]["reward"] == lines_of(alone)[-2]["reward"]


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
import sys, time
from pathlib import Path
import run
lock = run.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_even_if_it_is_killed(
        tmp_path, capsys, monkeypatch):
    command = [*SHORT, "--iterations", "1", "--out_dir", str(tmp_path)]
    first = subprocess.Popen([sys.executable, "-c", LOCK, str(tmp_path)], cwd=HERE,
                             stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    (tmp_path / "log.jsonl").touch()
    for how in ("--resume", "--overwrite"):
        with pytest.raises(SystemExit) as exit:
            train.main([*command, how])
        said = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and f"another run is writing into {tmp_path}" in said
    monkeypatch.setattr(run, "RANK", 1)                         # of the first run's own processes
    run.check_out_dir(train.parse_config([*command, "--resume"]))
    monkeypatch.setattr(run, "RANK", 0)
    first.kill()
    first.wait()
    assert train.main([*command, "--resume"]) is None
    assert ".lock" not in capsys.readouterr().out.splitlines()[-1]
    assert train.main([*command, "--resume"]) is None           # of this process: it was released


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
        five, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no font")

    for name in ("picture_grid", "draw_curve"):
        monkeypatch.setattr(run, name, fails)
    ended, out = [], tmp_path / "run"
    command = [*SHORT, *five, "--iterations", "1", "--out_dir", str(out)]
    thread = threading.Thread(target=lambda: ended.append(train.main(command)))
    thread.start()
    thread.join()
    assert ended == [None] and (out / "checkpoint-1/model_index.json").is_file()
    said = capsys.readouterr().err
    assert f"{out}/samples/000001.png is left out: no font" in said
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
        five, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "check_option", lambda *_: None)     # it refuses lr above 1
    out = tmp_path / "run"
    command = [*SHORT, *five, "--iterations", "3", "--lr", "1e30", "--out_dir", str(out)]
    assert train.main(command) == 1
    said = capsys.readouterr().err
    assert "no longer finite; lower lr (now 1e+30); no checkpoint was written before" in said
    assert not list(out.glob("checkpoint-*"))


def test_running_out_of_memory_names_the_settings_that_need_less(tmp_path, monkeypatch, capsys):
    def velocity(self, x, t, cond):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(Flux, "velocity", velocity)
    assert train.main([*SHORT, "--iterations", "1", "--out_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "Tried to allocate 20 GiB" in said
    for setting in ("text_encoder_device", "checkpoint_blocks", "batch", "fsdp",
                    "lora_rank", "resolution"):
        assert setting in said
        assert setting in {field.name for field in dataclasses.fields(train.Config)}


def test_an_error_of_the_compiler_names_the_setting_that_switches_it_off(capsys):
    def work():
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler")

    assert machine.explain_errors(work) == 1
    said = capsys.readouterr().err
    assert "--no-compile" in said and "no C++ compiler" in said


def test_a_signal_lets_the_current_iteration_end_but_a_second_ctrl_c_does_not(signals):
    for name in signals:
        stopped, before = [], signal.getsignal(getattr(signal, name))
        with machine.stopping(lambda: stopped.append(1)):
            signal.raise_signal(getattr(signal, name))
            assert stopped == [1]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(getattr(signal, name)) == before


def test_a_signal_that_is_ignored_stays_ignored(signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # as with nohup, or a shell's &
    with machine.stopping(lambda: pytest.fail("stopped")):
        signal.raise_signal(signal.SIGINT)
