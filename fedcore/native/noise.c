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
#ifndef PLAIN
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
#endif

/* Noise of seeded simulations: fedcore.training.dpsgd.SimulatedNoise. Eight generators SFC64 (Doty-Humphrey) side by side give 16
   words for radii, then 16 for angles, of 32 numbers: 16 cosines, then 16 sines. */
typedef uint64_t Eight __attribute__((vector_size(64)));
typedef uint64_t Loose8 __attribute__((vector_size(64), aligned(8), may_alias));

INLINE Eight next8(Eight *a, Eight *b, Eight *c, Eight *count) {
    const Eight found = *a + *b + *count;
    *count += 1;
    *a = *b ^ (*b >> 11);
    *b = *c + (*c << 3);
    *c = ((*c << 24) | (*c >> 40)) + found;
    return found;
}

/* Of a radius word the sign is that of the cosine, and the rest, made odd, a number from 0 to 2^31; an angle word is a turn within
   half a circle. */
#ifdef DOUBLE
INLINE void block32(Words radii, Words angles, double deviation, double *out) {
    for (int i = 0; i < 16; i++) {
        const double u = (double)((radii[i] & 0x7fffffff) | 1), x = (double)angles[i] * (3.14159265358979323846 * 0x1p-32), z = x * x;
        const double r = __builtin_sqrt(-2 * logarithm(u * 0x1p-31)) * deviation;
        double s = 1, c = 1;
        for (int k = 22; k > 0; k -= 2) {
            s = 1 - s * z / (k * (k + 1));
            c = 1 - c * z / (k * (k - 1));
        }
        out[i] = radii[i] < 0 ? -r * c : r * c;
        out[i + 16] = r * s * x;
    }
}
#else
INLINE void block32(Words radii, Words angles, double deviation, float *out) {
    const Words bits = (Words)__builtin_convertvector((radii & 0x7fffffff) | 1, Lanes);
    const Lanes t = (Lanes)((bits & 0x7fffff) | 0x3f800000); /* the mantissa: bits are the logarithm to base 2, but for ln t */
    Lanes p = t * 0.035823836922645568f - 0.2763192057609558f; /* -2 (ln t - (t - 1) ln 2) / ((t - 1) (t - 2)), to 1e-5 */
    p = p * t + 0.8662493228912354f;
    p = p * t - 1.4288995265960693f;
    p = p * t + 1.4166431427001953f;
    Lanes s = t * (t - 3) + 2, c = __builtin_convertvector(bits - 0x4f000000, Lanes) * (-1.3862943611198906f * 0x1p-23f);
    const Lanes r = root(s * p + c) * (float)deviation;
    const Lanes x = __builtin_convertvector(angles, Lanes) * 7.3145903963328e-10f, z = x * x;
    s = z * -0.00018363652551568556f + 0.00830632517433148f; /* sine and cosine to 6e-7 within a quarter turn */
    c = z * 2.3153931656018524e-05f - 0.0013853704325574173f;
    s = s * z - 0.16664828376453228f;
    c = c * z + 0.04166358469955878f;
    s = s * z + 0.9999966158945364f;
    c = c * z - 0.49999905347741125f;
    c = c * z + 1;
    *(Loose *)out = (Lanes)((Words)(c * r) ^ (radii & INT32_MIN));
    *(Loose *)(out + 16) = s * x * r;
}
#endif

KERNEL void simulated(uint64_t *seed, long blocks, double deviation, real *out) {
    Eight a = *(Loose8 *)seed, b = *(Loose8 *)(seed + 8), c = *(Loose8 *)(seed + 16), count = *(Loose8 *)(seed + 24);
    for (; blocks; blocks--, out += 32) {
        const Eight radii = next8(&a, &b, &c, &count), angles = next8(&a, &b, &c, &count);
        block32((Words)radii, (Words)angles, deviation, out);
    }
    *(Loose8 *)seed = a, *(Loose8 *)(seed + 8) = b, *(Loose8 *)(seed + 16) = c, *(Loose8 *)(seed + 24) = count;
}

/* What is left of the last block begins the next piece; a step begins with a new block. */
KERNEL const real *drawn(Noise *noise, long count) {
    if (noise->given) {
        const real *const found = noise->given;
        noise->given += count;
        return found;
    }
    real *const fresh = noise->fresh;
    const long kept = noise->end - noise->at, blocks = count > kept ? (count - kept + 31) / 32 : 0;
    for (long i = 0; i < kept; i++) fresh[i] = fresh[noise->at + i];
    simulated(noise->seed, blocks, noise->deviation, fresh + kept);
    noise->at = count;
    noise->end = kept + 32 * blocks;
    return fresh;
}

#ifndef PLAIN
/* The next ``count`` numbers, rounded up to a block, to ``out``. */
__attribute__((visibility("default"))) void simulated_noise(uint64_t *seed, int64_t count, double deviation, real *out) {
    simulated(seed, (count + 31) / 32, deviation, out);
}
#endif
