"""
Sample held-out prompts from a base model and from the models aligned from it, score the pictures,
and print the paper's Table 1. Time t runs from 1 (noise) to 0 (image).

    python eval.py --checkpoint out/tiny/checkpoint-150     # the small world: base against aligned
    torchrun --nproc_per_node 8 eval.py --model black-forest-labs/FLUX.1-dev \\
        --checkpoint out/dpm8/checkpoint-300 --prompts hpdv2_test   # FLUX: 50 steps, 1024 x 1024

All models get the same prompts and the same noise. A row of the table has the NFE and the (median)
seconds of an iteration, from the run's log, and the mean +- standard error over prompts of every
scorer, underlined where the run was trained on it. A second table has the differences from the
first row, prompt by prompt, with their own standard errors, and diversity: the root-mean-square
distance, over pixels, of two pictures of one prompt. The same command continues an evaluation that
was stopped: it makes only what --out_dir lacks. paper/votes.py lets people vote on the pictures.
"""
import argparse, contextlib, functools, hashlib, json, math, os, shutil, statistics, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
import rewards
from loading import check_model, is_lora, parse_resolution
from machine import LOCAL_RANK, RANK, WORLD, exit_process, gather_objects, init_processes
from model import Flux
from prompts import evenly_spaced, read_prompts
from solvers import rollout, schedule

HERE = Path(__file__).resolve().parent
SMALL = dict(prompts=str(HERE / "tiny/prompts/test_concept.txt"), scorers="clip,judge",
             images_per_prompt=4, solver="dpmpp_2m", steps=8, shift=1.0, resolution="64", batch=64)
LARGE = dict(prompts="hpdv2_test", scorers="hpsv2,pickscore,imagereward,clipscore,aesthetic",
             images_per_prompt=1, solver="ddim", steps=50, shift=0.0, resolution="1024", batch=4)
TITLES = dict(hpsv2="HPSv2.1", pickscore="Pick / 100", imagereward="Img.Rwd.", clipscore="CLIP",
              unifiedreward="Unified.", aesthetic="Aes.")       # the scorers in Table 1, which
UNITS = dict(pickscore=100)                                     # prints PickScore over 100
SOLVERS = {"ddim": "DDIM", "dpmpp_2m": "DPM++"}

# ------------------------------------------------------------------------------------------------
# Pictures and scores

@torch.no_grad()
def sample(model, prompts, indices, ts, solver, n=1, seed=0, base=None, hybrid=0.0):
    """n pictures of each of p prompts -> (p n, 3, H, W) in [0, 1].

    The noise depends on (seed, index of the prompt) alone, so all models see the same. With a
    `base`, the last (1 - hybrid) of the steps are the base's: MixGRPO's hybrid inference.
    """
    rngs = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in indices]
    noise = torch.cat([torch.randn(n, *model.latent_shape, generator=rng) for rng in rngs])
    handover = ts[round(hybrid * (len(ts) - 1))] if base else -1
    cond = model.encode(prompts)
    traj, _ = rollout(lambda x, t: (model if t > handover else base).velocity(x, t, cond),
                      noise.to(model.device), ts, solver)                   # (T+1, p n, N, C)
    if not traj[-1].isfinite().all():
        raise ArithmeticError(f"the latents of {prompts[0]!r} are not finite; the model's weights "
                              "are broken, or its guidance is too large")
    return model.decode(traj[-1])

def as_bytes(images):
    """Pictures in [0, 1] as they are stored, uint8 on the CPU."""
    return (images * 255).round().to(torch.uint8).cpu()

def evaluate(model, scorers, prompts, ts, solver, images_per_prompt=1, seed=0, batch=64,
             chosen=None):
    """Sample and score in memory, while training. `chosen`: only the prompts at these places.

    n = images_per_prompt. Returns images (P, n, 3, H, W) uint8 on the CPU, {scorer name: (P, n)}.
    """
    n, at_once = images_per_prompt, max(1, batch // images_per_prompt)
    images, scores = [], {name: [] for name in scorers}
    chosen = range(len(prompts)) if chosen is None else chosen
    for places in (chosen[k : k + at_once] for k in range(0, len(chosen), at_once)):
        some = [prompts[i] for i in places]
        x = sample(model, some, places, ts, solver, n, seed)                # (p n, 3, H, W)
        images.append(as_bytes(x))
        for name, scorer in scorers.items():
            scores[name].append(scorer(x, [prompt for prompt in some for _ in range(n)]).cpu())
    scores = {name: torch.cat(s).unflatten(0, (-1, n)) for name, s in scores.items()}
    return torch.cat(images).unflatten(0, (-1, n)), scores

def mean_and_stderr(scores):
    """scores (P, n) -> their mean, and its standard error over the P prompts (0 for a single one,
    which has none)."""
    each = scores.double().mean(1)                                          # (P,)
    stderr = each.std().item() / len(each) ** 0.5 if len(each) > 1 else 0.0
    return each.mean().item(), stderr

def diversity(images):
    """images (P, n > 1, 3, H, W) in [0, 1] -> the root-mean-square distance, in [0, 1], of two
    pictures of a prompt, (P, 1)."""
    return (2 * images.flatten(2).var(1).mean(1, keepdim=True)).sqrt()      # E|a - b|^2 = 2 var

# ------------------------------------------------------------------------------------------------
# Drawings

def picture_grid(path, rows, captions):
    """Write a PNG with one labelled row of pictures per checkpoint, and the prompts below.

    rows: {label: (k, 3, H, W) uint8}, all of one size; captions: k. The font is DejaVu Sans. It has
    no Chinese, Japanese or Korean: boxes stand for them.
    """
    import matplotlib                                           # which brings the font
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 10)
    H, W = next(iter(rows.values())).shape[2:]
    scale = (128 if max(H, W) <= 128 else 256) / max(H, W)
    height, width, left, gap = round(scale * H), round(scale * W), 96, 6
    lines = [wrap_text(caption, width, font)[:5] for caption in captions]
    bottom = len(rows) * (height + gap)
    canvas = Image.new("RGB", (left + len(captions) * (width + gap),
                               bottom + 14 * max(map(len, lines)) + 6), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows.items()):
        y, label = row * (height + gap), "\n".join(wrap_text(label, left - 8, font))
        draw.multiline_text((4, y + height // 2), label, "black", font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + column * (width + gap), y))
    for column, line in enumerate(lines):
        draw.multiline_text((left + column * (width + gap), bottom), "\n".join(line), "black", font)
    canvas.save(path)

def wrap_text(text, width, font):
    """Lines that are at most `width` pixels wide. They break at spaces, or else anywhere."""
    lines = [""]
    for letter in " ".join(text.split()):
        if font.getlength((lines[-1] + letter).strip()) > width:
            line, _, word = lines[-1].rpartition(" ")
            lines[-1:] = [line, word] if line else [word, ""]
        lines[-1] += letter
    return [line.strip() for line in lines]

def draw_curve(lines, path):
    """Draw a log's training reward, and the held-out scores with their standard errors."""
    from matplotlib.figure import Figure
    evaluated = next((line for line in lines if "reward" not in line), {})
    keys = ["reward", *(key for key in evaluated if f"{key}_stderr" in evaluated
                        and not key.endswith("_gain"))]
    figure = Figure(figsize=(4 * len(keys), 3), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        some = [line for line in lines if key in line]
        x, y = [line["iter"] for line in some], np.array([line[key] for line in some], float)
        if key == "reward":
            panel.plot(x, y, color="tab:blue", alpha=0.3)
            if len(y) >= 10:
                panel.plot(x[9:], np.convolve(y, np.ones(10) / 10, "valid"), color="tab:blue",
                           label="mean of 10")
                panel.legend()
        else:
            stderr = np.array([line[f"{key}_stderr"] for line in some], float)      # None: nan
            panel.errorbar(x, y, stderr, marker="o", markersize=3, capsize=2)
        where = "on held-out prompts" if key in evaluated else "in training"
        panel.set(title=f"{key.removeprefix('eval_')} {where}", xlabel="iteration")
    figure.savefig(path, dpi=120)

# ------------------------------------------------------------------------------------------------
# A row of the table: one folder, which can be left and come back to

def read_json(path):
    """The object in a JSON file; {} if the file is missing or broken."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}

def fingerprint(path, pattern="*"):
    """Tells two versions of a file, or of a folder's files, apart without reading them: names,
    sizes and times; [] for what is not here."""
    path = Path(path)
    files = sorted(path.glob(pattern)) if path.is_dir() else [path] * path.is_file()
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]

def weights_of(path):
    """The fingerprint of the weights that a checkpoint was sampled with."""
    path = Path(path)
    return fingerprint(path if is_lora(path) else path / "transformer", "*.safetensors")

def label_of(path):
    """The last two parts of a checkpoint's path, "tiny-checkpoint-150": its folder's name."""
    path = Path(path).resolve() if Path(path).exists() else Path(path)
    return "-".join(path.relative_to(path.anchor).parts[-2:]) or "root"

def write(file, save):
    """Call save(path) for a path beside `file`, then rename: a file that is there is whole."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        save(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)

def write_text(file, text):
    write(file, lambda path: path.write_text(text, encoding="utf-8"))

class Row:
    """A model, and its folder <out_dir>/<label>/: settings.json, prompts.json, and in pictures/
    00000-0.png (prompt, picture) and 00000.json (the scores of the prompt's n pictures)."""

    def __init__(self, args, path, prompts):
        """ValueError if the folder has pictures that were made with other settings."""
        self.path, self.prompts, self.n = str(path), prompts, args.images_per_prompt
        hybrid = args.hybrid if path != args.model else 0.0
        self.label = label_of(path) + (f"-hybrid-{hybrid:g}" if hybrid else "")
        self.folder = Path(args.out_dir) / self.label
        self.settings = dict(
            model=self.path if not Path(path).exists() else "", weights=weights_of(path),
            prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16], hybrid=hybrid,
            base=([label_of(args.model), weights_of(args.model)] if hybrid or is_lora(path)
                  else []))
        for key in ("images_per_prompt solver steps shift resolution guidance seed").split():
            self.settings[key] = getattr(args, key)
        if (self.folder / "pictures").exists() and not args.overwrite:
            self.check_settings(read_json(self.folder / "settings.json"))

    def check_settings(self, before):
        if not before:
            raise ValueError(f"{self.folder} holds pictures, and nothing that says how they were "
                             "made; use --overwrite or another --out_dir")
        for key, value in self.settings.items():
            if before.get(key) != value:
                named = isinstance(value, (str, int, float)) and key != "prompts"
                what = f"another {key} than {value}" if named else f"other {key}"
                raise ValueError(f"{self.folder} holds pictures of {what}; use --overwrite or "
                                 "another --out_dir")

    def begin(self, overwrite):
        pictures, aside = self.folder / "pictures", self.folder / "pictures.old"
        shutil.rmtree(aside, ignore_errors=True)
        if overwrite and pictures.exists():
            os.replace(pictures, aside)         # first: half of the pictures must not look like all
            shutil.rmtree(aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in [("settings", self.settings), ("prompts", self.prompts)]:
            write_text(self.folder / f"{name}.json", json.dumps(content, indent=1))
        pictures.mkdir(exist_ok=True)
        now = (self.folder / "prompts.json").stat().st_mtime
        for file in self.folder.rglob("*.*.[0-9]*"):            # leftovers of killed saves, or of
            with contextlib.suppress(FileNotFoundError):        # another eval.py that is at work
                if now - file.stat().st_mtime > 600:            # here: a save takes no 10 minutes
                    file.unlink()

    def files(self, i):
        return [self.folder / f"pictures/{i:05d}-{k}.png" for k in range(self.n)]

    def has_pictures(self, i):
        return all(file.is_file() for file in self.files(i))

    def pictures(self, i):
        """The n pictures of prompt i, (n, 3, H, W) uint8."""
        try:
            images = [np.array(Image.open(file).convert("RGB")) for file in self.files(i)]
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.files(i)[0]} or one beside it is not a whole picture "
                             f"({error}); delete it and run again") from error

    def scores(self, i):
        """{scorer as it was named: [n scores]} of prompt i, as far as they were written."""
        found = read_json(self.folder / f"pictures/{i:05d}.json")
        return {spec: scores for spec, scores in found.items()
                if len(scores) == self.n and all(map(math.isfinite, scores))}

    def lacks(self, i, specs):
        """Whether a picture of prompt i or its score by one of these scorers is missing."""
        return not self.has_pictures(i) or not specs <= self.scores(i).keys()

    def complete(self, some, args, models, scorers):
        """Make what is missing of the pictures and scores of the prompts `some`.
        models: () -> the model and, for hybrid sampling, the base."""
        unseen = [i for i in some if not self.has_pictures(i)]
        if unseen:
            model, base = models()
            ts = schedule(args.steps, args.shift or model.shift(args.steps))
            x = sample(model, [self.prompts[i] for i in unseen], unseen, ts, args.solver, self.n,
                       args.seed, base, args.hybrid)
            files = [file for i in unseen for file in self.files(i)]
            for image, file in zip(as_bytes(x).permute(0, 2, 3, 1).numpy(), files):
                write(file, lambda path: Image.fromarray(image).save(path, "png"))
        pictures = [self.pictures(i) for i in some]             # what was written is scored
        if any(p.shape != pictures[0].shape for p in pictures):
            raise ValueError(f"{self.folder}/pictures holds pictures of several sizes; use "
                             "--overwrite")
        x = torch.cat(pictures).to(args.device) / 255                       # (p n, 3, H, W)
        each = [self.prompts[i] for i in some for _ in range(self.n)]
        found = {i: self.scores(i) for i in some}
        for spec, scorer in scorers.items():
            if any(spec not in found[i] for i in some):
                for i, scores in zip(some, scorer(x, each).unflatten(0, (-1, self.n)).tolist()):
                    found[i][spec] = scores
        for i in some:
            write_text(self.folder / f"pictures/{i:05d}.json", json.dumps(found[i]))

    def from_run(self):
        """What Table 1 says of a checkpoint's run: solver, NFEs, seconds of an iteration, and the
        rewards it was trained on. Nothing for a base."""
        path = Path(self.path)
        config = read_json(path / "state/config.json")
        try:
            text = (path.parent / "log.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.split("\n")[:-1]]
            lines = [line for line in lines if "nfe_old" in line]
            seconds = [sum(value for key, value in line.items() if key.startswith("seconds_"))
                       for line in lines]
            return dict(solver=SOLVERS[config["solver"]], nfe_old=f"{lines[-1]['nfe_old']}",
                        nfe_theta=f"{lines[-1]['nfe_theta']:.2f}",
                        seconds=f"{statistics.median(seconds):.2f}",
                        trained_on=[rewards.split(spec)[1]
                                    for spec in config["rewards"].split(",")])
        except (OSError, ValueError, LookupError):
            return dict(solver="N/A", nfe_old="N/A", nfe_theta="N/A", seconds="N/A", trained_on=[])

# ------------------------------------------------------------------------------------------------
# The tables

def tables(results, names):
    """Table 1 of the paper, and the differences from the first row. Markdown."""
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
    """Write the tables, the grid and the numbers, when all pictures and scores are there."""
    results, first = [], {}
    for row in rows:
        found = [row.scores(i) for i in chosen]
        if any(args.named.values() - scores.keys() for scores in found):
            raise ValueError(f"{row.folder} lacks scores that were just made; is another eval.py "
                             "at work there? run this one again")
        each = {name: torch.tensor([scores[spec] for scores in found])      # (P, n)
                for name, spec in args.named.items()}
        first = first or each
        result = dict(label=row.label, path=row.path, **row.from_run(), diversity=None)
        if row.n > 1:
            distances = [diversity(row.pictures(i)[None] / 255) for i in chosen]
            result["diversity"] = torch.cat(distances).mean().item()
        for name in args.specs:
            for key, x in [(name, each[name]), (f"{name}_gain", each[name] - first[name])]:
                result[key], result[f"{key}_stderr"] = mean_and_stderr(x)
        results.append(result)
    out, table = Path(args.out_dir), tables(results, list(args.specs))
    print("\n" + table + "\n")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    numbers = dict(settings=vars(args), num_prompts=len(chosen), results=results)
    (out / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    show = [chosen[k] for k in evenly_spaced(len(chosen), args.columns)]
    pictures = {row.label: torch.stack([row.pictures(i)[0] for i in show]) for row in rows}
    picture_grid(out / "grid.png", pictures, [rows[0].prompts[i] for i in show])
    print(f"wrote {out}/: table.md, results.json, grid.png, and the pictures in "
          f"{', '.join(row.label for row in rows)}")

# ------------------------------------------------------------------------------------------------
# Settings and main

def is_small(path):
    """Whether a model is built like the one in tiny/flux."""
    one, small = (read_json(Path(folder) / "transformer/config.json")
                  for folder in (path, HERE / "tiny/flux"))
    return all(one.get(key) == value for key, value in small.items() if not key.startswith("_"))

def parse_args(argv=None):
    """Command line -> settings and rows; or one sentence and exit code 2, before a model loads."""
    options = dict(                                             # default None: SMALL's or LARGE's
        model=(str(HERE / "tiny/flux"), "the base: a FluxPipeline directory or a hub id"),
        prompts=(None, "a file of prompts, see prompts.py; or hpdv2_test, hpdv2_train"),
        num_prompts=(0, "only so many of them, evenly spaced; 0: all"),
        scorers=(None, f"some of {', '.join(rewards.SCORERS)}"),
        images_per_prompt=(None, "n, at least 2 for diversity"),
        solver=(None, "ddim or dpmpp_2m"), steps=(None, "of the solver"),
        shift=(None, "of the time steps; 0: the model's"), seed=(0, "of the noise"),
        resolution=(None, "pixels: a side, or width x height like 832x640"),
        guidance=(3.5, "guidance scale"),
        hybrid=(0.0, "share of the first steps taken by a checkpoint, the rest by --model, as "
                     "MixGRPO evaluates (its paper: 0.8); 0: off"),
        batch=(None, "pictures at a time"), columns=(8, "prompts shown in the grid"),
        out_dir=("out/eval", "for table.md, results.json, grid.png and a folder per row"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python eval.py [--model base] [--checkpoint aligned ...] [--setting value ...]")
    for name, (default, text) in options.items():
        shown, kind = str(default), type(default)
        if default is None:
            shown = f"for a model like tiny/flux {SMALL[name]}, for another {LARGE[name]}"
            kind = type(LARGE[name])
        text = f"{text} (default {shown})".replace(f"{HERE}/", "")
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--checkpoint", nargs="*", default=[], help="aligned models, or adapters")
    parser.add_argument("--overwrite", action="store_true",
                        help="make the pictures and scores of these rows again")
    args = parser.parse_args(argv)
    try:
        return args, check(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))

def check(args):
    """Fill in the defaults that depend on the model, and return the rows. ValueError, in one
    sentence, for the first setting that cannot work."""
    for path in [args.model, *(path for path in args.checkpoint if not is_lora(path))]:
        check_model(path)
    for name, value in (SMALL if is_small(args.model) else LARGE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    height, width = parse_resolution(args.resolution)
    args.resolution = height if height == width else f"{width}x{height}"
    args.device = f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device
    prompts, args.specs = read_prompts(args.prompts), rewards.parse(args.scorers)
    schedule(args.steps, args.shift or 1)
    cuda, by_checkpoint = torch.cuda.is_available(), round(args.hybrid * args.steps)
    for holds, sentence in [
        (args.specs, f"scorers is empty; name at least one of {', '.join(rewards.SCORERS)}"),
        (min(args.images_per_prompt, args.columns, args.batch, args.num_prompts + 1) >= 1,
         "images_per_prompt, columns and batch must be at least 1, and num_prompts 0"),
        (args.solver in SOLVERS, f"solver is {args.solver}, but must be ddim or dpmpp_2m"),
        (0 <= args.shift <= 100, f"shift is {args.shift:g}, but must be 0 to 100"),
        (args.hybrid == 0 or 0 < by_checkpoint < args.steps,
         f"hybrid is {args.hybrid:g}, but must be 0, or leave both models some of the "
         f"{args.steps} steps"),
        (math.isfinite(args.guidance), f"guidance is {args.guidance}, but must be finite"),
        (0 <= args.seed < 2**40, f"seed is {args.seed}, but must lie between 0 and 2^40"),
        (args.device == "cpu" or (cuda and args.device.startswith("cuda")),
         f"device is {args.device}, but must be cpu, or cuda where there is one"),
        (args.out_dir, "out_dir is empty; name a directory"),
    ]:
        if not holds:
            raise ValueError(sentence)
    args.named = {}                                             # scorers with their weights: the
    for name, spec in args.specs.items():                       # keys in the files of scores
        where = rewards.split(spec)[2]
        versions = [str(fingerprint(Path(where).expanduser()))] if where else []
        args.named[name] = " ".join([spec, *versions, *rewards.fingerprints(spec).values()])
    rows = [Row(args, path, prompts) for path in [args.model, *args.checkpoint]]
    if len({row.label for row in rows}) < len(rows):
        raise ValueError("model and checkpoints must differ in the last two parts of their paths, "
                         f"unlike {', '.join(row.path for row in rows)}")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    return rows

def load_models(args, row):
    """The model of a row and, for hybrid sampling, the base."""
    load = functools.partial(Flux, resolution=args.resolution, device=args.device,
                             guidance=args.guidance, frozen=True)
    model = load(args.model, lora=row.path) if is_lora(row.path) else load(row.path)
    return model, load(args.model) if row.settings["hybrid"] else None

def main(argv=None):
    args, rows = parse_args(argv)
    init_processes()
    prompts, n = rows[0].prompts, args.images_per_prompt
    chosen = evenly_spaced(len(prompts), args.num_prompts or len(prompts))
    try:
        scorers = rewards.load_all(args.specs, args.device, [prompts[i] for i in chosen])
        scorers = {spec: scorers[name] for name, spec in args.named.items()}
        if RANK == 0:
            print(f"{len(chosen)} prompts of {args.prompts}, {n} image{'s' * (n > 1)} each, "
                  f"resolution {args.resolution}, {args.solver} {args.steps} steps, shift "
                  f"{args.shift or 'own'}, guidance {args.guidance:g}, seed {args.seed}, hybrid "
                  f"{args.hybrid or 'off'}, on {WORLD} x {args.device.partition(':')[0]}")
            for row in rows:
                row.begin(args.overwrite)
        gather_objects(None)                                    # the folders are there
        missing = [[i for i in chosen if row.lacks(i, scorers.keys())][RANK::WORLD] for row in rows]
        gather_objects(None)                                    # all have looked before one begins
        with tqdm(total=sum(map(len, missing)), desc="eval", disable=True if RANK else None) as bar:
            for row, mine in zip(rows, missing):
                models = functools.cache(lambda: load_models(args, row))    # if one is needed
                at_once = max(1, args.batch // n)
                for some in (mine[k : k + at_once] for k in range(0, len(mine), at_once)):
                    row.complete(some, args, models, scorers)
                    bar.update(len(some))
        gather_objects(None)
        if RANK == 0:
            report(args, rows, chosen)
    except (OSError, ValueError, ArithmeticError, rewards.ScorerError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    exit_process(main())
