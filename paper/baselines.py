"""
The methods that the paper compares Neighbor GRPO with, and four more: Flow-GRPO, DiffusionNFT, AWM
and FDFO. All but the last three explore by turning the ODE into an SDE. Time t runs from 1 (noise)
to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

    python -m paper.baselines --method dance    # or flow, mix, flash, branch, nft, awm, fdfo
    python -m paper.baselines --method mix --window_every 10 --lr 1e-4 --out_dir out/mix-1e-4
    torchrun --nproc_per_node 8 -m paper.baselines --method flow --preset dpm8 --model ...

Without --preset, a method runs on the small world. It takes train.py's settings and its own.

A method has its formulas, a loop that can be read beside train.py's, and a row of METHODS. For
model, rewards, prompts, optimizer, log, evaluation and checkpoints it calls train.py's functions.
The formulas come first. They take plain tensors and can be copied, like those of neighbor_grpo.py.
Equation numbers are those of arXiv 2511.16955. Formulas and settings follow the methods' published
code. A comment says where their code differs from their paper, or ours from both.
"""
import math, re
from dataclasses import dataclass, fields
from typing import ClassVar
import torch
import train
from eval import times
from machine import RANK, WORLD, exit_process, gather_objects, read_prompts, stopwatch
from neighbor_grpo import clipped_objective, combine_rewards, is_flat
from rewards import parse_weights
from solvers import ddim_step, dpmpp_2m_step, rollout, schedule
from train import generator, option, pick, score, update

# ------------------------------------------------------------------------------------------------
# The SDE. Its extra drift offsets the noise that it adds, so x_t keeps the ODE's distribution.

def dance_level(ts, eta=0.3):
    """eta_t of Eq. 12 in DanceGRPO: the same at all times. ts (T+1,) -> (T,).

    Source: arXiv 2505.07818; XueZeyue/DanceGRPO, train_grpo_flux.py, flux_step.
    """
    return torch.full_like(ts[:-1], eta)

def flow_level(ts, eta=0.7):
    """eta_t of Eq. 12 in Flow-GRPO: eta sqrt(t / (1 - t)). ts (T+1,) -> (T,). Where t = 1, the
    denominator uses the next time instead.

    Source: arXiv 2505.05470; yifan123/flow_grpo, sd3_sde_with_logprob.py. MixGRPO's code has the
    same level; its paper has another one, CPS.
    """
    t = ts[:-1]
    below_1 = torch.where(t == 1, ts[1], t)
    return eta * (t / (1 - below_1)).sqrt()

def sde_std(t, t_next, level):
    """sigma_t of Eq. 5: the standard deviation of the noise that a step adds."""
    return level * (t - t_next).sqrt()

def sde_mean(x, v, t, t_next, level):
    """The mean of one Euler-Maruyama step (Eq. 15): the ODE's step less sigma_t^2 / (2 t) eps_hat.
    At level 0 it is the ODE's step."""
    eps_hat = x + (1 - t) * v           # the noise that v sees in x_t, which is -t times the score
    return ddim_step(x, v, t, t_next) - sde_std(t, t_next, level) ** 2 / (2 * t) * eps_hat

def log_prob(x_next, mean, std):
    """Eq. 16 with its constant: the log density of N(mean, std^2) at x_next.
    x_next, mean (M, ...), std to broadcast with them -> (M,).

    It is a MEAN over the D dimensions, not a sum, as in the code of DanceGRPO, Flow-GRPO and
    MixGRPO. So their ratio is the D-th root of the likelihood ratio. The published clip of 1e-4 is
    for this ratio.
    """
    z = (x_next - mean) / std
    each = -z**2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return each.flatten(1).mean(1)                                      # (M,)          Eq. 16

def sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level):
    """log pi_theta - log pi_old, by `log_prob`, of a step x_t -> x_next (M, ...) that the old
    velocity took -> (M,). It is 0 where v is v_old."""
    std = sde_std(t, t_next, level)
    log_pi = log_prob(x_next, sde_mean(x_t, v, t, t_next, level), std)
    log_pi_old = log_prob(x_next, sde_mean(x_t, v_old, t, t_next, level), std)
    return log_pi - log_pi_old                                          # (M,)

def sde_rollout(velocity, x, ts, levels, noise, solver="ddim"):
    """solvers.rollout, with noise in the steps whose level is above 0.

    x (M, ...), ts (T+1,), levels (T,), noise: one standard normal (M, ...) for each step with
    noise. The steps without noise are Euler's, but after the last step with noise they are the
    solver's (MixGRPO-Flash: DPM++). -> traj (T+1, M, ...), vels (T, M, ...).
    """
    with_noise = levels.nonzero().flatten().tolist()
    last = max(with_noise, default=-1)
    traj, vels, x0_prev, noise = [x], [], None, iter(noise)
    for k, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        v = velocity(x, t)
        if k > last and solver == "dpmpp_2m":
            x, x0_prev = dpmpp_2m_step(x, v, t, t_next, x0_prev, ts[k - 1])
        else:
            x0_prev, x = x - t * v, sde_mean(x, v, t, t_next, levels[k])
            if levels[k] > 0:
                x = x + sde_std(t, t_next, levels[k]) * next(noise)
        traj.append(x)
        vels.append(v)
    return torch.stack(traj), torch.stack(vels)

def global_advantages(rewards, everywhere=None):
    """The advantages of Flow-GRPO, DiffusionNFT and AWM: the mean is the group's, but the standard
    deviation (of the population, plus 1e-4) is that of ALL rewards of the iteration.

    rewards (P, G), everywhere: those of all processes -> (P, G), clamped to [-5, 5]. A group whose
    rewards are equal up to rounding gets zeros. Their code would magnify the rounding errors.
    """
    std = (rewards if everywhere is None else everywhere).std(correction=0)
    A = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)        # (P, G)
    return torch.where(is_flat(rewards)[:, None], 0.0, A.clamp(-5, 5))

# ------------------------------------------------------------------------------------------------
# MixGRPO (arXiv 2507.21802; Tencent-Hunyuan/MixGRPO): an SDE only inside a window of a few steps,
# which slides towards the image

def window_at(iteration, T, size, every):
    """The steps [start, end) of the window. Its start moves by one step after every `every`
    iterations, from 0 to T - 2, and then begins again at 0. As in their code, the window never has
    the last two steps. So it shrinks at the end and is empty at its last place. There all
    candidates are equal, and nothing is trained."""
    start = iteration // every % (T - 1) if every else 0
    return start, min(start + size, T - 2)

def flash_schedule(T, shift, end, compress):
    """MixGRPO-Flash: the T - end steps after the window, where nothing is trained, become
    int(compress (T - end)) steps.

    Their code counts points, not steps. So with Flash* (compress 0.2, window 0 to 4) their code
    takes 7 steps, and ours takes 8. Their paper reports 8 evaluations.
    """
    steps = max(1, int(compress * (T - end) + 1e-6))
    tail = schedule(steps, shift, start=1 - end / T)
    return torch.cat([schedule(T, shift)[:end], tail])

# ------------------------------------------------------------------------------------------------
# BranchGRPO (arXiv 2509.06040; Fredreic1849/BranchGRPO, train_branchgrpo_flux.py): candidates share
# the beginnings of their trajectories, which form a tree

def tree_widths(T, splits):
    """The number of nodes before each of T steps and after the last step: T+1 numbers. A node has
    two children at a split, otherwise one."""
    widths = [1]
    for k in range(T):
        widths.append(widths[-1] * (2 if k in splits else 1))
    return widths

def tree_advantages(rewards, width):
    """Advantages of the `width` nodes at one depth: the mean reward of the leaves below each node
    (reward fusion), standardised over the depth. (P, G) -> (P, width), clamped to [-5, 5]."""
    fused = rewards.unflatten(1, (width, -1)).mean(2)                   # (P, width)
    deviation = fused - fused.mean(1, keepdim=True)
    std = fused.std(1, keepdim=True, correction=min(1, width - 1))      # (P, 1)
    A = torch.where(std < 1e-6, deviation * 0, deviation / (std + 1e-8))
    return A.clamp(-5, 5)                                               # (P, width)

def pruned_depths(iteration, T, count, earliest, every):
    """Depth pruning: `count` depths are not trained. At first these are depths T - count to
    T - 1. After every `every` iterations, counted from 1, they move one depth earlier, until the
    first of them is `earliest`, the last split's. (In their paper they move the other way.) With 5
    of them NFE_theta is the published 8.625. At the end it is 9.125, because the last split has
    half the nodes."""
    moved = (iteration + 1) // every if every else 0
    start = max(T - count - moved, earliest)
    return range(start, start + count)

# ------------------------------------------------------------------------------------------------
# DiffusionNFT (arXiv 2509.16117; NVlabs/DiffusionNFT, train_nft_sd3.py): a weighted flow-matching
# loss on the images of the rollouts, without any likelihood

def nft_loss(x_t, t, x0, v, v_old, A, beta=1.0):
    """5 / beta [r L+ + (1 - r) L-] with L± = mean((x0_hat± - x0)^2) / w±,
    x0_hat± = x_t - t v±, v± = v_old ± beta (v - v_old), and r = (A / 5 + 1) / 2 in [0, 1].

    x_t, x0, v, v_old (M, ...), t to broadcast with them, A (M,) in [-5, 5] -> (M,). w± is the mean
    absolute error of the same prediction, without a gradient. Their code adds 1e-4 times the
    squared distance to the base model's velocity. We leave it out, because the other methods have
    no such term.
    """
    r = (A / 5 + 1) / 2                                                 # (M,)
    losses = []
    for sign in (1, -1):
        v_sign = v_old + sign * beta * (v - v_old)
        error = x_t - t * v_sign - x0                                   # (M, ...)
        w = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append(error.pow(2).flatten(1).mean(1) / w.to(error.dtype))
    return 5 / beta * (r * losses[0] + (1 - r) * losses[1])             # (M,)

def nft_decay(step):
    """The share of the old policy that stays after optimizer step `step` (their decay type 1). At
    first it is almost 0, and from step 500 on it is half."""
    return min(0.001 * step, 0.5)

# ------------------------------------------------------------------------------------------------
# AWM, Advantage Weighted Matching (arXiv 2509.25050; scxue/advantage_weighted_matching,
# train_sd3_awm.py): the likelihood of an image is the loss of pretraining

def awm_log_prob(v, x0, noise, t, power=0.25):
    """-(t / power) (e^power - c^power), with e = mean((v - (noise - x0))^2) + c, the flow-matching
    error at x_t = (1-t) x0 + t noise, and c = 1e-10 ("ghuber" in their code).

    v, x0, noise (M, ...), t (M,) -> (M,) float64. The power makes one image's large error count
    less. Like the other ratios here, that of two such numbers is a mean over the D dimensions.
    """
    c = 1e-10
    error = (v.double() - (noise - x0).double()).pow(2).flatten(1).mean(1) + c      # (M,)
    return -t / power * (error**power - c**power)                       # (M,)

def awm_steps(T, K, rng):
    """K of a rollout's T steps: one at random from each of K equal parts of the first 0.9 T."""
    bounds = torch.linspace(0, int(0.9 * T), K + 1).long()
    return bounds[:-1] + (torch.rand(K, generator=rng) * bounds.diff()).long()      # (K,)

# ------------------------------------------------------------------------------------------------
# FDFO, finite difference flow optimization (arXiv 2603.12893). Its code may not be used
# commercially; nothing here was copied from it. It is the nearest relative of Neighbor GRPO: pairs
# (G = 2) begin at almost the same noise, and the gradient at theta_old is along the difference of
# the two candidates. But FDFO takes the difference of their end points, at all times, and has a
# penalty instead of the clip.

def churn(x, t, noise, c):
    """Mix a little fresh noise into x_t: (x + t sqrt((1+c)^2 - 1) noise) / (1 + c t). The result
    belongs to the time t' = (1+c) t / (1 + c t). The ratio of noise to image, t' / (1 - t'), is 1+c
    times that at t. -> x_t', t'.

    At t = 1 this is Eq. 7 with sqrt(1 - sigma^2) = 1 / (1+c), and t' = 1. That is their formula. At
    other times we take the churn of EDM (arXiv 2206.00364, Algorithm 2). That is our reading.
    """
    x = (x + t * ((1 + c) ** 2 - 1) ** 0.5 * noise) / (1 + c * t)
    return x, (1 + c) * t / (1 + c * t)

def churned_rollout(velocity, x, ts, c, noise):
    """Euler's steps of the ODE, with churn before each.

    x (M, ...), ts (T+1,), noise (T, M, ...) standard normal. -> x_0 (M, ...), the states
    (T, M, ...) and times (T,) at which the velocity was computed, and the velocities (T, M, ...).
    """
    states, state_ts, vels = [], [], []
    for t, t_next, fresh in zip(ts[:-1], ts[1:], noise):
        x, t = churn(x, t, fresh, c)
        v = velocity(x, t)
        states.append(x)
        state_ts.append(t)
        vels.append(v)
        x = ddim_step(x, v, t, t_next)
    return x, torch.stack(states), torch.stack(state_ts), torch.stack(vels)

def half_difference(x):
    """Half the difference of each from its partner. x (M, ...): 0 and 1 are partners, 2 and 3, and
    so on -> (M, ...)."""
    pairs = x.unflatten(0, (-1, 2))                                     # (M / 2, 2, ...)
    return ((pairs - pairs.flip(1)) / 2).flatten(0, 1)                  # (M, ...)

def pair_advantages(rewards):
    """The half differences of rewards (P, G) -> (P, G), zeros for two equal up to rounding."""
    pairs = rewards.flatten()                                           # (P G,)
    flat = is_flat(pairs.unflatten(0, (-1, 2))).repeat_interleave(2)    # (P G,)
    return torch.where(flat, 0, half_difference(pairs)).view_as(rewards)

def end_point_direction(x0):
    """d / mean(d^2), where d is the half difference of two partners' x_0. (M, ...) -> (M, ...).

    The half difference of the rewards, times this, is D times the central difference of the reward
    along d, for any length of d.
    """
    d = half_difference(x0)
    return d / d.pow(2).flatten(1).mean(1).view(-1, *[1] * (d.ndim - 1))

def fdfo_log_ratio(v, v_old, d):
    """l - l_old with l = -mean((v - (v_old - d))^2), as if the velocity had a Gaussian around
    v_old - d, the velocity that moves x_0 by t d. v, v_old, d (M, ...) -> (M,). Like `log_ratio` of
    neighbor_grpo.py, it is computed from v - v_old, so it is exactly 0 at theta_old."""
    u = v - v_old
    return -(u * (u + 2 * d)).flatten(1).mean(1)                        # (M,)

def spo_objective(log_rho, A, eps):
    """sum_i A_i rho_i - |A_i| / (2 eps) (rho_i - 1)^2, to be MAXIMISED. Its gradient at theta_old
    is that of `clipped_objective`. log_rho (M,), A (M,) -> scalar. A term is largest at
    rho = 1 + eps if A > 0, and at 1 - eps if A < 0.

    Source: Simple Policy Optimization, arXiv 2401.16025. rho is at most e^40 here, so that its
    square does not overflow.
    """
    gain = log_rho.clamp(max=40).expm1()                                # (M,)          rho - 1
    return (A * (1 + gain) - A.abs() / (2 * eps) * gain**2).sum()       # ()

# ------------------------------------------------------------------------------------------------
# The loops, to be read beside train.py's

def train_sde(cfg, model, scorers, run):
    """DanceGRPO, Flow-GRPO, MixGRPO and MixGRPO-Flash. They differ in `sde_times`. Flow-GRPO also
    begins every candidate at its own noise, and divides advantages by the standard deviation of
    all rewards (`global_std`)."""
    P, G = cfg.prompts_per_iteration // WORLD, cfg.group_size
    U = cfg.updates_per_iteration
    prompts, weights = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers)
    row = torch.arange(P)[:, None]                                      # (P, 1)  goes with chosen
    own = times(cfg.shift, model, cfg.num_rollout_steps)                # (T+1,)

    for it in iterations(cfg, run):
        # Draw prompts, noise to begin with, the SDE's noise, and K of its steps per candidate
        seconds, lap = stopwatch(model.device)
        ts, start, end, levels = sde_times(cfg, own, it)                # (T+1,), ..., (T,)
        count = min(end, cfg.num_rollout_steps - 1) - start             # never trains the last step
        prompt, x1, noise, steps = draw(
            cfg, it, prompts, model.latent_shape, G if cfg.own_noise else 1, end - start,
            lambda rng: start + torch.randperm(count, generator=rng)[: cfg.num_train_steps])
        steps = steps.sort(1).values.view(P, G, -1)                     # (P, G, K)
        K = steps.shape[2]                                              # fewer in a short window

        # Roll out G candidates. The noise drives them apart.
        x1, noise = x1.to(model.device), noise.to(model.device)         # (P G, N, C), (S, P G, ...)
        with torch.no_grad():
            cond = model.encode(prompt)
            traj, vels = sde_rollout(lambda x, t: model.velocity(x, t, cond), x1, ts, levels,
                                     noise, cfg.solver)
            run.check_finite(traj[-1])
            images = model.decode(traj[-1])                             # (P G, 3, H, W)
        traj = traj.unflatten(1, (P, G))                                # (T+1, P, G, N, C)
        vels = vels.unflatten(1, (P, G))                                # (T, P, G, N, C)
        lap("rollout")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        A = standardised(cfg, scores, prompt, weights)                  # (P, G)        Eq. 3
        lap("reward")

        # Update: the likelihood ratio of every candidate's own steps
        log_rhos, trained = [], 0
        for chosen in torch.arange(G).chunk(U):                         # (g,)          g = G / U
            for j in range(K):
                k = steps[:, chosen, j]                                 # (P, g)        each its own
                t, t_next, level = at_steps(k.flatten(), ts, levels, model.device)
                x_t = traj[k, row, chosen].flatten(0, 1)                # (P g, N, C)
                x_next = traj[k + 1, row, chosen].flatten(0, 1)
                v_old = vels[k, row, chosen].flatten(0, 1)
                v = model.velocity(x_t, t.flatten(), cond)              # the only gradient
                log_rho = sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level)        # Eq. 16
                each_A = A[:, chosen].flatten()                         # (P g,)
                J = clipped_objective(log_rho, each_A, cfg.clip_eps)    # ()            Eq. 4
                loss = -J / (k.numel() * K)
                loss.backward()
                log_rhos.append(log_rho.detach())
                trained += k.numel()
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=len(vels), nfe_theta=trained / (P * G))

def train_branch(cfg, model, scorers, run):
    """BranchGRPO: one trajectory from each noise, which splits in two at some steps. All steps have
    noise. An edge of the tree has the advantage of the node that it leads to. The edges of the
    last step are trained too, as in their code, although no image contains their noise."""
    P, G = cfg.prompts_per_iteration // WORLD, cfg.group_size
    T, U = cfg.num_rollout_steps, cfg.updates_per_iteration
    prompts, weights = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers)
    ts = times(cfg.shift, model, T)                                     # (T+1,)
    levels, splits = LEVELS[cfg.noise](ts, cfg.eta), split_steps(cfg)   # (T,)

    for it in iterations(cfg, run):
        # Draw prompts. The noise is drawn in the rollout, node by node.
        seconds, lap = stopwatch(model.device)
        widths, edges = tree(cfg, it)
        prompt, rngs = groups(cfg, it, prompts)
        def normal(width):
            each = [torch.randn(width, *model.latent_shape, generator=rng) for rng in rngs]
            return torch.stack(each).to(model.device)                   # (P, w, N, C)

        # Roll out the tree. The network sees a node once, before it splits.
        nodes, vels = [normal(1)], []                                   # (P, 1, N, C)
        with torch.no_grad():
            cond = model.encode(prompt)
            for k, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
                x = nodes[-1].flatten(0, 1)                             # (P w, N, C)
                v = model.velocity(x, t, cond)
                mean = sde_mean(x, v, t, t_next, levels[k]).unflatten(0, (P, -1))
                mean = mean.repeat_interleave(widths[k + 1] // widths[k], 1)    # (P, w', N, C)
                std = sde_std(t, t_next, levels[k])
                if k in splits:                 # as in their code. It changes the SDE's marginals,
                    std = cfg.split_noise * std         # and log_prob does not have this factor.
                nodes.append(mean + std * normal(widths[k + 1]))        # (P, w', N, C)
                vels.append(v.unflatten(0, (P, -1)))                    # (P, w, N, C)
            x0 = x - t * v                      # of the last step, without its noise
            run.check_finite(x0)
            images = model.decode(x0)                                   # (P G, 3, H, W)
        lap("rollout")

        # Score the leaves, and turn the scores into advantages of all nodes
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        r = torch.stack(list(scores.values()), 1)                       # (P, M, G)
        leaves = combine_rewards(r, weights.to(r))                      # (P, G)        Eq. 3
        A = [tree_advantages(leaves, width) for width in widths]        # T+1 of (P, w)
        lap("reward")

        # Update: the likelihood ratio of the edges, in random order
        log_rhos, trained, n = [], 0, len(edges)
        order = torch.randperm(n, generator=generator(cfg.seed, 3, it)).tolist()
        for i in range(U):
            first, end = -(-n * i // U), -(-n * (i + 1) // U)           # rounded up
            mine = [edges[e] for e in order[first:end]]
            for j in range(0, len(mine), G):                            # G edges at a time
                some = mine[j : j + G]                                  # e of (step, parent, child)
                k = torch.tensor([k for k, _, _ in some]).repeat(P)     # (P e,)
                t, t_next, level = at_steps(k, ts, levels, model.device)
                x_t = side_by_side(nodes[k][:, parent] for k, parent, _ in some)    # (P e, N, C)
                v_old = side_by_side(vels[k][:, parent] for k, parent, _ in some)
                x_next = side_by_side(nodes[k + 1][:, child] for k, _, child in some)
                each_A = side_by_side(A[k + 1][:, child] for k, _, child in some)   # (P e,)
                v = model.velocity(x_t, t.flatten(), cond)              # the only gradient
                log_rho = sde_log_ratio(x_next, x_t, v, v_old, t, t_next, level)        # Eq. 16
                J = clipped_objective(log_rho, each_A, cfg.clip_eps)    # ()            Eq. 4
                loss = -J / (P * len(mine))
                loss.backward()
                log_rhos.append(log_rho.detach())
                trained += len(some)
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, leaves, log_rhos, seconds,
                nfe_old=sum(v.shape[1] for v in vels) / G, nfe_theta=trained / G)

def images_and_times(cfg, model, run, it, prompts, ts, steps_of):
    """How DiffusionNFT and AWM begin: draw prompts and G independent noises for each, and roll out
    by any ODE solver; then K times of the rollout, with fresh noise, for each image, to be trained.
    -> prompts, cond, x_0 (P G, N, C), images, times (K, P G, 1, 1), noise (K, P G, N, C)"""
    prompt, x1, noise, steps = draw(cfg, it, prompts, model.latent_shape, cfg.group_size,
                                    cfg.num_train_steps, steps_of)
    cond = model.encode(prompt)
    traj, _ = rollout(lambda x, t: model.velocity(x, t, cond), x1.to(model.device), ts, cfg.solver)
    x0 = traj[-1]                                                       # (P G, N, C)
    run.check_finite(x0)
    t = ts[steps.T][..., None, None]                                    # (K, P G, 1, 1)
    return prompt, cond, x0, model.decode(x0), t.to(model.device), noise.to(model.device)

def train_nft(cfg, model, scorers, run):
    """DiffusionNFT: the old policy, a slow average of the trained one, rolls out by any ODE solver.
    Then the loss is flow matching on its images, towards those with a positive advantage and away
    from the others. The average is run.ema, which is also evaluated and saved. Their code evaluates
    a second average with decay 0.9, about ten iterations behind. Here a run has only one."""
    T, K = cfg.num_rollout_steps, cfg.num_train_steps
    prompts, weights = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers)
    ts = times(cfg.shift, model, T)                                     # (T+1,)

    for it in iterations(cfg, run):
        # Roll out with the old policy, and compute its velocity at the points that are trained
        seconds, lap = stopwatch(model.device)
        with torch.no_grad(), run.averaged():
            prompt, cond, x0, images, t, noise = images_and_times(
                cfg, model, run, it, prompts, ts, lambda rng: torch.randperm(T, generator=rng)[:K])
            lap("rollout")
            x_t = (1 - t) * x0 + t * noise                              # (K, P G, N, C)
            v_old = [model.velocity(x_t[j], t[j].flatten(), cond) for j in range(K)]
        lap("update")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        A = standardised(cfg, scores, prompt, weights)                  # (P, G)
        lap("reward")

        # One update
        for j in range(K):
            v = model.velocity(x_t[j], t[j].flatten(), cond)            # the only gradient
            losses = nft_loss(x_t[j], t[j], x0, v, v_old[j], A.flatten(), cfg.beta)     # (P G,)
            loss = losses.mean() / K
            loss.backward()
        update(cfg, model, run, decay=min(nft_decay(it + 1), cfg.ema))
        lap("update")
        run.log(it, scores, A, [], seconds, nfe_old=T + K, nfe_theta=float(K))

def train_awm(cfg, model, scorers, run):
    """AWM: as in DiffusionNFT, rollouts by any ODE solver and flow matching on their images, but by
    a likelihood ratio. The policy that rolls out is the one that is trained. So in the first update
    the old velocity is the new one, and only later updates evaluate it. Advantages are in [-1, 1].

    Their loss also has the squared distances to two other velocities. That to the base's, times
    1e-4, is left out as in DiffusionNFT. That to a fast average of the policy is, too: the average
    keeps at most 0.001 of itself for each iteration that was made, so in runs as short as ours it
    is the policy."""
    P, G = cfg.prompts_per_iteration // WORLD, cfg.group_size
    T, K, U = cfg.num_rollout_steps, cfg.num_train_steps, cfg.updates_per_iteration
    prompts, weights = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers)
    ts = times(cfg.shift, model, T)                                     # (T+1,)

    for it in iterations(cfg, run):
        # Roll out
        seconds, lap = stopwatch(model.device)
        with torch.no_grad():
            prompt, cond, x0, images, t, noise = images_and_times(
                cfg, model, run, it, prompts, ts, lambda rng: awm_steps(T, K, rng))
        lap("rollout")

        # Score them, and turn scores into advantages
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        A = standardised(cfg, scores, prompt, weights)                  # (P, G)
        lap("reward")

        # The old log probabilities of the images of all updates but the first
        x_t = (1 - t) * x0 + t * noise                                  # (K, P G, N, C)
        def log_prob_of(j, some):
            v = model.velocity(x_t[j, some], t[j, some].flatten(), cond)
            return awm_log_prob(v, x0[some], noise[j, some], t[j, some].flatten())
        parts = [part.flatten() for part in torch.arange(P * G).view(P, G).chunk(U, 1)]     # (P g,)
        with torch.no_grad():
            old = [[log_prob_of(j, some) for j in range(K)] for some in parts[1:]]

        # Update: the likelihood ratio of every image at its own K times
        log_rhos, trained = [], 0
        for u, some in enumerate(parts):                                # (P g,)        g = G / U
            each_A = A.flatten()[some] / 5                              # (P g,)
            for j in range(K):
                log_pi = log_prob_of(j, some)                           # the only gradient
                log_rho = (log_pi - (old[u - 1][j] if u else log_pi.detach())).float()  # (P g,)
                J = clipped_objective(log_rho, each_A, cfg.clip_eps)    # ()
                loss = -J / (len(some) * K)
                loss.backward()
                log_rhos.append(log_rho.detach())
                trained += len(some)
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=T + K * (1 - 1 / U),
                nfe_theta=trained / (P * G))

def train_fdfo(cfg, model, scorers, run):
    """FDFO: G / 2 pairs for each prompt. A little noise drives the two of a pair apart. At every
    step of both, the velocity is pulled towards the image with the better score and away from the
    other. The reward is the weighted sum of all rewards. It is not standardised. The updates share
    the pairs of each prompt, or if these are too few, the prompts."""
    P, G = cfg.prompts_per_iteration // WORLD, cfg.group_size
    T, U = cfg.num_rollout_steps, cfg.updates_per_iteration
    prompts, weights = read_prompts(cfg.prompts), parse_weights(cfg.reward_weights, scorers)
    ts = times(cfg.shift, model, T)                                     # (T+1,)

    for it in iterations(cfg, run):
        # Draw prompts, one noise for each pair, and fresh noise for each step
        seconds, lap = stopwatch(model.device)
        prompt, x1, noise, _ = draw(cfg, it, prompts, model.latent_shape, G // 2, T)

        # Roll out the pairs
        x1, noise = x1.to(model.device), noise.to(model.device)         # (P G, N, C), (T, P G, ...)
        with torch.no_grad():
            cond = model.encode(prompt)
            x0, states, state_ts, vels = churned_rollout(
                lambda x, t: model.velocity(x, t, cond), x1, ts, cfg.churn, noise)
            run.check_finite(x0)
            images = model.decode(x0)                                   # (P G, 3, H, W)
        states, vels = states.unflatten(1, (P, G)), vels.unflatten(1, (P, G))   # (T, P, G, N, C)
        lap("rollout")

        # Score them, and take the half differences of scores and of end points
        scores = score(scorers, images, prompt)                         # {name: (P, G)}
        r = torch.stack(list(scores.values()), 1)                       # (P, M, G)
        A = pair_advantages(weights.to(r) @ r)                          # (P, G)
        d = end_point_direction(x0).unflatten(0, (P, G))                # (P, G, N, C)
        lap("reward")

        # Update at every step of both trajectories, along the difference of their end points
        log_rhos, trained = [], 0
        rows, pairs = torch.arange(P), torch.arange(G)
        parts = ([(rows, some) for some in pairs.chunk(U)] if G // 2 % U == 0 else
                 [(some, pairs) for some in rows.chunk(U)])
        for mine, chosen in parts:                                      # (p,), (g,)
            its_cond = {name: of[mine.to(of.device)] for name, of in cond.items()}
            row = mine[:, None]                                         # (p, 1)  goes with chosen
            each_A, each_d = A[row, chosen].flatten(), d[row, chosen].flatten(0, 1)     # (p g, ...)
            for k in range(T):
                x_t = states[k][row, chosen].flatten(0, 1)              # (p g, N, C)
                v_old = vels[k][row, chosen].flatten(0, 1)
                v = model.velocity(x_t, state_ts[k], its_cond)          # the only gradient
                log_rho = fdfo_log_ratio(v, v_old, each_d)              # (P g,)
                J = spo_objective(log_rho, each_A, cfg.clip_eps)        # ()
                loss = -J / (len(log_rho) * T)
                loss.backward()
                log_rhos.append(log_rho.detach())
                trained += len(log_rho)
            update(cfg, model, run)
        lap("update")
        run.log(it, scores, A, log_rhos, seconds, nfe_old=len(vels), nfe_theta=trained / (P * G))

# ------------------------------------------------------------------------------------------------
# What the loops call. The draws depend on the seed, the iteration and the group, as in train.py.

def iterations(cfg, run):
    """The iterations that are left, with the saves and evaluations that train.py's loop shows."""
    for it in run.iterations():
        if cfg.save_every and it % cfg.save_every == 0:
            run.save()
        if cfg.eval_every and it % cfg.eval_every == 0:
            run.evaluate()
        yield it

def groups(cfg, it, prompts):
    """The prompts of this process's P groups, and a generator for the draws of each."""
    P = cfg.prompts_per_iteration // WORLD
    mine = range(RANK * P, RANK * P + P)
    return ([pick(cfg, it, group, prompts) for group in mine],
            [generator(cfg.seed, 2, it, group) for group in mine])

def draw(cfg, it, prompts, latent_shape, begins, count, steps_of=lambda rng: ()):
    """P prompts; x_1 (P G, N, C), with `begins` different noises for the G candidates of a prompt;
    `count` more noises of each, (count, P G, N, C); and the steps that each trains, steps_of(rng),
    (P G, K)."""
    G = cfg.group_size
    chosen, rngs = groups(cfg, it, prompts)
    x1, noise, steps = [], [], []
    for rng in rngs:
        begin = torch.randn(begins, *latent_shape, generator=rng)
        x1.append(begin.repeat_interleave(G // begins, 0))              # (G, N, C)
        noise.append(torch.randn(count, G, *latent_shape, generator=rng))
        steps += [torch.as_tensor(steps_of(rng)) for _ in range(G)]     # each (K,)
    return chosen, torch.cat(x1), torch.cat(noise, 1), torch.stack(steps)

def sde_times(cfg, ts, it):
    """From a model's own times: an iteration's, its SDE steps [start, end), and the noise level of
    every step, 0 for a step of the ODE. In DanceGRPO (which decodes the predicted x_0) and in
    MixGRPO, the last step is one of the ODE. In Flow-GRPO it has noise (`noisy_end`), and so has
    the image. But it is not trained: their timestep_fraction of 0.99 trains 5 of 6 steps."""
    T = cfg.num_rollout_steps
    start, end = 0, T if cfg.noisy_end else T - 1
    if cfg.window:
        start, end = window_at(it, T, cfg.window, cfg.window_every)
    if cfg.compress < 1:
        t, u = ts[T // 2], 1 - T // 2 / T
        shift = cfg.shift or float(t / (1 - t) / (u / (1 - u)))     # the one with the same middle
        ts = flash_schedule(T, shift, end, cfg.compress)
    levels = LEVELS[cfg.noise](ts, cfg.eta)
    levels[:start] = levels[end:] = 0
    return ts, start, end, levels

def tree(cfg, it):
    """BranchGRPO's tree: the numbers of nodes before each step and after the last, and the edges
    that are trained in an iteration, as (step, parent, child)."""
    T, splits = cfg.num_rollout_steps, split_steps(cfg)
    widths = tree_widths(T, splits)
    pruned = pruned_depths(it, T, cfg.prune, max(splits), cfg.window_every)
    edges = [(k, child * widths[k] // widths[k + 1], child)
             for k in range(T) if k + 1 not in pruned
             for child in range(widths[k + 1])]
    return widths, edges

def split_steps(cfg):
    """The numbers in cfg.splits, without other words, which `Config.rules` refuses."""
    return [int(k) for k in cfg.splits.split(",") if re.fullmatch("[0-9]+", k.strip())]

def at_steps(k, ts, levels, device):
    """t, t_next and the noise level at the steps k (M,), each (M, 1, 1)."""
    return [each[k][:, None, None].to(device) for each in (ts, ts[1:], levels)]

def side_by_side(parts):
    """e tensors (P, ...) -> (P e, ...), group by group."""
    return torch.stack(list(parts), 1).flatten(0, 1)

def standardised(cfg, scores, prompt, weights):
    """Advantages (P, G) in [-5, 5]: the weighted mean of Eq. 3 on each reward, as in MixGRPO. With
    global_std: `global_advantages` of the weighted sum of the rewards."""
    if not cfg.global_std:
        r = torch.stack(list(scores.values()), 1)                       # (P, M, G)
        return combine_rewards(r, weights.to(r)).clamp(-5, 5)           # (P, G)        Eq. 3
    total = sum(w * s for w, s in zip(weights, scores.values()))        # (P, G)
    everywhere = torch.cat(gather_objects(total.cpu()))
    return global_advantages(total, everywhere.to(total.device))

def nfe(cfg, it=0):
    """Network evaluations per image in an iteration: those of the rollout, and the trained ones."""
    T, K, G = cfg.num_rollout_steps, cfg.num_train_steps, cfg.group_size
    if cfg.method == "branch":
        widths, edges = tree(cfg, it)
        return sum(widths[:-1]) / G, len(edges) / G
    if cfg.method == "nft":                     # the old policy also sees the K trained points
        return T + K, K
    if cfg.method == "awm":                     # ... those of all updates but the first
        return T + K * (1 - 1 / cfg.updates_per_iteration), K
    if cfg.method == "fdfo":
        return T, T
    ts, start, end, _ = sde_times(cfg, schedule(T, cfg.shift or 1), it)
    return len(ts) - 1, min(K, end - start)

# ------------------------------------------------------------------------------------------------
# Settings: defaults < preset < method < command line

@dataclass
class Config(train.Config):
    method: str = option("", "which of the baselines",
                         ("dance", "flow", "mix", "flash", "branch", "nft", "awm", "fdfo"))
    num_rollout_steps: int = option(25, "T, steps of a rollout", "[2, inf)")
    num_train_steps: int = option(4, "K, number of trained steps, drawn for each candidate from "
                                  "the SDE's steps; nft, awm: from the rollout's", "[1, inf)")
    updates_per_iteration: int = option(3, "optimizer steps per iteration; they share the "
                                        "candidates, or branch's edges", "[1, inf)")
    solver: str = option("ddim", "for the ODE's steps after the SDE's, and for nft's and awm's "
                         "rollout",
                         ("ddim", "dpmpp_2m"))
    noise: str = option("", "noise level. dance: eta at all times; flow: eta sqrt(t / (1 - t))",
                        ("", "dance", "flow"))
    eta: float = option(0.0, "strength of the noise (Eq. 12)", "[0, 100]")
    own_noise: bool = option(False, "every candidate begins at its own noise, not at its group's")
    noisy_end: bool = option(False, "the last step has noise, too; it is not trained")
    window: int = option(0, "SDE steps in a window, which ends before T-1; 0: all but the last "
                         "(noisy_end: all)", "[0, inf)")
    window_every: int = option(0, "iterations after which the window, or the pruned depths, move "
                               "by one step; 0: never", "[0, inf)")
    compress: float = option(1.0, "flash: the share of the steps after the window that remain",
                             "(0, 1]")
    global_std: bool = option(False, "divide advantages by the standard deviation of all rewards, "
                              "not by that of their group")
    splits: str = option("", "branch: the steps at which every node gets two children, "
                         "comma-separated; G must be 2 to the power of their number")
    split_noise: float = option(1.0, "branch: factor for the noise at the splits", "[0, 100]")
    prune: int = option(0, "branch: number of depths that are not trained", "[0, inf)")
    beta: float = option(0.0, "nft: distance of v+ and v- from the old policy", "[0, 100]")
    churn: float = option(0.0, "fdfo: by how much the share of noise grows before each step",
                          "[0, 1]")

    command: ClassVar = "-m paper.baselines"
    code: ClassVar = ("paper/baselines.py", "neighbor_grpo.py")
    num_anchors: ClassVar = 0                   # These are not settings here: all candidates are
    sigma: ClassVar = 0                         # trained, their noises are equal or independent,
    p: ClassVar = 0                             # and there is no quasi-norm and no distance.
    tau: ClassVar = ""
    old_anchor: ClassVar = ""

    def plan(self):
        """The cost of an iteration, in one line."""
        old, theta = nfe(self)
        return (f"{self.method}: {self.prompts_per_iteration} prompts x G {self.group_size}, "
                f"NFE_old {old:.2f}, NFE_theta {theta:.2f}, {self.updates_per_iteration} updates")

    def rules(self):
        """[(holds, the sentence if it does not)] for the settings of the method."""
        T, G, U = self.num_rollout_steps, self.group_size, self.updates_per_iteration
        K, P, method = self.num_train_steps, self.prompts_per_iteration // WORLD, self.method
        row, shared = METHODS.get(method, {}), {f.name for f in fields(train.Config)}
        unused = [f for f in fields(self) if f.name in UNUSED.get(method, ())
                  or f.name not in {*shared, *row, "method", "global_std"}]
        rules = [
            *((getattr(self, f.name) == f.default, f"{f.name} is not a setting of {method}")
              for f in unused),
            (not row.get("noise") or self.noise, "noise is empty, but must be dance or flow"),
            (not row.get("eta") or self.eta > 0,
             f"eta is {self.eta:g}, but must be above 0: nothing can be learnt without noise")]
        if method == "branch":
            steps = split_steps(self)
            last = max(steps, default=0)
            splits_fit = (len(self.splits.split(",")) == len(set(steps)) and 2 ** len(steps) == G
                          and last < T - 1)
            return rules + [
                (splits_fit, f"splits is {self.splits}, but must be different steps below {T - 1}, "
                             f"and so many that doubling at each gives G, {G}, leaves"),
                (self.prune < T - last, f"prune is {self.prune}, but must lie between 0 and "
                                        f"{T - 1 - last}, the depths after the last split"),
                (U <= 2 * G - 2,
                 f"updates_per_iteration is {U}, but must be at most 2 G - 2, {2 * G - 2}")]
        if method == "fdfo":
            return rules + [
                (G % 2 == 0, f"group_size (G) is {G}, but must be even: fdfo has pairs"),
                (G // 2 % U == 0 or P % U == 0,
                 f"updates_per_iteration is {U}, but must divide the number of pairs of a prompt, "
                 f"{G // 2}, or of a process's prompts, {P}"),
                (self.churn >= 1e-6, f"churn is {self.churn:g}, but must be at least 1e-6: the two "
                                     "of a pair would be the same")]
        if method == "nft":
            rules += [
                (U == 1, f"updates_per_iteration is {U}, but must be 1 for nft"),
                (0 < self.ema <= 0.5 and self.beta > 0,
                 f"ema is {self.ema:g} and beta {self.beta:g}, but for nft ema, the largest share "
                 "of the old policy that stays, must lie in (0, 0.5], and beta must be above 0")]
        to_draw_from = dict(nft=T, awm=int(0.9 * T)).get(method, self.window or T - 1)
        return rules + [
            (self.window <= max(0, T - 2), f"window is {self.window}, but must be at most T-2, "
                                           f"{T - 2}: the last two steps are never in it"),
            (K <= to_draw_from, f"num_train_steps (K) is {K}, but must lie between 1 and "
                                f"{to_draw_from}, the steps to draw from"),
            (G % U == 0, f"updates_per_iteration is {U}, but must divide group_size (G), {G}")]

# As published, for FLUX.1-dev if there are such settings. A comment says what differs.
METHODS = {
    # T and K are those of this paper; their code has 16 and 9
    "dance": dict(noise="dance", eta=0.3, num_rollout_steps=25, num_train_steps=14,
                  updates_per_iteration=3, window=0, solver="ddim"),
    # G is 12 here, not 24; they train adapters and keep an average
    "flow": dict(noise="flow", eta=0.9, num_rollout_steps=6, num_train_steps=5, own_noise=True,
                 noisy_end=True, updates_per_iteration=2, global_std=True, solver="ddim"),
    "mix": dict(noise="flow", eta=0.7, num_rollout_steps=25, num_train_steps=4,
                updates_per_iteration=4, window=4, window_every=25, solver="ddim"),
    # Flash*; Flash has window_every 20 and compress 0.4
    "flash": dict(noise="flow", eta=0.7, num_rollout_steps=25, num_train_steps=4,
                  updates_per_iteration=4, window=4, window_every=0, compress=0.2,
                  solver="dpmpp_2m"),
    # 18 updates: one for 12 edges of a whole tree, or for 7.7 of a pruned one
    "branch": dict(noise="dance", eta=0.3, num_rollout_steps=20, num_train_steps=4, group_size=16,
                   splits="0,3,6,9", split_noise=4.0, prune=0, window_every=30, clip_eps=1e-3,
                   updates_per_iteration=18, solver="ddim"),
    # G is 12 here, not 24; they train adapters, and evaluate another average (`train_nft`)
    "nft": dict(num_rollout_steps=10, num_train_steps=9, updates_per_iteration=1, beta=1.0,
                ema=0.5, global_std=True, solver="dpmpp_2m"),
    # For SD3.5-M and PickScore. G is 12 here, not 24; SA-Solver is the rollout's; they train
    # adapters and keep an average (`train_awm`). With one update the clip has no effect.
    "awm": dict(num_rollout_steps=14, num_train_steps=6, updates_per_iteration=1, clip_eps=1.0,
                global_std=True, solver="dpmpp_2m"),
    # For SD3.5-M. A prompt has 6 pairs here, in 3 updates; they have one pair for each of 432
    # prompts, in 4 updates. They train adapters, without guidance. clip_eps is the penalty's eps.
    "fdfo": dict(num_rollout_steps=40, num_train_steps=4, updates_per_iteration=3, churn=0.0025,
                 clip_eps=0.03, solver="ddim"),
}
# Branch trains every edge, fdfo every step; nft has no ratio to clip.
UNUSED = {"branch": ("num_train_steps", "solver", "global_std"), "nft": ("clip_eps",),
          "fdfo": ("num_train_steps", "solver", "global_std")}
LEVELS = {"dance": dance_level, "flow": flow_level}
LOOPS = {"dance": train_sde, "flow": train_sde, "mix": train_sde, "flash": train_sde,
         "branch": train_branch, "nft": train_nft, "awm": train_awm, "fdfo": train_fdfo}

def loop(cfg, model, scorers, run):
    LOOPS[cfg.method](cfg, model, scorers, run)

def parse_config(argv=None):
    return train.parse_config(argv, Config, METHODS, __doc__)

if __name__ == "__main__":
    exit_process(train.main(None, parse_config, loop))
