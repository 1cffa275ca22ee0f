"""What every rank has all of: the first gradients are compared, where they aren't summed."""

import pytest
import torch
from lorafast.bench.distributed.collectives import Collectives
from ranks import device, mesh_of, on_ranks
from test_tensor_parallel import EXACT, error, whole
from torch import nn

import lorafast

pytestmark = pytest.mark.slow

K, HEADS, SIZE = 8, 4, 3
MESSAGE = r"^between\.weight is replicated, and each rank has another gradient.*Shard\(-1\)"


class Model(nn.Module):
    """Trained norms of the whole x, and, between the cut layers, of each head."""

    def __init__(self):
        super().__init__()
        self.norm, self.between = nn.RMSNorm(K), nn.RMSNorm(SIZE)
        self.up, self.down = nn.Linear(K, HEADS * SIZE), nn.Linear(HEADS * SIZE, K)

    def forward(self, x):
        heads = self.up(self.norm(x)).unflatten(-1, (-1, SIZE))
        return self.down(self.between(heads).flatten(-2))


def model(between=True):
    torch.manual_seed(3)
    made = lorafast.adapt(Model().double(), 2, ["up", "down"])
    for name, parameter in made.named_parameters():
        if "lora_" in name or "norm" in name or "between" in name:
            nn.init.normal_(parameter)
            parameter.requires_grad_(between or "between" not in name)
    return made.to(device())


def cut(made, **more):
    from lorafast.parallel import Colwise, Rowwise, parallelize

    return parallelize(made, mesh_of(), {"up": Colwise(), "down": Rowwise(), **more})


def gradients(of, factor=1.0):
    torch.manual_seed(4)
    x = torch.randn(5, K, dtype=torch.float64, device=device())
    (of(x).square().sum() * factor).backward()
    found = {name: whole(p.grad) for name, p in of.named_parameters() if p.grad is not None}
    of.zero_grad()
    return found


def worst(found, expected):
    assert found.keys() == expected.keys()
    return {name for name, gradient in expected.items() if error(found[name], gradient) > EXACT}


def _refused(rank):
    """Left without a style, or given the wrong one; once it has a gradient, which it hasn't at first."""
    from lorafast.parallel import Replicated, local

    for more in ({}, {"between": Replicated()}):
        two = cut(model(), **more)
        assert not gradients(two, factor=0.0)["between.weight"].any()
        for _ in range(2):  # it isn't forgotten
            with pytest.raises(ValueError, match=MESSAGE) as raised:
                gradients(two)
            assert "\n" not in str(raised.value)
    local.Local._compare = lambda self, name, gradient: None
    return worst(gradients(cut(model())), gradients(model()))


def test_what_reads_a_part_and_is_not_summed_is_refused():
    """Without the comparison its gradient, and no other, is wrong on each rank."""
    assert on_ranks(_refused) == [{"between.weight"}] * 2


def _summed(rank):
    from torch.distributed.tensor import Shard

    from lorafast.parallel import Replicated

    summed = Replicated(input_layouts=Shard(-1))
    for made, more in ((model(), {"between": summed}), (model(between=False), {})):
        two = cut(made, **more)
        sent = []
        for _ in range(2):
            with Collectives() as counted:
                found = gradients(two)
            assert not worst(found, gradients(model("between" in more)))
            sent.append([c.shape for c in counted.calls if c.backward])
        first, second = sent
        for shape in second:
            first.remove(shape)
        assert first == [(K,), (2,)]  # the norm's gradient, and whether it is another


def test_what_is_summed_or_whole_is_compared_once():
    on_ranks(_summed)


def _differs(rank):
    from lorafast.parallel.replicas import differs

    mesh, ones = mesh_of(), torch.ones(3, device=device())
    for dtype, rounding, step in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.03, 0.3)):
        assert differs((ones + rank * rounding).to(dtype), mesh) is False
        assert differs((ones + rank * step).to(dtype), mesh) is True
        assert differs((ones * rank).to(dtype), mesh) is True
        assert differs((ones * 0).to(dtype), mesh) is None
        assert differs((ones / (ones - 1)).to(dtype), mesh) is None


def test_to_half_the_digits():
    on_ranks(_differs)
