/* test_ops.c - every op's result against its formula in double, every gradient against central
 * differences of that formula
 *
 * An op is described once: inputs, how the library computes it, the formula. The harness then runs it on
 * every kernel row: all inputs trainable; each one alone (the others get no gradient); none (no record);
 * every layout an input may have (slices and transposes of larger tensors, whose other elements must keep
 * a gradient of zero); used twice in one step, and in two steps without zeroing. After each backward pass
 * the step's memory must be back at zero.
 *
 * Errors are max |difference| / max |expected| over one tensor. The differences of the formula, step 1e-5,
 * are good to 1e-9. `MFT_TEST_VERBOSE=1` prints the errors seen. Worst of the rows portable, avx2, avx512 and
 * avx512bf16, results and gradients, and what one wrong line in the op gave (each tried):
 *
 *   add, sub, mul        0 to 4e-8    2e-7 (a scalar: 4e-6)   sign 2, a row left out 0.36, the wrong factor 130
 *   activations, gates   1e-7         1.5e-6 (gelu_tanh)      scale's factor 1.6
 *   softmax, sum, mean   1e-7         1.3e-7                  no sum(dy y) 0.49, no 1/n 555
 *   views                0            1e-10                   offset 2, a part not zeroed 4
 *   matmul, linear       2e-7         2e-7                    strides 1.6, overwriting 0.75
 *   lora, dora           2e-7         2e-7                    scale 0.33, norm squared 0.93
 *   embedding            0            9e-8                    padding row 1.3
 *   norms                9e-8         1.5e-7                  offset 0.36, mean 440; mean 30 times the spread: 1e-6
 *   rope                 9e-8         8e-8                    sign 1.7, angle in double 6e-4
 *   attention            2e-7         5e-7                    window by one 1.2, slope of the cap 5, one head of a group 1.1
 *   ... 300 keys         6e-7         1.1e-6                  the sum not faded 1
 *   cross-entropy        2e-8         5e-8                    label 12, n_valid 1.2
 *   fused with the head  8e-8         1.1e-6                  label on a tile's edge 0.75, tiles overwritten 1, cap 1.2 */
#include "test.h"
#define MFT_ASSERT(x) do { if (!(x)) { printf("%s:%d: MFT_ASSERT(%s)\n", __FILE__, __LINE__, #x); test__bad++; } } while (0)
#define MFT_IMPLEMENTATION
#include "mft.h"

enum { MAX_IN = 7 };

enum {                                      /* how an input may lie in memory: bits */
    PLAIN = 0, SLICE_LAST = 1, SLICE_FIRST = 2, SLICE_INNER = 4, SWAP_LAST = 8, SWAP_HEADS = 16, RESHAPED = 32,
    ROWS = SLICE_FIRST | SLICE_INNER | SLICE_LAST | SWAP_HEADS | RESHAPED,         /* last dimension contiguous */
    ANY  = ROWS | SWAP_LAST,
    FROZEN = 64                             /* never trainable: storage types other than f32 */
};

typedef struct input {
    int       ndim, flags;
    int64_t   shape[4], n;
    mft_dtype dtype;
    double    scale, shift;                 /* numbers are uniform in shift +- scale */
} input;

typedef struct op_case op_case;
struct op_case {
    const char *name;
    mft_tensor *(*build)(mft_context *ctx, mft_tensor **in, const op_case *c);
    int64_t   (*formula)(const op_case *c, double *const *in, double *y);           /* returns the number of results */
    void      (*derivative)(const op_case *c, double *const *in, const double *dy, double **d);   /* NULL: differences */
    int       n_in;
    input     in[MAX_IN];
    double    p[4];
    int64_t   k[4];
    const int32_t *ids;
    const float   *table;
    int       quick;                        /* large: plain layouts only, one pass */
    size_t    leaves;                       /* bytes a step of it may leave below its first record */
    double   *base[MAX_IN];                 /* the inputs' numbers */
    float    *values[MAX_IN];               /* the same as f32 */
    double    seen_y, seen_g;
};

static op_case new_case(const char *name, mft_tensor *(*build)(mft_context *, mft_tensor **, const op_case *),
                        int64_t (*formula)(const op_case *, double *const *, double *))
{
    op_case c;
    memset(&c, 0, sizeof c);
    c.name = name; c.build = build; c.formula = formula;
    return c;
}

static input *add_input(op_case *c, int flags, int ndim, int64_t a, int64_t b, int64_t d, int64_t e)
{
    input *in = &c->in[c->n_in++];
    int    i;
    in->ndim = ndim; in->flags = flags; in->dtype = MFT_F32; in->scale = 1; in->shift = 0; in->n = 1;
    in->shape[0] = a; in->shape[1] = b; in->shape[2] = d; in->shape[3] = e;
    for (i = 0; i < ndim; i++) in->n *= in->shape[i];
    return in;
}

/* |a - b| / scale into *worst; a NaN stays. */
static void worst_of(double *worst, double a, double b, double scale)
{
    double d = fabs(a - b) / scale;
    if (!(d <= *worst)) *worst = d;
}

static double greatest(const double *x, int64_t n)
{
    double  m = 0;
    int64_t i;
    for (i = 0; i < n; i++) if (fabs(x[i]) > m) m = fabs(x[i]);
    return m > 0 ? m : 1;
}

/* ---- storage types, decoded here independently of the library ---- */
static double half_value(unsigned h)
{
    int    e = (int)(h >> 10 & 31), m = (int)(h & 1023);
    double v = e == 0 ? ldexp(m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexp(1024 + m, e - 25);
    return h & 0x8000 ? -v : v;
}

static double bfloat_value(unsigned h)
{
    int    e = (int)(h >> 7 & 255), m = (int)(h & 127);
    double v = e == 0 ? ldexp(m, -133) : e == 255 ? (m ? NAN : INFINITY) : ldexp(128 + m, e - 134);
    return h & 0x8000 ? -v : v;
}

/* Fills a stored tensor with random numbers of its type and says what they are. */
static void fill_stored(mft_tensor *t, double *value, double scale, uint32_t *seed)
{
    int64_t i, n = mft_tensor_numel(t);
    int     k;
    for (i = 0; t->dtype == MFT_BF16 && i < n; i++) {
        uint32_t u;
        float    f = (float)scale * test_random(seed);
        memcpy(&u, &f, 4);
        ((uint16_t *)t->data)[i] = (uint16_t)(u >> 16);
        value[i] = bfloat_value(u >> 16);
    }
    for (i = 0; t->dtype == MFT_F16 && i < n; i++) {            /* sign, exponents 2^-4 to 2^-1, any mantissa */
        unsigned h = ((unsigned)(test_random(seed) * 32767) & 0x83ff) | (unsigned)(11 + (i % 4)) << 10;
        ((uint16_t *)t->data)[i] = (uint16_t)h;
        value[i] = half_value(h);
    }
    for (i = 0; mft__is_quantized(t->dtype) && i < n / 32; i++) {
        int      bytes = t->dtype == MFT_Q8_0 ? 32 : 16;
        uint8_t *b = (uint8_t *)t->data + i * (2 + bytes);
        unsigned h = 0x2000 + (unsigned)i % 1024;               /* about 2^-7 */
        b[0] = (uint8_t)(h & 255); b[1] = (uint8_t)(h >> 8);
        for (k = 0; k < bytes; k++) b[2 + k] = (uint8_t)(int)(test_random(seed) * 127 + 128);
        for (k = 0; k < 32; k++)
            value[i * 32 + k] = half_value(h) * (t->dtype == MFT_Q8_0 ? (int8_t)b[2 + k] : (int)((k < 16 ? b[2 + k] & 15 : b[2 + k - 16] >> 4)) - 8);
    }
}

/* ---- one input in one layout ---- */
typedef struct placed { mft_tensor *root, *view; int64_t offset; } placed;

/* The held tensor the input lies in. */
static mft_tensor *place_root(mft_context *ctx, const input *in, int layout)
{
    int64_t shape[4], keep;
    int     d = in->ndim;
    memcpy(shape, in->shape, sizeof shape);
    if (layout == SLICE_LAST)  shape[d - 1] += 5;
    if (layout == SLICE_FIRST) shape[0] += 2;
    if (layout == SLICE_INNER) shape[d - 2] += 3;
    if (layout == SWAP_LAST)  { keep = shape[d - 1]; shape[d - 1] = shape[d - 2]; shape[d - 2] = keep; }
    if (layout == SWAP_HEADS) { keep = shape[d - 2]; shape[d - 2] = shape[d - 3]; shape[d - 3] = keep; }
    if (layout == RESHAPED)   { shape[0] = in->n; d = 1; }
    return mft_tensor_create(ctx, MFT_HELD, in->dtype, d, shape);
}

static mft_tensor *place_view(mft_context *ctx, const input *in, int layout, mft_tensor *root)
{
    int d = in->ndim;
    switch (layout) {
    case SLICE_LAST:  return mft_slice(ctx, root, d - 1, 3, 3 + in->shape[d - 1]);
    case SLICE_FIRST: return mft_slice(ctx, root, 0, 1, 1 + in->shape[0]);
    case SLICE_INNER: return mft_slice(ctx, root, d - 2, 2, 2 + in->shape[d - 2]);
    case SWAP_LAST:   return mft_transpose(ctx, root, d - 2, d - 1);
    case SWAP_HEADS:  return mft_transpose(ctx, root, d - 3, d - 2);
    case RESHAPED:    return mft_reshape(ctx, root, d, in->shape);
    }
    return root;
}

/* Place of element i (row-major) of a view, from the start of its root. */
static int64_t place_at(const mft_tensor *view, const mft_tensor *root, int64_t i)
{
    int64_t at = ((const float *)view->data - (const float *)root->data);
    int     d;
    for (d = view->ndim - 1; d >= 0; d--) { at += i % view->shape[d] * view->stride[d]; i /= view->shape[d]; }
    return at;
}

/* ---- the expected numbers ---- */
static double objective(const op_case *c, double *const *in, const double *dy, double *y)
{
    int64_t i, n = c->formula(c, in, y);
    double  s = 0;
    for (i = 0; i < n; i++) s += y[i] * dy[i];
    return s;
}

static void expected_gradient(const op_case *c, int which, const double *dy, double *y, double *out)
{
    double *x = c->base[which], h = 1e-5, keep;
    int64_t i;
    for (i = 0; i < c->in[which].n; i++) {
        double up, down;
        keep = x[i];
        x[i] = keep + h; up   = objective(c, c->base, dy, y);
        x[i] = keep - h; down = objective(c, c->base, dy, y);
        x[i] = keep;
        out[i] = (up - down) / (2 * h);
    }
}

/* ---- one run ---- */
static mft_tensor *weighted_sum(mft_context *ctx, mft_tensor *y, mft_tensor *dy)
{
    if (y && y->ndim == 0) return mft_mul(ctx, y, dy);
    return mft_sum(ctx, mft_mul(ctx, y, dy));
}

/* trainable: a bit for each input. layout: of input `which` (-1: all plain). uses: times the op is applied in
 * the step. Compares with y and g[], which holds what one use gives. */
static void run_once(op_case *c, mft_context *ctx, int trainable, int which, int layout, int uses,
                     const double *y, int64_t ny, const double *const *g, const float *dy, double tol_y, double tol_g)
{
    mft_tensor *root[MAX_IN], *view[MAX_IN], *weight, *out = NULL, *loss = NULL;
    int64_t     i, at, out_shape[4];
    int         k, u, pass, any = 0, out_ndim;
    char        what[160];
    double      worst, scale;

    snprintf(what, sizeof what, "%s, row %s, trainable %x, input %d in layout %d, used %d times", c->name, mft_kernels_name(ctx),
             (unsigned)trainable, which, layout, uses);
    for (k = 0; k < c->n_in; k++) {
        uint32_t seed = 5;
        int      l = k == which ? layout : PLAIN;
        root[k] = place_root(ctx, &c->in[k], l);
        CHECK_MSG(root[k] != NULL, "%s", mft_error_message(ctx));
        if (!root[k]) return;
        if (c->in[k].dtype != MFT_F32) { fill_stored(root[k], c->base[k], c->in[k].scale, &seed); continue; }
        view[k] = place_view(ctx, &c->in[k], l, root[k]);
        for (i = 0; i < mft_tensor_numel(root[k]); i++) ((float *)root[k]->data)[i] = 7;        /* what a view must not read */
        for (i = 0; i < c->in[k].n; i++) ((float *)root[k]->data)[place_at(view[k], root[k], i)] = c->values[k][i];
        root[k]->trainable = trainable >> k & 1;
        any |= root[k]->trainable;
    }
    weight = NULL;
    for (pass = 1; pass <= (c->quick ? 1 : 2); pass++) {        /* gradients add up from step to step */
        for (u = 0; u < uses; u++) {
            mft_tensor *one;
            for (k = 0; k < c->n_in; k++) view[k] = c->in[k].dtype == MFT_F32 ? place_view(ctx, &c->in[k], k == which ? layout : PLAIN, root[k]) : root[k];
            out = c->build(ctx, view, c);
            CHECK_MSG(out != NULL, "%s: %s", what, mft_error_message(ctx));
            if (!out) { mft_step_reset(ctx); goto done; }
            CHECK_MSG(mft_tensor_numel(out) == ny, "%s: %lld results, not %lld", what, (long long)mft_tensor_numel(out), (long long)ny);
            if (mft_tensor_numel(out) != ny) { mft_step_reset(ctx); goto done; }
            out_ndim = out->ndim; memcpy(out_shape, out->shape, sizeof out_shape);
            if (!weight) {
                weight = mft_tensor_create(ctx, MFT_HELD, MFT_F32, out_ndim, out_shape);
                memcpy(weight->data, dy, (size_t)ny * sizeof *dy);
            }
            worst = 0;
            scale = greatest(y, ny);
            for (i = 0; i < ny; i++) worst_of(&worst, ((const float *)out->data)[place_at(out, out, i)], y[i], scale);
            if (!(worst <= c->seen_y)) c->seen_y = worst;
            CHECK_MSG(worst < tol_y, "%s: result off by %.3g", what, worst);
            one  = weighted_sum(ctx, out, weight);
            loss = u ? mft_add(ctx, loss, one) : one;
        }
        CHECK_MSG(any || !ctx->tape, "%s: a record without a trainable input", what);
        CHECK_MSG(!any == !out->trainable, "%s: trainable is %d", what, out->trainable);
        CHECK_MSG(mft_backward(ctx, loss) == MFT_OK, "%s: %s", what, mft_error_message(ctx));
        CHECK_MSG(!any || ctx->arena.now <= c->leaves * (size_t)uses, "%s: %llu bytes of the step left", what, (unsigned long long)ctx->arena.now);
        mft_step_reset(ctx);
        for (k = 0; k < c->n_in; k++) {
            double *left;
            float  *grad;
            int64_t n = mft_tensor_numel(root[k]);
            if (!root[k]->trainable) { CHECK_MSG(!root[k]->grad, "%s: input %d is frozen and got a gradient", what, k); continue; }
            CHECK_MSG(root[k]->grad != NULL, "%s: input %d has no gradient", what, k);
            if (!root[k]->grad) continue;
            grad = (float *)root[k]->grad->data;
            view[k] = place_view(ctx, &c->in[k], k == which ? layout : PLAIN, root[k]);
            left = (double *)malloc((size_t)n * sizeof *left);
            for (i = 0; i < n; i++) left[i] = grad[i];
            worst = 0; scale = greatest(g[k], c->in[k].n);
            for (i = 0; i < c->in[k].n; i++) {
                at = place_at(view[k], root[k], i);
                worst_of(&worst, grad[at] / (double)(uses * pass), g[k][i], scale);
                left[at] = 0;
            }
            if (!(worst <= c->seen_g)) c->seen_g = worst;
            CHECK_MSG(worst < tol_g, "%s, pass %d: gradient of input %d off by %.3g", what, pass, k, worst);
            CHECK_MSG(greatest(left, n) == 1 || n == c->in[k].n, "%s: a gradient beside the view of input %d", what, k);
            free(left);
            mft_step_reset(ctx);
        }
    }
done:
    mft_tensor_destroy(ctx, weight);
    for (k = 0; k < c->n_in; k++) mft_tensor_destroy(ctx, root[k]);
}

/* Everything the head of this file says, for one op. Consumes the case. */
static void run_case(op_case *c, double tol_y, double tol_g)
{
    double  *y, *dyd, *d[MAX_IN];
    float   *dy;
    int64_t  i, ny, most = 1 << 16;
    uint32_t seed = 1;
    int      k, row, layout, all = 0;
    const char *name;

    for (k = 0; k < c->n_in; k++) {
        input *in = &c->in[k];
        c->base[k]   = (double *)malloc((size_t)in->n * sizeof(double));
        c->values[k] = (float *)malloc((size_t)in->n * sizeof(float));
        if (in->dtype != MFT_F32) {
            mft_context *ctx;
            mft_tensor  *t;
            uint32_t     s = 5;
            mft_context_create(NULL, &ctx);
            t = mft_tensor_create(ctx, MFT_HELD, in->dtype, in->ndim, in->shape);
            fill_stored(t, c->base[k], in->scale, &s);
            mft_context_destroy(ctx);
            continue;
        }
        for (i = 0; i < in->n; i++) {
            c->values[k][i] = (float)(in->shift + in->scale * test_random(&seed));
            c->base[k][i]   = c->values[k][i];
        }
        if (!(in->flags & FROZEN)) all |= 1 << k;
    }
    y = (double *)malloc((size_t)most * sizeof *y); dyd = (double *)malloc((size_t)most * sizeof *dyd); dy = (float *)malloc((size_t)most * sizeof *dy);
    ny = c->formula(c, c->base, y);
    for (i = 0; i < ny; i++) { dy[i] = test_random(&seed); dyd[i] = dy[i]; }
    for (k = 0; k < c->n_in; k++) d[k] = (double *)calloc((size_t)c->in[k].n, sizeof(double));
    if (c->derivative) c->derivative(c, c->base, dyd, d);
    else for (k = 0; k < c->n_in; k++) if (all >> k & 1) expected_gradient(c, k, dyd, y, d[k]);
    ny = c->formula(c, c->base, y);

    for (row = 0; (name = mft_kernels_available(row)) != NULL; row++) {
        mft_context_desc desc;
        mft_context     *ctx;
        memset(&desc, 0, sizeof desc);
        desc.kernels = name; desc.n_threads = 3;
        CHECK(mft_context_create(&desc, &ctx) == MFT_OK);
        run_once(c, ctx, all, -1, PLAIN, 1, y, ny, (const double *const *)d, dy, tol_y, tol_g);
        if (!c->quick) run_once(c, ctx, all, -1, PLAIN, 2, y, ny, (const double *const *)d, dy, tol_y, tol_g);
        run_once(c, ctx, 0,   -1, PLAIN, 1, y, ny, (const double *const *)d, dy, tol_y, tol_g);
        for (k = 0; k < c->n_in; k++) {
            if (all >> k & 1) run_once(c, ctx, 1 << k, -1, PLAIN, 1, y, ny, (const double *const *)d, dy, tol_y, tol_g);
            if ((all >> k & 1) && c->n_in > 1 && !c->quick) run_once(c, ctx, all & ~(1 << k), -1, PLAIN, 1, y, ny, (const double *const *)d, dy, tol_y, tol_g);
            for (layout = 1; layout < FROZEN; layout *= 2) {
                if (c->quick || !(c->in[k].flags & layout) || c->in[k].ndim < (layout == SWAP_HEADS ? 3 : layout == SWAP_LAST || layout == SLICE_INNER ? 2 : 1)) continue;
                run_once(c, ctx, all, k, layout, 1, y, ny, (const double *const *)d, dy, tol_y, tol_g);
                run_once(c, ctx, all, k, layout, 2, y, ny, (const double *const *)d, dy, tol_y, tol_g);
            }
        }
        mft_context_destroy(ctx);
    }
    if (getenv("MFT_TEST_VERBOSE")) printf("seen %-40s result %.1e (%.0e)  gradient %.1e (%.0e)\n", c->name, c->seen_y, tol_y, c->seen_g, tol_g);
    for (k = 0; k < c->n_in; k++) { free(c->base[k]); free(c->values[k]); free(d[k]); }
    free(y); free(dyd); free(dy);
}

/* ---- elementwise ---- */
static mft_tensor *build_add(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_add(ctx, in[0], in[1]); }
static mft_tensor *build_sub(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_sub(ctx, in[0], in[1]); }
static mft_tensor *build_mul(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_mul(ctx, in[0], in[1]); }
static int64_t formula_add(const op_case *c, double *const *in, double *y) { int64_t i; for (i = 0; i < c->in[0].n; i++) y[i] = in[0][i] + in[1][i % c->in[1].n]; return i; }
static int64_t formula_sub(const op_case *c, double *const *in, double *y) { int64_t i; for (i = 0; i < c->in[0].n; i++) y[i] = in[0][i] - in[1][i % c->in[1].n]; return i; }
static int64_t formula_mul(const op_case *c, double *const *in, double *y) { int64_t i; for (i = 0; i < c->in[0].n; i++) y[i] = in[0][i] * in[1][i % c->in[1].n]; return i; }

/* The second input: the first one's shape, its last two dimensions, its last one, a scalar. */
static void test_binary(const char *name, mft_tensor *(*build)(mft_context *, mft_tensor **, const op_case *),
                        int64_t (*formula)(const op_case *, double *const *, double *))
{
    int dims;
    for (dims = 3; dims >= 0; dims--) {
        op_case c = new_case(name, build, formula);
        add_input(&c, ANY, 3, 3, 5, 37, 0);
        if (dims == 3) add_input(&c, ANY, 3, 3, 5, 37, 0);
        if (dims == 2) add_input(&c, ANY, 2, 5, 37, 0, 0);
        if (dims == 1) add_input(&c, SLICE_LAST | RESHAPED, 1, 37, 0, 0, 0);
        if (dims == 0) add_input(&c, PLAIN, 0, 0, 0, 0, 0);
        run_case(&c, 3e-7, dims ? 2e-6 : 1e-5);                  /* a scalar's gradient is a sum of 555, its terms cancel */
    }
}

static void test_add(void) { test_binary("add", build_add, formula_add); }
static void test_sub(void) { test_binary("sub", build_sub, formula_sub); }
static void test_mul(void) { test_binary("mul", build_mul, formula_mul); }

static mft_tensor *build_scale(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_scale(ctx, in[0], (float)c->p[0]); }
static int64_t formula_scale(const op_case *c, double *const *in, double *y) { int64_t i; for (i = 0; i < c->in[0].n; i++) y[i] = c->p[0] * in[0][i]; return i; }
static void test_scale(void)
{
    op_case c = new_case("scale", build_scale, formula_scale);
    c.p[0] = -1.75;
    add_input(&c, ANY, 3, 3, 5, 37, 0);
    run_case(&c, 3e-7, 3e-7);
}

static double gelu_tanh_value(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / MFT__PI) * (x + 0.044715 * x * x * x))); }
static double gelu_value(double x) { return 0.5 * x * (1 + erf(x / sqrt(2.0))); }
static double silu_value(double x) { return x / (1 + exp(-x)); }
static double relu_value(double x) { return x > 0 ? x : 0; }

static mft_tensor *build_act(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    switch (c->k[0]) {
    case 0: return mft_gelu_tanh(ctx, in[0]);
    case 1: return mft_gelu(ctx, in[0]);
    case 2: return mft_silu(ctx, in[0]);
    case 3: return mft_relu(ctx, in[0]);
    case 4: return mft_tanh(ctx, in[0]);
    default: return mft_softcap(ctx, in[0], (float)c->p[0]);
    }
}

static int64_t formula_act(const op_case *c, double *const *in, double *y)
{
    int64_t i;
    for (i = 0; i < c->in[0].n; i++) {
        double x = in[0][i];
        y[i] = c->k[0] == 0 ? gelu_tanh_value(x) : c->k[0] == 1 ? gelu_value(x) : c->k[0] == 2 ? silu_value(x)
             : c->k[0] == 3 ? relu_value(x) : c->k[0] == 4 ? tanh(x) : c->p[0] * tanh(x / c->p[0]);
    }
    return i;
}

/* Numbers in +-5: the tails count as well. */
static void test_act(const char *name, int which, double tol_y, double tol_g)
{
    op_case c = new_case(name, build_act, formula_act);
    c.k[0] = which; c.p[0] = 2.5;
    add_input(&c, ANY, 3, 3, 5, 37, 0)->scale = 5;
    run_case(&c, tol_y, tol_g);
}

static void test_gelu_tanh(void) { test_act("gelu_tanh", 0, 1e-6, 5e-6); }
static void test_gelu     (void) { test_act("gelu",      1, 1e-6, 3e-6); }
static void test_silu     (void) { test_act("silu",      2, 1e-6, 3e-6); }
static void test_relu     (void) { test_act("relu",      3, 1e-7, 1e-7); }
static void test_tanh     (void) { test_act("tanh",      4, 1e-6, 3e-6); }
static void test_softcap  (void) { test_act("softcap",   5, 1e-6, 3e-6); }

static mft_tensor *build_gate(mft_context *ctx, mft_tensor **in, const op_case *c) { return c->k[0] ? mft_geglu(ctx, in[0], in[1]) : mft_swiglu(ctx, in[0], in[1]); }
static int64_t formula_gate(const op_case *c, double *const *in, double *y)
{
    int64_t i;
    for (i = 0; i < c->in[0].n; i++) y[i] = (c->k[0] ? gelu_tanh_value(in[0][i]) : silu_value(in[0][i])) * in[1][i];
    return i;
}

static void test_gates(void)
{
    int which;
    for (which = 0; which < 2; which++) {
        op_case c = new_case(which ? "geglu" : "swiglu", build_gate, formula_gate);
        c.k[0] = which;
        add_input(&c, ANY, 3, 3, 5, 37, 0)->scale = 4;
        add_input(&c, ANY, 3, 3, 5, 37, 0);
        run_case(&c, 1e-6, 3e-6);
    }
}

/* One tensor as both inputs: both parts of its gradient arrive. */
static mft_tensor *build_twice(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    switch (c->k[0]) {
    case 0: return mft_add(ctx, in[0], in[0]);
    case 1: return mft_sub(ctx, in[0], mft_scale(ctx, in[0], 3));
    case 2: return mft_mul(ctx, in[0], in[0]);
    case 3: return mft_swiglu(ctx, in[0], in[0]);
    default: return mft_geglu(ctx, in[0], mft_reshape(ctx, in[0], in[0]->ndim, in[0]->shape));
    }
}
static int64_t formula_twice(const op_case *c, double *const *in, double *y)
{
    int64_t i;
    for (i = 0; i < c->in[0].n; i++) {
        double x = in[0][i];
        y[i] = c->k[0] == 0 ? 2 * x : c->k[0] == 1 ? -2 * x : c->k[0] == 2 ? x * x : c->k[0] == 3 ? silu_value(x) * x : gelu_tanh_value(x) * x;
    }
    return i;
}
static void test_same_input_twice(void)
{
    static const char *const names[5] = { "x + x", "x - 3 x", "x x", "swiglu(x, x)", "geglu(x, reshape(x))" };
    int which;
    for (which = 0; which < 5; which++) {
        op_case c = new_case(names[which], build_twice, formula_twice);
        c.k[0] = which;
        add_input(&c, which == 4 ? PLAIN : ANY, 2, 5, 37, 0, 0)->scale = 2;
        run_case(&c, 1e-6, 3e-6);
    }
}

static mft_tensor *build_softmax(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_softmax(ctx, in[0]); }
static int64_t formula_softmax(const op_case *c, double *const *in, double *y)
{
    int64_t i, j, cols = c->in[0].shape[c->in[0].ndim - 1];
    for (i = 0; i < c->in[0].n; i += cols) {
        double sum = 0;
        for (j = 0; j < cols; j++) sum += exp(in[0][i + j] - 40);
        for (j = 0; j < cols; j++) y[i + j] = exp(in[0][i + j] - 40) / sum;
    }
    return i;
}
static void test_softmax(void)
{
    op_case c = new_case("softmax", build_softmax, formula_softmax);
    input  *x = add_input(&c, ANY, 3, 3, 5, 37, 0);
    x->scale = 4; x->shift = 90;                                /* exp(90) alone overflows a float */
    run_case(&c, 1e-6, 3e-6);
}

static mft_tensor *build_sum(mft_context *ctx, mft_tensor **in, const op_case *c) { return c->k[0] ? mft_mean(ctx, in[0]) : mft_sum(ctx, in[0]); }
static int64_t formula_sum(const op_case *c, double *const *in, double *y)
{
    int64_t i;
    y[0] = 0;
    for (i = 0; i < c->in[0].n; i++) y[0] += in[0][i];
    if (c->k[0]) y[0] /= (double)c->in[0].n;
    return 1;
}
static void test_sum_mean(void)
{
    int which;
    for (which = 0; which < 2; which++) {
        op_case c = new_case(which ? "mean" : "sum", build_sum, formula_sum);
        c.k[0] = which;
        add_input(&c, ANY, 3, 3, 5, 37, 0)->shift = 0.5;
        run_case(&c, 1e-6, 1e-6);
    }
}

static mft_tensor *build_mse(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_mse_loss(ctx, in[0], in[1]); }
static int64_t formula_mse(const op_case *c, double *const *in, double *y)
{
    int64_t i;
    y[0] = 0;
    for (i = 0; i < c->in[0].n; i++) y[0] += (in[0][i] - in[1][i]) * (in[0][i] - in[1][i]) / (double)c->in[0].n;
    return 1;
}
static void test_mse(void)
{
    op_case c = new_case("mse_loss", build_mse, formula_mse);
    add_input(&c, ANY, 2, 5, 37, 0, 0); add_input(&c, ANY, 2, 5, 37, 0, 0);
    run_case(&c, 1e-6, 1e-6);
}

/* ---- views: each alone, and all in a row ---- */
static mft_tensor *build_view(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    int64_t s[4] = { 5, 21, 2, 1 }, r[2] = { 5, 42 }, q[3] = { 2, 11, 5 };
    mft_tensor *x = in[0];                                      /* [3, 5, 14] */
    switch (c->k[0]) {
    case 0: return mft_reshape(ctx, x, 4, s);
    case 1: return mft_transpose(ctx, x, 0, 2);
    case 2: return mft_slice(ctx, x, 2, 3, 14);
    case 3: return mft_slice(ctx, x, 0, 1, 2);
    case 4: return mft_contiguous(ctx, mft_transpose(ctx, x, 1, 2));
    case 5: return mft_reshape(ctx, mft_transpose(ctx, x, 0, 1), 2, r);
    default: return mft_transpose(ctx, mft_reshape(ctx, mft_slice(ctx, mft_transpose(ctx, mft_slice(ctx, x, 0, 1, 3), 1, 2), 1, 2, 13), 3, q), 0, 1);
    }
}
static int64_t formula_view(const op_case *c, double *const *in, double *y)
{
    const double *x = in[0];
    int64_t i, j, k, n = 0;
    switch (c->k[0]) {
    case 0: for (i = 0; i < 210; i++) y[n++] = x[i]; break;
    case 1: for (i = 0; i < 14; i++) for (j = 0; j < 5; j++) for (k = 0; k < 3; k++) y[n++] = x[(k * 5 + j) * 14 + i]; break;
    case 2: for (i = 0; i < 3; i++) for (j = 0; j < 5; j++) for (k = 3; k < 14; k++) y[n++] = x[(i * 5 + j) * 14 + k]; break;
    case 3: for (j = 0; j < 5; j++) for (k = 0; k < 14; k++) y[n++] = x[(5 + j) * 14 + k]; break;
    case 4: for (i = 0; i < 3; i++) for (k = 0; k < 14; k++) for (j = 0; j < 5; j++) y[n++] = x[(i * 5 + j) * 14 + k]; break;
    case 5: for (j = 0; j < 5; j++) for (i = 0; i < 3; i++) for (k = 0; k < 14; k++) y[n++] = x[(i * 5 + j) * 14 + k]; break;
    default:                                                    /* [2, 11, 5] of x[1..2][j][2..12], then the first two swapped */
        for (k = 0; k < 11; k++) for (i = 0; i < 2; i++) for (j = 0; j < 5; j++) y[n++] = x[((i + 1) * 5 + j) * 14 + k + 2];
    }
    return n;
}
static void test_views(void)
{
    int which;
    for (which = 0; which < 7; which++) {
        op_case c = new_case("view", build_view, formula_view);
        c.k[0] = which;
        add_input(&c, ANY, 3, 3, 5, 14, 0);
        run_case(&c, 1e-12, 1e-7);
    }
}

/* ---- products ---- */
static mft_tensor *build_matmul(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_matmul(ctx, in[0], in[1]); }
static int64_t formula_matmul(const op_case *c, double *const *in, double *y)
{
    int     d = c->in[0].ndim;
    int64_t M = c->in[0].shape[d - 2], K = c->in[0].shape[d - 1], N = c->in[1].shape[d - 1], b, i, j, k;
    for (b = 0; b < c->in[0].n / (M * K); b++) for (i = 0; i < M; i++) for (j = 0; j < N; j++) {
        double s = 0;
        for (k = 0; k < K; k++) s += in[0][(b * M + i) * K + k] * in[1][(b * K + k) * N + j];
        y[(b * M + i) * N + j] = s;
    }
    return b * M * N;
}
static void test_matmul(void)
{
    int d;
    for (d = 2; d <= 4; d++) {
        op_case c = new_case("matmul", build_matmul, formula_matmul);
        if (d == 2) { add_input(&c, ANY, 2, 7, 19, 0, 0); add_input(&c, ANY, 2, 19, 13, 0, 0); }
        if (d == 3) { add_input(&c, ANY, 3, 3, 5, 9, 0);  add_input(&c, ANY, 3, 3, 9, 11, 0); }
        if (d == 4) { add_input(&c, ANY, 4, 2, 3, 5, 7);  add_input(&c, ANY, 4, 2, 3, 7, 3); }
        run_case(&c, 2e-6, 3e-6);
    }
    {   /* degenerate sizes: a product with one row, one column, one term */
        op_case r = new_case("matmul 1 x 9 x 5", build_matmul, formula_matmul), k = new_case("matmul 5 x 1 x 3", build_matmul, formula_matmul),
                n = new_case("matmul 5 x 9 x 1", build_matmul, formula_matmul);
        add_input(&r, ANY, 2, 1, 9, 0, 0); add_input(&r, ANY, 2, 9, 5, 0, 0); run_case(&r, 2e-6, 3e-6);
        add_input(&k, ANY, 2, 5, 1, 0, 0); add_input(&k, ANY, 2, 1, 3, 0, 0); run_case(&k, 2e-6, 3e-6);
        add_input(&n, ANY, 2, 5, 9, 0, 0); add_input(&n, ANY, 2, 9, 1, 0, 0); run_case(&n, 2e-6, 3e-6);
    }
}

/* x times its own transpose: one tensor, two views of it */
static mft_tensor *build_gram(mft_context *ctx, mft_tensor **in, const op_case *c) { (void)c; return mft_matmul(ctx, in[0], mft_transpose(ctx, in[0], 0, 1)); }
static int64_t formula_gram(const op_case *c, double *const *in, double *y)
{
    int64_t M = c->in[0].shape[0], K = c->in[0].shape[1], i, j, k;
    for (i = 0; i < M; i++) for (j = 0; j < M; j++)
        for (y[i * M + j] = 0, k = 0; k < K; k++) y[i * M + j] += in[0][i * K + k] * in[0][j * K + k];
    return M * M;
}
static void test_gram(void)
{
    op_case c = new_case("x x^T", build_gram, formula_gram);
    add_input(&c, ANY, 2, 7, 13, 0, 0);
    run_case(&c, 2e-6, 3e-6);
}

static mft_tensor *build_linear(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_linear(ctx, in[0], in[1], c->n_in > 2 ? in[2] : NULL); }
static int64_t formula_linear(const op_case *c, double *const *in, double *y)
{
    int64_t K = c->in[1].shape[1], N = c->in[1].shape[0], M = c->in[0].n / K, i, j, k;
    for (i = 0; i < M; i++) for (j = 0; j < N; j++) {
        double s = c->n_in > 2 ? in[2][j] : 0;
        for (k = 0; k < K; k++) s += in[0][i * K + k] * in[1][j * K + k];
        y[i * N + j] = s;
    }
    return M * N;
}
static void test_linear(void)
{
    int bias, type;
    for (bias = 0; bias < 2; bias++) {
        op_case c = new_case(bias ? "linear with bias" : "linear", build_linear, formula_linear), v = c;
        add_input(&c, ANY, 3, 3, 7, 29, 0); add_input(&c, ANY & ~RESHAPED, 2, 23, 29, 0, 0);
        if (bias) add_input(&c, SLICE_LAST, 1, 23, 0, 0, 0);
        run_case(&c, 2e-6, 3e-6);
        add_input(&v, PLAIN, 1, 29, 0, 0, 0); add_input(&v, SWAP_LAST, 2, 5, 29, 0, 0);       /* one row, as a vector */
        if (bias) add_input(&v, PLAIN, 1, 5, 0, 0, 0);
        run_case(&v, 2e-6, 3e-6);
    }
    for (type = 0; type < 4; type++) {                          /* frozen weights as files have them */
        static const mft_dtype types[4] = { MFT_F16, MFT_BF16, MFT_Q8_0, MFT_Q4_0 };
        op_case c = new_case(mft_dtype_name(types[type]), build_linear, formula_linear);
        add_input(&c, ANY, 2, 7, type < 2 ? 29 : 64, 0, 0);
        add_input(&c, FROZEN, 2, 23, type < 2 ? 29 : 64, 0, 0)->dtype = types[type];
        add_input(&c, PLAIN, 1, 23, 0, 0, 0);
        run_case(&c, 2e-6, 3e-6);
    }
}

/* y = x w^T + bias + scale (x a^T) b^T */
static mft_tensor *build_lora(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    return mft_lora_linear(ctx, in[0], in[1], c->n_in > 4 ? in[4] : NULL, in[2], in[3], (float)c->p[0], 0);
}
static int64_t formula_lora(const op_case *c, double *const *in, double *y)
{
    int64_t K = c->in[1].shape[1], N = c->in[1].shape[0], R = c->in[2].shape[0], M = c->in[0].n / K, i, j, k, r;
    double  u[64];
    for (i = 0; i < M; i++) {
        for (r = 0; r < R; r++) for (u[r] = 0, k = 0; k < K; k++) u[r] += in[0][i * K + k] * in[2][r * K + k];
        for (j = 0; j < N; j++) {
            double s = c->n_in > 4 ? in[4][j] : 0, low = 0;
            for (k = 0; k < K; k++) s += in[0][i * K + k] * in[1][j * K + k];
            for (r = 0; r < R; r++) low += u[r] * in[3][j * R + r];
            y[i * N + j] = s + c->p[0] * low;
        }
    }
    return M * N;
}
static void test_lora_linear(void)
{
    int bias;
    for (bias = 0; bias < 2; bias++) {
        op_case c = new_case(bias ? "lora_linear with bias" : "lora_linear", build_lora, formula_lora);
        c.p[0] = 1.5;
        add_input(&c, ANY, 3, 2, 7, 29, 0); add_input(&c, ANY & ~RESHAPED, 2, 23, 29, 0, 0);
        add_input(&c, SLICE_FIRST, 2, 3, 29, 0, 0); add_input(&c, SLICE_FIRST, 2, 23, 3, 0, 0);
        if (bias) add_input(&c, PLAIN, 1, 23, 0, 0, 0);
        run_case(&c, 2e-6, 4e-6);
    }
    {
        op_case c = new_case("lora_linear on BF16", build_lora, formula_lora);
        c.p[0] = 1.5;
        add_input(&c, ANY, 2, 7, 29, 0, 0); add_input(&c, FROZEN, 2, 23, 29, 0, 0)->dtype = MFT_BF16;
        add_input(&c, PLAIN, 2, 3, 29, 0, 0); add_input(&c, PLAIN, 2, 23, 3, 0, 0);
        run_case(&c, 2e-6, 4e-6);
    }
}

/* DoRA: the norm of w + scale b a is a constant: `values` has what it is made of */
static mft_tensor *build_dora(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    return mft_dora_linear(ctx, in[0], in[1], c->n_in > 5 ? in[5] : NULL, in[2], in[3], in[4], (float)c->p[0], 0);
}
static int64_t formula_dora(const op_case *c, double *const *in, double *y)
{
    int64_t K = c->in[1].shape[1], N = c->in[1].shape[0], R = c->in[2].shape[0], M = c->in[0].n / K, i, j, k, r;
    for (j = 0; j < N; j++) {
        double norm = 0;
        for (k = 0; k < K; k++) {
            double v = (double)c->values[1][j * K + k];
            for (r = 0; r < R; r++) v += c->p[0] * (double)c->values[3][j * R + r] * (double)c->values[2][r * K + k];
            norm += v * v;
        }
        for (i = 0; i < M; i++) {
            double s = 0;
            for (k = 0; k < K; k++) {
                double v = in[1][j * K + k];
                for (r = 0; r < R; r++) v += c->p[0] * in[3][j * R + r] * in[2][r * K + k];
                s += in[0][i * K + k] * v;
            }
            y[i * N + j] = in[4][j] / sqrt(norm) * s + (c->n_in > 5 ? in[5][j] : 0);
        }
    }
    return M * N;
}
static void test_dora_linear(void)
{
    int bias;
    for (bias = 0; bias < 2; bias++) {
        op_case c = new_case(bias ? "dora_linear with bias" : "dora_linear", build_dora, formula_dora);
        c.p[0] = 1.5; c.leaves = 320 + 5 * 71 * 4 + 1792 + 64;   /* 1 / norm, and what has no gradient before the first record */
        add_input(&c, ANY, 2, 5, 19, 0, 0); add_input(&c, SWAP_LAST | SLICE_FIRST, 2, 71, 19, 0, 0);       /* more rows than a piece of 64 */
        add_input(&c, PLAIN, 2, 3, 19, 0, 0); add_input(&c, PLAIN, 2, 71, 3, 0, 0); add_input(&c, PLAIN, 1, 71, 0, 0, 0)->shift = 2;
        if (bias) add_input(&c, PLAIN, 1, 71, 0, 0, 0);
        run_case(&c, 2e-6, 4e-6);
    }
}

/* ---- embedding ---- */
static mft_tensor *build_embedding(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_embedding(ctx, in[0], c->ids, c->k[0], c->k[1], (int32_t)c->k[2]); }
static int64_t formula_embedding(const op_case *c, double *const *in, double *y)
{
    int64_t i, j, H = c->in[0].shape[1];
    for (i = 0; i < c->k[0] * c->k[1]; i++) for (j = 0; j < H; j++)      /* the padding row's numbers are a constant */
        y[i * H + j] = c->ids[i] == c->k[2] ? (double)c->values[0][c->ids[i] * H + j] : in[0][c->ids[i] * H + j];
    return i * H;
}
static void test_embedding(void)
{
    static const int32_t ids[10] = { 3, 0, 3, 10, 3, 7, 10, 0, 2, 3 };
    int padding, type;
    for (padding = 0; padding < 2; padding++) {
        op_case c = new_case(padding ? "embedding with padding_idx" : "embedding", build_embedding, formula_embedding);
        c.ids = ids; c.k[0] = 2; c.k[1] = 5; c.k[2] = padding ? 3 : -1;
        add_input(&c, SLICE_FIRST | RESHAPED, 2, 11, 37, 0, 0);
        run_case(&c, 1e-7, 1e-6);
    }
    for (type = 0; type < 4; type++) {
        static const mft_dtype types[4] = { MFT_F16, MFT_BF16, MFT_Q8_0, MFT_Q4_0 };
        op_case c = new_case("embedding of a stored type", build_embedding, formula_embedding);
        c.ids = ids; c.k[0] = 2; c.k[1] = 5; c.k[2] = -1;
        add_input(&c, FROZEN, 2, 11, type < 2 ? 37 : 64, 0, 0)->dtype = types[type];
        run_case(&c, 1e-7, 1);
    }
}

/* ---- norms ---- */
static mft_tensor *build_layer_norm(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_layer_norm(ctx, in[0], in[1], c->n_in > 2 ? in[2] : NULL, (float)c->p[0]); }
static int64_t formula_layer_norm(const op_case *c, double *const *in, double *y)
{
    int64_t n = c->in[1].n, i, j;
    for (i = 0; i < c->in[0].n; i += n) {
        double mean = 0, var = 0;
        for (j = 0; j < n; j++) mean += in[0][i + j] / (double)n;
        for (j = 0; j < n; j++) var += (in[0][i + j] - mean) * (in[0][i + j] - mean) / (double)n;
        for (j = 0; j < n; j++) y[i + j] = (in[0][i + j] - mean) / sqrt(var + (double)(float)c->p[0]) * in[1][j] + (c->n_in > 2 ? in[2][j] : 0);
    }
    return i;
}
static mft_tensor *build_rms_norm(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_rms_norm(ctx, in[0], in[1], (float)c->p[1], (float)c->p[0]); }
static int64_t formula_rms_norm(const op_case *c, double *const *in, double *y)
{
    int64_t n = c->in[1].n, i, j;
    for (i = 0; i < c->in[0].n; i += n) {
        double ss = 0;
        for (j = 0; j < n; j++) ss += in[0][i + j] * in[0][i + j] / (double)n;
        for (j = 0; j < n; j++) y[i + j] = in[0][i + j] / sqrt(ss + (double)(float)c->p[0]) * (in[1][j] + c->p[1]);
    }
    return i;
}
static void test_norms(void)
{
    int which;
    for (which = 0; which < 6; which++) {
        op_case c;
        input  *x;
        if (which < 3) c = new_case(which == 1 ? "layer_norm without bias" : "layer_norm", build_layer_norm, formula_layer_norm);
        else           c = new_case(which == 4 ? "rms_norm with offset 1" : "rms_norm", build_rms_norm, formula_rms_norm);
        c.p[0] = 0.01; c.p[1] = which == 4; c.k[0] = which;
        x = add_input(&c, ANY, 3, 5, 7, 37, 0);                 /* 35 rows: more than two pieces of 16 */
        x->shift = 0.3;
        if (which == 2) { x->shift = 30; x->scale = 1; }        /* the mean far above the spread */
        if (which == 5) { x->scale = 0.01; x->shift = 0; }      /* eps weighs as much as the numbers */
        add_input(&c, PLAIN, 1, 37, 0, 0, 0)->shift = 1;
        if (which == 0 || which == 2) add_input(&c, PLAIN, 1, 37, 0, 0, 0);
        run_case(&c, which == 2 ? 1e-5 : 1e-6, which == 2 ? 1e-5 : 3e-6);
    }
}

/* ---- rope: the angle is rounded to float, as in Transformers ---- */
static mft_tensor *build_rope(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_rope(ctx, in[0], c->ids, c->table, (float)c->p[0]); }
static int64_t formula_rope(const op_case *c, double *const *in, double *y)
{
    int64_t B = c->in[0].shape[0], T = c->in[0].shape[1], h = c->in[0].shape[2], D = c->in[0].shape[3], i, j, k;
    for (i = 0; i < B * T; i++) for (j = 0; j < h; j++) for (k = 0; k < D / 2; k++) {
        volatile float angle = (float)(c->ids ? c->ids[i] : (int32_t)(i % T)) * c->table[k];
        double s = c->p[0] != 0 ? c->p[0] : 1, ca = s * cos((double)angle), sa = s * sin((double)angle);
        const double *x = in[0] + (i * h + j) * D;
        y[(i * h + j) * D + k]         = x[k] * ca - x[k + D / 2] * sa;
        y[(i * h + j) * D + k + D / 2] = x[k + D / 2] * ca + x[k] * sa;
    }
    return c->in[0].n;
}
static void test_rope(void)
{
    static const float   table[5] = { 1.0f, 0.3f, 0.07f, 0.011f, 0.0013f };
    static const int32_t positions[14] = { 0, 1, 2, 0, 1, 2, 3, 5, 100, 1000, 131071, 7, 7, 0 };
    int which;
    for (which = 0; which < 2; which++) {
        op_case c = new_case(which ? "rope at positions" : "rope", build_rope, formula_rope);
        c.table = table; c.ids = which ? positions : NULL; c.p[0] = which ? 1.25 : 0;
        add_input(&c, ROWS, 4, 2, 7, 3, 10);
        run_case(&c, 1e-6, 1e-6);
    }
}

/* ---- attention ---- */
static mft_tensor *build_attention(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    mft_attention_desc d;
    memset(&d, 0, sizeof d);
    d.scale = (float)c->p[0]; d.softcap = (float)c->p[1]; d.window = (int)c->k[0]; d.first_key = c->ids;
    return mft_attention(ctx, in[0], in[1], in[2], &d);
}

/* Weights of query (b, t, h) over the keys it sees; 0 keys: *first == *end. */
static void attention_weights(const op_case *c, double *const *in, int64_t b, int64_t t, int64_t h, double *w, double *slope, int64_t *first, int64_t *end)
{
    const input *q = &c->in[0], *k = &c->in[1];
    int64_t T = q->shape[1], S = k->shape[1], D = q->shape[3], kv = h / (q->shape[2] / k->shape[2]), s, i;
    double  scale = c->p[0] != 0 ? (double)(float)c->p[0] : 1 / sqrt((double)D), sum = 0, most = -1e300;
    *end = t + S - T + 1;
    *first = c->ids ? c->ids[b * T + t] : 0;
    if (c->k[0] > 0 && *end - c->k[0] > *first) *first = *end - c->k[0];
    if (*first > *end) *first = *end;
    for (s = *first; s < *end; s++) {
        double dot = 0;
        for (i = 0; i < D; i++) dot += in[0][((b * T + t) * q->shape[2] + h) * D + i] * in[1][((b * S + s) * k->shape[2] + kv) * D + i];
        dot *= scale; slope[s] = scale;
        if (c->p[1] > 0) { double u = tanh(dot / c->p[1]); dot = c->p[1] * u; slope[s] *= 1 - u * u; }
        w[s] = dot;
        if (dot > most) most = dot;
    }
    for (s = *first; s < *end; s++) sum += w[s] = exp(w[s] - most);
    for (s = *first; s < *end; s++) w[s] /= sum;
}

static int64_t formula_attention(const op_case *c, double *const *in, double *y)
{
    const input *q = &c->in[0], *k = &c->in[1];
    int64_t B = q->shape[0], T = q->shape[1], H = q->shape[2], D = q->shape[3], S = k->shape[1], b, t, h, s, i, first, end;
    double  w[512], slope[512];
    for (b = 0; b < B; b++) for (t = 0; t < T; t++) for (h = 0; h < H; h++) {
        double *o = y + ((b * T + t) * H + h) * D;
        attention_weights(c, in, b, t, h, w, slope, &first, &end);
        for (i = 0; i < D; i++) for (o[i] = 0, s = first; s < end; s++)
            o[i] += w[s] * in[2][((b * S + s) * k->shape[2] + h / (H / k->shape[2])) * D + i];
    }
    return q->n;
}

/* For sizes where differences take too long: dv = p do, ds = p (do v - sum p do v), and so on; checked against
 * differences by the small cases, which run both (test_attention_oracle). */
static void derivative_attention(const op_case *c, double *const *in, const double *dy, double **d)
{
    const input *q = &c->in[0], *k = &c->in[1];
    int64_t B = q->shape[0], T = q->shape[1], H = q->shape[2], D = q->shape[3], S = k->shape[1], b, t, h, s, i, first, end;
    double  w[512], slope[512], dw[512];
    for (b = 0; b < B; b++) for (t = 0; t < T; t++) for (h = 0; h < H; h++) {
        int64_t qi = ((b * T + t) * H + h) * D;
        double  mean = 0;
        attention_weights(c, in, b, t, h, w, slope, &first, &end);
        for (s = first; s < end; s++) {
            int64_t ki = ((b * S + s) * k->shape[2] + h / (H / k->shape[2])) * D;
            for (dw[s] = 0, i = 0; i < D; i++) { dw[s] += dy[qi + i] * in[2][ki + i]; d[2][ki + i] += w[s] * dy[qi + i]; }
            mean += w[s] * dw[s];
        }
        for (s = first; s < end; s++) {
            int64_t ki = ((b * S + s) * k->shape[2] + h / (H / k->shape[2])) * D;
            double  ds = w[s] * (dw[s] - mean) * slope[s];
            for (i = 0; i < D; i++) { d[0][qi + i] += ds * in[1][ki + i]; d[1][ki + i] += ds * in[0][qi + i]; }
        }
    }
}

static op_case attention_case(const char *name, int64_t B, int64_t T, int64_t S, int64_t H, int64_t KV, int64_t D, double scale, double softcap, int window, const int32_t *first_key)
{
    op_case c = new_case(name, build_attention, formula_attention);
    add_input(&c, ROWS, 4, B, T, H, D)->scale = 2;
    add_input(&c, ROWS, 4, B, S, KV, D)->scale = 2;
    add_input(&c, ROWS, 4, B, S, KV, D);
    c.p[0] = scale; c.p[1] = softcap; c.k[0] = window; c.ids = first_key;
    return c;
}

static const int32_t attention_documents[18] = { 0, 0, 0, 3, 3, 3, 3, 7, 7,    0, 1, 2, 2, 2, 2, 2, 7, 8 };
static const int32_t attention_padding  [18] = { 4, 4, 4, 4, 4, 4, 4, 4, 4,    9, 9, 9, 9, 9, 9, 9, 9, 9 };     /* rows with no key at all */

static void test_attention(void)
{
    op_case c;
    c = attention_case("attention, one head",            2, 9, 9, 1, 1, 5, 0, 0, 0, NULL);                  run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, heads",               2, 9, 9, 3, 3, 5, 0.7, 0, 0, NULL);                run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, grouped",             2, 9, 9, 6, 2, 5, 0, 0, 0, NULL);                  run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, one key head, D 18",  1, 9, 9, 5, 1, 18, 0, 0, 0, NULL);                 run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, window 1",            1, 9, 9, 2, 1, 5, 0, 0, 1, NULL);                  run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, window 4",            2, 9, 9, 4, 2, 5, 0, 0, 4, NULL);                  run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, window above T",      1, 9, 9, 2, 2, 5, 0, 0, 50, NULL);                 run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, softcap",             1, 9, 9, 2, 1, 5, 1.3, 1.7, 0, NULL);              run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, softcap and window",  1, 9, 9, 2, 1, 5, 1.3, 1.7, 3, NULL);              run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, documents",           2, 9, 9, 2, 1, 5, 0, 0, 0, attention_documents);   run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, documents, window",   2, 9, 9, 2, 1, 5, 0, 0, 3, attention_documents);   run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, left padding",        2, 9, 9, 2, 1, 5, 0, 0, 0, attention_padding);     run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, earlier keys",        2, 3, 11, 4, 2, 5, 0, 0, 0, NULL);                 run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, earlier keys, window",1, 3, 11, 4, 2, 5, 0, 0, 5, NULL);                 run_case(&c, 2e-6, 5e-6);
    c = attention_case("attention, one query",           1, 1, 13, 4, 2, 7, 0, 0, 0, NULL);                 run_case(&c, 2e-6, 5e-6);
}

/* A NaN or an infinity among queries, keys or values reaches what depends on it, and nothing else: not the queries
 * that do not see the key, though they are computed beside those that do. */
enum { BAD_T = 150, BAD_D = 33 };
static int bad_sees(int64_t t, int64_t s, int window, const int32_t *first_key) { return s <= t && (!window || s > t - window) && (!first_key || s >= first_key[t]); }

static int64_t bad_numbers(mft_context *ctx, int part, int at, float bad, int window, const int32_t *first_key)
{
    mft_tensor *in[3], *y;
    mft_attention_desc d;
    int64_t     shape[4] = { 1, BAD_T, 2, BAD_D }, wrong = 0, t, s, i, n;
    uint32_t    seed = 5;
    int         p;
    memset(&d, 0, sizeof d);
    d.window = window; d.first_key = first_key;
    for (p = 0; p < 3; p++) {
        shape[2] = p ? 1 : 2;
        in[p] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 4, shape);
        n = shape[2] * BAD_D;
        for (i = 0; i < BAD_T * n; i++) ((float *)in[p]->data)[i] = test_random(&seed);
        for (i = 0; p == part && i < n; i++) ((float *)in[p]->data)[at * n + i] = bad;
        in[p]->trainable = 1;
    }
    y = mft_attention(ctx, in[0], in[1], in[2], &d);
    for (t = 0; t < BAD_T; t++) for (i = 0; i < 2 * BAD_D; i++) {
        float v = ((float *)y->data)[t * 2 * BAD_D + i];
        wrong += (v - v != 0) != (part ? bad_sees(t, at, window, first_key) : t == at);
    }
    CHECK(mft_backward(ctx, mft_sum(ctx, y)) == MFT_OK);
    for (t = 0; t < BAD_T; t++) for (i = 0; i < 2 * BAD_D; i++) {
        float v = ((float *)in[0]->grad->data)[t * 2 * BAD_D + i];
        wrong += (v - v != 0) != (part ? bad_sees(t, at, window, first_key) : t == at);
    }
    for (p = 1; p < 3; p++) for (s = 0; s < BAD_T; s++) {
        int depends = part == 0 && bad_sees(at, s, window, first_key);
        for (t = 0; t < BAD_T; t++) depends |= part && !(part == 2 && p == 2) && bad_sees(t, s, window, first_key) && bad_sees(t, at, window, first_key);
        for (i = 0; i < BAD_D; i++) {
            float v = ((float *)in[p]->grad->data)[s * BAD_D + i];
            wrong += (v - v != 0) != depends;
        }
    }
    mft_step_reset(ctx);
    for (p = 0; p < 3; p++) mft_tensor_destroy(ctx, in[p]);
    return wrong;
}

static mft_context *row_context(const char *row)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    memset(&d, 0, sizeof d);
    d.kernels = row; d.n_threads = 1;
    CHECK(mft_context_create(&d, &ctx) == MFT_OK);
    return ctx;
}

static void test_attention_not_finite(void)
{
    const char *row;
    int         r, part, at, kind;
    int32_t     documents[BAD_T];
    for (r = 0; r < BAD_T; r++) documents[r] = r < 70 ? 0 : r < 131 ? 70 : 131;
    for (r = 0; (row = mft_kernels_available(r)) != NULL; r++) {
        mft_context *ctx = row_context(row);
        for (part = 0; part < 3; part++) for (at = 3; at < BAD_T; at += 71) for (kind = 0; kind < 3; kind++) {
            int64_t wrong = bad_numbers(ctx, part, at, NAN, kind == 1 ? 40 : 0, kind == 2 ? documents : NULL);
            CHECK_MSG(wrong == 0, "%s: NaN in %c at %d, kind %d: %d numbers", row, "qkv"[part], at, kind, (int)wrong);
        }
        mft_context_destroy(ctx);
    }
}

/* Infinite scores, by the formula in double: minus infinity is a key that is not seen, a tile of nothing else as well;
 * infinity (or nothing but minus infinity) is a quotient that is no number; with a softcap each is the cap, a number. */
static int64_t bad_scores(mft_context *ctx, int keys, float bad, float softcap, int window)
{
    mft_tensor *in[3], *y;
    mft_attention_desc d;
    int64_t     shape[4] = { 1, BAD_T, 1, BAD_D }, wrong = 0, t, s, i;
    uint32_t    seed = 6;
    int         p;
    memset(&d, 0, sizeof d);
    d.window = window; d.softcap = softcap;
    for (p = 0; p < 3; p++) {
        in[p] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 4, shape);
        for (i = 0; i < BAD_T * BAD_D; i++) ((float *)in[p]->data)[i] = test_random(&seed);
    }
    for (s = 0; s < keys; s++) ((float *)in[1]->data)[s * BAD_D] = bad;
    y = mft_attention(ctx, in[0], in[1], in[2], &d);
    for (t = 0; y && t < BAD_T; t++) {
        double score[BAD_T], most = -HUGE_VAL, sum = 0, out[BAD_D] = { 0 };
        for (s = 0; s <= t; s++) {
            if (!bad_sees(t, s, window, NULL)) continue;
            for (score[s] = i = 0; i < BAD_D; i++) score[s] += (double)((float *)in[0]->data)[t * BAD_D + i] * ((float *)in[1]->data)[s * BAD_D + i];
            score[s] /= sqrt(BAD_D);
            if (softcap > 0) score[s] = softcap * tanh(score[s] / softcap);
            if (score[s] > most) most = score[s];
        }
        for (s = 0; s <= t; s++) {
            if (!bad_sees(t, s, window, NULL)) continue;
            score[s] = exp(score[s] - most);
            sum += score[s];
            for (i = 0; i < BAD_D; i++) out[i] += score[s] * ((float *)in[2]->data)[s * BAD_D + i];
        }
        for (i = 0; i < BAD_D; i++) {
            float v = ((float *)y->data)[t * BAD_D + i];
            wrong += sum - sum != 0 ? v - v == 0 : !(fabs(v - out[i] / sum) < 2e-6);        /* as test_attention; seen: 2.2e-7 */
        }
    }
    mft_step_reset(ctx);
    for (p = 0; p < 3; p++) mft_tensor_destroy(ctx, in[p]);
    return y ? wrong : -1;
}

static void test_attention_infinite_scores(void)
{
    static const int keys[] = { 1, 40, 101 };
    const char *row;
    int         r, k, kind;
    for (r = 0; (row = mft_kernels_available(r)) != NULL; r++) {
        mft_context *ctx = row_context(row);
        for (k = 0; k < 3; k++) for (kind = 0; kind < 8; kind++) {
            int64_t wrong = bad_scores(ctx, keys[k], kind & 1 ? -INFINITY : INFINITY, kind & 2 ? 3.0f : 0, kind & 4 ? 70 : 0);
            CHECK_MSG(wrong == 0, "%s: %d keys, kind %d: %d numbers", row, keys[k], kind, (int)wrong);
        }
        mft_context_destroy(ctx);
    }
}

/* The formulas of derivative_attention against differences, without the library. */
static void test_attention_oracle(void)
{
    op_case  c = attention_case("", 2, 5, 7, 4, 2, 3, 0.9, 1.9, 4, NULL);
    double  *d[3], *num, dy[2 * 5 * 4 * 3], y[2 * 5 * 4 * 3], worst = 0;
    uint32_t seed = 3;
    int64_t  i, k;
    for (k = 0; k < 3; k++) {
        c.base[k] = (double *)malloc((size_t)c.in[k].n * sizeof(double));
        d[k] = (double *)calloc((size_t)c.in[k].n, sizeof(double));
        for (i = 0; i < c.in[k].n; i++) c.base[k][i] = test_random(&seed);
    }
    for (i = 0; i < 120; i++) dy[i] = test_random(&seed);
    derivative_attention(&c, c.base, dy, d);
    for (k = 0; k < 3; k++) {
        num = (double *)malloc((size_t)c.in[k].n * sizeof(double));
        expected_gradient(&c, (int)k, dy, y, num);
        for (i = 0; i < c.in[k].n; i++) worst_of(&worst, d[k][i], num[i], greatest(num, c.in[k].n));
        free(num);
    }
    for (k = 0; k < 3; k++) { free(d[k]); free(c.base[k]); }
    CHECK_MSG(worst < 1e-8, "%.3g", worst);                     /* seen 3e-10 */
}

/* Beyond a tile of keys. */
static void test_attention_long(void)
{
    static int32_t documents[300];
    op_case c;
    int     i;
    for (i = 0; i < 300; i++) documents[i] = i < 131 ? 0 : i < 140 ? 131 : 140;
    c = attention_case("attention, 300 keys",            1, 300, 300, 2, 1, 7, 0, 0, 0, NULL);       c.derivative = derivative_attention; c.quick = 1; run_case(&c, 3e-6, 1e-5);
    c = attention_case("attention, 300 keys, window",    1, 300, 300, 2, 2, 7, 0, 0, 149, NULL);     c.derivative = derivative_attention; c.quick = 1; run_case(&c, 3e-6, 1e-5);
    c = attention_case("attention, 300 keys, documents", 1, 300, 300, 2, 1, 7, 0, 2.5, 0, documents); c.derivative = derivative_attention; c.quick = 1; run_case(&c, 3e-6, 1e-5);
    c = attention_case("attention, 37 of 300 keys",      1, 37, 300, 2, 1, 33, 0, 0, 0, NULL);       c.derivative = derivative_attention; c.quick = 1; run_case(&c, 3e-6, 1e-5);
    c = attention_case("attention, 90 queries of a group", 2, 90, 101, 6, 2, 20, 0, 0, 40, NULL);    c.derivative = derivative_attention; c.quick = 1; run_case(&c, 3e-6, 1e-5);
    c = attention_case("attention, D 300",               1, 75, 75, 2, 1, 300, 0, 0, 0, NULL);       c.derivative = derivative_attention; c.quick = 1; run_case(&c, 5e-6, 2e-5);
    c = attention_case("attention, scores to 60",        1, 160, 160, 2, 1, 7, 8, 0, 0, NULL);       c.derivative = derivative_attention; c.quick = 1; run_case(&c, 1e-5, 5e-5);
}

/* q, k and v as slices of one tensor, as GPT-2 has them; also the same numbers for all three. */
static mft_tensor *build_fused(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    if (c->k[1]) return mft_attention(ctx, in[0], in[0], in[0], NULL);
    return mft_attention(ctx, mft_slice(ctx, in[0], 2, 0, 2), mft_slice(ctx, in[0], 2, 2, 3), mft_slice(ctx, in[0], 2, 3, 4), NULL);
}
static int64_t formula_fused(const op_case *c, double *const *in, double *y)
{
    double  q[2 * 6 * 4 * 5], k[2 * 6 * 4 * 5], v[2 * 6 * 4 * 5], *parts[3];
    op_case a = attention_case("", 2, 6, 6, c->k[1] ? 4 : 2, c->k[1] ? 4 : 1, 5, 0, 0, 0, NULL);
    int64_t t, i;
    parts[0] = q; parts[1] = k; parts[2] = v;
    for (t = 0; t < 12; t++) for (i = 0; i < 20; i++) {
        if (c->k[1]) q[t * 20 + i] = k[t * 20 + i] = v[t * 20 + i] = in[0][t * 20 + i];
        else if (i < 10) q[t * 10 + i] = in[0][t * 20 + i];
        else if (i < 15) k[t * 5 + i - 10] = in[0][t * 20 + i];
        else             v[t * 5 + i - 15] = in[0][t * 20 + i];
    }
    return formula_attention(&a, parts, y);
}
static void test_attention_fused(void)
{
    int same;
    for (same = 0; same < 2; same++) {
        op_case c = new_case(same ? "attention of x, x, x" : "attention of a fused qkv", build_fused, formula_fused);
        c.k[1] = same;
        add_input(&c, ROWS, 4, 2, 6, 4, 5);
        run_case(&c, 2e-6, 5e-6);
    }
}

/* ---- losses ---- */
static mft_tensor *build_cross_entropy(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_cross_entropy(ctx, in[0], c->ids, c->k[0]); }
static int64_t formula_cross_entropy(const op_case *c, double *const *in, double *y)
{
    int64_t V = c->in[0].shape[c->in[0].ndim - 1], i, j, n = 0;
    double  total = 0;
    for (i = 0; i < c->in[0].n / V; i++) {
        const double *x = in[0] + i * V;
        double most = -1e300, sum = 0;
        if (c->ids[i] == -100) continue;
        n++;
        for (j = 0; j < V; j++) if (x[j] > most) most = x[j];
        for (j = 0; j < V; j++) sum += exp(x[j] - most);
        total += most + log(sum) - x[c->ids[i]];
    }
    y[0] = total / (double)(c->k[0] ? c->k[0] : n);
    return 1;
}
static void test_cross_entropy(void)
{
    static const int32_t labels[6] = { 0, -100, 268, 5, -100, 5 };
    int which;
    for (which = 0; which < 3; which++) {
        op_case c = new_case(which == 2 ? "cross_entropy, logits to 80" : which ? "cross_entropy, n_valid 9" : "cross_entropy", build_cross_entropy, formula_cross_entropy);
        c.ids = labels; c.k[0] = which == 1 ? 9 : 0;
        add_input(&c, ANY, 3, 2, 3, 269, 0)->scale = which == 2 ? 80 : 3;       /* more than a piece of 256 */
        run_case(&c, 1e-6, 1e-6);                               /* lse rounded to one float: 1.2e-6 at logits to 80 */
    }
}

/* The fused one: k[0] n_valid, p[0] softcap. */
static mft_tensor *build_head(mft_context *ctx, mft_tensor **in, const op_case *c) { return mft_linear_cross_entropy(ctx, in[0], in[1], c->ids, c->k[0], (float)c->p[0]); }

static double head_row(const op_case *c, double *const *in, int64_t row, double *logits)      /* returns lse */
{
    int64_t H = c->in[1].shape[1], V = c->in[1].shape[0], j, k;
    double  most = -1e300, sum = 0;
    for (j = 0; j < V; j++) {
        double s = 0;
        for (k = 0; k < H; k++) s += in[0][row * H + k] * in[1][j * H + k];
        logits[j] = c->p[0] > 0 ? c->p[0] * tanh(s / c->p[0]) : s;
        if (logits[j] > most) most = logits[j];
    }
    for (j = 0; j < V; j++) sum += exp(logits[j] - most);
    return most + log(sum);
}
static double head_count(const op_case *c)
{
    int64_t i, n = 0;
    for (i = 0; i < c->in[0].n / c->in[1].shape[1]; i++) n += c->ids[i] != -100;
    return (double)(c->k[0] ? c->k[0] : n);
}
static int64_t formula_head(const op_case *c, double *const *in, double *y)
{
    static double logits[8192];
    int64_t i;
    y[0] = 0;
    for (i = 0; i < c->in[0].n / c->in[1].shape[1]; i++) {
        double lse;
        if (c->ids[i] == -100) continue;
        lse = head_row(c, in, i, logits);
        y[0] += (lse - logits[c->ids[i]]) / head_count(c);
    }
    return 1;
}
static void derivative_head(const op_case *c, double *const *in, const double *dy, double **d)
{
    static double logits[8192];
    int64_t H = c->in[1].shape[1], V = c->in[1].shape[0], i, j, k;
    for (i = 0; i < c->in[0].n / H; i++) {
        double lse;
        if (c->ids[i] == -100) continue;
        lse = head_row(c, in, i, logits);
        for (j = 0; j < V; j++) {
            double g = dy[0] * (exp(logits[j] - lse) - (j == c->ids[i])) / head_count(c);
            if (c->p[0] > 0) g *= 1 - logits[j] * logits[j] / (c->p[0] * c->p[0]);
            for (k = 0; k < H; k++) { d[0][i * H + k] += g * in[1][j * H + k]; d[1][j * H + k] += g * in[0][i * H + k]; }
        }
    }
}

static void head_labels(int32_t *labels, int64_t n, int64_t vocab, int ignored)      /* the edges of every tile among them */
{
    static const int32_t edges[6] = { 0, 2047, 2048, 4095, 4096, 5000 };
    uint32_t seed = 11;
    int64_t  i;
    for (i = 0; i < n; i++) {
        labels[i] = i < 6 ? edges[i] : (int32_t)((test_random(&seed) + 1) / 2 * (float)vocab);
        if (labels[i] >= vocab) labels[i] = (int32_t)vocab - 1;
        if (ignored && i % ignored == ignored - 1) labels[i] = -100;
    }
}

static void test_linear_cross_entropy(void)
{
    static int32_t labels[521];
    int which;
    for (which = 0; which < 6; which++) {                       /* small: differences, every layout */
        static const mft_dtype types[6] = { MFT_F32, MFT_F32, MFT_F32, MFT_F16, MFT_BF16, MFT_Q8_0 };
        op_case c = new_case(which == 1 ? "linear_cross_entropy, softcap" : which == 2 ? "linear_cross_entropy, n_valid" : "linear_cross_entropy", build_head, formula_head);
        head_labels(labels, 15, 37, 4);
        c.ids = labels; c.p[0] = which == 1 ? 1.5 : 0; c.k[0] = which == 2 ? 23 : 0;
        add_input(&c, ANY, 3, 3, 5, which == 5 ? 32 : 19, 0);
        add_input(&c, which > 2 ? FROZEN : SLICE_FIRST | SLICE_LAST, 2, 37, which == 5 ? 32 : 19, 0, 0)->dtype = types[which];
        run_case(&c, 2e-6, 5e-6);
    }
    for (which = 0; which < 4; which++) {                       /* beyond one tile of 512 rows x 2048 tokens, both ways */
        static const char *const names[4] = { "linear_cross_entropy, 521 x 5001", "linear_cross_entropy, 521 x 5001, softcap",
                                              "linear_cross_entropy, 521 x 5001, all count", "linear_cross_entropy, 521 x 5001, BF16" };
        op_case c = new_case(names[which], build_head, formula_head);
        head_labels(labels, 521, 5001, which == 2 ? 0 : 9);
        c.ids = labels; c.p[0] = which == 1 ? 2.0 : 0; c.k[0] = which == 1 ? 1000 : 0;
        c.derivative = derivative_head; c.quick = 1;
        add_input(&c, PLAIN, 2, 521, 7, 0, 0)->scale = 2;
        add_input(&c, which == 3 ? FROZEN : PLAIN, 2, 5001, 7, 0, 0)->dtype = which == 3 ? MFT_BF16 : MFT_F32;
        run_case(&c, 2e-6, 1e-5);
    }
}

/* The head tied to the embedding: two ops add into one gradient. */
static mft_tensor *build_tied(mft_context *ctx, mft_tensor **in, const op_case *c)
{
    return mft_linear_cross_entropy(ctx, mft_embedding(ctx, in[0], c->ids, 1, 5, -1), in[0], c->ids + 1, 0, 0);
}
static int64_t formula_tied(const op_case *c, double *const *in, double *y)
{
    double  x[5 * 7], *parts[2];
    op_case h = new_case("", NULL, NULL);
    int     i;
    for (i = 0; i < 35; i++) x[i] = in[0][c->ids[i / 7] * 7 + i % 7];
    parts[0] = x; parts[1] = in[0];
    add_input(&h, 0, 2, 5, 7, 0, 0); add_input(&h, 0, 2, 11, 7, 0, 0);
    h.ids = c->ids + 1;
    return formula_head(&h, parts, y);
}
static void test_tied_head(void)
{
    static const int32_t ids[6] = { 4, 10, 4, 0, 7, 2 };
    op_case c = new_case("tied embedding and head", build_tied, formula_tied);
    c.ids = ids;
    add_input(&c, SLICE_FIRST, 2, 11, 7, 0, 0);
    run_case(&c, 2e-6, 5e-6);
}

/* ---- dropout ---- */
static void test_dropout(void)
{
    enum { N = 20011 };
    static float first[N];
    const char *name;
    int64_t     n = N, i;
    int         row;
    for (row = 0; (name = mft_kernels_available(row)) != NULL; row++) {
        mft_context_desc d;
        mft_context *ctx;
        mft_tensor  *x, *y, *z;
        int          kept = 0, both = 0, was;
        memset(&d, 0, sizeof d);
        d.kernels = name; d.seed = 42; d.n_threads = 3;
        CHECK(mft_context_create(&d, &ctx) == MFT_OK);
        x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, &n);
        for (i = 0; i < N; i++) ((float *)x->data)[i] = (float)(i + 1);
        x->trainable = 1;
        y = mft_dropout(ctx, x, 0.3f);
        z = mft_dropout(ctx, x, 0.3f);
        CHECK(y && z);
        if (!y || !z) return;
        for (i = 0; i < N; i++) {
            float f = ((float *)y->data)[i];
            CHECK(f == 0 || fabs(f / ((double)(i + 1) / 0.7) - 1) < 2e-7);
            kept += f != 0; both += f != 0 && ((float *)z->data)[i] != 0;
            if (row == 0) first[i] = f;
            CHECK(f == first[i]);                               /* the same seed draws the same, on every row */
        }
        CHECK_MSG(abs(kept - (int)(0.7 * N)) < 260, "%d of %d kept", kept, (int)N);             /* 4 sigma */
        CHECK_MSG(abs(both - (int)(0.49 * N)) < 285, "%d kept by two calls", both);             /* independent draws */
        CHECK(mft_backward(ctx, mft_sum(ctx, y)) == MFT_OK);
        for (i = 0; i < N; i++) CHECK(fabs(((float *)x->grad->data)[i] - (first[i] != 0 ? 1 / 0.7 : 0)) < 3e-7);
        mft_step_reset(ctx);
        y = mft_dropout(ctx, x, 0.3f);                          /* another step, other draws */
        for (i = both = 0; i < N; i++) both += first[i] != 0 && ((float *)y->data)[i] != 0;
        CHECK_MSG(abs(both - (int)(0.49 * N)) < 285, "%d kept by two steps", both);
        CHECK(mft_dropout(ctx, x, 0) == x);
        was = mft_grad_enable(ctx, 0);
        CHECK(mft_dropout(ctx, x, 0.5f) == x);
        mft_grad_enable(ctx, was);
        CHECK(mft_dropout(ctx, x, 1) == NULL && mft_backward(ctx, NULL) == MFT_ERR_INVALID_ARGUMENT);
        mft_step_reset(ctx);
        CHECK(mft_dropout(ctx, x, -0.1f) == NULL);
        mft_step_reset(ctx);
        CHECK(mft_dropout(ctx, x, (float)NAN) == NULL);
        mft_context_destroy(ctx);
    }
}

/* lora_linear and dora_linear with dropout: the mask is found by dropping a tensor of ones first in a twin
 * context, which draws the same; then the ops without dropout on the masked input must agree. */
static void test_adapter_dropout(void)
{
    int64_t sx[2] = { 9, 13 }, sw[2] = { 11, 13 }, sa[2] = { 3, 13 }, sb[2] = { 11, 3 }, sm[1] = { 11 };
    const char *name;
    int     row, dora, i, k;
    for (row = 0; (name = mft_kernels_available(row)) != NULL; row++) for (dora = 0; dora < 2; dora++) {
        mft_context_desc d;
        mft_context *ctx, *twin;
        mft_tensor  *t[2][5], *y, *z, *mask, *xm;
        double       worst = 0;
        memset(&d, 0, sizeof d);
        d.kernels = name; d.seed = 7;
        CHECK(mft_context_create(&d, &ctx) == MFT_OK && mft_context_create(&d, &twin) == MFT_OK);
        for (k = 0; k < 2; k++) {
            mft_context *c = k ? twin : ctx;
            uint32_t     seed = 9;
            int          j;
            t[k][0] = mft_tensor_create(c, MFT_HELD, MFT_F32, 2, sx); t[k][1] = mft_tensor_create(c, MFT_HELD, MFT_F32, 2, sw);
            t[k][2] = mft_tensor_create(c, MFT_HELD, MFT_F32, 2, sa); t[k][3] = mft_tensor_create(c, MFT_HELD, MFT_F32, 2, sb);
            t[k][4] = mft_tensor_create(c, MFT_HELD, MFT_F32, 1, sm);
            for (j = 0; j < 5; j++) {
                for (i = 0; i < (int)mft_tensor_numel(t[k][j]); i++) ((float *)t[k][j]->data)[i] = test_random(&seed);
                t[k][j]->trainable = j != 1;
            }
        }
        y = dora ? mft_dora_linear(ctx, t[0][0], t[0][1], NULL, t[0][2], t[0][3], t[0][4], 2, 0.4f)
                 : mft_lora_linear(ctx, t[0][0], t[0][1], NULL, t[0][2], t[0][3], 2, 0.4f);
        CHECK(mft_backward(ctx, mft_sum(ctx, mft_mul(ctx, y, y))) == MFT_OK);
        mask = mft_tensor_create(twin, MFT_STEP, MFT_F32, 2, sx);
        for (i = 0; i < 9 * 13; i++) ((float *)mask->data)[i] = 1;
        mask = mft_dropout(twin, mask, 0.4f);
        xm = mft_mul(twin, t[1][0], mask);
        if (dora) {        /* m/n (xm w^T + scale xm a^T b^T) + (x - xm) w^T, as PEFT computes it */
            z = mft_dora_linear(twin, xm, t[1][1], NULL, t[1][2], t[1][3], t[1][4], 2, 0);
            z = mft_add(twin, z, mft_linear(twin, mft_sub(twin, t[1][0], xm), t[1][1], NULL));
        } else             /* x w^T + scale xm a^T b^T */
            z = mft_add(twin, mft_linear(twin, t[1][0], t[1][1], NULL),
                        mft_scale(twin, mft_linear(twin, mft_linear(twin, xm, t[1][2], NULL), t[1][3], NULL), 2));
        CHECK(mft_backward(twin, mft_sum(twin, mft_mul(twin, z, z))) == MFT_OK);
        for (k = 0; k < 5; k++) {
            if (!t[1][k]->grad || !t[0][k]->grad) { CHECK(!t[0][k]->grad && !t[1][k]->grad); continue; }
            for (i = 0; i < (int)mft_tensor_numel(t[0][k]); i++)
                worst_of(&worst, ((float *)t[0][k]->grad->data)[i], ((float *)t[1][k]->grad->data)[i], 1);
        }
        CHECK_MSG(worst < 1e-3, "row %s, %s: %.3g", name, dora ? "dora" : "lora", worst);   /* gradients to 400; seen 6e-5, another mask: 100 */
        mft_context_destroy(ctx); mft_context_destroy(twin);
    }
}

/* ---- more elements than a piece of work, any number of threads: the same bits ---- */
static void test_threads_same_bits(void)
{
    static float results[5];
    int64_t sx[2] = { 131, 1031 }, sw[2] = { 68, 1031 }, sv[1] = { 1031 }, heads[4] = { 1, 131, 4, 17 };
    int     threads, i, k, row;
    const char *name;
    for (row = 0; (name = mft_kernels_available(row)) != NULL; row++) {
        uint64_t hash[6] = { 0, 0, 0, 0, 0, 0 };
        for (threads = 1; threads <= 5; threads += threads == 3 ? 2 : 1) {
            mft_context_desc d;
            mft_context *ctx;
            mft_tensor  *x, *w, *v, *y;
            uint32_t     seed = 1;
            memset(&d, 0, sizeof d);
            d.kernels = name; d.n_threads = threads;
            CHECK(mft_context_create(&d, &ctx) == MFT_OK);
            x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, sx); w = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, sw); v = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, sv);
            for (i = 0; i < 131 * 1031; i++) ((float *)x->data)[i] = test_random(&seed);
            for (i = 0; i < 68 * 1031; i++) ((float *)w->data)[i] = test_random(&seed) * 0.1f;
            for (i = 0; i < 1031; i++) ((float *)v->data)[i] = test_random(&seed);
            x->trainable = w->trainable = v->trainable = 1;
            y = mft_linear(ctx, mft_dropout(ctx, mft_silu(ctx, mft_rms_norm(ctx, mft_add(ctx, x, v), v, 0, 1e-6f)), 0.1f), w, NULL);
            y = mft_reshape(ctx, y, 4, heads);
            y = mft_attention(ctx, y, mft_slice(ctx, y, 2, 0, 2), mft_slice(ctx, y, 2, 2, 4), NULL);
            y = mft_mean(ctx, mft_mul(ctx, mft_softmax(ctx, y), y));
            CHECK(mft_backward(ctx, y) == MFT_OK);
            results[threads - 1] = mft_tensor_item(y);
            for (k = 0; k < 3; k++) {
                mft_tensor *g = k == 0 ? x : k == 1 ? w : v;
                for (i = 0; i < (int)mft_tensor_numel(g); i++) hash[threads] = hash[threads] * 1099511628211u + mft__float_to_bits(((float *)g->grad->data)[i]);
            }
            CHECK(hash[threads] == hash[1] && memcmp(&results[0], &results[threads - 1], 4) == 0);
            mft_context_destroy(ctx);
        }
    }
}

/* ---- what ops refuse, and how they say it ---- */
static void refused(mft_context *ctx, mft_tensor *y, const char *says)
{
    CHECK_MSG(y == NULL, "%s", says);
    CHECK(mft_backward(ctx, y) == MFT_ERR_INVALID_ARGUMENT);
    CHECK_MSG(strstr(mft_error_message(ctx), says) != NULL, "\"%s\" not in \"%s\"", says, mft_error_message(ctx));
    mft_step_reset(ctx);
}

static void test_refusals(void)
{
    mft_context *ctx;
    mft_tensor  *a, *b, *v, *i32, *bf, *q, *k;
    int64_t      s[4] = { 3, 5, 7, 2 }, t[4] = { 5, 3, 7, 2 }, v4[1] = { 4 };
    int32_t      ids[3] = { 0, 2, 3 }, bad[3] = { 0, -1, 2 };
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    a = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s); b = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, t);
    v = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, v4); i32 = mft_tensor_create(ctx, MFT_HELD, MFT_I32, 2, s);
    bf = mft_tensor_create(ctx, MFT_HELD, MFT_BF16, 2, s);
    q = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 4, s); k = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 4, t);
    CHECK(a && b && v && i32 && bf && q && k);
    refused(ctx, mft_add(ctx, a, b), "mft_add: [3, 5] and [5, 3]");
    refused(ctx, mft_add(ctx, a, v), "mft_add: [3, 5] and [4]");
    refused(ctx, mft_mul(ctx, v, a), "mft_mul: [4] and [3, 5]");
    refused(ctx, mft_sub(ctx, a, i32), "mft_sub");
    refused(ctx, mft_silu(ctx, i32), "mft_silu: it does not take I32 [3, 5]");
    refused(ctx, mft_swiglu(ctx, a, b), "mft_swiglu");
    refused(ctx, mft_softcap(ctx, a, 0), "mft_softcap");
    refused(ctx, mft_matmul(ctx, a, a), "mft_matmul: [3, 5] and [3, 5]");
    refused(ctx, mft_linear(ctx, a, b, NULL), "mft_linear: [3, 5] and [5, 3]");
    refused(ctx, mft_linear(ctx, a, a, v), "mft_linear: [3, 5] and [4]");
    refused(ctx, mft_lora_linear(ctx, a, a, NULL, b, b, 1, 0), "mft_lora_linear");
    refused(ctx, mft_lora_linear(ctx, a, a, NULL, a, a, 1, 0), "mft_lora_linear");
    refused(ctx, mft_layer_norm(ctx, a, v, NULL, 1e-5f), "mft_layer_norm");
    refused(ctx, mft_rms_norm(ctx, a, v, 0, 1e-5f), "mft_rms_norm");
    refused(ctx, mft_rope(ctx, a, NULL, (const float *)a->data, 0), "mft_rope");
    refused(ctx, mft_attention(ctx, q, k, k, NULL), "mft_attention");
    refused(ctx, mft_attention(ctx, q, q, k, NULL), "mft_attention");
    refused(ctx, mft_reshape(ctx, a, 1, s), "mft_reshape");
    refused(ctx, mft_transpose(ctx, a, 0, 2), "mft_transpose");
    refused(ctx, mft_slice(ctx, a, 1, 3, 3), "mft_slice");
    refused(ctx, mft_slice(ctx, a, 1, 3, 6), "mft_slice");
    refused(ctx, mft_slice(ctx, a, 1, -1, 3), "mft_slice");
    refused(ctx, mft_embedding(ctx, a, ids, 1, 3, -1), "token 2 of sequence 0 has id 3, outside the 3 rows");
    refused(ctx, mft_embedding(ctx, a, bad, 3, 1, -1), "token 0 of sequence 1 has id -1");
    refused(ctx, mft_embedding(ctx, a, ids, 0, 3, -1), "mft_embedding");
    refused(ctx, mft_embedding(ctx, a, ids, 1, -1, -1), "mft_embedding");
    refused(ctx, mft_cross_entropy(ctx, a, bad, 0), "label 1 is -1, outside the vocabulary of 5");
    refused(ctx, mft_linear_cross_entropy(ctx, a, a, ids, 0, 0), "label 2 is 3, outside the vocabulary of 3");
    bad[0] = bad[1] = bad[2] = -100;
    refused(ctx, mft_cross_entropy(ctx, a, bad, 0), "every label is -100");
    refused(ctx, mft_linear_cross_entropy(ctx, a, a, bad, 0, 0), "every label is -100");
    refused(ctx, mft_add(ctx, a, NULL), "mft_add: an input is NULL");
    bf->trainable = 1; bf->dtype = MFT_F16;
    refused(ctx, mft_linear(ctx, a, bf, NULL), "a trainable weight must be f32 or bf16, not F16");
    CHECK(mft_backward(ctx, mft_sum(ctx, a)) == MFT_OK);        /* nothing trainable: nothing to do */
    CHECK(mft_backward(ctx, a) == MFT_ERR_INVALID_ARGUMENT);    /* not a scalar */
    CHECK(mft_add(NULL, a, b) == NULL && mft_sum(NULL, a) == NULL && mft_embedding(NULL, a, ids, 1, 3, -1) == NULL);
    mft_context_destroy(ctx);
}

/* A window of micro-batches: one whose labels are all -100 adds nothing, and is no failure when n_valid says
 * what the window's mean is taken over. */
static void test_micro_batch_without_labels(void)
{
    mft_context *ctx;
    mft_tensor  *x, *w, *loss;
    int64_t      sx[2] = { 3, 5 }, sw[2] = { 7, 5 };
    int32_t      none[3] = { -100, -100, -100 };
    int          i, fused;
    for (fused = 0; fused < 2; fused++) {
        CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
        x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, sx); w = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, sw);
        x->trainable = w->trainable = 1;
        for (i = 0; i < 15; i++) ((float *)x->data)[i] = 1;
        for (i = 0; i < 35; i++) ((float *)w->data)[i] = (float)i;
        loss = fused ? mft_linear_cross_entropy(ctx, x, w, none, 4, 0) : mft_cross_entropy(ctx, mft_linear(ctx, x, w, NULL), none, 4);
        CHECK(mft_tensor_item(loss) == 0);
        CHECK(mft_backward(ctx, loss) == MFT_OK);
        for (i = 0; x->grad && i < 15; i++) CHECK(((float *)x->grad->data)[i] == 0);
        for (i = 0; w->grad && i < 35; i++) CHECK(((float *)w->grad->data)[i] == 0);
        mft_context_destroy(ctx);
    }
}

/* ---- numbers of storage types ---- */
static void test_storage_types(void)
{
    uint32_t h, seed = 5;
    int      k;
    for (h = 0; h < 65536; h++) {
        double f = half_value(h), b = bfloat_value(h);
        CHECK(f != f ? mft__f16_to_float((uint16_t)h) != mft__f16_to_float((uint16_t)h) : f == (double)mft__f16_to_float((uint16_t)h));
        CHECK(b != b ? mft__bf16_to_float((uint16_t)h) != mft__bf16_to_float((uint16_t)h) : b == (double)mft__bf16_to_float((uint16_t)h));
        if (f == f) CHECK(mft__float_to_f16((float)f) == h);
        if (b == b) CHECK(mft__float_to_bf16((float)b) == h);
        if (f == f && fabs(f) < 65504) {                        /* half way to the next: to the even one */
            double next = half_value(h + 1), mid = (f + next) / 2;
            uint32_t even = h & 1 ? h + 1 : h;
            CHECK(mft__float_to_f16((float)mid) == even);
            CHECK(mft__float_to_f16((float)(mid * (1 + 1e-6))) == h + 1 && mft__float_to_f16((float)(mid * (1 - 1e-6))) == h);
        }
    }
    CHECK(mft__float_to_f16(65520.0f) == 0x7c00 && mft__float_to_f16(-65519.9f) == 0xfbff && mft__float_to_f16(1e30f) == 0x7c00);
    CHECK(mft__float_to_bf16(3.4e38f) == 0x7f80 && mft__float_to_bf16((float)INFINITY) == 0x7f80);
    CHECK(bfloat_value(mft__float_to_bf16((float)NAN)) != 0 && half_value(mft__float_to_f16((float)NAN)) != 0);
    for (k = 0; k < 100000; k++) {                              /* nearest of the two around it */
        float  f = ldexpf(test_random(&seed), (int)(test_random(&seed) * 13));
        double r = half_value(mft__float_to_f16(f)), up = half_value(mft__float_to_f16(f) + 1u), down = half_value((mft__float_to_f16(f) - 1u) & 0xffff);
        CHECK(fabs(r - f) <= fabs(up - f) || up != up);
        if (mft__float_to_f16(f) & 0x7fff) CHECK(fabs(r - f) <= fabs(down - f));
    }
}

static void test_tensor_copy(void)
{
    mft_context *ctx;
    mft_tensor  *f, *h, *b, *back, *i32, *i64, *q, *strided;
    int64_t      s[2] = { 5, 7 }, sq[2] = { 3, 96 };
    double       qv[3 * 96];
    int          i;
    uint32_t     seed = 1;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    f = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s);  h = mft_tensor_create(ctx, MFT_HELD, MFT_F16, 2, s);
    b = mft_tensor_create(ctx, MFT_HELD, MFT_BF16, 2, s); back = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s);
    i32 = mft_tensor_create(ctx, MFT_HELD, MFT_I32, 2, s); i64 = mft_tensor_create(ctx, MFT_HELD, MFT_I64, 2, s);
    for (i = 0; i < 35; i++) ((float *)f->data)[i] = test_random(&seed);
    CHECK(mft_tensor_copy(ctx, h, f) == MFT_OK && mft_tensor_copy(ctx, back, h) == MFT_OK);
    for (i = 0; i < 35; i++) CHECK(fabs(((float *)back->data)[i] - ((float *)f->data)[i]) < 2.5e-4);
    CHECK(mft_tensor_copy(ctx, b, f) == MFT_OK && mft_tensor_copy(ctx, back, b) == MFT_OK);
    for (i = 0; i < 35; i++) CHECK(fabs(((float *)back->data)[i] - ((float *)f->data)[i]) < 2e-3);
    CHECK(mft_tensor_copy(ctx, mft_transpose(ctx, back, 0, 1), mft_transpose(ctx, f, 0, 1)) == MFT_OK && memcmp(back->data, f->data, 140) == 0);
    strided = mft_transpose(ctx, mft_tensor_create(ctx, MFT_STEP, MFT_F16, 2, s), 0, 1);
    CHECK(mft_tensor_copy(ctx, strided, mft_transpose(ctx, f, 0, 1)) == MFT_OK && mft_tensor_copy(ctx, back, mft_transpose(ctx, strided, 0, 1)) == MFT_OK);
    for (i = 0; i < 35; i++) CHECK(fabs(((float *)back->data)[i] - ((float *)f->data)[i]) < 2.5e-4);
    CHECK(mft_tensor_copy(ctx, i64, i32) == MFT_ERR_UNSUPPORTED && mft_tensor_copy(ctx, f, i32) == MFT_ERR_UNSUPPORTED);
    CHECK(mft_tensor_copy(ctx, f, mft_transpose(ctx, f, 0, 1)) == MFT_ERR_INVALID_ARGUMENT);
    q = mft_tensor_create(ctx, MFT_HELD, MFT_Q4_0, 2, sq);
    fill_stored(q, qv, 1, &seed);
    strided = mft_transpose(ctx, mft_tensor_create(ctx, MFT_STEP, MFT_F32, 2, sq), 0, 1);
    strided = mft_transpose(ctx, strided, 0, 1);
    CHECK(mft_tensor_copy(ctx, strided, q) == MFT_OK);
    for (i = 0; i < 3 * 96; i++) CHECK(fabs(((float *)strided->data)[i] - qv[i]) < 1e-9);
    CHECK(mft_tensor_copy(ctx, q, strided) == MFT_ERR_UNSUPPORTED);
    CHECK(mft_tensor_item(NULL) != mft_tensor_item(NULL) && mft_tensor_item(f) != mft_tensor_item(f));
    mft_context_destroy(ctx);
}

int main(void)
{
    TEST(test_storage_types); TEST(test_tensor_copy);
    TEST(test_add); TEST(test_sub); TEST(test_mul); TEST(test_scale);
    TEST(test_gelu_tanh); TEST(test_gelu); TEST(test_silu); TEST(test_relu); TEST(test_tanh); TEST(test_softcap);
    TEST(test_gates); TEST(test_same_input_twice); TEST(test_softmax); TEST(test_sum_mean); TEST(test_mse);
    TEST(test_views);
    TEST(test_matmul); TEST(test_gram); TEST(test_linear); TEST(test_lora_linear); TEST(test_dora_linear);
    TEST(test_embedding); TEST(test_norms); TEST(test_rope);
    TEST(test_attention_not_finite);
    TEST(test_attention_infinite_scores);
    TEST(test_attention_oracle); TEST(test_attention); TEST(test_attention_long); TEST(test_attention_fused);
    TEST(test_cross_entropy); TEST(test_linear_cross_entropy); TEST(test_tied_head); TEST(test_micro_batch_without_labels);
    TEST(test_dropout); TEST(test_adapter_dropout); TEST(test_threads_same_bits);
    TEST(test_refusals);
    return test_report("ops");
}
