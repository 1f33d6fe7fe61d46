"""What the oracle tests share: running `mft`, finding models, and the same arithmetic in PyTorch.

`mft` is $MFT_BIN or build/mft. The larger test data lies in $MFT_TEST_DATA or ../shared; what needs it and
does not find it is skipped by name. Nothing here is imported by the library or its own tests.
"""
import json
import os
import shutil
import subprocess
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MFT = os.environ.get("MFT_BIN") or os.path.join(ROOT, "build", "mft")
GOLDEN = os.path.join(ROOT, "tests", "golden")
DATA = os.environ.get("MFT_TEST_DATA") or os.path.join(ROOT, "..", "shared")
sys.path.insert(0, os.path.join(ROOT, "tools"))

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


# ---------------------------------------------------------------------------- running mft

class Result:
    def __init__(self, args, code, out, err):
        self.args, self.code, self.out, self.err = args, code, out, err

    def json(self):
        """The one object that --json prints, and nothing else on stdout."""
        lines = [line for line in self.out.splitlines() if line.strip()]
        assert len(lines) >= 1, "%s printed nothing on stdout\n%s" % (self.args, self.err)
        return json.loads(self.out)


def mft(*args, code=0, timeout=300, env=None, cwd=None, program=None):
    """Runs `mft ARGS` (or another program), which must end with `code` (None: any of the documented ones)."""
    args = [str(a) for a in args]
    p = subprocess.run([program or MFT] + args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                       timeout=timeout, cwd=cwd, env=dict(os.environ, **(env or {})))
    out, err = p.stdout.decode("utf-8", "replace"), p.stderr.decode("utf-8", "replace")
    ok = p.returncode in (0, 1, 2) if code is None else p.returncode == code
    assert ok, "mft %s\nended with %d instead of %s\nstdout: %s\nstderr: %s" % (
        " ".join(args), p.returncode, code, out[-2000:], err[-2000:])
    return Result(args, p.returncode, out, err)


# ---------------------------------------------------------------------------- where models are

def shared(*path):
    return os.path.join(DATA, *path)


def missing(name):
    """A parameter that stands for data that is not there: a skip with the name."""
    return pytest.param(None, id=name, marks=pytest.mark.skip(reason="%s: not in %s" % (name, os.path.basename(DATA))))


def golden_models(root=GOLDEN, label="golden"):
    """Every fixture directory under a golden root, by the names in its manifest."""
    manifest = os.path.join(root, "manifest.json")
    if not os.path.exists(manifest):
        return [missing(label)]
    with open(manifest) as f:
        names = sorted(json.load(f)["fixtures"])
    return [pytest.param(os.path.join(root, n), id="%s/%s" % (label, n)) for n in names]


def trained_models():
    root = shared("assets", "models")
    names = ["gemma3-shakespeare", "gpt2-shakespeare", "stories260k-llama", "stories260k-qwen2"]
    return [pytest.param(os.path.join(root, n), id=n) if os.path.exists(os.path.join(root, n)) else missing(n)
            for n in names]


def all_models():
    return golden_models() + golden_models(shared("golden"), "shared") + trained_models()


def config(directory):
    with open(os.path.join(directory, "config.json")) as f:
        return json.load(f)


def max_positions(directory):
    c = config(directory)
    return c.get("n_positions") or c.get("max_position_embeddings")


def is_conv1d(directory):
    return config(directory)["model_type"] == "gpt2"


def default_targets(directory):
    return ["c_attn", "attn.c_proj"] if is_conv1d(directory) else QKVO


def all_linear(directory):
    return ["c_attn", "c_proj", "c_fc"] if is_conv1d(directory) else QKVO + MLP


def copy_model(directory, to, config_file="config.json"):
    """A snapshot of its own to write into, with one of the forms of the config."""
    os.makedirs(to, exist_ok=True)
    for name in os.listdir(directory):
        if name.startswith("model") or name.startswith("tokenizer") or name in ("vocab.json", "merges.txt"):
            shutil.copy(os.path.join(directory, name), to)
    shutil.copy(os.path.join(directory, config_file), os.path.join(to, "config.json"))
    return str(to)


# ---------------------------------------------------------------------------- the same in PyTorch

def load(directory, adapter=None, trainable=False):
    """The model as Transformers has it, in float32 from whatever the file holds, without dropout."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model.eval()


def random_tokens(directory, shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(1, config(directory)["vocab_size"], size=shape, dtype=np.int32)


def write_tokens(path, tokens):
    np.asarray(tokens, dtype="<i4").tofile(path)
    return str(path)


def write_rows(path, rows):
    """rows: dicts with input_ids and perhaps labels."""
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    return str(path)


def loss_sum(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1),
                           ignore_index=-100, reduction="sum")


def mean_loss(model, tokens):
    """Mean next-token loss of rows [N, T] in PyTorch."""
    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64)
    with torch.no_grad():
        return (loss_sum(model(input_ids=ids).logits, ids) / (ids.shape[0] * (ids.shape[1] - 1))).item()


def perplexity_parts(model, ids, seq_len, tokens):
    """Losses and counts of windows that lie end to end, summed over so many windows as make `tokens`."""
    windows = [ids[i:i + seq_len] for i in range(0, len(ids), seq_len)]
    windows = [w for w in windows if len(w) > 1]
    parts, most = [], max(1, tokens // seq_len)
    while windows:
        n = 1                                   # those of one length go together
        while n < min(most, len(windows)) and len(windows[n]) == len(windows[0]):
            n += 1
        batch, windows = torch.tensor(windows[:n]), windows[n:]
        with torch.no_grad():
            parts.append((loss_sum(model(input_ids=batch).logits, batch).item(), batch.shape[0] * (batch.shape[1] - 1)))
    return parts


def pad_rows(rows):
    """rows of input_ids/labels -> input_ids, attention_mask, labels padded on the right."""
    T = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row.get("labels", row["input_ids"]))
    return ids, mask, labels


def block_batches(tokens, batch, seq, n):
    """The first n consecutive batch x seq blocks of a token file."""
    blocks = np.asarray(tokens)[:n * batch * seq].reshape(n, batch, seq)
    ids = torch.as_tensor(blocks, dtype=torch.int64)
    return [(b, torch.ones_like(b), b) for b in ids]


def train(model, batches, steps, lr, accum=1, weight_decay=0.0, max_grad_norm=0.0, warmup=0, scheduler="constant",
          decay_vectors=True):
    """A plain loop with torch.optim.AdamW: the mean is over the valid tokens of the accumulation window.

    batches: (input_ids, attention_mask, labels), taken in order and from the front again.
    returns the log: loss, grad_norm (before clipping) and lr of each step.
    """
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for _, p in named if decay_vectors or p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for _, p in named if not decay_vectors and p.ndim == 1], weight_decay=0.0)]
    opt = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)
    make = {"constant": lambda: transformers.get_constant_schedule_with_warmup(opt, warmup),
            "linear": lambda: transformers.get_linear_schedule_with_warmup(opt, warmup, steps),
            "cosine": lambda: transformers.get_cosine_schedule_with_warmup(opt, warmup, steps)}
    sched, log, at = make[scheduler](), [], 0
    for _ in range(steps):
        window = [batches[(at + i) % len(batches)] for i in range(accum)]
        at += accum
        n = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in window)
        opt.zero_grad()
        total = 0.0
        for ids, mask, labels in window:
            loss = loss_sum(model(input_ids=ids, attention_mask=mask).logits, labels) / n
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], max_grad_norm or float("inf")).item()
        log.append(dict(loss=total, grad_norm=norm, lr=sched.get_last_lr()[0], tokens=n))
        opt.step()
        sched.step()
    return log


def make_adapter(directory, out, seed=1, base_name="base", **conf):
    """A PEFT adapter directory with a random B, so that it changes the model."""
    model = get_peft_model(load(directory), LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.0, fan_in_fan_out=is_conv1d(directory),
        **dict(dict(r=4, lora_alpha=8, target_modules=default_targets(directory)), **conf)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in sorted((k, p) for k, p in model.named_parameters() if p.requires_grad):
            if "lora_B" in key:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
            elif "lora_A" in key:
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
    for c in model.peft_config.values():
        c.base_model_name_or_path = base_name
    model.save_pretrained(out)
    return str(out)


def mft_logits(directory, tokens, tmp, adapter=None, env=None):
    """[N, T, V] by `mft logits`."""
    tokens = np.asarray(tokens)
    path = os.path.join(str(tmp), "logits.safetensors")
    args = ["logits", "--model", directory, "--tokens", write_tokens(os.path.join(str(tmp), "tokens.bin"), tokens),
            "--seq-len", tokens.shape[1], "--output", path]
    mft(*(args + (["--adapter", adapter] if adapter else [])), env=env)
    got = load_file(path)["logits"]
    os.remove(path)
    assert got.dtype == torch.float32 and got.shape[:2] == torch.Size(tokens.shape)
    return got


def hf_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(tokens), dtype=torch.int64)).logits.float()


def relative(got, want):
    """max |difference| / max |want|; NaN stays NaN and fails every comparison."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def read_log(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def check_log(got, want, loss=1e-5, grad_norm=5e-5):
    """Step by step: loss and grad_norm relative, lr exact to double rounding of float32."""
    assert [row["step"] for row in got] in (list(range(len(want))), list(range(1, len(want) + 1)))
    for ours, theirs in zip(got, want):
        assert abs(ours["loss"] - theirs["loss"]) <= loss * abs(theirs["loss"]), (ours, theirs)
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) <= grad_norm * theirs["grad_norm"], (ours, theirs)
        assert abs(ours["lr"] - theirs["lr"]) <= 1e-6 * abs(theirs["lr"]) + 1e-12, (ours, theirs)
