import torch
from lorafast.bench.common.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")


def test_saved_counts_a_storage_once_and_no_parameter():
    x = torch.randn(100, 10, requires_grad=True)
    weight = torch.randn(10, 10)

    def forward():
        y = x * x  # x twice
        return y @ weight  # weight, a parameter, for dx

    assert saved_bytes(forward, [weight]) == x.nbytes
    assert saved_bytes(forward, []) == x.nbytes + weight.nbytes


def test_peak_is_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.empty(1 << 20)  # freed at once
        held = [torch.empty(1 << 20) for _ in range(2)]
        del held

    assert peak_bytes(call, CPU) == 2 * 4 << 20
    assert peak_bytes(lambda: None, CPU) == 0
