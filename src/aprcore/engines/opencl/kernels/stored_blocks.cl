// Quantised blocks: what `eight` and `tail` make of them as floats.
//
// eight(row, block, part, scale): values 8 * part to 8 * part + 7 of a block. The loops that call
// it run over the parts of a block with constant bounds, so the compiler decodes each scale once.
//
// Source: ggml's block structures; AprQ4 as in docs/formats.md. Products of a scale and a quant are
// exact in float32 (11 + 6 + 4 or 11 + 7 + 6 bits), so values equal the host's to the last bit.

static inline float half_at(global const uchar *bytes) {
    return half_bits(*(global const ushort *)bytes);
}

// Blocks are a multiple of two bytes long, not of four.
static inline uint uint_at(global const uchar *bytes) {
    global const ushort *halves = (global const ushort *)bytes;
    return halves[0] | (uint)halves[1] << 16;
}

// Nibbles of the eight bytes at `bytes`, the upper ones where `shift` is 4.
static inline uchar8 nibbles(global const uchar *bytes, uint shift) {
    return LOAD8_BYTES(bytes) >> (uchar8)(shift) & (uchar8)(15);
}

// Eight bits of `bits`, each as 0 or 16.
static inline int8 fifth_bits(uint bits) {
    return ((int8)(bits) >> COUNT8 & 1) << 4;
}

#if defined(FORMAT_Q8_0)  // half d; char q[32]

#define BLOCK_PARTS 4
#define BLOCK_BYTES 34
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    return TO_FLOAT8(as_char8(LOAD8_BYTES(b + 2 + 8 * part))) * half_at(b);
}

#elif defined(FORMAT_Q4_0)  // half d; uchar q[16]: the first 16 values in the lower nibbles

#define BLOCK_PARTS 4
#define BLOCK_BYTES 18
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const uchar8 q = nibbles(b + 2 + 8 * (part & 1), part / 2 * 4);
    return TO_FLOAT8(as_char8(q - (uchar8)(8))) * half_at(b);
}

#elif defined(FORMAT_Q4_1)  // half d, m; uchar q[16]

#define BLOCK_PARTS 4
#define BLOCK_BYTES 20
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    return TO_FLOAT8(nibbles(b + 4 + 8 * (part & 1), part / 2 * 4)) * half_at(b) + half_at(b + 2);
}

#elif defined(FORMAT_Q5_0)  // half d; uint high; uchar q[16]

#define BLOCK_PARTS 4
#define BLOCK_BYTES 22
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const int8 low = TO_INT8(nibbles(b + 6 + 8 * (part & 1), part / 2 * 4));
    return TO_FLOAT8((low | fifth_bits(uint_at(b + 2) >> 8 * part)) - 16) * half_at(b);
}

#elif defined(FORMAT_Q5_1)  // half d, m; uint high; uchar q[16]

#define BLOCK_PARTS 4
#define BLOCK_BYTES 24
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const int8 low = TO_INT8(nibbles(b + 8 + 8 * (part & 1), part / 2 * 4));
    const int8 q = low | fifth_bits(uint_at(b + 4) >> 8 * part);
    return TO_FLOAT8(q) * half_at(b) + half_at(b + 2);
}

#elif defined(FORMAT_Q4_K) || defined(FORMAT_Q5_K)
// half d, dmin; uchar scales[12]; (Q5_K: uchar high[32];) uchar q[128]: 64 values in 32 bytes

#define BLOCK_PARTS 32

// Scale and minimum of 32 values, 6 bits each: four of a kind in a word, those of the last four
// with their upper two bits in the words of the first four.
static inline float2 scale_and_minimum(global const uchar *b, uint sub) {
    global const uint *words = (global const uint *)(b + 4);
    const uint shift = 8 * (sub & 3);
    uint scales = words[0] & 0x3f3f3f3fu, minima = words[1] & 0x3f3f3f3fu;
    if (sub >= 4) {
        scales = (words[2] & 0x0f0f0f0fu) | (words[0] >> 2 & 0x30303030u);
        minima = (words[2] >> 4 & 0x0f0f0f0fu) | (words[1] >> 2 & 0x30303030u);
    }
    return (float2)(half_at(b) * (float)(int)(scales >> shift & 255),
                    half_at(b + 2) * (float)(int)(minima >> shift & 255));
}

#ifdef FORMAT_Q4_K
#define BLOCK_BYTES 144
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const uint sub = part / 4;
    const float2 s = scale_and_minimum(b, sub);
    return TO_FLOAT8(nibbles(b + 16 + sub / 2 * 32 + part % 4 * 8, sub % 2 * 4)) * s.x - s.y;
}
#else
#define BLOCK_BYTES 176
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const uint sub = part / 4;
    const float2 s = scale_and_minimum(b, sub);
    const uchar8 low = nibbles(b + 48 + sub / 2 * 32 + part % 4 * 8, sub % 2 * 4);
    const uchar8 high = LOAD8_BYTES(b + 16 + part % 4 * 8) >> (uchar8)(sub) & (uchar8)(1);
    return TO_FLOAT8(low | high << (uchar8)(4)) * s.x - s.y;
}
#endif

#elif defined(FORMAT_Q6_K)  // uchar low[128], high[64]; char scales[16]; half d

#define BLOCK_PARTS 32
#define BLOCK_BYTES 210

// Eight quants from `at`: four bits from `low`, two from `high`, shifted down to where they count.
#if LANES == 1 && TOKENS == 1 && defined(__clang__)
// A quarter at once takes a quarter of the operations on bytes. With more tokens to multiply by,
// the registers that this takes are worth more.
typedef ulong4 loose_ulong4 __attribute__((aligned(1)));

static inline char8 six_bits(global const uchar *low, global const uchar *high, uint low_shift,
                             uint high_shift, uint at) {
    const ulong four = 0x0f0f0f0f0f0f0f0ful, two = 0x0303030303030303ul, top = 0x8080808080808080ul;
    const ulong4 q = (*(global const loose_ulong4 *)low >> (ulong4)(low_shift) & (ulong4)(four)) |
                     (*(global const loose_ulong4 *)high >> (ulong4)(high_shift) & (ulong4)(two))
                         << (ulong4)(4);
    // Less 32, byte by byte: the top bit keeps a byte from borrowing of the next.
    const ulong4 centred = ((q | (ulong4)(top)) - (ulong4)(top >> 2)) ^ (ulong4)(top);
    return as_char8(at < 16 ? at < 8 ? centred.x : centred.y : at < 24 ? centred.z : centred.w);
}
#else
static inline char8 six_bits(global const uchar *low, global const uchar *high, uint low_shift,
                             uint high_shift, uint at) {
    const uchar8 two = LOAD8_BYTES(high + at) >> (uchar8)(high_shift) & (uchar8)(3);
    return as_char8((nibbles(low + at, low_shift) | two << (uchar8)(4)) - (uchar8)(32));
}
#endif

static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    // 128 values in 64 low and 32 high bytes: quarters of 32 values.
    const uint side = part / 16, quarter = part / 4 % 4;
    const char8 q = six_bits(b + side * 64 + quarter % 2 * 32, b + 128 + side * 32,
                             quarter / 2 * 4, 2 * quarter, part % 4 * 8);
    return TO_FLOAT8(q) * (half_at(b + 208) * (float)(char)b[192 + part / 2]);
}

#elif defined(FORMAT_AprQ4)  // half d; uchar q[16]: even values in the lower nibbles

#define BLOCK_PARTS 4
#define BLOCK_BYTES 18
static inline float8 eight(global const uchar *row, uint block, uint part, float scale) {
    global const uchar *b = row + (size_t)block * BLOCK_BYTES;
    const uint exponent = *(global const ushort *)b & 0x7c00u;
    // A NaN, infinite or subnormal scale counts as 0, and so do the values, with a plus sign.
    if (exponent == 0 || exponent == 0x7c00u) return 0;
    const uint bytes = uint_at(b + 2 + 4 * part);
    return TO_FLOAT8(((int8)(bytes) >> COUNT8 * 4 & 15) - 8) * half_at(b);
}

#endif

// Values after the end of a row are filling, which may be anything.
static inline float8 tail(global const uchar *row, uint first, int count, float scale) {
    const uint block = first / (8 * BLOCK_PARTS);
    return keep(eight(row, block, first / 8 % BLOCK_PARTS, scale), count);
}
