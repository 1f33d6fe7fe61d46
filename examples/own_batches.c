/* own_batches.c - training on batches of your own: input_ids, attention_mask, labels
 *
 *     build/own_batches examples/demo/base
 *
 * The meaning is Transformers': labels are not shifted, -100 is ignored, padding is masked.
 * Here the model learns to continue a count; the first tokens of each row are not learnt. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <stdio.h>
#include <string.h>

enum { BATCH = 2, SEQ = 12, STEPS = 30 };

int main(int argc, char **argv)
{
    mft_context     *ctx   = NULL;
    mft_model       *model = NULL;
    mft_trainer     *tr    = NULL;
    mft_trainer_desc desc;
    mft_progress     p;
    mft_batch        batch;
    int32_t          input_ids[BATCH * SEQ], attention_mask[BATCH * SEQ], labels[BATCH * SEQ];
    double           first = 0;
    mft_status       s;
    int              i;

    if (argc != 2) { fprintf(stderr, "usage: own_batches MODEL_DIR\n"); return 2; }
    for (i = 0; i < BATCH * SEQ; i++) {
        int row = i / SEQ, t = i % SEQ, length = row ? SEQ - 4 : SEQ;       /* the second row is shorter */
        input_ids[i]      = t < length ? 100 + 3 * t + row : 0;
        attention_mask[i] = t < length;
        labels[i]         = t < length && t >= 3 ? input_ids[i] : -100;
    }
    memset(&batch, 0, sizeof batch);
    batch.input_ids = input_ids; batch.attention_mask = attention_mask; batch.labels = labels;
    batch.batch = BATCH; batch.seq = SEQ;
    memset(&desc, 0, sizeof desc);
    desc.learning_rate = 1e-2;

    if ((s = mft_context_create(NULL, &ctx))                == MFT_OK &&
        (s = mft_model_load(ctx, argv[1], NULL, &model))    == MFT_OK &&
        (s = mft_lora_attach(model, NULL))                  == MFT_OK)
        s = mft_trainer_create(model, NULL, &desc, &tr);    /* no dataset: batches are handed in */
    for (i = 0; i < STEPS && s == MFT_OK; i++) {
        s = mft_trainer_step_batch(tr, &batch, 1, &p);
        if (i == 0) first = p.loss;
    }
    if (s == MFT_OK) printf("loss %.3f at the first step, %.3f after %d\n", first, p.loss, STEPS);
    else fprintf(stderr, "%s: %s\n", mft_status_string(s), ctx ? mft_error_message(ctx) : "");
    mft_context_destroy(ctx);
    return s != MFT_OK || !(p.loss < first / 2);
}
