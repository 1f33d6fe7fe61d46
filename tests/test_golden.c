/* test_golden.c - models against the numbers of Transformers and PEFT
 *
 * Two sets of one form: the small one in tests/golden, and the larger one of ../shared/golden when it is
 * there. Every fixture of manifest.json, on every kernel row: each case's logits, hidden states, loss and
 * gradients; training of all weights for 15 steps; adapters before and after, trained, merged; greedy
 * generation and the logits processors; every form of the config; checkpointing and threads to the bit, these
 * also in larger models of random weights.
 * Tolerances are floors.json's: ten times the noise between two ways PyTorch computes the same, so that
 * a wrong epsilon or the exact gelu fails (seen: gelu for gelu_tanh gives 40 times the tolerance on logits). */
#ifndef TEST_SUITE
#  define TEST_SUITE "golden"
#endif
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE                       /* mkdtemp */
#endif
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

enum { MOST = 2048 };

static const char *root;                    /* of the set being tested */
static const char *row;                     /* the kernel row */
static mft_context *ctx;
static mft_json *manifest, *floors;

static mft_context *context(int threads, mft_precision precision)
{
    mft_context     *c = NULL;
    mft_context_desc d;
    memset(&d, 0, sizeof d);
    d.n_threads = threads; d.kernels = row; d.precision = precision;
    CHECK(mft_context_create(&d, &c) == MFT_OK);
#ifndef MFT_NO_THREADS
    if (c && c->pool) c->pool->most = threads - 1;     /* all of them, as if there were so many cores */
#endif
    return c;
}

static const char *path_of(const char *fixture, const char *file)
{
    static char buffers[4][1200];
    static int  next;
    char       *b = buffers[next++ % 4];
    snprintf(b, sizeof buffers[0], "%s/%s/%s", root, fixture, file);
    return b;
}

/* A fixture's own tolerance, in the units its README gives. */
static double tolerance(const char *fixture, const char *quantity)
{
    const mft_json *t = mft_json_get(mft_json_get(floors, fixture), quantity);
    if (!t) t = mft_json_get(mft_json_get(floors, "_recommended"), quantity);
    return mft_json_number(mft_json_get(t, "tol"), 1e-5);
}

/* A tensor of a golden file as f32 or i32, held; NULL if it is not there. */
static mft_tensor *golden(mft_safetensors *g, const char *format, const char *a, const char *b)
{
    char        name[400];
    mft_tensor *t;
    const mft_safetensors_entry *e;
    snprintf(name, sizeof name, format, a, b);
    e = mft_safetensors_find(g, name);
    if (!e || (e->problem && strcmp(e->dtype_name, "F64"))) return NULL;
    if (!strcmp(e->dtype_name, "F64")) return NULL;
    t = mft_tensor_create(ctx, MFT_HELD, e->dtype == MFT_I64 ? MFT_I32 : MFT_F32, e->ndim, e->shape);
    CHECK_MSG(t && mft_safetensors_read(g, e, t) == MFT_OK, "%s", mft_error_message(ctx));
    return t;
}

/* The k-th number of an F64 tensor, which the library has no dtype for. */
static double golden_f64(const char *file, const char *name, int64_t k)
{
    size_t  bytes;
    char   *text = test_read_file(file, &bytes), key[300], *at, *p;
    double  v = NAN;
    uint64_t header = 0, begin;
    if (!text) return NAN;
    memcpy(&header, text, 8);
    snprintf(key, sizeof key, "\"%s\":", name);
    at = strstr(text + 8, key);
    p  = at ? strstr(at, "data_offsets") : NULL;
    if (p) { begin = strtoull(strchr(p, '[') + 1, NULL, 10); memcpy(&v, text + 8 + header + begin + 8 * (uint64_t)k, 8); }
    free(text);
    return v;
}

/* max |got - want| / max |want| over the elements whose `keep` (per row of `cols`) is not zero. NaN counts as infinite. */
static double worst(const float *got, const mft_tensor *want, const int32_t *keep, int64_t cols)
{
    const float *w = (const float *)want->data;
    double       gap = 0, most = 0;
    int64_t      i, n = mft_tensor_numel(want);
    for (i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)w[i]);
        if (keep && !keep[i / cols]) continue;
        if (!(d <= gap)) gap = d == d ? d : INFINITY;
        if (fabs((double)w[i]) > most) most = fabs((double)w[i]);
    }
    return most > 0 ? gap / most : gap;
}

/* Numbers of a parameter or gradient in the order the file has them: a Conv1D's lie [in, out]. */
static const float *stored(const mft_tensor *t) { return (const float *)t->data; }

static mft_batch read_case(mft_safetensors *g, const char *name)
{
    mft_batch   b;
    mft_tensor *ids = golden(g, "%s.%s", name, "input_ids"), *mask = golden(g, "%s.%s", name, "attention_mask"),
               *labels = golden(g, "%s.%s", name, "labels"), *positions = golden(g, "%s.%s", name, "position_ids");
    memset(&b, 0, sizeof b);
    b.input_ids = (const int32_t *)ids->data;
    if (mask) b.attention_mask = (const int32_t *)mask->data;
    if (labels) b.labels = (const int32_t *)labels->data;
    if (positions) b.position_ids = (const int32_t *)positions->data;
    b.batch = (int)ids->shape[0]; b.seq = (int)ids->shape[1];
    return b;
}

/* Logits, loss and gradients of one case, for whatever is trainable in the model. prefix "base." or "final.base." */
static void check_case(const char *fixture, mft_model *m, mft_safetensors *g, const mft_batch *b, const char *name)
{
    mft_tensor *want, *loss, *params[MOST];
    double      sum = 0;
    int         i, n, was;

    was = mft_grad_enable(ctx, 0);
    if ((want = golden(g, "%s.%s", name, "logits")) != NULL) {
        mft_tensor *y = mft_model_forward(m, b);
        CHECK_MSG(y != NULL, "%s", ctx->step_error);
        if (y) {
            double gap = worst((const float *)y->data, want, b->attention_mask, y->shape[2]);
            CHECK_MSG(gap < tolerance(fixture, "logits"), "%s %s logits: %g", fixture, name, gap);
        }
        mft_step_reset(ctx);
    }
    if ((want = golden(g, "%s.%s", name, "logits_last4")) != NULL) {
        mft_tensor *y = mft_model_forward(m, b);
        if (y) {
            double gap = worst((const float *)y->data + (b->seq - 4) * y->shape[2], want, NULL, 1);
            CHECK_MSG(gap < tolerance(fixture, "logits"), "%s %s last logits: %g", fixture, name, gap);
        }
        mft_step_reset(ctx);
    }
    if ((want = golden(g, "%s.%s", name, "final_norm")) != NULL) {
        mft_tensor *y = mft_model_hidden(m, b);
        if (y) {
            double gap = worst((const float *)y->data, want, b->attention_mask, y->shape[2]);
            CHECK_MSG(gap < tolerance(fixture, "hidden"), "%s %s hidden: %g", fixture, name, gap);
        }
        mft_step_reset(ctx);
    }
    mft_grad_enable(ctx, was);

    want = golden(g, "%s.%s", name, "loss");
    if (!want) return;
    loss = mft_model_loss(m, b, 0);
    CHECK_MSG(mft_backward(ctx, loss) == MFT_OK, "%s", mft_error_message(ctx));
    if (loss) {
        double gap = fabs((double)mft_tensor_item(loss) / (double)mft_tensor_item(want) - 1);
        CHECK_MSG(gap < tolerance(fixture, "loss"), "%s %s loss: %g", fixture, name, gap);
    }
    mft_step_reset(ctx);
    n = mft_model_params(m, 1, params, MOST);
    for (i = 0; i < n; i++) {
        mft_tensor *grad = params[i]->grad, *norm;
        double      square = 0;
        if (!grad) continue;
        if ((want = golden(g, "%s.grad.%s", name, params[i]->name)) != NULL) {
            double gap = worst(stored(grad), want, NULL, 1);
            CHECK_MSG(gap < tolerance(fixture, "grad"), "%s %s grad.%s: %g", fixture, name, params[i]->name, gap);
        }
        square = ctx->kernels->sum_squares((const float *)grad->data, mft_tensor_numel(grad));
        if ((norm = golden(g, "%s.gradnorm.%s", name, params[i]->name)) != NULL && mft_tensor_item(norm) > 1e-4f) {
            double gap = fabs(sqrt(square) / (double)mft_tensor_item(norm) - 1);
            CHECK_MSG(gap < 10 * tolerance(fixture, "grad"), "%s %s gradnorm.%s: %g", fixture, name, params[i]->name, gap);
        }
        sum += square;
        mft__of(params[i])->grad_written = 0;
    }
    if (n && (want = golden(g, "%s.%s", name, "grad_norm")) != NULL) {
        double gap = fabs(sqrt(sum) / (double)mft_tensor_item(want) - 1);
        CHECK_MSG(gap < tolerance(fixture, "grad_norm"), "%s %s grad_norm: %g", fixture, name, gap);
    }
}

/* The 15 steps of train_data.safetensors with what is trainable. Compares loss and grad_norm with `file`'s `prefix`NAME. */
static void train(const char *fixture, mft_model *m, const char *file, const char *prefix, int decay_all, mft_trainer **out)
{
    mft_trainer_desc d;
    mft_trainer     *tr = NULL;
    mft_safetensors *g = NULL;
    mft_tensor      *ids, *mask, *labels;
    int64_t          T, B, part;
    int              step, k;

    memset(&d, 0, sizeof d);
    d.learning_rate = 1e-3; d.schedule = MFT_SCHEDULE_COSINE; d.warmup_steps = 3; d.total_steps = 15;
    d.optimizer.weight_decay = 0.01; d.optimizer.max_grad_norm = 1; d.decay_all = decay_all;
    CHECK_MSG(mft_trainer_create(m, NULL, &d, &tr) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_safetensors_open(ctx, path_of(fixture, "train_data.safetensors"), &g) == MFT_OK);
    if (!tr || !g) return;
    ids = golden(g, "%s%s", "input_ids", ""); mask = golden(g, "%s%s", "attention_mask", ""); labels = golden(g, "%s%s", "labels", "");
    B = ids->shape[2]; T = ids->shape[3]; part = B * T;
    for (step = 0; step < 15; step++) {
        mft_batch    b[2];
        mft_progress p;
        char         name[64];
        double       loss, norm, lr;
        memset(b, 0, sizeof b);
        for (k = 0; k < 2; k++) {
            int64_t at = (step % 5 * 2 + k) * part;
            b[k].input_ids = (int32_t *)ids->data + at; b[k].attention_mask = (int32_t *)mask->data + at; b[k].labels = (int32_t *)labels->data + at;
            b[k].batch = (int)B; b[k].seq = (int)T;
        }
        CHECK_MSG(mft_trainer_step_batch(tr, b, 2, &p) == MFT_OK, "%s", mft_error_message(ctx));
        snprintf(name, sizeof name, "%sloss", prefix);      loss = golden_f64(file, name, step);
        snprintf(name, sizeof name, "%sgrad_norm", prefix); norm = golden_f64(file, name, step);
        snprintf(name, sizeof name, "%slr", prefix);        lr   = golden_f64(file, name, step);
        CHECK_MSG(fabs(p.loss / loss - 1) < tolerance(fixture, "train.loss"), "%s %s step %d: loss %.9g, not %.9g", fixture, prefix, step, p.loss, loss);
        CHECK_MSG(fabs(p.grad_norm / norm - 1) < tolerance(fixture, "train.grad_norm"), "%s %s step %d: grad_norm %.9g, not %.9g", fixture, prefix, step, p.grad_norm, norm);
        CHECK_MSG(fabs(p.learning_rate - lr) <= 1e-12 * lr, "%s step %d: lr %.17g, not %.17g", fixture, step, p.learning_rate, lr);
    }
    mft_safetensors_close(g);
    if (out) *out = tr; else mft_trainer_destroy(tr);
}

static int compare_doubles(const void *a, const void *b) { double x = *(const double *)a, y = *(const double *)b; return (x > y) - (x < y); }

/* Final parameters: the 99.9th percentile of all differences and the largest, key biases apart (rounding noise moves them). */
static void check_final(const char *fixture, mft_model *m, mft_safetensors *g, const char *format)
{
    mft_tensor *params[MOST];
    double     *gaps = NULL;
    size_t      n = 0, cap = 0;
    int         i, count = mft_model_params(m, 1, params, MOST);
    for (i = 0; i < count; i++) {
        mft_tensor *want = golden(g, format, params[i]->name, "");
        int64_t     k, size;
        if (!want) continue;
        size = mft_tensor_numel(want);
        if (n + (size_t)size > cap) { cap = 2 * (n + (size_t)size); gaps = (double *)realloc(gaps, cap * sizeof *gaps); }
        for (k = 0; k < size; k++) {
            double gap = fabs((double)stored(params[i])[k] - (double)((float *)want->data)[k]);
            int    key = strstr(params[i]->name, "k_proj.bias") || (strstr(params[i]->name, "c_attn.bias") && k >= size / 3 && k < 2 * size / 3);
            if (key) { CHECK_MSG(gap < tolerance(fixture, "train.key_bias_maxabs"), "%s %s: %g", fixture, params[i]->name, gap); continue; }
            gaps[n++] = gap == gap ? gap : INFINITY;
        }
    }
    CHECK_MSG(n > 0, "%s: no final parameters", fixture);
    if (n) {
        qsort(gaps, n, sizeof *gaps, compare_doubles);
        CHECK_MSG(gaps[(size_t)(0.999 * (double)(n - 1))] < tolerance(fixture, "train.param_q999"), "%s: 99.9%% of final parameters within %g", fixture, gaps[(size_t)(0.999 * (double)(n - 1))]);
        CHECK_MSG(gaps[n - 1] < tolerance(fixture, "train.param_maxabs"), "%s: final parameters within %g", fixture, gaps[n - 1]);
    }
    free(gaps);
}

static void run_train(const char *fixture, const char *file, int decay_all)
{
    mft_model       *m = NULL;
    mft_model_desc   d;
    mft_safetensors *g = NULL;
    if (!test_file_exists(path_of(fixture, file))) return;
    memset(&d, 0, sizeof d);
    d.train_all = 1;
    CHECK_MSG(mft_model_load(ctx, path_of(fixture, "."), &d, &m) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_safetensors_open(ctx, path_of(fixture, file), &g) == MFT_OK);
    if (m && g) {
        train(fixture, m, path_of(fixture, file), "", decay_all, NULL);
        check_final(fixture, m, g, "final.%s%s");
    }
    mft_safetensors_close(g);
    mft_model_destroy(m);
}

static void run_adapter(const char *fixture, const char *adapter, const mft_json *about)
{
    char             name[300], file[1400], init[1300], final_dir[1300];
    mft_model       *m = NULL;
    mft_safetensors *cases = NULL, *g = NULL, *last = NULL;
    mft_trainer     *tr = NULL;
    size_t           i;
    const mft_json  *list = mft_json_get(about, "cases"), *node;

    snprintf(name, sizeof name, "%s/%s", fixture, adapter);
    snprintf(file, sizeof file, "%s/%s/golden.safetensors", root, name);
    snprintf(init, sizeof init, "%s/%s/init", root, name);
    snprintf(final_dir, sizeof final_dir, "%s/%s/final", root, name);
    CHECK(mft_safetensors_open(ctx, path_of(fixture, "golden.safetensors"), &cases) == MFT_OK);
    CHECK_MSG(mft_safetensors_open(ctx, file, &g) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_model_load(ctx, path_of(fixture, "."), NULL, &m) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(m && mft_lora_load(m, init, NULL) == MFT_OK, "%s", mft_error_message(ctx));
    if (!cases || !g || !m) return;
    for (i = 0; (node = mft_json_at(list, i, NULL)) != NULL; i++) {
        mft_batch b = read_case(cases, mft_json_string(node, NULL));
        check_case(name, m, g, &b, mft_json_string(node, NULL));
    }
    if (mft_safetensors_find(g, "train.loss")) {
        train(fixture, m, file, "train.", 1, &tr);
        snprintf(file, sizeof file, "%s/adapter_model.safetensors", final_dir);
        CHECK(mft_safetensors_open(ctx, file, &last) == MFT_OK);
        if (last) check_final(name, m, last, "%s%s");
        mft_safetensors_close(last);
        mft_trainer_destroy(tr);
    }
    mft_lora_detach(m);
    if (test_file_exists(final_dir) || mft_safetensors_find(g, "final.base.logits")) {
        mft_batch b = read_case(cases, "base");
        CHECK_MSG(mft_lora_load(m, final_dir, "final") == MFT_OK, "%s", mft_error_message(ctx));
        check_case(name, m, g, &b, "final.base");
        if (mft_safetensors_find(g, "merged.base.logits")) {
            size_t k, n;
            const mft_safetensors_entry *e = mft_safetensors_entries(g, &n);
            CHECK_MSG(mft_lora_merge(m) == MFT_OK, "%s", mft_error_message(ctx));
            check_case(name, m, g, &b, "merged.base");
            for (k = 0; k < n; k++) {
                mft_tensor *params[MOST];
                int         count = mft_model_params(m, 0, params, MOST), j;
                for (j = 0; j < count && !strncmp(e[k].name, "merged.", 7); j++)
                    if (!strcmp(e[k].name + 7, params[j]->name)) {
                        double gap = worst(stored(params[j]), golden(g, "%s%s", e[k].name, ""), NULL, 1);
                        CHECK_MSG(gap < tolerance(name, "merged"), "%s %s: %g", name, e[k].name, gap);
                    }
            }
        }
    }
    mft_model_destroy(m);
    mft_safetensors_close(g);
    mft_safetensors_close(cases);
}

static void run_generate(const char *fixture)
{
    mft_model       *m = NULL;
    mft_safetensors *g = NULL;
    mft_tensor      *prompt, *sequence, *want;
    if (!test_file_exists(path_of(fixture, "generate.safetensors"))) return;
    CHECK(mft_model_load(ctx, path_of(fixture, "."), NULL, &m) == MFT_OK);
    CHECK(mft_safetensors_open(ctx, path_of(fixture, "generate.safetensors"), &g) == MFT_OK);
    if (!m || !g) return;
    prompt = golden(g, "%s%s", "greedy.prompt_ids", ""); sequence = golden(g, "%s%s", "greedy.sequence", "");
    if (prompt && sequence) {
        mft_generate_desc d;
        int32_t           ids[256];
        int64_t           n_prompt = prompt->shape[1], n = sequence->shape[1] - n_prompt, made;
        memset(&d, 0, sizeof d);
        d.max_new_tokens = (int)n; d.ignore_eos = 1;
        made = mft_generate(m, (const int32_t *)prompt->data, n_prompt, &d, ids, 256);
        CHECK_MSG(made == n && !memcmp(ids, (const int32_t *)sequence->data + n_prompt, (size_t)n * sizeof *ids), "%s: greedy generation differs", fixture);
    }
    if ((want = golden(g, "%s%s", "proc.logits", "")) != NULL) {
        static const struct { const char *name; float penalty, temperature, top_p; int top_k; } each[] = {
            { "proc.repetition_penalty", 1.3f, 0, 0, 0 }, { "proc.temperature", 0, 0.7f, 0, 0 }, { "proc.top_k", 0, 0, 0, 20 }, { "proc.top_p", 0, 0, 0.8f, 0 }, { "proc.all", 1.3f, 0.7f, 0.8f, 20 }
        };
        mft_tensor     *ids = golden(g, "%s%s", "proc.input_ids", "");
        int64_t         V = want->shape[1], k;
        mft__candidate *scratch = (mft__candidate *)malloc((size_t)V * sizeof *scratch);
        float          *x = (float *)malloc((size_t)V * sizeof *x);
        size_t          i;
        for (i = 0; i < sizeof each / sizeof *each; i++) {
            mft_generate_desc d;
            mft_tensor       *y = golden(g, "%s%s", each[i].name, "");
            if (!y) continue;
            memset(&d, 0, sizeof d);
            d.repetition_penalty = each[i].penalty; d.temperature = each[i].temperature; d.top_k = each[i].top_k; d.top_p = each[i].top_p;
            memcpy(x, want->data, (size_t)V * sizeof *x);
            mft__process_logits(x, V, (const int32_t *)ids->data, mft_tensor_numel(ids), &d, scratch);
            for (k = 0; k < V; k++) {
                float w = ((float *)y->data)[k];
                CHECK_MSG(isinf(w) ? x[k] == w : fabs((double)x[k] - (double)w) <= 1e-6 * fabs((double)w), "%s %s token %lld: %g, not %g", fixture, each[i].name, (long long)k, (double)x[k], (double)w);
            }
        }
        free(scratch); free(x);
    }
    mft_safetensors_close(g);
    mft_model_destroy(m);
}

/* Every case of one snapshot against a golden file. Weights trainable or frozen in place. */
static void run_cases(const char *fixture, const char *golden_of, const mft_json *list, int train_all)
{
    mft_model       *m = NULL;
    mft_model_desc   d;
    mft_safetensors *g = NULL;
    const mft_json  *node;
    size_t           i;
    memset(&d, 0, sizeof d);
    d.train_all = train_all;
    CHECK_MSG(mft_model_load(ctx, path_of(fixture, "."), &d, &m) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_safetensors_open(ctx, path_of(golden_of, "golden.safetensors"), &g) == MFT_OK, "%s", mft_error_message(ctx));
    for (i = 0; m && g && (node = mft_json_at(list, i, NULL)) != NULL; i++) {
        mft_batch b = read_case(g, mft_json_string(node, NULL));
        check_case(golden_of, m, g, &b, mft_json_string(node, NULL));
    }
    mft_safetensors_close(g);
    mft_model_destroy(m);
}

/* Other forms of the config give the same bits: each is put before the weights through an mft_io. */
typedef struct other_config { const char *config; } other_config;
static void *io_open(void *user, const char *path, uint64_t *bytes)
{
    const char *at = strstr(path, "config.json"), *name = ((other_config *)user)->config;
    char        other[1400];
    FILE       *f;
    if (at && !at[11] && (at == path || at[-1] == '/')) { snprintf(other, sizeof other, "%.*s%s", (int)(at - path), path, name); path = other; }
    f = fopen(path, "rb");
    if (!f) return NULL;
    if (fseek(f, 0, SEEK_END) != 0) { fclose(f); return NULL; }
    *bytes = (uint64_t)ftell(f);
    return f;
}
static size_t io_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    (void)user;
    return fseek((FILE *)file, (long)offset, SEEK_SET) == 0 ? fread(dst, 1, bytes, (FILE *)file) : 0;
}
static void io_close(void *user, void *file) { (void)user; fclose((FILE *)file); }

static uint64_t logits_hash(mft_context *c, const char *fixture)
{
    mft_model  *m = NULL;
    mft_batch   b;
    mft_tensor *y;
    int32_t     ids[24];
    uint64_t    h = 1469598103934665603u;
    size_t      i, n;
    int         k;
    for (k = 0; k < 24; k++) ids[k] = 3 + k * 7 % 40;
    memset(&b, 0, sizeof b);
    b.input_ids = ids; b.batch = 1; b.seq = 24;
    CHECK_MSG(mft_model_load(c, path_of(fixture, "."), NULL, &m) == MFT_OK, "%s", mft_error_message(c));
    y = m ? mft_model_forward(m, &b) : NULL;
    CHECK(y != NULL);
    for (i = 0, n = y ? (size_t)mft_tensor_numel(y) * 4 : 0; i < n; i++) h = (h ^ ((unsigned char *)y->data)[i]) * 1099511628211u;
    mft_step_reset(c);
    mft_model_destroy(m);
    return h;
}

static void run_configs(const char *fixture, const mft_json *list)
{
    uint64_t        own = logits_hash(ctx, fixture);
    const mft_json *node;
    size_t          i;
    for (i = 0; (node = mft_json_at(list, i, NULL)) != NULL; i++) {
        other_config     other;
        mft_context_desc d;
        mft_context     *c = NULL;
        other.config = mft_json_string(node, NULL);
        memset(&d, 0, sizeof d);
        d.kernels = row; d.n_threads = 2;
        d.io.open = io_open; d.io.read = io_read; d.io.close = io_close; d.io.user = &other;
        CHECK(mft_context_create(&d, &c) == MFT_OK);
        CHECK_MSG(logits_hash(c, fixture) == own, "%s: %s gives other logits", fixture, other.config);
        mft_context_destroy(c);
    }
}

/* Gradients with activation checkpointing, and with 1, 2, 3, 5 threads, are those without, bit for bit. */
static void run_same_bits(const char *fixture)
{
    static const struct { int threads, checkpoint; } ways[] = { { 1, 0 }, { 2, 0 }, { 3, 0 }, { 5, 0 }, { 2, 1 } };
    mft_context *keep = ctx;
    uint64_t     first = 0;
    size_t       w;
    for (w = 0; w < sizeof ways / sizeof *ways; w++) {
        mft_model       *m = NULL;
        mft_model_desc   d;
        mft_safetensors *g = NULL;
        mft_tensor      *params[MOST], *loss;
        mft_batch        b;
        uint64_t         h = 1469598103934665603u;
        float            value;
        int              i, n;
        size_t           k;
        ctx = context(ways[w].threads, MFT_PRECISION_F32);
        memset(&d, 0, sizeof d);
        d.train_all = 1; d.grad_checkpointing = ways[w].checkpoint;
        CHECK(mft_model_load(ctx, path_of(fixture, "."), &d, &m) == MFT_OK);
        CHECK(mft_safetensors_open(ctx, path_of(fixture, "golden.safetensors"), &g) == MFT_OK);
        b = read_case(g, "base");
        loss = mft_model_loss(m, &b, 0);
        value = mft_tensor_item(loss);
        CHECK(mft_backward(ctx, loss) == MFT_OK);
        for (k = 0; k < 4; k++) h = (h ^ ((unsigned char *)&value)[k]) * 1099511628211u;
        n = mft_model_params(m, 1, params, MOST);
        for (i = 0; i < n; i++)
            for (k = 0; params[i]->grad && k < (size_t)mft_tensor_numel(params[i]) * 4; k++) h = (h ^ ((unsigned char *)params[i]->grad->data)[k]) * 1099511628211u;
        if (w == 0) first = h;
        CHECK_MSG(h == first, "%s: %d threads, checkpointing %d: other bits", fixture, ways[w].threads, ways[w].checkpoint);
        mft_context_destroy(ctx);
    }
    ctx = keep;
}

static void test_set(void)
{
    char            path[1200];
    const mft_json *fixtures, *about, *node;
    const char     *name, *key;
    size_t          i, k;

    ctx = context(2, MFT_PRECISION_F32);
    if (!ctx) return;
    snprintf(path, sizeof path, "%s/manifest.json", root);
    if (!test_file_exists(path)) { mft_context_destroy(ctx); SKIP("models against Transformers' numbers in %s: it is not there (MFT_TEST_DATA names the folder)", root); }
    CHECK_MSG(mft_json_load(ctx, path, &manifest) == MFT_OK, "%s", mft_error_message(ctx));
    snprintf(path, sizeof path, "%s/floors.json", root);
    CHECK_MSG(mft_json_load(ctx, path, &floors) == MFT_OK, "%s", mft_error_message(ctx));
    fixtures = mft_json_get(manifest, "fixtures");
    CHECK(mft_json_count(fixtures) > 5);
    for (i = 0; (about = mft_json_at(fixtures, i, &name)) != NULL; i++) {
        if (!test_file_exists(path_of(name, "golden.safetensors"))) continue;          /* it shares another's numbers: below */
        run_cases(name, name, mft_json_get(about, "cases"), 1);
        run_cases(name, name, mft_json_get(about, "cases"), 0);
        run_configs(name, mft_json_get(about, "configs"));
        run_train(name, "train_all.safetensors", 1);
        run_train(name, "train_no_norm_bias.safetensors", 0);
        run_generate(name);
        run_same_bits(name);
        for (k = 0; (node = mft_json_at(mft_json_get(about, "lora"), k, &key)) != NULL; k++) run_adapter(name, key, node);
    }
    about = mft_json_get(fixtures, "gpt2");
    run_cases("gpt2_noprefix", "gpt2", mft_json_get(about, "cases"), 1);
    about = mft_json_get(fixtures, "qwen2");
    run_cases("qwen2_sharded", "qwen2", mft_json_get(about, "cases"), 1);
    mft_context_destroy(ctx);
}

/* ---- the same bits for any number of threads ---- */
/* Of a size at which products, attention, norms and the head are cut into several tasks, the last smaller than the others. */
static const char *const bits_configs[] = {
    "{\"model_type\":\"gemma3_text\",\"hidden_size\":52,\"intermediate_size\":90,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
    "\"head_dim\":18,\"vocab_size\":701,\"max_position_embeddings\":64,\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"sliding_window\":11,"
    "\"layer_types\":[\"sliding_attention\",\"full_attention\"],\"hidden_activation\":\"gelu_pytorch_tanh\",\"initializer_range\":0.1}",
    "{\"model_type\":\"qwen2\",\"hidden_size\":56,\"intermediate_size\":90,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
    "\"vocab_size\":701,\"max_position_embeddings\":64,\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"hidden_act\":\"silu\",\"tie_word_embeddings\":false,"
    "\"initializer_range\":0.1}"
};
enum { BITS_ROWS = 2, BITS_SEQ = 41, BITS_STEPS = 2, BITS_NUMBERS = 500000 };

/* Steps of training, all weights or an adapter: of each the loss and the gradients, and at last the weights, one after
 * the other in `out`. returns how many numbers */
static int64_t bits_of(const char *dir, int full, mft_precision precision, int threads, float *out)
{
    mft_context       *c = context(threads, precision);
    mft_model         *m = NULL;
    mft_model_desc     md;
    mft_optimizer     *opt = NULL;
    mft_tensor        *params[MOST], *loss;
    mft_batch          b;
    int32_t            ids[BITS_ROWS * BITS_SEQ], labels[BITS_ROWS * BITS_SEQ];
    int64_t            n = 0, size;
    int                i, count, step;
    memset(&md, 0, sizeof md); memset(&b, 0, sizeof b);
    for (i = 0; i < BITS_ROWS * BITS_SEQ; i++) { ids[i] = 1 + i * i * 7 % 700; labels[i] = i % 5 ? ids[i] : -100; }
    b.input_ids = ids; b.labels = labels; b.batch = BITS_ROWS; b.seq = BITS_SEQ;
    md.train_all = full;
    CHECK_MSG(mft_model_load(c, dir, &md, &m) == MFT_OK && (full || mft_lora_attach(m, NULL) == MFT_OK), "%s", mft_error_message(c));
    count = mft_model_params(m, 1, params, MOST);
    CHECK(mft_optimizer_create(c, NULL, params, NULL, count, &opt) == MFT_OK);
    for (step = 0; step <= BITS_STEPS; step++) {
        if (step < BITS_STEPS) {
            loss = mft_model_loss(m, &b, 0);
            out[n++] = mft_tensor_item(loss);
            CHECK_MSG(mft_backward(c, loss) == MFT_OK, "%s", mft_error_message(c));
        }
        for (i = 0; i < count; i++) {
            const mft_tensor *t = step < BITS_STEPS ? params[i]->grad : params[i];
            size = mft_tensor_numel(t);
            CHECK(n + size <= BITS_NUMBERS);
            memcpy(out + n, t->data, (size_t)size * sizeof *out);
            n += size;
        }
        mft_step_reset(c);
        CHECK_MSG(step == BITS_STEPS || mft_optimizer_step(opt, 1e-2, NULL) == MFT_OK, "%s", mft_error_message(c));
    }
    mft_context_destroy(c);
    return n;
}

static void test_same_bits(void)
{
    static const int threads[] = { 1, 2, 3, 5 };
    float  *first = (float *)malloc(BITS_NUMBERS * sizeof *first), *other = (float *)malloc(BITS_NUMBERS * sizeof *other);
    int     full, precision;
    int64_t n, k;
    size_t  t;
    for (full = 0; full < 2 && first && other; full++) {
        write_file(in_room("config.json"), bits_configs[full], strlen(bits_configs[full]));
        ctx = context(1, MFT_PRECISION_F32);
        CHECK_MSG(mft_model_init(ctx, in_room("config.json"), 3, MFT_BF16, in_room(full ? "full" : "lora")) == MFT_OK, "%s", mft_error_message(ctx));
        mft_context_destroy(ctx);
        for (precision = MFT_PRECISION_F32; precision <= MFT_PRECISION_BF16; precision++) for (t = 0; t < sizeof threads / sizeof *threads; t++) {
            n = bits_of(in_room(full ? "full" : "lora"), full, (mft_precision)precision, threads[t], t ? other : first);
            for (k = 0; t && k < n && !memcmp(first + k, other + k, sizeof *first); k++) { }
            CHECK_MSG(!t || k == n, "%s, %s, %s, %d threads: number %lld of %lld is %.9g, not %.9g", row, full ? "all weights" : "LoRA",
                      precision ? "bf16" : "f32", threads[t], (long long)k, (long long)n, (double)other[k], (double)first[k]);
        }
    }
    free(first); free(other);
}

int main(void)
{
    char large[1100];
    int  i, found = 0;
    snprintf(large, sizeof large, "%s", test_data("golden"));
    if (!room_make(TEST_SUITE)) return 1;
    for (i = 0; (row = mft_kernels_available(i)) != NULL; i++) {
#ifdef TEST_ROW
        if (strcmp(row, TEST_ROW) != 0) continue;
#endif
        found++;
        printf("kernels %s\n", row);
        TEST(test_same_bits);
        root = "tests/golden";
        TEST(test_set);
#ifndef TEST_ROW
        root = large;
        TEST(test_set);
#endif
    }
    if (!found) { test__skipped++; printf("skip: %s: not a row of this machine\n", TEST_SUITE); }
    remove_dir(room);
    return test_report(TEST_SUITE);
}
