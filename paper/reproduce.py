"""
The paper's tables and figures on the small world: Neighbor GRPO, the methods that the paper
compares it with, and four more.

    python -m paper.reproduce table1            # into paper/results/table1.md, .json and .png
    python -m paper.reproduce all --jobs 2      # everything, two runs at a time
    python -m paper.reproduce table1 --kept     # from the runs in results/runs.jsonl; none is made
    python -m paper.reproduce table1 --quick    # only to see that it runs: results/quick/

    table3             the cost of an iteration: network evaluations, which are counted, and
                       seconds, which are measured in turns within one process; once more after
                       tune, which adds the searched settings
    steps              Neighbor GRPO with 8 to 2 steps, at equal iterations and at equal seconds
    tune               the search for each method's settings
    table1, table2     the methods at equal seconds; table1 also draws Figure 5
    table4, 5, 6       sigma, B and p around (0.5, 4, 2), the paper's starting point (Sec. 4.2)
    settings           tau, updates in an iteration, the literal old anchor, learning rate, clip
    rewards            trained on the preference, on the judge, or on both
    spread             how different the rewards in a group are, under each rollout
    figure4            which groups get more weight from the quasi-norm, and which less
    figure8            a rollout group before and after alignment
    again              one row of each of table4, 5, 6, settings and rewards, against that table
    comparisons        how many differences the tables judge

Call them in this order. A stopped command continues (paper/jobs.py). Equal seconds are those of
--iterations of Neighbor GRPO with 8 steps. The seconds in results/table3.json turn them into
iterations, so other work on the machine does not matter during a run. Tables 4 to 6, settings and
rewards have equal iterations. Each method comes twice: as published, but with the search's learning
rate and clip; and "searched", with all of the search's settings. Evaluations use DPM-Solver++ with
16 steps. The reward is `preference`. Only `rewards` trains on the judge. paper/README.md explains
the columns. --quick has few iterations and prompts. Its numbers are meaningless.
"""
import argparse, functools, hashlib, itertools, json, math, random, re, shutil, signal
import subprocess, sys, time
from pathlib import Path
import numpy as np
import torch
from PIL import Image
import rewards, train
from eval import as_bytes, diversity, import_matplotlib, label_of, picture_grid, sample
from machine import evenly_spaced, read_prompts
from model import Flux
from neighbor_grpo import group_advantages, perturb_noise
from paper import baselines, bench
from paper.jobs import keep_run, kept_runs, made_by, run_all, stop, threads
from run import HERE, checkpoints
from solvers import rollout, schedule

RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, TRAINED_ON = HERE / "tiny/prompts/test_concept.txt", HERE / "tiny/prompts/train.txt"
STEPS = 8, 6, 5, 4, 3, 2                        # of the table `steps`
OURS, RIVAL, SEARCHED = "Neighbor GRPO, 8 steps", "DanceGRPO", ", searched"
OURS_2, OURS_08 = "Neighbor GRPO, sigma 0.5, p = 2", "Neighbor GRPO, sigma 0.5, p = 0.8"
START = dict(sigma=0.5, num_anchors=4, p=2.0)                   # Sec. 4.2
SWEEPS = {"table4": ("sigma", (1.0, 0.5, 0.3, 0.1)),
          "table5": ("num_anchors", (2, 4, 8, 12)),
          "table6": ("p", (2.0, 1.0, 0.8, 0.5))}
CHANGES = {             # table: {row: settings of Neighbor GRPO with 8 steps}
    **{table: {f"{value:g}": " ".join(f"--{key} {each:g}" for key, each in
                                      {**START, flag: value}.items()) for value in values}
       for table, (flag, values) in SWEEPS.items()},
    "settings": {"as it is": "", "tau 1": "--tau 1", "1 update": "--updates_per_iteration 1",
                 "4 updates": "--updates_per_iteration 4",
                 "literal old anchor": "--old_anchor rollout", "lr 2e-5": "--lr 2e-5",
                 "lr 1e-4": "--lr 1e-4", "clip 1e-4": "--clip_eps 1e-4"},
    "rewards": {"preference": "", "judge": "--rewards judge --eval_scorers preference",
                "both": "--rewards preference,judge --eval_scorers flawless"}}
OURS_BEST = "Neighbor GRPO" + SEARCHED          # which may have other than 8 steps
METHODS = {             # label: settings
    **dict(bench.METHODS.values()),
    **{f"Neighbor GRPO, {T} steps": f"--num_rollout_steps {T} --num_train_steps {min(4, T - 1)}"
       for T in STEPS[1:]},
    "Neighbor GRPO": "", OURS_2: CHANGES["table6"]["2"], OURS_08: CHANGES["table6"]["0.8"],
}
PUBLISHED = [label for label, _ in bench.METHODS.values()]

def family_of(label):
    """The method whose search a row takes."""
    flags = METHODS[label.removesuffix(SEARCHED)]
    return flags.split()[1] if "--method" in flags else "neighbor"

FAMILIES = {"neighbor": "Neighbor GRPO"}        # method: the first of its labels
for label in PUBLISHED:
    FAMILIES.setdefault(family_of(label), label)
BEST = [*(label + SEARCHED for label in list(FAMILIES.values())[1:]), OURS_BEST]
TABLE1 = [*PUBLISHED, *BEST]
TABLE2 = [label + end for label in ("DanceGRPO", "MixGRPO", "BranchGRPO")
          for end in ("", SEARCHED)] + [OURS_2, OURS_08]
# The learning rate and clip of Tables 4 to 6, settings and rewards: those of the first search
# (results/tune.md of commit 3da3e69)
AROUND = "--lr 5e-5 --clip_eps 1e-3".split()

# ------------------------------------------------------------------------------------------------
# What the search may choose. A trial has one value of each axis. The first two are learning rate
# and clip; of the others, the first value is the published one.

def axis(names, *values):
    """axis("a b", "1 2", "3 4") -> ("--a 1 --b 2", "--a 3 --b 4")"""
    return tuple(" ".join(f"--{name} {value}" for name, value in zip(names.split(), each.split()))
                 for each in values)

RATES = axis("lr", "2e-5", "5e-5", "1e-4", "2e-4", "4e-4")
# The published clip, and one for fewer dimensions: a log ratio that is a mean over D dimensions
# scales as 1 / sqrt(D), and sqrt(129,600 / 1,024) = 11.
CLIPS = axis("clip_eps", "1e-4", "1e-3")
T_K, WINDOW = "num_rollout_steps num_train_steps", "window num_train_steps window_every"
GRIDS = {
    "dance": (RATES, CLIPS, axis("eta", "0.3", "0.7", "1"), axis(T_K, "25 14", "16 9", "8 4")),
    "flow": (RATES, CLIPS, axis("eta", "0.9", "0.3", "0.7", "1"), axis(T_K, "6 5", "10 9", "4 3")),
    "mix": (RATES, CLIPS, axis("eta", "0.7", "0.3", "1"), axis("num_rollout_steps", "25", "16",
            "8"), axis(WINDOW, "4 4", "2 2", "4 4 0")),
    "flash": (RATES, CLIPS, axis("eta", "0.7", "0.3", "1"), axis("compress", "0.2", "0.4"),
              axis(WINDOW, "4 4 0", "2 2 0", "6 6 0")),
    "branch": (RATES, CLIPS[::-1], axis("eta split_noise", "0.3 4", "0.5 4", "0.7 4", "1 2"),
               axis("num_rollout_steps splits", "20 0,3,6,9", "8 0,1,2,3"),
               axis("prune", "0", "3")),
    "nft": (RATES, ("",), axis("beta", "1", "0.1"), axis(T_K, "10 9", "10 4", "6 5")),
    "awm": (RATES, ("",), axis("updates_per_iteration clip_eps", "1 1", "2 1", "2 0.01", "4 0.01"),
            axis(T_K, "14 6", "8 6", "8 4")),
    # pairs of a prompt, and prompts: 48 pairs in each case
    "fdfo": (RATES, axis("clip_eps", "0.03", "0.1", "0.3"), axis("churn", "0.0025", "0.0125",
             "0.05"), axis("num_rollout_steps", "40", "16", "8"),
             axis("group_size prompts_per_iteration updates_per_iteration", "12 8 3", "2 48 4",
                  "12 8 1")),
    "neighbor": (RATES, CLIPS, axis("sigma", "0.3", "0.5", "0.7"),
                 axis(T_K, "8 4", "6 4", "5 4", "4 3", "3 2"),
                 axis("updates_per_iteration", "2", "1", "4")),
}

AGAIN = {"table4": "0.3", "table5": "8", "table6": "1", "settings": "1 update", "rewards": "judge"}
SPREAD = {              # label: settings
    "Neighbor GRPO, sigma 0.3, 8 steps": "",
    "Neighbor GRPO, sigma 0.3, 4 steps": "--num_rollout_steps 4 --num_train_steps 3",
    "MixGRPO's first window": "--method mix",
    "a noise of its own for each, ODE (DiffusionNFT)": "--method nft",
    "the same, with noise at every step (Flow-GRPO)": "--method flow",
    **{f"DanceGRPO, eta {eta}, {T} steps": f"--method dance --eta {eta} --num_rollout_steps {T} "
       "--num_train_steps 4" for eta, T in ((0.3, 25), (0.3, 8), (0.7, 8), (1.0, 8))},
    **{f"BranchGRPO, eta {eta} x {factor}": f"--method branch --eta {eta} --split_noise {factor}"
       for eta, factor in ((0.3, 4), (0.5, 4), (1.0, 2))}}
PAPER_BASE = 0.310, 0.389
PAPER = {   # FLUX.1-dev: (HPSv2.1, CLIP). HPSv2.1 was a reward, in Table 1 one of three
    "table1": {"DanceGRPO": (0.371, 0.364), "MixGRPO": (0.366, 0.382),
               "MixGRPO-Flash*": (0.343, 0.374), "Neighbor GRPO, 25 steps": (0.359, 0.385),
               "Neighbor GRPO, 16 steps": (0.369, 0.386), OURS: (0.366, 0.391)},
    "table2": {"DanceGRPO": (0.356, 0.366), "MixGRPO": (0.371, 0.367), "BranchGRPO": (0.379, 0.362),
               OURS_2: (0.379, 0.368), OURS_08: (0.372, 0.371)},
    "table3": {"DanceGRPO": 237.86, "MixGRPO": 237.71, "MixGRPO-Flash*": 129.36,    # s / iter.
               "BranchGRPO": 249.33, "Neighbor GRPO, 25 steps": 141.93,
               "Neighbor GRPO, 16 steps": 105.85, OURS: 45.08},
    "table4": {1.0: (0.364, 0.359), 0.5: (0.379, 0.368), 0.3: (0.375, 0.363), 0.1: (0.357, 0.364)},
    "table5": {2: (0.370, 0.363), 4: (0.379, 0.368), 8: (0.374, 0.373), 12: (0.377, 0.370)},
    "table6": {2.0: (0.379, 0.368), 1.0: (0.377, 0.356), 0.8: (0.372, 0.371), 0.5: (0.372, 0.354)},
}

# ------------------------------------------------------------------------------------------------
# The runs of a method

def job(args, label, flags, iterations, seed, every=None):
    """One run -> (folder, (script, flags)). `every`: iterations between evaluations, 0 for none; by
    default a fifth of all."""
    text, name = " ".join(flags), OURS if label in (OURS_2, OURS_08) else label
    moves = 12 if "--method mix" in text else 10 if re.search("--prune [1-9]", text) else 0
    if moves and "--window_every" not in text:          # published: 25 and 30 of 300 iterations
        flags = [*flags, "--window_every", str(max(1, round(iterations / moves)))]
    name = name.replace("*", "").replace(", ", "-").replace(" ", "_")
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:6]
    every = math.ceil(iterations / 5) if every is None else every
    return args.out / f"{name}-{digest}-{iterations}-seed{seed}", (bench.script_of(flags), [
        *flags, "--iterations", str(iterations), "--seed", str(seed), "--eval_steps", "16",
        "--eval_every", str(every), "--save_every", "10", "--keep", "1", *args.more])

def settings_of(args, label):
    """A row's flags."""
    if label.endswith(SEARCHED):
        return tuned(args)[family_of(label)]["searched"].split()
    if "sigma" in label:
        return [*AROUND, *METHODS[label].split()]
    return [*METHODS[label].split(), *tuned(args)[family_of(label)]["published"].split()]

def jobs_of(args, label, flags=None):
    """A row's runs, {folder: (script, flags)}, one for each seed. They last as long as
    args.iterations of ours."""
    flags = settings_of(args, label) if flags is None else flags
    return dict(job(args, label, flags, lasting(args, label), seed) for seed in range(args.seeds))

def lasting(args, label):
    """The number of iterations of a method that take the seconds of args.iterations of ours."""
    ours, theirs = cost_of(args, OURS)["seconds"], cost_of(args, label)["seconds"]
    return max(1, round(args.iterations * ours / theirs))

# ------------------------------------------------------------------------------------------------
# The cost of an iteration

def timed(args, label):
    """The settings that Table 3 times: without learning rate and clip, which cost nothing."""
    if not label.endswith(SEARCHED):
        return METHODS[label]
    words = tuned(args)[family_of(label)]["searched"].split("--")
    return "--".join(word for word in words if not word.startswith(("lr ", "clip_eps "))).strip()

def costs(args):
    """The rows of Table 3, {label: dict}, or none before it was made."""
    path = args.results / "table3.json"
    return json.loads(path.read_text(encoding="utf-8"))["data"] if path.exists() else {}

def cost_of(args, label):
    """The row of Table 3. Variants of ours do the same work, so they share a timing."""
    label = OURS if "sigma" in label else label
    found = costs(args).get(label, {})
    if found.get("settings") != timed(args, label):
        raise SystemExit(f"{args.results}/table3.json has no seconds for {label} with these "
                         "settings; python -m paper.reproduce table3")
    return found

@functools.cache
def evaluations(flags):
    """An iteration's network evaluations without and with gradients, and its images -> (3,)"""
    cfg = bench.parsed(flags.split())
    if cfg.method != "neighbor":
        old, theta = baselines.nfe(cfg)
    else:
        old, theta = cfg.num_rollout_steps, cfg.num_anchors * cfg.num_train_steps / cfg.group_size
    return cfg.prompts_per_iteration * cfg.group_size * np.array([old, theta, 1.0])

def estimated(flags, rows):
    """The seconds of an iteration, by a fit of the published rows of Table 3: so many for an
    evaluation, for a trained one, and for an image."""
    known = {label: rows[label]["seconds"] for label in PUBLISHED if label in rows}
    y = np.array(list(known.values()))
    x = np.array([evaluations(METHODS[label]) for label in known])
    each, *_ = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)
    return float(evaluations(flags) @ each)

def table3(args):
    """Rows that were added later are scaled by the seconds of ours, which is timed with them."""
    wanted = {label: (label, timed(args, label))
              for label in [*PUBLISHED, *(f"Neighbor GRPO, {T} steps" for T in STEPS[1:]), *BEST]
              if not label.endswith(SEARCHED) or (args.results / "tune.json").exists()}
    found = {label: row for label, row in costs(args).items()
             if label in wanted and row.get("settings") == wanted[label][1]}
    missing = {label: method for label, method in wanted.items() if label not in found}
    if missing:
        all_threads = torch.get_num_threads()
        torch.set_num_threads(threads(args))
        timings = bench.measure({OURS: wanted[OURS], **missing}, args.repeats, args.more[:4],
                                warm=min(1, args.repeats - 1))
        torch.set_num_threads(all_threads)
        scale = found[OURS]["seconds"] / timings[OURS]["iteration"] if OURS in found else 1
        kept = ("nfe_old", "nfe_theta", "G", "B", "K", "solver")
        found |= {label: dict(seconds=scale * timings[label]["iteration"],
                              settings=wanted[label][1], cpu=made_by()["cpu"],
                              **{key: timings[label][key] for key in kept}) for label in missing}
    found, paper, rows = {label: found[label] for label in wanted}, PAPER["table3"], []
    for label, c in found.items():
        published = ["", ""]
        if label in paper:
            published = [f"{paper[label]:.2f}", f"{paper[label] / paper[RIVAL]:.2f}"]
        rows.append([label, f"{c['nfe_old']:.2f}".removesuffix(".00"), c["G"], c["B"], c["K"],
                     f"{c['nfe_theta']:.2f}", f"{c['seconds']:.2f}",
                     f"{estimated(wanted[label][1], found):.2f}",
                     f"{c['seconds'] / found[RIVAL]['seconds']:.2f}", *published])
    head = ["Method", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", "fit", f"of {RIVAL}'s",
            "paper: s / iter.", f"of {RIVAL}'s"]
    return head, rows, found, ""

# ------------------------------------------------------------------------------------------------
# The search

def tuned(args):
    """{method: dict(published, searched)}: flags, from results/tune.json."""
    path = args.results / "tune.json"
    if not path.exists():
        raise SystemExit(f"there is no {path}; python -m paper.reproduce tune")
    return json.loads(path.read_text(encoding="utf-8"))["data"]

def flags_of(family, choice):
    method = f"--method {family} " * (family != "neighbor")
    return f"{method}{' '.join(filter(None, choice))}"

def in_order(family, fits=lambda choice: True):
    """The settings of a method in the order in which they are tried: (choice, is published). The
    order is random, but every third trial has all settings as published, except learning rate and
    clip, while there are such. The others must be choices that fit."""
    grid, rng = GRIDS[family], random.Random(family)
    published, n = tuple(axis[0] for axis in grid[2:]), 0
    plain, others = [], []
    for choice in itertools.product(*grid):
        (plain if choice[2:] == published else others).append(choice)
    rng.shuffle(plain)
    rng.shuffle(others)
    while plain or others:
        is_plain = bool(plain) and (n % 3 == 0 or not others)
        choice = (plain if is_plain else others).pop()
        if is_plain or fits(choice):
            n += 1
            yield choice, is_plain

def sweep(args):
    """Try settings for half the seconds of a run, but for at least eight iterations, until the
    method's seconds are spent. (Those of which a run has less than four iterations, only as
    published.) Then try the best again, for all the seconds and with another seed:
    by turns the best of all and the best of the published, until another budget is spent.
    -> {method: [dict(choice, published, seconds, half, whole)]}; half and whole: dict(iterations,
    preference, judge), the gains, or -1 for a run that diverged."""
    run_seconds, rows = args.iterations * cost_of(args, OURS)["seconds"], costs(args)
    prompts = ["--eval_prompts", "tiny/prompts/test_pair.txt"]          # which no table uses

    def attempt(part, seed, chosen):
        jobs = [(trial, job(args, f"tune-{FAMILIES[family]}",
                            [*flags_of(family, trial["choice"]).split(), *prompts],
                            trial[part]["iterations"], seed, every=trial[part]["iterations"]))
                for family, trials in chosen.items() for trial in trials]
        logs = run_all(args, dict(what for _, what in jobs), may_diverge=True)
        for trial, (folder, _) in jobs:
            shutil.rmtree(folder, ignore_errors=True)           # runs.jsonl has all that is needed
            for scorer in ("preference", "judge"):
                trial[part][scorer] = curve(logs[folder], scorer)[1][-1] if logs[folder] else -1.0

    def within(budget, trials, part, share):
        """As many of the trials as the budget allows, in runs, but at least two."""
        taken, spent = [], 0.0
        for trial in trials:
            count = max(args.least, round(run_seconds * share / trial["seconds"]))
            spent += count * trial["seconds"]
            if len(taken) >= 2 and spent > budget * run_seconds:
                break
            trial[part] = dict(iterations=count)
            taken.append(trial)
        return taken

    found = {}
    for family in GRIDS:
        cost = lambda choice: estimated(flags_of(family, choice), rows)
        trials = (dict(choice=choice, published=published, seconds=cost(choice))
                  for choice, published in in_order(
                      family, lambda choice: 4 * cost(choice) <= run_seconds))
        found[family] = within(args.search[0], trials, "half", 1 / 2)
    attempt("half", 1000, found)
    again = {}
    for family, trials in found.items():
        ranked = sorted(trials, key=lambda trial: -trial["half"]["preference"])
        plain = [trial for trial in ranked if trial["published"]]
        turns = filter(None, itertools.chain(*itertools.zip_longest(ranked[:4], plain[:2])))
        again[family] = within(args.search[1], {id(trial): trial for trial in turns}.values(),
                               "whole", 1)
    attempt("whole", 1001, again)
    return found

def tune(args):
    rows, data = [], {}
    whole = lambda trial: trial.get("whole", {}).get("preference", -math.inf)

    def told(trial):
        w = trial["whole"]
        return f"{w['preference']:+.4f} ({w['judge']:+.4f})"

    for family, trials in sweep(args).items():
        plain = max((trial for trial in trials if trial["published"]), key=whole)
        best = max(trials, key=whole)
        spent = sum(trial["seconds"] * trial[part]["iterations"]
                    for trial in trials for part in ("half", "whole") if part in trial)
        data[family] = dict(published=" ".join(filter(None, plain["choice"][:2])),
                            searched=flags_of(family, best["choice"]), trials=trials)
        rows.append([FAMILIES[family], math.prod(map(len, GRIDS[family])), len(trials),
                     sum(trial["published"] for trial in trials),
                     sum("whole" in trial for trial in trials), f"{spent:.0f}",
                     data[family]["published"], told(plain),
                     " ".join(filter(None, best["choice"])), told(best)])
    return ["method", "settings in the grid", "trials", "of them as published", "tried again",
            "seconds", "as published: learning rate, clip", "reward gain", "searched",
            "reward gain"], rows, data, ""

# ------------------------------------------------------------------------------------------------
# The methods

def finals(args, logs, steps=16, pictures=4):
    """{folder: a row of eval.py's results} of finished runs, and the base's row as "base". eval.py
    samples the last checkpoints, several pictures for each held-out prompt. Rows that runs.jsonl
    has are taken from there."""
    kept, here, key = kept_runs(args), made_by(), f"scores, {steps} steps, {pictures} pictures"
    names = ["base", *(folder.name for folder in logs)]
    found = {name: kept[name][key] for name in names if key in kept.get(name, {})
             and (args.kept or kept[name]["made_by"] == here)}
    newest = {folder.name: path[-1] for folder in logs
              if folder.name not in found and (path := checkpoints(folder))}
    if missing := [name for name in names[1:] if name not in {**found, **newest}]:
        raise RuntimeError(f"there is neither a checkpoint nor a score of {', '.join(missing)}; "
                           "delete their lines in runs.jsonl to make these runs again")
    if newest:
        out = args.out / f"eval-{steps}-{pictures}"
        words = ["eval.py", "--checkpoint", *newest.values(), "--steps", steps, "--out_dir", out,
                 "--images_per_prompt", pictures, "--num_prompts", args.scored]
        subprocess.run([sys.executable, *map(str, words)], cwd=HERE, check=True,
                       stdout=subprocess.DEVNULL)
        rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
        apart = {row["label"]: between_flawless(out / row["label"]) for row in rows}
        has_two = np.isfinite(apart[rows[0]["label"]])
        labels = {rows[0]["label"]: "base",
                  **{label_of(path): name for name, path in newest.items()}}
        for row in rows:                        # prompts with two flawless pictures of the base
            name = labels[row["label"]]
            row["between_flawless"] = np.nanmean(apart[row["label"]][has_two])
            found[name] = {what: round(value, 6) for what, value in row.items()
                           if isinstance(value, float)}
            made = kept.get(name, dict(command="", made_by=here))
            keep_run(args, name, {"command": made["command"], "made_by": made["made_by"],
                                  key: found[name]})
    return {"base": found["base"], **{folder: found[folder.name] for folder in logs}}

def between_flawless(folder):
    """The distance of two pictures of each prompt that are both flawless, (prompts,), nan if there
    are no two. Flaws change a whole picture, so `diversity` alone also counts their loss."""
    apart = []
    for file in sorted(folder.glob("pictures/*.json")):
        flawless = json.loads(file.read_text(encoding="utf-8"))["flawless"]
        kept = [np.array(Image.open(file.with_name(f"{file.stem}-{k}.png")))
                for k, probability in enumerate(flawless) if probability > 0.5]
        apart.append(math.nan)
        if len(kept) > 1:
            apart[-1] = diversity(torch.tensor(np.stack(kept))[None] / 255).item()
    return np.array(apart)

def over_seeds(values):
    """The mean and its standard error, which is nan for one seed."""
    values = np.asarray(values, float)
    n = len(values)
    return values.mean(), values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan

def shown(values, digits=4, sign=""):
    mean, error = over_seeds(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")

def curve(lines, name="preference"):
    """Held-out gains of a run -> (iterations, gains) at every tenth of the run. (An interrupted run
    has more evaluations.)"""
    times, gains = points(lines, name)
    grid = np.linspace(0, times[-1], 11)
    return grid, np.interp(grid, times, gains)

def points(lines, name="preference"):
    """The iterations of a run's evaluations, and the held-out gains."""
    return np.array([(line["iter"], line[f"eval_{name}_gain"]) for line in lines
                     if "eval_preference" in line]).T

def paper_gains(name, row):
    """The paper's two columns of a row, as gains over its base -> text"""
    values = PAPER[name].get(row, ())
    return [f"{value - base:+.3f}" for value, base in zip(values, PAPER_BASE)] or ["", ""]

def ahead(ours, theirs):
    """How far the mean of independent runs is above that of others -> text"""
    (a, a_error), (b, b_error) = over_seeds(ours), over_seeds(theirs)
    return f"{a - b:+.4f} ± {math.hypot(a_error, b_error):.4f}"

def compare(args, name, labels, best):
    """A table that compares methods at equal seconds. `best`: our row, from which the searched
    methods' differences are. table1 also draws Figure 5."""
    jobs = {label: jobs_of(args, label) for label in labels}
    logs = run_all(args, *jobs.values())
    ends, rows = finals(args, logs), []
    base, count, scores = ends["base"], lasting(args, RIVAL), ("preference", "judge")
    gains = {label: {key: [ends[folder][f"{key}_gain"] for folder in runs] for key in scores}
             for label, runs in jobs.items()}
    for label, runs in jobs.items():
        c, on_the_way = cost_of(args, label), [curve(logs[folder]) for folder in runs]
        last = on_the_way[0][0][-1]
        has_over = label != best and (SEARCHED in label or "sigma" in label)
        rows.append([
            label, f"{c['nfe_old']:.4g} / {c['nfe_theta']:.4g}", f"{c['seconds']:.2f}",
            f"{last:.0f}", " ".join(settings_of(args, label)),
            *(shown([one[1][k] for one in on_the_way], 3, "+") for k in (2, 6)),
            shown([np.interp(count, *one) for one in on_the_way], 3, "+") * bool(last >= count),
            *(shown(gains[label][key], sign="+") for key in scores),
            *(ahead(gains[best][key], gains[label][key]) * has_over for key in scores),
            *(shown([ends[folder][key] for folder in runs], 3)
              for key in ("diversity", "between_flawless")), *paper_gains(name, label)])
    draw_pictures(args, name, jobs)
    if name == "table1":
        draw_figure5(args, {label: [logs[folder] for folder in runs]
                            for label, runs in jobs.items()})
    seconds = args.iterations * cost_of(args, OURS)["seconds"]
    caption = (f"All methods have {seconds:.0f} s. The base has reward {base['preference']:.4f}, "
               f"judge {base['judge']:.4f}, diversity {base['diversity']:.3f}, of flawless "
               f"pictures {base['between_flawless']:.3f}.")
    head = ["Method", "NFE_old / theta", "s / iter.", "iterations", "settings",
            "reward gain after 0.2", "0.6", f"after {count} iterations", "reward gain",
            "judge gain", "ours over it", "judge, over it", "diversity", "of flawless pictures",
            "paper: HPSv2.1", "paper: CLIP"]
    data = {label: [ends[folder] for folder in runs] for label, runs in jobs.items()}
    return head, rows, data, caption

def draw_pictures(args, name, jobs):
    """A picture of twelve held-out prompts by the base, and by the first run of each label that
    has a checkpoint."""
    newest = {label: path[-1] for label, runs in jobs.items()
              if (path := checkpoints(next(iter(runs))))}
    if not newest:
        return
    held_out, strips = read_prompts(HELD_OUT), {}
    places = evenly_spaced(len(held_out), 12)                       # as in before_after.png
    chosen = [held_out[i] for i in places]
    for label, path in {"base": HERE / "tiny/flux", **newest}.items():
        model = Flux(path, 64, frozen=True)
        strips[label] = as_bytes(sample(model, chosen, places, schedule(16), "dpmpp_2m"))
    picture_grid(args.results / f"{name}.png", strips, chosen)

def draw_figure5(args, logs):
    """The runs' own evaluations, {label: [lines of each run]}, over iterations and seconds."""
    figure, panels = draw(2, 3, sharey="col")
    for label, runs in logs.items():
        mine, seconds = "Neighbor" in label, cost_of(args, label)["seconds"]
        for panel, unit, name in zip(panels[0 if SEARCHED in label else 1], (1, seconds, seconds),
                                     ("preference", "preference", "judge")):
            grid, gains = np.mean([curve(lines, name) for lines in runs], 0)
            panel.plot(unit * grid, gains, "-" if mine else "--", label=label,
                       linewidth=2.5 if mine else 1.2)
    axes = (("iterations", "reward gain"), ("seconds", "reward gain"), ("seconds", "judge gain"))
    for row, kind in zip(panels, ("searched", "as published")):
        for panel, (x, y) in zip(row, axes):
            panel.set(xlabel=x, ylabel=f"held-out {y}", title=kind)
        row[0].legend(fontsize=7)
    figure.savefig(args.results / "figure5.png", dpi=120)

def changed(args, name, row):
    """The runs of Neighbor GRPO with 8 steps and a row's other settings; equal iterations."""
    return jobs_of(args, OURS, [*AROUND, *CHANGES[name][row].split()])

def one_at_a_time(args, name):
    """A table of one setting, or of one reward, with the others fixed and equal iterations."""
    jobs = {row: changed(args, name, row) for row in CHANGES[name]}
    ends = finals(args, run_all(args, *jobs.values()))
    keys = {"preference_gain": "+", "judge_gain": "+", "named_gain": "+", "flawless": "",
            "diversity": "", "between_flawless": ""}
    first = f"{START[SWEEPS[name][0]]:g}" if name in SWEEPS else next(iter(jobs))
    rows = [["base", *(f"{ends['base'][key]:.3f}" for key in keys), "", "", "", ""]]
    for row, each in jobs.items():
        over = [shown([ends[a][key] - ends[b][key] for a, b in zip(each, jobs[first])], sign="+")
                if row != first else "" for key in ("preference_gain", "judge_gain")]
        published = paper_gains(name, float(row)) if name in SWEEPS else ["", ""]
        rows.append([row, *(shown([ends[folder][key] for folder in each], 4, sign)
                            for key, sign in keys.items()), *over, *published])
    draw_pictures(args, name, jobs)
    head = [SWEEPS[name][0] if name in SWEEPS else "", "reward gain", "judge gain",
            "gain of `named`", "flawless", "diversity", "of flawless pictures",
            f"reward over \"{first}\"", "judge over it", "paper: HPSv2.1", "paper: CLIP"]
    data = {row: [ends[folder] for folder in each] for row, each in jobs.items()}
    return head, rows, data, ""

def again(args):
    """Make one row of each table that `one_at_a_time` wrote again, and compare. Two means agree
    within the root of both squared standard errors."""
    jobs, rows = {name: changed(args, name, row) for name, row in AGAIN.items()}, []
    ends = finals(args, run_all(args, *jobs.values()))
    for name, row in AGAIN.items():
        table = json.loads((args.results / f"{name}.json").read_text(encoding="utf-8"))
        cells = dict(zip(table["head"], next(each for each in table["rows"] if each[0] == row)))
        for column, key in (("reward gain", "preference_gain"), ("judge gain", "judge_gain")):
            before, _, error = cells[column].partition(" ± ")
            found = [ends[folder][key] for folder in jobs[name]]
            now, its_error = over_seeds(found)
            far = abs(now - float(before)) / math.hypot(float(error or "nan"), its_error)
            rows.append([name, row, column, cells[column], shown(found, sign="+"), f"{far:.1f}",
                         "yes" if far <= 1 else "no"])
    return ["table", "row", "what", "in the table", "again", "standard errors apart",
            "within one"], rows, {}, ""

# ------------------------------------------------------------------------------------------------
# Fewer steps

def steps(args):
    """Equal iterations and equal seconds are two places of the same run, because nothing in a run
    depends on its length."""
    jobs, counts = {}, (4, 8, 16, 50)
    for T in STEPS:
        label = f"Neighbor GRPO, {T} steps"
        jobs[T] = dict(job(args, label, METHODS[label].split(), lasting(args, label), seed,
                           every=math.ceil(args.iterations / 4)) for seed in range(args.seeds))
    logs = run_all(args, *jobs.values())
    ends = {count: finals(args, logs, count, 2) for count in counts}
    correlation, rows, data = order(jobs, count=16), [], {}
    figure, panels = draw(1, 2)
    for T, runs in jobs.items():
        c, its = cost_of(args, f"Neighbor GRPO, {T} steps"), {}
        for name, panel in zip(("preference", "judge"), panels):
            each = [points(logs[folder], name) for folder in runs]
            last = each[0][0][-1]
            its[name] = [[np.interp(count, *one) for one in each]
                         for count in (args.iterations // 4, args.iterations, last)]
            panel.plot(each[0][0] * c["seconds"], np.mean([one[1] for one in each], 0),
                       label=f"{T} steps")
        data[T] = dict(its=its, ends={count: [ends[count][folder] for folder in runs]
                                      for count in counts})
        over = [shown(np.subtract(its[name][k], data[STEPS[0]]["its"][name][k]), sign="+")
                if T != STEPS[0] else "" for name in its for k in (1, 2)]
        rows.append([T, min(4, T - 1), f"{c['seconds']:.2f}", f"{last:.0f}",
                     *(shown(each, 3, "+") for each in its["preference"] + its["judge"][1:]), *over,
                     *(shown([ends[count][folder]["preference_gain"] for folder in runs], 3, "+")
                       for count in counts), f"{correlation[T]:.2f}"])
    for name, panel in zip(("reward", "judge"), panels):
        panel.set(xlabel="seconds", ylabel=f"held-out {name} gain")
    panels[0].legend()
    figure.savefig(args.results / "steps.png", dpi=120)
    base = ", ".join(f"{ends[count]['base']['preference']:.3f}" for count in counts)
    caption = f"The base's reward, drawn with {counts} steps: {base}."
    N = args.iterations
    head = ["T", "K", "s / iter.", "iterations", f"reward gain, {N // 4}", f"{N}", "end",
            f"judge gain, {N}", "end", f"reward over 8 steps, {N}", "over, end",
            f"judge over, {N}", "over, end", *(f"gain, drawn with {n} steps" for n in counts),
            "order"]
    return head, rows, data, caption

def order(steps, count):
    """{T: Spearman's correlation of a group's rewards with those of 32 steps}, the mean of `count`
    groups of the base."""
    known = read_prompts(TRAINED_ON)
    prompts = [known[i] for i in evenly_spaced(len(known), count)]
    rank = lambda T: group_of(HERE / "tiny/flux", prompts, 0, T=T)[1].argsort(1).argsort(1).double()
    true, found = rank(32), {}
    for T in steps:
        pairs = torch.stack([rank(T), true], 1)                     # (P, 2, G)
        found[T] = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean().item()
    return found

# ------------------------------------------------------------------------------------------------
# The figures

def spread(args):
    """The standard deviation inside a group of the base, from the first iteration of runs."""
    scorers = ("preference", "flawless")
    jobs = {(label, scorer): dict(job(args, f"spread-{label}", [
        *flags.split(), "--rewards", scorer, "--eval_scorers="], 1, seed, every=0)
        for seed in range(args.seeds))
        for label, flags in SPREAD.items() for scorer in scorers}
    logs, rows, data = run_all(args, *jobs.values()), [], {}
    for label, _ in list(jobs)[::2]:
        data[label] = {scorer: [next(line["reward_std"] for line in logs[folder]
                                     if "reward_std" in line) for folder in jobs[label, scorer]]
                       for scorer in scorers}
        rows.append([label, *(shown(data[label][scorer], 3) for scorer in scorers)])
    return ["rollout", "spread of the reward", "of `flawless`"], rows, data, ""

@torch.no_grad()
def group_of(path, prompts, seed, sigma=0.3, G=12, T=8):
    """Rollout groups as in training -> images (P, G, 3, H, W), rewards (P, G)."""
    model, rng = Flux(path, 64, frozen=True), torch.Generator().manual_seed(seed)
    scorers = rewards.load_all(rewards.parse("preference"), "cpu", prompts[:1])
    cond, x1 = model.encode(prompts), []
    for _ in prompts:
        eps_star = torch.randn(model.latent_shape, generator=rng).flatten()
        delta = torch.randn(G, *model.latent_shape, generator=rng).flatten(1)
        x1.append(perturb_noise(eps_star, delta, sigma).view(G, *model.latent_shape))   # Eq. 7
    velocity = lambda x, t: model.velocity(x, t, cond)
    traj, _ = rollout(velocity, torch.cat(x1), schedule(T), "dpmpp_2m")
    images = model.decode(traj[-1])                                     # (P G, 3, H, W)
    return images.unflatten(0, (-1, G)), train.score(scorers, images, prompts)["preference"]

def before_and_after(args, prompts, seed=0):
    """`group_of` the base and of our first run, from the same noises."""
    folder, what = next(iter(jobs_of(args, OURS).items()))
    run_all(args, {folder: what})
    if not checkpoints(folder):
        raise SystemExit(f"{folder} has no checkpoint any more; delete its lines in runs.jsonl to "
                         "make it again")
    paths = {"base": HERE / "tiny/flux", "aligned": checkpoints(folder)[-1]}
    return {label: group_of(path, prompts, seed) for label, path in paths.items()}

def figure4(args):
    """A'_i of real groups. The effect of p on a group is the length |A'|_2. At p = 2 it is 1 for
    every group. At a smaller p, even groups become shorter."""
    prompts = read_prompts(TRAINED_ON)
    some = evenly_spaced(len(prompts), 64)
    groups = before_and_after(args, [prompts[i] for i in some])
    figure, panels = draw(1, 2, sharey=True)
    rows, data = [], {}
    for panel, (label, (_, r)) in zip(panels, groups.items()):
        A = r - r.mean(1, keepdim=True)                                 # (P, G)
        # 1 if all |A_i| are equal, small if one of them stands out
        evenness = (A.abs().sum(1) / A.norm(dim=1) / math.sqrt(A.shape[1])).numpy()     # (P,)
        order, quarter = np.argsort(evenness), len(evenness) // 4
        for p in (2.0, 1.0, 0.8, 0.5):
            length = group_advantages(r, p).norm(dim=1).numpy()
            weight = length / length.mean()                             # (P,)
            peaked, even = weight[order[:quarter]].mean(), weight[order[-quarter:]].mean()
            panel.scatter(evenness, weight, s=12, label=f"p = {p:g}")
            rows.append([label, f"{p:g}", f"{peaked:.3f}", f"{even:.3f}", f"{peaked / even:.2f}"])
            data[f"{label}, p {p:g}"] = dict(evenness=evenness.tolist(), weight=weight.tolist())
        panel.set(title=label, xlabel="evenness of the group, |A|_1 / (sqrt(G) |A|_2)",
                  ylabel="length of A' over the mean of all groups")
        panel.legend()
    figure.savefig(args.results / "figure4.png", dpi=120)
    return ["model", "p", "weight of the most peaked quarter of the groups",
            "weight of the most even quarter", "ratio"], rows, data, ""

def figure8(args):
    known = read_prompts(TRAINED_ON)
    prompts = [known[i] for i in evenly_spaced(len(known), 3)]
    groups, rows, strips = before_and_after(args, prompts, seed=8), [], {}
    for i, prompt in enumerate(prompts):
        for label, (images, r) in groups.items():
            strips[f"{prompt[:40]}: {label}"] = as_bytes(images[i])
            rows.append([prompt, label, f"{r[i].mean():.4f}", f"{r[i].std():.4f}",
                         f"{diversity(images)[i].item():.4f}"])
    picture_grid(args.results / "figure8.png", strips, [f"candidate {i + 1}" for i in range(12)])
    return ["prompt", "model", "mean reward", "its standard deviation in the group",
            "distance of two pictures"], sorted(rows, key=lambda row: row[0]), {}, ""

def comparisons(args):
    """Count the cells of columns that give a difference: "over" is in the column's name."""
    rows = []
    for name in RESULT_OF:
        path = args.results / f"{name}.json"
        if path.exists():
            table = json.loads(path.read_text(encoding="utf-8"))
            is_over = [bool(re.search(r"\bover\b", title)) for title in table["head"]]
            columns = [k for k, title in enumerate(table["head"])       # older tables: "judge"
                       if is_over[k] or title == "judge" and is_over[k - 1]]
            cells = sum(bool(row[k]) for row in table["rows"] for k in columns)
            rows.append([name, cells]) if cells else None
    rows.append(["all", sum(cells for _, cells in rows)])
    return ["table", "differences"], rows, {}, ""

def draw(rows, columns, **more):
    """A figure, and its panels, (rows, columns) or one row of them."""
    import_matplotlib()
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, **more)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    return figure, panels

# ------------------------------------------------------------------------------------------------
# The command line

RESULT_OF = {"table3": table3, "steps": steps, "tune": tune,
             "table1": lambda args: compare(args, "table1", TABLE1, OURS_BEST),
             "table2": lambda args: compare(args, "table2", TABLE2, OURS_2),
             **{name: functools.partial(one_at_a_time, name=name) for name in CHANGES},
             "spread": spread, "figure4": figure4, "figure8": figure8,
             "again": again, "comparisons": comparisons}

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m paper.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RESULT_OF, "all"])
    parser.add_argument("--seeds", type=int, help="runs of each row (default 5; quick: 1)")
    parser.add_argument("--iterations", type=int, help="iterations of Neighbor GRPO with 8 "
                        "steps; all runs take their seconds (default 40; quick: 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--kept", action="store_true", help="make no run: only those in "
                        "results/runs.jsonl, even if other code or another CPU made them")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs")
    parser.add_argument("--out_dir", default="out/reproduce", help="for the runs (out/reproduce)")
    args = parser.parse_args(argv)
    seeds, iterations, args.repeats = (1, 2, 1) if args.quick else (5, 40, 5)
    args.seeds = seeds if args.seeds is None else args.seeds
    args.iterations = iterations if args.iterations is None else args.iterations
    if min(args.seeds, args.iterations, args.jobs) < 1:
        parser.error("seeds, iterations and jobs must be at least 1")
    quick = ["quick"] * args.quick
    args.out, args.results = Path(args.out_dir, *quick).resolve(), RESULTS.joinpath(*quick)
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    # The search: the fewest iterations of a trial, and the budgets of its two parts, in runs
    args.least, args.search, args.more, args.scored = 8, (15, 5), [], 0
    if args.quick:
        args.least, args.search, args.scored = 1, (0, 0), 4             # prompts; 0: all
        (args.out / "four.txt").write_text("\n".join(read_prompts(HELD_OUT)[:4]), encoding="utf-8")
        args.more = ["--prompts_per_iteration", "4", "--resolution", "32", "--eval_prompts",
                     str(args.out / "four.txt")]
    signal.signal(signal.SIGTERM, stop)
    names = [name for name in RESULT_OF if name not in ("table3", "steps", "tune", "again")]
    names = ["table3", "steps", "tune", "table3", *names] if args.what == "all" else [args.what]
    for name in names:
        began = time.time()
        head, rows, found, caption = RESULT_OF[name](args)
        command = (f"python -m paper.reproduce {name} --seeds {args.seeds} --iterations "
                   f"{args.iterations} --jobs {args.jobs}" + " --quick" * args.quick)
        text = (f"`{command}` (the small world; {torch.get_num_threads()} CPU threads, "
                f"{threads(args)} per run, {made_by()['cpu']}). {caption}".rstrip()
                + f"\n\n{bench.markdown(head, rows)}\n")
        (args.results / f"{name}.md").write_text(text, encoding="utf-8")
        data = json.dumps(dict(command=command, head=head, rows=rows, data=found), indent=1)
        (args.results / f"{name}.json").write_text(data, encoding="utf-8")
        print(f"\n{text}\nwrote {args.results}/{name}.md and .json in "
              f"{time.time() - began:.0f} s\n", flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("reproduce.py: stopped; the same command continues the runs, but a timing would "
                 "begin again")
