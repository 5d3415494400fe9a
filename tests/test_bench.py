"""
bench.py counts what it says it counts. One test per sentence.

    python -m pytest -q test_bench.py
"""
import dataclasses, time, types
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
import train
from model import Flux
from paper import bench

torch.set_num_threads(1)
SMALL = ["--prompts_per_iteration", "2"]


@pytest.mark.parametrize("method", ["dpm8", "mix", "nft"])
def test_the_bare_calls_are_those_of_an_iteration_in_the_same_sizes_and_order_backward_passes_too(monkeypatch, method):
    replay, backward, seen, backwards = bench.replay, torch.Tensor.backward, [], []
    def watched(model, scorers, calls, prompts):
        backwards.clear()
        with bench.recorded(model, scorers, types.SimpleNamespace(step=None)) as (again, _):
            replay(model, scorers, calls, prompts)
        seen.append(([call for call in calls if call[0] != "step"], again))
        assert len(backwards) == sum(trained for what, _, trained in calls if what == "velocity") > 0
    monkeypatch.setattr(bench, "replay", watched)
    monkeypatch.setattr(torch.Tensor, "backward", lambda x, *how: backwards.append(1) or backward(x, *how))
    found = bench.measure({method: bench.METHODS[method]}, 1, SMALL, warm=0)[method]
    assert len(seen) == 2 and all(calls and calls == again for calls, again in seen)                  # once for seconds, once for memory
    assert found["ratio"] == found["iteration"] / found["bare"]


def test_what_is_recorded_is_what_algorithm_1_asks_of_the_networks_with_two_prompts(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "replay", lambda model, scorers, calls, prompts: seen.append(calls))
    bench.measure({"dpm8": bench.METHODS["dpm8"]}, 1, SMALL, warm=0)
    update = [("velocity", (4, 2, False), True)] * 4 + [("step", None, True)]                         # K steps; two of four anchors of each prompt
    assert seen[0] == [("encode", 2, False), *[("velocity", (24, 2, True), False)] * 8, ("decode", 24, False), ("clip", 24, True), *update, *update]


def test_the_phases_make_up_an_iteration_the_first_ones_do_not_count_and_nothing_is_learnt(monkeypatch):
    step, models = torch.optim.AdamW.step, []
    def slowly(opt, *how):
        time.sleep(1)
        return step(opt, *how)
    monkeypatch.setattr(torch.optim.AdamW, "step", slowly)
    def build(cfg):
        models.append(train.load(cfg))
        return models[0]
    found = bench.measure({"dpm16": bench.METHODS["dpm16"]}, 1, [*SMALL, "--num_rollout_steps", "4"], build, bare=False, warm=1)["dpm16"]
    assert found["nfe_old"] == 16                               # the method's own settings win
    assert 2 < found["optimizer"] < 2.5
    assert sum(found[phase] for phase in bench.PHASES) == pytest.approx(found["iteration"], rel=0.15)
    assert found["iteration"] == found["tries"][1]["iteration"] != found["tries"][0]["iteration"]
    before = Flux(train.PRESETS["tiny"]["model"], 64).trained()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(models[0].trained(), before, strict=True))


@pytest.mark.parametrize("method, old, theta, B, K", [("dpm8", 8, 4 / 3, 4, 4), ("dpm16", 16, 3, 4, 9), ("ddim25", 25, 4, 12, 4), ("dance", 25, 14, 12, 14), ("flash", 8, 4, 12, 4)])
def test_evaluations_are_counted_at_the_network_and_the_columns_are_the_papers(method, old, theta, B, K):
    found = bench.measure({method: bench.METHODS[method]}, 1, ["--prompts_per_iteration", "1"], bare=False, warm=0)[method]
    assert (found["nfe_old"], found["nfe_theta"], found["B"], found["K"]) == (pytest.approx(old), pytest.approx(theta), B, K)


def test_the_table_sets_seconds_and_operations_beside_dancegrpos():
    def one(iteration, rollout, update, flops):
        return dict(solver="DDIM", nfe_old=1.0, G=12, B=4, K=4, nfe_theta=1.0, iteration=iteration, rollout=rollout, decode=1.0, reward=0.1, update=update, optimizer=0.1, flops=flops)
    text = bench.table(dict(dance=one(20.0, 4.0, 6.0, 8e12), dpm8=one(5.0, 2.0, 3.0, 4e12)), 1e12)
    head, _, _, row = [line.split(" | ") for line in text.split("\n")]
    found = dict(zip(head, row))
    assert (found["share"], found["of DanceGRPO's s / iter."], found["of its rollout and update"], found["of its TFLOP |"]) == ("0.80", "0.250", "0.500", "0.500 |")


def test_a_matrix_products_rate_counts_a_product_and_a_sum_for_each_of_n_cubed(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bench, "now", lambda device: next(ticks))
    assert bench.matmul_rate(torch.device("cpu")) == 2 * 2048**3


def test_batching_sets_one_forward_of_all_anchors_against_one_for_each(monkeypatch, capsys):
    calls, velocity = [], Flux.velocity
    monkeypatch.setattr(Flux, "velocity", lambda model, x, *more: calls.append(len(x)) or velocity(model, x, *more))
    monkeypatch.setattr(bench, "now", lambda device: len(calls))                                      # a second for each call
    bench.batching(bench.parsed("train.py", ["--batch", "1"]), "tiny", 1)
    assert calls == [4, 1, 1, 1, 1] * 2 and "at once 1.000 s, one by one 4.000 s: 4.00 times" in capsys.readouterr().out


def test_the_lines_of_scaling_are_those_through_the_points(monkeypatch, tmp_path):
    def measure(methods, *_, **__):
        return {name: dict(iteration=1 + 0.5 * int(name.split()[1]) ** (2 if "resolution" in name else 1)) for name in methods}
    monkeypatch.setattr(bench, "measure", measure)
    bench.scaling(3, ["--device", "cpu"], tmp_path)
    text = (tmp_path / "scaling.md").read_text()
    assert text.startswith("`python -m paper.bench --scaling --repeats 3 --device cpu`") and text.count("| 1.00 + 0.5 x | 0% |") == 5


def test_a_step_of_the_ladder_does_what_its_name_says():
    for name, own in bench.LADDER.items():
        words = own.split()
        assert words[words.index("--checkpoint_blocks") + 1] == ("0" if "nothing" in name else "-1")
        assert (name.startswith("compiled"), "float8" in name, "cuDNN" in name) == ("--compile" in words, "--float8" in words, "_native_cudnn" in words)


@pytest.mark.parametrize("rank, blocks", [(0, 0), (4, 0), (0, 1), (4, -1)])
def test_operations_counted_without_numbers_are_those_of_the_network_with_them(rank, blocks):
    model = Flux(train.PRESETS["tiny"]["model"], 64, lora_rank=rank, checkpoint_blocks=blocks)
    cond = model.encode(["a dog", "a cat"])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):                     # whose matrix products are counted
        with torch.no_grad():
            model.velocity(torch.randn(6, *model.latent_shape), 0.5, cond)
        model.velocity(torch.randn(4, *model.latent_shape), 0.5, cond).mean().backward()
    calls = [("encode", 2, False), ("velocity", (6, 2), False), ("velocity", (4, 2), True)]
    assert bench.flops_of(bench.operations_of(model, types.SimpleNamespace(lora_rank=rank, checkpoint_blocks=blocks)), calls) == counter.get_total_flops()


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
    (["--repeats", "0"], "--repeats must be at least 1"), (["--only", "dpm8,foo"], "'foo', but must be of dance,"), (["--geometry", "flux"], "--geometry flux needs a GPU"), (["--json", "no/such/x.json"], "there is no folder no/such"), (["--floor", "--memory"], "not allowed with"),
])
def test_what_would_have_no_effect_or_fail_at_the_end_is_refused_at_once(monkeypatch, capsys, argv, told):
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit):
        bench.main()
    assert told in capsys.readouterr().err


def test_a_step_of_the_ladder_that_fails_is_told_and_the_others_count(monkeypatch, capsys):
    monkeypatch.setitem(bench.BLOCKS, "flux-small", dict(num_layers=1, num_single_layers=1, num_attention_heads=1))
    monkeypatch.setattr(bench, "LADDER", {"one": "--no-compile", "two": "--checkpoint_blocks -7", "three": "--max_grad_norm 1"})
    velocity, broken = Flux.velocity, []
    def watched(model, x, *more):
        v = velocity(model, x, *more)
        return v * torch.nan if broken and torch.is_grad_enabled() else v
    monkeypatch.setattr(Flux, "velocity", watched)
    monkeypatch.setattr(bench, "matmul_rate", lambda device: broken.append(1) or 1e12)              # from the second step on gradients are nan
    bench.ladder(1, "flux-small", ["--prompts_per_iteration", "1", "--resolution", "32", "--group_size", "4", "--lora_rank", "4"])
    out = capsys.readouterr()
    assert [line.split(" | ")[1] == "not here, as said above |" for line in out.out.splitlines()[2:]] == [False, True, True]
    assert "the gradient is not finite, so nothing was updated" in out.err and "checkpoint_blocks is -7" in out.err


def test_the_ladders_steps_take_turns_on_the_small_world_each_with_its_own_model(monkeypatch, capsys):
    built, load = [], train.load
    monkeypatch.setattr(bench, "LADDER", {"compiled": "--compile", "one": "--checkpoint_blocks -1", "other": "--checkpoint_blocks 0", "again": "--checkpoint_blocks 0", "last": "--checkpoint_blocks 0"})
    monkeypatch.setattr(train, "load", lambda cfg: built.append(cfg.checkpoint_blocks) or load(dataclasses.replace(cfg, compile=False)))
    bench.ladder(1, "tiny", SMALL)
    out = capsys.readouterr()
    assert built == [0, -1, 0, 0] and len(out.out.splitlines()) == 7                                  # "again" is "other"; the last is alone
    assert [line.split(":")[0] for line in out.err.splitlines() if line.startswith(("1/", "2/"))] == ["1/2 compiled", "1/2 one", "1/2 other", "1/2 again", "2/2 compiled", "2/2 one", "2/2 other", "2/2 again", "1/2 last", "2/2 last"]


def test_a_picture_of_flux_narrow_takes_no_more_of_an_evaluation_to_decode_than_flux_1_dev_s():
    shares = []
    for geometry, vae, tokens in (("flux-narrow", Flux(train.PRESETS["tiny"]["model"], 64).pipe.vae, 16), ("flux", bench.AutoencoderKL(**bench.VAE), 45 * 45)):
        with torch.device("meta"):
            config = bench.FluxTransformer2DModel(guidance_embeds=True, **bench.BLOCKS[geometry]).config
        shares.append(bench.decoding(vae, 2 * int(tokens**0.5)) / bench.operations(config, tokens, 512)[0])
    assert 0.1 < shares[0] < shares[1] < 0.14
    model = bench.build(bench.parsed("train.py", bench.SIZES["flux-narrow"].split()), "flux-narrow")
    assert model.pipe.vae.config.block_out_channels == Flux(train.PRESETS["tiny"]["model"], 64).pipe.vae.config.block_out_channels and model.encode(["a dog"])["txt"].shape == (1, 512, 4096)
