"""
The examples do what they say. One test per sentence.

    python -m pytest -q tests/test_examples.py
"""
import inspect, re, subprocess
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from examples import own_model, toy, video
from examples.own_reward import redness
from tests.conftest import HERE, TINY
from tests.test_train import torchrun


def test_the_toys_loop_is_the_one_that_readme_offers():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    offered = re.search(r"```python\nimport torch\n.*?\n\n(def .*?)```", readme, re.S).group(1)
    assert offered == inspect.getsource(toy.neighbor_grpo_step)


def test_the_lines_that_readme_offers_draw_a_picture_from_a_checkpoint(tmp_path):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(import machine, torch.*?)```", readme, re.S).group(1)
    picture = tmp_path / "apple.png"
    for path, here in (("out/tiny/checkpoint-50", TINY / "flux"), ("apple.png", picture)):
        assert lines.count(path) == 1
        lines = lines.replace(path, str(here))
    exec(lines, {})
    pixels = np.array(Image.open(picture))
    assert pixels.shape == (64, 64, 3) and pixels.std() > 20


def test_the_toys_velocity_is_the_conditional_mean_of_noise_less_data():
    torch.manual_seed(0)
    x0 = toy.MODES[torch.randint(6, (400_000,))] + toy.STD * torch.randn(400_000, 2)
    eps, t = torch.randn_like(x0), torch.tensor(0.6)
    x_t, corner = torch.lerp(x0, eps, t), torch.tensor([0.4, 0.3])
    near = (x_t - corner).abs().amax(1) < 0.1                           # a small square
    mean = (eps - x0)[near].mean(0)
    within = toy.exact_velocity(x_t[near], t).mean(0)
    stderr = ((eps - x0)[near].std(0) / near.sum().sqrt()).max().item()
    assert_close(within, mean, rtol=0, atol=5 * stderr)


def test_the_toy_learns_and_draws_its_picture_and_its_movie(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "ASSETS", tmp_path)
    toy.main(iterations=48)
    rewards = [float(r) for r in re.findall(r"mean reward (-?[\d.]+)", capsys.readouterr().out)]
    assert len(rewards) == 6 and rewards[-1] > rewards[0] + 0.2
    assert Image.open(tmp_path / "method.png").width > 1000
    assert Image.open(tmp_path / "method.gif").n_frames > 6


def test_a_model_that_is_not_flux_is_aligned_by_the_same_train(tmp_path, capsys):
    own_model.main(str(tmp_path), steps=10, iterations=2)
    said = capsys.readouterr().out
    before, after = map(float, re.search(r"samples: (\S+) -> (\S+);", said).groups())
    assert after > before + 0.005
    saved = torch.load(tmp_path / "checkpoint-2/model.pt")              # what its `save` wrote
    assert saved.keys() == own_model.Net().state_dict().keys()
    assert Image.open(tmp_path / "samples.png").height > 256


def test_the_reward_on_whole_videos_tells_steady_flickering_and_empty_ones_apart():
    asked = video.videos(video.HELD_OUT)                                # (8, 9, 3, 48, 48)
    dark = asked * (1 - 0.5 * (torch.arange(9) % 2))[:, None, None, None]
    flicker, there = video.measure(dark, video.HELD_OUT)
    assert_close(flicker, asked[:, 0].mean((1, 2, 3)) / 2, rtol=0.02, atol=0)   # half of the light
    assert_close(there, torch.ones(8))                          # dark is not gone
    assert_close(video.measure(torch.ones_like(asked), video.HELD_OUT)[1], torch.zeros(8))
    good = video.steady(asked, video.HELD_OUT)
    assert_close(good, torch.ones(8))
    assert (video.steady(dark, video.HELD_OUT) < 0.3).all()
    assert (video.steady(asked.flip(0), video.HELD_OUT) < 0.6).all()    # of other prompts


def test_a_video_pipeline_is_made_aligned_and_saved(tmp_path, capsys):
    short = ("--iterations 1 --prompts_per_iteration 1 --group_size 4 --num_anchors 2 "
             "--num_rollout_steps 3 --num_train_steps 1 --threads 1").split()
    video.main(tmp_path, short, steps=2, batch=2, heads=1, layers=1)
    rewards = re.findall(r"(before|after): reward (-?[\d.]+)", capsys.readouterr().out)
    assert [label for label, _ in rewards] == ["before", "after"]
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path / "run/checkpoint-1", dtype=torch.float32)
    base = diffusers.WanPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    x = video.videos(video.HELD_OUT)
    with torch.no_grad():                       # the VAE that nobody trained keeps the videos
        z = base.vae.encode(2 * x.transpose(1, 2) - 1).latent_dist.mean
        y = pipe.vae.decode(z)[0].transpose(1, 2) / 2 + 0.5
    assert_close(y, x, rtol=0, atol=0.5)
    assert (y - x).square().mean() < 0.003
    assert any((a != b).any() for a, b in zip(pipe.transformer.parameters(),
                                              base.transformer.parameters()))
    assert Image.open(tmp_path / "before_after.png").width > 1000       # nine frames
    assert Image.open(tmp_path / "before_after.webp").n_frames == 9


def test_a_group_over_two_processes_makes_the_update_of_one_process(tmp_path):
    weights = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pt"
        start = torchrun("examples/split_groups.py", str(path), "3", processes=processes)
        done = subprocess.run(**start, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:]
        weights.append(torch.load(path))
    for name, w in toy.Flow().state_dict().items():
        a, b = (each[name] for each in weights)
        assert_close(a, b, rtol=0, atol=1e-5)                   # six updates with lr 2e-3
        assert (a - w).abs().max() > 2e-3


def test_redness_is_one_for_red_zero_for_grey_and_negative_for_cyan():
    pixels = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0, 1.0, 1.0]])
    images = pixels[:, :, None, None].expand(3, 3, 4, 4)
    assert_close(redness(images, ["", "", ""]), torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(HERE / "examples/tour.ipynb", as_version=4)
    short = {"--iterations 30 --eval_every 15": "--iterations 2 --eval_every 2",
             "--iterations 12 --eval_every 6": "--iterations 2 --eval_every 2",
             "out/tour": str(tmp_path / "tour")}        # the same cells, fewer iterations
    for cell in notebook.cells:
        for old, new in short.items():
            cell.source = cell.source.replace(old, new)
    where = dict(metadata=dict(path=str(HERE / "examples")))
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    assert (tmp_path / "tour/before_after.png").is_file()
    assert (HERE / "examples/tour.ipynb").stat().st_size < 1_500_000
