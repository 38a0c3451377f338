/* What every generated trainer begins with: vectors of 4, 8 and 16 numbers, rounding, softmax, the update rule.

   One logical vector everywhere: the compiler splits it where registers are narrower, so that every target adds the same numbers
   in the same order. No libc: devices may have another one or none. Products are fused with the sum of the same expression
   (-ffp-contract=on) and nowhere else; -ffast-math would change the order. Where vectors are taken apart (Cortex-M) only
   -ffp-contract=fast fuses at all: rounding to integers is kept out of it here. */

#include <stddef.h>
#include <stdint.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t word;
#define MAGIC 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer, half to even */
#define TINY 2.2250738585072014e-308
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#define LEAST_EXPONENT -708
#define ROOT __builtin_sqrt
#define SIGN INT64_MIN
#else
typedef float real;
typedef int32_t word;
#define MAGIC 12582912.0f /* 1.5 * 2^23 */
#define TINY 1.17549435e-38f
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#define LEAST_EXPONENT -87
#define ROOT __builtin_sqrtf
#define SIGN INT32_MIN
#endif
#define HALF ((real)0.5)

#define INLINE static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))
#ifdef __clang__
#define COLD __attribute__((minsize)) /* what memory or few calls hold up: as short as it goes */
#else
#define COLD
#endif

#define VECTORS(n)                                                                                                             \
    typedef real V##n __attribute__((vector_size(n * sizeof(real))));                                                          \
    typedef real U##n __attribute__((vector_size(n * sizeof(real)), aligned(sizeof(real)), may_alias));                        \
    typedef word I##n __attribute__((vector_size(n * sizeof(word))));                                                          \
    typedef word J##n __attribute__((vector_size(n * sizeof(word)), aligned(sizeof(word)), may_alias));                        \
    typedef uint8_t B##n __attribute__((vector_size(n)));                                                                      \
    typedef uint8_t A##n __attribute__((vector_size(n), aligned(1), may_alias));                                               \
    INLINE V##n load##n(const real *p) { return *(const U##n *)p; }                                                            \
    INLINE void store##n(real *p, V##n v) { *(U##n *)p = v; }                                                                  \
    INLINE V##n splat##n(real s) { return s - (V##n){0}; }                                                                     \
    INLINE V##n pick##n(I##n m, V##n a, V##n b) { return (V##n)((m & (I##n)a) | (~m & (I##n)b)); }                             \
    INLINE I##n bytes##n(const uint8_t *p) { return __builtin_convertvector(*(const A##n *)p, I##n); }                         \
    INLINE void store_bytes##n(uint8_t *p, I##n v) { *(A##n *)p = __builtin_convertvector(v, B##n); }                          \
    INLINE void store_words##n(word *p, I##n v) { *(J##n *)p = v; }                                                             \
    INLINE V##n magnitude##n(V##n v) { return (V##n)((I##n)v & ~SIGN); }                                                       \
    INLINE V##n larger##n(V##n a, V##n b) { return pick##n(b > a, b, a); } /* a where b is nan */                              \
    INLINE V##n round##n(V##n v) {                                                                                             \
        _Pragma("clang fp contract(off)")                                                                                      \
        V##n up = v + MAGIC;                                                                                                   \
        return up - MAGIC;                                                                                                     \
    }

VECTORS(4)
VECTORS(8)
VECTORS(16)

enum { DEAD = 255 }; /* a byte of a position whose gradient is zero; else the place of the maximum in its window */

/* A frozen activation range; on = 0: the activation passes unchanged. */
typedef struct {
    real on, inverse, scale, low, high, from, to;
} Range;

/* Rounds z to the grid and marks what saturates as dead. */
#define QUANTIZE(n)                                                                                                            \
    INLINE V##n quantize##n(V##n z, const Range *q, I##n *dead) {                                                              \
        V##n t = z * q->inverse;                                                                                               \
        t = round##n(t);                                                                                                       \
        t = pick##n(t < q->low, splat##n(q->low), t);                                                                          \
        t = pick##n(t > q->high, splat##n(q->high), t);                                                                        \
        V##n r = t * q->scale;                                                                                                 \
        I##n on = (I##n){0} - (word)(q->on != 0);                                                                              \
        *dead |= on & ~((z > q->from) & (z < q->to));                                                                          \
        return pick##n(on, r, z);                                                                                              \
    }

QUANTIZE(4)
QUANTIZE(8)
QUANTIZE(16)

/* Bit i: lane i equals k. */
#define MASKS(n, type)                                                                                                         \
    typedef _Bool T##n __attribute__((ext_vector_type(n)));                                                                    \
    INLINE uint64_t members##n(const uint8_t *p, uint8_t k) {                                                                  \
        T##n t = __builtin_convertvector(*(const A##n *)p == k, T##n);                                                         \
        type bits = 0;                                                                                                         \
        __builtin_memcpy(&bits, &t, sizeof t < sizeof bits ? sizeof t : sizeof bits);                                          \
        return bits & ((1u << n) - 1);                                                                                         \
    }                                                                                                                          \
    INLINE uint64_t nonzero##n(const real *p) {                                                                                \
        T##n t = __builtin_convertvector(load##n(p) != 0, T##n);                                                               \
        type bits = 0;                                                                                                         \
        __builtin_memcpy(&bits, &t, sizeof t < sizeof bits ? sizeof t : sizeof bits);                                          \
        return bits & ((1u << n) - 1);                                                                                         \
    }

MASKS(4, uint8_t)
MASKS(8, uint8_t)
MASKS(16, uint16_t)

/* The compiler may call these. */
void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memset(void *to, int value, size_t n);

__attribute__((visibility("hidden"), no_builtin)) void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    char *t = to;
    const char *f = from;
    for (; n >= 64; n -= 64, t += 64, f += 64) *(A16 *)t = *(const A16 *)f, *(A16 *)(t + 16) = *(const A16 *)(f + 16),
        *(A16 *)(t + 32) = *(const A16 *)(f + 32), *(A16 *)(t + 48) = *(const A16 *)(f + 48);
    while (n--) *t++ = *f++;
    return to;
}

__attribute__((visibility("hidden"), no_builtin)) void *memset(void *to, int value, size_t n) {
    char *t = to;
    B16 v = (B16){0} + (uint8_t)value;
    for (; n >= 64; n -= 64, t += 64) *(A16 *)t = v, *(A16 *)(t + 16) = v, *(A16 *)(t + 32) = v, *(A16 *)(t + 48) = v;
    for (; n >= 16; n -= 16, t += 16) *(A16 *)t = v;
    while (n--) *t++ = (char)value;
    return to;
}

/* n is a multiple of 16. */
INLINE void clear(real *p, long n) {
    for (long i = 0; i < n; i += 16) store16(p + i, (V16){0});
}

INLINE void copy(real *to, const real *from, long n) {
    for (long i = 0; i < n; i += 16) store16(to + i, load16(from + i));
}

INLINE void accumulate(real *to, const real *from, long n) {
    for (long i = 0; i < n; i += 16) store16(to + i, load16(to + i) + load16(from + i));
}

/* Sum of all lanes, halves first: the order of the reduction trees of the fully connected layers. */
INLINE real sum16(V16 v) {
    V8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    V4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    real c = b[0] + b[2], d = b[1] + b[3];
    return c + d;
}

/* exp(x) for x <= 0, zero below the smallest normal number: 2^k * e^r with |r| <= ln(2) / 2, Taylor's series to r^13. */
INLINE V16 exponential(V16 x) {
    I16 under = ~(x >= (real)LEAST_EXPONENT); /* nan too: the caller keeps it */
    x = pick16(under, splat16(LEAST_EXPONENT), x);
    V16 k = x * (real)1.44269504088896340736;
    k = round16(k);
    V16 r = x - k * (real)0.693145751953125;
    r = r - k * (real)1.42860682030941723212e-6;
    V16 p = splat16((real)(1.0 / 6227020800.0));
    p = p * r + (real)(1.0 / 479001600.0);
    p = p * r + (real)(1.0 / 39916800.0);
    p = p * r + (real)(1.0 / 3628800.0);
    p = p * r + (real)(1.0 / 362880.0);
    p = p * r + (real)(1.0 / 40320.0);
    p = p * r + (real)(1.0 / 5040.0);
    p = p * r + (real)(1.0 / 720.0);
    p = p * r + (real)(1.0 / 120.0);
    p = p * r + (real)(1.0 / 24.0);
    p = p * r + (real)(1.0 / 6.0);
    p = p * r + (real)0.5;
    p = p * r + (real)1.0;
    p = p * r + (real)1.0;
    I16 bits = __builtin_convertvector(k, I16);
    bits = (bits + EXPONENT_BIAS) << MANTISSA_BITS;
    return pick16(under, (V16){0}, p * (V16)bits);
}

/* ln(x) for normal x: 2 artanh((m - 1) / (m + 1)) with the mantissa m between 1/sqrt(2) and sqrt(2). */
INLINE double logarithm(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffULL) | 0x3ff0000000000000ULL;
    double m;
    __builtin_memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) m *= 0.5, k++;
    double s = (m - 1) / (m + 1), t = s * s, p = 1.0 / 23;
    for (int i = 21; i > 0; i -= 2) p = p * t + 1.0 / i;
    return 2 * s * p + (double)k * 0.6931471805599453094;
}

/* An optimizer's step: torch.optim.SGD with FedProx's term. */
typedef struct {
    real rate, momentum, decay, proximal;
    int plain;      /* neither momentum nor decay nor proximal term */
    int begin, end; /* a client's first step, for which now is the start and there is no velocity; its last, after which none is read */
} Rule;

INLINE void plain16(real *w, const real *now, V16 gradient, const Rule *rule) {
    store16(w, load16(now) - rule->rate * gradient);
}

/* The step of n neighbours from ``now`` to ``w``; memory is what it takes, so that nothing is read or written in vain. */
COLD KERNEL void steps(
    real *w, const real *now, const real *start, real *restrict velocity, const real *restrict g, long n, const Rule *rule
) {
    const int read = rule->momentum != 0 && !rule->begin, kept = rule->momentum != 0 && !rule->end;
    const int near = rule->proximal != 0 && !rule->begin;
    if (rule->plain) {
        for (long i = 0; i < n; i += 16) plain16(w + i, now + i, load16(g + i), rule);
        return;
    }
    for (long i = 0; i < n; i += 16) {
        V16 x = load16(now + i), gradient = load16(g + i);
        gradient = gradient + rule->decay * x;
        if (near) gradient = gradient + rule->proximal * (x - load16(start + i));
        if (read) gradient = gradient + rule->momentum * load16(velocity + i);
        if (kept) store16(velocity + i, gradient);
        store16(w + i, x - rule->rate * gradient);
    }
}

/* What the caller hands over; the order of fields is known to the loader. */
typedef struct {
    const real *x;        /* examples, as torch lays them out */
    const int64_t *y;     /* labels */
    const int64_t *order; /* epochs * examples row numbers */
    int64_t examples, epochs, batch;
    const real *start;    /* the parameter blob a client begins with */
    const Range *ranges;  /* one for each quantizer */
    real *work;           /* WORK numbers, zero at first */
    uint8_t *bytes;       /* BYTES bytes */
    real *update;         /* trainable parameters: local minus start, in torch's order */
    double rate, momentum, decay, proximal;
    double loss;          /* out: the sum of the examples' losses */
    const real *noise;    /* DP-SGD: added to the sum of a step's gradients, in torch's order; null: drawn from seed */
    double bound;         /* DP-SGD: the clipping norm */
    int64_t step;         /* DP-SGD: steps made so far */
    uint64_t *seed;       /* simulated DP-SGD: state of the generator of noise, */
    double deviation;     /* its standard deviation, */
    real *fresh;          /* and room for what is drawn in advance */
} Job;

/* The noise of a step, taken piece by piece in torch's order of parameters. */
typedef struct {
    const real *given;
    uint64_t *seed;
    double deviation;
    real *fresh;
    long at, end; /* in fresh: what is drawn and not taken */
} Noise;

KERNEL const real *drawn(Noise *noise, long count);
