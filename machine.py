"""
What a run finds on a machine, and not in the paper: torch and its processes, and the files that
settings name. Import it before transformers, diffusers and open_clip: it lets torchvision be
imported over a CPU build of torch.

  torchvision   open_clip needs it, and its wheel for Linux is built for a CUDA torch. Over a CPU
                torch its library of compiled operators does not load. Then `import torchvision`
                dies with "operator torchvision::nms does not exist", and takes transformers and
                diffusers down with it. Nothing here calls those operators, so it is enough to
                declare their names. Where the library does load (CUDA, ROCm, macOS, two CPU
                builds), it declares them itself; a second declaration would abort the process.
  attention     torch 2.11 takes cuDNN's on an H100. In bf16 its gradients were not finite, or the
                process died of an illegal memory access (paper/LOG.md, 2026-11-27). Without it
                torch takes flash attention, as before 2.11.
  processes     as torchrun or another launcher starts them: rank and world size, joining, sharing,
                averages of gradients, FSDP2. With one process almost all of this does nothing.
  errors        signals, streams that nobody reads, sentences for a user, the end of a process
  files         prompts, folders of models, adapters. What cannot work is refused in one sentence,
                and a model's folder is checked before anything is loaded.

Checkpoints, FSDP2, diffusers and peft take seconds to import, so only the functions that need them
do it.
"""
import atexit, contextlib, datetime, importlib.util, json, logging, math, os, re, signal
import sys, threading, time, warnings
from pathlib import Path
import torch
import torch.distributed as dist
if not dist.is_available():
    sys.exit("this torch was built without torch.distributed, which checkpoints need; install the "
             "build of pytorch.org for this machine")

def declare_operators():
    """See above, torchvision."""
    spec = importlib.util.find_spec("torchvision")              # finds it, and does not import it
    library = spec and next(Path(spec.origin).parent.glob("_C.*"), None)
    try:
        if library:
            torch.ops.load_library(library)                     # as `import torchvision` will do
    except OSError:                                             # it misses CUDA's libraries
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):             # somebody has declared it before us
                torch.library.define(f"torchvision::{name}",
                                     "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

declare_operators()
torch.backends.cuda.enable_cudnn_sdp(False)     # see above, attention
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ["RANK"]) if WORLD > 1 and "RANK" in os.environ else 0     # alone: not for us
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", RANK % (torch.cuda.device_count() or 1)))

# ------------------------------------------------------------------------------------------------
# Processes

def init_processes():
    """Join the other processes, if torchrun or another launcher started several."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed from the start
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            # A log file shows each line at once; a terminal without UTF-8 shows "?" for an arrow.
            stream.reconfigure(line_buffering=True, errors="replace")
            survive_readers(stream, name)
    if WORLD == 1 or dist.is_initialized():
        return
    env, where = os.environ, {}
    one_node = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if one_node and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store lives on when it restarts the processes, and still has the addresses of
        # the dead ones (pytorch issue 135712). So every attempt uses a prefix of its own.
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        prefix = f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        where = dict(store=dist.PrefixStore(prefix, store), rank=RANK, world_size=WORLD)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = datetime.timedelta(hours=2)                      # the others wait while one saves
    dist.init_process_group(backend, timeout=patience, **where)

def gather_objects(mine):
    """A small object of every process, as a list in the order of ranks. It is also a barrier."""
    if not dist.is_initialized():
        return [mine]
    every = [None] * WORLD
    dist.all_gather_object(every, mine)
    return every

def share_work(n, work):
    """Divide items 0 to n-1 among the processes. work(my items) -> {name: (items, ...)}; returns
    the same of all n items, in order, to every process. With FSDP all must make the same number of
    forward passes, so each gets as many items, and a few come twice."""
    mine = [(RANK + WORLD * k) % n for k in range(-(-n // WORLD))]
    parts = gather_objects(work(mine))
    return {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1)[:n]
            for name in parts[0]}

def evenly_spaced(n, most):
    """The indices of at most `most` of n items, evenly spaced. This rule also chooses the pictures
    that we show, so nobody can pick the good ones."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]

def stopwatch(device):
    """A dict of seconds per phase, and a function that ends a phase (one GPU synchronisation)."""
    seconds, last = {}, [time.perf_counter()]

    def lap(name):
        if device.type == "cuda":
            torch.cuda.synchronize()
        key, now = f"seconds_{name}", time.perf_counter()
        seconds[key], last[0] = seconds.get(key, 0) + now - last[0], now

    return seconds, lap

def wrap_for_processes(cfg, model):
    """With --fsdp, divide the model among the processes (FSDP2). Else each keeps a copy."""
    if cfg.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = init_device_mesh(model.device.type, (WORLD,))
        compute = torch.bfloat16 if model.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)        # autocast casts them
        for part in (*model.blocks(), model.transformer):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        if hasattr(model, "check"):             # pipeline.Pipeline waits for it
            model.check()

def average_gradients(cfg, model):
    """The mean of the gradients over all processes, once before an update. DDP could not: it wants
    to be called in place of the network, and a pipeline calls the network itself, twice where there
    is guidance. FSDP2 has averaged them, in each backward pass: a whole gradient may not fit."""
    if WORLD > 1 and not cfg.fsdp:
        gradients = [w.grad for w in model.trained() if w.grad is not None]     # the same in all
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, WORLD)

def whole_weights(model):
    """{name: tensor} of the transformer that FSDP divided, whole, on the CPU of process 0."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model.transformer, options=options)

def exchange_state(path, model, opt, ema, load=False):
    """Write trained weights, AdamW's moments and the average of weights, each process its own
    shards. With load=True read them, whatever number of processes wrote them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict,
                                                         set_state_dict)
    options, net = StateDictOptions(ignore_frozen_params=True), model.transformer
    if not opt.state:                           # torch makes the moments here, by a step with lr 0
        get_state_dict(net, opt, options=options)
        for moments in opt.state.values():
            moments["step"].zero_()             # which must not count
    weights, moments = get_state_dict(net, opt, options=options)
    state = dict(weights=weights, moments=moments, ema={str(i): w for i, w in enumerate(ema)})
    try:
        (dcp.load if load else dcp.save)(state, checkpoint_id=path)
    except dcp.CheckpointException as error:    # which is no Exception; the error is inside
        raise next(iter(error.failures.values()))[0] from error
    if load:
        set_state_dict(net, opt, model_state_dict=state["weights"],
                       optim_state_dict=state["moments"],
                       options=StateDictOptions(strict=False))          # without frozen weights

# ------------------------------------------------------------------------------------------------
# Errors

def one_line(error):
    """The message of an exception, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

def attempt(what, work, otherwise=lambda: None):
    """work(), which only watches or draws. Its failure is said, after otherwise(), and does not end
    the run."""
    try:
        return work()
    except Exception as error:
        otherwise()
        print(f"{what} is left out: {one_line(error)}", file=sys.stderr)

def survive_readers(stream, called):
    """Let a stream go silent when it cannot be written to any more: the terminal was closed, the
    disk is full, or the program behind a pipe has ended, as in `python train.py | head`."""
    def silence():
        stream.write = stream.flush = lambda *_: None
        with contextlib.suppress(OSError, ValueError):          # what is still in its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    for name in {"write", "flush"} - vars(stream).keys():
        real = getattr(stream, name)
        setattr(stream, name, lambda *text, real=real: attempt(
            called, lambda: stream.closed or real(*text), otherwise=silence))

@contextlib.contextmanager
def stopping(stop):
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) calls `stop`; a second
    Ctrl-C ends the process at once."""
    def handle(sign, _):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    main = threading.current_thread() is threading.main_thread()        # no other gets signals
    signs = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
             if main and hasattr(signal, name)]                 # Windows has no SIGHUP
    previous = {sign: signal.signal(sign, handle) for sign in signs
                if signal.getsignal(sign) != signal.SIG_IGN}    # nohup ignores it
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)

def refuse(parser, check):
    """check(), but what it refuses on any process ends all of them, with one sentence and exit code
    2. -> what it returns"""
    found, refused = None, None
    try:
        found = check()
    except (ValueError, OSError) as error:                      # OSError: a name that is too long
        refused = str(error)
    for sentence in filter(None, gather_objects(refused)):
        if RANK == 0:
            parser.error(sentence)
        sys.exit(2)
    return found

def explain_errors(work, *expected):
    """Call work(). Errors that a user can do something about, and those of the kinds `expected`,
    become one line and exit status 1."""
    try:
        return work()
    except KeyboardInterrupt:
        said = "stopped at once"
    except torch.OutOfMemoryError as error:
        said = ("out of memory. These take less of it, the cheapest first: --text_encoder_device "
                "offload, --checkpoint_blocks -1, --batch 6 or less, --fsdp on more GPUs, "
                f"--lora_rank 64, a smaller --resolution. {error}")
    except torch._dynamo.exc.TorchDynamoException as error:
        said = f"the transformer could not be compiled; --no-compile runs without. {error}"
    except (*expected, ArithmeticError, OSError) as error:
        said = str(error)
    print(f"{Path(sys.argv[0]).name}: {' '.join(said.split())[:600]}", file=sys.stderr)
    return 1

def exit_process(status):
    """End this process. With several, skip the interpreter's own shutdown: gloo's threads outlive
    it now and then, and abort the process (pytorch issue 190489)."""
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)

# ------------------------------------------------------------------------------------------------
# Files of prompts

HPDV2 = {       # name: (its place, what it contains, how to download it)
    "hpdv2_test": ("hpdv2/benchmark",
                   "the 3,200 prompts of anime, concept-art, paintings and photo.json",
                   'zhwang/HPDv2 --include "benchmark/*.json"'),
    "hpdv2_train": ("hpdv2/train.json", "the 103,700 training prompts", "ymhao/HPDv2 train.json"),
}
INVISIBLE = ("".join(filter(str.isspace, map(chr, range(0x3001))))      # spaces; zero-width letters
             + "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff")

def read_prompts(source):
    """The prompts of a file or folder -> a list of strings. It takes

    a text file       one prompt per line, which may have commas
    JSON, JSON Lines  strings, or objects with a "prompt", as in HPDv2 and GenEval
    a folder          its .json files, in the order of their names
    hpdv2_train, hpdv2_test     the published prompts of HPDv2, in the places that HPDV2 names

    A prompt that occurs several times in a file counts once (HPDv2's train.json has each several
    times), and blank lines do not count. Spaces, zero-width letters and a byte order mark at the
    ends of a prompt are removed. ValueError, in one sentence, for a file that is missing, empty,
    not UTF-8, or a table, whose lines are not prompts.
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
            each = parse_prompts(file.read_text(encoding="utf-8-sig"), file.suffix.lower())
        except (OSError, ValueError, RecursionError) as error:
            said = getattr(error, "strerror", None) or one_line(error)
            raise ValueError(f"{file} is not a prompt file, UTF-8 text with one prompt a line, or "
                             f"JSON: {said}") from None
        found += dict.fromkeys(prompt.strip(INVISIBLE) for prompt in each)
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts

def parse_prompts(text, suffix):
    """The prompts of a file's text: JSON, or one per line."""
    is_json = suffix in (".json", ".jsonl", ".ndjson")
    try:
        if is_json or text.lstrip().startswith(("{", "[")):
            return from_json(text)
    except json.JSONDecodeError:
        if is_json:
            raise
    lines = list(filter(None, (line.strip(INVISIBLE) for line in text.split("\n"))))
    names = [name.strip(INVISIBLE + '"') for name in re.split("[,;\t]", "".join(lines[:1]).lower())]
    if suffix in (".csv", ".tsv") or "\t" in "".join(lines) or (
            len(names) > 1 and {"prompt", "prompts"}.intersection(names)):
        raise ValueError("it looks like a table; write its prompts into a text file, one a line")
    return lines

def from_json(text):
    """The prompts of a JSON list, or of JSON Lines: one value per line."""
    try:
        items = json.loads(text)
        items = items if isinstance(items, list) else [items]
    except ValueError:
        items = [json.loads(line) for line in text.split("\n") if line.strip(INVISIBLE)]
    found = [next((value for key, value in item.items() if key.lower() == "prompt"), None)
             if isinstance(item, dict) else item for item in items]
    if not all(isinstance(prompt, str) for prompt in found):
        raise ValueError("it is JSON, but an entry has no prompt")
    return found

# ------------------------------------------------------------------------------------------------
# Folders of models

DECIDED = ("prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "latents",
           "generator", "output_type", "return_dict", "num_images_per_prompt",
           "num_videos_per_prompt")             # arguments of a pipeline's __call__ that we give
def parse_call(text):
    """More arguments for a pipeline's __call__: a JSON object -> dict. ValueError for anything
    else, and for what other settings or this project decide."""
    try:
        call = json.loads(text or "{}")
    except ValueError:
        call = None
    if not isinstance(call, dict):
        raise ValueError(f"call is {text}, but must be a JSON object such as " '{"num_frames": 33}')
    for name in call.keys() & DECIDED:
        raise ValueError(f"call has {name}, but that is decided here, or by another setting")
    return call

def parse_resolution(text):
    """ "720" or "832x640" (width x height) -> (height, width) in pixels."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip())):
        raise ValueError(f"resolution is {text}, but must be a number of pixels, or like 832x640")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(16 <= side <= 8192 and side % 16 == 0 for side in (width, height)):
        raise ValueError(f"resolution is {text}, but its sides must be multiples of 16, up to 8192")
    return height, width

def shared_rules(c):
    """[(holds, the sentence if it does not)] for what train.py and eval.py check alike."""
    return [
        (c.guidance == "" or is_number(c.guidance),
         f"guidance is {c.guidance}, but must be a number, or empty"),
        (c.device == "cpu" or c.device.startswith("cuda") and torch.cuda.is_available(),
         f"device is {c.device}, but must be cpu, or cuda where there is one")]

def is_number(text):
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

VOCABULARIES = ("vocab.json merges.txt", "tokenizer.json", "vocab.txt", "spiece.model",
                "tokenizer.model", "sentencepiece.bpe.model")           # one of them is enough

def check_model(path):
    """Refuse, before anything is loaded, what is neither the folder of a pipeline nor a hub id."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        check_configs(path)
        needed = []
        for name, entry in check_file(path / "model_index.json").items():
            if isinstance(entry, list) and entry[-1]:           # a part, and not one that is null
                needed += needed_files(path / name, str(entry[-1]))
        for file in dict.fromkeys([*needed, *sorted(path.glob("*/*.*"))]):
            check_file(file)
    elif path.is_file():
        raise ValueError(f"{path} is a single file; name a FluxPipeline directory, which "
                         "diffusers makes of it: FluxPipeline.from_single_file, save_pretrained")
    elif path.exists() or len(path.parts) != 2 or path.parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory, nor another pipeline's; it must "
                         "hold model_index.json, or be a hub id like black-forest-labs/FLUX.1-dev")

def needed_files(folder, kind):
    """The files without which a part of a pipeline, of the class `kind`, cannot be loaded."""
    if "Scheduler" in kind:
        return [folder / "scheduler_config.json"]
    if "Tokenizer" in kind:
        lacking = [[folder / file for file in files.split() if not (folder / file).is_file()]
                   for files in VOCABULARIES if not kind.startswith("ByT5")]
        return [folder / "tokenizer_config.json", *min(lacking, key=len, default=[])]
    if re.search("Processor|Extractor", kind):
        return []
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    indexes = [*folder.glob("*.index.json")]
    shards = [file.name for file in weights if "-of-" in file.name]
    if shards and not indexes:
        indexes = [folder / (re.sub(r"-\d+-of-\d+", "", shards[0]) + ".index.json")]
    for index in indexes:
        weights += [folder / file for file in check_file(index)["weight_map"].values()]
    return [folder / "config.json", *(weights or [folder / "model.safetensors"])]

def check_configs(path):
    """The class of a pipeline, by name. Refuses other classes, and a transformer that cannot be
    trained here."""
    index = check_file(path / "model_index.json")
    name = index.get("_class_name")
    if not index.get("transformer"):
        raise ValueError(f"{path} is a {name}, but must be a pipeline of diffusers that has a "
                         "transformer, such as a FluxPipeline")
    config = check_file(path / "transformer/config.json")
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
    """ValueError, with the file's name, for one that a model needs and that is missing, cut off, or
    a pointer of git-lfs. -> what it says, if it is JSON."""
    if file.suffix not in (".json", ".safetensors", ".txt", ".model"):
        return {}
    try:
        with open(file, "rb") as opened:
            head = opened.read(40)
        if head.startswith(b"version https://git-lfs") or not head:
            raise ValueError("it is empty, or a pointer of git-lfs, which `git lfs pull` replaces")
        if file.suffix == ".json":
            return json.loads(file.read_text(encoding="utf-8"))
        if file.suffix == ".safetensors":
            from safetensors import safe_open
            safe_open(file, "np")
    except Exception as error:
        said = getattr(error, "strerror", None) or error
        raise ValueError(f"{file} is missing or not whole: {said}") from None

def find_pipeline(path):
    """The class of a pipeline, by name, and its folder. A hub id is downloaded, after a look at its
    configuration."""
    if Path(path).is_dir():
        return check_configs(Path(path)), Path(path)
    import diffusers
    from huggingface_hub import snapshot_download
    name = check_configs(Path(snapshot_download(str(path), allow_patterns=[
        "model_index.json", "transformer/config.json"])))
    if not hasattr(diffusers, str(name)):
        raise ValueError(f"{path} is a {name}, which this version of diffusers does not have")
    return name, Path(getattr(diffusers, name).download(str(path)))

def load_pipeline(name, folder, dtype):
    """The pipeline of this class, with a ValueError for whatever is missing or does not fit. What
    diffusers and transformers only warn of is in its sentence."""
    import diffusers, transformers
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()            # train.py and eval.py show theirs
    # diffusers warns of every prompt that is cut. `cut` counts them once.
    logging.getLogger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)
    said, heard = [], logging.Handler(logging.WARNING)
    heard.emit = lambda record: said.append(record.getMessage())
    loggers = {logging.getLogger(library): logging.getLogger(library).level
               for library in ("diffusers", "transformers")}
    silenced = logging.root.manager.disable     # an own reward, say, or DIFFUSERS_VERBOSITY=error
    logging.disable(logging.NOTSET)             # would leave us deaf
    for logger in loggers:
        logger.addHandler(heard)
        logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))
    try:
        pipe = getattr(diffusers, name).from_pretrained(folder, dtype=dtype,
                                                        variant=find_variant(folder))
        if any("newly initialized" in words for words in said):
            raise ValueError("weights are missing")
        for part, tokenizer in pipe.components.items():         # one without a vocabulary, say
            if "tokenizer" in part and len({str(tokenizer(text).input_ids) for text in "ab"}) < 2:
                raise ValueError(f"its {part} makes the same of all prompts")
        return pipe
    except Exception as error:
        said = re.sub(r"\x1b\[\d*m", "", " ".join([str(error), *said]))
        raise ValueError(f"{folder} could not be loaded: {' '.join(said.split())}") from error
    finally:
        logging.disable(silenced)
        for logger, level in loggers.items():
            logger.removeHandler(heard)
            logger.setLevel(level)

def find_variant(folder):
    """The variant of the weights, such as fp16, where a component has no others; or None."""
    found = {}                                  # {folder: its variants}
    for file in sorted(Path(folder).glob("*/*.safetensors")):
        name = re.sub(r"-\d+-of-\d+", "", file.stem)
        found.setdefault(file.parent, []).append(name.partition(".")[2])
    return next((some[0] for some in found.values() if "" not in some), None)

# ------------------------------------------------------------------------------------------------
# Adapters

def is_lora(path):
    """Whether a path names adapters: a .safetensors file, or a folder with one that diffusers or
    PEFT wrote. -> the file, or None"""
    path = Path(path)
    found = [path, path / "pytorch_lora_weights.safetensors", path / "adapter_model.safetensors"]
    return next((file for file in found if file.is_file() and file.suffix == ".safetensors"), None)

def load_lora(pipe, path):
    """Load adapters, in any layout that diffusers knows or in PEFT's own. ValueError for a file
    with anything else: it would act here and be missing from what is saved, or be left out here."""
    from peft import get_peft_model_state_dict
    file = is_lora(path)
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
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
        state = {name: opened.get_tensor(name).float() for name in opened.keys()}
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    is_up, strange = re.compile(r".*(lora_B|[._]up)\.weight").fullmatch, []
    for alpha in [name for name in state if name.endswith(".alpha")]:
        ups = [up for up in state if is_up(up) and up.startswith(alpha.removesuffix("alpha"))]
        for up in ups:
            state[up] *= float(state[alpha]) / state[up].shape[1]
        if ups:
            del state[alpha]
            strange = ["alphas in two places"] if "lora_alpha" in settings else []
    matrix = re.compile(r"(?!text_|lora_te|te\d?[._]|clip|t5)(?=.*lora).*[._](lora_[AB]|down|up)"
                        r"\.weight").fullmatch
    strange += sorted(name for name, w in state.items()
                      if not matrix(name) or not w.isfinite().all())
    layers = {name for name, _ in pipe.transformer.named_modules()}
    ours = {name.removeprefix("base_model.model."): w for name, w in state.items()}
    is_pefts = layers.issuperset(name.rpartition(".lora_")[0] for name in ours)
    if is_pefts and ours.keys() != state.keys():
        settings = check_file(file.parent / "adapter_config.json")
    start = settings.get("init_lora_weights")   # pissa, say, also moves the base's weights
    strange += [f"init_lora_weights {start}"] * (
        isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"))
    if strange or not state:
        raise ValueError(f"it has {', '.join(strange[:3]) or 'no tensors'}, and must have nothing "
                         "but finite LoRA matrices of the transformer, to be saved as a whole")
    if not is_pefts:
        ours = {name.removeprefix("transformer."): w.clone()            # three layers may share it
                for name, w in pipe.lora_state_dict(dict(state)).items()}
        size = lambda some: sum(w.double().abs().sum() for name, w in some.items() if is_up(name))
        if abs(size(ours) - size(state)) > 1e-6 * size(state):
            raise ValueError("diffusers leaves some of its matrices out")
    for name in filter(is_up, ours):
        layer, r = name.removesuffix(".lora_B.weight"), ours[name].shape[1]
        patterns = settings.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, layer), settings.get("lora_alpha", r))
        ours[name] = ours[name] * (alpha / (r**0.5 if settings.get("use_rslora") else r))
    return ours
