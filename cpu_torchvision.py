"""
Lets torchvision's wheel be imported over a CPU build of torch. Import this before transformers,
diffusers or open_clip.

open_clip needs torchvision, and torchvision's wheel is built for a CUDA torch. Over a CPU torch its
compiled operators do not load, `import torchvision` dies with "operator torchvision::nms does not
exist", and takes transformers and diffusers down with it. Nothing here calls those operators;
declaring their names is enough. Where the operators are there (a CUDA torch), this does nothing.
"""
import importlib.util
import torch

try:
    spec = importlib.util.find_spec("torchvision")
    if spec is not None and torch.version.cuda is None:
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", boxes)
        torch.library.define("torchvision::qnms", boxes)
except RuntimeError:                            # declared already, by torchvision or by a copy
    pass
