"""
FLUX.1 behind a few methods. Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps,
v ~ eps - x_0. FLUX has this convention, so nothing is flipped here.

Any folder that diffusers' `FluxPipeline` can load works here, tiny/flux included; pipeline.py has
all other pipelines, and `load_model`, which chooses. `Weights` is what both need. Letters: P
prompts, M latents (a multiple of P), N image tokens, C channels of a token, L text tokens.

What train() asks of a model, FLUX or not (examples/own_model.py has another one):

    device, latent_shape    a torch.device; the shape of one latent, here (N, C)
    encode(prompts)         P strings -> what `velocity` needs of them, of any type
    velocity(x, t, cond)    x (M, *latent_shape), t in [0, 1], one for all or (M,) -> v like x; the
                            rows are grouped by prompt, M/P each; float32; differentiable
    decode(x)               latents at t = 0 -> images (M, 3, H, W), float32 in [0, 1]; or videos
                            (M, frames, 3, H, W)
    nfe                     network evaluations in a velocity, 2 with classifier-free guidance
    times(steps)            its own T+1 times, where --shift is 0
    trained()               the list of trained parameters, float32
    transformer             the module that has them; its state goes into the checkpoints
    save(path, weights)     write into the folder `path` what is needed to sample again
    cut(prompts)            how many prompts are too long, {tokenizer: n}; train.py's `start` asks
    blocks()                for several processes: the parts of `transformer` that FSDP2 divides
"""
import contextlib, shutil, sys
from pathlib import Path
import torch
from torch.utils.checkpoint import checkpoint
from machine import find_pipeline, load_lora, load_pipeline, parse_resolution
from solvers import schedule

def blocks(transformer):
    """What is gathered, recomputed and compiled one at a time: what its lists of modules hold."""
    return [block for part in transformer.children() if isinstance(part, torch.nn.ModuleList)
            for block in part]

def recompute(transformer, count):
    """Recompute the activations of the first `count` blocks (-1: all) in the backward pass."""
    if count:
        chosen = blocks(transformer)[: count if count > 0 else None]
        transformer.enable_gradient_checkpointing(lambda block, *inputs: (
            checkpoint(block, *inputs, use_reentrant=False) if block in chosen else block(*inputs)))

def add_lora(transformer, rank):
    """Add adapters of this rank to all linear layers of attention; klein's single blocks have its
    feed-forward layers in the same matrices. They are zero at first, and nothing else is trained.
    Alpha equals the rank, so programs that ignore alpha apply the same strength."""
    from peft import LoraConfig
    linear = [name for name, part in transformer.named_modules()
              if ".att" in name and isinstance(part, torch.nn.Linear)]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=linear))

# ------------------------------------------------------------------------------------------------

class Weights:
    """
    path         the folder of a pipeline, or a hub id; or a pipeline, if it is not to be saved
    checkpoint_blocks  number of blocks whose activations are recomputed in the backward pass, -1:
                 all; it saves memory and costs up to half of an update's time
    compiled     compile the blocks: one graph for each kind of block and size of batch
    frozen       only sample from it
    lora_rank    train only adapters of this rank on the layers of attention; 0: all weights
    lora         adapters, a file or a folder: to sample with if frozen, else to train further
    text_device  where the text encoders are: "" beside the transformer, "cpu", or "offload", on the
                 CPU between uses
    sharded      leave the transformer on the CPU; FSDP moves it
    batch        at most this many latents in one call of a network, to save memory; 0: all

    Trained weights are float32. On a GPU the network runs in bf16 by autocast, and frozen weights
    are bf16. Latents and velocities go in and come out as float32. Raises ValueError for a
    resolution or adapters that do not fit.
    """

    def __init__(self, path, device="cpu", checkpoint_blocks=0, compiled=False, frozen=False,
                 lora_rank=0, lora="", text_device="", sharded=False, batch=0):
        self.device, self.text_device, self.batch = torch.device(device), text_device, batch
        self.pipe, self.folder = path, None
        train_all = not (frozen or lora_rank or lora)
        if isinstance(path, (str, Path)):
            name, self.folder = find_pipeline(path)
            small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            dtype = {"transformer": torch.float32 if train_all else small, "default": small}
            self.pipe = load_pipeline(name, self.folder, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        parts = {name: part for name, part in self.pipe.components.items()
                 if isinstance(part, torch.nn.Module)}
        networks = [name for name in parts if name.startswith(("transformer", "unet"))]
        if not all(hasattr(self.pipe, name) for name in ("encode_prompt", "prepare_latents")):
            raise ValueError(f"{type(self.pipe).__name__} lacks encode_prompt or prepare_latents")
        if networks != ["transformer"]:
            raise ValueError(f"{type(self.pipe).__name__} has {' and '.join(networks) or 'none'}, "
                             "but must have one network, named transformer")
        self.transformer = parts.pop("transformer").requires_grad_(train_all).eval()
        self.encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
        if (lora_rank or lora) and not hasattr(self.pipe, "save_lora_weights"):
            raise ValueError(f"diffusers saves no adapters of a {type(self.pipe).__name__}; train "
                             "all weights")
        if lora:
            load_lora(self.pipe, lora)
        elif lora_rank:
            add_lora(self.transformer, lora_rank)
        for name, w in self.transformer.named_parameters():
            if "lora_" in name and not frozen:
                w.requires_grad_()
                w.data = w.data.float()
        if not sharded:
            self.transformer.to(self.device)
        for part in parts.values():
            part.requires_grad_(False).eval()
            part.to("cpu" if text_device and part in self.encoders else self.device)
        recompute(self.transformer, checkpoint_blocks)
        if compiled:
            # A graph for each batch size, with gradients and without; blocks of a kind share them.
            torch._dynamo.config.recompile_limit = 64
            for block in self.blocks():
                block.compile(dynamic=False)

    def trained(self):
        """The weights that are trained."""
        return [w for w in self.transformer.parameters() if w.requires_grad]

    def blocks(self):
        return blocks(self.transformer)

    @contextlib.contextmanager
    def encoders_in_place(self):
        """Inside, the text encoders are where they are used; gives that device."""
        where = torch.device("cpu") if self.text_device == "cpu" else self.device
        for part in self.encoders:
            part.to(where)
        yield where
        for part in self.encoders if self.text_device == "offload" else ():
            part.to("cpu")

    def save(self, path, weights=None):
        """Write a folder for the pipeline's `from_pretrained`, or adapters for its
        `load_lora_weights`. `weights`: {name: full tensor}, if the transformer is sharded."""
        if hasattr(self.transformer, "peft_config"):
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict
            adapters = get_peft_model_state_dict(self.transformer, state_dict=weights)
            metadata = _collate_lora_metadata({"transformer": self.transformer})
            self.pipe.save_lora_weights(path, transformer_lora_layers=adapters, **metadata)
            return
        whole = self.transformer
        if weights is not None:
            with torch.device("meta"):
                whole = type(self.transformer).from_config(self.transformer.config)
            whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(Path(path) / "transformer")
        # The rest is the base's, byte for byte: what loads the base then loads this, too.
        if self.folder is None:
            raise ValueError("a model that was not loaded from a folder cannot be saved")
        if not (self.folder / "model_index.json").is_file():
            print(f"{self.folder} is gone, so {path} has nothing but the transformer and the state",
                  file=sys.stderr)
        files = [self.folder / "model_index.json", self.folder / "transformer/config.json"]
        for name in self.pipe.components:
            if name != "transformer":
                files += (self.folder / name).rglob("*")
        for file in filter(Path.is_file, files):
            target = Path(path) / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)       # not its mode, which may be read-only

# ------------------------------------------------------------------------------------------------

class Flux(Weights):
    """
    path         the folder of a FluxPipeline, or a hub id; or a FluxPipeline
    resolution   pixels, multiples of 16: a side, or "832x640" for width x height
    guidance     guidance scale, an input of the network: of FLUX.1-dev usually 3.5
    settings     of Weights
    """

    nfe = 1

    def __init__(self, path, resolution="720", device="cpu", guidance=3.5, **settings):
        super().__init__(path, device, **settings)
        self.guidance = float(guidance)
        step = 2 * self.pipe.vae_scale_factor                   # pixels per token: 8, packed 2 x 2
        self.height, self.width = (side // step for side in parse_resolution(resolution))
        self.latent_shape = (self.height * self.width, self.transformer.config.in_channels)
        self.img_ids = self.pipe._prepare_latent_image_ids(                     # (N, 3)
            1, self.height, self.width, self.device, torch.float32)

    def times(self, steps):
        return schedule(steps, shift=3.0)

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> dict(txt (P, L, .) of T5, vec (P, .) of CLIP)"""
        with self.encoders_in_place() as device:
            txt, vec, _ = self.pipe.encode_prompt(prompts, None, device,
                                                  max_sequence_length=self.text_length())
        return dict(txt=txt.to(self.device), vec=vec.to(self.device))

    def text_length(self):
        return min(512, self.pipe.tokenizer_2.model_max_length)                 # FLUX.1-dev: 512

    def cut(self, prompts):
        """How many prompts are too long: {"CLIP": for CLIP's 77 tokens, "T5": for T5's 512}."""
        encoders = dict(CLIP=(self.pipe.tokenizer, self.pipe.tokenizer.model_max_length),
                        T5=(self.pipe.tokenizer_2, self.text_length()))
        return {name: sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False).input_ids)
                for name, (tokenizer, limit) in encoders.items()}

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a number or (M,), cond of P prompts; the rows are grouped
        by prompt, M/P each -> (M, N, C)."""
        M, v = len(x), []
        if not (torch.is_tensor(t) and t.ndim):
            t = torch.full((M,), float(t))
        t = t.to(self.device, torch.float32)                    # in [0, 1]; FLUX multiplies by 1000
        P = len(cond["txt"])
        prompt = torch.arange(P, device=self.device).repeat_interleave(M // P)  # (M,)
        guided = self.transformer.config.guidance_embeds
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            for some in torch.arange(M, device=self.device).split(self.batch or M):
                txt, vec = (cond[name][prompt[some]] for name in ("txt", "vec"))
                v += self.transformer(
                    hidden_states=x[some], timestep=t[some], encoder_hidden_states=txt,
                    pooled_projections=vec, img_ids=self.img_ids,
                    txt_ids=self.img_ids.new_zeros(txt.shape[1], 3), return_dict=False,
                    guidance=torch.full_like(t[some], self.guidance) if guided else None)
        return torch.cat(v).float()

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32. Sixteen at a time:
        on a CPU, 96 at once takes twice as long, because they do not fit in its cache."""
        vae = self.pipe.vae
        z = self.unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
        images = [vae.decode(some.to(vae.dtype), return_dict=False)[0].float()
                  for some in z.split(min(self.batch or 16, 16))]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def unpack(self, x):
        """Tokens to the VAE's grid: "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        h, w = self.height, self.width
        x = x.unflatten(1, (h, w)).unflatten(3, (-1, 2, 2))                     # (M, h, w, c, 2, 2)
        x = x.permute(0, 3, 1, 4, 2, 5)                                         # (M, c, h, 2, w, 2)
        return x.reshape(len(x), -1, 2 * h, 2 * w)                              # (M, c, 2h, 2w)
