// What every kernel shares. Prepended to each program.
//
// LANES work-items form a work-group and share one row. On CPU devices LANES is 1, because there
// the vector registers of one work-item are the lanes; on others it is a power of two, and lanes
// meet in a tree over local memory whose order is fixed, so that results repeat bit for bit.
//
// No vector is wider than 256 bits: PoCL may compile its built-in functions for wider registers
// than the kernels that call them, and wider arguments are then lost on the way.

#define GROUP __attribute__((reqd_work_group_size(LANES, 1, 1)))

// vload8 and vload8 of bytes go value by value on PoCL; an under-aligned vector type is one load.
#if LANES == 1 && defined(__clang__)
typedef float8 loose_float8 __attribute__((aligned(4)));
typedef uchar8 loose_uchar8 __attribute__((aligned(1)));
typedef ushort8 loose_ushort8 __attribute__((aligned(2)));
#define LOAD8(pointer) (*(global const loose_float8 *)(pointer))
#define LOAD8_BYTES(pointer) (*(global const loose_uchar8 *)(pointer))
#define LOAD8_SHORTS(pointer) (*(global const loose_ushort8 *)(pointer))
#define STORE8(value, pointer) (*(global loose_float8 *)(pointer) = (value))
#define TO_FLOAT8(integers) __builtin_convertvector(integers, float8)
#define TO_INT8(integers) __builtin_convertvector(integers, int8)
#else
#define LOAD8(pointer) vload8(0, pointer)
#define LOAD8_BYTES(pointer) vload8(0, pointer)
#define LOAD8_SHORTS(pointer) vload8(0, pointer)
#define STORE8(value, pointer) vstore8(value, 0, pointer)
#define TO_FLOAT8(integers) convert_float8(integers)
#define TO_INT8(integers) convert_int8(integers)
#endif

// Arrays of sums live in registers only where every index is a constant.
#define UNROLL _Pragma("unroll")

// The groups of a launch share `count` indices in equal spans; the lanes of one go side by side.
#define SPAN(count) (((size_t)(count) + get_num_groups(0) - 1) / get_num_groups(0))
#define FOR_SPAN(i, count)                                                        \
    for (size_t i = get_group_id(0) * SPAN(count) + get_local_id(0),              \
                end = min((size_t)(count), (get_group_id(0) + 1) * SPAN(count));  \
         i < end; i += LANES)

#define COUNT8 ((int8)(0, 1, 2, 3, 4, 5, 6, 7))

static inline float sum8(float8 v) {
    const float4 four = v.lo + v.hi;
    const float2 two = four.lo + four.hi;
    return two.x + two.y;
}

// The first `count` values of v, zero after them whatever was there.
static inline float8 keep(float8 v, int count) {
    return as_float8(as_int8(v) & (COUNT8 < (int8)(count)));
}

// A half's bits as a float, exactly: exponent and mantissa are shifted into place and scaled by
// the difference of the biases, which is right for subnormals too; the exponent of infinities and
// NaN is filled up.
static inline float half_bits(uint bits) {
    const float scaled = as_float((bits & 0x7fffu) << 13) * 0x1p+112f;
    const uint special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return as_float(as_uint(scaled) | special | (bits & 0x8000u) << 16);
}

static inline float8 half_bits8(ushort8 halves) {
    const int8 bits = TO_INT8(halves);
    const float8 scaled = as_float8((bits & 0x7fff) << 13) * 0x1p+112f;
    const int8 special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return as_float8(as_int8(scaled) | special | (bits & 0x8000) << 16);
}

#if LANES > 1
// The total over all lanes, in a tree, to every lane.
static inline float sum_lanes(float value, local float *scratch) {
    const uint lane = get_local_id(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    scratch[lane] = value;
    for (uint half_way = LANES / 2; half_way; half_way /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way) scratch[lane] += scratch[lane + half_way];
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    return scratch[0];
}

static inline float max_lanes(float value, local float *scratch) {
    const uint lane = get_local_id(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    scratch[lane] = value;
    for (uint half_way = LANES / 2; half_way; half_way /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way) scratch[lane] = fmax(scratch[lane], scratch[lane + half_way]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    return scratch[0];
}
#define SCRATCH local float scratch[LANES]
#else
#define SCRATCH
#define sum_lanes(value, scratch) (value)
#define max_lanes(value, scratch) (value)
#endif
