"""
Prompts from files, and an even choice of some of them. `read_prompts` takes

    a text file       one prompt a line, commas and all
    JSON, JSON Lines  strings, or objects with a "prompt", as HPDv2 and GenEval publish them
    csv, tsv          a table with a column named prompt or prompts, as PartiPrompts and DrawBench;
                      a text file that is such a table is read as one, too
    a folder          its .json files, in the order of their names
    hpdv2_train, hpdv2_test     the published prompts of HPDv2, from where HPDV2 says

In all of them, a prompt that occurs several times in a file counts once (HPDv2's train.json names
each of its prompts several times), in the place of its first occurrence. Blank lines do not count,
and a byte order mark, spaces and zero-width characters around a prompt are left out.
"""
import contextlib, csv, io, json, re
from pathlib import Path

HPDV2 = {       # where it is looked for, what it should be, and how to get it
    "hpdv2_test": ("hpdv2/benchmark",
                   "the 3,200 prompts of anime, concept-art, paintings and photo.json",
                   'zhwang/HPDv2 --include "benchmark/*.json"'),
    "hpdv2_train": ("hpdv2/train.json", "the 103,700 training prompts", "ymhao/HPDv2 train.json"),
}
INVISIBLE = r"[\s\u200b-\u200f\u2060\ufeff]+"       # spaces; zero-width characters
EDGES = re.compile(f"^{INVISIBLE}|{INVISIBLE}$")
FIRST = 20                                          # lines that show what kind of file it is


def read_prompts(source):
    """The prompts of a file, a folder or a name, see above -> a list of strings.

    ValueError, in one sentence: a file that is missing, empty, not UTF-8, or not one of these
    kinds; above all a table without a column named prompt, whose every line would look like a
    prompt.
    """
    if not source:
        raise ValueError("prompts is empty; name a text file with one prompt a line, or "
                         "hpdv2_train")
    where, what, command = HPDV2.get(source, (source, "", ""))
    path, found = Path(where), []
    if command and not path.exists():
        raise ValueError(f"{source} should be {what} in {where}, and is not there; get it by: "
                         f"hf download --repo-type dataset {command} --local-dir hpdv2")
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            text = file.read_text(encoding="utf-8-sig")
            found += dict.fromkeys(map(visible, parse_prompts(text, file.suffix.lower())))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            said = getattr(error, "strerror", None) or " ".join(str(error).split())
            if type(error) is not ValueError:       # of the system, a decoder or a parser
                said += ("; it must be a UTF-8 text file with one prompt a line, JSON, or a table "
                         "with a column named prompt")
            raise ValueError(f"{file} is not a prompt file: {said}") from None
    prompts = [prompt for prompt in found if prompt]
    if not prompts:
        raise ValueError(f"{source} holds no prompt")
    return prompts


def parse_prompts(text, suffix):
    if suffix in (".json", ".jsonl", ".ndjson"):
        return from_json(text)
    if text.lstrip().startswith(("{", "[")):        # perhaps JSON under another name
        with contextlib.suppress(json.JSONDecodeError):
            return from_json(text)
    return from_text(text, suffix)


def visible(text):
    """The text without spaces and zero-width characters at its ends."""
    return EDGES.sub("", text)


def from_json(text):
    """The prompts of a JSON list, or of JSON Lines: one value a line."""
    try:
        items = json.loads(text)
        items = items if isinstance(items, list) else [items]
    except ValueError:
        items = [json.loads(line) for line in text.split("\n") if visible(line)]
    found = []
    for item in items:
        if isinstance(item, dict):                  # some write Prompt
            item = next((value for key, value in item.items() if key.lower() == "prompt"), None)
        if not isinstance(item, str):
            raise ValueError("it is JSON, but an entry has no prompt")
        found.append(item)
    return found


def from_text(text, suffix):
    """The prompts of a table, if the file is one or is named like one; else one a line."""
    lines = [line for line in map(visible, text.split("\n")) if line]
    header = lines[0] if lines else ""
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    names = [visible(name).lower() for name in cells_of(header, delimiter)]
    named = [i for i, name in enumerate(names) if name in ("prompt", "prompts")]
    if not (suffix in (".csv", ".tsv") or (named and len(names) > 1)
            or is_table(lines[:FIRST], delimiter)):
        return lines
    if not named:
        raise ValueError("it looks like a table, but its first line, "
                         f"{header[:60]!r}, names no column prompt")
    return from_table(text, delimiter, len(names), named[0])


def cells_of(line, delimiter):
    return next(csv.reader([line], delimiter=delimiter), [])


def is_table(lines, delimiter):
    """Whether these first lines have tabs, or several columns with no space after the commas, the
    same number in each line. Prompts with commas have spaces, and more commas in some lines."""
    cells = [cells_of(line, delimiter) for line in lines]
    columns = len(cells) > 1 and len(cells[0]) > 1 and len({len(row) for row in cells}) == 1
    spaces = any(cell.startswith(" ") for row in cells for cell in row)
    return any("\t" in line for line in lines) or (columns and not spaces)


def from_table(text, delimiter, width, column):
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        if delimiter != "\t":
            raise
        rows = [line.split("\t") for line in text.split("\n")]      # a tsv file without quoting
    rows = [row for row in rows if any(map(visible, row))]
    for row in rows:
        if any(row[width:]):
            raise ValueError(f"the line {delimiter.join(row)[:60]!r} has more columns than the "
                             f"first line; a prompt with {delimiter!r} in it must be quoted")
    return [row[column] for row in rows[1:] if len(row) > column]


def evenly_spaced(n, most):
    """The indices of at most `most` of n prompts, evenly spaced. Pictures that are shown are chosen
    by this rule, so nobody picks the good ones."""
    count = min(n, most)
    return [int((i + 0.5) * n / count) for i in range(count)]
