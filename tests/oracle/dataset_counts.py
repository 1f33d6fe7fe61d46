#!/usr/bin/env python3
"""Counts what tests/test_dataset.c must find in real data, with Transformers' tokenizers and templates.

    python tests/oracle/dataset_counts.py ../shared/assets > tests/golden/dataset_counts.json

One object a case: the tokenizer, the file or directory, max_seq_len, and what mft_dataset_report must say.
  text        the whole file is one text, cut every max_seq_len tokens; a last piece of one token is left out
  alpaca      Stanford Alpaca's prompt, the output and the end-of-sequence token, cut at max_seq_len
  messages    the chat template; the assistant's content and end-of-turn token are trained on
  mmlu        "The following are ...", the question, " B" and the end-of-sequence token
A token is trained on when its characters overlap what is to be said (offsets from the fast tokenizer), and
never when it is its sample's first.
"""
import csv, glob, json, os, re, sys
from transformers import AutoTokenizer

ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
          "Write a response that appropriately completes the request.\n\n### Instruction:\n{0}\n\n### Input:\n{1}\n\n### Response:",
    False: "Below is an instruction that describes a task. "
           "Write a response that appropriately completes the request.\n\n### Instruction:\n{0}\n\n### Response:",
}


def overlap(tok, text, spans, add_special):
    e = tok(text, add_special_tokens=add_special, return_offsets_mapping=True)
    labels = []
    for (b, x) in e["offset_mapping"]:
        labels.append(any(b < hi and x > lo for lo, hi in spans))
    return e["input_ids"], labels


def completion(tok, prompt, answer):
    ids, labels = overlap(tok, prompt + answer, [(len(prompt), len(prompt + answer))], True)
    if tok.eos_token_id is not None and ids[-1] != tok.eos_token_id:
        ids, labels = ids + [tok.eos_token_id], labels + [True]
    return ids, labels


def text_samples(tok, path, max_len):
    ids = tok(open(path, encoding="utf-8").read())["input_ids"]
    pieces = [ids[i:i + max_len] for i in range(0, len(ids), max_len)]
    return [(p, [True] * len(p)) for p in pieces if len(p) > 1]


def jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8", newline="\n") if line.strip()]


def alpaca_samples(tok, path):
    for o in jsonl(path):
        for x in o.get("instances", [o]):
            prompt = ALPACA[bool(x.get("input"))].format(o["instruction"], x.get("input", ""))
            yield completion(tok, prompt, x["output"])


def chat_samples(tok, path):
    begin, end = ("<|im_start|>assistant\n", "<|im_end|>") if "<|im_end|>" in tok.get_vocab() else ("<start_of_turn>model\n", "<end_of_turn>")
    turn = re.compile(re.escape(begin) + "(.*?" + re.escape(end) + ")", re.S)
    for o in jsonl(path):
        text = tok.apply_chat_template(o["messages"], tokenize=False)
        yield overlap(tok, text, [m.span(1) for m in turn.finditer(text)], False)


def mmlu_samples(tok, folder):
    for path in sorted(glob.glob(os.path.join(folder, "*.csv"))):
        subject = re.sub(r"_(dev|val|test)$", "", os.path.basename(path)[:-4]).replace("_", " ")
        for q, a, b, c, d, answer in csv.reader(open(path, encoding="utf-8", newline="")):
            prompt = (f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                      f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")
            yield completion(tok, prompt, " " + answer)


def count(tokenizer, path, split, fmt, max_len, samples):
    n = dict(tokenizer=tokenizer, path=path, split=split, max_seq_len=max_len, format=fmt,
             n_samples=0, n_tokens=0, n_supervised=0, longest=0, n_truncated=0, n_unsupervised=0)
    for ids, labels in samples:
        n["n_samples"] += 1
        n["longest"] = max(n["longest"], len(ids))
        n["n_truncated"] += len(ids) > max_len
        valid = sum(labels[1:max_len])
        n["n_tokens"] += min(len(ids), max_len)
        n["n_supervised"] += valid
        n["n_unsupervised"] += valid == 0
    return n


def reference_tokenizer(root, name):
    tok = AutoTokenizer.from_pretrained(os.path.join(root, "tokenizers", name))
    if name == "gpt2":
        tok.eos_token = "<|endoftext|>"      # what the class of a GPT-2 snapshot says; its tokenizer_config.json does not
    tok.model_max_length = 1 << 40
    return tok


def all_cases(root):
    cases = []
    for name in ["gpt2", "qwen2.5", "gemma3"]:
        tok = reference_tokenizer(root, name)
        chat = tok.chat_template is not None
        for path in ["text/tiny_stories/stories.txt", "text/tinyshakespeare/train.txt", "text/wikitext-2-raw/wiki.valid.raw",
                     "text/wikitext-2/wiki.test.tokens", "text/pubmedqa/contexts_valid.txt"]:
            cases.append(count(name, path, "train", "text", 256, text_samples(tok, os.path.join(root, path), 256)))
        for max_len in [256, 2048]:
            for split in ["train", "valid", "test"]:
                path = os.path.join(root, "text/pubmedqa", split + ".jsonl")
                cases.append(count(name, "text/pubmedqa", split, "jsonl (messages)" if chat else "jsonl (instruction, output)", max_len,
                                   chat_samples(tok, path) if chat else alpaca_samples(tok, path)))
            cases.append(count(name, "text/seed_tasks.jsonl", "train", "jsonl (instruction, output)", max_len,
                               alpaca_samples(tok, os.path.join(root, "text/seed_tasks.jsonl"))))
        if chat:
            cases.append(count(name, "text/pubmedqa/chat_short_train.jsonl", "train", "jsonl (messages)", 128,
                               chat_samples(tok, os.path.join(root, "text/pubmedqa/chat_short_train.jsonl"))))
        for split, folder in [("train", "dev"), ("test", "test")]:
            cases.append(count(name, "text/mmlu", split, "mmlu", 512, mmlu_samples(tok, os.path.join(root, "text/mmlu", folder))))
    return cases


if __name__ == "__main__":
    print("[\n" + ",\n".join(json.dumps(c) for c in all_cases(sys.argv[1])) + "\n]")
