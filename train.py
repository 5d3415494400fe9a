"""
Align a FLUX model with a reward by Neighbor GRPO: Algorithm 1 of arXiv 2511.16955.
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python train.py                             # the small FLUX in tiny/: minutes on two CPU cores
    python train.py --rewards preference,jpeg --reward_weights 2,1 --out_dir out/two
    torchrun --nproc_per_node 8 train.py --preset dpm8 --prompts hpdv2_train --fsdp     # FLUX.1-dev

The formulas are in neighbor_grpo.py, the ODE is in solvers.py, the networks are in model.py. This
file draws the random numbers and calls the others in order. run.py logs, evaluates and saves.
"""
import argparse, math, os
from dataclasses import dataclass, field, fields
from typing import ClassVar
import numpy as np
import torch
from tqdm import tqdm
import rewards
from eval import is_small, times
from machine import (LOCAL_RANK, RANK, WORLD, average_gradients, exit_process, explain_errors,
                     init_processes, is_number, one_line, parse_call, read_prompts, refuse,
                     stopping, stopwatch, wrap_for_processes)
from neighbor_grpo import combine_rewards, group_advantages, neighbor_grpo_loss, perturb_noise
from pipeline import load_model
from rewards import parse_weights
from run import HERE, Run, announce, check
from solvers import ddim_step, rollout

def train(cfg, model, scorers, run):
    """Algorithm 1. `scorers`: the rewards to train on. `run`: optimizer, log and checkpoints."""
    P, G, U = cfg.prompts_per_iteration // WORLD, cfg.group_size, cfg.updates_per_iteration
    prompts, shape = read_prompts(cfg.prompts), model.latent_shape      # shape: (N, C), D = N C
    weights = parse_weights(cfg.reward_weights, scorers).to(model.device)               # (M,)
    ts = times(cfg.shift, model, cfg.num_rollout_steps)                 # (T+1,)
    tau = math.prod(shape) if cfg.tau == "dim" else float(cfg.tau)
    row = torch.arange(P, device=model.device)[:, None]                 # (P, 1)  indexes groups

    for it in run.iterations():
        # Save and evaluate, first of all the base
        if cfg.save_every and it % cfg.save_every == 0:
            run.save()
        if cfg.eval_every and it % cfg.eval_every == 0:
            run.evaluate()

        # Draw prompts, noise, anchors and steps
        seconds, lap = stopwatch(model.device)
        prompt, eps_star, delta, anchors, steps = draw(cfg, it, prompts, shape)

        # Roll out G neighbours of one noise for each prompt
        x1 = perturb_noise(eps_star, delta, cfg.sigma)                  # (P, G, D)     Eq. 7
        x1 = x1.view(P * G, *shape).to(model.device)                    # (P G, N, C)
        with torch.no_grad():
            cond = model.encode(prompt)
            traj, vels = rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, cfg.solver)
            run.check_finite(traj[-1])
            images = model.decode(traj[-1])                             # (P G, 3, H, W)
        traj, vels = (y.view(len(y), P, G, -1) for y in (traj, vels))   # (T+1 and T, P, G, D)
        lap("rollout")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        r, finite = stack_rewards(scores, prompt)                       # (P, M, G), (P, 1)
        A = finite * group_advantages(combine_rewards(r, weights), cfg.p)   # (P, G)  Eq. 3, 11
        lap("reward")

        # Update: from each anchor, one DDIM step of the model being trained
        log_rhos, trained = [], 0
        for chosen in anchors.to(model.device).chunk(U, dim=1):         # (P, b)        b = B / U
            for k in steps:                                             # K of the first T-1
                x_t = traj[k][row, chosen]                              # (P, b, D)
                v = model.velocity(x_t.view(-1, *shape), ts[k], cond).reshape(x_t.shape)
                x_theta = ddim_step(x_t, v, ts[k], ts[k + 1])           # the only gradient
                # x_old is the same step with the rollout's velocity, so that rho is 1 before the
                # first update. Algorithm 1 has the rollout's latent, but DPM++ lands elsewhere.
                if cfg.old_anchor == "replay":
                    x_old = ddim_step(x_t, vels[k][row, chosen], ts[k], ts[k + 1])
                else:
                    x_old = traj[k + 1][row, chosen]
                loss, log_rho = neighbor_grpo_loss(                     # (), (P, b, G)
                    traj[k + 1][:, None], x_theta, x_old, A[:, None], tau, cfg.clip_eps)
                (loss / len(steps)).backward()      # a mean over groups, anchors and steps
                log_rhos.append(log_rho)
                trained += chosen.numel()
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=len(vels), nfe_theta=trained / (P * G))

def score(scorers, images, prompt):
    """The scores of P groups' images (P G, 3, H, W): {name: (P, G)}."""
    G = len(images) // len(prompt)
    each = [c for c in prompt for _ in range(G)]
    return {name: scorer(images, each).unflatten(0, (len(prompt), G))
            for name, scorer in scorers.items()}

def stack_rewards(scores, prompt):
    """The M rewards of P groups, (P, M, G), and a factor of their advantages, (P, 1): 1, or nan for
    a group with a reward that is not finite. The averaged gradient is then nan on all processes, so
    all skip the update, and none raises alone."""
    r = torch.stack(list(scores.values()), 1)                           # (P, M, G)
    finite = r.isfinite().flatten(1).all(1)                             # (P,)
    for g in (~finite).nonzero()[:, 0].tolist():
        tqdm.write(f"a reward for {prompt[g]!r} is not finite")
    return r.nan_to_num(0, 0, 0), torch.where(finite, 1.0, torch.nan)[:, None]

MAX_GRAD_NORM = 1.0             # a gradient with a larger norm is cut to it

@torch.no_grad()
def update(cfg, model, run, decay=None):
    """One optimizer step with the gradients collected since the last one. It is left out if they
    are not finite on some process. It is also left out if all are 0: then all groups were flat, and
    momentum alone would move the weights. `decay` replaces cfg.ema."""
    average_gradients(cfg, model)                   # all that the processes exchange
    norm = torch.nn.utils.clip_grad_norm_(model.trained(), MAX_GRAD_NORM)
    norm = norm.full_tensor() if cfg.fsdp else norm             # the same on all processes
    if norm.isfinite() and norm > 0:
        run.opt.step()
        if run.ema:
            weight = 1 - (cfg.ema if decay is None else decay)
            torch._foreach_lerp_(run.ema, model.trained(), weight)
    run.opt.zero_grad()
    run.count_update(norm)

# ------------------------------------------------------------------------------------------------
# Random draws. Each depends on the seed, the iteration and the group; not on the process or on
# earlier draws. So with the same --prompts_per_iteration a run is the same on 1 or N processes.

def generator(*key):
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))

def pick(cfg, it, group, prompts):
    """The prompt of a group. Every prompt comes once before any comes twice."""
    epoch, place = divmod(it * cfg.prompts_per_iteration + group, len(prompts))
    return prompts[torch.randperm(len(prompts), generator=generator(cfg.seed, 1, epoch))[place]]

def draw(cfg, it, prompts, latent_shape, rank=RANK, world=WORLD):
    """Everything random in iteration `it`, for the P groups of this process: P prompts, eps* (P,
    D), delta (P, G, D), anchors (P, B), and [K] trained steps, the same for all groups."""
    P = cfg.prompts_per_iteration // world
    chosen, eps_star, delta, anchors = [], [], [], []
    for group in range(rank * P, rank * P + P):
        chosen.append(pick(cfg, it, group, prompts))
        rng = generator(cfg.seed, 2, it, group)
        eps_star.append(torch.randn(math.prod(latent_shape), generator=rng))
        delta.append(torch.randn(cfg.group_size, math.prod(latent_shape), generator=rng))
        anchors.append(torch.randperm(cfg.group_size, generator=rng)[: cfg.num_anchors])
    steps = torch.randperm(cfg.num_rollout_steps - 1, generator=generator(cfg.seed, 3, it))
    steps = sorted(steps[: cfg.num_train_steps].tolist())
    return chosen, torch.stack(eps_star), torch.stack(delta), torch.stack(anchors), steps

# ------------------------------------------------------------------------------------------------
# Settings: defaults < preset < command line

def option(default, text, allowed=""):
    """`allowed`: an interval such as "(0, 1]", or a tuple of words."""
    return field(default=default, metadata=dict(help=text, allowed=allowed))

@dataclass
class Config:
    # task
    model: str = option("black-forest-labs/FLUX.1-dev", "any flow pipeline of diffusers with text "
                        "(examples/models.md), a folder or a hub id")
    prompts: str = option("", "training prompts: a text file, one prompt a line; or hpdv2_train")
    eval_prompts: str = option("", "held-out prompts; empty: 8 of the training prompts")
    rewards: str = option("hpsv2,pickscore,imagereward", "what to align with (Sec. 4), "
                          "comma-separated: your own as FILE.py:FUNCTION, or some of "
                          + ", ".join(rewards.SCORERS) + "; name=path takes weights from a path")
    reward_weights: str = option("", "a number for each, comma-separated; empty: equal (Sec. 4.1)")
    eval_scorers: str = option("", "more scorers, comma-separated, logged but not trained on")
    resolution: str = option("", "pixels, multiples of 16: a side, or 832x640, width x height; "
                             "empty: FLUX.1's 720, or the pipeline's own")
    guidance: str = option("", "guidance scale; it doubles the cost of most models, but not of "
                           "FLUX.1; empty: FLUX.1's 3.5, or the pipeline's own")
    shift: float = option(0.0, "shift of the schedule; 0: FLUX.1's 3, or the pipeline's own times",
                          "[0, 100]")
    call: str = option("", "more arguments of the pipeline's __call__, as JSON")
    frames: int = option(4, "frames of each video that a scorer of images sees", "[1, inf)")
    # method
    iterations: int = option(300, "of Algorithm 1 (Sec. 4)", "[1, inf)")
    prompts_per_iteration: int = option(0, "groups in an iteration, divided among the processes; "
                                        "0: one per process (Sec. 4)", "[0, inf)")
    group_size: int = option(12, "G, candidates in a group (Table 3)", "[2, inf)")
    num_rollout_steps: int = option(8, "T, steps of a rollout, NFE_old of Table 3", "[2, inf)")
    num_anchors: int = option(4, "B, anchors drawn from the G (Sec. 3.4.1, Table 5)", "[1, inf)")
    num_train_steps: int = option(4, "K, times trained on, drawn from the first T-1", "[1, inf)")
    solver: str = option("dpmpp_2m", "of the rollout (Sec. 3.4.3); training steps are DDIM's",
                         ("ddim", "dpmpp_2m"))
    old_anchor: str = option("replay", "x_old of Eq. 10. replay: the rollout's velocity through a "
                             "DDIM step; rollout: its latent (Alg. 1)", ("replay", "rollout"))
    updates_per_iteration: int = option(2, "optimizer steps that share the B anchors (Alg. 1: B; "
                                        "the authors' arXiv 2603.17461: 2)", "[1, inf)")
    sigma: float = option(0.3, "strength of the perturbation (Eq. 7, Table 4)", "(0, 1]")
    p: float = option(0.8, "exponent of the quasi-norm; 2: GRPO (Eq. 11, Table 6)", "[0.2, 2]")
    tau: str = option("dim", "temperature of the policy (Eq. 8): a number, 1 in the paper; or dim "
                      "for D, which makes the distance a mean over dimensions")
    clip_eps: float = option(1e-4, "half width of the trust region of rho (Eq. 9)", "(0, inf)")
    # optimizer
    lr: float = option(1e-5, "AdamW's learning rate (Sec. 4)", "(0, 1]")
    lora_rank: int = option(0, "train only LoRA adapters of this rank; 0: all weights", "[0, 1024]")
    init_lora: str = option("", "adapters to start from, and to train further: a file or a folder")
    ema: float = option(0.0, "decay of an exponential average of the trained weights; the average "
                        "is evaluated and saved; 0: none", "[0, 1)")
    # memory and speed
    fsdp: bool = option(False, "divide weights, gradients and moments among the processes")
    checkpoint_blocks: int = option(-1, "number of blocks to recompute in the backward pass, to "
                                    "save memory; -1: all (FLUX.1-dev has 57)", "[-1, inf)")
    compile: bool = option(torch.cuda.is_available(), "compile the transformer's blocks: minutes "
                           "at the start, faster from then on")
    batch: int = option(0, "at most this many latents in one forward pass, to save memory where a "
                        "process holds several groups; 0: all at once", "[0, inf)")
    text_encoder_device: str = option("", "where the text encoders are. empty: on device; "
                                      "cpu; offload: on the CPU between uses",
                                      ("", "cpu", "offload"))
    # run
    out_dir: str = option("", "where the run is written; empty: out/<preset>, or out/<method>")
    seed: int = option(0, "of prompts, noise, anchors, steps and new adapters", "[0, 1e18]")
    eval_every: int = option(25, "iterations between evaluations; 0: never", "[0, inf)")
    eval_steps: int = option(0, "of DPM-Solver++ in evaluations; 0: as in rollouts", "[0, inf)")
    save_every: int = option(50, "iterations between checkpoints; 0: only at the end", "[0, inf)")
    keep: int = option(0, "number of the newest checkpoints that stay; 0: all", "[0, inf)")
    resume: bool = option(False, "continue from the newest checkpoint in out_dir, if there is one")
    overwrite: bool = option(False, "delete the run that is in out_dir")
    wandb: str = option("", "Weights & Biases project for every line of the log; empty: none")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    threads: int = option(0, "CPU threads; 0: torch's own choice", "[0, 1024]")

    method: ClassVar = "neighbor"                               # paper/baselines.py has others
    code: ClassVar = ("neighbor_grpo.py",)                      # kept with the run
    lock: ClassVar = None                                       # on out_dir, see run.py
    command: ClassVar = "train.py"

    def __post_init__(self):
        for name in ("model", "prompts", "eval_prompts", "init_lora", "out_dir"):
            if str(getattr(self, name))[:1] == "~":             # after "=" the shell leaves it
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        self.prompts_per_iteration = self.prompts_per_iteration or WORLD
        self.device = f"cuda:{LOCAL_RANK}" if self.device == "cuda" else self.device

    def plan(self):
        """What an iteration costs, in one line."""
        P, G, T = self.prompts_per_iteration, self.group_size, self.num_rollout_steps
        B, K, U = self.num_anchors, self.num_train_steps, self.updates_per_iteration
        return (f"{P} prompts x G {G} x T {T} = {P * G * T} forwards ({self.solver}), "
                f"{P} x B {B} x K {K} = {P * B * K} trained steps in {U} update{'s' * (U > 1)}; "
                f"NFE_old {T}, NFE_theta {B * K / G:.2f}")

    def rules(self):
        """[(holds, the sentence if it does not)] for the settings of the method."""
        G, T, B, K = self.group_size, self.num_rollout_steps, self.num_anchors, self.num_train_steps
        return [
            (self.tau == "dim" or is_number(self.tau) and float(self.tau) > 0,
             f"tau is {self.tau}, but must be a number above 0, or dim"),
            (B <= G, f"num_anchors (B) is {B}, but must lie between 1 and group_size (G), {G}"),
            (K <= T - 1, f"num_train_steps (K) is {K}, but must lie between 1 and T-1, {T - 1}: "
                         "the last step is never trained"),
            (B % self.updates_per_iteration == 0,
             f"updates_per_iteration is {self.updates_per_iteration}, but must divide "
             f"num_anchors (B), {B}"),
        ]

PRESETS = {
    "tiny": dict(model=str(HERE / "tiny/flux"), prompts=str(HERE / "tiny/prompts/train.txt"),
                 eval_prompts=str(HERE / "tiny/prompts/test_concept.txt"), rewards="preference",
                 eval_scorers="judge,flawless", resolution="64", shift=1.0, iterations=50,
                 prompts_per_iteration=8, lr=5e-5, checkpoint_blocks=0, compile=False),
    # the rows of Table 3
    "ddim25": dict(solver="ddim", num_rollout_steps=25, num_anchors=12, num_train_steps=4),
    "dpm16": dict(solver="dpmpp_2m", num_rollout_steps=16, num_anchors=4, num_train_steps=9),
    "dpm8": dict(solver="dpmpp_2m", num_rollout_steps=8, num_anchors=4, num_train_steps=4),
}

def help_of(f, methods):
    """A setting's help: what it is, what is allowed, its defaults."""
    allowed, rows = f.metadata["allowed"], dict(tiny=PRESETS["tiny"], **methods)
    notes = [allowed if isinstance(allowed, str) else " or ".join(filter(None, allowed)),
             f"default {'empty' if f.default == '' else f.default}",
             *(f"{name}: {row[f.name]}" for name, row in rows.items() if f.name in row)]
    text = f"{f.metadata['help']} ({'; '.join(filter(None, notes))})"
    return text.replace("%", "%%").replace(f"{HERE}/", "")

def parse_config(argv=None, config=Config, methods={}, about=__doc__):
    """Command line -> settings; or one sentence and exit code 2, before any model is loaded.
    paper/baselines.py has a Config of its own, and settings for each --method."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage=f"python {config.command} [--preset tiny|ddim25|dpm16|dpm8] [--setting value ...]")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="the small world, or a "
                        "row of the paper's Table 3 for FLUX.1-dev (default tiny)")
    for f in fields(config):
        yes_no = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help_of(f, methods),
                            **(yes_no if f.type is bool else dict(type=f.type)))
    given = vars(parser.parse_args(argv))
    preset, method = given.pop("preset"), given.get("method", "")
    settings = {"out_dir": f"out/{method or preset}", **PRESETS[preset]}
    if preset == "tiny" and not is_small(given.get("model", HERE / "tiny/flux")):
        del settings["resolution"], settings["shift"]           # another model has its own
    settings |= methods.get(method, {}) | given
    cfg = config(**{f.name: settings[f.name] for f in fields(config) if f.name in settings})
    refuse(parser, lambda: check(cfg))
    return cfg

def load(cfg):
    return load_model(
        cfg.model, cfg.resolution, cfg.guidance, cfg.num_rollout_steps, parse_call(cfg.call),
        device=cfg.device, checkpoint_blocks=cfg.checkpoint_blocks, compiled=cfg.compile,
        lora_rank=cfg.lora_rank, lora=cfg.init_lora, text_device=cfg.text_encoder_device,
        sharded=cfg.fsdp, batch=cfg.batch)

def start(cfg, algorithm):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device != "cpu":
        torch.cuda.set_device(cfg.device)
    prompts = list(dict.fromkeys(read_prompts(cfg.prompts)
                                 + read_prompts(cfg.eval_prompts or cfg.prompts)))
    names, watched = rewards.parse(cfg.rewards), rewards.parse(cfg.eval_scorers)
    try:
        scorers = rewards.load_all(names | watched, cfg.device, prompts, cfg.frames)
        scorers |= {name: rewards.forgiving(scorers[name]) for name in watched}
        torch.manual_seed(cfg.seed)                             # of LoRA's first weights
        model = load(cfg)
        wrap_for_processes(cfg, model)
    except ValueError as error:                                 # weights that do not fit, say
        raise OSError(one_line(error)) from error
    run = Run(cfg, model, scorers)
    if RANK == 0:
        announce(cfg, model, run, model.cut(prompts))
    try:
        with stopping(run.stop_soon):
            algorithm(cfg, model, {name: scorers[name] for name in names}, run)
            run.finish()
    except rewards.ScorerError:         # it comes before an update, so nothing is half done
        if WORLD == 1:                  # several processes save together
            run.save()
        raise

def main(argv=None, parse_config=parse_config, algorithm=train):
    init_processes()
    cfg = parse_config(argv)
    try:
        return explain_errors(lambda: start(cfg, algorithm), rewards.ScorerError)
    finally:
        if cfg.lock:
            cfg.lock.release()

if __name__ == "__main__":
    exit_process(main())
