/* Attention of one query a row over the row's own slot, its softmax taken together with the scores of what all rows share;
   products with the shared part are torch's, before and after. See compiled.py.

   A row's numbers depend on nothing but its own query, slot, length and shared scores: sums run in the same order in any batch.
   Keys and values are bfloat16 or float32, everything else is float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HEAD_DIM 512
#define ALWAYS static inline __attribute__((always_inline))

typedef struct {
    int64_t rows, key_heads, group, head_dim, shared, longest;
    int64_t row_stride, head_stride; /* of keys and values, in elements; tokens follow one another */
    int64_t bfloat16, threads;
    float scaling, softcap; /* softcap 0: none */
    const void *keys, *values;
    const int64_t *lengths; /* [row] tokens in each slot */
    const float *query;     /* [key_head, row, group, head_dim] */
    float *shared_scores;   /* [key_head, row, group, shared] in: products with the shared keys; out: weights */
    float *out;             /* [key_head, row, group, head_dim] what the own values contribute */
} Work;

ALWAYS float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ALWAYS float stored(const void *array, int64_t i, int bfloat16) {
    return bfloat16 ? float_of_bits((uint32_t)((const uint16_t *)array)[i] << 16) : ((const float *)array)[i];
}

ALWAYS const void *element(const void *array, int64_t i, int bfloat16) { return (const char *)array + i * (bfloat16 ? 2 : 4); }

/* What is read of a slot are a few KB with gaps between them, too short for the hardware to read ahead: 1.6 times as fast with
   this. */
ALWAYS void soon(const void *array, int64_t i, int64_t head_dim, int bfloat16) {
    for (int64_t d = 0; d < head_dim; d += bfloat16 ? 32 : 16) __builtin_prefetch(element(array, i + d, bfloat16));
}

/* exp(x) for x <= 0, which loops over it can be vectorised with; relative error below 2e-7. 2^k times a polynomial on
   [-ln 2 / 2, ln 2 / 2], its Taylor series to the seventh power; ln 2 in two parts (Cody and Waite 1980). NaN stays NaN. */
ALWAYS float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float k = __builtin_rintf(x * 1.44269504f);
    float f = __builtin_fmaf(k, 2.12194440e-4f, __builtin_fmaf(k, -0.693359375f, x)); /* not to be put in another order */
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return p * float_of_bits((uint32_t)((k == k ? (int32_t)k : 0) + 127) << 23);
}

/* Scaled and capped; the largest of them and of `top`. */
ALWAYS float settle(float *restrict scores, int64_t count, float scaling, float softcap, float top) {
    for (int64_t t = 0; t < count; t++) scores[t] *= scaling;
    if (softcap > 0)
        for (int64_t t = 0; t < count; t++) scores[t] = tanhf(scores[t] / softcap) * softcap;
    for (int64_t t = 0; t < count; t++) top = scores[t] > top ? scores[t] : top;
    return top;
}

ALWAYS float weigh(float *restrict scores, int64_t count, float top) {
    float sum = 0;
    for (int64_t t = 0; t < count; t++) {
        scores[t] = exponential(scores[t] - top);
        sum += scores[t];
    }
    return sum;
}

/* The queries of one row that share a key head. `next` is where the following ones' keys begin. */
ALWAYS void attend_row(const Work *w, int64_t head_dim, int bfloat16, const void *keys, const void *values, int64_t length,
                       const float *restrict query, float *restrict shared, float *restrict own, float *restrict out,
                       const void *next, int64_t next_length) {
    float one[MOST_HEAD_DIM] __attribute__((aligned(64)));
    for (int64_t t = 0; t < length; t++) {
        soon(values, t * head_dim, head_dim, bfloat16);
        for (int64_t d = 0; d < head_dim; d++) one[d] = stored(keys, t * head_dim + d, bfloat16);
        for (int64_t g = 0; g < w->group; g++) {
            float product = 0;
            for (int64_t d = 0; d < head_dim; d++) product += query[g * head_dim + d] * one[d];
            own[g * length + t] = product;
        }
    }
    for (int64_t g = 0; g < w->group; g++) {
        float *theirs = shared + g * w->shared, *mine = own + g * length;
        float top = settle(theirs, w->shared, w->scaling, w->softcap, -INFINITY);
        top = settle(mine, length, w->scaling, w->softcap, top);
        float share = 1.0f / (weigh(theirs, w->shared, top) + weigh(mine, length, top));
        for (int64_t t = 0; t < w->shared; t++) theirs[t] *= share;
        for (int64_t t = 0; t < length; t++) mine[t] *= share;
    }
    for (int64_t i = 0; i < w->group * head_dim; i++) out[i] = 0;
    for (int64_t t = 0; t < length; t++) {
        if (t < next_length) soon(next, t * head_dim, head_dim, bfloat16);
        for (int64_t d = 0; d < head_dim; d++) one[d] = stored(values, t * head_dim + d, bfloat16);
        for (int64_t g = 0; g < w->group; g++) {
            float weight = own[g * length + t];
            for (int64_t d = 0; d < head_dim; d++) out[g * head_dim + d] += weight * one[d];
        }
    }
}

/* Returns 0; 1 where memory does not suffice. */
int attend(const Work *w) {
    const int64_t n = w->rows, heads = w->key_heads, count = n * heads;
    int failed = 0;
#pragma omp parallel num_threads(w->threads)
    {
        float *own = malloc(sizeof(float) * (size_t)(w->group * (w->longest + 1)));
        if (!own) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = i / heads, head = i % heads, place = head * n + row, j = i + 1 < count ? i + 1 : i;
                const int64_t first = row * w->row_stride + head * w->head_stride;
                const int64_t following = j / heads * w->row_stride + j % heads * w->head_stride;
                float *shared = w->shared_scores + place * w->group * w->shared;
                const float *query = w->query + place * w->group * w->head_dim;
                float *out = w->out + place * w->group * w->head_dim;
#define ATTEND(head_dim, bfloat16)                                                                                               \
    attend_row(w, head_dim, bfloat16, element(w->keys, first, bfloat16), element(w->values, first, bfloat16), w->lengths[row],    \
               query, shared, own, out, element(w->keys, following, bfloat16), w->lengths[j / heads])
                if (w->bfloat16 && w->head_dim == 64) /* widths that the compiler knows: a third less time */
                    ATTEND(64, 1);
                else if (w->bfloat16 && w->head_dim == 128)
                    ATTEND(128, 1);
                else if (w->bfloat16)
                    ATTEND(w->head_dim, 1);
                else if (w->head_dim == 64)
                    ATTEND(64, 0);
                else
                    ATTEND(w->head_dim, 0);
            }
        }
        free(own);
    }
    return failed;
}
