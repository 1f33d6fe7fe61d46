/* fuzz_json.c - what mft_json_parse takes, the writer writes so that it parses to the same again,
 * compact or indented; what it refuses, it refuses with line and column. */
#define MFT_IMPLEMENTATION
#include "../../mft.h"
#include "../../mft_safetensors.h"

#define FUZZ_NAME "json"
#include "fuzz.h"

static mft__json_writer written(mft_context *ctx, const mft_json *root, int indent)
{
    mft__json_writer w;
    mft__json_write_start(&w, ctx, indent);
    mft__json_write_node(&w, root);
    FUZZ_CHECK(!w.failed);
    return w;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    mft_context_desc desc;
    mft_context     *ctx;
    mft_json        *root, *again;
    mft__json_writer compact, indented, second;
    mft_memory_report before, after;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1;
    FUZZ_CHECK(mft_context_create(&desc, &ctx) == MFT_OK);
    mft_memory(ctx, &before);
    if (mft_json_parse(ctx, (const char *)data, bytes, &root) != MFT_OK) {
        FUZZ_CHECK(!root && strstr(mft_error_message(ctx), "JSON: line ") && strstr(mft_error_message(ctx), ", column "));
        mft_memory(ctx, &after);
        FUZZ_CHECK(after.now == before.now);
    } else {
        compact  = written(ctx, root, 0);
        indented = written(ctx, root, 3);
        FUZZ_CHECK(mft_json_parse(ctx, (const char *)indented.text, indented.bytes, &again) == MFT_OK);
        second = written(ctx, again, 0);
        FUZZ_CHECK(second.bytes == compact.bytes && memcmp(second.text, compact.text, compact.bytes) == 0);
        mft__json_write_free(&second);
        mft_json_destroy(again);
        FUZZ_CHECK(mft_json_parse(ctx, (const char *)compact.text, compact.bytes, &again) == MFT_OK);
        second = written(ctx, again, 3);
        FUZZ_CHECK(second.bytes == indented.bytes && memcmp(second.text, indented.text, indented.bytes) == 0);
        mft__json_write_free(&second);
        mft__json_write_free(&compact);
        mft__json_write_free(&indented);
        mft_json_destroy(again);
        mft_json_destroy(root);
        mft_memory(ctx, &after);
        FUZZ_CHECK(after.now == before.now);
    }
    mft_context_destroy(ctx);
    return 0;
}
