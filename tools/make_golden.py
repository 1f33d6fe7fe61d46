#!/usr/bin/env python3
"""Makes tests/golden: tiny random models and what Transformers and PEFT compute from them.

    python3 tools/make_golden.py [--out tests/golden] [--only gpt2,ops,...]

Needs torch, transformers, peft, safetensors (and tokenizers for make_golden_text.py, which makes the
tokenizers' part). Nothing here is random but by seed: the same versions on the same machine write the
same bytes; another processor changes last bits, far inside the tolerances of floors.json.

The names, shapes and units of what is written are in tests/golden/README.md. Every quantity is computed
four times: in float32 (that is what is stored), with two threads, with the other attention kernel and in
float64. The largest difference is its noise floor; the tolerance is ten times that (see `tolerance`).
"""
import argparse
import json
import math
import os
import shutil
import warnings
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # the two-thread runs share the machine with others

import numpy as np
import torch
import torch.nn.functional as F
import peft
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SEED = 20261121
TRAIN = dict(lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01, max_grad_norm=1.0, steps=15, warmup=3,
             windows=5, accumulation=2)
LORA = dict(r=4, alpha=8, dropout=0.0)
PROCESSORS = dict(repetition_penalty=1.3, temperature=0.7, top_k=20, top_p=0.8)
NEW_TOKENS = 10
TRAIN_T = 11

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = QKVO + ["gate_proj", "up_proj", "down_proj"]

# The sizes are odd where the architecture lets them be: no width is a multiple of a vector register.
# cases: what is stored; right_grad: full gradients of the padded case too; train: which runs; lora: adapters.
FIXTURES = {
    "gpt2": dict(
        family="gpt2", T=9, long_T=37,
        config=dict(vocab_size=53, n_positions=37, n_embd=15, n_head=3, n_layer=2,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        cases=["base", "right", "left", "left_pos", "long"],
        train=["train_all", "train_no_norm_bias"],
        lora={"lora_attn": dict(target_modules=["c_attn", "c_proj"], merged=True)}),
    "qwen2": dict(
        family="qwen2", T=9, long_T=61,
        config=dict(vocab_size=53, hidden_size=12, intermediate_size=21, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=96, rms_norm_eps=1e-6, tie_word_embeddings=True,
                    use_sliding_window=False, sliding_window=None,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        cases=["base", "right", "left", "long"],
        train=["train_all", "train_no_norm_bias"],
        lora={"lora_qkvo": dict(target_modules=QKVO, merged=True),
              "lora_rs": dict(target_modules=["q_proj", "v_proj"], use_rslora=True, cases=["base"]),
              "lora_dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True, merged=True, cases=["base"])}),
    "qwen2_untied": dict(
        family="qwen2", T=9,
        config=dict(vocab_size=47, hidden_size=18, intermediate_size=19, num_hidden_layers=1, num_attention_heads=3,
                    num_key_value_heads=1, max_position_embeddings=96, rms_norm_eps=1e-5, tie_word_embeddings=False,
                    use_sliding_window=False, sliding_window=None,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        cases=["base", "right"], train=[], lora={}),
    "llama": dict(
        family="llama", T=9, long_T=61,
        config=dict(vocab_size=47, hidden_size=9, intermediate_size=13, num_hidden_layers=2, num_attention_heads=3,
                    num_key_value_heads=1, head_dim=8, max_position_embeddings=96, rms_norm_eps=1e-5,
                    tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
                    rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=32)),
        cases=["base", "right", "long"], train=[], lora={}),
    "qwen3": dict(
        family="qwen3", T=9,
        config=dict(vocab_size=47, hidden_size=9, intermediate_size=13, num_hidden_layers=2, num_attention_heads=3,
                    num_key_value_heads=1, head_dim=10, max_position_embeddings=96, rms_norm_eps=1e-4,
                    tie_word_embeddings=True, use_sliding_window=False, sliding_window=None,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        cases=["base", "right"], train=[], lora={}),
    "gemma3": dict(
        family="gemma3", T=11, long_T=61,
        config=dict(vocab_size=47, hidden_size=14, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=10, max_position_embeddings=96, rms_norm_eps=1e-6,
                    query_pre_attn_scalar=10, sliding_window=4, pad_token_id=0, bos_token_id=None, eos_token_id=None,
                    layer_types=["sliding_attention", "full_attention"],
                    rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1000000.0),
                                         sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
        cases=["base", "right", "left", "long", "padtok"], right_grad=True,
        train=["train_all", "train_no_norm_bias"],
        lora={"lora_all": dict(target_modules=ALL)}),
    "mistral": dict(
        family="mistral", T=11,
        config=dict(vocab_size=47, hidden_size=12, intermediate_size=13, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=6, max_position_embeddings=96, rms_norm_eps=1e-5,
                    sliding_window=4, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        cases=["base", "right", "left"], train=[], lora={}),
}
# The same weights in another form on disk: values are those of `of`, or computed again from the rounded weights.
VARIANTS = {
    "gpt2_noprefix": dict(of="gpt2", same_values=True),
    "gpt2_f16": dict(of="gpt2", dtype=torch.float16),
    "qwen2_sharded": dict(of="qwen2", same_values=True, shards=3),
    "qwen2_bf16": dict(of="qwen2", dtype=torch.bfloat16),
}
CLASSES = dict(gpt2="GPT2", qwen2="Qwen2", qwen3="Qwen3", llama="Llama", mistral="Mistral", gemma3="Gemma3")


# ---------------------------------------------------------------------------- computing in four ways

WAYS = {  # dtype, attention kernel, threads
    "f32": (torch.float32, "sdpa", 1),
    "f32_2threads": (torch.float32, "sdpa", 2),
    "f32_eager": (torch.float32, "eager", 1),
    "f64": (torch.float64, "sdpa", 1),
}


class KeepDouble(TorchFunctionMode):
    """Transformers casts to float32 inside norms, softmax and loss. Here what is double stays double."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            if func is torch.Tensor.float:
                return x
            if func is torch.Tensor.to and (torch.float32 in args or kwargs.get("dtype") == torch.float32):
                return x
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Way:
    """with Way("f64") as way: model = way.load(directory)"""

    def __init__(self, name):
        self.dtype, self.attention, self.threads = WAYS[name]
        self.mode = KeepDouble() if self.dtype == torch.float64 else None

    def __enter__(self):
        torch.set_num_threads(self.threads)
        if self.mode:
            self.mode.__enter__()
        return self

    def __exit__(self, *exc):
        torch.set_num_threads(1)
        if self.mode:
            self.mode.__exit__(*exc)

    def load(self, directory):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                     attn_implementation=self.attention).eval()
        return self.cast(model)

    def cast(self, model):
        if self.dtype == torch.float64:
            model.double()
            for module in model.modules():      # the rotary tables are float32 by definition: keep HF's values
                if "RotaryEmbedding" in type(module).__name__:
                    module.float()
        return model


def generator(*names):
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (SEED,) + names)).encode()))


def normal(g, *shape, std=1.0, mean=0.0):
    return mean + std * torch.randn(*shape, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------------------- tolerances

LEAST = {"logits": 1e-5, "hidden": 1e-5, "grad": 2e-5, "loss": 1e-6, "grad_norm": 5e-6, "train.loss": 1e-5,
         "train.grad_norm": 5e-5, "train.param_q999": 5e-6, "train.param_maxabs": 1e-3,
         "train.key_bias_maxabs": 1e-2, "merged_vs_unmerged_logits": 1e-5}


def general(quantity):
    """`train_all.loss` and `train.loss` share one least value."""
    return "train." + quantity.split(".")[1] if quantity.startswith("train") else quantity


def tolerance(floor, least):
    """Ten times the floor, rounded up to 1, 2 or 5 times a power of ten, not below `least`."""
    if floor <= 0:
        return least
    x = 10 * floor
    p = 10.0 ** math.floor(math.log10(x))
    return max(least, float("%g" % next(m * p for m in (1, 2, 5, 10) if x <= m * p * (1 + 1e-12))))


def relative(a, b):
    """max |a - b| / max |b|, in double."""
    a, b = a.double(), b.double()
    top = b.abs().max().item()
    return 0.0 if top == 0 else (a - b).abs().max().item() / top


class Floors:
    """Collects the largest difference of each quantity between the stored numbers and each other way."""

    def __init__(self):
        self.table = {}

    def add(self, quantity, way, value, worst=None):
        row = self.table.setdefault(quantity, {})
        if value > row.get(way, -1.0):
            row[way] = value
            if worst and value >= max(v for k, v in row.items() if k in WAYS):
                row["worst"] = worst

    def rows(self):
        out = {}
        for quantity, row in sorted(self.table.items()):
            floor = max(v for k, v in row.items() if k != "worst")
            out[quantity] = {k: (v if k == "worst" else float("%.3g" % v)) for k, v in sorted(row.items())}
            out[quantity]["tol"] = tolerance(floor, LEAST[general(quantity)])
        return out


# ---------------------------------------------------------------------------- models and inputs

def make_model(name, spec, directory):
    """A random model whose every part matters: no zero bias, no norm weight of exactly one."""
    cfg = dict(spec["config"])
    cls = getattr(transformers, CLASSES[spec["family"]] + ("TextConfig" if spec["family"] == "gemma3" else "Config"))
    if spec["family"] not in ("gemma3",):
        cfg.setdefault("bos_token_id", None)
        cfg.setdefault("eos_token_id", None)
    config = cls(**cfg)
    config.architectures = None
    model = getattr(transformers, CLASSES[spec["family"]]
                    + ("LMHeadModel" if spec["family"] == "gpt2" else "ForCausalLM"))(config)
    g = generator("weights", name)
    gemma = spec["family"] == "gemma3"
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            if key.endswith("bias"):
                w = normal(g, *p.shape, std=0.15)
            elif p.ndim == 1:                        # norms; Gemma's multiply by 1 + w
                w = normal(g, *p.shape, std=0.2, mean=0.0 if gemma else 1.0)
            elif "wte" in key or "embed_tokens" in key:
                w = normal(g, *p.shape, std=p.shape[1] ** -0.5 if gemma else 0.25)
            elif "wpe" in key:
                w = normal(g, *p.shape, std=0.2)
            else:
                conv1d = spec["family"] == "gpt2" and key.startswith("transformer.h.")
                w = normal(g, *p.shape, std=1.2 * (p.shape[0] if conv1d else p.shape[1]) ** -0.5)
            p.copy_(w.float())
    model.generation_config = transformers.GenerationConfig(eos_token_id=None, bos_token_id=None,
                                                            pad_token_id=cfg.get("pad_token_id"))
    save_model(model, directory)


def write_json(path, obj):
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def save_model(model, directory):
    os.makedirs(directory, exist_ok=True)
    model.save_pretrained(directory)
    extra = os.path.join(directory, "generation_config.json")
    if os.path.exists(extra):
        os.remove(extra)
    write_json(os.path.join(directory, "config.json"), read_json(os.path.join(directory, "config.json")))


def old_config(cfg):
    """The config as releases before 5 wrote it: rope_theta and rope_scaling at the top, torch_dtype."""
    old = {k: v for k, v in cfg.items() if k not in ("rope_parameters", "dtype", "layer_types",
                                                     "_sliding_window_pattern", "use_bidirectional_attention")}
    rope = cfg["rope_parameters"]
    if cfg["model_type"] == "gemma3_text":
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["rope_scaling"] = None
        old["sliding_window_pattern"] = cfg["layer_types"].index("full_attention") + 1
        old.pop("tie_word_embeddings", None)         # the default: tied
    else:
        old["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        if cfg["model_type"] in ("qwen2", "qwen3"):
            old["sliding_window"], old["max_window_layers"] = 4, 0    # set, but use_sliding_window is false
    old["torch_dtype"], old["transformers_version"] = "float32", "4.50.0"
    return old


def token_stream(g, n, vocab):
    """Ids with something to learn: three times in five the next one follows from the last."""
    out = [int(torch.randint(1, vocab, (1,), generator=g))]
    while len(out) < n:
        follow = torch.rand(1, generator=g).item() < 0.6
        out.append((5 * out[-1] + 3) % (vocab - 1) + 1 if follow else int(torch.randint(1, vocab, (1,), generator=g)))
    return torch.tensor(out)


def make_case(name, case, spec):
    """input_ids, attention_mask, labels, position_ids, n_valid of one case."""
    vocab = spec["config"]["vocab_size"]
    kind = "left" if case == "left_pos" else case               # the same input, other positions
    g = generator("case", name, kind)
    T = spec["long_T"] if case == "long" else spec["T"]
    B = {"base": 2, "padtok": 2, "long": 1}.get(case, 3)
    ids = torch.stack([token_stream(g, T, vocab) for _ in range(B)])
    mask = torch.ones(B, T, dtype=torch.int64)
    labels = ids.clone()
    if case in ("base", "long"):
        holes = torch.rand(B, T, generator=g) < 0.2
        labels[holes] = -100
    if case == "base":
        labels[0, :3] = -100
    if case == "padtok":
        ids[torch.rand(B, T, generator=g) < 0.15] = 0
        ids[0, 4] = ids[1, 7] = 0
        labels = ids.clone()
    if kind in ("right", "left"):
        for row, length in ((1, T // 2), (2, T - 2)):
            pad = slice(length, T) if kind == "right" else slice(0, T - length)
            mask[row, pad] = 0
            ids[row, pad] = 0
            labels[row, pad] = -100
            # The first real token after left padding would be predicted from a padding position, whose
            # state depends on the attention kernel (a row with no key to see): not scored.
            labels[row, T - length if kind == "left" else 0] = -100
    positions = torch.arange(T).expand(B, T).contiguous()
    if case == "left_pos":
        positions = (mask.cumsum(1) - 1) * mask
    return dict(input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions,
                n_valid=(labels[:, 1:] != -100).sum())


def blocks_and_norm(model):
    inner = model.transformer if hasattr(model, "transformer") else model.model
    return (inner.h, inner.ln_f) if hasattr(inner, "h") else (inner.layers, inner.norm)


def loss_sum(logits, labels):
    """Sum of -ln p over labels other than -100, label t predicted from position t-1."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1),
                           ignore_index=-100, reduction="sum")


def forward(model, case, watch=False):
    """logits, mean loss and, if watched, the hidden states."""
    seen, hooks = {}, []
    if watch:
        blocks, norm = blocks_and_norm(model)
        first = lambda x: x[0] if isinstance(x, tuple) else x
        hooks.append(blocks[0].register_forward_pre_hook(
            lambda m, a, k: seen.__setitem__("hidden.0", first(a) if a else k["hidden_states"]), with_kwargs=True))
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(
                lambda m, a, y, i=i: seen.__setitem__("hidden.%d" % (i + 1), first(y))))
        hooks.append(norm.register_forward_hook(lambda m, a, y: seen.__setitem__("final_norm", y)))
    out = model(input_ids=case["input_ids"], attention_mask=case["attention_mask"],
                position_ids=case["position_ids"], use_cache=False)
    for h in hooks:
        h.remove()
    loss = loss_sum(out.logits, case["labels"]) / case["n_valid"]
    keep = case["attention_mask"][..., None] != 0
    seen = {k: v.detach() * keep for k, v in seen.items()}
    return out.logits, loss, seen


def trainable(model):
    return [(k, p) for k, p in model.named_parameters() if p.requires_grad]


def grad_of(p):
    return p.grad if p.grad is not None else torch.zeros_like(p)


def norm_of(tensors):
    return torch.stack([t.double().norm() for t in tensors]).norm()


def evaluate(model, case, naming=lambda k: k, watch=False):
    """Everything one case has, under the names of golden.safetensors without the case's prefix."""
    model.zero_grad(set_to_none=True)
    logits, loss, seen = forward(model, case, watch)
    loss.backward()
    keep = case["attention_mask"][..., None] != 0
    out = {"logits": logits.detach() * keep, "loss": loss.detach()}
    out.update(seen)
    for key, p in trainable(model):
        out["grad." + naming(key)] = grad_of(p).clone()
        out["gradnorm." + naming(key)] = grad_of(p).double().norm().to(p.dtype)
    out["grad_norm"] = norm_of(grad_of(p) for _, p in trainable(model)).to(loss.dtype)
    return out


def compare(floors, way, case_name, ours, stored):
    for key, value in ours.items():
        want = stored[key]
        kind = key.split(".")[0]
        if kind == "gradnorm":
            continue
        floors.add({"final_norm": "hidden"}.get(kind, kind), way, relative(value, want),
                   key.split(".", 1)[1] if kind == "grad" else key if kind in ("hidden", "final_norm") else None)


# ---------------------------------------------------------------------------- training

def make_train_data(name, spec, draw):
    """Five windows of two micro-batches of two rows, a few labels ignored, some rows padded."""
    g = generator("train", name, draw)
    shape = (TRAIN["windows"], TRAIN["accumulation"], 2, TRAIN_T)
    ids = torch.stack([token_stream(g, TRAIN_T, spec["config"]["vocab_size"]) for _ in range(math.prod(shape[:3]))])
    ids = ids.reshape(shape)
    mask = torch.ones(shape, dtype=torch.int64)
    labels = ids.clone()
    for w in range(shape[0]):
        mask[w, 1, 1, TRAIN_T - 2 - w:] = 0
        labels[w, 0, 0, :2] = -100
    ids[mask == 0] = 0
    labels[mask == 0] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def train_run(model, data, decay_vectors=True):
    """15 steps of AdamW on sum-of-losses / all valid tokens of the window, clipped to norm 1."""
    named = trainable(model)
    groups = [dict(params=[p for k, p in named if decay_vectors or p.ndim > 1], weight_decay=TRAIN["weight_decay"]),
              dict(params=[p for k, p in named if not decay_vectors and p.ndim == 1], weight_decay=0.0)]
    opt = torch.optim.AdamW([g for g in groups if g["params"]], lr=TRAIN["lr"], betas=tuple(TRAIN["betas"]),
                            eps=TRAIN["eps"], foreach=False)
    sched = transformers.get_cosine_schedule_with_warmup(opt, TRAIN["warmup"], TRAIN["steps"])
    log = dict(loss=[], grad_norm=[], lr=[], num_items=[])
    for step in range(TRAIN["steps"]):
        w = step % TRAIN["windows"]
        n = int((data["labels"][w][..., 1:] != -100).sum())
        opt.zero_grad(set_to_none=False)
        total = 0.0
        for micro in range(TRAIN["accumulation"]):
            logits = model(input_ids=data["input_ids"][w, micro], attention_mask=data["attention_mask"][w, micro],
                           use_cache=False).logits
            loss = loss_sum(logits, data["labels"][w, micro]) / n
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], TRAIN["max_grad_norm"], foreach=False)
        log["loss"].append(total)
        log["grad_norm"].append(norm.item())
        log["lr"].append(sched.get_last_lr()[0])
        log["num_items"].append(n)
        opt.step()
        sched.step()
    return log, {k: p.detach().clone() for k, p in named}


def is_key_bias(name, hidden):
    """Which elements are key biases: their gradient is rounding noise, which Adam blows up to lr."""
    if name.endswith("c_attn.bias"):
        return slice(hidden, 2 * hidden)
    return slice(None) if name.endswith("k_proj.bias") else None


def compare_training(floors, way, prefix, log, final, ref_log, ref_final, hidden):
    rel = lambda a, b: max(abs(x - y) / abs(y) for x, y in zip(a, b))
    floors.add(prefix + ".loss", way, rel(log["loss"], ref_log["loss"]))
    floors.add(prefix + ".grad_norm", way, rel(log["grad_norm"], ref_log["grad_norm"]))
    all_diffs, worst, worst_key = [], 0.0, None
    for key, p in final.items():
        diff = (p.double() - ref_final[key].double()).abs()
        bias = is_key_bias(key, hidden)
        if bias is not None:
            floors.add(prefix + ".key_bias_maxabs", way, diff[bias].max().item())
            keep = torch.ones_like(diff, dtype=torch.bool)
            keep[bias] = False
            diff = diff[keep]
        all_diffs.append(diff.reshape(-1))
        if diff.numel() and diff.max().item() > worst:
            worst, worst_key = diff.max().item(), key
    floors.add(prefix + ".param_maxabs", way, worst, worst_key)
    floors.add(prefix + ".param_q999", way, torch.quantile(torch.cat(all_diffs), 0.999).item())


def pack_log(log, log64):
    t = {k: torch.tensor(v, dtype=torch.int64 if k == "num_items" else torch.float64) for k, v in log.items()}
    t["loss_f64"] = torch.tensor(log64["loss"], dtype=torch.float64)
    t["grad_norm_f64"] = torch.tensor(log64["grad_norm"], dtype=torch.float64)
    return t


def stored_finals(final, run):
    """Layer 0 and all vectors (vectors only in the run that treats them differently); norms of the others."""
    whole = [k for k, p in final.items() if p.ndim == 1 or run == "train_all" and ".0." in k]
    return {("final." if k in whole else "final_norm.") + k: p if k in whole else p.double().norm()
            for k, p in final.items()}


# ---------------------------------------------------------------------------- adapters

def adapter_key(name):
    """A parameter's name in a PeftModel -> its key in adapter_model.safetensors."""
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(".default", "")


def save_adapter(model, directory, base_name):
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(directory)
    readme = os.path.join(directory, "README.md")
    if os.path.exists(readme):
        os.remove(readme)
    path = os.path.join(directory, "adapter_config.json")
    config = read_json(path)
    config["target_modules"] = sorted(config["target_modules"])      # PEFT keeps a set: no order of its own
    write_json(path, config)


def make_adapter(base_dir, name, lora_name, conf, directory):
    """An adapter in PEFT's format with a random B, so that every gradient is different from zero."""
    with Way("f32") as way:
        model = get_peft_model(way.load(base_dir), lora_config(conf))
    g = generator("lora", name, lora_name)
    with torch.no_grad():
        for key, p in sorted(trainable(model)):
            if "lora_A" in key:
                p.copy_(normal(g, *p.shape, std=0.14 * math.sqrt(48 / p.shape[1])).float())
            elif "lora_B" in key:
                p.copy_(normal(g, *p.shape, std=0.1).float())
    save_adapter(model, directory, name)


def lora_config(conf):
    return LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], task_type="CAUSAL_LM",
                      fan_in_fan_out="c_attn" in conf["target_modules"],
                      **{k: v for k, v in conf.items() if k not in ("merged", "cases")})


def load_adapter(way, base_dir, adapter_dir):
    model = PeftModel.from_pretrained(way.load(base_dir), adapter_dir, is_trainable=True)
    return way.cast(model).eval()


def make_lora(out, name, spec, cases, data, lora_name, conf, hidden, manifest):
    base, here = os.path.join(out, name), os.path.join(out, name, lora_name)
    make_adapter(base, name, lora_name, conf, os.path.join(here, "init"))
    floors, tensors, first = Floors(), {}, {}
    for way_name in WAYS:
        with Way(way_name) as way:
            evals = {}
            for case in conf.get("cases", ["base", "right"]):
                model = load_adapter(way, base, os.path.join(here, "init"))
                evals[case] = evaluate(model, cases[case], adapter_key)
            log, final = train_run(load_adapter(way, base, os.path.join(here, "init")), data)
            if way_name == "f32":
                first = dict(evals=evals, log=log, final=final)
                model = load_adapter(way, base, os.path.join(here, "init"))
                with torch.no_grad():
                    for key, p in trainable(model):
                        p.copy_(final[key])
                save_adapter(model, os.path.join(here, "final"), name)
                model = load_adapter(way, base, os.path.join(here, "final"))
                logits, loss, _ = forward(model, cases["base"])
                tensors["final.base.logits"], tensors["final.base.loss"] = logits.detach(), loss.detach()
                if conf.get("merged"):
                    before = {k: p.clone() for k, p in way.load(base).named_parameters()}
                    merged = load_adapter(way, base, os.path.join(here, "final")).merge_and_unload()
                    for key, p in merged.named_parameters():
                        if not torch.equal(p, before[key]):
                            tensors["merged." + key] = p.detach()
                    logits, loss, _ = forward(merged, cases["base"])
                    tensors["merged.base.logits"], tensors["merged.base.loss"] = logits.detach(), loss.detach()
                    floors.add("merged_vs_unmerged_logits", "f32", relative(logits.detach(), tensors["final.base.logits"]))
            else:
                for case in evals:
                    compare(floors, way_name, case, evals[case], first["evals"][case])
                compare_training(floors, way_name, "train", log, final, first["log"], first["final"], hidden)
            if way_name == "f64":
                for case in evals:
                    tensors[case + ".loss_f64"] = evals[case]["loss"]
                    tensors[case + ".grad_norm_f64"] = evals[case]["grad_norm"]
                tensors.update({"train." + k: v for k, v in pack_log(first["log"], log).items()})
    for case, values in first["evals"].items():
        for key, value in values.items():
            if key in ("loss", "grad_norm") or case == "base" and not key.startswith("gradnorm."):
                tensors[case + "." + key] = value
    save(os.path.join(here, "golden.safetensors"), tensors)
    keys = sorted(load_file(os.path.join(here, "init", "adapter_model.safetensors")))
    manifest[lora_name] = dict(cases=list(first["evals"]),
                               conf={k: v for k, v in conf.items() if k not in ("merged", "cases")},
                               first_keys=keys[:3], merged=bool(conf.get("merged")), tensors=len(keys))
    return floors.rows()


# ---------------------------------------------------------------------------- generation

def make_generate(directory, name, spec):
    vocab = spec["config"]["vocab_size"]
    with Way("f32") as way:
        model = way.load(directory)
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
                    eos_token_id=None, pad_token_id=0)
    t = {}
    for draw in range(50):                        # a prompt whose greedy path is nowhere close to a tie
        g = generator("generate", name, draw)
        prompt = token_stream(g, 9, vocab)[None]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        logits = torch.stack(out.logits, 1).float()
        top = logits.topk(2, -1).values
        margin = (top[..., 0] - top[..., 1]).min()
        if margin > 0.01 and len(set(out.sequences[0, 9:].tolist())) > 2:
            break
    else:
        raise SystemExit(name + ": no prompt with a clear greedy path")
    t["greedy.prompt_ids"], t["greedy.sequence"], t["greedy.logits"] = prompt, out.sequences, logits
    t["greedy.min_margin"] = margin
    ids = torch.stack([token_stream(g, 10, vocab) for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    out = model.generate(ids, attention_mask=mask, **settings)
    t["batch.prompt_ids"], t["batch.attention_mask"], t["batch.sequences"] = ids, mask, out.sequences
    t["batch.logits"] = torch.stack(out.logits, 1).float()

    from transformers.generation import logits_process as lp
    seen = t["greedy.sequence"][:, :-1]
    raw = t["greedy.logits"][:, -1]
    chain = [("repetition_penalty", lp.RepetitionPenaltyLogitsProcessor(PROCESSORS["repetition_penalty"])),
             ("temperature", lp.TemperatureLogitsWarper(PROCESSORS["temperature"])),
             ("top_k", lp.TopKLogitsWarper(PROCESSORS["top_k"])), ("top_p", lp.TopPLogitsWarper(PROCESSORS["top_p"]))]
    t["proc.input_ids"], t["proc.logits"], x = seen, raw, raw
    for key, processor in chain:
        t["proc." + key] = processor(seen, raw.clone())
        x = processor(seen, x.clone())
    t["proc.all"], t["proc.all_probs"] = x, x.softmax(-1)
    save(os.path.join(directory, "generate.safetensors"), t, dict(processors=json.dumps(PROCESSORS)))


# ---------------------------------------------------------------------------- one fixture

def save(path, tensors, metadata=None):
    """At most one metadata entry: safetensors writes several in an order of its own each time."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: torch.as_tensor(v).detach().contiguous().clone() for k, v in tensors.items()}, path,
              metadata=metadata or dict(format="pt"))


def make_cases(directory, cases, right_grad, with_grads, with_hidden):
    """golden.safetensors of a model directory; returns its floors."""
    floors, stored, tensors = Floors(), {}, {}
    for case, values in cases.items():
        tensors.update({case + "." + k: v for k, v in values.items()})
    for way_name in WAYS:
        with Way(way_name) as way:
            model = way.load(directory)
            for case in cases:
                got = evaluate(model, cases[case], watch=with_hidden)
                if way_name == "f32":
                    stored[case] = got
                else:
                    compare(floors, way_name, case, got, stored[case])
                if way_name == "f64":
                    tensors[case + ".loss_f64"] = got["loss"]
                    tensors[case + ".grad_norm_f64"] = got["grad_norm"]
    for case, values in stored.items():
        full = case == "base" or (case == "right" and right_grad)
        for key, value in values.items():
            kind = key.split(".")[0]
            if kind == "grad":
                keep = with_grads and full or case == "padtok" and key == "grad.model.embed_tokens.weight"
            elif kind == "gradnorm":                  # where the gradient itself is not stored
                keep = with_grads and not full and case in ("right", "left")
            elif kind in ("hidden", "final_norm"):
                keep = case == "base" and with_grads
            else:
                keep = True
            if keep and kind == "logits" and case == "long":
                tensors["long.logits_last4"] = value[:, -4:]
            elif keep:
                tensors[case + "." + key] = value
    save(os.path.join(directory, "golden.safetensors"), tensors)
    return floors.rows()


def make_fixture(out, name, spec, manifest, all_floors):
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    make_model(name, spec, directory)
    cfg = read_json(os.path.join(directory, "config.json"))
    hidden = cfg.get("hidden_size", cfg.get("n_embd"))
    configs = ["config.json"]
    cases = {case: make_case(name, case, spec) for case in spec["cases"]}
    if spec["family"] != "gpt2":
        write_json(os.path.join(directory, "config.old.json"), old_config(cfg))
        configs.append("config.old.json")
        check_config_form(directory, cases["base"])
    floors = make_cases(directory, cases, spec.get("right_grad"), with_grads=True, with_hidden=True)
    entry = dict(family=spec["family"], cases=sorted(cases), configs=configs, train=spec["train"],
                 dims=dict(spec["config"], T=spec["T"], long_T=spec.get("long_T"), train_T=TRAIN_T))

    if spec["train"]:
        make_training(directory, name, spec, floors, hidden)
        data = load_file(os.path.join(directory, "train_data.safetensors"))
        entry["lora"] = {}
        for lora_name, conf in spec["lora"].items():
            all_floors[name + "/" + lora_name] = make_lora(out, name, spec, cases, data, lora_name, conf, hidden,
                                                           entry["lora"])
    make_generate(directory, name, spec)
    all_floors[name] = floors
    manifest[name] = entry


def make_training(directory, name, spec, floors, hidden):
    """Draws training data until no element's path is a lottery (a gradient of pure rounding noise)."""
    for draw in range(1, 20):
        data = make_train_data(name, spec, draw)
        rows, files, largest = Floors(), {}, 0.0
        for run in spec["train"]:
            for way_name in WAYS:
                with Way(way_name) as way:
                    log, final = train_run(way.load(directory), data, decay_vectors=run == "train_all")
                if way_name == "f32":
                    ref_log, ref_final = log, final
                else:
                    compare_training(rows, way_name, run, log, final, ref_log, ref_final, hidden)
                if way_name == "f64":
                    files[run] = pack_log(ref_log, log)
            files[run].update(stored_finals(ref_final, run))
        table = rows.rows()
        largest = max([max(v for k, v in row.items() if k in WAYS) for q, row in table.items() if "param_maxabs" in q]
                      or [0.0])
        if largest < 1e-5:
            break
    else:
        raise SystemExit("%s: every draw of training data has noise above 1e-5" % name)
    save(os.path.join(directory, "train_data.safetensors"), data)
    for run, tensors in files.items():
        save(os.path.join(directory, run + ".safetensors"), tensors)
    floors.update(table)


def check_config_form(directory, case):
    """Transformers must compute the same bits from the old form of the config."""
    with Way("f32") as way:
        want = forward(way.load(directory), case)[0]
        old = os.path.join(directory, "old_form")
        os.makedirs(old)
        shutil.copy(os.path.join(directory, "config.old.json"), os.path.join(old, "config.json"))
        shutil.copy(os.path.join(directory, "model.safetensors"), old)
        got = forward(way.load(old), case)[0]
        shutil.rmtree(old)
    if not torch.equal(want, got):
        raise SystemExit(directory + ": config.old.json is another model")


def make_variant(out, name, variant, manifest, all_floors):
    source, directory = os.path.join(out, variant["of"]), os.path.join(out, name)
    spec = FIXTURES[variant["of"]]
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    weights = load_file(os.path.join(source, "model.safetensors"))
    cfg = read_json(os.path.join(source, "config.json"))
    entry = dict(family=spec["family"], configs=["config.json"])
    if name == "gpt2_noprefix":
        n = cfg["n_positions"]
        weights = {k.replace("transformer.", "", 1): v for k, v in weights.items()}
        for layer in range(cfg["n_layer"]):           # the causal mask that the published file carries
            weights["h.%d.attn.bias" % layer] = torch.tril(torch.ones(n, n)).reshape(1, 1, n, n)
        cfg = {k: cfg[k] for k in ("activation_function", "architectures", "initializer_range", "layer_norm_epsilon",
                                   "model_type", "n_embd", "n_head", "n_layer", "n_positions", "vocab_size")}
        cfg.update(attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, n_ctx=n, bos_token_id=1, eos_token_id=1)
    if "dtype" in variant:
        if variant["dtype"] == torch.float16:         # subnormals, down to the smallest
            g = generator("subnormal", name)
            for key, w in weights.items():
                tiny = torch.rand(w.shape, generator=g) < 0.02
                weights[key] = torch.where(tiny, normal(g, *w.shape, std=2e-5).float(), w)
        weights = {k: v.to(variant["dtype"]) for k, v in weights.items()}
        cfg["dtype"] = str(variant["dtype"]).split(".")[1]
    write_json(os.path.join(directory, "config.json"), cfg)
    if "shards" in variant:
        write_shards(directory, weights, variant["shards"])
    else:
        save(os.path.join(directory, "model.safetensors"), weights)
    if variant.get("same_values"):
        entry["same_values_as"] = variant["of"]
        check_same_values(directory, source, make_case(variant["of"], "base", spec))
    else:
        cases = {case: make_case(name, case, spec) for case in ("base", "right")}
        all_floors[name] = make_cases(directory, cases, False, with_grads=False, with_hidden=False)
        entry["cases"] = sorted(cases)
    manifest[name] = entry


def write_shards(directory, weights, n):
    keys, index = sorted(weights), {}
    for i in range(n):
        file = "model-%05d-of-%05d.safetensors" % (i + 1, n)
        part = keys[i * len(keys) // n:(i + 1) * len(keys) // n]
        save(os.path.join(directory, file), {k: weights[k] for k in part})
        index.update({k: file for k in part})
    size = sum(w.numel() * w.element_size() for w in weights.values())
    write_json(os.path.join(directory, "model.safetensors.index.json"),
               dict(metadata=dict(total_size=size), weight_map=index))


def check_same_values(directory, source, case):
    with Way("f32") as way:
        if not torch.equal(forward(way.load(directory), case)[0], forward(way.load(source), case)[0]):
            raise SystemExit(directory + " is another model than " + source)


# ---------------------------------------------------------------------------- operators

def attention_op(scale, window, mask):
    """q, y [B,H,T,D]; k, v [B,KV,T,D]; query i sees keys j with mask[j], j <= i and i - j < window."""
    def op(q, k, v):
        B, H, T, _ = q.shape
        groups = H // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        see = (j <= i) & ((i - j < window) | (window == 0))
        see = see[None, None] & (mask[:, None, None, :] != 0)
        p = (q @ k.transpose(-1, -2) * scale).masked_fill(~see, -math.inf)
        p = torch.nan_to_num(p.softmax(-1), nan=0.0)            # a padding row sees no key
        return (p @ v) * (mask[:, None, :, None] != 0)
    return op


def rms_norm(eps, offset=0.0):
    return lambda x, weight: x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (weight + offset)


def rope_op(inv_freq, positions):
    """x [B,T,H,D]: the first half of D rotates with the second."""
    def op(x):
        a = (positions[..., None].float() * inv_freq.float())[:, :, None, :].to(x.dtype)
        c, s = a.cos(), a.sin()
        lo, hi = x.chunk(2, -1)
        return torch.cat([lo * c - hi * s, hi * c + lo * s], -1)
    return op


def dora(x, weight, bias, lora_A, lora_B, magnitude):
    """The norm is a constant in the backward pass, as in PEFT."""
    scale = 2.0
    norm = (weight + scale * lora_B @ lora_A).norm(dim=1).detach()
    return magnitude / norm * (F.linear(x, weight) + scale * F.linear(F.linear(x, lora_A), lora_B)) + bias


def make_ops(out, all_floors):
    t, attrs, floors = {}, {}, {}

    def record(name, op, inputs, fixed=None, dy=None, attr=None, zero_dy=None):
        """y and gradients of sum(y * dy) in float64 from float32 inputs; the float32 run is the floor."""
        g = generator("ops", name, "dy")
        results = {}
        for dtype in (torch.float64, torch.float32):
            leaves = {k: v.to(dtype).detach().requires_grad_() for k, v in inputs.items()}
            y = op(**leaves)
            if dy is None:
                dy = normal(g, *y.shape).float()
                if zero_dy is not None:
                    dy = dy * zero_dy
            (y * dy.to(dtype)).sum().backward()
            results[dtype] = dict(y=y.detach(), **{"d" + k: v.grad for k, v in leaves.items()})
        exact, single = results[torch.float64], results[torch.float32]
        floors[name] = max(relative(single[k], exact[k]) for k in exact if exact[k] is not None)
        for k, v in list(inputs.items()) + list((fixed or {}).items()) + [("dy", dy)]:
            t["%s.%s" % (name, k)] = v
        for k, v in exact.items():
            t["%s.%s" % (name, k)] = v.float()
        if attr:
            attrs[name] = attr

    def rand(name, **shapes):
        g = generator("ops", name)
        return {k: normal(g, *s).float() for k, s in shapes.items()}

    note = ("query row i sees keys j <= i, and i - j < window if window > 0, and attention_mask[j] = 1; "
            "y and dy are 0 at padding rows")
    for name, (B, H, KV, T, D, window, pad) in {
            "attn_mha": (2, 3, 3, 9, 5, 0, None), "attn_gqa": (1, 4, 2, 9, 6, 0, None),
            "attn_mqa": (1, 3, 1, 9, 10, 0, None), "attn_gqa_window": (1, 4, 2, 9, 6, 4, None),
            "attn_gqa_right": (2, 2, 1, 9, 5, 0, "right"), "attn_gqa_window_right": (2, 2, 1, 9, 5, 4, "right"),
            "attn_gqa_window_left": (2, 2, 1, 9, 5, 4, "left"),
            "attn_long": (1, 2, 1, 97, 2, 0, None), "attn_long_window": (1, 2, 1, 97, 2, 33, None)}.items():
        mask = torch.ones(B, T, dtype=torch.int64)
        if pad:
            mask[1, slice(T - 4, T) if pad == "right" else slice(0, 4)] = 0
        scale = D ** -0.5
        record(name, attention_op(scale, window, mask),
               rand(name, q=(B, H, T, D), k=(B, KV, T, D), v=(B, KV, T, D)), fixed=dict(attention_mask=mask),
               zero_dy=(mask[:, None, :, None] != 0).float(),
               attr=dict(layout="q,y [B,H,T,D]; k,v [B,KV,T,D]", note=note, scale=scale, window=window))

    g = generator("ops", "ids")
    ids = torch.randint(0, 19, (2, 9), generator=g)
    ids[0, 3] = ids[1, 2] = 5
    for name, op, attr in (("embedding", lambda weight: F.embedding(ids, weight), None),
                           ("embedding_padding_idx", lambda weight: F.embedding(ids, weight, padding_idx=5),
                            dict(padding_idx=5)),
                           ("embedding_scaled", lambda weight: F.embedding(ids, weight) * 11 ** 0.5,
                            dict(scale=11 ** 0.5))):
        record(name, op, rand(name, weight=(19, 11)), fixed=dict(ids=ids), attr=attr)

    lin = dict(x=(7, 19), weight=(11, 19), bias=(11,))
    conv = dict(x=(7, 19), weight=(19, 11), bias=(11,))
    ab = dict(lora_A=(4, 19), lora_B=(11, 4))
    record("linear", F.linear, rand("linear", **lin))
    record("conv1d", lambda x, weight, bias: x @ weight + bias, rand("conv1d", **conv),
           attr=dict(note="GPT-2's Conv1D: weight is [in, out]"))
    record("lora_linear", lambda x, weight, bias, lora_A, lora_B: F.linear(x, weight, bias) + 2.0 * F.linear(
        F.linear(x, lora_A), lora_B), rand("lora_linear", **lin, **ab), attr=dict(scale=2.0))
    record("lora_conv1d", lambda x, weight, bias, lora_A, lora_B: x @ weight + bias + 2.0 * F.linear(
        F.linear(x, lora_A), lora_B), rand("lora_conv1d", **conv, **ab), attr=dict(scale=2.0))
    inputs = rand("dora_linear", **lin, **ab)
    inputs["magnitude"] = inputs["weight"].norm(dim=1) * (1 + 0.1 * rand("dora_magnitude", m=(11,))["m"])
    record("dora_linear", dora, inputs, attr=dict(scale=2.0))
    del t["dora_linear.dweight"]

    for name, rows, offset, scale in (("rmsnorm", (5, 37), 0.0, 1.0), ("rmsnorm_gemma", (5, 37), 1.0, 1.0),
                                      ("rmsnorm_small", (5, 37), 0.0, 1e-3), ("rmsnorm_head", (2, 3, 5, 10), 1.0, 1.0)):
        inputs = rand(name, x=rows, weight=(rows[-1],))
        inputs["x"] *= scale
        record(name, rms_norm(1e-6, offset), inputs,
               attr=dict(eps=1e-6, **(dict(weight_offset=1) if offset else {})))
    record("layernorm", lambda x, weight, bias: F.layer_norm(x, (37,), weight, bias, 1e-5),
           rand("layernorm", x=(5, 37), weight=(37,), bias=(37,)), attr=dict(eps=1e-5))

    line = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 60.0, -60.0, 100.0, -100.0])])
    for name, op in (("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
                     ("gelu_new", lambda x: F.gelu(x, approximate="tanh")), ("gelu_erf", lambda x: F.gelu(x)), ("silu", lambda x: F.silu(x))):
        record(name, op, dict(x=line.clone()))
    record("swiglu", lambda gate, up: F.silu(gate) * up, rand("swiglu", gate=(5, 37), up=(5, 37)))
    record("geglu", lambda gate, up: F.gelu(gate, approximate="tanh") * up, rand("geglu", gate=(5, 37), up=(5, 37)))
    target = rand("mse_target", target=(7, 5))["target"]
    record("mse", lambda x: F.mse_loss(x, target.to(x.dtype)), rand("mse", x=(7, 5)), fixed=dict(target=target),
           dy=torch.tensor(1.0), attr=dict(note="mean over all elements"))

    positions = torch.stack([torch.arange(13), torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 90])])
    for name, theta, factor in (("rope", 1e4, 1), ("rope_linear8", 1e6, 8)):
        inv = (1.0 / theta ** (torch.arange(0, 10, 2).float() / 10)) / factor
        record(name, rope_op(inv, positions), rand(name, x=(2, 13, 1, 10)), fixed=dict(position_ids=positions),
               attr=dict(layout="B,T,H,D", theta=theta, **(dict(factor=factor) if factor != 1 else {})))

    sum_note = "y and dlogits are of the SUM over valid rows; the mean's are these / n_valid"
    for name, rows, scale in (("xent", 11, 2.0), ("xent_large", 11, 60.0), ("xent_all_ignored", 3, 2.0)):
        g = generator("ops", name, "labels")
        labels = torch.randint(0, 53, (rows,), generator=g)
        labels[torch.arange(rows) % 4 == 1 if rows > 3 else slice(None)] = -100
        inputs = rand(name, logits=(rows, 53))
        inputs["logits"] *= scale
        record(name, lambda logits: F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), inputs,
               fixed=dict(labels=labels), dy=torch.tensor(1.0),
               attr=dict(n_valid=int((labels != -100).sum()), note=sum_note))

    make_rope_tables(t, attrs)
    make_optimizer_ops(t, attrs)
    save(os.path.join(out, "ops.safetensors"), t, dict(attrs=json.dumps(attrs, sort_keys=True)))
    write_json(os.path.join(out, "ops.json"), attrs)
    all_floors["ops"] = {k: dict(f32=float("%.3g" % v), tol=tolerance(v, 1e-6)) for k, v in sorted(floors.items())}


def make_rope_tables(t, attrs):
    positions = torch.tensor([0, 1, 2, 100, 1000, 4095, 8191, 32767, 131071])
    for name, rope in (("default", dict(rope_type="default", rope_theta=1e6)),
                       ("linear", dict(rope_type="linear", rope_theta=1e6, factor=8.0)),
                       ("llama3", dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0, original_max_position_embeddings=8192))):
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=dict(rope))
        exact = 1.0 / rope["rope_theta"] ** (torch.arange(0, 16, 2).double() / 16)
        if name == "default":
            inv = 1.0 / rope["rope_theta"] ** (torch.arange(0, 16, 2).float() / 16)
        else:
            inv, attention_factor = ROPE_INIT_FUNCTIONS[name](config, "cpu")
            assert attention_factor == 1.0
        if name == "linear":
            exact = exact / rope["factor"]
        if name == "llama3":                       # long waves are slowed down, short ones kept, a ramp between
            wave = 2 * math.pi / exact
            context, factor = rope["original_max_position_embeddings"], rope["factor"]
            ramp = (context / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            ramp = ramp.clamp(0, 1)
            exact = exact / factor * (1 - ramp) + exact * ramp
        assert relative(inv, exact) < 1e-6
        key = "rope_table_" + name
        angle, angle64 = positions[:, None].float() * inv, positions[:, None].double() * exact
        both = lambda x: torch.cat([x, x], -1)
        t.update({key + ".position_ids": positions, key + ".inv_freq": inv, key + ".inv_freq_f64": exact,
                  key + ".cos": both(angle.cos()), key + ".sin": both(angle.sin()),
                  key + ".cos_f64": both(angle64.cos()), key + ".sin_f64": both(angle64.sin())})
        attrs[key] = dict(rope, head_dim=16)


def make_optimizer_ops(t, attrs):
    for name, decay in (("adamw", 0.01), ("adamw_no_decay", 0.0)):
        g = generator("ops", name)
        p = normal(g, 17).float().requires_grad_()
        grads = normal(g, 6, 17).float()
        grads[:, 3] = 0                                  # never moved but by the decay
        lrs = torch.tensor([0.0, 1e-3, 2e-3, 1e-3, 5e-4, 1e-4], dtype=torch.float64)
        opt = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay, foreach=False)
        t.update({name + ".p0": p.detach().clone(), name + ".grads": grads, name + ".lr": lrs})
        steps = []
        for lr, grad in zip(lrs, grads):
            opt.param_groups[0]["lr"] = lr.item()
            p.grad = grad.clone()
            opt.step()
            steps.append(p.detach().clone())
        t[name + ".p"] = torch.stack(steps)
        attrs[name] = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=decay)
    for name, scale in (("clip_above", 1.0), ("clip_below", 0.01)):
        g = generator("ops", name)
        parts = [torch.nn.Parameter(torch.zeros(5, 7)), torch.nn.Parameter(torch.zeros(9))]
        for part in parts:
            part.grad = normal(g, *part.shape, std=scale).float()
        t[name + ".a"], t[name + ".b"] = parts[0].grad.clone(), parts[1].grad.clone()
        t[name + ".norm"] = torch.nn.utils.clip_grad_norm_(parts, 1.0, foreach=False)
        t[name + ".a_clipped"], t[name + ".b_clipped"] = parts[0].grad, parts[1].grad
        attrs[name] = dict(max_norm=1.0, coefficient="min(1, max_norm / (norm + 1e-6))")
    for kind, make in (("cosine", transformers.get_cosine_schedule_with_warmup),
                       ("linear", transformers.get_linear_schedule_with_warmup)):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        sched, lrs = make(opt, 10, 100), []
        for _ in range(100):
            lrs.append(sched.get_last_lr()[0])
            opt.step()
            sched.step()
        t["schedule_" + kind + ".lr"] = torch.tensor(lrs, dtype=torch.float64)
        attrs["schedule_" + kind] = dict(base_lr=3e-4, warmup=10, total=100, note="lr[i] is used by step i (from 0)")


# ---------------------------------------------------------------------------- all of it

def recommended(all_floors):
    """One figure for all fixtures: the widest tolerance of each quantity."""
    out = {}
    for name, rows in all_floors.items():
        if name == "ops" or name.startswith("_"):
            continue
        for quantity, row in rows.items():
            floor = max(v for k, v in row.items() if k in WAYS)
            best = out.setdefault(general(quantity), dict(floor=0.0, tol=0.0))
            best["floor"], best["tol"] = max(best["floor"], floor), max(best["tol"], row["tol"])
    return dict(sorted(out.items()))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ap.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    ap.add_argument("--only", default="", help="comma-separated fixtures; the others stay as they are")
    args = ap.parse_args()
    only = [x for x in args.only.split(",") if x]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    os.makedirs(args.out, exist_ok=True)

    fixtures, floors = {}, {}
    if only:
        fixtures = read_json(os.path.join(args.out, "manifest.json"))["fixtures"]
        floors = {k: v for k, v in read_json(os.path.join(args.out, "floors.json")).items() if k != "_recommended"}
    for name, spec in FIXTURES.items():
        if not only or name in only:
            print(name, flush=True)
            make_fixture(args.out, name, spec, fixtures, floors)
    for name, variant in VARIANTS.items():
        if not only or name in only:
            print(name, flush=True)
            make_variant(args.out, name, variant, fixtures, floors)
    if not only or "ops" in only:
        print("ops", flush=True)
        make_ops(args.out, floors)
    write_json(os.path.join(args.out, "floors.json"), dict(_recommended=recommended(floors), **floors))
    write_json(os.path.join(args.out, "manifest.json"),
               dict(fixtures=fixtures, lora=LORA, new_tokens=NEW_TOKENS, processors=PROCESSORS, seed=SEED, train=TRAIN,
                    set="small", versions=dict(peft=peft.__version__, torch=torch.__version__,
                                               transformers=transformers.__version__)))


if __name__ == "__main__":
    main()
