/* finetune.c - a snapshot and a file of your text become a LoRA adapter
 *
 *     build/finetune examples/demo/base examples/demo/train.jsonl /tmp/adapter
 *
 * The adapter is in PEFT's format: Transformers and `mft generate --adapter` load it. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <stdio.h>
#include <string.h>

static void on_step(void *user, const mft_progress *p)
{
    (void)user;
    printf("step %lld  loss %.4f  %.0f tokens/s\n", (long long)p->step, p->loss, p->tokens_per_second);
}

int main(int argc, char **argv)
{
    mft_context     *ctx   = NULL;
    mft_tokenizer   *tok   = NULL;
    mft_model       *model = NULL;
    mft_dataset     *data  = NULL;
    mft_trainer     *tr    = NULL;
    mft_trainer_desc desc;
    mft_status       s;

    if (argc != 4) { fprintf(stderr, "usage: finetune MODEL_DIR DATA_FILE ADAPTER_DIR\n"); return 2; }
    memset(&desc, 0, sizeof desc);              /* zero is the default of every field */
    desc.learning_rate = 1e-3;
    desc.micro_batch   = 4;
    desc.on_step       = on_step;

    if ((s = mft_context_create(NULL, &ctx))                     == MFT_OK &&
        (s = mft_tokenizer_load(ctx, argv[1], &tok))             == MFT_OK &&
        (s = mft_model_load(ctx, argv[1], NULL, &model))         == MFT_OK &&
        (s = mft_lora_attach(model, NULL))                       == MFT_OK &&
        (s = mft_dataset_create(ctx, tok, NULL, &data))          == MFT_OK &&
        (s = mft_dataset_load(data, argv[2]))                    == MFT_OK &&
        (s = mft_trainer_create(model, data, &desc, &tr))        == MFT_OK &&
        (s = mft_trainer_run(tr, 20))                            == MFT_OK)
        s = mft_lora_save(model, argv[3]);
    if (s != MFT_OK) fprintf(stderr, "%s: %s\n", mft_status_string(s), ctx ? mft_error_message(ctx) : "");
    mft_context_destroy(ctx);                   /* takes everything made from it along */
    return s != MFT_OK;
}
