#!/usr/bin/env python3
"""Writes this directory's data again: excerpts of what lies in ASSETS/text, and the invented mail.

    python3 make_data.py ASSETS
"""
import json, random, sys
from pathlib import Path

text = Path(sys.argv[1]) / "text"
here = Path(__file__).parent


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def wikitext(split, out, most):
    """Whole lines of the split's beginning, `most` bytes at most."""
    raw = (text / "wikitext-2-raw" / f"wiki.{split}.raw").read_bytes()[:most]
    (here / "wikitext").mkdir(exist_ok=True)
    (here / "wikitext" / out).write_bytes(raw[:raw.rindex(b"\n") + 1])


def pubmedqa(split, out, most):
    rows = [json.loads(l) for l in open(text / "pubmedqa" / f"{split}.jsonl", encoding="utf-8")][:most]
    lines(here / "pubmedqa" / out, [{"id": r["id"], "prompt": r["question"] + "\nAnswer:", "completion": " " + r["answer"]} for r in rows])


def seed_tasks():
    """Alpaca's form: the first instance of each task whose answer is short; every fifth is held out."""
    rows = []
    for l in open(text / "seed_tasks.jsonl", encoding="utf-8"):
        task = json.loads(l)
        one = task["instances"][0]
        if len(one["output"]) + len(one["input"]) < 400:
            rows.append({"instruction": task["instruction"], "input": one["input"], "output": one["output"]})
    lines(here / "seed_tasks" / "train.jsonl", [r for i, r in enumerate(rows) if i % 5])
    lines(here / "seed_tasks" / "test.jsonl", [r for i, r in enumerate(rows) if i % 5 == 0])


def mmlu():
    for split, most in (("dev", 5), ("test", 40)):
        for subject in ("anatomy", "global_facts"):
            out = here / "mmlu" / split / f"{subject}_{split}.csv"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("".join((text / "mmlu" / split / out.name).read_text(encoding="utf-8").splitlines(True)[:most]), encoding="utf-8")


def mail():
    """A curt note, and the mail that one invented person, Mara, would have made of it; combinations, a part held out."""
    who = ["Tom", "Lena", "Omar", "Priya", "Jack", "Ines", "Paul", "Ruth"]
    day = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    hour = ["9 am", "10 am", "11 am", "2 pm", "3 pm", "4 pm"]
    kinds = [
        ("{who}: meeting moved to {hour} {day}", "a quick heads-up: our meeting moves to {hour} on {day}. I hope that still suits you."),
        ("{who}: report by {day}", "could you let me have the report by {day}? No rush before that."),
        ("{who}: can't come {day}", "I am sorry, {day} does not work for me after all. Shall we find another day?"),
        ("{who}: thanks, call me {day} {hour}", "thank you so much for your help! Could you ring me on {day} at {hour}?"),
    ]
    rows, seen = [], set()
    draw = random.Random(5)
    while len(rows) < 260:
        note, said = draw.choice(kinds)
        words = {"who": draw.choice(who), "day": draw.choice(day), "hour": draw.choice(hour)}
        prompt = note.format(**words)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": "Note: " + prompt + "\nMail:", "completion": f" Dear {words['who']}, {said.format(**words)} Warmly, Mara"})
    lines(here / "mail" / "train.jsonl", rows[:220])
    lines(here / "mail" / "test.jsonl", rows[220:])


wikitext("valid", "train.txt", 48_000)
wikitext("test", "test.txt", 12_000)
pubmedqa("train", "train.jsonl", 200)
pubmedqa("test", "test.jsonl", 100)
seed_tasks()
mmlu()
mail()
