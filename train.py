"""
Align a FLUX model with a reward by Neighbor GRPO, Algorithm 1 of arXiv 2511.16955.
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python train.py                                   # the small FLUX in tiny/: minutes on two CPU cores, no download
    python train.py --rewards clip,jpeg --reward_weights 2,1 --out_dir out/two     # other rewards
    torchrun --nproc_per_node 8 train.py --preset dpm8 --prompts hpdv2_train --fsdp       # FLUX.1-dev, a row of the paper's Table 3, with its three rewards

This file owns randomness, files and printing, and puts the others in order; the formulas are in neighbor_grpo.py.
"""
import argparse, atexit, contextlib, datetime, importlib.util, json, math, os, shutil, signal, socket, sys, tempfile, time, warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
import rewards
from eval import check_model, draw_curve, evaluate, mean_and_stderr, picture_grid, read_prompts, split, spread
from model import BACKENDS, Flux
from neighbor_grpo import advantages, clip_fraction, clipped_objective, combine_rewards, log_ratio, perturb_noise
from solvers import ddim_step, rollout, schedule

warnings.filterwarnings("ignore", message="torch.distributed is disabled")          # one process writes its checkpoint alone: that is meant
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")          # FLUX's are never changed in place
HERE = Path(__file__).resolve().parent
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))      # torchrun's
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
AGENT = f"{socket.gethostname()} {os.getppid()}"                # the torchrun that started us: after a restart still the same

# ---------------------------------------------------------------------------------------------------------------
# settings: defaults < preset < command line

def option(default, text, allowed=""):
    """`allowed`: an interval, or the words to choose from."""
    return field(default=default, metadata=dict(help=text, allowed=allowed))

@dataclass
class Config:
    model: str = option("black-forest-labs/FLUX.1-dev", "FluxPipeline directory or hub id")
    prompts: str = option("", "training prompts: a text file, one a line; HPDv2's JSON; or hpdv2_train")
    eval_prompts: str = option("", "held-out prompts, likewise; empty: 8 of the training prompts, for their pictures")
    rewards: str = option("hpsv2,pickscore,imagereward", f"what to align with (Sec. 4), by comma, of {', '.join(rewards.SCORERS)}; name=where for weights elsewhere")
    reward_weights: str = option("", "one number per reward, by comma; empty: equal (Sec. 4.1)")
    eval_scorers: str = option("", "further scorers that only watch, by comma")
    out_dir: str = option("", "where the run is written; unless told, out/<preset>, or out/<method>")
    resolution: int = option(720, "side of the images in pixels, a multiple of 16", "[16, 8192]")
    guidance: float = option(3.5, "FLUX's guidance input", "(-inf, inf)")
    shift: float = option(3.0, "timestep shift of the schedule", "[0.01, 100]")
    iterations: int = option(300, "M of Algorithm 1 (Sec. 4)", "[1, inf)")
    prompts_per_iteration: int = option(0, "groups in an iteration, divided among the processes; 0: one each (Sec. 4)", "[0, inf)")
    group_size: int = option(12, "G, candidates in a group (Table 3)", "[2, inf)")
    num_anchors: int = option(4, "B, anchors drawn from the G (Sec. 3.4.1, Table 5)", "[1, inf)")
    num_rollout_steps: int = option(8, "T, steps of a rollout (NFE_old, Table 3)", "[2, inf)")
    num_train_steps: int = option(4, "K, times trained on, drawn from the first T-1 (Table 3)", "[1, inf)")
    solver: str = option("dpmpp_2m", "of the rollout (Sec. 3.4.3); training steps are DDIM's", ("ddim", "dpmpp_2m"))
    old_anchor: str = option("replay", "x_old of Eq. 10: replay, the rollout's velocity through a DDIM step; rollout, its latent (Alg. 1)", ("replay", "rollout"))
    updates_per_iteration: int = option(2, "optimizer steps among which the B anchors are divided (Alg. 1: B; the same authors' arXiv 2603.17461: 2)", "[1, inf)")
    sigma: float = option(0.3, "strength of the perturbation (Eq. 7, Table 4)", "(0, 1]")
    p: float = option(0.8, "exponent of the quasi-norm; 2 is GRPO (Eq. 11, Table 6)", "(0, 2]")
    tau: str = option("dim", "temperature of the policy (Eq. 8): a number, 1 in the paper, or dim for D, a mean over dimensions")
    clip_eps: float = option(1e-4, "half width of the trust region of rho (Eq. 9)", "(0, inf)")
    lr: float = option(1e-5, "AdamW's learning rate (Sec. 4)", "(0, 1]")
    weight_decay: float = option(1e-4, "AdamW's weight decay", "[0, 1]")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", "(0, inf)")
    max_skips: int = option(10, "updates in a row without a finite gradient that end the run", "[1, inf)")
    lora_rank: int = option(0, "train LoRA adapters of this rank, with alpha twice it, and nothing else; 0: all weights", "[0, 1024]")
    ema: float = option(0.0, "decay of an exponential average of the trained weights, which is then evaluated and saved; 0: none", "[0, 1)")
    fsdp: bool = option(False, "divide weights, gradients and AdamW's moments among the processes, where one GPU cannot hold them")
    gather: bool = option(False, "with fsdp: keep all weights on every GPU from one update to the next, and all gradients till the end of one; faster, where there is room")
    checkpoint_blocks: int = option(-1, "of so many blocks the activations are recomputed in the backward pass, for memory; FLUX.1-dev has 57; -1: of all", "[-1, inf)")
    compile: bool = option(torch.cuda.is_available(), "compile the transformer's blocks: minutes at the start, faster from then on")
    attention: str = option("", "diffusers' attention backend, one of torch's such as _native_cudnn or _native_flash (others may not train); empty: torch chooses")
    float8: bool = option(False, "roll out with the blocks' linear layers in float8 (pip install torchao); what is trained keeps its precision, and the ratio its 1 (old_anchor)")
    batch: int = option(0, "latents at most in one forward pass, for memory where a process holds several groups; 0: all of them at once", "[0, inf)")
    text_encoder_device: str = option("", "where T5 and CLIP live: empty, beside the transformer; cpu; or offload, on the CPU between uses", ("", "cpu", "offload"))
    seed: int = option(0, "of prompts, noise, anchors and steps", "[0, 1e18]")
    eval_steps: int = option(0, "steps of DPM-Solver++ in evaluations; 0: solver and steps are the rollout's", "[0, inf)")
    eval_every: int = option(25, "iterations between evaluations; 0: none at all", "[0, inf)")
    save_every: int = option(50, "iterations between checkpoints; 0: only at the end", "[0, inf)")
    keep: int = option(0, "only so many of the newest checkpoints stay; 0: all", "[0, inf)")
    resume: bool = option(False, "go on from the newest checkpoint in out_dir")
    overwrite: bool = option(False, "delete the run that is in out_dir")
    wandb: str = option("", "Weights & Biases project that is sent every line of the log; empty: none")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    threads: int = option(0, "CPU threads; 0: torch's own choice", "[0, 1024]")
    method: ClassVar = "neighbor"                               # baselines.py has others
    code: ClassVar = ("neighbor_grpo.py",)

    def __post_init__(self):
        self.prompts_per_iteration = self.prompts_per_iteration or WORLD
        self.device = f"cuda:{LOCAL_RANK}" if self.device == "cuda" else self.device

    def plan(self):
        """What an iteration costs, in a line."""
        P, G, T, B, K, U = self.prompts_per_iteration, self.group_size, self.num_rollout_steps, self.num_anchors, self.num_train_steps, self.updates_per_iteration
        return (f"{P} prompts x G {G} x T {T} = {P * G * T} forwards ({self.solver}), {P} x B {B} x K {K} = {P * B * K} trained steps in {U} update{'s' * (U > 1)}; "
                f"NFE_old {T}, NFE_theta {B * K / G:.2f}")

    def rules(self):
        """What the settings of the method must fulfil, and the sentence to say where they do not."""
        return [
            (self.tau == "dim" or 0 < _number(self.tau) < math.inf, f"tau is {self.tau}, but must be a number above 0, or dim"),
            (self.num_anchors <= self.group_size, f"num_anchors (B) is {self.num_anchors}, but must lie between 1 and group_size (G), {self.group_size}"),
            (self.num_train_steps <= self.num_rollout_steps - 1, f"num_train_steps (K) is {self.num_train_steps}, but must lie between 1 and T-1, "
                                                                 f"{self.num_rollout_steps - 1}: the last step is never trained"),
            (self.num_anchors % self.updates_per_iteration == 0, f"updates_per_iteration is {self.updates_per_iteration}, but must divide num_anchors (B), {self.num_anchors}"),
        ]

PRESETS = {
    "tiny": dict(model=str(HERE / "tiny/flux"), prompts=str(HERE / "tiny/prompts/train.txt"), eval_prompts=str(HERE / "tiny/prompts/test_concept.txt"),
                 rewards="clip", eval_scorers="judge", resolution=64, shift=1.0, iterations=150, prompts_per_iteration=8, lr=5e-5, checkpoint_blocks=0, compile=False),
    "ddim25": dict(solver="ddim", num_rollout_steps=25, num_anchors=12, num_train_steps=4),           # the rows of Table 3
    "dpm16": dict(solver="dpmpp_2m", num_rollout_steps=16, num_anchors=4, num_train_steps=9),
    "dpm8": dict(solver="dpmpp_2m", num_rollout_steps=8, num_anchors=4, num_train_steps=4),
}

def parse_config(argv=None, config=Config, methods={}, about=__doc__):
    """Command line -> Config, or exit code 2 with one sentence, before any model is loaded. baselines.py has a Config of its own, and settings for each --method."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python %(prog)s [--preset tiny|ddim25|dpm16|dpm8] [--setting value ...]")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="(default tiny)")
    for f in fields(config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        shown = [os.path.relpath(value, HERE) if str(value).startswith(str(HERE)) else value or (value if f.type is not str else "empty")
                 for value in (f.default, PRESETS["tiny"].get(f.name, f.default))]
        allowed = f.metadata["allowed"] if isinstance(f.metadata["allowed"], str) else " or ".join(filter(None, f.metadata["allowed"]))
        notes = [allowed] * bool(allowed) + [f"default {shown[0]}"] + [f"tiny: {shown[1]}"] * (shown[0] != shown[1]) + [f"{method}: {row[f.name]}" for method, row in methods.items() if f.name in row]
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({'; '.join(notes)})".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    preset, method = given.pop("preset"), given.get("method", "")
    settings = {"out_dir": f"out/{method or preset}", **PRESETS[preset], **methods.get(method, {}), **given}
    cfg = config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings})
    if max(everyone(RESTARTS)) and any(everyone(AGENT in begun_by(cfg.out_dir)["agents"])):     # torchrun --max-restarts began us anew after a process died; each
        cfg.resume = bool(checkpoints(cfg.out_dir))                                             # node counts its own restarts. A run that was refused stays refused
        cfg.overwrite = not cfg.resume
        if ended := begun_by(cfg.out_dir)["ended"]:
            sys.exit(ended + " (so this run had ended, and is not started again)" if RANK == 0 else 1)
    try:
        problem = check(cfg)
    except ValueError as error:
        problem = str(error)
    for problem in filter(None, everyone(problem)):             # of any process
        parser.error(problem) if RANK == 0 else sys.exit(2)
    return cfg

def check(c):
    """Raise ValueError, in one sentence that says what is allowed, for the first setting that cannot work."""
    for f in fields(c):
        value, allowed = getattr(c, f.name), f.metadata["allowed"]
        if isinstance(allowed, tuple) and value not in allowed:
            raise ValueError(f"{f.name} is {value}, but must be {' or '.join(word or 'empty' for word in allowed)}")
        if isinstance(allowed, str) and allowed and not inside(value, allowed):
            raise ValueError(f"{f.name} is {value:g}, but must lie in {allowed}")
    names, weights = rewards.parse(c.rewards), [_number(w) for w in split(c.reward_weights)]
    rewards.parse(f"{c.rewards},{c.eval_scorers}")
    rules = [
        *c.rules(),
        (c.prompts_per_iteration % WORLD == 0, f"prompts_per_iteration is {c.prompts_per_iteration}, but must be divisible among {WORLD} processes, which hold whole groups"),
        (not c.fsdp or WORLD > 1, "fsdp divides a model among processes, and there is one; start it with torchrun --nproc_per_node"),
        (not (c.fsdp and c.lora_rank), "fsdp and lora_rank exclude each other; adapters fit on every GPU"),
        (c.fsdp or not c.gather, "gather is for fsdp"),
        (c.resolution % 16 == 0, f"resolution is {c.resolution}, but must be a multiple of 16"),
        (c.device == "cpu" or (c.device.startswith("cuda") and torch.cuda.is_available()), f"device is {c.device}, but must be cpu, or cuda where there is one"),
        (not c.attention or c.attention in BACKENDS, f"attention is {c.attention}, but must be empty or one of diffusers' backends: {', '.join(BACKENDS)}"),
        (c.attention != "_native_cudnn" or c.device != "cpu", "attention is _native_cudnn, but that needs a GPU"),
        (not c.float8 or importlib.util.find_spec("torchao"), "torchao is not installed; pip install torchao, or leave --float8 out"),
        (not c.float8 or c.device == "cpu" or torch.cuda.get_device_capability() >= (8, 9), "float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more"),
        (not c.wandb or importlib.util.find_spec("wandb"), "wandb is not installed; pip install wandb, or leave --wandb out"),
        (names, f"rewards is empty; name what to align with, of {', '.join(rewards.SCORERS)}"),
        (not c.reward_weights or (len(weights) == len(names) and all(0 <= w < 1e30 for w in weights) and sum(weights) > 0),
         f"reward_weights is {c.reward_weights}, but must be one number >= 0, not all 0, for each of {c.rewards}"),
        (c.prompts, "prompts is empty; name a text file with one prompt a line, or hpdv2_train"),
        (c.out_dir and Path(c.out_dir).resolve() != HERE, f"out_dir is {c.out_dir or 'empty'}; name a directory for this run"),
        (not (c.resume and c.overwrite), "resume and overwrite exclude each other; give one of them"),
        (not (c.overwrite and Path(c.out_dir).resolve() in Path(c.model).resolve().parents), f"model {c.model} lies in {c.out_dir}, which --overwrite would delete"),
    ]
    for holds, sentence in rules:
        if not holds:
            raise ValueError(sentence)
    read_prompts(c.prompts)
    if c.eval_prompts:
        read_prompts(c.eval_prompts)
    check_model(c.model)
    out = Path(c.out_dir)
    if c.resume:
        if not checkpoints(out):
            raise ValueError(f"there is no checkpoint in {out} to resume from")
        try:
            before = dict(json.loads((checkpoints(out)[-1] / "state/config.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{broken(checkpoints(out)[-1], error)}")
        free = ("iterations", "eval_every", "save_every", "keep", "max_skips", "checkpoint_blocks", "compile", "attention", "batch", "fsdp", "gather", "text_encoder_device", "wandb", "device", "threads", "out_dir", "resume", "overwrite")
        theirs = before.get("method", "neighbor")
        if c.method != theirs:
            raise ValueError(f"the run to resume is one of method {theirs}, not {c.method}")
        for name, value in asdict(c).items():
            same = value == before.get(name, value) or name in ("model", "prompts", "eval_prompts") and Path(value).parts[-2:] == Path(before[name]).parts[-2:]     # moved along
            if name not in free and not same:
                raise ValueError(f"{name} is {value}, but was {before[name]} in the run to resume; only {', '.join(free[:-3])} may change")
        if c.eval_every and not before["eval_every"]:
            raise ValueError("eval_every was 0 in the run to resume, so there is no evaluation of the base to compare with; leave it 0, and use eval.py")
    elif any((out / name).exists() for name in OURS) and not c.overwrite:
        raise ValueError(f"{out} already holds a run; use --resume, --overwrite or another --out_dir")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"out_dir {out} cannot be made a directory, or written to: {error.strerror}")

def broken(path, error):
    return f"{path} is broken ({rewards.short(error)}); move it away, and --resume goes on from the checkpoint before it"

def inside(value, interval):
    """Whether a number lies in "(0, 1]"."""
    low, high = map(float, interval[1:-1].split(","))
    return (value >= low if interval[0] == "[" else value > low) and (value <= high if interval[-1] == "]" else value < high)

def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan

# ---------------------------------------------------------------------------------------------------------------
# randomness: every draw depends on the seed, the iteration and the group, never on the process or on what was drawn before

def generator(*key):
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

def pick(cfg, it, group, prompts):
    """The prompt of a group: each once before any comes twice."""
    epoch, place = divmod(it * cfg.prompts_per_iteration + group, len(prompts))
    return prompts[torch.randperm(len(prompts), generator=generator(cfg.seed, 1, epoch))[place]]

def draw(cfg, it, prompts, latent_shape, rank=RANK, world=WORLD):
    """Everything random in iteration `it` for this process's P of all the groups: P prompts, eps* (P, N, C), delta (P, G, N, C), anchors (P, B); steps [K]."""
    P, chosen, eps_star, delta, anchors = cfg.prompts_per_iteration // world, [], [], [], []
    for group in range(rank * P, rank * P + P):
        chosen.append(pick(cfg, it, group, prompts))
        rng = generator(cfg.seed, 2, it, group)
        eps_star.append(torch.randn(latent_shape, generator=rng))
        delta.append(torch.randn(cfg.group_size, *latent_shape, generator=rng))
        anchors.append(torch.randperm(cfg.group_size, generator=rng)[: cfg.num_anchors])
    steps = torch.randperm(cfg.num_rollout_steps - 1, generator=generator(cfg.seed, 3, it))[: cfg.num_train_steps]
    return chosen, torch.stack(eps_star), torch.stack(delta), torch.stack(anchors), sorted(steps.tolist())

# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1

def train(cfg, model, scorers, run):
    """The iterations that are left. `scorers` are what is trained on; `run` holds the optimizer and keeps the books."""
    P, G, U = cfg.prompts_per_iteration // WORLD, cfg.group_size, cfg.updates_per_iteration           # P groups of this process's own
    prompts, weights = read_prompts(cfg.prompts), reward_weights(cfg, len(scorers)).to(model.device)
    ts = schedule(cfg.num_rollout_steps, cfg.shift)                                                   # (T+1,)
    tau = math.prod(model.latent_shape) if cfg.tau == "dim" else float(cfg.tau)
    row = torch.arange(P, device=model.device)[:, None]                                               # (P, 1)  with anchors (P, b), picks from (P, G, ...)
    ratios = torch.vmap(torch.vmap(log_ratio, (None, 0, 0, None)), (0, 0, 0, None))                   # of the b anchors of each of the P groups at once

    for it in run.iterations():
        # Draw prompts, noise, anchors and steps
        seconds, lap = stopwatch(model.device)
        prompt, eps_star, delta, anchors, steps = draw(cfg, it, prompts, model.latent_shape)

        # Roll out G neighbours of one noise for each prompt
        with torch.no_grad(), model.float8():
            cond = model.encode(prompt)
            x1 = torch.cat([perturb_noise(e, d, cfg.sigma) for e, d in zip(eps_star, delta)])         # (P G, N, C)         Eq. 7
            traj, vels = rollout(lambda x, t: model.velocity(x, t, cond), x1.to(model.device), ts, cfg.solver)
            images = model.decode(run.finite(traj[-1]))                                               # (P G, 3, H, W)
            traj, vels = traj.unflatten(1, (P, G)), vels.unflatten(1, (P, G))                         # (T+1, P, G, N, C), (T, ...)
        lap("rollout")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                                                       # {name: (P, G)}
        A = by_group(scores, prompt, lambda r: advantages(combine_rewards(r, weights), cfg.p))        # (P, G)              Eq. 3, 11
        lap("reward")

        # Update: from each anchor, one DDIM step of the model being trained
        log_rhos, trained = [], 0
        for chosen in anchors.to(model.device).chunk(U, dim=1):                                       # (P, b), b = B / U anchors of each group
            for k in steps:                                                                           # K of the first T-1
                average_gradients(cfg, model, last=k == steps[-1])         # over the processes: once an update, not once a step
                x_t = traj[k][row, chosen]                                                            # (P, b, N, C)
                v = model.velocity(x_t.flatten(0, 1), ts[k], cond).unflatten(0, chosen.shape)
                anchor = ddim_step(x_t, v, ts[k], ts[k + 1])                                          # (P, b, N, C)        the only gradient
                if cfg.old_anchor == "replay":                             # the same step with the rollout's velocity, so rho = 1 before the first update
                    anchor_old = ddim_step(x_t, vels[k][row, chosen], ts[k], ts[k + 1])
                else:                                                      # Algorithm 1 to the letter; DPM++ landed elsewhere than a DDIM step would
                    anchor_old = traj[k + 1][row, chosen]
                log_rho = ratios(traj[k + 1], anchor, anchor_old, tau)                                # (P, b, G)           Eq. 8, 10
                J = clipped_objective(log_rho, A[:, None].expand_as(log_rho), cfg.clip_eps)           # ()                  Eq. 9, summed over the anchors
                log_rhos.append(log_rho.detach())
                loss = -J / (chosen.numel() * len(steps))
                loss.backward()
                trained += chosen.numel()
            run.update()
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=len(vels), nfe_theta=trained / (P * G))

def score(scorers, images, prompt):
    """The rewards of P groups' images (P G, 3, H, W): {name: (P, G)}."""
    G = len(images) // len(prompt)
    return {name: scorer(images, [c for c in prompt for _ in range(G)]).unflatten(0, (len(prompt), G)) for name, scorer in scorers.items()}

def by_group(scores, prompt, advantages):
    """`advantages` of each group's M rewards, (M, G) -> (G,); together (P, G). Where a reward is not finite they are nan, which the gradient carries to all
    processes, so that all skip the update. (The scorers of rewards.py raise instead.)"""
    A = torch.full_like(next(iter(scores.values())), torch.nan)
    for g, r in enumerate(torch.stack(list(scores.values()), 1)):                                     # (M, G)
        if r.isfinite().all():
            A[g] = advantages(r)
        else:
            tqdm.write(f"a reward for {prompt[g]!r} is not finite")
    return A

def reward_weights(cfg, count):
    return torch.tensor([float(w) for w in split(cfg.reward_weights)] or [1.0] * count)

def whole(w):
    """A tensor that FSDP divided among the processes, put together again."""
    return w.full_tensor() if isinstance(w, DTensor) else w

def spread_out(cfg, model):
    """Divide the model among the processes (FSDP2: float32 shards, bf16 compute on GPUs), or keep a copy in each (DDP)."""
    if cfg.fsdp:
        mesh, compute = init_device_mesh(model.device.type, (WORLD,)), torch.bfloat16 if model.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)      # autocast casts; t stays float32
        for part in (*model.blocks(), model.transformer):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not cfg.gather)
    elif WORLD > 1:
        model.net = DistributedDataParallel(model.transformer)

def average_gradients(cfg, model, last):
    """Whether the next backward pass, perhaps the last of an update, averages the gradients of all processes. Once an update is enough (what DDP.no_sync does),
    but shards then wait as a whole gradient in float32, 48 GB of FLUX.1-dev: only where --gather says that there is room."""
    if cfg.fsdp:
        model.transformer.set_requires_gradient_sync(last or not cfg.gather)
        model.transformer.set_reshard_after_backward(last or not cfg.gather)      # the weights go with the gradients
    elif WORLD > 1:
        model.net.require_backward_grad_sync = last

def everyone(mine):
    """Something small of every process, in order of rank."""
    if not dist.is_initialized():
        return [mine]
    dist.all_gather_object(all_of_us := [None] * WORLD, mine)
    return all_of_us

def merge(lines):
    """The log lines of all processes as one: means over groups, the sum of flat ones, the slowest clock, the largest ratio; the rest is everyone's."""
    def one(key, values):
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values).nanmean().item()
        return None if values[0] is None else sum(values) if key == "flat_groups" else max(values)
    return {key: one(key, [line[key] for line in lines]) for key in lines[0]}

def stopwatch(device):
    """A dict of seconds per phase, and a function that ends a phase: one host synchronisation each."""
    seconds, last = {}, [time.perf_counter()]
    def lap(name):
        if device.type == "cuda":
            torch.cuda.synchronize()
        key, now = f"seconds_{name}", time.perf_counter()
        seconds[key], last[0] = seconds.get(key, 0) + now - last[0], now
    return seconds, lap

# ---------------------------------------------------------------------------------------------------------------
# the books: log.jsonl, checkpoints, evaluation, pictures

OURS = ("log.jsonl", "config.json", "launch.json", "neighbor_grpo.py", "baselines.py", "before_after.png", "curve.png", "samples", "tensorboard", "wandb")      # what a run writes, beside its checkpoints

def checkpoints(out):
    """The checkpoints in a run's directory, oldest first."""
    found = [path.parents[1] for path in Path(out).glob("checkpoint-*/state/state.pt") if path.parts[-3].removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

def read_log(out):
    """The lines of a run's log, but for those that were cut off or garbled while they were written."""
    found = []
    for line in (Path(out) / "log.jsonl").read_text(errors="replace").split("\n") if (Path(out) / "log.jsonl").exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            found.append(dict(json.loads(line)))
    return found

def cause_of(error):
    """What torch.distributed.checkpoint wraps."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error

def begun_by(out):
    """Which torchruns began the run that is in `out`, and the sentence with which it ended if that will not change by itself."""
    try:
        return json.loads((Path(out) / "launch.json").read_text())
    except (OSError, ValueError):
        return dict(agents=[], ended="")

def discard(path):
    """Renamed before it is deleted, so that half a folder never looks like a whole one."""
    aside = path.with_name(f"{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.replace(path, aside)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()

class Run:
    """What an interrupted run needs to go on, and everything it writes. `iteration`: how many are done; `stop`: begin no other."""

    def __init__(self, cfg, model, scorers):
        self.cfg, self.model, self.scorers, self.out = cfg, model, scorers, Path(cfg.out_dir)
        self.opt = torch.optim.AdamW(model.trained(), lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.999),
                                     fused=model.device.type == "cuda")                  # one kernel, no temporaries of the weights' size
        self.sampler = dict(ts=schedule(cfg.eval_steps or cfg.num_rollout_steps, cfg.shift), solver="dpmpp_2m" if cfg.eval_steps else cfg.solver)
        train_prompts = read_prompts(cfg.prompts)
        self.prompts = read_prompts(cfg.eval_prompts) if cfg.eval_prompts else [train_prompts[i] for i in spread(len(train_prompts), 8)]
        self.ema = [w.detach().clone() for w in model.trained()] if cfg.ema else []
        self.iteration, self.evaluated, self.before, self.stop, self.skips, self.watchers = 0, None, None, False, 0, []
        if cfg.resume:
            path = checkpoints(self.out)[-1]
            try:
                books = torch.load(path / "state/state.pt", map_location="cpu")
                self.iteration, self.before = books["iteration"], books["before"]
                self.restore(path / "state/sharded")
            except (Exception, dcp.CheckpointException) as error:
                raise OSError(broken(path, cause_of(error))) from error
        self.saved = self.iteration
        agents = everyone(AGENT)
        if RANK == 0:
            self.begin(agents)
        everyone(None)                                          # nobody goes on before the files are there

    def begin(self, agents):
        """The files of a new run, or those of a resumed one as they were at its checkpoint."""
        if self.cfg.resume:
            kept = [line for line in self.lines() if line["iter"] <= self.iteration]
            (self.out / "log.new").write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(self.out / "log.new", self.out / "log.jsonl")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            for path in [*checkpoints(self.out), *(self.out / name for name in OURS)]:     # --overwrite: what a run wrote, and nothing else that lies there
                discard(path)
        (self.out / "launch.json").write_text(json.dumps(dict(agents=agents, ended="")))
        (self.out / "log.jsonl").touch()
        for path in [*self.out.glob("checkpoint-*.old"), self.out / "checkpoint.new"]:         # what a kill left
            shutil.rmtree(path, ignore_errors=True)
        (self.out / "config.json").write_text(json.dumps(asdict(self.cfg), indent=1))
        (self.out / "samples").mkdir(exist_ok=True)
        for name in self.cfg.code:                              # the loss this run was made with
            shutil.copy(HERE / name, self.out)
        if importlib.util.find_spec("tensorboard"):             # it is watched where it is installed
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(self.out / "tensorboard", purge_step=self.iteration + 1)
            atexit.register(board.close)
            self.watchers.append(lambda numbers, step: [board.add_scalar(name, number, step) for name, number in numbers.items()])
        if self.cfg.wandb:
            import wandb
            self.watchers.append(wandb.init(project=self.cfg.wandb, config=asdict(self.cfg), dir=self.out).log)

    def weights(self):
        """What is trained; of a sharded model each process's shards, in whose place --gather may have left whole weights."""
        for part in (*self.model.blocks(), self.model.transformer) if self.cfg.gather else ():
            part.reshard()
        return self.model.trained()

    def state(self):
        """What torch.distributed.checkpoint writes and reads: trained weights, AdamW's moments, the average; each process its part."""
        self.weights()
        weights, moments = get_state_dict(self.model.transformer, self.opt, options=StateDictOptions(ignore_frozen_params=True))
        return dict(weights=weights, moments=moments, ema={str(i): w for i, w in enumerate(self.ema)})

    def restore(self, path):
        """From any number of processes to any other."""
        dcp.load(state := self.state(), checkpoint_id=path)
        set_state_dict(self.model.transformer, self.opt, model_state_dict=state["weights"], optim_state_dict=state["moments"],
                       options=StateDictOptions(strict=False))                    # LoRA: the frozen weights are not in it

    def iterations(self):
        """Counts through the iterations that are left; between them, evaluations and checkpoints."""
        c = self.cfg
        with tqdm(range(self.iteration, c.iterations), initial=self.iteration, total=c.iterations, desc="train", disable=True if RANK else None) as self.bar:
            for it in self.bar:
                if any(everyone(self.stop)):
                    return
                self.norms, self.skipped = [], 0
                yield it
                self.iteration = it + 1
                if c.eval_every and (it + 1) % c.eval_every == 0 and it + 1 < c.iterations:
                    self.evaluate()
                if c.save_every and (it + 1) % c.save_every == 0 and it + 1 < c.iterations:
                    self.save()

    def finite(self, latents):
        if not latents.isfinite().all():
            raise ArithmeticError(f"iteration {self.iteration + 1}: the model's latents are no longer finite, so the run ends here; lower lr, now {self.cfg.lr:g}; {self.newest()}")
        return latents

    def update(self, decay=None):
        """An optimizer step with the gradients that have come together, unless one of them, on any process, is not finite. `decay`: of the average, if not cfg.ema."""
        self.norms.append(whole(torch.nn.utils.clip_grad_norm_(self.model.trained(), self.cfg.max_grad_norm)))
        self.skips = 0 if self.norms[-1].isfinite() else self.skips + 1               # the gradient is everyone's, and so is what follows
        if self.skips:
            self.skipped += 1
            tqdm.write(f"iter {self.iteration + 1}: the gradient is not finite; this update is skipped") if RANK == 0 else None
        elif self.norms[-1] > 0:                                # else every group was flat, and momentum alone would move the weights
            self.opt.step()
            if self.ema:
                torch._foreach_lerp_(self.ema, self.weights(), 1 - (self.cfg.ema if decay is None else decay))
        self.opt.zero_grad()
        if self.skips >= self.cfg.max_skips:
            raise ArithmeticError(f"iteration {self.iteration + 1}: {self.skips} updates in a row had no finite gradient; look at the rewards and lower lr, now {self.cfg.lr:g}; {self.newest()}")

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has the average of its weights, if one is kept."""
        kept = [w.detach().clone() for w in self.weights()] if self.ema else []
        self.put(self.ema)
        try:
            yield
        finally:
            self.put(kept)

    @torch.no_grad()
    def put(self, values):
        for w, value in zip(self.weights(), values):
            w.copy_(value)

    def lines(self):
        return read_log(self.out)

    def write(self, line):
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}     # JSON has no nan
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        for watch in self.watchers:
            watch({key: value for key, value in line.items() if key != "iter" and value is not None}, step=line["iter"])

    def log(self, it, scores, A, log_rhos, seconds, nfe_old, nfe_theta):
        """One line of log.jsonl, of all processes, and the same numbers to be read and grepped. Not the loss: it is 0 before the first update whatever the model does.
        scores {name: (P, G)}, A (P, G), log_rhos: ratios in the order of the updates, (..., G) each, or none."""
        weights = reward_weights(self.cfg, len(scores)).to(A.device)
        reward, rhos = sum(w * s for w, s in zip(weights, scores.values())) / weights.sum(), torch.cat([r.flatten() for r in log_rhos]) if log_rhos else None
        line = dict(
            iter=it + 1, reward=reward, reward_std=reward.std(1), **scores,
            first_ratio=None if rhos is None else rhos[: len(rhos) // self.cfg.updates_per_iteration].clamp(max=80).expm1().abs().max().item(),     # of the first update
            clip_fraction=None if rhos is None else clip_fraction(rhos, self.cfg.clip_eps)[None], grad_norm=torch.stack(self.norms), flat_groups=int((A == 0).all(1).sum()),
            skipped=self.skipped, **seconds, nfe_old=nfe_old, nfe_theta=nfe_theta)
        line = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in line.items()}
        line = merge(everyone(line))
        if RANK:
            return
        self.write(line)
        each = " ".join(f"{name} {line[name]:.4f}" for name in scores) + " | " if len(scores) > 1 else ""
        ratios = "" if rhos is None else f"rho1 {1 + line['first_ratio']:.6f} clip {line['clip_fraction']:.2f} | "
        memory = f" | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.model.device.type == "cuda" else ""
        tqdm.write(f"iter {line['iter']:03d}/{self.cfg.iterations} | reward {line['reward']:.4f} +- {line['reward_std']:.4f} | {each}{ratios}"
                   f"gnorm {line['grad_norm']:.2e} | flat {line['flat_groups']} skip {line['skipped']} | "
                   f"roll {line['seconds_rollout']:.2f}s score {line['seconds_reward']:.2f}s update {line['seconds_update']:.2f}s{memory}")
        self.bar.set_postfix_str(f"reward {line['reward']:.4f}")

    def evaluate(self):
        """The same prompts always from the same noise: rewards and watchers into the log, a few pictures beside those of the base."""
        count = -(-len(self.prompts) // WORLD)                  # each process as many, or shards would wait for each other: some prompts come twice
        mine = [(RANK + WORLD * k) % len(self.prompts) for k in range(count)]
        at_once = self.cfg.prompts_per_iteration // WORLD * self.cfg.group_size                                             # what fits in a rollout
        with self.averaged():
            parts = everyone(evaluate(self.model, self.scorers, self.prompts, **self.sampler, seed=1_000_000, batch=at_once, chosen=mine))
        whole_list = lambda pieces: torch.stack(list(pieces), 1).flatten(0, 1)[: len(self.prompts)]                           # (P, 1, ...)
        images, scores = whole_list(images for images, _ in parts), {name: whole_list(scores[name] for _, scores in parts) for name in self.scorers}
        line = dict(iter=self.iteration)
        for name in scores:
            line[f"eval_{name}"], line[f"eval_{name}_stderr"] = mean_and_stderr(scores[name])
        show = spread(len(self.prompts), 8)
        self.evaluated = self.iteration
        self.before = self.before or dict(images=images[show, 0], scores=scores)
        for name in scores:                                     # prompt by prompt, same noise: a finer comparison than two means
            line[f"eval_{name}_gain"], line[f"eval_{name}_gain_stderr"] = mean_and_stderr(scores[name] - self.before["scores"][name])
        if RANK:
            return
        if not any(old["iter"] == self.iteration and "reward" not in old for old in self.lines()):     # a resumed run evaluates its last state again
            self.write(line)
        tqdm.write(f"eval {self.iteration:03d} | {len(self.prompts)} {'held-out' if self.cfg.eval_prompts else 'training'} prompts | " + " | ".join(
            f"{name} {line[f'eval_{name}']:.4f} +- {line[f'eval_{name}_stderr']:.4f}, gain {line[f'eval_{name}_gain']:+.4f} +- {line[f'eval_{name}_gain_stderr']:.4f}" for name in scores))
        rows = {"base": self.before["images"], **({f"aligned, {self.iteration} iterations": images[show, 0]} if self.iteration else {})}
        picture_grid(self.out / f"samples/{self.iteration:06d}.png", rows, [self.prompts[i] for i in show])
        shutil.copy(self.out / f"samples/{self.iteration:06d}.png", self.out / "before_after.png")

    def save(self):
        """checkpoint-<iteration>/: a FluxPipeline directory or adapters, and in state/ what --resume needs. Written aside, then renamed."""
        if self.saved == self.iteration:
            return
        if not all(whole(w.isfinite().all()) for w in self.weights()):
            raise ArithmeticError(f"iteration {self.iteration}: weights are no longer finite, so nothing is saved; lower lr, now {self.cfg.lr:g}; {self.newest()}")
        path, aside = self.out / f"checkpoint-{self.iteration}", self.out / "checkpoint.new"
        try:
            if RANK == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / "state").mkdir(parents=True)
            everyone(None)
            dcp.save(self.state(), checkpoint_id=aside / "state/sharded")
            with self.averaged():
                weights = get_model_state_dict(self.model.transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) if self.cfg.fsdp else None
                if RANK == 0:
                    self.model.save(aside, weights)
            if RANK == 0:
                (aside / "state/config.json").write_text(json.dumps(asdict(self.cfg), indent=1))
                torch.save(dict(iteration=self.iteration, before=self.before), aside / "state/state.pt")
                discard(path)
                os.sync()                                       # or a power cut may leave the new name and empty files
                os.replace(aside, path)
                for old in checkpoints(self.out)[: -self.cfg.keep] if self.cfg.keep else ():
                    discard(old)
        except (Exception, dcp.CheckpointException) as error:   # mostly a full disk, of which each library says something else
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{path} could not be written ({rewards.short(cause_of(error))}), with {shutil.disk_usage(self.out).free / 1e9:.1f} GB free on the disk; {self.newest()}") from error
        self.saved = self.iteration
        everyone(None)                                          # a process that went on alone might die alone

    def newest(self):
        found = checkpoints(self.out)
        return f"{found[-1]} is whole, and --resume goes on from there" if found else "no checkpoint was written before"

    def finish(self):
        """The last checkpoint, and pictures of what happened."""
        self.save()
        if self.cfg.eval_every and self.evaluated != self.iteration:
            self.evaluate()
        if RANK == 0:
            draw_curve(self.lines(), self.out / "curve.png")
            print(f"wrote {self.out}/: " + f"checkpoint-{self.iteration}, " * bool(self.iteration) + "log.jsonl, " + ("before_after.png, samples, " if self.cfg.eval_every else "") + "curve.png")

# ---------------------------------------------------------------------------------------------------------------

def announce(c, model, run):
    """What will happen, and what it costs, before it does."""
    count, watched = sum(w.numel() for w in model.trained()), f"; watched: {c.eval_scorers}" if c.eval_scorers else ""
    print(f"model      {c.model}: {count / 1e6:.3g} M trained parameters" + (f" of adapters, rank {c.lora_rank}" if c.lora_rank else "") +
          f", {c.resolution}x{c.resolution}, latent {model.latent_shape[0]} x {model.latent_shape[1]}, on {c.device}\n"
          f"prompts    {len(read_prompts(c.prompts))} to train on, {len(run.prompts)} {'held out' if c.eval_prompts else 'of them to watch'}\n"
          f"rewards    {c.rewards}{watched}\n"
          f"iteration  {c.plan()}\n"
          f"run        iterations {run.iteration + 1} to {c.iterations}, seed {c.seed}, into {c.out_dir}/" +
          (f", {WORLD} processes ({'FSDP2' if c.fsdp else 'DDP'}) with {c.prompts_per_iteration // WORLD} groups each" if WORLD > 1 else ""), flush=True)

def meet():
    """Join the other processes that torchrun started."""
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    attempt = {}
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"] and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)      # after a restart it still holds the addresses of
        attempt = dict(store=dist.PrefixStore(f"attempt {RESTARTS}", store), rank=RANK, world_size=WORLD)      # the dead (pytorch issue 135712): a new corner of it
    patience = datetime.timedelta(hours=2)                      # a large checkpoint is written by one while the others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience, **attempt)

def load(cfg):
    return Flux(cfg.model, cfg.resolution, cfg.device, cfg.guidance, cfg.checkpoint_blocks, cfg.compile, lora_rank=cfg.lora_rank, text_device=cfg.text_encoder_device, sharded=cfg.fsdp, batch=cfg.batch,
                attention=cfg.attention, float8=cfg.float8)

def start(cfg, algorithm=train):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    prompts = read_prompts(cfg.prompts) + (read_prompts(cfg.eval_prompts) if cfg.eval_prompts else [])
    try:
        scorers = rewards.load_all(rewards.parse(f"{cfg.rewards},{cfg.eval_scorers}"), cfg.device, prompts)
        model = load(cfg)
    except ValueError as error:                                 # a broken file
        raise OSError(rewards.short(error)) from error
    spread_out(cfg, model)
    run = Run(cfg, model, scorers)
    if RANK == 0:
        announce(cfg, model, run)
    def stop(*_):                                               # Ctrl-C: not in the middle of an update, so that --resume repeats nothing
        run.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            tqdm.write("stopping after this iteration, with a checkpoint and pictures; Ctrl-C again stops at once, without")
    previous = {sign: signal.signal(sign, stop) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        if run.before is None and cfg.eval_every:
            run.evaluate()
        algorithm(cfg, model, {name: scorers[name] for name in rewards.parse(cfg.rewards)}, run)
        run.finish()
    except rewards.ScorerError:
        if WORLD == 1:                                          # before an update, so what was done is whole; several would have to save together
            run.save()
        raise
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)

def main(argv=None, parse_config=parse_config, algorithm=train):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)             # a log file shows each line when it is written
    if WORLD > 1 and not dist.is_initialized():
        meet()
    cfg = parse_config(argv)
    everyone(None)                                              # all have looked at out_dir before anybody writes there
    try:
        return start(cfg, algorithm)
    except torch.OutOfMemoryError as error:
        said = (f"train.py: out of memory. What takes less of it, the cheapest first: --text_encoder_device offload, --checkpoint_blocks -1, --batch 6 or less, "
              f"--no-gather, --fsdp on more GPUs, --lora_rank 64, a smaller --resolution. {rewards.short(error)}")
    except (rewards.ScorerError, ArithmeticError) as error:
        said = f"train.py: {error}"
    except OSError as error:                                    # a full disk, perhaps, or a process that died while all were saving: it may pass
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    print(said, file=sys.stderr)
    if AGENT in begun_by(cfg.out_dir)["agents"]:                # restarts would only repeat it
        (Path(cfg.out_dir) / "launch.json").write_text(json.dumps({**begun_by(cfg.out_dir), "ended": said}))
    return 1

def leave(status):
    """End this process."""
    if dist.is_initialized():                                   # past the interpreter's end, whose threads gloo's may outlive and then abort (pytorch issue 190489)
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)

if __name__ == "__main__":
    leave(main())
