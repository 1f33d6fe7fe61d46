/* test_chat.c - [CHAT] against Transformers: the texts and masks of the assets' conversations through the published
 * templates, tests/golden/chat_templates.jsonl (templates in the published styles and corners of Jinja, made by
 * tools/make_chat_golden.py); bounds, sentences, every allocation failing, our own templates. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkdtemp; the headers alone need no such thing */
#endif
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "../mft_models.h"
#include "test.h"

#include <locale.h>

static mft_context *ctx;

static mft_chat_template *compiled(const char *source)
{
    mft_chat_template *t = NULL;
    CHECK_MSG(mft_chat_template_create(ctx, source, -1, &t) == MFT_OK, "%s", mft_error_message(ctx));
    return t;
}

/* A template without messages: its text, or "! " and the sentence. Static buffer. */
static const char *rendered(const char *source)
{
    static char        out[4096];
    mft_chat_template *t = NULL;
    mft_chat           chat;
    memset(&chat, 0, sizeof chat);
    if (mft_chat_template_create(ctx, source, -1, &t) != MFT_OK || mft_chat_template_render(t, &chat, out, sizeof out) < 0)
        snprintf(out, sizeof out, "! %s", mft_error_message(ctx));
    mft_chat_template_destroy(t);
    return out;
}

/* Whether the spans of x are the strings of the array. */
static int same_spans(const mft__chat_text *x, const mft_json *want)
{
    size_t i, n;
    if (x->n_spans != mft_json_count(want)) return 0;
    for (i = 0; i < x->n_spans; i++) {
        const char *s = mft_json_string(mft_json_at(want, i, NULL), &n);
        if (x->spans[i].begin < 0 || x->spans[i].end > (int64_t)x->bytes || (int64_t)n != x->spans[i].end - x->spans[i].begin
            || memcmp(x->text + x->spans[i].begin, s, n) != 0) return 0;
    }
    return 1;
}

static int same_text(const mft__chat_text *x, const mft_json *want)
{
    size_t      n;
    const char *s = mft_json_string(want, &n);
    return s && n == x->bytes && !memcmp(s, x->text, n) && x->text[n] == '\0';
}

/* One line of a file after another; NULL at the end. */
static char *next_line(char **at)
{
    char *line = *at, *end;
    if (!*line) return NULL;
    end = strchr(line, '\n');
    if (end) { *end = '\0'; *at = end + 1; } else *at = line + strlen(line);
    return line;
}

/* ---- the styles and snippets ---- */
static void test_golden(void)
{
    char              *file = test_read_file("tests/golden/chat_templates.jsonl", NULL), *at = file, *line;
    mft_chat_template *t = NULL;
    mft_json          *first = NULL, *j;
    mft__chat_text     x;
    mft_chat           chat;
    size_t             n, n_texts = 0, n_errors = 0, n_spans = 0;

    if (!file) SKIP("chat_templates: tests/golden/chat_templates.jsonl is not there (run from the repository)");
    memset(&x, 0, sizeof x);
    while ((line = next_line(&at)) != NULL) {
        const mft_json *given;
        mft_status      s = MFT_OK;
        j = NULL;
        CHECK(mft_json_parse(ctx, line, strlen(line), &j) == MFT_OK);
        if (!first) { first = j; continue; }
        if (mft_json_get(j, "template")) {
            const char *source = mft_json_string(mft_json_get(j, "template"), &n);
            mft_chat_template_destroy(t);
            s = mft_chat_template_create(ctx, source, (int64_t)n, &t);
            CHECK((s == MFT_OK) == (t != NULL));
            if (t) { mft_chat_template_set(t, "bos_token", "<s>"); mft_chat_template_set(t, "eos_token", "</s>"); }
            mft_json_destroy(j);
            continue;
        }
        given = mft_json_get(j, "snippet") ? first : j;
        memset(&chat, 0, sizeof chat);
        chat.messages_json = mft_json_get(given, "messages");
        chat.tools         = mft_json_get(given, "tools");
        chat.variables     = mft_json_get(given, "variables");
        chat.flags         = given == first || mft_json_bool(mft_json_get(j, "prompt"), 0) ? MFT_GENERATION_PROMPT : 0;
        chat.now           = 1751328000;                        /* 2025-07-01 */
        if (t) s = mft__chat_render(t, &chat, mft_json_get(j, "assistant") != NULL, &x);
        else   s = MFT_ERR_FORMAT;
        if (mft_json_get(j, "error")) {
            n_errors++;
            CHECK_MSG(s == MFT_ERR_UNSUPPORTED || s == MFT_ERR_FORMAT, "line should fail: %.200s", line);
            CHECK_MSG(strstr(mft_error_message(ctx), "chat template, line "), "%s", mft_error_message(ctx));
        } else {
            n_texts++;
            CHECK_MSG(s == MFT_OK, "%s: %.200s", mft_error_message(ctx), line);
            if (s == MFT_OK) CHECK_MSG(same_text(&x, mft_json_get(j, "text")), "got %s\nfor %s", x.text, line);
            if (s == MFT_OK && mft_json_get(j, "assistant")) { n_spans++; CHECK_MSG(same_spans(&x, mft_json_get(j, "assistant")), "spans for %s", line); }
        }
        mft_json_destroy(j);
    }
    CHECK(n_texts > 150 && n_errors > 30 && n_spans > 30);
    mft__chat_text_free(ctx, &x);
    mft_chat_template_destroy(t);
    mft_json_destroy(first);
    free(file);
}

/* ---- the assets: text, spans; ids and masks by the tokenizer ---- */
static void check_assets(const char *name, const char *dir)
{
    char               path[64];
    char              *file, *at, *line;
    mft_chat_template *t = NULL;
    mft_tokenizer     *tok = NULL;
    mft__chat_text     x;
    mft_chat           chat;
    int                lines = 0;

    snprintf(path, sizeof path, "assets/golden/chat/%s.jsonl", name);
    file = at = test_read_file(test_data(path), NULL);
    if (!file) SKIP("chat %s: %s is not there", name, test_data(path));
    CHECK_MSG(mft_chat_template_load(ctx, test_data(dir), &t) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_tokenizer_load(ctx, test_data(dir), &tok) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(tok && mft_tokenizer_chat_template(tok) && strcmp(mft_chat_template_source(t), mft_chat_template_source(mft_tokenizer_chat_template(tok))) == 0);
    memset(&x, 0, sizeof x);
    while (t && tok && (line = next_line(&at)) != NULL) {
        static int32_t  ids[8192];
        static char     small[64];
        const mft_json *messages, *want_ids, *mask;
        mft_message     plain[16];
        mft_json       *j = NULL;
        size_t          n, i, first;
        int64_t         n_ids, part;
        CHECK(mft_json_parse(ctx, line, strlen(line), &j) == MFT_OK);
        messages = mft_json_get(j, "messages"); want_ids = mft_json_get(j, "ids"); mask = mft_json_get(j, "assistant_mask");
        memset(&chat, 0, sizeof chat);
        chat.messages_json = messages;
        chat.flags = mft_json_bool(mft_json_get(j, "add_generation_prompt"), 0) ? MFT_GENERATION_PROMPT : 0;
        CHECK_MSG(mft__chat_render(t, &chat, 1, &x) == MFT_OK, "%s", mft_error_message(ctx));
        CHECK_MSG(same_text(&x, mft_json_get(j, "text")), "%s", line);
        CHECK_MSG(same_spans(&x, mft_json_get(j, "assistant_text")), "%s", line);

        n_ids = mft_tokenizer_encode(tok, x.text, (int64_t)x.bytes, MFT_NO_ADD_SPECIAL, ids, 8192);
        CHECK(n_ids == (int64_t)mft_json_count(want_ids));
        for (i = 0; i < mft_json_count(want_ids) && n_ids <= 8192; i++) CHECK(mft_json_integer(mft_json_at(want_ids, i, NULL), -1) == ids[i]);
        /* a token is in when its characters overlap a span; tokens that only together are whole characters share theirs */
        for (i = 0, first = 0, part = 0; i < mft_json_count(mask) && n_ids <= 8192; i++) {
            static char decoded[65536];
            int64_t     end = mft_tokenizer_decode(tok, ids, (int64_t)i + 1, 0, decoded, sizeof decoded), in = 0;
            size_t      k;
            CHECK(end <= (int64_t)sizeof decoded && (i + 1 < mft_json_count(mask) || end == (int64_t)x.bytes));
            if (end < 0 || end > (int64_t)x.bytes || memcmp(decoded, x.text, (size_t)end) != 0) continue;
            for (k = 0; k < x.n_spans; k++) in |= part < x.spans[k].end && end > x.spans[k].begin;
            for (; first <= i; first++) CHECK_MSG(in == mft_json_integer(mft_json_at(mask, first, NULL), -1), "token %d of %s", (int)first, line);
            part = end;
        }
        CHECK(first == mft_json_count(mask));

        n = mft_json_count(messages);                           /* the same by plain messages, also cut short */
        for (i = 0; i < n && i < 16; i++) {
            plain[i].role    = mft_json_string(mft_json_get(mft_json_at(messages, i, NULL), "role"), NULL);
            plain[i].content = mft_json_string(mft_json_get(mft_json_at(messages, i, NULL), "content"), NULL);
        }
        CHECK(mft_apply_chat_template(tok, plain, (int)n, chat.flags, NULL, 0) == (int64_t)x.bytes);
        memset(small, '#', sizeof small);
        CHECK(mft_apply_chat_template(tok, plain, (int)n, chat.flags, small, 5) == (int64_t)x.bytes);
        CHECK(memcmp(small, x.text, 5) == 0 && small[5] == '#');
        mft_json_destroy(j);
        lines++;
    }
    CHECK(lines == 42);
    mft__chat_text_free(ctx, &x);
    mft_tokenizer_destroy(tok);
    mft_chat_template_destroy(t);
    free(file);
}

static void test_gemma3(void)      { check_assets("gemma3", "assets/tokenizers/gemma3"); }
static void test_qwen25(void)      { check_assets("qwen2.5", "assets/tokenizers/qwen2.5"); }
static void test_qwen3(void)       { check_assets("qwen3", "assets/tokenizers/qwen3"); }
static void test_shakespeare(void) { check_assets("gemma3-shakespeare", "assets/models/gemma3-shakespeare"); }

/* ---- bounds and sentences ---- */
static void test_plain_text(void)
{
    static const char *const texts[] = { "", "a", "{ % }", "no {tags} here\nat all", "\n\nx", "caf\xc3\xa9 %} }} #}", "broken \xff\xfe utf-8 \xc3" };
    size_t i;
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++) CHECK_MSG(strcmp(rendered(texts[i]), texts[i]) == 0, "%s", texts[i]);
    CHECK(strcmp(rendered("a\r\nb\rc\n"), "a\nb\nc") == 0);      /* as Jinja: \n only, and the last one left out */
}

static void test_sentences(void)
{
    static const char *const cases[][2] = {
        { "a\nb\n{{ 'x' | foo }}",              "line 3: filter 'foo' is not known" },
        { "{{ 1 is bar }}",                     "line 1: test 'bar' is not known" },
        { "\n{% include 'x' %}",                "line 2: tag 'include' is not known" },
        { "{% if true %}\n\nx",                 "line 1: the tag that begins here is not closed: 'endif' is missing" },
        { "{% endfor %}",                       "line 1: 'endfor' closes nothing" },
        { "{{ 'abc }}",                         "line 1: a string is not closed" },
        { "x\n{{ 1 + }}",                       "line 2: the tag ends where an expression should be" },
        { "{{ nope.x }}",                       "line 1: 'nope' is undefined" },
        { "{{ {'a': 1}.b.c }}",                 "'dict' has no attribute or element 'b'" },
        { "{{ 'a'.zfill(3) }}",                 "method 'zfill' of a str is not known" },
        { "\n\n{{ raise_exception('no ' ~ 2) }}", "line 3: the template refuses the conversation: no 2" },
        { "{{ strftime_now('%Y') }}",           "no time" }, { "{{ [1].append(2) }}", "which templates may not" },
        { "{% break %}",                        "'break' outside of a loop" }, { "{{ 1 // 0 }}", "division by zero" },
        { "{{ 9223372036854775807 + 1 }}",      "does not fit 64 bits" }, { "{{ -9223372036854775807 * 2 }}", "does not fit 64 bits" },
        { "{{ f(*x) }}",                        "'*' and '**' before an argument" }, { "{% for a in b recursive %}{% endfor %}", "recursive loops" },
        { "{# a comment",                       "a comment is not closed" }, { "{% raw %} a", "'endraw' is missing" } };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *got = rendered(cases[i][0]);
        if (strcmp(cases[i][1], "no time") == 0) { CHECK(strstr(got, "none was given")); continue; }
        CHECK_MSG(got[0] == '!' && strstr(got, cases[i][1]), "%s gave %s", cases[i][0], got);
    }
}

static void test_bounds(void)
{
    static char deep[40000];
    size_t      i, n;
    CHECK(strstr(rendered("{% set r = range(100000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"), "has not ended after"));
    CHECK(strstr(rendered("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"), "!"));
    CHECK(strstr(rendered("{% set ns = namespace(x=none) %}{% set big = 'a' * 1000 %}{% for a in range(100000) %}{% set ns.x = [ns.x, big ~ a] %}{% endfor %}"), "needs more than"));
    CHECK(strcmp(rendered("{% macro m(x) %}{{ x }}{{ caller() }}{% endmacro %}{% for a in [1,2,3] %}{% set t = a %}{% call m(a) %}{{ t }};{% endcall %}{% endfor %}"), "11;22;33;") == 0);
    CHECK(strcmp(rendered("{% set ns = namespace(l=[]) %}{% for a in [1,2] %}{% macro f() %}{{ a }}{% endmacro %}{% set ns.l = ns.l + [f] %}{% endfor %}{{ ns.l[0]() }}{{ ns.l[1]() }}"), "12") == 0);
    CHECK(strstr(rendered("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "nest deeper than"));
    CHECK(strstr(rendered("{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}"), "nest deeper than"));
    CHECK(strstr(rendered("{% set ns = namespace(x='ab') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"), "more than"));
    CHECK(strstr(rendered("{{ 'abcdefgh' * 99999999999 }}"), "!"));
    CHECK(strstr(rendered("{{ range(0, 9223372036854775807)|length }}"), "a range of more than"));
    CHECK(strstr(rendered("{{ 'x' | indent(99999999999) }}"), "!"));
    memset(deep, '(', 30000); deep[0] = deep[1] = '{';
    CHECK(strstr(rendered(deep), "nest deeper than"));
    for (n = 0; n < 30000; n += 10) memcpy(deep + n, "{% if 1 %}", 10);
    deep[n] = '\0';
    CHECK(strstr(rendered(deep), "nest deeper than"));
    memcpy(deep, "{{ 1", 4);
    for (n = 4, i = 0; i < 9000; i++, n += 3) memcpy(deep + n, " +1", 3);
    memcpy(deep + n, " }}", 4);
    CHECK(strstr(rendered(deep), "nest deeper than"));
    memcpy(deep, "{{ ", 3); memset(deep + 3, '-', 30000); memcpy(deep + 30003, "1 }}", 5);
    CHECK(strstr(rendered(deep), "nest deeper than"));
}

static void test_locale(void)
{
    if (!setlocale(LC_NUMERIC, "de_DE.UTF-8")) SKIP("locale: de_DE.UTF-8 is not installed");
    CHECK(strcmp(rendered("{{ 1.5 }} {{ '2.5'|float }} {{ 2.675|round(2) }}"), "1.5 2.5 2.67") == 0);
    setlocale(LC_NUMERIC, "C");
}

static void test_time(void)
{
    static const struct { int64_t now; const char *want; } cases[] = {         /* by `date -u` */
        { 951782400, "2000-02-29 060 Tue" }, { 1709251199, "2024-02-29 060 Thu" }, { 1767225599, "2025-12-31 365 Wed" },
        { 1767225600, "2026-01-01 001 Thu" }, { 4107542400, "2100-03-01 060 Mon" }, { 86400, "1970-01-02 002 Fri" } };
    mft_chat_template *t = compiled("{{ strftime_now('%Y-%m-%d %j %a') }}");
    mft_chat           chat;
    char               text[64];
    size_t             i;
    memset(&chat, 0, sizeof chat);
    for (i = 0; t && i < sizeof cases / sizeof cases[0]; i++) {
        chat.now = cases[i].now;
        CHECK(mft_chat_template_render(t, &chat, text, sizeof text) > 0);
        CHECK_MSG(strcmp(text, cases[i].want) == 0, "%s, not %s", text, cases[i].want);
    }
    mft_chat_template_destroy(t);
}

/* ---- our own templates ---- */
static void test_builtins(void)
{
    static const mft_message two[] = { { "system", "S" }, { "user", "q" }, { "assistant", "a " }, { "user", "r" } };
    static const struct { const char *name, *text, *span; } cases[] = {
        { "chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na <|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", "a <|im_end|>" },
        { "gemma", "<start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n", "a<end_of_turn>" },
        { "llama3", "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "a<|eot_id|>" },
        { "llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]", "a </s>" },
        { "zephyr", "<|system|>\nS</s>\n<|user|>\nq</s>\n<|assistant|>\na </s>\n<|user|>\nr</s>\n<|assistant|>\n", "a </s>" } };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        mft_chat_template *t = compiled(mft_chat_template_builtin(cases[i].name));
        mft_chat_span      span[2];
        mft_chat           chat;
        char               text[512];
        int64_t            n;
        if (!t) continue;
        memset(&chat, 0, sizeof chat);
        chat.messages = two; chat.n_messages = 4; chat.flags = MFT_GENERATION_PROMPT;
        n = mft_chat_template_render(t, &chat, text, sizeof text);
        CHECK_MSG(n == (int64_t)strlen(cases[i].text) && strcmp(text, cases[i].text) == 0, "%s: %s", cases[i].name, text);
        CHECK(mft_chat_template_spans(t, &chat, span, 2) == 1);
        CHECK(span[0].end - span[0].begin == (int64_t)strlen(cases[i].span) && !memcmp(text + span[0].begin, cases[i].span, strlen(cases[i].span)));
        mft_chat_template_destroy(t);
    }
    CHECK(mft_chat_template_builtin("nothing") == NULL && mft_chat_template_builtin(NULL) == NULL);
}

/* A closing that only the end of the conversation has (Phi-3's) is not the turn's, whichever turn it is, and what it
 * shares with the next opening, a '<', is not either; content that says what the template says changes nothing. */
static void test_turns(void)
{
    static const mft_message messages[] = { { "user", "q <|assistant|>" }, { "assistant", "a < b" }, { "user", "a < b<|end|>" }, { "assistant", " c <" } };
    static const char *const want[] = { "a < b<|end|>", " c <<|end|>" };
    mft_chat_template *t = compiled("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
                                    "{{ '<|assistant|>\n' if add_generation_prompt else '</s>' }}");
    mft_chat           chat;
    mft_chat_span      spans[2];
    char               text[256];
    int                k, n, i;
    memset(&chat, 0, sizeof chat);
    chat.messages = messages;
    for (k = 0; t && k < 4; k++) {
        n = k & 1 ? 4 : 2;
        chat.n_messages = n; chat.flags = k & 2 ? MFT_GENERATION_PROMPT : 0;
        CHECK(mft_chat_template_render(t, &chat, text, sizeof text) > 0);
        CHECK(mft_chat_template_spans(t, &chat, spans, 2) == n / 2);
        for (i = 0; i < n / 2; i++)
            CHECK_MSG(spans[i].end - spans[i].begin == (int64_t)strlen(want[i]) && !memcmp(text + spans[i].begin, want[i], strlen(want[i])),
                      "turn %d of %d: %.*s", i, n, (int)(spans[i].end - spans[i].begin), text + spans[i].begin);
    }
    mft_chat_template_destroy(t);
}

/* ---- snapshots ---- */
static void put_file(const char *dir, const char *name, const char *text)
{
    char  path[512];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (!text) { remove(path); return; }
    f = fopen(path, "wb");
    CHECK(f && fwrite(text, 1, strlen(text), f) == strlen(text));
    if (f) fclose(f);
}

static void test_snapshots(void)
{
    char               dir[] = "/tmp/mft_chat_XXXXXX", path[64], text[64];
    mft_chat_template *t = NULL;
    mft_chat           chat;
    memset(&chat, 0, sizeof chat);
    if (!mkdtemp(dir)) SKIP("snapshots: no temporary directory");
    CHECK(mft_chat_template_load(ctx, dir, &t) == MFT_ERR_UNSUPPORTED && !t && strstr(mft_error_message(ctx), "no chat template"));
    put_file(dir, "tokenizer_config.json", "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"T\"}, {\"name\": \"default\", \"template\": \"D{{ bos_token }}{{ eos_token }}{{ pad_token }}\"}],"
             " \"bos_token\": {\"content\": \"<b>\", \"lstrip\": false}, \"eos_token\": \"<e>\", \"pad_token\": null}");
    put_file(dir, "special_tokens_map.json", "{\"eos_token\": \"<not>\", \"pad_token\": {\"content\": \"<p>\"}}");
    CHECK(mft_chat_template_load(ctx, dir, &t) == MFT_OK);
    CHECK(t && mft_chat_template_render(t, &chat, text, sizeof text) == 10 && strcmp(text, "D<b><e><p>") == 0);
    CHECK(mft_chat_template_set(t, "eos_token", NULL) == MFT_OK && mft_chat_template_set(t, "bos_token", "<c>") == MFT_OK);
    CHECK(mft_chat_template_render(t, &chat, text, sizeof text) == 7 && strcmp(text, "D<c><p>") == 0);
    mft_chat_template_destroy(t);
    put_file(dir, "chat_template.jinja", "J{{ eos_token }}\n");
    CHECK(mft_chat_template_load(ctx, dir, &t) == MFT_OK);
    CHECK(t && mft_chat_template_render(t, &chat, text, sizeof text) == 4 && strcmp(text, "J<e>") == 0);
    mft_chat_template_destroy(t);
    put_file(dir, "mine.txt", "M{{ eos_token }}");
    snprintf(path, sizeof path, "%s/mine.txt", dir);
    CHECK(mft_chat_template_load(ctx, path, &t) == MFT_OK);
    CHECK(t && mft_chat_template_render(t, &chat, text, sizeof text) == 4 && strcmp(text, "M<e>") == 0);
    mft_chat_template_destroy(t);
    put_file(dir, "chat_template.jinja", NULL);
    put_file(dir, "tokenizer_config.json", "{\"chat_template\": [{\"name\": \"a\", \"template\": \"A\"}, {\"name\": \"b\", \"template\": \"B\"}]}");
    CHECK(mft_chat_template_load(ctx, dir, &t) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "none of them named"));
    put_file(dir, "tokenizer_config.json", "{\"chat_template\": ");
    CHECK(mft_chat_template_load(ctx, dir, &t) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "line 1"));
    CHECK(mft_chat_template_load(ctx, "/nowhere/at/all", &t) == MFT_ERR_IO && !t);
    put_file(dir, "tokenizer_config.json", NULL); put_file(dir, "special_tokens_map.json", NULL); put_file(dir, "mine.txt", NULL);
    remove(dir);
}

static void test_arguments(void)
{
    mft_chat_template *t = compiled("{{ messages[0].role }}");
    mft_json          *j = NULL;
    mft_message        half = { "user", NULL };
    mft_chat           chat;
    char               c[4];
    memset(&chat, 0, sizeof chat);
    CHECK(mft_chat_template_create(NULL, "", -1, &t) == MFT_ERR_INVALID_ARGUMENT && !t);
    t = compiled("{{ messages[0].role }}");
    CHECK(mft_chat_template_render(NULL, &chat, c, 4) == MFT_ERR_INVALID_ARGUMENT && mft_chat_template_render(t, NULL, c, 4) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_chat_template_render(t, &chat, NULL, 4) == MFT_ERR_INVALID_ARGUMENT);
    chat.n_messages = 1;
    CHECK(mft_chat_template_render(t, &chat, c, 4) == MFT_ERR_INVALID_ARGUMENT);
    chat.messages = &half;
    CHECK(mft_chat_template_render(t, &chat, c, 4) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "message 1"));
    CHECK(mft_json_parse(ctx, "[1]", 3, &j) == MFT_OK);
    chat.messages_json = j;
    CHECK(mft_chat_template_render(t, &chat, c, 4) == MFT_ERR_FORMAT && strstr(mft_error_message(ctx), "message 1 is no object"));
    chat.messages_json = mft_json_at(j, 0, NULL);
    CHECK(mft_chat_template_render(t, &chat, c, 4) == MFT_ERR_FORMAT);
    mft_json_destroy(j);
    mft_chat_template_destroy(t);
    mft_chat_template_destroy(NULL);
}

/* ---- every allocation fails once ---- */
typedef struct failing { long left; } failing;
static void *failing_alloc(void *user, size_t bytes, size_t align)
{
    failing *f = (failing *)user;
    if (f->left == 0) return NULL;
    if (f->left > 0) f->left--;
    return mft__default_alloc(NULL, bytes, align);
}

static void test_allocation_failures(void)
{
    static const mft_message messages[] = { { "user", "q" }, { "assistant", "<think>x</think>a" }, { "user", "r" }, { "assistant", "b" } };
    static const char source[] = "{% macro m(x, y='d') %}<{{ x ~ y }}>{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages if m.role %}{% set ns.n = ns.n + loop.index %}"
        "{{ m.role | upper }}{% set t %}{{ m.content.split('</think>')[-1] }}{% endset %}{{ t }}<end>{{ m | tojson(indent=2) if false }}{% if loop.last %}!{% endif %}{% endfor %}"
        "{{ m(ns.n) }}{{ messages | map(attribute='role') | unique | sort | join(',') }}{% if add_generation_prompt %}ASSISTANT{% endif %}";
    mft_context_desc desc;
    mft_context     *own = NULL;
    failing          f;
    long             k, worked = 0;
    memset(&desc, 0, sizeof desc);
    f.left = -1;
    desc.allocator.alloc = failing_alloc; desc.allocator.free = mft__default_free; desc.allocator.user = &f;
    desc.n_threads = 1;
    CHECK(mft_context_create(&desc, &own) == MFT_OK);
    for (k = 0; own && k < 500 && !worked; k++) {
        mft_chat_template *t = NULL;
        mft_memory_report  before, after;
        mft_chat           chat;
        mft_chat_span      spans[4];
        mft_status         s;
        int64_t            n = 0;
        memset(&chat, 0, sizeof chat);
        chat.messages = messages; chat.n_messages = 4;
        mft_memory(own, &before);
        f.left = k;
        s = mft_chat_template_create(own, source, -1, &t);
        if (s == MFT_OK) s = mft_chat_template_set(t, "bos_token", "<s>");
        if (s == MFT_OK) { n = mft_chat_template_spans(t, &chat, spans, 4); if (n < 0) s = (mft_status)n; }
        f.left = -1;
        CHECK_MSG(s == MFT_OK || s == MFT_ERR_OUT_OF_MEMORY, "allocation %ld: %s", k, mft_error_message(own));
        if (s == MFT_OK) { worked = k; CHECK(n == 2); }
        mft_chat_template_destroy(t);
        mft_memory(own, &after);
        CHECK(after.now == before.now);
    }
    CHECK_MSG(worked > 15, "%ld", worked);
    mft_context_destroy(own);
}

int main(void)
{
    if (mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    TEST(test_golden);
    TEST(test_gemma3);
    TEST(test_qwen25);
    TEST(test_qwen3);
    TEST(test_shakespeare);
    TEST(test_plain_text);
    TEST(test_sentences);
    TEST(test_bounds);
    TEST(test_locale);
    TEST(test_time);
    TEST(test_builtins);
    TEST(test_turns);
    TEST(test_snapshots);
    TEST(test_arguments);
    TEST(test_allocation_failures);
    mft_context_destroy(ctx);
    return test_report("chat");
}
