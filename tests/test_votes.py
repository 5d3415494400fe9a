"""
The page on which people vote, and the result of their votes.

    python -m pytest -q tests/test_votes.py     # tests the page in a Chromium, if there is one
"""
import base64, io, json, os, re, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from paper import votes
from paper.votes import read_votes, win_rate, write_pairs
from tests.conftest import HERE, click, js, press

NASTY = ['a "quoted" apple', "</script><script>alert(1)</script><!--", "salt & pepper &amp; <b>",
         "ein Bär 🐻‍❄️, 雪", "two\nlines \\n /*DATA*/", "عربي", "  ", "plain"]


def folder_of(path, color, prompts, size=64, missing=()):
    """A folder as eval.py writes it. Picture i is `color`, except its top row of pixels: i."""
    (path / "pictures").mkdir(parents=True)
    (path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    for i in range(len(prompts)):
        pixels = np.full((size, size, 3), color, np.uint8)
        pixels[0] = i
        if i not in missing:
            Image.fromarray(pixels).save(path / f"pictures/{i:05d}-0.png")
    return path


def data_of(page):
    text = Path(page).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def pixels_of(url):
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.asarray(picture.convert("RGB")).astype(int)


def votes_of(path, winners, voter="ann", **changed):
    given = [dict(index=i, prompt="", winner=winner) for i, winner in enumerate(winners)]
    whole = dict(study="s", a="flux", b="checkpoint-150", voter=voter, votes=given)
    path.write_text(json.dumps({**whole, **changed}), encoding="utf-8")
    return path


def file_of(winners, voter="ann"):
    """The result of read_votes for one file. winners: {index of the prompt: winner}, or a list."""
    winners = winners if isinstance(winners, dict) else dict(enumerate(winners))
    given = [dict(index=i, winner=winner) for i, winner in winners.items()]
    return dict(a="a", b="b", voter=voter, votes=given)


def rate_of(winners):
    return win_rate([file_of(winners)])


# ------------------------------------------------------------------------------------------------
# the win rate

@pytest.mark.parametrize("wins, n, low, high", [
    (0, 10, 0.0, 0.277533),                                     # z^2 / (n + z^2), z^2 = 3.841459
    (10, 10, 0.722467, 1.0),                                    # n / (n + z^2)
    (5, 10, 0.236593, 0.763407),                                # 1/2 -+ z / (2 sqrt(n + z^2))
    (1, 1, 0.206549, 1.0),                                      # even one vote says something
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),       # Newcombe (1998), table I
    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
])
def test_the_interval_is_wilsons(wins, n, low, high):
    r = rate_of(["b"] * wins + ["a"] * (n - wins))
    assert (r["rate"], r["low"], r["high"]) == pytest.approx((wins / n, low, high), abs=5e-5)


def test_a_tie_counts_half_and_the_rate_is_for_b():
    r = rate_of(["b", "b", "b", "tie", "a"])
    assert r["rate"] == pytest.approx(0.7)
    assert (r["wins"], r["ties"], r["losses"]) == (3, 1, 1)
    r, turned = rate_of(["b", "b", "a"]), rate_of(["a", "a", "b"])
    mirrored = (1 - turned["rate"], 1 - turned["high"], 1 - turned["low"])
    assert (r["rate"], r["low"], r["high"]) == pytest.approx(mirrored)


def test_votes_on_one_prompt_are_averaged_first_and_then_the_prompts():
    files = [file_of({0: "b", 1: "a"}, "ann"), file_of({0: "b"}, "bob"), file_of({0: "a"}, "cid")]
    r = win_rate(files)
    assert r["rate"] == pytest.approx((2 / 3 + 0) / 2)          # a mean over votes would be 1/2
    assert (r["prompts"], r["voters"]) == (2, 3)
    assert (r["wins"], r["ties"], r["losses"]) == (1, 0, 1)
    alone = win_rate([file_of({0: "b", 1: "a"})])
    echoed = win_rate([file_of({0: "b", 1: "a"}, voter) for voter in ("ann", "bob", "cid")])
    assert (alone["low"], alone["high"]) == (echoed["low"], echoed["high"])     # not narrower


def test_the_printed_line_says_who_won_against_whom(tmp_path, capsys):
    winners = ["b"] * 55 + ["tie"] * 12 + ["a"] * 33
    files = [votes_of(tmp_path / voter, winners, voter) for voter in ("ann", "bob", "cid")]
    votes.main(["count", *map(str, files)])
    assert capsys.readouterr().out == (
        "checkpoint-150 against flux: 61.0 % of 100 prompts (95 % interval 51.2 % to 70.0 %), "
        "55 wins 12 ties 33 losses, 3 voters\n")


@pytest.mark.parametrize("name, changed, sentence", [
    ("not json", None, "is not a votes file"),
    ("no list", dict(votes=None), "is not a votes file"),
    ("no winner", dict(votes=[dict(index=0)]), "is not a votes file"),
    ("another winner", dict(votes=[dict(index=0, winner="left")]), "is not a votes file"),
    ("no vote", dict(votes=[]), "must have at least one vote"),
    ("two votes", dict(votes=[dict(index=0, winner="a")] * 2), "one vote per prompt"),
    ("another study", dict(study="t"), "is from study t, but .*first from s"),
    ("same voter", dict(voter="ann"), "and .*first have the same voter, 'ann'"),
])
def test_a_file_with_votes_that_cannot_be_counted_is_refused(tmp_path, name, changed, sentence):
    first, file = votes_of(tmp_path / "first", "ab"), tmp_path / name
    if changed is None:
        file.write_text("[", encoding="utf-8")
    else:
        votes_of(file, "ab", **{"voter": "bob", **changed})
    with pytest.raises(ValueError, match=f"{name} .*{sentence}|{name} {sentence}"):
        read_votes([first, file])


def test_votes_sent_as_text_count_even_if_a_mail_program_broke_the_lines(tmp_path):
    file = votes_of(tmp_path / "a.json", ["a", "b"], "Zoë")
    text = base64.encodebytes(file.read_bytes()).decode()       # in lines of 76 letters
    for name, sent in [("b.txt", text), ("c.txt", "\ufeff" + text.replace("\n", "\r\n  "))]:
        (tmp_path / name).write_text(sent, encoding="utf-8", newline="")
        assert read_votes([tmp_path / name]) == read_votes([file])
    (tmp_path / "d.txt").write_text(text[:50], encoding="utf-8")
    with pytest.raises(ValueError, match="d.txt is not a votes file"):
        read_votes([tmp_path / "d.txt"])


# ------------------------------------------------------------------------------------------------
# the page

@pytest.fixture
def red_and_blue(tmp_path):
    return (folder_of(tmp_path / "crimson-17", (255, 0, 0), NASTY),
            folder_of(tmp_path / "azure-99", (0, 0, 255), NASTY))


@pytest.mark.parametrize("noise, kind", [(False, "png"), (True, "jpeg")])
def test_the_page_has_every_picture_on_the_recorded_side_and_both_in_one_format(
        tmp_path, noise, kind):
    rng, folders = np.random.default_rng(0), []
    for name in ("a", "b"):
        folders.append(folder_of(tmp_path / name, 0, NASTY))
        for path in (folders[-1] / "pictures").iterdir():
            few = Image.fromarray(rng.integers(0, 255, (3, 3, 3), np.uint8))
            flat = Image.fromarray(np.full((96, 96, 3), rng.integers(0, 255, 3), np.uint8))
            (few.resize((96, 96), Image.Resampling.BICUBIC) if noise else flat).save(path)
    data = data_of(write_pairs(*folders, tmp_path))
    assert sorted(pair["index"] for pair in data["pairs"]) == list(range(8))
    for pair in data["pairs"]:
        assert pair["prompt"] == NASTY[pair["index"]]
        order = reversed(folders) if pair["flipped"] else folders
        for side, folder in zip(("left", "right"), order):
            assert pair[side].startswith(f"data:image/{kind};")
            source = Image.open(folder / f"pictures/{pair['index']:05d}-0.png")
            difference = abs(pixels_of(pair[side]) - np.asarray(source).astype(int)).max()
            assert difference <= (12 if kind == "jpeg" else 0)


def test_order_and_sides_depend_on_the_seed_and_half_of_the_pairs_are_flipped(tmp_path):
    folders = [folder_of(tmp_path / name, color, ["x"] * 40, size=4)
               for name, color in (("a", 0), ("b", 255))]
    pages = [data_of(write_pairs(*folders, tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    again = data_of(write_pairs(*folders, tmp_path / "again"))
    assert again == pages[0] and pages[0]["study"] != pages[1]["study"]
    for page in pages:
        assert sum(pair["flipped"] for pair in page["pairs"]) == 20
    for key in ("index", "flipped"):
        orders = [[pair[key] for pair in page["pairs"]] for page in pages]
        assert orders[0] != orders[1] and all(order != sorted(order) for order in orders)


def test_the_chosen_prompts_are_evenly_spaced_among_the_shared_ones(tmp_path):
    a = folder_of(tmp_path / "a", 0, ["x"] * 12, missing=[0, 1])
    b = folder_of(tmp_path / "b", 9, ["x"] * 14, missing=[5])
    page = data_of(write_pairs(a, b, tmp_path, count=3))
    shared = [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert sorted(pair["index"] for pair in page["pairs"]) == [shared[1], shared[4], shared[7]]
    assert (page["a"], page["b"]) == ("a", "b")


def test_the_page_loads_nothing_and_shows_no_label_outside_its_data(
        red_and_blue, tmp_path):
    text = write_pairs(*red_and_blue, tmp_path).read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    visible = text.replace(data, "")
    assert all(label in text and label not in visible for label in ("crimson-17", "azure-99"))
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", visible)
    assert "src=\"" not in visible and text.count("</script>") == 2 and "<!--" not in data


@pytest.mark.parametrize("change, sentence", [
    (dict(b="a"), "are the same folder"),
    (dict(count=0), "count is 0, but must be at least 1"),
    (dict(b="nowhere"), "nowhere has no pictures of eval.py; it must have prompts.json"),
    (dict(b="other"), "prompt 1 is 'y' in .*a, but 'z' in .*other"),
    (dict(b="empty"), "share no picture"),
])
def test_folders_that_cannot_be_compared_are_refused(tmp_path, change, sentence):
    for name, prompts, missing in [("a", ["x", "y"], []), ("b", ["x", "y"], []),
                                   ("other", ["x", "z"], []), ("empty", ["x", "y"], [0, 1])]:
        folder_of(tmp_path / name, 0, prompts, missing=missing)
    b, count = tmp_path / change.get("b", "b"), change.get("count", 100)
    with pytest.raises(ValueError, match=sentence):
        write_pairs(tmp_path / "a", b, tmp_path, count=count)


def test_the_commands_write_the_page_count_votes_and_refuse_in_one_sentence(
        red_and_blue, tmp_path, capsys):
    votes.main(["pairs", *map(str, red_and_blue), "--count", "3", "--seed", "7", "--out_dir",
                str(tmp_path / "out")])
    assert "wrote" in capsys.readouterr().out
    page = data_of(tmp_path / "out/pairs.html")
    assert len(page["pairs"]) == 3 and page["seed"] == 7
    for command, sentence in [(f"pairs {tmp_path} {tmp_path}", "has no pictures of eval.py"),
                              (f"count {tmp_path}/none.json", "is not a votes file"),
                              ("count", "required")]:
        with pytest.raises(SystemExit) as exit:
            votes.main(command.split())
        assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_votes_are_counted_on_a_terminal_without_utf_8(tmp_path):
    file = votes_of(tmp_path / "a.json", ["b"], b="Übung→3")
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-m", "paper.votes", "count", str(file)], cwd=HERE,
                          env=env, capture_output=True, text=True, encoding="ascii")
    assert done.returncode == 0 and done.stdout.startswith("?bung?3 against flux: 100.0 %")


# ------------------------------------------------------------------------------------------------
# in a real browser

COUNT = "document.getElementById('count').textContent"
COLOR = """(async () => {                                       // the left picture's, in its middle
    const img = document.getElementById('left');
    const canvas = document.createElement('canvas').getContext('2d');
    await img.decode();
    canvas.drawImage(img, 0, 0);
    const [red, , blue] = canvas.getImageData(32, 32, 1, 1).data;
    return red > blue ? 'a' : 'b' })()"""
SEEN = ("document.title + document.body.innerText + [...document.images].map(i => i.alt) "
        "+ location.pathname.split('/').pop() "
        "+ [...document.querySelectorAll('input, textarea')].map(i => i.value)")


def test_a_browser_shows_every_pair_once_and_a_vote_counts_for_the_model_that_was_shown(
        red_and_blue, tmp_path, browser):
    url = write_pairs(*red_and_blue, tmp_path).resolve().as_uri()
    browser.execute_cdp_cmd("Browser.setDownloadBehavior",
                            dict(behavior="allow", downloadPath=str(tmp_path)))
    browser.get(url)
    seen, order = "", [pair["index"] for pair in data_of(tmp_path / "pairs.html")["pairs"]]

    def look(n):                                # pair n is shown; the left picture is a's or b's
        nonlocal seen
        seen += js(browser, SEEN)
        assert js(browser, COUNT) == f"{n} / 8"
        assert js(browser, "document.getElementById('prompt').textContent") == NASTY[order[n - 1]]
        return js(browser, COLOR)

    lefts, other = [], {"a": "b", "b": "a"}
    for n, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown"], 1):
        lefts.append(look(n))
        press(browser, key)
    browser.execute_cdp_cmd("Input.dispatchKeyEvent",           # a held key is one vote
                            dict(type="rawKeyDown", key="ArrowLeft", autoRepeat=True))
    assert js(browser, COUNT) == "4 / 8"
    for _ in range(40):                         # The page is closed and opened again. Chromium 156
        browser.get(url)                       # sometimes gives it an empty localStorage if this
        if js(browser, COUNT) == "4 / 8":        # happens at once. This must not overwrite what the
            break                               # next one finds.
        time.sleep(0.3)
    assert js(browser, "[...document.querySelectorAll('[aria-pressed=true]')].length") == 0
    for n, key in enumerate([" ", "ArrowRight", "ArrowLeft", "ArrowRight", "ArrowRight"], 4):
        lefts.append(look(n))
        press(browser, key)
    assert js(browser, "getComputedStyle(document.getElementById('question')).display") == "none"
    press(browser, "Backspace")
    press(browser, "ArrowUp")
    assert look(7) == lefts[6]
    assert js(browser, "document.querySelector('[aria-pressed=true]').dataset.do") == "right"
    press(browser, "ArrowLeft")                 # the seventh vote is changed, and that was the last
    seen += js(browser, SEEN)

    click(browser, "#voter")
    press(browser, "Ann </b> Ö", "Backspace", "Ö")              # edits the name, does not go back
    click(browser, "#end button")
    end = time.monotonic() + 10
    while not list(tmp_path.glob("*.json")) and time.monotonic() < end:
        time.sleep(0.05)
    file = next(tmp_path.glob("*.json"))
    assert re.fullmatch(r"votes-[0-9a-f]{12}-Ann-b-Ö.json", file.name)
    [votes] = read_votes([file])
    assert (votes["voter"], votes["a"], votes["b"]) == ("Ann </b> Ö", "crimson-17", "azure-99")
    assert [vote["index"] for vote in votes["votes"]] == order
    assert [vote["prompt"] for vote in votes["votes"]] == [NASTY[i] for i in order]
    pressed = ["left", "right", "tie", "tie", "right", "left", "left", "right"]
    assert [vote["winner"] for vote in votes["votes"]] == [
        {"left": left, "right": other[left], "tie": "tie"}[side]
        for left, side in zip(lefts, pressed)]
    assert set(lefts) == {"a", "b"}                             # both sides occurred

    click(browser, "[data-do=text]")            # the same votes, if a browser saves no file
    seen += js(browser, SEEN)
    sent = tmp_path / "sent.txt"
    sent.write_text(js(browser, "document.getElementById('text').value"), encoding="utf-8")
    [again] = read_votes([sent])
    short = [dict(index=vote["index"], winner=vote["winner"]) for vote in votes["votes"]]
    assert again == {**votes, "votes": short}
    assert js(browser, "getSelection().toString()") == sent.read_text(encoding="utf-8")
    assert "Done" in seen and not re.search("crimson-17|azure-99", seen)
    browser.get(write_pairs(*red_and_blue, tmp_path, seed=1).resolve().as_uri())
    assert js(browser, COUNT) == "1 / 8"                        # another study begins at 1


def test_the_page_works_with_a_mouse_and_in_a_browser_that_stores_nothing(
        red_and_blue, tmp_path, browser):
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", dict(
        source="Object.defineProperty(window, 'localStorage', "
               "{get() {throw new DOMException('', 'SecurityError')}})"))
    browser.get(write_pairs(*red_and_blue, tmp_path).resolve().as_uri())
    given = "document.querySelector('[aria-pressed=true]').dataset.do"
    assert "does not remember your votes" in js(browser, "document.body.innerText")
    from selenium.webdriver import ActionChains
    right = browser.find_element("css selector", "[data-do=right]")
    ActionChains(browser).double_click(right).perform()         # one vote
    assert js(browser, COUNT) == "2 / 8"
    press(browser, " ")                         # a tie, not the button that was clicked last
    assert js(browser, COUNT) == "3 / 8"
    click(browser, "[data-do=text]")
    assert js(browser, "document.getElementById('shown').hidden") is False
    press(browser, "ArrowLeft")                 # moves in the text and is not a vote
    assert js(browser, COUNT) == "3 / 8"
    click(browser, "[data-do=back]")
    assert js(browser, "document.getElementById('shown').hidden") is True
    assert js(browser, given) == "tie"
    click(browser, "[data-do=back]")
    assert js(browser, given) == "right" and js(browser, COUNT) == "1 / 8"
    browser.execute_script("document.querySelector('[data-do=left]').focus()")
    press(browser, " ", "ArrowUp", "ArrowUp")                   # the space bar presses this button
    assert js(browser, given) == "left"
    browser.execute_script("window.confirm = () => true")
    click(browser, "[data-do=restart]")
    assert js(browser, COUNT) == "1 / 8"
    assert js(browser, "document.querySelectorAll('[aria-pressed=true]').length") == 0
