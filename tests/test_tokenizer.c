/* test_tokenizer.c - [TOKENIZER] against the reference's output: every line of tests/golden/assets and of
 * ../shared/assets; small tokenizers written out here for what published ones do not use; broken files;
 * every allocation failing in turn; texts that are hard for a slow algorithm. */
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "../mft_models.h"
#include "test.h"

#include <time.h>

static mft_context *ctx;

/* ---- golden lines ---- */

typedef struct ids { int32_t p[40000]; int64_t n; } ids;
static ids  wanted, got;
static char text_out[400000];

static void read_ids(const mft_json *list, ids *out)
{
    size_t i;
    out->n = (int64_t)mft_json_count(list);
    for (i = 0; i < (size_t)out->n && i < 40000; i++) out->p[i] = (int32_t)mft_json_integer(mft_json_at(list, i, NULL), -1);
}

static int same_ids(const ids *a, const ids *b) { return a->n == b->n && memcmp(a->p, b->p, (size_t)a->n * sizeof *a->p) == 0; }

static int encodes_to(const mft_tokenizer *tok, const char *text, size_t n, int flags, const mft_json *list)
{
    read_ids(list, &wanted);
    got.n = mft_tokenizer_encode(tok, text, (int64_t)n, flags, got.p, 40000);
    return same_ids(&got, &wanted);
}

/* Both ways of decoding. */
static int decodes_to(const mft_tokenizer *tok, const mft_json *list, int flags, const mft_json *want)
{
    size_t       n;
    const char  *s = mft_json_string(want, &n), *piece;
    int64_t      bytes, i, at = 0;
    mft_decoder *d;
    int          same;
    read_ids(list, &wanted);
    bytes = mft_tokenizer_decode(tok, wanted.p, wanted.n, flags, text_out, sizeof text_out);
    same = s && bytes == (int64_t)n && memcmp(text_out, s, n) == 0;
    if (mft_decoder_create(tok, flags, &d) != MFT_OK) return 0;
    for (i = 0; i <= wanted.n && same; i++) {
        piece = i < wanted.n ? mft_decoder_push(d, wanted.p[i], &bytes) : mft_decoder_finish(d, &bytes);
        same = piece && piece[bytes] == '\0' && at + bytes <= (int64_t)n && memcmp(piece, s + at, (size_t)bytes) == 0
            && mft__utf8_valid(piece, (size_t)bytes) == (size_t)bytes;          /* no character is cut */
        at += bytes;
    }
    mft_decoder_destroy(d);
    return same && at == (int64_t)n;
}

/* With places the ids are the same, which `got` has; places never decrease. */
static int begins_fit(const mft_tokenizer *tok, const char *text, size_t n)
{
    static int32_t p[40000], begins[40000];
    int64_t i, count = mft__encode_begins(tok, text, (int64_t)n, 0, p, begins, 40000);
    if (count != got.n || memcmp(p, got.p, (size_t)count * sizeof *p) != 0) return 0;
    for (i = 0; i < count; i++) if (begins[i] < (i ? begins[i - 1] : 0) || begins[i] > (int32_t)n) return 0;
    return 1;
}

typedef int (*line_fn)(const mft_tokenizer *tok, const mft_json *row);

static int tokenizer_line(const mft_tokenizer *tok, const mft_json *row)
{
    size_t      n;
    const char *text = mft_json_string(mft_json_get(row, "text"), &n);
    const mft_json *skip = mft_json_get(row, "decoded_skip_special");
    if (!skip) skip = mft_json_get(row, "decoded");
    return text && encodes_to(tok, text, n, 0, mft_json_get(row, "ids")) && begins_fit(tok, text, n)
        && encodes_to(tok, text, n, MFT_NO_ADD_SPECIAL, mft_json_get(row, "ids_no_special"))
        && decodes_to(tok, mft_json_get(row, "ids_no_special"), 0, mft_json_get(row, "decoded"))
        && decodes_to(tok, mft_json_get(row, "ids"), MFT_SKIP_SPECIAL, skip);
}

static int decode_line(const mft_tokenizer *tok, const mft_json *row)
{
    return decodes_to(tok, mft_json_get(row, "ids"), 0, mft_json_get(row, "decoded"))
        && decodes_to(tok, mft_json_get(row, "ids"), MFT_SKIP_SPECIAL, mft_json_get(row, "decoded_skip_special"));
}

static int invalid_line(const mft_tokenizer *tok, const mft_json *row)
{
    char        raw[4096];
    size_t      n, i;
    const char *hex = mft_json_string(mft_json_get(row, "hex"), &n);
    if (!hex || n > 8192) return 0;
    for (i = 0; i < n / 2; i++) raw[i] = (char)(mft__hex_digit(hex[2 * i]) << 4 | mft__hex_digit(hex[2 * i + 1]));
    return encodes_to(tok, raw, n / 2, MFT_NO_ADD_SPECIAL, mft_json_get(row, "ids_no_special"));
}

/* Returns the number of lines, 0 if the file is not there. */
static int each_line(const mft_tokenizer *tok, const char *path, line_fn fn)
{
    size_t bytes;
    int    lines = 0, bad = 0;
    char  *text = test_read_file(path, &bytes), *p, *q;
    if (!text) return 0;
    for (p = text; p < text + bytes; p = q + 1) {
        mft_json *row;
        q = (char *)memchr(p, '\n', (size_t)(text + bytes - p));
        if (!q) q = text + bytes;
        lines++;
        if (q == p) continue;
        if (mft_json_parse(ctx, p, (size_t)(q - p), &row) != MFT_OK) { CHECK_MSG(0, "%s line %d: %s", path, lines, mft_error_message(ctx)); break; }
        if (!fn(tok, row) && bad++ < 3) CHECK_MSG(0, "%s line %d: %.120s", path, lines, p);
        mft_json_destroy(row);
    }
    free(text);
    return lines;
}

/* One tokenizer (a directory or file) against the golden files of `name` under root. */
static void golden(const char *root, const char *tokenizer, const char *name)
{
    char           path[1200];
    mft_tokenizer *tok;
    int            lines;
    snprintf(path, sizeof path, "%s/%s", root, tokenizer);
    if (mft_tokenizer_load(ctx, path, &tok) != MFT_OK) { CHECK_MSG(0, "%s: %s", path, mft_error_message(ctx)); return; }
    snprintf(path, sizeof path, "%s/golden/tokenizer/%s.jsonl", root, name);
    lines = each_line(tok, path, tokenizer_line);
    CHECK_MSG(lines > 100, "%s: %d lines", path, lines);
    snprintf(path, sizeof path, "%s/golden/decode/%s.jsonl", root, name);
    CHECK(each_line(tok, path, decode_line) > 10);
    snprintf(path, sizeof path, "%s/golden/tokenizer_invalid_utf8/%s.jsonl", root, name);
    if (test_file_exists(path)) CHECK(each_line(tok, path, invalid_line) > 10);
    mft_tokenizer_destroy(tok);
}

/* The older forms, which count only where there is no tokenizer.json: given through an mft_io that hides it. */
static void *hiding_open(void *user, const char *path, uint64_t *out_bytes)
{
    size_t n;
    char  *text;
    (void)user;
    if (strstr(path, "tokenizer.json")) return NULL;
    text = test_read_file(path, &n);
    *out_bytes = n;
    return text;
}
static size_t hiding_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes) { (void)user; memcpy(dst, (char *)file + offset, bytes); return bytes; }
static void   hiding_close(void *user, void *file) { (void)user; free(file); }

static void golden_old_form(const char *root, const char *tokenizer, const char *name)
{
    mft_context_desc desc;
    mft_context     *was = ctx;
    memset(&desc, 0, sizeof desc);
    desc.io.open = hiding_open; desc.io.read = hiding_read; desc.io.close = hiding_close;
    if (mft_context_create(&desc, &ctx) != MFT_OK) { ctx = was; CHECK(0); return; }
    golden(root, tokenizer, name);
    mft_context_destroy(ctx);
    ctx = was;
}

static const char committed[] = "tests/golden/assets";
static void test_committed_gpt2(void)        { golden(committed, "tokenizers/gpt2-tiny",  "gpt2-tiny"); }
static void test_committed_gpt2_merges(void) { golden_old_form(committed, "tokenizers/gpt2-tiny", "gpt2-tiny"); }
static void test_committed_qwen(void)        { golden(committed, "tokenizers/qwen-tiny",  "qwen-tiny"); }
static void test_committed_llama(void)       { golden(committed, "tokenizers/llama-tiny", "llama-tiny"); }
static void test_committed_gemma(void)       { golden(committed, "tokenizers/gemma-tiny", "gemma-tiny"); }

static void shared_golden(const char *tokenizer, const char *name, int old_form)
{
    char root[1024], path[1200];
    snprintf(root, sizeof root, "%s", test_data("assets"));
    snprintf(path, sizeof path, "%s/golden/tokenizer/%s.jsonl", root, name);
    if (!test_file_exists(path)) SKIP("the published tokenizer %s: no %s", name, path);
    if (old_form) golden_old_form(root, tokenizer, name); else golden(root, tokenizer, name);
}
static void test_gpt2(void)             { shared_golden("tokenizers/gpt2", "gpt2", 0); }
static void test_gpt2_merges(void)      { shared_golden("tokenizers/gpt2", "gpt2", 1); }
static void test_qwen25(void)           { shared_golden("tokenizers/qwen2.5", "qwen2.5", 0); }
static void test_qwen25_merges(void)    { shared_golden("tokenizers/qwen2.5", "qwen2.5", 1); }
static void test_qwen3(void)            { shared_golden("tokenizers/qwen3", "qwen3", 0); }
static void test_gemma3(void)           { shared_golden("tokenizers/gemma3", "gemma3", 0); }
static void test_stories(void)          { shared_golden("models/stories260k-llama", "stories260k", 0); }
static void test_stories_model(void)    { shared_golden("models/stories260k-llama", "stories260k", 1); }
static void test_stories_model_file(void) { shared_golden("models/stories260k-llama/tokenizer.model", "stories260k", 0); }
static void test_gpt2_small(void)       { shared_golden("models/gpt2-shakespeare", "gpt2-shakespeare", 0); }
static void test_gpt2_small_merges(void){ shared_golden("models/gpt2-shakespeare", "gpt2-shakespeare", 1); }
static void test_gemma3_small(void)     { shared_golden("models/gemma3-shakespeare", "gemma3-shakespeare", 0); }

/* ---- tokenizers written out here, in files that are in memory ---- */

static const char *memory_json, *memory_config;
static size_t      memory_json_bytes;

typedef struct memory_file { const char *p; size_t n; } memory_file;
static void *memory_open(void *user, const char *path, uint64_t *out_bytes)
{
    memory_file *f;
    const char  *p = strstr(path, "tokenizer_config.json") ? memory_config : strstr(path, "tokenizer.json") ? memory_json : NULL;
    (void)user;
    if (!p) return NULL;
    f = (memory_file *)malloc(sizeof *f);
    f->p = p; f->n = p == memory_json && memory_json_bytes ? memory_json_bytes : strlen(p);
    *out_bytes = f->n;
    return f;
}
static size_t memory_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes) { (void)user; memcpy(dst, ((memory_file *)file)->p + offset, bytes); return bytes; }
static void   memory_close(void *user, void *file) { (void)user; free(file); }

static mft_context *memory_context(const mft_allocator *allocator)
{
    mft_context_desc desc;
    mft_context     *c = NULL;
    memset(&desc, 0, sizeof desc);
    desc.io.open = memory_open; desc.io.read = memory_read; desc.io.close = memory_close;
    if (allocator) desc.allocator = *allocator;
    desc.n_threads = 1;
    mft_context_create(&desc, &c);
    return c;
}

/* A tokenizer over the letters a..e, the space as U+2581, blanks and a few merges; what is given goes in. */
static const char *letters(const char *added, const char *normalizer, const char *pre_tokenizer, const char *decoder, const char *model)
{
    static char text[8192];
    snprintf(text, sizeof text,
             "{\"added_tokens\": [%s], \"normalizer\": %s, \"pre_tokenizer\": %s, \"post_processor\": null, \"decoder\": %s, \"model\": {\"type\": \"BPE\", %s"
             "\"vocab\": {\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":4,\" \":5,\"\\n\":6,\"\xe2\x96\x81\":7,\"ab\":8,\"cd\":9,\"abcd\":10,\"\xe2\x96\x81" "a\":11,\"_\":12,\"\xc3\xa9\":13,"
             "\"aa\":14,\"aaa\":15,\"ba\":16}, \"merges\": [\"a b\",[\"c\",\"d\"],\"ab cd\",\"\xe2\x96\x81 a\",\"a a\",\"aa a\"]}}", added, normalizer, pre_tokenizer, decoder, model);
    return text;
}

/* Encodes in that tokenizer; ids as "1 2 3". */
static const char *in_letters(const char *json, const char *text, int flags)
{
    static char    out[8][512];
    static int     next;
    char          *s = out[next++ % 8];
    mft_context   *c = memory_context(NULL);
    mft_tokenizer *tok;
    int32_t        p[64];
    int64_t        n, i;
    size_t         at = 0;
    memory_json = json; memory_json_bytes = 0; memory_config = "{}";
    s[0] = '\0';
    if (mft_tokenizer_load(c, "x", &tok) != MFT_OK) snprintf(s, 512, "%.500s", mft_error_message(c));
    else {
        n = mft_tokenizer_encode(tok, text, -1, flags, p, 64);
        for (i = 0; i < n; i++) at += (size_t)snprintf(s + at, 512 - at, i ? " %d" : "%d", (int)p[i]);
    }
    mft_context_destroy(c);
    return s;
}

#define ADDED(id, content, flags) "{\"id\":" #id ",\"content\":\"" content "\"" flags "}"
#define IDS_ARE(json, text, flags, want) do { const char *s__ = in_letters(json, text, flags); CHECK_MSG(strcmp(s__, want) == 0, "%s: %s, not %s", text, s__, want); } while (0)

/* All by `tokenizers` 0.23.3. */
static void test_added_tokens(void)
{
    const char *plain = "null";
    static char json[8192];

    strcpy(json, letters(ADDED(20, "ab", "") "," ADDED(21, "abc", "") "," ADDED(22, "<x>", ""), plain, plain, plain, ""));
    IDS_ARE(json, "abcd", 0, "21 3");                                       /* longest; 20 is 8, since "ab" is a piece */
    IDS_ARE(json, "abab<x>c<x", 0, "8 8 22 2");                             /* '<' and 'x' are no pieces and there is no unk: dropped */
    strcpy(json, letters(ADDED(20, "<x>", ",\"single_word\":true"), plain, plain, plain, ""));
    IDS_ARE(json, "<x> <x>a <x>_ \xc3\xa9<x> -<x>-", 0, "20 5 0 5 12 5 13 5 20");
    strcpy(json, letters(ADDED(20, "<x>", ",\"lstrip\":true"), plain, plain, plain, ""));
    IDS_ARE(json, "a \n <x> b", 0, "0 20 5 1");
    strcpy(json, letters(ADDED(20, "<x>", ",\"rstrip\":true"), plain, plain, plain, ""));
    IDS_ARE(json, "a <x> \n\xe3\x80\x80 b", 0, "0 5 20 1");
    strcpy(json, letters(ADDED(20, "<x>", ",\"rstrip\":true,\"lstrip\":true"), plain, plain, plain, ""));
    IDS_ARE(json, " <x>  <x> ", 0, "20 20");
    /* of a blank that strips itself, what is left after the first is nothing */
    strcpy(json, letters(ADDED(20, "  ", ",\"rstrip\":true,\"lstrip\":true"), plain, plain, plain, ""));
    IDS_ARE(json, "a     b", 0, "0 20 1");
    /* looked for in the text as it is, or as the normalizer leaves it */
    strcpy(json, letters(ADDED(20, "a b", ",\"normalized\":false"), "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}", plain, plain, ""));
    IDS_ARE(json, "a b a\xe2\x96\x81" "b", 0, "20 11 7 1");
    strcpy(json, letters(ADDED(20, "a b", ",\"normalized\":true"), "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}", plain, plain, ""));
    IDS_ARE(json, "a b a\xe2\x96\x81" "b", 0, "20 7 20");
    /* special text as plain text: special tokens only, and what they hide stays hidden */
    strcpy(json, letters(ADDED(20, "<a>", ",\"special\":true") "," ADDED(21, "<b>", ",\"special\":false") "," ADDED(22, "a", ",\"special\":false"), plain, plain, plain, ""));
    IDS_ARE(json, "<a><b>a", 0, "20 21 0");
    IDS_ARE(json, "<a><b>a", MFT_NO_PARSE_SPECIAL, "0 21 0");
    /* an added character is not a piece: it is no part of words */
    strcpy(json, letters(ADDED(20, "x", ",\"special\":true"), plain, plain, plain, "\"unk_token\":\"_\","));
    IDS_ARE(json, "axb", 0, "0 20 1");
    IDS_ARE(json, "axb", MFT_NO_PARSE_SPECIAL, "0 12 1");
}

static void test_merges(void)
{
    static char json[8192];
    const char *plain = "null";
    strcpy(json, letters("", plain, plain, plain, ""));
    IDS_ARE(json, "abcd", 0, "10");
    IDS_ARE(json, "", 0, "");
    IDS_ARE(json, "aaa", 0, "15");
    IDS_ARE(json, "aaaa", 0, "14 14");                                      /* a pair, a pair; the leftmost first */
    IDS_ARE(json, "aaaaa", 0, "14 15");
    IDS_ARE(json, "aab", 0, "0 8");                                         /* rank, not place */
    IDS_ARE(json, "xaxbx", 0, "8");                                         /* unknown characters drop out, and the rest closes up */
    strcpy(json, letters("", plain, plain, plain, "\"unk_token\":\"_\","));
    IDS_ARE(json, "xyaxb", 0, "12 12 0 12 1");
    strcpy(json, letters("", plain, plain, plain, "\"unk_token\":\"_\",\"fuse_unk\":true,"));
    IDS_ARE(json, "xyaxb", 0, "12 0 12 1");
    strcpy(json, letters("", plain, "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"first\",\"split\":true}", plain, "\"ignore_merges\":true,"));
    IDS_ARE(json, "aab ba a", 0, "11 8 7 1 0 11");                           /* with its U+2581, "ba" is no piece */
    strcpy(json, letters("", plain, "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":\"Isolated\",\"invert\":false}", plain, "\"ignore_merges\":true,"));
    IDS_ARE(json, "ba bab", 0, "16 5 1 8");
    strcpy(json, letters("", plain, plain, plain, ""));
    IDS_ARE(json, "ba", 0, "1 0");
}

/* The list with a heap against looking for the lowest rank each time, on random words of the letters that merge most. */
static void test_short_and_long_agree(void)
{
    static const char *const dirs[2] = { "gpt2-tiny", "gemma-tiny" };
    uint32_t seed = 7;
    int      k, i, j;
    for (k = 0; k < 2; k++) {
        char           path[200], word[MFT__SHORT_WORD];
        mft_tokenizer *tok;
        snprintf(path, sizeof path, "tests/golden/assets/tokenizers/%s", dirs[k]);
        if (mft_tokenizer_load(ctx, path, &tok) != MFT_OK) { CHECK_MSG(0, "%s", mft_error_message(ctx)); return; }
        for (i = 0; i < 20000; i++) {
            int32_t few[MFT__SHORT_WORD];
            size_t  n = (size_t)((test_random(&seed) + 1) * 0.5f * MFT__SHORT_WORD), m;
            int64_t left;
            for (j = 0; j < (int)n; j++) word[j] = "etaoinshrde  thinger"[(int)((test_random(&seed) + 1) * 10) % 20];
            m = mft__bpe_symbols(tok, (const unsigned char *)word, n, few);
            CHECK(mft__grow_ids(ctx, tok->work, MFT__SHORT_WORD));
            memcpy(tok->work->ids, few, sizeof few);
            left = mft__bpe_long(tok, m);
            m = mft__bpe_short(tok, few, m);
            if (left != (int64_t)m || memcmp(few, tok->work->ids, m * sizeof few[0]) != 0) { CHECK_MSG(0, "%.*s", (int)n, word); break; }
        }
        mft_tokenizer_destroy(tok);
    }
}

/* A stretch is cut before U+2581, but not where a merge reaches over the cut. By `tokenizers` 0.23.3. */
static void test_cutting_at_spaces(void)
{
    static const char json[] = "{\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"vocab\":{\"?\":0,\"a\":1,\"b\":2,\">\":3,\"\xe2\x96\x81\":4,\"\xe2\x96\x81\xe2\x96\x81\":5,\"\xe2\x96\x81<\":6,\">\xe2\x96\x81<\":7,\"<\":8,"
                               "\"\xe2\x96\x81" "a\":9},\"merges\":[\"\xe2\x96\x81 <\",\"> \xe2\x96\x81<\",\"\xe2\x96\x81 \xe2\x96\x81\",\"\xe2\x96\x81 a\"]}}";
    IDS_ARE(json, "a>\xe2\x96\x81<b\xe2\x96\x81<", 0, "1 7 2 6");
    IDS_ARE(json, "\xe2\x96\x81\xe2\x96\x81" "a\xe2\x96\x81" "a>\xe2\x96\x81" "a", 0, "5 1 9 3 9");
    IDS_ARE(json, "xx\xe2\x96\x81x\xe2\x96\x81\xe2\x96\x81", 0, "0 0 4 0 5");
}

static void test_metaspace(void)
{
    static char json[8192];
    const char *plain = "null";
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"first\",\"split\":false}", plain, ""));
    IDS_ARE(json, "ab<x>ab", 0, "7 8 20 8");
    IDS_ARE(json, " ab", 0, "7 8");
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"always\",\"split\":false}", plain, ""));
    IDS_ARE(json, "ab<x>ab", 0, "7 8 20 7 8");
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Split\",\"pattern\":{\"String\":\"b\"},\"behavior\":\"MergedWithPrevious\",\"invert\":false}", plain, ""));
    IDS_ARE(json, "abcd", 0, "8 9");
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Split\",\"pattern\":{\"String\":\"b\"},\"behavior\":\"MergedWithNext\",\"invert\":false}", plain, ""));
    IDS_ARE(json, "abcd", 0, "0 1 9");
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Split\",\"pattern\":{\"String\":\"b\"},\"behavior\":\"Removed\",\"invert\":false}", plain, ""));
    IDS_ARE(json, "abcdb", 0, "0 9");
    strcpy(json, letters(ADDED(20, "<x>", ""), plain, "{\"type\":\"Split\",\"pattern\":{\"String\":\"b\"},\"behavior\":\"Isolated\",\"invert\":false}", plain, ""));
    IDS_ARE(json, "abbcd", 0, "0 1 1 9");
}

/* Where tokens begin in the text, through all that changes it on the way. */
static void begins_are(const char *json, const char *text, const char *want)
{
    mft_context   *c = memory_context(NULL);
    mft_tokenizer *tok;
    char           s[256] = "";
    int32_t        p[64], begins[64];
    int64_t        n, i;
    size_t         at = 0;
    memory_json = json; memory_json_bytes = 0; memory_config = "{}";
    if (mft_tokenizer_load(c, "x", &tok) != MFT_OK) CHECK_MSG(0, "%s", mft_error_message(c));
    else {
        n = mft__encode_begins(tok, text, -1, 0, p, begins, 64);
        for (i = 0; i < n; i++) at += (size_t)snprintf(s + at, sizeof s - at, i ? " %d" : "%d", (int)begins[i]);
        CHECK_MSG(strcmp(s, want) == 0, "%s: %s, not %s", text, s, want);
    }
    mft_context_destroy(c);
}

static void test_begins(void)
{
    static char json[8192];
    const char *plain = "null", *spaces = "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}";
    strcpy(json, letters(ADDED(20, "<x>", ",\"lstrip\":true"), plain, plain, plain, ""));
    begins_are(json, "abcd", "0");
    begins_are(json, "ab <x>e<x>", "0 2 6 7");                              /* the blank is the token's */
    begins_are(json, "x\xffyeze", "3 5");                                   /* dropped characters; a byte that is none counts one */
    strcpy(json, letters("", "{\"type\":\"NFC\"}", plain, plain, ""));
    begins_are(json, "e e\xcc\x81 e", "0 1 2 5 6");
    strcpy(json, letters("", spaces, plain, plain, "\"unk_token\":\"_\","));
    begins_are(json, "e eab x\xe4\xbd\xa0 a", "0 1 2 3 5 6 7 10");
    strcpy(json, letters("", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\xe2\x96\x81\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xe2\x96\x81\"}]}", plain, plain, "\"unk_token\":\"_\",\"fuse_unk\":true,"));
    begins_are(json, "b axyzb", "0 0 1 3 6");
    strcpy(json, letters("", plain, "{\"type\":\"Metaspace\",\"replacement\":\"\xe2\x96\x81\",\"prepend_scheme\":\"always\",\"split\":true}", plain, ""));
    begins_are(json, "b a  b", "0 0 1 3 4 5");
    begins_are(json, "\xff" "b", "0 1");
}

/* ---- patterns: where words end ---- */

static void words_are(const unsigned char *(*split)(const mft__unicode *, const unsigned char *, const unsigned char *, int), int digits, const char *text, const char *want)
{
    mft__unicode *u = mft__unicode_create(ctx);
    const unsigned char *p = (const unsigned char *)text, *end = p + strlen(text), *q;
    char   out[512];
    size_t at = 0;
    while (p < end) {
        q = split(u, p, end, digits);
        if (q <= p || q > end) { CHECK_MSG(0, "%s: no progress", text); break; }
        if (at) out[at++] = '|';
        memcpy(out + at, p, (size_t)(q - p));
        at += (size_t)(q - p);
        p = q;
    }
    out[at] = '\0';
    CHECK_MSG(strcmp(out, want) == 0, "%s, not %s", out, want);
    mft__unicode_destroy(ctx, u);
}

static void test_patterns(void)                     /* by the regex package, with the patterns as written */
{
    words_are(mft__split_gpt2, 0, "I'll don't DON'T we're 123abc  x", "I|'ll| don|'t| DON|'|T| we|'re| 123|abc| | x");
    words_are(mft__split_gpt2, 0, "a  \n\n b \t", "a|  \n\n| b| \t");
    words_are(mft__split_gpt2, 0, "  '''x \xc2\xbd\xc2\xb2 \xe2\x80\x99s", " | '''|x| \xc2\xbd\xc2\xb2| \xe2\x80\x99|s");
    words_are(mft__split_cl100k, 1, "I'LL can'T 123 (x) {\n\n}\n  y", "I|'LL| can|'T| |1|2|3| (|x|)| {\n\n|}\n| | y");
    words_are(mft__split_cl100k, 3, "12345 a\n \n  b \xe3\x80\x80" "c", "123|45| a|\n \n| | b| |\xe3\x80\x80" "c");
    words_are(mft__split_cl100k, 3, "'\xc5\xbf \tx .\r\n\r\nz  ", "'\xc5\xbf| |\tx| .\r\n\r\n|z|  ");
}

/* ---- what is asked of a tokenizer ---- */

static void test_questions(void)
{
    mft_tokenizer *tok;
    mft_decoder   *d;
    const char    *piece;
    char           s[64];
    int32_t        bad[3] = { 0, 1000000, 0 }, few[2];
    mft_context   *c = memory_context(NULL);
    memory_json   = letters(ADDED(20, "<s>", ",\"special\":true") "," ADDED(21, "<t>", ""), "null", "null", "null", "");
    memory_config = "{\"bos_token\": {\"content\": \"<s>\"}, \"eos_token\": \"<t>\", \"pad_token\": null}";
    memory_json_bytes = 0;
    CHECK(mft_tokenizer_load(c, "x", &tok) == MFT_OK);
    CHECK(mft_tokenizer_vocab_size(tok) == 22 && mft_tokenizer_bos_id(tok) == 20 && mft_tokenizer_eos_id(tok) == 21 && mft_tokenizer_pad_id(tok) == -1);
    CHECK(mft_tokenizer_is_special(tok, 20) && !mft_tokenizer_is_special(tok, 21) && !mft_tokenizer_is_special(tok, -1) && !mft_tokenizer_is_special(tok, 22));
    CHECK(mft_tokenizer_token_to_id(tok, "abcd", -1) == 10 && mft_tokenizer_token_to_id(tok, "<t>", -1) == 21 && mft_tokenizer_token_to_id(tok, "abcdx", 4) == 10);
    CHECK(mft_tokenizer_token_to_id(tok, "nope", -1) == -1 && mft_tokenizer_token_to_id(tok, "", -1) == -1 && mft_tokenizer_token_to_id(tok, "\xff", -1) == -1);
    CHECK(mft_tokenizer_id_to_token(tok, 10, s, sizeof s) == 4 && memcmp(s, "abcd", 4) == 0 && mft_tokenizer_id_to_token(tok, 10, NULL, 0) == 4);
    CHECK(mft_tokenizer_id_to_token(tok, 18, s, sizeof s) == -1 && mft_tokenizer_id_to_token(tok, -1, s, sizeof s) == -1);
    CHECK(strcmp(mft_tokenizer_kind(tok), "SentencePiece-style BPE, 17 pieces, 6 merges, 2 added tokens") == 0);
    CHECK(mft_tokenizer_encode(tok, "abcda", -1, 0, few, 1) == 2 && few[0] == 10);                /* the count is the whole text's */
    CHECK(mft_tokenizer_encode(tok, "abcda", 3, 0, NULL, 0) == 2 && mft_tokenizer_encode(tok, NULL, 0, 0, NULL, 0) == 0);
    CHECK(mft_tokenizer_encode(tok, NULL, 3, 0, few, 1) == MFT_ERR_INVALID_ARGUMENT && mft_tokenizer_encode(tok, "a", -1, 0, NULL, 1) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_tokenizer_decode(tok, bad, 1, 0, s, 0) == 1);
    CHECK(mft_tokenizer_decode(tok, bad, 3, 0, s, 64) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(c), "ids[1] is 1000000"));
    bad[1] = 18;                                                                                   /* in range, but nobody's */
    CHECK(mft_tokenizer_decode(tok, bad, 3, 0, s, 64) == MFT_ERR_INVALID_ARGUMENT);
    bad[1] = -1;
    CHECK(mft_tokenizer_decode(tok, bad, 3, 0, s, 64) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_decoder_create(tok, 0, &d) == MFT_OK);                /* generated ids: a model may have more rows than there are tokens */
    CHECK((piece = mft_decoder_push(d, 1000000, NULL)) != NULL && !*piece && (piece = mft_decoder_push(d, 18, NULL)) != NULL && !*piece);
    CHECK(!mft_decoder_push(d, -1, NULL) && (piece = mft_decoder_push(d, 10, NULL)) != NULL && !strcmp(piece, "abcd"));
    mft_decoder_destroy(d);
    CHECK(mft_tokenizer_bytes(tok) > 100000 && mft_tokenizer_bytes(tok) < 3000000);
    CHECK(mft_tokenizer_load(c, NULL, &tok) == MFT_ERR_INVALID_ARGUMENT && tok == NULL);
    mft_context_destroy(c);                                                                         /* takes the tokenizer with it */
    mft_tokenizer_destroy(NULL); mft_decoder_destroy(NULL);

    CHECK(mft_tokenizer_load(ctx, "tests/golden/assets/tokenizers/gpt2-tiny", &tok) == MFT_OK);
    CHECK(mft_tokenizer_id_to_token(tok, mft_tokenizer_token_to_id(tok, "\xc4\xa0", -1), s, 64) == 2 && memcmp(s, "\xc4\xa0", 2) == 0);    /* U+0120, a space */
    CHECK(mft_tokenizer_token_to_id(tok, " ", -1) == -1);
    CHECK(mft_tokenizer_eos_id(tok) == mft_tokenizer_token_to_id(tok, "<|endoftext|>", 13));
    mft_tokenizer_destroy(tok);
}

/* ---- files that are not right ---- */

static void refused(const char *json, mft_status status, const char *part)
{
    mft_context   *c = memory_context(NULL);
    mft_tokenizer *tok = (mft_tokenizer *)&tok;
    mft_status     s;
    memory_json = json; memory_config = "{}";
    s = mft_tokenizer_load(c, "dir", &tok);
    CHECK_MSG(s == status && tok == NULL && strstr(mft_error_message(c), part) && strstr(mft_error_message(c), "tokenizer.json"), "status %d, '%s', wanted '%s'", (int)s, mft_error_message(c), part);
    mft_context_destroy(c);
}

static void test_bad_files(void)
{
    const char *n = "null";
    char       *deep;
    memory_json_bytes = 0;
    refused("", MFT_ERR_FORMAT, "line 1");
    refused("[]", MFT_ERR_FORMAT, "wrong type");
    refused("{}", MFT_ERR_FORMAT, "no model.vocab");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0}}}", MFT_ERR_FORMAT, "no model.merges");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", MFT_ERR_FORMAT, "empty");
    refused("{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",0]]}}", MFT_ERR_UNSUPPORTED, "'Unigram'");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":[\"a\"],\"merges\":[]}}", MFT_ERR_FORMAT, "model.vocab is of the wrong type");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", MFT_ERR_FORMAT, "a token's id is of the wrong type");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", MFT_ERR_FORMAT, "the id -1");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1.5},\"merges\":[]}}", MFT_ERR_FORMAT, "the id 1.5");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":4000000000},\"merges\":[]}}", MFT_ERR_FORMAT, "the id 4000000000");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", MFT_ERR_FORMAT, "two tokens have the id 0");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", MFT_ERR_FORMAT, "'a' is there twice");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"vocab\":{\"a\":0},\"merges\":[]}}", MFT_ERR_FORMAT, "there twice");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b\"]}}", MFT_ERR_FORMAT, "what they make");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a x\"]}}", MFT_ERR_FORMAT, "the second");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"ab\"]}}", MFT_ERR_FORMAT, "merge 0 is not two pieces");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b c\"]}}", MFT_ERR_FORMAT, "merge 0 is not two pieces");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\"]]}}", MFT_ERR_FORMAT, "merge 0 is not two pieces");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\",\"b\",\"c\"]]}}", MFT_ERR_FORMAT, "merge 0 is not two pieces");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[7]}}", MFT_ERR_FORMAT, "merge 0 is not two pieces");
    refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":{}}}", MFT_ERR_FORMAT, "model.merges is of the wrong type");
    refused(letters("", n, n, n, "\"unk_token\":\"<unk>\","), MFT_ERR_FORMAT, "'<unk>' is not in the vocabulary");
    refused(letters("", n, n, n, "\"dropout\":0.1,"), MFT_ERR_UNSUPPORTED, "model.dropout");
    refused(letters("", n, n, n, "\"end_of_word_suffix\":\"</w>\","), MFT_ERR_UNSUPPORTED, "model.end_of_word_suffix");
    refused(letters("", n, n, n, "\"byte_fallback\":3,"), MFT_ERR_FORMAT, "true or false");
    refused(letters("{\"id\":20}", n, n, n, ""), MFT_ERR_FORMAT, "an added token needs");
    refused(letters("{\"id\":\"20\",\"content\":\"x\"}", n, n, n, ""), MFT_ERR_FORMAT, "an added token needs");
    refused(letters("{\"id\":20,\"content\":\"x\",\"special\":1}", n, n, n, ""), MFT_ERR_FORMAT, "an added token needs");
    refused(letters("{\"id\":99999999999,\"content\":\"x\"}", n, n, n, ""), MFT_ERR_UNSUPPORTED, "has ids up to 99999999999");
    refused(letters("{\"id\":3,\"content\":\"x\"}", n, n, n, ""), MFT_ERR_FORMAT, "two tokens have the id 3");
    refused(letters("7", n, n, n, ""), MFT_ERR_FORMAT, "no object");
    refused(letters("", "{\"type\":\"NFKC\"}", n, n, ""), MFT_ERR_UNSUPPORTED, "a normalizer of type 'NFKC'");
    refused(letters("", "{\"kind\":\"NFC\"}", n, n, ""), MFT_ERR_FORMAT, "a normalizer without a type");
    refused(letters("", "7", n, n, ""), MFT_ERR_FORMAT, "are objects or null");
    refused(letters("", "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" +\"},\"content\":\"x\"}", n, n, ""), MFT_ERR_UNSUPPORTED, "the pattern ' +'");
    refused(letters("", "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"x\"}", n, n, ""), MFT_ERR_FORMAT, "lacks a string");
    refused(letters("", n, "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"[a-z]+\"},\"behavior\":\"Isolated\"}", n, ""), MFT_ERR_UNSUPPORTED, "pattern '[a-z]+'");
    refused(letters("", n, "{\"type\":\"Punctuation\"}", n, ""), MFT_ERR_UNSUPPORTED, "'Punctuation'");
    refused(letters("", n, "{\"type\":\"ByteLevel\"}", n, ""), MFT_ERR_UNSUPPORTED, "ByteLevel");
    refused(letters("", n, n, "{\"type\":\"WordPiece\"}", ""), MFT_ERR_UNSUPPORTED, "'WordPiece'");
    refused(letters("", n, n, "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}", ""), MFT_ERR_UNSUPPORTED, "in this order");
    refused("{\"post_processor\":{\"type\":\"BertProcessing\"},\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}", MFT_ERR_UNSUPPORTED, "'BertProcessing'");
    refused("{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]},\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}", MFT_ERR_FORMAT, "item 0");
    refused("{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"x\":{\"ids\":[9]}}},"
            "\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}", MFT_ERR_FORMAT, "'x' has an id that no token has");
    deep = (char *)malloc(10000001);                    /* 10 MB of nesting: found before anything is built */
    memset(deep, '[', 10000000); deep[10000000] = '\0';
    memcpy(deep, "{\"model\":", 9);
    refused(deep, MFT_ERR_FORMAT, "model is of the wrong type");
    memcpy(deep, "{\"added\":", 9);
    refused(deep, MFT_ERR_UNSUPPORTED, "nested");
    free(deep);
}

/* A file cut anywhere is refused, with a sentence. */
static void test_cut_files(void)
{
    static const char *const dirs[2] = { "tests/golden/assets/tokenizers/qwen-tiny/tokenizer.json", "tests/golden/assets/tokenizers/gemma-tiny/tokenizer.json" };
    int k;
    for (k = 0; k < 2; k++) {
        size_t n, cut;
        char  *text = test_read_file(dirs[k], &n);
        if (!text) { CHECK(text); return; }
        while (n && (text[n - 1] == '\n' || text[n - 1] == ' ')) n--;
        for (cut = 1; cut < n; cut += cut < 600 || cut + 600 > n ? 7 : 229) {
            mft_context   *c = memory_context(NULL);
            mft_tokenizer *tok;
            mft_status     s;
            memory_json = text; memory_json_bytes = cut; memory_config = "{}";
            s = mft_tokenizer_load(c, "dir", &tok);
            if (s != MFT_ERR_FORMAT || !*mft_error_message(c)) CHECK_MSG(0, "cut to %d bytes: status %d, %s", (int)cut, (int)s, mft_error_message(c));
            mft_context_destroy(c);
        }
        free(text);
    }
    memory_json_bytes = 0;
}

static void test_no_files(void)
{
    mft_tokenizer *tok;
    CHECK(mft_tokenizer_load(ctx, "tests/golden/no-such-place", &tok) == MFT_ERR_IO && strstr(mft_error_message(ctx), "no-such-place"));
    CHECK(mft_tokenizer_load(ctx, "tests/golden/no-such-place/tokenizer.json", &tok) == MFT_ERR_IO);
    CHECK(mft_tokenizer_load(ctx, "tests/golden/no-such-place/tokenizer.model", &tok) == MFT_ERR_IO);
}

/* ---- memory ---- */

typedef struct limited { int left; long out; } limited;
static void *limited_alloc(void *user, size_t bytes, size_t align)
{
    limited *l = (limited *)user;
    if (l->left-- <= 0) return NULL;
    l->out++;
    return mft__default_alloc(NULL, bytes, align);
}
static void limited_free(void *user, void *p, size_t bytes) { ((limited *)user)->out--; mft__default_free(NULL, p, bytes); }

/* Allocation number i fails: OUT_OF_MEMORY with its sentence, nothing lost, and it still works with more. */
static void test_every_allocation(void)
{
    static const char *const files[2] = { "tests/golden/assets/tokenizers/qwen-tiny/tokenizer.json", "tests/golden/assets/tokenizers/llama-tiny/tokenizer.json" };
    static char long_text[4000];
    int k, i;
    for (i = 0; i < 3990; i++) long_text[i] = "ab \xcc\x81\xff"[i % 6 == 3 ? 3 : i % 6 == 4 ? 4 : i % 6 == 5 ? 5 : i % 3];
    for (k = 0; k < 2; k++) {
        int done = 0;
        memory_json = test_read_file(files[k], NULL); memory_config = "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\"}}"; memory_json_bytes = 0;
        if (!memory_json) { CHECK(memory_json); return; }
        for (i = 0; i < 3000 && !done; i++) {
            mft_allocator  a;
            limited        l;
            mft_context   *c;
            mft_tokenizer *tok = NULL;
            mft_decoder   *d = NULL;
            int64_t        n = 0, bytes = 0;
            mft_status     s = MFT_OK;
            int            j;
            l.left = i; l.out = 0;
            a.alloc = limited_alloc; a.free = limited_free; a.user = &l;
            c = memory_context(&a);
            if (c) {
                s = mft_tokenizer_load(c, "x", &tok);
                if (s == MFT_OK) n = mft_tokenizer_encode(tok, long_text, -1, 0, got.p, 40000);
                if (n > 0) bytes = mft_tokenizer_decode(tok, got.p, n, 0, text_out, sizeof text_out);
                if (bytes > 0 && (s = mft_decoder_create(tok, 0, &d)) == MFT_OK)
                    for (j = 0; j < n; j++) if (!mft_decoder_push(d, got.p[j], NULL)) { s = MFT_ERR_OUT_OF_MEMORY; break; }
                done = s == MFT_OK && n > 0 && bytes > 0;
                CHECK_MSG(done || ((s == MFT_ERR_OUT_OF_MEMORY || n == MFT_ERR_OUT_OF_MEMORY || bytes == MFT_ERR_OUT_OF_MEMORY)
                                   && strstr(mft_error_message(c), "the allocator could not give")), "allocation %d: %d %d %s", i, (int)s, (int)n, mft_error_message(c));
                if (tok && !done) {                     /* what failed for want of memory goes well with it */
                    l.left = 1 << 20;
                    CHECK(mft_tokenizer_encode(tok, long_text, -1, 0, got.p, 40000) > 0);
                }
            }
            mft_context_destroy(c);
            CHECK_MSG(l.out == 0, "allocation %d: %ld blocks are lost", i, l.out);
        }
        CHECK(done && i > 15);
        free((void *)(uintptr_t)memory_json);
    }
}

/* ---- texts that are hard for a slow algorithm ---- */

static void test_long_words(void)
{
    static const char *const dirs[4] = { "gpt2-tiny", "qwen-tiny", "llama-tiny", "gemma-tiny" };
    static const char *const units[] = { "a", " ", "\n", "7", "'", "ab", "\xe4\xbd\xa0", "\xff", "\xcc\x81", "a ", "\xe2\x96\x81", "<", "the" };
    const size_t N = 1000000;
    char    *text = (char *)malloc(N + 8), *back = (char *)malloc(4 * N);
    int32_t *p = (int32_t *)malloc(4 * N * sizeof *p);
    size_t   k, j, i;
    for (k = 0; k < 4; k++) {
        char           path[200];
        mft_tokenizer *tok;
        snprintf(path, sizeof path, "tests/golden/assets/tokenizers/%s", dirs[k]);
        if (mft_tokenizer_load(ctx, path, &tok) != MFT_OK) { CHECK_MSG(0, "%s", mft_error_message(ctx)); break; }
        for (j = 0; j < sizeof units / sizeof units[0]; j++) {
            size_t  m = strlen(units[j]), size = j < 2 ? N : N / 8;         /* valgrind has to get through as well */
            int64_t n, bytes;
            clock_t start = clock();
            for (i = 0; i + m <= size; i += m) memcpy(text + i, units[j], m);
            n = mft_tokenizer_encode(tok, text, (int64_t)i, MFT_NO_ADD_SPECIAL, p, (int64_t)(4 * N));
            CHECK_MSG((double)(clock() - start) / CLOCKS_PER_SEC < 30, "%s of '%s'", dirs[k], units[j]);      /* seen: up to 0.3 s; a quadratic one takes an hour */
            bytes = mft_tokenizer_decode(tok, p, n, 0, back, (int64_t)(4 * N));
            if (*units[j] != '\xff' && memcmp(units[j], "\xe2\x96\x81", m) != 0)       /* U+FFFD; a space */
                CHECK_MSG(n > 0 && bytes == (int64_t)i && memcmp(back, text, i) == 0, "%s of '%s': %d bytes come back", dirs[k], units[j], (int)bytes);
        }
        CHECK(mft_tokenizer_bytes(tok) < 8 << 20);      /* what a long text needed is not kept */
        mft_tokenizer_destroy(tok);
    }
    free(text); free(back); free(p);
}

int main(void)
{
    if (mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    TEST(test_committed_gpt2);
    TEST(test_committed_gpt2_merges);
    TEST(test_committed_qwen);
    TEST(test_committed_llama);
    TEST(test_committed_gemma);
    TEST(test_gpt2);
    TEST(test_gpt2_merges);
    TEST(test_qwen25);
    TEST(test_qwen25_merges);
    TEST(test_qwen3);
    TEST(test_gemma3);
    TEST(test_stories);
    TEST(test_stories_model);
    TEST(test_stories_model_file);
    TEST(test_gpt2_small);
    TEST(test_gpt2_small_merges);
    TEST(test_gemma3_small);
    TEST(test_added_tokens);
    TEST(test_merges);
    TEST(test_short_and_long_agree);
    TEST(test_cutting_at_spaces);
    TEST(test_metaspace);
    TEST(test_begins);
    TEST(test_patterns);
    TEST(test_questions);
    TEST(test_bad_files);
    TEST(test_cut_files);
    TEST(test_no_files);
    TEST(test_every_allocation);
    TEST(test_long_words);
    mft_context_destroy(ctx);
    return test_report("tokenizer");
}
