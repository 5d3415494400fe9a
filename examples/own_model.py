"""
Your own flow model, aligned by the same train() as FLUX. This one is a small U-Net that draws
pictures of 16x16 pixels and takes no prompt. The whole example takes two minutes on one core.

    python examples/own_model.py        # replaces the run in out/own_model

It trains the U-Net on emoji shrunk to 16x16, then aligns it with `redness` of
examples/own_reward.py. out/own_model/samples.png shows samples before (above) and after (below).
The top of model.py lists what train() needs from a model.
"""
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from torch import nn
HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))                   # so that the script finds the project's files
import train
from eval import as_bytes, picture_grid
from examples.own_reward import redness
from run import Run
from solvers import rollout, schedule

SHEET = HERE / "tiny/pictures/world.webp"


def emoji():
    """The pictures of the small world, shrunk: (5138, 3, 16, 16) in [-1, 1]."""
    sheet = Image.open(SHEET).convert("RGB").reduce(4)                  # cells of 16 x 16
    cells = torch.from_numpy(np.array(sheet)).unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
    return cells.permute(0, 2, 4, 1, 3).flatten(0, 1)[:5138] / 127.5 - 1


class Net(nn.Module):
    """A U-Net with two resolutions, 16 x 16 and 8 x 8."""

    def __init__(self, width=64):
        super().__init__()

        def block(a, b):                        # from a to b channels
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                                 nn.Conv2d(b, b, 3, padding=1), nn.SiLU())

        self.first = block(4, width)
        self.last = nn.Conv2d(2 * width, 3, 3, padding=1)
        self.low = nn.Sequential(nn.AvgPool2d(2), block(width, 3 * width), block(3 * width, width),
                                 nn.Upsample(scale_factor=2))

    def forward(self, x, t):
        x = self.first(torch.cat([x, t.expand(len(x), 1, 16, 16)], 1))  # time is a fourth channel
        return self.last(torch.cat([x, self.low(x)], 1))


class PixelFlow:
    """A flow on pixels, with the methods that train() calls."""

    device, latent_shape, nfe = torch.device("cpu"), (3, 16, 16), 1

    def __init__(self):
        self.transformer = Net()

    def trained(self):
        return list(self.transformer.parameters())

    def encode(self, prompts):
        return None                                                     # prompts are ignored

    def velocity(self, x, t, cond):
        return self.transformer(x, torch.as_tensor(t).reshape(-1, 1, 1, 1))     # (M, 3, 16, 16)

    def decode(self, x):
        return (x / 2 + 0.5).clamp(0, 1)

    def save(self, path, weights=None):
        torch.save(self.transformer.state_dict(), path / "model.pt")


def pretrain(model, pictures, steps=1500):
    """Flow matching: v = eps - x_0 at x_t = (1-t) x_0 + t eps."""
    opt = torch.optim.AdamW(model.trained(), lr=2e-3)
    for step in range(steps):
        x0 = pictures[torch.randint(len(pictures), (64,))]
        eps, t = torch.randn_like(x0), torch.rand(64)
        v = model.velocity(torch.lerp(x0, eps, t[:, None, None, None]), t, None)
        loss = (v - (eps - x0)).pow(2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 300 == 299:
            print(f"pretraining, step {step + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def draw(model, noise):
    """Pictures from noise (M, 3, 16, 16), in [0, 1]."""
    velocity = lambda x, t: model.velocity(x, t, None)
    traj, _ = rollout(velocity, noise, schedule(16), "dpmpp_2m")
    return model.decode(traj[-1])


def main(out="out/own_model", steps=1500, iterations=25):
    torch.manual_seed(0)
    model, noise = PixelFlow(), torch.randn(64, 3, 16, 16)
    pretrain(model, emoji(), steps)
    before = draw(model, noise)
    Path(out).mkdir(parents=True, exist_ok=True)
    prompts = Path(out) / "prompts.txt"
    prompts.write_text("no prompt\n", encoding="utf-8")
    cfg = train.Config(model="", prompts=str(prompts), rewards="redness", out_dir=out, lr=2e-5,
                       shift=1.0, prompts_per_iteration=8, iterations=iterations, eval_every=0)
    run = Run(cfg, model, {})
    train.train(cfg, model, {"redness": redness}, run)
    run.finish()
    after = draw(model, noise)
    rows = {"before": as_bytes(before[:8]), "after": as_bytes(after[:8])}
    picture_grid(Path(out) / "samples.png", rows, [""] * 8)
    print(f"redness of 64 samples: {redness(before, None).mean():.3f} -> "
          f"{redness(after, None).mean():.3f}; pictures in {out}/samples.png")


if __name__ == "__main__":
    main()
