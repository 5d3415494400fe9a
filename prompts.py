"""
Prompts: from files, and a fair choice of some of them.
"""
import json
from pathlib import Path

HPDV2 = {       # where it is looked for, what it should be, and how to get it
    "hpdv2_test": ("hpdv2/benchmark",
                   "the 3,200 prompts of anime, concept-art, paintings and photo.json",
                   'zhwang/HPDv2 --include "benchmark/*.json"'),
    "hpdv2_train": ("hpdv2/train.json", "the 103,700 training prompts", "ymhao/HPDv2 train.json"),
}


def read_prompts(source):
    """A text file with one prompt a line; a JSON list of prompts, or of objects that each have a
    "prompt", as HPDv2 publishes them (its train.json names each several times: here once); a
    folder of such JSON files; or hpdv2_test, hpdv2_train for where HPDV2 says."""
    if not source:
        raise ValueError("prompts is empty; name a text file with one prompt a line, or "
                         "hpdv2_train")
    where, what, command = HPDV2.get(source, (source, "", ""))
    path, prompts = Path(where), []
    if command and not path.exists():
        raise ValueError(f"{source} should be {what} in {where}, and is not there; get it by: "
                         f"hf download --repo-type dataset {command} --local-dir hpdv2")
    try:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix.lower().startswith(".json"):
                assert isinstance(items := json.loads(text), list)
                prompts += dict.fromkeys((item if isinstance(item, str) else item["prompt"]).strip()
                                         for item in items)
            else:
                prompts += (line.strip() for line in text.split("\n"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            RecursionError):
        raise ValueError(f"{source} is not a prompt file; it must be a UTF-8 text file with one "
                         "prompt a line, or a JSON list of prompts") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{source} holds no prompt; it must be a UTF-8 text file with one prompt "
                         "a line, or a JSON list of prompts")
    return prompts


def evenly_spaced(n, most):
    """The indices of at most `most` of n prompts, evenly spaced. Pictures that are shown are chosen
    by this rule, so nobody picks the good ones."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]
