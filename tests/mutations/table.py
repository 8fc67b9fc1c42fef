"""The mutations: every constant of the judge, every term of its variances, every condition.

A text in braces is a number, which is doubled and halved; a pair is a text and what stands in its
place. Texts are short, so that they last, and each is found exactly once or the run ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One change of a source file.

    Attributes:
        file: Below `src`.
        old, new: A text that stands there once, and what stands there instead.
        tests: The fast test files that should notice.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def short(self) -> str:
        """The change on one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old} -> {new}"


def mutated(mutation: Mutation, text: str) -> str:
    """The source of a file with one mutation.

    Raises:
        LookupError: What it replaces is not there exactly once.
    """
    found = text.count(mutation.old)
    if found != 1:
        raise LookupError(f"{mutation.file} has {mutation.old!r} {found} times, not once")
    return text.replace(mutation.old, mutation.new)


def mutations_of(
    file: str, tests: Sequence[str], changes: Sequence[str | tuple[str, ...]]
) -> list[Mutation]:
    """The mutations of a file: of each text with numbers in braces two for each number."""
    found = []
    paths = tuple(f"tests/unit/{test}.py" for test in tests)
    for change in changes:
        if not isinstance(change, str):
            old, *news = change
            found += [Mutation(file, old, new, paths) for new in news]
            continue
        old = change.replace("{", "").replace("}", "")
        for number in re.finditer(r"\{(.*?)\}", change):
            before, after = (
                text.replace("{", "").replace("}", "")
                for text in (change[: number.start()], change[number.end() :])
            )
            for scale in ("* 2", "/ 2"):
                found.append(
                    Mutation(file, old, f"{before}({number.group(1)} {scale}){after}", paths)
                )
    return found


NOISE = mutations_of(
    "aprcore/judging/noise.py",
    ["test_noise"],
    [
        # Quantiles and constants.
        "(1, {46.3285})", "(1.5, {32.4233})", "(2, {25.3284})", "(3, {18.0782})", "(4, {14.3601})",
        "(6, {10.5351})", "(8, {8.5561})", "(12, {6.4985})", "(16, {5.4202})", "(24, {4.2830})",
        "(32, {3.6774})", "(64, {2.6758})", "(128, {2.0793})", "(256, {1.7117})",
        "(1024, {1.3256})", "(4096, {1.1554})", "(16384, {1.0759})", "(65536, {1.0375})",
        "(1048576, {1.0093})", "(67108864, {1.0012})",
        "({1}, 46.3285)", "({4}, 14.3601)", "({32}, 3.6774)", "({1024}, 1.3256)",
        "({67108864}, 1.0012)",
        "CALIBRATION = {1.5}",
        ("SMALLEST_ENERGY = (2.0**-24)", "SMALLEST_ENERGY = (2.0**-23)",
         "SMALLEST_ENERGY = (2.0**-25)"),
        ("(2.0**-24) ** 2", "(2.0**-24)"),
        "ALIKE = {1e-5}",
        ("PROJECTIONS = 3", "PROJECTIONS = 6", "PROJECTIONS = 1"),
        "reference / size * {1e-6} if",
        # The allowed ratio and the assessment.
        ("float64), 1.0))", "float64), 2.0))"),
        ("CALIBRATION * np.exp", "np.exp"),
        ("worst.ratio <= self", "worst.ratio < self", "worst.ratio > self"),
        ("return SMALLEST_ENERGY * reference / size", "return 0 * reference / size",
         "return SMALLEST_ENERGY / size"),
        ("reference / size * 1e-6", "reference * 1e-6"),
        ("error = np.square(np", "error = np.abs(np"),
        ("min(token_dof, expected", "max(token_dof, expected"),
        ("expected.token_dof is not None", "expected.token_dof is None"),
        ("math.sqrt(total / reference)", "total / reference", "math.sqrt(total)"),
        ("if reference > 0 else 0.0", "if reference > 0 else 1.0"),
        ("part.ratio * worst.factor > worst.ratio * part.factor", "part.ratio > worst.ratio",
         "part.ratio * worst.factor < worst.ratio * part.factor"),
        # The parts.
        ("tuple[int, ...]] = [()]", "tuple[int, ...]] = []"),
        ("kinds += [(axis,) for", "[(axis,) for"),
        ("kinds += [(1, 2), (0, 1)]", "kinds += [(1, 2)]", "kinds += [(0, 1)]"),
        ("if len(axes) > 1:", "if len(axes) > 9:"),
        ("if token in summed", "if token not in summed", "if False"),
        ("dof * min(1.0, token_dof / shape[token])", "dof * min(1.0, token_dof)",
         "dof * max(1.0, token_dof / shape[token])"),
        ("dof.size == 1 else ratio / factor", "dof.size == 1 else ratio"),
        # Tokens that are alike, and shares of the energy.
        ("steps > limit[1:]", "steps < limit[1:]"),
        (" | (limit[1:, 0] == 0)", ""),
        ("return len(seen) ** 2 /", "return len(seen) /"),
        ("float(np.square(sizes).sum())", "float(sizes.sum())"),
        ("limit = ALIKE * np.sqrt", "limit = ALIKE * np.square"),
        ("squares = np.square(predicted).sum", "squares = predicted.sum"),
        ("np.square(sums.predicted) / sums.squares", "sums.predicted / sums.squares"),
        ("measured / predicted, np.inf", "measured / predicted, 0.0"),
        ("np.where(measured == 0, 0.0", "np.where(measured == 0, 1.0"),
    ],
)  # fmt: skip

PREDICTION_TESTS = ("test_prediction_terms", "test_prediction")
PREDICTION = mutations_of(
    "aprcore/engines/prediction.py",
    PREDICTION_TESTS,
    [
        "CLIPPED_TAIL = {4.0}", "ANGLE_ROUNDINGS = {4}", "CUT_TERMS = {4}",
        "= {3.0}, {2.5}, {2.0}, {4.0}, {5.0}", "return ({2} * ulps) ** 2",
        # Embedding.
        ('if weight.dtype.endswith("_K")', 'if not weight.dtype.endswith("_K")'),
        ("variance = self._weight_error(value, steps)", "variance = 0 * value"),
        ("variance + self._stored(value), distinct", "variance, distinct",
         "variance + self._stored(value), None"),
        ("np.unique(tokens).size", "tokens.size"),
        # Scaling.
        ("variance = factor**2 * x.variance", "variance = factor * x.variance",
         "variance = 0 * x.variance", "variance = x.variance"),
        ("x.variance + self._by_side(np.square(x.value), of_factor)", "x.variance",
         "self._by_side(np.square(x.value), of_factor)",
         "x.variance + 2 * self._by_side(np.square(x.value), of_factor)",
         "x.variance + self._by_side(np.square(x.value), of_factor) / 2",
         "x.variance + self._by_side(np.square(value), of_factor)"),
        ("energy * _rounding(factor, profile) ** 2", "energy * abs(_rounding(factor, profile))",
         "energy * (factor * profile.arithmetic.stored.roundoff) ** 2 / 3"),
        ("value=value, variance=variance + self._stored(value))",
         "value=value, variance=variance)",
         "value=value, variance=variance + 2 * self._stored(value))",
         "value=value, variance=variance + self._stored(value) / 2)",
         "value=value, variance=variance + self._stored(value), token_dof=None)"),
        ("arithmetic.stored.round(np", "arithmetic.accumulated.round(np"),
        # Capping.
        ("slope = 1 - np.square(tanh)", "slope = 1 - tanh", "slope = 1 + np.square(tanh)",
         "slope = 1.0", "slope = 1 - np.square(quotient)"),
        ("np.square(cap * slope) * self._stored(quotient)", "0 * value",
         "np.square(slope) * self._stored(quotient)", "cap**2 * self._stored(quotient)",
         "np.square(cap * slope) * self._stored(tanh)",
         "np.square(slope) * self._stored(x.value)",
         "2 * np.square(cap * slope) * self._stored(quotient)",
         "np.square(cap * slope) * self._stored(quotient) / 2",
         "self._rounded(np.square(slope * x.value))"),
        ("variance += cap**2 * self._stored(tanh) + self._stored(value)",
         "variance += cap**2 * self._stored(tanh)", "variance += self._stored(value)",
         "variance += self._stored(tanh) + self._stored(value)",
         "variance += cap * self._stored(tanh) + self._stored(value)",
         "variance += 2 * cap**2 * self._stored(tanh) + self._stored(value)",
         "variance += cap**2 * self._stored(tanh) / 2 + self._stored(value)",
         "variance += cap**2 * self._stored(tanh) + 2 * self._stored(value)",
         "variance += cap**2 * self._stored(tanh) + self._stored(value) / 2",
         "variance += self._rounded(np.square(value)) + self._stored(value)"),
        "self._sum_error((_roundings_of(TANH_ULPS) + {4}) * np.square(value))",
        ("self._sum_error((_roundings_of(TANH_ULPS) + 4) * np.square(value))", "0",
         "self._sum_error((_roundings_of(TANH_ULPS) + 4) * np.square(quotient))"),
        ("variance += np.square(slope) * x.variance", "variance += slope * x.variance",
         "variance += x.variance", "pass", "variance += 2 * np.square(slope) * x.variance"),
        ("np.square(slope) * x.variance\n        return replace(x, value=value, variance=variance)",
         "np.square(slope) * x.variance\n        return Estimate(value, variance)"),
        # RMSNorm.
        ("gain = np.tile(offset + stored", "gain = np.tile(stored", "gain = np.tile(1 + stored"),
        ("_weight_error(stored[None, :]", "_weight_error(gain[None, :]"),
        ("if offset:", "if True:", "if not offset:", "if False:"),
        "np.square(value) * (FLOAT32.roundoff**{2} / {3})",
        ("np.square(value) * (FLOAT32", "np.abs(value) * (FLOAT32",
         "np.square(normed * stored) * (FLOAT32"),
        ("keepdims=True) + eps)", "keepdims=True))"),
        ("np.square(normed) * self._weight_error", "0 * self._weight_error",
         "self._weight_error"),
        "roundings = {0.25} * size / {3} + {3} * _roundings_of(ROOT_ULPS)",
        ("0.25 * size / 3", "0.25 / 3"),
        ("self._sum_error(roundings * np", "0 * self._sum_error(roundings * np"),
        ("+= self._stored(value) + self._stored(normed) * np.square(gain)",
         "+= self._stored(value)", "+= self._stored(normed) * np.square(gain)",
         "+= self._stored(value) + self._stored(normed)",
         "+= 2 * self._stored(value) + self._stored(normed) * np.square(gain)",
         "+= self._stored(value) + self._stored(normed) * np.square(gain) / 2"),
        ("np.square(gain * spread) * x.variance", "0 * x.variance",
         "2 * np.square(gain * spread) * x.variance", "np.square(gain * spread) * x.variance / 2",
         "np.square(gain) * x.variance", "np.square(spread) * x.variance"),
        ("dof = 1.0 if self._any_weights_rounded() else None", "dof = None", "dof = 1.0"),
        # Products.
        "wander * (terms / {2}) + square * (terms / {3})",
        ("wander * (terms / 2) + ", ""),
        (" + square * (terms / 3)", ""),
        "(wander + square) * (steps / {2}) ** {2}",
        ("(wander + square) * (steps", "wander * (steps", "square * (steps"),
        ("FLOAT32.roundoff**2 if profile.arithmetic.cuts_sums else 0.0", "0.0",
         "FLOAT32.roundoff**2"),
        ("= self._sum_error(variance) + self._product", "= self._product"),
        ("variance += self._stored(value) + more", "variance += more",
         "variance += self._stored(value)", "variance += 2 * self._stored(value) + more",
         "variance += self._stored(value) / 2 + more"),
        ("if profile.rounds_weights\n        ]", "if not profile.rounds_weights\n        ]"),
        ("float(np.trace(gram)) ** 2", "float(np.trace(gram))"),
        ("total = float(np.square(gram)", "total = float(np.abs(gram)"),
        # Biases.
        ("x.variance + self._weight_error(bias, steps)", "self._weight_error(bias, steps)",
         "x.variance"),
        ("variance + self._stored(value) + self._stored(x.value)", "variance + self._stored(value)",
         "variance + self._stored(x.value)",
         "variance + 2 * self._stored(value) + self._stored(x.value)",
         "variance + self._stored(value) / 2 + self._stored(x.value)"),
        ("keepdims=True) + np.square(bias)", "keepdims=True)"),
        ("np.mean(np.square(x.value), axis=1, keepdims=True) + np", "np"),
        "_sum_error(size * (x.value.shape[1] / {2} + {1}))",
        ("(x.value.shape[1] / 2 + 1)", "(x.value.shape[1] / 2)", "1"),
        ("else x.token_dof\n", "else None\n"),
        ("1.0 if self._any_weights_rounded() else x", "1.0 if False else x"),
        # RoPE.
        ("np.square(FLOAT32.roundoff * np.maximum", "np.square(FLOAT32.roundoff * 2 * np.maximum",
         "np.square(FLOAT32.roundoff / 2 * np.maximum", "(FLOAT32.roundoff * np.maximum"),
        "np.maximum(angles, {1})) / {3}",
        ("np.maximum(angles, 1)", "angles", "1"),
        ("variance = np.square(swapped(value)) * per_dim", "variance = np.square(value) * per_dim",
         "variance = 0 * per_dim"),
        ("energy = np.square(x.value) + np.square(swapped(x.value))", "energy = np.square(x.value)",
         "energy = np.square(swapped(x.value))"),
        ("self._rounded(energy) + self._stored(value)", "self._rounded(energy)",
         "self._stored(value)", "2 * self._rounded(energy) + self._stored(value)",
         "self._rounded(energy) / 2 + self._stored(value)",
         "self._rounded(energy) + 2 * self._stored(value)"),
        "(x.variance + swapped(x.variance)) / {2}",
        ("swapped(x.variance)) / 2\n        return replace(x, value=value, variance=variance)",
         "swapped(x.variance)) / 2\n        return Estimate(value, variance)"),
        ("(x.variance + swapped(x.variance))", "x.variance", "swapped(x.variance)"),
        "_sum_error(_roundings_of(SINE_ULPS) / {2} * energy)",
        # Attention.
        ("self._product_error(wander, value, head_dim)", "0 * value"),
        "variance += {2} * self._stored(value)",
        ("2 * self._stored(value)", "0"),
        ("num_kv_heads, scale**2, mask)", "num_kv_heads, scale, mask)",
         "num_kv_heads, 1.0, mask)", "num_kv_heads, scale**4, mask)",
         "num_kv_heads, scale**2, Mask())", "num_kv_heads, scale**2, Mask(None, None))"),
        ("num_kv_heads, scale, mask)\n        wander", "num_kv_heads, 1.0, mask)\n        wander",
         "num_kv_heads, scale, Mask())\n        wander"),
        ("masked_softmax(scores.value, mask)", "masked_softmax(scores.value, Mask())"),
        ("variance += squares(q.variance, np.square(k.value))", "pass"),
        ("variance += squares(np.square(q.value), k.variance)", "pass"),
        "relative = np.square(depth) + value.shape[2] / {3}",
        ("= np.square(depth) + value.shape[2] / 3", "= value.shape[2] / 3", "= np.square(depth)"),
        "_roundings_of(EXP_ULPS) + {3} * _roundings_of(DIVISION_ULPS)",
        ("_roundings_of(EXP_ULPS) + 3 *", "3 *"),
        ("* relative) + self._stored(value)", "* relative)",
         "* relative) + 2 * self._stored(value)", "* relative) + self._stored(value) / 2"),
        ("self._sum_error(np.square(value) * relative)", "0",
         "self._sum_error(value * relative)"),
        ("np.square(2.0**FLOAT32.min_exponent), 0.0", "0.0, 0.0",
         "2 * np.square(2.0**FLOAT32.min_exponent), 0.0", "2.0**FLOAT32.min_exponent, 0.0",
         "np.square(2.0**FLOAT32.min_exponent), np.square(2.0**FLOAT32.min_exponent)"),
        "(1 - {2} * value)",
        ("(1 - 2 * value) * scores.variance + pooled", "(1 - 2 * value) * scores.variance",
         "pooled", "scores.variance + pooled"),
        ("pooled = (np.square(value) *", "pooled = (value *"),
        ("np.square(value) * ((1 -", "value * ((1 -"),
        ("self._product_error(wander, value, positions)", "0 * value"),
        ("self._stored(value) + self._turned_back(value)", "self._turned_back(value)",
         "2 * self._stored(value) + self._turned_back(value)",
         "self._stored(value) / 2 + self._turned_back(value)"),
        ("variance += of_softmax + of_values", "variance += of_values", "variance += of_softmax"),
        # Activations.
        "roundings = {4.0}",
        ('if kind == "silu"', 'if kind != "silu"'),
        ("_roundings_of(EXP_ULPS) + _roundings_of(DIVISION_ULPS)", "_roundings_of(EXP_ULPS)",
         "_roundings_of(DIVISION_ULPS)"),
        ("(roundings + np.square(x.value))", "roundings", "np.square(x.value)",
         "(roundings + 2 * np.square(x.value))"),
        ('if kind.startswith("gelu")', 'if not kind.startswith("gelu")'),
        "energy += _roundings_of(TANH_ULPS) * np.square(x.value / {2})",
        ("variance = self._sum_error(energy)", "variance = 0 * energy"),
        ("variance += self._stored(value)\n        if np.any(x.variance):\n            variance"
         " += np.square(self._slope",
         "if np.any(x.variance):\n            variance += np.square(self._slope",
         "variance += 2 * self._stored(value)\n        if np.any(x.variance):\n"
         "            variance += np.square(self._slope"),
        ("np.square(self._slope(x.value, kind))", "np.abs(self._slope(x.value, kind))",
         "np.square(2 * self._slope(x.value, kind))"),
        ("kind)) * x.variance\n        return replace(x, value=value, variance=variance)",
         "kind)) * x.variance\n        return Estimate(value, variance)"),
        ("width = 1e-4 *", "width = 1.0 *"),
        "/ ({2} * width)",
        # Sums and products of two.
        ("x.variance + y.variance + self._stored(value)", "x.variance + self._stored(value)",
         "y.variance + self._stored(value)", "x.variance + y.variance",
         "x.variance + y.variance + 2 * self._stored(value)",
         "x.variance + y.variance + self._stored(value) / 2"),
        ("np.square(y.value) * x.variance + np.square(x.value) * y.variance",
         "np.square(y.value) * x.variance", "np.square(x.value) * y.variance",
         "np.square(x.value) * x.variance + np.square(y.value) * y.variance"),
        ("carried + self._stored(value)", "carried", "carried + 2 * self._stored(value)",
         "self._stored(value)"),
        # Roundings.
        "stored.roundoff**{2} / {3}", "accumulated.roundoff**{2} / {3}",
        ("y * (p.arithmetic.stored.roundoff", "y * (p.arithmetic.accumulated.roundoff"),
        ("y * (p.arithmetic.accumulated.roundoff", "y * (p.arithmetic.stored.roundoff"),
        ("p.arithmetic.stored.rounding", "p.arithmetic.accumulated.rounding"),
        "return steps / {12} + cast",
        ("steps / 12 + cast if", "cast if", "steps / 12 if"),
        ("if profile.weights_rounded else cast", "if not profile.weights_rounded else cast",
         "if True else cast"),
        ("if not profile.rounds_weights:\n", "if profile.rounds_weights:\n"),
    ],
)  # fmt: skip

PRODUCT = mutations_of(
    "aprcore/engines/predicted_product.py",
    PREDICTION_TESTS,
    [
        "SPACING = {0.375} / math.log({2})",
        "relative = ({2} * stored.roundoff) ** 2 / {12} *",
        ("/ 12 * MEAN_SQUARED_SPACING", "/ 12"),
        ("(2 * stored.roundoff) ** 2", "(2 * stored.roundoff)"),
        ("np.ldexp(1.0, stored", "np.ldexp(2.0, stored", "np.ldexp(0.5, stored"),
        ("(stored.digits - 1)) ** 2", "(stored.digits - 1))"),
        "(stored.digits - {1})) ** 2 / {12}",
        ("wander * relative + smallest * energy[:, None]", "wander * relative",
         "smallest * energy[:, None]"),
        ("if _fits(narrow, stored)", "if not _fits(narrow, stored)", "if False"),
        ("np.uint32((1 << lost) - 1)", "np.uint32((1 << lost) - 2)",
         "np.uint32((1 << lost - 1) - 1)", "np.uint32((2 << lost) - 1)"),
        "np.float64)).T / {12}",
        ("profile.weights_rounded and weight.dtype not in", "weight.dtype not in"),
        ('not in ("F32", "F64")', 'not in ("F64",)', 'in ("F32", "F64")'),
        ("more[rows] += self._stored_steps(", "0 * self._stored_steps("),
        ("more[rows] += self._cast(", "self._cast("),
        ("stored.digits < FLOAT32.digits and not on_dump", "not on_dump",
         "stored.digits < FLOAT32.digits", "stored.digits < FLOAT32.digits and on_dump"),
        ("more[:] = 0 if self._carried is None else (squares @ self._carried).T", "more[:] = 0"),
        ("wander[:] = (squares @ self._squares).T", "wander[:] = (narrow @ self._squares).T"),
    ],
)  # fmt: skip

STEPS = mutations_of(
    "aprcore/quant/steps.py",
    ["test_step_terms", "test_steps"],
    [
        # Spacings of float types.
        ("_Spacing(0x7C00,", "_Spacing(0x7800,"), ("0x7C00, 0x0400,", "0x7C00, 0x0800,"),
        ("0x0400, 13,", "0x0400, 12,"), "2.0 ** ({127} - {15} - {10})",
        ("_Spacing(0x7F80,", "_Spacing(0x7F00,"),
        ("0x0080, 16,", "0x0080, 15,"), ("2.0**-7)", "2.0**-6)", "2.0**-8)"),
        ("_Spacing(0x7F80_0000,", "_Spacing(0x7F00_0000,"),
        ("2.0**-23)", "2.0**-22)", "2.0**-24)"),
        ("steps *= steps", "pass"),
        # A scale in front of 32 values.
        ("total = scales.astype(np.float32) ** 2", "total = 0 * scales.astype(np.float32)"),
        ("np.float32(code_square) * _spacing", "np.float32(0) * _spacing"),
        ("if minimum:", "if not minimum:"),
        ('total += _spacing_squares("F16", _halves(blocks, 2))',
         'total += 2 * _spacing_squares("F16", _halves(blocks, 2))',
         'total += _spacing_squares("F16", _halves(blocks, 2)) / 2',
         'total += _spacing_squares("F16", _halves(blocks, 0))'),
        '"Q4_0": _by_scale(({8} / {2.07}) ** 2)',
        '"Q4_1": _by_scale({7.5}**2 + ({15} / {4.1}) ** 2',
        ('"Q4_1": _by_scale(7.5**2 + (15 / 4.1) ** 2', '"Q4_1": _by_scale(7.5**2',
         '"Q4_1": _by_scale((15 / 4.1) ** 2'),
        '"Q5_0": _by_scale(({16} / {2.07}) ** 2)',
        '"Q5_1": _by_scale({15.5}**2 + ({31} / {4.1}) ** 2',
        ('"Q5_1": _by_scale(15.5**2 + (31 / 4.1) ** 2', '"Q5_1": _by_scale(15.5**2',
         '"Q5_1": _by_scale((31 / 4.1) ** 2'),
        '"Q8_0": _by_scale(({127} / {2.07}) ** 2)',
        ("(15 / 4.1) ** 2, minimum=True", "(15 / 4.1) ** 2, minimum=False"),
        ("(31 / 4.1) ** 2, minimum=True", "(31 / 4.1) ** 2, minimum=False"),
        # Super-blocks.
        "_MINIMUM_LOST = {0.06}, {0.5}",
        "extent**{2} / ({2} * group)",
        ("(extent / spread) ** 2", "(extent / spread)"),
        ("(codes * codes + np.where", "(codes + np.where", "(np.where",
         "(2 * codes * codes + np.where"),
        ("np.where(codes == 0, lost, cut)", "np.where(codes == 0, cut, lost)"),
        ("np.where(codes == 0, _MINIMUM_LOST, _MINIMUM_CUT)",
         "np.where(codes == 0, _MINIMUM_CUT, _MINIMUM_LOST)"),
        ("minimum_offset is not None", "minimum_offset is None"),
        ("_halves(blocks, offset).astype(np.float32)[:, None] ** 2",
         "_halves(blocks, offset).astype(np.float32)[:, None]"),
        ("_halves(blocks, minimum_offset).astype(np.float32)[:, None] ** 2",
         "_halves(blocks, minimum_offset).astype(np.float32)[:, None]"),
        '_scales_q2, 80, 82, extent={3}, spread={3.5}',
        '_scales_q3, 108, None, extent={4}, spread={1.77}',
        '"Q4_K": _super_block(32, _scales_q4, 0, 2, extent={15}, spread={4.1}',
        '"Q5_K": _super_block(32, _scales_q4, 0, 2, extent={31}, spread={4.1}',
        '_scales_q6, 208, None, extent={32}, spread={1.77}',
        ("_scales_q2, 80, 82", "_scales_q2, 82, 82", "_scales_q2, 80, 80", "_scales_q2, 80, None"),
        ("_scales_q3, 108,", "_scales_q3, 106,"), ("_scales_q6, 208,", "_scales_q6, 206,"),
        ('"Q4_K": _super_block(32, _scales_q4, 0, 2', '"Q4_K": _super_block(32, _scales_q4, 2, 2',
         '"Q4_K": _super_block(32, _scales_q4, 0, 0',
         '"Q4_K": _super_block(32, _scales_q4, 0, None'),
        ('"Q5_K": _super_block(32, _scales_q4, 0, 2', '"Q5_K": _super_block(32, _scales_q4, 2, 2',
         '"Q5_K": _super_block(32, _scales_q4, 0, 0',
         '"Q5_K": _super_block(32, _scales_q4, 0, None'),
        ("blocks[:, :16] & 0x0F", "blocks[:, :16] >> 4"),
        ("blocks[:, 96:104] & 0x0F, blocks", "blocks[:, 96:104] & 0x07, blocks"),
        ("blocks[:, 96:104] >> 4]", "blocks[:, 96:104] >> 3]"),
        ("blocks[:, 104:108] >> shift & 3", "blocks[:, 104:108] >> shift & 1"),
        ("(0, 2, 4, 6)", "(0, 4, 2, 6)"), ("high << 4)", "high << 3)"),
        ("np.int16(32)", "np.int16(31)"),
        ("blocks[:, 12:16] & 0x0F", "blocks[:, 12:16] >> 4"),
        ("first & 0x3F", "first & 0x1F"), ("first >> 6 << 4", "first >> 6 << 3"),
        ("blocks[:, 192:208].view(np.int8)", "blocks[:, 192:208]"),
        # Codebooks.
        '"IQ4_NL", 32, {0.12}', '"IQ4_XS", 32, {0.12}', '"MXFP4", 32, {0.18}',
        '"NVFP4", 16, {0.155}', '"IQ1_S", 32, {1.1}', '"IQ1_M", 16, {1.0}', '"IQ2_XXS", 32, {0.58}',
        '"IQ2_XS", 16, {0.53}', '"IQ2_S", 16, {0.45}', '"IQ3_XXS", 32, {0.26}',
        '"IQ3_S", 32, {0.21}', '"TQ1_0", 256, {1.0}', '"TQ2_0", 256, {1.0}',
        ('"IQ4_NL", 32', '"IQ4_NL", 16'), ('"IQ4_XS", 32', '"IQ4_XS", 64'),
        ('"MXFP4", 32', '"MXFP4", 16'), ('"NVFP4", 16', '"NVFP4", 32'),
        ('"IQ1_S", 32', '"IQ1_S", 64'), ('"IQ1_M", 16', '"IQ1_M", 32'),
        ('"IQ2_XXS", 32', '"IQ2_XXS", 64'), ('"IQ2_XS", 16', '"IQ2_XS", 32'),
        ('"IQ2_S", 16', '"IQ2_S", 32'), ('"IQ3_XXS", 32', '"IQ3_XXS", 64'),
        ('"IQ3_S", 32', '"IQ3_S", 64'),
        ("np.abs(values, out=values)", "pass"), ("peaks *= peaks", "pass"),
        # Other layouts, and what is not a number.
        ("np.full((rows, 1), scale, np.float32) ** 2", "np.full((rows, 1), scale, np.float32)"),
        ("squares[np.isnan(squares)] = 0", "pass"),
        ("squares[~np.isfinite(squares)] = 0", "pass"),
        ("squares = scales.astype(np.float32) ** 2", "squares = scales.astype(np.float32)"),
        ("math.gcd(row_length, 32)", "math.gcd(row_length, 16)", "math.gcd(row_length, 64)"),
        ("reshape(-1, 18), 0)", "reshape(-1, 18), 2)"),
        ("np.repeat(squares, 32 // group)", "np.repeat(squares, 16 // group)"),
        ("math.gcd(row_length, row_values, group)", "math.gcd(row_length, group)",
         "math.gcd(row_values, group)", "group"),
    ],
)  # fmt: skip

VERDICT = mutations_of(
    "aprcore/judging/verdict.py",
    ["test_judge"],
    [
        "FLOAT32_BOUND = {1e-4}", "HALF_BOUND = {1e-2}", "QUANTISED_BOUND = {0.15}",
        "MANY_TIMES = {1e6}",
        ('({"F32", ', "({"), ('"F64", "float32"', '"float32"'),
        ('"float32", "float64"', '"float64"'),
        (', "float64"})', "})"), ('({"F16", ', "({"), ('"BF16", "float16"', '"float16"'),
        ('"float16", "bfloat16"', '"bfloat16"'), (', "bfloat16"})', "})"),
        # Bounds.
        ("if present - FLOAT_TYPES - HALF_TYPES", "if not present - FLOAT_TYPES - HALF_TYPES",
         "if present - FLOAT_TYPES", "if present - HALF_TYPES"),
        ("if present & HALF_TYPES", "if not present & HALF_TYPES", "if present & FLOAT_TYPES"),
        ("(Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE)", "(Verdict.NONFINITE, Verdict.SHAPE)",
         "(Verdict.FAIL, Verdict.SHAPE)", "(Verdict.FAIL, Verdict.NONFINITE)"),
        # The order of verdicts.
        ("if nonfinite is not None:\n", "if False:\n"),
        ("found.kernel is not None and not found.kernel.passed",
         "found.kernel is not None and found.kernel.passed", "False"),
        ("found.model is not None and not found.model.passed",
         "found.model is not None and found.model.passed", "False"),
        ("if found.layout is not None and", "if found.layout is None and"),
        ("and not kernel_failed and not model_failed", "and not model_failed",
         "and not kernel_failed", ""),
        ("return Verdict.LAYOUT,", "return Verdict.PASS,"),
        ("if kernel_failed:", "if not kernel_failed:", "if False:"),
        ("if model_failed:", "if not model_failed:", "if False:"),
        ("for j in (found.kernel, found.model)", "for j in (found.kernel,)",
         "for j in (found.model,)"),
        ("if j is not None]", "if j is None]"),
        ("if comparison is None:\n", "if comparison is not None:\n"),
        ("if judged else (None, \"\")", "if not judged else (None, \"\")"),
        ("return (Verdict.PASS, f\"kernel", "return (Verdict.FAIL, f\"kernel"),
        ("found.bound if judged else found.bound_alone", "found.bound_alone if judged else"
         " found.bound", "found.bound", "found.bound_alone"),
        ("if error <= bound:", "if error < bound:", "if error > bound:"),
        ("return Verdict.PASS, f\"relative", "return Verdict.NOISE, f\"relative"),
        ("if not judged:\n", "if judged:\n"),
        ("max(judged, key", "min(judged, key"),
        ("j.assessment.ratio * j.assessment.floor**2", "j.assessment.ratio",
         "j.assessment.floor**2 / j.assessment.ratio",
         "j.assessment.ratio * j.assessment.floor**-2"),
        ("if found.inputs_pass:", "if not found.inputs_pass:"),
        ("return Verdict.NOISE, f\"own", "return Verdict.PASS, f\"own"),
        ("return Verdict.INHERITED, \"its", "return Verdict.FAIL, \"its"),
        # What is not finite.
        ("oracle = 0 if comparison is None else comparison.nonfinite_b", "oracle = 0",
         "oracle = 0 if comparison is None else comparison.nonfinite_a"),
        ("if found.traced_nonfinite:", "if not found.traced_nonfinite:"),
        ("if not found.inputs_finite:", "if found.inputs_finite:"),
        ("if not oracle:", "if oracle:"),
        ("\n    if oracle:", "\n    if not oracle:"),
        ("if not found.oracle_inputs_finite:", "if found.oracle_inputs_finite:"),
        ("return Verdict.NONFINITE,", "return Verdict.FAIL,"),
        ("if count == 1 else", "if count != 1 else"),
        ("comparison.nonfinite_a == 0 and comparison.nonfinite_b == 0",
         "comparison.nonfinite_a == 0", "comparison.nonfinite_b == 0"),
        ("finite and comparison.relative_l2 <= bound", "comparison.relative_l2 <= bound",
         "finite and comparison.relative_l2 < bound", "finite"),
        # Words.
        ("worst.ratio < MANY_TIMES", "worst.ratio > MANY_TIMES"),
        ("if self.passed or self.relative_l2 > self.bound", "if self.relative_l2 > self.bound",
         "if self.passed", "if self.passed or self.relative_l2 <= self.bound"),
        ("if not self.passed:", "if self.passed:"),
        ("if self.span:", "if not self.span:"),
        ("_names(self.recomputed)", "_names(self.span)"),
    ],
)  # fmt: skip

LINEAGE = mutations_of(
    "aprtui/lineage.py",
    ["test_lineage"],
    [
        ('("INHERITED", ', "("), ('"NOISE", "FAIL"', '"FAIL"'), ('"FAIL", "NONF', '"NONF'),
        ('"NONFINITE", "SHAPE"', '"SHAPE"'), ('"SHAPE", "MISSING"', '"MISSING"'),
        (', "UNJUDGED")', ")"), ('"SHAPE", "MISSING",', '"SHAPE", "MISSING", "PASS",'),
        ("if _diverges(state, k))", "if not _diverges(state, k))"),
        ('_word(state, k) == "NOISE"', '_word(state, k) != "NOISE"'),
        ("faults = sorted((k for k in parents if _diverges(state, k)), key=computation_order)",
         "faults = [k for k in parents if _diverges(state, k)]"),
        ("min(faults or noise", "max(faults or noise", "min(noise or faults",
         "min(faults + noise", "min(faults"),
        ("if origin is None:", "if origin is not None:"),
        ("path.append(parents[path[-1]])", "path.append(key)"),
        ("tuple(reversed(path))", "tuple(path)"),
        ("return self.path[-1]", "return self.path[0]"),
        ("if header is None or _word(state, key) not in CARRIES_ON", "if header is None",
         "if header is None or _word(state, key) in CARRIES_ON"),
        ("list(graph.readers(key))", "[]", "list(graph.inputs(key))"),
        ("if reader not in state.reports:", "if reader in state.reports:", "if False:"),
        ("unseen.extend(graph.readers(reader))", "pass"),
        ("elif _word(state, reader) in CARRIES_ON", "elif _word(state, reader) not in CARRIES_ON",
         "else"),
        ("tuple(sorted(found, key=computation_order))", "tuple(sorted(found, key=str))"),
        ("if header is None:\n        return {}", "if header is not None:\n        return {}"),
        ("source not in state.reports or _word(state, source) in CARRIES_ON",
         "_word(state, source) in CARRIES_ON", "source not in state.reports",
         "source in state.reports and _word(state, source) in CARRIES_ON",
         "source not in state.reports or _word(state, source) not in CARRIES_ON"),
        ("ancestors(key, carries_on)", "ancestors(key, lambda _: True)",
         "ancestors(key, lambda _: False)"),
        ("{key.stage for key in keys}", "set()"),
        (", header.architecture)", ", None)"),
        ("_outline(header.num_layers,", "_outline(1,"),
        ("report is not None and report.is_divergence", "report is not None",
         "report is not None and not report.is_divergence"),
    ],
)  # fmt: skip

GRAPH = mutations_of(
    "aprcore/network/graph.py",
    ["test_stages"],
    [
        # Readers.
        ("near: list[int | None] = [key.layer]", "near: list[int | None] = []"),
        ("bisect_left(self.layers, key.layer + 1)", "bisect_left(self.layers, key.layer)",
         "bisect_left(self.layers, key.layer + 2)"),
        ("if after < len(self.layers) else None", "if after + 1 < len(self.layers) else None",
         "if False else None"),
        ("if key.layer is not None:\n            after", "if False:\n            after"),
        ("if key in row.inputs", "if key not in row.inputs", "if key in row.inputs[:1]",
         "if key in row.inputs[-1:]"),
        # Ancestors.
        ("reader = unseen.popleft()", "reader = unseen.pop()"),
        ("if source not in visited:", "if True:"),
        ("visited.add(source)", "pass"),
        ("yield source, reader", "yield source, key", "yield reader, source"),
        ("if goes_on(source):", "if goes_on(reader):", "if not goes_on(source):", "if True:",
         "if False:"),
    ],
)  # fmt: skip

MASK = mutations_of(
    "aprcore/network/mask.py",
    ["test_stages"],
    [
        ("behind: int | None = None", "behind: int | None = 1"),
        ("ahead: int | None = 0", "ahead: int | None = 1", "ahead: int | None = None"),
        ("return self.ahead == 0", "return self.ahead != 0", "return self.ahead == 1",
         "return self.ahead is not None"),
        # From where to where.
        ("first = 0 if self.behind is None", "first = 1 if self.behind is None"),
        ("max(0, position - self.behind)", "max(1, position - self.behind)",
         "position - self.behind", "max(0, position - self.behind - 1)",
         "max(0, position - self.behind + 1)", "max(0, position + self.behind)"),
        ("stop = num_positions if", "stop = num_positions - 1 if", "stop = position + 1 if"),
        ("position + self.ahead + 1", "position + self.ahead", "position + self.ahead + 2",
         "position - self.ahead + 1"),
        ("min(stop, num_positions)", "stop", "max(stop, num_positions)"),
        # The same as a matrix.
        ("np.arange(num_positions - num_queries, num_positions)", "np.arange(num_queries)"),
        ("position <= query + self.ahead", "position < query + self.ahead",
         "position <= query - self.ahead", "position <= query + self.ahead + 1",
         "position >= query + self.ahead"),
        ("position >= query - self.behind", "position > query - self.behind",
         "position >= query + self.behind", "position >= query - self.behind - 1",
         "position <= query - self.behind"),
        ("seen &= position <=", "seen |= position <="),
        ("seen &= position >=", "seen |= position >=", "seen = position >="),
        # In words.
        ('"causal" if self.is_causal else', '"causal" if not self.is_causal else'),
        ("a window of {self.behind + 1}", "a window of {self.behind}"),
    ],
)  # fmt: skip

ORACLE = mutations_of(
    "aprcore/capture/oracle.py",
    ["test_oracle_check"],
    [
        # Whose arithmetic.
        ("arithmetic_of_dtype(request.dtype)", "arithmetic_of_dtype(None)",
         'arithmetic_of_dtype("float16")'),
        # A layer at a time, the last one too.
        ("if self._layer and next(iter(self._layer)).layer != key.layer:", "if False:",
         "if self._layer:"),
        (".layer != key.layer:", ".layer == key.layer:"),
        ("= values.copy()", "= values"),
        ("self._judge()\n        if torch", "if torch"),
        ("sorted(self._layer, key=self._graph.order)", "list(self._layer)"),
        ("self._layer.clear()", "pass"),
        ("self._side.enter(key)\n", "pass\n"),
        ("self._side.record(key, values)", "pass"),
        ("if expected is None:\n", "if True:\n", "if expected is not None:\n"),
        ("if judgment is None:", "if judgment is not None:", "if True:"),
        ("self.judged += 1", "pass"),
        ("if not judgment.passed:", "if judgment.passed:", "if False:"),
        # Logits.
        ("run_model(model, tokens).clone()", "run_model(model, tokens)"),
        ("if torch.equal(logits, self._plain):", "if torch.allclose(logits, self._plain):",
         "if True:", "if not torch.equal(logits, self._plain):"),
        ("x.detach().double().cpu()", "x.detach().half().cpu()"),
    ],
)  # fmt: skip

MUTATIONS = (*NOISE, *PREDICTION, *PRODUCT, *STEPS, *VERDICT, *LINEAGE, *GRAPH, *MASK, *ORACLE)

# What no test can tell, each with the reason.
EXEMPT = (
    # A number of errors below 1: the quantile is that of 1 at either end, by interpolation.
    *mutations_of("aprcore/judging/noise.py", (), [("float64), 1.0))", "float64), 0.5))")]),
    # Where nothing is predicted the ratio is 0 or infinite, whatever the factor.
    *mutations_of("aprcore/judging/noise.py", (), ["/ sums.squares, {1.0})"]),
    # The size of a piece decides the time that a product takes.
    *mutations_of("aprcore/engines/prediction.py", (), ["PIECE_BYTES = {1024} * {1024}"]),
    # The width of a difference quotient: any that is small gives the slope.
    *mutations_of("aprcore/engines/prediction.py", (), ["width = {1e-4} *"]),
    # Squares of the spacings of subnormal numbers, and of twice them, are 0 in float32.
    *mutations_of(
        "aprcore/quant/steps.py",
        (),
        [
            ("0x7F80, 0x0080,", "0x7F80, 0x0100,"),
            ("0x7F80_0000, 0x0080_0000,", "0x7F80_0000, 0x0100_0000,"),
        ],
    ),
    # One that is looked at twice is found once all the same.
    *mutations_of("aprtui/lineage.py", (), [("if reader in visited:", "if False:")]),
    # The first condition on what is all true.
    *mutations_of("aprcore/network/mask.py", (), [("seen &= position <=", "seen = position <=")]),
    # No stage is made from itself.
    *mutations_of("aprcore/network/graph.py", (), [("deque([key]), {key}", "deque([key]), set()")]),
)
