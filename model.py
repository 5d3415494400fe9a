"""
FLUX behind four calls: encode, velocity, decode, save. Time t runs from 1 (noise) to 0 (image):
x_t = (1-t) x_0 + t eps, v ~ eps - x_0. FLUX has the same convention, so nothing is flipped or rescaled here.

Whatever `diffusers.FluxPipeline` can load is loaded by the same lines: the small one in tiny/flux and FLUX.1-dev alike.
Letters: P prompts, M latents (a multiple of P), N image tokens, C channels of a token, L text tokens.
"""
import contextlib
import cpu_torchvision                                          # noqa: F401  (must come before diffusers)
import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.utils.checkpoint import checkpoint

diffusers.utils.logging.disable_progress_bar()                 # of loading and saving; what is worth a bar has one in train.py and eval.py
transformers.utils.logging.disable_progress_bar()

BACKENDS = [backend.value for backend in AttentionBackendName]                                        # of attention, that diffusers knows
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]      # where LoRA goes


def add_lora(transformer, rank):
    """Adapters of this rank on all attention projections, with alpha twice the rank, in float32; nothing else is trained. They begin as zero."""
    from peft import LoraConfig
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=ATTENTION))
    for w in transformer.parameters():
        w.data = w.data.float() if w.requires_grad else w.data


def blocks(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def checkpointed(transformer, count):
    """Recompute the activations of its first `count` blocks, -1: of all, in the backward pass."""
    if count:
        recomputed = blocks(transformer)[: count if count > 0 else None]
        transformer.enable_gradient_checkpointing(lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False) if block in recomputed else block(*inputs))


class Flux:
    """
    path         a FluxPipeline directory, a hub id such as "black-forest-labs/FLUX.1-dev", or a FluxPipeline
    resolution   side of the square images in pixels, a multiple of twice the VAE's factor (16)
    guidance     FLUX.1-dev takes its guidance scale as an input; 3.5 is its usual value
    checkpoint_blocks  of so many blocks the activations are recomputed in the backward pass, -1: of all; less memory, for up to half more time in an update
    compiled     compile the blocks, a graph for each kind of block and size of batch
    attention    diffusers' attention backend, such as "_native_cudnn"; "": what torch chooses
    float8       inside `with model.float8():` the blocks' linear layers multiply in float8, by torchao; weights stay what they are
    frozen       to be sampled from only
    lora_rank    train adapters of this rank on the attention's projections, and nothing else; 0 trains everything
    lora         a folder with pytorch_lora_weights.safetensors to sample with
    text_device  where the text encoders live: "" beside the transformer, "cpu", or "offload", on the CPU between uses
    sharded      leave the transformer on the CPU; whoever shards it moves it
    batch        latents at most in one call of a network, for memory; 0: as many as there are

    The trained weights are float32; on a GPU the network runs in bf16 by autocast, and frozen weights are bf16 too. The text
    encoders and the VAE are frozen. Latents and velocities that cross this border are float32.
    """

    def __init__(self, path, resolution, device="cpu", guidance=3.5, checkpoint_blocks=0, compiled=False, frozen=False, lora_rank=0, lora="", text_device="", sharded=False, batch=0, attention="", float8=False):
        self.device, self.text_device, self.batch, self.in_float8 = torch.device(device), text_device, batch, False
        small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = path if isinstance(path, FluxPipeline) else FluxPipeline.from_pretrained(path, dtype={"transformer": small if frozen or lora_rank else torch.float32, "default": small})
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.net = self.pipe.transformer.requires_grad_(not (frozen or lora_rank))        # net: what is called; train.py may wrap it
        if attention:
            try:
                self.transformer.set_attention_backend(attention)
            except RuntimeError as error:                       # a package that is not installed
                raise ValueError(f"attention is {attention}, but that cannot be had here: {error}") from error
        if float8:
            self.prepare_float8()
        if lora:
            self.pipe.load_lora_weights(lora)
        if lora_rank:
            add_lora(self.transformer, lora_rank)
        if not sharded:
            self.transformer.to(self.device)
        self.pipe.vae.to(self.device)
        for part in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.to("cpu" if text_device else self.device)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False).eval()
        checkpointed(self.transformer, checkpoint_blocks)
        if compiled:
            torch._dynamo.config.recompile_limit = 64           # a graph for each size of batch, with gradients and without: more than torch's 8
            for block in self.blocks():                         # those of a kind share theirs
                block.compile(dynamic=False)
        step = 2 * self.pipe.vae_scale_factor                   # pixels of one image token: the VAE's 8, packed 2 x 2
        if resolution < step or resolution % step:
            raise ValueError(f"resolution is {resolution}, but must be a multiple of {step}")
        self.side = resolution // step                          # tokens along a side
        self.latent_shape = (self.side**2, self.transformer.config.in_channels)                       # (N, C)
        self.img_ids = FluxPipeline._prepare_latent_image_ids(1, self.side, self.side, self.device, torch.float32)   # (N, 3)
        self.guidance = guidance if self.transformer.config.guidance_embeds else None

    def trained(self):
        return [w for w in self.transformer.parameters() if w.requires_grad]

    def blocks(self):
        """What is gathered, recomputed and compiled one at a time."""
        return blocks(self.transformer)

    def prepare_float8(self):
        """Weights and inputs are rounded to float8 as they are multiplied, a scale for each row, so that an update of the weights needs no second copy of them. The norms' small layers stay."""
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
        model = self
        class Switched(Float8Linear):
            def forward(self, x):
                return super().forward(x) if model.in_float8 else torch.nn.Linear.forward(self, x)
        wanted = lambda layer, name: "norm" not in name and layer.in_features % 16 == layer.out_features % 16 == 0
        for block in self.blocks():
            convert_to_float8_training(block, module_filter_fn=wanted, config=Float8LinearConfig.from_recipe_name("rowwise"))
            for layer in block.modules():
                if type(layer) is Float8Linear:
                    layer.__class__ = Switched                  # one class for all, so that blocks of a kind still share what is compiled

    @contextlib.contextmanager
    def float8(self):
        """Inside, the layers that were prepared for it multiply in float8; where none were, nothing changes."""
        self.in_float8 = True
        try:
            yield
        finally:
            self.in_float8 = False

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> what `velocity` wants to know of them: dict(txt (P, L, .) from T5, vec (P, .) from CLIP)."""
        length = min(512, self.pipe.tokenizer_2.model_max_length)                # 512 for FLUX.1-dev
        encoders, where = (self.pipe.text_encoder, self.pipe.text_encoder_2), "cpu" if self.text_device == "cpu" else self.device
        for part in encoders:
            part.to(where)
        txt, vec, _ = self.pipe.encode_prompt(prompts, None, where, max_sequence_length=length)
        for part in encoders if self.text_device == "offload" else ():
            part.to("cpu")
        return dict(txt=txt.to(self.device), vec=vec.to(self.device))

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a time or (M,) of them, cond of P prompts, of which each owns M/P rows in turn -> (M, N, C)."""
        each = len(x) // len(cond["vec"])
        t = t.to(self.device, torch.float32) if torch.is_tensor(t) and t.ndim else torch.full((len(x),), float(t), device=self.device)       # in [0, 1]; FLUX multiplies by 1000, in bf16 where the network runs in it
        txt, vec = (cond[key].repeat_interleave(each, 0) for key in ("txt", "vec"))                   # (M, L, .), (M, .)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            v = [self.net(hidden_states=x[some], timestep=t[some], guidance=None if self.guidance is None else torch.full_like(t[some], self.guidance),
                          encoder_hidden_states=txt[some], pooled_projections=vec[some], img_ids=self.img_ids, txt_ids=self.img_ids.new_zeros(txt.shape[1], 3),
                          return_dict=False)[0] for some in self.parts(len(x))]
        return torch.cat(v).float()

    def parts(self, M, most=None):
        """M latents, or images, `batch` at a time, or `most`."""
        size = min(self.batch or M, most or M)
        return [slice(i, i + size) for i in range(0, M, size)]

    def unpack(self, x):
        """Tokens to the VAE's grid, "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (-1, 2, 2))                           # (M, h, w, c, ph, pw)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * self.side, 2 * self.side)          # (M, c, 2h, 2w)

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32. Sixteen at a time: on a CPU that takes half as long as 96 at once, which leave the cache."""
        vae = self.pipe.vae
        z = self.unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
        return torch.cat([(vae.decode(z[some].to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1) for some in self.parts(len(z), most=16)])

    def save(self, path, weights=None):
        """Write a directory that `FluxPipeline.from_pretrained` loads, or with LoRA one for its `load_lora_weights`. `weights`: {name: tensor} of
        what was trained, where it is not in the transformer itself, whole."""
        if not hasattr(self.transformer, "peft_config"):
            whole = self.transformer
            if weights is not None:
                with torch.device("meta"):
                    whole = type(self.transformer).from_config(self.transformer.config)
                whole.load_state_dict(weights, assign=True)
            kept, self.pipe.transformer = self.pipe.transformer, whole
            self.pipe.save_pretrained(path)
            self.pipe.transformer = kept
            return
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict
        adapters = get_peft_model_state_dict(self.transformer, state_dict=weights)
        FluxPipeline.save_lora_weights(path, adapters, **_collate_lora_metadata({"transformer": self.transformer}))
