import pytest
import torch
from models import adapted
from torch import nn

import lorafast

# Modules that read a weight without calling its layer


def test_the_output_projection_of_multihead_attention_is_refused(unchanged):
    attention = nn.MultiheadAttention(6, 2)
    with unchanged(attention), pytest.raises(TypeError, match=r"out_proj.*without calling it"):
        lorafast.adapt(attention, 2, ["out_proj"])
    with (
        unchanged(attention),
        pytest.raises(ValueError, match=r"no nn\.Linear left"),
        pytest.warns(UserWarning, match=r"out_proj: nn\.MultiheadAttention reads"),
    ):
        lorafast.adapt(attention, 2)


def test_layers_of_mamba_whose_weight_is_read_are_left_as_they_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    # In training its fused kernel takes x_proj, dt_proj and out_proj as bare weights; dt_proj always.
    with pytest.warns(UserWarning, match=r"left as they are: .*mixer\.dt_proj"):
        lorafast.adapt(model, 2)
    assert adapted(model) == {"backbone.layers.0.mixer.in_proj"}
    model.train()(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.lora_B.grad.count_nonzero() > 0
