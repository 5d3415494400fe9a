"""
The other side of the paper's comparison: methods that explore by turning the ODE into an SDE, and DiffusionNFT, which does not.
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python -m paper.baselines --method dance                # DanceGRPO on the small world; also flow, mix, flash, branch, nft
    python -m paper.baselines --method mix --window_every 10 --lr 1e-4 --seed 1 --out_dir out/mix-1          # train.py's settings may follow, and the method's own

Each method is its formulas, a row of METHODS and a loop that stands beside train.py's: same model, rewards, prompts, optimizer, log, evaluation and
checkpoints, by the same functions. The formulas come first, on plain tensors, to be copied like those of neighbor_grpo.py. Equation numbers are those of
arXiv 2511.16955; formulas and settings (METHODS) are those of the methods' published code, and where that differs from their papers, or ours from both, it is said there.
"""
import math, re
from dataclasses import dataclass, fields
from typing import ClassVar
import torch
import train
from eval import read_prompts
from neighbor_grpo import clipped_objective, combine_rewards, is_flat
from processes import RANK, WORLD, exit_process, gather_objects
from rewards import parse_weights
from run import stopwatch
from solvers import ddim_step, dpmpp_2m_step, rollout, schedule
from train import average_gradients, by_group, generator, option, pick, score, update

# ---------------------------------------------------------------------------------------------------------------
# the SDE: as much noise is added as the drift takes away, so that x_t has the distribution the ODE gives it

def dance_level(ts, eta=0.3):
    """eta_t of Eq. 12 as DanceGRPO has it (arXiv 2505.07818; XueZeyue/DanceGRPO, train_grpo_flux.py, flux_step): the same at all times. ts (T+1,) -> (T,)."""
    return torch.full_like(ts[:-1], eta)


def flow_level(ts, eta=0.7):
    """eta_t of Eq. 12 as Flow-GRPO has it (arXiv 2505.05470; yifan123/flow_grpo, sd3_sde_with_logprob.py): eta sqrt(t / (1 - t)), where t = 1 in the denominator
    gives way to the next time. MixGRPO has it too (in code; its paper has another, CPS). ts (T+1,) -> (T,)."""
    t = ts[:-1]
    return eta * (t / (1 - torch.where(t == 1, ts[1], t))).sqrt()


def noise_estimate(x, v, t):
    """eps_hat = x + (1 - t) v: the noise that x_t is made of, according to v. It is -t times the score."""
    return x + (1 - t) * v


def sde_mean(x, v, t, t_next, level):
    """The mean of one Euler-Maruyama step (Eq. 15): the ODE's step less sigma_t^2 / (2 t) eps_hat, sigma_t = level sqrt(t - t_next). At level 0 it is the ODE's."""
    return ddim_step(x, v, t, t_next) - sde_std(t, t_next, level) ** 2 / (2 * t) * noise_estimate(x, v, t)


def sde_std(t, t_next, level):
    """sigma_t of Eq. 5."""
    return level * (t - t_next).sqrt()


def log_prob(x_next, mean, std):
    """Eq. 16 with its constant: the log density of N(mean, std^2) at x_next. x_next, mean (M, ...), std to broadcast with them -> (M,).

    A MEAN over the D dimensions, not a sum, as DanceGRPO, Flow-GRPO and MixGRPO all have it: their ratios are the D-th root of the likelihood ratio, and
    the published clip of 1e-4 belongs to that.
    """
    z = (x_next - mean) / std
    return (-z**2 / 2 - std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(1)                     # (M,)      Eq. 16


def sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level):
    """log pi_theta - log pi_old of a step that the old velocity took, x_t to x_next (M, ...), as `log_prob` measures it -> (M,). It is 0 where v is v_old."""
    std = sde_std(t, t_next, level)
    return log_prob(x_next, sde_mean(x_t, v, t, t_next, level), std) - log_prob(x_next, sde_mean(x_t, v_old, t, t_next, level), std)


def drift_residual(eps_hat, eps_hat_old, t, std):
    """Eq. 24: what stands in Eq. 6's squared norm beside the difference of the two ODE steps. It is 0 at theta_old."""
    return std**2 / (2 * t) * (eps_hat - eps_hat_old)


def sde_rollout(velocity, x, ts, levels, noise, solver="ddim"):
    """solvers.rollout, with noise wherever `levels` is above 0.

    x (M, ...), ts (T+1,), levels (T,), noise: standard normals like x, one for each step of the SDE. Before the first such step and between them the ODE's
    steps are Euler's; behind the last one they are the solver's (MixGRPO-Flash: DPM++). -> traj (T+1, M, ...), vels (T, M, ...).
    """
    traj, vels, x0_prev, noise, last = [x], [], None, iter(noise), int(torch.nonzero(levels).max()) if levels.any() else -1
    for k, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        v = velocity(x, t)
        if k > last and solver == "dpmpp_2m":
            x, x0_prev = dpmpp_2m_step(x, v, t, t_next, x0_prev, ts[k - 1])
        else:
            x0_prev, x = x - t * v, sde_mean(x, v, t, t_next, levels[k])
            x = x + sde_std(t, t_next, levels[k]) * next(noise) if levels[k] > 0 else x
        traj.append(x)
        vels.append(v)
    return torch.stack(traj), torch.stack(vels)


def global_advantages(rewards, everywhere=None):
    """Flow-GRPO's and DiffusionNFT's: the mean is the group's, the standard deviation (of the population, + 1e-4) that of ALL rewards of the iteration.
    rewards (P, G), everywhere: those of all processes -> (P, G), cut at 5. Zeros for a group whose rewards are equal up to rounding, which their code would enlarge."""
    std = (rewards if everywhere is None else everywhere).std(correction=0)
    A = ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)).clamp(-5, 5)
    return torch.where(is_flat(rewards)[:, None], 0.0, A)

# ---------------------------------------------------------------------------------------------------------------
# MixGRPO (arXiv 2507.21802; Tencent-Hunyuan/MixGRPO): the SDE in a window of a few steps that slides towards the image, the ODE outside

def window_start(iteration, T, size, every):
    """Where the window begins: one step later every so many iterations, and anew when it has reached the last step, which is the ODE's."""
    return iteration // every % (T - size) if every else 0


def flash_schedule(T, shift, end, compress):
    """MixGRPO-Flash: the steps behind the window, which nothing trains, are fewer: int(compress (T - end)) of them. Their code counts points where this counts
    steps, so it has one fewer; the 8 evaluations they report for Flash* (compress 0.2, window 0 to 4) are these."""
    steps = max(1, int(compress * (T - end) + 1e-6))
    return torch.cat([schedule(T, shift)[:end], schedule(steps, shift, start=1 - end / T)])

# ---------------------------------------------------------------------------------------------------------------
# BranchGRPO (arXiv 2509.06040; Fredreic1849/BranchGRPO, train_branchgrpo_flux.py): candidates share the beginnings of their trajectories

def tree_widths(T, splits):
    """Nodes before each of T steps, and after the last: every node has two children at a split, else one. -> T+1 numbers."""
    widths = [1]
    for k in range(T):
        widths.append(widths[-1] * (2 if k in splits else 1))
    return widths


def tree_advantages(rewards, width):
    """For the nodes at one depth: the mean reward of the leaves below (reward fusion), standardised over the depth. (P, G) -> (P, width), cut at 5."""
    fused = rewards.unflatten(1, (width, -1)).mean(2)                                                 # (P, width)
    deviation, std = fused - fused.mean(1, keepdim=True), fused.std(1, keepdim=True, correction=min(1, width - 1))
    return torch.where(std < 1e-6, deviation * 0, deviation / (std + 1e-8)).clamp(-5, 5)


def pruned_depths(iteration, T, count, earliest, every):
    """Depth pruning: `count` depths that are not trained, at first T - count to T - 1, one earlier every so many iterations until `earliest`. (Their paper lets
    the window move the other way.) With 5 of them NFE_theta is the published 8.625."""
    start = max(T - count - (iteration // every if every else 0), earliest)
    return range(start, start + count)

# ---------------------------------------------------------------------------------------------------------------
# DiffusionNFT (arXiv 2509.16117; NVlabs/DiffusionNFT, train_nft_sd3.py): no likelihood at all, a weighted flow-matching loss on the rollouts' images

def nft_loss(x_t, t, x0, v, v_old, A, beta=1.0):
    """5 / beta [r L+ + (1 - r) L-], L± = mean((x0_hat± - x0)^2) / w±, v± = v_old ± beta (v - v_old), x0_hat± = x_t - t v±, r = (A / 5 + 1) / 2 in [0, 1].

    x_t, x0, v, v_old (M, ...), t to broadcast with them, A (M,) cut at ±5 -> (M,). w± is the mean absolute error of the same prediction, a constant.
    Their code adds 1e-4 times the squared distance to the base model's velocity; it is left out here, as the other methods have no such term.
    """
    r = (A / 5 + 1) / 2                                                                               # (M,)
    losses = []
    for sign in (1, -1):
        error = x_t - t * (v_old + sign * beta * (v - v_old)) - x0
        w = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append(error.pow(2).flatten(1).mean(1) / w.to(error.dtype))
    return 5 / beta * (r * losses[0] + (1 - r) * losses[1])                                           # (M,)


def nft_decay(step):
    """How much of the old policy stays after optimizer step `step` (their decay type 1): next to nothing at first, half from step 500 on."""
    return min(0.001 * step, 0.5)

# ---------------------------------------------------------------------------------------------------------------
# settings: defaults < preset < method < command line

@dataclass
class Config(train.Config):
    method: str = option("", "which of the baselines", ("dance", "flow", "mix", "flash", "branch", "nft"))
    num_rollout_steps: int = option(25, "T, steps of a rollout", "[2, inf)")
    num_train_steps: int = option(4, "K, steps trained, drawn for each candidate from those of the SDE, or of nft's rollout", "[1, inf)")
    updates_per_iteration: int = option(3, "optimizer steps among which the candidates, or branch's edges, are divided", "[1, inf)")
    solver: str = option("ddim", "of the ODE's steps that follow the SDE's, and of nft's rollout", ("ddim", "dpmpp_2m"))
    noise: str = option("", "noise level: dance's, eta at all times, or flow's, eta sqrt(t / (1 - t))", ("", "dance", "flow"))
    eta: float = option(0.0, "its strength (Eq. 12)", "[0, 100]")
    window: int = option(0, "SDE steps; 0: all but the last", "[0, inf)")
    window_every: int = option(0, "iterations after which the window, or that of the pruned depths, moves on by a step; 0: it stays", "[0, inf)")
    compress: float = option(1.0, "flash: the share of the steps behind the window that stay", "(0, 1]")
    global_std: bool = option(False, "advantages are divided by the standard deviation of all rewards, not of their group's")
    splits: str = option("", "branch: the steps at which every node gets two children, by comma; G is 2 to the power of their number")
    split_noise: float = option(1.0, "branch: the noise of those steps, times this", "[0, 100]")
    prune: int = option(0, "branch: depths that are not trained", "[0, inf)")
    beta: float = option(0.0, "nft: how far v+ and v- lie from the old policy", "[0, 100]")

    code: ClassVar = ("paper/baselines.py", "neighbor_grpo.py")
    num_anchors: ClassVar = 0                                   # Neighbor GRPO's own are no settings here: all candidates are trained,
    sigma: ClassVar = 0                                         # begin at one noise,
    p: ClassVar = 0                                             # and there is no quasi-norm
    tau: ClassVar = ""                                          # and no distance
    old_anchor: ClassVar = ""

    def plan(self):
        old, theta = nfe(self)
        return f"{self.method}: {self.prompts_per_iteration} prompts x G {self.group_size}, NFE_old {old:.2f}, NFE_theta {theta:.2f}, {self.updates_per_iteration} updates"

    def rules(self):
        T, row, steps = self.num_rollout_steps, METHODS.get(self.method, {}), split_steps(self)
        own = [f for f in fields(self) if f.name not in {g.name for g in fields(train.Config)}]
        return [
            *((getattr(self, f.name) == f.default or f.name in row or f.name == "global_std" and self.method != "branch", f"{f.name} is not a setting of {self.method}") for f in own if f.name != "method"),
            (self.window < T, f"window is {self.window}, but must be at most T-1, {T - 1}: the last step is the ODE's"),
            (self.method == "branch" or self.num_train_steps <= (self.window or T - 1), f"num_train_steps (K) is {self.num_train_steps}, but must lie between 1 and {self.window or T - 1}, the steps to draw from"),
            (self.method != "branch" or self.num_train_steps == 4, "num_train_steps is not a setting of branch, which trains every edge; prune is"),
            (self.method != "branch" or len(self.splits.split(",")) == len(set(steps)) and 2 ** len(steps) == self.group_size and max(steps) < T - 1,
             f"splits is {self.splits}, but must be as many different steps below {T - 1} as give G, {self.group_size}, leaves"),
            (self.method != "branch" or self.prune < T - max(steps, default=0), f"prune is {self.prune}, but must lie between 0 and {T - 1 - max(steps, default=0)}, the depths behind the last split"),
            (self.method != "nft" or self.updates_per_iteration == 1, f"updates_per_iteration is {self.updates_per_iteration}, but nft has one"),
            (self.method == "branch" or self.group_size % self.updates_per_iteration == 0, f"updates_per_iteration is {self.updates_per_iteration}, but must divide group_size (G), {self.group_size}"),
            (self.method != "branch" or self.updates_per_iteration <= 2 * self.group_size - 2, f"updates_per_iteration is {self.updates_per_iteration}, but must be at most 2 G - 2, {2 * self.group_size - 2}"),
            (self.method != "branch" or self.solver == "ddim", "solver is not a setting of branch, whose every step is the SDE's"),
            (not row.get("noise") or self.noise, "noise is empty, but must be dance or flow"),
            (not row.get("eta") or self.eta > 0, f"eta is {self.eta:g}, but must be above 0: without noise there is nothing to learn from"),
            (self.method != "nft" or 0 < self.ema <= 0.5 and self.beta > 0, f"ema is {self.ema:g} and beta {self.beta:g}, but nft's ema, the most that stays of the old policy, must lie in (0, 0.5], and beta be above 0"),
            (self.method != "nft" or self.clip_eps == type(self).clip_eps, "clip_eps is not a setting of nft, which has no ratio to clip"),
        ]

METHODS = {                                                     # as published, for FLUX.1-dev where there is that; what is not:
    "dance": dict(noise="dance", eta=0.3, num_rollout_steps=25, num_train_steps=14, updates_per_iteration=3, window=0, solver="ddim"),           # T and K as this paper has them; the code: 16, 9
    "flow": dict(noise="flow", eta=0.9, num_rollout_steps=6, num_train_steps=5, updates_per_iteration=2, window=0, global_std=True, solver="ddim"),          # G = 12 for 24; adapters and an average there
    "mix": dict(noise="flow", eta=0.7, num_rollout_steps=25, num_train_steps=4, updates_per_iteration=4, window=4, window_every=25, solver="ddim"),
    "flash": dict(noise="flow", eta=0.7, num_rollout_steps=25, num_train_steps=4, updates_per_iteration=4, window=4, window_every=0, compress=0.2, solver="dpmpp_2m"),         # Flash*; Flash: 20, 0.4
    "branch": dict(noise="dance", eta=0.3, num_rollout_steps=20, num_train_steps=4, group_size=16, splits="0,3,6,9", split_noise=4.0, prune=0, window_every=30, clip_eps=1e-3,
                   updates_per_iteration=18, solver="ddim"),    # an update every 12 edges of a whole tree, every 7.7 of a pruned one; the pruned window ends at depth 10, where theirs goes on to 9
    "nft": dict(num_rollout_steps=10, num_train_steps=9, updates_per_iteration=1, beta=1.0, ema=0.5, global_std=True, solver="dpmpp_2m"),            # G = 12 for 24; adapters there
}
LEVELS = {"dance": dance_level, "flow": flow_level}

def split_steps(cfg):
    return [int(k) for k in cfg.splits.split(",") if re.fullmatch("[0-9]+", k.strip())]

def times(cfg, it):
    """The schedule of an iteration, its SDE steps [start, end), and the noise level of each step, 0 where it is the ODE's."""
    T, size = cfg.num_rollout_steps, cfg.window or cfg.num_rollout_steps - 1
    start = window_start(it, T, size, cfg.window_every)
    ts = flash_schedule(T, cfg.shift, start + size, cfg.compress) if cfg.compress < 1 else schedule(T, cfg.shift)
    levels = LEVELS[cfg.noise](ts, cfg.eta)
    levels[:start] = levels[start + size:] = 0                  # the last step always: DanceGRPO too decodes the x_0 it predicts, and Flow-GRPO trains all but that one
    return ts, start, start + size, levels

def tree(cfg, it):
    """BranchGRPO's: nodes before each step and after the last, and the trained edges, (step, child) each."""
    widths = tree_widths(cfg.num_rollout_steps, split_steps(cfg))
    pruned = pruned_depths(it, cfg.num_rollout_steps, cfg.prune, max(split_steps(cfg)) + 1, cfg.window_every)
    return widths, [(k, child) for k in range(cfg.num_rollout_steps) if k + 1 not in pruned for child in range(widths[k + 1])]

def nfe(cfg, it=0):
    """Network evaluations per image in an iteration: of the rollout, and trained ones."""
    if cfg.method == "branch":
        widths, edges = tree(cfg, it)
        return sum(widths[:-1]) / cfg.group_size, len(edges) / cfg.group_size
    if cfg.method == "nft":                                     # whose old policy is also asked about every trained point
        return cfg.num_rollout_steps + cfg.num_train_steps, cfg.num_train_steps
    return len(times(cfg, it)[0]) - 1, cfg.num_train_steps

# ---------------------------------------------------------------------------------------------------------------
# the loops, to be read beside train.py's

def train_sde(cfg, model, scorers, run):
    """DanceGRPO, Flow-GRPO, MixGRPO and MixGRPO-Flash: one loop, of which `times` makes the difference."""
    P, G, K, U = cfg.prompts_per_iteration // WORLD, cfg.group_size, cfg.num_train_steps, cfg.updates_per_iteration
    prompts, weights, row = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers).to(model.device), torch.arange(P)[:, None]
    for it in run.iterations():
        # Draw prompts, one initial noise for each, the SDE's noise, and K of its steps for each candidate
        seconds, lap = stopwatch(model.device)
        ts, start, end, levels = times(cfg, it)
        mine, prompt, eps_star, noise, steps = range(RANK * P, RANK * P + P), [], [], [], []
        for group in mine:
            rng = generator(cfg.seed, 2, it, group)
            prompt.append(pick(cfg, it, group, prompts))
            eps_star.append(torch.randn(model.latent_shape, generator=rng))
            noise.append(torch.randn(end - start, G, *model.latent_shape, generator=rng))
            steps.append(torch.stack([start + torch.randperm(end - start, generator=rng)[:K].sort().values for _ in range(G)]))
        x1, noise, steps = torch.stack(eps_star).repeat_interleave(G, 0), torch.cat(noise, 1).to(model.device), torch.stack(steps)    # (P G, N, C), (S, P G, N, C), (P, G, K)

        # Roll out G candidates that the noise drives apart
        with torch.no_grad():
            cond = model.encode(prompt)
            traj, vels = sde_rollout(lambda x, t: model.velocity(x, t, cond), x1.to(model.device), ts, levels, noise, cfg.solver)
            images = model.decode(run.finite(traj[-1]))                                               # (P G, 3, H, W)
            traj, vels = traj.unflatten(1, (P, G)), vels.unflatten(1, (P, G))                         # (T+1, P, G, N, C), (T, ...)
        lap("rollout")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                                                       # {name: (P, G)}
        A = standardised(cfg, scores, prompt, weights)                                                # (P, G)              Eq. 3
        lap("reward")

        # Update: the likelihood ratio of every candidate's own steps
        log_rhos, trained = [], 0
        for chosen in torch.arange(G).chunk(U):                                                       # (g,), g = G / U candidates of each group
            for j in range(K):
                average_gradients(cfg, model, last=j == K - 1)
                k = steps[:, chosen, j]                                                               # (P, g)              each its own
                t, t_next, level = (value[k].flatten()[:, None, None].to(model.device) for value in (ts, ts[1:], levels))         # (P g, 1, 1)
                x_t, x_next, v_old = (values[k, row, chosen].flatten(0, 1) for values in (traj, traj[1:], vels))                  # (P g, N, C)
                v = model.velocity(x_t, t.flatten(), cond)
                log_rho = sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level)                      # (P g,)              Eq. 16
                J = clipped_objective(log_rho, A[:, chosen].flatten(), cfg.clip_eps)                  # ()                  Eq. 4
                (-J / (k.numel() * K)).backward()
                log_rhos.append(log_rho.detach())
                trained += k.numel()
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=len(vels), nfe_theta=trained / (P * G))

def train_branch(cfg, model, scorers, run):
    """BranchGRPO: one trajectory from each noise, which splits in two now and then; every step is the SDE's, and an edge's advantage is that of the node it leads to. The
    last step's edges are trained too, as in their code, although no image contains its noise."""
    P, G, U, T = cfg.prompts_per_iteration // WORLD, cfg.group_size, cfg.updates_per_iteration, cfg.num_rollout_steps
    prompts, weights, ts = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers).to(model.device), schedule(T, cfg.shift)
    levels, splits = LEVELS[cfg.noise](ts, cfg.eta), split_steps(cfg)
    for it in run.iterations():
        # Draw prompts, one initial noise for each, and noise for every node
        seconds, lap = stopwatch(model.device)
        widths, edges = tree(cfg, it)
        rngs = [generator(cfg.seed, 2, it, group) for group in range(RANK * P, RANK * P + P)]
        prompt = [pick(cfg, it, group, prompts) for group in range(RANK * P, RANK * P + P)]
        draw = lambda *count: torch.stack([torch.randn(*count, *model.latent_shape, generator=rng) for rng in rngs]).to(model.device)

        # Roll out the tree: the network sees a node once, before it splits
        nodes, vels = [draw(1)], []                                                                   # (P, 1, N, C)
        with torch.no_grad():
            cond = model.encode(prompt)
            for k, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
                x = nodes[-1].flatten(0, 1)                                                           # (P w, N, C)
                vels.append(model.velocity(x, t, cond))
                mean = sde_mean(x, vels[-1], t, t_next, levels[k]).unflatten(0, (P, -1)).repeat_interleave(widths[k + 1] // widths[k], 1)
                scale = cfg.split_noise if k in splits else 1           # their code's; log_prob has no such factor, and the marginals are not kept
                nodes.append(mean + scale * sde_std(t, t_next, levels[k]) * draw(widths[k + 1]))      # (P, w', N, C)
            images = model.decode(run.finite(x - t * vels[-1]))                                       # the x_0 of the last step, without its noise
            vels = [v.unflatten(0, (P, -1)) for v in vels]
        lap("rollout")

        # Score the leaves, and turn scores into advantages of every node
        scores = score(scorers, images, prompt)                                                       # {name: (P, G)}
        leaves = by_group(scores, prompt, lambda r: combine_rewards(r, weights))                      # (P, G)
        A = [tree_advantages(leaves, width) for width in widths]                                      # T+1 of (P, w)
        lap("reward")

        # Update: the likelihood ratio of the edges, in any order
        log_rhos, trained = [], 0
        order = torch.randperm(len(edges), generator=generator(cfg.seed, 3, it)).tolist()
        for i in range(U):
            mine = order[-(-len(order) * i // U): -(-len(order) * (i + 1) // U)]
            for j in range(0, len(mine), G):                                                          # G at a time
                average_gradients(cfg, model, last=j + G >= len(mine))
                some = [(k, child, child * widths[k] // widths[k + 1]) for k, child in (edges[e] for e in mine[j: j + G])]        # step, child, parent
                steps = torch.tensor([k for k, _, _ in some]).repeat(P)                               # (P e,)
                t, t_next, level = (value[steps][:, None, None].to(model.device) for value in (ts, ts[1:], levels))               # (P e, 1, 1)
                x_t, v_old = (torch.stack([values[k][:, parent] for k, _, parent in some], 1).flatten(0, 1) for values in (nodes, vels))     # (P e, N, C)
                x_next, A_edge = (torch.stack([values[k + 1][:, child] for k, child, _ in some], 1).flatten(0, 1) for values in (nodes, A))
                v = model.velocity(x_t, t.flatten(), cond)
                log_rho = sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level)                      # (P e,)              Eq. 16
                J = clipped_objective(log_rho, A_edge, cfg.clip_eps)                                  # ()                  Eq. 4
                (-J / (P * len(mine))).backward()
                log_rhos.append(log_rho.detach())
                trained += len(some)
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, leaves, log_rhos, seconds, nfe_old=sum(v.shape[1] for v in vels) / G, nfe_theta=trained / G)

def train_nft(cfg, model, scorers, run):
    """DiffusionNFT: the old policy, a slow average of the trained one, rolls out by any ODE solver; then flow matching on its images, towards those with a positive
    advantage and away from the others. The average is run.ema: it is also what is evaluated and saved."""
    P, G, K = cfg.prompts_per_iteration // WORLD, cfg.group_size, cfg.num_train_steps
    prompts, weights, ts = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers).to(model.device), schedule(cfg.num_rollout_steps, cfg.shift)
    for it in run.iterations():
        # Draw prompts, G unrelated noises for each, and for each image K of the rollout's times with fresh noise
        seconds, lap = stopwatch(model.device)
        prompt, x1, noise, steps = [], [], [], []
        for group in range(RANK * P, RANK * P + P):
            rng = generator(cfg.seed, 2, it, group)
            prompt.append(pick(cfg, it, group, prompts))
            x1.append(torch.randn(G, *model.latent_shape, generator=rng))
            noise.append(torch.randn(K, G, *model.latent_shape, generator=rng))
            steps += [torch.randperm(len(ts) - 1, generator=rng)[:K] for _ in range(G)]
        noise, steps = torch.cat(noise, 1).to(model.device), torch.stack(steps)                       # (K, P G, N, C), (P G, K)

        # Roll out with the old policy, and take its velocity at the points to be trained on
        with torch.no_grad(), run.averaged():
            cond = model.encode(prompt)
            traj, vels = rollout(lambda x, t: model.velocity(x, t, cond), torch.cat(x1).to(model.device), ts, cfg.solver)
            x0 = run.finite(traj[-1])                                                                 # (P G, N, C)
            images = model.decode(x0)
            lap("rollout")
            t = ts[steps].T[..., None, None].to(model.device)                                         # (K, P G, 1, 1)
            x_t = (1 - t) * x0 + t * noise                                                            # (K, P G, N, C)
            v_old = [model.velocity(x, s.flatten(), cond) for x, s in zip(x_t, t)]
        lap("update")

        # Score the images, and turn scores into advantages
        scores = score(scorers, images, prompt)                                                       # {name: (P, G)}
        A = standardised(cfg, scores, prompt, weights)                                                # (P, G)
        lap("reward")

        # Update: once
        for j in range(K):
            average_gradients(cfg, model, last=j == K - 1)
            v = model.velocity(x_t[j], t[j].flatten(), cond)
            (nft_loss(x_t[j], t[j], x0, v, v_old[j], A.flatten(), cfg.beta).mean() / K).backward()
        update(cfg, model, run, decay=min(nft_decay(it + 1), cfg.ema))
        lap("update")
        run.log(it, scores, A, [], seconds, nfe_old=len(vels) + K, nfe_theta=float(K))

def standardised(cfg, scores, prompt, weights):
    """Eq. 3 on each reward, then their weighted mean (as MixGRPO does); or, with global_std, the weighted sum of the rewards against the spread of all. Cut at 5."""
    if not cfg.global_std:
        return by_group(scores, prompt, lambda r: combine_rewards(r, weights)).clamp(-5, 5)
    total = sum(w * s for w, s in zip(weights, scores.values()))                                      # (P, G)
    return global_advantages(total, torch.cat(gather_objects(total.cpu())).to(total.device))

def loop(cfg, model, scorers, run):
    {"branch": train_branch, "nft": train_nft}.get(cfg.method, train_sde)(cfg, model, scorers, run)

def parse_config(argv=None):
    return train.parse_config(argv, Config, METHODS, __doc__)

if __name__ == "__main__":
    exit_process(train.main(None, parse_config, loop))
