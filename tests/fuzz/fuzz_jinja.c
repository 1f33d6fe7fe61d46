/* fuzz_jinja.c - a template from anywhere: it is refused, or compiled and run within its bounds over a conversation
 * with every kind of value, giving text and spans inside it; what fails has a sentence with the line. The same
 * template renders the same twice, and text without tags is given back as it is. No memory stays. */
#define MFT_IMPLEMENTATION
#include "../../mft.h"
#include "../../mft_safetensors.h"
#include "../../mft_models.h"

#define FUZZ_NAME "jinja"
#include "fuzz.h"

static const char conversation[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"Be \\u00e9 brief. \"}, {\"role\": \"user\", \"content\": \" 2+2?\\n\"},"
    "{\"role\": \"assistant\", \"content\": \"<think>\\nx\\n</think>\\n\\n4\"}, {\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"and?\"}]},"
    "{\"role\": \"assistant\", \"content\": null, \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5, true, null], \"b\": \"\\ud83d\\ude00\"}}}]},"
    "{\"role\": \"tool\", \"content\": \"42\"}, {\"role\": \"assistant\", \"content\": \"\"}],"
    "\"tools\": [{\"function\": {\"name\": \"f\", \"parameters\": {\"properties\": {\"items\": {\"type\": \"array\"}}}}}], \"variables\": {\"n\": 3, \"x\": -1.5, \"s\": \"a b\"}}";

static int is_plain(const uint8_t *data, size_t bytes)
{
    size_t i;
    for (i = 0; i < bytes; i++)
        if (data[i] == '\r' || (data[i] == '{' && i + 1 < bytes && (data[i + 1] == '{' || data[i + 1] == '%' || data[i + 1] == '#'))) return 0;
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    mft_context_desc   desc;
    mft_context       *ctx;
    mft_json          *j = NULL;
    mft_chat_template *t = NULL;
    mft__chat_text     x, again;
    mft_chat           chat;
    mft_memory_report  before, after;
    size_t             i;

    memset(&desc, 0, sizeof desc);
    memset(&chat, 0, sizeof chat);
    memset(&x, 0, sizeof x);
    memset(&again, 0, sizeof again);
    desc.n_threads = 1;
    FUZZ_CHECK(mft_context_create(&desc, &ctx) == MFT_OK);
    mft_memory(ctx, &before);
    FUZZ_CHECK(mft_json_parse(ctx, conversation, sizeof conversation - 1, &j) == MFT_OK);
    if (mft_chat_template_create(ctx, (const char *)data, (int64_t)bytes, &t) != MFT_OK)
        FUZZ_CHECK(!t && strstr(mft_error_message(ctx), "chat template"));
    else {
        mft_status s;
        chat.messages_json = mft_json_get(j, "messages"); chat.tools = mft_json_get(j, "tools"); chat.variables = mft_json_get(j, "variables");
        chat.now = 1751328000; chat.flags = MFT_GENERATION_PROMPT;
        s = mft__chat_render(t, &chat, 0, &x);
        if (s != MFT_OK) FUZZ_CHECK(x.bytes == 0 && strstr(mft_error_message(ctx), "chat template, line "));
        else {
            FUZZ_CHECK(x.text[x.bytes] == '\0');
            if (is_plain(data, bytes)) {
                FUZZ_CHECK(x.bytes == bytes - (bytes && data[bytes - 1] == '\n'));
                FUZZ_CHECK(memcmp(x.text, data, x.bytes) == 0);
            }
            if (x.bytes < 4096) {                               /* long outputs took long */
                s = mft__chat_render(t, &chat, 1, &again);
                if (s == MFT_OK) {
                    FUZZ_CHECK(again.bytes == x.bytes && memcmp(again.text, x.text, x.bytes) == 0);
                    for (i = 0; i < again.n_spans; i++)
                        FUZZ_CHECK(again.spans[i].begin >= 0 && again.spans[i].begin < again.spans[i].end && again.spans[i].end <= (int64_t)again.bytes);
                }
            }
        }
    }
    mft__chat_text_free(ctx, &x);
    mft__chat_text_free(ctx, &again);
    mft_chat_template_destroy(t);
    mft_json_destroy(j);
    mft_memory(ctx, &after);
    FUZZ_CHECK(after.now == before.now);
    mft_context_destroy(ctx);
    return 0;
}
