"""What goes wrong at the two ends: the embedding and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from aprcore.causes.scene import REFERENCE, Entry, Float64, Scene, Trial, single, stages

EMBEDDING, HEAD = stages("embedding"), stages("lm_head")
_TABLE, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# The head is streamed whole for these; larger ones are left to the judgment's own figures.
LARGEST_HEAD = 1 << 28


def _other_rows(scene: Scene) -> Iterator[Trial]:
    for step in (1, -1, 2, -2):
        tokens = (scene.site.tokens + step) % scene.config.vocab_size
        yield f"{step:+d}", scene.run(site=replace(scene.site, tokens=tokens))


def _other_tokens(scene: Scene) -> Iterator[Trial]:
    tokens = scene.site.tokens
    if tokens.size < 2:
        return
    padded = np.concatenate([tokens[:1] * 0, tokens[:-1]])
    for name, other in (
        ("the token before", np.roll(tokens, 1)), ("the token before (0 first)", padded),
        ("the token after", np.roll(tokens, -1)),
        ("the first token", np.full_like(tokens, tokens[0])),
        ("the last token", np.full_like(tokens, tokens[-1])),
        ("token 0", tokens * 0), ("the reversed tokens", tokens[::-1]),
    ):  # fmt: skip
        yield name, scene.run(site=replace(scene.site, tokens=other))


def _scaled(scene: Scene) -> Iterator[Trial]:
    root = math.sqrt(scene.config.hidden_size)
    yield "sqrt(E)", scene.plain.value * root
    if scene.in_file:
        yield "1/sqrt(E)", scene.plain.value / root


def _transposed_table(scene: Scene) -> Float64 | None:
    table = scene.site.weight(_TABLE)
    vocab, hidden = table.shape
    if vocab * hidden > LARGEST_HEAD:
        return None
    flat = table.read(0, vocab).reshape(-1)
    index = np.arange(hidden)[None, :] * vocab + scene.site.tokens[:, None]
    return flat[index].astype(np.float64)


def _normed(scene: Scene) -> Iterator[Trial]:
    value = scene.plain.value
    mean = np.square(value).mean(axis=1, keepdims=True)
    yield "", value / np.sqrt(mean + scene.config.rms_norm_eps)


def _other_head(scene: Scene) -> Iterator[Trial]:
    """The embedding as the head though there is one, which is the usual wrong tie."""
    head, table = scene.site.find(_OUTPUT), scene.site.find(_TABLE)
    if head is not None and table is not None and head.shape == table.shape:
        yield "the embedding", REFERENCE.linear(scene.inputs[0][-1:], [table])


def _other_token(scene: Scene) -> Iterator[Trial]:
    x = scene.inputs[0]
    weight = scene.site.find(_OUTPUT) or scene.site.find(_TABLE)
    assert weight is not None
    places = {"last-but-one": -2, "first": 0, "last-but-two": -3}
    rows = {name: i for name, i in places.items() if -x.shape[0] <= i and x.shape[0] > 1}
    if not rows:
        return
    values = REFERENCE.linear(np.stack([x[i] for i in rows.values()]), [weight])
    for number, name in enumerate(rows):
        yield f"the {name} token", values[number : number + 1]
    yield "the mean of all tokens", REFERENCE.linear(x.mean(axis=0, keepdims=True), [weight])


def _before_norm(scene: Scene) -> Float64 | None:
    x = scene.tensor("post_ffn_residual", scene.config.num_layers - 1)
    return None if x is None else scene.run(inputs=(x,))


def _normed_twice(scene: Scene) -> Float64 | None:
    weight = scene.site.find("model.norm.weight")
    if weight is None:
        return None
    x = REFERENCE.rms_norm(scene.inputs[0][-1:], weight, scene.config.rms_norm_eps)
    return scene.run(inputs=(x,))


def _transformed(scene: Scene) -> Iterator[Trial]:
    value = scene.plain.value
    powers = np.exp(value - value.max())
    yield "softmax", powers / powers.sum()
    yield "log-softmax", value - value.max() - math.log(float(powers.sum()))
    yield "times 1/sqrt(E)", value / math.sqrt(scene.config.hidden_size)
    yield "less their maximum", value - value.max()
    for cap in (30.0, 50.0):
        yield f"capped at {cap:g} by tanh", cap * np.tanh(value / cap)


ENTRIES = (
    Entry("embedding row off by {}", EMBEDDING, _other_rows,
          "the index into the table of embeddings",
          "embedding rows of the file off by {}", "the order of the vocabulary in the conversion"),
    Entry("embedding of {}", EMBEDDING, _other_tokens, "which token ids reach the embedding",
          is_causal=False),
    Entry("embedding scaled by {}", EMBEDDING, _scaled,
          "the embedding is multiplied by sqrt(hidden size), as in Gemma",
          "embedding scaled by {} in the original model",
          "the converter folded the scale of the embedding into the table, or left it out"),
    Entry("embedding table read as [E, V]", EMBEDDING, single(_transposed_table),
          "the table is row-major [V, E]", "embedding table stored as [E, V]",
          "the converter transposed the table"),
    Entry("embedding normalised", EMBEDDING, _normed, "a norm runs on the embedding",
          "embedding normalised in the original model", "the architecture this file declares"),
    Entry("head tied to {}", HEAD, _other_head,
          "the head is bound to the wrong tensor although the model has lm_head.weight",
          "head tied to {} in the original model", "tie_word_embeddings in the conversion"),
    Entry("logits of {}", HEAD, _other_token, "which row of final_norm the head reads: the last"),
    Entry("logits before the final norm", HEAD, single(_before_norm),
          "the head reads the stream before final_norm"),
    Entry("final norm applied twice", HEAD, single(_normed_twice), "the input of the head"),
    Entry("logits as {}", HEAD, _transformed, "what is done to the logits afterwards",
          "logits as {} in the original model", "logit scale or cap of the original config"),
)  # fmt: skip
