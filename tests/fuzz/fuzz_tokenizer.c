/* fuzz_tokenizer.c - a tokenizer.json (or tokenizer.model) as the first part of the input, a text as the rest.
 * What loads must encode any text, count alike with and without room, give only ids it has, say where they
 * begin, and decode them to valid UTF-8, the same whole or token by token. What does not load says why. */
#define MFT_IMPLEMENTATION
#include "../../mft.h"
#include "../../mft_safetensors.h"
#include "../../mft_models.h"

#define FUZZ_NAME "tokenizer"
#include "fuzz.h"

typedef struct file { const uint8_t *p; size_t n; const char *name; } file;

static void *open_one(void *user, const char *path, uint64_t *out_bytes)
{
    file *f = (file *)user;
    if (!strstr(path, f->name)) return NULL;
    *out_bytes = f->n;
    return f;
}
static size_t read_one(void *user, void *opened, uint64_t offset, void *dst, size_t bytes) { (void)opened; memcpy(dst, ((file *)user)->p + offset, bytes); return bytes; }
static void   close_one(void *user, void *opened) { (void)user; (void)opened; }

static void check_text(mft_tokenizer *tok, const char *text, size_t n, int flags)
{
    int64_t      count = mft_tokenizer_encode(tok, text, (int64_t)n, flags, NULL, 0), i, bytes, at = 0, piece_bytes;
    int32_t     *ids, *begins;
    char        *whole;
    mft_decoder *d;
    FUZZ_CHECK(count >= 0);
    ids    = (int32_t *)malloc(((size_t)count + 1) * sizeof *ids);
    begins = (int32_t *)malloc(((size_t)count + 1) * sizeof *begins);
    FUZZ_CHECK(mft__encode_begins(tok, text, (int64_t)n, flags, ids, begins, count) == count);
    for (i = 0; i < count; i++) {
        FUZZ_CHECK(mft_tokenizer_id_to_token(tok, ids[i], NULL, 0) >= 0);
        FUZZ_CHECK(begins[i] >= 0 && begins[i] <= (int32_t)n);
    }
    bytes = mft_tokenizer_decode(tok, ids, count, flags, NULL, 0);
    FUZZ_CHECK(bytes >= 0);
    whole = (char *)malloc((size_t)bytes + 1);
    FUZZ_CHECK(mft_tokenizer_decode(tok, ids, count, flags, whole, bytes) == bytes);
    FUZZ_CHECK(mft__utf8_valid(whole, (size_t)bytes) == (size_t)bytes);
    FUZZ_CHECK(mft_decoder_create(tok, flags, &d) == MFT_OK);
    for (i = 0; i <= count; i++) {
        const char *piece = i < count ? mft_decoder_push(d, ids[i], &piece_bytes) : mft_decoder_finish(d, &piece_bytes);
        FUZZ_CHECK(piece && at + piece_bytes <= bytes && memcmp(piece, whole + at, (size_t)piece_bytes) == 0);
        FUZZ_CHECK(mft__utf8_valid(piece, (size_t)piece_bytes) == (size_t)piece_bytes);
        at += piece_bytes;
    }
    FUZZ_CHECK(at == bytes);
    mft_decoder_destroy(d);
    free(ids); free(begins); free(whole);
}

/* The input: the file, a line with only "====", the text. Without that line the file is also the text. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    mft_context_desc  desc;
    mft_memory_report before, after;
    mft_context      *ctx;
    mft_tokenizer    *tok;
    file              f;
    size_t            cut = bytes, i;
    mft_status        s;

    for (i = 0; i + 6 <= bytes; i++) if (memcmp(data + i, "\n====\n", 6) == 0) { cut = i; break; }
    f.p = data; f.n = cut; f.name = cut && data[0] == '\n' ? "tokenizer.model" : "tokenizer.json";      /* a model begins with field 1: byte 0x0a */
    memset(&desc, 0, sizeof desc);
    desc.io.open = open_one; desc.io.read = read_one; desc.io.close = close_one; desc.io.user = &f;
    desc.n_threads = 1;
    desc.memory_budget = (size_t)256 << 20;             /* whatever a small file says, it cannot have more */
    FUZZ_CHECK(mft_context_create(&desc, &ctx) == MFT_OK);
    mft_memory(ctx, &before);
    s = mft_tokenizer_load(ctx, "x", &tok);
    if (s != MFT_OK) FUZZ_CHECK(tok == NULL && *mft_error_message(ctx) && s != MFT_ERR_OUT_OF_MEMORY);
    else {
        const char *text = (const char *)data + (cut < bytes ? cut + 6 : 0);
        size_t      n = cut < bytes ? bytes - cut - 6 : bytes;
        check_text(tok, text, n, 0);
        check_text(tok, text, n, MFT_NO_PARSE_SPECIAL | MFT_NO_ADD_SPECIAL | MFT_SKIP_SPECIAL);
        mft_tokenizer_destroy(tok);
    }
    mft_memory(ctx, &after);
    FUZZ_CHECK(after.now == before.now);
    mft_context_destroy(ctx);
    return 0;
}
