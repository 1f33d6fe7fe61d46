/* test_kernels.c - every row of the kernel table the machine can run, against formulas in double
 *
 * Lengths are odd, starts unaligned, and the numbers behind an output must stay as they were. Rows are
 * also compared with the portable one, products with a plain float loop's error. */
#ifndef TEST_SUITE
#  define TEST_SUITE "kernels"
#endif
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "test.h"

static const mft__kernels *K;                /* the row under test */
static const float inf = HUGE_VALF;

#define MAX_N 300
static const int lengths[] = { 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 257 };
#define N_LENGTHS ((int)(sizeof lengths / sizeof *lengths))

static mft_context *context(const char *row, int n_threads, mft_precision precision)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    memset(&d, 0, sizeof d);
    d.kernels = row; d.n_threads = n_threads; d.precision = precision;
#ifdef TEST_PRODUCTS
    d.products = TEST_PRODUCTS;
#endif
    CHECK(mft_context_create(&d, &ctx) == MFT_OK);
    return ctx;
}

static void fill(float *x, int64_t n, uint32_t *seed) { while (n-- > 0) *x++ = test_random(seed); }

/* |a - b| <= tol (1 + |b|), the same infinity, or NaN both */
static int close_to(double a, double b, double tol)
{
    if (b != b) return a != a;
    if (b - b != 0) return a == b;
    return fabs(a - b) <= tol * (1 + fabs(b));
}

/* ---- choosing ---- */
static void test_choice(void)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    const char      *name, *last = NULL;
    int              i;
    memset(&d, 0, sizeof d);
    d.n_threads = 1;
    for (i = 0; (name = mft_kernels_available(i)) != NULL; i++) {
        last = name;
        d.kernels = name;
        CHECK(mft_context_create(&d, &ctx) == MFT_OK && strcmp(mft_kernels_name(ctx), name) == 0);
        mft_context_destroy(ctx);
    }
    CHECK(i >= 1 && strcmp(last, "portable") == 0);
    d.kernels = "abacus";
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_INVALID_ARGUMENT && ctx == NULL);
    CHECK(mft_kernels_available(1000) == NULL);
}

/* ---- elementary functions against libm in double: every 997th float of the range that matters ---- */
static double ulp_of(double y) { int e; if (y == 0) return ldexp(1, -149); frexp(y, &e); return ldexp(1, e - 24 < -149 ? -149 : e - 24); }

typedef double (*real_fn)(double x);
static double worst_ulp(void (*f)(float *y, const float *x, int64_t n), real_fn reference, float from, float to)
{
    uint32_t a = mft__float_to_bits(from), b = mft__float_to_bits(to), u;
    float    x[64], y[64];
    double   worst = 0;
    int      n = 0, i, sign;
    for (sign = 0; sign < 2; sign++) for (u = a; u <= b; u += 997) {
        x[n++] = mft__bits_to_float(u | (uint32_t)sign << 31);
        if (n < 64 && u + 997 <= b) continue;
        f(y, x, n);
        for (i = 0; i < n; i++) {
            double r = reference((double)x[i]), e = fabs((double)y[i] - r) / ulp_of(r);
            if ((float)r - (float)r != 0) e = y[i] == (float)r ? 0 : 1e9;      /* overflow */
            if (!(e <= worst)) worst = e;
        }
        n = 0;
    }
    return worst;
}

static void run_exp(float *y, const float *x, int64_t n)  { K->exp_sum(y, x, 0, n); }
static void run_tanh(float *y, const float *x, int64_t n) { K->act(MFT__TANH, y, x, n); }
static void run_cos(float *y, const float *x, int64_t n)  { float s[64]; K->cos_sin(y, s, x, n); }
static void run_sin(float *y, const float *x, int64_t n)  { float c[64]; K->cos_sin(c, y, x, n); }
/* gelu(x) = x (1 + erf(x / sqrt 2)) / 2 gives erf back where it is not cancelled: x >= 0 */
static double ref_gelu(double x) { return 0.5 * x * erfc(-x * 0.70710678118654752); }
static void run_gelu(float *y, const float *x, int64_t n)
{
    float a[64];
    int64_t i;
    for (i = 0; i < n; i++) a[i] = fabsf(x[i]);
    K->act(MFT__GELU_ERF, y, a, n);
}
static double ref_gelu_abs(double x) { return ref_gelu(fabs(x)); }
static double ref_silu(double x) { return x / (1 + exp(-x)); }
static void run_silu(float *y, const float *x, int64_t n) { K->act(MFT__SILU, y, x, n); }

static void test_elementary(void)
{
    /* the bounds that [ROWS] of mft.h states; the worst seen on any row: 0.95, 1.22, 1.55, 2.08 */
    double e = worst_ulp(run_exp, exp, 1e-30f, 104.0f), t = worst_ulp(run_tanh, tanh, 1e-30f, 20.0f);
    double g = worst_ulp(run_gelu, ref_gelu_abs, 1e-30f, 20.0f), s = worst_ulp(run_silu, ref_silu, 1e-30f, 80.0f);
    double c = worst_ulp(run_cos, cos, 1e-30f, 3e9f), n = worst_ulp(run_sin, sin, 1e-30f, 3e9f);
    float  x[7], y[7], z[7];
    printf("%s: exp %.2f ulp, tanh %.2f, gelu %.2f, silu %.2f, cos %.4f, sin %.4f\n", K->name, e, t, g, s, c, n);
    CHECK(e <= 1.2 && t <= 1.7 && g <= 2 && s <= 2.5);
    CHECK(c <= 0.501 && n <= 0.501);
    x[0] = inf; x[1] = -inf; x[2] = NAN; x[3] = 0; x[4] = -0.0f; x[5] = 1e-45f; x[6] = 1000;
    K->exp_sum(y, x, 0, 7);
    CHECK(y[0] == inf && y[1] == 0 && y[2] != y[2] && y[3] == 1 && y[4] == 1 && y[5] == 1 && y[6] == inf);
    K->act(MFT__TANH, y, x, 7);
    CHECK(y[0] == 1 && y[1] == -1 && y[2] != y[2] && y[3] == 0 && y[4] == 0 && 1 / y[4] == -inf && y[5] == 1e-45f && y[6] == 1);
    K->act(MFT__GELU_ERF, y, x, 7);
    CHECK(y[0] == inf && y[2] != y[2] && y[3] == 0 && y[6] == 1000);
    K->act(MFT__RELU, y, x, 7);
    CHECK(y[0] == inf && y[1] == 0 && y[2] != y[2] && y[6] == 1000);
    x[6] = 1e30f;
    K->cos_sin(y, z, x, 7);
    CHECK(y[0] != y[0] && z[1] != z[1] && y[2] != y[2] && y[3] == 1 && z[3] == 0 && y[4] == 1 && z[5] == 1e-45f);
    CHECK(y[6] == (float)cos((double)1e30f) && z[6] == (float)sin((double)1e30f));
}

/* ---- vectors ---- */
static float A[MAX_N + 8], B[MAX_N + 8], C[MAX_N + 8], D[MAX_N + 8], Y[2 * MAX_N + 8], Z[2 * MAX_N + 8], Y0[2 * MAX_N + 8];
static const float guard = 12345.0f;

static double act_ref(mft__activation f, double x)
{
    switch (f) {
    case MFT__GELU_TANH: return 0.5 * x * (1 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case MFT__GELU_ERF:  return ref_gelu(x);
    case MFT__SILU:      return ref_silu(x);
    case MFT__RELU:      return x > 0 ? x : 0;
    case MFT__TANH:      return tanh(x);
    }
    return x;
}
static double slope_ref(mft__activation f, double x)            /* central difference in double: good to 1e-9 */
{
    double h = 1e-5;
    return (act_ref(f, x + h) - act_ref(f, x - h)) / (2 * h);
}

static void test_vectors(void)
{
    uint32_t seed = 7;
    int      l, off, i, f;
    for (l = 0; l < N_LENGTHS; l++) for (off = 0; off < 3; off++) {
        int    n = lengths[l];
        float *a = A + off, *b = B + (off * 2) % 3, *y = Y + off, *y0 = Y0 + off;
        double s = 0, ss = 0, dot = 0, es = 0;
        float  m = -inf;
        fill(A, n + 8, &seed); fill(B, n + 8, &seed); fill(Y0, n + 8, &seed);
        for (i = 0; i < n; i++) {
            a[i] *= 3;
            dot += (double)a[i] * b[i]; s += a[i]; ss += (double)a[i] * a[i]; es += exp((double)a[i] - 0.5);
            if (a[i] > m) m = a[i];
        }
        CHECK(close_to(K->dot(a, b, n), dot, 3e-6));
        CHECK(close_to(K->sum(a, n), s, 1e-14));
        CHECK(close_to(K->sum_squares(a, n), ss, 1e-14));
        CHECK(K->max(a, n) == m);
#define EACH(call, expected, tol) do {                                                                   \
            memcpy(Y, Y0, sizeof Y); y[n] = guard; call;                                                 \
            for (i = 0; i < n; i++) CHECK_MSG(close_to(y[i], expected, tol), "%s, n %d, at %d: %.9g not %.9g", K->name, n, i, (double)y[i], (double)(expected)); \
            CHECK(y[n] == guard); } while (0)
        EACH(K->axpy(y, 0.7f, a, n),  y0[i] + (double)0.7f * a[i], 2e-7);
        EACH(K->add(y, a, b, n),      (double)a[i] + b[i], 1e-7);
        EACH(K->mul(y, a, b, n),      (double)a[i] * b[i], 1e-7);
        EACH(K->mul_add(y, a, b, n),  y0[i] + (double)a[i] * b[i], 2e-7);
        EACH(K->scale(y, 0.3f, a, n), (double)0.3f * a[i], 1e-7);
        EACH(CHECK(close_to(K->exp_sum(y, a, 0.5f, n), es, 1e-6)), exp((double)a[i] - 0.5), 2e-7);
        memcpy(Y, Y0, sizeof Y); memcpy(y, a, sizeof(float) * (size_t)n);
        K->exp_sum(y, y, 0.5f, n);                                                      /* in place */
        for (i = 0; i < n; i++) CHECK(close_to(y[i], exp((double)a[i] - 0.5), 2e-7));
        for (f = MFT__GELU_TANH; f <= MFT__TANH; f++) {
            mft__activation act = (mft__activation)f;
            EACH(K->act(act, y, a, n),              act_ref(act, a[i]), 4e-7);
            EACH(K->act_backward(act, y, b, a, n, 1), y0[i] + b[i] * slope_ref(act, a[i]), 6e-7);
            EACH(K->act_backward(act, y, b, a, n, 0), b[i] * slope_ref(act, a[i]), 6e-7);
            EACH(K->gate(act, y, a, b, n),          act_ref(act, a[i]) * b[i], 4e-7);
            memset(C, 0, sizeof C); fill(C, n, &seed);
            EACH(K->gate_backward(act, y, NULL, C, a, b, n, 1, 0), y0[i] + (double)C[i] * b[i] * slope_ref(act, a[i]), 6e-7);
            EACH(K->gate_backward(act, NULL, y, C, a, b, n, 0, 1), y0[i] + (double)C[i] * act_ref(act, a[i]), 6e-7);
            EACH(K->gate_backward(act, y, Z, C, a, b, n, 0, 1), (double)C[i] * b[i] * slope_ref(act, a[i]), 6e-7);
            EACH(K->gate_backward(act, Z, y, C, a, b, n, 1, 0), (double)C[i] * act_ref(act, a[i]), 6e-7);
        }
        a[n / 2] = NAN;
        CHECK(K->max(a, n) != K->max(a, n) && K->dot(a, b, n) != K->dot(a, b, n) && K->sum(a, n) != K->sum(a, n));
        a[n / 2] = inf;
        CHECK(K->max(a, n) == inf && K->sum_squares(a, n) == HUGE_VAL);
    }
}

static void test_norms(void)
{
    uint32_t seed = 11;
    int      l, i;
    for (l = 0; l < N_LENGTHS; l++) {
        int    n = lengths[l];
        float *x = A + 1, *w = B + 2, *g = C + 3, *b = D + 1, r, mean;
        double ss = 0, mu = 0, rr, dot = 0, sum = 0, eps = (double)1e-6f;
        fill(A, n + 8, &seed); fill(B, n + 8, &seed); fill(C, n + 8, &seed); fill(D, n + 8, &seed); fill(Y0, 2 * n + 8, &seed);
        for (i = 0; i < n; i++) { ss += (double)x[i] * x[i]; mu += x[i]; }
        mu /= n;
        rr = 1 / sqrt(ss / n + eps);
        memcpy(Y, Y0, sizeof Y); Y[n] = guard;
        r = K->rms_norm(Y, x, w, 1.0f, 1e-6f, n);
        CHECK(close_to(r, rr, 1e-7));
        for (i = 0; i < n; i++) CHECK(close_to(Y[i], x[i] * rr * ((double)w[i] + 1), 4e-7));
        CHECK(Y[n] == guard);
        for (i = 0; i < n; i++) dot += (double)g[i] * ((double)w[i] + 1) * x[i] * rr;
        dot /= n;
        memcpy(Y, Y0, sizeof Y); memcpy(Z, Y0, sizeof Z);
        K->rms_norm_backward(Y, NULL, g, x, w, 1.0f, r, n, 0);
        for (i = 0; i < n; i++) CHECK(close_to(Y[i], rr * (g[i] * ((double)w[i] + 1) - x[i] * rr * dot), 4e-6));
        memcpy(Y, Y0, sizeof Y);
        K->rms_norm_backward(Y, Z, g, x, w, 1.0f, r, n, 1);
        for (i = 0; i < n; i++) {
            CHECK(close_to(Y[i], Y0[i] + rr * (g[i] * ((double)w[i] + 1) - x[i] * rr * dot), 4e-6));
            CHECK(close_to(Z[i], Y0[i] + g[i] * (x[i] * rr), 1e-6));
        }
        ss = 0;
        for (i = 0; i < n; i++) ss += (x[i] - mu) * (x[i] - mu);
        rr = 1 / sqrt(ss / n + 1e-3f);
        Y[n] = guard;
        r = K->layer_norm(Y, x, w, b, 1e-3f, n, &mean);
        CHECK(close_to(r, rr, 1e-6) && close_to(mean, mu, 1e-7));
        for (i = 0; i < n; i++) CHECK(close_to(Y[i], (x[i] - mu) * rr * w[i] + b[i], 3e-6));
        CHECK(Y[n] == guard);
        K->layer_norm(Y, x, w, NULL, 1e-3f, n, &mean);
        for (i = 0; i < n; i++) CHECK(close_to(Y[i], (x[i] - mu) * rr * w[i], 3e-6));
        dot = 0;
        for (i = 0; i < n; i++) { sum += (double)g[i] * w[i]; dot += (double)g[i] * w[i] * (x[i] - mu) * rr; }
        sum /= n; dot /= n;
        memcpy(Y, Y0, sizeof Y); memcpy(Z, Y0, sizeof Z);
        K->layer_norm_backward(Y, NULL, NULL, g, x, w, mean, r, n, 0);
        for (i = 0; i < n; i++) CHECK(close_to(Y[i], rr * ((double)g[i] * w[i] - sum - (x[i] - mu) * rr * dot), 1e-4));
        memcpy(Y, Y0, sizeof Y);
        K->layer_norm_backward(Y, Z, NULL, g, x, w, mean, r, n, 1);
        for (i = 0; i < n; i++) {
            CHECK(close_to(Y[i], Y0[i] + rr * ((double)g[i] * w[i] - sum - (x[i] - mu) * rr * dot), 1e-4));
            CHECK(close_to(Z[i], Y0[i] + g[i] * (x[i] - mu) * rr, 1e-5));
        }
        memcpy(Z, Y0, sizeof Z);
        K->layer_norm_backward(NULL, NULL, Z, g, x, w, mean, r, n, 1);
        for (i = 0; i < n; i++) CHECK(Z[i] == Y0[i] + g[i]);
    }
}

static void test_rope_and_adamw(void)
{
    uint32_t   seed = 5;
    int        l, i, add;
    mft__adamw k;
    for (l = 0; l < N_LENGTHS; l++) {
        int n = lengths[l];
        fill(A, n, &seed); fill(B, n, &seed); fill(Y0, 2 * n + 8, &seed);
        for (add = 0; add < 2; add++) {
            memcpy(Y, Y0, sizeof Y); memcpy(Z, Y0, sizeof Z);
            fill(Z, 2 * n, &seed);
            Y[2 * n] = guard;
            K->rope(Y, Z, A, B, n, add);
            for (i = 0; i < n; i++) {
                CHECK(close_to(Y[i],     (add ? Y0[i] : 0)     + (double)Z[i] * A[i] - (double)Z[i + n] * B[i], 3e-7));
                CHECK(close_to(Y[i + n], (add ? Y0[i + n] : 0) + (double)Z[i + n] * A[i] + (double)Z[i] * B[i], 3e-7));
            }
            CHECK(Y[2 * n] == guard);
        }
        memcpy(Y, Z, sizeof Y);
        K->rope(Y, Y, A, B, n, 0);                                                      /* in place */
        for (i = 0; i < n; i++) CHECK(close_to(Y[i + n], (double)Z[i + n] * A[i] + (double)Z[i] * B[i], 3e-7));

        memset(&k, 0, sizeof k);
        k.lr_over_c1 = 0.01f; k.decay = 0.999f; k.beta1 = 0.9f; k.one_minus_beta1 = 0.1f; k.beta2 = 0.99f; k.one_minus_beta2 = 0.01f;
        k.eps = 1e-8f; k.inv_sqrt_c2 = 1.5f; k.grad_scale = 0.5f;
        fill(A, n + 1, &seed); fill(B, n + 1, &seed); fill(C, n + 1, &seed); fill(D, n + 1, &seed);
        for (i = 0; i <= n; i++) C[i] = fabsf(C[i]) + 0.01f;
        memcpy(Y, A, sizeof A); memcpy(Z, B, sizeof B); memcpy(Y0, C, sizeof C);
        K->adamw(A, B, C, D, n, &k);
        for (i = 0; i < n; i++) {
            double g = 0.5 * D[i], m = Z[i] + (double)0.1f * (g - Z[i]), v = Y0[i] * (double)0.99f + (double)0.01f * g * g;
            CHECK(close_to(B[i], m, 3e-7) && close_to(C[i], v, 3e-7));
            CHECK(close_to(A[i], Y[i] * (double)0.999f - (double)0.01f * m / (sqrt(v) * 1.5 + 1e-8), 3e-7));
        }
        CHECK(A[n] == Y[n] && B[n] == Z[n] && C[n] == Y0[n]);
    }
}

/* ---- random numbers: the draws are mft__random's, whatever row makes them ---- */
static void test_random_draws(void)
{
    enum { N = 1500 };                      /* more than is drawn at a time */
    static float    x[N + 1], y[N + 1], y0[N + 1];
    static uint16_t h[N + 1];
    const uint64_t  stream = (uint64_t)1 << 63 | 77;
    const int64_t   first = ((int64_t)1 << 34) - 512;           /* counters that pass 32 bits on the way */
    uint32_t seed = 9;
    int      l, i, add;
    fill(x, N + 1, &seed); fill(y0, N + 1, &seed);
    x[3] = inf; x[4] = NAN; x[5] = 1e-41f; x[6] = -inf;
    for (l = 0; l <= N_LENGTHS; l++) {
        int n = l < N_LENGTHS ? lengths[l] : N;
        for (add = 0; add < 2; add++) {
            memcpy(y, y0, sizeof y);
            K->dropout(y, x, 0.3f, 5, stream, first, n, add);
            for (i = 0; i < n; i++) {
                uint32_t draw = (uint32_t)(mft__random(5, stream, (uint64_t)(first + i) / 2) >> (first + i) % 2 * 32);
                float    want = (draw >= (uint32_t)((double)0.3f * 4294967296.0) ? x[i] * (1 / (1 - 0.3f)) : 0.0f) + (add ? y0[i] : 0.0f);
                CHECK_MSG(y[i] == want || (y[i] != y[i] && want != want), "%s: n %d, at %d: %g, not %g", K->name, n, i, (double)y[i], (double)want);
            }
            CHECK(y[n] == y0[n]);
        }
        h[n] = 4321;
        K->bf16_by_chance(h, x, 5, stream, first, n);
        for (i = 0; i < n; i++) {
            uint32_t u = mft__float_to_bits(x[i]), draw = (uint32_t)(mft__random(5, stream, (uint64_t)(first + i) / 4) >> (first + i) % 4 * 16) & 0xffff;
            if (x[i] - x[i] == 0) u += draw;
            CHECK_MSG(h[i] == u >> 16, "%s: n %d, at %d: %04x, not %04x", K->name, n, i, (unsigned)h[i], (unsigned)(u >> 16));
        }
        CHECK(h[n] == 4321);
    }
}

/* ---- storage types: all 65536 halves, and quantised blocks by their definition ---- */
static void test_storage(void)
{
    static uint16_t h[65536 + 3], back[65536 + 3];
    static float    x[65536 + 3];
    static const mft_dtype halves[] = { MFT_F16, MFT_BF16 };
    uint32_t seed = 3;
    int      i, d;
    uint8_t  q[3 * 34 + 1];
    for (d = 0; d < 2; d++) {
        for (i = 0; i < 65536 + 3; i++) h[i] = (uint16_t)i;
        K->to_float(x, h, halves[d], 65536 + 3);
        for (i = 0; i < 65536; i++) {
            int    e = d ? (i >> 7) & 255 : (i >> 10) & 31, top = d ? 255 : 31, m = d ? i & 127 : i & 1023, bits = d ? 7 : 10, bias = d ? 127 : 15;
            double v = e == top ? (m ? NAN : (double)inf) : e ? ldexp(1 + ldexp(m, -bits), e - bias) : ldexp(m, 1 - bias - bits);
            if (i & 0x8000) v = -v;
            CHECK(v != v ? x[i] != x[i] : (double)x[i] == v);
        }
        K->from_float(back, halves[d], x, 65536 + 3);
        for (i = 0; i < 65536; i++) CHECK_MSG(back[i] == i || x[i] != x[i], "%04x came back as %04x", (unsigned)i, (unsigned)back[i]);
        for (i = 0; i < 65536; i++) if (x[i] != x[i]) { float one; mft__to_float(&one, &back[i], halves[d], 1); CHECK(one != one); }
        for (i = 0; i < 65536; i++) {                            /* any float: nearest, ties to even, as the plain version has it */
            seed = seed * 1664525u + 1013904223u;
            x[i] = mft__bits_to_float(i % 3 ? 0x38000000u + seed % 0x10000000u : seed);
            if (i % 7 == 0) x[i] = mft__bits_to_float((mft__float_to_bits(x[i]) & 0xffff0000u) | 0x8000);
        }
        K->from_float(back, halves[d], x, 65536);
        for (i = 0; i < 65536; i++) {
            uint16_t expect;
            mft__from_float(&expect, halves[d], &x[i], 1);
            CHECK_MSG(back[i] == expect || x[i] != x[i], "%s: %.9g is %04x, not %04x", mft_dtype_name(halves[d]), (double)x[i], (unsigned)expect, (unsigned)back[i]);
        }
    }
    for (i = 0; i < (int)sizeof q; i++) { seed = seed * 1664525u + 1013904223u; q[i] = (uint8_t)(seed >> 24); }
    for (i = 0; i < 3; i++) { q[1 + i * 34 + 1] = 0x2e; q[1 + i * 18 + 1] = 0x2e; }
    for (i = 0; i < 3; i++) q[1 + i * 34 + 1] = 0x2e;
    K->to_float(x, q + 1, MFT_Q8_0, 96);
    for (i = 0; i < 96; i++) {
        float scale = mft__f16_to_float((uint16_t)(q[1 + i / 32 * 34] | q[1 + i / 32 * 34 + 1] << 8));
        CHECK(x[i] == scale * (float)(int8_t)q[1 + i / 32 * 34 + 2 + i % 32]);
    }
    for (i = 0; i < 3; i++) q[1 + i * 18 + 1] = 0x2e;
    K->to_float(x, q + 1, MFT_Q4_0, 96);
    for (i = 0; i < 96; i++) {
        const uint8_t *b = q + 1 + i / 32 * 18;
        float scale = mft__f16_to_float((uint16_t)(b[0] | b[1] << 8));
        int   byte = b[2 + i % 16], v = (i % 32 < 16 ? byte & 15 : byte >> 4) - 8;
        CHECK(x[i] == scale * (float)v);
    }
}

/* ---- products ---- */
typedef struct operand { void *data; float *exact; int64_t rows, cols; mft__matrix m; } operand;

/* [rows, cols] of random numbers, stored row- or column-major with `gap` numbers between lines and before the first.
 * Quantised: rows of whole blocks along the stored lines, cut from there. */
static operand operand_make(int64_t rows, int64_t cols, mft_dtype dtype, int by_column, int64_t gap, uint32_t *seed)
{
    operand o;
    int64_t lines = by_column ? cols : rows, len = by_column ? rows : cols, stride = len + gap, i, j;
    size_t  bytes, skip;
    float  *lf;
    char   *start;
    if (mft__is_quantized(dtype)) stride = (len + 31) / 32 * 32;
    bytes = mft_dtype_bytes(dtype, stride) * (size_t)lines;
    skip   = mft__is_quantized(dtype) ? 2 * (size_t)gap : mft_dtype_bytes(dtype, gap);
    o.data = malloc(bytes + skip);                              /* not a byte more: the address sanitizer looks on */
    start  = (char *)o.data + skip;
    o.exact = (float *)malloc(sizeof(float) * (size_t)(rows * cols));
    o.rows = rows; o.cols = cols;
    lf = (float *)malloc(sizeof(float) * (size_t)stride);
    for (i = 0; i < lines; i++) {
        char *line = start + mft_dtype_bytes(dtype, stride) * (size_t)i;
        if (mft__is_quantized(dtype)) {
            size_t b, block = mft_dtype_bytes(dtype, 32);
            for (b = 0; b < mft_dtype_bytes(dtype, stride); b++) { test_random(seed); line[b] = (char)(*seed >> 24); }
            for (b = 0; b < mft_dtype_bytes(dtype, stride); b += block) { line[b] = (char)(*seed >> 16); line[b + 1] = 0x20; }
        } else {
            fill(lf, stride, seed);
            mft__from_float(line, dtype, lf, stride);
        }
        mft__to_float(lf, line, dtype, stride);
        for (j = 0; j < len; j++) o.exact[by_column ? j * cols + i : i * cols + j] = lf[j];
    }
    free(lf);
    o.m.data = start; o.m.dtype = dtype;
    o.m.row_stride = by_column ? 1 : stride; o.m.col_stride = by_column ? stride : 1;
    return o;
}
static void operand_free(operand *o) { free(o->data); free(o->exact); }

/* One product on the row, checked number by number; returns its root-mean-square error, and a plain
 * float loop's in *plain. */
static double product(mft_context *ctx, int64_t m, int64_t n, int64_t k, mft_dtype ta, int a_col, mft_dtype tb, int b_col,
                      int64_t gap, float alpha, int with_bias, int add, double tol, double *plain)
{
    uint32_t seed = (uint32_t)(m * 31 + n * 7 + k);
    operand  a = operand_make(m, k, ta, a_col, gap, &seed), b = operand_make(k, n, tb, b_col, gap, &seed);
    int64_t  ldc = n + gap, i, j, p, bad = 0;
    float   *c = (float *)malloc(sizeof(float) * (size_t)(m * ldc)), *c0 = (float *)malloc(sizeof(float) * (size_t)(m * ldc));
    float   *bias = (float *)malloc(sizeof(float) * (size_t)n);
    double   e2 = 0, p2 = 0, r2 = 0;
    fill(c0, m * ldc, &seed); fill(bias, n, &seed);
    memcpy(c, c0, sizeof(float) * (size_t)(m * ldc));
    CHECK(mft__gemm(ctx, m, n, k, alpha, a.m, b.m, with_bias ? bias : NULL, add, c, ldc));
    for (i = 0; i < m; i++) for (j = 0; j < ldc; j++) {
        double s = 0, e;
        float  f = 0;
        if (j >= n) { bad += c[i * ldc + j] != c0[i * ldc + j]; continue; }
        for (p = 0; p < k; p++) { s += (double)a.exact[i * k + p] * b.exact[p * n + j]; f += a.exact[i * k + p] * b.exact[p * n + j]; }
        f = f * alpha; s *= (double)alpha;
        if (with_bias) { s += bias[j]; f += bias[j]; }
        if (add) { s += c0[i * ldc + j]; f += c0[i * ldc + j]; }
        e = (double)c[i * ldc + j] - s;
        if (!(fabs(e) <= tol * (1 + sqrt((double)k)))) bad++;
        e2 += e * e; p2 += ((double)f - s) * ((double)f - s); r2 += s * s;
    }
    CHECK_MSG(bad == 0, "%s: %dx%dx%d %s%s %s%s gap %d: %d numbers wrong", mft_kernels_name(ctx), (int)m, (int)n, (int)k,
              mft_dtype_name(ta), a_col ? "T" : "", mft_dtype_name(tb), b_col ? "T" : "", (int)gap, (int)bad);
    if (plain) *plain = sqrt(p2 / r2);
    operand_free(&a); operand_free(&b); free(c); free(c0); free(bias);
    return sqrt(e2 / r2);
}

/* Every way through mft__gemm: thin and wide, all layouts and storage types, odd sizes around the tiles. 2e-6: of 300 x 96 numbers
 * with k 272 a plain loop's worst is off by 1.0e-6 of the bound's scale, ours by 1.2e-6. */
static void test_products(void)
{
    static const int sizes[][3] = { { 1, 1, 1 }, { 1, 5, 3 }, { 1, 100, 300 }, { 2, 33, 65 }, { 5, 67, 257 }, { 7, 7, 7 }, { 16, 17, 31 },
        { 17, 50, 33 }, { 33, 17, 64 }, { 40, 9, 100 }, { 65, 129, 19 }, { 100, 35, 5 }, { 31, 130, 270 }, { 300, 40, 40 }, { 19, 600, 8 }, { 600, 18, 20 },
        { 60, 160, 96 }, { 300, 96, 272 },        /* whole tiles: straight to c where k is one block, strips copied ahead where it is two */
        { 33, 45, 271 }, { 65, 129, 97 }, { 270, 33, 1100 } };             /* wide enough for pairs of bf16, the last in parts of k */
    static const mft_dtype types[] = { MFT_F32, MFT_F16, MFT_BF16, MFT_Q8_0, MFT_Q4_0 };
    size_t s, t;
    int    layout;
    mft_context *ctx = context(K->name, 2, MFT_PRECISION_F32);
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 4; layout++) for (t = 0; t < sizeof types / sizeof *types; t++) {
        int m = sizes[s][0], n = sizes[s][1], k = sizes[s][2], v = (int)(s + t) + layout;
        product(ctx, m, n, k, MFT_F32, layout & 1, types[t], layout >> 1, v % 3, v % 2 ? 1.0f : 0.7f, v % 5 < 2, v % 4 < 2, 2e-6, NULL);
        if (t) product(ctx, m, n, k, types[t], layout & 1, t == 4 ? MFT_BF16 : MFT_F32, layout >> 1, v % 3, 1.0f, v % 5 < 2, v % 4 < 2, 2e-6, NULL);
    }
    mft_context_destroy(ctx);
}

/* float32-grade: on shapes like the models' the error is no larger than a plain loop's */
static void test_product_error(void)
{
    static const int sizes[][3] = { { 128, 96, 896 }, { 128, 40, 2304 }, { 1, 200, 768 }, { 4, 100, 4864 }, { 120, 8, 896 }, { 96, 100, 128 } };
    mft_context *ctx = context(K->name, 1, MFT_PRECISION_F32);
    size_t s;
    int    layout;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 4; layout++) {
        double plain, e = product(ctx, sizes[s][0], sizes[s][1], sizes[s][2], MFT_F32, layout & 1, layout & 1 ? MFT_F32 : MFT_BF16, layout >> 1, 0, 1, 0, 0, 2e-6, &plain);
        CHECK_MSG(e <= plain, "%s: error %.2e, a plain loop's %.2e", K->name, e, plain);
        if (layout == 2) printf("%s: %dx%dx%d error %.2e, a plain loop's %.2e\n", K->name, sizes[s][0], sizes[s][1], sizes[s][2], e, plain);
    }
    mft_context_destroy(ctx);
}

/* Quantised weights against one token, a few and many, where they lie: float32-grade as well. Of the digits of neon_dot
 * and neon_i8mm two alone are right to 2^-16 only. */
static void test_product_quantized_error(void)
{
    static const int sizes[][3] = { { 1, 200, 768 }, { 1, 64, 896 }, { 1, 33, 64 }, { 1, 100, 70 }, { 1, 130, 4864 }, { 3, 40, 96 },
        { 2, 66, 896 }, { 16, 33, 70 }, { 19, 37, 768 }, { 100, 18, 2304 } };
    mft_context *ctx = context(K->name, 2, MFT_PRECISION_F32);
    size_t s;
    int    t;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (t = 0; t < 2; t++) {
        double plain, e = product(ctx, sizes[s][0], sizes[s][1], sizes[s][2], MFT_F32, 0, t ? MFT_Q4_0 : MFT_Q8_0, 1, 0, 1, 0, 0, 1e-6, &plain);
        CHECK_MSG(e <= plain, "%s: %s error %.2e, a plain loop's %.2e", K->name, t ? "Q4_0" : "Q8_0", e, plain);
    }
    mft_context_destroy(ctx);
}

/* The same bits for any number of threads, in both precisions and all storage types. */
static void test_product_threads(void)
{
    static const int sizes[][3] = { { 130, 300, 300 }, { 300, 9, 600 }, { 1, 3000, 100 }, { 3, 700, 257 }, { 270, 20, 100 }, { 20, 900, 64 }, { 600, 100, 40 },
        { 40, 3300, 300 } };     /* so many columns that a task of one thread takes several blocks, of five only one */
    static const int threads[]  = { 1, 2, 3, 5 };
    static const mft_dtype types[] = { MFT_BF16, MFT_Q8_0, MFT_Q4_0 };
    size_t s, t;
    int    layout, precision;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 4; layout++) for (precision = 0; precision < 2; precision++) {
        int      m = sizes[s][0], n = sizes[s][1], k = sizes[s][2];
        uint32_t seed = 9;
        operand  a = operand_make(m, k, MFT_F32, layout & 1, 0, &seed), b = operand_make(k, n, types[(s + (size_t)layout) % 3], layout >> 1, 0, &seed);
        size_t   bytes = sizeof(float) * (size_t)(m * n);
        float   *c = (float *)malloc(bytes), *first = (float *)malloc(bytes);
        for (t = 0; t < sizeof threads / sizeof *threads; t++) {
            mft_context *ctx = context(K->name, threads[t], (mft_precision)precision);
#ifndef MFT_NO_THREADS
            if (ctx->pool) ctx->pool->most = threads[t] - 1;    /* as if there were so many cores */
#endif
            CHECK(mft__gemm(ctx, m, n, k, 1, a.m, b.m, NULL, 0, t ? c : first, n));
            CHECK(t == 0 || memcmp(c, first, bytes) == 0);
            mft_context_destroy(ctx);
        }
        operand_free(&a); operand_free(&b); free(c); free(first);
    }
}

/* A product and what comes on top of it: a tail; numbers that lie elsewhere, or in c. In all layouts and on all ways (rows so
 * few that the tail is a product of its own, few and many strips, turned or not), against doubles; and the same bits for any
 * number of threads. */
static void test_product_tail(void)
{
    static const int sizes[][4] = { { 1, 70, 40, 8 }, { 3, 33, 90, 1 }, { 40, 9, 64, 5 }, { 37, 130, 300, 8 }, { 130, 37, 70, 33 },
        { 300, 290, 40, 4 }, { 290, 64, 270, 16 }, { 32, 304, 64, 1 } };    /* the last turned, in tiles, b where it lies */
    size_t s;
    int    layout, threads;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 8; layout++) {
        int64_t   m = sizes[s][0], n = sizes[s][1], k = sizes[s][2], r = sizes[s][3], ldc = n + layout % 3, i, j, p;
        uint32_t  seed = (uint32_t)s + 5;
        operand   a = operand_make(m, k, MFT_F32, layout & 1, 0, &seed), b = operand_make(k, n, layout < 4 ? MFT_F32 : MFT_BF16, layout >> 1 & 1, 0, &seed);
        operand   u = operand_make(m, r, MFT_F32, 0, layout % 2, &seed), v = operand_make(r, n, MFT_F32, layout >> 2, layout % 2, &seed);
        mft__tail tail = { u.m, v.m, r, 0.5f };
        size_t    bytes = sizeof(float) * (size_t)(m * ldc);
        float    *c = (float *)malloc(bytes), *c0 = (float *)malloc(bytes), *first = (float *)malloc(bytes), *bias = (float *)malloc(sizeof(float) * (size_t)n);
        int       bad = 0;
        fill(c0, m * ldc, &seed); fill(bias, n, &seed);
        for (threads = 1; threads <= 5; threads += 2) {
            mft_context *ctx = context(K->name, threads, MFT_PRECISION_F32);
            memcpy(c, c0, bytes);
            CHECK(mft__gemm_tailed(ctx, m, n, k, 1, a.m, b.m, bias, layout & 1 ? (layout & 2 ? c0 : c) : NULL, c, ldc, &tail));
            if (threads == 1) memcpy(first, c, bytes);
            CHECK(memcmp(c, first, bytes) == 0);
            mft_context_destroy(ctx);
        }
        for (i = 0; i < m; i++) for (j = 0; j < ldc; j++) {
            double y = 0, t = 0;
            for (p = 0; p < k && j < n; p++) y += (double)a.exact[i * k + p] * b.exact[p * n + j];
            for (p = 0; p < r && j < n; p++) t += (double)u.exact[i * r + p] * v.exact[p * n + j];
            if (j < n) y += 0.5 * t + bias[j] + (layout & 1 ? c0[i * ldc + j] : 0);
            else       y = c0[i * ldc + j];
            if (!(fabs(c[i * ldc + j] - y) <= 1e-6 * (1 + sqrt((double)(k + r))))) bad++;
        }
        CHECK_MSG(bad == 0, "%s: %dx%dx%d and %d, layout %d: %d numbers wrong", K->name, (int)m, (int)n, (int)k, (int)r, layout, bad);
        operand_free(&a); operand_free(&b); operand_free(&u); operand_free(&v); free(c); free(c0); free(first); free(bias);
    }
}

/* With quantised weights it is a row of x that has a NaN, an infinity, or numbers too small for digits: its products
 * are as with floats, the other rows' as if it were not there. */
static void test_product_quantized_not_finite(void)
{
    enum { N = 70, P = 100 };
    static const int   rows[] = { 1, 2, 7, 40 };
    static const float bad[]  = { NAN, HUGE_VALF, 1e-35f };
    mft_context *ctx = context(K->name, 2, MFT_PRECISION_F32);
    size_t s, q;
    int    t, i, j, wrong = 0;
    for (s = 0; s < sizeof rows / sizeof *rows; s++) for (t = 0; t < 2; t++) for (q = 0; q < 3; q++) {
        int      m = rows[s], at = m / 2;
        uint32_t seed = 4;
        operand  a = operand_make(m, P, MFT_F32, 0, 0, &seed), b = operand_make(P, N, t ? MFT_Q4_0 : MFT_Q8_0, 1, 0, &seed);
        float   *c = (float *)malloc(sizeof(float) * (size_t)(m * N)), *x = (float *)a.data + at * a.m.row_stride;
        if (q < 2) x[P - 1] = bad[q]; else for (j = 0; j < P; j++) x[j] *= bad[q];
        mft__gemm(ctx, m, N, P, 1, a.m, b.m, NULL, 0, c, N);
        for (i = 0; i < m; i++) for (j = 0; j < N; j++) {
            double sum = 0;
            int    p;
            for (p = 0; p < P; p++) sum += (double)((const float *)a.data)[i * a.m.row_stride + p] * b.exact[p * N + j];
            if (i != at)     wrong += !close_to(c[i * N + j], sum, 1e-5);
            else if (q == 2) wrong += !(fabs((double)c[i * N + j] - sum) < (K->split ? 2e-39 : 1e-40));    /* some 1e-35, in floats; the third
                                                                                   bf16 term of such ends at 2^-133, 100 of them add up */
            else             wrong += c[i * N + j] - c[i * N + j] == 0;
        }
        operand_free(&a); operand_free(&b); free(c);
    }
    CHECK_MSG(wrong == 0, "%s: %d numbers wrong", ctx->kernels->name, wrong);
    mft_context_destroy(ctx);
}

/* Puts a number that is not finite at (r, c), in a quantised operand as the scale of the block that holds it. */
static void operand_spoil(operand *o, int64_t r, int64_t c, float bad)
{
    int64_t stride = o->m.row_stride == 1 ? o->m.col_stride : o->m.row_stride, line = o->m.row_stride == 1 ? c : r, at = o->m.row_stride == 1 ? r : c, i, j;
    float  *lf = (float *)malloc(sizeof(float) * (size_t)stride);
    char   *p = (char *)o->m.data + mft_dtype_bytes(o->m.dtype, stride) * (size_t)line;
    if (mft__is_quantized(o->m.dtype)) mft__from_float(p + mft_dtype_bytes(o->m.dtype, at / 32 * 32), MFT_F16, &bad, 1);
    else                               mft__from_float(p + mft_dtype_bytes(o->m.dtype, at), o->m.dtype, &bad, 1);
    mft__to_float(lf, p, o->m.dtype, stride);
    for (i = 0; i < o->rows; i++) for (j = 0; j < o->cols; j++)
        if ((o->m.row_stride == 1 ? j : i) == line) o->exact[i * o->cols + j] = lf[o->m.row_stride == 1 ? i : j];
    free(lf);
}

/* A NaN or an infinity reaches exactly the numbers that depend on it: where the formula is not finite and nowhere else. */
static void test_product_not_finite(void)
{
    static const int sizes[][3] = { { 37, 40, 270 }, { 3, 70, 300 }, { 70, 5, 30 }, { 1, 70, 130 }, { 130, 33, 9 } };
    static const mft_dtype types[] = { MFT_F32, MFT_F16, MFT_BF16, MFT_Q8_0, MFT_Q4_0 };
    static const float bad[] = { NAN, HUGE_VALF, -HUGE_VALF };
    size_t s, q, t;
    int    layout, precision, i, j, p, wrong;
    for (precision = MFT_PRECISION_F32; precision <= MFT_PRECISION_BF16; precision++) {
        mft_context *ctx = context(K->name, 2, (mft_precision)precision);
        for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 4; layout++) for (t = 0; t < sizeof types / sizeof *types; t++) for (q = 0; q < 3; q++) {
            int      m = sizes[s][0], n = sizes[s][1], k = sizes[s][2], gap = (int)(s + t + q) % 3;
            uint32_t seed = 4;
            operand  a = operand_make(m, k, MFT_F32, layout & 1, gap, &seed), b = operand_make(k, n, types[t], layout >> 1, gap, &seed);
            float   *c = (float *)malloc(sizeof(float) * (size_t)(m * n));
            if (q != 1) operand_spoil(&a, m / 2, k - 1, bad[q]);
            if (q != 2) operand_spoil(&b, 0, n - 1, bad[q]);
            mft__gemm(ctx, m, n, k, 1, a.m, b.m, NULL, 0, c, n);
            for (wrong = i = 0; i < m; i++) for (j = 0; j < n; j++) {
                double y = 0;
                for (p = 0; p < k; p++) y += (double)a.exact[i * k + p] * b.exact[p * n + j];
                wrong += (c[i * n + j] - c[i * n + j] != 0) != (y - y != 0);
            }
            CHECK_MSG(wrong == 0, "%s, %s: %dx%dx%d of %s, layout %d, %g: %d numbers wrong", K->name, precision ? "bf16" : "f32", m, n, k,
                      mft_dtype_name(types[t]), layout, (double)bad[q], wrong);
            operand_free(&a); operand_free(&b); free(c);
        }
        mft_context_destroy(ctx);
    }
}

/* Planning takes the workspace on paper; running gives all of it back. */
static void test_product_memory(void)
{
    mft_context *ctx = context(K->name, 2, MFT_PRECISION_F32);
    uint32_t     seed = 1;
    operand      a = operand_make(65, 300, MFT_F32, 0, 0, &seed), b = operand_make(300, 130, MFT_BF16, 1, 0, &seed);
    float       *c = (float *)malloc(sizeof(float) * 65 * 130);
    size_t       planned;
    mft_memory_report r;
    mft_plan_begin(ctx);
    CHECK(mft__gemm(ctx, 65, 130, 300, 1, a.m, b.m, NULL, 0, c, 130));
    CHECK(mft_plan_end(ctx, &planned) == MFT_OK && planned > 0);
    CHECK(mft__gemm(ctx, 65, 130, 300, 1, a.m, b.m, NULL, 0, c, 130));
    mft_memory(ctx, &r);
    CHECK(r.step_now == 0 && r.step_peak == planned);
    operand_free(&a); operand_free(&b); free(c);
    mft_context_destroy(ctx);
}

/* bf16 precision: operands rounded to 8 bits where the row has something faster for them (few rows, as in
 * decoding, stay f32): 2^-9 each, so about 2.4e-3 relative; 2.5e-7 where nothing is rounded. */
static void test_product_bf16(void)
{
    static const int sizes[][3] = { { 128, 96, 896 }, { 33, 40, 271 }, { 1, 200, 768 }, { 120, 8, 896 }, { 96, 100, 15 }, { 300, 300, 300 }, { 45, 18, 1 } };
    mft_context *ctx = context(K->name, 2, MFT_PRECISION_BF16);
    size_t s;
    int    layout;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (layout = 0; layout < 4; layout++) {
        double e = product(ctx, sizes[s][0], sizes[s][1], sizes[s][2], MFT_F32, layout & 1, layout & 1 ? MFT_F32 : MFT_BF16, layout >> 1, 1, 1, 1, 1, 5e-3, NULL);
        CHECK_MSG(e < 4e-3, "%s: error %.2e", K->name, e);
        if (layout == 2 && s == 0) printf("%s: %dx%dx%d in bf16: error %.2e\n", K->name, sizes[s][0], sizes[s][1], sizes[s][2], e);
    }
    mft_context_destroy(ctx);
}

int main(void)
{
    const char *name;
    int         i, found = 0;
    float     (*last)(const float *a, const float *b, int64_t n) = NULL;
    TEST(test_choice);
    for (i = 0; (name = mft_kernels_available(i)) != NULL; i++) {
        mft_context *ctx = context(name, 1, MFT_PRECISION_F32);
#ifdef TEST_ROW
        char word[32];
        snprintf(word, sizeof word, " %s ", name);
        if (!strstr(" " TEST_ROW " ", word)) { mft_context_destroy(ctx); continue; }
#endif
        K = ctx->kernels;
        found++;
        if (last != K->dot) {                /* rows that share their vectors with the one before differ in products alone */
            TEST(test_elementary);
            TEST(test_vectors);
            TEST(test_norms);
            TEST(test_rope_and_adamw);
            TEST(test_random_draws);
            TEST(test_storage);
        }
        last = K->dot;
        TEST(test_products);
        TEST(test_product_error);
        TEST(test_product_quantized_error);
        TEST(test_product_bf16);
        TEST(test_product_tail);
        TEST(test_product_threads);
        TEST(test_product_not_finite);
        TEST(test_product_quantized_not_finite);
        TEST(test_product_memory);
        mft_context_destroy(ctx);
    }
#ifdef TEST_MORE
    TEST_MORE
#endif
    if (!found) { test__skipped++; printf("skip: %s: not a row of this machine\n", TEST_SUITE); }
    return test_report(TEST_SUITE);
}
