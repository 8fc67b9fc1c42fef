"""The corpus: which faults on which models, and which sound pairs.

A line is the fault and its layer, the model, the stored type of its weights, the oracle's type
("none" for no oracle) and the number of tokens; then, for dumps of the zoo's engine, what it
rounds ("?" where it does not say so). "all" is every layer. Names are in `kernels.FAULTS`,
`converters.FAULTS`, `grounds.GROUNDS` and `engine.HABITS`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product

from . import converters, kernels
from .engine import HABITS
from .trial import EVERYWHERE, Case

KERNEL_FAULTS = """
rope-pairs@1               llama       F32        float32   7
rope-pairs-q@2             mistral     Q4_K       float16   9
rope-theta-10k@0           qwen2       F16        float32   5
rope-theta-500k@2          qwen2       Q8_0       float16   33
rope-position-late@1       llama       Q4_K       float32   3
rope-position-early-k@2    qwen3       F32        bfloat16  12
rope-position-restarts@1   mistral     F16        float32   33
rope-absent@0              qwen3       Q8_0       float32   8
rope-absent-k@1            qwen2-bias  Q8_0       float32   9
rope-partial@2             llama       F32        float16   17
rope-sine-negated@1        outlier     Q4_K       float32   7
rope-scaling-lost@1        llama3      F32        float32   33
rope-scaling-lost@2        yarn        Q8_0       float16   17
rope-scaling-lost@0        linear      F16        bfloat16  9
rope-position-far@1        llama       F32        float32   9
rope-position-far@2        qwen2       Q4_K       float16   12 f16
rope-table-ends@0          llama       F32        float32   17
rope-table-ends@1          qwen3       Q8_0       bfloat16  33
rope-linear-unasked@1      llama       F32        float32   9
rope-linear-unasked@2      qwen2-bias  Q8_0       float16   17 bf16
rope-yarn-unasked@1        llama       F32        float32   17
rope-yarn-unasked@0        qwen3       Q4_K       none      33 f16
rope-yarn-beta@1           yarn        F32        float32   17
rope-yarn-beta@2           yarn        Q8_0       float16   33 f16
rope-yarn-factor@0         yarn        F32        float32   9
rope-yarn-length@2         yarn        Q4_K       float16   17
rope-on-v@1                llama       F32        float32   6
scale-hidden@2             qwen2       F32        float32   7
scale-none@0               llama       Q8_0       bfloat16  11
scale-kv-dim@1             mistral     F32        float32   7
mask-none@1                qwen2       Q4_K       float16   13
mask-late@2                llama       F32        float32   7
mask-early@0               qwen3       F16        float32   10
mask-after@1               mistral     F32        float16   9
softmax-axis@1             llama       F32        float32   7
softmax-no-max@1           qwen2-bias  F32        float32   9
softmax-half@2             qwen2       F32        float32   7
softmax-bf16@0             llama       Q8_0       float32   16
kv-tiled-scores@1          qwen2       F32        float32   7
kv-tiled-values@2          llama       Q4_K       float16   9
kv-tiled@1                 demo        F32        float32   11
kv-groups-count@0          qwen2       Q8_0       float32   5
kv-first-only@2            qwen3       F32        float32   8
transposed-out@1           llama       F32        float32   7
kq-order@1                 mha         F32        float32   1
vk-order@2                 mha         Q8_0       float16   7
gate-up-swapped@0          llama       Q4_K       float32   7
bias-missing@1             qwen2       F32        float32   7
bias-missing-k@2           qwen2-bias  Q4_K       float16   9
bias-doubled@0             qwen2       Q8_0       bfloat16  7
bias-other-layer@1         outlier     F16        float32   5
weights-other-layer-down@1 mistral     Q8_0       float32   7
weights-other-layer-qkv@0  qwen3       F32        float16   9
rows-paired@1              llama       F16        float32   1
tile-missing@1             llama       Q4_K       float32   7
last-columns-missing@2     qwen2       F32        float32   1
last-columns-up@0          odd         Q4_K       float32   7
reduction-short@1          qwen2       Q8_0       float16   7
reduction-short-out@2      llama       F32        float32   33
stale-up@1                 mistral     F32        float32   7
stale-layer@2              qwen2       Q4_K       float32   7
accumulated-f16@1          llama       F32        float32   7
accumulated-bf16@0         qwen2       Q8_0       float32   9
activations-q8@2           llama       F32        float32   7
norm-eps@0                 llama       F32        float32   7
norm-eps-tenfold@1         qwen2       Q8_0       float16   7
norm-no-weight@1           outlier     Q8_0       float32   7
norm-weight-plus-one@2     llama       Q4_K       float32   1
norm-layer@1               qwen2       F32        bfloat16  7
norm-axis@0                mistral     F32        float32   7
norm-final-no-weight@0     llama       F16        float16   7
qk-norm-missing@1          qwen3       F32        float32   7
q-norm-missing@2           qwen3       Q4_K       float16   9
gelu@1                     llama       F32        float32   7
gelu-tanh@0                qwen2       Q4_K       bfloat16  9
relu@2                     mistral     Q8_0       float32   7
silu-on-up@1               llama       F32        float32   7
gate-not-activated@1       outlier     F32        float32   7
residual-missing@1         llama       F32        float32   1
residual-missing-ffn@0     qwen2       Q4_K       float32   7
residual-twice@1           qwen3       Q8_0       float16   7
residual-normed@1          demo        F32        float32   11
residual-stale@2           llama       F32        float32   7
embedding-off-by-one@0     llama       Q8_0+embed float32   7
embedding-scaled@0         qwen2       F32        float16   7
head-tied@0                llama       F32        float32   7
head-early-token@0         qwen2       Q8_0       float32   7
scale-hidden@3             stories260k Q8_0       float16   12
rope-pairs@2               stories260k F32        float32   9
rope-theta-500k@1          long        F32        float32   512
rope-pairs@0               long        Q8_0       float16   512
mask-late@1                long        F32        float32   512
kv-tiled@1                 qwen2       F32        float32   33 f16
gelu@1                     qwen2       Q8_0       float16   9  f16
norm-layer@1               llama       F32        float32   7  bf16
bias-missing@2             qwen2-bias  F32        float32   9  bf16
transposed-out@1           llama       Q8_0       float32   7  q8_0
rope-position-late@0       longest       F32        float32   2048
cache-layer-keys@1         llama       F32        float32   9
cache-layer-keys@2         qwen2       Q8_0       float16   12 f16
cache-layer-values@1       qwen2-bias  F32        float32   9
cache-layer-values@2       llama       Q4_K       bfloat16  9  f32 fused
cache-layer@1              llama       F32        float32   9  f32 fused
cache-layer@2              gemma       Q8_0       float16   12 f16 fused
cache-late@1               qwen2       F32        float32   9
cache-late@0               llama       F32        none      12 f32 fused
cache-stale-keys@1         llama       F32        float32   33
cache-stale-keys@2         llama       Q8_0       float16   33 f16
cache-stale-values@1       llama       F32        float32   17
cache-stale-values@0       mistral     Q4_K       float16   33 bf16
chunk-blind@1              llama       F32        float32   9
chunk-blind@2              qwen2       Q4_K       float16   12 f32 fused
flash-unrescaled@1         llama       F32        float32   12 f32 fused
flash-unrescaled@0         qwen2       Q8_0       float16   33 f32 fused
flash-values-unrescaled@2  llama       F32        none      17 f32 fused
dot-tail@1                 tail        F32        float32   9
dot-tail@0                 tail        Q8_0       float16   12 f16
heads-strided@1            llama       F32        float32   9
alibi@1                    llama       F32        float32   9
alibi@2                    qwen2       Q8_0       float16   17 f32 fused
alibi-softmax@0            llama       Q4_K       float32   9
softmax-plus-one@1         llama       F32        float32   9
softmax-plus-one@2         qwen2       Q8_0       float16   12 f32 fused
softmax-sinks@1            llama       F32        float32   9
softmax-sinks@0            gemma       Q8_0       bfloat16  12 f16
softmax-sinks@2            llama       F32        float32   17 f32 fused
softmax-temperature@1      qwen2-bias  F32        float32   9
softmax-temperature@2      llama       Q4_K       float16   12 bf16
mask-finite@1              llama       F32        float32   9
mask-finite@2              mistral     Q8_0       float16   17
kv-tiled@1                 llama       F32        float32   9  f32 fused
kv-tiled@2                 gemma       Q8_0       float16   12 f16 fused
split-k-twice@1            llama       F32        float32   7
split-k-twice@2            qwen2       Q4_K       float16   12 f16
split-k-out-twice@0        mistral     Q8_0       float32   9
k-permuted-as-q@1          llama       F32        float32   1
k-permuted-as-q@2          gemma       Q8_0       float16   9
activations-4-bits@1       llama       F32        float32   7
activations-8-bits-tensor@2 qwen2      Q8_0       float32   7
activations-float8@0       llama       F32        float32   7
block-empty@1              llama       Q8_0       float32   7
parallel-norm@1            llama       F32        float32   7
parallel-norm@0            qwen2       Q8_0       float16   9  f16
parallel-gate@1            llama       Q4_K       float32   7
layer-skipped@2            llama       F32        float32   7
rope-head-size@1           qwen3       F32        float32   9
rope-head-size@2           llama       Q8_0       float16   12 f16
layers-by-name@2           deep        F32        float32   7
layers-by-name@2           deep        Q8_0       float16   9  f16
local-rope-head@1          llama       F32        float32   7
local-rope-pairs-head@2    qwen2       Q4_K       float16   9
local-rope-last-token@1    mistral     F32        float32   9
local-rope-token-early@0   qwen3       Q8_0       bfloat16  12
local-scale-head@1         llama       Q4_K       float32   7
local-scores-row@2         qwen2       F32        float32   7
local-kv-head@1            llama       F32        float32   7
local-kv-scores-head@0     qwen2       Q8_0       float16   9
local-softmax-last-key@1   llama       F32        float32   33
local-softmax-head-half@2  qwen2       F32        float32   17
local-attention-last-block@1 llama     Q4_K       float32   7
local-gate-rows@1          llama       Q4_K       float16   1
local-up-row@2             qwen2       F32        float32   7
local-qkv-rows@0           mistral     Q8_0       float32   7
local-out-row-order@1      llama       F32        float32   7
local-down-last-token@1    qwen2       Q4_K       float32   9
local-down-block@2         llama       Q8_0       float32   7
local-norm-token@1         llama       F32        float32   7
local-norm-tail@0          outlier     Q8_0       float32   7
local-silu-tail@1          llama       F32        float32   7
local-swigl-value@1        qwen2       Q4_K       bfloat16  7
local-residual-token@2     llama       F32        float32   7
local-residual-tail@0      qwen2       F32        float16   7
local-embedding-token@0    llama       F16        float32   7
local-head-rows@0          llama       Q8_0       float32   7
local-head-value@0         qwen2       F32        float32   7
local-bias-head@1          qwen2       Q8_0       float32   7
local-nan@1                llama       F32        float32   7
local-rope-head@2          stories260k F32        float32   9
local-norm-token@2         demo        F32        float32   11
local-rope-last-token@1    long        F32        float32   512
local-residual-token@0     long        Q8_0       float32   512
local-gate-percent@1       llama       F32        float32   7
local-gate-percent@2       qwen2       Q8_0       float16   7  f16
local-gate-percent@1       llama       Q4_K       float32   7  bf16
local-gate-percent@1       mistral     F32        float32   7  q8_0
local-scores-percent@1     qwen2       F32        float32   9  f16
local-scores-percent@0     llama       Q8_0       float32   9  bf16
local-scores-percent@2     qwen2-bias  Q4_K       float16   9
local-eps-token@1          llama       F32        float32   7
local-v-row@2              qwen2       Q4_K       bfloat16  12
local-v-row@1              qwen2-bias  F32        float32   33 f16
local-rope-token-early@0   longest       F32        float32   2048
local-rope-far-head@1      llama       F32        float32   9
local-rope-far-head@2      qwen2       Q8_0       float16   12 f16
local-rope-far-head@1      qwen3       Q4_K       bfloat16  9
local-rope-far-head@2      gemma       F32        none      17 f32
local-rope-linear-head@1   llama       F32        float32   9
local-rope-linear-head@2   qwen2       Q8_0       float16   12 f16
local-rope-linear-head@1   mistral     Q4_K       float32   17
local-rope-linear-head@2   window      F32        bfloat16  9
local-alibi-head@1         llama       F32        float32   9
local-alibi-head@2         qwen2       Q8_0       float16   12 f16
local-alibi-head@1         qwen3       Q4_K       float32   9
local-alibi-head@2         mistral     F32        none      17 f32
local-cache-layer-head@1   llama       F32        float32   9
local-cache-layer-head@2   qwen2       Q8_0       float16   12 f16
local-cache-layer-head@1   gemma       Q4_K       float32   9
local-cache-layer-head@2   both        F32        float32   9
local-values-layer-head@1  llama       F32        float32   9
local-values-layer-head@2  qwen2-bias  Q8_0       float16   12 f16
local-values-layer-head@1  gemma       F32        float32   9
local-values-layer-head@2  window      Q4_K       bfloat16  12
local-plus-one-head@1      llama       F32        float32   9
local-plus-one-head@2      qwen2       Q8_0       float16   12 f16
local-plus-one-head@1      qwen3       F32        none      9  f32
local-plus-one-head@2      window      Q4_K       float32   12
local-temperature-head@1   llama       F32        float32   9
local-temperature-head@2   qwen2       Q8_0       float16   12
local-temperature-head@1   gemma       F32        float32   9
local-temperature-head@2   mistral     Q4_K       bfloat16  17
local-parallel-token@1     llama       F32        float32   7
local-parallel-token@2     qwen2       Q8_0       float16   9  f16
local-parallel-token@1     qwen3       Q4_K       float32   7
local-parallel-token@2     layers      F32        bfloat16  9
local-split-rows@1         llama       F32        float32   7
local-split-rows@2         qwen2       Q8_0       float16   9  f16
local-split-rows@1         gemma       Q4_K       float32   9
local-split-rows@2         mistral     F32        none      7  f32
local-float8-rows@1        llama       F32        float32   7
local-float8-rows@2        qwen2       Q8_0       float16   9
local-float8-rows@1        gemma       Q4_K       float32   9
local-float8-rows@2        qwen3       F32        bfloat16  7
window-ignored@1           window      F32        float32   12
window-ignored@0           gemma       Q8_0       float16   33
window-ignored@2           gemma-odd   F32        none      17 f16
window-ignored@1           layers      Q4_K       bfloat16  12
window-ignored@1           both-window F32        float32   12
window-short@2             window      Q8_0       float16   12
window-short@0             gemma       F32        float32   9
window-short@1             both-window F32        float32   9
window-long@1              layers      F32        float32   12
window-long@2              gemma       Q4_K       bfloat16  12
window-long@0              window      F32        none      33
window-halved@0            window      F32        float32   12
window-halved@2            gemma       Q8_0       float16   12
window-other-layers@0      layers      F32        float32   12
window-other-layers@1      gemma       F32        float16   12
window-other-layers@0      gemma       Q8_0       float32   33 bf16
window-unasked@1           llama       F32        float32   9
window-unasked@1           qwen3       Q8_0       float16   33
window-short-scores@1      window      F32        float32   12
window-short-scores@2      gemma       Q8_0       float32   12
window-after@1             window      F32        float32   12
mask-none@1                window      F32        float32   12
mask-none@2                gemma       F32        bfloat16  12
causal-forced@1            both        F32        float32   9
causal-forced@2            both        Q8_0       bfloat16  12
causal-forced@0            both-window F32        float16   12
causal-forced-scores@1     both        Q4_K       float32   9
cap-missing@1              gemma       F32        float32   9
cap-missing@0              gemma-odd   F32        float32   17
cap-missing@2              gemma       Q4_K       bfloat16  12 f16
cap-other@1                gemma       Q8_0       float16   12
cap-odd@0                  gemma       F32        float32   9
cap-unasked@1              llama       F32        float32   9
cap-unasked@1              gemma-uncapped F32     float32   12
cap-not-rescaled@2         gemma       F32        float32   9
cap-before-scale@1         gemma       F32        float32   9
cap-before-scale@0         gemma       Q4_K       float16   12 f16
embedding-scale-bf16@0     gemma-odd   F32        float32   9
embedding-scale-bf16@0     gemma-odd   Q8_0       float16   9
cap-after-mask@0           gemma       F32        float32   9
cap-after-mask@1           gemma       Q8_0       float16   12
logit-cap-missing@0        gemma       F32        float32   9
logit-cap-missing@0        gemma-odd   Q8_0       float16   9
logit-cap-other@0          gemma       Q8_0       bfloat16  9
logit-cap-of-scores@0      gemma       F32        float32   9
logit-cap-not-rescaled@0   gemma       Q4_K       float32   9
query-scale-head-dim@1     gemma       F32        float32   9
query-scale-head-dim@0     gemma       Q8_0       float16   12 f16
query-scale-twice@2        gemma-odd   F32        float32   9
attn-norm-by-w@1           gemma       F32        float32   9
attn-norm-by-two-plus-w@0  gemma       Q8_0       float16   9
attn-norm-missing@2        gemma       F32        bfloat16  9
attn-norm-twice@1          gemma-odd   F32        float32   9
attn-post-norm-by-w@1      gemma       Q8_0       float16   9
attn-post-norm-by-two-plus-w@2 gemma   F32        float32   9
attn-post-norm-missing@1   gemma       F32        float32   9
attn-post-norm-twice@0     gemma       F32        float16   9
ffn-norm-by-w@2            gemma-odd   F32        float32   9
ffn-norm-by-two-plus-w@1   gemma       F32        none      9
ffn-norm-missing@0         gemma       F32        float32   1
ffn-norm-twice@1           gemma       Q4_K       float32   9
ffn-post-norm-by-w@0       gemma       F32        float32   9  bf16
ffn-post-norm-by-two-plus-w@1 gemma    Q4_K       float32   9
ffn-post-norm-missing@2    gemma       Q8_0       float32   9
ffn-post-norm-twice@1      gemma       F32        float32   9
final-norm-by-w@0          gemma       F32        float32   9
final-norm-by-two-plus-w@0 gemma-odd   Q8_0       float16   9
final-norm-missing@0       gemma       F32        float32   9
final-norm-twice@0         gemma       F32        float32   9
post-norm-of-pre@1         gemma       F32        float32   9
embedding-unscaled@0       gemma       F32        float32   9
embedding-unscaled@0       gemma-odd   Q8_0       float16   9
embedding-scaled-twice@0   gemma       Q8_0       float32   9
rows-paired@1              gemma       F32        float32   9
gelu@1                     gemma       F32        float32   9
silu@2                     gemma       Q8_0       float16   9
window-ignored@1           window      F32        float32   12 f32 fused
window-short@1             window      Q8_0       float16   12 f16 fused
window-long@0              gemma       F32        float32   12 f32 fused
window-other-layers@1      layers      Q4_K       float32   12 f32 fused
causal-forced@2            both        F32        float32   9  f32 fused
cap-missing@1              gemma       F32        float32   9  f32 fused
cap-after-mask@2           gemma       F32        float32   9  f32 fused
query-scale-head-dim@1     gemma       Q8_0       float32   9  f32 fused
window-ignored@0           gemma-long  F32        float32   512
window-long@0              gemma-long  Q8_0       float16   512
window-short@0             gemma-long  F32        none      512 f16
window-other-layers@1      gemma-long  Q4_K       float32   512
cap-missing@1              gemma-long  F32        float32   512
local-window-head@1        window      F32        float32   12
local-window-head@2        gemma       Q8_0       float16   12
local-window-short-head@0  gemma       F32        float32   12
local-window-last-token@1  window      Q8_0       float32   12
local-window-last-token@1  layers      F32        bfloat16  12
local-causal-head@1        both        F32        float32   9
local-causal-token@2       both        Q8_0       float16   9
local-cap-head@1           gemma       F32        float32   9
local-cap-token@2          gemma       Q8_0       float32   12
local-logit-cap-rows@0     gemma       F32        float32   9
local-query-scale-head@0   gemma       F32        float32   9
local-post-norm-token@1    gemma       F32        float32   9
local-post-norm-tail@2     gemma       F32        float32   9
local-norm-offset-token@1  gemma       Q8_0       float16   9
local-embedding-unscaled-token@0 gemma F32        float32   9
local-norm-token@1         gemma       F32        float32   9
local-rope-head@1          gemma       F32        float32   9
local-kv-head@2            gemma       Q4_K       float16   9
local-gate-rows@1          gemma       Q4_K       float32   9
local-residual-token@0     gemma       F32        float32   9
local-scores-percent@1     gemma       F32        float32   9  f16
local-softmax-last-key@1   window      F32        float32   12
local-scores-row@2         window      Q8_0       float16   12
local-scale-head@1         layers      F32        float32   12
local-attention-last-block@2 layers    Q4_K       float32   9
local-bias-head@1          both        F32        float32   9
local-v-row@0              both        Q8_0       float32   9
local-kv-scores-head@2     gemma       Q4_K       float32   12
local-rope-last-token@0    gemma       F32        float16   12
local-norm-tail@2          gemma       F32        float32   9
local-eps-token@1          gemma       F32        float32   9
local-swigl-value@1        gemma       Q8_0       bfloat16  9
local-down-last-token@0    gemma       F32        float32   9
local-gate-percent@1       gemma       F32        float32   9
local-silu-tail@1          gemma       F32        float32   9
local-out-row-order@0      gemma       Q8_0       float32   9
local-qkv-rows@1           gemma       F32        float32   9
local-up-row@2             gemma       Q4_K       float16   9
local-head-value@0         gemma       F32        float32   9
"""

FILE_FAULTS = """
file-transposed-out@1      llama       F32        float32   7
file-transposed-q@2        llama       Q8_0       float16   7
file-qk-swapped@1          mha         Q4_K       float32   7
file-kv-swapped@0          qwen2       F32        float16   7
file-gate-up-swapped@1     llama       F32        float32   7
file-gate-up-interleaved@2 qwen2       Q8_0       bfloat16  7
file-pairs@1               qwen2       F32        float32   7
file-pairs-k@2             llama       Q4_K       float16   9
file-bias-lost@1           qwen2       Q8_0       float32   7
file-bias-q-lost@0         qwen2-bias  Q4_K       float16   9
file-bias-doubled@2        qwen2       F32        bfloat16  7
file-bias-other-layer@1    qwen2       F16        float32   1
file-layer-down@1          mistral     Q4_K       float32   7
file-layer-q@0             qwen3       Q8_0       float16   9
file-layer-norm@1          llama       Q4_K       float32   7
file-norms-swapped@1       qwen2       F32        float16   7
file-norm-ones@2           llama       Q8_0       bfloat16  7
file-norm-plus-one@0       outlier     F32        float32   7
file-norm-minus-one@1      mistral     Q4_K       float16   7
file-final-norm-ones@0     qwen2       Q8_0       float32   7
file-qk-norm-ones@1        qwen3       Q4_K       float16   7
file-down-scaled@1         llama       Q4_K       float32   1
file-up-negated@2          qwen2       Q8_0       float32   7
file-embedding-off@0       llama       F32        float32   7
file-embedding-scaled@0    qwen2       Q8_0+embed float32   7
file-head-tied@0           llama       Q8_0       float16   7
file-theta@0               llama       F32        float32   33
file-theta@0               qwen2       Q4_K       float16   17
file-scaling-lost@0        llama3      Q8_0       float32   33
file-scaling-lost@0        yarn        F32        float16   17
file-scaling-lost@0        linear      F32        float32   9
file-eps@0                 llama       F32        float32   7
file-act@0                 qwen2       F32        float32   7
file-act@0                 llama       Q8_0       float16   33
bytes-nibbles@1            llama       Q4_K       float32   7
bytes-nibbles@2            qwen2       Q4_K       float16   1
bytes-minimum@1            llama       Q4_K       float32   7
bytes-scale-bits@1         mistral     Q4_K       float32   7
bytes-padding@1            odd         Q4_K       float32   7
bytes-q8-scales-shifted@1  qwen2       Q8_0       float32   7
file-pairs@2               stories260k Q8_0       float32   9
file-layer-down@3          stories260k F16        float32   9
file-gate-up-swapped@1     demo        Q4_K       float32   11
file-theta@0               long        F16        float32   512
file-k-as-q@1              llama       F32        float32   7
file-k-as-q@2              qwen2       Q4_K       float16   9
file-head-dropped@0        llama       F32        float32   7
file-head-dropped@0        qwen2       Q8_0       float16   9
bytes-minimum-sign@1       llama       Q4_K       float32   7
bytes-nibble-spans@2       qwen2       Q4_K       float16   9
bytes-nibbles-in-turn@1    llama       Q4_0       float32   7
bytes-q6-fields@1          llama       Q6_K       float32   7
bytes-q6-scales@2          qwen2       Q6_K       bfloat16  9
bytes-empty@1              llama       Q8_0       float32   7
file-rows-zero@1           llama       Q4_K       float32   7
file-rows-zero@2           qwen2       Q8_0       bfloat16  1
file-row-zero@1            llama       Q8_0       float16   7
file-columns-zero@1        qwen2       Q4_K       float32   7
file-head-zero@2           llama       Q4_K       float16   7
file-kv-heads-swapped@1    qwen2       F32        float32   7
file-row-negated@1         llama       Q4_K       float32   7
file-block-scaled@0        mistral     F16        float32   7
file-embedding-row@0       qwen2       F32        float16   7
file-head-rows@0           llama       F32        bfloat16  7
file-norm-tail@1           llama       Q4_K       float32   7
file-bias-tail@1           qwen2-bias  Q8_0       float32   9
bytes-neighbour@1          llama       Q4_K       float32   33
bytes-q8-scale@1           qwen2       Q8_0       float32   7
small-weight@1             llama       Q8_0       float32   7
small-weight@2             qwen2       Q4_K       float16   1
small-row-scaled@1         llama       Q8_0       float32   7
small-row-scaled@0         qwen2       F32        bfloat16  7
small-rows-rolled@1        mistral     Q4_K       float32   7
small-rows-rolled@2        qwen3       Q8_0       float16   1
small-column-zero@1        llama       F32        float16   7
small-column-zero@0        qwen2       Q8_0       float32   7
small-norm-value@1         llama       F32        bfloat16  7
small-norm-value@2         outlier     Q4_K       float16   9
small-bias-value@1         qwen2       F32        float16   7
small-bias-value@0         qwen2-bias  Q8_0       bfloat16  9
small-v-head@1             qwen2       Q8_0       float32   7
small-v-head@2             llama       F16        float16   9
small-embedding-value@0    llama       F32        float16   7
small-embedding-value@0    qwen2       Q8_0+embed float32   7
small-scale-bit@1          llama       Q4_K       float32   7
small-code-bit@1           qwen2       Q8_0       float32   33
small-row-scaled@1         llama       Q4_K       float32   7
small-column-zero@1        llama       Q4_K       float32   7
file-eps-tenfold@0         qwen2       F32        float32   7
file-eps-tenfold@0         qwen3       Q4_K       float32   9
file-theta-near@0          llama       Q8_0       float32   33
file-theta-near@0          qwen2       F32        bfloat16  17
file-window-lost@0         window      F32        float32   12
file-window-lost@0         gemma       Q8_0       float16   12
file-window-short@0        window      Q8_0       float16   12
file-window-short@0        gemma       F32        float32   12
file-window-long@0         layers      F32        float32   12
file-window-long@0         gemma       Q4_K       bfloat16  12
file-window-lost@0         gemma-long  F32        float32   512
file-window-short@0        gemma-long  Q8_0       float16   512
file-window-halved@0       window      F32        float32   12
file-window-unasked@0      llama       F32        float32   9
file-window-unasked@0      qwen2       Q4_K       float16   33
file-layers-shifted@0      layers      F32        float32   12
file-layers-shifted@0      gemma       Q8_0       float32   12
file-causal@0              both        F32        float32   9
file-causal@0              both-window Q8_0       float16   12
file-bidirectional@0       llama       F32        float32   9
file-cap-lost@0            gemma       F32        float32   9
file-cap-other@0           gemma       Q8_0       float16   12
file-logit-cap-lost@0      gemma       F32        float32   9
file-logit-cap-other@0     gemma       Q4_K       float16   9
file-query-scalar@0        gemma       F32        float32   9
file-norms-raised@0        gemma       F32        float32   9
file-norms-raised@0        gemma       Q4_K       float16   9
file-norm-raised@1         gemma-odd   F32        float32   9
file-post-norm-raised@1    gemma       Q8_0       float16   9
file-post-norms-swapped@1  gemma       F32        float32   9
file-post-norm-lost@2      gemma       F32        float32   9
file-embedding-scaled@0    gemma-odd   F32        float32   9
file-embedding-unscaled@0  gemma-odd   Q8_0       float16   9
file-act-silu@0            gemma       F32        float32   9
file-pairs@1               gemma       F32        float32   9
file-pairs-k@2             gemma       Q4_K       float16   9
file-eps@0                 gemma       F32        float32   9
file-theta@0               gemma       F32        float32   17
file-post-norm-tail@1      gemma       Q8_0       float32   9
file-rows-zero@1           gemma       Q4_K       float32   9
file-head-zero@2           gemma       F32        float32   9
file-kv-heads-swapped@1    gemma       F32        float32   9
file-row-negated@0         gemma       Q4_K       float32   9
file-bias-tail@1           both        F32        float32   9
small-v-head@1             gemma       F32        float16   9
small-rows-rolled@1        window      Q8_0       float32   12
small-row-scaled@1         gemma       Q8_0       float32   9
small-norm-value@1         gemma       F32        float16   9
small-column-zero@1        gemma       F32        float32   9
"""

# Beside these, every small model in every stored type is a sound pair.
SOUND_PAIRS = """
sound                      llama       F32        float16   1
sound                      llama       Q4_K       float16   33
sound                      llama       Q8_0       bfloat16  1
sound                      llama       Q4_K       float32   1
sound                      llama       Q8_0+embed float32   7
sound                      llama       Q4_K+embed float16   9
sound                      mistral     Q6_K       float16   9
sound                      outlier     Q4_K+embed float32   33
sound                      outlier     Q6_K+embed float16   64
sound                      qwen2       BF16       bfloat16  9
sound                      qwen2       BF16       float32   7
sound                      qwen2       F16        float16   7
sound                      qwen2       Q4_0       float16   17
sound                      qwen2-bias  Q4_K       float16   9
sound                      qwen2-bias  F32        bfloat16  9
sound                      qwen2-bias  Q8_0       bfloat16  33
sound                      outlier     Q4_K       float16   9
sound                      outlier     Q8_0       bfloat16  17
sound                      outlier     F32        float16   1
sound                      qwen3       Q4_K       bfloat16  12
sound                      yarn        Q4_K       float16   17
sound                      odd         Q4_K       float16   7
sound                      odd         Q6_K       float32   7
sound                      llama3      F16        bfloat16  33
sound                      stories260k Q8_0       float32   9
sound                      stories260k Q4_0       float16   9
sound                      stories260k Q4_K       float16   9
sound                      stories260k Q4_K       bfloat16  65
sound                      stories260k F16        float16   33
sound                      demo        F32        float32   11
sound                      demo        Q8_0       float32   11
sound                      demo        Q4_K       float32   11
sound                      long        F32        float32   512
sound                      long        Q8_0       float16   512
sound                      long        Q4_K       bfloat16  512
sound                      longest       F32        float16   2048
sound                      longest       Q8_0       float32   2048
sound                      llama       F32        float32   7  f32
sound                      qwen2       Q8_0       float16   9  f16
sound                      llama       F32        float32   7  bf16
sound                      qwen2-bias  Q4_K       bfloat16  9  f16
sound                      qwen3       Q8_0       float32   9  q8_0
sound                      outlier     F32        float32   9  q8_0
sound                      outlier     Q4_K       float32   9  bf16
sound                      llama       F32        float32   7  f32 heads-first
sound                      qwen2       F32        float16   7  f16 masked
sound                      mistral     Q8_0       float32   9  f32 pairs
sound                      window      F32        float32   1
sound                      window      F32        float32   6
sound                      window      Q4_K       float16   33
sound                      window      Q8_0       float32   7  f32 masked
sound                      window      F32        none      12 f32
sound                      window      Q8_0       none      33 bf16
sound                      layers      Q4_K       float32   33
sound                      layers      F16        bfloat16  12 f16 masked
sound                      layers      Q6_K       float16   17
sound                      both        Q8_0       bfloat16  33
sound                      both        F32        float32   9  f32 masked
sound                      both        F32        none      9  f16
sound                      both-window Q4_K       float16   33
sound                      both-window F32        bfloat16  12 bf16
sound                      gemma       F32        float32   1
sound                      gemma       F32        float32   7
sound                      gemma       Q6_K       float16   33
sound                      gemma       Q4_K       bfloat16  33
sound                      gemma       Q4_0       float32   64
sound                      gemma       Q8_0+embed float16   12
sound                      gemma       BF16       bfloat16  12
sound                      gemma       F32        none      12 f32
sound                      gemma       Q4_K       none      33 f16
sound                      gemma       Q8_0       float32   12 q8_0
sound                      gemma       F32        float32   12 bf16
sound                      gemma       Q8_0       float16   12 f16 masked
sound                      gemma       F32        float32   12 f32 heads-first
sound                      gemma-odd   F32        bfloat16  17
sound                      gemma-odd   Q8_0       float32   17 bf16
sound                      gemma-odd   Q4_K       float16   33
sound                      gemma-odd   BF16       bfloat16  33 bf16
sound                      gemma-long  F32        float32   512
sound                      gemma-long  Q4_K       bfloat16  512
sound                      gemma-long  Q8_0       float32   512 f16
sound                      gemma       Q8_0       float16   12 f16 fused
sound                      both-window F32        float32   12 f32 fused
sound                      gemma-uncapped F32     float32   12
sound                      gemma-uncapped Q8_0    bfloat16  12
"""

# Engines that round each operation in their own way, as they say and without a word.
ENGINES = """
sound                      llama       F32        none      9  kv-f16?
sound                      qwen2       Q8_0       float32   9  kv-f16
sound                      llama       F32        none      33 kv-f16-only?
sound                      mistral     F32        none      9  kv-bf16?
sound                      qwen3       F16        float16   9  kv-bf16
sound                      llama       F32        none      17 kv-e4m3?
sound                      llama       F32        none      17 kv-e4m3
sound                      qwen2       F32        none      17 kv-e5m2?
sound                      llama       Q8_0       none      33 llama.cpp?
sound                      mistral     Q8_0       float16   9  llama.cpp
sound                      gemma       Q8_0       none      12 llama.cpp?
sound                      llama       F32        none      65 iterated?
sound                      qwen2       Q4_K       bfloat16  65 iterated
sound                      llama3      F32        none      33 iterated?
sound                      yarn        Q8_0       none      65 iterated?
sound                      llama       F32        none      9  stream?
sound                      qwen2       Q8_0       bfloat16  9  stream
sound                      llama       F32        none      9  half-softmax?
sound                      llama       Q8_0       none      9  q8_0?
sound                      outlier     Q8_0       none      9  ggml-q8_0?
sound                      qwen2       F32        none      9  int8?
sound                      llama       F32        none      9  f16?
sound                      qwen2       F32        none      9  bf16?
sound                      llama       F32        none      9  f32? fused
sound                      llama       F32        none      33 kv-f16? fused
sound                      qwen2       Q8_0       none      33 kv-f16 fused
sound                      mistral     F32        none      17 bf16? fused
sound                      llama       Q8_0       none      17 llama.cpp? fused
rope-theta-500k@all        llama       F32        none      9  f32?
rope-theta-500k@0          qwen2       F32        none      9  f32?
rope-theta-10k@all         qwen2       Q8_0       none      17 llama.cpp?
rope-pairs@all             mistral     F32        none      9  f32?
rope-position-late@all     llama       F32        none      9  iterated?
scale-hidden@all           llama       F32        none      9  f32?
scale-none@0               llama       F32        none      9  kv-f16?
scale-hidden@all           qwen2       F32        none      9  kv-f16?
mask-none@all              llama       F32        none      9  kv-f16?
mask-late@0                llama       F32        none      9  llama.cpp?
kv-tiled-scores@all        qwen2       F32        none      9  f32?
kv-tiled-values@1          qwen2       F32        none      9  kv-f16?
transposed-out@0           llama       F32        none      9  f32?
transposed-out@all         llama       Q8_0       none      9  q8_0?
bias-missing@all           qwen2       F32        none      9  f32?
norm-no-weight@0           llama       F32        none      9  f32?
gelu@all                   llama       F32        none      9  f32?
residual-twice@0           llama       F32        none      9  f32?
residual-twice@all         llama       F32        none      9  bf16?
softmax-half@1             qwen2       F32        none      9  f32?
softmax-bf16@2             llama       F32        none      9  f32?
local-gate-rows@all        llama       F32        none      9  f32?
local-norm-token@0         llama       F32        none      9  kv-f16?
local-kv-head@1            qwen2       F32        none      9  kv-f16?
reduction-short@all        llama       F32        none      9  f32?
stale-up@1                 qwen2       F32        none      9  stream?
little-out@all             llama       F16        none      9  llama.cpp?
little-out@0               llama       F32        none      9  f32?
little-down@1              qwen2       F32        float32   9  f32?
little-scores@all          llama       F32        none      9  kv-f16?
little-values@0            qwen2       Q8_0       none      9  llama.cpp?
little-norm@all            mistral     F32        none      9  f32?
local-little-head@1        llama       F32        none      9  kv-f16? fused
local-little-head@all      qwen2       F32        none      9  f32?
rows-paired@all            llama       F32        none      9  f32?
local-rope-head@0          llama       F32        none      9  f32?
local-residual-token@all   llama       F32        none      9  kv-bf16?
local-down-last-token@0    qwen2       F32        none      9  llama.cpp?
"""

# Small models, with an oracle of each type in turn and odd lengths.
SWEEP_GROUNDS = (
    "llama", "mistral", "qwen2", "qwen3", "outlier", "window", "layers", "both", "both-window",
    "gemma", "gemma-odd",
)  # fmt: skip
SWEEP_TYPES = ("F32", "F16", "Q8_0", "Q4_K")


def parse(line: str) -> Case:
    """A case from its line."""
    faults, ground, weights, oracle, count, *rest = line.split()
    planted = ()
    if faults != "sound":
        planted = tuple(
            (name, EVERYWHERE if layer == "all" else int(layer))
            for name, layer in (f.split("@") for f in faults.split("+"))
        )
    engine, layout = (*rest, "", "")[:2]
    return Case(planted, ground, weights, oracle, int(count), engine, layout)


def _table(text: str) -> tuple[Case, ...]:
    return tuple(parse(line) for line in text.splitlines() if line.strip())


def single_faults() -> tuple[Case, ...]:
    """One fault each."""
    faulty = [case for case in _table(ENGINES) if case.faults]
    every = (
        *_table(KERNEL_FAULTS), *_table(FILE_FAULTS), *faulty, *_local_in_engines(), *_in_modules()
    )  # fmt: skip
    return tuple(dict.fromkeys(every))


# Confined to a head, a token, a row, a value; in stages that every engine of `HABITS` has.
_LOCAL = (
    "local-rope-head", "local-rope-last-token", "local-scores-row", "local-kv-head",
    "local-gate-rows", "local-up-row", "local-qkv-rows", "local-down-last-token",
    "local-norm-token", "local-norm-tail", "local-silu-tail", "local-residual-token",
    "local-residual-tail", "local-little-head", "local-swigl-value", "local-out-row-order",
)  # fmt: skip


def _local_in_engines() -> Iterator[Case]:
    """Local faults in the first layer and in all, of engines that do not say what they round."""
    habits = ("kv-f16", "llama.cpp", "stream", "iterated", "kv-bf16", "q8_0", "f32")
    for number, name in enumerate(_LOCAL):
        for turn, layer in enumerate((0, EVERYWHERE)):
            habit = habits[(2 * number + turn) % len(habits)]
            weights = "Q8_0" if habit in ("llama.cpp", "q8_0") else "F32"
            yield Case(((name, layer),), "llama", weights, "none", 12, f"{habit}?")


def _in_modules() -> Iterator[Case]:
    """Faults of engines whose modules alone are shown, and that do not say what they round."""
    names = ("rope-pairs-q", "scale-none", "kv-tiled-scores", "gelu", "norm-layer", "stale-up",
             "reduction-short", "local-gate-rows", "mask-late", "local-rope-head")  # fmt: skip
    for number, name in enumerate(names):
        for turn, layer in enumerate((1, EVERYWHERE)):
            habit = ("f32", "bf16", "f16", "tf32", "stream")[(number + 2 * turn) % 5]
            yield Case(((name, layer),), "llama", "F32", "none", 12, f"{habit}?", "modules")


_LEFT_OUT = ("", "fused", "modules", "", "states")  # of a dump, in turn


def engine_sweep() -> tuple[Case, ...]:
    """Every engine on small models in several types, with nothing wrong and nothing said."""
    grounds = ("llama", "mistral", "qwen2", "qwen3", "outlier", "window", "gemma", "both-window")
    return tuple(
        Case((), ground, weights, "none", 9 if place % 2 else 33, f"{habit}?",
             _LEFT_OUT[place % len(_LEFT_OUT)])
        for place, (ground, weights, habit) in enumerate(
            product(grounds, ("F32", "Q8_0"), sorted(HABITS))
        )
    )  # fmt: skip


def sound_pairs() -> tuple[Case, ...]:
    """Nothing wrong."""
    oracles = ("float32", "float16", "bfloat16")
    sweep = [
        Case((), ground, weights, oracles[i % 3], (7, 9, 12)[i // 3 % 3])
        for i, (ground, weights) in enumerate(product(SWEEP_GROUNDS, SWEEP_TYPES))
    ]
    engines = [case for case in _table(ENGINES) if not case.faults]
    return tuple(dict.fromkeys([*sweep, *_table(SOUND_PAIRS), *engines]))


# What several faults are drawn from: of one stage each, on any of the models below.
_ANYWHERE = (
    "rope-pairs-q", "rope-absent-k", "scale-hidden", "scale-none", "mask-late", "kv-tiled-scores",
    "kv-tiled-values", "transposed-out", "bias-missing", "bias-doubled", "tile-missing",
    "reduction-short", "stale-up", "norm-no-weight", "norm-layer", "gelu", "relu",
    "residual-missing", "residual-twice", "local-rope-head", "local-gate-rows",
    "local-norm-token", "local-residual-token", "local-down-last-token", "local-kv-head",
    "file-transposed-out", "file-kv-swapped", "file-pairs-k", "file-bias-lost", "file-norm-ones",
    "file-norm-plus-one", "file-up-negated", "file-down-scaled", "file-rows-zero",
    "file-columns-zero", "file-row-negated",
)  # fmt: skip


_IN_GEMMA = (
    *(name for name in _ANYWHERE if "bias" not in name and name not in ("gelu", "norm-no-weight")),
    "window-ignored", "window-short", "window-long", "cap-missing", "cap-other", "cap-after-mask",
    "query-scale-head-dim", "attn-norm-by-w", "attn-post-norm-missing", "attn-post-norm-twice",
    "ffn-norm-by-w", "ffn-post-norm-missing", "ffn-post-norm-by-two-plus-w", "silu",
    "local-window-head", "local-cap-head", "local-post-norm-token", "local-post-norm-tail",
    "file-norm-raised", "file-post-norm-raised", "file-post-norms-swapped",
)  # fmt: skip


def several_faults(count: int = 60) -> tuple[Case, ...]:
    """Two or three faults in different layers of a model, some in the file, some in the engine."""
    return (
        *_draw_several("qwen2", _ANYWHERE, count),
        *_draw_several("gemma", _IN_GEMMA, count // 2),
    )


def _draw_several(ground: str, names: Sequence[str], count: int) -> list[Case]:
    draw = random.Random(0)
    cases: list[Case] = []
    while len(cases) < count:
        number = draw.choice((2, 2, 3))
        layers = sorted(draw.sample(range(3), number))
        faults = tuple((draw.choice(names), layer) for layer in layers)
        if len({name for name, _ in faults}) < number or any(
            ground == "gemma" and layer == 1 and "window" in name for name, layer in faults
        ):  # a layer that has no window
            continue
        cases.append(
            Case(faults, ground, draw.choice(SWEEP_TYPES), draw.choice(("float32", "float16")),
                 draw.choice((7, 9)))
        )  # fmt: skip
    return cases


def check_names() -> None:
    """Every fault that is described is planted somewhere.

    Raises:
        ValueError: One is not.
    """
    used = {name for case in single_faults() for name, _ in case.faults}
    unused = {*kernels.FAULTS, *converters.FAULTS} - used
    if unused:
        raise ValueError(f"faults that no case plants: {sorted(unused)}")
