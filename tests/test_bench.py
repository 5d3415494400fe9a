"""
paper/bench.py counts and times what it says, and paper/float8.py rounds only without gradients. One
test per sentence.

    python -m pytest -q tests/test_bench.py
"""
import dataclasses, functools, importlib.machinery, sys, time, types
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
import rewards
import train
from model import Flux
from paper import attention, bench, counts, float8
from diffusers import FluxTransformer2DModel

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
torch.set_num_threads(1)
TINY = train.PRESETS["tiny"]["model"]
SMALL = "--prompts_per_iteration 2 --group_size 4 --resolution 32".split()
PROMPTS = ["a red apple on a table", "the moon over a hill"]


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


@pytest.fixture
def narrow(monkeypatch):
    """flux-small with one block of each kind, with one head, and a VAE with eight channels."""
    blocks = dict(num_layers=1, num_single_layers=1, num_attention_heads=1)
    vae = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    monkeypatch.setitem(bench.BLOCKS, "flux-small", blocks)
    for name, value in vae.items():
        monkeypatch.setitem(bench.VAE, name, value)
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1e12)
    return "--prompts_per_iteration 1 --resolution 32 --group_size 4 --threads 1".split()


# ============================================================================ iterations and calls

@pytest.mark.parametrize("method", [
    "dpm8", *(pytest.param(one, marks=pytest.mark.slow) for one in ("mix", "nft"))])
def test_bare_calls_have_the_sizes_and_order_of_an_iterations_calls_and_its_backward_passes(
        method, load, monkeypatch):
    replay, backward, seen, backwards = bench.replay, torch.Tensor.backward, [], []

    def watched(model, scorers, calls, prompts):
        backwards.clear()
        with bench.recorded(model, scorers, types.SimpleNamespace(step=None)) as (again, _):
            replay(model, scorers, calls, prompts)
        seen.append(([call for call in calls if call[0] != "step"], again))
        trained = sum(trained for what, _, trained in calls if what == "velocity")
        assert len(backwards) == trained > 0

    monkeypatch.setattr(bench, "replay", watched)
    monkeypatch.setattr(torch.Tensor, "backward",
                        lambda x, *how: backwards.append(1) or backward(x, *how))
    found = bench.measure({method: bench.METHODS[method]}, 1, SMALL, load, warm=0)[method]
    assert len(seen) == 2                       # once for the seconds, once for the memory
    assert all(calls and calls == again for calls, again in seen)
    assert found["ratio"] == found["iteration"] / found["bare"]


def test_the_recorded_calls_are_those_of_algorithm_1_with_two_prompts(
        load, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "replay", lambda model, scorers, calls, prompts: seen.append(calls))
    bench.measure({"dpm8": bench.METHODS["dpm8"]}, 1, SMALL, load, warm=0)
    rollout = [("velocity", (8, 2), False)] * 8                 # two prompts, G = 4
    a_step = ("velocity", (4, 2), True)                         # two of four anchors of each prompt
    update = [*[a_step] * 4, ("step", None, True)]              # K = 4
    assert seen[0] == [("encode", 2, False), *rollout, ("decode", 8, False),
                       ("preference", 8, True),
                       *update, *update]


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
    found = bench.measure({"dpm16": bench.METHODS["dpm16"]}, 1, words, build, False, 1)["dpm16"]
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
    found = bench.measure({method: bench.METHODS[method]}, 1, words, load, False, 0)[method]
    assert (found["nfe_old"], found["nfe_theta"]) == pytest.approx((old, theta))
    assert (found["B"], found["K"]) == (B, K)


def test_a_model_is_changed_once_and_only_for_its_own_methods(load):
    changed, own = [], bench.METHODS["dpm8"]
    methods = {"plain": own, "changed": own, "again": own, "plain too": own}
    change = lambda model: changed.append(model)
    built = []
    build = lambda cfg: built.append(load(cfg)) or built[-1]
    words = [*SMALL, "--num_rollout_steps", "2", "--num_train_steps", "1"]
    bench.measure(methods, 1, words, build, False, 0, dict(changed=change, again=change))
    assert len(built) == 2 and changed == [built[1]]


# ============================================================================ tables and rates

def test_the_table_gives_seconds_and_operations_as_shares_of_dancegrpos():
    def one(iteration, rollout, update, flops):
        return dict(solver="DDIM", nfe_old=1.0, G=12, B=4, K=4, nfe_theta=1.0, iteration=iteration,
                    rollout=rollout, decode=1.0, reward=0.1, update=update, optimizer=0.1,
                    flops=flops)
    text = bench.table(dict(dance=one(20.0, 4.0, 6.0, 8e12), dpm8=one(5.0, 2.0, 3.0, 4e12)), 1e12)
    head, _, _, row = [line.split(" | ") for line in text.split("\n")]
    found = dict(zip(head, row))
    assert found["share"] == "0.80"
    assert found["of DanceGRPO's s / iter."] == "0.250"
    assert found["of its rollout and update"] == "0.500"
    assert found["of its TFLOP |"] == "0.500 |"


def test_a_matrix_product_counts_two_n_cubed_operations(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bench, "now", lambda device: next(ticks))
    assert bench.matmul_rate(torch.device("cpu")) == 2 * 2048**3


def test_the_share_is_the_operations_per_second_over_the_rate_of_a_matrix_product():
    assert bench.rates(dict(flops=3e12, iteration=2.0), 6e12) == ("3", "1.5", "6", "0.25")


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
    calls = [("encode", 2, False), ("velocity", (6, 2), False), ("velocity", (4, 2), True)]
    cfg = types.SimpleNamespace(lora_rank=rank, checkpoint_blocks=blocks)
    assert bench.flops_of(bench.operations_of(model, cfg), calls) == counter.get_total_flops()


def test_attentions_products_of_queries_and_keys_do_not_count_as_memory():
    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    peaks = [counts.working_set(net, counts.calls(net.bfloat16(), 1, 1, tokens, text=tokens), False)
             for tokens in (1000, 4000)]
    assert peaks[1] == pytest.approx(4 * peaks[0], rel=0.05)    # with them: nearly 16 times


def test_the_memory_peak_leaves_out_weights_views_and_tensors_that_were_freed():
    net = torch.nn.Linear(1000, 1000, bias=False)
    with torch.no_grad(), counts.Live(net) as live:
        x = torch.ones(1000, 1000)
        for _ in range(5):
            x = x @ net.weight.t()              # two are alive: the old and the new x, 4 MB each
        x.view(-1)[0] = 0
    assert live.peak == 8_000_000


@pytest.mark.slow
def test_decoding_takes_no_more_of_an_evaluation_in_flux_narrow_than_in_flux_1_dev():
    def share(geometry, vae, tokens):
        with torch.device("meta"):
            net = bench.FluxTransformer2DModel(guidance_embeds=True, **bench.BLOCKS[geometry])
        forward, _ = counts.operations(net.config, tokens, 512)
        with torch.device("meta"):
            vae, side = type(vae).from_config(vae.config), 2 * int(tokens**0.5)
        with FlopCounterMode(display=False) as decoding, torch.no_grad():
            vae.decode(torch.empty(1, vae.config.latent_channels, side, side, device="meta"))
        return decoding.get_total_flops() / forward

    small = Flux(TINY, 64).pipe.vae
    with torch.device("meta"):
        large = bench.AutoencoderKL(**bench.VAE)
    narrow, flux = share("flux-narrow", small, 16), share("flux", large, 45 * 45)
    assert 0.02 < narrow < flux < 0.14


def test_flux_narrow_has_the_small_worlds_vae_and_as_many_text_tokens_as_flux_1_dev():
    cfg = bench.parsed("train.py", bench.SIZES["flux-narrow"].split())
    model = bench.build(cfg, "flux-narrow")
    small = Flux(TINY, 64).pipe.vae
    assert model.pipe.vae.config.block_out_channels == small.config.block_out_channels
    assert model.encode(["a dog"])["txt"].shape == (1, 512, 4096)


# ============================================================================ the ladder

def test_a_step_of_the_ladder_does_what_its_name_says():
    for name, (settings, change) in bench.LADDER.items():
        words = settings.split()
        blocks = words[words.index("--checkpoint_blocks") + 1]
        assert blocks == ("0" if "nothing" in name else "35" if "35" in name else "-1")
        assert name.startswith("compiled") == ("--compile" in words)
        assert ("float8" in name) == (change is float8.prepare)
        assert ("CUDA graph" in name) == (change is attention.in_one_graph)


@pytest.mark.slow
def test_an_iteration_and_then_the_ladder_run_at_another_geometry(
        narrow, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LADDER", {"a step": ("--no-compile", None)})
    for command in (["methods", "--only", "dpm8", "--warm", "1", "--no-bare"], ["ladder"]):
        bench.main([*command, "--geometry", "flux-small", "--repeats", "1", *narrow])
        printed = capsys.readouterr().out.splitlines()
        rows = [line.split(" | ") for line in printed if line.startswith("| ")]
        seconds = dict(zip(rows[0], rows[2]))
        assert float(seconds["s / iter."]) >= float(seconds["rollout"]) > 0
        assert float(seconds["update"]) > 0


@pytest.mark.slow
def test_a_step_of_the_ladder_that_is_not_possible_is_named_and_the_others_are_timed(
        narrow, monkeypatch, capsys):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "LADDER", {
        "one": ("--no-compile", None), "two": ("--checkpoint_blocks -7", None),
        "three": ("", float8.prepare), "four": ("--seed 1", None)})
    velocity, broken = Flux.velocity, []

    def watched(model, x, *more):
        v = velocity(model, x, *more)
        return v * torch.nan if broken and torch.is_grad_enabled() else v

    monkeypatch.setattr(Flux, "velocity", watched)
    monkeypatch.setattr(bench, "operations_of", lambda model, cfg: (1, 3))
    monkeypatch.setattr(bench, "matmul_rate", lambda device: broken.append(1) or 1e12)
    bench.ladder(1, "flux-small", [*narrow, "--lora_rank", "4"])        # nan from the second step
    out = capsys.readouterr()
    failed = [line.split(" | ")[1] == "not possible here, see above |"
              for line in out.out.splitlines()[2:]]
    assert failed == [False, True, True, True]
    assert "the gradient is not finite, so nothing was updated" in out.err
    assert "checkpoint_blocks is -7" in out.err
    assert "three: float8 needs torchao" in out.err


@pytest.mark.slow
def test_on_the_small_world_the_steps_of_the_ladder_take_turns(monkeypatch, capsys):
    built, load = [], train.load

    def built_without_compiling(cfg):
        built.append(cfg.checkpoint_blocks)
        return load(dataclasses.replace(cfg, compile=False))

    monkeypatch.setattr(bench, "LADDER", {
        "compiled": ("--compile", None), "one": ("--checkpoint_blocks -1", None),
        "other": ("--checkpoint_blocks 0", None), "again": ("--checkpoint_blocks 0", None)})
    monkeypatch.setattr(train, "load", built_without_compiling)
    monkeypatch.setattr(bench, "operations_of", lambda model, cfg: (1, 3))
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1e12)
    bench.ladder(1, "tiny", [*SMALL, "--num_rollout_steps", "2", "--num_train_steps", "1"])
    out = capsys.readouterr()
    assert built == [0, -1, 0]                  # "again" shares the model of "other"
    assert len(out.out.splitlines()) == 6
    said = [line.split(":")[0] for line in out.err.splitlines() if line.startswith(("1/", "2/"))]
    together = ["compiled", "one", "other", "again"]
    assert said == [*(f"1/2 {name}" for name in together), *(f"2/2 {name}" for name in together)]


@pytest.mark.slow
def test_the_steps_of_the_ladder_that_are_asked_for_come_alone_each_with_its_busiest_operators(
        monkeypatch, capsys):
    monkeypatch.setattr(bench, "LADDER", {
        "one": ("--no-compile", None), "two": ("--checkpoint_blocks -1", None),
        "three": ("--checkpoint_blocks 35", None)})
    monkeypatch.setattr(bench, "operations_of", lambda model, cfg: (1, 3))
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1e12)
    flags = [*SMALL, "--num_rollout_steps", "2", "--num_train_steps", "1"]
    bench.ladder(1, "tiny", flags, steps=[3, 1], profile=True)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| step", "| ---", "| three", "| one"]
    for row in rows[2:]:
        found = dict(zip(rows[0], row, strict=True))
        assert float(found["gradient norm |"].strip(" |")) > 0
    assert lines.count("three") == lines.count("one") == 1      # heads of the profiles
    assert sum("aten::addmm" in line for line in lines) == 2


# ============================================================================ float8

def velocity_and_gradients(model, x):
    """The velocity without gradients, with them, and the gradients of a loss."""
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        rolled = model.velocity(x, 0.5, cond)
    v = model.velocity(x, 0.5, cond)
    v.pow(2).mean().backward()
    return [rolled, v.detach(), *(w.grad for w in model.trained() if w.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_compiled_blocks_in_float8_give_the_same_velocity_and_gradients_and_share_their_graphs(
        lora_rank, monkeypatch):
    pytest.importorskip("torchao")
    graphs, found = [], []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()                      # forgets the blocks of the last case
    compile = functools.partialmethod(torch.nn.Module.compile, backend=counted)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for compiled in (False, True):
        torch.manual_seed(0)                    # for the adapters
        model = float8.prepare(Flux(TINY, 64, compiled=compiled, lora_rank=lora_rank))
        x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
        found.append(velocity_and_gradients(model, x))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)
    # Two kinds of blocks, with and without gradients. The first block of a kind may get its input
    assert 4 <= len(graphs) <= 7                # in another form. Six separate blocks need twelve.


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_float8_rounds_each_row_that_a_blocks_layers_multiply_and_only_without_gradients(
        lora_rank):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    plain = Flux(TINY, 64, lora_rank=lora_rank)
    torch.manual_seed(0)
    cheap = float8.prepare(Flux(TINY, 64, lora_rank=lora_rank))
    x = torch.randn(2, *plain.latent_shape)
    block = cheap.blocks()[0]
    layer = block.attn.to_q.base_layer if lora_rank else block.attn.to_q
    assert type(layer) is not torch.nn.Linear
    assert type(block.norm1.linear) is torch.nn.Linear          # the norms' layers stay
    adapters = {type(part) for name, part in block.named_modules()
                if "lora_A." in name or "lora_B." in name}
    assert adapters == ({torch.nn.Linear} if lora_rank else set())

    def rounded(w):
        """Each row has its own scale: the power of two that brings its largest number near 448, the
        largest of e4m3."""
        scale = (448 / w.abs().amax(1, keepdim=True).double()).log2().floor().exp2()
        return (w.double() * scale).to(torch.float8_e4m3fn).double() / scale

    inputs = torch.randn(5, layer.in_features)
    with torch.no_grad():
        product = rounded(inputs) @ rounded(layer.weight).T + layer.bias
        assert_close(layer(inputs).double(), product, rtol=2**-8, atol=1e-3)    # comes in bf16
    rolled, *trained = velocity_and_gradients(plain, x)
    rolled_in_float8, *still = velocity_and_gradients(cheap, x)
    assert 0.005 < (rolled_in_float8 - rolled).norm() / rolled.norm() < 0.1
    for a, b in zip(trained, still, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def noted(monkeypatch):
    """A list that a false torchao fills: whether gradients are on, at each call of a layer."""
    seen = []

    class Float8Linear(torch.nn.Linear):
        def forward(self, x):
            seen.append(torch.is_grad_enabled())
            return super().forward(x)

    def convert(block, module_filter_fn, config):
        for name, layer in block.named_modules():
            if type(layer) is torch.nn.Linear and module_filter_fn(layer, name):
                layer.__class__ = Float8Linear

    config = types.SimpleNamespace(from_recipe_name=str)
    for name, more in (("torchao", {}), ("torchao.float8.float8_linear", dict(
            Float8Linear=Float8Linear)), ("torchao.float8", dict(
            convert_to_float8_training=convert, Float8LinearConfig=config))):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(more)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_a_run_rolls_out_in_float8_and_trains_without_it(noted, monkeypatch):
    trained, forward = [], torch.nn.Linear.forward

    def watched(layer, x):
        if torch.is_grad_enabled():
            trained.append(type(layer).__name__)
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    prepared = lambda cfg: float8.prepare(train.load(cfg))
    bench.measure({"dpm8": bench.METHODS["dpm8"]}, 1, SMALL, prepared, False, 0)
    layers = len(noted) // 8                    # 8 steps of a rollout
    assert layers > 0 and noted == [False] * 8 * layers
    assert trained.count("WithoutGradients") == 2 * 4 * layers          # K = 4, twice


def test_without_torchao_float8_is_refused_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="float8 needs torchao; pip install torchao"):
        float8.prepare(types.SimpleNamespace(device=torch.device("cpu")))


# ============================================================================ the command line

@pytest.mark.parametrize("words, said", [
    ("memory --resolution 1024", "unrecognized arguments: --resolution 1024"),
    ("memory --geometry flux", "unrecognized arguments: --geometry flux"),
    ("ladder --warm 3", "unrecognized arguments: --warm 3"),
    ("ladder --only dance", "unrecognized arguments: --only dance"),
    ("ladder --steps 1,9", "--steps has '9', but must be of 1 to 7"),
    ("ladder --json x.json", "unrecognized arguments: --json x.json"),
    ("methods --repeats 0", "--repeats must be at least 1"),
    ("methods --warm -1", "--warm at least 0"),
    ("methods --only dpm8,foo", "'foo', but the methods are dance,"),
    ("methods --geometry flux", "--geometry flux needs a GPU"),
    ("methods --json no/such/x.json", "there is no folder no/such"),
    ("memory ladder", "unrecognized arguments: ladder"),
    ("nothing", "invalid choice: 'nothing'")])
def test_options_without_effect_and_options_that_would_fail_later_are_refused_at_once(
        words, said, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(SystemExit):
        bench.main(words.split())
    assert said in capsys.readouterr().err


def test_without_a_command_all_methods_are_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda methods, repeats, *more: asked.append(
        (list(methods), repeats, more[0], *more[2:])) or {})
    monkeypatch.setattr(bench, "matmul_rate", lambda device: 1.0)
    bench.main([])
    assert asked == [(list(bench.METHODS), 5, [], True, 2)]
