"""
Sample held-out prompts from a base model and what was aligned from it, score them, and print the paper's Table 1. Time t runs from 1 (noise)
to 0 (image).

    python eval.py --checkpoint out/tiny/checkpoint-150          # the small world: base against aligned, same prompts, same noise
    torchrun --nproc_per_node 8 eval.py --model black-forest-labs/FLUX.1-dev --checkpoint out/dpm8/checkpoint-300 \\
        --prompts hpdv2_test --scorers hpsv2,pickscore,imagereward,clipscore,aesthetic     # FLUX's defaults: 50 steps, 1024 x 1024
    python eval.py --pairs out/eval/tiny-flux out/eval/tiny-checkpoint-150                 # a page on which people vote, blindly
    python eval.py --votes votes-*.json                                                    # and what they said

Each row of the table: NFE and (median) seconds of an iteration from the run's log, and every scorer's mean +- standard error over prompts, underlined
where the run was trained on it. The second table holds differences from the first row, prompt by prompt, with their own standard errors, and
diversity, the root-mean-square pixel distance of two pictures of one prompt. A run that was stopped goes on where it was: every picture and
score in --out_dir is kept, and only what is missing is made.
"""
import argparse, base64, datetime, functools, hashlib, io, json, math, os, random, shutil, statistics, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
import rewards
from model import Flux, check_model
from solvers import rollout, schedule

HERE = Path(__file__).resolve().parent
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))      # torchrun's
SMALL = dict(prompts=str(HERE / "tiny/prompts/test_concept.txt"), scorers="clip,judge", images_per_prompt=4, solver="dpmpp_2m", steps=8, shift=1.0, resolution=64, batch=64)
LARGE = dict(prompts="hpdv2_test", scorers="hpsv2,pickscore,imagereward,clipscore,aesthetic", images_per_prompt=1, solver="ddim", steps=50, shift=3.0, resolution=1024, batch=4)
TITLES = dict(hpsv2="HPSv2.1", pickscore="Pick / 100", imagereward="Img.Rwd.", clipscore="CLIP", unifiedreward="Unified.", aesthetic="Aes.")    # Table 1's
SOLVERS = {"ddim": "DDIM", "dpmpp_2m": "DPM++"}
UNITS = dict(pickscore=100)                                                                           # Table 1 prints PickScore over 100
Z_95 = 1.959964                                                                                       # 95 % of a normal distribution lies within +- Z_95

# ---------------------------------------------------------------------------------------------------------------
# prompts

HPDV2 = {                                                       # where it is looked for, what it should be, and the command that gets it there
    "hpdv2_test": ("hpdv2/benchmark", "the 3,200 prompts of anime, concept-art, paintings and photo.json", 'zhwang/HPDv2 --include "benchmark/*.json"'),
    "hpdv2_train": ("hpdv2/train.json", "the 103,700 training prompts", "ymhao/HPDv2 train.json"),
}


def read_prompts(source):
    """A text file with one prompt a line; a JSON list of prompts, or of objects that each have a "prompt", as HPDv2 publishes them (its train.json names
    each several times: here once); a folder of such JSON files; or hpdv2_test, hpdv2_train for where HPDV2 says."""
    if not source:
        raise ValueError("prompts is empty; name a text file with one prompt a line, or hpdv2_train")
    where, what, command = HPDV2.get(source, (source, "", ""))
    path, prompts = Path(where), []
    if command and not path.exists():
        raise ValueError(f"{source} should be {what} in {where}, and is not there; get it by: hf download --repo-type dataset {command} --local-dir hpdv2")
    try:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix.lower().startswith(".json"):
                assert isinstance(items := json.loads(text), list)
                prompts += dict.fromkeys((item if isinstance(item, str) else item["prompt"]).strip() for item in items)
            else:
                prompts += (line.strip() for line in text.split("\n"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ValueError(f"{source} is no prompt file; it must be a UTF-8 text file with one prompt a line, or a JSON list of prompts")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{source} holds no prompt; it must be a UTF-8 text file with one prompt a line, or a JSON list of prompts")
    return prompts


def split(names):
    """ "a, b" -> ["a", "b"]."""
    return [name.strip() for name in names.split(",") if name.strip()]


def evenly_spaced(n, most):
    """The indices of at most `most` of n prompts, evenly spaced: pictures are shown by this rule, not picked."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------
# models and their pictures

def is_lora(path):
    """Whether a checkpoint is adapters only, as train.py --lora_rank writes them."""
    return (Path(path) / "pytorch_lora_weights.safetensors").is_file()


def weights_of(path):
    """The stamp of what a checkpoint was sampled with."""
    return stamp(path, "*.safetensors") if is_lora(path) else stamp(Path(path) / "transformer", "*.safetensors")


def is_small(path):
    """Whether a model is built like the one in tiny/flux."""
    try:
        one, other = (json.loads((Path(p) / "transformer/config.json").read_text()) for p in (path, HERE / "tiny/flux"))
    except OSError:
        return False
    return all(one.get(key) == value for key, value in other.items() if not key.startswith("_"))


@torch.no_grad()
def sample(model, prompts, indices, ts, solver, n=1, seed=0, base=None, hybrid=0.0):
    """n pictures of each of p prompts -> (p n, 3, H, W) in [0, 1]. Noise depends on (seed, index of the prompt) alone, so all models see the same.

    With a `base`, the last (1 - hybrid) of the steps are the base's: MixGRPO's hybrid inference.
    """
    noise = torch.cat([torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in indices])
    cond, handover = model.encode(prompts), ts[round(hybrid * (len(ts) - 1))] if base else -1
    traj, _ = rollout(lambda x, t: (model if t > handover else base).velocity(x, t, cond), noise.to(model.device), ts, solver)
    if not traj[-1].isfinite().all():
        raise ArithmeticError(f"the latents of {prompts[0]!r} are not finite; the model's weights are broken, or its guidance is too large")
    return model.decode(traj[-1])


def evaluate(model, scorers, prompts, ts, solver, images_per_prompt=1, seed=0, batch=64, chosen=None):
    """Sample and score in memory, while training; `chosen`: only the prompts at these places. Returns images (P, n, 3, H, W) uint8 on the CPU and {scorer name: (P, n)}; n = images_per_prompt."""
    n, at_once = images_per_prompt, max(1, batch // images_per_prompt)
    images, scores = [], {name: [] for name in scorers}
    chosen = range(len(prompts)) if chosen is None else chosen
    for places in (chosen[k : k + at_once] for k in range(0, len(chosen), at_once)):
        some = [prompts[i] for i in places]
        x = sample(model, some, places, ts, solver, n, seed)                                          # (p n, 3, H, W)
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
    """images (P, n > 1, 3, H, W) in [0, 1] -> root-mean-square distance, in [0, 1], of two pictures of a prompt, (P, 1)."""
    return (2 * images.flatten(2).var(1).mean(1, keepdim=True)).sqrt()                                # E|a - b|^2 = 2 var


def picture_grid(path, rows, captions):
    """Write a PNG with one labelled row of pictures per checkpoint, prompts below. rows: {label: (k, 3, H, W) uint8}, captions: k."""
    side = 128 if next(iter(rows.values())).shape[-1] <= 128 else 256
    gap, left, font, lines = 6, 84, ImageFont.load_default(11), [_wrap(caption, side * 5 // 32)[:5] for caption in captions]
    bottom = len(rows) * (side + gap)
    canvas = Image.new("RGB", (left + len(captions) * (side + gap), bottom + 14 * max(len(line) for line in lines) + 6), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate(rows.items()):
        draw.multiline_text((4, row * (side + gap) + side // 2 - 8), "\n".join(_wrap(label, 13)), "black", font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + column * (side + gap), row * (side + gap)))
    for column, line in enumerate(lines):
        draw.multiline_text((left + column * (side + gap), bottom), "\n".join(line), "black", font)
    canvas.save(path)


def _wrap(text, width):
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def draw_curve(lines, path):
    """Training reward of each iteration, and the held-out scores with their standard errors."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    steps, evals = [line for line in lines if "reward" in line], [line for line in lines if "reward" not in line]
    names = [key for key in (evals[0] if evals else {}) if key.startswith("eval_") and not key.endswith(("_stderr", "_gain"))]
    figure, panels = plt.subplots(1, 1 + len(names), figsize=(4 * (1 + len(names)), 3), squeeze=False, layout="constrained")
    first, *others = panels[0]
    reward = np.array([line["reward"] for line in steps])
    first.plot([line["iter"] for line in steps], reward, color="tab:blue", alpha=0.3)
    if len(reward) >= 10:
        first.plot([line["iter"] for line in steps][9:], np.convolve(reward, np.ones(10) / 10, "valid"), color="tab:blue", label="mean of 10")
        first.legend()
    first.set(title="training reward", xlabel="iteration")
    for panel, name in zip(others, names):
        panel.errorbar([line["iter"] for line in evals], [line[name] for line in evals], [line[f"{name}_stderr"] for line in evals], marker="o", markersize=3, capsize=2)
        panel.set(title=f"{name.removeprefix('eval_')} on held-out prompts", xlabel="iteration")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# a row of the table: one folder, which can be left and come back to

def stamp(path, pattern="*"):
    """What tells two versions of files apart without reading them: names, sizes and times of a file or of a folder's; [] for what is not here."""
    files = sorted(Path(path).glob(pattern)) if Path(path).is_dir() else [Path(path)] * Path(path).is_file()
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


def label_of(path):
    """The last two parts of a checkpoint's path, "tiny-checkpoint-150": the name of its folder in --out_dir."""
    return "-".join(Path(path).resolve().parts[-2:] if Path(path).exists() else Path(path).parts)


def seconds_in(line):
    """How long the iteration of a log's line took, all phases."""
    return sum(value for key, value in line.items() if key.startswith("seconds_"))


class Row:
    """<out_dir>/<label>/: settings.json, prompts.json, and in pictures/ 00000-0.png (prompt, picture) and 00000.json (the prompt's scores)."""

    def __init__(self, args, path, prompts):
        self.path, self.prompts, self.n = str(path), prompts, args.images_per_prompt
        hybrid = args.hybrid if path != args.model else 0.0
        self.label = label_of(path) + (f"-hybrid-{hybrid:g}" if hybrid else "")
        self.folder = Path(args.out_dir) / self.label
        self.settings = dict(model=self.path if not Path(path).exists() else "", weights=weights_of(path),
                             prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16], hybrid=hybrid,
                             base=[label_of(args.model), weights_of(args.model)] if hybrid or is_lora(path) else [],
                             **{key: getattr(args, key) for key in ("images_per_prompt", "solver", "steps", "shift", "resolution", "guidance", "seed")})
        if (self.folder / "pictures").exists() and not args.overwrite:
            try:
                before = dict(json.loads((self.folder / "settings.json").read_text()))
            except (OSError, ValueError, TypeError):
                raise ValueError(f"{self.folder} holds pictures, and nothing that says how they were made; use --overwrite or another --out_dir")
            for key, value in self.settings.items():
                if before.get(key) != value:
                    value = f"another {key} than {value}" if isinstance(value, (str, int, float)) and key != "prompts" else f"other {key}"
                    raise ValueError(f"{self.folder} holds pictures of {value}; use --overwrite or another --out_dir")

    def begin(self, overwrite):
        if overwrite and (self.folder / "pictures").exists():
            aside = self.folder.with_name(f"{self.label}.old")                  # renamed first: half a folder must not look like one
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.folder, aside)
            shutil.rmtree(aside)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("settings.json", self.settings), ("prompts.json", self.prompts)):
            write(self.folder / name, lambda aside: aside.write_text(json.dumps(content, indent=1)))
        (self.folder / "pictures").mkdir(exist_ok=True)

    def files(self, i):
        return [self.folder / f"pictures/{i:05d}-{k}.png" for k in range(self.n)]

    def has_pictures(self, i):
        return all(file.is_file() for file in self.files(i))

    def pictures(self, i):
        """The n pictures of prompt i, (n, 3, H, W) uint8."""
        try:
            return torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in self.files(i)]).permute(0, 3, 1, 2)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.files(i)[0]} or one beside it is no whole picture ({error}); delete it and run again")

    def scores(self, i):
        """{scorer as it was named: [n scores]} of prompt i, as far as they were written and can be read."""
        try:
            found = json.loads((self.folder / f"pictures/{i:05d}.json").read_text())
            return {spec: scores for spec, scores in found.items() if len(scores) == self.n and all(map(math.isfinite, scores))}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def complete(self, some, args, models, scorers):
        """Make what is missing of the pictures and scores of prompts `some`. `models`: () -> the model and, for hybrid sampling, the base."""
        unseen = [i for i in some if not self.has_pictures(i)]
        if unseen:
            model, base = models()
            x = sample(model, [self.prompts[i] for i in unseen], unseen, schedule(args.steps, args.shift), args.solver, self.n, args.seed, base, args.hybrid)
            for image, file in zip((x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy(), [file for i in unseen for file in self.files(i)]):
                write(file, lambda aside: Image.fromarray(image).save(aside, "png"))
        pictures = [self.pictures(i) for i in some]                                                   # what was written is what is scored
        if any(p.shape != pictures[0].shape for p in pictures):
            raise ValueError(f"{self.folder}/pictures holds pictures of several sizes; use --overwrite")
        x = torch.cat(pictures).to(args.device) / 255
        found = {i: self.scores(i) for i in some}
        for spec, scorer in scorers.items():
            if any(spec not in found[i] for i in some):
                for i, scores in zip(some, scorer(x, [self.prompts[i] for i in some for _ in range(self.n)]).unflatten(0, (-1, self.n)).tolist()):
                    found[i][spec] = scores
        for i in some:
            write(self.folder / f"pictures/{i:05d}.json", lambda aside: aside.write_text(json.dumps(found[i])))

    def from_run(self):
        """What Table 1 says of the run that a checkpoint is of: solver, NFEs, seconds an iteration, and what it was trained on. Nothing for a base."""
        try:
            config = json.loads((Path(self.path) / "state/config.json").read_text())
            lines = [line for line in map(json.loads, (Path(self.path).parent / "log.jsonl").read_text().split("\n")[:-1]) if "nfe_old" in line]
            seconds = [seconds_in(line) for line in lines]
            return dict(solver=SOLVERS[config["solver"]], nfe_old=f"{lines[-1]['nfe_old']}", nfe_theta=f"{lines[-1]['nfe_theta']:.2f}",
                        seconds=f"{statistics.median(seconds):.2f}", trained_on=[spec.partition("=")[0] for spec in split(config["rewards"])])
        except (OSError, ValueError, LookupError):
            return dict(solver="N/A", nfe_old="N/A", nfe_theta="N/A", seconds="N/A", trained_on=[])


def write(file, save):
    """Written aside, then renamed: a file that is there is whole."""
    save(aside := file.with_name(f"{file.name}.{os.getpid()}"))
    os.replace(aside, file)


def tables(results, names):
    """Table 1 of the paper, and differences from the first row. Markdown."""
    def line(cells):
        return "| " + " | ".join(cells) + " |"
    titles = [TITLES.get(name, name) for name in names]
    one = [line(["Method", "Solver_old", "NFE_old ↓", "NFE_theta ↓", "s / Iter. ↓", *(f"{title} ↑" for title in titles)]), "|---" * (5 + len(names)) + "|"]
    two = [line([f"over {results[0]['label']}", *titles, "diversity"]), "|---" * (2 + len(names)) + "|"]
    for row in results:
        marks = [f"{row[n] / UNITS.get(n, 1):.4f} ± {row[n + '_stderr'] / UNITS.get(n, 1):.4f}" for n in names]
        marks = [f"<u>{mark}</u>" if name in row["trained_on"] else mark for name, mark in zip(names, marks)]
        gains = [f"{row[n + '_gain'] / UNITS.get(n, 1):+.4f} ± {row[n + '_gain_stderr'] / UNITS.get(n, 1):.4f}" for n in names]
        one.append(line([row["label"], row["solver"], *(str(row[key]) for key in ("nfe_old", "nfe_theta", "seconds")), *marks]))
        two.append(line([row["label"], *gains, "-" if row["diversity"] is None else f"{row['diversity']:.3f}"]))
    return "\n".join([*one, "", *two])


# ---------------------------------------------------------------------------------------------------------------
# what people say: the paper's Figure 7

def _prompts_of(folder):
    try:
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{folder} holds no pictures of eval.py; it must have prompts.json, a list of prompts, and pictures/")
    return prompts


def _data_urls(paths):
    """Two picture files -> two data URLs: both JPEG (quality 92, no chroma subsampling) or both PNG, whichever is smaller, so that
    neither side alone shows the traces of a codec."""
    pictures, coded = [Image.open(path).convert("RGB") for path in paths], []
    for kind, how in [("png", {}), ("jpeg", dict(quality=92, subsampling=0))]:
        files = [io.BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files):
            picture.save(file, kind, **how)
        coded.append([f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode() for file in files])
    return min(coded, key=lambda urls: sum(map(len, urls)))


def write_pairs(a, b, out, count=100, seed=0):
    """Write out/pairs.html, on which a person says blindly, prompt by prompt, which of two models made the better picture.

    a, b: two folders of eval.py, each with prompts.json and pictures/{prompt:05d}-0.png. At most `count` of the prompts whose first
    picture both have, evenly spaced; half of them have b on the left; order and sides depend on the seed alone. Returns the path.
    """
    folders = [Path(a).resolve(), Path(b).resolve()]
    (prompts_a, prompts_b), (label_a, label_b) = map(_prompts_of, folders), [folder.name for folder in folders]
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1")
    if folders[0] == folders[1]:
        raise ValueError(f"{a} and {b} are one folder; name two")
    if label_a == label_b:
        label_a, label_b = str(a), str(b)
    files = {i: [folder / "pictures" / f"{i:05d}-0.png" for folder in folders] for i in range(min(len(prompts_a), len(prompts_b)))}
    shared = [i for i, two in files.items() if all(file.is_file() for file in two)]
    if not shared:
        raise ValueError(f"{a} and {b} share no picture; both must have pictures/00000-0.png or another of one name")
    for i in shared:
        if prompts_a[i] != prompts_b[i]:
            raise ValueError(f"prompt {i} is {prompts_a[i]!r} in {a}, but {prompts_b[i]!r} in {b}; both must have been given the same prompts")
    rng, order = random.Random(seed), [shared[i] for i in evenly_spaced(len(shared), count)]
    rng.shuffle(order)
    sides = [i % 2 == 1 for i in range(len(order))]
    rng.shuffle(sides)
    pairs = []
    for i, flipped in zip(order, sides):
        left, right = _data_urls(files[i])[:: -1 if flipped else 1]
        pairs.append(dict(index=i, prompt=prompts_a[i], left=left, right=right, flipped=flipped))
    data = dict(a=label_a, b=label_b, seed=seed, pairs=pairs)
    data["study"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
    page = (HERE / "pairs.html").read_text(encoding="utf-8").replace("/*DATA*/", json.dumps(data).replace("<", "\\u003c"))   # no </script> in it
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.html").write_text(page, encoding="utf-8")
    return out / "pairs.html"


def read_votes(paths):
    """The files that voters saved from one page -> the list of them: {study, a, b, voter, votes: [{index, prompt, winner}]}."""
    files = []
    for path in paths:
        try:
            file = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            holds = all(isinstance(file[key], str) for key in ("study", "a", "b", "voter")) and all(
                type(vote["index"]) is int and vote["winner"] in ("a", "b", "tie") for vote in file["votes"])
            indices = [vote["index"] for vote in file["votes"]]
        except (OSError, ValueError, KeyError, TypeError):
            holds = False
        if not holds:
            raise ValueError(f"{path} is no votes file; it must be the JSON file that pairs.html saved")
        if not indices or len(indices) != len(set(indices)):
            raise ValueError(f"{path} must hold at least one vote, and one vote a prompt")
        for other, earlier in zip(files, paths):
            if any(file[key] != other[key] for key in ("study", "a", "b")):
                raise ValueError(f"{path} is of study {file['study']}, but {earlier} of {other['study']}; all files must come from one page")
            if file["voter"] == other["voter"]:
                raise ValueError(f"{path} is of the voter of {earlier}, {file['voter']!r}; there must be one file a voter")
        files.append(file)
    return files


def win_rate(files):
    """Votes as read_votes returns them -> how often b is preferred over a; a tie counts half.

    The unit is the prompt: what several voters say of one pair is averaged first, since their votes are not independent. wins, ties,
    losses: the prompts whose average for b lies above, at and below one half. rate: the mean over prompts, in [0, 1].
    low, high: Wilson's score interval, 95 %, n = prompts. It assumes that prompts are independent draws, and speaks of other prompts
    before these same voters, not of other voters. It is made for votes of 0 or 1; a mean of averages in [0, 1] varies no more than
    rate (1 - rate) / n, so ties and several voters only make it wider than it need be. It has a width even at 0 and 1.
    """
    votes = {}
    for file in files:
        for vote in file["votes"]:
            votes.setdefault(vote["index"], []).append({"a": 0.0, "tie": 0.5, "b": 1.0}[vote["winner"]])
    each = [sum(some) / len(some) for some in votes.values()]
    n, rate = len(each), sum(each) / len(each)
    centre = (rate + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * (rate * (1 - rate) / n + Z_95**2 / (4 * n * n)) ** 0.5
    return dict(a=files[0]["a"], b=files[0]["b"], wins=sum(x > 0.5 for x in each), ties=sum(x == 0.5 for x in each), losses=sum(x < 0.5 for x in each),
                prompts=n, voters=len(files), rate=rate, low=max(0.0, centre - half), high=min(1.0, centre + half))


def votes_line(r):
    """What win_rate returns, in one line."""
    rate, low, high = (f"{100 * r[key]:.1f} %" for key in ("rate", "low", "high"))
    return (f"{r['b']} against {r['a']}: {rate} of {r['prompts']} prompts (95 % interval {low} to {high}), "
            f"{r['wins']} wins {r['ties']} ties {r['losses']} losses, {r['voters']} voter{'s' * (r['voters'] > 1)}")


# ---------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Command line -> settings, prompts and rows, or exit code 2 with one sentence, before any model is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     usage="python eval.py [--model base] [--checkpoint aligned ...] [--setting value ...]")
    def setting(name, kind, text):
        default = os.path.relpath(SMALL[name], HERE) if str(SMALL[name]).startswith(str(HERE)) else SMALL[name]
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default for a model like tiny/flux {default}, for another {LARGE[name]})")
    parser.add_argument("--model", default=str(HERE / "tiny/flux"), help="the base: a FluxPipeline directory or hub id, the first row (default tiny/flux)")
    parser.add_argument("--checkpoint", nargs="*", default=[], help="what was aligned from it, a row each: FluxPipeline directories, or folders of LoRA adapters for --model")
    setting("prompts", str, "text file, HPDv2's JSON, hpdv2_test or hpdv2_train")
    parser.add_argument("--num_prompts", type=int, default=0, help="only so many of them, evenly spaced; 0: all (default 0)")
    setting("scorers", str, f"of {', '.join(rewards.SCORERS)}")
    setting("images_per_prompt", int, "n, at least 2 for diversity")
    setting("solver", str, "ddim or dpmpp_2m")
    setting("steps", int, "of the solver")
    setting("shift", float, "timestep shift")
    setting("resolution", int, "pixels")
    parser.add_argument("--guidance", type=float, default=3.5, help="(default 3.5)")
    parser.add_argument("--hybrid", type=float, default=0.0, help="share of the first steps taken by a checkpoint, the rest by --model, as MixGRPO evaluates (its paper: 0.8); 0: off (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, or of a page's order and sides (default 0)")
    setting("batch", int, "pictures at a time")
    parser.add_argument("--columns", type=int, default=8, help="prompts shown in the grid (default 8)")
    parser.add_argument("--out_dir", default="out/eval", help="a folder per row, grid.png, table.md, results.json (default out/eval)")
    parser.add_argument("--overwrite", action="store_true", help="make these rows' pictures and scores again")
    parser.add_argument("--device", default=f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")
    people = parser.add_mutually_exclusive_group()
    people.add_argument("--pairs", nargs=2, metavar=("A", "B"), help="instead: from the folders of two rows, write a page on which people vote blindly")
    people.add_argument("--votes", nargs="+", metavar="FILE", help="instead: read what such pages saved, print how often B was preferred over A")
    parser.add_argument("--count", type=int, default=100, help="pairs on the page (default 100)")
    args = parser.parse_args(argv)
    try:
        if args.pairs or args.votes:
            print(f"wrote {write_pairs(*args.pairs, args.out_dir, args.count, args.seed)}; give what people save from it to --votes" if args.pairs
                  else votes_line(win_rate(read_votes(args.votes))))
            return None
        for path in [args.model, *(path for path in args.checkpoint if not is_lora(path))]:
            check_model(path)
        args.device = f"cuda:{LOCAL_RANK}" if args.device == "cuda" else args.device
        for name, value in (SMALL if is_small(args.model) else LARGE).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        prompts, args.specs, _ = read_prompts(args.prompts), rewards.parse(args.scorers), schedule(args.steps, args.shift)
        for holds, sentence in [
            (args.specs, f"scorers is empty; name at least one of {', '.join(rewards.SCORERS)}"),
            (args.images_per_prompt >= 1 and args.columns >= 1 and args.batch >= 1, "images_per_prompt, columns and batch must be at least 1"),
            (args.num_prompts >= 0, f"num_prompts is {args.num_prompts}, but must be at least 0"),
            (args.solver in ("ddim", "dpmpp_2m"), f"solver is {args.solver}, but must be ddim or dpmpp_2m"),
            (0.01 <= args.shift <= 100, f"shift is {args.shift:g}, but must lie between 0.01 and 100"),
            (args.hybrid == 0 or 0 < round(args.hybrid * args.steps) < args.steps, f"hybrid is {args.hybrid:g}, but must be 0, or leave both models some of the {args.steps} steps"),
            (math.isfinite(args.guidance), f"guidance is {args.guidance}, but must be a finite number"),
            (args.resolution >= 16 and args.resolution % 16 == 0, f"resolution is {args.resolution}, but must be a multiple of 16"),
            (0 <= args.seed < 2**40, f"seed is {args.seed}, but must lie between 0 and 2^40"),
            (args.device == "cpu" or (args.device.startswith("cuda") and torch.cuda.is_available()), f"device is {args.device}, but must be cpu, or cuda where there is one"),
            (args.out_dir, "out_dir is empty; name a directory"),
        ]:
            if not holds:
                raise ValueError(sentence)
        args.named = {name: name + (f"={where} {stamp(Path(where).expanduser())}" if where else "") for name, where in args.specs.items()}     # with these weights
        rows = [Row(args, path, prompts) for path in [args.model, *args.checkpoint]]
        if len({row.label for row in rows}) < len(rows):
            raise ValueError(f"model and checkpoints must differ in the last two parts of their paths, unlike {', '.join(row.path for row in rows)}")
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, rows


def main(argv=None):
    parsed = parse_args(argv)
    if parsed is None:
        return 0
    args, rows = parsed
    prompts, chosen = rows[0].prompts, evenly_spaced(len(rows[0].prompts), args.num_prompts or len(rows[0].prompts))
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))              # only to wait for each other
    wait = torch.distributed.barrier if WORLD > 1 else lambda: None
    try:
        scorers = rewards.load_all(args.specs, args.device, [prompts[i] for i in chosen])
        if RANK == 0:
            print(f"{len(chosen)} prompts of {args.prompts}, {args.images_per_prompt} image{'s' * (args.images_per_prompt > 1)} each, {args.resolution}x{args.resolution}, "
                  f"{args.solver} {args.steps} steps, shift {args.shift:g}, guidance {args.guidance:g}, seed {args.seed}, "
                  f"hybrid {args.hybrid or 'off'}, on {WORLD} x {args.device.partition(':')[0]}", flush=True)
            for row in rows:
                row.begin(args.overwrite)
        wait()
        mine, at_once = chosen[RANK::WORLD], max(1, args.batch // args.images_per_prompt)
        named = {spec: scorers[name] for name, spec in args.named.items()}
        with tqdm(total=len(rows) * len(mine), desc="eval", disable=True if RANK else None) as bar:
            for row in rows:
                @functools.cache                                # loaded for the first picture that is missing, if any is
                def models():
                    path, lora = (args.model, row.path) if is_lora(row.path) else (row.path, "")
                    model = Flux(path, args.resolution, args.device, args.guidance, frozen=True, lora=lora)
                    return model, Flux(args.model, args.resolution, args.device, args.guidance, frozen=True) if args.hybrid and row is not rows[0] else None
                missing = [i for i in mine if not row.has_pictures(i) or named.keys() - row.scores(i).keys()]
                bar.update(len(mine) - len(missing))
                for k in range(0, len(missing), at_once):
                    row.complete(missing[k : k + at_once], args, models, named)
                    bar.update(len(missing[k : k + at_once]))
        wait()
        if RANK == 0:
            report(args, rows, chosen)
    except (OSError, ValueError, ArithmeticError, rewards.ScorerError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    return 0


def report(args, rows, chosen):
    """Everything is there: the tables, the grid, the numbers."""
    results, first, show = [], {}, [chosen[k] for k in evenly_spaced(len(chosen), args.columns)]
    for row in rows:
        found = [row.scores(i) for i in chosen]
        if any(args.named.values() - scores.keys() for scores in found):
            raise ValueError(f"{row.folder} lacks scores that were just made; is another eval.py at work there? run this one again")
        each = {name: torch.tensor([scores[spec] for scores in found]) for name, spec in args.named.items()}                               # (P, n)
        first = first or each
        result = dict(label=row.label, path=row.path, **row.from_run(), diversity=None)
        if row.n > 1:
            result["diversity"] = torch.cat([diversity(row.pictures(i)[None] / 255) for i in chosen]).mean().item()
        for name in args.specs:
            result[name], result[f"{name}_stderr"] = mean_and_stderr(each[name])
            result[f"{name}_gain"], result[f"{name}_gain_stderr"] = mean_and_stderr(each[name] - first[name])
        results.append(result)
    out, table = Path(args.out_dir), tables(results, list(args.specs))
    print("\n" + table + "\n")
    (out / "table.md").write_text(table + "\n")
    (out / "results.json").write_text(json.dumps(dict(settings=vars(args), num_prompts=len(chosen), results=results), indent=1))
    picture_grid(out / "grid.png", {row.label: torch.stack([row.pictures(i)[0] for i in show]) for row in rows}, [rows[0].prompts[i] for i in show])
    print(f"wrote {out}/: table.md, results.json, grid.png, and the pictures in {', '.join(row.label for row in rows)}")


if __name__ == "__main__":
    sys.exit(main())
