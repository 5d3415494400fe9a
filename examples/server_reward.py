"""
UnifiedReward: a reward that is not computed here. A vision-language model on a server is asked.

    vllm serve CodeGoat24/UnifiedReward-qwen-7b --served-model-name UnifiedReward
    python train.py --eval_scorers unifiedreward                # the server at 127.0.0.1:8000
    python train.py --eval_scorers unifiedreward=https://host:port/v1

The server can be any that speaks OpenAI's chat protocol. If it needs a key, set the environment
variable UNIFIEDREWARD_API_KEY; no other key is ever sent. Proxies are taken from the environment
(http_proxy, https_proxy, no_proxy), but a server on this machine is always asked directly.
"""
import base64, contextlib, http.client, json, os, re, time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener, getproxies, proxy_bypass
import torch
from rewards import Scorer, jpeg, one_line

KEY = "UNIFIEDREWARD_API_KEY"
THIS_MACHINE = ("127.0.0.1", "localhost", "::1", "0.0.0.0")
# A mark such as 4, 3.5 or 4/5, but not 45, 4-5 or 4/10
NUMBER = (r"([0-5](?:\.\d+)?)(?:[ \t]*(?:/|out of)[ \t]*5(?:\.0+)?)?"
          r"(?![\w.,-]*\d|[ \t]*(?:%|(?:/|out of|-|–|to|or)[ \t]*\d))")


class UnifiedReward(Scorer):
    """UnifiedReward (Wang et al., arXiv 2503.05236), out of domain in the paper: a vision-language
    model that is asked for a mark from 1 to 5.

    Weights     CodeGoat24/UnifiedReward-qwen-7b (MIT, on Qwen2.5-VL-7B), on the server.
    Image       JPEG, quality 95.
    Text        the model's published question, word for word, at temperature 0.
    Score       `unifiedreward`: the "Alignment Score" of the question that also asks for coherence
                and style; about 3.2 for FLUX.1-dev. `unifiedreward_final`: the "Final Score" of the
                question that asks for a single mark. The paper does not say which of the two Table
                1 shows; MixGRPO uses the first.
    Source      github.com/CodeGoat24/UnifiedReward, inference_qwen/image_generation/
                qwen_point_score_ACS_image_generation.py and qwen_point_score_image_generation.py
    """
    question = """\
You are presented with a generated image and its associated text caption. Your task is to analyze \
the image across multiple dimensions in relation to the caption. Specifically:

1. Evaluate each word in the caption based on how well it is visually represented in the image. \
Assign a numerical score to each word using the format:
   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], \
["[No_mistakes]", scoreM]]
   - A higher score indicates that the word is less well represented in the image.
   - The special token [No_mistakes] represents whether all elements in the caption were correctly \
depicted. A high score suggests no mistakes; a low score suggests missing or incorrect elements.

2. Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object \
distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

---

Word-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
    answer = "Alignment Score (1-5):"
    home = "http://127.0.0.1:8000/v1"
    timeout = 120                       # seconds to wait for a reply
    pauses = 2, 10                      # seconds before the second and the third try

    @classmethod
    def check(cls, address):
        try:
            url = urlsplit(address or cls.home)
            is_address = (url.scheme in ("http", "https") and url.hostname and url.port != 0
                          and not re.search(r"\s", address))
        except ValueError:              # a port that is not a number, as in "http://host:port"
            is_address = False
        if not is_address:
            raise ValueError(f"{address} is not an address of a server; it must be like {cls.home}")
        if os.environ.get(KEY) and url.scheme == "http" and url.hostname not in THIS_MACHINE:
            raise ValueError(f"{KEY} would be sent unencrypted; use https, or a tunnel to "
                             "127.0.0.1, or unset the key")

    def __init__(self, address="", device="cpu"):
        super().__init__()                                      # the pictures are sent from the CPU
        self.url = (address or self.home).rstrip("/") + "/chat/completions"
        url = urlsplit(self.url)
        direct = url.hostname in THIS_MACHINE or proxy_bypass(url.netloc)
        proxy = "" if direct else getproxies().get(url.scheme, "")
        self.opener = build_opener(ProxyHandler({url.scheme: proxy} if proxy else {}))
        host = proxy.rpartition("@")[2]                         # without a user name and password
        self.through = f" through the proxy {host} ({url.scheme}_proxy)" if proxy else ""

    def score(self, pixels, prompts):
        pictures = [jpeg(array) for array in pixels.permute(0, 2, 3, 1).numpy()]
        with ThreadPoolExecutor(16) as pool:                    # the server forms its own batches
            return torch.tensor(list(pool.map(self.ask, pictures, prompts)))            # (G,)

    def ask(self, picture, prompt):
        """The mark for one picture. A server that is slow, busy or down is asked three times."""
        image = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        content = [{"type": "image_url", "image_url": {"url": image}},
                   {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        body = dict(model="UnifiedReward", messages=[dict(role="user", content=content)],
                    temperature=0, max_tokens=4096)
        request = Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        key = os.environ.get(KEY, "").strip()
        if key:                                                 # a redirected request is without it
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for pause in (*self.pauses, None):
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    return self.mark(reply.read().decode(errors="replace"))
            except (OSError, http.client.HTTPException) as error:
                # No connection, no complete reply in time, or an HTTP error. 429: too many requests
                code = getattr(error, "code", 500)
                refused = code < 500 and code != 429
                if refused or pause is None:
                    tries = len(self.pauses) + 1
                    failure = "refused" if refused else f"did not answer in {tries} tries"
                    raise ConnectionError(f"{self.url} {failure}{self.through}: {error}"
                                          f"{explanation(error)}") from error
                time.sleep(pause)

    def mark(self, reply):
        """The mark in a reply. First the published form is looked for. If it is missing, other
        clear forms count too, such as "**Alignment Score:** 4/5"."""
        marks = []
        with contextlib.suppress(ValueError, LookupError, TypeError):
            text = json.loads(reply)["choices"][0]["message"]["content"]
            marks = re.findall(re.escape(self.answer) + r"\s*" + NUMBER, text)[:1]
            if not marks:
                plain = re.sub(r"\((?:1 ?(?:-|–|to) ?|out of )5\)|[*_`\"\\{}\[\]()#]", "", text)
                words = self.answer.partition(" (")[0].rstrip(":").replace(" ", r"\s+")
                marks = re.findall(rf"(?i)\b{words}\s*(?:[:=|]|is\b)\s*{NUMBER}", plain)
        marks = {float(mark) for mark in marks}
        if len(marks) != 1 or max(marks) > 5:
            raise ValueError(f"the reply has no mark of the form {self.answer + ' 4'!r}: "
                             f"{reply[:500]!r}")
        return marks.pop()


class UnifiedRewardFinal(UnifiedReward):
    __doc__ = UnifiedReward.__doc__
    question = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate \
this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the \
caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail \
preservation, color accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated \
image using the format: 'element (type): value' (where value=0 means not generated, and value=1 \
means generated), and assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
    answer = "Final Score:"


def explanation(error):
    """The server's own explanation of an HTTP error, on one line: plain text, HTML, or a message in
    JSON. "" if there is none."""
    body = ""
    with contextlib.suppress(OSError, http.client.HTTPException, AttributeError):
        body = error.read(10_000).decode(errors="replace")
    with contextlib.suppress(ValueError):
        body = json.loads(body)
    for key in ("error", "message", "detail"):
        body = body.get(key, body) if isinstance(body, dict) else body
    message = re.sub(r"<[^>]*>", " ", str(body or ""))          # without HTML tags
    return f": {one_line(message)}" if message.strip() else ""
