/* test_golden_ops.c - ops.safetensors: results and gradients torch and transformers compute in float64, operator
 * by operator, on every kernel row; the committed set in tests/golden and the larger one in $MFT_TEST_DATA/golden
 *
 * Tolerances are the set's own floors.json (ten times torch's float32 error there), 5e-6 for what it does not list.
 * An operator of the file that no test here claims is a failure, so nothing new goes unnoticed. */
#include "test.h"
#include "mft.h"
#include "mft_safetensors.h"

typedef struct golden {
    mft_context     *ctx;
    mft_safetensors *st;
    mft_json        *attributes, *floors;
    const char      *op;
    int              claimed;               /* entries that were looked at */
    unsigned char   *seen;
    const char      *folder;
} golden;

static const mft_safetensors_entry *entry_of(golden *g, const char *tensor)
{
    char name[200];
    const mft_safetensors_entry *e, *first;
    size_t n;
    snprintf(name, sizeof name, "%s.%s", g->op, tensor);
    e = mft_safetensors_find(g->st, name);
    first = mft_safetensors_entries(g->st, &n);
    if (e) g->seen[e - first] = 1;
    return e;
}

/* A held f32 tensor of the file's numbers; NULL if it is not there. */
static mft_tensor *number_of(golden *g, const char *tensor)
{
    const mft_safetensors_entry *e = entry_of(g, tensor);
    mft_tensor *t;
    if (!e) return NULL;
    t = mft_tensor_create(g->ctx, MFT_HELD, MFT_F32, e->ndim, e->shape);
    CHECK_MSG(t && mft_safetensors_read(g->st, e, t) == MFT_OK, "%s.%s: %s", g->op, tensor, mft_error_message(g->ctx));
    return t;
}

static mft_tensor *input_of(golden *g, const char *tensor)
{
    mft_tensor *t = number_of(g, tensor);
    CHECK_MSG(t != NULL, "%s has no %s", g->op, tensor);
    if (t) t->trainable = 1;
    return t;
}

/* Integers of the file as i32; held memory of the context. */
static const int32_t *ids_of(golden *g, const char *tensor, int64_t *count)
{
    const mft_safetensors_entry *e = entry_of(g, tensor);
    mft_tensor *t = e ? mft_tensor_create(g->ctx, MFT_HELD, MFT_I32, e->ndim, e->shape) : NULL;
    CHECK_MSG(t && mft_safetensors_read(g->st, e, t) == MFT_OK, "%s.%s: %s", g->op, tensor, mft_error_message(g->ctx));
    if (t && count) *count = mft_tensor_numel(t);
    return t ? (const int32_t *)t->data : NULL;
}

/* Doubles are no dtype of the library: read from the entry's place in the file. Up to 128 of them. */
static const double *doubles_of(golden *g, const char *tensor, int64_t *count)
{
    static double numbers[128];
    const mft_safetensors_entry *e = entry_of(g, tensor);
    FILE *f = fopen(mft_safetensors_shard_path(g->st, 0), "rb");
    int   good = f && e && strcmp(e->dtype_name, "F64") == 0 && e->bytes <= sizeof numbers
                 && fseek(f, (long)e->offset, SEEK_SET) == 0 && fread(numbers, 1, (size_t)e->bytes, f) == e->bytes;
    if (f) fclose(f);
    CHECK_MSG(good, "%s.%s", g->op, tensor);
    *count = good ? (int64_t)(e->bytes / 8) : 0;
    return numbers;
}

static double attribute(golden *g, const char *key, double fallback)
{
    return mft_json_number(mft_json_get(mft_json_get(g->attributes, g->op), key), fallback);
}

static double tolerance(golden *g)
{
    double t = mft_json_number(mft_json_get(mft_json_get(mft_json_get(g->floors, "ops"), g->op), "tol"), 5e-6);
    /* geglu, conv1d and the like are not in the larger set's table: README, "not in the table: 5e-6" */
    return t;
}

static void compare(golden *g, const char *what, const float *got, const float *want, int64_t n, double factor)
{
    double  worst = 0, most = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        double d = fabs((double)got[i] * factor - want[i]);
        if (!(d <= worst)) worst = d;
        if (fabs(want[i]) > most) most = fabs(want[i]);
    }
    worst /= most > 0 ? most : 1;
    if (getenv("MFT_TEST_VERBOSE")) printf("seen %s %-10s %-24s %-10s %.1e of %.0e\n", g->folder, mft_kernels_name(g->ctx), g->op, what, worst, tolerance(g));
    CHECK_MSG(worst < tolerance(g), "%s, row %s: %s.%s off by %.3g, allowed %.3g", g->folder, mft_kernels_name(g->ctx), g->op, what, worst, tolerance(g));
}

/* The gradient of t against the file's `name`. */
static void compare_gradient(golden *g, mft_tensor *t, const char *name)
{
    mft_tensor *want = number_of(g, name);
    CHECK_MSG(want && t && t->grad, "%s.%s", g->op, name);
    if (want && t && t->grad) compare(g, name, (float *)t->grad->data, (float *)want->data, mft_tensor_numel(want), 1);
}

/* y against the file, backward from sum(y dy). factor: what the file's y, dy are of ours. */
static void finish(golden *g, mft_tensor *y)
{
    mft_tensor *want = number_of(g, "y"), *dy = number_of(g, "dy");
    CHECK_MSG(y && want && dy, "%s: %s", g->op, mft_error_message(g->ctx));
    if (!y || !want || !dy) { mft_step_reset(g->ctx); return; }
    CHECK_MSG(mft_tensor_numel(y) == mft_tensor_numel(want), "%s", g->op);
    y = mft_contiguous(g->ctx, y);
    compare(g, "y", (float *)y->data, (float *)want->data, mft_tensor_numel(want), 1);
    CHECK_MSG(mft_backward(g->ctx, mft_sum(g->ctx, mft_mul(g->ctx, mft_reshape(g->ctx, y, want->ndim, want->shape), dy))) == MFT_OK, "%s: %s", g->op, mft_error_message(g->ctx));
    mft_step_reset(g->ctx);
}

/* ---- operator by operator; 0: not this one's ---- */
static int golden_elementwise(golden *g)
{
    static const char *const names[] = { "gelu_tanh", "gelu_new", "gelu_erf", "silu" };
    int i;
    for (i = 0; i < 4 && strcmp(g->op, names[i]); i++) { }
    if (i < 4) {
        mft_tensor *x = input_of(g, "x");
        finish(g, i < 2 ? mft_gelu_tanh(g->ctx, x) : i == 2 ? mft_gelu(g->ctx, x) : mft_silu(g->ctx, x));
        compare_gradient(g, x, "dx");
        return 1;
    }
    if (!strcmp(g->op, "swiglu") || !strcmp(g->op, "geglu")) {
        mft_tensor *gate = input_of(g, "gate"), *up = input_of(g, "up");
        finish(g, g->op[0] == 's' ? mft_swiglu(g->ctx, gate, up) : mft_geglu(g->ctx, gate, up));
        compare_gradient(g, gate, "dgate"); compare_gradient(g, up, "dup");
        return 1;
    }
    if (!strcmp(g->op, "mse")) {
        mft_tensor *x = input_of(g, "x"), *target = number_of(g, "target");
        finish(g, mft_mse_loss(g->ctx, x, target));
        compare_gradient(g, x, "dx");
        return 1;
    }
    return 0;
}

static int golden_linear(golden *g)
{
    int conv = strstr(g->op, "conv1d") != NULL, lora = strstr(g->op, "lora") != NULL, dora = strstr(g->op, "dora") != NULL;
    mft_tensor *x, *w, *bias, *a = NULL, *b = NULL, *m = NULL, *view, *y;
    if (strcmp(g->op, "linear") && !conv && !lora && !dora) return 0;
    x = input_of(g, "x"); w = input_of(g, "weight"); bias = input_of(g, "bias");
    if (lora || dora) { a = input_of(g, "lora_A"); b = input_of(g, "lora_B"); }
    if (dora) m = input_of(g, "magnitude");
    view = conv ? mft_transpose(g->ctx, w, 0, 1) : w;           /* Conv1D keeps [in, out] */
    y = dora ? mft_dora_linear(g->ctx, x, view, bias, a, b, m, (float)attribute(g, "scale", 0), 0)
      : lora ? mft_lora_linear(g->ctx, x, view, bias, a, b, (float)attribute(g, "scale", 0), 0) : mft_linear(g->ctx, x, view, bias);
    finish(g, y);
    compare_gradient(g, x, "dx");
    if (entry_of(g, "dweight")) compare_gradient(g, w, "dweight");
    if (entry_of(g, "dbias")) compare_gradient(g, bias, "dbias");
    if (a) { compare_gradient(g, a, "dlora_A"); compare_gradient(g, b, "dlora_B"); }
    if (m) compare_gradient(g, m, "dmagnitude");
    return 1;
}

static int golden_norm(golden *g)
{
    mft_tensor *x, *w, *b;
    if (!strstr(g->op, "norm")) return 0;
    x = input_of(g, "x"); w = input_of(g, "weight"); b = entry_of(g, "bias") ? input_of(g, "bias") : NULL;
    finish(g, b ? mft_layer_norm(g->ctx, x, w, b, (float)attribute(g, "eps", 0)) : mft_rms_norm(g->ctx, x, w, (float)attribute(g, "weight_offset", 0), (float)attribute(g, "eps", 0)));
    compare_gradient(g, x, "dx"); compare_gradient(g, w, "dweight");
    if (b) compare_gradient(g, b, "dbias");
    return 1;
}

static int golden_embedding(golden *g)
{
    mft_tensor    *w, *y;
    const int32_t *ids;
    const mft_safetensors_entry *e;
    if (strncmp(g->op, "embedding", 9)) return 0;
    w = input_of(g, "weight"); ids = ids_of(g, "ids", NULL); e = entry_of(g, "ids");
    y = mft_embedding(g->ctx, w, ids, e->shape[0], e->shape[1], (int32_t)attribute(g, "padding_idx", -1));
    if (attribute(g, "scale", 1) != 1) y = mft_scale(g->ctx, y, (float)attribute(g, "scale", 1));
    finish(g, y);
    compare_gradient(g, w, "dweight");
    return 1;
}

/* Frequencies as transformers computes them, in float32. */
static void inverse_frequencies(golden *g, float *f, int dim, double theta)
{
    int i;
    for (i = 0; i < dim / 2; i++) {
        float e = (float)(2 * i) / (float)dim;
        f[i] = 1.0f / (float)pow(theta, (double)e) / (float)attribute(g, "factor", 1);
    }
}

static int golden_rope(golden *g)
{
    mft_tensor    *x;
    const int32_t *positions;
    float          f[256];
    if (strcmp(g->op, "rope") && strcmp(g->op, "rope_linear8")) return 0;
    x = input_of(g, "x"); positions = ids_of(g, "position_ids", NULL);
    inverse_frequencies(g, f, (int)x->shape[3], attribute(g, "theta", 0));
    finish(g, mft_rope(g->ctx, x, positions, f, 0));
    compare_gradient(g, x, "dx");
    return 1;
}

/* The tables: x of ones and zeros turned by mft_rope gives cos and sin at positions up to 131071, where the
 * float32 angle of transformers is what must be met, not the exact one. */
static int golden_rope_table(golden *g)
{
    mft_tensor    *x, *y, *c, *s, *freq;
    const int32_t *positions;
    int64_t        n, shape[4], i, k, d;
    double         worst = 0;
    if (strncmp(g->op, "rope_table", 10)) return 0;
    c = number_of(g, "cos"); s = number_of(g, "sin"); freq = number_of(g, "inv_freq"); positions = ids_of(g, "position_ids", &n);
    (void)entry_of(g, "cos_f64"); (void)entry_of(g, "sin_f64"); (void)entry_of(g, "inv_freq_f64");
    d = c->shape[1];
    shape[0] = 1; shape[1] = n; shape[2] = 1; shape[3] = d;
    x = mft_tensor_create(g->ctx, MFT_STEP, MFT_F32, 4, shape);
    for (i = 0; i < n; i++) for (k = 0; k < d / 2; k++) ((float *)x->data)[i * d + k] = 1;
    y = mft_rope(g->ctx, x, positions, (const float *)freq->data, 0);
    CHECK(y != NULL);
    for (i = 0; y && i < n; i++) for (k = 0; k < d / 2; k++) {
        double gap = fabs(((float *)y->data)[i * d + k] - ((float *)c->data)[i * d + k]), gap_s = fabs(((float *)y->data)[i * d + k + d / 2] - ((float *)s->data)[i * d + k]);
        if (!(gap <= worst)) worst = gap;
        if (!(gap_s <= worst)) worst = gap_s;
    }
    if (getenv("MFT_TEST_VERBOSE")) printf("seen %s %-10s %-24s            %.1e\n", g->folder, mft_kernels_name(g->ctx), g->op, worst);
    CHECK_MSG(worst < 2.5e-7, "%s: %.3g", g->op, worst);        /* an angle in double: 4e-3 */
    mft_step_reset(g->ctx);
    return 1;
}

/* [B,H,T,D] in the file, [B,T,H,D] here: transposed views, whose gradients come back as the file has them. A mask
 * of left padding is a first key; rows of padding have dy 0. */
static int golden_attention(golden *g)
{
    mft_tensor    *q, *k, *v, *y;
    const int32_t *mask;
    static int32_t first[4096];
    mft_attention_desc d;
    int64_t        b, t, T, B;
    if (strncmp(g->op, "attn", 4)) return 0;
    q = input_of(g, "q"); k = input_of(g, "k"); v = input_of(g, "v"); mask = ids_of(g, "attention_mask", NULL);
    memset(&d, 0, sizeof d);
    d.scale = (float)attribute(g, "scale", 0); d.window = (int)attribute(g, "window", 0);
    B = q->shape[0]; T = q->shape[2];
    for (b = 0; b < B; b++) for (t = 0; t < T; t++) {
        int64_t s = 0;
        while (s < T && !mask[b * T + s]) s++;
        first[b * T + t] = (int32_t)s;
    }
    d.first_key = first;
    y = mft_attention(g->ctx, mft_transpose(g->ctx, q, 1, 2), mft_transpose(g->ctx, k, 1, 2), mft_transpose(g->ctx, v, 1, 2), &d);
    y = mft_contiguous(g->ctx, mft_transpose(g->ctx, y, 1, 2));
    for (b = 0; y && b < B; b++) for (t = 0; t < T; t++) {      /* the file has zeros at padding on the right, too */
        int64_t h, D = q->shape[3];
        if (!mask[b * T + t]) for (h = 0; h < q->shape[1]; h++) memset((float *)y->data + ((b * q->shape[1] + h) * T + t) * D, 0, (size_t)D * 4);
    }
    finish(g, y);
    compare_gradient(g, q, "dq"); compare_gradient(g, k, "dk"); compare_gradient(g, v, "dv");
    return 1;
}

/* The file has the sum; n_valid 1 makes ours one. The fused loss must agree on the same logits: x = logits, w = 1. */
static int golden_xent(golden *g)
{
    mft_tensor    *logits, *y, *want, *dy, *w;
    const int32_t *labels;
    int            fused;
    int64_t        shape[2], i;
    if (strncmp(g->op, "xent", 4)) return 0;
    for (fused = 0; fused < 2; fused++) {
        logits = input_of(g, "logits"); labels = ids_of(g, "labels", NULL); want = number_of(g, "y"); dy = number_of(g, "dy");
        shape[0] = shape[1] = logits->shape[1];
        w = mft_tensor_create(g->ctx, MFT_HELD, MFT_F32, 2, shape);
        for (i = 0; i < shape[0]; i++) ((float *)w->data)[i * shape[0] + i] = 1;
        y = fused ? mft_linear_cross_entropy(g->ctx, logits, w, labels, 1, 0) : mft_cross_entropy(g->ctx, logits, labels, 1);
        CHECK_MSG(y != NULL, "%s: %s", g->op, mft_error_message(g->ctx));
        if (y) compare(g, fused ? "y (fused)" : "y", (float *)y->data, (float *)want->data, 1, 1);
        CHECK_MSG(mft_backward(g->ctx, mft_mul(g->ctx, y, dy)) == MFT_OK, "%s: %s", g->op, mft_error_message(g->ctx));
        mft_step_reset(g->ctx);
        compare_gradient(g, logits, "dlogits");
    }
    return 1;
}

/* ---- the optimizer's ---- */
static int golden_adamw(golden *g)
{
    mft_tensor    *p, *grads, *want, *t;
    const double  *lr;
    mft_optimizer *opt;
    mft_optimizer_desc d;
    int64_t        steps, n, s;
    double         worst = 0;
    if (strncmp(g->op, "adamw", 5)) return 0;
    p = input_of(g, "p0"); grads = number_of(g, "grads"); want = number_of(g, "p"); lr = doubles_of(g, "lr", &steps);
    memset(&d, 0, sizeof d);
    d.beta1 = attribute(g, "beta1", 0); d.beta2 = attribute(g, "beta2", 0); d.eps = attribute(g, "eps", 0);
    d.weight_decay = attribute(g, "weight_decay", -1); d.max_grad_norm = -1;
    n = mft_tensor_numel(p);
    CHECK(mft_optimizer_create(g->ctx, &d, &p, NULL, 1, &opt) == MFT_OK);
    for (s = 0; s < steps; s++) {
        int64_t i;
        t = mft_tensor_create(g->ctx, MFT_STEP, MFT_F32, 1, &n);
        memcpy(t->data, (float *)grads->data + s * n, (size_t)n * 4);
        CHECK(mft_backward(g->ctx, mft_sum(g->ctx, mft_mul(g->ctx, p, t))) == MFT_OK);
        mft_step_reset(g->ctx);
        CHECK(mft_optimizer_step(opt, lr[s], NULL) == MFT_OK);
        for (i = 0; i < n; i++) {
            double gap = fabs(((float *)p->data)[i] - ((float *)want->data)[s * n + i]);
            if (!(gap <= worst)) worst = gap;
        }
    }
    if (getenv("MFT_TEST_VERBOSE")) printf("seen %s %-10s %-24s            %.1e\n", g->folder, mft_kernels_name(g->ctx), g->op, worst);
    CHECK_MSG(worst < 1e-6, "%s, row %s: %.3g", g->op, mft_kernels_name(g->ctx), worst);      /* parameters to 2: two units in the last place a step */
    mft_optimizer_destroy(opt);
    return 1;
}

/* SGD with rate 1 on zeros shows the clipped gradients. */
static int golden_clip(golden *g)
{
    mft_tensor    *p[2], *grad[2], *want[2], *norm, *t;
    mft_optimizer *opt;
    mft_optimizer_desc d;
    double         got;
    int            k;
    int64_t        i;
    if (strncmp(g->op, "clip", 4)) return 0;
    grad[0] = number_of(g, "a"); grad[1] = number_of(g, "b"); want[0] = number_of(g, "a_clipped"); want[1] = number_of(g, "b_clipped"); norm = number_of(g, "norm");
    memset(&d, 0, sizeof d);
    d.kind = MFT_SGD; d.max_grad_norm = attribute(g, "max_norm", 0);
    for (k = 0; k < 2; k++) { p[k] = mft_tensor_create(g->ctx, MFT_HELD, MFT_F32, grad[k]->ndim, grad[k]->shape); p[k]->trainable = 1; }
    CHECK(mft_optimizer_create(g->ctx, &d, p, NULL, 2, &opt) == MFT_OK);
    for (k = 0; k < 2; k++) {
        t = mft_sum(g->ctx, mft_mul(g->ctx, p[k], grad[k]));
        CHECK(mft_backward(g->ctx, t) == MFT_OK);
        mft_step_reset(g->ctx);
    }
    CHECK(mft_optimizer_step(opt, 1, &got) == MFT_OK);
    CHECK_MSG(fabs(got / (double)mft_tensor_item(norm) - 1) < 1e-6, "%s: norm %.9g, not %.9g", g->op, got, (double)mft_tensor_item(norm));
    for (k = 0; k < 2; k++) for (i = 0; i < mft_tensor_numel(p[k]); i++)
        CHECK(fabs(-((float *)p[k]->data)[i] - ((float *)want[k]->data)[i]) <= 3e-7 * fabs((double)((float *)want[k]->data)[i]));
    mft_optimizer_destroy(opt);
    return 1;
}

static int golden_schedule(golden *g)
{
    const double *lr;
    int64_t       n, i;
    double        worst = 0;
    if (strncmp(g->op, "schedule", 8)) return 0;
    lr = doubles_of(g, "lr", &n);
    for (i = 0; i < n; i++) {
        double got = mft_schedule(strstr(g->op, "cosine") ? MFT_SCHEDULE_COSINE : MFT_SCHEDULE_LINEAR, attribute(g, "base_lr", 0), 0, (int64_t)attribute(g, "warmup", -1), (int64_t)attribute(g, "total", -1), i);
        double gap = lr[i] != 0 ? fabs(got / lr[i] - 1) : fabs(got);
        if (!(gap <= worst)) worst = gap;
    }
    CHECK_MSG(n == 100 && worst < 1e-12, "%s: %.3g", g->op, worst);
    return 1;
}

static void run_folder(const char *folder)
{
    static int (*const all[])(golden *) = { golden_elementwise, golden_rope_table, golden_linear, golden_norm, golden_embedding, golden_rope, golden_attention, golden_xent, golden_adamw, golden_clip, golden_schedule };
    char        path[3][1100];
    int         row;
    const char *name;
    snprintf(path[0], sizeof path[0], "%s/ops.safetensors", folder);
    snprintf(path[1], sizeof path[1], "%s/ops.json", folder);
    snprintf(path[2], sizeof path[2], "%s/floors.json", folder);
    if (!test_file_exists(path[0])) SKIP("operators: no %s", path[0]);
    for (row = 0; (name = mft_kernels_available(row)) != NULL; row++) {
        mft_context_desc d;
        golden g;
        const mft_safetensors_entry *e;
        size_t n, i;
        char   last[100] = "";
        int    ops = 0;
        memset(&d, 0, sizeof d); memset(&g, 0, sizeof g);
        d.kernels = name; d.n_threads = 2;
        CHECK(mft_context_create(&d, &g.ctx) == MFT_OK);
        g.folder = folder;
        CHECK_MSG(mft_safetensors_open(g.ctx, path[0], &g.st) == MFT_OK, "%s", mft_error_message(g.ctx));
        CHECK_MSG(mft_json_load(g.ctx, path[1], &g.attributes) == MFT_OK, "%s", mft_error_message(g.ctx));
        CHECK_MSG(mft_json_load(g.ctx, path[2], &g.floors) == MFT_OK, "%s", mft_error_message(g.ctx));
        if (!g.st || !g.attributes || !g.floors) { mft_context_destroy(g.ctx); return; }
        e = mft_safetensors_entries(g.st, &n);
        g.seen = (unsigned char *)calloc(n, 1);
        for (i = 0; i < n; i++) {
            char   op[100];
            size_t k, length = strcspn(e[i].name, ".");
            snprintf(op, sizeof op, "%.*s", (int)length, e[i].name);
            if (g.seen[i] || !strcmp(op, last)) continue;       /* its operator has been run */
            strcpy(last, op);
            g.op = op; ops++;
            for (k = 0; k < sizeof all / sizeof *all && !all[k](&g); k++) { }
            CHECK_MSG(k < sizeof all / sizeof *all, "nobody tests %s", op);
        }
        for (i = 0; i < n; i++) CHECK_MSG(g.seen[i], "nobody looked at %s", e[i].name);
        CHECK_MSG(ops > 30, "%d operators", ops);
        free(g.seen);
        mft_context_destroy(g.ctx);
    }
}

static void test_committed_set(void) { run_folder("tests/golden"); }
static void test_large_set(void)     { run_folder(test_data("golden")); }

int main(void)
{
    TEST(test_committed_set); TEST(test_large_set);
    return test_report("golden_ops");
}
