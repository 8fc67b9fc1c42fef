// The index of the largest of `count` values, the first of equals; a NaN counts as the largest, as
// in numpy. One work-group.

static inline bool wins(float a, uint a_index, float b, uint b_index) {
    if (isnan(a) || isnan(b)) return isnan(a) && (!isnan(b) || a_index < b_index);
    return a > b || (a == b && a_index < b_index);
}

kernel GROUP void argmax(global const float *x, uint count, global uint *index) {
    const uint lane = get_local_id(0);
    uint best = min(lane, count - 1);
    for (uint i = best; i < count; i += LANES)
        if (wins(x[i], i, x[best], best)) best = i;
#if LANES > 1
    local uint winners[LANES];
    winners[lane] = best;
    for (uint half_way = LANES / 2; half_way; half_way /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way) {
            const uint other = winners[lane + half_way];
            if (wins(x[other], other, x[best], best)) winners[lane] = best = other;
        }
    }
#endif
    if (lane == 0) *index = best;
}
