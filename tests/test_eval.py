"""
eval.py: pictures, scores, tables and drawings.

    python -m pytest -q tests/test_eval.py
    python -m pytest -q tests/test_eval.py --slow       # with tests of several processes
"""
import functools, io, json, math, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
import eval as evaluation
import rewards
from diffusers import FluxPipeline
from eval import (diversity, draw_curve, evaluate, follow, label_of, mean_and_stderr, picture_grid,
                  sample)
import machine
from machine import read_prompts
from model import Flux
from safetensors.torch import load_file, save_file
from solvers import schedule

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parents[1]
FLUX = HERE / "tiny/flux"


# ------------------------------------------------------------------------------------------------
# evaluations of two models, with five prompts and two pictures each

@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A checkpoint like those of train.py: its weights differ from the base, and it has a log."""
    run = tmp_path_factory.mktemp("world") / "run"
    model = Flux(FLUX, 64)
    with torch.no_grad():
        for w in model.transformer.parameters():
            w.mul_(1.02)
    model.save(run / "checkpoint-3")
    (run / "checkpoint-3/state").mkdir()
    config = dict(rewards="preference=some/where,jpeg", solver="dpmpp_2m")
    (run / "checkpoint-3/state/config.json").write_text(json.dumps(config), encoding="utf-8")
    log = [dict(iter=0, eval_preference=1.0)] + [
        dict(iter=i, seconds_rollout=1.0, seconds_reward=0.5, seconds_update=i, nfe_old=8,
             nfe_theta=4 / 3) for i in (1, 2)]
    text = "\n".join(["\0\0\0", "[1]", *map(json.dumps, log), '{"iter": 3, "seconds_ro'])
    (run / "log.jsonl").write_text(text, encoding="utf-8")      # some lines are garbled
    prompts = (HERE / "tiny/prompts/test_concept.txt").read_text(encoding="utf-8")
    (run.parent / "prompts.txt").write_text("".join(prompts.splitlines(True)[:5]), encoding="utf-8")
    return run / "checkpoint-3"


def command_of(out, aligned, *more):
    """The arguments that evaluate both models with few steps. `more` can override them."""
    prompts = aligned.parents[1] / "prompts.txt"
    return ["--model", str(FLUX), "--checkpoint", str(aligned), "--prompts", str(prompts),
            "--steps", "2", "--images_per_prompt", "2", "--batch", "4",
            "--scorers", "preference,judge",
            "--out_dir", str(out), *more]


def run(out, aligned, *more):
    code = evaluation.main(command_of(out, aligned, *more))
    return code, results_in(out) if code == 0 else None


def results_in(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]


def numbers(results, digits=6):
    """The numbers of the tables, rounded, because the last bits of a score depend on its batch."""
    return [{key: round(value, digits) for key, value in row.items()
             if key.startswith(("preference", "judge", "diversity"))} for row in results]


def picture(file):
    """(3, H, W) uint8"""
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def finished(aligned, tmp_path_factory):
    """A finished evaluation: its folder and its results."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(out, aligned)[1]


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished evaluation, to be changed."""
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def sampled(monkeypatch):
    """A list of the indices of all prompts that are sampled, in order."""
    recorded, sample = [], evaluation.sample

    def sample_and_record(model, prompts, indices, *more):
        recorded.extend(indices)
        return sample(model, prompts, indices, *more)

    monkeypatch.setattr(evaluation, "sample", sample_and_record)
    return recorded


def test_a_row_has_the_means_standard_errors_and_gains_of_its_pictures(finished, aligned):
    out, results = finished
    prompts, scorer = read_prompts(aligned.parents[1] / "prompts.txt"), rewards.load("preference")
    each = []
    for label in ("tiny-flux", "run-checkpoint-3"):
        images = [[picture(out / label / f"pictures/{i:05d}-{k}.png") / 255 for k in range(2)]
                  for i in range(5)]
        images = torch.stack([torch.stack(two) for two in images])          # (5, 2, 3, H, W)
        scores = [scorer(two, [prompt] * 2) for two, prompt in zip(images, prompts)]
        each.append(torch.stack(scores).double().mean(1))                   # (5,)
    for row, scores in zip(results, each, strict=True):
        gain = scores - each[0]
        expected = (scores.mean(), scores.std() / 5**0.5, gain.mean(), gain.std() / 5**0.5)
        found = [row[f"preference{key}"] for key in ("", "_stderr", "_gain", "_gain_stderr")]
        assert found == pytest.approx([x.item() for x in expected], abs=1e-4)
    distance = (images[:, 0] - images[:, 1]).pow(2).mean((1, 2, 3)).sqrt().mean().item()
    assert results[1]["diversity"] == pytest.approx(distance, rel=1e-5)
    assert results[1]["preference_gain"] != 0 and Image.open(out / "grid.png").size[0] > 5 * 128


def test_table_1_has_the_cost_of_the_run_and_underlines_the_rewards_it_was_trained_on(finished):
    out, results = finished
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()[:4]
    head, _, base, row = (line.split(" | ") for line in lines)
    assert [cell.strip("| ") for cell in head] == [
        "Method", "Solver_old", "NFE_old ↓", "NFE_theta ↓", "s / Iter. ↓", "preference ↑",
        "judge ↑"]
    assert base[1:5] == ["N/A"] * 4 and "<u>" not in "".join(base)
    assert row[1:5] == ["DPM++", "8", "1.33", "3.00"]           # (1 + 0.5 + 1 + 1 + 0.5 + 2) / 2 s
    reward = f"{results[1]['preference']:.4f} ± {results[1]['preference_stderr']:.4f}"
    assert row[5] == f"<u>{reward}</u>" and row[6].startswith(f"{results[1]['judge']:.4f} ±")


def test_pickscore_is_printed_over_100_as_in_table_1():
    row = dict(label="a", solver="N/A", nfe_old="N/A", nfe_theta="N/A", seconds="N/A",
               trained_on=[], diversity=None, pickscore=22.71, pickscore_stderr=0.5,
               pickscore_gain=1.0, pickscore_gain_stderr=0.0)
    table = evaluation.tables([row], ["pickscore"])
    assert "| 0.2271 ± 0.0050 |" in table and "Pick / 100 ↑" in table
    assert "| +0.0100 ± 0.0000 | - |" in table


def test_pictures_depend_only_on_the_prompts_index_and_training_evaluates_like_eval(
        finished, aligned):
    prompts, model = read_prompts(aligned.parents[1] / "prompts.txt"), Flux(FLUX, 64)
    scorers, chosen = {"preference": rewards.load("preference")}, [4, 0, 3, 1, 2]
    images, scores, _ = evaluate(model, scorers, prompts, schedule(2), "dpmpp_2m", chosen, batch=2)
    assert images.shape == (5, 1, 3, 64, 64) and scores["preference"].shape == (5, 1)
    folder = finished[0] / "tiny-flux/pictures"                 # by main, in other batches
    stored = [json.loads((folder / f"{i:05d}.json").read_text(encoding="utf-8"))["preference"][0]
              for i in chosen]
    assert_close(scores["preference"][:, 0], torch.tensor(stored), rtol=0, atol=1e-3)
    for i, image in zip(chosen, images[:, 0]):                  # pixels may round the other way
        assert (image.int() - picture(folder / f"{i:05d}-0.png").int()).abs().max() <= 1
    alone = sample(model, [prompts[3]], [3], schedule(2), "dpmpp_2m", n=2)
    both = torch.stack([picture(folder / f"00003-{k}.png") for k in range(2)])
    assert (alone * 255 - both).abs().max() <= 1 and (both[0] != both[1]).any()


class Model:
    device, latent_shape = torch.device("cpu"), (2, 1, 2)               # not only (N, C)

    def encode(self, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    def velocity(self, x, t, lengths):
        v = torch.tensor([[[3.0, 4.0]], [[0.0, 5.0]]]).expand_as(x)
        return lengths.repeat_interleave(len(x) // len(lengths))[:, None, None, None] * t * v


def test_the_length_of_a_velocity_is_its_root_mean_square_averaged_over_the_steps():
    ts = torch.tensor([1.0, 0.6, 0.5, 0.0])
    _, lengths = follow(Model(), ["a", "abc"], [0, 1], ts, "ddim")
    one = (50 / 4) ** 0.5 * (1 + 0.6 + 0.5) / 3
    assert lengths.tolist() == pytest.approx([one, 3 * one])


def test_the_noise_of_a_prompt_is_standard_normal_from_a_generator_of_its_own():
    x, _ = follow(Model(), ["", ""], [7, 2], schedule(3), "ddim", n=2, seed=5)  # which do not move
    drawn = [torch.randn(2, 2, 1, 2, generator=torch.Generator().manual_seed(5_000_015 + i))
             for i in (7, 2)]
    assert torch.equal(x, torch.cat(drawn))


def test_a_mean_has_a_standard_error_over_prompts_and_diversity_is_a_distance_of_pixels():
    scores = torch.tensor([[1.0, 3.0], [4.0, 4.0], [5.0, 7.0]])             # prompts: 2, 4, 6
    assert mean_and_stderr(scores) == pytest.approx((4, 2 / 3**0.5))
    assert mean_and_stderr(torch.tensor([[1.0, 3.0]])) == (2, 0)
    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    pairs = [(black, white), (white, white), (black, white / 2)]
    pairs = torch.stack([torch.stack(pair) for pair in pairs])              # (3, 2, 3, 8, 8)
    assert_close(diversity(pairs), torch.tensor([[1.0], [0.0], [0.5]]))


# ------------------------------------------------------------------------------------------------
# files in --out_dir

def test_a_stopped_evaluation_continues_and_makes_nothing_twice(
        finished, aligned, tmp_path, monkeypatch, sampled, capsys):
    judge = rewards.find("judge")[0]
    scored, score = [], judge.score

    def breaks(self, pixels, prompts):
        scored.append(len(pixels))
        if len(scored) == 5:
            raise KeyboardInterrupt
        return score(self, pixels, prompts)

    monkeypatch.setattr(judge, "score", breaks)
    assert run(tmp_path, aligned) == (1, None)
    assert "stopped at once" in capsys.readouterr().err
    assert sampled and not (tmp_path / "results.json").exists()
    assert numbers(run(tmp_path, aligned)[1]) == numbers(finished[1])
    assert len(sampled) == 10                                   # five prompts, two models
    before = len(scored)
    assert numbers(run(tmp_path, aligned)[1]) == numbers(finished[1]) and len(sampled) == 10
    assert len(scored) == before + 2                            # only load_all's two trials
    results = run(tmp_path, aligned, "--scorers", "preference,judge,jpeg")[1]
    assert len(sampled) == 10 and "jpeg" in results[0]          # a new scorer needs no new pictures


def test_a_grid_that_cannot_be_drawn_is_left_out(copied, aligned, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "draw_grid", lambda *_: 1 / 0)
    assert run(copied, aligned)[0] == 0
    assert "grid.png is left out: division by zero" in capsys.readouterr().err


def test_several_processes_divide_the_missing_prompts_and_not_all_prompts(
        copied, aligned, monkeypatch, sampled):
    for i in (0, 2, 4):                                         # process 0 would make all three
        (copied / f"tiny-flux/pictures/{i:05d}-1.png").unlink()
    monkeypatch.setattr(evaluation, "WORLD", 2)
    monkeypatch.setattr(evaluation, "RANK", 1)
    assert evaluation.main(command_of(copied, aligned)) == 0 and sampled == [2]


@pytest.mark.parametrize("more", [
    ["--steps", "3"], ["--seed", "1"], ["--guidance", "1.5"], ["--shift", "2.0"],
    ["--solver", "ddim"], ["--resolution", "32"], ["--resolution", "64x32"],
    ["--images_per_prompt", "1"]])
def test_pictures_with_other_settings_are_not_mixed_in(finished, aligned, more, capsys):
    with pytest.raises(SystemExit) as exit:
        run(finished[0], aligned, *more)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and f"holds pictures made with {more[0][2:]} " in error
    assert f", not {more[1]}; use --overwrite or another --out_dir" in error


def test_pictures_of_other_prompts_or_weights_are_not_mixed_in(
        copied, finished, aligned, tmp_path, capsys):
    (tmp_path / "others.txt").write_text("a\nb\nc\nd\ne\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(copied, aligned, "--prompts", str(tmp_path / "others.txt"))
    assert "made with other prompts; use" in capsys.readouterr().err
    moved = tmp_path / "run/checkpoint-3"                       # the same name, other weights
    shutil.copytree(FLUX, moved)
    shutil.copy(aligned.parents[1] / "prompts.txt", tmp_path)
    with pytest.raises(SystemExit):
        run(copied, moved)
    assert "made with other weights; use" in capsys.readouterr().err
    (copied / "tiny-flux/notes.txt").write_text("a user's file", encoding="utf-8")
    again = run(copied, aligned, "--seed", "1", "--overwrite")[1]
    assert numbers(again) != numbers(finished[1])
    assert (copied / "tiny-flux/notes.txt").exists()            # it deletes only its own files


def test_incomplete_folders_and_broken_files_are_refused_or_replaced_and_never_counted(
        copied, finished, aligned, capsys):
    row = copied / "tiny-flux"
    scores, png = row / "pictures/00002.json", row / "pictures/00002-0.png"
    for text in ("", "[]", '{"preference": [1]}',
                 '{"preference": [NaN, 1.0], "judge": [0, 1e999]}', "null"):
        scores.write_text(text, encoding="utf-8")
        assert numbers(run(copied, aligned)[1]) == numbers(finished[1])
    png.write_bytes(png.read_bytes()[:500])
    assert run(copied, aligned)[0] == 1 and "is incomplete" in capsys.readouterr().err
    png.unlink()
    assert numbers(run(copied, aligned)[1]) == numbers(finished[1])
    (row / "settings.json").unlink()
    with pytest.raises(SystemExit):
        run(copied, aligned)
    assert "holds pictures made with other model; use" in capsys.readouterr().err
    shutil.rmtree(row / "pictures")                             # as a killed --overwrite leaves it
    assert numbers(run(copied, aligned)[1]) == numbers(finished[1])


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")

    def full(path, content):
        path.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError):
        evaluation.write_atomically(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


def test_pictures_are_scored_again_when_the_weights_of_a_scorer_have_changed(
        finished, aligned, tmp_path):
    named = ["--scorers", f"preference={tmp_path / 'w'}"]
    shutil.copytree(HERE / "tiny/preference", tmp_path / "w")
    first = run(tmp_path / "out", aligned, *named)[1]
    shutil.rmtree(tmp_path / "w")
    shutil.copytree(HERE / "tiny/judge", tmp_path / "w")
    again = run(tmp_path / "out", aligned, *named)[1]
    assert first[0]["preference"] == pytest.approx(finished[1][0]["preference"], abs=1e-5)
    assert again[0]["preference"] == pytest.approx(finished[1][0]["judge"], abs=1e-5)


def test_a_row_is_named_after_the_last_two_parts_of_its_path(tmp_path, monkeypatch):
    (tmp_path / "run/checkpoint-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run/checkpoint-3")
    assert label_of(".") == "run-checkpoint-3" and label_of("..") == f"{tmp_path.name}-run"
    assert label_of("black-forest-labs/FLUX.1-dev") == "black-forest-labs-FLUX.1-dev"
    root = Path(tmp_path.anchor)
    top = next(path for path in sorted(root.iterdir()) if path.is_dir() and path == path.resolve())
    assert label_of(top) == top.name                            # a model directly under the root
    for path in (root, top, ".", "..", "../..", "run/..", root / "nowhere", "a/b/../..", ""):
        assert (tmp_path / label_of(path)).parent == tmp_path and label_of(path)
    try:
        (tmp_path / "newest").symlink_to(tmp_path / "run/checkpoint-3")
    except OSError:
        pytest.skip("no symbolic links here")
    assert label_of(tmp_path / "newest") == "run-checkpoint-3"


# ------------------------------------------------------------------------------------------------
# settings

def test_solver_steps_shift_guidance_seed_and_the_number_of_prompts_have_an_effect(
        aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "load", functools.cache(rewards.load))
    settings = [[], ["--solver", "ddim"], ["--shift", "3"], ["--guidance", "1"], ["--steps", "4"],
                ["--seed", "3"], ["--num_prompts", "2"]]
    few = ["--checkpoint", "--steps", "3", "--scorers", "preference"]             # only the base
    results = [run(tmp_path / str(k), aligned, *few, *more)[1][0]["preference"]
               for k, more in enumerate(settings)]
    assert len(set(results)) == len(settings)
    two = sorted(path.name for path in (tmp_path / "6/tiny-flux/pictures").glob("*-0.png"))
    assert two == ["00001-0.png", "00003-0.png"]                # evenly spaced
    base, prompts = Flux(FLUX, 64, frozen=True), read_prompts(aligned.parents[1] / "prompts.txt")
    image = sample(base, [prompts[1]], [1], schedule(3, 3), "dpmpp_2m", n=2)[0]
    with_shift_3 = picture(tmp_path / "2/tiny-flux/pictures/00001-0.png")
    assert (image * 255 - with_shift_3).abs().max() <= 1


def test_pictures_may_be_wider_than_high_and_the_grid_keeps_their_shape(aligned, tmp_path):
    code, _ = run(tmp_path, aligned, "--checkpoint", "--steps", "1", "--scorers", "jpeg",
                  "--resolution", "64x32", "--num_prompts", "2")
    assert code == 0
    assert Image.open(tmp_path / "tiny-flux/pictures/00001-0.png").size == (64, 32)
    width, height = Image.open(tmp_path / "grid.png").size
    assert width == 96 + 2 * (128 + 6) and 64 < height < 128    # a row of two, prompts below


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_broken_model_ends_the_evaluation_and_draws_no_black_pictures(
        part, aligned, tmp_path, capsys):
    shutil.copytree(FLUX, tmp_path / "broken")
    file = tmp_path / f"broken/{part}/diffusion_pytorch_model.safetensors"
    save_file({name: w * math.nan for name, w in load_file(file).items()}, file)
    prompts = str(aligned.parents[1] / "prompts.txt")
    assert run(tmp_path / "out", tmp_path / "broken", "--prompts", prompts)[0] == 1
    assert "are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*broken/pictures/*.png"))


def test_adapters_are_sampled_on_top_of_their_base_and_changed_adapters_are_noticed(tmp_path):
    lora = tmp_path / "run/checkpoint-7"
    model = Flux(FLUX, 64, lora_rank=2)
    model.save(tmp_path / "start")                              # adapters begin as zero
    with torch.no_grad():
        for w in model.trained():
            w.normal_(std=0.3)
    model.save(lora)
    pipe = FluxPipeline.from_pretrained(FLUX)                   # diffusers adds up the same weights
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    (tmp_path / "p.txt").write_text("a red apple\nan octopus\n", encoding="utf-8")
    paths = [str(path) for path in (tmp_path / "start", lora, tmp_path / "fused")]
    command = ["--model", str(FLUX), "--checkpoint", *paths, "--prompts", str(tmp_path / "p.txt"),
               "--steps", "2", "--images_per_prompt", "1", "--scorers", "preference",
               "--out_dir", str(tmp_path / "out")]
    assert evaluation.main(command) == 0
    base, start, aligned, fused = results_in(tmp_path / "out")
    assert start["preference"] == base["preference"]
    assert aligned["preference"] == pytest.approx(fused["preference"], abs=1e-3)
    assert abs(aligned["preference"] - base["preference"]) > 0.01
    model.save(lora)                                            # the files have other times now
    with pytest.raises(SystemExit):
        evaluation.main(command)


def test_flux_is_evaluated_at_1024_pixels_in_50_steps_and_the_small_world_at_64_in_8(tmp_path):
    def settings(*given):
        args, rows = evaluation.parse_args([*given, "--out_dir", str(tmp_path)])
        return (args.steps, args.resolution, args.solver, args.images_per_prompt, args.scorers,
                rows[0].label)

    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n", encoding="utf-8")
    large = settings("--model", "black-forest-labs/FLUX.1-dev", "--prompts", str(prompts))
    assert large == (50, 1024, "ddim", 1, "hpsv2,pickscore,imagereward,clipscore,aesthetic",
                     "black-forest-labs-FLUX.1-dev")
    small = settings()
    assert small == (8, 64, "dpmpp_2m", 4, "preference,judge,named,flawless", "tiny-flux")
    assert settings("--resolution", "832x640")[1] == "832x640"
    assert settings("--resolution", "64x64")[1] == 64


@pytest.mark.parametrize("settings, sentence", [
    ("--model {tmp}", "is not a FluxPipeline directory"),
    ("--checkpoint {tmp}", "is not a FluxPipeline directory"),
    ("--checkpoint tiny/flux", "must differ in the last two parts of their paths"),
    ("--scorers beauty", "there is no scorer 'beauty'"),
    ("--scorers preference,preference", "scorer 'preference' is named twice"),
    ("--scorers ,", "scorers is empty"),
    ("--solver euler", "solver is euler, but must be ddim or dpmpp_2m"),
    ("--steps 0", "at least one step"),
    ("--shift 1000", "shift is 1000"),
    ("--guidance inf", "guidance is inf, but must be a number, or empty"),
    ("--seed -1", "seed is -1"),
    ("--num_prompts -1", "num_prompts 0"),
    ("--batch 0", "batch must be at least 1"),
    ("--device tpu", "device is tpu"),
    ("--resolution 60", "resolution is 60"),
    ("--resolution 64x", "resolution is 64x"),
    ("--prompts nowhere.txt", "nowhere.txt is not a prompt file"),
])
def test_eval_refuses_bad_settings_in_one_sentence_before_anything_is_loaded(
        settings, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "load_row", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a: pytest.fail("a scorer was loaded"))
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as exit:
        evaluation.main(f"--out_dir {tmp_path / 'out'} {settings}".format(tmp=tmp_path).split())
    assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_only_process_0_prints_bad_settings_even_if_another_process_finds_them(
        tmp_path, capsys, monkeypatch):
    for module in (evaluation, machine):
        monkeypatch.setattr(module, "RANK", 1)
    for bad in (["--steps", "0"], ["--steps", "many"], ["--nothing"]):
        with pytest.raises(SystemExit) as exit:
            evaluation.parse_args([*bad, "--out_dir", str(tmp_path)])
        assert exit.value.code == 2 and capsys.readouterr() == ("", "")
    for module in (evaluation, machine):
        monkeypatch.setattr(module, "RANK", 0)
    monkeypatch.setattr(machine, "gather_objects", lambda mine: [mine, "no such disk"])
    with pytest.raises(SystemExit) as exit:
        evaluation.parse_args(["--out_dir", str(tmp_path)])
    assert exit.value.code == 2 and "error: no such disk" in capsys.readouterr().err


def test_the_help_says_how_to_name_your_own_scorer(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse_args(["--help"])
    assert "FILE.py:FUNCTION" in capsys.readouterr().out


def test_a_terminal_without_unicode_shows_the_table_with_question_marks(
        finished, aligned, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert evaluation.main(command_of(finished[0], aligned)) == 0
    sys.stdout.flush()
    assert b"| NFE_old ? |" in screen.getvalue()


@pytest.mark.slow
def test_nothing_depends_on_the_encoding_of_the_locale(tmp_path):
    (tmp_path / "prompts.txt").write_text("ein grüner Bär\nснег\n", encoding="utf-8")
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:__main__",
              "-W", "error::EncodingWarning:prompts"]
    command = [sys.executable, *strict, "eval.py", "--prompts", str(tmp_path / "prompts.txt"),
               "--steps", "1", "--images_per_prompt", "1", "--out_dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "NFE_old ↓" in (tmp_path / "out/table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_of_torchrun_print_one_table_or_one_error(finished, aligned, tmp_path):
    def torchrun(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                   "--standalone", "eval.py", *command_of(tmp_path, aligned, *more)]
        return subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              capture_output=True, encoding="utf-8", timeout=300)

    done = torchrun()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| Method |") == 1 and "on 2 x cpu" in done.stdout
    for two, one in zip(numbers(results_in(tmp_path)), numbers(finished[1]), strict=True):
        assert two == pytest.approx(one, abs=1e-3)              # pixels may round the other way
    assert torchrun("--steps", "0").stderr.count("at least one step") == 1


# ------------------------------------------------------------------------------------------------
# drawings

def test_captions_show_accents_and_cyrillic_and_boxes_for_letters_that_the_font_lacks(tmp_path):
    def grid(caption):
        path = tmp_path / "grid.png"
        picture_grid(path, {"a": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, [caption])
        return np.asarray(Image.open(path))

    assert grid("a " * 40).shape[0] > grid("a").shape[0]  # long captions have several lines
    box = grid("雪")
    assert np.array_equal(box, grid("猫"))
    drawn = [grid(letter) for letter in "eéüñйжα"]
    assert not any(np.array_equal(image, box) for image in drawn)
    assert len({image.tobytes() for image in drawn}) == len(drawn)


def test_a_grid_shows_every_picture_in_its_place_and_keeps_its_shape(tmp_path):
    shades = torch.tensor([[0, 40, 80], [120, 160, 200]], dtype=torch.uint8)
    rows = {label: shades[row, :, None, None, None].expand(3, 3, 96, 64)
            for row, label in enumerate(["base", "aligned"])}
    picture_grid(tmp_path / "grid.png", rows, ["one", "two", "three"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    width, height, left, gap = 85, 128, 96, 6                   # 64 x 96, enlarged by 128 / 96
    assert grid.shape[1] == left + 3 * (width + gap)
    for row in range(2):
        for column in range(3):
            y, x = row * (height + gap), left + column * (width + gap)
            assert (grid[y : y + height, x : x + width] == shades[row, column].item()).all()
            assert (grid[y : y + height, x + width : x + width + gap] == 255).all()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: figures.append(self))
    return figures


def test_the_curve_has_a_panel_for_the_reward_and_one_for_each_held_out_score(drawn, tmp_path):
    evals = [dict(iter=i, eval_preference=0.2 + i, eval_preference_stderr=0.1,
                  eval_preference_gain=float(i),
                  eval_preference_gain_stderr=0.1) for i in (0, 12)]
    steps = [dict(iter=i, reward=None if i == 1 else float(i)) for i in range(1, 13)]
    draw_curve([evals[0], *steps, evals[1]], tmp_path / "curve.png")
    reward, held_out = drawn[0].axes
    assert [line.get_xdata().tolist() for line in reward.lines] == [
        list(range(1, 13)), [10, 11, 12]]                       # each reward; the mean of ten
    assert held_out.lines[0].get_xydata().tolist() == [[0, 0.2], [12, 12.2]]
    mean = reward.lines[1].get_ydata()                          # the first iteration has no reward
    assert mean.tolist() == pytest.approx([math.nan, 6.5, 7.5], nan_ok=True)
    draw_curve([], tmp_path / "curve.png")                      # a run without an iteration
    assert len(drawn[1].axes) == 1


def test_the_curve_marks_scores_that_fell_while_the_reward_rose(drawn, tmp_path):
    def line(it, fallen, preference, judge):
        gains = dict(preference=preference, judge=judge)
        return dict(iter=it, fallen=fallen) | {key: value for name, gain in gains.items() for
                    key, value in {f"eval_{name}": gain, f"eval_{name}_stderr": 0.1,
                                   f"eval_{name}_gain": gain,
                                   f"eval_{name}_gain_stderr": 0.1 if gain else None}.items()}
    draw_curve([line(0, 0, 0.0, 0.0), line(1, 0, 0.2, -0.5), line(2, 1, 0.5, -0.4),
                line(3, 1, 0.6, -0.2), line(4, 1, 0.6, None)], tmp_path / "curve.png")
    marks = [[mark.get_xydata().tolist() for mark in panel.lines if mark.get_marker() == "v"]
             for panel in drawn[0].axes]
    assert marks == [[], [], [[[2, -0.4]]]]         # reward; preference; judge
