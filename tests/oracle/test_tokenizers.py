"""`mft tokenize` against the `tokenizers` package: recorded lines, and random strings (--fuzz N)."""
import json
import os
import random
import subprocess

import pytest
from tokenizers import Tokenizer

from common import GOLDEN, MFT, mft, missing, shared, write_tokens


def tokenizers():
    """(directory of the tokenizer, file of golden lines), committed and shared."""
    out = []
    for root, label in ((os.path.join(GOLDEN, "assets"), "golden"), (shared("assets"), "shared")):
        lines = os.path.join(root, "golden", "tokenizer")
        if not os.path.isdir(lines):
            out.append(pytest.param(None, None, id=label + " tokenizers", marks=missing(label + " tokenizers").marks))
            continue
        for file in sorted(os.listdir(lines)):
            name = file[:-len(".jsonl")]
            places = [os.path.join(root, "tokenizers", name), os.path.join(root, "models", name),
                      os.path.join(root, "models", name + "-qwen2")]
            directory = next(p for p in places if os.path.isdir(p))
            out.append(pytest.param(directory, os.path.join(lines, file), id="%s/%s" % (label, name)))
    return out


def read_lines(path):
    with open(path, encoding="utf-8", newline="\n") as f:           # U+2028 and U+0085 are no line ends here
        return [json.loads(line) for line in f.read().split("\n") if line]


def encode_all(directory, texts, tmp_path, special):
    """One run of mft for all the texts."""
    path = tmp_path / "texts.jsonl"
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for i, text in enumerate(texts):                             # both ways to write JSON text
            f.write(json.dumps({"text": text}, ensure_ascii=bool(i % 2)) + "\n")
    out = mft("tokenize", "--model", directory, "--jsonl", path, *([] if special else ["--no-special"]), timeout=1200).out
    ids = [json.loads(line) for line in out.split("\n") if line]
    assert len(ids) == len(texts)
    return ids


def first_difference(texts, got, want):
    for text, a, b in zip(texts, got, want):
        if a != b:
            return "text %r\n  ours   %s\n  theirs %s" % (text[:300], a[:60], b[:60])
    return None


@pytest.mark.parametrize("directory,lines", tokenizers())
def test_recorded_lines(directory, lines, tmp_path):
    rows = read_lines(lines)
    texts = [r["text"] for r in rows]
    for special, key in ((True, "ids"), (False, "ids_no_special")):
        assert not first_difference(texts, encode_all(directory, texts, tmp_path, special), [r[key] for r in rows])


@pytest.mark.parametrize("directory,lines", tokenizers())
def test_one_text_and_back(directory, lines, tmp_path):
    """--text, --file and --decode on a sample of the lines (a process each)."""
    rows = [r for r in read_lines(lines) if 0 < len(r["ids_no_special"]) < 200 and "\0" not in r["text"]]
    for row in random.Random(1).sample(rows, 6):
        (tmp_path / "text.txt").write_bytes(row["text"].encode("utf-8"))
        for how in (["--text", row["text"]], ["--file", tmp_path / "text.txt"]):
            said = mft("tokenize", "--model", directory, "--no-special", *how).out
            assert [int(t) for t in said.replace(",", " ").replace("[", " ").replace("]", " ").split()] == row["ids_no_special"]
        said = mft("tokenize", "--model", directory, "--decode", " ".join(map(str, row["ids_no_special"]))).out
        assert said in (row["decoded"], row["decoded"] + "\n"), row


# ---------------------------------------------------------------------------- random strings

RANGES = [(0x20, 0x7e)] * 6 + [(0xa0, 0x24f), (0x300, 0x36f), (0x370, 0x5ff), (0x600, 0x6ff), (0x900, 0xdff), (0xe00, 0xfff),
                               (0x1100, 0x11ff), (0x1e00, 0x20cf), (0x2100, 0x2bff), (0x3000, 0x30ff), (0x4e00, 0x9fff),
                               (0xac00, 0xd7a3), (0xf900, 0xfaff), (0xfb00, 0xffef), (0x1d400, 0x1d7ff), (0x1f300, 0x1faff),
                               (0x0, 0x1f), (0x7f, 0xa0), (0x10000, 0x10ffff)]
WORDS = ["the", "don't", "I'll", "WE'RE", "'s", "it’s", "x=1;", "1234567", "3.14", "def f(x):", "\r\n", "\n\n", "    ", "\t", " \n ",
         "naïve", "e\u0301", "한국어", "हिन्दी", "ไทย", "日本語", "👩‍👩‍👧", "🇩🇪", "ﬁ", "\u212b", "\u2581", "\u00a0", "\u3000", "\u200d", "<", ">",
         "<|", "|>", "</", "[", "]", "<0x41>", "http://a.b/c?d=e&f", "--", "...", "((", "#", "@user", "ſ", "İ", "ǅ", "Ⅷ", "²", "½", "٣"]


def random_text(rng, added):
    """Words, runs, characters from all over Unicode, and the tokenizer's own added tokens, whole and cut."""
    parts = []
    for _ in range(rng.choice((1, 2, 3, 5, 8, 13, 30))):
        kind = rng.random()
        if kind < 0.35:
            parts.append(rng.choice(WORDS))
        elif kind < 0.45 and added:
            token = rng.choice(added)
            parts.append(token if rng.random() < 0.7 else token[:rng.randint(1, len(token))])
        elif kind < 0.6:
            parts.append(rng.choice(" \n\ta1'.<▁e\u0301") * rng.randint(1, 40))
        else:
            low, high = rng.choice(RANGES)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))))
        if rng.random() < 0.4:
            parts.append(" ")
    return "".join(c for c in "".join(parts) if not 0xd800 <= ord(c) <= 0xdfff)


@pytest.mark.parametrize("directory,lines", tokenizers())
def test_random_strings(directory, lines, tmp_path, request):
    n, seed = request.config.getoption("--fuzz"), request.config.getoption("--fuzz-seed")
    tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    added = [t.content for t in tok.get_added_tokens_decoder().values()]
    rng = random.Random("%d/%s" % (seed, os.path.basename(directory)))
    done = 0
    while done < n:                                                   # in parts: a difference is found early
        texts = [random_text(rng, added) for _ in range(min(5000, n - done))]
        want = [e.ids for e in tok.encode_batch(texts)]
        assert not first_difference(texts, encode_all(directory, texts, tmp_path, True), want)
        done += len(texts)


@pytest.mark.parametrize("directory,lines", tokenizers())
def test_long_runs_are_linear(directory, lines, tmp_path):
    """1 MB of one character, and a text that is one word to Gemma: seconds, not minutes."""
    tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    for text in ("a" * 1000000, " " * 300000 + "x", "ab " * 100000):
        (tmp_path / "text.txt").write_text(text)
        said = mft("tokenize", "--model", directory, "--no-special", "--file", tmp_path / "text.txt", timeout=20).out
        got = [int(t) for t in said.replace(",", " ").replace("[", " ").replace("]", " ").split()]
        if len(text) <= 300001:                                       # the package itself is slow on the first
            assert got == tok.encode(text, add_special_tokens=False).ids
        assert tok.decode(got, skip_special_tokens=False).strip() == text.strip()
