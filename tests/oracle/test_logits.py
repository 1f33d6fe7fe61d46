"""`mft logits` against Transformers: every model, every form of its config, every adapter."""
import json
import os

import pytest

from common import (GOLDEN, all_models, copy_model, golden_models, hf_logits, load, max_positions, mft_logits, missing,
                    random_tokens, relative, shared)

TOLERANCE = 5e-5      # ten times the noise between Transformers' own kernels, the worst of all fixtures (floors.json)


@pytest.mark.parametrize("directory", all_models())
def test_logits(directory, tmp_path):
    tokens = random_tokens(directory, (3, min(37, max_positions(directory))))
    assert relative(mft_logits(directory, tokens, tmp_path), hf_logits(load(directory), tokens)) < TOLERANCE


@pytest.mark.parametrize("directory", golden_models() + golden_models(shared("golden"), "shared"))
def test_config_forms(directory, tmp_path):
    """The same bits from every form of the config that lies beside config.json."""
    forms = [f for f in sorted(os.listdir(directory)) if f.startswith("config.") and f != "config.json"]
    tokens = random_tokens(directory, (2, 11))
    want = mft_logits(directory, tokens, tmp_path)
    for form in forms:
        model = copy_model(directory, tmp_path / form, form)
        assert (mft_logits(model, tokens, tmp_path) == want).all(), form


def adapters():
    out = []
    for root, label in ((GOLDEN, "golden"), (shared("golden"), "shared")):
        manifest = os.path.join(root, "manifest.json")
        if not os.path.exists(manifest):
            out.append(pytest.param(None, None, id=label + " adapters", marks=missing(label + " adapters").marks))
            continue
        with open(manifest) as f:
            fixtures = json.load(f)["fixtures"]
        for name in sorted(fixtures):
            for lora in sorted(fixtures[name].get("lora", {})):
                for state in ("init", "final"):
                    out.append(pytest.param(os.path.join(root, name), os.path.join(root, name, lora, state),
                                            id="%s/%s/%s/%s" % (label, name, lora, state)))
    return out


@pytest.mark.parametrize("directory,adapter", adapters())
def test_adapter_logits(directory, adapter, tmp_path):
    tokens = random_tokens(directory, (2, 19), seed=2)
    got = mft_logits(directory, tokens, tmp_path, adapter)
    assert relative(got, hf_logits(load(directory, adapter), tokens)) < TOLERANCE
    assert relative(got, hf_logits(load(directory), tokens)) > 1e-3       # the adapter does something
