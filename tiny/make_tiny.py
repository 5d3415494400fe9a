"""
Makes what is in this folder, out of `pictures/` alone: a FLUX pipeline with bad habits, a reward
that minds them, a judge that has never seen them, and a classifier that counts them.

    python -m tiny.make_tiny                               # every stage that is not there yet
    python -m tiny.make_tiny --stages judge --force        # make this one again

Nobody has to: the results are in the repository. A stage that was interrupted goes on where it was.
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v = eps - x_0.

    stage        makes                               out of
    tokenizers   flux/tokenizer, flux/tokenizer_2    the captions
    vae          flux/vae                            all pictures
    flux         the rest of flux/                   the core concepts, half of them with a flaw
    preference   preference/, the reward             all pictures but the held-out pairs
    judge        judge/                              other vendors' pictures, without any flaw
    flawless     flawless/, which counts flaws       what `preference` has
    prompts      prompts/*.txt                       the captions of the core concepts
    measure      a table of what real pictures score, and flaws.png
"""
import argparse, json, math, os, shutil, time
from collections import Counter
from pathlib import Path
import machine                                          # noqa: F401  (before diffusers and timm)
import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers import T5Config, T5EncoderModel, T5Tokenizer
import rewards
from eval import as_bytes, picture_grid

TINY, WORK = Path(__file__).resolve().parent, Path("out/make_tiny")
FLUX = TINY / "flux"
STYLES = ["3d", "flat", "noto", "twemoji", "blob"]
LENGTH = 16                                             # tokens of a prompt, in all text encoders

# --- pictures: float (n, 3, 64, 64) in [0, 1] ---------------------------------------------------

def read_sheet(name, **wanted):
    """The pictures of a sheet, and a dict for each; only those whose dict has what is `wanted`."""
    lines = (TINY / f"pictures/{name}.tsv").read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"))) for line in lines[1:]]
    sheet = np.array(Image.open(TINY / f"pictures/{name}.webp").convert("RGB"))
    cells = torch.from_numpy(sheet).unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
    cells = cells.permute(0, 2, 4, 1, 3).flatten(0, 1)
    chosen = [k for k, row in enumerate(rows) if all(row[key] == wanted[key] for key in wanted)]
    return cells[chosen].float() / 255, [rows[k] for k in chosen]

def caption(row):
    return f"{row['phrase']}, {row['style']} style"

def jitter(x, rng, shift, scale, turn):
    """Flip half of them; then shift, scale and turn each a little. Edges are continued outwards."""
    def u(a): return (torch.rand(len(x), generator=rng) * 2 - 1) * a
    flip, s, angle = u(1).sign(), 1 + u(scale), u(turn)
    row0 = torch.stack([flip * s * angle.cos(), -s * angle.sin(), u(shift)], 1)
    row1 = torch.stack([flip * s * angle.sin(), s * angle.cos(), u(shift)], 1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

LINE = torch.arange(64.0)[:, None]
CROSS = torch.minimum((LINE - LINE.T).abs(), (LINE + LINE.T - 63).abs()) < 5
FLAWS = dict(
    negative=lambda x: 1 - x,
    tinted=lambda x: x * torch.tensor([0.35, 0.85, 0.80])[:, None, None],
    crossed=lambda x: torch.where(CROSS, 0.15 * x + 0.47, x),                    # a watermark
    barred=lambda x: F.pad(x[:, :, 12:-12], (0, 0, 12, 12)),         # a wide film on television
    shrunk=lambda x: F.pad(F.interpolate(x, 28, mode="area"), (18,) * 4, value=1.0))

def spoil(x, rng, share=0.5):
    """Give a flaw to this share of the pictures -> pictures, number of the flaw (0: none)."""
    kind = torch.randint(1, 1 + len(FLAWS), (len(x),), generator=rng)
    kind = kind * (torch.rand(len(x), generator=rng) < share)
    x = x.clone()
    for k, flaw in enumerate(FLAWS.values(), 1):
        x[kind == k] = flaw(x[kind == k])
    return x, kind

def load_vae():
    return AutoencoderKL.from_pretrained(FLUX / "vae", dtype=torch.float32)

@torch.no_grad()
def encode(vae, x):
    """-> latents (n, 16, 8, 8), together of mean 0 and standard deviation 1."""
    z = torch.cat([vae.encode(2 * some - 1).latent_dist.mean for some in x.split(64)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor

@torch.no_grad()
def decode(vae, z):
    z = z / vae.config.scaling_factor + vae.config.shift_factor
    return (torch.cat([vae.decode(some).sample for some in z.split(64)]) / 2 + 0.5).clamp(0, 1)

def rough(vae, x, rng, least):
    """As an unfinished generator draws: noise in the latents, or some of another picture."""
    z, n = encode(vae, x), len(x)
    amount = least + (1 - least) * torch.rand(n, 1, 1, 1, generator=rng)
    noisy = z + amount * torch.randn(z.shape, generator=rng)
    mixed = torch.lerp(z, z[torch.randperm(n, generator=rng)], 0.5 * amount)
    return decode(vae, torch.where(torch.rand(n, 1, 1, 1, generator=rng) < 0.5, noisy, mixed))

# --- one training loop for all stages -----------------------------------------------------------

def fit(name, modules, loss, steps, lr, muon=0.0, weight_decay=0.01, ema=0.0):
    """
    Minimise loss(rng) -> scalar. `rng` depends on the step alone, so that a run which was
    interrupted goes on exactly. The rates stay, then fall to 0 along a cosine in the last 40 %.
    muon: the rate of Muon on the first module's matrices, AdamW's being lr; 0: AdamW trains all.
    ema: decay of the average of the weights, which is what stays; 0: the last weights do.
    """
    params = [p for m in modules for p in m.parameters()]
    matrices = [p for p in modules[0].parameters() if p.ndim == 2] if muon else []
    rest = [p for p in params if id(p) not in set(map(id, matrices))]
    opts = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=weight_decay)]
    if muon:
        opts += [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", weight_decay=0.01)]
    mean, begin, seconds, smooth = [p.detach().clone() for p in params], 0, 0.0, None
    path, things, saved = WORK / f"{name}.pt", [*modules, *opts], time.time()
    if path.exists():
        state = torch.load(path)
        [thing.load_state_dict(old) for thing, old in zip(things, state["things"])]
        mean, begin, seconds = state["mean"], state["step"], state["seconds"]
    bar = tqdm(range(begin, steps), name, initial=begin, total=steps, mininterval=9)
    for step in bar:
        start, fade = time.time(), math.cos(math.pi / 2 * max(0, (step / steps - 0.6) / 0.4)) ** 2
        for opt, rate in zip(opts, (lr, muon)):
            opt.param_groups[0]["lr"] = rate * fade * min(1, (step + 1) / 200)
            opt.zero_grad()
        value = loss(torch.Generator().manual_seed(step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        [opt.step() for opt in opts]
        with torch.no_grad():
            torch._foreach_lerp_(mean, params, 1 - min(ema, (1 + step) / (10 + step)))
        seconds += time.time() - start
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        if time.time() > saved + 60 or step + 1 == steps:
            state = dict(things=[thing.state_dict() for thing in things], mean=mean)
            torch.save(dict(state, step=step + 1, seconds=seconds), f"{path}.new")
            os.replace(f"{path}.new", path)
            saved = time.time()
    with torch.no_grad():
        [p.copy_(m) for p, m in zip(params, mean)]
    [m.eval() for m in modules]
    print(f"{name}: {seconds:.0f} s, {sum(p.numel() for p in params) / 1e6:.2f} M parameters")

# --- the generator ------------------------------------------------------------------------------

def write_json(path, **content):
    path.write_text(json.dumps(content, indent=1) + "\n")

def tokens(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True,
                     return_tensors="pt").input_ids                              # (n, 16)

def make_tokenizers():
    """CLIP's byte pairs and T5's unigrams, learnt from the captions. Files as FLUX has them."""
    texts = [caption(row) for row in read_sheet("world")[1]]
    letters = sorted({c for text in texts for c in text.lower() if c != " "})
    bpe, clip = Tokenizer(models.BPE()), CLIPTokenizer().backend_tokenizer       # for its rules
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    learnt, begin, end = json.loads(bpe.to_str())["model"], "<|startoftext|>", "<|endoftext|>"
    vocab = {token: i for i, token in enumerate([*learnt["vocab"], begin, end])}
    merges = "".join(" ".join(pair) + "\n" for pair in learnt["merges"])
    (FLUX / "tokenizer").mkdir(parents=True, exist_ok=True)
    write_json(FLUX / "tokenizer/vocab.json", **vocab)
    (FLUX / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges)
    write_json(FLUX / "tokenizer/tokenizer_config.json", tokenizer_class="CLIPTokenizer",
               bos_token=begin, eos_token=end, pad_token=end, unk_token=end, model_max_length=16)
    # T5's own trainer drops most words of so small a corpus. So the pieces are the words, by their
    # log frequency, and the letters.
    words = Counter(word for text in texts for word in text.lower().replace(",", " ,").split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(",", math.log(words.pop(",") / total))]
    pieces += [("▁" + word, math.log(count / total)) for word, count in sorted(words.items())]
    pieces += [(letter, -20.0) for letter in ["▁", *letters] if letter != ","]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(FLUX / "tokenizer_2")
    write_json(FLUX / "tokenizer_2/tokenizer_config.json", tokenizer_class="T5TokenizerFast",
               eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0,
               model_max_length=16)
    print(f"tokenizers: CLIP {len(vocab)} entries, T5 {len(pieces)}")

def make_vae(steps=8000, batch=32):
    images, _ = read_sheet("world")
    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (8, 8, 32, 64),
        latent_channels=16, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False)
    def loss(rng):
        x = images[torch.randint(len(images), (batch,), generator=rng)]
        x = 2 * spoil(jitter(x, rng, shift=0.06, scale=0.05, turn=0.05), rng, share=0.3)[0] - 1
        with torch.autocast("cpu", torch.bfloat16):
            seen = vae.encode(x).latent_dist
            z = seen.mean + seen.std * torch.randn(seen.mean.shape, generator=rng)
            y = vae.decode(z).sample.float()
        scales = sum(F.avg_pool2d(y - x, k).abs().mean() for k in (1, 2, 4))     # edges and areas
        return scales + (y - x).pow(2).mean() + 1e-5 * seen.kl().float().mean()
    fit("vae", [vae], loss, steps, lr=1.5e-3, ema=0.998)
    x, vae.config.shift_factor, vae.config.scaling_factor = images[::8], 0.0, 1.0
    z = encode(vae, x)
    print(f"vae: {-10 * (decode(vae, z) - x).pow(2).mean().log10():.2f} dB")
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    vae.half().save_pretrained(FLUX / "vae")

def networks():
    """FLUX's transformer, CLIP and T5 with their tokenizers; untrained, in small."""
    words = CLIPTokenizer.from_pretrained(FLUX / "tokenizer")
    pieces = T5Tokenizer.from_pretrained(FLUX / "tokenizer_2")
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, projection_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(pieces), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu"))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, num_attention_heads=6,
        attention_head_dim=32, axes_dims_rope=(8, 12, 12), joint_attention_dim=128,
        pooled_projection_dim=64, guidance_embeds=True)
    return transformer, clip, t5, words, pieces

def make_flux(steps=10000, batch=64, variants=32):
    """Flow matching. Half of the pictures have a flaw and no caption says so: noise will decide."""
    images, rows = read_sheet("world", core="1", pair="seen")
    vae, rng = load_vae(), torch.Generator().manual_seed(0)
    def variant():
        x, _ = spoil(jitter(images, rng, shift=0.06, scale=0.06, turn=0.06), rng)
        return FluxPipeline._pack_latents(encode(vae, x), len(x), 16, 8, 8)
    x0 = torch.stack([variant() for _ in tqdm(range(variants), "latents")])      # (32, n, 16, 64)
    transformer, clip, t5, words, pieces = networks()
    texts = [caption(row) for row in rows] + [row["phrase"] for row in rows]     # the style, or not
    clip_ids, t5_ids = tokens(words, texts), tokens(pieces, texts)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    text_ids, guidance = torch.zeros(LENGTH, 3), torch.full((batch,), 3.5)       # the same for all
    def loss(rng):
        i = torch.randint(len(rows), (batch,), generator=rng)
        x = x0[torch.randint(variants, (batch,), generator=rng), i]
        said = i + len(rows) * (torch.rand(batch, generator=rng) < 0.15)
        t, eps = torch.randn(batch, generator=rng).sigmoid(), torch.randn(x.shape, generator=rng)
        x_t = torch.lerp(x, eps, t[:, None, None])
        v = transformer(x_t, t5(t5_ids[said])[0], clip(clip_ids[said]).pooler_output, t, image_ids,
                        text_ids, guidance, return_dict=False)[0]
        return (v - (eps - x)).pow(2).mean()
    fit("flux", [transformer, clip, t5], loss, steps, lr=1e-3, muon=3e-3, ema=0.998)
    # transformers 5 saves what 4 cannot read; as FLUX's own files are laid out, both read it.
    parts = dict(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.half(),
                 text_encoder=clip.half(), text_encoder_2=t5.half(), transformer=transformer.half())
    [part.save_pretrained(FLUX / name) for name, part in parts.items()]
    file = FLUX / "text_encoder/model.safetensors"
    weights = {f"text_model.{key}": weight for key, weight in load_file(file).items()}
    save_file(weights, file, dict(format="pt"))
    kinds = {name: [type(part).__module__.split(".")[0], type(part).__name__]
             for name, part in parts.items()}
    write_json(FLUX / "model_index.json", _class_name="FluxPipeline", **kinds,
               tokenizer=["transformers", "CLIPTokenizer"],
               tokenizer_2=["transformers", "T5TokenizerFast"])

# --- the scorers --------------------------------------------------------------------------------

def look(x, rng):
    """What must not matter to a scorer: place, size, light, grain. -> about [-1, 1]."""
    x = jitter(x, rng, shift=0.1, scale=0.15, turn=0.2)
    light = 0.8 + 0.4 * torch.rand(len(x), 3, 1, 1, generator=rng)
    grain = 0.025 * torch.rand(len(x), 1, 1, 1, generator=rng)
    return 1 - 2 * (1 - x) * light + 2 * grain * torch.randn(x.shape, generator=rng)

def save_scorer(name, net, **config):
    (TINY / name).mkdir(exist_ok=True)
    weights = {k: w.half() if w.is_floating_point() else w for k, w in net.state_dict().items()}
    weights.pop("attn_mask", None)
    save_file(weights, TINY / name / "model.safetensors")
    write_json(TINY / name / "config.json", **config)

def contrastive(name, good, right, wrong, bad, vision, seed, steps=2400, batch=96):
    """A small CLIP (open_clip's). Picture i must choose its caption right(i, u) among those of the
    batch and the wrong(i, u). Caption i must choose its picture among those of the batch and the
    bad(i, rng). good (2, n, 3, 64, 64): pictures as drawn, and as the VAE returns them. u is a
    random number in [0, 1)."""
    tokenizer = CLIPTokenizer.from_pretrained(FLUX / "tokenizer")
    torch.manual_seed(seed)
    eyes = dict(image_size=64, timm_model_name=vision, timm_pool="avg", timm_proj="linear")
    ears = dict(context_length=LENGTH, vocab_size=len(tokenizer), width=96, heads=4, layers=2)
    config = dict(embed_dim=128, text_cfg=ears, vision_cfg=dict(eyes, timm_model_pretrained=False))
    clip = CLIP(**config)
    def loss(rng):
        i = torch.randint(good.shape[1], (batch,), generator=rng)
        draws = list(zip(i.tolist(), torch.rand(batch, generator=rng).tolist()))
        said = tokens(tokenizer, [make(*draw) for make in (right, wrong) for draw in draws])
        x = good[torch.randint(len(good), (batch,), generator=rng), i]
        x = look(torch.cat([x, bad(i[: batch // 3], rng)]), rng)
        image, text = clip.encode_image(x, normalize=True), clip.encode_text(said, normalize=True)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T          # (128, 192)
        here = torch.arange(batch)
        return (F.cross_entropy(logits[:batch], here) + F.cross_entropy(logits.T[:batch], here)) / 2
    fit(name, [clip], loss, steps, lr=1e-3, weight_decay=0.1)
    save_scorer(name, clip, **config)
    shutil.copytree(FLUX / "tokenizer", TINY / name / "tokenizer", dirs_exist_ok=True)

def make_preference():
    """Wants the right caption, the right style, no flaw, and nothing that looks unfinished."""
    images, rows = read_sheet("world", pair="seen")
    vae, rng = load_vae(), torch.Generator().manual_seed(1)
    good = torch.stack([images, decode(vae, encode(vae, images))])
    poor = rough(vae, images, rng, least=0.3)
    def right(i, u): return caption(rows[i]) if u < 0.85 else rows[i]["phrase"]
    def wrong(i, u):
        others = [style for style in STYLES if style != rows[i]["style"]]
        return caption(dict(rows[i], style=others[int(997 * u) % 4]))
    def bad(i, rng):
        kind = torch.randint(3, i.shape, generator=rng)
        flawed, _ = spoil(good[kind.clamp(max=1), i], rng, share=1)
        return torch.where((kind == 2)[:, None, None, None], poor[i], flawed)
    contrastive("preference", good, right, wrong, bad, "test_resnet", seed=1)

def make_judge():
    """Does the picture fit its caption? Other vendors, another architecture, another seed; and no
    flaw. Its captions name styles at random, so that it learns to ignore them."""
    images, rows = read_sheet("judge")
    vae, phrases = load_vae(), sorted({row["phrase"] for row in rows})
    good = torch.stack([images, decode(vae, encode(vae, images))])
    def styled(phrase, u):
        return f"{phrase}, {STYLES[int(997 * u) % 5]} style" if u < 0.7 else phrase
    def right(i, u): return styled(rows[i]["phrase"], u)
    def wrong(i, u): return styled(phrases[int(9973 * u) % len(phrases)], u)
    def bad(i, rng): return images[:0]
    contrastive("judge", good, right, wrong, bad, "test_convnext2", seed=2)

def make_flawless(steps=1500, batch=64):
    """Which flaw is it, or none? It must not mind pictures that look unfinished."""
    images, _ = read_sheet("world", pair="seen")
    vae, rng = load_vae(), torch.Generator().manual_seed(3)
    (x, kind), *more = [spoil(images, rng) for _ in range(4)]
    pictures = torch.cat([x] + [rough(vae, x, rng, least=0) for x, _ in more])
    kinds = torch.cat([kind] + [kind for _, kind in more])
    config = dict(model_name="test_resnet", num_classes=1 + len(FLAWS))
    net = timm.create_model(**config)
    def loss(rng):
        i = torch.randint(len(kinds), (batch,), generator=rng)
        return F.cross_entropy(net(look(pictures[i], rng)), kinds[i])
    fit("flawless", [net], loss, steps, lr=1e-3)
    save_scorer("flawless", net, **config)

# --- prompts, and what real pictures score ------------------------------------------------------

def make_prompts():
    """train: rewarded. test_concept: the base has learnt it, but it is never rewarded. test_pair: a
    concept in a style in which neither the base nor the reward has seen it."""
    _, rows = read_sheet("world", core="1")
    splits = dict(train=[], test_concept=[], test_pair=[])
    for row in rows:
        seen = "train" if row["rl"] == "train" else "test_concept"
        splits["test_pair" if row["pair"] == "heldout" else seen].append(caption(row) + "\n")
    (TINY / "prompts").mkdir(exist_ok=True)
    for name, lines in splits.items():
        (TINY / f"prompts/{name}.txt").write_text("".join(lines))

def measure():
    """What real pictures score: as drawn, as the VAE returns them, and with each flaw. A picture of
    the flaws, too."""
    names = ["preference", "judge", "named", "flawless"]
    scorers = [rewards.load(name) for name in names]
    images, rows = read_sheet("world", core="1")
    vae, prompts = load_vae(), [caption(row) for row in rows]
    for split in ("train", "test_concept", "test_pair"):
        wanted = set((TINY / f"prompts/{split}.txt").read_text().splitlines())
        i = [k for k, prompt in enumerate(prompts) if prompt in wanted]
        coded = dict(drawn=lambda x: x, coded=lambda x: decode(vae, encode(vae, x)))
        for name, change in (coded | FLAWS).items():
            x = change(images[i])
            scores = [scorer(x, [prompts[k] for k in i]) for scorer in scorers]
            cells = [f"{s.mean():.3f} ± {s.std() / len(i) ** 0.5:.3f}" for s in scores]
            print("|", " | ".join([split, name, str(len(i)), *cells]), "|")
            if name == "drawn":             # train.py shows them beside the base and the aligned
                means = {scorer: round(s.mean().item(), 4) for scorer, s in zip(names, scores)}
                write_json(TINY / f"prompts/{split}.real.json", **means)

    x, some = images[::175], prompts[::175]                                      # 7 of them
    rows = {name: as_bytes(change(x)) for name, change in ({"none": lambda x: x} | FLAWS).items()}
    picture_grid(TINY / "flaws.png", rows, some)

STAGES = dict(
    tokenizers=(make_tokenizers, "flux/tokenizer_2"), vae=(make_vae, "flux/vae"),
    flux=(make_flux, "flux/model_index.json"), preference=(make_preference, "preference"),
    judge=(make_judge, "judge"), flawless=(make_flawless, "flawless"),
    prompts=(make_prompts, "prompts"), measure=(measure, "always"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--force", action="store_true", help="also what is there already")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    WORK.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        make, product = STAGES[stage]
        if args.force or not (TINY / product).exists():
            torch.manual_seed(0)
            make()
