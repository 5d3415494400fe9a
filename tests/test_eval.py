"""
eval.py: pictures, scores, tables and drawings. prompts.py and paper/votes.py have tests of their
own.

    python -m pytest -q tests/test_eval.py              # without several processes
    python -m pytest -q tests/test_eval.py --slow
"""
import functools, io, json, math, os, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
import eval as evaluation
import rewards
from diffusers import FluxPipeline
from eval import (diversity, draw_curve, evaluate, label_of, mean_and_stderr, picture_grid, sample,
                  wrap_text)
from model import Flux
from prompts import read_prompts
from solvers import schedule

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parents[1]
FLUX = HERE / "tiny/flux"


# ------------------------------------------------------------------------------------------------
# evaluations of two models, with five prompts and two pictures each

@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A checkpoint as train.py leaves it: other weights than the base's, a log beside it."""
    run = tmp_path_factory.mktemp("world") / "run"
    model = Flux(FLUX, 64)
    with torch.no_grad():
        for w in model.transformer.parameters():
            w.mul_(1.02)
    model.save(run / "checkpoint-3")
    (run / "checkpoint-3/state").mkdir()
    config = dict(rewards="clip=some/where,jpeg", solver="dpmpp_2m")
    (run / "checkpoint-3/state/config.json").write_text(json.dumps(config), encoding="utf-8")
    log = [dict(iter=0, eval_clip=1.0)] + [
        dict(iter=i, seconds_rollout=1.0, seconds_reward=0.5, seconds_update=i, nfe_old=8,
             nfe_theta=4 / 3) for i in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in log)
    (run / "log.jsonl").write_text(text, encoding="utf-8")
    prompts = (HERE / "tiny/prompts/test_concept.txt").read_text(encoding="utf-8")
    (run.parent / "prompts.txt").write_text("".join(prompts.splitlines(True)[:5]), encoding="utf-8")
    return run / "checkpoint-3"


def command_of(out, aligned, *more):
    """Both models with few steps, or what later settings say instead."""
    prompts = aligned.parents[1] / "prompts.txt"
    return ["--model", str(FLUX), "--checkpoint", str(aligned), "--prompts", str(prompts),
            "--steps", "2", "--images_per_prompt", "2", "--batch", "4", "--scorers", "clip,judge",
            "--out_dir", str(out), *more]


def run(out, aligned, *more):
    code = evaluation.main(command_of(out, aligned, *more))
    return code, results_in(out) if code == 0 else None


def results_in(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]


def numbers(results, digits=6):
    """What is in a table. A score may differ in its last bit with the batch it was in."""
    return [{key: round(value, digits) for key, value in row.items()
             if key.startswith(("clip", "judge", "diversity"))} for row in results]


def picture(file):
    """(3, H, W) uint8"""
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def whole(aligned, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, aligned)[1]


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def sampled(monkeypatch):
    """The prompts that pictures are made of, in order."""
    made, draw = [], evaluation.sample

    def watched(model, prompts, indices, *more):
        made.extend(indices)
        return draw(model, prompts, indices, *more)

    monkeypatch.setattr(evaluation, "sample", watched)
    return made


def test_a_row_holds_means_standard_errors_and_gains_of_the_pictures_it_wrote(whole, aligned):
    out, results = whole
    prompts, scorer = read_prompts(aligned.parents[1] / "prompts.txt"), rewards.load("clip")
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
        found = [row[f"clip{key}"] for key in ("", "_stderr", "_gain", "_gain_stderr")]
        assert found == pytest.approx([x.item() for x in expected], abs=1e-4)
    distance = (images[:, 0] - images[:, 1]).pow(2).mean((1, 2, 3)).sqrt().mean().item()
    assert results[1]["diversity"] == pytest.approx(distance, rel=1e-5)
    assert results[1]["clip_gain"] != 0 and Image.open(out / "grid.png").size[0] > 5 * 128


def test_the_table_is_the_papers_with_the_runs_cost_and_what_it_was_trained_on_underlined(whole):
    out, results = whole
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()[:4]
    head, _, base, row = (line.split(" | ") for line in lines)
    assert [cell.strip("| ") for cell in head] == [
        "Method", "Solver_old", "NFE_old ↓", "NFE_theta ↓", "s / Iter. ↓", "clip ↑", "judge ↑"]
    assert base[1:5] == ["N/A"] * 4 and "<u>" not in "".join(base)
    assert row[1:5] == ["DPM++", "8", "1.33", "3.00"]           # (1 + 0.5 + 1 + 1 + 0.5 + 2) / 2 s
    clip = f"{results[1]['clip']:.4f} ± {results[1]['clip_stderr']:.4f}"
    assert row[5] == f"<u>{clip}</u>" and row[6].startswith(f"{results[1]['judge']:.4f} ±")


def test_pickscore_is_printed_over_100_as_in_table_1():
    row = dict(label="a", solver="N/A", nfe_old="N/A", nfe_theta="N/A", seconds="N/A",
               trained_on=[], diversity=None, pickscore=22.71, pickscore_stderr=0.5,
               pickscore_gain=1.0, pickscore_gain_stderr=0.0)
    table = evaluation.tables([row], ["pickscore"])
    assert "| 0.2271 ± 0.0050 |" in table and "Pick / 100 ↑" in table
    assert "| +0.0100 ± 0.0000 | - |" in table


def test_noise_depends_on_the_prompts_place_alone_and_training_evaluates_as_eval_does(
        whole, aligned):
    prompts, model = read_prompts(aligned.parents[1] / "prompts.txt"), Flux(FLUX, 64)
    scorers = {"clip": rewards.load("clip")}
    images, scores = evaluate(model, scorers, prompts, schedule(2), "dpmpp_2m",
                              images_per_prompt=2, batch=64)
    mean = whole[1][0]["clip"]                                  # by main, in other batches
    assert_close(scores["clip"].mean().item(), mean, rtol=0, atol=1e-3)
    first = picture(whole[0] / "tiny-flux/pictures/00003-1.png")
    assert (images[3, 1].int() - first.int()).abs().max() <= 1  # pixels may round the other way
    alone = sample(model, [prompts[3]], [3], schedule(2), "dpmpp_2m", n=2)[1]
    assert (alone * 255 - first).abs().max() <= 1


def test_evaluation_gives_the_same_noise_to_every_checkpoint_whatever_the_batch():
    flux, scorers = Flux(FLUX, 64), {"clip": rewards.load("clip")}
    prompts = ["a red apple", "an octopus"] * 2
    images, scores = evaluate(flux, scorers, prompts, schedule(3), "ddim", images_per_prompt=2,
                              batch=2)
    _, more = evaluate(flux, scorers, prompts, schedule(3), "ddim", images_per_prompt=2, batch=64)
    assert_close(scores["clip"], more["clip"], rtol=0, atol=1e-3)
    assert not torch.equal(images[0], images[2])                # the same prompt has other noise
    assert (images[:, 0] != images[:, 1]).any()


def test_a_mean_has_the_standard_error_of_prompts_and_diversity_is_a_distance_of_pixels():
    scores = torch.tensor([[1.0, 3.0], [4.0, 4.0], [5.0, 7.0]])             # prompts: 2, 4, 6
    assert mean_and_stderr(scores) == pytest.approx((4, 2 / 3**0.5))
    assert mean_and_stderr(torch.tensor([[1.0, 3.0]])) == (2, 0)
    black, white = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    pairs = [(black, white), (white, white), (black, white / 2)]
    pairs = torch.stack([torch.stack(pair) for pair in pairs])              # (3, 2, 3, 8, 8)
    assert_close(diversity(pairs), torch.tensor([[1.0], [0.0], [0.5]]))


# ------------------------------------------------------------------------------------------------
# what is kept in --out_dir

def test_an_evaluation_that_was_stopped_goes_on_and_makes_nothing_twice(
        whole, aligned, tmp_path, monkeypatch, sampled):
    scored, score = [], rewards.Judge.score

    def breaks(self, pixels, prompts):
        scored.append(len(pixels))
        if len(scored) == 5:
            raise KeyboardInterrupt
        return score(self, pixels, prompts)

    monkeypatch.setattr(rewards.Judge, "score", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, aligned)
    assert sampled and not (tmp_path / "results.json").exists()
    assert numbers(run(tmp_path, aligned)[1]) == numbers(whole[1])
    assert len(sampled) == 10                                   # five prompts, two models
    before = len(scored)
    assert numbers(run(tmp_path, aligned)[1]) == numbers(whole[1]) and len(sampled) == 10
    assert len(scored) == before + 2                            # tried on one picture, and on two
    results = run(tmp_path, aligned, "--scorers", "clip,judge,jpeg")[1]
    assert len(sampled) == 10 and "jpeg" in results[0]          # one scorer more, no picture more


def test_several_processes_share_what_is_missing_and_not_what_there_was(
        copied, aligned, monkeypatch, sampled):
    for i in (0, 2, 4):                                         # all of them were process 0's
        (copied / f"tiny-flux/pictures/{i:05d}-1.png").unlink()
    monkeypatch.setattr(evaluation, "WORLD", 2)
    monkeypatch.setattr(evaluation, "RANK", 1)
    assert evaluation.main(command_of(copied, aligned)) == 0 and sampled == [2]


@pytest.mark.parametrize("more", [
    ["--steps", "3"], ["--seed", "1"], ["--guidance", "1.5"], ["--shift", "2.0"],
    ["--solver", "ddim"], ["--resolution", "32"], ["--resolution", "64x32"],
    ["--images_per_prompt", "1"]])
def test_pictures_of_another_setting_are_not_mixed_in(whole, aligned, more, capsys):
    with pytest.raises(SystemExit) as exit:
        run(whole[0], aligned, *more)
    said = f"holds pictures of another {more[0][2:]} than {more[1]}; use --overwrite"
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_pictures_of_other_prompts_or_weights_are_not_mixed_in(copied, whole, aligned, tmp_path):
    (tmp_path / "others.txt").write_text("a\nb\nc\nd\ne\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(copied, aligned, "--prompts", str(tmp_path / "others.txt"))
    moved = tmp_path / "run/checkpoint-3"                       # the same name, other weights
    shutil.copytree(FLUX, moved)
    shutil.copy(aligned.parents[1] / "prompts.txt", tmp_path)
    with pytest.raises(SystemExit):
        run(copied, moved)
    (copied / "tiny-flux/notes.txt").write_text("mine", encoding="utf-8")
    again = run(copied, aligned, "--seed", "1", "--overwrite")[1]
    assert numbers(again) != numbers(whole[1])
    assert (copied / "tiny-flux/notes.txt").exists()            # it deletes pictures and scores


def test_half_a_folder_and_broken_files_are_refused_or_made_again_and_never_counted(
        copied, whole, aligned, capsys):
    row = copied / "tiny-flux"
    scores, png = row / "pictures/00002.json", row / "pictures/00002-0.png"
    for text in ("", "[]", '{"clip": [1]}', '{"clip": [NaN, 1.0], "judge": [0, 1e999]}', "null"):
        scores.write_text(text, encoding="utf-8")
        assert numbers(run(copied, aligned)[1]) == numbers(whole[1])
    png.write_bytes(png.read_bytes()[:500])
    assert run(copied, aligned)[0] == 1 and "is not a whole picture" in capsys.readouterr().err
    png.unlink()
    assert numbers(run(copied, aligned)[1]) == numbers(whole[1])
    (row / "settings.json").unlink()
    with pytest.raises(SystemExit):
        run(copied, aligned)
    assert "nothing that says how they were made" in capsys.readouterr().err
    os.replace(row / "pictures", row / "pictures.old")          # a killed --overwrite
    assert numbers(run(copied, aligned)[1]) == numbers(whole[1])
    assert not (row / "pictures.old").exists()


def test_leftovers_of_a_killed_save_go_and_those_of_a_living_one_stay(copied, aligned):
    row = copied / "tiny-flux"
    old, new = ([row / f"pictures/00001-0.png.{pid}", row / f"settings.json.{pid}"]
                for pid in (1234, 5678))
    for file in old + new:
        file.write_bytes(b"half")
    for file in old:
        os.utime(file, (time.time() - 3600,) * 2)
    assert run(copied, aligned)[0] == 0
    assert not any(file.exists() for file in old) and all(file.exists() for file in new)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")

    def full(path):
        path.write_text("half", encoding="utf-8")
        raise OSError("no space left")

    with pytest.raises(OSError):
        evaluation.write(tmp_path / "a.txt", full)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


def test_scores_of_other_weights_are_made_again(whole, aligned, tmp_path):
    named = ["--scorers", f"clip={tmp_path / 'w'}"]
    shutil.copytree(HERE / "tiny/reward", tmp_path / "w")
    first = run(tmp_path / "out", aligned, *named)[1]
    shutil.rmtree(tmp_path / "w")
    shutil.copytree(HERE / "tiny/judge", tmp_path / "w")
    again = run(tmp_path / "out", aligned, *named)[1]
    assert first[0]["clip"] == pytest.approx(whole[1][0]["clip"], abs=1e-5)
    assert again[0]["clip"] == pytest.approx(whole[1][0]["judge"], abs=1e-5)


def test_every_row_lies_in_out_dir_under_the_last_two_parts_of_its_path(tmp_path, monkeypatch):
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

def test_solver_steps_shift_guidance_and_the_number_of_prompts_are_those_asked_for(
        aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "load", functools.cache(rewards.load))
    settings = [[], ["--solver", "ddim"], ["--shift", "3"], ["--guidance", "1"], ["--steps", "4"],
                ["--seed", "3"], ["--num_prompts", "2"]]
    few = ["--checkpoint", "--steps", "3", "--scorers", "clip"]             # the base alone
    results = [run(tmp_path / str(k), aligned, *few, *more)[1][0]["clip"]
               for k, more in enumerate(settings)]
    assert len(set(results)) == len(settings)
    two = sorted(path.name for path in (tmp_path / "6/tiny-flux/pictures").glob("*-0.png"))
    assert two == ["00001-0.png", "00003-0.png"]                # evenly spaced
    base, prompts = Flux(FLUX, 64, frozen=True), read_prompts(aligned.parents[1] / "prompts.txt")
    image = sample(base, [prompts[1]], [1], schedule(3, 3), "dpmpp_2m", n=2)[0]     # as the model
    drawn = picture(tmp_path / "2/tiny-flux/pictures/00001-0.png")                  # draws it
    assert (image * 255 - drawn).abs().max() <= 1


def test_pictures_may_be_wider_than_high_and_the_grid_keeps_their_shape(aligned, tmp_path):
    code, _ = run(tmp_path, aligned, "--checkpoint", "--steps", "1", "--scorers", "jpeg",
                  "--resolution", "64x32", "--num_prompts", "2")
    assert code == 0
    assert Image.open(tmp_path / "tiny-flux/pictures/00001-0.png").size == (64, 32)
    width, height = Image.open(tmp_path / "grid.png").size
    assert width == 96 + 2 * (128 + 6) and 64 < height < 128    # one row of two, and the prompts


def test_a_broken_model_ends_the_evaluation_and_draws_no_black_pictures(aligned, tmp_path, capsys):
    with torch.no_grad():
        broken = Flux(FLUX, 64)
        for w in broken.transformer.parameters():
            w.fill_(math.nan)
        broken.save(tmp_path / "broken")
    prompts = str(aligned.parents[1] / "prompts.txt")
    assert run(tmp_path / "out", tmp_path / "broken", "--prompts", prompts)[0] == 1
    assert "are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*broken/pictures/*.png"))


def test_a_checkpoint_of_adapters_is_sampled_over_its_base_and_not_taken_for_another_one(tmp_path):
    lora = tmp_path / "run/checkpoint-7"
    model = Flux(FLUX, 64, lora_rank=2)
    model.save(tmp_path / "start")                              # adapters begin as zero
    with torch.no_grad():
        for w in model.trained():
            w.normal_(std=0.3)
    model.save(lora)
    pipe = FluxPipeline.from_pretrained(FLUX)                   # the same weights, added up by
    pipe.load_lora_weights(lora)                                # somebody else's code
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    (tmp_path / "p.txt").write_text("a red apple\nan octopus\n", encoding="utf-8")
    paths = [str(path) for path in (tmp_path / "start", lora, tmp_path / "fused")]
    command = ["--model", str(FLUX), "--checkpoint", *paths, "--prompts", str(tmp_path / "p.txt"),
               "--steps", "2", "--images_per_prompt", "1", "--scorers", "clip",
               "--out_dir", str(tmp_path / "out")]
    assert evaluation.main(command) == 0
    base, start, aligned, fused = results_in(tmp_path / "out")
    assert start["clip"] == base["clip"]
    assert aligned["clip"] == pytest.approx(fused["clip"], abs=1e-3)
    assert abs(aligned["clip"] - base["clip"]) > 0.01
    model.save(lora)                                            # written again: other files
    with pytest.raises(SystemExit):
        evaluation.main(command)


class Half:
    """A velocity that notes when it was asked."""
    device, latent_shape = torch.device("cpu"), (4, 3)

    def __init__(self):
        self.times = []

    def encode(self, prompts):
        return None

    def velocity(self, x, t, cond):
        self.times.append(round(float(t), 3))
        return x

    def decode(self, x):
        return x


def test_the_noise_of_a_picture_is_standard_normal_and_drawn_by_its_prompts_own_generator():
    model = Half()
    model.velocity = lambda x, t, cond: torch.zeros_like(x)     # so the noise stays as it is
    x = sample(model, ["a", "b"], [7, 2], schedule(3), "ddim", n=2, seed=5)
    drawn = [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(5_000_015 + i))
             for i in (7, 2)]
    assert torch.equal(x, torch.cat(drawn))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_hybrid_sampling_begins_with_the_aligned_model_and_ends_with_the_base(solver):
    model, base = Half(), Half()
    sample(model, ["a"], [0], schedule(10), solver, base=base, hybrid=0.8)
    assert model.times == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3] and base.times == [0.2, 0.1]
    model, base = Half(), Half()
    sample(model, ["a"], [0], schedule(10), solver)
    assert len(model.times) == 10


def test_hybrid_rows_are_labelled_and_the_base_is_left_alone(whole, aligned, tmp_path):
    results = run(tmp_path, aligned, "--hybrid", "0.5")[1]
    assert [row["label"] for row in results] == ["tiny-flux", "run-checkpoint-3-hybrid-0.5"]
    base, plain = (row["clip"] for row in whole[1])
    assert results[0]["clip"] == base and results[1]["clip"] not in (base, plain)


def test_flux_is_evaluated_at_1024_pixels_in_50_steps_and_the_small_world_in_its_own_way(tmp_path):
    def settings(*given):
        args, rows = evaluation.parse_args([*given, "--out_dir", str(tmp_path)])
        return (args.steps, args.resolution, args.solver, args.images_per_prompt, args.scorers,
                rows[0].label)

    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n", encoding="utf-8")
    large = settings("--model", "black-forest-labs/FLUX.1-dev", "--prompts", str(prompts))
    assert large == (50, 1024, "ddim", 1, "hpsv2,pickscore,imagereward,clipscore,aesthetic",
                     "black-forest-labs-FLUX.1-dev")
    assert settings() == (8, 64, "dpmpp_2m", 4, "clip,judge", "tiny-flux")
    assert settings("--resolution", "832x640")[1] == "832x640"
    assert settings("--resolution", "64x64")[1] == 64


@pytest.mark.parametrize("settings, sentence", [
    ("--model {tmp}", "is not a FluxPipeline directory"),
    ("--checkpoint {tmp}", "is not a FluxPipeline directory"),
    ("--checkpoint tiny/flux", "must differ in the last two parts of their paths"),
    ("--scorers beauty", "there is no scorer 'beauty'"),
    ("--scorers clip,clip", "scorer 'clip' is named twice"),
    ("--scorers ,", "scorers is empty"),
    ("--hybrid 1", "hybrid is 1, but must be 0, or leave both models some of the 8 steps"),
    ("--hybrid 0.05", "hybrid is 0.05, but must be 0, or leave both models some of the 8 steps"),
    ("--solver euler", "solver is euler, but must be ddim or dpmpp_2m"),
    ("--steps 0", "at least one step"),
    ("--shift 1000", "shift is 1000"),
    ("--guidance inf", "guidance is inf"),
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
    monkeypatch.setattr(evaluation, "Flux", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a: pytest.fail("a scorer was loaded"))
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit) as exit:
        evaluation.main(f"--out_dir {tmp_path / 'out'} {settings}".format(tmp=tmp_path).split())
    assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_a_terminal_that_does_not_know_an_arrow_shows_the_table_all_the_same(
        whole, aligned, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert evaluation.main(command_of(whole[0], aligned)) == 0
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
def test_two_processes_of_torchrun_print_the_table_of_one(whole, aligned, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", "eval.py", *command_of(tmp_path, aligned)]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| Method |") == 1 and "on 2 x cpu" in done.stdout
    for ours, theirs in zip(numbers(results_in(tmp_path)), numbers(whole[1]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)          # pixels may round the other way


# ------------------------------------------------------------------------------------------------
# drawings

class Letters:
    """A font whose letters are all 10 pixels wide."""
    def getlength(self, text):
        return 10 * len(text)


@pytest.mark.parametrize("text, lines", [
    ("", [""]),
    ("a cat", ["a cat"]),
    ("a red cat on a mat", ["a red", "cat on", "a mat"]),
    ("one  two\nsix", ["one", "two", "six"]),
    ("tiny-checkpoint", ["tiny-c", "heckpo", "int"]),           # longer than a line
    ("a tiny-checkpoint b", ["a", "tiny-c", "heckpo", "int b"]),
    ("bigger cat", ["bigger", "cat"]),
])
def test_lines_break_at_spaces_and_words_only_where_they_must(text, lines):
    assert wrap_text(text, 60, Letters()) == lines


def test_captions_show_accents_and_cyrillic_and_a_box_for_what_the_font_lacks(tmp_path):
    def grid(caption):
        path = tmp_path / "grid.png"
        picture_grid(path, {"a": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, [caption])
        return np.asarray(Image.open(path))

    box = grid("雪")
    assert np.array_equal(box, grid("猫"))
    drawn = [grid(letter) for letter in "eéüñйжα"]
    assert not any(np.array_equal(image, box) for image in drawn)
    assert len({image.tobytes() for image in drawn}) == len(drawn)


def test_a_grid_holds_every_picture_at_its_place_in_its_own_shape(tmp_path):
    shades = torch.tensor([[0, 40, 80], [120, 160, 200]], dtype=torch.uint8)
    rows = {label: shades[row, :, None, None, None].expand(3, 3, 96, 64)
            for row, label in enumerate(["base", "aligned"])}
    picture_grid(tmp_path / "grid.png", rows, ["one", "two", "three"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    width, height, left, gap = 85, 128, 96, 6                   # 96 high, 64 wide: 128 / 96 larger
    assert grid.shape[1] == left + 3 * (width + gap)
    for row in range(2):
        for column in range(3):
            y, x = row * (height + gap), left + column * (width + gap)
            assert (grid[y : y + height, x : x + width] == shades[row, column].item()).all()
            assert (grid[y : y + height, x + width : x + width + gap] == 255).all()


def test_the_curve_has_a_panel_for_the_reward_and_one_for_each_held_out_score(
        tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: drawn.append(self))
    evals = [dict(iter=i, eval_clip=0.2 + i, eval_clip_stderr=0.1, eval_clip_gain=float(i),
                  eval_clip_gain_stderr=0.1) for i in (0, 12)]
    steps = [dict(iter=i, reward=None if i == 1 else float(i)) for i in range(1, 13)]
    draw_curve([evals[0], *steps, evals[1]], tmp_path / "curve.png")
    reward, clip = drawn[0].axes
    assert [line.get_xdata().tolist() for line in reward.lines] == [
        list(range(1, 13)), [10, 11, 12]]                       # each reward, and the mean of ten
    assert clip.lines[0].get_xydata().tolist() == [[0, 0.2], [12, 12.2]]
    mean = reward.lines[1].get_ydata()                          # the first iteration has no reward
    assert mean.tolist() == pytest.approx([math.nan, 6.5, 7.5], nan_ok=True)
    draw_curve([], tmp_path / "curve.png")                      # a run without an iteration
    assert len(drawn[1].axes) == 1
