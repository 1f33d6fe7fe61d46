#!/usr/bin/env python3
"""Makes tests/golden/assets: small tokenizers, trained on the text below, and what the `tokenizers` and
`transformers` packages make of strings, ids and conversations with them.

    python3 tools/make_golden_text.py [--out tests/golden/assets]

The layout and the fields of each line are in tests/golden/README.md. The same versions write the same bytes.
"""
import argparse
import json
import os
import random
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

SEED = 20261121

CORPUS = """The river rises in the hills above the town and is nowhere deep. In summer the children walk across it on
stones; in spring nobody does. Last year's flood took the bridge, and they've been building another since.
She said that she'd come if it didn't rain, and that we'll all be there: I'm sure you're right, isn't it?
Heart rate 62, steps 8,412, sleep 7.5 hours; on 2024-03-17 the resting rate was 58 and the walk took 43 minutes.
for (i = 0; i < n; i++) {\n    sum += a[i] * b[i];\n\treturn sum;\n}\n
def mean(values):\n    return sum(values) / len(values)\n\n\nprint(mean([1, 2, 3]))\n
Der Fluss entspringt in den Hügeln über der Stadt. Im Sommer gehen die Kinder auf Steinen hinüber; größer ist er nie.
La rivière naît dans les collines au-dessus de la ville ; l'été, les enfants la passent à pied. Où êtes-vous né ?
El río nace en las colinas. ¿Cuántos niños lo cruzan? El año pasado, la inundación se llevó el puente.
Река начинается в холмах над городом и нигде не глубока. Летом дети переходят её по камням.
河は町の上の丘から流れ出す。夏には子どもたちが石の上を渡る。河流从山上流下来，夏天孩子们踩着石头过河。
النهر ينبع من التلال فوق المدينة.강은 언덕에서 시작된다. Ο ποταμός πηγάζει από τους λόφους.
"""

# Strings by category. The last words of each group are the ones that implementations get wrong.
CASES = {
    "prose": ["Hello, world!", "The bridge that the flood took has been built again.", "a", "", "I",
              "She said: \"No.\" (Then she left.)", "e.g. this, i.e. that - and so on...", "semi;colon"],
    "contraction": ["don't", "I'm you're he'll she'd we've it's can't", "DON'T I'M", "rock 'n' roll '90s 'tis",
                    "l'été d'accord", "’s ’t I’m", "'s", "''s 'ſ", "x'll've"],
    "space": [" ", "  ", "   a", "a   ", "a  b   c    d", " leading", "trailing ", "\n", "\n\n\n", "a\n\nb", "a \n b", "\t\ttab",
              "a\t b", "\r\n", "a\r\nb\r\n", " \n \n", "\u00a0", "a\u00a0b", "\u3000x", "\u2028y\u0085z", "\u200bzero\ufeff",
              "\x1c\x1d\x1f", "              x", "\n \n  \n"],
    "number": ["1", "12", "123", "1234567890", "3.14159", "1,000,000", "2024-03-17", "x1y22z333", "٣٤٥", "½ Ⅷ ²", "0x1F", "1e-5"],
    "code": ["for (i = 0; i < n; i++) {", "    return sum;\n}\n", "#include <stdio.h>\n\n\nint x;", "a->b && !c || d != e",
             "<b>bold</b>\n<i>x</i>", "f\"{x!r}\"", "// --- ===== ---", "\\n \\t \\u0041"],
    "unicode": ["größer über Straße", "Où êtes-vous né ?", "河は町の上", "Река", "النهر", "강은 언덕", "😀", "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301 a\u030a\u0323",
                "\u212b \u2126 ﬁ", "각 \u1100\u1161\u11a8", "q\u0307\u0323", "\U0001d54f\U0001f9ff", "\u0378\uffff", "क्षि", "ก็", "\u0000x\u0001",
                "\x7f\x80\x9f", "İı ſ K", "a\u0308\u0308b", "\u0344", "ΐ"],
    "special": ["a<|endoftext|>b", "<|endoftext|>", "<|endoftext|><|endoftext|>", "<|endoftext", "<|im_start|>user\nhi<|im_end|>\n",
                "<s>a</s>b<unk>", "<bos>x<eos>", "<start_of_turn>user", " <pad> ", "<0x0A> <0xE4>", "▁a▁▁b", "<tool_call> x </tool_call>",
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "a<mask>b  <mask> c", "<strip> x <strip>y", "one1word oneword",
                "\n\n\n\n", "a\n\n\nb"],
    "long": ["ab" * 60, "a" * 97, " " * 77 + "x", "the river " * 12, "!" * 50, "河" * 33, "\n" * 41],
}

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate: user, assistant, user, ...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

LLAMA3 = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set ns.system = ns.system ~ message.content.strip() -%}
{%- endfor -%}
{{- bos_token -}}
{%- if ns.system -%}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ ns.system ~ '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ['user', 'assistant'] -%}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
        {%- if message.role == 'assistant' -%}
            {%- generation -%}{{- message.content | trim ~ '<|eot_id|>' -}}{%- endgeneration -%}
        {%- else -%}
            {{- message.content | trim ~ '<|eot_id|>' -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

CHATS = [
    [("user", "Hello!")],
    [("user", "Hello!"), ("assistant", "Hi, how can I help?")],
    [("system", "Be terse."), ("user", "2+2?"), ("assistant", "4")],
    [("system", "You know this person's records."), ("user", "How did I sleep?"), ("assistant", "7.5 hours."),
     ("user", "And the day before?"), ("assistant", "Six hours, twelve minutes.")],
    [("user", "  spaces around  "), ("assistant", "  kept or trimmed?\n\n")],
    [("user", "line one\nline two\n\nline four"), ("assistant", "- one\n- two\n")],
    [("user", "夏 😀 é e\u0301"), ("assistant", "Река")],
    [("user", "I wrote <|im_end|> and <end_of_turn> and <|eot_id|>"), ("assistant", "Noted: <|im_start|>.")],
    [("system", ""), ("user", "empty system?"), ("assistant", "")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
]


# ---------------------------------------------------------------------------- the four tokenizers

def train(tok, size, alphabet=()):
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), show_progress=False, min_frequency=2)
    tok.train_from_iterator([CORPUS], trainer)
    return json.loads(tok.to_str())["model"]


def byte_level(size, pre):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre
    return train(tok, size, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_style(size):
    """Pieces over characters with U+2581 for a space; merges stay inside words, but for runs of spaces."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Replace(" ", "\u2581")
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581\n]+|\u2581+|\n+"), "isolated")
    return train(tok, size)


def with_byte_fallback(model, first):
    """vocab: the given first tokens, <0x00>..<0xFF>, then pieces; characters rare in the corpus are left to bytes."""
    vocab = {}
    rare = {c for c in model["vocab"] if len(c) == 1 and CORPUS.replace(" ", "\u2581").count(c) < 3}
    for token in list(first) + ["<0x%02X>" % b for b in range(256)]:
        vocab[token] = len(vocab)
    merges = [m for m in model["merges"] if not rare & set("".join(m))]
    for token in [c for c in model["vocab"] if len(c) == 1 and c not in rare] + ["".join(m) for m in merges]:
        vocab.setdefault(token, len(vocab))
    return vocab, merges


def added(vocab, content, special=True, **flags):
    base = dict(id=vocab[content], content=content, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=special)
    return dict(base, **flags)


def bos_template(bos, bos_id):
    one = lambda t: {"SpecialToken": {"id": bos, "type_id": t}}
    seq = lambda s, t: {"Sequence": {"id": s, "type_id": t}}
    return {"type": "TemplateProcessing", "single": [one(0), seq("A", 0)],
            "pair": [one(0), seq("A", 0), one(1), seq("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def bpe(vocab, merges, **more):
    base = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                fuse_unk=False, byte_fallback=False, vocab=vocab, merges=merges)
    return dict(base, **more)


def gpt2_tiny():
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    model = byte_level(450, pre_tokenizers.ByteLevel(add_prefix_space=False))
    vocab = dict(model["vocab"])
    vocab["<|endoftext|>"] = len(vocab)
    body = bpe(vocab, [" ".join(m) for m in model["merges"]], continuing_subword_prefix="", end_of_word_suffix="")
    del body["type"], body["byte_fallback"]               # as GPT-2's own file has it
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[added(vocab, "<|endoftext|>", normalized=True)],
                normalizer=None, pre_tokenizer=level, post_processor=dict(level, trim_offsets=False), decoder=level,
                model=body), dict(model_max_length=1024, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def qwen_tiny():
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model = byte_level(460, pre)
    ids = dict(model["vocab"])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<strip>", "oneword"]
    for name in names:
        ids[name] = len(ids)
    tokens = [added(ids, n, special=n.startswith("<|")) for n in names[:5]]
    tokens.append(added(ids, "<strip>", special=False, lstrip=True, rstrip=True))
    tokens.append(added(ids, "oneword", special=False, single_word=True))
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    return dict(version="1.0", truncation=None, padding=None, added_tokens=tokens, normalizer={"type": "NFC"},
                pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]}, post_processor=level, decoder=level,
                model=bpe(model["vocab"], model["merges"], continuing_subword_prefix="", end_of_word_suffix="",
                          ignore_merges=False)), \
        dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML, add_bos_token=False)


def gemma_tiny():
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n",
             "<b>", "</b>"]
    vocab, merges = with_byte_fallback(sentencepiece_style(460), first)
    runs = ["\u2581" * n for n in range(2, 6)]             # every way to make a run of spaces is a merge of its own
    for run in runs:
        vocab.setdefault(run, len(vocab))
    split = lambda run: [[run[:k], run[k:]] for k in range(1, len(run)) if run[:k] in vocab and run[k:] in vocab]
    merges = [m for run in reversed(runs) for m in split(run)] + [m for m in merges if set("".join(m)) != {"\u2581"}]
    tokens = [added(vocab, t, special=t.startswith("<") and t not in ("<mask>", "<b>", "</b>")) for t in first]
    return dict(version="1.0", truncation=None, padding=None, added_tokens=tokens,
                normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
                post_processor=bos_template("<bos>", vocab["<bos>"]),
                decoder={"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}]},
                model=bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=False)), \
        dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", add_bos_token=True,
             chat_template=GEMMA)


def llama_tiny():
    first = ["<unk>", "<s>", "</s>"]
    vocab, merges = with_byte_fallback(sentencepiece_style(440), first)
    chat = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    for t in chat:
        vocab[t] = len(vocab)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[added(vocab, t) for t in first + chat],
                normalizer={"type": "Sequence", "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
                pre_tokenizer=None, post_processor=bos_template("<s>", vocab["<s>"]),
                decoder={"type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
                model=bpe(vocab, [" ".join(m) for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)), \
        dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, chat_template=LLAMA3)


# name -> maker, (text that opens an assistant turn, end-of-turn token) or None
TOKENIZERS = {"gpt2-tiny": (gpt2_tiny, None), "qwen-tiny": (qwen_tiny, "<|im_end|>"),
              "gemma-tiny": (gemma_tiny, "<end_of_turn>"), "llama-tiny": (llama_tiny, "<|eot_id|>")}


def write_tokenizer(directory, spec, config):
    os.makedirs(directory)
    with open(os.path.join(directory, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(spec, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    config = dict(config, tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    with open(os.path.join(directory, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1, sort_keys=True, ensure_ascii=False)
        f.write("\n")
    if "gpt2" in directory:                               # the older form of the same tokenizer
        with open(os.path.join(directory, "vocab.json"), "w", encoding="utf-8") as f:
            json.dump(spec["model"]["vocab"], f, separators=(", ", ": "))
        with open(os.path.join(directory, "merges.txt"), "w", encoding="utf-8") as f:
            f.write("#version: 0.2\n" + "\n".join(spec["model"]["merges"]) + "\n")


# ---------------------------------------------------------------------------- golden lines

def write_lines(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def mixtures(rng, n):
    """Random strings put together from pieces of the cases and single characters of many kinds."""
    pool = [c for group in CASES.values() for c in group if len(c) < 20]
    chars = "abcXYZ019 \t\n'\".,;:<>|_-éßñ\u0301\u00a0河р😀\u2581"
    for _ in range(n):
        yield "".join(rng.choice(pool) if rng.random() < 0.4 else rng.choice(chars) for _ in range(rng.randint(1, 7)))


def encode_lines(tok, rng):
    for cat, texts in list(CASES.items()) + [("mixed", list(mixtures(rng, 30)))]:
        for text in texts:
            ids, bare = tok.encode(text).ids, tok.encode(text, add_special_tokens=False).ids
            row = dict(cat=cat, text=text, ids=ids, ids_no_special=bare,
                       decoded=tok.decode(bare, skip_special_tokens=False))
            skipped = tok.decode(ids, skip_special_tokens=True)
            if skipped != row["decoded"]:
                row["decoded_skip_special"] = skipped
            yield row


def decode_lines(tok, rng):
    size = tok.get_vocab_size()
    for _ in range(40):
        ids = [rng.randrange(size) for _ in range(rng.randint(1, 8))]
        yield dict(ids=ids, decoded=tok.decode(ids, skip_special_tokens=False),
                   decoded_skip_special=tok.decode(ids, skip_special_tokens=True))


def chat_lines(tok, auto, end_of_turn):
    for chat in CHATS:
        messages = [dict(role=r, content=c) for r, c in chat]
        render = lambda n, prompt: auto.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)
        for prompt in (False, True):
            text = render(len(messages), prompt)
            spans = []
            for i, message in enumerate(messages):        # what the turn adds to a text that already opens it
                if message["role"] == "assistant":
                    before, after = render(i, True), render(i + 1, False)
                    assert after.startswith(before) and text.startswith(after)
                    spans.append((len(before), after.rindex(end_of_turn) + len(end_of_turn)))
            enc = tok.encode(text, add_special_tokens=False)
            mask = [int(any(a < end and b > start for start, end in spans)) for a, b in enc.offsets]
            both = auto.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True,
                                            return_assistant_tokens_mask="endgeneration" in auto.chat_template)
            assert both["input_ids"] == enc.ids and both.get("assistant_masks", mask) == mask
            row = dict(messages=messages, add_generation_prompt=prompt, text=text, ids=enc.ids, assistant_mask=mask)
            if spans:
                row["assistant_text"] = [text[a:b] for a, b in spans]
            yield row


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ap.add_argument("--out", default=os.path.join(root, "tests", "golden", "assets"))
    args = ap.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    for name, (maker, end_of_turn) in TOKENIZERS.items():
        directory = os.path.join(args.out, "tokenizers", name)
        write_tokenizer(directory, *maker())
        tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        rng = random.Random("%d/%s" % (SEED, name))
        golden = lambda kind: os.path.join(args.out, "golden", kind, name + ".jsonl")
        write_lines(golden("tokenizer"), encode_lines(tok, rng))
        write_lines(golden("decode"), decode_lines(tok, rng))
        if end_of_turn:
            write_lines(golden("chat"), chat_lines(tok, AutoTokenizer.from_pretrained(directory), end_of_turn))
        print(name, tok.get_vocab_size())


if __name__ == "__main__":
    main()
