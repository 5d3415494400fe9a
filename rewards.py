"""
Images and prompts in, numbers out. Time t runs from 1 (noise) to 0 (image); only images at t = 0
are scored. All scorers are called in the same way, and a higher score is better:

    scorer(images (G, 3, H, W) in [0, 1], prompts [G]) -> (G,) float32

All G images are scored in one batch. They are first rounded to 8 bits, as if they had been saved
to files. A scorer that fails, or gives a number that is not finite, raises ScorerError with its
name. A failure never becomes a score of 0.

    load("hpsv2", device)                           the published weights, downloaded once
    load("hpsv2=weights/HPS_v2.1_compressed.pt")    the same file, a folder with it, or a hub id
    load("examples/own_reward.py:redness")          your own: FILE.py:FUNCTION or module:FUNCTION

    hpsv2, pickscore, imagereward       what people prefer: the paper trains on these three
    clipscore, aesthetic                the paper evaluates with these, and does not train on them
    unifiedreward                       so, too: a model on a server (examples/server_reward.py)
    hpsv3                               newer, and larger (examples/hpsv3_reward.py)
    jpeg                                needs no model
    preference, judge, named, flawless  for the small world; nothing to download (tiny/scorers.py)
    ocr                                 a network in a PyPI package (examples/package_rewards.py)

Scores are computed in float32, even inside the caller's autocast. Near 0.3, neighbouring bf16
numbers differ by 0.002, while the HPSv2.1 scores of a group differ by about 0.01. On a GPU the two
largest networks run in float16 (`half` in HPSv2 and ClipScore), but their scores are float32 too.
"""
from machine import attempt, evenly_spaced, one_line            # before open_clip
import contextlib, functools, hashlib, importlib, io, os, random, re, sys, traceback, types
import warnings
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).resolve().parent
HUB = "https://huggingface.co/"
MEAN = (0.48145466, 0.4578275, 0.40821073)      # of RGB in [0, 1], for OpenAI's CLIP and others
STD = (0.26862954, 0.26130258, 0.27577711)

# ------------------------------------------------------------------------------------------------
# What all scorers share

class ScorerError(RuntimeError):
    """A scorer failed, or gave something other than one finite number per image."""

def working_directory():
    with contextlib.suppress(OSError):          # somebody may have deleted it
        return os.getcwd()

PROCESS = [         # (get, put) of what a reward's code may change while it runs
    (working_directory, lambda path: path and os.chdir(path)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device,                  # None is the CPU, too, and costs no time
     lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (lambda: warnings.filters[:], lambda kept: warnings.filters.__setitem__(slice(None), kept)),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)]
RANDOM = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate),
          (np.random.get_state, np.random.set_state)]

@contextlib.contextmanager
def undisturbed(drawn=[]):
    """Inside, a reward's code runs, at its import and in its calls. Afterwards the process is as it
    was. The random numbers of rewards go on from call to call, apart from those of the run."""
    before, ours = ([get() for get, _ in pairs] for pairs in (PROCESS, RANDOM))
    for (_, put), state in zip(RANDOM, drawn):
        put(state)
    try:
        yield
    finally:
        drawn[:] = [get() for get, _ in RANDOM]
        for (get, put), value in zip(PROCESS + RANDOM, before + ours):
            if (get, put) in RANDOM or get() != value:
                put(value)

class Scorer:
    """Base of all scorers. A subclass loads its weights in `__init__`, and adds
    `score(pixels uint8 (G, 3, H, W), prompts [G]) -> (G,)`. `argument` is the text after "="."""
    video = False           # whether it gets whole videos, (G, frames, 3, H, W)
    frames = 4              # of a video, that a scorer of images sees; set by load_all()
    name = ""               # the key in the log and the column in a table; set by load()
    code_file = ""          # of a scorer in your own file: lets an error name the line that failed

    def __init__(self, argument="", device="cpu"):
        self.device = torch.device(device)

    @classmethod
    def check(cls, argument):
        """Raise ValueError for an argument that cannot work. Called before anything is loaded."""
        if argument:
            raise ValueError("nothing may follow the name of this scorer")

    def check_prompt(self, prompt):
        """Raise ValueError for a prompt that this scorer cannot use. Most scorers take any."""

    @torch.no_grad()
    def __call__(self, images, prompts):
        if self.video and images.ndim == 4:
            raise ScorerError(f"scorer {self.name!r} takes videos, but the model makes pictures")
        one_by_one, n = images.ndim == 5 and not self.video, 1
        if one_by_one:                                  # of a video the mean over n frames
            shown = some_frames(images.shape[1], self.frames)
            images, n = images[:, shown], len(shown)                    # (G, n, 3, H, W)
        pixels = as_8_bit(images, prompts, self.video)
        if one_by_one:
            pixels, prompts = pixels.flatten(0, 1), [p for p in prompts for _ in shown]
        try:
            with undisturbed(), torch.autocast(self.device.type, enabled=False):
                given = self.score(pixels.to(self.device), prompts)
        except (Exception, SystemExit) as error:
            raise ScorerError(f"scorer {self.name!r} failed on the prompt {prompts[0]!r}: "
                              f"{describe(error, self.code_file)}") from error
        try:
            scores = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            scores = torch.tensor(torch.nan)            # no numbers
        shape, finite = tuple(scores.shape), scores.abs() < 1e18        # as their squares; not nan
        if shape != (len(pixels),) or not finite.all():
            bad = finite.int().argmin() if shape == (len(pixels),) else 0
            raise ScorerError(
                f"scorer {self.name!r} returned a {type(given).__name__}, {one_line(given)}, of "
                f"shape {shape}, for the prompt {prompts[bad]!r}, but must return one finite "
                f"number for each of {len(pixels)} images, in a tensor, a list or an array")
        return scores.unflatten(0, (-1, n)).mean(1).to(images.device)       # (G,)

def as_8_bit(images, prompts, video=False):
    """Check a scorer's input, and round it to 8 bits: (G, 3, H, W), or videos (G, frames, 3, H, W),
    in [0, 1] -> uint8. `video`: only videos will do."""
    right_shape = images.ndim in (4 + video, 5) and images.shape[-3] == 3 and images.numel() > 0
    if not (right_shape and images.is_floating_point()):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be float "
                         f"(G, {'frames, ' * video}3, H, W)")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) != len(images) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images, but must be "
                         "a list with one string for each image")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):            # also false for NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], but must lie in [0, 1]")
    return (images * 255).round().to(torch.uint8)

def some_frames(count, most):
    """The indices of at most `most` of a video's frames: evenly spaced, but even and odd in turn.
    Otherwise they would miss a flicker of every other frame."""
    return [k - (k - i) % 2 for i, k in enumerate(evenly_spaced(count, most))]

class OwnReward(Scorer):
    """f(images (G, 3, H, W) in [0, 1], prompts [G]) -> G numbers, as in examples/own_reward.py. If
    it has the attribute `video = True`, it gets videos (G, frames, 3, H, W)."""

    def __init__(self, function, device="cpu"):
        super().__init__(device=device)
        self.function, self.video = function, getattr(function, "video", False)

    def score(self, pixels, prompts):
        return self.function(pixels.float() / 255, list(prompts))       # copies: it may change them

def describe(error, file=""):
    """The type and message of an exception, and the line of `file` that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" (line {frame.lineno} of {Path(file).name})" for frame in frames
             if frame.filename == file]
    return f"{type(error).__name__}: {error}{lines[-1] if lines else ''}"

# ------------------------------------------------------------------------------------------------
# Published weights. All of them are found and loaded completely before a run starts.

class Published(Scorer):
    """A scorer whose weights were published as `file` at `source`. `pin` is the version that is
    downloaded: a commit of the hub, or the SHA-256 of a file from elsewhere. (The commits are
    those that several public projects use. The hub could not be reached to check them.)"""
    source = file = ""
    pin = None

    @classmethod
    def check(cls, location):
        local_file(location, cls.source, cls.file)

def local_file(location, source, file):
    """The path of a published file, if `location` is this file or a folder with it. None for "" and
    for a hub id, "owner/name". ValueError for anything else."""
    path = Path(location).expanduser()
    path = path / file if location and path.is_dir() else path
    if path.is_file():
        return path
    is_hub_id = (re.fullmatch(r"[\w.-]+/[\w.-]+", location) and not path.parent.exists()
                 and path.suffix not in (".pt", ".pth", ".bin", ".safetensors"))
    if location and not is_hub_id:
        raise ValueError(f"{location} should be {file} of {source}, a folder with it, or a hub id, "
                         "but is none of them")

def fetch(location, source, file, pin):
    """The path of a published file: at `location`, as in `local_file`. If that is empty, the
    version `pin` is downloaded from `source`, once."""
    if path := local_file(location, source, file):
        return path
    source, pin = (HUB + location, None) if location else (source, pin)
    try:
        if source.startswith(HUB):
            from huggingface_hub import hf_hub_download
            return Path(hf_hub_download(source.removeprefix(HUB), file, revision=pin))
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():                  # it is written aside and renamed
            url = f"{source}/raw/main/{file}"
            torch.hub.download_url_to_file(url, str(path), pin, progress=False)
        return path
    except Exception as error:
        raise ValueError(f"{file} of {source} could not be downloaded ({one_line(error)}); give "
                         "its path on this machine after the scorer's name and '='") from error

def read_weights(path, source):
    """A file of tensors -> {name: tensor on the CPU}. Code hidden in the file is never run."""
    try:
        state = (load_file(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True))
        state = state.get("state_dict", state)
        return {name: tensor.detach() for name, tensor in state.items()
                if not name.endswith("position_ids")}           # which networks count themselves
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file that contains only tensors; it may be "
                         f"incomplete or another file than the one of {source}") from error

def load_strictly(net, state, path, source, dtype=torch.float32):
    """Fill `net`, and return it frozen. No tensor may be missing, unexpected or reshaped."""
    try:
        net.load_state_dict(state, assign=True)     # a network built on "meta" can be filled, too
    except RuntimeError as error:
        raise ValueError(f"{path} is not the file of {source}: {one_line(error)}") from error
    return net.to(dtype).eval().requires_grad_(False)

# ------------------------------------------------------------------------------------------------
# CLIP and its descendants: the cosine of an image and a text

def shorter_edge_to(size):
    """CLIP's usual preprocessing, by open_clip: PIL's bicubic until the shorter edge is `size`,
    then a central crop, then normalisation."""
    from open_clip import image_transform
    return image_transform(size, is_train=False, mean=MEAN, std=STD, resize_mode="shortest",
                           interpolation="bicubic")

def prepare(pixels, transform):
    """Apply a transform of PIL images: uint8 (G, 3, H, W) -> float (G, 3, size, size)."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([transform(Image.fromarray(array)) for array in arrays]).to(pixels.device)

class Cosine(Published):
    """The cosine of image and text. A subclass adds `encode_image(pixels) -> (G, D)`, and either a
    `net` and a `tokenizer` like those of open_clip, or its own `encode_text(prompts) -> (G, D)`."""
    half = False                                # on a GPU: run the networks in float16
    scale = 1.0

    def __init__(self, location="", device="cpu"):
        super().__init__(location, device)
        # A group shares its prompt, so a cache saves time. The last bit of a row of a matrix
        # product depends on the number of rows: one at a time, a resumed run equals another.
        self.encode_one = functools.lru_cache(4096)(lambda prompt: self.encode_text([prompt])[0])

    def score(self, pixels, prompts):
        half = self.half and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.float16, enabled=half):
            image, text = self.encode_image(pixels), self.cached_text(prompts)      # (G, D) each
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        return self.scale * (image * text).sum(1)                       # (G,)

    def encode_text(self, prompts):
        return self.net.encode_text(self.tokenizer(prompts).to(self.device))

    def cached_text(self, prompts):
        return torch.stack([self.encode_one(prompt) for prompt in prompts])         # (G, D)

class HPSv2(Cosine):
    """HPSv2.1 (Wu et al., arXiv 2306.09341): a CLIP ViT-H/14, fine-tuned on which of two pictures
    people preferred.

    Weights     HPS_v2.1_compressed.pt of xswu/HPSv2, in open_clip's layout. Apache-2.0.
    Image       not cropped, unlike the others. The LONGER edge becomes 224 (bicubic, antialiased,
                in floats, not clamped). Black bars make it square, then it is normalised.
    Text        open_clip's tokenizer, 77 tokens; longer prompts are cut.
    Score       the cosine itself, about 0.13 to 0.38 (SDXL 0.31). Leaderboards print it times 100.
    Source      github.com/tgxs002/HPSv2, hpsv2/img_score.py with hps_version="v2.1" (its default is
                v2.0). The original crashes on pictures that are not square and whose longer edge is
                already 224; here they are padded like all others.
    """
    source, file, half = HUB + "xswu/HPSv2", "HPS_v2.1_compressed.pt", True
    pin, architecture = "697403c78157020a1ae59d23f111aa58ced35b0a", "ViT-H-14"

    def __init__(self, location="", device="cpu"):
        import open_clip
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        state = read_weights(path, self.source)
        net = open_clip.model.CLIP(**open_clip.get_model_config(self.architecture))
        self.net = load_strictly(net, state, path, self.source).to(device)
        self.tokenizer = open_clip.get_tokenizer(self.architecture)

    def encode_image(self, pixels, size=224):
        from torchvision.transforms.functional import center_crop, normalize
        x = pixels.float() / 255
        scale = size / max(x.shape[-2:])
        height, width = (round(scale * side) for side in x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
        x = center_crop(x, size)                                # pads with black
        return self.net.encode_image(normalize(x, MEAN, STD))

class PickScore(Cosine):
    """PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14, fine-tuned on the choices of
    Pick-a-Pic's users.

    Weights     model.safetensors of yuvalkirstain/PickScore_v1, in transformers' layout. No
                licence stated (code MIT).
    Image       transformers' CLIPImageProcessor. It equals `shorter_edge_to(224)`, except that it
                crops some pictures that are not square one pixel further to a side.
    Text        CLIP's tokenizer as in transformers, 77 tokens; longer prompts are cut.
    Score       exp(logit_scale) * cosine, about 17 to 24. The paper's Table 1 prints it over 100.
    Source      github.com/yuvalkirstain/PickScore, README (calc_probs).
    """
    source, file = HUB + "yuvalkirstain/PickScore_v1", "model.safetensors"
    pin = "a4e4367c6dfa7288a00c550414478f865b875800"
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                num_attention_heads=16, hidden_act="gelu")
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,       # ViT-H/14
                  num_attention_heads=16, hidden_act="gelu", image_size=224, patch_size=14,
                  projection_dim=1024)

    def __init__(self, location="", device="cpu"):
        from transformers import CLIPImageProcessorPil
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        state = read_weights(path, self.source)
        self.net = load_strictly(self.build(), state, path, self.source).to(device)
        self.scale = self.net.logit_scale.exp().item()
        self.tokenizer, self.processor = clip_tokenizer(), CLIPImageProcessorPil()

    @classmethod
    def build(cls):
        from transformers import CLIPConfig, CLIPModel
        return CLIPModel(CLIPConfig(text_config=cls.text, vision_config=cls.vision,
                                    projection_dim=cls.vision["projection_dim"]))

    def encode_image(self, pixels):
        def transform(picture):
            return self.processor(picture, return_tensors="pt").pixel_values[0]
        return self.net.get_image_features(prepare(pixels, transform)).pooler_output

    def encode_text(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return self.net.get_text_features(**ids.to(self.device)).pooler_output

def clip_tokenizer():
    """transformers' CLIPTokenizer with the vocabulary from the open_clip package, so that nothing
    is downloaded. All CLIPs share this vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    bpe = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(vocab={special.get(token, token): i for token, i in bpe.encoder.items()},
                         merges=list(bpe.bpe_ranks), model_max_length=77)

class ClipScore(Cosine):
    """CLIP score, out of domain in the paper: how well the picture fits its prompt, according to a
    CLIP that was not trained on preferences.

    Weights     apple/DFN5B-CLIP-ViT-H-14-378 (arXiv 2309.17425), Apple ML research licence. The
                paper does not say which CLIP Table 1 uses; MixGRPO and DanceGRPO use this one. You
                can name any other model of open_clip: `clipscore=ViT-B-32/openai`,
                `clipscore=hf-hub:owner/name`, `clipscore=folder` with an open_clip_config.json.
    Image, text open_clip's own transform and tokenizer for that model. For DFN5B: PIL's bicubic
                straight to 378 x 378, without a crop.
    Score       the cosine: 0.2 to 0.45 (FLUX.1-dev 0.39 in Table 1); 0.2 to 0.3 with OpenAI's CLIP.
    Source      github.com/mlfoundations/open_clip, which downloads the newest version (no pin).
    """
    source, file, half = HUB + "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_config.json", True

    @classmethod
    def check(cls, location):
        """Returns what open_clip calls them: (name of the model, tag of its weights or None)."""
        if location and Path(location).expanduser().is_dir():
            return f"local-dir:{Path(location).expanduser()}", None
        if not location or location.startswith("hf-hub:"):
            return location or "hf-hub:" + cls.source.removeprefix(HUB), None
        import open_clip
        name, _, tag = location.partition("/")
        if (name, tag) not in open_clip.list_pretrained():
            raise ValueError(f"{location} is not a model/tag of open_clip.list_pretrained(), not a "
                             f"folder with {cls.file}, and does not begin with hf-hub:")
        return name, tag

    def __init__(self, location="", device="cpu"):
        import open_clip
        super().__init__(location, device)
        name, tag = self.check(location)
        try:
            self.net, self.transform = open_clip.create_model_from_pretrained(
                name, tag, precision="fp32")
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise ValueError(f"clipscore: {location or self.source} could not be loaded "
                             f"({one_line(error)}); it should be like {self.source}") from error
        self.net.eval().requires_grad_(False).to(device)

    def encode_image(self, pixels):
        return self.net.encode_image(prepare(pixels, self.transform))

def mlp(width):
    """The head that LAION's aesthetic predictor and ImageReward share: linear maps with dropout
    between them, and no activation."""
    layers = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
              nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})    # the files say layers.0.weight, ...

class ImageReward(Published):
    """ImageReward (Xu et al., arXiv 2304.05977): BLIP's text encoder reads the prompt with
    cross-attention to the picture, and a head on its first token gives the score.

    Weights     ImageReward.pt of THUDM/ImageReward (Apache-2.0; BLIP BSD-3), and vocab.txt of
                google-bert/bert-base-uncased, in the same folder if you give a path of your own.
    Image       `shorter_edge_to(224)`.
    Text        BERT's lower-cased tokens, cut to 35 (one HPDv2 prompt in 17 is longer). The first
                token is [CLS]; elsewhere BLIP puts [ENC] there.
    Score       (head(first hidden state) - 0.167) / 1.033, about -2.3 to 2. Over ImageReward's own
                test set the mean is 0 and the deviation 1.
    Source      github.com/zai-org/ImageReward, ImageReward/ImageReward.py. BLIP is transformers'.
    """
    source, file = HUB + "THUDM/ImageReward", "ImageReward.pt"
    pin = "5736be03b2652728fb87788c9797b0570450ab72"
    bert = HUB + "google-bert/bert-base-uncased"
    bert_pin = "86b5e0934494bd15c9632b12f734a8a67f723594"
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,       # ViT-L/16
                  num_attention_heads=16, image_size=224, patch_size=16, layer_norm_eps=1e-6)
    text = dict(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,      # BERT-base
                vocab_size=30524, max_position_embeddings=512, num_hidden_layers=12,
                num_attention_heads=12, is_decoder=True)        # for the cross-attention

    def __init__(self, location="", device="cpu"):
        from transformers import BertTokenizer
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        folder = path.parent if local_file(location, self.source, self.file) else ""
        vocabulary = fetch(str(folder), self.bert, "vocab.txt", self.bert_pin)
        self.tokenizer = BertTokenizer(vocab=str(vocabulary))
        if len(self.tokenizer) != self.text["vocab_size"] - 2:  # without [DEC] and [ENC]
            raise ValueError(f"{vocabulary} is not the vocabulary of {self.bert}")
        state = self.rename(read_weights(path, self.source))
        self.net = load_strictly(self.build(), state, path, self.source).to(device)
        self.transform = shorter_edge_to(self.vision["image_size"])

    @classmethod
    def build(cls):
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel
        vision = BlipVisionModel(BlipVisionConfig(**cls.vision))
        text = BlipTextModel(BlipTextConfig(**cls.text), add_pooling_layer=False)
        return nn.ModuleDict(dict(vision=vision, text=text, mlp=mlp(cls.text["hidden_size"])))

    @staticmethod
    def rename(state):
        """The checkpoint's names -> those of transformers' BLIP."""
        changes = {
            "blip.text_encoder.": "text.", "blip.visual_encoder.": "vision.",
            "vision.cls_token": "vision.embeddings.class_embedding",
            "vision.pos_embed": "vision.embeddings.position_embedding",
            "vision.patch_embed.proj": "vision.embeddings.patch_embedding",
            "vision.norm.": "vision.post_layernorm.", "vision.blocks": "vision.encoder.layers",
            ".norm1.": ".layer_norm1.", ".attn.proj.": ".self_attn.projection.",
            ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv."}
        unused = ("blip.vision_proj.", "blip.text_proj.")       # for BLIP's contrastive loss
        renamed = {}
        for name, tensor in state.items():
            if not name.startswith(unused):
                for old, new in changes.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
        return renamed

    def score(self, pixels, prompts):
        image = self.net["vision"](prepare(pixels, self.transform)).last_hidden_state
        text = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35,
                              return_tensors="pt").to(self.device)
        everything = torch.ones(image.shape[:2], dtype=torch.long, device=self.device)  # (G, 197)
        # forward() gets no is_decoder, so the attention among the words is not causal.
        hidden = self.net["text"](text.input_ids, text.attention_mask, encoder_hidden_states=image,
                                  encoder_attention_mask=everything).last_hidden_state
        raw = self.net["mlp"]["layers"](hidden[:, 0]).squeeze(1)        # hidden (G, 35, 768)
        return (raw - 0.16717362830052426) / 1.0333394966054072         # (G,)

class Aesthetic(Published):
    """LAION's aesthetic predictor V2, out of domain in the paper: how beautiful people would find
    the picture, from 1 to 10. The prompt is ignored.

    Weights     the head sac+logos+ava1-l14-linearMSE.pth (Apache-2.0), and model.safetensors of
                openai/clip-vit-large-patch14 (MIT), which may lie in the folder of the head.
    Image       `shorter_edge_to(224)`.
    Score       head(unit image embedding), about 4 to 7 (FLUX.1-dev 6.1 in Table 1).
    Source      github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py.
    """
    source = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    file = "sac+logos+ava1-l14-linearMSE.pth"
    pin = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    clip = HUB + "openai/clip-vit-large-patch14"
    clip_pin = "32bd64288804d66eefd0ccbe215aa642df71cc41"
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,       # ViT-L/14
                  num_attention_heads=16, image_size=224, patch_size=14, projection_dim=768)

    def __init__(self, location="", device="cpu"):
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        net, head = self.build()
        self.head = load_strictly(head, read_weights(path, self.source), path, self.source)
        folder = path.parent if (path.parent / "model.safetensors").is_file() else ""
        path = fetch(str(folder), self.clip, "model.safetensors", self.clip_pin)
        state = {name: tensor for name, tensor in read_weights(path, self.clip).items()
                 if name.startswith(("vision_model.", "visual_projection."))}
        self.net = load_strictly(net, state, path, self.clip).to(device)
        self.head, self.transform = self.head.to(device), shorter_edge_to(self.vision["image_size"])

    @classmethod
    def build(cls):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        net = CLIPVisionModelWithProjection(CLIPVisionConfig(**cls.vision))
        return net, mlp(cls.vision["projection_dim"])

    def score(self, pixels, prompts):
        features = self.net(prepare(pixels, self.transform)).image_embeds           # (G, 768)
        return self.head["layers"](F.normalize(features, dim=1)).squeeze(1)         # (G,)

# ------------------------------------------------------------------------------------------------
# A reward without a model

def jpeg(array, quality=95):
    """A uint8 (H, W, 3) array as the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "jpeg", quality=quality)
    return file.getvalue()

class Jpeg(Scorer):
    """Minus the size of the image as a JPEG file, in kB (quality 95): DDPO's compressibility, arXiv
    2305.13301, Section 5. The prompt is ignored. This reward needs no model. It shows what happens
    when a reward ignores quality: pictures become flat and pale."""

    def score(self, pixels, prompts):
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return -torch.tensor([len(jpeg(array)) for array in arrays]) / 1000         # (G,)

# ------------------------------------------------------------------------------------------------
# From names to scorers

EXAMPLES, TINY = f"{HERE}/examples", f"{HERE}/tiny/scorers.py"
SCORERS = dict(                                 # {name: a class, or FILE.py:CLASS}
    hpsv2=HPSv2, pickscore=PickScore, imagereward=ImageReward, clipscore=ClipScore,
    aesthetic=Aesthetic, hpsv3=f"{EXAMPLES}/hpsv3_reward.py:HPSv3",
    unifiedreward=f"{EXAMPLES}/server_reward.py:UnifiedReward",
    unifiedreward_final=f"{EXAMPLES}/server_reward.py:UnifiedRewardFinal",
    ocr=f"{EXAMPLES}/package_rewards.py:Ocr", jpeg=Jpeg, preference=f"{TINY}:Preference",
    judge=f"{TINY}:Judge", named=f"{TINY}:Named", flawless=f"{TINY}:Flawless")
# Your own cannot have the name of another number in log.jsonl or results.json.
TAKEN = (r"iter|reward(_std)?|first_ratio|clip_fraction|grad_norm|flat_groups|skipped|fallen|"
         r"velocity_ratio|peak_gb|label|path|solver|trained_on|diversity|images|"
         r"(nfe_|eval_|seconds).*|.*(_gain|_stderr)")

# A spec is [FILE.py: or module:]NAME[=argument]. Paths may have all of its separators: a file ends
# at the first ".py:", a name has no slash, and an argument begins at the first "=" after the name.
SPEC = re.compile(r"(?:(.*?\.py|[\w.]+):)?([^:=/\\]*)(?:=(.*))?", re.DOTALL)

def split(spec):
    """The parts of a spec: file or module of its code, name, argument. A missing part is "":
    "hpsv2=a.pt" -> ("", "hpsv2", "a.pt"); "own.py:redness" -> ("own.py", "redness", "")."""
    parts = SPEC.fullmatch(spec)
    return tuple((part or "").strip() for part in (parts.groups() if parts else ("", spec, "")))

def listed(specs):
    """Comma-separated specs -> a list. A path may have commas: what follows one belongs to the part
    before it, if that is no spec yet, or if it has an argument and the rest is no spec."""
    found = []
    for part in specs.split(","):
        if found and (not SPEC.fullmatch(found[-1])
                      or (split(found[-1])[2] and not SPEC.fullmatch(part))):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return [spec.strip() for spec in found if spec.strip()]

@functools.cache
def import_source(source):
    """Import FILE.py or package.module -> (module, SHA-256 of its file as it was then)."""
    file = os.path.expanduser(source)
    try:
        if not source.endswith(".py"):
            module = importlib.import_module(source)
            return module, hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        code, module = Path(file).read_bytes(), types.ModuleType(str(Path(file).resolve()))
        module.__file__, sys.modules[module.__name__] = file, module
        exec(compile(code, file, "exec"), vars(module))
        return module, hashlib.sha256(code).hexdigest()
    except (Exception, SystemExit) as error:
        message = one_line(describe(error, file))
        raise ValueError(f"{source} cannot be imported: {message}") from error

@undisturbed()
def find(spec):
    """A spec -> (the Scorer class or function that it names, its argument). Imports code, but loads
    no weights. ValueError for a spec that cannot work."""
    source, name, argument = split(spec)
    if source and (name in SCORERS or re.fullmatch(TAKEN, name)):
        raise ValueError(f"{spec}: the name {name!r} belongs to another scorer, or to another "
                         "number in the log; rename the function")
    if not source and name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; there are {', '.join(SCORERS)}, and your "
                         "own as FILE.py:FUNCTION or module:FUNCTION")
    scorer = SCORERS.get(name, spec)
    if isinstance(scorer, str):
        source, name, _ = split(scorer)
        scorer = getattr(import_source(source)[0], name, None)
    is_class = isinstance(scorer, type) and issubclass(scorer, Scorer)
    if not is_class and (isinstance(scorer, type) or not callable(scorer)):
        problem = "does not exist" if scorer is None else f"is of type {type(scorer).__name__}"
        raise ValueError(f"{name!r} of {source} {problem}, but must be a function f(images, "
                         "prompts) or a subclass of rewards.Scorer")
    try:
        (scorer if is_class else Scorer).check(argument)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from error
    return scorer, argument

def fingerprints(*specs):
    """{"SHA-256 of FILE.py": hash} for the scorers among comma-separated specs that are your own
    code. A run can be resumed only while these are the same."""
    sources = [split(spec)[0] for text in specs for spec in listed(text)]
    return {f"SHA-256 of {source}": import_source(source)[1] for source in sources if source}

def parse(specs):
    """Comma-separated specs -> {name: spec}. ValueError as in `find`; no weights are loaded."""
    parsed = {}
    for spec in listed(specs):
        name = split(spec)[1]
        if name in parsed:
            raise ValueError(f"scorer {name!r} is named twice in {specs!r}")
        find(spec)
        parsed[name] = spec
    return parsed

def parse_weights(text, names):
    """ "2,1" -> a weight for each of `names`, (M,); "" -> ones. ValueError for anything else."""
    if not text:
        return torch.ones(len(names))
    try:
        weights = torch.tensor([float(w) for w in text.split(",") if w.strip()])
    except ValueError:
        weights = torch.empty(0)
    allowed = ((weights >= 0) & (weights < 1e30)).all() and weights.sum() > 0
    if len(weights) != len(names) or not allowed:
        raise ValueError(f"reward_weights is {text}, but must be one number >= 0, not all 0, for "
                         f"each of {','.join(names)}")
    return weights                                                      # (M,)

@undisturbed()
def load(spec, device="cpu"):
    """ "name", "name=argument" or "FILE.py:FUNCTION" -> a scorer, ready to be called."""
    found, argument = find(spec)
    source, name, _ = split(spec)
    file = import_source(source)[0].__file__ if source else ""
    try:
        scorer = found(argument, device) if isinstance(found, type) else OwnReward(found, device)
    except (ValueError, OSError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:    # of a class of your own
        raise ValueError(f"{spec} could not be loaded: {describe(error, file)}") from error
    scorer.name, scorer.code_file = name, file
    return scorer

def load_all(specs, device, prompts, frames=4):
    """{name: spec} -> {name: scorer}. Each checks all prompts and is tried on one and on two grey
    images, or videos of four frames, so that failures show up before the run: first of your own,
    because they load fast."""
    scorers = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[0] in SCORERS):
        scorers[name] = scorer = load(spec, device)
        scorer.frames = frames
        with undisturbed():
            for prompt in prompts:
                scorer.check_prompt(prompt)
        for count in (1, 2):
            shape = (count, 4, 3, 64, 64) if scorer.video else (count, 3, 64, 64)
            scorer(torch.full(shape, 0.5), prompts[:1] * count)
    return {name: scorers[name] for name in specs}

def forgiving(scorer):
    """The scorer, but with nan where it fails: one that is only watched must not end a run."""
    def score(images, prompts):
        scores = attempt("a score that is only watched", lambda: scorer(images, prompts))
        return torch.full((len(images),), torch.nan) if scores is None else scores

    return score
