"""
model.py: FLUX as it is shipped in tiny/, against diffusers' own pipeline.

    python -m pytest -q tests/test_model.py
    python -m tests.test_model --flux_dev       # FLUX.1-dev's published shapes, one layer of each
                                                # kind: some minutes, 16 GB of memory, 12 GB of disk
"""
import argparse, functools, json, logging, math, shutil, tempfile
from pathlib import Path
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import peft
import transformers
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
import train
from machine import check_model, find_variant, is_lora
from model import Flux
from paper.counts import VAE
from pipeline import load_model
from run import read_log
from solvers import rollout, schedule
from tests.conftest import FLUX, PROMPTS, SHORT, TINY, assert_near, check_numbers


# ==================================================================== against diffusers' pipeline

@pytest.mark.parametrize("size", ["64x64", "96x64"])            # width x height
@torch.no_grad()
def test_a_ddim_rollout_gives_the_latents_and_pictures_of_diffusers_own_pipeline(size):
    model, (width, height) = Flux(FLUX, size), map(int, size.split("x"))
    noise, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    traj, _ = rollout(lambda x, t: model.velocity(x, t, cond), noise, schedule(6))
    theirs = functools.partial(model.pipe, PROMPTS, latents=noise, height=height, width=width,
                               num_inference_steps=6, guidance_scale=3.5, max_sequence_length=16)
    latents, pictures = (theirs(output_type=kind).images for kind in ("latent", "pt"))
    assert pictures.shape == (2, 3, height, width)
    assert_near(traj[-1], latents)
    assert_near(model.decode(traj[-1]), pictures, 1e-4)


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
        assert_near(together[row : row + 1], alone)
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

def test_a_base_that_is_gone_is_said_at_a_save_and_the_weights_are_saved(tmp_path, capsys):
    shutil.copytree(FLUX, tmp_path / "flux")
    model = Flux(tmp_path / "flux", 64)
    shutil.rmtree(tmp_path / "flux")
    model.save(tmp_path / "saved")
    assert f"{tmp_path}/flux is gone, so {tmp_path}/saved has nothing" in capsys.readouterr().err
    assert (tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("blocks, recomputed", [(-1, 6), (2, 2), (100, 6)])
def test_checkpointing_recomputes_as_many_blocks_as_are_asked_for_and_changes_no_numbers(
        flux, blocks, recomputed):
    calls, checkpointed = [], Flux(FLUX, 64, checkpoint_blocks=blocks)
    for block in checkpointed.blocks():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    check_numbers(flux, checkpointed, rows=8)
    assert len(calls) == 2 * len(checkpointed.blocks()) + recomputed


def test_a_network_that_is_called_with_few_latents_at_a_time_gives_the_same_numbers(flux):
    parts, sizes = Flux(FLUX, 64, batch=3), []
    measured = lambda _, args, inputs: sizes.append(len(inputs["hidden_states"]))
    parts.transformer.register_forward_pre_hook(measured, with_kwargs=True)
    check_numbers(flux, parts, rows=8)
    assert sizes == [3, 3, 2] * 2


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_numbers_and_blocks_of_a_kind_share_their_graphs(
        monkeypatch, lora_rank):
    def counted(graph, inputs):                 # a compiler that only counts what it is given
        graphs.append(graph)
        return graph

    torch.compiler.reset()                      # of what the last case compiled
    compile_counted = functools.partialmethod(torch.nn.Module.compile, backend=counted)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_counted)
    models, graphs = [], []
    for compiled in (False, True):
        torch.manual_seed(0)                    # of the adapters
        models.append(Flux(FLUX, 64, compiled=compiled, lora_rank=lora_rank))
    check_numbers(*models)
    assert 4 <= len(graphs) <= 7        # two kinds, with and without gradients; the first of a kind
                                        # may get its input in another form. Six alone would be 12.


def test_many_pictures_are_the_pictures_of_each_latent_in_order_sixteen_at_a_time_at_most():
    model, sizes = Flux(FLUX, 64, frozen=True), []
    x, decode = torch.randn(19, *model.latent_shape), model.pipe.vae.decode
    alone = torch.cat([model.decode(row[None]) for row in x])
    model.pipe.vae.decode = lambda z, **more: sizes.append(len(z)) or decode(z, **more)
    assert_near(model.decode(x), alone, 1e-4)
    assert sizes == [16, 3]


# ==================================================================== adapters

@torch.no_grad()
def test_adapters_are_loaded_from_a_folder_or_a_file_and_trained_on_from_there(flux, tmp_path):
    x, cond, model = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS), None
    model = Flux(FLUX, 64, lora_rank=4)
    assert torch.equal(model.velocity(x, 0.5, cond), flux.velocity(x, 0.5, cond))
    for w in model.trained():
        w.add_(0.1 * torch.randn_like(w))
    model.save(tmp_path)
    file, bare = (tmp_path / f"{name}.safetensors" for name in ("pytorch_lora_weights", "bare"))
    save_file(load_file(file), bare)                            # no header, so alpha is the rank
    expected = model.velocity(x, 0.5, cond)
    for path in (tmp_path, file, bare):
        assert is_lora(path)
        loaded = Flux(FLUX, 64, lora=str(path))
        assert_near(loaded.velocity(x, 0.5, cond), expected)
        for a, b in zip(loaded.trained(), model.trained(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="could not be loaded as adapters|holds no adapters"):
        Flux(FLUX, 64, lora=str(FLUX / "vae/diffusion_pytorch_model.safetensors"))


def peft_folder(path, **settings):
    """A folder of PEFT's own with random adapters, rank 4 -> the velocity's change by PEFT."""
    model = Flux(FLUX, 64)
    x, cond = torch.randn(2, *model.latent_shape), model.encode(PROMPTS)
    settings = dict(r=4, target_modules=["to_q", "to_k"]) | settings
    adapted = peft.get_peft_model(model.transformer, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, w in adapted.named_parameters():
            if "lora_" in name:
                w.copy_(0.1 * torch.randn_like(w))
        adapted.save_pretrained(path)
        return x, cond, model.velocity(x, 0.5, cond)


@torch.no_grad()
@pytest.mark.parametrize("settings, trained", [
    (dict(lora_alpha=8), True),
    (dict(lora_alpha=12, use_rslora=True, target_modules=["to_q", "to_out.0"]), False),
    (dict(lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 7}), False)])
def test_adapters_that_peft_wrote_have_its_strength_here_and_in_the_tensors_that_are_saved(
        settings, trained, tmp_path):
    x, cond, theirs = peft_folder(tmp_path / "peft", **settings)
    lora, saved = str(tmp_path / "peft"), tmp_path / "run/checkpoint-1"
    if trained:                                 # but hardly
        words = [*SHORT, "--iterations", "1", "--lr", "1e-12", "--init_lora", lora]
        with torch.enable_grad():
            assert train.main([*words, "--out_dir", str(tmp_path / "run")]) is None
    else:
        Flux(FLUX, 64, lora=lora).save(saved)
    tensors = load_file(saved / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")           # without a header: alpha = rank
    pipe = FluxPipeline.from_pretrained(FLUX)
    pipe.load_lora_weights(saved)
    for model in (Flux(FLUX, 64, lora=str(tmp_path / "bare.safetensors")), Flux(pipe, 64)):
        assert_close(model.velocity(x, 0.5, cond), theirs, rtol=1e-4, atol=1e-4)


LAYER = "transformer.transformer_blocks.0.attn.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
ALPHA = {f"{LAYER}.alpha": torch.tensor(4.0)}
HEADER = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}


def adapters_of_one_layer(path, changes, header=None):
    """Write adapters of rank 2 with some changes; None leaves a tensor out. -> A (2, 192), B"""
    A, B = torch.randn(2, 192), torch.randn(192, 2)
    state = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B} | changes
    save_file({name: w for name, w in state.items() if w is not None}, path, header)
    return A, B


@torch.no_grad()
@pytest.mark.parametrize("how", ["header", "tensors", "kohya"])
def test_an_alpha_goes_into_the_tensors_wherever_it_is_said(how, tmp_path):
    path = tmp_path / "a.safetensors"
    A, B = adapters_of_one_layer(path, ALPHA if how == "tensors" else {},
                                 HEADER if how == "header" else None)
    if how == "kohya":                          # three layers in one, whose A they share
        layer, B = "lora_unet_double_blocks_0_img_attn_qkv", torch.randn(3 * 192, 2)
        save_file({f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B,
                   f"{layer}.alpha": torch.tensor(4.0)}, path)
    Flux(FLUX, 64, lora=str(path)).save(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert_close(saved[f"{LAYER}.lora_B.weight"] @ saved[f"{LAYER}.lora_A.weight"], 2 * B[:192] @ A)
    assert not any("alpha" in name for name in saved)


@pytest.mark.parametrize("changes, said", [
    *(({name: torch.zeros(shape)}, f"it has {name}") for name, shape in (
        (TEXT, (2, 2)), ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (2, 2)),
        (f"{LAYER}.dora_scale", (192,)), (f"{LAYER}.lora_magnitude_vector", (192,)),
        (f"{LAYER}.lora_B.bias", (192,)), ("transformer.proj_out.weight", (2, 2)),
        ("transformer.x.alpha", ()))),
    ({"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.zeros(2, 192)},
     "transformer_blocks.9.attn.to_q.lora_A.weight"),
    ({f"{LAYER}.lora_A.weight": None}, "transformer_blocks.0.attn.to_q.lora_A.weight"),
    ({f"{LAYER}.lora_A.weight": torch.full((2, 192), math.nan)}, f"it has {LAYER}.lora_A.weight"),
    (ALPHA, "it has alphas in two places")])
def test_whatever_else_is_in_a_file_of_adapters_and_whatever_it_lacks_is_refused_by_name(
        changes, said, tmp_path):
    adapters_of_one_layer(path := tmp_path / "a.safetensors", changes,
                          HEADER if changes is ALPHA else None)
    with pytest.raises(ValueError, match=f"a.safetensors could not be loaded .*{said}"):
        Flux(FLUX, 64, lora=str(path))


def test_adapters_of_peft_that_change_the_base_are_refused_by_name(tmp_path):
    peft_folder(tmp_path, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="as adapters: it has init_lora_weights"):
        Flux(FLUX, 64, lora=str(tmp_path))


# ==================================================================== folders of models

def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-100])


def remove(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink()


def in_shards(path):
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(path / "transformer")
    shutil.rmtree(path / "transformer")
    transformer.save_pretrained(path / "transformer", max_shard_size="2MB")


def changed(file, **settings):
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | settings), encoding="utf-8")


@pytest.mark.parametrize("file, settings, said", [
    ("model_index.json", dict(_class_name="StableDiffusionPipeline", transformer=None),
     "is a StableDiffusionPipeline, but must be a pipeline of diffusers that has a transformer"),
    ("transformer/config.json", dict(in_channels=128, out_channels=64), "takes 128 .* gives 64"),
    ("transformer/config.json", dict(quantization_config=dict(quant_method="x")), "is quantized")])
def test_a_model_that_cannot_be_aligned_is_refused_by_its_configuration(
        file, settings, said, tmp_path):
    shutil.copytree(FLUX, tmp_path / "flux")
    changed(tmp_path / "flux" / file, **settings)
    with pytest.raises(ValueError, match=said):
        check_model(tmp_path / "flux")


def test_a_pipeline_of_the_hub_that_this_diffusers_does_not_have_is_refused(tmp_path, monkeypatch):
    shutil.copytree(FLUX, tmp_path / "flux")
    changed(tmp_path / "flux/model_index.json", _class_name="Flux9Pipeline")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: tmp_path / "flux")
    with pytest.raises(ValueError, match="a Flux9Pipeline, which this version of diffusers"):
        load_model("a/b")


def test_guidance_that_would_be_ignored_is_refused(tmp_path):
    shutil.copytree(FLUX, tmp_path / "flux")
    changed(tmp_path / "flux/transformer/config.json", guidance_embeds=False)   # as schnell
    assert load_model(tmp_path / "flux", 64).latent_shape == (16, 64)
    with pytest.raises(ValueError, match="guidance has no effect on this FLUX.1; leave it out"):
        load_model(tmp_path / "flux", 64, 3.5)


@pytest.mark.parametrize("damage, file", [
    (pointer, "text_encoder/model.safetensors"), (pointer, "tokenizer/vocab.json"),
    (pointer, "tokenizer/merges.txt"), (pointer, "model_index.json"),
    (cut_off, "text_encoder/model.safetensors"), (cut_off, "tokenizer_2/tokenizer.json"),
    (remove, "transformer/config.json"), (remove, "tokenizer"),
    (remove, "tokenizer_2/tokenizer_config.json")])
def test_half_a_file_is_refused_by_name_before_anything_is_loaded(damage, file, tmp_path):
    shutil.copytree(FLUX, tmp_path / "flux")
    damage(tmp_path / "flux" / file)
    with pytest.raises(ValueError, match=f"{file}.* is missing or not whole"):
        check_model(tmp_path / "flux")


@pytest.mark.parametrize("file", [
    "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json", "vae/config.json", "scheduler/scheduler_config.json",
    "text_encoder_2/model.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00012.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name_before_anything_is_loaded(
        file, tmp_path):
    shutil.copytree(FLUX, tmp_path / "flux")
    if "transformer/" in file:
        in_shards(tmp_path / "flux")
    check_model(tmp_path / "flux")                              # whole
    remove(tmp_path / "flux" / file)
    with pytest.raises(ValueError, match=f"{file} is missing or not whole: No such file"):
        check_model(tmp_path / "flux")


@torch.no_grad()
def test_shards_variants_null_parts_and_tokenizers_of_one_file_are_whole(flux, tmp_path):
    path = tmp_path / "flux"
    shutil.copytree(FLUX, path)
    in_shards(path)
    for file in (path / "text_encoder/model.safetensors",
                 path / "vae/diffusion_pytorch_model.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(path / "tokenizer")
    shutil.rmtree(path / "tokenizer")
    tokenizer.save_pretrained(path / "tokenizer")
    assert not (path / "tokenizer/vocab.json").exists()
    changed(path / "model_index.json", image_encoder=[None, None], feature_extractor=[None, None],
             _name_or_path="x")
    assert find_variant(path) == "fp16"
    ours, x = Flux(path, 64), torch.randn(2, *flux.latent_shape)
    for model in (ours, flux):
        model.images = model.decode(model.velocity(x, 0.5, model.encode(PROMPTS)))
    assert torch.equal(ours.images, flux.images)


@pytest.mark.parametrize("part, file", [
    ("text_encoder", "model"), ("vae", "diffusion_pytorch_model"),
    ("transformer", "diffusion_pytorch_model")])
@pytest.mark.parametrize("reshape", [False, True])
def test_weights_that_lack_a_tensor_or_have_another_shape_are_refused_and_never_made_up(
        part, file, reshape, tmp_path, caplog):
    shutil.copytree(FLUX, tmp_path / "flux")
    for library in (diffusers, transformers):                   # DIFFUSERS_VERBOSITY=error
        caplog.set_level("ERROR", library.__name__)
    logging.disable()                                           # in the file of a reward
    path = tmp_path / "flux" / part / f"{file}.safetensors"
    state = load_file(path)
    name = next(name for name, w in state.items() if w.ndim > 1)
    w = state.pop(name)
    save_file(state | ({name: w[:1].clone()} if reshape else {}), path)
    with pytest.raises(ValueError, match=f"could not be loaded: .*{name.split('.', 1)[1]}"):
        Flux(tmp_path / "flux", 64)
    assert logging.root.manager.disable == logging.CRITICAL
    assert logging.getLogger("transformers").level == logging.ERROR


def test_a_tokenizer_that_makes_the_same_of_all_prompts_is_refused(tmp_path):
    shutil.copytree(FLUX, tmp_path / "flux")
    vocabulary = tmp_path / "flux/tokenizer/vocab.json"
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    special = {word: i for word, i in words.items() if word.startswith("<|")}
    vocabulary.write_text(json.dumps(special), encoding="utf-8")
    (tmp_path / "flux/tokenizer/merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its tokenizer makes the same of all prompts"):
        Flux(tmp_path / "flux", 64)


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
    transformer = diffusers.FluxTransformer2DModel(             # the other defaults are FLUX.1's
        num_layers=1, num_single_layers=1, guidance_embeds=True)
    vae = diffusers.AutoencoderKL(sample_size=1024, force_upcast=True, **VAE)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
        max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    small = FluxPipeline.from_pretrained(FLUX)
    small.tokenizer.model_max_length, small.tokenizer_2.model_max_length = 77, 512
    pipe = FluxPipeline(scheduler, vae, transformers.CLIPTextModel(clip), small.tokenizer,
                        transformers.T5EncoderModel(t5), small.tokenizer_2, transformer)
    pipe.to(torch.bfloat16).save_pretrained(path, max_shard_size="500MB")
    assert (path / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()


@torch.no_grad()
def try_flux_dev(folder):
    """The published shapes: four steps have FluxPipeline's own latents; two iterations of adapters,
    and of all weights, can be loaded into a FluxPipeline."""
    path, prompt = folder / "FLUX.1-dev", "a red apple, 3d style"
    one_layer_flux_dev(path)
    model = Flux(path, 64)
    cond, x1 = model.encode([prompt]), torch.randn(1, *model.latent_shape)
    theirs = model.pipe(prompt, height=64, width=64, num_inference_steps=4, guidance_scale=3.5,
                        latents=x1, output_type="latent").images
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(16, 256, 4096, 0.5, 1.15)
    ts = schedule(4, math.exp(mu))
    ours = rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, "ddim")[0][-1]
    print(f"4 steps: largest difference {(ours - theirs).abs().max():.1e} of latents up to "
          f"{theirs.abs().max():.1f}, which moved by {(theirs - x1).abs().max():.1f}", flush=True)
    assert_near(ours, theirs, 1e-4)
    before = model.velocity(x1, 0.5, cond)
    model = None                                                # frees its memory
    for name, how in (("lora", ["--lora_rank", "64"]), ("full", [])):
        words = ("--preset dpm8 --rewards jpeg --device cpu --resolution 64 --eval_every 0 "
                 "--iterations 2 --group_size 2 --num_anchors 2 --num_rollout_steps 2 "
                 "--num_train_steps 1 --lr 1e-3").split()
        with torch.enable_grad():
            assert train.main([*words, *how, "--model", str(path), "--out_dir", str(folder / name),
                               "--prompts", str(TINY / "prompts/train.txt")]) is None
        saved = folder / name / "checkpoint-2"
        pipe = FluxPipeline.from_pretrained(path if how else saved, dtype=torch.float32)
        if how:
            pipe.load_lora_weights(saved)
        after, lines = Flux(pipe, 64).velocity(x1, 0.5, cond), read_log(folder / name)
        print(f"{name}: 2 iterations, saved, loaded into a FluxPipeline; the velocity has changed "
              f"by up to {(after - before).abs().max():.2e}, of {before.abs().max():.2f}",
              flush=True)
        assert (after - before).abs().max() > 1e-3
        assert len(lines) == 2 and max(line["first_ratio"] for line in lines) < 1e-4


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--flux_dev", action="store_true", required=True)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try_flux_dev(Path(folder))
