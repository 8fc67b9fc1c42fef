// out[i] = row indices[i] of the stored rows, as floats.
//
// Follows stored_float.cl or stored_blocks.cl, which define `eight` and `tail`. Without `restrict`
// a block's scales would be decoded again after every store.
kernel GROUP void expand_rows(global const uchar *restrict stored, ulong row_bytes, float scale,
                              uint width, global const uint *restrict indices,
                              global float *restrict out) {
    global const uchar *row = stored + indices[get_group_id(0)] * row_bytes;
    out += (size_t)get_group_id(0) * width;
    const uint parts = width / 8, lane = get_local_id(0);
#if LANES == 1
    const uint blocks = parts / BLOCK_PARTS, done = blocks * BLOCK_PARTS;
    for (uint block = 0; block < blocks; block++)
        UNROLL for (uint part = 0; part < BLOCK_PARTS; part++)
            STORE8(eight(row, block, part, scale), out + 8 * (block * BLOCK_PARTS + part));
#else
    const uint done = 0;
#endif
    for (uint i = done + lane; i < parts; i += LANES)
        STORE8(eight(row, i / BLOCK_PARTS, i % BLOCK_PARTS, scale), out + 8 * i);
    if (width % 8 && lane == parts % LANES) {
        const float8 last = tail(row, 8 * parts, width % 8, scale);
        const float values[8] = {last.s0, last.s1, last.s2, last.s3,
                                 last.s4, last.s5, last.s6, last.s7};
        for (uint i = 0; i < width % 8; i++) out[8 * parts + i] = values[i];
    }
}
