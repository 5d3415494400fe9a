"""
model.py: FLUX as it is shipped in tiny/, against diffusers' own pipeline.

    python -m pytest -q tests/test_model.py
    python -m tests.test_model --flux_dev       # FLUX.1-dev's published shapes, one layer of each
                                                # kind: some minutes, 16 GB of memory, 12 GB of disk
"""
import argparse, functools, json, math, tempfile
from pathlib import Path
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import peft
import transformers
from diffusers import FluxPipeline
import train
from inputs import is_lora
from model import Flux
from run import Run, read_log
from solvers import rollout, schedule
from tests.conftest import SHORT, TINY

FLUX = TINY / "flux"
PROMPTS = ["a red apple, 3d style", "an octopus, noto style"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ==================================================================== against diffusers' pipeline

def test_packing_is_undone_by_unpacking(flux):
    latents = torch.randn(3, 16, 8, 8)
    assert torch.equal(flux.unpack(FluxPipeline._pack_latents(latents, 3, 16, 8, 8)), latents)


@torch.no_grad()
def test_a_ddim_rollout_gives_the_latents_and_pictures_of_diffusers_own_pipeline(flux):
    noise, cond = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS)
    traj, _ = rollout(lambda x, t: flux.velocity(x, t, cond), noise, schedule(6))
    theirs = functools.partial(flux.pipe, PROMPTS, latents=noise, height=64, width=64,
                               num_inference_steps=6, guidance_scale=3.5, max_sequence_length=16)
    latents, pictures = (theirs(output_type=kind).images for kind in ("latent", "pt"))
    assert_close(traj[-1], latents, rtol=0, atol=1e-5)
    assert_close(flux.decode(traj[-1]), pictures, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pictures_that_are_not_square_are_those_of_diffusers_own_pipeline():
    wide = Flux(FLUX, "96x64")                                  # width x height
    noise, cond = torch.randn(2, *wide.latent_shape), wide.encode(PROMPTS)
    traj, _ = rollout(lambda x, t: wide.velocity(x, t, cond), noise, schedule(3))
    theirs = wide.pipe(PROMPTS, latents=noise, height=64, width=96, num_inference_steps=3,
                       guidance_scale=3.5, max_sequence_length=16, output_type="pt").images
    assert theirs.shape == (2, 3, 64, 96)
    assert_close(wide.decode(traj[-1]), theirs, rtol=0, atol=1e-5)


def test_prompts_that_are_too_long_for_an_encoder_are_counted(flux):
    most = flux.pipe.tokenizer.model_max_length
    assert flux.pipe.tokenizer_2.model_max_length == most       # of the small world
    words = lambda n: "a " * (n - 2) + "dog"                    # n - 1 tokens, and an end
    for name, tokenizer in (("CLIP", flux.pipe.tokenizer), ("T5", flux.pipe.tokenizer_2)):
        short = [n for n in range(2, 2 * most) if len(tokenizer(words(n)).input_ids) <= most]
        prompts = [words(2), words(short[-1]), words(short[-1] + 1), words(short[-1] + 9)]
        assert flux.cut(prompts)[name] == 2


@torch.no_grad()
def test_each_prompt_owns_its_rows_of_a_batch_and_each_row_its_time(flux):
    x, t = torch.randn(6, *flux.latent_shape), torch.rand(6)
    together = flux.velocity(x, t, flux.encode(PROMPTS))
    for row in range(6):
        alone = flux.velocity(x[row : row + 1], t[row], flux.encode([PROMPTS[row // 3]]))
        assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    exchanged = flux.velocity(x, t, flux.encode(PROMPTS[::-1]))
    assert (together - exchanged).abs().max() > 0.01


@torch.no_grad()
def test_what_is_saved_is_a_pipeline_with_the_same_velocity(flux, tmp_path):
    x, cond, changed = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS), Flux(FLUX, 64)
    for w in changed.transformer.parameters():
        w.mul_(1.1)
    changed.save(tmp_path)
    loaded = Flux(tmp_path, 64).velocity(x, 0.5, cond)
    assert torch.equal(loaded, changed.velocity(x, 0.5, cond))
    assert not torch.equal(loaded, flux.velocity(x, 0.5, cond))


# ==================================================================== memory and speed

@pytest.mark.parametrize("blocks, recomputed", [(-1, 6), (2, 2), (100, 6)])
def test_checkpointing_recomputes_as_many_blocks_as_are_asked_for_and_keeps_the_gradients(
        flux, blocks, recomputed):
    x, cond, calls = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS), []

    def gradients(model):
        model.transformer.zero_grad()
        model.velocity(x, 0.5, cond).pow(2).mean().backward()
        return [w.grad for w in model.transformer.parameters() if w.grad is not None]

    checkpointed = Flux(FLUX, 64, checkpoint_blocks=blocks)
    for block in checkpointed.blocks():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for a, b in zip(gradients(flux), gradients(checkpointed), strict=True):
        assert_close(a, b, rtol=0, atol=1e-7)
    assert len(calls) == len(checkpointed.blocks()) + recomputed


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_numbers_and_blocks_of_a_kind_share_their_graphs(
        flux, monkeypatch, lora_rank):
    graphs, found, x = [], [], torch.randn(2, *flux.latent_shape)

    def counted(graph, inputs):                 # a compiler that only counts what it is given
        graphs.append(graph)
        return graph

    torch.compiler.reset()                      # of what the last case compiled
    compile_counted = functools.partialmethod(torch.nn.Module.compile, backend=counted)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    for compiled in (False, True):
        torch.manual_seed(0)                    # of the adapters
        model = Flux(FLUX, 64, compiled=compiled, lora_rank=lora_rank)
        cond = model.encode(PROMPTS)
        with torch.no_grad():
            rolled = model.velocity(x, 0.5, cond)
        v = model.velocity(x, 0.5, cond)
        v.pow(2).mean().backward()
        gradients = [w.grad for w in model.trained() if w.grad is not None]
        found.append([rolled, v.detach(), *gradients])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)
    assert 4 <= len(graphs) <= 7        # two kinds, with and without gradients; the first of a kind
                                        # may get its input in another form. Six alone would be 12.


def test_a_network_that_is_called_with_few_latents_at_a_time_gives_the_same_numbers_and_gradients():
    together, parts = Flux(FLUX, 64), Flux(FLUX, 64, batch=3)
    x, cond, found = torch.randn(8, *together.latent_shape), together.encode(PROMPTS), []
    sizes = []
    measured = lambda _, args, inputs: sizes.append(len(inputs["hidden_states"]))
    parts.transformer.register_forward_pre_hook(measured, with_kwargs=True)
    for model in (together, parts):
        v = model.velocity(x, 0.5, cond)
        v.pow(2).sum().backward()
        found.append([v.detach(), model.decode(x)] + [w.grad for w in model.trained()])
    assert sizes == [3, 3, 2]
    for a, b in zip(*found):
        assert_close(a, b, rtol=0, atol=1e-5 * max(1, float(a.abs().max())))


def test_many_pictures_are_the_pictures_of_each_latent_in_order_sixteen_at_a_time_at_most():
    model, sizes = Flux(FLUX, 64, frozen=True), []
    x, decode = torch.randn(35, *model.latent_shape), model.pipe.vae.decode
    alone = torch.cat([model.decode(row[None]) for row in x])
    model.pipe.vae.decode = lambda z, **more: sizes.append(len(z)) or decode(z, **more)
    assert_close(model.decode(x), alone, rtol=0, atol=1e-5)
    assert sizes == [16, 16, 3]


@pytest.mark.parametrize("where", ["cpu", "offload"])
def test_text_encoders_say_the_same_wherever_they_live(flux, where):
    a, b = (model.encode(["a red apple"]) for model in (flux, Flux(FLUX, 64, text_device=where)))
    assert torch.equal(a["txt"], b["txt"]) and torch.equal(a["vec"], b["vec"])


# ==================================================================== adapters

@torch.no_grad()
def test_lora_trains_adapters_alone_begins_at_the_base_and_is_loaded_by_diffusers(flux, tmp_path):
    x, cond, out = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS), tmp_path / "run"
    base, model = flux.velocity(x, 0.5, cond), Flux(FLUX, 64, lora_rank=4)
    assert torch.equal(model.velocity(x, 0.5, cond), base)
    assert sum(w.numel() for w in model.trained()) < 0.02 * sum(w.numel() for w in flux.trained())

    lora = [*SHORT, "--lora_rank", "4", "--lr", "1e-2", "--out_dir", str(out)]
    with torch.enable_grad():
        train.main([*lora, "--iterations", "2"])
    pipe = FluxPipeline.from_pretrained(FLUX)
    pipe.load_lora_weights(out / "checkpoint-2")
    config, = pipe.transformer.peft_config.values()
    assert config.r == config.lora_alpha == 4       # so programs that ignore alpha agree
    theirs = pipe.transformer(
        hidden_states=x, timestep=torch.full((2,), 0.5), guidance=torch.full((2,), 3.5),
        encoder_hidden_states=cond["txt"], pooled_projections=cond["vec"], img_ids=flux.img_ids,
        txt_ids=torch.zeros(16, 3), return_dict=False)[0]
    assert (theirs - base).abs().max() > 1e-3

    model = Flux(FLUX, 64, lora_rank=4)                         # from the sharded state
    cfg = train.parse_config([*lora, "--iterations", "3", "--resume"])
    assert Run(cfg, model, {}).iteration == 2
    assert_close(model.velocity(x, 0.5, cond), theirs, rtol=0, atol=1e-5)
    frozen = Flux(FLUX, 64, frozen=True, lora=str(out / "checkpoint-2"))        # from the adapters
    assert_close(frozen.velocity(x, 0.5, cond), theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_adapters_are_loaded_from_a_folder_or_a_file_and_trained_on_from_there(flux, tmp_path):
    x, cond, model = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS), None
    model = Flux(FLUX, 64, lora_rank=4)
    for w in model.trained():
        w.add_(0.1 * torch.randn_like(w))
    model.save(tmp_path)
    expected = model.velocity(x, 0.5, cond)
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        assert is_lora(path)
        loaded = Flux(FLUX, 64, lora=str(path))
        assert_close(loaded.velocity(x, 0.5, cond), expected, rtol=0, atol=1e-5)
        for a, b in zip(loaded.trained(), model.trained(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="could not be loaded as adapters|holds no adapters"):
        Flux(FLUX, 64, lora=str(FLUX / "vae/diffusion_pytorch_model.safetensors"))


@torch.no_grad()
def test_adapters_that_peft_wrote_have_the_strength_that_peft_gives_them(flux, tmp_path):
    x, cond = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS)
    theirs = Flux(FLUX, 64)
    adapted = peft.get_peft_model(theirs.transformer, peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["to_q", "to_out.0"]))
    for name, w in adapted.named_parameters():
        if "lora_" in name:
            w.copy_(0.1 * torch.randn_like(w))
    adapted.save_pretrained(tmp_path)
    ours = Flux(FLUX, 64, lora=str(tmp_path))
    moved = theirs.velocity(x, 0.5, cond)
    assert_close(ours.velocity(x, 0.5, cond), moved, rtol=0, atol=1e-5)
    assert (moved - flux.velocity(x, 0.5, cond)).abs().max() > 1e-2
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    for other in ({"use_rslora": True}, {"alpha_pattern": {"to_q": 64}}):       # not read: refused
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | other),
                                                      encoding="utf-8")
        with pytest.raises(ValueError, match=f"{next(iter(other))} changes the adapters' strength"):
            Flux(FLUX, 64, lora=str(tmp_path))


# ==================================================================== FLUX.1-dev's own shapes

def one_layer_flux_dev(path):
    """FLUX.1-dev's directory: every component is configured as published, but for one layer of each
    kind. Random weights in bf16, the transformer in shards. The tokenizers are the small world's;
    they pad to the published lengths."""
    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
        num_hidden_layers=1, num_attention_heads=12, max_position_embeddings=77,
        hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2)
    t5 = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64,
        feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True,
        is_encoder_decoder=True, tie_word_embeddings=False)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
        guidance_embeds=True, axes_dims_rope=(16, 56, 56))
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, act_fn="silu", latent_channels=16, norm_num_groups=32,
        sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    small = FluxPipeline.from_pretrained(FLUX)
    small.tokenizer.model_max_length, small.tokenizer_2.model_max_length = 77, 512
    pipe = FluxPipeline(scheduler, vae, transformers.CLIPTextModel(clip), small.tokenizer,
                        transformers.T5EncoderModel(t5), small.tokenizer_2, transformer)
    pipe.to(torch.bfloat16).save_pretrained(path, max_shard_size="500MB")
    assert (path / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()


def compare_latents(path, prompt):
    """Four steps by model.py and by FluxPipeline -> what `velocity` needs of the prompt."""
    model = Flux(path, 64)
    cond, x1 = model.encode([prompt]), torch.randn(1, *model.latent_shape)
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(16, 256, 4096, 0.5, 1.15)
    with torch.no_grad():
        theirs = model.pipe(prompt, height=64, width=64, num_inference_steps=4, guidance_scale=3.5,
                            latents=x1, output_type="latent").images
        ts = schedule(4, math.exp(mu))
        ours = rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, "ddim")[0][-1]
    print(f"4 steps: largest difference {(ours - theirs).abs().max():.1e} of latents up to "
          f"{theirs.abs().max():.1f}, which moved by {(theirs - x1).abs().max():.1f}", flush=True)
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    return cond


def try_flux_dev(folder):
    """The published shapes through train.py: the latents of FluxPipeline's own, then two iterations
    of adapters and of all weights, and back into a FluxPipeline."""
    path = folder / "FLUX.1-dev"
    one_layer_flux_dev(path)
    cond = compare_latents(path, "a red apple, 3d style")
    common = ["--preset", "dpm8", "--model", str(path), "--rewards", "jpeg",
              "--prompts", str(TINY / "prompts/train.txt"), "--device", "cpu", *(
                  "--resolution 64 --eval_every 0 --iterations 2 --group_size 2 --num_anchors 2 "
                  "--num_rollout_steps 2 --num_train_steps 1 --lr 1e-3").split()]
    base = FluxPipeline.from_pretrained(path, dtype=torch.float32)
    inputs = dict(hidden_states=torch.randn(1, 16, 64), timestep=torch.tensor([0.5]),
                  guidance=torch.tensor([3.5]), encoder_hidden_states=cond["txt"],
                  pooled_projections=cond["vec"], img_ids=torch.zeros(16, 3),
                  txt_ids=torch.zeros(512, 3), return_dict=False)
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
        print(f"{name}: 2 iterations, saved, loaded into a FluxPipeline; the velocity has changed "
              f"by up to {(after - before).abs().max():.2e}, of {before.abs().max():.2f}",
              flush=True)
        lines = read_log(out)
        assert (after - before).abs().max() > 1e-3
        assert len(lines) == 2 and max(line["first_ratio"] for line in lines) < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--flux_dev", action="store_true", required=True)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try_flux_dev(Path(folder))
