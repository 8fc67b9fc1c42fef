// y = x / sqrt(mean(x²) + eps) * (offset + gain) over groups of `size` values: whole rows, or
// single heads.
kernel GROUP void rms_norm(global const float *x, global const float *gain, uint size, float eps,
                           float offset, global float *restrict y) {
    SCRATCH;
    const uint lane = get_local_id(0), vectors = size / 8;
    x += (size_t)get_group_id(0) * size;
    y += (size_t)get_group_id(0) * size;
    float8 squares = 0;
    for (uint i = lane; i < vectors; i += LANES) {
        const float8 v = LOAD8(x + 8 * i);
        squares += v * v;
    }
    float total = sum8(squares);
    for (uint i = 8 * vectors + lane; i < size; i += LANES) total += x[i] * x[i];
    total = sum_lanes(total, scratch);
    const float scale = 1 / sqrt(total / size + eps);
    for (uint i = lane; i < size; i += LANES) y[i] = x[i] * scale * (offset + gain[i]);
}
