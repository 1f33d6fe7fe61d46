#!/usr/bin/env python3
"""Runs every command of examples/recipes/*.md, so that the pages stay true. Python's standard library only.

    python3 tests/recipes.py [PAGE..]           each ```sh block must succeed, in the order of the page; what stands in
                                                <!-- shows: REGEX --> behind one must be found in what it prints
    python3 tests/recipes.py --write [PAGE..]   and puts what a block printed into the ```text block behind it

Blocks run in the repository's root and write below build/recipes. Run `make` first. Figures depend in their last digits on
the machine's instruction set, texts of small models may as well: that is why a page is not compared letter by letter.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
block = re.compile(r"^```sh\n(?P<code>.*?)^```\n(?P<shows>(?:\n?<!-- shows: .*? -->\n)*)(?:\n?^```text\n(?P<said>.*?)^```\n)?", re.M | re.S)
SECONDS = 240                                   # for one block, on a machine that is busy with other tests


def run(code):
    try:
        done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", code], cwd=root, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
        return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        return 124, "", f"longer than {SECONDS} s"


def check(page, write):
    """How many blocks there are, and whether all did what the page says."""
    text, out, at, n = page.read_text(encoding="utf-8"), "", 0, 0
    for m in block.finditer(text):
        n += 1
        status, said, err = run(m["code"])
        missing = [s for s in re.findall(r"<!-- shows: (.*?) -->", m["shows"]) if not re.search(s, said)]
        if status or missing:
            what = f"exit status {status}" if status else f"does not show {missing}"
            print(f"FAIL {page.name}, block {n}: {what}\n{m['code']}{said}{err[-2000:]}")
            return n, False
        out += text[at:m.end() if m["said"] is None else m.start("said")]
        if m["said"] is not None:
            out += said + ("" if said.endswith("\n") else "\n") + text[m.end("said"):m.end()]
        at = m.end()
    if write:
        page.write_text(out + text[at:], encoding="utf-8")
    return n, n > 0


def main():
    write = "--write" in sys.argv
    names = [a for a in sys.argv[1:] if a != "--write"]
    pages = [Path(n).resolve() for n in names] or sorted(p for p in (root / "examples/recipes").glob("*.md") if p.name != "README.md")
    shutil.rmtree(root / "build/recipes", ignore_errors=True)
    passed = failed = 0
    for page in pages:
        n, good = check(page, write)
        passed, failed = passed + good, failed + (not good)
        print(f"{page.name}: {n} blocks")
    print(f"suite recipes: {passed} passed, {failed} failed, 0 skipped")
    return 1 if failed or not passed else 0


sys.exit(main())
