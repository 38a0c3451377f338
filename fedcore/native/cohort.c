/* A whole round of clients, added up by any number of processes that share memory.

   Clients come in units. A process takes the next unit, trains its clients one after another and adds their updates, weighted by
   examples, into one of a few shared sums; sums join the total in the order of the units, so that the total does not depend on how
   many processes there are. All of these lie as the blob does; the last sum brings the total into torch's order. The order of a
   client's examples is numpy's: Generator(Philox(SeedSequence(words))).permutation. */

typedef struct {
    uint64_t counter[4], key[2], buffer[4];
    int next;      /* in buffer */
    int half;      /* whether the upper half of a number is still to be used */
    uint32_t rest; /* that half */
} Philox;

INLINE uint32_t hashed(uint32_t value, uint32_t *state, uint32_t factor) {
    value ^= *state;
    *state *= factor;
    value *= *state;
    return value ^ value >> 16;
}

INLINE uint32_t mixed(uint32_t x, uint32_t y) {
    const uint32_t z = x * 0xca01f9ddu - y * 0x4973f715u;
    return z ^ z >> 16;
}

/* numpy.random.SeedSequence (O'Neill's seed_seq_fe, pool of four): the key of Philox from at least four words. */
KERNEL void seeded(Philox *p, const uint32_t *words, long count) {
    uint32_t pool[4], state = 0x43b0d7e5u, out[4];
    for (int i = 0; i < 4; i++) pool[i] = hashed(words[i], &state, 0x931e8875u);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to) pool[to] = mixed(pool[to], hashed(pool[from], &state, 0x931e8875u));
    for (long from = 4; from < count; from++)
        for (int to = 0; to < 4; to++) pool[to] = mixed(pool[to], hashed(words[from], &state, 0x931e8875u));
    state = 0x8b51f9ddu;
    for (int i = 0; i < 4; i++) out[i] = hashed(pool[i], &state, 0x58f38dedu);
    for (int i = 0; i < 2; i++) p->key[i] = out[2 * i] | (uint64_t)out[2 * i + 1] << 32;
    for (int i = 0; i < 4; i++) p->counter[i] = 0;
    p->next = 4;
    p->half = 0;
}

/* Philox4x64-10 (Salmon et al. 2011). */
KERNEL void filled(Philox *p) {
    for (int i = 0; i < 4 && ++p->counter[i] == 0; i++) {}
    uint64_t a = p->counter[0], b = p->counter[1], c = p->counter[2], d = p->counter[3], k = p->key[0], l = p->key[1];
    for (int round = 0; round < 10; round++, k += 0x9e3779b97f4a7c15u, l += 0xbb67ae8584caa73bu) {
        const unsigned __int128 x = (unsigned __int128)a * 0xd2e7470ee14c6c93u, y = (unsigned __int128)c * 0xca5a826395121157u;
        a = (uint64_t)(y >> 64) ^ b ^ k;
        c = (uint64_t)(x >> 64) ^ d ^ l;
        b = (uint64_t)y;
        d = (uint64_t)x;
    }
    p->buffer[0] = a, p->buffer[1] = b, p->buffer[2] = c, p->buffer[3] = d;
    p->next = 0;
}

INLINE uint64_t drawn64(Philox *p) {
    if (p->next == 4) filled(p);
    return p->buffer[p->next++];
}

INLINE uint32_t drawn32(Philox *p) {
    if (p->half) {
        p->half = 0;
        return p->rest;
    }
    const uint64_t both = drawn64(p);
    p->rest = (uint32_t)(both >> 32);
    p->half = 1;
    return (uint32_t)both;
}

/* A number from 0 to most > 0, uniformly: bits of a draw, drawn again while they are too large. */
INLINE uint32_t drawn_to(Philox *p, uint32_t most) {
    const uint32_t mask = UINT32_MAX >> __builtin_clz(most);
    uint32_t value;
    do value = drawn32(p) & mask;
    while (value > most);
    return value;
}

/* The rows of a client in the order of training, one permutation after another. */
__attribute__((visibility("default"))) void order_rows(
    const uint32_t *words, int64_t count, const int64_t *rows, int64_t examples, int64_t epochs, int64_t *order
) {
    Philox p;
    seeded(&p, words, count);
    for (long epoch = 0; epoch < epochs; epoch++, order += examples) {
        for (long i = 0; i < examples; i++) order[i] = rows[i];
        for (long i = examples - 1; i > 0; i--) {
            const long j = drawn_to(&p, (uint32_t)i);
            const int64_t kept = order[i];
            order[i] = order[j];
            order[j] = kept;
        }
    }
}

/* What processes share, beside the sums. */
typedef struct {
    int64_t next;     /* unit that nobody has taken */
    int64_t joined;   /* units in the total */
    int64_t adding;   /* 1 while a process adds to the total */
    int64_t finished; /* clients */
} Board;

typedef struct {
    Job *job;              /* x and y of the whole data set, or of this process; order and update of this process */
    Board *board;
    const int64_t *rows;   /* of all clients' examples, one client's after another's */
    const int64_t *ends;   /* where a client's end in it */
    const int64_t *units;  /* the client with which a unit ends */
    const uint32_t *words; /* from which a client's order is drawn, as many for each */
    int64_t word_count, unit_count, room;
    double limit;          /* the norm above which an update has exploded */
    double *losses;        /* out, by client: mean loss */
    double *norms;         /* out, by client: of the update; -1: a label is no class */
    double *sums;          /* [room][BLOB]: unit u's in place u % room */
    int64_t *complete;     /* [room]: one more than the unit whose sum is there */
    double *joined;        /* [BLOB], zero at first: the sums that have joined */
    double *total;         /* out, all of them, in torch's order */
    int64_t unit;          /* taken by this process; -1: none */
    int64_t number;        /* its next client */
    int64_t empty;         /* whether its sum is still that of nobody */
    const uint8_t *raw;    /* examples of the whole data set that are bytes; null: they are numbers */
    const real *values;    /* [channels][256]: what bytes mean */
    const int64_t *labels; /* with bytes: of the whole data set */
    const int64_t *own;    /* 0, 1, 2, ... */
    int64_t channels, plane; /* numbers in a channel */
    const uint32_t *coins; /* DP-SGD: from which a client's Poisson batches are drawn; null without */
    const uint32_t *noise; /* and its noise, as many words */
    int64_t private_count;
} Cohort;

/* A client's examples from bytes to this process's x and y. */
KERNEL void decoded(Cohort *c, const int64_t *rows, long examples) {
    real *to = (real *)c->job->x;
    int64_t *labels = (int64_t *)c->job->y;
    for (long i = 0; i < examples; i++) {
        const uint8_t *from = c->raw + rows[i] * c->channels * c->plane;
        labels[i] = c->labels[rows[i]];
        for (long k = 0; k < c->channels; k++) {
            const real *const value = c->values + 256 * k;
            for (long p = 0; p < c->plane; p++) *to++ = value[*from++];
        }
    }
}

/* The squared norm of an update. */
KERNEL double squared(const real *restrict w, const real *restrict start) {
    double lanes[16] = {0}, total = 0;
    for (long t = 0; t < TRAINED; t++)
        for (long i = trained[t].begin; i < trained[t].end; i += 16)
            for (int k = 0; k < 16; k++) {
                const real update = w[i + k] - start[i + k];
                lanes[k] += (double)update * (double)update;
            }
    for (int k = 0; k < 16; k++) total += lanes[k];
    return total;
}

KERNEL void weighted(double *restrict sum, const real *restrict w, const real *restrict start, double weight, int first) {
    for (long t = 0; t < TRAINED; t++)
        if (first)
            for (long i = trained[t].begin; i < trained[t].end; i++) sum[i] = weight * (double)(real)(w[i] - start[i]);
        else
            for (long i = trained[t].begin; i < trained[t].end; i++) sum[i] = sum[i] + weight * (double)(real)(w[i] - start[i]);
}

#ifndef PLAIN
/* A round of DP-SGD: dpsgd.SimulatedNoise, plan.poisson_batches. Gives the blob that it leaves, null for a label that is no class. */
KERNEL const real *trained_privately(Cohort *c, long number, const int64_t *rows, long examples) {
    Job *const job = c->job;
    Philox coins, noise;
    seeded(&coins, c->coins + number * c->private_count, c->private_count);
    seeded(&noise, c->noise + number * c->private_count, c->private_count);
    for (int i = 0; i < 24; i++) job->seed[i] = drawn64(&noise);
    for (int i = 24; i < 32; i++) job->seed[i] = 1;
    const long batches = (examples + job->batch - 1) / job->batch, steps = job->epochs * batches;
    const double rate = 1.0 / (double)(batches ? batches : 1);
    int64_t *const order = (int64_t *)job->order;
    private_begin(job);
    for (long step = 0; step < steps; step++) {
        job->examples = 0;
        for (long i = 0; i < examples; i++)
            if ((double)(drawn64(&coins) >> 11) * 0x1p-53 < rate) order[job->examples++] = rows[i];
        if (private_batch(job, step + 1 == steps)) return 0;
    }
    return private_blob(job);
}
#endif

/* Trains a client; the blob that it leaves, if its update may count. */
KERNEL const real *client(Cohort *c, long number) {
    Job *const job = c->job;
    const int64_t begin = number ? c->ends[number - 1] : 0, examples = c->ends[number] - begin;
    const int64_t *const rows = c->raw ? c->own : c->rows + begin;
    if (c->raw) decoded(c, c->rows + begin, examples);
    c->norms[number] = -1;
    c->losses[number] = 0;
    const real *now;
    real check = 0;
#ifndef PLAIN
    if (c->coins) {
        now = trained_privately(c, number, rows, examples);
    } else
#endif
    {
        order_rows(c->words + number * c->word_count, c->word_count, rows, examples, job->epochs, (int64_t *)job->order);
        job->examples = examples;
        now = trained_blob(job, &check);
    }
    if (!now) return 0;
    const double norm = check == 0 ? __builtin_sqrt(squared(now, job->start)) : (double)check;
    const double loss = c->coins ? 0 /* exact, and therefore not told */ : job->loss / (double)(examples * job->epochs);
    c->norms[number] = norm;
    c->losses[number] = loss;
    return norm <= c->limit && loss - loss == 0 ? now : 0;
}

/* Sums that are complete and next in order join the total; one process does so at a time. */
KERNEL void join(Cohort *c) {
    Board *const board = c->board;
    for (;;) {
        if (__atomic_exchange_n(&board->adding, 1, __ATOMIC_ACQUIRE)) return;
        int64_t unit = board->joined;
        while (unit < c->unit_count && __atomic_load_n(&c->complete[unit % c->room], __ATOMIC_ACQUIRE) == unit + 1) {
            const double *const sum = c->sums + unit % c->room * BLOB;
            for (long i = 0; i < BLOB; i++) c->joined[i] += sum[i];
            if (unit + 1 == c->unit_count) export_sum(c->joined, c->total);
            __atomic_store_n(&board->joined, ++unit, __ATOMIC_RELEASE);
        }
        __atomic_store_n(&board->adding, 0, __ATOMIC_SEQ_CST);
        if (unit == c->unit_count || __atomic_load_n(&c->complete[unit % c->room], __ATOMIC_SEQ_CST) != unit + 1) return;
    }
}

#define AT_ONCE 16 /* clients that one call trains at most, so that who calls may be interrupted */

/* Takes units until none is left (returns 0), until there is no place for the next one's sum (1: call again in a while), or until
   it has trained enough clients (2: call again). */
__attribute__((visibility("default"))) int run_cohort(Cohort *c) {
    Board *const board = c->board;
    for (int trained = 0;;) {
        if (c->unit < 0) {
            const int64_t taken = __atomic_fetch_add(&board->next, 1, __ATOMIC_RELAXED);
            if (taken >= c->unit_count) return 0;
            c->unit = taken;
            c->number = c->unit ? c->units[c->unit - 1] : 0;
            c->empty = 1;
        }
        if (c->unit - __atomic_load_n(&board->joined, __ATOMIC_ACQUIRE) >= c->room) return 1;
        double *const sum = c->sums + c->unit % c->room * BLOB;
        for (; c->number < c->units[c->unit]; c->number++) {
            if (trained++ == AT_ONCE) return 2;
            const real *const now = client(c, c->number);
            if (now) {
                const long examples = c->ends[c->number] - (c->number ? c->ends[c->number - 1] : 0);
                weighted(sum, now, c->job->start, (double)examples, (int)c->empty);
                c->empty = 0;
            }
            __atomic_fetch_add(&board->finished, 1, __ATOMIC_RELAXED);
        }
        if (c->empty)
            for (long i = 0; i < BLOB; i++) sum[i] = 0;
        __atomic_store_n(&c->complete[c->unit % c->room], c->unit + 1, __ATOMIC_SEQ_CST);
        c->unit = -1;
        join(c);
    }
}
