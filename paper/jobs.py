"""
Runs of train.py and paper.baselines, and other results, that are made once. `args` has out, the
folder that everything goes to, and jobs, the number of runs at a time.

A run is {folder: (script, flags)}. What is whole is not made again, what was interrupted goes on,
and what was asked for with another command begins anew. Beside each folder there is a note,
folder.json, that says by which command the run was made and how it ended.
"""
import json, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from eval import write_atomically
from run import HERE, checkpoints, read_log

RUNNING = []

def stop(*_):
    """Interrupt the runs, which end after the iteration in hand, with a checkpoint."""
    for child in RUNNING:
        child.terminate()
    raise KeyboardInterrupt

def run_all(args, *groups, may_diverge=False):
    """Bring all runs of the groups, {folder: (script, flags)} each, to their end.
    -> {folder: the lines of its log}, no lines where a run diverged."""
    jobs = {folder: what for group in groups for folder, what in group.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        logs = pool.map(lambda folder: bring_to_end(args, folder, *jobs[folder], may_diverge), jobs)
        return dict(zip(jobs, logs))

def bring_to_end(args, folder, script, flags, may_diverge):
    """The lines of a run's log, after what is left of the run has been done."""
    note = folder.with_name(f"{folder.name}.json")              # how the run in the folder ended
    command = command_line(script, flags, folder)
    known = dict(command=command, ended="")
    if note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
    same, ended = known["command"] == command, known["ended"]
    is_there = ended == "diverged" or ended == "whole" and checkpoints(folder)
    if not (same and is_there):
        goes_on = same and checkpoints(folder)
        if not goes_on:
            for old in args.out.glob(f"eval/{folder.name}-checkpoint-*"):
                shutil.rmtree(old)                              # pictures of other weights
        print(command, flush=True)
        keep(note, dict(command=command, ended=""))
        child = subprocess.Popen(
            [sys.executable, *script.split(), *flags, "--out_dir", str(folder),
             "--resume" if goes_on else "--overwrite", "--threads", str(threads(args))],
            cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        RUNNING.append(child)
        said = child.communicate()[1]           # after Ctrl-C it still writes its checkpoint
        RUNNING.remove(child)
        ended = how_it_ended(folder, flags, child.returncode, said)
        keep(note, dict(command=command, ended=ended))
        if not ended:
            raise RuntimeError(f"{folder} ended with {child.returncode} before it was done; the "
                               f"same command goes on with it:\n{said[-2000:]}")
    if ended == "diverged" and not may_diverge:
        raise RuntimeError(f"{folder} diverged, so there is no table; {command}")
    return read_log(folder) if ended == "whole" else []

def how_it_ended(folder, flags, status, said):
    """ "whole", "diverged", or "" for a run that was stopped or failed."""
    last = int(flags[flags.index("--iterations") + 1])
    evaluated = any(line["iter"] == last and "eval_clip" in line for line in read_log(folder))
    if evaluated and status == 0:
        return "whole"
    return "diverged" if re.search("no longer finite|no finite gradient|not finite", said) else ""

def command_line(script, flags, folder):
    return " ".join(["python", script, *flags, "--out_dir", folder.name])

def commands(jobs):
    return [command_line(*what, folder) for folder, what in jobs.items()]

def keep(path, what):
    text = json.dumps(what, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

def threads(args):
    return max(1, torch.get_num_threads() // args.jobs)

def cached(inputs):
    """Keep what a function of args returns, in args.out, as long as inputs(args) is the same."""
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
