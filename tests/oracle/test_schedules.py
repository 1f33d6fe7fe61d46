"""The learning rate of every step of `mft finetune` against transformers' schedules: kinds, warm-up, ratio, floor."""
import json
import math
import os

import numpy as np
import pytest
import torch
import transformers

from common import GOLDEN, mft

STEPS, PEAK = 23, 3e-3


def reference(kind, warmup, floor):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if kind == "constant":
        sched = transformers.get_constant_schedule_with_warmup(opt, warmup)
    elif kind == "linear":
        sched = transformers.get_linear_schedule_with_warmup(opt, warmup, STEPS)
    elif floor:
        sched = transformers.get_cosine_with_min_lr_schedule_with_warmup(opt, warmup, STEPS, min_lr=floor)
    else:
        sched = transformers.get_cosine_schedule_with_warmup(opt, warmup, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(sched.get_last_lr()[0])
        opt.step()
        sched.step()
    return rates


@pytest.mark.parametrize("kind, flags, warmup, floor", [
    ("constant", ["--warmup-steps", 5], 5, 0),
    ("linear", [], 0, 0),
    ("linear", ["--warmup-ratio", 0.1], math.ceil(0.1 * STEPS), 0),
    ("cosine", ["--warmup-steps", 4], 4, 0),
    ("cosine", ["--warmup-ratio", 0.3, "--lr-min", 4e-4], math.ceil(0.3 * STEPS), 4e-4),
    ("cosine", ["--lr-min", 1e-3], 0, 1e-3),
])
def test_rates(tmp_path, kind, flags, warmup, floor):
    data, log = str(tmp_path / "ids.bin"), str(tmp_path / "log")
    (np.arange(200, dtype=np.int32) * 7 % 50).tofile(data)
    mft("finetune", "--model", os.path.join(GOLDEN, "qwen2"), "--data", data, "--format", "tokens", "--seq-len", 8, "--max-steps", STEPS,
        "--lr", PEAK, "--lr-scheduler", kind, "--output", tmp_path / "out", "--log", log, *flags)
    with open(log) as f:
        got = [json.loads(line)["lr"] for line in f]
    assert len(got) == STEPS
    assert np.abs(np.array(got) - np.array(reference(kind, warmup, floor))).max() < 1e-17
