#!/usr/bin/env python3
"""Makes the tables of [UNICODE] in mft_models.h and puts them between its two marks.

    python3 tools/make_unicode.py mft_models.h

Needs Unicode 16: Python 3.14 or the package unicodedata2==16.0.0. Two versions of Unicode are
wanted, because that is what the reference tokenizers were built with: classes of characters are
those of Unicode 16, normalisation is that of Unicode 9 (so are the ids models were trained on).
"""
import sys
import unicodedata as ucd

if ucd.unidata_version != "16.0.0":
    import unicodedata2 as ucd
assert ucd.unidata_version == "16.0.0", ucd.unidata_version

BEGIN = "/* ---- tables, by tools/make_unicode.py ---- */\n"
END = "/* ---- end of tables ---- */\n"

OTHER, LETTER, NUMBER, NUMERAL, SPACE, WORD = range(6)

# Characters that NFC changes or reorders and that came after Unicode 9: decompositions, then marks.
AFTER_UNICODE_9 = """
105c9 105e4 11383 11385 1138e 11391 113c5 113c7-113c8 11938 16121-16128 16d68-16d6a
7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1ace 1df6-1dfa a82c 10d24-10d27 10d69-10d6d
10eab-10eac 10efd-10eff 10f46-10f50 10f82-10f85 11070 1133b 113ce-113d0 1145e 11839-1183a
1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 1612f 16ff0-16ff1
1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef"""

# \w is letters, marks, Nd, Nl, connectors, and by the properties Join_Control and Other_Alphabetic:
OTHER_WORD = "200c-200d 24b6-24e9 1f130-1f149 1f150-1f169 1f170-1f189"

# White_Space
SPACES = "9-d 20 85 a0 1680 2000-200a 2028-2029 202f 205f 3000"


def expand(text):
    out = set()
    for part in text.split():
        ends = [int(x, 16) for x in part.split("-")]
        out.update(range(ends[0], ends[-1] + 1))
    return out


SKIPPED, WORDS, BLANKS = expand(AFTER_UNICODE_9), expand(OTHER_WORD), expand(SPACES)


def char_class(c):
    category = ucd.category(chr(c))
    if c in BLANKS:
        return SPACE
    if category[0] == "L":
        return LETTER
    if category in ("Nd", "Nl"):
        return NUMBER
    if category == "No":
        return NUMERAL
    if category[0] == "M" or category == "Pc" or c in WORDS:
        return WORD
    return OTHER


def runs(values):
    """(value, length) of each stretch of equal values; the last one, which is 0, is left out"""
    out = []
    for v in values:
        if out and out[-1][0] == v:
            out[-1][1] += 1
        else:
            out.append([v, 1])
    assert out[-1][0] == 0
    return out[:-1]


def array(c_type, name, comment, numbers):
    lines, line = [], "   "
    for n in numbers:
        word = f" {n},"
        if len(line) + len(word) > 118:
            lines.append(line)
            line = "   "
        line += word
    lines.append(line.rstrip(","))
    head = "".join(f"{' *' if i else '/*'} {c}\n" for i, c in enumerate(comment))
    return head[:-1] + f" */\nstatic const {c_type} {name}[] = {{\n" + "\n".join(lines) + "\n};\n"


def main():
    everything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    classes = runs(char_class(c) for c in range(0x110000))
    marks = runs(0 if c in SKIPPED else ucd.combining(chr(c)) for c in range(0x110000))
    pairs, singles = [], []
    for c in everything:
        d = ucd.decomposition(chr(c))
        if not d or d[0] == "<" or c in SKIPPED:
            continue
        d = [int(x, 16) for x in d.split()]
        if len(d) == 1:
            singles.append((c, d[0]))
        else:                           # excluded from composition: what NFC takes apart
            pairs.append((c, d[0], d[1], ucd.normalize("NFC", chr(c)) != chr(c)))

    out = BEGIN
    out += array("unsigned int", "mft__class_runs",
                 ["Classes of Unicode 16 from U+0000 on: 8 * length of a run + its class; after the last, 0."],
                 [8 * n + v for v, n in classes])
    out += array("unsigned int", "mft__mark_runs",
                 ["Canonical combining classes, likewise: 256 * length of a run + class."],
                 [256 * n + v for v, n in marks])
    numbers, last = [], 0
    for c, a, b, excluded in pairs:
        numbers += [c - last, a, -b if excluded else b]
        last = c
    out += array("int", "mft__canonical_pairs",
                 ["Canonical decompositions into two: distance from the last such character, first, second; second",
                  "negative when the two do not compose again."], numbers)
    numbers, last = [], 0
    for c, a in singles:
        numbers += [c - last, a]
        last = c
    out += array("int", "mft__canonical_singles",
                 ["Canonical decompositions into one: distance, character."], numbers)
    out += END

    path = sys.argv[1]
    with open(path, encoding="utf-8") as f:
        text = f.read()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with open(path, "w", encoding="utf-8") as f:
        f.write(before + out + after)
    print(f"{len(classes)} class runs, {len(marks)} mark runs, {len(pairs)} pairs, {len(singles)} singles, {len(out)} bytes")


if __name__ == "__main__":
    main()
