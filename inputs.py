"""
What a run reads: files of prompts, and folders of models and adapters. What cannot work is refused
in one sentence, and a model's folder is checked before anything is loaded.

Prompts. `evenly_spaced` chooses some of them evenly. `read_prompts` takes

    a text file       one prompt per line, which may have commas
    JSON, JSON Lines  strings, or objects with a "prompt", as in HPDv2 and GenEval
    csv, tsv          a table with a column named prompt or prompts, as in PartiPrompts and
                      DrawBench; a text file with such a table is read as a table, too
    a folder          its .json files, in the order of their names
    hpdv2_train, hpdv2_test     the published prompts of HPDv2, in the places that HPDV2 names

A prompt that occurs several times in a file counts once, in the place of its first occurrence
(HPDv2's train.json has each of its prompts several times). Blank lines do not count. A byte order
mark, and spaces and zero-width characters around a prompt, are removed.

Models. `check_model` and `find_pipeline` take the folder of a pipeline with a transformer, or a
hub id. `load_lora` puts trained adapters into a network, from a file or folder in any layout
that diffusers knows or in PEFT's own; `add_lora` puts new ones.

torch and diffusers take seconds to import, so only the functions that need them do it.
"""
import contextlib, csv, io, json, math, re
from pathlib import Path

# ------------------------------------------------------------------------------------------------
# Files of prompts

HPDV2 = {       # name: (its place, what it contains, how to download it)
    "hpdv2_test": ("hpdv2/benchmark",
                   "the 3,200 prompts of anime, concept-art, paintings and photo.json",
                   'zhwang/HPDv2 --include "benchmark/*.json"'),
    "hpdv2_train": ("hpdv2/train.json", "the 103,700 training prompts", "ymhao/HPDv2 train.json"),
}
INVISIBLE = r"[\s\u200b-\u200f\u2060\ufeff]+"       # spaces; zero-width characters
EDGES = re.compile(f"^{INVISIBLE}|{INVISIBLE}$")
FIRST = 20                                          # lines that decide the kind of a file


def read_prompts(source):
    """The prompts of a file, a folder or one of the two names above -> a list of strings.

    ValueError, in one sentence, if a file is missing, empty, not UTF-8, or of another kind. This
    includes a table without a column named prompt: each of its lines would otherwise become a
    prompt.
    """
    if not source:
        raise ValueError("prompts is empty; name a text file with one prompt a line, or "
                         "hpdv2_train")
    place, content, command = HPDV2.get(source, (source, "", ""))
    path, found = Path(place), []
    if command and not path.exists():
        raise ValueError(f"{place} does not exist; it should have {content}; download it with: "
                         f"hf download --repo-type dataset {command} --local-dir hpdv2")
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            text = file.read_text(encoding="utf-8-sig")
            found += dict.fromkeys(map(visible, parse_prompts(text, file.suffix.lower())))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            said = getattr(error, "strerror", None) or " ".join(str(error).split())
            if type(error) is not ValueError:       # not one of the sentences below
                said += ("; it must be a UTF-8 text file with one prompt a line, JSON, or a table "
                         "with a column named prompt")
            raise ValueError(f"{file} is not a prompt file: {said}") from None
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def parse_prompts(text, suffix):
    if suffix in (".json", ".jsonl", ".ndjson"):
        return from_json(text)
    if text.lstrip().startswith(("{", "[")):        # perhaps JSON with another suffix
        with contextlib.suppress(json.JSONDecodeError):
            return from_json(text)
    return from_text(text, suffix)


def visible(text):
    """The text without spaces and zero-width characters at its ends."""
    return EDGES.sub("", text)


def from_json(text):
    """The prompts of a JSON list, or of JSON Lines: one value per line."""
    try:
        items = json.loads(text)
        items = items if isinstance(items, list) else [items]
    except ValueError:
        items = [json.loads(line) for line in text.split("\n") if visible(line)]
    found = []
    for item in items:
        if isinstance(item, dict):                  # the key may be Prompt
            item = next((value for key, value in item.items() if key.lower() == "prompt"), None)
        if not isinstance(item, str):
            raise ValueError("it is JSON, but an entry has no prompt")
        found.append(item)
    return found


def from_text(text, suffix):
    """The prompts of a table, if the file is a table or has its suffix. Else one per line."""
    lines = [line for line in map(visible, text.split("\n")) if line]
    header = lines[0] if lines else ""
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    names = [visible(name).lower() for name in cells_of(header, delimiter)]
    named = [i for i, name in enumerate(names) if name in ("prompt", "prompts")]
    if not (suffix in (".csv", ".tsv") or (named and len(names) > 1)
            or is_table(lines[:FIRST], delimiter)):
        return lines
    if not named:
        raise ValueError("it looks like a table, but its first line, "
                         f"{header[:60]!r}, has no column named prompt")
    return from_table(text, delimiter, len(names), named[0])


def cells_of(line, delimiter):
    return next(csv.reader([line], delimiter=delimiter), [])


def is_table(lines, delimiter):
    """Whether a line has a tab, or all lines have the same number (2 or more) of columns and no
    space after a comma. Prompts have spaces there, and more commas in some lines."""
    cells = [cells_of(line, delimiter) for line in lines]
    columns = len(cells) > 1 and len(cells[0]) > 1 and len({len(row) for row in cells}) == 1
    spaces = any(cell.startswith(" ") for row in cells for cell in row)
    return any("\t" in line for line in lines) or (columns and not spaces)


def from_table(text, delimiter, width, column):
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        if delimiter != "\t":
            raise
        rows = [line.split("\t") for line in text.split("\n")]      # a tsv file without quoting
    rows = [row for row in rows if any(map(visible, row))]
    for row in rows:
        if any(row[width:]):
            raise ValueError(f"the line {delimiter.join(row)[:60]!r} has more columns than the "
                             f"first line; a prompt with {delimiter!r} in it must be quoted")
    return [row[column] for row in rows[1:] if len(row) > column]


def evenly_spaced(n, most):
    """The indices of at most `most` of n prompts, evenly spaced. This rule also chooses the
    pictures that we show, so nobody can pick the good ones."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]


# ------------------------------------------------------------------------------------------------
# Folders of models and of adapters

def check_model(path):
    """Refuse, before anything is loaded, what is neither the folder of a pipeline nor a hub id."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        check_configs(path, lambda file: path / file)
    elif path.is_file():
        raise ValueError(f"{path} is a single file; name a FluxPipeline directory, which "
                         "diffusers makes of it: FluxPipeline.from_single_file, save_pretrained")
    elif path.exists() or len(path.parts) != 2 or path.parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory, nor another pipeline's; it must "
                         "hold model_index.json, or be a hub id like black-forest-labs/FLUX.1-dev")


def check_configs(path, find):
    """The class of a pipeline, by name. Refuses other classes, and a transformer that cannot be
    trained here. find(name) -> path."""
    def read(file):
        return json.loads(find(file).read_text(encoding="utf-8"))

    index = read("model_index.json")
    name = index.get("_class_name")
    if not index.get("transformer"):
        raise ValueError(f"{path} is a {name}, but must be a pipeline of diffusers that has a "
                         "transformer, such as a FluxPipeline")
    config = read("transformer/config.json")
    channels = config.get("in_channels", 64)
    if name == "FluxPipeline" and (config.get("out_channels") or channels) != channels:
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
    import diffusers
    from huggingface_hub import hf_hub_download
    name = check_configs(path, lambda file: Path(hf_hub_download(str(path), file)))
    return name, Path(getattr(diffusers, name).download(str(path)))


DECIDED = ("prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "latents",
           "generator", "output_type", "return_dict", "num_images_per_prompt",
           "num_videos_per_prompt")             # arguments of __call__ that we give


def parse_call(text):
    """More arguments for a pipeline's __call__: a JSON object -> dict. ValueError for anything
    else, and for what other settings or this project decide."""
    try:
        call = json.loads(text or "{}")
    except ValueError:
        call = None
    if not isinstance(call, dict):
        raise ValueError(f"call is {text}, but must be a JSON object such as " '{"num_frames": 33}')
    for name in call:
        if name in DECIDED:
            raise ValueError(f"call has {name}, but that is decided here, or by another setting")
    return call


def is_number(text):
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def parse_resolution(text):
    """ "720" or "832x640" (width x height) -> (height, width) in pixels."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip())):
        raise ValueError(f"resolution is {text}, but must be a number of pixels, or like 832x640")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(16 <= side <= 8192 and side % 16 == 0 for side in (width, height)):
        raise ValueError(f"resolution is {text}, but its sides must be multiples of 16, up to 8192")
    return height, width


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
    from torch.nn import Linear
    linear = [name for name, part in transformer.named_modules()
              if ".att" in name and isinstance(part, Linear)]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=linear))


def load_lora(pipe, path):
    """Load adapters, in any layout that diffusers knows or in PEFT's own."""
    import torch
    from safetensors.torch import load_file
    file = lora_file(path)
    try:
        state, prefix = load_file(file), "base_model.model."    # PEFT's
        if all(name.startswith(prefix) and "transformer_blocks" in name for name in state):
            settings = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
            for name in ("use_rslora", "use_dora", "alpha_pattern"):
                if settings.get(name):
                    raise ValueError(f"its {name} changes the adapters' strength; save it without")
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
