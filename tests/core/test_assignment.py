"""An assignment is of integers: what isn't is refused when it is made."""

import re

import pytest
import torch

from lorafast.core.assignment import Assignment

NO_INTEGERS = {
    "floats": ([0.5, 1, -1], "adapter_of holds 0.5 at 0, expected integers"),
    "truths": ([0, True], "adapter_of holds True at 1, expected integers"),
    "a number": (1, "adapter_of is a int, expected a sequence of integers or a tensor"),
    "text": ("01", "adapter_of is a str, expected a sequence"),
    "float tensor": (torch.tensor([0.7, 1.2]), "adapter_of is torch.float32, expected integers"),
    "mask": (torch.tensor([True, False]), "adapter_of is torch.bool, expected integers"),
}


@pytest.mark.parametrize(("adapter_of", "sentence"), NO_INTEGERS.values(), ids=NO_INTEGERS)
def test_what_is_not_integers_is_refused(adapter_of, sentence):
    with pytest.raises(TypeError, match=re.escape(sentence)):
        Assignment(adapter_of)


@pytest.mark.parametrize("adapter_of", [[0, -1, 2], (0, -1, 2), torch.tensor([0, -1, 2]).char()])
def test_integers(adapter_of):
    made = Assignment(adapter_of)
    assert made.adapter_of == [0, -1, 2]
    assert made.elements == 3
    assert torch.equal(made.tensor(), torch.tensor([0, -1, 2]))
