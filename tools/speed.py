#!/usr/bin/env python3
"""mft beside PyTorch and the tokenizers package on this machine, in one run: figures for the README, no test.

    build/venv/bin/python tools/speed.py steps  CONFIG.json... [--full] [--recompute] [--dtype f32|bf16] [--batch 1] [--seq 128] [--steps 6]
                                                       [--rounds 3] [--threads 2]
    build/venv/bin/python tools/speed.py tokens TOKENIZER_DIR... --text FILE

steps: a random model of each config (`mft init`), then LoRA (rank 8, default targets) or full training steps of
AdamW on the same random tokens by both, one program after the other in each of the rounds, on as many threads.
Speed is that of the median step after the first of each round; memory is the peak resident size of the whole
process. The ratio is that of each round's medians: its median, least and greatest over the rounds. Losses are
printed too: the first must agree (an adapter starts as nothing; then its random half counts). --dtype bf16 trains in bf16 in both.
Both keep all activations; with --recompute mft does as without a flag: recomputes blocks where a step would take more than 80 MB.
tokens: seconds to load, and encoding speed on one core, from the difference between a text and eight copies of it.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
MFT = os.environ.get("MFT_BIN") or os.path.join(ROOT, "build", "mft")


def measured(args, **kwargs):
    """Runs a program; returns seconds, peak resident bytes and stdout."""
    began = time.perf_counter()
    child = subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, **kwargs)
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit("%s ended with %d" % (" ".join(map(str, args)), child.returncode))
    return time.perf_counter() - began, usage.ru_maxrss * 1024, out.decode()


def torch_steps(directory, data, batch, seq, steps, full, dtype, threads):
    """The PyTorch side, in a process of its own; prints one JSON object."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if not full:
        gpt2 = model.config.model_type == "gpt2"
        model = get_peft_model(model, LoraConfig(
            r=8, lora_alpha=16, task_type="CAUSAL_LM", fan_in_fan_out=gpt2,
            target_modules=["c_attn", "attn.c_proj"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj"]))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.as_tensor(np.fromfile(data, dtype="<i4").reshape(steps, batch, seq), dtype=torch.int64)
    losses, seconds = [], []
    for block in ids:
        began = time.perf_counter()
        loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    print(json.dumps(dict(losses=losses, seconds=seconds)))


def steps(args):
    print("%-24s %-8s %10s %12s %10s %10s" % ("model", "program", "tokens/s", "peak MB", "loss 1", "loss %d" % args.steps))
    for config in args.what:
        with tempfile.TemporaryDirectory() as tmp:
            name = os.path.splitext(os.path.basename(config))[0]
            model, data = os.path.join(tmp, "model"), os.path.join(tmp, "tokens.bin")
            subprocess.run([MFT, "init", "--config", config, "--seed", "1", "--dtype", args.dtype, "--output", model],
                           check=True, stdout=subprocess.DEVNULL)
            import numpy as np
            with open(config) as f:
                vocab = json.load(f)["vocab_size"]
            np.random.default_rng(1).integers(0, vocab, args.steps * args.batch * args.seq, dtype=np.int32).tofile(data)
            rounds = {"mft": [], "PyTorch": []}
            for _ in range(args.rounds):
                for program, run in (("mft", our_steps), ("PyTorch", their_steps)):
                    rounds[program].append(run(tmp, model, data, args))
            for program, runs in rounds.items():
                show(name, program, runs, args)
            ratios = sorted(statistics.median(theirs[0]) / statistics.median(ours[0]) for ours, theirs in zip(*rounds.values()))
            print("%-24s %-8s %10.2f   (%.2f to %.2f in %d rounds)" % (name, "ratio", statistics.median(ratios), ratios[0],
                                                                       ratios[-1], len(ratios)), flush=True)


def our_steps(tmp, model, data, args):
    """Seconds of each step after the first, peak resident bytes, losses."""
    log = os.path.join(tmp, "log.jsonl")
    if os.path.exists(log):
        os.remove(log)
    with tempfile.TemporaryDirectory(dir=tmp) as out:
        _, rss, _ = measured([MFT, "finetune", "--model", model, "--data", data, "--format", "tokens", "--no-shuffle",
                              "--batch-size", args.batch, "--seq-len", args.seq, "--max-steps", args.steps, "--lr", "2e-4",
                              "--lr-scheduler", "constant", "--threads", args.threads, "--precision", args.dtype,
                              "--output", os.path.join(out, "adapter"), "--log", log]
                             + (["--full"] if args.full else []) + ([] if args.recompute else ["--no-grad-checkpointing"]),
                             stderr=subprocess.DEVNULL)
    with open(log) as f:
        rows = [json.loads(line) for line in f]
    ends = [row["elapsed_s"] for row in rows]
    return [b - a for a, b in zip(ends, ends[1:])], rss, [row["loss"] for row in rows]


def their_steps(_, model, data, args):
    _, rss, out = measured([sys.executable, os.path.abspath(__file__), "torch", model, data, args.batch, args.seq,
                            args.steps, int(args.full), args.dtype, args.threads], stderr=subprocess.DEVNULL)
    run = json.loads(out)
    return run["seconds"][1:], rss, run["losses"]


def show(name, program, runs, args):
    seconds = [second for run in runs for second in run[0]]
    losses = runs[-1][2]
    print("%-24s %-8s %10.1f %12.0f %10.5f %10.5f" % (name, program, args.batch * args.seq / statistics.median(seconds),
                                                      max(run[1] for run in runs) / 1e6, losses[0], losses[-1]), flush=True)


def tokens(args):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer
    with open(args.text, encoding="utf-8", newline="") as f:
        text = f.read()
    size = len(text.encode())
    print("%-12s %-12s %10s %12s %10s" % ("tokenizer", "program", "load s", "MB/s", "peak MB"))
    for directory in args.what:
        name = os.path.basename(directory.rstrip("/"))
        with tempfile.TemporaryDirectory() as tmp:
            def ours(copies):
                path = os.path.join(tmp, "text")
                with open(path, "w", encoding="utf-8", newline="") as f:
                    f.write(text * copies)
                return min((measured([MFT, "tokenize", "--model", directory, "--file", path])[:2] for _ in range(3)))
            empty = min(measured([MFT, "tokenize", "--model", directory, "--text", "a"])[:2] for _ in range(3))
            one, eight = ours(1), ours(8)
            print("%-12s %-12s %10.3f %12.2f %10.0f" % (name, "mft", empty[0], 7 * size / 1e6 / (eight[0] - one[0]), empty[1] / 1e6))
        began = time.perf_counter()
        tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        load = time.perf_counter() - began
        lines = text.splitlines(True)                  # whole books are one word to Gemma: its own best case is line by line
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            for line in lines:
                tok.encode(line)
            seconds.append(time.perf_counter() - began)
        print("%-12s %-12s %10.3f %12.2f" % (name, "tokenizers", load, size / 1e6 / min(seconds)), flush=True)


def main():
    if sys.argv[1:2] == ["torch"]:
        directory, data, batch, seq, n, full, dtype, threads = sys.argv[2:]
        return torch_steps(directory, data, int(batch), int(seq), int(n), int(full), dtype, int(threads))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("mode", choices=["steps", "tokens"])
    ap.add_argument("what", nargs="+")
    ap.add_argument("--text")
    ap.add_argument("--full", action="store_true")
    ap.add_argument("--recompute", action="store_true")
    ap.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--seq", type=int, default=128)
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    args = ap.parse_args()
    (steps if args.mode == "steps" else tokens)(args)


if __name__ == "__main__":
    main()
