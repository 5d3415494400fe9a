"""
FLUX behind four calls: encode, velocity, decode, save. Time t runs from 1 (noise) to 0 (image):
x_t = (1-t) x_0 + t eps, v ~ eps - x_0. FLUX has the same convention, so nothing is flipped or rescaled here.

Whatever `diffusers.FluxPipeline` can load is loaded by the same lines: the small one in tiny/flux and FLUX.1-dev alike.
Letters: P prompts, M latents (a multiple of P), N image tokens, C channels of a token, L text tokens.
"""
import cpu_torchvision                                          # noqa: F401  (must come before diffusers)
import diffusers
import torch
import transformers
from diffusers import FluxPipeline

diffusers.utils.logging.disable_progress_bar()                 # of loading and saving; what is worth a bar has one in train.py and eval.py
transformers.utils.logging.disable_progress_bar()


class Flux:
    """
    path         a FluxPipeline directory, or a hub id such as "black-forest-labs/FLUX.1-dev"
    resolution   side of the square images in pixels, a multiple of twice the VAE's factor (16)
    guidance     FLUX.1-dev takes its guidance scale as an input; 3.5 is its usual value
    checkpointing  recompute each block's activations in the backward pass: less memory for about a third more time
    frozen       to be sampled from only: on a GPU the transformer's weights are bf16 too, half the memory

    The transformer's weights are float32 and are what is trained; on a GPU it runs in bf16 by autocast. The text encoders and
    the VAE are frozen. Latents and velocities that cross this border are float32.
    """

    def __init__(self, path, resolution, device="cpu", guidance=3.5, checkpointing=False, frozen=False):
        self.device = torch.device(device)
        small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.pipe = FluxPipeline.from_pretrained(path, dtype={"transformer": small if frozen else torch.float32, "default": small})
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(self.device)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2):
            part.requires_grad_(False).eval()
        self.transformer = self.net = self.pipe.transformer.requires_grad_(not frozen)                # net: what is called; train.py may wrap it
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
        step = 2 * self.pipe.vae_scale_factor                   # pixels of one image token: the VAE's 8, packed 2 x 2
        if resolution < step or resolution % step:
            raise ValueError(f"resolution is {resolution}, but must be a multiple of {step}")
        self.side = resolution // step                          # tokens along a side
        self.latent_shape = (self.side**2, self.transformer.config.in_channels)                       # (N, C)
        self.img_ids = FluxPipeline._prepare_latent_image_ids(1, self.side, self.side, self.device, torch.float32)   # (N, 3)
        self.guidance = guidance if self.transformer.config.guidance_embeds else None

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> what `velocity` wants to know of them: dict(txt (P, L, .) from T5, vec (P, .) from CLIP)."""
        length = min(512, self.pipe.tokenizer_2.model_max_length)                # 512 for FLUX.1-dev
        txt, vec, _ = self.pipe.encode_prompt(prompts, None, self.device, max_sequence_length=length)
        return dict(txt=txt, vec=vec)

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a time or (M,) of them, cond of P prompts, of which each owns M/P rows in turn -> (M, N, C)."""
        each = len(x) // len(cond["vec"])
        t = torch.as_tensor(t, dtype=torch.float32, device=self.device).expand(len(x))                # in [0, 1]; FLUX multiplies by 1000
        guidance = None if self.guidance is None else torch.full_like(t, self.guidance)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            v = self.net(hidden_states=x, timestep=t, guidance=guidance,
                                 encoder_hidden_states=cond["txt"].repeat_interleave(each, 0),        # (M, L, .)
                                 pooled_projections=cond["vec"].repeat_interleave(each, 0),           # (M, .)
                                 img_ids=self.img_ids, txt_ids=self.img_ids.new_zeros(cond["txt"].shape[1], 3),
                                 return_dict=False)[0]
        return v.float()

    def unpack(self, x):
        """Tokens to the VAE's grid, "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        x = x.unflatten(1, (self.side, self.side)).unflatten(3, (-1, 2, 2))                           # (M, h, w, c, ph, pw)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * self.side, 2 * self.side)          # (M, c, 2h, 2w)

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32."""
        vae = self.pipe.vae
        z = self.unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def save(self, path):
        """Write a directory that `FluxPipeline.from_pretrained` loads."""
        self.pipe.save_pretrained(path)
