"""
What an iteration costs, and how much of it is not spent in its networks. Time t runs from 1 (noise)
to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python -m paper.bench                       # all methods, on the small world
    python -m paper.bench methods --only dpm8,dance --repeats 15
    python -m paper.bench methods --geometry flux --only dance,dpm8 --compile --no-bare --repeats 1
    python -m paper.bench ladder --geometry flux        # what each step of the fast path brings
    python -m paper.bench ladder --geometry flux --steps 2 --profile    # and what takes the time
    python -m paper.bench memory                # GPU memory that FLUX.1-dev needs

memory is computed without a GPU, from tensors that have shapes but no numbers. For the other
commands, settings of train.py may follow, such as --compile above.

`methods` times iterations of the loops. After each it times bare calls: the same calls of the same
networks, in the same batches, without the loop. The methods take turns. Its columns are medians:

    NFE_old, NFE_theta   latents that the network got, per image: without and with gradients. They
                         are counted at the network.
    ratio                iteration / bare calls, pair by pair. The speed of the machine cancels. But
                         if other programs come and go, a single pair says little: use more
                         --repeats, and --threads 1.
    TFLOP, TFLOP/s       the transformer's matrix products in an iteration, and these per second of
                         the whole iteration, with decoding and everything else
    share                of the rate of one large matrix product, which is timed in the same run
    GB                   the peak memory of the bare calls, on a CPU without the weights; in
                         `ladder` that of the iterations
    gradient norm        in `ladder`: of the first iteration, before clipping
    first ratio          in `ladder`: how far a ratio is from 1 before the first update, at most
"""
import argparse, contextlib, dataclasses, gc, io, json, statistics, sys, tempfile, time
from collections import namedtuple
from pathlib import Path
import torch
import rewards, train
from eval import SOLVERS
from machine import read_prompts
from paper import attention, baselines, float8
from paper.counts import VAE, Live, memory, memory_of_klein, operations
from run import Run
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

TRAIN, BASELINES = "train.py", "-m paper.baselines"             # what follows `python`
METHODS = {                                                     # name: (label, script, settings)
    "dance": ("DanceGRPO", BASELINES, "--method dance"),
    "dance16": ("DanceGRPO, 16 steps", BASELINES,
                "--method dance --num_rollout_steps 16 --num_train_steps 9"),   # as in its own code
    "flow": ("Flow-GRPO", BASELINES, "--method flow"),
    "mix": ("MixGRPO", BASELINES, "--method mix"),
    "flash": ("MixGRPO-Flash*", BASELINES, "--method flash"),
    "branch": ("BranchGRPO", BASELINES, "--method branch"),
    "prune": ("BranchGRPO, pruned", BASELINES, "--method branch --prune 5"),
    "nft": ("DiffusionNFT", BASELINES, "--method nft"),
    "awm": ("AWM", BASELINES, "--method awm"),
    "fdfo": ("FDFO", BASELINES, "--method fdfo"),
    "ddim25": ("Neighbor GRPO, 25 steps", TRAIN,
               "--solver ddim --num_rollout_steps 25 --num_anchors 12 --num_train_steps 4"),
    "dpm16": ("Neighbor GRPO, 16 steps", TRAIN, "--num_rollout_steps 16 --num_train_steps 9"),
    "dpm8": ("Neighbor GRPO, 8 steps", TRAIN, ""),
}
SCRIPTS = {TRAIN: (train.parse_config, train.train),
           BASELINES: (baselines.parse_config, baselines.loop)}
PHASES = ("rollout", "decode", "reward", "update", "optimizer")
BUILT = ("resolution", "lora_rank", "checkpoint_blocks", "compile")     # settings of a model
Setup = namedtuple("Setup", "label cfg model costs scorers run loop prompts")

# ------------------------------------------------------------------------------------------------
# Iterations, and their network calls without the loop

def now(device):
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

@contextlib.contextmanager
def recorded(model, scorers, opt):
    """Records a loop's network calls, [(name, size, with gradients)], and the seconds of the phases
    that are not in the log."""
    calls, seconds, plain = [], dict(decode=0.0, optimizer=0.0), dict(scorers)

    def recording(call, what, size, phase=""):
        def record(*args, **more):
            calls.append((what, size(*args), torch.is_grad_enabled()))
            began = now(model.device) if phase else 0
            result = call(*args, **more)
            if phase:
                seconds[phase] += now(model.device) - began
            return result
        return record

    def latents_and_prompts(x, t, cond):
        return len(x), len(cond["vec"])

    model.encode = recording(model.encode, "encode", len)
    model.velocity = recording(model.velocity, "velocity", latents_and_prompts)
    model.decode = recording(model.decode, "decode", len, "decode")
    opt.step = recording(opt.step, "step", lambda: None, "optimizer")
    for name, scorer in plain.items():
        scorers[name] = recording(scorer, name, lambda images, prompts: len(images))
    try:
        yield calls, seconds
    finally:
        scorers.update(plain)
        del model.encode, model.velocity, model.decode, opt.step

def replay(model, scorers, calls, prompts):
    """Make the same calls, with the same sizes and in the same order, without the loop."""
    most = max(size[0] for what, size, _ in calls if what == "velocity")
    latents = torch.randn(most, *model.latent_shape, device=model.device)
    for what, size, trained in calls:
        with torch.set_grad_enabled(trained):
            if what == "encode":
                cond = model.encode(prompts)
            elif what == "velocity":
                M, P = size
                v = model.velocity(latents[:M], 0.5, {key: of[:P] for key, of in cond.items()})
                if trained:
                    v.mean().backward()
            elif what == "decode":
                images = model.decode(latents[:size])
            elif what == "step":
                model.transformer.zero_grad()
            else:
                G = size // len(prompts)
                scorers[what](images, [prompt for prompt in prompts for _ in range(G)])

def measure(methods, repeats, flags=(), build=train.load, bare=True, warm=2, changes={},
            profile=False):
    """Time iterations of each method, {name: (label, script, settings)}, and their bare calls, in
    turn. -> {name: dict(Table 3's columns, operations, median seconds, ratio, tries)}

    build(cfg) makes a model, and changes[name](model) changes it. Methods with equal models share
    one. `warm`: iterations of each method that are not counted, before those that are. `profile`:
    after them, make one more for a table of what took its time.
    """
    found, tries = {}, {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as folder:
        setups = set_up(methods, flags, build, changes, folder)
        for repeat in range(warm + repeats):
            for name, s in setups.items():
                s.cfg.iterations = repeat + 1                   # so that the loop makes one more
                calls, seconds = one_iteration(s)
                again = lambda: replay(s.model, s.scorers, calls, s.prompts)
                if repeat == 0:
                    found[name] = settings_of(s.cfg, calls, s.model.nfe)
                    found[name]["flops"] = flops_of(s.costs, calls)
                    found[name]["grad_norm"] = s.run.lines()[-1]["grad_norm"]
                    found[name]["first_ratio"] = s.run.lines()[-1]["first_ratio"]
                if bare:
                    began = now(s.model.device)
                    again()
                    seconds["bare"] = now(s.model.device) - began
                    seconds["ratio"] = seconds["iteration"] / seconds["bare"]
                    if repeat == 0:
                        found[name]["memory"] = memory_of(again, s.model)
                tries[name].append(seconds)
                print(f"{repeat + 1}/{warm + repeats} {s.label}: {seconds['iteration']:.2f} s",
                      file=sys.stderr, flush=True)
        for name, s in setups.items() if profile else ():
            found[name]["profile"] = busiest(s)
    for name, each in tries.items():
        counted = each[warm:]
        found[name] |= {key: statistics.median(one[key] for one in counted) for key in each[0]}
        found[name]["tries"] = each
    return found

def set_up(methods, flags, build, changes, folder):
    """{name: Setup}. The runs are in subfolders of `folder`."""
    setups, models = {}, {}
    for name, (label, script, own) in methods.items():
        parse, loop = SCRIPTS[script]
        cfg = parse(["--lr", "1e-12", *flags, *own.split(), "--out_dir", f"{folder}/{name}",
                     "--eval_every", "0", "--save_every", "0"])
        change = changes.get(name)
        key = (*(getattr(cfg, setting) for setting in BUILT), change)
        if key not in models:
            model = build(cfg)
            if change:
                change(model)
            models[key] = model, operations_of(model, cfg)
        model, costs = models[key]
        prompts = read_prompts(cfg.prompts)[: cfg.prompts_per_iteration]
        scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, prompts)
        run = Run(cfg, model, scorers)
        setups[name] = Setup(label, cfg, model, costs, scorers, run, loop, prompts)
    return setups

def one_iteration(s):
    """One iteration of a loop -> its calls, and the seconds of the iteration and of its phases."""
    with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
          recorded(s.model, s.scorers, s.run.opt) as (calls, apart)):
        began = now(s.model.device)
        s.loop(s.cfg, s.model, s.scorers, s.run)
        iteration = now(s.model.device) - began
    log = s.run.lines()[-1]
    if log["skipped"]:
        raise ArithmeticError(f"{s.label}: the gradient is not finite, so nothing was updated")
    if log["flat_groups"]:
        print(f"{s.label}: {log['flat_groups']} groups had equal rewards", file=sys.stderr)
    return calls, dict(iteration=iteration, decode=apart["decode"], optimizer=apart["optimizer"],
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

def parsed(script, words):
    """The settings of a script's command line, without a run."""
    with tempfile.TemporaryDirectory() as folder:
        return SCRIPTS[script][0]([*words, "--out_dir", folder])

# ------------------------------------------------------------------------------------------------
# What is counted, and the table

def settings_of(cfg, calls, nfe):
    """The columns of Table 3. NFE: latents that the network got, each `nfe` times, per image."""
    images = cfg.prompts_per_iteration * cfg.group_size
    asked = {False: 0, True: 0}                 # without gradients, and with
    for what, size, trained in calls:
        asked[trained] += nfe * size[0] if what == "velocity" else 0
    return dict(solver=SOLVERS[cfg.solver], nfe_old=asked[False] / images, G=cfg.group_size,
                B="adapt" if cfg.method == "branch" else cfg.num_anchors or cfg.group_size,
                K="all" if cfg.method in ("branch", "fdfo") else cfg.num_train_steps,
                nfe_theta=asked[True] / images)

def memory_of(call, model):
    """Peak bytes of a call, on a CPU without the weights."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with Live(model.transformer) as live:
        call()
    return live.peak

def operations_of(model, cfg):
    """`operations` of a loaded model, for one latent."""
    text = model.encode([""])["txt"].shape[1]
    once = operations(model.transformer.config, model.latent_shape[0], text, cfg.lora_rank,
                      cfg.checkpoint_blocks)
    return [model.nfe * count for count in once]

def flops_of(costs, calls):
    """The transformer's operations in recorded calls. `costs`: those of one latent, without and
    with gradients."""
    return sum(size[0] * costs[trained] for what, size, trained in calls if what == "velocity")

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
    counts = ("solver", "nfe_old", "G", "B", "K", "nfe_theta")
    seconds = ("iteration", *PHASES, "bare", "ratio")
    head = ["Method", "Solver", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", *PHASES,
            "bare calls", "ratio", *RATES, "GB"]
    def told(value, form):
        return format(value, form) if isinstance(value, float) else value
    rows = []
    for name, f in found.items():
        rows.append([METHODS[name][0], *(told(f[key], ".4g") for key in counts),
                     *(told(f.get(key, ""), ".3f") for key in seconds), *rates(f, rate),
                     f"{f['memory'] / 1e9:.2f}" if "memory" in f else ""])
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
          "flux-small": dict(num_layers=2, num_single_layers=4),
          "flux-narrow": dict(num_layers=1, num_single_layers=2, num_attention_heads=2)}
LARGE = "--lora_rank 64 --checkpoint_blocks -1 --prompts_per_iteration 1"
SIZES = {"tiny": "", "flux": f"--resolution 720 {LARGE}", "flux-small": f"--resolution 256 {LARGE}",
         "flux-narrow": "--prompts_per_iteration 1"}

def random_flux(cfg, geometry):
    """FLUX.1-dev's transformer, with all or with 2 + 4 of its blocks, and its VAE. Weights and text
    embeddings are random. flux-narrow: 1 + 2 blocks of 2 heads, and the small world's VAE. It
    then takes a tenth of an evaluation; FLUX's takes an eighth."""
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

LADDER = {                              # step: (settings of train.py, a change of the model)
    "blocks as they are, all recomputed": ("--no-compile --checkpoint_blocks -1", None),
    "compiled": ("--compile --checkpoint_blocks -1", None),
    "compiled, rollouts in float8": ("--compile --checkpoint_blocks -1", float8.prepare),
    "blocks as they are, nothing recomputed": ("--no-compile --checkpoint_blocks 0", None),
    "compiled, nothing recomputed": ("--compile --checkpoint_blocks 0", None),
    "compiled, 35 blocks recomputed": ("--compile --checkpoint_blocks 35", None),   # of FLUX's 57
    "compiled, nothing recomputed, rollouts in one CUDA graph": ("--compile --checkpoint_blocks 0",
                                                                 attention.in_one_graph),
}

def ladder(repeats, geometry, flags, steps=(), profile=False):
    """Time iterations of Neighbor GRPO with 8 steps, at each step of the ladder, or at those with
    the numbers `steps`, from 1. On the small world, which has fewer than 35 blocks, the steps take
    turns. At other sizes they follow one another, because only one model may fit."""
    device = torch.device(parsed(TRAIN, flags).device)
    head = ["step", "s / iter.", *PHASES, *RATES, "GB", "gradient norm",
            "first ratio"]
    print(markdown(head, []), flush=True)
    turns = [[list(LADDER)[number - 1]] for number in steps] or [[name] for name in LADDER]
    if geometry == "tiny" and not steps:
        turns = [[name for name in LADDER if "35 blocks" not in name]]
    for names in turns:
        torch.compiler.reset()
        if device.type == "cuda":
            gc.collect()                        # frees the last model, to make room for the next
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        here = [name for name in names if is_possible(name, device, flags)]
        try:
            found = measure({name: (name, TRAIN, LADDER[name][0]) for name in here}, repeats, flags,
                            lambda cfg: build(cfg, geometry), bare=False, warm=1,
                            changes={name: LADDER[name][1] for name in here}, profile=profile)
        except Exception as error:              # such as too little memory: go on with the others
            print(f"{', '.join(names)}: {type(error).__name__}: {error}", file=sys.stderr)
            found = {}
        rate, memory = matmul_rate(device), ""
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.0f}"
        for name in names:
            row = ["not possible here, see above"]
            if name in found:
                seconds = [f"{found[name][key]:.2f}" for key in ("iteration", *PHASES)]
                row = [*seconds, *rates(found[name], rate), memory,
                       f"{found[name]['grad_norm']:.2e}", f"{found[name]['first_ratio']:.1e}"]
            print(line([name, *row]), flush=True)
            if profile and name in found:
                print(f"\n{name}\n{found[name]['profile']}", flush=True)

def is_possible(name, device, flags):
    """Whether a step of the ladder can be timed here. If not, print the reason."""
    settings, change = LADDER[name]
    try:
        parsed(TRAIN, [*flags, *settings.split()])
        if change is float8.prepare:
            float8.check(device)
        if change is attention.in_one_graph and device.type != "cuda":
            raise ValueError("a CUDA graph needs a GPU")
    except SystemExit:                          # train.py has printed the reason
        return False
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    return True

# ------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {
    "methods": "an iteration of each method, and its network calls alone (the default command)",
    "ladder": "what each step of the fast path brings for Neighbor GRPO with 8 steps",
    "memory": "the GPU memory that FLUX.1-dev and FLUX.2 klein need, computed without a GPU",
}

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
            help="tiny: the small world. flux: FLUX.1-dev's size, 720x720; flux-small: 2 + 4 of "
                 "its blocks, 256x256; both with random weights, LoRA 64, all blocks recomputed, "
                 "one prompt, unless settings say otherwise. flux-narrow: 1 + 2 blocks of 2 heads, "
                 "64x64; its VAE is as cheap beside it as FLUX's (default tiny)")
    add = each["ladder"].add_argument
    add("--steps", default="", help="comma-separated numbers of steps, from 1, instead of all: "
        + "; ".join(f"{number} {name}" for number, name in enumerate(LADDER, 1)))
    add("--profile", action="store_true", help="after each step a torch.profiler table: the ten "
        "kernels that take most of one more iteration")
    add("--attention", choices=[*attention.KINDS], default="flash",
        help="of paper/attention.py (default flash)")
    add = each["methods"].add_argument
    add("--only", default=",".join(METHODS), help="comma-separated: " + ", ".join(METHODS))
    add("--warm", type=int, default=2, help="iterations before those counted (default 2)")
    add("--bare", action=argparse.BooleanOptionalAction, default=True,
        help="after each iteration time its network calls alone, for ratio and GB (default yes)")
    add("--json", default="", help="a file for the numbers")
    args, settings = parser.parse_known_args(argv or ["methods"])
    if args.command == "memory" and settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if getattr(args, "repeats", 1) < 1 or getattr(args, "warm", 0) < 0:
        parser.error("--repeats must be at least 1, --warm at least 0")
    if getattr(args, "geometry", "") == "flux" and not torch.cuda.is_available():
        parser.error("--geometry flux needs a GPU")
    if args.command == "ladder":
        numbers = [number.strip() for number in args.steps.split(",") if number.strip()]
        if unknown := [n for n in numbers if not n.isdigit() or not 1 <= int(n) <= len(LADDER)]:
            parser.error(f"--steps has {unknown[0]!r}, but must be of 1 to {len(LADDER)}")
        args.steps = [int(number) for number in numbers]
    if args.command == "methods":
        args.only = [name.strip() for name in args.only.split(",")]
        if unknown := [name for name in args.only if name not in METHODS]:
            parser.error(f"--only has {unknown[0]!r}, but the methods are {', '.join(METHODS)}")
        if args.json and not Path(args.json).parent.is_dir():
            parser.error(f"--json: there is no folder {Path(args.json).parent}")
    return args, settings

def main(argv=None):
    args, settings = parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == "memory":
        print(markdown(*memory()) + "\n")
        return print(markdown(*memory_of_klein()))
    geometry, names = args.geometry, getattr(args, "only", ["dpm8"])
    flags = [*SIZES[geometry].split(), *settings]
    for _, script, own in [METHODS[name] for name in names]:
        cfg = parsed(script, [*flags, *own.split()])            # bad settings end here
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if args.command == "ladder":
        attention.use(args.attention)
        return ladder(args.repeats, geometry, flags, args.steps, args.profile)
    found = measure({name: METHODS[name] for name in names}, args.repeats, flags,
                    lambda cfg: build(cfg, geometry), args.bare, args.warm)
    print(table(found, matmul_rate(torch.device(cfg.device))))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")

if __name__ == "__main__":
    main()
