"""
A run's settings are checked here, before anything is loaded. It writes log.jsonl, samples/,
before_after.png, curve.png and checkpoint-<n>/ into out_dir. It survives Ctrl-C, kill -9 and a full
disk: --resume continues from the newest checkpoint, and on a CPU repeats the run to the last bit.
No formula of the method is in this file.
"""
import atexit, contextlib, hashlib, importlib.util, json, math, os, shutil, sys, tempfile, warnings
from dataclasses import asdict, fields
from pathlib import Path
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
import rewards
from eval import (draw_curve, evaluate, mean_and_stderr, picture_grid, read_log, times,
                  write_atomically)
from machine import (RANK, WORLD, attempt, check_model, evenly_spaced, exchange_state,
                     gather_objects, is_lora, one_line, parse_call, parse_resolution, read_prompts,
                     share_work, shared_rules, whole_weights)
from neighbor_grpo import clip_fraction
from rewards import parse_weights

HERE = Path(__file__).resolve().parent
warnings.filterwarnings("ignore", message="torch.distributed is disabled")      # one process
RUN_FILES = ("log.jsonl", "config.json", "neighbor_grpo.py", "baselines.py", "before_after.png",
             "before_after.webp", "curve.png", "samples", "tensorboard", "wandb")
                                # in out_dir, beside the checkpoints
MAX_SKIPS = 10                  # this many updates in a row without a finite gradient end the run
MAY_CHANGE = ("iterations", "eval_every", "save_every", "keep", "checkpoint_blocks", "compile",
              "batch", "fsdp", "text_encoder_device", "wandb", "device", "threads")
NOT_COMPARED = ("out_dir", "resume", "overwrite", "prompts", "eval_prompts")    # see `contents`

# ------------------------------------------------------------------------------------------------
# Settings that are refused

def check(c):
    """Raise ValueError, in one sentence, for the first setting that cannot work."""
    for f in fields(c):
        if f.metadata["allowed"]:
            check_option(f.name, getattr(c, f.name), f.metadata["allowed"])
    for holds, sentence in [
        *c.rules(),                             # of the method; these all methods share
        (c.prompts_per_iteration % WORLD == 0,
         f"prompts_per_iteration is {c.prompts_per_iteration}, but must be divisible among "
         f"{WORLD} processes, because a group is never split"),
        (not c.fsdp or WORLD > 1,
         "fsdp divides a model among processes, and there is one; start several with torchrun"),
        (not (c.fsdp and (c.lora_rank or c.init_lora)),
         "fsdp and adapters exclude each other; adapters fit on every GPU"),
        (not (c.init_lora and c.lora_rank), "init_lora has its own rank; leave lora_rank out"),
        (not c.init_lora or is_lora(c.init_lora), f"init_lora {c.init_lora} holds no adapters; it "
         "must be a .safetensors file, or a folder with one that diffusers or PEFT wrote"),
        (not any(Path(source).is_fifo() for source in (c.prompts, c.eval_prompts)),
         "prompts come from a pipe, which can be read only once; write them into a file"),
        *shared_rules(c),
        (not c.wandb or importlib.util.find_spec("wandb"),
         "wandb is not installed; pip install wandb, or leave --wandb out"),
        (rewards.parse(c.rewards), f"rewards is empty; name some of {', '.join(rewards.SCORERS)}"),
        (c.out_dir, "out_dir is empty; name a directory for this run"),
        (not (c.resume and c.overwrite), "resume and overwrite exclude each other; give one"),
    ]:
        if not holds:
            raise ValueError(sentence)
    parse_weights(c.reward_weights, rewards.parse(c.rewards))
    rewards.parse(f"{c.rewards},{c.eval_scorers}")
    for source in (c.prompts, c.eval_prompts or c.prompts):
        read_prompts(source)
    if c.resolution:
        parse_resolution(c.resolution)
    parse_call(c.call)
    check_model(c.model)
    check_out_dir(c)

def check_option(name, value, allowed):
    """Raise ValueError for a number outside an interval, or a word that is not in a tuple."""
    if isinstance(allowed, tuple):
        fits, must = value in allowed, "be " + " or ".join(word or "empty" for word in allowed)
    else:
        low, high = map(float, allowed[1:-1].split(","))
        above = low <= value if allowed[0] == "[" else low < value
        below = value <= high if allowed[-1] == "]" else value < high
        fits, must, value = above and below, f"lie in {allowed}", f"{value:g}"
    if not fits:
        raise ValueError(f"{name} is {value or 'empty'}, but must {must}")

def check_out_dir(cfg):
    """Refuse a directory that holds another run or the model, or that cannot be written to."""
    out, found = Path(cfg.out_dir), checkpoints(cfg.out_dir)
    others = [name for name in RUN_FILES if (out / name).exists()]
    others += [path.name for path in out.glob("checkpoint-[0-9]*")]     # another program's, say
    if cfg.resume and found:
        check_resumed(cfg, found[-1])
    elif others and not found and not (out / "log.jsonl").exists():
        raise ValueError(f"{out} is not a run, and holds {others[0]}, which a run would replace; "
                         "name another --out_dir")
    elif others:
        if not (cfg.overwrite or cfg.resume):
            raise ValueError(f"{out} already holds a run; use --resume, --overwrite or another "
                             "--out_dir")
        for name, path in (("model", cfg.model), ("init_lora", cfg.init_lora)):
            if path and out.resolve() in Path(path).resolve().parents:
                raise ValueError(f"{name} {path} lies in {out}, where a new run would delete it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as trial:     # checkpoints are renamed folders
            os.mkdir(f"{trial}/a")
            os.replace(f"{trial}/a", f"{trial}/b")
        if RANK == 0:                           # for all processes of this run
            cfg.lock = hold(out)
    except OSError as error:
        raise ValueError(f"out_dir {out} must be a directory in which folders can be made and "
                         f"renamed, and that failed: {error.strerror}") from None

def hold(out):
    """Lock a folder while the lock lives, and no longer than this process. -> the lock. A thread
    may hold it several times."""
    lock = FileLock(out / ".lock", is_singleton=True)
    # When torchrun restarts a run, the processes of the last attempt may still be dying.
    patience = 60 if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else 0
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(f"another run is writing into {out}; wait until it ends, or name another "
                         "--out_dir") from None
    except (OSError, NotImplementedError) as error:             # some network file systems
        print(f"{out} cannot be locked ({error}); start no second run in it", file=sys.stderr)
    return lock

def check_resumed(cfg, path):
    """A run goes on with the settings that it began with, except MAY_CHANGE."""
    try:
        before = json.loads((path / "state/config.json").read_text(encoding="utf-8"))
        began = before.get("contents") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(broken(path, error)) from None
    if cfg.method != before.get("method", "neighbor"):
        raise ValueError(f"the run to resume is one of method {before.get('method', 'neighbor')}, "
                         f"not {cfg.method}")
    for name, value in asdict(cfg).items():
        old = before.get(name, value)
        moved = name == "model" and Path(value).parts[-2:] == Path(old).parts[-2:]
        if name not in MAY_CHANGE + NOT_COMPARED and str(value) != str(old) and not moved:
            raise ValueError(f"{name} is {value}, but was {old} in the run to resume; only "
                             f"{', '.join(MAY_CHANGE)} may change")
    now = contents(cfg)
    for name in sorted({*now, *began}) if began else ():
        known = name != "model" or now.keys() & began.keys() & {name}   # not of a hub id
        if known and now.get(name) != began.get(name):
            raise ValueError(f"{name} differs from the run to resume: the contents of its file "
                             "were changed; give it as it was")
    if cfg.eval_every and not before["eval_every"]:
        raise ValueError("eval_every was 0 in the run to resume, so its base was never evaluated; "
                         "leave it 0, and use eval.py")

def contents(cfg):
    """Hashes of the files that settings point to: prompts, the code of your own rewards, and of the
    model's weights the beginnings."""
    found = rewards.fingerprints(cfg.rewards, cfg.eval_scorers)
    starts = []
    for file in sorted(Path(cfg.model).glob("transformer/*.safetensors")):
        with open(file, "rb") as weights:
            starts.append(weights.read(2**20))
    if starts:
        found["model"] = hashlib.sha256(b"".join(starts)).hexdigest()
    for name, path in (("prompts", cfg.prompts), ("eval_prompts", cfg.eval_prompts)):
        if path:
            found[name] = hashlib.sha256(json.dumps(read_prompts(path)).encode()).hexdigest()
    return found

def broken(path, error):
    return (f"{path} is broken ({one_line(error)}); move it away, and --resume goes on from the "
            "checkpoint before it")

# ------------------------------------------------------------------------------------------------
# Files

def checkpoints(out):
    """The checkpoints in a run's directory, oldest first."""
    found = [path.parents[1] for path in Path(out).glob("checkpoint-*/state/state.pt")]
    found = {path.name.removeprefix("checkpoint-"): path for path in found}
    return [found[n] for n in sorted(filter(str.isdigit, found), key=int)]

def discard(path):
    """Delete, but rename first: a half-deleted folder must not pass for a checkpoint."""
    aside = path.with_name(f"{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if os.path.lexists(path):
        os.replace(path, aside)
        shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()

def start_watchers(out, project, settings, iteration):
    """{name: a function that sends numbers {name: value} of a step} for TensorBoard, where it is
    installed, and Weights & Biases, if a project is named. One that fails is left out."""
    def tensorboard():
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out / "tensorboard", purge_step=iteration + 1)
        atexit.register(board.close)
        return lambda numbers, step: [board.add_scalar(*pair, step) for pair in numbers.items()]

    def wandb():
        import wandb
        return wandb.init(project=project, config=settings, dir=out).log

    wanted = [tensorboard] if importlib.util.find_spec("tensorboard") else []
    wanted += [wandb] if project else []
    found = {start.__name__: attempt(start.__name__, start) for start in wanted}
    return {name: send for name, send in found.items() if send}

def announce(c, model, run, cut):
    """Say what will happen, and what it costs."""
    size, P = sum(w.numel() for w in model.trained()), c.prompts_per_iteration // WORLD
    prompts = read_prompts(c.prompts)
    both = len({*prompts} & {*run.prompts}) if c.eval_prompts else 0
    lines = [
        f"model      {c.model}: {size / 1e6:.3g} M trained parameters"
        + " of adapters" * bool(c.lora_rank or c.init_lora) + f", {c.resolution or 'own'} pixels, "
        f"latent {' x '.join(map(str, model.latent_shape))}, on {c.device}",
        f"prompts    {len(prompts)} to train on, {len(run.prompts)} "
        f"{'held out' if c.eval_prompts else 'of them to watch'}"
        + f"; {both} are in both" * bool(both)
        + "".join(f"; {name} truncates {n}" for name, n in cut.items() if n),
        f"rewards    {c.rewards}" + f"; watched: {c.eval_scorers}" * bool(c.eval_scorers),
        f"iteration  {c.plan()}" + f"; guidance: {model.nfe} each" * (model.nfe > 1),
        f"run        iterations {run.iteration + 1} to {c.iterations}, seed {c.seed}, into "
        f"{c.out_dir}/" + (f", {WORLD} processes ({'FSDP2' if c.fsdp else 'a copy each'}) with {P} "
                           "groups each") * (WORLD > 1)]
    need, free = 16 * size, shutil.disk_usage(run.out).free     # weights twice, and two moments
    if need > free:
        lines += [f"disk       {free / 1e9:.1f} GB are free, but a checkpoint takes "
                  f"{need / 1e9:.1f} GB or more"]
    if c.resume:
        lines += [f"resume     continues from {run.resumed}" if run.resumed else
                  f"resume     no checkpoint in {c.out_dir}, so the run begins"]
    print(*lines, sep="\n", flush=True)

def merge(lines):
    """One line of the log out of those of all processes: means over groups, the sum of flat groups,
    and the largest of everything else (the slowest clock, the ratio furthest from 1)."""
    line = {}
    for key, first in lines[0].items():
        values = [each[key] for each in lines]
        if isinstance(first, torch.Tensor):
            line[key] = torch.cat(values).nanmean().item()
        else:
            line[key] = first if first is None else (sum if key == "flat_groups" else max)(values)
    return line

# ------------------------------------------------------------------------------------------------

class Run:
    """The optimizer, the counters, and everything that is written.

    iteration   number of iterations done               before   the evaluation of the base
    stop        True: no iteration begins any more      ema      the average of the weights, or []
    """

    def __init__(self, cfg, model, scorers):
        self.cfg, self.model, self.scorers, self.out = cfg, model, scorers, Path(cfg.out_dir)
        self.opt = torch.optim.AdamW(model.trained(), lr=cfg.lr, weight_decay=1e-4,
                                     betas=(0.9, 0.999), fused=model.device.type == "cuda")
        self.ema = [w.detach().clone() for w in model.trained()] if cfg.ema else []
        self.prompts = read_prompts(cfg.eval_prompts or cfg.prompts)
        if not cfg.eval_prompts:
            self.prompts = [self.prompts[i] for i in evenly_spaced(len(self.prompts), 8)]
        self.settings = json.dumps({**asdict(cfg), "contents": contents(cfg)}, indent=1)
        self.iteration, self.before, self.stop, self.skips = 0, None, False, 0
        self.resumed = (checkpoints(self.out) or [None])[-1] if cfg.resume else None
        if self.resumed:
            try:
                state = torch.load(self.resumed / "state/state.pt", map_location="cpu")
                self.iteration, self.before = state["iteration"], state["before"]
                if self.resumed.name != f"checkpoint-{self.iteration}":     # or it stays the newest
                    raise ValueError(f"it is that of iteration {self.iteration}, renamed")
                exchange_state(self.resumed / "state/sharded", model, self.opt, self.ema, load=True)
            except Exception as error:
                raise OSError(broken(self.resumed, error)) from error
        self.saved = self.iteration
        gather_objects(None)                    # a barrier: all have read before one writes,
        if RANK == 0:
            self.write_files()
        gather_objects(None)                    # and the files are there before any goes on
        done = [line["iter"] for line in self.lines() if "reward" not in line]
        self.evaluated = done[-1] if done else None

    def write_files(self):
        """The files of a new run; or those of a resumed one, as they were at its checkpoint."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.resumed:                    # delete what a run wrote, and nothing else
            for path in [*checkpoints(self.out), *(self.out / name for name in RUN_FILES)]:
                discard(path)
        for path in [*self.out.glob("checkpoint-*.old"), self.out / "checkpoint.new"]:
            shutil.rmtree(path, ignore_errors=True)             # leftovers of a killed save
        kept = [line for line in self.lines() if line["iter"] <= self.iteration]
        write_atomically(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        (self.out / "config.json").write_text(self.settings, encoding="utf-8")
        (self.out / "samples").mkdir(exist_ok=True)
        for name in self.cfg.code:              # keep the loss that this run was made with
            shutil.copyfile(HERE / name, self.out / Path(name).name)    # without its permissions
        self.watchers = start_watchers(self.out, self.cfg.wandb, asdict(self.cfg), self.iteration)

    # ---------------------------------------------------------------------- the loop's frame

    def iterations(self):
        """Count through the iterations that are left, until one process was told to stop."""
        c = self.cfg
        with tqdm(range(self.iteration, c.iterations), initial=self.iteration, total=c.iterations,
                  desc="train", disable=True if RANK else None) as self.bar:
            for it in self.bar:
                if any(gather_objects(self.stop)):
                    return
                self.norms, self.skipped = [], 0
                yield it
                self.iteration = it + 1

    def stop_soon(self):
        """Let the current iteration end, so that --resume repeats nothing."""
        self.stop = True
        if RANK == 0:
            tqdm.write("stopping after this iteration, with a checkpoint and pictures; press "
                       "Ctrl-C again to stop at once, without them")

    def finish(self):
        """The last checkpoint and evaluation, and the curve."""
        self.save()
        if self.cfg.eval_every:
            self.evaluate()
        if RANK == 0:
            attempt("curve.png", lambda: draw_curve(self.lines(), self.out / "curve.png"))
            if self.cfg.eval_every:
                attempt("the last table", self.print_table)
            files = ", ".join(sorted(path.name for path in self.out.glob("[!.]*")))
            print(f"wrote {self.out}/: {files}")

    def print_table(self):
        """Base, aligned model; and real pictures, if <eval_prompts>.real.json has their scores."""
        path = Path(self.cfg.eval_prompts or "none").with_suffix(".real.json")
        real = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        evaluations = [line for line in self.lines() if "reward" not in line]
        first, last = evaluations[0], evaluations[-1]
        print(f"\n{'':14}    base  aligned" + "     real  share of the gap" * bool(real))
        for name in self.scorers:
            base, now = first.get(f"eval_{name}"), last.get(f"eval_{name}")
            if base is not None and now is not None:
                r = real.get(name, base)
                gap = f"{r:9.3f}  {(now - base) / (r - base):10.0%}" if r != base else ""
                print(f"{name:14}{base:8.3f}{now:9.3f}{gap}")

    def diverged(self, what):
        return ArithmeticError(f"iteration {self.iteration + 1}: {what}; lower lr (now "
                               f"{self.cfg.lr:g}); {self.newest()}")

    def newest(self):
        found = checkpoints(self.out)
        return (f"{found[-1]} is whole, and --resume goes on from there" if found else
                "no checkpoint was written before")

    def check_finite(self, latents):
        """The run ends if latents are not finite."""
        if not latents.isfinite().all():
            raise self.diverged("the model's latents are no longer finite")

    def count_update(self, norm):
        """Note an update's gradient norm. The update was skipped if it is not finite."""
        self.norms.append(norm)
        self.skips = 0 if norm.isfinite() else self.skips + 1
        self.skipped += self.skips > 0
        if self.skips and RANK == 0:
            tqdm.write(f"iter {self.iteration + 1}: the gradient is not finite; this update is "
                       "skipped")
        if self.skips >= MAX_SKIPS:
            raise self.diverged(f"{self.skips} updates in a row had no finite gradient; look at "
                                "the rewards")

    # ---------------------------------------------------------------------- the log

    def lines(self):
        return read_log(self.out)

    def write(self, line):
        """Append a line to log.jsonl; send it to TensorBoard and Weights & Biases."""
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in line.items()}                 # JSON has no nan
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "iter" and value is not None}
        for name, send in [*self.watchers.items()]:
            attempt(name, lambda: send(numbers, step=line["iter"]),
                    otherwise=lambda: self.watchers.pop(name))

    def log(self, it, scores, A, log_rhos, seconds, nfe_old, nfe_theta):
        """One line for all processes, in log.jsonl and on the screen. It has no loss, which is 0
        before the first update whatever the model does.

        scores {name: (P, G)}, A (P, G); log_rhos: one (..., G) for each trained step, or none.
        The reward of several scorers is a weighted mean of raw scores; training standardises them.
        """
        c, weights = self.cfg, parse_weights(self.cfg.reward_weights, scores).to(A)
        reward = sum(w * s for w, s in zip(weights, scores.values())) / weights.sum()
        line = dict(iter=it + 1, reward=reward, reward_std=reward.std(1), **scores,
                    first_ratio=None, clip_fraction=None, grad_norm=torch.stack(self.norms),
                    flat_groups=int((A == 0).all(1).sum()), skipped=self.skipped, **seconds,
                    nfe_old=nfe_old * self.model.nfe, nfe_theta=nfe_theta * self.model.nfe)
        if log_rhos:
            log_rho = torch.cat([r.flatten() for r in log_rhos])
            first = log_rho[: len(log_rho) // c.updates_per_iteration]          # before any update
            line["first_ratio"] = first.clamp(max=80).expm1().abs().max().item()
            line["clip_fraction"] = clip_fraction(log_rho, c.clip_eps)[None]    # tensor: averaged
        if self.model.device.type == "cuda":
            line["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9   # of the fullest GPU
        line = merge(gather_objects({key: value.cpu() if isinstance(value, torch.Tensor) else value
                                     for key, value in line.items()}))
        if RANK:
            return
        self.write(line)
        each = " ".join(f"{name} {line[name]:.4f}" for name in scores) + " | "
        ratio = (f"rho1 {1 + line['first_ratio']:.6f} clip {line['clip_fraction']:.2f} | "
                 if log_rhos else "")
        memory = f" | {line['peak_gb']:.1f} GB" if "peak_gb" in line else ""
        tqdm.write(
            f"iter {line['iter']:03d}/{c.iterations} | "
            f"reward {line['reward']:.4f} +- {line['reward_std']:.4f} | {each * (len(scores) > 1)}"
            f"{ratio}gnorm {line['grad_norm']:.2e} | "
            f"flat {line['flat_groups']} skip {line['skipped']} | "
            f"roll {line['seconds_rollout']:.2f}s score {line['seconds_reward']:.2f}s "
            f"update {line['seconds_update']:.2f}s{memory}")
        self.bar.set_postfix_str(f"reward {line['reward']:.4f}")

    def evaluate(self):
        """Sample the held-out prompts, always from the same noise. Scores go into the log, a few
        pictures into samples/, beside those of the base."""
        if self.evaluated == self.iteration:
            return
        n, c = len(self.prompts), self.cfg
        solver = "dpmpp_2m" if c.eval_steps else c.solver
        ts = times(c.shift, self.model, c.eval_steps or c.num_rollout_steps)
        at_once = c.prompts_per_iteration // WORLD * c.group_size       # as many as in a rollout

        def sample_and_score(mine):
            images, scores, lengths = evaluate(self.model, self.scorers, self.prompts, ts, solver,
                                               seed=1_000_000, batch=at_once, chosen=mine)
            return {**scores, "images": images, "velocity lengths": lengths}

        with self.averaged():
            scores = share_work(n, sample_and_score)                    # {name: (n, 1)}
        images, show = scores.pop("images"), evenly_spaced(n, 12)       # (n, 1, 3, H, W)
        lengths = scores.pop("velocity lengths")                        # (n, 1)
        self.evaluated = self.iteration
        self.before = self.before or dict(images=images[show, 0], scores=scores, lengths=lengths)
        line, said, rose, fell = dict(iter=self.iteration), [], [], []
        watched = rewards.parse(c.eval_scorers)
        for name in scores:                     # gains are paired: same prompt, same noise
            mean, stderr = mean_and_stderr(scores[name])
            gain, gain_stderr = mean_and_stderr(scores[name] - self.before["scores"][name])
            line |= {f"eval_{name}": mean, f"eval_{name}_stderr": stderr,
                     f"eval_{name}_gain": gain, f"eval_{name}_gain_stderr": gain_stderr}
            said.append(f"{name} {mean:.4f} +- {stderr:.4f}, gain {gain:+.4f} +- {gain_stderr:.4f}"
                        if math.isfinite(mean) else f"{name} missing")
            if name not in watched and gain > 3 * gain_stderr > 0:
                rose.append(name)
            if name in watched and gain < -3 * gain_stderr < 0:
                fell.append(name)
        # Alignment may make the velocity longer, and pictures worse: NormGuard, arXiv 2606.27771.
        # A checkpoint of an older version has no lengths.
        ratio = (lengths.mean() / self.before.get("lengths", torch.tensor(torch.nan)).mean()).item()
        line |= dict(velocity_ratio=ratio, fallen=len(fell) if rose else 0)
        if RANK:
            return
        self.write(line)
        tqdm.write(" | ".join([
            f"eval {self.iteration:03d}", f"{n} {'held-out' if c.eval_prompts else 'training'} "
            "prompts", *said, f"velocity {ratio:.3f} times the base's"]))
        if line["fallen"]:
            tqdm.write(f"eval {self.iteration:03d}: {', '.join(fell)} fell below the base while "
                       f"{', '.join(rose)} rose, each by more than three standard errors; the "
                       "reward may be exploited: see \"When it goes wrong\" in README.md")
        rows = {"base": self.before["images"]}
        if self.iteration:
            rows[f"aligned, {self.iteration} iterations"] = images[show, 0]
        picture = self.out / f"samples/{self.iteration:06d}.png"

        def draw():                             # of videos there is a moving picture, too
            picture_grid(picture, rows, [self.prompts[i] for i in show])
            for file in picture.parent.glob(f"{picture.stem}.*"):
                shutil.copyfile(file, self.out / f"before_after{file.suffix}")
            if not self.iteration:
                tqdm.write(f"pictures of the base: {picture}")

        attempt(picture, draw)

    # ---------------------------------------------------------------------- checkpoints

    def save(self):
        """checkpoint-<iteration>/: a FluxPipeline directory, or adapters; in state/ what --resume
        needs. It is written under another name, synced to the disk, then renamed."""
        if self.saved == self.iteration:
            return
        path, aside = self.out / f"checkpoint-{self.iteration}", self.out / "checkpoint.new"
        try:
            if RANK == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / "state").mkdir(parents=True)
            gather_objects(None)
            exchange_state(aside / "state/sharded", self.model, self.opt, self.ema)
            with self.averaged():
                weights = whole_weights(self.model) if self.cfg.fsdp else None
                if RANK == 0:
                    self.model.save(aside, weights)
            if RANK == 0:
                (aside / "state/config.json").write_text(self.settings, encoding="utf-8")
                state = dict(iteration=self.iteration, before=self.before)
                torch.save(state, aside / "state/state.pt")
                discard(path)
                if hasattr(os, "sync"):         # not on Windows
                    os.sync()                   # or a power cut leaves the new name on empty files
                os.replace(aside, path)
                for old in checkpoints(self.out)[: -self.cfg.keep] if self.cfg.keep else ():
                    discard(old)
        except Exception as error:              # mostly a full disk
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self.out).free / 1e9
            raise OSError(f"{path} could not be written ({one_line(error)}), with {free:.1f} GB "
                          f"free on the disk; {self.newest()}") from error
        self.saved = self.iteration
        gather_objects(None)                    # a barrier: nobody goes on before it is whole

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has the average of its weights, if one is kept."""
        weights = self.model.trained() if self.ema else []      # with FSDP this process's shards
        kept = [w.detach().clone() for w in weights]

        @torch.no_grad()
        def put(values):
            for w, value in zip(weights, values):
                w.copy_(value)

        put(self.ema)
        try:
            yield
        finally:
            put(kept)
