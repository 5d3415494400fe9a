"""
What depends on the machine, and not on the method. Import it before transformers, diffusers and
open_clip: it lets torchvision be imported over a CPU build of torch.

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
  the rest      seconds, TensorBoard and Weights & Biases, signals, errors, the end of a process
"""
import atexit, contextlib, datetime, importlib.util, os, signal, sys, threading, time, warnings
from pathlib import Path
import torch
import torch.distributed as dist
if not dist.is_available():
    sys.exit("this torch was built without torch.distributed, which checkpoints need; install the "
             "build of pytorch.org for this machine")
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


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
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", RANK % (torch.cuda.device_count() or 1)))


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


def gather_objects(mine):
    """A small object of every process, as a list in the order of ranks. It is also a barrier."""
    if not dist.is_initialized():
        return [mine]
    every = [None] * WORLD
    dist.all_gather_object(every, mine)
    return every


def merge(lines):
    """One line of the log out of those of all processes: means over groups, the sum of flat groups,
    and the largest of everything else (the slowest clock, the ratio furthest from 1)."""
    def one(key, values):
        if values[0] is None:
            return None
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values).nanmean().item()
        return sum(values) if key == "flat_groups" else max(values)
    return {key: one(key, [line[key] for line in lines]) for key in lines[0]}


def start_watchers(out, project, settings, iteration):
    """A function that sends numbers {name: value} of a step to TensorBoard, where it is installed,
    and to Weights & Biases, if a project is named. Those that fail are left out: watching must not
    end a run."""
    def tensorboard():
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)
        atexit.register(board.close)
        return lambda numbers, step: [board.add_scalar(name, number, step)
                                      for name, number in numbers.items()]

    def wandb():
        import wandb
        return wandb.init(project=project, config=settings, dir=out).log

    found, installed = {}, importlib.util.find_spec("tensorboard")
    for name, start, wanted in ("tensorboard", tensorboard, installed), ("wandb", wandb, project):
        watcher = attempt(name, start) if wanted else None
        if watcher:
            found[name] = watcher

    def send(numbers, step):
        for name, watcher in list(found.items()):
            attempt(name, lambda: watcher(numbers, step=step), lambda: found.pop(name))

    return send


def stopwatch(device):
    """A dict of seconds per phase, and a function that ends a phase (one GPU synchronisation)."""
    seconds, last = {}, [time.perf_counter()]

    def lap(name):
        if device.type == "cuda":
            torch.cuda.synchronize()
        key, now = f"seconds_{name}", time.perf_counter()
        seconds[key], last[0] = seconds.get(key, 0) + now - last[0], now

    return seconds, lap


def share_work(n, work):
    """Divide items 0 to n-1 among the processes. work(my items) -> {name: (items, ...)}; returns
    the same of all n items, in order, to every process. With FSDP all must make the same number of
    forward passes, so each gets as many items, and a few come twice."""
    mine = [(RANK + WORLD * k) % n for k in range(-(-n // WORLD))]
    parts = gather_objects(work(mine))
    return {name: torch.stack([part[name] for part in parts], 1).flatten(0, 1)[:n]
            for name in parts[0]}


def full_tensor(w):
    """A tensor that FSDP divided among the processes, whole again."""
    return w.full_tensor() if isinstance(w, DTensor) else w


def wrap_for_processes(cfg, model):
    """With --fsdp, divide the model among the processes (FSDP2). Else each keeps a copy."""
    if cfg.fsdp:
        mesh = init_device_mesh(model.device.type, (WORLD,))
        compute = torch.bfloat16 if model.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)        # autocast casts them
        for part in (*model.blocks(), model.transformer):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        getattr(model, "check", lambda: None)()                 # pipeline.Pipeline waits for it


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
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model.transformer, options=options)


def state_of(model, opt, ema):
    """What torch.distributed.checkpoint writes and reads, each process its own shards: trained
    weights, AdamW's moments, the average of weights."""
    options = StateDictOptions(ignore_frozen_params=True)
    if not opt.state:                           # torch makes the moments here, by a step with lr 0
        get_state_dict(model.transformer, opt, options=options)
        for moments in opt.state.values():
            moments["step"].zero_()             # which must not count
    weights, moments = get_state_dict(model.transformer, opt, options=options)
    return dict(weights=weights, moments=moments, ema={str(i): w for i, w in enumerate(ema)})


def restore(path, model, opt, ema):
    """Load what `state_of` gave, written by any number of processes."""
    dcp.load(state := state_of(model, opt, ema), checkpoint_id=path)
    set_state_dict(model.transformer, opt, model_state_dict=state["weights"],
                   optim_state_dict=state["moments"],
                   options=StateDictOptions(strict=False))      # frozen weights are not in it


def cause_of(error):
    """The error inside the one that torch.distributed.checkpoint raises."""
    inside = isinstance(error, dcp.CheckpointException)
    return next(iter(error.failures.values()))[0] if inside else error


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
