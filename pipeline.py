"""
Any text-to-image or text-to-video flow pipeline of diffusers, behind the methods that train() calls
(the head of model.py lists them). Nothing here knows a model. The pipeline's own __call__ does the
work, and three methods are replaced while it runs:

    scheduler.set_timesteps     leaves one time, or none
    prepare_latents             puts in our x, in place of noise
    scheduler.step              stops, and hands out the velocity

velocity(x, t) is __call__ with x and one time. So text, positions, packing, guidance, sign and
scale are the pipeline's own. decode(x) is __call__ with x and no time: what is left is the decoder.
__call__ is decorated with no_grad, but the function inside is not, so the velocity has its graph.
`check` lets the pipeline draw by itself, and refuses what is no function of x and t.
"""
import contextlib, functools, inspect
from pathlib import Path
from unittest.mock import patch
import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from machine import DECIDED, find_pipeline, parse_resolution
from model import Flux, Weights

def load_model(path, resolution="", guidance="", steps=8, call=None, **settings):
    """FLUX.1 as model.Flux, at 720 pixels and guidance 3.5 if nothing else is given; every other
    pipeline as a Pipeline, which has the arguments. ValueError for what cannot be aligned."""
    name = find_pipeline(path)[0] if isinstance(path, (str, Path)) else type(path).__name__
    if name != "FluxPipeline":
        return Pipeline(path, resolution, guidance, steps, call, **settings)
    if call:
        raise ValueError(f"call has {next(iter(call))}, but FLUX.1 has settings for all it takes")
    flux = Flux(path, resolution or 720, guidance=3.5 if guidance == "" else guidance, **settings)
    if guidance != "" and not flux.transformer.config.guidance_embeds:          # FLUX.1-schnell
        raise ValueError("guidance has no effect on this FLUX.1; leave it out")
    return flux

class Stop(Exception):
    """Ends a pipeline's __call__ early, and carries what it had reached."""

class Pipeline(Weights):
    """
    resolution   as for model.Flux; empty: the pipeline's own
    guidance     the guidance scale; empty: the pipeline's own
    steps        T of the rollouts: `check` draws its pictures with as many
    call         other arguments of __call__, {name: value}, such as num_frames
    settings     of Weights, and device

    Raises ValueError for what cannot be aligned. With sharded=True the caller calls `check`, after
    FSDP has moved the network. Letters: P prompts, M latents (a multiple of P).
    """

    def __init__(self, path, resolution="", guidance="", steps=8, call=None, **settings):
        super().__init__(path, **settings)
        self.run = inspect.unwrap(type(self.pipe).__call__)     # without its no_grad
        self.name, self.scheduler, self.steps = type(self.pipe).__name__, self.pipe.scheduler, steps
        self.tokenizers = {name: part for name, part in self.pipe.components.items()
                           if name.startswith("tokenizer")}
        self.arguments = self.choose_arguments(resolution, guidance, call or {})
        self.nodes, self.encoded, self.probes = {}, {}, {}      # see `times` and `remember`
        self.pipe.encode_prompt = self.remember(self.pipe.encode_prompt)
        if not settings.get("sharded"):
            self.check()

    def choose_arguments(self, resolution, guidance, call):
        """The arguments that __call__ gets every time."""
        known = inspect.signature(self.run).parameters
        chosen = dict(output_type="pt", return_dict=False)
        # Of two scales, guidance_scale is an input of the network; without that, it is ignored.
        scales = [name for name in ("true_cfg_scale", "guidance_scale") if name in known] or [""]
        self.scale = scales[-1 if self.transformer.config.get("guidance_embeds") else 0]
        if guidance != "":
            chosen[self.scale] = float(guidance)
            if not self.scale:
                raise ValueError(f"guidance is {guidance}, but {self.name} takes none")
        if "negative_prompt" in known:
            chosen["negative_prompt"] = ""      # without one, some ignore their guidance
        if "max_sequence_length" in known:      # a small tokenizer has less
            longest = max(part.model_max_length for part in self.tokenizers.values())
            chosen["max_sequence_length"] = min(known["max_sequence_length"].default, longest)
        if resolution:
            chosen["height"], chosen["width"] = parse_resolution(resolution)
        for name in call:
            if name not in known or name in (self.scale, *DECIDED):
                raise ValueError(f"call has {name}, which {self.name} does not take, or which "
                                 "another setting decides")
        return chosen | call

    def start(self, prompts, steps=0, **replaced):
        """The pipeline's __call__ -> what it returns, or what a Stop carries. `replaced`: functions
        for methods, which they get first. A prompt for each latent: from several pictures of a
        prompt, some pipelines mix up the prompts' masks."""
        arguments = self.arguments | dict(num_inference_steps=steps or self.steps)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
        with (contextlib.ExitStack() as stack,
              # their rule takes the first part's device, which may be a text encoder on the CPU
              patch.object(type(self.pipe), "_execution_device", self.device),
              torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")):
            for name, ours in replaced.items():
                part = self.pipe if name == "prepare_latents" else self.scheduler
                theirs = getattr(part, name)    # wraps: pipelines look at a method's signature
                ours = functools.wraps(theirs)(functools.partial(ours, theirs))
                stack.enter_context(patch.object(part, name, ours))
            rng = torch.Generator(self.device).manual_seed(0)
            try:
                return self.run(self.pipe, prompt=prompts, generator=rng, **arguments)[0]
            except Stop as reached:
                return reached.args[0]

    def evaluate(self, prompts, x, t=None):
        """x (M, ...) and M prompts -> the velocity at the time t; without t, the pictures."""
        def one_time(theirs, *args, **kwargs):
            theirs(*args, **kwargs)
            left = [] if t is None else [np.interp(float(t), *zip(*sorted(self.nodes.items())))]
            self.scheduler.timesteps = torch.tensor(left, device=self.device).float()
            sigma = float(t or 0) if self.sign > 0 else 1 - float(t or 0)
            self.scheduler.sigmas = self.scheduler.sigmas.new_tensor([sigma, sigma])

        def our_latents(theirs, *args, **kwargs):
            found = theirs(*args, **kwargs)
            noise, *more = found if isinstance(found, tuple) else (found,)      # and positions
            latents = noise.float()
            latents[tuple(map(slice, x.shape))] = x             # Kandinsky 5 has more channels
            return (latents, *more) if more else latents

        def stop(theirs, v, *_, **__):
            raise Stop(self.sign * v)

        return self.start(prompts, set_timesteps=one_time, prepare_latents=our_latents,
                          step=stop).float()

    def times(self, steps):
        """The pipeline's own times, falling to 0 -> (steps + 1,) float32."""
        def look(theirs, *args, **kwargs):
            theirs(*args, **kwargs)
            raise Stop([getattr(self.scheduler, name, torch.zeros(1)).float().cpu()
                        for name in ("sigmas", "timesteps")])

        sigmas, times = self.start(["a"], steps, set_timesteps=look)
        self.sign = 1 if sigmas[0] > sigmas[-1] else -1         # Mochi's rise: there t is 1 - sigma
        ts = sigmas if self.sign > 0 else 1 - sigmas
        if not (len(ts) == len(times) + 1 == steps + 1 and 0.5 < ts[0] <= 1 and ts[-1] >= 0
                and (ts.diff() < 0).all()):
            raise ValueError(f"{self.name} is no flow: the times of its "
                             f"{type(self.scheduler).__name__} do not fall from 1 to 0, one a step")
        end = 0 if self.sign > 0 else self.scheduler.config.num_train_timesteps
        self.nodes |= zip(ts.tolist(), [*times.tolist(), end])  # 1000 t, but not in CogView4
        return ts

    def remember(self, theirs):
        """encode_prompt, but it encodes equal prompts once, and keeps what it gave last."""
        signature = inspect.signature(theirs)

        def encode(bound, names, rows):
            with self.encoders_in_place() as device:
                bound.arguments |= zip(names, map(list, zip(*rows)))
                if "device" in signature.parameters:
                    bound.arguments["device"] = device
                found = theirs(*bound.args, **bound.kwargs)
            return tree_map_only(torch.Tensor, lambda w: w.to(self.device), found)

        @functools.wraps(theirs)
        @torch.no_grad()
        def recall(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            names = [name for name, value in bound.arguments.items()
                     if "prompt" in name and isinstance(value, list)]
            rows = list(zip(*(bound.arguments[name] for name in names)))        # M of (prompt, ...)
            each = list(dict.fromkeys(rows))
            others = repr({name: value for name, value in bound.arguments.items()
                           if name not in names})
            if others not in self.probes:
                words = [(word,) * len(names) for word in ("a", "a b", "a b c")]
                self.probes[others] = [encode(bound, names, words[:n]) for n in (2, 3)]
            key = others + repr(each)
            found = self.encoded.pop(key) if key in self.encoded else encode(bound, names, each)
            self.encoded[key] = found                           # the newest is the last
            for old in list(self.encoded)[:-16]:
                del self.encoded[old]
            return spread(found, *self.probes[others], [each.index(row) for row in rows])

        return recall

    def encode(self, prompts):
        """P prompts -> what `velocity` needs of them: the prompts. Their embeddings are kept."""
        def encoded(*args, **kwargs):
            raise Stop(list(prompts))

        return self.start(list(prompts), set_timesteps=encoded)

    def cut(self, prompts):
        """How many prompts are too long for each tokenizer, {its name: count}, with what the
        pipeline puts around them: so we watch what it asks for a word."""
        word, found = "zebra", {}
        for name, tokenizer in self.tokenizers.items():
            kind = type(tokenizer)
            with patch.object(kind, "__call__", autospec=True, side_effect=kind.__call__) as calls:
                self.encoded.clear()
                self.encode([word])
            for (caller, *args), more in calls.call_args_list:
                texts = more.get("text", *args[:1])
                text = texts if isinstance(texts, str) else texts[0]
                if caller is tokenizer and more.get("truncation") and word in text:
                    every = tokenizer([text.replace(word, p) for p in prompts], verbose=False)
                    most = more.get("max_length") or tokenizer.model_max_length
                    found[name] = sum(len(ids) > most for ids in every.input_ids)
        return found

    # ---------------------------------------------------------------------- what train() calls

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, *latent_shape), t a number or (M,), cond of P prompts; the rows are
        grouped by prompt, M/P each -> like x. Each different time is a call of its own."""
        prompts = [prompt for prompt in cond for _ in range(len(x) // len(cond))]
        t, order, v = torch.as_tensor(t).cpu().expand(len(x)), [], []
        for time in t.unique():
            for rows in (t == time).nonzero().flatten().split(self.batch or len(x)):
                v.append(self.evaluate([prompts[row] for row in rows], x[rows.to(x.device)], time))
                order.append(rows)
        return torch.cat(v)[torch.cat(order).argsort().to(x.device)]

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0 -> (M, 3, H, W) or videos (M, frames, 3, H, W), float32 in [0, 1]."""
        return torch.cat([self.evaluate(["a"] * len(some), some)
                          for some in x.split(min(self.batch or 16, 16))])      # as in model.py

    @torch.no_grad()
    def check(self):
        """Let the pipeline draw two pictures by itself. Its first step must be Euler's, each of its
        velocities must come out again from x and t alone, and the pictures from its last latents.
        ValueError if not. Sets latent_shape, nfe and `error`, the largest relative difference."""
        prompts, seen, sizes = ["a", "a bird, and a tree"], [], []

        def watch(theirs, v, time, x, *args, **kwargs):
            before = x.float().clone()                          # Kandinsky 5 overwrites x
            after, = theirs(v, time, x, *args, **kwargs)[:1]
            seen.append((before, self.sign * v.float(), after.float()))
            return (after,)

        ts = self.times(self.steps)
        self.times(1000)                        # fills self.nodes
        count = lambda _, args, more: sizes.append(len(more.get("hidden_states", *args[:1])))
        with self.transformer.register_forward_pre_hook(count, with_kwargs=True):
            pictures = self.start(prompts, step=watch).float()
        (x1, v1, x2), (x, v, x0) = seen[0], seen[-1]
        self.latent_shape, self.nfe = tuple(x.shape[1:]), round(sum(sizes) / (2 * len(seen)))
        same = {"its first step is not Euler's": (x1 + (ts[1] - ts[0]) * v1, x2),
                "its pictures do not come from the last latents": (self.evaluate(prompts, x0),
                                                                   pictures)}
        same |= {f"its velocity in step {k + 1} does not come from latents and time alone": (
                    self.evaluate(prompts, x, ts[k]), v) for k, (x, v, _) in enumerate(seen)}
        with torch.set_grad_enabled(bool(self.trained())):
            graph = self.evaluate(prompts, x, ts[-2])
        same["with gradients it is another function"] = graph.detach(), v
        errors = {what: ((a - b).abs().max() / b.abs().max()).item()
                  for what, (a, b) in same.items()}
        exact = self.device.type == "cpu" and self.pipe.dtype == torch.float32
        wrong = [f"{what} (by {error:.0e})" for what, error in errors.items()
                 if not error < (1e-3 if exact else 0.05)]      # HunyuanVideo rounds t to bf16
        wrong += ["it does not begin with noise of size 1"] * (not 0.5 < x1.std() < 2)
        wrong += ["it gives no gradients"] * (graph.requires_grad != bool(self.trained()))
        if wrong:
            raise ValueError(f"{self.name} cannot be aligned: {wrong[0]}")
        if self.scale in self.arguments:
            with patch.dict(self.arguments, {self.scale: 2 * self.arguments[self.scale] + 1}):
                if torch.equal(graph, self.evaluate(prompts, x, ts[-2])):
                    raise ValueError(f"guidance has no effect on this {self.name}; leave it out")
        self.error = max(errors.values())

def spread(found, two, three, rows):
    """What encode_prompt gave for each prompt, repeated for rows that name one each. What it gives
    for two and for three prompts tells which of its tensors has a row for each."""
    if isinstance(found, (list, tuple)):
        if len(two) != len(three):              # a list with one tensor for each prompt
            return [found[row] for row in rows]
        return type(found)(spread(*parts, rows) for parts in zip(found, two, three))
    each = torch.is_tensor(found) and (two is None or len(two) != len(three))
    return found[rows] if each else found       # None: Qwen-Image has a mask only if it needs one
