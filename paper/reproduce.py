"""
The paper's tables and figures on the small world: Neighbor GRPO beside the methods it is compared with.

    python -m paper.reproduce table1                        # runs what is missing, goes on with what was interrupted, writes results/table1.md, .json and .png
    python -m paper.reproduce all --jobs 2                  # everything, two runs at a time, which share the threads
    python -m paper.reproduce all --quick                   # each in minutes, into results/quick/: a few iterations, 24 prompts, one timing, whose numbers say nothing yet

    table1, table2     the methods: reward, judge, diversity; seconds to DanceGRPO's final reward
    table3             what an iteration costs: network evaluations counted, seconds measured in turns within one process
    table4, 5, 6       sigma, B and p around (0.5, 4, 2), the paper's starting point (Sec. 4.2)
    figure4            which groups the quasi-norm turns up and down
    figure5            reward against iterations and against seconds
    figure8            a rollout group before and after
    tune               learning rate and clip of each method, from the same eight pairs (DiffusionNFT has no clip)

Methods are compared at equal seconds: a run lasts as long as --iterations of Neighbor GRPO with 8 steps, by the times of table3, so that nothing else that the
machine does at the time counts; tables 4 to 6, as in the paper, at equal iterations. Learning rate and clip are those with the best reward in the sweep, on prompts
and seeds that no table uses; variants of a method take its. All evaluations are DPM-Solver++ with 16 steps, whatever the rollout's. The reward is clip, the judge is
never trained on. Each run is a call of train.py or baselines.py, which is printed, in the folder of --out_dir that it names. What was run or timed is kept for as long as
that call is the same: after a change of the code, name another --out_dir.
"""
import argparse, json, math, re, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot as plt
import numpy as np
import torch
import rewards, train
from eval import diversity, label_of, picture_grid, read_prompts, evenly_spaced, sample, write
from model import Flux
from neighbor_grpo import advantages, perturb_noise
from paper import bench
from run import HERE, checkpoints, read_log
from solvers import rollout, schedule

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {                                                     # label: (script, its flags, whose learning rate and clip)
    **{label: (script, flags, flags.split()[1] if script == "-m paper.baselines" else "neighbor") for label, script, flags in bench.METHODS.values()},
    "Neighbor GRPO, sigma 0.5, p = 2": ("train.py", "--sigma 0.5 --p 2", "neighbor"),         # Table 2, which is Table 6's rows: sigma 0.5
    "Neighbor GRPO, sigma 0.5, p = 0.8": ("train.py", "--sigma 0.5", "neighbor"),
}
OURS, RIVAL = "Neighbor GRPO, 8 steps", "DanceGRPO"
ERRORS = "± is the standard error over seeds."
LEARNING_RATES = (2e-5, 5e-5, 1e-4, 2e-4)
CLIPS = (1e-4, 1e-3)                                            # as published, and for fewer dimensions: a log ratio that is a mean over D of them goes with 1 / sqrt(D), and sqrt(129,600 / 1,024) = 11
TABLE1 = [label for label in METHODS if "sigma" not in label]
TABLE2 = ["DanceGRPO", "MixGRPO", "BranchGRPO", "Neighbor GRPO, sigma 0.5, p = 2", "Neighbor GRPO, sigma 0.5, p = 0.8"]
SWEEPS = {"table4": ("sigma", (1.0, 0.5, 0.3, 0.1)), "table5": ("num_anchors", (2, 4, 8, 12)), "table6": ("p", (2.0, 1.0, 0.8, 0.5))}
START = dict(sigma=0.5, num_anchors=4, p=2.0)                   # Sec. 4.2
IN_TABLE2 = {2.0: TABLE2[3], 0.8: TABLE2[4]}                    # by p: runs that the sweeps share with Table 2
PAPER_BASE = 0.310, 0.389
PAPER = {                                                       # FLUX.1-dev: HPSv2.1 (the reward, or in Table 1 one of three), CLIP (never trained on); s / iter.
    "table1": {"DanceGRPO": (0.371, 0.364), "MixGRPO": (0.366, 0.382), "MixGRPO-Flash*": (0.343, 0.374),
               "Neighbor GRPO, 25 steps": (0.359, 0.385), "Neighbor GRPO, 16 steps": (0.369, 0.386), "Neighbor GRPO, 8 steps": (0.366, 0.391)},
    "table2": {"DanceGRPO": (0.356, 0.366), "MixGRPO": (0.371, 0.367), "BranchGRPO": (0.379, 0.362), "Neighbor GRPO, sigma 0.5, p = 2": (0.379, 0.368), "Neighbor GRPO, sigma 0.5, p = 0.8": (0.372, 0.371)},
    "table3": {"DanceGRPO": 237.86, "MixGRPO": 237.71, "MixGRPO-Flash*": 129.36, "BranchGRPO": 249.33, "Neighbor GRPO, 25 steps": 141.93, "Neighbor GRPO, 16 steps": 105.85, "Neighbor GRPO, 8 steps": 45.08},
    "table4": {1.0: (0.364, 0.359), 0.5: (0.379, 0.368), 0.3: (0.375, 0.363), 0.1: (0.357, 0.364)},
    "table5": {2: (0.370, 0.363), 4: (0.379, 0.368), 8: (0.374, 0.373), 12: (0.377, 0.370)},
    "table6": {2.0: (0.379, 0.368), 1.0: (0.377, 0.356), 0.8: (0.372, 0.371), 0.5: (0.372, 0.354)},
}

# ---------------------------------------------------------------------------------------------------------------
# runs

RUNNING = []

def stop(*_):
    """What train.py and baselines.py understand as Ctrl-C: they end after the iteration in hand, with a checkpoint."""
    for child in RUNNING:
        child.terminate()
    raise KeyboardInterrupt

def run(args, *groups, may_diverge=False):
    """Bring every run of each group, {folder: (script, flags)}, to its end. -> {folder: the lines of its log}, no lines where it diverged."""
    jobs = {folder: what for group in groups for folder, what in group.items()}
    def one(folder):
        script, flags = jobs[folder]
        note = folder.parent / f"{folder.name}.json"                      # how the run ended that is in the folder
        command = command_line(script, flags, folder)
        known = json.loads(note.read_text()) if note.exists() else dict(command=command, ended="")
        if known["command"] != command or not known["ended"] or known["ended"] == "whole" and not checkpoints(folder):
            goes_on = known["command"] == command and checkpoints(folder)
            if not goes_on:
                for old in args.out.glob(f"eval/{folder.name}-checkpoint-*"):       # pictures of other weights
                    shutil.rmtree(old)
            print(command, flush=True)
            keep(note, dict(command=command, ended=""))
            child = subprocess.Popen([sys.executable, *script.split(), *flags, "--out_dir", str(folder), "--resume" if goes_on else "--overwrite", "--threads", str(threads(args))],
                                     cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            RUNNING.append(child)
            said = child.communicate()[1]               # after Ctrl-C it still writes its checkpoint
            RUNNING.remove(child)
            last = int(flags[flags.index("--iterations") + 1])
            whole = any(line["iter"] == last and "eval_clip" in line for line in read_log(folder))
            known = dict(command=command, ended="whole" if whole and not child.returncode else "diverged" if re.search("no longer finite|no finite gradient|not finite", said) else "")
            keep(note, known)
            if not known["ended"]:
                raise RuntimeError(f"{folder} ended with {child.returncode} before it was done; the same command goes on with it:\n{said[-2000:]}")
        if known["ended"] == "diverged" and not may_diverge:
            raise RuntimeError(f"{folder} diverged, so there is no table; {command}")
        return read_log(folder) if known["ended"] == "whole" else []
    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(jobs, pool.map(one, jobs)))

def command_line(script, flags, folder):
    return " ".join(["python", script, *flags, "--out_dir", folder.name])

def keep(path, what):
    write(path, lambda aside: aside.write_text(json.dumps(what, indent=1)))

def threads(args):
    return max(1, torch.get_num_threads() // args.jobs)

def job(args, label, seed, lr, clip, iterations, more=(), evaluations=10, extra=()):
    """One run of a method -> (folder, (script, flags))."""
    script, flags, _ = METHODS[label]                           # `more` is part of the folder's name, `extra` not
    every = math.ceil(iterations / (1 if args.quick else evaluations))
    moves = {"MixGRPO": 12, "BranchGRPO, pruned": 10}.get(label)         # every 25 and every 30 of 300 iterations, as published
    window = ["--window_every", str(max(1, round(iterations / moves)))] if moves else []
    name = "-".join([label.replace("*", "").replace(", ", "-").replace(" = ", "").replace(" ", "_"), *(word.removeprefix("--") for word in more), f"lr{lr:g}", f"clip{clip:g}", str(iterations), f"seed{seed}"])
    return args.out / name, (script, [*flags.split(), *window, *more, *extra, "--lr", f"{lr:g}", "--clip_eps", f"{clip:g}", "--iterations", str(iterations),
                                      "--seed", str(seed), "--eval_steps", "16", "--eval_every", str(every), "--save_every", "10", "--keep", "1"])

def jobs_of(args, label):
    """A method's runs, one per seed, with its own learning rate and clip, as long as args.iterations of ours. -> {folder: (script, flags)}."""
    return dict(job(args, label, seed, *tuned(args)[METHODS[label][2]], lasting(args, label)) for seed in range(args.seeds))

def cost_of(args, label):
    """Variants of ours that do the same work cost the same: two timings would only differ by chance."""
    return costs(args)[OURS if "sigma" in label else label]

def lasting(args, label, share=1.0):
    """As many iterations of a method as take the seconds of args.iterations of ours."""
    return max(1, round(args.iterations * share * cost_of(args, OURS)["seconds"] / cost_of(args, label)["seconds"]))

def cached(inputs):
    """What was found once is kept beside the runs, for as long as what it was found with, inputs(args), is the same."""
    def decorate(function):
        def found(args):
            path, asked = args.out / f"{function.__name__}.json", json.loads(json.dumps(inputs(args)))
            kept = json.loads(path.read_text()) if path.exists() else {}
            if kept.get("inputs") != asked:
                kept = json.loads(json.dumps(dict(inputs=asked, found=function(args))))
                keep(path, kept)
            return kept["found"]
        return found
    return decorate

# ---------------------------------------------------------------------------------------------------------------
# what an iteration costs, and how fast each method may learn

@cached(lambda args: [METHODS, threads(args), args.repeats])
def costs(args):
    """One iteration of each method in turn, again and again, in one process, with what --jobs leaves of the threads; the median of the seconds."""
    all_threads = torch.get_num_threads()
    torch.set_num_threads(threads(args))
    found = bench.measure({label: (label, script, flags) for label, (script, flags, _) in METHODS.items() if "sigma" not in label}, args.repeats, bare=False, warm=1)
    torch.set_num_threads(all_threads)
    return {label: dict(seconds=each["iteration"], **{key: each[key] for key in ("nfe_old", "nfe_theta", "G", "B", "K", "solver")}) for label, each in found.items()}

def table3(args):
    found = costs(args)
    rival, paper = found[RIVAL]["seconds"], PAPER["table3"]
    rows = [[label, f"{c['nfe_old']:.2f}".removesuffix(".00"), c["G"], c["B"], c["K"], f"{c['nfe_theta']:.2f}", f"{c['seconds']:.2f}", f"{c['seconds'] / rival:.2f}",
             f"{paper[label]:.2f}" if label in paper else "", f"{paper[label] / paper[RIVAL]:.2f}" if label in paper else ""] for label, c in found.items()]
    draw_bars(args.results / "table3.png", {label: c["seconds"] for label, c in found.items()}, "seconds an iteration")
    caption = (f"Medians of {args.repeats} iterations of each method in turn, in one process. The paper counts 14 trained steps for MixGRPO, whose code and paper have 4, and for BranchGRPO NFE_old 20, K 4 and NFE_theta 13.68. "
               "DiffusionNFT's NFE_old has the old policy's velocity at the 9 trained points.")
    return ["Method", "NFE_old", "G", "B", "K", "NFE_theta", "s / iter.", f"of {RIVAL}'s", "paper: s / iter.", f"of {RIVAL}'s"], rows, found, caption

@cached(lambda args: [METHODS, threads(args), args.repeats, LEARNING_RATES, CLIPS, args.iterations])
def tuned(args):
    """{whose: (learning rate, clip)}, the best of the sweep over the whole seconds."""
    if args.quick:
        return {family: (5e-5, 1e-3 if family == "branch" else 1e-4) for _, _, family in METHODS.values()}
    return {family: max(cells, key=lambda cell: cell["clip"].get("whole", -math.inf))["setting"] for family, cells in sweep(args).items()}

def sweep(args):
    """Every pair for a third of the seconds; then the two best learning rates, each with its better clip, for the whole of them and with another seed: what learns
    fastest at first may not last. -> {whose: [dict(setting, clip, judge)]}, the gains as {"third": gain, "whole": gain}. A run that diverged has lost all."""
    labels = {}
    for label, (_, _, family) in METHODS.items():
        labels.setdefault(family, label)                        # of variants, the first
    labels["neighbor"] = OURS
    found = {family: [dict(setting=(lr, clip), clip={}, judge={}) for clip in (CLIPS[:1] if family == "nft" else CLIPS) for lr in LEARNING_RATES] for family in labels}           # nft has no ratio to clip
    def attempt(part, share, seed, tried):
        jobs = [(cell, job(args, labels[family], seed, *cell["setting"], lasting(args, labels[family], share), evaluations=1, extra=("--eval_prompts", "tiny/prompts/test_pair.txt")))
                for family, cells in tried.items() for cell in cells]
        logs = run(args, dict(what for _, what in jobs), may_diverge=True)
        for cell, (folder, _) in jobs:
            for scorer in ("clip", "judge"):
                cell[scorer][part] = curve(logs[folder], scorer)[1][-1] if logs[folder] else -1.0
    attempt("third", 1 / 3, 1000, found)
    with_better_clip = {family: [max((cell for cell in cells if cell["setting"][0] == lr), key=lambda cell: cell["clip"]["third"]) for lr in LEARNING_RATES] for family, cells in found.items()}
    attempt("whole", 1, 1001, {family: sorted(cells, key=lambda cell: -cell["clip"]["third"])[:2] for family, cells in with_better_clip.items()})
    return found

def tune(args):
    if args.quick:
        raise SystemExit("tune: --quick takes learning rate 5e-5 and the published clips")
    found, best = sweep(args), tuned(args)
    rows, (figure, axes) = [], plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (family, cells) in enumerate(found.items()):
        for clip, style in zip(CLIPS, ("-", "--")):
            row = [cell for cell in cells if cell["setting"][1] == clip]
            bold = lambda cell: "**" * (cell["setting"] == tuple(best[family]))
            if row:
                rows.append([family, f"{clip:g}" if family != "nft" else "none",
                             *(f"{cell['clip']['third']:+.4f}" + (f", {bold(cell)}{cell['clip']['whole']:+.4f}{bold(cell)} ({cell['judge']['whole']:+.4f})" if "whole" in cell["clip"] else "") for cell in row)])
                axes.plot(LEARNING_RATES, [cell["clip"]["third"] for cell in row], style, color=f"C{i}", marker="o", label=f"{family}, clip {clip:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="reward gain after a third of the seconds", ylim=(-0.03, None))
    axes.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=7)
    finish(figure, args.results / "tune.png")
    caption = (f"Reward gain on the prompts of tiny/prompts/test_pair.txt after the seconds of {lasting(args, OURS, 1 / 3)} iterations of {OURS}, seed 1000; and, for the two best learning rates of each "
               f"method, after those of {args.iterations} (judge gain), seed 1001. Bold: taken, by the second reward alone.")
    return ["method", "clip", *(f"lr {rate:g}" for rate in LEARNING_RATES)], rows, found, caption

# ---------------------------------------------------------------------------------------------------------------
# the methods

def finals(args, jobs):
    """{folder: reward, judge, diversity and their gains} of finished runs: eval.py on their last checkpoints, four pictures for each held-out prompt."""
    newest = {folder: checkpoints(folder)[-1] for folder in jobs}
    subprocess.run([sys.executable, "eval.py", "--checkpoint", *map(str, newest.values()), "--steps", "16", "--out_dir", str(args.out / "eval"),
                    *(["--num_prompts", "24"] if args.quick else [])], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    rows = {row["label"]: row for row in json.loads((args.out / "eval/results.json").read_text())["results"]}
    return {"base": next(iter(rows.values())), **{folder: rows[label_of(path)] for folder, path in newest.items()}}

def over_seeds(values):
    """Mean and its standard error; one seed has none."""
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan

def shown(values, digits=4, sign=""):
    mean, error = over_seeds(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")

def curve(lines, name="clip"):
    """Held-out gains of one run -> (iterations, gains) of its evaluations, at every tenth of the run: one that was interrupted has more."""
    times, gains = np.array([(line["iter"], line[f"eval_{name}_gain"]) for line in lines if "eval_clip" in line]).T
    grid = np.linspace(0, times[-1], 11)
    return grid, np.interp(grid, times, gains)

def first_time(times, gains, goal):
    """When a curve, straight between its points, first reaches the goal; inf if it never does."""
    if gains[0] >= goal:
        return times[0]
    for k in range(1, len(times)):
        if gains[k] >= goal:
            return times[k - 1] + (times[k] - times[k - 1]) * (goal - gains[k - 1]) / (gains[k] - gains[k - 1])
    return math.inf

def times_to(curves, goal, rival_time):
    """Of each run (times, gains), the time to the goal as a share of the rival's. -> text"""
    if rival_time == 0:
        return "the goal is no gain"
    shares = [first_time(times, gains, goal) / rival_time for times, gains in curves]
    return shown(shares, 2) if np.isfinite(shares).all() else f"not reached by {np.isinf(shares).sum()} of {len(shares)}"

def paper_gains(name, row):
    return [f"{value - at_first:+.3f}" for value, at_first in zip(PAPER[name].get(row, ()), PAPER_BASE)] or ["", ""]

def compare(args, name, labels, caption):
    """A table of methods at equal seconds."""
    chosen, scorers = tuned(args), ("clip", "judge")
    jobs = {label: jobs_of(args, label) for label in dict.fromkeys([RIVAL, *labels])}
    logs = run(args, *jobs.values())
    ends = finals(args, logs)
    curves = {label: [(iterations * cost_of(args, label)["seconds"], gains) for iterations, gains in (curve(logs[folder]) for folder in jobs[label])] for label in jobs}
    rival_times, rival = curves[RIVAL][0][0], np.mean([gains for _, gains in curves[RIVAL]], 0)
    goal, rival_time, base = rival[-1], first_time(rival_times, rival, rival[-1]), ends["base"]
    rows, data = [["base", "", "", "", "", "", f"{base['clip']:.4f}", "", f"{base['judge']:.4f}", "", f"{base['diversity']:.3f}", "", "", ""]], dict(goal=goal)
    for label in labels:
        each, c, folders = [ends[folder] for folder in jobs[label]], cost_of(args, label), list(jobs[label])
        rows.append([label, c["solver"], f"{c['nfe_old']:.4g} / {c['nfe_theta']:.4g}", f"{c['seconds']:.2f}", logs[folders[0]][-1]["iter"], "{:g}, {:g}".format(*chosen[METHODS[label][2]]),
                     *(text for scorer in scorers for text in (shown([row[scorer] for row in each]), shown([row[f"{scorer}_gain"] for row in each], sign="+"))), shown([row["diversity"] for row in each], 3),
                     "1" if label == RIVAL else times_to(curves[label], goal, rival_time), *paper_gains(name, label)])
        data[label] = dict(finals=each, curves=[[list(map(float, part)) for part in pair] for pair in curves[label]], commands=[command_line(*what, folder) for folder, what in jobs[label].items()])
    held_out = read_prompts(HERE / "tiny/prompts/test_concept.txt")
    pick, paths = evenly_spaced(len(held_out), 8), {"base": HERE / "tiny/flux", **{label: checkpoints(next(iter(jobs[label])))[-1] for label in labels}}
    picture_grid(args.results / f"{name}.png", {label: pictures(path, held_out, pick) for label, path in paths.items()}, [held_out[i] for i in pick])
    caption += (f" All for the same seconds, {args.iterations * cost_of(args, OURS)['seconds']:.0f}, by the times of table3. {ERRORS} The goal, {RIVAL}'s final held-out gain, is {goal:+.4f}; the paper's columns are gains too.")
    return ["Method", "Solver", "NFE_old / theta", "s / iter.", "iterations", "lr, clip", "reward", "its gain", "judge", "its gain", "diversity", f"time to {RIVAL}'s final reward, as a share of {RIVAL}'s",
            "paper: HPSv2.1", "paper: CLIP"], rows, data, caption

def pictures(path, prompts, places):
    model = Flux(path, 64, frozen=True)
    return (sample(model, [prompts[i] for i in places], places, schedule(16), "dpmpp_2m") * 255).round().to(torch.uint8)

def table1(args):
    return compare(args, "table1", TABLE1, "One reward, clip; the paper's Table 1 has three, of which HPSv2.1 is one.")

def table2(args):
    return compare(args, "table2", TABLE2, "One reward, clip; in the paper HPSv2.1.")

def ablation(args, name):
    """One setting around (sigma, B, p) = (0.5, 4, 2), the others fixed; equal iterations, as in the paper."""
    flag, values = SWEEPS[name]
    (rate, clip), jobs = tuned(args)["neighbor"], {}
    for value in values:
        settings = {**START, flag: value}
        if {**settings, "p": 2.0} == START and settings["p"] in IN_TABLE2:
            jobs[value] = jobs_of(args, IN_TABLE2[settings["p"]])
        else:
            more = [word for key, setting in settings.items() for word in (f"--{key}", f"{setting:g}")]
            jobs[value] = dict(job(args, OURS, seed, rate, clip, args.iterations, more, evaluations=1) for seed in range(args.seeds))
    logs = run(args, *jobs.values())
    ends = finals(args, logs)
    scores = {value: {key: [ends[folder][key] for folder in each] for key in ("clip_gain", "judge_gain", "diversity")} for value, each in jobs.items()}
    rows = [[f"{value:g}", shown(s["clip_gain"], sign="+"), shown(s["judge_gain"], sign="+"), shown(s["diversity"], 3), *paper_gains(name, value)] for value, s in scores.items()]
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for panel, (key, title) in zip(panels, (("clip_gain", "reward gain"), ("judge_gain", "judge gain"), ("diversity", "diversity"))):
        means, errors = zip(*(over_seeds(s[key]) for s in scores.values()))
        panel.errorbar(range(len(values)), means, np.nan_to_num(errors), marker="o", capsize=3)
        panel.set(title=title, xticks=range(len(values)), xticklabels=[f"{value:g}" for value in values], xlabel=flag)
    finish(figure, args.results / f"{name}.png")
    caption = f"(sigma, B, p) = (0.5, 4, 2) but for {flag}; {args.iterations} iterations each, lr {rate:g}, clip {clip:g}. {ERRORS} The paper's columns are gains too."
    return [flag, "reward gain", "judge gain", "diversity", "paper: HPSv2.1", "paper: CLIP"], rows, dict(scores={f"{value:g}": s for value, s in scores.items()}, lr=rate, clip=clip,
            commands=[command_line(*what, folder) for each in jobs.values() for folder, what in each.items()]), caption

# ---------------------------------------------------------------------------------------------------------------
# the figures

def figure5(args):
    jobs = {label: jobs_of(args, label) for label in TABLE1}
    logs = run(args, *jobs.values())
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    rows, data = [], {}
    for i, label in enumerate(TABLE1):
        seconds = cost_of(args, label)["seconds"]
        style = dict(label=label, color=f"C{i % 10}", linewidth=2.5 if "Neighbor" in label else 1.2, linestyle="-" if "Neighbor" in label else "--")
        gains = {name: [curve(logs[folder], name)[1] for folder in jobs[label]] for name in ("clip", "judge")}
        iterations = curve(logs[next(iter(jobs[label]))])[0]
        for panel, unit, name in zip(panels, (1, seconds, seconds), ("clip", "clip", "judge")):
            panel.plot(iterations * unit, np.mean(gains[name], 0), **style)
        data[label] = dict(iterations=iterations.tolist(), seconds_an_iteration=seconds, **{f"{name}_gains": [each.tolist() for each in gains[name]] for name in gains})
        rows.append([label, *(shown([each[k] for each in gains["clip"]], sign="+") for k in (1, 2, 4, 6, 8, 10))])
    for panel, x, y in zip(panels, ("iterations", "seconds", "seconds"), ("reward gain", "reward gain", "judge gain")):
        panel.set(xlabel=x, ylabel=f"held-out {y}")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    finish(figure, args.results / "figure5.png")
    caption = f"Held-out reward gain after a share of the seconds, {args.iterations * cost_of(args, OURS)['seconds']:.0f} for each method, by the times of table3. {ERRORS}"
    return ["share of the seconds", "0.1", "0.2", "0.4", "0.6", "0.8", "1"], rows, data, caption

@torch.no_grad()
def group_of(path, prompts, seed, sigma=0.3, G=12):
    """Rollout groups as training has them -> images (P, G, 3, H, W), rewards (P, G)."""
    model, rng = Flux(path, 64, frozen=True), torch.Generator().manual_seed(seed)
    scorers = rewards.load_all(rewards.parse("clip"), "cpu", prompts[:1])
    cond = model.encode(prompts)
    x1 = torch.cat([perturb_noise(torch.randn(model.latent_shape, generator=rng), torch.randn(G, *model.latent_shape, generator=rng), sigma) for _ in prompts])
    images = model.decode(rollout(lambda x, t: model.velocity(x, t, cond), x1, schedule(8), "dpmpp_2m")[0][-1])
    return images.unflatten(0, (-1, G)), train.score(scorers, images, prompts)["clip"]

def before_and_after(args, prompts, seed=0):
    folder, what = next(iter(jobs_of(args, OURS).items()))
    run(args, {folder: what})
    return {label: group_of(path, prompts, seed) for label, path in {"base": HERE / "tiny/flux", "aligned": checkpoints(folder)[-1]}.items()}

def figure4(args):
    """A'_i of real groups. What p does to a group is the length |A'|_2 it gives it: 1 for every group at p = 2, and less for the flat ones below."""
    prompts = read_prompts(HERE / "tiny/prompts/train.txt")
    groups = before_and_after(args, [prompts[i] for i in evenly_spaced(len(prompts), 16 if args.quick else 64)])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    rows, data = [], {}
    for panel, (label, (_, r)) in zip(panels, groups.items()):
        A = r - r.mean(1, keepdim=True)
        flatness = (A.abs().sum(1) / A.norm(dim=1) / math.sqrt(A.shape[1])).numpy()          # 1 where all |A_i| are equal, small where one stands out
        order = np.argsort(flatness)
        quarter = len(order) // 4
        for p in (2.0, 1.0, 0.8, 0.5):
            length = torch.stack([advantages(each, p) for each in r]).norm(dim=1).numpy()
            weight = length / length.mean()
            panel.scatter(flatness, weight, s=12, label=f"p = {p:g}")
            rows.append([label, f"{p:g}", f"{weight[order[:quarter]].mean():.3f}", f"{weight[order[-quarter:]].mean():.3f}", f"{weight[order[:quarter]].mean() / weight[order[-quarter:]].mean():.2f}"])
            data[f"{label}, p {p:g}"] = dict(flatness=flatness.tolist(), weight=weight.tolist())
        panel.set(title=label, xlabel="flatness of the group, |A|_1 / (sqrt(G) |A|_2)", ylabel="length of A' over the mean of all groups")
        panel.legend()
    finish(figure, args.results / "figure4.png")
    return ["model", "p", "weight of the most peaked quarter of the groups", "weight of the flattest quarter", "ratio"], rows, data, f"{len(groups['base'][1])} rollout groups of training prompts; weight: |A'|_2 over its mean."

def figure8(args):
    known = read_prompts(HERE / "tiny/prompts/train.txt")
    prompts = [known[i] for i in evenly_spaced(len(known), 3)]
    rows, strips = [], {}
    for label, (images, r) in before_and_after(args, prompts, seed=8).items():
        for prompt, each, score, distance in zip(prompts, images, r, diversity(images)):
            strips[f"{prompt[:40]}: {label}"] = (each * 255).round().to(torch.uint8)
            rows.append([prompt, label, f"{score.mean():.4f}", f"{score.std():.4f}", f"{distance.item():.4f}"])
    order = [f"{prompt[:40]}: {label}" for prompt in prompts for label in ("base", "aligned")]
    picture_grid(args.results / "figure8.png", {key: strips[key] for key in order}, [f"candidate {i + 1}" for i in range(12)])
    return (["prompt", "model", "mean reward", "its standard deviation in the group", "distance of two pictures"], sorted(rows, key=lambda row: (row[0], row[1] != "base")), {},
            f"Groups of 12, sigma 0.3, from the same noises; {OURS}, seed 0.")

def draw_bars(path, numbers, title):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.barh(list(numbers), list(numbers.values()))
    axes.invert_yaxis()
    axes.set(xlabel=title)
    finish(figure, path)

def finish(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)

# ---------------------------------------------------------------------------------------------------------------

WHAT = {"table3": table3, "tune": tune, "table1": table1, "table2": table2, **{name: lambda args, name=name: ablation(args, name) for name in SWEEPS}, "figure4": figure4, "figure5": figure5, "figure8": figure8}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WHAT, "all"])
    parser.add_argument("--seeds", type=int, help="runs of each (default 3; quick: 1)")
    parser.add_argument("--iterations", type=int, help="of Neighbor GRPO with 8 steps, whose seconds all runs last (default 100; quick: 4)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--quick", action="store_true", help="each in minutes, on a few iterations and prompts")
    parser.add_argument("--out_dir", default="out/reproduce", help="of the runs (default out/reproduce)")
    args = parser.parse_args(argv)
    seeds, iterations, args.repeats = (1, 4, 1) if args.quick else (3, 100, 10)
    args.seeds, args.iterations = seeds if args.seeds is None else args.seeds, iterations if args.iterations is None else args.iterations
    if min(args.seeds, args.iterations, args.jobs) < 1:
        parser.error("seeds, iterations and jobs must be at least 1")
    args.out, args.results = Path(args.out_dir, *["quick"] * args.quick).resolve(), RESULTS.joinpath(*["quick"] * args.quick)
    for folder in (args.out, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    for name in [name for name in WHAT if not (args.quick and name == "tune")] if args.what == "all" else [args.what]:
        began = time.time()
        head, rows, data, caption = WHAT[name](args)
        command = f"python -m paper.reproduce {name} --seeds {args.seeds} --iterations {args.iterations} --jobs {args.jobs}" + " --quick" * args.quick
        caption += " Quick: 24 prompts and a few iterations, which say nothing yet." * args.quick
        text = f"`{command}` (the small world; {torch.get_num_threads()} CPU threads, {threads(args)} a run). {caption}\n\n{bench.markdown(head, rows)}\n"
        (args.results / f"{name}.md").write_text(text)
        (args.results / f"{name}.json").write_text(json.dumps(dict(command=command, head=head, rows=rows, data=data), indent=1))
        print(f"\n{text}\nwrote {args.results}/{name}.md, .json, .png in {time.time() - began:.0f} s\n", flush=True)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("reproduce.py: stopped; the same command goes on with the runs, and times anew if it was timing")
