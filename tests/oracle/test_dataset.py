"""Real data: what is counted in it and what is learnt of it, against Transformers' tokenizers and PEFT's loss."""
import json
import os

import pytest

from common import GOLDEN, check_log, load, make_adapter, max_positions, mft, pad_rows, read_log, shared, train, trained_models
from dataset_counts import alpaca_samples, all_cases, jsonl
from transformers import PreTrainedTokenizerFast

ASSETS = shared("assets")
needs_assets = pytest.mark.skipif(not os.path.exists(os.path.join(ASSETS, "text", "seed_tasks.jsonl")), reason="counts over real data: no shared assets")


@needs_assets
def test_counts_are_reproducible():
    """tests/golden/dataset_counts.json, which test_dataset.c loads by auto-detection, is what Transformers says today:
    WikiText-2, PubMedQA, MMLU, seed tasks, tiny Shakespeare and stories with three tokenizers."""
    with open(os.path.join(GOLDEN, "dataset_counts.json")) as f:
        assert json.load(f) == all_cases(ASSETS)


@needs_assets
@pytest.mark.parametrize("directory", trained_models())
def test_masked_loss_on_real_data(directory, tmp_path):
    """Eight instructions of the seed tasks on a small trained model, the prompts masked: padded, packed, one by one and
    two by four have the loss and gradient norm that PEFT has on the same masks, from the same adapter."""
    seq = 512 if max_positions(directory) >= 512 else 256
    tok = PreTrainedTokenizerFast.from_pretrained(directory)     # tokenizer.json as it is, whatever class goes with config.json
    tok.eos_token = tok.eos_token or "<|endoftext|>"              # GPT-2's class knows it, its files need not say it
    tok.model_max_length = 1 << 40
    rows, lines = [], []
    for task in jsonl(os.path.join(ASSETS, "text", "seed_tasks.jsonl")):
        line = dict(instruction=task["instruction"], **task["instances"][0])
        with open(tmp_path / "one.jsonl", "w", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        (ids, labels), = alpaca_samples(tok, tmp_path / "one.jsonl")
        if len(ids) <= seq:
            rows.append(dict(input_ids=ids, labels=[t if m else -100 for t, m in zip(ids, labels)]))
            lines.append(json.dumps(line) + "\n")
        if len(rows) == 8:
            break
    assert len(rows) == 8
    with open(tmp_path / "tasks.jsonl", "w", encoding="utf-8") as f:
        f.writelines(lines)
    init = make_adapter(directory, str(tmp_path / "init"))
    want = train(load(directory, init, trainable=True), [pad_rows(rows)], 1, 1e-3)
    for flags in (["--no-pack", "--batch-size", 8], ["--no-pack", "--grad-accum-steps", 8],
                  ["--no-pack", "--batch-size", 2, "--grad-accum-steps", 4], ["--batch-size", 8]):
        mft("finetune", "--model", directory, "--data", tmp_path / "tasks.jsonl", "--output", tmp_path / "out", "--adapter", init,
            "--no-shuffle", "--seq-len", seq, "--epochs", 1, "--lr", "1e-3", "--lr-scheduler", "constant", "--weight-decay", 0,
            "--max-grad-norm", 0, "--log", tmp_path / "log.jsonl", *flags)
        check_log(read_log(tmp_path / "log.jsonl"), want)
