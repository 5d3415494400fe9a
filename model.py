"""
FLUX.1 and FLUX.2 [klein] behind a few methods. Time t runs from 1 (noise) to 0 (image):
x_t = (1-t) x_0 + t eps, v ~ eps - x_0. Both have this convention, so nothing is flipped here.

Any folder that diffusers' `FluxPipeline` or `Flux2KleinPipeline` can load works here, tiny/flux
included. `Flux` is what the two models share; what differs is in `Flux1` and
`Klein`, at the end. Letters: P prompts, M latents (a multiple of P), N image tokens, C channels of
a token, L text tokens.

What train() asks of a model, FLUX or not (examples/own_model.py has another one):

    device, latent_shape    a torch.device; the shape of one latent, here (N, C)
    encode(prompts)         P strings -> what `velocity` needs of them, of any type
    velocity(x, t, cond)    x (M, *latent_shape), t in [0, 1], one for all or (M,) -> v like x; the
                            rows are grouped by prompt, M/P each; float32; differentiable
    decode(x)               latents at t = 0 -> images (M, 3, H, W), float32 in [0, 1]
    nfe                     network evaluations in a velocity, 2 with classifier-free guidance
    shift(steps)            the shift of the schedule where --shift is 0
    trained()               the list of trained parameters, float32
    transformer             the module that has them; its state goes into the checkpoints
    save(path, weights)     write into the folder `path` what is needed to sample again
    net, blocks()           for several processes: the module that `velocity` calls, and its parts
"""
import logging, math, shutil
from pathlib import Path
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import torch
import transformers
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch.utils.checkpoint import checkpoint
from inputs import add_lora, find_pipeline, load_lora, load_pipeline, parse_resolution

diffusers.utils.logging.disable_progress_bar()                  # of loading and saving; train.py
transformers.utils.logging.disable_progress_bar()               # and eval.py show their own
# diffusers warns of every prompt that is cut. `cut` counts them once.
logging.getLogger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)


def blocks(transformer):
    """What is gathered, recomputed and compiled one at a time."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def recompute(transformer, count):
    """Recompute the activations of the first `count` blocks (-1: all) in the backward pass."""
    if count:
        chosen = blocks(transformer)[: count if count > 0 else None]
        transformer.enable_gradient_checkpointing(lambda block, *inputs: (
            checkpoint(block, *inputs, use_reentrant=False) if block in chosen else block(*inputs)))


# ------------------------------------------------------------------------------------------------

class Flux:
    """
    path         the folder of a pipeline or a hub id, which is a Flux1 or a Klein; or a pipeline,
                 if it is not to be saved
    resolution   pixels, multiples of 16: a side, or "832x640" for width x height
    guidance     guidance scale: of FLUX.1-dev an input, usually 3.5; of klein's base usually 4
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

    def __new__(cls, path, *_, **__):
        """A Flux1 or a Klein, whichever `path` has."""
        is_pipeline = isinstance(path, diffusers.DiffusionPipeline)
        name, folder = (type(path).__name__, None) if is_pipeline else find_pipeline(path)
        model = super().__new__(MODELS[name])
        model.folder = folder
        return model

    def __init__(self, path, resolution, device="cpu", guidance=3.5, checkpoint_blocks=0,
                 compiled=False, frozen=False, lora_rank=0, lora="", text_device="", sharded=False,
                 batch=0):
        self.device, self.text_device, self.batch = torch.device(device), text_device, batch
        self.pipe, self.guidance = path, guidance
        train_all = not (frozen or lora_rank or lora)
        if self.folder:
            small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            dtype = {"transformer": torch.float32 if train_all else small, "default": small}
            self.pipe = load_pipeline(self.pipeline, self.folder, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer.requires_grad_(train_all)
        self.net = self.transformer                             # what is called; DDP wraps it
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
        self.encoders = [part for name, part in self.pipe.components.items()
                         if name in ("text_encoder", "text_encoder_2")]
        for part in (self.pipe.vae, *self.encoders):
            part.requires_grad_(False).eval()
        self.pipe.vae.to(self.device)
        for part in self.encoders:
            part.to("cpu" if text_device else self.device)
        recompute(self.transformer, checkpoint_blocks)
        if compiled:
            # A graph for each batch size, with gradients and without; blocks of a kind share them.
            torch._dynamo.config.recompile_limit = 64
            for block in self.blocks():
                block.compile(dynamic=False)
        step = 2 * self.pipe.vae_scale_factor                   # pixels per token: 8, packed 2 x 2
        self.height, self.width = (side // step for side in parse_resolution(resolution))
        self.latent_shape = (self.height * self.width, self.transformer.config.in_channels)
        self.img_ids = self.positions()                         # (N, 3 or 4)

    def trained(self):
        """The weights that are trained."""
        return [w for w in self.transformer.parameters() if w.requires_grad]

    def blocks(self):
        return blocks(self.transformer)

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> what `velocity` needs: a dict of tensors (P, ...)."""
        where = "cpu" if self.text_device == "cpu" else self.device
        for part in self.encoders:
            part.to(where)
        cond = self.embed(prompts, where)
        for part in self.encoders if self.text_device == "offload" else ():
            part.to("cpu")
        return {name: tensor.to(self.device) for name, tensor in cond.items()}

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a number or (M,), cond of P prompts; the rows are grouped
        by prompt, M/P each -> (M, N, C)."""
        M, v = len(x), []
        if not (torch.is_tensor(t) and t.ndim):
            t = torch.full((M,), float(t))
        t = t.to(self.device, torch.float32)                    # in [0, 1]; FLUX multiplies by 1000
        P = len(next(iter(cond.values())))
        prompt = torch.arange(P, device=self.device).repeat_interleave(M // P)  # (M,)
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            for some in self.parts(M):
                part = {name: tensor[prompt[some]] for name, tensor in cond.items()}
                v.append(self.evaluate(x[some], t[some], **part))
        return torch.cat(v).float()

    def parts(self, M, most=None):
        """Slices of M latents, `batch` at a time and at most `most`."""
        size = min(self.batch or M, most or M)
        return [slice(i, i + size) for i in range(0, M, size)]

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32. Sixteen at a time:
        on a CPU, 96 at once takes twice as long, because they do not fit in its cache."""
        vae, z = self.pipe.vae, self.unpack(self.unscale(x))
        images = [vae.decode(z[some].to(vae.dtype), return_dict=False)[0].float()
                  for some in self.parts(len(z), most=16)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def unpack(self, x):
        """Tokens to the VAE's grid: "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        h, w = self.height, self.width
        x = x.unflatten(1, (h, w)).unflatten(3, (-1, 2, 2))                     # (M, h, w, c, 2, 2)
        x = x.permute(0, 3, 1, 4, 2, 5)                                         # (M, c, h, 2, w, 2)
        return x.reshape(len(x), -1, 2 * h, 2 * w)                              # (M, c, 2h, 2w)

    def save(self, path, weights=None):
        """Write a folder for the pipeline's `from_pretrained`, or adapters for its
        `load_lora_weights`. `weights`: {name: full tensor}, if the transformer is sharded."""
        if hasattr(self.transformer, "peft_config"):
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict
            adapters = get_peft_model_state_dict(self.transformer, state_dict=weights)
            metadata = _collate_lora_metadata({"transformer": self.transformer})
            self.pipeline.save_lora_weights(path, adapters, **metadata)
            return
        whole = self.transformer
        if weights is not None:
            with torch.device("meta"):
                whole = type(self.transformer).from_config(self.transformer.config)
            whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(Path(path) / "transformer")
        self.copy_untrained(Path(path))

    def copy_untrained(self, path):
        """Copy the rest of the base byte for byte: what loads the base then loads this, too."""
        if self.folder is None:
            raise ValueError("a model that was not loaded from a folder cannot be saved")
        files = [self.folder / "model_index.json", self.folder / "transformer/config.json"]
        for name in self.pipe.components:
            if name != "transformer":
                files += (self.folder / name).rglob("*")
        for file in filter(Path.is_file, files):
            target = path / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)       # not its mode, which may be read-only


# ------------------------------------------------------------------------------------------------
# What differs

class Flux1(Flux):
    """FLUX.1. CLIP and T5 read the prompt. The guidance scale is an input of the network."""

    pipeline, nfe = FluxPipeline, 1

    def embed(self, prompts, device):
        """-> dict(txt (P, L, .) of T5, vec (P, .) of CLIP)"""
        txt, vec, _ = self.pipe.encode_prompt(prompts, None, device,
                                              max_sequence_length=self.text_length())
        return dict(txt=txt, vec=vec)

    def text_length(self):
        return min(512, self.pipe.tokenizer_2.model_max_length)                 # FLUX.1-dev: 512

    def cut(self, prompts):
        """How many prompts are too long: {"CLIP": for CLIP's 77 tokens, "T5": for T5's 512}."""
        encoders = dict(CLIP=(self.pipe.tokenizer, self.pipe.tokenizer.model_max_length),
                        T5=(self.pipe.tokenizer_2, self.text_length()))
        return {name: sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False).input_ids)
                for name, (tokenizer, limit) in encoders.items()}

    def positions(self):
        return FluxPipeline._prepare_latent_image_ids(1, self.height, self.width, self.device,
                                                      torch.float32)            # (N, 3)

    def evaluate(self, x, t, txt, vec):
        takes_guidance = self.transformer.config.guidance_embeds
        return self.net(hidden_states=x, timestep=t, encoder_hidden_states=txt,
                        pooled_projections=vec, img_ids=self.img_ids,
                        txt_ids=self.img_ids.new_zeros(txt.shape[1], 3), return_dict=False,
                        guidance=torch.full_like(t, self.guidance) if takes_guidance else None)[0]

    def unscale(self, x):
        return x / self.pipe.vae.config.scaling_factor + self.pipe.vae.config.shift_factor

    def shift(self, steps):
        return 3.0


class Klein(Flux):
    """FLUX.2 [klein]. A language model, Qwen3, reads the prompt. Guidance above 1 is two
    evaluations, with the prompt and with an empty one; the distilled models have none."""

    pipeline = Flux2KleinPipeline

    @property
    def nfe(self):
        return 2 if self.guidance > 1 and not self.pipe.config.is_distilled else 1

    def embed(self, prompts, device):
        """-> dict(txt (P, L, .)) and, for guidance, the same of the empty prompt"""
        txt, _ = self.pipe.encode_prompt([*prompts, ""], device,
                                         max_sequence_length=self.text_length())
        cond = dict(txt=txt[:-1], empty=txt[-1:].expand_as(txt[:-1]))
        return cond if self.nfe == 2 else dict(txt=cond["txt"])

    def text_length(self):
        return min(512, self.pipe.tokenizer.model_max_length)                   # klein: 512

    def cut(self, prompts):
        """How many prompts are too long for Qwen3's 512 tokens, which hold a chat's frame too."""
        tokenizer = self.pipe.tokenizer
        chats = [[dict(role="user", content=prompt)] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True,
                                              enable_thinking=False)
        return dict(Qwen3=sum(len(ids) > self.text_length()
                              for ids in tokenizer(texts, verbose=False).input_ids))

    def positions(self):
        one, h, w = (torch.arange(size) for size in (1, self.height, self.width))
        return torch.cartesian_prod(one, h, w, one).to(self.device)             # (N, 4)

    def evaluate(self, x, t, txt, empty=None):
        if self.nfe == 2:                       # in one batch
            x, t, txt = x.repeat(2, 1, 1), t.repeat(2), torch.cat([txt, empty])
        txt_ids = torch.arange(txt.shape[1], device=self.device)[:, None]       # (L, 1)
        v = self.net(hidden_states=x, timestep=t, encoder_hidden_states=txt, img_ids=self.img_ids,
                     txt_ids=torch.nn.functional.pad(txt_ids, (3, 0)), return_dict=False)[0].float()
        if self.nfe == 1:
            return v
        v, v_empty = v.chunk(2)
        return v_empty + self.guidance * (v - v_empty)

    def unscale(self, x):
        norm = self.pipe.vae.bn                 # of each channel of a token
        std = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        return x * std + norm.running_mean

    def shift(self, steps):
        """diffusers' dynamic shift, which depends on the number of tokens and of steps."""
        return math.exp(compute_empirical_mu(self.latent_shape[0], steps))


MODELS = {"FluxPipeline": Flux1, "Flux2KleinPipeline": Klein}
