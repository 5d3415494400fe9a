"""
Neighbor GRPO with each group spread over several processes, on the flow of toy.py.

    torchrun --nproc_per_node 2 examples/split_groups.py        # or 4 processes, or python: 1

A process that trains an anchor needs the states of its whole group. It is simplest to keep a group
in one process, as train.py does. If your sampler spreads it:

  eps*, delta   the same eps* in all processes, another delta for each candidate: seeds name the
                iteration, the group and the candidate, and never the process.
  keys          each candidate has the key of its eps*. A prompt is no key: two groups may share it.
  all_gather    keys, rewards, and the states after the trained steps.
  anchors       as many in each process, so that the mean of gradients is the mean over anchors.
"""
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.toy import Flow, reward
from neighbor_grpo import group_advantages, neighbor_grpo_loss, perturb_noise

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def rng(iteration, group=0, candidate=0):
    return torch.Generator().manual_seed((iteration * 1000 + group) * 1000 + candidate)

def gather(x):
    """The rows of all processes."""
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def iteration(flow, opt, it, groups=2, G=12, B=4, U=2, K=4, T=8, D=2, sigma=0.3, clip_eps=1e-4):
    """G / WORLD candidates of each group are in this process. WORLD times U must divide B."""
    ts, steps = torch.linspace(1, 0, T + 1), torch.randperm(T - 1, generator=rng(it))[:K].tolist()
    mine = range(RANK * G // WORLD, (RANK + 1) * G // WORLD)            # candidates of each group
    key = torch.arange(groups).repeat_interleave(len(mine))             # (M,)
    eps_star = torch.stack([torch.randn(D, generator=rng(it, g + 1)) for g in range(groups)])
    delta = torch.stack([torch.randn(1, D, generator=rng(it, g + 1, i + 1))
                         for g in range(groups) for i in mine])         # (M, 1, D)
    traj = [perturb_noise(eps_star[key], delta, sigma)[:, 0]]           # (M, D)        Eq. 7
    step = lambda x, k: x + (ts[k + 1] - ts[k]) * flow(x, ts[k])        # Euler's
    with torch.no_grad():
        for k in range(T):
            traj.append(step(traj[k], k))

    keys, r = gather(key), gather(reward(traj[-1]))                     # (groups G,) each
    x = {k: gather(traj[k + 1]) for k in steps}                         # (groups G, D) each
    A = [group_advantages(r[keys == g]) for g in range(groups)]         # (G,) each     Eq. 3, 11
    # One anchor from each B-th part of a group, so that each process has as many
    offset = torch.randint(G // B, (groups, B), generator=rng(it, groups + 1))
    anchors = (torch.arange(B) * (G // B) + offset)[:, RANK * B // WORLD : (RANK + 1) * B // WORLD]
    anchors = anchors - mine[0] + len(mine) * torch.arange(groups)[:, None]     # rows of traj[k]
    for u in range(U):
        for k in steps:
            for g in range(groups):
                j = anchors[g, u::U]                                    # (b,)  b = B / WORLD / U
                x_theta, x_old = step(traj[k][j], k), traj[k + 1][j]    # (b, D)        Eq. 2
                loss, _ = neighbor_grpo_loss(x[k][keys == g], x_theta, x_old, A[g], D, clip_eps)
                (loss / (K * groups * WORLD)).backward()
        for w in flow.parameters():
            dist.all_reduce(w.grad)                                     # a sum; DDP divides it, too
        opt.step(); opt.zero_grad()
    return r.mean().item()

def main(path=None, iterations=150):
    where = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("gloo", **where)
    torch.manual_seed(1); flow = Flow()
    opt = torch.optim.Adam(flow.parameters(), lr=2e-3)
    rewards = [iteration(flow, opt, it) for it in range(int(iterations))]
    if RANK == 0:
        print(f"{WORLD} processes: mean reward {rewards[0]:.3f}, at the end {rewards[-1]:.3f}")
        if path:
            torch.save(flow.state_dict(), path)
    dist.destroy_process_group()

if __name__ == "__main__":
    main(*sys.argv[1:])
