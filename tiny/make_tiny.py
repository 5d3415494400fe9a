"""
Makes tiny/: a small but complete FLUX pipeline, a reward model and a judge, trained from scratch on captioned emoji.

    python -m tiny.make_tiny                 # every stage that is not there yet; each can be interrupted and started again
    python -m tiny.make_tiny --stages clip judge --force                   # write these again
    python -m tiny.make_tiny --stages flux --flux_steps 3000 --force       # a generator that was trained for longer

Nobody has to run this: its results are in the repository. It is here so that they can be checked and changed.
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v = eps - x_0, as everywhere in this project.

  stage       makes                                     out of
  tokenizers  tiny/flux/tokenizer, tokenizer_2          the captions (a CLIP byte-pair and a T5 unigram vocabulary)
  vae         tiny/flux/vae                             all pictures; 64x64x3 -> 8x8x16, as FLUX's (factor 8, 16 channels)
  flux        tiny/flux/{transformer,text_encoder*}     the 252 core concepts, flow matching, stopped early on purpose
  clip        tiny/reward                               all pictures but the held-out pairs, contrastive
  judge       tiny/judge                                two other vendors' pictures, which nothing else here ever saw
  prompts     tiny/prompts/*.txt                        the splits: train, test_concept, test_pair
  measure     a table: the scores of real pictures, which no generator can be expected to pass
"""
import argparse, json, math, os, time
from collections import Counter
from pathlib import Path
import machine                                                             # noqa: F401  (before diffusers and open_clip)
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from open_clip.model import CLIP
import rewards

TINY = Path(__file__).resolve().parent
FLUX, WORK = TINY / "flux", Path("out/make_tiny")
STYLES = ["3d", "flat", "noto", "twemoji", "blob"]
TEXT_LENGTH = 16                                                           # tokens of a prompt, in every text encoder here

# ---------------------------------------------------------------------------------------------------------------
# pictures and captions

def read_sheet(name):
    """tiny/pictures/<name>.webp and .tsv -> uint8 images (n, 3, 64, 64) in reading order, and one dict per image."""
    lines = (TINY / "pictures" / f"{name}.tsv").read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"))) for line in lines[1:]]
    sheet = torch.from_numpy(np.array(Image.open(TINY / "pictures" / f"{name}.webp").convert("RGB")))   # (H, W, 3)
    cells = sheet.unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).permute(0, 2, 4, 1, 3)   # (rows, columns, 3, 64, 64)
    return cells.flatten(0, 1)[: len(rows)].contiguous(), rows

def caption(row, style=True):
    return f"{row['phrase']}, {row['style']} style" if style else row["phrase"]

def jitter(images, rng, shift=2 / 32, scale=0.0, turn=0.0):
    """Flip half of the images, then shift, scale and turn each a little; what comes in from outside is the white edge."""
    n = len(images)
    def u(a): return (torch.rand(n, generator=rng) * 2 - 1) * a
    s, angle = 1 + u(scale), u(turn)
    flip = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0)
    row0 = torch.stack([flip * s * angle.cos(), -s * angle.sin(), u(shift)], 1)
    row1 = torch.stack([flip * s * angle.sin(), s * angle.cos(), u(shift)], 1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

# ---------------------------------------------------------------------------------------------------------------
# one training loop for all stages

def fit(name, modules, loss, steps, lr, weight_decay=0.01, decay_lr=True, ema=0.0):
    """
    AdamW on `loss(step, rng) -> scalar`, rng seeded by the step alone, so a run that was interrupted goes on exactly.
    State is saved once a minute in out/make_tiny/<name>.pt. Returns the seconds spent, and leaves the modules with the
    exponential average of their weights (ema = 0: the last ones).
    """
    params = [p for m in modules for p in m.parameters()]
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    mean, start, seconds, path = [p.detach().clone() for p in params], 0, 0.0, WORK / f"{name}.pt"
    if path.exists():
        state = torch.load(path)
        [m.load_state_dict(s) for m, s in zip(modules, state["modules"])]
        opt.load_state_dict(state["opt"])
        mean, start, seconds = state["mean"], state["step"], state["seconds"]
    bar, saved, average = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5), time.time(), None
    for step in bar:
        began, rng = time.time(), torch.Generator().manual_seed(step)
        for group in opt.param_groups:
            fade = 0.5 * (1 + np.cos(np.pi * step / steps)) if decay_lr else 1.0
            group["lr"] = lr * min(1, (step + 1) / 200) * fade
        value = loss(step, rng)
        opt.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        with torch.no_grad():
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(mean, params, 1 - decay)
        seconds += time.time() - began
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        bar.set_postfix_str(f"loss {average:.4f}", refresh=False)
        if time.time() - saved > 60 or step + 1 == steps:
            torch.save(dict(modules=[m.state_dict() for m in modules], opt=opt.state_dict(), mean=mean, step=step + 1, seconds=seconds), f"{path}.new")
            os.replace(f"{path}.new", path)
            saved = time.time()
    with torch.no_grad():
        for p, m in zip(params, mean): p.copy_(m)
    return seconds

# ---------------------------------------------------------------------------------------------------------------
# stages

def make_tokenizers():
    """The classes FLUX ships, with vocabularies of about a thousand entries learnt from the captions."""
    texts = [caption(row) for row in read_sheet("world")[1]]
    bpe = CLIPTokenizer()                                                  # an empty one, for CLIP's own word splitting
    raw = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    raw.normalizer, raw.pre_tokenizer = bpe.backend_tokenizer.normalizer, bpe.backend_tokenizer.pre_tokenizer
    alphabet = sorted({c for t in texts for c in t.lower() if c != " "})
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    learnt = json.loads(raw.to_str())["model"]
    vocab = {token: i for i, token in enumerate(learnt["vocab"])}
    for special in ("<|startoftext|>", "<|endoftext|>"): vocab[special] = len(vocab)   # the two highest ids, as in CLIP
    clip = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in learnt["merges"]], model_max_length=TEXT_LENGTH)
    clip.save_pretrained(FLUX / "tokenizer")
    # T5's unigram trainer prunes most words of so small a corpus, so its pieces are the words, by log frequency, and the letters
    words = Counter(word for text in texts for word in text.lower().replace(",", " ,").split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (",", math.log(words.pop(",") / total))]
    pieces += [("▁" + word, math.log(count / total)) for word, count in sorted(words.items())]
    pieces += [(letter, -20.0) for letter in ["▁"] + alphabet if letter != ","]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH).save_pretrained(FLUX / "tokenizer_2")
    print(f"tokenizers: CLIP {len(clip)} entries, T5 {len(pieces)};", clip.tokenize("an upside-down face, 3d style"))

def make_vae(steps=2200, batch=32):
    images, _ = read_sheet("world")
    vae = AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (16, 32, 64, 64), 1, latent_channels=16,
                        norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False)
    def loss(step, rng):
        x = images[torch.randint(len(images), (batch,), generator=rng)].float() / 127.5 - 1
        x = jitter(x, rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
            y = vae.decode(z).sample.float()
        coarse = sum((F.avg_pool2d(y - x, k)).abs().mean() for k in (1, 2, 4))   # L1 at three scales keeps edges and areas
        return coarse + (y - x).pow(2).mean() + 1e-5 * posterior.kl().float().mean()
    seconds = fit("vae", [vae], loss, steps, lr=1.5e-3, ema=0.998)
    vae.eval()
    with torch.no_grad():
        x = images.float() / 127.5 - 1
        z = torch.cat([vae.encode(c).latent_dist.mean for c in x.split(128)])
        y = torch.cat([vae.decode(c).sample.clamp(-1, 1) for c in z[::16].split(128)])
        psnr = 10 * torch.log10(4 / (y - x[::16]).pow(2).mean()).item()
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())   # so that latents are about N(0, 1)
    vae.half().save_pretrained(FLUX / "vae")
    print(f"vae: {seconds:.0f} s, {psnr:.1f} dB, latents {z.mean():.3f} +- {z.std():.3f}")

def latents_of(vae, images):
    with torch.no_grad():
        z = torch.cat([vae.encode(c.float() / 127.5 - 1).latent_dist.mean for c in images.split(128)])
    return (z - vae.config.shift_factor) * vae.config.scaling_factor        # (n, 16, 8, 8)

def make_flux(steps=1500, batch=64):
    """Flow matching on the core concepts. Stopped early: trained to the end it knows its 1,088 pictures by heart, draws the
    same one from every noise, and leaves a reward nothing to choose among (see tiny/README.md for the stops that were tried)."""
    images, rows = read_sheet("world")
    chosen = [i for i, row in enumerate(rows) if row["core"] == "1" and row["pair"] == "seen"]
    rows = [rows[i] for i in chosen]
    vae = AutoencoderKL.from_pretrained(FLUX / "vae", dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    variants = 8                                                           # of each picture: flipped and shifted, encoded once
    z = torch.stack([latents_of(vae, (jitter(images[chosen].float() / 255, rng) * 255).round()) for _ in range(variants)])
    x0 = FluxPipeline._pack_latents(z.flatten(0, 1), variants * len(chosen), 16, 8, 8).unflatten(0, (variants, -1))  # (8, n, 16, 64)
    clip_tok, t5_tok = CLIPTokenizer.from_pretrained(FLUX / "tokenizer"), T5Tokenizer.from_pretrained(FLUX / "tokenizer_2")
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(clip_tok), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, bos_token_id=clip_tok.bos_token_id,
                                        eos_token_id=clip_tok.eos_token_id, pad_token_id=clip_tok.eos_token_id))
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tok), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                                 tie_word_embeddings=False))
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
                                         joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
    # a fixed table of token ids for every caption with and without its style
    def ids(tok, style): return tok([caption(r, style) for r in rows], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids
    clip_ids, t5_ids = (torch.stack([ids(tok, False), ids(tok, True)]) for tok in (clip_tok, t5_tok))   # (2, n, 16)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    def loss(step, rng):
        i = torch.randint(len(rows), (batch,), generator=rng)
        styled = (torch.rand(batch, generator=rng) < 0.85).long()
        x = x0[torch.randint(variants, (batch,), generator=rng), i]
        eps = torch.randn(x.shape, generator=rng)
        t = torch.sigmoid(torch.randn(batch, generator=rng))               # logit-normal, as FLUX and SD3 were trained
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * eps
        v = transformer(x_t, t5(t5_ids[styled, i])[0], clip(clip_ids[styled, i]).pooler_output, t, image_ids, torch.zeros(TEXT_LENGTH, 3),
                        torch.full((batch,), 3.5), return_dict=False)[0]   # guidance: FLUX's input, here the one value 3.5
        return (v - (eps - x)).pow(2).mean()
    seconds = fit("flux", [transformer, clip, t5], loss, steps, lr=1e-3, decay_lr=False, ema=0.995)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)
    FluxPipeline(scheduler, vae.half(), clip.eval(), clip_tok, t5.eval(), t5_tok, transformer.eval()).save_pretrained(FLUX)
    print(f"flux: {seconds:.0f} s, {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters in the transformer")

def pictures_of(vae, z):
    with torch.no_grad():
        return torch.cat([vae.decode(c / vae.config.scaling_factor + vae.config.shift_factor).sample for c in z.split(128)]).clamp(-1, 1)

def spoil(images, vae, rng):
    """Pictures with the faults of an unfinished generator: noisy latents, latents of two pictures mixed, blur, shuffled blocks.
    Returns them and, to be told from them, what the VAE makes of the unspoilt picture: a reward should not be about the VAE."""
    z = latents_of(vae, images)
    n = len(z)
    amount = torch.rand(n, 1, 1, 1, generator=rng)
    noisy = pictures_of(vae, z + (0.3 + 0.7 * amount) * torch.randn(z.shape, generator=rng))
    mixed = pictures_of(vae, torch.lerp(z, z[torch.randperm(n, generator=rng)], 0.3 + 0.3 * amount))
    x = images.float() / 127.5 - 1
    blurred = F.interpolate(F.avg_pool2d(x, 8), size=64, mode="bilinear")
    blocks = x.unfold(2, 16, 16).unfold(3, 16, 16).flatten(2, 3)           # (n, 3, 16 blocks, 16, 16)
    order = torch.rand(n, 16, generator=rng).argsort(1)
    order[:, :8] = order[:, :8].sort(1).values                             # about half of them stay in order
    shuffled = blocks.gather(2, order[:, None, :, None, None].expand_as(blocks)).unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    return torch.stack([noisy, mixed, blurred, shuffled]), torch.stack([x, pictures_of(vae, z)])   # (4, n, 3, 64, 64), (2, ...), in [-1, 1]

def contrastive(name, images, captions, wrong, vision, steps, batch, seed, vae):
    """CLIP on image-caption pairs. Each image must also refuse its `wrong` captions, each caption its own spoilt pictures."""
    tok = CLIPTokenizer.from_pretrained(FLUX / "tokenizer")
    torch.manual_seed(seed)
    config = dict(embed_dim=128, vision_cfg=dict(image_size=64, **vision),
                  text_cfg=dict(context_length=TEXT_LENGTH, vocab_size=len(tok), width=96, heads=4, layers=2))
    clip = CLIP(**config)
    spoilt, good = spoil(images, vae, torch.Generator().manual_seed(seed))
    def tokens(texts): return tok(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids
    def look(x, rng):                                                      # what must not matter: place, size, light, grain
        x = jitter(x, rng, shift=0.1, scale=0.15, turn=0.2)
        n, noise = len(x), torch.randn(x.shape, generator=rng)
        light = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=rng) * 2 - 1)
        return 1 - (1 - x) * light + 0.05 * torch.rand(n, 1, 1, 1, generator=rng) * noise
    def loss(step, rng):
        rng = torch.Generator().manual_seed(step + 1_000_000 * seed)
        i = torch.randint(len(images), (batch,), generator=rng)
        pick = torch.rand(batch, generator=rng).tolist()
        text = tokens([captions(k, p) for k, p in zip(i.tolist(), pick)] + [wrong(k, p) for k, p in zip(i.tolist(), pick)])
        half = i[: batch // 3]
        fault = torch.randint(len(spoilt), (len(half),), generator=rng)
        kind = torch.randint(2, (batch,), generator=rng)
        x = torch.cat([look(good[kind, i], rng), look(spoilt[fault, half], rng)])
        image, text = clip.encode_image(x, normalize=True), clip.encode_text(text, normalize=True)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T     # (batch + batch/3, 2 batch)
        target = torch.arange(batch)
        return 0.5 * F.cross_entropy(logits[:batch], target) + 0.5 * F.cross_entropy(logits[:, :batch].T, target)
    seconds = fit(name, [clip], loss, steps, lr=1e-3, weight_decay=0.1)
    clip.eval()
    folder = TINY / ("reward" if name == "clip" else name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items() if k != "attn_mask"}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tok.save_pretrained(folder / "tokenizer")
    print(f"{name}: {seconds:.0f} s, {sum(p.numel() for p in clip.parameters()) / 1e6:.2f} M parameters, {len(images)} pictures")

def make_clip(steps=2400, batch=96):
    images, rows = read_sheet("world")
    chosen = [i for i, row in enumerate(rows) if row["pair"] == "seen"]    # a held-out pair is as new to the reward as to the generator
    images, rows = images[chosen], [rows[i] for i in chosen]
    def right(k, p): return caption(rows[k], style=p < 0.85)
    def wrong(k, p):                                                       # the same thing in another style
        others = [s for s in STYLES if s != rows[k]["style"]]
        return f"{rows[k]['phrase']}, {others[int(p * 997) % 4]} style"
    vae = AutoencoderKL.from_pretrained(FLUX / "vae", dtype=torch.float32)
    contrastive("clip", images, right, wrong, dict(timm_model_name="test_resnet", timm_model_pretrained=False, timm_pool="avg", timm_proj="linear"), steps, batch, 1, vae)

def make_judge(steps=2400, batch=96):
    """Another architecture, another seed, other vendors. Styles are named in its captions at random: it learns to ignore them."""
    images, rows = read_sheet("judge")
    phrases = sorted({row["phrase"] for row in rows})
    def styled(phrase, p): return f"{phrase}, {STYLES[int(p * 997) % 5]} style" if p < 0.7 else phrase
    def right(k, p): return styled(rows[k]["phrase"], p)
    def wrong(k, p): return styled(phrases[int(p * 9973 + k) % len(phrases)], p)
    vae = AutoencoderKL.from_pretrained(FLUX / "vae", dtype=torch.float32)
    vision = dict(timm_model_name="test_convnext2", timm_model_pretrained=False, timm_pool="avg", timm_proj="linear")
    contrastive("judge", images, right, wrong, vision, steps, batch, 2, vae)

def make_prompts():
    """train: concepts the reward may train on. test_concept: pretrained on, never rewarded. test_pair: (concept, style) pairs
    that neither the generator nor the reward has seen."""
    rows = [r for r in read_sheet("world")[1] if r["core"] == "1"]
    splits = dict(train=[r for r in rows if r["pair"] == "seen" and r["rl"] == "train"],
                  test_concept=[r for r in rows if r["pair"] == "seen" and r["rl"] == "test"],
                  test_pair=[r for r in rows if r["pair"] == "heldout"])
    (TINY / "prompts").mkdir(exist_ok=True)
    for name, chosen in splits.items():
        (TINY / "prompts" / f"{name}.txt").write_text("".join(caption(r) + "\n" for r in chosen))
        print(f"prompts: {name} {len(chosen)}")

def measure():
    """What the scorers say of real pictures: the ceiling for a generator. Top-1: the right one of all core concepts, same style named."""
    images, rows = read_sheet("world")
    core = [i for i, row in enumerate(rows) if row["core"] == "1"]
    phrases = sorted({rows[i]["phrase"] for i in core})
    vae = AutoencoderKL.from_pretrained(FLUX / "vae", dtype=torch.float32)
    print("scorer  split         pictures  real            through the VAE  top-1")
    for name in [name for name in ("clip", "judge") if rewards.SCORERS[name].home.exists()]:
        scorer = rewards.load(name)
        for split in ("train", "test_concept", "test_pair"):
            wanted = set((TINY / "prompts" / f"{split}.txt").read_text().splitlines())
            i = [k for k in core if caption(rows[k]) in wanted]
            prompts, x = [caption(rows[k]) for k in i], images[i].float() / 255
            real, coded = scorer(x, prompts), scorer(pictures_of(vae, latents_of(vae, images[i])) / 2 + 0.5, prompts)
            with torch.no_grad():                                          # every picture against every concept, in the picture's style
                text = torch.stack([F.normalize(scorer.encode_text([f"{phrase}, {style} style" for phrase in phrases]), dim=1) for style in STYLES])   # (styles, concepts, .)
                each = torch.einsum("nd,ncd->nc", F.normalize(scorer.encode_image(images[i]), dim=1), text[[STYLES.index(rows[k]["style"]) for k in i]])
            right = torch.tensor([phrases.index(rows[k]["phrase"]) for k in i])
            print(f"{name:7} {split:13} {len(i):8}  {real.mean():.4f} ± {real.std() / len(i) ** 0.5:.4f}  {coded.mean():.4f} ± {coded.std() / len(i) ** 0.5:.4f}"
                  f"  {(each.argmax(1) == right).float().mean():.2f}")

STAGES = dict(tokenizers=(make_tokenizers, FLUX / "tokenizer_2"), vae=(make_vae, FLUX / "vae"), flux=(make_flux, FLUX / "model_index.json"),
              clip=(make_clip, TINY / "reward"), judge=(make_judge, TINY / "judge"), prompts=(make_prompts, TINY / "prompts"), measure=(measure, Path("nothing")))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--force", action="store_true", help="make again what is already there (delete out/make_tiny to begin from nothing)")
    parser.add_argument("--flux_steps", type=int, default=1500, help="where to stop the generator (default 1500, what is shipped); larger ones go on from there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    WORK.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        make, product = STAGES[stage]
        if product.exists() and not args.force: print(f"{stage}: {product} is there"); continue
        torch.manual_seed(0)
        make(args.flux_steps) if stage == "flux" else make()
