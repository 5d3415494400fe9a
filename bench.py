"""
What does an iteration cost beyond the networks it must call? Time t runs from 1 (noise) to 0 (image).

    python bench.py                                   # the tiny preset; train.py's settings may follow
    python bench.py --memory                          # instead: GPU memory that FLUX.1-dev needs, computed without one

Times train.py's own iterations and, between them, the same calls of the same networks in the same batches with nothing
around them: the text encoders, T forwards of P x G latents, the VAE, the scorers, and U K forwards and backwards of P x B / U. Prints the
median seconds of both, and the median of their ratios, which does not depend on how fast or busy the machine is.
"""
import contextlib, io, statistics, sys, tempfile, time, weakref
import torch
import rewards
from model import add_lora
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from solvers import schedule
from train import Run, load, parse_config, train

def bare_calls(cfg, model, scorers, prompts):
    P, G, B = cfg.prompts_per_iteration, cfg.group_size, cfg.num_anchors
    x, ts = torch.randn(P * G, *model.latent_shape, device=model.device), schedule(cfg.num_rollout_steps, cfg.shift)
    cond = model.encode(prompts)
    with torch.no_grad():
        for t in ts[:-1]:
            model.velocity(x, t, cond)
        images = model.decode(x)
    for scorer in scorers.values():
        scorer(images, [prompt for prompt in prompts for _ in range(G)])
    for chosen in x.unflatten(0, (P, G))[:, :B].chunk(cfg.updates_per_iteration, 1):
        for t in ts[: cfg.num_train_steps]:
            model.velocity(chosen.flatten(0, 1), t, cond).mean().backward()
        model.transformer.zero_grad()

def seconds_of(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

def main(repeats=15, warmup=3):
    with tempfile.TemporaryDirectory() as folder:
        cfg = parse_config([*sys.argv[1:], "--out_dir", folder, "--eval_every", "0", "--save_every", "0"])
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        model = load(cfg)
        scorers = rewards.load_all(rewards.parse(cfg.rewards), cfg.device, ["a red apple, 3d style"])
        run, prompts, pairs = Run(cfg, model, scorers), ["a red apple, 3d style"] * cfg.prompts_per_iteration, []
        for i in range(warmup + repeats):
            cfg.iterations = i + 1                              # one more than are done
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                iteration = seconds_of(lambda: train(cfg, model, scorers, run), model.device)
            pairs.append((iteration, seconds_of(lambda: bare_calls(cfg, model, scorers, prompts), model.device)))
    iteration, bare = (statistics.median(times) for times in zip(*pairs[warmup:]))
    ratio = statistics.median(a / b for a, b in pairs[warmup:])
    print(f"iteration {iteration:.3f} s, its bare network calls {bare:.3f} s: ratio {ratio:.3f} (medians of {repeats}; {cfg.device}, {torch.get_num_threads()} threads)")

# ---------------------------------------------------------------------------------------------------------------
# memory: the networks are run with tensors that have shapes and no numbers

class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive; `peak`: the most there ever were."""

    def __init__(self, network):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {w.untyped_storage()._cdata for w in network.parameters()}       # views of weights are not new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

def working_set(net, call, train):
    """Peak bytes of a forward pass, or of one and its backward pass, beyond weights and their gradients."""
    for w in net.parameters():
        if w.requires_grad:
            w.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    with torch.set_grad_enabled(train), Live(net) as live:
        result = call()
        if train:
            result.float().mean().backward()
    return live.peak

def memory(G=12, at_once=2, tokens=45 * 45, text=512, rank=64):
    """One process's GPU memory for FLUX.1-dev by --preset dpm8 (720x720) with the paper's three rewards, in GB of 1e9 bytes."""
    def net(**how):
        with torch.device("meta"):
            return FluxTransformer2DModel(guidance_embeds=True).bfloat16().requires_grad_(bool(how))
    def call(net, M, batch=None):
        def x(*shape):
            return torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        n = batch or M
        inputs = dict(hidden_states=x(n, tokens, 64), timestep=x(n), guidance=x(n), encoder_hidden_states=x(n, text, 4096), pooled_projections=x(n, 768),
                      img_ids=x(tokens, 3), txt_ids=x(text, 3), return_dict=False)
        return lambda: torch.cat([net(**inputs)[0] for _ in range(M // n)])
    frozen, whole, adapted = net(), net(train=True), net()
    add_lora(adapted, rank)
    adapters = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    n, block = (sum(w.numel() for w in part.parameters()) for part in (frozen, frozen.transformer_blocks[0]))
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False).bfloat16()
    z = torch.empty(G, 16, 90, 90, dtype=torch.bfloat16, device="meta")
    rollout, decode = working_set(frozen, call(frozen, G), False), working_set(vae, lambda: vae.decode(z, return_dict=False)[0], False)
    update = {}
    for kind, network in (("lora", adapted), ("full", whole)):
        for checkpointing in (True, False):
            network.enable_gradient_checkpointing() if checkpointing else network.disable_gradient_checkpointing()
            update[kind, checkpointing] = working_set(network, call(network, at_once), True)
    adapted.enable_gradient_checkpointing()
    several = working_set(adapted, call(adapted, 8 * at_once, 4), True)
    encoders, scorers = 2 * (4.762e9 + 0.123e9) + 2 * 0.084e9, 4 * (0.986e9 + 0.986e9 + 0.478e9)         # T5, CLIP, VAE in bf16; HPSv2.1, PickScore, ImageReward in float32
    print(f"transformer {n / 1e9:.2f} B parameters, a block up to {block / 1e9:.2f} B; LoRA {rank}: {adapters / 1e6:.0f} M; rollout of {G}: {rollout / 1e9:.1f} GB, decoding them {decode / 1e9:.1f}, "
          f"{at_once} anchors: {update['lora', True] / 1e9:.1f} (LoRA) or {update['full', True] / 1e9:.1f} (all) with checkpointing, {update['lora', False] / 1e9:.0f} or {update['full', False] / 1e9:.0f} without\n")
    print("| what | GPUs | weights | gradients, moments | encoders, VAE | scorers | rollout | update | peak |\n|---|---|---|---|---|---|---|---|---|")
    def row(what, gpus, weights, trained, roll, step, text_encoders=encoders):
        parts = (weights, trained, text_encoders, scorers, roll, step)
        print(f"| {what} | {gpus} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + f" | {(sum(parts[:4]) + max(parts[4:])) / 1e9:.0f} |")
    for gpus in (1, 8, 32):
        row(f"`--lora_rank {rank}`", gpus, 2 * n + 4 * adapters, (12 + 4 * (gpus > 1)) * adapters, max(rollout, decode), update["lora", True])       # DDP's buckets hold gradients once more
    row(f"`--lora_rank {rank} --text_encoder_device offload`", 1, 2 * n + 4 * adapters, 12 * adapters, rollout, update["lora", True], 2 * 0.084e9)
    row("the same, `--prompts_per_iteration 8 --batch 4`", 1, 2 * n + 4 * adapters, 12 * adapters, max(working_set(frozen, call(frozen, 4), False), decode / G * 4), several, 2 * 0.084e9)
    row("all weights", 1, 4 * n, 12 * n, rollout, update["full", True])
    for gpus in (8, 32):                                        # two blocks gathered at a time in bf16, and their gradients in float32 on the way out
        row("`--fsdp`", gpus, 4 * n / gpus, 12 * n / gpus, rollout + 2 * block * 2, update["full", True] + 2 * block * (2 + 4))
        row("`--fsdp --gather`", gpus, 4 * n / gpus, 12 * n / gpus, rollout + 2 * n, update["full", True] + (2 + 4) * n)

if __name__ == "__main__":
    memory() if sys.argv[1:] == ["--memory"] else main()
