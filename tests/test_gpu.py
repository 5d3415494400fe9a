"""
What only a GPU can show: bf16 by autocast, compiled kernels, fused AdamW, NCCL, memory. One test
per sentence. Without CUDA all are skipped. The quick ones come first; paper/gpu.sh runs them.

    python -m pytest -q -s tests/test_gpu.py
    TEST_DEVICE=cpu python -m pytest -q -s tests/test_gpu.py        # a rehearsal without a GPU

In the rehearsal bf16 is forced upon the CPU, processes talk through gloo instead of NCCL, the two
scorers have two layers, and memory is that of a narrow model, counted instead of measured. -s shows
the numbers.
"""
import gc, os
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # before CUDA starts: see `exact`
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
import machine                                                  # (before diffusers)
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel, FluxPipeline
import rewards
import run
import train
from tests.conftest import SHORT, TINY, lines_of, weights_of
from tests.small_pipelines import build
from model import Flux
from pipeline import Pipeline
from paper import bench, counts

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a GPU")]
FLUX, PROMPTS = TINY / "flux", ["a red apple", "an octopus, 3d style"]


def autocast_always(monkeypatch, on):
    """Switch the model's autocast to bf16 on or off, whatever the device is. Scorers have their
    own, in float16."""
    autocast = torch.autocast

    def always(kind, dtype=None, enabled=True):
        return autocast(kind, dtype, enabled=on if dtype == torch.bfloat16 else enabled)

    monkeypatch.setattr(torch, "autocast", always)


@pytest.fixture
def bf16(monkeypatch):
    """The network multiplies in bf16, as on a GPU."""
    autocast_always(monkeypatch, True)


@pytest.fixture
def float32(monkeypatch):
    """The network multiplies in float32, and not in TF32, which cuDNN takes by default."""
    autocast_always(monkeypatch, False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def exact():
    """Kernels whose sums have a fixed order. Attention is then by plain matrix products."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """One process in a group of one, which talks to itself through NCCL, or gloo on a CPU."""
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small(device, **more):
    """The small FLUX, all of it in float32: on a GPU a folder's VAE would be loaded in bf16."""
    torch.manual_seed(0)                        # of adapters
    return Flux(FluxPipeline.from_pretrained(FLUX, dtype=torch.float32), 64, device, **more)


def noise(model, count=4):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(1))


def velocity_and_gradients(model):
    """-> the velocity, and the gradients of its mean square in one vector, on the CPU."""
    v = model.velocity(noise(model).to(model.device), 0.5, model.encode(PROMPTS))
    v.pow(2).mean().backward()
    gradients = torch.cat([w.grad.flatten() for w in model.trained() if w.grad is not None])
    return v.detach().cpu(), gradients.cpu()


def distance(a, b):
    """|a - b| over |b|."""
    return ((a - b).norm() / b.norm()).item()


def train_small(out, *more, iterations=2):
    settings = [*SHORT, "--device", DEVICE, "--out_dir", str(out)]
    assert train.main([*settings, "--iterations", str(iterations), *more]) is None
    return lines_of(out, seconds=False)


# ==================================================================== numbers

def test_velocity_pictures_and_gradients_are_the_cpus(float32):
    models = small("cpu"), small(DEVICE)
    (v, gradients), (v_there, gradients_there) = map(velocity_and_gradients, models)
    x = noise(models[0])
    images, images_there = (model.decode(x.to(model.device)).cpu() for model in models)
    print(f"\nfloat32 against the CPU's: velocity {distance(v_there, v):.1e}, gradients "
          f"{distance(gradients_there, gradients):.1e}, "
          f"pictures {(images_there - images).abs().max():.1e}")
    assert distance(v_there, v) < 1e-4
    assert distance(gradients_there, gradients) < 1e-3
    assert_close(images_there, images, rtol=0, atol=1e-3)


def test_in_bf16_velocity_and_gradients_are_near_those_of_float32(monkeypatch):
    with monkeypatch.context() as patch:
        autocast_always(patch, False)
        v, gradients = velocity_and_gradients(small("cpu"))
    with monkeypatch.context() as patch:
        autocast_always(patch, True)
        v_there, gradients_there = velocity_and_gradients(small(DEVICE))
    print(f"\nbf16 against float32: velocity {distance(v_there, v):.1e}, gradients "
          f"{distance(gradients_there, gradients):.1e}")
    assert v_there.dtype == torch.float32
    assert 1e-4 < distance(v_there, v) < 0.15                   # on an H100: 0.087
    assert distance(gradients_there, gradients) < 0.6           # there: 0.35


@pytest.mark.parametrize("settings", [[], ["--lora_rank", "4"]], ids=["all weights", "adapters"])
def test_before_the_first_update_the_ratio_is_1_in_bf16_with_the_replayed_anchor(
        bf16, tmp_path, settings):
    full = ["--prompts_per_iteration", "2", "--group_size", "12", "--num_rollout_steps", "8",
            "--num_anchors", "4", "--num_train_steps", "4", "--updates_per_iteration", "2"]
    ratios = {}
    for anchor in ("replay", "rollout"):
        line, = train_small(tmp_path / anchor, *full, *settings, "--old_anchor", anchor,
                            iterations=1)
        ratios[anchor] = line["first_ratio"]
        assert line["skipped"] == 0 and line["grad_norm"] > 0
    print(f"\nlargest |rho - 1| before the first update: {ratios}")
    assert ratios["replay"] < 1e-3


def test_the_rewards_of_a_run_are_those_of_the_cpus(tmp_path):
    """Noise and draws are the same. What differs is rounding: bf16 against float32."""
    lines = train_small(tmp_path / "there")
    here = train_small(tmp_path / "here", "--device", "cpu")
    print("\nreward, there and on a CPU:", [(a["reward"], b["reward"])
                                            for a, b in zip(lines, here, strict=True)])
    for a, b in zip(lines, here, strict=True):
        assert abs(a["reward"] - b["reward"]) < 0.02
        assert abs(a["reward_std"] - b["reward_std"]) < 0.02
        assert a["flat_groups"] == b["flat_groups"] and a["skipped"] == 0


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_recomputed_blocks_give_the_same_gradients_in_bf16(bf16, exact, lora_rank):
    v, gradients = velocity_and_gradients(small(DEVICE, lora_rank=lora_rank))
    again = velocity_and_gradients(small(DEVICE, lora_rank=lora_rank, checkpoint_blocks=-1))
    assert torch.equal(again[0], v)
    assert distance(again[1], gradients) < 1e-4                 # if one was in float32: 0.16


def test_a_run_on_a_gpu_has_the_fused_adamw(tmp_path):
    cfg = train.parse_config([*SHORT, "--device", DEVICE, "--out_dir", str(tmp_path / "run")])
    assert run.Run(cfg, train.load(cfg), {}).opt.defaults["fused"] == CUDA


def test_a_run_that_was_resumed_ends_bit_equal(exact, tmp_path):
    lines = train_small(tmp_path / "once", iterations=4)
    train_small(tmp_path / "twice", iterations=2)
    assert train_small(tmp_path / "twice", "--resume", iterations=4) == lines
    weights, again = weights_of(tmp_path / "once", 4), weights_of(tmp_path / "twice", 4)
    assert all(torch.equal(w, again[name]) for name, w in weights.items())


def test_without_fixed_sums_a_run_that_was_resumed_ends_nearly_equal(tmp_path):
    lines = train_small(tmp_path / "once", iterations=4)
    train_small(tmp_path / "twice", iterations=2)
    resumed = train_small(tmp_path / "twice", "--resume", iterations=4)
    print(f"\nwith the default kernels a resumed run is bit-equal: {resumed == lines}")
    for a, b in zip(resumed, lines, strict=True):
        assert abs(a["reward"] - b["reward"]) < 0.02


def test_text_encoders_that_are_offloaded_say_the_same_and_leave_the_gpu():
    plain, offloaded = small(DEVICE), small(DEVICE, text_device="offload")
    for _ in range(2):
        a, b = plain.encode(PROMPTS), offloaded.encode(PROMPTS)
        assert b["txt"].device.type == b["vec"].device.type == DEVICE
        assert_close(a, b, rtol=0, atol=1e-5)
        assert {w.device.type for part in offloaded.encoders for w in part.parameters()} == {"cpu"}
    assert {w.device.type for part in plain.encoders for w in part.parameters()} == {DEVICE}


def test_a_run_with_offloaded_text_encoders_is_the_same_run(exact, tmp_path):
    lines = train_small(tmp_path / "plain")
    assert train_small(tmp_path / "off", "--text_encoder_device", "offload") == lines


# ==================================================================== several processes

@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "fsdp2"])
def test_one_process_in_a_group_makes_the_run_of_one_without(
        fsdp, alone, bf16, tmp_path, monkeypatch):
    lines = train_small(tmp_path / "plain")
    monkeypatch.setattr(train, "check", lambda cfg: None)       # it refuses FSDP for one process
    if not fsdp:
        def average(cfg, model):                                # as it would with two
            gradients = [w.grad.clone() for w in model.trained()]
            with monkeypatch.context() as patch:
                patch.setattr(machine, "WORLD", 2)
                machine.average_gradients(cfg, model)
            for w, gradient in zip(model.trained(), gradients, strict=True):
                assert_close(w.grad, gradient / 2)              # the sum of one, divided by two
                w.grad.copy_(gradient)
        monkeypatch.setattr(train, "average_gradients", average)
    settings = ["--fsdp"] * fsdp
    grouped = train_small(tmp_path / "grouped", *settings)
    print("\nrewards, gradient norms:", [(a["reward"], b["reward"], a["grad_norm"], b["grad_norm"])
                                         for a, b in zip(grouped, lines, strict=True)])
    for a, b in zip(grouped, lines, strict=True):
        assert a["skipped"] == 0 and a["first_ratio"] < 1e-3
        assert abs(a["reward"] - b["reward"]) < 0.02
    assert grouped[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=0.1)
    weights, base = weights_of(tmp_path / "grouped", 2), weights_of(tmp_path / "plain", 2)
    before = FluxPipeline.from_pretrained(FLUX).transformer.state_dict()
    for name, w in weights.items():
        assert w.dtype == torch.float32
        assert_close(w, base[name], rtol=0, atol=1e-3)
    assert any(not torch.equal(w, before[name]) for name, w in weights.items())
    again = train_small(tmp_path / "grouped", *settings, "--resume", iterations=3)
    assert again[:2] == grouped and len(again) == 3


# ==================================================================== the published sizes

def random_clip(scorer, quick_gelu, size):
    """A scorer that runs in half precision, with its published network and random weights."""
    import open_clip
    from tests.test_rewards import lively
    config = open_clip.get_model_config("ViT-H-14")
    config["vision_cfg"]["image_size"] = size
    if not CUDA:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    rewards.Cosine.__init__(scorer, device=DEVICE)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        scorer.net = lively(open_clip.model.CLIP(**config, quick_gelu=quick_gelu))
    scorer.tokenizer = open_clip.get_tokenizer("ViT-H-14")
    return scorer


@pytest.mark.parametrize("name, size, quick_gelu",
                         [("hpsv2", 224, False), ("clipscore", 378, True)])
def test_scorers_in_half_precision_keep_the_third_decimal(name, size, quick_gelu):
    kind = rewards.find(name)[0]
    scorer = random_clip(kind.__new__(kind), quick_gelu, size)
    if name == "clipscore":
        from open_clip import image_transform
        scorer.transform = image_transform(size, is_train=False, resize_mode="squash")
    count = 12 if CUDA else 3
    images = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    images = torch.nn.functional.interpolate(images, (720, 720), mode="bicubic").clamp(0, 1)
    prompts = [PROMPTS[i % 2] for i in range(count)]
    pixels, found = (images * 255).round().byte().to(DEVICE), {}
    for half in (False, True):
        scorer.encode_one.cache_clear()
        with torch.no_grad(), torch.autocast(DEVICE, torch.float16, enabled=half):
            image, text = scorer.encode_image(pixels), scorer.cached_text(prompts)
        assert (image.dtype == torch.float16) == half
        image, text = (torch.nn.functional.normalize(x.float(), dim=1) for x in (image, text))
        found[half] = (image * text).sum(1)
    error, spread = (found[True] - found[False]).abs().max(), found[False].std()
    print(f"\n{name}: scores {found[False].mean():.3f} +- {spread:.4f}, in half precision off by "
          f"up to {error:.1e}")
    assert spread > 1e-3                        # they differ by more than the error
    assert error < 5e-4
    if CUDA:                                    # and that is what the scorer itself does
        scorer.encode_one.cache_clear()
        assert_close(scorer.score(pixels, prompts), found[True] * scorer.scale)


def peaks(model, x, cond, rank, trained):
    """Bytes beside the weights that one velocity takes, trained: with its gradients -> measured,
    computed. Prints them, and its seconds."""
    def call():
        with torch.set_grad_enabled(trained):
            v = model.velocity(x, 0.5, cond)
            if trained:
                v.mean().backward()
        return v

    dtype, rows = torch.bfloat16 if CUDA else torch.float32, model.batch or len(x)
    with torch.device("meta"):
        net = type(model.transformer).from_config(model.transformer.config)
    net = net.to(dtype).requires_grad_(False)
    counts.add_lora(net, rank)
    counts.recompute(net, -1)
    size = net.config, rows, model.latent_shape[0], 512, dtype
    calls = model.nfe * len(x) // rows          # klein's guidance is a second call
    # each part's inputs live as long as in `velocity`: until the part is done
    every_part = lambda: torch.cat([net(**counts.inputs_of(*size))[0] for _ in range(calls)])
    computed = counts.working_set(net, every_part, trained)
    assert call().isfinite().all()              # gradients and workspaces exist from now on
    began = bench.now(model.device)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        measured = torch.cuda.max_memory_allocated() - before
    else:
        with counts.Live(model.transformer) as live:
            call()
        measured = live.peak
    seconds = bench.now(model.device) - began
    print(f"\n{len(x)} latents{', trained' * trained}: {seconds:.2f} s, {measured / 1e9:.2f} GB "
          f"beside the weights, computed {computed / 1e9:.2f}")
    return measured, computed


@pytest.mark.parametrize("what", ["rollout", "update"])
def test_memory_is_what_was_computed_within_a_fifth(what):
    """FLUX.1-dev's size, random weights, adapters of rank 64: the table of FLUX.md."""
    geometry, resolution, many, rank = (("flux", 720, 12, 64) if CUDA else
                                        ("flux-narrow", 128, 4, 4))
    settings = f"--resolution {resolution} --lora_rank {rank} --checkpoint_blocks -1 --no-compile"
    cfg = bench.parsed([*settings.split(), "--device", DEVICE])
    gc.collect()                                # of the last case's model
    model = bench.random_flux(cfg, geometry)
    x = noise(model, 2 if what == "update" else many).to(model.device)
    measured, computed = peaks(model, x, model.encode(PROMPTS[:1]), rank, what == "update")
    assert measured == pytest.approx(computed, rel=0.2)


@pytest.mark.parametrize("what", ["rollout", "update"])
def test_kleins_memory_is_what_was_computed_within_three_tenths(what):
    """FLUX.2-klein-base-4B's size with guidance, random weights, adapters of rank 64, four prompts,
    two latents at a time."""
    sizes, resolution, rank = (({}, 720, 64) if CUDA else
                               (dict(num_layers=1, num_single_layers=1, num_attention_heads=2,
                                     joint_attention_dim=64), 128, 4))
    sizes, dtype = {**counts.KLEIN, **sizes}, torch.bfloat16 if CUDA else torch.float32
    gc.collect()
    with torch.device(DEVICE):
        net = Flux2Transformer2DModel(**sizes).to(dtype)
        vae = AutoencoderKLFlux2().to(dtype)
    pipe, _ = build("klein")
    pipe.register_modules(vae=vae, transformer=net)

    def encode_prompt(prompt, **_):             # as Qwen3 of its size would
        text = torch.randn(len(prompt), 512, sizes["joint_attention_dim"], device=DEVICE)
        return text.to(dtype), pipe._prepare_text_ids(text)

    pipe.encode_prompt = encode_prompt
    model = Pipeline(pipe, resolution, device=DEVICE, guidance=4.0, lora_rank=rank,
                     checkpoint_blocks=-1, batch=2)
    x = noise(model, 8 if what == "update" else 48).to(model.device)
    measured, computed = peaks(model, x, model.encode(PROMPTS * 2), rank, what == "update")
    assert measured == pytest.approx(computed, rel=0.3)


# ==================================================================== compiled (a minute or two)

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_compiled_blocks_give_the_same_velocity_and_gradients(float32, lora_rank):
    torch.compiler.reset()
    v, gradients = velocity_and_gradients(small(DEVICE, lora_rank=lora_rank))
    again = velocity_and_gradients(
        small(DEVICE, lora_rank=lora_rank, compiled=True, checkpoint_blocks=2))
    print(f"\ncompiled: velocity {distance(again[0], v):.1e}, gradients "
          f"{distance(again[1], gradients):.1e}")
    assert distance(again[0], v) < 1e-4
    assert distance(again[1], gradients) < 1e-3


def test_compiled_before_the_first_update_the_ratio_is_1_in_bf16(bf16, tmp_path):
    torch.compiler.reset()
    line, = train_small(tmp_path / "run", "--compile", iterations=1)
    print(f"\ncompiled, largest |rho - 1| before the first update: {line['first_ratio']}")
    assert line["first_ratio"] < 1e-3


