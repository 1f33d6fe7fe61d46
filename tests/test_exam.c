/* test_exam.c - questions with known answers: likelihoods against the model's own logits, MMLU's prompt word by word,
 * lines of JSONL, what does not fit, paired intervals. The same in Transformers: tests/oracle/test_eval.py */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkdtemp */
#endif
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

#include <sys/stat.h>

static mft_context   *ctx;
static mft_model     *model;
static mft_tokenizer *tok;

/* A small model of random weights with a tokenizer of tests/golden. */
static void set_up(void)
{
    static const char config[] = "{\"model_type\": \"qwen2\", \"vocab_size\": 430, \"hidden_size\": 16, \"intermediate_size\": 24, \"num_hidden_layers\": 2, "
                                 "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"max_position_embeddings\": 256, \"tie_word_embeddings\": true, \"eos_token_id\": 2}";
    write_file(in_room("config.json"), config, sizeof config - 1);
    CHECK_MSG(mft_model_init(ctx, in_room("config.json"), 3, MFT_F32, in_room("q")) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_model_load(ctx, in_room("q"), NULL, &model) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_tokenizer_load(ctx, "tests/golden/assets/tokenizers/qwen-tiny", &tok) == MFT_OK, "%s", mft_error_message(ctx));
}

/* ln P(ids[n_prompt..n) | ids[0..n_prompt)) from the logits of all at once, in double. */
static double by_logits(const int32_t *ids, int n_prompt, int n)
{
    mft_batch    b;
    mft_tensor  *y;
    double       sum = 0;
    int          was = mft_grad_enable(ctx, 0), t, v;
    memset(&b, 0, sizeof b);
    b.input_ids = ids; b.batch = 1; b.seq = n;
    y = mft_model_forward(model, &b);
    for (t = n_prompt; y && t < n; t++) {
        const float *row = (const float *)y->data + (t - 1) * 430;
        double       total = 0;
        for (v = 0; v < 430; v++) total += exp((double)row[v]);
        sum += (double)row[ids[t]] - log(total);
    }
    mft_step_reset(ctx);
    mft_grad_enable(ctx, was);
    return y ? sum : NAN;
}

static void test_likelihood(void)
{
    int32_t        ids[12] = { 5, 17, 3, 200, 41, 7, 99, 12, 300, 1, 64, 8 }, second[12], bad = 430;
    const int32_t *rest[3];
    int64_t        lengths[3] = { 5, 1, 3 };
    double         got[3];
    rest[0] = ids + 7; rest[1] = ids + 2; rest[2] = ids + 4;
    CHECK(mft_log_likelihood(model, ids, 7, rest, lengths, 3, got) == MFT_OK);
    CHECK(fabs(got[0] - by_logits(ids, 7, 12)) < 1e-4);
    memcpy(second, ids, sizeof ids);
    second[7] = ids[2];
    CHECK(fabs(got[1] - by_logits(second, 7, 8)) < 1e-4);
    memcpy(second + 7, ids + 4, 3 * sizeof *ids);
    CHECK(fabs(got[2] - by_logits(second, 7, 10)) < 1e-4);
    CHECK(mft_log_likelihood(model, ids, 1, rest, lengths, 3, got) == MFT_OK);
    CHECK(mft_log_likelihood(model, ids, 0, rest, lengths, 3, got) == MFT_ERR_INVALID_ARGUMENT);
    lengths[1] = 0;
    CHECK(mft_log_likelihood(model, ids, 7, rest, lengths, 3, got) == MFT_ERR_INVALID_ARGUMENT);
    lengths[1] = 1; rest[1] = &bad;
    CHECK(mft_log_likelihood(model, ids, 7, rest, lengths, 3, got) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "430"));
}

static mft_exam *load(const char *name, const mft_exam_desc *d)
{
    mft_exam *e = NULL;
    CHECK_MSG(mft_exam_load(ctx, tok, in_room(name), d, &e) == MFT_OK, "%s", mft_error_message(ctx));
    return e;
}

static void put(const char *name, const char *text) { write_file(in_room(name), text, strlen(text)); }

static void refuse(const char *name, const mft_exam_desc *d, mft_status status, const char *word)
{
    mft_exam  *e = NULL;
    mft_status s = mft_exam_load(ctx, tok, in_room(name), d, &e);
    CHECK_MSG(s == status && !e && strstr(mft_error_message(ctx), word), "%s: %s: %s", name, mft_status_string(s), mft_error_message(ctx));
}

/* The answer that encoding the whole text gives. */
static double by_text(const char *prompt, const char *answer)
{
    int32_t ids[600], alone[600];
    char    text[4000];
    int64_t n, n_prompt, k;
    snprintf(text, sizeof text, "%s%s", prompt, answer);
    n = mft_tokenizer_encode(tok, text, -1, 0, ids, 600);
    n_prompt = mft_tokenizer_encode(tok, prompt, -1, 0, alone, 600);
    for (k = 0; k < n_prompt && k + 1 < n && ids[k] == alone[k]; k++) {}
    return by_logits(ids, (int)k, (int)n);
}

static void test_mmlu(void)
{
    static const char asked[] = "The following are multiple choice questions (with answers) about odd things.\n\n";
    mft_exam_desc d;
    mft_question  q;
    mft_answer    a;
    mft_exam     *e;
    char          prompt[2000];
    int           i;
    mkdir(in_room("mmlu"), 0777); mkdir(in_room("mmlu/dev"), 0777); mkdir(in_room("mmlu/test"), 0777);
    put("mmlu/dev/odd_things_dev.csv", "Is it?,yes,no,\"well, so\",nay,C\nMay it?,1,2,3,4,A\n");
    put("mmlu/test/odd_things_test.csv", "\"A \"\"b\"\"?\",i,ii,iii,iv,D\nWhy?,a,b,c,d,B\n");
    put("mmlu/test/zoo_test.csv", "Cat?,a,b,c,d,A\n");
    put("mmlu/dev/zoo_dev.csv", "Dog?,a,b,c,d,A\n");
    memset(&d, 0, sizeof d);
    d.n_shot = 1;
    e = load("mmlu", &d);
    CHECK(mft_exam_size(e) == 3);
    CHECK(mft_exam_question(e, 2, &q) == MFT_OK && !strcmp(q.subject, "zoo"));
    CHECK(mft_exam_question(e, 3, &q) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_exam_question(e, 0, &q) == MFT_OK && !strcmp(q.subject, "odd_things") && q.answer == 3 && q.n_choices == 4);
    CHECK(!strcmp(q.prompt, "A \"b\"?\nA. i\nB. ii\nC. iii\nD. iv\nAnswer:") && !strcmp(q.reference, " D") && !strcmp(q.expected, "D"));
    snprintf(prompt, sizeof prompt, "%sIs it?\nA. yes\nB. no\nC. well, so\nD. nay\nAnswer: C\n\n%s", asked, q.prompt);
    CHECK_MSG(mft_exam_ask(e, 0, model, 0, &a) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(a.n_shot == 1 && a.n_cut == 0 && a.exact == -1);
    for (i = 0; i < 4; i++) {
        CHECK_MSG(fabs(a.choices[i] - by_text(prompt, q.choices[i])) < 1e-4, "%d: %g, %g", i, a.choices[i], by_text(prompt, q.choices[i]));
        CHECK(a.choices[i] <= a.choices[a.choice]);
    }
    CHECK(a.log_likelihood == a.choices[3]);
    mft_exam_destroy(e);

    d.n_shot = 2;
    refuse("mmlu", &d, MFT_ERR_INVALID_ARGUMENT, "1 worked examples fewer");    /* the zoo has but one */
    d.subject = "odd_things";
    e = load("mmlu", &d);
    CHECK(mft_exam_size(e) == 2);
    mft_exam_destroy(e);
    d.subject = "no such";   refuse("mmlu", &d, MFT_ERR_INVALID_ARGUMENT, "no such");
    d.subject = NULL; d.split = "train"; refuse("mmlu", &d, MFT_ERR_INVALID_ARGUMENT, "train");
    d.split = "val"; refuse("mmlu", &d, MFT_ERR_IO, "val");
    refuse("mmlu/test/zoo_test.csv", &d, MFT_ERR_INVALID_ARGUMENT, "dev/");
    d.n_shot = 0;
    e = load("mmlu/test/zoo_test.csv", &d);
    CHECK(mft_exam_size(e) == 1);
    mft_exam_destroy(e);
    mft_exam_destroy(NULL);
}

/* Prompts longer than the model's positions: first the examples go, then the prompt's beginning. */
static void test_too_long(void)
{
    mft_exam_desc d;
    mft_answer    a;
    mft_exam     *e;
    char          text[4000];
    int           i, n = 0;
    memset(&d, 0, sizeof d);
    d.n_shot = 2;
    mkdir(in_room("long"), 0777); mkdir(in_room("long/dev"), 0777); mkdir(in_room("long/test"), 0777);
    for (i = 0; i < 2; i++) n += snprintf(text + n, sizeof text - (size_t)n, "%0*d?,a,b,c,d,A\n", 90, i);
    write_file(in_room("long/dev/x_dev.csv"), text, (size_t)n);
    n = snprintf(text, sizeof text, "Short?,a,b,c,d,A\n%0*d?,a,b,c,d,A\n", 400, 7);
    write_file(in_room("long/test/x_test.csv"), text, (size_t)n);
    e = load("long", &d);
    CHECK_MSG(mft_exam_ask(e, 0, model, 0, &a) == MFT_OK && a.n_shot < 2 && a.n_cut == 0, "%d %d", a.n_shot, (int)a.n_cut);
    CHECK_MSG(mft_exam_ask(e, 1, model, 4, &a) == MFT_OK && a.n_shot == 0 && a.n_cut > 100 && a.exact == 0, "%d %d", a.n_shot, (int)a.n_cut);
    mft_exam_destroy(e);
}

static void test_lines(void)
{
    mft_exam_desc    d;
    mft_dataset_desc data;
    mft_question     q;
    mft_answer       a;
    mft_exam        *e;
    int32_t          ids[64], out[8];
    char             said[200], line[600];
    int64_t          n, bytes;
    memset(&d, 0, sizeof d);
    memset(&data, 0, sizeof data);
    d.data = &data;
    put("a.jsonl", "{\"prompt\": \"Is it?\", \"completion\": \" yes, it is\", \"answer\": \"yes\", \"choices\": [\"no\", \"yes\"]}\n\n"
                   "{\"prompt\": \"And?\", \"completion\": \" maybe\", \"answer\": 1, \"choices\": [\"so\", \"nay\"]}\r\n"
                   "{\"prompt\": \"Say\", \"completion\": \"\\n the end \"}\n");
    e = load("a.jsonl", &d);
    CHECK(mft_exam_size(e) == 3);
    CHECK(mft_exam_question(e, 0, &q) == MFT_OK && q.answer == 1 && !strcmp(q.choices[0], " no") && !strcmp(q.reference, " yes, it is") && !strcmp(q.expected, "yes"));
    CHECK(mft_exam_ask(e, 0, model, 0, &a) == MFT_OK && fabs(a.log_likelihood - by_text("Is it?", " yes, it is")) < 1e-4 && fabs(a.choices[0] - by_text("Is it?", " no")) < 1e-4);
    CHECK(mft_exam_question(e, 1, &q) == MFT_OK && q.answer == 1 && !strcmp(q.expected, "nay"));
    CHECK(mft_exam_question(e, 2, &q) == MFT_OK && q.answer == -1 && q.n_choices == 0 && !strcmp(q.expected, "the end"));
    CHECK(mft_exam_ask(e, 2, model, 0, &a) == MFT_OK && a.choice == -1 && a.exact == -1 && a.n_tokens > 1);
    mft_exam_destroy(e);

    put("i.jsonl", "{\"instruction\": \"Do\", \"input\": \"x\", \"output\": \"yes. Sure.\", \"answer\": \"yes\"}\n");
    d.choices = "yes,no , maybe";
    e = load("i.jsonl", &d);
    CHECK(mft_exam_question(e, 0, &q) == MFT_OK && q.n_choices == 3 && q.answer == 0 && !strcmp(q.choices[1], "no") && !strcmp(q.choices[2], "maybe"));
    CHECK(strstr(q.prompt, "### Input:\nx\n\n### Response:") != NULL);
    mft_exam_destroy(e);
    d.choices = NULL;

    data.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    put("m.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}, {\"role\": \"user\", \"content\": \"c\"}, {\"role\": \"assistant\", \"content\": \" d\"}]}\n");
    e = load("m.jsonl", &d);
    CHECK(mft_exam_question(e, 0, &q) == MFT_OK && !strcmp(q.prompt, "<user>a</>\n<assistant>b</>\n<user>c</>\n<assistant>") && !strcmp(q.expected, "d"));
    mft_exam_destroy(e);
    data.chat_template = NULL;

    /* what the model says, up to the line's end, is exactly right */
    n = mft_tokenizer_encode(tok, "The cat", -1, 0, ids, 64);
    n = mft_generate(model, ids, n, NULL, out, 8);
    bytes = mft_tokenizer_decode(tok, out, 3, MFT_SKIP_SPECIAL, said, sizeof said - 1);
    CHECK(n > 3 && bytes > 0);
    said[bytes] = '\0';
    if (!strpbrk(said, "\"\\\n\xef")) {
        mft_answer b;
        snprintf(line, sizeof line, "{\"prompt\": \"The cat\", \"completion\": \"%s\"}\n{\"prompt\": \"The cat\", \"completion\": \"%sx\"}\n", said, said);
        put("g.jsonl", line);
        e = load("g.jsonl", &d);
        CHECK_MSG(mft_exam_ask(e, 0, model, 3, &a) == MFT_OK && a.exact == 1, "%s", said);
        CHECK(mft_exam_ask(e, 1, model, 3, &b) == MFT_OK && b.exact == 0);
        mft_exam_destroy(e);
    }

    put("b.jsonl", "{\"prompt\": \"a\", \"completion\": \" b\"}\n{\"prompt\": \"a\", \"completion\": \" b\", \"choices\": [\"c\"]}\n");
    refuse("b.jsonl", &d, MFT_ERR_FORMAT, "line 2: the answer 'b' is none of the 1 choices");
    data.skip_bad_lines = 1;
    e = load("b.jsonl", &d);
    CHECK(mft_exam_size(e) == 1);
    mft_exam_destroy(e);
    put("t.jsonl", "{\"text\": \"a\"}\n");
    refuse("t.jsonl", &d, MFT_ERR_INVALID_ARGUMENT, "no question");
    data.skip_bad_lines = 0;
    refuse("t.jsonl", &d, MFT_ERR_FORMAT, "no answers to ask for");
    put("c.jsonl", "{\"prompt\": \"a\", \"completion\": \" b\", \"choices\": \"b\"}\n");
    refuse("c.jsonl", &d, MFT_ERR_FORMAT, "not an array");
    put("e.jsonl", "{\"prompt\": \"a\", \"completion\": \" \"}\n");
    refuse("e.jsonl", &d, MFT_ERR_FORMAT, "empty");
    put("empty.jsonl", "\n");
    refuse("empty.jsonl", &d, MFT_ERR_INVALID_ARGUMENT, "no question");
    refuse("not-there.jsonl", &d, MFT_ERR_IO, "not-there");
}

static void on_part(void *user, double loss_sum, int64_t n_tokens)
{
    double *sums = (double *)user;
    sums[0] += loss_sum; sums[1] += (double)n_tokens; sums[2] += 1;
}

static void test_compare(void)
{
    static const double base[5] = { 1, 0, 0, 1, 1 }, other[5] = { 1, 1, 0, 1, 1 }, a[3] = { 4, 6, 5 }, b[3] = { 3, 7, 2 }, w[3] = { 2, 3, 1 };
    mft_comparison c;
    mft_eval       e;
    int32_t        ids[3000];
    double         sums[3] = { 0, 0, 0 };
    int            i;
    mft_compare(base, other, NULL, 5, &c);              /* differences 0 1 0 0 0: mean 0.2, standard error sqrt(0.2 / 5) = 0.2 */
    CHECK(fabs(c.base - 0.6) < 1e-12 && fabs(c.other - 0.8) < 1e-12 && fabs(c.difference - 0.2) < 1e-12 && c.n == 5);
    CHECK(fabs(c.low - (0.2 - 1.959963984540054 * 0.2)) < 1e-12 && fabs(c.high - (0.2 + 1.959963984540054 * 0.2)) < 1e-12);
    mft_compare(a, b, w, 3, &c);                        /* r = -3/6; residuals -1 + 1, 1 + 1.5, -3 + 0.5 */
    CHECK(fabs(c.difference + 0.5) < 1e-12 && fabs(c.high - c.difference - 1.959963984540054 * sqrt(1.5 * 12.5) / 6) < 1e-12);
    mft_compare(a, b, NULL, 1, &c);
    CHECK(c.low != c.low && c.high != c.high && c.difference == -1);
    for (i = 0; i < 3000; i++) ids[i] = i * 7 % 430;
    CHECK(mft_perplexity_parts(model, ids, 3000, 64, 64, on_part, sums, &e) == MFT_OK);
    CHECK(sums[2] == 4 && sums[1] == (double)e.n_tokens && fabs(sums[0] / sums[1] - e.loss) < 1e-9);    /* 16 windows a pass, the last one short */
}

int main(void)
{
    if (!room_make("exam")) return 1;
    if (mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    set_up();
    if (model && tok) {
        TEST(test_likelihood);
        TEST(test_mmlu);
        TEST(test_too_long);
        TEST(test_lines);
        TEST(test_compare);
    }
    mft_context_destroy(ctx);
    remove_dir(room);
    return test_report("exam") || !model || !tok;
}
