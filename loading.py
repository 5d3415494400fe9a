"""
What model.py can load, and how: the folder of a pipeline, a hub id, adapters; and the resolutions
it can have. All else is refused in one sentence.
"""
import json, re
from pathlib import Path
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import torch
from safetensors.torch import load_file

PIPELINES = ("FluxPipeline", "Flux2KleinPipeline")              # model.py has a class for each


# ----------------------------------------------------------------------------------------------
# pipelines

def check_model(path):
    """Refuse, before anything is loaded, what is neither the folder of a pipeline nor a hub id."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        check_configs(path, lambda file: path / file)
    elif path.is_file():
        raise ValueError(f"{path} is a single file; name a FluxPipeline directory, which "
                         "diffusers makes of it: FluxPipeline.from_single_file, save_pretrained")
    elif path.exists() or len(path.parts) != 2 or path.parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory, nor a Flux2KleinPipeline's; it "
                         "must hold model_index.json, or be a hub id like "
                         "black-forest-labs/FLUX.1-dev")


def check_configs(path, find):
    """The class of a pipeline, by name. Refuses other classes, and a transformer that cannot be
    trained here. find(name) -> path."""
    def read(file):
        return json.loads(find(file).read_text(encoding="utf-8"))

    name = read("model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{path} is a {name}, but must be a {' or '.join(PIPELINES)}, text to "
                         "image")
    config = read("transformer/config.json")
    channels = config.get("in_channels", 64)
    if (config.get("out_channels") or channels) != channels:
        raise ValueError(f"the transformer of {path} takes {channels} channels and gives "
                         f"{config['out_channels']}; Fill, Depth and Canny models need more inputs "
                         "than a prompt, and cannot be aligned here")
    if config.get("quantization_config"):
        raise ValueError(f"the transformer of {path} is quantized; name the original weights, and "
                         "train adapters (--lora_rank 64) if memory is scarce")
    return name


def find_pipeline(path):
    """The class of a pipeline, by name, and its folder. A hub id is downloaded, after a look at its
    configuration."""
    if Path(path).is_dir():
        return check_configs(path, lambda file: Path(path) / file), Path(path)
    from huggingface_hub import hf_hub_download
    name = check_configs(path, lambda file: Path(hf_hub_download(str(path), file)))
    return name, Path(getattr(diffusers, name).download(str(path)))


def parse_resolution(text):
    """ "720" or "832x640" (width x height) -> (height, width) in pixels."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip())):
        raise ValueError(f"resolution is {text}, but must be a number of pixels, or like 832x640")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(16 <= side <= 8192 and side % 16 == 0 for side in (width, height)):
        raise ValueError(f"resolution is {text}, but its sides must be multiples of 16, up to 8192")
    return height, width


# ----------------------------------------------------------------------------------------------
# adapters

def is_lora(path):
    """Whether a path names adapters: a .safetensors file, or a folder with one that diffusers or
    PEFT wrote."""
    return lora_file(path) is not None


def lora_file(path):
    path = Path(path)
    found = [path, path / "pytorch_lora_weights.safetensors", path / "adapter_model.safetensors"]
    return next((file for file in found if file.is_file() and file.suffix == ".safetensors"), None)


def add_lora(transformer, rank):
    """Add adapters of this rank to all linear layers of attention; klein's single blocks have its
    feed-forward layers in the same matrices. They are zero at first, and nothing else is trained.
    Alpha equals the rank, so programs that ignore alpha apply the same strength."""
    from peft import LoraConfig
    linear = [name for name, part in transformer.named_modules()
              if ".attn." in name and isinstance(part, torch.nn.Linear)]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=linear))


def load_lora(pipe, path):
    """Load adapters, in any layout that diffusers knows or in PEFT's own."""
    file = lora_file(path)
    try:
        state, prefix = load_file(file), "base_model.model."    # PEFT's
        if all(name.startswith(prefix) and "transformer_blocks" in name for name in state):
            settings = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
            state = {name.replace(prefix, "transformer."): w for name, w in state.items()}
            for name in [name for name in state if name.endswith(".lora_A.weight")]:
                alpha = torch.tensor(float(settings["lora_alpha"]))
                state[name.replace(".lora_A.weight", ".alpha")] = alpha
            pipe.load_lora_weights(state, adapter_name="default")
        else:
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="default")
    except Exception as error:
        raise ValueError(f"{file} could not be loaded as adapters: {error}") from error
    if not any("lora_" in name for name, _ in pipe.transformer.named_parameters()):
        raise ValueError(f"{file} holds no adapters of the transformer")
