"""`mft finetune` against a plain PyTorch loop, step by step, and its files against PEFT and Transformers."""
import fcntl
import json
import math
import os
import platform
import pty
import re
import shutil
import struct
import subprocess
import termios

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from common import (GOLDEN, MFT, ROOT, all_linear, block_batches, check_log, config, copy_model, default_targets, hf_logits, load,
                    make_adapter, mean_loss, mft, mft_logits, missing, pad_rows, random_tokens, read_log, relative, shared,
                    train, write_rows, write_tokens)

FAMILIES = ["gpt2", "qwen2", "llama", "qwen3", "gemma3", "mistral"]
KINDS = {"lora": dict(), "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}
ROWS = ["portable", "neon"] if platform.machine() in ("aarch64", "arm64") else ["portable", "avx2", "avx512", "amx"]
B, T, STEPS = 2, 16, 6


def golden(name):
    return os.path.join(GOLDEN, name)


def finetune(directory, data, output, *flags, json_out=True):
    args = ["finetune", "--model", directory, "--data", data, "--output", output] + [str(f) for f in flags]
    return mft(*(args + (["--json"] if json_out else [])))


def own_loss(directory, tokens, tmp_path, adapter=None):
    """Mean next-token loss of rows [N, T] as `mft perplexity` has it: each row a window."""
    path = write_tokens(tmp_path / "held.bin", tokens)
    args = ["perplexity", "--model", directory, "--data", path, "--format", "tokens", "--seq-len", tokens.shape[1], "--json"]
    return mft(*(args + (["--adapter", adapter] if adapter else []))).json()["loss"]


# ---------------------------------------------------------------------------- step by step

@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_follows_torch(name, kind, tmp_path):
    """From the same adapter on the same blocks: every loss, norm and learning rate, and the adapter at the end."""
    directory, out = golden(name), str(tmp_path / "out")
    init = make_adapter(directory, str(tmp_path / "init"), **KINDS[kind])
    tokens = random_tokens(directory, (B * T * STEPS,), seed=3)
    data = write_tokens(tmp_path / "t.bin", tokens)
    said = finetune(directory, data, out, "--adapter", init, "--format", "tokens", "--no-shuffle", "--batch-size", B,
                    "--seq-len", T, "--max-steps", STEPS, "--lr", "2e-3", "--lr-scheduler", "cosine", "--warmup-steps", 2,
                    "--weight-decay", "0.01", "--max-grad-norm", "1.0", "--log", tmp_path / "log.jsonl").json()
    model = load(directory, init, trainable=True)
    log = train(model, block_batches(tokens, B, T, STEPS), STEPS, 2e-3, weight_decay=0.01, max_grad_norm=1.0, warmup=2,
                scheduler="cosine")
    check_log(read_log(tmp_path / "log.jsonl"), log)
    assert said["steps"] == STEPS
    assert said["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    theirs = {k.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default", ""): p
              for k, p in model.named_parameters() if p.requires_grad}
    ours = load_file(os.path.join(out, "adapter_model.safetensors"))
    assert sorted(ours) == sorted(theirs)
    for key, value in ours.items():                # the largest update is about 1e-2; see floors.json, param_maxabs
        assert (value - theirs[key]).abs().max().item() < 1e-3, key


@pytest.mark.parametrize("decay", ["0.05"])
@pytest.mark.parametrize("name", FAMILIES + ["qwen2_untied"])
def test_full_follows_torch(name, decay, tmp_path):
    """All weights, accumulation over two micro-batches; biases and norms are not decayed."""
    directory, out = golden(name), str(tmp_path / "out")
    tokens = random_tokens(directory, (B * T * 2 * STEPS,), seed=4)
    data = write_tokens(tmp_path / "t.bin", tokens)
    finetune(directory, data, out, "--full", "--format", "tokens", "--no-shuffle", "--batch-size", B, "--seq-len", T,
             "--grad-accum-steps", 2, "--max-steps", STEPS, "--lr", "1e-3", "--lr-scheduler", "linear", "--warmup-steps", 1,
             "--weight-decay", decay, "--max-grad-norm", 0, "--log", tmp_path / "log.jsonl")
    model = load(directory)
    log = train(model, block_batches(tokens, B, T, 2 * STEPS), STEPS, 1e-3, accum=2, weight_decay=float(decay), warmup=1,
                scheduler="linear", decay_vectors=False)
    check_log(read_log(tmp_path / "log.jsonl"), log)
    held = random_tokens(directory, (4, T), seed=5)
    trained = load(out)                            # the snapshot is one that Transformers loads
    assert abs(mean_loss(trained, held) - mean_loss(model, held)) < 2e-5 * mean_loss(model, held)
    assert abs(mean_loss(trained, held) - own_loss(out, held, tmp_path)) < 1e-5 * mean_loss(trained, held)
    assert config(out)["model_type"] == config(directory)["model_type"]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3"])
def test_rows_follow_torch(name, tmp_path):
    """JSONL rows of different lengths with labels: padded on the right, -100 ignored, the mean over the valid
    tokens of the window (one micro-batch of which has far fewer than the other)."""
    directory = golden(name)
    rng = np.random.default_rng(6)
    rows = []
    for i in range(4 * STEPS):
        n = int(rng.integers(3, 17))
        ids = rng.integers(1, config(directory)["vocab_size"], n).tolist()
        row = dict(input_ids=ids)
        if i % 3:
            row["labels"] = [-100 if rng.random() < 0.4 else t for t in ids[:-1]] + ids[-1:]
        rows.append(row)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    init = make_adapter(directory, str(tmp_path / "init"))
    finetune(directory, data, str(tmp_path / "out"), "--adapter", init, "--format", "jsonl", "--no-pack", "--no-shuffle",
             "--batch-size", 2, "--grad-accum-steps", 2, "--seq-len", 32, "--max-steps", STEPS, "--lr", "1e-3",
             "--lr-scheduler", "constant", "--weight-decay", 0, "--max-grad-norm", 0, "--log", tmp_path / "log.jsonl")
    batches = [pad_rows(rows[i:i + 2]) for i in range(0, len(rows), 2)]
    check_log(read_log(tmp_path / "log.jsonl"), train(load(directory, init, trainable=True), batches, STEPS, 1e-3, accum=2))


@pytest.mark.parametrize("row", ROWS)
def test_kernel_rows_follow_torch(row, tmp_path):
    """Every row of the kernel table that this machine runs, forced: logits and a training run of each family."""
    for name in FAMILIES:
        directory = golden(name)
        tokens = random_tokens(directory, (2 * 2 * 33,), seed=11)
        data = write_tokens(tmp_path / "t.bin", tokens)
        said = mft("perplexity", "--model", directory, "--data", data, "--format", "tokens", "--seq-len", 8, "--kernels", row,
                   code=None)
        if said.code == 2:
            pytest.skip("kernel row %s: not on this machine" % row)
        assert relative(mft_logits(directory, tokens.reshape(4, 33), tmp_path, env={"MFT_KERNELS": row}),
                        hf_logits(load(directory), tokens.reshape(4, 33))) < 5e-5, name
        finetune(directory, data, str(tmp_path / "out"), "--full", "--format", "tokens", "--no-shuffle", "--batch-size", 2,
                 "--seq-len", 33, "--max-steps", 2, "--lr", "1e-3", "--lr-scheduler", "constant", "--max-grad-norm", 0,
                 "--weight-decay", 0, "--kernels", row, "--log", tmp_path / "log.jsonl")
        check_log(read_log(tmp_path / "log.jsonl"), train(load(directory), block_batches(tokens, 2, 33, 2), 2, 1e-3))


@pytest.mark.parametrize("mode", [[], ["--full"]], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_grad_checkpointing_changes_nothing(name, mode, tmp_path):
    """Recomputing a block gives the bits that saving it would have."""
    directory = golden(name)
    data = write_tokens(tmp_path / "t.bin", random_tokens(directory, (B * T * STEPS,), seed=3))
    logs = []
    for extra in ([], ["--grad-checkpointing"]):
        dropout = [] if mode else ["--lora-dropout", "0.2"]
        finetune(directory, data, str(tmp_path / ("out%d" % len(logs))), "--format", "tokens", "--batch-size", B, "--seq-len", T,
                 "--max-steps", STEPS, "--lr", "1e-2", "--seed", 3, "--log", tmp_path / "log.jsonl", *mode, *dropout, *extra)
        logs.append([(r["loss"], r["grad_norm"]) for r in read_log(tmp_path / "log.jsonl")])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3"])
def test_packing_changes_nothing(name, tmp_path):
    """Eight rows of eight in two packed rows of thirty-two: own positions, own attention, no loss across."""
    directory = golden(name)
    rows = [dict(input_ids=row.tolist()) for row in random_tokens(directory, (8, 8), seed=12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    logs = []
    for flags in (["--batch-size", 2], ["--batch-size", 8, "--no-pack"], ["--batch-size", 1, "--grad-accum-steps", 2]):
        finetune(directory, data, str(tmp_path / "out"), "--full", "--format", "jsonl", "--no-shuffle", "--seq-len", 32,
                 "--max-steps", 1, "--lr", "1e-3", "--lr-scheduler", "constant", "--max-grad-norm", 0,
                 "--log", tmp_path / "log.jsonl", *flags)
        logs.append(read_log(tmp_path / "log.jsonl"))
    want = train(load(directory), [pad_rows(rows)], 1, 1e-3)
    for log in logs:
        check_log(log, want)


@pytest.mark.parametrize("name,chat", [("qwen2", "qwen-tiny"), ("gemma3", "gemma-tiny"), ("llama", "llama-tiny")])
def test_chat_follows_the_mask(name, chat, tmp_path):
    """Conversations from JSONL: the loss is over the tokens that Transformers' mask of the golden lines marks."""
    lines = os.path.join(GOLDEN, "assets", "golden", "chat", chat + ".jsonl")
    with open(lines, encoding="utf-8", newline="\n") as f:
        cases = [json.loads(line) for line in f]
    cases = [c for c in cases if not c["add_generation_prompt"] and any(c["assistant_mask"])]
    model = str(tmp_path / "model")
    config_of = config(golden(name))
    config_of.update(vocab_size=450, max_position_embeddings=512)
    os.makedirs(model)
    with open(tmp_path / "config.json", "w") as f:
        json.dump(config_of, f)
    mft("init", "--config", tmp_path / "config.json", "--seed", 1, "--dtype", "f32", "--output", model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(GOLDEN, "assets", "tokenizers", chat, file), model)
    with open(tmp_path / "chat.jsonl", "w", encoding="utf-8") as f:
        for case in cases:
            f.write(json.dumps(dict(messages=case["messages"]), ensure_ascii=False) + "\n")
    finetune(model, str(tmp_path / "chat.jsonl"), str(tmp_path / "out"), "--full", "--format", "jsonl", "--assistant-loss-only",
             "--no-pack", "--no-shuffle", "--batch-size", 2, "--seq-len", 256, "--max-steps", len(cases) // 2, "--lr", "1e-3",
             "--lr-scheduler", "constant", "--weight-decay", 0, "--max-grad-norm", 0, "--log", tmp_path / "log.jsonl")
    rows = [dict(input_ids=c["ids"], labels=[t if m else -100 for t, m in zip(c["ids"], c["assistant_mask"])]) for c in cases]
    batches = [pad_rows(rows[i:i + 2]) for i in range(0, len(rows) - 1, 2)]
    check_log(read_log(tmp_path / "log.jsonl"), train(load(model), batches, len(cases) // 2, 1e-3))


def test_lr_min(tmp_path):
    """Where the cosine ends, as Transformers' cosine_with_min_lr has it."""
    directory = golden("qwen2")
    data = write_tokens(tmp_path / "t.bin", random_tokens(directory, (T * 20,)))
    finetune(directory, data, str(tmp_path / "out"), "--format", "tokens", "--seq-len", T, "--max-steps", 20, "--lr", "1e-3",
             "--lr-min", "2e-4", "--warmup-steps", 4, "--log", tmp_path / "log.jsonl")
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    sched = transformers.get_cosine_with_min_lr_schedule_with_warmup(opt, 4, 20, min_lr=2e-4)
    for row in read_log(tmp_path / "log.jsonl"):
        assert abs(row["lr"] - sched.get_last_lr()[0]) < 1e-9
        opt.step()
        sched.step()


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_schedules(scheduler, tmp_path):
    """The learning rates are those of Transformers' schedules: the first step of a warm-up has none."""
    directory = golden("qwen2")
    data = write_tokens(tmp_path / "t.bin", random_tokens(directory, (B * T * 20,)))
    finetune(directory, data, str(tmp_path / "out"), "--format", "tokens", "--no-shuffle", "--batch-size", 1, "--seq-len", T,
             "--max-steps", 20, "--lr", "3e-4", "--lr-scheduler", scheduler, "--warmup-ratio", "0.25",
             "--log", tmp_path / "log.jsonl")
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    sched = {"constant": lambda: transformers.get_constant_schedule_with_warmup(opt, 5),
             "linear": lambda: transformers.get_linear_schedule_with_warmup(opt, 5, 20),
             "cosine": lambda: transformers.get_cosine_schedule_with_warmup(opt, 5, 20)}[scheduler]()
    want = []
    for _ in range(20):
        want.append(sched.get_last_lr()[0])
        opt.step()
        sched.step()
    got = [row["lr"] for row in read_log(tmp_path / "log.jsonl")]
    assert want[0] == 0 and np.allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3"])
def test_threads_do_not_matter(name, tmp_path):
    """The same bits with one, two and three threads."""
    directory = golden(name)
    data = write_tokens(tmp_path / "t.bin", random_tokens(directory, (B * T * STEPS,), seed=3))
    logs = []
    for threads in (1, 2, 3):
        finetune(directory, data, str(tmp_path / ("out%d" % threads)), "--format", "tokens", "--batch-size", B, "--seq-len", T,
                 "--max-steps", STEPS, "--seed", 7, "--lora-dropout", "0.1", "--threads", threads,
                 "--log", tmp_path / ("log%d.jsonl" % threads))
        logs.append([(r["loss"], r["grad_norm"]) for r in read_log(tmp_path / ("log%d.jsonl" % threads))])
    assert logs[0] == logs[1] == logs[2]
    files = [load_file(str(tmp_path / ("out%d" % t) / "adapter_model.safetensors")) for t in (1, 2, 3)]
    for key in files[0]:
        assert torch.equal(files[0][key], files[1][key]) and torch.equal(files[0][key], files[2][key])


# ---------------------------------------------------------------------------- adapters, both ways

@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_loads_in_peft(name, kind, targets, tmp_path):
    """A new adapter, trained and saved by us: PEFT loads it on the same base and has the same loss to 1e-5."""
    directory, out = golden(name), str(tmp_path / "out")
    data = write_tokens(tmp_path / "t.bin", random_tokens(directory, (B * T * STEPS,), seed=3))
    flags = (["--lora-modules", targets] if targets != "default" else []) + (["--use-" + kind] if kind != "lora" else [])
    finetune(directory, data, out, "--format", "tokens", "--batch-size", B, "--seq-len", T, "--max-steps", STEPS,
             "--lr", "5e-2", "--lr-scheduler", "constant", "--lora-rank", 3, "--lora-alpha", 9, "--seed", 5, *flags)
    with open(os.path.join(out, "adapter_config.json")) as f:
        saved = json.load(f)
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["bias"]) == ("LORA", 3, 9, "none")
    assert saved["task_type"] == "CAUSAL_LM" and bool(saved.get("fan_in_fan_out")) == (name == "gpt2")
    held = random_tokens(directory, (4, T), seed=5)
    model = load(directory, out)
    wanted = {k for k, _ in model.named_parameters() if "lora_" in k}
    assert len(wanted) == len(load_file(os.path.join(out, "adapter_model.safetensors")))
    theirs, ours = mean_loss(model, held), own_loss(directory, held, tmp_path, out)
    assert abs(theirs - ours) < 1e-5 * theirs
    assert abs(theirs - mean_loss(load(directory), held)) > 1e-3 * theirs           # and it learned something
    expected = make_adapter(directory, str(tmp_path / "peft"), r=3, **KINDS[kind],
                            target_modules=all_linear(directory) if targets != "default" else default_targets(directory))
    shape = lambda d: {k: tuple(v.shape) for k, v in load_file(os.path.join(d, "adapter_model.safetensors")).items()}
    assert shape(out) == shape(expected)


@pytest.mark.parametrize("targets", ["default", "all-linear"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_from_peft(name, kind, targets, tmp_path):
    """What PEFT writes loads in mft: logits to the noise floor, loss to 1e-5."""
    directory = golden(name)
    adapter = make_adapter(directory, str(tmp_path / "peft"), seed=9, r=5, lora_alpha=7, target_modules=(
        default_targets(directory) if targets == "default" else "all-linear"), **KINDS[kind])
    held = random_tokens(directory, (3, T), seed=8)
    model = load(directory, adapter)
    assert relative(mft_logits(directory, held, tmp_path, adapter), hf_logits(model, held)) < 5e-5
    theirs = mean_loss(model, held)
    assert abs(own_loss(directory, held, tmp_path, adapter) - theirs) < 1e-5 * theirs


@pytest.mark.parametrize("conf", [
    dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.v_proj": 3}),
    dict(target_modules=r".*\.(0|1)\.self_attn\.[qk]_proj"),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    dict(target_modules=["layers.0.mlp.up_proj"]),
], ids=["patterns", "regex", "layers_to_transform", "path"])
def test_adapter_targets_of_peft(conf, tmp_path):
    directory = golden("qwen2")
    adapter = make_adapter(directory, str(tmp_path / "peft"), seed=2, **conf)
    held = random_tokens(directory, (3, T), seed=8)
    assert relative(mft_logits(directory, held, tmp_path, adapter), hf_logits(load(directory, adapter), held)) < 5e-5


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", FAMILIES + ["gpt2_f16", "qwen2_bf16", "qwen2_untied", "gpt2_noprefix", "qwen2_sharded"])
def test_merge(name, kind, tmp_path):
    """`mft merge` writes what merge_and_unload makes, in the base's dtype, rounded once."""
    directory, out = golden(name), str(tmp_path / "merged")
    adapter = make_adapter(directory, str(tmp_path / "peft"), seed=3, target_modules=all_linear(directory), **KINDS[kind])
    mft("merge", "--model", directory, "--adapter", adapter, "--output", out)
    want = dict(load(directory, adapter).merge_and_unload().named_parameters())
    got = dict(transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").named_parameters())
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        # half a unit of the dtype's last place of the largest weight, and float32's own noise of the product
        unit = {torch.float32: 0.0, torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}[got[key].dtype]
        assert ((got[key].float() - value).abs().max() <= (unit + 1e-6) * value.abs().max()).item(), key
    held = random_tokens(directory, (2, T), seed=8)
    assert relative(mft_logits(out, held, tmp_path), hf_logits(load(out), held)) < 5e-5


# ---------------------------------------------------------------------------- the recorded run

RUN = "stories260k-qwen2-shakespeare"


def recorded_run():
    return [pytest.param(shared("assets", "lora", RUN), id=RUN) if os.path.exists(shared("assets", "lora", RUN))
            else missing(RUN)]


@pytest.mark.parametrize("run", recorded_run())
def test_recorded_run(run, tmp_path):
    """200 steps on real text from the same adapter: each loss to 1e-3 relative (the run's own float32 and
    float64 differ by 7e-7), the final adapter's held-out perplexity to 0.1 %."""
    with open(os.path.join(run, "result.json")) as f:
        result = json.load(f)
    model, out = shared("assets", "models", result["model"]), str(tmp_path / "out")
    batches = np.load(os.path.join(run, "data.npy"))
    data = write_tokens(tmp_path / "data.bin", batches)
    finetune(model, data, out, "--adapter", os.path.join(run, "adapter_init"), "--format", "tokens", "--no-shuffle",
             "--batch-size", result["batch"], "--seq-len", result["seq_len"], "--max-steps", result["steps"],
             "--lr", result["lr"], "--lr-scheduler", "cosine", "--warmup-steps", result["warmup"],
             "--weight-decay", result["weight_decay"], "--max-grad-norm", 0, "--log", tmp_path / "log.jsonl")
    ours, theirs = read_log(tmp_path / "log.jsonl"), read_log(os.path.join(run, "log.jsonl"))
    assert len(ours) == len(theirs) == 200
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs))
    print("largest relative difference of a loss: %.2e" % worst)
    assert worst < 1e-3 and not math.isnan(sum(a["loss"] for a in ours))
    assert np.allclose([a["lr"] for a in ours], [b["lr"] for b in theirs], rtol=1e-6, atol=1e-12)
    for label, file, chars in (("shakespeare", "tinyshakespeare/valid.txt", 20000), ("stories", "tiny_stories/stories.txt", None)):
        with open(shared("assets", "text", file), encoding="utf-8", newline="") as f:
            (tmp_path / "held.txt").write_bytes(f.read()[:chars].encode())
        got = mft("perplexity", "--model", model, "--adapter", out, "--data", tmp_path / "held.txt", "--seq-len",
                  result["seq_len"], "--json").json()
        want = result["held_after"][label]
        assert got["tokens"] == want["tokens"]
        assert abs(got["perplexity"] - want["ppl"]) < 1e-3 * want["ppl"]
    check = load_file(os.path.join(run, "check.safetensors"))
    ids = check["input_ids"].numpy()[None]
    for adapter, key, tolerance in ((None, "logits_before", 5e-5), (os.path.join(run, "adapter_final"), "logits_after", 5e-5),
                                    (out, "logits_after", 1e-3)):
        assert relative(mft_logits(model, ids, tmp_path, adapter)[0], check[key]) < tolerance, (adapter, key)


def test_live_line(tmp_path):
    """On a terminal one line is drawn over and over, never wider than the terminal; its parts are those of the log."""
    model = os.path.join(ROOT, "examples", "demo", "base")
    data = tmp_path / "text.txt"
    data.write_text("The cat sat on the mat. The dog sat on the log.\n" * 20)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    p = subprocess.Popen([MFT, "finetune", "--model", model, "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "12", "--seq-len", "16",
                          "--lr-scheduler", "constant"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:                     # how Linux says that the other side is closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert p.wait() == 0
    drawn = [line.split("\n")[0].rstrip("\r") for line in text.decode().split("\r\x1b[K")[1:]]
    assert drawn and all(len(line) <= 49 for line in drawn)
    assert re.match(r"step 12/12  loss \d\.\d{4}  lr 2\.00e-04  \d+ tok/s", drawn[-1])
