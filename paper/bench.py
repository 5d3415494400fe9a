"""
What does an iteration cost, and what of it is not its networks? Time t runs from 1 (noise) to 0 (image).

    python -m paper.bench                                   # Neighbor GRPO's presets and the baselines, on the small world
    python -m paper.bench --only dpm8,dance --repeats 15    # some of them, for longer; settings that their scripts share may follow
    python -m paper.bench --geometry flux-small --batching  # FLUX.1-dev's widths, 2 + 4 layers, 256x256: B anchors in one forward against B forwards
    python -m paper.bench --ladder --geometry flux          # on a GPU: FLUX.1-dev's 12 B weights, random, 720x720, LoRA: what each step of the fast path brings, and the share of a matrix product's rate
    python -m paper.bench --geometry flux-narrow --only dance,dpm8          # a narrow FLUX, whose decoding weighs as little as FLUX's does
    python -m paper.bench --geometry flux --only dance,dpm8 --compile --no-bare --warm 1 --repeats 1        # methods beside each other at that size
    python -m paper.bench --scaling                         # seconds against G, T, B, K and pixels
    python -m paper.bench --floor                           # operations of an iteration at FLUX.1-dev's size, counted without a GPU
    python -m paper.bench --memory                          # GPU memory that FLUX.1-dev needs, computed without one

Times the loops' own iterations and, after each, the same calls of the same networks in the same batches with nothing around them, as they were recorded
in the iteration; methods take turns. Columns are medians. `ratio` is the median of iteration over bare calls, pair by pair: how fast the machine is does not
matter, but where other work comes and goes a single pair says little (more --repeats; --threads 1). NFE_old and NFE_theta are counted at the network: latents
it was asked about, over images, without and with gradients. `TFLOP` are the transformer's matrix products in an iteration, `TFLOP/s` those over the whole
iteration's seconds, decoding and all, `share` that of one large matrix product, timed in the same run. `GB` is the most memory the bare calls (with --ladder the iterations) take; on a CPU beyond the weights.
"""
import argparse, contextlib, dataclasses, gc, io, json, statistics, sys, tempfile, time, weakref
from pathlib import Path
import numpy as np
import torch
import rewards, run, train
from eval import SOLVERS, read_prompts
from model import add_lora, recompute
from paper import baselines
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

METHODS = {                                                     # name: (label, script, its flags)
    "dance": ("DanceGRPO", "-m paper.baselines", "--method dance"),
    "flow": ("Flow-GRPO", "-m paper.baselines", "--method flow"),
    "mix": ("MixGRPO", "-m paper.baselines", "--method mix"),
    "flash": ("MixGRPO-Flash*", "-m paper.baselines", "--method flash"),
    "branch": ("BranchGRPO", "-m paper.baselines", "--method branch"),
    "prune": ("BranchGRPO, pruned", "-m paper.baselines", "--method branch --prune 5"),
    "nft": ("DiffusionNFT", "-m paper.baselines", "--method nft"),
    "ddim25": ("Neighbor GRPO, 25 steps", "train.py", "--solver ddim --num_rollout_steps 25 --num_anchors 12 --num_train_steps 4"),
    "dpm16": ("Neighbor GRPO, 16 steps", "train.py", "--num_rollout_steps 16 --num_train_steps 9"),
    "dpm8": ("Neighbor GRPO, 8 steps", "train.py", ""),
}
SCRIPTS = {"train.py": (train.parse_config, train.train), "-m paper.baselines": (baselines.parse_config, baselines.loop)}
PHASES = ("rollout", "decode", "reward", "update", "optimizer")

def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

@contextlib.contextmanager
def recorded(model, scorers, opt):
    """Inside, what a loop asks of its networks is written down, [(what, size, with gradients)], and the seconds of what has no line of its own in the log."""
    calls, seconds, plain = [], dict(decode=0.0, optimizer=0.0), dict(scorers)
    def watched(call, what, size, timed=""):
        def watch(*args, **more):
            calls.append((what, size(*args), torch.is_grad_enabled()))
            began = now(model.device) if timed else 0
            result = call(*args, **more)
            if timed:
                seconds[timed] += now(model.device) - began
            return result
        return watch
    model.encode = watched(model.encode, "encode", len)
    model.velocity = watched(model.velocity, "velocity", lambda x, t, cond: (len(x), len(cond["vec"])))
    model.decode = watched(model.decode, "decode", len, "decode")
    opt.step = watched(opt.step, "step", lambda: None, "optimizer")
    scorers.update({name: watched(scorer, name, lambda images, prompts: len(images)) for name, scorer in plain.items()})
    try:
        yield calls, seconds
    finally:
        scorers.update(plain)
        del model.encode, model.velocity, model.decode, opt.step

def replay(model, scorers, calls, prompts):
    """The same calls, of the same sizes and in the same order, with nothing around them."""
    latents = torch.randn(max(size[0] for what, size, _ in calls if what == "velocity"), *model.latent_shape, device=model.device)
    for what, size, trained in calls:
        with torch.set_grad_enabled(trained):
            if what == "encode":
                cond = model.encode(prompts)
            elif what == "velocity":
                latents_of, prompts_of = size
                v = model.velocity(latents[:latents_of], 0.5, {key: value[:prompts_of] for key, value in cond.items()})
                if trained:
                    v.mean().backward()
            elif what == "decode":
                images = model.decode(latents[:size])
            elif what == "step":
                model.transformer.zero_grad()
            else:
                scorers[what](images, [prompt for prompt in prompts for _ in range(size // len(prompts))])

BUILT = ("resolution", "lora_rank", "checkpoint_blocks", "compile")

def measure(methods, repeats, flags=(), build=train.load, bare=True, warm=2):
    """Iterations of each method, {name: (label, script, flags)}, and their bare calls, in turn. -> {name: dict(counts, settings, median seconds, ratio)}"""
    books, models, tries, found = {}, {}, {name: [] for name in methods}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (label, script, own) in methods.items():
            parse, loop = SCRIPTS[script]
            cfg = parse(["--lr", "1e-12", *flags, *own.split(), "--out_dir", f"{folder}/{name}", "--eval_every", "0", "--save_every", "0"])
            key = tuple(getattr(cfg, setting) for setting in BUILT)                  # methods share what is built alike
            if key not in models:
                model = build(cfg)
                models[key] = model, operations_of(model, cfg)
            model, each = models[key]
            prompts = read_prompts(cfg.prompts)[: cfg.prompts_per_iteration]
            scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, prompts)
            books[name] = cfg, model, each, scorers, run.Run(cfg, model, scorers), loop, prompts
        for repeat in range(warm + repeats):
            for name, (cfg, model, each, scorers, book, loop, prompts) in books.items():
                cfg.iterations = repeat + 1                     # one more than are done
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), recorded(model, scorers, book.opt) as (calls, apart):
                    began = now(model.device)
                    loop(cfg, model, scorers, book)
                    iteration = now(model.device) - began
                log = book.lines()[-1]
                if log["skipped"]:
                    raise ArithmeticError(f"{methods[name][0]}: the gradient is not finite, so nothing was updated")
                if log["flat_groups"]:
                    print(f"{methods[name][0]}: {log['flat_groups']} groups had equal rewards", file=sys.stderr)
                seconds = dict(iteration=iteration, rollout=log["seconds_rollout"] - apart["decode"], decode=apart["decode"], reward=log["seconds_reward"],
                               update=log["seconds_update"] - apart["optimizer"], optimizer=apart["optimizer"])
                if repeat == 0:
                    found[name] = settings_of(cfg, calls) | dict(flops=flops_of(each, calls))
                if bare:
                    began = now(model.device)
                    replay(model, scorers, calls, prompts)
                    seconds["bare"] = now(model.device) - began
                    seconds["ratio"] = iteration / seconds["bare"]
                    if repeat == 0:
                        found[name]["memory"] = memory_of(lambda: replay(model, scorers, calls, prompts), model)
                tries[name].append(seconds)
                print(f"{repeat + 1}/{warm + repeats} {methods[name][0]}: {iteration:.2f} s", file=sys.stderr, flush=True)
    for name, each in tries.items():
        found[name].update({key: statistics.median(one[key] for one in each[warm:]) for key in each[0]}, tries=each)
    return found

def parsed(script, words):
    """Settings of a run that is not begun."""
    with tempfile.TemporaryDirectory() as folder:
        return SCRIPTS[script][0]([*words, "--out_dir", folder])

def settings_of(cfg, calls):
    """Table 3's columns. NFE: latents the network was asked about, over images."""
    branch, images = cfg.method == "branch", cfg.prompts_per_iteration * cfg.group_size
    nfe_old, nfe_theta = (sum(size[0] for what, size, trained in calls if what == "velocity" and trained == wanted) / images for wanted in (False, True))
    return dict(solver=SOLVERS[cfg.solver], nfe_old=nfe_old, G=cfg.group_size, B="adapt" if branch else cfg.num_anchors or cfg.group_size, K="all" if branch else cfg.num_train_steps, nfe_theta=nfe_theta)

def memory_of(call, model):
    """Peak bytes; on a CPU those beyond the weights."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with Live(model.transformer) as live:
        call()
    return live.peak

def operations(config, tokens, text, rank=0, recomputed=0):
    """Floating point operations of a transformer for one latent -> (forward, forward and backward), as torch counts them on tensors without numbers; of matrix products only (on a CPU it does not count attention's otherwise)."""
    with torch.device("meta"):
        net = FluxTransformer2DModel.from_config(config).requires_grad_(not rank)
    if rank:
        add_lora(net, rank)                                     # a backward pass then costs as much as a forward pass, without them twice as much
    found = []
    for trained in (False, True):
        if trained:
            recompute(net, recomputed)                           # which is counted
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
            v = net(**inputs_of(net.config, 1, tokens, text, torch.float32))[0]
            if trained:
                v.mean().backward()
        found.append(counter.get_total_flops())
    return found

def operations_of(model, cfg):
    """`operations` of a model that is loaded."""
    return operations(model.transformer.config, model.latent_shape[0], model.encode([""])["txt"].shape[1], cfg.lora_rank, cfg.checkpoint_blocks)

def flops_of(each, calls):
    """Operations of the transformer in recorded calls; `each`: of one latent, without gradients and with."""
    return sum(size[0] * each[trained] for what, size, trained in calls if what == "velocity")

def matmul_rate(device):
    """Floating point operations a second in one large matrix product, of the type the network runs in."""
    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b, seconds = torch.randn(n, n, device=device, dtype=kind), torch.randn(n, n, device=device, dtype=kind), []
    for _ in range(10):
        began = now(device)
        a @ b
        seconds.append(now(device) - began)
    return 2 * n**3 / statistics.median(seconds)

RATES = ("TFLOP", "TFLOP/s", "a matrix product's", "share")

def rates(found, rate):
    """What the transformer had to do in an iteration, that over the iteration's seconds, and its share of a matrix product's rate."""
    flops, seconds = found["flops"], found["iteration"]
    return f"{flops / 1e12:.3g}", f"{flops / seconds / 1e12:.3g}", f"{rate / 1e12:.3g}", f"{flops / seconds / rate:.2f}"

def table(found, rate):
    head = ["Method", "Solver", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", *PHASES, "bare calls", "ratio", *RATES, "GB"]
    def told(value, form):
        return format(value, form) if isinstance(value, float) else value
    rows = [[METHODS[name][0], *(told(f[key], ".4g") for key in ("solver", "nfe_old", "G", "B", "K", "nfe_theta")), *(told(f.get(key, ""), ".3f") for key in ("iteration", *PHASES, "bare", "ratio")),
             *rates(f, rate), f"{f['memory'] / 1e9:.2f}" if "memory" in f else ""] for name, f in found.items()]
    if "dance" in found:
        head += ["of DanceGRPO's s / iter.", "of its rollout and update", "of its TFLOP"]
        for row, f in zip(rows, found.values()):
            row += [f"{sum(f[key] for key in keys) / sum(found['dance'][key] for key in keys):.3f}" for keys in (("iteration",), ("rollout", "update"), ("flops",))]
    return markdown(head, rows)

# ---------------------------------------------------------------------------------------------------------------
# other sizes than the small world's

BLOCKS = {"flux": dict(num_layers=19, num_single_layers=38), "flux-small": dict(num_layers=2, num_single_layers=4), "flux-narrow": dict(num_layers=1, num_single_layers=2, num_attention_heads=2)}
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
           use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)

def random_flux(cfg, geometry, text=512):
    """FLUX.1-dev's transformer, all of it or 2 + 4 of its blocks, and its VAE, with random weights; what text encoders would say is random too. flux-narrow: 1 + 2 blocks of 2 heads and the small
    world's VAE, which takes a tenth of an evaluation then, as FLUX's takes an eighth."""
    kind = torch.bfloat16 if "cuda" in cfg.device else torch.float32
    torch.set_default_dtype(kind)
    with torch.device(cfg.device):
        net, vae = FluxTransformer2DModel(guidance_embeds=True, **BLOCKS[geometry]), {} if geometry == "flux-narrow" else dict(vae=AutoencoderKL(**VAE))
    torch.set_default_dtype(torch.float32)
    model = train.load(dataclasses.replace(cfg, model=FluxPipeline.from_pretrained(train.PRESETS["tiny"]["model"], transformer=net if cfg.lora_rank else net.float(), **vae)))
    model.pipe.encode_prompt = lambda prompts, *_, **how: (torch.randn(len(prompts), text, 4096, dtype=kind), torch.randn(len(prompts), 768, dtype=kind), None)
    return model

SIZES = {"tiny": "", "flux": "--resolution 720 --lora_rank 64 --checkpoint_blocks -1 --prompts_per_iteration 1"}
SIZES |= {"flux-small": SIZES["flux"].replace("720", "256"), "flux-narrow": "--prompts_per_iteration 1"}
LADDER = {                                                      # step: its flags
    "blocks as they are, all recomputed": "--no-compile --checkpoint_blocks -1",
    "compiled": "--compile --checkpoint_blocks -1",
    "blocks as they are, nothing recomputed": "--no-compile --checkpoint_blocks 0",
    "compiled, nothing recomputed": "--compile --checkpoint_blocks 0",
}

def ladder(repeats, geometry, flags):
    """An iteration of Neighbor GRPO with 8 steps by each step of the ladder: in turn on the small world, elsewhere one after the other, for only one of the models may fit."""
    device = torch.device(parsed("train.py", flags).device)
    print(markdown(["step", "s / iter.", *PHASES, *RATES, "GB"], []), flush=True)
    for names in [[*LADDER][:-1], [*LADDER][-1:]] if geometry == "tiny" else [[name] for name in LADDER]:
        torch.compiler.reset()
        if device.type == "cuda":
            gc.collect()                                        # the last step's model; the next one needs the room
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps, found = {}, {}
        for name in names:
            with contextlib.suppress(SystemExit):               # no torchao, no GPU: train.py has said so
                parsed("train.py", [*flags, *LADDER[name].split()])
                steps[name] = name, "train.py", LADDER[name]
        try:
            found = measure(steps, repeats, flags, lambda cfg: build(cfg, geometry), bare=False, warm=1)
        except Exception as error:                              # too little memory; no such attention here: the other steps still count
            print(f"{', '.join(names)}: {type(error).__name__}: {error}", file=sys.stderr)
        rate, memory = matmul_rate(device), f"{torch.cuda.max_memory_allocated() / 1e9:.0f}" if device.type == "cuda" else ""
        for name in names:
            row = [f"{found[name][key]:.2f}" for key in ("iteration", *PHASES)] + [*rates(found[name], rate), memory] if name in found else ["not here, as said above"]
            print(line([name, *row]), flush=True)

def decoding(vae, side):
    """Operations of making one picture from a latent of side x side."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(vae.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(torch.empty(1, vae.config.latent_channels, side, side, device="meta"))
    return counter.get_total_flops()

def floor(tokens=45 * 45, text=512, rank=64):
    """The operations of one group's iteration by each method, FLUX.1-dev at 720x720: the transformer's matrix products, which no implementation is spared."""
    with torch.device("meta"):
        config, vae = FluxTransformer2DModel(guidance_embeds=True).config, AutoencoderKL(**VAE)
    kinds = {f"{what}, {how}": (of, blocks) for what, of in ((f"LoRA {rank}", rank), ("all weights", 0)) for how, blocks in (("nothing recomputed", 0), ("all recomputed", -1))}
    costs = {kind: operations(config, tokens, text, *how) for kind, how in kinds.items()}
    print("one latent of FLUX.1-dev, in TFLOP: " + "; ".join(f"{kind}: forward {forward / 1e12:.2f}, with backward {both / 1e12:.2f}" for kind, (forward, both) in costs.items()) + f"; decoding it {decoding(vae, 90) / 1e12:.2f}")
    cfg = parsed("train.py", [])
    small = train.load(cfg)
    forward, both = operations_of(small, cfg)
    print(f"one of the small world's, in GFLOP: forward {forward / 1e9:.3f}, with backward {both / 1e9:.3f}; decoding it {decoding(small.pipe.vae, 2 * small.side) / 1e9:.3f}\n")
    head, rows, rival = ["Method", "G", "NFE_old", "NFE_theta", *(text for kind in kinds for text in (f"PFLOP, {kind}", "of DanceGRPO's"))], [], None
    for name, (label, script, own) in METHODS.items():
        cfg = parsed(script, own.split())
        old, theta = baselines.nfe(cfg) if script == "-m paper.baselines" else (cfg.num_rollout_steps, cfg.num_anchors * cfg.num_train_steps / cfg.group_size)
        sums = [cfg.group_size * (old * forward + theta * both) for forward, both in costs.values()]
        rival = rival or sums                                   # the first is DanceGRPO
        rows.append([label, cfg.group_size, f"{old:.4g}", f"{theta:.4g}", *(text for one, its in zip(sums, rival) for text in (f"{one / 1e15:.2f}", f"{one / its:.3f}"))])
    print(markdown(head, rows))

def build(cfg, geometry):
    return train.load(cfg) if geometry == "tiny" else random_flux(cfg, geometry)

def inputs_of(config, n, tokens, text, kind):
    """What the network is called with, without numbers."""
    x = lambda *shape: torch.empty(*shape, dtype=kind, device="meta")
    return dict(hidden_states=x(n, tokens, config.in_channels), timestep=x(n), guidance=x(n) if config.guidance_embeds else None, encoder_hidden_states=x(n, text, config.joint_attention_dim),
                pooled_projections=x(n, config.pooled_projection_dim), img_ids=x(tokens, 3), txt_ids=x(text, 3), return_dict=False)

def batching(cfg, geometry, repeats):
    """Forwards and backwards of one prompt's B anchors: all in one, or one by one, in turn; medians. (A loop's forward has B / updates_per_iteration anchors of each of its prompts.)"""
    model = build(cfg, geometry)
    model.batch = 0                                             # at once is at once
    cond, x, tries = model.encode(read_prompts(cfg.prompts)[:1]), torch.randn(cfg.num_anchors, *model.latent_shape, device=model.device), []
    for repeat in range(repeats + 1):                           # one to warm up
        seconds = []
        for parts in (1, cfg.num_anchors):
            began = now(model.device)
            for some in x.chunk(parts):
                model.velocity(some, 0.5, cond).mean().backward()
            seconds.append(now(model.device) - began)
            model.transformer.zero_grad()
        tries.append(seconds)
        print(f"{repeat}/{repeats}: {cfg.num_anchors} at once {seconds[0]:.2f} s, one by one {seconds[1]:.2f} s", file=sys.stderr, flush=True)
    together, alone = (statistics.median(each) for each in zip(*tries[1:]))
    ratio = statistics.median(one / all_of_them for all_of_them, one in tries[1:])
    print(f"{geometry}, {cfg.resolution}x{cfg.resolution}: forward and backward of {cfg.num_anchors} anchors at once {together:.3f} s, one by one {alone:.3f} s: {ratio:.2f} times (medians of {repeats}; {cfg.device}, {torch.get_num_threads()} threads)")

GROWTH = {                                                      # setting: its values; the others are dpm8's
    "group_size": (4, 8, 12, 18, 24),
    "num_rollout_steps": (5, 8, 12, 16, 25),
    "num_anchors": (2, 4, 8, 12),
    "num_train_steps": (1, 2, 4, 7),
    "resolution": (32, 64, 96, 128),
}

def scaling(repeats, flags, folder):
    """Seconds of an iteration against G, T, B, K and pixels: a line through each, and how far from it they are."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    methods = {f"{key} {value}": (f"{key} {value}", "train.py", f"--{key} {value}") for key, values in GROWTH.items() for value in values}
    found = measure(methods, repeats, flags, bare=False)
    figure, panels = plt.subplots(1, len(GROWTH), figsize=(3.2 * len(GROWTH), 3), layout="constrained", sharey=True)
    rows = []
    for panel, (key, values) in zip(panels, GROWTH.items()):
        x, y = np.array(values, float) ** (2 if key == "resolution" else 1), np.array([found[f"{key} {value}"]["iteration"] for value in values])
        slope, start = np.polyfit(x, y, 1)
        shown = x / 1000 if key == "resolution" else x
        panel.plot(shown, y, "o")
        panel.plot(shown, start + slope * x)
        panel.set(xlabel="1,000 pixels" if key == "resolution" else key)
        rows.append([key, ", ".join(map(str, values)), ", ".join(f"{one:.2f}" for one in y), f"{start:.2f} + {slope:.3g} x", f"{abs(y / (start + slope * x) - 1).max():.0%}"])
    panels[0].set(ylabel="seconds an iteration", ylim=(0, None))
    figure.savefig(folder / "scaling.png", dpi=120)
    text = markdown(["setting", "values", "s / iter.", "line", "furthest from it"], rows)
    (folder / "scaling.md").write_text(f"`{' '.join(['python -m paper.bench --scaling --repeats', str(repeats), *flags])}` ({torch.get_num_threads()} CPU threads; medians; what is not named is dpm8's).\n\n{text}\n")
    print(text)

def line(row):
    return "| " + " | ".join(map(str, row)) + " |"

def markdown(head, rows):
    return "\n".join(map(line, [head, ["---"] * len(head), *rows]))

# ---------------------------------------------------------------------------------------------------------------
# memory: the networks are run with tensors that have shapes and no numbers

class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive; `peak`: the most there ever were."""

    def __init__(self, network):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {w.untyped_storage()._cdata for w in network.parameters()}       # views of weights are not new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

def working_set(net, call, train):
    """Peak bytes of a forward pass, or of one and its backward pass, beyond weights and their gradients."""
    for w in net.parameters():
        if w.requires_grad:
            w.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    with torch.set_grad_enabled(train), Live(net) as live:
        result = call()
        if train:
            result.float().mean().backward()
    return live.peak

def memory(G=12, at_once=2, tokens=45 * 45, text=512, rank=64):
    """One process's GPU memory for FLUX.1-dev by --preset dpm8 (720x720) with the paper's three rewards, in GB of 1e9 bytes."""
    def net(**how):
        with torch.device("meta"):
            return FluxTransformer2DModel(guidance_embeds=True).bfloat16().requires_grad_(bool(how))
    def call(net, M, batch=None):
        n = batch or M
        inputs = inputs_of(net.config, n, tokens, text, torch.bfloat16)
        return lambda: torch.cat([net(**inputs)[0] for _ in range(M // n)])
    frozen, whole, adapted = net(), net(train=True), net()
    add_lora(adapted, rank)
    adapters = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    n, block = (sum(w.numel() for w in part.parameters()) for part in (frozen, frozen.transformer_blocks[0]))
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE).bfloat16()
    z = torch.empty(G, 16, 90, 90, dtype=torch.bfloat16, device="meta")
    rollout, decode = working_set(frozen, call(frozen, G), False), working_set(vae, lambda: vae.decode(z, return_dict=False)[0], False)
    update = {}
    for kind, network in (("lora", adapted), ("full", whole)):
        for checkpointing in (True, False):
            network.enable_gradient_checkpointing() if checkpointing else network.disable_gradient_checkpointing()
            update[kind, checkpointing] = working_set(network, call(network, at_once), True)
    adapted.enable_gradient_checkpointing()
    several = working_set(adapted, call(adapted, 8 * at_once, 4), True)
    encoders, scorers = 2 * (4.762e9 + 0.123e9) + 2 * 0.084e9, 4 * (0.986e9 + 0.986e9 + 0.478e9)         # T5, CLIP, VAE in bf16; HPSv2.1, PickScore, ImageReward in float32
    print(f"transformer {n / 1e9:.2f} B parameters, a block up to {block / 1e9:.2f} B; LoRA {rank}: {adapters / 1e6:.0f} M; rollout of {G}: {rollout / 1e9:.1f} GB, decoding them {decode / 1e9:.1f}, "
          f"{at_once} anchors: {update['lora', True] / 1e9:.1f} (LoRA) or {update['full', True] / 1e9:.1f} (all) with checkpointing, {update['lora', False] / 1e9:.0f} or {update['full', False] / 1e9:.0f} without\n")
    print("| what | GPUs | weights | gradients, moments | encoders, VAE | scorers | rollout | update | peak |\n|---|---|---|---|---|---|---|---|---|")
    def row(what, gpus, weights, trained, roll, step, text_encoders=encoders):
        parts = (weights, trained, text_encoders, scorers, roll, step)
        print(line([what, gpus, *(f"{part / 1e9:.1f}" for part in parts), f"{(sum(parts[:4]) + max(parts[4:])) / 1e9:.0f}"]))
    for gpus in (1, 8, 32):
        row(f"`--lora_rank {rank}`", gpus, 2 * n + 4 * adapters, (12 + 4 * (gpus > 1)) * adapters, max(rollout, decode), update["lora", True])       # DDP's buckets hold gradients once more
    row(f"`--lora_rank {rank} --text_encoder_device offload`", 1, 2 * n + 4 * adapters, 12 * adapters, rollout, update["lora", True], 2 * 0.084e9)
    row("the same, `--prompts_per_iteration 8 --batch 4`", 1, 2 * n + 4 * adapters, 12 * adapters, max(working_set(frozen, call(frozen, 4), False), decode / G * 4), several, 2 * 0.084e9)
    row("all weights", 1, 4 * n, 12 * n, rollout, update["full", True])
    for gpus in (8, 32):                                        # two blocks gathered at a time in bf16, and their gradients in float32 on the way out
        row("`--fsdp`", gpus, 4 * n / gpus, 12 * n / gpus, rollout + 2 * block * 2, update["full", True] + 2 * block * (2 + 4))
        row("`--fsdp --gather`", gpus, 4 * n / gpus, 12 * n / gpus, rollout + 2 * n, update["full", True] + (2 + 4) * n)

# ---------------------------------------------------------------------------------------------------------------

MODES = {                                                       # what else it does: (how --help says it, which options it takes)
    "ladder": ("what each step of the fast path brings, Neighbor GRPO with 8 steps", ("repeats", "geometry", "settings")),
    "batching": ("B anchors in one forward against B forwards", ("repeats", "geometry", "settings")),
    "scaling": ("seconds against G, T, B, K and pixels, into results/scaling.md and .png", ("repeats", "settings")),
    "floor": ("the operations of an iteration at FLUX.1-dev's size, counted without a GPU", ()),
    "memory": ("the GPU memory FLUX.1-dev takes", ()),
}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", default=",".join(METHODS), help="by comma, of " + ", ".join(METHODS))
    parser.add_argument("--repeats", type=int, default=5, help="iterations that count (default 5)")
    parser.add_argument("--warm", type=int, default=2, help="iterations before them (default 2)")
    parser.add_argument("--bare", action=argparse.BooleanOptionalAction, default=True, help="after each iteration its network calls alone, for the ratio and the memory (default yes)")
    parser.add_argument("--geometry", choices=[*SIZES], default="tiny", help="tiny, the small world; flux, FLUX.1-dev's, 720x720; flux-small, 2 + 4 of its blocks, 256x256; both with random weights, "
                        "LoRA 64, all blocks recomputed, one prompt, unless settings say otherwise; flux-narrow, 1 + 2 blocks of 2 heads beside a VAE that weighs as little as FLUX's, 64x64 (default tiny)")
    parser.add_argument("--json", default="", help="where the numbers go")
    modes = parser.add_mutually_exclusive_group()
    for mode, text in MODES.items():
        modes.add_argument(f"--{mode}", action="store_true", help=f"instead: {text[0]}")
    args, flags = parser.parse_known_args()
    mode = next((mode for mode in MODES if getattr(args, mode)), "")
    allowed = MODES[mode][1] if mode else ("only", "repeats", "warm", "bare", "geometry", "json", "settings")
    given = [key for key in ("only", "repeats", "warm", "bare", "geometry", "json") if getattr(args, key) != parser.get_default(key)] + ["settings"] * bool(flags)
    for key in given:
        if key not in allowed:
            parser.error(f"--{mode} has no use for {' '.join(flags) if key == 'settings' else f'--{key}'}")
    if args.repeats < 1 or args.warm < 0:
        parser.error("--repeats must be at least 1, --warm at least 0")
    names = [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--only has {unknown[0]!r}, but must be of {', '.join(METHODS)}")
    if args.geometry == "flux" and not torch.cuda.is_available():
        parser.error("--geometry flux needs a GPU")
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")
    if mode == "floor":
        return floor()
    if mode == "memory":
        return memory()
    flags = [*SIZES[args.geometry].split(), *flags]
    for _, script, own in [METHODS[name] for name in (["dpm8"] if mode else names)]:
        cfg = parsed(script, [*flags, *own.split()])            # refused before anything is built
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if mode == "scaling":
        return scaling(args.repeats, flags, Path(__file__).parent / "results")
    if mode == "ladder":
        return ladder(args.repeats, args.geometry, flags)
    if mode == "batching":
        return batching(cfg, args.geometry, args.repeats)
    found = measure({name: METHODS[name] for name in names}, args.repeats, flags, lambda cfg: build(cfg, args.geometry), args.bare, args.warm)
    print(table(found, matmul_rate(torch.device(cfg.device))))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))

if __name__ == "__main__":
    main()
