"""
A small genuine WanPipeline draws videos that flicker. train.py aligns it with a reward on whole
videos, as it would align Wan 2.1.

    python examples/video.py            # makes out/video/base first, if it is not there yet

A video shows an emoji that moves: "a red heart, moving left". Half of the videos that the base
learns from flicker: every other frame is dark, and no prompt says so. `steady` is the reward.
out/video/before_after.png has all frames of some held-out prompts, on the same noise; .webp moves.
"""
import functools, json, sys
from pathlib import Path
from unittest.mock import patch
HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))                   # so that the script finds the project's files
import train
import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from tokenizers import Tokenizer, models, pre_tokenizers
from eval import as_bytes, draw_grid, picture_grid, sample
from pipeline import load_model
from tiny.make_tiny import fit, read_sheet

OBJECTS = ["a red heart", "a red apple", "a pig", "a sunflower", "a taxi", "a fish", "a balloon",
           "a grinning face"]
WAYS = dict(left=(-1.0, 0.0), right=(1.0, 0.0), up=(0.0, -1.0), down=(0.0, 1.0))
PROMPTS = [f"{name}, moving {way}" for name in OBJECTS for way in WAYS]
HELD_OUT = [prompt for i, prompt in enumerate(PROMPTS) if i // 4 % 4 == i % 4]  # of the alignment
FRAMES, SIDE, TRAVEL = 9, 48, 14                # of a video: frames, pixels, pixels that it moves
PATCH, Z, LENGTH = 6, 16, 8                     # pixels and numbers of a latent; tokens of a prompt

@functools.cache
def emoji():
    """How much darker than white the objects are, in the middle of a frame: (8, 3, 48, 48)."""
    cells, rows = read_sheet("world", style="flat")
    ink = 1 - cells[list(map([row["phrase"] for row in rows].index, OBJECTS))]
    return F.pad(F.interpolate(ink, (30, 30), mode="bilinear", antialias=True), (9,) * 4)

def videos(prompts):
    """What n prompts ask for, without flicker: (n, 9, 3, 48, 48) in [0, 1]."""
    way = torch.tensor([WAYS[prompt.split()[-1]] for prompt in prompts])[:, None]   # (n, 1, 2)
    at = TRAVEL * way * torch.linspace(-0.5, 0.5, FRAMES)[:, None]      # (n, 9, 2) pixels
    ink = emoji()[[OBJECTS.index(prompt.split(",")[0]) for prompt in prompts]]
    ink = ink.repeat_interleave(FRAMES, 0)                              # (9 n, 3, 48, 48)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(ink), 2, 3), ink.shape, align_corners=False)
    ink = F.grid_sample(ink, grid - at.reshape(-1, 1, 1, 2) * 2 / SIDE, align_corners=False)
    return (1 - ink).unflatten(0, (-1, FRAMES))

def measure(x, prompts):
    """Videos (n, 9, 3, 48, 48) -> flicker (n,), how far the brightness jumps between frames, about
    0.45 if every other one is dark; object (n,), 1 if all of it is there, 0 for empty frames."""
    flicker = x.mean((2, 3, 4)).diff(dim=1).abs().mean(1)
    paper = torch.cat([x[..., 0, :], x[..., -1, :]], -1).median(-1).values      # (n, 9, 3)
    drawn, asked = (F.adaptive_avg_pool3d((1 - y).transpose(1, 2), (FRAMES, 12, 12)).flatten(1)
                    for y in (x / paper.clamp(min=0.2)[..., None, None], videos(prompts)))
    return flicker, 1 - (drawn - asked).square().sum(1) / asked.square().sum(1)

def steady(x, prompts):
    """The reward; 1 is best. Without the term for the object, objects fade."""
    flicker, there = measure(x, prompts)
    return there.clamp(min=-1) - 2 * flicker

steady.video = True                             # so it gets whole videos, not single frames

# --- the base -----------------------------------------------------------------------------------

@torch.no_grad()
def make_vae(x):
    """A VAE that needs no training: it writes a patch of 6x6 pixels as its first 16 principal
    components. Its layers keep such a linear map: silu(z + 100) is z + 100, and one large constant
    channel keeps the norm from changing anything."""
    patches = patchify(2 * x.transpose(1, 2) - 1, PATCH).movedim(1, -1).flatten(0, -2)  # (m, 108)
    mean, up, constant = patches.mean(0), 100.0, 1e6
    basis = torch.linalg.svd(patches - mean, full_matrices=False)[2][:Z]                # (16, 108)
    std = ((patches - mean) @ basis.T).std(0)
    scale = (std * std.mean()).sqrt()           # in the latents, large components stay larger
    vae = diffusers.AutoencoderKLWan(
        base_dim=Z + 1, z_dim=Z, dim_mult=[1], num_res_blocks=0, temperal_downsample=[],
        in_channels=len(mean), out_channels=len(mean), patch_size=PATCH, scale_factor_temporal=1,
        scale_factor_spatial=PATCH, latents_mean=[0.0] * Z, latents_std=scale.tolist()).eval()
    for w in vae.parameters():
        w.zero_()
    for part, first, last in ((vae.encoder, basis, torch.eye(Z)),
                              (vae.decoder, torch.eye(Z), basis.T)):
        part.conv_in.weight[:Z, :, 2, 1, 1] = first                     # 2, 1, 1: here and now
        part.conv_in.bias.copy_(torch.tensor([up] * Z + [constant]))
        part.norm_out.gamma.fill_(constant / (Z + 1) ** 0.5)
        part.conv_out.weight[:len(last), :Z, 2, 1, 1] = last
        part.conv_out.bias[:len(last)] = -up * last.sum(1)
    vae.encoder.conv_in.bias[:Z] -= basis @ mean
    vae.encoder.conv_out.bias[Z:] = -30         # logarithm of the variance
    vae.decoder.conv_out.bias += mean
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight[:, :, 0, 0, 0] = torch.eye(conv.out_channels)
    return vae

def make_base(path, steps=2000, batch=32, heads=7, layers=3):
    """Flow matching: v = eps - x_0 at x_t = (1-t) x_0 + t eps. The text encoder stays random."""
    torch.manual_seed(0)
    words = sorted({word for prompt in PROMPTS for word in prompt.replace(",", " ,").split()})
    words = {word: i for i, word in enumerate(["<pad>", *words])}
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))       # for words it does not know
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>",
                                                 model_max_length=LENGTH)
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=len(words), d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4)).eval()
    net = diffusers.WanTransformer3DModel(
        patch_size=(3, 2, 2), num_attention_heads=heads, attention_head_dim=32, in_channels=Z,
        out_channels=Z, text_dim=64, freq_dim=64, ffn_dim=64 * heads, num_layers=layers,
        rope_max_seq_len=32, cross_attn_norm=True)
    x, dim = videos(PROMPTS), 1 - 0.5 * (torch.arange(FRAMES) % 2)[:, None, None, None]
    x = torch.cat([x, x, x * dim, x * (1.5 - dim)])                     # (128, 9, 3, 48, 48)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe = diffusers.WanPipeline(words, text, make_vae(x), scheduler, net)
    with torch.no_grad():
        z = pipe.vae.encode(2 * x.transpose(1, 2) - 1).latent_dist.mean     # (128, 16, 9, 8, 8)
        z = z / torch.tensor(pipe.vae.config.latents_std)[:, None, None, None]
        cond = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False,
                                  max_sequence_length=LENGTH)[0]            # (32, 8, 64)

    def loss(rng):
        some = torch.randint(len(z), (batch,), generator=rng)
        t = (torch.randn(batch, generator=rng) + 0.3).sigmoid()
        eps = torch.randn(batch, *z.shape[1:], generator=rng)
        x_t = torch.lerp(z[some], eps, t[:, None, None, None, None])
        v = net(x_t, 1000 * t, cond[some % len(PROMPTS)], return_dict=False)[0]
        return (v - (eps - z[some])).square().mean()

    path.parent.mkdir(parents=True, exist_ok=True)
    with (patch("tiny.make_tiny.WORK", path.parent),            # an interrupted fit goes on there
          patch("torch.Tensor.bfloat16", torch.Tensor.float)):  # Muon's, slow on most CPUs
        fit("base", [net], loss, steps, lr=1.2e-3, muon=3e-3, ema=0.99)
    pipe.save_pretrained(path)

# --- the alignment ------------------------------------------------------------------------------

def main(out="out/video", more=(), **size):
    out, shown = Path(out), {}
    diffusers.logging.set_verbosity_error()     # WanPipeline warns of 8 frames in every call
    if not (out / "base/model_index.json").exists():
        make_base(out / "base", **size)
    (out / "train.txt").write_text("\n".join(p for p in PROMPTS if p not in HELD_OUT),
                                   encoding="utf-8")
    call = dict(num_frames=FRAMES - 1)          # WanPipeline adds one
    settings = dict(model=out / "base", out_dir=out / "run", prompts=out / "train.txt", lr=5e-5,
                    eval_prompts=out / "train.txt", rewards=f"{__file__}:steady", eval_scorers="",
                    resolution=SIDE, guidance=1, call=json.dumps(call), iterations=25, sigma=0.7,
                    prompts_per_iteration=4, eval_every=0)
    given = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
    if train.main(["--overwrite", *given, *more]):
        sys.exit(1)
    prompts = [prompt for prompt in HELD_OUT for _ in range(4)]         # four noises each
    for label, path in dict(before=out / "base", after=next(out.glob("run/checkpoint-*"))).items():
        model = load_model(path, SIDE, 1, call=call)
        x = sample(model, HELD_OUT, range(8), model.times(8), "dpmpp_2m", 4)
        flicker, there = measure(x, prompts)
        print(f"{label}: reward {steady(x, prompts).mean():.3f}, flicker {flicker.mean():.3f}, "
              f"object {there.mean():.3f}, steady {(flicker < 0.1).float().mean():.0%}")
        shown[label] = as_bytes(x[::4])
    picture_grid(out / "before_after.png", shown, HELD_OUT)             # with a WebP, that moves
    strip = {f"{label}: {HELD_OUT[i]}": x[i] for i in (0, 2, 5) for label, x in shown.items()}
    strip = draw_grid(strip, [f"frame {i + 1}" for i in range(FRAMES)])
    strip.quantize(64).save(out / "before_after.png")

if __name__ == "__main__":
    main()
