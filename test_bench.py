"""
bench.py counts what it says it counts. One test per sentence.

    python -m pytest -q test_bench.py
"""
import types
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
import bench, train
from model import Flux

torch.set_num_threads(1)
SMALL = ["--prompts_per_iteration", "2"]


@pytest.mark.parametrize("method", ["dpm8", "mix", "nft"])
def test_the_bare_calls_are_those_of_an_iteration_in_the_same_sizes_and_order(monkeypatch, method):
    replay, seen = bench.replay, []
    def watched(model, scorers, calls, prompts):
        with bench.recorded(model, scorers, types.SimpleNamespace(step=None)) as (again, _):
            replay(model, scorers, calls, prompts)
        seen.append(([call for call in calls if call[0] != "step"], again))
    monkeypatch.setattr(bench, "replay", watched)
    found = bench.measure({method: bench.METHODS[method]}, 1, SMALL, warm=0)[method]
    assert len(seen) == 2 and all(calls and calls == again for calls, again in seen)                  # once for seconds, once for memory
    assert found["ratio"] == found["iteration"] / found["bare"]
    assert sum(found[phase] for phase in bench.PHASES) == pytest.approx(found["iteration"], rel=0.1)


@pytest.mark.parametrize("method, old, theta", [("dpm8", 8, 4 / 3), ("dpm16", 16, 3), ("ddim25", 25, 4), ("dance", 25, 14), ("flash", 8, 4)])
def test_evaluations_are_counted_at_the_network_and_are_the_papers(method, old, theta):
    found = bench.measure({method: bench.METHODS[method]}, 1, ["--prompts_per_iteration", "1"], bare=False, warm=0)[method]
    assert (found["nfe_old"], found["nfe_theta"]) == (pytest.approx(old), pytest.approx(theta))


@pytest.mark.parametrize("rank, blocks", [(0, 0), (4, 0), (0, 1), (4, -1)])
def test_operations_counted_without_numbers_are_those_of_the_network_with_them(rank, blocks):
    model = Flux(train.PRESETS["tiny"]["model"], 64, lora_rank=rank, checkpoint_blocks=blocks)
    cond = model.encode(["a dog", "a cat"])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):                     # whose matrix products are counted
        with torch.no_grad():
            model.velocity(torch.randn(6, *model.latent_shape), 0.5, cond)
        model.velocity(torch.randn(4, *model.latent_shape), 0.5, cond).mean().backward()
    calls = [("encode", 2, False), ("velocity", (6, 2), False), ("velocity", (4, 2), True)]
    assert bench.flops_of(model, types.SimpleNamespace(lora_rank=rank, checkpoint_blocks=blocks), calls) == counter.get_total_flops()


def test_the_peak_of_memory_is_what_is_alive_at_once_and_neither_weights_nor_views_nor_what_was_freed():
    net = torch.nn.Linear(1000, 1000, bias=False)
    with torch.no_grad(), bench.Live(net) as live:
        x = torch.ones(1000, 1000)
        for _ in range(5):
            x = x @ net.weight.t()                              # the old and the new one, 4 MB each
        x.view(-1)[0] = 0
    assert live.peak == 8_000_000


def test_an_iteration_and_the_ladder_go_through_at_another_geometry_twice_in_a_row(monkeypatch, capsys):
    monkeypatch.setitem(bench.BLOCKS, "flux-small", dict(num_layers=1, num_single_layers=1, num_attention_heads=1))
    monkeypatch.setattr(bench, "LADDER", {"a step": "--no-compile"})
    for argv in (["--only", "dpm8", "--warm", "1", "--no-bare"], ["--ladder"]):
        monkeypatch.setattr(bench.sys, "argv", ["bench.py", "--geometry", "flux-small", "--repeats", "1", "--resolution", "32", "--group_size", "4", "--threads", "1", *argv])
        bench.main()
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        seconds = dict(zip(rows[0], rows[2]))
        assert float(seconds["s / iter."]) >= float(seconds["rollout"]) > 0 and float(seconds["update"]) > 0


def test_the_share_is_the_transformers_operations_over_the_iterations_seconds_and_a_matrix_products_rate():
    assert bench.rates(dict(flops=3e12, iteration=2.0), 6e12) == ("3", "1.5", "6", "0.25")


@pytest.mark.parametrize("argv, told", [
    (["--floor", "--resolution", "1024"], "--floor has no use for --resolution 1024"), (["--memory", "--geometry", "flux"], "--memory has no use for --geometry"), (["--scaling", "--geometry", "flux"], "--scaling has no use for --geometry"),
    (["--ladder", "--warm", "3"], "--ladder has no use for --warm"), (["--ladder", "--only", "dance"], "--ladder has no use for --only"), (["--batching", "--json", "x.json"], "--batching has no use for --json"),
    (["--repeats", "0"], "--repeats must be at least 1"), (["--only", "dpm8,foo"], "'foo', but must be of dance,"), (["--json", "no/such/x.json"], "there is no folder no/such"), (["--floor", "--memory"], "not allowed with"),
])
def test_what_would_have_no_effect_or_fail_at_the_end_is_refused_at_once(monkeypatch, capsys, argv, told):
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit):
        bench.main()
    assert told in capsys.readouterr().err


def test_a_methods_own_settings_win_over_those_on_the_command_line():
    found = bench.measure({"dpm16": bench.METHODS["dpm16"]}, 1, [*SMALL, "--num_rollout_steps", "4"], bare=False, warm=0)["dpm16"]
    assert found["nfe_old"] == 16
