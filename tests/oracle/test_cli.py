"""The command line's contract: exit status, what goes to stdout, and a sentence for every mistake."""
import json
import os
import re
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common import GOLDEN, copy_model, mft, random_tokens, write_rows, write_tokens

COMMANDS = ["finetune", "perplexity", "generate", "tokenize", "logits", "inspect", "init"]
QWEN2 = os.path.join(GOLDEN, "qwen2")
TOKENIZER = os.path.join(GOLDEN, "assets", "tokenizers", "gpt2-tiny")


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path / "tokens.bin", random_tokens(QWEN2, (200,)))


def finetune(tmp_path, data, *flags, model=QWEN2, code=0, output=None):
    return mft("finetune", "--model", model, "--data", data, "--format", "tokens", "--seq-len", 16, "--max-steps", 2,
               "--output", output or tmp_path / "out", *flags, code=code)


def is_sentence(text, *words):
    """One line or a few, naming what is wrong, without a crash report."""
    assert text.strip() and len(text) < 4000, text
    assert not re.search(r"Sanitizer|Segmentation|assert|core dumped", text), text
    for word in words:
        assert str(word) in text, "%r is not in: %s" % (word, text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    said = mft(command, "--help")
    assert "mft " + command in said.out + said.err and "--" in said.out + said.err


def test_no_command_and_unknown_command():
    is_sentence(mft(code=2).err)
    is_sentence(mft("fintune", code=2).err, "finetune")


@pytest.mark.parametrize("flag,right", [("--batch-sise", "--batch-size"), ("--lora-rnk", "--lora-rank")])
def test_unknown_flag_names_the_nearest(flag, right, tmp_path, tokens):
    is_sentence(finetune(tmp_path, tokens, flag, 2, code=2).err, flag, right)


@pytest.mark.parametrize("flags", [
    ["--batch-size", "0"], ["--batch-size", "-1"], ["--batch-size", "two"], ["--batch-size", "1.5"], ["--batch-size"],
    ["--batch-size", "99999999999999999999"], ["--lr", "fast"], ["--lr", "nan"], ["--lr", "-1"], ["--lr-scheduler", "cosin"],
    ["--warmup-steps", "-1"], ["--warmup-ratio", "1.5"], ["--grad-accum-steps", "0"], ["--seq-len", "1"], ["--seq-len", "0"],
    ["--optim", "adam7"], ["--format", "xml"], ["--precision", "f31"], ["--quantize", "q9_9"], ["--lora-rank", "0"],
    ["--lora-dropout", "1.0"], ["--lora-alpha", "inf"], ["--memory-budget", "5 apples"], ["--threads", "-2"],
    ["--weight-decay", "-0.1"], ["--max-grad-norm", "-1"],
], ids=lambda flags: " ".join(flags))
def test_impossible_values(flags, tmp_path, tokens):
    said = finetune(tmp_path, tokens, *flags, code=2)
    is_sentence(said.err, flags[0].lstrip("-").split("_")[0])
    assert not said.out and not os.path.exists(tmp_path / "out" / "adapter_model.safetensors")


def test_underscores_are_dashes(tmp_path, tokens):
    finetune(tmp_path, tokens, "--batch_size", 2, "--lora_rank", 2, "--lora_modules", "q_proj,v_proj")
    with open(tmp_path / "out" / "adapter_config.json") as f:
        assert sorted(json.load(f)["target_modules"]) == ["q_proj", "v_proj"]


def test_json_is_alone_on_stdout(tmp_path, tokens):
    said = finetune(tmp_path, tokens, "--json", "--log", tmp_path / "log.jsonl", "--eval-data", tokens)
    got = said.json()
    for key in ("steps", "train_loss", "eval_loss", "eval_perplexity", "tokens_per_second", "peak_rss_bytes",
                "trainable_parameters", "output"):
        assert key in got, key
    assert abs(np.exp(got["eval_loss"]) - got["eval_perplexity"]) < 1e-4 * got["eval_perplexity"]
    with open(tmp_path / "log.jsonl") as f:
        lines = f.read().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert set(json.loads(line)) >= {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_rss_bytes",
                                         "elapsed_s"}
        for key in ("loss", "grad_norm"):              # nine significant digits: a float32 survives
            digits = re.search(r'"%s": ?([-0-9.e+]+)' % key, line).group(1).split("e")[0].replace(".", "").lstrip("-0")
            assert len(digits) >= 9 or np.float32(json.loads(line)[key]) == json.loads(line)[key], line


def test_plan_without_running(tmp_path, tokens):
    said = finetune(tmp_path, tokens, "--plan")
    assert re.search(r"activation", said.out + said.err, re.I)
    assert not os.path.exists(tmp_path / "out" / "adapter_model.safetensors")


def test_inspect_knows_what_it_sees(tmp_path):
    for path in (QWEN2, os.path.join(QWEN2, "lora_qkvo", "final"), os.path.join(QWEN2, "model.safetensors")):
        said = mft("inspect", path, "--json").json()
        assert said
        mft("inspect", path)
    assert '"qwen2"' in json.dumps(mft("inspect", QWEN2, "--json").json()).lower()


def test_init_makes_a_model_of_the_config(tmp_path):
    """The names, shapes and dtype of the snapshot that Transformers would make; the same seed, the same bytes."""
    for name in ("gpt2", "qwen2", "qwen2_untied", "llama", "qwen3", "gemma3"):
        directory = os.path.join(GOLDEN, name)
        outs = [str(tmp_path / (name + tag)) for tag in "abc"]
        for out, seed in zip(outs, (1, 1, 2)):
            mft("init", "--config", os.path.join(directory, "config.json"), "--seed", seed, "--dtype", "f32", "--output", out)
        want = load_file(os.path.join(directory, "model.safetensors"))
        a, b, c = [load_file(os.path.join(out, "model.safetensors")) for out in outs]
        plain = lambda tensors: {k.replace("transformer.", "", 1): v.shape for k, v in tensors.items()}
        assert plain(a) == plain(want), name
        assert all((a[k] == b[k]).all() for k in a) and any((a[k] != c[k]).any() for k in a)
        assert all(np.isfinite(v).all() for v in a.values())


# ---------------------------------------------------------------------------- bad input: a sentence, nothing written

def break_file(path, change):
    with open(path, "rb") as f:
        data = bytearray(f.read())
    with open(path, "wb") as f:
        f.write(change(data))


def with_header(change):
    def edit(data):
        n = struct.unpack("<Q", data[:8])[0]
        header = change(bytes(data[8:8 + n]))
        return struct.pack("<Q", len(header)) + header + bytes(data[8 + n:])
    return edit


def edit_json_header(change):
    def edit(text):
        header = json.loads(text)
        change(header)
        return json.dumps(header).encode()
    return with_header(edit)


def first_tensor(header):
    return sorted(k for k in header if k != "__metadata__")[0]


def overlap(header):
    a, b = sorted(k for k in header if k != "__metadata__" and header[k]["shape"] == [12])[:2]
    header[a]["data_offsets"] = header[b]["data_offsets"]


BROKEN_WEIGHTS = {
    "empty": lambda d: b"",
    "seven bytes": lambda d: d[:7],
    "truncated": lambda d: d[:-100],
    "header of 2^60 bytes": lambda d: struct.pack("<Q", 1 << 60) + bytes(d[8:]),
    "header is not JSON": with_header(lambda h: b"x" * len(h)),
    "header is an array": with_header(lambda h: b"[]"),
    "name of 200 KB": edit_json_header(lambda h: h.__setitem__("n" * 200000, dict(dtype="F32", shape=[1], data_offsets=[0, 4]))),
    "overlapping": edit_json_header(overlap),
    "out of range": edit_json_header(lambda h: h[first_tensor(h)].__setitem__("data_offsets", [1 << 40, (1 << 40) + 4])),
    "negative offset": edit_json_header(lambda h: h[first_tensor(h)].__setitem__("data_offsets", [-4, 4])),
    "shape against bytes": edit_json_header(lambda h: h[first_tensor(h)].__setitem__("shape", [3, 3])),
    "shape overflows": edit_json_header(lambda h: h[first_tensor(h)].__setitem__("shape", [1 << 40, 1 << 40])),
    "unknown dtype": edit_json_header(lambda h: h[first_tensor(h)].__setitem__("dtype", "F99")),
    "deep nesting": with_header(lambda h: b"{\"a\":" * 50000 + b"1" + b"}" * 50000),
}


@pytest.mark.parametrize("how", sorted(BROKEN_WEIGHTS))
def test_broken_weights(how, tmp_path, tokens):
    model = copy_model(QWEN2, tmp_path / "model")
    break_file(os.path.join(model, "model.safetensors"), BROKEN_WEIGHTS[how])
    is_sentence(finetune(tmp_path, tokens, model=model, code=1).err, "model.safetensors")
    if how != "unknown dtype":                     # to look at, that is no mistake
        is_sentence(mft("inspect", os.path.join(model, "model.safetensors"), code=1).err, "model.safetensors")
    assert not os.path.exists(tmp_path / "out" / "adapter_model.safetensors")


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)
    return change


Q0 = "model.layers.0.self_attn.q_proj.weight"
WRONG_TENSORS = {                 # what the sentence must name
    "missing": (lambda t: t.pop(Q0), Q0),
    "renamed": (rename(Q0, "model.layers.0.self_attn.qq_proj.weight"), "q_proj"),
    "transposed": (lambda t: t.__setitem__("model.layers.0.mlp.up_proj.weight",
                                           np.ascontiguousarray(t["model.layers.0.mlp.up_proj.weight"].T)), "up_proj"),
    "extra": (lambda t: t.__setitem__("model.layers.0.self_attn.surprise", np.zeros(3, np.float32)), "surprise"),
    "another layer": (lambda t: t.__setitem__("model.layers.7.mlp.up_proj.weight", np.zeros((21, 12), np.float32)), "layers.7"),
    "NaN": (lambda t: t[Q0].__setitem__((1, 1), np.nan), ""),
    "integers": (lambda t: t.__setitem__(Q0, t[Q0].astype(np.int64)), "q_proj"),
}


@pytest.mark.parametrize("how", sorted(WRONG_TENSORS))
def test_wrong_tensors(how, tmp_path, tokens):
    change, word = WRONG_TENSORS[how]
    model = copy_model(QWEN2, tmp_path / "model")
    path = os.path.join(model, "model.safetensors")
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    said = finetune(tmp_path, tokens, model=model, code=1)
    is_sentence(said.err, word)
    assert not os.path.exists(tmp_path / "out" / "adapter_model.safetensors")


WRONG_CONFIGS = {
    "no heads": dict(num_attention_heads=0), "no layers": dict(num_hidden_layers=0), "negative": dict(hidden_size=-12),
    "huge": dict(hidden_size=1 << 40), "text": dict(hidden_size="twelve"), "another size": dict(intermediate_size=22),
    "odd groups": dict(num_key_value_heads=3), "architecture": dict(model_type="mamba", architectures=["MambaForCausalLM"]),
    "vocabulary": dict(vocab_size=54), "activation": dict(hidden_act="sinc"),
    "rope": dict(rope_parameters=dict(rope_type="swirl", rope_theta=1e4)), "eps": dict(rms_norm_eps=-1.0),
    "more layers": dict(num_hidden_layers=3, layer_types=["full_attention"] * 3),
}


@pytest.mark.parametrize("how", sorted(WRONG_CONFIGS))
def test_wrong_config(how, tmp_path, tokens):
    model = copy_model(QWEN2, tmp_path / "model")
    path = os.path.join(model, "config.json")
    with open(path) as f:
        config = dict(json.load(f), **WRONG_CONFIGS[how])
    with open(path, "w") as f:
        json.dump(config, f)
    is_sentence(finetune(tmp_path, tokens, model=model, code=1).err)
    is_sentence(mft("logits", "--model", model, "--tokens", tokens, "--seq-len", 8, "--output", tmp_path / "l", code=1).err)
    assert not os.path.exists(tmp_path / "l")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00", '{"model_type": 3}', '{"model_type": "qwen2"}'],
                         ids=lambda t: repr(t))
def test_broken_config(text, tmp_path, tokens):
    model = copy_model(QWEN2, tmp_path / "model")
    with open(os.path.join(model, "config.json"), "w") as f:
        f.write(text)
    is_sentence(finetune(tmp_path, tokens, model=model, code=1).err, "config.json")


def test_missing_files(tmp_path, tokens):
    is_sentence(finetune(tmp_path, tokens, model=tmp_path / "nowhere", code=1).err, "nowhere")
    is_sentence(finetune(tmp_path, tmp_path / "nothing.bin", code=1).err, "nothing.bin")
    model = copy_model(QWEN2, tmp_path / "model")
    os.remove(os.path.join(model, "model.safetensors"))
    is_sentence(finetune(tmp_path, tokens, model=model, code=1).err, "model")
    sharded = copy_model(os.path.join(GOLDEN, "qwen2_sharded"), tmp_path / "sharded")
    os.remove(os.path.join(sharded, "model-00002-of-00003.safetensors"))
    is_sentence(finetune(tmp_path, tokens, model=sharded, code=1).err, "model-00002-of-00003.safetensors")


def test_half_downloaded_shard(tmp_path, tokens):
    model = copy_model(os.path.join(GOLDEN, "qwen2_sharded"), tmp_path / "sharded")
    break_file(os.path.join(model, "model-00003-of-00003.safetensors"), lambda d: d[:len(d) // 2])
    is_sentence(finetune(tmp_path, tokens, model=model, code=1).err, "model-00003-of-00003.safetensors")


@pytest.mark.parametrize("name,change", [
    ("rank", lambda c: c.__setitem__("r", 5)), ("no rank", lambda c: c.pop("r")), ("type", lambda c: c.__setitem__("peft_type", "IA3")),
    ("save", lambda c: c.__setitem__("modules_to_save", ["lm_head"])), ("bias", lambda c: c.__setitem__("bias", "all")),
])
def test_wrong_adapter_config(name, change, tmp_path, tokens):
    adapter = shutil.copytree(os.path.join(QWEN2, "lora_qkvo", "final"), tmp_path / "adapter")
    path = os.path.join(adapter, "adapter_config.json")
    with open(path) as f:
        config = json.load(f)
    change(config)
    with open(path, "w") as f:
        json.dump(config, f)
    is_sentence(finetune(tmp_path, tokens, "--adapter", adapter, code=1).err)


def test_adapter_of_another_base(tmp_path, tokens):
    for name, lora in (("gpt2", "lora_attn"), ("gemma3", "lora_all")):
        is_sentence(finetune(tmp_path, tokens, "--adapter", os.path.join(GOLDEN, name, lora, "final"), code=1).err)


def test_targets_that_match_nothing(tmp_path, tokens):
    is_sentence(finetune(tmp_path, tokens, "--lora-modules", "q_proj,qq_proj", code=None).err, "qq_proj")


BAD_DATA = {
    "empty": (b"", "tokens"), "not a multiple of four": (b"\1\0\0\0\2\0", "tokens"), "one token": (b"\1\0\0\0", "tokens"),
    "id too large": (struct.pack("<40i", *([1] * 39 + [53])), "tokens"), "negative id": (struct.pack("<40i", *([1] * 39 + [-5])), "tokens"),
    "not JSON": (b'{"input_ids": [1,2,3]}\nhello\n', "jsonl"), "labels of another length": (b'{"input_ids":[1,2,3],"labels":[1,2]}\n', "jsonl"),
    "id too large in a row": (b'{"input_ids":[1,2,99]}\n', "jsonl"), "text among ids": (b'{"input_ids":[1,"2",3]}\n', "jsonl"),
    "neither text nor ids": (b'{"words":"a"}\n', "jsonl"), "label out of range": (b'{"input_ids":[1,2,3],"labels":[1,2,53]}\n', "jsonl"),
    "fraction": (b'{"input_ids":[1,2.5,3]}\n', "jsonl"), "only ignored": (b'{"input_ids":[1,2,3],"labels":[-100,-100,-100]}\n', "jsonl"),
}


@pytest.mark.parametrize("how", sorted(BAD_DATA))
def test_bad_data(how, tmp_path):
    data, form = BAD_DATA[how]
    path = tmp_path / ("bad." + form)
    path.write_bytes(data)
    said = mft("finetune", "--model", QWEN2, "--data", path, "--format", form, "--seq-len", 16, "--max-steps", 2,
               "--output", tmp_path / "out", code=1)
    is_sentence(said.err, path.name)
    assert not os.path.exists(tmp_path / "out" / "adapter_model.safetensors")


def test_bad_rows_name_their_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [dict(input_ids=[1, 2, 3])] * 4 + [dict(input_ids=[1, 2, 1000])])
    said = mft("finetune", "--model", QWEN2, "--data", path, "--format", "jsonl", "--seq-len", 16, "--max-steps", 2,
               "--output", tmp_path / "out", code=1)
    is_sentence(said.err, "rows.jsonl", 5, 1000)


def test_output_that_cannot_be_written_is_found_first(tmp_path, tokens):
    (tmp_path / "file").write_text("in the way")
    said = finetune(tmp_path, tokens, "--log", tmp_path / "log.jsonl", output=tmp_path / "file" / "out", code=1)
    is_sentence(said.err, "file")
    assert not os.path.exists(tmp_path / "log.jsonl") or os.path.getsize(tmp_path / "log.jsonl") == 0      # no step was run
    is_sentence(mft("logits", "--model", QWEN2, "--tokens", tokens, "--seq-len", 8, "--output", tmp_path / "no" / "x", code=1).err)


def test_data_ids_beyond_the_model(tmp_path):
    path = write_tokens(tmp_path / "t.bin", np.array([1, 2, 3, 60, 5, 6, 7, 8]))
    is_sentence(mft("perplexity", "--model", QWEN2, "--data", path, "--format", "tokens", "--seq-len", 4, code=1).err, "60")
    is_sentence(mft("logits", "--model", QWEN2, "--tokens", path, "--seq-len", 4, "--output", tmp_path / "x", code=1).err, "60")


BROKEN_TOKENIZERS = {
    "empty": "", "not JSON": "{", "array": "[]", "no model": "{}", "model without vocab": '{"model":{"type":"BPE","merges":[]}}',
    "wrong types": '{"model":{"type":"BPE","vocab":[],"merges":{}}}', "unknown model": '{"model":{"type":"Unigram","vocab":[]}}',
    "merge of unknown pieces": '{"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}',
    "ids with a gap of 2^40": '{"model":{"type":"BPE","vocab":{"a":1099511627776},"merges":[]}}',
    "negative id": '{"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
    "nested": '{"model":' + "[" * 200000 + "]" * 200000 + "}",
    "merges of one": '{"model":{"type":"BPE","vocab":{"a":0},"merges":[["a"]]}}',
}


@pytest.mark.parametrize("how", sorted(BROKEN_TOKENIZERS))
def test_broken_tokenizer(how, tmp_path):
    directory = tmp_path / "tok"
    os.makedirs(directory)
    (directory / "tokenizer.json").write_text(BROKEN_TOKENIZERS[how])
    is_sentence(mft("tokenize", "--model", directory, "--text", "abc", code=1).err, "tokenizer.json")


def test_invalid_utf8_is_not_a_crash(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc \xff\xfe\x80 \xc3 def \xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 end\xe2")
    said = mft("tokenize", "--model", TOKENIZER, "--file", tmp_path / "bad.txt", code=None)
    assert said.code in (0, 1)
