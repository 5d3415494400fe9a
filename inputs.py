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
import contextlib, csv, io, json, logging, math, re
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
        check_parts(path)
    elif path.is_file():
        raise ValueError(f"{path} is a single file; name a FluxPipeline directory, which "
                         "diffusers makes of it: FluxPipeline.from_single_file, save_pretrained")
    elif path.exists() or len(path.parts) != 2 or path.parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory, nor another pipeline's; it must "
                         "hold model_index.json, or be a hub id like black-forest-labs/FLUX.1-dev")


def check_configs(path, find):
    """The class of a pipeline, by name. Refuses other classes, and a transformer that cannot be
    trained here. find(name) -> path."""
    index = check_file(find("model_index.json"))
    name = index.get("_class_name")
    if not index.get("transformer"):
        raise ValueError(f"{path} is a {name}, but must be a pipeline of diffusers that has a "
                         "transformer, such as a FluxPipeline")
    config = check_file(find("transformer/config.json"))
    channels = config.get("in_channels", 64)
    if name == "FluxPipeline" and (config.get("out_channels") or channels) != channels:
        raise ValueError(f"the transformer of {path} takes {channels} channels and gives "
                         f"{config['out_channels']}; Fill, Depth and Canny models need more inputs "
                         "than a prompt, and cannot be aligned here")
    if config.get("quantization_config"):
        raise ValueError(f"the transformer of {path} is quantized; name the original weights, and "
                         "train adapters (--lora_rank 64) if memory is scarce")
    return name


def check_file(file):
    """ValueError, with the file's name, if it is missing, cut off, or a pointer of git-lfs. -> what
    it says, if it is JSON."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(40)
        if head.startswith(b"version https://git-lfs") or not head:
            raise ValueError("it is empty, or a pointer of git-lfs, which `git lfs pull` replaces")
        if file.suffix == ".json":
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".safetensors":
            from safetensors import safe_open
            safe_open(file, "np")
    except Exception as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{file} is missing or not whole: {said}") from None


VOCABULARIES = (["vocab.json", "merges.txt"], ["tokenizer.json"], ["vocab.txt"], ["spiece.model"],
                ["tokenizer.model"], ["sentencepiece.bpe.model"])       # one of them is enough
WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.(\w+))?"
                     r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?")


def check_parts(path):
    """Check the files of every component in model_index.json. -> the variant of the weights, such
    as fp16, where a component has no others; or None."""
    found = {}                                  # {folder: {variant: files of weights}}
    for name, entry in check_file(path / "model_index.json").items():
        folder, kind = path / name, entry[-1] if isinstance(entry, list) else None
        if not kind:                            # a setting of the pipeline; a part that it lacks
            continue
        needed = [file for kind in ("json", "txt", "model") for file in folder.glob(f"*.{kind}")]
        if "Scheduler" in kind:
            needed.append(folder / "scheduler_config.json")
        elif "Tokenizer" in kind:
            lacking = [[folder / file for file in files if not (folder / file).is_file()]
                       for files in VOCABULARIES if not kind.startswith("ByT5")]
            needed += [folder / "tokenizer_config.json", *min(lacking, key=len, default=[])]
        elif not re.search("Processor|Extractor", kind):
            needed.append(folder / "config.json")
            found[folder] = {}
            for file in sorted(folder.glob("*")):
                if match := WEIGHTS.fullmatch(file.name):
                    found[folder].setdefault(match[1] or match[2], []).append(file)
        for file in needed:
            check_file(file)
    special = [set(weights) for weights in found.values() if weights and None not in weights]
    variant = min(set.intersection(*special), default=None) if special else None
    for folder, weights in found.items():
        files = weights.get(None) or weights.get(variant) or [folder / "model.safetensors"]
        files = [file for file in files if "safetensors" in file.name] or files
        if "-of-" in files[0].name and files[-1].suffix != ".json":     # shards need an index
            files.append(folder / (re.sub(r"-\d+-of-\d+", "", files[0].name) + ".index.json"))
        if files[-1].suffix == ".json":
            files = [folder / name for name in {*check_file(files[-1])["weight_map"].values()}]
        for file in files:
            check_file(file)
    return variant


def load_pipeline(kind, folder, dtype):
    """kind.from_pretrained, with a ValueError for whatever is missing or does not fit."""
    variant, said, heard = check_parts(folder), [], logging.Handler(logging.WARNING)
    heard.emit = lambda record: said.append(record.getMessage())
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(heard)
    try:
        pipe = kind.from_pretrained(folder, dtype=dtype, variant=variant)
        if any("newly initialized" in words for words in said):         # only a warning
            raise ValueError("weights are missing")
        for name, part in pipe.components.items():
            if "tokenizer" in name and len({str(part(text).input_ids) for text in "ab"}) < 2:
                raise ValueError(f"its {name} makes the same of all prompts")
        return pipe
    except Exception as error:
        said = " ".join(re.sub(r"\x1b\[\d*m", "", " ".join([str(error), *said])).split())
        raise ValueError(f"{folder} could not be loaded: {said}") from error
    finally:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(heard)


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


# What a file of adapters may hold, beside alphas; and what the settings in its header or beside it
# may say: what `one_form` applies, and what does not change what the adapters do.
MATRIX = re.compile(r"(?!text_|lora_te|te\d?[._]|clip|t5)(?=.*lora)"
                    r".*[._](lora_[AB]|down|up)\.weight")
SETTINGS = ("r lora_alpha rank_pattern alpha_pattern use_rslora target_modules exclude_modules "
            "layers_to_transform layers_pattern lora_dropout inference_mode task_type auto_mapping "
            "base_model_name_or_path revision peft_version").split()
STARTS = [("init_lora_weights", start) for start in ("gaussian", "orthogonal", "eva")]  # not pissa


def load_lora(pipe, path):
    """Load adapters, in any layout that diffusers knows or in PEFT's own. ValueError for a file
    with anything else: it would act here and be missing from what is saved, or be left out here."""
    from peft import get_peft_model_state_dict
    file = lora_file(path)
    try:
        state = one_form(pipe, file)
        pipe.transformer.load_lora_adapter(dict(state), prefix=None, adapter_name="default",
                                           low_cpu_mem_usage=True)      # keeps float32
        if odd := sorted(state.keys() ^ get_peft_model_state_dict(pipe.transformer).keys()):
            raise ValueError(f"{odd[0]} fits no layer, or has no partner")
    except Exception as error:
        raise ValueError(f"{file} could not be loaded as adapters: {error}") from error


def one_form(pipe, file):
    """Adapters -> {"<layer>.lora_A.weight" or "<layer>.lora_B.weight": float32}, with alpha = rank:
    the strength is in the matrices. So what is saved acts alike in every program."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
        state = {re.sub(r"\.default\w*\.weight$", ".weight", name): opened.get_tensor(name).float()
                 for name in opened.keys()}
    is_up, alphas = re.compile(r".*(lora_B|[._]up)\.weight").fullmatch, []
    for name in [name for name in state if name.endswith(".alpha")]:
        for up in [up for up in state if is_up(up) and up.startswith(name.removesuffix("alpha"))]:
            state[up] *= float(state[name]) / state[up].shape[1]
            alphas.append(name)
    state = {name: w for name, w in state.items() if name not in alphas}
    strange = sorted(name for name, w in state.items()
                     if not MATRIX.fullmatch(name) or not w.isfinite().all())
    layers = {name for name, _ in pipe.transformer.named_modules()}
    bare = {re.sub(r"^(base_model\.model|transformer)\.", "", name): w for name, w in state.items()}
    for old, new in (("down", "lora_A"), ("up", "lora_B")):
        bare = {re.sub(rf"lora[._](linear_layer\.)?{old}\.weight$", f"{new}.weight", name): w
                for name, w in bare.items()}
    is_bare = all(name.rpartition(".lora_")[0] in layers for name in bare)
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    if is_bare and any(name.startswith("base_model.") for name in state):       # PEFT's own
        settings = check_file(file.parent / "adapter_config.json")
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    usual = LoraConfig().to_dict()
    strange += [name for name, value in settings.items()
                if value and value != usual.get(name) and name not in SETTINGS
                and (name, value) not in STARTS]
    strange += ["alphas in two places"] if alphas and "lora_alpha" in settings else []
    if strange or not state:
        raise ValueError(f"it has {', '.join(strange[:3]) or 'no tensors'}, and must have nothing "
                         "but finite LoRA matrices of the transformer, to be saved as a whole")
    converted = bare
    if not is_bare:
        converted = {name.removeprefix("transformer."): w.clone()       # three layers may share it
                     for name, w in pipe.lora_state_dict(dict(state)).items()}
        size = lambda some: sum(w.double().abs().sum() for name, w in some.items() if is_up(name))
        if abs(size(converted) - size(state)) > 1e-6 * size(state):
            raise ValueError("diffusers leaves some of its matrices out")
    for name in filter(is_up, converted):
        layer, r = name.removesuffix(".lora_B.weight"), converted[name].shape[1]
        patterns = settings.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, layer), settings.get("lora_alpha", r))
        converted[name] = converted[name] * (alpha / (r**0.5 if settings.get("use_rslora") else r))
    return converted
