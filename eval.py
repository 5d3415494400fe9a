"""
Sample held-out prompts from one or more checkpoints, score them, write a table, the pictures and the numbers.
Time t runs from 1 (noise) to 0 (image).

    python eval.py                                               # the base model in tiny/flux
    python eval.py tiny/flux out/tiny/checkpoint-150             # base against aligned: same prompts, same noise
    python eval.py tiny/flux --prompts tiny/prompts/test_pair.txt --steps 25 --solver ddim

Each row: every scorer's mean +- standard error over prompts; "gain" is the mean difference from the first row, prompt by
prompt, with its own standard error; diversity is the root-mean-square pixel distance of two pictures of one prompt.
"""
import argparse, json, math, sys, time
from pathlib import Path
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
import rewards
from model import Flux
from solvers import rollout, schedule

HERE = Path(__file__).resolve().parent


def read_prompts(path):
    """One prompt a line, UTF-8; empty lines are skipped."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} is no prompt file; it must be a UTF-8 text file with one prompt a line")
    if not prompts:
        raise ValueError(f"{path} holds no prompt; it must be a UTF-8 text file with one prompt a line")
    return prompts


def split(names):
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in names.split(",") if name.strip()]


def check_model(path):
    """A directory that FluxPipeline wrote, or what can only be a hub id, "owner/name". Anything else is refused here, not halfway."""
    if (Path(path) / "model_index.json").is_file():
        return
    if Path(path).exists() or str(path).count("/") != 1 or Path(path).parent.exists():
        raise ValueError(f"{path} is no FluxPipeline directory; it must hold model_index.json, or be a hub id like black-forest-labs/FLUX.1-dev")


@torch.no_grad()
def evaluate(model, scorers, prompts, ts, solver, images_per_prompt=1, seed=0, batch=64, progress=False):
    """Sample and score. Noise depends on (seed, index of the prompt) alone, so checkpoints see the same.

    Returns images (P, n, 3, H, W) uint8 on the CPU and {scorer name: (P, n)}; n = images_per_prompt.
    """
    n, at_once = images_per_prompt, max(1, batch // images_per_prompt)
    images, scores = [], {name: [] for name in scorers}
    for start in tqdm(range(0, len(prompts), at_once), disable=None if progress else True, desc="eval"):
        some = prompts[start : start + at_once]
        noise = torch.cat([torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + start + i))
                           for i in range(len(some))]).to(model.device)                               # (p n, N, C)
        cond = model.encode(some)
        traj, _ = rollout(lambda x, t: model.velocity(x, t, cond), noise, ts, solver)
        x = model.decode(traj[-1])                                                                    # (p n, 3, H, W)
        each = [prompt for prompt in some for _ in range(n)]
        for name, scorer in scorers.items():
            scores[name].append(scorer(x, each).cpu())
        images.append((x * 255).round().to(torch.uint8).cpu())
    return torch.cat(images).unflatten(0, (-1, n)), {name: torch.cat(s).unflatten(0, (-1, n)) for name, s in scores.items()}


def mean_and_stderr(scores):
    """scores (P, n) -> mean, and the standard error of it over the P prompts (0 for a single one, which has none)."""
    each = scores.double().mean(1)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item() if len(each) > 1 else 0.0


def diversity(images):
    """images (P, n, 3, H, W) uint8 -> root-mean-square distance, in [0, 1], of two pictures of one prompt; mean over prompts. n = 1: None."""
    if images.shape[1] == 1:
        return None
    square = 2 * (images.float().flatten(2) / 255).var(1).mean(1)                                     # (P,)  E|a - b|^2 = 2 var
    return square.sqrt().mean().item()


def spread(n, most):
    """The indices of at most `most` of n prompts, evenly spaced: pictures are shown by this rule, not picked."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]


def picture_grid(path, rows, captions):
    """Write a PNG with one labelled row of pictures per checkpoint. rows: {label: (k, 3, H, W) uint8}, captions: k."""
    side, gap, left, font = 128, 6, 84, ImageFont.load_default(11)
    lines = [_wrap(caption, 20)[:5] for caption in captions]
    top = 14 * max(len(line) for line in lines) + 6
    canvas = Image.new("RGB", (left + len(captions) * (side + gap), top + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, line in enumerate(lines):
        draw.multiline_text((left + column * (side + gap), 2), "\n".join(line), "black", font)
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * (side + gap)
        draw.multiline_text((4, y + side // 2 - 8), "\n".join(_wrap(label, 13)), "black", font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + column * (side + gap), y))
    canvas.save(path)


def _wrap(text, width):
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python eval.py [checkpoint ...] [--setting value ...]")
    parser.add_argument("checkpoints", nargs="*", default=[str(HERE / "tiny/flux")], help="FluxPipeline directories (default tiny/flux)")
    parser.add_argument("--prompts", default=str(HERE / "tiny/prompts/test_concept.txt"), help="one a line (default tiny/prompts/test_concept.txt)")
    parser.add_argument("--scorers", default="clip,judge", help=f"of {', '.join(rewards.SCORERS)} (default clip,judge)")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="(default 4)")
    parser.add_argument("--solver", choices=["ddim", "dpmpp_2m"], default="dpmpp_2m", help="(default dpmpp_2m)")
    parser.add_argument("--steps", type=int, default=8, help="(default 8)")
    parser.add_argument("--shift", type=float, default=1.0, help="timestep shift (default 1)")
    parser.add_argument("--resolution", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--guidance", type=float, default=3.5, help="(default 3.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--columns", type=int, default=8, help="prompts shown in the grid (default 8)")
    parser.add_argument("--out_dir", default="out/eval", help="where grid.png and results.json go (default out/eval)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        prompts, names = read_prompts(args.prompts), split(args.scorers)
        ts = schedule(args.steps, args.shift)
        for path in args.checkpoints:
            check_model(path)
        for name in names:
            rewards.check(name)
        short = [name.partition("=")[0] for name in names]
        for holds, sentence in [
            (names and len(short) == len(set(short)), f"scorers is {args.scorers!r}, but must name at least one, and none twice"),
            (args.images_per_prompt >= 1 and args.columns >= 1, "images_per_prompt and columns must be at least 1"),
            (0.01 <= args.shift <= 100, f"shift is {args.shift:g}, but must lie between 0.01 and 100"),
            (math.isfinite(args.guidance), f"guidance is {args.guidance}, but must be a finite number"),
            (args.resolution >= 16 and args.resolution % 16 == 0, f"resolution is {args.resolution}, but must be a multiple of 16"),
            (0 <= args.seed < 2**40, f"seed is {args.seed}, but must lie between 0 and 2^40"),
            (args.device == "cpu" or (args.device.startswith("cuda") and torch.cuda.is_available()), f"device is {args.device}, but must be cpu, or cuda where there is one"),
            (args.out_dir, "out_dir is empty; name a directory"),
        ]:
            if not holds:
                raise ValueError(sentence)
        out = Path(args.out_dir)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    scorers = {name.partition("=")[0]: rewards.load(name, args.device) for name in names}
    print(f"{len(prompts)} prompts of {args.prompts}, {args.images_per_prompt} images each, {args.resolution}x{args.resolution}, "
          f"{args.solver} {args.steps} steps, shift {args.shift:g}, guidance {args.guidance:g}, seed {args.seed}, on {args.device}")
    show = spread(len(prompts), args.columns)
    table, grid, first = [], {}, None
    for path in args.checkpoints:
        began = time.time()
        model = Flux(path, args.resolution, args.device, args.guidance)
        images, scores = evaluate(model, scorers, prompts, ts, args.solver, args.images_per_prompt, args.seed, progress=True)
        first = first or scores
        row = {"checkpoint": path, "diversity": diversity(images), "seconds": time.time() - began}
        for name in scorers:
            row[name], row[f"{name}_stderr"] = mean_and_stderr(scores[name])
            row[f"{name}_gain"], row[f"{name}_gain_stderr"] = mean_and_stderr(scores[name] - first[name])
        table.append(row)
        grid[Path(path).name if Path(path).name not in grid else path] = images[show, 0]

    print("\n| checkpoint | " + " | ".join(f"{name} | gain" for name in scorers) + " | diversity | seconds |")
    print("|---" * (2 * len(scorers) + 3) + "|")
    for row in table:
        cells = [f"{row[n]:.4f} ± {row[n + '_stderr']:.4f} | {row[n + '_gain']:+.4f} ± {row[n + '_gain_stderr']:.4f}" for n in scorers]
        print(f"| {row['checkpoint']} | " + " | ".join(cells) + (f" | {row['diversity']:.3f}" if row["diversity"] is not None else " | -") + f" | {row['seconds']:.0f} |")
    picture_grid(out / "grid.png", grid, [prompts[i] for i in show])
    (out / "results.json").write_text(json.dumps(dict(settings=vars(args), results=table), indent=1))
    print(f"\nwrote {out / 'grid.png'} and {out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main())
