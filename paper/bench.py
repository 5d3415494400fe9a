"""
What does an iteration cost, and what of it is not its networks? Time t runs from 1 (noise) to 0
(image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python -m paper.bench                       # all methods, on the small world
    python -m paper.bench methods --only dpm8,dance --repeats 15
    python -m paper.bench methods --geometry flux --only dance,dpm8 --compile --no-bare --repeats 1
    python -m paper.bench ladder --geometry flux        # what each step of the fast path brings
    python -m paper.bench batching --geometry flux-small        # B anchors in one forward, or in B
    python -m paper.bench scaling               # seconds against G, T, B, K and pixels
    python -m paper.bench floor                 # operations of an iteration at FLUX.1-dev's size
    python -m paper.bench memory                # GPU memory that FLUX.1-dev takes

floor and memory are computed without a GPU, from tensors that have shapes but no numbers. Settings
of train.py may follow the options of the others, such as --compile and --threads 1 above.

`methods` times the loops' own iterations. After each it times the same calls of the same networks,
in the same batches, with nothing around them. Methods take turns. Its columns are medians:

    NFE_old, NFE_theta   latents that the network was asked about, over images: without and with
                         gradients. They are counted at the network.
    ratio                iteration over bare calls, pair by pair. The speed of the machine cancels,
                         but where other work comes and goes a single pair says little: use more
                         --repeats, and --threads 1.
    TFLOP, TFLOP/s       the transformer's matrix products in an iteration, and these over the whole
                         iteration's seconds, decoding and all
    share                of the rate of one large matrix product, which is timed in the same run
    GB                   the most memory that the bare calls take; on a CPU beyond the weights. In
                         `ladder` that of the iterations.
"""
import argparse, contextlib, dataclasses, gc, io, json, statistics, sys, tempfile, time
from collections import namedtuple
from pathlib import Path
import numpy as np
import torch
import rewards, train
from eval import SOLVERS
from paper import baselines, float8
from paper.counts import KLEIN, VAE, Live, decoding, memory, memory_of_klein, operations
from prompts import read_prompts
from run import Run
from diffusers import (AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, FluxPipeline,
                       FluxTransformer2DModel)

TRAIN, BASELINES = "train.py", "-m paper.baselines"             # what follows `python`
METHODS = {                                                     # name: (label, script, settings)
    "dance": ("DanceGRPO", BASELINES, "--method dance"),
    "flow": ("Flow-GRPO", BASELINES, "--method flow"),
    "mix": ("MixGRPO", BASELINES, "--method mix"),
    "flash": ("MixGRPO-Flash*", BASELINES, "--method flash"),
    "branch": ("BranchGRPO", BASELINES, "--method branch"),
    "prune": ("BranchGRPO, pruned", BASELINES, "--method branch --prune 5"),
    "nft": ("DiffusionNFT", BASELINES, "--method nft"),
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
# Iterations, and their network calls with nothing around them

def now(device):
    """The time in seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

@contextlib.contextmanager
def recorded(model, scorers, opt):
    """Inside, what a loop asks of its networks is written down: [(what, size, with gradients)],
    and the seconds of what has no line of its own in the log."""
    calls, seconds, plain = [], dict(decode=0.0, optimizer=0.0), dict(scorers)

    def watched(call, what, size, phase=""):
        def watch(*args, **more):
            calls.append((what, size(*args), torch.is_grad_enabled()))
            began = now(model.device) if phase else 0
            result = call(*args, **more)
            if phase:
                seconds[phase] += now(model.device) - began
            return result
        return watch

    def latents_and_prompts(x, t, cond):
        return len(x), len(cond["vec"])

    model.encode = watched(model.encode, "encode", len)
    model.velocity = watched(model.velocity, "velocity", latents_and_prompts)
    model.decode = watched(model.decode, "decode", len, "decode")
    opt.step = watched(opt.step, "step", lambda: None, "optimizer")
    for name, scorer in plain.items():
        scorers[name] = watched(scorer, name, lambda images, prompts: len(images))
    try:
        yield calls, seconds
    finally:
        scorers.update(plain)
        del model.encode, model.velocity, model.decode, opt.step

def replay(model, scorers, calls, prompts):
    """The same calls, of the same sizes and in the same order, with nothing around them."""
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

def measure(methods, repeats, flags=(), build=train.load, bare=True, warm=2, changes={}):
    """Iterations of each method, {name: (label, script, settings)}, and their bare calls, in turn.
    -> {name: dict(Table 3's columns, operations, median seconds, ratio, tries)}

    build(cfg) makes a model, changes[name] does something to it. Methods whose models are made
    alike share one. `warm`: iterations of each before those that count.
    """
    found, tries = {}, {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as folder:
        setups = set_up(methods, flags, build, changes, folder)
        for repeat in range(warm + repeats):
            for name, s in setups.items():
                s.cfg.iterations = repeat + 1                   # one more than are done
                calls, seconds = one_iteration(s)
                again = lambda: replay(s.model, s.scorers, calls, s.prompts)
                if repeat == 0:
                    found[name] = settings_of(s.cfg, calls, s.model.nfe)
                    found[name]["flops"] = flops_of(s.costs, calls)
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
    for name, each in tries.items():
        counted = each[warm:]
        found[name] |= {key: statistics.median(one[key] for one in counted) for key in each[0]}
        found[name]["tries"] = each
    return found

def set_up(methods, flags, build, changes, folder):
    """{name: Setup} of runs in subfolders of `folder`."""
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
        shift = cfg.shift or model.shift(cfg.num_rollout_steps)
        cfg = dataclasses.replace(cfg, shift=shift)
        prompts = read_prompts(cfg.prompts)[: cfg.prompts_per_iteration]
        scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, prompts)
        run = Run(cfg, model, scorers)
        setups[name] = Setup(label, cfg, model, costs, scorers, run, loop, prompts)
    return setups

def one_iteration(s):
    """One iteration of a loop -> its calls, and the seconds of all of it and of its phases."""
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

def parsed(script, words):
    """Settings of a run that is not begun."""
    with tempfile.TemporaryDirectory() as folder:
        return SCRIPTS[script][0]([*words, "--out_dir", folder])

# ------------------------------------------------------------------------------------------------
# What is counted, and the table

def settings_of(cfg, calls, nfe):
    """Table 3's columns. NFE: latents that the network was asked about, each `nfe` times, over
    images."""
    images = cfg.prompts_per_iteration * cfg.group_size
    asked = {False: 0, True: 0}                 # without gradients, and with
    for what, size, trained in calls:
        asked[trained] += nfe * size[0] if what == "velocity" else 0
    return dict(solver=SOLVERS[cfg.solver], nfe_old=asked[False] / images, G=cfg.group_size,
                B="adapt" if cfg.method == "branch" else cfg.num_anchors or cfg.group_size,
                K="all" if cfg.method in ("branch", "fdfo") else cfg.num_train_steps,
                nfe_theta=asked[True] / images)

def memory_of(call, model):
    """Peak bytes; on a CPU those beyond the weights."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with Live(model.transformer) as live:
        call()
    return live.peak

def operations_of(model, cfg):
    """`operations` of a model that is loaded, for one latent."""
    text = model.encode([""])["txt"].shape[1]
    once = operations(model.transformer.config, model.latent_shape[0], text, cfg.lora_rank,
                      cfg.checkpoint_blocks)
    return [model.nfe * count for count in once]

def flops_of(costs, calls):
    """The transformer's operations in recorded calls. `costs`: of one latent, without gradients and
    with."""
    return sum(size[0] * costs[trained] for what, size, trained in calls if what == "velocity")

def matmul_rate(device):
    """Floating point operations a second in one large matrix product, in the type that the network
    runs in."""
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
    """The transformer's operations in an iteration, these over the iteration's seconds, and the
    share of a matrix product's rate that this is."""
    flops, seconds = found["flops"], found["iteration"]
    return (f"{flops / 1e12:.3g}", f"{flops / seconds / 1e12:.3g}", f"{rate / 1e12:.3g}",
            f"{flops / seconds / rate:.2f}")

def table(found, rate):
    """The columns that the head of this file explains, as text."""
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
# Other sizes than the small world's

BLOCKS = {"flux": dict(num_layers=19, num_single_layers=38),
          "flux-small": dict(num_layers=2, num_single_layers=4),
          "flux-narrow": dict(num_layers=1, num_single_layers=2, num_attention_heads=2)}
LARGE = "--lora_rank 64 --checkpoint_blocks -1 --prompts_per_iteration 1"
SIZES = {"tiny": "", "flux": f"--resolution 720 {LARGE}", "flux-small": f"--resolution 256 {LARGE}",
         "flux-narrow": "--prompts_per_iteration 1"}

def random_flux(cfg, geometry):
    """FLUX.1-dev's transformer, all of it or 2 + 4 of its blocks, and its VAE, with random weights.
    What the text encoders would say is random too. flux-narrow: 1 + 2 blocks of 2 heads, and the
    small world's VAE, which then takes a tenth of an evaluation; FLUX's takes an eighth."""
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
# What else can be asked

def cudnn_attention(model):
    model.transformer.set_attention_backend("_native_cudnn")

LADDER = {                              # step: (train.py's settings, what is done to the model)
    "blocks as they are, all recomputed": ("--no-compile --checkpoint_blocks -1", None),
    "compiled": ("--compile --checkpoint_blocks -1", None),
    "compiled, rollouts in float8": ("--compile --checkpoint_blocks -1", float8.prepare),
    "blocks as they are, nothing recomputed": ("--no-compile --checkpoint_blocks 0", None),
    "compiled, nothing recomputed": ("--compile --checkpoint_blocks 0", None),
    # the last, and timed alone: diffusers gives this attention to all models from then on
    "compiled, cuDNN's attention": ("--compile --checkpoint_blocks -1", cudnn_attention),
}

def ladder(repeats, geometry, flags):
    """An iteration of Neighbor GRPO with 8 steps, at each step of the ladder. On the small world
    the steps take turns. Elsewhere they come one after the other, as only one model may fit."""
    device = torch.device(parsed(TRAIN, flags).device)
    *first, last = LADDER
    print(markdown(["step", "s / iter.", *PHASES, *RATES, "GB"], []), flush=True)
    for names in [first, [last]] if geometry == "tiny" else [[name] for name in LADDER]:
        torch.compiler.reset()
        if device.type == "cuda":
            gc.collect()                        # the last step's model; the next needs the room
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        here = [name for name in names if can_be_had(name, device, flags)]
        try:
            found = measure({name: (name, TRAIN, LADDER[name][0]) for name in here}, repeats, flags,
                            lambda cfg: build(cfg, geometry), bare=False, warm=1,
                            changes={name: LADDER[name][1] for name in here})
        except Exception as error:              # too little memory, say: the others still count
            print(f"{', '.join(names)}: {type(error).__name__}: {error}", file=sys.stderr)
            found = {}
        rate, memory = matmul_rate(device), ""
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 1e9:.0f}"
        for name in names:
            row = ["not here, as said above"]
            if name in found:
                seconds = [f"{found[name][key]:.2f}" for key in ("iteration", *PHASES)]
                row = [*seconds, *rates(found[name], rate), memory]
            print(line([name, *row]), flush=True)

def can_be_had(name, device, flags):
    """Whether a step of the ladder can be timed here. If not, the reason has been printed."""
    settings, change = LADDER[name]
    try:
        parsed(TRAIN, [*flags, *settings.split()])
        if change is float8.prepare:
            float8.check(device)
        if change is cudnn_attention and device.type != "cuda":
            raise ValueError("cuDNN's attention needs a GPU")
    except SystemExit:                          # train.py has said why
        return False
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    return True

def costs_of(net, vae, name, tokens=45 * 45, text=512, rank=64):
    """The operations of one latent at 720x720, {how: (forward, with backward)}; printed, too."""
    costs = {}
    for what, of in ((f"LoRA {rank}", rank), ("all weights", 0)):
        for how, blocks in (("nothing recomputed", 0), ("all recomputed", -1)):
            costs[f"{what}, {how}"] = operations(net.config, tokens, text, of, blocks)
    each = [f"{kind}: forward {forward / 1e12:.2f}, with backward {both / 1e12:.2f}"
            for kind, (forward, both) in costs.items()]
    print(f"one latent of {name}, in TFLOP: {'; '.join(each)}; decoding it "
          f"{decoding(vae, 90) / 1e12:.2f}")
    return costs

def floor():
    """The operations of one group's iteration by each method, FLUX.1-dev at 720x720: the matrix
    products of the transformer, which no implementation can leave out. Of klein, those of one
    latent."""
    with torch.device("meta"):
        flux, klein = FluxTransformer2DModel(guidance_embeds=True), Flux2Transformer2DModel(**KLEIN)
        vae, klein_vae = AutoencoderKL(**VAE), AutoencoderKLFlux2()
    costs = costs_of(flux, vae, "FLUX.1-dev")
    costs_of(klein, klein_vae, "FLUX.2-klein-base-4B, which guidance evaluates twice")
    cfg = parsed(TRAIN, [])
    small = train.load(cfg)
    forward, both = operations_of(small, cfg)
    decode = decoding(small.pipe.vae, 2 * small.height)
    print(f"one of the small world's, in GFLOP: forward {forward / 1e9:.3f}, with backward "
          f"{both / 1e9:.3f}; decoding it {decode / 1e9:.3f}\n")
    head, rows, rival = ["Method", "G", "NFE_old", "NFE_theta"], [], None
    for kind in costs:
        head += [f"PFLOP, {kind}", "of DanceGRPO's"]
    for label, script, own in METHODS.values():
        c = parsed(script, own.split())
        if script == BASELINES:
            old, theta = baselines.nfe(c)
        else:
            old, theta = c.num_rollout_steps, c.num_anchors * c.num_train_steps / c.group_size
        sums = [c.group_size * (old * forward + theta * both) for forward, both in costs.values()]
        rival = rival or sums                   # the first is DanceGRPO
        rows.append([label, c.group_size, f"{old:.4g}", f"{theta:.4g}"])
        for own, its in zip(sums, rival):
            rows[-1] += [f"{own / 1e15:.2f}", f"{own / its:.3f}"]
    print(markdown(head, rows))

def batching(cfg, geometry, repeats):
    """Forwards and backwards of one prompt's B anchors, all in one or one by one, in turn; medians.
    (A loop's forward has B / updates_per_iteration anchors of each of its prompts.)"""
    model, B, tries = build(cfg, geometry), cfg.num_anchors, []
    model.batch = 0                             # all at once is all at once
    cond = model.encode(read_prompts(cfg.prompts)[:1])
    x = torch.randn(B, *model.latent_shape, device=model.device)
    for repeat in range(repeats + 1):           # one to warm up
        seconds = []
        for parts in (1, B):
            began = now(model.device)
            for some in x.chunk(parts):
                model.velocity(some, 0.5, cond).mean().backward()
            seconds.append(now(model.device) - began)
            model.transformer.zero_grad()
        tries.append(seconds)
        print(f"{repeat}/{repeats}: {B} at once {seconds[0]:.2f} s, one by one {seconds[1]:.2f} s",
              file=sys.stderr, flush=True)
    together, alone = (statistics.median(each) for each in zip(*tries[1:]))
    ratio = statistics.median(one_by_one / at_once for at_once, one_by_one in tries[1:])
    print(f"{geometry}, {cfg.resolution}x{cfg.resolution}: forward and backward of {B} anchors at "
          f"once {together:.3f} s, one by one {alone:.3f} s: {ratio:.2f} times (medians of "
          f"{repeats}; {cfg.device}, {torch.get_num_threads()} threads)")

GROWTH = {                                      # setting: its values; the others are dpm8's
    "group_size": (4, 8, 12, 18, 24),
    "num_rollout_steps": (5, 8, 12, 16, 25),
    "num_anchors": (2, 4, 8, 12),
    "num_train_steps": (1, 2, 4, 7),
    "resolution": (32, 64, 96, 128),
}

def scaling(repeats, flags, folder):
    """Seconds of an iteration against G, T, B, K and pixels, a line through each, and how far the
    points are from it; into scaling.md and scaling.png."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    methods = {f"{key} {value}": (f"{key} {value}", TRAIN, f"--{key} {value}")
               for key, values in GROWTH.items() for value in values}
    found = measure(methods, repeats, flags, bare=False)
    figure, panels = plt.subplots(1, len(GROWTH), figsize=(3.2 * len(GROWTH), 3),
                                  layout="constrained", sharey=True)
    rows = []
    for panel, (key, values) in zip(panels, GROWTH.items()):
        pixels = key == "resolution"
        x = np.array(values, float) ** (2 if pixels else 1)
        y = np.array([found[f"{key} {value}"]["iteration"] for value in values])
        slope, start = np.polyfit(x, y, 1)
        on_line = start + slope * x
        unit = 1000 if pixels else 1
        panel.plot(x / unit, y, "o")
        panel.plot(x / unit, on_line)
        panel.set(xlabel="1,000 pixels" if pixels else key)
        rows.append([key, ", ".join(map(str, values)), ", ".join(f"{one:.2f}" for one in y),
                     f"{start:.2f} + {slope:.3g} x", f"{abs(y / on_line - 1).max():.0%}"])
    panels[0].set(ylabel="seconds an iteration", ylim=(0, None))
    figure.savefig(folder / "scaling.png", dpi=120)
    text = markdown(["setting", "values", "s / iter.", "line", "furthest from it"], rows)
    command = " ".join(["python -m paper.bench scaling --repeats", str(repeats), *flags])
    (folder / "scaling.md").write_text(
        f"`{command}` ({torch.get_num_threads()} CPU threads; medians; settings that are not named "
        f"are those of dpm8).\n\n{text}\n", encoding="utf-8")
    print(text)

# ------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {
    "methods": "an iteration of each method, and its network calls alone; also without a name",
    "ladder": "what each step of the fast path brings, Neighbor GRPO with 8 steps",
    "batching": "B anchors in one forward against B forwards",
    "scaling": "seconds against G, T, B, K and pixels, into results/scaling.md and .png",
    "floor": "the operations of FLUX.1-dev and of FLUX.2 klein, counted without a GPU",
    "memory": "the GPU memory that the two take, computed without one",
}

def parse_args(argv):
    """-> the command's options, and the settings that follow them."""
    parser = argparse.ArgumentParser(prog="python -m paper.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    each = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False)
            for name, text in COMMANDS.items()}
    for name in ("methods", "ladder", "batching", "scaling"):
        each[name].epilog = "Settings of train.py may follow, such as --threads 1."
        each[name].add_argument("--repeats", type=int, default=5,
                                help="iterations that count (default 5)")
    for name in ("methods", "ladder", "batching"):
        each[name].add_argument(
            "--geometry", choices=[*SIZES], default="tiny",
            help="tiny: the small world. flux: FLUX.1-dev's size, 720x720; flux-small: 2 + 4 of "
                 "its blocks, 256x256; both with random weights, LoRA 64, all blocks recomputed, "
                 "one prompt, unless settings say otherwise. flux-narrow: 1 + 2 blocks of 2 heads "
                 "beside a VAE that weighs as little as FLUX's, 64x64 (default tiny)")
    add = each["methods"].add_argument
    add("--only", default=",".join(METHODS), help="comma-separated, of " + ", ".join(METHODS))
    add("--warm", type=int, default=2, help="iterations before those that count (default 2)")
    add("--bare", action=argparse.BooleanOptionalAction, default=True,
        help="after each iteration its network calls alone, for ratio and GB (default yes)")
    add("--json", default="", help="a file for the numbers")
    args, settings = parser.parse_known_args(argv or ["methods"])
    if args.command in ("floor", "memory") and settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    if getattr(args, "repeats", 1) < 1 or getattr(args, "warm", 0) < 0:
        parser.error("--repeats must be at least 1, --warm at least 0")
    if getattr(args, "geometry", "") == "flux" and not torch.cuda.is_available():
        parser.error("--geometry flux needs a GPU")
    if args.command == "methods":
        args.only = [name.strip() for name in args.only.split(",")]
        if unknown := [name for name in args.only if name not in METHODS]:
            parser.error(f"--only has {unknown[0]!r}, but must be of {', '.join(METHODS)}")
        if args.json and not Path(args.json).parent.is_dir():
            parser.error(f"--json: there is no folder {Path(args.json).parent}")
    return args, settings

def main(argv=None):
    args, settings = parse_args(sys.argv[1:] if argv is None else argv)
    if args.command == "floor":
        return floor()
    if args.command == "memory":
        print(markdown(*memory()) + "\n")
        return print(markdown(*memory_of_klein()))
    geometry, names = getattr(args, "geometry", "tiny"), getattr(args, "only", ["dpm8"])
    flags = [*SIZES[geometry].split(), *settings]
    for _, script, own in [METHODS[name] for name in names]:
        cfg = parsed(script, [*flags, *own.split()])            # refused before anything is built
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if args.command == "ladder":
        return ladder(args.repeats, geometry, flags)
    if args.command == "batching":
        return batching(cfg, geometry, args.repeats)
    if args.command == "scaling":
        return scaling(args.repeats, flags, Path(__file__).parent / "results")
    found = measure({name: METHODS[name] for name in names}, args.repeats, flags,
                    lambda cfg: build(cfg, geometry), args.bare, args.warm)
    print(table(found, matmul_rate(torch.device(cfg.device))))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")

if __name__ == "__main__":
    main()
