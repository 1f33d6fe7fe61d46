"""`mft perplexity` against the definition written out in PyTorch, and against recorded figures."""
import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import (DATA, GOLDEN, golden_models, load, max_positions, mft, missing, random_tokens, shared,
                    trained_models, write_tokens)


def perplexity(model, ids, seq_len, stride):
    """Windows start every `stride` tokens until one reaches the end; each scores the tokens that no earlier
    window held, never its own first. Returns how many, and the mean loss."""
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
    total, count, seen = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        window = ids[start:start + seq_len]
        with torch.no_grad():
            loss = F.cross_entropy(model(input_ids=window[None]).logits[0, :-1].double(), window[1:], reduction="none")
        first = max(seen - start, 1)                    # position in the window of the first token to score
        total += loss[first - 1:].sum().item()
        count += len(window) - first
        seen = start + len(window)
        if seen == len(ids):
            break
    return count, total / count


@pytest.mark.parametrize("seq_len,stride,n", [(16, None, 96), (16, None, 101), (16, 5, 83), (16, 16, 7), (11, 1, 30),
                                              (16, None, 17)])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3", "mistral"])
def test_definition(name, seq_len, stride, n, tmp_path):
    directory = os.path.join(GOLDEN, name)
    ids = random_tokens(directory, (n,), seed=n)
    args = ["perplexity", "--model", directory, "--data", write_tokens(tmp_path / "t.bin", ids), "--format", "tokens",
            "--seq-len", seq_len, "--json"] + (["--stride", stride] if stride else [])
    got = mft(*args).json()
    tokens, loss = perplexity(load(directory), ids, seq_len, stride or seq_len)
    assert got["tokens"] == tokens
    assert abs(got["loss"] - loss) < 5e-6 * loss          # the tolerance of a loss in floors.json
    assert abs(got["perplexity"] - math.exp(loss)) < 2e-5 * math.exp(loss)
    assert got["tokens_per_second"] > 0 and got["peak_rss_bytes"] > 1 << 16


def recorded():
    out = []
    for param in trained_models():
        directory = param.values[0]
        if directory is None:
            out.append(pytest.param(None, None, id=param.id, marks=param.marks))
            continue
        with open(os.path.join(directory, "eval.json"), encoding="utf-8") as f:
            for row in json.load(f)["results"]:
                out.append(pytest.param(directory, row, id="%s-%s-%d-%d" % (param.id, row["dataset"], row["seq_len"],
                                                                            row["stride"])))
    return out


@pytest.mark.parametrize("directory,row", recorded())
def test_recorded(directory, row, tmp_path):
    """eval.json of the trained models: the text, encoded by our tokenizer, to 1e-4."""
    with open(shared("assets", "text", row["file"]), encoding="utf-8", newline="") as f:
        text = f.read()[:row["chars"]]
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    got = mft("perplexity", "--model", directory, "--data", path, "--seq-len", row["seq_len"], "--stride", row["stride"],
              "--json").json()
    assert got["tokens"] == row["tokens"]
    assert abs(got["perplexity"] - row["ppl"]) < 1e-4 * row["ppl"]


def test_text_of_the_guide(tmp_path):
    """WikiText-2's test split as Transformers' guide joins it: the guide's tokenizer warns of 287644 tokens. The command
    is the one in examples/recipes/continue-on-text.md."""
    raw = shared("assets/text/wikitext-2-raw/wiki.test.raw")
    tokenizer = shared("assets/tokenizers/gpt2")
    if not (os.path.exists(raw) and os.path.isdir(tokenizer)):
        pytest.skip("WikiText-2 and GPT-2's tokenizer: not in %s" % os.path.basename(DATA))
    with open(os.path.join(os.path.dirname(__file__), "../../examples/recipes/continue-on-text.md"), encoding="utf-8") as f:
        awk = next(line.strip() for line in f if line.strip().startswith("awk "))
    joined = tmp_path / "wiki.test.txt"
    os.symlink(raw, tmp_path / "wiki.test.raw")
    assert subprocess.run(["sh", "-c", awk], cwd=tmp_path).returncode == 0
    ids = json.loads(mft("tokenize", "--model", tokenizer, "--file", joined, "--json").out)
    assert len(ids["ids"] if isinstance(ids, dict) else ids) == 287644
