/* bench.h - what `mft bench` does: kernels, ops and training steps, measured beside what the machine can do
 *
 *   [CLOCK]    how often, how long
 *   [MACHINE]  the peak of multiply-adds, the bandwidth of memory: measured in the same run
 *   [KERNELS]  matrix products and vectors, as the table of kernels offers them
 *   [OPS]      forward and backward of each op that a model's time goes into
 *   [STEPS]    whole optimizer steps of published shapes with random weights, or of a model given
 *   [DECODE]   one token after the other, beside the bandwidth at which memory could hand over the weights
 *   [THREADS]  more threads than cores, beside as many
 *   [SCALING]  a token's time in long sequences beside short ones, and where few tokens are learnt
 *
 * A kernel's and an op's figure is the best of many runs within a quarter of a second: what else runs on the
 * machine only takes away. A step's is the median. Wants mft.h with its implementation before it. */
#ifndef MFT_BENCH_HEADER
#define MFT_BENCH_HEADER

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

enum { BENCH_ALL, BENCH_KERNELS, BENCH_OPS, BENCH_STEPS_OF, BENCH_DECODE, BENCH_THREADS, BENCH_SCALING };      /* parts, as run_bench names them */

typedef struct bench {
    mft_context *ctx;
    int          json, rows;                /* rows: lines printed so far */
    double       peak, bandwidth;           /* GFLOPS, GB/s */
    double       beside;                    /* the peak while the next line was measured; 0: not measured with it */
    float        sink;                      /* where results go that nobody reads */
} bench;

/* ==============================================================================
 * MARK: - [CLOCK]
 * ============================================================================== */
static double bench_now(void)
{
    struct timeval t;
    gettimeofday(&t, NULL);
    return (double)t.tv_sec + 1e-6 * (double)t.tv_usec;
}

/* Batches long enough for the clock, by turns with something else; the best of them. */
#define BENCH_BEST_BESIDE(seconds, CALL, ELSE) do {                                                            \
        double bench_start = bench_now(), bench_t = 0;                                                         \
        int    bench_n = 1, bench_i, bench_r;                                                                  \
        seconds = 1e9;                                                                                         \
        for (bench_r = 0; bench_r < 5 || bench_now() - bench_start < 0.25; bench_r++) {                        \
            bench_t = bench_now();                                                                             \
            for (bench_i = 0; bench_i < bench_n; bench_i++) { CALL; }                                          \
            bench_t = bench_now() - bench_t;                                                                   \
            if (bench_t < 1e-4) { bench_n *= 4; continue; }                                                    \
            if (bench_t / bench_n < seconds) seconds = bench_t / bench_n;                                      \
            ELSE;                                                                                              \
        } } while (0)
#define BENCH_BEST(seconds, CALL) BENCH_BEST_BESIDE(seconds, CALL, (void)0)

/* ==============================================================================
 * MARK: - [MACHINE]
 * ============================================================================== */

/* ---- the peak: chains of multiply-adds, enough of them to fill every unit ---- */
enum { BENCH_STEPS = 200000 };

/* CHAINS: all that registers hold besides two constants; fewer would wait for themselves, more for memory */
#define BENCH_PEAK(NAME, TARGET, V, CHAINS, SET1, FMA)                                                         \
    TARGET static float bench_fma_##NAME(void)                                                                 \
    {                                                                                                          \
        V c[CHAINS], a = SET1(0.999f), b = SET1(0.001f);                                                       \
        float s = 0, lanes[sizeof(V) / sizeof(float)];                                                         \
        int i, r;                                                                                              \
        BENCH_UNROLL                                                                                           \
        for (i = 0; i < CHAINS; i++) c[i] = SET1((float)i);                                                    \
        for (r = 0; r < BENCH_STEPS; r++) {                                                                    \
            BENCH_UNROLL                                                                                       \
            for (i = 0; i < CHAINS; i++) c[i] = FMA(c[i], a, b);                                               \
        }                                                                                                      \
        BENCH_UNROLL                                                                                           \
        for (i = 0; i < CHAINS; i++) { memcpy(lanes, &c[i], sizeof lanes); s += lanes[0]; }                    \
        return s;                                                                                              \
    }
#ifdef __clang__
#  define BENCH_UNROLL _Pragma("clang loop unroll(full)")
#else
#  define BENCH_UNROLL _Pragma("GCC unroll 20")
#endif
#ifdef MFT__HAVE_AVX2
BENCH_PEAK(avx2, __attribute__((target("avx2,fma"))), __m256, 12, _mm256_set1_ps, _mm256_fmadd_ps)
#endif
#ifdef MFT__HAVE_AVX512
BENCH_PEAK(avx512, __attribute__((target("avx512f"))), __m512, 20, _mm512_set1_ps, _mm512_fmadd_ps)
#endif
#ifdef MFT__HAVE_NEON
static float32x4_t bench_neon_fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
BENCH_PEAK(neon, , float32x4_t, 20, vdupq_n_f32, bench_neon_fma)
#endif
static mft__v_portable bench_portable_fma(mft__v_portable a, mft__v_portable b, mft__v_portable c) { return a * b + c; }
BENCH_PEAK(portable, , mft__v_portable, 12, mft__set1_portable, bench_portable_fma)

typedef struct bench_chain { float (*run)(void); int lanes, chains; } bench_chain;

static bench_chain bench_chain_of(const char *row)
{
    bench_chain c = { bench_fma_portable, 4, 12 };
    (void)row;
#ifdef MFT__HAVE_NEON
    if (strncmp(row, "neon", 4) == 0) { c.run = bench_fma_neon; c.chains = 20; }
#endif
#ifdef MFT__HAVE_AVX2
    if (strcmp(row, "avx2") == 0) { c.run = bench_fma_avx2; c.lanes = 8; }
#endif
#ifdef MFT__HAVE_AVX512
    if (strncmp(row, "avx512", 6) == 0 || strcmp(row, "amx") == 0) { c.run = bench_fma_avx512; c.lanes = 16; c.chains = 20; }
#endif
    return c;
}

static void bench_peak_run(void *arg, int64_t begin, int64_t end, int worker)
{
    float s = 0;
    (void)worker;
    for (; begin < end; begin++) s += ((bench_chain *)arg)->run();
    if (s == 12345.0f) printf(" ");
}

/* Multiply-adds for a millisecond, on all threads: GFLOPS */
static double bench_peak(mft_context *ctx)
{
    bench_chain chain = bench_chain_of(mft_kernels_name(ctx));
    int         tasks = ctx->n_threads;
    double      start = bench_now();
    mft__parallel(ctx, tasks, 1, bench_peak_run, &chain);
    return 2.0 * chain.chains * BENCH_STEPS * chain.lanes * tasks / (bench_now() - start) * 1e-9;
}

/* As BENCH_BEST, and the machine's peak between the batches: it differs from second to second with the clock and the
 * neighbours, so a line's share is of the best of both in the same quarter of a second. */
#define BENCH_SHARE(b, seconds, CALL) BENCH_BEST_BESIDE(seconds, CALL, { double bench_p = bench_peak((b)->ctx); if (bench_p > (b)->beside) (b)->beside = bench_p; })

typedef struct bench_read { bench *b; const float *x, *y; } bench_read;
static void bench_read_run(void *arg, int64_t begin, int64_t end, int worker)
{
    bench_read *r = (bench_read *)arg;
    float       s = r->b->ctx->kernels->dot(r->x + begin, r->y + begin, end - begin);
    (void)worker;
    if (s == 12345.0f) printf(" ");
}

/* ---- one line of the table: flops 0 for what memory limits, -1 for what lies in the cache ---- */
static void bench_line(bench *b, const char *what, double seconds, double flops, double bytes)
{
    double gflops = flops > 0 ? flops / seconds * 1e-9 : 0, gbs = bytes / seconds * 1e-9, peak = b->beside > 0 ? b->beside : b->peak;
    if (b->json) {
        printf("%s{\"what\":\"%s\",\"seconds\":%.9g,\"gflops\":%.4g,\"gb_per_s\":%.4g", b->rows ? "," : "", what, seconds, gflops, gbs);
        if (flops > 0) printf(",\"peak_gflops\":%.4g", peak);
        printf("}");
    }
    else if (flops > 0) printf("%-44s %10.1f us %8.1f GFLOPS %5.0f %% of %.1f\n", what, seconds * 1e6, gflops, 100 * gflops / peak, peak);
    else if (flops < 0) printf("%-44s %10.1f us %8.1f GB/s\n", what, seconds * 1e6, gbs);
    else                printf("%-44s %10.1f us %8.1f GB/s   %5.0f %% of bandwidth\n", what, seconds * 1e6, gbs, 100 * gbs / b->bandwidth);
    fflush(stdout);
    b->rows++;
    b->beside = 0;
}

/* Peak and bandwidth of this context's row and threads. 0: no memory. */
static int bench_machine(bench *b)
{
    bench_read  r;
    int64_t     n = (int64_t)16 << 20;
    float      *memory = (float *)malloc(sizeof(float) * 2 * (size_t)n);
    double      s;
    if (!memory) return 0;
    BENCH_BEST(s, { double p = bench_peak(b->ctx); if (p > b->peak) b->peak = p; });
    memset(memory, 1, sizeof(float) * 2 * (size_t)n);
    r.b = b; r.x = memory; r.y = memory + n;
    BENCH_BEST(s, mft__parallel(b->ctx, n, 65536, bench_read_run, &r));
    b->bandwidth = (double)n * 8 / s * 1e-9;
    free(memory);
    if (b->json) printf("\"peak_gflops\":%.4g,\"bandwidth_gb_per_s\":%.4g,", b->peak, b->bandwidth);
    else printf("row %s, %d threads: multiply-adds peak at %.1f GFLOPS, memory is read at %.1f GB/s\n\n",
                mft_kernels_name(b->ctx), b->ctx->n_threads, b->peak, b->bandwidth);
    return 1;
}

/* ==============================================================================
 * MARK: - [KERNELS]
 * ============================================================================== */

/* trans 0: b [k, n];  1: b [n, k], as weights are;  2: a [k, m], as in a weight's gradient */
static int bench_product(bench *b, const char *name, int64_t m, int64_t n, int64_t k, int trans, mft_dtype dtype)
{
    size_t      wbytes = mft_dtype_bytes(dtype, n * k);
    float      *x = (float *)malloc(sizeof(float) * (size_t)(m * k)), *c = (float *)malloc(sizeof(float) * (size_t)(m * n));
    void       *w = malloc(wbytes);
    mft__matrix a, y;
    char        what[96];
    double      seconds;
    int64_t     i;
    int         ok = x && c && w;
    if (ok) {
        for (i = 0; i < m * k; i++) x[i] = (float)(i % 13 - 6) * 0.1f;
        memset(w, 0x11, wbytes);
        a.data = x; a.dtype = MFT_F32; a.row_stride = trans == 2 ? 1 : k; a.col_stride = trans == 2 ? m : 1;
        y.data = w; y.dtype = dtype;   y.row_stride = trans == 1 ? 1 : n; y.col_stride = trans == 1 ? k : 1;
        BENCH_SHARE(b, seconds, ok &= mft__gemm(b->ctx, m, n, k, 1, a, y, NULL, 0, c, n));
        snprintf(what, sizeof what, "%s %lldx%lldx%lld %s", name, (long long)m, (long long)n, (long long)k, mft_dtype_name(dtype));
        if (ok) bench_line(b, what, seconds, m > 4 ? 2.0 * (double)m * (double)n * (double)k : 0, (double)wbytes);
    }
    free(x); free(c); free(w);
    return ok;
}

static int bench_vectors(bench *b)
{
    enum { N = 4096 };                      /* in the first cache: the arithmetic is measured, not the memory */
    const mft__kernels *K = b->ctx->kernels;
    float *v = (float *)malloc(sizeof(float) * 6 * N), mean;
    double s;
    int    i;
    mft__adamw k;
    if (!v) return 0;
    memset(&k, 0, sizeof k);
    k.decay = 1; k.beta2 = k.inv_sqrt_c2 = k.grad_scale = 1; k.eps = 1e-8f;
    for (i = 0; i < 6 * N; i++) v[i] = (float)(i % 17) * 0.1f + 0.1f;
#define BENCH_VECTOR(what, arrays, CALL) do { BENCH_BEST(s, CALL); bench_line(b, what ", 4096 numbers", s, -1, (double)N * 4 * arrays); } while (0)
    BENCH_VECTOR("dot", 2, b->sink += K->dot(v, v + N, N));
    BENCH_VECTOR("exp_sum", 2, b->sink += K->exp_sum(v + 2 * N, v, 1, N));
    BENCH_VECTOR("gelu_tanh", 2, K->act(MFT__GELU_TANH, v + 2 * N, v, N));
    BENCH_VECTOR("gelu", 2, K->act(MFT__GELU_ERF, v + 2 * N, v, N));
    BENCH_VECTOR("silu gate", 3, K->gate(MFT__SILU, v + 2 * N, v, v + N, N));
    BENCH_VECTOR("rms_norm", 3, b->sink += K->rms_norm(v + 2 * N, v, v + N, 0, 1e-6f, N));
    BENCH_VECTOR("layer_norm", 4, b->sink += K->layer_norm(v + 2 * N, v, v + N, v, 1e-5f, N, &mean));
    BENCH_VECTOR("adamw", 7, K->adamw(v + 2 * N, v + 3 * N, v + 4 * N, v, N, &k));
#undef BENCH_VECTOR
    free(v);
    return 1;
}

/* Of the three models' widest and narrowest matrices, at a short row of tokens and at a long one: forward, backward to the
 * inputs, and what full fine-tuning adds. GPT-2 stores its weights [in, out]. */
static int bench_products(bench *b)
{
    int64_t t;
    int     ok = 1;
    for (t = 128; ok && t <= 1024; t *= 8)
        ok = bench_product(b, "x w^T",  t, 4864, 896,  1, MFT_F32)  && bench_product(b, "x w^T",  t, 4864, 896,  1, MFT_BF16)
          && bench_product(b, "x w^T",  t, 896, 4864,  1, MFT_BF16) && bench_product(b, "x w^T",  t, 1024, 640,  1, MFT_BF16)
          && bench_product(b, "x w^T",  t, 256, 640,   1, MFT_BF16) && bench_product(b, "x w",    t, 2304, 768,  0, MFT_F32)
          && bench_product(b, "x w",    t, 768, 3072,  0, MFT_F32)
          && bench_product(b, "dy w",   t, 896, 4864,  0, MFT_F32)  && bench_product(b, "dy w",   t, 896, 4864,  0, MFT_BF16)
          && bench_product(b, "dy w",   t, 640, 1024,  0, MFT_BF16) && bench_product(b, "dy w^T", t, 768, 3072,  1, MFT_F32)
          && bench_product(b, "x^T dy", 768, 3072, t,  2, MFT_F32)  && bench_product(b, "dy^T x", 4864, 896, t,  2, MFT_F32);
    return ok;
}

static int bench_kernels(bench *b)
{
    return bench_products(b)
        && bench_product(b, "x w^T",  128, 4864, 896,  1, MFT_Q8_0) && bench_product(b, "x w^T",  128, 4864, 896,  1, MFT_Q4_0)
        && bench_product(b, "LoRA x a^T", 128, 8, 896, 1, MFT_F32)  && bench_product(b, "LoRA h b^T", 128, 896, 8, 1, MFT_F32)
        && bench_product(b, "LoRA dh^T x", 8, 896, 128, 2, MFT_F32)
        && bench_product(b, "decode w x", 1, 151936, 896, 1, MFT_BF16) && bench_product(b, "decode w x", 1, 151936, 896, 1, MFT_Q8_0)
        && bench_product(b, "decode w x", 1, 151936, 896, 1, MFT_Q4_0) && bench_product(b, "decode x w", 1, 50257, 768, 0, MFT_F32)
        && bench_vectors(b);
}

/* ==============================================================================
 * MARK: - [OPS] At the shapes of Qwen2.5-0.5B, 4 sequences of 256 tokens
 * ============================================================================== */
enum { BENCH_B = 4, BENCH_T = 256, BENCH_HEADS = 14, BENCH_KV = 2, BENCH_D = 64, BENCH_H = 896, BENCH_INNER = 4864, BENCH_V = 32768 };

static mft_tensor *bench_input(bench *b, mft_dtype dtype, int trainable, int ndim, int64_t d0, int64_t d1, int64_t d2, int64_t d3)
{
    int64_t     shape[4], i, n;
    mft_tensor *t;
    shape[0] = d0; shape[1] = d1; shape[2] = d2; shape[3] = d3;
    t = mft_tensor_create(b->ctx, MFT_HELD, dtype, ndim, shape);
    if (!t) return NULL;
    n = mft_tensor_numel(t);
    if (dtype == MFT_F32) for (i = 0; i < n; i++) ((float *)t->data)[i] = (float)(i % 13 - 6) * 0.1f;
    else memset(t->data, 0x11, mft_dtype_bytes(dtype, n));
    t->trainable = trainable;
    return t;
}

/* Forward, then with it the backward pass of its sum; flops and bytes of all together, as in bench_line: the sum reads
 * the result once and writes its gradient once. What lies in a cache may go faster than memory. */
#define BENCH_OP(what, flops, bytes, CALL) do {                                                                \
        double bench_s;                                                                                        \
        BENCH_SHARE(b, bench_s, {                                                                                  \
            mft_tensor *bench_y = CALL;                                                                        \
            if (bench_y && mft_tensor_numel(bench_y) > 1) bench_y = mft_sum(b->ctx, bench_y);                  \
            ok &= mft_backward(b->ctx, bench_y) == MFT_OK;                                                     \
            mft_step_reset(b->ctx); });                                                                        \
        if (ok) bench_line(b, what, bench_s, flops, bytes);                                                    \
    } while (0)

/* ---- what goes over all weights: 16 M numbers, which no second cache holds ---- */
enum { BENCH_N = 16 << 20 };

/* A step of AdamW, on f32 and bf16 weights and in 8 bits, and of SGD, with the gradient's norm; bytes of a number: weight, gradient (twice), moments. */
static int bench_updates(bench *b)
{
    static const struct { const char *what; mft_optimizer_kind kind; mft_dtype dtype; double bytes; } all[] = {
        { "adamw, 16 M weights", MFT_ADAMW, MFT_F32, 8 + 8 + 16 }, { "adamw8bit, 16 M weights", MFT_ADAMW8BIT, MFT_F32, 8 + 8 + 4 },
        { "adamw, 16 M bf16 weights", MFT_ADAMW, MFT_BF16, 4 + 8 + 16 }, { "sgd, 16 M weights", MFT_SGD, MFT_F32, 8 + 8 } };
    size_t i;
    int    ok = 1;
    for (i = 0; i < sizeof all / sizeof *all && ok; i++) {
        mft_tensor        *p = bench_input(b, all[i].dtype, 1, 2, 4096, BENCH_N / 4096, 0, 0);
        mft_optimizer     *opt = NULL;
        mft_optimizer_desc d;
        double             s;
        int64_t            k;
        memset(&d, 0, sizeof d);
        d.kind = all[i].kind;
        ok = p && mft__grad_held(b->ctx, p) && mft_optimizer_create(b->ctx, &d, &p, NULL, 1, &opt) == MFT_OK;
        for (k = 0; ok && k < BENCH_N; k++) ((float *)p->grad->data)[k] = (float)(k % 13 - 6) * 0.01f;
        if (ok) {
            BENCH_BEST(s, mft__of(p)->grad_written = 1; ok &= mft_optimizer_step(opt, 1e-5, NULL) == MFT_OK);
            bench_line(b, all[i].what, s, 0, all[i].bytes * BENCH_N);
        }
        mft_optimizer_destroy(opt);
        mft_tensor_destroy(b->ctx, p);
    }
    return ok;
}

typedef struct bench_convert { const mft__kernels *k; mft_dtype dtype; float *x; char *w; int back; } bench_convert;
static void bench_convert_run(void *arg, int64_t begin, int64_t end, int worker)
{
    bench_convert *t = (bench_convert *)arg;
    char          *w = t->w + mft_dtype_bytes(t->dtype, begin);
    (void)worker;
    if (t->back) t->k->from_float(w, t->dtype, t->x + begin, end - begin);
    else         t->k->to_float(t->x + begin, w, t->dtype, end - begin);
}

static int bench_conversions(bench *b)
{
    static const struct { const char *what; mft_dtype dtype; int back; } all[] = {
        { "BF16 to F32, 16 M numbers", MFT_BF16, 0 }, { "F32 to BF16, 16 M numbers", MFT_BF16, 1 }, { "F16 to F32, 16 M numbers", MFT_F16, 0 },
        { "Q8_0 to F32, 16 M numbers", MFT_Q8_0, 0 }, { "Q4_0 to F32, 16 M numbers", MFT_Q4_0, 0 } };
    bench_convert t;
    double        s;
    size_t        i, bytes = sizeof(float) * BENCH_N;
    t.k = b->ctx->kernels;
    t.x = (float *)malloc(bytes); t.w = (char *)malloc(bytes);
    for (i = 0; t.x && t.w && i < sizeof all / sizeof *all; i++) {
        memset(t.x, 0x11, bytes); memset(t.w, 0x11, bytes);
        t.dtype = all[i].dtype; t.back = all[i].back;
        BENCH_BEST(s, mft__parallel(b->ctx, BENCH_N, 32768, bench_convert_run, &t));
        bench_line(b, all[i].what, s, 0, (double)bytes + (double)mft_dtype_bytes(t.dtype, BENCH_N));
    }
    free(t.x); free(t.w);
    return i > 0;
}

static int bench_ops(bench *b)
{
    enum { N = BENCH_B * BENCH_T };
    static float   inv_freq[BENCH_D / 2];
    static int32_t ids[N];
    mft_context *ctx = b->ctx;
    mft_tensor  *q = bench_input(b, MFT_F32, 1, 4, BENCH_B, BENCH_T, BENCH_HEADS, BENCH_D);
    mft_tensor  *k = bench_input(b, MFT_F32, 1, 4, BENCH_B, BENCH_T, BENCH_KV, BENCH_D);
    mft_tensor  *v = bench_input(b, MFT_F32, 1, 4, BENCH_B, BENCH_T, BENCH_KV, BENCH_D);
    mft_tensor  *x = bench_input(b, MFT_F32, 1, 3, BENCH_B, BENCH_T, BENCH_H, 0);
    mft_tensor  *x2 = bench_input(b, MFT_F32, 1, 3, BENCH_B, BENCH_T, BENCH_H, 0), *table = bench_input(b, MFT_F32, 1, 2, BENCH_V, BENCH_H, 0, 0);
    mft_tensor  *inner = bench_input(b, MFT_F32, 1, 3, BENCH_B, BENCH_T, BENCH_INNER, 0), *up = bench_input(b, MFT_F32, 1, 3, BENCH_B, BENCH_T, BENCH_INNER, 0);
    mft_tensor  *norm = bench_input(b, MFT_F32, 0, 1, BENCH_H, 0, 0, 0);
    mft_tensor  *w = bench_input(b, MFT_BF16, 0, 2, BENCH_INNER, BENCH_H, 0, 0);
    mft_tensor  *head = bench_input(b, MFT_BF16, 0, 2, BENCH_V, BENCH_H, 0, 0);
    mft_tensor  *la = bench_input(b, MFT_F32, 1, 2, 8, BENCH_H, 0, 0), *lb = bench_input(b, MFT_F32, 1, 2, BENCH_INNER, 8, 0, 0);
    mft_attention_desc window;
    double       pairs = BENCH_B * BENCH_HEADS * (double)BENCH_T * (BENCH_T + 1) / 2, products = 2.0 * N * BENCH_H;
    int          i, ok = q && k && v && x && x2 && table && inner && up && norm && w && head && la && lb;
    memset(&window, 0, sizeof window);
    window.window = 64;
    for (i = 0; i < BENCH_D / 2; i++) inv_freq[i] = 1.0f / (float)(i + 1);
    for (i = 0; i < N; i++) ids[i] = i * 97 % BENCH_V;
    if (!ok) return 0;
    /* two products forward, five backward, of each query with each key it sees */
    BENCH_OP("attention, causal",             14.0 * BENCH_D * pairs, 0, mft_attention(ctx, q, k, v, NULL));
    BENCH_OP("attention, window 64",          14.0 * BENCH_D * BENCH_B * BENCH_HEADS * 64 * (BENCH_T - 31.5), 0, mft_attention(ctx, q, k, v, &window));
    BENCH_OP("linear, frozen bf16",           2 * products * BENCH_INNER, 0, mft_linear(ctx, x, w, NULL));
    BENCH_OP("lora_linear, rank 8",           2 * products * BENCH_INNER + 6.0 * N * 8 * (BENCH_H + BENCH_INNER), 0, mft_lora_linear(ctx, x, w, NULL, la, lb, 2, 0));
    BENCH_OP("linear_cross_entropy, V 32768", 2 * products * BENCH_V, 0, mft_linear_cross_entropy(ctx, x, head, ids, 0, 0));
    BENCH_OP("rope",                          0, 6.0 * 4 * N * BENCH_H, mft_rope(ctx, q, NULL, inv_freq, 0));
    BENCH_OP("rms_norm",                      0, 7.0 * 4 * N * BENCH_H, mft_rms_norm(ctx, x, norm, 0, 1e-6f));
    BENCH_OP("layer_norm",                    0, 7.0 * 4 * N * BENCH_H, mft_layer_norm(ctx, x, norm, NULL, 1e-5f));
    BENCH_OP("swiglu",                        0, 10.0 * 4 * N * BENCH_INNER, mft_swiglu(ctx, inner, up));
    BENCH_OP("geglu",                         0, 10.0 * 4 * N * BENCH_INNER, mft_geglu(ctx, inner, up));
    BENCH_OP("gelu_tanh",                     0, 7.0 * 4 * N * BENCH_INNER, mft_gelu_tanh(ctx, inner));
    BENCH_OP("add",                           0, 9.0 * 4 * N * BENCH_H, mft_add(ctx, x, x2));
    BENCH_OP("dropout",                       0, 6.0 * 4 * N * BENCH_H, mft_dropout(ctx, x, 0.05f));
    BENCH_OP("embedding, V 32768",            0, 7.0 * 4 * N * BENCH_H, mft_embedding(ctx, table, ids, BENCH_B, BENCH_T, -1));
    return ok && bench_updates(b) && bench_conversions(b);
}

/* ==============================================================================
 * MARK: - [STEPS] Whole optimizer steps
 * ============================================================================== */

/* The published shapes; weights are random, in the dtype the snapshot has. */
typedef struct bench_shape { const char *name; mft_dtype dtype; const char *config; } bench_shape;
static const bench_shape bench_shapes[] = {
    { "GPT-2 124M", MFT_F32,
      "{\"model_type\":\"gpt2\",\"vocab_size\":50257,\"n_positions\":1024,\"n_embd\":768,\"n_layer\":12,\"n_head\":12,"
      "\"activation_function\":\"gelu_new\",\"layer_norm_epsilon\":1e-5,\"tie_word_embeddings\":true}" },
    { "Gemma-3-270M", MFT_BF16,
      "{\"model_type\":\"gemma3_text\",\"vocab_size\":262144,\"max_position_embeddings\":32768,\"hidden_size\":640,\"intermediate_size\":2048,"
      "\"num_hidden_layers\":18,\"num_attention_heads\":4,\"num_key_value_heads\":1,\"head_dim\":256,\"query_pre_attn_scalar\":256,"
      "\"hidden_activation\":\"gelu_pytorch_tanh\",\"rms_norm_eps\":1e-6,\"rope_theta\":1000000.0,\"rope_local_base_freq\":10000.0,"
      "\"sliding_window\":512,\"sliding_window_pattern\":6,\"tie_word_embeddings\":true}" },
    { "Qwen2.5-0.5B", MFT_BF16,
      "{\"model_type\":\"qwen2\",\"vocab_size\":151936,\"max_position_embeddings\":32768,\"hidden_size\":896,\"intermediate_size\":4864,"
      "\"num_hidden_layers\":24,\"num_attention_heads\":14,\"num_key_value_heads\":2,\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-6,"
      "\"rope_theta\":1000000.0,\"tie_word_embeddings\":true}" }
};

typedef struct bench_mode { int full, batch, seq, learnt; } bench_mode;     /* learnt: one token of so many, the last of each row; 0: all */

static int bench_by_value(const void *a, const void *b) { return *(const double *)a > *(const double *)b ? 1 : *(const double *)a < *(const double *)b ? -1 : 0; }

/* Median seconds of n steps after a first one; 0 with the context's sentence. */
static double bench_steps_of(mft_context *ctx, const char *dir, const bench_mode *mode, int n, mft_plan *plan, mft_model_config *config)
{
    mft_model       *m = NULL;
    mft_trainer     *tr = NULL;
    mft_model_desc   md;
    mft_trainer_desc td;
    mft_batch        batch;
    mft_progress     p;
    double           seconds[64], median = 0;
    uint32_t         random = 1;
    int              i, n_ids = mode->batch * mode->seq;
    int32_t         *ids = (int32_t *)malloc(sizeof(int32_t) * 2 * (size_t)n_ids);             /* then labels */
    memset(&md, 0, sizeof md); memset(&td, 0, sizeof td); memset(&batch, 0, sizeof batch);
    md.train_all = mode->full;
    td.micro_batch = mode->batch;
    if (n > 64) n = 64;
    if (ids && mft_model_load(ctx, dir, &md, &m) == MFT_OK && (mode->full || mft_lora_attach(m, NULL) == MFT_OK)
        && mft_trainer_create(m, NULL, &td, &tr) == MFT_OK && mft_trainer_plan(tr, mode->batch, mode->seq, plan) == MFT_OK) {
        *config = *mft_model_get_config(m);
        for (i = 0; i < n_ids; i++) {
            random = random * 1664525u + 1013904223u;
            ids[i] = (int32_t)((random >> 8) % (uint32_t)config->vocab_size);
            ids[n_ids + i] = mode->learnt && i % mode->seq < mode->seq - mode->seq / mode->learnt ? -100 : ids[i];
        }
        batch.input_ids = ids; batch.labels = ids + n_ids; batch.batch = mode->batch; batch.seq = mode->seq;
        for (i = -1; i < n && mft_trainer_step_batch(tr, &batch, 1, &p) == MFT_OK; i++) if (i >= 0) seconds[i] = p.seconds;
        if (i == n) { qsort(seconds, (size_t)n, sizeof *seconds, bench_by_value); median = seconds[n / 2]; }
    }
    mft_trainer_destroy(tr);
    mft_model_destroy(m);
    free(ids);
    return median;
}

/* LoRA: the weights are gone over forward and backward, 4 FLOP per weight and token; full: 6. */
static int bench_steps(bench *b, const char *name, const char *dir, const bench_mode *modes, int n_modes, int n_steps)
{
    int i;
    for (i = 0; i < n_modes; i++) {
        mft_plan         plan;
        mft_model_config c = { 0 };
        double           s = bench_steps_of(b->ctx, dir, &modes[i], n_steps, &plan, &c), tokens = (double)modes[i].batch * modes[i].seq, gflops;
        if (s <= 0) return 0;
        gflops = (modes[i].full ? 6.0 : 4.0) * (double)c.n_params * tokens / s * 1e-9;
        if (b->json) printf("%s{\"model\":\"%s\",\"mode\":\"%s\",\"batch\":%d,\"seq_len\":%d,\"seconds\":%.6g,\"tokens_per_second\":%.6g,\"gflops\":%.4g,\"plan_bytes\":%llu}",
                            b->rows ? "," : "", name, modes[i].full ? "full" : "lora", modes[i].batch, modes[i].seq, s, tokens / s, gflops, (unsigned long long)plan.total);
        else printf("%-14s %-5s %3d x %-5d %9.0f tokens/s %9.1f ms a step %8.1f GFLOPS %5.0f %% of peak %7.0f MiB held\n", name, modes[i].full ? "full" : "LoRA",
                    modes[i].batch, modes[i].seq, tokens / s, s * 1e3, gflops, 100 * gflops / b->peak, (double)plan.total / 1048576.0);
        fflush(stdout);
        b->rows++;
    }
    return 1;
}

/* ==============================================================================
 * MARK: - [DECODE] One token after the other: each reads every weight once
 * ============================================================================== */
enum { BENCH_PROMPT = 64, BENCH_TOKENS = 48 };
typedef struct bench_tokens { double at[BENCH_TOKENS]; int n; } bench_tokens;

static int bench_on_token(void *user, int32_t id)
{
    bench_tokens *t = (bench_tokens *)user;
    (void)id;
    if (t->n < BENCH_TOKENS) t->at[t->n++] = bench_now();
    return 0;
}

/* What a token reads: all weights, but not an embedding that is not also the head. Returns the bytes, and in *seconds how
 * long only reading them takes where they lie: the machine's limit, no part of which is in a cache. */
static double bench_weights(bench *b, mft_model *m, double *seconds)
{
    enum { MOST = 8192 };
    mft_tensor **t = (mft_tensor **)malloc(sizeof *t * MOST);
    double       bytes = 0;
    int          i, n = t ? mft_model_params(m, 0, t, MOST) : 0;
    if (n > MOST) n = MOST;
    BENCH_BEST(*seconds, {
        bytes = 0;
        for (i = 0; i < n; i++) {
            bench_read r;
            size_t     size = mft_dtype_bytes(t[i]->dtype, mft_tensor_numel(t[i]));
            if (t[i] == m->embedding->t && m->head != m->embedding) continue;
            bytes += (double)size;
            r.b = b; r.x = (const float *)t[i]->data; r.y = r.x + size / 8;
            mft__parallel(b->ctx, (int64_t)(size / 8), 65536, bench_read_run, &r);
        } });
    free(t);
    return bytes;
}

/* The median of the tokens after the first; storage as in mft_model_desc.weights. */
static int bench_decode(bench *b, const char *name, const char *dir, const char *storage)
{
    mft_model        *m = NULL;
    mft_model_desc    md;
    mft_generate_desc gd;
    bench_tokens      t;
    double            start, bytes = 0, seconds, machine = b->bandwidth;
    int32_t           prompt[BENCH_PROMPT];
    char              what[96];
    int               i, ok = 0;
    memset(&md, 0, sizeof md); memset(&gd, 0, sizeof gd); memset(&t, 0, sizeof t);
    md.weights = storage;
    gd.max_new_tokens = BENCH_TOKENS; gd.ignore_eos = 1; gd.on_token = bench_on_token; gd.user = &t;
    if (mft_model_load(b->ctx, dir, &md, &m) == MFT_OK) {
        bytes = bench_weights(b, m, &seconds);
        b->bandwidth = bytes / seconds * 1e-9;
        for (i = 0; i < BENCH_PROMPT; i++) prompt[i] = (int32_t)((7919 * (i + 1)) % mft_model_get_config(m)->vocab_size);
        mft_generate(m, prompt, BENCH_PROMPT, &gd, NULL, 0);                    /* maps the pages, wakes the machine */
        t.n = 0;
        start = bench_now();
        ok = mft_generate(m, prompt, BENCH_PROMPT, &gd, NULL, 0) == BENCH_TOKENS;
    }
    if (ok) {
        snprintf(what, sizeof what, "%s%s%s, weights only read", name, storage ? " " : "", storage ? storage : "");
        bench_line(b, what, seconds, 0, bytes);
        snprintf(what, sizeof what, "%s%s%s, prompt of %d", name, storage ? " " : "", storage ? storage : "", BENCH_PROMPT);
        bench_line(b, what, t.at[0] - start, 0, bytes);
        for (i = BENCH_TOKENS - 1; i > 0; i--) t.at[i] -= t.at[i - 1];
        qsort(t.at + 1, BENCH_TOKENS - 1, sizeof t.at[0], bench_by_value);
        snprintf(what, sizeof what, "%s%s%s, a token", name, storage ? " " : "", storage ? storage : "");
        bench_line(b, what, t.at[BENCH_TOKENS / 2], 0, bytes);
    }
    b->bandwidth = machine;
    mft_model_destroy(m);
    return ok;
}

static int bench_decode_all(bench *b, const char *name, const char *dir)
{
    return bench_decode(b, name, dir, NULL) && bench_decode(b, name, dir, "q8_0") && bench_decode(b, name, dir, "q4_0");
}

/* ==============================================================================
 * MARK: - [THREADS] More threads than cores must cost next to nothing
 * ============================================================================== */

/* Steps of this context and of one with four threads a core, by turns; the ratio of the medians. */
static int bench_threads(bench *b, const char *name, const char *dir)
{
    static const bench_mode mode = { 0, 1, 128, 0 };
    mft_context_desc d;
    mft_context     *many = NULL;
    mft_plan         plan;
    mft_model_config c = { 0 };
    double           few_s[3], many_s[3];
    int              i, ok = 1, cores = mft__cores();
    memset(&d, 0, sizeof d);
    d.n_threads = 4 * cores; d.kernels = mft_kernels_name(b->ctx); d.precision = b->ctx->precision;
    if (mft_context_create(&d, &many) != MFT_OK) return 0;
    for (i = 0; i < 3 && ok; i++) {
        few_s[i]  = bench_steps_of(b->ctx, dir, &mode, 3, &plan, &c);
        many_s[i] = bench_steps_of(many, dir, &mode, 3, &plan, &c);
        ok = few_s[i] > 0 && many_s[i] > 0;
    }
    if (ok) {
        qsort(few_s, 3, sizeof few_s[0], bench_by_value); qsort(many_s, 3, sizeof many_s[0], bench_by_value);
        if (b->json) printf("%s{\"model\":\"%s\",\"threads\":%d,\"seconds\":%.6g,\"many_threads\":%d,\"many_seconds\":%.6g,\"speed_ratio\":%.4g}",
                            b->rows ? "," : "", name, b->ctx->n_threads, few_s[1], d.n_threads, many_s[1], few_s[1] / many_s[1]);
        else printf("%-14s LoRA 1 x 128: %d threads %.1f ms a step, %d threads on %d cores %.1f ms: %.2f times the speed\n",
                    name, b->ctx->n_threads, few_s[1] * 1e3, d.n_threads, cores, many_s[1] * 1e3, few_s[1] / many_s[1]);
        b->rows++;
    }
    mft_context_destroy(many);
    return ok;
}

/* ==============================================================================
 * MARK: - [SCALING] What a token costs where sequences are long, and where few are learnt
 * ============================================================================== */

/* LoRA steps of equally many tokens; each beside the first. */
static int bench_scaling(bench *b, const char *name, const char *dir, int n_steps)
{
    static const bench_mode modes[] = { { 0, 16, 128, 0 }, { 0, 4, 512, 0 }, { 0, 1, 2048, 0 }, { 0, 16, 128, 10 } };
    double first = 0;                       /* seconds a token */
    size_t i;
    for (i = 0; i < sizeof modes / sizeof *modes; i++) {
        bench_mode       mode = modes[i];
        mft_plan         plan;
        mft_model_config c = { 0 };
        double           s;
        char             learnt[32] = "";
        if (mft_model_inspect(b->ctx, dir, &c) != MFT_OK) return 0;
        if (mode.seq > c.max_position) { mode.batch = (int)(mode.batch * mode.seq / c.max_position); mode.seq = (int)c.max_position; }
        s = bench_steps_of(b->ctx, dir, &mode, n_steps, &plan, &c) / ((double)mode.batch * mode.seq);
        if (s <= 0) return 0;
        if (i == 0) first = s;
        if (mode.learnt) snprintf(learnt, sizeof learnt, ", 1 of %d learnt", mode.learnt);
        if (b->json) printf("%s{\"model\":\"%s\",\"batch\":%d,\"seq_len\":%d,\"learnt\":%.3g,\"seconds_per_token\":%.6g,\"time_ratio\":%.4g}", b->rows ? "," : "",
                            name, mode.batch, mode.seq, mode.learnt ? 1.0 / mode.learnt : 1.0, s, s / first);
        else printf("%-14s LoRA %3d x %-5d %9.1f us a token, %.2f times the first%s\n", name, mode.batch, mode.seq, s * 1e6, s / first, learnt);
        fflush(stdout);
        b->rows++;
    }
    return 1;
}

/* ---- published shapes ---- */
/* A snapshot of the shape in the folder for temporary files, measured, and taken away again. */
static int bench_shape_of(bench *b, const bench_shape *shape, int part, int n_steps)
{
    static const bench_mode modes[] = { { 0, 1, 128, 0 }, { 0, 4, 256, 0 }, { 1, 1, 128, 0 }, { 1, 4, 256, 0 } };
    const char *tmp = getenv("TMPDIR");
    char        dir[512], path[600];
    FILE       *f;
    int         ok = 0;
    snprintf(dir, sizeof dir, "%s/mft-bench-%ld", tmp ? tmp : "/tmp", (long)getpid());
    snprintf(path, sizeof path, "%s.json", dir);
    f = fopen(path, "wb");
    if (f) ok = fputs(shape->config, f) >= 0;
    if (f) ok &= fclose(f) == 0;
    if (!ok) fprintf(stderr, "mft bench: %s cannot be written (TMPDIR names another folder)\n", path);
    else ok = mft_model_init(b->ctx, path, 1, shape->dtype, dir) == MFT_OK
           && (part == BENCH_DECODE  ? bench_decode_all(b, shape->name, dir)
             : part == BENCH_THREADS ? bench_threads(b, shape->name, dir)
             : part == BENCH_SCALING ? bench_scaling(b, shape->name, dir, n_steps)
                                     : bench_steps(b, shape->name, dir, modes, shape->dtype == MFT_F32 ? 4 : 2, n_steps));
    remove(path);
    snprintf(path, sizeof path, "%s/config.json", dir);       remove(path);
    snprintf(path, sizeof path, "%s/model.safetensors", dir); remove(path);
    rmdir(dir);
    return ok;
}

static int bench_shapes_of(bench *b, int part, int n_steps)
{
    size_t i;
    for (i = 0; i < sizeof bench_shapes / sizeof *bench_shapes; i++) {
        if (part == BENCH_THREADS && i) break;                  /* the first will do */
        if (!bench_shape_of(b, &bench_shapes[i], part, n_steps)) return 0;
    }
    return 1;
}

#endif
