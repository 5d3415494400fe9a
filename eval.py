"""
Sample held-out prompts from a base model and from models that were aligned from it, score the
pictures, and print the paper's Table 1. Time t runs from 1 (noise) to 0 (image).

    python eval.py --checkpoint out/tiny/checkpoint-50     # the small world: base against aligned
    torchrun --nproc_per_node 8 eval.py --model black-forest-labs/FLUX.1-dev \\
        --checkpoint out/dpm8/checkpoint-300 --prompts hpdv2_test   # FLUX: 50 steps, 1024 x 1024

All models get the same prompts and the same noise. The first table has a row for each model: the
NFE and the median seconds of an iteration, from the run's log, and the mean +- standard error over
prompts of every scorer, underlined if the run was trained on it. The second table has differences
from the first row, prompt by prompt, with their own standard errors, and diversity: the
root-mean-square distance, over pixels, of two pictures of one prompt. After an interruption, the
same command makes only what is missing. paper/votes.py lets people vote on the pictures.
"""
import argparse, contextlib, functools, hashlib, io, json, math, os, shutil, statistics, sys
import textwrap
from pathlib import Path
from unittest.mock import patch
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
import rewards
from machine import (LOCAL_RANK, RANK, WORLD, attempt, check_model, evenly_spaced, exit_process,
                     explain_errors, gather_objects, init_processes, is_lora, parse_call,
                     parse_resolution, read_prompts, refuse, shared_rules)
from solvers import rollout, schedule

HERE = Path(__file__).resolve().parent
SMALL = dict(prompts=str(HERE / "tiny/prompts/test_concept.txt"),
             scorers="preference,judge,named,flawless", images_per_prompt=4,
             solver="dpmpp_2m", steps=8, shift=1.0, resolution="64", batch=64)
LARGE = dict(prompts="hpdv2_test", scorers="hpsv2,pickscore,imagereward,clipscore,aesthetic",
             images_per_prompt=1, solver="ddim", steps=50, shift=0.0, resolution="1024", batch=4)
TITLES = dict(hpsv2="HPSv2.1", pickscore="Pick / 100", imagereward="Img.Rwd.", clipscore="CLIP",
              unifiedreward="Unified.", aesthetic="Aes.")       # as in Table 1
UNITS = dict(pickscore=100)                                     # Table 1 divides PickScore by 100
SOLVERS = {"ddim": "DDIM", "dpmpp_2m": "DPM++"}

# ------------------------------------------------------------------------------------------------
# Pictures and scores

def times(shift, model, steps):
    """The T+1 times of a rollout: a schedule with this shift, or with 0 the model's own."""
    return schedule(steps, shift) if shift else model.times(steps)

def sample(model, *how, **more):
    """n pictures of each of p prompts -> (p n, 3, H, W) in [0, 1]. The arguments are `follow`'s."""
    images = model.decode(follow(model, *how, **more)[0])
    if not images.isfinite().all():             # nan would be stored as black
        raise ArithmeticError("the decoder's pictures are not finite; its weights are broken, or "
                              "it overflows")
    return images

@torch.no_grad()
def follow(model, prompts, indices, ts, solver, n=1, seed=0):
    """The latents of these pictures (p n, N, C), and how long the velocity was on the way, as the
    root mean square of its numbers, averaged over the steps (p n,). The noise depends only on the
    seed and the index of the prompt, so all models see the same."""
    rngs = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in indices]
    noise = torch.cat([torch.randn(n, *model.latent_shape, generator=rng) for rng in rngs])
    cond = model.encode(prompts)
    traj, vels = rollout(lambda x, t: model.velocity(x, t, cond), noise.to(model.device), ts,
                         solver)                                            # (T+1, p n, N, C)
    if not traj[-1].isfinite().all():
        raise ArithmeticError(f"the latents of {prompts[0]!r} are not finite; the model's weights "
                              "are broken, or its guidance is too large")
    return traj[-1], vels.float().flatten(2).square().mean(2).sqrt().mean(0)

def as_bytes(images):
    """Pictures in [0, 1] as they are stored: uint8 on the CPU."""
    return (images * 255).round().to(torch.uint8).cpu()

def as_png(picture):
    """(3, H, W) uint8 as the bytes of a PNG; of a video (frames, 3, H, W), frames side by side."""
    file, info = io.BytesIO(), PngInfo()
    if picture.ndim == 4:
        info.add_text("frames", str(len(picture)))
        picture = torch.cat(list(picture), -1)                              # (3, H, frames W)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png", pnginfo=info)
    return file.getvalue()

def read_picture(path):
    """What `as_png` was given."""
    with Image.open(path) as file:
        frames = int(file.info.get("frames", 0))
        picture = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    return picture.unflatten(2, (frames, -1)).permute(2, 0, 1, 3) if frames else picture

def evaluate(model, scorers, prompts, ts, solver, chosen, seed=0, batch=64):
    """Sample and score one picture of each prompt during training, without writing files. `chosen`:
    the indices of the P prompts to use. -> images (P, 1, 3, H, W) uint8 on the CPU, {scorer name:
    (P, 1)}, and the lengths of the velocity (P, 1)"""
    images, scores, lengths = [], {name: [] for name in scorers}, []
    for start in range(0, len(chosen), batch):
        indices = chosen[start : start + batch]
        texts = [prompts[i] for i in indices]
        latents, length = follow(model, texts, indices, ts, solver, seed=seed)
        x = model.decode(latents)                                           # (p, 3, H, W)
        images.append(as_bytes(x))
        lengths.append(length.cpu())
        for name, scorer in scorers.items():
            scores[name].append(scorer(x, texts).cpu())
    scores = {name: torch.cat(s)[:, None] for name, s in scores.items()}
    return torch.cat(images)[:, None], scores, torch.cat(lengths)[:, None]

def mean_and_stderr(scores):
    """scores (P, n) -> their mean, and its standard error over the P prompts (0 if P is 1)."""
    means = scores.double().mean(1)                                         # (P,)
    stderr = means.std().item() / len(means) ** 0.5 if len(means) > 1 else 0.0
    return means.mean().item(), stderr

def diversity(images):
    """images (P, n > 1, 3, H, W) in [0, 1] -> RMS distance of two pictures of a prompt, (P, 1)."""
    return (2 * images.flatten(2).var(1).mean(1, keepdim=True)).sqrt()      # E|a - b|^2 = 2 var

# ------------------------------------------------------------------------------------------------
# Drawings

def import_matplotlib():
    """matplotlib without a backend. MPLBACKEND may name that of a notebook, which is not here."""
    with patch.dict(os.environ, MPLBACKEND=""):
        import matplotlib
    return matplotlib

def picture_grid(path, rows, captions):
    """Write a PNG with one labelled row of pictures per checkpoint, and the prompts below. rows:
    {label: (k, 3, H, W) uint8}, all of one size; captions: k texts. Of videos (k, frames, 3, H, W)
    the PNG shows four frames side by side, and a WebP beside it moves. The font, DejaVu Sans, shows
    Chinese, Japanese and Korean letters as boxes."""
    first = next(iter(rows.values()))
    if first.ndim == 5:
        moving = [draw_grid({label: video[:, i] for label, video in rows.items()}, captions)
                  for i in range(first.shape[1])]
        moving[0].save(Path(path).with_suffix(".webp"), save_all=True, append_images=moving[1:],
                       duration=125, loop=0, quality=90)
        shown = rewards.some_frames(first.shape[1], 4)
        rows = {label: torch.cat(list(video[:, shown].unbind(1)), -1)
                for label, video in rows.items()}
    draw_grid(rows, captions, first.shape[-1]).save(path)

def draw_grid(rows, captions, frame=0):
    """The picture of `picture_grid`. `frame`: the width of one frame, where several are side by
    side."""
    font = f"{import_matplotlib().get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(font, 10)
    H, W = next(iter(rows.values())).shape[2:]
    longest = max(H, frame or W)
    scale = (128 if longest <= 128 else 256) / longest
    height, width, left, gap = round(scale * H), round(scale * W), 96, 6
    wrap = functools.partial(textwrap.wrap, max_lines=5, placeholder=" ...")
    lines = [wrap(caption, width // 7) for caption in captions]     # few letters are wider
    bottom = len(rows) * (height + gap)
    canvas = Image.new("RGB", (left + len(captions) * (width + gap),
                               bottom + 14 * max(map(len, lines)) + 6), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows.items()):
        y = row * (height + gap)
        draw.multiline_text((4, y + height // 2), "\n".join(wrap(label, left // 7)), "black", font,
                            anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + column * (width + gap), y))
    for column, line in enumerate(lines):
        draw.multiline_text((left + column * (width + gap), bottom), "\n".join(line), "black", font)
    return canvas

def draw_curve(lines, path):
    """Draw the training reward of a log, and the held-out scores with their standard errors."""
    import_matplotlib()
    from matplotlib.figure import Figure
    evaluated = next((line for line in lines if "reward" not in line), {})
    keys = ["reward", *(key for key in evaluated if f"{key}_stderr" in evaluated
                        and not key.endswith("_gain"))]
    figure = Figure(figsize=(4 * len(keys), 3), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        points = [line for line in lines if key in line]
        column = lambda name: np.array([line.get(name) for line in points], float)  # None: nan
        x, y = column("iter"), column(key)
        if key == "reward":
            panel.plot(x, y, color="tab:blue", alpha=0.3)
            if len(y) >= 10:
                panel.plot(x[9:], np.convolve(y, np.ones(10) / 10, "valid"), color="tab:blue",
                           label="mean of 10")
                panel.legend()
        else:
            panel.errorbar(x, y, column(f"{key}_stderr"), marker="o", markersize=3, capsize=2)
            gain, stderr = column(f"{key}_gain"), column(f"{key}_gain_stderr")
            fell = (column("fallen") > 0) & (gain < -3 * stderr)
            if fell.any():
                panel.plot(x[fell], y[fell], "rv", label="fell while the reward rose")
                panel.legend()
        origin = "on held-out prompts" if key in evaluated else "in training"
        panel.set(title=f"{key.removeprefix('eval_')} {origin}", xlabel="iteration")
    figure.savefig(path, dpi=120)

# ------------------------------------------------------------------------------------------------
# The rows of the tables, and the tables. A row is a folder, in which an evaluation can continue.

def read_json(path):
    """The object in a JSON file; {} if the file is missing or broken."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

def read_log(out):
    """The lines of a run's log, without those that a crash cut off or garbled."""
    path, lines = Path(out) / "log.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, TypeError):
            found = dict(json.loads(line))
            lines += [found] * ("iter" in found)
    return lines

def fingerprint(path, pattern="*"):
    """[name, size, time] of a file, or of a folder's files, to detect changes; [] if it is gone."""
    path = Path(path)
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime]
            for file in files if file.exists()]

def weights_of(path):
    """The fingerprint of the weights that a checkpoint was sampled with."""
    return fingerprint(path if is_lora(path) else Path(path) / "transformer", "*.safetensors")

def label_of(path):
    """The last two parts of a checkpoint's path, as in "tiny-checkpoint-50"."""
    path = Path(path).resolve() if Path(path).exists() else Path(path)
    return "-".join(path.relative_to(path.anchor).parts[-2:]) or "root"

def write_atomically(file, content):
    """Write text or bytes under another name, then rename it: a file that exists is complete."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)

class Row:
    """A model and its folder <out_dir>/<label>/ with settings.json, prompts.json and pictures/. For
    prompt 0, pictures/ has 00000-0.png, 00000-1.png, ... and 00000.json with their scores."""

    def __init__(self, args, path, prompts):
        """ValueError if the folder has pictures made with other settings."""
        self.path, self.prompts, self.n = str(path), prompts, args.images_per_prompt
        self.label = label_of(path)
        self.folder = Path(args.out_dir) / self.label
        self.settings = dict(
            model=self.path if not Path(path).exists() else "", weights=weights_of(path),
            prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
            base=[label_of(args.model), weights_of(args.model)] if is_lora(path) else [])
        for key in ("images_per_prompt solver steps shift resolution guidance call frames "
                    "seed").split():
            self.settings[key] = getattr(args, key)
        if (self.folder / "pictures").exists() and not args.overwrite:
            before = read_json(self.folder / "settings.json")
            for key, value in self.settings.items():
                if before.get(key) != value:
                    readable = key in before and key != "prompts" and not isinstance(value, list)
                    change = f"{key} {before[key]}, not {value}" if readable else f"other {key}"
                    raise ValueError(f"{self.folder} holds pictures made with {change}; use "
                                     "--overwrite or another --out_dir")

    def begin(self, overwrite):
        """Make the folder, without pictures if `overwrite` is set."""
        pictures = self.folder / "pictures"
        if overwrite and pictures.exists():     # settings.json fits what a crash leaves of them
            shutil.rmtree(pictures)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in [("settings", self.settings), ("prompts", self.prompts)]:
            write_atomically(self.folder / f"{name}.json", json.dumps(content, indent=1))
        pictures.mkdir(exist_ok=True)

    def files(self, i):
        return [self.folder / f"pictures/{i:05d}-{k}.png" for k in range(self.n)]

    def has_pictures(self, i):
        return all(file.is_file() for file in self.files(i))

    def pictures(self, i):
        """The n pictures of prompt i, (n, 3, H, W) uint8, or videos (n, frames, 3, H, W)."""
        try:
            return torch.stack([read_picture(file) for file in self.files(i)])
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.files(i)[0]} or another picture of its prompt is incomplete "
                             f"({error}); delete it and run again") from error

    def scores(self, i):
        """{key of a scorer: [n scores]} of prompt i. Scores that are not complete are left out."""
        scores = read_json(self.folder / f"pictures/{i:05d}.json")
        return {key: values for key, values in scores.items()
                if len(values) == self.n and all(map(math.isfinite, values))}

    def lacks(self, i, keys):
        """Whether prompt i lacks one of its pictures, or its scores under one of these keys."""
        return not self.has_pictures(i) or not keys <= self.scores(i).keys()

    def complete(self, indices, args, load, scorers):
        """Make the missing pictures and scores of the prompts `indices`. load() gives the model,
        scorers are {key: scorer}."""
        to_sample = [i for i in indices if not self.has_pictures(i)]
        if to_sample:
            model = load()
            ts = times(args.shift, model, args.steps)
            x = sample(model, [self.prompts[i] for i in to_sample], to_sample, ts, args.solver,
                       self.n, args.seed)
            files = [file for i in to_sample for file in self.files(i)]
            for picture, file in zip(as_bytes(x), files):
                write_atomically(file, as_png(picture))
        pictures = [self.pictures(i) for i in indices]          # the files are what is scored
        if any(p.shape != pictures[0].shape for p in pictures):
            raise ValueError(f"{self.folder}/pictures holds pictures of several sizes; use "
                             "--overwrite")
        x = torch.cat(pictures).to(args.device) / 255                       # (p n, 3, H, W)
        texts = [self.prompts[i] for i in indices for _ in range(self.n)]
        scores = {i: self.scores(i) for i in indices}
        for key, scorer in scorers.items():
            if any(key not in scores[i] for i in indices):
                for i, values in zip(indices, scorer(x, texts).unflatten(0, (-1, self.n)).tolist()):
                    scores[i][key] = values
        for i in indices:
            write_atomically(self.folder / f"pictures/{i:05d}.json", json.dumps(scores[i]))

    def from_run(self):
        """The columns of Table 1 that come from a checkpoint's run: solver, NFEs, seconds of an
        iteration, and the rewards it was trained on. N/A for a base."""
        path = Path(self.path)
        config = read_json(path / "state/config.json")
        lines = [line for line in read_log(path.parent) if "nfe_old" in line]
        try:
            seconds = [sum(value for key, value in line.items() if key.startswith("seconds_"))
                       for line in lines]
            return dict(solver=SOLVERS[config["solver"]], nfe_old=f"{lines[-1]['nfe_old']}",
                        nfe_theta=f"{lines[-1]['nfe_theta']:.2f}",
                        seconds=f"{statistics.median(seconds):.2f}",
                        trained_on=[rewards.split(spec)[1]
                                    for spec in rewards.listed(config["rewards"])])
        except (ValueError, LookupError):
            return dict(solver="N/A", nfe_old="N/A", nfe_theta="N/A", seconds="N/A", trained_on=[])

def tables(results, names):
    """Table 1 of the paper, and the differences from its first row, as Markdown."""
    def line(*cells):
        return "| " + " | ".join(cells) + " |"

    def number(row, key, sign=""):
        unit = UNITS.get(key.removesuffix("_gain"), 1)
        return f"{row[key] / unit:{sign}.4f} ± {row[key + '_stderr'] / unit:.4f}"

    titles = [TITLES.get(name, name) for name in names]
    head = ["Method", "Solver_old", "NFE_old ↓", "NFE_theta ↓", "s / Iter. ↓"]
    one = [line(*head, *(f"{title} ↑" for title in titles)), "|---" * (5 + len(names)) + "|"]
    head = [f"over {results[0]['label']}", *titles, "diversity"]
    two = [line(*head), "|---" * len(head) + "|"]
    for row in results:
        marks = [f"<u>{number(row, name)}</u>" if name in row["trained_on"] else number(row, name)
                 for name in names]
        gains = [number(row, f"{name}_gain", "+") for name in names]
        spread = "-" if row["diversity"] is None else f"{row['diversity']:.3f}"
        one.append(line(row["label"], row["solver"], row["nfe_old"], row["nfe_theta"],
                        row["seconds"], *marks))
        two.append(line(row["label"], *gains, spread))
    return "\n".join([*one, "", *two])

def report(args, rows, chosen):
    """Write the tables, the grid and the numbers. All pictures and scores must be there."""
    results, base = [], {}
    for row in rows:
        saved = [row.scores(i) for i in chosen]
        if any(args.score_keys.values() - scores.keys() for scores in saved):
            raise ValueError(f"{row.folder} lacks scores that were just written; perhaps another "
                             "eval.py uses this folder; run this one again")
        scores = {name: torch.tensor([prompt_scores[key] for prompt_scores in saved])   # (P, n)
                  for name, key in args.score_keys.items()}
        base = base or scores                   # the first row
        result = dict(label=row.label, path=row.path, **row.from_run(), diversity=None)
        if row.n > 1:
            distances = [diversity(row.pictures(i)[None] / 255) for i in chosen]
            result["diversity"] = torch.cat(distances).mean().item()
        for name in args.specs:
            for key, x in [(name, scores[name]), (f"{name}_gain", scores[name] - base[name])]:
                result[key], result[f"{key}_stderr"] = mean_and_stderr(x)
        results.append(result)
    out, table = Path(args.out_dir), tables(results, list(args.specs))
    print("\n" + table + "\n")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    numbers = dict(settings=vars(args), num_prompts=len(chosen), results=results)
    (out / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    shown = [chosen[k] for k in evenly_spaced(len(chosen), 8)]
    pictures = {row.label: torch.stack([row.pictures(i)[0] for i in shown]) for row in rows}
    attempt("grid.png", lambda: picture_grid(out / "grid.png", pictures,
                                             [rows[0].prompts[i] for i in shown]))
    print(f"wrote {out}/: table.md, results.json, grid.png, and the pictures in "
          f"{', '.join(row.label for row in rows)}")

# ------------------------------------------------------------------------------------------------
# Settings and main

def is_small(path):
    """Whether the architecture of a model is that of tiny/flux."""
    config, small = (read_json(Path(folder) / "transformer/config.json")
                     for folder in (path, HERE / "tiny/flux"))
    return all(config.get(key) == value for key, value in small.items() if not key.startswith("_"))

def parse_args(argv=None):
    """Command line -> settings and rows; or one sentence and exit code 2, before a model loads."""
    options = dict(                     # {name: (default, help)}; None: as in SMALL or LARGE
        model=(str(HERE / "tiny/flux"), "the base: the folder of a flow pipeline, or a hub id"),
        prompts=(None, "a file of prompts, see machine.py; or hpdv2_test, hpdv2_train"),
        num_prompts=(0, "use only this many prompts, evenly spaced; 0: all"),
        scorers=(None, f"{', '.join(rewards.SCORERS)} or FILE.py:FUNCTION, comma-separated"),
        images_per_prompt=(None, "number of pictures of a prompt; diversity needs 2 or more"),
        solver=(None, "ddim or dpmpp_2m"), steps=(None, "number of steps of the solver"),
        shift=(None, "shift of the time steps; 0: the model's own"), seed=(0, "seed of the noise"),
        resolution=(None, "pixels: a side, or width x height like 832x640"),
        guidance=("", "guidance scale; empty: FLUX.1's 3.5, or the pipeline's own"),
        call=("", "more arguments of the pipeline's __call__, as JSON"),
        frames=(4, "of a video, that a scorer of images sees"),
        batch=(None, "pictures sampled at a time"),
        out_dir=("out/eval", "for table.md, results.json, grid.png and a folder per row"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python eval.py [--model base] [--checkpoint aligned ...] [--setting value ...]")
    for name, (default, text) in options.items():
        shown, kind = str(default), type(default)
        if default is None:
            shown = f"{SMALL[name]} for models like tiny/flux, {LARGE[name]} for others"
            kind = type(LARGE[name])
        text = f"{text} (default {shown})".replace(f"{HERE}/", "")
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--checkpoint", nargs="*", default=[], help="models that were aligned from "
                        "--model: pipeline directories, or adapters for it")
    parser.add_argument("--overwrite", action="store_true",
                        help="delete the pictures and scores of these rows, and make them again")
    if RANK:
        parser.error = lambda message: sys.exit(2)              # only process 0 prints it
    args = parser.parse_args(argv)
    return args, refuse(parser, lambda: check(args))

def check(args):
    """Fill in the defaults for this model, and return the rows. ValueError for bad settings."""
    for path in [args.model, *(path for path in args.checkpoint if not is_lora(path))]:
        check_model(path)
    for name, value in (SMALL if is_small(args.model) else LARGE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    parse_call(args.call)
    if args.resolution:
        height, width = parse_resolution(args.resolution)
        args.resolution = height if height == width else f"{width}x{height}"
    args.device = f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device
    prompts, args.specs = read_prompts(args.prompts), rewards.parse(args.scorers)
    schedule(args.steps, args.shift or 1)
    for holds, sentence in [
        (args.specs, f"scorers is empty; name at least one of {', '.join(rewards.SCORERS)}"),
        (min(args.images_per_prompt, args.frames, args.batch, args.num_prompts + 1) >= 1,
         "images_per_prompt, frames and batch must be at least 1, and num_prompts 0"),
        (args.solver in SOLVERS, f"solver is {args.solver}, but must be ddim or dpmpp_2m"),
        (0 <= args.shift <= 100, f"shift is {args.shift:g}, but must be 0 to 100"),
        *shared_rules(args),
        (0 <= args.seed < 2**40, f"seed is {args.seed}, but must lie between 0 and 2^40"),
        (args.out_dir, "out_dir is empty; name a directory"),
    ]:
        if not holds:
            raise ValueError(sentence)
    args.score_keys = {}                    # for saved scores; new weights or code get a new key
    for name, spec in args.specs.items():
        argument = rewards.split(spec)[2]
        versions = [str(fingerprint(Path(argument).expanduser()))] if argument else []
        args.score_keys[name] = " ".join([spec, *versions, *rewards.fingerprints(spec).values()])
    rows = [Row(args, path, prompts) for path in [args.model, *args.checkpoint]]
    if len({row.label for row in rows}) < len(rows):
        raise ValueError("model and checkpoints must differ in the last two parts of their paths, "
                         f"unlike {', '.join(row.path for row in rows)}")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    return rows

def load_row(args, row):
    """The model of a row."""
    from pipeline import load_model             # diffusers takes seconds to import
    path, lora = (args.model, row.path) if is_lora(row.path) else (row.path, "")
    return load_model(path, resolution=args.resolution, guidance=args.guidance, steps=args.steps,
                      call=parse_call(args.call), device=args.device, frozen=True, lora=lora)

def start(args, rows):
    prompts, n = rows[0].prompts, args.images_per_prompt
    chosen = evenly_spaced(len(prompts), args.num_prompts or len(prompts))
    found = rewards.load_all(args.specs, args.device, [prompts[i] for i in chosen],
                             args.frames)
    scorers = {key: found[name] for name, key in args.score_keys.items()}
    if RANK == 0:
        print(f"{len(chosen)} prompts of {args.prompts}, {n} image{'s' * (n > 1)} each, "
              f"resolution {args.resolution or 'own'}, {args.solver} {args.steps} steps, shift "
              f"{args.shift or 'own'}, guidance {args.guidance or 'own'}, seed {args.seed}, "
              f"on {WORLD} x {args.device.partition(':')[0]}")
        for row in rows:
            row.begin(args.overwrite)
    gather_objects(None)                                    # wait until the folders exist
    missing = [[i for i in chosen if row.lacks(i, scorers.keys())][RANK::WORLD] for row in rows]
    gather_objects(None)                                    # wait until all have looked
    with tqdm(total=sum(map(len, missing)), desc="eval", disable=True if RANK else None) as bar:
        for row, indices in zip(rows, missing):
            load = functools.cache(lambda: load_row(args, row))         # once, if it is needed
            at_once = max(1, args.batch // n)
            for start in range(0, len(indices), at_once):
                row.complete(indices[start : start + at_once], args, load, scorers)
                bar.update(len(indices[start : start + at_once]))
    gather_objects(None)
    if RANK == 0:
        report(args, rows, chosen)

def main(argv=None):
    init_processes()
    args, rows = parse_args(argv)
    return explain_errors(lambda: start(args, rows), ValueError, rewards.ScorerError) or 0

if __name__ == "__main__":
    exit_process(main())
