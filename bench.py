"""
What does an iteration cost beyond the networks it must call? Time t runs from 1 (noise) to 0 (image).

    python bench.py                                   # the tiny preset; any setting of train.py may follow

Times train.py's own iterations and, between them, the same calls of the same networks in the same batches with nothing
around them: the text encoders, T forwards of P x G latents, the VAE, the scorers, and K forwards and backwards of P x B. Prints the
median seconds of both, and the median of their ratios, which does not depend on how fast or busy the machine is.
"""
import contextlib, io, statistics, sys, tempfile, time
import torch
import rewards
from model import Flux
from solvers import schedule
from train import Run, parse_config, train

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
        cfg = parse_config([*sys.argv[1:], "--out_dir", folder, "--eval_prompts", "", "--save_every", "0"])
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        model = Flux(cfg.model, cfg.resolution, cfg.device, cfg.guidance, cfg.checkpointing)
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

if __name__ == "__main__":
    main()
