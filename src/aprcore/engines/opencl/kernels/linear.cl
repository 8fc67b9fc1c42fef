// y[t, first + r] = sum over k of x[t, k] * w[r, k], the weights expanded inside the product.
//
// Follows stored_float.cl or stored_blocks.cl, which define `eight` and `tail`.

#define BLOCK_VALUES (8 * BLOCK_PARTS)

#ifdef TOKENS
// Few tokens. A work-group computes ROWS rows for TOKENS tokens; each vector of x serves all rows.
// On a CPU the partial sums are vectors that stay in registers until the end. Elsewhere they are
// single floats: a lane has no vector registers, and eight times as many would not fit.

#if LANES == 1
typedef float8 partial;
#define ADD_PRODUCT(sum, w, x) (sum) += (w) * (x)
#define SETTLE(sum) sum8(sum)
// Enough sums that none waits for the one before it.
#define TURNS (ROWS * TOKENS == 1 ? 4 : ROWS * TOKENS < 4 ? 2 : 1)
#else
typedef float partial;
#define ADD_PRODUCT(sum, w, x) (sum) += sum8((w) * (x))
#define SETTLE(sum) (sum)
#define TURNS 1
#endif

static inline void add_products(partial sums[ROWS][TOKENS][TURNS], uint turn, const float8 w[ROWS],
                                global const float *x, uint x_stride, uint last_token) {
    UNROLL for (uint t = 0; t < TOKENS; t++) {
        const float8 v = LOAD8(x + (size_t)min(t, last_token) * x_stride);
        UNROLL for (uint r = 0; r < ROWS; r++) ADD_PRODUCT(sums[r][t][turn % TURNS], w[r], v);
    }
}

// x has rows of x_stride >= width values, a multiple of eight, zero after the width.
kernel GROUP void linear_few(global const uchar *weights, ulong row_bytes, uint rows, float scale,
                             global const float *x, uint x_stride, uint width, uint tokens,
                             global float *y, uint y_stride, uint first) {
    const uint row = get_group_id(0) * ROWS, token = get_group_id(1) * TOKENS;
    const uint last_token = tokens - token - 1, lane = get_local_id(0);
    global const uchar *w_rows[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++) w_rows[r] = weights + min(row + r, rows - 1) * row_bytes;
    x += (size_t)token * x_stride;
    partial sums[ROWS][TOKENS][TURNS];
    UNROLL for (uint r = 0; r < ROWS; r++)
        UNROLL for (uint t = 0; t < TOKENS; t++)
            UNROLL for (uint turn = 0; turn < TURNS; turn++) sums[r][t][turn] = 0;

    const uint blocks = width / BLOCK_VALUES, parts = width / 8;
    float8 w[ROWS];
#if LANES == 1
    for (uint block = 0; block < blocks; block++) {
        UNROLL for (uint part = 0; part < BLOCK_PARTS; part++) {
            UNROLL for (uint r = 0; r < ROWS; r++) w[r] = eight(w_rows[r], block, part, scale);
            add_products(sums, part, w, x + block * BLOCK_VALUES + 8 * part, x_stride, last_token);
        }
    }
    const uint done = blocks * BLOCK_PARTS;
#else
    const uint done = 0;
#endif
    for (uint i = done + lane; i < parts; i += LANES) {
        UNROLL for (uint r = 0; r < ROWS; r++)
            w[r] = eight(w_rows[r], i / BLOCK_PARTS, i % BLOCK_PARTS, scale);
        add_products(sums, 0, w, x + 8 * i, x_stride, last_token);
    }
    if (width % 8 && lane == parts % LANES) {
        UNROLL for (uint r = 0; r < ROWS; r++) w[r] = tail(w_rows[r], 8 * parts, width % 8, scale);
        add_products(sums, 0, w, x + 8 * parts, x_stride, last_token);
    }

#if LANES > 1
    local float shares[LANES][ROWS * TOKENS];
    UNROLL for (uint i = 0; i < ROWS * TOKENS; i++)
        shares[lane][i] = sums[i / TOKENS][i % TOKENS][0];
    for (uint half_way = LANES / 2; half_way; half_way /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way)
            for (uint i = 0; i < ROWS * TOKENS; i++) shares[lane][i] += shares[lane + half_way][i];
    }
    if (lane) return;
    UNROLL for (uint i = 0; i < ROWS * TOKENS; i++)
        sums[i / TOKENS][i % TOKENS][0] = shares[0][i];
#endif
    UNROLL for (uint r = 0; r < ROWS; r++)
        UNROLL for (uint t = 0; t < TOKENS; t++)
            UNROLL for (uint turn = 1; turn < TURNS; turn++) sums[r][t][0] += sums[r][t][turn];
    y += (size_t)token * y_stride + first + row;
    UNROLL for (uint t = 0; t < TOKENS; t++)
        UNROLL for (uint r = 0; r < ROWS; r++)
            if (t <= last_token && row + r < rows)
                y[(size_t)t * y_stride + r] = SETTLE(sums[r][t][0]);
}

#else
// Many tokens, on a CPU. A chunk of ROWS rows is expanded once and stays in the nearest cache,
// where it meets tiles of 16 tokens: 12 vectors of sums, a size that 16 registers hold.

#define CHUNK 256

// x in tiles of 16 tokens, [tile, k, 16], zero for tokens that are not there.
kernel GROUP void pack_tokens(global const float *x, uint width, uint tokens,
                              global float *restrict packed) {
    const uint tile = get_group_id(1), start = get_group_id(0) * CHUNK;
    const uint stop = min(start + CHUNK, width);
    for (uint i = 0; i < 16; i++) {
        const uint token = 16 * tile + i;
        global const float *from = x + (size_t)token * width;
        global float *to = packed + (size_t)tile * width * 16 + i;
        for (uint k = start; k < stop; k++) to[(size_t)k * 16] = token < tokens ? from[k] : 0;
    }
}

static inline void expand_chunk(global const uchar *row, uint first, uint count, float scale,
                                float8 *out) {
    const uint blocks = count / BLOCK_VALUES;
    for (uint block = 0; block < blocks; block++)
        UNROLL for (uint part = 0; part < BLOCK_PARTS; part++)
            out[block * BLOCK_PARTS + part] = eight(row, first / BLOCK_VALUES + block, part, scale);
    for (uint part = blocks * BLOCK_PARTS; 8 * part < count; part++) {
        const uint at = first + 8 * part, left = count - 8 * part;
        out[part] = left < 8 ? tail(row, at, left, scale)
                             : eight(row, at / BLOCK_VALUES, at / 8 % BLOCK_PARTS, scale);
    }
}

kernel GROUP void linear_many(global const uchar *weights, ulong row_bytes, uint rows, float scale,
                              global const float *packed, uint width, uint tokens,
                              global float *y, uint y_stride, uint first) {
    const uint row = get_group_id(0) * ROWS, first_tile = get_group_id(1) * TILES;
    const uint tiles = min((uint)TILES, (tokens + 15) / 16 - first_tile);
    float8 w[ROWS][CHUNK / 8], totals[TILES][ROWS][2];
    for (uint i = 0; i < tiles; i++)
        for (uint r = 0; r < ROWS; r++) totals[i][r][0] = totals[i][r][1] = 0;

    for (uint k = 0; k < width; k += CHUNK) {
        const uint count = min((uint)CHUNK, width - k);
        for (uint r = 0; r < ROWS; r++)
            expand_chunk(weights + min(row + r, rows - 1) * row_bytes, k, count, scale, w[r]);
        for (uint i = 0; i < tiles; i++) {
            global const float *x = packed + ((size_t)(first_tile + i) * width + k) * 16;
            const float *values = (const float *)w;
            float8 low[ROWS], high[ROWS];
            UNROLL for (uint r = 0; r < ROWS; r++) low[r] = high[r] = 0;
            for (uint j = 0; j < count; j++) {
                const float8 x_low = LOAD8(x + 16 * j), x_high = LOAD8(x + 16 * j + 8);
                UNROLL for (uint r = 0; r < ROWS; r++) {
                    low[r] += values[r * CHUNK + j] * x_low;
                    high[r] += values[r * CHUNK + j] * x_high;
                }
            }
            UNROLL for (uint r = 0; r < ROWS; r++) {
                totals[i][r][0] += low[r];
                totals[i][r][1] += high[r];
            }
        }
    }
    const float *sums = (const float *)totals;
    for (uint i = 0; i < 16 * tiles; i++) {
        const uint token = 16 * first_tile + i;
        if (token >= tokens) break;
        for (uint r = 0; r < ROWS && row + r < rows; r++)
            y[(size_t)token * y_stride + first + row + r] = sums[(i / 16 * ROWS + r) * 16 + i % 16];
    }
}
#endif
