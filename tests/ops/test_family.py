"""LoRA with vectors, LoKr and OFT as operations: the contract, every gradient, what is kept."""

import pytest
import torch
from toy_formats import FORMATS, held

from lorafast import functional, ops, reference
from lorafast.reference import contract

pytestmark = pytest.mark.usefixtures("toy_formats")
