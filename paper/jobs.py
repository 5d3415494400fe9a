"""
Make runs of train.py and paper.baselines only once. `args` has `out`, the folder for everything,
`results`, `kept`, and `jobs`, the number of runs at a time.

A run is {folder: (script, flags)}. A complete run is not made again, an interrupted one continues,
and a run with another command begins again. Beside each folder, a note, folder.json, has the
command, what made the run (a hash of the code and the kind of CPU), and how it ended. A run of
other code, or of another kind of CPU, is neither used nor continued. The file results/runs.jsonl
keeps the evaluations of finished runs, and their scores by eval.py, should `out` be lost. With
`kept`, only these are used, whatever made them.
"""
import ast, contextlib, hashlib, json, os, platform, re, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from eval import write_atomically
from run import HERE, checkpoints, read_log

RUNNING, LOCK = [], threading.Lock()

def stop(*_):
    """Interrupt the runs. Each finishes its iteration and writes a checkpoint."""
    for child in RUNNING:
        child.terminate()
    raise KeyboardInterrupt

def run_all(args, *groups, may_diverge=False):
    """Complete all runs of the groups, each {folder: (script, flags)}.
    -> {folder: its lines as in runs.jsonl}, no lines for a run that diverged."""
    jobs = {folder: job for group in groups for folder, job in group.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda folder: complete(args, folder, *jobs[folder], may_diverge),
                             jobs))
    if len(kinds := {run["made_by"]["cpu"] for run in runs}) > 1:
        raise RuntimeError(f"these runs were made on different kinds of CPU: {sorted(kinds)}")
    return {folder: run["lines"] for folder, run in zip(jobs, runs)}

def complete(args, folder, script, flags, may_diverge):
    """Do what is missing of a run -> its entry of runs.jsonl."""
    note, command = folder.with_name(f"{folder.name}.json"), command_line(script, flags, folder)
    made, run = made_by(), kept_runs(args).get(folder.name, {})
    if args.kept and run.get("command") != command:
        raise RuntimeError(f"{args.results}/runs.jsonl does not have the run {command}")
    known = dict(command=command, made_by=made, ended="")
    if note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
    same, ended = known["command"] == command, known["ended"]
    if same and known.get("made_by") != made and not args.kept:
        raise RuntimeError(f"{folder} was made by {known.get('made_by')}, but now there is {made}; "
                           "name another --out_dir, or use --kept")
    is_done = same and (ended == "diverged" or ended == "whole" and checkpoints(folder))
    is_kept = run.get("command") == command and run["made_by"] == made and not folder.exists()
    if not (is_done or is_kept or args.kept):
        continues = same and checkpoints(folder)
        if not continues:
            for old in args.out.glob(f"eval*/{folder.name}-checkpoint-*"):
                shutil.rmtree(old)                              # pictures of other weights
        print(command, flush=True)
        keep(note, dict(command=command, made_by=made, ended=""))
        status, said = start([*script.split(), *flags, "--out_dir", str(folder),
                              "--resume" if continues else "--overwrite",
                              "--threads", str(threads(args))])
        ended = how_it_ended(folder, flags, status, said)
        keep(note, dict(command=command, made_by=made, ended=ended))
        if not ended:
            raise RuntimeError(f"{folder} ended with {status} before it was done; the same command "
                               f"continues it:\n{said[-2000:]}")
    if not (is_kept or args.kept):
        lines = [short(line) for line in read_log(folder)
                 if line["iter"] == 1 or "eval_preference" in line]
        run = dict(command=command, made_by=made, ended=ended,
                   lines=lines if ended == "whole" else [])
        keep_run(args, folder.name, run)
    if run["ended"] == "diverged" and not may_diverge:
        raise RuntimeError(f"{folder} diverged, so there is no table; {command}")
    return run

def start(words):
    """Run a script to its end -> its exit status, and what it wrote to stderr. If this process is
    killed, the pipe is closed, and the script ends, too (leash.py)."""
    its, ours = os.pipe()
    child = subprocess.Popen([sys.executable, "-m", "paper.leash", *words], cwd=HERE, stdin=its,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    os.close(its)
    RUNNING.append(child)
    said = child.communicate()[1]               # waits; after Ctrl-C it writes a checkpoint
    RUNNING.remove(child)
    os.close(ours)
    return child.returncode, said

def how_it_ended(folder, flags, status, said):
    """How a run ended: "whole" if complete, "diverged", or "" if it was stopped or failed."""
    last = int(flags[flags.index("--iterations") + 1])
    wanted = "iter" if "--eval_every 0" in " ".join(flags) else "eval_preference"
    if status == 0 and any(line["iter"] == last and wanted in line for line in read_log(folder)):
        return "whole"
    return "diverged" if re.search("no longer finite|no finite gradient|not finite", said) else ""

def command_line(script, flags, folder):
    return " ".join(["python", script, *flags, "--out_dir", folder.name])

def keep(path, values):
    write_atomically(path, json.dumps(values, indent=1))

def threads(args):
    return max(1, torch.get_num_threads() // args.jobs)

# ------------------------------------------------------------------------------------------------
# What outlives args.out

def short(line):
    """What runs.jsonl keeps of a log's line."""
    return {key: round(value, 6) for key, value in line.items() if value is not None
            and (key in ("iter", "reward_std") or key[:5] == "eval_" and "stderr" not in key)}

def kept_runs(args):
    """{name of a folder: its entry in runs.jsonl}. Later lines of the same run add to earlier ones,
    and those of other code or another CPU replace them."""
    path, runs = args.results / "runs.jsonl", {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        before = runs.get(line["run"], {})
        same = [before.get(key) for key in ("command", "made_by")] == [line["command"],
                                                                      line["made_by"]]
        runs[line["run"]] = {**before, **line} if same else line
    return runs

def keep_run(args, name, values):
    """Append a line to runs.jsonl, if it tells anything new."""
    with LOCK:
        if not values.items() <= kept_runs(args).get(name, {}).items():
            with open(args.results / "runs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(run=name, **values)) + "\n")

def made_by():
    """What decides a run's numbers besides its command: a hash of the code, without its comments
    and docstrings, of the small world's files and torch's version; and the kind of CPU."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("tiny/scorers.py"), *HERE.glob("tiny/**/*"),
                        HERE / "paper/baselines.py"]):
        if path.suffix == ".py" and path.name not in ("test_core.py", "make_tiny.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(getattr(node, "body", None), list):
                    node.body = [each for each in node.body if not (
                        isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            digest.update(ast.dump(tree).encode())
        elif path.suffix in (".safetensors", ".json", ".txt"):
            digest.update(path.read_bytes())
    return dict(code=digest.hexdigest()[:12], cpu=kind_of_cpu())

def kind_of_cpu():
    """The CPU's name, family and model, and the instructions that torch uses on it. On another kind
    the last bits of a sum may differ, and with them a run's later numbers."""
    known = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    parts = [known.get(key, "") for key in ("model name", "cpu family", "model")]
    parts[0] = parts[0] or platform.processor() or platform.machine()
    return " ".join([*filter(None, parts), torch.backends.cpu.get_cpu_capability()])
