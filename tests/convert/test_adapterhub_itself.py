"""Files of AdapterHub's ``adapters``, held against that package, where it is installed (1.3.0 was)."""

import pytest
import torch

from lorafast.convert import load_adapterhub, save_adapterhub
from lorafast.convert.bottlenecks import bottlenecks

adapters = pytest.importorskip("adapters")
transformers = pytest.importorskip("transformers")

NORMED_AFTER = {"original_ln_after": False, "residual_before_ln": False}
CONFIGS = {
    "houlsby": ("DoubleSeqBnConfig", {"scaling": 0.7}),
    "houlsby-output": ("DoubleSeqBnConfig", {"mh_adapter": False, "non_linearity": "gelu_new"}),
    "houlsby-no-residual-flag": ("DoubleSeqBnConfig", {"residual_before_ln": False}),
    "pfeiffer": ("SeqBnConfig", {"leave_out": [0]}),
    "pfeiffer-after-norm": ("SeqBnConfig", NORMED_AFTER),
    "pfeiffer-both": ("SeqBnConfig", {"mh_adapter": True, "scaling": 1.3}),
    "parallel": ("ParBnConfig", {}),
    "parallel-both": ("ParBnConfig", {"mh_adapter": True, "original_ln_before": True}),
}
NOT_IN_LLAMA = ("pfeiffer-both", "parallel", "parallel-both")


def model_of(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"{family}Model")(config).double().eval()


def output_of(model):
    return model(torch.arange(14).view(2, 7) + 1).last_hidden_state.detach()


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Llama", "Mistral"])
@pytest.mark.parametrize("config", CONFIGS)
def test_both_ways(tmp_path, family, config):
    name, options = CONFIGS[config]
    theirs = model_of(family)
    plain = output_of(theirs)
    adapters.init(theirs)
    theirs.add_adapter("a", config=getattr(adapters, name)(reduction_factor=4, **options))
    theirs.set_active_adapters("a")
    theirs.double().eval()
    for parameter_name, parameter in theirs.named_parameters():
        if ".adapters." in parameter_name:
            # In float32, in which it loads what it reads.
            parameter.data = (0.3 * torch.randn(parameter.shape)).double()
    expected = output_of(theirs)
    assert (expected - plain).norm() > 0.1 * plain.norm()
    theirs.save_adapter(str(tmp_path / "theirs"), "a", use_safetensors=True)
    ours = model_of(family)
    if family in ("Llama", "Mistral") and config in NOT_IN_LLAMA:
        with pytest.raises(ValueError, match="no module"):
            load_adapterhub(ours, tmp_path / "theirs")
        assert not bottlenecks(ours)
        return
    load_adapterhub(ours, tmp_path / "theirs")
    assert (output_of(ours) - expected).norm() < 1e-12 * expected.norm()
    save_adapterhub(ours, tmp_path / "ours", "back")
    other = model_of(family)
    adapters.init(other)
    other.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True)
    other.double().eval()
    assert (output_of(other) - expected).norm() < 1e-12 * expected.norm()
