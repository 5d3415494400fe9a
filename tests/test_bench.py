"""
paper/bench.py counts and times what it says. One test per sentence.

    python -m pytest -q tests/test_bench.py
"""
import itertools, time, types
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
import machine
import rewards
import train
from model import Flux
from paper import attention, bench, counts
from diffusers import FluxTransformer2DModel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
torch.set_num_threads(1)
TINY = train.PRESETS["tiny"]["model"]
SMALL = "--prompts_per_iteration 2 --group_size 4 --resolution 32".split()


@pytest.fixture(scope="module", autouse=True)
def scorers_loaded_once():
    kept, load_all = {}, rewards.load_all

    def load_once(names, device, prompts):
        key = tuple(names.items())
        if key not in kept:
            kept[key] = load_all(names, device, prompts)
        return dict(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "load_all", load_once)
        yield


@pytest.fixture(scope="module")
def load():
    """train.load, but each kind of model is loaded only once."""
    kept = {}

    def load_once(cfg):
        kind = tuple(getattr(cfg, name) for name in bench.BUILT)
        if kind not in kept:
            kept[kind] = train.load(cfg)
        return kept[kind]
    return load_once


# ============================================================================ iterations

@pytest.mark.slow
def test_the_phases_add_up_to_an_iteration_the_first_one_does_not_count_and_nothing_is_learnt(
        monkeypatch):
    """The clock is false: it moves only in calls whose duration is set here."""
    clock, models = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def takes(seconds, call):
        def slow(*args, **more):
            clock[0] += seconds()
            return call(*args, **more)
        return slow

    def build(cfg):
        models.append(model := train.load(cfg))
        rolling = lambda: 100.0 if torch.is_grad_enabled() else 1.0     # a trained step takes more
        monkeypatch.setattr(Flux, "velocity", takes(rolling, Flux.velocity))
        monkeypatch.setattr(Flux, "decode", takes(lambda: 7.0, Flux.decode))
        return model

    first = iter([1000.0, 1000.0])              # two updates of the iteration before those counted
    step = takes(lambda: next(first, 5.0), torch.optim.AdamW.step)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    words = [*SMALL, "--num_rollout_steps", "4"]
    found = bench.measure({"dpm16": bench.METHODS["dpm16"]}, 1, words, build, warm=1)["dpm16"]
    assert found["nfe_old"] == 16               # the method's settings override the command line's
    assert (found["rollout"], found["decode"], found["reward"]) == (16, 7, 0)
    assert (found["update"], found["optimizer"]) == (2 * 9 * 100, 2 * 5)
    assert sum(found[phase] for phase in bench.PHASES) == found["iteration"]
    before, counted = found["tries"]
    assert before["iteration"] == counted["iteration"] + 2 * 995
    assert found["iteration"] == counted["iteration"]
    for now, loaded in zip(models[0].trained(), Flux(TINY, 32).trained(), strict=True):
        assert_close(now, loaded, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method, old, theta, B, K", [
    ("dpm8", 8, 4 / 3, 4, 4),
    pytest.param("dpm16", 16, 3, 4, 9, marks=pytest.mark.slow),
    pytest.param("ddim25", 25, 4, 12, 4, marks=pytest.mark.slow),
    pytest.param("dance", 25, 14, 12, 14, marks=pytest.mark.slow),
    pytest.param("fdfo", 40, 40, 12, "all", marks=pytest.mark.slow),
    ("flash", 8, 4, 12, 4)])
def test_evaluations_counted_at_the_network_give_the_columns_of_the_paper(
        method, old, theta, B, K, load):
    words = "--prompts_per_iteration 1 --resolution 32".split()
    found = bench.measure({method: bench.METHODS[method]}, 1, words, load, warm=0)[method]
    assert (found["nfe_old"], found["nfe_theta"]) == pytest.approx((old, theta))
    assert (found["B"], found["K"]) == (B, K)


def test_methods_with_equal_models_share_one(load):
    built, few = [], "--num_rollout_steps 2 --num_train_steps 1"
    methods = {name: (name, flags) for name, flags in (
        ("one", few), ("again", few), ("other", f"{few} --checkpoint_blocks -1"))}
    bench.measure(methods, 1, SMALL, lambda cfg: built.append(cfg) or load(cfg), warm=0)
    assert [cfg.checkpoint_blocks for cfg in built] == [0, -1]


# ============================================================================ the table

def test_the_table_gives_seconds_and_operations_as_shares_of_dancegrpos():
    def one(iteration, rollout, update, flops):
        return dict(solver="DDIM", nfe_old=1.0, G=12, B=4, K=4, nfe_theta=1.0, iteration=iteration,
                    rollout=rollout, decode=1.0, reward=0.1, update=update, optimizer=0.1,
                    flops=flops)
    text = bench.table(dict(dance=one(20.0, 4.0, 6.0, 8e12), dpm8=one(5.0, 2.0, 3.0, 4e12)), 1e12)
    head, _, _, row = [line.split(" | ") for line in text.split("\n")]
    found = dict(zip(head, row, strict=True))
    assert (found["TFLOP"], found["TFLOP/s"], found["share"]) == ("4", "0.8", "0.80")
    assert found["of DanceGRPO's s / iter."] == "0.250"
    assert found["of its rollout and update"] == "0.500"
    assert found["of its TFLOP |"] == "0.500 |"


def test_a_matrix_product_counts_two_n_cubed_operations(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(bench, "now", lambda device: next(ticks))
    assert bench.matmul_rate(torch.device("cpu")) == 2 * 2048**3


# ============================================================================ operations and memory

@pytest.mark.parametrize("rank, blocks", [(0, 0), (4, 0), (0, 1), (4, -1)])
def test_operations_counted_on_tensors_without_numbers_are_those_of_the_real_network(rank, blocks):
    model = Flux(TINY, 64, lora_rank=rank, checkpoint_blocks=blocks)
    cond = model.encode(["a dog", "a cat"])
    x = torch.randn(6, *model.latent_shape)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():                   # SDPBackend.MATH: its matrix products are counted
            model.velocity(x, 0.5, cond)
        model.velocity(x[:4], 0.5, cond).mean().backward()
    cfg = types.SimpleNamespace(lora_rank=rank, checkpoint_blocks=blocks)
    forward, both = bench.operations_of(model, cfg)
    assert 6 * forward + 4 * both == counter.get_total_flops()


def test_attentions_products_of_queries_and_keys_do_not_count_as_memory():
    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    net, peaks = net.bfloat16(), []
    for tokens in (1000, 4000):
        inputs = counts.inputs_of(net.config, 1, tokens, tokens, torch.bfloat16)
        peaks.append(counts.working_set(net, lambda: net(**inputs)[0], train=False))
    assert peaks[1] == pytest.approx(4 * peaks[0], rel=0.05)    # with them: nearly 16 times


def test_the_memory_peak_leaves_out_weights_views_and_tensors_that_were_freed():
    net = torch.nn.Linear(1000, 1000, bias=False)
    with torch.no_grad(), counts.Live(net) as live:
        x = torch.ones(1000, 1000)
        for _ in range(5):
            x = x @ net.weight.t()              # two are alive: the old and the new x, 4 MB each
        x.view(-1)[0] = 0
    assert live.peak == 8_000_000


def test_averaging_gradients_over_processes_takes_no_memory_so_their_number_is_not_in_the_table(
        monkeypatch):
    net = torch.nn.Linear(100, 100)
    net(torch.ones(1, 100)).sum().backward()
    before = [w.grad.clone() for w in net.parameters()]
    done = types.SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(machine, "WORLD", 2)
    monkeypatch.setattr(machine.dist, "all_reduce", lambda gradient, async_op: done)
    model = types.SimpleNamespace(trained=lambda: [*net.parameters()])
    with counts.Live(net) as live:
        machine.average_gradients(types.SimpleNamespace(fsdp=False), model)
    assert live.peak == 0
    assert_close([w.grad for w in net.parameters()], [gradient / 2 for gradient in before])


# ============================================================================ the ladder

def test_a_step_of_the_ladder_does_what_its_name_says():
    for name, settings, change in bench.LADDER:
        words = settings.split()
        recomputed = words[words.index("--checkpoint_blocks") + 1]
        assert recomputed == ("0" if "nothing" in name else "-1")
        assert name.startswith("compiled") == ("--compile" in words)
        assert ("CUDA graph" in name) == (change is attention.in_one_graph)


@pytest.mark.slow
def test_an_iteration_runs_at_the_narrow_geometry(monkeypatch, capsys):
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1e12)
    bench.main("methods --only dpm8 --warm 1 --geometry flux-narrow --repeats 1 --resolution 32 "
               "--group_size 4 --threads 1".split())
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    seconds = dict(zip(rows[0], rows[2], strict=True))
    assert float(seconds["s / iter."]) >= float(seconds["rollout"]) > 0
    assert float(seconds["update"]) > 0


@pytest.mark.slow
def test_a_step_of_the_ladder_that_is_not_possible_is_named_and_the_others_are_timed_and_profiled(
        monkeypatch, capsys):
    monkeypatch.setattr(bench, "LADDER", [
        ("one", "--no-compile", None), ("two", "--checkpoint_blocks -7", None),
        ("three", "", attention.in_one_graph), ("four", "--seed 1", None),
        ("five", "--no-compile", None)])
    velocity, timed = Flux.velocity, []

    def watched(model, x, *more):               # nan from the second step on
        v = velocity(model, x, *more)
        return v * torch.nan if timed and torch.is_grad_enabled() else v

    monkeypatch.setattr(Flux, "velocity", watched)
    monkeypatch.setattr(bench, "operations_of", lambda model, cfg: (1, 3))
    monkeypatch.setattr(bench, "matmul_rate", lambda device: timed.append(1) or 1e12)
    flags = [*SMALL, "--num_rollout_steps", "2", "--num_train_steps", "1"]
    bench.ladder(1, "tiny", flags, [1, 4, 2, 3], profile=True)
    out = capsys.readouterr()
    rows = [line.split(" | ") for line in out.out.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["step", "---", "one", "four", "two", "three"]
    found = dict(zip(rows[0], rows[2], strict=True))
    assert float(found["gradient norm"]) > 0 and float(found["s / iter."]) > 0
    assert all(row[1] == "not possible here, see above |" for row in rows[3:])
    assert sum("aten::addmm" in line for line in out.out.splitlines()) == 1     # of the profile
    assert "the gradient is not finite, so nothing was updated" in out.err
    assert "checkpoint_blocks is -7" in out.err
    assert "three: ValueError: a CUDA graph needs a GPU" in out.err


# ============================================================================ the command line

@pytest.mark.parametrize("words, said", [
    ("memory --resolution 1024", "unrecognized arguments: --resolution 1024"),
    ("ladder --warm 3", "unrecognized arguments: --warm 3"),
    ("ladder --steps 1,9", "argument --steps: '9' is none of 1, 2, 3, 4, 5"),
    ("methods --repeats 0", "--repeats must be at least 1"),
    ("methods --warm -1", "--warm at least 0"),
    ("methods --only dpm8,foo", "argument --only: 'foo' is none of dance,"),
    ("methods --geometry flux", "--geometry flux needs a GPU"),
    ("nothing", "invalid choice: 'nothing'")])
def test_options_without_effect_and_options_that_would_fail_later_are_refused_at_once(
        words, said, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert said in capsys.readouterr().err


def test_without_a_command_all_methods_are_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda methods, repeats, flags, build, warm:
                        asked.append((list(methods), repeats, flags, warm)) or {})
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1.0)
    bench.main([])
    assert asked == [(list(bench.METHODS), 5, [], 2)]
