import pytest
from lorafast.bench.common.shapes import MODELS, Shape, of_model, parse


def test_sizes_and_names_mix():
    assert parse(["512,2048,1024"], [8]) == [Shape("", 512, 2048, 1024)]
    shapes = parse(["minilm,llama-8b", "1,2,3"], [8, 16])
    assert len(shapes) == 2 * 3 + 2 * 4 + 1
    assert shapes[0] == Shape("minilm q,k,v,o", 8, 384, 384, bias=True)


def test_layers_of_equal_size_come_once():
    labels = {shape.label: (shape.K, shape.N) for shape in of_model(MODELS["llama-8b"], 1)}
    assert labels == {
        "llama-8b q,o": (4096, 4096),
        "llama-8b k,v": (4096, 1024),
        "llama-8b gate,up": (4096, 14336),
        "llama-8b down": (14336, 4096),
    }


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("tinyllama", 1.10e9), ("llama-1b", 1.24e9), ("llama-8b", 8.03e9), ("qwen-32b", 32.8e9),
     ("llama-70b", 70.6e9)],
)  # fmt: skip
def test_sizes_give_the_published_number_of_parameters(model, parameters):
    m = MODELS[model]
    block = sum(K * N for K, N in m.linears.values())
    embeddings = m.vocabulary * m.hidden * (1 if model == "llama-1b" else 2)  # its head is tied
    assert m.layers * block + embeddings == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("word", ["llama-9b", "1,2,x"])
def test_other_words_are_refused_by_name(word):
    with pytest.raises(ValueError, match="is neither M,K,N nor one of minilm"):
        parse([word], [1])


@pytest.mark.parametrize("word", ["1,2", "0,2,3", "", "1,2,3,4", "1,,3", "1.0,2,3", f"1,2,{2**31}"])
def test_sizes_that_are_none_are_refused(word):
    with pytest.raises(ValueError, match=f"shape '{word}' is not M,K,N: whole numbers from 1 to"):
        parse([word], [1])
