"""`mft generate` against Transformers' greedy search, token by token."""
import os

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from common import GOLDEN, copy_model, load, make_adapter, mft, trained_models

PROMPTS = {"stories": ["Once upon a time", "One day, Lily and her friend"],
           "shakespeare": ["ROMEO:\nO", "The king", "What, ho!"]}


def generate(directory, prompt, n, *flags):
    return mft("generate", "--model", directory, "--prompt", prompt, "--max-tokens", n, "--temperature", 0, "--json",
               *flags).json()


def reference(directory, prompt, n, adapter=None):
    tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))     # AutoTokenizer goes by the model's type
    ids = torch.tensor([tok.encode(prompt).ids])
    model = load(directory, adapter)
    stop = model.generation_config.eos_token_id
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                             eos_token_id=stop, pad_token_id=0)
    return ids[0].tolist(), out[0, ids.shape[1]:].tolist(), tok, stop


def check(directory, prompt, n, *flags, adapter=None):
    prompt_ids, ids, tok, stop = reference(directory, prompt, n, adapter)
    got = generate(directory, prompt, n, *flags)
    stops = set(stop if isinstance(stop, list) else [stop])
    drop = lambda seq: [t for t in seq if t not in stops]          # whether the stop token itself is listed is open
    assert drop(got["tokens"]) == drop(ids)
    assert got["text"] == tok.decode(drop(ids), skip_special_tokens=True)


@pytest.mark.parametrize("directory", trained_models())
def test_greedy_of_trained_models(directory):
    for prompt in PROMPTS["stories" if "stories" in directory else "shakespeare"]:
        check(directory, prompt, 48)


def tiny_with_tokenizer(tmp_path):
    """A random GPT-2 with the small byte-level tokenizer of the goldens."""
    torch.manual_seed(1)
    directory = str(tmp_path / "tiny")
    tok = os.path.join(GOLDEN, "assets", "tokenizers", "gpt2-tiny")
    vocab = Tokenizer.from_file(os.path.join(tok, "tokenizer.json")).get_vocab_size()
    config = GPT2Config(vocab_size=vocab, n_positions=64, n_embd=20, n_head=2, n_layer=2,
                        bos_token_id=None, eos_token_id=None, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(directory)
    for name in os.listdir(tok):
        with open(os.path.join(tok, name), "rb") as src, open(os.path.join(directory, name), "wb") as dst:
            dst.write(src.read())
    return directory


def test_greedy_of_tiny_model(tmp_path):
    directory = tiny_with_tokenizer(tmp_path)
    for prompt in ("The river", "héllo 河", "1234 5", "x"):
        check(directory, prompt, 20)


def test_greedy_with_adapter(tmp_path):
    directory = tiny_with_tokenizer(tmp_path)
    adapter = make_adapter(directory, str(tmp_path / "adapter"), seed=4)
    check(directory, "The river", 20, "--adapter", adapter, adapter=adapter)


def test_sampling_is_seeded(tmp_path):
    directory = tiny_with_tokenizer(tmp_path)
    sample = lambda seed, *flags: mft("generate", "--model", directory, "--prompt", "The river", "--max-tokens", 24,
                                      "--temperature", "1.5", "--seed", seed, "--json", *flags).json()["tokens"]
    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(2, 7)}) > 1
    assert sample(1, "--top-k", 1) == sample(2, "--top-k", 1)      # one candidate: greedy whatever the seed
    assert sample(1, "--top-p", "1e-6") == sample(2, "--top-k", 1)


def test_text_alone_on_stdout(tmp_path):
    directory = tiny_with_tokenizer(tmp_path)
    want = generate(directory, "The river", 12)["text"]
    said = mft("generate", "--model", directory, "--prompt", "The river", "--max-tokens", 12, "--temperature", 0)
    assert want in said.out
