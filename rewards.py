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
    ocr, imagenet, brisque              networks in PyPI packages (examples/package_rewards.py)

Scores are computed in float32, even inside the caller's autocast. Near 0.3, neighbouring bf16
numbers differ by 0.002, while the HPSv2.1 scores of a group differ by about 0.01. On a GPU the two
largest networks run in float16 (`half` in HPSv2 and ClipScore), but their scores are float32 too.
"""
from machine import attempt, evenly_spaced, one_line            # before open_clip
import contextlib, functools, hashlib, importlib, io, os, random, re, sys, traceback, types
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
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
        pixels = as_8_bit(images, prompts, 5 if self.video else 4)
        try:
            with undisturbed(), torch.autocast(self.device.type, enabled=False):
                scores = self.score(pixels.to(self.device), prompts)
            scores = as_numbers(scores)
        except (Exception, SystemExit) as error:
            raise ScorerError(f"scorer {self.name!r} failed on the prompt {prompts[0]!r}: "
                              f"{describe(error, self.code_file)}") from error
        shape, finite = tuple(scores.shape), scores.abs() < 1e30       # nan is not, either
        if shape != (len(images),) or not finite.all():
            bad = finite.int().argmin() if shape == (len(images),) else 0
            raise ScorerError(f"scorer {self.name!r} gave {one_line(scores.tolist())}, of shape "
                              f"{shape}, for the prompt {prompts[bad]!r}, but must give one finite "
                              f"number for each of {len(images)} images")
        return scores.to(images.device, torch.float32)                  # (G,)


def as_8_bit(images, prompts, ndim=4):
    """Check a scorer's input, and round it to 8 bits: (G, 3, H, W) in [0, 1] -> uint8. ndim=5: the
    same of videos, (G, frames, 3, H, W)."""
    right_shape = images.ndim == ndim and images.shape[-3] == 3 and images.numel() > 0
    if not (right_shape and images.is_floating_point()):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be float "
                         f"(G, {'frames, ' * (ndim == 5)}3, H, W)")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) != len(images) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images, but must be "
                         "a list with one string for each image")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):            # also false for NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], but must lie in [0, 1]")
    return (images * 255).round().to(torch.uint8)


def as_numbers(scores):
    """What a scorer returned -> (G,) float32 on the CPU."""
    try:
        return torch.as_tensor(scores, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"it returned a {type(scores).__name__}, but must return a number for "
                        "each image: a tensor (G,), a list or an array") from None


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
    is_folder = False                           # several files in a folder, not a single file

    @classmethod
    def check(cls, location):
        path = Path(location).expanduser()
        exists = path.is_dir() if cls.is_folder else path.exists()
        if location and not exists and not is_hub_id(location):
            raise ValueError(f"{location} should be the path of {cls.file} of {cls.source}, or a "
                             "hub id, but is neither")


def is_hub_id(location):
    """Whether `location` looks like "owner/name", not like the path of a file or folder."""
    return (re.fullmatch(r"[\w.-]+/[\w.-]+", location) and not Path(location).parent.exists()
            and not location.endswith((".pt", ".pth", ".bin", ".safetensors")))


def fetch(location, source, file, pin):
    """The path of a published file. `location` is the file, a folder with it, or a hub id. If it
    is empty, the version `pin` is downloaded from `source`, once."""
    if location and not is_hub_id(location):
        path = Path(location).expanduser()
        path = path / file if path.is_dir() else path
        if path.is_file():
            return path
        raise ValueError(f"there is no file {path}; it should be {file} of {source}")
    source, pin = (HUB + location, None) if location else (source, pin)
    try:
        if source.startswith(HUB):
            from huggingface_hub import hf_hub_download
            return Path(hf_hub_download(source.removeprefix(HUB), file, revision=pin))
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):          # one process downloads, the others wait
            if not path.is_file():
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
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError("the file has entries that are not tensors")
        return state
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file that contains only tensors; it may be "
                         f"incomplete or another file than the one of {source}") from error


def load_strictly(net, state, path, source, dtype=torch.float32):
    """Fill `net`, and return it frozen. No tensor may be missing, unexpected or reshaped."""
    wanted = net.state_dict()
    reshaped = {name for name in wanted.keys() & state.keys()
                if wanted[name].shape != state[name].shape}
    for problem, names in [("missing", wanted.keys() - state.keys()),
                           ("unexpected", state.keys() - wanted.keys()),
                           ("of another shape", reshaped)]:
        if names:
            first = min(names)
            expected = f" {tuple(wanted[first].shape)}" if first in wanted else ""
            raise ValueError(f"{path} is not the file of {source}: {len(names)} tensors are "
                             f"{problem}, such as {first}{expected}")
    net.load_state_dict(state, assign=True)     # so a network built on "meta" can be filled, too
    return net.to(dtype).eval().requires_grad_(False)


def load_transformers(cls, location, source, pin, vision, unused=()):
    """A transformers model from a folder or the hub: every weight of class `cls`, float32, frozen.
    `vision`: values that the config of the vision tower must have. `unused`: prefixes of tensors
    in the file that `cls` does not have."""
    from transformers.utils import logging
    path = os.path.expanduser(location) or source.removeprefix(HUB)
    revision, level = None if location else pin, logging.get_verbosity()
    try:
        logging.set_verbosity_error()           # every warning is harmless, or an error below
        net, info = cls.from_pretrained(path, revision=revision, dtype=torch.float32,
                                        output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:
        raise ValueError(f"{path} could not be loaded like {source} ({one_line(error)}); give a "
                         "folder with its files after the scorer's name and '='") from error
    finally:
        logging.set_verbosity(level)
    config = getattr(net.config, "vision_config", net.config)
    differences = [f"{name} is {getattr(config, name)} instead of {value}"
                   for name, value in vision.items() if getattr(config, name) != value]
    unexpected = [name for name in info["unexpected_keys"]      # older files also have position_ids
                  if not name.startswith(unused) and not name.endswith("position_ids")]
    for problem, names in [("missing", info["missing_keys"]), ("unexpected", unexpected),
                           ("of another shape", info["mismatched_keys"])]:
        if names:
            differences.append(f"{len(names)} tensors are {problem}, such as {min(names)}")
    if differences:
        raise ValueError(f"{path} is not the model of {source}: {', '.join(differences)}")
    return net.eval().requires_grad_(False)


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
        self.texts = {}                         # {prompt: (D,)}

    def score(self, pixels, prompts):
        half = self.half and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.float16, enabled=half):
            image, text = self.encode_image(pixels), self.cached_text(prompts)      # (G, D) each
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        return self.scale * (image * text).sum(1)                       # (G,)

    def encode_text(self, prompts):
        return self.net.encode_text(self.tokenizer(prompts).to(self.device))

    def cached_text(self, prompts, limit=4096):
        """`encode_text` with a cache, one prompt at a time. A group shares its prompt, so the cache
        saves time. The last bit of a row of a matrix product depends on the number of rows; one at
        a time, a resumed run equals an uninterrupted one."""
        if len(self.texts) > limit:
            self.texts.clear()
        for prompt in prompts:
            if prompt not in self.texts:
                self.texts[prompt] = self.encode_text([prompt])[0]
        return torch.stack([self.texts[prompt] for prompt in prompts])  # (G, D)


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
        x = pixels.float() / 255
        scale = size / max(x.shape[-2:])
        height, width = (round(scale * side) for side in x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
        left, top = (size - width) // 2, (size - height) // 2
        x = F.pad(x, (left, size - width - left, top, size - height - top))
        mean, std = x.new_tensor(MEAN)[:, None, None], x.new_tensor(STD)[:, None, None]
        return self.net.encode_image((x - mean) / std)


class PickScore(Cosine):
    """PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14, fine-tuned on the choices of
    Pick-a-Pic's users.

    Weights     yuvalkirstain/PickScore_v1, transformers' layout. No licence stated (code MIT).
    Image       transformers' CLIPImageProcessor. It equals `shorter_edge_to(224)`, except that it
                crops some pictures that are not square one pixel further to a side.
    Text        CLIP's tokenizer as in transformers, 77 tokens; longer prompts are cut.
    Score       exp(logit_scale) * cosine, about 17 to 24. The paper's Table 1 prints it over 100.
    Source      github.com/yuvalkirstain/PickScore, README (calc_probs).
    """
    source, pin = HUB + "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"
    file, is_folder = "a folder with config.json and model.safetensors", True
    vision = dict(hidden_size=1280, num_hidden_layers=32, patch_size=14, image_size=224)

    def __init__(self, location="", device="cpu"):
        from transformers import CLIPImageProcessorPil, CLIPModel
        super().__init__(location, device)
        net = load_transformers(CLIPModel, location, self.source, self.pin, self.vision)
        self.net, self.scale = net.to(device), net.logit_scale.exp().item()
        self.tokenizer, self.processor = clip_tokenizer(), CLIPImageProcessorPil()

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
        folder = str(path.parent) if location and not is_hub_id(location) else ""
        vocabulary = fetch(folder, self.bert, "vocab.txt", self.bert_pin)
        lines = len(vocabulary.read_text(encoding="utf-8", errors="replace").splitlines())
        expected = self.text["vocab_size"] - 2                  # without [DEC] and [ENC]
        if lines != expected:
            raise ValueError(f"{vocabulary} has {lines} lines, but that of {self.bert} has "
                             f"{expected}")
        self.tokenizer = BertTokenizer(vocab=str(vocabulary))
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
            if not name.startswith(unused) and not name.endswith("position_ids"):
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

    Weights     the head sac+logos+ava1-l14-linearMSE.pth (Apache-2.0), and
                openai/clip-vit-large-patch14 (MIT). Its files may lie in the folder of the head.
    Image       `shorter_edge_to(224)`.
    Score       head(unit image embedding), about 4 to 7 (FLUX.1-dev 6.1 in Table 1).
    Source      github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py.
    """
    source = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    file = "sac+logos+ava1-l14-linearMSE.pth"
    pin = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    clip = HUB + "openai/clip-vit-large-patch14"
    clip_pin = "32bd64288804d66eefd0ccbe215aa642df71cc41"
    vision = dict(hidden_size=1024, num_hidden_layers=24, patch_size=14, image_size=224)

    def __init__(self, location="", device="cpu"):
        from transformers import CLIPVisionModelWithProjection
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        head = load_strictly(mlp(768), read_weights(path, self.source), path, self.source)
        folder = str(path.parent) if (path.parent / "config.json").is_file() else ""
        net = load_transformers(CLIPVisionModelWithProjection, folder, self.clip, self.clip_pin,
                                self.vision, unused=("text_", "logit_scale"))
        self.net, self.head = net.to(device), head.to(device)
        self.transform = shorter_edge_to(self.net.config.image_size)

    def score(self, pixels, prompts):
        return self.rate(self.net(prepare(pixels, self.transform)).image_embeds)

    def rate(self, features):
        """Image embeddings of ViT-L/14 (G, 768), normalised or not -> (G,)."""
        return self.head["layers"](F.normalize(features, dim=1)).squeeze(1)


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

SERVER, PACKAGES = HERE / "examples/server_reward.py", HERE / "examples/package_rewards.py"
HPSV3, TINY = HERE / "examples/hpsv3_reward.py", HERE / "tiny/scorers.py"
SCORERS = dict(
    hpsv2=HPSv2, pickscore=PickScore, imagereward=ImageReward, clipscore=ClipScore,
    aesthetic=Aesthetic, hpsv3=(HPSV3, "HPSv3"), unifiedreward=(SERVER, "UnifiedReward"),
    unifiedreward_final=(SERVER, "UnifiedRewardFinal"), ocr=(PACKAGES, "Ocr"),
    imagenet=(PACKAGES, "ImageNet"), brisque=(PACKAGES, "Brisque"), jpeg=Jpeg,
    preference=(TINY, "Preference"), judge=(TINY, "Judge"), named=(TINY, "Named"),
    flawless=(TINY, "Flawless"))                # (file, name in it)
# A scorer cannot have the name of another key in log.jsonl or results.json.
TAKEN = (r"iter|reward|reward_std|first_ratio|clip_fraction|grad_norm|flat_groups|skipped|nfe_\w+|"
         r"label|path|solver|seconds\w*|trained_on|diversity|eval_\w+|\w+_gain|\w+_stderr|"
         r"velocity_ratio|fallen|peak_gb")


# A spec is [FILE.py: or module:]NAME[=argument]. Paths may have all of its separators: a file ends
# at the first ".py:", a name has no slash, and an argument begins at the first "=" after the name.
SPEC = re.compile(r"(?:(.*?\.py|[\w.]+):)?([^:=/\\]*)(?:=(.*))?", re.DOTALL)


def split(spec):
    """The parts of a spec: file or module of its code, name, argument. A missing part is "":
    "hpsv2=a.pt" -> ("", "hpsv2", "a.pt"); "own.py:redness" -> ("own.py", "redness", "")."""
    parts = SPEC.fullmatch(spec)
    return tuple((part or "").strip() for part in (parts.groups() if parts else ("", spec, "")))


def listed(specs):
    """Comma-separated specs -> a list. A path may have commas: a part that is no spec by itself
    belongs to the argument before it, or else to the file after it."""
    found, begun = [], ""
    for part in specs.split(","):
        if SPEC.fullmatch(begun + part):
            found, begun = [*found, begun + part], ""
        elif not begun and found and split(found[-1])[2]:
            found[-1] += f",{part}"
        else:
            begun += f"{part},"
    return [spec.strip() for spec in [*found, begun[:-1]] if spec.strip()]


@functools.cache
def import_source(source):
    """Import FILE.py or package.module -> (module, SHA-256 of its file as it was then)."""
    file = os.path.expanduser(source)
    try:
        if not source.endswith(".py"):
            module = importlib.import_module(source)
            file = getattr(module, "__file__", None)
            return module, hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
        code, name = Path(file).read_bytes(), str(Path(file).resolve())
        sys.modules[name] = module = types.ModuleType(name)
        module.__file__ = file
        exec(compile(code, file, "exec"), module.__dict__)
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
    scorer = SCORERS.get(name, (source, name))
    if isinstance(scorer, tuple):
        scorer = getattr(import_source(str(scorer[0]))[0], scorer[1], None)
    is_class = isinstance(scorer, type)
    if not callable(scorer) or (is_class and not issubclass(scorer, Scorer)):
        problem = "does not exist" if scorer is None else f"is of type {type(scorer).__name__}"
        raise ValueError(f"{name!r} of {source} {problem}, but must be a function f(images, "
                         "prompts) or a subclass of rewards.Scorer")
    try:
        if is_class:
            scorer.check(argument)
        elif argument:
            raise ValueError("nothing may follow the name of a function")
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
    scorer = found(argument, device) if isinstance(found, type) else OwnReward(found, device)
    scorer.name = name
    if source:
        scorer.code_file = getattr(import_source(source)[0], "__file__", "")
    return scorer


def load_all(specs, device, prompts):
    """{name: spec} -> {name: scorer}. Each checks all prompts and is tried on one and on two grey
    images, so that failures show up before the run: first of your own, because they load fast."""
    scorers = {}
    for name, spec in sorted(specs.items(), key=lambda item: item[0] in SCORERS):
        scorers[name] = scorer = load(spec, device)
        with undisturbed():
            for prompt in prompts:
                scorer.check_prompt(prompt)
        for count in (1, 2):
            frames = (4,) if scorer.video else ()
            scorer(torch.full((count, *frames, 3, 64, 64), 0.5), prompts[:1] * count)
    return {name: scorers[name] for name in specs}


def of_videos(scorer, count):
    """The scorer, but for videos, too, (M, frames, 3, H, W): the mean score of at most `count`
    frames, evenly spaced. One with `video = True` gets the whole videos."""
    if getattr(scorer, "video", False):
        return scorer

    def score(pictures, prompts):
        if pictures.ndim == 4:
            return scorer(pictures, prompts)
        frames = pictures[:, evenly_spaced(pictures.shape[1], count)]       # (M, n, 3, H, W)
        M, n = frames.shape[:2]
        each = [prompt for prompt in prompts for _ in range(n)]
        return scorer(frames.flatten(0, 1), each).unflatten(0, (M, n)).mean(1)

    return score


def forgiving(scorer):
    """The scorer, but with nan where it fails: one that is only watched must not end a run."""
    def score(images, prompts):
        scores = attempt("a score that is only watched", lambda: scorer(images, prompts))
        return torch.full((len(images),), torch.nan) if scores is None else scores

    return score
