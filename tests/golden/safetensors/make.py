"""Writes the files of this folder with the reference package (safetensors, huggingface_hub, torch).

    python make.py

values(n): a fixed sequence that tests/test_safetensors.c makes as well.
"""
import os
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))


def values(n, first=0):
    return torch.tensor([((first + i) * 37 % 101 - 50) / 8 for i in range(n)], dtype=torch.float32)


# what tests/test_safetensors.c saves too: the bytes must be equal
named = {
    "b.weight": values(15).reshape(3, 5),
    "a.weight": values(42, 5).reshape(2, 3, 7),
    "half": values(5, 9).to(torch.float16),
    "brain": values(12, 11).to(torch.bfloat16).reshape(4, 3),
    "ids": torch.tensor([3, -100, 1 << 40], dtype=torch.int64),
    "small ids": torch.tensor([[1, -2], [3, 2**31 - 1]], dtype=torch.int32),
    "mask": torch.tensor([0, 1, 2, 253, 254, 255, 7], dtype=torch.uint8),
    'na\u00efve "q" \\ \n\t\x01 \U0001f642': values(1, 3),
    "scalar": torch.tensor(2.5),
}
save_file(named, os.path.join(HERE, "saved.safetensors"), metadata={"format": "pt"})

# every dtype, also those we only step over
save_file({
    "f64": values(3).double(), "f32": values(3), "f16": values(3).half(), "bf16": values(3).bfloat16(),
    "i64": torch.arange(3), "i32": torch.arange(3, dtype=torch.int32), "i16": torch.arange(3, dtype=torch.int16),
    "i8": torch.arange(3, dtype=torch.int8), "u8": torch.arange(3, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]), "empty": torch.zeros(0, 4), "five": torch.zeros(1, 2, 1, 2, 1),
    "f8": values(3).to(torch.float8_e4m3fn),
}, os.path.join(HERE, "dtypes.safetensors"))

# a snapshot of three shards with its index
os.makedirs(os.path.join(HERE, "sharded"), exist_ok=True)
save_torch_state_dict({f"layers.{i}.weight": values(40, i).reshape(8, 5) for i in range(7)},
                      os.path.join(HERE, "sharded"), max_shard_size=500)
