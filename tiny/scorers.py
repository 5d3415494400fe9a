"""
The scorers of the small world. make_tiny.py trained them from scratch; nothing is downloaded.

    preference   the reward: wants the right caption, the right style, and no flaw
    judge        never trained on: does the picture fit its caption? It has never seen a flaw
    named        never trained on: does the judge take the picture for the concept of the prompt?
    flawless     never trained on: the probability that the picture has none of the flaws

All of them work at 64x64 pixels. Pictures of other sizes are resized. rewards.py finds these
classes by file and name, like your own rewards. MIT; for the data see README.md beside this file.
"""
import json
from pathlib import Path
import torch
import torch.nn.functional as F
from rewards import Cosine, Scorer, load_strictly, one_line, read_weights

HERE = Path(__file__).resolve().parent


class Shipped(Scorer):
    """A scorer whose weights are in this repository, in the folder `home`, or in one like it."""
    home = HERE

    @classmethod
    def check(cls, location):
        folder = Path(location or cls.home).expanduser()
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder} should be a folder with model.safetensors, but is not")

    def read(self, location, make):
        """make(**config.json) with the weights of model.safetensors -> the network, the config."""
        folder = Path(location or self.home).expanduser()
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            net = make(**config)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder / 'config.json'} is not like {self.home / 'config.json'}: "
                             f"{one_line(error)}") from error
        path = folder / "model.safetensors"
        net = load_strictly(net, read_weights(path, self.home), path, self.home)
        return net.to(self.device), config


def to_64(pixels):
    """uint8 (G, 3, H, W) -> (G, 3, 64, 64), RGB in [-1, 1]."""
    x = pixels.float() / 127.5 - 1
    if x.shape[-2:] != (64, 64):
        x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    return x


class Preference(Shipped, Cosine):
    """Cosine of picture and caption in a small CLIP (open_clip's model, 0.8 M parameters). It
    learnt to reject flawed and unfinished pictures, as HPSv2 learnt from people. -0.2 to 0.8."""
    home = HERE / "preference"

    def __init__(self, location="", device="cpu"):
        from open_clip.model import CLIP        # imported here because it takes two seconds
        from transformers import CLIPTokenizer
        super().__init__(location, device)
        self.net, config = self.read(location, CLIP)
        self.length = config["text_cfg"]["context_length"]
        self.tokenizer = CLIPTokenizer.from_pretrained(
            Path(location or self.home).expanduser() / "tokenizer")

    def encode_image(self, pixels):
        return self.net.encode_image(to_64(pixels))                     # (G, 128)

    def encode_text(self, prompts):
        ids = self.tokenizer(prompts, padding="max_length", max_length=self.length,
                             truncation=True, return_tensors="pt").input_ids
        return self.net.encode_text(ids.to(self.device))                # (G, 128)


class Judge(Preference):
    """Cosine of picture and caption in another small CLIP (0.8 M, another architecture). It saw
    only the emoji of two other vendors, all of them without a flaw. So if the judge rises, the
    model has not merely learnt the weak points of the reward. About -0.2 to 0.8."""
    home = HERE / "judge"


class Named(Judge):
    """1 if the judge, choosing among the prompt's concept and the 252 of prompts/, chooses the
    prompt's; otherwise 0. By chance the mean would be 0.004."""

    def __init__(self, location="", device="cpu"):
        super().__init__(location, device)
        self.concepts = concepts()
        with torch.no_grad():
            self.choices = F.normalize(self.cached_text(self.concepts), dim=1)      # (252, 128)

    def score(self, pixels, prompts):
        image = F.normalize(self.encode_image(pixels), dim=1)           # (G, 128)
        own = F.normalize(self.cached_text([concept(prompt) for prompt in prompts]), dim=1)
        others = image @ self.choices.T                                 # (G, 252)
        for row, prompt in zip(others, prompts):
            row[[choice == concept(prompt) for choice in self.concepts]] = -1
        return ((image * own).sum(1) > others.amax(1)).float()          # (G,)


def concept(prompt):
    """ "a red apple, 3d style" -> "a red apple" """
    return prompt.partition(",")[0]


def concepts():
    """The concepts of all prompts of the small world."""
    texts = [file.read_text(encoding="utf-8") for file in sorted((HERE / "prompts").glob("*.txt"))]
    return sorted({concept(line) for text in texts for line in text.splitlines()})


class Flawless(Shipped):
    """The probability that the picture has none of the flaws of make_tiny.py, from a small ResNet.
    The prompt is ignored. The mean of 1 - flawless is about the share of flawed pictures."""
    home = HERE / "flawless"

    def __init__(self, location="", device="cpu"):
        import timm
        super().__init__("", device)
        self.net, _ = self.read(location, timm.create_model)

    def score(self, pixels, prompts):
        return self.net(to_64(pixels)).softmax(1)[:, 0]                 # (G,)
