"""
What paper/reproduce.py computes, on curves made by hand, and the runs of paper/jobs.py. One test
per sentence.

    python -m pytest -q tests/test_reproduce.py
"""
import argparse, json, math, os, shutil, signal, threading, time
import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
import train
from paper import baselines, jobs, reproduce
from paper.reproduce import HERE, OURS, between_flawless, curve, group_of, over_seeds, shown


def settings(tmp_path, **more):
    args = dict(out=tmp_path, results=tmp_path, jobs=1, seeds=1, iterations=60, repeats=1,
                quick=False)
    return argparse.Namespace(**{**args, **more})


def after(flags, name):
    return flags[flags.index(name) + 1]


# ============================================================================ curves and errors

def log(*points):
    return [dict(iter=0, reward=1.0)] + [
        dict(iter=it, eval_preference=0.5, eval_preference_gain=gain, eval_judge_gain=-gain)
        for it, gain in points]


def test_a_curve_is_straight_between_evaluations_and_has_a_value_at_every_tenth_of_its_run():
    iterations, gains = curve(log((0, 0.0), (33, 0.33), (50, 0.5), (100, 0.0)))
    assert_allclose(iterations, np.arange(0, 101, 10))
    assert_allclose(gains, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    assert_allclose(curve(log((0, 0.0), (10, 0.5)), "judge")[1], -np.arange(11) / 20)


def test_the_error_is_the_standard_error_over_seeds_and_one_seed_has_none():
    mean, error = over_seeds([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(7**0.5 / 3**0.5)
    assert shown([0.25]) == "0.2500" and shown([1.0, 3.0], 1, "+") == "+2.0 ± 1.0"


# ============================================================================ the runs of a table

def all_cost(seconds):
    """costs(args) if an iteration takes these seconds, but 2 for ours."""
    return {label: dict(seconds=2.0 if label == OURS else seconds, solver="", nfe_old=1,
                        nfe_theta=1) for label in reproduce.METHODS}


def test_runs_last_equal_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "costs", lambda args: all_cost(8.0))
    args = settings(tmp_path)
    assert reproduce.lasting(args, "DanceGRPO") == 15
    assert reproduce.lasting(args, OURS) == reproduce.lasting(args, reproduce.OURS_2) == 60


def test_every_method_has_its_own_seconds_but_variants_of_ours_share_them(tmp_path, monkeypatch):
    seconds = {label: {"seconds": n} for n, label in enumerate(reproduce.METHODS)}
    monkeypatch.setattr(reproduce, "costs", lambda args: seconds)
    for n, label in enumerate(reproduce.METHODS):
        shared = label in (reproduce.OURS_2, reproduce.OURS_08)
        expected = seconds[OURS]["seconds"] if shared else n
        assert reproduce.cost_of(settings(tmp_path), label)["seconds"] == expected


def test_a_saved_result_is_used_only_for_the_same_inputs(tmp_path):
    asked = []

    @jobs.cached(lambda args: args.repeats)
    def costs(args):
        asked.append(args.repeats)
        return {"DanceGRPO": (2.0, args.repeats)}

    for repeats in (1, 1, 2, 2, 1):
        assert costs(settings(tmp_path, repeats=repeats)) == {"DanceGRPO": [2.0, repeats]}
    assert asked == [1, 2, 1] and (tmp_path / "costs.json").exists()


def test_every_row_runs_its_method_with_the_settings_that_its_label_says(tmp_path):
    found = {}
    for label, (script, _, family) in reproduce.METHODS.items():
        folder, (its, flags) = reproduce.job(settings(tmp_path), label, 0, 2e-5, 1e-4, 100)
        parse = train.parse_config if its == "train.py" else baselines.parse_config
        cfg = parse([*flags, "--out_dir", str(folder)])
        if its == "train.py":
            old, theta = cfg.num_rollout_steps, cfg.num_anchors * cfg.num_train_steps / 12
        else:
            old, theta = baselines.nfe(cfg)
        found[label] = old, round(theta, 3), getattr(cfg, "window_every", cfg.p)
        assert its == script and cfg.method == family
        assert (cfg.lr, cfg.iterations, cfg.eval_steps, cfg.seed) == (2e-5, 100, 16, 0)
    assert found == {   # published: the window moves 12 times, the pruned depths 10 times
        "DanceGRPO": (25, 14, 0), "Flow-GRPO": (6, 5, 0), "MixGRPO": (25, 4, 8),
        "MixGRPO-Flash*": (8, 4, 0), "BranchGRPO": (203 / 16, 13.625, 30),
        "BranchGRPO, pruned": (203 / 16, 8.625, 10), "DiffusionNFT": (19, 9, 0),
        "FDFO": (40, 40, 0),
        "Neighbor GRPO, 25 steps": (25, 4, 0.8), "Neighbor GRPO, 16 steps": (16, 3, 0.8),
        "Neighbor GRPO, 8 steps": (8, 1.333, 0.8), "Neighbor GRPO, sigma 0.5, p = 2": (8, 1.333, 2),
        "Neighbor GRPO, sigma 0.5, p = 0.8": (8, 1.333, 0.8)}


def test_every_row_of_the_papers_tables_has_a_row_here():
    for name, labels in (("table1", reproduce.TABLE1), ("table2", reproduce.TABLE2),
                         ("table3", reproduce.METHODS)):
        assert set(reproduce.PAPER[name]) <= set(labels)
    for name, (_, values) in reproduce.SWEEPS.items():
        assert set(reproduce.PAPER[name]) == set(values)


def test_the_papers_columns_are_gains_over_the_papers_base():
    assert reproduce.paper_gains("table1", "Neighbor GRPO, 8 steps") == ["+0.056", "+0.002"]
    assert reproduce.paper_gains("table4", 0.1) == ["+0.047", "-0.025"]
    assert reproduce.paper_gains("table1", "DiffusionNFT") == ["", ""]


# ============================================================================ tables

def test_final_scores_are_found_by_the_checkpoints_names_and_the_first_row_is_the_base(
        tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        for iteration in (3, 12):
            (folder / f"checkpoint-{iteration}/state").mkdir(parents=True)
            (folder / f"checkpoint-{iteration}/state/state.pt").touch()
    rows = [dict(label="tiny-flux", preference=1), dict(label="b-checkpoint-12", preference=2),
            dict(label="a-checkpoint-12", preference=3)]

    def evaluate(command, **_):
        assert all(str(folder / "checkpoint-12") in command for folder in folders)
        assert after(command, "--steps") == "16"
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval/results.json").write_text(json.dumps(dict(results=rows)))

    apart = {"tiny-flux": [1, math.nan, 3], "b-checkpoint-12": [2, 9, 4],
             "a-checkpoint-12": [math.nan, 9, 5]}
    monkeypatch.setattr(reproduce, "between_flawless", lambda path: np.array(apart[path.name]))
    monkeypatch.setattr(reproduce.subprocess, "run", evaluate)
    found = reproduce.finals(settings(tmp_path), folders)
    # where the base has no two flawless pictures, those of the others do not count either
    assert found == {"base": dict(label="tiny-flux", preference=1, between_flawless=2),
                     folders[0]: dict(label="a-checkpoint-12", preference=3, between_flawless=5),
                     folders[1]: dict(label="b-checkpoint-12", preference=2, between_flawless=3)}


def test_the_distance_of_flawless_pictures_leaves_out_flawed_ones_and_prompts_with_less_than_two(
        tmp_path):
    probabilities = [[0.9, 0.8, 0.1, 0.0], [0.9, 0.1, 0.2, 0.3]]
    (tmp_path / "pictures").mkdir()
    for i, flawless in enumerate(probabilities):
        (tmp_path / f"pictures/{i:05d}.json").write_text(json.dumps(dict(flawless=flawless)))
        for k, grey in enumerate((0, 51, 255, 102)):            # the first two differ by 0.2
            Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / f"pictures/{i:05d}-{k}.png")
    assert_allclose(between_flawless(tmp_path), [0.2, math.nan], rtol=1e-6)


def test_the_sweep_tries_each_methods_two_best_rates_for_all_the_seconds_and_takes_the_better(
        tmp_path, monkeypatch):
    """The reward is made up. After a third of the seconds 1e-4 is best, after all of them 5e-5.
    Then 2e-5 would be even better, but it is not tried again. The wider clip is better at first,
    and worse in the end. 2e-4 diverges."""
    reward = {"20": {"2e-05": 0.1, "5e-05": 0.2, "0.0001": 0.3},
              "60": {"2e-05": 9, "5e-05": 0.25, "0.0001": 0.2}}
    calls = []

    def log_of(flags):
        if after(flags, "--lr") == "0.0002":
            return []
        iterations = after(flags, "--iterations")
        better_clip = {"20": "0.001", "60": "0.0001"}[iterations]
        gain = reward[iterations][after(flags, "--lr")]
        gain += after(flags, "--clip_eps") == better_clip
        return log((0, 0.0), (9, gain))

    def run_all(args, asked, may_diverge):
        each = [flags for _, flags in asked.values()]
        calls.append({(after(flags, "--method") if "--method" in flags else "neighbor",
                       *(after(flags, name) for name in ("--lr", "--clip_eps", "--seed")))
                      for flags in each})
        prompts = {after(flags, "--eval_prompts") for flags in each}
        assert prompts == {"tiny/prompts/test_pair.txt"}        # no table uses them, or these seeds
        return {folder: log_of(flags) for folder, (_, flags) in asked.items()}

    monkeypatch.setattr(reproduce, "run_all", run_all)
    monkeypatch.setattr(reproduce, "costs", lambda args: all_cost(2.0))
    found = reproduce.tuned(settings(tmp_path))
    methods = ("dance", "flow", "mix", "flash", "branch", "neighbor")
    assert found == {**dict.fromkeys([*methods, "nft"], [5e-5, 1e-4]), "fdfo": [5e-5, 0.03]}
    assert len(calls) == 2 and len(calls[0]) == 6 * 8 + 2 * 4
    assert {seed for *_, seed in calls[0]} == {"1000"}
    clips = {**dict.fromkeys(methods, ("0.0001", "0.001")), "nft": ["0.0001"], "fdfo": ["0.03"]}
    assert calls[1] == {(method, lr, clip, "1001") for method, both in clips.items()
                        for clip in both for lr in ("5e-05", "0.0001")}


@pytest.mark.parametrize("table", reproduce.SWEEPS)
def test_a_sweep_changes_one_setting_keeps_the_others_and_has_equal_iterations(
        table, tmp_path, monkeypatch):
    asked, flag = {}, reproduce.SWEEPS[table][0]

    def finals(args, logs):
        found = {}
        for folder, (_, flags) in asked.items():
            cfg = train.parse_config([*flags, "--out_dir", str(folder)])
            moved = dict(sigma=cfg.sigma, num_anchors=cfg.num_anchors, p=cfg.p)
            assert (cfg.iterations, cfg.lr, cfg.clip_eps) == (60, 3e-5, 1e-3)
            assert moved == {**reproduce.START, flag: moved[flag]}
            keys = ("preference_gain", "judge_gain", "diversity")
            found[folder] = dict.fromkeys(keys, moved[flag] + cfg.seed)
        return found

    monkeypatch.setattr(reproduce, "costs", lambda args: all_cost(2.0))
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict(neighbor=(3e-5, 1e-3)))
    monkeypatch.setattr(reproduce, "run_all", lambda args, *groups: [
        asked.update(group) for group in groups])
    monkeypatch.setattr(reproduce, "finals", finals)
    _, rows, _, _ = reproduce.ablation(settings(tmp_path, seeds=2), table)
    for value, row in zip(reproduce.SWEEPS[table][1], rows, strict=True):
        assert row[:2] == [f"{value:g}", f"{value + 0.5:+.4f} ± 0.5000"]        # its own two runs
        over = value - reproduce.START[flag]    # the same for both seeds, so without an error
        assert row[3:5] == [f"{over:+.4f} ± 0.0000"] * 2
    assert len(asked) == 2 * len(rows)


@pytest.mark.parametrize("table", reproduce.VARIANTS)
def test_a_variant_is_the_tuned_run_but_for_its_own_settings_and_is_averaged_over_its_own_seeds(
        table, tmp_path, monkeypatch):
    asked, drawn = {}, []
    keys = ("preference_gain", "judge_gain", "named_gain", "flawless", "diversity",
            "between_flawless")
    monkeypatch.setattr(reproduce, "costs", lambda args: all_cost(2.0))
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict(neighbor=(3e-5, 1e-3)))
    monkeypatch.setattr(reproduce, "run_all", lambda args, *groups: [
        asked.update(group) for group in groups])
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {
        "base": dict.fromkeys(keys, 0.5),
        **{folder: dict.fromkeys(keys, i // 2) for i, folder in enumerate(asked)}})
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *got: drawn.append(got[1:]))
    _, rows, _, _ = reproduce.variants(settings(tmp_path, seeds=2), table)
    plain = train.parse_config(["--iterations", "60", "--lr", "3e-5", "--clip_eps", "1e-3"])
    for i, (label, flags) in enumerate(reproduce.VARIANTS[table].items()):
        for seed, (_, words) in enumerate(list(asked.values())[2 * i : 2 * i + 2]):
            cfg, own = train.parse_config(words), train.parse_config(flags.split())
            names = [word.removeprefix("--") for word in flags.split() if word[:2] == "--"]
            assert cfg.seed == seed and all(
                getattr(cfg, name) == getattr(own if name in names else plain, name)
                for name in ("rewards", "tau", "updates_per_iteration", "old_anchor", "lr",
                             "clip_eps", "iterations"))
        assert rows[1 + i][:2] == [label, f"{i:+.3f} ± 0.000"]          # its own two runs
        assert rows[1 + i][-2:] == [f"{i:+.4f} ± 0.0000"] * 2           # over the first variant's
    assert rows[0][:2] == ["base", "0.500"] and len(asked) == 2 * len(rows[1:])
    assert drawn[0][0] == table and list(drawn[0][1]) == list(reproduce.VARIANTS[table])


def test_methods_are_compared_after_equal_seconds_each_by_its_own_runs(tmp_path, monkeypatch):
    """DanceGRPO takes 8 s an iteration, Neighbor GRPO 2 s. It may have 40 of these."""
    gains = {("DanceGRPO", "0"): 0.1, ("DanceGRPO", "1"): 0.3, (OURS, "0"): 0.4, (OURS, "1"): 0.4}
    of_run = {}

    def run_all(args, *groups):
        for folder, (script, flags) in [what for group in groups for what in group.items()]:
            label = OURS if script == "train.py" else "DanceGRPO"
            of_run[folder] = gains[label, after(flags, "--seed")]
            yield folder, log((0, 0.0), (int(after(flags, "--iterations")), 9.0))

    def row(gain):
        return dict(preference=0.5 + gain, judge=0.6 - gain, preference_gain=gain,
                    judge_gain=-gain, diversity=0.2, between_flawless=0.1)

    monkeypatch.setattr(reproduce, "costs", lambda args: all_cost(8.0))
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict.fromkeys(
        ("dance", "neighbor"), (1e-5, 1e-4)))
    monkeypatch.setattr(reproduce, "run_all", lambda *got: dict(run_all(*got)))
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {
        "base": row(0), **{folder: row(of_run[folder]) for folder in logs}})
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *_: None)
    args = settings(tmp_path, seeds=2, iterations=40)
    head, rows, _, _ = reproduce.compare(args, "table1", ["DanceGRPO", OURS], "")
    columns = list(zip(*rows, strict=True))
    assert columns[0] == ("base", "DanceGRPO", OURS)
    assert columns[head.index("iterations")] == ("", 10, 40)
    reward, judge = head.index("reward"), head.index("judge")
    assert columns[reward] == ("0.5000", "0.7000 ± 0.1000", "0.9000 ± 0.0000")
    assert columns[reward + 1] == ("", "+0.2000 ± 0.1000", "+0.4000 ± 0.0000")
    assert columns[judge] == ("0.6000", "0.4000 ± 0.1000", "0.2000 ± 0.0000")
    assert columns[judge + 1] == ("", "-0.2000 ± 0.1000", "-0.4000 ± 0.0000")


def test_figure_5_has_gains_after_shares_of_the_seconds_and_after_the_rivals_iterations(
        tmp_path, monkeypatch):
    """All rise evenly by 0.01 an iteration; the judge falls by as much. All take 8 s an iteration,
    Neighbor GRPO 2 s, FDFO 16 s. They may have 40, 5, and the others 10 iterations."""
    def run_all(args, *groups):
        runs = [what for group in groups for what in group.items()]
        lasts = {folder: int(after(flags, "--iterations")) for folder, (_, flags) in runs}
        return {folder: log((0, 0.0), (last, last / 100)) for folder, last in lasts.items()}

    costs = {**all_cost(8.0), "FDFO": all_cost(16.0)["FDFO"]}
    monkeypatch.setattr(reproduce, "costs", lambda args: costs)
    families = {family for _, _, family in reproduce.METHODS.values()}
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict.fromkeys(families, (1e-5, 1e-4)))
    monkeypatch.setattr(reproduce, "run_all", run_all)
    head, rows, _, _ = reproduce.figure5(settings(tmp_path, iterations=40))
    assert head[-1] == "reward gain after 10 iterations"
    found = {row[0]: row[3:] for row in rows}
    assert found[OURS] == ["40", "+0.080", "+0.240", "+0.400", "-0.400", "+0.100"]
    assert found["DanceGRPO"] == ["10", "+0.020", "+0.060", "+0.100", "-0.100", "+0.100"]
    assert found["FDFO"] == ["5", "+0.010", "+0.030", "+0.050", "-0.050", ""]


def test_the_rollout_groups_of_the_figures_are_neighbours_as_in_training():
    def within_and_between(sigma):
        images, r = group_of(HERE / "tiny/flux", ["a dog", "a dog"], seed=0, sigma=sigma, G=3)
        assert images.shape == (2, 3, 3, 64, 64) and r.shape == (2, 3)
        of_one_noise, of_two = images[0, 0] - images[0, 1], images[0, 0] - images[1, 0]
        return of_one_noise.pow(2).mean(), of_two.pow(2).mean()

    within, between = within_and_between(0.3)
    assert 0 < within < between / 2
    within, between = within_and_between(1.0)                   # no longer neighbours
    assert within > between / 2


# ============================================================================ runs made once

STUB = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
last = int(sys.argv[sys.argv.index("--iterations") + 1])
asked = lambda name: (out.parent / name).exists()
print(sys.argv, file=open(out.parent / "calls", "a"))
if asked("wait"):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((out.parent / "ended").touch()))
    (out.parent / "waits").touch()
    signal.pause()
if asked("diverge"):
    sys.exit("train.py: the model's latents are no longer finite")
(out / "checkpoint-1/state").mkdir(parents=True, exist_ok=True)
(out / "checkpoint-1/state/state.pt").touch()
line = dict(iter=1 if asked("stop") else last, eval_preference=0.5, eval_preference_gain=0.1)
(out / "log.jsonl").write_text(json.dumps(line) + "\\n" + '{"iter": 2, "cut')
sys.exit(asked("fail"))
"""


class Stubbed:
    """Runs of the script STUB. Files beside the runs' folders tell it what to do."""

    def __init__(self, tmp_path):
        (tmp_path / "stub.py").write_text(STUB)
        self.out, self.args, self.folder = tmp_path, settings(tmp_path), tmp_path / "run-1e-05"

    def run(self, iterations, asked="", **how):
        script = str(self.out / "stub.py")
        if asked:
            (self.out / asked).touch()
        try:
            what = {self.folder: (script, ["--iterations", iterations])}
            return jobs.run_all(self.args, what, **how)[self.folder]
        finally:
            if asked:
                (self.out / asked).unlink()

    def calls(self):
        """"--overwrite" or "--resume" of each call of the script."""
        words = [line.split("'") for line in (self.out / "calls").read_text().splitlines()]
        return [word for call in words for word in call if word in ("--overwrite", "--resume")]


@pytest.fixture
def stub(tmp_path):
    return Stubbed(tmp_path)


THREE = [dict(iter=3, eval_preference=0.5, eval_preference_gain=0.1)]    # without the cut-off line


def test_a_stopped_run_continues_and_a_complete_one_is_not_made_again(stub):
    with pytest.raises(RuntimeError, match="before it was done"):       # its exit status was 0
        stub.run("3", asked="stop")
    assert stub.run("3") == stub.run("3") == THREE
    assert stub.calls() == ["--overwrite", "--resume"]


def test_a_run_with_another_command_begins_again_without_its_old_pictures(stub):
    stub.run("3")
    pictures = stub.out / f"eval/{stub.folder.name}-checkpoint-3"
    others = stub.out / "eval/run-2e-05-checkpoint-3"
    pictures.mkdir(parents=True)
    others.mkdir()
    with pytest.raises(RuntimeError, match="before it was done"):
        stub.run("4", asked="stop")
    assert not pictures.exists() and others.exists()
    assert stub.run("3") == THREE               # the folder had leftovers of the other run
    assert stub.calls() == ["--overwrite"] * 3


def test_a_run_that_diverged_is_not_made_again_and_has_no_lines_if_that_is_allowed(stub):
    with pytest.raises(RuntimeError, match="diverged"):
        stub.run("4", asked="diverge")
    with pytest.raises(RuntimeError, match="diverged"):
        stub.run("4")
    assert stub.run("4", may_diverge=True) == []
    assert stub.calls() == ["--overwrite"]


def test_a_run_that_failed_after_its_last_iteration_or_was_deleted_is_not_complete(stub):
    with pytest.raises(RuntimeError, match="ended with 1"):
        stub.run("3", asked="fail")
    assert stub.run("3") == THREE
    shutil.rmtree(stub.folder)                  # the note still says that it is complete
    assert stub.run("3") == THREE
    assert stub.calls() == ["--overwrite", "--resume", "--overwrite"]


def test_a_stop_signal_is_passed_to_the_runs_and_they_end_by_themselves(stub):
    def kill_when_it_waits():
        while not (stub.out / "waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, jobs.stop)
    threading.Thread(target=kill_when_it_waits).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            stub.run("4", asked="wait")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stub.out / "ended").exists() and not jobs.RUNNING


@pytest.mark.slow
def test_the_printed_command_makes_a_real_run_from_the_root(tmp_path):
    """The run is one iteration of MixGRPO."""
    words = "--num_rollout_steps 6 --prompts_per_iteration 1 --resolution 32 --group_size 4".split()
    folder, (script, flags) = reproduce.job(settings(tmp_path), "MixGRPO", 0, 1e-5, 1e-4, 1, words)
    prompts = tmp_path / "two.txt"
    prompts.write_text("a dog\na cat\n")
    flags = [*flags, "--eval_prompts", str(prompts), "--eval_scorers="]
    lines = jobs.run_all(settings(tmp_path), {folder: (script, flags)})[folder]
    assert [line["iter"] for line in lines] == [0, 1, 1]
    assert (folder / "baselines.py").exists() and (folder / "checkpoint-1").is_dir()
