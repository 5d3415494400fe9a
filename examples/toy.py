"""
Neighbor GRPO in two dimensions. It takes ten seconds on one core, and loads no model.

    python examples/toy.py                  # writes assets/method.png and assets/method.gif

The data are six Gaussians on a ring, so the velocity of the flow is known exactly. A small network
is added to it. The network starts at zero, and only the network is trained. The reward is minus the
distance to a point. Time t runs from 1 (noise) to 0 (data): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.
"""
import math, sys
from pathlib import Path
import matplotlib
import torch
from matplotlib import animation, pyplot as plt
from torch import nn
HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))                   # so that the script finds the project's files
from neighbor_grpo import group_advantages, log_policy, neighbor_grpo_loss, perturb_noise

ASSETS = HERE / "assets"
ANGLES = torch.arange(6) * math.pi / 3
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)                # (6, 2) of the data
STD = 0.25                                                              # of each mode
TARGET = torch.tensor([1.2, 1.4])                                       # where the reward peaks
EPS_STAR = torch.tensor([0.1, 0.3])                                     # the noise in the picture


def reward(x):
    return -(x - TARGET).norm(dim=-1)


def exact_velocity(x, t):
    """v = E[eps - x_0 | x_t = x] of the data. x (M, 2) -> (M, 2)."""
    var = (1 - t) ** 2 * STD**2 + t**2                                  # of x_t around (1-t) mode
    away = x[:, None] - (1 - t) * MODES                                 # (M, 6, 2)
    weight = torch.softmax(-away.pow(2).sum(-1) / (2 * var), 1)         # (M, 6)  mode's probability
    slope = (t - (1 - t) * STD**2) / var
    return (weight[..., None] * (slope * away - MODES)).sum(1)          # (M, 2)


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                 nn.Linear(64, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t):
        return exact_velocity(x, t) + self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def neighbor_grpo_step(velocity, reward, opt, shape, G=12, B=4, K=4, T=8, updates=2, sigma=0.3,
                       clip_eps=1e-4, device="cpu"):
    """One iteration for one prompt. velocity(x (M, *shape), t) -> v ~ noise - data, the guided one
    if you guide; t falls from 1 (noise) to 0. reward(x_0 (G, *shape)) -> (G,)."""
    ts, D = torch.linspace(1, 0, T + 1, device=device), torch.Size(shape).numel()

    def step(x, k):                                     # Euler's, from ts[k]: (M, D) -> (M, D)
        return x + (ts[k + 1] - ts[k]) * velocity(x.view(-1, *shape), ts[k]).reshape(x.shape)

    eps_star, delta = torch.randn(D, device=device), torch.randn(G, D, device=device)
    traj = [perturb_noise(eps_star, delta, sigma)]      # T+1 states of the group, (G, D) each
    with torch.no_grad():
        for k in range(T):                              # your own sampler, with its SDE off
            traj.append(step(traj[k], k))
        A = group_advantages(reward(traj[-1].view(G, *shape)))          # (G,)
    anchors, times = torch.randperm(G)[:B].to(device), torch.randperm(T - 1)[:K].tolist()
    for update, j in enumerate(anchors.chunk(updates)):                 # (b,)  b = B / updates
        for k in times:                                 # never the last step, as in train.py
            x, x_theta = traj[k + 1], step(traj[k][j], k)               # x_theta has the gradient
            x_old = x[j]        # Heun, DPM++: traj[k][j] + (ts[k + 1] - ts[k]) * its velocity there
            loss, log_rho = neighbor_grpo_loss(x, x_theta, x_old, A, D, clip_eps)       # tau = D
            assert update or log_rho.abs().max() < 1e-3, "rho is not 1: SDE, dropout, guidance?"
            (loss / K).backward()       # no / K if your trainer divides by the number of calls
        opt.step()
        opt.zero_grad()


@torch.no_grad()
def follow(velocity, x, T=16):
    """All states on the way from noise to data, (T+1, M, 2)."""
    ts, path = torch.linspace(1, 0, T + 1), [x]
    for t, t_next in zip(ts[:-1], ts[1:]):
        path.append(path[-1] + (t_next - t) * velocity(path[-1], t))
    return torch.stack(path)


def contours(ax, side=3.0):
    """The reward as shaded contours, its peak as a star."""
    line = torch.linspace(-side, side, 200)
    x, y = torch.meshgrid(line, line, indexing="xy")
    ax.contourf(x, y, reward(torch.stack([x, y], -1)), levels=12, cmap="Greens", alpha=0.35)
    ax.plot(*TARGET, "*", color="darkgreen", markersize=14)
    ax.set(xlim=(-side, side), ylim=(-side, side), xticks=[], yticks=[], aspect="equal")


def draw_method(flow, before, after, iterations):
    """The picture that explains the method: one group, one step of one anchor, and samples before
    and after training."""
    figure, (bundle, step, samples) = plt.subplots(1, 3, figsize=(14, 5.6), layout="constrained")
    G, tau = 12, 0.6
    j, k = 4, 4                                 # the anchor and its step in the second panel
    torch.manual_seed(4)
    traj = follow(flow, perturb_noise(EPS_STAR, torch.randn(G, 2), 0.4), T=8)       # (T+1, G, 2)
    A = group_advantages(reward(traj[-1]))
    look = dict(c=A, cmap="coolwarm_r", vmin=-0.12, vmax=0.12, edgecolors="black", zorder=3)

    contours(bundle)
    for i in range(G):
        bundle.plot(*traj[:, i].T, color=plt.cm.coolwarm_r(A[i].item() / 0.24 + 0.5), linewidth=1.5)
    bundle.scatter(*traj[0].T, s=16, facecolors="white", edgecolors="black", zorder=3)
    bundle.scatter(*traj[-1].T, s=60, **look)
    bundle.plot(*EPS_STAR, "X", color="black", markersize=9)
    bundle.set_title("1. Perturb one noise, follow the ODE")
    bundle.set_xlabel("X: one noise. Small white: its 12 neighbours (Eq. 7).\n"
                      "Coloured: their images, blue where the reward is above\n"
                      "the group's mean, red where below. Star: the best reward.")

    ts = torch.linspace(1, 0, 9)
    x_t, x = traj[k, j], traj[k + 1]
    x_theta = (x_t + (ts[k + 1] - ts[k]) * flow(x_t[None], ts[k])[0]).detach()      # Eq. 2
    weight = log_policy(x, x_theta, tau).exp()                                      # Eq. 8
    pull = 2 / tau * (A[:, None] * x).sum(0)                                        # dJ / dx_theta
    tip = x_theta + 0.5 * pull / pull.norm()
    step.scatter(*x.T, s=40 + 2500 * weight, **look)
    step.annotate("", x_theta, x_t, arrowprops=dict(arrowstyle="->", linewidth=2), zorder=4)
    step.annotate("", tip, x_theta, zorder=4,
                  arrowprops=dict(arrowstyle="-|>", color="darkorange", linewidth=4))
    step.annotate("one DDIM step", x_t, (-100, -4), textcoords="offset points")
    step.annotate("pull", tip, (6, 0), textcoords="offset points", color="darkorange", size=13)
    step.set_title("2. The model in training takes one step (black)")
    step.set_xlabel("The group at that time. Size: the policy, a softmax of -distance$^2$\n"
                    r"(Eq. 8). Pull: the direction of the gradient, $(2/\tau) \Sigma_i A'_i x_i$,"
                    "\ntowards blue and away from red. The sizes do not change it yet.")
    step.set(xticks=[], yticks=[])
    step.axis("equal")
    step.margins(0.2)

    contours(samples)
    samples.scatter(*before.T, s=5, color="grey", alpha=0.6)
    samples.scatter(*after.T, s=5, color="black")
    samples.set_title("3. What it learns")
    samples.set_xlabel(f"Samples before (grey, mean reward {reward(before).mean():.2f})\n"
                       f"and after {iterations} iterations (black, {reward(after).mean():.2f}),\n"
                       "from the same noises.")
    figure.savefig(ASSETS / "method.png", dpi=90)


def draw_movie(frames):
    """Samples from the same noise while the model learns. frames: [(iteration, (M, 2))]."""
    figure, ax = plt.subplots(figsize=(3.6, 3.9), layout="tight")
    contours(ax)
    dots = ax.scatter([], [], s=4, color="black", alpha=0.6)

    def show(frame):
        iteration, x = frame
        dots.set_offsets(x)
        ax.set_title(f"iteration {iteration}, mean reward {reward(x).mean():.2f}", fontsize=10)

    movie = animation.FuncAnimation(figure, show, frames)
    movie.save(ASSETS / "method.gif", writer=animation.PillowWriter(fps=8), dpi=80)


def main(iterations=150):
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    flow, noise = Flow(), torch.randn(600, 2)
    opt = torch.optim.Adam(flow.parameters(), lr=2e-3)
    frames = [(0, follow(flow, noise)[-1])]
    for iteration in range(1, iterations + 1):
        neighbor_grpo_step(flow, reward, opt, (2,))
        if iteration % 8 == 0:
            frames.append((iteration, follow(flow, noise)[-1]))
            print(f"iteration {iteration:3d}  mean reward {reward(frames[-1][1]).mean():.3f}")
    draw_method(Flow(), frames[0][1], frames[-1][1], iterations)
    draw_movie(frames + frames[-1:] * 8)
    print(f"wrote {ASSETS}/method.png and method.gif")


if __name__ == "__main__":
    main()
