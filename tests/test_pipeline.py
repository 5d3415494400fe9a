"""
pipeline.py: small random pipelines (tests/small_pipelines.py) against their own runs in diffusers.

    python -m pytest -q tests/test_pipeline.py              # three of the pipelines
    python -m pytest -q tests/test_pipeline.py --slow       # all of them
"""
import functools
from types import SimpleNamespace
from unittest.mock import patch
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from model import Flux
from pipeline import Pipeline, load_model
from solvers import rollout, schedule
from tests.conftest import TINY
from tests.small_pipelines import PIPELINES, build, byte_tokenizer

QUICK = ("klein", "sd3", "wan")
EACH = pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES])
PROMPTS = ["a dog", "an octopus in the sea, seen from far above"]
STEPS = 4
LENGTHS = dict(flux=16, klein=64, sd3=16)       # of the small tokenizers; others have the default
# their scheduler's end point is that of this solver; UniPC is none of ours
SOLVERS = {"sana": "dpmpp_2m", "wan": None}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def load(name, steps=STEPS, made={}, **more):
    pipe, settings = build(name, **made)
    return Pipeline(pipe, steps=steps, **settings | more)


def own_run(name, **more):
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
                        return_dict=False, **call | more)[0]
    return seen, pictures


@EACH
@torch.no_grad()
def test_guided_velocities_and_pictures_are_those_of_the_pipelines_own_run(name):
    model, (seen, pictures) = load(name), own_run(name)
    ts, cond = model.times(STEPS), model.encode(PROMPTS)
    for t, (x, v) in zip(ts[:-1], seen, strict=True):
        rows = x.repeat_interleave(3, 0)                        # a rollout has several of a prompt
        ours = model.velocity(rows, t, cond)
        assert_close(ours[::3], v, rtol=0, atol=2e-5 * float(v.abs().max()))
        assert_close(ours, ours[::3].repeat_interleave(3, 0), rtol=0,
                     atol=2e-5 * float(v.abs().max()))
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
    model, prompts = load(name), PROMPTS
    if name == "cogview4":                      # it fills up to 16 tokens, or 32 ..., and attends
        prompts = ["a dog", "a cat"]            # to what it filled in
    x, t = torch.randn(6, *model.latent_shape), torch.tensor([0.9, 0.3, 0.9, 0.3, 0.9, 0.3])
    together = model.velocity(x, t, model.encode(prompts))
    size = float(together.abs().max())
    for row in range(6):
        alone = model.velocity(x[row : row + 1], t[row], model.encode([prompts[row // 3]]))
        assert_close(together[row : row + 1], alone, rtol=0, atol=2e-5 * size)
    exchanged = model.velocity(x, t, model.encode(prompts[::-1]))
    assert (together - exchanged).abs().max() > 1e-4 * size
    again = model.velocity(x, t, model.encode(prompts))         # from memory
    assert torch.equal(again, together)


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
    base, model = load(name), load(name, lora_rank=2)
    x, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    assert torch.equal(model.velocity(x, 0.6, cond), base.velocity(x, 0.6, cond))
    assert all("lora_" in name for name, w in model.transformer.named_parameters()
               if w.requires_grad)
    for w in model.trained():
        w.add_(0.2 * torch.randn_like(w))
    moved = model.velocity(x, 0.6, cond)
    size = float(moved.abs().max())
    assert (moved - base.velocity(x, 0.6, cond)).abs().max() > 1e-3 * size
    model.save(tmp_path)
    pipe, settings = build(name)
    pipe.load_lora_weights(tmp_path)
    for loaded in (Pipeline(pipe, steps=STEPS, frozen=True, **settings),
                   load(name, lora=str(tmp_path))):
        assert_close(loaded.velocity(x, 0.6, cond), moved, rtol=0, atol=2e-5 * size)
    assert len(loaded.trained()) == len(model.trained())


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
    ("sana", dict(scheduler=diffusers.DDIMScheduler()), "DDIMScheduler has no sigmas"),
    ("sd3", dict(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()), "do not fall from 1 to 0"),
    ("sd3", dict(call=dict(skip_guidance_layers=[0])), "its velocity in step 2 does not come from"),
    ("lumina2", dict(call=dict(cfg_trunc_ratio=0.5)), "does not come from latents and time alone"),
    ("chroma", dict(checkpoint_blocks=-1), "with gradients it is another function"),
    ("wan", dict(call=dict(num_frame=9)), "call has num_frame, but WanPipeline takes no such"),
    ("wan", dict(call=dict(height=64)), "call has height, but that is decided here"),
    ("wan", dict(call=dict(num_videos_per_prompt=2)), "call has num_videos_per_prompt"),
    ("wan", dict(call=dict(guidance_scale=2.0)), "call has guidance_scale, but that is decided"),
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

@pytest.mark.parametrize("name, made, scale", [
    ("klein", {}, "guidance_scale"), ("flux", {}, "guidance_scale"),
    ("qwen_image", {}, "true_cfg_scale"), ("hunyuan_video", {}, "guidance_scale")])
@torch.no_grad()
def test_guidance_is_the_argument_that_acts(name, made, scale):
    x, found = None, []
    for guidance in ("", 2.0, 6.0):
        model = load(name, guidance=guidance)
        x = torch.randn(2, *model.latent_shape) if x is None else x
        found.append(model.velocity(x, 0.6, PROMPTS))
        assert model.scale == scale and (guidance == "" or model.arguments[scale] == guidance)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_guidance_without_effect_is_refused_and_so_is_one_that_does_not_exist():
    with pytest.raises(ValueError, match="guidance has no effect on this Flux2KleinPipeline"):
        load("klein", guidance=4.0, made=dict(distilled=True))
    assert load("klein", made=dict(distilled=True)).nfe == 1
    assert load("klein").nfe == 2 and load("klein", guidance=1.0).nfe == 1
