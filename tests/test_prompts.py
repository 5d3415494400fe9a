"""
machine.py: which files of prompts it reads, and which it refuses. Models are in test_model.py.

    python -m pytest -q tests/test_prompts.py
"""
import json
from pathlib import Path
import pytest
from machine import evenly_spaced, read_prompts


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name, text):
    Path(name).write_text(text, encoding="utf-8", newline="")
    return read_prompts(name)


def test_hpdv2s_published_files_are_read_as_they_are():
    styles = ["anime", "concept-art", "paintings", "photo"]
    Path("hpdv2/benchmark").mkdir(parents=True)
    for style in styles:                                        # a list of strings each
        text = json.dumps([f"{style} {i}, “quoted”" for i in range(3)])
        Path(f"hpdv2/benchmark/{style}.json").write_text(text, encoding="utf-8")
    pairs = [dict(prompt=f"p{i // 2}", human_preference=[1, 0], file_path=["a", "b"])
             for i in range(6)]
    Path("hpdv2/train.json").write_text(json.dumps(pairs), encoding="utf-8")
    four = [f"{style} {i}, “quoted”" for style in styles for i in range(3)]
    assert read_prompts("hpdv2_test") == four == read_prompts("hpdv2/benchmark")
    assert read_prompts("hpdv2_train") == ["p0", "p1", "p2"]
    assert read_prompts("hpdv2/benchmark/photo.json") == [f"photo {i}, “quoted”" for i in range(3)]
    ranked = [dict(prompt="q", image_path=["a"], rank=[1], raw_annotations=[])]
    assert read("test.json", json.dumps(ranked)) == ["q"]


@pytest.mark.parametrize("text, prompts", [
    ("a cat, red, big\na dog, blue, small\n", ["a cat, red, big", "a dog, blue, small"]),
    ("a cat,red,big\na dog,blue\n", ["a cat,red,big", "a dog,blue"]),
    ("id, or identity\nego\n", ["id, or identity", "ego"]),
    ("a; b; c\nd; e; f\n", ["a; b; c", "d; e; f"]),
    ('"Hello", he said\n"unclosed\nthe "word"\n', ['"Hello", he said', '"unclosed', 'the "word"']),
    ("[photo] a cat\n{red|blue} dog\n", ["[photo] a cat", "{red|blue} dog"]),
    ("one\r\ntwo\rthree", ["one", "two", "three"]),
    ("\ta cat\t\n a dog ", ["a cat", "a dog"]),                 # these tabs make no table
    ("a cat", ["a cat"]),
])
def test_a_text_file_has_one_prompt_per_line_and_prompts_may_have_commas(text, prompts):
    assert read("a.txt", text) == prompts


@pytest.mark.parametrize("name, text", [
    ("p.json", '["a cat", {"Prompt": "a dog", "tag": 1}]'),
    ("p.jsonl", '"a cat"\n\n{"tag": 1, "prompt": "a dog"}\n'),
    ("p.json", '{"prompt": "a cat"}\r\n{"prompt": "a dog"}'),
    ("p.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}'),
    ("p.txt", '[\n "a cat",\n "a dog"\n]'),
])
def test_json_and_json_lines_hold_strings_or_objects_with_a_prompt(name, text):
    assert read(name, text) == ["a cat", "a dog"]


@pytest.mark.parametrize("name, form", [
    ("p.txt", "\n".join),
    ("p.json", json.dumps),
    ("p.jsonl", lambda p: "\n".join(map(json.dumps, p))),
])
def test_every_format_drops_blank_lines_invisible_letters_at_the_ends_and_repeated_prompts(
        name, form):
    family = "👨\u200d👩"                                        # keeps the joiner inside
    dirty = ["\ufeffb", "", "\u200b", " a\u200b ", "\u2060\u00a0", "b", family, "a", "\ufeff"]
    assert read(name, form(dirty)) == ["b", "a", family]


def test_a_prompt_counts_once_in_each_file_of_a_folder():          # hpdv2_test must stay 3,200
    Path("many").mkdir()
    for name, prompts in [("b", ["y", "x", "y"]), ("a", ["x", "z"])]:
        Path(f"many/{name}.json").write_text(json.dumps(prompts), encoding="utf-8")
    assert read_prompts("many") == ["x", "z", "y", "x"]


@pytest.mark.parametrize("name, content, sentence", [
    ("hpdv2_test", None, "download it with: hf download --repo-type dataset zhwang/HPDv2 "
                         '--include "benchmark/.*.json" --local-dir hpdv2'),
    ("hpdv2_train", None, "download it with: hf download --repo-type dataset ymhao/HPDv2 "
                          "train.json --local-dir hpdv2"),
    ("", None, "prompts is empty"),
    ("b.txt", None, "b.txt is not a prompt file, .*: No such file"),
    ("a.txt", "\n \n\u200b\n", "a.txt has no prompts"),
    ("a.txt", "a\nb".encode("utf-16"), "is not a prompt file, UTF-8 text"),
    ("a.json", '{"a": 1', "a.json is not a prompt file"),
    ("a.json", "3", "an entry has no prompt"),
    ("a.json", '[{"caption": "a"}]', "an entry has no prompt"),
    ("a.json", "[" * 100_000, "is not a prompt file"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}', "an entry has no prompt"),
    ("a.txt", '{"caption": "a"}\n{"caption": "b"}', "an entry has no prompt"),
    ("a.tsv", "Prompt\tCategory\na cat\tAnimals\n", "a.tsv .* looks like a table"),  # PartiPrompts
    ("a.txt", "Prompts,Category\n\"a cat\",Colors\n", "looks like a table; write its prompts"),
    ("a.txt", "\ufeff id; Prompt \na cat;1\n", "looks like a table"),
    ("a.txt", "a cat\nwith\ta tab\n", "looks like a table"),
    ("a.csv", "a cat\na dog\n", "looks like a table"),
])
def test_a_file_that_is_not_a_prompt_file_is_refused_in_one_sentence(name, content, sentence):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence) as error:
        read_prompts(name)
    assert "\n" not in str(error.value)


def test_evenly_spaced_prompts_cover_the_whole_list():
    assert evenly_spaced(10, 2) == [2, 7] and evenly_spaced(5, 1) == [2]
    assert evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(0, 3) == []
