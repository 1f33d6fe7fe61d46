/* test_openings.c - the smallest programs, as they stand at the top of each header
 *
 * Each is here as it is there, line by line (the last test compares), and does what it promises. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkstemp, fdopen; the headers alone need no such thing */
#endif
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"

#include <unistd.h>

static mft_context *ctx;

/* y = x w with w = 3: the opening's five lines, until they have found it. */
static void test_mft(void)
{
    float          xs[4] = { 1, -2, 0.5f, 3 }, ys[4] = { 3, -6, 1.5f, 9 };
    int64_t        column[2] = { 4, 1 }, one[2] = { 1, 1 };
    mft_optimizer *opt = NULL;
    mft_tensor    *x, *y, *w;
    int            step;

    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    x = mft_tensor_wrap(ctx, MFT_F32, 2, column, xs);
    y = mft_tensor_wrap(ctx, MFT_F32, 2, column, ys);
    w = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, one);
    w->trainable = 1;
    CHECK(mft_optimizer_create(ctx, NULL, &w, NULL, 1, &opt) == MFT_OK);
    for (step = 0; step < 400; step++) {
        mft_tensor *err  = mft_sub(ctx, mft_linear(ctx, x, w, NULL), y);
        mft_tensor *loss = mft_mean(ctx, mft_mul(ctx, err, err));
        if (mft_backward(ctx, loss) != MFT_OK) puts(mft_error_message(ctx));
        mft_optimizer_step(opt, 0.05f, NULL);
        mft_step_reset(ctx);
    }
    CHECK_MSG(fabs((double)mft_tensor_item(w) - 3) < 0.01, "w is %g", (double)mft_tensor_item(w));
    mft_context_destroy(ctx);
}

/* The opening's names stand for a snapshot and a text of our own. */
static void test_models(void)
{
    mft_tokenizer *tok = NULL;
    mft_model     *model = NULL;
    mft_dataset   *data = NULL;
    mft_trainer   *trainer = NULL;
    const char    *base = "examples/demo/base";
    char           text[128] = "/tmp/mft-opening-XXXXXX", adapter[80];
    FILE          *f = NULL;
    int            k, fd;

    if (!test_file_exists("examples/demo/base/model.safetensors")) SKIP("the opening of mft_models.h: examples/demo/base is not there");
    fd = mkstemp(text);
    CHECK(fd >= 0);
    if (fd >= 0) f = fdopen(fd, "w");
    for (k = 0; f && k < 200; k++) fprintf(f, "Day %d was a good day. ", k);
    if (f) fclose(f);
    snprintf(adapter, sizeof adapter, "%s-adapter", text);

    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    mft_tokenizer_load (ctx, base, &tok);
    mft_model_load     (ctx, base, NULL, &model);
    mft_lora_attach    (model, NULL);
    mft_dataset_create (ctx, tok, NULL, &data);
    mft_dataset_load   (data, text);
    mft_trainer_create (model, data, NULL, &trainer);
    mft_trainer_run    (trainer, 3);
    CHECK_MSG(mft_lora_save(model, adapter) == MFT_OK, "%s", mft_error_message(ctx));
    mft_context_destroy(ctx);
    remove(text);
    snprintf(text, sizeof text, "%s/adapter_config.json", adapter);
    CHECK(remove(text) == 0);
    snprintf(text, sizeof text, "%s/adapter_model.safetensors", adapter);
    CHECK(remove(text) == 0);
    remove(adapter);
}

/* Every line of mft.h's opening is in this file as well, but for blanks. */
static void test_same_lines(void)
{
    size_t n, m;
    char  *header = test_read_file("mft.h", &n), *own = test_read_file("tests/test_openings.c", &m), *at, *end;
    int    lines = 0;
    CHECK(header && own);
    if (!header || !own) return;
    at = strstr(header, "SMALLEST PROGRAM");
    CHECK(at != NULL);
    for (at = at ? strchr(at, '\n') + 1 : header; at && !strncmp(at, " *     ", 7); at = end + 1) {
        at += 7;
        end = strchr(at, '\n');
        *end = '\0';
        CHECK_MSG(strstr(own, at) != NULL, "\"%s\" is not what is tested here", at);
        lines++;
    }
    CHECK(lines == 5);
    free(header); free(own);
}

int main(void)
{
    TEST(test_mft);
    TEST(test_models);
    TEST(test_same_lines);
    return test_report("openings");
}
