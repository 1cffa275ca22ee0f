import pytest

from ptx import In, TensorMap
from ptx.handwritten import numbers
from ptx.tensormap import encode

MAP = {
    "address": 4096,
    "element_bytes": 2,
    "sizes": (64, 10),
    "strides": (128,),
    "box": (64, 8),
    "swizzle": 128,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ()}, "rank is 0, expected 1 to 5"),
        ({"sizes": (1,) * 6}, "rank is 6"),
        ({"box": (64,)}, "box has 1 numbers, expected 2"),
        ({"strides": ()}, "strides has 0 numbers, expected 1"),
        ({"address": 4104}, "address is 0x1008, expected a multiple of 16"),
        ({"address": 0}, "address is 0x0"),
        ({"sizes": (64, 0)}, "size 1 is 0"),
        ({"sizes": (2**32 + 1, 10)}, r"size 0 is 4294967297, expected 1 to 2\*\*32"),
        ({"strides": (136,)}, "stride 1 is 136 bytes, expected a multiple of 16"),
        ({"strides": (2**40,)}, "stride 1 is 1099511627776 bytes"),
        ({"box": (64, 257)}, "box 1 is 257, expected 1 to 256"),
        ({"box": (4, 8), "swizzle": 0}, "8 bytes a row, expected a multiple of 16"),
        ({"box": (128, 8)}, "256 bytes a row, more than the swizzle's 128"),
        ({"box": (32, 8), "swizzle": 32}, "64 bytes a row, more than the swizzle's 32"),
        ({"swizzle": 96}, "swizzle is 96, expected one of 0, 32, 64, 128"),
        ({"element_strides": (1, 9)}, "element stride 1 is 9, expected 1 to 8"),
        ({"interleave": 1}, "no interleaved layouts"),
        ({"fill_nan": True}, "dtype is uint16, and only a float"),
        ({"dtype": "float32"}, "dtype float32 has 4 bytes an element, not 2"),
        ({"dtype": "tfloat32"}, "dtype is 'tfloat32', expected one of uint8"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_tensor_map_that_cannot_be_is_refused(change, message):
    assert len(encode(**MAP)) == 128
    with pytest.raises(ValueError, match=message):
        encode(**(MAP | change))


def test_a_tensor_whose_fastest_dimension_is_not_dense_has_no_map():
    x = numbers(64).reshape(8, 8).T[:, :4]
    with pytest.raises(ValueError, match="stride of 8, expected 1"):
        TensorMap(In("x", x), (4, 4)).encoded(4096)
