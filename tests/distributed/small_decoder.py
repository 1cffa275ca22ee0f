"""A small decoder in plain PyTorch, with the names of a Llama: what is sharded, trained and compared."""

import torch
import torch.nn.functional as F
from ranks import device, own_draws
from torch import Tensor, nn

WIDTH, HEADS, INNER, LAYERS, VOCABULARY = 32, 4, 48, 2, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Attention(nn.Module):
    """Causal self-attention. The number of heads is read off the projections: a rank may have a part."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """What is sharded, checkpointed and compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Tokens ``[batch, length]`` to logits ``[batch, length, VOCABULARY]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    """The same weights on every call, on the CPU."""
    with own_draws():
        torch.manual_seed(1)
        return Decoder().to(dtype)


def tokens(batch: int, length: int = 8, seed: int = 2) -> Tensor:
    """Token ids ``[batch, length]``; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator).to(device())


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    logits = model(ids)[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def fill_adapters(model: nn.Module) -> None:
    """Gives every trained parameter values that depend on its name and shape alone: B isn't 0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with own_draws(), torch.no_grad():
                torch.manual_seed(sum(name.replace("module.", "").encode()))
                parameter.add_((torch.randn(parameter.shape) * 0.1).to(parameter.device))
