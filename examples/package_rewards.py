"""
A reward with networks from a PyPI package that includes the weights: real models, trained by
others, for people who cannot reach the hub.

    pip install rapidocr-onnxruntime==1.4.4
    python train.py --rewards ocr           # each prompt must have the wanted text in "quotes"

rewards.py finds this class like your own rewards: by file and name. (`ocr` is short for
examples/package_rewards.py:Ocr.) It is a subclass of rewards.Scorer, and adds
`score(pixels uint8 (G, 3, H, W), prompts [G]) -> (G,)`. Before a run begins, `check(argument)` can
refuse the text after "=", and `check_prompt(prompt)` can refuse a prompt.
"""
import re
import torch
from PIL import Image
from rewards import Scorer, one_line


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
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:            # perhaps of a library of the system, such as libGL
            raise ValueError("scorer 'ocr' needs a package: pip install "
                             f"rapidocr-onnxruntime==1.4.4 ({one_line(error)})") from None
        self.reader = RapidOCR(intra_op_num_threads=torch.get_num_threads())

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
