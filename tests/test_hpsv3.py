"""
HPSv3 against its authors' package: hpsv3_reference.json has what that package gave for a small
random model; hpsv3_reference.py is the program that recorded it, and says how to run it again.

    python -m pytest -q tests/test_hpsv3.py     # no weights, no network, no GPU
"""
import hashlib, json, shutil, sys
from pathlib import Path
import pytest
import torch
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before transformers)
import rewards
sys.path.insert(0, str(Path(__file__).parent))
import hpsv3_reference as reference

torch.set_num_threads(1)
HPSv3 = rewards.find("hpsv3")[0]
RECORDED = json.loads(reference.RECORDED.read_text(encoding="utf-8"))["cases"]
PROMPTS = reference.PROMPTS


def pixels(size, count=3):
    """The recorded picture, once for each prompt: (count, 3, H, W) uint8."""
    return torch.from_numpy(reference.picture(size)).permute(2, 0, 1).expand(count, -1, -1, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """HPSv3.safetensors and tokenizer.json of the small model, as they are published."""
    path = tmp_path_factory.mktemp("hpsv3")
    reference.write(path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, folder):
    rules = dict(rope_type="default", rope_theta=1e6, mrope_section=reference.SECTIONS)
    vocab = len(reference.tokenizer()["model"]["vocab"]) + len(reference.SPECIAL) + 1
    for kind in {HPSv3, rewards.find("hpsv3")[0]}:              # of a second import, in other tests
        monkeypatch.setattr(kind, "text", reference.TEXT | dict(vocab_size=vocab,
                                                                rope_parameters=rules))
        monkeypatch.setattr(kind, "vision", reference.VISION)


@pytest.fixture
def scorer(folder):
    return rewards.load(f"hpsv3={folder / 'HPSv3.safetensors'}")


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["size"]))
def test_text_tokens_and_pixels_are_those_of_the_authors_package(case, scorer):
    inputs = scorer.inputs(pixels(case["size"]), PROMPTS)
    rows = inputs["input_ids"].tolist()
    assert [sha(scorer.tokenizer.decode(row)) for row in rows] == case["text"]
    assert [sha(json.dumps(row)) for row in rows] == case["ids"]
    assert inputs["image_grid_thw"].tolist() == [case["grid"]] * len(PROMPTS)
    values = inputs["pixel_values"].flatten()
    assert_close(values[:: len(values) // 50], torch.tensor(case["pixels"]), rtol=1e-6, atol=1e-6)
    assert values.double().sum().item() == pytest.approx(case["sum"], rel=1e-6)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["size"]))
def test_the_score_is_the_mean_that_the_authors_package_gives(case, scorer):
    mean = torch.tensor(case["float32"])[:, 0]
    assert_close(scorer(pixels(case["size"]) / 255, PROMPTS), mean, rtol=1e-5, atol=2e-5)
    scorer.net.bfloat16()               # as on a GPU; bfloat16 numbers near 1 are 0.008 apart
    mean = torch.tensor(case["bf16"])[:, 0]
    assert_close(scorer(pixels(case["size"]) / 255, PROMPTS), mean, rtol=0, atol=0.1)


def test_the_head_stays_in_float32_when_the_rest_is_in_bfloat16(scorer):
    scorer.net.bfloat16()
    scores = scorer(pixels((64, 64)) / 255, PROMPTS)
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_score_does_not_depend_on_longer_prompts_in_the_batch(scorer):
    x = pixels((64, 64)) / 255
    each = [scorer(x[:1], [prompt]).item() for prompt in PROMPTS]
    assert scorer(x, PROMPTS).tolist() == pytest.approx(each, rel=1e-5)
    assert len(set(each)) == len(each)


def test_every_tensor_of_the_published_layout_fits_and_none_may_be_missing_or_added(monkeypatch):
    monkeypatch.undo()                                          # the real sizes, on "meta"
    state = {name: torch.empty(shape, device="meta") for name, shape in
             reference.layout(HPSv3.text, HPSv3.vision, HPSv3.text["vocab_size"]).items()}
    assert len(state) == 736                                    # tensors in the published file
    net, head = HPSv3.build()
    ours = {**net.state_dict(), **head.state_dict()}
    renamed = HPSv3.rename(state)
    assert {n: w.shape for n, w in renamed.items()} == {n: w.shape for n, w in ours.items()}
    weights = sum(w.numel() for w in state.values())
    assert 2 * (weights - state["lm_head.weight"].numel()) == pytest.approx(15.5e9, rel=0.01)


@pytest.mark.parametrize("spoil", ["lm_head.weight", "rm_head.5.bias",
                                   "visual.blocks.1.attn.qkv.bias", "model.layers.0.extra"])
def test_a_file_that_lacks_a_tensor_or_has_another_is_refused(spoil, folder, tmp_path):
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    state = rewards.load_file(folder / "HPSv3.safetensors")
    state.pop(spoil) if spoil in state else state.update({spoil: torch.zeros(1)})
    reference.save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="is not the file of .*: .*(Missing|Unexpected) key"):
        rewards.load(f"hpsv3={tmp_path}")


def test_another_tokenizer_and_a_prompt_with_a_control_token_are_refused(scorer, tmp_path, folder):
    rules = reference.tokenizer()
    rules["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    shutil.copyfile(folder / "HPSv3.safetensors", tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer of .*Qwen2-VL-7B"):
        rewards.load(f"hpsv3={tmp_path}")
    with pytest.raises(ValueError, match=r"<\| begins a control token"):
        scorer.check_prompt("an apple <|Reward|>")
    scorer.check_prompt("an apple | <b>")
