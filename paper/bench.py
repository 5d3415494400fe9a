"""
What an iteration costs. Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps,
v ~ eps - x_0.

    python -m paper.bench                       # all methods, on the small world
    python -m paper.bench methods --only dpm8,dance --repeats 15
    python -m paper.bench methods --geometry flux --only dance,dpm8 --compile --repeats 1
    python -m paper.bench ladder --geometry flux        # what each step of the fast path brings
    python -m paper.bench ladder --geometry flux --steps 2 --profile    # and what takes the time
    python -m paper.bench memory                # GPU memory that FLUX.1-dev needs

memory is computed without a GPU, from tensors that have shapes but no numbers. The other commands
time iterations of the loops. Settings of train.py may follow them, such as --compile above. The
methods take turns. The columns are medians:

    NFE_old, NFE_theta   latents that the network got, per image: without and with gradients. They
                         are counted at the network.
    TFLOP, TFLOP/s       the transformer's matrix products in an iteration, and these per second of
                         the whole iteration, with decoding and everything else
    share                of the rate of one large matrix product, which is timed in the same run
    GB                   in `ladder`: the peak memory of a GPU
    gradient norm        in `ladder`: of the first iteration, before clipping
    first ratio          in `ladder`: how far a ratio is from 1 before the first update, at most
"""
import argparse, contextlib, dataclasses, gc, io, statistics, sys, tempfile, time
from collections import namedtuple
from unittest import mock
import torch
import rewards, train
from eval import SOLVERS
from paper import attention, baselines
from paper.counts import VAE, memory, memory_of_klein, operations
from run import Run
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

METHODS = {                                                     # name: (label, settings)
    "dance": ("DanceGRPO", "--method dance"),
    "dance16": ("DanceGRPO, 16 steps",                          # as in its own code
                "--method dance --num_rollout_steps 16 --num_train_steps 9"),
    "flow": ("Flow-GRPO", "--method flow"),
    "mix": ("MixGRPO", "--method mix"),
    "flash": ("MixGRPO-Flash*", "--method flash"),
    "branch": ("BranchGRPO", "--method branch"),
    "prune": ("BranchGRPO, pruned", "--method branch --prune 5"),
    "nft": ("DiffusionNFT", "--method nft"),
    "awm": ("AWM", "--method awm"),
    "fdfo": ("FDFO", "--method fdfo"),
    "ddim25": ("Neighbor GRPO, 25 steps",
               "--solver ddim --num_rollout_steps 25 --num_anchors 12 --num_train_steps 4"),
    "dpm16": ("Neighbor GRPO, 16 steps", "--num_rollout_steps 16 --num_train_steps 9"),
    "dpm8": ("Neighbor GRPO, 8 steps", ""),
}
TRAIN, BASELINES = "train.py", "-m paper.baselines"             # what follows `python`
SCRIPTS = {TRAIN: (train.parse_config, train.train),
           BASELINES: (baselines.parse_config, baselines.loop)}
PHASES = ("rollout", "decode", "reward", "update", "optimizer")
BUILT = ("resolution", "lora_rank", "checkpoint_blocks", "compile")     # settings of a model
Setup = namedtuple("Setup", "label cfg model costs scorers run loop")

def script_of(settings):
    """train.py, or paper.baselines if the settings, a text or words, name another method."""
    return BASELINES if "--method" in settings else TRAIN

def parsed(words):
    """The settings of a command line, without a run."""
    with tempfile.TemporaryDirectory() as folder:
        return SCRIPTS[script_of(words)][0]([*words, "--out_dir", folder])

# ------------------------------------------------------------------------------------------------
# Iterations

def now(device):
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

@contextlib.contextmanager
def watched(model, opt):
    """-> the latents that the network gets inside, {with gradients: number}, and the seconds of
    the phases that are not in the log."""
    latents, seconds = {False: 0, True: 0}, dict(decode=0.0, optimizer=0.0)
    velocity = model.velocity

    def counted(x, *more):
        latents[torch.is_grad_enabled()] += len(x)
        return velocity(x, *more)

    def timed(call, phase):
        def timed_call(*args):
            began = now(model.device)
            result = call(*args)
            seconds[phase] += now(model.device) - began
            return result
        return timed_call

    with (mock.patch.object(model, "velocity", counted),
          mock.patch.object(model, "decode", timed(model.decode, "decode")),
          mock.patch.object(opt, "step", timed(opt.step, "optimizer"))):
        yield latents, seconds

def measure(methods, repeats, flags=(), build=train.load, warm=2, profile=False):
    """Time iterations of each method, {name: (label, settings)}, in turn.
    -> {name: dict(Table 3's columns, operations, median seconds, tries)}

    build(cfg) makes a model. Methods with equal models share one. `warm`: iterations of each method
    that are not counted, before those that are. `profile`: after them, make one more for a table of
    what took its time.
    """
    found, tries = {}, {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as folder:
        setups = set_up(methods, flags, build, folder)
        for repeat in range(warm + repeats):
            for name, s in setups.items():
                s.cfg.iterations = repeat + 1                   # so that the loop makes one more
                latents, seconds = one_iteration(s)
                tries[name].append(seconds)
                if repeat == 0:
                    found[name] = columns_of(s, latents)
                print(f"{repeat + 1}/{warm + repeats} {s.label}: {seconds['iteration']:.2f} s",
                      file=sys.stderr, flush=True)
        for name, s in setups.items() if profile else ():
            found[name]["profile"] = busiest(s)
    for name, each in tries.items():
        found[name] |= {key: statistics.median(one[key] for one in each[warm:]) for key in each[0]}
        found[name]["tries"] = each
    return found

def set_up(methods, flags, build, folder):
    """{name: Setup}. The runs are in subfolders of `folder`."""
    setups, models = {}, {}
    for name, (label, own) in methods.items():
        parse, loop = SCRIPTS[script_of(own)]
        cfg = parse(["--lr", "1e-12", *flags, *own.split(), "--out_dir", f"{folder}/{name}",
                     "--eval_every", "0", "--save_every", "0"])
        key = tuple(getattr(cfg, setting) for setting in BUILT)
        if key not in models:
            model = build(cfg)
            models[key] = model, operations_of(model, cfg)
        model, costs = models[key]
        scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, ["a dog"])
        setups[name] = Setup(label, cfg, model, costs, scorers, Run(cfg, model, scorers), loop)
    return setups

def one_iteration(s):
    """One iteration of a loop -> the latents that its network got, {with gradients: number}, and
    the seconds of the iteration and of its phases."""
    with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
          watched(s.model, s.run.opt) as (latents, apart)):
        began = now(s.model.device)
        s.loop(s.cfg, s.model, s.scorers, s.run)
        iteration = now(s.model.device) - began
    log = s.run.lines()[-1]
    if log["skipped"]:
        raise ArithmeticError(f"{s.label}: the gradient is not finite, so nothing was updated")
    if log["flat_groups"]:
        print(f"{s.label}: {log['flat_groups']} groups had equal rewards", file=sys.stderr)
    return latents, dict(iteration=iteration, **apart,
                         rollout=log["seconds_rollout"] - apart["decode"],
                         reward=log["seconds_reward"],
                         update=log["seconds_update"] - apart["optimizer"])

def busiest(s):
    """One more iteration by torch.profiler: the ten kernels, on a CPU the ten operators, that take
    most of its time, as a table."""
    kind = "cuda" if s.model.device.type == "cuda" else "cpu"
    s.cfg.iterations += 1
    activity = getattr(torch.profiler.ProfilerActivity, kind.upper())
    by = "self_device_time_total" if kind == "cuda" else "self_cpu_time_total"
    try:
        with torch.profiler.profile(activities=[activity]) as profiler:
            one_iteration(s)
        return profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=70)
    except RuntimeError as error:               # a container may forbid it; the seconds still count
        return f"torch.profiler failed: {error}"

# ------------------------------------------------------------------------------------------------
# What is counted, and the table

def columns_of(s, latents):
    """The columns of Table 3, the transformer's operations, and what the first iteration logged.
    NFE: latents that the network got, each `nfe` times, per image."""
    cfg, log = s.cfg, s.run.lines()[-1]
    old, theta = (s.model.nfe * n / (cfg.prompts_per_iteration * cfg.group_size)
                  for n in latents.values())
    return dict(solver=SOLVERS[cfg.solver], nfe_old=old, G=cfg.group_size,
                B="adapt" if cfg.method == "branch" else cfg.num_anchors or cfg.group_size,
                K="all" if cfg.method in ("branch", "fdfo") else cfg.num_train_steps,
                nfe_theta=theta, flops=sum(n * s.costs[trained] for trained, n in latents.items()),
                grad_norm=log["grad_norm"], first_ratio=log["first_ratio"])

def operations_of(model, cfg):
    """`operations` of a loaded model for one latent: without gradients, and with."""
    text = model.encode([""])["txt"].shape[1]
    once = operations(model.transformer.config, model.latent_shape[0], text, cfg.lora_rank,
                      cfg.checkpoint_blocks)
    return [model.nfe * count for count in once]

def matmul_rate(device):
    """Floating point operations per second in one large matrix product of the network's dtype."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = now(device)
        a @ b
        seconds.append(now(device) - began)
    return 2 * n**3 / statistics.median(seconds)

RATES = ("TFLOP", "TFLOP/s", "a matrix product's", "share")

def rates(found, rate):
    """As text: the transformer's operations in an iteration, these per second of the iteration, the
    rate of a matrix product, and the share of that rate."""
    flops, seconds = found["flops"], found["iteration"]
    return (f"{flops / 1e12:.3g}", f"{flops / seconds / 1e12:.3g}", f"{rate / 1e12:.3g}",
            f"{flops / seconds / rate:.2f}")

def table(found, rate):
    """The columns that the top of this file explains, as Markdown."""
    head = ["Method", "Solver", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", *PHASES, *RATES]
    rows = [[METHODS[name][0], f["solver"], f"{f['nfe_old']:.4g}", f["G"], f["B"], f["K"],
             f"{f['nfe_theta']:.4g}", *(f"{f[key]:.3f}" for key in ("iteration", *PHASES)),
             *rates(f, rate)] for name, f in found.items()]
    if "dance" in found:
        head += ["of DanceGRPO's s / iter.", "of its rollout and update", "of its TFLOP"]
        for row, f in zip(rows, found.values()):
            for keys in (["iteration"], ["rollout", "update"], ["flops"]):
                own, its = (sum(each[key] for key in keys) for each in (f, found["dance"]))
                row.append(f"{own / its:.3f}")
    return markdown(head, rows)

def line(row):
    return "| " + " | ".join(map(str, row)) + " |"

def markdown(head, rows):
    return "\n".join(map(line, [head, ["---"] * len(head), *rows]))

# ------------------------------------------------------------------------------------------------
# Other sizes than that of the small world

BLOCKS = {"flux": dict(num_layers=19, num_single_layers=38),
          "flux-narrow": dict(num_layers=1, num_single_layers=2, num_attention_heads=2)}
SIZES = {"tiny": "", "flux-narrow": "--prompts_per_iteration 1",
         "flux": "--resolution 720 --lora_rank 64 --checkpoint_blocks -1 --prompts_per_iteration 1"}

def random_flux(cfg, geometry):
    """FLUX.1-dev's transformer and VAE, with random weights and text embeddings. flux-narrow, a
    rehearsal on a CPU, has 1 + 2 blocks of 2 heads, and the small world's VAE."""
    dtype = torch.bfloat16 if "cuda" in cfg.device else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(cfg.device):
        net = FluxTransformer2DModel(guidance_embeds=True, **BLOCKS[geometry])
        vae = {} if geometry == "flux-narrow" else dict(vae=AutoencoderKL(**VAE))
    torch.set_default_dtype(torch.float32)
    pipe = FluxPipeline.from_pretrained(train.PRESETS["tiny"]["model"], **vae,
                                        transformer=net if cfg.lora_rank else net.float())
    model = train.load(dataclasses.replace(cfg, model=pipe))

    def encode_prompt(prompts, *_, **__):
        P = len(prompts)
        return torch.randn(P, 512, 4096, dtype=dtype), torch.randn(P, 768, dtype=dtype), None
    model.pipe.encode_prompt = encode_prompt
    return model

def build(cfg, geometry):
    return train.load(cfg) if geometry == "tiny" else random_flux(cfg, geometry)

# ------------------------------------------------------------------------------------------------
# The ladder

LADDER = [                              # (name, settings of train.py, what is done to the model)
    ("blocks as they are, all recomputed", "--no-compile --checkpoint_blocks -1", None),
    ("compiled", "--compile --checkpoint_blocks -1", None),
    ("blocks as they are, nothing recomputed", "--no-compile --checkpoint_blocks 0", None),
    ("compiled, nothing recomputed", "--compile --checkpoint_blocks 0", None),
    ("compiled, nothing recomputed, rollouts in one CUDA graph",
     "--compile --checkpoint_blocks 0", attention.in_one_graph),
]

def ladder(repeats, geometry, flags, steps, profile=False):
    """Time iterations of Neighbor GRPO with 8 steps, at the steps of the ladder with the numbers
    `steps`, from 1. They follow one another, because only one model may fit."""
    device = torch.device(parsed(flags).device)
    print(markdown(["step", "s / iter.", *PHASES, *RATES, "GB", "gradient norm", "first ratio"],
                   []), flush=True)
    for name, settings, change in (LADDER[number - 1] for number in steps):
        torch.compiler.reset()
        if device.type == "cuda":
            gc.collect()                        # frees the last model, to make room for the next
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def changed(cfg):
            model = build(cfg, geometry)
            return change(model) if change else model

        try:
            found = measure({name: (name, settings)}, repeats, flags, changed, 1, profile)[name]
        except (Exception, SystemExit) as error:    # such as too little memory, or no compiler: go
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)  # on with the others
            print(line([name, "not possible here, see above"]), flush=True)
            continue
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        print(line([name, *(f"{found[key]:.2f}" for key in ("iteration", *PHASES)),
                    *rates(found, matmul_rate(device)), f"{peak / 1e9:.0f}" if peak else "",
                    f"{found['grad_norm']:.2e}", f"{found['first_ratio']:.1e}"]), flush=True)
        if profile:
            print(f"\n{name}\n{found['profile']}", flush=True)

# ------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {
    "methods": "an iteration of each method (the default command)",
    "ladder": "what each step of the fast path brings for Neighbor GRPO with 8 steps",
    "memory": "the GPU memory that FLUX.1-dev and FLUX.2 klein need, computed without a GPU",
}

def some_of(known):
    """For argparse: a list of names, comma-separated, which are all `known`."""
    def parse(text):
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names
    return parse

def parse_args(argv):
    """-> the options of the command, and the settings of train.py."""
    parser = argparse.ArgumentParser(prog="python -m paper.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    each = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
            for name, text in COMMANDS.items()}
    for name in ("methods", "ladder"):
        each[name].epilog = "Settings of train.py may follow, such as --threads 1."
        each[name].add_argument("--repeats", type=int, default=5,
                                help="iterations that are counted (default 5)")
        each[name].add_argument(
            "--geometry", choices=[*SIZES], default="tiny",
            help="tiny: the small world. flux: FLUX.1-dev's size, random weights, 720x720, LoRA "
                 "64, all blocks recomputed, one prompt, unless settings say otherwise. "
                 "flux-narrow: 1 + 2 blocks of 2 heads, 64x64 (default tiny)")
    numbers = {str(number): name for number, (name, *_) in enumerate(LADDER, 1)}
    add = each["ladder"].add_argument
    add("--steps", type=some_of(numbers), default=[*numbers], help="comma-separated numbers of "
        "steps, instead of all: " + "; ".join(map(" ".join, numbers.items())))
    add("--profile", action="store_true", help="after each step a torch.profiler table: the ten "
        "kernels that take most of one more iteration")
    add("--attention", choices=[*attention.KINDS], default="flash",
        help="of paper/attention.py (default flash)")
    add = each["methods"].add_argument
    add("--only", type=some_of(METHODS), default=[*METHODS],
        help="comma-separated: " + ", ".join(METHODS))
    add("--warm", type=int, default=2, help="iterations before those counted (default 2)")
    args, settings = parser.parse_known_args(argv or ["methods"])
    if args.command == "memory" and settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if getattr(args, "repeats", 1) < 1 or getattr(args, "warm", 0) < 0:
        parser.error("--repeats must be at least 1, --warm at least 0")
    if getattr(args, "geometry", "") == "flux" and not torch.cuda.is_available():
        parser.error("--geometry flux needs a GPU")
    return args, settings

def main(argv=None):
    args, settings = parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == "memory":
        print(markdown(*memory()) + "\n")
        return print(markdown(*memory_of_klein()))
    methods = {name: METHODS[name] for name in getattr(args, "only", ["dpm8"])}
    flags = [*SIZES[args.geometry].split(), *settings]
    for _, own in methods.values():
        cfg = parsed([*flags, *own.split()])                    # bad settings end here
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if args.command == "ladder":
        attention.use(args.attention)
        return ladder(args.repeats, args.geometry, flags, map(int, args.steps), args.profile)
    found = measure(methods, args.repeats, flags, lambda cfg: build(cfg, args.geometry), args.warm)
    print(table(found, matmul_rate(torch.device(cfg.device))))

if __name__ == "__main__":
    main()
