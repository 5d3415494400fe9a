"""
Several processes, as torchrun starts them: who this one is, how it joins the others, what they
share, and how it ends. With one process almost all of this does nothing.
"""
import atexit, datetime, os, sys, warnings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def init_processes():
    """Join the other processes, if torchrun started several."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)             # a log file shows lines at once
    if WORLD == 1 or dist.is_initialized():
        return
    env, where = os.environ, {}
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    one_node = env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"]
    if one_node and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store lives on when it restarts the processes, and still has the addresses of
        # the dead ones (pytorch issue 135712). So every attempt uses a prefix of its own.
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        prefix = f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        where = dict(store=dist.PrefixStore(prefix, store), rank=RANK, world_size=WORLD)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(hours=2)                      # all wait while one saves
    dist.init_process_group(backend, timeout=patience, **where)


def gather_objects(mine):
    """A small object of every process, as a list in the order of ranks. It is also a barrier."""
    if not dist.is_initialized():
        return [mine]
    dist.all_gather_object(every := [None] * WORLD, mine)
    return every


def merge(lines):
    """One line of the log out of those of all processes: means over groups, the sum of flat groups,
    the slowest clock, the largest ratio. The other entries are equal everywhere."""
    def one(key, values):
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values).nanmean().item()
        return None if values[0] is None else sum(values) if key == "flat_groups" else max(values)
    return {key: one(key, [line[key] for line in lines]) for key in lines[0]}


def full_tensor(w):
    """A tensor that FSDP divided among the processes, whole again."""
    return w.full_tensor() if isinstance(w, DTensor) else w


def wrap_for_processes(cfg, model):
    """Divide the model among the processes (FSDP2), or keep a copy in each (DDP)."""
    if cfg.fsdp:
        mesh = init_device_mesh(model.device.type, (WORLD,))
        compute = torch.bfloat16 if model.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)        # autocast casts them
        for part in (*model.blocks(), model.transformer):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not cfg.gather)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    elif WORLD > 1:
        model.net = DistributedDataParallel(model.transformer)


def state_of(model, opt, ema):
    """What torch.distributed.checkpoint writes and reads, each process its part: the trained
    weights, AdamW's moments, the average of weights."""
    weights, moments = get_state_dict(model.transformer, opt,
                                      options=StateDictOptions(ignore_frozen_params=True))
    return dict(weights=weights, moments=moments, ema={str(i): w for i, w in enumerate(ema)})


def restore(path, model, opt, ema):
    """Load what `state_of` gave, written by any number of processes."""
    dcp.load(state := state_of(model, opt, ema), checkpoint_id=path)
    set_state_dict(model.transformer, opt, model_state_dict=state["weights"],
                   optim_state_dict=state["moments"],
                   options=StateDictOptions(strict=False))      # LoRA's frozen weights are missing


def cause_of(error):
    """The error inside the one that torch.distributed.checkpoint raises."""
    inside = isinstance(error, dcp.CheckpointException)
    return next(iter(error.failures.values()))[0] if inside else error


def exit_process(status):
    """End this process. One of several skips the interpreter's own end: gloo's threads outlive it
    now and then, and abort the process (pytorch issue 190489)."""
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
