"""
reproduce.py's sums, on curves that were drawn by hand. One test per sentence.

    python -m pytest -q test_reproduce.py
"""
import argparse, json, math, os, shutil, signal, threading, time
import numpy as np
import pytest
from numpy.testing import assert_allclose
from paper import baselines, reproduce
from paper.reproduce import HERE, curve, first_time, group_of, over_seeds, shown, times_to


def log(*points):
    return [dict(iter=0, reward=1.0)] + [dict(iter=it, eval_clip=0.5, eval_clip_gain=gain, eval_judge_gain=-gain) for it, gain in points]


def test_a_curve_is_straight_between_evaluations_and_given_at_the_tenths_of_its_run():
    iterations, gains = curve(log((0, 0.0), (33, 0.33), (50, 0.5), (100, 0.0)))
    assert_allclose(iterations, np.arange(0, 101, 10))
    assert_allclose(gains, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    assert_allclose(curve(log((0, 0.0), (10, 0.5)), "judge")[1], -np.arange(11) / 20)


def test_the_time_to_a_goal_lies_on_the_line_between_two_evaluations_and_is_infinite_if_it_is_never_reached():
    times, gains = [0, 10, 20, 30], [0.0, 0.2, 0.1, 0.4]
    assert first_time(times, gains, 0.1) == 5 and first_time(times, gains, 0.3) == pytest.approx(20 + 10 * 2 / 3) and first_time(times, gains, 0.4) == 30
    assert first_time(times, gains, 0.5) == math.inf and first_time(times, gains, -0.2) == 0


def test_one_seed_that_misses_the_goal_is_said_and_not_averaged_away():
    fast, slow, never = ([0, 10], [0.0, 1.0]), ([0, 10], [0.0, 0.5]), ([0, 10], [0.0, 0.4])
    assert times_to([fast, slow], 0.5, 20) == "0.38 ± 0.12" and times_to([fast, slow, never], 0.5, 20) == "not reached by 1 of 3"
    assert times_to([fast, slow], -0.1, first_time([0, 10], [0.0, -0.1], -0.1)) == "the goal is no gain"        # a rival that lost is reached at once


def test_the_error_is_the_standard_error_over_seeds_and_one_seed_has_none():
    mean, error = over_seeds([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(7**0.5 / 3**0.5)
    assert shown([0.25]) == "0.2500" and shown([1.0, 3.0], 1, "+") == "+2.0 ± 1.0"


def settings(tmp_path, **more):
    return argparse.Namespace(**{**dict(out=tmp_path, results=tmp_path, jobs=1, seeds=1, iterations=60, repeats=1, quick=False), **more})


def test_runs_last_equal_seconds_and_what_was_found_once_is_found_again_only_for_the_same_question(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce, "costs", reproduce.cached(lambda args: args.repeats)(named("costs", lambda args: asked.append(1) or {label: dict(seconds=2.0 if label == reproduce.OURS else 8.0) for label in reproduce.METHODS})))
    args = settings(tmp_path)
    assert reproduce.lasting(args, "DanceGRPO") == 15 and reproduce.lasting(args, reproduce.OURS) == reproduce.lasting(args, "Neighbor GRPO, sigma 0.5, p = 2") == 60
    assert len(asked) == 1
    reproduce.costs(settings(tmp_path, repeats=2))
    assert len(asked) == 2


def test_every_row_runs_its_method_with_the_settings_it_is_named_for(tmp_path):
    found = {}
    for label, (script, _, family) in reproduce.METHODS.items():
        folder, (its, flags) = reproduce.job(settings(tmp_path), label, 0, 2e-5, 1e-4, 100)
        cfg = (reproduce.train if its == "train.py" else baselines).parse_config([*flags, "--out_dir", str(folder)])
        old, theta = (cfg.num_rollout_steps, cfg.num_anchors * cfg.num_train_steps / 12) if its == "train.py" else baselines.nfe(cfg)
        found[label] = old, round(theta, 3), getattr(cfg, "window_every", cfg.p)
        assert getattr(cfg, "method", "neighbor") == family and (cfg.lr, cfg.iterations, cfg.eval_steps, cfg.seed) == (2e-5, 100, 16, 0)
    assert found == {"DanceGRPO": (25, 14, 0), "Flow-GRPO": (6, 5, 0), "MixGRPO": (25, 4, 8), "MixGRPO-Flash*": (8, 4, 0), "BranchGRPO": (203 / 16, 13.625, 30), "BranchGRPO, pruned": (203 / 16, 8.625, 10),
                     "DiffusionNFT": (19, 9, 0), "Neighbor GRPO, 25 steps": (25, 4, 0.8), "Neighbor GRPO, 16 steps": (16, 3, 0.8), "Neighbor GRPO, 8 steps": (8, 1.333, 0.8),
                     "Neighbor GRPO, sigma 0.5, p = 2": (8, 1.333, 2), "Neighbor GRPO, sigma 0.5, p = 0.8": (8, 1.333, 0.8)}               # published: the window moves 12 times, the pruned depths 10 times


def test_the_papers_columns_are_gains_over_its_base():
    assert reproduce.paper_gains("table1", "Neighbor GRPO, 8 steps") == ["+0.056", "+0.002"] and reproduce.paper_gains("table4", 0.1) == ["+0.047", "-0.025"]
    assert reproduce.paper_gains("table1", "DiffusionNFT") == ["", ""]


def test_final_scores_are_read_by_their_checkpoints_names_and_the_base_is_the_first(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        for iteration in (3, 12):
            (folder / f"checkpoint-{iteration}/state").mkdir(parents=True)
            (folder / f"checkpoint-{iteration}/state/state.pt").touch()
    rows = [dict(label="tiny-flux", clip=1), dict(label="b-checkpoint-12", clip=2), dict(label="a-checkpoint-12", clip=3)]
    def evaluate(command, **_):
        (tmp_path / "eval").mkdir()
        assert all(str(folder / "checkpoint-12") in command for folder in folders) and command[command.index("--steps") + 1] == "16"
        (tmp_path / "eval/results.json").write_text(json.dumps(dict(results=rows)))
    monkeypatch.setattr(reproduce.subprocess, "run", evaluate)
    assert reproduce.finals(settings(tmp_path), folders) == {"base": rows[0], folders[0]: rows[2], folders[1]: rows[1]}


def test_the_sweep_tries_each_methods_two_best_learning_rates_over_the_whole_seconds_and_takes_what_is_better_then(tmp_path, monkeypatch):
    """A made-up reward: 1e-4 is best after a third of the seconds, but 5e-5 over the whole of them; 2e-5 would be best of all then, but is not tried again. The wider clip is always better. 2e-4 diverges."""
    reward = {"20": {"2e-05": 0.1, "5e-05": 0.2, "0.0001": 0.3}, "60": {"2e-05": 9, "5e-05": 0.25, "0.0001": 0.2}}
    calls = []
    def run(args, jobs, may_diverge):
        after = lambda flags, key: flags[flags.index(key) + 1]
        assert all(after(flags, "--eval_prompts") == "tiny/prompts/test_pair.txt" for _, flags in jobs.values())               # no table's
        calls.append({(flags[flags.index("--method") + 1] if "--method" in flags else "neighbor", after(flags, "--lr"), after(flags, "--clip_eps"), after(flags, "--seed")) for _, flags in jobs.values()})
        return {folder: [dict(iter=it, eval_clip=0.5, eval_clip_gain=gain, eval_judge_gain=0.0) for it, gain in ((0, 0.0), (9, reward[after(flags, "--iterations")][after(flags, "--lr")] + (after(flags, "--clip_eps") == "0.001")))]
                if after(flags, "--lr") != "0.0002" else [] for folder, (_, flags) in jobs.items()}
    monkeypatch.setattr(reproduce, "run", run)
    monkeypatch.setattr(reproduce, "costs", lambda args: {label: dict(seconds=1.0) for label in reproduce.METHODS})
    found = reproduce.tuned(settings(tmp_path))
    methods = ("dance", "flow", "mix", "flash", "branch", "neighbor")
    assert found == {**dict.fromkeys(methods, [5e-5, 1e-3]), "nft": [5e-5, 1e-4]}
    assert len(calls[0]) == 6 * 8 + 4 and {seed for *_, seed in calls[0]} == {"1000"}                  # nor these seeds
    assert calls[1] == {(method, lr, "0.001", "1001") for method in methods for lr in ("5e-05", "0.0001")} | {("nft", lr, "0.0001", "1001") for lr in ("5e-05", "0.0001")}


def named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("table", reproduce.SWEEPS)
def test_a_sweep_moves_one_setting_holds_the_others_and_lasts_equal_iterations(tmp_path, monkeypatch, table):
    asked = {}
    monkeypatch.setattr(reproduce, "costs", lambda args: {label: dict(seconds=2.0) for label in reproduce.METHODS})
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict(neighbor=(3e-5, 1e-3)))
    monkeypatch.setattr(reproduce, "run", lambda args, *groups: [asked.update(group) for group in groups])
    def finals(args, logs):
        found, flag = {}, reproduce.SWEEPS[table][0]
        for folder, (_, flags) in asked.items():
            cfg = reproduce.train.parse_config([*flags, "--out_dir", str(folder)])
            moved = dict(sigma=cfg.sigma, num_anchors=cfg.num_anchors, p=cfg.p)
            if (cfg.iterations, cfg.lr, cfg.clip_eps) == (60, 3e-5, 1e-3) and moved == {**reproduce.START, flag: moved[flag]}:
                found[folder] = dict.fromkeys(("clip_gain", "judge_gain", "diversity"), moved[flag])
        return found
    monkeypatch.setattr(reproduce, "finals", finals)
    _, rows, _, _ = reproduce.ablation(settings(tmp_path, seeds=2), table)
    for value, row in zip(reproduce.SWEEPS[table][1], rows, strict=True):
        assert row[:2] == [f"{value:g}", f"{value:+.4f} ± 0.0000"]               # each run's own flag, both seeds'
    assert len(asked) == 2 * len(rows)


def test_a_run_that_is_whole_is_not_made_again_one_that_was_stopped_goes_on_and_one_asked_for_otherwise_begins_anew(tmp_path):
    script = tmp_path / "stub.py"
    script.write_text("""
import json, pathlib, sys
out, last = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1]), int(sys.argv[sys.argv.index("--iterations") + 1])
print(sys.argv, file=open(out.parent / "calls", "a"))
if (out.parent / "wait").exists():
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((out.parent / "ended").touch()))
    (out.parent / "waits").touch()
    signal.pause()
if (out.parent / "diverge").exists():
    sys.exit("train.py: the model's latents are no longer finite")
(out / "checkpoint-1/state").mkdir(parents=True, exist_ok=True)
(out / "checkpoint-1/state/state.pt").touch()
stop = (out.parent / "stop").exists()
(out / "log.jsonl").write_text(json.dumps(dict(iter=1 if stop else last, eval_clip=0.5, eval_clip_gain=0.1)) + "\\n" + '{"iter": 2, "cut')
sys.exit((out.parent / "fail").exists())
""")
    args, folder = settings(tmp_path), tmp_path / "run-1e-05"
    calls = lambda: (tmp_path / "calls").read_text().splitlines()
    three, four = ({folder: (str(script), ["--iterations", number])} for number in "34")
    (tmp_path / "stop").touch()
    with pytest.raises(RuntimeError, match="before it was done"):               # its exit status was 0
        reproduce.run(args, three)
    (tmp_path / "stop").unlink()
    assert reproduce.run(args, three) == reproduce.run(args, three) == {folder: [dict(iter=3, eval_clip=0.5, eval_clip_gain=0.1)]}
    assert len(calls()) == 2 and "--overwrite" in calls()[0] and "--resume" in calls()[1]
    pictures, others = tmp_path / f"eval/{folder.name}-checkpoint-3", tmp_path / "eval/run-2e-05-checkpoint-3"
    pictures.mkdir(parents=True)
    others.mkdir()
    (tmp_path / "stop").touch()
    with pytest.raises(RuntimeError, match="before it was done"):
        reproduce.run(args, four)
    (tmp_path / "stop").unlink()
    assert "--overwrite" in calls()[2] and not pictures.exists() and others.exists()
    reproduce.run(args, three)                                  # the folder holds what is left of `four`
    assert "--overwrite" in calls()[3]
    (tmp_path / "diverge").touch()
    with pytest.raises(RuntimeError, match="diverged"):
        reproduce.run(args, four)
    assert reproduce.run(args, four, may_diverge=True) == {folder: []} and len(calls()) == 5
    (tmp_path / "diverge").unlink()
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="ended with 1"):                     # after its last iteration
        reproduce.run(args, three)
    (tmp_path / "fail").unlink()
    reproduce.run(args, three)
    shutil.rmtree(folder)                                       # by hand; what is noted beside it says that it was whole
    reproduce.run(args, three)
    assert len(calls()) == 8 and "--overwrite" in calls()[7]
    (tmp_path / "wait").touch()
    before = signal.signal(signal.SIGTERM, reproduce.stop)
    threading.Thread(target=lambda: (wait_for(tmp_path / "waits"), os.kill(os.getpid(), signal.SIGTERM))).start()
    with pytest.raises(KeyboardInterrupt):
        reproduce.run(args, four)
    signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "ended").exists() and not reproduce.RUNNING


def wait_for(path):
    while not path.exists():
        time.sleep(0.05)


def test_methods_are_compared_by_seconds_and_the_goal_is_the_rivals_last_mean(tmp_path, monkeypatch):
    """DanceGRPO: 8 s an iteration, ten of them, evenly to +0.3 and +0.5, and at the very end back to +0.1 and +0.3. Neighbor GRPO: 2 s, forty, evenly to +0.4: +0.2 after 40 s, where DanceGRPO's mean first has it after 36."""
    costs = {label: dict(seconds=2.0 if label == reproduce.OURS else 8.0, solver="", nfe_old=1, nfe_theta=1) for label in reproduce.METHODS}
    monkeypatch.setattr(reproduce, "costs", lambda args: costs)
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict.fromkeys(("dance", "neighbor"), (1e-5, 1e-4)))
    ends = {("-m paper.baselines", "0"): 0.1, ("-m paper.baselines", "1"): 0.3, ("train.py", "0"): 0.4, ("train.py", "1"): 0.4}
    def run(args, *groups):
        found = {}
        for folder, (script, flags) in [what for group in groups for what in group.items()]:
            last, end = int(flags[flags.index("--iterations") + 1]), ends[script, flags[flags.index("--seed") + 1]]
            found[folder] = [dict(iter=it, eval_clip=0.5, eval_clip_gain=end * it / last) for it in (0, last)]
            if script == "-m paper.baselines":
                found[folder].insert(1, dict(iter=last - 1, eval_clip=0.5, eval_clip_gain=end + 0.2))
        return found
    monkeypatch.setattr(reproduce, "run", run)
    row = dict(clip=0.5, judge=0.6, clip_gain=0.1, judge_gain=-0.1, diversity=0.2)
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {"base": row, **{folder: row for folder in logs}})
    monkeypatch.setattr(reproduce, "checkpoints", lambda folder: [folder])
    monkeypatch.setattr(reproduce, "pictures", lambda *_: None)
    monkeypatch.setattr(reproduce, "picture_grid", lambda *_: None)
    head, rows, data, _ = reproduce.compare(settings(tmp_path, seeds=2, iterations=40), "table1", ["DanceGRPO", reproduce.OURS], "")
    times = {line[0]: line[[name.startswith("time to") for name in head].index(True)] for line in rows}
    assert data["goal"] == pytest.approx(0.2) and times == {"base": "", "DanceGRPO": "1", reproduce.OURS: "1.11 ± 0.00"}
    assert [line[head.index("iterations")] for line in rows[1:]] == [10, 40]
    assert all(line[head.index("reward")].startswith("0.5") and line[head.index("judge")].startswith("0.6") for line in rows) and [line[head.index("judge") + 1] for line in rows[1:]] == ["-0.1000 ± 0.0000"] * 2


def test_a_rollout_group_of_the_figures_is_one_of_training():
    def within_and_between(sigma):
        images, r = group_of(HERE / "tiny/flux", ["a dog", "a dog"], seed=0, sigma=sigma, G=3)
        assert images.shape == (2, 3, 3, 64, 64) and r.shape == (2, 3)
        return (images[0, 0] - images[0, 1]).pow(2).mean(), (images[0, 0] - images[1, 0]).pow(2).mean()
    within, between = within_and_between(0.3)                   # neighbours of one noise, of two
    assert 0 < within < between / 2
    within, between = within_and_between(1.0)                   # no neighbours any more
    assert within > between / 2


def test_every_row_of_the_papers_tables_has_a_row_here():
    for name, labels in (("table1", reproduce.TABLE1), ("table2", reproduce.TABLE2), ("table3", reproduce.METHODS)):
        assert set(reproduce.PAPER[name]) <= set(labels)
    for name, (_, values) in reproduce.SWEEPS.items():
        assert set(reproduce.PAPER[name]) == set(values)
