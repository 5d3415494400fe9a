"""
pipeline.py: small random pipelines (tests/small_pipelines.py) against their own runs in diffusers.

    python -m pytest -q tests/test_pipeline.py              # three of the pipelines
    python -m pytest -q tests/test_pipeline.py --slow       # all of them
"""
import functools, json, subprocess
from unittest.mock import patch
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
import eval as evaluation
import rewards
import train
from model import Flux
from paper import counts
from pipeline import Pipeline, load_model
from solvers import rollout
from tests.conftest import FLUX, PROMPTS, assert_near, check_numbers, lines_of
from tests.small_pipelines import PIPELINES, build, save
from tests.test_train import torchrun

QUICK = ("klein", "sd3", "wan")
EACH = pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES])
STEPS = 4
WEIGHTS = "diffusion_pytorch_model.safetensors"
LENGTHS = dict(flux=16, klein=64, sd3=16)       # of the small tokenizers; others have the default
# their scheduler's end point is that of this solver; UniPC is none of ours
SOLVERS = {"sana": "dpmpp_2m", "wan": None}


def load(name, steps=STEPS, made={}, **more):
    pipe, settings = build(name, **made)
    return Pipeline(pipe, steps=steps, **settings | more)


@functools.cache
def loaded(name):
    """No test may change its weights."""
    return load(name)


def own_run(name):
    """The pipeline draws PROMPTS by itself, all by public means -> the noise, [(latents, the
    velocity it gives its scheduler)] of each step, and its pictures."""
    pipe, settings = build(name)
    side, call, seen = settings["resolution"], settings.get("call", {}), []
    if name == "qwen_image":
        call = call | dict(negative_prompt=["", ""])            # else its guidance is ignored
    if name in LENGTHS:
        call = call | dict(max_sequence_length=LENGTHS[name])
    step = pipe.scheduler.step

    @functools.wraps(step)
    def watch(v, t, x, *args, **kwargs):
        seen.append((x.clone(), v.clone()))
        return step(v, t, x, *args, **kwargs)

    with patch.object(pipe.scheduler, "step", watch):
        pictures = pipe(prompt=list(PROMPTS), height=side, width=side, num_inference_steps=STEPS,
                        generator=torch.Generator().manual_seed(1), output_type="pt",
                        return_dict=False, **call)[0]
    return seen, pictures


@EACH
@torch.no_grad()
def test_guided_velocities_and_pictures_are_those_of_the_pipelines_own_run(name):
    model, (seen, pictures) = loaded(name), own_run(name)
    ts, cond = model.times(STEPS), model.encode(PROMPTS)
    for t, (x, v) in zip(ts[:-1], seen, strict=True):
        ours = model.velocity(x.repeat_interleave(3, 0), t, cond)       # several of a prompt
        assert_near(ours, v.repeat_interleave(3, 0), 2e-5)
    x1, solver = seen[0][0], SOLVERS.get(name, "ddim")
    assert (seen[-1][0] - x1).abs().max() > 0.01
    if solver:
        traj, _ = rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, solver)
        assert_close(traj[-2], seen[-1][0], rtol=0, atol=1e-4)
        assert_close(model.decode(traj[-1]), pictures, rtol=0, atol=1e-4)
    assert pictures.ndim == (5 if "frames" in str(model.arguments) else 4)
    assert 0 <= pictures.min() < pictures.max() <= 1


@EACH
@torch.no_grad()
def test_prompts_of_different_length_do_not_mix_and_each_row_has_its_prompt_and_time(name):
    model, prompts = loaded(name), PROMPTS
    if name == "cogview4":                      # it fills up to 16 tokens, or 32 ..., and attends
        prompts = ["a dog", "a cat"]            # to what it filled in
    x, t = torch.randn(6, *model.latent_shape), torch.tensor([0.9, 0.3, 0.9, 0.3, 0.9, 0.3])
    together = model.velocity(x, t, model.encode(prompts))
    alone = [model.velocity(x[row : row + 1], t[row], model.encode([prompts[row // 3]]))
             for row in range(6)]
    assert_near(torch.cat(alone), together, 2e-5)
    exchanged = model.velocity(x, t, model.encode(prompts[::-1]))
    assert (together - exchanged).abs().max() > 1e-4 * together.abs().max()
    assert torch.equal(model.velocity(x, t, model.encode(prompts)), together)   # from memory


@EACH
def test_gradients_reach_the_weights_and_are_those_of_the_velocity(name):
    model = load(name)
    x, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    size = lambda: model.velocity(x, 0.6, cond).double().pow(2).sum()
    reached = [w for w in model.trained() if w.requires_grad]
    gradients = torch.autograd.grad(size(), reached, allow_unused=True)
    reached = [(w, g) for w, g in zip(reached, gradients) if g is not None and g.any()]
    assert len(reached) >= 0.8 * len(gradients)
    length = sum(g.double().pow(2).sum() for _, g in reached) ** 0.5
    values, h = [], 1e-3
    with torch.no_grad():
        for sign in (1, -2):                    # forth, and back beyond where they were
            for w, g in reached:
                w.add_(sign * h * g / length.float())
            values.append(size())
    assert_close((values[0] - values[1]) / (2 * h), length, rtol=0.02, atol=0)


@EACH
@torch.no_grad()
def test_adapters_begin_at_the_base_and_are_loaded_again_by_diffusers_and_by_us(name, tmp_path):
    model = load(name, lora_rank=2)
    x, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    base = loaded(name).velocity(x, 0.6, cond)
    assert torch.equal(model.velocity(x, 0.6, cond), base)
    assert all("lora_" in name for name, w in model.transformer.named_parameters()
               if w.requires_grad)
    for w in model.trained():
        w.add_(0.2 * torch.randn_like(w))
    moved = model.velocity(x, 0.6, cond)
    assert (moved - base).abs().max() > 1e-3 * moved.abs().max()
    model.save(tmp_path)
    pipe, settings = build(name)
    pipe.load_lora_weights(tmp_path)
    for again in (Pipeline(pipe, steps=STEPS, frozen=True, **settings),
                  load(name, lora=str(tmp_path))):
        assert_near(again.velocity(x, 0.6, cond), moved, 2e-5)
    assert len(again.trained()) == len(model.trained())


# ==================================================================== refusals

def dpm(**more):
    return diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, **more)


@pytest.mark.parametrize("name, change, sentence", [
    ("sd3", dict(scheduler=Euler(stochastic_sampling=True)), "its first step is not Euler's"),
    ("sd3", dict(scheduler=diffusers.FlowMatchLCMScheduler()), "its first step is not Euler's"),
    ("sana", dict(scheduler=dpm(prediction_type="flow_prediction", algorithm_type="sde-dpmsolver++")
                  ), "its first step is not Euler's"),
    ("sana", dict(scheduler=dpm(prediction_type="epsilon")), "its first step is not Euler's"),
    ("sana", dict(scheduler=diffusers.EulerDiscreteScheduler()), "do not fall from 1 to 0"),
    ("sana", dict(scheduler=diffusers.DDIMScheduler()), "of its DDIMScheduler do not fall from 1"),
    ("sd3", dict(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()), "do not fall from 1 to 0"),
    ("sd3", dict(call=dict(skip_guidance_layers=[0])), "its velocity in step 2 does not come from"),
    ("lumina2", dict(call=dict(cfg_trunc_ratio=0.5)), "does not come from latents and time alone"),
    ("chroma", dict(checkpoint_blocks=-1), "with gradients it is another function"),
    ("wan", dict(call=dict(num_frame=9)), "call has num_frame, which WanPipeline does not take"),
    ("wan", dict(call=dict(height=64)), "call has height, which WanPipeline does not"),
    ("wan", dict(call=dict(num_videos_per_prompt=2)), "call has num_videos_per_prompt"),
    ("wan", dict(call=dict(guidance_scale=2.0)), "call has guidance_scale, which"),
])
def test_what_is_no_function_of_latents_and_time_is_refused_in_a_sentence(name, change, sentence):
    pipe, settings = build(name)
    if scheduler := change.pop("scheduler", None):
        pipe.scheduler = scheduler
    settings["call"] = settings.get("call", {}) | change.pop("call", {})
    with pytest.raises(ValueError, match=sentence):
        Pipeline(pipe, steps=8, **settings | change)


def test_a_guider_with_a_memory_is_refused():
    model = load("sd3")
    step, memory = model.transformer.forward, []

    def remembers(*args, **kwargs):             # as adaptive projected guidance does
        v, = step(*args, **kwargs)
        memory[:] = [v if not memory or len(memory[0]) != len(v) else v + 0.5 * memory[0].detach()]
        return memory[0],

    with patch.object(model.transformer, "forward", remembers):
        with pytest.raises(ValueError, match="does not come from latents and time alone"):
            model.check()
    model.check()


def test_a_pipeline_without_one_transformer_is_refused():
    pipe, settings = build("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(ValueError, match="has transformer and transformer_2, but must have one"):
        Pipeline(pipe, **settings)


# ==================================================================== guidance and other arguments

@pytest.mark.parametrize("name, scale", [
    ("klein", "guidance_scale"), ("flux", "guidance_scale"), ("qwen_image", "true_cfg_scale"),
    pytest.param("hunyuan_video", "guidance_scale", marks=pytest.mark.slow)])
@torch.no_grad()
def test_guidance_is_the_argument_that_acts(name, scale):
    usual, model = loaded(name), load(name, guidance=2.0)
    x = torch.randn(2, *model.latent_shape)
    assert model.scale == scale and model.arguments[scale] == 2
    assert not torch.equal(model.velocity(x, 0.6, PROMPTS), usual.velocity(x, 0.6, PROMPTS))


def test_guidance_without_effect_is_refused_and_so_is_one_that_does_not_exist():
    with pytest.raises(ValueError, match="guidance has no effect on this Flux2KleinPipeline"):
        load("klein", guidance=4.0, made=dict(distilled=True))
    assert load("klein", made=dict(distilled=True)).nfe == 1
    assert loaded("klein").nfe == 2 and load("klein", guidance=1.0).nfe == 1


# ==================================================================== against model.py

def test_tiny_flux_through_its_pipeline_has_model_pys_velocities_pictures_and_gradients():
    ours, theirs = Pipeline(FLUX, 64), Flux(FLUX, 64)
    check_numbers(theirs, ours, rows=6)
    x, t = torch.randn(6, *theirs.latent_shape), torch.rand(6)
    with torch.no_grad():
        assert_near(*(model.velocity(x, t, model.encode(PROMPTS)) for model in (ours, theirs)))
    assert ours.cut(["a", "a " * 99]) == dict(tokenizer=1, tokenizer_2=1)
    assert theirs.cut(["a", "a " * 99]) == dict(CLIP=1, T5=1)


@pytest.mark.slow
def test_ten_iterations_through_the_pipeline_give_model_pys_rewards(tmp_path, monkeypatch):
    words = "--iterations 10 --eval_every 0 --threads 1 --prompts_per_iteration 2".split()
    for name in ("model", "pipeline"):
        if name == "pipeline":
            monkeypatch.setattr(train, "load", lambda cfg: Pipeline(cfg.model, cfg.resolution))
        train.main([*words, "--out_dir", str(tmp_path / name)])
    ours, theirs = (lines_of(tmp_path / name) for name in ("pipeline", "model"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=0.005)


def test_the_class_is_chosen_by_what_the_folder_has(tmp_path):
    assert type(load_model(FLUX, 64)) is Flux
    words = save("klein", tmp_path)
    assert type(load_model(tmp_path, 64)) is Pipeline
    with pytest.raises(ValueError, match="call has num_frames, but FLUX.1 has settings"):
        load_model(FLUX, 64, call=dict(num_frames=3))
    cfg = train.parse_config([*words[:2], "--out_dir", str(tmp_path / "run")])
    assert (cfg.resolution, cfg.shift, cfg.guidance) == ("", 0, "")     # tiny's are for tiny/flux
    cfg = train.parse_config(["--out_dir", str(tmp_path / "other")])
    assert (cfg.resolution, cfg.shift, cfg.guidance) == ("64", 1, "")


# ==================================================================== memory and speed

@pytest.mark.parametrize("how", [
    dict(checkpoint_blocks=-1), dict(checkpoint_blocks=1), dict(batch=1), dict(text_device="cpu"),
    dict(text_device="offload"), pytest.param(dict(compiled=True), marks=pytest.mark.slow)],
    ids=str)
@pytest.mark.parametrize("name", ["klein", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in QUICK[1:])])
def test_numbers_and_gradients_are_the_same_however_memory_and_time_are_saved(
        name, how, monkeypatch):
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    check_numbers(loaded(name), load(name, **how))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_kleins_operations_counted_without_numbers_are_those_of_the_network_with_them(guidance):
    model = load("klein", guidance=guidance, lora_rank=4)
    x, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.velocity(x, 0.5, cond).mean().backward()
    _, both = counts.operations(model.transformer.config, 16, 64, 4, 0)
    assert 2 * model.nfe * both == counter.get_total_flops()


def test_prompts_that_are_too_long_are_counted_with_the_frame_of_a_chat():
    model = loaded("klein")
    frame = len(model.pipe.tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
                                     "<think>\n\n</think>\n\n").input_ids)
    assert model.cut(["a" * n for n in (1, 64 - frame, 65 - frame, 90)]) == dict(tokenizer=2)


@torch.no_grad()
def test_an_evaluation_with_other_steps_has_the_pipelines_times_for_them():
    model, scheduler = loaded("klein"), Euler(shift=3.0, use_dynamic_shifting=True)
    even = torch.linspace(1, 1 / 7, 7).tolist()
    scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(16, 7))
    assert_close(model.times(7), scheduler.sigmas)
    cogview = loaded("cogview4")
    ts = cogview.times(7)
    for t, time in zip(ts, [*torch.linspace(1000, 1, 7).long().tolist(), 0]):
        assert cogview.nodes[t.item()] == time                  # not 1000 t


# ==================================================================== runs

RUN = ("--preset dpm8 --rewards jpeg --prompts tiny/prompts/train.txt --device cpu --eval_every 0 "
       "--no-compile --checkpoint_blocks 0 --threads 1 --iterations 2 --group_size 2 "
       "--num_anchors 2 --num_rollout_steps 3 --num_train_steps 2 --lr 1e-3").split()


def velocity_of(path, words, **more):
    call, side = json.loads(words[-1]), words[3]
    model = load_model(path, side, steps=3, call=call, frozen=True, **more)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.velocity(x, 0.5, model.encode(PROMPTS))


@pytest.mark.parametrize("how", [["--lora_rank", "4"], ["--ema", "0.5"]], ids=["adapters", "all"])
@pytest.mark.parametrize("name", ["wan", pytest.param("klein", marks=pytest.mark.slow),
                                  pytest.param("sd3", marks=pytest.mark.slow)])
def test_a_run_trains_saves_resumes_exactly_and_is_loaded_by_diffusers_and_eval(
        name, how, tmp_path):
    words, out = save(name, tmp_path / "base"), tmp_path / "run"
    command = [*RUN, *words, *how, "--save_every", "1", "--out_dir", str(out)]
    assert train.main(command) is None
    lines, base = lines_of(out, seconds=False), velocity_of(tmp_path / "base", words)
    assert [line["nfe_old"] for line in lines] == [6, 6]        # guidance: twice T
    assert max(line["first_ratio"] for line in lines) < 1e-4
    if "--lora_rank" in how:
        moved = velocity_of(tmp_path / "base", words, lora=str(out / "checkpoint-2"))
    else:
        moved = velocity_of(out / "checkpoint-2", words)
    assert (moved - base).abs().max() > 1e-4 * base.abs().max()

    (out / "checkpoint-2").rename(tmp_path / "first")           # as if killed before it
    assert train.main([*command, "--resume"]) is None
    assert lines_of(out, seconds=False) == lines
    weights = "pytorch_lora_weights.safetensors" if "--lora_rank" in how else (
        f"transformer/{WEIGHTS}")
    a, b = (load_file(path / weights) for path in (tmp_path / "first", out / "checkpoint-2"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    assert not evaluation.main([
        *words, "--checkpoint", str(out / "checkpoint-2"), "--steps", "3", "--num_prompts", "2",
        "--images_per_prompt", "2", "--scorers", "jpeg", "--device", "cpu",
        "--prompts", "tiny/prompts/train.txt", "--out_dir", str(tmp_path / "eval")])
    rows = json.loads((tmp_path / "eval/results.json").read_text(encoding="utf-8"))["results"]
    assert len(rows) == 2 and rows[1]["jpeg_gain"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--fsdp"], [], ["--lora_rank", "4"]],
                         ids=["fsdp2", "ddp", "adapters"])
@pytest.mark.parametrize("name", ["sd3", "wan", "klein"])
def test_two_processes_train_as_one_does(name, how, tmp_path):
    words = [*RUN, *save(name, tmp_path / "base"), "--prompts_per_iteration", "2", "--lr", "1e-4"]
    alone = [word for word in how if word != "--fsdp"]
    assert train.main([*words, *alone, "--out_dir", str(tmp_path / "one")]) is None
    done = subprocess.run(**torchrun("train.py", *words, *how, "--out_dir", str(tmp_path / "two")),
                          timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    for a, b in zip(lines_of(tmp_path / "two"), lines_of(tmp_path / "one"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=2e-3)      # jpeg: whole bytes
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    if how:
        return
    a, b = (load_file(tmp_path / which / "checkpoint-2/transformer" / WEIGHTS)
            for which in ("one", "two"))
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4


def test_a_few_step_model_trains_with_four_steps_of_which_three_are_trained(tmp_path):
    words = save("klein", tmp_path / "base", distilled=True)
    train.main([*RUN, *words, "--num_rollout_steps", "4", "--num_train_steps", "3", "--lora_rank",
                "4", "--out_dir", str(tmp_path / "run")])
    for line in lines_of(tmp_path / "run"):
        assert (line["nfe_old"], line["nfe_theta"], line["skipped"]) == (4, 3, 0)
        assert line["first_ratio"] < 1e-4 and line["grad_norm"] > 0


# ==================================================================== videos

def test_a_scorer_of_images_gets_even_frames_of_a_video_and_its_reward_is_their_mean():
    seen = []

    def brightness(images, prompts):
        seen.append((images, prompts))
        return images.mean((1, 2, 3))

    videos, scorer = torch.randint(0, 256, (3, 9, 3, 4, 5)) / 255, rewards.OwnReward(brightness)
    scores = scorer(videos, ["a", "b", "c"])
    (images, prompts), = seen
    assert torch.equal(images.unflatten(0, (3, 4)), videos[:, [0, 3, 4, 7]])
    assert prompts == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert_close(scores, videos[:, [0, 3, 4, 7]].mean((1, 2, 3, 4)))
    scorer.frames = 99                                          # there are only nine
    assert_close(scorer(videos, ["a", "b", "c"]), videos.mean((1, 2, 3, 4)))
    assert_close(scorer(videos[:, 0], ["a", "b", "c"]), videos[:, 0].mean((1, 2, 3)))


def test_some_frames_of_a_video_are_evenly_spaced_and_show_a_flicker_of_every_other_frame():
    for count in range(1, 40):
        for most in range(1, 12):
            n, shown = min(count, most), rewards.some_frames(count, most)
            assert len(shown) == n and all(0 <= k < count for k in shown)
            assert [k % 2 for k in shown] == [i % 2 for i in range(n)]
            assert all(abs(k - (i + 0.5) * count / n) < 2 for i, k in enumerate(shown))


def test_ones_own_reward_may_ask_for_the_whole_video(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def steadiness(videos, prompts):\n"
                    "    return -videos.diff(dim=1).abs().mean((1, 2, 3, 4))\n"
                    "steadiness.video = True\n", encoding="utf-8")
    scorer = rewards.load_all({"steadiness": f"{file}:steadiness"}, "cpu", ["a"])["steadiness"]
    videos = torch.randint(0, 256, (2, 5, 3, 8, 8)) / 255
    scores = scorer(videos, ["a", "b"])
    assert_close(scores, -videos.diff(dim=1).abs().mean((1, 2, 3, 4)))


def test_videos_are_stored_without_loss_and_shown_as_four_frames_and_moving(tmp_path):
    videos = torch.randint(0, 256, (2, 9, 3, 16, 24), dtype=torch.uint8)
    for video in (videos[0], videos[0, 0]):
        (tmp_path / "a.png").write_bytes(evaluation.as_png(video))
        assert torch.equal(evaluation.read_picture(tmp_path / "a.png"), video)
    evaluation.picture_grid(tmp_path / "grid.png", {"base": videos, "aligned": videos}, ["a", "b"])
    with Image.open(tmp_path / "grid.png") as still, Image.open(tmp_path / "grid.webp") as moving:
        assert still.width > 2 * 4 * 128 and moving.n_frames == 9
        cell = still.crop((96, 0, 96 + 128, 85)).resize((24, 16), Image.Resampling.BOX)
    shown = torch.from_numpy(numpy.array(cell)).permute(2, 0, 1).float()
    distances = [(shown - frame).abs().mean() for frame in videos[0].float()]
    assert min(range(9), key=distances.__getitem__) == 0        # of frames 0, 3, 4 and 7
