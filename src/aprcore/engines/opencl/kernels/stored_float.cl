// Weights stored one by one: what `eight` and `tail` make of them as floats.
//
// eight(row, block, part, scale): values 32 * block + 8 * part and the seven after them.
// tail(row, first, count, scale): `count` < 8 values from `first`, then zeros; never reads further.

#define BLOCK_PARTS 4

#if defined(FORMAT_F32)

static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    return LOAD8((global const float *)row + 32 * block + 8 * part);
}

static inline float one(global const uchar *row, uint index, float scale) {
    return ((global const float *)row)[index];
}

#elif defined(FORMAT_F16)

static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    return half_bits8(LOAD8_SHORTS((global const ushort *)row + 32 * block + 8 * part));
}

static inline float one(global const uchar *row, uint index, float scale) {
    return half_bits(((global const ushort *)row)[index]);
}

#elif defined(FORMAT_BF16)

// The upper half of a float.
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const ushort *halves = (global const ushort *)row + 32 * block + 8 * part;
    return as_float8(TO_INT8(LOAD8_SHORTS(halves)) << 16);
}

static inline float one(global const uchar *row, uint index, float scale) {
    return as_float((uint)((global const ushort *)row)[index] << 16);
}

#elif defined(FORMAT_AprQ8)

// One scale for the tensor.
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    return TO_FLOAT8(as_char8(LOAD8_BYTES(row + 32 * block + 8 * part))) * scale;
}

static inline float one(global const uchar *row, uint index, float scale) {
    return (float)(char)row[index] * scale;
}

#endif

static inline float8 tail(global const uchar *row, uint first, int count, float scale) {
    float values[8];
    for (int i = 0; i < 8; i++) values[i] = i < count ? one(row, first + i, scale) : 0;
    return (float8)(values[0], values[1], values[2], values[3],
                    values[4], values[5], values[6], values[7]);
}
