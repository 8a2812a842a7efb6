"""Token ids to the mean of every layer's hidden states: how an encoder is run on the CPU.

BERT, which the default encoder is, runs on packed tokens: the tokens of all texts side by side and no padding, each
product once for the batch with its weights in oneDNN's own layout and what follows it (activation, residual) within it.
Any other architecture runs as transformers has it, on padded batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear

SPARE_TOKENS = 64
"""Padding that costs less than one more batch does."""


class Forward(Protocol):
    def batches(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """Rows with so many tokens in batches of at most `most` that are run well together."""
        ...

    def __call__(self, ids: Sequence[Sequence[int]], depth: int) -> Tensor:
        """Mean hidden states [n, depth + 1, dims], float32, of a batch of texts as token ids: of the embeddings, which
        are layer 0, and of the first `depth` layers."""
        ...


def alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in batches of at most `most` whose padding is at most a quarter of their tokens and SPARE_TOKENS."""
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        width = lengths[row]
        tokens += width
        if not batches or len(batches[-1]) == most or width * (len(batches[-1]) + 1) > 1.25 * tokens + SPARE_TOKENS:
            batches.append([])
            tokens = width
        batches[-1].append(row)
    return batches


def forward_of(model: Any) -> Forward:
    """The fastest way that is known to run this encoder of transformers."""
    return PackedBert(model) if PackedBert.runs(model.config) else Padded(model)


class Padded:
    """Any encoder of transformers, as it is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def batches(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        return alike(lengths, most)

    @torch.inference_mode()
    def __call__(self, ids: Sequence[Sequence[int]], depth: int) -> Tensor:
        width = max(map(len, ids))
        tokens = torch.zeros((len(ids), width), dtype=torch.long)
        mask = torch.zeros((len(ids), width))
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1.0
        hidden = self._model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        weights = mask / mask.sum(1, keepdim=True)
        means = [torch.einsum("btd,bt->bd", layer.float(), weights) for layer in hidden[: depth + 1]]
        return torch.stack(means, 1)


class Product:
    """x @ weight.T + bias for x [tokens, inputs], alone or with what follows it, by the operators that torch's compiler
    emits for CPU; where torch was built without oneDNN, by its own."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._packed = torch._C._has_mkldnn
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_TOKENS) if self._packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return linear(x, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        if not self._packed:
            return gelu(linear(x, self._weight, self._bias))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], "none")
        return out

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        if not self._packed:
            return linear(x, self._weight, self._bias).add_(term)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, term, self._weight, self._bias, "add")
        return out


_EXPECTED_TOKENS = 1024
"""Of a batch of 16; the layout is chosen for it."""


class PackedBert:
    """A BERT encoder's layers on packed tokens. Takes the weights over; the model given must not be used after."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._heads = int(config.num_attention_heads)
        place = model.embeddings
        self._words = place.word_embeddings.weight.detach()
        self._places = (place.position_embeddings.weight + place.token_type_embeddings.weight[0]).detach()
        self._norm = _norm(place.LayerNorm)
        self._layers = [_Layer(layer, self._heads) for layer in model.encoder.layer]

    @staticmethod
    def runs(config: Any) -> bool:
        """Whether an encoder of this configuration computes what this class does."""
        return (
            config.model_type == "bert"
            and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and config.hidden_act == "gelu"
            and not config.is_decoder
        )

    def batches(self, lengths: Sequence[int], most: int) -> list[list[int]]:
        """By length, so that what a long text needs of memory is needed once."""
        rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
        return [rows[begin : begin + most] for begin in range(0, len(rows), most)]

    @torch.inference_mode()
    def __call__(self, ids: Sequence[Sequence[int]], depth: int) -> Tensor:
        lengths = [len(text) for text in ids]
        tokens = torch.tensor([token for text in ids for token in text])
        places = torch.cat([torch.arange(length) for length in lengths])
        x = self._norm(embedding(tokens, self._words) + embedding(places, self._places))
        share = torch.zeros(len(ids), len(tokens))
        for row, part in zip(share, torch.split(torch.arange(len(tokens)), lengths), strict=True):
            row[part] = 1 / len(part)
        means = [share @ x.float()]
        for layer in self._layers[:depth]:
            x = layer(x, lengths)
            means.append(share @ x.float())
        return torch.stack(means, 1)


class _Layer:
    def __init__(self, layer: Any, heads: int) -> None:
        attention = layer.attention
        parts = attention.self.query, attention.self.key, attention.self.value
        self._heads = heads
        self._dims = parts[0].out_features // heads
        # The scores' scale goes into the queries; a power of two or not, it is rounded once.
        scales = self._dims**-0.5, 1.0, 1.0
        weight = torch.cat([part.weight.detach() * scale for part, scale in zip(parts, scales, strict=True)])
        bias = torch.cat([part.bias.detach() * scale for part, scale in zip(parts, scales, strict=True)])
        self._qkv = Product(weight, bias)
        self._mix = _product(attention.output.dense)
        self._mixed = _norm(attention.output.LayerNorm)
        self._widen = _product(layer.intermediate.dense)
        self._narrow = _product(layer.output.dense)
        self._narrowed = _norm(layer.output.LayerNorm)

    def __call__(self, x: Tensor, lengths: list[int]) -> Tensor:
        x = self._mixed(self._mix.plus(self._attend(self._qkv(x), lengths), x))
        return self._narrowed(self._narrow.plus(self._widen.gelu(x), x))

    def _attend(self, qkv: Tensor, lengths: list[int]) -> Tensor:
        """Each text over itself. Two products and a softmax a text are faster than torch's fused attention, which is
        made for long texts."""
        out = qkv.new_empty(len(qkv), self._heads * self._dims)
        for given, taken in zip(torch.split(qkv, lengths), torch.split(out, lengths), strict=True):
            q, k, v = given.view(-1, 3, self._heads, self._dims).permute(1, 2, 0, 3).unbind(0)
            shares = torch.bmm(q, k.transpose(1, 2)).float().softmax(-1).to(qkv.dtype)
            taken.view(-1, self._heads, self._dims).copy_(torch.bmm(shares, v).transpose(0, 1))
        return out


def _product(module: Any) -> Product:
    return Product(module.weight.detach(), module.bias.detach())


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach(), module.bias.detach()
    return lambda x: layer_norm(x, weight.shape, weight, bias, module.eps)
