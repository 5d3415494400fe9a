"""
The scorers, one test per sentence. Each scorer is compared with other people's code that has the
same random weights.

    python -m pytest -q tests/test_rewards.py       # no weights, no network, no GPU

  scorer          runs on              is compared with
  hpsv2           open_clip            transformers' CLIPModel, torchvision's resize and pad
  pickscore       transformers         open_clip's CLIP, PIL
  clipscore       open_clip            transformers' CLIPModel with quick_gelu, PIL
  aesthetic       transformers         open_clip's vision tower
  imagereward     transformers' BLIP   timm's vision transformer, transformers' BERT with
                                       cross-attention
  preference, judge, named
                  open_clip            open_clip's own logits, real pictures
  flawless        timm                 real pictures, with flaws and without
  unifiedreward   a server             a local server with canned replies
  ocr             a package            drawn text

The architectures are small versions of the published ones. Other tests show that the published
files fit, by the names and shapes of all their tensors. Tests that need an optional package are
skipped without it.
"""
import ast, base64, functools, http.server, io, json, math, os, random, re, sys, threading, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before torchvision)
import open_clip
import timm
import torchvision.transforms.functional as TF
import transformers
from torch import nn
import eval as evaluation
import rewards
import train
from tests.conftest import assert_near

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HERE = rewards.HERE
server_reward, packages = (rewards.import_source(str(HERE / f"examples/{name}_reward{s}.py"))[0]
                           for name, s in (("server", ""), ("package", "s")))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red apple", "an octopus, 3d style",
           "A very long story: " + "once upon a time " * 40, ""]        # the third is always cut
SIZES = [(64, 64), (224, 224), (100, 150), (301, 97)]   # (H, W); the last crop is at half a pixel
SMALL = dict(embed_dim=24, text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2,
                                         layers=2))
VISION = dict(image_size=224, layers=2, width=48, head_width=24, patch_size=28)
CLIPS = ["hpsv2", "pickscore", "clipscore", "aesthetic"]
HEAD_LAYERS = (0, 2, 4, 6, 7)       # the linear ones in the heads of `aesthetic` and `imagereward`


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(size, count=4):
    """Coarse colours and fine noise, so that every resize, crop and clamp changes the scores.
    -> float (count, 3, H, W), and the same as PIL images"""
    coarse = F.interpolate(torch.rand(count, 3, 5, 5), size, mode="bicubic")
    x = (coarse + 0.3 * torch.randn(count, 3, *size)).clamp(0, 1)
    arrays = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return x, [Image.fromarray(array) for array in arrays]


def lively(net):
    """Random weights large enough that scores differ between pictures and prompts."""
    for name, w in net.named_parameters():
        if w.ndim > 1 and "embed" not in name:
            nn.init.normal_(w, std=1.5 / w[0].numel() ** 0.5)
        elif w.ndim == 1:
            w.data += 0.1 * torch.randn_like(w)
    return net.eval().requires_grad_(False)


def renamed(name, changes):
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


def as_transformers(net, act, layers=2):
    """The weights of an open_clip CLIP in transformers' CLIPModel, which other people wrote."""
    vision, out = net.visual, {}
    common = dict(num_hidden_layers=layers, num_attention_heads=2, hidden_act=act,
                  projection_dim=24)
    config = transformers.CLIPConfig(
        text_config=dict(hidden_size=32, intermediate_size=128, eos_token_id=2, **common),
        vision_config=dict(hidden_size=48, intermediate_size=192, image_size=vision.image_size[0],
                           patch_size=vision.patch_size[0], **common),
        projection_dim=24)
    plain = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight"}
    in_block = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2",
                "attn.": "self_attn."}
    outside = {"ln_final": "text_model.final_layer_norm",
               "visual.ln_pre": "vision_model.pre_layrnorm",
               "visual.ln_post": "vision_model.post_layernorm"}
    for name, w in net.state_dict().items():
        side = "vision" if name.startswith("visual.") else "text"
        if name in plain:
            out[plain[name]] = w
        elif name in ("text_projection", "visual.proj"):
            out[f"{side if side == 'text' else 'visual'}_projection.weight"] = w.T
        elif "resblocks" in name:
            n, rest = name.split("resblocks.")[1].split(".", 1)
            start = f"{side}_model.encoder.layers.{n}."
            if "in_proj" in rest:
                for part, piece in zip("qkv", w.chunk(3)):
                    out[f"{start}self_attn.{part}_proj.{rest.split('_')[-1]}"] = piece
            else:
                out[start + renamed(rest, in_block)] = w
        else:
            out[renamed(name, outside)] = w
    model = transformers.CLIPModel(config)
    model.load_state_dict(out)
    return model.eval().requires_grad_(False)


def open_clip_ids(prompts):
    return open_clip.get_tokenizer("ViT-H-14")(prompts)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders and files in the published layout, with small random networks, and these networks."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)

    hps = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION))
    torch.save({"epoch": 1, "state_dict": hps.state_dict()}, root / "HPS_v2.1_compressed.pt")

    dfn = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION, quick_gelu=True))
    (root / "dfn").mkdir()
    config = dict(
        model_cfg=dict(SMALL, vision_cfg=VISION, quick_gelu=True),
        preprocess_cfg=dict(mean=MEAN, std=STD, interpolation="bicubic", resize_mode="squash"))
    (root / "dfn/open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(dfn.state_dict(), root / "dfn/open_clip_pytorch_model.bin")

    pick = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION))
    as_transformers(pick, "gelu").save_pretrained(root / "pick")

    laion = lively(open_clip.model.CLIP(**SMALL, vision_cfg=VISION, quick_gelu=True))
    as_transformers(laion, "quick_gelu").save_pretrained(root / "laion")
    head = {name: torch.randn(*shape) / shape[-1] ** 0.5
            for name, shape in head_layout(24).items()}
    torch.save(head, root / "laion/sac+logos+ava1-l14-linearMSE.pth")

    return dict(root=root, hpsv2=hps, clipscore=dfn, pickscore=pick, aesthetic=laion)


def head_layout(width):
    """{name: shape} of the five linear layers in the heads of `aesthetic` and `imagereward`."""
    sizes = [(1024, width), (128, 1024), (64, 128), (16, 64), (1, 16)]          # (out, in)
    weights = {f"layers.{k}.weight": size for k, size in zip(HEAD_LAYERS, sizes)}
    return weights | {f"layers.{k}.bias": size[:1] for k, size in zip(HEAD_LAYERS, sizes)}


# ---- ImageReward's published layout, according to the names in its file

VIT = dict(width=64, layers=2, heads=4, patch=32, image=224)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS,
                            *("##" + c for c in LETTERS),
                            "red", "apple", "once", "upon", "time", ",", ":"]))
BERT = dict(width=48, layers=2, heads=4, vocab=len(WORDS) + 2, mlp=96)


def image_reward_layout(vit, bert, positions=512):
    """{name: shape} of ImageReward.pt."""
    w, b, tokens = vit["width"], bert["width"], (vit["image"] // vit["patch"]) ** 2 + 1

    def linear(name, o, i):
        return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    eye = "visual_encoder."
    shapes = {eye + "cls_token": (1, 1, w), eye + "pos_embed": (1, tokens, w),
              eye + "patch_embed.proj.weight": (w, 3, vit["patch"], vit["patch"]),
              eye + "patch_embed.proj.bias": (w,), **norm(eye + "norm", w)}
    for n in range(vit["layers"]):
        block = f"{eye}blocks.{n}."
        shapes |= (linear(block + "attn.qkv", 3 * w, w) | linear(block + "attn.proj", w, w)
                   | linear(block + "mlp.fc1", 4 * w, w) | linear(block + "mlp.fc2", w, 4 * w)
                   | norm(block + "norm1", w) | norm(block + "norm2", w))
    words = "text_encoder.embeddings."
    shapes |= {words + "position_ids": (1, positions),
               words + "word_embeddings.weight": (bert["vocab"], b),
               words + "position_embeddings.weight": (positions, b),
               **norm(words + "LayerNorm", b)}
    for n in range(bert["layers"]):
        block = f"text_encoder.encoder.layer.{n}."
        for kind, seen in (("attention", b), ("crossattention", w)):
            shapes |= (linear(f"{block}{kind}.self.query", b, b)
                       | linear(f"{block}{kind}.self.key", b, seen)
                       | linear(f"{block}{kind}.self.value", b, seen)
                       | linear(f"{block}{kind}.output.dense", b, b)
                       | norm(f"{block}{kind}.output.LayerNorm", b))
        shapes |= (linear(block + "intermediate.dense", bert["mlp"], b)
                   | linear(block + "output.dense", b, bert["mlp"])
                   | norm(block + "output.LayerNorm", b))
    shapes |= linear("vision_proj", 256, w) | linear("text_proj", 256, b)
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()}
    return shapes | {f"mlp.{name}": shape for name, shape in head_layout(b).items()}


def image_reward_tensor(name, shape):
    if name.endswith("position_ids"):
        return torch.arange(512)[None]
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
        return 1 + 0.1 * torch.randn(shape)
    spread = len(shape) > 1 and "embed" not in name
    return torch.randn(shape) * (1.5 / math.prod(shape[1:]) ** 0.5 if spread else 0.3)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_reward")
    torch.manual_seed(1)
    state = {name: image_reward_tensor(name, shape)
             for name, shape in image_reward_layout(VIT, BERT).items()}
    torch.save(state, root / "ImageReward.pt")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.ImageReward, "vision", dict(
            rewards.ImageReward.vision, hidden_size=64, intermediate_size=256,
            num_hidden_layers=2, num_attention_heads=4, patch_size=32))
        patch.setattr(rewards.ImageReward, "text", dict(
            rewards.ImageReward.text, vocab_size=len(WORDS) + 2, hidden_size=48,
            encoder_hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4))
        patch.setattr("huggingface_hub.hf_hub_download",        # the folder has all files
                      lambda *args, **kwargs: pytest.fail(f"{args} was downloaded"))
        scorer = rewards.load(f"imagereward={root}")
    return scorer, state


@pytest.fixture
def load(published, monkeypatch):
    """load(name): the scorer, with small random weights in the published layout."""
    config = published["root"] / "small-for-tests.json"
    config.write_text(json.dumps(dict(SMALL, vision_cfg=VISION)), encoding="utf-8")
    open_clip.add_model_config(config)
    monkeypatch.setattr(rewards.HPSv2, "architecture", "small-for-tests")
    small = dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
                 patch_size=28, projection_dim=24)
    for scorer in (rewards.PickScore, rewards.Aesthetic):
        monkeypatch.setattr(scorer, "vision", scorer.vision | small)
    monkeypatch.setattr(rewards.PickScore, "text", rewards.PickScore.text | dict(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2))
    paths = dict(hpsv2="HPS_v2.1_compressed.pt", pickscore="pick", clipscore="dfn",
                 aesthetic="laion")
    return lambda name: rewards.load(f"{name}={published['root'] / paths[name]}")


# ------------------------------------------------------------------------------------------------
# Cosines

def shorter_edge_to_224(picture, floor=False):
    """The preprocessing of OpenAI's CLIP, by hand with PIL. `floor`: round the position of the crop
    down, as transformers does."""
    width, height = picture.size
    short = min(width, height)
    size = ((224, int(224 * height / short)) if width == short else
            (int(224 * width / short), 224))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - 224) // 2 if floor else round((length - 224) / 2) for length in size)
    return normalised(picture.crop((left, top, left + 224, top + 224)))


def normalised(picture):
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_bit_equal_to_open_clips_and_pils(size):
    x, pils = pictures(size)
    ours = rewards.prepare((x * 255).round().byte(), rewards.shorter_edge_to(224))
    theirs = open_clip.image_transform(224, is_train=False)
    assert torch.equal(ours, torch.stack([theirs(pil) for pil in pils]))
    assert torch.equal(ours, torch.stack([shorter_edge_to_224(pil) for pil in pils]))


def longer_edge_to_224(picture):
    """The preprocessing of HPSv2.1, from its description, with torchvision."""
    x = TF.pil_to_tensor(picture).float() / 255
    scale = 224 / max(x.shape[1:])
    height, width = (round(scale * side) for side in x.shape[1:])
    if scale != 1:
        x = TF.resize(x, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    left, top = (224 - width) // 2, (224 - height) // 2
    x = TF.pad(x, [left, top, 224 - width - left, 224 - height - top])
    return TF.normalize(x, MEAN, STD)


def transformers_cosine(net, pixels):
    out = net(input_ids=open_clip_ids(PROMPTS), pixel_values=pixels)
    return (out.image_embeds * out.text_embeds).sum(1)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_the_cosine_of_the_whole_picture_between_black_bars(size, load, published):
    (x, pils), net = pictures(size), as_transformers(published["hpsv2"], "gelu")
    scores = load("hpsv2")(x, PROMPTS)
    whole = transformers_cosine(net, torch.stack([longer_edge_to_224(pil) for pil in pils]))
    assert_near(scores, whole, 1e-4)
    assert scores.abs().max() <= 1 and scores.std() > 0.02
    if size[0] != size[1]:                              # the naive form: crop as for other CLIPs
        crop = transformers_cosine(net, torch.stack([shorter_edge_to_224(pil) for pil in pils]))
        assert (scores - crop).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_the_scaled_cosine_of_clip_with_transformers_crop(size, load, published):
    (x, pils), net = pictures(size), published["pickscore"]             # open_clip's
    px = torch.stack([shorter_edge_to_224(pil, floor=True) for pil in pils])
    cosine = (net.encode_image(px, normalize=True)
              * net.encode_text(open_clip_ids(PROMPTS), normalize=True)).sum(1)
    assert_near(load("pickscore")(x, PROMPTS), net.logit_scale.exp() * cosine, 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_clipscore_squashes_pictures_and_uses_the_activation_that_its_config_names(
        size, load, published):
    x, pils = pictures(size)
    squashed = torch.stack([normalised(pil.resize((224, 224), Image.Resampling.BICUBIC))
                            for pil in pils])
    scores = load("clipscore")(x, PROMPTS)
    quick, plain = (as_transformers(published["clipscore"], act) for act in ("quick_gelu", "gelu"))
    assert_near(scores, transformers_cosine(quick, squashed), 1e-4)
    assert (scores - transformers_cosine(plain, squashed)).abs().max() > 1e-3   # the naive forms
    if size[0] != size[1]:
        crop = torch.stack([shorter_edge_to_224(pil) for pil in pils])
        assert (scores - transformers_cosine(quick, crop)).abs().max() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_is_a_linear_head_on_the_unit_image_embedding_and_ignores_the_prompt(
        size, load, published):
    (x, pils), scorer = pictures(size), load("aesthetic")
    px = torch.stack([shorter_edge_to_224(pil) for pil in pils])
    features = published["aesthetic"].encode_image(px)                  # open_clip's
    state = torch.load(published["root"] / "laion/sac+logos+ava1-l14-linearMSE.pth")

    def head(y):
        for k in HEAD_LAYERS:
            y = y @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
        return y[:, 0]

    scores = scorer(x, PROMPTS)
    unit = features / features.norm(dim=1, keepdim=True)
    assert_near(scores, head(unit), 1e-4)
    assert torch.equal(scores, scorer(x, PROMPTS[::-1]))
    assert (scores - head(features)).abs().max() > 0.1  # the naive form: not normalised


def test_the_tokenizer_with_open_clips_vocabulary_gives_the_tokens_of_open_clips_tokenizer():
    prompts = PROMPTS + ["don't STOP: 3,200 prompts (really)", "日本語 café"]
    ours = rewards.clip_tokenizer()(prompts, padding="max_length", truncation=True,
                                    return_tensors="pt").input_ids
    theirs = open_clip_ids(prompts)
    end = theirs.argmax(1)                              # only the padding behind it differs
    assert torch.equal(ours.argmax(1), end) and end[2] == 76
    for row in range(len(ours)):
        assert torch.equal(ours[row, : end[row] + 1], theirs[row, : end[row] + 1])


@pytest.mark.parametrize("name", CLIPS)
def test_a_score_does_not_depend_on_the_batch_its_order_or_autocast(name, load):
    x, scorer = pictures((80, 60))[0], load(name)
    scores = scorer(x, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    parts = torch.cat([scorer(x[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    assert_near(scores, parts, 1e-4)
    assert_near(scores.flip(0), scorer(x.flip(0), PROMPTS[::-1]), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(x, PROMPTS), scores)  # computed in float32 nevertheless
    shift = 0.4 * (x < 0.9)                             # less than half a step of 8-bit files
    assert torch.equal(scorer(x + shift / 255, PROMPTS),
                       scorer((x * 255 + shift).round() / 255, PROMPTS))


def test_each_prompt_is_encoded_once_and_alone_so_a_score_does_not_depend_on_earlier_prompts(
        load, monkeypatch):
    scorer, encoded = load("hpsv2"), []
    encode = scorer.encode_text

    def encode_and_record(prompts):
        encoded.append(prompts)
        return encode(prompts)

    monkeypatch.setattr(scorer, "encode_text", encode_and_record)
    x, prompts = pictures((64, 64))[0], ["a", "b", "a", "a"]
    first = scorer(x, prompts)
    assert torch.equal(scorer(x, prompts), first) and encoded == [["a"], ["b"]]
    other = load("hpsv2")
    other.cached_text(["b", "c", "d"])
    assert torch.equal(other(x, prompts), first)        # bit for bit, as a resumed run needs it
    assert 1000 < scorer.encode_one.cache_info().maxsize < 10_000       # it does not grow for ever


# ------------------------------------------------------------------------------------------------
# Scorers of the small world

def emoji(cells):
    """Pictures from the sheet, by the numbers of their cells: (n, 3, 64, 64)."""
    sheet = np.array(Image.open(HERE / "tiny/pictures/world.webp").convert("RGB"))
    squares = [sheet[i // 72 * 64 :, i % 72 * 64 :][:64, :64] for i in cells]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255


def real_pictures(chosen):
    """Emoji from the sheet, those whose row is `chosen`, and their captions."""
    text = (HERE / "tiny/pictures/world.tsv").read_text(encoding="utf-8")
    head, *lines = (line.split("\t") for line in text.splitlines())
    cells = [i for i, line in enumerate(lines) if chosen(dict(zip(head, line)))]
    return emoji(cells), [f"{lines[i][0]}, {lines[i][1]} style" for i in cells]


@pytest.mark.parametrize("name, least", [("preference", 0.5), ("judge", 0.1)])
def test_the_scorers_match_held_out_real_pictures_to_their_captions(name, least):
    images, prompts = real_pictures(lambda row: row["core"] == "1" and row["pair"] == "heldout")
    images, prompts, n, scorer = images[::2], prompts[::2], 53, rewards.load(name)
    table = torch.stack([scorer(images, [prompt] * n) for prompt in prompts], 1)
    assert_near(scorer(images, prompts), table.diag(), 1e-4)
    assert (table.argmax(1) == torch.arange(n)).float().mean() > least          # by chance: 0.02


@pytest.mark.parametrize("size", [64, 128])
def test_the_preference_is_open_clips_own_cosine_of_pictures_resized_with_antialiasing(size):
    scorer, x = rewards.load("preference"), pictures((size, size))[0]
    small = TF.resize((x * 255).round() / 255, [64, 64], TF.InterpolationMode.BILINEAR,
                      antialias=True)
    ids = scorer.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True,
                           return_tensors="pt").input_ids
    with torch.no_grad():                               # exp(logit_scale) cosine
        logits, _ = scorer.net.get_logits(small * 2 - 1, ids)
    assert_near(scorer(x, PROMPTS), logits.diag() / scorer.net.logit_scale.exp(), 1e-4)


def test_named_is_1_where_the_prompts_concept_is_the_first_of_252_that_the_judge_would_choose():
    images, prompts = real_pictures(lambda row: row["core"] == "1" and row["style"] == "noto")
    images, prompts = images[::9], prompts[::9]
    judge, named = rewards.load("judge"), rewards.load("named")
    phrases = sorted({prompt.partition(",")[0] for prompt in real_pictures(
        lambda row: row["core"] == "1")[1]})
    assert len(phrases) == 252
    table = torch.stack([judge(images, [phrase] * len(images)) for phrase in phrases], 1)
    first = [phrases[k] for k in table.argmax(1)]
    expected = [float(f == prompt.partition(",")[0]) for f, prompt in zip(first, prompts)]
    assert named(images, prompts).tolist() == expected and 0.1 < np.mean(expected) < 0.9


def test_flawless_tells_real_pictures_from_the_same_with_a_flaw():
    """The flaws are tiny/make_tiny.py's, written down here once more."""
    images, prompts = real_pictures(lambda row: row["core"] == "1")
    images, prompts = images[::8], prompts[::8]
    tint = torch.tensor([0.35, 0.85, 0.80])[:, None, None]
    flawed = {"negative": 1 - images, "tinted": images * tint, "barred": images.clone(),
              "shrunk": torch.ones_like(images)}
    flawed["barred"][:, :, :12] = flawed["barred"][:, :, -12:] = 0
    flawed["shrunk"][:, :, 18:46, 18:46] = F.interpolate(images, 28, mode="area")
    flawless = rewards.load("flawless")
    assert (flawless(images, prompts) > 0.5).float().mean() > 0.9
    for name, x in flawed.items():
        assert (flawless(x, prompts) > 0.5).float().mean() < 0.1, name


def test_a_tilde_in_the_path_of_a_small_scorer_is_the_home_folder(monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(HERE / "tiny"))
    x = pictures((64, 64))[0]
    from_home, given = rewards.load("preference=~/judge"), rewards.load("judge")
    assert torch.equal(from_home(x, PROMPTS), given(x, PROMPTS))


def test_the_jpeg_reward_is_minus_the_files_kilobytes_so_plain_pictures_win(tmp_path):
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)])
    scores = rewards.load("jpeg")(images, ["", ""])
    for image, score in zip(images, scores):
        TF.to_pil_image((image * 255).round().byte()).save(tmp_path / "a.jpg", quality=95)
        assert score.item() == pytest.approx(-(tmp_path / "a.jpg").stat().st_size / 1000)
    assert scores[0] > scores[1]


# ------------------------------------------------------------------------------------------------
# ImageReward

def reward_by_hand(state, pils, prompts, tokenizer):
    """BLIP was made of a vision transformer, here timm's, and of BERT with cross-attention."""
    vision = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=32, embed_dim=64, depth=2, num_heads=4, num_classes=0,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).eval()
    start = "blip.visual_encoder."
    vision.load_state_dict({name.removeprefix(start): w for name, w in state.items()
                            if name.startswith(start)})
    px = torch.stack([shorter_edge_to_224(pil) for pil in pils])
    image = vision.forward_features(px)                                 # (G, 50, 64)
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                    return_tensors="pt")

    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, is_decoder=True, add_cross_attention=True)
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    for layer in bert.encoder.layer:                                    # BERT's keys are 48 wide
        layer.crossattention.self.key, layer.crossattention.self.value = (
            nn.Linear(64, 48) for _ in range(2))
    start = "blip.text_encoder."
    ours = {name.removeprefix(start): w for name, w in state.items()
            if name.startswith(start) and not name.endswith("position_ids")}
    bert.load_state_dict({"embeddings.token_type_embeddings.weight": torch.zeros(2, 48), **ours})
    seen = ids.attention_mask.bool()[:, None, None].expand(-1, 1, 35, -1)       # not causal
    y = bert(ids.input_ids, seen, encoder_hidden_states=image).last_hidden_state[:, 0]
    for k in HEAD_LAYERS:
        y = F.linear(y, state[f"mlp.layers.{k}.weight"], state[f"mlp.layers.{k}.bias"])
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_imagereward_is_the_standardised_head_on_the_first_token_of_blip(size, image_reward):
    (scorer, state), (x, pils) = image_reward, pictures(size)
    prompts = ["a red apple", "abc " * 60, "apple red a", ""]
    scores = scorer(x, prompts)
    by_hand = reward_by_hand(state, pils, prompts, scorer.tokenizer)
    assert_close(scores, by_hand, rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.1
    parts = torch.cat([scorer(x[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    assert_close(scores, parts, rtol=1e-4, atol=1e-4)


def test_imagereward_reads_35_tokens_and_the_first_is_cls(image_reward):
    (scorer, _), (x, _) = image_reward, pictures((64, 64), 1)
    ids = scorer.tokenizer(["A red Apple"], padding="max_length", truncation=True,
                           max_length=35).input_ids[0]
    assert ids[0] == 2 and ids[4] == 3 and ids[5:] == [0] * 30
    assert scorer.tokenizer.convert_ids_to_tokens(ids[1:4]) == ["a", "red", "apple"]

    def score(prompt):
        return scorer(x, [prompt])

    assert torch.equal(score("a " * 40 + "red"), score("a " * 40 + "apple"))    # both are cut off
    assert not torch.equal(score("a " * 32 + "red"), score("a " * 32 + "apple"))


# ------------------------------------------------------------------------------------------------
# Files in the published layout

def clip_layout(width, layers, patch, tokens, text_width, text_layers, out):
    """{name: shape} of an open_clip ViT checkpoint."""
    shapes = {"positional_embedding": (77, text_width), "text_projection": (text_width, out),
              "logit_scale": (), "token_embedding.weight": (49408, text_width),
              "ln_final.weight": (text_width,), "ln_final.bias": (text_width,),
              "visual.class_embedding": (width,), "visual.positional_embedding": (tokens, width),
              "visual.proj": (width, out), "visual.conv1.weight": (width, 3, patch, patch)}
    shapes |= {f"visual.{ln}.{x}": (width,) for ln in ("ln_pre", "ln_post")
               for x in ("weight", "bias")}
    for start, w, count in (("visual.transformer", width, layers),
                            ("transformer", text_width, text_layers)):
        for n in range(count):
            block = f"{start}.resblocks.{n}."
            for name, (o, i) in {"attn.in_proj_": (3 * w, w), "attn.out_proj.": (w, w),
                                 "mlp.c_fc.": (4 * w, w), "mlp.c_proj.": (w, 4 * w)}.items():
                shapes |= {f"{block}{name}weight": (o, i), f"{block}{name}bias": (o,)}
            shapes |= {f"{block}ln_{k}.{x}": (w,) for k in (1, 2) for x in ("weight", "bias")}
    return shapes


VIT_H = clip_layout(1280, 32, 14, 257, 1024, 24, 1024)
BLIP = image_reward_layout(dict(width=1024, layers=24, heads=16, patch=16, image=224),
                           dict(width=768, layers=12, vocab=30524, mlp=3072))


@pytest.mark.parametrize("layout, make, rename", [
    (VIT_H, lambda: open_clip.model.CLIP(**open_clip.get_model_config(
        rewards.HPSv2.architecture)), dict),
    (BLIP, rewards.ImageReward.build, rewards.ImageReward.rename),
    (head_layout(768), lambda: rewards.Aesthetic.build()[1], dict)], ids="hpsv2 blip head".split())
def test_every_tensor_of_the_published_layout_fits_and_none_may_differ(
        layout, make, rename, tmp_path):
    path = tmp_path / "file"
    tensors = {name: torch.empty(shape, device="meta") for name, shape in layout.items()}
    state = rename({name: w for name, w in tensors.items() if "position_ids" not in name})
    with torch.device("meta"):
        net = make()
    rewards.load_strictly(net, state, path, "source")
    name = min(state)
    for spoilt, problem in [
            (state | {"more": torch.empty(1)}, 'Unexpected.* in state_dict: "more"'),
            ({n: w for n, w in state.items() if n != name}, f'Missing.* in state_dict: "{name}"'),
            (state | {name: torch.empty(7, 7, device="meta")}, f"size mismatch for {name}")]:
        with pytest.raises(ValueError, match=f"file is not the file of source: .*{problem}"):
            rewards.load_strictly(net, spoilt, path, "source")


def test_the_networks_that_no_shape_tells_from_others_have_the_published_heads():
    vision, text = rewards.ImageReward.vision, rewards.ImageReward.text
    assert (len(BLIP), vision["num_attention_heads"], text["num_attention_heads"]) == (625, 16, 12)
    for scorer, name in ((rewards.PickScore, "ViT-H-14"), (rewards.Aesthetic, "ViT-L-14")):
        config = open_clip.get_model_config(name)       # the CLIPs that they were made of
        assert scorer.vision["num_attention_heads"] == scorer.vision["hidden_size"] // config[
            "vision_cfg"].get("head_width", 64) == 16
        with torch.device("meta"):
            theirs, ours = open_clip.model.CLIP(**config), scorer.build()
        if scorer is rewards.Aesthetic:
            theirs, ours = theirs.visual, ours[0]
        else:
            assert scorer.text["num_attention_heads"] == config["text_cfg"]["heads"] == 16
            assert scorer.text["hidden_act"] == scorer.vision["hidden_act"] == "gelu"
        assert (sum(w.numel() for w in theirs.parameters())
                == sum(w.numel() for w in ours.parameters()))


UNREADABLE = "cannot be read as a file that contains only tensors"
NOT_HPSV2 = "another file than the one of https://huggingface.co/xswu/HPSv2"


@pytest.mark.parametrize("break_it, sentence", [
    (lambda path, state: path.unlink(),
     "should be HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2, a folder with it, or "
     "a hub id, but is none of them"),
    (lambda path, state: path.write_bytes(path.read_bytes()[:1000]),
     f"{UNREADABLE}; .* {NOT_HPSV2}"),
    (lambda path, state: path.write_bytes(b""), UNREADABLE),
    (lambda path, state: torch.save([1], path), UNREADABLE),
    (lambda path, state: torch.save(dict(state, epoch=3), path), UNREADABLE),
    (lambda path, state: torch.save(
        dict(state_dict={k: v for k, v in state.items() if k != "visual.proj"}), path),
     'Missing key.s. in state_dict: "visual.proj"'),
    (lambda path, state: torch.save(dict(state_dict=state, code=Path), path),   # would run code
     f"{UNREADABLE}; .* {NOT_HPSV2}"),
])
def test_the_error_for_a_missing_or_wrong_file_names_the_file_that_was_expected(
        break_it, sentence, load, published, tmp_path):
    path, state = tmp_path / "HPS_v2.1_compressed.pt", dict(published["hpsv2"].state_dict())
    torch.save(dict(state_dict=state), path)
    rewards.load(f"hpsv2={path}")
    assert rewards.load(f"hpsv2={tmp_path}").name == "hpsv2"            # or the folder with it
    break_it(path, state)
    with pytest.raises(ValueError, match=sentence):
        rewards.load(f"hpsv2={path}")


@pytest.mark.parametrize("spec, sentence", [
    ("hpsv2={folder}", "should be HPS_v2.1_compressed.pt of"),
    ("pickscore={folder}", "model.safetensors of .*/yuvalkirstain/PickScore_v1, a folder with it"),
    ("pickscore={published}/laion", "laion/model.safetensors is not the file of .*PickScore_v1"),
    ("imagereward={folder}", "ImageReward.pt of https://huggingface.co/THUDM/ImageReward"),
    ("aesthetic={folder}", "sac.logos.ava1-l14-linearMSE.pth of https://github.com"),
    ("clipscore={folder}", "could not be loaded"),
    ("clipscore=ViT-B-32/nobody",
     "clipscore=.*: ViT-B-32/nobody is not a model/tag of open_clip.list_pretrained"),
    ("unifiedreward=my server", "unifiedreward=my server: my server is not an address"),
    ("unifiedreward=http://host:port/v1", "is not an address"),
    ("preference={folder}", "^preference=.* should be a folder with model.safetensors, but is not"),
    ("=preference", "there is no scorer ''"),
    ("hpsv2=nowhere/HPS_v2.1_compressed.pt", "or a hub id, but is none of them"),
    ("hpsv2=nowhere/at/all", "^hpsv2=nowhere/at/all: nowhere/at/all should be "),
])
def test_a_path_without_the_weights_is_refused(spec, sentence, published, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        rewards.load(spec.format(folder=tmp_path, published=published["root"]))


def test_a_vocabulary_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "ImageReward.pt").touch()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    with pytest.raises(ValueError, match="vocab.txt is not the vocabulary of "
                       "https://huggingface.co/google-bert/bert-base-uncased"):
        rewards.load(f"imagereward={tmp_path}")


# ------------------------------------------------------------------------------------------------
# Downloads

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The list of requests to a hub that has only a vocabulary."""
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if file == "vocab.txt":
            (tmp_path / file).touch()
            return str(tmp_path / file)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_a_local_imagereward_needs_its_vocabulary_beside_it_and_never_asks_the_hub(hub, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/ImageReward.pt").touch()
    for path in (tmp_path / "local", tmp_path / "local/ImageReward.pt"):
        with pytest.raises(ValueError, match="local should be vocab.txt of "
                           "https://huggingface.co/google-bert/bert-base-uncased"):
            rewards.load(f"imagereward={path}")
    assert hub == []


def test_downloads_from_the_hub_are_pinned_to_a_commit_unless_another_repository_is_named(hub):
    scorers = dict(hpsv2=rewards.HPSv2, pickscore=rewards.PickScore,
                   imagereward=rewards.ImageReward)
    for name, scorer in scorers.items():
        for spec, repository, pin in [
                (name, scorer.source.removeprefix("https://huggingface.co/"), scorer.pin),
                (f"{name}=somebody/x", "somebody/x", None)]:
            with pytest.raises(ValueError, match=r"could not be downloaded \(no network\); give "
                                                 "its path on this machine"):
                rewards.load(spec)
            assert hub.pop() == (repository, scorer.file, pin) and not hub
    pins = [*(scorer.pin for scorer in scorers.values()), rewards.ImageReward.bert_pin,
            rewards.Aesthetic.clip_pin]
    assert all(len(pin) == 40 and int(pin, 16) for pin in pins) and len(set(pins)) == 5


def test_a_file_from_elsewhere_is_downloaded_once_and_must_have_its_hash(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sha256 = "6ca13d52ca70c883e0f0bb101e425a89e8624de51db2d2392593af6a84118090"
    with Server("abc123") as site:
        found = [rewards.fetch("", site.url, "head.pth", sha256) for _ in range(2)]
        with pytest.raises(ValueError, match="other.pth of .* could not be downloaded .invalid ha"):
            rewards.fetch("", site.url, "other.pth", "0" * 64)
    path = tmp_path / "checkpoints/head.pth"
    assert found == [path] * 2 and path.read_bytes() == b"abc123"
    assert [asked for asked, _ in site.asked] == [f"/v1/raw/main/{name}.pth"
                                                  for name in ("head", "other")]
    assert list(path.parent.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# A model on a server

class Server:
    """Sends canned replies, one per request, the last one repeatedly. A reply is a text, an HTTP
    status, (status, text), or None, which lets the client wait."""

    def __init__(self, *replies):
        self.replies, self.asked, self.headers, self.gate = list(replies), [], [], threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.asked.append((self.path, json.loads(body or "null")))
                server.headers.append(self.headers)
                reply = server.reply(*server.asked[-1])
                if reply is None:
                    return server.gate.wait(5)
                status, text = {int: (reply, ""), str: (200, reply)}.get(type(reply), reply)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", text)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST                            # a redirected POST becomes a GET
            log_message = lambda *_: None

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def reply(self, path, body):
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()


def says(text):
    return json.dumps(dict(choices=[dict(message=dict(content=text))]))


ACS = ('Word-wise Scores: [["red", 1.2], ["[No_mistakes]", 3]]\n\nAlignment Score (1-5): {}\n'
       'Coherence Score (1-5): 2.25\nStyle Score (1-5): 4.5')


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(server_reward.UnifiedReward, "pauses", (0.01, 0.01))
    monkeypatch.setattr(server_reward.UnifiedReward, "timeout", 0.3)


def asked_of(address, name="unifiedreward"):
    """The score of one picture."""
    return rewards.load(f"{name}={address}")(pictures((16, 16), 1)[0], ["a red apple"]).item()


def test_unifiedreward_sends_the_published_question_with_each_picture_and_reads_the_alignment_score(
        quick):
    x = pictures((40, 50), 3)[0]
    with Server(says(ACS.format("3.75"))) as server:
        scorer = rewards.load(f"unifiedreward={server.url}")
        assert scorer(x, ["a {red} apple", "b", "c"]).tolist() == [3.75] * 3

    def question(body):
        return body["messages"][0]["content"][1]["text"]

    path, body = next(asked for asked in server.asked if "a {red} apple" in question(asked[1]))
    assert (path, body["model"], body["temperature"], body["max_tokens"]) == (
        "/v1/chat/completions", "UnifiedReward", 0, 4096)
    assert question(body).endswith("Text Caption: [a {red} apple]")
    assert "Alignment Score (1-5): X\nCoherence Score (1-5): Y" in question(body)
    kind, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    picture, expected = Image.open(io.BytesIO(base64.b64decode(data))), io.BytesIO()
    TF.to_pil_image((x[0] * 255).round().byte()).save(expected, "jpeg", quality=95)
    assert kind == "data:image/jpeg;base64" and picture.size == (50, 40)
    assert base64.b64decode(data) == expected.getvalue()


def test_unifiedreward_keeps_pictures_and_marks_in_order_although_it_asks_in_parallel(quick):
    marks = [f"{1 + k / 4}" for k in range(12)]
    with Server() as server:                            # the caption is the mark
        server.reply = lambda path, body: says(ACS.format(
            body["messages"][0]["content"][1]["text"].rsplit("[", 1)[1][:-1]))
        scorer = rewards.load(f"unifiedreward={server.url}")
        scores = scorer(pictures((16, 16), 12)[0], marks)
    assert scores.tolist() == [float(mark) for mark in marks]


def test_the_other_published_question_asks_for_one_final_score(quick):
    with Server(says("apple (object): 1\nred (attribute): 0\nFinal Score: 4")) as server:
        assert asked_of(server.url, "unifiedreward_final") == 4
    question = server.asked[0][1]["messages"][0]["content"][1]["text"]
    assert "assign a score from 1 to 5 after 'Final Score:'" in question


@pytest.mark.parametrize("text, mark", [
    ("**Alignment Score (1-5):** 4", 4), ("**Alignment Score (1-5)**: 3.5", 3.5),
    ("Alignment Score (1-5): **4**", 4), ("Alignment Score: 4/5", 4),
    ("Alignment Score (1-5): 4/5", 4), ("- alignment score: 2 out of 5", 2),
    ("### Alignment Score\n= 3", 3), ("Alignment Score (1 - 5) = 3.25.", 3.25),
    ("Alignment Score (out of 5): 3", 3), ("The alignment score is 4, for the apple is red.", 4),
    ("| Alignment Score (1-5) | 4 |\n| Style Score (1-5) | 1 |", 4),
    ('```json\n{"Alignment Score (1-5)": 4, "Style Score (1-5)": 2}\n```', 4),
    ('{"Alignment Score":4,"Style Score":2}', 4), ("Alignment Score: `5`", 5),
    ("Alignment Score: X\n\nAlignment Score: 4", 4),
    ("**Alignment Score: 3**\nAlignment Score (1-5): 4", 4),            # the published form counts
    ("Alignment Score (1-5): 4\nAlignment Score (1-5): 2", 4),          # the first one counts
    ("**Final Score:** 4", 4), ("Final score: 3.5/5", 3.5), ("**Final Score**: **2**", 2),
    ("Score of parts: 1\nFinal Score: 5", 5),
])
def test_a_mark_in_another_clear_form_is_read(text, mark):
    name = "unifiedreward_final" if "final" in text.lower() else "unifiedreward"
    assert rewards.load(name).mark(says(text)) == mark


NO_MARKS = ["I like it", *(f"Alignment Score (1-5): {mark}" for mark in (
    "X", "9", "45", "5.9", "2-4", "4,5", "4/10", "4 out of 10", "3 to 4", "3 - 4", "40%", "4%",
    "-1")), "**Alignment Score:** 8/10", "Alignment Score: 4/50", "Alignment: 4",
    "Alignment Score: 3\nor rather\nAlignment Score: 4", "Coherence Score (1-5): 4"]


@pytest.mark.parametrize("reply", ["not json", "[]", "{}", says(None), *map(says, NO_MARKS)])
def test_a_garbled_reply_is_an_error_and_never_a_score(reply):
    with pytest.raises(ValueError, match=r"the reply has no mark of the form 'Alignment Score "
                                         r"\(1-5\): 4': "):
        rewards.load("unifiedreward").mark(reply)


def test_a_slow_or_busy_server_is_asked_again_and_a_dead_or_refusing_one_is_an_error(quick):
    with Server(None, 503, says(ACS.format(2))) as server:      # too slow, then busy, then a mark
        assert asked_of(server.url) == 2 and len(server.asked) == 3
    with Server(429, says(ACS.format(3))) as server:            # too many requests, then a mark
        assert asked_of(server.url) == 3 and len(server.asked) == 2
    for reply, sentence, times in [(500, "did not answer in 3 tries: HTTP Error 500", 3),
                                   (401, "refused: HTTP Error 401", 1),         # not asked again
                                   (None, "did not answer in 3 tries: timed out", 3)]:
        with Server(reply) as server, pytest.raises(rewards.ScorerError, match=sentence):
            asked_of(server.url)
        assert len(server.asked) == times
    with pytest.raises(rewards.ScorerError, match="did not answer in 3 tries: .*refused"):
        asked_of(server.url)                                    # the server is closed by now


@pytest.mark.parametrize("body, message", [
    ('{"error": {"message": "The model `UnifiedReward` does not exist.", "code": 404}}',
     "The model `UnifiedReward` does not exist."),
    ('{"object": "error", "message": "maximum context length is 2048"}',
     "maximum context length is 2048"),
    ('{"detail": "Not Found"}', "Not Found"), ('{"error": "no such\\n  model"}', "no such model"),
    ("no such route", "no such route"), ("<html><h1>Bad\nGateway</h1></html>", "Bad Gateway"),
    ('{"why": 1}', r"\{'why': 1\}"), ("[1]", r"\[1\]"), ("", ""),
])
def test_the_servers_own_explanation_of_an_error_is_shown_on_one_line(body, message, quick):
    for status, reason, failure in ((404, "Not Found", "refused"),
                                    (503, "Service Unavailable", "did not answer in 3 tries")):
        with Server((status, body)) as server, pytest.raises(rewards.ScorerError) as error:
            asked_of(server.url)
        text = str(error.value)
        assert f"{server.url}/chat/completions {failure}: HTTP Error {status}: " in text
        assert text.endswith(": " + message.replace("\\", "") if message else reason)
        assert "\n" not in text


def test_a_server_on_this_machine_is_asked_without_the_proxy(quick, monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")      # nothing listens there
    with Server(says(ACS.format(3))) as server:
        assert asked_of(server.url) == 3
        assert asked_of(server.url.replace("127.0.0.1", "localhost")) == 3


def test_another_machine_is_asked_through_the_proxy_which_is_named_if_that_fails(
        quick, monkeypatch):
    away = "http://judge.invalid:8000/v1"
    with Server(says(ACS.format(3))) as proxy:
        host = proxy.url.removesuffix("/v1").removeprefix("http://")
        monkeypatch.setenv("http_proxy", f"http://me:secret@{host}")
        assert asked_of(away) == 3 and proxy.asked[0][0] == away + "/chat/completions"
    with pytest.raises(rewards.ScorerError) as error:           # the proxy is closed by now
        asked_of(away)
    assert f"did not answer in 3 tries through the proxy {host} (http_proxy)" in str(error.value)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "judge.invalid")
    assert rewards.load(f"unifiedreward={away}").through == ""


def test_only_the_key_for_unifiedreward_is_sent_and_only_to_the_named_server(quick, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    monkeypatch.delenv(server_reward.KEY, raising=False)
    with Server(says(ACS.format(3))) as server:
        asked_of(server.url)
        monkeypatch.setenv(server_reward.KEY, " mine\n")
        asked_of(server.url)
    first, second = server.headers
    assert first["Authorization"] is None and second["Authorization"] == "Bearer mine"
    assert "sk-private" not in f"{first}{second}"
    with Server("who are you?") as other, Server((302, other.url)) as server:
        with pytest.raises(rewards.ScorerError, match="no mark"):
            asked_of(server.url)
    assert server.headers[0]["Authorization"] and not other.headers[0]["Authorization"]


def test_a_key_is_not_sent_unencrypted_to_another_machine(monkeypatch):
    away = "unifiedreward=http://judge.invalid:8000/v1"
    monkeypatch.setenv(server_reward.KEY, "")
    rewards.parse(away)
    monkeypatch.setenv(server_reward.KEY, "mine")
    for spec in ("unifiedreward", away.replace("http:", "https:"),
                 "unifiedreward=http://localhost:8000/v1"):
        rewards.parse(spec)
    for spec in (away, "unifiedreward_final=http://127.0.0.1.judge.invalid/v1"):
        with pytest.raises(ValueError, match="UNIFIEDREWARD_API_KEY would be sent unencrypted"):
            rewards.parse(spec)


# ------------------------------------------------------------------------------------------------
# Networks inside a package: examples/package_rewards.py

def pixels(*pictures):
    """PIL pictures -> uint8 (G, 3, H, W)."""
    return torch.stack([TF.pil_to_tensor(picture) for picture in pictures])


def drawn(text, side=64, size=16, colours=("black", "white")):
    picture = Image.new("RGB", (side, side), colours[1])
    ImageDraw.Draw(picture).multiline_text((side / 2, side / 2), text, colours[0],
                                           ImageFont.load_default(size), anchor="mm",
                                           align="center")
    return picture


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime")
    return rewards.load("ocr")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ValueError, match="scorer 'ocr' needs a package: pip install "
                                         r"rapidocr-onnxruntime==1\.4\.4"):
        rewards.load("ocr")


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abc", "axc", 1),
    ("ab", "ba", 2), ("kitten", "sitting", 3), ("intention", "execution", 5),
])
def test_edit_distance_worked_out_by_hand(a, b, distance):
    assert packages.edit_distance(a, b) == distance == packages.edit_distance(b, a)


def test_ocr_is_one_minus_the_distance_over_the_wanted_length_and_never_below_zero(monkeypatch):
    kind, _ = rewards.find("ocr")
    monkeypatch.setattr(kind, "__init__", rewards.Scorer.__init__)      # without its package
    monkeypatch.setattr(kind, "read", lambda self, picture: "open")
    prompts = ['a sign "OPEN"', 'a sign "OP EN" “now”', 'a sign "Spend"', 'a sign "it"',
               'a sign "o"']
    scores = rewards.load("ocr")(torch.zeros(5, 3, 8, 8), prompts)
    # "open" is 3 letters short of "opennow", 2 edits from "spend", and 4 from "it"; the last two
    # distances are larger than the wanted text, so they are capped.
    assert_close(scores, torch.tensor([1, 1 - 3 / 7, 1 - 2 / 5, 0, 0]))


def test_ocr_reads_drawn_text_and_prefers_the_picture_with_the_right_word(ocr):
    pictures = pixels(drawn("HELLO"), drawn("HELP"), drawn("WORLD"), drawn(""))
    prompts = ['a card that says "hello"'] * 4
    scores = ocr.score(pictures, prompts)
    # "help" is 2 edits from "hello". Of "world" only one letter is in its place, so it is 4 edits.
    assert_close(scores, torch.tensor([1, 1 - 2 / 5, 1 - 4 / 5, 0]))
    assert torch.equal(ocr.score(pictures, prompts), scores)
    for size in ((1, 1), (8, 8), (64, 200)):            # nothing to read
        assert ocr.score(torch.zeros(1, 3, *size, dtype=torch.uint8), ['"x"']).tolist() == [0]


def test_ocr_joins_lines_and_ignores_case_space_colour_and_size(ocr):
    for picture in (drawn("New\nYork", 64, 20), drawn("new york", 300, 50, ("yellow", "navy")),
                    drawn("NEW YORK", 800, 120)):
        assert ocr.score(pixels(picture), ['a sign "New York"']).item() == 1


def test_ocr_gives_its_reader_the_colours_in_the_right_order(ocr, monkeypatch):
    seen = []

    def detect(picture):
        seen.append(picture)
        return None, 0

    monkeypatch.setattr(ocr.reader, "text_det", detect)
    ocr.score(pixels(Image.new("RGB", (64, 64), (255, 0, 0))), ['"x"'])
    assert seen[0][0, 0].tolist() == [0, 0, 255]                # the reader's order, as in cv2


def test_ocr_refuses_a_prompt_without_text_in_quotes(ocr):
    ocr.check_prompt('a shop sign "OPEN", 3d style')
    ocr.check_prompt("a shop sign “OPEN”")
    for prompt in ("a shop sign", 'five "', 'nothing " " here', "it's 'single'"):
        with pytest.raises(ValueError, match="in double quotes, and .* has none"):
            ocr.check_prompt(prompt)


# ------------------------------------------------------------------------------------------------
# Your own reward

SHORT = ("--iterations 2 --prompts_per_iteration 1 --group_size 4 --num_anchors 2 "
         "--num_rollout_steps 3 --num_train_steps 1 --threads 1 --eval_every 0").split()
REDNESS = "examples/own_reward.py:redness"


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(HERE)


@pytest.fixture
def own(tmp_path):
    """own(code): the path of a file with that code, which has not been imported yet."""
    def write(code, name="own.py"):
        (tmp_path / name).write_text(code, encoding="utf-8")
        rewards.import_source.cache_clear()
        return tmp_path / name
    yield write
    rewards.import_source.cache_clear()


def log_of(folder):
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("result", [
    "x.double()", "x.tolist()", "x.numpy()", "list(x)", "x > 0.5", "x.half()",
    "x.requires_grad_() * 1"])
def test_your_own_reward_may_return_a_tensor_a_list_or_an_array_of_numbers(result, own):
    code = ("import torch\n\n@torch.enable_grad()\ndef f(images, prompts):\n"
            f"    x = images[:, 0, 0, 0].cpu()\n    return {result}\n")
    scores = rewards.load(f"{own(code)}:f")(torch.tensor([0.2, 0.6])[:, None, None, None].expand(
        2, 3, 4, 4), ["a", "b"])
    expected = [0.0, 1.0] if ">" in result else [0.2, 0.6]
    assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-3)
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_your_own_reward_sees_8_bit_images_and_may_change_its_arguments(own):
    code = ("seen = []\ndef f(images, prompts):\n    seen.append(images.clone())\n"
            "    images.zero_(), prompts.clear()\n    return [0] * len(images)\n")
    path = own(code)
    x, prompts = pictures((9, 7))[0], list(PROMPTS)
    before = x.clone()
    rewards.load(f"{path}:f")(x, prompts)
    seen, = rewards.import_source(str(path))[0].seen
    assert torch.equal(seen, (x * 255).round() / 255)
    assert torch.equal(x, before) and prompts == PROMPTS


def test_your_own_reward_may_be_in_a_module_or_be_a_scorer_class_with_an_argument(
        own, monkeypatch):
    path = own("import torch\nfrom rewards import Scorer\n\n"
               "class Constant(Scorer):\n"
               "    @classmethod\n    def check(cls, number):\n        float(number)\n\n"
               "    def __init__(self, number, device):\n        super().__init__(number, device)\n"
               "        self.number = float(number)\n\n"
               "    def score(self, pixels, prompts):\n"
               "        assert pixels.dtype == torch.uint8\n"
               "        return torch.full((len(pixels),), self.number)\n\n"
               "def zero(images, prompts):\n    return [0] * len(images)\n", "some_rewards.py")
    images = torch.rand(2, 3, 4, 4)
    scorer = rewards.load(f"{path}:Constant=2.5")
    assert scorer.name == "Constant" and scorer(images, ["a", "b"]).tolist() == [2.5, 2.5]
    with pytest.raises(ValueError, match="Constant=red: could not convert"):
        rewards.parse(f"{path}:Constant=red")
    monkeypatch.syspath_prepend(path.parent)
    assert rewards.load("some_rewards:zero")(images, ["a", "b"]).tolist() == [0, 0]
    scorers = rewards.load_all(rewards.parse("jpeg,some_rewards:zero"), "cpu", ["a"])
    assert list(scorers) == ["jpeg", "zero"]            # in the order of --reward_weights
    assert list(rewards.fingerprints("preference,some_rewards:zero")) == ["SHA-256 of some_rewards"]


OWN = "def f(images, prompts):\n    return [0.0] * len(images)\n"


@pytest.mark.parametrize("code, spec, sentence", [
    (OWN, "nowhere.py:f", "nowhere.py cannot be imported: FileNotFoundError: "),
    (OWN, "no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError: "),
    (OWN, "{file}:g", "'g' of {file} does not exist, but must be a function f(images, prompts)"),
    (OWN, "{file}:", "'' of {file} does not exist"),
    (OWN, "{file}", "there is no scorer '{file}'; there are hpsv2, pickscore, imagereward"),
    (OWN, "{file}:f=weights", "{file}:f=weights: nothing may follow the name of this scorer"),
    (OWN, "{file}:f,{file}:f", "scorer 'f' is named twice"),
    ("f = 3", "{file}:f", "'f' of {file} is of type int, but must be a function"),
    ("class f: pass", "{file}:f", "'f' of {file} is of type type, but must be a function f(images, "
                                  "prompts) or a subclass of rewards.Scorer"),
    (OWN.replace("f(", "judge("), "{file}:judge", "the name 'judge' belongs to another scorer"),
    *((OWN, f"{{file}}:{name}", "or to another number in the log") for name in
      "reward judge_gain x_stderr eval_x nfe_old seconds seconds_x peak_gb label images".split()),
    ("\nimport nothing_like_it\n", "{file}:f", "{file} cannot be imported: ModuleNotFoundError: No "
                                     "module named 'nothing_like_it' (line 2 of own.py)"),
    ("def f(:\n", "{file}:f", "{file} cannot be imported: SyntaxError: invalid syntax (own.py, "
                              "line 1)"),
    ("import sys\nsys.exit('bye')\n", "{file}:f", "{file} cannot be imported: SystemExit: bye "
                                                  "(line 2 of own.py)"),
    ("1 / 0\n", "{file}:f", "ZeroDivisionError: division by zero (line 1 of own.py)"),
])
def test_a_wrong_name_or_file_gets_one_sentence_before_anything_is_loaded(
        code, spec, sentence, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a: pytest.fail("a scorer was loaded"))
    file = own(code)
    with pytest.raises(SystemExit) as exit:
        train.main([*SHORT, "--rewards", spec.format(file=file),
                    "--out_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err.split("error: ")[1]
    assert exit.value.code == 2 and sentence.format(file=file) in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("body, sentence", [
    ("return images.mean()", r"returned a Tensor, tensor\(0\.50.*, of shape \(\), for the prompt "
                             ".* must return one finite number for each of 1 images, in a tensor"),
    ("return images.mean().view(1)", r"of shape \(1,\), .* for each of 2 images"),
    ("return images.mean((2, 3))", r"of shape \(1, 3\)"),
    ("return images[:, :1, 0, 0]", r"of shape \(1, 1\)"),
    ("return images[:, 0, 0, 0].squeeze()", r"of shape \(\)"),
    ("return images.std((1, 2, 3)) / images.std((1, 2, 3))", r"returned a Tensor, tensor\(\[nan\]"),
    ("return [1e39] * len(images)", r"returned a list, \[1e\+39\]"),
    ("return [-1e20] * len(images)", r"returned a list, \[-1e\+20\]"),   # its square is infinite
    ("pass", "returned a NoneType, None, .* must return one finite number for each of 1 images"),
    ("return ['good'] * len(images)", r"returned a list, \['good'\]"),
    ("return {'score': 1}", "returned a dict, {'score': 1}"),
    ("return [None] * len(images)", r"returned a list, \[None\]"),
    ("return prompts[7]", r"IndexError: list index out of range \(line 2 of own.py\)"),
])
def test_a_wrong_result_ends_the_run_with_one_sentence_before_the_model_is_loaded(
        body, sentence, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr(rewards.find("preference")[0], "__init__",
                        lambda *a: pytest.fail("preference came first"))
    path = own(f"def wrong(images, prompts):\n    {body}\n")
    assert train.main([*SHORT, "--rewards", f"preference,{path}:wrong", "--out_dir",
                       str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search("scorer 'wrong' .*" + sentence, error)
    assert error.count("\n") == 1 and not (tmp_path / "out/log.jsonl").exists()


CHANGES = {
    "os.chdir('/')": os.getcwd, "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.set_default_dtype(torch.float64)": torch.get_default_dtype,
    "torch.set_default_device('meta')": torch.get_default_device,
    "torch.set_num_threads(3)": torch.get_num_threads,
    "torch.manual_seed(5)": torch.initial_seed, "torch.rand(3)": lambda: str(torch.get_rng_state()),
    "random.seed(5)": random.getstate, "np.random.seed(5)": lambda: str(np.random.get_state()),
    "torch.set_float32_matmul_precision('medium')": torch.get_float32_matmul_precision,
    "torch.autograd.set_detect_anomaly(True)": torch.is_anomaly_enabled,
    "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled,
    "warnings.simplefilter('error')": lambda: warnings.filters[:]}      # no save would be possible


@pytest.mark.parametrize("change", CHANGES)
def test_a_reward_changes_nothing_of_the_process_at_its_import_nor_in_a_call_nor_when_it_fails(
        change, own):
    code = f"import os, random, warnings\nimport numpy as np\nimport torch\n{change}\n"
    path = own(f"{code}def f(images, prompts):\n    {change}\n    return [0.5, 1 / len(prompts)]\n"
               f"def g(images, prompts):\n    {change}\n    1 / 0\n")
    before = CHANGES[change]()
    assert len(rewards.parse(f"{path}:f,{path}:g")) == 2        # the import
    assert CHANGES[change]() == before
    f, g = rewards.load(f"{path}:f"), rewards.load(f"{path}:g")
    assert f(torch.rand(2, 3, 4, 4), ["a", "b"]).tolist() == [0.5, 0.5]
    assert CHANGES[change]() == before
    with pytest.raises(rewards.ScorerError, match="'g' failed on"):
        g(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert CHANGES[change]() == before


def test_a_reward_for_videos_refuses_pictures_in_a_sentence(own):
    path = own("def f(videos, prompts):\n    return [1] * len(videos)\nf.video = True\n")
    f = rewards.load(f"{path}:f")
    assert f(torch.rand(2, 4, 3, 8, 8), ["a", "b"]).tolist() == [1, 1]
    with pytest.raises(rewards.ScorerError, match="'f' takes videos, but the model makes pictures"):
        f(torch.rand(2, 3, 8, 8), ["a", "b"])


def test_a_class_of_your_own_that_fails_when_it_is_made_is_named_with_its_line(own):
    path = own("import rewards\nclass Mine(rewards.Scorer):\n    def __init__(self, *_):\n"
               "        import no_such_package\n")
    with pytest.raises(ValueError, match=r"own.py:Mine could not be loaded: ModuleNotFoundError: "
                                         r"No module .* \(line 4 of own.py\)"):
        rewards.load(f"{path}:Mine")


def test_the_random_numbers_of_a_reward_go_on_from_call_to_call(own):
    path = own("import torch\ndef f(images, prompts):\n    return torch.rand(len(prompts))\n")
    f, x = rewards.load(f"{path}:f"), torch.rand(2, 3, 4, 4)
    drawn = [f(x, ["a", "b"]) for _ in range(3)]
    assert len(torch.cat(drawn).unique()) == 6


@pytest.mark.parametrize("spec, parts", [
    ("hpsv2=a=b/c:d.pt", ("", "hpsv2", "a=b/c:d.pt")),
    ("x=1/own.py:f", ("x=1/own.py", "f", "")), ("a:b/own.py:f=2", ("a:b/own.py", "f", "2")),
    ("/k=v/own.py:F=w=1/x.py:y", ("/k=v/own.py", "F", "w=1/x.py:y")),
    (r"C:\x=1\own.py:f", (r"C:\x=1\own.py", "f", "")), ("a.b:f", ("a.b", "f", "")),
    ("/k=v,a:b/tiny/scorers.py:Judge", ("/k=v,a:b/tiny/scorers.py", "Judge", "")),
    ("unifiedreward=http://a:1/v1", ("", "unifiedreward", "http://a:1/v1"))])
def test_a_spec_is_divided_by_one_rule_whatever_is_in_its_paths(spec, parts):
    assert rewards.split(spec) == parts


def test_a_list_of_specs_is_divided_at_commas_that_are_not_in_a_path():
    specs = ["jpeg", "/a,b/c,d/own.py:f", "hpsv2=/x,y/z.pt", "own.py:g=1", "judge=k,l/m"]
    assert rewards.listed(" , ".join(specs[:3]) + "," + ",".join(specs[3:])) == specs


def test_a_run_with_your_own_reward_is_resumed_only_with_the_same_file(
        own, tmp_path, capsys):
    code = "def dark(images, prompts):\n    return -images.mean((1, 2, 3))\n"
    path, out = own(code), tmp_path / "out"

    def run(iterations, *more):
        return train.main([*SHORT, "--rewards", f"preference,{path}:dark",
                           "--reward_weights", "2,1",
                           "--iterations", str(iterations), "--out_dir", str(out), *more])

    assert run(1) is None
    own(code + "# the same with a comment\n")
    with pytest.raises(SystemExit):
        run(2, "--resume")
    error = capsys.readouterr().err
    assert f"SHA-256 of {path} differs from the run to resume" in error
    own(code)
    assert run(2, "--resume") is None
    lines = log_of(out)
    assert [line["iter"] for line in lines] == [1, 2]
    for line in lines:
        assert -1 < line["dark"] < 0
        mean = (2 * line["preference"] + line["dark"]) / 3
        assert line["reward"] == pytest.approx(mean, rel=1e-5)


def test_eval_has_a_column_for_your_own_reward_and_scores_again_after_its_file_has_changed(
        own, tmp_path):
    code = "def blue(images, prompts):\n    return images[:, 2].mean((1, 2))\n"
    path = own(code)

    def column():
        assert evaluation.main(["--scorers", f"judge,{path}:blue", "--num_prompts", "2",
                                "--images_per_prompt", "1", "--steps", "2",
                                "--out_dir", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out/results.json").read_text(encoding="utf-8")
        return json.loads(text)["results"][0]["blue"]

    first = column()
    files = sorted((tmp_path / "out").glob("*/pictures/*.png"))
    blue = [np.array(Image.open(file))[:, :, 2].mean() / 255 for file in files]
    assert len(files) == 2 and first == pytest.approx(np.mean(blue), rel=1e-5)
    assert "| judge | blue |" in (tmp_path / "out/table.md").read_text(encoding="utf-8")
    times = [file.stat().st_mtime_ns for file in files]
    own(code.replace("return", "return 2 *"))
    assert column() == pytest.approx(2 * first, rel=1e-5)
    assert [file.stat().st_mtime_ns for file in files] == times         # the pictures stay


# ------------------------------------------------------------------------------------------------
# What all scorers share

WRONG = [
    (torch.rand(2, 3, 64, 64) + 0.5, 2, r"\[0, 1\]"),
    (torch.full((2, 3, 64, 64), math.nan), 2, "nan"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 2, "uint8"),
    (torch.rand(3, 64, 64), 1, r"\(3, 64, 64\)"),
    (torch.rand(2, 64, 64, 3), 2, r"\(2, 64, 64, 3\)"),
    (torch.rand(0, 3, 64, 64), 0, r"\(0, 3, 64, 64\)"),
    (torch.rand(2, 3, 64, 64), 3, "3 prompts for 2 images"),
]


@pytest.mark.parametrize("name", [*rewards.SCORERS, REDNESS])
def test_every_scorer_refuses_a_wrong_range_dtype_shape_or_count_of_prompts_in_a_sentence(
        name, load, request, in_root):
    if name in CLIPS:
        scorer = load(name)
    elif name == "imagereward":
        scorer, _ = request.getfixturevalue("image_reward")
    elif name in ("hpsv3", "ocr"):                      # without the weights, which come later
        scorer = object.__new__(rewards.find(name)[0])
    else:
        scorer = rewards.load(name)
    for images, count, problem in WRONG:
        with pytest.raises(ValueError, match=problem):
            scorer(images, ["a red apple"] * count)
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        scorer(torch.rand(2, 3, 64, 64), "ab")          # a string is not two prompts


def test_the_error_for_a_number_that_is_not_finite_names_its_prompt(monkeypatch):
    monkeypatch.setattr(rewards.Jpeg, "score", lambda *_: torch.tensor([1.0, math.nan]))
    with pytest.raises(rewards.ScorerError, match="scorer 'jpeg' .* for the prompt 'a pear'"):
        rewards.load("jpeg")(torch.rand(2, 3, 8, 8), ["a red apple", "a pear"])


def test_a_scorer_that_fails_ends_the_run_at_the_start_or_in_the_middle_and_never_scores_zero(
        tmp_path, capsys, monkeypatch):
    calls = []

    def score(self, pixels, prompts):
        calls.append(len(pixels))
        if len(calls) > 3:
            raise RuntimeError("the moon is full")
        return torch.arange(len(pixels)).float()

    monkeypatch.setattr(rewards.Jpeg, "score", score)
    a, b = tmp_path / "a", tmp_path / "b"
    assert train.main([*SHORT, "--rewards", "preference,jpeg", "--out_dir", str(a)]) == 1
    assert calls == [1, 2, 4, 4]                        # two trial calls, then two groups
    assert "scorer 'jpeg' failed on the prompt" in capsys.readouterr().err
    assert len(log_of(a)) == 1 and (a / "checkpoint-1/model_index.json").is_file()
    monkeypatch.setattr(train, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert train.main([*SHORT, "--rewards", "jpeg", "--out_dir", str(b)]) == 1          # at once
    assert "the moon is full" in capsys.readouterr().err and not (b / "log.jsonl").exists()


@pytest.mark.parametrize("text, weights", [("2,1", [2, 1]), (" 0.5 , 0", [0.5, 0]), ("", [1, 1])])
def test_reward_weights_are_one_number_for_each_reward_or_all_one(text, weights):
    assert rewards.parse_weights(text, ["preference", "jpeg"]).tolist() == weights


@pytest.mark.parametrize("text", ["1", "1,2,3", "0,0", "-1,2", "nan,1", "inf,1", "a,b", ","])
def test_unusable_reward_weights_are_refused(text):
    with pytest.raises(ValueError, match="one number >= 0, not all 0, for each of preference,jpeg"):
        rewards.parse_weights(text, ["preference", "jpeg"])


def test_every_text_file_is_opened_as_utf8_whatever_the_locale():
    files = [HERE / "rewards.py", *sorted((HERE / "examples").glob("*.py")), Path(__file__)]
    for file in files:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(call, "func", None), "attr", getattr(
                getattr(call, "func", None), "id", ""))
            if name in ("read_text", "write_text", "open") and not ast.unparse(call).startswith(
                    ("Image.", "self.opener.")):
                assert "encoding='utf-8'" in ast.unparse(call), f"{file.name}, {call.lineno}"
