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

This works for what is a function of x and t, and for nothing else. So `check` lets the pipeline
draw two pictures by itself, and compares. Letters: P prompts, M latents (a multiple of P).
"""
import contextlib, functools, inspect
from pathlib import Path
from unittest.mock import patch
import machine                                                  # noqa: F401  (before diffusers)
import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from inputs import DECIDED, find_pipeline, parse_resolution
from model import Flux, Weights


def load_model(path, resolution="", guidance="", steps=8, call=None, **settings):
    """FLUX.1 as model.Flux, at 720 pixels and guidance 3.5 if nothing else is given; every other
    pipeline as a Pipeline, which has the arguments. ValueError for what cannot be aligned."""
    is_folder = isinstance(path, (str, Path))                   # or a hub id; else a pipeline
    if (find_pipeline(path)[0] if is_folder else type(path).__name__) != "FluxPipeline":
        return Pipeline(path, resolution, guidance, steps, call, **settings)
    if call:
        raise ValueError(f"call has {next(iter(call))}, but FLUX.1 has settings for all it takes")
    return Flux(path, resolution or 720, guidance=3.5 if guidance == "" else guidance, **settings)


class Stop(Exception):
    """Ends a pipeline's __call__ early, and carries what it had reached."""


class Pipeline(Weights):
    """
    resolution   as for model.Flux; empty: the pipeline's own
    guidance     the guidance scale; empty: the pipeline's own
    steps        T of the rollouts: `check` draws its pictures with as many
    call         other arguments of __call__, {name: value}, such as num_frames
    settings     of Weights, and device

    Raises ValueError, in one sentence, for what cannot be aligned. With sharded=True the caller has
    to call `check`, after FSDP has moved the network.
    """

    def __init__(self, path, resolution="", guidance="", steps=8, call=None, **settings):
        super().__init__(path, **settings)
        self.run = inspect.unwrap(type(self.pipe).__call__)     # without its no_grad
        self.name, self.scheduler = type(self.pipe).__name__, self.pipe.scheduler
        self.arguments = self.choose_arguments(resolution, guidance, steps, call or {})
        self.nodes = {}                         # {t: the scheduler's own time}
        self.encoded, self.probes = {}, {}      # what encode_prompt gave
        self.pipe.encode_prompt = self.remember(self.pipe.encode_prompt)
        if not settings.get("sharded"):
            self.check()

    def choose_arguments(self, resolution, guidance, steps, call):
        """The arguments that __call__ gets every time."""
        known = inspect.signature(self.run).parameters
        chosen = dict(num_inference_steps=steps, output_type="pt", return_dict=False)
        # Where there are two scales, the network takes the first as an input, or it is ignored.
        scales = [name for name in ("true_cfg_scale", "guidance_scale") if name in known]
        takes_input = self.transformer.config.get("guidance_embeds")
        self.scale, self.guided = (scales or [""])[-1 if takes_input else 0], guidance != ""
        if self.guided:
            if not self.scale:
                raise ValueError(f"guidance is {guidance}, but {self.name} takes none")
            chosen[self.scale] = float(guidance)
        if "negative_prompt" in known:
            chosen["negative_prompt"] = ""      # without one, some ignore their guidance
        if "max_sequence_length" in known:      # a small tokenizer has less
            lengths = [part.model_max_length for name, part in self.pipe.components.items()
                       if name.startswith("tokenizer")]
            chosen["max_sequence_length"] = min(known["max_sequence_length"].default, max(lengths))
        if resolution:
            chosen["height"], chosen["width"] = parse_resolution(resolution)
        for name in call:
            if name not in known or name in (self.scale, *DECIDED):
                raise ValueError(f"call has {name}, but " + (
                    "that is decided here, or by another setting" if name in known else
                    f"{self.name} takes no such argument"))
        return chosen | call

    # ---------------------------------------------------------------------- running __call__

    def start(self, prompts, set_timesteps=None, prepare_latents=None, step=None, **changed):
        """The pipeline's __call__, with gradients where they are on -> what it returns, or what a
        Stop carries. The functions replace the methods of their names, which they get first. The
        pipeline gets M prompts of one picture each: from several pictures of a prompt, some mix up
        the prompts' masks."""
        arguments = self.arguments | changed
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
        with contextlib.ExitStack() as stack:
            for part, name, ours in ((self.scheduler, "set_timesteps", set_timesteps),
                                     (self.pipe, "prepare_latents", prepare_latents),
                                     (self.scheduler, "step", step)):
                if ours:                        # wraps: pipelines look at set_timesteps' signature
                    theirs = getattr(part, name)
                    ours = functools.wraps(theirs)(functools.partial(ours, theirs))
                    stack.enter_context(patch.object(part, name, ours))
            # Their own rule takes the first part's device, which may be a text encoder on the CPU.
            stack.enter_context(patch.object(type(self.pipe), "_execution_device", self.device))
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16,
                                               self.device.type == "cuda"))
            rng = torch.Generator(self.device).manual_seed(0)
            try:
                return self.run(self.pipe, prompt=prompts, generator=rng, **arguments)[0]
            except Stop as reached:
                return reached.args[0]

    def evaluate(self, prompts, x, t=None):
        """x (M, ...) and M prompts -> the velocity at the time t; without t, the pictures."""
        def one_time(theirs, *args, **kwargs):
            theirs(*args, **kwargs)
            if t is None:
                self.scheduler.timesteps = self.scheduler.timesteps[:0]
                return
            time = np.interp(float(t), *zip(*sorted(self.nodes.items())))
            self.scheduler.timesteps = torch.tensor([time], device=self.device).float()
            sigma = float(t) if self.sign > 0 else 1 - float(t)
            self.scheduler.sigmas = self.scheduler.sigmas.new_tensor([sigma, sigma])

        def our_latents(theirs, *args, **kwargs):
            found = theirs(*args, **kwargs)
            noise, *more = found if isinstance(found, tuple) else (found,)      # and positions
            if noise.shape != x.shape:                          # Kandinsky 5 has more channels
                noise = noise.float()
                noise[tuple(map(slice, x.shape))] = x
            latents = x if noise.shape == x.shape else noise
            return (latents, *more) if more else latents

        def stop(theirs, v, *_, **__):
            raise Stop(self.sign * v)

        return self.start(prompts, one_time, our_latents, stop).float()

    def times(self, steps):
        """The pipeline's own times, falling to 0 -> (steps + 1,) float32."""
        def look(theirs, *args, **kwargs):
            theirs(*args, **kwargs)
            raise Stop([getattr(self.scheduler, name).float().cpu()
                        for name in ("sigmas", "timesteps")])

        sigmas, times = self.start(["a"], look, num_inference_steps=steps)
        self.sign = 1 if sigmas[0] > sigmas[-1] else -1         # Mochi's rise: there t is 1 - sigma
        ts = sigmas if self.sign > 0 else 1 - sigmas
        if not (len(ts) == len(times) + 1 == steps + 1 and 0.5 < ts[0] <= 1 and ts[-1] >= 0
                and (ts.diff() < 0).all()):
            raise ValueError(f"{self.name} is no flow: the times of its "
                             f"{type(self.scheduler).__name__} do not fall from 1 to 0, one a step")
        end = 0 if self.sign > 0 else self.scheduler.config.num_train_timesteps
        self.nodes |= zip(ts.tolist(), [*times.tolist(), end])  # 1000 t, but not in CogView4
        return ts

    # ---------------------------------------------------------------------- text

    def remember(self, theirs):
        """encode_prompt for prompts of which many are equal: it encodes each once, and keeps what
        it gave for the last lists."""
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
            if len(self.encoded) > 16:
                del self.encoded[next(iter(self.encoded))]
            return spread(found, *self.probes[others], [each.index(row) for row in rows])

        return recall

    def encode(self, prompts):
        """P prompts -> what `velocity` needs of them: the prompts. Their embeddings are kept."""
        def reached(theirs, *args, **kwargs):
            raise Stop(list(prompts))

        return self.start(list(prompts), reached)

    def cut(self, prompts):
        """How many prompts are too long for a tokenizer: {its name: count}. What a pipeline puts
        around a prompt counts, too, so we watch how it calls its tokenizers for a word."""
        seen, word, components = {}, "zebra", self.pipe.components

        def watched(theirs, tokenizer, *args, **kwargs):
            texts = kwargs.get("text", args[0] if args else "")
            text = texts if isinstance(texts, str) else texts[0]
            name = next((n for n, part in components.items() if part is tokenizer), None)
            if name and kwargs.get("truncation") and word in text:
                most = kwargs.get("max_length") or tokenizer.model_max_length
                seen[name] = lambda prompt: len(theirs(
                    tokenizer, text.replace(word, prompt), verbose=False).input_ids) > most
            return theirs(tokenizer, *args, **kwargs)

        with contextlib.ExitStack() as stack:
            for kind in {type(part) for n, part in components.items() if n.startswith("tokenizer")}:
                watch = functools.partial(watched, kind.__call__)
                stack.enter_context(patch.object(
                    kind, "__call__", lambda *args, watch=watch, **more: watch(*args, **more)))
            self.encode([word])
        return {name: sum(map(too_long, prompts)) for name, too_long in seen.items()}

    # ---------------------------------------------------------------------- what train() calls

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, *latent_shape), t a number or (M,), cond of P prompts; the rows are
        grouped by prompt, M/P each -> like x. A pipeline has one time in a call, so several times
        are several calls."""
        prompts = [prompt for prompt in cond for _ in range(len(x) // len(cond))]
        t, order, v = torch.as_tensor(t).cpu().expand(len(x)), [], []
        for time in t.unique():
            for rows in (t == time).nonzero().flatten().split(self.batch or len(x)):
                v.append(self.evaluate([prompts[row] for row in rows], x[rows.to(x.device)], time))
                order.append(rows)
        return torch.cat(v)[torch.cat(order).argsort().to(x.device)]

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0 -> images (M, 3, H, W) or videos (M, frames, 3, H, W), float32 in
        [0, 1]; at most sixteen at a time, as in model.py."""
        return torch.cat([self.evaluate(["a"] * len(some), some)
                          for some in x.split(min(self.batch or 16, 16))])

    @torch.no_grad()
    def check(self):
        """Let the pipeline draw two pictures by itself, with prompts of different length. Its first
        step must be Euler's, each of its velocities must come out again from x and t alone, and the
        pictures from its last latents. ValueError if not. This also gives latent_shape, nfe, and
        `error`, the largest relative difference."""
        prompts, seen, sizes = ["a", "a bird, and a tree"], [], []

        def watch(theirs, v, time, x, *args, **kwargs):
            before, v = x.float().clone(), v.float()            # Kandinsky 5 overwrites x
            seen.append((before, self.sign * v, theirs(v, time, x, *args, **kwargs)[0].float()))
            return (seen[-1][2].to(x.dtype),)

        def count(_, args, kwargs):             # guidance is a larger batch, or one more call
            sizes.append(len(kwargs.get("hidden_states", args[0] if args else ())))

        if not hasattr(self.scheduler, "sigmas"):
            raise ValueError(f"{self.name} is no flow: {type(self.scheduler).__name__} has no "
                             "sigmas")
        steps = self.arguments["num_inference_steps"]
        ts = self.times(steps)
        self.times(1000)                        # for times in between, with --shift
        with self.transformer.register_forward_pre_hook(count, with_kwargs=True):
            pictures = self.start(prompts, step=watch).float()
        (x1, v1, x2), (x, v, _) = seen[0], seen[-1]
        self.latent_shape, self.nfe = tuple(x.shape[1:]), round(sum(sizes) / (2 * steps))
        same = {"its first step is not Euler's": (x1 + (ts[1] - ts[0]) * v1, x2),
                "its pictures do not come from the last latents": (
                    self.evaluate(prompts, seen[-1][2]), pictures)}
        same |= {f"its velocity in step {k + 1} does not come from latents and time alone": (
                    self.evaluate(prompts, x, ts[k]), v) for k, (x, v, _) in enumerate(seen)}
        if self.trained():
            with torch.enable_grad():
                graph = self.evaluate(prompts, x, ts[-2])
            same["with gradients it is another function"] = graph.detach(), v
        errors = {what: ((a - b).abs().max() / b.abs().max()).item()
                  for what, (a, b) in same.items()}
        exact = self.device.type == "cpu" and self.pipe.dtype == torch.float32
        wrong = [f"{what} (by {error:.0e})" for what, error in errors.items()
                 if not error < (1e-3 if exact else 0.05)]      # HunyuanVideo rounds t to bf16
        wrong += ["it does not begin with noise of size 1"] * (not 0.5 < x1.std() < 2)
        wrong += ["it gives no gradients"] * bool(self.trained() and not graph.requires_grad)
        if wrong:
            raise ValueError(f"{self.name} cannot be aligned: {wrong[0]}")
        if self.guided:
            again = self.evaluate(prompts, x, ts[-2])
            with patch.dict(self.arguments, {self.scale: 2 * self.arguments[self.scale] + 1}):
                if torch.equal(again, self.evaluate(prompts, x, ts[-2])):
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
