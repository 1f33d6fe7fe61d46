/* test_unicode.c - [UNICODE] against the reference's classes and its NFC, UTF-8 against its definition */
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "../mft_models.h"
#include "test.h"

static mft_context  *ctx;
static mft__unicode *u;

/* ---- classes ---- */

static void test_ascii_classes(void)                /* what everybody knows */
{
    int c;
    for (c = 0; c < 128; c++) {
        int want = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ? MFT__LETTER : c >= '0' && c <= '9' ? MFT__NUMBER
                 : c == ' ' || (c >= 9 && c <= 13) ? MFT__SPACE : c == '_' ? MFT__WORD : MFT__OTHER_CHAR;
        CHECK_MSG(mft__class(u, (uint32_t)c) == want, "U+%04X", (unsigned)c);
    }
}

static void test_some_classes(void)
{
    static const struct { uint32_t c; int type; } known[] = {
        { 0xaa, MFT__LETTER }, { 0xb2, MFT__NUMERAL }, { 0xb5, MFT__LETTER }, { 0xbd, MFT__NUMERAL }, { 0xd7, MFT__OTHER_CHAR },
        { 0x85, MFT__SPACE }, { 0xa0, MFT__SPACE }, { 0x1c, MFT__OTHER_CHAR }, { 0x1680, MFT__SPACE }, { 0x180e, MFT__OTHER_CHAR },
        { 0x200b, MFT__OTHER_CHAR }, { 0x2028, MFT__SPACE }, { 0x3000, MFT__SPACE }, { 0xfeff, MFT__OTHER_CHAR },
        { 0x0301, MFT__WORD }, { 0x203f, MFT__WORD }, { 0x200d, MFT__WORD }, { 0x24b6, MFT__WORD },
        { 0x0663, MFT__NUMBER }, { 0x2167, MFT__NUMBER }, { 0x2460, MFT__NUMERAL }, { 0x3007, MFT__NUMBER },
        { 0x4e00, MFT__LETTER }, { 0xac00, MFT__LETTER }, { 0x1f600, MFT__OTHER_CHAR }, { 0x105c9, MFT__LETTER },   /* new in Unicode 16 */
        { 0xe000, MFT__OTHER_CHAR }, { 0x3134a, MFT__LETTER }, { 0x323b0, MFT__OTHER_CHAR }, { 0xe0100, MFT__WORD }, { 0x10ffff, MFT__OTHER_CHAR }
    };
    size_t i;
    for (i = 0; i < sizeof known / sizeof known[0]; i++) CHECK_MSG(mft__class(u, known[i].c) == known[i].type, "U+%04X", (unsigned)known[i].c);
}

static void test_all_classes(void)
{
    const char *path = test_data("assets/golden/unicode/classes.json");
    const char *const keys[3] = { "L", "N", "s" };
    mft_json   *root;
    size_t      i;
    uint32_t    c;
    int         k;
    unsigned char *sets = (unsigned char *)calloc(0x110000, 1);
    if (!test_file_exists(path)) { free(sets); SKIP("classes of all code points: no %s", path); }
    CHECK(mft_json_load(ctx, path, &root) == MFT_OK);
    for (k = 0; k < 3; k++) {
        const mft_json *list = mft_json_get(root, keys[k]);
        CHECK(mft_json_count(list) > 5);
        for (i = 0; i < mft_json_count(list); i++) {
            int64_t from = mft_json_integer(mft_json_at(mft_json_at(list, i, NULL), 0, NULL), -1), to = mft_json_integer(mft_json_at(mft_json_at(list, i, NULL), 1, NULL), -1);
            for (; from <= to; from++) sets[from] |= (unsigned char)(1 << k);
        }
    }
    for (c = 0; c < 0x110000; c++) {
        int type = mft__class(u, c);
        int set = type == MFT__LETTER ? 1 : type == MFT__NUMBER || type == MFT__NUMERAL ? 2 : type == MFT__SPACE ? 4 : 0;
        if (set != sets[c]) { CHECK_MSG(set == sets[c], "U+%04X is %d, not %d", (unsigned)c, set, sets[c]); break; }
    }
    free(sets);
    mft_json_destroy(root);
}

/* ---- UTF-8 ---- */

/* By the definition: some code point, written shortest, gives these bytes. */
static int is_character(const unsigned char *p, size_t n)
{
    uint32_t c = n == 1 ? p[0] : n == 2 ? (uint32_t)(p[0] & 31) << 6 | (p[1] & 63) : n == 3 ? (uint32_t)(p[0] & 15) << 12 | (uint32_t)(p[1] & 63) << 6 | (p[2] & 63)
               : (uint32_t)(p[0] & 7) << 18 | (uint32_t)(p[1] & 63) << 12 | (uint32_t)(p[2] & 63) << 6 | (p[3] & 63);
    unsigned char out[4];
    size_t        m;
    if (c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0;
    if      (c < 0x80)    { m = 1; out[0] = (unsigned char)c; }
    else if (c < 0x800)   { m = 2; out[0] = (unsigned char)(0xc0 | c >> 6); out[1] = (unsigned char)(0x80 | (c & 63)); }
    else if (c < 0x10000) { m = 3; out[0] = (unsigned char)(0xe0 | c >> 12); out[1] = (unsigned char)(0x80 | (c >> 6 & 63)); out[2] = (unsigned char)(0x80 | (c & 63)); }
    else { m = 4; out[0] = (unsigned char)(0xf0 | c >> 18); out[1] = (unsigned char)(0x80 | (c >> 12 & 63)); out[2] = (unsigned char)(0x80 | (c >> 6 & 63)); out[3] = (unsigned char)(0x80 | (c & 63)); }
    return m == n && memcmp(out, p, n) == 0;
}

/* Every string of three bytes from a set that has each kind of byte, and of four with leading F0..F5: the length of the
 * character, or of the longest beginning of one (one that some more bytes would complete), at least 1. */
static void test_utf8_lengths(void)
{
    static const unsigned char kinds[] = { 0, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xff };
    const size_t  K = sizeof kinds;
    size_t        i, n, k, m, total = 1;
    for (k = 0; k < 4; k++) total *= K;
    for (i = 0; i < total; i++) {
        unsigned char p[4];
        int want = 0, cut_want = 0, cut, got;
        p[0] = kinds[i % K]; p[1] = kinds[i / K % K]; p[2] = kinds[i / K / K % K]; p[3] = kinds[i / K / K / K];
        for (n = 1; n <= 4 && !want; n++) if (is_character(p, n)) want = (int)n;
        for (n = 3; n >= 1 && !want; n--) {                 /* a beginning: completed by 80 or BF bytes, one to three */
            for (m = n + 1; m <= 4 && !want; m++) {
                unsigned char q[4];
                memcpy(q, p, n);
                for (k = n; k < m; k++) q[k] = 0x80;
                if (is_character(q, m)) want = -(int)n;
                for (k = n; k < m; k++) q[k] = 0xbf;
                if (is_character(q, m)) want = -(int)n;
            }
        }
        if (!want) want = -1;
        got = mft__utf8_length(p, p + 4, &cut);
        if (got != want || cut) { CHECK_MSG(0, "%02x %02x %02x %02x: %d, not %d", p[0], p[1], p[2], p[3], got, want); return; }
        for (n = 1; n < 4; n++) {                           /* the same text cut off */
            int whole = want > 0 && want <= (int)n, begun = (want > 0 && want > (int)n) || (want < 0 && -want >= (int)n);
            cut_want = !whole && begun && (want > 0 || (-want >= (int)n && !is_character(p, 1)));
            got = mft__utf8_length(p, p + n, &cut);
            if (whole ? got != want || cut : got != (begun ? -(int)n : want)) { CHECK_MSG(0, "%02x %02x %02x %02x cut to %d: %d", p[0], p[1], p[2], p[3], (int)n, got); return; }
            if (want > 0 && cut != cut_want) { CHECK_MSG(0, "%02x %02x %02x %02x cut to %d: cut %d", p[0], p[1], p[2], p[3], (int)n, cut); return; }
        }
    }
}

static void test_utf8_repair(void)
{
    static const struct { const char *in, *out; } cases[] = {       /* The Unicode Standard, tables 3-8 to 3-11; out: bytes.decode("utf-8", "replace") */
        { "a\xf1\x80\x80\xe1\x80\xc2" "b\x80" "c\x80\xbf" "d", "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "b\xef\xbf\xbd" "c\xef\xbf\xbd\xef\xbf\xbd" "d" },
        { "\xc0\xaf\xe0\x80\xbf\xf0\x81\x82" "A", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "A" },
        { "\xed\xa0\x80\xed\xbf\xbf\xed\xaf" "A", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "A" },
        { "\xf4\x91\x92\x93\xff" "A\x80\xbf" "B", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "A\xef\xbf\xbd\xef\xbf\xbd" "B" },
        { "\xe1\x80\xe2\xf0\x91\x92\xf1\xbf" "A", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd" "A" },
        { "plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80", "plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80" },
        { "", "" }
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mft__bytes b;
        memset(&b, 0, sizeof b);
        CHECK(mft__utf8_repair(ctx, &b, cases[i].in, strlen(cases[i].in)));
        CHECK_MSG(b.n == strlen(cases[i].out) && memcmp(b.p ? b.p : "", cases[i].out, b.n) == 0, "case %d", (int)i);
        mft__bytes_free(ctx, &b);
    }
}

/* ---- NFC ---- */

static int nfc_is(const char *in, size_t n, const char *out, size_t m)
{
    mft__bytes b;
    mft__nfc   s;
    int        same;
    memset(&b, 0, sizeof b); memset(&s, 0, sizeof s);
    same = mft__nfc_append(ctx, u, &s, in, n, &b) && b.n == m && (!m || memcmp(b.p, out, m) == 0);
    mft__bytes_free(ctx, &b);
    mft__nfc_free(ctx, &s);
    return same;
}

static void test_nfc_by_hand(void)
{
    static const struct { const char *in, *out; } cases[] = {
        { "", "" }, { "plain ASCII", "plain ASCII" },
        { "e\xcc\x81", "\xc3\xa9" },                                            /* composes */
        { "\xe2\x84\xab", "\xc3\x85" },                                         /* a singleton: the angstrom sign is a letter */
        { "a\xcc\x87\xcc\xa3", "\xe1\xba\xa1\xcc\x87" },                        /* dot above, dot below: ordered first */
        { "\xc3\xa0\xcc\xa3", "\xe1\xba\xa1\xcc\x80" },                         /* taken apart, ordered, put together otherwise */
        { "\xe0\xa4\x95\xe0\xa4\xbc", "\xe0\xa4\x95\xe0\xa4\xbc" },             /* excluded from composition .. */
        { "\xe0\xa5\x98", "\xe0\xa4\x95\xe0\xa4\xbc" },                         /* .. and taken apart */
        { "\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab", "\xed\x95\x9c" },             /* Hangul L V T */
        { "\xed\x95\x98\xe1\x86\xab", "\xed\x95\x9c" },                         /* LV + T */
        { "\xed\x95\x9c\xe1\x86\xab", "\xed\x95\x9c\xe1\x86\xab" },             /* LVT takes no second T */
        { "\xcc\x81\x65", "\xcc\x81\x65" },                                     /* a mark with nothing before it */
        { "e\xcc\xa8\xcc\x81", "\xc4\x99\xcc\x81" },                            /* only the first composes */
        { "a\xcd\x9c\xcc\x81", "\xc3\xa1\xcd\x9c" },                            /* past a mark of another class */
        { "a\xcc\x8d\xcc\x81", "a\xcc\x8d\xcc\x81" },                       /* not past one of its own */
        { "\xf0\x9d\x85\xa0", "\xf0\x9d\x85\x98\xf0\x9d\x85\xa5\xf0\x9d\x85\xae" },     /* a chain of decompositions */
        { "\xf0\x91\x8e\x84\xf0\x91\x8e\xbb", "\xf0\x91\x8e\x84\xf0\x91\x8e\xbb" }      /* Unicode 16 composes it, the reference does not */
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK_MSG(nfc_is(cases[i].in, strlen(cases[i].in), cases[i].out, strlen(cases[i].out)), "case %d", (int)i);
        CHECK_MSG(nfc_is(cases[i].out, strlen(cases[i].out), cases[i].out, strlen(cases[i].out)), "case %d, twice", (int)i);
    }
}

static void test_hangul(void)                       /* each syllable from its jamo, by the arithmetic of the standard's 3.12 */
{
    uint32_t s;
    for (s = 0; s < 11172; s++) {
        char   jamo[9], whole[4];
        size_t n = 0;
        n += (size_t)mft__utf8_encode(0x1100 + s / 588, jamo);
        n += (size_t)mft__utf8_encode(0x1161 + s % 588 / 28, jamo + n);
        if (s % 28) n += (size_t)mft__utf8_encode(0x11a7 + s % 28, jamo + n);
        if (!nfc_is(jamo, n, whole, (size_t)mft__utf8_encode(0xac00 + s, whole))) { CHECK_MSG(0, "U+%04X", (unsigned)(0xac00 + s)); return; }
    }
}

/* A text of marks only, 400,000 of them in the worst order: linear, or this takes minutes. */
static void test_long_run_of_marks(void)
{
    enum { N = 200000 };
    char  *in = (char *)malloc(4 * N + 1), *out = (char *)malloc(4 * N + 1);
    size_t i, n = 0, m = 0;
    in[n++] = out[m++] = 'x';
    for (i = 0; i < N; i++) { memcpy(in + n, "\xcc\x81\xcc\xa3", 4); n += 4; }          /* class 230, class 220 */
    for (i = 0; i < N; i++) { memcpy(out + m, "\xcc\xa3", 2); m += 2; }
    for (i = 0; i < N; i++) { memcpy(out + m, "\xcc\x81", 2); m += 2; }
    CHECK(nfc_is(in, n, out, m));
    free(in); free(out);
}

static void test_nfc_reference(void)
{
    const char *path = test_data("assets/golden/unicode/nfc.jsonl");
    size_t      bytes = 0, lines = 0;
    char       *text, *p, *q;
    if (!test_file_exists(path)) SKIP("NFC of every character that has one: no %s", path);
    text = test_read_file(path, &bytes);
    for (p = text; p < text + bytes; p = q + 1, lines++) {
        mft_json   *row;
        const char *in, *out;
        size_t      n, m;
        q = (char *)memchr(p, '\n', (size_t)(text + bytes - p));
        if (!q) q = text + bytes;
        if (mft_json_parse(ctx, p, (size_t)(q - p), &row) != MFT_OK) { CHECK_MSG(0, "line %d", (int)lines); break; }
        in = mft_json_string(mft_json_get(row, "in"), &n); out = mft_json_string(mft_json_get(row, "out"), &m);
        CHECK_MSG(in && out && nfc_is(in, n, out, m), "line %d", (int)lines + 1);
        mft_json_destroy(row);
    }
    CHECK(lines > 4000);
    free(text);
}

int main(void)
{
    if (mft_context_create(NULL, &ctx) != MFT_OK || !(u = mft__unicode_create(ctx))) return 1;
    TEST(test_ascii_classes);
    TEST(test_some_classes);
    TEST(test_all_classes);
    TEST(test_utf8_lengths);
    TEST(test_utf8_repair);
    TEST(test_nfc_by_hand);
    TEST(test_hangul);
    TEST(test_long_run_of_marks);
    TEST(test_nfc_reference);
    mft__unicode_destroy(ctx, u);
    mft_context_destroy(ctx);
    return test_report("unicode");
}
