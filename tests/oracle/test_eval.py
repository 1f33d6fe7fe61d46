"""`mft mmlu`, `mft eval` and --compare against the same recipes in Transformers, question by question."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from common import load, make_adapter, max_positions, mft, missing, perplexity_parts, read_log, shared

ALPACA = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
          "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
          "\n\n### Response:")


def trained(*names):
    paths = [shared("assets", "models", n) for n in names]
    return [pytest.param(p, id=n) if os.path.exists(p) else missing(n) for p, n in zip(paths, names)]


def log_likelihoods(model, prompt, continuations):
    """ln P(continuation | prompt) of each; continuations of one token share a forward pass."""
    def forward(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1:].double().log_softmax(-1)
    first = forward(prompt)
    return [(forward(prompt + c[:-1]) if len(c) > 1 else first)[torch.arange(len(c)), torch.tensor(c)].sum().item()
            for c in continuations]


def ask(model, tok, most, prompts, answers, special=True):
    """The first of the prompts that fits with all answers, else the end of the last one; the answers' likelihoods."""
    encode = lambda text: tok(text, add_special_tokens=special)["input_ids"]
    for prompt in prompts:
        alone, whole = encode(prompt), [encode(prompt + a) for a in answers]
        n = min(len(os.path.commonprefix([alone, w[:-1]])) for w in whole)
        if max(map(len, whole)) - 1 <= most:
            break
    cut = max(0, max(map(len, whole)) - 1 - most)
    return log_likelihoods(model, whole[0][cut:n], [w[n:] for w in whole]), [len(w) - n for w in whole], cut


def rows(split, subject):
    with open(shared("assets", "text", "mmlu", split, "%s_%s.csv" % (subject, split)), encoding="utf-8", newline="") as f:
        return list(csv.reader(f))


def example(row):
    return row[0] + "".join("\n%s. %s" % x for x in zip("ABCD", row[1:5])) + "\nAnswer:"


def mmlu(model, tok, most, subject, shots):
    """Hendrycks et al.'s recipe: the letters' likelihoods for each question."""
    head = "The following are multiple choice questions (with answers) about %s.\n\n" % subject.replace("_", " ")
    dev = [example(r) + " " + r[5] + "\n\n" for r in rows("dev", subject)[:shots]]
    for row in rows("test", subject):
        prompts = [head + "".join(dev[:k]) + example(row) for k in range(shots, -1, -1)]
        scores, _, _ = ask(model, tok, most, prompts, [" A", " B", " C", " D"])
        yield scores, "ABCD".index(row[5])


@pytest.mark.parametrize("directory,subject,shots", [
    pytest.param(*p.values, subject, shots, id="%s-%s-%d" % (p.id, subject, shots), marks=p.marks)
    for name, subject, shots in [("stories260k-qwen2", "global_facts", 5), ("gpt2-shakespeare", "anatomy", 2),
                                 ("gemma3-shakespeare", "abstract_algebra", 0), ("gpt2-shakespeare", "global_facts", 0)]
    for p in trained(name)])
def test_mmlu(directory, subject, shots, tmp_path):
    data = shared("assets", "text", "mmlu")
    details = tmp_path / "details.jsonl"
    got = mft("mmlu", "--model", directory, "--data", data, "--subject", subject, "--fewshot", shots, "--output", details,
              "--json").json()
    want = list(mmlu(load(directory), PreTrainedTokenizerFast.from_pretrained(directory), max_positions(directory), subject, shots))
    lines = read_log(details)
    assert len(lines) == len(want) == got["questions"]
    for line, (scores, answer) in zip(lines, want):
        assert line["answer"] == answer
        assert line["choices"] == pytest.approx(scores, rel=2e-5)
        assert line["choice"] == int(np.argmax(scores)), (line, scores)
    accuracy = np.mean([np.argmax(s) == a for s, a in want])
    assert got["accuracy"] == pytest.approx(accuracy, abs=1e-9) == got["subjects"][0]["accuracy"]


@pytest.mark.parametrize("directory", trained("stories260k-qwen2"))
def test_mmlu_average(directory):
    got = mft("mmlu", "--model", directory, "--data", shared("assets", "text", "mmlu"), "--split", "dev", "--json").json()
    n = [s["questions"] for s in got["subjects"]]
    right = [s["accuracy"] * s["questions"] for s in got["subjects"]]
    assert len(n) == 10 and got["questions"] == sum(n) == 50
    assert got["accuracy"] == pytest.approx(sum(right) / sum(n)) and got["subject_mean"] == pytest.approx(np.mean(np.divide(right, n)))


def pubmedqa():
    with open(shared("assets", "text", "pubmedqa", "valid.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.mark.parametrize("directory", trained("gpt2-shakespeare", "gemma3-shakespeare"))
def test_choices(directory, tmp_path):
    """PubMedQA's yes, no, maybe: as instructions, and through the chat template of the model that has one."""
    details, choices = tmp_path / "details.jsonl", ["yes", "no", "maybe"]
    got = mft("eval", "--model", directory, "--data", shared("assets", "text", "pubmedqa", "valid.jsonl"), "--choices",
              ",".join(choices), "--output", details, "--json").json()
    tok, model, right, total = PreTrainedTokenizerFast.from_pretrained(directory), load(directory), 0, 0
    lines = read_log(details)
    for row, line in zip(pubmedqa(), lines):
        if tok.chat_template:
            prompt = tok.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            reference = tok.apply_chat_template(row["messages"], tokenize=False)[len(prompt):].rstrip("\n")
        else:
            prompt, reference = ALPACA.format(**row), row["output"]
        scores, lengths, cut = ask(model, tok, max_positions(directory), [prompt], choices + [reference], not tok.chat_template)
        assert line["cut"] == cut and line["tokens"] == lengths[3]
        assert line["choices"] == pytest.approx(scores[:3], rel=2e-5)
        assert line["log_likelihood"] == pytest.approx(scores[3], rel=2e-5)
        assert line["choice"] == int(np.argmax(scores[:3]))
        right += choices[line["choice"]] == row["answer"]
        total += scores[3]
    assert len(lines) == 50 == got["questions"] and got["accuracy"] == right / 50
    assert got["log_likelihood_per_question"] == pytest.approx(total / 50, rel=2e-5)


@pytest.mark.parametrize("directory", trained("gpt2-shakespeare"))
def test_exact_match(directory, tmp_path):
    """Half of the expected answers are what Transformers generates greedily up to the line's end."""
    model, tok, lines, want = load(directory), PreTrainedTokenizerFast.from_pretrained(directory), [], []
    for i, prompt in enumerate(["ROMEO:\n", "The king", "What is", "My lord", "Enter", "O, he", "Thou art", "And now"]):
        ids = tok(prompt, return_tensors="pt")["input_ids"]
        text = tok.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:], skip_special_tokens=True)
        text = text.strip().split("\n")[0].strip()
        want.append(i % 2 == 0)
        lines.append(dict(prompt=prompt, completion=" " + (text if want[-1] else text + "x")))
    data, details = tmp_path / "data.jsonl", tmp_path / "details.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    got = mft("eval", "--model", directory, "--data", data, "--max-tokens", 12, "--output", details, "--json").json()
    assert [x["exact"] for x in read_log(details)] == want and got["exact_match"] == 0.5


def interval(base, other, weights):
    """The ratio of paired sums and its linearized standard error."""
    d, w = np.subtract(other, base), np.asarray(weights, float)
    r, n = d.sum() / w.sum(), len(d)
    half = 1.959963984540054 * np.sqrt(n / (n - 1) * ((d - r * w) ** 2).sum()) / w.sum()
    return r, r - half, r + half


def check_interval(got, base, other, weights, tolerance):
    assert [got["difference"], got["low"], got["high"]] == pytest.approx(interval(base, other, weights), abs=tolerance)
    assert got["n"] == len(base)


@pytest.mark.parametrize("directory", trained("stories260k-qwen2"))
def test_compare(directory, tmp_path):
    adapter, details = make_adapter(directory, tmp_path / "adapter"), tmp_path / "details.jsonl"
    args = ["mmlu", "--model", directory, "--data", shared("assets", "text", "mmlu"), "--subject", "global_facts", "--json"]
    base = mft(*args).json()
    got = mft(*args, "--adapter", adapter, "--compare", "--output", details).json()
    lines = read_log(details)
    marks = {m: [x["choice"] == x["answer"] for x in lines if x["model"] == m] for m in ("base", "asked")}
    assert got["compare"]["accuracy"]["base"] == base["accuracy"] == np.mean(marks["base"])
    assert got["accuracy"] == np.mean(marks["asked"]) == got["compare"]["accuracy"]["adapter"]
    check_interval(got["compare"]["accuracy"], np.float64(marks["base"]), np.float64(marks["asked"]), np.ones(100), 1e-9)
    model, tok = load(directory, adapter), PreTrainedTokenizerFast.from_pretrained(directory)
    want = [int(np.argmax(s)) for s, _ in mmlu(model, tok, max_positions(directory), "global_facts", 0)]
    assert [x["choice"] for x in lines if x["model"] == "asked"] == want

    text = shared("assets", "text", "tiny_stories", "stories.txt")
    args = ["perplexity", "--model", directory, "--data", text, "--seq-len", 64, "--json"]
    got = mft(*args, "--adapter", adapter, "--compare").json()
    assert got["base_perplexity"] == pytest.approx(mft(*args).json()["perplexity"], rel=1e-12)
    assert got["perplexity"] == mft(*args, "--adapter", adapter).json()["perplexity"]
    ids = tok(open(text, encoding="utf-8").read())["input_ids"]
    parts = [perplexity_parts(m, ids, 64, 1024) for m in (load(directory), model)]
    check_interval(got["compare"]["loss"], [p[0] for p in parts[0]], [p[0] for p in parts[1]], [p[1] for p in parts[0]], 2e-5)


@pytest.mark.parametrize("line,word", [
    ('{"prompt": "a", "completion": " b", "choices": ["c", "d"]}', "none of the 2 choices"),
    ('{"prompt": "a", "completion": " b", "choices": "c"}', "not an array"),
    ('{"text": "a"}', "no answers to ask for"),
    ('{"prompt": "a", "completion": "  "}', "answer is empty"),
    ('{"prompt": "a"', "line 1"),
    ('', "no question"),
])
@pytest.mark.parametrize("directory", trained("gpt2-shakespeare"))
def test_bad_lines(directory, line, word, tmp_path):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    assert word in mft("eval", "--model", directory, "--data", tmp_path / "bad.jsonl", code=1).err
