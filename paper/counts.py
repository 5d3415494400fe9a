"""
Operations and memory of FLUX, counted without a GPU: the networks run on tensors that have shapes
but no numbers. `python -m paper.bench memory` prints the tables.
"""
import weakref
from unittest import mock
import torch
from diffusers import (AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel,
                       FluxTransformer2DModel)
from torch.utils.flop_counter import FlopCounterMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from model import add_lora, recompute

VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
           use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611,
           shift_factor=0.1159)                 # FLUX.1-dev's
KLEIN = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
             guidance_embeds=False)             # FLUX.2-klein-base-4B's; its VAE has the defaults

# ------------------------------------------------------------------------------------------------
# Operations

def operations(config, tokens, text, rank=0, recomputed=0):
    """Floating point operations of a transformer for one latent -> (forward, forward and backward).
    Only matrix products count. torch counts them on tensors without numbers, because on a CPU it
    would miss those of attention."""
    flux_1 = "pooled_projection_dim" in config
    with torch.device("meta"):
        net = (FluxTransformer2DModel if flux_1 else Flux2Transformer2DModel).from_config(config)
        net.requires_grad_(not rank)
    if rank:                                    # then the backward pass costs as much as the
        add_lora(net, rank)                     # forward pass, else twice as much
    inputs = inputs_of(net.config, 1, tokens, text, torch.float32)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(**inputs)
    recompute(net, recomputed)                  # this is counted, too
    with FlopCounterMode(display=False) as both:
        net(**inputs)[0].mean().backward()
    return forward.get_total_flops(), both.get_total_flops()

def inputs_of(config, n, tokens, text, dtype):
    """The arguments of the network for n latents, without numbers."""
    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")
    axes = len(config.axes_dims_rope)                           # 3, or klein's 4
    inputs = dict(hidden_states=empty(n, tokens, config.in_channels), timestep=empty(n),
                  guidance=empty(n) if config.guidance_embeds else None,
                  encoder_hidden_states=empty(n, text, config.joint_attention_dim),
                  img_ids=empty(tokens, axes), txt_ids=empty(text, axes), return_dict=False)
    if "pooled_projection_dim" in config:
        inputs["pooled_projections"] = empty(n, config.pooled_projection_dim)
    return inputs

# ------------------------------------------------------------------------------------------------
# Memory

class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside the context and are still alive. `peak` is
    the largest count."""

    def __init__(self, network):
        super().__init__()
        weights = {w.untyped_storage()._cdata for w in network.parameters()}
        self.now, self.peak, self.seen = 0, 0, weights          # a view of a weight is not new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

def flash_attention(query, key, value, **_):
    """Attention as a GPU has it. Without a GPU torch would make all products of queries and keys,
    which is most of the memory."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

def working_set(net, call, train):
    """Peak bytes of a forward pass, or with `train` also of its backward pass, without the weights
    and their gradients."""
    for w in net.parameters():
        if w.requires_grad:
            w.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
    with (mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention),
          torch.set_grad_enabled(train), Live(net) as live):
        result = call()
        if train:
            result.float().mean().backward()
    return live.peak

def pass_of(net, tokens, batch, times=1, train=False):
    """`working_set` of `times` calls of a network for `batch` latents each."""
    inputs = inputs_of(net.config, batch, tokens, 512, torch.bfloat16)
    return working_set(net, lambda: torch.cat([net(**inputs)[0] for _ in range(times)]), train)

def decoding_of(vae, *shape):
    """`working_set` of decoding latents of this shape."""
    z = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return working_set(vae, lambda: vae.decode(z, return_dict=False)[0], train=False)

def made(kind, rank=0, **config):
    """A frozen network in bf16, without numbers; with `rank`, its adapters are trained, and all of
    its blocks are recomputed. -> the network, and how many weights it has, and how many adapters"""
    with torch.device("meta"):
        net = kind(**config).bfloat16().requires_grad_(False)
    if rank:
        add_lora(net, rank)
        net.enable_gradient_checkpointing()
    adapters = sum(w.numel() for w in net.parameters() if w.requires_grad)
    return net, sum(w.numel() for w in net.parameters()) - adapters, adapters

HEAD = ["what", "GPUs", "weights", "gradients, moments", "encoders, VAE", "scorers", "rollout",
        "update", "peak"]

def row(settings, gpus, always, temporary):
    """A row of the table. always: the bytes that stay. temporary: those of rollout and update, of
    which only the larger counts for the peak."""
    return [settings, gpus, *(f"{part / 1e9:.1f}" for part in (*always, *temporary)),
            f"{(sum(always) + max(temporary)) / 1e9:.0f}"]

VAE_SIZE = 2 * 0.084e9                                          # bf16
ENCODERS = 2 * (4.762e9 + 0.123e9)                              # T5 and CLIP, bf16
HPSV2, SCORERS = 4 * 0.986e9, 4 * (0.986e9 + 0.986e9 + 0.478e9)     # HPSv2.1, PickScore and
                                                                    # ImageReward, float32

def memory():
    """The GPU memory of one process, in GB of 1e9 bytes: FLUX.1-dev with --preset dpm8 (720x720, b
    anchors in a forward pass) and the paper's three rewards. -> head and rows of a table.

    With adapters, it is the same on any number of GPUs: gradients are averaged in place."""
    G, b, tokens, flux = 12, 2, 45 * 45, dict(kind=FluxTransformer2DModel, guidance_embeds=True)
    frozen, n, _ = made(**flux)
    adapted, _, adapters = made(**flux, rank=64)
    block = sum(w.numel() for w in frozen.transformer_blocks[0].parameters())
    evaluate, evaluate_4 = pass_of(frozen, tokens, G), pass_of(frozen, tokens, 4)
    decode = decoding_of(made(AutoencoderKL, **VAE)[0], G, 16, 90, 90)
    lora = pass_of(adapted, tokens, b, train=True)
    lora_by_4 = pass_of(adapted, tokens, 4, 8 * b // 4, train=True)     # of 8 prompts
    adapted.disable_gradient_checkpointing()
    lora_kept = pass_of(adapted, tokens, b, train=True)
    frozen.requires_grad_(True).enable_gradient_checkpointing()         # from here on trained
    full = pass_of(frozen, tokens, b, train=True)

    rollout, weights, moments = max(evaluate, decode), 2 * n + 4 * adapters, 12 * adapters
    resident, offloaded = ((weights, moments, encoders + VAE_SIZE, SCORERS)
                           for encoders in (ENCODERS, 0))
    rows = [
        row("`--lora_rank 64`", "any", resident, (rollout, lora)),
        row("`--lora_rank 64 --text_encoder_device offload`", 1, offloaded, (rollout, lora)),
        row("the same, `--checkpoint_blocks 0`", 1, offloaded, (rollout, lora_kept)),
        row("the same, `--prompts_per_iteration 8 --batch 4`, all recomputed", 1, offloaded,
            (max(evaluate_4, decode / G * 4), lora_by_4)),
        row("all weights", 1, (4 * n, 12 * n, ENCODERS + VAE_SIZE, SCORERS), (rollout, full))]
    for gpus in (8, 32):
        sharded = 4 * n / gpus, 12 * n / gpus, ENCODERS + VAE_SIZE, SCORERS
        # two blocks at a time are gathered in bf16, with their gradients in float32
        temporary = max(evaluate + 2 * block * 2, decode), full + 2 * block * (2 + 4)
        rows.append(row("`--fsdp`", gpus, sharded, temporary))
    return HEAD, rows

def memory_of_klein():
    """The same for FLUX.2-klein-base-4B on one GPU, with adapters. With guidance the network gets
    each latent twice. If Qwen3 is moved to the GPU before a rollout, its weights, logits and hidden
    states count for the rollout."""
    b, prompts, batch, rows = 2, 4, 2, []
    frozen, n, _ = made(Flux2Transformer2DModel, **KLEIN)
    adapted, _, adapters = made(Flux2Transformer2DModel, rank=64, **KLEIN)
    vae, *_ = made(AutoencoderKLFlux2)
    for side, where, scorers, words in ((720, "offload", SCORERS, ""),
                                        (512, "cpu", HPSV2, " --resolution 512 --rewards hpsv2")):
        tokens = (side // 16) ** 2
        rollout = pass_of(frozen, tokens, 2 * batch)
        decode = decoding_of(vae, batch, 32, side // 8, side // 8)
        update = pass_of(adapted, tokens, 2 * batch, prompts * b // batch, train=True)
        encode = 2 * (4.022e9 + (prompts + 1) * 512 * (151936 + 37 * 2560)) * (where == "offload")
        settings = (f"`--lora_rank 64 --text_encoder_device {where} --prompts_per_iteration "
                    f"{prompts} --batch {batch}{words}`")
        always = 2 * n + 4 * adapters, 12 * adapters, VAE_SIZE, scorers
        rows.append(row(settings, 1, always, (max(rollout, decode, encode), update)))
    return HEAD, rows
