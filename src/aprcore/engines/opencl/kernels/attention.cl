// Attention as three stages, each of which is written out whole. T tokens are the last of S
// positions, so token t is at position t + S - T; a mask lets it see so many positions behind its
// own and so many ahead of it. Several query heads share a key and value head.

// The positions [x, y) that the token at `position` sees: itself at least. No bound is too large.
static inline uint2 seen_from(uint position, uint positions, uint behind, uint ahead) {
    return (uint2)(position - min(position, behind),
                   position + min(ahead, positions - 1 - position) + 1);
}

// q [T, H, D], k [S, K, D] -> scores [H, T, S], zero where masked.
kernel GROUP void attention_scores(global const float *q, global const float *k, uint tokens,
                                   uint positions, uint heads, uint kv_heads, uint size,
                                   float scale, uint behind, uint ahead,
                                   global float *restrict scores) {
    const uint vectors = size / 8;
    FOR_SPAN(index, (size_t)heads * tokens * positions) {
        const uint s = index % positions, t = index / positions % tokens;
        const uint head = index / positions / tokens, kv_head = head / (heads / kv_heads);
        const uint2 seen = seen_from(t + (positions - tokens), positions, behind, ahead);
        if (s < seen.x || s >= seen.y) {
            scores[index] = 0;
            continue;
        }
        global const float *a = q + ((size_t)t * heads + head) * size;
        global const float *b = k + ((size_t)s * kv_heads + kv_head) * size;
        float8 sums = 0;
        for (uint i = 0; i < vectors; i++) sums += LOAD8(a + 8 * i) * LOAD8(b + 8 * i);
        float total = sum8(sums);
        for (uint i = 8 * vectors; i < size; i++) total += a[i] * b[i];
        scores[index] = total * scale;
    }
}

// scores [rows, S] -> weights [rows, S], row t of every `tokens` rows over what token t sees.
kernel GROUP void masked_softmax(global const float *scores, uint tokens, uint positions,
                                 uint behind, uint ahead, global float *restrict weights) {
    SCRATCH;
    const uint lane = get_local_id(0), row = get_group_id(0);
    const uint position = row % tokens + (positions - tokens);
    const uint2 seen = seen_from(position, positions, behind, ahead);
    scores += (size_t)row * positions;
    weights += (size_t)row * positions;
    // fmax passes over NaN; the power of a NaN makes the sum NaN, and with it the whole row.
    float largest = -INFINITY;
    for (uint s = seen.x + lane; s < seen.y; s += LANES) largest = fmax(largest, scores[s]);
    largest = max_lanes(largest, scratch);
    float total = 0;
    for (uint s = seen.x + lane; s < seen.y; s += LANES) {
        const float power = exp(scores[s] - largest);
        weights[s] = power;
        total += power;
    }
    total = sum_lanes(total, scratch);
    for (uint s = seen.x + lane; s < seen.y; s += LANES) weights[s] /= total;
    for (uint s = lane; s < seen.x; s += LANES) weights[s] = 0 / total;
    for (uint s = seen.y + lane; s < positions; s += LANES) weights[s] = 0 / total;
}

// weights [H, T, S], v [S, K, D] -> out [T, H, D]. One index is eight dimensions.
kernel GROUP void weighted_values(global const float *weights, global const float *v, uint tokens,
                                  uint positions, uint heads, uint kv_heads, uint size,
                                  global float *restrict out) {
    const uint parts = (size + 7) / 8;
    FOR_SPAN(index, (size_t)tokens * heads * parts) {
        const uint part = index % parts, head = index / parts % heads, t = index / parts / heads;
        const uint kv_head = head / (heads / kv_heads), count = min(8u, size - 8 * part);
        global const float *row = weights + ((size_t)head * tokens + t) * positions;
        global const float *from = v + (size_t)kv_head * size + 8 * part;
        global float *to = out + ((size_t)t * heads + head) * size + 8 * part;
        const size_t stride = (size_t)kv_heads * size;
        // Masked positions weigh 0 and are not skipped: a NaN there shows, as on the CPU.
        if (count == 8) {
            float8 sums = 0;
            for (uint s = 0; s < positions; s++) sums += LOAD8(from + s * stride) * row[s];
            STORE8(sums, to);
        } else {
            for (uint i = 0; i < count; i++) {
                float sum = 0;
                for (uint s = 0; s < positions; s++) sum += from[s * stride + i] * row[s];
                to[i] = sum;
            }
        }
    }
}
