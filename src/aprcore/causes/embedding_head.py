"""What goes wrong at the two ends: the embedding and the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from aprcore.causes.caps import capped
from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial, single
from aprcore.ground.precision import BFLOAT16, FLOAT16
from aprcore.network.operations import EMBEDDING, HEAD, Embed, Head, Norm

EMBED, LOGITS = (Embed,), (Head,)
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
    before = np.roll(tokens, 1)
    padded = before * (np.arange(tokens.size) > 0)
    for name, other in (
        ("the token before", before), ("the token before (0 first)", padded),
        ("the token after", np.roll(tokens, -1)),
        ("the first token", np.full_like(tokens, tokens[0])),
        ("the last token", np.full_like(tokens, tokens[-1])),
        ("token 0", tokens * 0), ("the reversed tokens", tokens[::-1]),
    ):  # fmt: skip
        yield name, scene.run(site=replace(scene.site, tokens=other))


def _scaled(scene: Scene) -> Iterator[Trial]:
    root, own, plain = math.sqrt(scene.config.hidden_size), scene.operation.scale, scene.plain.value
    if own == 1:
        yield "scaled by sqrt(E)", plain * root
    else:
        yield f"not scaled by {own:.6g}", plain / own
        yield f"scaled by {own:.6g} twice", plain * own
        for half in (BFLOAT16, FLOAT16):
            factor = float(half.round(np.array([own]))[0])
            yield f"scaled by {factor:g}, the scale rounded to {half.name}", plain * (factor / own)
    if scene.in_file and own == 1:
        yield "scaled by 1/sqrt(E)", plain / root


def _transposed_table(scene: Scene) -> Float64 | None:
    table = scene.site.weight(EMBEDDING)
    vocab, hidden = table.shape
    if vocab * hidden > LARGEST_HEAD:
        return None
    flat = table.read(0, vocab).reshape(-1)
    index = np.arange(hidden)[None, :] * vocab + scene.site.tokens[:, None]
    return scene.operation.scale * flat[index].astype(np.float64)


def _normed(scene: Scene) -> Float64:
    value = scene.plain.value
    mean = np.square(value).mean(axis=1, keepdims=True)
    return value / np.sqrt(mean + scene.config.rms_norm_eps)


def _tied_head(scene: Scene) -> Float64 | None:
    """The embedding as the head though there is one, which is the usual wrong tie."""
    head, table = scene.site.find(HEAD), scene.site.find(EMBEDDING)
    if head is None or table is None or head.shape != table.shape:
        return None
    return capped(scene, scene.backend.linear(scene.inputs[0][-1:], [table]))


def _other_token(scene: Scene) -> Iterator[Trial]:
    x = scene.inputs[0]
    if x.shape[0] < 2:
        return
    places = {"last-but-one token": -2, "first token": 0, "last-but-two token": -3}
    rows = {name: x[i] for name, i in places.items() if -x.shape[0] <= i}
    rows["mean of all tokens"] = x.mean(axis=0)
    logits = scene.operation(REFERENCE, scene.site, np.stack(list(rows.values())))
    for name, row in zip(rows, logits):
        yield f"the {name}", row[None]


def _before_norm(scene: Scene) -> Float64 | None:
    x = scene.tensor(scene.source(0, 0))
    return None if x is None else scene.run(x)


def _normed_twice(scene: Scene) -> Float64 | None:
    norm = scene.graph.operation(scene.source(0))
    if not isinstance(norm, Norm):
        return None
    return scene.run(norm(REFERENCE, scene.site, scene.inputs[0][-1:]))


def _transformed(scene: Scene) -> Iterator[Trial]:
    value = scene.plain.value
    powers = np.exp(value - value.max())
    yield "softmax", powers / powers.sum()
    yield "log-softmax", value - value.max() - math.log(float(powers.sum()))
    yield "times 1/sqrt(E)", value / math.sqrt(scene.config.hidden_size)
    yield "less their maximum", value - value.max()


ENTRIES = (
    Entry("embedding row off by {}", EMBED, _other_rows, "the index into the table of embeddings",
          "embedding rows of the file off by {}", "the order of the vocabulary in the conversion"),
    Entry("embedding of {}", EMBED, _other_tokens, "which token ids reach the embedding",
          is_causal=False),
    Entry("embedding {}", EMBED, _scaled,
          "whether the embedding is multiplied by sqrt(hidden size), as in Gemma", ORIGINAL,
          "the converter folded the scale of the embedding into the table, or left it out"),
    Entry("embedding table read as [E, V]", EMBED, single(_transposed_table),
          "the table is row-major [V, E]", "embedding table stored as [E, V]",
          "the converter transposed the table"),
    Entry("embedding normalised", EMBED, single(_normed), "a norm runs on the embedding", ORIGINAL,
          "the architecture this file declares"),
    Entry("head tied to the embedding", LOGITS, single(_tied_head),
          "the head is bound to the wrong tensor although the model has lm_head.weight", ORIGINAL,
          "tie_word_embeddings in the conversion"),
    Entry("logits of {}", LOGITS, _other_token,
          "which row of the normalised stream the head reads: the last"),
    Entry("logits before the final norm", LOGITS, single(_before_norm),
          "the head reads the stream before its norm"),
    Entry("final norm applied twice", LOGITS, single(_normed_twice), "the input of the head"),
    Entry("logits as {}", LOGITS, _transformed, "what is done to the logits afterwards", ORIGINAL,
          "logit scale of the original config"),
)  # fmt: skip
