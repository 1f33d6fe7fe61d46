/* fuzz_dataset.c - files from anyone through [DATASET]
 *
 * The first two bytes choose format and options, the rest is the file. What must hold for any input: a failure
 * has a sentence and leaves nothing behind; what was loaded gives, in each of two epochs, exactly the rows and
 * supervised tokens that the report counts, ids inside the vocabulary, and a text for every sample.
 *
 * A first byte of 0xf0 and more: the rest is not a data file but what stands in the files of its index, behind a header that
 * fits. Every call then succeeds or has a sentence, and no batch has an id that the header does not allow. */
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

/* Files of an index: a header made to fit, then a part of the input. */
enum { N_PARTS = 3 };
static struct { const char *end; size_t size; uint8_t bytes[MFT__INDEX_HEADER + 4096]; size_t n; } parts[N_PARTS] =
    { { ".samples", sizeof(mft__sample), { 0 }, 0 }, { ".ids", 4, { 0 }, 0 }, { ".rows", 8, { 0 }, 0 } };
static int index_there;

static void *open_any(void *user, const char *path, uint64_t *out_bytes)
{
    FILE *f;
    long  n = -1;
    (void)user;
    if (strcmp(path, "input") == 0) { *out_bytes = input_bytes; return &input_tag; }
    if (strncmp(path, "index/", 6) == 0) {
        int k;
        for (k = 0; k < N_PARTS && index_there; k++) if (mft__ends_with(path, parts[k].end)) { *out_bytes = parts[k].n; return &parts[k]; }
        return NULL;
    }
    f = fopen(path, "rb");
    if (f && fseek(f, 0, SEEK_END) == 0) n = ftell(f);
    if (n < 0) { if (f) fclose(f); return NULL; }
    *out_bytes = (uint64_t)n;
    return f;
}

static size_t read_any(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    int k;
    (void)user;
    for (k = 0; k < N_PARTS; k++) if (file == &parts[k]) {
        if (offset >= parts[k].n) return 0;
        if (bytes > parts[k].n - offset) bytes = (size_t)(parts[k].n - offset);
        memcpy(dst, parts[k].bytes + offset, bytes);
        return bytes;
    }
    if (file != &input_tag) return fseek((FILE *)file, (long)offset, SEEK_SET) == 0 ? fread(dst, 1, bytes, (FILE *)file) : 0;
    if (offset >= input_bytes) return 0;
    if (bytes > input_bytes - offset) bytes = (size_t)(input_bytes - offset);
    memcpy(dst, input + offset, bytes);
    return bytes;
}

static void close_any(void *user, void *file)
{
    int k;
    (void)user;
    for (k = 0; k < N_PARTS; k++) if (file == &parts[k]) return;
    if (file != &input_tag) fclose((FILE *)file);
}

/* A part of the index: its header says `key`, three samples of ids up to 9, and as many records as there is room for. */
static void fill_part(int k, uint64_t key, const uint8_t *data, size_t size)
{
    mft__index_header h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, "mftindex", 8);
    h.version = MFT__INDEX_VERSION; h.key = key; h.size = parts[k].size;
    if (size > sizeof parts[k].bytes - MFT__INDEX_HEADER) size = sizeof parts[k].bytes - MFT__INDEX_HEADER;
    h.n = size / h.size; h.n_groups = 3; h.n_supervised = h.n_tokens = 5; h.max_id = 9; h.kind = MFT__FROM_INPUT_IDS;
    h.check = mft__index_check(&h);
    memset(parts[k].bytes, 0, MFT__INDEX_HEADER);
    memcpy(parts[k].bytes, &h, sizeof h);
    memcpy(parts[k].bytes + MFT__INDEX_HEADER, data, size);
    parts[k].n = MFT__INDEX_HEADER + size;
}

/* The three parts are thirds of the data. */
static void try_index(mft_context *ctx, const uint8_t *data, size_t size)
{
    static const char file[] = "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[4,5]}\n{\"input_ids\":[6,9]}\n";
    mft_dataset_desc d;
    mft_dataset     *ds = NULL, *held = NULL;
    mft_dataset_info info;
    mft_batch        b;
    mft__source      src;
    uint64_t         key = 0;
    int              k, i;
    memset(&d, 0, sizeof d);
    d.max_seq_len = 16; d.index_dir = "index"; d.index_above = 1; d.no_shuffle = data[0] & 1; d.format = MFT_DATA_JSONL;
    input = (const uint8_t *)file; input_bytes = sizeof file - 1;
    index_there = 1;
    FUZZ_CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    memset(&src, 0, sizeof src);
    src.kind = MFT__FROM_JSONL; src.path = (char *)(uintptr_t)"input"; src.bytes = input_bytes;
    FUZZ_CHECK(mft__file_open(ctx, "input", &ds->corpus->file) == MFT_OK);
    ds->corpus->n_sources = 1;                                  /* as it stands when the load asks */
    FUZZ_CHECK(mft__index_key(ds, &src, &key) == MFT_OK);
    ds->corpus->n_sources = 0;
    mft__file_close(&ds->corpus->file);
    for (k = 0; k < N_PARTS; k++) fill_part(k, key, data + size / 3 * (size_t)k, size / 3);
    FUZZ_CHECK(mft_dataset_load(ds, "input") == MFT_OK && ds->info.index_reused);
    {   /* the key of the rows, which the header's fingerprint and number of samples are in */
        uint64_t h = mft__data_mix(mft__data_mix(mft__data_mix(ds->info.fingerprint, ds->samples.n), 16), (uint64_t)(d.no_shuffle ? 2 : 0));
        fill_part(2, mft__data_mix(h, 0), data + size / 3 * 2, size / 3);
    }
    if (data[0] & 2 && mft_dataset_split(ds, 0.5, &held) != MFT_OK) FUZZ_CHECK(*mft_error_message(ctx) != '\0');
    if (mft_dataset_report(ds, &info) == MFT_OK) for (k = 0; k < 20; k++) {
        if (mft_dataset_next(ds, 2, &b) != MFT_OK) { FUZZ_CHECK(*mft_error_message(ctx) != '\0' && !b.input_ids); break; }
        for (i = 0; i < b.batch * b.seq; i++) FUZZ_CHECK(b.input_ids[i] >= 0 && b.input_ids[i] <= 9);
    }
    mft_dataset_destroy(ds);
    mft_dataset_destroy(held);
    index_there = 0;
}

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
    if (data[0] >= 0xf0) { try_index(ctx, data + 1, size - 1); return 0; }
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
