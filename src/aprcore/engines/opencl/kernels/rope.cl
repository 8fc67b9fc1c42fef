// Rotates the heads of x, rows of `heads` heads of 2 * half dimensions. Frequency i turns the
// dimensions i * spacing and i * spacing + partner: (1, half) pairs the halves of a head,
// (2, 1) pairs neighbours.
//
// cosines and sines: [tokens, half]. Both come from the host, because angles are rounded in float32
// and every engine must round them alike to be comparable.
kernel GROUP void rotate_heads(global const float *x, global const float *cosines,
                         global const float *sines, uint tokens, uint heads, uint half_size,
                         uint spacing, uint partner, global float *restrict y) {
    FOR_SPAN(index, (size_t)tokens * heads * half_size) {
        const size_t head = index / half_size;
        const uint i = index % half_size;
        const size_t angle = head / heads * half_size + i;
        const size_t low = head * 2 * half_size + i * spacing, high = low + partner;
        const float a = x[low], b = x[high], c = cosines[angle], s = sines[angle];
        y[low] = a * c - b * s;
        y[high] = b * c + a * s;
    }
}
