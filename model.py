"""
FLUX behind a few calls. Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps,
v ~ eps - x_0. FLUX has the same convention, so nothing is flipped or rescaled here.

Whatever `diffusers.FluxPipeline` can load is loaded by the same lines: the small one in tiny/flux
and FLUX.1-dev alike. Letters: P prompts, M latents (a multiple of P), N image tokens, C channels of
a token, L text tokens.
"""
from pathlib import Path
import cpu_torchvision                                          # noqa: F401  (before diffusers)
import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from torch.utils.checkpoint import checkpoint

diffusers.utils.logging.disable_progress_bar()                  # of loading and saving; train.py
transformers.utils.logging.disable_progress_bar()               # and eval.py show their own

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0",                # where LoRA goes
             "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def check_model(path):
    """Refuse, before anything is loaded, what is neither a FluxPipeline directory nor a hub id."""
    if (Path(path) / "model_index.json").is_file():
        return
    if Path(path).exists() or str(path).count("/") != 1 or Path(path).parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory; it must hold model_index.json, "
                         "or be a hub id like black-forest-labs/FLUX.1-dev")


def is_lora(path):
    """Whether a checkpoint holds only adapters, as train.py --lora_rank writes them."""
    return (Path(path) / "pytorch_lora_weights.safetensors").is_file()


def add_lora(transformer, rank):
    """Add adapters of this rank to all attention projections: float32, alpha twice the rank, zero
    at first. Nothing else is trained."""
    from peft import LoraConfig
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian",
                                       target_modules=ATTENTION))
    for w in transformer.parameters():
        w.data = w.data.float() if w.requires_grad else w.data


def blocks(transformer):
    """The parts that are gathered, recomputed and compiled one at a time."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def recompute(transformer, count):
    """Recompute the activations of the first `count` blocks (-1: all) in the backward pass."""
    if count:
        chosen = blocks(transformer)[: count if count > 0 else None]
        transformer.enable_gradient_checkpointing(lambda block, *inputs: (
            checkpoint(block, *inputs, use_reentrant=False) if block in chosen else block(*inputs)))


class Flux:
    """
    path         a FluxPipeline directory, a hub id, or a FluxPipeline
    resolution   side of the square images in pixels, a multiple of twice the VAE's factor (16)
    guidance     FLUX.1-dev takes its guidance scale as an input; 3.5 is its usual value
    checkpoint_blocks  number of blocks whose activations are recomputed in the backward pass, -1:
                 all; it saves memory and costs up to half of an update's time
    compiled     compile the blocks: one graph for each kind of block and size of batch
    frozen       only to be sampled from
    lora_rank    train only adapters of this rank on the attention projections; 0: all weights
    lora         a folder with pytorch_lora_weights.safetensors, to sample with
    text_device  where the text encoders are: "" beside the transformer, "cpu", or "offload", on the
                 CPU between uses
    sharded      leave the transformer on the CPU; the one who shards it moves it
    batch        at most so many latents in one call of a network, to save memory; 0: all

    Trained weights are float32. On a GPU the network runs in bf16 by autocast, and frozen weights
    are bf16. Latents and velocities that cross this border are float32. ValueError: a resolution
    that does not fit.
    """

    def __init__(self, path, resolution, device="cpu", guidance=3.5, checkpoint_blocks=0,
                 compiled=False, frozen=False, lora_rank=0, lora="", text_device="", sharded=False,
                 batch=0):
        self.device, self.text_device, self.batch = torch.device(device), text_device, batch
        self.pipe = path if isinstance(path, FluxPipeline) else self.load_pipe(
            path, trained=not (frozen or lora_rank))
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer.requires_grad_(not (frozen or lora_rank))
        self.net = self.transformer                             # is called; DDP wraps it
        self.encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)      # CLIP, T5
        for part in (self.pipe.vae, *self.encoders):
            part.requires_grad_(False).eval()
        if lora:
            self.pipe.load_lora_weights(lora)
        if lora_rank:
            add_lora(self.transformer, lora_rank)
        if not sharded:
            self.transformer.to(self.device)
        self.pipe.vae.to(self.device)
        for part in self.encoders:
            part.to("cpu" if text_device else self.device)
        recompute(self.transformer, checkpoint_blocks)
        if compiled:
            torch._dynamo.config.recompile_limit = 64           # graphs: one for each batch size,
            for block in self.blocks():                         # with gradients and without
                block.compile(dynamic=False)                    # blocks of a kind share theirs
        step = 2 * self.pipe.vae_scale_factor                   # pixels of a token's side: the
        if resolution < step or resolution % step:              # VAE's 8, packed 2 x 2
            raise ValueError(f"resolution is {resolution}, but must be a multiple of {step}")
        self.side = resolution // step                          # tokens along a side
        self.latent_shape = (self.side**2, self.transformer.config.in_channels)         # (N, C)
        self.img_ids = FluxPipeline._prepare_latent_image_ids(
            1, self.side, self.side, self.device, torch.float32)                        # (N, 3)
        self.guidance = guidance if self.transformer.config.guidance_embeds else None

    def load_pipe(self, path, trained):
        small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        dtype = {"transformer": torch.float32 if trained else small, "default": small}
        return FluxPipeline.from_pretrained(path, dtype=dtype)

    def trained(self):
        """The weights that are trained."""
        return [w for w in self.transformer.parameters() if w.requires_grad]

    def blocks(self):
        return blocks(self.transformer)

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> what `velocity` needs: dict(txt (P, L, .) of T5, vec (P, .) of CLIP)."""
        length = min(512, self.pipe.tokenizer_2.model_max_length)               # FLUX.1-dev: 512
        where = "cpu" if self.text_device == "cpu" else self.device
        for part in self.encoders:
            part.to(where)
        txt, vec, _ = self.pipe.encode_prompt(prompts, None, where, max_sequence_length=length)
        for part in self.encoders if self.text_device == "offload" else ():
            part.to("cpu")
        return dict(txt=txt.to(self.device), vec=vec.to(self.device))

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a number or (M,), cond of P prompts, each of which owns M/P
        rows in turn -> (M, N, C)."""
        each, M = len(x) // len(cond["vec"]), len(x)
        if not (torch.is_tensor(t) and t.ndim):
            t = torch.full((M,), float(t))
        t = t.to(self.device, torch.float32)                    # in [0, 1]; FLUX multiplies by 1000
        txt, vec = (cond[key].repeat_interleave(each, 0) for key in ("txt", "vec"))     # (M, ...)
        txt_ids = self.img_ids.new_zeros(txt.shape[1], 3)
        v = []
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            for some in self.parts(M):
                scale = None if self.guidance is None else torch.full_like(t[some], self.guidance)
                v += self.net(hidden_states=x[some], timestep=t[some], guidance=scale,
                              encoder_hidden_states=txt[some], pooled_projections=vec[some],
                              img_ids=self.img_ids, txt_ids=txt_ids, return_dict=False)
        return torch.cat(v).float()

    def parts(self, M, most=None):
        """Slices of M latents, `batch` at a time and at most `most`."""
        size = min(self.batch or M, most or M)
        return [slice(i, i + size) for i in range(0, M, size)]

    def unpack(self, x):
        """Tokens to the VAE's grid: "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (-1, 2, 2))     # (M, h, w, c, 2, 2)
        x = x.permute(0, 3, 1, 4, 2, 5)                                         # (M, c, h, 2, w, 2)
        return x.reshape(len(x), -1, 2 * self.side, 2 * self.side)              # (M, c, 2h, 2w)

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32. Sixteen at a time:
        on a CPU 96 at once take twice as long, because they do not fit in its cache."""
        vae = self.pipe.vae
        z = self.unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
        images = [vae.decode(z[some].to(vae.dtype), return_dict=False)[0].float()
                  for some in self.parts(len(z), most=16)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def save(self, path, weights=None):
        """Write a directory for `FluxPipeline.from_pretrained`, or adapters for its
        `load_lora_weights`. `weights`: {name: tensor}, whole, where the transformer has shards."""
        if hasattr(self.transformer, "peft_config"):
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict
            adapters = get_peft_model_state_dict(self.transformer, state_dict=weights)
            metadata = _collate_lora_metadata({"transformer": self.transformer})
            FluxPipeline.save_lora_weights(path, adapters, **metadata)
            return
        whole = self.transformer
        if weights is not None:
            with torch.device("meta"):
                whole = type(self.transformer).from_config(self.transformer.config)
            whole.load_state_dict(weights, assign=True)
        self.pipe.transformer = whole
        self.pipe.save_pretrained(path)
        self.pipe.transformer = self.transformer
