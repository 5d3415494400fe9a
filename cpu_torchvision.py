"""
Lets torchvision's wheel be imported over a CPU build of torch. Import this before transformers,
diffusers or open_clip.

open_clip needs torchvision, and torchvision's wheel for Linux is built for a CUDA torch. Over a CPU
torch its library of compiled operators does not load. Then `import torchvision` dies with "operator
torchvision::nms does not exist", and takes transformers and diffusers down with it. Nothing here
calls those operators, so it is enough to declare their names. Where the library does load (CUDA,
ROCm, macOS, two CPU builds), it declares them itself. A second declaration would abort the process.
"""
import importlib.util
from pathlib import Path
import torch

found = importlib.util.find_spec("torchvision")                 # finds it, and does not import it
library = found and next(Path(found.origin).parent.glob("_C.*"), None)
try:
    if library:
        torch.ops.load_library(library)                         # as `import torchvision` will do
except OSError:                                                 # it misses CUDA's libraries
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}",
                                 "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:                                    # somebody has declared it before us
            pass
