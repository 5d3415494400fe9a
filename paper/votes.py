"""
The paper's Figure 7: a page on which people vote for pictures of two models, without knowing which
model made which, and the win rate from the votes that they send back.

    python -m paper.votes pairs out/eval/tiny-flux out/eval/tiny-checkpoint-50
    python -m paper.votes count votes-*.json

The page is one HTML file, pairs.html, with the pictures inside. It needs no server and no network.
"""
import argparse, base64, hashlib, io, json, random, sys
from pathlib import Path
from PIL import Image
from machine import evenly_spaced

HERE = Path(__file__).resolve().parent
Z_95 = 1.959964                         # 95 % of a normal distribution lies within +- Z_95

# ------------------------------------------------------------------------------------------------
# The page

def write_pairs(a, b, out, count=100, seed=0):
    """Write out/pairs.html, on which a person says for each prompt which of two pictures is better,
    without knowing which model made which. Returns its path.

    a, b: two folders of eval.py, each with prompts.json and pictures/{prompt:05d}-0.png. The page
    has at most `count` of the prompts whose first picture is in both folders, evenly spaced. Half
    of them have b on the left. Order and sides depend only on the seed. ValueError for folders that
    cannot be compared.
    """
    folders = [Path(a).resolve(), Path(b).resolve()]
    prompts, other_prompts = map(read_prompts_of, folders)
    labels = [folder.name for folder in folders]
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1")
    if folders[0] == folders[1]:
        raise ValueError(f"{a} and {b} are the same folder; name two")
    if labels[0] == labels[1]:
        labels = [str(a), str(b)]
    files = {i: [folder / f"pictures/{i:05d}-0.png" for folder in folders]
             for i in range(min(len(prompts), len(other_prompts)))}
    shared = [i for i, two in files.items() if all(file.is_file() for file in two)]
    if not shared:
        raise ValueError(f"{a} and {b} share no picture; both must have pictures/00000-0.png, or "
                         "another one with the same name")
    for i in shared:
        if prompts[i] != other_prompts[i]:
            raise ValueError(f"prompt {i} is {prompts[i]!r} in {a}, but {other_prompts[i]!r} in "
                             f"{b}; both must have the same prompts")
    rng, order = random.Random(seed), [shared[i] for i in evenly_spaced(len(shared), count)]
    rng.shuffle(order)
    sides = [i % 2 == 1 for i in range(len(order))]             # flipped: b is on the left
    rng.shuffle(sides)
    pairs = []
    for i, flipped in zip(order, sides):
        left, right = data_urls(reversed(files[i]) if flipped else files[i])
        pairs.append(dict(index=i, prompt=prompts[i], left=left, right=right, flipped=flipped))
    data = dict(a=labels[0], b=labels[1], seed=seed, pairs=pairs)
    data["study"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
    text = json.dumps(data).replace("<", "\\u003c")             # no </script> in it
    page = (HERE / "pairs.html").read_text(encoding="utf-8").replace("/*DATA*/", text)
    path = Path(out) / "pairs.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path

def read_prompts_of(folder):
    """The prompts that eval.py saved in its folder."""
    try:
        prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{folder} has no pictures of eval.py; it must have prompts.json, a list "
                         "of prompts, and pictures/")
    return prompts

def data_urls(paths):
    """Two picture files -> two data URLs: both JPEG (quality 92, no chroma subsampling) or both
    PNG, whichever is smaller. So compression never shows on one side only."""
    def encode(picture, kind, **how):
        picture.save(file := io.BytesIO(), kind, **how)
        return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()

    pictures = [Image.open(path).convert("RGB") for path in paths]
    png = [encode(picture, "png") for picture in pictures]
    jpeg = [encode(picture, "jpeg", quality=92, subsampling=0) for picture in pictures]
    return min(png, jpeg, key=lambda urls: sum(map(len, urls)))

# ------------------------------------------------------------------------------------------------
# The votes

def read_votes(paths):
    """The files that voters saved from one page -> a list with the content of each: {study, a, b,
    voter, votes: [{index, winner, ...}]}. ValueError for files that cannot be counted.

    A file has the JSON that the page saved, or the text that the page shows, which is base64.
    """
    files = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8-sig").strip()
            is_json = text.startswith("{")
            file = json.loads(text if is_json else base64.b64decode(text).decode("utf-8"))
            indices = [vote["index"] for vote in file["votes"]]
            is_votes = (all(isinstance(file[key], str) for key in ("study", "a", "b", "voter"))
                        and all(type(index) is int for index in indices)
                        and all(vote["winner"] in ("a", "b", "tie") for vote in file["votes"]))
        except (OSError, ValueError, KeyError, TypeError):
            is_votes = False
        if not is_votes:
            raise ValueError(f"{path} is not a votes file; it must be the file that "
                             "pairs.html saved, or the text that it showed")
        if not indices or len(indices) != len(set(indices)):
            raise ValueError(f"{path} must have at least one vote, and one vote per prompt")
        for other, earlier in zip(files, paths):
            if any(file[key] != other[key] for key in ("study", "a", "b")):
                raise ValueError(f"{path} is from study {file['study']}, but {earlier} from "
                                 f"{other['study']}; all files must come from one page")
            if file["voter"] == other["voter"]:
                raise ValueError(f"{path} and {earlier} have the same voter, {file['voter']!r}; "
                                 "there must be one file per voter")
        files.append(file)
    return files

def win_rate(files):
    """The result of read_votes -> how often b is preferred over a. A tie counts half.

    The unit is the prompt. The votes of several voters on one pair are averaged first, because they
    are not independent.

    wins, ties, losses  prompts whose average for b is above, at and below one half
    rate                the mean over prompts, in [0, 1]
    low, high           Wilson's score interval, 95 %, n = prompts

    The interval assumes that prompts are independent draws. It holds for other prompts and the same
    voters, not for other voters. It is made for votes of 0 or 1. The variance of a mean of averages
    in [0, 1] is at most rate (1 - rate) / n. So ties and several voters can only make the interval
    wider than necessary. It has a width even at rates of 0 and 1.
    """
    votes = {}
    for file in files:
        for vote in file["votes"]:
            value = {"a": 0.0, "tie": 0.5, "b": 1.0}[vote["winner"]]
            votes.setdefault(vote["index"], []).append(value)
    each = [sum(some) / len(some) for some in votes.values()]
    n, rate, z2 = len(each), sum(each) / len(each), Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * (rate * (1 - rate) / n + z2 / (4 * n * n)) ** 0.5
    return dict(a=files[0]["a"], b=files[0]["b"], prompts=n, voters=len(files),
                wins=sum(x > 0.5 for x in each), ties=sum(x == 0.5 for x in each),
                losses=sum(x < 0.5 for x in each), rate=rate,
                low=max(0.0, centre - half), high=min(1.0, centre + half))

def describe(r):
    """The result of win_rate, in one line."""
    rate, low, high = (f"{100 * r[key]:.1f} %" for key in ("rate", "low", "high"))
    return (f"{r['b']} against {r['a']}: {rate} of {r['prompts']} prompts (95 % interval {low} to "
            f"{high}), {r['wins']} wins {r['ties']} ties {r['losses']} losses, "
            f"{r['voters']} voter{'s' * (r['voters'] > 1)}")

# ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m paper.votes", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="write a page on which people vote blindly")
    pairs.add_argument("a", metavar="A", help="a row's folder in the --out_dir of eval.py")
    pairs.add_argument("b", metavar="B", help="the folder of another row")
    pairs.add_argument("--count", type=int, default=100, help="pairs on the page (default 100)")
    pairs.add_argument("--seed", type=int, default=0, help="for order and sides (default 0)")
    pairs.add_argument("--out_dir", default="out/eval", help="for the page (default out/eval)")
    count = commands.add_parser("count", help="print how often B was preferred over A")
    count.add_argument("files", metavar="FILE", nargs="+", help="files that voters saved")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")                # labels, without UTF-8
    try:
        if args.command == "pairs":
            path = write_pairs(args.a, args.b, args.out_dir, args.count, args.seed)
            print(f"wrote {path}; after the votes: python -m paper.votes count FILE ...")
        else:
            print(describe(win_rate(read_votes(args.files))))
    except (ValueError, OSError) as error:
        parser.error(str(error))

if __name__ == "__main__":
    main()
