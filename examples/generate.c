/* generate.c - a model continues a prompt, first alone, then with an adapter
 *
 *     build/generate MODEL_DIR "Once upon a time" [ADAPTER_DIR]
 *
 * Adapters are loaded beside the base and switched by name: nothing is loaded again. */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <stdio.h>
#include <string.h>

enum { MOST = 1024, NEW = 60 };

/* Prints text as soon as it is certain: a character made of several tokens is never cut. */
static int on_token(void *user, int32_t id)
{
    const char *piece = mft_decoder_push((mft_decoder *)user, id, NULL);
    if (piece) { fputs(piece, stdout); fflush(stdout); }
    return piece == NULL;                       /* nonzero stops */
}

static mft_status say(mft_model *model, mft_decoder *decoder, const int32_t *prompt, int64_t n, const char *who)
{
    mft_generate_desc desc;
    int64_t           made;
    memset(&desc, 0, sizeof desc);              /* greedy; temperature, top_k, top_p for more variety */
    desc.max_new_tokens = NEW;
    desc.on_token = on_token;
    desc.user     = decoder;
    printf("[%s] ", who);
    made = mft_generate(model, prompt, n, &desc, NULL, 0);
    printf("%s\n", mft_decoder_finish(decoder, NULL));
    return made < 0 ? (mft_status)made : MFT_OK;
}

int main(int argc, char **argv)
{
    mft_context   *ctx     = NULL;
    mft_tokenizer *tok     = NULL;
    mft_model     *model   = NULL;
    mft_decoder   *decoder = NULL;
    int32_t        prompt[MOST];
    int64_t        n = 0;
    mft_status     s;

    if (argc != 3 && argc != 4) { fprintf(stderr, "usage: generate MODEL_DIR PROMPT [ADAPTER_DIR]\n"); return 2; }
    if ((s = mft_context_create(NULL, &ctx))                         == MFT_OK &&
        (s = mft_tokenizer_load(ctx, argv[1], &tok))                 == MFT_OK &&
        (s = mft_decoder_create(tok, MFT_SKIP_SPECIAL, &decoder))    == MFT_OK &&
        (s = mft_model_load(ctx, argv[1], NULL, &model))             == MFT_OK) {
        n = mft_tokenizer_encode(tok, argv[2], -1, 0, prompt, MOST);
        if (n < 0) s = (mft_status)n;
        if (n > MOST) n = MOST;
    }
    if (s == MFT_OK) s = say(model, decoder, prompt, n, "base");
    if (s == MFT_OK && argc == 4 && (s = mft_lora_load(model, argv[3], "mine")) == MFT_OK)
        s = say(model, decoder, prompt, n, "with the adapter");         /* the latest loaded is active */
    if (s == MFT_OK && argc == 4 && (s = mft_lora_activate(model, NULL)) == MFT_OK)
        s = say(model, decoder, prompt, n, "base again");
    if (s != MFT_OK) fprintf(stderr, "%s: %s\n", mft_status_string(s), ctx ? mft_error_message(ctx) : "");
    mft_context_destroy(ctx);
    return s != MFT_OK;
}
