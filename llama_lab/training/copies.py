"""Where in a model copies of weights are hung for training in low precision, and which weights share one."""

from dataclasses import dataclass

from torch import Tensor, nn

from llama_lab.model.llama import Block, Llama
from llama_lab.model.products import MULTIPLE_FP8, WeightCopy
from llama_lab.training.buckets import GradientBuckets


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a copy.

    Attributes:
        holder, attribute: the module that uses it, and by which name.
        weights: what it is a copy of, in the order that the module expects.
        is_inside: whether it is inside a block, where products may be of float8.
        is_added_once: whether nothing but its products adds to the weights' gradients.
    """

    holder: nn.Module
    attribute: str
    weights: tuple[Tensor, ...]
    is_inside: bool = True
    is_added_once: bool = True


def slots(model: Llama) -> list[Slot]:
    """All places of a model, in its order. Norms between product and rotation keep queries, keys and values apart."""
    found: list[Slot] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, ffn = block.attention, block.ffn
        heads = (attention.q, attention.k, attention.v)
        if attention.q_norm is None:
            found.append(Slot(attention, "joined", tuple(layer.weight for layer in heads)))
        else:
            found += [Slot(layer, "copy", (layer.weight,)) for layer in heads]
        found.append(Slot(attention.o, "copy", (attention.o.weight,)))
        found.append(Slot(ffn, "joined", (ffn.gate.weight, ffn.up.weight)))
        found.append(Slot(ffn.down, "copy", (ffn.down.weight,)))
    if model.output is not None:
        found.append(Slot(model.output, "copy", (model.output.weight,), is_inside=False))
    else:
        # The embedding, whose gradient as a table of inputs autograd adds.
        found.append(Slot(model, "tied_copy", (model.embedding.weight,), is_inside=False, is_added_once=False))
    return found


def hang(places: list[Slot], buckets: GradientBuckets, *, is_fp8: bool) -> list[WeightCopy]:
    """Fill the places with copies, whose sums are the buckets'. Weights of odd sizes and the projection to the vocabulary stay in
    bfloat16."""
    copies: list[WeightCopy] = []
    for place in places:
        fits = all(size % MULTIPLE_FP8 == 0 for weight in place.weights for size in weight.shape)
        copy = WeightCopy(place.weights, buckets.total(place.weights[0]), is_fp8=is_fp8 and place.is_inside and fits)
        setattr(place.holder, place.attribute, copy)
        copies.append(copy)
    return copies


def take_down(places: list[Slot]) -> None:
    """Leave the model as it was."""
    for place in places:
        setattr(place.holder, place.attribute, None)
