/* demo.c - a small model learns to answer questions about one person, on this machine
 *
 *     make demo      (build/demo [DATA_DIR [ADAPTER_DIR]])
 *
 * The base, about a million parameters, was trained by `mft` itself on texts in which this person does
 * not occur. A LoRA adapter learns three weeks of her wearable's records from questions and answers;
 * the test asks for the same facts in wordings that were not in training. See examples/demo/README.md. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <stdio.h>
#include <string.h>

enum { RANK = 16, BATCH = 4, STEPS = 400, SEQ = 256, MOST = 256, SAMPLES = 2 };
static const double LEARNING_RATE = 5e-3;

typedef struct demo {
    mft_context   *ctx;
    mft_tokenizer *tok;
    mft_model     *model;
    mft_dataset   *train, *test;
    mft_trainer   *trainer;
    mft_json      *questions[512];
    int            n_questions;
} demo;

static void on_step(void *user, const mft_progress *p)
{
    (void)user;
    if (p->step % 40 == 0) printf("  step %3lld of %d   loss %.3f   %.0f tokens/s\n", (long long)p->step, STEPS, p->loss, p->tokens_per_second);
    fflush(stdout);
}

/* One JSON object a line. */
static mft_status read_questions(demo *d, const char *path)
{
    char      *text = NULL, *line;
    size_t     bytes = 0;
    mft_status s = mft__file_read_all(d->ctx, path, (size_t)1 << 24, &text, &bytes);
    for (line = text; s == MFT_OK && line < text + bytes && d->n_questions < 512; ) {
        char *end = (char *)memchr(line, '\n', (size_t)(text + bytes - line));
        if (!end) end = text + bytes;
        if (end > line) s = mft_json_parse(d->ctx, line, (size_t)(end - line), &d->questions[d->n_questions++]);
        line = end + 1;
    }
    mft__free(d->ctx, text, bytes + 1);
    return s;
}

static const char *content(const mft_json *conversation, size_t turn)
{
    return mft_json_string(mft_json_get(mft_json_at(mft_json_get(conversation, "messages"), turn, NULL), "content"), NULL);
}

/* What the model answers to a question, greedily, up to the end of its turn. */
static mft_status answer(demo *d, const char *question, char *out, size_t cap)
{
    mft_message       m;
    mft_generate_desc g;
    char              prompt[1024];
    int32_t           ids[MOST], made[48];
    int64_t           n, bytes;
    m.role = "user"; m.content = question;
    bytes = mft_apply_chat_template(d->tok, &m, 1, MFT_GENERATION_PROMPT, prompt, sizeof prompt);
    if (bytes < 0) return (mft_status)bytes;
    n = mft_tokenizer_encode(d->tok, prompt, bytes, MFT_NO_ADD_SPECIAL, ids, MOST);
    if (n < 0) return (mft_status)n;
    memset(&g, 0, sizeof g);
    g.max_new_tokens = 24;
    n = mft_generate(d->model, ids, n, &g, made, 48);
    if (n < 0) return (mft_status)n;
    bytes = mft_tokenizer_decode(d->tok, made, n, MFT_SKIP_SPECIAL, out, (int64_t)cap - 1);
    if (bytes < 0) return (mft_status)bytes;
    out[bytes < (int64_t)cap - 1 ? bytes : (int64_t)cap - 1] = '\0';
    return MFT_OK;
}

/* Share of questions answered to the letter; the first few are shown. */
static mft_status examine(demo *d, const char *when, double *accuracy)
{
    char       said[256];
    mft_eval   eval;
    mft_status s = mft_trainer_evaluate(d->trainer, d->test, 0, &eval);
    int        i, right = 0;
    for (i = 0; i < d->n_questions && s == MFT_OK; i++) {
        if ((s = answer(d, content(d->questions[i], 0), said, sizeof said)) != MFT_OK) break;
        right += !strcmp(said, content(d->questions[i], 1));
        if (i % (d->n_questions / SAMPLES) == 0)
            printf("  asked: %s\n    says: %s\n    true: %s\n", content(d->questions[i], 0), said, content(d->questions[i], 1));
    }
    *accuracy = 100.0 * right / (d->n_questions ? d->n_questions : 1);
    if (s == MFT_OK) printf("%s: perplexity %.2f on the held-out answers, %d of %d exactly right (%.1f %%)\n\n", when, eval.perplexity, right, d->n_questions, *accuracy);
    return s;
}

int main(int argc, char **argv)
{
    const char      *dir = argc > 1 ? argv[1] : "examples/demo", *adapter = argc > 2 ? argv[2] : "build/demo-adapter";
    char             base[600], train[600], test[600];
    demo             d;
    mft_dataset_desc data;
    mft_lora_desc    lora;
    mft_trainer_desc desc;
    mft_status       s;
    double           before = 0, after = 0;

    memset(&d, 0, sizeof d); memset(&data, 0, sizeof data); memset(&lora, 0, sizeof lora); memset(&desc, 0, sizeof desc);
    snprintf(base, sizeof base, "%s/base", dir);
    snprintf(train, sizeof train, "%s/train.jsonl", dir);
    snprintf(test, sizeof test, "%s/test.jsonl", dir);
    data.max_seq_len = SEQ;
    lora.rank = RANK; lora.targets = "all-linear";
    desc.learning_rate = LEARNING_RATE; desc.schedule = MFT_SCHEDULE_COSINE; desc.warmup_steps = 20; desc.total_steps = STEPS;
    desc.micro_batch = BATCH; desc.on_step = on_step;

    if ((s = mft_context_create(NULL, &d.ctx))                             == MFT_OK &&
        (s = mft_tokenizer_load(d.ctx, base, &d.tok))                      == MFT_OK &&
        (s = mft_model_load(d.ctx, base, NULL, &d.model))                  == MFT_OK &&
        (s = mft_lora_attach(d.model, &lora))                              == MFT_OK &&
        (s = mft_dataset_create(d.ctx, d.tok, &data, &d.train))            == MFT_OK &&
        (s = mft_dataset_load(d.train, train))                             == MFT_OK &&
        (s = mft_dataset_create(d.ctx, d.tok, &data, &d.test))             == MFT_OK &&
        (s = mft_dataset_load(d.test, test))                               == MFT_OK &&
        (s = mft_trainer_create(d.model, d.train, &desc, &d.trainer))      == MFT_OK &&
        (s = read_questions(&d, test))                                     == MFT_OK) {
        printf("base of %lld parameters; asked before it has learnt anything about her:\n", (long long)mft_model_get_config(d.model)->n_params);
        s = examine(&d, "before", &before);
    }
    if (s == MFT_OK) {
        printf("training a LoRA adapter of rank %d on %s\n", RANK, train);
        s = mft_trainer_run(d.trainer, STEPS);
        printf("\n");
    }
    if (s == MFT_OK) s = examine(&d, "after", &after);
    if (s == MFT_OK && (s = mft_lora_save(d.model, adapter)) == MFT_OK) printf("the adapter is in %s\n", adapter);
    if (s != MFT_OK) fprintf(stderr, "%s: %s\n", mft_status_string(s), d.ctx ? mft_error_message(d.ctx) : "");
    mft_context_destroy(d.ctx);
    return s != MFT_OK || after < 80;           /* it must have learnt */
}
