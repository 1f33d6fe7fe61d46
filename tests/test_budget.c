/* Training within a memory budget: the plan against the allocator, what is chosen, and that the numbers stay. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"

enum { BATCH = 4, SEQ = 24, STEPS = 3, MAX_PARAMS = 256 };

static const char *const fixtures[] = { "gpt2", "gemma3", "qwen2_bf16", "llama", NULL };

static int64_t dropped, drops;              /* bytes, calls */
static void count_drop(const char *p, uint64_t bytes) { (void)p; drops++; dropped += (int64_t)bytes; }

typedef struct run {
    double    loss[STEPS], norm[STEPS];
    float    *weights;                      /* all that was trained, afterwards */
    int64_t   n;
    mft_plan  plan;
    size_t    after[STEPS], peak;
    char      error[1024];
} run;

typedef struct way { int checkpointing, full, targets_mlp, from_layer, threads; size_t budget; double dropout; } way;

/* Trains some steps on one batch. */
static mft_status train(const char *fixture, way w, run *r)
{
    mft_context_desc cd;
    mft_model_desc   md;
    mft_lora_desc    ld;
    mft_trainer_desc td;
    mft_memory_report memory;
    mft_context *ctx = NULL;
    mft_model   *m = NULL;
    mft_trainer *tr = NULL;
    mft_tensor  *params[MAX_PARAMS];
    char         dir[200];
    int32_t      ids[BATCH * SEQ], documents[BATCH * SEQ];
    mft_batch    b;
    int          i, n, step;
    uint32_t     seed = 5;
    mft_status   s;
    memset(r, 0, sizeof *r);
    memset(&cd, 0, sizeof cd); memset(&md, 0, sizeof md); memset(&ld, 0, sizeof ld); memset(&td, 0, sizeof td); memset(&b, 0, sizeof b);
    cd.n_threads = w.threads ? w.threads : 2; cd.memory_budget = w.budget; cd.seed = 3;
    md.train_all = w.full; md.grad_checkpointing = w.checkpointing;
    ld.rank = 4; ld.targets = w.targets_mlp ? "all-linear" : NULL; ld.dropout = (float)w.dropout;
    if (w.from_layer) ld.targets = ".*\\.1\\..*(c_attn|q_proj)";
    td.learning_rate = 1e-2; td.micro_batch = BATCH;
    snprintf(dir, sizeof dir, "tests/golden/%s", fixture);
    if ((s = mft_context_create(&cd, &ctx)) != MFT_OK) return s;
    if ((s = mft_model_load(ctx, dir, &md, &m)) != MFT_OK) goto done;
    if (!w.full && (s = mft_lora_attach(m, &ld)) != MFT_OK) goto done;
    if ((s = mft_trainer_create(m, NULL, &td, &tr)) != MFT_OK) goto done;
    for (i = 0; i < BATCH * SEQ; i++) {
        seed = seed * 1664525u + 1013904223u;
        ids[i] = (int32_t)((seed >> 10) % (uint32_t)m->config.vocab_size);
        documents[i] = i % SEQ / 9;
    }
    b.input_ids = ids; b.document_ids = documents; b.batch = BATCH; b.seq = SEQ;
    if ((s = mft_trainer_plan(tr, BATCH, SEQ, &r->plan)) != MFT_OK) goto done;
    for (step = 0; step < STEPS && s == MFT_OK; step++) {
        mft_progress p;
        s = mft_trainer_step_batch(tr, &b, 1, &p);
        if (s == MFT_OK && ctx->drop_pages) ctx->drop_pages = count_drop;
        if (s != MFT_OK) break;
        r->loss[step] = p.loss; r->norm[step] = p.grad_norm;
        mft_memory(ctx, &memory);
        r->after[step] = memory.now; r->peak = memory.peak;
    }
    if (s != MFT_OK) goto done;
    n = mft_model_params(m, 1, params, MAX_PARAMS);
    for (i = 0; i < n; i++) r->n += mft_tensor_numel(params[i]);
    r->weights = (float *)malloc((size_t)r->n * sizeof(float));
    for (i = 0, r->n = 0; i < n; i++) {
        memcpy(r->weights + r->n, params[i]->data, (size_t)mft_tensor_numel(params[i]) * sizeof(float));
        r->n += mft_tensor_numel(params[i]);
    }
done:
    snprintf(r->error, sizeof r->error, "%s", mft_error_message(ctx));
    mft_context_destroy(ctx);
    return s;
}

/* The same losses, norms and weights, but for the last bits of sums. Adam's first steps have the sign of a gradient,
 * whatever its size: weights whose gradient is noise may differ by a step. */
static void same(const char *what, const run *a, const run *b)
{
    int64_t i, far = 0;
    int     step;
    for (step = 0; step < STEPS; step++) {
        double tolerance = step ? 1e-4 : 3e-6;
        CHECK_MSG(fabs(a->loss[step] - b->loss[step]) < tolerance * a->loss[step], "%s: step %d has loss %.9g, not %.9g", what, step, b->loss[step], a->loss[step]);
        CHECK_MSG(fabs(a->norm[step] - b->norm[step]) < 3 * tolerance * a->norm[step], "%s: step %d has norm %.9g, not %.9g", what, step, b->norm[step], a->norm[step]);
    }
    CHECK(a->n == b->n && a->n > 0);
    for (i = 0; i < a->n && i < b->n; i++) far += !(fabsf(a->weights[i] - b->weights[i]) < 1e-3f);
    CHECK_MSG(far * 200 <= a->n, "%s: %lld of %lld weights are elsewhere", what, (long long)far, (long long)a->n);
}

/* What cannot be done is refused before a step, with the parts of what it takes and what each lever would save. */
static void test_refusal(void)
{
    static const char *const words[] = { "memory budget of", "too small", "tokens at a time", "a step takes", "tokenizer", "would save", "half the rank", "SGD", NULL };
    way w;
    run r;
    int i;
    memset(&w, 0, sizeof w);
    w.budget = (size_t)4250 << 10;                              /* the process alone is counted with 4 MB */
    CHECK(train("qwen2_bf16", w, &r) == MFT_ERR_OUT_OF_MEMORY);
    for (i = 0; words[i]; i++) CHECK_MSG(strstr(r.error, words[i]) != NULL, "\"%s\" is not in \"%s\"", words[i], r.error);
    free(r.weights);
}

/* All blocks recomputed, some, none: nothing changes; what is planned is what is taken. */
static void test_levers_change_nothing(void)
{
    int f, full;
    for (f = 0; fixtures[f]; f++)
        for (full = 0; full < 2; full++) {
            way w;
            run plain, other;
            char what[100];
            memset(&w, 0, sizeof w);
            w.full = full; w.checkpointing = -1; w.targets_mlp = 1;
            CHECK_MSG(train(fixtures[f], w, &plain) == MFT_OK, "%s", plain.error);
            CHECK(plain.plan.blocks_recomputed == 0 && !plain.plan.drops_pages && plain.plan.micro_batch == BATCH);
            w.checkpointing = 1;
            CHECK_MSG(train(fixtures[f], w, &other) == MFT_OK, "%s", other.error);
            CHECK(other.plan.blocks_recomputed == other.plan.blocks && other.plan.step < plain.plan.step);
            snprintf(what, sizeof what, "%s, full %d, all recomputed", fixtures[f], full);
            same(what, &plain, &other);
            free(other.weights);
            free(plain.weights);
        }
}

/* Budgets from too little to plenty: never passed, kept from the second step on, the same numbers, and more work the
 * less there is. */
static void test_budgets(void)
{
    int f;
    for (f = 0; fixtures[f]; f++) {
        way    w;
        run    plain, r;
        size_t least = 0, budget;
        int    last_batch = 0, last_recomputed = 1000, splits = 0, recomputes = 0;
        char   what[100];
        memset(&w, 0, sizeof w);
        w.threads = 1; w.checkpointing = -1; w.full = f == 0; w.targets_mlp = f == 1;   /* workspaces are per thread: alone, the levers show */
        CHECK(train(fixtures[f], w, &plain) == MFT_OK);
        w.checkpointing = 0;
        for (budget = plain.plan.total / 100 * 102; budget > ((size_t)4 << 20) && !least; budget -= plain.plan.step / 48) {
            mft_status s;
            w.budget = budget;
            s = train(fixtures[f], w, &r);
            snprintf(what, sizeof what, "%s with %llu bytes", fixtures[f], (unsigned long long)budget);
            if (s != MFT_OK) { CHECK_MSG(s == MFT_ERR_OUT_OF_MEMORY, "%s: %s", what, r.error); least = budget; break; }
            CHECK_MSG(r.plan.total <= budget && r.peak + r.plan.weights_resident + r.plan.process <= budget + (16 << 10), "%s: planned %llu, peak %llu", what, (unsigned long long)r.plan.total, (unsigned long long)r.peak);
            CHECK_MSG(r.after[STEPS - 1] == r.after[1], "%s: %llu bytes after step 2, %llu after step %d", what, (unsigned long long)r.after[1], (unsigned long long)r.after[STEPS - 1], STEPS);
            CHECK(last_batch == 0 || r.plan.micro_batch <= last_batch);
            CHECK(last_recomputed == 1000 || r.plan.blocks_recomputed >= last_recomputed);
            last_batch = r.plan.micro_batch; last_recomputed = r.plan.blocks_recomputed;
            splits += r.plan.micro_batch < BATCH; recomputes += r.plan.blocks_recomputed > 0;
            same(what, &plain, &r);
            free(r.weights);
        }
        CHECK_MSG(least && splits > 2 && (recomputes || f), "%s: refused at %llu, %d split, %d recomputed", fixtures[f], (unsigned long long)least, splits, recomputes);
        free(plain.weights);
    }
}

/* Pages of mapped weights go behind each use, in both passes; dropout draws the same again. */
static void test_drops(void)
{
    static const char *const names[] = { "qwen2_bf16", "gpt2_f16" };
    int f;
    for (f = 0; f < 2; f++) {
        mft_context   *ctx = NULL;
        mft_model     *m = NULL;
        mft_trainer   *tr = NULL;
        mft_model_desc md;
        mft_lora_desc  ld;
        mft_progress   p[2];
        mft_plan       plan;
        mft_batch      b;
        int32_t        ids[SEQ];
        char           dir[200];
        int            i, k, matrices = 0;
        for (k = 0; k < 2; k++) {                               /* without and with */
            memset(&md, 0, sizeof md); memset(&ld, 0, sizeof ld); memset(&b, 0, sizeof b);
            md.grad_checkpointing = 1; ld.dropout = 0.3f;
            snprintf(dir, sizeof dir, "tests/golden/%s", names[f]);
            CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
            CHECK_MSG(mft_model_load(ctx, dir, &md, &m) == MFT_OK && mft_lora_attach(m, &ld) == MFT_OK && mft_trainer_create(m, NULL, NULL, &tr) == MFT_OK, "%s", mft_error_message(ctx));
            for (i = 0; i < SEQ; i++) ids[i] = i * 7 % (int32_t)m->config.vocab_size;
            b.input_ids = ids; b.batch = 1; b.seq = SEQ;
            CHECK(mft_trainer_plan(tr, 1, SEQ, &plan) == MFT_OK);
            CHECK(mft_trainer_step_batch(tr, &b, 1, &p[k]) == MFT_OK);
            if (k) ctx->drop_pages = count_drop;
            drops = dropped = 0;
            CHECK(mft_trainer_step_batch(tr, &b, 1, &p[k]) == MFT_OK);
            for (i = 0, matrices = 0; i < m->n_params; i++) matrices += mft__of(m->params[i].t)->paged;
            if (!k) CHECK(drops == 0);
            else {                                              /* forward, recomputed, backward; not the last product of a block */
                CHECK_MSG(drops > 2 * matrices && drops < 4 * matrices && dropped > 2 * (int64_t)plan.weights_mapped, "%lld drops of %d matrices, %lld of %llu bytes", (long long)drops, matrices,
                          (long long)dropped, (unsigned long long)plan.weights_mapped);
                CHECK(p[0].loss == p[1].loss && p[0].grad_norm == p[1].grad_norm);
            }
            mft_context_destroy(ctx);
        }
    }
}

/* Blocks below the lowest that is trained save nothing, and are not run again. */
static void test_below_the_lowest(void)
{
    static const char *const names[] = { "gpt2", "qwen2_bf16" };
    int f;
    for (f = 0; f < 2; f++) {
        way w;
        run all, upper, none;
        memset(&w, 0, sizeof w);
        w.checkpointing = 1;
        CHECK(train(names[f], w, &all) == MFT_OK);
        w.from_layer = 1;
        CHECK_MSG(train(names[f], w, &upper) == MFT_OK, "%s", upper.error);
        CHECK(upper.plan.blocks_recomputed < all.plan.blocks_recomputed && upper.plan.activations <= all.plan.activations);
        w.checkpointing = -1;
        CHECK(train(names[f], w, &none) == MFT_OK);
        same(names[f], &none, &upper);
        free(all.weights); free(upper.weights); free(none.weights);
    }
}

/* MLPs of a few tokens at a time: the gradients of all weights are those of whole rows. */
static void test_pieces(void)
{
    static const int64_t rows[] = { 1000, 7, 1 };
    int f, k, i, n;
    for (f = 0; fixtures[f]; f++) {
        float  *first = NULL;
        float   loss[3];
        for (k = 0; k < 3; k++) {
            mft_context   *ctx = NULL;
            mft_model     *m = NULL;
            mft_model_desc md;
            mft_tensor    *params[MAX_PARAMS], *l;
            mft_batch      b;
            int32_t        ids[2 * SEQ];
            int64_t        at = 0, j;
            double         far = 0, size = 0;
            char           dir[200];
            memset(&md, 0, sizeof md); memset(&b, 0, sizeof b);
            md.train_all = 1; md.grad_checkpointing = 1;
            snprintf(dir, sizeof dir, "tests/golden/%s", fixtures[f]);
            CHECK(mft_context_create(NULL, &ctx) == MFT_OK && mft_model_load(ctx, dir, &md, &m) == MFT_OK);
            m->mlp_rows = rows[k];
            for (i = 0; i < 2 * SEQ; i++) ids[i] = i * 11 % (int32_t)m->config.vocab_size;
            b.input_ids = ids; b.batch = 2; b.seq = SEQ;
            l = mft_model_loss(m, &b, 0);
            CHECK_MSG(mft_backward(ctx, l) == MFT_OK, "%s", mft_error_message(ctx));
            loss[k] = mft_tensor_item(l);
            n = mft_model_params(m, 1, params, MAX_PARAMS);
            if (!first) {
                for (i = 0, j = 0; i < n; i++) j += mft_tensor_numel(params[i]);
                first = (float *)malloc((size_t)j * sizeof *first);
            }
            for (i = 0; i < n; i++) {
                const float *g = (const float *)params[i]->grad->data;
                for (j = 0; j < mft_tensor_numel(params[i]); j++, at++) {
                    if (!k) first[at] = g[j];
                    far += (double)(g[j] - first[at]) * (g[j] - first[at]); size += (double)first[at] * first[at];
                }
            }
            CHECK_MSG(fabsf(loss[k] - loss[0]) < 2e-6f * loss[0] && far <= 1e-10 * size && size > 0, "%s, %lld rows: loss %.9g and %.9g, gradients apart by %.2g", fixtures[f], (long long)rows[k],
                      (double)loss[0], (double)loss[k], sqrt(far / size));
            mft_context_destroy(ctx);
        }
        free(first);
    }
}

int main(void)
{
    TEST(test_pieces);
    TEST(test_refusal);
    TEST(test_levers_change_nothing);
    TEST(test_budgets);
    TEST(test_drops);
    TEST(test_below_the_lowest);
    return test_report("budget");
}
