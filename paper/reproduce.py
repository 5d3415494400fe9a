"""
The paper's tables and figures on the small world: Neighbor GRPO, the methods that the paper
compares it with, and three more.

    python -m paper.reproduce table1            # into paper/results/table1.md, .json and .png
    python -m paper.reproduce all --jobs 2      # everything, two runs at a time
    python -m paper.reproduce all --quick       # minutes for each, into paper/results/quick/

    table1, table2     the methods: reward, judge, diversity
    table3             the cost of an iteration: network evaluations, which are counted, and
                       seconds, which are measured in turns within one process
    table4, 5, 6       sigma, B and p around (0.5, 4, 2), the paper's starting point (Sec. 4.2)
    settings           tau, updates in an iteration, the literal old anchor, learning rate, clip
    rewards            trained on the preference, on the judge, or on both
    figure4            which groups get more weight from the quasi-norm, and which less
    figure5            reward against iterations and against seconds
    figure8            a rollout group before and after alignment
    tune               learning rate and clip of each method, from eight pairs (DiffusionNFT and
                       FDFO: four learning rates, because they have no clip)

Methods are compared at equal seconds: those of --iterations of Neighbor GRPO with 8 steps. The
times of table3 turn them into iterations, so other work on the machine does not matter during a
run. Tables 4 to 6 have equal iterations, as in the paper. Learning rate and clip are those with the
best reward in the sweep (tune), on prompts and seeds that no table uses. Variants of a method share
them. Evaluations use DPM-Solver++ with 16 steps. The reward is `preference`. Only `rewards` trains
on the judge.

Each run is a call of train.py or paper.baselines. The call is printed, with the run's folder in
--out_dir. While the call is the same, a complete run is not made again, and an interrupted run
continues. So after a change of the code, name another --out_dir. --quick has a few iterations, 24
prompts and one timing. Its numbers are meaningless.
"""
import argparse, json, math, signal, subprocess, sys, time
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot as plt
import numpy as np
import torch
from PIL import Image
import rewards, train
from eval import as_bytes, diversity, label_of, picture_grid, sample
from inputs import evenly_spaced, read_prompts
from model import Flux
from neighbor_grpo import group_advantages, perturb_noise
from paper import bench
from paper.jobs import cached, commands, run_all, stop, threads
from run import HERE, checkpoints
from solvers import rollout, schedule

RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, TRAINED_ON = HERE / "tiny/prompts/test_concept.txt", HERE / "tiny/prompts/train.txt"
OURS, RIVAL = "Neighbor GRPO, 8 steps", "DanceGRPO"
OURS_2, OURS_08 = "Neighbor GRPO, sigma 0.5, p = 2", "Neighbor GRPO, sigma 0.5, p = 0.8"
METHODS = {             # label: (script, settings, method whose learning rate and clip it takes)
    **{label: (script, flags, flags.split()[1] if script == bench.BASELINES else "neighbor")
       for label, script, flags in bench.METHODS.values()},
    OURS_2: (bench.TRAIN, "--sigma 0.5 --p 2", "neighbor"),     # for Table 2; also rows of
    OURS_08: (bench.TRAIN, "--sigma 0.5", "neighbor"),          # Table 6
}
ERRORS = "± is the standard error over seeds."
PAIRED = "\"Over\" is the difference of runs of the same seed."
LEARNING_RATES = (2e-5, 5e-5, 1e-4, 2e-4)
# The published clip, and one for fewer dimensions: a log ratio that is a mean over D dimensions
# scales as 1 / sqrt(D), and sqrt(129,600 / 1,024) = 11.
CLIPS = (1e-4, 1e-3)
NO_CLIP = {"nft": 1e-4, "fdfo": 0.03}   # --clip_eps: no effect; the published penalty's eps
TABLE1 = [label for label in METHODS if "sigma" not in label]
TABLE2 = ["DanceGRPO", "MixGRPO", "BranchGRPO", OURS_2, OURS_08]
START = dict(sigma=0.5, num_anchors=4, p=2.0)                   # Sec. 4.2
SWEEPS = {"table4": ("sigma", (1.0, 0.5, 0.3, 0.1)),
          "table5": ("num_anchors", (2, 4, 8, 12)),
          "table6": ("p", (2.0, 1.0, 0.8, 0.5))}
IN_TABLE2 = {2.0: OURS_2, 0.8: OURS_08}         # {p: the method of Table 2 with the same runs}
VARIANTS = {            # Neighbor GRPO with 8 steps as it is, and with other settings
    "settings": {"as it is": "", "tau 1": "--tau 1", "1 update": "--updates_per_iteration 1",
                 "4 updates": "--updates_per_iteration 4",
                 "literal old anchor": "--old_anchor rollout", "lr 2e-5": "--lr 2e-5",
                 "lr 1e-4": "--lr 1e-4", "clip 1e-4": "--clip_eps 1e-4"},
    "rewards": {"preference": "", "judge": "--rewards judge --eval_scorers preference",
                "both": "--rewards preference,judge --eval_scorers flawless"}}
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

def job(args, label, seed, lr, clip, iterations, more=(), evaluations=5, extra=()):
    """One run of a method -> (folder, (script, flags)). `more` and `extra` are further flags; only
    `more` is part of the folder's name."""
    script, flags, _ = METHODS[label]
    every = math.ceil(iterations / (1 if args.quick else evaluations))
    window = []
    moves = {"MixGRPO": 12, "BranchGRPO, pruned": 10}.get(label)
    if moves:                                   # published: every 25 and every 30 of 300 iterations
        window = ["--window_every", str(max(1, round(iterations / moves)))]
    name = label.replace("*", "").replace(", ", "-").replace(" = ", "").replace(" ", "_")
    folder = "-".join([name, *(word.removeprefix("--") for word in more), f"lr{lr:g}",
                       f"clip{clip:g}", str(iterations), f"seed{seed}"])
    return args.out / folder, (script, [
        *flags.split(), *window, *extra, "--lr", f"{lr:g}", "--clip_eps", f"{clip:g}",
        "--iterations", str(iterations), "--seed", str(seed), "--eval_steps", "16",
        "--eval_every", str(every), "--save_every", "10", "--keep", "1", *more])

def jobs_of(args, label, more=(), evaluations=5):
    """A method's runs, {folder: (script, flags)}: one for each seed, with the method's tuned
    learning rate and clip. They last as long as args.iterations of ours. `more`: further flags."""
    rate, clip = tuned(args)[METHODS[label][2]]
    iterations = lasting(args, label)
    return dict(job(args, label, seed, rate, clip, iterations, more, evaluations)
                for seed in range(args.seeds))

def lasting(args, label, share=1.0):
    """The number of iterations of a method that take the seconds of args.iterations of ours."""
    ours, theirs = cost_of(args, OURS)["seconds"], cost_of(args, label)["seconds"]
    return max(1, round(args.iterations * share * ours / theirs))

def cost_of(args, label):
    """The row of Table 3. Variants of ours do the same work, so they share a timing."""
    return costs(args)[OURS if "sigma" in label else label]

# ------------------------------------------------------------------------------------------------
# The cost of an iteration, and the learning rate of each method

@cached(lambda args: [METHODS, threads(args), args.repeats])
def costs(args):
    """{label: its row of Table 3}. The methods' iterations take turns in one process with as many
    threads as a run has. Seconds are medians."""
    all_threads = torch.get_num_threads()
    torch.set_num_threads(threads(args))
    methods = {label: (label, script, flags) for label, (script, flags, _) in METHODS.items()
               if label in TABLE1}
    found = bench.measure(methods, args.repeats, bare=False, warm=1)
    torch.set_num_threads(all_threads)
    kept = ("nfe_old", "nfe_theta", "G", "B", "K", "solver")
    return {label: dict(seconds=each["iteration"], **{key: each[key] for key in kept})
            for label, each in found.items()}

def table3(args):
    found, paper, rows = costs(args), PAPER["table3"], []
    for label, c in found.items():
        published = ["", ""]
        if label in paper:
            published = [f"{paper[label]:.2f}", f"{paper[label] / paper[RIVAL]:.2f}"]
        rows.append([label, f"{c['nfe_old']:.2f}".removesuffix(".00"), c["G"], c["B"], c["K"],
                     f"{c['nfe_theta']:.2f}", f"{c['seconds']:.2f}",
                     f"{c['seconds'] / found[RIVAL]['seconds']:.2f}", *published])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.barh(list(found), [c["seconds"] for c in found.values()])
    axes.invert_yaxis()
    axes.set(xlabel="seconds an iteration")
    finish(figure, args.results / "table3.png")
    caption = (f"Medians of {args.repeats} iterations of each method, in turn, in one process. The "
               "paper counts 14 trained steps for MixGRPO, whose code and paper have 4; for "
               "BranchGRPO it has NFE_old 20, K 4 and NFE_theta 13.68. DiffusionNFT's NFE_old "
               "includes the old policy's velocity at the 9 trained points. FDFO trains all of its "
               "40 steps.")
    head = ["Method", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", f"of {RIVAL}'s",
            "paper: s / iter.", f"of {RIVAL}'s"]
    return head, rows, found, caption

def clips_of(family):
    return (NO_CLIP[family],) if family in NO_CLIP else CLIPS

@cached(lambda args: [METHODS, threads(args), args.repeats, LEARNING_RATES, CLIPS, args.iterations])
def tuned(args):
    """{method: (learning rate, clip)}: those with the best reward of the sweep's second part."""
    if args.quick:
        return {family: (5e-5, 1e-3 if family == "branch" else clips_of(family)[0])
                for _, _, family in METHODS.values()}
    whole = lambda cell: cell["preference"].get("whole", -math.inf)
    return {family: max(cells, key=whole)["setting"] for family, cells in sweep(args).items()}

def sweep(args):
    """Try every pair for a third of the seconds. The fastest start may not end best, so then try
    the two best learning rates, with both clips, for all the seconds and with another seed.
    -> {method: [dict(setting, preference, judge)]}, with their gains as
    {"third": gain, "whole": gain}. A run that diverged has a gain of -1."""
    labels = {}
    for label, (_, _, family) in METHODS.items():
        labels.setdefault(family, label)        # the first of the variants
    labels["neighbor"] = OURS
    found = {family: [dict(setting=(lr, clip), preference={}, judge={})
                      for clip in clips_of(family) for lr in LEARNING_RATES] for family in labels}

    def attempt(part, share, seed, tried):
        prompts = ("--eval_prompts", "tiny/prompts/test_pair.txt")
        jobs = [(cell, job(args, label, seed, *cell["setting"], lasting(args, label, share),
                           evaluations=1, extra=prompts))
                for family, label in labels.items() for cell in tried[family]]
        logs = run_all(args, dict(what for _, what in jobs), may_diverge=True)
        for cell, (folder, _) in jobs:
            for scorer in ("preference", "judge"):
                gains = curve(logs[folder], scorer)[1] if logs[folder] else [-1.0]
                cell[scorer][part] = gains[-1]

    attempt("third", 1 / 3, 1000, found)
    third = lambda cell: cell["preference"]["third"]
    best = {}
    for family, cells in found.items():
        by_rate = {lr: [cell for cell in cells if cell["setting"][0] == lr]
                   for lr in LEARNING_RATES}
        two = sorted(by_rate.values(), key=lambda same: max(map(third, same)), reverse=True)[:2]
        best[family] = sum(two, [])
    attempt("whole", 1, 1001, best)
    return found

def tune(args):
    if args.quick:
        raise SystemExit("tune: --quick always has learning rate 5e-5 and the published clips")
    found, best, rows = sweep(args), tuned(args), []
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")

    def as_text(cell, is_best):
        reward, judge, bold = cell["preference"], cell["judge"], "**" * is_best
        text = f"{reward['third']:+.4f}"
        if "whole" in reward:
            text += f", {bold}{reward['whole']:+.4f}{bold} ({judge['whole']:+.4f})"
        return text

    for i, (family, cells) in enumerate(found.items()):
        for clip, style in zip(clips_of(family), ("-", "--")):
            shown_clip = "none" if family in NO_CLIP else f"{clip:g}"
            row = [cell for cell in cells if cell["setting"][1] == clip]
            rows.append([family, shown_clip,
                         *(as_text(cell, cell["setting"] == tuple(best[family])) for cell in row)])
            axes.plot(LEARNING_RATES, [cell["preference"]["third"] for cell in row], style,
                      color=f"C{i}", marker="o", label=f"{family}, clip {shown_clip}")
    axes.set(xscale="log", xlabel="learning rate", ylim=(-0.03, None),
             ylabel="reward gain after a third of the seconds")
    axes.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=7)
    finish(figure, args.results / "tune.png")
    caption = ("Reward gain on the prompts of tiny/prompts/test_pair.txt after the seconds of "
               f"{lasting(args, OURS, 1 / 3)} iterations of {OURS}, seed 1000. For the two best "
               f"learning rates of each method also after those of {args.iterations} iterations, "
               "seed 1001, with the judge's gain in parentheses. Bold: the chosen pair. Only this "
               "second reward gain decides.")
    return ["method", "clip", *(f"lr {rate:g}" for rate in LEARNING_RATES)], rows, found, caption

# ------------------------------------------------------------------------------------------------
# The methods

def finals(args, jobs):
    """{folder: a row of eval.py's results} of finished runs, and the base's row as "base". eval.py
    samples the last checkpoints, four pictures for each held-out prompt."""
    newest = {folder: checkpoints(folder)[-1] for folder in jobs}
    some = ["--num_prompts", "24"] if args.quick else []
    subprocess.run([sys.executable, "eval.py", "--checkpoint", *map(str, newest.values()),
                    "--steps", "16", "--out_dir", str(args.out / "eval"), *some],
                   cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((args.out / "eval/results.json").read_text(encoding="utf-8"))["results"]
    rows = {row["label"]: row for row in results}
    apart = {label: between_flawless(args.out / "eval" / label) for label in rows}
    has_two = np.isfinite(apart[results[0]["label"]])
    for label, row in rows.items():             # prompts with two flawless pictures of the base
        row["between_flawless"] = np.nanmean(apart[label][has_two])
    of_runs = {folder: rows[label_of(path)] for folder, path in newest.items()}
    return {"base": results[0], **of_runs}

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
    points = [(line["iter"], line[f"eval_{name}_gain"]) for line in lines
              if "eval_preference" in line]
    times, gains = np.array(points).T
    grid = np.linspace(0, times[-1], 11)
    return grid, np.interp(grid, times, gains)

def paper_gains(name, row):
    """The paper's two columns of a row, as gains over its base -> text"""
    values = PAPER[name].get(row, ())
    return [f"{value - base:+.3f}" for value, base in zip(values, PAPER_BASE)] or ["", ""]

def compare(args, name, labels, caption):
    """A table that compares methods at equal seconds."""
    chosen, jobs = tuned(args), {label: jobs_of(args, label) for label in labels}
    logs = run_all(args, *jobs.values())
    ends = finals(args, logs)
    base, data = ends["base"], {}
    rows = [["base", "", "", "", "", "", f"{base['preference']:.4f}", "", f"{base['judge']:.4f}",
             "", f"{base['diversity']:.3f}", f"{base['between_flawless']:.3f}", "", ""]]
    for label in labels:
        each, c = [ends[folder] for folder in jobs[label]], cost_of(args, label)
        lr, clip = chosen[METHODS[label][2]]
        iterations = logs[next(iter(jobs[label]))][-1]["iter"]
        row = [label, c["solver"], f"{c['nfe_old']:.4g} / {c['nfe_theta']:.4g}",
               f"{c['seconds']:.2f}", iterations, f"{lr:g}, {clip:g}"]
        for scorer in ("preference", "judge"):
            row.append(shown([end[scorer] for end in each]))
            row.append(shown([end[f"{scorer}_gain"] for end in each], sign="+"))
        row += [shown([end[key] for end in each], 3) for key in ("diversity", "between_flawless")]
        rows.append(row + paper_gains(name, label))
        data[label] = dict(finals=each, commands=commands(jobs[label]))
    draw_pictures(args, name, jobs)
    seconds = args.iterations * cost_of(args, OURS)["seconds"]
    caption += (f" All methods have the same seconds, {seconds:.0f}, by the times of table3, "
                f"in whole iterations. {ERRORS} The paper's columns are gains too.")
    head = ["Method", "Solver", "NFE_old / theta", "s / iter.", "iterations", "lr, clip", "reward",
            "its gain", "judge", "its gain", "diversity", "of flawless pictures",
            "paper: HPSv2.1", "paper: CLIP"]
    return head, rows, data, caption

def draw_pictures(args, name, jobs):
    """A picture of twelve held-out prompts by the base, and by the first run of each label."""
    held_out, strips = read_prompts(HELD_OUT), {}
    places = evenly_spaced(len(held_out), 12)                       # as in before_after.png
    chosen = [held_out[i] for i in places]
    newest = {label: checkpoints(next(iter(runs)))[-1] for label, runs in jobs.items()}
    for label, path in {"base": HERE / "tiny/flux", **newest}.items():
        model = Flux(path, 64, frozen=True)
        strips[label] = as_bytes(sample(model, chosen, places, schedule(16), "dpmpp_2m"))
    picture_grid(args.results / f"{name}.png", strips, chosen)

def table1(args):
    return compare(args, "table1", TABLE1,
                   "One reward, `preference`; the paper's Table 1 has three, one of them HPSv2.1.")

def table2(args):
    return compare(args, "table2", TABLE2, "One reward, `preference`; in the paper HPSv2.1.")

def ablation(args, name):
    """A table of one setting around (sigma, B, p) = (0.5, 4, 2), with the others fixed and equal
    iterations, as in the paper."""
    flag, values = SWEEPS[name]
    (rate, clip), jobs = tuned(args)["neighbor"], {}
    for value in values:
        settings = {**START, flag: value}
        if {**settings, "p": 2.0} == START and settings["p"] in IN_TABLE2:
            jobs[value] = jobs_of(args, IN_TABLE2[settings["p"]])
            continue
        more = [word for key, each in settings.items() for word in (f"--{key}", f"{each:g}")]
        jobs[value] = jobs_of(args, OURS, more, evaluations=1)
    ends = finals(args, run_all(args, *jobs.values()))
    keys = {"preference_gain": "reward gain", "judge_gain": "judge gain", "diversity": "diversity"}
    scores = {value: {key: [ends[folder][key] for folder in each] for key in keys}
              for value, each in jobs.items()}
    rows = [[f"{value:g}", shown(s["preference_gain"], sign="+"), shown(s["judge_gain"], sign="+"),
             *over(ends, jobs[value], jobs[START[flag]]), shown(s["diversity"], 3),
             *paper_gains(name, value)] for value, s in scores.items()]
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for panel, (key, title) in zip(panels, keys.items()):
        means, errors = zip(*(over_seeds(s[key]) for s in scores.values()))
        panel.errorbar(range(len(values)), means, np.nan_to_num(errors), marker="o", capsize=3)
        panel.set(title=title, xlabel=flag, xticks=range(len(values)),
                  xticklabels=[f"{value:g}" for value in values])
    finish(figure, args.results / f"{name}.png")
    caption = (f"(sigma, B, p) = (0.5, 4, 2), except {flag}; {args.iterations} iterations each, lr "
               f"{rate:g}, clip {clip:g}. {ERRORS} {PAIRED} The paper's columns are gains too.")
    head = [flag, "reward gain", "judge gain", f"reward over {START[flag]:g}'s", "judge",
            "diversity", "paper: HPSv2.1", "paper: CLIP"]
    data = dict(scores={f"{value:g}": s for value, s in scores.items()}, lr=rate, clip=clip,
                commands=[line for each in jobs.values() for line in commands(each)])
    return head, rows, data, caption

def over(ends, runs, others):
    """How far runs are above others, each above that of the same seed, which has the same prompts
    and noise -> [reward, judge] as text"""
    return [shown([ends[a][key] - ends[b][key] for a, b in zip(runs, others)], sign="+")
            for key in ("preference_gain", "judge_gain")]

def variants(args, name):
    """What other settings, or other rewards, do to Neighbor GRPO with 8 steps; equal iterations."""
    rate, clip = tuned(args)["neighbor"]
    jobs = {label: jobs_of(args, OURS, flags.split()) for label, flags in VARIANTS[name].items()}
    ends = finals(args, run_all(args, *jobs.values()))
    keys = {"preference_gain": "+", "judge_gain": "+", "named_gain": "+", "flawless": "",
            "diversity": "", "between_flawless": ""}
    first = next(iter(jobs))
    rows = [["base", *(f"{ends['base'][key]:.3f}" for key in keys), "", ""]]
    rows += [[label, *(shown([ends[folder][key] for folder in each], 3, sign)
                       for key, sign in keys.items()), *over(ends, each, jobs[first])]
             for label, each in jobs.items()]
    draw_pictures(args, name, jobs)
    caption = (f"{OURS}, except as named; {args.iterations} iterations each, lr {rate:g}, clip "
               f"{clip:g}. {ERRORS} {PAIRED} The picture: the same held-out prompts and noises, "
               "seed 0.")
    head = ["", "reward gain", "judge gain", "gain of `named`", "flawless", "diversity",
            "of flawless pictures", f"reward over \"{first}\"", "judge"]
    data = dict(ends={label: [ends[folder] for folder in each] for label, each in jobs.items()},
                commands=[line for each in jobs.values() for line in commands(each)])
    return head, rows, data, caption

# ------------------------------------------------------------------------------------------------
# The figures

def figure5(args):
    jobs = {label: jobs_of(args, label) for label in TABLE1}
    logs = run_all(args, *jobs.values())
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    rows, data, count = [], {}, lasting(args, RIVAL)
    for i, label in enumerate(TABLE1):
        c, ours = cost_of(args, label), "Neighbor" in label
        style = dict(label=label, color=f"C{i % 10}", linewidth=2.5 if ours else 1.2,
                     linestyle="-" if ours else "--")
        gains = {name: np.array([curve(logs[folder], name)[1] for folder in jobs[label]])
                 for name in ("preference", "judge")}                   # (seeds, 11)
        iterations = curve(logs[next(iter(jobs[label]))])[0]            # (11,)
        for panel, unit, name in zip(panels, (1, c["seconds"], c["seconds"]),
                                     ("preference", "preference", "judge")):
            panel.plot(iterations * unit, gains[name].mean(0), **style)
        data[label] = dict(iterations=iterations.tolist(), seconds_an_iteration=c["seconds"])
        data[label] |= {f"{name}_gains": each.tolist() for name, each in gains.items()}
        early = ""
        if iterations[-1] >= count:
            early = shown([np.interp(count, iterations, each) for each in gains["preference"]],
                          3, "+")
        rows.append([label, f"{c['nfe_old']:.4g} / {c['nfe_theta']:.4g}", f"{c['seconds']:.2f}",
                     f"{iterations[-1]:.0f}",
                     *(shown(gains["preference"][:, k], 3, "+") for k in (2, 6, 10)),
                     shown(gains["judge"][:, 10], 3, "+"), early])
    axes = (("iterations", "reward gain"), ("seconds", "reward gain"), ("seconds", "judge gain"))
    for panel, (x, y) in zip(panels, axes):
        panel.set(xlabel=x, ylabel=f"held-out {y}")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    finish(figure, args.results / "figure5.png")
    seconds = args.iterations * cost_of(args, OURS)["seconds"]
    caption = (f"Held-out gains. Each method has {seconds:.0f} seconds, by the times of table3; "
               f"\"0.2\" is after that share of them. {ERRORS}")
    head = ["Method", "NFE_old / theta", "s / iter.", "iterations", "reward gain after 0.2", "0.6",
            "1", "judge gain", f"reward gain after {count} iterations"]
    return head, rows, data, caption

@torch.no_grad()
def group_of(path, prompts, seed, sigma=0.3, G=12):
    """Rollout groups as in training -> images (P, G, 3, H, W), rewards (P, G)."""
    model, rng = Flux(path, 64, frozen=True), torch.Generator().manual_seed(seed)
    scorers = rewards.load_all(rewards.parse("preference"), "cpu", prompts[:1])
    cond, x1 = model.encode(prompts), []
    for _ in prompts:
        eps_star = torch.randn(model.latent_shape, generator=rng).flatten()
        delta = torch.randn(G, *model.latent_shape, generator=rng).flatten(1)
        x1.append(perturb_noise(eps_star, delta, sigma).view(G, *model.latent_shape))   # Eq. 7
    velocity = lambda x, t: model.velocity(x, t, cond)
    traj, _ = rollout(velocity, torch.cat(x1), schedule(8), "dpmpp_2m")
    images = model.decode(traj[-1])                                     # (P G, 3, H, W)
    return images.unflatten(0, (-1, G)), train.score(scorers, images, prompts)["preference"]

def before_and_after(args, prompts, seed=0):
    """`group_of` the base and of our first run, from the same noises."""
    folder, what = next(iter(jobs_of(args, OURS).items()))
    run_all(args, {folder: what})
    paths = {"base": HERE / "tiny/flux", "aligned": checkpoints(folder)[-1]}
    return {label: group_of(path, prompts, seed) for label, path in paths.items()}

def figure4(args):
    """A'_i of real groups. The effect of p on a group is the length |A'|_2. At p = 2 it is 1 for
    every group. At a smaller p, even groups become shorter."""
    prompts = read_prompts(TRAINED_ON)
    some = evenly_spaced(len(prompts), 16 if args.quick else 64)
    groups = before_and_after(args, [prompts[i] for i in some])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
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
    finish(figure, args.results / "figure4.png")
    caption = f"{len(some)} rollout groups of training prompts; weight: |A'|_2 over its mean."
    return ["model", "p", "weight of the most peaked quarter of the groups",
            "weight of the most even quarter", "ratio"], rows, data, caption

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
    caption = f"Groups of 12, sigma 0.3, from the same noises; {OURS}, seed 0."
    return ["prompt", "model", "mean reward", "its standard deviation in the group",
            "distance of two pictures"], sorted(rows, key=lambda row: row[0]), {}, caption

def finish(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)

# ------------------------------------------------------------------------------------------------
# The command line

RESULT_OF = {"table3": table3, "tune": tune, "table1": table1, "table2": table2,
        **{name: lambda args, name=name: ablation(args, name) for name in SWEEPS},
        **{name: lambda args, name=name: variants(args, name) for name in VARIANTS},
        "figure4": figure4, "figure5": figure5, "figure8": figure8}

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m paper.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*RESULT_OF, "all"])
    parser.add_argument("--seeds", type=int, help="runs of each method (default 3; quick: 1)")
    parser.add_argument("--iterations", type=int, help="iterations of Neighbor GRPO with 8 "
                        "steps; all runs take their seconds (default 40; quick: 4)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--quick", action="store_true", help="only to see that it runs: minutes")
    parser.add_argument("--out_dir", default="out/reproduce", help="for the runs (out/reproduce)")
    args = parser.parse_args(argv)
    seeds, iterations, args.repeats = (1, 4, 1) if args.quick else (3, 40, 5)
    args.seeds = seeds if args.seeds is None else args.seeds
    args.iterations = iterations if args.iterations is None else args.iterations
    if min(args.seeds, args.iterations, args.jobs) < 1:
        parser.error("seeds, iterations and jobs must be at least 1")
    quick = ["quick"] * args.quick
    args.out, args.results = Path(args.out_dir, *quick).resolve(), RESULTS.joinpath(*quick)
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    names = [args.what]
    if args.what == "all":
        names = [name for name in RESULT_OF if name != "tune" or not args.quick]
    for name in names:
        began = time.time()
        head, rows, found, caption = RESULT_OF[name](args)
        command = (f"python -m paper.reproduce {name} --seeds {args.seeds} --iterations "
                   f"{args.iterations} --jobs {args.jobs}" + " --quick" * args.quick)
        if args.quick:
            caption += " Quick: 24 prompts and a few iterations, so the numbers are meaningless."
        text = (f"`{command}` (the small world; {torch.get_num_threads()} CPU threads, "
                f"{threads(args)} per run). {caption}\n\n{bench.markdown(head, rows)}\n")
        (args.results / f"{name}.md").write_text(text, encoding="utf-8")
        data = json.dumps(dict(command=command, head=head, rows=rows, data=found), indent=1)
        (args.results / f"{name}.json").write_text(data, encoding="utf-8")
        print(f"\n{text}\nwrote {args.results}/{name}.md, .json, .png in "
              f"{time.time() - began:.0f} s\n", flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("reproduce.py: stopped; the same command continues the runs, but a timing would "
                 "begin again")
