/* fuzz_dataset.c - files from anyone through [DATASET]
 *
 * The first two bytes choose format and options, the rest is the file. What must hold for any input: a failure
 * has a sentence and leaves nothing behind; what was loaded gives, in each of two epochs, exactly the rows and
 * supervised tokens that the report counts, ids inside the vocabulary, and a text for every sample. */
#define MFT_IMPLEMENTATION
#include "../../mft.h"
#include "../../mft_safetensors.h"
#include "../../mft_models.h"

#define FUZZ_NAME "dataset"
#include "fuzz.h"

/* ---- the file under test is in memory; others (the tokenizer's) are on disk ---- */
static const uint8_t *input;
static size_t         input_bytes;
static char           input_tag;

static void *open_any(void *user, const char *path, uint64_t *out_bytes)
{
    FILE *f;
    long  n = -1;
    (void)user;
    if (strcmp(path, "input") == 0) { *out_bytes = input_bytes; return &input_tag; }
    f = fopen(path, "rb");
    if (f && fseek(f, 0, SEEK_END) == 0) n = ftell(f);
    if (n < 0) { if (f) fclose(f); return NULL; }
    *out_bytes = (uint64_t)n;
    return f;
}

static size_t read_any(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    (void)user;
    if (file != &input_tag) return fseek((FILE *)file, (long)offset, SEEK_SET) == 0 ? fread(dst, 1, bytes, (FILE *)file) : 0;
    if (offset >= input_bytes) return 0;
    if (bytes > input_bytes - offset) bytes = (size_t)(input_bytes - offset);
    memcpy(dst, input + offset, bytes);
    return bytes;
}

static void close_any(void *user, void *file) { (void)user; if (file != &input_tag) fclose((FILE *)file); }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static mft_context   *ctx;
    static mft_tokenizer *tok;
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_dataset_info info;
    mft_batch        b;
    mft_status       s;
    int              epoch;
    int64_t          i;

    if (size < 2) return 0;
    if (!ctx) {
        mft_context_desc c;
        const char *dir = getenv("FUZZ_TOKENIZER");
        memset(&c, 0, sizeof c);
        c.io.open = open_any; c.io.read = read_any; c.io.close = close_any; c.n_threads = 1;
        FUZZ_CHECK(mft_context_create(&c, &ctx) == MFT_OK);
        if (mft_tokenizer_load(ctx, dir ? dir : "tests/golden/assets/tokenizers/qwen-tiny", &tok) != MFT_OK)
            printf("skip: text: no tokenizer in tests/golden/assets: only token ids are tried\n");
    }
    memset(&d, 0, sizeof d);
    d.format          = (mft_data_format)(data[0] % 5);
    d.max_seq_len     = 2 + (data[0] >> 4) * 5;
    d.no_pack         = data[1] & 1;       d.no_shuffle     = data[1] >> 1 & 1;
    d.train_on_prompt = data[1] >> 2 & 1;  d.skip_bad_lines = data[1] >> 3 & 1;
    d.drop_last       = data[1] >> 4 & 1;  d.vocab_size     = data[1] >> 5 & 1 ? 500 : 0;
    input = data + 2; input_bytes = size - 2;
    FUZZ_CHECK(mft_dataset_create(ctx, data[1] >> 6 & 1 ? NULL : tok, &d, &ds) == MFT_OK);
    s = mft_dataset_load(ds, "input");
    FUZZ_CHECK(mft_dataset_report(ds, &info) == MFT_OK);
    if (s != MFT_OK) {
        FUZZ_CHECK(*mft_error_message(ctx) != '\0');
        FUZZ_CHECK(info.n_samples == 0 && info.n_rows == 0);
        mft_dataset_destroy(ds);
        return 0;
    }
    FUZZ_CHECK(info.n_samples > 0 && info.n_supervised > 0);
    if (info.n_samples > 2000) { mft_dataset_destroy(ds); return 0; }
    for (epoch = 0; epoch < 2; epoch++) {
        int64_t k, batches = mft_dataset_epoch_batches(ds, 1), valid = 0;
        FUZZ_CHECK(batches == info.n_rows);
        for (k = 0; k < batches; k++) {
            s = mft_dataset_next(ds, 1, &b);
            FUZZ_CHECK(s == MFT_OK);
            FUZZ_CHECK(b.batch == 1 && b.seq >= 1 && b.seq <= d.max_seq_len);
            for (i = 0; i < b.seq; i++) {
                FUZZ_CHECK(b.input_ids[i] >= 0 && b.input_ids[i] <= info.max_id);
                FUZZ_CHECK(b.labels[i] == -100 || (b.labels[i] >= 0 && (!d.vocab_size || b.labels[i] < d.vocab_size)));
                valid += b.labels[i] != -100;
            }
        }
        FUZZ_CHECK(valid == info.n_supervised);
    }
    for (i = 0; i < info.n_samples && i < 20; i++) {
        char    text[64];
        int64_t n = mft_dataset_sample_text(ds, i, "[[", "]]", text, (int64_t)sizeof text);
        FUZZ_CHECK(n >= 0 || !tok || (data[1] >> 6 & 1) || info.max_id >= mft_tokenizer_vocab_size(tok));
    }
    mft_dataset_destroy(ds);
    return 0;
}
