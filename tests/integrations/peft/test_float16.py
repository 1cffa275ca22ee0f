"""Float32 adapters over a float16 layer: what they make on the way is beyond float16."""

import pytest
import torch

pytest.importorskip("peft")

from peft_twins import TOKENS, K, N, assert_equal, peft_model, twins

pytestmark = pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
ROWS = ["default", "__base__", "other1", "other2", "other1"]
CASES = {
    "linear": {},
    "linear, three adapters": {"adapters": 3},
    "conv1d": {"kind": "conv1d"},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora, conv1d": {"use_dora": True, "kind": "conv1d"},
    "embedding": {"kind": "embedding"},
    "embedding, two adapters": {"kind": "embedding", "adapters": 2},
    "mixed batch": {"adapters": 3},
    "alora": {"alora_invocation_tokens": [1]},
    "alora, dropout": {"alora_invocation_tokens": [1], "lora_dropout": 0.3},
}


def made(case, factor):
    """The pair, an input and arguments; ``A`` is ``factor`` times as large and ``B`` as small."""
    model = peft_model(dtype=torch.float16, upcast=True, **CASES[case])
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "embedding_A" in name:
            parameter.data *= factor
        elif "lora_B" in name or "embedding_B" in name:
            parameter.data /= factor
    tokens = "embedding" in case
    x = torch.randint(TOKENS, (5, 4)) if tokens else torch.randn(5, 4, K).half()
    mixed = case == "mixed batch"
    pair = twins(model.eval() if mixed else model, ["default"] if case == "dora, dropout" else [])
    if "alora" in case:
        return pair, x, {"alora_offsets": [1, None, 4, 2, 0]}
    return pair, x, {"adapter_names": ROWS} if mixed else {}


@pytest.mark.parametrize("factor", [1e6, 1.0, 1e-6], ids="A x {}".format)
@pytest.mark.parametrize("case", CASES)
def test_an_activation_that_float16_has_not(case, factor, served_by_peft):
    pair, x, arguments = made(case, factor)
    assert_equal(pair, x, torch.randn(5, 4, N).half(), torch.float16, **arguments)
    assert served_by_peft == []


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_float16_has_not(case, served_by_peft):
    """``ds`` of a young adapter: what comes back through a small ``B``."""
    pair, x, arguments = made(case, 1e5)
    dy = (torch.randn(5, 4, N) * 1e-3).half()
    assert_equal(pair, x, dy, torch.float16, **arguments)
    assert served_by_peft == []
