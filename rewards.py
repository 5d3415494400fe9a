"""
Images and prompts in, numbers out. (Time t, here as everywhere, runs from 1, noise, to 0, image; only t = 0 is scored.)

Every scorer is called the same way:  scorer(images (G, 3, H, W) in [0, 1], prompts [G]) -> (G,) float32, higher is better.
All G are scored in one batch, and all scorers see images rounded to 8 bits, as anybody else would who is sent the file.
`load("clip", device)` makes one by name; `load("clip=some/folder", device)` takes its weights from elsewhere.
"""
import cpu_torchvision                                          # noqa: F401  (must come before open_clip)
import io
import json
from pathlib import Path
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

TINY = Path(__file__).resolve().parent / "tiny"


def as_8_bit(images, prompts):
    """Check a scorer's input and round it to what an image file holds: (G, 3, H, W) in [0, 1] -> uint8."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be float (G, 3, H, W)")
    if len(prompts) != len(images):
        raise ValueError(f"there are {len(prompts)} prompts for {len(images)} images; each image needs its own")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):                            # also false for NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], but must lie in [0, 1]")
    return (images * 255).round().to(torch.uint8)


class Clip:
    """Cosine of image and caption in a small CLIP: open_clip's model, trained from scratch by make_tiny.py.

    `clip` (tiny/reward, 1.9 M parameters) saw the emoji styles the generator was trained on and is the reward; `judge`
    (tiny/judge, 0.7 M, another architecture) saw only two other vendors' emoji and says whether a gain is more than a trick on the
    reward. 64x64 pixels, RGB in [-1, 1]; other sizes are resized. Range about 0 to 0.6. MIT, data as in tiny/README.md.
    """

    def __init__(self, folder, device):
        from open_clip.model import CLIP                        # imported late: two seconds that the JPEG reward need not wait
        config = json.loads((Path(folder) / "config.json").read_text())
        self.net, self.device = CLIP(**config), device
        self.net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        self.net.float().eval().requires_grad_(False).to(device)
        self.size, self.length = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
        self.tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")

    def look(self, images):
        """Images (G, 3, H, W) in [-1, 1] -> unit vectors (G, 128)."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net.encode_image(images, normalize=True)

    def read(self, prompts):
        """Prompts [G] -> unit vectors (G, 128). A group shares its prompt, so each distinct one is read once."""
        distinct = list(dict.fromkeys(prompts))
        ids = self.tokenizer(distinct, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").input_ids
        text = self.net.encode_text(ids.to(self.device), normalize=True)
        return text[torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)]

    @torch.no_grad()
    def __call__(self, images, prompts):
        images = as_8_bit(images, prompts).to(self.device).float() / 127.5 - 1
        return (self.look(images) * self.read(prompts)).sum(1)                                        # (G,)


class Jpeg:
    """Minus the size of the image as a JPEG file, in kB (quality 95): DDPO's compressibility, arXiv 2305.13301, Section 5. The prompt is
    not read. It needs no model, and shows what a reward without taste does: the picture goes flat and pale."""

    def __init__(self, device):
        self.device = device

    def __call__(self, images, prompts):
        sizes = []
        for image in as_8_bit(images, prompts).permute(0, 2, 3, 1).cpu().numpy():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "jpeg", quality=95)
            sizes.append(file.tell())
        return -torch.tensor(sizes, dtype=torch.float32, device=self.device) / 1000                    # (G,)


SCORERS = {                                                     # name -> (scorer, where its weights are unless told otherwise)
    "clip": (Clip, TINY / "reward"),
    "judge": (Clip, TINY / "judge"),
    "jpeg": (Jpeg, None),
}


def check(spec):
    """ "name" or "name=folder" -> (scorer, folder). Refuses what cannot be loaded, before anything is."""
    name, _, folder = spec.partition("=")
    if name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; there are {', '.join(SCORERS)}")
    scorer, default = SCORERS[name]
    if folder and not default:
        raise ValueError(f"scorer {name!r} has no weights, so nothing may follow its name, and {spec!r} names a folder")
    folder = folder or default
    if folder and not (Path(folder) / "model.safetensors").is_file():
        raise ValueError(f"scorer {name!r} needs a folder with model.safetensors, and {folder} is none")
    return scorer, folder


def load(spec, device="cpu"):
    """ "name" or "name=folder" -> a scorer, ready to be called."""
    scorer, folder = check(spec)
    return scorer(folder, device) if folder else scorer(device)
