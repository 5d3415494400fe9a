"""
What paper/gpu.sh runs with random weights: kinds of attention, and iterations of whole models, with
text encoders, VAE and the paper's three scorers in their published sizes. Tokenizers are the tests'
small ones, filled up to as many tokens. On a CPU everything is narrow: a rehearsal.

    python -m paper.gpu attention flux FILE SETTINGS            # settings are those of train.py
    python -m paper.gpu klein offload, FILE SETTINGS            # an iteration with
                                # --text_encoder_device offload, then one without

FILE gets a line of JSON for each result.
"""
import dataclasses, json, statistics, sys, tempfile
from pathlib import Path
from unittest import mock
import torch
import rewards, train
import diffusers, transformers
from machine import one_line
from paper import attention, bench
from paper.counts import KLEIN, VAE
from run import Run
from tests import small_pipelines

def clip(kind, width, layers, heads, act="quick_gelu"):
    return kind, transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, hidden_act=act,
        num_attention_heads=heads, projection_dim=width, eos_token_id=2)

VAE_16 = diffusers.AutoencoderKL, VAE
CLIP, CLIP_WITH_PROJECTION = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
T5 = transformers.T5EncoderModel, transformers.T5Config(        # v1.1 XXL
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
QWEN = transformers.Qwen3Config(                                # 4B
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True)
SD3_MEDIUM = dict(
    sample_size=128, num_layers=24, num_attention_heads=24, joint_attention_dim=4096,
    out_channels=16, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))
SIZES = {       # {pipeline of tests/small_pipelines.py: {its part: (class, configuration)}}
    "flux": dict(transformer=(diffusers.FluxTransformer2DModel, dict(guidance_embeds=True)),
                 vae=VAE_16, text_encoder=clip(CLIP, 768, 12, 12), text_encoder_2=T5),
    "klein": dict(transformer=(diffusers.Flux2Transformer2DModel, KLEIN),
                  vae=(diffusers.AutoencoderKLFlux2, {}),
                  text_encoder=(transformers.Qwen3ForCausalLM, QWEN)),
    "sd3": dict(transformer=(diffusers.SD3Transformer2DModel, SD3_MEDIUM), vae=VAE_16,
                text_encoder=clip(CLIP_WITH_PROJECTION, 768, 12, 12), text_encoder_3=T5,
                text_encoder_2=clip(CLIP_WITH_PROJECTION, 1280, 32, 20, "gelu")),
    "z_image": dict(transformer=(diffusers.ZImageTransformer2DModel, {}), vae=VAE_16,
                    text_encoder=(transformers.Qwen3Model, QWEN))}

def random_pipeline(name, device):
    """A pipeline of SIZES with random weights, in bf16 on a GPU."""
    small, _ = small_pipelines.build(name)
    parts = dict(small.components)
    for part in parts.values():
        if isinstance(part, transformers.PreTrainedTokenizerBase):
            part.model_max_length = 77 if "CLIP" in type(part).__name__ else 512
    torch.set_default_dtype(torch.bfloat16 if "cuda" in device else torch.float32)
    with torch.device(device), torch.no_grad():
        for part, (kind, config) in SIZES[name].items():
            parts[part] = (kind(**config) if isinstance(config, dict) else kind(config)).eval()
        for part, w in parts["transformer"].named_parameters():
            if "pad_token" in part or not w.any():              # the former are not initialised
                w.normal_(std=0.02)
    torch.set_default_dtype(torch.float32)
    return type(small)(**parts)

def load_random(spec, device, load=rewards.load):
    """rewards.load, but with random weights, and numbers as ImageReward's vocabulary."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file, mock.patch.multiple(
            rewards, fetch=lambda *_: Path(file.name), read_weights=lambda *_: {},
            load_strictly=lambda net, *_: net.eval().requires_grad_(False)), torch.device(device):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(30517))]
        print(*words, sep="\n", file=file, flush=True)
        return load(spec, device)

def iterate(name, places, file, flags):
    """An iteration of Neighbor GRPO for each of `places`, values of --text_encoder_device."""
    cfg = train.parse_config(["--eval_every", "0", *flags])
    load = load_random
    if cfg.device == "cpu":
        (pipe, more), load = small_pipelines.build(name), rewards.load
        cfg.resolution, cfg.call = str(more["resolution"]), json.dumps(more.get("call", {}))
    else:
        pipe = random_pipeline(name, cfg.device)
    model = train.load(dataclasses.replace(cfg, model=pipe))
    with mock.patch.object(rewards, "load", load):
        scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, ["a"])
    run = Run(cfg, model, scorers)
    for cfg.iterations, where in enumerate(places, 1):
        model.text_device = where
        for part in model.encoders:
            part.to("cpu" if where else model.device)
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train.train(cfg, model, scorers, run)
        note(file, dict(run.lines()[-1], step=name, text_encoder_device=where, flags=flags))

def attend(geometry, file, flags):
    """Seconds of an evaluation of 12 latents with each kind of attention, and how far the gradient
    of two is from that of plain products. Prints the fastest kind whose gradient is right."""
    cfg = bench.parsed([*bench.SIZES[geometry].split(), "--no-compile", *flags])
    model = bench.build(cfg, geometry)
    x, cond = torch.randn(12, *model.latent_shape, device=model.device), model.encode(["a"])
    for w in model.trained():                   # new adapters add nothing
        w.data.normal_(std=0.01)

    def gradient():
        model.velocity(x[:2], 0.5, cond).pow(2).mean().backward()
        found = torch.cat([w.grad.flatten() for w in model.trained()])
        model.transformer.zero_grad()
        return found

    def evaluate():
        began = bench.now(model.device)
        with torch.no_grad():
            model.velocity(x, 0.5, cond)
        return bench.now(model.device) - began

    attention.use("plain")
    plain, allowed, seconds = gradient(), 0, {}
    for kind in [*attention.KINDS][:-1]:
        line = dict(step="attention", kind=kind)
        try:
            attention.use(kind)
            line["off"] = ((gradient() - plain).norm() / plain.norm()).item()
            line["seconds"] = statistics.median([evaluate() for _ in range(4)][1:])
            allowed = allowed or 2 * line["off"]                # flash is the first
            if line["off"] <= allowed:                          # nan is not
                seconds[kind] = line["seconds"]
        except Exception as error:
            line["error"] = one_line(error)
        note(file, line)
    print("fastest:", min(seconds, key=seconds.get, default="flash"))

def note(file, found):
    found = dict(found, torch=torch.__version__)
    print(found, flush=True)
    with open(file, "a", encoding="utf-8") as lines:
        print(json.dumps(found), file=lines)

if __name__ == "__main__":
    what, how, file, *flags = sys.argv[1:]
    if what == "attention":
        attend(how, file, flags)
    else:
        iterate(what, how.split(","), file, flags)
