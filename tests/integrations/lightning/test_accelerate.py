"""The callback ``Accelerate`` of Lightning: when it is done, what it says, what it refuses."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafast
from lorafast.integrations.lightning import Accelerate

SAID = "lorafast: 2 of 2 adapter layers are fast"


class Module(LightningModule):
    def __init__(self, late=False, peft=True):
        super().__init__()
        self.peft, self.model = peft, None
        if not late:
            self.configure_model()

    def configure_model(self):
        if self.model is None:
            self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
            if self.peft:
                self.model = get_peft_model(self.model, LoraConfig(r=2, target_modules=["0", "1"]))

    def training_step(self, x, index):
        return self.model(x).square().mean()

    def predict_step(self, x, index):
        return self.model(x)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[Accelerate(**options)],
    )  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["", "configure_model"])
def test_layers_are_fast_and_it_is_said_once(tmp_path, capsys, late):
    module = Module(late)
    trainer(tmp_path).fit(module, torch.randn(1, 2, 8))
    assert capsys.readouterr().out.count(SAID) == 1
    assert lorafast.explain(module).summary in SAID


def test_without_training(tmp_path, capsys):
    module = Module(late=True)
    trainer(tmp_path, quiet=True).predict(module, torch.randn(1, 2, 8))
    assert lorafast.explain(module).summary in SAID
    assert "lorafast" not in capsys.readouterr().out


def test_without_a_layer_of_peft(tmp_path):
    with pytest.raises(ValueError, match="none of PEFT's adapter layers"):
        trainer(tmp_path).fit(Module(peft=False), torch.randn(1, 2, 8))
