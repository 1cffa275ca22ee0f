"""What Transformers' own methods do with a model whose output head is adapted."""

import copy
import pickle

import pytest
import torch
from models import adapted, llama_config

import lorafast
from lorafast.convert.kinds import adapted_layers
from lorafast.nn import LoRAEmbedding, LoRALinear

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 1, 4]])
OLD = 19


def llama(tied):
    return transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=tied))


def bart(tied):
    config = transformers.BartConfig(
        vocab_size=OLD,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
        scale_embedding=True,
        tie_word_embeddings=tied,
    )
    return transformers.BartForConditionalGeneration(config)


def t5(tied):
    config = transformers.T5Config(
        vocab_size=OLD,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(params=[(llama, False), (llama, True), (bart, True), (t5, False), (t5, True)],
                ids=["llama", "llama-tied", "bart-tied", "t5", "t5-tied"])  # fmt: skip
def plain(request):
    make, tied = request.param
    torch.manual_seed(0)
    return make(tied).double().eval()


@pytest.fixture
def model(plain, draw_adapters):
    return draw_adapters(lorafast.adapt(plain, 2, ["lm_head"]))


def logits(model):
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(IDS, **inputs).logits.detach()


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["shared", "q_proj", "q"]], ids=lambda t: t[0]
)
@pytest.mark.parametrize("size", [11, 23, OLD], ids=["smaller", "larger", "same"])
@pytest.mark.parametrize("make", [bart, t5])
def test_embeddings_that_the_model_has_in_several_places(
    make, size, targets, draw_adapters, assert_same
):
    torch.manual_seed(0)
    plain = make(True).double().eval()
    ends = [name.rpartition(".")[2] for name, _ in plain.named_modules()]
    targets = [name for name in targets if name in ends]
    model = draw_adapters(lorafast.adapt(plain, 2, targets, use_dora=True))
    expected, before = logits(model), adapted_layers(model)
    assert any(isinstance(layer, LoRAEmbedding) for layer in before.values())
    model.resize_token_embeddings(size, mean_resizing=False)
    assert adapted_layers(model) == before
    kept = min(size, OLD)
    assert_same(logits(model)[..., :kept], expected[..., :kept])
    weight = model.get_input_embeddings().weight
    for layer in before.values():
        if isinstance(layer, LoRAEmbedding):
            assert layer.weight is weight
            assert layer.num_embeddings == size
    model(IDS, decoder_input_ids=IDS)


@pytest.mark.parametrize("size", [11, 23, OLD], ids=["smaller", "larger", "same"])
@pytest.mark.parametrize("mean_resizing", [False, True], ids=["normal", "mean"])
def test_resize_token_embeddings(size, mean_resizing, model, assert_same):
    expected, tied = logits(model), model.lm_head.weight is model.get_input_embeddings().weight
    head = model.lm_head
    embeddings = model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    assert embeddings is model.get_input_embeddings()
    assert model.config.vocab_size == size
    assert model.lm_head is head
    assert (head.out_features, *head.weight.shape) == (size, size, head.in_features)
    assert (model.lm_head.weight is embeddings.weight) == tied
    kept = min(size, OLD)
    actual = logits(model)
    assert actual.shape[-1] == size
    assert_same(actual[..., :kept], expected[..., :kept])
    assert head.lora_B[kept:].count_nonzero() == 0
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    logits(model)
    model(IDS, labels=IDS).loss.backward()
    assert head.lora_B.grad.shape == (size, 2)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_resizing_leaves_what_is_trained_as_it_was(trained, model):
    model.lm_head.weight.requires_grad_(trained)  # of a tied head the input embedding, too
    model.resize_token_embeddings(OLD + 5, mean_resizing=False)
    assert model.lm_head.weight.requires_grad == trained


@pytest.mark.filterwarnings("error:these layers:UserWarning")
def test_a_resized_head_is_not_said_to_get_no_gradient(plain):
    inner = next(n for n, m in plain.named_modules() if n.endswith(("q_proj", ".q")))
    model = lorafast.adapt(plain, 2, [inner, "lm_head"])
    model.resize_token_embeddings(OLD + 5, mean_resizing=False)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.lora_B.grad is not None
    assert not any(row.no_gradient for row in lorafast.summary(model).layers)


def test_a_merged_head_is_resized(model, assert_same):
    model.lm_head.merge()
    expected = logits(model)
    model.resize_token_embeddings(23, mean_resizing=False)
    assert_same(logits(model)[..., :OLD], expected)


def test_an_error_leaves_the_head_in_place(model, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("full")

    monkeypatch.setattr(transformers.PreTrainedModel, "_resize_token_embeddings", fail)
    with pytest.raises(RuntimeError, match="full"):
        model.resize_token_embeddings(23)
    assert adapted(model) == {"lm_head"}


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_resizes_itself(make, model, assert_same):
    expected, copied = logits(model), make(model)
    copied.resize_token_embeddings(23, mean_resizing=False)
    assert_same(logits(copied)[..., :OLD], expected)
    assert_same(logits(model), expected)


def test_merging_gives_the_method_back(model):
    lorafast.merge(model)
    assert "resize_token_embeddings" not in vars(model)
    model.resize_token_embeddings(23, mean_resizing=False)
    assert model.lm_head.out_features == 23


def test_tying_and_new_embeddings_keep_the_adapter(model, assert_same):
    expected, tied = logits(model), model.lm_head.weight is model.get_input_embeddings().weight
    model.tie_weights()
    assert_same(logits(model), expected)
    embeddings = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(embeddings)
    model.tie_weights()
    assert (model.lm_head.weight is embeddings.weight) == tied
    assert_same(logits(model), expected)
    assert type(model.get_output_embeddings()) is LoRALinear


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_generate_with_every_cache(cache, model):
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, cache_implementation=cache, **options), expected)


def test_merging_a_tied_head_says_that_the_config_must_not_tie_it(
    draw_adapters, tmp_path, assert_same
):
    model = draw_adapters(lorafast.adapt(llama(True).double().eval(), 2, ["lm_head"]))
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"lm_head\.weight \(set model\.config\.tie_word_embedd"):
        lorafast.merge(model)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_same(logits(loaded), expected)
