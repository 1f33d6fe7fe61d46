/* Frozen bases held as q8_0 and q4_0: the blocks, what a model keeps as it is, perplexity, LoRA on top. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"

static const char *const base = "examples/demo/base";

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

typedef struct seen { double before, after; size_t held, peak_over; int quantized, other; } seen;

/* Perplexity of the demonstration's questions before and after some steps of LoRA on every matrix. */
static seen learn(const char *weights)
{
    mft_context     *ctx = NULL;
    mft_model       *m = NULL;
    mft_tokenizer   *tok = NULL;
    mft_trainer     *tr = NULL;
    mft_dataset     *data = NULL, *held = NULL;
    mft_model_desc   md;
    mft_lora_desc    ld;
    mft_trainer_desc td;
    mft_dataset_desc dd;
    mft_memory_report r;
    mft_eval         e;
    int              i;
    seen             s;
    memset(&s, 0, sizeof s);
    memset(&md, 0, sizeof md); memset(&ld, 0, sizeof ld); memset(&td, 0, sizeof td); memset(&dd, 0, sizeof dd);
    md.weights = weights;
    ld.targets = "all-linear"; ld.seed = 1;
    td.learning_rate = 1e-3; td.micro_batch = 4;
    dd.max_seq_len = 64;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    CHECK_MSG(mft_model_load(ctx, base, &md, &m) == MFT_OK, "%s", mft_error_message(ctx));
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
    CHECK(mft_tokenizer_load(ctx, base, &tok) == MFT_OK);
    CHECK(mft_lora_attach(m, &ld) == MFT_OK);
    CHECK(mft_dataset_create(ctx, tok, &dd, &data) == MFT_OK && mft_dataset_load(data, "examples/demo/train.jsonl") == MFT_OK);
    CHECK(mft_dataset_create(ctx, tok, &dd, &held) == MFT_OK && mft_dataset_load(held, "examples/demo/test.jsonl") == MFT_OK);
    CHECK(mft_trainer_create(m, data, &td, &tr) == MFT_OK && mft_trainer_evaluate(tr, held, 6, &e) == MFT_OK);
    s.before = e.perplexity;
    CHECK_MSG(mft_trainer_run(tr, 12) == MFT_OK && mft_trainer_evaluate(tr, held, 6, &e) == MFT_OK, "%s", mft_error_message(ctx));
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

static void test_bases(void)
{
    seen f = learn(NULL), q8 = learn("q8_0"), q4 = learn("q4_0");
    CHECK(f.quantized == 0 && q8.quantized > 4 && q8.quantized == q4.quantized && q8.other >= 1);
    CHECK_MSG(fabs(q8.before / f.before - 1) < 0.005 && fabs(q8.after / f.after - 1) < 0.005, "q8_0: %.4f and %.4f, not %.4f and %.4f", q8.before, q8.after, f.before, f.after);
    CHECK_MSG(fabs(q4.before / f.before - 1) < 0.1 && fabs(q4.after / f.after - 1) < 0.05, "q4_0: %.4f and %.4f, not %.4f and %.4f", q4.before, q4.after, f.before, f.after);
    CHECK(q4.before != f.before && q8.before != f.before && f.after < f.before);
    CHECK_MSG(q4.held < q8.held && q8.peak_over < q8.held / 4, "%llu and %llu bytes held, %llu more while loading", (unsigned long long)q4.held, (unsigned long long)q8.held, (unsigned long long)q8.peak_over);
}

int main(void)
{
    TEST(test_blocks);
    TEST(test_bases);
    return test_report("quantize");
}
