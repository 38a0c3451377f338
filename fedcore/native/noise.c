/* Normal numbers from random bits, in single precision: Box and Muller's transform of fedcore.training.dpsgd.GaussianNoise.

   A pair takes 64 bits for its radius and 32 for its angle; of a piece's pairs all radii's bits come first. The first half of a
   piece are cosines, the second half sines. */

typedef int64_t Wide __attribute__((vector_size(128), aligned(4), may_alias));
typedef int32_t Narrow __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(64)));
typedef float Lanes __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));

INLINE Lanes chosen(Words m, Lanes a, Lanes b) { return (Lanes)((m & (Words)a) | (~m & (Words)b)); }

/* ln(x) of normal x > 0: ln(1 + f) / f by Chebyshev's polynomial of degree 9 where 1 + f is within a factor 1.4143 of 1. */
INLINE Lanes natural(Lanes x) {
    Words bits = (Words)x, k = (bits >> 23) - 127;
    Lanes m = (Lanes)((bits & 0x7fffff) | 0x3f800000);
    const Words large = m > 1.41421356f;
    m = chosen(large, m * 0.5f, m);
    k -= large;
    const Lanes f = m - 1, e = __builtin_convertvector(k, Lanes);
    Lanes p = f * -0.07638592437025066f + 0.12914170318559615f;
    p = p * f - 0.13240842696032984f;
    p = p * f + 0.14180078719642378f;
    p = p * f - 0.16609126504794514f;
    p = p * f + 0.20002071674735994f;
    p = p * f - 0.2500158512304748f;
    p = p * f + 0.3333332402364028f;
    p = p * f - 0.4999998829414192f;
    p = p * f * f + e * 1.42860682030941723212e-6f + f;
    return p + e * 0.693145751953125f;
}

INLINE Lanes root(Lanes x) {
#if __has_builtin(__builtin_elementwise_sqrt)
    return __builtin_elementwise_sqrt(x);
#else
    for (int i = 0; i < 16; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

/* Sine and cosine of pi * turn / 2^31: quarter turns by the highest bits, the rest within pi / 4 by Taylor's series. */
INLINE void circle(Words turn, Lanes *sine, Lanes *cosine) {
    const Words quarter = (turn + (1 << 29)) >> 30;
    const Lanes x = __builtin_convertvector(turn - (quarter << 30), Lanes) * 1.4629180792671596e-9f, z = x * x;
    Lanes s = z * 2.7557319e-6f - 1.9841270e-4f, c = z * 2.4801587e-5f - 1.3888889e-3f;
    s = s * z + 8.3333333e-3f;
    c = c * z + 4.1666667e-2f;
    s = s * z - 1.6666667e-1f;
    c = c * z - 0.5f;
    s = s * z * x + x;
    c = c * z + 1;
    const Words swap = (Words){0} - (quarter & 1);
    const Words down = (quarter & 2) << 30, left = ((quarter + 1) & 2) << 30;
    *sine = (Lanes)((Words)chosen(swap, c, s) ^ down);
    *cosine = (Lanes)((Words)chosen(swap, s, c) ^ left);
}

INLINE void pairs16(const uint8_t *bits, long pairs, long at, float deviation, Lanes *first, Lanes *second) {
    const Wide wide = *(const Wide *)(bits + 8 * at);
    Lanes r = __builtin_convertvector(wide, Lanes);
    r = (Lanes)((Words)r & 0x7fffffff);
    r = chosen(r < 1, (Lanes){0} + 1, r) * 0x1p-63f;
    r = root(natural(r) * -2) * deviation;
    Lanes sine, cosine;
    circle(*(const Narrow *)(bits + 8 * pairs + 4 * at), &sine, &cosine);
    *first = cosine * r;
    *second = sine * r;
}

/* Fills a piece of ``count`` numbers from 12 bytes for each of its (count + 1) / 2 pairs. */
__attribute__((visibility("default"))) void gaussian(const uint8_t *bits, int64_t count, double deviation, float *out) {
    const long pairs = (count + 1) / 2, rest = count - pairs;
    Lanes first, second;
    long at = 0;
    for (; at + 16 <= rest; at += 16) {
        pairs16(bits, pairs, at, (float)deviation, &first, &second);
        *(Loose *)(out + at) = first;
        *(Loose *)(out + pairs + at) = second;
    }
    if (at == pairs) return;
    uint8_t last[12 * 16];
    const long left = pairs - at;
    for (long i = 0; i < 12 * 16; i++) last[i] = 0;
    for (long i = 0; i < 8 * left; i++) last[i] = bits[8 * at + i];
    for (long i = 0; i < 4 * left; i++) last[128 + i] = bits[8 * pairs + 4 * at + i];
    pairs16(last, 16, 0, (float)deviation, &first, &second);
    for (long i = 0; i < left; i++) out[at + i] = first[i];
    for (long i = 0; i < rest - at; i++) out[pairs + at + i] = second[i];
}
