/* test_json.c - scanner, tree and writer of [JSON] against fixed texts, libc's strtod, json.dumps'
 * layout, Unicode's table of well-formed UTF-8, and themselves (what was parsed writes back equal). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* posix_memalign; the headers alone need no such thing */
#endif
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "test.h"

#include <locale.h>
#include <time.h>

static mft_context *ctx;

static mft_status parse(const char *text, mft_json **root) { return mft_json_parse(ctx, text, strlen(text), root); }

/* Parsed and written again; indent as in the writer. Static buffer. */
static const char *rewritten(const char *text, size_t bytes, int indent)
{
    static char      out[1 << 16];
    mft_json        *root = NULL;
    mft__json_writer w;
    if (mft_json_parse(ctx, text, bytes, &root) != MFT_OK) { snprintf(out, sizeof out, "! %s", mft_error_message(ctx)); return out; }
    mft__json_write_start(&w, ctx, indent);
    mft__json_write_node(&w, root);
    snprintf(out, sizeof out, "%.*s", (int)w.bytes, (const char *)w.text);
    mft__json_write_free(&w);
    mft_json_destroy(root);
    return out;
}

static void test_values(void)
{
    static const char *const cases[][2] = {           /* text, the same written compactly */
        { "null", "null" }, { " true\n", "true" }, { "\t\r\nfalse ", "false" }, { "0", "0" }, { "-0", "0" },
        { "-0.0", "-0.0" }, { "12", "12" }, { "9223372036854775807", "9223372036854775807" },
        { "-9223372036854775808", "-9223372036854775808" }, { "9223372036854775808", "9.223372036854775808e+18" },
        { "1.5", "1.5" }, { "0.1", "0.1" }, { "1e3", "1e+03" }, { "1E-5", "1e-05" }, { "2.5e+2", "2.5e+02" }, { "100.0", "1e+02" },
        { "1000000000000000019884624838656", "1e+30" }, { "\"\"", "\"\"" }, { "\"a\\/b\"", "\"a/b\"" },
        { "\"\\u0041\\u00e9\\u20ac\\ud83d\\ude42\"", "\"A\303\251\342\202\254\360\237\231\202\"" },
        { "\"\\b\\f\\n\\r\\t\\\\\\\"\\u0001\\u001F\"", "\"\\b\\f\\n\\r\\t\\\\\\\"\\u0001\\u001f\"" },
        { "[]", "[]" }, { "{}", "{}" }, { "[[],{}]", "[[],{}]" }, { " [ 1 , 2 , 3 ] ", "[1,2,3]" },
        { "{\"a\":{\"b\":[{\"c\":null}]},\"\":[true]}", "{\"a\":{\"b\":[{\"c\":null}]},\"\":[true]}" },
        { "\xef\xbb\xbf[1]", "[1]" }
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *got = rewritten(cases[i][0], strlen(cases[i][0]), 0), *want = cases[i][1];
        if (strstr(want, "e+18")) { CHECK(strtod(got, NULL) == 9223372036854775808.0); continue; }   /* the shortest form is libc's */
        CHECK_MSG(strcmp(got, want) == 0, "%s gave %s", cases[i][0], got);
    }
}

static void test_errors(void)
{
    static const char *const cases[][2] = {           /* text, what the message must hold */
        { "", "line 1, column 1: expected a value, but the text ends" }, { "  \n ", "line 2, column 2" },
        { "nul", "expected a value, found 'nul'" }, { "NaN", "expected a value, found 'NaN'" }, { "-", "expected a value" },
        { "Infinity", "expected a value" }, { "+1", "expected a value" }, { ".5", "expected a value" }, { "1.", "expected a value" },
        { "1e", "expected a value" }, { "01", "expected the end of the text, found '1'" }, { "0x10", "expected the end of the text" },
        { "[1,]", "line 1, column 4: expected a value, found ']'" }, { "[1 2]", "expected ',' or ']', found '2]'" },
        { "[1", "expected ',' or ']', but the text ends" }, { "[", "expected a value, but the text ends" }, { "]", "expected a value" },
        { "{\"a\"}", "expected ':' after the key, found '}'" }, { "{\"a\":}", "expected a value, found '}'" },
        { "{\"a\":1,}", "expected a key in quotes, found '}'" }, { "{a:1}", "expected a key in quotes, found 'a:1}'" },
        { "{\"a\":1 \"b\":2}", "expected ',' or '}'" }, { "{\"a\":1]", "expected ',' or '}', found ']'" }, { "[}", "expected a value" },
        { "[1] x", "line 1, column 5: expected the end of the text, found 'x'" }, { "{} {}", "expected the end of the text" },
        { "\"abc", "line 1, column 1: the string that starts here does not end" }, { "\"abc\\", "expected an escape" },
        { "\"abc\\\"", "does not end" }, { "\"a\nb\"", "column 3: a control character (0x0a)" }, { "\"\\x\"", "expected an escape" },
        { "\"\\u12g4\"", "expected an escape" }, { "\"\\u12\"", "expected an escape" }, { "\"\\ud800\"", "surrogates in pairs" },
        { "\"\\udc00\\ud800\"", "surrogates in pairs" }, { "\"\\ud800\\u0041\"", "surrogates in pairs" }, { "\"\\ud800\\ud800\"", "surrogates in pairs" },
        { "\"\xff\"", "not UTF-8: byte 0xff" }, { "\"\xc0\x80\"", "not UTF-8" }, { "\"\xed\xa0\x80\"", "not UTF-8" }, { "\"\xe2\x82\"", "not UTF-8" },
        { "\"\xf4\x90\x80\x80\"", "not UTF-8" }, { "\xff", "expected a value, found '?'" },
        { "1e999", "beyond the range of a double" }, { "[-1e999]", "column 2: this number is beyond" },
        { "{\"a\":1,\"b\":2,\"a\":3}", "has the key 'a' twice" }, { "{\"a\":1,\"\\u0061\":3}", "has the key 'a' twice" },
        { "{\"\":1,\"\":3}", "has the key '' twice" },
        { "{\"k\":[\n1,\n\"\303\251\303\251\" 2]}", "line 3, column 6: expected ',' or ']', found '2]}'" }      /* columns are characters */
    };
    mft_json *root;
    size_t    i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mft_status s = parse(cases[i][0], &root);
        CHECK_MSG(s == MFT_ERR_FORMAT && !root, "%s: status %d", cases[i][0], (int)s);
        CHECK_MSG(strncmp(mft_error_message(ctx), "JSON: ", 6) == 0 && strstr(mft_error_message(ctx), cases[i][1]),
                  "%s: message is: %s", cases[i][0], mft_error_message(ctx));
    }
    for (i = 0; i < 256 * 20; i++) {                     /* each byte at each place of the eight that are looked at together */
        char    string[23];
        int     c = (int)(i / 20), fine = c >= 32 && c < 128 && c != '"' && c != '\\';
        memset(string, 'x', sizeof string);
        string[0] = string[22] = '"';
        string[1 + i % 20] = (char)c;
        CHECK_MSG((mft_json_parse(ctx, string, sizeof string, &root) == MFT_OK) == fine, "byte 0x%02x at %d", (unsigned)c, (int)(i % 20));
        mft_json_destroy(root);
    }
    CHECK(mft_json_parse(ctx, "1\0", 2, &root) == MFT_ERR_FORMAT);        /* a NUL is no end */
    CHECK(mft_json_parse(ctx, NULL, 0, &root) == MFT_ERR_INVALID_ARGUMENT && !root);
    CHECK(mft_json_parse(ctx, "1", 1, NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_json_parse(NULL, "1", 1, &root) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_json_load(ctx, "tests/no-such-file.json", &root) == MFT_ERR_IO && strstr(mft_error_message(ctx), "tests/no-such-file.json: cannot be read: "));
    CHECK(mft_json_load(ctx, "tests", &root) == MFT_ERR_IO && strstr(mft_error_message(ctx), "tests: is a directory"));
    mft_json_destroy(NULL);
}

static void test_nesting(void)
{
    size_t    n = 1000000, i;
    char     *text = (char *)malloc(n);
    mft_json *root;
    if (!text) return;
    memset(text, '[', n);
    CHECK(mft_json_parse(ctx, text, n, &root) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "column 257: nested more than 256 deep"));
    memset(text + 256, ']', 256);
    CHECK(mft_json_parse(ctx, text, 512, &root) == MFT_OK);
    CHECK(strlen(rewritten(text, 512, 0)) == 512);
    mft_json_destroy(root);
    memset(text + 257, ']', 257);
    text[256] = '[';
    CHECK(mft_json_parse(ctx, text, 514, &root) == MFT_ERR_UNSUPPORTED);
    for (i = 0; i + 5 <= n; i += 5) memcpy(text + i, "{\"a\":", 5);
    CHECK(mft_json_parse(ctx, text, n, &root) == MFT_ERR_UNSUPPORTED);
    free(text);
}

/* The numbers' oracle is strtod in the C locale, which glibc rounds exactly. */
static void test_numbers(void)
{
    static const char *const hard[] = {
        "2.2250738585072014e-308", "2.2250738585072011e-308", "4.9406564584124654e-324", "2.4703282292062327e-324", "2.4703282292062328e-324",
        "1.7976931348623157e308", "1.7976931348623158e308", "9007199254740993", "9007199254740993.0", "9007199254740992.999", "0.1e-6",
        "123456789012345678901234567890", "0.000000000000000000000000000001", "8.98846567431158e307", "1e22", "1e23", "1e-22", "1e-23",
        "179769313486231580793728971405301e276", "5e-324", "1e-400", "0e999999999999", "0.0e-999999999999", "-1.25", "123456789.123456789",
        "9223372036854775807.5", "6.02214076e23", "1.00000000000000011102230246251565", "1.00000000000000011102230246251566"
    };
    char      text[1200];
    uint32_t  seed = 7;
    size_t    i;
    mft_json *root;
    int       k, wrong = 0;

    for (i = 0; i < sizeof hard / sizeof hard[0]; i++) {
        double want = strtod(hard[i], NULL);
        CHECK_MSG(parse(hard[i], &root) == MFT_OK, "%s", hard[i]);
        CHECK_MSG(mft_json_number(root, 7) == want, "%s gave %.17g", hard[i], mft_json_number(root, 7));
        mft_json_destroy(root);
    }
    for (k = 0; k < 200000; k++) {                       /* random digits, point and exponent */
        int  n = 0, digits = 1 + (int)(fabs(test_random(&seed)) * 25), point = (int)(fabs(test_random(&seed)) * (float)(digits + 3)), j;
        if (test_random(&seed) < 0) text[n++] = '-';
        for (j = 0; j < digits; j++) {
            char d = (char)('0' + (int)(fabs(test_random(&seed)) * 10) % 10);
            if (j == 0 && digits > 1 && point != 1 && d == '0') d = '1';
            if (j == point && j > 0) text[n++] = '.';
            text[n++] = d;
        }
        if (k % 2) n += snprintf(text + n, 16, "%c%d", k % 4 == 1 ? 'e' : 'E', (int)(test_random(&seed) * (k % 8 < 4 ? 30 : 270)));
        text[n] = '\0';
        if (parse(text, &root) != MFT_OK) { CHECK_MSG(0, "%s: %s", text, mft_error_message(ctx)); return; }
        if (mft_json_number(root, 7) != strtod(text, NULL)) { CHECK_MSG(0, "%s gave %.17g", text, mft_json_number(root, 7)); wrong++; }
        mft_json_destroy(root);
        if (wrong > 5) return;
    }
    memset(text, '1', 1001); text[1001] = '\0';
    CHECK(parse(text, &root) == MFT_ERR_UNSUPPORTED);    /* bounded, not cut */
    text[1000] = '\0'; text[1] = '.';
    CHECK(parse(text, &root) == MFT_OK && mft_json_number(root, 0) == strtod(text, NULL));
    mft_json_destroy(root);
}

static void test_integers(void)
{
    static const struct { const char *text; int64_t want; int written; } cases[] = {
        { "0", 0, 1 }, { "-1", -1, 1 }, { "9223372036854775807", INT64_MAX, 1 }, { "-9223372036854775808", INT64_MIN, 1 },
        { "9007199254740993", 9007199254740993, 1 }, { "9223372036854775808", -77, 0 }, { "-9223372036854775809", INT64_MIN, 0 }, { "1e3", 1000, 0 },
        { "3.0", 3, 0 }, { "3.5", -77, 0 }, { "1e300", -77, 0 }, { "\"3\"", -77, 0 }, { "true", -77, 0 }, { "null", -77, 0 }
    };
    mft_json *root;
    size_t    i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK(parse(cases[i].text, &root) == MFT_OK);
        CHECK_MSG(mft_json_integer(root, -77) == cases[i].want, "%s gave %lld", cases[i].text, (long long)mft_json_integer(root, -77));
        CHECK(mft__json_is_integer(root) == cases[i].written);
        mft_json_destroy(root);
    }
}

/* A decimal comma, as much of the world has it, must change nothing. */
static void test_locale(void)
{
    static const char *const names[] = { "de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "fr_FR.utf8", "de_DE", "fr_FR", "ps_AF.UTF-8" };
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) if (setlocale(LC_NUMERIC, names[i])) break;
    if (i == sizeof names / sizeof names[0]) SKIP("decimal comma: no such locale is installed");
    CHECK(strcmp(rewritten("[0.1,1.2345678901234567,123456789012345678.25]", 46, 0), "[0.1,1.2345678901234567,1.2345678901234568e+17]") == 0);
    setlocale(LC_NUMERIC, "C");
}

/* Every code point, as it is and escaped, comes back; the expected bytes are made bit by bit here. */
static void test_code_points(void)
{
    char      text[64], want[8];
    uint32_t  c;
    size_t    bytes;
    mft_json *root;
    for (c = 0; c <= 0x10ffff; c += c < 0x3000 ? 1 : 7) {
        int n = 0, k;
        if (c >= 0xd800 && c < 0xe000) continue;
        if (c < 0x80) want[n++] = (char)c;
        else {
            int tail = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
            want[n++] = (char)((0xf00 >> (tail + 1) & 0xff) | c >> 6 * tail);
            while (tail--) want[n++] = (char)(0x80 | (c >> 6 * tail & 0x3f));
        }
        for (k = 0; k < 2; k++) {
            size_t at = 0;
            text[at++] = '"';
            if (k == 0 && c >= 32 && c != '"' && c != '\\') { memcpy(text + at, want, (size_t)n); at += (size_t)n; }
            else if (c < 0x10000) at += (size_t)snprintf(text + at, 16, "\\u%04X", (unsigned)c);
            else at += (size_t)snprintf(text + at, 16, "\\u%04x\\u%04x", (unsigned)(0xd800 + ((c - 0x10000) >> 10)), (unsigned)(0xdc00 + ((c - 0x10000) & 0x3ff)));
            text[at++] = '"';
            if (mft_json_parse(ctx, text, at, &root) != MFT_OK) { CHECK_MSG(0, "U+%04X: %s", (unsigned)c, mft_error_message(ctx)); return; }
            if (!(mft_json_string(root, &bytes) && bytes == (size_t)n && memcmp(mft_json_string(root, NULL), want, bytes) == 0)) CHECK_MSG(0, "U+%04X", (unsigned)c);
            CHECK(mft_json_string(root, NULL)[n] == '\0');
            mft_json_destroy(root);
        }
    }
}

/* Well-formed UTF-8 by table 3-7 of the Unicode Standard. */
static int well_formed(const unsigned char *p, size_t n)
{
    size_t i = 0;
    while (i < n) {
        unsigned a = p[i], lo = 0x80, hi = 0xbf, more;
        if (a < 0x80) { i++; continue; }
        if (a >= 0xc2 && a <= 0xdf) more = 1;
        else if (a >= 0xe0 && a <= 0xef) { more = 2; if (a == 0xe0) lo = 0xa0; if (a == 0xed) hi = 0x9f; }
        else if (a >= 0xf0 && a <= 0xf4) { more = 3; if (a == 0xf0) lo = 0x90; if (a == 0xf4) hi = 0x8f; }
        else return 0;
        if (i + more >= n) return 0;
        if (p[i + 1] < lo || p[i + 1] > hi) return 0;
        for (i += 2; --more; i++) if (p[i] < 0x80 || p[i] > 0xbf) return 0;
    }
    return 1;
}

static void test_utf8(void)
{
    static const unsigned char edge[] = { 0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1,
                                          0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xf8, 0xff };
    enum { E = sizeof edge };
    unsigned char b[5] = { 0 };
    size_t i, j, k, l, n;
    for (i = 0; i < E; i++) for (j = 0; j < E; j++) for (k = 0; k < E; k++) for (l = 0; l < E; l++) {
        b[0] = edge[i]; b[1] = edge[j]; b[2] = edge[k]; b[3] = edge[l];
        for (n = 1; n <= 4; n++)
            if ((mft__utf8_check((const char *)b, n) == NULL) != well_formed(b, n)) {
                CHECK_MSG(0, "%02x %02x %02x %02x, %d bytes", b[0], b[1], b[2], b[3], (int)n);
                return;
            }
    }
}

static void test_tree(void)
{
    static const char text[] = "{\"b\":true,\"n\":null,\"s\":\"a\\u0000b\",\"list\":[1,\"x\",{\"deep\":[[]]}],\"a\\u0000z\":1}";
    mft_json       *root;
    const mft_json *list;
    const char     *key;
    size_t          bytes;
    CHECK(mft_json_parse(ctx, text, sizeof text - 1, &root) == MFT_OK);
    CHECK(mft_json_type(root) == MFT_JSON_OBJECT && mft_json_count(root) == 5);
    CHECK(mft_json_bool(mft_json_get(root, "b"), 0) == 1 && mft_json_bool(mft_json_get(root, "n"), 5) == 5);
    CHECK(mft_json_type(mft_json_get(root, "n")) == MFT_JSON_NULL && mft_json_get(root, "n") != NULL);
    CHECK(memcmp(mft_json_string(mft_json_get(root, "s"), &bytes), "a\0b", 4) == 0 && bytes == 3);
    CHECK(mft_json_get(root, "a") == NULL && mft_json_get(root, "") == NULL && mft_json_get(root, "lis") == NULL);
    list = mft_json_get(root, "list");
    CHECK(mft_json_count(list) == 3 && mft_json_type(list) == MFT_JSON_ARRAY);
    CHECK(mft_json_integer(mft_json_at(list, 0, &key), 0) == 1 && key == NULL);
    CHECK(mft_json_at(list, 3, &key) == NULL && mft_json_get(list, "x") == NULL);
    CHECK(mft_json_count(mft_json_at(mft_json_get(mft_json_at(list, 2, NULL), "deep"), 0, NULL)) == 0);
    CHECK(mft_json_type(mft_json_at(root, 3, &key)) == MFT_JSON_ARRAY && strcmp(key, "list") == 0);
    CHECK(mft_json_number(NULL, 2.5) == 2.5 && mft_json_count(NULL) == 0 && mft_json_string(NULL, &bytes) == NULL && mft_json_at(NULL, 0, NULL) == NULL);
    CHECK(mft_json_get(NULL, "x") == NULL && mft_json_get(root, NULL) == NULL && mft_json_string(root, NULL) == NULL && mft_json_number(list, 3) == 3);
    mft_json_destroy(root);
}

static void test_large_objects(void)
{
    enum { N = 3000 };
    char     *text = (char *)malloc(N * 32), key[24];
    mft_json *root;
    int       n, i, k;
    if (!text) return;
    for (n = 0; n <= 40; n++) {                          /* around the size where the table begins */
        int at = snprintf(text, 8, "[{");
        for (i = 0; i < n; i++) at += snprintf(text + at, 32, "%s\"k%d\":%d", i ? "," : "", i, i);
        at += snprintf(text + at, 32, "},{\"k1\":5}]");
        CHECK(mft_json_parse(ctx, text, (size_t)at, &root) == MFT_OK);
        CHECK((int)mft_json_count(mft_json_at(root, 0, NULL)) == n);
        for (i = 0; i < n; i++) {
            snprintf(key, sizeof key, "k%d", i);
            CHECK(mft_json_integer(mft_json_get(mft_json_at(root, 0, NULL), key), -1) == i);
        }
        snprintf(key, sizeof key, "k%d", n);
        CHECK(mft_json_get(mft_json_at(root, 0, NULL), key) == NULL);
        CHECK(mft_json_integer(mft_json_get(mft_json_at(root, 1, NULL), "k1"), -1) == 5);
        mft_json_destroy(root);
    }
    for (k = 0; k < 2; k++) {                            /* many; then with one key twice */
        int at = snprintf(text, 8, "{");
        for (i = 0; i < N; i++) at += snprintf(text + at, 32, "%s\"key-%d\":[%d]", i ? "," : "", k && i == N - 1 ? 17 : i, i);
        at += snprintf(text + at, 8, "}");
        if (k) {
            CHECK(mft_json_parse(ctx, text, (size_t)at, &root) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "has the key 'key-17' twice"));
            continue;
        }
        CHECK(mft_json_parse(ctx, text, (size_t)at, &root) == MFT_OK && mft_json_count(root) == N);
        for (i = 0; i < N; i++) {
            snprintf(key, sizeof key, "key-%d", i);
            CHECK(mft_json_integer(mft_json_at(mft_json_get(root, key), 0, NULL), -1) == i);
        }
        mft_json_destroy(root);
    }
    free(text);
}

static void test_scanner(void)
{
    static const char text[] = "{\"skip\":{\"a\":[1,{\"b\":\"}\"}]},\"na\\u006de\":\"x\\ty\",\"list\":[7,-8,9.5,null],\"after\":3}";
    mft__json_scan  s;
    mft__json_event e;
    char            buffer[16];
    int64_t         v, sum = 0;
    int             seen = 0;
    mft__json_scan_init(&s, ctx, "here", 41, text, sizeof text - 1);
    CHECK(mft__json_next(&s) == MFT__JSON_OBJECT);
    for (e = mft__json_next(&s); e == MFT__JSON_KEY; e = mft__json_next(&s)) {
        if (mft__json_is(&s, "name")) {
            seen |= 1;
            CHECK(mft__json_next(&s) == MFT__JSON_STRING && s.escaped && mft__json_decode(&s, buffer) == 3 && memcmp(buffer, "x\ty", 3) == 0);
        } else if (mft__json_is(&s, "list")) {
            seen |= 2;
            CHECK(mft__json_next(&s) == MFT__JSON_ARRAY);
            while ((e = mft__json_next(&s)) == MFT__JSON_NUMBER) {
                if (mft__json_int(&s, &v)) sum += v;
                else CHECK(mft__json_double(&s) == 9.5);
            }
            CHECK(e == MFT__JSON_NULL && mft__json_next(&s) == MFT__JSON_ARRAY_END);
        } else { seen |= mft__json_is(&s, "skip") ? 4 : 8; CHECK(mft__json_skip(&s, e)); }
    }
    CHECK(e == MFT__JSON_OBJECT_END && mft__json_next(&s) == MFT__JSON_DONE && mft__json_next(&s) == MFT__JSON_DONE);
    CHECK(seen == 15 && sum == -1);

    mft__json_scan_init(&s, ctx, "data.jsonl", 41, "{\"a\" 1}", 7);      /* a line of a larger file */
    CHECK(mft__json_next(&s) == MFT__JSON_OBJECT && mft__json_next(&s) == MFT__JSON_BAD && mft__json_next(&s) == MFT__JSON_BAD);
    CHECK(s.status == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "data.jsonl: line 41, column 6: expected ':' after the key"));
    mft__json_scan_init(&s, ctx, "x", 1, "[[1,2", 5);
    CHECK(mft__json_next(&s) == MFT__JSON_ARRAY && !mft__json_skip(&s, MFT__JSON_ARRAY));
}

/* The layout is that of Python's json.dumps(value, indent=2, ensure_ascii=False). */
static void test_writer(void)
{
    static const char want[] =
        "{\n  \"r\": 8,\n  \"list\": [\n    \"a\",\n    [],\n    {}\n  ],\n  \"x\": {\n    \"deep\": true,\n    \"none\": null\n  },\n  \"lr\": 0.0002\n}";
    mft__json_writer w;
    mft__json_write_start(&w, ctx, 2);
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "r");    mft__json_write_integer(&w, 8);
    mft__json_write_key(&w, "list"); mft__json_write_open(&w, '['); mft__json_write_string(&w, "abc", 1);
    mft__json_write_open(&w, '[');   mft__json_write_close(&w, ']'); mft__json_write_open(&w, '{'); mft__json_write_close(&w, '}');
    mft__json_write_close(&w, ']');
    mft__json_write_key(&w, "x");    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "deep"); mft__json_write_bool(&w, 1);
    mft__json_write_key(&w, "none"); mft__json_write_number(&w, HUGE_VAL, 0);
    mft__json_write_close(&w, '}');
    mft__json_write_key(&w, "lr");   mft__json_write_number(&w, 2e-4, 0);
    mft__json_write_close(&w, '}');
    CHECK(!w.failed && strcmp((const char *)w.text, want) == 0);
    mft__json_write_free(&w);

    mft__json_write_start(&w, ctx, 0);                   /* numbers, broken UTF-8 */
    mft__json_write_open(&w, '[');
    mft__json_write_number(&w, (double)3.14159274f, 9); mft__json_write_number(&w, 1.0 / 3, 17); mft__json_write_number(&w, 1.0 / 3, 0);
    mft__json_write_number(&w, 2, 0); mft__json_write_number(&w, -2, 9); mft__json_write_number(&w, (double)NAN, 9); mft__json_write_number(&w, 5e-324, 0);
    mft__json_write_string(&w, "a\xff\xe2\x82z\xe2\x82\xac", -1);
    mft__json_write_close(&w, ']');
    CHECK_MSG(strcmp((const char *)w.text, "[3.14159274,0.33333333333333331,0.3333333333333333,2.0,-2.0,null,5e-324,\"a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbdz\xe2\x82\xac\"]") == 0,
              "%s", (const char *)w.text);
    mft__json_write_free(&w);
}

/* Texts that Transformers, Tokenizers and json.dumps wrote come back byte for byte. */
static void same_bytes(const char *path, int final_newline)
{
    size_t           bytes = 0;
    char            *text = test_read_file(path, &bytes);
    mft_json        *root = NULL;
    mft__json_writer w;
    if (!text) SKIP("%s: not there", path);
    CHECK_MSG(mft_json_load(ctx, path, &root) == MFT_OK, "%s", mft_error_message(ctx));
    if (root) {
        mft__json_write_start(&w, ctx, 2);
        mft__json_write_node(&w, root);
        if (final_newline) mft__json_write_raw(&w, "\n", 1);
        CHECK_MSG(w.bytes == bytes && memcmp(w.text, text, bytes) == 0, "%s: %d bytes became %d", path, (int)bytes, (int)w.bytes);
        mft__json_write_free(&w);
    }
    mft_json_destroy(root);
    free(text);
}

static void test_config_bytes(void) { same_bytes("tests/golden/gpt2/config.json", 1); }
static void test_index_bytes(void)  { same_bytes("tests/golden/safetensors/sharded/model.safetensors.index.json", 0); }
static void test_qwen_bytes(void)   { same_bytes(test_data("assets/tokenizers/qwen3/tokenizer.json"), 0); }

static void test_gemma_bytes(void)
{
    const char     *path = test_data("assets/tokenizers/gemma3/tokenizer.json");
    size_t          bytes = 0;
    char           *text = test_read_file(path, &bytes);
    mft__json_scan  s;
    clock_t         began = clock();
    if (!text) SKIP("%s: not there", path);
    mft__json_scan_init(&s, ctx, path, 1, text, bytes);
    while (mft__json_next(&s) > MFT__JSON_DONE) ;
    CHECK(s.status == MFT_OK);
    printf("  scanned at %.0f MB/s\n", (double)bytes / 1e6 / ((double)(clock() - began) / CLOCKS_PER_SEC + 1e-9));
    free(text);
    same_bytes(path, 0);
}

/* Cut anywhere or with any byte changed, a text is read or refused, never more (the sanitizers watch). */
static void test_damage(void)
{
    static const char text[] = "{\"a\": [1, -2.5e3, \"x\\n\\ud83d\\ude42\303\251\", {\"b\": null, \"c\": [true, false]}], \"d\": {}}";
    size_t    n = sizeof text - 1, i;
    int       v;
    char      copy[sizeof text];
    mft_json *root;
    for (i = 0; i < n; i++) {
        char *exact = (char *)malloc(i + 1);             /* the end of the heap block is the end of the text */
        memcpy(exact, text, i);
        CHECK(mft_json_parse(ctx, exact, i, &root) == MFT_ERR_FORMAT);
        free(exact);
    }
    for (i = 0; i < n; i++) for (v = 0; v < 256; v++) {
        memcpy(copy, text, n);
        copy[i] = (char)v;
        if (mft_json_parse(ctx, copy, n, &root) == MFT_OK) mft_json_destroy(root);
    }
}

/* ---- running out of memory at every allocation ---- */
typedef struct limited { size_t left, out; } limited;
static void *limited_alloc(void *user, size_t bytes, size_t align)
{
    limited *l = (limited *)user;
    void    *p;
    if (!l->left) return NULL;
    l->left--;
    if (posix_memalign(&p, align < sizeof(void *) ? sizeof(void *) : align, bytes) != 0) return NULL;
    l->out += bytes;
    return p;
}
static void limited_free(void *user, void *p, size_t bytes) { ((limited *)user)->out -= bytes; free(p); }

static void test_out_of_memory(void)
{
    size_t n;
    int    done = 0;
    for (n = 0; n < 200 && !done; n++) {
        mft_context_desc desc;
        mft_context     *mine;
        mft_json        *root;
        limited          l;
        memset(&desc, 0, sizeof desc);
        l.left = n; l.out = 0;
        desc.allocator.alloc = limited_alloc; desc.allocator.free = limited_free; desc.allocator.user = &l;
        if (mft_context_create(&desc, &mine) != MFT_OK) { CHECK(l.out == 0); continue; }
        if (mft_json_load(mine, "tests/golden/gpt2/config.json", &root) == MFT_OK) {
            mft__json_writer w;
            mft__json_write_start(&w, mine, 2);
            mft__json_write_node(&w, root);
            if (w.failed) CHECK(strstr(mft_error_message(mine), "the allocator could not give"));
            done = !w.failed;
            mft__json_write_free(&w);
        } else CHECK(root == NULL && strstr(mft_error_message(mine), "the allocator could not give"));
        mft_context_destroy(mine);                       /* also ends the tree */
        CHECK(l.out == 0);
    }
    CHECK(done);
}

int main(void)
{
    if (mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    TEST(test_values);
    TEST(test_errors);
    TEST(test_nesting);
    TEST(test_numbers);
    TEST(test_integers);
    TEST(test_locale);
    TEST(test_code_points);
    TEST(test_utf8);
    TEST(test_tree);
    TEST(test_large_objects);
    TEST(test_scanner);
    TEST(test_writer);
    TEST(test_config_bytes);
    TEST(test_index_bytes);
    TEST(test_qwen_bytes);
    TEST(test_gemma_bytes);
    TEST(test_damage);
    TEST(test_out_of_memory);
    mft_context_destroy(ctx);
    return test_report("json");
}
