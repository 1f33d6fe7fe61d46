/* bench_kernels.h - products and vectors, measured beside what the machine can do
 *
 * For programs that include mft.h with its implementation:
 *     bench_kernels(stdout, row or NULL, n_threads, json)
 * A figure is the best of many runs within a quarter of a second: what else runs on the machine only
 * takes away. The peak is independent multiply-adds in registers, on as many threads; the bandwidth is
 * two arrays of 64 MB read once. */
#ifndef BENCH_KERNELS_H
#define BENCH_KERNELS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

typedef struct bench { mft_context *ctx; FILE *out; int json, rows; double peak, bandwidth; float sink; } bench;

static double bench_now(void)
{
    struct timeval t;
    gettimeofday(&t, NULL);
    return (double)t.tv_sec + 1e-6 * (double)t.tv_usec;
}

/* ---- the peak: chains of multiply-adds, enough of them to fill every unit ---- */
enum { BENCH_CHAINS = 20, BENCH_STEPS = 200000 };

#define BENCH_PEAK(NAME, TARGET, V, SET1, FMA)                                                                 \
    TARGET static float bench_fma_##NAME(void)                                                                 \
    {                                                                                                          \
        V c[BENCH_CHAINS], a = SET1(0.999f), b = SET1(0.001f);                                                 \
        float s = 0, lanes[sizeof(V) / sizeof(float)];                                                         \
        int i, r;                                                                                              \
        MFT__UNROLL                                                                                            \
        for (i = 0; i < BENCH_CHAINS; i++) c[i] = SET1((float)i);                                              \
        for (r = 0; r < BENCH_STEPS; r++) {                                                                    \
            BENCH_UNROLL                                                                                       \
            for (i = 0; i < BENCH_CHAINS; i++) c[i] = FMA(c[i], a, b);                                         \
        }                                                                                                      \
        BENCH_UNROLL                                                                                           \
        for (i = 0; i < BENCH_CHAINS; i++) { memcpy(lanes, &c[i], sizeof lanes); s += lanes[0]; }              \
        return s;                                                                                              \
    }
#ifdef __clang__
#  define BENCH_UNROLL _Pragma("clang loop unroll(full)")
#else
#  define BENCH_UNROLL _Pragma("GCC unroll 20")
#endif
#ifdef MFT__HAVE_AVX2
BENCH_PEAK(avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_set1_ps, _mm256_fmadd_ps)
#endif
#ifdef MFT__HAVE_AVX512
BENCH_PEAK(avx512, __attribute__((target("avx512f"))), __m512, _mm512_set1_ps, _mm512_fmadd_ps)
#endif
#ifdef MFT__HAVE_NEON
static float32x4_t bench_neon_fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
BENCH_PEAK(neon, , float32x4_t, vdupq_n_f32, bench_neon_fma)
#endif
static mft__v_portable bench_portable_fma(mft__v_portable a, mft__v_portable b, mft__v_portable c) { return a * b + c; }
BENCH_PEAK(portable, , mft__v_portable, mft__set1_portable, bench_portable_fma)

typedef struct bench_chain { float (*run)(void); int lanes; } bench_chain;

static bench_chain bench_chain_of(const char *row)
{
    bench_chain c = { bench_fma_portable, 4 };
    (void)row;
#ifdef MFT__HAVE_NEON
    if (strncmp(row, "neon", 4) == 0) c.run = bench_fma_neon;
#endif
#ifdef MFT__HAVE_AVX2
    if (strcmp(row, "avx2") == 0) { c.run = bench_fma_avx2; c.lanes = 8; }
#endif
#ifdef MFT__HAVE_AVX512
    if (strncmp(row, "avx512", 6) == 0 || strcmp(row, "amx") == 0) { c.run = bench_fma_avx512; c.lanes = 16; }
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
    double gflops = flops > 0 ? flops / seconds * 1e-9 : 0, gbs = bytes / seconds * 1e-9;
    if (b->json) fprintf(b->out, "%s{\"what\":\"%s\",\"row\":\"%s\",\"threads\":%d,\"seconds\":%.9g,\"gflops\":%.4g,\"gb_per_s\":%.4g}",
                         b->rows ? "," : "", what, mft_kernels_name(b->ctx), b->ctx->n_threads, seconds, gflops, gbs);
    else if (flops > 0) fprintf(b->out, "%-44s %10.1f us %8.1f GFLOPS %5.0f %% of peak\n", what, seconds * 1e6, gflops, 100 * gflops / b->peak);
    else if (flops < 0) fprintf(b->out, "%-44s %10.1f us %8.1f GB/s\n", what, seconds * 1e6, gbs);
    else                fprintf(b->out, "%-44s %10.1f us %8.1f GB/s   %5.0f %% of bandwidth\n", what, seconds * 1e6, gbs, 100 * gbs / b->bandwidth);
    b->rows++;
}

/* Batches long enough for the clock; the best of them. */
#define BENCH_BEST(seconds, CALL) do {                                                                         \
        double bench_start = bench_now(), bench_t = 0;                                                         \
        int    bench_n = 1, bench_i, bench_r;                                                                  \
        seconds = 1e9;                                                                                         \
        for (bench_r = 0; bench_r < 5 || bench_now() - bench_start < 0.25; bench_r++) {                        \
            bench_t = bench_now();                                                                             \
            for (bench_i = 0; bench_i < bench_n; bench_i++) { CALL; }                                          \
            bench_t = bench_now() - bench_t;                                                                   \
            if (bench_t < 1e-4) { bench_n *= 4; continue; }                                                    \
            if (bench_t / bench_n < seconds) seconds = bench_t / bench_n;                                      \
        } } while (0)

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
        BENCH_BEST(seconds, ok &= mft__gemm(b->ctx, m, n, k, 1, a, y, NULL, 0, c, n));
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

/* 1, or 0 with a sentence in the context or no such row (then *failed says which). */
static int bench_kernels(FILE *out, const char *row, int n_threads, int json, const char **failed)
{
    mft_context_desc d;
    bench            b;
    bench_chain      chain;
    bench_read       r;
    double           s;
    int64_t          n = (int64_t)16 << 20, tasks;
    float           *memory;
    int              ok = 1;

    memset(&d, 0, sizeof d); memset(&b, 0, sizeof b);
    d.kernels = row; d.n_threads = n_threads;
    *failed = "no such kernel row on this machine, or no memory";
    if (mft_context_create(&d, &b.ctx) != MFT_OK) return 0;
    b.out = out; b.json = json;

    chain = bench_chain_of(mft_kernels_name(b.ctx));
    tasks = b.ctx->n_threads;
    BENCH_BEST(s, mft__parallel(b.ctx, tasks, 1, bench_peak_run, &chain));
    b.peak = 2.0 * BENCH_CHAINS * BENCH_STEPS * chain.lanes * (double)tasks / s * 1e-9;
    memory = (float *)calloc((size_t)(2 * n), sizeof(float));
    if (!memory) { mft_context_destroy(b.ctx); return 0; }
    memset(memory, 1, sizeof(float) * (size_t)(2 * n));
    r.b = &b; r.x = memory; r.y = memory + n;
    BENCH_BEST(s, mft__parallel(b.ctx, n, 65536, bench_read_run, &r));
    b.bandwidth = (double)n * 8 / s * 1e-9;
    free(memory);
    if (json) fprintf(out, "{\"row\":\"%s\",\"threads\":%d,\"peak_gflops\":%.4g,\"bandwidth_gb_per_s\":%.4g,\"results\":[",
                      mft_kernels_name(b.ctx), b.ctx->n_threads, b.peak, b.bandwidth);
    else fprintf(out, "row %s, %d threads: multiply-adds peak at %.1f GFLOPS, memory is read at %.1f GB/s\n",
                 mft_kernels_name(b.ctx), b.ctx->n_threads, b.peak, b.bandwidth);

    ok &= bench_product(&b, "x w^T",  128, 4864, 896,  1, MFT_F32)  && bench_product(&b, "x w^T",  128, 4864, 896,  1, MFT_BF16)
       && bench_product(&b, "x w^T",  128, 4864, 896,  1, MFT_Q8_0) && bench_product(&b, "x w^T",  128, 4864, 896,  1, MFT_Q4_0)
       && bench_product(&b, "x w^T",  1024, 896, 4864, 1, MFT_BF16) && bench_product(&b, "x w",    128, 2304, 768,  0, MFT_F32)
       && bench_product(&b, "dy w",   128, 896, 4864,  0, MFT_BF16) && bench_product(&b, "dy^T x", 768, 3072, 1024, 2, MFT_F32);
    ok = ok && bench_product(&b, "LoRA x a^T", 128, 8, 896, 1, MFT_F32) && bench_product(&b, "LoRA h b^T", 128, 896, 8, 1, MFT_F32)
       && bench_product(&b, "LoRA dh^T x", 8, 896, 128, 2, MFT_F32);
    ok = ok && bench_product(&b, "decode w x", 1, 151936, 896, 1, MFT_BF16) && bench_product(&b, "decode w x", 1, 151936, 896, 1, MFT_Q8_0)
       && bench_product(&b, "decode w x", 1, 151936, 896, 1, MFT_Q4_0) && bench_product(&b, "decode x w", 1, 50257, 768, 0, MFT_F32);
    ok = ok && bench_vectors(&b);
    if (json) fprintf(out, "]}\n");
    *failed = "no memory";
    mft_context_destroy(b.ctx);
    return ok;
}

#endif
