// Operations value by value, and copies of parts of a matrix.

kernel GROUP void add(global const float *x, global const float *y, ulong count,
                      global float *restrict out) {
    FOR_SPAN(i, count) out[i] = x[i] + y[i];
}

kernel GROUP void multiply(global const float *x, global const float *y, ulong count,
                           global float *restrict out) {
    FOR_SPAN(i, count) out[i] = x[i] * y[i];
}

kernel GROUP void scale(global const float *x, ulong count, float factor,
                        global float *restrict y) {
    FOR_SPAN(i, count) y[i] = x[i] * factor;
}

kernel GROUP void soft_cap(global const float *x, ulong count, float cap,
                           global float *restrict y) {
    // A quotient that overflows is infinite, and cap * tanh(inf) is the right limit.
    FOR_SPAN(i, count) y[i] = cap * tanh(x[i] / cap);
}

// The bias of columns first to first + count of rows of `width` values.
kernel GROUP void add_bias(global const float *x, global const float *bias, uint rows, uint width,
                           uint first, uint count, global float *restrict out) {
    FOR_SPAN(i, (size_t)rows * count) {
        const uint column = i % count;
        const size_t at = i / count * width + first + column;
        out[at] = x[at] + bias[column];
    }
}

// Columns first to first + count of rows of `width` values, into rows of `out_width`, with zeros
// after the last.
kernel GROUP void copy_columns(global const float *x, uint rows, uint width, uint first, uint count,
                               uint out_width, global float *restrict out) {
    FOR_SPAN(i, (size_t)rows * out_width) {
        const uint column = i % out_width;
        out[i] = column < count ? x[i / out_width * width + first + column] : 0;
    }
}

kernel GROUP void silu(global const float *x, ulong count, global float *restrict y) {
    // exp(-x) overflows to infinity for very negative x, and x / inf is the right 0.
    FOR_SPAN(i, count) y[i] = x[i] / (1 + exp(-x[i]));
}

kernel GROUP void gelu(global const float *x, ulong count, global float *restrict y) {
    // 1 + erf(a) loses its digits where it is small; erfc(-a) has them.
    FOR_SPAN(i, count) y[i] = 0.5f * x[i] * erfc(-x[i] * M_SQRT1_2_F);
}

kernel GROUP void gelu_pytorch_tanh(global const float *x, ulong count, global float *restrict y) {
    // (1 + tanh(a)) / 2 is 1 / (1 + exp(-2 a)), which keeps its digits where it is small.
    FOR_SPAN(i, count) {
        const float v = x[i];
        y[i] = v / (1 + exp(-1.59576912f * (v + 0.044715f * v * v * v)));
    }
}

kernel GROUP void relu(global const float *x, ulong count, global float *restrict y) {
    FOR_SPAN(i, count) y[i] = x[i] < 0 ? 0 : x[i];  // NaN stays NaN
}
