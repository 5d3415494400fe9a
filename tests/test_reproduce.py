"""
What paper/reproduce.py computes, on curves made by hand, and the runs of paper/jobs.py. One test
per sentence.

    python -m pytest -q tests/test_reproduce.py
"""
import argparse, dataclasses, json, math, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
import train
from paper import baselines, jobs, reproduce
from paper.reproduce import HERE, OURS, between_flawless, curve, group_of, over_seeds, shown


def settings(tmp_path, **more):
    args = dict(out=tmp_path, results=tmp_path, jobs=1, seeds=1, iterations=60, repeats=1,
                kept=False, more=[], least=8, search=(15, 5), scored=0)
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

def same_cost(monkeypatch, seconds, **others):
    """An iteration takes these seconds, but 2 for ours, and for others as given."""
    monkeypatch.setattr(reproduce, "cost_of", lambda args, label: dict(
        seconds=2.0 if label == OURS or "sigma" in label else others.get(label, seconds),
        solver="", nfe_old=1, nfe_theta=1))


def chosen(monkeypatch, published="--lr 3e-5"):
    """The search chose these for every method as published, and otherwise the last of each axis."""
    monkeypatch.setattr(reproduce, "tuned", lambda args: {family: dict(
        published=published, searched=reproduce.flags_of(family, [axis[-1] for axis in grid]))
        for family, grid in reproduce.GRIDS.items()})


def test_seconds_are_those_of_table_3_for_the_same_settings_and_variants_of_ours_share_them(
        tmp_path, monkeypatch):
    chosen(monkeypatch)
    searched = reproduce.OURS_BEST
    timed = reproduce.timed(settings(tmp_path), searched)
    assert timed == ("--sigma 0.7 --num_rollout_steps 3 --num_train_steps 2 "
                     "--updates_per_iteration 4")               # lr and clip cost nothing
    rows = {OURS: dict(seconds=2.0, settings=""), searched: dict(seconds=1.0, settings=timed),
            "DanceGRPO": dict(seconds=9.0, settings="--method dance --eta 0.5")}
    monkeypatch.setattr(reproduce, "costs", lambda args: rows)
    seconds = lambda label: reproduce.cost_of(settings(tmp_path), label)["seconds"]
    assert [seconds(label) for label in (OURS, reproduce.OURS_2, searched)] == [2, 2, 1]
    for label in ("DanceGRPO", "AWM"):
        with pytest.raises(SystemExit, match=f"no seconds for {label} with these settings"):
            seconds(label)


def test_the_fit_finds_the_seconds_of_an_evaluation_of_a_trained_one_and_of_an_image():
    true = np.array([0.003, 0.008, 0.006])
    rows = {label: dict(seconds=reproduce.evaluations(reproduce.METHODS[label]) @ true)
            for label in reproduce.PUBLISHED[::2]}
    found = reproduce.estimated("--num_rollout_steps 4 --num_train_steps 3", rows)
    assert found == pytest.approx(8 * 12 * (4 * 0.003 + 1 * 0.008 + 0.006))


def test_table_3_measures_only_what_is_missing_and_scales_it_by_ours(tmp_path, monkeypatch):
    chosen(monkeypatch)
    known = {label: dict(seconds=4.0, settings=reproduce.METHODS[label], nfe_old=1.0, G=12,
                         B=4, K=4, nfe_theta=1.0, solver="") for label in reproduce.PUBLISHED}
    asked = []

    def measure(methods, repeats, *_, **__):
        asked.extend(methods)
        return {label: dict(known[OURS], iteration=6.0 if label == OURS else 3.0)
                for label in methods}

    monkeypatch.setattr(reproduce, "costs", lambda args: known)
    monkeypatch.setattr(reproduce.bench, "measure", measure)
    _, rows, found, _ = reproduce.table3(settings(tmp_path))
    few = [f"Neighbor GRPO, {T} steps" for T in (6, 5, 4, 3, 2)]
    assert asked == [OURS, *few] and set(found) == {*reproduce.PUBLISHED, *few}
    assert {label: found[label]["seconds"] for label in few} == dict.fromkeys(few, 2.0)
    assert found[OURS]["seconds"] == 4 and len(rows) == len(found)


def test_every_row_runs_its_method_with_the_settings_that_its_label_says(tmp_path, monkeypatch):
    chosen(monkeypatch)
    same_cost(monkeypatch, 1.2)                                 # 100 iterations of each rival
    found = {}
    for label in [*reproduce.PUBLISHED, reproduce.OURS_2, reproduce.OURS_08]:
        (folder, (its, flags)), = reproduce.jobs_of(settings(tmp_path), label).items()
        parse = train.parse_config if its == "train.py" else baselines.parse_config
        cfg = parse([*flags, "--out_dir", str(folder)])
        old, theta, images = reproduce.evaluations(" ".join(flags))
        found[label] = old / images, round(theta / images, 3), getattr(cfg, "window_every", cfg.p)
        assert cfg.method == reproduce.family_of(label) and (cfg.eval_steps, cfg.seed) == (16, 0)
        assert cfg.lr == (5e-5 if "sigma" in label else 3e-5)
    assert found == {   # published: the window moves 12 times, the pruned depths 10 times
        "DanceGRPO": (25, 14, 0), "DanceGRPO, 16 steps": (16, 9, 0), "Flow-GRPO": (6, 5, 0),
        "MixGRPO": (25, 4, 8), "MixGRPO-Flash*": (8, 4, 0), "BranchGRPO": (203 / 16, 13.625, 30),
        "BranchGRPO, pruned": (203 / 16, 8.625, 10), "DiffusionNFT": (19, 9, 0),
        "AWM": (14, 6, 0), "FDFO": (40, 40, 0),
        "Neighbor GRPO, 25 steps": (25, 4, 0.8), "Neighbor GRPO, 16 steps": (16, 3, 0.8),
        "Neighbor GRPO, 8 steps": (8, 1.333, 0.8), "Neighbor GRPO, sigma 0.5, p = 2": (8, 1.333, 2),
        "Neighbor GRPO, sigma 0.5, p = 0.8": (8, 1.333, 0.8)}


def test_a_searched_row_has_all_settings_of_the_search_and_a_window_that_moves_as_often(
        tmp_path, monkeypatch):
    same_cost(monkeypatch, 1.0)
    grid = reproduce.GRIDS["mix"]
    choice = [grid[0][0], grid[1][0], grid[2][2], grid[3][2], grid[4][1]]
    monkeypatch.setattr(reproduce, "tuned", lambda args: dict(
        mix=dict(searched=reproduce.flags_of("mix", choice))))
    (_, (script, flags)), = reproduce.jobs_of(settings(tmp_path), "MixGRPO, searched").items()
    cfg = baselines.parse_config([*flags, "--out_dir", str(tmp_path / "new")])
    assert (cfg.method, cfg.lr, cfg.clip_eps, cfg.eta, cfg.num_rollout_steps, cfg.window,
            cfg.iterations, cfg.window_every) == ("mix", 2e-5, 1e-4, 1, 8, 2, 120, 10)


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

def test_final_scores_are_found_by_the_checkpoints_names_and_kept_for_when_these_are_lost(
        tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        for iteration in (3, 12):
            (folder / f"checkpoint-{iteration}/state").mkdir(parents=True)
            (folder / f"checkpoint-{iteration}/state/state.pt").touch()
    rows = [dict(label="tiny-flux", preference=1.0), dict(label="b-checkpoint-12", preference=2.0),
            dict(label="a-checkpoint-12", preference=3.0)]

    def evaluate(command, **_):
        assert all(str(folder / "checkpoint-12") in command for folder in folders)
        assert after(command, "--steps") == "16" and after(command, "--images_per_prompt") == "4"
        out = Path(after(command, "--out_dir"))
        out.mkdir()
        (out / "results.json").write_text(json.dumps(dict(results=rows)))

    apart = {"tiny-flux": [1, math.nan, 3], "b-checkpoint-12": [2, 9, 4],
             "a-checkpoint-12": [math.nan, 9, 5]}
    monkeypatch.setattr(reproduce, "between_flawless", lambda path: np.array(apart[path.name]))
    monkeypatch.setattr(reproduce.subprocess, "run", evaluate)
    args = settings(tmp_path)
    for folder in folders:
        jobs.keep_run(args, folder.name, dict(command="c", made_by=jobs.made_by()))
    found = reproduce.finals(args, folders)
    # where the base has no two flawless pictures, those of the others do not count either
    assert found == {"base": dict(preference=1, between_flawless=2),
                     folders[0]: dict(preference=3, between_flawless=5),
                     folders[1]: dict(preference=2, between_flawless=3)}
    for folder in folders:
        shutil.rmtree(folder)
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    assert reproduce.finals(args, folders) == found
    with pytest.raises(RuntimeError, match="neither a checkpoint nor a score of c"):
        reproduce.finals(args, [tmp_path / "c"])


def test_the_distance_of_flawless_pictures_leaves_out_flawed_ones_and_prompts_with_less_than_two(
        tmp_path):
    probabilities = [[0.9, 0.8, 0.1, 0.0], [0.9, 0.1, 0.2, 0.3]]
    (tmp_path / "pictures").mkdir()
    for i, flawless in enumerate(probabilities):
        (tmp_path / f"pictures/{i:05d}.json").write_text(json.dumps(dict(flawless=flawless)))
        for k, grey in enumerate((0, 51, 255, 102)):            # the first two differ by 0.2
            Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / f"pictures/{i:05d}-{k}.png")
    assert_allclose(between_flawless(tmp_path), [0.2, math.nan], rtol=1e-6)


def config_of(family, choice):
    cfg = reproduce.bench.parsed(reproduce.flags_of(family, choice).split())
    return dataclasses.replace(cfg, out_dir="")


@pytest.mark.parametrize("family", reproduce.GRIDS)
def test_the_first_values_of_a_grid_are_the_published_ones_and_all_values_go_together(family):
    """Of all pairs of values, that is; a choice has one value of each axis."""
    grid = reproduce.GRIDS[family]
    first = [axis[0] for axis in grid]
    assert config_of(family, first) == config_of(family, first[:2])
    for shift in range(max(map(len, grid))):
        config_of(family, [axis[(k * shift + shift) % len(axis)] for k, axis in enumerate(grid)])


def test_a_third_of_the_trials_is_as_published_but_for_learning_rate_and_clip():
    for family, grid in reproduce.GRIDS.items():
        order = list(reproduce.in_order(family))
        choices = [choice for choice, _ in order]
        assert len(set(choices)) == len(order) == math.prod(map(len, grid))
        plain = math.prod(map(len, grid[:2]))
        assert [is_plain for _, is_plain in order[: 3 * plain]] == [True, False, False] * plain
        for choice, is_plain in order:
            assert is_plain == all(value == axis[0] for value, axis in zip(choice[2:], grid[2:]))


def test_every_method_searches_for_the_same_seconds_and_the_second_reward_decides(
        tmp_path, monkeypatch):
    """A trial of ours takes 2 s an iteration, of FDFO 40 s, of the others 8 s. A run has 120 s:
    three iterations of FDFO, too few for other settings than the published ones. The reward is made
    up. In the first part a larger rate is better, in the second a smaller one."""
    asked = {1000: {}, 1001: {}}

    def run_all(args, wanted, may_diverge):
        found = {}
        for folder, (_, flags) in wanted.items():
            assert after(flags, "--eval_prompts") == "tiny/prompts/test_pair.txt"
            seed, rate = int(after(flags, "--seed")), float(after(flags, "--lr"))
            family = after(flags, "--method") if "--method" in flags else "neighbor"
            asked[seed].setdefault(family, []).append(int(after(flags, "--iterations")))
            found[folder] = log((0, 0.0), (9, rate if seed == 1000 else 0.5 - rate))
            if family == "flow" and rate == 4e-4:
                found[folder] = []                              # it diverged
        return found

    seconds = dict(fdfo=40.0, neighbor=2.0)
    same_cost(monkeypatch, 8.0)
    monkeypatch.setattr(reproduce, "run_all", run_all)
    monkeypatch.setattr(reproduce, "estimated", lambda flags, rows: seconds.get(
        flags.split()[1] if "--method" in flags else "neighbor", 8.0))
    head, rows, found, _ = reproduce.tune(settings(tmp_path))
    assert set(found) == set(reproduce.GRIDS)
    for (family, one), row in zip(found.items(), rows, strict=True):
        each = seconds.get(family, 8.0)
        half = dict(fdfo=8, neighbor=30).get(family, 8)         # 60 s, but at least 8 iterations
        count = min(15 * 120 // (half * each), math.prod(map(len, reproduce.GRIDS[family])))
        assert asked[1000][family] == [half] * int(count)
        whole = dict(fdfo=8, neighbor=60).get(family, 15)
        assert set(asked[1001][family]) == {whole}
        again = len(asked[1001][family])
        assert 2 <= again <= max(2, 5 * 120 // (whole * each))
        assert row[2:6] == [count, sum(trial["published"] for trial in one["trials"]), again,
                            f"{(half * count + whole * again) * each:.0f}"]
        tried = [trial for trial in one["trials"] if "whole" in trial]
        best = max(tried, key=lambda trial: trial["whole"]["preference"])
        assert one["searched"] == reproduce.flags_of(family, best["choice"])
        plain = max((trial for trial in tried if trial["published"]),
                    key=lambda trial: trial["whole"]["preference"])
        assert one["published"] == " ".join(plain["choice"][:2]).strip()
        ranked = sorted(one["trials"], key=lambda trial: -trial["half"]["preference"])
        assert ranked[0]["whole"]               # the best of the first part is tried again
        assert all(trial["published"] for trial in one["trials"]) == (family == "fdfo")
    assert {trial["half"]["preference"] for trial in found["flow"]["trials"]
            if "4e-4" in trial["choice"][0]} == {-1.0}


@pytest.mark.parametrize("table", reproduce.CHANGES)
def test_a_row_differs_from_the_starting_point_by_its_own_settings_and_is_averaged_over_its_seeds(
        table, tmp_path, monkeypatch):
    asked, drawn = {}, []
    keys = ("preference_gain", "judge_gain", "named_gain", "flawless", "diversity",
            "between_flawless")
    same_cost(monkeypatch, 8.0)
    monkeypatch.setattr(reproduce, "run_all", lambda args, *groups: [
        asked.update(group) for group in groups])
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {
        "base": dict.fromkeys(keys, 0.5),
        **{folder: dict.fromkeys(keys, i // 2 + i % 2 / 4) for i, folder in enumerate(asked)}})
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *got: drawn.append(got[1:]))
    _, rows, _, _ = reproduce.one_at_a_time(settings(tmp_path, seeds=2), table)
    first = dict(table4=1, table5=1).get(table, 0)              # sigma 0.5, B 4, and p 2
    for i, (label, flags) in enumerate(reproduce.CHANGES[table].items()):
        for seed, (_, words) in enumerate(list(asked.values())[2 * i : 2 * i + 2]):
            cfg = train.parse_config(words)
            wanted = vars(train.parse_config([*reproduce.AROUND, *flags.split()]))
            others = {name for name, value in wanted.items() if getattr(cfg, name) != value}
            assert (cfg.seed, cfg.iterations) == (seed, 60) and others <= {
                "seed", "iterations", "eval_steps", "eval_every", "save_every", "keep", "lock"}
            if table in reproduce.SWEEPS:
                flag = reproduce.SWEEPS[table][0]
                assert {**reproduce.START, flag: float(label)} == {
                    name: getattr(cfg, name) for name in reproduce.START}
        assert rows[1 + i][:2] == [label, f"{i + 0.125:+.4f} ± 0.1250"]         # its own two runs
        over = [f"{i - first:+.4f} ± 0.0000"] * 2 if i != first else ["", ""]   # seed by seed
        assert rows[1 + i][7:9] == over
    assert rows[0][:2] == ["base", "0.500"] and len(asked) == 2 * len(rows[1:])
    assert drawn[0][0] == table and list(drawn[0][1]) == list(reproduce.CHANGES[table])


def test_the_same_runs_of_two_tables_are_made_once(tmp_path, monkeypatch):
    same_cost(monkeypatch, 8.0)
    args = settings(tmp_path)
    runs = lambda *which: list(reproduce.changed(args, *which))
    assert runs("table4", "0.5") == runs("table5", "4") == runs("table6", "2")
    assert runs("table6", "2") == list(reproduce.jobs_of(args, reproduce.OURS_2))
    assert runs("table6", "0.8") == list(reproduce.jobs_of(args, reproduce.OURS_08))
    assert runs("settings", "as it is") == runs("rewards", "preference")
    chosen(monkeypatch, " ".join(reproduce.AROUND))             # if the search says so
    assert runs("settings", "as it is") == list(reproduce.jobs_of(args, OURS))


def test_a_row_that_is_made_again_agrees_within_the_root_of_both_squared_errors(
        tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "AGAIN", {"table4": "0.3"})
    head = ["sigma", "reward gain", "judge gain"]
    table = dict(head=head, rows=[["1", "+9", "+9"], ["0.3", "+0.200 ± 0.003", "+0.100 ± 0.003"]])
    (tmp_path / "table4.json").write_text(json.dumps(table))
    same_cost(monkeypatch, 8.0)
    gains = {"preference_gain": (0.2, 0.208), "judge_gain": (0.106, 0.114)}     # errors of 0.004
    monkeypatch.setattr(reproduce, "run_all", lambda args, group: group)
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {
        folder: {key: each[k] for key, each in gains.items()} for k, folder in enumerate(logs)})
    _, rows, _, _ = reproduce.again(settings(tmp_path, seeds=2))
    assert [row[3:] for row in rows] == [
        ["+0.200 ± 0.003", "+0.2040 ± 0.0040", "0.8", "yes"],
        ["+0.100 ± 0.003", "+0.1100 ± 0.0040", "2.0", "no"]]


def test_comparisons_are_the_cells_of_columns_that_say_over(tmp_path):
    head = ["sigma", "reward gain", "reward over \"0.5\"", "judge over it", "overall"]
    rows = [["1", "+1", "+1 ± 1", "+1 ± 1", "x"], ["0.5", "+1", "", "", "x"]]    # not "overall"
    (tmp_path / "table4.json").write_text(json.dumps(dict(head=head, rows=rows)))
    (tmp_path / "table3.json").write_text(json.dumps(dict(head=["Method"], rows=[["a"]])))
    assert reproduce.comparisons(settings(tmp_path))[1] == [["table4", 2], ["all", 2]]


def test_steps_compares_runs_of_equal_seconds_seed_by_seed_also_after_equal_iterations(
        tmp_path, monkeypatch):
    """With T steps an iteration takes T s. After n iterations the gain is n / 1000, and the judge's
    minus that, with 0.1 more for the second seed."""
    asked = {}

    def run_all(args, *groups):
        asked.update(job for group in groups for job in group.items())
        found = {}
        for folder, (_, flags) in asked.items():
            n, more = int(after(flags, "--iterations")), 0.1 * int(after(flags, "--seed"))
            found[folder] = log((0, 0.0), *((k, more + k / 1000) for k in (10, 40, n)))
        return found

    monkeypatch.setattr(reproduce, "cost_of", lambda args, label: dict(
        seconds=float(label.split()[2])))
    monkeypatch.setattr(reproduce, "run_all", run_all)
    monkeypatch.setattr(reproduce, "order", lambda steps, count: {T: T / 10 for T in steps})
    monkeypatch.setattr(reproduce, "finals", lambda args, logs, steps, pictures: {
        "base": dict(preference=steps / 100),
        **{folder: dict(preference_gain=steps / 1000) for folder in logs}})
    head, rows, _, _ = reproduce.steps(settings(tmp_path, seeds=2, iterations=40))
    for T, row in zip((8, 6, 5, 4, 3, 2), rows, strict=True):
        n = round(320 / T)
        assert row[:4] == [T, min(4, T - 1), f"{T:.2f}", f"{n}"]
        gains = [0.01, 0.04, n / 1000]
        assert row[4:7] == [f"{gain + 0.05:+.3f} ± 0.050" for gain in gains]
        assert row[7:9] == [f"{-gain - 0.05:+.3f} ± 0.050" for gain in gains[1:]]
        over = [0, n / 1000 - 0.04, 0, 0.04 - n / 1000]         # without an error: the same seeds
        assert row[9:13] == ([""] * 4 if T == 8 else [
            f"{one + 0.0:+.4f} ± 0.0000".replace("-0.0000 ", "+0.0000 ") for one in over])
        assert row[13:] == ["+0.004 ± 0.000", "+0.008 ± 0.000", "+0.016 ± 0.000", "+0.050 ± 0.000",
                            f"{T / 10:.2f}"]
    for _, flags in asked.values():
        cfg = train.parse_config(flags)
        assert (cfg.lr, cfg.clip_eps, cfg.num_anchors, cfg.eval_every) == (5e-5, 1e-4, 4, 10)


def test_the_order_of_a_group_is_spearmans_correlation_with_32_steps(monkeypatch):
    rewards = {32: [[1.0, 2, 3, 4], [1, 2, 3, 4]], 8: [[0, 5, 6, 70], [1, 2, 3, 4]],
               2: [[4, 3, 2, 1], [10, 20, 40, 30]]}
    monkeypatch.setattr(reproduce, "group_of", lambda path, prompts, seed, T: (
        None, reproduce.torch.tensor(rewards[T])))
    found = reproduce.order((8, 2), 2)
    assert found == pytest.approx({8: 1.0, 2: (-1 + 0.8) / 2})


def test_the_spread_of_a_rollout_is_that_of_the_first_iteration_under_each_scorer(
        tmp_path, monkeypatch):
    def run_all(args, *groups):
        found = {}
        for folder, (_, flags) in [what for group in groups for what in group.items()]:
            cfg = reproduce.bench.parsed(flags)
            assert cfg.iterations == 1
            std = 0.25 if cfg.rewards == "flawless" else 0.5
            found[folder] = [dict(iter=0, eval_preference=1), dict(iter=1, reward_std=std)]
        return found

    monkeypatch.setattr(reproduce, "run_all", run_all)
    _, rows, _, _ = reproduce.spread(settings(tmp_path, seeds=2))
    assert rows == [[label, "0.500 ± 0.000", "0.250 ± 0.000"] for label in reproduce.SPREAD]


def test_methods_are_compared_after_equal_seconds_each_by_its_own_runs_and_curves(
        tmp_path, monkeypatch):
    """DanceGRPO takes 8 s an iteration, FDFO 16 s, Neighbor GRPO 2 s. It may have 40 of these. In
    training all rise evenly by 0.01 an iteration. The last gain is made up."""
    best = reproduce.OURS_BEST
    labels = ["DanceGRPO", "FDFO", "DanceGRPO, searched", best]
    last = {label: [0.1 * k, 0.1 * k + 0.2] for k, label in enumerate(labels)}
    same_cost(monkeypatch, 8.0, **{best: 2.0, "FDFO": 16.0})
    chosen(monkeypatch)
    args = settings(tmp_path, seeds=2, iterations=40)
    gains = {folder: last[label][seed] for label in labels
             for seed, folder in enumerate(reproduce.jobs_of(args, label))}

    def run_all(args, *groups):
        runs = [what for group in groups for what in group.items()]
        counts = {folder: int(after(flags, "--iterations")) for folder, (_, flags) in runs}
        return {folder: log((0, 0.0), (n, n / 100)) for folder, n in counts.items()}

    def row(gain):
        return dict(preference=0.5 + gain, judge=0.6 - gain, preference_gain=gain,
                    judge_gain=-gain, diversity=0.2, between_flawless=0.1)

    monkeypatch.setattr(reproduce, "run_all", run_all)
    monkeypatch.setattr(reproduce, "finals", lambda args, logs: {
        "base": row(0), **{folder: row(gains[folder]) for folder in logs}})
    monkeypatch.setattr(reproduce, "draw_pictures", lambda *_: None)
    head, rows, _, caption = reproduce.compare(args, "table1", labels, best)
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    column = lambda name: [found[label][name] for label in labels]
    assert list(found) == labels and column("iterations") == ["10", "5", "10", "40"]
    assert column("reward gain after 0.2") == [f"+{gain:.3f} ± 0.000" for gain in (
        0.02, 0.01, 0.02, 0.08)]
    assert column("0.6") == [f"+{gain:.3f} ± 0.000" for gain in (0.06, 0.03, 0.06, 0.24)]
    assert column("after 10 iterations") == ["+0.100 ± 0.000", "", *["+0.100 ± 0.000"] * 2]
    assert column("reward gain") == [f"+{0.1 * k + 0.1:.4f} ± 0.1000" for k in range(4)]
    assert column("judge gain") == [f"{-0.1 * k - 0.1:.4f} ± 0.1000" for k in range(4)]
    assert column("ours over it") == ["", "", "+0.1000 ± 0.1414", ""]   # of searched methods
    assert column("judge, over it") == ["", "", "-0.1000 ± 0.1414", ""]
    assert "reward 0.5000, judge 0.6000" in caption and (tmp_path / "figure5.png").exists()


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
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
last = int(sys.argv[sys.argv.index("--iterations") + 1])
asked = lambda name: (out.parent / name).exists()
print(sys.argv, file=open(out.parent / "calls", "a"))
if asked("wait"):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((out.parent / "ended").touch()))
    (out.parent / "waits").write_text(str(os.getpid()))
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
HERE_AND_NOW = dict(code="a", cpu="one")


@pytest.fixture(autouse=True)
def made_here(monkeypatch):
    monkeypatch.setattr(jobs, "made_by", lambda: dict(HERE_AND_NOW))
    monkeypatch.setattr(reproduce, "made_by", lambda: dict(HERE_AND_NOW))


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
    (stub.out / "runs.jsonl").unlink()
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


@pytest.mark.parametrize("what, other", [("code", "b"), ("cpu", "two")])
def test_a_run_of_other_code_or_of_another_kind_of_cpu_is_neither_used_nor_continued(
        what, other, stub, monkeypatch):
    stub.run("3")
    monkeypatch.setattr(jobs, "made_by", lambda: {**HERE_AND_NOW, what: other})
    with pytest.raises(RuntimeError, match="was made by .* name another --out_dir"):
        stub.run("3")
    shutil.rmtree(stub.folder)                  # nor is what was kept of it
    stub.folder.with_name(f"{stub.folder.name}.json").unlink()
    assert stub.run("3") == THREE
    assert stub.calls() == ["--overwrite"] * 2


def test_what_was_kept_of_a_run_outlives_its_folder_and_with_kept_other_code_and_cpus(
        stub, monkeypatch):
    stub.run("3")
    shutil.rmtree(stub.folder)
    stub.folder.with_name(f"{stub.folder.name}.json").unlink()
    assert stub.run("3") == THREE and stub.calls() == ["--overwrite"]
    monkeypatch.setattr(jobs, "made_by", lambda: dict(code="b", cpu="two"))
    stub.args.kept = True
    assert stub.run("3") == THREE and stub.calls() == ["--overwrite"]
    with pytest.raises(RuntimeError, match="does not have the run"):
        stub.run("4")
    text, job = (stub.out / "runs.jsonl").read_text(), (str(stub.out / "stub.py"),
                                                        ["--iterations", "3"])
    other = json.loads(text) | dict(run="other", made_by=dict(code="a", cpu="two"),
                                    command=jobs.command_line(*job, stub.out / "other"))
    (stub.out / "runs.jsonl").write_text(text + json.dumps(other) + "\n")
    what = {stub.folder: job, stub.out / "other": job}
    with pytest.raises(RuntimeError, match="different kinds of CPU"):
        jobs.run_all(stub.args, what)


def test_the_hash_of_the_code_changes_with_a_number_but_not_with_a_comment_or_a_docstring(
        tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "HERE", tmp_path)
    (tmp_path / "paper").mkdir()
    hashes = []
    for text in ("def f():\n    return 1\n", 'def f():\n    "One."\n    return 1     # 1\n',
                 "def f():\n    return 2\n"):
        for name in ("train.py", "paper/baselines.py"):
            (tmp_path / name).write_text(text)
        hashes.append(jobs.made_by()["code"])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/weights.safetensors").write_bytes(b"1")
    hashes.append(jobs.made_by()["code"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def appears(path, text=False):
    """Whether a file appears, with a text in it, before patience is over."""
    for _ in range(6000):
        if path.exists() and (path.read_text() or not text):
            return True
        time.sleep(0.05)
    return False


def test_a_run_on_a_leash_ends_by_itself_when_its_stdin_is_closed(tmp_path):
    stub = Stubbed(tmp_path)
    (tmp_path / "wait").touch()
    words = [str(tmp_path / "stub.py"), "--iterations", "3", "--out_dir", str(stub.folder)]
    run = subprocess.Popen([sys.executable, "-m", "paper.leash", *words], cwd=HERE,
                           stdin=subprocess.PIPE)
    assert appears(tmp_path / "waits", text=True) and run.poll() is None
    run.stdin.close()
    assert run.wait(300) == 0 and (tmp_path / "ended").exists()


@pytest.mark.slow
def test_kill_9_of_the_caller_ends_its_runs(tmp_path):
    stub = Stubbed(tmp_path)
    (tmp_path / "wait").touch()
    words = [str(tmp_path / "stub.py"), "--iterations", "3", "--out_dir", str(stub.folder)]
    caller = subprocess.Popen([sys.executable, "-c", "import sys; from paper import jobs; "
                               "jobs.start(sys.argv[1:])", *words], cwd=HERE)
    assert appears(tmp_path / "waits", text=True)
    os.kill(int((tmp_path / "waits").read_text()), 0)           # it is alive
    assert not (tmp_path / "ended").exists()
    caller.kill()
    assert appears(tmp_path / "ended")


@pytest.mark.slow
def test_the_printed_command_makes_a_real_run_from_the_root(tmp_path):
    """The run is one iteration of MixGRPO."""
    words = ("--method mix --num_rollout_steps 6 --prompts_per_iteration 1 --resolution 32 "
             "--group_size 4 --eval_scorers=").split()
    prompts = tmp_path / "two.txt"
    prompts.write_text("a dog\na cat\n")
    args = settings(tmp_path, more=["--eval_prompts", str(prompts)])
    folder, job = reproduce.job(args, "MixGRPO", words, 1, 0)
    lines = jobs.run_all(args, {folder: job})[folder]
    assert [line["iter"] for line in lines] == [0, 1, 1] and "reward_std" in lines[1]
    assert (folder / "baselines.py").exists() and (folder / "checkpoint-1").is_dir()
