/* Few bits: frozen bases held as q8_0 and q4_0 - the blocks, what a model keeps as it is, perplexity, LoRA on top - and
 * full fine-tuning with 8-bit moments and bf16 masters beside f32. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"

/* A trained model, text to train it on and text held out. */
typedef struct place { const char *base, *train, *held; } place;

static const place demo = { "examples/demo/base", "examples/demo/train.jsonl", "examples/demo/test.jsonl" };

/* A model of the assets with abstracts, of which it has seen none; NULL without the assets. */
static const place *asset(const char *name)
{
    static char  base[900], config[920], train[900], held[900];
    static place p = { base, train, held };
    snprintf(base, sizeof base, "%s/%s", test_data("assets/models"), name);
    snprintf(config, sizeof config, "%s/config.json", base);
    snprintf(train, sizeof train, "%s", test_data("assets/text/pubmedqa/contexts_train.txt"));
    snprintf(held, sizeof held, "%s", test_data("assets/text/pubmedqa/contexts_valid.txt"));
    return test_file_exists(config) && test_file_exists(train) && test_file_exists(held) ? &p : NULL;
}

/* Blocks worked out by hand: -16 .. 15 has the greatest magnitude 16, at a negative number. */
static void test_blocks(void)
{
    float   x[64], y[64];
    uint8_t b[2 * 34];
    int     k, dtype;
    for (k = 0; k < 32; k++) { x[k] = (float)(k - 16); x[k + 32] = 0; }
    mft__from_float(b, MFT_Q4_0, x, 64);
    CHECK(b[0] == 0x00 && b[1] == 0x40);                        /* 2 in f16: -16 / -8 */
    CHECK(b[2] == (0 | 8 << 4) && b[3] == (1 | 9 << 4) && b[2 + 15] == (8 | 15 << 4));      /* (x / 2 + 8.5) cut; 16 becomes 15 */
    CHECK(b[18] == 0 && (b[19] & 0x7f) == 0);                           /* all zero: scale 0 */
    mft__to_float(y, b, MFT_Q4_0, 64);
    for (k = 0; k < 32; k++) CHECK(fabsf(y[k] - x[k]) <= 1 && y[k + 32] == 0);
    for (k = 0; k < 32; k++) x[k] = (float)(k * 4);             /* 0 .. 124 */
    x[31] = -127;
    mft__from_float(b, MFT_Q8_0, x, 64);
    CHECK(b[0] == 0x00 && b[1] == 0x3c && b[2] == 0 && b[2 + 30] == 120 && b[2 + 31] == (uint8_t)-127);
    for (dtype = MFT_Q8_0; dtype <= MFT_Q4_0; dtype++) {        /* half a step, and the rounding of the scale; at the clipped end a whole one */
        uint32_t seed = 7;
        float    most = 0, step;
        for (k = 0; k < 32; k++) { x[k] = test_random(&seed) * 0.05f; if (fabsf(x[k]) > most) most = fabsf(x[k]); }
        step = most / (dtype == MFT_Q8_0 ? 127 : 8);
        mft__from_float(b, (mft_dtype)dtype, x, 32);
        mft__to_float(y, b, (mft_dtype)dtype, 32);
        for (k = 0; k < 32; k++) CHECK(fabsf(x[k] - y[k]) <= step * (dtype == MFT_Q8_0 ? 0.57f : 1.01f));
        x[3] = INFINITY;
        mft__from_float(b, (mft_dtype)dtype, x, 32);
        mft__to_float(y, b, (mft_dtype)dtype, 32);
        CHECK(y[0] != y[0]);
    }
}

static void open_texts(mft_context *ctx, const place *at, int max_seq_len, mft_dataset **data, mft_dataset **held)
{
    mft_tokenizer   *tok = NULL;
    mft_dataset_desc d;
    memset(&d, 0, sizeof d);
    d.max_seq_len = max_seq_len;
    CHECK_MSG(mft_tokenizer_load(ctx, at->base, &tok) == MFT_OK && mft_dataset_create(ctx, tok, &d, data) == MFT_OK && mft_dataset_load(*data, at->train) == MFT_OK
              && mft_dataset_create(ctx, tok, &d, held) == MFT_OK && mft_dataset_load(*held, at->held) == MFT_OK, "%s: %s", at->base, mft_error_message(ctx));
}

typedef struct seen { double before, after; size_t held, peak_over; int quantized, other; } seen;

/* Perplexity of what is held out before and after some steps of LoRA on every matrix. */
static seen learn(const place *at, const char *weights, int steps)
{
    mft_context     *ctx = NULL;
    mft_model       *m = NULL;
    mft_trainer     *tr = NULL;
    mft_dataset     *data = NULL, *held = NULL;
    mft_model_desc   md;
    mft_lora_desc    ld;
    mft_trainer_desc td;
    mft_memory_report r;
    mft_eval         e;
    int              i;
    seen             s;
    memset(&s, 0, sizeof s);
    memset(&md, 0, sizeof md); memset(&ld, 0, sizeof ld); memset(&td, 0, sizeof td);
    md.weights = weights;
    ld.targets = "all-linear"; ld.seed = 1;
    td.learning_rate = 1e-3; td.micro_batch = 4;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    CHECK_MSG(mft_model_load(ctx, at->base, &md, &m) == MFT_OK, "%s", mft_error_message(ctx));
    if (!m) exit(1);
    mft_memory(ctx, &r);
    s.held = r.weights; s.peak_over = r.peak - r.now;
    for (i = 0; i < m->n_params; i++) {
        const mft_tensor *t = m->params[i].t;
        int               block = strstr(m->params[i].name, ".layers.") != NULL || strstr(m->params[i].name, ".h.") != NULL;
        s.quantized += mft__is_quantized(t->dtype);
        s.other     += t->ndim == 2 && !mft__is_quantized(t->dtype);
        CHECK_MSG(!mft__is_quantized(t->dtype) || (block && t->ndim == 2), "%s is %s", m->params[i].name, mft_dtype_name(t->dtype));
    }
    CHECK(mft_lora_attach(m, &ld) == MFT_OK);
    open_texts(ctx, at, 64, &data, &held);
    CHECK(mft_trainer_create(m, data, &td, &tr) == MFT_OK && mft_trainer_evaluate(tr, held, 6, &e) == MFT_OK);
    s.before = e.perplexity;
    CHECK_MSG(mft_trainer_run(tr, steps) == MFT_OK && mft_trainer_evaluate(tr, held, 6, &e) == MFT_OK, "%s", mft_error_message(ctx));
    s.after = e.perplexity;
    if (weights) {                                              /* what would write the base back says no */
        CHECK(mft_lora_merge(m) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "quantised"));
        mft_trainer_destroy(tr);
        mft_lora_detach(m);
        CHECK(mft_model_save(m, "build/never") == MFT_ERR_UNSUPPORTED && !test_file_exists("build/never/config.json"));
    }
    mft_context_destroy(ctx);
    return s;
}

/* After training q8_0 costs less than 0.5 % of perplexity and q4_0 less than 5 %: what a user of either is told to expect.
 * Seen, before and after: the demonstration's model 0.08 and 0.01 %, 0.5 and 0.02 %; stories260k-qwen2, whose rows are of 64,
 * 0.03 and 0.02 %, 4.8 and 4.1 %; gemma3-shakespeare 0.2 and 0.06 %, 0.3 and 1.2 %. */
static void compare(const place *at, int steps)
{
    seen f = learn(at, NULL, steps), q8 = learn(at, "q8_0", steps), q4 = learn(at, "q4_0", steps);
    if (getenv("MFT_TEST_VERBOSE"))
        printf("seen %s: perplexity %.4f, then %.4f; q8_0 %+.3f %%, %+.3f %%; q4_0 %+.3f %%, %+.3f %%\n", at->base, f.before, f.after,
               (q8.before / f.before - 1) * 100, (q8.after / f.after - 1) * 100, (q4.before / f.before - 1) * 100, (q4.after / f.after - 1) * 100);
    CHECK(f.quantized == 0 && q8.quantized > 4 && q8.quantized == q4.quantized && q8.other >= 1);
    CHECK_MSG(fabs(q8.before / f.before - 1) < 0.005 && fabs(q8.after / f.after - 1) < 0.005, "q8_0: %.4f and %.4f, not %.4f and %.4f", q8.before, q8.after, f.before, f.after);
    CHECK_MSG(fabs(q4.before / f.before - 1) < 0.1 && fabs(q4.after / f.after - 1) < 0.05, "q4_0: %.4f and %.4f, not %.4f and %.4f", q4.before, q4.after, f.before, f.after);
    CHECK(q4.before != f.before && q8.before != f.before && f.after < f.before);
    CHECK_MSG(q4.held < q8.held && q8.peak_over < q8.held / 4, "%llu and %llu bytes held, %llu more while loading", (unsigned long long)q4.held, (unsigned long long)q8.held, (unsigned long long)q8.peak_over);
}

static void test_bases(void) { compare(&demo, 12); }

static void test_trained_bases(void)
{
    static const char *const models[] = { "stories260k-qwen2", "gemma3-shakespeare" };
    int i;
    for (i = 0; i < 2; i++) {
        const place *at = asset(models[i]);
        if (!at) SKIP("%s", models[i]);
        compare(at, 25);
    }
}

/* ---- what training keeps in few bits reaches what f32 reaches: 200 steps of full fine-tuning of a trained model ---- */
typedef struct reached { double before, loss; size_t state; } reached;

static reached reach(const place *at, mft_optimizer_kind kind, const char *master_dtype, double learning_rate)
{
    reached          out;
    mft_context     *ctx = NULL;
    mft_dataset     *data = NULL, *held = NULL;
    mft_model       *m = NULL;
    mft_model_desc   md;
    mft_memory_report r;
    mft_trainer     *tr = NULL;
    mft_trainer_desc td;
    mft_plan         plan;
    mft_eval         e[2];
    memset(&md, 0, sizeof md); memset(&td, 0, sizeof td); memset(e, 0, sizeof e); memset(&plan, 0, sizeof plan);
    md.train_all = 1; md.master_dtype = master_dtype;
    td.learning_rate = learning_rate; td.micro_batch = 2; td.optimizer.kind = kind;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    open_texts(ctx, at, 32, &data, &held);
    CHECK_MSG(mft_model_load(ctx, at->base, &md, &m) == MFT_OK && mft_trainer_create(m, data, &td, &tr) == MFT_OK && mft_trainer_plan(tr, 0, 0, &plan) == MFT_OK
              && mft_trainer_evaluate(tr, held, 25, &e[0]) == MFT_OK && mft_trainer_run(tr, 200) == MFT_OK
              && mft_trainer_evaluate(tr, held, 25, &e[1]) == MFT_OK, "%s: %s", at->base, mft_error_message(ctx));
    mft_memory(ctx, &r);
    CHECK_MSG(plan.optimizer == r.optimizer && plan.trainable <= r.weights, "%s: planned %llu and %llu", at->base, (unsigned long long)plan.optimizer, (unsigned long long)plan.trainable);
    out.before = e[0].loss; out.loss = e[1].loss; out.state = plan.optimizer + plan.trainable;
    mft_context_destroy(ctx);
    return out;
}

/* Within 1 % of the loss that f32 reaches, on text that is held out: the least that makes few bits worth using. The updates
 * are others, so the runs part. Seen over 25 and 50 batches: at most 0.04 % with 8-bit moments, 0.1 % with bf16 masters besides;
 * with twice the rows a step 0.08 and 0.3 %. Cutting bf16 off instead of rounding it by chance: 5.8 and 2.0 %.
 * APOLLO-mini, another method, within 2 %: seen 0.5 and 1.5 % at the same rate (each at its best of 5e-4, 1e-3, 2e-3: 1.3 and 1.5 %). */
static void test_reach(void)
{
    static const char *const models[] = { "stories260k-qwen2", "gpt2-shakespeare" };
    int i;
    for (i = 0; i < 2; i++) {
        const place *at = asset(models[i]);
        reached      f32, b8, b16, apollo;
        if (!at) SKIP("%s", models[i]);
        f32 = reach(at, MFT_ADAMW, NULL, 1e-3);
        b8  = reach(at, MFT_ADAMW8BIT, NULL, 1e-3);
        b16 = reach(at, MFT_ADAMW8BIT, "bf16", 1e-3);
        apollo = reach(at, MFT_APOLLO_MINI, NULL, 1e-3);
        if (getenv("MFT_TEST_VERBOSE"))
            printf("seen %s: loss %.4f, then %.4f; 8-bit moments %+.3f %%; with bf16 masters %+.3f %%; bytes %.2f and %.2f of f32's; APOLLO-mini %+.3f %%, %.2f\n", at->base, f32.before, f32.loss,
                   (b8.loss / f32.loss - 1) * 100, (b16.loss / f32.loss - 1) * 100, (double)b8.state / (double)f32.state, (double)b16.state / (double)f32.state,
                   (apollo.loss / f32.loss - 1) * 100, (double)apollo.state / (double)f32.state);
        CHECK_MSG(f32.loss < 0.9 * f32.before, "%s: from %.4f to %.4f", at->base, f32.before, f32.loss);      /* there was something to learn */
        CHECK_MSG(fabs(b8.loss / f32.loss - 1) < 0.01, "%s: %.4f with 8-bit moments, %.4f with f32", at->base, b8.loss, f32.loss);
        CHECK_MSG(fabs(b16.loss / f32.loss - 1) < 0.01, "%s: %.4f with 8-bit moments and bf16 masters, %.4f with f32", at->base, b16.loss, f32.loss);
        CHECK_MSG(fabs(apollo.loss / f32.loss - 1) < 0.02, "%s: %.4f with APOLLO-mini, %.4f with AdamW", at->base, apollo.loss, f32.loss);
        CHECK(apollo.state < f32.state * 36 / 100);              /* 4 bytes a number and little more */
        CHECK(b8.state < f32.state * 6 / 10 && b16.state < f32.state * 45 / 100);       /* of 12 bytes a number: 6, and 4; vectors and small matrices keep theirs */
    }
}

int main(void)
{
    TEST(test_blocks);
    TEST(test_bases);
    TEST(test_trained_bases);
    TEST(test_reach);
    return test_report("quantize");
}
