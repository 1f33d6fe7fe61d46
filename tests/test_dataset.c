/* test_dataset.c - [DATASET]: files to batches
 *
 * Oracles: rows written down by hand; a packer of its own that goes over the samples naively; the ids and
 * assistant masks Transformers gave (tests/golden/assets/golden/chat); counts over real data made with
 * Transformers' tokenizers and templates (tests/golden/dataset_counts.json, tests/oracle/dataset_counts.py). */
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "../mft_models.h"
#include "test.h"
#if defined(__linux__)
#  include <sys/wait.h>
#endif

/* ---- a context that counts what it gives out and can be made to refuse ---- */
typedef struct heap { long live, calls, refuse_at; } heap;

static void *heap_alloc(void *user, size_t bytes, size_t align)
{
    heap *h = (heap *)user;
    if (h->refuse_at && ++h->calls >= h->refuse_at) return NULL;     /* from then on: nothing at all */
    h->live++;
    return mft__default_alloc(NULL, bytes, align);
}

static void heap_free(void *user, void *p, size_t bytes)
{
    ((heap *)user)->live--;
    mft__default_free(NULL, p, bytes);
}

static heap the_heap;

static mft_context *new_context(void)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    memset(&d, 0, sizeof d);
    memset(&the_heap, 0, sizeof the_heap);
    d.allocator.alloc = heap_alloc; d.allocator.free = heap_free; d.allocator.user = &the_heap;
    d.n_threads = 1;
    if (mft_context_create(&d, &ctx) != MFT_OK) { printf("no context\n"); exit(1); }
    return ctx;
}

static void end_context(mft_context *ctx)
{
    mft_context_destroy(ctx);
    CHECK_MSG(the_heap.live == 0, "%ld blocks leaked", the_heap.live);
}

/* ---- files ---- */
static char temp_dir[400];                                     /* made and removed by main */

static char index_dir[512];                                    /* in it; made by datasets that have their index on disk */

static void remove_index(mft_context *ctx) { if (mft__file_kind(index_dir) == MFT__DIRECTORY) mft__dir_remove(ctx, index_dir); }

static const char *temp_path(const char *name)
{
    static char buffers[4][512];
    static int  next;
    char       *b = buffers[next++ % 4];
    snprintf(b, sizeof buffers[0], "%s/%s", temp_dir, name);
    return b;
}

static const char *write_file(const char *name, const void *data, size_t bytes)
{
    const char *path = temp_path(name);
    FILE       *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f) != 0) { printf("cannot write %s\n", path); exit(1); }
    return path;
}

static const char *write_text(const char *name, const char *text) { return write_file(name, text, strlen(text)); }

/* ---- a dataset's rows, spelled out ---- */

/* A row as text: "1 2* 3* | 4 5*": a star where the label is the id, (n) where it is another, | between documents,
 * . for padding. */
static const char *row_text(const mft_batch *b, int row)
{
    static char text[8192];
    size_t at = 0;
    int    t;
    text[0] = '\0';
    for (t = 0; t < b->seq && at < sizeof text - 64; t++) {
        size_t  k = (size_t)row * (size_t)b->seq + (size_t)t;
        if (b->attention_mask && !b->attention_mask[k]) { at += (size_t)sprintf(text + at, "%s.", t ? " " : ""); continue; }
        if (t && b->document_ids && b->document_ids[k] != b->document_ids[k - 1]) at += (size_t)sprintf(text + at, " |");
        at += (size_t)sprintf(text + at, "%s%ld", t ? " " : "", (long)b->input_ids[k]);
        if (b->labels[k] == b->input_ids[k]) at += (size_t)sprintf(text + at, "*");
        else if (b->labels[k] != -100)       at += (size_t)sprintf(text + at, "(%ld)", (long)b->labels[k]);
    }
    return text;
}

static void check_row(const mft_batch *b, int row, const char *want)
{
    CHECK_MSG(row < b->batch && strcmp(row_text(b, row), want) == 0, "row %d: \"%s\", not \"%s\"", row, row < b->batch ? row_text(b, row) : "none", want);
}

/* What must hold for any batch. Returns how many labels count. */
static int64_t check_batch(const mft_batch *b)
{
    int64_t valid = 0;
    int     r, t;
    for (r = 0; r < b->batch; r++) for (t = 0; t < b->seq; t++) {
        size_t k = (size_t)r * (size_t)b->seq + (size_t)t;
        int    pad = b->attention_mask && !b->attention_mask[k];
        int    starts = t == 0 || (b->document_ids && b->document_ids[k] != b->document_ids[k - 1]);
        if (pad || starts) CHECK(b->labels[k] == -100);
        if (pad && t + 1 < b->seq) CHECK(!b->attention_mask[k + 1]);        /* on the right only */
        if (pad && b->document_ids && t && b->attention_mask[k - 1]) CHECK(b->document_ids[k] != b->document_ids[k - 1]);
        if (b->position_ids && !pad) CHECK(b->position_ids[k] == (starts ? 0 : b->position_ids[k - 1] + 1));
        valid += b->labels[k] != -100;
    }
    return valid;
}

/* ---- order ---- */
static void test_permute_is_a_bijection(void)
{
    static const uint64_t sizes[] = { 1, 2, 3, 7, 63, 64, 65, 100, 1000, 4099, 70001 };
    size_t s;
    for (s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        uint64_t       n = sizes[s], i, moved = 0;
        unsigned char *seen = (unsigned char *)calloc((size_t)n, 1);
        for (i = 0; i < n; i++) {
            uint64_t j = mft__permute(5, 3, n, i);
            CHECK(j < n && !seen[j]);
            if (j < n) seen[j] = 1;
            moved += j != mft__permute(5, 4, n, i);
        }
        if (n > 50) CHECK_MSG(moved > n * 9 / 10, "%d of %d places differ from one epoch to the next", (int)moved, (int)n);
        free(seen);
    }
}

/* All 24 orders of four rows over 24,000 epochs: chi-squared with 23 degrees of freedom is below 49.7 in 999 of
 * 1000 (seen: 22). Two rounds instead of six: 6e4. */
static void test_permute_is_fair(void)
{
    int    counts[256], i, k, epoch;
    double chi = 0;
    memset(counts, 0, sizeof counts);
    for (epoch = 0; epoch < 24000; epoch++) {
        int code = 0;
        for (i = 0; i < 4; i++) code = code * 4 + (int)mft__permute(1, (uint64_t)epoch, 4, (uint64_t)i);
        counts[code]++;
    }
    for (k = 0; k < 256; k++) {
        int d[4];
        for (i = 0; i < 4; i++) d[i] = k >> 2 * i & 3;
        if (d[0] == d[1] || d[0] == d[2] || d[0] == d[3] || d[1] == d[2] || d[1] == d[3] || d[2] == d[3]) continue;
        chi += (counts[k] - 1000.0) * (counts[k] - 1000.0) / 1000.0;
    }
    CHECK_MSG(chi < 49.7, "chi-squared %.1f", chi);
}

/* ---- token files ---- */
static void test_tokens_file_in_order(void)
{
    mft_context     *ctx = new_context();
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_batch        b;
    int32_t          ids[53];
    int              i, epoch;
    const char      *path;

    for (i = 0; i < 53; i++) ids[i] = i + 10;
    memset(&d, 0, sizeof d);
    d.max_seq_len = 8; d.no_shuffle = 1; d.format = MFT_DATA_TOKENS;
    path = write_file("tokens", ids, sizeof ids);
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_OK);
    CHECK(mft_dataset_epoch_batches(ds, 3) == 3 && mft_dataset_epoch_batches(ds, 7) == 1);
    for (epoch = 0; epoch < 2; epoch++) {                       /* the same blocks in every epoch */
        CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && b.batch == 3 && b.seq == 8);
        CHECK(!b.attention_mask && !b.position_ids && !b.document_ids);
        for (i = 0; i < 24; i++) CHECK(b.input_ids[i] == i + 10 && b.labels[i] == (i % 8 ? i + 10 : -100));
        CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && b.batch == 3);
        for (i = 0; i < 24; i++) CHECK(b.input_ids[i] == i + 34);
        CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && b.batch == 1 && b.seq == 5);
        check_row(&b, 0, "58 59* 60* 61* 62*");
    }
    mft_dataset_destroy(ds);

    d.drop_last = 1;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_OK && mft_dataset_epoch_batches(ds, 3) == 2);
    for (i = 0; i < 5; i++) CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && b.batch == 3 && b.input_ids[0] == (i % 2 ? 34 : 10));
    mft_dataset_destroy(ds);

    /* one block and a token: the token alone predicts nothing and makes no row */
    path = write_file("tokens", ids, 9 * 4);
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_OK && mft_dataset_epoch_batches(ds, 1) == 1);
    CHECK(mft_dataset_next(ds, 2, &b) == MFT_ERR_INVALID_ARGUMENT);         /* drop_last, and one row only */
    remove(path);
    end_context(ctx);
}

/* ---- packing ---- */
enum { N_DOCS = 61, LONGEST = 9, SEQ = 16 };

/* Document i has 1 + i*7 % LONGEST tokens 100 i, 100 i + 1, ...; every third has labels of its own, every eleventh none. */
static int doc_make(int i, int32_t *ids, int32_t *labels)
{
    int n = 1 + i * 7 % LONGEST, t;
    for (t = 0; t < n; t++) {
        ids[t] = 100 * i + t;
        labels[t] = i % 11 == 5 ? -100 : i % 3 ? ids[t] : t % 2 ? -100 : 7;
    }
    return n;
}

static mft_dataset *packed_dataset(mft_context *ctx, int no_shuffle, int no_pack, uint64_t seed)
{
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    int32_t          ids[LONGEST], labels[LONGEST];
    int              i, n;
    memset(&d, 0, sizeof d);
    d.max_seq_len = SEQ; d.no_shuffle = no_shuffle; d.no_pack = no_pack; d.seed = seed;
    if (mft_dataset_create(ctx, NULL, &d, &ds) != MFT_OK) return NULL;
    for (i = 0; i < N_DOCS; i++) {
        n = doc_make(i, ids, labels);
        CHECK(mft_dataset_add_tokens(ds, ids, i % 3 || i % 11 == 5 ? NULL : labels, n) == MFT_OK || n == 0);
    }
    return ds;
}

/* In order of adding: a row takes documents while they fit. */
static void test_packing_against_a_naive_packer(void)
{
    mft_context *ctx = new_context();
    mft_dataset *ds = packed_dataset(ctx, 1, 0, 0);
    mft_batch    b;
    int32_t      ids[LONGEST], labels[LONGEST];
    int          i = 0, row, rows = 0, used, n, t, doc;

    for (row = 0; i < N_DOCS; row++) {
        CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK && b.batch == 1);
        check_batch(&b);
        for (used = doc = 0; i < N_DOCS; i++, doc++) {
            n = doc_make(i, ids, labels);
            if (i % 11 == 5) memcpy(labels, ids, sizeof ids);       /* packed_dataset gave those no labels */
            if (used + n > SEQ) break;
            for (t = 0; t < n; t++) {
                CHECK(b.input_ids[used + t] == ids[t]);
                CHECK(b.labels[used + t] == (t ? labels[t] : -100));
                if (b.document_ids) CHECK(b.document_ids[used + t] == doc);
                else CHECK(doc == 0);
            }
            used += n;
        }
        CHECK(b.seq == used && (b.document_ids != NULL) == (doc > 1) && (b.position_ids != NULL) == (doc > 1));
        rows++;
    }
    CHECK(mft_dataset_epoch_batches(ds, 1) == rows);
    end_context(ctx);
}

/* Shuffled: every document that teaches something once an epoch, whole and in one piece; rows stay the same rows;
 * orders differ between epochs and seeds, and agree between equal seeds. */
static void test_shuffled_epochs(void)
{
    mft_context     *ctx = new_context();
    mft_dataset     *ds = packed_dataset(ctx, 0, 0, 9), *twin = packed_dataset(ctx, 0, 0, 9), *other = packed_dataset(ctx, 0, 0, 10);
    mft_dataset_info info;
    mft_batch        b, b2, b3;
    int              epoch, k, t, differs = 0, batches = (int)mft_dataset_epoch_batches(ds, 3);
    int32_t          first_of_epoch[4] = { 0 };

    CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == N_DOCS && info.n_rows < N_DOCS / 2);
    CHECK(batches == (info.n_rows + 2) / 3);
    for (epoch = 0; epoch < 4; epoch++) {
        int     seen[N_DOCS] = { 0 };
        int64_t valid = 0, rows = 0;
        for (k = 0; k < batches; k++) {
            mft_dataset_position p;
            CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && mft_dataset_next(twin, 3, &b2) == MFT_OK && mft_dataset_next(other, 3, &b3) == MFT_OK);
            CHECK(b.batch == b2.batch && b.seq == b2.seq && memcmp(b.input_ids, b2.input_ids, (size_t)(b.batch * b.seq) * 4) == 0);
            differs += b.batch != b3.batch || b.seq != b3.seq || memcmp(b.input_ids, b3.input_ids, (size_t)(b.batch * b.seq) * 4) != 0;
            valid += check_batch(&b);
            rows  += b.batch;
            mft_dataset_get_position(ds, &p);
            CHECK(p.epoch == epoch && p.row == rows);
            if (!k) first_of_epoch[epoch] = b.input_ids[0];
            for (t = 0; t < b.batch * b.seq; t++) {
                int pad = b.attention_mask && !b.attention_mask[t];
                int starts = !pad && (t % b.seq == 0 || (b.document_ids && b.document_ids[t] != b.document_ids[t - 1]));
                if (starts) { CHECK(b.input_ids[t] % 100 == 0); seen[b.input_ids[t] / 100]++; }
                else if (!pad) CHECK(b.input_ids[t] == b.input_ids[t - 1] + 1);
            }
        }
        for (k = 0; k < N_DOCS; k++) {
            int32_t ids[LONGEST], labels[LONGEST];
            int     n = doc_make(k, ids, labels), teaches = k % 11 == 5 || k % 3 ? n > 1 : n > 2;   /* own labels count at even t > 0 */
            CHECK_MSG(seen[k] == teaches, "document %d of %d tokens: %d times", k, n, seen[k]);
        }
        CHECK(valid == info.n_supervised && rows == info.n_rows);
    }
    CHECK(differs > batches * 3);
    CHECK(first_of_epoch[0] != first_of_epoch[1] || first_of_epoch[1] != first_of_epoch[2] || first_of_epoch[2] != first_of_epoch[3]);
    end_context(ctx);
}

/* Whatever the position: set it in a fresh dataset, and the same batches follow. */
static void test_position(void)
{
    mft_context         *ctx = new_context();
    mft_dataset         *ds = packed_dataset(ctx, 0, 0, 3), *again = packed_dataset(ctx, 0, 0, 3);
    mft_dataset_info     a, c;
    mft_dataset_position p, wrong;
    mft_batch            b, b2;
    int                  i, k;

    for (i = 0; i < 20; i++) {
        CHECK(mft_dataset_next(ds, 4, &b) == MFT_OK);
        mft_dataset_get_position(ds, &p);
        CHECK(mft_dataset_set_position(again, &p) == MFT_OK);
        CHECK(mft_dataset_next(ds, 4, &b) == MFT_OK);
        for (k = 0; k < 2; k++) {
            CHECK(mft_dataset_next(again, 4, &b2) == MFT_OK);
            if (k == 0) CHECK(b.batch == b2.batch && b.seq == b2.seq && memcmp(b.labels, b2.labels, (size_t)(b.batch * b.seq) * 4) == 0);
        }
    }
    mft_dataset_report(ds, &a); mft_dataset_report(again, &c);
    CHECK(a.fingerprint == c.fingerprint);
    wrong.epoch = 0; wrong.row = a.n_rows + 1;
    CHECK(mft_dataset_set_position(ds, &wrong) == MFT_ERR_INVALID_ARGUMENT);
    wrong.row = -1;
    CHECK(mft_dataset_set_position(ds, &wrong) == MFT_ERR_INVALID_ARGUMENT);
    mft_dataset_destroy(again);
    again = packed_dataset(ctx, 0, 0, 4);                       /* another seed, another run */
    mft_dataset_report(again, &c);
    CHECK(a.fingerprint != c.fingerprint);
    end_context(ctx);
}

/* ---- JSONL rows of ids ---- */
static void test_rows_of_ids(void)
{
    static const char text[] =
        "\xef\xbb\xbf{\"input_ids\": [5, 6, 7, 8], \"labels\": [-100, -100, 7, 8]}\r\n"
        "\r\n"
        "{\"labels\": [1, 2], \"input_ids\": [3, 4], \"id\": \"x\"}\n"
        "   \n"
        "{\"input_ids\": [9, 10, 11]}\n"
        "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7]}";
    mft_context     *ctx = new_context();
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_dataset_info info;
    mft_batch        b;
    const char      *path = write_text("rows.jsonl", text);

    memset(&d, 0, sizeof d);
    d.max_seq_len = 6; d.no_shuffle = d.no_pack = 1; d.vocab_size = 12;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_dataset_next(ds, 2, &b) == MFT_OK && b.batch == 2 && b.seq == 4 && b.attention_mask && !b.document_ids && !b.position_ids);
    check_row(&b, 0, "5 6 7* 8*");
    check_row(&b, 1, "3 4(2) . .");
    CHECK(mft_dataset_next(ds, 2, &b) == MFT_OK && b.seq == 6);
    check_row(&b, 0, "9 10* 11* . . .");
    check_row(&b, 1, "1 2* 3* 4* 5* 6*");
    CHECK(mft_dataset_report(ds, &info) == MFT_OK);
    CHECK(strcmp(info.format, "jsonl (input_ids)") == 0 && info.n_samples == 4 && info.n_rows == 4 && info.n_tokens == 15);
    CHECK(info.n_supervised == 10 && info.longest == 7 && info.n_truncated == 1 && info.n_unsupervised == 0 && info.max_id == 11);
    mft_dataset_destroy(ds);

    d.no_pack = 0;                                              /* the same, packed in order */
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK && mft_dataset_load(ds, path) == MFT_OK);
    CHECK(mft_dataset_next(ds, 3, &b) == MFT_OK && b.batch == 3 && b.seq == 6);
    check_row(&b, 0, "5 6 7* 8* | 3 4(2)");
    check_row(&b, 1, "9 10* 11* . . .");
    check_row(&b, 2, "1 2* 3* 4* 5* 6*");
    check_batch(&b);
    remove(path);
    end_context(ctx);
}

/* The same objects as one JSON array, however it is laid out, give the same rows. */
static void test_json_array(void)
{
    static const char *const layouts[] = {
        "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[4,5],\"s\":\"}],{\\\\\\\"[\"}\n{\"input_ids\":[6,7]}\n",
        "[{\"input_ids\":[1,2,3]},{\"input_ids\":[4,5],\"s\":\"}],{\\\\\\\"[\"},{\"input_ids\":[6,7]}]",
        "\xef\xbb\xbf \n[\r\n  {\r\n    \"input_ids\": [1,\r\n 2, 3]\r\n  },\r\n  {\"input_ids\":[4,5],\"s\":\"}],{\\\\\\\"[\"}\r\n,\r\n  {\"input_ids\": [6, 7]}\r\n]\r\n\r\n"
    };
    static const char *const broken[][2] = {
        { "[{\"input_ids\":[1,2]}\n {\"input_ids\":[1,2]}]", "line 2" },
        { "[{\"input_ids\":[1,2]},\n\n 7]",                  "line 3" },
        { "[{\"input_ids\":[1,2]},\n",                       "does not end" },
        { "[{\"input_ids\":[1,2]\n",                         "does not end" },
        { "[{\"input_ids\":[1,2]}]\n{\"input_ids\":[1,2]}",  "line 2" },
        { "[\n {\"input_ids\":[1,2]},\n {\"input_ids\":[1,x]}]", "line 3, column 18" }
    };
    mft_context     *ctx = new_context();
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_batch        b;
    const char      *path;
    size_t           i;

    memset(&d, 0, sizeof d);
    d.no_shuffle = d.no_pack = 1;
    for (i = 0; i < 3; i++) {
        path = write_text("array.json", layouts[i]);
        CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
        CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "layout %d: %s", (int)i, mft_error_message(ctx));
        CHECK(mft_dataset_next(ds, 9, &b) == MFT_OK && b.batch == 3);
        check_row(&b, 0, "1 2* 3*"); check_row(&b, 1, "4 5* ."); check_row(&b, 2, "6 7* .");
        mft_dataset_destroy(ds);
    }
    for (i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        path = write_text("array.json", broken[i][0]);
        CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
        CHECK(mft_dataset_load(ds, path) == MFT_ERR_FORMAT);
        CHECK_MSG(strstr(mft_error_message(ctx), broken[i][1]) != NULL, "%s: %s", broken[i][0], mft_error_message(ctx));
        mft_dataset_destroy(ds);
    }
    remove(temp_path("array.json"));
    end_context(ctx);
}

/* Lines longer than any buffer, and a last line without its end. */
static void test_long_lines(void)
{
    mft_context     *ctx = new_context();
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_batch        b;
    const char      *path = temp_path("long.jsonl");
    FILE            *f = fopen(path, "wb");
    int              i, k;

    CHECK(f != NULL);
    for (i = 0; f && i < 5; i++) {
        fprintf(f, "%s{\"input_ids\": [%d, %d], \"x\": \"", i ? "\n" : "", i, i + 1);
        for (k = 0; k < (i % 2 ? 300000 : 10); k++) fputc('a' + k % 26, f);
        fprintf(f, "\"}");
    }
    if (f) fclose(f);
    memset(&d, 0, sizeof d);
    d.no_shuffle = d.no_pack = 1;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_dataset_next(ds, 5, &b) == MFT_OK && b.batch == 5);
    for (i = 0; i < 5; i++) CHECK(b.input_ids[2 * i] == i && b.input_ids[2 * i + 1] == i + 1);
    remove(path);
    end_context(ctx);
}

/* ---- bad input ---- */
typedef struct bad_file { const char *name, *text; mft_status status; const char *says[3]; } bad_file;

static void check_bad_files(mft_context *ctx, const mft_tokenizer *tok, const mft_dataset_desc *desc, const bad_file *bad, size_t n)
{
    size_t i, k;
    for (i = 0; i < n; i++) {
        mft_dataset     *ds = NULL;
        mft_dataset_info info;
        const char      *path = write_text(bad[i].name, bad[i].text);
        mft_status       s;
        CHECK(mft_dataset_create(ctx, tok, desc, &ds) == MFT_OK);
        s = mft_dataset_load(ds, path);
        CHECK_MSG(s == bad[i].status, "%s: %s, not %s: %s", bad[i].text, mft_status_string(s), mft_status_string(bad[i].status), mft_error_message(ctx));
        CHECK_MSG(strstr(mft_error_message(ctx), path) != NULL, "no path in: %s", mft_error_message(ctx));
        for (k = 0; k < 3 && bad[i].says[k]; k++)
            CHECK_MSG(strstr(mft_error_message(ctx), bad[i].says[k]) != NULL, "no \"%s\" in: %s", bad[i].says[k], mft_error_message(ctx));
        CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == 0 && info.n_rows == 0);     /* nothing of it stays */
        CHECK(mft_dataset_epoch_batches(ds, 1) == 0);
        mft_dataset_destroy(ds);
        remove(path);
    }
}

static void test_bad_files_of_ids(void)
{
    static const bad_file bad[] = {
        { "a.jsonl", "", MFT_ERR_INVALID_ARGUMENT, { "empty" } },
        { "a.jsonl", "\n \n", MFT_ERR_INVALID_ARGUMENT, { "nothing" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[1,2\n", MFT_ERR_FORMAT, { "line 2", "column 18" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n\n{\"input_ids\":[1,2]} x\n", MFT_ERR_FORMAT, { "line 3", "column 21" } },
        { "a.jsonl", "{\"input_ids\":[1,\"a\"]}", MFT_ERR_FORMAT, { "line 1", "input_ids[1]" } },
        { "a.jsonl", "{\"input_ids\":[1,2.5]}", MFT_ERR_FORMAT, { "line 1", "input_ids[1]" } },
        { "a.jsonl", "{\"input_ids\":[1,2],\"labels\":[1]}", MFT_ERR_FORMAT, { "2 input_ids", "1 labels" } },
        { "a.jsonl", "{\"input_ids\":[1,2],\"labels\":[1,99999999999]}", MFT_ERR_FORMAT, { "labels[1]" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[1,100]}", MFT_ERR_FORMAT, { "line 2", "id 100", "vocabulary of 100" } },
        { "a.jsonl", "{\"input_ids\":[1,-1]}", MFT_ERR_FORMAT, { "line 1", "id -1" } },
        { "a.jsonl", "{\"input_ids\":[1,2],\"labels\":[-100,-5]}", MFT_ERR_FORMAT, { "line 1", "label -5" } },
        { "a.jsonl", "{\"input_ids\":[]}", MFT_ERR_FORMAT, { "empty" } },
        { "a.jsonl", "{\"input_ids\":7}", MFT_ERR_FORMAT, { "a number" } },
        { "a.jsonl", "{\"input_ids\":[1,2],\"labels\":\"x\"}", MFT_ERR_FORMAT, { "labels", "a string" } },
        { "a.jsonl", "7\n", MFT_ERR_FORMAT, { "line 1", "a number" } },
        { "a.jsonl", "{\"a\":1,\"b\":2}\n", MFT_ERR_FORMAT, { "line 1", "prompt and completion", "has a, b" } },
        { "a.jsonl", "{}\n", MFT_ERR_FORMAT, { "line 1", "no keys" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n{\"text\":\"x\"}", MFT_ERR_FORMAT, { "line 2", "two formats", "jsonl (text)" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n{\"texts\":\"x\"}", MFT_ERR_FORMAT, { "line 2", "input_ids", "has texts" } },
        { "a.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[1,2],\"x\":\"\xff\"}", MFT_ERR_FORMAT, { "line 2", "UTF-8" } },
        { "a.jsonl", "{\"input_ids\":[1]}\n{\"input_ids\":[1,2],\"labels\":[5,-100]}", MFT_ERR_INVALID_ARGUMENT, { "every label is masked" } },
        { "a.jsonl", "{\"text\":\"x\"}\n", MFT_ERR_INVALID_ARGUMENT, { "line 1", "tokenizer" } },
        { "a.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n", MFT_ERR_UNSUPPORTED, { "line 1", "chat template" } },
        { "a.txt",   "hello", MFT_ERR_INVALID_ARGUMENT, { "tokenizer" } },
        { "a.bin",   "12345", MFT_ERR_FORMAT, { "5 bytes" } },
        { "a.bin",   "", MFT_ERR_INVALID_ARGUMENT, { "empty" } },
        { "a.bin",   "\1\0\0", MFT_ERR_FORMAT, { "1 bytes" } }
    };
    mft_context         *ctx = new_context();
    mft_dataset_desc     d;
    mft_dataset         *ds = NULL;
    mft_dataset_position p;
    mft_batch            b;
    static const int32_t one[1] = { 3 }, outside[2] = { 3, 100 };

    memset(&d, 0, sizeof d);
    d.vocab_size = 100;
    check_bad_files(ctx, NULL, &d, bad, sizeof bad / sizeof bad[0]);

    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, "/no/such/file.jsonl") == MFT_ERR_IO && strstr(mft_error_message(ctx), "/no/such/file.jsonl"));
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "empty"));
    CHECK(mft_dataset_add_tokens(ds, outside, NULL, 2) == MFT_ERR_FORMAT);
    CHECK(mft_dataset_add_tokens(ds, one, NULL, 1) == MFT_OK);
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "learn"));
    CHECK(mft_dataset_next(ds, 0, &b) == MFT_ERR_INVALID_ARGUMENT && mft_dataset_next(NULL, 1, &b) == MFT_ERR_INVALID_ARGUMENT);
    mft_dataset_get_position(ds, &p);
    CHECK(p.epoch == 0 && p.row == 0);
    mft_dataset_destroy(ds);

    d.max_seq_len = 1;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_ERR_INVALID_ARGUMENT && !ds);
    d.max_seq_len = 0; d.split = "trian";
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "trian"));
    d.split = NULL; d.train_on_prompt = d.assistant_loss_only = 1;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_ERR_INVALID_ARGUMENT);
    end_context(ctx);
}

static int  warnings;
static void count_warnings(void *user, mft_log_level level, const char *text) { (void)user; (void)text; warnings += level == MFT_LOG_WARNING; }

static void test_skipped_lines(void)
{
    mft_context     *ctx = new_context();
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_dataset_info info;
    mft_batch        b;
    const char      *path = write_text("skip.jsonl", "oops\n{\"input_ids\":[1,2]}\n{\"input_ids\":[1,200]}\n{\"text\":\"x\"}\n{\"input_ids\":[3,4]}\n{\"input_ids\":");

    ctx->log = count_warnings; warnings = 0;
    memset(&d, 0, sizeof d);
    d.skip_bad_lines = d.no_shuffle = 1; d.vocab_size = 100;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_bad_lines == 4 && info.n_samples == 2 && info.max_id == 4);
    CHECK(warnings == 4);
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK);
    check_row(&b, 0, "1 2* | 3 4*");
    mft_dataset_destroy(ds);
    path = write_text("skip.jsonl", "oops\n{\"a\":1}\n");
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "not one good line among 2") && strstr(mft_error_message(ctx), "line 2"));
    remove(path);
    end_context(ctx);
}

/* A file that is not what it was when it was loaded is noticed, and the position stays. */
static void test_changed_file(void)
{
    mft_context         *ctx = new_context();
    mft_dataset_desc     d;
    mft_dataset         *ds = NULL;
    mft_dataset_position p;
    mft_batch            b;
    const char          *path = write_text("change.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[3,4]}\n");
    const char          *first = write_text("change0.jsonl", "{\"input_ids\":[7,8]}\n");

    memset(&d, 0, sizeof d);
    d.no_shuffle = d.no_pack = 1;
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK && mft_dataset_load(ds, first) == MFT_OK && mft_dataset_load(ds, path) == MFT_OK);
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK && b.input_ids[0] == 7);
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_INVALID_ARGUMENT);                  /* too late to add */
    write_text("change.jsonl", "{\"input_ids\":[1,2]}\n");
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "changed") && strstr(mft_error_message(ctx), path));
    mft_dataset_get_position(ds, &p);
    CHECK(p.epoch == 0 && p.row == 1 && !b.input_ids);
    write_text("change.jsonl", "{\"input_ids\":[123]}\n{\"input_ids\":[3,4]}\n");    /* as long as before */
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "changed"));
    write_text("change.jsonl", "{\"input_ids\":[1,2]}\n{\"input_ids\":[3,4]}\n");
    CHECK(mft_dataset_next(ds, 2, &b) == MFT_OK && b.batch == 2 && b.input_ids[2] == 3);
    remove(path); remove(first);
    end_context(ctx);
}

/* ---- splitting ---- */
static void test_split(void)
{
    mft_context     *ctx = new_context();
    mft_dataset     *ds = packed_dataset(ctx, 0, 0, 1), *held = NULL, *ds2 = packed_dataset(ctx, 0, 0, 1), *held2 = NULL, *third = NULL;
    mft_dataset_info whole, a, b, c;
    mft_batch        batch;
    int              seen[N_DOCS] = { 0 }, k, t, side;

    mft_dataset_report(ds, &whole);
    CHECK(mft_dataset_split(ds, 0.2, &held) == MFT_OK && held);
    CHECK(mft_dataset_report(ds, &a) == MFT_OK && mft_dataset_report(held, &b) == MFT_OK);
    CHECK(b.n_samples == N_DOCS / 5 && a.n_samples + b.n_samples == N_DOCS);
    CHECK(a.n_tokens + b.n_tokens == whole.n_tokens && a.n_supervised + b.n_supervised == whole.n_supervised);
    CHECK(a.fingerprint != b.fingerprint && a.fingerprint != whole.fingerprint);
    for (side = 0; side < 2; side++) {                          /* whole epochs of both: each document on one side only */
        mft_dataset *x = side ? held : ds;
        int          n = (int)mft_dataset_epoch_batches(x, 2);
        for (k = 0; k < 3 * n; k++) {
            CHECK(mft_dataset_next(x, 2, &batch) == MFT_OK);
            for (t = 0; t < batch.batch * batch.seq; t++)
                if (!batch.attention_mask || batch.attention_mask[t]) seen[batch.input_ids[t] / 100] |= 1 << side;
        }
    }
    for (k = 0; k < N_DOCS; k++) CHECK_MSG(seen[k] != 3, "document %d is on both sides", k);
    CHECK(mft_dataset_split(ds2, 0.2, &held2) == MFT_OK && mft_dataset_report(held2, &c) == MFT_OK);
    CHECK(c.fingerprint == b.fingerprint && c.n_tokens == b.n_tokens);              /* the seed decides */
    CHECK(mft_dataset_split(ds, 0.2, &third) == MFT_ERR_INVALID_ARGUMENT && !third);            /* batches were taken */
    CHECK(mft_dataset_split(ds2, 1.0, &third) == MFT_ERR_INVALID_ARGUMENT && mft_dataset_split(ds2, 0.0, &third) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_dataset_split(ds2, (double)NAN, &third) == MFT_ERR_INVALID_ARGUMENT);
    mft_dataset_destroy(ds);                                    /* the sources live as long as one side does */
    CHECK(mft_dataset_next(held, 2, &batch) == MFT_OK);
    end_context(ctx);
}

/* ---- memory ---- */

/* A file of 13 MB in what its index takes: 24 bytes a sample and 8 a row, in arrays that double (2x), plus buffers. */
static void test_constant_memory(void)
{
    mft_context      *ctx = new_context();
    mft_dataset_desc  d;
    mft_dataset      *ds = NULL;
    mft_memory_report before, after;
    mft_batch         b;
    const char       *path = temp_path("large.jsonl");
    FILE             *f = fopen(path, "wb");
    long              i, n = 20000;
    int               k;

    CHECK(f != NULL);
    for (i = 0; f && i < n; i++) fprintf(f, "{\"input_ids\": [%ld, %ld, %ld], \"x\": \"%0600ld\"}\n", i, i + 1, i + 2, i);
    if (f) fclose(f);
    memset(&d, 0, sizeof d);
    mft_memory(ctx, &before);
    CHECK(mft_dataset_create(ctx, NULL, &d, &ds) == MFT_OK);
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    for (k = 0; k < 20; k++) CHECK(mft_dataset_next(ds, 4, &b) == MFT_OK && check_batch(&b) > 0);
    mft_memory(ctx, &after);
    CHECK_MSG(after.peak - before.now < (size_t)n * 24 * 3 + (1 << 18), "%.2f MB for a file of 13 MB", (double)(after.peak - before.now) / 1e6);
    remove(path);
    end_context(ctx);
}

/* The allocator refuses from the k-th request on: every call says OUT_OF_MEMORY or works, nothing leaks, and the
 * dataset can still be asked and ended. on_disk 1: its index is made; 2: it is found. */
static void allocation_failures(int on_disk)
{
    const char *path = write_text("oom.jsonl", "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[4,5],\"labels\":[4,-100]}\n{\"input_ids\":[6,7]}\n");
    long        k, failed = 0;
    for (k = 1; k < 400; k++) {
        mft_context     *ctx = new_context();
        mft_dataset     *ds = NULL, *held = NULL;
        mft_dataset_desc d;
        mft_dataset_info info;
        mft_batch        b;
        mft_status       s;
        static const int32_t ids[3] = { 1, 2, 3 }, labels[3] = { 1, 5, 3 };

        memset(&d, 0, sizeof d);
        d.text_key = "body";
        if (on_disk) { d.index_dir = index_dir; d.index_above = 1; }
        if (on_disk == 1) remove_index(ctx);
        the_heap.calls = 0; the_heap.refuse_at = k;
        s = mft_dataset_create(ctx, NULL, &d, &ds);
        if (s == MFT_OK) s = mft_dataset_load(ds, path);
        if (s == MFT_OK) s = mft_dataset_add_tokens(ds, ids, labels, 3);
        if (s == MFT_OK) s = mft_dataset_split(ds, 0.4, &held);
        if (s == MFT_OK) s = mft_dataset_next(ds, 2, &b);
        if (s == MFT_OK) s = mft_dataset_next(held, 2, &b);
        CHECK_MSG(s == MFT_OK || s == MFT_ERR_OUT_OF_MEMORY, "%ld: %s", k, mft_status_string(s));
        failed += s != MFT_OK;
        the_heap.refuse_at = 0;
        if (ds && s != MFT_OK && !held && !ds->index) {                       /* what failed is not half there, and works afterwards */
            CHECK(mft_dataset_report(ds, &info) == MFT_OK && (info.n_samples == 0 || info.n_samples == 3 || info.n_samples == 4));
            CHECK(mft_dataset_add_tokens(ds, ids, labels, 3) == MFT_OK && mft_dataset_next(ds, 1, &b) == MFT_OK);
        }
        end_context(ctx);
        if (s == MFT_OK) break;
    }
    CHECK_MSG(failed > 10 && k < 400, "%ld failures", failed);
    remove(path);
}

static void test_allocation_failure(void)
{
    mft_context *ctx;
    int          on_disk;
    for (on_disk = 0; on_disk < 3; on_disk++) allocation_failures(on_disk);
    ctx = new_context();
    remove_index(ctx);
    end_context(ctx);
}

/* Files through an mft_io, as an Android asset would be. */
typedef struct asset { const char *bytes; size_t n; int open; } asset;
static void *asset_open(void *user, const char *path, uint64_t *out_bytes)
{
    asset *a = (asset *)user;
    if (strcmp(path, "asset.jsonl") != 0) return NULL;
    a->open++;
    *out_bytes = a->n;
    return a;
}
static size_t asset_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    asset *a = (asset *)file;
    (void)user;
    if (offset >= a->n) return 0;
    if (bytes > 7) bytes = 7;                                   /* in small pieces */
    if (bytes > a->n - offset) bytes = (size_t)(a->n - offset);
    memcpy(dst, a->bytes + offset, bytes);
    return bytes;
}
static void asset_close(void *user, void *file) { (void)user; ((asset *)file)->open--; }

static void test_io_callbacks(void)
{
    static const char text[] = "{\"input_ids\":[1,2]}\n{\"input_ids\":[3,4]}\n";
    asset             a;
    mft_context_desc  d;
    mft_context      *ctx = NULL;
    mft_dataset      *ds = NULL;
    mft_batch         b;
    memset(&d, 0, sizeof d);
    a.bytes = text; a.n = sizeof text - 1; a.open = 0;
    d.io.open = asset_open; d.io.read = asset_read; d.io.close = asset_close; d.io.user = &a; d.n_threads = 1;
    CHECK(mft_context_create(&d, &ctx) == MFT_OK);
    CHECK(mft_dataset_create(ctx, NULL, NULL, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, "other.jsonl") == MFT_ERR_IO);
    CHECK_MSG(mft_dataset_load(ds, "asset.jsonl") == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK && b.seq == 4);
    mft_context_destroy(ctx);
    CHECK(a.open == 0);
}

/* ---- with a tokenizer ---- */
static mft_tokenizer *tiny(mft_context *ctx, const char *name)
{
    char           path[256];
    mft_tokenizer *tok = NULL;
    snprintf(path, sizeof path, "tests/golden/assets/tokenizers/%s", name);
    if (mft_tokenizer_load(ctx, path, &tok) != MFT_OK) printf("%s\n", mft_error_message(ctx));
    return tok;
}

static const char *const tiny_names[] = { "gpt2-tiny", "qwen-tiny", "gemma-tiny", "llama-tiny" };

/* The reference's ids of every golden text, as samples of a JSONL file of texts. */
static void test_texts_against_the_reference(void)
{
    size_t t;
    for (t = 0; t < 4; t++) {
        mft_context     *ctx = new_context();
        mft_tokenizer   *tok = tiny(ctx, tiny_names[t]);
        mft_dataset_desc d;
        mft_dataset     *ds = NULL;
        mft_json        *o;
        mft_batch        b;
        char             name[128], *golden, *line, *end;
        size_t           bytes, k;
        int              n = 0, rows = 0;
        const char      *path = temp_path("texts.jsonl");
        FILE            *f;

        snprintf(name, sizeof name, "tests/golden/assets/golden/tokenizer/%s.jsonl", tiny_names[t]);
        golden = test_read_file(name, &bytes);
        CHECK(golden && tok);
        if (!golden || !tok) { mft_context_destroy(ctx); return; }
        f = fopen(path, "wb");                                  /* those with two tokens and more */
        for (line = golden; (end = strchr(line, '\n')) != NULL; line = end + 1) {
            if (mft_json_parse(ctx, line, (size_t)(end - line), &o) != MFT_OK) continue;
            if (mft_json_count(mft_json_get(o, "ids")) > 1 && *mft_json_string(mft_json_get(o, "text"), NULL)) { fwrite(line, 1, (size_t)(end - line) + 1, f); n++; }
            mft_json_destroy(o);
        }
        fclose(f);
        memset(&d, 0, sizeof d);
        d.no_pack = d.no_shuffle = 1; d.max_seq_len = 1 << 14;
        CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
        CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
        for (line = golden; (end = strchr(line, '\n')) != NULL; line = end + 1) {
            const mft_json *ids;
            if (mft_json_parse(ctx, line, (size_t)(end - line), &o) != MFT_OK) continue;
            ids = mft_json_get(o, "ids");
            if (mft_json_count(ids) > 1 && *mft_json_string(mft_json_get(o, "text"), NULL)) {
                int same = mft_dataset_next(ds, 1, &b) == MFT_OK && (size_t)b.seq == mft_json_count(ids);
                for (k = 0; same && k < mft_json_count(ids); k++) {
                    int64_t id = mft_json_integer(mft_json_at(ids, k, NULL), -1);
                    same = b.input_ids[k] == id && b.labels[k] == (k ? id : -100);
                }
                CHECK_MSG(same, "%s: sample %d", tiny_names[t], rows);
                rows++;
            }
            mft_json_destroy(o);
        }
        CHECK(n > 20 && rows == n);
        free(golden);
        remove(path);
        end_context(ctx);
    }
}

/* Conversations: ids and the assistant's mask, as Transformers has them. */
static void test_chats_against_the_reference(void)
{
    size_t t;
    for (t = 1; t < 4; t++) {
        mft_context     *ctx = new_context();
        mft_tokenizer   *tok = tiny(ctx, tiny_names[t]);
        mft_dataset_desc d;
        mft_dataset     *ds = NULL, *all = NULL;
        mft_json        *o;
        mft_batch        b, b2;
        char             name[128], *golden, *line, *end;
        size_t           bytes, k;
        int              n = 0, masked = 0;
        const char      *path = temp_path("chats.jsonl");
        FILE            *f;

        snprintf(name, sizeof name, "tests/golden/assets/golden/chat/%s.jsonl", tiny_names[t]);
        golden = test_read_file(name, &bytes);
        CHECK(golden && tok);
        if (!golden || !tok) { mft_context_destroy(ctx); return; }
        f = fopen(path, "wb");
        for (line = golden; (end = strchr(line, '\n')) != NULL; line = end + 1)
            if (strstr(line, "\"add_generation_prompt\":false") && strstr(line, "\"add_generation_prompt\":false") < end) fwrite(line, 1, (size_t)(end - line) + 1, f);
        fclose(f);
        memset(&d, 0, sizeof d);
        d.no_pack = d.no_shuffle = 1; d.max_seq_len = 1 << 14; d.assistant_loss_only = 1;
        CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
        CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
        d.assistant_loss_only = 0; d.train_on_prompt = 1;
        CHECK(mft_dataset_create(ctx, tok, &d, &all) == MFT_OK && mft_dataset_load(all, path) == MFT_OK);
        for (line = golden; (end = strchr(line, '\n')) != NULL; line = end + 1) {
            const mft_json *ids, *mask;
            if (mft_json_parse(ctx, line, (size_t)(end - line), &o) != MFT_OK || mft_json_bool(mft_json_get(o, "add_generation_prompt"), 1)) { mft_json_destroy(o); continue; }
            ids = mft_json_get(o, "ids"); mask = mft_json_get(o, "assistant_mask");
            CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK && mft_dataset_next(all, 1, &b2) == MFT_OK);
            CHECK_MSG((size_t)b.seq == mft_json_count(ids) && b2.seq == b.seq, "%s: conversation %d: %d tokens, not %d", tiny_names[t], n, b.seq, (int)mft_json_count(ids));
            for (k = 0; k < (size_t)b.seq && k < mft_json_count(ids); k++) {
                int64_t id = mft_json_integer(mft_json_at(ids, k, NULL), -1);
                int     on = mft_json_integer(mft_json_at(mask, k, NULL), 0) == 1;
                CHECK_MSG(b.input_ids[k] == id && b.labels[k] == (on && k ? id : -100), "%s: conversation %d, token %d", tiny_names[t], n, (int)k);
                CHECK(b2.labels[k] == (k ? id : -100));
                masked += on;
            }
            n++;
            mft_json_destroy(o);
        }
        CHECK(n >= 5 && masked > 20);
        CHECK(mft_dataset_epoch_batches(ds, 1) == n);
        free(golden);
        remove(path);
        end_context(ctx);
    }
}

/* Sample `index` with its trained part in [[ ]]. */
static const char *marked(mft_dataset *ds, int64_t index)
{
    static char text[4096];
    int64_t     n = mft_dataset_sample_text(ds, index, "[[", "]]", text, (int64_t)sizeof text);
    if (n < 0) snprintf(text, sizeof text, "%s", mft_error_message(ds->corpus->ctx));
    return text;
}

static void check_marked(mft_context *ctx, const mft_tokenizer *tok, const mft_dataset_desc *d, const char *name, const char *content, int64_t index, const char *want)
{
    mft_dataset *ds = NULL;
    const char  *path = write_text(name, content);
    CHECK_MSG(mft_dataset_create(ctx, tok, d, &ds) == MFT_OK, "%s", mft_error_message(ctx));
    if (!ds) return;
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(strcmp(marked(ds, index), want) == 0, "\"%s\", not \"%s\"", marked(ds, index), want);
    mft_dataset_destroy(ds);
    remove(path);
}

/* What each format becomes, and what of it is trained on. */
static void test_formats_and_masks(void)
{
    static const char alpaca[] = "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:";
    static const char alpaca_no_input[] = "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:";
    static const char mmlu[] = "The following are multiple choice questions (with answers) about high school geography.\n\n";
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "gpt2-tiny"), *llama = tiny(ctx, "llama-tiny");
    mft_dataset_desc d;
    char             want[1024], csv[512];

    memset(&d, 0, sizeof d);
    d.max_seq_len = 1024;
    CHECK(tok && llama);
    if (!tok || !llama) { mft_context_destroy(ctx); return; }
    /* a text: everything but its first token, which nothing predicts */
    check_marked(ctx, tok, &d, "f.jsonl", "{\"text\":\"\\n\\nAnd so on\"}", 0, "\n[[\nAnd so on]]");
    d.add_eos = 1;
    check_marked(ctx, tok, &d, "f.jsonl", "{\"text\":\"\\n\\nAnd so on\"}", 0, "\n[[\nAnd so on<|endoftext|>]]");
    check_marked(ctx, tok, &d, "f.txt", "\xef\xbb\xbf\n\r\nAnd so on", 0, "\n[[\nAnd so on<|endoftext|>]]");
    d.add_eos = 0;
    /* prompt, completion */
    check_marked(ctx, tok, &d, "f.jsonl", "{\"prompt\":\"Two and two?\\nAnswer:\",\"completion\":\" four.\"}", 0, "Two and two?\nAnswer:[[ four.<|endoftext|>]]");
    check_marked(ctx, llama, &d, "f.jsonl", "{\"prompt\":\"Two and two?\\nAnswer:\",\"completion\":\" four.\"}", 0, "<s> Two and two?\nAnswer:[[ four.</s>]]");
    d.no_eos = 1;
    check_marked(ctx, tok, &d, "f.jsonl", "{\"prompt\":\"Two and two?\\nAnswer:\",\"completion\":\" four.\"}", 0, "Two and two?\nAnswer:[[ four.]]");
    d.no_eos = 0; d.train_on_prompt = 1;
    check_marked(ctx, llama, &d, "f.jsonl", "{\"prompt\":\"Two?\",\"completion\":\" four.\"}", 0, "<s>[[ Two? four.</s>]]");
    d.train_on_prompt = 0;
    /* a token that has characters of both is the completion's: " yes" is one word to the tokenizer */
    d.no_eos = 1;
    {
        int32_t ids[2];
        if (mft_tokenizer_encode(tok, " the", -1, 0, ids, 2) == 1)
            check_marked(ctx, tok, &d, "f.jsonl", "{\"prompt\":\"a piece \",\"completion\":\"the\"}", 0, "a piece[[ the]]");
        else CHECK(!"' the' is one token");
    }
    d.no_eos = 0;
    d.prompt_key = "q"; d.completion_key = "a"; d.text_key = "body";
    check_marked(ctx, tok, &d, "f.jsonl", "{\"q\":\"Two?\",\"a\":\" four.\",\"text\":\"no\"}", 0, "Two?[[ four.<|endoftext|>]]");
    check_marked(ctx, tok, &d, "f.jsonl", "{\"body\":\"\\n\\nyes\",\"text\":\"no\"}", 0, "\n[[\nyes]]");
    d.prompt_key = d.completion_key = d.text_key = NULL;
    /* Alpaca, with input and without, and seed tasks */
    snprintf(want, sizeof want, "%s[[3<|endoftext|>]]", alpaca);
    check_marked(ctx, tok, &d, "f.jsonl", "{\"instruction\":\"Add.\",\"input\":\"1 2\",\"output\":\"3\"}", 0, want);
    snprintf(want, sizeof want, "%s[[hi<|endoftext|>]]", alpaca_no_input);
    check_marked(ctx, tok, &d, "f.jsonl", "{\"instruction\":\"Say hi.\",\"input\":\"\",\"output\":\"hi\"}\n{\"instruction\":\"Say hi.\",\"output\":\"ho\"}", 0, want);
    snprintf(want, sizeof want, "%s[[ho<|endoftext|>]]", alpaca_no_input);
    check_marked(ctx, tok, &d, "f.jsonl", "{\"instruction\":\"Say hi.\",\"input\":\"\",\"output\":\"hi\"}\n{\"instruction\":\"Say hi.\",\"output\":\"ho\"}", 1, want);
    snprintf(want, sizeof want, "%s[[3<|endoftext|>]]", alpaca);
    check_marked(ctx, tok, &d, "f.json", "{\"instruction\":\"Add.\",\"instances\":[{\"input\":\"7\",\"output\":\"0\"},{\"input\":\"1 2\",\"output\":\"3\"}]}", 1, want);
    check_marked(ctx, tok, &d, "f.jsonl", "{\"prompt\":\"Two?\",\"completion\":\" four.<|endoftext|>\"}", 0, "Two?[[ four.<|endoftext|>]]");      /* once */
    /* messages without a template give way */
    snprintf(want, sizeof want, "%s[[3<|endoftext|>]]", alpaca);
    check_marked(ctx, tok, &d, "f.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"instruction\":\"Add.\",\"input\":\"1 2\",\"output\":\"3\"}", 0, want);
    /* a template of one's own */
    d.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}";
    check_marked(ctx, tok, &d, "f.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"yes\"}]}", 0, "user: x\nassistant:[[ yes]]\n");
    /* TRL's prompt and completion as messages: what the prompt's assistant says is not learnt */
    check_marked(ctx, tok, &d, "f.jsonl", "{\"prompt\":[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"content\":\"no\"},{\"role\":\"user\",\"content\":\"y\"}],"
                 "\"completion\":[{\"role\":\"assistant\",\"content\":\"yes\"}]}", 0, "user: x\nassistant: no\nuser: y\nassistant:[[ yes]]\n");
    d.chat_template = NULL;
    d.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% generation %}{{ 'th' }}{% endgeneration %}{{ 'e end' }}{% endfor %}";
    check_marked(ctx, tok, &d, "f.jsonl", "{\"messages\":[{\"role\":\"assistant\",\"content\":\"x \"}]}", 0, "assistant: x[[ the]] end");
    d.chat_template = NULL;
    /* MMLU: header, quotes, a line end in a field */
    snprintf(want, sizeof want, "%sHe said \"x\", then\nleft\nA. a\nB. b,c\nC. d\nD. e\nAnswer:[[ D<|endoftext|>]]", mmlu);
    snprintf(csv, sizeof csv, "question,A,B,C,D,answer\r\nQ,1,2,3,4,A\r\n\"He said \"\"x\"\", then\nleft\",a,\"b,c\",d,e,D");
    check_marked(ctx, tok, &d, "high_school_geography_test.csv", csv, 1, want);
    end_context(ctx);
}

static void test_bad_texts(void)
{
    static const bad_file bad[] = {
        { "a.txt",   "", MFT_ERR_INVALID_ARGUMENT, { "empty" } },
        { "a.txt",   "\n", MFT_ERR_INVALID_ARGUMENT, { "too short" } },
        { "a.txt",   "one\ntwo t\xc3\xa9 \xff\n", MFT_ERR_FORMAT, { "line 2, column 8", "0xff" } },
        { "a.txt",   "one\ntwo\xc3", MFT_ERR_FORMAT, { "line 2, column 4" } },
        { "a.txt",   "{\"text\":\"x\"} and so on\n", MFT_ERR_FORMAT, { "line 1, column 14" } },
        { "a.jsonl", "{\"text\":\"\"}", MFT_ERR_FORMAT, { "line 1", "\"text\" is empty" } },
        { "a.jsonl", "{\"text\":\"x y z\"}\n{\"text\":null}", MFT_ERR_FORMAT, { "line 2", "null, not a string" } },
        { "a.jsonl", "{\"text\":\"x y z\"}\n{\"text\":[1]}", MFT_ERR_FORMAT, { "line 2", "an array, not a string" } },
        { "a.jsonl", "{\"text\":\"x y z\"}\n{\"txt\":\"a\"}", MFT_ERR_FORMAT, { "line 2", "has txt" } },
        { "a.jsonl", "{\"prompt\":\"x\"}", MFT_ERR_FORMAT, { "line 1", "prompt and completion", "has prompt" } },
        { "a.jsonl", "{\"prompt\":\"\",\"completion\":\"a\"}", MFT_ERR_FORMAT, { "line 1", "\"prompt\" is empty" } },
        { "a.jsonl", "{\"prompt\":\"a\",\"completion\":\"\"}", MFT_ERR_FORMAT, { "line 1", "\"completion\" is empty" } },
        { "a.jsonl", "{\"prompt\":\"a\",\"completion\":7}", MFT_ERR_FORMAT, { "line 1", "a number, not a string" } },
        { "a.jsonl", "{\"instruction\":\"a\",\"output\":\"\"}", MFT_ERR_FORMAT, { "\"output\" is empty" } },
        { "a.jsonl", "{\"instruction\":\"a\",\"input\":4,\"output\":\"b\"}", MFT_ERR_FORMAT, { "\"input\" is a number" } },
        { "a.jsonl", "{\"instruction\":\"a\",\"instances\":[]}", MFT_ERR_FORMAT, { "\"instances\" is empty" } },
        { "a.jsonl", "{\"instruction\":\"a\",\"instances\":[{\"input\":\"\"}]}", MFT_ERR_FORMAT, { "\"output\" is missing" } },
        { "a.jsonl", "{\"messages\":[]}", MFT_ERR_FORMAT, { "\"messages\" is empty" } },
        { "a.jsonl", "{\"messages\":\"hi\"}", MFT_ERR_FORMAT, { "a string, not an array" } },
        { "a.jsonl", "{\"messages\":[{\"content\":\"x\"}]}", MFT_ERR_FORMAT, { "line 1", "message 1 has no role" } },
        { "a.jsonl", "{\"messages\":[{\"role\":\"user\"}]}", MFT_ERR_FORMAT, { "line 1", "message 1 has no content" } },
        { "a.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]}", MFT_ERR_UNSUPPORTED, { "message 1", "image_url" } },
        { "a.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}", MFT_ERR_INVALID_ARGUMENT, { "every label is masked" } },
        { "a.csv",   "Q,1,2,3,4,E\n", MFT_ERR_FORMAT, { "line 1", "'E'" } },
        { "a.csv",   "Q,1,2,3,4,A\nQ,1,2,3,A\n", MFT_ERR_FORMAT, { "line 2", "5 fields" } },
        { "a.csv",   "Q,1,2,3,4,A\nQ,1,2,3,4,A,B\n", MFT_ERR_FORMAT, { "line 2", "more than 6" } },
        { "a.csv",   "\"Q\n,1,2,3,4,A\nQ,1,2,3,A\n", MFT_ERR_FORMAT, { "line 1", "quotes of field 1" } },
        { "a.csv",   "\"Q\nx\",1,2,3,4,A\n\"Q\"x,1,2,3,4,A\n", MFT_ERR_FORMAT, { "line 3", "closing quote" } },
        { "a.csv",   "Q,1,,3,4,A\n", MFT_ERR_FORMAT, { "line 1", "field 3 is empty" } },
        { "a.csv",   "question,A,B,C,D,answer\n", MFT_ERR_INVALID_ARGUMENT, { "nothing" } },
        { "a.csv",   "Q,1,2,\xff,4,A\n", MFT_ERR_FORMAT, { "line 1, column 7" } }
    };
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "qwen-tiny");
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_dataset_info info;
    const char      *path;

    CHECK(tok != NULL);
    if (!tok) { mft_context_destroy(ctx); return; }
    check_bad_files(ctx, tok, NULL, bad, sizeof bad / sizeof bad[0]);

    memset(&d, 0, sizeof d);
    d.max_seq_len = 8;                                          /* every prompt fills the row: nothing would be learned */
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    path = write_text("a.jsonl", "{\"prompt\":\"a long prompt, far too long for so short a row\",\"completion\":\" yes\"}\n");
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "max_seq_len (8)"));
    mft_dataset_destroy(ds);
    d.max_seq_len = 256; d.skip_bad_lines = 1;                  /* a bad line goes as a whole, its good parts too */
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, write_text("b.jsonl", "{\"instruction\":\"a\",\"instances\":[{\"output\":\"b\"},{\"output\":\"\"}]}\n"
                                                     "{\"instruction\":\"a\",\"output\":\"c\"}\n")) == MFT_OK);
    CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == 1 && info.n_bad_lines == 1);
    CHECK(strstr(marked(ds, 0), "[[c<|im_end|>]]") != NULL);
    mft_dataset_destroy(ds);
    d.skip_bad_lines = 0;
    remove(temp_path("b.jsonl"));
    d.assistant_loss_only = 1; d.max_seq_len = 64;              /* asked for turns, got none */
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "assistant"));
    mft_dataset_destroy(ds);
    d.chat_template = "{% if";
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_ERR_FORMAT && !ds);
    d.chat_template = "{{ raise_exception('no such role') }}";
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    path = write_text("a.jsonl", "\n{\"messages\":[{\"role\":\"wizard\",\"content\":\"x\"}]}\n");
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "line 2") && strstr(mft_error_message(ctx), "no such role"));
    remove(path);
    end_context(ctx);
}

/* A long text is cut in pieces that together are the text again, whatever way it came; pieces of one JSONL line stay
 * on one side of a split. */
static void test_long_texts(void)
{
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "llama-tiny");
    mft_dataset_desc d;
    mft_dataset     *ds = NULL, *held = NULL;
    mft_dataset_info info, info_held;
    mft_batch        b;
    char             text[6000], json[7000];
    int32_t          ids[6000];
    int64_t          n, at;
    int              i, way;
    const char      *path;

    CHECK(tok != NULL);
    if (!tok) { mft_context_destroy(ctx); return; }
    for (i = 0, text[0] = '\0'; strlen(text) < 5000; i++) sprintf(text + strlen(text), "%d bottles of beer, ", 1000 - i * 7);
    n = mft_tokenizer_encode(tok, text, -1, 0, ids, 6000);
    CHECK(n > 1000 && n < 6000);
    memset(&d, 0, sizeof d);
    d.max_seq_len = 37; d.no_shuffle = 1;
    for (way = 0; way < 3; way++) {
        CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
        if (way == 0) CHECK(mft_dataset_add_text(ds, text, -1) == MFT_OK);
        if (way == 1) CHECK(mft_dataset_load(ds, write_text("long.txt", text)) == MFT_OK);
        if (way == 2) {
            snprintf(json, sizeof json, "{\"text\":\"%s\"}\n", text);
            CHECK(mft_dataset_load(ds, write_text("long.jsonl", json)) == MFT_OK);
        }
        for (at = 0; n - at > 1; at += 37) {
            CHECK(mft_dataset_next(ds, 1, &b) == MFT_OK && b.seq == (n - at < 37 ? n - at : 37) && !b.document_ids);
            CHECK(memcmp(b.input_ids, ids + at, (size_t)b.seq * 4) == 0 && b.labels[0] == -100 && memcmp(b.labels + 1, ids + at + 1, (size_t)(b.seq - 1) * 4) == 0);
        }
        CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_truncated == 0 && info.n_tokens == (n % 37 == 1 ? n - 1 : n) && info.longest == 37);
        mft_dataset_destroy(ds);
    }
    path = write_text("long.jsonl", "");
    {
        FILE *f = fopen(path, "wb");
        for (i = 0; i < 10; i++) fprintf(f, "{\"text\":\"%.*s\"}\n", 300 + 10 * i, text);
        fclose(f);
    }
    d.no_shuffle = 0;
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK && mft_dataset_load(ds, path) == MFT_OK && mft_dataset_split(ds, 0.31, &held) == MFT_OK);
    CHECK(mft_dataset_report(held, &info_held) == MFT_OK);
    at = (int64_t)held->n_groups;
    CHECK_MSG(at == 3 && info_held.n_samples > 6, "%d lines, %d samples", (int)at, (int)info_held.n_samples);
    remove(path); remove(temp_path("long.txt"));
    end_context(ctx);
}

/* A template that writes the date gets desc.now, by call and from a file, and the clock without it. */
static void test_chat_with_a_date(void)
{
    static const mft_message messages[2] = { { "user", "Hi" }, { "assistant", "Yes" } };
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "gemma-tiny");
    mft_dataset     *ds = NULL;
    mft_dataset_desc d;
    mft_batch        batch;
    int              i;
    const char      *path = write_text("d.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"assistant\",\"content\":\"Yes\"}]}");
    if (!tok) { mft_context_destroy(ctx); return; }
    memset(&d, 0, sizeof d);
    d.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    for (i = 0; i < 4; i++) {
        char text[256] = "";
        int64_t n = -1;
        d.now = i < 2 ? 1767312000 : 0;         /* 2026-01-02, 00:00 UTC */
        CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
        CHECK_MSG((i % 2 ? mft_dataset_load(ds, path) : mft_dataset_add_chat(ds, messages, 2)) == MFT_OK, "%s", mft_error_message(ctx));
        if (mft_dataset_next(ds, 1, &batch) == MFT_OK) n = mft_tokenizer_decode(tok, batch.input_ids, batch.seq, MFT_SKIP_SPECIAL, text, sizeof text - 1);
        CHECK_MSG(n > 0 && (strstr(text, "02 Jan 2026") != NULL) == (i < 2), "%s", text);
        mft_dataset_destroy(ds);
    }
    remove(path);
    end_context(ctx);
}

/* A conversation by call is the one from a file. */
static void test_add_chat(void)
{
    static const mft_message messages[2] = { { "user", "Hello!" }, { "assistant", "Hi, how can I help?" } };
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "gemma-tiny");
    mft_dataset     *a = NULL, *b = NULL;
    mft_batch        x, y;
    const char      *path = write_text("c.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello!\"},{\"role\":\"assistant\",\"content\":\"Hi, how can I help?\"}]}");
    CHECK(tok != NULL);
    if (!tok) { mft_context_destroy(ctx); return; }
    CHECK(mft_dataset_create(ctx, tok, NULL, &a) == MFT_OK && mft_dataset_create(ctx, tok, NULL, &b) == MFT_OK);
    CHECK(mft_dataset_add_chat(a, messages, 2) == MFT_OK && mft_dataset_load(b, path) == MFT_OK);
    CHECK(mft_dataset_next(a, 1, &x) == MFT_OK && mft_dataset_next(b, 1, &y) == MFT_OK && x.seq == y.seq);
    CHECK(memcmp(x.input_ids, y.input_ids, (size_t)x.seq * 4) == 0 && memcmp(x.labels, y.labels, (size_t)x.seq * 4) == 0);
    remove(path);
    end_context(ctx);
}

/* ---- directories ---- */
static void write_in(const char *dir, const char *name, const char *text)
{
    char  path[700];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    f = fopen(path, "wb");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0) { printf("cannot write %s\n", path); exit(1); }
}

static void remove_in(const char *dir, const char *name)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    CHECK(remove(path) == 0);
}

static int32_t first_id_of(mft_context *ctx, const mft_tokenizer *tok, const char *dir, const char *split)
{
    mft_dataset_desc d;
    mft_dataset     *ds = NULL;
    mft_batch        b;
    int32_t          id = -1;
    memset(&d, 0, sizeof d);
    d.split = split; d.no_shuffle = d.no_pack = 1; d.max_seq_len = 1000;
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    if (mft_dataset_load(ds, dir) == MFT_OK && mft_dataset_next(ds, 10, &b) == MFT_OK) id = b.input_ids[0] + 1000 * b.batch;
    mft_dataset_destroy(ds);
    return id;
}

static void test_directories(void)
{
    mft_context   *ctx = new_context();
    mft_tokenizer *tok = tiny(ctx, "gpt2-tiny");
    char           dir[512], dev[600], test[600];
    int32_t        ids[4];

    CHECK(tok != NULL);
    snprintf(dir, sizeof dir, "%s", temp_path("dir"));
    CHECK(mft__make_dirs(ctx, dir) == MFT_OK);
    CHECK(first_id_of(ctx, tok, dir, NULL) == -1 && strstr(mft_error_message(ctx), dir) && strstr(mft_error_message(ctx), "train.jsonl"));
    write_in(dir, "train.jsonl", "{\"input_ids\":[1,2]}");
    write_in(dir, "validation.jsonl", "{\"input_ids\":[3,2]}");
    CHECK(first_id_of(ctx, tok, dir, NULL) == 1001 && first_id_of(ctx, tok, dir, "train") == 1001 && first_id_of(ctx, tok, dir, "valid") == 1003);
    CHECK(first_id_of(ctx, tok, dir, "test") == -1 && strstr(mft_error_message(ctx), "test.jsonl"));
    remove_in(dir, "train.jsonl"); remove_in(dir, "validation.jsonl");

    snprintf(dev, sizeof dev, "%s/dev", dir);
    snprintf(test, sizeof test, "%s/test", dir);
    CHECK(mft__make_dirs(ctx, dev) == MFT_OK && mft__make_dirs(ctx, test) == MFT_OK);
    write_in(dev, "b_dev.csv", "Q,1,2,3,4,A\nQ,1,2,3,4,B\n");
    write_in(dev, "a_dev.csv", "Q,1,2,3,4,A\n");
    write_in(test, "a_test.csv", "Q,1,2,3,4,A\n");
    CHECK(mft_tokenizer_encode(tok, "The", -1, 0, ids, 4) >= 1);
    CHECK(first_id_of(ctx, tok, dir, "train") == 3000 + ids[0] && first_id_of(ctx, tok, dir, "test") == 1000 + ids[0]);
    CHECK(first_id_of(ctx, tok, dir, "valid") == -1);
    CHECK(first_id_of(ctx, tok, dev, "valid") == 3000 + ids[0]);           /* a directory of CSV files is what it is */
    remove_in(dev, "a_dev.csv"); remove_in(dev, "b_dev.csv"); remove_in(test, "a_test.csv");
    CHECK(remove(dev) == 0 && remove(test) == 0 && remove(dir) == 0);
    end_context(ctx);
}

/* ---- the index on disk ---- */
static mft_dataset *load_with(mft_context *ctx, const mft_tokenizer *tok, const mft_dataset_desc *desc, const char *path, int on_disk)
{
    mft_dataset_desc d = *desc;
    mft_dataset     *ds = NULL;
    if (on_disk) { d.index_dir = index_dir; d.index_above = 1; }
    CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
    CHECK_MSG(mft_dataset_load(ds, path) == MFT_OK, "%s", mft_error_message(ctx));
    return ds;
}

/* Two datasets say the same of themselves and give the same batches for two epochs. */
static void check_same(mft_dataset *a, mft_dataset *b, const char *what)
{
    mft_dataset_info x, y;
    mft_batch        p, q;
    int64_t          k, n;
    CHECK(mft_dataset_report(a, &x) == MFT_OK && mft_dataset_report(b, &y) == MFT_OK);
    CHECK(!x.index_bytes);
    CHECK_MSG(y.index_bytes > 0 && strcmp(x.format, y.format) == 0 && x.n_samples == y.n_samples && x.n_rows == y.n_rows && x.n_tokens == y.n_tokens
              && x.n_supervised == y.n_supervised && x.longest == y.longest && x.n_truncated == y.n_truncated && x.n_unsupervised == y.n_unsupervised
              && x.n_bad_lines == y.n_bad_lines && x.max_id == y.max_id && x.fingerprint == y.fingerprint, "%s: %lld and %lld samples", what,
              (long long)x.n_samples, (long long)y.n_samples);
    n = 2 * mft_dataset_epoch_batches(a, 3);
    for (k = 0; k < n; k++) {
        size_t cells;
        CHECK(mft_dataset_next(a, 3, &p) == MFT_OK);
        CHECK_MSG(mft_dataset_next(b, 3, &q) == MFT_OK, "%s: %s", what, mft_error_message(b->corpus->ctx));
        if (q.batch != p.batch || q.seq != p.seq) { CHECK_MSG(0, "%s: batch %d has another shape", what, (int)k); return; }
        cells = (size_t)p.batch * (size_t)p.seq * 4;
        CHECK(memcmp(p.input_ids, q.input_ids, cells) == 0 && memcmp(p.labels, q.labels, cells) == 0);
        CHECK(!p.attention_mask == !q.attention_mask && !p.document_ids == !q.document_ids);
        if (p.document_ids && q.document_ids) CHECK(memcmp(p.document_ids, q.document_ids, cells) == 0);
    }
}

/* Every format, packed and not, in order and not, whole and split: an index in files gives what one in memory gives,
 * when it is made and when it is found. */
static void test_index_on_disk(void)
{
    static const char *const files[][2] = {
        { "i.txt",   "The first line of it.\r\nThe second one, and a third:\r\nit goes on like this for a while, longer than a row is.\r\n" },
        { "i.csv",   "Q,1,2,3,4,A\n\"Q, again\",1,2,3,4,B\nLast,1,2,3,4,C\n" },
        { "i.jsonl", "{\"text\":\"one\"}\nnot JSON\n\n{\"text\":\"a text of many words, so many that it does not fit one row and goes on in the next, and the next\"}\n{\"text\":\"three\"}\n" },
        { "j.jsonl", "{\"instruction\":\"a\",\"instances\":[{\"output\":\"b\"},{\"input\":\"x\",\"output\":\"cc\"}]}\n{\"instruction\":\"d\",\"output\":\"e\"}\n" },
        { "k.jsonl", "[{\"input_ids\":[1,2,3]},\n{\"input_ids\":[4,5,6,7],\"labels\":[-100,5,-100,7]},{\"input_ids\":[8,9],\"labels\":[-100,-100]},{\"input_ids\":[1,9]}]" },
        { "l.bin",   "\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\5\0\0\0\6\0\0\0\7\0\0\0" }
    };
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = tiny(ctx, "llama-tiny");
    mft_dataset_desc d;
    size_t           f;
    int              way;
    if (!tok) { CHECK(0); mft_context_destroy(ctx); return; }
    for (f = 0; f < sizeof files / sizeof files[0]; f++) for (way = 0; way < 8; way++) {
        const char      *path = way ? temp_path(files[f][0]) : f == 5 ? write_file(files[f][0], files[f][1], 28) : write_text(files[f][0], files[f][1]);
        mft_dataset_info info;
        int              again;
        memset(&d, 0, sizeof d);
        d.max_seq_len = f == 5 ? 3 : f == 2 || f == 0 ? 16 : 300;
        d.no_pack = way & 1; d.no_shuffle = way >> 1 & 1; d.skip_bad_lines = 1; d.seed = 7;
        for (again = 0; again < 2; again++) {
            mft_dataset *a = load_with(ctx, tok, &d, path, 0), *b = load_with(ctx, tok, &d, path, 1), *x = NULL, *y = NULL;
            if (way >> 2) {
                CHECK(mft_dataset_split(a, 0.5, &x) == MFT_OK && mft_dataset_split(b, 0.5, &y) == MFT_OK);
                if (x && y) check_same(x, y, files[f][0]);
            }
            check_same(a, b, files[f][0]);
            CHECK_MSG(mft_dataset_report(b, &info) == MFT_OK && info.index_reused == (again || way > 0), "%s %d %d", files[f][0], way, again);     /* one index for all ways of taking it */
            mft_dataset_destroy(a); mft_dataset_destroy(b); mft_dataset_destroy(x); mft_dataset_destroy(y);
        }
        if (way == 7) remove(path);
    }
    remove_index(ctx);
    end_context(ctx);
}

/* What makes an index old, what damages it, and what it is not made for. */
static void test_index_is_checked(void)
{
    mft_context     *ctx = new_context();
    mft_dataset_desc d, e;
    mft_dataset     *ds;
    mft_dataset_info info;
    mft_batch        b;
    const char      *path = write_text("old.jsonl", "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[4,5]}\n");
    char             file[700];
    int              k;
    memset(&d, 0, sizeof d);
    mft_dataset_destroy(load_with(ctx, NULL, &d, path, 1));
    for (k = 0; k < 4; k++) {
        e = d;
        if (k == 1) e.max_seq_len = 100;                        /* another setting */
        if (k == 3) write_text("old.jsonl", "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[6,5]}\n");       /* other bytes, as many, at once */
        ds = load_with(ctx, NULL, &e, path, 1);
        CHECK(mft_dataset_report(ds, &info) == MFT_OK);
        CHECK_MSG(info.index_reused == (k == 0), "%d", k);      /* 2: overwritten by 1 */
        CHECK(mft_dataset_next(ds, 2, &b) == MFT_OK);
        mft_dataset_destroy(ds);
    }
    /* every single byte of the index changed: made anew, refused by name, or harmless; never read beyond */
    ds = load_with(ctx, NULL, &d, path, 1);
    CHECK(mft_dataset_next(ds, 2, &b) == MFT_OK);
    snprintf(file, sizeof file, "%s", ds->samples.path);
    mft_dataset_destroy(ds);
    {
        size_t bytes, i;
        char  *index = test_read_file(file, &bytes);
        int    refused = 0, reused = 0;
        CHECK(index && bytes == MFT__INDEX_HEADER + 2 * sizeof(mft__sample));
        for (i = 0; index && i < bytes; i++) {
            mft_status s;
            FILE      *f = fopen(file, "wb");
            index[i] ^= (char)0x41;
            if (!f || fwrite(index, 1, bytes, f) != bytes || fclose(f) != 0) { CHECK(0); break; }
            index[i] ^= (char)0x41;
            ds = load_with(ctx, NULL, &d, path, 1);
            s = mft_dataset_next(ds, 2, &b);
            CHECK(mft_dataset_report(ds, &info) == MFT_OK || s != MFT_OK);
            reused += info.index_reused;
            if (s != MFT_OK) { refused++; CHECK(s == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "old.jsonl")); }
            mft_dataset_destroy(ds);
        }
        CHECK_MSG(refused > 20 && reused > 40 && reused < (int)bytes / 2 + 60, "%d refused, %d taken", refused, reused);
        free(index);
    }
    remove_index(ctx);
    write_text("index", "a file");                              /* where the directory should be */
    e = d; e.index_dir = index_dir; e.index_above = 1;
    CHECK(mft_dataset_create(ctx, NULL, &e, &ds) == MFT_OK);
    CHECK(mft_dataset_load(ds, path) == MFT_ERR_IO && strstr(mft_error_message(ctx), index_dir));
    CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == 0);
    remove(index_dir);
    CHECK(mft_dataset_load(ds, path) == MFT_OK);
    CHECK(mft_dataset_add_tokens(ds, (const int32_t *)"\1\0\0\0\2\0\0\0", NULL, 2) == MFT_OK && mft_dataset_load(ds, path) == MFT_OK);
    CHECK(mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == 5 && info.n_tokens == 12);      /* file, call, file: all there */
    CHECK(mft_dataset_load(ds, temp_path("not there")) == MFT_ERR_IO && mft_dataset_report(ds, &info) == MFT_OK && info.n_samples == 5);
    CHECK(mft_dataset_next(ds, 5, &b) == MFT_OK && check_batch(&b) == 7);
    mft_dataset_destroy(ds);
    write_text("old.jsonl", "{\"input_ids\":[1,2,3]}\nnonsense\n");                /* a bad line leaves no index behind */
    CHECK(mft_dataset_create(ctx, NULL, &e, &ds) == MFT_OK && mft_dataset_load(ds, path) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "line 2"));
    mft_dataset_destroy(ds);
    remove_index(ctx);
    e.index_above = 1000;                                       /* small files have none */
    write_text("old.jsonl", "{\"input_ids\":[1,2,3]}\n");
    CHECK(mft_dataset_create(ctx, NULL, &e, &ds) == MFT_OK && mft_dataset_load(ds, path) == MFT_OK && mft__file_kind(index_dir) == MFT__NO_PATH);
    remove(path);
    end_context(ctx);
}

/* A text many parts long is encoded as if it were one: no token differs from those of the whole, whatever stands where
 * it is cut: line ends, characters of four bytes, runs of one character, hardly a blank. */
static void test_long_plain_text(void)
{
    static const char *const pieces[] = { "The quick brown fox jumps over the lazy dog. ", "\n\n", "    indented\n", "caf\xc3\xa9 \xf0\x9f\x99\x82\xf0\x9f\x99\x82 ", "\r\n",
        "=====", "\xe4\xbd\xa0\xe5\xa5\xbd\xe4\xb8\x96\xe7\x95\x8c", "don't, 'twas 1234567 ", "a+b", " ", "<|im_end|>", "e\xcc\x81" };
    size_t t, bytes = 900000, n, k, i;
    char  *text = (char *)malloc(bytes + 64), *lf = (char *)malloc(bytes + 64);
    uint32_t seed = 5;
    for (n = 0; n < bytes; ) {
        size_t which = (size_t)((test_random(&seed) + 1) * 6) % 12, times = which == 5 ? (size_t)((test_random(&seed) + 1) * 400) : 1;
        for (; times-- && n < bytes; n += strlen(pieces[which])) memcpy(text + n, pieces[which], strlen(pieces[which]));
    }
    for (i = k = 0; i < n; i++) if (text[i] != '\r' || i + 1 == n || text[i + 1] != '\n') lf[k++] = text[i];
    for (t = 0; t < 4; t++) {
        mft_context     *ctx = new_context();
        mft_tokenizer   *tok = tiny(ctx, tiny_names[t]);
        mft_dataset_desc d;
        mft_dataset     *ds;
        mft_batch        b;
        int32_t         *ids = (int32_t *)malloc((k + 64) * sizeof *ids);
        int64_t          want, at = 0, row;
        const char      *path = write_file("long.txt", text, n);
        CHECK(tok != NULL);
        if (!tok) { mft_context_destroy(ctx); break; }
        want = mft_tokenizer_encode(tok, lf, (int64_t)k, 0, ids, (int64_t)k + 64);
        memset(&d, 0, sizeof d);
        d.max_seq_len = 1000; d.no_shuffle = 1;
        ds = load_with(ctx, tok, &d, path, t % 2 == 1);
        for (row = 0; at < want - 1; row++, at += b.seq) {
            if (mft_dataset_next(ds, 1, &b) != MFT_OK || at + b.seq > want || memcmp(b.input_ids, ids + at, (size_t)b.seq * 4) != 0) {
                CHECK_MSG(0, "%s: other tokens in row %d of %d", tiny_names[t], (int)row, (int)(want / 1000));
                break;
            }
        }
        CHECK(at >= want - 1 && row == mft_dataset_epoch_batches(ds, 1));
        mft_dataset_destroy(ds);
        remove(path);
        remove_index(ctx);
        free(ids);
        end_context(ctx);
    }
    free(text); free(lf);
}

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static long process_peak_kb(void)
{
    char  line[256];
    long  kb = -1;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f)) sscanf(line, "VmHWM: %ld", &kb);
    if (f) fclose(f);
    return kb;
}

/* The peak of a process that loads, splits and trains on a file of n lines (n < 0: on a text of them). */
static long peak_of(long n)
{
    const char *path = temp_path(n > 0 ? "peak.jsonl" : "peak.txt");
    FILE       *f = fopen(path, "wb");
    long        i, peak = -1;
    int         ends[2];
    pid_t       child;
    for (i = 0; f && i < labs(n); i++)
        fprintf(f, n > 0 ? "{\"prompt\": \"What is the number %ld times seven?\", \"completion\": \"It is %ld.\"}\n" : "The number %ld times seven, as all know, is %ld.\n", i, 7 * i);
    if (!f || fclose(f) != 0 || pipe(ends) != 0) return -1;
    fflush(stdout);
    child = fork();
    if (!child) {
        mft_context     *ctx = new_context();
        mft_tokenizer   *tok = tiny(ctx, "qwen-tiny");
        mft_dataset_desc d;
        mft_dataset     *ds, *held = NULL;
        mft_batch        b;
        int              k = 0;
        memset(&d, 0, sizeof d);
        d.max_seq_len = 64;
        ds = load_with(ctx, tok, &d, path, 1);
        if (mft_dataset_split(ds, 0.1, &held) == MFT_OK)
            for (k = 0; k < 200 && mft_dataset_next(ds, 4, &b) == MFT_OK && mft_dataset_next(held, 4, &b) == MFT_OK; k++) {}
        peak = k == 200 ? process_peak_kb() : -1;
        if (write(ends[1], &peak, sizeof peak) != (ssize_t)sizeof peak) _exit(1);
        mft_context_destroy(ctx);
        _exit(0);
    }
    if (child < 0 || read(ends[0], &peak, sizeof peak) != (ssize_t)sizeof peak) peak = -1;
    waitpid(child, NULL, 0);
    close(ends[0]); close(ends[1]);
    remove(path);
    return peak;
}

/* VmHWM of whole processes: ten times the data, the same memory. An index in memory would
 * add 32 bytes for each of 72,000 samples, 2.3 MB. */
static void test_constant_peak(void)
{
    mft_context *ctx;
    int          text;
    for (text = 0; text < 2; text++) {
        long small = peak_of(text ? -8000 : 8000), large = peak_of(text ? -80000 : 80000);
        CHECK_MSG(small > 0 && large > 0 && large - small < 1024, "%s: %ld KB for 8,000 lines, %ld KB for 80,000", text ? "text" : "JSONL", small, large);
    }
    ctx = new_context();
    remove_index(ctx);
    end_context(ctx);
}
#else
static void test_constant_peak(void) { SKIP("peak memory of a process: needs Linux' /proc, and no sanitizer that keeps what is freed"); }
#endif

/* ---- real data: what Transformers counts ---- */
static void test_counts_against_the_reference(void)
{
    size_t           bytes, i, n;
    char            *text = test_read_file("tests/golden/dataset_counts.json", &bytes);
    mft_context     *ctx = new_context();
    mft_tokenizer   *tok = NULL;
    mft_json        *cases = NULL;
    const char      *loaded = "";
    mft_dataset_info info;
    char             path[512];

    if (!test_file_exists(test_data("assets/text/seed_tasks.jsonl"))) { mft_context_destroy(ctx); free(text); SKIP("counts over real data: %s is not there", test_data("assets")); }
    CHECK(text && mft_json_parse(ctx, text, bytes, &cases) == MFT_OK && mft_json_count(cases) > 40);
    for (i = 0, n = mft_json_count(cases); i < n; i++) {
        const mft_json  *o = mft_json_at(cases, i, NULL);
        const char      *name = mft_json_string(mft_json_get(o, "tokenizer"), NULL), *file = mft_json_string(mft_json_get(o, "path"), NULL);
        mft_dataset_desc d;
        mft_dataset     *ds = NULL;
        if (strcmp(name, loaded) != 0) {
            mft_tokenizer_destroy(tok);
            tok = NULL;
            snprintf(path, sizeof path, "assets/tokenizers/%s", name);
            CHECK_MSG(mft_tokenizer_load(ctx, test_data(path), &tok) == MFT_OK, "%s", mft_error_message(ctx));
            loaded = name;
        }
        if (!tok) continue;
        memset(&d, 0, sizeof d);
        d.max_seq_len = (int)mft_json_integer(mft_json_get(o, "max_seq_len"), 0);
        d.split = mft_json_string(mft_json_get(o, "split"), NULL);
        snprintf(path, sizeof path, "assets/%s", file);
        CHECK(mft_dataset_create(ctx, tok, &d, &ds) == MFT_OK);
        CHECK_MSG(mft_dataset_load(ds, test_data(path)) == MFT_OK, "%s", mft_error_message(ctx));
        CHECK(mft_dataset_report(ds, &info) == MFT_OK);
        CHECK_MSG(strcmp(info.format, mft_json_string(mft_json_get(o, "format"), NULL)) == 0, "%s %s: %s", name, file, info.format);
#define SAME(field) CHECK_MSG(info.field == mft_json_integer(mft_json_get(o, #field), -1), "%s %s %s: %s %lld, not %lld", name, file, d.split, #field, \
                              (long long)info.field, (long long)mft_json_integer(mft_json_get(o, #field), -1))
        SAME(n_samples); SAME(n_tokens); SAME(n_supervised); SAME(longest); SAME(n_truncated); SAME(n_unsupervised);
#undef SAME
        mft_dataset_destroy(ds);
    }
    free(text);
    end_context(ctx);
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%.300s/mft_test_dataset_%ld", tmp && *tmp ? tmp : "/tmp", mft__os_process());
    if (!mft__os_make_dir(temp_dir)) { printf("cannot make %s\n", temp_dir); return 1; }
    snprintf(index_dir, sizeof index_dir, "%s/index", temp_dir);
    TEST(test_permute_is_a_bijection);
    TEST(test_permute_is_fair);
    TEST(test_tokens_file_in_order);
    TEST(test_packing_against_a_naive_packer);
    TEST(test_shuffled_epochs);
    TEST(test_position);
    TEST(test_rows_of_ids);
    TEST(test_json_array);
    TEST(test_long_lines);
    TEST(test_bad_files_of_ids);
    TEST(test_skipped_lines);
    TEST(test_changed_file);
    TEST(test_split);
    TEST(test_constant_memory);
    TEST(test_allocation_failure);
    TEST(test_io_callbacks);
    TEST(test_texts_against_the_reference);
    TEST(test_chats_against_the_reference);
    TEST(test_formats_and_masks);
    TEST(test_bad_texts);
    TEST(test_long_texts);
    TEST(test_chat_with_a_date);
    TEST(test_add_chat);
    TEST(test_directories);
    TEST(test_index_on_disk);
    TEST(test_index_is_checked);
    TEST(test_long_plain_text);
    TEST(test_constant_peak);
    TEST(test_counts_against_the_reference);
    if (remove(temp_dir) != 0) printf("%s is not empty\n", temp_dir);
    return test_report("dataset");
}
