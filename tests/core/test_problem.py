"""How matrices, and stacks of them, lie in memory."""

import pytest
import torch

from lorafast.core.problem import Layout


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(4, 8, 16), (4, 6, 4), (3, 6, 4), (3, 8, 16), (5, 1, 2), (2, 4, 8)],
    ids=str,
)
def test_of_a_stack_it_is_what_holds_for_each_matrix(rows, columns, expected):
    stack = torch.zeros(3, rows, columns, dtype=torch.bfloat16)
    found = Layout.of(stack)
    assert found.rows == expected
    assert found.rows == min(Layout.of(matrix).rows for matrix in stack)


def test_of_a_stack_whose_matrices_begin_anywhere():
    memory = torch.zeros(3, 4 * 8 + 1, dtype=torch.bfloat16)
    stack = memory[:, : 4 * 8].view(3, 4, 8)
    assert Layout.of(stack).rows == 2
    assert Layout.of(stack.mT) == Layout(0, 2)
