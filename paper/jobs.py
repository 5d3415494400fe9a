"""
Make runs of train.py and paper.baselines, and other results, only once. `args` has `out`, the
folder for everything, and `jobs`, the number of runs at a time.

A run is {folder: (script, flags)}. A complete run is not made again, an interrupted one continues,
and a run with another command begins again. Beside each folder, a note, folder.json, has the
command of the run and how it ended.
"""
import json, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from eval import write_atomically
from run import HERE, checkpoints, read_log

RUNNING = []

def stop(*_):
    """Interrupt the runs. Each finishes its iteration and writes a checkpoint."""
    for child in RUNNING:
        child.terminate()
    raise KeyboardInterrupt

def run_all(args, *groups, may_diverge=False):
    """Complete all runs of the groups, each {folder: (script, flags)}.
    -> {folder: the lines of its log}, no lines for a run that diverged."""
    jobs = {folder: job for group in groups for folder, job in group.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        logs = pool.map(lambda folder: complete(args, folder, *jobs[folder], may_diverge), jobs)
        return dict(zip(jobs, logs))

def complete(args, folder, script, flags, may_diverge):
    """Do what is missing of a run -> the lines of its log."""
    note = folder.with_name(f"{folder.name}.json")
    command = command_line(script, flags, folder)
    known = dict(command=command, ended="")
    if note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
    same, ended = known["command"] == command, known["ended"]
    is_done = ended == "diverged" or ended == "whole" and checkpoints(folder)
    if not (same and is_done):
        continues = same and checkpoints(folder)
        if not continues:
            for old in args.out.glob(f"eval/{folder.name}-checkpoint-*"):
                shutil.rmtree(old)                              # pictures of other weights
        print(command, flush=True)
        keep(note, dict(command=command, ended=""))
        child = subprocess.Popen(
            [sys.executable, *script.split(), *flags, "--out_dir", str(folder),
             "--resume" if continues else "--overwrite", "--threads", str(threads(args))],
            cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        RUNNING.append(child)
        said = child.communicate()[1]           # waits; after Ctrl-C it writes a checkpoint
        RUNNING.remove(child)
        ended = how_it_ended(folder, flags, child.returncode, said)
        keep(note, dict(command=command, ended=ended))
        if not ended:
            raise RuntimeError(f"{folder} ended with {child.returncode} before it was done; the "
                               f"same command continues it:\n{said[-2000:]}")
    if ended == "diverged" and not may_diverge:
        raise RuntimeError(f"{folder} diverged, so there is no table; {command}")
    return read_log(folder) if ended == "whole" else []

def how_it_ended(folder, flags, status, said):
    """How a run ended: "whole" if complete, "diverged", or "" if it was stopped or failed."""
    last = int(flags[flags.index("--iterations") + 1])
    evaluated = any(line["iter"] == last and "eval_preference" in line for line in read_log(folder))
    if evaluated and status == 0:
        return "whole"
    return "diverged" if re.search("no longer finite|no finite gradient|not finite", said) else ""

def command_line(script, flags, folder):
    return " ".join(["python", script, *flags, "--out_dir", folder.name])

def commands(jobs):
    return [command_line(*job, folder) for folder, job in jobs.items()]

def keep(path, values):
    text = json.dumps(values, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def threads(args):
    return max(1, torch.get_num_threads() // args.jobs)

def cached(inputs):
    """Save the result of a function of args in args.out, and use it while inputs(args) is equal."""
    def decorate(function):
        def found(args):
            path = args.out / f"{function.__name__}.json"
            asked = json.loads(json.dumps(inputs(args)))
            kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if kept.get("inputs") != asked:
                kept = json.loads(json.dumps(dict(inputs=asked, found=function(args))))
                keep(path, kept)
            return kept["found"]
        return found
    return decorate
