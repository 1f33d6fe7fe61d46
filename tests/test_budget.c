/* Training within a memory budget: the plan against the allocator, what is chosen, and that the numbers stay. */
#define _GNU_SOURCE 1
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"
#include "room.h"

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

typedef struct way { int checkpointing, bf16, full, targets_mlp, from_layer, threads; size_t budget; double dropout; } way;

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
    md.train_all = w.full; md.grad_checkpointing = w.checkpointing; md.checkpoint_bf16 = w.bf16;
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
            else {                                              /* forward, recomputed, backward; not the last product of a block; rows of tokens, labels, positions */
                drops -= (f ? 3 : 2) * SEQ - 1;
                CHECK_MSG(drops > 2 * matrices && drops < 4 * matrices && dropped > 2 * (int64_t)plan.weights_mapped, "%lld drops of %d matrices, %lld of %llu bytes", (long long)drops, matrices,
                          (long long)dropped, (unsigned long long)plan.weights_mapped);
                CHECK(p[0].loss == p[1].loss && p[0].grad_norm == p[1].grad_norm);
            }
            mft_context_destroy(ctx);
        }
    }
}

static int64_t most_left;
static void drop_and_look(const char *p, uint64_t bytes)
{
    int64_t left;
    mft__file_drop(p, bytes);
    left = resident_of("model.safetensors", " r--");
    if (left > most_left) most_left = left;
}

/* Weights are used one after the other, so behind each use nothing of their file is resident: not what the system has
 * brought along either. */
static void test_nothing_left(void)
{
    int f;
    for (f = 0; fixtures[f]; f++) {
        mft_context *ctx = NULL;
        mft_model   *m = NULL;
        mft_trainer *tr = NULL;
        mft_progress p;
        mft_batch    b;
        int32_t      ids[SEQ];
        char         dir[200];
        int          i;
        memset(&b, 0, sizeof b);
        snprintf(dir, sizeof dir, "tests/golden/%s", fixtures[f]);
        CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
        CHECK_MSG(mft_model_load(ctx, dir, NULL, &m) == MFT_OK && mft_lora_attach(m, NULL) == MFT_OK && mft_trainer_create(m, NULL, NULL, &tr) == MFT_OK, "%s", mft_error_message(ctx));
        for (i = 0; i < SEQ; i++) ids[i] = i * 7 % (int32_t)m->config.vocab_size;
        b.input_ids = ids; b.batch = 1; b.seq = SEQ;
        CHECK(mft_trainer_step_batch(tr, &b, 1, &p) == MFT_OK);
        if (resident_of("model.safetensors", " r--") <= 0) { mft_context_destroy(ctx); SKIP("this system does not say what is resident"); }
        mft__drop_weights(m);
        ctx->drop_pages = drop_and_look;
        most_left = 0;
        CHECK(mft_trainer_step_batch(tr, &b, 1, &p) == MFT_OK);
        CHECK_MSG(most_left == 0, "%s: %lld KB left", dir, (long long)most_left / 1024);
        mft_context_destroy(ctx);
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

/* ---- weights that come and go ---- */
typedef struct rig { mft_context *ctx; mft_model *m; mft_trainer *tr; int32_t ids[SEQ]; mft_batch b; } rig;

static mft_status rig_make(rig *r, const char *dir, size_t budget, const mft_io *io)
{
    mft_context_desc cd;
    mft_status       s;
    int              i;
    memset(r, 0, sizeof *r); memset(&cd, 0, sizeof cd);
    cd.n_threads = 2; cd.memory_budget = budget;
    if (io) cd.io = *io;
    s = mft_context_create(&cd, &r->ctx);
    if (s == MFT_OK) s = mft_model_load(r->ctx, dir, NULL, &r->m);
    if (s == MFT_OK) s = mft_lora_attach(r->m, NULL);
    if (s == MFT_OK) s = mft_trainer_create(r->m, NULL, NULL, &r->tr);
    for (i = 0; s == MFT_OK && i < SEQ; i++) r->ids[i] = i * 7 % (int32_t)r->m->config.vocab_size;
    r->b.input_ids = r->ids; r->b.batch = 1; r->b.seq = SEQ;
    return s;
}

/* A budget that has no room for all of the weights. */
static size_t tight(const char *dir)
{
    rig      r;
    mft_plan p;
    memset(&p, 0, sizeof p);
    CHECK(rig_make(&r, dir, (size_t)1 << 30, NULL) == MFT_OK && mft_trainer_plan(r.tr, 1, SEQ, &p) == MFT_OK && !p.drops_pages);
    mft_context_destroy(r.ctx);
    return p.total - p.weights_mapped / 3;
}

/* Assets: files that only callbacks can read, one of which can come to an end. */
static struct { uint64_t read, ends_at; int open; } asset;
static void *asset_open(void *user, const char *path, uint64_t *out_bytes)
{
    FILE *f = fopen(path, "rb");
    (void)user;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END); *out_bytes = (uint64_t)ftell(f);
    asset.open++;
    return f;
}
static size_t asset_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    (void)user;
    if (asset.ends_at && offset + bytes > asset.ends_at) return 0;
    asset.read += bytes;
    return fseek((FILE *)file, (long)offset, SEEK_SET) == 0 ? fread(dst, 1, bytes, (FILE *)file) : 0;
}
static void asset_close(void *user, void *file) { (void)user; fclose((FILE *)file); asset.open--; }

#ifndef MFT_NO_MMAP
/* Pages of the file's place that take memory. */
static size_t pages_there(const mft__shard *sh, size_t *all)
{
    static unsigned char map[4096];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = ((size_t)sh->bytes + page - 1) / page, i, there = 0;
    *all = n;
    if (n > sizeof map || mincore((void *)(uintptr_t)sh->base, (size_t)sh->bytes, map) != 0) return (size_t)-1;
    for (i = 0; i < n; i++) there += map[i] & 1;
    return there;
}

/* Assets within a budget: read piece by piece and dropped, again and again; with room enough, once. The numbers are
 * those of the mapped file. One that ends is a sentence, and the step can be done again when it is back. */
static void test_assets(void)
{
    static const char *const names[] = { "qwen2_bf16", "gemma3", "gpt2_f16" };
    mft_io   io;
    int      f;
    memset(&io, 0, sizeof io);
    io.open = asset_open; io.read = asset_read; io.close = asset_close;
    for (f = 0; f < 3; f++) {
        rig          r;
        mft_progress mapped[2], p[2];
        mft_plan     plan;
        char         dir[200];
        size_t       budget, all = 0, left;
        uint64_t     before;
        memset(&plan, 0, sizeof plan);                          /* failed checks go on */
        snprintf(dir, sizeof dir, "tests/golden/%s", names[f]);
        budget = tight(dir);
        CHECK(rig_make(&r, dir, budget, NULL) == MFT_OK);
        CHECK(mft_trainer_step_batch(r.tr, &r.b, 1, &mapped[0]) == MFT_OK && mft_trainer_step_batch(r.tr, &r.b, 1, &mapped[1]) == MFT_OK);
        mft_context_destroy(r.ctx);

        memset(&asset, 0, sizeof asset);
        CHECK(rig_make(&r, dir, budget, &io) == MFT_OK);
        CHECK(mft_trainer_plan(r.tr, 1, SEQ, &plan) == MFT_OK && plan.drops_pages && plan.weights_resident < plan.weights_mapped && plan.total <= budget);
        CHECK_MSG(mft_trainer_step_batch(r.tr, &r.b, 1, &p[0]) == MFT_OK, "%s: %s", names[f], mft_error_message(r.ctx));
        before = asset.read;
        CHECK(mft_trainer_step_batch(r.tr, &r.b, 1, &p[1]) == MFT_OK);
        CHECK_MSG(asset.read - before > plan.weights_mapped * 3 / 2 && asset.read - before < 6 * plan.weights_mapped, "%s: %llu of %llu bytes", names[f],
                  (unsigned long long)(asset.read - before), (unsigned long long)plan.weights_mapped);
        CHECK_MSG(p[0].loss == mapped[0].loss && p[1].loss == mapped[1].loss && p[1].grad_norm == mapped[1].grad_norm, "%s: %.9g and %.9g", names[f], p[1].loss, mapped[1].loss);
        left = pages_there(&r.m->files->shards[0], &all);
        CHECK_MSG(left * 4 <= all, "%s: %llu of %llu pages stay", names[f], (unsigned long long)left, (unsigned long long)all);
        asset.ends_at = r.m->files->shards[0].bytes / 2;
        CHECK(mft_trainer_step_batch(r.tr, &r.b, 1, NULL) == MFT_ERR_IO && strstr(mft_error_message(r.ctx), "model.safetensors: ends at byte"));
        asset.ends_at = 0;
        CHECK_MSG(mft_trainer_step_batch(r.tr, &r.b, 1, NULL) == MFT_OK, "%s", mft_error_message(r.ctx));
        CHECK_MSG(!mft__nonfinite_weight(r.m) && mft_lora_merge(r.m) == MFT_OK, "%s", mft_error_message(r.ctx));
        mft_context_destroy(r.ctx);
        CHECK(asset.open == 0);

        asset.read = 0;
        CHECK(rig_make(&r, dir, (size_t)1 << 30, &io) == MFT_OK && mft_trainer_step_batch(r.tr, &r.b, 1, &p[0]) == MFT_OK);
        before = asset.read;
        CHECK(mft_trainer_step_batch(r.tr, &r.b, 1, &p[1]) == MFT_OK);
        CHECK_MSG(asset.read == before, "%s: %llu bytes read in a step that had room for all", names[f], (unsigned long long)(asset.read - before));
        CHECK(fabs(p[1].loss - mapped[1].loss) < 1e-5 * mapped[1].loss);       /* without recomputing: the last bits of sums */
        mft_context_destroy(r.ctx);
    }
}

/* A mapped file that is cut while in use: IO with its name and both lengths in every mode, no signal; weights, moments
 * and position are as before the step, which is done again when the file is whole. */
static void test_shortened(void)
{
    static char bytes[1 << 22];
    int         tightly;
    for (tightly = 0; tightly < 2; tightly++) {
        static const char *const names[] = { "config.json", "model.safetensors" };
        size_t       n = 0, budget = tight("tests/golden/qwen2_bf16");
        rig          r, whole;
        mft_progress p, want;
        int          i;
        for (i = 0; i < 2; i++) {
            char  from[200];
            FILE *f;
            snprintf(from, sizeof from, "tests/golden/qwen2_bf16/%s", names[i]);
            f = fopen(from, "rb");
            n = f ? fread(bytes, 1, sizeof bytes, f) : 0;
            if (f) fclose(f);
            write_file(in_room(names[i]), bytes, n);
        }
        CHECK(rig_make(&whole, "tests/golden/qwen2_bf16", tightly ? budget : 0, NULL) == MFT_OK && rig_make(&r, room, tightly ? budget : 0, NULL) == MFT_OK);
        CHECK(mft_trainer_step_batch(whole.tr, &whole.b, 1, NULL) == MFT_OK && mft_trainer_step_batch(r.tr, &r.b, 1, NULL) == MFT_OK);
        CHECK(truncate(in_room("model.safetensors"), (off_t)n / 2) == 0);
        CHECK_MSG(mft_trainer_step_batch(r.tr, &r.b, 1, NULL) == MFT_ERR_IO && strstr(mft_error_message(r.ctx), "model.safetensors: was shortened to"), "%s", mft_error_message(r.ctx));
        CHECK(!mft__nonfinite_weight(r.m));
        CHECK(mft_lora_merge(r.m) == MFT_ERR_IO);
        write_file(in_room("model.safetensors"), bytes, n);
        CHECK_MSG(mft_trainer_step_batch(r.tr, &r.b, 1, &p) == MFT_OK, "%s", mft_error_message(r.ctx));
        CHECK(mft_trainer_step_batch(whole.tr, &whole.b, 1, &want) == MFT_OK && p.loss == want.loss && p.grad_norm == want.grad_norm);
        mft_context_destroy(r.ctx); mft_context_destroy(whole.ctx);
    }
}
#else
static void test_assets(void)    { SKIP("no mapping in this build"); }
static void test_shortened(void) { SKIP("no mapping in this build"); }
#endif

/* Blocks' inputs kept in bf16: the first loss to the bit, gradients to the rounding of 2^-9 and not closer, less kept. */
static void test_bf16_checkpoints(void)
{
    int f, full;
    for (f = 0; fixtures[f]; f++)
        for (full = 0; full < 2; full++) {
            way    w;
            run    exact, half;
            double gap;
            memset(&w, 0, sizeof w);
            w.checkpointing = 1; w.full = full; w.targets_mlp = 1;
            CHECK(train(fixtures[f], w, &exact) == MFT_OK);
            w.bf16 = 1;
            CHECK_MSG(train(fixtures[f], w, &half) == MFT_OK, "%s", half.error);
            gap = fabs(half.norm[0] - exact.norm[0]) / exact.norm[0];
            CHECK_MSG(half.loss[0] == exact.loss[0] && gap < 4e-3 && gap > 1e-7, "%s, full %d: loss %.9g and %.9g, norms apart by %.2g", fixtures[f], full, exact.loss[0], half.loss[0], gap);
            CHECK_MSG(fabs(half.loss[STEPS - 1] - exact.loss[STEPS - 1]) < 1e-2 * exact.loss[STEPS - 1], "%s: %.9g and %.9g", fixtures[f], exact.loss[STEPS - 1], half.loss[STEPS - 1]);
            CHECK_MSG(half.plan.activations < exact.plan.activations && half.plan.step <= exact.plan.step, "%s: activations %llu and %llu, steps %llu and %llu", fixtures[f],
                      (unsigned long long)exact.plan.activations, (unsigned long long)half.plan.activations, (unsigned long long)exact.plan.step, (unsigned long long)half.plan.step);
            CHECK(half.peak <= exact.peak && half.after[STEPS - 1] == half.after[1]);
            free(exact.weights); free(half.weights);
        }
}

/* ---- what steps take: no more the longer they go on, linear in tokens, nothing for a vocabulary ---- */
static size_t given, most_given;            /* what the allocator has out, to the byte */
static void *count_alloc(void *user, size_t bytes, size_t align)
{
    void *p = NULL;
    (void)user;
    if (posix_memalign(&p, align, bytes) != 0) return NULL;
    given += bytes;
    if (given > most_given) most_given = given;
    return p;
}
static void count_free(void *user, void *p, size_t bytes) { (void)user; given -= bytes; free(p); }

/* 500 steps that are more than three epochs of rows of all lengths, evaluations among them: nothing grows behind step 2,
 * and with the context all is back. */
static void test_constant(void)
{
    int budgeted;
    for (budgeted = 0; budgeted < 2; budgeted++) {
        mft_context_desc  cd;
        mft_dataset_desc  dd;
        mft_trainer_desc  td;
        mft_context      *ctx = NULL;
        mft_model        *m = NULL;
        mft_dataset      *data = NULL;
        mft_trainer      *tr = NULL;
        mft_progress      p;
        size_t            now = 0, peak = 0, resident = 0;
        int32_t           ids[80];
        int               i, n = 0;
        memset(&cd, 0, sizeof cd); memset(&dd, 0, sizeof dd); memset(&td, 0, sizeof td); memset(&p, 0, sizeof p);
        given = most_given = 0;
        cd.allocator.alloc = count_alloc; cd.allocator.free = count_free; cd.n_threads = 2;
        cd.memory_budget = budgeted ? (size_t)6 << 20 : 0;
        dd.max_seq_len = 80; dd.no_pack = 1; td.micro_batch = 2; td.grad_accum = 2;
        CHECK(mft_context_create(&cd, &ctx) == MFT_OK && mft_model_load(ctx, "tests/golden/qwen2_bf16", NULL, &m) == MFT_OK && mft_lora_attach(m, NULL) == MFT_OK);
        CHECK(mft_dataset_create(ctx, NULL, &dd, &data) == MFT_OK);
        for (i = 0; i < 80; i++) ids[i] = i * 7 % 53;
        for (i = 0; i < 500; i++) CHECK(mft_dataset_add_tokens(data, ids, NULL, 4 + i * 37 % 77) == MFT_OK);
        CHECK_MSG(mft_trainer_create(m, data, &td, &tr) == MFT_OK, "%s", mft_error_message(ctx));
        for (i = 1; i <= 500 && tr && n < 10; i++) {
            mft_eval e;
            CHECK_MSG(mft_trainer_step(tr, &p) == MFT_OK, "%s", mft_error_message(ctx));
            if (i == 2 || i % 100 == 0) CHECK(mft_trainer_evaluate(tr, data, 20, &e) == MFT_OK);
            if (i == 2) { now = given; peak = most_given; mft_process_memory(&resident, NULL); }
            if (i > 2) n += given != now || most_given != peak;
        }
        CHECK_MSG(n == 0 && p.epoch >= 3, "%llu bytes after step 2, %llu after step %d; at most %llu and %llu; epoch %lld", (unsigned long long)now, (unsigned long long)given, i - 1,
                  (unsigned long long)peak, (unsigned long long)most_given, (long long)p.epoch);
        mft_process_memory(&now, NULL);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)       /* which keep what is freed; the counts above hold there too */
        CHECK_MSG(now <= resident + (256 << 10), "resident %llu behind step 2, %llu at the end", (unsigned long long)resident, (unsigned long long)now);
#endif
        mft_context_destroy(ctx);
        CHECK_MSG(given == 0, "%llu bytes are not back", (unsigned long long)given);
    }
}

/* A model of a config, random, in a directory of its own. */
static const char *make_model(const char *name, int vocab, int positions)
{
    char         config[600];
    mft_context *ctx = NULL;
    snprintf(config, sizeof config, "{\"model_type\":\"qwen2\",\"hidden_size\":32,\"intermediate_size\":96,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
             "\"num_hidden_layers\":4,\"rms_norm_eps\":1e-6,\"rope_theta\":10000.0,\"tie_word_embeddings\":true,\"vocab_size\":%d,\"max_position_embeddings\":%d}", vocab, positions);
    write_file(in_room("big.json"), config, strlen(config));
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    CHECK_MSG(mft_model_init(ctx, in_room("big.json"), 1, MFT_BF16, in_room(name)) == MFT_OK, "%s", mft_error_message(ctx));
    mft_context_destroy(ctx);
    return in_room(name);
}

static mft_plan plan_of(const char *dir, int seq)
{
    rig      r;
    mft_plan p;
    memset(&p, 0, sizeof p);
    CHECK(rig_make(&r, dir, 0, NULL) == MFT_OK);
    CHECK_MSG(mft_trainer_plan(r.tr, 1, seq, &p) == MFT_OK, "%s", mft_error_message(r.ctx));
    mft_context_destroy(r.ctx);
    return p;
}

static void test_scaling(void)
{
    const char *dir = make_model("small", 4096, 4096);
    size_t      step[5];
    int         i;
    for (i = 0; i < 5; i++) step[i] = plan_of(dir, 256 << i).step;
    for (i = 2; i < 5; i++) {                                   /* bytes a token, of each doubling; the head's tile is full from 512 rows on */
        double slope = (double)(step[i] - step[i - 1]) / (128 << i), last = (double)(step[4] - step[3]) / 2048;
        CHECK_MSG(fabs(slope - last) < 0.03 * last, "%d to %d tokens: %.0f bytes a token; 2048 to 4096: %.0f", 128 << i, 256 << i, slope, last);
    }
    for (i = 0; i < 3; i++) {
        char name[20];
        snprintf(name, sizeof name, "vocabulary%d", i);
        step[i] = plan_of(make_model(name, 4096 << 2 * i, 512), 512).step;
    }
    CHECK_MSG(step[0] == step[1] && step[1] == step[2], "4096: %llu, 16384: %llu, 65536: %llu bytes", (unsigned long long)step[0], (unsigned long long)step[1], (unsigned long long)step[2]);
}

/* A window of many micro-batches has one set of gradients, and the sum is the same however it is cut, down to one sequence. */
static void test_accumulation(void)
{
    static const int pieces[] = { 1, 2, 4 };
    double loss[3], norm[3];
    size_t gradients[3], peak[3];
    int    k, i;
    for (k = 0; k < 3; k++) {
        rig          r;
        mft_progress p;
        mft_batch    b[4];
        int32_t      ids[4 * SEQ];
        int          n = 4 / pieces[k];
        CHECK(rig_make(&r, "tests/golden/gemma3", 0, NULL) == MFT_OK);
        for (i = 0; i < 4 * SEQ; i++) ids[i] = i * 13 % (int32_t)r.m->config.vocab_size;
        for (i = 0; i < n; i++) { b[i] = r.b; b[i].batch = pieces[k]; b[i].input_ids = ids + i * pieces[k] * SEQ; }
        CHECK_MSG(mft_trainer_step_batch(r.tr, b, n, &p) == MFT_OK, "%s", mft_error_message(r.ctx));
        loss[k] = p.loss; norm[k] = p.grad_norm; gradients[k] = p.memory.gradients; peak[k] = p.memory.step_peak;
        CHECK(fabs(loss[k] - loss[0]) < 3e-6 * loss[0] && fabs(norm[k] - norm[0]) < 1e-5 * norm[0]);
        CHECK(gradients[k] == gradients[0] && gradients[k] > 0 && peak[k] >= peak[0]);
        mft_context_destroy(r.ctx);
    }
}

int main(void)
{
    if (!room_make("budget")) return 1;
    TEST(test_constant);
    TEST(test_scaling);
    TEST(test_accumulation);
    TEST(test_bf16_checkpoints);
    TEST(test_assets);
    TEST(test_shortened);
    TEST(test_pieces);
    TEST(test_refusal);
    TEST(test_levers_change_nothing);
    TEST(test_budgets);
    TEST(test_drops);
    TEST(test_nothing_left);
    TEST(test_below_the_lowest);
    remove_dir(room);
    return test_report("budget");
}
